"""The gate between SQLAlchemy and the driver: every statement, COMMIT and error of a router's connections passes here.

It judges the text that is really sent, notes in the unit what it does, and says of each error what it means.
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
from aurora_router.core import events
from aurora_router.core.failures import SUSPICIOUS, Action, Facts, Failure, Phase, decide, facts
from aurora_router.core.selection import Reason, reason_to_write
from aurora_router.core.statements import Effect, Recall, Verdict, in_mode, verdict
from aurora_router.core.topology import Role
from aurora_router.diagnosis import FACTS, classify_error, driver_failure
from aurora_router.engines import Engines, RoutedConnection
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
from aurora_router.monitor import Monitor
from aurora_router.pooling import SERVER, SHARED, UNIT, PoolFull, distrust
from aurora_router.servers import Family, Mode
from aurora_router.settings import Settings
from aurora_router.unit import NotARead, Unit

LEAST_PATIENCE = 1.0  # seconds to ask for the fate of a COMMIT, also where the deadline has passed
WRITES = 1000  # texts of text() that are known to write
READS = 1000  # statements that are known to read
LONGEST_WRITE = 10_000  # characters of one
LEARNED = 1000  # statements remembered because a reader refused them
LEARNED_LENGTH = 4 * 2**20  # characters of all of them
LEARNED_FOR = 600.0  # seconds: a function or a view may be replaced, an extension installed

_LEVELS_ON_READERS = frozenset({"autocommit", "read uncommitted", "read committed"})
_STATEMENTS = frozenset({Phase.READ, Phase.READER_TRANSACTION, Phase.WRITER_FIRST, Phase.WRITER_STATEMENT})
_READ = Effect.READ  # an enum's members are slow to look up on the request path


class Attempt:
    """The unit that a thread is connecting, the mode that it is to have, and the engine where."""

    __slots__ = ("__weakref__", "engine", "mode", "unit")

    def __init__(self, unit: Unit, mode: Mode, engine: Engine) -> None:
        self.unit = unit
        self.mode = mode
        self.engine = engine


class _Entering(threading.local):
    """The attempt that is under way in this thread.

    A listener of the application may have another unit enter meanwhile. An attempt that an exception out of a signal handler has
    ended, before it could say so, is forgotten with its frame.
    """

    known: weakref.ref[Attempt] | None = None

    @property
    def attempt(self) -> Attempt | None:
        """It, or None."""
        known = self.known
        return known() if known is not None else None


class Gate:
    """What is known of the statements and the commits of one router.

    causality: what its units must see.
    emit: called with an event's class and its values.
    """

    monitor: Monitor
    engines: Engines

    def __init__(
        self,
        settings: Settings,
        causality: Causality,
        emit: Callable[..., None],
    ) -> None:
        self.server = server = settings.target.server
        self.causality = causality
        self.entering = _Entering()
        self.asynchronous_commits = False  # some session is known to commit without waiting for the log
        self._isolation = get_isolation(settings.options)
        self._failover_timeout = settings.failover_timeout
        self._emit = emit
        self.dialect = settings.target.dialect  # until a server has said which it is
        self._by_table = ("table",) if server.XIDS else ("table", "xid")
        self._usual = frozenset({*_LEVELS_ON_READERS, server.DEFAULT_ISOLATION})
        self._is_global = causality.is_global
        self._allowed = frozenset(settings.read_only_functions)
        self._catalog: frozenset[str] = frozenset()
        self._harmless = self._allowed
        self.writes: set[str] = set()  # texts of text() that write, whatever else is known, as session.py has found out
        self.reads: set[object] = set()  # keys of statements that only read, as session.py has found out
        self.learned: dict[str, float] = {}  # texts that looked like reads, and when a reader refused them, oldest first
        self._lock = threading.Lock()

    def before_waiting(self) -> None:
        """A pool is full: a unit that comes to a reader looks first whether another one has room. Raises PoolFull."""
        entering = self.entering.attempt
        if entering is not None:
            unit = entering.unit
            if not unit.on_writer and not unit.queues:
                raise PoolFull

    def checked_out(self, raw: PoolProxiedConnection) -> None:
        """A connection has left its pool. If no unit is being entered, somebody has it from an engine directly: what is committed
        on it counts all the same. Raises DisconnectionError for one that has died in the pool, as pre-ping does."""
        if self.entering.attempt is None:
            if not self.engines.is_alive(raw):
                raise DisconnectionError("the connection was closed while it was idle")
            unit = self._nobodys()
            self.causality.begin(unit)
            self.engines.set_mode(raw, Mode.DEFAULT)
            self.hand_out(unit, raw)
            distrust(raw)
            own(unit, raw, raw)

    def _nobodys(self) -> Unit:
        """A unit that nobody has entered: it behaves as on any engine."""
        unit = Unit(False)
        unit.on_writer = unit.wrote = True
        unit.epoch = self.monitor.topology.epoch
        return unit

    # -- statements -----------------------------------------------------------------------------------------------

    def statement(self, _cursor: Any, text: str, *rest: Any) -> None:
        """Nothing passes to a reader, and nothing is sent in a read-only unit, without being looked at here."""
        context = rest[-1]
        connection: Connection = context.root_connection
        known: Unit | None = getattr(connection, UNIT, None)
        unit = known if known is not None and connection.info.get(UNIT) is known else self._adopt(connection, known)
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
                hint = context.execution_options.get("route")  # an option of the connection, or of a statement put in its place
                if hint is not None:
                    check_route(hint)
            reason = reason_to_write(found, effect, hint, text in self.learned and self.has_learned(text))
            if reason is None and (unit.scopes or self._is_global) and self.causality.overtaken(unit):
                reason = Reason.OWN_WRITES
            if reason is not None:
                if reason is Reason.NOT_A_READ and self._only_sets(unit, found, effect):
                    unit.holds = True
                    self.engines.set_mode(connection.connection, Mode.READ_ONLY)
                    return
                if reason is not Reason.NOT_A_READ or not _recalls_reads(unit, found, effect, unit.shown):
                    raise NotARead(effect, reason)
                unit.only_reads = False  # no other connection has the same past
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
            # On the writer nothing but this gate stands between an unknown function and the data.
            writes = found.effect is Effect.WRITE and (found.known is Effect.WRITE or (on_writer and effect is Effect.WRITE))
            if writes or found.locks:
                raise ReadOnlyViolation(effect.name, unit.instance.id if unit.instance is not None else "?")
            if found.unguards:
                raise ReadOnlyViolation(effect.name, unit.instance.id if unit.instance is not None else "?", unguards=True)
            unit.only_reads = False
        else:
            unit.wrote = True
            unit.only_reads = False
            unit.read_at = None  # nobody says when a flush has come to its end
            if not self.asynchronous_commits and _names_synchronous_commit(text, rest[0]):
                self.asynchronous_commits = True
            if unit.run is not None and (effect is _READ or not found.traceless):  # whatever a view's function does
                unit.leaves_traces = True
            driver: Any = connection.connection.dbapi_connection  # also of one that was detached from its pool
            if found.ends or driver.autocommit:  # it may commit without SQLAlchemy's knowing
                unit.committing = True
                if unit.run is not None:
                    unit.run.is_undoable = False
                self.causality.commit_begins(unit)

    def _look(self, unit: Unit, connection: Connection) -> None:
        """What must be so before a statement of a unit that streams, or that is read-only and in autocommit. Raises NotARead."""
        if unit.streaming and connection.info.get(SERVER) != unit.server:
            raise NotARead(_READ, Reason.NOT_A_READ)  # its unit has moved, and only rows are still read here
        if unit.read_only:
            self.engines.guard_again(connection.connection)

    def _in_mode(self, text: str, raw: PoolProxiedConnection, unit: Unit) -> Verdict:
        """The verdict on a text that is in doubt, as its connection reads it.

        Nothing of ours is sent between two statements of the unit, because the second one may ask what the first one has left
        (FOUND_ROWS(), SHOW WARNINGS). Then a text that is still in doubt counts as the strongest of what it may be. In a
        read-only unit that would be an error, so the server is asked all the same.
        """
        found = verdict(text, in_mode(self.dialect, self.engines.literal_mode(raw, ask=False)))
        if found.in_doubt and (unit.read_only or not unit.shown):
            found = verdict(text, in_mode(self.dialect, self.engines.literal_mode(raw, ask=True)))
        return found

    def _asks_for_writer(self, unit: Unit, effect: Effect) -> None:
        """A statement of a read-only unit on a reader asks for the writer. The first one of a session is served there, in a
        read-only transaction. Raises NotARead, or else ConfigurationError, because the unit has one transaction only."""
        if unit.of_session and not unit.shown and not unit.handed_out:
            raise NotARead(effect, Reason.HINT)
        where = unit.instance.id if unit.instance is not None else "?"
        what = f'a statement asks for the writer (route="writer"), and its unit is in a read-only transaction on {where}'
        if not unit.of_session:
            raise ConfigurationError(f"{what}. Use router.connect(), which leads to the writer.")
        raise ConfigurationError(f"{what}. Begin the unit with such a statement, or leave read_only out.")

    def _only_sets(self, unit: Unit, found: Verdict, effect: Effect) -> bool:
        """Whether this is of a listener of the application that prepares a reader's connection for a unit which is about to have
        it. What it sets holds for the unit: in a transaction, as on any engine. SET LOCAL is no such thing: it is part of the
        transaction of its unit, which is the writer's."""
        entering = self.entering.attempt
        is_setting = effect in (Effect.SERVER, Effect.SESSION) and not found.unguards
        return is_setting and entering is not None and entering.unit is unit

    def reason_to_write(self, text: str, unit: Unit, thorough: bool) -> Reason | None:
        """Why an automatic unit that is not there must be on the writer for this text; None if a reader may serve it.

        thorough: whether a text that is in doubt counts as the strongest of what it may be: no reader has room to tell.
        """
        found = verdict(text, self.dialect)
        effect = self.effect(found) if found.functions else found.effect
        if effect is not _READ and not thorough:
            past = unit.instance is not None and unit.text is not None
            if found.in_doubt or _recalls_reads(unit, found, effect, past):
                return None  # the reader's connection tells
        return reason_to_write(found, effect, unit.hint, text in self.learned and self.has_learned(text))

    def note_write(self, text: str, sent: str) -> None:
        """Remember the text of a text() if what is sent for it writes for certain: then it need not be compiled to be judged."""
        found = verdict(sent, self.dialect)
        if found.known is Effect.WRITE and not found.in_doubt and len(text) <= LONGEST_WRITE:
            if len(self.writes) >= WRITES:
                self.writes.clear()
            self.writes.add(text)

    def note_read(self, key: object, sent: str) -> None:
        """Remember the key of a statement if what is sent for it only reads: then its text need not be looked up before a reader
        is chosen for it. It is looked at all the same when it is sent."""
        found = verdict(sent, self.dialect)
        if found.effect is _READ and found.hint is None:
            if len(self.reads) >= READS:
                self.reads.clear()
            self.reads.add(key)

    def set_options(self, connection: Connection, options: Mapping[str, Any], send: Callable[[], None]) -> None:
        """Set execution options of a connection, except what would let a read-only unit write, or fail on its reader.

        Raises ReadOnlyViolation, NoReaderAvailable, ConfigurationError.
        """
        unit: Unit | None = getattr(connection, UNIT, None)
        if unit is None:
            entering = self.entering.attempt
            unit = entering.unit if entering is not None else None
        if unit is None or not unit.read_only or unit.instance is None:
            send()
            return
        if not options.get("postgresql_readonly", True):
            raise ReadOnlyViolation("postgresql_readonly=False", unit.instance.id)
        level = options.get("isolation_level")
        if level is not None and not unit.on_writer and self.beyond_readers(level):
            raise NoReaderAvailable(self.monitor.topology.said(), beyond=True, connected=True)
        alone = level is not None and _as_servers_say(level) == "autocommit"
        if alone and connection.connection.info[SHARED]:
            why = "behind a transaction pooler nothing would keep a promoted reader from writing"
            raise ConfigurationError(f"AUTOCOMMIT on a read-only connection: {why}. Leave isolation_level out.")
        send()
        if alone:
            self.engines.keep_guarded(connection.connection)
            unit.watched = True

    def effect(self, found: Verdict) -> Effect:
        """A statement's effect, given what the user and the catalog say of its functions."""
        if not found.functions:
            return found.effect
        catalog = self.monitor.functions
        if catalog is not self._catalog:
            self._catalog = catalog
            self._harmless = self._allowed | catalog
        effect = found.effect_given(self._harmless)
        if effect is not found.known:
            self.monitor.want_functions()
        return effect

    def learn(self, text: str | None) -> None:
        """A reader has refused this text, which looked like a read: it goes to the writer for some minutes."""
        if text is not None:
            with self._lock:
                self.learned.pop(text, None)
                self.learned[text] = time.monotonic()
                while len(self.learned) > LEARNED or sum(map(len, self.learned)) > LEARNED_LENGTH:
                    del self.learned[next(iter(self.learned))]

    def forget(self, text: str) -> None:
        """The writer has refused this text, too: readers may be asked again."""
        with self._lock:
            self.learned.pop(text, None)

    def has_learned(self, text: str) -> bool:
        """Whether a reader has refused this text not long ago."""
        refused_at = self.learned.get(text)
        return refused_at is not None and time.monotonic() - refused_at < LEARNED_FOR

    def _adopt(self, connection: Connection, unit: Unit | None) -> Unit | None:
        """The unit of a connection that does not show it: one that is being entered right now, that SQLAlchemy made anew on its
        own, or that was had from an engine directly. None for SQLAlchemy's own first look at a server."""
        try:
            raw = connection.connection
            found: Unit | None = raw.info.pop(UNIT, None)
        except NotImplementedError:
            return None
        refuse_inherited(raw)
        entering = self.entering.attempt
        if unit is None and entering is not None and entering.engine is connection.engine:
            unit, mode = entering.unit, entering.mode
        elif unit is None and found is not None:
            own(found, connection, raw)  # its mode was set when it was checked out
            return found
        elif unit is None:
            unit, mode = self._nobodys(), Mode.DEFAULT
        else:
            if found is not None:  # SQLAlchemy has checked it out for a connection that was lost
                found.noted = True
                self.causality.ended(found)
            writer = self.monitor.topology.writer
            is_writer = writer is not None and unit.instance is not None and writer.id == unit.instance.id
            if unit.on_writer and not is_writer:
                raise self._gone(unit)
            if not unit.on_writer and raw.info[SERVER] != unit.server and (unit.pasts or unit.requirement is not None):
                where = unit.instance.id if unit.instance is not None else "?"
                why = "it is another server than before, which may not have all that this connection must see; make a new one"
                raise WrongServer(where, why)
            mode = Mode.READ_ONLY if unit.read_only else Mode.DEFAULT
            unit.outcome = unit.unknown = None  # what is known of the COMMIT that went with the connection is of that COMMIT
            if unit.ends is not None:
                unit.ends = None
                self.hand_out(unit, raw)
        self.engines.set_mode(raw, mode, unit.isolation)
        if unit.read_only and not unit.of_session:
            self.engines.keep_read_only(raw)
        own(unit, connection, raw)
        return unit

    def hand_out(self, unit: Unit, raw: PoolProxiedConnection) -> None:
        """The user gets a unit's connection to the writer. Whatever is taken out of it, its driver says when a transaction has
        ended."""
        if unit.ends is None:
            unit.ends = self.server.count_ends(raw.dbapi_connection)
            unit.ends_known = unit.ends()
            self.causality.in_hands(unit)

    def _gone(self, unit: Unit) -> NoWriterAvailable:
        """The connection of a unit was lost, and where it was is the writer no longer."""
        error = NoWriterAvailable(0.0, (f"{unit.instance.id if unit.instance else '?'} is the writer no longer",))
        if unit.run is not None:
            unit.run.failed = Facts(Failure.LOST, sent=False, outcome_known=True, safe_to_repeat=True)
            setattr(error, FACTS, unit.run.failed)
        return error

    def forked(self) -> None:
        """In a forked child: nobody holds a lock."""
        self._lock = threading.Lock()
        self.causality.forked()

    # -- errors ---------------------------------------------------------------------------------------------------

    def failed(self, context: ExceptionContext) -> RouterError | None:
        """Note on an error of the driver what it means; gives the error to be raised instead if a COMMIT's fate is unknown, or if
        a read-only unit was to write what its text did not show."""
        connection = context.connection
        unit: Unit | None = getattr(connection, UNIT, None)
        if unit is None or not isinstance(context.original_exception, self.engines.driver_error):
            return None
        driver: Any
        failure = driver_failure(context.original_exception, disconnected=context.is_disconnect)
        if failure in SUSPICIOUS and unit.instance is not None:
            self.monitor.suspect(unit.instance.id)
        if failure is Failure.LOST:
            context.is_disconnect = True  # SQLAlchemy does not always know
        if failure is Failure.OUTDATED and unit.instance is not None:
            self.engines.forget_prepared(unit.instance.id)
        if connection is not None and not (context.is_disconnect or connection.invalidated):
            driver = connection.connection.dbapi_connection
            if self.server.autocommit(driver):  # there will be no rollback, with which a driver forgets what it has prepared
                with contextlib.suppress(self.engines.driver_error):
                    self.server.forget_prepared(driver)
        phase = self.phase(unit)
        is_futile = False  # to repeat it
        if failure is Failure.TIMED_OUT:
            if phase is not Phase.COMMIT and self._says(unit) is None:
                failure = Failure.LOST  # it is not the statement that is slow
            else:
                context.invalidate_pool_on_disconnect = False  # the others of its pool are as good as before
        elif failure is Failure.READ_ONLY and unit.on_writer and not unit.read_only:
            # It may be the writer no longer, before anybody has seen that: the next unit is to know, and it is the transaction's
            # own fault only where the writer says that it is the writer.
            is_writer = self._says(unit) is Role.WRITER
            if unit.run is not None:
                unit.run.refusals += is_writer
        elif failure is Failure.BROKEN and phase in _STATEMENTS:
            is_futile = breaks_everywhere(unit)
        elif failure is Failure.LOST and phase in _STATEMENTS and connection is not None:
            driver = connection.connection.dbapi_connection
            code = self.server.code(context.original_exception)
            why = loses_everywhere(unit, driver, code, self.server, self.monitor, self._failover_timeout)
            if why is not None:
                failure = Failure.ENDED
                if context.sqlalchemy_exception is not None:
                    context.sqlalchemy_exception.add_detail(f"{why}; {self.server.ENDED}")
        elif failure is Failure.CONSTRAINT and unit.run is not None:
            failure = unit.run.refused().failure
        meaning = facts(failure, phase)
        if is_futile:
            meaning = meaning._replace(safe_to_repeat=False)
        if unit.outcome is Outcome.NOT_COMMITTED:
            meaning = Facts(failure, sent=True, outcome_known=True, safe_to_repeat=True)
        instead: RouterError | None = unit.unknown
        if failure is Failure.READ_ONLY and unit.read_only and unit.instance is not None:
            instead = ReadOnlyViolation(Effect.WRITE.name, unit.instance.id, sent=True)
            meaning = classify_error(instead)
        if unit.run is not None:
            unit.run.failed = meaning
        setattr(instead or context.sqlalchemy_exception, FACTS, meaning)
        return instead

    def _says(self, unit: Unit) -> Role | None:
        """What the server of a unit is, as it says when it is asked now; None where it is lost."""
        if unit.instance is None or unit.server is None:
            return None
        return self.monitor.ask_anew(unit.instance.id, unit.server)

    def phase(self, unit: Unit) -> Phase:
        """How far the unit was when a statement or a COMMIT of it failed."""
        if unit.committing:
            return Phase.COMMIT
        if unit.only_reads and unit.on_writer and unit.read_only is False:
            # It was declared to write, and what looks like a read may: all of its transaction is gone then, not this read alone.
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
        """Whether a unit at this isolation level (None: the engine's or the server's default) must be on the writer. What is the
        family's own default nobody has asked for."""
        asked = level or self._isolation
        if asked is None:
            return self._servers_level() not in self._usual
        return _as_servers_say(asked) not in _LEVELS_ON_READERS

    def beyond_readers(self, level: str | None) -> bool:
        """Whether a reader refuses what runs at this isolation level (None: the engine's or the server's default)."""
        refused = self.server.BEYOND_READERS
        if not refused:
            return False
        asked = level or self._isolation
        return (self._servers_level() if asked is None else _as_servers_say(asked)) in refused

    def _servers_level(self) -> str:
        """The level that the servers have where nobody asks for one."""
        return self.monitor.topology.isolation or self.server.DEFAULT_ISOLATION

    def _has_snapshot(self, unit: Unit) -> bool:
        """Whether the statements of a unit's transaction must see one snapshot. An automatic one has asked for none where that is
        only the family's own default."""
        level = unit.isolation or self._isolation
        if level is None and unit.read_only is not None:
            level = self._servers_level()
        return self.above_read_committed(level)

    # -- commits --------------------------------------------------------------------------------------------------

    def commit(self, raw: PoolProxiedConnection, send: Callable[[Any], None]) -> None:
        """Send a COMMIT. Where its answer is lost: find out what became of it, if the unit has a way to, and go on as if the
        answer had come where it has committed."""
        info = raw.info
        if SERVER not in info:
            refuse_inherited(raw)
        unit: Unit | None = info.get(UNIT)
        # A stream that was begun on the reader keeps its connection when the unit moves: nothing is to be committed there.
        if unit is None or not (unit.wrote or unit.may_write) or unit.instance is None or info[SERVER] != unit.server:
            if unit is not None and unit.of_session and self.server.blocks(raw.dbapi_connection):
                raw.invalidate()  # else the driver would read the stream to its end
            else:
                send(raw)
            return
        if unit.ends is not None:
            self._note_unseen_ends(unit)
        self.causality.commit_begins(unit)
        ask = self._prepare(unit, raw) if unit.check is not None or unit.run is not None else None
        unit.committing = True
        try:
            send(raw)
        except self.engines.driver_error as error:
            self.rolled_back(raw)  # if it was refused
            if decide(self._commit_failure(error, raw), Phase.COMMIT) is not Action.RESOLVE:
                raise
            if not self._found_committed(unit, unit.instance.id, ask):
                raise
            raw.invalidate(error)
        unit.committing = False
        self._committed(unit)

    def _prepare(self, unit: Unit, raw: PoolProxiedConnection) -> Ask | None:
        """Note what will tell the fate of the COMMIT that is about to be sent; roll back if that fails."""
        if unit.check in self._by_table:
            self.monitor.prunes = True
        try:
            return prepare(raw.dbapi_connection, unit, self.server, self.monitor.topology)
        except Exception:
            with contextlib.suppress(self.engines.driver_error):
                raw.rollback()  # SQLAlchemy takes a COMMIT that failed for the end of the transaction
            self.rolled_back(raw)
            raise

    def ends(self, raw: PoolProxiedConnection) -> bool:
        """Whether a rollback ends the unit of a connection: that of a session. Others may go on with their connection."""
        unit: Unit | None = raw.info.get(UNIT)
        return unit is not None and unit.of_session

    def rolled_back(self, raw: PoolProxiedConnection) -> None:
        """Note what a rollback has left, or a COMMIT that was one: what is there already is not to be written again."""
        if self.server.was_not_undone(raw.dbapi_connection):
            unit: Unit | None = raw.info.get(UNIT)
            if unit is not None and unit.run is not None:
                unit.run.is_undoable = False

    def _note_unseen_ends(self, unit: Unit) -> None:
        """What the driver's own connection has committed in a run is there already."""
        if unit.run is not None and unit.unseen_end() is not None:
            unit.run.is_undoable = False

    def commit_in_two_phases(self, connection: Connection, send: Callable[[], None]) -> None:
        """Send PREPARE TRANSACTION or COMMIT PREPARED. Nothing was noted of them: what becomes of a prepared transaction is said
        by somebody else, maybe much later."""
        refuse_inherited(connection.connection)
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
                noted = f"in two phases; what is prepared is in {self.server.PREPARED}"
                unit.unknown = OutcomeUnknown(unit.instance.id, noted)
            raise
        self._committed(unit)

    def _committed(self, unit: Unit) -> None:
        """Whoever comes next must see it: a listener of after_commit, or whatever happens while the connection is still open."""
        unit.committed = True
        self.causality.committed(unit)
        unit.noted = unit.of_session and not unit.handed_out
        if unit.run is not None:
            unit.run.is_undoable = False

    def _commit_failure(self, error: Any, raw: PoolProxiedConnection) -> Failure:
        driver: Any = raw.dbapi_connection
        return driver_failure(error, disconnected=self.server.is_closed(driver))

    def _found_committed(self, unit: Unit, instance_id: str, ask: Ask | None) -> bool:
        """Whether the transaction whose COMMIT was not answered has committed; where not, the unit says what is known."""
        self.monitor.suspect(instance_id)
        if ask is None:
            unit.unknown = OutcomeUnknown(instance_id, "no commit_check was asked for, so nothing was noted that could tell")
            return False

        def resolve(timeout: float) -> Outcome:
            began = time.monotonic()
            found = find_out(self._asking_connection, ask, timeout)
            self._emit(events.CommitResolved, instance_id, found.value, time.monotonic() - began)
            if found is Outcome.COMMITTED:
                self.causality.committed(unit)  # maybe long after its session took it for ended
            return found

        if unit.run is not None:
            left = self._failover_timeout if unit.run.deadline is None else unit.run.deadline - time.monotonic()
            unit.outcome = resolve(max(left, LEAST_PATIENCE))
            if unit.outcome is not Outcome.UNKNOWN:
                return unit.outcome is Outcome.COMMITTED
        unit.unknown = OutcomeUnknown(instance_id, str(ask), resolve)
        return False

    def _asking_connection(self, timeout: float) -> Connection:
        """A connection to the newest writer outside of its pool: those that ask must not wait for those that they ask about."""
        topology = self.monitor.wait_for(lambda t: t.writer is not None, timeout)
        if topology.writer is None:
            raise NoWriterAvailable(timeout, topology.said())
        return self.engines.outside(topology.writer)

    def returned(self, unit: Unit) -> bool:
        """A unit's connection is back in its pool: whatever was committed on it has been acknowledged by now. Gives whether no
        other unit may have it."""
        if unit.borrowed is not None:
            unit.give_back()
        if unit.ends is not None and not unit.committing:
            self._note_unseen_ends(unit)
        self.causality.ended(unit)
        return unit.leaves_traces and unit.spoils_connection


