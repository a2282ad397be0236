"""Statements for the writer go there at once: they need no reader first, and no listener hears of them twice."""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from sqlalchemy import (
    DDL,
    Column,
    Integer,
    MetaData,
    Sequence,
    String,
    Table,
    TypeDecorator,
    bindparam,
    create_engine,
    delete,
    event,
    func,
    insert,
    lambda_stmt,
    literal,
    literal_column,
    select,
    text,
    update,
)
from sqlalchemy.engine import Connection, Engine, Result
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.orm import ORMExecuteState, aliased
from sqlalchemy.orm import Session as PlainSession
from sqlalchemy.sql.functions import FunctionElement

from aurora_router import NoReaderAvailable, ReadOnlyViolation, Router, RoutingSession
from aurora_router.local.cluster import Cluster
from aurora_router.router import core_of
from tests.integration.shop import BOTH, Item, Part, engine, place, sessions

MakeRouter = Callable[..., Router]

COUNT = select(func.count()).select_from(Item)
INSERT = "INSERT INTO item (id) VALUES (9)"


class uncached(FunctionElement[int]):
    """A call that SQLAlchemy compiles each time."""

    name = "uncached"
    type = Integer()
    inherit_cache = False


class counted(FunctionElement[int]):
    """A call that counts how often it is compiled."""

    name = "counted"
    type = Integer()
    inherit_cache = True
    times = 0


class nowhere(FunctionElement[int]):
    """A call that no dialect can compile."""

    name = "nowhere"
    type = Integer()
    inherit_cache = True


@compiles(nowhere)
def refusing(*_: Any, **__: Any) -> str:
    raise ValueError("mine")


@compiles(uncached, "postgresql")
def in_postgresql(*_: Any, **__: Any) -> str:
    return "nextval('ticket')"


@compiles(uncached, "mariadb")
def in_mariadb(*_: Any, **__: Any) -> str:
    return "nextval(ticket)"


@compiles(uncached, "mysql")
def in_mysql(*_: Any, **__: Any) -> str:
    return "nextval()"


@compiles(counted)
def counting(*_: Any, **__: Any) -> str:
    counted.times += 1
    return "abs(-3)"


class Folded(TypeDecorator[str]):
    """A type that puts a call around each value."""

    impl = String
    cache_ok = True

    def bind_expression(self, bindvalue: Any) -> Any:
        return func.lower(bindvalue)


TENANTS = Table("item", MetaData(), Column("id", Integer), schema="tenant")
FOLDED = literal_column("'a'", Folded)

PARTS = aliased(Part)
FETCH: dict[str, Any] = {"execution_options": {"synchronize_session": "fetch"}}

WRITES: dict[str, Callable[[RoutingSession], object]] = {
    "text": lambda s: s.execute(text(INSERT)),
    "text with values": lambda s: s.execute(text("INSERT INTO item (id, name) VALUES (:id, 'a\\:b 100%')"), {"id": 9}),
    "text for many": lambda s: s.execute(text("INSERT INTO item (id) VALUES (:id)"), [{"id": 9}, {"id": 10}]),
    "text with a list": lambda s: s.execute(
        text("DELETE FROM part WHERE id IN :ids").bindparams(bindparam("ids", expanding=True)), {"ids": [1, 2]}
    ),
    "text behind a comment": lambda s: s.execute(text(f"/* DELETE */ {INSERT}")),
    "text that locks": lambda s: s.execute(text("SELECT id FROM item FOR UPDATE")).all(),
    "text with columns": lambda s: s.execute(text("SELECT id FROM item FOR UPDATE").columns(Item.id)).all(),
    "text of a class": lambda s: s.scalars(select(Item).from_statement(text("SELECT * FROM item FOR UPDATE"))).all(),
    "text in a select": lambda s: s.execute(select(text("id FROM item FOR UPDATE"))).all(),
    "text in a suffix": lambda s: s.execute(select(Item.id).suffix_with("FOR UPDATE")).all(),
    "query of a text": lambda s: s.query(Item).from_statement(text("SELECT * FROM item FOR UPDATE")).all(),
    "DDL as text": lambda s: s.execute(text("CREATE TABLE IF NOT EXISTS made (id int)")),
    "DDL": lambda s: s.execute(DDL("CREATE TABLE IF NOT EXISTS made (id int)")),
    "insert": lambda s: s.execute(insert(Item).values(id=9)),
    "for update": lambda s: s.execute(select(Item).with_for_update()).all(),
    "for update of a table": lambda s: s.execute(select(Item.__table__).with_for_update()).all(),
    "for update of some": lambda s: s.scalars(select(Item).where(Item.id.in_([1, 2])).with_for_update()).all(),
    "for update in a subquery": lambda s: s.execute(select(select(Item.id).with_for_update().subquery())).all(),
    "for update in a lambda": lambda s: s.execute(lambda_stmt(lambda: select(Item.id).with_for_update())).all(),
    "for update by query": lambda s: s.query(Item).with_for_update().all(),
    "for update by get": lambda s: s.get(Item, 1, with_for_update=True),
    "a comment asks": lambda s: s.execute(text("/*@writer*/ SELECT 1")),
}

