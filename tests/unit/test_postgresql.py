"""The rows, error codes and words of PostgreSQL as the router reads them."""

import contextlib
import os
import socket
import threading
import types
from collections.abc import Iterator

import pytest
from psycopg import Connection, IsolationLevel, OperationalError, ServerCursor, pq
from sqlalchemy import create_engine, make_url

from aurora_router.core.failures import Failure, Phase
from aurora_router.core.instance import Role, Server, ServerId, Silence
from aurora_router.core.positions import WalPosition
from aurora_router.drivers import Mode
from aurora_router.drivers import psycopg as psycopg_driver
from aurora_router.drivers import pymysql as pymysql_driver
from aurora_router.drivers.psycopg import set_mode
from aurora_router.error_classification import failure_of
from aurora_router.mistakes import probe_error
from aurora_router.servers import postgresql
from aurora_router.servers.postgresql import (
    Unsuitable,
    parse_functions,
    parse_identity,
    parse_probe,
)

STARTED = "1772600767.000089"
ID = ServerId("7001", "10.0.0.1", 5432, STARTED)
IDENTITY = (160004, "7001", "10.0.0.1", 5432, STARTED)


def writer_row(*, synchronous="on", written="0/5000", inserted="0/6000", page=8192, segment="16MB", timeline="0000000A"):
    return (*IDENTITY, False, synchronous, "read committed", page, segment, written, inserted, timeline,
            None, None, 10, None, False, None)  # fmt: skip


def reader_row(*, replayed="0/5000", received="0/5000", control=1, tli=1, streaming=True, age=0.25):
    return (*IDENTITY, True, "on", "repeatable read", 8192, "16MB", None, None, None,
            replayed, received, control, tli, streaming, age)  # fmt: skip


def test_an_identity_is_the_cluster_the_address_and_the_start():
    assert parse_identity((*IDENTITY, False)) == (ID, Role.WRITER)
    assert parse_identity((*IDENTITY, True)) == (ID, Role.READER)


def test_a_unix_socket_has_no_address_and_a_start_may_be_text():
    """A server on a Unix socket has no address, and its start may come as text."""
    row = (120000, "7001", None, None, "2026-03-04 05:06:07", True)
    assert parse_identity(row) == (ServerId("7001", None, None, "2026-03-04 05:06:07"), Role.READER)


def test_a_server_older_than_12_is_unsuitable():
    """A server older than version 12 is unsuitable, and the error says what is needed."""
    with pytest.raises(Unsuitable, match="runs PostgreSQL 11; version 12 or newer is needed"):
        parse_identity((110022, *IDENTITY[1:], False))
    with pytest.raises(Unsuitable):
        parse_probe((110022, *writer_row()[1:]), asynchronous_commits=False)


def test_a_writers_position_is_hexadecimal_on_its_timeline():
    """A writer's position is its write position on its timeline, both read as hexadecimal."""
    found = parse_probe(writer_row(), asynchronous_commits=False)
    assert found == Server(ID, Role.WRITER, 10, WalPosition(10, 0x5000), None, "read committed")


@pytest.mark.parametrize(("synchronous", "elsewhere"), [("off", False), ("on", True), ("off", True)])
def test_asynchronous_commits_count_the_insert_position(synchronous, elsewhere):
    """A writer's position is its insert position if commits are asynchronous anywhere."""
    found = parse_probe(writer_row(synchronous=synchronous), asynchronous_commits=elsewhere)
    assert found.position == WalPosition(10, 0x6000)


@pytest.mark.parametrize(
    ("inserted", "page", "segment", "lsn"),
    [
        ("0/4018", 8192, "16MB", 0x4000),
        ("0/2000028", 8192, "16MB", 0x2000000),
        ("1/40000028", 8192, "1GB", 0x140000000),
        ("0/2000028", 8192, "33554432", 0x2000000),
        ("0/1018", 4096, "1024kB", 0x1000),
    ],
)
def test_an_insert_position_after_a_header_is_moved_back(inserted, page, segment, lsn):
    """An insert position right after a header counts as the end of the last record."""
    row = writer_row(inserted=inserted, page=page, segment=segment)
    assert parse_probe(row, asynchronous_commits=True).position == WalPosition(10, lsn)


def test_a_caught_up_reader_has_no_lag_after_idle_time():
    """A reader that has replayed all it received has no lag, however old the last commit is."""
    found = parse_probe(reader_row(age=3600.0), asynchronous_commits=False)
    assert found == Server(ID, Role.READER, 1, WalPosition(1, 0x5000), 0.0, "repeatable read")


