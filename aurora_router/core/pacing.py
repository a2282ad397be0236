"""How far apart new connections are begun, how much of the writer's pool reads may take, how often something is said: arithmetic
against stampedes and floods. The time is an argument."""

from __future__ import annotations

import math
from typing import Generic, TypeVar

T = TypeVar("T")

STEP = 0.001  # seconds of spread for each connection that is ahead
MOST = 0.05  # seconds of spread at most


def pause(ahead: int, rnd: float) -> float:
    """Seconds by which a new connection is put off once it is its turn.

    ahead: how many connections to the same instance were under way or waited when it came. rnd: a random number in [0, 1).
    Nothing for one that comes alone. A crowd, as after a promotion, is spread, so that the processes of a fleet, which
    all see it at the same moment, do not stay in step.
    """
    return rnd * min(ahead * STEP, MOST)


def places_for_reads(pool: float, share: float) -> float:
    """How many connections of the writer's pool serve reads while no reader qualifies.

    pool: how many connections it may have, infinity where that is not limited. share: above 0, at most 1. At least one, or
    nothing could be read at all.
    """
    return pool if math.isinf(pool) else max(1, int(pool * share))


class Rate:
    """Lets something pass at most once in `every` seconds, and counts how often it came."""

    __slots__ = ("_came", "_every", "_passed_at")

    def __init__(self, every: float) -> None:
        self._every = every
        self._passed_at = float("-inf")
        self._came = 0

    def passes(self, now: float) -> int:
        """How often it came since it last passed, this time included; 0 where it is too soon. now: monotonic seconds."""
        self._came += 1
        if now - self._passed_at < self._every:
            return 0
        came, self._came = self._came, 0
        self._passed_at = now
        return came


def more(came: int) -> str:
    """What a line that has passed a Rate says at its end of those that were held back. came: as passes() gives it."""
    return f" ({came - 1} more like this since the last such line)" if came > 1 else ""


class Steady(Generic[T]):
    """A state that is told when it changes, but not each time: AT_ONCE times in a row, and then once in APART seconds on average.

    What is told is what is so by then, and nothing if that was told last. The end of a trouble that was told is always told at
    once: telling the trouble has paid for it. A state that lasts for APART seconds is told whatever was told before.
    """

    AT_ONCE = 6
    APART = 30.0  # seconds

    __slots__ = ("_is_trouble", "_may", "_paid", "_refilled_at", "_since", "_state", "_told")

    def __init__(self) -> None:
        self._state: T | None = None
        self._told: T | None = None
        self._is_trouble = False
        self._paid = 0.0  # for the end of the trouble that was told last
        self._may = float(self.AT_ONCE)
        self._refilled_at = self._since = float("-inf")

    @property
    def owes(self) -> bool:
        """Whether something is still to be told."""
        return self._state != self._told

    def change(self, state: T, now: float, *, trouble: bool = False) -> T | None:
        """Take note of the state.

        now: monotonic seconds.
        trouble: whether it is one that should end.
        Returns the state if it is to be told now.
        """
        if state != self._state:
            self._since = now
        self._state, self._is_trouble = state, trouble
        return self.due(now)

    def due(self, now: float) -> T | None:
        """The state, if it is to be told now; it counts as told then. now: monotonic seconds."""
        self._may = min(self._may + (now - self._refilled_at) / self.APART, float(self.AT_ONCE))
        self._refilled_at = now
        price = (2.0 if self._is_trouble else 1.0) - self._paid
        if not self.owes or (self._may < price and now < self._since + self.APART):
            return None
        self._may = max(self._may - price, 0.0)
        self._paid = 1.0 if self._is_trouble else 0.0
        self._told = self._state
        return self._told
