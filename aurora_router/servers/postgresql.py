"""PostgreSQL: the SQL that asks a server who and where it is, how its rows and error codes read, and psycopg's switches."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Final

from aurora_router.core.commits import Evidence, Note
from aurora_router.core.failures import Failure
from aurora_router.core.positions import WalPosition, end_of_record, parse_lsn
from aurora_router.core.topology import Instance, Role, Server, ServerId, Silence, Topology
from aurora_router.servers.family import Ask, Mode, Unsuitable

DIALECT = "postgresql"
DRIVER = "psycopg"
EXAMPLE = "postgresql+psycopg://user:password@host:5432/database"
DEFAULT_PORT = 5432
DEFAULT_ISOLATION = "read committed"
CONNECT: Final[Mapping[str, Any]] = {"keepalives_idle": 10, "keepalives_interval": 5, "tcp_user_timeout": 25000}
"""Seconds, seconds, milliseconds. Of a peer that vanished without a word (a host without power, a forgetful firewall) only the
kernel can tell; of a server that is busy with a slow statement it hears."""
XIDS = True
PREPARED = "pg_prepared_xacts"
OLDEST = 120000  # pg_control_checkpoint() and the rest are older, but nothing below 12 is maintained or tested

_IDENTITY = """
  current_setting('server_version_num')::int,
  (SELECT system_identifier::text FROM pg_catalog.pg_control_system()),
  host(inet_server_addr()), inet_server_port(), extract(epoch FROM pg_postmaster_start_time())::text,
  pg_is_in_recovery()"""

IDENTITY = "SELECT" + _IDENTITY

GUARD = "SET default_transaction_read_only = on"
UNGUARD = "RESET default_transaction_read_only"
GREETING = (
    IDENTITY
    + """,
  CASE WHEN pg_is_in_recovery() THEN set_config('default_transaction_read_only', 'on', false) END"""
)
"""IDENTITY for a pooled connection, which guards a reader's: a reader that is promoted in place would let the statements of a
unit in autocommit write."""


PROBE = f"""{IDENTITY},
  current_setting('synchronous_commit'),
  current_setting('default_transaction_isolation'),
  current_setting('wal_block_size')::int,
  current_setting('wal_segment_size'),
  CASE WHEN pg_is_in_recovery() THEN NULL ELSE pg_current_wal_lsn()::text END,
  CASE WHEN pg_is_in_recovery() THEN NULL ELSE pg_current_wal_insert_lsn()::text END,
  CASE WHEN pg_is_in_recovery() THEN NULL ELSE substr(pg_walfile_name(pg_current_wal_insert_lsn()), 1, 8) END,
  pg_last_wal_replay_lsn()::text,
  pg_last_wal_receive_lsn()::text,
  (SELECT greatest(c.timeline_id, r.min_recovery_end_timeline)
     FROM pg_catalog.pg_control_checkpoint() c, pg_catalog.pg_control_recovery() r),
  (SELECT received_tli FROM pg_catalog.pg_stat_wal_receiver),
  EXISTS (SELECT FROM pg_catalog.pg_stat_wal_receiver),
  extract(epoch FROM clock_timestamp() - pg_last_xact_replay_timestamp())::float8"""  # noqa: S608 - nothing of anybody's is in it
"""Everything that an observation needs, one round trip. received_tli wants pg_monitor (or pg_read_all_stats): without it a
reader's epoch is only known from its last restart point, so that after a promotion it serves again minutes later."""

NOTE = "SELECT txid_current(), pg_current_wal_insert_lsn()::text, pg_last_wal_replay_lsn()::text"
"""What is noted of a transaction before its COMMIT; none of it needs a privilege. One that only notifies has no xid until its
COMMIT, so that it must be given one."""

EVIDENCE = f"""{IDENTITY},
  CASE WHEN pg_is_in_recovery() THEN NULL ELSE substr(pg_walfile_name(pg_current_wal_insert_lsn()), 1, 8) END,
  pg_last_wal_replay_lsn()::text,
  pg_last_xact_replay_timestamp() IS NOT NULL"""
