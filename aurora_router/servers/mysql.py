"""MySQL and MariaDB: the SQL that asks a server who and where it is, how its rows and error codes read, and PyMySQL's switches.

Which of the two answers is seen from what the server says of itself: a URL that says mysql leads to either, and one that says
mariadb to MariaDB alone, for SQLAlchemy takes nothing else there.
"""

from __future__ import annotations

import contextlib
import re
import socket
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Final, NamedTuple

from aurora_router.core.failures import Failure
from aurora_router.core.gtid import GtidSet, MariadbGtid, began
from aurora_router.core.positions import Position
from aurora_router.core.topology import Role, Server, ServerId, Silence
from aurora_router.servers.family import Ask, Mode, Unsuitable

DIALECT = "mysql"
DRIVER = "pymysql"
EXAMPLE = "mysql+pymysql://user:password@host:3306/database"
DEFAULT_PORT = 3306
DEFAULT_ISOLATION = "repeatable read"
CONNECT: Final[Mapping[str, Any]] = {}
XIDS = False
PREPARED = "XA RECOVER"
OLDEST_MYSQL = (8, 0)
OLDEST_MARIADB = (10, 6)  # nothing older is maintained or tested

KEEPALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_USER_TIMEOUT": 25000}
"""Seconds, seconds, milliseconds. Of a peer that vanished without a word only the kernel can tell."""

# One question for both, with what only one of them understands in comments that the other one skips: MySQL takes all of MariaDB's
# for plain ones, and MariaDB those that are for MySQL 5.7 and newer.
_MARIADB, _MYSQL = "/*M!100600", "/*!80000"
# The difference is when the server was started, to the second, and the same whenever it is asked: both are of one statement.
_STARTED = "CAST(UNIX_TIMESTAMP() - (SELECT variable_value FROM {}.global_status WHERE variable_name = 'Uptime') AS SIGNED)"
_GROUP = "SELECT variable_value FROM performance_schema.global_variables WHERE variable_name = 'group_replication_group_name'"
_OPENED = (
    "SELECT UNIX_TIMESTAMP(MAX(set_time)) FROM performance_schema.variables_info "
    "WHERE variable_name IN ('read_only', 'super_read_only')"
)
IDENTITY = f"""
SELECT @@version, /*M! NOT */ FALSE
{_MARIADB} , @@global.gtid_domain_id, @@global.server_id, {_STARTED.format("information_schema")} */
{_MYSQL} , ({_GROUP}), @@global.server_uuid, {_STARTED.format("performance_schema")} */
, @@global.port, @@global.read_only, @@global.innodb_read_only"""
"""FALSE is true on MariaDB, and what follows is missing where the version is too old."""
PROBE = f"""{IDENTITY}
{_MARIADB} , @@global.gtid_current_pos, @@global.gtid_slave_pos, @@global.gtid_binlog_state, @@global.log_bin
, @@global.tx_isolation */
{_MYSQL} , @@global.gtid_executed, @@global.gtid_mode, ({_OPENED}), @@global.transaction_isolation */"""
"""MariaDB's in this order: a position that is of an older epoch than the state says is true, and the other way round it would not
be. Its tx_isolation has a second name, as on MySQL, from 11.1 on only."""

REPLICAS_MARIADB = "SHOW ALL SLAVES STATUS"
REPLICAS_MYSQL = "SHOW REPLICA STATUS"
"""Wants SLAVE MONITOR on MariaDB, REPLICATION CLIENT on MySQL. The writer is asked, too: it may be a reader tomorrow, and what is
not granted is to be found out today."""
MEMBERS = "SELECT member_id, member_state, member_role FROM performance_schema.replication_group_members"
"""Asked where there is a group; wants SELECT on that table."""

GUARD = "SET SESSION TRANSACTION READ ONLY"
UNGUARD = "SET SESSION TRANSACTION READ WRITE"
SNAPSHOT = "START TRANSACTION READ ONLY"

