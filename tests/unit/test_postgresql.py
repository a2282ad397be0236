"""PostgreSQL's rows, error codes and words as the router reads them."""

import contextlib
import os
import socket
import threading
import types
from collections.abc import Iterator

import pytest
from psycopg import Connection, OperationalError, ServerCursor
from sqlalchemy import create_engine, make_url

from aurora_router.core.failures import Failure
from aurora_router.core.positions import WalPosition
from aurora_router.core.topology import Role, Server, ServerId, Silence
from aurora_router.servers import postgresql
from aurora_router.servers.postgresql import (
    Mode,
    Unsuitable,
    explain_refusal,
    failure,
    is_busy,
    parse_functions,
    parse_identity,
    parse_probe,
    set_mode,
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


def test_a_unix_socket_has_no_address_and_a_start_may_come_as_text():
    row = (120000, "7001", None, None, "2026-03-04 05:06:07", True)
    assert parse_identity(row) == (ServerId("7001", None, None, "2026-03-04 05:06:07"), Role.READER)


def test_a_server_older_than_12_is_unsuitable_and_the_error_says_what_is_needed():
    with pytest.raises(Unsuitable, match="runs PostgreSQL 11; version 12 or newer is needed"):
        parse_identity((110022, *IDENTITY[1:], False))
    with pytest.raises(Unsuitable):
        parse_probe((110022, *writer_row()[1:]), asynchronous_commits=False)


def test_a_writer_is_as_far_as_it_has_written_on_its_timeline_in_hexadecimal():
    found = parse_probe(writer_row(), asynchronous_commits=False)
    assert found == Server(ID, Role.WRITER, 10, WalPosition(10, 0x5000), None, "read committed")


@pytest.mark.parametrize(("synchronous", "elsewhere"), [("off", False), ("on", True), ("off", True)])
def test_where_commits_are_asynchronous_a_writer_is_as_far_as_it_has_inserted(synchronous, elsewhere):
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
def test_an_insert_position_after_a_header_counts_as_the_end_of_the_last_record(inserted, page, segment, lsn):
    row = writer_row(inserted=inserted, page=page, segment=segment)
    assert parse_probe(row, asynchronous_commits=True).position == WalPosition(10, lsn)


def test_a_reader_that_has_replayed_what_it_received_is_not_behind_however_old_the_last_commit_is():
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
def test_a_reader_that_is_behind_says_how_old_the_last_commit_is_that_it_replayed(row, lag):
    assert parse_probe(row, asynchronous_commits=False).lag == lag


@pytest.mark.parametrize(("control", "tli", "epoch"), [(1, 2, 2), (2, 1, 2), (3, None, 3), (1, 1, 1)])
def test_a_reader_is_on_the_newest_timeline_that_it_knows_of(control, tli, epoch):
    found = parse_probe(reader_row(control=control, tli=tli), asynchronous_commits=False)
    assert found.epoch == epoch
    assert found.position == WalPosition(epoch, 0x5000)


def test_a_reader_that_has_replayed_nothing_has_no_position():
    assert parse_probe(reader_row(replayed=None), asynchronous_commits=False).position is None


def test_a_function_is_a_read_by_its_name_where_it_is_one_in_every_schema():
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
        ("0A000", "not supported", False, Failure.NOT_HERE),
        ("55000", "recovery is in progress", False, Failure.NOT_HERE),
        ("XX000", "cannot assign TransactionIds during recovery", False, Failure.READ_ONLY),
        ("XX000", "something else", False, Failure.BROKEN),
        ("XX001", "invalid page in block 0", False, Failure.BROKEN),
        ("58030", "could not read file", False, Failure.BROKEN),
        ("53100", "could not extend file: No space left on device", False, Failure.BROKEN),
        ("53200", "out of memory", False, Failure.BROKEN),
        ("53300", "sorry, too many clients already", True, Failure.BUSY),
        ("40001", "canceling statement due to conflict with recovery", False, Failure.CONFLICT),
        ("40P01", "canceling statement due to conflict with recovery: deadlock", False, Failure.CONFLICT),
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
        ("23505", "duplicate key", False, Failure.OTHER),
    ],
)
def test_driver_errors_stand_for_the_failure_that_they_are(sqlstate, message, disconnected, kind):
    assert failure(sqlstate, message, disconnected=disconnected) is kind


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
        ("42501", "permission denied for function pg_control_system", "misconfigured", "let this user run"),
        ("0P000", "some role", "misconfigured", "some role"),
        (None, "connection failed: connection to server failed: Connection refused", "refused", "Connection refused"),
        ("57P03", "the database system is starting up", "refused", "starting up"),
    ],
)
def test_a_refused_probe_says_in_words_what_to_do_and_whether_trying_again_can_help(sqlstate, message, silence, advice):
    kind, words = explain_refusal(sqlstate, message)
    assert kind is Silence(silence)
    assert advice in words
    assert not words.startswith("connection failed: ")