STATUS = "SELECT txid_status(%(xid)s)"
"""What a server says of itself, and then of a noted transaction. Only a reader keeps the time of what it replays: after a
promotion it is there, after a crash it is not. The latter question fails where the xid has not been given out yet."""

SEAL = "SELECT pg_logical_emit_message(true, 'aurora_router', '')"
"""A record in the log that changes nothing, whose COMMIT waits for synchronous readers; one without a record would not."""

END_IDLE = """
SELECT pg_terminate_backend(pid) FROM pg_catalog.pg_stat_activity
 WHERE backend_xid::text::bigint = %(xid)s & 4294967295 AND state = 'idle in transaction'"""
"""End a transaction that waits for a COMMIT which was lost on its way; it holds its locks until the server notices."""

COMMITS = "aurora_router_commits"
CREATE_COMMITS = (
    f"CREATE TABLE IF NOT EXISTS {COMMITS} ("
    "id uuid PRIMARY KEY, committed boolean NOT NULL DEFAULT true, at timestamptz NOT NULL DEFAULT clock_timestamp())",
    f"CREATE INDEX IF NOT EXISTS {COMMITS}_at ON {COMMITS} (at)",
)
HAS_COMMITS = f"SELECT pg_catalog.to_regclass('{COMMITS}') IS NOT NULL"
"""CREATE INDEX IF NOT EXISTS is its owner's alone, also where it exists."""
SIGN = f"""
INSERT INTO {COMMITS} (id, at) VALUES (%(id)s, clock_timestamp())
RETURNING (SELECT relnamespace::regnamespace::text FROM pg_catalog.pg_class WHERE oid = {COMMITS}.tableoid)"""  # noqa: S608
"""Written in the transaction that is to be found again, which may be old by now; gives the schema of the table, for the
transaction's search_path is its own."""
THERE = "SELECT set_config('search_path', %(schema)s, true), set_config('lock_timeout', '1s', true)"
"""Before FENCE and SIGNED, in their transactions."""
FENCE = f"INSERT INTO {COMMITS} (id, committed) VALUES (%(id)s, false) ON CONFLICT DO NOTHING"  # noqa: S608 - a constant
"""Waits for a transaction that is still under way with this id, and keeps one that is yet to come from committing."""
SIGNED = f"SELECT committed FROM {COMMITS} WHERE id = %(id)s"  # noqa: S608 - a constant
KEPT = 3600  # seconds
PRUNED = 2000  # rows at once: it must not take longer than a probe may
PRUNE = f"""
DELETE FROM {COMMITS} WHERE id IN (
  SELECT id FROM {COMMITS} WHERE at < now() - interval '{KEPT} s' ORDER BY at LIMIT {PRUNED} FOR UPDATE SKIP LOCKED)"""  # noqa: S608

FUNCTIONS = """
SELECT n.nspname, p.proname,
       bool_and((p.provolatile <> 'v' OR coalesce(e.extname IN ('pgcrypto', 'uuid-ossp'), false)) AND NOT EXISTS (
         SELECT FROM pg_catalog.pg_aggregate a JOIN pg_catalog.pg_proc f ON f.provolatile = 'v' AND f.oid IN (
           a.aggtransfn, a.aggfinalfn, a.aggcombinefn, a.aggserialfn, a.aggdeserialfn,
           a.aggmtransfn, a.aggminvtransfn, a.aggmfinalfn)
          WHERE a.aggfnoid = p.oid))
  FROM pg_catalog.pg_proc p
  JOIN pg_catalog.pg_namespace n ON n.oid = p.pronamespace
  LEFT JOIN pg_catalog.pg_depend d
    ON d.classid = 'pg_catalog.pg_proc'::regclass AND d.objid = p.oid AND d.deptype = 'e'
   AND d.refclassid = 'pg_catalog.pg_extension'::regclass
  LEFT JOIN pg_catalog.pg_extension e ON e.oid = d.refobjid
 WHERE n.nspname NOT IN ('pg_catalog', 'information_schema', 'pg_toast')
   AND p.prokind <> 'p'
 GROUP BY n.nspname, p.proname"""