COMMITS = "aurora_router_commits"
CREATE_COMMITS = (
    f"CREATE TABLE IF NOT EXISTS {COMMITS} ("
    "id CHAR(36) CHARACTER SET ascii COLLATE ascii_bin NOT NULL PRIMARY KEY, committed BOOLEAN NOT NULL DEFAULT TRUE, "
    f"at TIMESTAMP(6) NOT NULL DEFAULT CURRENT_TIMESTAMP(6), KEY {COMMITS}_at (at)) ENGINE=InnoDB",
)
HAS_COMMITS = f"SELECT count(*) > 0 FROM information_schema.tables WHERE table_schema = DATABASE() AND table_name = '{COMMITS}'"  # noqa: S608
THERE = "SET SESSION innodb_lock_wait_timeout = 1"
"""Before FENCE and SIGNED. The table is in the database of the URL, whatever USE the transaction has said."""
FENCE = f"INSERT IGNORE INTO {COMMITS} (id, committed) VALUES (%(id)s, FALSE)"  # noqa: S608 - a constant
"""Waits for a transaction that is still under way with this id, and keeps one that is yet to come from committing."""
SIGNED = f"SELECT committed FROM {COMMITS} WHERE id = %(id)s"  # noqa: S608 - a constant
SEAL = f"REPLACE INTO {COMMITS} (id, committed) VALUES ('seal', FALSE)"  # noqa: S608 - a constant
"""A row that says nothing, whose COMMIT waits for readers where COMMITs do."""
KEPT = 3600  # seconds
PRUNED = 2000  # rows at once: it must not take longer than a probe may
PRUNE = f"DELETE FROM {COMMITS} WHERE at < NOW() - INTERVAL {KEPT} SECOND ORDER BY at LIMIT {PRUNED}"  # noqa: S608

FUNCTIONS = """
SELECT routine_schema, routine_name, sql_data_access FROM information_schema.routines
 WHERE routine_type = 'FUNCTION' AND routine_schema NOT IN ('mysql', 'sys', 'information_schema', 'performance_schema')"""
"""User functions, and what they declare. CONTAINS SQL is what stands there where nothing was declared."""


class Version(NamedTuple):
    """What answers: which of the two, and its version."""

    mariadb: bool
    number: tuple[int, ...]

    def __str__(self) -> str:
        return f"{'MariaDB' if self.mariadb else 'MySQL'} {'.'.join(map(str, self.number))}"


def encrypted(query: dict[str, Any]) -> dict[str, Any]:
    """The query of a URL, with encryption unless the user says otherwise."""
    return query if any(name.startswith("ssl") for name in query) else {**query, "ssl_check_hostname": "false"}


# -- who and where a server is ------------------------------------------------------------------------------------


def parse_version(row: Sequence[Any]) -> Version:
    """How the answers to IDENTITY and PROBE begin. Raises Unsuitable for a server that is too old."""
    found = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", str(row[0]))
    number = tuple(int(part or 0) for part in found.groups()) if found is not None else (0,)
    server = Version(_is_on(row[1]), number)
    oldest = OLDEST_MARIADB if server.mariadb else OLDEST_MYSQL
    if server.number < oldest:
        raise Unsuitable(f"runs {server}; version {'.'.join(map(str, oldest))} or newer is needed")
    return server


def parse_identity(row: Sequence[Any]) -> tuple[ServerId, Role]:
    """How the answers to IDENTITY and PROBE begin. Raises Unsuitable for a server that is too old.

    Neither has an identity of the cluster. What stands for it: the name of the group, on MySQL with group replication; the GTID
    domain, on MariaDB. A server does not know where a connection arrived: its id in the replication stands for that.
    """
    server = parse_version(row)
    if len(row) < 8:
        raise Unsuitable(f"does not say who it is: something on the way to {server} drops version comments (/*! */)")
    of_cluster, name, started, port, *read_only = row[2:8]
    cluster = f"mariadb-{of_cluster}" if server.mariadb else str(of_cluster or "mysql")
    # Several servers may have been started in one second; no two of a cluster have one name.
    identity = ServerId(cluster, str(name), int(port), f"{started}/{name}")
    return identity, Role.READER if any(map(_is_on, read_only)) else Role.WRITER


def greet(connection: Any, ask: Ask) -> tuple[ServerId, Role]:
    """Which server a fresh connection has reached; a reader's is guarded, for a reader that is promoted in place would let the
    statements of a unit in autocommit write. Raises Unsuitable."""
    _, (row,) = ask(IDENTITY)
    identity, role = parse_identity(row)
    if role is Role.READER:
        guard(connection, ask, True)
    return identity, role


