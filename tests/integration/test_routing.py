"""Where a statement goes, and which requests for the writer are known before any reader is used."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import sqlalchemy
from sqlalchemy import event, func, lambda_stmt, select, text
from sqlalchemy.orm import ORMExecuteState, scoped_session, sessionmaker

from aurora_router import ConfigurationError, Router, RoutingSession
from tests.integration.shop import BOTH, Item, place

Sessions = sessionmaker[RoutingSession]
MakeRouter = Callable[..., Router]

COUNT = select(func.count()).select_from(Item)


# -- the execution option `route`, whichever way it comes -----------------------------------------------------------


class Listening(RoutingSession):
    """A class of its own, so that its listeners run in no other session."""


@contextmanager
def listening(listener: Callable[[ORMExecuteState], object]) -> Iterator[None]:
    event.listen(Listening, "do_orm_execute", listener, retval=True)
    try:
        yield
    finally:
        event.remove(Listening, "do_orm_execute", listener)


def update_options(state: ORMExecuteState) -> None:
    state.update_execution_options(route="writer")


def invoke(state: ORMExecuteState) -> object:
    return state.invoke_statement(execution_options={"route": "writer"})


def replace(state: ORMExecuteState) -> None:
    state.statement = state.statement.execution_options(route="writer")


READS: dict[str, Callable[[RoutingSession], object]] = {
    "execute": lambda s: s.execute(COUNT).scalar_one(),
    "scalar": lambda s: s.scalar(COUNT),
    "scalars": lambda s: s.scalars(COUNT).one(),
    "text": lambda s: s.scalar(text("SELECT count(*) FROM item")),
    "classes": lambda s: len(s.scalars(select(Item)).all()),
    "query": lambda s: s.query(Item).count(),
    "lambda": lambda s: s.scalar(lambda_stmt(lambda: select(func.count()).select_from(Item))),
    "get": lambda s: s.get_one(Item, 3).id,
    "lazy load": lambda s: len(s.get_one(Item, 1).parts) + 1,
}


@BOTH
@pytest.mark.parametrize("listener", [update_options, invoke, replace])
@pytest.mark.parametrize("read", READS)
def test_a_listener_may_route(router: Router, read: str, listener: Callable[[ORMExecuteState], object]) -> None:
    """A route that a do_orm_execute listener sets counts as if the statement had it."""
    with listening(listener), Listening(router=router) as s:
        assert READS[read](s) == 3
        assert place(s) == "writer"


def test_a_listener_may_route_in_a_scoped_session(router: Router) -> None:
    """A listener's route counts although a scoped_session passes every argument on, also those left at their default."""
    with listening(update_options):
        session = scoped_session(sessionmaker(class_=Listening, router=router))
        assert session.scalar(COUNT) == session.execute(COUNT).scalar_one() == 3
        assert place(session()) == "writer"
        session.remove()


def test_a_later_listener_has_the_last_word(router: Router) -> None:
    """The option is read when all listeners of the application have been called, also those that came after the class."""

    def back(state: ORMExecuteState) -> None:
        state.update_execution_options(route=None)

    with listening(update_options), listening(back), Listening(router=router) as s:
        assert s.scalar(COUNT) == 3
        assert place(s) == "reader"
    with Listening(router=router) as s:
        event.listen(s, "do_orm_execute", update_options)
        assert s.scalar(COUNT) == 3
        assert place(s) == "writer"


if sqlalchemy.__version__ >= "2.1":  # its sessions have execution options

    @BOTH
    @pytest.mark.parametrize("read", READS)
    def test_a_session_may_route(Session: Sessions, read: str) -> None:
        """`Session(execution_options={"route": "writer"})` sends all of its units to the writer."""
        with Session(execution_options={"route": "writer"}) as s:
            assert READS[read](s) == 3
            assert place(s) == "writer"

    def test_a_statement_overrules_its_session(Session: Sessions) -> None:
        """As in SQLAlchemy, the call's option overrules the statement's, and that overrules the session's."""
        with Session(execution_options={"route": "writer"}) as s:
            assert s.scalar(COUNT.execution_options(route="reader")) == 3
            assert place(s) == "reader"
            assert s.scalar(COUNT.execution_options(route="reader"), execution_options={"route": "writer"}) == 3
            assert place(s) == "writer"


WAYS: dict[str, Callable[[RoutingSession], object]] = {
    "query": lambda s: s.query(Item).execution_options(route="writer").all(),
    "get": lambda s: s.get(Item, 1, execution_options={"route": "writer"}),
    "stream": lambda s: list(s.scalars(select(Item).execution_options(route="writer", yield_per=1))),
    "union": lambda s: s.execute(select(Item.id).union(select(Item.id)).execution_options(route="writer")).all(),
    "from_statement": lambda s: s.scalars(
        select(Item).from_statement(text("SELECT * FROM item")).execution_options(route="writer")
    ).all(),
    "lambda": lambda s: s.execute(lambda_stmt(lambda: select(Item).execution_options(route="writer"))).all(),
}


@BOTH
@pytest.mark.parametrize("way", WAYS)
def test_a_route_may_come_by_any_way(Session: Sessions, way: str) -> None:
    """Wherever SQLAlchemy has execution options, `route` is honoured."""
    with Session() as s:
        WAYS[way](s)
        assert place(s) == "writer"


def test_a_route_of_the_connection_moves_the_unit(Session: Sessions) -> None:
    """A route that a listener gives the connection is only seen at the execution, and moves the unit unnoticed."""
    with Session() as s:

        @event.listens_for(s, "after_begin")
        def begun(_: object, __: object, connection: Any) -> None:
            connection.execution_options(route="writer")

        assert s.scalar(COUNT) == 3
        assert place(s) == "writer"


@pytest.mark.parametrize("way", ["listener", "connection"])
def test_an_unknown_route_is_refused_by_any_way(router: Router, way: str) -> None:
    """A misspelt route is an error, and does not become a read on a late reader."""
    with Listening(router=router) as s:
        if way == "listener":
            event.listen(s, "do_orm_execute", lambda state: state.update_execution_options(route="primary"))
        else:
            event.listen(s, "after_begin", lambda *args: args[-1].execution_options(route="primary"))
        with pytest.raises(ConfigurationError, match='use "writer" or "reader"'):
            s.scalar(COUNT)