@pytest.mark.parametrize(
    ("row", "lag"),
    [
        (reader_row(replayed="0/4000", age=1.5), 1.5),
        (reader_row(streaming=False, age=1.5), 1.5),
        (reader_row(replayed="0/4000", age=-0.1), 0.0),
        (reader_row(replayed="0/4000", age=None), None),
        (reader_row(replayed=None, received=None, age=None), None),
    ],
)
def test_a_late_readers_lag_is_the_age_of_its_last_commit(row, lag):
    """The lag of a reader that is behind is the age of the last commit that it replayed."""
    assert parse_probe(row, asynchronous_commits=False).lag == lag


@pytest.mark.parametrize(("control", "tli", "epoch"), [(1, 2, 2), (2, 1, 2), (3, None, 3), (1, 1, 1)])
def test_a_reader_is_on_the_newest_timeline_that_it_knows_of(control, tli, epoch):
    found = parse_probe(reader_row(control=control, tli=tli), asynchronous_commits=False)
    assert found.epoch == epoch
    assert found.position == WalPosition(epoch, 0x5000)


def test_a_reader_that_has_replayed_nothing_has_no_position():
    assert parse_probe(reader_row(replayed=None), asynchronous_commits=False).position is None


def test_a_function_is_a_read_if_it_is_one_in_every_schema():
    """A function counts as a read by its bare name if it is one in every schema."""
    rows = [("public", "f", True), ("shop", "f", True), ("public", "g", True), ("shop", "g", False), ("shop", "h", False)]
    assert parse_functions(rows) == {"f", "public.f", "shop.f", "public.g"}
    assert parse_functions([]) == frozenset()


@pytest.mark.parametrize(
    ("sqlstate", "message", "disconnected", "kind"),
    [
        ("28P01", "password authentication failed", True, Failure.REFUSED),
        ("3D000", "database does not exist", True, Failure.REFUSED),
        ("42501", "permission denied", False, Failure.REFUSED),
        ("25006", "cannot execute INSERT in a read-only transaction", False, Failure.READ_ONLY),
        ("42P01", 'relation "new" does not exist', False, Failure.MISSING),
        ("42703", 'column "new" does not exist', False, Failure.MISSING),
        ("22P02", 'invalid input value for enum mood: "new" (enum_in)', False, Failure.MISSING),
        ("22P02", 'invalid input syntax for type integer: "x" (pg_strtoint32_safe)', False, Failure.OTHER),
        ("0A000", "not supported", False, Failure.NOT_HERE),
        ("0A000", "gecachter Plan darf den Ergebnistyp nicht aendern (RevalidateCachedQuery)", False, Failure.OUTDATED),
        ("0A000", "cannot use serializable mode (GetSerializableTransactionSnapshot)", False, Failure.OUTDATED),
        ("0A000", "cannot use serializable mode (check_transaction_isolation)", False, Failure.NOT_HERE),
        ("26000", 'prepared statement "_pg3_7" does not exist', False, Failure.OUTDATED),
        ("42P05", 'prepared statement "_pg3_0" already exists', False, Failure.OUTDATED),
        ("XX000", "cache lookup failed for type 16437\nCONTEXT: ... (getTypeInputInfo)", False, Failure.OUTDATED),
        ("XX000", "cache lookup failed for type 16437 (TupleDescInitEntry)", False, Failure.OUTDATED),
        ("XX000", "cache lookup failed for type 16437\nCONTEXT: PL/pgSQL function f()", False, Failure.BROKEN),
        ("42704", "Typ mit OID 16432 existiert nicht (lookup_type_cache)", False, Failure.OUTDATED),
        ("42704", 'type "kind" does not exist (typenameType)', False, Failure.MISSING),
        ("26000", 'prepared statement "mine" does not exist', False, Failure.OTHER),
        ("55000", "recovery is in progress", False, Failure.NOT_HERE),
        ("55000", 'materialized view "mv" has not been populated (ExecOpenScanRelation)', False, Failure.CONFLICT),
        ("XX000", "cannot assign TransactionIds during recovery", False, Failure.READ_ONLY),
        ("XX000", "something else", False, Failure.BROKEN),
        ("XX001", "invalid page in block 0", False, Failure.BROKEN),
        ("58030", "could not read file", False, Failure.BROKEN),
        ("53100", "could not extend file: No space left on device", False, Failure.BROKEN),
        ("53200", "out of memory", False, Failure.BROKEN),
        ("53300", "sorry, too many clients already", True, Failure.BUSY),
        ("40001", "canceling statement due to conflict with recovery", False, Failure.CONFLICT),
        ("40P01", "canceling statement due to conflict with recovery: deadlock", False, Failure.CONFLICT),
        ("40001", "Anweisung wird storniert (ProcessRecoveryConflictInterrupt)", False, Failure.CONFLICT),
        ("40001", "Anweisung wird storniert (ProcessInterrupts)", False, Failure.CONFLICT),
        ("40P01", "Anweisung wird storniert (CheckRecoveryConflictDeadlock)", False, Failure.CONFLICT),
        ("40001", "konnte Zugriff nicht serialisieren (heapam_tuple_lock)", False, Failure.SERIALIZATION),
        ("40P01", "Verklemmung (Deadlock) entdeckt (DeadLockReport)", False, Failure.DEADLOCK),
        ("40001", "could not serialize access", False, Failure.SERIALIZATION),
        ("40P01", "deadlock detected", False, Failure.DEADLOCK),
        ("57P02", "terminating connection because of crash of another server process", False, Failure.LOST),
        ("57P03", "the database system is starting up", True, Failure.LOST),
        ("57P01", "terminating connection due to administrator command", False, Failure.LOST),
        ("25P03", "terminating connection due to idle-in-transaction timeout", True, Failure.OVERTIME),
        ("25P04", "terminating connection due to transaction timeout", True, Failure.OVERTIME),
        (None, "connection socket closed", False, Failure.LOST),
        ("08006", "connection failure", False, Failure.LOST),
        (None, "server closed the connection unexpectedly", True, Failure.LOST),
        (None, "consuming input failed", False, Failure.OTHER),
        ("23505", "duplicate key", False, Failure.CONSTRAINT),
        ("23503", "violates foreign key constraint", False, Failure.CONSTRAINT),
        ("23001", "violates RESTRICT setting", False, Failure.CONSTRAINT),
        ("23502", "null value", False, Failure.CONSTRAINT),
        ("44000", "new row violates check option", False, Failure.CONSTRAINT),
        ("P0001", "a trigger's own words", False, Failure.CONSTRAINT),
        ("42601", "syntax error", False, Failure.OTHER),
    ],
)
def test_driver_errors_stand_for_the_failure_that_they_are(sqlstate, message, disconnected, kind):
    assert failure_of(refused(sqlstate, message), disconnected=disconnected) is kind


