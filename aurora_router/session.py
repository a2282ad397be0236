"""RoutingSession: a SQLAlchemy Session whose units of work go to the instance that they need.

The session stays SQLAlchemy's, with three additions. get_bind() connects the unit where it belongs. execute(), scalar() and
scalars() retry a statement whose unit had to move. A commit leaves a requirement behind. Only the functions _connection_to()
and _leave() touch private attributes of SQLAlchemy's transactions.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Never, TypeVar

from sqlalchemy import TextClause, event, inspect
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.exc import DBAPIError, ResourceClosedError, StatementError
from sqlalchemy.orm import InstanceState, ORMExecuteState, Session, SessionTransaction
from sqlalchemy.orm.exc import StaleDataError
from sqlalchemy.schema import ExecutableDDLElement, Sequence

from aurora_router import config, stale_writes
from aurora_router.core import events
from aurora_router.core.failures import Action
from aurora_router.core.selection import Reason
from aurora_router.core.statements import verdict
from aurora_router.error_classification import FACTS
from aurora_router.errors import ConfigurationError, RouterError
from aurora_router.gate import refuse_inherited, watch
from aurora_router.router import Router
from aurora_router.texts import key_of, text_of
from aurora_router.unit import CommitCheck, Judge, NotARead, Past, Run, Unit

if TYPE_CHECKING:
    from sqlalchemy.engine.interfaces import CoreExecuteOptionsParameter
    from sqlalchemy.orm import Mapper
    from sqlalchemy.pool import PoolProxiedConnection
    from sqlalchemy.sql import ClauseElement

    _Base = Session
else:
    _Base = object

R = TypeVar("R")

_BINDS = "a routing session gets its engines from the router; leave out bind, or give a Connection when you make the session"


class _Call:
    """A statement that a session is executing.

    parameters: as Session.execute() takes them.
    options: the execution options of the call.
    route: the hint of all its execution options.
    of_write: whether SQLAlchemy would use it to read the rows that an UPDATE or DELETE will change.
    left: the session's `_left` when this statement got its engine; None before that.
    listeners_made: the statement that the listeners of do_orm_execute have left; None without listeners.
    """

    __slots__ = ("left", "listeners_made", "of_write", "options", "parameters", "route", "statement")

    left: int | None

    def __init__(self, statement: Any, parameters: Any, options: Mapping[str, Any] | None, route: Any, of_write: bool) -> None:
        self.statement = statement
        self.parameters = parameters
        self.options = options
        self.route = route
        self.of_write = of_write
        self.listeners_made: Any = None


class _BySession:
    """The door of a session's unit, whose connection joins the session's transaction.

    engine: the engine that it tries, or has tried last.
    """

    __slots__ = ("engine", "judge", "options", "session")

    engine: Engine

    def __init__(self, session: Session, options: Mapping[str, Any] | None, judge: Judge | None) -> None:
        self.session = session
        self.options = options
        self.judge = judge

    def connect(self, engine: Engine) -> Connection:
        self.engine = engine
        return self.session._connection_for_bind(engine, execution_options=self.options)

    def pooled(self, connection: Connection) -> PoolProxiedConnection:
        return connection.connection

    def drop(self, connection: Connection) -> None:
        _leave(self.session, connection.engine, invalidate=True)


def _after_transaction_end(session: Session, transaction: SessionTransaction) -> None:
    """Record what the unit has written and read, however it has ended."""
    routed: RoutingMixin = session  # type: ignore[assignment]
    unit = routed._unit
    if unit is None or transaction.parent is not None:
        return
    routed.router.causality.ended(unit)
    # The transaction refers to its session. Without this, both would wait for the garbage collector.
    routed._unit = routed._unit_of = None


def _after_begin(session: Session, _: SessionTransaction, connection: Connection) -> None:
    """Note that the session uses an engine that is not the router's, or else apply the options that its class has chosen.

    Only classes that choose among several engines have this listener.
    """
    assert isinstance(session, RoutingMixin)
    unit = session._unit
    if unit is None or unit.instance is None or connection.engine is not session._engine(unit):
        session._was_elsewhere = True
    elif session._chosen_options:
        connection.execution_options(**session._chosen_options)


class RoutingMixin(_Base):
    """Make a class of sessions a routing one: `class MySession(RoutingMixin, SQLModelSession)`.

    router: the Router.
    read_only: True: one reader and one read-only transaction for each unit. False: the writer. None: the router decides, and
        reads before the first other statement run on a reader, in autocommit.
    commit_check: "xid" or "table", the way in which an OutcomeUnknown of this session finds out what happened. It costs one more
        round trip each commit (see Router.run_transaction()). None: it cannot find out.
    after: a consistency token. Every read sees the writes that the token speaks of.
    options: other arguments of the Session. `binds` may send some mappers to other engines. `bind` may be a Connection, for
        tests: everything runs on it, in its transaction (see `join_transaction_mode`), and nothing is routed.

    A session class with a get_bind() of its own, such as Flask-SQLAlchemy's, still chooses the engines of other databases. The
    engine that this get_bind() returns without arguments stands for the cluster. So does any engine of the router's database.

    Raises ConfigurationError for a bad argument.
    """

    router: Router
    _run: Run | None = None
    _commit_check: CommitCheck | None = None
    _read_only: bool | None = None
    _unit: Unit | None = None
    _unit_of: SessionTransaction | None = None
    _past: Past
    _joined: Connection | None = None  # the connection that everything runs on
    _bind: Engine | Connection | None = None  # the session's own bind, as Session.get_bind() sees it
    _call: _Call | None = None  # the statement that is being executed
    _left = 0  # how often its units have left a place and its connection
    # Statements may go to engines that are not the router's, because `binds` or the class mixed in chooses them.
    _elsewhere = False
    _chosen_options: Mapping[str, Any] = {}  # those that the class mixed in gives the cluster's engine
    _overridden = False  # some class has a get_bind() of its own
    _was_elsewhere = False  # a statement may have gone to such an engine
    _guarding: bool
    _unchecked = False  # the flush under way has not checked its objects yet
    _flush_context: Any = None  # SQLAlchemy's context of that flush
    _listens_last = False  # to before_flush
    _prepares = False  # it loads what decides the coming writes
    _in_bulk: list[InstanceState[Any]] | None = None  # objects to check before a bulk statement writes them

    def __init__(
        self,
        *args: Never,
        router: Router,
        read_only: bool | None = None,
        commit_check: CommitCheck | None = None,
        after: str | None = None,
        **options: Any,
    ) -> None:
        if args:
            raise ConfigurationError(_BINDS)
        if not isinstance(router, Router):
            raise ConfigurationError("router= must be a Router")
        if read_only is not None:
            if read_only is not True and read_only is not False:  # 0 is neither
                raise ConfigurationError(f"{config.named('read_only', read_only)}: use True, False or None")
            self._read_only = read_only
        if commit_check is not None:
            if commit_check not in ("xid", "table"):
                raise ConfigurationError(f'{config.named("commit_check", commit_check)}: use "xid", "table" or None')
            self._commit_check = commit_check
        self.router = router
        self._past = Past() if after is None else router.past(after)
        self._guarding = router.stale_write_guard
        if options.get("binds"):
            self._elsewhere = self._was_elsewhere = True
        if (bind := options.get("bind")) is not None:
            if not isinstance(bind, Connection):
                raise ConfigurationError(_BINDS)
            self._joined = bind
            self._guarding = False
            self._elsewhere = self._was_elsewhere = True
        super().__init__(**options)

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if not issubclass(cls, Session):
            return  # another mixin
        bases = cls.__mro__
        mixin = bases.index(RoutingMixin)
        if mixin > bases.index(Session):
            raise ConfigurationError(f"{cls.__name__}: RoutingMixin comes first, before the session class")
        choosing = [base for base in bases if "get_bind" in vars(base) and base not in (RoutingMixin, Session)]
        if any(base.__module__ == "sqlalchemy.ext.horizontal_shard" for base in choosing):
            raise ConfigurationError(f"{cls.__name__}: a ShardedSession has no engine that a router could stand for")
        cls._overridden = bool(choosing)
        cls._elsewhere = any(bases.index(base) > mixin for base in choosing)

        def listen(name: str, listener: Callable[..., None], **how: Any) -> None:
            if not any(event.contains(base, name, listener) for base in bases if issubclass(base, Session)):
                event.listen(cls, name, listener, **how)

        listen("after_transaction_end", _after_transaction_end)
        listen("loaded_as_persistent", stale_writes.loaded, raw=True)
        listen("before_flush", stale_writes.flush_begins)
        if choosing:
            listen("after_begin", _after_begin)

    def run_under(self, run: Run, commit_check: CommitCheck | None) -> None:
        """Make this session's units part of a run of Router.run_transaction()."""
        self._run, self._commit_check = run, commit_check

    @property
    def spans_databases(self) -> bool:
        """Whether statements of this session may have gone to other engines than the router's."""
        return self._was_elsewhere

    def serves(self, mapper: Mapper[Any], connection: Connection) -> bool:
        """Return whether this connection of the unit leads to the rows of a mapper."""
        return not (self._elsewhere or self._overridden) or self.get_bind(mapper) is connection.engine

    @property
    def consistency_token(self) -> str | None:
        """The token of this session's commits, for another session's `after`.

        It is None if the session has committed nothing and began without a token. A unit that has not ended does not count,
        because its commit is still to come. The token costs at most one query on the writer, and nothing if nothing was written
        since the last time.
        """
        unit = self._unit
        if unit is not None and not unit.noted and (unit.may_have_committed or unit.unseen_end() is not None):
            # The unit may have committed by a text, in autocommit, or on the driver's own connection.
            self.router.causality.committed(unit)
        return self.router.token(self._past)

    # -- where a statement goes -----------------------------------------------------------------------------------

    def get_bind(
        self,
        mapper: type[Any] | Mapper[Any] | None = None,
        *,
        clause: ClauseElement | None = None,
        bind: Engine | Connection | None = None,
        read_only: bool | None = None,
        **options: Any,
    ) -> Engine | Connection:
        """Return the engine of the unit's instance, after connecting the unit there. `read_only` counts for one statement."""
        if bind is not None:
            return bind
        if self._in_bulk is not None:
            return self._checked_bind(mapper, clause)
        if self._elsewhere:
            other = self._other_engine(mapper, clause, options)
            if other is not None:
                return other
            if self._joined is not None:
                return self._joined
        unit = self._current_unit()
        if read_only is False and unit.read_only:
            unit.hint = "writer"
        instance = unit.instance
        if instance is not None and (unit.on_writer or unit.read_only):
            engine = self.router.engine(instance)
        else:
            engine = self._engine_for(unit, mapper, clause, read_only)
        call = self._call
        if call is not None and call.left is None:
            call.left = self._left
        return engine

    def _engine_for(self, unit: Unit, mapper: Any, clause: Any, read_only: bool | None) -> Engine:
        """Connect a unit that has no instance yet, or may have to leave its reader. Return its engine."""
        if mapper is None and clause is None and self._call is not None:
            # SQLAlchemy passes neither for some statements, for example a union of mapped columns.
            clause = self._call.statement
        if mapper is None and clause is None:
            return self.router.writer_engine()  # the caller wants to look at an engine, not to connect
        if clause is not None and self._call is not None and self._call.listeners_made is not None:
            clause = self._call.listeners_made
        if unit.read_only:
            return self._enter(unit, Reason.HINT if unit.hint == "writer" or self._names_writer(clause) else None)
        judging: Engine | None = None
        reason: Reason | None = None
        # A text() is the same on every engine. So most texts that write are known before a reader is chosen.
        if isinstance(clause, TextClause) and unit.read_only is None and read_only is None and unit.hint is None:
            if clause.text in self.router.gate.writes:
                return self._move(unit, Reason.NOT_A_READ)
            judging = self.router.connected_writer_engine()
            if judging is not None:
                reason = self._judge(unit, clause, judging, False)
        if reason is None:
            reason = self._reason_to_write(unit, clause, read_only)
        if reason is None and unit.instance is None:

            def judge(engine: Engine, thorough: bool) -> Reason | None:
                return self._judge(unit, clause, engine, thorough) if thorough or judging is None else None

            return self._enter(unit, None, judge=judge)
        if reason is None:
            engine = self._engine(unit)
            reason = self._judge(unit, clause, engine, False) if judging is None else None
            if reason is None:
                return engine
        return self._move(unit, reason)

    def _checked_bind(self, mapper: Any, clause: Any) -> Engine | Connection:
        """Return the engine of a bulk statement, after checking the objects that it writes.

        This happens within the transaction that SQLAlchemy rolls back if this raises StaleRead. A statement to another database,
        or a listener's read, leaves the check to the first statement that writes to the cluster.
        """
        states, self._in_bulk = self._in_bulk or [], None
        engine = self.get_bind(mapper, clause=clause)
        unit = self._unit
        if unit is not None and unit.instance is not None and unit.on_writer and engine is self._engine(unit):
            stale_writes.check_bulk(self, Session.connection(self, bind_arguments={"bind": engine}), states)
        else:
            self._in_bulk = states
        return engine

    def _reason_to_write(self, unit: Unit, clause: Any, read_only: bool | None) -> Reason | None:
        """Return why the unit must be on the writer for this clause; None if it may be a read, as the text will show."""
        if unit.read_only is False or read_only is False:
            return Reason.DECLARED_WRITE
        if unit.hint == "writer":
            return Reason.HINT
        if clause is None or _is_no_read(clause) or self.twophase or self.in_nested_transaction():
            return Reason.NOT_A_READ  # a flush, connection(), or SQL that says so itself
        if unit.run is not None and unit.run.on_writer:
            return Reason.STALE_READ
        if self._prepares or self._flush_context is not None or (self._call is not None and self._call.of_write):
            # The rows that merge(), delete(), a flush or a bulk statement loads decide what is written.
            return Reason.NOT_A_READ
        if unit.instance is None and self.router.above_read_committed(self._isolation()):
            return Reason.ISOLATION
        if read_only:
            unit.hint = "reader"
        return None

    def _judge(self, unit: Unit, clause: Any, engine: Engine, thorough: bool) -> Reason | None:
        """Return why the unit must be on the writer for the text that this engine would send.

        It is None if the text may be a read, or is not known yet. Then the gate looks at the text.
        """
        gate = self.router.gate
        key = None if thorough or gate.learned else key_of(clause)
        if key is not None and key in gate.reads:
            return None
        call = self._call
        parameters = translation = None
        if call is not None:
            parameters = call.parameters
            translation = self._option("schema_translate_map", clause, call.options)
        text = text_of(clause, parameters, engine, translation, thorough=thorough)
        if text is None:
            return None
        reason = gate.reason_to_write(text, unit, thorough)
        if reason is None:
            if key is not None:
                gate.note_read(key, text)
        elif isinstance(clause, TextClause):
            gate.note_write(clause.text, text)
        return reason

    def _names_writer(self, clause: Any) -> bool:
        """Whether the text of a text() has a hint that asks for the writer."""
        text = clause.text if isinstance(clause, TextClause) else ""
        return "@writer" in text and verdict(text, self.router.gate.dialect).hint == "writer"

    def _isolation(self) -> str | None:
        level: str | None = self.execution_options.get("isolation_level")
        return level

    def _current_unit(self) -> Unit:
        """The unit of the transaction that is under way, or a new one."""
        transaction = self.get_transaction()
        unit = self._unit
        if unit is None or transaction is None or self._unit_of is not transaction:
            self._unit_of = transaction
            unit = self._unit = Unit(self._read_only)
            unit.of_session = True
            self.router.causality.begin(unit, self._past)
            if self._run is not None:
                unit.run = self._run
            if self._commit_check is not None:
                unit.check = self._commit_check
        call = self._call
        unit.hint = call.route if call is not None else None
        return unit

    def _engine(self, unit: Unit) -> Engine:
        assert unit.instance is not None
        return self.router.engine(unit.instance)

    def _enter(
        self,
        unit: Unit,
        write: Reason | None,
        options: Mapping[str, Any] | None = None,
        judge: Judge | None = None,
    ) -> Engine:
        """Connect the unit where it belongs; the connection joins the session's transaction."""
        if options or self.execution_options:
            unit.isolation = (options.get("isolation_level") if options else None) or self._isolation()
        door = _BySession(self, options, judge)
        try:
            connection = self.router.enter(unit, door, write)
        except NotARead:
            # A listener has sent more than reads and settings. Its statements belong to the unit, so the unit must move.
            where = f"{door.engine.url.host}:{door.engine.url.port}"
            self.router.dispatcher.publish(events.MovedByListener(where, unit=unit.number))
            _leave(self, door.engine)
            connection = self.router.enter(unit, door, Reason.NOT_A_READ)
        self._unit_of = self.get_transaction()
        if unit.on_writer and not unit.read_only:
            if unit.read_only is False:
                unit.wrote = True  # because it is declared, whatever its texts look like
            stale_writes.on_writer(unit, connection)
        return connection.engine

    def _move(self, unit: Unit, reason: Reason, options: Mapping[str, Any] | None = None) -> Engine:
        """Move the unit from its reader, if it has one, to the writer, where it stays."""
        left = unit.instance
        if left is not None:
            connection = _connection_to(self, self._engine(unit))
            if connection is not None and not connection.invalidated:
                refuse_inherited(connection.connection)
            self._leave_place(unit)
            if self.router.dispatcher.listeners:
                self.router.dispatcher.publish(events.Moved(left.id, reason, unit=unit.number))
        return self._enter(unit, reason, options)

    def _leave_place(self, unit: Unit) -> None:
        """Take the unit's connection out of the session's transaction, unless rows are still to be read from it."""
        if not unit.streaming:
            _leave(self, self._engine(unit))
        self._left += 1
        unit.instance = None

    def _other_engine(self, mapper: Any, clause: Any, options: dict[str, Any]) -> Engine | Connection | None:
        """Return the engine that `binds` or the class mixed in chooses for this mapper or clause; None for the cluster."""
        found = self._chosen(mapper, clause=clause, **options)
        stand_in = self.router.stand_in
        if isinstance(found, Engine) and found.pool is stand_in.pool:
            own = stand_in.get_execution_options()
            self._choose_options({k: v for k, v in found.get_execution_options().items() if k not in own or own[k] != v})
            return None
        if found is self._joined or (type(self)._elsewhere and self._stands_for_the_cluster(found)):
            self._choose_options({})
            return None
        return found

    def _chosen(self, *arguments: Any, **options: Any) -> Engine | Connection:
        """Return the engine that the session would use without the mixin, or the router's stand-in if it would have none."""
        self._bind = self.router.stand_in if self._joined is None else self._joined
        try:
            return super().get_bind(*arguments, **options)
        finally:
            self._bind = self._joined

    def _choose_options(self, options: Mapping[str, Any]) -> None:
        """Give the unit's connection these execution options, until the class mixed in chooses others.

        options: those that the class has given the cluster's engine.

        Raises ConfigurationError for an isolation level, because it would come too late.
        """
        before = self._chosen_options
        if options == before:
            return
        if "isolation_level" in options:
            raise ConfigurationError(
                "get_bind() chooses an isolation_level for the router's cluster; give it to the Router, in engine_options, "
                "or to session.connection(execution_options=...)"
            )
        self._chosen_options = options
        unit = self._unit
        connection = _connection_to(self, self._engine(unit)) if unit is not None and unit.instance is not None else None
        if connection is not None:
            connection.execution_options(**{**dict.fromkeys(before), **options})

    def _stands_for_the_cluster(self, found: Engine | Connection) -> bool:
        """Return whether the class returns this engine without arguments, or the engine leads to the router's database.

        An engine with execution options of its own does not stand for the cluster, because it may mean another schema.
        """
        if type(found) is not Engine:
            return False
        try:
            usual = self._chosen()
        except Exception:
            usual = None  # a class that needs a mapper to answer has no usual engine
        return found is usual or self.router.is_database(found.url)

    @property
    def bind(self) -> Engine | Connection | None:
        """The Connection that the session was made with and on which everything runs; None without one.

        Raises ConfigurationError if it is set to anything else, because that would change nothing.
        """
        return self._bind

    @bind.setter
    def bind(self, bind: Engine | Connection | None) -> None:
        if bind is not self._joined:
            raise ConfigurationError(f"bind: {_BINDS}")
        self._bind = bind

    def bind_mapper(self, mapper: Any, bind: Any) -> None:
        """As Session.bind_mapper(): this mapper's statements go to that engine and are not routed."""
        self._elsewhere = self._was_elsewhere = True
        super().bind_mapper(mapper, bind)

    def bind_table(self, table: Any, bind: Any) -> None:
        """As Session.bind_table(): this table's statements go to that engine and are not routed."""
        self._elsewhere = self._was_elsewhere = True
        super().bind_table(table, bind)

    # -- statements that may have to be retried -------------------------------------------------------------------

    # Type checkers see the Session's own methods, with all their overloads.
    if not TYPE_CHECKING:
        execution_options: Mapping[str, Any] = getattr(Session, "execution_options", {})  # SQLAlchemy 2.0 has none

        def execute(self, statement: Any, params: Any = None, **options: Any) -> Any:
            """As Session.execute()."""
            return self._repeatable(super().execute, statement, params, options)

        def scalar(self, statement: Any, params: Any = None, **options: Any) -> Any:
            """As Session.scalar()."""
            return self._repeatable(super().scalar, statement, params, options)

        def scalars(self, statement: Any, params: Any = None, **options: Any) -> Any:
            """As Session.scalars()."""
            return self._repeatable(super().scalars, statement, params, options)

        def merge(self, instance: Any, *, load: bool = True, **options: Any) -> Any:
            """As Session.merge(); what it loads comes from the writer."""
            return self._preparing(super().merge, instance, load=load, **options)

        def merge_all(self, instances: Iterable[Any], *, load: bool = True, **options: Any) -> Any:
            """As Session.merge_all(), which SQLAlchemy 2.0 has not; what it loads comes from the writer."""
            return self._preparing(super().merge_all, instances, load=load, **options)

        def delete(self, instance: object) -> None:
            """As Session.delete(); the collections that it loads come from the writer."""
            self._preparing(super().delete, instance)

        def delete_all(self, instances: Iterable[object]) -> None:
            """As Session.delete_all(), which SQLAlchemy 2.0 has not; the collections that it loads come from the writer."""
            self._preparing(super().delete_all, instances)

    def _preparing(self, prepare: Callable[..., R], *arguments: Any, **options: Any) -> R:
        outer, self._prepares = self._prepares, True
        try:
            return prepare(*arguments, **options)
        finally:
            self._prepares = outer

    def _repeatable(self, execute: Callable[..., R], statement: Any, params: Any, options: dict[str, Any]) -> R:
        outer = self._call
        given = options.get("execution_options")
        of_write = options.get("_add_event") is not None  # only bulk statements use it; a scoped_session gives None
        route = self._option("route", statement, given)
        self._call = call = _Call(statement, params, given, route, of_write)
        if self.dispatch.do_orm_execute and not of_write:
            options["_add_event"] = self._after_listeners
        is_update = type(params) is list and getattr(statement, "is_update", False)
        if is_update:
            self._in_bulk = self._named_in(statement, params)
        elif self._guarding and not isinstance(params, list) and stale_writes.is_by_values(self, statement, given):
            options["execution_options"] = {**(given or {}), "synchronize_session": "fetch"}
        try:
            while True:
                call.left = None
                try:
                    result = execute(statement, params, **options)
                    unit = self._unit
                    if unit is not None and not unit.handed_out:
                        unit.read_at = time.monotonic()
                    return result
                except Exception as error:
                    if self._recovered(error, call):
                        continue
                    if isinstance(error, StaleDataError):
                        self._note_refused(error)
                    own = error.orig if type(error) is StatementError else None
                    if isinstance(own, RouterError):  # raised when a parameter loaded something
                        raise own from own.__cause__
                    raise
        finally:
            self._call = outer
            if is_update:
                self._in_bulk = None

    def _named_in(self, statement: Any, parameters: list[Any]) -> list[InstanceState[Any]] | None:
        """Return the objects to check whose rows an UPDATE of the ORM names by primary key; None without any."""
        mapper = stale_writes.mapper_of(statement) if self._guarding else None
        return stale_writes.named(self, mapper, parameters) or None if mapper is not None else None

    def _after_listeners(self, state: ORMExecuteState) -> None:
        """Note the statement and options that the application's listeners of do_orm_execute have left. This one comes last."""
        call = self._call
        assert call is not None
        call.listeners_made = state.statement
        call.parameters, call.options = state.parameters, state.local_execution_options
        call.route = self._option("route", state.statement, call.options)

    def _option(self, name: str, statement: Any, given: Mapping[str, Any] | None) -> Any:
        """Return an execution option of a statement, by SQLAlchemy's order of precedence; None without one."""
        own = getattr(statement, "_execution_options", None)
        options = self.execution_options
        if not (given or own or options):
            return None
        value = given.get(name) if given else None
        if value is None and own:
            value = own.get(name)
        if value is None:
            value = options.get(name)
        if value is not None and name == "route":
            config.check_route(value)
        return value

    def _recovered(self, error: Exception, call: _Call) -> bool:
        """Move the unit if a retry elsewhere may succeed. Return whether the statement can be retried."""
        unit = self._unit
        if unit is None or unit.instance is None:
            return False
        if call.left is not None and call.left != self._left and _lacks_connection(error):
            # The unit has moved because the statement's parameters loaded something. Nothing of the statement was sent.
            return True
        if isinstance(error, NotARead) and not unit.on_writer:
            self._move(unit, error.reason)
            return True
        if not isinstance(error, DBAPIError) or isinstance(error, RouterError) or error.statement is not unit.text:
            return False  # an error of another engine, or of no database at all
        transaction = self.get_transaction()
        if transaction is not None and not transaction.is_active:
            return False  # an error of a flush, after which SQLAlchemy has rolled back
        action = self.router.failed_read(unit, error)
        if action is Action.TO_WRITER:
            self._move(unit, Reason.NOT_A_READ)
            return True
        if action in (Action.REPEAT_ELSEWHERE, Action.REPEAT_UNPREPARED) and not self.in_nested_transaction():
            self.router.causality.left(unit)
            unit.text = None
            self._leave_place(unit)
            unit.on_writer = False
            return True  # get_bind() finds another place for it
        return False

    def connection(
        self,
        bind_arguments: dict[str, Any] | None = None,
        execution_options: CoreExecuteOptionsParameter | None = None,
    ) -> Connection:
        """As Session.connection(). A unit that is not read-only gets a connection to the writer."""
        if self._joined is None and (bind_arguments is None or not bind_arguments.get("bind")):
            unit = self._current_unit()
            if not ((self._elsewhere or self._overridden) and bind_arguments) and self._enter_for_keeps(unit, execution_options):
                execution_options = None
            unit.read_at, unit.handed_out = None, True
            unit.only_reads = False
            unit.leaves_traces = True
            connection = super().connection(bind_arguments, execution_options)
            watch(connection, self.router.gate.driver)
            is_whole = not connection.invalidated and unit.instance is not None and connection.engine is self._engine(unit)
            if is_whole and unit.on_writer and not unit.read_only:
                unit.wrote = True  # because the user may do anything with the connection
                self.router.gate.hand_out(unit, connection.connection)
            return connection
        return super().connection(bind_arguments, execution_options)

    def begin(self, nested: bool = False) -> SessionTransaction:
        """As Session.begin(): a savepoint needs a transaction, so an automatic unit moves to the writer."""
        if nested and self._joined is None:
            if self.get_transaction() is None:
                # SQLAlchemy begins here, too, even if autobegin=False keeps anything else from beginning.
                super().begin()
            unit = self._current_unit()
            self._enter_for_keeps(unit)
            unit.only_reads = False
        return super().begin(nested)

    def flush(self, *args: Any, **options: Any) -> None:
        """As Session.flush(); objects that were read from a reader are looked up on the writer before any is written."""
        self._unchecked = self._guarding
        if self._guarding:
            stale_writes.listen_last(self)
        try:
            super().flush(*args, **options)
        except StaleDataError as error:
            self._note_refused(error)
            raise
        finally:
            self._flush_context = None

    def _note_refused(self, error: StaleDataError) -> None:
        """Note in the error what it means: others have deleted a row, or given it another version."""
        if self._run is not None:
            setattr(error, FACTS, self._run.refused())

    def bulk_save_objects(self, objects: Iterable[object], *args: Any, **options: Any) -> None:
        """As Session.bulk_save_objects(); objects that were read from a reader are looked up on the writer before."""
        given = [*objects]
        self._bulk(
            lambda: stale_writes.marked(given),
            lambda: super(RoutingMixin, self).bulk_save_objects(given, *args, **options),
        )

    def bulk_update_mappings(self, mapper: Any, mappings: Iterable[dict[str, Any]]) -> None:
        """As Session.bulk_update_mappings(); objects of these rows that came from a reader are looked up on the writer before."""
        given = [*mappings]
        self._bulk(
            lambda: stale_writes.named(self, inspect(mapper), given),
            lambda: super(RoutingMixin, self).bulk_update_mappings(mapper, given),
        )

    def _bulk(self, touched: Callable[[], list[InstanceState[Any]]], write: Callable[[], None]) -> None:
        self._in_bulk = (touched() or None) if self._guarding else None
        try:
            write()
        except StaleDataError as error:
            self._note_refused(error)
            raise
        finally:
            self._in_bulk = None

    def _enter_for_keeps(self, unit: Unit, options: Any = None) -> bool:
        """Bring the unit to where it can stay: a read-only one to its instance, any other to the writer.

        Return whether the unit went there just now.
        """
        if unit.read_only:
            if unit.instance is not None:
                return False
            self._enter(unit, None, options)
            return True
        if unit.on_writer and unit.instance is not None:
            return False
        self._move(unit, Reason.NOT_A_READ, options)
        return True


