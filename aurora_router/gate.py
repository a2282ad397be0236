"""The gate between SQLAlchemy and the driver: every statement, COMMIT and error of a router's connections passes here.

It judges the text that is really sent, notes in the unit what it does, and says of each error what it means.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from sqlalchemy.engine import Connection, ExceptionContext
from sqlalchemy.pool import PoolProxiedConnection

from aurora_router.causality import Causality
from aurora_router.commits import Ask, find_out, prepare
from aurora_router.core import events
from aurora_router.core.failures import SUSPICIOUS, Action, Facts, Failure, Phase, decide, facts
from aurora_router.core.selection import Reason
from aurora_router.core.statements import Effect, Verdict, verdict
from aurora_router.core.topology import Role
from aurora_router.diagnosis import FACTS, driver_failure
from aurora_router.engines import SERVER, UNIT, Engines
from aurora_router.errors import NoWriterAvailable, Outcome, OutcomeUnknown, ReadOnlyViolation, RouterError, WrongServer
from aurora_router.monitor import Monitor
from aurora_router.servers import Family, Mode
from aurora_router.unit import NotARead, Unit

LEAST_PATIENCE = 1.0  # seconds to ask for the fate of a COMMIT, also where the deadline has passed
LEARNED = 1000  # statements remembered because a reader refused them

_LEVELS_ON_READERS = frozenset({"autocommit", "read uncommitted", "read committed"})
_READ = Effect.READ  # an enum's members are slow to look up on the request path


class Gate:
    """What is known of the statements and the commits of one router.

    server: the family's module. dialect: of its SQL. causality: what its units must see. isolation: the level that the engines
    are configured for, None for the server's own.
    read_only_functions: names that the user vouches for. patience: seconds to ask for the fate of a COMMIT. emit: called with
    an event's class and its values.
    """

    monitor: Monitor
    engines: Engines

    def __init__(
        self,
        server: Family,
        dialect: str,
        causality: Causality,
        isolation: str | None,
        read_only_functions: frozenset[str],
        patience: float,
        emit: Callable[..., None],
    ) -> None:
        self.server = server
        self.causality = causality
        self.entering = threading.local()  # .place: the unit that this thread is connecting, and the mode that it is to have
        self.asynchronous_commits = False  # some session is known to commit without waiting for the log
        self._isolation = isolation
        self._patience = patience
        self._emit = emit
        self._dialect = dialect
        self._by_table = ("table",) if server.XIDS else ("table", "xid")
        self._usual = frozenset({*_LEVELS_ON_READERS, server.DEFAULT_ISOLATION})
        self._is_global = causality.is_global
        self._allowed = read_only_functions
        self._catalog: frozenset[str] = frozenset()
        self._harmless = read_only_functions
        self.learned: dict[str, None] = {}  # texts that looked like reads, and that a reader has refused
        self._lock = threading.Lock()

    # -- statements -----------------------------------------------------------------------------------------------

    def statement(self, _cursor: Any, text: str, *rest: Any) -> None:
        """Nothing passes to a reader, and nothing is sent in a read-only unit, without being looked at here."""
        context = rest[-1]
        connection: Connection = context.root_connection
        known: Unit | None = getattr(connection, UNIT, None)
        unit = known if known is not None and connection.info.get(UNIT) is known else self._adopt(connection, known)
        if unit is None:
            return
        unit.shown = unit.text is not None
        unit.text = text
        unit.committing = False
        found = verdict(text, self._dialect)
        effect = self.effect(found) if found.functions else found.effect
        if effect is _READ:
            if unit.read_only is None and not unit.on_writer:
                if found.hint == "writer":
                    raise NotARead(effect, Reason.HINT)
                if text in self.learned:
                    raise NotARead(effect, Reason.NOT_A_READ)
                if (unit.scopes or self._is_global) and self.causality.overtaken(unit):
                    raise NotARead(effect, Reason.OWN_WRITES)
                if context.execution_options.get("stream_results"):
                    unit.streaming = True
            return
        if unit.read_only:
            # On the writer nothing but this gate stands between an unknown function and the data.
            if found.effect is Effect.WRITE and (found.known is Effect.WRITE or (unit.on_writer and effect is Effect.WRITE)):
                raise ReadOnlyViolation(effect.name, unit.instance.id if unit.instance is not None else "?")
            unit.only_reads = False
        elif unit.on_writer:
            unit.wrote = True
            unit.only_reads = False
            unit.read_at = None  # nobody says when a flush has come to its end
            if not self.asynchronous_commits and _names_synchronous_commit(text, rest[0]):
                self.asynchronous_commits = True
            driver: Any = connection.connection.driver_connection
            if found.ends or driver.autocommit:  # it may commit without SQLAlchemy's knowing
                unit.committing = True
                if unit.run is not None:
                    unit.run.committed = True
                self.causality.commit_begins(unit)
        else:
            asked = unit.hint == "reader" or (found.hint == "reader" and unit.hint is None)
            if not (asked and found.known is Effect.READ and text not in self.learned):
                raise NotARead(effect, Reason.NOT_A_READ)

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
        """A reader has refused this text, which looked like a read: it goes to the writer from now on."""
        if text is not None:
            with self._lock:
                while len(self.learned) >= LEARNED:
                    del self.learned[next(iter(self.learned))]
                self.learned[text] = None

    def _adopt(self, connection: Connection, unit: Unit | None) -> Unit | None:
        """The unit of a connection that does not show it: one that is being entered right now, that SQLAlchemy made anew on its
        own, or that was had from an engine directly. None for SQLAlchemy's own first look at a server."""
        try:
            raw = connection.connection
            raw.info.pop(UNIT, None)
        except NotImplementedError:
            return None
        _refuse_inherited(raw)
        entering: tuple[Unit, Mode] | None = getattr(self.entering, "place", None)
        if unit is None and entering is not None:
            unit, mode = entering
        elif unit is None:
            unit, mode = Unit(False), Mode.DEFAULT  # nobody's: it behaves as on any engine
            unit.on_writer = unit.wrote = True
            unit.epoch = self.monitor.topology.epoch
        else:
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
        self.engines.set_mode(raw, mode, unit.isolation)
        own(unit, connection, raw)
        return unit

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

    def failed(self, context: ExceptionContext) -> OutcomeUnknown | None:
        """Note on an error of the driver what it means; gives the error to be raised instead where a COMMIT's fate is unknown."""
        connection = context.connection
        unit: Unit | None = getattr(connection, UNIT, None)
        if unit is None or not isinstance(context.original_exception, self.engines.driver_error):
            return None
        failure = driver_failure(context.original_exception, disconnected=context.is_disconnect)
        if failure in SUSPICIOUS and unit.instance is not None:
            self.monitor.suspect(unit.instance.id)
        if failure is Failure.LOST:
            context.is_disconnect = True  # SQLAlchemy does not always know
        phase = self.phase(unit)
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
        meaning = facts(failure, phase)
        if unit.outcome is Outcome.NOT_COMMITTED:
            meaning = Facts(failure, sent=True, outcome_known=True, safe_to_repeat=True)
        if unit.run is not None:
            unit.run.failed = meaning
        unknown = unit.unknown
        setattr(unknown or context.sqlalchemy_exception, FACTS, meaning)
        return unknown

    def _says(self, unit: Unit) -> Role | None:
        """What the server of a unit is, as it says when it is asked now; None where it is lost."""
        if unit.instance is None or unit.server is None:
            return None
        return self.monitor.ask_anew(unit.instance.id, unit.server)

    def phase(self, unit: Unit) -> Phase:
        """How far the unit was when a statement or a COMMIT of it failed."""
        if unit.committing:
            return Phase.COMMIT
        autocommit = unit.read_only is None and not unit.on_writer
        if autocommit or (unit.only_reads and not (unit.shown and self._has_snapshot(unit))):
            return Phase.READ
        return Phase.WRITER_STATEMENT if unit.on_writer else Phase.READER_TRANSACTION

    def above_read_committed(self, level: str | None) -> bool:
        """Whether a unit at this isolation level (None: the engine's or the server's default) must be on the writer. What is the
        family's own default nobody has asked for."""
        if level is None:
            level = self._isolation
        if level is None:
            for instance in self.monitor.topology.instances:
                if instance.seen:
                    return instance.seen[0].server.isolation not in self._usual
            return False
        return level.replace("_", " ").lower() not in _LEVELS_ON_READERS

    def _has_snapshot(self, unit: Unit) -> bool:
        """Whether the statements of a unit's transaction must see one snapshot. An automatic one has asked for none where that is
        only the family's own default."""
        level = unit.isolation or self._isolation
        if level is None and unit.read_only is not None:
            seen = [seen for instance in self.monitor.topology.instances for seen in instance.seen]
            level = seen[0].server.isolation if seen else None
        return self.above_read_committed(level)

    # -- commits --------------------------------------------------------------------------------------------------

    def commit(self, raw: PoolProxiedConnection, send: Callable[[Any], None]) -> None:
        """Send a COMMIT. Where its answer is lost: find out what became of it, if the unit has a way to, and go on as if the
        answer had come where it has committed."""
        _refuse_inherited(raw)
        unit: Unit | None = raw.info.get(UNIT)
        if unit is None or not unit.wrote or unit.instance is None:
            send(raw)
            return
        self.causality.commit_begins(unit)
        if unit.check in self._by_table:
            self.monitor.prunes = True
        try:
            ask = prepare(raw.driver_connection, unit, self.server, self.monitor.topology)
        except Exception:
            with contextlib.suppress(self.engines.driver_error):
                raw.rollback()  # SQLAlchemy takes a COMMIT that failed for the end of the transaction
            raise
        unit.committing = True
        try:
            send(raw)
        except self.engines.driver_error as error:
            if decide(self._commit_failure(error, raw), Phase.COMMIT) is not Action.RESOLVE:
                raise
            if not self._found_committed(unit, unit.instance.id, ask):
                raise
            raw.invalidate(error)
        unit.committing = False
        self._committed(unit)

    def commit_in_two_phases(self, connection: Connection, send: Callable[[], None]) -> None:
        """Send PREPARE TRANSACTION or COMMIT PREPARED. Nothing was noted of them: what becomes of a prepared transaction is said
        by somebody else, maybe much later."""
        _refuse_inherited(connection.connection)
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
        self.causality.committed(unit)
        unit.noted = unit.of_session and not unit.handed_out
        if unit.run is not None:
            unit.run.committed = True

    def _commit_failure(self, error: Any, raw: PoolProxiedConnection) -> Failure:
        driver: Any = raw.driver_connection
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
            left = self._patience if unit.run.deadline is None else unit.run.deadline - time.monotonic()
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

    def returned(self, unit: Unit) -> None:
        """A unit's connection is back in its pool: whatever was committed on it has been acknowledged by now."""
        unit.give_back()
        self.causality.ended(unit)


def own(unit: Unit, connection: object, raw: PoolProxiedConnection) -> None:
    """Note a unit on both connections: only one that the router gave out, and that SQLAlchemy has not made anew since, has
    the same unit on both."""
    raw.info[UNIT] = unit
    unit.server = raw.info.get(SERVER)
    unit.noted = False
    for scope in unit.scopes:
        scope.units.add(unit)  # what it does is seen by those that begin from now on, though it has not ended
    if raw is not connection:
        setattr(connection, UNIT, unit)


def _refuse_inherited(raw: PoolProxiedConnection) -> None:
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