def refused(sqlstate, message):
    """An error of psycopg with that SQLSTATE, or, if that is None, as libpq makes one while connecting."""

    class Refused(OperationalError):
        pgconn = None if sqlstate else types.SimpleNamespace(used_password=False)

    error = Refused(message)
    error.sqlstate = sqlstate
    return error


@pytest.mark.parametrize(
    ("sqlstate", "message", "silence", "advice"),
    [
        (None, 'connection failed: FATAL:  password authentication failed for user "app"', "misconfigured", "check the user"),
        (None, "connection failed: fe_sendauth: no password supplied", "misconfigured", "check the user and the password"),
        (None, 'FATAL:  role "app" does not exist', "misconfigured", "check the user"),
        (None, 'FATAL:  database "shop" does not exist', "misconfigured", "check the database name"),
        (None, 'FATAL:  no pg_hba.conf entry for host "10.0.0.9"', "misconfigured", "pg_hba.conf"),
        (None, "received invalid response to SSL negotiation: H", "misconfigured", "no PostgreSQL server answers there"),
        (None, "server does not support SSL, but SSL was required", "misconfigured", "sslmode"),
        (None, 'server certificate for "a" does not match host name "b"', "misconfigured", "check sslmode and the certificates"),
        (None, 'invalid connection option "ssl_mode"', "misconfigured", "check the URL's query and connect_args"),
        (None, 'invalid sslmode value: "on"', "misconfigured", "check the URL's query and connect_args"),
        (None, "FATAL:  -c a requires a value", "misconfigured", "check the URL's query and connect_args"),
        (None, 'connection is bad: weak sslmode "..." may not be used', "misconfigured", "check the URL's query"),
        ("08P01", "transaction blocks not allowed in statement pooling mode", "misconfigured", "pool_mode=statement"),
        (None, "connection to server failed: channel binding required, but", "misconfigured", "check the URL's query"),
        (None, "connection is bad: connection to server failed: No route to host", "refused", "No route"),
        (None, "connection is bad: could not create socket: Too many open files", "refused", "Too many"),
        ("42501", "permission denied for function pg_control_system", "misconfigured", "let this user run"),
        ("0P000", "some role", "misconfigured", "some role"),
        ("0A000", "Function pg_last_wal_receive_lsn() is not supported for Aurora", "misconfigured", "not supported for Aurora"),
        ("42883", "function pg_control_system() does not exist", "misconfigured", "does not exist"),
        (None, "connection failed: connection to server failed: Connection refused", "refused", "Connection refused"),
        ("57P03", "the database system is starting up", "not now", "starting up"),
        (None, "connection failed: FATAL:  the database system is in recovery mode", "not now", "recovery mode"),
    ],
)
def test_a_refused_probe_says_what_to_do_and_if_retry_helps(sqlstate, message, silence, advice):
    """The message of a refused probe says what to do, and its kind says whether trying again can help."""
    found = probe_error(refused(sqlstate, message), psycopg_driver, postgresql)
    assert found.silence is Silence(silence)
    assert advice in str(found)
    assert not str(found).startswith("connection failed: ")


