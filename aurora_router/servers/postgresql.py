"""PostgreSQL: the SQL that asks a server for its identity and state, and what its rows, error codes and messages mean."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any, Final

from aurora_router.core.commit_outcome import Evidence, Note
from aurora_router.core.failures import Failure
from aurora_router.core.instance import Instance, ProbeFailure, Role, ServerId, ServerStatus
from aurora_router.core.positions import WalPosition, end_of_record, parse_lsn
from aurora_router.core.query import Query
from aurora_router.core.topology import Topology
from aurora_router.servers.base import Execute, Identification, Pooler, UnsupportedServer

DIALECT = "postgresql"
DEFAULT_ISOLATION = "read committed"
BEYOND_READERS = frozenset({"serializable"})
HAS_XID_STATUS = True
PREPARED = "pg_prepared_xacts"
# Older versions have pg_control_checkpoint() and the other functions, too, but nothing below 12 is maintained or tested.
MIN_VERSION = 120000

# These statements run with the rights of the router's user. Others may be able to create objects of the same names in a schema
# of its search_path. So functions, operators and types are qualified with pg_catalog. IN is not used: it looks up an operator.
_EQUAL, _UNEQUAL, _BELOW, _MINUS = (f"OPERATOR(pg_catalog.{sign})" for sign in ("=", "<>", "<", "-"))
_IN_RECOVERY = "pg_catalog.pg_is_in_recovery()"

_IDENTITY = f"""
  pg_catalog.current_setting('server_version_num')::pg_catalog.int4,
  (SELECT system_identifier::pg_catalog.text FROM pg_catalog.pg_control_system()),
  pg_catalog.host(pg_catalog.inet_server_addr()), pg_catalog.inet_server_port(),
  extract(epoch FROM pg_catalog.pg_postmaster_start_time())::pg_catalog.text,
  {_IN_RECOVERY}"""  # noqa: S608 - constants

IDENTITY = "SELECT" + _IDENTITY

AT_READ_COMMITTED = "SET TRANSACTION ISOLATION LEVEL READ COMMITTED; "
"""Precedes a question that any server must answer. It is sent with the question, in one round trip, and leaves nothing on the
connection. A reader refuses every statement at SERIALIZABLE, which may be the default of the database or of the user."""

_KEPT = "coalesce(pg_catalog.current_setting('aurora_router.kept_{}', true), '')"
_KEPT_ACCESS, _KEPT_LEVEL = _KEPT.format("read_only"), _KEPT.format("isolation")
_REFUSING = f"""CASE WHEN pg_catalog.set_config('aurora_router.kept_read_only', CASE WHEN {_KEPT_ACCESS} {_EQUAL} ''
    THEN pg_catalog.current_setting('default_transaction_read_only') ELSE {_KEPT_ACCESS} END, false) IS NOT NULL
  THEN pg_catalog.set_config('default_transaction_read_only', 'on', false) END"""
_LOWERED = f"""CASE WHEN pg_catalog.current_setting('default_transaction_isolation') {_EQUAL} 'serializable'
  THEN pg_catalog.concat(pg_catalog.set_config('default_transaction_isolation', 'repeatable read', false),
    pg_catalog.set_config('aurora_router.kept_isolation', 'serializable', false)) END"""
SET_DEFAULT_READ_ONLY = f"{AT_READ_COMMITTED}SELECT {_REFUSING}, {_LOWERED}"
SET_DEFAULT_READ_WRITE = f"""{AT_READ_COMMITTED}RESET default_transaction_read_only;
SELECT CASE WHEN {_KEPT_ACCESS} {_UNEQUAL} ''
    THEN pg_catalog.set_config('default_transaction_read_only', {_KEPT_ACCESS}, false) END,
  CASE WHEN {_KEPT_LEVEL} {_UNEQUAL} '' AND pg_catalog.current_setting('default_transaction_isolation') {_EQUAL} 'repeatable read'
    THEN pg_catalog.set_config('default_transaction_isolation', {_KEPT_LEVEL}, false) END;
