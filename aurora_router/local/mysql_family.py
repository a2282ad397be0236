"""The common base of MySQL's and MariaDB's local clusters: one writer, readers that replicate by GTID, and faults.

Each instance listens on an address of its own and all on one port, as PostgreSQL's do. Commits survive the kill of a server,
because the operating system survives it too. The logs are written at each commit, but not flushed to the disk
(`innodb_flush_log_at_trx_commit=2`, `sync_binlog=0`). So commits would not survive a power cut. The doublewrite buffer stays
on, because a kill can cut the write of a page in two.
"""

from __future__ import annotations

import contextlib
import secrets
import shutil
import time
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

from aurora_router.core.positions import Position
from aurora_router.local.cluster import APP, CONNECT_TIMEOUT, Cluster, LocalInstance
from aurora_router.local.host import Host
from aurora_router.local.late import DelayedLink
from aurora_router.local.mysqld import Mysqld, Words
from aurora_router.local.system import LocalClusterError, tail, until

# Readers connect as this user. It may also end the role of a reader, and on MariaDB write on a reader.
_REPLICATION = "replication"

# Servers start and end fast. As in a crash, nothing is loaded, dumped or written back then.
_SETTINGS: Mapping[str, str] = {
    "socket": "",
    "tmpdir": ".",  # the data directory: a killed server leaves files there
    "skip_name_resolve": "ON",
    "character_set_server": "utf8mb4",
    "max_connections": "200",
    "log_bin": "binlog",
    "relay_log": "relay",
    "sync_binlog": "0",
    "innodb_flush_log_at_trx_commit": "2",
    "innodb_fast_shutdown": "2",
    "innodb_buffer_pool_dump_at_shutdown": "OFF",
    "innodb_buffer_pool_load_at_startup": "OFF",
}

_ON: Mapping[bool, str] = {True: "ON", False: "OFF"}