def probe(ask: Ask, *, asynchronous_commits: bool) -> Server:
    """What a server says of itself. Raises Unsuitable.

    asynchronous_commits means nothing here: a commit is in the positions before it is acknowledged.
    """
    _, ((*row, level),) = ask(PROBE)
    server = parse_version(row)
    identity, role = parse_identity(row)
    shared, said = _is_on(row[7]), row[8:]
    isolation = str(level).replace("-", " ").lower()
    read = _mariadb if server.mariadb else _mysql
    epoch, position = read(role, identity, said)
    members = parse_members(ask(MEMBERS)[1], str(identity.address)) if _is_group(identity) else None
    if members is not None:
        if members and role is Role.WRITER:
            raise Unsuitable(f"accepts writes, but {members}")
        return Server(identity, role, epoch, position, None, isolation, members if role is Role.READER else "")
    replicas = REPLICAS_MARIADB if server.mariadb else REPLICAS_MYSQL
    if not server.mariadb and server.number < (8, 0, 22):
        replicas = "SHOW SLAVE STATUS"
    names, rows = ask(replicas)
    channels = [dict(zip(names, row, strict=True)) for row in rows]
    replicates = any("Yes" in (c.get("Replica_SQL_Running"), c.get("Slave_SQL_Running")) for c in channels)
    if role is Role.WRITER and (replicates or _is_group(identity)):
        # A reader, maybe, that nobody has made read-only, or a member that was started again and is not back in its group.
        epoch, position = read(role, identity._replace(cluster="mysql", address=None), said)
    if role is Role.WRITER or (shared and not rows):
        return Server(identity, role, epoch, position, None, isolation)
    lag, stopped = parse_replicas(channels)
    return Server(identity, role, epoch, position, lag, isolation, stopped)


def _is_on(setting: object) -> bool:
    return str(setting).upper() not in ("0", "OFF", "NONE")  # newer MariaDB has words where older has numbers


def _is_group(identity: ServerId) -> bool:
    return not identity.cluster.startswith(("mariadb-", "mysql"))


def _mariadb(role: Role, identity: ServerId, said: Sequence[Any]) -> tuple[int, Position | None]:
    """The epoch and the position of MariaDB.

    What a reader takes for the epoch counts for its position only: a transaction that it has made itself (a stray FLUSH is
    enough) may look like a writer's, and would depose the writer.
    """
    written, replayed, state, logs = said
    own = int(identity.address or -1)
    if role is Role.READER:
        return 0, MariadbGtid.said(began(state or "", own), replayed or "", own)
    epoch = began(state or "")
    return epoch, MariadbGtid.said(epoch, written or "", own) if _is_on(logs) else None


def _mysql(role: Role, identity: ServerId, said: Sequence[Any]) -> tuple[int, Position | None]:
    """The epoch and the position of MySQL. There is none where not all transactions have a GTID."""
    executed, mode, opened = said
    own = identity.cluster if _is_group(identity) else identity.address
    return 1, GtidSet.said(1, executed or "", own or "", float(opened or 0)) if mode == "ON" else None


def parse_members(rows: Iterable[Sequence[Any]], me: str) -> str | None:
    """The answer to MEMBERS: why a member of a group is not to be used, "" where nothing is wrong; None where it is in no group
    now. me: its server_uuid."""
    rows = list(rows)
    states = {str(member): str(state) for member, state, _ in rows}
    state = states.get(me, "OFFLINE")
    if state == "OFFLINE":
        return None
    if state != "ONLINE":
        return f"it is {state} in its group"
    reachable = sum(state in ("ONLINE", "RECOVERING") for state in states.values())
    if 2 * reachable <= len(states):
        return "most of its group cannot be reached"
    if sum(role == "PRIMARY" for _, _, role in rows) > 1:
        return "its group has several writers, and may have one only: group_replication_switch_to_single_primary_mode()"
    return ""


