"""What local clusters of MySQL and MariaDB share: one writer, readers that replicate by GTID, and every way to lose them.

Each instance listens on an address of its own and all on one port, as PostgreSQL's do. What is committed survives the kill of a
server, for the operating system survives it, too: the logs are written at each commit, and are not flushed to the disk
(`innodb_flush_log_at_trx_commit=2`, `sync_binlog=0`). It would not survive a power cut. The doublewrite buffer stays on: a kill
can cut the write of a page in two.
"""

from __future__ import annotations

import contextlib
import secrets
import shutil
import signal
import time
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from aurora_router.core.positions import Position
from aurora_router.local.cluster import APP, Cluster, LocalInstance
from aurora_router.local.host import Host, Server
from aurora_router.local.late import LateLine
from aurora_router.local.system import LocalClusterError, tail, until

_REPLICATION = "replication"  # readers connect as it; it may say that one is a reader no more, and on MariaDB write there

# A fast start and a fast end: nothing is loaded, dumped or written back then that a crash would not have, either.
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


@dataclass(frozen=True)
class Words:
    """What each of the two calls it."""

    product: str
    source: str  # in statements, as in MASTER_HOST
    replica: str  # in statements, settings and answers, as in STOP SLAVE, Slave_IO_Running
    change: str  # the statement that says whom a reader follows, as far as the host
    by_gtid: str  # what else it says, for a reader that asks by what it has
    written: str  # what a writer has, as SQL
    replayed: str  # what a reader has
    received: str  # the column of a reader's status that says what it has received
    position: Callable[[str], Position]  # reads all three
    read_only: str  # the setting that makes a reader refuse writes, the superuser's too
    settings: Mapping[str, str]
    acknowledged: Mapping[str, str]  # settings with which a COMMIT waits for a reader
    monitor: str  # the privilege to see a reader's status
    pause: Sequence[str]  # statements after which nothing is committed, reads go on, and replication is still said to run
    resume: str
    appliers: str  # the threads that replay, as SQL that gives their numbers


class Mysqld(Server):
    """One mysqld or mariadbd."""

    ending = signal.SIGTERM
    stands_by = False
    _log_began = 0

    def launch(self, program: Path, settings: Mapping[str, str], *options: str) -> None:
        """Start it; `wait_ready` says when it takes connections."""
        self._log_began = self.log.stat().st_size if self.log.exists() else 0
        options = ("--no-defaults", f"--datadir={self.data}", *options, *(f"--{name}={v}" for name, v in settings.items()))
        self.process = self._host.spawn(self.log, program, *options)
        self.frozen = False

    @property
    def ready(self) -> bool:
        """Whether it accepts connections; it writes that into its log."""
        if not self.running:
            return False
        with self.log.open("rb") as log:
            log.seek(self._log_began)
            return b": ready for connections" in log.read()


