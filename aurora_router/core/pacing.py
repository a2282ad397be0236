"""Arithmetic against stampedes and floods. The time is an argument.

It covers the delay of new connections, the share of the writer's pool for reads, and the rate of reports.
"""

from __future__ import annotations

import math
from typing import Generic, TypeVar

T = TypeVar("T")

STEP = 0.001  # seconds of spread for each connection that is ahead
MOST = 0.05  # seconds of spread at most


def connect_jitter(ahead: int, rnd: float) -> float:
    """Return the delay of a new connection, in seconds, when its turn has come. A connection that comes alone has no delay.

    ahead: how many connections to the same instance were under way or waited when it came.
    rnd: a random number in [0, 1).

    All processes of a fleet see a promotion at the same moment. The delay spreads their connections, so they do not stay in step.
    """
    return rnd * min(ahead * STEP, MOST)


def writer_read_slots(pool: float, share: float) -> float:
    """Return the number of the writer's pooled connections that serve reads while no reader qualifies.

    pool: the size of the pool; infinity if it has no limit.
    share: above 0, at most 1.

    It is at least one, because otherwise nothing could be read at all.
    """
    return pool if math.isinf(pool) else max(1, int(pool * share))


class Rate:
    """A limit of the rate: at most one report passes in `every` seconds. The others are counted."""

    __slots__ = ("_came", "_every", "_passed_at")

    def __init__(self, every: float) -> None:
        self._every = every
        self._passed_at = float("-inf")
        self._came = 0

    def passes(self, now: float) -> int:
        """Return how often the report came since it last passed, with this time; 0 if it is too soon. now: monotonic seconds."""
        self._came += 1
        if now - self._passed_at < self._every:
            return 0
        came, self._came = self._came, 0
        self._passed_at = now
        return came


def more(came: int) -> str:
    """Return the end of a line that has passed a Rate: how many lines were held back. came: the result of passes()."""
    return f" ({came - 1} more like this since the last such line)" if came > 1 else ""


class Steady(Generic[T]):
    """A state whose changes are reported, but at a limited rate.

    AT_ONCE changes in a row are reported, and then one in APART seconds on average. A report has the state at that time. It
    is left out if the last one had the same state. The end of a reported trouble is always reported at once, because the report
    of the trouble has paid for it. A state that lasts for APART seconds is always reported.
    """

    AT_ONCE = 6
    APART = 30.0  # seconds

    __slots__ = ("_is_trouble", "_may", "_paid", "_refilled_at", "_since", "_state", "_told")

    def __init__(self) -> None:
        self._state: T | None = None
        self._told: T | None = None
        self._is_trouble = False
        self._paid = 0.0  # for the end of the trouble that was reported last
        self._may = float(self.AT_ONCE)
        self._refilled_at = self._since = float("-inf")

    @property
    def owes(self) -> bool:
        """Whether a state has yet to be reported."""
        return self._state != self._told

    def change(self, state: T, now: float, *, trouble: bool = False) -> T | None:
        """Record the state. Return it if it is to be reported now, else None.

        now: monotonic seconds.
        trouble: whether the state is a trouble, which should end.
        """
        if state != self._state:
            self._since = now
        self._state, self._is_trouble = state, trouble
        return self.due(now)

    def due(self, now: float) -> T | None:
        """Return the state if it is to be reported now, else None. Then it counts as reported. now: monotonic seconds."""
        self._may = min(self._may + (now - self._refilled_at) / self.APART, float(self.AT_ONCE))
        self._refilled_at = now
        price = (2.0 if self._is_trouble else 1.0) - self._paid
        if not self.owes or (self._may < price and now < self._since + self.APART):
            return None
        self._may = max(self._may - price, 0.0)
        self._paid = 1.0 if self._is_trouble else 0.0
        self._told = self._state
        return self._told
