"""Connect units: choose the instance that a unit needs, and get a connection there. If there is no writer, the unit waits.

This is the request path. It never blocks on discovery.
"""

from __future__ import annotations

import contextlib
import itertools
import random
import time
import weakref
from collections.abc import Sequence
from typing import Generic, TypeVar

import tenacity
from sqlalchemy import exc
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import PoolProxiedConnection

from aurora_router.cluster.connection_state import STATE, state_of
from aurora_router.cluster.engines import Engines
from aurora_router.cluster.limits import FairSemaphore, RetryThrottle, Slot
from aurora_router.cluster.monitor import Monitor, Urgency
from aurora_router.cluster.pooling import PoolFull
from aurora_router.config.checks import get_pool_limits
from aurora_router.config.settings import Settings
from aurora_router.core import events
from aurora_router.core.failures import Phase, is_of_connect, traits
from aurora_router.core.instance import Instance, Role
from aurora_router.core.pacing import Rate
from aurora_router.core.positions import Requirement
from aurora_router.core.read_retry import ReadStep, after_connecting
from aurora_router.core.retry_loop import Sleep, next_step
from aurora_router.core.selection import (
    STRATEGIES,
    Balance,
    Decision,
    Load,
    Reason,
    choose,
    make_need,
    to_writer,
    was_looked_for,
    with_proof,
)
from aurora_router.core.topology import Topology
from aurora_router.drivers import Mode
from aurora_router.errors import (
    ConfigurationError,
    RouterError,
    WrongServer,
)
from aurora_router.routing.backoff import CONNECT_BACKOFF, TenacityPolicy
from aurora_router.routing.checkout_events import CheckoutEvents
from aurora_router.routing.connector import Connector
from aurora_router.routing.interceptor import Interceptor, PendingCheckout, bind_unit
from aurora_router.routing.unit import READ_WRITE, Place, Unit
from aurora_router.routing.waits import Waits, WriterUnreachable
from aurora_router.telemetry.listeners import EventDispatcher
from aurora_router.telemetry.stats import Counters

T = TypeVar("T")

# Seconds between two reports of reads that no reader serves.
REMIND = 10.0
LEAST_PAUSE = 0.05  # seconds before a unit asks again whether it may retry
_DEFAULT, _AUTOCOMMIT, _READ_ONLY = Mode  # an enum's members are slow to look up on the request path
_WRITER = Role.WRITER
_CONNECTING = (Phase.READER_CONNECTING, Phase.WRITER_CONNECTING)  # indexed by on_writer
_UNSENT = (Phase.READER_UNSENT, Phase.WRITER_UNSENT)
_NO_READER, _OWN_WRITES = Reason.NO_READER, Reason.OWN_WRITES


class _AcquireAttempt(Generic[T]):
    """One attempt of a unit to connect, which may try several instances.

    write: why the unit must be on the writer; None if it need not be, as far as known.
    began: when the first attempt began, seconds, monotonic; None if the clock was not read yet.
    queued_at: when the unit began to wait for a slot in the writer's pool; seconds, monotonic.
    timeout: the timeout error of a reader's pool that the unit has waited for.
    refused: the error of a reader that refused the credentials or the database.
    """

    __slots__ = ("began", "connector", "queued_at", "refused", "timeout", "write")

    def __init__(self, connector: Connector[T], write: Reason | None, began: float | None) -> None:
        self.connector = connector
        self.write = write
        self.began = began
        self.queued_at: float | None = None
        self.timeout: exc.TimeoutError | None = None
        self.refused: Exception | None = None


