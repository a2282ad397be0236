"""RoutingSession on a real cluster: it sends each statement to the right place, and stays SQLAlchemy's session."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import create_engine, delete, exc, func, insert, inspect, literal, select, text, update
from sqlalchemy.orm import Session as PlainSession
from sqlalchemy.orm import joinedload, selectinload, sessionmaker

from aurora_router import ConfigurationError, ReadOnlyViolation, Reason, Router, RoutingMixin, RoutingSession
from aurora_router.core import events
from aurora_router.local import PostgresCluster
from aurora_router.router import core_of
from aurora_router.routing.stale_writes import on_before_flush
from tests.integration.shop import (
    BOTH,
    Base,
    Item,
    Part,
    eventually,
    in_a_read_only_transaction,
    instance_id,
    no_connection_is_left,
    open_transactions,
    place,
    until_readers_serve,
)

Sessions = sessionmaker[RoutingSession]
MakeRouter = Callable[..., Router]


def run_core_select(s: RoutingSession) -> object:
    return s.execute(select(Item.__table__)).all()


READS: dict[str, Callable[[RoutingSession], object]] = {
    "select of a class": lambda s: s.scalars(select(Item)).all(),
    "select of a table": run_core_select,
    "select with literal words": lambda s: s.execute(select(literal("for update; DELETE FROM item"))).all(),
    "text": lambda s: s.execute(text("SELECT * FROM item WHERE id = :id"), {"id": 1}).all(),
    "scalar": lambda s: s.scalar(select(func.count()).select_from(Item)),
    "get": lambda s: s.get(Item, 1),
    "lazy load": lambda s: s.get_one(Item, 1).parts,
    "selectin load": lambda s: s.scalars(select(Item).options(selectinload(Item.parts))).all(),
    "joined load": lambda s: s.scalars(select(Item).options(joinedload(Item.parts))).unique().all(),
    "refresh": lambda s: s.refresh(s.get_one(Item, 1)),
    "query": lambda s: s.query(Item).filter(Item.id == 1).one(),
    "yield_per": lambda s: list(s.scalars(select(Item).execution_options(yield_per=2))),
    "cte": lambda s: s.execute(select(select(Item.id).cte("c").c.id)).all(),
    "union": lambda s: s.execute(select(Item.id).union(select(Part.id))).all(),
    "harmless function": lambda s: s.execute(select(func.now(), func.lower("A"))).all(),
    "a function by itself": lambda s: s.scalar(func.now()),
}

WRITES: dict[str, Callable[[RoutingSession], object]] = {
    "flush": lambda s: (s.add(Item(id=9)), s.flush()),
    "insert": lambda s: s.execute(insert(Item).values(id=9)),
    "insert returning": lambda s: s.scalars(insert(Item).values(id=9).returning(Item)).one(),
    "update": lambda s: s.execute(update(Item).values(stock=1)),
    "delete": lambda s: s.execute(delete(Part)),
    "text": lambda s: s.execute(text("INSERT INTO item (id) VALUES (9)")),
    "for update": lambda s: s.execute(select(Item).with_for_update()).all(),
    "get for update": lambda s: s.get(Item, 1, with_for_update=True),
    "refresh for update": lambda s: s.refresh(s.get_one(Item, 1), with_for_update=True),
    "a cte that writes": lambda s: s.execute(select(insert(Item).values(id=9).returning(Item.id).cte("c").c.id)).all(),
    "nextval": lambda s: s.execute(select(func.nextval("ticket"))).all(),
    "nextval by itself": lambda s: s.scalar(func.nextval("ticket")),
    "an unknown function": lambda s: s.execute(text("SELECT pg_advisory_xact_lock(1)")),
    "settings": lambda s: s.execute(text("SET LOCAL work_mem = '8MB'")),
    "connection": lambda s: s.connection().exec_driver_sql("SELECT 1"),
    "savepoint": lambda s: (s.begin_nested(), s.execute(text("SELECT 1"))),
    "bulk insert": lambda s: s.bulk_insert_mappings(inspect(Item), [{"id": 9, "name": "n", "stock": 1}]),
    "bulk save": lambda s: s.bulk_save_objects([Item(id=9)]),
    "server question": lambda s: s.scalar(text("SELECT pg_is_in_recovery()")),
}


_OF_MARIADB: dict[str, Callable[[RoutingSession], object]] = {
    "a cte that writes": lambda s: s.execute(text("WITH c AS (SELECT 1 AS id) SELECT item.id FROM item, c FOR UPDATE")),
    "nextval": lambda s: s.execute(text("SELECT nextval(ticket)")).all(),
    "nextval by itself": lambda s: s.scalar(text("SELECT NEXT VALUE FOR ticket")),
    "an unknown function": lambda s: s.execute(text("SELECT get_lock('a', 0)")),
    "settings": lambda s: s.execute(text("SET SESSION sort_buffer_size = 1048576")),
    "server question": lambda s: s.scalar(text("SELECT @@global.read_only")),
}
_OF_MYSQL: dict[str, Callable[[RoutingSession], object]] = {
    **_OF_MARIADB,
    "insert returning": lambda s: s.execute(text("REPLACE INTO item (id) VALUES (9)")),
    "nextval": lambda s: s.execute(text("SELECT nextval()")).all(),
    "nextval by itself": lambda s: s.scalar(text("SELECT nextval()")),
}
_OF = {"postgresql": WRITES, "mariadb": _OF_MARIADB, "mysql": _OF_MYSQL}


def write(what: str, s: RoutingSession) -> object:
    """Run the write of that name, in the variant for the router's engine."""
    return (_OF[core_of(s.router).settings.target.dialect].get(what) or WRITES[what])(s)