SELECT pg_catalog.set_config('aurora_router.kept_read_only', '', false),
  pg_catalog.set_config('aurora_router.kept_isolation', '', false)"""
"""The read-only default of a reader's connection, and its removal. Without it, a reader that is promoted in place would let a
unit in autocommit write. SET_DEFAULT_READ_ONLY also lowers a default level of SERIALIZABLE: a reader would refuse statements
although the unit has asked for a lower level. The connection keeps what was there before, because a listener of the application
may have set it."""
IDENTIFY = f"""{AT_READ_COMMITTED}{IDENTITY}, {{alone}},
  CASE WHEN {_IN_RECOVERY} AND {{alone}} THEN {_REFUSING} END,
  CASE WHEN {_IN_RECOVERY} AND {{alone}} THEN {_LOWERED} END"""
"""IDENTITY for a pooled connection, and whether the connection has a server process of its own. If so, the statement also sets a
reader's read-only default."""
_ALONE = {"session": "true", "transaction": "false"}
_OWN = "pg_catalog.pg_backend_pid() OPERATOR(pg_catalog.=) ({})"


def identify_sql(process: int, pooler: Pooler | None) -> str:
    """Return IDENTIFY with the test whether the connection has a server process of its own.

    process: the number of the server process, as the client got it at login. A pooler gives each client another number.
    pooler: the `pooler` setting. None: the server compares `process` with the number of its own process.
    """
    return IDENTIFY.format(alone=_OWN.format(process) if pooler is None else _ALONE[pooler])


_TIMELINE = (
    f"CASE WHEN {_IN_RECOVERY} THEN NULL "
    "ELSE pg_catalog.substr(pg_catalog.pg_walfile_name(pg_catalog.pg_current_wal_insert_lsn()), 1, 8) END"
)

PROBE = f"""{AT_READ_COMMITTED}{IDENTITY},
  pg_catalog.current_setting('synchronous_commit'),
  pg_catalog.current_setting('default_transaction_isolation'),
  pg_catalog.current_setting('wal_block_size')::pg_catalog.int4,
  pg_catalog.current_setting('wal_segment_size'),
  CASE WHEN {_IN_RECOVERY} THEN NULL ELSE pg_catalog.pg_current_wal_lsn()::pg_catalog.text END,
  CASE WHEN {_IN_RECOVERY} THEN NULL ELSE pg_catalog.pg_current_wal_insert_lsn()::pg_catalog.text END,
  {_TIMELINE},
  pg_catalog.pg_last_wal_replay_lsn()::pg_catalog.text,
  pg_catalog.pg_last_wal_receive_lsn()::pg_catalog.text,
  (SELECT greatest(c.timeline_id, r.min_recovery_end_timeline)
     FROM pg_catalog.pg_control_checkpoint() c, pg_catalog.pg_control_recovery() r),
  (SELECT received_tli FROM pg_catalog.pg_stat_wal_receiver),
  EXISTS (SELECT FROM pg_catalog.pg_stat_wal_receiver),
  extract(epoch FROM pg_catalog.clock_timestamp() {_MINUS} pg_catalog.pg_last_xact_replay_timestamp())::pg_catalog.float8"""  # noqa: S608 - constants
"""Everything that an observation needs, in one round trip. received_tli needs pg_monitor (or pg_read_all_stats). Without it a
reader's epoch is only known from its last restart point, so after a promotion the reader serves again only minutes later."""

NOTE = """\
SELECT pg_catalog.txid_current(), pg_catalog.pg_logical_emit_message(true, 'aurora_router', '')::pg_catalog.text,
  pg_catalog.pg_last_wal_replay_lsn()::pg_catalog.text"""
"""The facts that are noted of a transaction before its COMMIT. They need no privilege. The message writes a record of the
transaction into the log, and returns the position right behind that record. NOTIFY, temporary and unlogged tables write no
record before COMMIT. Without a record, a reader that has replayed up to the noted position might not know that the xid is
taken."""

