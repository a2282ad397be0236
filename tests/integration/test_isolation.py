"""Isolation levels that a reader cannot have: set on the engine, by a unit, or as the server's default."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from psycopg import IsolationLevel
from sqlalchemy import event, text
from sqlalchemy.engine import Engine

from aurora_router import NoReaderAvailable, Reason, Router, RoutingSession
from aurora_router.local.cluster import Cluster
from aurora_router.router import core_of
from tests.integration.shop import (
    BOTH,
    engine,
    eventually,
    in_a_read_only_transaction,
    place,
    raise_stock,
    sessions,
    until_readers_serve,
)

MakeRouter = Callable[..., Router]

SERIALIZABLE = {"isolation_level": "SERIALIZABLE"}
COUNT = text("SELECT count(*) FROM item")

_DEFAULT = {
    "postgresql": "ALTER ROLE app SET default_transaction_isolation = 'serializable'",
    "mariadb": "SET GLOBAL tx_isolation = 'SERIALIZABLE'",
    "mysql": "SET GLOBAL transaction_isolation = 'SERIALIZABLE'",
}
_USUAL = {
    "postgresql": "ALTER ROLE app RESET default_transaction_isolation",
    "mariadb": "SET GLOBAL tx_isolation = 'REPEATABLE-READ'",
    "mysql": "SET GLOBAL transaction_isolation = 'REPEATABLE-READ'",
}


@pytest.fixture
def by_default(cluster: Cluster[Any]) -> Iterator[None]:
    """Make SERIALIZABLE the default level of the application's user."""
    on = [cluster.writer] if engine(cluster) == "postgresql" else cluster.instances
    for instance in on:
        cluster.execute(_DEFAULT[engine(cluster)], instance=instance)
    cluster.wait_in_sync()
    yield
    for instance in on if len(on) > 1 else [cluster.writer]:
        cluster.execute(_USUAL[engine(cluster)], instance=instance)
    cluster.wait_in_sync()


def level(s: RoutingSession) -> str:
    found: str = s.connection().get_isolation_level()
    return found


def where(router: Router, **options: Any) -> str:
    """Return the place where a unit of one read runs."""
    with sessions(router, **options)() as s:
        assert s.scalar(COUNT) == 3
        return place(s)


@BOTH
def test_serializable_as_an_engine_option(cluster: Cluster[Any], make_router: MakeRouter) -> None:
    """Every unit runs at the level asked for. A read-only unit runs on a reader if readers can have the level."""
    router = make_router(engine_options=SERIALIZABLE)
    until_readers_serve(router, 2)
    allowed = "writer" if engine(cluster) == "postgresql" else "reader"
    with sessions(router, read_only=True)() as s:
        assert s.scalar(COUNT) == 3
        assert place(s) == allowed
        assert level(s) == "SERIALIZABLE"
        assert in_a_read_only_transaction(s.connection())
    assert router.run_transaction(sessions(router, read_only=True), lambda s: s.scalar(COUNT)) == 3
    assert where(router) == "writer"
    with sessions(router)() as s:
        assert raise_stock(s) == 11
        assert level(s) == "SERIALIZABLE"
    with router.connect(read_only=True) as connection:
        assert connection.scalar(COUNT) == 3
    assert router.explain("SELECT 1", read_only=True).reason is (
        Reason.ISOLATION if allowed == "writer" else Reason.DECLARED_READ_ONLY
    )


def test_a_level_that_only_the_writer_has_is_refused(make_router: MakeRouter) -> None:
    """With no_reader="error" reads at a level that readers lack are refused, and the error says what to do."""
    router = make_router(engine_options=SERIALIZABLE, no_reader="error")
    until_readers_serve(router, 2)
    with sessions(router, read_only=True)() as s, pytest.raises(NoReaderAvailable, match=r"SERIALIZABLE.*REPEATABLE READ"):
        s.scalar(COUNT)
    with pytest.raises(NoReaderAvailable, match="SERIALIZABLE"):
        router.connect(read_only=True)
    assert router.explain("SELECT 1", read_only=True).instance is None
    with sessions(router)() as s:
        assert raise_stock(s) == 11


@BOTH
@pytest.mark.parametrize("asked", ["READ COMMITTED", "SERIALIZABLE", "AUTOCOMMIT"])
def test_the_engines_level_comes_back_after_another(make_router: MakeRouter, asked: str) -> None:
    """A unit may ask for another level than the engine's. The next unit of the same connection has the engine's again."""
    router = make_router(engine_options={"isolation_level": "REPEATABLE READ", "pool_size": 1, "max_overflow": 0})
    until_readers_serve(router, 2)
    for _ in range(2):
        for read_only in (False, None, True):
            with sessions(router, read_only=read_only)() as s:
                s.connection(execution_options={"isolation_level": asked})
                assert s.scalar(COUNT) == 3
                s.commit()
    with router.connect() as connection:
        connection.execution_options(isolation_level=asked).scalar(COUNT)
    with sessions(router, read_only=False)() as s:
        assert level(s) == "REPEATABLE READ"


