"""RoutingSession: a SQLAlchemy Session whose units of work go to the instance that they need.

The session stays SQLAlchemy's. What is added: get_bind() enters the unit where it belongs, execute() and its kin repeat a
statement that had to move, and a commit leaves a requirement behind. What touches SQLAlchemy's private attributes is in the
function _leave(), and nowhere else.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Never, TypeVar

from sqlalchemy import event
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.exc import DBAPIError, UnboundExecutionError
from sqlalchemy.orm import Session, SessionTransaction

from aurora_router import guard
from aurora_router.core import events
from aurora_router.core.failures import Action
from aurora_router.core.selection import Reason
from aurora_router.errors import ConfigurationError
from aurora_router.router import Router
from aurora_router.unit import CommitCheck, Door, NotARead, Past, Run, Unit

if TYPE_CHECKING:
    from sqlalchemy.engine.interfaces import CoreExecuteOptionsParameter
    from sqlalchemy.orm import Mapper
    from sqlalchemy.sql import ClauseElement

    _Base = Session
else:
    _Base = object

R = TypeVar("R")


def _after_transaction_end(session: Session, transaction: SessionTransaction) -> None:
    """A unit leaves behind what it has written and read, however it ends."""
    assert isinstance(session, RoutingMixin)
    unit = session._unit
    if unit is None or transaction.parent is not None:
        return
    session.router.causality.ended(unit)
    session._unit = session._unit_of = None  # the transaction knows its session: together they would wait for the collector


class RoutingMixin(_Base):
    """What makes a Session class a routing one: `class MySession(RoutingMixin, SQLModelSession)`.

    router: the Router. read_only: True: one reader and one read-only transaction a unit; False: the writer; None: the router
    decides, reads before the first other statement run on a reader in autocommit. commit_check: what an OutcomeUnknown of this
    session asks by, "xid" or "table", at the price of one more round trip a commit (see Router.run_transaction()); None: it
    cannot tell. after: a consistency token; what it speaks of is seen by every read. Other arguments are the Session's;
    `binds` may send some mappers to other engines, `bind` is not accepted.
    """

    router: Router
    _run: Run | None = None
    _commit_check: CommitCheck | None
    _read_only: bool | None
    _unit: Unit | None
    _unit_of: SessionTransaction | None
    _past: Past
    _hint: Any
    _statement: Any  # the one that is being executed
    _elsewhere: bool
    _guarding: bool
    _unchecked = False  # what the flush that is under way is to write

    def __init__(
        self,
        *args: Never,
        router: Router,
        read_only: bool | None = None,
        commit_check: CommitCheck | None = None,
        after: str | None = None,
        **options: Any,
    ) -> None:
        if args or options.get("bind") is not None:
            raise ConfigurationError("a routing session gets its engines from the router; leave out bind")
        if not isinstance(router, Router):
            raise ConfigurationError("router= must be a Router")
        if read_only is not True and read_only is not False and read_only is not None:  # 0 is neither
            raise ConfigurationError(f"read_only={read_only!r}: use True, False or None")
        if commit_check not in ("xid", "table", None):
            raise ConfigurationError(f'commit_check={commit_check!r}: use "xid", "table" or None')
        self.router = router
        self._read_only = read_only
        self._commit_check = commit_check
        self._past = Past() if after is None else router.past(after)
        self._unit = self._unit_of = self._hint = self._statement = None
        self._elsewhere = bool(options.get("binds"))
        self._guarding = router.stale_write_guard
        super().__init__(**options)

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        listening = any(
            event.contains(base, "after_transaction_end", _after_transaction_end)
            for base in cls.__mro__
            if issubclass(base, Session)
        )
        if issubclass(cls, Session) and not listening:
            event.listen(cls, "after_transaction_end", _after_transaction_end)
            event.listen(cls, "loaded_as_persistent", guard.loaded, raw=True)

    def run_under(self, run: Run, commit_check: CommitCheck | None) -> None:
        """Have this session's units belong to a run of Router.run_transaction()."""
        self._run, self._commit_check = run, commit_check

    @property
    def spans_databases(self) -> bool:
        """Whether `binds` may send statements of a unit to other engines than the router's."""
        return self._elsewhere

    @property
    def consistency_token(self) -> str | None:
        """What a later reader must have replayed to show what this session has committed, for another session's `after`.

        None where it has committed nothing, and was given nothing. Costs at most one query on the writer, and only when
        something was written since it was asked last. Not for a unit that has not ended: its commit is still to come.
        """
        unit = self._unit
        if unit is not None and unit.may_have_committed and not unit.noted:  # as text, or in autocommit
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
        """The engine of the instance where the unit is, after entering it there. `read_only` speaks for one statement."""
        if bind is not None:
            return bind
        if self._elsewhere:
            other = self._other_engine(mapper, clause, options)
            if other is not None:
                return other
        unit = self._current_unit()
        if unit.instance is not None and (unit.on_writer or unit.read_only):
            return self._engine(unit)
        if mapper is None and clause is None:
            clause = self._statement  # SQLAlchemy passes neither for some statements: a union of mapped columns
        if mapper is None and clause is None:
            return self.router.writer_engine()  # somebody wants to look at an engine, not to connect
        if unit.read_only:
            return self._enter(unit, None)
        reason = self._reason_to_write(unit, clause, read_only)
        if reason is None:
            return self._engine(unit) if unit.instance is not None else self._enter(unit, None)
        return self._move(unit, reason)

    def _reason_to_write(self, unit: Unit, clause: Any, read_only: bool | None) -> Reason | None:
        """Why the unit must be on the writer for this clause; None when it may be a read, which the text will tell."""
        if unit.read_only is False or read_only is False:
            return Reason.DECLARED_WRITE
        if unit.hint == "writer":
            return Reason.HINT
        if clause is None or getattr(clause, "is_dml", False) or self.twophase or self.in_nested_transaction():
            return Reason.NOT_A_READ  # a flush, connection(), or SQL that says so itself
        if unit.run is not None and unit.run.stale:
            return Reason.STALE_READ
        if unit.instance is None and self.router.above_read_committed(self._isolation()):
            return Reason.ISOLATION
        if read_only:
            unit.hint = "reader"
        return None

    def _isolation(self) -> str | None:
        options: Mapping[str, Any] = getattr(self, "execution_options", {})  # new in SQLAlchemy 2.1
        level: str | None = options.get("isolation_level")
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
            unit.run, unit.check = self._run, self._commit_check
        unit.hint = self._hint
        return unit

    def _engine(self, unit: Unit) -> Engine:
        assert unit.instance is not None
        return self.router.engine(unit.instance)

    def _enter(self, unit: Unit, write: Reason | None, options: Mapping[str, Any] | None = None) -> Engine:
        """Connect the unit where it belongs; the connection joins the session's transaction."""

        reached: list[Engine] = []

        def connect(engine: Engine) -> Connection:
            reached.append(engine)
            return Session.connection(self, bind_arguments={"bind": engine}, execution_options=options)

        unit.isolation = (options or {}).get("isolation_level") or self._isolation()
        door: Door[Connection] = Door(
            connect,
            lambda connection: connection.connection,
            lambda connection: _leave(self, connection.engine, invalidate=True),
        )
        try:
            connection = self.router.enter(unit, door, write)
        except NotARead:  # a listener of after_begin has sent more than reads: what it set belongs to the unit
            _leave(self, reached[-1])
            connection = self.router.enter(unit, door, Reason.NOT_A_READ)
        self._unit_of = self.get_transaction()
        if unit.on_writer and not unit.read_only:
            guard.on_writer(unit, connection)
        return connection.engine

    def _move(self, unit: Unit, reason: Reason, options: Mapping[str, Any] | None = None) -> Engine:
        """Move the unit from its reader, if it has one, to the writer, where it stays."""
        left = unit.instance
        if left is not None:
            if not unit.streaming:
                _leave(self, self.router.engine(left))
            self.router.emit(events.Moved, left.id, reason)
        unit.instance = None
        return self._enter(unit, reason, options)

    def _other_engine(self, mapper: Any, clause: Any, options: dict[str, Any]) -> Engine | Connection | None:
        """What `binds` say of this mapper or clause."""
        try:
            return super().get_bind(mapper, clause=clause, **options)
        except UnboundExecutionError:
            return None

    def bind_mapper(self, mapper: Any, bind: Any) -> None:
        """As Session.bind_mapper(): this mapper's statements go to that engine and are not routed."""
        self._elsewhere = True
        super().bind_mapper(mapper, bind)

    def bind_table(self, table: Any, bind: Any) -> None:
        """As Session.bind_table(): this table's statements go to that engine and are not routed."""
        self._elsewhere = True
        super().bind_table(table, bind)

    # -- statements that may have to be repeated ------------------------------------------------------------------

    if not TYPE_CHECKING:  # for type checkers these are the Session's own, with all their overloads

        def execute(self, statement: Any, params: Any = None, **options: Any) -> Any:
            """As Session.execute()."""
            return self._repeatable(super().execute, statement, params, options)

        def scalar(self, statement: Any, params: Any = None, **options: Any) -> Any:
            """As Session.scalar()."""
            return self._repeatable(super().scalar, statement, params, options)

        def scalars(self, statement: Any, params: Any = None, **options: Any) -> Any:
            """As Session.scalars()."""
            return self._repeatable(super().scalars, statement, params, options)

    def _repeatable(self, call: Callable[..., R], statement: Any, params: Any, options: dict[str, Any]) -> R:
        outer = self._statement, self._hint
        self._statement, self._hint = statement, _route(statement, options)
        try:
            while True:
                try:
                    result = call(statement, params, **options)
                    unit = self._unit
                    if unit is not None and not unit.handed_out:
                        unit.read_at = time.monotonic()
                    return result
                except Exception as error:
                    if not self._recovered(error):
                        raise
        finally:
            self._statement, self._hint = outer

    def _recovered(self, error: Exception) -> bool:
        """Whether the unit has been brought to another place, where the statement may be repeated."""
        unit = self._unit
        if unit is None or unit.instance is None:
            return False
        if isinstance(error, NotARead) and not unit.on_writer:
            self._move(unit, error.reason)
            return True
        if not isinstance(error, DBAPIError) or error.statement is not unit.text:
            return False  # another engine's, or not the database's at all
        action = self.router.failed_read(unit, error)
        if action is Action.TO_WRITER:
            self._move(unit, Reason.NOT_A_READ)
            return True
        if action is Action.REPEAT_ELSEWHERE and not self.in_nested_transaction():
            self.router.causality.left(unit)
            unit.text = None
            if not unit.streaming:
                _leave(self, self.router.engine(unit.instance))
            unit.instance = None
            unit.on_writer = False
            return True  # get_bind() finds another place for it
        return False

    def connection(
        self,
        bind_arguments: dict[str, Any] | None = None,
        execution_options: CoreExecuteOptionsParameter | None = None,
    ) -> Connection:
        """As Session.connection(): in a unit that is not read-only, the writer's."""
        if bind_arguments is None or not bind_arguments.get("bind"):
            unit = self._current_unit()
            if not (self._elsewhere and bind_arguments) and self._enter_for_keeps(unit, execution_options):
                execution_options = None
            unit.read_at, unit.handed_out = None, True
            if unit.on_writer:
                unit.wrote = True  # whatever is done with the connection
            unit.only_reads = False
        return super().connection(bind_arguments, execution_options)

    def begin_nested(self) -> SessionTransaction:
        """As Session.begin_nested(): a savepoint needs a transaction, so an automatic unit moves to the writer."""
        unit = self._current_unit()
        self._enter_for_keeps(unit)
        unit.only_reads = False
        return super().begin_nested()

    def flush(self, *args: Any, **options: Any) -> None:
        """As Session.flush(); objects that were read from a reader are looked up on the writer before any is written."""
        self._unchecked = self._guarding
        super().flush(*args, **options)

    def _enter_for_keeps(self, unit: Unit, options: Any = None) -> bool:
        """Have the unit where it can stay whatever comes: a read-only one on its instance, any other on the writer. Whether it
        went there just now."""
        if unit.read_only:
            if unit.instance is not None:
                return False
            self._enter(unit, None, options)
            return True
        if unit.on_writer and unit.instance is not None:
            return False
        self._move(unit, Reason.NOT_A_READ, options)
        return True