EVIDENCE = f"""{IDENTITY},
  {_TIMELINE},
  pg_catalog.pg_last_wal_replay_lsn()::pg_catalog.text,
  pg_catalog.pg_last_xact_replay_timestamp() IS NOT NULL"""
STATUS = "SELECT pg_catalog.txid_status(%(xid)s::pg_catalog.int8)"
"""EVIDENCE is a server's report about itself, STATUS is its report about a noted transaction. Only a reader keeps the time of its
last replay. So a promoted server has that time, and a server that recovered from a crash has none. STATUS fails if the xid has
not been assigned yet."""

SYNC_BARRIER = "SELECT pg_catalog.pg_logical_emit_message(true, 'aurora_router', '')"
"""A record in the log that changes nothing. Its COMMIT waits for synchronous readers, unlike a COMMIT without a record."""

END_IDLE = f"""
SELECT pg_catalog.pg_terminate_backend(pid) FROM pg_catalog.pg_stat_activity
 WHERE backend_xid::pg_catalog.text::pg_catalog.int8 {_EQUAL} (%(xid)s::pg_catalog.int8 OPERATOR(pg_catalog.&) 4294967295)
   AND state {_EQUAL} 'idle in transaction'"""  # noqa: S608 - constants
"""Ends a transaction whose COMMIT was lost on its way. The transaction holds its locks until the server notices."""

COMMIT_TABLE = "aurora_router_commits"
CREATE_COMMIT_TABLE = (
    f"CREATE TABLE IF NOT EXISTS {COMMIT_TABLE} ("
    "id pg_catalog.uuid PRIMARY KEY, committed pg_catalog.bool NOT NULL DEFAULT true, "
    "at pg_catalog.timestamptz NOT NULL DEFAULT pg_catalog.clock_timestamp())",
    f"CREATE INDEX IF NOT EXISTS {COMMIT_TABLE}_at ON {COMMIT_TABLE} (at)",
)
_FLAWS = f"""WHEN c.relkind {_UNEQUAL} 'r' THEN 'it is no ordinary table'
    WHEN c.relpersistence {_UNEQUAL} 'p' THEN 'it is unlogged or temporary, so a promoted reader does not have its rows'
    WHEN c.relhasrules OR EXISTS (SELECT FROM pg_catalog.pg_trigger t WHERE t.tgrelid {_EQUAL} c.oid AND NOT t.tgisinternal)
      THEN 'it has triggers or rules, which may change its rows'"""
"""What keeps the rows of a table `c` from proving anything."""
COMMIT_TABLE_FLAW = f"""
SELECT CASE {_FLAWS}
    WHEN pg_catalog.pg_has_role(c.relowner, 'MEMBER') OR c.relowner {_EQUAL} n.nspowner
      OR c.relowner {_EQUAL} (SELECT datdba FROM pg_catalog.pg_database WHERE datname {_EQUAL} pg_catalog.current_database())
      OR (SELECT rolsuper FROM pg_catalog.pg_roles WHERE oid {_EQUAL} c.relowner) THEN ''
    ELSE 'it belongs to the role ' OPERATOR(pg_catalog.||) pg_catalog.pg_get_userbyid(c.relowner)::pg_catalog.text
      OPERATOR(pg_catalog.||) ', whose code would run with the rights of this user; let the owner of the schema have it' END
  FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid {_EQUAL} c.relnamespace
 WHERE c.oid {_EQUAL} pg_catalog.to_regclass('{COMMIT_TABLE}')"""  # noqa: S608 - constants
"""Asked before the table is created, because only the owner may run CREATE INDEX IF NOT EXISTS, even if the index exists."""
COMMIT_ROW = f"""
INSERT INTO {COMMIT_TABLE} (id, at) VALUES (%(id)s, pg_catalog.clock_timestamp())
RETURNING (SELECT relnamespace::pg_catalog.regnamespace::pg_catalog.text
             FROM pg_catalog.pg_class WHERE oid {_EQUAL} {COMMIT_TABLE}.tableoid)"""  # noqa: S608
