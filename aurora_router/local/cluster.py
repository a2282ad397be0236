"""What the local clusters of all engines have in common: instances with an address each, a life, and deaths.

Nothing outlives a cluster: neither `stop()`, nor Ctrl-C, nor a kill of this process leaves a server or a file (`host.py`).
"""

from __future__ import annotations

import atexit
import os
import secrets
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Generic, Self, TypeVar

from aurora_router.local.host import Host, Server
from aurora_router.local.system import LocalClusterError, free_addresses

APP = "app"  # the application's user, and its database

S = TypeVar("S", bound=Server)


@dataclass(frozen=True)
class LocalInstance:
    """One server of a local cluster. Which role it has is the cluster's to say (`cluster.writer`, `cluster.readers`)."""

    name: str
    host: str
    port: int
    _cluster: Cluster[Any] = field(repr=False, compare=False)

    @property
    def address(self) -> str:
        """`host:port`, as `Router(instances=[...])` takes it."""
        return f"{self.host}:{self.port}"

    @property
    def url(self) -> str:
        """SQLAlchemy URL of this instance for the application's user. It contains the password."""
        return self._cluster._url(self, APP, self._cluster.app_password)

    @property
    def running(self) -> bool:
        """Whether its server process exists; a frozen one does."""
        server: Server = self._cluster._server(self)
        return server.running

    @property
    def pid(self) -> int | None:
        """Process id of the server (PostgreSQL's postmaster), None when it is not running."""
        process = self._cluster._server(self).process
        return process.pid if process is not None and process.poll() is None else None

    def connect(self, **options: Any) -> Any:
        """Open a connection of the engine's driver (psycopg, PyMySQL) as superuser, in the database `app`.

        It is in autocommit unless `options`, the driver's, say otherwise.
        """
        return self._cluster._connect_app(self, **options)