def parse_replicas(channels: Sequence[Mapping[str, Any]]) -> tuple[float | None, str]:
    """What a reader says of its replication, a row for each of its sources: how many seconds it is behind, None where that cannot
    be told; and why it replays nothing, "" where it does."""
    if not channels:
        return None, "it replicates from nobody"
    lags = []
    for channel in channels:
        said = {name.replace("Slave", "Replica").replace("Master", "Source"): value for name, value in channel.items()}
        for thread in "SQL", "IO":
            error = said[f"Last_{thread}_Errno"]
            if said[f"Replica_{thread}_Running"] == "No" and (thread == "SQL" or (error and error not in _WRITER_IS_GONE)):
                # What Last_SQL_Error says may hold data.
                return None, f"its {thread} thread has stopped (error {error}; SHOW REPLICA STATUS there says more)"
        if not _has_replayed_all(said):
            behind = said["Seconds_Behind_Source"]
            if behind is not None:
                lags.append(float(behind) + 1.0)  # it counts in seconds of the clock, begun ones as none
        elif said["Replica_IO_Running"] == "Yes":
            lags.append(0.0)  # else nobody knows what it has not received, and the server may say 0
    return (max(lags) if len(lags) == len(channels) else None), ""


_WRITER_IS_GONE = range(2000, 3000)
"""Errors of the client library, which is how a reader says that it does not reach its source."""


def _has_replayed_all(said: Mapping[str, Any]) -> bool:
    """Whether a reader has replayed what it has received from a source. MySQL's workers are ahead of the place in the log that it
    shows, and of the seconds, by up to `replica_checkpoint_period`, 300 ms: its GTIDs are exact."""
    if said.get("Auto_Position"):
        return GtidSet.said(1, said["Executed_Gtid_Set"]).covers(GtidSet.said(1, said["Retrieved_Gtid_Set"]))
    received = said["Source_Log_File"], said["Read_Source_Log_Pos"]
    return received == (said["Relay_Source_Log_File"], said["Exec_Source_Log_Pos"])


def parse_functions(rows: Iterable[Sequence[Any]]) -> frozenset[str]:
    """The answer to FUNCTIONS as names that are reads: "schema.name", and "name" where that is so in every schema. The case of
    names does not count."""
    harmless: set[str] = set()
    harmful: set[str] = set()
    for schema, name, access in rows:
        names = {str(name).lower(), f"{schema}.{name}".lower()}
        (harmless if access in ("NO SQL", "READS SQL DATA") else harmful).update(names)
    return frozenset(harmless - harmful)


# -- how errors read ----------------------------------------------------------------------------------------------


def code(error: BaseException | None) -> int | None:
    """The number of the server's or PyMySQL's error; 0 is what PyMySQL says on a connection that it has closed."""
    number = error.args[0] if error is not None and error.args else None
    return number if isinstance(number, int) else None


NO_PACKAGE = 2061  # that a plugin for logging in is not there
_REFUSED = frozenset({1044, 1045, 1049, 1130, 1142, 1143, 1227, 1370, 1698, 1820, 1862, NO_PACKAGE, 3118, 4151})
_READ_ONLY = frozenset({1792, 1836, 1874})
_BUSY = frozenset({1040, 1203, 1226})
_LOST = frozenset({0, 1053, 1927, 2006, 2013, 2055, 4031})
_UNREACHED = frozenset({1129, 2002, 2003, 2005, 2026, 3032})  # 1129: too many attempts have failed; 3032: it is offline
_GAVE_UP = re.compile(r"""\((TimeoutError\(["'])?(The (read|write) operation )?timed out""")
"""How PyMySQL says within its 2006 and 2013 that its read_timeout or write_timeout was over. The kernel says [Errno 110]."""
_BROKEN = frozenset({1021, 1030, 1037, 1041, 1194, 1195})  # no disk, no memory, a storage engine's fault
_TRANSIENT = {
    1020: Failure.SERIALIZATION,  # a row has changed since the snapshot
    1205: Failure.SERIALIZATION,  # "try restarting transaction"
    1206: Failure.SERIALIZATION,
    1213: Failure.DEADLOCK,
    1412: Failure.CONFLICT,  # the definition of a table has changed since the snapshot
    1614: Failure.DEADLOCK,
    3100: Failure.SERIALIZATION,  # the member is about to leave its group
    3101: Failure.SERIALIZATION,  # another member of the group was first
}
_ROLLED_BACK = frozenset({1020, 1206, 1213, 1614})
"""Errors with which the server has rolled back the whole transaction, and goes on in another one as if nothing had been."""
_TIMED_OUT = 1205
ROLLS_BACK_ON_TIMEOUT = "SELECT @@global.innodb_rollback_on_timeout"
"""Whether that is one of those errors as well, or only the statement has failed: the default."""