@pytest.mark.parametrize(
    ("sqlstate", "message", "busy"),
    [
        ("53300", "", True),
        (None, "FATAL:  sorry, too many clients already", True),
        (None, "FATAL:  remaining connection slots are reserved for roles", True),
        ("08P01", "query_wait_timeout", True),
        (None, "FATAL:  no more connections allowed (max_client_conn)", True),
        (None, "Connection refused", False),
        ("57P03", "the database system is starting up", False),
    ],
)
def test_a_server_without_room_is_busy_and_not_down(sqlstate, message, busy):
    assert probe_error(refused(sqlstate, message), psycopg_driver, postgresql).busy is busy


def nobody() -> bool:
    """Say that no listener has used a connection."""
    return False


class Switches:
    """The two attributes of a psycopg connection that a mode sets."""

    autocommit = False
    read_only = None
    server_cursor_factory = ServerCursor
    prepare_threshold = 5
    aurora_router_shared = False
    pgconn = types.SimpleNamespace(transaction_status=0)
    notice_handler = None

    def add_notice_handler(self, handler):
        self.notice_handler = handler


class Talk(Switches):
    """A psycopg connection that answers, and notes each statement and its mode."""

    def __init__(self, *answers):
        self.answers = [*answers]
        self.heard = []

    def ask(self, sql):
        self.heard.append((sql, self.autocommit))
        return ["?"], [self.answers.pop(0)]

    def cursor(self):
        return contextlib.nullcontext(self)

    def execute(self, sql, values=None, *, prepare=None):
        self.heard.append((sql, values))
        self.prepares = prepare
        return self

    def fetchone(self):
        return self.answers.pop(0)


def test_a_new_connection_is_greeted_in_one_round_trip():
    """A new connection is greeted in one round trip that begins no transaction."""
    connection = Talk((*IDENTITY, True, True))
    connection.pgconn = types.SimpleNamespace(backend_pid=7)
    with psycopg_driver.alone(connection):
        found = postgresql.greet(connection.ask, psycopg_driver.process_id(connection), None)
    assert found == (ID, Role.READER, False)
    assert connection.heard == [(postgresql.greeting(7, None), True)]
    assert connection.autocommit is False


@pytest.mark.parametrize(
    ("process", "pooler", "condition"),
    [(-7, None, "OPERATOR(pg_catalog.=) (-7)"), (7, "session", ", true,"), (7, "transaction", ", false,")],
)
def test_a_pooler_is_found_out_or_said(process, pooler, condition):
    """A pooler is found by its process number, which is not the server's, unless the user names one."""
    assert condition in postgresql.greeting(process, pooler)


def test_a_shared_connection_is_not_guarded():
    """A shared connection is not guarded, because the setting would also hold for the pooler's next client."""
    connection = Talk((*IDENTITY, True, False))
    found = postgresql.greet(connection.ask, -7, None)
    assert found.shared
    assert not found.guarded
    psycopg_driver.prepare(connection, True, (), nobody)
    assert connection.prepare_threshold is None
    connection.prepare_threshold = 5
    psycopg_driver.prepare(connection, True, ("prepare_threshold",), nobody)
    assert connection.prepare_threshold == 5


def test_a_probe_is_one_round_trip():
    connection = Talk(writer_row())
    assert postgresql.probe(connection.ask, asynchronous_commits=True) == parse_probe(writer_row(), asynchronous_commits=True)
    assert [sql for sql, _ in connection.heard] == [postgresql.PROBE]


def test_what_is_prepared_is_forgotten_as_after_a_rollback():
    """psycopg forgets prepared statements at a rollback, which is sent unprepared because its text has two statements."""
    connection = Talk()
    psycopg_driver.forget_prepared(connection)
    assert connection.heard == [("BEGIN; ROLLBACK", None)]
    assert connection.autocommit is True
    assert connection.prepares is False


def test_a_transaction_is_signed_by_a_row_whose_schema_is_told():
    heard = []

    def execute(text, values):
        heard.append((text, values))
        return ("public",)

    assert postgresql.sign(execute, "an id", None, False) == "public"
    assert heard == [(postgresql.SIGN, {"id": "an id"})]


@pytest.mark.parametrize("state", ["on", "off"])
def test_a_transaction_that_is_declared_read_only_is_asked(state):
    """A transaction that was declared read-only is asked whether it still is, and is not signed then."""
    answers, heard = [(state,), ("public",)], []

    def execute(text, values):
        heard.append(text)
        return answers.pop(0)

    declared = psycopg_driver.declared_read_only(types.SimpleNamespace(read_only=True))
    assert postgresql.sign(execute, "an id", None, declared) == (None if state == "on" else "public")
    assert heard == ["SHOW transaction_read_only", postgresql.SIGN][: 1 if state == "on" else 2]
    assert not postgresql.is_read_only("25006")