class Cluster(ABC, Generic[S]):
    """One writer and `readers` readers; `PostgresCluster` and the others say what the parameters mean to their engine."""

    _superuser: ClassVar[str]
    _driver: ClassVar[str]  # as a SQLAlchemy URL names it

    def __init__(
        self,
        readers: int = 2,
        *,
        synchronous: bool = False,
        settings: Mapping[str, str] | None = None,
        bin_dir: Path | str | None = None,
        directory: Path | str | None = None,
        monitor_privileges: bool = True,
        on_progress: Callable[[str], None] | None = None,
    ) -> None:
        if readers < 0:
            raise ValueError(f"readers must be 0 or more, not {readers}")
        self.synchronous = synchronous
        self.app_password = secrets.token_urlsafe(18)
        self.superuser_password = secrets.token_urlsafe(18)
        self.last_promotion: float | None = None  # time.monotonic() when the last promoted instance took writes
        self._count = readers + 1
        self._settings = settings or {}
        self._bin_dir = bin_dir
        self._directory = directory
        self._monitor_privileges = monitor_privileges
        self._progress = on_progress or (lambda _: None)
        self._instances: tuple[LocalInstance, ...] = ()
        self._servers: dict[str, S] = {}
        self._writer: LocalInstance | None = None
        self._host: Host | None = None

    def __repr__(self) -> str:
        if self._host is None:
            return f"<{type(self).__name__} stopped>"
        states = (
            f"{instance.name} {instance.address} "
            + ("frozen" if server.frozen else "down" if not server.running else "reader" if server.stands_by else "writer")
            for instance, server in ((i, self._server(i)) for i in self._instances)
        )
        return f"<{type(self).__name__} {', '.join(states)}>"

    # -- what there is

    @property
    def instances(self) -> Sequence[LocalInstance]:
        """All instances, in the order of their names; the first is the first writer."""
        return self._instances

    @property
    def writer(self) -> LocalInstance:
        """The instance that was promoted last (at first the first), running or not."""
        if self._writer is None:
            raise LocalClusterError("the cluster is not started")
        return self._writer

    @property
    def readers(self) -> Sequence[LocalInstance]:
        """The running instances that stand by; those that are down, and a deposed writer, are none."""
        return tuple(i for i in self._instances if self._server(i).running and self._server(i).stands_by)

    @property
    def url(self) -> str:
        """SQLAlchemy URL of the writer for the application's user, who is no superuser and owns the database `app`."""
        return self.writer.url

    @property
    def admin_url(self) -> str:
        """SQLAlchemy URL of the writer for the superuser."""
        return self._url(self.writer, self._superuser, self.superuser_password)

    @abstractmethod
    def execute(self, query: str, *args: Any, instance: LocalInstance | None = None) -> list[tuple[Any, ...]]:
        """Run one statement as superuser in the database `app`, on the writer or on `instance`; returns its rows.

        Placeholders are the driver's `%s`. The application's user may use the tables that are made here.
        """

    # -- life

    def start(self) -> Self:
        """Make and start all servers; returns when every reader has what the writer has."""
        if self._host is not None:
            raise LocalClusterError("the cluster is started already")
        try:
            self._start()
        except BaseException:  # Ctrl-C as well: nothing may be left behind
            self.stop()
            raise
        return self

    def stop(self) -> None:
        """End all servers and remove their files. Does nothing when that has been done, or in a forked child."""
        host, self._host = self._host, None
        _running.discard(self)
        if host is not None:
            host.close()
            for server in self._servers.values():
                if server.process is not None:
                    server.process.wait(10)
            self._writer = None

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    @abstractmethod
    def _start(self) -> None: ...

    def _settle(self, host: Host, server: Callable[[Host, str], S]) -> None:
        """Take a host, and find addresses on it."""
        self._host = host
        _running.add(self)
        addresses, port = free_addresses(self._count)
        self._instances = tuple(LocalInstance(f"db-{n}", address, port, self) for n, address in enumerate(addresses, 1))
        self._servers = {i.name: server(host, i.name) for i in self._instances}
        self._writer = self._instances[0]

    # -- what can happen to it

    @abstractmethod
    def promote(self, instance: LocalInstance | None = None) -> LocalInstance:
        """Make a reader the writer: `instance`, or else the reader that has received most. Returns it once it takes writes.

        The other readers follow it, from before it takes writes, so that with synchronous replication its first commit has
        somebody to acknowledge it; one that had received more than it loses that. The old writer is left as it is: alive, it
        goes on taking writes (a split brain), until `rejoin` makes it a reader.
        """

    def kill(self, instance: LocalInstance) -> None:
        """End the instance as a crash does: its processes are gone at once and the kernel closes their sockets."""
        self._server(instance).kill()

    def freeze(self, instance: LocalInstance) -> None:
        """Stop the instance's processes: its sockets stay open, the kernel accepts connections, nothing answers."""
        if not instance.running:
            raise LocalClusterError(f"{instance.name} is down and cannot be frozen")
        self._server(instance).freeze()

    def thaw(self, instance: LocalInstance) -> None:
        """Let a frozen instance go on. A reader that missed a promotion then follows the new writer."""
        server = self._server(instance)
        if server.frozen:
            server.thaw()
            if server.stands_by and server.follows != self.writer.name:
                self._follow(instance, self.writer)

    @abstractmethod
    def restart(self, instance: LocalInstance) -> None:
        """Start the instance again as what it was, after a fast shutdown if it runs. A deposed writer comes back as a writer."""

    @abstractmethod
    def rejoin(self, instance: LocalInstance) -> None:
        """Make the instance, dead or alive, a reader of the current writer, without lag; returns when it streams.

        What only it had is lost.
        """

    @abstractmethod
    def set_lag(self, instance: LocalInstance, seconds: float) -> None:
        """Have a reader show each commit `seconds` after it was made on the writer; 0 ends that at once."""

    @abstractmethod
    def pause_replay(self, instance: LocalInstance) -> None:
        """Have a reader receive but replay nothing, until `resume_replay`; returns when it has stopped replaying."""

    @abstractmethod
    def resume_replay(self, instance: LocalInstance) -> None:
        """Undo `pause_replay`."""

    @abstractmethod
    def wait_in_sync(self, timeout: float = 30.0) -> None:
        """Wait until all running readers have replayed what the writer has written by now.

        Raises TimeoutError, naming the readers that are behind, after `timeout` seconds.
        """

    def heal(self) -> None:
        """Make the cluster whole: all instances run, thawed, the readers stream from the writer without lag, in sync."""
        for instance in self._instances:
            self.thaw(instance)
        if not self.writer.running:
            self.restart(self.writer)
        for instance in self._instances:
            if instance == self.writer:
                continue
            if instance in self.readers and self._server(instance).ready:
                self.set_lag(instance, 0)
                self.resume_replay(instance)
            self.rejoin(instance)
        self.wait_in_sync()

    @abstractmethod
    def _follow(self, instance: LocalInstance, writer: LocalInstance) -> None:
        """Point a running reader to the writer, or to the reader that is about to be one."""

    # -- servers and connections

    @abstractmethod
    def _connect_app(self, instance: LocalInstance, **options: Any) -> Any:
        """A connection as superuser in the application's database."""

    def _server(self, instance: LocalInstance) -> S:
        if instance._cluster is not self:
            raise ValueError(f"{instance!r} belongs to another cluster")
        return self._servers[instance.name]

    def _url(self, instance: LocalInstance, user: str, password: str) -> str:
        return f"{self._driver}://{user}:{password}@{instance.address}/{APP}"

    def _disown(self) -> None:
        """In a forked child: the cluster is the parent's, whose pipe must close when the parent's end of it does."""
        if self._host is not None:
            self._host.disown()
            self._host = None
            for server in self._servers.values():
                if server.process is not None:
                    server.process.returncode = 0  # not the child's to wait for


# -- the clusters of this process

_running: weakref.WeakSet[Cluster[Any]] = weakref.WeakSet()


@atexit.register
def _stop_all() -> None:
    for cluster in list(_running):
        cluster.stop()


def _disown_all() -> None:
    for cluster in list(_running):
        cluster._disown()
    _running.clear()


os.register_at_fork(after_in_child=_disown_all)