@BOTH
@pytest.mark.parametrize("what", READS)
def test_a_read_runs_on_a_reader(Session: Sessions, what: str) -> None:
    with Session() as s:
        READS[what](s)
        assert place(s) == "reader"


@BOTH
@pytest.mark.parametrize("what", WRITES)
def test_what_is_not_a_read_runs_on_the_writer(Session: Sessions, what: str) -> None:
    with Session() as s:
        write(what, s)
        assert place(s) == "writer"


@pytest.mark.parametrize("what", WRITES)
def test_a_unit_moves_to_the_writer_at_its_first_non_read(Session: Sessions, what: str) -> None:
    """A unit moves to the writer at the first statement that is no read, and stays there."""
    with Session() as s:
        s.scalar(select(func.count()).select_from(Item))
        assert place(s) == "reader"
        write(what, s)
        assert place(s) == "writer"
        s.scalar(select(func.count()).select_from(Part))
        assert place(s) == "writer"
        s.rollback()
        assert place(s) == "nowhere"


@pytest.mark.parametrize("what", [*READS, *WRITES])
def test_declared_as_writing_everything_runs_on_the_writer(Session: Sessions, what: str) -> None:
    with Session(read_only=False) as s:
        (READS.get(what) or WRITES[what])(s)
        assert place(s) == "writer"


@pytest.mark.parametrize("what", READS)
def test_a_declared_read_only_unit_has_one_read_only_reader(Session: Sessions, what: str) -> None:
    """One reader serves a unit that is declared read-only, in a read-only transaction."""
    with Session(read_only=True) as s:
        READS[what](s)
        assert place(s) == "reader"
        assert in_a_read_only_transaction(s.connection())
        first = instance_id(s)
        READS[what](s)
        assert instance_id(s) == first


@BOTH
@pytest.mark.parametrize(
    "what", ["flush", "insert", "update", "delete", "text", "for update", "a cte that writes", "nextval", "bulk save"]
)
def test_declared_read_only_a_write_is_refused_before_it_is_sent(cluster: PostgresCluster, Session: Sessions, what: str) -> None:
    with Session(read_only=True) as s, pytest.raises(ReadOnlyViolation, match="was not sent"):
        write(what, s)
    assert cluster.execute("SELECT count(*) FROM item") == [(3,)]


def test_a_read_only_unit_may_use_settings_and_savepoints(Session: Sessions) -> None:
    """Settings and savepoints of the transaction are allowed in a unit that is declared read-only."""
    with Session(read_only=True) as s:
        s.execute(text("SET LOCAL work_mem = '8MB'"))
        with s.begin_nested():
            assert s.scalar(text("SHOW work_mem")) == "8MB"
        assert place(s) == "reader"