OF_POSTGRESQL: dict[str, Callable[[RoutingSession], object]] = {
    "nextval": lambda s: s.execute(select(func.nextval("ticket"))).all(),
    "nextval by itself": lambda s: s.scalar(func.nextval("ticket")),
    "nextval with a list": lambda s: s.execute(select(func.nextval("ticket")).where(literal(1).in_([1, 2]))).all(),
    "nextval in a lambda": lambda s: s.scalar(lambda_stmt(lambda: select(func.nextval("ticket")))),
    "nextval behind a join": lambda s: s.execute(
        select(Item.id).join(Part, Part.item_id == Item.id).where(Item.id < func.nextval("ticket"))
    ).all(),
    "a sequence": lambda s: s.scalar(Sequence("ticket")),
    "a sequence's next value": lambda s: s.scalar(Sequence("ticket").next_value()),
    "a lock": lambda s: s.scalar(select(func.pg_advisory_xact_lock(1))),
    "a question about a server": lambda s: s.scalar(func.pg_is_in_recovery()),
    "nextval in another schema": lambda s: s.execute(
        select(func.nextval("ticket"), TENANTS.c.id), execution_options={"schema_translate_map": {"tenant": None}}
    ).all(),
    "nextval with a list of an own type": lambda s: s.execute(select(func.nextval("ticket")).where(FOLDED.in_(["a", "b"]))).all(),
    "several statements": lambda s: s.execute(text(f"SELECT 1; {INSERT}")),
    "an insert inside": lambda s: s.execute(select(insert(Item).values(id=9).returning(Item.id).cte("c").c.id)).all(),
    "an insert of a class": lambda s: s.scalars(
        select(Item).from_statement(insert(Item).values(id=9, name="").returning(Item))
    ).all(),
}


def lock(s: RoutingSession) -> object:
    return s.scalar(select(func.get_lock("a", 0)))


