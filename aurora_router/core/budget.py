"""How often units may try again: repeats are a share of recent traffic, so that trying again never becomes the load itself.

Pure arithmetic; the time is an argument, and so is the lock where threads share a budget.
"""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from typing import Any

SECONDS = 10  # how far back the traffic counts
SHARE = 0.2  # repeats that each unit of the traffic pays for
FLOOR = 10.0  # repeats a second that are there without any traffic
TELL = 1.0  # seconds between two reports of refusals


class Budget:
    """Counts units and repeats of the last SECONDS, second by second.

    lock: guards it where threads share it. Units are counted without it: one that is lost now and then spoils no share.
    """

    def __init__(self, lock: AbstractContextManager[Any] | None = None) -> None:
        self._lock = lock or contextlib.nullcontext()
        self._units = [0] * SECONDS
        self._repeats = [0] * SECONDS
        self._second = 0
        self._refused = 0
        self._told_at = float("-inf")

    def unit(self, now: float) -> None:
        """Count a unit that got a connection. now: monotonic seconds."""
        second = int(now)
        if second != self._second:
            with self._lock:
                self._turn(second)
        self._units[second % SECONDS] += 1

    def spend(self, now: float, *, first: bool) -> bool:
        """Whether a unit may try once more; counts that it does.

        first: the unit's first repeat, which is always allowed: there are never more of those than units in flight, and a
        failover is to be no error.
        """
        with self._lock:
            self._turn(int(now))
            if not first and sum(self._repeats) >= SHARE * sum(self._units) + FLOOR * SECONDS:
                self._refused += 1
                return False
            self._repeats[int(now) % SECONDS] += 1
            return True

    def to_tell(self, now: float) -> int:
        """How many repeats were refused since this was last told, 0 when there is nothing to tell or it is too soon."""
        with self._lock:
            if now - self._told_at < TELL:
                return 0
            refused, self._refused = self._refused, 0
            if refused:
                self._told_at = now
            return refused

    def _turn(self, second: int) -> None:
        """Forget what is too old; a thread that was late changes nothing."""
        for passed in range(max(self._second, second - SECONDS) + 1, second + 1):
            self._units[passed % SECONDS] = self._repeats[passed % SECONDS] = 0
        self._second = max(self._second, second)