def failure(code: int | None, message: str, *, disconnected: bool) -> Failure:
    """What kind of failure a driver error stands for.

    code: None where the driver has none. message: the server's or driver's words (never shown to anyone here). disconnected: the
    connection is unusable.
    """
    if code in _REFUSED:
        return Failure.REFUSED
    if code in _READ_ONLY or (code == 1290 and re.search("read.only", message)):
        return Failure.READ_ONLY
    if code in _BUSY:
        return Failure.BUSY
    if code in _UNREACHED:
        return Failure.CONNECT
    if code in (2006, 2013) and _GAVE_UP.search(message):
        return Failure.TIMED_OUT
    if disconnected or code in _LOST or (code is None and "Already closed" in message):
        return Failure.LOST
    if code in _BROKEN:
        return Failure.BROKEN
    return _TRANSIENT.get(code or 0, Failure.OTHER)


def is_from_connecting(error: BaseException) -> bool:
    """Whether the driver's error is one that is only met while connecting."""
    return code(error) in {*_UNREACHED, *_BUSY, 1045, 1049, 1130, 1698, NO_PACKAGE}


_REFUSALS = (
    ((1045, 1698), "check the user and the password"),
    ((1049,), "check the database name"),
    ((1044,), "check the database name, or let this user use it"),
    ((1130,), "allow this host to connect"),
    (
        (1142, 1227),
        "the monitor needs SLAVE MONITOR on MariaDB, REPLICATION CLIENT on MySQL, and in a group SELECT on "
        "performance_schema.replication_group_members; let this user have it",
    ),
    ((2026,), "check the ssl options and the certificates"),
    ((NO_PACKAGE,), "pip install 'PyMySQL[rsa,ed25519]'"),
)
_NO_SERVER = re.compile("Packet sequence number wrong|unpack|index out of range")
_NO_MARIADB = "is not a MariaDB variant"  # SQLAlchemy's words
_UNTRUSTED = "CERTIFICATE_VERIFY_FAILED"  # OpenSSL's word, within what PyMySQL says of any server that is not reached


def explain_refusal(code: int | None, message: str) -> tuple[Silence, str]:
    """A failed probe in words for the user, and whether trying again can help."""
    if _UNTRUSTED in message:
        code = 2026
    for codes, advice in _REFUSALS:
        if code in codes:
            return Silence.MISCONFIGURED, f"{message}; {advice}"
    if code is None and _NO_SERVER.search(message):
        return Silence.MISCONFIGURED, f"{message}; no MySQL or MariaDB server answers there"
    if code is None and _NO_MARIADB in message:
        return Silence.MISCONFIGURED, f"{message.rstrip('.')}; write mysql+pymysql:// in the URL"
    return Silence.MISCONFIGURED if code in _REFUSED else Silence.REFUSED, message


_TLS = "write ssl_ca=FILE to encrypt and to verify the server, or ssl_check_hostname=false alone to encrypt only"
MISTAKES = (
    ("unexpected keyword argument '(ssl|tls)|no attribute 'get'", f"that is no ssl option of PyMySQL; {_TLS}"),
    ("unexpected keyword argument", "PyMySQL has no such option; check the URL's query and connect_args"),
    ("^KeyError", "rows must be tuples; leave cursorclass out of connect_args"),
    ("^(FileNotFound|Permission|IsADirectory|NotADirectory|SSL)", "check the files that ssl_ca, ssl_cert and ssl_key name"),
    ("^UnicodeEncode", "PyMySQL sends a password in Latin-1; give another one as bytes, in connect_args"),
)


def is_busy(code: int | None, message: str) -> bool:
    """Whether the server lives, but has no room for one more connection."""
    return code in _BUSY