def test_a_failed_transaction_is_asked_for_its_error():
    connection = Talk()
    psycopg_driver.refuse_aborted(connection)
    assert connection.heard == [("SELECT 1", None)]


def test_what_a_connection_is_is_asked_of_psycopg():
    connection = types.SimpleNamespace(fileno=lambda: 7, closed=False, broken=True, autocommit=True)
    assert psycopg_driver.fileno(connection) == 7
    assert psycopg_driver.is_closed(connection)
    assert psycopg_driver.autocommit(connection)


def test_a_psycopg_error_has_a_code_or_a_failed_connection():
    """An error of psycopg has the server's code, or the connection that could not be made."""
    refused = OperationalError()
    assert psycopg_driver.code(refused) is None
    assert not psycopg_driver.is_from_connecting(refused)
    assert psycopg_driver.is_from_connecting(types.SimpleNamespace(pgconn=object()))


AT = 'connection failed: connection to server at "10.0.0.1", port 5432 failed: '


@pytest.mark.parametrize(
    ("said", "used_password", "sqlstate", "kind"),
    [
        ('FATAL:  password authentication failed for user "app"', True, "28P01", Failure.REFUSED),
        ('FATAL:  LDAP authentication failed for user "app"', True, "28P01", Failure.REFUSED),
        ("fe_sendauth: no password supplied", False, "28P01", Failure.REFUSED),
        ('FATAL:  role "app" is not permitted to log in', True, "28000", Failure.REFUSED),
        ('FATAL:  no pg_hba.conf entry for host "10.0.0.9", user "app"', False, "28000", Failure.REFUSED),
        ("FATAL:  kein pg_hba.conf-Eintrag für Host »10.0.0.9«", False, "28000", Failure.REFUSED),
        ('FATAL:  database "shop" does not exist', True, "3D000", Failure.REFUSED),
        ('FATAL:  permission denied for database "shop"', True, "42501", Failure.REFUSED),
        ("FATAL:  sorry, too many clients already", False, "53300", Failure.BUSY),
        ('FATAL:  too many connections for role "app"', True, "53300", Failure.BUSY),
        ("FATAL:  the database system is starting up", False, "57P03", Failure.LOST),
        ("FATAL:  the database system is not yet accepting connections", False, "57P03", Failure.LOST),
        ("FATAL:  terminating connection due to administrator command", True, "57P01", Failure.LOST),
        ('ВАЖНО:  пользователь "app" не прошёл проверку подлинности (по паролю)', True, "28000", Failure.REFUSED),
        ("FATAL:  das Datenbanksystem startet", False, None, Failure.CONNECT),
        ("server closed the connection unexpectedly", True, None, Failure.CONNECT),
        ("Connection refused\n\tIs the server running on that host?", False, None, Failure.CONNECT),
    ],
)
def test_an_error_of_connecting_has_the_sqlstate_of_its_words(said, used_password, sqlstate, kind):
    """libpq drops the SQLSTATE while it connects, so it is read from the words, or from the request if they are foreign."""
    error = OperationalError(AT + said, pgconn=types.SimpleNamespace(used_password=used_password))
    assert psycopg_driver.code(error) == sqlstate
    for phase in (Phase.READER_CONNECTING, Phase.WRITER_CONNECTING):
        assert failure_of(error, disconnected=False, phase=phase) is kind


@pytest.mark.parametrize("said", ["certificate verify failed", 'invalid sslmode value: "on"', 'invalid connection option "x"'])
def test_what_was_configured_wrong_is_refused_while_connecting(said):
    """A mistake in the driver's arguments is a refusal, not an instance that is down."""
    assert failure_of(OperationalError(said), disconnected=False, phase=Phase.WRITER_CONNECTING) is Failure.REFUSED


@pytest.mark.parametrize(("given", "mode"), [({}, "require"), ({"sslmode": "disable"}, "disable")])
def test_a_connection_is_encrypted_unless_the_user_says_how(given, mode):
    assert psycopg_driver.encrypted(given, {}) == {"sslmode": mode}


@pytest.mark.parametrize(
    ("mode", "usual", "autocommit", "read_only"),
    [
        (Mode.DEFAULT, False, False, None),
        (Mode.DEFAULT, True, True, None),
        (Mode.AUTOCOMMIT, False, True, None),
        (Mode.READ_ONLY, False, False, True),
        (Mode.READ_ONLY, True, False, True),
    ],
)
def test_a_mode_is_two_attributes_of_the_connection(mode, usual, autocommit, read_only):
    connection = Switches()
    assert set_mode(connection, mode, usual, guarded=False)
    assert (connection.autocommit, connection.read_only) == (autocommit, read_only)