"""Written in the transaction that is to be found again. The transaction may be old by now, so the row has the clock's time.
Returns the schema of the table, because the transaction may have a search_path of its own."""
LOOKUP_SETTINGS = """
SELECT pg_catalog.set_config('search_path', %(schema)s, true), pg_catalog.set_config('lock_timeout', '1s', true)"""
"""Precedes FENCE and COMMIT_ROW_EVIDENCE in their transactions."""
FENCE = f"INSERT INTO {COMMIT_TABLE} (id, committed) VALUES (%(id)s, false) ON CONFLICT DO NOTHING"  # noqa: S608 - a constant
"""Waits for a running transaction with this id, and keeps a later one from committing."""
COMMIT_ROW_EVIDENCE = f"""
SELECT committed, (SELECT CASE {_FLAWS} ELSE '' END FROM pg_catalog.pg_class c WHERE c.oid {_EQUAL} {COMMIT_TABLE}.tableoid)
  FROM {COMMIT_TABLE} WHERE id {_EQUAL} %(id)s::pg_catalog.uuid"""  # noqa: S608 - constants
RETENTION_SECONDS = 3600
PRUNE_BATCH = 2000  # rows per DELETE, which must not outlast a probe
PRUNE = f"""
DELETE FROM {COMMIT_TABLE} WHERE id {_EQUAL} ANY (
  SELECT id FROM {COMMIT_TABLE} WHERE at {_BELOW} (pg_catalog.now() {_MINUS} interval '{RETENTION_SECONDS} s')
   ORDER BY at LIMIT {PRUNE_BATCH} FOR UPDATE SKIP LOCKED)"""  # noqa: S608

FUNCTIONS = f"""{AT_READ_COMMITTED}
SELECT n.nspname, p.proname,
       pg_catalog.bool_and((p.provolatile {_UNEQUAL} 'v'
         OR coalesce(e.extname {_EQUAL} ANY (ARRAY['pgcrypto', 'uuid-ossp']::pg_catalog.name[]), false)) AND NOT EXISTS (
         SELECT FROM pg_catalog.pg_aggregate a JOIN pg_catalog.pg_proc f
             ON f.provolatile {_EQUAL} 'v' AND f.oid {_EQUAL} ANY (ARRAY[
               a.aggtransfn, a.aggfinalfn, a.aggcombinefn, a.aggserialfn, a.aggdeserialfn,
               a.aggmtransfn, a.aggminvtransfn, a.aggmfinalfn]::pg_catalog.oid[])
          WHERE a.aggfnoid {_EQUAL} p.oid))
  FROM pg_catalog.pg_proc p
  JOIN pg_catalog.pg_namespace n ON n.oid {_EQUAL} p.pronamespace
  LEFT JOIN pg_catalog.pg_depend d
    ON d.classid {_EQUAL} 'pg_catalog.pg_proc'::pg_catalog.regclass AND d.objid {_EQUAL} p.oid AND d.deptype {_EQUAL} 'e'
   AND d.refclassid {_EQUAL} 'pg_catalog.pg_extension'::pg_catalog.regclass
  LEFT JOIN pg_catalog.pg_extension e ON e.oid {_EQUAL} d.refobjid
 WHERE n.nspname {_UNEQUAL} ALL (ARRAY['pg_catalog', 'information_schema', 'pg_toast']::pg_catalog.name[])
   AND p.prokind {_UNEQUAL} 'p'
 GROUP BY n.nspname, p.proname"""  # noqa: S608 - constants
"""User functions, and whether the database declares that they do not write. That holds if every overload is STABLE or IMMUTABLE,
or of an extension whose volatile functions only draw random numbers. An aggregate is always declared IMMUTABLE, so its support
functions decide."""


def recognizes(row: Sequence[Any]) -> bool:
    """Return whether the server calls itself PostgreSQL."""
    return str(row[0]).startswith("PostgreSQL ")