def test_one_statement_may_be_declared(Session: Sessions) -> None:
    with Session() as s:
        s.execute(text("SELECT 1"), bind_arguments={"read_only": True})
        assert place(s) == "reader"
        s.execute(text("SELECT 1"), bind_arguments={"read_only": False})
        assert place(s) == "writer"
        s.execute(text("SELECT 1"), bind_arguments={"read_only": True})
        assert place(s) == "writer", "the unit has been moved and stays"


@pytest.mark.parametrize("statement", [text("SELECT 1"), text("SELECT 1 /*@reader*/")])
def test_the_option_route_sends_a_read_to_the_writer(Session: Sessions, statement: Any) -> None:
    with Session() as s:
        s.execute(statement.execution_options(route="writer"))
        assert place(s) == "writer"
    with Session() as s:
        s.execute(statement, execution_options={"route": "writer"})
        assert place(s) == "writer"


def test_a_comment_sends_a_read_to_the_writer(Session: Sessions) -> None:
    with Session() as s:
        s.execute(text("/*@writer*/ SELECT 1"))
        assert place(s) == "writer"


def test_a_hint_sends_an_undecidable_statement_to_a_reader(cluster: PostgresCluster, Session: Sessions) -> None:
    cluster.execute("CREATE OR REPLACE FUNCTION extra.peek() RETURNS bigint LANGUAGE sql AS 'SELECT count(*) FROM item'")
    cluster.wait_in_sync()
    with Session() as s:
        assert s.scalar(text("SELECT extra.peek()")) == 3
        assert place(s) == "writer"
    for statement in (text("SELECT extra.peek()").execution_options(route="reader"), text("SELECT /*@reader*/ extra.peek()")):
        with Session() as s:
            assert s.scalar(statement) == 3
            assert place(s) == "reader"


@pytest.mark.parametrize("sql", ["INSERT INTO item (id) VALUES (9)", "SELECT nextval('ticket')", "SELECT 1 FOR UPDATE"])
def test_no_hint_sends_a_write_to_a_reader(Session: Sessions, sql: str) -> None:
    with Session() as s:
        s.execute(text(sql + " /*@reader*/").execution_options(route="reader"))
        assert place(s) == "writer"
    with Session() as s:
        s.execute(text(sql), bind_arguments={"read_only": True})
        assert place(s) == "writer"


def test_a_hint_that_is_none_is_refused(Session: Sessions) -> None:
    with Session() as s, pytest.raises(ConfigurationError, match="writer"):
        s.execute(text("SELECT 1").execution_options(route="primary-ish"))


def test_a_stable_function_is_a_read_because_the_catalog_says_so(cluster: PostgresCluster, make_router: MakeRouter) -> None:
    cluster.execute("""
        CREATE OR REPLACE FUNCTION extra.lookup() RETURNS bigint LANGUAGE sql STABLE AS 'SELECT count(*) FROM item';
        CREATE OR REPLACE FUNCTION extra.change() RETURNS void LANGUAGE sql VOLATILE AS 'UPDATE item SET stock = 0'""")
    cluster.wait_in_sync()
    router = make_router(read_only_functions=["extra.allowed"])
    Session = sessionmaker(class_=RoutingSession, router=router)
    cluster.execute("CREATE OR REPLACE FUNCTION extra.allowed() RETURNS int LANGUAGE sql VOLATILE AS 'SELECT 1'")
    cluster.wait_in_sync()

    def runs_on(sql: str) -> str:
        with Session() as s:
            s.execute(text(sql))
            return place(s)

    eventually(lambda: runs_on("SELECT extra.lookup()") == "reader")
    assert runs_on("SELECT extra.change()") == "writer"
    assert runs_on("SELECT extra.allowed()") == "reader"
    cluster.execute("CREATE OR REPLACE FUNCTION extra.lookup() RETURNS bigint LANGUAGE sql VOLATILE AS 'SELECT 1::bigint'")
    eventually(lambda: runs_on("SELECT extra.lookup()") == "writer", timeout=60)


