"""Wait for what a unit needs: a writer, a reader that shows enough, or a slot for reads in the writer's pool."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from weakref import WeakSet

from aurora_router.cluster.engines import Engines
from aurora_router.cluster.limits import Slot
from aurora_router.cluster.monitor import Monitor, Urgency
from aurora_router.config.checks import get_pool_limits
from aurora_router.config.settings import Settings
from aurora_router.core import events
from aurora_router.core.instance import Instance
from aurora_router.core.pacing import Rate
from aurora_router.core.selection import Decision, Load, Need, Reason, choose, round_robin
from aurora_router.core.topology import Topology
from aurora_router.errors import AmbiguousWriter, ConfigurationError, NoReaderAvailable, NoWriterAvailable, RouterError
from aurora_router.routing.unit import Unit
from aurora_router.telemetry.listeners import EventDispatcher
from aurora_router.telemetry.stats import Counters

# Seconds between two reports of units that wait for a writer.
REMIND = 10.0
_OWN_WRITES = Reason.OWN_WRITES


class WriterUnreachable(Exception):
    """The writer could not be reached, and nothing was sent."""

    def __init__(self, instance: Instance, cause: Exception, began: float) -> None:
        self.instance = instance
        self.cause = cause
        self.began = began


class _Waiter:
    """One unit that waits for a writer, for as long as its wait keeps this object."""

    __slots__ = ("__weakref__",)


class Waits:
    """The waits of one router's units.

    need: what each read needs.
    counters: counts waits.
    is_closed: whether the router is closed, so that no unit waits any longer.
    """

    def __init__(
        self,
        settings: Settings,
        engines: Engines,
        monitor: Monitor,
        dispatcher: EventDispatcher,
        need: Need,
        load: Load,
        counters: Counters,
    ) -> None:
        self.is_closed = False
        self._engines = engines
        self._monitor = monitor
        self._dispatcher = dispatcher
        self._need = need
        self._load = load
        self._counters = counters
        self._failover_timeout = settings.failover_timeout
        _, self._pool_timeout = get_pool_limits(settings.options)
        self._reader_timeout = settings.wait_for_reader
        self._token_ttl = settings.token_ttl
        # Those that wait for a writer. An exception of a signal handler may prevent the end of a wait, so only waits keep them.
        self._units: WeakSet[_Waiter] = WeakSet()
        self._say_waiting = Rate(REMIND)

    def close(self) -> None:
        """End the waits for a topology as soon as the monitor wakes them."""
        self.is_closed = True

    def forked(self) -> None:
        """Begin anew in a forked child, in which no unit waits."""
        self._units = WeakSet()

    @property
    def for_a_writer(self) -> int:
        """The number of units that wait for a writer now."""
        return len(self._units)

    @contextlib.contextmanager
    def _told(self, unit: Unit, what: events.Wait) -> Iterator[None]:
        """Publish the start and the end of a wait."""
        began = time.monotonic()
        try:
            if self._dispatcher.listeners:
                self._dispatcher.publish(events.WaitStarted(what, **unit.numbers))
            yield
        finally:
            if self._dispatcher.listeners:
                self._dispatcher.publish(events.WaitEnded(what, time.monotonic() - began, **unit.numbers))

    def for_reader(self, unit: Unit) -> None:
        """Wait until a reader has what the unit must see, or until wait_for_reader is over."""
        unit.waited = True
        self._counters.reader_waits += 1
        need = self._need.of_unit(unit.marks.requirement, unit.marks.last_reads, unit.avoid)

        def found(topology: Topology) -> bool:
            return choose(topology, need, round_robin, self._load, 0.0, time.monotonic()).reason is not _OWN_WRITES

        # Anybody may make up a token, so it must not make the monitor hurry. The writes of the session or scope itself may.
        made_up = (unit.marks.requirement is not None and unit.marks.requirement.is_from_token) or any(
            context.initial_token is not None and not context.wrote for context in unit.marks.contexts
        )
        with self._told(unit, "reader"):
            self._monitor.wait_for(found, self._reader_timeout, urgency=Urgency.SHARED_PROBE if made_up else Urgency.OWN_PROBE)

    def for_slot(self, unit: Unit, slot: Slot, began: float) -> None:
        """Wait for a slot in the writer's pool, or for a topology with readers. Then the caller must decide again.

        The unit keeps the slot until it ends, because it may write on the writer.

        began: when it began to wait, seconds, monotonic.

        Raises NoReaderAvailable if the time is up.
        """
        now = time.monotonic()
        left = min(began + self._pool_timeout - now, self.time_left(unit, began))
        with self._told(unit, "slot"):
            found = slot.acquire(left)
        if found:
            return
        if self.is_closed:
            raise RouterError("this router was closed while a unit waited for a reader")
        if time.monotonic() >= now + left:
            raise NoReaderAvailable(self._monitor.topology.said(), time.monotonic() - began)

    def time_left(self, unit: Unit, began: float) -> float:
        """Return how many more seconds a unit may wait for a writer.

        began: when it began to wait, seconds, monotonic.
        """
        until = began + self._failover_timeout
        if unit.intent.retry is not None and unit.intent.retry.deadline is not None:
            until = unit.intent.retry.deadline
        return max(until - time.monotonic(), 0.0)

    def for_writer(self, unit: Unit, decision: Decision, began: float) -> Instance | None:
        """Return the writer, once there is one; None if the unit's token lapses before that.

        A token lapses when it has been honoured for token_ttl.
        """
        if decision.reason is Reason.ISOLATION:
            raise NoReaderAvailable(self._monitor.topology.said(), beyond=True)
        if decision.reason is Reason.NO_INSTANCE and not self._need.writer_serves_reads:
            raise NoReaderAvailable(self._monitor.topology.said(avoided=unit.avoid))
        since = time.monotonic()
        timeout, lapses = self.time_left(unit, began), False
        if unit.marks.requirement is not None and unit.marks.requirement.is_from_token and decision.reason is Reason.NO_WRITER:
            left = unit.marks.requirement.since + self._token_ttl - since
            timeout, lapses = min(timeout, max(left, 0.0)), left < timeout
        with self._told(unit, "writer"):
            topology = self._wait_until_decided(since + timeout)
        found = topology.writer.id if topology.writer is not None else None
        if self._dispatcher.listeners:
            self._dispatcher.publish(events.WaitedForWriter(time.monotonic() - since, found, **unit.numbers))
        if topology.writer is not None:
            return topology.writer
        if lapses:
            unit.marks = unit.marks._replace(requirement=None)
            for context in unit.marks.contexts:
                context.drop_token()
            return None
        if topology.ambiguous:
            raise AmbiguousWriter(topology.ambiguous)
        if topology.misconfigured:
            raise ConfigurationError("; ".join(topology.said())) from self._engines.password_error
        if self.is_closed:
            raise RouterError("this router was closed while a unit waited for a writer")
        raise self.no_writer(began, None)

    def _wait_until_decided(self, until: float) -> Topology:
        """Wait until there is a writer, or until waiting alone will not bring one. Report the wait now and then.

        until: seconds, monotonic.
        """
        me = _Waiter()
        self._units.add(me)
        self._counters.writer_waits += 1
        try:
            while True:
                now = time.monotonic()
                if self._say_waiting.passes(now):
                    self._dispatcher.publish(events.WaitingForWriter(len(self._units), self._monitor.topology.said()))
                topology = self._monitor.wait_for(_is_decided, min(until - now, REMIND))
                if _is_decided(topology) or self.is_closed or time.monotonic() >= until:
                    return topology
        finally:
            self._units.discard(me)

    def no_writer(self, began: float, again: WriterUnreachable | None) -> NoWriterAvailable:
        said = self._monitor.topology.said()
        if again is not None:
            ended = f"{type(again.cause).__name__}: {self._engines.explain(again.cause)}"
            said = (*said, f"the last attempt at {again.instance.id} ended with {ended}")
        return NoWriterAvailable(time.monotonic() - began, said)


def _is_decided(topology: Topology) -> bool:
    """Whether there is a writer, or waiting alone will not bring one."""
    return topology.writer is not None or bool(topology.ambiguous) or bool(topology.misconfigured)
