"""Slots are never more than the limit, go to the first in the queue, and let nobody wait for ever."""

from __future__ import annotations

import gc
import math
import signal
import threading
import time

import pytest
from sqlalchemy import create_engine
from sqlalchemy.pool import NullPool

from aurora_router.cluster.dialect_patches import limit_connects
from aurora_router.cluster.limits import FairSemaphore, RetryThrottle, Slot
from aurora_router.core import events
from aurora_router.core.budget import FLOOR, SECONDS
from aurora_router.telemetry.stats import Counters
from aurora_router.waiting import ThreadWaiting
from tests.interruptions import interrupted_at_each_line


@pytest.fixture(autouse=True)
def _quick_collections():
    """Freeze the present objects for the garbage collector, because these tests call it very often."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def until(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.001)


class Waiter:
    """A thread that waits for a slot."""

    def __init__(self, semaphore: FairSemaphore, timeout: float = 30.0) -> None:
        self.got: bool | None = None
        self.slot = Slot(semaphore)
        before = semaphore.waiting
        self.thread = threading.Thread(target=self._take, args=(timeout,))
        self.thread.start()
        until(lambda: semaphore.waiting == before + 1 or self.got is not None)

    def _take(self, timeout: float) -> None:
        self.got = self.slot.acquire(timeout)


def taken(semaphore: FairSemaphore, count: int) -> list[Slot]:
    """Acquire `count` semaphore, which must be free."""
    found = [Slot(semaphore) for _ in range(count)]
    assert all(slot.acquire(0) for slot in found)
    return found


def test_a_place_can_be_released_by_gc_during_a_release():
    """The garbage collector may release a slot while another one is released."""
    thresholds = gc.get_threshold()
    for allocations in range(1, 41):
        semaphore = FairSemaphore(2, ThreadWaiting())
        (mine,) = taken(semaphore, 1)
        waiting = []
        owner = [taken(semaphore, 1)]
        owner.append(owner)  # a cycle, which only the collector finds
        waiting = [Waiter(semaphore)]
        gc.collect()
        gc.disable()
        del owner
        giving = threading.Thread(target=mine.release, daemon=True)
        gc.set_threshold(allocations)
        gc.enable()
        try:
            giving.start()
            giving.join(10)
            assert not giving.is_alive()
        finally:
            gc.set_threshold(*thresholds)
        waiting[0].thread.join(10)
        assert waiting[0].got
        gc.collect()
        assert semaphore.demand == 1


def test_a_free_place_is_had_at_once_and_the_crowd_is_known():
    semaphore = FairSemaphore(2, ThreadWaiting())
    assert semaphore.demand == 0
    first, _second = taken(semaphore, 2)
    assert semaphore.demand == 2
    another = Slot(semaphore)
    assert not another.acquire(0)
    assert not another.acquired
    assert semaphore.in_use == 2
    first.release()
    first.release()
    assert semaphore.demand == 1
    assert another.acquire(0)
    assert another.acquired


def test_there_can_be_places_without_end():
    semaphore = FairSemaphore(math.inf, ThreadWaiting())
    crowd = taken(semaphore, 100)
    semaphore.cancel_waiters()
    crowd[0].release()
    assert crowd[0].acquire(0)
    assert semaphore.in_use == 100
    assert (semaphore.demand, semaphore.waiting) == (0, 0), "who counts nothing knows of no crowd"


def test_who_came_first_is_served_first():
    semaphore = FairSemaphore(1, ThreadWaiting())
    (held,) = taken(semaphore, 1)
    waiters = [Waiter(semaphore) for _ in range(4)]
    assert semaphore.demand == 5
    for turn, waiter in enumerate(waiters):
        held.release()
        waiter.thread.join(10)
        held = waiter.slot
        assert [w.got for w in waiters] == [True] * (turn + 1) + [None] * (3 - turn)
        assert not Slot(semaphore).acquire(0), "nor does one that comes later get in between"
    held.release()
    assert semaphore.demand == 0


def test_who_waits_in_vain_leaves_the_queue():
    semaphore = FairSemaphore(1, ThreadWaiting())
    (held,) = taken(semaphore, 1)
    assert not Slot(semaphore).acquire(0.01)
    assert semaphore.waiting == 0
    held.release()
    assert Slot(semaphore).acquire(0)


def test_waiting_callers_can_be_turned_away():
    """Waiting callers can be cancelled, and later callers wait as usual."""
    semaphore = FairSemaphore(1, ThreadWaiting())
    semaphore.cancel_waiters()
    (held,) = taken(semaphore, 1)
    waiters = [Waiter(semaphore) for _ in range(3)]
    semaphore.cancel_waiters()
    held.release()  # nobody gets it, because the waiters are cancelled already
    for waiter in waiters:
        waiter.thread.join(10)
    assert [w.got for w in waiters] == [False] * 3
    assert held.acquire(0)
    late = Waiter(semaphore)
    assert late.got is None
    held.release()
    late.thread.join(10)
    assert late.got is True


def test_a_forked_child_begins_with_all_places_free():
    semaphore = FairSemaphore(1, ThreadWaiting())
    (of_the_parent,) = taken(semaphore, 1)
    semaphore.forked()
    assert semaphore.demand == 0
    (mine,) = taken(semaphore, 1)
    of_the_parent.release()
    assert not Slot(semaphore).acquire(0)
    assert mine.acquired


def test_a_signal_while_waiting_costs_no_place():
    semaphore = FairSemaphore(1, ThreadWaiting())
    (held,) = taken(semaphore, 1)

    def interrupt(*_: object) -> None:
        held.release()  # the waiting thread gets the slot at the moment of its interruption
        raise KeyboardInterrupt

    usual = signal.signal(signal.SIGALRM, interrupt)
    mine = Slot(semaphore)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        with pytest.raises(KeyboardInterrupt):
            mine.acquire(30)
    finally:
        signal.signal(signal.SIGALRM, usual)
    assert semaphore.demand == 0
    assert mine.acquire(0)


def test_an_exception_at_any_line_costs_no_place_and_no_call():
    """After an exception anywhere between acquire and release, the slot is free again, and a waiting thread gets it."""
    semaphore = FairSemaphore(2, ThreadWaiting())

    def work() -> None:
        slot = Slot(semaphore)
        try:
            assert slot.acquire(0)
        finally:
            slot.release()

    for _ in interrupted_at_each_line(work, "limits.py", "waiting.py"):
        assert semaphore.demand == 0

    def hand_over() -> None:
        (mine, other) = taken(semaphore, 2)
        waiting.append(Waiter(semaphore, timeout=5.0))
        mine.release()
        other.release()

    waiting: list[Waiter] = []
    for _ in interrupted_at_each_line(hand_over, "limits.py", "waiting.py"):
        while waiting:
            waiter = waiting.pop()
            waiter.thread.join(10)
            assert waiter.got is True
            del waiter
        until(lambda: gc.collect() >= 0 and semaphore.demand == 0)  # a waiter that is not in the list ends too


def test_an_exception_at_any_line_of_a_connect_costs_no_turn():
    """An exception of a signal handler anywhere during a connect does not lose its turn to connect."""
    engine = create_engine("sqlite://", poolclass=NullPool)
    semaphore = FairSemaphore(1, ThreadWaiting())
    limit_connects(engine, semaphore, 1.0, ThreadWaiting())

    def work() -> None:
        engine.dialect.connect(":memory:").close()

    for _ in interrupted_at_each_line(work, "limits.py", "waiting.py", "dialect_patches.py"):
        assert semaphore.demand == 0
    work()


def test_many_threads_never_have_more_places_than_there_are():
    semaphore = FairSemaphore(3, ThreadWaiting())
    lock = threading.Lock()
    inside = most = 0

    def work() -> None:
        nonlocal inside, most
        for _ in range(50):
            slot = Slot(semaphore)
            assert slot.acquire(30)
            with lock:
                inside += 1
                most = max(most, inside)
            time.sleep(0)
            with lock:
                inside -= 1
            slot.release()

    threads = [threading.Thread(target=work) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 3
    assert semaphore.demand == 0


def test_repeats_that_are_refused_are_told_with_the_instance():
    heard: list[events.Event] = []
    counters = Counters()
    throttle = RetryThrottle(heard.append, counters)
    assert throttle.allow("db-1:5432", first=True)
    while throttle.allow("db-1:5432", first=False):
        pass
    assert heard == [events.RetriesRefused("db-1:5432", 1)]
    throttle.allow("db-1:5432", first=False)
    assert len(heard) == 1, "but not each of them"
    assert counters.retries_refused == 2
    assert throttle.allow("db-1:5432", first=True)
    for _ in range(int(FLOOR * SECONDS / 0.2) + 100):
        throttle.record_unit(time.monotonic())
    assert throttle.allow("db-1:5432", first=False), "traffic pays"