"""User functions, and whether the database says that they do not write: every overload STABLE or IMMUTABLE, or of an
extension whose volatile functions only draw random numbers. An aggregate is always called IMMUTABLE: the functions that it is
made of decide."""


def parse_functions(rows: Iterable[Sequence[Any]]) -> frozenset[str]:
    """The answer to FUNCTIONS as names that are reads: "schema.name", and "name" where that is so in every schema."""
    harmless: set[str] = set()
    harmful: set[str] = set()
    for schema, name, reads in rows:
        if reads:
            harmless.update((name, f"{schema}.{name}"))
        else:
            harmful.add(name)
    return frozenset(harmless - harmful)


def encrypted(query: dict[str, Any]) -> dict[str, Any]:
    """The query of a URL, with encryption unless the user says otherwise."""
    return {"sslmode": "require", **query}


def greet(connection: Any, ask: Ask) -> tuple[ServerId, Role]:
    """Which server a fresh connection has reached, in one round trip; a reader's is guarded. Raises Unsuitable."""
    usual = connection.autocommit
    connection.autocommit = True
    _, (row,) = ask(GREETING)
    connection.autocommit = usual
    return parse_identity(row)


def probe(ask: Ask, *, asynchronous_commits: bool) -> Server:
    """What a server says of itself, in one round trip. Raises Unsuitable."""
    _, (row,) = ask(PROBE)
    return parse_probe(row, asynchronous_commits=asynchronous_commits)


def parse_identity(row: Sequence[Any]) -> tuple[ServerId, Role]:
    """The answer to IDENTITY. Raises Unsuitable for a server that is too old."""
    version, cluster, address, port, started, in_recovery = row[:6]
    if version < OLDEST:
        raise Unsuitable(f"runs PostgreSQL {version // 10000}; version {OLDEST // 10000} or newer is needed")
    return ServerId(cluster, address, port, started), Role.READER if in_recovery else Role.WRITER


def parse_probe(row: Sequence[Any], *, asynchronous_commits: bool) -> Server:
    """The answer to PROBE. asynchronous_commits: some session is known to commit without waiting for the log.

    A commit is acknowledged once the log is written up to it, so `pg_current_wal_lsn()` covers it; an asynchronous one is
    acknowledged earlier, and only the insert position covers it.
    """
    identity, role = parse_identity(row)
    (
        synchronous,
        isolation,
        page,
        segment,
        written,
        inserted,
        timeline,
        replayed,
        received,
        control,
        tli,
        streaming,
        age,
    ) = row[6:]
    if role is Role.WRITER:
        if asynchronous_commits or synchronous == "off":
            lsn = end_of_record(parse_lsn(inserted), page, _bytes(segment))
        else:
            lsn = parse_lsn(written)
        epoch = int(timeline, 16)
        return Server(identity, role, epoch, WalPosition(epoch, lsn), None, isolation)
    epoch = max(control, tli or 0)
    position = WalPosition(epoch, parse_lsn(replayed)) if replayed else None
    lag = 0.0 if streaming and received is not None and received == replayed else (None if age is None else max(age, 0.0))
    return Server(identity, role, epoch, position, lag, isolation)


def sign(connection: Any, signature: str) -> str:
    """Write the row by which the transaction is to be found again; gives the schema of its table, as one writes it."""
    with connection.cursor() as cursor:
        cursor.execute(SIGN, {"id": signature})
        schema: str = cursor.fetchone()[0]
        return schema


def is_aborted(connection: Any) -> bool:
    """Whether the psycopg connection's transaction has failed, so that the server answers COMMIT with ROLLBACK, and no error."""
    return bool(connection.info.transaction_status.name == "INERROR")


def refuse_aborted(connection: Any) -> None:
    """Raise the driver's error for a transaction that has failed."""
    connection.execute("SELECT 1")


def is_missing_table(error: BaseException | None) -> bool:
    """Whether the driver's error says that a table does not exist."""
    return getattr(error, "sqlstate", None) == "42P01"


def is_future_xid(error: BaseException | None) -> bool:
    """Whether the driver's error to STATUS says that the xid has not been given out yet."""
    return getattr(error, "sqlstate", None) == "22023"


