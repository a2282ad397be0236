"""What an error of the driver means for its unit."""

from __future__ import annotations

import contextlib
from typing import Any

from sqlalchemy.engine import ExceptionContext

from aurora_router.cluster.connection_state import UNIT
from aurora_router.cluster.engines import Engines
from aurora_router.cluster.error_classification import FACTS, classify_error, failure_of
from aurora_router.cluster.families import Families
from aurora_router.cluster.monitor import Monitor
from aurora_router.config.settings import Settings
from aurora_router.core.failures import Failure, Phase, Progress, Question, facts, inquiry, phase_of, traits
from aurora_router.core.instance import Role
from aurora_router.core.sql.analysis import Effect
from aurora_router.errors import OutcomeUnknown, ReadOnlyViolation, RouterError
from aurora_router.routing.blame import breaks_everywhere, loses_everywhere
from aurora_router.routing.isolation import Isolation
from aurora_router.routing.unit import CommitState, Unit
from aurora_router.servers import ServerFamily


class ErrorHandler:
    """The errors of one router's units."""

    def __init__(self, settings: Settings, families: Families, engines: Engines, monitor: Monitor, isolation: Isolation) -> None:
        self._driver = settings.target.driver
        self._failover_timeout = settings.failover_timeout
        self._families = families
        self._engines = engines
        self._error = engines.driver_error
        self._monitor = monitor
        self._isolation = isolation

    def on_error(self, context: ExceptionContext) -> RouterError | None:
        """Attach the meaning of a driver's error to that error. Return the error to raise instead, if any.

        There is one in two cases. The outcome of a COMMIT is unknown. Or a read-only unit tried a write that the statement's text
        did not show.
        """
        unit: Unit | None = getattr(context.connection, UNIT, None)
        if unit is None or not isinstance(context.original_exception, self._error):
            return None
        failure = failure_of(context.original_exception, self._family(unit), disconnected=context.is_disconnect)
        self._react(failure, unit, context)
        phase = self.phase(unit)
        asked = inquiry(failure, phase)
        is_final = False
        if asked is not None and self._confirms(asked.question, failure, unit, context):
            failure, is_final = asked.becomes or failure, asked.is_final
        means = traits(failure)
        if means.spares_pool:
            context.invalidate_pool_on_disconnect = False
        meaning = facts(failure, phase, is_final=is_final, not_committed=unit.commit is CommitState.NOT_COMMITTED)
        instead: RouterError | None = unit.commit if isinstance(unit.commit, OutcomeUnknown) else None
        if means.refuses_writes and unit.intent.read_only and unit.place.instance is not None:
            instead = ReadOnlyViolation(Effect.WRITE.name, unit.place.instance.id, sent=True)
            meaning = classify_error(instead)
        if unit.intent.retry is not None:
            unit.intent.retry.failed = meaning
        setattr(instead or context.sqlalchemy_exception, FACTS, meaning)
        return instead

    def _react(self, failure: Failure, unit: Unit, context: ExceptionContext) -> None:
        """Do what a failure asks for at once: suspect the instance, forget what was prepared there."""
        means, connection = traits(failure), context.connection
        if means.suspicious and unit.place.instance is not None:
            self._monitor.suspect(unit.place.instance.id)
        if means.disconnects:
            context.is_disconnect = True  # SQLAlchemy does not always notice
        if means.is_outdated and unit.place.instance is not None:
            self._engines.forget_prepared(unit.place.instance.id)
        if connection is not None and not (context.is_disconnect or connection.invalidated):
            driver: Any = connection.connection.dbapi_connection
            # A driver forgets its prepared statements at a rollback. In autocommit there is no rollback.
            if self._driver.autocommit(driver):
                with contextlib.suppress(self._error):
                    self._driver.forget_prepared(driver)

    def _confirms(self, question: Question, failure: Failure, unit: Unit, context: ExceptionContext) -> bool:
        """Find out whether the answer to a question about a failure is "yes"."""
        match question:
            case Question.IS_SILENT:
                return self._confirm_role(unit) is None
            case Question.IS_WRITER:
                # Ask the server even outside of run_transaction, so that the next unit knows if the server is deposed.
                is_writer = unit.place.on_writer and not unit.intent.read_only and self._confirm_role(unit) is Role.WRITER
                if unit.intent.retry is not None:
                    unit.intent.retry.read_only_refusals += is_writer
                return is_writer
            case Question.BREAKS_EVERYWHERE:
                return breaks_everywhere(unit, failure)
            case Question.LOSES_EVERYWHERE:
                return self._loses_everywhere(failure, unit, context)
            case Question.WAS_MISLED:
                return unit.intent.retry is not None and unit.intent.retry.is_misled()
            case Question.MUST_STAY:
                return unit.place.on_writer or unit.intent.read_only is not None

    def _loses_everywhere(self, failure: Failure, unit: Unit, context: ExceptionContext) -> bool:
        """Whether the statement would lose the next connection, too. If so, say why in the error."""
        if context.connection is None:
            return False
        if self._driver.is_bystander(context.connection.connection.dbapi_connection):
            # Another connection's statement has made the server end this one.
            return False
        code, server = self._driver.code(context.original_exception), self._family(unit)
        why = loses_everywhere(unit, failure, code, server, self._monitor, self._failover_timeout)
        if why is not None and context.sqlalchemy_exception is not None:
            context.sqlalchemy_exception.add_detail(f"{why}; {server.ENDED}")
        return why is not None

    def _confirm_role(self, unit: Unit) -> Role | None:
        """Ask the server of a unit for its role now. None if the server is lost."""
        if unit.place.instance is None or unit.place.server is None:
            return None
        return self._monitor.confirm_role(unit.place.instance.id, unit.place.server)

    def phase(self, unit: Unit) -> Phase:
        """Return how far the unit was when its statement or its COMMIT failed."""
        return phase_of(
            Progress(
                unit.intent.read_only,
                unit.place.on_writer,
                unit.only_reads,
                has_results=unit.has_results,
                is_exposed=unit.connection_exposed,
                is_commit_in_doubt=unit.is_commit_in_doubt,
                is_autocommit=self._isolation.is_autocommit(unit),
                has_snapshot=self._isolation.has_snapshot(unit),
            )
        )

    def _family(self, unit: Unit) -> ServerFamily:
        """The family of the server of a unit."""
        return self._families.at(unit.place.instance.id) if unit.place.instance is not None else self._families.leading
