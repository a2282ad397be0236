"""An exception of a signal handler in an application's thread leaves nothing of the router held or counted."""

from __future__ import annotations

import contextlib
import threading

from sqlalchemy.orm import sessionmaker

from aurora_router import NoWriterAvailable, Router, RoutingSession
from aurora_router.cluster.monitor import Urgency
from aurora_router.router import core_of
from tests.fakes.cluster import FakeCluster
from tests.fakes.driver import installed
from tests.integration.shop import eventually
from tests.interruptions import interrupted_at_each_line
from tests.stories import WRITE


def test_an_exception_below_the_monitor_leaves_its_lock_free():
    """The exception comes in the library code that wakes the monitor's threads. Afterwards another thread can still call it."""
    router = Router("postgresql+psycopg://app:x@127.0.0.1:1/shop")
    monitor = core_of(router).monitor

    def work() -> None:
        monitor.suspect("127.0.0.1:1")
        monitor.request_positions()
        monitor.wait_for(lambda topology: False, 0.0, urgency=Urgency.OWN_PROBE)
        monitor.request_catalog()

    for _ in interrupted_at_each_line(work, "threading.py", "contextlib.py", "aurora_router/waiting.py"):
        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        thread.join(10)
        assert not thread.is_alive(), "the lock is still held"


def test_an_exception_in_a_wait_leaves_no_unit_waiting():
    """The number of units that wait for a writer is 0 again after an exception at any line of the wait."""
    cluster = FakeCluster(readers=1)
    with installed(cluster), Router("postgresql+fakepg://app@db-1/shop", instances=["db-2"], failover_timeout=0.02) as router:
        router.start()
        sessions = sessionmaker(class_=RoutingSession, router=router)
        cluster.kill(cluster.writer)
        eventually(lambda: router.topology.writer is None)

        def work() -> None:
            with sessions() as s, contextlib.suppress(NoWriterAvailable):
                s.execute(WRITE)

        for _ in interrupted_at_each_line(work, "routing/waits.py"):
            assert router.stats().units_waiting_for_writer == 0