# -- what became of a COMMIT --------------------------------------------------------------------------------------


def sign(connection: Any, signature: str) -> str:
    """Write the row by which the transaction is to be found again, into the table of the URL's database."""
    if is_aborted(connection):
        refuse_aborted(connection)  # what comes now would be in another transaction
    name = connection.db.decode() if isinstance(connection.db, bytes) else connection.db
    table = f"`{name.replace('`', '``')}`.{COMMITS}" if name else COMMITS
    with connection.cursor() as cursor:
        cursor.execute(f"INSERT INTO {table} (id) VALUES ('{signature}')")  # noqa: S608 - a UUID, and a quoted name
    return ""


def is_missing_table(error: BaseException | None) -> bool:
    """Whether the driver's error says that a table does not exist, or that there is no database to look in."""
    return code(error) in (1046, 1146)


def is_aborted(connection: Any) -> bool:
    """Whether the server has rolled back the connection's transaction on its own, and would take COMMIT for that of another."""
    return getattr(connection, "aborted_by", None) is not None


def refuse_aborted(connection: Any) -> None:
    """Raise the error with which the server has rolled back the transaction."""
    raise connection.aborted_by


# -- PyMySQL's connection -----------------------------------------------------------------------------------------


def fileno(connection: Any) -> int:
    """The number of the connection's socket. PyMySQL has no public way."""
    number: int = connection._sock.fileno()
    return number


def is_closed(connection: Any) -> bool:
    """Whether the connection has ended."""
    return not connection.open


_AUTOCOMMIT = 2  # PyMySQL's SERVER_STATUS_AUTOCOMMIT; its get_autocommit() takes twice as long


def autocommit(connection: Any) -> bool:
    """Whether each statement is on its own, as the server has said last."""
    return bool(connection.server_status & _AUTOCOMMIT)


def guard(connection: Any, ask: Ask, on: bool) -> None:
    """Have a connection refuse writes outside of transactions that say READ WRITE, or accept them again."""
    ask(GUARD if on else UNGUARD)


def set_mode(connection: Any, mode: Mode, default_autocommit: bool, guarded: bool) -> bool:
    """Switch an idle connection: one round trip for a read-only transaction, none where autocommit is as it must be. Where it is
    off, the transaction begins by itself, and on a guarded connection that is a read-only one: that lasts."""
    if mode is Mode.READ_ONLY:
        if guarded and not autocommit(connection):
            return True
        connection.query(SNAPSHOT)
        return False
    wanted = default_autocommit or mode is Mode.AUTOCOMMIT
    if autocommit(connection) is not wanted:
        connection.autocommit(wanted)
    return True


def prepare(connection: Any) -> None:
    """Nothing: streamed reads need no transaction."""


def watch_connecting(dialect: Any, connecting: Callable[[int], AbstractContextManager[None]]) -> None:
    """Have a dialect's new connections wait for the server within `connecting(number of the socket)`, which may end the wait by
    shutting the socket. Where something has taken the place of PyMySQL's own connect(), to trace it, say, it is left alone."""
    import pymysql

    if dialect.loaded_dbapi.connect is pymysql.connections.Connection:
        dialect.connect = type("Connection", (_connection(),), {"connecting": staticmethod(connecting)})


class _Autocommit:
    """PyMySQL's method of that name, which can be asked as well: psycopg has an attribute there."""

    __slots__ = ("_connection", "_set")

    def __init__(self, connection: Any, set_: Callable[[Any], None]) -> None:
        self._connection = connection
        self._set = set_

    def __call__(self, value: Any) -> None:
        self._set(value)

    def __bool__(self) -> bool:
        return autocommit(self._connection)


_made: Any = None