class Checkout:
    """Brings the units of one router to its instances.

    for_reads: the slots in the writer's pool that reads may have.
    counters: counts units, waits and retries.
    waits: the waits of units.
    """

    def __init__(
        self,
        settings: Settings,
        interceptor: Interceptor,
        engines: Engines,
        monitor: Monitor,
        dispatcher: EventDispatcher,
        throttle: RetryThrottle,
        for_reads: FairSemaphore,
        counters: Counters,
    ) -> None:
        pool, _ = get_pool_limits(settings.options_of_readers or settings.options)
        self._interceptor = interceptor
        self._engines = engines
        self._monitor = monitor
        self._dispatcher = dispatcher
        self._events = CheckoutEvents(dispatcher)
        self._throttle = throttle
        self._for_reads = for_reads
        self._counters = counters
        self._need = make_need(settings)
        self._declared_need = self._need._replace(declared=True)
        self._balance = _checked(settings.balance) if callable(settings.balance) else STRATEGIES[settings.balance]
        self._wait = settings.wait_for_reader
        self._token_epoch_timeout = settings.probe_timeout  # to look for a writer that a token speaks of
        self._modes = engines.modes
        self._load = Load(engines.in_use, capacity=pool)
        self.waits = Waits(settings, engines, monitor, dispatcher, self._need, self._load, counters)
        self._say_no_reader = Rate(REMIND)

    def close(self) -> None:
        """End all waiting for slots. Units that wait for a topology see `is_closed` when the monitor wakes them."""
        self.waits.close()
        self._for_reads.cancel_waiters()

    def forked(self) -> None:
        """Begin anew in a forked child, in which no unit waits."""
        self.waits.forked()

    def acquire(self, unit: Unit, connector: Connector[T], write: Reason | None = None) -> T:
        """Connect a unit to the instance that it needs.

        If a reader cannot be reached, the unit tries another instance. For a writer it waits up to failover_timeout.

        write: why the unit must be on the writer, if it must.
        """
        if write is None and unit.intent.read_only is False:
            write = Reason.DECLARED_WRITE
        try:
            if self._dispatcher.listeners:
                self._events.started(unit)
            try:
                return self._try_acquire(unit, connector, write, None)
            except WriterUnreachable as again:
                failed = again
            return self._acquire_again(unit, connector, write, failed)
        except BaseException as error:
            unit.release()
            if self._dispatcher.listeners:
                self._events.failed(unit, error)
            raise

    def _acquire_again(self, unit: Unit, connector: Connector[T], write: Reason | None, failed: WriterUnreachable) -> T:
        """Connect a unit to the writer, after a first attempt has failed, as soon as one can be reached."""
        began = failed.began
        self._throttle.allow(failed.instance.id, first=True)
        now = time.monotonic()
        left = self.waits.time_left(unit, began)
        # This policy asks no retry budget. _pause() asks it, because a refused retry is no error here: the unit waits.
        policy = TenacityPolicy(tenacity.stop_after_delay(left), CONNECT_BACKOFF, now)
        for number in itertools.count(1):
            self._counters.retries[failed.instance.id] += 1
            try:
                return self._try_acquire(unit, connector, write, began)
            except WriterUnreachable as again:
                failed = again
            step = next_step(number, failed, policy)
            if not isinstance(step, Sleep):
                break
            self._pause(step.seconds, failed, now + left)
        raise self.waits.no_writer(began, failed) from failed.cause

    def _pause(self, seconds: float, failed: WriterUnreachable, until: float) -> None:
        """Sleep, but wake early if the monitor sees another writer than the failed one, or no writer.

        If the retry budget allows no attempt, sleep on. Waiting costs nothing, but an attempt loads an instance in trouble.

        until: seconds, monotonic.
        """
        servers = failed.instance.servers
        while True:
            topology = self._monitor.wait_for(lambda t: t.writer is None or t.writer.servers != servers, seconds)
            if self.waits.is_closed:
                raise RouterError("this router was closed while a unit waited for a writer")
            if topology.writer is None or time.monotonic() >= until:
                return
            if self._throttle.allow(failed.instance.id, first=topology.writer.servers != servers):
                return
            seconds = max(seconds, LEAST_PAUSE)

    def _try_acquire(self, unit: Unit, connector: Connector[T], write: Reason | None, began: float | None) -> T:
        """Make one attempt.

        began: when the first attempt began, seconds, monotonic. None for the first, which reads the clock only if it must.
        """
        attempt = _AcquireAttempt(connector, write, began)
        unit.queues = False
        while True:
            chosen = self._choose(unit, attempt)
            if chosen is None:
                continue
            instance, reason = chosen
            connection = self._connect(unit, attempt, instance)
            if connection is not None:
                break
        counters = self._counters
        if attempt.write is not None:
            counters.writes[instance.id] += 1
        elif unit.place.on_writer:
            counters.reads_as_writer[instance.id] += 1
        else:
            counters.reads_as_reader[instance.id] += 1
        if self._dispatcher.listeners:
            self._events.routed(unit, instance.id, reason, state_of(connector.pool_connection(connection)))
        return connection

    def _choose(self, unit: Unit, attempt: _AcquireAttempt[T]) -> tuple[Instance, Reason] | None:
        """Choose the instance, and wait for one if there is none. Return None if the choice must be made again."""
        decision = self.decide(unit, attempt.write)
        if attempt.write is None:
            waits = decision.reason is _OWN_WRITES and bool(self._wait) and not unit.waited
            if attempt.connector.judge is not None:
                attempt.write = self._judge(unit, attempt.connector, decision, waits=waits)
                if attempt.write is not None:
                    # Decide again before the unit waits for a reader, or takes a slot, or connects to a reader.
                    return None
            if waits:
                self.waits.for_reader(unit)
                return None
        instance, reason, _ = decision
        if instance is None:
            if attempt.refused is not None:
                raise attempt.refused  # in the server's words: no other instance is left
            attempt.began = attempt.began or time.monotonic()
            instance = self.waits.for_writer(unit, decision, attempt.began)
            if instance is None or reason is Reason.NO_INSTANCE:
                return None  # the token has lapsed, or a reader may serve the read now
        if reason is _NO_READER and len(self._monitor.topology.instances) > 1 and not self._may_read(unit, attempt, instance):
            return None
        return instance, reason

    def _may_read(self, unit: Unit, attempt: _AcquireAttempt[T], writer: Instance) -> bool:
        """Whether the unit has a slot for reads in the writer's pool. If not, wait for one; then the caller decides again."""
        if unit.writer_read_slot is not None and unit.writer_read_slot.acquired:
            return True
        reads = self._say_no_reader.passes(time.monotonic())
        if reads:
            said = self._monitor.topology.said(avoided=unit.avoid)
            self._dispatcher.publish(events.NoReaderQualifies(writer.id, reads, said))
        # With several instances, reads get only a share of the writer's pool, because writes must find room.
        slot = unit.writer_read_slot = Slot(self._for_reads)  # the unit owns it before it is acquired
        if slot.acquire(0.0):
            return True
        attempt.queued_at = attempt.queued_at or time.monotonic()
        self.waits.for_slot(unit, slot, attempt.queued_at)
        return False

    def _connect(self, unit: Unit, attempt: _AcquireAttempt[T], instance: Instance) -> T | None:
        """Connect a unit to an instance. None if that has failed and the unit is to try another one."""
        on_writer = instance.role is _WRITER
        mode = _mode(unit, on_writer)
        unit.place = Place(instance, on_writer, instance.epoch)
        connection: T | None = None
        connecting, connector = self._interceptor.connecting, attempt.connector
        outer = connecting.value
        try:
            engine = self._engines.engine(instance)
            connects = PendingCheckout(unit, mode, engine)
            connecting.value = weakref.ref(connects)
            connection = connector.connect(engine)
            if self._bind(unit, connection, connector.pool_connection(connection), instance, mode):
                return connection
            # The connection is dead, or leads to another server. The reasons for choosing this instance do not apply to it.
            connector.discard(connection)
        except (DBAPIError, WrongServer, self._engines.driver_error) as error:
            self._abandon(unit, connector, connection)
            if not is_of_connect(error):
                raise
            if not self._can_try_another(unit, attempt, instance, error, is_connected=connection is not None):
                raise
        except ConfigurationError as error:  # there is no password
            self._abandon(unit, connector, connection)
            if connection is None:
                self._dispatcher.publish(events.ConnectFailed(instance.id, str(error), **unit.numbers))
            raise
        except PoolFull:
            unit.leave()
            if attempt.timeout is not None:
                raise attempt.timeout from None
            if attempt.write is None and connector.judge is not None:
                attempt.write = connector.judge(self._engines.engine(instance), True)
            unit.queues = attempt.write is None and not self._has_room_elsewhere(unit)
        except exc.TimeoutError as error:
            self._abandon(unit, connector, connection)
            if on_writer or attempt.timeout is not None or not self._has_room_elsewhere(unit):
                raise
            unit.queues, attempt.timeout = False, error
        except BaseException:
            self._abandon(unit, connector, connection)
            raise
        finally:
            connecting.value = outer
        return None

    def _bind(self, unit: Unit, connection: object, raw: PoolProxiedConnection, instance: Instance, mode: Mode) -> bool:
        """Switch a connection to the unit's mode, and note that the unit has it. False if it cannot be used."""
        now = time.monotonic()
        if not self._modes.is_usable(raw, instance, now):
            return False
        # If the unit is bound already, a listener of the application has sent something there, and the mode is set.
        if raw.info[STATE].unit is not unit:
            self._modes.set_mode(raw, mode, unit.isolation)
        if unit.intent.read_only and not unit.intent.owned_by_session:
            self._modes.keep_read_only(raw)
        bind_unit(unit, connection, raw)
        self._throttle.record_unit(now)
        return True

    def _can_try_another(
        self, unit: Unit, attempt: _AcquireAttempt[T], instance: Instance, error: Exception, *, is_connected: bool
    ) -> bool:
        """Note a failure to connect. Return whether the unit is to try another instance.

        Raises WriterUnreachable if the writer was not reached, and ConfigurationError for an option that the driver cannot use.
        """
        # An error that has a statement comes from a listener of the application, not from connecting.
        connects = not is_connected and getattr(error, "statement", None) is None
        phase = (_CONNECTING if connects else _UNSENT)[unit.place.on_writer]
        failure = self._engines.failure(error, phase)
        if connects and not isinstance(error, WrongServer):  # that one was reported already
            self._dispatcher.publish(events.ConnectFailed(instance.id, self._engines.explain(error), **unit.numbers))
        means = traits(failure)
        if means.suspicious:
            self._monitor.suspect(instance.id)
        if connects and (refused := self._engines.connect_argument_error(error)) is not None:
            raise refused from None
        step = after_connecting(failure, phase, on_writer=unit.place.on_writer)
        if step is ReadStep.RAISE:
            return False
        if means.is_last_word:
            attempt.refused = error
        if step is ReadStep.WAIT:
            raise WriterUnreachable(instance, error, attempt.began or time.monotonic()) from error
        unit.avoid |= {instance.id}
        self._counters.retries[instance.id] += 1
        if self._dispatcher.listeners:
            self._dispatcher.publish(events.Repeated(instance.id, type(error).__name__, **unit.numbers))
        return True

    def _judge(self, unit: Unit, connector: Connector[T], decision: Decision, *, waits: bool) -> Reason | None:
        """Why the statement of a connecting unit must be on the writer; None if it may be a read, as far as known.

        If no reader qualifies, the statement is compiled if that is necessary. A read-only unit is judged only then.

        waits: whether a read would wait for a reader now.
        """
        assert connector.judge is not None
        thorough = waits or decision.instance is None or decision.reason is _NO_READER
        if unit.intent.read_only and not thorough:
            return None
        topology = self._monitor.topology
        engine = self._engines.engine(decision.instance or topology.writer or topology.instances[0])
        if engine.dialect.server_version_info is None and topology.writer is not None:
            # A process that only writes has never connected to that reader, so the reader's dialect does not know its server.
            engine = self._engines.engine(topology.writer)
        return connector.judge(engine, thorough)

    def _has_room_elsewhere(self, unit: Unit) -> bool:
        """Whether a reader that qualifies has room in its pool."""
        decision = self.decide(unit, None)
        return decision.instance is None or self._load.has_room(decision.instance.id)

    def _abandon(self, unit: Unit, connector: Connector[T], connection: T | None) -> None:
        """Discard the connection of a failed attempt. Otherwise the error would keep it, and so a place in the pool."""
        unit.leave()
        if connection is not None:
            with contextlib.suppress(Exception):
                connector.discard(connection)

    def decide(self, unit: Unit, write: Reason | None) -> Decision:
        """Decide on which instance the unit would be now.

        write: why it must be on the writer, if it must.
        """
        if time.time() > self._monitor.trusted_until:
            self._monitor.wait_until_trusted()
        topology = self._monitor.topology
        if write is not None:
            if (
                unit.marks.requirement is not None and unit.marks.requirement.is_from_token
            ):  # maybe of a newer writer than any known here
                topology = self._resolve(unit, unit.marks.requirement, topology)
            return to_writer(topology, write)
        if unit.intent.read_only and self._interceptor.isolation.beyond_readers(unit.isolation):
            return to_writer(topology, Reason.ISOLATION) if self._need.writer_serves_reads else Decision(None, Reason.ISOLATION)
        need = self._declared_need if unit.intent.read_only else self._need
        if unit.marks.requirement is not None or unit.marks.last_reads or unit.avoid:
            if unit.marks.requirement is not None:
                topology = self._resolve(unit, unit.marks.requirement, topology)
            need = need.of_unit(unit.marks.requirement, unit.marks.last_reads, unit.avoid)
        load = self._load
        load.turn += 1
        decision = choose(topology, need, self._balance, load, random.random(), time.monotonic())
        if decision.reason is _OWN_WRITES or (decision.reason is Reason.NO_WRITER and need.requirement is not None):
            self._monitor.request_positions()
        return decision

    def _resolve(self, unit: Unit, requirement: Requirement, topology: Topology) -> Topology:
        """Add the position that proves the unit's requirement, if there is one. Return the topology that has the position."""
        requirement = with_proof(requirement, topology)
        epoch = requirement.epoch
        if requirement.is_from_token and epoch is not None and epoch > topology.epoch:
            # The token names a newer epoch than any known here. Probe all instances that answer before doubting the token.
            # Anybody may make up such a token. So probe once for all waiting units, and not more often than for positions.
            claim = requirement
            topology = self._monitor.wait_for(
                lambda t: t.epoch >= epoch or was_looked_for(claim, t), self._token_epoch_timeout, urgency=Urgency.SHARED_PROBE
            )
            requirement = with_proof(requirement, topology)
        if requirement is not unit.marks.requirement:
            unit.marks = unit.marks._replace(requirement=requirement)
        return topology

    def writer(self) -> Instance:
        """Return the writer. If there is none, wait as a unit would."""
        unit = Unit(READ_WRITE)
        decision = self.decide(unit, Reason.DECLARED_WRITE)
        instance = decision.instance or self.waits.for_writer(unit, decision, time.monotonic())
        assert instance is not None  # the unit has no token that could lapse
        return instance


def _mode(unit: Unit, on_writer: bool) -> Mode:
    """The mode that the unit's connection needs."""
    if unit.intent.read_only:
        return _READ_ONLY
    if on_writer:
        return _DEFAULT
    return _READ_ONLY if unit.holds else _AUTOCOMMIT


def _checked(balance: Balance) -> Balance:
    """The user's function, with an error that names `balance=` if the result is not one of the readers."""

    def checked(readers: Sequence[Instance], load: Load, rnd: float) -> Instance:
        chosen = balance(readers, load, rnd)
        if chosen not in readers:
            kind = type(chosen).__name__
            raise ConfigurationError(f"balance=: the function must return one of the readers that it is given, not {kind}")
        return chosen

    return checked