class MysqlFamilyCluster(Cluster[Mysqld]):
    """A cluster of MySQL or MariaDB. `MysqlCluster` and `MariadbCluster` say what the parameters mean."""

    _superuser = "root"
    _words: ClassVar[Words]
    _program: Path

    @abstractmethod
    def _find(self) -> tuple[int, ...]:
        """Find the programs, and return their release.

        Raises LocalClusterError.
        """

    @abstractmethod
    def _initialize(self, host: Host, directory: str) -> None:
        """Make the data directory of that name on the host."""

    @abstractmethod
    def _has_parted(self, instance: LocalInstance, writer: LocalInstance) -> bool:
        """Whether the instance has a transaction that the writer lacks. The instance is asked first: it may still receive."""

    def execute(self, query: str, *args: Any, instance: LocalInstance | None = None) -> list[tuple[Any, ...]]:
        """Run one statement as superuser in the database `app`, and return its rows.

        query: SQL with PyMySQL's placeholders (`%s`).
        args: the values for the placeholders.
        instance: runs the statement. None: the writer.

        The application's user may use tables that are made here.
        """
        with self._connect_app(instance or self.writer) as connection:
            return _rows(connection, query, *args)

    # -- life

    def stop(self) -> None:
        """End all servers and remove their files. Do nothing if that has been done, or in a forked child."""
        for instance in self._instances if self._host is not None else ():
            self._forget_pause(instance)
            self._forget_lag(instance)
        super().stop()

    def _start(self) -> None:
        release = self._find()
        host = Host(self._directory, ending="KILL")
        self._pauses: dict[str, Any] = {}
        self._lines: dict[str, DelayedLink] = {}
        self._replication_password = secrets.token_urlsafe(18)
        self._settle(host, Mysqld)
        host.keep(self._program)
        if not host.can_run(self._program):
            raise LocalClusterError(f"started by root, the servers run as a user who cannot read {self._program}")
        readers = self._instances[1:]

        self._progress(f"making a {self._words.product} {release[0]}.{release[1]} cluster in {host.directory}")
        self._initialize(host, self._server(self.writer).data.name)
        # A cluster that has never run may be copied file by file.
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda reader: self._copy(self.writer, reader), readers))
        users = host.directory / "users"
        host.write(users, "".join(f"{statement};\n" for statement in self._users(release)))
        for instance in self._instances:
            role = "writer" if instance == self.writer else "reader"
            self._progress(f"starting the {role} {instance.name} on {instance.address}")
            self._server(instance).stands_by = role == "reader"
            self._launch(instance, f"--init-file={users}")
        for instance in self._instances:
            self._server(instance).wait_ready()
        users.unlink()
        for reader in readers:
            self._follow(reader, self.writer)
        self._create_application()
        self.wait_in_sync()
        self._progress("the cluster is ready")

    def _users(self, release: tuple[int, ...]) -> Sequence[str]:  # noqa: ARG002
        """Return the statements of each server's first start. None of them is replicated."""
        return (
            "SET sql_log_bin = 0",
            f"CREATE USER {self._superuser}@'%' IDENTIFIED BY '{self.superuser_password}'",
            f"GRANT ALL ON *.* TO {self._superuser}@'%' WITH GRANT OPTION",
            f"CREATE USER {_REPLICATION}@'%' IDENTIFIED BY '{self._replication_password}'",
            f"GRANT ALL ON *.* TO {_REPLICATION}@'%'",
        )

    def _create_application(self) -> None:
        with self._connect(self.writer) as connection:
            for statement in (
                f"CREATE DATABASE {APP}",
                f"CREATE USER {APP}@'%' IDENTIFIED BY '{self.app_password}'",
                f"GRANT ALL ON {APP}.* TO {APP}@'%'",
                *([f"GRANT {self._words.monitor} ON *.* TO {APP}@'%'"] if self._monitor_privileges else []),
            ):
                _rows(connection, statement)

    # -- what can happen to it

    def promote(self, instance: LocalInstance | None = None) -> LocalInstance:
        """Make a reader the writer, and return it once it takes writes.

        instance: the reader. None: the reader that has received most.

        The reader replays all that it has received, even if it was late or paused. The other readers follow it before it takes
        writes. A reader that had replayed more is copied anew. The old writer is left as it is. If it is alive, it goes on
        taking writes (a split brain) until `rejoin` makes it a reader. If it is frozen and replication is synchronous, a
        promotion takes a second longer, because the old writer's readers try to sign off from it.
        """
        instance = instance or self._most_advanced()
        server = self._server(instance)
        if not server.running or not server.stands_by or server.frozen:
            raise LocalClusterError(f"{instance.name} cannot be promoted: it is no reader, or down, or frozen")
        followers = [r for r in self.readers if r != instance and not self._server(r).frozen]
        self._leave(instance, followers)
        self._replay_all(instance)
        self._halt(instance)
        self._order(instance, f"RESET {self._words.replica} ALL")
        self._forget_lag(instance)
        self._order(instance, *(f"SET GLOBAL {name} = {value}" for name, value in self._acknowledging(False).items()))
        parted = []
        for reader in followers:
            self._halt(reader)
            if self._has_parted(reader, instance):
                parted.append(reader)
            else:
                self._follow(reader, instance)
        self._order(instance, "SET GLOBAL read_only = OFF")
        self.last_promotion = time.monotonic()
        self._writer, server.follows, server.stands_by = instance, None, False
        for reader in parted:
            self._rebuild(reader)
        return instance

    def restart(self, instance: LocalInstance) -> None:
        """Start the instance again in its old role, after a shutdown if it runs. A deposed writer comes back as a writer."""
        self._server(instance).shut_down()
        self._launch(instance)
        self._server(instance).wait_ready()
        if self._server(instance).stands_by:
            self._follow(instance, self.writer)
        for reader in self.readers:
            if self._server(reader).follows == instance.name and not self._server(reader).frozen:
                # On its own, the reader would try to connect only once a second.
                self._order(reader, *(f"{verb} {self._words.replica} IO_THREAD" for verb in ("STOP", "START")))

    def rejoin(self, instance: LocalInstance) -> None:
        """Make the instance, dead or alive, a reader of the current writer, without lag. Return when it streams.

        An instance may have commits that the writer lacks, for example if it is a deposed writer. It loses them, because it
        becomes a copy of the writer. The writer is frozen while it is copied.
        """
        if instance == self.writer:
            raise ValueError(f"{instance.name} is the writer; promote another instance first")
        server = self._server(instance)
        self.thaw(instance)
        if not server.running or not server.stands_by:
            server.kill()  # a shutdown would acknowledge commits that no reader has
            self._stand_by(instance)
        if not self._has_parted(instance, self.writer):
            if server.follows == self.writer.name and instance.name not in self._lines and self._streams(instance, 0):
                return
            self._forget_lag(instance)
            self._follow(instance, self.writer)
            if self._streams(instance, 10):
                return
        self._rebuild(instance)

    def set_lag(self, instance: LocalInstance, seconds: float) -> None:
        """Make a reader show each commit `seconds` after it was made on the writer. 0 ends that at once.

        The writer's log is held back on its way to the reader (`late.py`). So the reader receives the log late, and replays it
        without delay. The first time, the reader needs a moment to connect anew. Its status does not show this lag.
        """
        line = self._lines.get(instance.name)
        if line is None and seconds:
            if instance not in self.readers:
                raise LocalClusterError(f"{instance.name} is no reader that runs, and cannot be late")
            line = self._lines[instance.name] = DelayedLink((self.writer.host, self.writer.port))
            line.seconds = seconds
            self._follow(instance, self.writer)
            if self._sends():
                self._streams(instance, 10)
        elif line is not None:
            line.seconds = seconds

    def pause_replay(self, instance: LocalInstance) -> None:
        """Make a reader receive but replay nothing, until `resume_replay`. Return when it has stopped replaying.

        Meanwhile nothing is committed on the reader. Its status still shows a running SQL thread.
        """
        if instance.name not in self._pauses:
            connection = self._connect(instance)
            for statement in self._words.pause:
                _rows(connection, statement)
            self._pauses[instance.name] = connection

    def resume_replay(self, instance: LocalInstance) -> None:
        """Undo `pause_replay`."""
        connection = self._pauses.pop(instance.name, None)
        if connection is not None:
            with connection:
                _rows(connection, self._words.resume)

    def wait_in_sync(self, timeout: float = 30.0) -> None:
        """Wait until all running readers have replayed what the writer has written by now.

        timeout: seconds.

        Raises TimeoutError, which names a reader that is behind.
        """
        deadline = time.monotonic() + timeout
        position = self._words.position(self._ask(self.writer, self._words.written))
        for reader in self.readers:
            if self._server(reader).frozen:
                raise TimeoutError(f"{reader.name} is frozen and will not replay")
            with self._connect(reader) as connection:
                for _ in until(deadline - time.monotonic(), f"{reader.name} to replay what {self.writer.name} wrote"):
                    if self._words.position(_value(connection, self._words.replayed)).covers(position):
                        break

    # -- readers and their writer

    def _stand_by(self, instance: LocalInstance) -> None:
        """Start an instance that is down as a reader. It knows its position, and follows no writer yet."""
        server = self._server(instance)
        server.stands_by, server.follows = True, None
        self._launch(instance)
        server.wait_ready()

    def _follow(self, instance: LocalInstance, writer: LocalInstance) -> None:
        """Point a running reader to the writer, or to the reader that is about to be one."""
        words, host, port = self._words, writer.host, writer.port
        if line := self._lines.get(instance.name):
            line.target = host, port
            host, port = line.host, line.port
        self._halt(instance)
        self._order(
            instance,
            f"{words.change} {words.source}_HOST = '{host}', {words.source}_PORT = {port}, "
            f"{words.source}_USER = '{_REPLICATION}', {words.source}_PASSWORD = '{self._replication_password}', "
            f"{words.source}_SSL = 0, {words.source}_CONNECT_RETRY = 1, {words.by_gtid}",
            f"START {words.replica}",
        )
        self._server(instance).follows = writer.name

    def _halt(self, instance: LocalInstance) -> None:
        """Stop a reader's replication."""
        if instance.name in self._pauses:  # until the pause ends, only a kill stops the SQL thread
            self._kill_appliers(instance)
        self._order(instance, f"STOP {self._words.replica}")

    def _kill_appliers(self, instance: LocalInstance) -> None:
        from pymysql.err import OperationalError

        with self._connect(instance) as connection:
            appliers = _rows(connection, self._words.appliers)
        for (number,) in appliers:
            with contextlib.suppress(OperationalError):  # the thread has ended with another one
                self._order(instance, f"KILL {number}")

    def _most_advanced(self) -> LocalInstance:
        candidates = [reader for reader in self.readers if not self._server(reader).frozen]
        if not candidates:
            raise LocalClusterError("there is no reader left to promote")
        for reader in candidates:
            self._take_in(reader)
        received = {reader: self._received(reader) for reader in candidates}
        most = candidates[0]
        for reader in candidates[1:]:
            if not received[most].covers(received[reader]):
                most = reader
        return most

    def _take_in(self, instance: LocalInstance) -> None:
        """Wait until a reader has all that a dead writer has sent. Do nothing if the writer is alive: it sends without end."""
        if not self.writer.running:
            if line := self._lines.get(instance.name):
                line.flush()
            for _ in until(10, f"{instance.name} to notice that {self.writer.name} is gone", every=0.003):
                if not self._runs(instance, "IO"):
                    break

    def _sends(self) -> bool:
        """Whether the writer can send anything."""
        return self.writer.running and not self._server(self.writer).frozen

    def _received(self, instance: LocalInstance) -> Position:
        """Return the position that a reader has received."""
        replayed = self._words.position(self._ask(instance, self._words.replayed))
        received = self._words.position(self._status(instance).get(self._words.received) or "")
        together = replayed.merge(received)
        assert together is not None
        return together

    def _leave(self, instance: LocalInstance, followers: Sequence[LocalInstance]) -> None:
        """Stop the readers from receiving, `instance` last. So it has received all that the others have acknowledged."""
        stop = f"STOP {self._words.replica} IO_THREAD"
        self._take_in(instance)
        if self._sends():
            if line := self._lines.get(instance.name):
                line.seconds = 0
            for reader in followers:
                self._order(reader, stop)
            acknowledged = [self._received(reader) for reader in followers]
            with contextlib.suppress(TimeoutError):
                for _ in until(5, f"{instance.name} to receive what others have", every=0.003):
                    received = self._received(instance)
                    if all(received.covers(other) for other in acknowledged):
                        break
            followers = ()
        with ThreadPoolExecutor(len(followers) + 1) as pool:  # a frozen writer delays each of them
            list(pool.map(lambda reader: self._order(reader, stop), (instance, *followers)))

    def _replay_all(self, instance: LocalInstance) -> None:
        """Make a reader replay all that it has received, because its relay log does not survive a change of writers."""
        self.resume_replay(instance)
        position = self._received(instance)
        for _ in until(60, f"{instance.name} to replay what it has received", every=0.003):
            if self._words.position(self._ask(instance, self._words.replayed)).covers(position):
                break
            if not self._runs(instance, "SQL"):
                error = self._status(instance)["Last_SQL_Error"]
                raise LocalClusterError(f"{instance.name} cannot replay what it has received: {error}")

    def _streams(self, instance: LocalInstance, timeout: float) -> bool:
        """Wait until a reader streams from the writer. Return False after `timeout` seconds."""
        with contextlib.suppress(TimeoutError):
            for _ in until(timeout, f"{instance.name} to stream"):
                if self._runs(instance, "IO", "SQL"):
                    return True
        return False

    def _rebuild(self, instance: LocalInstance) -> None:
        """Make an instance a copy of the writer.

        The writer is frozen for that. Its files are then as after a crash, and a copy of them recovers in the same way.
        """
        self._forget_lag(instance)
        server, source = self._server(instance), self._server(self.writer)
        server.kill()
        shutil.rmtree(server.data)
        thawed = not source.frozen
        source.freeze()
        try:
            self._copy(self.writer, instance)
        finally:
            if thawed:
                source.thaw()
        self._stand_by(instance)
        self._follow(instance, self.writer)
        if not self._streams(instance, 30):
            raise LocalClusterError(f"{instance.name} does not stream from {self.writer.name}\n{tail(server.log)}")

    def _copy(self, instance: LocalInstance, other: LocalInstance) -> None:
        """Copy an instance that is down or frozen, file by file."""
        assert self._host is not None
        self._host.run("cp", "-R", "-p", str(self._server(instance).data), str(self._server(other).data))

    def _forget_pause(self, instance: LocalInstance) -> None:
        if (connection := self._pauses.pop(instance.name, None)) is not None:
            connection.close()

    def _forget_lag(self, instance: LocalInstance) -> None:
        if (line := self._lines.pop(instance.name, None)) is not None:
            line.close()

    # -- servers and connections

    def _launch(self, instance: LocalInstance, *options: str) -> None:
        self._forget_pause(instance)
        server = self._server(instance)
        settings = {
            **_SETTINGS,
            **self._words.settings,
            **(self._words.acknowledged if self.synchronous else {}),
            **self._settings,
            **self._acknowledging(server.stands_by),
            "bind_address": instance.host,
            "port": str(instance.port),
            "server_id": str(self._instances.index(instance) + 1),
            self._words.read_only: _ON[server.stands_by],
        }
        server.launch(self._program, settings, f"--skip-{self._words.replica.lower()}-start", *options)

    def _acknowledging(self, stands_by: bool) -> Mapping[str, str]:
        """Return the settings that make a reader acknowledge, and a writer wait for that."""
        # After a crash, a server that starts as an acknowledging reader may drop from its log all that no other server has
        # acknowledged. That is right for a deposed writer, but wrong for an instance that is still the writer.
        replica, source = (f"rpl_semi_sync_{name.lower()}_enabled" for name in (self._words.replica, self._words.source))
        return {replica: _ON[stands_by], source: _ON[not stands_by]} if self.synchronous else {}

    def _order(self, instance: LocalInstance, *statements: str) -> None:
        """Run statements as the user who may do anything to a reader."""
        with self._connect(instance, user=_REPLICATION, password=self._replication_password) as connection:
            for statement in statements:
                _rows(connection, statement)

    def _ask(self, instance: LocalInstance, what: str) -> str:
        with self._connect(instance) as connection:
            return _value(connection, what)

    def _status(self, instance: LocalInstance) -> dict[str, Any]:
        """Return the status of a reader's replication. It is empty if there is none."""
        with self._connect(instance) as connection, connection.cursor() as cursor:
            cursor.execute(f"SHOW {self._words.replica} STATUS")
            row = cursor.fetchone()
            return dict(zip((column[0] for column in cursor.description), row, strict=True)) if row else {}

    def _runs(self, instance: LocalInstance, *threads: str) -> bool:
        """Whether these threads of a reader's replication run. IO receives, SQL replays."""
        status = self._status(instance)
        return all(status.get(f"{self._words.replica.capitalize()}_{thread}_Running") == "Yes" for thread in threads)

    def _connect_app(self, instance: LocalInstance, **options: Any) -> Any:
        return self._connect(instance, **{"database": APP, **options})

    def _connect(self, instance: LocalInstance, **options: Any) -> Any:
        """Open a connection of PyMySQL as superuser. As a context manager it closes itself."""
        try:
            import pymysql
        except ImportError as error:
            raise LocalClusterError(f"local clusters need PyMySQL: pip install 'aurora-router[mysql]' ({error})") from error
        return pymysql.connect(
            **{
                "host": instance.host,
                "port": instance.port,
                "user": self._superuser,
                "password": self.superuser_password,
                "connect_timeout": CONNECT_TIMEOUT,
                "read_timeout": 60,  # also for the greeting, which a frozen server never sends
                "autocommit": True,
                "ssl_disabled": True,  # loading certificates takes longer than all else
                **options,
            }
        )


def _rows(connection: Any, query: str, *args: Any) -> list[tuple[Any, ...]]:
    with connection.cursor() as cursor:
        cursor.execute(query, args or None)
        return list(cursor.fetchall())


def _value(connection: Any, what: str) -> str:
    return str(_rows(connection, f"SELECT {what}")[0][0])