def test_a_readers_refusal_moves_the_unit_and_is_remembered(cluster: PostgresCluster, make_router: MakeRouter) -> None:
    cluster.execute("CREATE UNLOGGED TABLE IF NOT EXISTS extra.scratch (id int); GRANT ALL ON extra.scratch TO app")
    cluster.execute("""CREATE OR REPLACE FUNCTION extra.liar() RETURNS void LANGUAGE plpgsql STABLE
                       AS 'BEGIN PERFORM nextval(''ticket''); END'""")
    cluster.wait_in_sync()
    heard: list[events.Event] = []
    router = make_router(listeners=[heard.append])
    Session = sessionmaker(class_=RoutingSession, router=router)
    for sql in ("SELECT * FROM extra.scratch", "SELECT extra.liar()"):
        eventually(lambda sql=sql: router.explain(sql).effect.name == "READ")
        for _ in range(3):
            with Session() as s:
                s.execute(text(sql))
                assert place(s) == "writer"
        assert router.explain(sql).reason is Reason.NOT_A_READ
    assert [type(e).__name__ for e in heard].count("Learned") == 2, "each was sent to a reader once, and never again"


def test_what_the_writer_refuses_as_well_is_not_learned(cluster: PostgresCluster, make_router: MakeRouter) -> None:
    """A read that the writer refuses too is not remembered, so an unpopulated view is later read on a reader."""
    cluster.execute("CREATE MATERIALIZED VIEW extra.top AS SELECT 1 AS x WITH NO DATA; GRANT SELECT ON extra.top TO app")
    try:
        cluster.wait_in_sync()
        router = make_router()
        until_readers_serve(router, 2)
        Session = sessionmaker(class_=RoutingSession, router=router)
        for statement in (text("SELECT x FROM extra.top"), select(literal(1)).select_from(text("extra.top"))):
            with Session() as s, pytest.raises(exc.DBAPIError, match="has not been populated"):
                s.execute(statement)
        cluster.execute("REFRESH MATERIALIZED VIEW extra.top")
        cluster.wait_in_sync()
        for statement in (text("SELECT x FROM extra.top"), select(literal(1)).select_from(text("extra.top"))):
            with Session() as s:
                assert s.scalar(statement) == 1
                assert place(s) == "reader"
    finally:
        cluster.execute("DROP MATERIALIZED VIEW extra.top")


def test_a_unit_above_read_committed_runs_on_the_writer(make_router: MakeRouter) -> None:
    """A unit above READ COMMITTED runs on the writer unless it is declared read-only."""
    router = make_router(engine_options={"isolation_level": "REPEATABLE READ"})
    Session = sessionmaker(class_=RoutingSession, router=router)
    with Session() as s:
        assert s.scalar(select(func.count()).select_from(Item)) == 3
        assert place(s) == "writer"
        assert s.scalar(text("SHOW transaction_isolation")) == "repeatable read"
    with Session(read_only=True) as s:
        assert s.scalar(select(func.count()).select_from(Item)) == 3
        assert place(s) == "reader"
        assert s.scalar(text("SHOW transaction_isolation")) == "repeatable read"


def test_the_isolation_level_of_the_database_counts_as_well(cluster: PostgresCluster, make_router: MakeRouter) -> None:
    cluster.execute("ALTER ROLE app SET default_transaction_isolation = 'repeatable read'")
    cluster.wait_in_sync()
    try:
        with sessionmaker(class_=RoutingSession, router=make_router())() as s:
            s.scalar(select(func.count()).select_from(Item))
            assert place(s) == "writer"
    finally:
        cluster.execute("ALTER ROLE app RESET default_transaction_isolation")


def test_the_isolation_of_one_unit_is_set_by_connection(Session: Sessions) -> None:
    with Session() as s:
        s.connection(execution_options={"isolation_level": "SERIALIZABLE"})
        assert s.scalar(text("SHOW transaction_isolation")) == "serializable"
        assert place(s) == "writer"
    with Session() as s:
        s.execute(insert(Item).values(id=9))
        assert s.scalar(text("SHOW transaction_isolation")) == "read committed"


@BOTH
def test_an_automatic_unit_holds_no_transaction_on_its_reader(cluster: PostgresCluster, Session: Sessions) -> None:
    with Session() as s:
        list(s.scalars(select(Item).execution_options(yield_per=1)))
        s.get(Item, 1)
        assert open_transactions(cluster, *cluster.readers) == 0


