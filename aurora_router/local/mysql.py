"""Real MySQL clusters on loopback, for demos and tests: MySQL's own part (`mysql_family.py` has the rest)."""

from __future__ import annotations

from functools import partial

from aurora_router.core.gtid import GtidSet
from aurora_router.local.cluster import LocalInstance
from aurora_router.local.host import Host
from aurora_router.local.mysql_family import MysqlFamilyCluster
from aurora_router.local.mysqld import Words
from aurora_router.local.system import LocalClusterError, find_mysql, mysql_version

__all__ = ["LocalClusterError", "LocalInstance", "MysqlCluster"]

_SIZES = {
    "table_open_cache": "400",
    "table_definition_cache": "400",
    "performance_schema_digests_size": "100",
    "performance_schema_events_statements_history_long_size": "100",
    "innodb_redo_log_capacity": "16M",
    "innodb_buffer_pool_size": "32M",
    "innodb_log_buffer_size": "1M",
    "key_buffer_size": "1M",
}

_WORDS = Words(
    product="MySQL",
    source="SOURCE",
    replica="REPLICA",
    change="CHANGE REPLICATION SOURCE TO",
    # Without encryption a reader must ask for the key that encrypts its password.
    by_gtid="SOURCE_RETRY_COUNT = 86400, SOURCE_AUTO_POSITION = 1, GET_SOURCE_PUBLIC_KEY = 1",
    written="@@global.gtid_executed",
    replayed="@@global.gtid_executed",
    received="Retrieved_Gtid_Set",
    position=partial(GtidSet.from_server, 0),
    monitor="REPLICATION CLIENT",
    pause=("FLUSH TABLES WITH READ LOCK",),
    resume="UNLOCK TABLES",
    appliers="SELECT processlist_id FROM performance_schema.threads "
    "WHERE name IN ('thread/sql/replica_sql', 'thread/sql/replica_worker')",
    read_only="super_read_only",
    settings={
        **_SIZES,
        "mysqlx": "OFF",
        "event_scheduler": "OFF",
        "tls_version": "",  # none
        "auto_generate_certs": "OFF",
        "secure_file_priv": "NULL",  # the directory that it was built with may be missing
        "gtid_mode": "ON",
        "enforce_gtid_consistency": "ON",
        "relay_log_recovery": "ON",
        # Seconds. With less, a reader whose log is late misses heartbeats, and connects anew again and again.
        "replica_net_timeout": "3600",
        "plugin_load": "semisync_source.so;semisync_replica.so",
    },
    # The writer waits for a reader before others see the commit (AFTER_SYNC), with the longest timeout that there is.
    acknowledged={
        "rpl_semi_sync_source_wait_point": "AFTER_SYNC",
        "rpl_semi_sync_source_timeout": str(2**32 - 1),  # ms
    },
)


class MysqlCluster(MysqlFamilyCluster):
    """One writer and `readers` asynchronous readers, real servers on loopback addresses of their own.

        with MysqlCluster(readers=2) as cluster:
            engine = create_engine(cluster.url)
            cluster.kill(cluster.writer)
            cluster.promote()

    readers: how many readers replicate from the writer, 0 or more.
    synchronous: a COMMIT is acknowledged only when one reader or more has received it (semi-synchronous replication,
        AFTER_SYNC, with a timeout of 49 days). So a promotion of the most advanced reader loses no acknowledged commit. While
        no reader is connected, commits wait. A restarted reader forgets the log that it had not yet replayed.
    settings: MySQL's system variables, over the defaults of this module and of `mysql_family.py`.
    bin_dir: the directory of mysqld. None: the system's, which may be Oracle's, Percona's or a distribution's.
    directory: where the temporary directory of the cluster is made. None: the system's usual place.
    monitor_privileges: grant REPLICATION CLIENT to the application's user.
    on_progress: called with a line of text at each step of `start`.

    Nobody may write on a reader, not even the superuser, root. If root starts the servers, they run as an unprivileged user
    (`nobody`). One thread at a time may drive a cluster.

    Raises LocalClusterError in every method, and TimeoutError in those that wait.
    """

    _driver = "mysql+pymysql"
    _words = _WORDS

    def _find(self) -> tuple[int, ...]:
        self._program = find_mysql(self._bin_dir)
        return mysql_version(self._program)

    def _initialize(self, host: Host, directory: str) -> None:
        host.run(
            self._program,
            *("--no-defaults", "--initialize-insecure"),
            # With a full path, the program could make the directory again after the keeper has removed it.
            f"--datadir=./{directory}",
            "--tmpdir=.",  # the system's may be closed to the servers' user
            *(f"--{name}={value}" for name, value in _SIZES.items()),
        )

    def _halt(self, instance: LocalInstance) -> None:
        # The appliers would wait for a minute for the rest of a transaction that a dead writer has begun.
        self._kill_appliers(instance)
        super()._halt(instance)

    def _copy(self, instance: LocalInstance, other: LocalInstance) -> None:
        super()._copy(instance, other)
        # The file holds the id by which servers tell one another apart. The server makes a new one.
        (self._server(other).data / "auto.cnf").unlink()

    def _has_parted(self, instance: LocalInstance, writer: LocalInstance) -> bool:
        theirs, ours = (self._words.position(self._ask(i, self._words.written)) for i in (instance, writer))
        return not ours.covers(theirs)
