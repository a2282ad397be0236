"""What a router promises, as stories that run on a fake cluster in milliseconds, and on real servers.

A story is a function of a `World`, which has a cluster of one writer and two readers. So a fake that differs from a real server
fails beside it, and a change of the shell is tried on fakes first.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import sessionmaker

from aurora_router import (
    NoReaderAvailable,
    NoWriterAvailable,
    Outcome,
    OutcomeUnknown,
    ReadOnlyViolation,
    Router,
    RouterError,
    RoutingSession,
)
from aurora_router.cluster.connection_modes import FRESH
from aurora_router.core import events
from tests.integration.shop import eventually, instance_id, place

READ = text("SELECT stock FROM item WHERE id = 1")
WRITE = text("UPDATE item SET stock = stock + 1 WHERE id = 1")
STOCK = 10  # at the beginning of each story


class World(Protocol):
    """One writer, two readers, and what may happen to them.

    heard: the events of the routers.
    """

    heard: list[events.Event]

    def router(self, **options: Any) -> Router:
        """Make a router whose readers serve. It is closed when the story ends."""

    def stock(self) -> int:
        """What the writer has."""

    def set_late(self, *readers: int) -> None:
        """Make these readers replay nothing any more, by number from 0."""

    def catch_up(self) -> None:
        """Let all readers replay all that there is."""

    def kill_writer(self) -> None: ...
    def kill_readers(self) -> None: ...
    def promote(self) -> None:
        """Make the first reader the writer."""

    def drop_connections(self) -> None:
        """Lose all connections to the writer."""

    def lose(self, words: str, *, answer: bool) -> None:
        """Lose the connection of the next statement with these words: before the writer gets it, or only the answer."""


Story = Callable[[World], None]
STORIES: list[Story] = []


def story(tell: Story) -> Story:
    STORIES.append(tell)
    return tell


def sessions(router: Router, **options: Any) -> sessionmaker[RoutingSession]:
    return sessionmaker(class_=RoutingSession, router=router, **options)


def write(session: RoutingSession) -> None:
    session.execute(WRITE)
    session.commit()


def rest() -> None:
    """Wait until pooled connections are looked at again when they are checked out."""
    time.sleep(2 * FRESH)


@contextmanager
def promotion(world: World, after: float = 0.2) -> Iterator[None]:
    """Promote a reader while the block waits."""
    timer = threading.Timer(after, world.promote)
    timer.start()
    try:
        yield
    finally:
        timer.join()


# -- where a statement goes ----------------------------------------------------------------------------------------


@story
def a_read_goes_to_a_reader(world: World) -> None:
    with sessions(world.router())() as s:
        assert s.scalar(READ) == STOCK
        assert place(s) == "reader"


@story
def a_write_goes_to_the_writer(world: World) -> None:
    with sessions(world.router())() as s:
        write(s)
    assert world.stock() == STOCK + 1


@story
def a_unit_moves_to_the_writer_when_it_writes(world: World) -> None:
    with sessions(world.router())() as s:
        assert s.scalar(READ) == STOCK
        s.execute(WRITE)
        assert place(s) == "writer"
        assert s.scalar(READ) == STOCK + 1
        s.rollback()
    assert world.stock() == STOCK


@story
def a_read_only_unit_writes_nothing(world: World) -> None:
    with sessions(world.router(), read_only=True)() as s:
        with pytest.raises(ReadOnlyViolation):
            s.execute(WRITE)
        s.rollback()
        assert s.scalar(READ) == STOCK
    assert world.stock() == STOCK


@story
def a_hint_sends_a_read_to_the_writer(world: World) -> None:
    with sessions(world.router())() as s:
        assert s.scalar(READ, execution_options={"route": "writer"}) == STOCK
        assert place(s) == "writer"


@story
def raw_connections_are_routed_by_their_intent(world: World) -> None:
    router = world.router()
    with router.connect(read_only=True) as connection:
        assert connection.scalar(READ) == STOCK
    with router.begin() as connection:
        connection.execute(WRITE)
    assert world.stock() == STOCK + 1


# -- what a session sees -------------------------------------------------------------------------------------------


@story
def a_session_reads_its_own_writes(world: World) -> None:
    with sessions(world.router())() as s:
        world.set_late(0, 1)
        write(s)
        assert s.scalar(READ) == STOCK + 1
        assert place(s) == "writer"


@story
def a_session_returns_to_readers_that_caught_up(world: World) -> None:
    with sessions(world.router())() as s:
        write(s)

        def is_on_a_reader() -> bool:
            assert s.scalar(READ) == STOCK + 1
            found = place(s) == "reader"
            s.rollback()
            return found

        eventually(is_on_a_reader)


@story
def a_token_carries_a_write_to_another_router(world: World) -> None:
    with sessions(world.router())() as s:
        world.set_late(0, 1)
        write(s)
        token = s.consistency_token
    with sessions(world.router())(after=token) as s:
        assert s.scalar(READ) == STOCK + 1


@story
def sessions_of_a_scope_share_what_they_wrote(world: World) -> None:
    router = world.router()
    world.set_late(0, 1)
    with router.causal_scope():
        with sessions(router)() as s:
            write(s)
        with sessions(router)() as s:
            assert s.scalar(READ) == STOCK + 1


@story
def global_consistency_needs_no_token(world: World) -> None:
    router = world.router(consistency="global")
    world.set_late(0, 1)
    with sessions(router)() as s:
        write(s)
    with sessions(router)() as s:
        assert s.scalar(READ) == STOCK + 1


@story
def a_stranger_may_read_what_a_late_reader_has(world: World) -> None:
    router = world.router()
    world.set_late(0, 1)
    with sessions(router)() as s:
        write(s)
    with sessions(router)() as s:
        assert s.scalar(READ) == STOCK
        assert place(s) == "reader"


@story
def later_reads_show_no_less(world: World) -> None:
    router = world.router(balance="round_robin")
    world.set_late(1)
    with sessions(router)() as s:
        write(s)
    with router.causal_scope():
        shown = []
        for _ in range(6):
            with sessions(router)() as s:
                shown.append(s.scalar(READ))
    assert shown == sorted(shown)


# -- readers that fail ---------------------------------------------------------------------------------------------


@story
def a_read_whose_reader_is_lost_is_retried(world: World) -> None:
    with sessions(world.router())() as s:
        assert s.scalar(READ) == STOCK
        s.rollback()
        world.kill_readers()
        assert s.scalar(READ) == STOCK
        assert place(s) == "writer"


@story
def without_a_reader_a_read_may_be_refused(world: World) -> None:
    with sessions(world.router(no_reader="error"))() as s:
        world.kill_readers()
        with pytest.raises(NoReaderAvailable):
            s.scalar(READ)


# -- a writer that fails -------------------------------------------------------------------------------------------


@story
def an_idle_connection_that_died_is_replaced(world: World) -> None:
    with sessions(world.router())() as s:
        write(s)
        world.drop_connections()
        rest()
        write(s)
    assert world.stock() == STOCK + 2


@story
def a_write_waits_for_the_promotion(world: World) -> None:
    with sessions(world.router(failover_timeout=30.0))() as s:
        write(s)
        world.catch_up()
        world.kill_writer()
        rest()
        with promotion(world):
            write(s)
        assert s.scalar(READ) == STOCK + 2
    assert world.stock() == STOCK + 2


@story
def a_token_outlives_a_promotion(world: World) -> None:
    router = world.router(failover_timeout=30.0)
    with sessions(router)() as s:
        write(s)
        token = s.consistency_token
    world.catch_up()
    world.kill_writer()
    world.promote()
    with sessions(router)(after=token) as s:
        assert s.scalar(READ) == STOCK + 1


@story
def without_a_writer_a_write_ends_in_words(world: World) -> None:
    with sessions(world.router(failover_timeout=0.5))() as s:
        world.kill_writer()
        with pytest.raises(NoWriterAvailable) as caught:
            s.execute(WRITE)
    assert len(caught.value.tried) >= 3, "each instance is described"


@story
def reads_go_on_without_a_writer(world: World) -> None:
    with sessions(world.router())() as s:
        world.kill_writer()
        assert s.scalar(READ) == STOCK
        assert place(s) == "reader"


@story
def a_closed_router_takes_no_units(world: World) -> None:
    router = world.router()
    router.close()
    with sessions(router)() as s, pytest.raises(RouterError, match="closed"):
        s.execute(WRITE)


# -- transactions that lose their connection -----------------------------------------------------------------------


def run(router: Router, **options: Any) -> int:
    """Raise the stock in a unit that may run again, and return how often it ran."""
    runs = []

    def raise_stock(session: RoutingSession) -> None:
        runs.append(session.scalar(READ))
        session.execute(WRITE)

    router.run_transaction(sessions(router), raise_stock, **options)
    return len(runs)


@story
def a_unit_runs_again_if_a_statement_is_lost(world: World) -> None:
    router = world.router()
    for answer in (False, True):
        before = world.stock()
        world.lose("UPDATE", answer=answer)
        assert run(router) == 2
        assert world.stock() == before + 1


@story
def a_unit_runs_again_if_its_commit_never_arrived(world: World) -> None:
    router = world.router()
    world.lose("COMMIT", answer=False)
    assert run(router, commit_check="xid") == 2
    assert world.stock() == STOCK + 1


@story
def a_unit_is_done_if_only_the_answer_is_lost(world: World) -> None:
    router = world.router()
    world.lose("COMMIT", answer=True)
    assert run(router, commit_check="xid") == 1
    assert world.stock() == STOCK + 1
    assert [e.outcome for e in world.heard if isinstance(e, events.CommitResolved)] == ["committed"]


@story
def a_lost_commit_without_a_check_is_unknown(world: World) -> None:
    router = world.router()
    world.lose("COMMIT", answer=True)
    with pytest.raises(OutcomeUnknown):
        run(router, commit_check=None)
    assert world.stock() == STOCK + 1, "it was not written twice"


@story
def a_session_can_look_its_lost_commit_up(world: World) -> None:
    for answer, outcome in ((True, Outcome.COMMITTED), (False, Outcome.NOT_COMMITTED)):
        with sessions(world.router(), commit_check="xid")() as s:
            before = world.stock()
            s.execute(WRITE)
            world.lose("COMMIT", answer=answer)
            with pytest.raises(OutcomeUnknown) as caught:
                s.commit()
            assert caught.value.resolve() is outcome
            assert world.stock() == before + answer


@story
def a_lost_statement_is_an_error_of_its_session(world: World) -> None:
    """Nobody but the application knows what else the unit has done."""
    with sessions(world.router())() as s:
        s.execute(WRITE)
        world.lose("UPDATE", answer=False)
        with pytest.raises(DBAPIError):
            s.execute(WRITE)
        s.rollback()
        write(s)
    assert world.stock() == STOCK + 1


@story
def what_does_not_exist_is_an_error_at_once(world: World) -> None:
    """A reader may lack what the writer has, and another attempt would not find what no server has."""
    router = world.router()
    for read_only in (None, True, False):
        runs = []

        def read_nothing(session: RoutingSession, runs: list[int] = runs) -> None:
            runs.append(1)
            session.execute(text("SELECT * FROM nowhere"))

        with pytest.raises(DBAPIError):
            router.run_transaction(sessions(router, read_only=read_only), read_nothing)
        assert len(runs) == 1


@story
def a_unit_runs_again_on_the_promoted_reader(world: World) -> None:
    router = world.router(failover_timeout=30.0)
    runs = []

    def raise_stock(session: RoutingSession) -> None:
        session.execute(WRITE)
        runs.append(instance_id(session))
        if len(runs) == 1:
            world.kill_writer()
            world.promote()
            session.execute(WRITE)

    router.run_transaction(sessions(router), raise_stock)
    assert len(set(runs)) == len(runs) == 2
    assert world.stock() == STOCK + 1