@pytest.mark.parametrize(
    ("sqlstate", "message", "busy"),
    [
        ("53300", "", True),
        (None, "FATAL:  sorry, too many clients already", True),
        (None, "FATAL:  remaining connection slots are reserved for roles", True),
        (None, "Connection refused", False),
        ("57P03", "the database system is starting up", False),
    ],
)
def test_a_server_without_room_is_busy_and_not_down(sqlstate, message, busy):
    assert is_busy(sqlstate, message) is busy


class Switches:
    """The two attributes of a psycopg connection that a mode sets."""

    autocommit = False
    read_only = None
    server_cursor_factory = ServerCursor


class Talk(Switches):
    """A psycopg connection that answers, and notes what it was told and in which mode."""

    def __init__(self, *answers):
        self.answers = [*answers]
        self.heard = []

    def ask(self, sql):
        self.heard.append((sql, self.autocommit))
        return ["?"], [self.answers.pop(0)]

    def cursor(self):
        return contextlib.nullcontext(self)

    def execute(self, sql, values=None):
        self.heard.append((sql, values))

    def fetchone(self):
        return self.answers.pop(0)


def test_a_fresh_connection_is_greeted_in_one_round_trip_that_begins_no_transaction():
    connection = Talk((*IDENTITY, True))
    assert postgresql.greet(connection, connection.ask) == (ID, Role.READER)
    assert connection.heard == [(postgresql.GREETING, True)]
    assert connection.autocommit is False


def test_a_probe_is_one_round_trip():
    connection = Talk(writer_row())
    assert postgresql.probe(connection.ask, asynchronous_commits=True) == parse_probe(writer_row(), asynchronous_commits=True)
    assert [sql for sql, _ in connection.heard] == [postgresql.PROBE]


def test_a_guard_is_set_and_taken_off_outside_of_transactions():
    connection = Talk((), ())
    postgresql.guard(connection, connection.ask, True)
    postgresql.guard(connection, connection.ask, False)
    assert connection.heard == [(postgresql.GUARD, True), (postgresql.UNGUARD, True)]


def test_a_transaction_is_signed_by_a_row_whose_schema_is_told():
    connection = Talk(("public",))
    assert postgresql.sign(connection, "an id") == "public"
    assert connection.heard == [(postgresql.SIGN, {"id": "an id"})]


def test_a_failed_transaction_is_asked_for_its_error():
    connection = Talk()
    postgresql.refuse_aborted(connection)
    assert connection.heard == [("SELECT 1", None)]


def test_what_a_connection_is_is_asked_of_psycopg():
    connection = types.SimpleNamespace(fileno=lambda: 7, closed=False, broken=True, autocommit=True)
    assert postgresql.fileno(connection) == 7
    assert postgresql.is_closed(connection)
    assert postgresql.autocommit(connection)


def test_an_error_of_psycopg_has_the_servers_code_or_the_connection_that_could_not_be_made():
    refused = OperationalError()
    assert postgresql.code(refused) is None
    assert not postgresql.is_from_connecting(refused)
    assert postgresql.is_from_connecting(types.SimpleNamespace(pgconn=object()))


@pytest.mark.parametrize(("given", "mode"), [({}, "require"), ({"sslmode": "disable"}, "disable")])
def test_a_connection_is_encrypted_unless_the_user_says_how(given, mode):
    assert postgresql.encrypted(given) == {"sslmode": mode}


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
def test_a_streamed_read_outlives_its_statement_where_there_is_no_transaction(autocommit, asked, hold, monkeypatch):
    seen = {}
    monkeypatch.setattr(ServerCursor, "__init__", lambda self, connection, name, **options: seen.update(options, name=name))
    monkeypatch.setattr(ServerCursor, "__del__", lambda self: None)
    monkeypatch.setattr(postgresql, "_hold", None)
    connection = Switches()
    connection.autocommit = autocommit
    postgresql.prepare(connection)
    factory = connection.server_cursor_factory
    postgresql.prepare(connection)
    assert connection.server_cursor_factory is factory
    assert issubclass(factory, ServerCursor)
    factory(connection, "c1", withhold=asked)
    assert seen == {"name": "c1", "withhold": hold}


def test_the_driver_is_the_one_whose_connection_is_switched():
    assert postgresql.DRIVER == "psycopg"
    assert all(hasattr(Connection, name) for name in ("autocommit", "read_only"))


@contextlib.contextmanager
def server_that_waits() -> Iterator[tuple[str, threading.Event]]:
    """A URL where a client is let in, as PostgreSQL does it, once the event is set."""
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

        postgresql.watch_connecting(dialect, connecting)
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

        postgresql.watch_connecting(dialect, connecting)
        arguments, options = dialect.create_connect_args(make_url(url))
        with pytest.raises(OperationalError):
            dialect.connect(*arguments, **options)
        assert twins


def test_a_connect_function_that_somebody_has_put_in_place_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    dialect = create_engine("postgresql+psycopg://").dialect
    monkeypatch.setattr(dialect, "dbapi", types.SimpleNamespace(connect=lambda: "traced"))
    postgresql.watch_connecting(dialect, contextlib.nullcontext)
    assert dialect.connect() == "traced"
