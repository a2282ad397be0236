"""Statements that the driver keeps prepared, and tables that change under them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import psycopg
import pytest
from sqlalchemy import FetchedValue, exc, select, text
from sqlalchemy.engine import Connection
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, sessionmaker

from aurora_router import Failure, Router, RoutingSession, classify_error
from aurora_router.cluster.error_classification import failure_of
from aurora_router.core import events
from aurora_router.local import PostgresCluster
from aurora_router.router import core_of
from aurora_router.routing import known_statements
from tests.integration.shop import BOTH, Item, eventually, instance_id, place, until_readers_serve

MakeRouter = Callable[..., Router]

AT_ONCE = {"prepare_threshold": 0}
"""Have psycopg prepare each statement when it is executed first."""


@pytest.fixture
def change(cluster: PostgresCluster) -> Callable[[], None]:
    """Change a column's type, so rows no longer fit the statements that were prepared before."""
    types = ["varchar(300)", "text"] * 4

    def do() -> None:
        cluster.execute(f"ALTER TABLE item ALTER name TYPE {types.pop()}")
        cluster.wait_in_sync()

    do()
    return do


@pytest.fixture
def prepared(make_router: MakeRouter, heard: list[events.Event], cluster: PostgresCluster) -> Router:
    """A router with one reader, whose connections prepare every statement."""
    only = [cluster.readers[0].address]
    router = make_router(instances=only, listeners=[heard.append], engine_options={"connect_args": AT_ONCE})
    until_readers_serve(router, 1)
    return router


def read(s: RoutingSession) -> str:
    found: str = s.execute(select(Item.name).where(Item.id == 1)).scalar_one()
    return found


def kinds(heard: list[events.Event]) -> list[str]:
    return [type(event).__name__ for event in heard]


@pytest.mark.parametrize("read_only", [None, True])
def test_a_read_outlives_a_change_of_its_table(
    prepared: Router, change: Callable[[], None], heard: list[events.Event], read_only: bool | None
) -> None:
    """After ALTER TABLE a read is retried on the same reader. The reader is not avoided, and nothing is learned."""
    Session = sessionmaker(class_=RoutingSession, router=prepared, read_only=read_only)
    with Session.begin() as one, Session.begin() as two, Session.begin() as three:  # three connections have it prepared
        assert [read(s) for s in (one, two, three)] == ["one"] * 3
    change()
    heard.clear()
    for _ in range(4):
        with Session() as s:
            assert read(s) == "one"
            assert place(s) == "reader"
    assert kinds(heard).count("Repeated") == 1, "the first that failed has told the other connections"
    assert "Learned" not in kinds(heard)
    assert not core_of(prepared).interceptor.known.rejected


@pytest.fixture
def renew_types(cluster: PostgresCluster) -> Iterator[Callable[[], None]]:
    """Make two types of the user's own anew, under the same names."""
    drop = "DROP TYPE IF EXISTS kind; DROP DOMAIN IF EXISTS word"

    def do() -> None:
        cluster.execute(f"{drop}; CREATE TYPE kind AS ENUM ('a', 'b'); CREATE DOMAIN word AS text")
        cluster.wait_in_sync()

    do()
    yield do
    cluster.execute(drop)


@pytest.mark.parametrize("read_only", [None, True, False])
@pytest.mark.parametrize(
    "sql",
    ["SELECT CAST(:x AS kind) = 'a'", "SELECT CAST(:x AS kind)", "SELECT CAST(CAST(:x AS text) AS word)", "SELECT 'a'::kind"],
)
def test_a_read_outlives_a_type_that_is_made_anew(
    prepared: Router, renew_types: Callable[[], None], heard: list[events.Event], sql: str, read_only: bool | None
) -> None:
    """After a migration makes a type anew, a read prepared with the old one is retried once where it was."""
    Session = sessionmaker(class_=RoutingSession, router=prepared, read_only=read_only)
    given = {"x": "a"} if ":x" in sql else {}
    with Session.begin() as one, Session.begin() as two:  # A rollback would drop the prepared statements.
        assert one.execute(text(sql), given).all() == two.execute(text(sql), given).all()
    renew_types()
    heard.clear()
    for _ in range(4):
        with Session() as s:
            assert len(s.execute(text(sql), given).all()) == 1
            assert place(s) == ("writer" if read_only is False else "reader")
    assert kinds(heard).count("Repeated") == 1
    assert not core_of(prepared).interceptor.known.rejected


