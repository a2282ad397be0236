"""MySQL and MariaDB: the SQL that asks a server for its identity and state, and what its rows and error codes mean.

The server's own report shows which of the two it is. A mysql URL leads to either. A mariadb URL leads to MariaDB alone, because
SQLAlchemy accepts nothing else there.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any, Final, NamedTuple

from aurora_router.core.failures import Failure
from aurora_router.core.gtid import GtidSet, MariadbGtid, mariadb_epoch, writer_starts
from aurora_router.core.instance import ProbeFailure, Role, ServerId, ServerStatus
from aurora_router.core.positions import Position
from aurora_router.core.query import Query
from aurora_router.servers.base import Execute, Identification, Pooler, UnsupportedServer
from aurora_router.servers.mysql_replication import outside_system, parse_filters, parse_members, parse_replicas, parse_sources

DIALECT = "mysql"
DEFAULT_ISOLATION = "repeatable read"
BEYOND_READERS: frozenset[str] = frozenset()
HAS_XID_STATUS = False
PREPARED = "XA RECOVER"
MIN_MYSQL_VERSION = (8, 0)
MIN_MARIADB_VERSION = (10, 6)  # nothing older is maintained or tested

# One question serves both. Parts that only one of them understands are in comments that the other one skips. MySQL skips all of
# MariaDB's comments, and MariaDB skips those for MySQL 5.7 and newer.
_MARIADB, _MYSQL = "/*M!100600", "/*!80000"
# The time of the server's start, in seconds. The difference never changes, because both times are read in one statement.
_STARTED = "CAST(UNIX_TIMESTAMP() - (SELECT variable_value FROM {}.global_status WHERE variable_name = 'Uptime') AS SIGNED)"
_GROUP = "SELECT variable_value FROM performance_schema.global_variables WHERE variable_name = 'group_replication_group_name'"
_OPENED = (
    "SELECT UNIX_TIMESTAMP(MAX(set_time)) FROM performance_schema.variables_info "
    "WHERE variable_name IN ('read_only', 'super_read_only')"
)
VERSION = "SELECT @@version, /*M! NOT */ FALSE"
IDENTITY = f"""
{VERSION}
{_MARIADB} , @@global.gtid_domain_id, @@global.server_id, {_STARTED.format("information_schema")} */
{_MYSQL} , ({_GROUP}), @@global.server_uuid, {_STARTED.format("performance_schema")} */
, @@global.port, @@global.read_only, @@global.innodb_read_only"""
"""The second column is true on MariaDB. The columns in comments are missing if the version is too old."""
PROBE = f"""{IDENTITY}
{_MARIADB} , @@global.gtid_binlog_pos, @@global.gtid_slave_pos, @@global.gtid_binlog_state, @@global.log_bin
, @@global.tx_isolation, @@session.tx_isolation */
{_MYSQL} , @@global.gtid_executed, @@global.gtid_mode, ({_OPENED}), @@global.transaction_isolation
, @@session.transaction_isolation */"""
"""MariaDB's columns are read in this order, because it is safe to label an older position with a newer epoch. The reverse is not.
MariaDB also knows tx_isolation by MySQL's name, transaction_isolation, but only from 11.1 on. The session's level shows what
init_command and listeners of the application ask for. The global one shows a change since the probe has connected."""

REPLICAS_MARIADB = "SHOW ALL SLAVES STATUS"
REPLICAS_MYSQL = "SHOW REPLICA STATUS"
"""Needs SLAVE MONITOR on MariaDB, REPLICATION CLIENT on MySQL. The writer is asked, too, because it may be a reader tomorrow. So
a missing privilege is found today."""
LOG, LOG_RENAMED = "SHOW MASTER STATUS", "SHOW BINARY LOG STATUS"
"""Needs BINLOG MONITOR on MariaDB, REPLICATION CLIENT on MySQL; without it the log is taken for complete. Asked once for each
connection, because the settings that it shows change only with a restart."""
MEMBERS = "SELECT member_id, member_state, member_role FROM performance_schema.replication_group_members"
"""Asked if there is a group; needs SELECT on that table."""

SET_DEFAULT_READ_ONLY = "SET SESSION TRANSACTION READ ONLY"
SET_DEFAULT_READ_WRITE = "SET SESSION TRANSACTION READ WRITE"

COMMIT_TABLE = "aurora_router_commits"
CREATE_COMMIT_TABLE = (
    f"CREATE TABLE IF NOT EXISTS {COMMIT_TABLE} ("
    "id CHAR(36) CHARACTER SET ascii COLLATE ascii_bin NOT NULL PRIMARY KEY, committed BOOLEAN NOT NULL DEFAULT TRUE, "
    f"at TIMESTAMP(6) NOT NULL DEFAULT CURRENT_TIMESTAMP(6), KEY {COMMIT_TABLE}_at (at)) ENGINE=InnoDB",
)
COMMIT_TABLE_FLAW = f"""
SELECT CASE
  WHEN t.engine IS NULL OR t.engine <> 'InnoDB' THEN 'it is no table of InnoDB, so a rollback may leave its rows'
  WHEN EXISTS (SELECT 1 FROM information_schema.triggers
                WHERE event_object_schema = DATABASE() AND event_object_table = '{COMMIT_TABLE}') THEN 'it has triggers'
  ELSE '' END
  FROM information_schema.tables t WHERE t.table_schema = DATABASE() AND t.table_name = '{COMMIT_TABLE}'"""  # noqa: S608
LOOKUP_SETTINGS = "SET SESSION innodb_lock_wait_timeout = 1"
"""Precedes FENCE and COMMIT_ROW_EVIDENCE. The table is in the database of the URL, even if a transaction has chosen another
by USE."""
FENCE = f"INSERT IGNORE INTO {COMMIT_TABLE} (id, committed) VALUES (%(id)s, FALSE)"  # noqa: S608 - a constant
"""Waits for a running transaction with this id, and keeps a later one from committing."""
COMMIT_ROW_EVIDENCE = f"SELECT committed, '' FROM {COMMIT_TABLE} WHERE id = %(id)s"  # noqa: S608 - a constant
SYNC_BARRIER = f"REPLACE INTO {COMMIT_TABLE} (id, committed) VALUES ('seal', FALSE)"  # noqa: S608 - a constant
"""A row that means nothing. Its COMMIT waits for readers if the server's COMMITs do."""
RETENTION_SECONDS = 3600
PRUNE_BATCH = 2000  # rows per DELETE, which must not outlast a probe
PRUNE = f"DELETE FROM {COMMIT_TABLE} WHERE at < NOW() - INTERVAL {RETENTION_SECONDS} SECOND ORDER BY at LIMIT {PRUNE_BATCH}"  # noqa: S608