def dialect(server: ServerId) -> str:
    """Return the dialect, which is the same for all servers."""
    return DIALECT


LITERALS = "SHOW standard_conforming_strings"
UNUSABLE: frozenset[str] = frozenset()


def parse_functions(rows: Iterable[Sequence[Any]]) -> frozenset[str]:
    """Return the names of the functions that only read, from the answer to FUNCTIONS.

    A name is "schema.name", and also "name" if the function only reads in every schema.
    """
    harmless: set[str] = set()
    harmful: set[str] = set()
    for schema, name, reads in rows:
        if reads:
            harmless.update((name, f"{schema}.{name}"))
        else:
            harmful.add(name)
    return frozenset(harmless - harmful)


def omissions(query: Query) -> str:
    """Return "", because readers have the whole log."""
    return ""


def identify(query: Query, process: int, pooler: Pooler | None) -> Identification:
    """Find out which server a fresh connection has reached, in one round trip.

    Make a reader's connection refuse writes, unless a pooler shares it.

    Raises UnsupportedServer.
    """
    _, (row,) = query(identify_sql(process, pooler))
    return Identification(*parse_identity(row), shared=not row[6])


def probe(query: Query, *, asynchronous_commits: bool) -> ServerStatus:
    """Return a server's report of its state, in one round trip.

    Raises UnsupportedServer.
    """
    _, (row,) = query(PROBE)
    return parse_probe(row, asynchronous_commits=asynchronous_commits)


def parse_identity(row: Sequence[Any]) -> tuple[ServerId, Role]:
    """Parse the answer to IDENTITY.

    Raises UnsupportedServer for a server that is too old.
    """
    version, cluster, address, port, started, in_recovery = row[:6]
    if version < MIN_VERSION:
        raise UnsupportedServer(f"runs PostgreSQL {version // 10000}; version {MIN_VERSION // 10000} or newer is needed")
    return ServerId(cluster, address, port, started), Role.READER if in_recovery else Role.WRITER


def parse_probe(row: Sequence[Any], *, asynchronous_commits: bool) -> ServerStatus:
    """Parse the answer to PROBE.

    A commit is acknowledged once the log is written up to it, so `pg_current_wal_lsn()` covers it. An asynchronous commit is
    acknowledged earlier, and only the insert position covers it.

    asynchronous_commits: whether some session is known to commit without waiting for the log.
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
        return ServerStatus(identity, role, epoch, WalPosition(epoch, lsn), None, isolation)
    epoch = max(control, tli or 0)
    position = WalPosition(epoch, parse_lsn(replayed)) if replayed else None
    lag = 0.0 if streaming and received is not None and received == replayed else (None if age is None else max(age, 0.0))
    return ServerStatus(identity, role, epoch, position, lag, isolation)


def insert_commit_row(execute: Execute, signature: str, database: str | None, declared_read_only: bool) -> str | None:
    """Write the row by which the transaction is found again, and return the schema of its table, quoted as in SQL.

    Return None, and write nothing, if the transaction is read-only: the server's refusal would abort it. The server is asked,
    because a statement may have made a transaction writable that began as read-only.
    """
    if declared_read_only and execute("SHOW transaction_read_only", None) == ("on",):
        return None
    row = execute(COMMIT_ROW, {"id": signature})
    assert row is not None
    return str(row[0])


def is_read_only(code: str | None) -> bool:
    """Return False, because `insert_commit_row` asks before it writes."""
    return False


def is_locked_out(code: str | None) -> bool:
    """Return False, because locks on some tables do not keep a transaction from using others."""
    return False


def is_missing_table(code: str | None) -> bool:
    """Return whether the code of an error says that a table does not exist."""
    return code == "42P01"


def is_future_xid(code: str | None) -> bool:
    """Return whether the code of an error of STATUS says that the xid has not been assigned yet."""
    return code == "22023"


def parse_note(row: Sequence[Any], writer: Instance, topology: Topology) -> Note:
    """Parse the answer of the topology's writer to NOTE."""
    xid, noted, recovered = row
    return Note(
        xid,
        WalPosition(writer.epoch, parse_lsn(noted)),
        None if recovered is None else parse_lsn(recovered),
        next(iter(writer.servers)),
        # This includes readers held back because they were lost again and again: one of them may still be promoted.
        frozenset(s.server.id for instance in topology.instances for s in instance.tracked if s.server.role is Role.READER),
    )