OF_MARIADB: dict[str, Callable[[RoutingSession], object]] = {
    "nextval": lambda s: s.execute(text("SELECT nextval(ticket)")).all(),
    "nextval by itself": lambda s: s.scalar(func.get_lock("a", 0)),
    "nextval with a list": lambda s: s.execute(select(func.get_lock("a", 0)).where(literal(1).in_([1, 2]))).all(),
    "nextval in a lambda": lambda s: s.scalar(lambda_stmt(lambda: select(func.get_lock("a", 0)))),
    "nextval behind a join": lambda s: s.execute(
        select(Item.id).join(Part, Part.item_id == Item.id).where(Item.id < func.get_lock("a", 0))
    ).all(),
    "nextval in another schema": lambda s: s.execute(
        select(func.get_lock("a", 0), TENANTS.c.id), execution_options={"schema_translate_map": {"tenant": None}}
    ).all(),
    "nextval with a list of an own type": lambda s: s.execute(select(func.get_lock("a", 0)).where(FOLDED.in_(["a", "b"]))).all(),
    "a lock": lock,
    "a question about a server": lambda s: s.scalar(func.connection_id()),
    "several statements": lambda s: s.execute(text("SET @a = 1")),
    "an insert inside": lambda s: s.execute(text("WITH c AS (SELECT 1 AS id) SELECT item.id FROM item, c FOR UPDATE")).all(),
}
OF_MYSQL = {**OF_MARIADB, "nextval": lock, "a sequence": lock, "a sequence's next value": lock, "an insert of a class": lock}
OF = {"postgresql": OF_POSTGRESQL, "mariadb": {**OF_POSTGRESQL, **OF_MARIADB}, "mysql": OF_MYSQL}
EVERY = [*WRITES, *OF_POSTGRESQL]


def write(cluster: Cluster[Any], what: str, s: RoutingSession) -> object:
    """Run the write of that name, in the variant for the cluster's engine."""
    return (WRITES.get(what) or OF[engine(cluster)][what])(s)


class Ears:
    """Records the events of this thread, on every target that an application can listen to."""

    def __init__(self) -> None:
        self.heard: Counter[str] = Counter()
        self.errors: list[BaseException | None] = []
        self.begun: list[Engine] = []
        self._thread = threading.get_ident()

    def before_execute(self, *_: Any) -> None:
        self._count("before_execute")

    def before_cursor_execute(self, *_: Any) -> None:
        self._count("before_cursor_execute")

    def do_orm_execute(self, _: Any) -> None:
        self._count("do_orm_execute")

    def handle_error(self, context: Any) -> None:
        if threading.get_ident() == self._thread:
            self.errors.append(context.original_exception)

    def after_begin(self, _: PlainSession, __: Any, connection: Connection) -> None:
        self.begun.append(connection.engine)

    def _count(self, name: str) -> None:
        if threading.get_ident() == self._thread:
            self.heard[name] += 1


@contextmanager
def listening(s: RoutingSession) -> Iterator[Ears]:
    ears = Ears()
    of_engines: list[tuple[Any, str]] = [(Engine, "before_execute"), (Engine, "before_cursor_execute"), (Engine, "handle_error")]
    listened = [*of_engines, (s, "do_orm_execute"), (s, "after_begin")]
    for target, name in listened:
        event.listen(target, name, getattr(ears, name))
    try:
        yield ears
    finally:
        for target, name in listened:
            event.remove(target, name, getattr(ears, name))


@BOTH
@pytest.mark.parametrize("what", EVERY)
def test_a_write_takes_no_connection_of_a_reader(cluster: Cluster[Any], make_router: MakeRouter, what: str) -> None:
    """A unit that begins with a statement for the writer goes there, although its only reader's pool is full."""
    options = {"pool_size": 1, "max_overflow": 0, "pool_timeout": 60.0}
    router = make_router(instances=[cluster.readers[0].address], engine_options=options)
    Session = sessions(router)
    with Session(read_only=True) as busy, Session() as s, listening(s) as ears:
        busy.connection()
        ears.heard.clear()
        write(cluster, what, s)
        assert place(s) == "writer"
        assert ears.begun == [core_of(router).writer_engine()], "and no reader's before it"
        assert ears.errors == []
        assert set(ears.heard.values()) == {1}, "each listener hears of it once"
        assert set(ears.heard) >= {"before_cursor_execute"} | ({"do_orm_execute"} if what != "for update by get" else set())