FUNCTIONS = """
SELECT routine_schema, routine_name, sql_data_access FROM information_schema.routines
 WHERE routine_type = 'FUNCTION' AND routine_schema NOT IN ('mysql', 'sys', 'information_schema', 'performance_schema')"""
"""User functions, and what they declare. The server shows CONTAINS SQL if nothing was declared."""


def _is_on(setting: object) -> bool:
    """Whether a setting of the server is on; NULL counts as off."""
    return str(setting).upper() not in ("0", "OFF", "NONE")  # older MariaDB has numbers, newer has words


class Version(NamedTuple):
    """The product that answers, and its version."""

    mariadb: bool
    number: tuple[int, ...]

    def __str__(self) -> str:
        return f"{'MariaDB' if self.mariadb else 'MySQL'} {'.'.join(map(str, self.number))}"


# -- who and where a server is ------------------------------------------------------------------------------------


def parse_version(row: Sequence[Any]) -> Version:
    """Return the version, with which the answers to IDENTITY and PROBE begin.

    Raises UnsupportedServer for a server that is too old.
    """
    found = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", str(row[0]))
    number = tuple(int(part or 0) for part in found.groups()) if found is not None else (0,)
    server = Version(_is_on(row[1]), number)
    oldest = MIN_MARIADB_VERSION if server.mariadb else MIN_MYSQL_VERSION
    if server.number < oldest:
        raise UnsupportedServer(f"runs {server}; version {'.'.join(map(str, oldest))} or newer is needed")
    return server