@BOTH
@pytest.mark.usefixtures("by_default")
def test_serializable_as_the_default_takes_no_reader_away(cluster: Cluster[Any], make_router: MakeRouter) -> None:
    """Probes and new connections name their own level. Units that ask for none have the default, on the writer if necessary."""
    router = make_router()
    until_readers_serve(router, 2)
    assert where(router) == "writer"
    assert where(router, read_only=True) == ("writer" if engine(cluster) == "postgresql" else "reader")
    with sessions(router, read_only=True)() as s:
        s.scalar(COUNT)
        assert level(s) == "SERIALIZABLE"
    with sessions(router, read_only=True)() as s:
        s.connection(execution_options={"isolation_level": "REPEATABLE READ"})
        assert s.scalar(COUNT) == 3
        assert place(s) == "reader"
        assert level(s) == "REPEATABLE READ"
    with sessions(router)() as s:
        assert raise_stock(s) == 11
        assert level(s) == "SERIALIZABLE"


@BOTH
@pytest.mark.usefixtures("by_default")
@pytest.mark.parametrize("asked", ["READ COMMITTED", "AUTOCOMMIT"])
def test_readers_serve_those_who_ask_for_less(make_router: MakeRouter, asked: str) -> None:
    """Reads in autocommit run on a reader although the default of its connections would be SERIALIZABLE."""
    router = make_router(engine_options={"isolation_level": asked, "pool_size": 1})
    until_readers_serve(router, 2)
    for _ in range(3):
        assert where(router) == "reader"
        assert where(router, read_only=True) == "reader"
    with router.connect(read_only=True) as connection:
        assert connection.scalar(COUNT) == 3


@pytest.mark.usefixtures("by_default")
def test_statements_that_are_prepared_at_once(make_router: MakeRouter) -> None:
    """A text of several statements sets the level, and it is not prepared even with prepare_threshold=0."""
    options = {"isolation_level": "READ COMMITTED", "connect_args": {"prepare_threshold": 0}}
    router = make_router(engine_options=options)
    until_readers_serve(router, 2)
    assert where(router) == "reader"


@pytest.mark.usefixtures("by_default")
def test_a_promoted_readers_connection_has_its_default_back(cluster: Cluster[Any], make_router: MakeRouter) -> None:
    """A connection that was made to a reader runs at the default level once its server is the writer."""
    only = cluster.readers[0]
    router = make_router(instances=[only.address], engine_options={"pool_size": 1, "max_overflow": 0})
    until_readers_serve(router, 1)
    lower = {"isolation_level": "REPEATABLE READ"}
    with sessions(router, read_only=True)() as s:
        number = s.connection(execution_options=lower).scalar(text("SELECT pg_backend_pid()"))
        assert place(s) == "reader"
    cluster.kill(cluster.writer)
    cluster.promote(only)
    eventually(lambda: router.topology.writer is not None and router.topology.writer.id == only.address)
    with sessions(router, read_only=False)() as s:
        assert s.scalar(text("SHOW transaction_isolation")) == "serializable"
        assert s.scalar(text("SHOW default_transaction_read_only")) == "off"
        assert s.scalar(text("SELECT pg_backend_pid()")) == number
        assert raise_stock(s) == 11


@BOTH
def test_a_connection_that_asks_for_too_much_can_go_on(cluster: Cluster[Any], make_router: MakeRouter) -> None:
    """A level that the reader lacks is refused, the error says what to do, and the connection stays usable."""
    router = make_router()
    until_readers_serve(router, 2)
    with router.connect(read_only=True) as connection:
        if engine(cluster) == "postgresql":
            with pytest.raises(NoReaderAvailable, match=r"SERIALIZABLE.*REPEATABLE READ, or use router\.connect\(\)"):
                connection.execution_options(isolation_level="SERIALIZABLE")
        else:
            assert connection.execution_options(isolation_level="SERIALIZABLE").scalar(COUNT) == 3
            connection.rollback()
        connection.execution_options(isolation_level="REPEATABLE READ")
        assert connection.scalar(COUNT) == 3
    with router.connect() as connection:
        assert connection.execution_options(isolation_level="SERIALIZABLE").scalar(COUNT) == 3
    assert where(router) == "reader"


@pytest.mark.parametrize("read_only", [None, True])
def test_a_default_that_was_left_behind_is_set_back(make_router: MakeRouter, read_only: bool | None) -> None:
    """If SERIALIZABLE was left as the default of a pooled connection to a reader, the next unit gets no error."""
    router = make_router()
    until_readers_serve(router, 2)
    everywhere = [router.raw_connection(read_only=True) for _ in range(4)]
    for raw in everywhere:
        raw.driver_connection.execute("SET default_transaction_isolation = 'serializable'")
        raw.driver_connection.commit()
        raw.close()
    assert [where(router, read_only=read_only) for _ in range(8)] == ["reader"] * 8
    assert not core_of(router).interceptor.known.rejected


@BOTH
def test_a_level_that_a_listener_asks_for_is_seen(cluster: Cluster[Any], make_router: MakeRouter) -> None:
    """A level that a listener sets on each new connection keeps units on the writer, like one that the engine is made with."""

    def ask_for_serializable(driver: Any, _: Any) -> None:
        if engine(cluster) == "postgresql":
            driver.isolation_level = IsolationLevel.SERIALIZABLE
        else:
            driver.query("SET SESSION TRANSACTION ISOLATION LEVEL SERIALIZABLE")

    event.listen(Engine, "connect", ask_for_serializable)
    try:
        router = make_router()
        until_readers_serve(router, 2)
        assert where(router) == "writer"
        assert where(router, read_only=True) == ("writer" if engine(cluster) == "postgresql" else "reader")
    finally:
        event.remove(Engine, "connect", ask_for_serializable)