@pytest.mark.parametrize(("autocommit", "asked", "hold"), [(True, False, True), (False, False, False), (False, True, True)])
def test_a_streamed_read_is_held_if_there_is_no_transaction(autocommit, asked, hold, monkeypatch):
    """A streamed read outlives its statement if there is no transaction, except behind a pooler."""
    seen = {}
    monkeypatch.setattr(ServerCursor, "__init__", lambda self, connection, name, **options: seen.update(options, name=name))
    monkeypatch.setattr(ServerCursor, "__del__", lambda self: None)
    connection = Switches()
    connection.autocommit = autocommit
    psycopg_driver.prepare(connection, False, (), nobody)
    factory = connection.server_cursor_factory
    psycopg_driver.prepare(connection, False, (), nobody)
    assert connection.server_cursor_factory is factory
    assert issubclass(factory, ServerCursor)
    factory(connection, "c1", withhold=asked)
    assert seen == {"name": "c1", "withhold": hold}
    psycopg_driver.prepare(connection, True, (), nobody)
    connection.autocommit = True
    factory(connection, "c2")
    assert seen == {"name": "c2", "withhold": False}, "a pooler would keep it for others"


@pytest.mark.parametrize(("sqlstate", "is_bystander"), [("00000", False), ("57P02", True)])
def test_a_connection_notices_the_crash_of_another(sqlstate, is_bystander):
    """The notice with which the server ends all connections after a crash is remembered, and no other is."""
    connection = Switches()
    assert not psycopg_driver.is_bystander(connection)
    psycopg_driver.prepare(connection, False, (), nobody)
    connection.notice_handler(types.SimpleNamespace(sqlstate=sqlstate))
    assert psycopg_driver.is_bystander(connection) is is_bystander
    assert not pymysql_driver.is_bystander(connection)


def test_cursors_that_were_left_are_closed(monkeypatch):
    """The next cursor closes those that were dropped unclosed, and the removal of leftovers closes all."""

    def made(cursor, connection, name, *, withhold=False):
        cursor.name, cursor._withhold = name, withhold

    monkeypatch.setattr(ServerCursor, "__init__", made)
    monkeypatch.setattr(ServerCursor, "close", lambda self: None)
    monkeypatch.setattr(ServerCursor, "name", None)
    connection = Talk(())
    psycopg_driver.prepare(connection, False, (), nobody)
    connection.autocommit = True
    assert not psycopg_driver.has_leftovers(connection)
    kept = connection.server_cursor_factory(connection, "kept")
    connection.server_cursor_factory(connection, "left")
    assert connection.heard == []
    closed = connection.server_cursor_factory(connection, "closed")
    assert [sql.as_string(None) for sql, _ in connection.heard] == ['CLOSE "left"']
    closed.close()
    assert [*connection.aurora_router_held] == ["kept"]
    assert psycopg_driver.has_leftovers(connection)
    connection.heard.clear()
    psycopg_driver.remove_leftovers(connection, connection.ask)
    assert connection.heard == [("CLOSE ALL", True)]
    assert not psycopg_driver.has_leftovers(connection)
    assert not psycopg_driver.blocks(connection)
    connection.autocommit = False
    connection.server_cursor_factory(connection, "in a transaction")
    assert not psycopg_driver.has_leftovers(connection)
    kept.close()


@pytest.mark.parametrize(("status", "is_left"), [("IDLE", False), ("ACTIVE", True), ("INTRANS", True), ("INERROR", True)])
def test_a_transaction_that_was_not_ended_is_a_leftover(status, is_left):
    connection = Talk()
    psycopg_driver.prepare(connection, False, (), nobody)
    connection.pgconn = types.SimpleNamespace(transaction_status=pq.TransactionStatus[status])
    assert psycopg_driver.has_leftovers(connection) is is_left


def test_the_first_look_at_a_server_names_its_level():
    """SQLAlchemy's first look runs at READ COMMITTED, reports the server's default, and leaves the connection as it was."""
    driver = Talk(("serializable",))
    driver.autocommit, driver.isolation_level, driver.prepare_threshold = True, None, 5
    driver.info = types.SimpleNamespace(transaction_status=pq.TransactionStatus.IDLE)
    driver.rollback = lambda: driver.heard.append(("rollback", driver.isolation_level))
    levels = []
    dialect = types.SimpleNamespace(
        initialize=lambda c: driver.heard.append(("look", (driver.autocommit, driver.isolation_level))),
        set_isolation_level=lambda _, level: levels.append(level),
    )
    psycopg_driver.look_anywhere(dialect)
    dialect.initialize(types.SimpleNamespace(connection=types.SimpleNamespace(dbapi_connection=driver)))
    at = IsolationLevel.READ_COMMITTED
    assert driver.heard == [("look", (False, at)), ("rollback", at)]
    assert (driver.autocommit, driver.isolation_level, driver.prepare_threshold) == (True, None, 5)
    assert dialect.get_default_isolation_level(driver) == "SERIALIZABLE"
    dialect.set_isolation_level(driver, "REPEATABLE READ")
    assert levels == ["REPEATABLE READ"]
    assert not hasattr(dialect, "default_isolation_level")
    driver.isolation_level = IsolationLevel.REPEATABLE_READ
    dialect.initialize(types.SimpleNamespace(connection=types.SimpleNamespace(dbapi_connection=driver)))
    assert dialect.default_isolation_level == "REPEATABLE READ"  # the engine's level, which SQLAlchemy restores


