"""The real observe(), choose(), satisfies() and resolve() against the fake cluster, used as the monitor and the router use them.

All randomness is one random.Random(seed), and time passes only virtually. The invariants:
(a) a unit that needs the writer goes only to an instance whose newest observation says writer, of the newest known epoch;
(c) old observations never win: neither the state known of a server nor the epoch moves back;
(d) after the faults a writer is found within HEALING seconds, and readers serve again;
(e) samples and all collections stay bounded.
(b) and (i) stand in sessions.py, (f) and (g) in transactions.py, (h) in flapping.py, (j) in process.py.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

from aurora_router.core import selection, topology
from aurora_router.core.selection import STRATEGIES, Load, Need, Reason
from aurora_router.core.topology import Instance, Observation, Role, ServerId, Silence, Topology
from tests.simulation import faults
from tests.simulation.cluster import Cluster, Machine
from tests.simulation.faults import Faults
from tests.simulation.flapping import Flapping
from tests.simulation.process import TIMEOUT, Process
from tests.simulation.sessions import Sessions
from tests.simulation.transactions import Transactions

HEALING = 4.0
INTERVAL = 0.5
HURRY = 0.05
FRESH = 1.0  # seconds between fresh connections of a name
LOOKS = 4  # fresh connections in a row, if other servers may stand behind a name
SESSIONS = 3
CLIENTS = 4


class Violation(AssertionError):
    """An invariant that does not hold."""

    def __init__(self, invariant: str, seed: int, now: float, what: str) -> None:
        self.invariant = invariant
        super().__init__(f"invariant ({invariant}) at {now:.3f} s: {what}\nreplay: python -m tests.simulation {seed}")


@dataclass(eq=False)
class Link:
    """A probe connection to one life of one server."""

    machine: Machine
    server: ServerId
    closed: bool = False

    @property
    def broken(self) -> bool:
        return not self.machine.alive or self.machine.id != self.server


@dataclass
class Watcher:
    """The monitor's knowledge of one name, apart from the topology."""

    instance: Instance
    links: list[Link] = field(default_factory=list)
    missing: ServerId | None = None
    looked_at: float = -1e9
    look: bool = False
    suspect: bool = False


