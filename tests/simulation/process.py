"""The process that hosts the router. It stands still, or its machine sleeps; then it doubts all it knew, as the monitor does.

While it stands still, stopped or without a processor, all its actions come late. While its machine sleeps, its monotonic clock
stands still as well, so that nothing seems to be late. The wall clock goes on in either case. Invariant:
(j) once the process has stood still for TRUST seconds or more, by the wall clock, nothing is decided until a newer probe of each
    instance has come to an end, or has had its time.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.simulation.simulation import Simulation

TIMEOUT = 0.4  # of a probe, in seconds
TRUST = 1.5
GRACE = 1.0  # seconds beyond TIMEOUT after which an instance has had its time
PAUSE = 0.05


class Process:
    """The process's clocks, and its trust in its topology.

    woke_at, woke: when it last went on after TRUST seconds or more, by the wall and by the monotonic clock
    ended: for each name, when the newest of its ended probes was begun (seconds, monotonic)
    """

    def __init__(self, simulation: Simulation) -> None:
        self.s = simulation
        self.slept = 0.0
        self.still_until = 0.0
        self.awake_until = self.trusted_until = float("inf")
        self.doubted_at: float | None = None
        self.since = float("-inf")  # when it last began to doubt
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
        if seconds >= TRUST:
            self.woke_at, self.woke = self.still_until, self.still_until - self.slept

    # -- trust, as the monitor has it -----------------------------------------------------------------------------

    @property
    def trusted(self) -> bool:
        return self.wall() <= self.trusted_until

    def keep(self) -> None:
        """Do one run of the monitor's time-keeper."""
        clock = self.clock()
        if self.stood_still():
            self.doubted_at = self.since = clock
            self.doubts += 1
            self.s.log("what was heard so far is not trusted")
            for watcher in self.s.watchers.values():
                self.s.at(self.s.rnd.random() * 0.02, lambda w=watcher: self.s.probe(w))
        self.awake_until = self.wall() + TRUST
        doubted = self.doubted_at
        if doubted is None or clock - doubted > TIMEOUT + GRACE or self.heard_again(doubted):
            if doubted is not None:
                self.s.log("what was heard is trusted")
            self.doubted_at = None
            self.trusted_until = self.awake_until

    def stood_still(self) -> bool:
        return self.wall() > self.awake_until

    def heard_again(self, doubted: float) -> bool:
        return all(instance.heard_at >= doubted for instance in self.s.topology)

    def spared(self, asked_at: float) -> float:
        """Extra seconds for a probe that was under way, because it was not the instance that was silent."""
        left = self.since + TIMEOUT - self.clock() if asked_at < self.since else 0.0
        return left if left > 0.001 else 0.0

    def when_trusted(self, action: Callable[[], None]) -> None:
        """Do something once the topology is trusted."""
        if not self.trusted:
            self.keep()  # a waiting client wakes the time-keeper
        if self.trusted:
            action()
        else:
            self.s.at(PAUSE, lambda: self.when_trusted(action))

    # -- the invariant --------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Check the invariant before a decision."""
        if self.s.now - self.woke_at <= TIMEOUT + GRACE:
            self.checked += 1
            for name in self.s.watchers:
                if self.ended.get(name, float("-inf")) < self.woke:
                    what = f"{name} was last asked at {self.ended.get(name)}, and the process woke at {self.woke:.3f}"
                    self.s.violated("j", f"decided on what was heard long ago: {what} by its clock")
