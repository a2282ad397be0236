"""Listeners of the application that use a connection before its unit has it, as SQLAlchemy's documentation shows them."""

from __future__ import annotations

import contextlib
import gc
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
from sqlalchemy import event, text
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session
from sqlalchemy.pool import Pool

from aurora_router import NoWriterAvailable, Router, RoutingSession
from aurora_router.core import events
from aurora_router.errors import ConfigurationError
from aurora_router.local.cluster import Cluster
from aurora_router.servers import postgresql
from tests.integration.shop import (
    BOTH,
    engine,
    eventually,
    family,
    in_a_read_only_transaction,
    no_connection_is_left,
    place,
    raise_stock,
    sessions,
    stock,
    until_readers_serve,
)

MakeRouter = Callable[..., Router]

SET = {
    "postgresql": "SET statement_timeout = '31s'",
    "mariadb": "SET SESSION max_statement_time = 31",
    "mysql": "SET SESSION max_execution_time = 31000",
}
BEGUN = "SELECT count(*) FROM item"
COUNT = text("SELECT count(*) FROM item")

EVENTS: list[tuple[Any, str]] = [
    (Engine, "connect"),
    (Engine, "first_connect"),
    (Engine, "checkout"),
    (Engine, "checkin"),
    (Engine, "reset"),
    (Engine, "engine_connect"),
    (Pool, "connect"),
]


@contextmanager
def listening(target: Any, name: str, *statements: str) -> Iterator[None]:
    """Make a listener send the statements on each connection of every engine. It ends no transaction."""

    def send(first: Any, *_: Any) -> None:
        driver = first.connection.driver_connection if name == "engine_connect" else first
        cursor = getattr(driver, "driver_connection", driver).cursor()
        for statement in statements:
            cursor.execute(statement)
        cursor.close()

    event.listen(target, name, send)
    try:
        yield
    finally:
        event.remove(target, name, send)


@pytest.fixture
def listen() -> Iterator[Callable[..., None]]:
    """A function that adds such a listener until the test ends."""
    with ExitStack() as stack:
        yield lambda *args: stack.enter_context(listening(*args))


@BOTH
@pytest.mark.parametrize(("target", "name"), EVENTS, ids=[f"{t.__name__}-{n}" for t, n in EVENTS])
@pytest.mark.parametrize("does", ["sets", "begins"])
def test_a_listener_may_leave_a_transaction_open(
    cluster: Cluster[Any],
    make_router: MakeRouter,
    heard: list[events.Event],
    listen: Callable[..., None],
    target: Any,
    name: str,
    does: str,
) -> None:
    """Reads go to a reader, as they do without the listener, and nothing is retried or refused."""
    listen(target, name, SET[engine(cluster)] if does == "sets" else BEGUN)
    reads_go_to_a_reader(cluster, make_router, heard)


@BOTH
@pytest.mark.parametrize("name", ["connect", "first_connect", "checkout", "engine_connect"])
def test_a_listener_may_need_a_transaction(
    cluster: Cluster[Any], make_router: MakeRouter, heard: list[events.Event], listen: Callable[..., None], name: str
) -> None:
    """A listener finds a connection outside of autocommit, as on a plain engine. The monitor's connections are no exception."""
    listen(Engine, name, "SAVEPOINT mine")
    reads_go_to_a_reader(cluster, make_router, heard)


@pytest.mark.parametrize("name", ["connect", "checkout"])
def test_a_listeners_mistake_is_told_at_once(cluster: Cluster[Any], make_router: MakeRouter, name: str) -> None:
    """No unit waits for a writer if a listener's own statement is wrong. The error has the server's words."""
    with listening(Engine, name, "SELEC 1"), pytest.raises((ConfigurationError, DBAPIError), match="SELEC"):
        make_router(failover_timeout=3600.0).connect().close()


def reads_go_to_a_reader(cluster: Cluster[Any], make_router: MakeRouter, heard: list[events.Event]) -> None:
    router = make_router(listeners=[heard.append], failover_timeout=10.0)
    until_readers_serve(router, 2)
    router.init_commit_table()
    for _ in range(3):
        with sessions(router, read_only=True)() as s:
            assert s.scalar(COUNT) == 3
            assert place(s) == "reader"
            assert in_a_read_only_transaction(s.connection())
        with sessions(router)() as s:
            assert s.scalar(COUNT) == 3
            assert place(s) == "reader"
        with router.connect(read_only=True) as connection:
            assert connection.scalar(COUNT) == 3
    with sessions(router)() as s:
        raise_stock(s)
        s.commit()
    assert stock(cluster) == 11
    assert router.run_transaction(sessions(router), raise_stock) == 12
    assert not {"Repeated", "Learned", "ConnectionRefused"} & {type(e).__name__ for e in heard}