class MysqlFamilyCluster(Cluster[Mysqld]):
    """`MysqlCluster` and `MariadbCluster` say what the parameters mean."""

    _superuser = "root"
    _words: ClassVar[Words]
    _program: Path

    @abstractmethod
    def _find(self) -> tuple[int, ...]:
        """Find the programs; gives the release. Raises LocalClusterError."""

    @abstractmethod
    def _initialize(self, host: Host, directory: str) -> None:
        """Make the data directory of that name on the host."""

    @abstractmethod
    def _has_parted(self, instance: LocalInstance, writer: LocalInstance) -> bool:
        """Whether it has a transaction that the writer has not; what it has is asked first."""

    def execute(self, query: str, *args: Any, instance: LocalInstance | None = None) -> list[tuple[Any, ...]]:
        """Run one statement as superuser in the database `app`, on the writer or on `instance`; returns its rows.

        Placeholders are PyMySQL's `%s`. The application's user may use the tables that are made here.
        """
        with self._connect_app(instance or self.writer) as connection:
            return _rows(connection, query, *args)

    # -- life

    def stop(self) -> None:
        """End all servers and remove their files. Does nothing when that has been done, or in a forked child."""
        for instance in self._instances if self._host is not None else ():
            self._forget_pause(instance)
            self._forget_lag(instance)
        super().stop()

    def _start(self) -> None:
        release = self._find()
        host = Host(self._directory, ending="KILL")
        self._pauses: dict[str, Any] = {}
        self._lines: dict[str, LateLine] = {}
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
        """What each server runs at its first start; none of it is replicated."""
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
        """Make a reader the writer: `instance`, or else the reader that has received most. Returns it once it takes writes.

        It replays all that it has received, however late or paused it was. The other readers follow it, from before it takes
        writes; one that had replayed more than it is copied anew. The old writer is left as it is: alive, it goes on taking
        writes (a split brain), until `rejoin` makes it a reader. With synchronous replication this takes a second longer when
        the old writer is frozen, for that is how long its readers try to say farewell.
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
        """Start the instance again as what it was, after a shutdown if it runs. A deposed writer comes back as a writer."""
        self._server(instance).shut_down()
        self._launch(instance)
        self._server(instance).wait_ready()
        if self._server(instance).stands_by:
            self._follow(instance, self.writer)
        for reader in self.readers:
            if self._server(reader).follows == instance.name and not self._server(reader).frozen:
                # By itself it tries again once a second.
                self._order(reader, *(f"{verb} {self._words.replica} IO_THREAD" for verb in ("STOP", "START")))

    def rejoin(self, instance: LocalInstance) -> None:
        """Make the instance, dead or alive, a reader of the current writer, without lag; returns when it streams.

        One that has what the writer lacks, as a writer that was deposed may, loses it: it becomes a copy of the writer, which
        stands still for the moment that takes.
        """
        if instance == self.writer:
            raise ValueError(f"{instance.name} is the writer; promote another instance first")
        server = self._server(instance)
        self.thaw(instance)
        if not server.running or not server.stands_by:
            server.kill()  # in a shutdown it would acknowledge commits that no reader has
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
        """Have a reader show each commit `seconds` after it was made on the writer; 0 ends that at once.

        The writer's log is held back on its way to the reader (`late.py`), which so receives late what it then replays without
        delay. The first time it takes the reader a moment to connect anew. Its status
        does not count these seconds.
        """
        line = self._lines.get(instance.name)
        if line is None and seconds:
            if instance not in self.readers:
                raise LocalClusterError(f"{instance.name} is no reader that runs, and cannot be late")
            line = self._lines[instance.name] = LateLine((self.writer.host, self.writer.port))
            line.seconds = seconds
            self._follow(instance, self.writer)
            if self._sends():
                self._streams(instance, 10)
        elif line is not None:
            line.seconds = seconds

    def pause_replay(self, instance: LocalInstance) -> None:
        """Have a reader receive but replay nothing, until `resume_replay`; returns when it has stopped replaying.

        Nothing is committed on it meanwhile. Its SQL thread is still said to run.
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

        Raises TimeoutError, naming the readers that are behind, after `timeout` seconds.
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
        """Start an instance that is down as a reader that knows what it has, and follows nobody yet."""
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
        if instance.name in self._pauses:  # its SQL thread waits for the end of the pause, deaf to all but this
            self._kill_appliers(instance)
        self._order(instance, f"STOP {self._words.replica}")

    def _kill_appliers(self, instance: LocalInstance) -> None:
        from pymysql.err import OperationalError

        with self._connect(instance) as connection:
            appliers = _rows(connection, self._words.appliers)
        for (number,) in appliers:
            with contextlib.suppress(OperationalError):  # it has ended with another one
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
        """Have a reader take in what a dead writer sent, and is on its way; of a living one's there is no end."""
        if not self.writer.running:
            if line := self._lines.get(instance.name):
                line.hasten()
            for _ in until(10, f"{instance.name} to notice that {self.writer.name} is gone", every=0.003):
                if not self._runs(instance, "IO"):
                    break

    def _sends(self) -> bool:
        """Whether the writer can send anything."""
        return self.writer.running and not self._server(self.writer).frozen

    def _received(self, instance: LocalInstance) -> Position:
        """How far what a reader has received reaches."""
        replayed = self._words.position(self._ask(instance, self._words.replayed))
        received = self._words.position(self._status(instance).get(self._words.received) or "")
        together = replayed.union(received)
        assert together is not None
        return together

    def _leave(self, instance: LocalInstance, followers: Sequence[LocalInstance]) -> None:
        """Have readers receive no more, `instance` as the last: what another one has acknowledged it has received then."""
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
        with ThreadPoolExecutor(len(followers) + 1) as pool:  # a frozen writer holds each of them up
            list(pool.map(lambda reader: self._order(reader, stop), (instance, *followers)))

    def _replay_all(self, instance: LocalInstance) -> None:
        """Have a reader replay what it has received: its relay log does not survive a change of writers."""
        self.resume_replay(instance)
        position = self._received(instance)
        for _ in until(60, f"{instance.name} to replay what it has received", every=0.003):
            if self._words.position(self._ask(instance, self._words.replayed)).covers(position):
                break
            if not self._runs(instance, "SQL"):
                error = self._status(instance)["Last_SQL_Error"]
                raise LocalClusterError(f"{instance.name} cannot replay what it has received: {error}")

    def _streams(self, instance: LocalInstance, timeout: float) -> bool:
        """Wait until a reader streams what the writer writes now; whether it came to that."""
        with contextlib.suppress(TimeoutError):
            for _ in until(timeout, f"{instance.name} to stream"):
                if self._runs(instance, "IO", "SQL"):
                    return True
        return False

    def _rebuild(self, instance: LocalInstance) -> None:
        """Make an instance a copy of the writer.

        The writer is frozen for that: what its files hold then is what they would hold after a crash, and a copy of them
        recovers as it would.
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
        """Copy an instance that does not run, or stands still, file by file."""
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
        """The settings by which a reader acknowledges, and a writer waits for that."""
        # After a crash, one that starts as a reader that acknowledges may drop from its log what no other has acknowledged:
        # right for a writer that was deposed, wrong for one that still is the writer.
        replica, source = (f"rpl_semi_sync_{name.lower()}_enabled" for name in (self._words.replica, self._words.source))
        return {replica: _ON[stands_by], source: _ON[not stands_by]} if self.synchronous else {}

    def _order(self, instance: LocalInstance, *statements: str) -> None:
        """Run statements as the one who may do anything to a reader."""
        with self._connect(instance, user=_REPLICATION, password=self._replication_password) as connection:
            for statement in statements:
                _rows(connection, statement)

    def _ask(self, instance: LocalInstance, what: str) -> str:
        with self._connect(instance) as connection:
            return _value(connection, what)

    def _status(self, instance: LocalInstance) -> dict[str, Any]:
        """What a reader says of its replication; nothing where it has none."""
        with self._connect(instance) as connection, connection.cursor() as cursor:
            cursor.execute(f"SHOW {self._words.replica} STATUS")
            row = cursor.fetchone()
            return dict(zip((column[0] for column in cursor.description), row, strict=True)) if row else {}

    def _runs(self, instance: LocalInstance, *threads: str) -> bool:
        """Whether these threads of a reader's replication run: IO receives, SQL replays."""
        status = self._status(instance)
        return all(status.get(f"{self._words.replica.capitalize()}_{thread}_Running") == "Yes" for thread in threads)

    def _connect_app(self, instance: LocalInstance, **options: Any) -> Any:
        return self._connect(instance, **{"database": APP, **options})

    def _connect(self, instance: LocalInstance, **options: Any) -> Any:
        """A connection of PyMySQL as superuser; as a context manager it closes itself."""
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
                "connect_timeout": 10,
                "read_timeout": 60,  # of the greeting, too: a frozen server never says it
                "autocommit": True,
                "ssl_disabled": True,  # to load the certificates of this machine takes longer than all else
                **options,
            }
        )


def _rows(connection: Any, query: str, *args: Any) -> list[tuple[Any, ...]]:
    with connection.cursor() as cursor:
        cursor.execute(query, args or None)
        return list(cursor.fetchall())


def _value(connection: Any, what: str) -> str:
    return str(_rows(connection, f"SELECT {what}")[0][0])