def parse_note(row: Sequence[Any], writer: Instance, topology: Topology) -> Note:
    """The answer to NOTE by the writer of this topology."""
    xid, inserted, recovered = row
    return Note(
        xid,
        WalPosition(writer.epoch, parse_lsn(inserted)),
        None if recovered is None else parse_lsn(recovered),
        next(iter(writer.servers)),
        # Those, too, that are held back after they were lost again and again: one of them may be promoted all the same.
        frozenset(s.server.id for instance in topology.instances for s in instance.seen if s.server.role is Role.READER),
    )


def parse_evidence(row: Sequence[Any], status: str | None) -> Evidence | None:
    """The answers to EVIDENCE and STATUS; None when the server is not the writer. Raises Unsuitable."""
    identity, role = parse_identity(row)
    timeline, recovered, followed = row[6:]
    if role is not Role.WRITER:
        return None
    return Evidence(identity, int(timeline, 16), None if recovered is None else parse_lsn(recovered), followed, status)


def _bytes(setting: str) -> int:
    """A size as PostgreSQL shows it: 16MB, 1GB."""
    units = {"kB": 1024, "MB": 1024**2, "GB": 1024**3}
    return int(setting[:-2]) * units[setting[-2:]] if setting[-2:] in units else int(setting)


def code(error: BaseException | None) -> str | None:
    """The SQLSTATE of a driver's error; None where the driver made the error itself, or was connecting."""
    sqlstate: str | None = getattr(error, "sqlstate", None)
    return sqlstate


_TRANSIENT = {"40001": Failure.SERIALIZATION, "40P01": Failure.DEADLOCK}
_REFUSED = frozenset({"28000", "28P01", "3D000", "42501", "0P000"})
_NOT_HERE = frozenset({"0A000", "55000"})
_DOWN = frozenset({"57P01", "57P02", "57P03", "57P05"})
_OVERTIME = frozenset({"25P03", "25P04"})  # idle in a transaction, or a transaction, for longer than its settings allow
_SOCKET_CLOSED = "connection socket closed"
"""psycopg's own words for a reset seen before the kernel lets anybody read it; the connection does not say that it is broken."""
_BROKEN = ("53100", "53200", "58", "XX")  # disk full, out of memory, system errors, internal errors


def failure(sqlstate: str | None, message: str, *, disconnected: bool) -> Failure:
    """What kind of failure a driver error stands for.

    sqlstate: None where the driver made the error itself. message: the server's or driver's words (never shown to anyone here).
    disconnected: the connection is unusable.
    """
    if sqlstate in _REFUSED:
        return Failure.REFUSED
    if sqlstate in _NOT_HERE:
        return Failure.NOT_HERE
    if sqlstate == "25006" or (sqlstate == "XX000" and "recovery" in message):
        return Failure.READ_ONLY  # XX000 "cannot assign TransactionIds during recovery" is a reader's, too
    if sqlstate in ("40001", "40P01") and "recovery" in message:
        return Failure.CONFLICT
    if sqlstate == "53300":
        return Failure.BUSY
    if sqlstate in _OVERTIME:
        return Failure.OVERTIME
    if disconnected or (sqlstate is not None and (sqlstate in _DOWN or sqlstate.startswith("08"))):
        return Failure.LOST
    if sqlstate is None and message == _SOCKET_CLOSED:
        return Failure.LOST
    if sqlstate is not None and sqlstate.startswith(_BROKEN):
        return Failure.BROKEN
    return _TRANSIENT.get(sqlstate or "", Failure.OTHER)


def is_from_connecting(error: BaseException) -> bool:
    """Whether the driver's error is one that is only met while connecting."""
    return getattr(error, "pgconn", None) is not None


_REFUSALS = (
    (r"password authentication failed|no password supplied", "check the user and the password"),
    (r'role "[^"]*" does not exist', "check the user"),
    (r'database "[^"]*" does not exist', "check the database name"),
    (r"no pg_hba.conf entry|pg_hba.conf rejects", "allow this host in pg_hba.conf or the security group"),
    (
        r"invalid response to SSL negotiation|expected authentication request",
        "no PostgreSQL server answers there",
    ),
    (
        r"server does not support SSL|certificate verify failed|root certificate file|does not match host name",
        "check sslmode and the certificates",
    ),
    (r"invalid connection option|invalid sslmode value", "check the URL's query and connect_args"),
    (
        r"permission denied for (function|view)",
        "let this user run the functions that tell a server's position",
    ),
)