@pytest.fixture
def code(cluster: PostgresCluster) -> Iterator[None]:
    """A table whose only column is a text until a test changes its type."""
    cluster.execute("CREATE TABLE code (v text); INSERT INTO code VALUES ('7'); GRANT SELECT ON code TO app")
    cluster.wait_in_sync()
    yield
    cluster.execute("DROP TABLE code")


@pytest.mark.usefixtures("code")
def test_a_parameter_of_the_old_type_goes_to_the_writer_once(prepared: Router, cluster: PostgresCluster) -> None:
    """A statement that was prepared for a text is refused once on each connection after the change, and read on the writer."""
    Session = sessionmaker(class_=RoutingSession, router=prepared)

    def count() -> tuple[int, str]:
        with Session() as s:
            found: int = s.scalar(text("SELECT count(*) FROM code WHERE v = :v"), {"v": "7"})
            return found, place(s)

    assert count() == (1, "reader")
    cluster.execute("ALTER TABLE code ALTER v TYPE int USING v::int")
    cluster.wait_in_sync()
    assert [count() for _ in range(3)] == [(1, "writer"), (1, "reader"), (1, "reader")]


TOTAL = """
    CREATE FUNCTION total() RETURNS int STABLE LANGUAGE plpgsql AS $$
    DECLARE r record; n int := 0; BEGIN FOR r IN SELECT v FROM code LOOP n := n + r.v::int; END LOOP; RETURN n; END $$"""


@pytest.mark.usefixtures("code")
@pytest.mark.parametrize("read_only", [None, True, False])
def test_a_read_outlives_the_kept_plan_of_a_function(
    make_router: MakeRouter, cluster: PostgresCluster, heard: list[events.Event], read_only: bool | None
) -> None:
    """A PL/pgSQL function whose plan is for a column's old type is called again once, on all connections."""
    router = make_router(instances=[cluster.readers[0].address], listeners=[heard.append], read_only_functions=["total"])
    until_readers_serve(router, 1)
    Session = sessionmaker(class_=RoutingSession, router=router, read_only=read_only)
    cluster.execute(TOTAL)
    cluster.wait_in_sync()
    try:
        with Session.begin() as one, Session.begin() as two:
            assert [s.scalar(text("SELECT total()")) for s in (one, two)] == [7, 7]
        cluster.execute("ALTER TABLE code ALTER v TYPE int USING v::int")
        cluster.wait_in_sync()
        heard.clear()
        for _ in range(4):
            with Session() as s:
                assert s.scalar(text("SELECT total()")) == 7
    finally:
        cluster.execute("DROP FUNCTION total")
    assert kinds(heard).count("Repeated") == 1


def test_a_stream_and_a_change_of_its_table(prepared: Router, change: Callable[[], None], heard: list[events.Event]) -> None:
    """A unit that has an unread stream retries an outdated statement, and the stream goes on."""
    Session = sessionmaker(class_=RoutingSession, router=prepared)
    with Session() as s:
        read(s)
        stream = s.execute(text("SELECT g FROM generate_series(1, 1000) g"), execution_options={"yield_per": 10})
        assert stream.fetchone() == (1,)
        change()
        assert read(s) == "one"
        assert place(s) == "reader"
        assert sum(1 for _ in stream) == 999
    assert "Learned" not in kinds(heard)


def test_run_transaction_outlives_a_change_of_a_table(prepared: Router, change: Callable[[], None]) -> None:
    """On the writer the transaction is lost, and run_transaction runs it once more, however many connections are outdated."""
    Session = sessionmaker(class_=RoutingSession, router=prepared, read_only=False)
    runs = 0

    def work(s: RoutingSession) -> str:
        nonlocal runs
        runs += 1
        s.execute(text("UPDATE item SET stock = stock + 1 WHERE id = 1"))
        return read(s)

    # A rollback would drop the prepared statements.
    with Session.begin() as one, Session.begin() as two, Session.begin() as three:
        assert [read(s) for s in (one, two, three)] == ["one"] * 3
    change()
    assert prepared.run_transaction(Session, work) == "one"
    assert runs == 2
    assert prepared.run_transaction(Session, work) == "one"
    assert runs == 3


