"""How psycopg's connection is made, greeted, switched to a mode, and watched."""

import contextlib
import os
import socket
import threading
import types
from collections.abc import Iterator

import pytest
from psycopg import Connection, IsolationLevel, OperationalError, ServerCursor, pq
from sqlalchemy import create_engine, make_url

from aurora_router.core.instance import Role, ServerId
from aurora_router.drivers import Mode
from aurora_router.drivers import psycopg as psycopg_driver
from aurora_router.drivers import pymysql as pymysql_driver
from aurora_router.drivers.notes import notes_of
from aurora_router.drivers.psycopg import set_mode
from aurora_router.servers import postgresql
from aurora_router.servers.postgresql import (
    parse_probe,
)
from tests.unit.postgresql_rows import ID, IDENTITY, writer_row


def nobody() -> bool:
    """Say that no listener has used a connection."""
    return False


class Switches:
    """The two attributes of a psycopg connection that a mode sets."""

    autocommit = False
    read_only = None
    server_cursor_factory = ServerCursor
    prepare_threshold = 5
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
        found = postgresql.identify(connection.ask, psycopg_driver.process_id(connection), None)
    assert found == (ID, Role.READER, False)
    assert connection.heard == [(postgresql.identify_sql(7, None), True)]
    assert connection.autocommit is False


@pytest.mark.parametrize(
    ("process", "pooler", "condition"),
    [(-7, None, "OPERATOR(pg_catalog.=) (-7)"), (7, "session", ", true,"), (7, "transaction", ", false,")],
)
def test_a_pooler_is_found_out_or_said(process, pooler, condition):
    """A pooler is found by its process number, which is not the server's, unless the user names one."""
    assert condition in postgresql.identify_sql(process, pooler)


def test_a_shared_connection_is_not_guarded():
    """A shared connection is not guarded, because the setting would also hold for the pooler's next client."""
    connection = Talk((*IDENTITY, True, False))
    found = postgresql.identify(connection.ask, -7, None)
    assert found.shared
    assert not found.default_read_only
    psycopg_driver.prepare_connection(connection, True, (), nobody, postgresql)
    assert connection.prepare_threshold is None
    connection.prepare_threshold = 5
    psycopg_driver.prepare_connection(connection, True, ("prepare_threshold",), nobody, postgresql)
    assert connection.prepare_threshold == 5


def test_a_probe_is_one_round_trip():
    connection = Talk(writer_row())
    assert postgresql.probe(connection.ask, asynchronous_commits=True) == parse_probe(writer_row(), asynchronous_commits=True)
    assert [sql for sql, _ in connection.heard] == [postgresql.PROBE]


def test_what_is_prepared_is_forgotten_as_after_a_rollback():
    """psycopg forgets prepared statements at a rollback, which is sent unprepared because its text has two statements."""
    connection = Talk()
    psycopg_driver.forget_prepared(connection)
    assert connection.heard == [("BEGIN; ROLLBACK; DISCARD PLANS", None)]
    assert connection.autocommit is True
    assert connection.prepares is False


def test_a_transaction_is_signed_by_a_row_whose_schema_is_told():
    heard = []

    def execute(text, values):
        heard.append((text, values))
        return ("public",)

    assert postgresql.insert_commit_row(execute, "an id", None, False) == "public"
    assert heard == [(postgresql.COMMIT_ROW, {"id": "an id"})]


@pytest.mark.parametrize("state", ["on", "off"])
def test_a_transaction_that_is_declared_read_only_is_asked(state):
    """A transaction that was declared read-only is asked whether it still is, and is not signed then."""
    answers, heard = [(state,), ("public",)], []

    def execute(text, values):
        heard.append(text)
        return answers.pop(0)

    declared = psycopg_driver.declared_read_only(types.SimpleNamespace(read_only=True))
    assert postgresql.insert_commit_row(execute, "an id", None, declared) == (None if state == "on" else "public")
    assert heard == ["SHOW transaction_read_only", postgresql.COMMIT_ROW][: 1 if state == "on" else 2]
    assert not postgresql.is_read_only("25006")


def test_a_failed_transaction_is_asked_for_its_error():
    connection = Talk()
    psycopg_driver.raise_if_aborted(connection)
    assert connection.heard == [("SELECT 1", None)]


def test_what_a_connection_is_is_asked_of_psycopg():
    connection = types.SimpleNamespace(fileno=lambda: 7, closed=False, broken=True, autocommit=True)
    assert psycopg_driver.fileno(connection) == 7
    assert psycopg_driver.is_closed(connection)
    assert psycopg_driver.autocommit(connection)


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
    assert set_mode(connection, mode, usual, default_read_only=False)
    assert (connection.autocommit, connection.read_only) == (autocommit, read_only)


