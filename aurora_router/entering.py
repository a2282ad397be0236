"""Where units enter: from what a unit needs to an instance and a connection there, waiting for a writer where there is none.

The request path; it never blocks on discovery.
"""

from __future__ import annotations

import contextlib
import random
import time
from typing import TypeVar

import tenacity
from sqlalchemy.exc import DBAPIError

from aurora_router.core import events
from aurora_router.core.failures import SUSPICIOUS, Action, Phase, decide
from aurora_router.core.positions import Requirement
from aurora_router.core.selection import Balance, Decision, Load, Need, Reason, choose, resolve, round_robin, to_writer
from aurora_router.core.topology import Instance, Role, Topology
from aurora_router.engines import Engines
from aurora_router.errors import AmbiguousWriter, NoReaderAvailable, NoWriterAvailable, RouterError, WrongServer
from aurora_router.gate import Gate, own
from aurora_router.limits import Places, Repeats
from aurora_router.listeners import Listeners
from aurora_router.monitor import Monitor
from aurora_router.servers import Mode
from aurora_router.unit import Door, Unit

T = TypeVar("T")

LEAST_PAUSE = 0.05  # seconds before a unit asks again whether it may try once more
_DEFAULT, _AUTOCOMMIT, _READ_ONLY = Mode  # an enum's members are slow to look up on the request path
_WRITER = Role.WRITER
_NO_READER, _OWN_WRITES = Reason.NO_READER, Reason.OWN_WRITES


class _Again(Exception):
    """The writer could not be reached; nothing was sent."""

    def __init__(self, instance: Instance, cause: BaseException, began: float) -> None:
        self.instance = instance
        self.cause = cause
        self.began = began