class RoutingSession(RoutingMixin, Session):
    """A Session for sessionmaker(class_=RoutingSession, router=router)."""


def _route(statement: Any, options: dict[str, Any]) -> Any:
    """The `route` that a statement's execution options ask for: "writer", "reader" or None."""
    given = options.get("execution_options")
    route = given.get("route") if given else None
    if route is None:
        own = getattr(statement, "_execution_options", None)
        route = own.get("route") if own else None
    if route not in (None, "writer", "reader"):
        raise ConfigurationError(f'execution option route={route!r}: use "writer" or "reader"')
    return route


def _leave(session: Session, engine: Engine, *, invalidate: bool = False) -> None:
    """Take the connection to this engine out of the session's transaction and back to its pool.

    SQLAlchemy has no public way: SessionTransaction._connections maps both the engine and the connection to
    (connection, transaction, should_commit, autoclose). Seen in 2.0 and 2.1; a test per version holds it.
    """
    transaction = session.get_transaction()
    if transaction is None:
        return
    entry = transaction._connections.get(engine)
    if entry is not None:
        connection = entry[0]
        if invalidate:
            connection.invalidate()
        connection.close()
        for key in (engine, connection):  # last: what interrupts the closing leaves it to the session's own
            transaction._connections.pop(key, None)