@BOTH
def test_an_automatic_unit_never_has_two_open_transactions(cluster: PostgresCluster, Session: Sessions) -> None:
    with Session() as s:
        rows = s.scalars(select(Item).order_by(Item.id).execution_options(yield_per=1))
        first = next(rows)
        first.stock = 11
        s.flush()
        assert place(s) == "writer"
        assert open_transactions(cluster, *cluster.instances) == 1
        assert [row.id for row in rows] == [2, 3], "a streamed read goes on where it was"
        s.commit()
    assert cluster.execute("SELECT stock FROM item WHERE id = 1") == [(11,)]


@BOTH
def test_rows_of_a_reader_can_be_fetched_after_the_unit_moved(Session: Sessions) -> None:
    """Rows of a reader can be fetched after the unit has moved to the writer."""
    with Session() as s:
        rows = s.execute(select(Item.id).order_by(Item.id))
        assert next(rows).id == 1
        s.execute(update(Item).values(stock=1))
        assert [row.id for row in rows] == [2, 3]


@BOTH
def test_a_unit_that_has_moved_gives_its_readers_connection_back(router: Router, Session: Sessions) -> None:
    with Session() as s:
        s.get(Item, 1)
        reader = instance_id(s)
        assert router.stats().by_id[reader].pool_in_use == 1
        s.execute(update(Item).values(stock=1))
        assert router.stats().by_id[reader].pool_in_use == 0
        assert router.stats().by_id[instance_id(s)].pool_in_use == 1
    assert no_connection_is_left(router)


@BOTH
def test_a_session_sees_its_own_flush_and_a_rollback_undoes_it(Session: Sessions) -> None:
    with Session() as s:
        assert s.scalar(select(func.count()).select_from(Item)) == 3
        s.add(Item(id=9))
        assert s.scalar(select(func.count()).select_from(Item)) == 4, "autoflush, then the read on the same connection"
        s.rollback()
        assert s.scalar(select(func.count()).select_from(Item)) == 3


@BOTH
def test_savepoints_work(cluster: PostgresCluster, Session: Sessions) -> None:
    with Session() as s, s.begin():
        s.get(Item, 1)
        s.add(Item(id=9))
        with pytest.raises(exc.IntegrityError), s.begin_nested():
            s.add(Item(id=1, name="twice"))
        with s.begin_nested():
            s.add(Item(id=10))
    assert cluster.execute("SELECT id FROM item ORDER BY id") == [(1,), (2,), (3,), (9,), (10,)]


def test_several_binds_are_left_alone(cluster: PostgresCluster, router: Router) -> None:
    other = create_engine("sqlite://")
    Part.__table__.create(other, checkfirst=True)
    try:
        with RoutingSession(router=router, binds={Part: other}) as s:
            assert s.scalars(select(Part)).all() == []
            assert place(s) == "nowhere"
            assert len(s.scalars(select(Item)).all()) == 3
            assert place(s) == "reader"
            s.add(Part(id=77))
            s.flush()
            assert place(s) == "reader", "a write to another database moves nothing"
            with pytest.raises(exc.OperationalError):
                s.execute(select(Part).where(text("nonsense(1)")))
            assert place(s) == "reader"
    finally:
        other.dispose()


def test_the_mixin_routes_another_session_class(router: Router) -> None:
    class Custom(PlainSession):
        def count(self, entity: type[Base]) -> int:
            return self.scalar(select(func.count()).select_from(entity)) or 0

    class MySession(RoutingMixin, Custom):
        pass

    with sessionmaker(class_=MySession, router=router, autoflush=False, expire_on_commit=False)() as s:
        assert s.count(Item) == 3
        assert place(s) == "reader"
        item = Item(id=9)
        s.add(item)
        s.commit()
        assert item.id == 9
        assert place(s) == "nowhere"
        assert s.count(Item) == 4