def parse_identity(row: Sequence[Any]) -> tuple[ServerId, Role]:
    """Return the identity and the role, with which the answers to IDENTITY and PROBE begin.

    Neither server has an identity of the cluster. On MySQL with group replication the name of the group stands for it, on MariaDB
    the GTID domain. A server does not know at which address a connection has arrived. Its id in the replication stands for that.

    Raises UnsupportedServer for a server that is too old.
    """
    server = parse_version(row)
    if len(row) < 8:
        raise UnsupportedServer(f"does not say who it is: something on the way to {server} drops version comments (/*! */)")
    of_cluster, name, started, port, *read_only = row[2:8]
    cluster = f"mariadb-{of_cluster}" if server.mariadb else str(of_cluster or "mysql")
    # Several servers may have been started in one second, but no two of a cluster have the same name.
    identity = ServerId(cluster, str(name), int(port), f"{started}/{name}")
    return identity, Role.READER if any(map(_is_on, read_only)) else Role.WRITER


def identify(query: Query, process: int, pooler: Pooler | None) -> Identification:
    """Find out which server a fresh connection has reached.

    Make a reader's connection refuse writes. Otherwise a unit in autocommit could write if the reader is promoted in place.

    process: not used, because no pooler gives a server's connection to others unnoticed.

    Raises UnsupportedServer.
    """
    _, (row,) = query(IDENTITY)
    found = Identification(*parse_identity(row), shared=pooler == "transaction")
    if found.default_read_only:
        query(SET_DEFAULT_READ_ONLY)
    return found


def probe(query: Query, *, asynchronous_commits: bool) -> ServerStatus:
    """Return a server's report of its state.

    asynchronous_commits: not used, because a commit is in the positions before it is acknowledged.

    Raises UnsupportedServer.
    """
    _, ((*row, of_server, of_session),) = query(PROBE)
    server = parse_version(row)
    identity, role = parse_identity(row)
    shared, said = _is_on(row[7]), row[8:]
    of_server, isolation = (str(level).replace("-", " ").lower() for level in (of_server, of_session))
    if isolation == DEFAULT_ISOLATION:
        isolation = of_server
    read = _mariadb if server.mariadb else _mysql
    epoch, position = read(role, identity, said)
    members = parse_members(query(MEMBERS)[1], str(identity.address)) if _is_group(identity) else None
    if members is not None:
        if members and role is Role.WRITER:
            raise UnsupportedServer(f"accepts writes, but {members}", passing=True)
        return ServerStatus(identity, role, epoch, position, None, isolation, members if role is Role.READER else "")
    replicas = REPLICAS_MARIADB if server.mariadb else REPLICAS_MYSQL
    if not server.mariadb and server.number < (8, 0, 22):
        replicas = "SHOW SLAVE STATUS"
    names, rows = query(replicas)
    channels = [dict(zip(names, row, strict=True)) for row in rows]
    replicates = any("Yes" in (c.get("Replica_SQL_Running"), c.get("Slave_SQL_Running")) for c in channels)
    if role is Role.WRITER and (replicates or _is_group(identity)):
        # The server may be a reader that nobody has made read-only, or a restarted member that is not back in its group.
        # So its position gets no origin.
        epoch, position = read(role, identity._replace(cluster="mysql", address=None), said)
    if role is Role.WRITER or (shared and not rows):
        return ServerStatus(identity, role, epoch, position, None, isolation)
    lag, stopped = parse_replicas(channels)
    filters, sources = parse_filters(channels), parse_sources(channels)
    return ServerStatus(identity, role, epoch, position, lag, isolation, stopped, filters, sources=sources)


