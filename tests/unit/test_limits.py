"""Places are never more than the limit, go to the first in the queue, and let nobody wait for ever."""

from __future__ import annotations

import gc
import math
import signal
import threading
import time

import pytest
from sqlalchemy import create_engine
from sqlalchemy.pool import NullPool

from aurora_router.core import events
from aurora_router.core.budget import FLOOR, SECONDS
from aurora_router.dialect_patches import limit_connects
from aurora_router.limits import Place, Places, Repeats
from aurora_router.stats import Counters
from aurora_router.waiting import Threads
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
    """A thread that waits for a place."""

    def __init__(self, places: Places, timeout: float = 30.0) -> None:
        self.got: bool | None = None
        self.place = Place(places)
        before = places.waiting
        self.thread = threading.Thread(target=self._take, args=(timeout,))
        self.thread.start()
        until(lambda: places.waiting == before + 1 or self.got is not None)

    def _take(self, timeout: float) -> None:
        self.got = self.place.take(timeout)


def taken(places: Places, count: int) -> list[Place]:
    """Acquire `count` places, which must be free."""
    found = [Place(places) for _ in range(count)]
    assert all(place.take(0) for place in found)
    return found


def test_a_place_can_be_released_by_gc_during_a_release():
    """The garbage collector may release a place while another one is released."""
    thresholds = gc.get_threshold()
    for allocations in range(1, 41):
        places = Places(2, Threads())
        (mine,) = taken(places, 1)
        waiting = []
        owner = [taken(places, 1)]
        owner.append(owner)  # a cycle, which only the collector finds
        waiting = [Waiter(places)]
        gc.collect()
        gc.disable()
        del owner
        giving = threading.Thread(target=mine.give_back, daemon=True)
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
        assert places.crowd == 1


def test_a_free_place_is_had_at_once_and_the_crowd_is_known():
    places = Places(2, Threads())
    assert places.crowd == 0
    first, _second = taken(places, 2)
    assert places.crowd == 2
    another = Place(places)
    assert not another.take(0)
    assert not another.taken
    assert places.in_use == 2
    first.give_back()
    first.give_back()
    assert places.crowd == 1
    assert another.take(0)
    assert another.taken


def test_there_can_be_places_without_end():
    places = Places(math.inf, Threads())
    crowd = taken(places, 100)
    places.turn_away()
    crowd[0].give_back()
    assert crowd[0].take(0)
    assert places.in_use == 100
    assert (places.crowd, places.waiting) == (0, 0), "who counts nothing knows of no crowd"


def test_who_came_first_is_served_first():
    places = Places(1, Threads())
    (held,) = taken(places, 1)
    waiters = [Waiter(places) for _ in range(4)]
    assert places.crowd == 5
    for turn, waiter in enumerate(waiters):
        held.give_back()
        waiter.thread.join(10)
        held = waiter.place
        assert [w.got for w in waiters] == [True] * (turn + 1) + [None] * (3 - turn)
        assert not Place(places).take(0), "nor does one that comes later get in between"
    held.give_back()
    assert places.crowd == 0


def test_who_waits_in_vain_leaves_the_queue():
    places = Places(1, Threads())
    (held,) = taken(places, 1)
    assert not Place(places).take(0.01)
    assert places.waiting == 0
    held.give_back()
    assert Place(places).take(0)


def test_waiting_callers_can_be_turned_away():
    """Waiting callers can be cancelled, and later callers wait as usual."""
    places = Places(1, Threads())
    places.turn_away()
    (held,) = taken(places, 1)
    waiters = [Waiter(places) for _ in range(3)]
    places.turn_away()
    held.give_back()  # nobody gets it, because the waiters are cancelled already
    for waiter in waiters:
        waiter.thread.join(10)
    assert [w.got for w in waiters] == [False] * 3
    assert held.take(0)
    late = Waiter(places)
    assert late.got is None
    held.give_back()
    late.thread.join(10)
    assert late.got is True


def test_a_forked_child_begins_with_all_places_free():
    places = Places(1, Threads())
    (of_the_parent,) = taken(places, 1)
    places.forked()
    assert places.crowd == 0
    (mine,) = taken(places, 1)
    of_the_parent.give_back()
    assert not Place(places).take(0)
    assert mine.taken


def test_a_signal_while_waiting_costs_no_place():
    places = Places(1, Threads())
    (held,) = taken(places, 1)

    def interrupt(*_: object) -> None:
        held.give_back()  # the waiting thread gets the place at the moment of its interruption
        raise KeyboardInterrupt

    usual = signal.signal(signal.SIGALRM, interrupt)
    mine = Place(places)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        with pytest.raises(KeyboardInterrupt):
            mine.take(30)
    finally:
        signal.signal(signal.SIGALRM, usual)
    assert places.crowd == 0
    assert mine.take(0)


def test_an_exception_at_any_line_costs_no_place_and_no_call():
    """After an exception anywhere between acquire and release, the place is free again, and a waiting thread gets it."""
    places = Places(2, Threads())

    def work() -> None:
        place = Place(places)
        try:
            assert place.take(0)
        finally:
            place.give_back()

    for _ in interrupted_at_each_line(work, "limits.py", "waiting.py"):
        assert places.crowd == 0

    def hand_over() -> None:
        (mine, other) = taken(places, 2)
        waiting.append(Waiter(places, timeout=5.0))
        mine.give_back()
        other.give_back()

    waiting: list[Waiter] = []
    for _ in interrupted_at_each_line(hand_over, "limits.py", "waiting.py"):
        while waiting:
            waiter = waiting.pop()
            waiter.thread.join(10)
            assert waiter.got is True
            del waiter
        until(lambda: gc.collect() >= 0 and places.crowd == 0)  # a waiter that is not in the list ends too


def test_an_exception_at_any_line_of_a_connect_costs_no_turn():
    """An exception of a signal handler anywhere during a connect does not lose its turn to connect."""
    engine = create_engine("sqlite://", poolclass=NullPool)
    places = Places(1, Threads())
    limit_connects(engine, places, 1.0, Threads())

    def work() -> None:
        engine.dialect.connect(":memory:").close()

    for _ in interrupted_at_each_line(work, "limits.py", "waiting.py", "dialect_patches.py"):
        assert places.crowd == 0
    work()


def test_many_threads_never_have_more_places_than_there_are():
    places = Places(3, Threads())
    lock = threading.Lock()
    inside = most = 0

    def work() -> None:
        nonlocal inside, most
        for _ in range(50):
            place = Place(places)
            assert place.take(30)
            with lock:
                inside += 1
                most = max(most, inside)
            time.sleep(0)
            with lock:
                inside -= 1
            place.give_back()

    threads = [threading.Thread(target=work) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 3
    assert places.crowd == 0


def test_repeats_that_are_refused_are_told_with_the_instance():
    heard: list[events.Event] = []
    counters = Counters()
    repeats = Repeats(heard.append, counters)
    assert repeats.allowed("db-1:5432", first=True)
    while repeats.allowed("db-1:5432", first=False):
        pass
    assert heard == [events.RetriesRefused("db-1:5432", 1)]
    repeats.allowed("db-1:5432", first=False)
    assert len(heard) == 1, "but not each of them"
    assert counters.retries_refused == 2
    assert repeats.allowed("db-1:5432", first=True)
    for _ in range(int(FLOOR * SECONDS / 0.2) + 100):
        repeats.count(time.monotonic())
    assert repeats.allowed("db-1:5432", first=False), "traffic pays"