def test_a_session_without_a_router_or_with_a_bind_is_refused(router: Router) -> None:
    with pytest.raises(ConfigurationError, match="router"):
        RoutingSession(router="postgresql+psycopg://")  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="bind"):
        RoutingSession(router=router, bind=create_engine("sqlite://"))
    for wrong in ("yes", 0, 1):
        with pytest.raises(ConfigurationError, match="read_only"):
            RoutingSession(router=router, read_only=wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("arguments", [("an engine",), ()], ids=["an engine", "nothing"])
def test_a_session_is_told_what_it_lacks(arguments: tuple[str, ...]) -> None:
    """A session class that is called like a plain Session, without a router, says what to write instead."""

    class MySession(RoutingSession):
        pass

    class Mixed(RoutingMixin, PlainSession):
        pass

    for kind in (RoutingSession, MySession, Mixed):
        with pytest.raises(ConfigurationError, match="bind" if arguments else "router= must be a Router"):
            kind(*arguments)  # type: ignore[call-arg, arg-type]


@BOTH
@pytest.mark.parametrize("read_only", [None, True, False])
@pytest.mark.parametrize("begin", ["begin_nested()", "begin(nested=True)"])
def test_a_savepoint_may_be_the_first_thing(router: Router, begin: str, read_only: bool | None) -> None:
    """A savepoint begins its transaction as well, also if autobegin=False keeps statements from doing so."""
    for autobegin in (True, False):
        with RoutingSession(router=router, autobegin=autobegin, read_only=read_only) as s:
            with s.begin_nested() if begin == "begin_nested()" else s.begin(nested=True):
                assert s.scalar(select(func.count()).select_from(Item)) == 3
            assert place(s) == ("reader" if read_only else "writer")


def test_without_autobegin_a_statement_begins_nothing(router: Router) -> None:
    """Without autobegin a statement begins no transaction, as in SQLAlchemy's own Session."""
    with RoutingSession(router=router, autobegin=False) as s:
        with pytest.raises(exc.InvalidRequestError, match="Autobegin"):
            s.scalar(select(func.count()).select_from(Item))
        with s.begin():
            assert s.scalar(select(func.count()).select_from(Item)) == 3


def test_asking_for_the_bind_connects_nowhere(router: Router, Session: Sessions) -> None:
    with Session() as s:
        assert s.get_bind().dialect.name == "postgresql"
        assert place(s) == "nowhere"
        assert no_connection_is_left(router)


def test_an_engine_had_from_a_session_behaves_as_an_engine(cluster: PostgresCluster, Session: Sessions) -> None:
    with Session() as s:
        s.get(Item, 1)
        reader = s.get_bind(clause=select(Item))
    with reader.connect() as connection:  # type: ignore[union-attr]
        connection.exec_driver_sql("SELECT 1")
        busy = "SELECT count(*) FROM pg_stat_activity WHERE usename = 'app' AND xact_start IS NOT NULL"
        assert sum(cluster.execute(busy, instance=i)[0][0] for i in cluster.readers) == 1, "a transaction, not autocommit"


@BOTH
def test_errors_of_a_statement_reach_the_application_as_they_are(Session: Sessions) -> None:
    with Session() as s:
        with pytest.raises(exc.DBAPIError, match=r"(?i)more than (one|1) row"):
            s.execute(text("SELECT id FROM item WHERE id = (SELECT id FROM item)"))
        assert place(s) == "reader"
        assert s.get(Item, 1) is not None, "and the unit can go on, as nothing was open"


def test_each_class_of_sessions_listens(router: Router) -> None:
    """A class listens to its sessions also if a class that was collected has had its address."""
    addresses = set()
    for _ in range(50):

        class Routed(RoutingMixin, PlainSession):
            pass

        class Derived(Routed):
            pass

        addresses.add(id(Derived))
        for made in (Routed, Derived):
            with made(router=router) as s:
                assert s.get_one(Item, 1) is not None
                assert on_before_flush in s.dispatch.before_flush
        del Routed, Derived, made, s
        gc.collect()
    assert len(addresses) < 50, "the test is of use only if addresses come again"


def test_a_commit_of_reads_alone_leaves_no_requirement(Session: Sessions) -> None:
    with Session() as s:
        s.get(Item, 1)
        s.commit()
        s.get(Item, 1)
        assert place(s) == "reader"
        assert s._causal_context.requirement is None
