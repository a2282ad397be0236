"""Limits that keep a router from overrunning its servers: a semaphore that serves in order, and a budget for retries."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable

from aurora_router.core import events
from aurora_router.core.budget import RetryBudget
from aurora_router.telemetry.stats import Counters
from aurora_router.waiting import Waiting, Wakeup

# Seconds after which a waiting thread checks whether it has a slot. An exception of a signal handler may have prevented its
# wakeup.
LOOK = 0.5


class FairSemaphore:
    """A FIFO semaphore: waiters queue in order, and the first ones hold a slot.

    There is no lock and no counter, because a signal handler may raise an exception at any moment. Each step is one
    operation on a dict, which no exception can leave half-done.
    """

    def __init__(self, number: float, waiting: Waiting) -> None:
        self.wakeup = waiting.wakeup
        self._number = None if math.isinf(number) else int(number)
        self._queue: dict[_Turn, None] = {}

    @property
    def demand(self) -> int:
        """The number of turns that have a slot or wait for one; 0 if slots have no limit."""
        return len(self._queue) if self._number is not None else 0

    @property
    def waiting(self) -> int:
        """The number of turns that wait."""
        return max(len(self._queue) - self._number, 0) if self._number is not None else 0

    @property
    def in_use(self) -> int:
        """The number of turns that have a slot."""
        return len(self._queue) - self.waiting

    def cancel_waiters(self) -> None:
        """Make all waiting turns give up, because a slot is of no use to them any more."""
        if self.waiting:
            for turn in [*self._queue][self._number :]:
                turn.is_over = True
                turn.wakeup.set()

    def forked(self) -> None:
        """Free all slots and forget all waiting turns, in a forked child."""
        self._queue.clear()

    def has_slot(self, turn: _Turn) -> bool:
        return self._number is None or (turn in self._queue and turn in [*self._queue][: self._number])

    def join(self, turn: _Turn) -> None:
        self._queue[turn] = None

    def leave(self, turn: _Turn) -> None:
        if turn in self._queue:
            self._queue.pop(turn, None)
            for following in [*self._queue][: self._number]:
                following.wakeup.set()


class Slot:
    """The owner of one slot. Make it before you acquire the slot, so that no slot is lost.

    Call release() in the end. If an exception of a signal handler prevents that, the slot is released when this object is
    garbage-collected.
    """

    _turn: _Turn | None = None

    def __init__(self, semaphore: FairSemaphore) -> None:
        self._semaphore = semaphore

    def __del__(self) -> None:
        self.release()

    @property
    def acquired(self) -> bool:
        """Whether this object has a slot."""
        return self._turn is not None

    def acquire(self, timeout: float) -> bool:
        """Acquire a slot, first come, first served. Return False after `timeout` seconds or cancel_waiters()."""
        until = time.monotonic() + timeout
        self._turn = turn = _Turn(self._semaphore.wakeup())
        self._semaphore.join(turn)
        try:
            while not turn.is_over:
                if self._semaphore.has_slot(turn):
                    return True
                left = until - time.monotonic()
                if left <= 0:
                    break
                turn.wakeup.wait(min(left, LOOK))
        except BaseException:
            self.release()
            raise
        self.release()
        return False

    def release(self) -> None:
        """Release the slot. Do nothing if none was acquired."""
        turn = self._turn
        if turn is not None:
            self._semaphore.leave(turn)
            self._turn = None


class _Turn:
    """One entry in the line for slots.

    is_over: whether the turn must give up, unless it has a slot already.
    """

    __slots__ = ("is_over", "wakeup")

    def __init__(self, wakeup: Wakeup) -> None:
        self.wakeup = wakeup
        self.is_over = False


class RetryThrottle:
    """Decides whether units may retry, and publishes an event if they may not.

    record_unit: counts a unit; takes the time in seconds, monotonic.
    publish: called with an event.
    counters: counts refusals.
    """

    def __init__(self, publish: Callable[[events.Event], None], counters: Counters) -> None:
        self._publish = publish
        self._counters = counters
        self.forked()

    def forked(self) -> None:
        """Begin to count anew, with a free lock. Called at first and in a forked child."""
        self.budget = RetryBudget(threading.Lock())
        self.record_unit = self.budget.record

    def allow(self, instance: str | None, *, first: bool) -> bool:
        """Return whether a unit may retry after a failure on that instance.

        first: whether this is the unit's first retry.
        """
        now = time.monotonic()
        if self.budget.try_spend(now, first=first):
            return True
        self._counters.retries_refused += 1
        refused = self.budget.take_refused(now)
        if refused:
            self._publish(events.RetriesRefused(instance, refused))
        return False
