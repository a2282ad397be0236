"""Clients that append keys as run_transaction does, on the fake cluster: the real table of failures and the real outcome().

The connection can be lost at any step, and so can a COMMIT on its way, and its answer. A frozen or cut-off server leaves a client
stuck until the topology gives the server up. Invariants:
(f) a key is never committed twice in one history, so no unit of unknown outcome is retried;
(g) a key that was acknowledged, or found to be committed, is committed: on the server that said so at that moment, and with
    synchronous replication in the newest history at the end.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from aurora_router.core import commit_outcome, failures
from aurora_router.core.commit_outcome import Evidence, Note
from aurora_router.core.failures import Action, Failure, Phase
from aurora_router.core.instance import Role
from aurora_router.core.positions import WalPosition
from aurora_router.errors import Outcome
from tests.simulation.cluster import Machine

if TYPE_CHECKING:
    from tests.simulation.simulation import Link, Simulation

LOST = 0.04  # share of the steps at which a connection is lost, in an unruly seed
PAUSE = 0.05


@dataclass
class Client:
    """A client that appends one key after the other.

    number: the number of the present key
    runs: how often it has begun with that key
    """

    name: str
    number: int = 0
    runs: int = 0
    done: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)

    @property
    def key(self) -> str:
        return f"{self.name}-{self.number}"


class Transactions:
    """The clients of one simulation."""

    def __init__(self, simulation: Simulation, count: int) -> None:
        self.s = simulation
        self.clients = [Client(f"client {n + 1}") for n in range(count)]
        self.repeated = self.resolved = 0

    def start(self) -> None:
        for client in self.clients:
            self.s.at(0.3 + self.s.rnd.random(), lambda c=client: self.next_key(c))

    def next_key(self, client: Client) -> None:
        client.number += 1
        client.runs = 0
        self.run(client)

    def run(self, client: Client) -> None:
        self.s.process.when_trusted(lambda: self.enter(client))

    def enter(self, client: Client) -> None:
        """Begin an attempt of the unit: find the writer, and connect."""
        instance = self.s.to_writer().instance
        if instance is None:
            self.s.at(PAUSE, lambda: self.run(client))
            return
        self.s.check_writer(instance)
        link = self.s.connect(instance)
        if link is None:
            self.failed(client, Failure.CONNECT, Phase.WRITER_CONNECTING)
            return
        client.runs += 1
        self.repeated += client.runs > 1
        self.s.at(self.s.rnd.random() * 0.02, lambda: self.append(client, instance.id, link))

    def failed(self, client: Client, failure: Failure, phase: Phase) -> None:
        action = failures.decide(failure, phase)
        self.s.log(f"{client.key}: {failure.value} ({phase.value}): {action.value}")
        if action in (Action.WAIT_FOR_WRITER, Action.RUN_AGAIN):
            self.s.at(PAUSE * (1 + self.s.rnd.random()), lambda: self.run(client))
        else:  # the error reaches the application, which goes on with the next key
            self.s.at(PAUSE, lambda: self.next_key(client))

    def gone(self, instance: str, link: Link) -> bool:
        """Whether the connection is lost by now: with its server, because it was cut, or by chance."""
        given_up = link.server not in self.s.topology.by_id[instance].servers
        unlucky = self.s.rnd.random() < LOST * (self.s.disorder > 0)
        return link.broken or given_up or not link.machine.reachable or unlucky

    # -- the steps of one run -------------------------------------------------------------------------------------

    def append(self, client: Client, instance: str, link: Link) -> None:
        """Send the statement. The server gives the transaction an id and writes its first record."""
        if self.s.stuck(instance, link):
            self.s.at(0.05, lambda: self.append(client, instance, link))
            return
        machine = link.machine
        if self.gone(instance, link):
            self.failed(client, Failure.LOST, Phase.WRITER_STATEMENT)
            return
        if machine.role is not Role.WRITER:
            self.failed(client, Failure.READ_ONLY, Phase.WRITER_STATEMENT)
            return
        xid = machine.begin(client.key, self.s.now)
        self.s.at(self.s.rnd.random() * 0.02, lambda: self.note(client, instance, link, xid))

    def note(self, client: Client, instance: str, link: Link, xid: int) -> None:
        if self.s.stuck(instance, link):
            self.s.at(0.05, lambda: self.note(client, instance, link, xid))
            return
        machine = link.machine
        if self.gone(instance, link):
            machine.open.pop(xid, None)
            self.failed(client, Failure.LOST, Phase.WRITER_STATEMENT)
            return
        seen = (seen.server for instance in self.s.topology for seen in instance.tracked)
        readers = frozenset(server.id for server in seen if server.role is Role.READER)
        position = WalPosition(machine.timeline.epoch, machine.timeline.end)
        note = Note(xid, position, machine.recovered, machine.id, readers)
        arrives = self.s.rnd.random() >= 2 * LOST * (self.s.disorder > 0)
        answered = self.s.rnd.random() >= 2 * LOST * (self.s.disorder > 0)
        if arrives:
            self.s.at(self.s.rnd.random() * 0.03, lambda: self.arrives(link, xid, client.key), outside=True)
        self.s.at(0.03 + self.s.rnd.random() * 0.03, lambda: self.answer(client, instance, link, note, answered))

    def arrives(self, link: Link, xid: int, key: str) -> None:
        """Let COMMIT reach its server. It never reaches a dead one, and a frozen or a cut-off one only later."""
        machine = link.machine
        if link.broken or xid not in machine.open:
            return
        if not machine.reachable:
            self.s.at(0.05, lambda: self.arrives(link, xid, key), outside=True)
            return
        if self.s.cluster.synchronous and machine.timeline is not self.s.cluster.timeline:
            machine.waiting.add(xid)  # it never ends, because no reader can acknowledge it
            return
        if machine.timeline.committed(key):
            self.s.violated("f", f"{key} commits for the second time, on {machine.id.started}")
        machine.commit(xid, self.s.now)

    def answer(self, client: Client, instance: str, link: Link, note: Note, answered: bool) -> None:
        if self.s.stuck(instance, link):
            self.s.at(0.05, lambda: self.answer(client, instance, link, note, answered))
            return
        machine = link.machine
        committed = machine.timeline.committed(note.xid)
        if answered and committed and not self.gone(instance, link):
            self.acknowledged(client, machine)
            return
        action = failures.decide(Failure.LOST, Phase.COMMIT)
        self.s.log(f"{client.key}: the answer to COMMIT is lost: {action.value}")
        if action is Action.RESOLVE:
            self.resolve(client, note)
        else:
            self.failed(client, Failure.LOST, Phase.COMMIT)

    def acknowledged(self, client: Client, machine: Machine) -> None:
        if not machine.timeline.committed(client.key):
            self.s.violated("g", f"{client.key} is said to be committed, and is not on {machine.id.started}")
        self.s.log(f"{client.key} is committed on {machine.id.started}")
        client.done.append(client.key)
        self.s.at(self.s.rnd.random() * 0.3, lambda: self.next_key(client))

    def resolve(self, client: Client, note: Note) -> None:
        self.s.process.when_trusted(lambda: self.ask(client, note))

    def ask(self, client: Client, note: Note) -> None:
        """Ask the newest writer for the outcome of the transaction, as commit_check.XidOutcomeQuery does."""
        again = PAUSE * (1 + self.s.rnd.random())
        writer = self.s.to_writer().instance
        link = self.s.connect(writer) if writer is not None else None
        if link is None or not link.machine.reachable or link.machine.role is not Role.WRITER:
            self.s.at(again, lambda: self.resolve(client, note))
            return
        machine = link.machine
        status = machine.status(note.xid)
        found = commit_outcome.outcome(
            note, Evidence(machine.id, machine.timeline.epoch, machine.recovered, machine.followed, status)
        )
        self.s.log(f"{client.key}: {machine.id.started} says {status}: {found.value}")
        if found is Outcome.PENDING:
            if note.xid not in machine.waiting:
                machine.open.pop(note.xid, None)  # ended, because its COMMIT is lost
            self.s.at(again, lambda: self.resolve(client, note))
            return
        self.resolved += 1
        if found is Outcome.COMMITTED:
            self.acknowledged(client, machine)
        elif found is Outcome.NOT_COMMITTED:
            self.s.at(again, lambda: self.run(client))
        else:
            client.unknown.append(client.key)
            self.s.at(again, lambda: self.next_key(client))

    def check(self) -> None:
        """Check at the end that no key is there twice and, with synchronous replication, that no acknowledged key is lost."""
        line = self.s.cluster.timeline
        there = [entry.key for entry in line.history(line.end) if entry.commit]
        if len(there) > len({*there}):
            self.s.violated("f", f"keys that stand there twice: {there}")
        if self.s.cluster.synchronous:
            for client in self.clients:
                for key in client.done:
                    if key not in there:
                        self.s.violated("g", f"{key} was acknowledged, and is lost")
