"""Real MariaDB clusters on loopback, for demos and tests: MariaDB's own part (`mysql_family.py` has the rest)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from aurora_router.core.gtid import MariadbGtid
from aurora_router.local.cluster import LocalInstance
from aurora_router.local.host import Host
from aurora_router.local.mysql_family import MysqlFamilyCluster
from aurora_router.local.mysqld import Words
from aurora_router.local.system import LocalClusterError, find_mariadb, mariadb_version

__all__ = ["LocalClusterError", "LocalInstance", "MariadbCluster"]

_SIZES = {
    "innodb_log_file_size": "16M",
    "innodb_buffer_pool_size": "32M",
    "aria_log_file_size": "8M",
    "aria_pagecache_buffer_size": "4M",
    "key_buffer_size": "1M",
}

_WORDS = Words(
    product="MariaDB",
    source="MASTER",
    replica="SLAVE",
    change="CHANGE MASTER TO",
    by_gtid="MASTER_USE_GTID = slave_pos",
    written="@@gtid_binlog_pos",
    replayed="@@gtid_slave_pos",
    received="Gtid_IO_Pos",
    position=partial(MariadbGtid.from_server, 0),
    monitor="SLAVE MONITOR, BINLOG MONITOR",
    pause=("BACKUP STAGE START", "BACKUP STAGE BLOCK_COMMIT"),
    resume="BACKUP STAGE END",
    appliers="SELECT id FROM information_schema.processlist WHERE command IN ('Slave_SQL', 'Connect')",
    read_only="read_only",
    settings={
        **_SIZES,
        "ssl": "OFF",
        "binlog_format": "ROW",
        "log_slave_updates": "ON",
        # Seconds. With less, a reader whose log is late misses heartbeats, and connects anew again and again.
        "slave_net_timeout": "3600",
        "gtid_domain_id": "0",
        "gtid_strict_mode": "ON",
    },
    # The writer waits for a reader before others see the commit (AFTER_SYNC), for as long as it takes. A reader that stops
    # receiving connects anew to sign off from its writer. A frozen writer does not answer, so the shortest timeout is set.
    acknowledged={
        "rpl_semi_sync_master_wait_point": "AFTER_SYNC",
        "rpl_semi_sync_master_timeout": str(2**63),
        "rpl_semi_sync_slave_kill_conn_timeout": "1",  # seconds, the minimum
    },
)


class MariadbCluster(MysqlFamilyCluster):
    """One writer and `readers` asynchronous readers, real servers on loopback addresses of their own.

        with MariadbCluster(readers=2) as cluster:
            engine = create_engine(cluster.url)
            cluster.kill(cluster.writer)
            cluster.promote()

    readers: how many readers replicate from the writer, 0 or more.
    synchronous: a COMMIT is acknowledged only when one reader or more has received it (semi-synchronous replication,
        AFTER_SYNC, without a timeout). So a promotion of the most advanced reader loses no acknowledged commit. While no
        reader is connected, commits wait. A restarted reader forgets the log that it had not yet replayed.
    settings: MariaDB's system variables, over the defaults of this module and of `mysql_family.py`.
    bin_dir: the directory of mariadbd. mariadb-install-db is there or in a directory next to it. None: the system's.
    directory: where the temporary directory of the cluster is made. None: the system's usual place.
    monitor_privileges: grant SLAVE MONITOR and BINLOG MONITOR to the application's user.
    on_progress: called with a line of text at each step of `start`.

    The superuser, root, may not write on a reader. If root starts the servers, they run as an unprivileged user (`nobody`).
    One thread at a time may drive a cluster.

    Raises LocalClusterError in every method, and TimeoutError in those that wait.
    """

    _driver = "mariadb+pymysql"
    _words = _WORDS
    _install: Path

    def _find(self) -> tuple[int, ...]:
        self._program, self._install = find_mariadb(self._bin_dir)
        release = mariadb_version(self._program)
        if release < (10, 6):
            raise LocalClusterError(f"local clusters need MariaDB 10.6 or newer; {self._program} has {release[0]}.{release[1]}")
        return release

    def _initialize(self, host: Host, directory: str) -> None:
        host.run(
            self._install,
            "--no-defaults",
            f"--basedir={self._program.parent.parent}",
            # With a full path, the program could make the directory again after the keeper has removed it.
            f"--datadir=./{directory}",
            *("--force", "--skip-name-resolve", "--skip-test-db"),
            "--tmpdir=.",  # the system's may be closed to the servers' user
            *(f"--{name}={value}" for name, value in _SIZES.items()),
        )

    def _users(self, release: tuple[int, ...]) -> Sequence[str]:
        # Since 10.11, SUPER is not enough to write on a reader.
        withheld = "READ_ONLY ADMIN" if release >= (10, 11) else "READ_ONLY ADMIN, SUPER"
        return *super()._users(release), f"REVOKE {withheld} ON *.* FROM {self._superuser}@'%'"

    def _stand_by(self, instance: LocalInstance) -> None:
        super()._stand_by(instance)
        self._order(instance, "SET GLOBAL gtid_slave_pos = @@gtid_binlog_pos")

    def _has_parted(self, instance: LocalInstance, writer: LocalInstance) -> bool:
        """Whether the instance has a transaction that the writer lacks. The instance is asked first: it may still receive."""
        theirs, ours = (_numbers(self._ask(i, "@@gtid_binlog_state")) for i in (instance, writer))
        return any(number > ours.get(server, 0) for server, number in theirs.items())


def _numbers(gtids: str) -> dict[str, int]:
    """Return the last number of each server."""
    parts = (gtid.rpartition("-") for gtid in gtids.split(",") if gtid)
    return {server: int(number) for server, _, number in parts}