RETURNING = text("UPDATE item SET stock = stock + 1 WHERE id = 1 RETURNING name, stock")


@pytest.mark.parametrize("read_only", [None, False])
def test_a_first_write_outlives_a_change_of_its_table(
    prepared: Router, change: Callable[[], None], heard: list[events.Event], read_only: bool | None
) -> None:
    """A plain session retries an outdated first write once, because the server has executed nothing of the transaction."""
    Session = sessionmaker(class_=RoutingSession, router=prepared, read_only=read_only)
    with Session.begin() as s:  # A rollback would drop the prepared statements.
        s.execute(RETURNING)
    change()
    heard.clear()
    with Session.begin() as s:
        assert s.execute(RETURNING).one() == ("one", 12)
    assert kinds(heard).count("Repeated") == 1
    with Session() as s:
        assert s.scalar(text("SELECT stock FROM item WHERE id = 1 FOR UPDATE")) == 12


def test_a_later_write_does_not_lose_what_came_before(prepared: Router, change: Callable[[], None]) -> None:
    """A plain session raises the error of a later write, because the transaction's earlier writes are lost with it."""
    Session = sessionmaker(class_=RoutingSession, router=prepared)
    with Session.begin() as s:
        s.execute(RETURNING)
    change()
    with Session() as s:
        s.execute(text("UPDATE item SET stock = 0 WHERE id = 2"))
        with pytest.raises(exc.NotSupportedError) as caught:
            s.execute(RETURNING)
    assert classify_error(caught.value).safe_to_repeat


class Named(DeclarativeBase):
    pass


class Thing(Named):
    """An item whose name the server chooses and returns from the INSERT."""

    __tablename__ = "item"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(server_default=FetchedValue())


@pytest.mark.parametrize("flush", [RoutingSession.flush, read], ids=["flush", "autoflush"])
def test_a_flush_tells_that_its_table_has_changed(
    prepared: Router, change: Callable[[], None], flush: Callable[[RoutingSession], object]
) -> None:
    """SQLAlchemy has rolled back by then, so nothing is retried. The error is the server's own, and the next unit succeeds."""
    Session = sessionmaker(class_=RoutingSession, router=prepared)
    with Session.begin() as s:
        s.add(Thing(id=7))
    change()
    with Session() as s:
        s.add(Thing(id=8))
        with pytest.raises(exc.NotSupportedError) as caught:
            flush(s)
    assert classify_error(caught.value).safe_to_repeat
    with Session.begin() as s:
        s.add(Thing(id=8))


@pytest.mark.parametrize("read_only", [True, False])
def test_a_connection_tells_that_a_table_has_changed(prepared: Router, change: Callable[[], None], read_only: bool) -> None:
    """Without a session the error is the application's. It says that the unit may be run again, which then succeeds."""

    def read_on(connection: Connection) -> str:
        found: str = connection.execute(text("SELECT name FROM item WHERE id = 1")).scalar_one()
        return found

    with prepared.begin(read_only=read_only) as one, prepared.begin(read_only=read_only) as two:
        assert read_on(one) == read_on(two) == "one"
    change()
    with prepared.connect(read_only=read_only) as connection, pytest.raises(exc.NotSupportedError) as caught:
        read_on(connection)
    facts = classify_error(caught.value)
    assert facts.failure is Failure.OUTDATED
    assert facts.safe_to_repeat
    for _ in range(3):
        with prepared.connect(read_only=read_only) as connection:
            assert read_on(connection) == "one"


def test_a_connection_in_autocommit_goes_on(prepared: Router, change: Callable[[], None]) -> None:
    """A connection without a transaction to roll back fails only once, and need not be closed."""
    with prepared.connect(read_only=True) as connection:
        connection.execution_options(isolation_level="AUTOCOMMIT")
        query = text("SELECT name FROM item WHERE id = 1")
        assert connection.execute(query).scalar_one() == "one"
        change()
        with pytest.raises(exc.NotSupportedError):
            connection.execute(query)
        assert connection.execute(query).scalar_one() == "one"


