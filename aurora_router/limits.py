"""What keeps a router from overrunning its servers: places of which only so many are taken at once, and a budget for repeats."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable

from aurora_router.core import events
from aurora_router.core.budget import Budget


class Places:
    """A number of places: who finds none waits, first come first served, until a deadline of its own. Holds no lock meanwhile."""

    def __init__(self, number: float) -> None:
        self.number = number
        self._free = number
        self._lock = threading.RLock()  # the collector may give a place back while it is held
        self._queue: deque[_Waiting] = deque()  # empty while a place is free: one that is given back goes to the first of them

    @property
    def crowd(self) -> int:
        """How many have a place or wait for one."""
        return int(self.number - self._free) + len(self._queue) if self._free < self.number else 0

    @property
    def waiting(self) -> int:
        """How many wait."""
        return len(self._queue)

    def take(self, timeout: float) -> bool:
        """Whether there was a place within that many seconds, and nobody turned away who waited. Must be given back."""
        waiting = _Waiting()
        try:
            with self._lock:
                if self._free > 0:
                    self._free -= 1
                    return True
                if timeout <= 0:
                    return False
                self._queue.append(waiting)
            waiting.called.wait(timeout)
        except BaseException:
            self._leave(waiting)
            if waiting.has_place:
                self.give_back()
            raise
        self._leave(waiting)
        return waiting.has_place

    def give_back(self) -> None:
        """Leave a place to the next."""
        with self._lock:
            if self._queue:
                following = self._queue.popleft()
                following.has_place = True
                following.called.set()
            else:
                self._free += 1

    def turn_away(self) -> None:
        """End the waiting of all who wait now: what they wait for is of no use any more."""
        if self._queue:
            with self._lock:
                while self._queue:
                    self._queue.popleft().called.set()

    def forked(self) -> None:
        """In a forked child: all places are free, nobody waits, nobody holds the lock."""
        self._free = self.number
        self._lock = threading.RLock()
        self._queue.clear()

    def _leave(self, waiting: _Waiting) -> None:
        with self._lock:
            if waiting in self._queue:
                self._queue.remove(waiting)


class _Waiting:
    """Somebody who waits for a place."""

    def __init__(self) -> None:
        self.called = threading.Event()
        self.has_place = False


class Repeats:
    """Says whether units may try again, and tells the listeners when they may not.

    count: counts a unit, given the time. emit: called with an event's class and its values.
    """

    def __init__(self, emit: Callable[..., None]) -> None:
        self._emit = emit
        self.forked()

    def forked(self) -> None:
        """In a forked child, and at first: begin to count; nobody holds the lock."""
        self.budget = Budget(threading.Lock())
        self.count = self.budget.unit

    def allowed(self, instance: str | None, *, first: bool) -> bool:
        """Whether a unit may try once more after a failure on that instance. first: it is the unit's first repeat."""
        now = time.monotonic()
        if self.budget.spend(now, first=first):
            return True
        refused = self.budget.to_tell(now)
        if refused:
            self._emit(events.RetriesRefused, instance, refused)
        return False
