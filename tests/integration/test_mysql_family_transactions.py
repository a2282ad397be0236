"""run_transaction on MySQL and MariaDB: the unit takes effect exactly once, by the commit table, and sees its own writes."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
from sqlalchemy import exc, func, insert, select, update

from aurora_router import OutcomeUnknown, Router, RoutingSession
from aurora_router.core import events
from aurora_router.core.selection import Reason
from aurora_router.local import FaultProxy
from tests.integration.mysql_family import NUMBERS, Family, deadlock, on, replica
from tests.integration.shop import (
    RAISE,
    Item,
    engine,
    eventually,
    no_connection_is_left,
    place,
    raise_stock,
    sessions,
    stock,
    until_readers_serve,
)

pytestmark = pytest.mark.engines("mariadb", "mysql")

MakeRouter = Callable[..., Router]
STOCK = select(Item.stock).where(Item.id == 1)


@pytest.mark.parametrize("answer", [False, True], ids=["before the server hears of it", "after it has answered"])
@pytest.mark.parametrize("step", ["UPDATE item", "INSERT INTO `app`.aurora_router_commits", "COMMIT"])
def test_a_loss_at_any_step_leaves_the_unit_done_once(
    cluster: Family, proxy: FaultProxy, make: MakeRouter, step: str, answer: bool
) -> None:
    """A connection lost at any step leaves the unit done exactly once."""
    router = make()
    proxy.lose(step, answer=answer)
    assert router.run_transaction(sessions(router), raise_stock) == 11
    assert proxy._losing == [], "it was lost"
    assert stock(cluster) == 11
    assert no_connection_is_left(router)


def test_commits_lost_several_times_are_each_resolved(
    cluster: Family, proxy: FaultProxy, make: MakeRouter, heard: list[events.Event]
) -> None:
    """Commits that are lost again and again are each resolved."""
    router = make()
    proxy.lose("COMMIT", answer=False, times=3)
    assert router.run_transaction(sessions(router), raise_stock) == 11
    assert stock(cluster) == 11
    resolved = [e.outcome for e in heard if isinstance(e, events.CommitResolved)]
    assert set(resolved) == {"not committed"}
    assert [e.number for e in heard if isinstance(e, events.RunAgain)] == list(range(1, len(resolved) + 1))


def test_a_commit_that_never_arrives_is_waited_for_and_retried(cluster: Family, proxy: FaultProxy, make: MakeRouter) -> None:
    """A transaction whose COMMIT never comes is waited for and run again."""
    # MySQL has no timeout for idle transactions, only one for all idle connections.
    timeout, usual = ("idle_transaction_timeout", 0) if engine(cluster) == "mariadb" else ("wait_timeout", 28800)
    cluster.execute(f"SET GLOBAL {timeout} = 1")
    try:
        router = make()
        proxy.lose("COMMIT", answer=False, half_open=True)
        assert router.run_transaction(sessions(router), raise_stock) == 11
    finally:
        cluster.execute(f"SET GLOBAL {timeout} = {usual}")
    assert stock(cluster) == 11


def test_a_plain_session_resolves_by_the_table_or_knows_nothing(cluster: Family, proxy: FaultProxy, make: MakeRouter) -> None:
    """A plain session that lost a COMMIT asks the commit table, or cannot know."""
    router = make()
    proxy.lose("COMMIT", answer=True)
    with sessions(router, commit_check="xid")() as s:
        s.execute(RAISE)
        with pytest.raises(OutcomeUnknown) as caught:
            s.commit()
    assert caught.value.resolve().value == "committed"
    proxy.lose("COMMIT", answer=True)  # A new connection sends no COMMIT of its own.
    with sessions(router)() as s:
        s.execute(RAISE)
        with pytest.raises(OutcomeUnknown, match="cannot be looked up"):
            s.commit()


def test_a_lost_commit_is_found_on_the_reader_that_was_promoted(cluster: Family, proxy: FaultProxy, make: MakeRouter) -> None:
    router = make()
    with sessions(router, commit_check="table")() as s:
        s.execute(RAISE)
        proxy.lose("COMMIT", answer=True)
        with pytest.raises(OutcomeUnknown) as caught:
            s.commit()
    cluster.wait_in_sync()
    cluster.kill(cluster.writer)
    cluster.promote()
    assert caught.value.resolve().value == "committed"


def test_a_swallowed_deadlock_does_not_end_as_done(cluster: Family, make: MakeRouter) -> None:
    """A transaction that the server has rolled back does not end as done if its error is swallowed."""
    router = make()
    runs: list[int] = []

    def swallows(s: RoutingSession) -> None:
        runs.append(1)
        s.execute(update(Item).where(Item.id == 1).values(stock=Item.stock + 1))
        if len(runs) == 1:
            victim = s.connection().connection.driver_connection
            assert victim is not None
            with pytest.raises(exc.OperationalError, match="1213"):
                deadlock(cluster, s)
        s.execute(update(Item).where(Item.id == 3).values(stock=Item.stock + 1))

    for check in (None, "table"):
        runs.clear()
        router.run_transaction(sessions(router), swallows, commit_check=check)  # type: ignore[arg-type]
        assert len(runs) == 2
    assert cluster.execute("SELECT stock FROM item WHERE id IN (1, 3) ORDER BY id") == [(12,), (32,)]


def test_a_writer_made_read_only_is_probed_at_once(cluster: Family, make_router: MakeRouter) -> None:
    """A writer that is made read-only is probed at once, and its units are run on the next one."""
    router = make_router(probe_interval=30.0)
    until_readers_serve(router, 2)
    assert router.run_transaction(sessions(router), raise_stock, commit_check=None) == 11
    old = cluster.writer
    cluster.wait_in_sync()
    cluster.promote()
    cluster.rejoin(old)
    assert router.run_transaction(sessions(router), raise_stock, commit_check=None) == 12
    assert router.topology.writer is not None
    assert router.topology.writer.id == cluster.writer.address != old.address


def test_old_commit_rows_are_removed_outside_of_requests(cluster: Family, make: MakeRouter) -> None:
    """Old rows of the commit table are removed outside of any request."""
    router = make()
    old = f"{NUMBERS.format(1, 72)} SELECT uuid(), now() - INTERVAL 2 HOUR FROM n, n AS m LIMIT 5100"
    on(cluster, f"INSERT INTO aurora_router_commits (id, at) {old}", "INSERT INTO aurora_router_commits (id) VALUES (uuid())")
    router.run_transaction(sessions(router), raise_stock)
    too_old = "SELECT count(*) FROM aurora_router_commits WHERE at < now() - INTERVAL 1 HOUR"
    eventually(lambda: cluster.execute(too_old) == [(0,)], timeout=30)
    ((found,),) = cluster.execute("SELECT count(*) FROM aurora_router_commits")
    assert found >= 2


def test_increments_of_what_a_late_reader_shows_are_all_there(cluster: Family, make_router: MakeRouter) -> None:
    for reader in cluster.readers:
        cluster.set_lag(reader, 0.2)
    heard: list[events.Event] = []
    router = make_router(listeners=[heard.append])
    router.init_commit_table()
    until_readers_serve(router, 2)
    errors: list[BaseException] = []

    def increment(s: RoutingSession) -> None:
        s.get_one(Item, 1).stock += 1

    def work() -> None:
        try:
            for _ in range(5):
                router.run_transaction(sessions(router), increment)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert stock(cluster) == 10 + 20
    assert Reason.STALE_READ in {e.reason for e in heard if isinstance(e, events.Routed)}


def test_own_writes_are_seen_after_a_promotion_that_lost_some(cluster: Family, make_router: MakeRouter) -> None:
    """A session sees its own writes after a promotion that lost its earlier ones.

    No reader will ever have the lost writes, so their session is not kept on the writer for ever.
    """
    router = make_router(probe_interval=0.05)
    for reader in cluster.readers:
        on(cluster, f"STOP {replica(cluster)} IO_THREAD", instance=reader)
    with sessions(router)() as s:
        s.execute(insert(Item).values(id=77))
        s.commit()
        assert s.scalar(select(func.count()).where(Item.id == 77)) == 1
        s.rollback()
        cluster.kill(cluster.writer)
        cluster.promote()
        assert s.scalar(select(func.count()).where(Item.id == 77)) == 0, "lost"
        s.rollback()
        s.execute(RAISE)
        s.commit()
        assert s.scalar(STOCK) == 11

        def on_a_reader() -> bool:
            s.rollback()
            assert s.scalar(STOCK) == 11
            return place(s) == "reader"

        eventually(on_a_reader)
