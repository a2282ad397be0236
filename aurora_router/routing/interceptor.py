"""Intercept what SQLAlchemy gives to the driver: judge each text that is sent, and note in the unit what the text does.

COMMITs pass through commit_handler, and errors through error_handler.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Mapping
from typing import Any

from sqlalchemy.engine import Connection, Engine
from sqlalchemy.exc import DisconnectionError
from sqlalchemy.pool import PoolProxiedConnection

from aurora_router.cluster.connection_state import STATE, UNIT, ConnectionState, state_of, unit_of
from aurora_router.cluster.engines import Engines
from aurora_router.cluster.error_classification import FACTS
from aurora_router.cluster.families import Families
from aurora_router.cluster.instance_pool import RoutedConnection
from aurora_router.cluster.monitor import Monitor
from aurora_router.cluster.pooling import PoolFull
from aurora_router.config.checks import check_route
from aurora_router.config.settings import Settings
from aurora_router.core.failures import (
    WRITER_IS_GONE,
)
from aurora_router.core.instance import Instance
from aurora_router.core.isolation import AUTOCOMMIT, as_servers_say
from aurora_router.core.selection import Reason
from aurora_router.core.sql.analysis import Analysis, Effect, analyze
from aurora_router.core.statement_rules import ReaderStep, Violation, on_reader, reason_to_write, violation
from aurora_router.drivers import Driver, Mode
from aurora_router.errors import (
    ConfigurationError,
    NoReaderAvailable,
    NoWriterAvailable,
    ReadOnlyViolation,
    WrongServer,
)
from aurora_router.routing.causality import Causality
from aurora_router.routing.commit_handler import CommitHandler
from aurora_router.routing.error_handler import ErrorHandler
from aurora_router.routing.isolation import Isolation
from aurora_router.routing.known_statements import KnownStatements
from aurora_router.routing.unit import READ_WRITE, CommitState, MustMoveToWriter, Place, TransactionEnds, Unit
from aurora_router.telemetry.listeners import EventDispatcher
from aurora_router.waiting import Local, Waiting

_READ, _NO_COMMIT = Effect.READ, CommitState.NONE  # an enum's members are slow to look up on the request path


class PendingCheckout:
    """The unit that a thread is connecting, its future mode, and the engine that it connects with."""

    __slots__ = ("__weakref__", "engine", "mode", "unit")

    def __init__(self, unit: Unit, mode: Mode, engine: Engine) -> None:
        self.unit = unit
        self.mode = mode
        self.engine = engine


class Interceptor:
    """The hooks of one router's connections.

    causality: what the router's units must see.
    waiting: how units wait.
    known: what is known of the texts of statements.
    """

    def __init__(
        self,
        settings: Settings,
        families: Families,
        engines: Engines,
        monitor: Monitor,
        causality: Causality,
        dispatcher: EventDispatcher,
        waiting: Waiting,
    ) -> None:
        self.driver = settings.target.driver
        self.families = families
        self.causality = causality
        # The attempt that is under way in this thread. A listener of the application may connect another unit meanwhile. The
        # reference is weak, because an exception of a signal handler may end an attempt at any moment.
        self.connecting: Local[weakref.ref[PendingCheckout]] = waiting.local()
        self.known = KnownStatements(settings, families, monitor, engines.modes)
        self.isolation = Isolation(settings, families, monitor)
        self._modes = engines.modes
        self._monitor = monitor
        self._is_global = causality.is_global
        commits = CommitHandler(settings, families, engines, monitor, causality, dispatcher, waiting)
        self.commit, self.commit_in_two_phases = commits.commit, commits.commit_in_two_phases
        self.ends_with_rollback = commits.ends_with_rollback
        self.on_rollback, self.on_release = commits.on_rollback, commits.on_release
        errors = ErrorHandler(settings, families, engines, monitor, self.isolation)
        self.on_error, self.phase = errors.on_error, errors.phase

    def forked(self) -> None:
        """Begin anew in a forked child."""
        self.known.forked()
        self.causality.forked()

    def pending_checkout(self) -> PendingCheckout | None:
        """Return the attempt that is under way in this thread; None without one."""
        known = self.connecting.value
        return known() if known is not None else None

    def before_waiting(self) -> None:
        """Make a unit look for another reader with room before it waits for the full pool of its reader.

        Raises PoolFull.
        """
        pending = self.pending_checkout()
        if pending is not None:
            unit = pending.unit
            if not unit.place.on_writer and not unit.queues:
                raise PoolFull

    def on_checkout(self, raw: PoolProxiedConnection) -> None:
        """Note that a connection has left its pool.

        If no unit is connecting, somebody has taken the connection from an engine directly. Commits on it count all the same.

        Raises DisconnectionError for a connection that has died in the pool, as pre-ping does.
        """
        if self.pending_checkout() is None:
            if not self._modes.is_alive(raw):
                raise DisconnectionError("the connection was closed while it was idle")
            unit = self._nobodys()
            self.causality.on_begin(unit)
            self._modes.set_mode(raw, Mode.DEFAULT)
            self.hand_out(unit, raw)
            state_of(raw).distrust()
            bind_unit(unit, raw, raw)

    def _nobodys(self) -> Unit:
        """Make a unit for a connection that was taken from an engine directly. The connection behaves as on any engine."""
        unit = Unit(READ_WRITE)
        unit.wrote = True
        unit.place = Place(None, True, self._monitor.topology.epoch)
        return unit

    # -- statements -----------------------------------------------------------------------------------------------

    def before_execute(self, _cursor: Any, text: str, *rest: Any) -> None:
        """Look at a statement before it is sent. Each statement on a reader or in a read-only unit passes through here."""
        context = rest[-1]
        connection: Connection = context.root_connection
        known: Unit | None = getattr(connection, UNIT, None)
        unit = known if known is not None and unit_of(connection) is known else self._rebind(connection, known)
        if unit is None:
            return
        if unit.watched:
            self._look(unit, connection)
        unit.has_results = unit.last_sql is not None
        unit.last_sql = text
        unit.commit = _NO_COMMIT
        read_only, on_writer = unit.intent.read_only, unit.place.on_writer
        found = analyze(text, self.families.dialect)
        effect = self.known.effect(found) if found.functions else found.effect
        if effect is not _READ and found.in_doubt and (read_only or not on_writer or found.may_end_transaction):
            found = self.known.in_mode_of(text, connection.connection, unit)
            effect = self.known.effect(found)
        if read_only is None and not on_writer:
            self._on_reader(unit, found, effect, context)
        elif read_only:
            if not on_writer and "writer" in (unit.hint, found.hint, context.execution_options.get("route")):
                self._asks_for_writer(unit, effect)
            if effect is not _READ:
                self._in_read_only_unit(unit, found, effect)
        elif effect is not _READ or (text in self.known.rejected and self.known.was_rejected(text)):
            self._on_writer(unit, found, effect, rest[0], connection)

    def _on_reader(self, unit: Unit, found: Analysis, effect: Effect, context: Any) -> None:
        """Look at a statement of an automatic unit on a reader. Raises MustMoveToWriter if it must be on the writer."""
        hint = unit.hint
        if hint is None:
            # This is an option of the connection, or of a statement that replaced the session's.
            hint = context.execution_options.get("route")
            if hint is not None:
                check_route(hint)
        text = unit.last_sql
        reason = reason_to_write(found, effect, hint, text in self.known.rejected and self.known.was_rejected(text))
        if reason is None and (unit.marks.scopes or self._is_global) and self.causality.must_leave_reader(unit):
            reason = Reason.OWN_WRITES
        if reason is not None:
            pending = self.pending_checkout()
            connects = pending is not None and pending.unit is unit
            has_read, only_reads = unit.has_results, unit.only_reads
            match on_reader(reason, found, effect, is_connecting=connects, has_read=has_read, only_reads=only_reads):
                case ReaderStep.MOVE:
                    raise MustMoveToWriter(effect, reason)
                case ReaderStep.HOLD:
                    unit.holds = True
                    self._modes.set_mode(context.root_connection.connection, Mode.READ_ONLY)
                    return
                case ReaderStep.STAY:
                    unit.only_reads = False
        if context.execution_options.get("stream_results"):
            unit.streaming = unit.watched = True
        if unit.intent.retry is not None:
            unit.intent.retry.has_read_on_reader = True

    def _in_read_only_unit(self, unit: Unit, found: Analysis, effect: Effect) -> None:
        """Look at a statement of a read-only unit that may not be a read. Raises ReadOnlyViolation."""
        forbidden = violation(found, effect, on_writer=unit.place.on_writer)
        if forbidden is not None:
            where = unit.place.instance.id if unit.place.instance is not None else "?"
            raise ReadOnlyViolation(effect.name, where, unguards=forbidden is Violation.UNGUARDS)
        unit.only_reads = False

    def _on_writer(self, unit: Unit, found: Analysis, effect: Effect, parameters: Any, connection: Connection) -> None:
        """Note the effects of a statement on the writer that is not known to be a read."""
        unit.wrote = True
        unit.only_reads = False
        unit.read_at = None  # nothing reports the end of a flush
        if not self.families.asynchronous_commits and _names_synchronous_commit(unit.last_sql or "", parameters):
            self.families.note_asynchronous_commit()
        # A read may leave traces, too, because a view may call any function.
        if unit.intent.retry is not None and (effect is _READ or not found.traceless):
            unit.leaves_traces = True
        raw = connection.connection.dbapi_connection  # also if it is detached from its pool
        if found.may_end_transaction or self.driver.autocommit(raw):  # it may commit unseen by SQLAlchemy
            unit.commit = CommitState.SENT
            if unit.intent.retry is not None:
                unit.intent.retry.can_be_undone = False
            self.causality.on_commit_sent(unit)

    def _look(self, unit: Unit, connection: Connection) -> None:
        """Check a unit before its statement if the unit streams, or if it is read-only and in autocommit.

        Raises MustMoveToWriter.
        """
        if unit.streaming and connection.info[STATE].server != unit.place.server:
            raise MustMoveToWriter(_READ, Reason.NOT_A_READ)  # the unit has moved, and only its stream is here
        if unit.intent.read_only:
            self._modes.restore_read_only(connection.connection)

    def _asks_for_writer(self, unit: Unit, effect: Effect) -> None:
        """Refuse a statement that asks for the writer in a read-only unit on a reader.

        The first statement of a session's unit moves the unit to the writer, in a read-only transaction. A later statement cannot
        move the unit, because the unit has one transaction only.

        Raises MustMoveToWriter for the first statement of a session, else ConfigurationError.
        """
        if unit.intent.owned_by_session and not unit.has_results and not unit.connection_exposed:
            raise MustMoveToWriter(effect, Reason.HINT)
        where = unit.place.instance.id if unit.place.instance is not None else "?"
        what = f'a statement asks for the writer (route="writer"), and its unit is in a read-only transaction on {where}'
        if not unit.intent.owned_by_session:
            raise ConfigurationError(f"{what}. Use router.connect(), which leads to the writer.")
        raise ConfigurationError(f"{what}. Begin the unit with such a statement, or leave read_only out.")

    def set_options(self, connection: Connection, options: Mapping[str, Any], send: Callable[[], None]) -> None:
        """Set execution options of a connection. Refuse options that let a read-only unit write, or that its reader refuses.

        Raises ReadOnlyViolation, NoReaderAvailable, ConfigurationError.
        """
        unit: Unit | None = getattr(connection, UNIT, None)
        if unit is None:
            pending = self.pending_checkout()
            unit = pending.unit if pending is not None else None
        if unit is None or not unit.intent.read_only or unit.place.instance is None:
            send()
            return
        if not options.get("postgresql_readonly", True):
            raise ReadOnlyViolation("postgresql_readonly=False", unit.place.instance.id)
        level = options.get("isolation_level")
        if level is not None and not unit.place.on_writer and self.isolation.beyond_readers(level):
            raise NoReaderAvailable(self._monitor.topology.said(), beyond=True, connected=True)
        alone = level is not None and as_servers_say(level) == AUTOCOMMIT
        if alone and state_of(connection.connection).is_shared:
            why = "behind a transaction pooler nothing would keep a promoted reader from writing"
            raise ConfigurationError(f"AUTOCOMMIT on a read-only connection: {why}. Leave isolation_level out.")
        send()
        if alone:
            self._modes.ensure_default_read_only(connection.connection)
            unit.watched = True

    def _rebind(self, connection: Connection, unit: Unit | None) -> Unit | None:
        """Find the unit of a connection that is not marked with it, and mark the connection.

        The unit is connecting right now, SQLAlchemy has replaced its connection, or the connection was taken from an engine
        directly. Return None for SQLAlchemy's own first look at a server.
        """
        try:
            raw = connection.connection
            state = state_of(raw)
        except NotImplementedError:
            return None
        found: Unit | None = state.unit
        state.unit = None
        pending = self.pending_checkout()
        if unit is None and pending is not None and pending.engine is connection.engine:
            unit, mode = pending.unit, pending.mode
        elif unit is None and found is not None:
            bind_unit(found, connection, raw)  # its mode was set when it was checked out
            return found
        elif unit is None:
            unit, mode = self._nobodys(), Mode.DEFAULT
        else:
            self._refuse_replacement(unit, found, state)
            mode = Mode.READ_ONLY if unit.intent.read_only else Mode.DEFAULT
            unit.commit = _NO_COMMIT  # it is about a COMMIT on the lost connection
            if unit.ends is not None:
                ended_at, unit.ends = unit.ends.noticed_at, None
                self.hand_out(unit, raw, ended_at)
        self._modes.set_mode(raw, mode, unit.isolation)
        if unit.intent.read_only and not unit.intent.owned_by_session:
            self._modes.keep_read_only(raw)
        bind_unit(unit, connection, raw)
        return unit

    def _refuse_replacement(self, unit: Unit, found: Unit | None, state: ConnectionState) -> None:
        """Raise NoWriterAvailable or WrongServer if a unit cannot go on with the connection that has replaced its lost one.

        found: the unit of the checkout that replaced it; None if the connection was checked out for the unit itself.
        """
        if found is not None:
            found.recorded = True
            self.causality.on_end(found)
        instance = unit.place.instance
        if unit.place.on_writer:
            writer = self._monitor.topology.writer
            # A connection that was taken from an engine directly has no instance, and behaves as on any engine.
            if instance is not None and (writer is None or writer.id != instance.id):
                raise self._writer_lost(unit, instance)
        elif state.server != unit.place.server and (unit.marks.contexts or unit.marks.requirement is not None):
            why = "it is another server than before, which may not have all that this connection must see; make a new one"
            raise WrongServer(instance.id if instance is not None else "?", why)

    def hand_out(self, unit: Unit, raw: PoolProxiedConnection, ended_at: float | None = None) -> None:
        """Note that the user gets a unit's connection to the writer.

        The driver's connection counts the transactions that end, even if the user works on that connection directly.

        ended_at: when the last transaction ended on an earlier connection; seconds, monotonic.
        """
        if unit.ends is None:
            unit.ends = TransactionEnds(self.driver.count_ends(raw.dbapi_connection), ended_at)
            self.causality.on_handed_out(unit)

    def _writer_lost(self, unit: Unit, instance: Instance) -> NoWriterAvailable:
        """Make the error of a unit that has lost its connection, and whose instance is no longer the writer."""
        error = NoWriterAvailable(0.0, (f"{instance.id} is no longer the writer",))
        if unit.intent.retry is not None:
            unit.intent.retry.failed = WRITER_IS_GONE
            setattr(error, FACTS, unit.intent.retry.failed)
        return error


def bind_unit(unit: Unit, connection: object, raw: PoolProxiedConnection) -> None:
    """Note a unit on SQLAlchemy's connection and on the pooled one.

    Both have the same unit only if the router gave out the connection and SQLAlchemy has not replaced it since.
    """
    state: ConnectionState = raw.info[STATE]
    state.unit = unit
    place = unit.place
    unit.place = Place(place.instance, place.on_writer, place.epoch, state.server)
    unit.recorded = False
    if unit.marks.scopes:
        for scope in unit.marks.scopes:
            # Units that begin from now on must see what this unit does, although it has not ended.
            scope.units.add(unit)
    if raw is not connection:
        setattr(connection, UNIT, unit)


class _WatchedConnection(RoutedConnection):
    """A Connection that notices if its user takes the driver's connection out.

    SQLAlchemy takes it out, too, but leaves the settings as they were. The name of the calling module tells the two apart.
    """

    @property
    def connection(self) -> PoolProxiedConnection:
        raw = super().connection
        if not sys._getframe(1).f_globals.get("__name__", "").startswith(("sqlalchemy.", "aurora_router.")):
            state_of(raw).distrust()
        return raw


def watch(connection: Connection, driver: Driver) -> None:
    """Notice from now on if the user of a connection takes the driver's connection out.

    This is not needed if the server reports by itself whether the read-only default is on.
    """
    if type(connection) is not RoutedConnection or connection.invalidated:
        return
    if not driver.is_default_read_only(connection.connection.dbapi_connection, True):
        connection.__class__ = _WatchedConnection


def _names_synchronous_commit(text: str, parameters: Any) -> bool:
    """Whether a statement may switch to commits that the server acknowledges before it writes the log."""
    lower = text.lower()
    if "synchronous_commit" in lower:
        return True
    if "set_config" not in lower:
        return False
    values = parameters.values() if isinstance(parameters, Mapping) else parameters
    return "synchronous_commit" in {str(value).lower() for value in values or ()}
