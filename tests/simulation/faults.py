"""Faults of the cluster, of the names that lead to it, and of the process that hosts the router."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aurora_router.core.instance import Role
from tests.simulation.cluster import Machine

if TYPE_CHECKING:
    from tests.simulation.simulation import Simulation

END = 9.0  # virtual seconds


class Faults:
    """Random faults, one after the other, until END. Then everything heals."""

    def __init__(self, simulation: Simulation) -> None:
        self.s = simulation
        self.rnd = simulation.rnd
        self.cluster = simulation.cluster

    def start(self) -> None:
        self.s.at(0.5 + self.rnd.random(), self.fault, outside=True)
        self.s.at(END, self.heal, outside=True)

    def fault(self) -> None:
        if self.s.now < END - 0.1:
            self.s.at(0.1 + self.rnd.random() * 1.5, self.fault, outside=True)
            machine = self.rnd.choice(self.cluster.machines)
            kind = self.rnd.choice(
                [self.die, self.freeze, self.partition, self.revive, self.revive, self.promote, self.promote, self.refollow,
                 self.lag, self.move, self.rejoin, self.stand_still, self.stand_still, self.flap, self.flap]
            )  # fmt: skip
            kind(machine)

    def die(self, machine: Machine) -> None:
        self.s.log(f"* {machine.id.started} dies")
        machine.alive = False

    def flap(self, _: Machine) -> None:
        """Let a reader go and come back several times in a row."""
        readers = self.cluster.readers()
        if readers:
            self.down(self.rnd.choice(readers), self.rnd.randrange(2, 6), cut_off=self.rnd.random() < 0.3)

    def down(self, machine: Machine, times: int, *, cut_off: bool) -> None:
        if self.s.now >= END or machine.role is not Role.READER:
            return
        if cut_off:
            machine.partitioned = True  # the monitor needs two silent probes to see that
            back = 0.3 + self.rnd.random()
        else:
            machine.alive = False
            back = self.rnd.random() * 0.6
        self.s.log(f"* {machine.id.started} goes, {times} times in all")
        self.s.at(back, lambda: self.up(machine, times - 1, cut_off=cut_off), outside=True)

    def up(self, machine: Machine, times: int, *, cut_off: bool) -> None:
        if self.s.now >= END or machine.role is not Role.READER:
            return
        if cut_off:
            machine.partitioned = False
        elif not machine.alive:
            self.cluster.restart_reader(machine, self.rnd.randrange(2))
        self.s.log(f"* {machine.id.started} comes back, and will go {times} times more")
        if times:
            self.s.at(self.rnd.random() * 1.2, lambda: self.down(machine, times, cut_off=cut_off), outside=True)

    def freeze(self, machine: Machine) -> None:
        machine.frozen = not machine.frozen
        self.s.log(f"* {machine.id.started} {'freezes' if machine.frozen else 'thaws'}")

    def partition(self, machine: Machine) -> None:
        machine.partitioned = not machine.partitioned
        self.s.log(f"* {machine.id.started} is {'cut off' if machine.partitioned else 'back'}")

    def lag(self, machine: Machine) -> None:
        machine.delay = self.rnd.choice([0.0, 0.05, 0.3, 1.0, 3.0])
        self.s.log(f"* {machine.id.started} replays {machine.delay} s late")

    def revive(self, machine: Machine) -> None:
        """Restart a server in its old role. An old writer still believes that it is the writer; a reader goes back in its log."""
        if machine.role is Role.WRITER:
            machine.restart(Role.WRITER)
        else:
            self.cluster.restart_reader(machine, self.rnd.randrange(5))
        self.s.log(f"* {machine.id.started} restarts as {machine.role.value} on timeline {machine.timeline.epoch}")

    def promote(self, _: Machine) -> None:
        able = [m for m in self.cluster.readers() if m.alive and not m.frozen and m.timeline is self.cluster.timeline]
        if able:
            machine = self.rnd.choice(able)
            self.cluster.promote(machine, self.s.now)
            self.s.log(
                f"* {machine.id.started} is promoted to timeline {machine.timeline.epoch}, forked at {machine.timeline.fork}"
            )
            if self.s.endpoints:
                self.s.at(self.rnd.random() * 1.5, self.point, outside=True)

    def point(self) -> None:
        """Let the names follow the roles."""
        self.s.log("* the names follow the roles")
        names = self.cluster.names
        names["writer"] = [self.cluster.writer]
        names["readers"] = [m for m in self.cluster.machines if m is not self.cluster.writer]

    def move(self, machine: Machine) -> None:
        """Let a name lead to another server, or two names swap their servers."""
        names = self.cluster.names
        if self.s.endpoints:
            names["writer"] = [machine]
        else:
            one, other = self.rnd.choice(sorted(names)), self.rnd.choice(sorted(names))
            names[one], names[other] = names[other], names[one]
        self.s.log("* names: " + ", ".join(f"{name} -> {[m.address for m in ms]}" for name, ms in names.items()))

    def refollow(self, machine: Machine) -> None:
        if machine is not self.cluster.writer and machine.alive and machine.role is Role.READER:
            self.cluster.follow(machine, self.s.now)
            self.s.log(f"* {machine.id.started} follows {self.cluster.writer.id.started}")

    def rejoin(self, machine: Machine) -> None:
        if machine is not self.cluster.writer and (machine.role is Role.WRITER or not machine.alive):
            self.cluster.follow(machine, self.s.now)
            self.s.log(f"* {machine.id.started} rejoins as a reader of {self.cluster.writer.id.started}")

    def stand_still(self, _: Machine) -> None:
        """Let the router's process get no processor, as if it were stopped, or let its machine sleep."""
        seconds = min(self.rnd.choice([0.2, 1.0, 2.0, 4.0]), END - self.s.now)
        if self.s.now >= self.s.process.still_until:
            self.rnd.choice([self.s.process.stand_still, self.s.process.sleep])(seconds)

    def heal(self) -> None:
        self.s.log("* everything heals")
        self.s.disorder = 0.0
        for machine in self.cluster.machines:
            machine.frozen = machine.partitioned = False
            machine.delay = 0.01
        if not self.cluster.writer.alive:
            self.revive(self.cluster.writer)
        for machine in self.cluster.machines:
            if machine is not self.cluster.writer:
                self.cluster.follow(machine, self.s.now)
        if self.s.endpoints:
            self.point()