def explain_refusal(sqlstate: str | None, message: str) -> tuple[Silence, str]:
    """A failed probe in words for the user, and whether trying again can help. libpq gives no SQLSTATE while connecting."""
    text = message.removeprefix("connection failed: ")
    for pattern, advice in _REFUSALS:
        if re.search(pattern, text):
            return Silence.MISCONFIGURED, f"{text}; {advice}"
    if sqlstate in _REFUSED:
        return Silence.MISCONFIGURED, text
    return Silence.REFUSED, text


MISTAKES = (("determine version", "rows must be tuples; leave row_factory out of connect_args"),)


def is_busy(sqlstate: str | None, message: str) -> bool:
    """Whether the server lives, but has no room for one more connection."""
    return sqlstate == "53300" or "too many clients" in message or "connection slots are reserved" in message


def fileno(connection: Any) -> int:
    """The number of the connection's socket."""
    number: int = connection.fileno()
    return number


def is_closed(connection: Any) -> bool:
    """Whether the connection has ended."""
    return bool(connection.closed or connection.broken)


def autocommit(connection: Any) -> bool:
    """Whether each statement is on its own."""
    return bool(connection.autocommit)


def guard(connection: Any, ask: Ask, on: bool) -> None:
    """Have an idle connection refuse writes outside of transactions, or accept them again."""
    connection.autocommit = True
    ask(GUARD if on else UNGUARD)


def set_mode(connection: Any, mode: Mode, default_autocommit: bool, guarded: bool) -> bool:
    """Switch an idle psycopg connection; only attributes change, nothing is sent."""
    connection.autocommit = default_autocommit if mode is Mode.DEFAULT else mode is Mode.AUTOCOMMIT
    connection.read_only = True if mode is Mode.READ_ONLY else None
    return True


def watch_connecting(dialect: Any, connecting: Callable[[int], AbstractContextManager[None]]) -> None:
    """Have a dialect's new connections wait for the server within `connecting(number of the socket)`, which may end the wait by
    shutting the socket. Where something has taken the place of psycopg's own connect(), to trace it, say, it is left alone.

    psycopg has no public way: the generator that connects yields the socket each time it must wait. One that took too long
    psycopg leaves to the garbage collector, with its socket: it is closed here.
    """
    import psycopg

    attempts = threading.local()

    class Connection(psycopg.Connection[Any]):
        @classmethod
        def connect(cls, *args: Any, **options: Any) -> Any:
            attempts.made = []
            try:
                return super().connect(*args, **options)
            finally:
                for attempt in attempts.made:
                    attempt.close()
                del attempts.made

        @classmethod
        def _connect_gen(cls, *args: Any, **options: Any) -> Any:
            attempt = cls._attempt(super()._connect_gen(*args, **options))
            attempts.made.append(attempt)
            return attempt

        @staticmethod
        def _attempt(steps: Any) -> Any:
            ready = None
            while True:
                try:
                    number, wanted = steps.send(ready)
                except StopIteration as end:
                    return end.value
                with connecting(number):
                    ready = yield number, wanted

    if dialect.loaded_dbapi.connect == psycopg.Connection.connect:
        dialect.connect = Connection.connect


def prepare(connection: Any) -> None:
    """Let server-side cursors of an autocommit connection outlive their statement (WITH HOLD), so that a streamed read needs
    no transaction."""
    connection.server_cursor_factory = _hold_cursor()


_hold: Any = None


def _hold_cursor() -> Any:
    global _hold
    if _hold is None:
        from psycopg import ServerCursor

        class HoldCursor(ServerCursor[Any]):
            def __init__(self, connection: Any, name: str, **options: Any) -> None:
                options["withhold"] = options.get("withhold") or connection.autocommit
                super().__init__(connection, name, **options)

        _hold = HoldCursor
    return _hold
