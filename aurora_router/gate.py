"""The gate between SQLAlchemy and the driver: every statement, COMMIT and error of a router's connections passes here.

It judges the text that is really sent, and notes in the unit what the text does. On each error it notes what the error means.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from typing import Any

from sqlalchemy.engine import Connection, Engine, ExceptionContext
from sqlalchemy.exc import DisconnectionError
from sqlalchemy.pool import PoolProxiedConnection

from aurora_router.blame import breaks_everywhere, loses_everywhere
from aurora_router.causality import Causality
from aurora_router.commits import Ask, find_out, prepare
from aurora_router.config import check_route, get_isolation
from aurora_router.connection_state import STATE, UNIT, ConnectionState, state_of
from aurora_router.core import events
from aurora_router.core.failures import (
    WRITER_IS_GONE,
    Action,
    Failure,
    Phase,
    Question,
    decide,
    facts,
    inquiry,
    traits,
)
from aurora_router.core.instance import Role
from aurora_router.core.selection import Reason, reason_to_write
from aurora_router.core.statements import Effect, Recall, Verdict, in_mode, verdict
from aurora_router.drivers import Driver, Mode
from aurora_router.engines import Engines
from aurora_router.error_classification import FACTS, classify_error, failure_of
from aurora_router.errors import (
    ConfigurationError,
    NoReaderAvailable,
    NoWriterAvailable,
    Outcome,
    OutcomeUnknown,
    ReadOnlyViolation,
    RouterError,
    WrongServer,
)
from aurora_router.families import Families
from aurora_router.instance_pool import RoutedConnection
from aurora_router.listeners import EventDispatcher
from aurora_router.monitor import Monitor
from aurora_router.pooling import PoolFull
from aurora_router.servers import ServerFamily
from aurora_router.settings import Settings
from aurora_router.unit import NotARead, Unit
from aurora_router.waiting import Local, Waiting

LEAST_PATIENCE = 1.0  # seconds to look up a COMMIT, even after the deadline
WRITES = 1000  # texts of text() that are known to write
READS = 1000  # statements that are known to read
LONGEST_WRITE = 10_000  # characters of one text that is known to write
LEARNED = 1000  # statements remembered because a reader refused them
LEARNED_LENGTH = 4 * 2**20  # characters of all of them
# Seconds. It is limited because somebody may replace a function or a view, or install an extension.
LEARNED_FOR = 600.0

_LEVELS_ON_READERS = frozenset({"autocommit", "read uncommitted", "read committed"})
_READ = Effect.READ  # an enum's members are slow to look up on the request path


class Attempt:
    """The unit that a thread is connecting, its future mode, and the engine that it connects with."""

    __slots__ = ("__weakref__", "engine", "mode", "unit")

    def __init__(self, unit: Unit, mode: Mode, engine: Engine) -> None:
        self.unit = unit
        self.mode = mode
        self.engine = engine


class Gate:
    """The gate of one router: what it knows of statements and commits.

    causality: what the router's units must see.
    dispatcher: tells the events.
    waiting: how units wait.
    """

    monitor: Monitor
    engines: Engines

    def __init__(
        self,
        settings: Settings,
        causality: Causality,
        dispatcher: EventDispatcher,
        waiting: Waiting,
    ) -> None:
        self.driver = settings.target.driver
        self.families = Families(self.driver.PROTOCOL)
        self.causality = causality
        # The attempt that is under way in this thread. A listener of the application may make another unit enter meanwhile. The
        # reference is weak, because an exception of a signal handler may end an attempt at any moment.
        self.connecting: Local[weakref.ref[Attempt]] = waiting.local()
        self._sleep = waiting.sleep
        self.asynchronous_commits = False  # whether some session commits without waiting for the log
        self._isolation = get_isolation(settings.options)
        self._failover_timeout = settings.failover_timeout
        self._dispatcher = dispatcher
        self.dialect = settings.target.dialect  # until a server has shown which one it has
        self._is_global = causality.is_global
        self._allowed = frozenset(settings.read_only_functions)
        self._catalog: frozenset[str] = frozenset()
        self._harmless = self._allowed
        # The session has found these: texts of text() that certainly write, and keys of statements that only read.
        self.writes: set[str] = set()
        self.reads: set[object] = set()
        # Texts that looked like reads, and when a reader refused them, oldest first.
        self.learned: dict[str, float] = {}
        self._lock = threading.Lock()

    def attempt(self) -> Attempt | None:
        """Return the attempt that is under way in this thread; None without one."""
        known = self.connecting.value
        return known() if known is not None else None

    def before_waiting(self) -> None:
        """Make a unit look for another reader with room before it waits for the full pool of its reader.

        Raises PoolFull.
        """
        attempt = self.attempt()
        if attempt is not None:
            unit = attempt.unit
            if not unit.on_writer and not unit.queues:
                raise PoolFull

    def checked_out(self, raw: PoolProxiedConnection) -> None:
        """Note that a connection has left its pool.

        If no unit is entering, somebody has taken the connection from an engine directly. Its commits count all the same.

        Raises DisconnectionError for a connection that has died in the pool, as pre-ping does.
        """
        if self.attempt() is None:
            if not self.engines.modes.is_alive(raw):
                raise DisconnectionError("the connection was closed while it was idle")
            unit = self._nobodys()
            self.causality.begin(unit)
            self.engines.modes.set_mode(raw, Mode.DEFAULT)
            self.hand_out(unit, raw)
            state_of(raw).distrust()
            own(unit, raw, raw)

    def _nobodys(self) -> Unit:
        """Make a unit for a connection that was taken from an engine directly. It behaves as on any engine."""
        unit = Unit(False)
        unit.on_writer = unit.wrote = True
        unit.epoch = self.monitor.topology.epoch
        return unit

    # -- statements -----------------------------------------------------------------------------------------------

    def statement(self, _cursor: Any, text: str, *rest: Any) -> None:
        """Look at a statement before it is sent. Nothing passes to a reader, or in a read-only unit, without this."""
        context = rest[-1]
        connection: Connection = context.root_connection
        known: Unit | None = getattr(connection, UNIT, None)
        unit = known if known is not None and _unit_of(connection) is known else self._adopt(connection, known)
        if unit is None:
            return
        if unit.watched:
            self._look(unit, connection)
        unit.shown = unit.text is not None
        unit.text = text
        unit.committing = False
        read_only, on_writer = unit.read_only, unit.on_writer
        found = verdict(text, self.dialect)
        effect = self.effect(found) if found.functions else found.effect
        if effect is not _READ and found.in_doubt and (read_only or not on_writer or found.ends):
            found = self._in_mode(text, connection.connection, unit)
            effect = self.effect(found)
        if read_only is None and not on_writer:
            hint = unit.hint
            if hint is None:
                # This is an option of the connection, or of a statement that replaced the session's.
                hint = context.execution_options.get("route")
                if hint is not None:
                    check_route(hint)
            reason = reason_to_write(found, effect, hint, text in self.learned and self.has_learned(text))
            if reason is None and (unit.scopes or self._is_global) and self.causality.overtaken(unit):
                reason = Reason.OWN_WRITES
            if reason is not None:
                if reason is Reason.NOT_A_READ and self._only_sets(unit, found, effect):
                    unit.holds = True
                    self.engines.modes.set_mode(connection.connection, Mode.READ_ONLY)
                    return
                if reason is not Reason.NOT_A_READ or not _recalls_reads(unit, found, effect, unit.shown):
                    raise NotARead(effect, reason)
                unit.only_reads = False  # no other connection has the same history
            if context.execution_options.get("stream_results"):
                unit.streaming = unit.watched = True
            if unit.run is not None:
                unit.run.has_read_on_reader = True
            return
        if read_only and not on_writer and "writer" in (unit.hint, found.hint, context.execution_options.get("route")):
            self._asks_for_writer(unit, effect)
        if effect is _READ and (read_only or text not in self.learned or not self.has_learned(text)):
            return
        if read_only:
            # On the writer only this gate stands between an unknown function and the data.
            writes = found.effect is Effect.WRITE and (found.known is Effect.WRITE or (on_writer and effect is Effect.WRITE))
            if writes or found.locks:
                raise ReadOnlyViolation(effect.name, unit.instance.id if unit.instance is not None else "?")
            if found.unguards:
                raise ReadOnlyViolation(effect.name, unit.instance.id if unit.instance is not None else "?", unguards=True)
            unit.only_reads = False
        else:
            unit.wrote = True
            unit.only_reads = False
            unit.read_at = None  # nothing reports the end of a flush
            if not self.asynchronous_commits and _names_synchronous_commit(text, rest[0]):
                self.asynchronous_commits = True
            # A read may leave traces, too, because a view may call any function.
            if unit.run is not None and (effect is _READ or not found.traceless):
                unit.leaves_traces = True
            driver: Any = connection.connection.dbapi_connection  # also if it is detached from its pool
            if found.ends or driver.autocommit:  # it may commit unseen by SQLAlchemy
                unit.committing = True
                if unit.run is not None:
                    unit.run.is_undoable = False
                self.causality.commit_begins(unit)

    def _look(self, unit: Unit, connection: Connection) -> None:
        """Check what must hold before a statement of a unit that streams, or that is read-only and in autocommit.

        Raises NotARead.
        """
        if unit.streaming and connection.info[STATE].server != unit.server:
            raise NotARead(_READ, Reason.NOT_A_READ)  # the unit has moved, and only its stream is here
        if unit.read_only:
            self.engines.modes.guard_again(connection.connection)

    def _in_mode(self, text: str, raw: PoolProxiedConnection, unit: Unit) -> Verdict:
        """The verdict on a text that is in doubt, as the text's connection reads it.

        The router sends nothing between two statements of the unit. The second one may ask what the first one has left
        (FOUND_ROWS(), SHOW WARNINGS). So a text that is still in doubt then counts as the strongest of its possible effects. In a
        read-only unit that would be an error, so the router asks the server all the same.
        """
        found = verdict(text, in_mode(self.dialect, self.engines.modes.literal_mode(raw, ask=False)))
        if found.in_doubt and (unit.read_only or not unit.shown):
            found = verdict(text, in_mode(self.dialect, self.engines.modes.literal_mode(raw, ask=True)))
        return found

    def _asks_for_writer(self, unit: Unit, effect: Effect) -> None:
        """Refuse a statement that asks for the writer in a read-only unit on a reader.

        The first statement of a session then runs on the writer, in a read-only transaction. Later statements cannot, because the
        unit has one transaction only.

        Raises NotARead for the first statement of a session, else ConfigurationError.
        """
        if unit.of_session and not unit.shown and not unit.handed_out:
            raise NotARead(effect, Reason.HINT)
        where = unit.instance.id if unit.instance is not None else "?"
        what = f'a statement asks for the writer (route="writer"), and its unit is in a read-only transaction on {where}'
        if not unit.of_session:
            raise ConfigurationError(f"{what}. Use router.connect(), which leads to the writer.")
        raise ConfigurationError(f"{what}. Begin the unit with such a statement, or leave read_only out.")

    def _only_sets(self, unit: Unit, found: Verdict, effect: Effect) -> bool:
        """Whether a listener of the application sets something on a reader's connection for the unit that is entering.

        The setting holds for the unit, in a transaction, as on any engine. SET LOCAL does not count, because it is part of its
        unit's transaction, and that runs on the writer.
        """
        attempt = self.attempt()
        is_setting = effect in (Effect.SERVER, Effect.SESSION) and not found.unguards
        return is_setting and attempt is not None and attempt.unit is unit

    def reason_to_write(self, text: str, unit: Unit, thorough: bool) -> Reason | None:
        """Why an automatic unit must move to the writer for this text; None if a reader may serve it.

        thorough: whether a text in doubt counts as the strongest of its possible effects, because no reader has room to tell.
        """
        found = verdict(text, self.dialect)
        effect = self.effect(found) if found.functions else found.effect
        if effect is not _READ and not thorough:
            past = unit.instance is not None and unit.text is not None
            if found.in_doubt or _recalls_reads(unit, found, effect, past):
                return None  # the reader's connection decides
        return reason_to_write(found, effect, unit.hint, text in self.learned and self.has_learned(text))

    def note_write(self, text: str, sent: str) -> None:
        """Remember the text of a text() that certainly writes. It need not be compiled any more to be judged.

        sent: the text that SQLAlchemy sends for it.
        """
        found = verdict(sent, self.dialect)
        if found.known is Effect.WRITE and not found.in_doubt and len(text) <= LONGEST_WRITE:
            if len(self.writes) >= WRITES:
                self.writes.clear()
            self.writes.add(text)

    def note_read(self, key: object, sent: str) -> None:
        """Remember the key of a statement that only reads. A reader can be chosen for it without looking up its text.

        The gate still judges the text when it is sent.

        sent: the text that SQLAlchemy sends for it.
        """
        found = verdict(sent, self.dialect)
        if found.effect is _READ and found.hint is None:
            if len(self.reads) >= READS:
                self.reads.clear()
            self.reads.add(key)

    def set_options(self, connection: Connection, options: Mapping[str, Any], send: Callable[[], None]) -> None:
        """Set execution options of a connection, except options that let a read-only unit write, or that its reader refuses.

        Raises ReadOnlyViolation, NoReaderAvailable, ConfigurationError.
        """
        unit: Unit | None = getattr(connection, UNIT, None)
        if unit is None:
            attempt = self.attempt()
            unit = attempt.unit if attempt is not None else None
        if unit is None or not unit.read_only or unit.instance is None:
            send()
            return
        if not options.get("postgresql_readonly", True):
            raise ReadOnlyViolation("postgresql_readonly=False", unit.instance.id)
        level = options.get("isolation_level")
        if level is not None and not unit.on_writer and self.beyond_readers(level):
            raise NoReaderAvailable(self.monitor.topology.said(), beyond=True, connected=True)
        alone = level is not None and _as_servers_say(level) == "autocommit"
        if alone and state_of(connection.connection).is_shared:
            why = "behind a transaction pooler nothing would keep a promoted reader from writing"
            raise ConfigurationError(f"AUTOCOMMIT on a read-only connection: {why}. Leave isolation_level out.")
        send()
        if alone:
            self.engines.modes.keep_guarded(connection.connection)
            unit.watched = True

    def effect(self, found: Verdict) -> Effect:
        """The effect of a statement. It depends on what the user and the catalog say of the statement's functions."""
        if not found.functions:
            return found.effect
        catalog = self.monitor.functions
        if catalog is not self._catalog:
            self._catalog = catalog
            self._harmless = self._allowed | catalog
        effect = found.effect_given(self._harmless)
        if effect is not found.known:
            self.monitor.request_catalog()
        return effect

    def learn(self, text: str | None) -> None:
        """Remember for some minutes that a reader has refused this text, which looked like a read. It goes to the writer."""
        if text is not None:
            with self._lock:
                self.learned.pop(text, None)
                self.learned[text] = time.monotonic()
                while len(self.learned) > LEARNED or sum(map(len, self.learned)) > LEARNED_LENGTH:
                    del self.learned[next(iter(self.learned))]

    def forget(self, text: str) -> None:
        """Forget that a reader has refused this text, because the writer has refused it, too."""
        with self._lock:
            self.learned.pop(text, None)

    def has_learned(self, text: str) -> bool:
        """Whether a reader has refused this text in the last minutes."""
        refused_at = self.learned.get(text)
        return refused_at is not None and time.monotonic() - refused_at < LEARNED_FOR

    def _adopt(self, connection: Connection, unit: Unit | None) -> Unit | None:
        """Find the unit of a connection that is not marked with it, and mark the connection.

        The unit is entering right now, or SQLAlchemy has replaced its connection. Or the connection was taken from an engine
        directly. None for SQLAlchemy's own first look at a server.
        """
        try:
            raw = connection.connection
            state = state_of(raw)
        except NotImplementedError:
            return None
        found: Unit | None = state.unit
        state.unit = None
        attempt = self.attempt()
        if unit is None and attempt is not None and attempt.engine is connection.engine:
            unit, mode = attempt.unit, attempt.mode
        elif unit is None and found is not None:
            own(found, connection, raw)  # its mode was set when it was checked out
            return found
        elif unit is None:
            unit, mode = self._nobodys(), Mode.DEFAULT
        else:
            if found is not None:  # from the checkout that replaced a lost connection
                found.noted = True
                self.causality.ended(found)
            writer = self.monitor.topology.writer
            is_writer = writer is not None and unit.instance is not None and writer.id == unit.instance.id
            if unit.on_writer and not is_writer:
                raise self._gone(unit)
            if not unit.on_writer and state.server != unit.server and (unit.pasts or unit.requirement is not None):
                where = unit.instance.id if unit.instance is not None else "?"
                why = "it is another server than before, which may not have all that this connection must see; make a new one"
                raise WrongServer(where, why)
            mode = Mode.READ_ONLY if unit.read_only else Mode.DEFAULT
            unit.outcome = unit.unknown = None  # they are about a COMMIT on the lost connection
            if unit.ends is not None:
                unit.ends = None
                self.hand_out(unit, raw)
        self.engines.modes.set_mode(raw, mode, unit.isolation)
        if unit.read_only and not unit.of_session:
            self.engines.modes.keep_read_only(raw)
        own(unit, connection, raw)
        return unit

    def hand_out(self, unit: Unit, raw: PoolProxiedConnection) -> None:
        """Note that the user gets a unit's connection to the writer.

        The driver's connection counts the transactions that end, even if the user takes it out.
        """
        if unit.ends is None:
            unit.ends = self.driver.count_ends(raw.dbapi_connection)
            unit.ends_known = unit.ends()
            self.causality.in_hands(unit)

    def _gone(self, unit: Unit) -> NoWriterAvailable:
        """Make the error of a unit that has lost its connection, and whose instance is the writer no longer."""
        error = NoWriterAvailable(0.0, (f"{unit.instance.id if unit.instance else '?'} is the writer no longer",))
        if unit.run is not None:
            unit.run.failed = WRITER_IS_GONE
            setattr(error, FACTS, unit.run.failed)
        return error

    def forked(self) -> None:
        """Make a new lock in a forked child, in which no thread holds the old one."""
        self._lock = threading.Lock()
        self.causality.forked()

    # -- errors ---------------------------------------------------------------------------------------------------

    def failed(self, context: ExceptionContext) -> RouterError | None:
        """Note on an error of the driver what it means, and return the error to raise instead, if any.

        There is one if the outcome of a COMMIT is unknown. There also is one if a read-only unit tried a write that its text did
        not show.
        """
        connection = context.connection
        unit: Unit | None = getattr(connection, UNIT, None)
        if unit is None or not isinstance(context.original_exception, self.engines.driver_error):
            return None
        failure = failure_of(context.original_exception, self._family(unit), disconnected=context.is_disconnect)
        means = traits(failure)
        if means.suspicious and unit.instance is not None:
            self.monitor.suspect(unit.instance.id)
        if means.disconnects:
            context.is_disconnect = True  # SQLAlchemy does not always notice
        if means.is_outdated and unit.instance is not None:
            self.engines.forget_prepared(unit.instance.id)
        if connection is not None and not (context.is_disconnect or connection.invalidated):
            driver: Any = connection.connection.dbapi_connection
            # In autocommit there will be no rollback, at which a driver forgets its prepared statements.
            if self.driver.autocommit(driver):
                with contextlib.suppress(self.engines.driver_error):
                    self.driver.forget_prepared(driver)
        phase = self.phase(unit)
        asked = inquiry(failure, phase)
        is_final = False
        if asked is not None and self._confirms(asked.question, failure, unit, context):
            failure, is_final = asked.becomes or failure, asked.is_final
        means = traits(failure)
        if means.spares_pool:
            context.invalidate_pool_on_disconnect = False
        meaning = facts(failure, phase, is_final=is_final, not_committed=unit.outcome is Outcome.NOT_COMMITTED)
        instead: RouterError | None = unit.unknown
        if means.refuses_writes and unit.read_only and unit.instance is not None:
            instead = ReadOnlyViolation(Effect.WRITE.name, unit.instance.id, sent=True)
            meaning = classify_error(instead)
        if unit.run is not None:
            unit.run.failed = meaning
        setattr(instead or context.sqlalchemy_exception, FACTS, meaning)
        return instead

    def _confirms(self, question: Question, failure: Failure, unit: Unit, context: ExceptionContext) -> bool:
        """Find out whether the answer to a question about a failure is "yes"."""
        match question:
            case Question.IS_SILENT:
                return self._says(unit) is None
            case Question.IS_WRITER:
                # Ask the server even outside of run_transaction, so that the next unit knows if it is deposed.
                is_writer = unit.on_writer and not unit.read_only and self._says(unit) is Role.WRITER
                if unit.run is not None:
                    unit.run.refusals += is_writer
                return is_writer
            case Question.BREAKS_EVERYWHERE:
                return breaks_everywhere(unit, failure)
            case Question.LOSES_EVERYWHERE:
                return self._loses_everywhere(failure, unit, context)
            case Question.WAS_MISLED:
                return unit.run is not None and unit.run.is_misled()

    def _loses_everywhere(self, failure: Failure, unit: Unit, context: ExceptionContext) -> bool:
        """Whether the statement would lose the next connection, too. If so, say why in the error."""
        if context.connection is None:
            return False
        if self.driver.is_bystander(context.connection.connection.dbapi_connection):
            return False  # another connection's statement has made the server end this one
        code, server = self.driver.code(context.original_exception), self._family(unit)
        why = loses_everywhere(unit, failure, code, server, self.monitor, self._failover_timeout)
        if why is not None and context.sqlalchemy_exception is not None:
            context.sqlalchemy_exception.add_detail(f"{why}; {server.ENDED}")
        return why is not None

    def _says(self, unit: Unit) -> Role | None:
        """Ask the server of a unit for its role now. None if the server is lost."""
        if unit.instance is None or unit.server is None:
            return None
        return self.monitor.confirm_role(unit.instance.id, unit.server)

    def phase(self, unit: Unit) -> Phase:
        """How far the unit was when a statement or a COMMIT of it failed."""
        if unit.committing:
            return Phase.COMMIT
        if unit.only_reads and unit.on_writer and unit.read_only is False:
            # The unit was declared to write, and a statement that looks like a read may write, too. Then the error has cost the
            # whole transaction, not this read alone.
            if self._is_autocommit(unit):
                return Phase.COMMIT
            if not unit.shown:
                return Phase.READ
        elif unit.only_reads and (
            (unit.read_only is None and not unit.on_writer) or not (unit.shown and self._has_snapshot(unit))
        ):
            return Phase.READ
        if not unit.on_writer:
            return Phase.READER_TRANSACTION
        return Phase.WRITER_STATEMENT if unit.shown or unit.handed_out else Phase.WRITER_FIRST

    def _is_autocommit(self, unit: Unit) -> bool:
        """Whether each statement of a unit on the writer commits by itself."""
        level = unit.isolation or self._isolation
        return level is not None and _as_servers_say(level) == "autocommit"

    def above_read_committed(self, level: str | None) -> bool:
        """Whether a unit at this isolation level must be on the writer.

        The family's own default does not count, because nobody has asked for it.

        level: None stands for the engine's or the server's default.
        """
        asked = level or self._isolation
        if asked is None:
            level = self._servers_level()
            return level not in _LEVELS_ON_READERS and level != self.families.leading.DEFAULT_ISOLATION
        return _as_servers_say(asked) not in _LEVELS_ON_READERS

    def beyond_readers(self, level: str | None) -> bool:
        """Whether a reader refuses statements at this isolation level.

        level: None stands for the engine's or the server's default.
        """
        refused = self.families.leading.BEYOND_READERS
        if not refused:
            return False
        asked = level or self._isolation
        return (self._servers_level() if asked is None else _as_servers_say(asked)) in refused

    def _servers_level(self) -> str:
        """The level that the servers use if nobody asks for one."""
        return self.monitor.topology.isolation or self.families.leading.DEFAULT_ISOLATION

    def _has_snapshot(self, unit: Unit) -> bool:
        """Whether the statements of a unit's transaction must see one snapshot.

        An automatic unit has not asked for a snapshot if only the family's own default gives one.
        """
        level = unit.isolation or self._isolation
        if level is None and unit.read_only is not None:
            level = self._servers_level()
        return self.above_read_committed(level)

    # -- commits --------------------------------------------------------------------------------------------------

    def commit(self, raw: PoolProxiedConnection, send: Callable[[Any], None]) -> None:
        """Send a COMMIT. If its answer is lost, look up the outcome, if the unit has a commit check.

        If the transaction has committed, go on as if the answer had come.
        """
        state = state_of(raw)
        unit = state.unit
        # A stream that began on the reader keeps its connection when the unit moves. There is nothing to commit on it.
        if unit is None or not (unit.wrote or unit.may_write) or unit.instance is None or state.server != unit.server:
            if unit is not None and unit.of_session and self.driver.blocks(raw.dbapi_connection):
                raw.invalidate()  # otherwise the driver would read the stream to its end
            else:
                self._commit_reads(unit, raw, send)
            return
        if unit.ends is not None:
            self._note_unseen_ends(unit)
        self.causality.commit_begins(unit)
        ask = self._prepare(unit, raw) if unit.check is not None or unit.run is not None else None
        unit.committing = True
        try:
            send(raw)
        except self.engines.driver_error as error:
            self.rolled_back(raw)  # a refused COMMIT is a rollback
            if decide(self._commit_failure(error, raw), Phase.COMMIT) is not Action.RESOLVE:
                raise
            if not self._found_committed(unit, unit.instance.id, ask):
                raise
            raw.invalidate(error)
        unit.committing = False
        self._committed(unit)

    def _commit_reads(self, unit: Unit | None, raw: PoolProxiedConnection, send: Callable[[Any], None]) -> None:
        """Send a COMMIT of a transaction that cannot have written. If its connection is lost, nothing is lost with it."""
        try:
            send(raw)
        except self.engines.driver_error as error:
            if unit is None or unit.instance is None or not traits(self._commit_failure(error, raw)).suspicious:
                raise
            self.monitor.suspect(unit.instance.id)
            raw.invalidate(error)

    def _prepare(self, unit: Unit, raw: PoolProxiedConnection) -> Ask | None:
        """Note something by which the outcome of the coming COMMIT can be looked up. Roll back if that fails."""
        server = self.families.leading
        if unit.check == "table" or (unit.check == "xid" and not server.XIDS):
            self.monitor.prunes = True
        try:
            return prepare(raw.dbapi_connection, unit, self.driver, server, self.monitor.topology)
        except Exception:
            with contextlib.suppress(self.engines.driver_error):
                # SQLAlchemy assumes that a failed COMMIT has ended the transaction.
                raw.rollback()
            self.rolled_back(raw)
            raise

    def ends(self, raw: PoolProxiedConnection) -> bool:
        """Whether a rollback ends the unit of a connection. It ends a session's unit. Others may go on with their connection."""
        unit = _unit_of(raw)
        return unit is not None and unit.of_session

    def rolled_back(self, raw: PoolProxiedConnection) -> None:
        """Note whether a rollback, or a COMMIT that became one, has left writes in place. They must not be written again."""
        if self.driver.was_not_undone(raw.dbapi_connection):
            unit = _unit_of(raw)
            if unit is not None and unit.run is not None:
                unit.run.is_undoable = False

    def _note_unseen_ends(self, unit: Unit) -> None:
        """Note that a run cannot be undone if the driver's own connection has committed something in it."""
        if unit.run is not None and unit.unseen_end() is not None:
            unit.run.is_undoable = False

    def commit_in_two_phases(self, connection: Connection, send: Callable[[], None]) -> None:
        """Send PREPARE TRANSACTION or COMMIT PREPARED.

        There is no commit check for them, because somebody else decides about a prepared transaction, maybe much later.
        """
        state_of(connection.connection)  # raises for one that was open at a fork
        unit: Unit | None = getattr(connection, UNIT, None)
        if unit is None or unit.instance is None:
            send()
            return
        self.causality.commit_begins(unit)
        unit.committing = True
        try:
            send()
        except self.engines.driver_error as error:
            if decide(self._commit_failure(error, connection.connection), Phase.COMMIT) is Action.RESOLVE:
                noted = f"in two phases; what is prepared is in {self.families.at(unit.instance.id).PREPARED}"
                unit.unknown = OutcomeUnknown(unit.instance.id, noted)
            raise
        self._committed(unit)

    def _committed(self, unit: Unit) -> None:
        """Note a commit at once.

        Whatever comes next must see it: a listener of after_commit, or a unit that begins while the connection is still open.
        """
        unit.committed = True
        self.causality.committed(unit)
        unit.noted = unit.of_session and not unit.handed_out
        if unit.run is not None:
            unit.run.is_undoable = False

    def _family(self, unit: Unit) -> ServerFamily:
        """The family of the server of a unit."""
        return self.families.at(unit.instance.id) if unit.instance is not None else self.families.leading

    def _commit_failure(self, error: Any, raw: PoolProxiedConnection) -> Failure:
        driver: Any = raw.dbapi_connection
        return failure_of(error, self.families.leading, disconnected=self.driver.is_closed(driver))

    def _found_committed(self, unit: Unit, instance_id: str, ask: Ask | None) -> bool:
        """Whether the transaction of an unanswered COMMIT has committed. If not, note in the unit what is known."""
        self.monitor.suspect(instance_id)
        if ask is None:
            unit.unknown = OutcomeUnknown(instance_id, "no commit_check was asked for, so nothing was noted that could tell")
            return False

        def resolve(timeout: float) -> Outcome:
            began = time.monotonic()
            found = find_out(self._asking_connection, ask, timeout, self._sleep)
            if self._dispatcher.listeners:
                self._dispatcher.publish(
                    events.CommitResolved(instance_id, found.value, time.monotonic() - began, unit=unit.number)
                )
            if found is Outcome.COMMITTED:
                self.causality.committed(unit)  # maybe long after its session believed it to be over
            return found

        if unit.run is not None:
            left = self._failover_timeout if unit.run.deadline is None else unit.run.deadline - time.monotonic()
            unit.outcome = resolve(max(left, LEAST_PATIENCE))
            if unit.outcome is not Outcome.UNKNOWN:
                return unit.outcome is Outcome.COMMITTED
        unit.unknown = OutcomeUnknown(instance_id, str(ask), resolve)
        return False

    def _asking_connection(self, timeout: float) -> Connection:
        """Connect to the newest writer, outside of its pool. Threads whose COMMIT is in doubt still hold places in the pool.

        timeout: seconds to wait for a writer.
        """
        topology = self.monitor.wait_for(lambda t: t.writer is not None, timeout)
        if topology.writer is None:
            raise NoWriterAvailable(timeout, topology.said())
        return self.engines.unpooled(topology.writer)

    def returned(self, unit: Unit, instance: str) -> bool:
        """Note that a unit's connection is back in its pool. All commits on it have been acknowledged by now.

        Return whether no other unit may get the connection.
        """
        if unit.borrowed is not None:
            unit.give_back()
        if unit.ends is not None and not unit.committing:
            self._note_unseen_ends(unit)
        self.causality.ended(unit)
        if unit.checked_out is not None:
            self._tell_return(unit, unit.checked_out, instance)
        return unit.leaves_traces and unit.spoils_connection

    def _tell_return(self, unit: Unit, checked_out: dict[str, float], instance: str) -> None:
        since = checked_out.pop(instance, None)
        if since is not None and self._dispatcher.listeners:
            self._dispatcher.publish(events.ConnectionCheckedIn(instance, time.monotonic() - since, unit=unit.number))