@pytest.mark.parametrize(
    ("alone", "status", "guard", "settled"),
    [
        (True, "IDLE", b"on", True),
        (True, "IDLE", None, True),  # before PostgreSQL 14
        (True, "IDLE", b"off", False),
        (True, "INTRANS", b"on", False),
        (False, "INTRANS", b"off", False),
        (False, "IDLE", b"off", True),
    ],
)
def test_a_connection_that_a_listener_has_used_is_seen(alone, status, guard, settled):
    """psycopg knows without a question whether a connection is in a transaction, and whether it is guarded."""
    connection = Switches()
    connection.autocommit = alone
    connection.read_only = None if alone else True
    psycopg_driver.prepare(connection, False, (), nobody)
    connection.pgconn = types.SimpleNamespace(
        transaction_status=pq.TransactionStatus[status], parameter_status=lambda name: guard
    )
    assert psycopg_driver.is_settled(connection, alone) is settled
    assert not psycopg_driver.is_settled(connection, not alone)
    assert psycopg_driver.is_guarded(connection, False) is (guard != b"off")


@pytest.mark.parametrize("found", [None, False])
def test_another_access_mode_is_seen(found):
    """Another access mode is seen, such as False of SQLAlchemy's postgresql_readonly, which would begin a writing transaction."""
    connection = Switches()
    connection.autocommit, connection.read_only = False, found
    connection.pgconn = types.SimpleNamespace(transaction_status=pq.TransactionStatus.IDLE)
    assert not psycopg_driver.is_settled(connection, False)


@pytest.mark.parametrize(
    ("handed_out", "listened", "believed"), [(False, False, True), (True, False, False), (False, True, False)]
)
def test_an_old_server_tells_nothing_of_its_guard(handed_out, listened, believed):
    """Before PostgreSQL 14 a guard is believed while nobody can have taken it off."""
    connection = Switches()
    psycopg_driver.prepare(connection, False, (), lambda: listened)
    connection.pgconn = types.SimpleNamespace(parameter_status=lambda name: None)
    assert psycopg_driver.is_guarded(connection, handed_out) is believed


@pytest.mark.parametrize(
    ("alone", "status", "guard", "lost"),
    [
        (True, "IDLE", b"off", True),
        (True, "IDLE", b"on", False),
        (True, "IDLE", None, False),
        (True, "INTRANS", b"off", False),
        (False, "IDLE", b"off", False),
    ],
)
def test_a_guard_that_was_lost_in_autocommit_is_seen(alone, status, guard, lost):
    """A guard that was lost in autocommit is seen if the server reports it and no transaction is open."""
    connection = Switches()
    connection.autocommit = alone
    connection.pgconn = types.SimpleNamespace(
        transaction_status=pq.TransactionStatus[status], parameter_status=lambda name: guard
    )
    assert psycopg_driver.has_lost_guard(connection) is lost


@pytest.mark.parametrize(("status", "ended"), [("IDLE", []), ("INTRANS", ["commit"]), ("INERROR", ["rollback"])])
def test_what_a_listener_has_begun_is_ended(status, ended):
    """A listener's open transaction is committed so that its settings hold, or rolled back if a statement has failed."""
    found = []
    connection = types.SimpleNamespace(info=types.SimpleNamespace(transaction_status=pq.TransactionStatus[status]))
    connection.commit, connection.rollback = (lambda end=end: found.append(end) for end in ("commit", "rollback"))
    psycopg_driver.end_transaction(connection)
    assert found == ended


def test_an_error_has_the_servers_function_beside_its_words():
    """An error has the server's function beside its words, because the words may be in any language."""
    error = OperationalError("nein")
    assert psycopg_driver.words(error) == "nein"
    diag = types.SimpleNamespace(source_function="RevalidateCachedQuery")
    assert psycopg_driver.words(type("Error", (Exception,), {"diag": diag})("nein")) == "nein (RevalidateCachedQuery)"


def test_the_driver_is_the_one_whose_connection_is_switched():
    assert psycopg_driver.NAME == "psycopg"
    assert all(hasattr(Connection, name) for name in ("autocommit", "read_only"))


