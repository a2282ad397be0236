"""Readers that are lost again and again: when each name was lost, and since when it answers, from the observations alone.

The account is kept apart from the topology's own, which it checks. Invariant:
(h) a reader that was lost twice or more, each time within CALM seconds of the time before, must wait. It is not chosen before it
    has answered for the time in WAITS, and is taken back with the first answer after that.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from aurora_router.core.instance import Instance, Observation, ProbeFailure, Role, ServerId

if TYPE_CHECKING:
    from tests.simulation.simulation import Simulation

CALM = 300.0
# Seconds of the wait by number of losses. The last one also holds for more losses.
WAITS = (0.0, 0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0)
ROUNDING = 1e-6


@dataclass
class Heard:
    """The newest answer of one server behind a name, and the number of silent probes since then."""

    server: ServerId
    role: Role
    asked_at: float
    silent_at: float = float("-inf")
    silent: int = 0


@dataclass
class Account:
    """The observations of one name. Moments are in seconds, by the process's monotonic clock.

    up: the servers that answer, by address
    losses: when the probe of each loss was asked
    back_at: the first answer since the last loss
    """

    up: dict[str | None, Heard] = field(default_factory=dict)
    heard_at: float = float("-inf")
    losses: list[float] = field(default_factory=list)
    back_at: float = float("-inf")

    def wait(self) -> float:
        """Seconds for which the name must answer before it is used."""
        times = min(len(self.losses), 1)
        while times and times < len(self.losses) and self.losses[-times] - self.losses[-times - 1] <= CALM:
            times += 1
        return WAITS[min(times, len(WAITS) - 1)]

    def due_at(self) -> float:
        """The moment of the probe whose answer takes the name back. If it was never lost, that is long ago."""
        return self.back_at + self.wait()

    def answers_until(self) -> float:
        return max((heard.asked_at for heard in self.up.values()), default=float("-inf"))

    def heard(self, observation: Observation) -> None:
        """Take one observation in, unless there is a newer one of the same server."""
        asked_at, server = observation.asked_at, observation.server
        if server is not None:
            known = self.up.get(server.id.address)
            if asked_at <= (self.heard_at if known is None else max(known.asked_at, known.silent_at)):
                return
            self.up[server.id.address] = Heard(server.id, server.role, asked_at)
            if self.losses and self.back_at < self.losses[-1]:
                self.back_at = asked_at
        else:
            silent = next((heard for heard in self.up.values() if heard.server == observation.about), None)
            if silent is None:
                if self.up or asked_at < self.heard_at:
                    return
            else:
                if asked_at <= silent.asked_at or asked_at < silent.silent_at:
                    return
                silent.silent_at = asked_at
                silent.silent += 1 if observation.probe_failure is ProbeFailure.TIMEOUT else 2
                if silent.silent >= 2:
                    del self.up[silent.server.address]
                    if not self.up:
                        self.losses.append(asked_at)
        self.heard_at = max(self.heard_at, asked_at)

    def forget(self, server: ServerId) -> None:
        """Forget a server to which the name no longer leads. That is not a loss."""
        known = self.up.get(server.address)
        if known is not None and known.server == server:
            del self.up[server.address]


class Flapping:
    """The accounts of all names of one simulation.

    held, taken_back: how often a reader began a wait, and ended one
    """

    def __init__(self, simulation: Simulation) -> None:
        self.s = simulation
        self.accounts = {name: Account() for name in simulation.cluster.names}
        self.waiting: set[str] = set()
        self.held = self.taken_back = 0

    def check_chosen(self, instance: Instance) -> None:
        account = self.accounts[instance.id]
        if account.losses and account.answers_until() < account.due_at() - ROUNDING:
            since = f"has answered since {account.back_at:.3f}"
            what = f"{instance} was lost at {account.losses} and {since}, but is to wait {account.wait():g} s"
            self.s.violated("h", f"chosen too soon: {what}")

    def check_taken_back(self, instance: Instance) -> None:
        """Check an instance after an observation of it."""
        account = self.accounts[instance.id]
        if not account.losses or not any(heard.role is Role.READER for heard in account.up.values()):
            return
        if account.answers_until() < account.due_at() + ROUNDING:
            self.held += instance.id not in self.waiting
            self.waiting.add(instance.id)
            return
        if instance.id in self.waiting:
            self.waiting.remove(instance.id)
            self.taken_back += 1
        if not instance.healthy:
            self.s.violated("h", f"not taken back: {instance} was to wait until {account.due_at():.3f}, lost at {account.losses}")