def _is_group(identity: ServerId) -> bool:
    return not identity.cluster.startswith(("mariadb-", "mysql"))


def _mariadb(role: Role, identity: ServerId, said: Sequence[Any]) -> tuple[int, Position | None]:
    """The epoch and the position of MariaDB.

    A reader's epoch is used in its position only, and 0 is returned. A transaction of the reader's own (a stray FLUSH is enough)
    may look like a writer's, and would depose the writer.

    The writer's position unites the position of its log and its last position as a reader. gtid_current_pos is not asked, because
    it goes back after a transaction that was written with another server's id (SET SESSION server_id).
    """
    logged, replayed, state, logs = said
    own = int(identity.address or -1)
    if role is Role.READER:
        return 0, MariadbGtid.from_server(mariadb_epoch(state or "", own), replayed or "", own, writer_starts(state or "", own))
    epoch = mariadb_epoch(state or "")
    if not _is_on(logs):
        return epoch, None
    written = MariadbGtid.from_server(epoch, logged or "", own, writer_starts(state or ""))
    return epoch, written.merge(MariadbGtid.from_server(epoch, replayed or ""))


def _mysql(role: Role, identity: ServerId, said: Sequence[Any]) -> tuple[int, Position | None]:
    """The epoch and the position of MySQL. There is no position unless all transactions have a GTID."""
    executed, mode, opened = said
    own = identity.cluster if _is_group(identity) else identity.address
    return 1, GtidSet.from_server(1, executed or "", own or "", float(opened or 0)) if mode == "ON" else None


def omissions(query: Query) -> str:
    """Describe the data that the server leaves out of its log, so that no reader behind it ever has it; "" if there is none."""
    _, (row,) = query(VERSION)
    server = parse_version(row)
    renamed = not server.mariadb and server.number >= (8, 2, 0)
    names, rows = query(LOG_RENAMED if renamed else LOG)
    settings = {name: value for row in rows for name, value in zip(names, row, strict=True)}
    filters = {name: outside_system(name, settings.get(name)) for name in ("Binlog_Do_DB", "Binlog_Ignore_DB")}
    found = "; ".join(f"{name}: {kept}" for name, kept in filters.items() if kept)
    return f"its log has a part only of what is written ({found})" if found else ""


def recognizes(row: Sequence[Any]) -> bool:
    """Return whether the server has a version like those of MySQL and MariaDB."""
    return re.match(r"\d+\.\d+", str(row[0])) is not None


def dialect(server: ServerId) -> str:
    """Return the dialect of the server that answers, whatever the URL begins with."""
    return "mariadb" if server.cluster.startswith("mariadb-") else "mysql"


LITERALS = "SELECT @@sql_mode"


def parse_functions(rows: Iterable[Sequence[Any]]) -> frozenset[str]:
    """Return the names of the functions that only read, from the answer to FUNCTIONS.

    A name is "schema.name", and also "name" if the function only reads in every schema. All are in lower case, because the case
    of names does not matter.
    """
    harmless: set[str] = set()
    harmful: set[str] = set()
    for schema, name, access in rows:
        names = {str(name).lower(), f"{schema}.{name}".lower()}
        (harmless if access in ("NO SQL", "READS SQL DATA") else harmful).update(names)
    return frozenset(harmless - harmful)


# -- how errors read ----------------------------------------------------------------------------------------------


