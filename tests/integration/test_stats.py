"""router.stats() says what the router has done and what it holds, as seen from outside."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.exc import TimeoutError

from aurora_router import Role, Router, RoutingSession, events
from aurora_router.local import FaultProxy
from aurora_router.local.cluster import Cluster
from tests.integration.shop import BOTH, Item, eventually, instance_id, sessions, through, until_readers_serve

MakeRouter = Callable[..., Router]
ONE = {"pool_size": 1, "max_overflow": 0, "pool_timeout": 0.2}

pytestmark = BOTH


def test_a_unit_that_moves_counts_at_both_instances(cluster: Cluster[Any], router: Router) -> None:
    """An automatic unit that reads and then writes is one read of its reader and one write of the writer."""
    until_readers_serve(router, 2)
    with sessions(router)() as s:
        s.get(Item, 1)
        reader = instance_id(s)
        assert router.stats().by_id[reader].pool_in_use == 1
        s.add(Item(id=100))
        s.flush()
        stats = router.stats()
        assert (stats.by_id[reader].reads_as_reader, stats.by_id[reader].writes) == (1, 0)
        of_writer = stats.by_id[cluster.writer.address]
        assert (of_writer.role, of_writer.reads_as_writer, of_writer.writes) == (Role.WRITER, 0, 1)
        assert (stats.by_id[reader].pool_in_use, of_writer.pool_in_use) == (0, 1)
    after = router.stats()
    assert (after.reads_by_readers, after.reads_by_writer) == (1, 0)
    assert [of.pool_idle for of in (after.by_id[reader], after.by_id[cluster.writer.address])] == [1, 1]
    assert sum(of.connects for of in after.instances) == 2


def test_reads_of_the_writer_have_numbers_of_their_own(cluster: Cluster[Any], make_router: MakeRouter) -> None:
    """Without readers, reads count at the writer, and have a share of its pool while they last."""
    router = make_router(cluster.url, instances=[f"{cluster.writer.host}:1"], writer_share_for_reads=0.5)
    with router.connect(read_only=True):
        assert router.stats().writer_read_slots_in_use == 1
    stats = router.stats()
    assert (stats.reads_by_readers, stats.reads_by_writer, stats.writer_read_slots_in_use) == (0, 1, 0)


def test_a_unit_that_waits_for_a_full_pool_is_counted(cluster: Cluster[Any], make_router: MakeRouter) -> None:
    router = make_router(engine_options=ONE)
    of_writer = cluster.writer.address
    with router.connect():
        assert router.stats().by_id[of_writer].pool_waits == 0
        with pytest.raises(TimeoutError):
            router.connect()
    assert router.stats().by_id[of_writer].pool_waits == 1
    assert router.stats().by_id[of_writer].pool_limit == 1


def test_a_read_whose_connection_is_lost_counts_as_a_retry(cluster: Cluster[Any], router: Router) -> None:
    """The retry counts at the instance that failed."""
    until_readers_serve(router, 2)
    with sessions(router)() as s:
        s.get(Item, 1)
        reader = instance_id(s)
        lost = next(instance for instance in cluster.readers if instance.address == reader)
        cluster.kill(lost)
        s.expire_all()
        s.execute(text("SELECT 1"))
    stats = router.stats()
    assert stats.by_id[reader].retries >= 1
    assert stats.reads_by_readers + stats.reads_by_writer >= 2, "it read somewhere else"


def test_units_that_wait_for_a_writer_are_counted(cluster: Cluster[Any], proxy: FaultProxy, make_router: MakeRouter) -> None:
    """They are seen while they wait, and each wait stays counted."""
    waits: list[events.WaitStarted] = []
    router = make_router(
        through(proxy, cluster),
        instances=[],
        failover_timeout=60.0,
        listeners=[lambda event: waits.append(event) if event == events.WaitStarted("writer") else None],
    )
    with router.connect():
        pass
    proxy.refuse()
    proxy.reset_all()
    eventually(lambda: router.topology.writer is None)
    with ThreadPoolExecutor(3) as threads:
        waiting = [threads.submit(lambda: router.connect().close()) for _ in range(3)]
        eventually(lambda: router.stats().units_waiting_for_writer == 3)
        proxy.heal()
        for one in waiting:
            one.result(60)
    stats = router.stats()
    assert (stats.units_waiting_for_writer, stats.writer_waits) == (0, len(waits))
    assert len(waits) >= 3, "on a slow machine, also before the first probe has ended"


def test_attempts_after_the_first_are_counted(router: Router) -> None:
    """An attempt that fails with its connection is one retry of a transaction."""
    numbers: list[int] = []

    def buy(s: RoutingSession) -> None:
        numbers.append(len(numbers))
        s.add(Item(id=200))
        s.flush()
        if len(numbers) == 1:
            s.connection().connection.dbapi_connection.close()  # type: ignore[union-attr]
            s.execute(text("SELECT 1"))

    router.init_commit_table()
    router.run_transaction(sessions(router), buy)
    assert numbers == [0, 1]
    assert router.stats().transaction_retries == 1