def own(unit: Unit, connection: object, raw: PoolProxiedConnection) -> None:
    """Note a unit on both connections: only one that the router gave out, and that SQLAlchemy has not made anew since, has
    the same unit on both."""
    info = raw.info
    info[UNIT] = unit
    unit.server = info.get(SERVER)
    unit.noted = False
    if unit.scopes:
        for scope in unit.scopes:
            scope.units.add(unit)  # what it does is seen by those that begin from now on, though it has not ended
    if raw is not connection:
        setattr(connection, UNIT, unit)


class _WatchedConnection(RoutedConnection):
    """A Connection whose user may take the driver's connection out of it. SQLAlchemy takes it, too, and is told apart by the
    module that asks: where SQLAlchemy alone has worked the settings are as they were."""

    @property
    def connection(self) -> PoolProxiedConnection:
        raw = super().connection
        if not sys._getframe(1).f_globals.get("__name__", "").startswith(("sqlalchemy.", "aurora_router.")):
            distrust(raw)
        return raw


def watch(connection: Connection, server: Family) -> None:
    """Have a connection that is handed to the user say when its driver's connection is taken, unless the server says of a guard
    itself whether it is on."""
    if type(connection) is not RoutedConnection or connection.invalidated:
        return
    if not server.is_guarded(connection.connection.dbapi_connection, True):
        connection.__class__ = _WatchedConnection


def _as_servers_say(level: str) -> str:
    return level.replace("_", " ").lower()


def _recalls_reads(unit: Unit, found: Verdict, effect: Effect, past: bool) -> bool:
    """Whether a statement asks for what the unit's reads on its reader have left: no other connection can tell.

    A user's variable counts if such a statement came before: only GET DIAGNOSTICS sets one on a reader.
    past: whether there were reads.
    """
    if found.recalls is None or effect is not Effect.CONNECTION or not past:
        return False
    return found.recalls is Recall.STATEMENT or not unit.only_reads


def refuse_inherited(raw: PoolProxiedConnection) -> None:
    """Raises RouterError for a connection that was open at a fork: what was begun there is the parent's to end."""
    if SERVER not in raw.info:
        raise RouterError("this connection is of the process that forked this one; roll back or close, and begin anew")


def _names_synchronous_commit(text: str, parameters: Any) -> bool:
    """Whether a statement may switch to commits that are acknowledged before the log is written."""
    lower = text.lower()
    if "synchronous_commit" in lower:
        return True
    if "set_config" not in lower:
        return False
    values = parameters.values() if isinstance(parameters, Mapping) else parameters
    return "synchronous_commit" in {str(value).lower() for value in values or ()}
