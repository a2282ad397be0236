"""The process that hosts the router. It stands still, or its machine sleeps. Then it doubts all it knew, as `core/probing` says.

While it stands still, stopped or without a processor, all its actions come late. While its machine sleeps, its monotonic clock
stands still as well, so that nothing seems to be late. The wall clock goes on in either case. Invariant:
(j) once the process has stood still for `TIMING.stale_after` seconds or more, by the wall clock, nothing is decided until a newer
    probe of each instance has come to an end, or has had its time.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import TYPE_CHECKING

from aurora_router.core import probing
from aurora_router.core.probing import Timing, Trust

if TYPE_CHECKING:
    from tests.simulation.simulation import Simulation

TIMING = Timing(
    interval=0.5,
    position_interval=0.05,
    timeout=0.4,
    failover_timeout=30.0,
    stale_after=1.5,
    fast_interval=0.05,
    reconnect_interval=1.0,
    endpoint_reconnect_interval=1.0,
    writerless_reconnect_interval=0.5,
)
HAD_ITS_TIME = 1.4  # seconds after which each instance has had its time
PAUSE = 0.05


class Process:
    """The process's clocks, and its trust in its topology.

    since: when it last began to doubt
    woke_at, woke: when it last went on after `TIMING.stale_after` seconds or more, by the wall and by the monotonic clock
    ended: for each name, when the newest of its ended probes was begun (seconds, monotonic)
    """

    def __init__(self, simulation: Simulation) -> None:
        self.s = simulation
        self.slept = 0.0
        self.still_until = 0.0
        self.trust = Trust()
        self.since = float("-inf")
        self.woke_at = self.woke = float("-inf")
        self.ended: dict[str, float] = {}
        self.doubts = self.checked = 0

    # -- clocks ---------------------------------------------------------------------------------------------------

    def clock(self) -> float:
        """The monotonic clock, in seconds."""
        return self.s.now - self.slept

    def wall(self) -> float:
        return self.s.now

    def stand_still(self, seconds: float) -> None:
        self.s.log(f"* the process stands still for {seconds:.3f} s")
        self.go_on(seconds)

    def sleep(self, seconds: float) -> None:
        self.s.log(f"* the machine sleeps for {seconds:.3f} s")
        self.slept += seconds
        queue = self.s.queue
        queue[:] = [event if event[2] else (event[0] + seconds, *event[1:]) for event in queue]
        heapq.heapify(queue)
        self.go_on(seconds)

    def go_on(self, seconds: float) -> None:
        self.still_until = self.s.now + seconds
        if seconds >= TIMING.stale_after:
            self.woke_at, self.woke = self.still_until, self.still_until - self.slept

    # -- trust ------------------------------------------------------------------------------------------------------

    @property
    def trusted(self) -> bool:
        return probing.is_trusted(self.trust, self.wall())

    def keep(self) -> None:
        """Keep the trust, as each run of the scheduler does first."""
        before, clock, wall = self.trust, self.clock(), self.wall()
        if probing.has_paused(before, wall):
            self.since = clock
            self.doubts += 1
            self.s.log("what was heard so far is not trusted")
        self.trust = probing.renew_trust(before, self.s.topology, TIMING, clock, wall)
        if before.distrusted_at is not None and self.trust.distrusted_at is None:
            self.s.log("what was heard is trusted")

    def spared(self, asked_at: float) -> float:
        """Extra seconds for a probe that was under way, because it was not the instance that was silent."""
        left = self.since + TIMING.timeout - self.clock() if asked_at < self.since else 0.0
        return left if left > 0.001 else 0.0

    def when_trusted(self, action: Callable[[], None]) -> None:
        """Do something once the topology is trusted."""
        if not self.trusted:
            self.s.schedule()  # a waiting client wakes the scheduler
        if self.trusted:
            action()
        else:
            self.s.at(PAUSE, lambda: self.when_trusted(action))

    # -- the invariant --------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Check the invariant before a decision."""
        if self.s.now - self.woke_at <= HAD_ITS_TIME:
            self.checked += 1
            for name in self.s.watchers:
                if self.ended.get(name, float("-inf")) < self.woke:
                    what = f"{name} was last asked at {self.ended.get(name)}, and the process woke at {self.woke:.3f}"
                    self.s.violated("j", f"decided on what was heard long ago: {what} by its clock")