class Entrance:
    """Brings the units of one router to its instances.

    need: what each read needs. for_reads: the places of the writer that reads may have. patience: seconds to wait for a writer.
    pool_timeout: seconds to wait for a place in a pool. wait_for_reader: seconds that a read waits for a reader that has what it
    must see. token_ttl: seconds that a token may keep a read waiting for a writer. look_timeout: seconds to look for a writer
    that a token speaks of.
    """

    def __init__(
        self,
        gate: Gate,
        engines: Engines,
        monitor: Monitor,
        emit: Listeners,
        repeats: Repeats,
        for_reads: Places,
        need: Need,
        balance: Balance,
        *,
        patience: float,
        pool_timeout: float,
        wait_for_reader: float,
        token_ttl: float,
        look_timeout: float,
    ) -> None:
        self._gate = gate
        self._engines = engines
        self._monitor = monitor
        self._emit = emit
        self._repeats = repeats
        self._for_reads = for_reads
        self._need = need
        self._declared_need = need._replace(declared=True)
        self._balance = balance
        self._failover_timeout = patience
        self._pool_timeout = pool_timeout
        self._wait = wait_for_reader
        self._token_ttl = token_ttl
        self._look_timeout = look_timeout
        self._load = Load(engines.in_use)
        self.closed = False

    def close(self) -> None:
        """Turn away who waits; those that the monitor wakes hear of it, too."""
        self.closed = True
        self._for_reads.turn_away()

    def enter(self, unit: Unit, door: Door[T], write: Reason | None = None) -> T:
        """Connect a unit to the instance that it needs; `write` says why it must be the writer, where it must.

        A reader that cannot be reached is passed over; for a writer the unit waits up to failover_timeout.
        """
        try:
            return self._enter(unit, door, write)
        except BaseException:
            unit.give_back()
            raise

    def _enter(self, unit: Unit, door: Door[T], write: Reason | None) -> T:
        if write is None and unit.read_only is False:
            write = Reason.DECLARED_WRITE
        try:
            return self._enter_once(unit, door, write, None)
        except _Again as again:
            failed, began = again, again.began
        self._repeats.allowed(failed.instance.id, first=True)
        patience = self._patience(unit, began)
        until = time.monotonic() + patience
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(_Again),
            wait=tenacity.wait_random_exponential(multiplier=0.02, max=1.0),
            stop=tenacity.stop_after_delay(patience),
            sleep=lambda seconds: self._pause(seconds, failed, until),
            reraise=True,
        )

        def once() -> T:
            nonlocal failed
            try:
                return self._enter_once(unit, door, write, began)
            except _Again as again:
                failed = again
                raise

        try:
            connection: T = retrying(once)
            return connection
        except _Again as again:
            raise self._no_writer(began, again) from again.cause

    def _pause(self, seconds: float, failed: _Again, until: float) -> None:
        """Sleep, but not longer than until the monitor sees another writer than the one that failed, or none any more. While too
        many repeat already, sleep on: to wait costs nobody anything, and an attempt at an instance in trouble does."""
        servers = failed.instance.servers
        while True:
            topology = self._monitor.wait_for(lambda t: t.writer is None or t.writer.servers != servers, seconds)
            if self.closed:
                raise RouterError("this router was closed while a unit waited for a writer")
            if topology.writer is None or time.monotonic() >= until:
                return
            if self._repeats.allowed(failed.instance.id, first=topology.writer.servers != servers):
                return
            seconds = max(seconds, LEAST_PAUSE)

    def _enter_once(self, unit: Unit, door: Door[T], write: Reason | None, began: float | None) -> T:
        """One attempt. began: when the first one did; None for the first, which only looks at the clock when it must."""
        until: float | None = None
        while True:
            decision = self.decide(unit, write)
            if decision.reason is _OWN_WRITES and self._wait and not unit.waited:
                self._wait_for_reader(unit)
                continue
            instance = decision.instance
            if instance is None:
                began = began or time.monotonic()
                found = self._wait_for_writer(unit, decision, began)
                if found is None or decision.reason is Reason.NO_INSTANCE:
                    continue  # a read that no reader would serve
                instance = found
            if decision.reason is _NO_READER and unit.borrowed is None and len(self._monitor.topology.instances) > 1:
                # What a cluster of several instances lends to reads is less than its writer's pool: writes must find room.
                if not self._for_reads.take(0.0):
                    until = until or time.monotonic() + min(self._pool_timeout, self._patience(unit, time.monotonic()))
                    self._wait_for_place(unit, until)
                    continue
                unit.borrowed = self._for_reads
            on_writer = instance.role is _WRITER
            mode = _READ_ONLY if unit.read_only else _DEFAULT if on_writer else _AUTOCOMMIT
            unit.instance, unit.on_writer, unit.epoch = instance, on_writer, instance.epoch
            phase = Phase.WRITER_CONNECTING if on_writer else Phase.READER_CONNECTING
            connection: T | None = None
            try:
                self._gate.entering.place = unit, mode
                connection = door.connect(self._engines.engine(instance))
                phase = Phase.WRITER_UNSENT if on_writer else Phase.READER_UNSENT
                raw = door.pooled(connection)
                now = time.monotonic()
                if self._engines.sound(raw, instance, now):
                    self._engines.set_mode(raw, mode, unit.isolation)
                    break
                # Dead, or not the server that the decision was about: what spoke for the instance does not speak for it.
                door.drop(connection)
            except (DBAPIError, WrongServer, self._engines.driver_error) as error:
                self._give_up(unit, door, connection)
                failure = self._engines.failure(error, phase)
                if failure in SUSPICIOUS:
                    self._monitor.suspect(instance.id)
                if decide(failure, phase) is Action.RAISE:
                    raise
                if on_writer:
                    raise _Again(instance, error, began or time.monotonic()) from error
                unit.avoid |= {instance.id}
                self._emit(events.Repeated, instance.id, type(error).__name__)
            except BaseException:
                self._give_up(unit, door, connection)
                raise
            finally:
                self._gate.entering.place = None
        own(unit, connection, raw)
        self._repeats.count(now)
        if self._emit.listeners:
            self._emit(events.Routed, instance.id, decision.reason)
        return connection

    def _give_up(self, unit: Unit, door: Door[T], connection: T | None) -> None:
        """Leave nothing of an attempt that failed: what its error holds on to would take a place in the pool meanwhile."""
        unit.instance = None
        if connection is not None:
            with contextlib.suppress(Exception):
                door.drop(connection)

    def decide(self, unit: Unit, write: Reason | None) -> Decision:
        """Where the unit would go now; `write` says why to the writer, where it must."""
        if time.time() > self._monitor.trusted_until:
            self._monitor.wait_until_trusted()
        topology = self._monitor.topology
        if write is not None:
            if unit.requirement is not None and unit.requirement.given:  # maybe of a newer writer than any that is known here
                topology = self._resolve(unit, unit.requirement, topology)
            return to_writer(topology, write)
        need = self._declared_need if unit.read_only else self._need
        if unit.requirement is not None or unit.last_reads or unit.avoid:
            if unit.requirement is not None:
                topology = self._resolve(unit, unit.requirement, topology)
            need = need._replace(requirement=unit.requirement, last_reads=unit.last_reads, avoid=unit.avoid)
        load = self._load
        load.turn += 1
        decision = choose(topology, need, self._balance, load, random.random(), time.monotonic())
        if decision.reason is _OWN_WRITES or (decision.reason is Reason.NO_WRITER and need.requirement is not None):
            self._monitor.want_positions()
        return decision

    def _resolve(self, unit: Unit, requirement: Requirement, topology: Topology) -> Topology:
        """Find the proof of what the unit must see, as far as that can be had; the topology that has it."""
        requirement = resolve(requirement, topology)
        epoch, after = requirement.epoch, requirement.after
        if requirement.given and epoch is not None and epoch > topology.epoch:
            # A token speaks of a newer writer than any that is known here. All are asked before it is doubted.
            topology = self._monitor.wait_for(
                lambda t: t.epoch >= epoch or all(i.heard_at >= after for i in t.instances), self._look_timeout, eager=True
            )
            requirement = resolve(requirement, topology)
        unit.requirement = requirement
        return topology

    def _wait_for_reader(self, unit: Unit) -> None:
        """Wait until a reader has what the unit must see, or it has waited for long enough."""
        unit.waited = True
        need = self._need._replace(requirement=unit.requirement, last_reads=unit.last_reads, avoid=unit.avoid)

        def found(topology: Topology) -> bool:
            return choose(topology, need, round_robin, self._load, 0.0, time.monotonic()).reason is not _OWN_WRITES

        self._monitor.wait_for(found, self._wait, eager=True)

    def _wait_for_place(self, unit: Unit, until: float) -> None:
        """Wait until that time for a place in the writer's pool that the unit may keep until it ends, for it may write there, or
        for a topology with readers; then it must be decided again. Raises NoReaderAvailable."""
        if self._for_reads.take(until - time.monotonic()):
            unit.borrowed = self._for_reads
        elif self.closed:
            raise RouterError("this router was closed while a unit waited for a reader")
        elif time.monotonic() >= until:
            raise NoReaderAvailable(self._monitor.topology.said(), self._pool_timeout)

    def _patience(self, unit: Unit, began: float) -> float:
        """Seconds for which a unit that began to wait then may go on waiting for a writer."""
        until = began + self._failover_timeout
        if unit.run is not None and unit.run.deadline is not None:
            until = unit.run.deadline
        return max(until - time.monotonic(), 0.0)

    def writer(self) -> Instance:
        """The writer, waiting for one as a unit would."""
        unit = Unit(False)
        decision = self.decide(unit, Reason.DECLARED_WRITE)
        instance = decision.instance or self._wait_for_writer(unit, decision, time.monotonic())
        assert instance is not None  # it has no token
        return instance

    def _wait_for_writer(self, unit: Unit, decision: Decision, began: float) -> Instance | None:
        """The writer, once there is one; None where a token would keep the unit waiting for longer than it is honoured."""
        if decision.reason is Reason.NO_INSTANCE and not self._need.writer_serves_reads:
            raise NoReaderAvailable(self._monitor.topology.said())
        since = time.monotonic()
        patience, lapses = self._patience(unit, began), False
        if unit.requirement is not None and unit.requirement.given and decision.reason is Reason.NO_WRITER:
            left = unit.requirement.after + self._token_ttl - since
            patience, lapses = min(patience, max(left, 0.0)), left < patience
        topology = self._monitor.wait_for(lambda t: t.writer is not None or bool(t.ambiguous), patience)
        found = topology.writer.id if topology.writer is not None else None
        self._emit(events.WaitedForWriter, time.monotonic() - since, found)
        if topology.writer is not None:
            return topology.writer
        if lapses:
            unit.requirement = None
            for past in unit.pasts:
                past.lapse()
            return None
        if topology.ambiguous:
            raise AmbiguousWriter(topology.ambiguous)
        if self.closed:
            raise RouterError("this router was closed while a unit waited for a writer")
        raise self._no_writer(began, None)

    def _no_writer(self, began: float, again: _Again | None) -> NoWriterAvailable:
        said = self._monitor.topology.said()
        if again is not None:
            said = (*said, f"the last attempt at {again.instance.id} ended with {type(again.cause).__name__}")
        return NoWriterAvailable(time.monotonic() - began, said)