# 2061: a plugin for logging in is missing; 3118, 3955, 4150, 4151: the account is locked, or blocked after wrong passwords
_REFUSED = frozenset({1044, 1045, 1049, 1130, 1142, 1143, 1184, 1227, 1370, 1698, 1820, 1862, 2061, 3118, 3955, 4150, 4151})
_IN_READ_ONLY = 1792  # a read-only transaction
_READ_ONLY = frozenset({_IN_READ_ONLY, 1836, 1874})
# Keys, foreign keys, NOT NULL, the range of a column (for example UNSIGNED), WITH CHECK OPTION, CHECK, and a trigger's SIGNAL.
_CONSTRAINT = frozenset(
    {1048, 1062, 1169, 1216, 1217, 1264, 1364, 1369, 1451, 1452, 1557, 1586, 1644, 1690, 1761, 1762, 3819, 4025}
)
# Other numbers are of triggers that check something: SIGNAL may set any MYSQL_ERRNO.
_OF_SERVERS = (range(1000, 5000), range(6000, 10000))
_BUSY = frozenset({1040, 1203, 1226})
_LOST = frozenset({1053, 1927, 2006, 2013, 2055, 4031})
CONNECTING = frozenset({1129, 3032} | _BUSY | {1045, 1049, 1130, 1184, 1698})
ERROR_ENDS_TRANSACTION = False
KILLED: Final = frozenset({1927})
ENDED = "somebody has ended it (KILL), or it is longer than the server's max_allowed_packet"
_UNREACHED = frozenset({1129, 2002, 2003, 2005, 2026, 3032})  # 1129: too many attempts have failed; 3032: offline
_BROKEN = frozenset({1021, 1030, 1037, 1041, 1194, 1195})  # no disk, no memory, a storage engine's fault
_TRANSIENT = {
    1054: Failure.MISSING,  # a column
    1146: Failure.MISSING,  # a table
    1305: Failure.MISSING,  # a function
    1356: Failure.MISSING,  # something that a view names
    1020: Failure.SERIALIZATION,  # a row has changed since the snapshot
    1205: Failure.SERIALIZATION,  # "try restarting transaction"
    1206: Failure.SERIALIZATION,
    1213: Failure.DEADLOCK,
    1412: Failure.CONFLICT,  # the definition of a table has changed since the snapshot
    1614: Failure.DEADLOCK,
    # The tables of a prepared statement, for example in a procedure, have changed.
    1615: Failure.OUTDATED,
    3100: Failure.SERIALIZATION,  # the member is about to leave its group
    3101: Failure.SERIALIZATION,  # another member of the group was first
}


def failure(code: int | None, message: str, *, disconnected: bool) -> Failure:
    """Return the kind of failure that a driver's error stands for.

    code: None if the error has none.
    message: the server's words, which are matched but never shown.
    disconnected: the connection is unusable.
    """
    if code in _REFUSED:
        return Failure.REFUSED
    if code in _READ_ONLY or (code == 1290 and re.search("read.only", message)):
        return Failure.READ_ONLY
    if code in _CONSTRAINT:
        return Failure.CONSTRAINT
    if code in _BUSY:
        return Failure.BUSY
    if code in _UNREACHED:
        return Failure.CONNECT
    if disconnected or code in _LOST:
        return Failure.LOST
    if code in _BROKEN:
        return Failure.BROKEN
    if code and not any(code in numbers for numbers in _OF_SERVERS):
        return Failure.CONSTRAINT
    return _TRANSIENT.get(code or 0, Failure.OTHER)


UNUSABLE = frozenset(
    {
        *(1064, 1115, 1193, 1228, 1229, 1231, 1232, 1238, 1253, 1273, 1298),
        *(1046, 1054, 1128, 1146, 1305, 1582),
    }
)
"""While connecting, the driver sends only init_command, sql_mode, charset and collation. One of them cannot be parsed. Or it
names a setting, column, table or function that does not exist, or a value that the setting cannot have."""
_REFUSALS = (
    ((1045, 1698), "check the user and the password"),
    ((3955, 4150), "check the password, and unblock the account (ALTER USER)"),
    ((1049,), "check the database name"),
    ((1044,), "check the database name, or let this user use it"),
    ((1130,), "allow this host to connect"),
    ((1184,), "correct init_connect on the server, or let this user run what it says"),
    (
        (1142, 1227),
        "the monitor needs SLAVE MONITOR on MariaDB, REPLICATION CLIENT on MySQL, and in a group SELECT on "
        "performance_schema.replication_group_members; let this user have it",
    ),
    (UNUSABLE, "check init_command, sql_mode, charset and collation in the URL's query and connect_args"),
)


