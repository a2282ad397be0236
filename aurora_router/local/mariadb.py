"""Real MariaDB clusters on loopback, for demos and tests: one writer, readers that replicate by GTID, and every way to lose them.

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
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from aurora_router.local.cluster import APP, Cluster, LocalInstance
from aurora_router.local.host import Host, Server
from aurora_router.local.late import LateLine
from aurora_router.local.system import LocalClusterError, find_mariadb, mariadb_version, tail, until

__all__ = ["LocalClusterError", "LocalInstance", "MariadbCluster"]

_REPLICATION = "replication"  # readers connect as it; it alone may write on a reader, or say that it is none

_SIZES: Mapping[str, str] = {
    "innodb_log_file_size": "16M",
    "innodb_buffer_pool_size": "32M",
    "aria_log_file_size": "8M",
    "aria_pagecache_buffer_size": "4M",
    "key_buffer_size": "1M",
}

# A fast start and a fast end: nothing is loaded, dumped or written back then that a crash would not have, either.
_SETTINGS: Mapping[str, str] = {
    **_SIZES,
    "socket": "",
    "tmpdir": ".",  # the data directory: a killed server leaves files there
    "skip_name_resolve": "ON",
    "ssl": "OFF",
    "character_set_server": "utf8mb4",
    "max_connections": "200",
    "log_bin": "binlog",
    "relay_log": "relay",
    "binlog_format": "ROW",
    "log_slave_updates": "ON",
    "slave_net_timeout": "3600",  # s: else a reader whose log is late misses the heartbeats, and connects anew again and again
    "gtid_domain_id": "0",
    "gtid_strict_mode": "ON",
    "sync_binlog": "0",
    "innodb_flush_log_at_trx_commit": "2",
    "innodb_fast_shutdown": "2",
    "innodb_buffer_pool_dump_at_shutdown": "OFF",
    "innodb_buffer_pool_load_at_startup": "OFF",
}

# The writer waits for a reader before others see the commit (AFTER_SYNC), and for as long as it takes. A reader that stops
# receiving says farewell to its writer, on a new connection: if that is frozen, in vain.
_ACKNOWLEDGED: Mapping[str, str] = {
    "rpl_semi_sync_master_wait_point": "AFTER_SYNC",
    "rpl_semi_sync_master_timeout": str(2**63),
    "rpl_semi_sync_slave_kill_conn_timeout": "1",  # s, there is no less
}

_ON = {True: "ON", False: "OFF"}


class MariadbServer(Server):
    """One mariadbd."""

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


class MariadbCluster(Cluster[MariadbServer]):
    """One writer and `readers` asynchronous readers, real servers on loopback addresses of their own.

        with MariadbCluster(readers=2) as cluster:
            engine = create_engine(cluster.url)
            cluster.kill(cluster.writer)
            cluster.promote()

    readers: how many readers replicate from the writer, 0 or more.
    synchronous: a COMMIT is acknowledged only when one reader or more has received it (semi-synchronous replication,
        AFTER_SYNC, without a timeout), so that promoting the most advanced reader loses nothing acknowledged. With no reader
        connected, commits wait. A reader that is restarted forgets what it had received and not yet replayed.
    settings: MariaDB's system variables, over the defaults of this module.
    bin_dir: where mariadbd is, mariadb-install-db beside it or in a directory next to it; else the system's.
    directory: where the temporary directory of the cluster is made; else the system's place for such.
    monitor_privileges: grant SLAVE MONITOR to the application's user.
    on_progress: called with a line of text at each step of `start`.

    The superuser, root, may not write on a reader. Started by root, the servers run as an unprivileged user (`nobody`). One
    thread at a time may drive a cluster. Every method may raise `LocalClusterError`, and those that wait `TimeoutError`.
    """

    _superuser = "root"
    _driver = "mariadb+pymysql"
    _program: Path

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
        self._program, install = find_mariadb(self._bin_dir)
        release = mariadb_version(self._program)
        if release < (10, 6):
            raise LocalClusterError(f"local clusters need MariaDB 10.6 or newer; {self._program} has {release[0]}.{release[1]}")
        host = Host(self._directory, ending="KILL")
        self._pauses: dict[str, Any] = {}
        self._lines: dict[str, LateLine] = {}
        self._replication_password = secrets.token_urlsafe(18)
        self._settle(host, MariadbServer)
        host.keep(self._program)
        if not host.can_run(self._program):
            raise LocalClusterError(f"started by root, the servers run as a user who cannot read {self._program}")
        readers = self._instances[1:]

        self._progress(f"making a MariaDB {release[0]}.{release[1]} cluster in {host.directory}")
        self._initialize(host, install)
        users = host.directory / "users"
        host.write(users, self._users(release))
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

    def _initialize(self, host: Host, install: Path) -> None:
        first, *others = (self._server(instance).data for instance in self._instances)
        host.run(
            install,
            "--no-defaults",
            f"--basedir={self._program.parent.parent}",
            f"--datadir=./{first.name}",  # not the full path: in a directory that the keeper has removed none is made again
            *("--force", "--skip-name-resolve", "--skip-test-db"),
            "--tmpdir=.",  # the system's may be closed to the servers' user
            *(f"--{name}={value}" for name, value in _SIZES.items()),
        )
        # A cluster that has never run may be copied file by file.
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda data: host.run("cp", "-R", "-p", str(first), str(data)), others))

    def _users(self, release: tuple[int, int]) -> str:
        """What each server runs at its first start; none of it is replicated."""
        # Since 10.11, SUPER is not enough to write on a reader.
        withheld = "READ_ONLY ADMIN" if release >= (10, 11) else "READ_ONLY ADMIN, SUPER"
        return f"""SET sql_log_bin = 0;
