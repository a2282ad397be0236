"""An exception of a signal handler in an application's thread leaves nothing of the router held or counted."""

from __future__ import annotations

import threading

from aurora_router import Router
from aurora_router.cluster.monitor import Urgency
from tests.interruptions import interrupted_at_each_line


def test_an_exception_below_the_monitor_leaves_its_lock_free():
    """The exception comes in the library code that wakes the monitor's threads. Afterwards another thread can still call it."""
    router = Router("postgresql+psycopg://app:x@127.0.0.1:1/shop")
    monitor = router._core.monitor

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
