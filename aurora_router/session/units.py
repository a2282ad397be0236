"""Bring the unit of a session to an instance, and let it move."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from sqlalchemy.engine import Engine
from sqlalchemy.orm import Session, SessionTransaction

from aurora_router.cluster.connection_state import state_of
from aurora_router.core import events
from aurora_router.core.selection import Reason
from aurora_router.router import Router
from aurora_router.router_core import RouterCore
from aurora_router.routing import stale_writes
from aurora_router.routing.causal_context import CausalContext
from aurora_router.routing.connector import Judge
from aurora_router.routing.retry_context import RetryContext
from aurora_router.routing.session_state import SessionState
from aurora_router.routing.unit import CommitCheck, Intent, MustMoveToWriter, Unit
from aurora_router.session.call import Call
from aurora_router.session.connections import SessionConnector, connection_to, leave

if TYPE_CHECKING:
    _Base = Session
else:
    _Base = object


class SessionUnits(_Base):
    """The units of a session, one after another."""

    router: Router
    router_core: RouterCore  # for the library's own modules
    routing_state: SessionState  # for the library's own modules
    _unit_of: SessionTransaction | None = None  # the transaction of the session's unit
    _causal_context: CausalContext
    _call: Call | None = None  # the statement that is being executed
    _times_left = 0  # how often its units have left a place and its connection

    if not TYPE_CHECKING:
        execution_options: Mapping[str, Any] = getattr(Session, "execution_options", {})  # SQLAlchemy 2.0 has none

    def join_retry(self, retry: RetryContext, commit_check: CommitCheck | None) -> None:
        """Make this session's units part of an attempt of Router.run_transaction().

        The attempt commits, so a session that leaves its beginning to its user must begin by itself, too.
        """
        self.autobegin = True
        state = self.routing_state
        state.intent = Intent(state.intent.read_only, True, retry, commit_check)

    def _current_unit(self) -> Unit:
        """Return the unit of the transaction that is under way, or a new one."""
        transaction = self.get_transaction()
        state = self.routing_state
        unit = state.unit
        if unit is None or transaction is None or self._unit_of is not transaction:
            self._unit_of = transaction
            unit = state.unit = Unit(state.intent)
            self.router_core.causality.on_begin(unit, self._causal_context)
        call = self._call
        unit.hint = call.route if call is not None else None
        return unit

    def _on_transaction_end(self, transaction: SessionTransaction) -> None:
        """Record the unit's effects when its transaction ends."""
        state = self.routing_state
        unit = state.unit
        if unit is None or transaction.parent is not None:
            return
        self.router_core.causality.on_end(unit)
        # The transaction refers to its session. Without this, both would wait for the garbage collector.
        state.unit = self._unit_of = None

    def _engine(self, unit: Unit) -> Engine:
        assert unit.place.instance is not None
        return self.router_core.engines.engine(unit.place.instance)

    def _enter(
        self,
        unit: Unit,
        write: Reason | None,
        options: Mapping[str, Any] | None = None,
        judge: Judge | None = None,
    ) -> Engine:
        """Connect the unit where it belongs; the connection joins the session's transaction."""
        if options or self.execution_options:
            given = options.get("isolation_level") if options else None
            unit.isolation = given or self.execution_options.get("isolation_level")
        connector = SessionConnector(self, options, judge)
        try:
            connection = self.router_core.acquire(unit, connector, write)
        except MustMoveToWriter:
            # A listener has sent more than reads and settings. Its statements belong to the unit, so the unit must move.
            where = f"{connector.engine.url.host}:{connector.engine.url.port}"
            self.router_core.dispatcher.publish(events.MovedByListener(where, **unit.numbers))
            leave(self, connector.engine)
            connection = self.router_core.acquire(unit, connector, Reason.NOT_A_READ)
        self._unit_of = self.get_transaction()
        if unit.place.on_writer and not unit.intent.read_only:
            if unit.intent.read_only is False:
                unit.wrote = True  # because it is declared, whatever its texts look like
            stale_writes.on_moved_to_writer(unit, connection)
        return connection.engine

    def _enter_to_stay(self, unit: Unit, options: Any = None) -> bool:
        """Bring the unit to where it can stay: a read-only one to its instance, any other to the writer.

        Return whether the unit went there just now.
        """
        if unit.intent.read_only:
            if unit.place.instance is not None:
                return False
            self._enter(unit, None, options)
            return True
        if unit.place.on_writer and unit.place.instance is not None:
            return False
        self._move(unit, Reason.NOT_A_READ, options)
        return True

    def _move(self, unit: Unit, reason: Reason, options: Mapping[str, Any] | None = None) -> Engine:
        """Move the unit from its reader, if it has one, to the writer, where it stays."""
        left = unit.place.instance
        if left is not None:
            connection = connection_to(self, self._engine(unit))
            if connection is not None and not connection.invalidated:
                state_of(connection.connection)  # raises for one that was open at a fork
            self._leave_place(unit)
            if self.router_core.dispatcher.listeners:
                self.router_core.dispatcher.publish(events.Moved(left.id, reason, **unit.numbers))
        return self._enter(unit, reason, options)

    def _leave_place(self, unit: Unit) -> None:
        """Take the unit's connection out of the session's transaction, unless rows are still to be read from it."""
        if not unit.streaming:
            leave(self, self._engine(unit))
        self._times_left += 1
        unit.leave()
