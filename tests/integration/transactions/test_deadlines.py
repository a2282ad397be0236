"""Policies of tenacity and deadlines say how often a unit is run, and how long it waits for a writer."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import tenacity
from sqlalchemy.exc import OperationalError

from aurora_router import NoWriterAvailable, Router
from aurora_router.local import FaultProxy, PostgresCluster
from tests.integration.shop import eventually, raise_stock, sessions, stock

MakeRouter = Callable[..., Router]


def test_tenacitys_policies_say_how_often_and_how_long(cluster: PostgresCluster, proxy: FaultProxy, router: Router) -> None:
    proxy.lose("COMMIT", answer=False, times=99)
    waits: list[int] = []

    def wait(state: tenacity.RetryCallState) -> float:
        waits.append(state.attempt_number)
        return 0.0

    with pytest.raises(OperationalError):
        router.run_transaction(
            sessions(router), raise_stock, stop=tenacity.stop_after_attempt(3), wait=tenacity.wait_fixed(0) + wait
        )
    assert waits == [1, 2, 3]
    assert stock(cluster) == 10


def test_a_deadline_ends_the_wait_for_a_writer(cluster: PostgresCluster, make_router: MakeRouter) -> None:
    router = make_router()
    router.start()
    cluster.kill(cluster.writer)
    eventually(lambda: router.topology.writer is None)
    with pytest.raises(NoWriterAvailable) as caught:
        router.run_transaction(sessions(router), raise_stock, deadline=0.3)
    assert caught.value.waited < 10, "not the 60 s of failover_timeout; part of the deadline may have passed before"


def test_a_deadline_beyond_the_failover_timeout_is_kept(cluster: PostgresCluster, make_router: MakeRouter) -> None:
    """A unit waits until its deadline, even if that is later than the failover timeout."""
    router = make_router(failover_timeout=0.3)
    router.start()
    cluster.kill(cluster.writer)
    eventually(lambda: router.topology.writer is None)
    with pytest.raises(NoWriterAvailable) as caught:
        router.run_transaction(sessions(router), raise_stock)
    assert 0.2 < caught.value.waited < 10
    with pytest.raises(NoWriterAvailable) as caught:
        router.run_transaction(sessions(router), raise_stock, deadline=1.5)
    assert caught.value.waited > 1.2
