"""Clients that commit, and read their writes in autocommit on readers. The real table of failures decides about lost reads.

A connection can be lost before the read is sent, while it is in flight, or with its answer. Replay can cancel the read, and a
reader can be unable to execute it. A frozen or cut-off server leaves the read stuck until the topology gives the server up.
Invariants:
(b) a read sees every commit of its session that is still in the cluster's history, on whatever server executes it;
(i) so does a retried read. It is never sent again to a reader on which it failed. Only an error of the read's own reaches the
    application. The read ends within ENDS seconds of the last fault.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from aurora_router.core import failures, selection
from aurora_router.core.failures import Action, Failure, Phase
from aurora_router.core.instance import Instance, Role
from aurora_router.core.positions import Requirement
from aurora_router.core.read_retry import ReadStep, after_connecting, after_statement
from aurora_router.core.selection import Need, Reason
from tests.simulation import faults
from tests.simulation.cluster import Commit

if TYPE_CHECKING:
    from tests.simulation.simulation import Link, Simulation

PIN = 2.0
PAUSE = 0.05
LOST = 0.04  # share of the steps at which a read is lost, in an unruly seed
ENDS = 3.0  # seconds from the last fault to the end of every read that was under way
EXCUSES = {
    Failure.CONFLICT: 0.02,
    Failure.BROKEN: 0.01,
    Failure.NOT_HERE: 0.01,
    Failure.READ_ONLY: 0.01,
    Failure.OTHER: 0.005,
}  # errors of a reader in place of an answer, and the share of each


UNSENT = {Phase.READER_CONNECTING, Phase.WRITER_CONNECTING, Phase.READER_UNSENT, Phase.WRITER_UNSENT}


@dataclass
class Session:
    """A client that commits and then reads."""

    name: str
    writes: float  # share of its steps
    commits: list[Commit] = field(default_factory=list)
    requirement: Requirement | None = None
    read: Read | None = None  # under way


@dataclass
class Read:
    """A unit that reads once.

    avoid: the instances that the router remembers to avoid
    failed_on: the readers on which the read really failed
    retries: how often it was retried after it was sent
    """

    session: Session
    began: float
    avoid: frozenset[str] = frozenset()
    on_writer: bool = False
    failed_on: list[str] = field(default_factory=list)
    retries: int = 0


class Sessions:
    """The sessions of one simulation."""

    def __init__(self, simulation: Simulation, count: int) -> None:
        self.s = simulation
        self.rnd = simulation.rnd
        self.sessions = [Session(f"session {n + 1}", self.rnd.choice([0.05, 0.35])) for n in range(count)]
        self.reads = self.by_readers = self.repeated = self.moved = 0

    def start(self) -> None:
        for session in self.sessions:
            self.s.at(0.2 + self.rnd.random(), lambda s=session: self.step(s))

    def step(self, session: Session) -> None:
        """Do a session's next step. It waits for a read, but not for a commit."""
        if self.rnd.random() < session.writes:
            self.s.process.when_trusted(lambda: self.write(session))
            self.go_on(session)
        else:
            session.read = Read(session, self.s.now)
            self.read(session.read)

    def go_on(self, session: Session) -> None:
        self.s.at(0.01 + self.rnd.random() * 0.2, lambda: self.step(session))

    # -- commits --------------------------------------------------------------------------------------------------

    def write(self, session: Session) -> None:
        instance = self.s.to_writer().instance
        if instance is None:
            return
        self.s.check_writer(instance)
        epoch = self.s.topology.epoch
        link = self.s.connect(instance)
        if link is not None:
            self.s.at(self.rnd.random() * 0.03, lambda: self.commit(session, link, epoch))

    def commit(self, session: Session, link: Link, epoch: int) -> None:
        machine = link.machine
        if link.broken or not machine.reachable or machine.role is not Role.WRITER:
            return
        commit = Commit(machine.timeline, machine.timeline.append(self.s.now))

        def acknowledged() -> None:
            if not link.broken and machine.reachable:
                self.s.log(f"{session.name} committed {commit.timeline.epoch}:{commit.lsn} on {machine.id.started}")
                session.commits.append(commit)
                session.requirement = Requirement(self.s.process.clock(), epoch)

        self.s.at(self.rnd.random() * 0.01, acknowledged)

    # -- reads ----------------------------------------------------------------------------------------------------

    def need(self, read: Read) -> Need:
        requirement = read.session.requirement
        if requirement is not None:
            requirement = read.session.requirement = selection.with_proof(requirement, self.s.topology)
        return Need(requirement=requirement, avoid=read.avoid, pin_seconds=PIN)

    def read(self, read: Read) -> None:
        self.s.process.when_trusted(lambda: self.enter(read))

    def enter(self, read: Read) -> None:
        """Choose an instance, and connect."""
        session = read.session
        decision = self.s.to_writer() if read.on_writer else self.s.decide(self.need(read))
        if decision.reason in (Reason.OWN_WRITES, Reason.NO_WRITER):
            self.s.request_positions()
        instance = decision.instance
        if instance is None:
            self.s.at(PAUSE, lambda: self.read(read))
            return
        on_reader = instance.role is Role.READER
        if on_reader and instance.id in read.failed_on:
            self.s.violated("i", f"a read of {session.name} goes to {instance} again, where it has failed")
        link = self.s.connect(instance)
        if link is None:
            self.failed(read, instance, Failure.CONNECT, Phase.READER_CONNECTING if on_reader else Phase.WRITER_CONNECTING)
            return
        if link.broken or self.unlucky():
            self.failed(read, instance, Failure.LOST, Phase.READER_UNSENT if on_reader else Phase.WRITER_UNSENT)
            return
        # A fixed time on the writer is no evidence. If there was nothing else, the read need not show the commits.
        requirement = session.requirement
        evident = self.s.positions or requirement is None or requirement.epoch == self.s.topology.epoch
        due = list(session.commits) if evident else []
        self.s.at(self.rnd.random() * 0.05, lambda: self.execute(read, instance, link, due))

    def unlucky(self) -> bool:
        return self.s.disorder > 0 and self.rnd.random() < LOST

    def execute(self, read: Read, instance: Instance, link: Link, due: list[Commit]) -> None:
        """Let the read in flight reach its server, or be lost."""
        if self.s.stuck(instance.id, link):
            self.s.at(0.05, lambda: self.execute(read, instance, link, due))
            return
        machine = link.machine
        # A statement that moved to the writer is not known to be a read.
        in_flight = Phase.WRITER_STATEMENT if read.on_writer else Phase.READ
        if link.broken or not machine.reachable or self.unlucky():
            self.failed(read, instance, Failure.LOST, in_flight)
            return
        if self.s.disorder and machine.role is Role.READER:
            luck = self.rnd.random()
            for excuse, share in EXCUSES.items():
                luck -= share
                if luck < 0:
                    self.failed(read, instance, excuse, Phase.READ)
                    return
        machine.replay(self.s.now)
        for commit in due:
            if not machine.has(commit) and self.s.cluster.exists(commit):
                where = f"{machine.id.started} ({instance}), which is at {machine.timeline.epoch}:{machine.lsn}"
                what = f"{read.session.name} does not see {commit.timeline.epoch}:{commit.lsn} on {where}"
                self.s.violated("i" if read.failed_on else "b", f"repeated, {what}" if read.failed_on else what)
        if self.unlucky():
            self.failed(read, instance, Failure.LOST, in_flight)
            return
        self.reads += 1
        self.by_readers += instance.role is Role.READER
        self.end(read)

    def failed(self, read: Read, instance: Instance, failure: Failure, phase: Phase) -> None:
        """Handle a failure as the router does. Nothing was sent, or the read was in flight."""
        on_writer = instance.role is Role.WRITER
        if phase in UNSENT:
            step = after_connecting(failure, phase, on_writer=on_writer)
        else:
            step = after_statement(failure, phase, read_only=None, on_writer=read.on_writer or on_writer, retries=read.retries)
        self.s.log(f"a read of {read.session.name} at {instance.id}: {failure.value} ({phase.value}): {step.name}")
        if failures.traits(failure).suspicious:
            self.s.suspect(instance.id)
        again = failures.decide(failure, phase) is Action.RUN_AGAIN and read.on_writer
        if step is ReadStep.TO_WRITER:
            read.on_writer = True
            self.moved += 1
            self.read(read)
        elif step in (ReadStep.ELSEWHERE, ReadStep.AGAIN):
            self.repeated += 1
            read.retries += phase not in UNSENT
            if step is ReadStep.ELSEWHERE:
                read.failed_on.append(instance.id)
                self.avoid(read, instance)
            self.s.at(0.001, lambda: self.read(read))
        elif step is ReadStep.WAIT or again:  # as run_transaction() does, because the statement may write
            self.s.at(PAUSE * (1 + self.rnd.random()), lambda: self.read(read))
        else:
            if failure is not Failure.OTHER:
                self.s.violated("i", f"a read of {read.session.name} ends with an error: {failure.value} ({phase.value})")
            self.end(read)

    def avoid(self, read: Read, instance: Instance) -> None:
        read.avoid |= {instance.id}

    def end(self, read: Read) -> None:
        self.in_time(read)
        read.session.read = None
        self.go_on(read.session)

    def in_time(self, read: Read) -> None:
        """Check that a read has ended in time, counted from its begin or from the last fault."""
        if self.s.now - max(read.began, faults.END) > ENDS:
            self.s.violated("i", f"a read of {read.session.name} that began at {read.began:.3f} has not ended yet")

    def check(self) -> None:
        """Check at the end that no session hangs, or is kept on the writer for ever."""
        now = self.s.process.clock()
        for session in self.sessions:
            if session.read is not None:
                self.in_time(session.read)
            need = session.requirement
            if self.s.topology.readers and need is not None and need.acknowledged_at < now - 1.0 - PIN:
                needs = [need]
                samples = self.s.topology.samples
                # If the samples reach back less than that, a reader may be further behind than they reach.
                if not samples or samples[0].asked_at < now - 1.0:
                    needs.append(need._replace(position=None))
                for each in needs:
                    if self.s.decide(Need(requirement=each, pin_seconds=PIN)).reason is not Reason.READ:
                        self.s.violated(
                            "d", f"{session.name}, which wrote at {need.acknowledged_at:.3f}, is still kept on the writer"
                        )
