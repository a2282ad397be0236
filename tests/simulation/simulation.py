"""The real core against the fake cluster: the schedule of probes, what they say, observe(), choose(),
satisfies_requirement(), with_proof().

Probes overlap here, and their answers come late, more than a watcher's thread lets them.

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

from aurora_router.core import probing, selection, topology, watching
from aurora_router.core.instance import Instance, Observation, ProbeFailure, Role, ServerId, ServerStatus
from aurora_router.core.probing import Demand
from aurora_router.core.selection import STRATEGIES, Load, Need, Reason
from aurora_router.core.topology import Topology
from aurora_router.core.watching import Change, News, Watch
from tests.simulation import faults
from tests.simulation.cluster import Cluster, Machine
from tests.simulation.faults import Faults
from tests.simulation.flapping import Flapping
from tests.simulation.process import TIMING, Process
from tests.simulation.sessions import Sessions
from tests.simulation.transactions import Transactions

HEALING = 4.0
SESSIONS = 3
CLIENTS = 4


class Violation(AssertionError):
    """An invariant that does not hold."""

    def __init__(self, invariant: str, seed: int, now: float, what: str) -> None:
        self.invariant = invariant
        super().__init__(f"invariant ({invariant}) at {now:.3f} s: {what}\nreplay: python -m tests.simulation {seed}")


@dataclass(eq=False)
class Link:
    """A connection to one life of one server.

    answered: when the newest question that it has answered was asked
    """

    machine: Machine
    server: ServerId
    closed: bool = False
    answered: float = float("-inf")

    @property
    def broken(self) -> bool:
        return not self.machine.alive or self.machine.id != self.server


@dataclass
class Watcher:
    """The probes of one name.

    must_recheck: whether a connection has reached an unknown server there
    """

    instance: Instance
    watch: Watch[Link] = field(init=False)
    last_at: float = float("-inf")
    rechecked_at: float = float("-inf")
    must_recheck: bool = False

    def __post_init__(self) -> None:
        self.watch = Watch(self.instance.id, self.instance.reader_only)


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
        self.suspects: dict[str, float] = {}
        self.positions_since = float("-inf")
        self.turn = 0  # the number of the scheduler's next run
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
        self.poke()
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

    # -- the schedule -------------------------------------------------------------------------------------------------

    def poke(self) -> None:
        """Let the scheduler run soon."""
        self.turn += 1
        self.at(self.rnd.random() * 0.005, lambda turn=self.turn: self.schedule() if turn == self.turn else None)

    def schedule(self) -> None:
        """Run the scheduler: begin the probes that are due."""
        self.process.keep()
        now = self.process.clock()
        demand = self.demand()
        wake_at = now + TIMING.interval
        for watcher in self.watchers.values():
            every = probing.pace(self.topology, watcher.instance.id, watcher.last_at, demand, TIMING, now)
            if watcher.last_at + every <= now:
                watcher.last_at = now
                self.at(self.rnd.random() * 0.002, lambda w=watcher: self.probe(w))
            wake_at = min(wake_at, probing.wake_at(None, watcher.last_at, every, TIMING.timeout, TIMING, now))
        self.turn += 1
        self.at(wake_at - now, lambda turn=self.turn: self.schedule() if turn == self.turn else None)

    def demand(self) -> Demand:
        writer = self.topology.writer
        asked_at = None if writer is None else self.watchers[writer.id].last_at
        return Demand(
            writerless_since=float("-inf"),
            is_awaited=True,
            suspects=frozenset(self.suspects),
            positions_since=self.positions_since,
            distrusted_at=self.process.trust.distrusted_at,
            writer_asked_at=None if writer is None or writer.last_observed_at >= asked_at else asked_at,
        )

    def suspect(self, instance: str) -> None:
        self.suspects[instance] = self.process.clock()
        self.poke()

    def request_positions(self) -> None:
        writer = self.topology.writer
        if writer is not None and self.positions_since <= self.watchers[writer.id].last_at:
            self.positions_since = self.process.clock()
            self.poke()

    # -- the probes ---------------------------------------------------------------------------------------------------

    def probe(self, watcher: Watcher) -> None:
        now = self.process.clock()
        for n, link in enumerate(watcher.watch.links):  # one after the other: no two are asked at the same moment
            self.at(n * 0.002, lambda link=link: self.ask(watcher, link.connection))
        is_due = probing.is_recheck_due(self.topology, watcher.instance, watcher.rechecked_at, TIMING, now)
        connects = watcher.watch.connects(is_asked=watcher.must_recheck, is_due=is_due)
        if connects:
            watcher.rechecked_at = now
            watcher.must_recheck = False
        for n in range(connects):
            self.at(0.001 + n * 0.007, lambda: self.reach(watcher))

    def ask(self, watcher: Watcher, link: Link) -> None:
        asked_at = self.process.clock()
        if link.closed:
            return
        if link.broken and not link.machine.frozen:
            self.broke(watcher, link, asked_at)
            return

        def heard(server: ServerStatus) -> None:
            if not link.closed:
                now = self.process.clock()
                link.answered = max(link.answered, asked_at)
                self.apply(watcher, watching.on_answer(watcher.watch, self.known(watcher, link), server, asked_at, now))

        self.send(watcher, link, asked_at, heard)

    def send(self, watcher: Watcher, link: Link, asked_at: float, heard: Callable[[ServerStatus], None]) -> None:
        """Send a question. The answer may come late, or not at all."""
        there = self.rnd.random() * 0.005
        back = self.rnd.random() * 0.005
        if self.rnd.random() < self.disorder:
            there, back = self.rnd.choice([(0.0, 0.2), (0.1, 0.1), (0.5, 0.0), (0.0, 0.7), (0.0, 2.5), (99.0, 0.0)])
        if there + back >= TIMING.timeout or not link.machine.reachable:
            self.at(TIMING.timeout, lambda: self.overdue(watcher, link, asked_at))
        if there < 99.0:
            self.at(there, lambda: self.answer(link, back, heard), outside=True)

    def answer(self, link: Link, back: float, heard: Callable[[ServerStatus], None]) -> None:
        if link.broken or not link.machine.reachable:
            return
        server = link.machine.says(self.now, positions=self.positions)
        self.at(back, lambda: heard(server))

    def overdue(self, watcher: Watcher, link: Link | None, asked_at: float) -> None:
        """Declare a probe silent, and cut its connection.

        link: None if the connection was not made
        """
        self.process.keep()
        spared = self.process.spared(asked_at)
        if spared:
            self.at(spared, lambda: self.overdue(watcher, link, asked_at))
            return
        if link is not None and link.answered > asked_at:
            return  # questions overlap only here, and this connection is well
        known = None if link is None else next((each for each in watcher.watch.links if each.connection is link), None)
        self.tell(watching.on_timeout(watcher.watch, known, TIMING.timeout, asked_at, self.process.clock()))
        if known is not None:
            self.broke(watcher, known.connection, asked_at)
        elif link is not None:
            link.closed = True

    def broke(self, watcher: Watcher, link: Link, asked_at: float) -> None:
        now = self.process.clock()
        change = watching.on_broken(watcher.watch, self.known(watcher, link), ProbeFailure.REFUSED, "refused", asked_at, now)
        self.apply(watcher, change)
        if change.must_connect:
            self.reach(watcher)

    def known(self, watcher: Watcher, link: Link) -> watching.Link[Link]:
        return next(each for each in watcher.watch.links if each.connection is link)

    def reach(self, watcher: Watcher) -> None:
        """Make a fresh connection to a server that is behind the name now."""
        asked_at = self.process.clock()
        machines = self.cluster.names[watcher.instance.id]
        machine = self.rnd.choice(machines) if machines else None
        if machine is None or not machine.alive:
            self.at(0.001, lambda: self.refused(watcher, asked_at))
        elif not machine.reachable:
            self.at(TIMING.timeout, lambda: self.overdue(watcher, None, asked_at))
        else:
            link = Link(machine, machine.id)

            def heard(server: ServerStatus) -> None:
                if not link.closed:
                    self.apply(watcher, watching.on_connected(watcher.watch, link, server, asked_at, self.process.clock()))

            self.send(watcher, link, asked_at, heard)

    def refused(self, watcher: Watcher, asked_at: float) -> None:
        self.tell(watching.connect_failure(watcher.watch, ProbeFailure.REFUSED, "refused", asked_at, self.process.clock()))

    def apply(self, watcher: Watcher, change: Change[Link]) -> None:
        watcher.watch = change.watch
        for link in change.closed:
            link.closed = True
        self.tell(change.news)

    def tell(self, news: tuple[News, ...]) -> None:
        for each in news:
            if isinstance(each, Observation):
                self.observed(each)
            else:
                self.log(f"forget {each.server.started} behind {each.instance}")
                self.flapping.accounts[each.instance].forget(each.server)
                self.publish(topology.forget_server(self.topology, each.instance, each.server))

    def observed(self, observation: Observation) -> None:
        suspected_at = self.suspects.get(observation.instance)
        if suspected_at is not None and probing.clears_suspicion(observation, suspected_at):
            del self.suspects[observation.instance]
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
            if observation.probe_failure is not ProbeFailure.TIMEOUT and not late and not other_life:
                self.newest[key] = observation
        new = topology.observe(self.topology, observation)
        if server is not None and new is not self.topology:
            self.highest = max(self.highest, server.epoch)
        if self.say is not None:
            what = (
                observation.probe_failure.value
                if server is None
                else f"{server.role.value} {server.id.started} {server.position}"
            )
            late = " (changes nothing)" if new is self.topology else ""
            self.log(f"heard of {observation.instance}, asked at {observation.asked_at:.3f}: {what}{late}")
        if server is None and about is not None and new is not self.topology:
            left = new.by_id[observation.instance].tracked
            if all(seen.server.id.address != about.address for seen in left):
                key = (observation.instance, about.address)
                self.floors[key] = max(self.floors.get(key, -1.0), observation.asked_at)
        self.publish(new)
        self.flapping.accounts[observation.instance].heard(observation)
        self.flapping.check_taken_back(new.by_id[observation.instance])

    def publish(self, new: Topology) -> None:
        old, self.topology = self.topology, new
        if new is old:
            return
        if new.epoch < old.epoch:
            self.violated("c", f"the epoch went back from {old.epoch} to {new.epoch}")
        if new.epoch != self.highest:
            self.violated("c", f"the epoch is {new.epoch}, but {self.highest} was seen")
        for instance in new:
            for seen in instance.tracked:
                key = (instance.id, seen.server.id.address)
                floor = self.floors.get(key, -1.0)
                if seen.asked_at < floor:
                    self.violated("c", f"{key} was heard of at {floor:.3f}, now counts as of {seen.asked_at:.3f}")
                self.floors[key] = seen.asked_at
            if len(instance.tracked) > len(self.cluster.machines):
                self.violated("e", f"{instance.id} has {len(instance.tracked)} servers")
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
        if machine is None or not machine.reachable:
            self.suspect(instance.id)
            return None
        if machine.id not in known:
            self.watchers[instance.id].must_recheck = True
            self.suspect(instance.id)
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
        waiting = [each for each in self.flapping.accounts.values() if each.due_at() > self.process.clock() - 2 * TIMING.interval]
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