@pytest.mark.parametrize("name", ["connect", "checkout", "engine_connect"])
@pytest.mark.parametrize("isolation", [{}, {"isolation_level": "READ COMMITTED"}], ids=["default", "level"])
def test_what_a_listener_sets_holds(
    make_router: MakeRouter, listen: Callable[..., None], name: str, isolation: dict[str, str]
) -> None:
    """A listener's setting holds in automatic units, which have no transaction, and on the first connection as well."""
    listen(Engine, name, "SET shop.tenant = 'nine'")
    router = make_router(engine_options={"pool_size": 1, **isolation})
    until_readers_serve(router, 2)
    setting = text("SELECT current_setting('shop.tenant')")
    for read_only in (None, True, False, None):
        with sessions(router, read_only=read_only)() as s:
            assert s.scalar(setting) == "nine"
            assert place(s) == ("writer" if read_only is False else "reader")
            s.rollback()


def is_default_read_only(s: RoutingSession) -> bool:
    """Whether the unit's connection, which is in autocommit, would refuse a write.

    The question goes past the interceptor, because the unit must stay on its reader.
    """
    assert s.scalar(COUNT) == 3
    assert place(s) == "reader"
    transaction = s.get_transaction()
    assert transaction is not None
    (driver,) = {c.connection.driver_connection for c in transaction._connections if isinstance(c, Connection)}
    assert driver.autocommit
    found: bool = driver.execute("SHOW default_transaction_read_only").fetchone() == ("on",)
    return found


@pytest.mark.parametrize("statement", ["RESET ALL", "DISCARD ALL"])
@pytest.mark.parametrize("name", ["connect", "checkout", "checkin", "reset"])
def test_no_listener_takes_the_guard_off_unseen(
    cluster: Cluster[Any], make_router: MakeRouter, listen: Callable[..., None], name: str, statement: str
) -> None:
    """A reader that is promoted lets an automatic unit write nothing, although a listener resets each connection."""

    def reset(driver: Any, *_: Any) -> None:
        usual = driver.autocommit
        if driver.info.transaction_status.name != "IDLE":
            return  # DISCARD ALL needs a connection without a transaction
        driver.autocommit = True
        driver.execute(statement)
        driver.autocommit = usual

    event.listen(Engine, name, reset)
    try:
        only = cluster.readers[0]
        router = make_router(instances=[only.address], engine_options={"pool_size": 1, "max_overflow": 0})
        until_readers_serve(router, 1)
        for _ in range(2):
            with sessions(router)() as s:
                assert is_default_read_only(s)
    finally:
        event.remove(Engine, name, reset)


def test_a_statement_takes_the_guard_off_for_its_unit_alone(make_router: MakeRouter) -> None:
    """RESET ALL, which a read-only unit may execute, does not leave the connection without its guard."""
    router = make_router(engine_options={"pool_size": 1, "max_overflow": 0})
    until_readers_serve(router, 2)
    for _ in range(2):
        with sessions(router, read_only=True)() as s:
            s.execute(text("RESET ALL"))
            s.commit()
    for _ in range(2):
        with sessions(router)() as s:
            assert is_default_read_only(s)


def test_a_listener_that_begins_by_word_disturbs_no_probe(make_router: MakeRouter, listen: Callable[..., None]) -> None:
    """A transaction begun by text, unknown to the driver, is ended before the router sends anything."""
    listen(Engine, "connect", "BEGIN")
    router = make_router()
    until_readers_serve(router, 2)
    with sessions(router)() as s:
        assert s.scalar(COUNT) == 3
        assert place(s) == "reader"
    eventually(lambda: router.topology.writer is not None)


@pytest.mark.engines("postgresql", "mariadb")
@pytest.mark.parametrize("name", ["engine_connect", "begin", "after_begin"])
def test_what_a_listener_executes_holds_on_a_reader(
    cluster: Cluster[Any], make_router: MakeRouter, heard: list[events.Event], name: str
) -> None:
    """A listener's SET through SQLAlchemy sends no read to the writer. It holds for its unit, in a transaction."""
    kind = engine(cluster)
    statement = text(SET[kind])
    asked = text({"postgresql": "SHOW statement_timeout", "mariadb": "SELECT @@max_statement_time"}[kind])

    def listener(first: Any, *more: Any) -> None:
        (more[-1] if name == "after_begin" else first).execute(statement)
        if name == "engine_connect":
            first.commit()  # SQLAlchemy 2.0 warns of a transaction left open there

    target = Session if name == "after_begin" else Engine
    event.listen(target, name, listener)
    try:
        router = make_router(listeners=[heard.append], engine_options={"pool_size": 1, "max_overflow": 0})
        until_readers_serve(router, 2)
        for read_only in (None, True, None):
            with sessions(router, read_only=read_only)() as s:
                assert s.scalar(COUNT) == 3
                assert place(s) == "reader"
                driver = its_driver(s)
                assert answer(driver, asked) in (("31s",), (31.0,))
                s.commit()
        with sessions(router)() as s:
            assert s.scalar(COUNT) == 3
            assert raise_stock(s) == 11
            assert s.connection().scalar(asked) in ("31s", 31.0)
            s.commit()
    finally:
        event.remove(target, name, listener)
    assert stock(cluster) == 11
    with sessions(router)() as s:
        assert s.scalar(COUNT) == 3
        assert autocommits(its_driver(s)), "nothing is left of it for a unit without a listener"
    moved = [e for e in heard if isinstance(e, events.Moved)]
    assert len(moved) == 1
    assert not any(isinstance(e, (events.Repeated, events.MovedByListener)) for e in heard)