def parse_evidence(row: Sequence[Any], status: str | None) -> Evidence | None:
    """Parse the answers to EVIDENCE and STATUS. Return None if the server is not the writer.

    Raises UnsupportedServer.
    """
    identity, role = parse_identity(row)
    timeline, recovered, followed = row[6:]
    if role is not Role.WRITER:
        return None
    return Evidence(identity, int(timeline, 16), None if recovered is None else parse_lsn(recovered), followed, status)


def _bytes(setting: str) -> int:
    """The number of bytes of a size as PostgreSQL shows it, for example 16MB."""
    units = {"kB": 1024, "MB": 1024**2, "GB": 1024**3}
    return int(setting[:-2]) * units[setting[-2:]] if setting[-2:] in units else int(setting)


_REFUSED = ("28000", "28P01", "3D000", "42501", "0P000")
# PgBouncer fails the clients of a server that it could not log in to. Without these words the server may only be down.
_POOLER_IS_REFUSED = r"server login has been failing.*(authentication failed|does not exist|pg_hba\.conf)"
ERROR_ENDS_TRANSACTION = True
KILLED: Final = frozenset({"57P01"})  # also sent at a shutdown
CRASHED: Final = frozenset({"57P02"})
CONNECTING: frozenset[str] = frozenset()  # the error itself shows it
ENDED = "somebody has ended it (pg_terminate_backend), or its process has crashed: see the server's log"
# The server's words, or the name of the server's function that raises the error. The words may be in another language, the
# name is not. Version 15 and older raise the error in ProcessInterrupts, which raises nothing else with these codes.
_RECOVERY_CONFLICT = "conflict with recovery|RecoveryConflict|ProcessInterrupts"
_FAILURES: Final = (
    (_REFUSED, "", Failure.REFUSED),
    (("08P01",), _POOLER_IS_REFUSED, Failure.REFUSED),
    # The table of a prepared statement was changed. Or SERIALIZABLE is only the connection's default level on a reader. (If the
    # unit has asked for that level, another function of the server refuses it.)
    (("0A000",), "RevalidateCachedQuery|GetSerializableTransactionSnapshot", Failure.OUTDATED),
    # A type was dropped and made anew, and the prepared statement still has the number of the old one. If a PL/pgSQL function
    # has that number, preparing the statement again does not help.
    (("42704",), "lookup_type_cache", Failure.OUTDATED),
    (("XX000",), r"cache lookup failed for type (?s:(?!.*PL/pgSQL))", Failure.OUTDATED),
    # The type of a column has changed, and a PL/pgSQL function has kept a plan for the old one.
    (("42804",), "plpgsql_param_eval|ExecEvalParam", Failure.OUTDATED),
    # Constraints, WITH CHECK OPTION, and errors raised in PL/pgSQL, for example by triggers that check something.
    (("23", "44", "P0"), "", Failure.CONSTRAINT),
    # The reader has not filled a materialized view yet. Another reader may have.
    (("55000",), "ExecOpenScanRelation", Failure.CONFLICT),
    (("0A000", "55000"), "", Failure.NOT_HERE),
    # An object or a value of an enum that does not exist. A reader has it once it has replayed the migration.
    (("42P01", "42703", "42883", "42704", "3F000"), "", Failure.MISSING),
    (("22P02",), "enum_in", Failure.MISSING),
    (("25006",), "", Failure.READ_ONLY),
    # A reader also says "cannot assign TransactionIds during recovery".
    (("XX000",), "recovery", Failure.READ_ONLY),
    (("40001", "40P01"), _RECOVERY_CONFLICT, Failure.CONFLICT),
    (("53300",), "", Failure.BUSY),
    # A transaction, or its idle time, has lasted longer than its settings allow.
    (("25P03", "25P04"), "", Failure.OVERTIME),
)
"""Beginnings of codes, a pattern of the server's words, and the failure. The first row that fits counts."""
_FAILURES_IF_CONNECTED: Final = (
    (("57P01", "57P02", "57P03", "57P05", "08"), "", Failure.LOST),
    (("53100", "53200", "58", "XX"), "", Failure.BROKEN),  # disk full, out of memory, system errors, internal errors
    (("40001",), "", Failure.SERIALIZATION),
    (("40P01",), "", Failure.DEADLOCK),
)
"""Further rows, for errors that fit none of the rows above and have left the connection usable."""