def explain_refusal(code: int | None, message: str) -> tuple[ProbeFailure, str]:
    """Return the kind of a failed probe, which says whether a retry can help, and words for the user."""
    for codes, advice in _REFUSALS:
        if code in codes:
            return ProbeFailure.MISCONFIGURED, f"{message}; {advice}"
    return ProbeFailure.MISCONFIGURED if code in _REFUSED else ProbeFailure.REFUSED, message


def is_busy(code: int | None, message: str) -> bool:
    """Return whether the server is alive but has no room for one more connection."""
    return code in _BUSY


# -- what a server does on its own --------------------------------------------------------------------------------

# All connections share one process, which cannot report its own crash.
CRASHED: frozenset[int] = frozenset()
# The server has rolled back the whole transaction. The next statement silently begins another one.
_ROLLED_BACK = frozenset({1020, 1206, 1213, 1614})
# Only the statement has failed, unless the server's setting says otherwise.
_TIMED_OUT = 1205
# A warning: "Some non-transactional changed tables couldn't be rolled back".
_NOT_UNDONE = 1196


def may_have_rolled_back(code: int | None) -> bool:
    """Return whether the server may have rolled back the whole transaction with an error."""
    return code in _ROLLED_BACK or code == _TIMED_OUT


def has_rolled_back(code: int | None, query: Query) -> bool:
    """Return whether the server has rolled back the whole transaction with an error. Ask it if its setting decides."""
    if code != _TIMED_OUT:
        return code in _ROLLED_BACK
    _, ((setting,),) = query("SELECT @@global.innodb_rollback_on_timeout")
    return _is_on(setting)


def has_left_writes(query: Query) -> bool:
    """Return whether the rollback that came just before has left writes to a table without transactions (MyISAM, MEMORY).

    The server keeps fewer warnings than it counts if `max_error_count` is small. Each that is missing may be the one.
    """
    _, kept = query("SHOW WARNINGS")
    if any(int(code) == _NOT_UNDONE for _, code, *_ in kept):
        return True
    _, counted = query("SHOW COUNT(*) WARNINGS")
    return any(int(number) > len(kept) for (number,) in counted)


# -- what became of a COMMIT --------------------------------------------------------------------------------------


def insert_commit_row(execute: Execute, signature: str, database: str | None, declared_read_only: bool) -> str:
    """Write the row by which the transaction is found again.

    database: the URL's database, whose commit table gets the row. None: the transaction's current one.
    declared_read_only: not used, because the server's refusal leaves the transaction as it is (see `is_read_only`).
    """
    table = f"`{database.replace('`', '``')}`.{COMMIT_TABLE}" if database else COMMIT_TABLE
    execute(f"INSERT INTO {table} (id) VALUES (%(id)s)", {"id": signature})  # noqa: S608 - a quoted name
    return ""


def is_read_only(code: int | None) -> bool:
    """Return whether the code of an error of `insert_commit_row` says that the transaction is read-only."""
    return code == _IN_READ_ONLY


def is_locked_out(code: int | None) -> bool:
    """Return whether the code of an error says that LOCK TABLES has locked some tables, but not the commit table."""
    return code == 1100


def is_missing_table(code: int | None) -> bool:
    """Return whether the code of an error says that a table does not exist, or that no database is selected."""
    return code in (1046, 1146)