def its_driver(s: RoutingSession) -> Any:
    """The driver's connection of a unit on a reader, past the interceptor."""
    transaction = s.get_transaction()
    assert transaction is not None
    (driver,) = {c.connection.driver_connection for c in transaction._connections if isinstance(c, Connection)}
    return driver


def answer(driver: Any, question: Any) -> tuple[Any, ...]:
    with driver.cursor() as cursor:
        cursor.execute(question.text)
        found: tuple[Any, ...] = cursor.fetchone()
        return found


def autocommits(driver: Any) -> bool:
    return bool(driver.autocommit)


@pytest.mark.engines("postgresql", "mariadb")
@pytest.mark.parametrize("statement", ["UPDATE item SET stock = stock + 1 WHERE id = 1", "SET LOCAL shop.tenant = 'nine'"])
def test_a_listener_that_writes_takes_units_to_the_writer(
    cluster: Cluster[Any], make_router: MakeRouter, heard: list[events.Event], caplog: pytest.LogCaptureFixture, statement: str
) -> None:
    """A listener's statement that no reader may run takes its unit to the writer. The log says so once, with advice."""

    def listener(_: Any, __: Any, connection: Connection) -> None:
        connection.execute(text(statement))

    if "LOCAL" in statement and family(cluster) == "mysql":
        statement = "SET TRANSACTION ISOLATION LEVEL READ COMMITTED"
    router = make_router(listeners=[heard.append])
    until_readers_serve(router, 2)
    event.listen(Session, "after_begin", listener)
    try:
        for _ in range(3):
            with sessions(router)() as s:
                assert s.scalar(COUNT) == 3
                assert place(s) == "writer"
                s.commit()
    finally:
        event.remove(Session, "after_begin", listener)
    assert stock(cluster) == (13 if "UPDATE" in statement else 10)
    assert any(isinstance(e, events.MovedByListener) for e in heard)
    assert sum("a listener" in line for line in caplog.messages) == 1


@BOTH
@pytest.mark.parametrize("name", ["engine_connect", "begin", "after_begin"])
def test_a_listener_that_fails_gets_its_own_error(make_router: MakeRouter, heard: list[events.Event], name: str) -> None:
    """An error of a listener's statement is no failure to connect, and the unit gets that error unchanged."""

    def listener(*given: Any) -> None:
        given[-1].execute(text("SELECT nothing FROM item"))

    router = make_router(listeners=[heard.append])
    until_readers_serve(router, 2)
    target = Session if name == "after_begin" else Engine
    event.listen(target, name, listener)
    try:
        for read_only in (None, True, False):
            with sessions(router, read_only=read_only)() as s, pytest.raises(DBAPIError, match="SELECT nothing") as caught:
                s.scalar(COUNT)
            assert "nothing" in str(caught.value.orig)
            del caught
    finally:
        event.remove(target, name, listener)
    gc.collect()  # a plain engine keeps such a connection in a cycle of references, too
    assert no_connection_is_left(router)
    assert not any(isinstance(e, events.ConnectFailed) for e in heard)


@BOTH
def test_a_listeners_own_unit_fails_for_itself(make_router: MakeRouter) -> None:
    """A listener's unit that finds no writer is no failed connect of the unit that is connecting."""
    own = NoWriterAvailable(0.0, ())
    heard: list[object] = []
    router = make_router(listeners=[heard.append])
    router.start()
    me = threading.get_ident()

    def fail(*_: object) -> None:
        if threading.get_ident() == me:  # the monitor's threads make connections, too
            raise own

    event.listen(Engine, "checkout", fail)
    try:
        with sessions(router)() as s, pytest.raises(NoWriterAvailable) as caught:
            s.execute(COUNT)
    finally:
        event.remove(Engine, "checkout", fail)
    assert caught.value is own
    assert not [each for each in heard if isinstance(each, events.ConnectFailed)]


@pytest.mark.parametrize("level", ["repeatable read", "serializable", "read committed"])
@pytest.mark.parametrize("access", ["on", "off"])
def test_a_promoted_connection_has_its_listeners_settings(cluster: Cluster[Any], level: str, access: str) -> None:
    """A connection that was made to a reader has the settings of its listener again when it is to write."""
    with contextlib.closing(cluster.readers[0].connect()) as driver:
        driver.execute(f"SET default_transaction_isolation = '{level}'")
        driver.execute(f"SET default_transaction_read_only = {access}")
        driver.execute(postgresql.identify_sql(0, "session"), prepare=False)
        for _ in range(2):
            driver.execute(postgresql.SET_DEFAULT_READ_ONLY, prepare=False)
            assert driver.execute("SHOW transaction_read_only").fetchone() == ("on",)
        driver.execute(postgresql.SET_DEFAULT_READ_WRITE, prepare=False)
        assert driver.execute("SHOW default_transaction_isolation").fetchone() == (level,)
        assert driver.execute("SHOW default_transaction_read_only").fetchone() == (access,)