@contextlib.contextmanager
def server_that_waits() -> Iterator[tuple[str, threading.Event]]:
    """A server like PostgreSQL that lets a client in after the event is set. Yields its URL and the event."""
    let_in = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as server:

        def greet() -> None:
            client, _ = server.accept()
            with client:
                client.recv(1024)
                let_in.wait()
                client.sendall(b"R\0\0\0\x08\0\0\0\0" + b"Z\0\0\0\x05I")  # AuthenticationOk, ReadyForQuery
                client.recv(1024)

        thread = threading.Thread(target=greet)
        thread.start()
        yield f"postgresql+psycopg://u@127.0.0.1:{server.getsockname()[1]}/d?sslmode=disable&gssencmode=disable", let_in
        let_in.set()
        thread.join()


def test_while_it_connects_a_connections_socket_is_shown() -> None:
    with server_that_waits() as (url, let_in):
        dialect = create_engine(url).dialect
        numbers: list[int] = []

        @contextlib.contextmanager
        def connecting(number: int) -> Iterator[None]:
            numbers.append(number)
            let_in.set()
            yield

        psycopg_driver.watch_connecting(dialect, connecting)
        arguments, options = dialect.create_connect_args(make_url(url))
        with dialect.connect(*arguments, **options) as c:
            assert set(numbers) == {c.fileno()}
            assert isinstance(c, Connection)


def test_a_wait_for_a_connection_ends_when_its_socket_is_shut() -> None:
    with server_that_waits() as (url, _):
        dialect = create_engine(url).dialect
        twins: list[socket.socket] = []

        @contextlib.contextmanager
        def connecting(number: int) -> Iterator[None]:
            with socket.socket(fileno=os.dup(number)) as twin:
                twin.shutdown(socket.SHUT_RDWR)
                twins.append(twin)
                yield

        psycopg_driver.watch_connecting(dialect, connecting)
        arguments, options = dialect.create_connect_args(make_url(url))
        with pytest.raises(OperationalError):
            dialect.connect(*arguments, **options)
        assert twins


def test_a_replaced_connect_function_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A connect function that replaces the driver's is left alone."""
    dialect = create_engine("postgresql+psycopg://").dialect
    monkeypatch.setattr(dialect, "dbapi", types.SimpleNamespace(connect=lambda: "traced"))
    psycopg_driver.watch_connecting(dialect, contextlib.nullcontext)
    assert dialect.connect() == "traced"


def test_what_a_backslash_means_is_known_to_the_driver():
    """The driver knows standard_conforming_strings without a question, because the server reports each change."""
    settings = {"standard_conforming_strings": "off"}
    connection = types.SimpleNamespace(info=types.SimpleNamespace(parameter_status=settings.get))
    assert psycopg_driver.literal_mode(connection) == "off"


def test_all_servers_of_postgresql_speak_one_dialect():
    """All servers of PostgreSQL have the one dialect that the classifier knows."""
    assert postgresql.dialect(ServerId("7", "db-1", 5432, "")) == "postgresql"


def test_a_log_of_postgresql_leaves_nothing_out():
    assert postgresql.omissions(lambda sql: pytest.fail(sql)) == ""


class Waiting:
    """A psycopg connection with only the state of its transaction."""

    def __init__(self):
        self.pgconn = types.SimpleNamespace(transaction_status=pq.TransactionStatus.IDLE)

    def wait(self, steps, **_options):
        self.pgconn.transaction_status = next(steps)

    def _rollback_gen(self):
        yield pq.TransactionStatus.IDLE


def test_the_transactions_that_end_are_counted():
    """Each end of a transaction except by rollback() is counted, whoever ends it and however."""

    def sent(status):
        connection.wait(iter([status]), interval=0.1)
        return ends()

    connection = Waiting()
    ends = psycopg_driver.count_ends(connection)
    assert sent(pq.TransactionStatus.INTRANS) == 0
    assert sent(pq.TransactionStatus.INERROR) == 0
    connection.wait(connection._rollback_gen())
    assert ends() == 0
    assert sent(pq.TransactionStatus.INTRANS) == 0
    assert sent(pq.TransactionStatus.IDLE) == 1
    assert psycopg_driver.count_ends(connection)() == 1
    assert sent(pq.TransactionStatus.UNKNOWN) == 1, "the connection is lost"


@pytest.mark.parametrize(
    ("status", "pipeline", "tpc", "expected"),
    [(0, 0, None, True), (2, 0, None, False), (4, 0, None, False), (0, 1, None, False), (0, 0, ("xid", True), False)],
)
def test_a_rollback_is_known_to_do_nothing(status: int, pipeline: int, tpc: object, expected: bool) -> None:
    """A rollback may be left out on an idle connection that is not in a pipeline, and has prepared no transaction."""
    driver = types.SimpleNamespace(transaction_status=status, pipeline_status=pipeline)
    assert psycopg_driver.is_idle(types.SimpleNamespace(pgconn=driver, _tpc=tpc)) is expected
