"""Places: never more than there are, first come first served, and nobody waits for ever."""

from __future__ import annotations

import gc
import math
import signal
import threading
import time

import pytest

from aurora_router.core import events
from aurora_router.core.budget import FLOOR, SECONDS
from aurora_router.limits import Places, Repeats


def until(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.001)


class Waiter:
    """A thread that wants a place."""

    def __init__(self, places: Places, timeout: float = 30.0) -> None:
        self.got: bool | None = None
        before = places.waiting
        self.thread = threading.Thread(target=self._take, args=(places, timeout))
        self.thread.start()
        until(lambda: places.waiting == before + 1 or self.got is not None)

    def _take(self, places: Places, timeout: float) -> None:
        self.got = places.take(timeout)


class Borrower:
    """Who has a place, and is forgotten with it."""

    def __init__(self, places: Places) -> None:
        self.places, self.itself = places, self

    def __del__(self) -> None:
        self.places.give_back()


def test_the_collector_may_give_a_place_back_while_another_one_is_given_back():
    thresholds = gc.get_threshold()
    for allocations in range(1, 41):
        places = Places(2)
        assert places.take(0)
        assert places.take(0)
        waiter = Waiter(places)
        gc.collect()
        gc.disable()
        Borrower(places)
        giving = threading.Thread(target=places.give_back, daemon=True)
        gc.set_threshold(allocations)
        gc.enable()
        try:
            giving.start()
            giving.join(10)
            assert not giving.is_alive()
        finally:
            gc.set_threshold(*thresholds)
        waiter.thread.join(10)
        assert waiter.got
        gc.collect()
        assert places.crowd == 1


def test_a_free_place_is_had_at_once_and_the_crowd_is_known():
    places = Places(2)
    assert places.crowd == 0
    assert places.take(0)
    assert places.take(0)
    assert places.crowd == 2
    assert not places.take(0)
    places.give_back()
    assert places.crowd == 1
    assert places.take(0)


def test_there_can_be_places_without_end():
    places = Places(math.inf)
    assert all(places.take(0) for _ in range(100))
    places.give_back()
    assert places.take(0)
    assert places.crowd == 0, "who counts nothing knows of no crowd"


def test_who_came_first_is_served_first():
    places = Places(1)
    places.take(0)
    waiters = [Waiter(places) for _ in range(4)]
    assert places.crowd == 5
    for turn, waiter in enumerate(waiters):
        places.give_back()
        waiter.thread.join(10)
        assert [w.got for w in waiters] == [True] * (turn + 1) + [None] * (3 - turn)
        assert not places.take(0), "nor does one that comes later get in between"
    places.give_back()
    assert places.crowd == 0


def test_who_waits_in_vain_leaves_the_queue():
    places = Places(1)
    places.take(0)
    assert not places.take(0.01)
    assert places.waiting == 0
    places.give_back()
    assert places.take(0)


def test_who_waits_can_be_turned_away_and_those_who_come_later_wait():
    places = Places(1)
    places.turn_away()
    places.take(0)
    waiters = [Waiter(places) for _ in range(3)]
    places.turn_away()
    for waiter in waiters:
        waiter.thread.join(10)
    assert [w.got for w in waiters] == [False] * 3
    late = Waiter(places)
    assert late.got is None
    places.give_back()
    late.thread.join(10)
    assert late.got is True


def test_a_signal_while_waiting_costs_no_place():
    places = Places(1)
    places.take(0)

    def interrupt(*_: object) -> None:
        places.give_back()  # the place is ours at the very moment when we are interrupted
        raise KeyboardInterrupt

    usual = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        with pytest.raises(KeyboardInterrupt):
            places.take(30)
    finally:
        signal.signal(signal.SIGALRM, usual)
    assert places.crowd == 0
    assert places.take(0)


def test_many_threads_never_have_more_places_than_there_are():
    places = Places(3)
    lock = threading.Lock()
    inside = most = 0

    def work() -> None:
        nonlocal inside, most
        for _ in range(50):
            assert places.take(30)
            with lock:
                inside += 1
                most = max(most, inside)
            time.sleep(0)
            with lock:
                inside -= 1
            places.give_back()

    threads = [threading.Thread(target=work) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 3
    assert places.crowd == 0


def test_repeats_that_are_refused_are_told_with_the_instance():
    heard: list[events.Event] = []
    repeats = Repeats(lambda kind, *values: heard.append(kind(*values)))
    assert repeats.allowed("db-1:5432", first=True)
    while repeats.allowed("db-1:5432", first=False):
        pass
    assert heard == [events.RetriesRefused("db-1:5432", 1)]
    repeats.allowed("db-1:5432", first=False)
    assert len(heard) == 1, "but not each of them"
    assert repeats.allowed("db-1:5432", first=True)
    for _ in range(int(FLOOR * SECONDS / 0.2) + 100):
        repeats.count(time.monotonic())
    assert repeats.allowed("db-1:5432", first=False), "traffic pays"