# Type checkers require `router`. At runtime its absence must raise an error that says what to write, not a bare TypeError.
_init: Any = RoutingMixin.__init__
_init.__kwdefaults__["router"] = None


class RoutingSession(RoutingMixin, Session):
    """A SQLAlchemy Session that is routed: `sessionmaker(class_=RoutingSession, router=router)`.

    Arguments and errors are those of RoutingMixin.
    """


def _is_no_read(clause: Any) -> bool:
    """Return whether a statement is certainly not a read, whatever its text."""
    return (
        getattr(clause, "is_dml", False)
        or getattr(clause, "_for_update_arg", None) is not None
        or isinstance(clause, (ExecutableDDLElement, Sequence))
    )


def _lacks_connection(error: Exception) -> bool:
    """Return whether this may be the error of a statement that lost its connection before it was sent."""
    return isinstance(error, (StatementError, ResourceClosedError, NotARead)) and not isinstance(error, DBAPIError)


def _connection_to(session: Session, engine: Engine) -> Connection | None:
    """Return the connection to this engine that the session's transaction has; None if it has none.

    SQLAlchemy has no public way: SessionTransaction._connections maps both the engine and the connection to
    (connection, transaction, should_commit, autoclose). This is so in 2.0 and 2.1, and a test for each version makes sure of it.
    """
    transaction = session.get_transaction()
    entry = transaction._connections.get(engine) if transaction is not None else None
    return entry[0] if entry is not None else None


def _leave(session: Session, engine: Engine, *, invalidate: bool = False) -> None:
    """Take the connection to this engine out of the session's transaction and back to its pool. See _connection_to()."""
    transaction, connection = session.get_transaction(), _connection_to(session, engine)
    if transaction is None or connection is None:
        return
    if invalidate:
        connection.invalidate()
    connection.close()
    # This comes last: if close() is interrupted, the session still has the connection and closes it itself.
    for key in (engine, connection):
        transaction._connections.pop(key, None)