@BOTH
@pytest.mark.parametrize("statement", [select(uncached()), text("INSERT INTO item (id, name) VALUES (9, 'a\\'' -- ')\n')")])
def test_a_write_that_is_seen_late_does_not_wait(cluster: Cluster[Any], make_router: MakeRouter, statement: Any) -> None:
    """A write that is seen late goes to the writer before its unit would wait for a reader's connection.

    A statement that SQLAlchemy compiles each time is compiled once more.
    A text whose meaning depends on a setting counts as the write that it may be.
    """
    options = {"pool_size": 1, "max_overflow": 0, "pool_timeout": 60.0}
    router = make_router(instances=[cluster.readers[0].address], engine_options=options)
    Session = sessions(router)
    with Session(read_only=True) as busy, Session() as s:
        busy.connection()
        with contextlib.suppress(DBAPIError):  # on MySQL and MariaDB that text is no statement
            s.execute(statement)
        assert place(s) == "writer"


@BOTH
@pytest.mark.parametrize("what", EVERY)
def test_a_write_needs_no_reader_at_all(cluster: Cluster[Any], make_router: MakeRouter, what: str) -> None:
    """`no_reader="error"` is about reads alone."""
    router = make_router(instances=[], no_reader="error")
    with sessions(router)() as s:
        write(cluster, what, s)
        assert place(s) == "writer"


@BOTH
@pytest.mark.parametrize("what", [update(Item).where(Item.id == 3).values(stock=1), delete(Part).where(Part.id == 1)])
def test_what_a_bulk_write_fetches_needs_no_reader(make_router: MakeRouter, what: Any) -> None:
    """The SELECT before a bulk statement (synchronize_session="fetch") belongs to the write, if SQLAlchemy sends it at all."""
    with sessions(make_router(instances=[], no_reader="error"))() as s:
        assert s.execute(what, **FETCH).rowcount == 1
        assert place(s) == "writer"


def test_a_bulk_write_compiles_nothing_else(router: Router) -> None:
    """A SELECT that SQLAlchemy does not send gives no warning of its own."""
    with sessions(router)() as s:
        s.execute(update(PARTS).where(PARTS.id == 1).values(name=""), **FETCH)
        assert place(s) == "writer"


def test_without_a_reader_only_reads_are_refused(make_router: MakeRouter) -> None:
    """`no_reader="error"` refuses reads, but no write that SQLAlchemy compiles each time."""
    Session = sessions(make_router(instances=[], no_reader="error"))
    with Session() as s, pytest.raises(NoReaderAvailable):
        s.execute(COUNT)
    with Session() as s:
        assert s.scalar(select(uncached())) > 0
    with Session(read_only=True) as s, pytest.raises(NoReaderAvailable):
        s.execute(text(INSERT))


@BOTH
def test_a_write_takes_no_place_that_is_lent_to_reads(cluster: Cluster[Any], make_router: MakeRouter) -> None:
    """While reads use up their part of the writer's pool, other statements find room in the rest."""
    options = {"pool_size": 2, "max_overflow": 0, "pool_timeout": 60.0}
    router = make_router(instances=["127.0.0.1:1"], engine_options=options)
    Session = sessions(router)
    with Session() as reading:
        assert reading.scalar(COUNT) == 3
        for statement in (text(INSERT), select(Item.id).with_for_update(), select(uncached())):
            with Session() as s:
                s.execute(statement)
                assert place(s) == "writer"
                assert s.routing_state.unit is not None
                assert s.routing_state.unit.writer_read_slot is None


@BOTH
def test_a_unit_on_a_reader_moves_unheard(cluster: Cluster[Any], router: Router) -> None:
    """A unit that has read moves to the writer before the write is executed, so listeners hear of it once."""
    with sessions(router)() as s:
        s.get(Item, 1)
        with listening(s) as ears:
            s.execute(text(INSERT))
        assert ears.errors == []
        assert set(ears.heard.values()) == {1}
        assert place(s) == "writer"