_CLASSES = re.compile("0[0-389ABFLPZ]|10|2[0-8BDF]|3[489BDF]|4[024]|5[34578]|72|F0|HV|P0|XX")
"""The classes of the server's own codes. Others are of triggers that check something: RAISE may set any ERRCODE."""


def failure(sqlstate: str | None, message: str, *, disconnected: bool) -> Failure:
    """Return the kind of failure that a driver's error stands for.

    sqlstate: None if the driver made the error itself.
    message: the server's words, which are matched but never shown.
    disconnected: the connection is unusable.
    """
    code = sqlstate or ""
    rows = _FAILURES if disconnected else _FAILURES + _FAILURES_IF_CONNECTED
    fits = (kind for codes, words, kind in rows if code.startswith(codes) and re.search(words, message))
    if disconnected:
        return next(fits, Failure.LOST)
    return next(fits, Failure.CONSTRAINT if code and not _CLASSES.match(code) else Failure.OTHER)


_ADVICE = (
    ("28P01", "", "check the user and the password"),
    ("28000", 'role "|no such user', "check the user"),
    ("28000", r"pg_hba\.conf", "allow this host in pg_hba.conf or the security group"),
    ("3D000", "", "check the database name"),
    ("42501", "permission denied for database", "let this user connect to the database"),
    ("42501", r"permission denied for (function|view)", "let this user run the functions that tell a server's position"),
    ("08P01", _POOLER_IS_REFUSED, "check the user and the password with which the pooler logs in"),
)
"""What to do about a refusal: its code, a pattern of its words, and the advice."""
_MISTAKES = ("0A", "22", "34", "3B", "3F", "42", "25006", "25P01")
"""Beginnings of codes. The server lacks something that a probe needs, or a listener of the application has made a mistake."""


def explain_refusal(sqlstate: str | None, message: str) -> tuple[ProbeFailure, str]:
    """Return the kind of a failed probe, which says whether a retry can help, and words for the user."""
    if sqlstate is not None and (sqlstate.startswith((*_REFUSED, *_MISTAKES)) or re.search(_POOLER_IS_REFUSED, message)):
        advice = next((advice for code, words, advice in _ADVICE if code == sqlstate and re.search(words, message)), "")
        return ProbeFailure.MISCONFIGURED, f"{message}; {advice}" if advice else message
    return ProbeFailure.NOT_NOW if sqlstate == "57P03" else ProbeFailure.REFUSED, message


def is_busy(sqlstate: str | None, message: str) -> bool:
    """Return whether the server, or a pooler in front of it, is alive but has no room for one more connection."""
    return sqlstate == "53300" or "query_wait_timeout" in message


def may_have_rolled_back(sqlstate: str | None) -> bool:
    """Return False, because the server keeps a failed transaction until the client ends it."""
    return False


def has_rolled_back(sqlstate: str | None, query: Query) -> bool:
    """Return False; see `may_have_rolled_back`."""
    return False


def has_left_writes(query: Query) -> bool:
    """Return False, because all tables are transactional."""
    return False