CREATE USER {self._superuser}@'%' IDENTIFIED BY '{self.superuser_password}';
GRANT ALL ON *.* TO {self._superuser}@'%' WITH GRANT OPTION;
REVOKE {withheld} ON *.* FROM {self._superuser}@'%';
CREATE USER {_REPLICATION}@'%' IDENTIFIED BY '{self._replication_password}';
GRANT ALL ON *.* TO {_REPLICATION}@'%';
"""

    def _create_application(self) -> None:
        with self._connect(self.writer) as connection:
            for statement in (
                f"CREATE DATABASE {APP}",
                f"CREATE USER {APP}@'%' IDENTIFIED BY '{self.app_password}'",
                f"GRANT ALL ON {APP}.* TO {APP}@'%'",
                *([f"GRANT SLAVE MONITOR ON *.* TO {APP}@'%'"] if self._monitor_privileges else []),
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
        self._order(instance, "STOP SLAVE", "RESET SLAVE ALL")
        self._forget_lag(instance)
        if self.synchronous:
            self._order(instance, "SET GLOBAL rpl_semi_sync_slave_enabled = OFF", "SET GLOBAL rpl_semi_sync_master_enabled = ON")
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
                self._order(reader, "STOP SLAVE IO_THREAD", "START SLAVE IO_THREAD")

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
        delay. The first time it takes the reader a moment to connect anew. `Seconds_Behind_Master` knows nothing of it.
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

        Nothing is committed on it meanwhile (BACKUP STAGE BLOCK_COMMIT). Its SQL thread is still said to run.
        """
        if instance.name not in self._pauses:
            connection = self._connect(instance)
            for statement in ("BACKUP STAGE START", "BACKUP STAGE BLOCK_COMMIT"):
                _rows(connection, statement)
            self._pauses[instance.name] = connection

    def resume_replay(self, instance: LocalInstance) -> None:
        """Undo `pause_replay`."""
        connection = self._pauses.pop(instance.name, None)
        if connection is not None:
            with connection:
                _rows(connection, "BACKUP STAGE END")

    def wait_in_sync(self, timeout: float = 30.0) -> None:
        """Wait until all running readers have replayed what the writer has written by now.

        Raises TimeoutError, naming the readers that are behind, after `timeout` seconds.
        """
        deadline = time.monotonic() + timeout
        position = _number(self._ask(self.writer, "@@gtid_binlog_pos"))
        for reader in self.readers:
            if self._server(reader).frozen:
                raise TimeoutError(f"{reader.name} is frozen and will not replay")
            with self._connect(reader) as connection:
                for _ in until(deadline - time.monotonic(), f"{reader.name} to replay what {self.writer.name} wrote"):
                    if _number(_rows(connection, "SELECT @@gtid_slave_pos")[0][0]) >= position:
                        break

    # -- readers and their writer

    def _stand_by(self, instance: LocalInstance) -> None:
        """Start an instance that is down as a reader that knows what it has, and follows nobody yet."""
        server = self._server(instance)
        server.stands_by, server.follows = True, None
        self._launch(instance)
        server.wait_ready()
        self._order(instance, "SET GLOBAL gtid_slave_pos = @@gtid_binlog_pos")

    def _follow(self, instance: LocalInstance, writer: LocalInstance) -> None:
        """Point a running reader to the writer, or to the reader that is about to be one."""
        host, port = writer.host, writer.port
        if line := self._lines.get(instance.name):
            line.target = host, port
            host, port = line.host, line.port
        self._halt(instance)
        self._order(
            instance,
            f"CHANGE MASTER TO MASTER_HOST = '{host}', MASTER_PORT = {port}, MASTER_USER = '{_REPLICATION}', "
            f"MASTER_PASSWORD = '{self._replication_password}', MASTER_SSL = 0, "
            "MASTER_USE_GTID = slave_pos, MASTER_CONNECT_RETRY = 1",
            "START SLAVE",
        )
        self._server(instance).follows = writer.name

    def _halt(self, instance: LocalInstance) -> None:
        """Stop a reader's replication."""
        if instance.name in self._pauses:  # its SQL thread waits for the end of the pause, deaf to all but this
            threads = "SELECT id FROM information_schema.processlist WHERE command IN ('Slave_SQL', 'Connect')"
            self._order(instance, *(f"KILL {number}" for (number,) in self.execute(threads, instance=instance)))
        self._order(instance, "STOP SLAVE")

    def _most_advanced(self) -> LocalInstance:
        candidates = [reader for reader in self.readers if not self._server(reader).frozen]
        if not candidates:
            raise LocalClusterError("there is no reader left to promote")
        for reader in candidates:
            self._take_in(reader)
        return max(candidates, key=lambda reader: _number(self._received(reader)))

    def _take_in(self, instance: LocalInstance) -> None:
        """Have a reader take in what a dead writer sent, and is on its way; of a living one's there is no end."""
        if not self.writer.running:
            if line := self._lines.get(instance.name):
                line.hasten()
            for _ in until(10, f"{instance.name} to notice that {self.writer.name} is gone", every=0.003):
                if self._status(instance).get("Slave_IO_Running") != "Yes":
                    break

    def _sends(self) -> bool:
        """Whether the writer can send anything."""
        return self.writer.running and not self._server(self.writer).frozen

    def _received(self, instance: LocalInstance) -> str:
        """How far what a reader has received reaches."""
        return max(self._status(instance).get("Gtid_IO_Pos") or "", self._ask(instance, "@@gtid_slave_pos"), key=_number)

    def _leave(self, instance: LocalInstance, followers: Sequence[LocalInstance]) -> None:
        """Have readers receive no more, `instance` as the last: what another one has acknowledged it has received then."""
        self._take_in(instance)
        if self._sends():
            if line := self._lines.get(instance.name):
                line.seconds = 0
            for reader in followers:
                self._order(reader, "STOP SLAVE IO_THREAD")
            acknowledged = max((_number(self._received(reader)) for reader in followers), default=0)
            with contextlib.suppress(TimeoutError):
                for _ in until(5, f"{instance.name} to receive what others have", every=0.003):
                    if _number(self._received(instance)) >= acknowledged:
                        break
            followers = ()
        with ThreadPoolExecutor(len(followers) + 1) as pool:  # a frozen writer holds each of them up
            list(pool.map(lambda reader: self._order(reader, "STOP SLAVE IO_THREAD"), (instance, *followers)))

    def _replay_all(self, instance: LocalInstance) -> None:
        """Have a reader replay what it has received: its relay log does not survive a change of writers."""
        self.resume_replay(instance)
        position = _number(self._received(instance))
        for _ in until(60, f"{instance.name} to replay what it has received", every=0.003):
            if _number(self._ask(instance, "@@gtid_slave_pos")) >= position:
                break
            status = self._status(instance)
            if status.get("Slave_SQL_Running") == "No":
                raise LocalClusterError(f"{instance.name} cannot replay what it has received: {status['Last_SQL_Error']}")

    def _has_parted(self, instance: LocalInstance, writer: LocalInstance) -> bool:
        """Whether it has a transaction that the writer has not; what it has from each server is asked first."""
        theirs, ours = (_numbers(self._ask(i, "@@gtid_binlog_state")) for i in (instance, writer))
        return any(number > ours.get(server, 0) for server, number in theirs.items())

    def _streams(self, instance: LocalInstance, timeout: float) -> bool:
        """Wait until a reader streams what the writer writes now; whether it came to that."""
        with contextlib.suppress(TimeoutError):
            for _ in until(timeout, f"{instance.name} to stream"):
                status = self._status(instance)
                if status.get("Slave_IO_Running") == status.get("Slave_SQL_Running") == "Yes":
                    return True
        return False

    def _rebuild(self, instance: LocalInstance) -> None:
        """Make an instance a copy of the writer.

        The writer is frozen for that: what its files hold then is what they would hold after a crash, and a copy of them
        recovers as it would.
        """
        assert self._host is not None
        self._forget_lag(instance)
        server, source = self._server(instance), self._server(self.writer)
        server.kill()
        shutil.rmtree(server.data)
        thawed = not source.frozen
        source.freeze()
        try:
            self._host.run("cp", "-R", "-p", str(source.data), str(server.data))
        finally:
            if thawed:
                source.thaw()
        self._stand_by(instance)
        self._follow(instance, self.writer)
        if not self._streams(instance, 30):
            raise LocalClusterError(f"{instance.name} does not stream from {self.writer.name}\n{tail(server.log)}")

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
            **(_ACKNOWLEDGED if self.synchronous else {}),
            **self._settings,
            "bind_address": instance.host,
            "port": str(instance.port),
            "server_id": str(self._instances.index(instance) + 1),
            "read_only": _ON[server.stands_by],
            # After a crash, one that starts as a reader that acknowledges may drop from its log what no other has acknowledged:
            # right for a writer that was deposed, wrong for one that still is the writer.
            "rpl_semi_sync_slave_enabled": _ON[self.synchronous and server.stands_by],
            "rpl_semi_sync_master_enabled": _ON[self.synchronous and not server.stands_by],
        }
        server.launch(self._program, settings, "--skip-slave-start", *options)

    def _order(self, instance: LocalInstance, *statements: str) -> None:
        """Run statements as the one who may do anything to a reader."""
        with self._connect(instance, user=_REPLICATION, password=self._replication_password) as connection:
            for statement in statements:
                _rows(connection, statement)

    def _ask(self, instance: LocalInstance, what: str) -> str:
        with self._connect(instance) as connection:
            return str(_rows(connection, f"SELECT {what}")[0][0])

    def _status(self, instance: LocalInstance) -> dict[str, Any]:
        """What a reader says of its replication; nothing where it has none."""
        with self._connect(instance) as connection, connection.cursor() as cursor:
            cursor.execute("SHOW SLAVE STATUS")
            row = cursor.fetchone()
            return dict(zip((column[0] for column in cursor.description), row, strict=True)) if row else {}

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


def _number(position: str) -> int:
    """The number of the last transaction in the only domain, 0 where there is none."""
    return max(_numbers(position).values(), default=0)


def _numbers(gtids: str) -> dict[str, int]:
    """The last number of each server."""
    parts = (gtid.rpartition("-") for gtid in gtids.split(",") if gtid)
    return {server: int(number) for server, _, number in parts}
