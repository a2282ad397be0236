"""RoutingSession: a SQLAlchemy Session that brings each unit of work to the instance that it needs.

The session stays SQLAlchemy's, with three additions. get_bind() connects the unit where it belongs. A statement is
retried if its unit had to move. A commit leaves a requirement behind.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Never

from sqlalchemy import event
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.orm import Session, SessionTransaction
from sqlalchemy.util import immutabledict

from aurora_router.config import checks
from aurora_router.errors import ConfigurationError
from aurora_router.router import Router, core_of
from aurora_router.routing import stale_writes
from aurora_router.routing.causal_context import CausalContext
from aurora_router.routing.interceptor import watch
from aurora_router.routing.session_state import SessionState
from aurora_router.routing.unit import CommitCheck, Intent
from aurora_router.session.binds import NO_BINDS
from aurora_router.session.statements import SessionStatements

if TYPE_CHECKING:
    from sqlalchemy.engine.interfaces import CoreExecuteOptionsParameter
    from sqlalchemy.orm import Mapper
    from sqlalchemy.sql import ClauseElement


class RoutingMixin(SessionStatements):
    """Make a class of sessions a routing one: `class MySession(RoutingMixin, SQLModelSession)`.

    router: the Router.
    read_only: True: one reader and one read-only transaction for each unit. False: the writer. None: the router decides. Reads
        before the first other statement then run on a reader, in autocommit.
    commit_check: "xid" or "table": how an OutcomeUnknown of this session finds out what happened. It costs one more round trip
        for each commit (see Router.run_transaction()). None: it cannot find out.
    after: a consistency token. Every read sees the writes that the token speaks of.
    options: other arguments of the Session. `binds` may send some mappers to other engines. `bind` may be a Connection, for
        tests: everything runs on it, in its transaction (see `join_transaction_mode`), and nothing is routed.

    A session class with a get_bind() of its own, such as Flask-SQLAlchemy's, still chooses the engines of other databases. The
    engine that this get_bind() returns without arguments stands for the cluster. So does any engine of the router's database.

    Raises ConfigurationError for a bad argument.
    """

    def __init__(
        self,
        *args: Never,
        router: Router,
        read_only: bool | None = None,
        commit_check: CommitCheck | None = None,
        after: str | None = None,
        **options: Any,
    ) -> None:
        if not isinstance(router, Router):
            raise ConfigurationError(f"router= must be a Router{f': {NO_BINDS}' if args else ''}")
        if read_only is not None and read_only is not True and read_only is not False:  # 0 is neither
            raise ConfigurationError(f"{checks.named('read_only', read_only)}: use True, False or None")
        if commit_check is not None and commit_check not in ("xid", "table"):
            raise ConfigurationError(f'{checks.named("commit_check", commit_check)}: use "xid", "table" or None')
        self.router = router
        self.router_core = core = core_of(router)
        self._causal_context = CausalContext() if after is None else core.tokens.context_from_token(after)
        bind = options.get("bind")
        intent = Intent(read_only, True, None, commit_check)
        self.routing_state = SessionState(intent, core.settings.stale_write_guard and bind is None)
        if options.get("binds"):
            self._elsewhere = self._was_elsewhere = True
        if bind is not None:
            if not isinstance(bind, Connection):
                raise ConfigurationError(NO_BINDS)
            self._joined = bind
            self._elsewhere = self._was_elsewhere = True
        super().__init__(*args, **options)  # Session takes one, a bind, which is refused when it is set
        if core.route is not None:
            self.execution_options = immutabledict({"route": core.route}).union(self.execution_options)

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if not issubclass(cls, Session):
            return  # another mixin
        bases = cls.__mro__
        begins_to_choose = cls._note_choosing_classes(bases.index(RoutingMixin))
        # Classes inherit listeners, so only the first class gets them. Do not ask event.contains(): it knows a class by its
        # address, which an earlier class may have had.
        if not any(issubclass(base, RoutingMixin) and issubclass(base, Session) for base in bases[1:]):
            event.listen(cls, "after_transaction_end", cls._on_transaction_end)
            event.listen(cls, "loaded_as_persistent", stale_writes.mark_loaded, raw=True)
            event.listen(cls, "before_flush", stale_writes.on_before_flush)
        if begins_to_choose:
            event.listen(cls, "after_begin", cls._on_begin)

    @property
    def consistency_token(self) -> str | None:
        """The token of this session's commits, for another session's `after`.

        It is None if the session has committed nothing and began without a token. A unit that has not ended does not count,
        because its commit is still to come. The token costs at most one query on the writer, and nothing if nothing was written
        since the last time.
        """
        unit = self.routing_state.unit
        if unit is not None and not unit.recorded and (unit.commit_started or unit.unseen_end() is not None):
            # The unit may have committed by a text, in autocommit, or on the driver's own connection.
            self.router_core.causality.on_committed(unit)
        return self.router_core.tokens.token_for(self._causal_context)

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
        if bind is not None and not self._is_of_router(bind):
            return bind
        if self._in_bulk is not None:
            return self._checked_bind(mapper, clause)
        if self._elsewhere and bind is None:
            other = self._other_engine(mapper, clause, options)
            if other is not None:
                return other
            if self._joined is not None:
                return self._joined
        unit = self._current_unit()
        if read_only is False and unit.intent.read_only:
            unit.hint = "writer"
        instance = unit.place.instance
        if instance is not None and (unit.place.on_writer or unit.intent.read_only):
            engine = self.router_core.engines.engine(instance)
        else:
            engine = self._engine_for(unit, mapper, clause, read_only)
        call = self._call
        if call is not None and call.times_left is None:
            call.times_left = self._times_left
        return engine

    def connection(
        self,
        bind_arguments: dict[str, Any] | None = None,
        execution_options: CoreExecuteOptionsParameter | None = None,
    ) -> Connection:
        """Return a connection as Session.connection() does. A unit that is not read-only gets one to the writer."""
        chosen = bind_arguments and (self._elsewhere or self._overridden or bind_arguments.get("bind"))
        if self._joined is None and not chosen and self._enter_to_stay(self._current_unit(), execution_options):
            execution_options = None
        outer, self._call = self._call, None
        try:
            return super().connection(bind_arguments, execution_options)
        finally:
            self._call = outer

    def _connection_for_bind(self, engine: Any, execution_options: Any = None, **options: Any) -> Connection:
        """Return the unit's connection for each of the router's engines, unless it is for a statement of the session.

        Session.connection() calls this, also if a class that is mixed in calls super().connection().
        """
        if self._call is not None or not self._is_of_router(engine):
            return super()._connection_for_bind(engine, execution_options, **options)
        unit = self._current_unit()
        if self._enter_to_stay(unit, execution_options):
            execution_options = None
        unit.read_at, unit.connection_exposed = None, True
        unit.only_reads = False
        unit.leaves_traces = True
        connection = super()._connection_for_bind(self._engine(unit), execution_options, **options)
        watch(connection, self.router_core.interceptor.driver)
        if unit.place.on_writer and not unit.intent.read_only and not connection.invalidated:
            unit.wrote = True  # because the user may do anything with the connection
            self.router_core.interceptor.hand_out(unit, connection.connection)
        return connection

    def begin(self, nested: bool = False) -> SessionTransaction:
        """Begin as Session.begin() does. A savepoint needs a transaction, so it moves an automatic unit to the writer."""
        if nested and self._joined is None:
            if self.get_transaction() is None:
                # SQLAlchemy begins here, too, even if autobegin=False keeps anything else from beginning.
                super().begin()
            unit = self._current_unit()
            self._enter_to_stay(unit)
            unit.only_reads = False
        return super().begin(nested)


# Type checkers require `router`. At runtime its absence must raise an error with advice, not a bare TypeError.
_init: Any = RoutingMixin.__init__
_init.__kwdefaults__["router"] = None


class RoutingSession(RoutingMixin, Session):
    """A SQLAlchemy Session that is routed: `sessionmaker(class_=RoutingSession, router=router)`.

    Arguments and errors are those of RoutingMixin.
    """
