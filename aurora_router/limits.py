"""What keeps a router from overrunning its servers: places of which only so many are taken at once, and a budget for repeats."""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Callable

from aurora_router.core import events
from aurora_router.core.budget import Budget

LOOK = 0.5  # seconds after which waiting threads look themselves: an exception may have come before they were called


class Places:
    """A number of places for which all wait in one line. Those at its head have a place, as many as there are.

    There is no lock and nothing that is counted: each step is one operation on a dict, which is done or not done when an
    exception comes out of a signal handler.
    """

    def __init__(self, number: float) -> None:
        self._number = None if math.isinf(number) else int(number)
        self._line: dict[_Turn, None] = {}

    @property
    def crowd(self) -> int:
        """How many have a place or wait for one; 0 if the number of places has no limit."""
        return len(self._line) if self._number is not None else 0

    @property
    def waiting(self) -> int:
        """How many wait."""
        return max(len(self._line) - self._number, 0) if self._number is not None else 0

    def turn_away(self) -> None:
        """End the waiting of all that wait now: what they wait for is of no use any more."""
        if self.waiting:
            for turn in [*self._line][self._number :]:
                turn.is_over = True
                turn.call()

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
                following.call()


class Place:
    """One place of several, which may be taken. It is made before that, so that there is an owner at every moment.

    An owner calls give_back() in the end. A place whose owner could not do that, because an exception out of a signal handler
    came first, is free again when this object is forgotten.
    """

    _turn: _Turn | None = None

    def __init__(self, places: Places) -> None:
        self._places = places

    def __del__(self) -> None:
        self.give_back()

    @property
    def taken(self) -> bool:
        """Whether it is this object's until give_back()."""
        return self._turn is not None

    def take(self, timeout: float) -> bool:
        """Whether there was a place within that many seconds, before turn_away(); first come, first served."""
        until = time.monotonic() + timeout
        self._turn = turn = _Turn()
        self._places._enter(turn)
        try:
            while not turn.is_over:
                if self._places._has_place(turn):
                    return True
                left = until - time.monotonic()
                if left <= 0:
                    break
                turn.wait(min(left, LOOK))
        except BaseException:
            self.give_back()
            raise
        self.give_back()
        return False

    def give_back(self) -> None:
        """Leave the place to the next; does nothing where none was taken."""
        turn = self._turn
        if turn is not None:
            self._places._leave(turn)
            self._turn = None


class _Turn:
    """A position in the line for places.

    is_over: it ends without a place if it has none yet.
    """

    __slots__ = ("_called", "is_over")

    def __init__(self) -> None:
        self._called = threading.Lock()  # not an Event, in the midst of which an exception may come
        self._called.acquire()
        self.is_over = False

    def wait(self, timeout: float) -> None:
        self._called.acquire(timeout=timeout)

    def call(self) -> None:
        with contextlib.suppress(RuntimeError):  # it was called before
            self._called.release()


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