class Simulation:
    """One run of one seed."""

    def __init__(self, seed: int, say: Callable[[str], object] | None = None) -> None:
        self.seed = seed
        self.rnd = rnd = Random(seed)
        self.say = say
        self.now = 0.0
        self.queue: list[tuple[float, int, bool, Callable[[], None]]] = []
        self.process = Process(self)
        self.count = 0
        self.positions = rnd.random() < 0.85
        self.disorder = rnd.choice([0.0, 0.1, 0.3])  # share of the answers that are late or lost
        self.cluster = Cluster(rnd.choice([1, 2, 3, 3, 4, 5]), synchronous=rnd.random() < 0.5)
        for machine in self.cluster.machines:
            machine.delay = rnd.choice([0.0, 0.01, 0.1, 0.6])
        self.endpoints = rnd.random() < 0.4
        names = self.cluster.names
        if self.endpoints:
            names["writer"] = [self.cluster.writer]
            names["readers"] = self.cluster.machines[1:]
        else:
            for n, machine in enumerate(self.cluster.machines):
                names[f"db-{n + 1}"] = [machine]
        self.topology = Topology()
        for name in names:
            self.topology = topology.add(self.topology, Instance(name, name, 5432, reader_only=name == "readers"))
        self.watchers = {instance.id: Watcher(instance) for instance in self.topology}
        self.pools: dict[str, list[Link]] = {name: [] for name in names}
        self.balance = STRATEGIES[rnd.choice(sorted(STRATEGIES))]
        self.load = Load(lambda instance: len(self.pools[instance]))
        self.floors: dict[tuple[str, str | None], float] = {}
        self.newest: dict[tuple[str, str | None], Observation] = {}
        self.highest = 0
        self.wanted = False
        self.transactions = Transactions(self, CLIENTS)
        self.sessions = Sessions(self, SESSIONS)
        self.flapping = Flapping(self)
        self.faults = Faults(self)

    # -- time -----------------------------------------------------------------------------------------------------

    def at(self, delay: float, action: Callable[[], None], *, outside: bool = False) -> None:
        """Do something later.

        delay: seconds
        outside: it happens in the cluster, which goes on while the router's process stands still
        """
        self.count += 1
        heapq.heappush(self.queue, (self.now + delay, self.count, outside, action))

    def run(self) -> Simulation:
        """Run until the end of the healing. Raises Violation."""
        for watcher in self.watchers.values():
            self.at(self.rnd.random() * 0.05, lambda w=watcher: self.tick(w))
        self.sessions.start()
        self.transactions.start()
        self.at(0.1, self.background, outside=True)
        self.faults.start()
        queue, process, end = self.queue, self.process, faults.END + HEALING
        while queue and queue[0][0] <= end:
            self.now, count, outside, action = heapq.heappop(queue)
            if self.now < process.still_until and not outside:
                heapq.heappush(queue, (process.still_until, count, outside, action))
            else:
                action()
        self.check_healed()
        self.sessions.check()
        self.transactions.check()
        return self

    def log(self, text: str) -> None:
        if self.say is not None:
            self.say(f"{self.now:7.3f}  {text}")

    def violated(self, invariant: str, what: str) -> None:
        self.log(f"VIOLATION of ({invariant}): {what}")
        raise Violation(invariant, self.seed, self.now, what)

    # -- the monitor ----------------------------------------------------------------------------------------------

    def tick(self, watcher: Watcher) -> None:
        self.process.keep()
        hurry = self.process.doubted_at is not None or watcher.suspect or self.wanted or self.topology.writer is None
        self.at(HURRY if hurry and self.rnd.random() < 0.7 else INTERVAL, lambda: self.tick(watcher))
        watcher.suspect = False
        if self.topology.writer is not None and self.topology.writer.id == watcher.instance.id:
            self.wanted = False
        self.probe(watcher)

    def probe(self, watcher: Watcher) -> None:
        now = self.process.clock()
        for n, link in enumerate(watcher.links[1:], 1):  # one after the other: no two are asked at the same moment
            self.at(n * 0.002, lambda link=link: self.ask(watcher, link))
        for link in watcher.links[:1]:
            self.ask(watcher, link)
        if not watcher.links or watcher.look or now - watcher.looked_at >= FRESH:
            watcher.looked_at = now
            several = watcher.instance.reader_only and (watcher.look or not watcher.links)
            for n in range(LOOKS if several else 1):
                self.at(0.001 + n * 0.007, lambda: self.reach(watcher))
            watcher.look = False

    def ask(self, watcher: Watcher, link: Link) -> None:
        asked_at = self.process.clock()
        if link not in watcher.links:
            return
        if link.broken and not link.machine.frozen:
            watcher.links.remove(link)
            link.closed = True
            if watcher.links:
                self.at(0.001, lambda: self.failed(watcher, asked_at, Silence.REFUSED, link.server))
            else:  # perhaps only this connection is gone; a fresh one shows it
                watcher.missing = link.server
            return
        self.send(watcher, link, asked_at, link.server, lambda observation: None if link.closed else self.observed(observation))

    def send(
        self, watcher: Watcher, link: Link, asked_at: float, about: ServerId | None, heard: Callable[[Observation], None]
    ) -> None:
        """Send a question. The answer may come late, or not at all."""
        there = self.rnd.random() * 0.005
        back = self.rnd.random() * 0.005
        if self.rnd.random() < self.disorder:
            there, back = self.rnd.choice([(0.0, 0.2), (0.1, 0.1), (0.5, 0.0), (0.0, 0.7), (0.0, 2.5), (99.0, 0.0)])
        if there + back >= TIMEOUT or not link.machine.reachable:
            self.at(TIMEOUT, lambda: self.overdue(watcher, link, asked_at, about))
        if there < 99.0:
            self.at(there, lambda: self.answer(watcher, link, asked_at, back, heard), outside=True)

    def answer(self, watcher: Watcher, link: Link, asked_at: float, back: float, heard: Callable[[Observation], None]) -> None:
        if link.broken or not link.machine.reachable:
            return
        server = link.machine.says(self.now, positions=self.positions)
        self.at(back, lambda: heard(Observation(watcher.instance.id, asked_at, self.process.clock(), server)))

    def overdue(self, watcher: Watcher, link: Link, asked_at: float, about: ServerId | None) -> None:
        self.process.keep()
        spared = self.process.spared(asked_at)
        if spared:
            self.at(spared, lambda: self.overdue(watcher, link, asked_at, about))
            return
        changed = self.failed(watcher, asked_at, Silence.TIMEOUT, about)
        if changed and link in watcher.links:
            # The connection is cut. If it was the only one, a fresh one shows whether the server lives.
            watcher.links.remove(link)
            link.closed = True
            if watcher.links:
                self.failed(watcher, asked_at, Silence.REFUSED, about)
            else:
                watcher.missing = link.server

    def failed(self, watcher: Watcher, asked_at: float, silence: Silence, about: ServerId | None) -> bool:
        error = silence.value
        now = self.process.clock()
        return self.observed(Observation(watcher.instance.id, asked_at, now, about=about, silence=silence, error=error))

    def reach(self, watcher: Watcher) -> None:
        """Make a fresh connection to a server that is behind the name now."""
        asked_at = self.process.clock()
        about = None if watcher.links else watcher.missing
        machines = self.cluster.names[watcher.instance.id]
        machine = self.rnd.choice(machines) if machines else None
        if machine is None or not machine.alive:
            self.at(0.001, lambda: self.failed(watcher, asked_at, Silence.REFUSED, about))
        elif not machine.reachable:
            self.at(TIMEOUT, lambda: self.failed(watcher, asked_at, Silence.TIMEOUT, about))
        else:
            link = Link(machine, machine.id)
            self.send(watcher, link, asked_at, about, lambda observation: self.reached(watcher, link, observation))

    def reached(self, watcher: Watcher, link: Link, observation: Observation) -> None:
        """Take in the server that a fresh connection reached. Unless the name is the readers', it is the only one there."""
        if observation.answered_at - observation.asked_at >= TIMEOUT:
            return
        replaced = [old for old in watcher.links if old.server == link.server or not watcher.instance.reader_only]
        for old in replaced:
            old.closed = True
        gone = {old.server for old in replaced} | ({watcher.missing} if watcher.missing is not None else set())
        watcher.links = [*(old for old in watcher.links if old not in replaced), link]
        watcher.missing = None
        for other in gone - {link.server}:
            self.log(f"forget {other.started} behind {watcher.instance.id}")
            self.flapping.accounts[watcher.instance.id].forget(other)
            self.publish(topology.forget(self.topology, watcher.instance.id, other))
        self.observed(observation)

    def observed(self, observation: Observation) -> bool:
        """Take one observation in. Returns whether it changed anything."""
        old = self.topology
        ended = self.process.ended
        ended[observation.instance] = max(ended.get(observation.instance, 0.0), observation.asked_at)
        server = observation.server
        about = server.id if server is not None else observation.about
        if about is not None:
            key = (observation.instance, about.address)
            known = self.newest.get(key)
            other_life = server is None and known is not None and known.server is not None and known.server.id != about
            late = known is not None and (
                known.asked_at > observation.asked_at or (known.asked_at == observation.asked_at and server is not None)
            )
            if observation.silence is not Silence.TIMEOUT and not late and not other_life:
                self.newest[key] = observation
        new = topology.observe(self.topology, observation)
        if server is not None and new is not self.topology:
            self.highest = max(self.highest, server.epoch)
        if self.say is not None:
            what = observation.silence.value if server is None else f"{server.role.value} {server.id.started} {server.position}"
            late = " (changes nothing)" if new is self.topology else ""
            self.log(f"heard of {observation.instance}, asked at {observation.asked_at:.3f}: {what}{late}")
        if server is None and about is not None and new is not self.topology:
            left = new.by_id[observation.instance].seen
            if all(seen.server.id.address != about.address for seen in left):
                key = (observation.instance, about.address)
                self.floors[key] = max(self.floors.get(key, -1.0), observation.asked_at)
        self.publish(new)
        self.flapping.accounts[observation.instance].heard(observation)
        self.flapping.check_taken_back(new.by_id[observation.instance])
        return new is not old

    def publish(self, new: Topology) -> None:
        old, self.topology = self.topology, new
        if new is old:
            return
        if new.epoch < old.epoch:
            self.violated("c", f"the epoch went back from {old.epoch} to {new.epoch}")
        if new.epoch != self.highest:
            self.violated("c", f"the epoch is {new.epoch}, but {self.highest} was seen")
        for instance in new:
            for seen in instance.seen:
                key = (instance.id, seen.server.id.address)
                floor = self.floors.get(key, -1.0)
                if seen.asked_at < floor:
                    self.violated("c", f"{key} was heard of at {floor:.3f}, now counts as of {seen.asked_at:.3f}")
                self.floors[key] = seen.asked_at
            if len(instance.seen) > len(self.cluster.machines):
                self.violated("e", f"{instance.id} has {len(instance.seen)} servers")
        if len(new.samples) > topology.SAMPLES:
            self.violated("e", f"{len(new.samples)} samples")
        if self.say is not None and new.said() != old.said():
            self.log(f"    epoch {new.epoch}: " + "; ".join(new.said()))

    def background(self) -> None:
        """Let the log grow and readers replay, whether anybody looks or not."""
        self.at(0.1, self.background, outside=True)
        for machine in self.cluster.machines:
            if machine.role is Role.WRITER and machine.alive and not machine.frozen:
                machine.timeline.append(self.now)
            machine.replay(self.now)

    # -- clients --------------------------------------------------------------------------------------------------

    def decide(self, need: Need) -> selection.Decision:
        self.process.check()
        self.load.turn += 1
        decision = selection.choose(self.topology, need, self.balance, self.load, self.rnd.random(), self.process.clock())
        if decision.instance is not None and decision.instance.role is Role.READER:
            self.flapping.check_chosen(decision.instance)
        return decision

    def to_writer(self) -> selection.Decision:
        self.process.check()
        return selection.to_writer(self.topology, Reason.NOT_A_READ)

    def connect(self, instance: Instance) -> Link | None:
        """Check out a pooled connection or a new one. The topology must know its server behind that name now."""
        known = self.topology.by_id[instance.id].servers
        pool = [link for link in self.pools[instance.id] if link.server in known and not link.broken]
        self.pools[instance.id] = pool
        if pool and self.rnd.random() < 0.7:
            return self.rnd.choice(pool)
        machines = self.cluster.names[instance.id]
        machine = self.rnd.choice(machines) if machines else None
        watcher = self.watchers[instance.id]
        if machine is None or not machine.reachable:
            watcher.suspect = True
            return None
        if machine.id not in known:
            watcher.look = watcher.suspect = True
            self.log(f"a connection to {instance.id} reached {machine.id.started}, which is not known there")
            return None
        link = Link(machine, machine.id)
        self.pools[instance.id] = [*pool[-3:], link]
        return link

    def check_writer(self, instance: Instance) -> None:
        """Check that a write may go to the instance."""
        for server in instance.servers:
            newest = self.newest[(instance.id, server.address)].server
            if newest is None or newest.role is not Role.WRITER or newest.epoch != self.highest:
                self.violated("a", f"a write goes to {instance}, of which the newest observation is {newest}")

    def stuck(self, instance: str, link: Link) -> bool:
        """Whether a client waits for a silent server. It waits until the server is given up and the connection cut."""
        machine = link.machine
        given_up = link.server not in self.topology.by_id[instance].servers
        return not link.broken and not machine.reachable and not given_up

    # -- in the end --------------------------------------------------------------------------------------------------

    def check_healed(self) -> None:
        writer = self.topology.writer
        if writer is None or writer.servers != {self.cluster.writer.id}:
            self.violated("d", f"the writer is {self.cluster.writer.id.started}, the topology says {self.topology.said()}")
        readers = {m.id for m in self.cluster.readers()}
        serving = {server for instance in self.topology.readers for server in instance.servers}
        # A reader that was lost again and again is taken back only after a while.
        waiting = [each for each in self.flapping.accounts.values() if each.due_at() > self.process.clock() - 2 * INTERVAL]
        held = {heard.server for each in waiting for heard in each.up.values()}
        # Behind the readers' name, fresh connections find the servers one after another, by chance.
        some = bool(serving) == bool(readers) or bool(readers & held)
        enough = some if self.endpoints else readers <= serving | held
        if not (serving <= readers and enough):
            self.violated("d", f"readers that serve are {serving}, those that live are {readers}")


def run(seed: int, say: Callable[[str], object] | None = None) -> Simulation:
    """Run one seed.

    say: called with each line of the trace
    Raises Violation.
    """
    return Simulation(seed, say).run()