def own(unit: Unit, connection: object, raw: PoolProxiedConnection) -> None:
    """Note a unit on SQLAlchemy's connection and on the pooled one.

    Both have the same unit only if the router gave out the connection and SQLAlchemy has not replaced it since.
    """
    state: ConnectionState = raw.info[STATE]
    state.unit = unit
    unit.server = state.server
    unit.noted = False
    if unit.scopes:
        for scope in unit.scopes:
            # Units that begin from now on must see what it does, although it has not ended.
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

    This is not needed if the server reports by itself whether the guard is on.
    """
    if type(connection) is not RoutedConnection or connection.invalidated:
        return
    if not driver.is_guarded(connection.connection.dbapi_connection, True):
        connection.__class__ = _WatchedConnection


def _as_servers_say(level: str) -> str:
    return level.replace("_", " ").lower()


def _recalls_reads(unit: Unit, found: Verdict, effect: Effect, past: bool) -> bool:
    """Whether a statement asks for what the unit's reads have left on its reader, because no other connection knows.

    A user's variable counts if such a statement came before, because only GET DIAGNOSTICS sets one on a reader.

    past: whether there were reads.
    """
    if found.recalls is None or effect is not Effect.CONNECTION or not past:
        return False
    return found.recalls is Recall.STATEMENT or not unit.only_reads


def _unit_of(connection: Connection | PoolProxiedConnection) -> Unit | None:
    """The unit for which a pooled connection was checked out."""
    state: ConnectionState | None = connection.info.get(STATE)
    return state.unit if state is not None else None


def _names_synchronous_commit(text: str, parameters: Any) -> bool:
    """Whether a statement may switch to commits that the server acknowledges before it writes the log."""
    lower = text.lower()
    if "synchronous_commit" in lower:
        return True
    if "set_config" not in lower:
        return False
    values = parameters.values() if isinstance(parameters, Mapping) else parameters
    return "synchronous_commit" in {str(value).lower() for value in values or ()}
