"""Decide for each statement of a session where its unit must be, and whether it can be retried."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from sqlalchemy import TextClause
from sqlalchemy.engine import Engine
from sqlalchemy.exc import DBAPIError, ResourceClosedError, StatementError
from sqlalchemy.orm import ORMExecuteState
from sqlalchemy.orm.exc import StaleDataError

from aurora_router.config import checks
from aurora_router.core.read_retry import ReadStep
from aurora_router.core.selection import Reason
from aurora_router.core.sql.analysis import analyze
from aurora_router.errors import RouterError
from aurora_router.routing import stale_writes
from aurora_router.routing.unit import NOWHERE, MustMoveToWriter, Unit
from aurora_router.session.call import Call, is_no_read
from aurora_router.session.texts import key_of, text_of
from aurora_router.session.writes import SessionWrites


class SessionStatements(SessionWrites):
    """A session that brings its unit to where each statement belongs."""

    # -- where a statement goes -----------------------------------------------------------------------------------

    def _engine_for(self, unit: Unit, mapper: Any, clause: Any, read_only: bool | None) -> Engine:
        """Connect a unit that has no instance yet, or may have to leave its reader. Return its engine."""
        clause = self._clause(mapper, clause)
        if mapper is None and clause is None:
            return self.router_core.writer_engine()  # the caller wants to look at an engine, not to connect
        if self._call is None and (clause is not None or self.get_transaction() is None):
            # So does str(query). Nobody connects to the engine that this returns, except by connection(), which enters the unit.
            return self.router_core.writer_engine() if unit.place.instance is None else self._engine(unit)
        if unit.intent.read_only:
            return self._engine_to_read_only(unit, clause)
        # A text() is the same on every engine. So most texts that write are known before a reader is chosen.
        judging: Engine | None = None
        if isinstance(clause, TextClause) and unit.intent.read_only is None and read_only is None and unit.hint is None:
            if clause.text in self.router_core.interceptor.known.writes:
                return self._move(unit, Reason.NOT_A_READ)
            judging = self.router_core.connected_writer_engine()
        reason = None if judging is None else self._judge(unit, clause, judging, False)
        if reason is None:
            reason = self._reason_to_write(unit, clause, read_only)
        if reason is not None:
            return self._move(unit, reason)
        if read_only:
            unit.hint = "reader"
        return self._engine_to_read(unit, clause, is_judged=judging is not None)

    def _engine_to_read_only(self, unit: Unit, clause: Any) -> Engine:
        """Connect a read-only unit: to the writer if a hint asks for it, otherwise where it may read."""
        if unit.hint == "writer" or (isinstance(clause, TextClause) and self._names_writer(clause.text)):
            return self._enter(unit, Reason.HINT)

        def judge(engine: Engine, _: bool) -> Reason | None:
            """Find a hint in any text, before the unit waits for a reader. A reader's interceptor finds it, too."""
            return Reason.HINT if self._names_writer(self._text(clause, engine, True) or "") else None

        return self._enter(unit, None, judge=judge)

    def _clause(self, mapper: Any, clause: Any) -> Any:
        """Return the statement that SQLAlchemy will compile; None if the caller of `get_bind()` has named none."""
        call = self._call
        if call is None:
            return clause
        if mapper is None and clause is None:
            # SQLAlchemy passes neither for some statements, for example a union of mapped columns.
            clause = call.statement
        return clause if clause is None or call.listeners_made is None else call.listeners_made

    def _engine_to_read(self, unit: Unit, clause: Any, *, is_judged: bool) -> Engine:
        """Connect a unit for a statement whose text will show whether it is a read. Return the unit's engine.

        is_judged: whether the text was looked at already.
        """
        if unit.place.instance is None:

            def judge(engine: Engine, thorough: bool) -> Reason | None:
                return self._judge(unit, clause, engine, thorough) if thorough or not is_judged else None

            return self._enter(unit, None, judge=judge)
        engine = self._engine(unit)
        reason = None if is_judged else self._judge(unit, clause, engine, False)
        return engine if reason is None else self._move(unit, reason)

    def _reason_to_write(self, unit: Unit, clause: Any, read_only: bool | None) -> Reason | None:
        """Return why the unit must be on the writer for this clause; None if only the text can show that."""
        if unit.intent.read_only is False or read_only is False:
            return Reason.DECLARED_WRITE
        if unit.hint == "writer":
            return Reason.HINT
        if clause is None or is_no_read(clause) or self.twophase or self.in_nested_transaction():
            return Reason.NOT_A_READ  # a flush, connection(), or SQL that says so itself
        if unit.intent.retry is not None and unit.intent.retry.on_writer:
            return Reason.STALE_READ
        call, flush = self._call, self.routing_state.flush_context
        if self._loads_for_write or flush is not None or (call is not None and call.of_write):
            # merge(), delete(), a flush and a bulk statement load rows that decide the coming writes.
            return Reason.NOT_A_READ
        level = self.execution_options.get("isolation_level")
        if unit.place.instance is None and self.router_core.above_read_committed(level):
            return Reason.ISOLATION
        return None

    def _judge(self, unit: Unit, clause: Any, engine: Engine, thorough: bool) -> Reason | None:
        """Return why the unit must be on the writer for the text that this engine would send.

        It is None if the text may be a read, or is not known yet. Then the interceptor looks at the text.
        """
        known = self.router_core.interceptor.known
        key = None if thorough or known.rejected else key_of(clause)
        if key is not None and key in known.reads:
            return None
        text = self._text(clause, engine, thorough)
        if text is None:
            return None
        reason = known.reason_to_write(text, unit, thorough)
        if reason is None:
            if key is not None:
                known.note_read(key, text)
        elif isinstance(clause, TextClause):
            known.note_write(clause.text, text)
        return reason

    def _text(self, clause: Any, engine: Engine, thorough: bool) -> str | None:
        """Return the text that SQLAlchemy sends for a clause; None if nobody knows the text before that. See text_of()."""
        call = self._call
        parameters = translation = None
        if call is not None:
            parameters = call.parameters
            translation = self._option("schema_translate_map", clause, call.options)
        return text_of(clause, parameters, engine, translation, thorough=thorough)

    def _names_writer(self, text: str) -> bool:
        """Return whether a text has a hint that asks for the writer."""
        return "@writer" in text and analyze(text, self.router_core.interceptor.families.dialect).hint == "writer"

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
            checks.check_route(value)
        return value

    # -- statements that may have to be retried -------------------------------------------------------------------

    def _execute_internal(self, statement: Any, params: Any = None, **options: Any) -> Any:
        """Execute a statement. Retry it if its unit had to move and a retry may succeed.

        SQLAlchemy calls this for execute(), scalar() and scalars(), also if a class that is mixed in calls super().execute().
        """
        outer = self._call
        # The outer statement may be sent only after this one, which loads one of its parameters.
        outer_unit = self.routing_state.unit if outer is not None else None
        outer_hint = outer_unit.hint if outer_unit is not None else None
        given = options.get("execution_options")
        of_write = options.get("_add_event") is not None  # only bulk statements use it; a scoped_session gives None
        route = self._option("route", statement, given)
        self._call = call = Call(statement, params, given, route, of_write)
        if self.dispatch.do_orm_execute and not of_write:
            options["_add_event"] = self._after_listeners
        is_update = type(params) is list and getattr(statement, "is_update", False)
        if is_update:
            self._in_bulk = self._named_in(statement, params)
        elif (
            self.routing_state.check_stale_writes
            and not isinstance(params, list)
            and stale_writes.is_by_values(self, statement, given)
        ):
            options["execution_options"] = {**(given or {}), "synchronize_session": "fetch"}
        try:
            while True:
                call.times_left = None
                try:
                    result = super()._execute_internal(statement, params, **options)
                    unit = self.routing_state.unit
                    if unit is not None and not unit.connection_exposed:
                        unit.read_at = time.monotonic()
                    return result
                except Exception as error:
                    if self._recovered(error, call):
                        continue
                    if isinstance(error, StaleDataError):
                        self._note_refused(error)
                    own = _error_of_parameter(error)
                    if own is not None:
                        raise own from own.__cause__
                    raise
        finally:
            self._call = outer
            if outer_unit is not None:
                outer_unit.hint = outer_hint
            if is_update:
                self._in_bulk = None

    def _after_listeners(self, state: ORMExecuteState) -> None:
        """Note the statement and options that the application's listeners of do_orm_execute have left. This listener is last."""
        call = self._call
        assert call is not None
        call.listeners_made = state.statement
        call.parameters, call.options = state.parameters, state.local_execution_options
        call.route = self._option("route", state.statement, call.options)

    def _recovered(self, error: Exception, call: Call) -> bool:
        """Move the unit if a retry elsewhere may succeed. Return whether the statement can be retried."""
        unit = self.routing_state.unit
        if unit is None or unit.place.instance is None:
            return False
        if call.times_left is not None and call.times_left != self._times_left and _lacks_connection(error):
            # The unit has moved because the statement's parameters loaded something. Nothing of the statement was sent.
            return True
        if isinstance(error, MustMoveToWriter) and not unit.place.on_writer:
            self._move(unit, error.reason)
            return True
        if not isinstance(error, DBAPIError) or isinstance(error, RouterError) or error.statement is not unit.last_sql:
            return False  # an error of another engine, or of no database at all
        transaction = self.get_transaction()
        if transaction is not None and not transaction.is_active:
            return False  # an error of a flush, after which SQLAlchemy has rolled back
        step = self.router_core.failed_reads.handle(unit, error)
        if step is ReadStep.TO_WRITER:
            self._move(unit, Reason.NOT_A_READ)
            return True
        if step in (ReadStep.ELSEWHERE, ReadStep.AGAIN) and not self.in_nested_transaction():
            self.router_core.causality.on_reader_left(unit)
            unit.last_sql = None
            self._leave_place(unit)
            unit.place = NOWHERE
            return True  # get_bind() finds another place for it
        return False


def _lacks_connection(error: Exception) -> bool:
    """Return whether this may be the error of a statement that lost its connection before it was sent."""
    return isinstance(error, (StatementError, ResourceClosedError, MustMoveToWriter)) and not isinstance(error, DBAPIError)


def _error_of_parameter(error: Exception) -> RouterError | None:
    """Return the router's own error that was raised when a parameter loaded something; None for other errors."""
    own = error.orig if type(error) is StatementError else None
    return own if isinstance(own, RouterError) else None
