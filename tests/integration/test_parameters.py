"""Statements whose parameters load objects during the execution: the load may move the unit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
from sqlalchemy import bindparam, event, select, text, update
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.exc import DBAPIError, StatementError
from sqlalchemy.orm import ORMExecuteState, with_parent

from aurora_router import NoWriterAvailable, ReadOnlyViolation, Router, RoutingSession
from aurora_router.local import FaultProxy
from aurora_router.local.cluster import Cluster
from aurora_router.router import core_of
from tests.integration.shop import BOTH, Item, Part, eventually, place, sessions

MakeRouter = Callable[..., Router]

STATEMENTS: dict[str, Callable[[RoutingSession, Item], object]] = {
    "comparison": lambda s, item: [part.id for part in s.scalars(select(Part).where(Part.item == item).order_by(Part.id))],
    "columns": lambda s, item: s.execute(select(Part.id).where(Part.item == item).order_by(Part.id)).scalars().all(),
    "query": lambda s, item: [part.id for part in s.query(Part).filter(Part.item == item).order_by(Part.id)],
    "parent": lambda s, item: s.scalars(select(Part.id).where(with_parent(item, Item.parts)).order_by(Part.id)).all(),
    "a bind's function": lambda s, item: s.scalars(
        select(Part.id).where(Part.item_id == bindparam("item", callable_=lambda: item.id)).order_by(Part.id)
    ).all(),
    "text": lambda s, item: s.scalars(
        text("SELECT id FROM part WHERE item_id = :item ORDER BY id").bindparams(bindparam("item", callable_=lambda: item.id))
    ).all(),
    "stream": lambda s, item: list(
        s.scalars(select(Part.id).where(Part.item == item).order_by(Part.id).execution_options(yield_per=1))
    ),
    "subquery": lambda s, item: s.scalars(
        select(Part.id).where(Part.id.in_(select(Part.id).where(Part.item == item))).order_by(Part.id)
    ).all(),
}


@pytest.fixture
def proxies(cluster: Cluster[Any]) -> Iterator[list[FaultProxy]]:
    """Proxies before the readers."""
    with ExitStack() as stack:
        yield [stack.enter_context(FaultProxy((reader.host, reader.port))) for reader in cluster.readers]


@pytest.fixture
def router(make_router: MakeRouter, proxies: list[FaultProxy]) -> Router:
    made = make_router(instances=[proxy.address for proxy in proxies])
    eventually(lambda: len(made.topology.readers) == 2)
    return made


@contextmanager
def while_loading(s: RoutingSession, do: Callable[[], object]) -> Iterator[list[str]]:
    """Do something once, when an expired object is about to be loaded. Yield a list that is empty until then."""
    happened: list[str] = []

    def listener(state: ORMExecuteState) -> None:
        if state.is_column_load and not happened:
            happened.append("loading")
            do()

    event.listen(s, "do_orm_execute", listener)
    yield happened
    event.remove(s, "do_orm_execute", listener)


def expired(s: RoutingSession) -> Item:
    item = s.get_one(Item, 1)
    s.expire(item)
    assert place(s) == "reader"
    return item


@BOTH
@pytest.mark.parametrize("what", STATEMENTS)
def test_a_parameter_may_move_its_unit(router: Router, what: str) -> None:
    """The load moves to the writer, because somebody has written meanwhile. The statement follows it there."""
    Session = sessions(router)
    with router.causal_scope(), Session() as s:
        item = expired(s)

        def write() -> None:
            with Session() as other:
                other.add(Part(id=9, item_id=1))
                other.commit()

        with while_loading(s, write) as happened:
            assert STATEMENTS[what](s, item) == [1, 2, 9]
        assert happened
        assert place(s) == "writer"


@BOTH
@pytest.mark.parametrize("what", STATEMENTS)
def test_a_reader_may_die_while_a_parameter_loads(router: Router, proxies: list[FaultProxy], what: str) -> None:
    """The load is retried on another instance, and the statement follows it there."""
    with sessions(router)() as s:
        item = expired(s)
        with while_loading(s, lambda: [proxy.reset_all() for proxy in proxies]) as happened:
            assert STATEMENTS[what](s, item) == [1, 2]
        assert happened
        assert item.stock == 10


@BOTH
@pytest.mark.parametrize("write", [RoutingSession.flush, RoutingSession.connection, RoutingSession.begin_nested])
def test_a_parameter_may_write_itself(router: Router, write: Callable[[RoutingSession], object]) -> None:
    """The function of a parameter may move the unit to the writer, even without a statement of its own."""
    with sessions(router)() as s:
        item = s.get_one(Item, 1)

        def number() -> int:
            item.stock = 7
            write(s)
            return 2

        assert s.scalars(select(Item.id).where(Item.id < bindparam("number", callable_=number))).all() == [1]
        assert place(s) == "writer"


def test_the_same_in_a_read_only_unit(router: Router, proxies: list[FaultProxy]) -> None:
    """A read-only transaction that has shown no snapshot goes on where the load has found a reader."""
    with sessions(router)(read_only=True) as s:
        item = expired(s)
        with while_loading(s, lambda: [proxy.reset_all() for proxy in proxies]) as happened:
            assert STATEMENTS["comparison"](s, item) == [1, 2]
        assert happened


@BOTH
def test_a_write_may_load_its_parameters(router: Router) -> None:
    """A write is on the writer before its parameters load anything."""
    with sessions(router)() as s:
        item = expired(s)
        s.execute(update(Part).where(Part.item == item).values(name="changed").execution_options(synchronize_session=False))
        assert place(s) == "writer"
        assert s.scalars(select(Part.name).where(Part.item == item)).all() == ["changed", "changed"]


@BOTH
def test_a_parameter_moves_its_unit_beside_a_stream(router: Router) -> None:
    """A statement does not run on the reader after its unit moved, even if a stream keeps that connection open."""
    Session = sessions(router)
    engines: list[Engine] = []

    def executed(connection: Connection, _: Any, statement: str, *__: Any) -> None:
        if statement.startswith("SELECT part"):
            engines.append(connection.engine)

    with router.causal_scope(), Session() as s:
        rows = s.scalars(select(Item).order_by(Item.id).execution_options(yield_per=1))
        item = next(rows)
        assert place(s) == "reader"

        def load() -> int:
            if place(s) == "reader":
                with Session() as other:
                    other.add(Part(id=9, item_id=1))
                    other.commit()
            return s.scalars(select(Item.id).where(Item.id == 1)).one()

        event.listen(Engine, "after_cursor_execute", executed)
        try:
            by = bindparam("item", callable_=load)
            found = s.scalars(select(Part.id).where(Part.item_id == by).order_by(Part.id)).all()
        finally:
            event.remove(Engine, "after_cursor_execute", executed)
        assert found == [1, 2, 9]
        assert engines == [core_of(router).writer_engine()]
        assert [row.id for row in rows] == [2, 3], "and the stream goes on where it was"
        assert item.id == 1


def fail(error: BaseException) -> int:
    raise error


def test_an_error_of_a_parameter_says_what_it_is(router: Router) -> None:
    """Only the library's own errors are not wrapped, so the application and run_transaction() recognize them."""
    own = NoWriterAvailable(1.0, ())
    for error, expected in ((own, NoWriterAvailable), (ValueError("mine"), StatementError)):
        by = bindparam("item", callable_=lambda error=error: fail(error))
        with sessions(router)() as s, pytest.raises(expected):
            s.execute(select(Part.id).where(Part.item_id == by))

    with sessions(router)(read_only=True) as s:

        def write() -> int:
            s.execute(text("INSERT INTO item (id) VALUES (9)"))
            return 1

        with pytest.raises(ReadOnlyViolation):
            s.execute(select(Part.id).where(Part.item_id == bindparam("item", callable_=write)))


def test_a_statement_that_always_fails_ends(router: Router) -> None:
    """A parameter that moves its unit and then fails is an error, and no endless loop."""
    calls: list[int] = []
    with sessions(router)() as s:
        s.get_one(Item, 1)

        def move() -> int:
            calls.append(1)
            s.execute(text("INSERT INTO item (id) VALUES (:id)"), {"id": 100 + len(calls)})
            raise ValueError("mine")

        with pytest.raises(StatementError, match="mine"):
            s.execute(select(Part.id).where(Part.item_id == bindparam("item", callable_=move)))
        assert len(calls) <= 2
        with pytest.raises(DBAPIError, match="nonsense"):
            s.execute(text("SELECT nonsense"))
