"""The common base of the local clusters of all engines: instances with an address each, their life, and their deaths.

Nothing outlives a cluster: neither `stop()`, nor Ctrl-C, nor a kill of this process leaves a server or a file (`host.py`).
"""

from __future__ import annotations

import atexit
import contextlib
import os
import secrets
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Generic, Self, TypeVar

from aurora_router.local.host import Host, Server
from aurora_router.local.system import LocalClusterError, free_addresses, until

APP = "app"  # the application's user, and its database
CONNECT_TIMEOUT = 30  # seconds; a busy machine may need long

S = TypeVar("S", bound=Server)


@dataclass(frozen=True)
class LocalInstance:
    """One server of a local cluster. The cluster knows its role (`cluster.writer`, `cluster.readers`)."""

    name: str
    host: str
    port: int
    _server: Server = field(repr=False, compare=False)
    _url_of: Callable[[LocalInstance], str] = field(repr=False, compare=False)
    _open: Callable[..., Any] = field(repr=False, compare=False)

    @property
    def address(self) -> str:
        """`host:port`, as `Router(instances=[...])` takes it."""
        return f"{self.host}:{self.port}"

    @property
    def url(self) -> str:
        """SQLAlchemy URL of this instance for the application's user. It contains the password."""
        return self._url_of(self)

    @property
    def running(self) -> bool:
        """Whether the server process exists, frozen or not."""
        return self._server.running

    @property
    def pid(self) -> int | None:
        """Process id of the server (PostgreSQL's postmaster). None if it is not running."""
        process = self._server.process
        return process.pid if process is not None and process.poll() is None else None

    def connect(self, **options: Any) -> Any:
        """Open a connection of the engine's driver (psycopg, PyMySQL) as superuser, in the database `app`.

        options: those of the driver. Without any, the connection is in autocommit.
        """
        return self._open(self, **options)


class Cluster(ABC, Generic[S]):
    """One writer and `readers` readers.

    `PostgresCluster` and the other subclasses say what the parameters mean to their engine.
    """

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
        # The moment when the last promoted instance took writes (seconds, monotonic).
        self.last_promotion: float | None = None
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
        """All instances, in the order of their names. The first one is the first writer."""
        return self._instances

    @property
    def writer(self) -> LocalInstance:
        """The instance that was promoted last, running or not. Before any promotion it is the first instance."""
        if self._writer is None:
            raise LocalClusterError("the cluster is not started")
        return self._writer

    @property
    def readers(self) -> Sequence[LocalInstance]:
        """The running instances that are readers. A deposed writer is no reader."""
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
        """Run one statement as superuser in the database `app`, and return its rows.

        query: SQL with the driver's placeholders (`%s`).
        args: the values for the placeholders.
        instance: runs the statement. None: the writer.

        The application's user may use tables that are made here.
        """

    # -- life

    def start(self) -> Self:
        """Make and start all servers. Return when every reader has all of the writer's data."""
        if self._host is not None:
            raise LocalClusterError("the cluster is started already")
        try:
            self._start()
        except BaseException:  # Ctrl-C as well: nothing may be left behind
            self.stop()
            raise
        return self

    def stop(self) -> None:
        """End all servers and remove their files. Do nothing if that has been done, or in a forked child."""
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
        names = [f"db-{n}" for n in range(1, self._count + 1)]
        self._servers = {name: server(host, name) for name in names}
        self._instances = tuple(
            LocalInstance(name, address, port, self._servers[name], self._app_url, self._connect_app)
            for name, address in zip(names, addresses, strict=True)
        )
        self._writer = self._instances[0]

    # -- what can happen to it

    @abstractmethod
    def promote(self, instance: LocalInstance | None = None) -> LocalInstance:
        """Make a reader the writer, and return it once it takes writes.

        instance: the reader. None: the reader that has received most.

        The other readers follow it before it takes writes. So with synchronous replication they acknowledge its first commit.
        A reader that had received more loses the rest. The old writer is left as it is. If it is alive, it goes on taking writes
        (a split brain) until `rejoin` makes it a reader.
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
        """Start the instance again in its old role, after a fast shutdown if it runs. A deposed writer comes back as a writer."""

    @abstractmethod
    def rejoin(self, instance: LocalInstance) -> None:
        """Make the instance, dead or alive, a reader of the current writer, without lag. Return when it streams.

        Commits that only this instance had are lost.
        """

    @abstractmethod
    def set_lag(self, instance: LocalInstance, seconds: float) -> None:
        """Make a reader show each commit `seconds` after it was made on the writer. 0 ends that at once."""

    @abstractmethod
    def pause_replay(self, instance: LocalInstance) -> None:
        """Make a reader receive but replay nothing, until `resume_replay`. Return when it has stopped replaying."""

    @abstractmethod
    def resume_replay(self, instance: LocalInstance) -> None:
        """Undo `pause_replay`."""

    @abstractmethod
    def wait_in_sync(self, timeout: float = 30.0) -> None:
        """Wait until all running readers have replayed what the writer has written by now.

        timeout: seconds.

        Raises TimeoutError, which names a reader that is behind.
        """

    def heal(self) -> None:
        """Make the cluster whole: all instances run, none is frozen, and the readers stream, without lag and in sync."""
        for instance in self._instances:
            self.thaw(instance)
        if not self.writer.running:
            self.restart(self.writer)
        for instance in self._instances:
            if self._server(instance).ready:
                self._wait_until_recovered(instance)
        for instance in self._instances:
            if instance == self.writer:
                continue
            if instance in self.readers and self._server(instance).ready:
                self.set_lag(instance, 0)
                self.resume_replay(instance)
            self.rejoin(instance)
        self.wait_in_sync()

    def _wait_until_recovered(self, instance: LocalInstance) -> None:
        """Wait for a server that has lost a process. It recovers as from a crash, and takes no connections meanwhile."""
        # A reader that was ahead of the writer waits in vain for the rest of its log.
        with contextlib.suppress(TimeoutError):
            for _ in until(10, f"{instance.name} to accept connections"):
                with contextlib.suppress(Exception):  # the driver's
                    self._connect_app(instance).close()
                    return

    @abstractmethod
    def _follow(self, instance: LocalInstance, writer: LocalInstance) -> None:
        """Point a running reader to the writer, or to the reader that is about to be one."""

    # -- servers and connections

    @abstractmethod
    def _connect_app(self, instance: LocalInstance, **options: Any) -> Any:
        """A connection as superuser in the application's database."""

    def _server(self, instance: LocalInstance) -> S:
        if instance not in self._instances:
            raise ValueError(f"{instance!r} belongs to another cluster")
        return self._servers[instance.name]

    def _app_url(self, instance: LocalInstance) -> str:
        return self._url(instance, APP, self.app_password)

    def _url(self, instance: LocalInstance, user: str, password: str) -> str:
        return f"{self._driver}://{user}:{password}@{instance.address}/{APP}"

    def disown(self) -> None:
        """Let go of the cluster in a forked child. It is the parent's, and its pipe must close when the parent closes its end."""
        if self._host is not None:
            self._host.disown()
            self._host = None
            for server in self._servers.values():
                if server.process is not None:
                    server.process.returncode = 0  # only the parent can wait for it


# -- the clusters of this process

_running: weakref.WeakSet[Cluster[Any]] = weakref.WeakSet()


@atexit.register
def _stop_all() -> None:
    for cluster in list(_running):
        cluster.stop()


def _disown_all() -> None:
    for cluster in list(_running):
        cluster.disown()
    _running.clear()


os.register_at_fork(after_in_child=_disown_all)
