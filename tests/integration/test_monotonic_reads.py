"""A session, or a scope, is never shown less than it was shown before, whichever reader or writer answers."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence

import pytest
from sqlalchemy import select

from aurora_router import Router
from aurora_router.core.instance import Instance
from aurora_router.core.selection import Load
from aurora_router.local import LocalInstance, PostgresCluster
from tests.integration.shop import BOTH, RAISE, Item, eventually, instance_id, place, sessions, until_readers_serve, write

MakeRouter = Callable[..., Router]
STOCK = select(Item.stock).where(Item.id == 1)


class Readers:
    """Two readers, and a strategy that takes the `wanted` one.

    late: shows the stock of 10
    current: shows the stock of 11
    """

    def __init__(self, late: LocalInstance, current: LocalInstance) -> None:
        self.late, self.current = late, current
        self.wanted = late

    def balance(self, readers: Sequence[Instance], load: Load, rnd: float) -> Instance:
        return next((reader for reader in readers if reader.id == self.wanted.address), readers[0])


@pytest.fixture
def readers(cluster: PostgresCluster) -> Readers:
    late, current = cluster.readers
    cluster.pause_replay(late)
    cluster.execute("UPDATE item SET stock = 11 WHERE id = 1")
    eventually(lambda: cluster.execute("SELECT stock FROM item WHERE id = 1", instance=current) == [(11,)])
    return Readers(late, current)


@pytest.fixture
def split(readers: Readers, make_router: MakeRouter) -> Router:
    """A router that takes the wanted reader."""
    router = make_router(balance=readers.balance)
    until_readers_serve(router, 2)
    return router


def goes_to(router: Router, reader: LocalInstance) -> bool:
    """Whether a read would go to that reader now."""
    instance = router.explain("SELECT 1").instance
    return instance is not None and instance.id == reader.address


@BOTH
def test_later_reads_show_no_less_though_the_reader_changes(readers: Readers, make_router: MakeRouter) -> None:
    router = make_router(balance="round_robin")
    until_readers_serve(router, 2)
    shown = 0
    with sessions(router)() as s:
        for _ in range(30):
            found = s.scalar(STOCK)
            assert found is not None
            assert found >= shown
            shown = found
            s.rollback()
    with router.causal_scope():
        shown = 0
        for _ in range(30):
            with router.connect(read_only=True) as connection:
                found = connection.scalar(STOCK)
            assert found is not None
            assert found >= shown
            shown = found


def test_a_session_entering_a_scope_is_shown_no_less_than_either(readers: Readers, split: Router) -> None:
    """A session that enters a scope is shown no less than it or the scope was shown before."""
    with sessions(split)() as s:
        readers.wanted = readers.current
        assert s.scalar(STOCK) == 11
        s.rollback()
        readers.wanted = readers.late
        with split.causal_scope():
            with sessions(split)() as other:
                assert other.scalar(STOCK) == 10
            assert s.scalar(STOCK) == 11


def test_a_session_stays_with_the_reader_that_it_has_read_from(router: Router) -> None:
    until_readers_serve(router, 2)
    with sessions(router)() as s:
        s.get(Item, 1)
        mine = instance_id(s)
        s.rollback()
        for _ in range(20):
            s.get(Item, 1)
            assert instance_id(s) == mine
            s.rollback()


def test_a_late_reader_takes_back_nothing_the_writer_showed(paused: PostgresCluster, router: Router) -> None:
    """A late reader does not take back what the writer has shown."""
    until_readers_serve(router, 2)
    paused.execute("UPDATE item SET stock = 11 WHERE id = 1")
    with sessions(router)() as s:
        assert s.scalar(STOCK.execution_options(route="writer")) == 11
        s.rollback()
        assert s.scalar(STOCK) == 11


def test_a_unit_whose_reader_dies_is_shown_no_less(cluster: PostgresCluster, readers: Readers, split: Router) -> None:
    """A unit whose reader dies goes on where it is shown no less."""
    readers.wanted = readers.current
    with sessions(split)() as s:
        assert s.scalar(STOCK) == 11
        assert instance_id(s) == readers.current.address
        cluster.kill(readers.current)
        assert s.scalar(STOCK) == 11
        assert place(s) == "writer"


def test_a_read_on_a_reader_left_behind_counts_for_others(cluster: PostgresCluster, readers: Readers, split: Router) -> None:
    """A read that a unit made before it left its reader counts for others of its scope."""
    readers.wanted = readers.current
    with split.causal_scope(), sessions(split)() as s, sessions(split)() as other:
        assert s.scalar(STOCK) == 11
        cluster.kill(readers.current)
        assert s.scalar(STOCK) == 11
        readers.wanted = readers.late
        assert other.scalar(STOCK) == 11


def test_eventual_consistency_promises_none_of_this(paused: PostgresCluster, make_router: MakeRouter) -> None:
    router = make_router(consistency="eventual")
    until_readers_serve(router, 2)
    with router.causal_scope() as scope, sessions(router)() as s:
        s.execute(RAISE)
        s.commit()
        assert s.scalar(STOCK) == 10
        assert s.consistency_token is None
        assert scope.token is None
    with sessions(router)(after=write(make_router())) as s:
        assert s.scalar(STOCK) == 12, "what is given counts"


def test_open_units_of_a_scope_take_nothing_back(readers: Readers, split: Router) -> None:
    """Units of a scope that are open together take nothing back from each other."""
    with split.causal_scope(), sessions(split)() as one, sessions(split)() as other:
        assert one.scalar(STOCK) == 10
        readers.wanted = readers.current
        eventually(lambda: goes_to(split, readers.current))
        assert other.scalar(STOCK) == 11
        assert one.scalar(STOCK) == 11, "the other one was shown it meanwhile, and has not ended"
    with split.causal_scope(), sessions(split)() as one, sessions(split)() as other:
        assert one.scalar(STOCK) == 11
        readers.wanted = readers.late
        assert other.scalar(STOCK) == 11


def test_the_last_of_parallel_reads_does_not_hide_the_other(readers: Readers, split: Router) -> None:
    """The last of parallel reads in a scope does not hide the rows that another one has shown."""
    with split.causal_scope():
        with split.connect(read_only=True) as slow:
            readers.wanted = readers.current
            with split.connect(read_only=True) as quick:
                assert quick.scalar(STOCK) == 11
            assert slow.scalar(STOCK) == 10, "its transaction is where it is"
        readers.wanted = readers.late
        with split.connect(read_only=True) as connection:
            assert connection.scalar(STOCK) == 11


def test_an_open_unit_follows_its_scopes_reads_on_the_writer(readers: Readers, split: Router) -> None:
    """An open unit moves to the writer if another one of its scope has read there."""
    with split.causal_scope(), sessions(split)() as s, sessions(split)() as other:
        assert s.scalar(STOCK) == 10
        assert other.scalar(STOCK.execution_options(route="writer")) == 11
        assert s.scalar(STOCK) == 11


def test_what_a_session_was_shown_counts_though_it_is_forgotten(readers: Readers, split: Router) -> None:
    with split.causal_scope():
        readers.wanted = readers.current
        s = sessions(split)()
        assert s.scalar(STOCK) == 11
        del s
        gc.collect()
        readers.wanted = readers.late
        with sessions(split)() as other:
            assert other.scalar(STOCK) == 11