def _connection() -> Any:
    global _made
    if _made is not None:
        return _made

    from pymysql.connections import Connection as Base
    from pymysql.constants.SERVER_STATUS import SERVER_STATUS_IN_TRANS
    from pymysql.err import MySQLError, OperationalError

    contexts: list[Any] = []

    class Connection(Base):  # type: ignore[misc,unused-ignore]
        """PyMySQL's, but that it sends COMMIT and ROLLBACK only where they do something, may be closed twice, never waits for an
        answer while connecting for longer than connect_timeout, and knows when the server has rolled back on its own.

        quiet: nothing was sent since the last transaction ended. failed: a statement has failed since then. aborted_by: the error
        with which the server has rolled back.
        """

        connecting: Callable[[int], AbstractContextManager[None]]
        _read_timeout: float | None
        _write_timeout: float | None
        quiet = True
        failed = False
        aborted_by: Exception | None = None

        @property
        def autocommit(self) -> _Autocommit:
            return _Autocommit(self, super().autocommit)

        def connect(self, sock: Any = None) -> None:
            patience = self._read_timeout, self._write_timeout
            self._read_timeout = self._write_timeout = self.connect_timeout
            try:
                if sock is not None or self.unix_socket:
                    super().connect(sock)
                    return
                sock = self._reach()
                try:
                    with self.connecting(sock.fileno()):
                        super().connect(sock)
                except BaseException:
                    sock.close()
                    raise
            except RuntimeError as error:  # the way to log in needs a package that is not there
                raise OperationalError(NO_PACKAGE, str(error)) from None
            finally:
                self._read_timeout, self._write_timeout = patience

        def _reach(self) -> socket.socket:
            failed: OSError | None = None
            try:
                for family, kind, protocol, _, address in socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM):
                    sock = socket.socket(family, kind, protocol)
                    try:
                        sock.settimeout(self.connect_timeout)
                        if self.bind_address is not None:
                            sock.bind((self.bind_address, 0))
                        with self.connecting(sock.fileno()):
                            sock.connect(address)
                        _keep_alive(sock)
                        self.host_info = f"socket {self.host}:{self.port}"
                        return sock
                    except OSError as error:
                        sock.close()
                        failed = error
                    except BaseException:
                        sock.close()
                        raise
            except OSError as error:  # the name does not resolve
                failed = error
            raise OperationalError(2003, f"Can't connect to MySQL server on {self.host!r} ({failed})") from failed

        def _create_ssl_ctx(self, options: Any) -> Any:
            # Without certificates of its own a context verifies nothing, and one does for all connections. PyMySQL makes one for
            # each, and loads the certificates of the system for it: 20 ms, more than all else that connecting takes.
            if not isinstance(options, dict) or options.keys() - {"check_hostname"}:
                return super()._create_ssl_ctx(options)
            if not contexts:
                contexts.append(super()._create_ssl_ctx(options))
            return contexts[0]

        def close(self) -> None:
            with contextlib.suppress(MySQLError):  # closed already
                super().close()

        def _read_query_result(self, unbuffered: bool = False) -> Any:
            # Of each statement in a text: SQLAlchemy logs the error of a later one, and goes on.
            self.quiet = False
            try:
                return super()._read_query_result(unbuffered)
            except MySQLError as error:
                self.failed = True
                if code(error) in _ROLLED_BACK or (code(error) == _TIMED_OUT and self._rolls_back_on_timeout()):
                    self.aborted_by = error
                raise

        def _rolls_back_on_timeout(self) -> bool:
            with contextlib.suppress(MySQLError):  # the next statement will meet it, too
                super().query(ROLLS_BACK_ON_TIMEOUT)
                return _is_on(self._result.rows[0][0])
            return False

        def commit(self) -> None:
            if self._in_transaction():
                super().commit()
            self.quiet, self.failed, self.aborted_by = True, False, None

        def rollback(self) -> None:
            if self._in_transaction():
                super().rollback()
            self.quiet, self.failed, self.aborted_by = True, False, None

        def _in_transaction(self) -> bool:
            """Whether COMMIT and ROLLBACK may do something. The answer to a SELECT does not tell PyMySQL: without autocommit any
            may have begun a transaction. Nor does an error, and before it a procedure may have."""
            result = self._result
            unread = result is not None and (result.has_next or result.unbuffered_active)
            unsaid = self.failed or not (self.quiet or autocommit(self))
            return unread or unsaid or bool(self.server_status & SERVER_STATUS_IN_TRANS)

    _made = Connection
    return _made


def _keep_alive(sock: socket.socket) -> None:
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in KEEPALIVE.items():
        if hasattr(socket, name):  # not everywhere
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
