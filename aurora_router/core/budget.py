"""The budget for retries: a share of recent traffic, so that retries never become the load themselves.

This is pure arithmetic. The time is an argument, and so is the lock if threads share a budget.
"""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from typing import Any

SECONDS = 10  # how far back the traffic counts
SHARE = 0.2  # retries that each unit of the traffic pays for
FLOOR = 10.0  # retries a second that are allowed without any traffic
TELL = 1.0  # seconds between two reports of refusals


class RetryBudget:
    """The numbers of units and retries in each of the last SECONDS.

    lock: protects the numbers if threads share them. Units are counted without it, because a rare lost count does no harm.
    """

    def __init__(self, lock: AbstractContextManager[Any] | None = None) -> None:
        self._lock = lock or contextlib.nullcontext()
        self._units = [0] * SECONDS
        self._retries = [0] * SECONDS
        self._second = 0
        self._refused = 0
        self._told_at = float("-inf")

    def record(self, now: float) -> None:
        """Count a unit that got a connection. now: monotonic seconds."""
        second = int(now)
        if second != self._second:
            with self._lock:
                self._turn(second)
        self._units[second % SECONDS] += 1

    def try_spend(self, now: float, *, first: bool) -> bool:
        """Return whether a unit may retry, and count the retry if so.

        now: monotonic seconds.
        first: whether it is the unit's first retry. The first retry is always allowed, so that a failover causes no errors.
            There are never more first retries than units in flight.
        """
        with self._lock:
            self._turn(int(now))
            if not first and sum(self._retries) >= SHARE * sum(self._units) + FLOOR * SECONDS:
                self._refused += 1
                return False
            self._retries[int(now) % SECONDS] += 1
            return True

    def take_refused(self, now: float) -> int:
        """Return the number of retries refused since the last report, and count anew.

        The number is 0 if there are none, or if the last report was less than TELL seconds ago.

        now: monotonic seconds.
        """
        with self._lock:
            if now - self._told_at < TELL:
                return 0
            refused, self._refused = self._refused, 0
            if refused:
                self._told_at = now
            return refused

    def _turn(self, second: int) -> None:
        """Clear the numbers that are too old. A call with an earlier second changes nothing."""
        for passed in range(max(self._second, second - SECONDS) + 1, second + 1):
            self._units[passed % SECONDS] = self._retries[passed % SECONDS] = 0
        self._second = max(self._second, second)