def test_a_statement_that_a_pooler_has_lost_is_repeated(prepared: Router, heard: list[events.Event]) -> None:
    """A prepared statement that the server lacks, as behind a pooler, is prepared anew on the same reader."""
    Session = sessionmaker(class_=RoutingSession, router=prepared)
    with Session() as s:
        read(s)
        for dbapi in s.get_transaction()._connections:  # psycopg does not notice this.
            driver = dbapi.connection.driver_connection if isinstance(dbapi, Connection) else None
            if driver is not None:
                driver.pgconn.exec_(b"DEALLOCATE ALL")
        heard.clear()
        assert read(s) == "one"
        assert place(s) == "reader"
    assert kinds(heard)[0] == "Repeated"
    assert not core_of(prepared).interceptor.known.rejected


def test_an_application_that_prepares_nothing_itself_fails_once(prepared: Router) -> None:
    """EXECUTE of a statement that the application has not prepared is its own mistake: run_transaction runs it once."""
    runs = 0

    def work(s: RoutingSession) -> None:
        nonlocal runs
        runs += 1
        s.execute(text("EXECUTE nothing"))

    with pytest.raises(exc.DBAPIError, match="nothing") as caught:
        prepared.run_transaction(sessionmaker(class_=RoutingSession, router=prepared), work)
    assert classify_error(caught.value).failure is Failure.OTHER
    assert runs == 1


def test_an_outdated_plan_is_known_in_any_language(cluster: PostgresCluster, change: Callable[[], None]) -> None:
    """An outdated plan is recognized by the server's function, whose name lc_messages does not translate."""
    with psycopg.connect(cluster.url.replace("+psycopg", ""), autocommit=True) as connection:
        connection.execute("SELECT name FROM item", prepare=True)
        change()
        with pytest.raises(psycopg.errors.FeatureNotSupported) as caught:
            connection.execute("SELECT name FROM item", prepare=True)
    assert caught.value.diag.source_function == "RevalidateCachedQuery"
    assert failure_of(caught.value, disconnected=False) is Failure.OUTDATED


@BOTH
def test_what_a_reader_refused_is_tried_again_later(
    cluster: PostgresCluster, make_router: MakeRouter, heard: list[events.Event], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A text that a reader has refused goes to the writer for a while, and then to a reader again."""
    monkeypatch.setattr(known_statements, "REJECTED_SECONDS", 600.0)
    router = make_router(listeners=[heard.append])
    until_readers_serve(router, 2)
    sql = "SELECT count(*) FROM item"
    core_of(router).interceptor.known.remember_rejected(sql)
    Session = sessionmaker(class_=RoutingSession, router=router)
    with Session() as s:
        s.execute(text(sql))
        assert place(s) == "writer"
    assert router.explain(sql).instance is router.topology.writer
    monkeypatch.setattr(known_statements, "REJECTED_SECONDS", 0.0)
    eventually(lambda: router.explain(sql).instance is not router.topology.writer)
    with Session() as s:
        s.execute(text(sql))
        assert place(s) == "reader"
        assert instance_id(s) in {reader.address for reader in cluster.readers}


def test_a_view_that_a_late_reader_lacks_is_no_lesson(cluster: PostgresCluster, make_router: MakeRouter) -> None:
    """A view that a late reader has not filled is read elsewhere until that reader has caught up."""
    reader = cluster.readers[0]
    router = make_router(instances=[reader.address])
    until_readers_serve(router, 1)
    cluster.execute("CREATE MATERIALIZED VIEW filled_later AS SELECT 1 AS a WITH NO DATA")
    try:
        cluster.execute("GRANT SELECT ON filled_later TO app")
        cluster.wait_in_sync()
        cluster.pause_replay(reader)
        cluster.execute("REFRESH MATERIALIZED VIEW filled_later")
        found = []
        for _ in range(2):
            with RoutingSession(router=router) as s:
                found.append((s.scalar(text("SELECT a FROM filled_later")), place(s)))
            cluster.resume_replay(reader)
            cluster.wait_in_sync()
        assert found == [(1, "writer"), (1, "reader")]
    finally:
        cluster.resume_replay(reader)
        cluster.execute("DROP MATERIALIZED VIEW filled_later")
