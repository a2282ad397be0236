"""Causal scopes: sessions and connections inside one see what any of them has written, and nobody outside does."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import gc
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from sqlalchemy import select, text
from sqlalchemy.exc import DataError

from aurora_router import OutcomeUnknown, Router
from aurora_router.core.positions import first_sample_after
from aurora_router.local import FaultProxy, PostgresCluster
from aurora_router.router import core_of
from aurora_router.routing.causal_context import open_scopes
from tests.integration.shop import BOTH, RAISE, Item, eventually, family, place, sessions, until_readers_serve, write

MakeRouter = Callable[..., Router]
STOCK = select(Item.stock).where(Item.id == 1)


def test_a_scope_sees_writes_of_its_sessions_and_connections(paused: PostgresCluster, router: Router) -> None:
    """Sessions and connections inside a scope see what any of them has written."""
    until_readers_serve(router, 2)
    with router.causal_scope() as scope:
        with sessions(router)() as s:
            s.execute(RAISE)
            s.commit()
        with sessions(router)() as s:
            assert s.scalar(STOCK) == 11
        with router.connect(read_only=True) as connection:
            assert connection.scalar(STOCK) == 11
        token = scope.token
    with sessions(router)() as s:
        assert s.scalar(STOCK) == 10, "the scope is over"
    with router.causal_scope(token) as scope:
        with router.connect(read_only=True) as connection:
            assert connection.scalar(STOCK) == 11
        assert scope.token == token


def test_an_open_unit_moves_to_what_its_scope_has_written(paused: PostgresCluster, router: Router) -> None:
    """An open unit moves to the writer to see the writes of others in its scope."""
    until_readers_serve(router, 2)
    with router.causal_scope(), sessions(router)() as s:
        assert s.scalar(STOCK) == 10
        assert place(s) == "reader"
        write(router)
        assert s.scalar(STOCK) == 11
        assert place(s) == "writer"


def test_what_is_written_on_a_connection_is_in_the_scopes_token(paused: PostgresCluster, router: Router) -> None:
    until_readers_serve(router, 2)
    with router.causal_scope() as scope:
        with router.begin() as connection:
            connection.execute(RAISE)
        token = scope.token
    assert token is not None
    with sessions(router)(after=token) as s:
        assert s.scalar(STOCK) == 11


def test_a_commit_is_seen_while_its_connection_is_open(paused: PostgresCluster, router: Router) -> None:
    """A commit of a connection is seen while the connection is still open."""
    until_readers_serve(router, 2)
    with router.causal_scope() as scope, router.connect() as connection, sessions(router)() as s:
        connection.execute(RAISE)
        assert s.scalar(STOCK) == 10
        s.rollback()
        connection.commit()
        assert s.scalar(STOCK) == 11
        token = scope.token
    with sessions(router)(after=token) as s:
        assert s.scalar(STOCK) == 11


def test_what_happens_in_a_scope_happens_in_those_around_it(paused: PostgresCluster, router: Router) -> None:
    until_readers_serve(router, 2)
    with router.causal_scope() as outer:
        with router.causal_scope() as inner:
            token = write(router)
        assert inner.token == token
        with sessions(router)() as s:
            assert s.scalar(STOCK) == 11
        with router.causal_scope(), sessions(router)() as s:
            assert s.scalar(STOCK) == 11
        assert outer.token is not None


def test_a_scope_follows_tasks_and_copied_contexts_only(paused: PostgresCluster, router: Router) -> None:
    """A scope goes along with tasks and copied contexts, and not with other threads."""
    until_readers_serve(router, 2)

    def look() -> object:
        with sessions(router)() as s:
            return s.scalar(STOCK)

    async def in_tasks() -> list[object]:
        with router.causal_scope():
            await asyncio.to_thread(write, router)
            return [await asyncio.create_task(asyncio.to_thread(look)), await asyncio.to_thread(look)]

    assert asyncio.run(in_tasks()) == [11, 11]
    found: list[object] = []
    with router.causal_scope():
        write(router)
        for run in (contextvars.copy_context().run, lambda call: call()):
            thread = threading.Thread(target=lambda run=run: found.append(run(look)))
            thread.start()
            thread.join()
    assert found == [12, 10]


def test_scopes_that_end_out_of_order_leave_none_open(router: Router) -> None:
    """Scopes that end in another order than they began leave none open."""
    one, other = router.causal_scope(), router.causal_scope()
    first, second = one.__enter__(), other.__enter__()
    one.__exit__(None, None, None)
    assert open_scopes(first.owner) == (second,)
    other.__exit__(None, None, None)
    assert open_scopes(first.owner) == ()


def test_a_scope_may_end_in_another_context(router: Router) -> None:
    """A scope that ends in another context than it began is no error."""
    block = router.causal_scope()
    scope = contextvars.copy_context().run(block.__enter__)
    with router.causal_scope() as here:
        block.__exit__(None, None, None)
        assert open_scopes(scope.owner) == (here,)


def test_scopes_of_two_routers_do_not_mix(paused: PostgresCluster, make_router: MakeRouter) -> None:
    one, other = make_router(), make_router()
    until_readers_serve(other, 2)
    with one.causal_scope() as scope, other.causal_scope() as another:
        write(one)
        with sessions(other)() as s:
            assert s.scalar(STOCK) == 10
        assert another.token is None
        assert scope.token is not None


def test_an_idle_connection_keeps_no_unit_from_a_reader(router: Router) -> None:
    """A connection that has sent nothing keeps no unit from a reader."""
    until_readers_serve(router, 2)
    with router.causal_scope(), router.connect(), sessions(router)() as s:
        assert s.scalar(STOCK) == 10
        assert place(s) == "reader"


@pytest.mark.parametrize("consistency", ["session", "global"])
def test_an_open_automatic_unit_sees_what_others_commit(
    paused: PostgresCluster, make_router: MakeRouter, consistency: str
) -> None:
    """An open automatic unit sees what others commit meanwhile."""
    router = make_router(consistency=consistency)
    until_readers_serve(router, 2)
    with router.causal_scope() if consistency == "session" else contextlib.nullcontext(), sessions(router)() as s:
        assert s.scalar(STOCK) == 10
        write(router)
        assert s.scalar(STOCK) == 11


@contextlib.contextmanager
def committed(router: Router, way: str) -> Iterator[None]:
    """Raise the stock on a connection that stays checked out."""
    if way == "raw":
        raw = router.raw_connection()
        raw.cursor().execute("UPDATE item SET stock = stock + 1 WHERE id = 1")
        raw.commit()
        yield
        raw.close()
    elif way == "session in autocommit":
        with sessions(router)() as s:
            s.connection(execution_options={"isolation_level": "AUTOCOMMIT"})
            s.execute(RAISE)
            yield
    else:
        with router.connect() as connection:
            if way == "autocommit":
                connection.execution_options(isolation_level="AUTOCOMMIT")
            connection.execute(RAISE)
            if way == "text":
                connection.execute(text("COMMIT"))
            elif way == "commit":
                connection.commit()
            yield


@pytest.mark.parametrize("way", ["commit", "text", "autocommit", "raw", "session in autocommit"])
def test_a_scope_sees_commits_of_an_open_connection(paused: PostgresCluster, router: Router, way: str) -> None:
    """A scope sees what was committed on a connection that is still open."""
    until_readers_serve(router, 2)
    with router.causal_scope() as scope, committed(router, way):
        assert scope.wrote, "middleware looks at this"
        with sessions(router)() as s:
            assert s.scalar(STOCK) == 11
        token = scope.token
        with router.connect(read_only=True, after=token) as connection:
            assert connection.scalar(STOCK) == 11


def test_a_scope_may_be_entered_again_and_goes_on(paused: PostgresCluster, router: Router) -> None:
    until_readers_serve(router, 2)
    scope = router.causal_scope()
    with scope:
        write(router)
    for _ in range(2):
        with scope, sessions(router)() as s:
            assert s.scalar(STOCK) == 11
    assert open_scopes(scope.owner) == ()


def until_proven(router: Router) -> None:
    """Wait until all readers are known to have replayed a position that the writer reports after this moment."""
    now = time.monotonic()

    def proven() -> bool:
        topology = router.topology
        found = first_sample_after(topology.samples, now)
        return found is not None and all(r.position is not None and r.position.covers(found.position) for r in topology.readers)

    eventually(proven)


@pytest.mark.parametrize("consistency", ["session", "global"])
def test_an_unanswered_two_phase_commit_counts_from_its_end(
    cluster: PostgresCluster, proxy: FaultProxy, make: MakeRouter, consistency: str
) -> None:
    """A two-phase commit whose answer is lost counts from its end."""
    router = make(consistency=consistency, probe_interval=0.05)
    with router.causal_scope() as scope:
        with sessions(router, twophase=True)() as s:
            s.execute(RAISE)
            s.prepare()
            until_proven(router)
            for reader in cluster.readers:
                cluster.pause_replay(reader)
            proxy.lose("COMMIT PREPARED", answer=True)
            with pytest.raises(OutcomeUnknown):
                s.commit()
        assert not scope.units
        assert not core_of(router).causality._committing, "or all reads go to the writer from now on"
        with sessions(router)() as other:
            assert other.scalar(STOCK) == 11


@pytest.mark.parametrize("way", ["flush", "bulk"])
def test_a_scope_sees_what_a_flush_has_committed_in_autocommit(
    cluster: PostgresCluster, make_router: MakeRouter, way: str
) -> None:
    router = make_router(probe_interval=0.05, engine_options={"isolation_level": "AUTOCOMMIT"})
    until_readers_serve(router, 2)
    with router.causal_scope() as scope, sessions(router)() as s:
        item = s.get_one(Item, 1)
        until_proven(router)
        for reader in cluster.readers:
            cluster.pause_replay(reader)
        if way == "flush":
            item.stock = 11
            s.flush()
        else:
            s.bulk_update_mappings(Item, [{"id": 1, "stock": 11}])
        with sessions(router)() as other:
            assert other.scalar(STOCK) == 11
        token = scope.token
        with sessions(router)(after=token) as other:
            assert other.scalar(STOCK) == 11


@pytest.mark.parametrize("read_only", [None, True, False])
def test_a_forgotten_session_does_not_stay_in_its_scope(router: Router, read_only: bool | None) -> None:
    """A session that is forgotten without close() does not stay in its scope."""
    with router.causal_scope() as scope:
        for use in (lambda s: s.scalar(STOCK), lambda s: s.connection(), lambda s: s.execute(text("SELECT 1 / 0"))):
            s = sessions(router, read_only=read_only)()
            with contextlib.suppress(DataError):
                use(s)
            del s
        gc.collect()
        assert not scope.units


def chain(raw: Any) -> None:
    cursor = raw.cursor()
    cursor.execute(WRITE)
    cursor.execute("COMMIT AND CHAIN")


def begin_in_the_same_text(raw: Any) -> None:
    raw.cursor().execute(f"{WRITE}; COMMIT; BEGIN")


def begin_again(raw: Any) -> None:
    raw.driver_connection.begin()
    raw.cursor().execute(WRITE)
    raw.driver_connection.begin()


WRITE = "UPDATE item SET stock = stock + 1 WHERE id = 1"
WAYS = {"postgresql": [chain, begin_in_the_same_text], "mysql": [chain, begin_again]}


@BOTH
@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("consistency", ["session", "global"])
def test_a_commit_that_begins_the_next_transaction_is_seen(
    paused: PostgresCluster, make_router: MakeRouter, consistency: str, number: int
) -> None:
    """A commit on the driver's cursor is seen at once, although a transaction is open after it."""
    router = make_router(consistency=consistency)
    until_readers_serve(router, 2)
    with router.causal_scope() as scope, router.connect() as connection:
        WAYS[family(paused)][number](connection.connection)
        with sessions(router)() as s:
            assert s.scalar(STOCK) == 11
        assert scope.token is not None
        connection.rollback()
