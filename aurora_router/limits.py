"""Limits that keep a router from overrunning its servers: a semaphore that serves in order, and a budget for retries."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable

from aurora_router.core import events
from aurora_router.core.budget import Budget
from aurora_router.stats import Counters
from aurora_router.waiting import Bell, Waiting

# Seconds after which a waiting thread looks by itself, because an exception may have come before its bell was rung.
LOOK = 0.5


class Places:
    """A FIFO semaphore: all wait in one line, and those at its head have a place.

    There is no lock and no counter, because a signal handler may raise an exception at any moment. Each step is one
    operation on a dict, which is then either done or not done.
    """

    def __init__(self, number: float, waiting: Waiting) -> None:
        self.bell = waiting.bell
        self._number = None if math.isinf(number) else int(number)
        self._line: dict[_Turn, None] = {}

    @property
    def crowd(self) -> int:
        """The number of turns that have a place or wait for one; 0 if places have no limit."""
        return len(self._line) if self._number is not None else 0

    @property
    def waiting(self) -> int:
        """The number of turns that wait."""
        return max(len(self._line) - self._number, 0) if self._number is not None else 0

    @property
    def in_use(self) -> int:
        """The number of turns that have a place."""
        return len(self._line) - self.waiting

    def turn_away(self) -> None:
        """Have all that wait now give up, because a place is of no use to them any more."""
        if self.waiting:
            for turn in [*self._line][self._number :]:
                turn.is_over = True
                turn.bell.ring()

    def forked(self) -> None:
        """In a forked child: all places are free, and nobody waits."""
        self._line.clear()

    def _has_place(self, turn: _Turn) -> bool:
        return self._number is None or (turn in self._line and turn in [*self._line][: self._number])

    def _enter(self, turn: _Turn) -> None:
        self._line[turn] = None

    def _leave(self, turn: _Turn) -> None:
        if turn in self._line:
            self._line.pop(turn, None)
            for following in [*self._line][: self._number]:
                following.bell.ring()


class Place:
    """The owner of one place, made before the place is acquired, so that a place always has an owner.

    Call give_back() in the end. If an exception out of a signal handler prevents that, the place is free again when this
    object is collected.
    """

    _turn: _Turn | None = None

    def __init__(self, places: Places) -> None:
        self._places = places

    def __del__(self) -> None:
        self.give_back()

    @property
    def taken(self) -> bool:
        """Whether this object has a place."""
        return self._turn is not None

    def take(self, timeout: float) -> bool:
        """Acquire a place, first come, first served. False after `timeout` seconds or turn_away()."""
        until = time.monotonic() + timeout
        self._turn = turn = _Turn(self._places.bell())
        self._places._enter(turn)
        try:
            while not turn.is_over:
                if self._places._has_place(turn):
                    return True
                left = until - time.monotonic()
                if left <= 0:
                    break
                turn.bell.wait(min(left, LOOK))
        except BaseException:
            self.give_back()
            raise
        self.give_back()
        return False

    def give_back(self) -> None:
        """Release the place. Does nothing if none was acquired."""
        turn = self._turn
        if turn is not None:
            self._places._leave(turn)
            self._turn = None


class _Turn:
    """One entry in the line for places.

    is_over: it gives up unless it has a place already.
    """

    __slots__ = ("bell", "is_over")

    def __init__(self, bell: Bell) -> None:
        self.bell = bell
        self.is_over = False


class Repeats:
    """Decides whether units may retry, and publishes an event if they may not.

    count: counts a unit; takes the time in seconds, monotonic.
    publish: called with an event.
    counters: counts refusals.
    """

    def __init__(self, publish: Callable[[events.Event], None], counters: Counters) -> None:
        self._publish = publish
        self._counters = counters
        self.forked()

    def forked(self) -> None:
        """Begin to count anew, with a free lock: at first and in a forked child."""
        self.budget = Budget(threading.Lock())
        self.count = self.budget.unit

    def allowed(self, instance: str | None, *, first: bool) -> bool:
        """Whether a unit may retry after a failure on that instance. first: whether this is the unit's first retry."""
        now = time.monotonic()
        if self.budget.spend(now, first=first):
            return True
        self._counters.retries_refused += 1
        refused = self.budget.to_tell(now)
        if refused:
            self._publish(events.RetriesRefused(instance, refused))
        return False