@pytest.mark.parametrize(("autocommit", "asked", "hold"), [(True, False, True), (False, False, False), (False, True, True)])
def test_a_streamed_read_is_held_if_there_is_no_transaction(autocommit, asked, hold, monkeypatch):
    """A streamed read outlives its statement if there is no transaction, except behind a pooler."""
    seen = {}
    monkeypatch.setattr(ServerCursor, "__init__", lambda self, connection, name, **options: seen.update(options, name=name))
    monkeypatch.setattr(ServerCursor, "__del__", lambda self: None)
    connection = Switches()
    connection.autocommit = autocommit
    psycopg_driver.prepare_connection(connection, False, (), nobody, postgresql)
    factory = connection.server_cursor_factory
    psycopg_driver.prepare_connection(connection, False, (), nobody, postgresql)
    assert connection.server_cursor_factory is factory
    assert issubclass(factory, ServerCursor)
    factory(connection, "c1", withhold=asked)
    assert seen == {"name": "c1", "withhold": hold}
    psycopg_driver.prepare_connection(connection, True, (), nobody, postgresql)
    connection.autocommit = True
    factory(connection, "c2")
    assert seen == {"name": "c2", "withhold": False}, "a pooler would keep it for others"


@pytest.mark.parametrize(("sqlstate", "is_bystander"), [("00000", False), ("57P02", True)])
def test_a_connection_notices_the_crash_of_another(sqlstate, is_bystander):
    """The notice with which the server ends all connections after a crash is remembered, and no other is."""
    connection = Switches()
    assert not psycopg_driver.is_bystander(connection)
    psycopg_driver.prepare_connection(connection, False, (), nobody, postgresql)
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
    psycopg_driver.prepare_connection(connection, False, (), nobody, postgresql)
    connection.autocommit = True
    assert not psycopg_driver.has_leftovers(connection)
    kept = connection.server_cursor_factory(connection, "kept")
    connection.server_cursor_factory(connection, "left")
    assert connection.heard == []
    closed = connection.server_cursor_factory(connection, "closed")
    assert [sql.as_string(None) for sql, _ in connection.heard] == ['CLOSE "left"']
    closed.close()
    assert [*notes_of(connection).held_cursors] == ["kept"]
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
    psycopg_driver.prepare_connection(connection, False, (), nobody, postgresql)
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
    psycopg_driver.prepare_connection(connection, False, (), nobody, postgresql)
    connection.pgconn = types.SimpleNamespace(
        transaction_status=pq.TransactionStatus[status], parameter_status=lambda name: guard
    )
    assert psycopg_driver.is_settled(connection, alone) is settled
    assert not psycopg_driver.is_settled(connection, not alone)
    assert psycopg_driver.is_default_read_only(connection, False) is (guard != b"off")


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
    psycopg_driver.prepare_connection(connection, False, (), lambda: listened, postgresql)
    connection.pgconn = types.SimpleNamespace(parameter_status=lambda name: None)
    assert psycopg_driver.is_default_read_only(connection, handed_out) is believed


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
    assert psycopg_driver.has_lost_read_only(connection) is lost


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

        def identify() -> None:
            client, _ = server.accept()
            with client:
                client.recv(1024)
                let_in.wait()
                client.sendall(b"R\0\0\0\x08\0\0\0\0" + b"Z\0\0\0\x05I")  # AuthenticationOk, ReadyForQuery
                client.recv(1024)

        thread = threading.Thread(target=identify)
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

        psycopg_driver.track_connecting_socket(dialect, connecting)
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

        psycopg_driver.track_connecting_socket(dialect, connecting)
        arguments, options = dialect.create_connect_args(make_url(url))
        with pytest.raises(OperationalError):
            dialect.connect(*arguments, **options)
        assert twins


def test_a_replaced_connect_function_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A connect function that replaces the driver's is left alone."""
    dialect = create_engine("postgresql+psycopg://").dialect
    monkeypatch.setattr(dialect, "dbapi", types.SimpleNamespace(connect=lambda: "traced"))
    psycopg_driver.track_connecting_socket(dialect, contextlib.nullcontext)
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
        self.cursor_factory = None

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


@pytest.mark.parametrize(("level", "said"), [(None, None), (IsolationLevel.REPEATABLE_READ, "repeatable read")])
def test_the_level_of_a_connection_is_told_as_servers_say_it(level, said):
    assert psycopg_driver.isolation(types.SimpleNamespace(isolation_level=level)) == said
    assert pymysql_driver.isolation(types.SimpleNamespace()) is None