@BOTH
def test_the_signal_to_move_is_no_error(router: Router) -> None:
    """A write that only the final text shows moves the unit, too, and handle_error does not hear of the move."""

    def lock(_: Any, __: Any, statement: str, parameters: Any, *___: Any) -> tuple[str, Any]:
        return (statement + " FOR UPDATE" if statement.startswith("SELECT item") else statement), parameters

    with sessions(router)() as s, listening(s) as ears:
        event.listen(Engine, "before_cursor_execute", lock, retval=True)
        try:
            assert len(s.execute(select(Item.id)).all()) == 3
        finally:
            event.remove(Engine, "before_cursor_execute", lock)
        assert place(s) == "writer"
        assert ears.errors == []


@BOTH
def test_a_read_is_compiled_once_on_each_engine(cluster: Cluster[Any], make_router: MakeRouter) -> None:
    """The early look at a statement's text costs no second compilation."""
    Session = sessions(make_router(instances=[cluster.readers[0].address]))
    with Session() as s:
        s.scalar(COUNT)
    counted.times = 0
    for _ in range(3):
        with Session() as s:
            assert s.scalar(select(counted())) == 3
            assert place(s) == "reader"
    assert counted.times == 1


def invoke_lock(state: ORMExecuteState) -> Result[Any]:
    return state.invoke_statement(statement=text("SELECT id FROM item FOR UPDATE"))


def set_lock(state: ORMExecuteState) -> None:
    state.statement = text("SELECT id FROM item FOR UPDATE")


@BOTH
@pytest.mark.parametrize("listener", [invoke_lock, set_lock])
def test_what_a_listener_puts_in_its_place_is_judged(make_router: MakeRouter, listener: Callable[[ORMExecuteState], Any]) -> None:
    """A write that a do_orm_execute listener makes of a read needs no reader either."""
    with sessions(make_router(instances=[], no_reader="error"))() as s:
        event.listen(s, "do_orm_execute", listener)
        assert len(s.execute(text("SELECT 1")).all()) == 3
        assert place(s) == "writer"


@BOTH
def test_a_hint_in_a_text_needs_no_reader(make_router: MakeRouter) -> None:
    """A read-only unit that begins with a text which asks for the writer goes there at once."""
    with sessions(make_router(instances=[], no_reader="error"))(read_only=True) as s, listening(s) as ears:
        assert s.scalar(text("/*@writer*/ SELECT count(*) FROM item")) == 3
        assert set(ears.heard.values()) == {1}
        with pytest.raises(ReadOnlyViolation):
            s.execute(text(INSERT))


@BOTH
def test_declared_read_only_a_write_is_still_refused(router: Router) -> None:
    """A unit that is declared read-only stays with its reader, and its write is refused."""
    with sessions(router)(read_only=True) as s:
        with pytest.raises(ReadOnlyViolation):
            s.execute(text(INSERT))
        assert place(s) == "reader"


@BOTH
def test_who_only_writes_compiles_once(cluster: Cluster[Any], make_router: MakeRouter) -> None:
    """A service that never reads connects to no reader, and finds its statements in the writer's cache."""
    Session = sessions(make_router())
    with Session() as s:
        s.execute(text(INSERT))
    counted.times = 0
    for _ in range(3):
        with Session() as s:
            s.execute(select(counted()).suffix_with("FOR UPDATE"))
            assert place(s) == "writer"
    assert counted.times == 1


@BOTH
def test_an_error_of_compiling_is_told_once(cluster: Cluster[Any], router: Router) -> None:
    """A statement that cannot be compiled ends in the error of a plain session."""
    plain = create_engine(cluster.url)
    with PlainSession(plain) as s, pytest.raises(Exception) as expected:
        s.execute(select(nowhere()))
    plain.dispose()
    for _ in range(2):
        with sessions(router)() as routed, pytest.raises(type(expected.value)) as raised:
            routed.execute(select(nowhere()))
        assert str(raised.value) == str(expected.value)


@BOTH
def test_to_ask_for_the_engine_of_a_table_moves_nothing(router: Router) -> None:
    """get_bind() for a table, which is no statement, does not count as a write."""
    with sessions(router)() as s:
        s.get(Item, 1)
        s.get_bind(Item, clause=Item.__table__)
        assert place(s) == "reader"
