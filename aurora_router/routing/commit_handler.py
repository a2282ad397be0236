"""The end of a unit's transaction: a COMMIT, a COMMIT whose answer is lost, a rollback, and the return to the pool."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Any

from sqlalchemy.engine import Connection
from sqlalchemy.pool import PoolProxiedConnection

from aurora_router.cluster.connection_state import UNIT, ConnectionState, state_of, unit_of
from aurora_router.cluster.engines import Engines
from aurora_router.cluster.error_classification import failure_of
from aurora_router.cluster.families import Families
from aurora_router.cluster.monitor import Monitor
from aurora_router.config.settings import Settings
from aurora_router.core import events
from aurora_router.core.failures import Action, Failure, Phase, decide, traits
from aurora_router.errors import NoWriterAvailable, Outcome, OutcomeUnknown
from aurora_router.routing.causality import Causality
from aurora_router.routing.checkout_events import CheckoutEvents
from aurora_router.routing.commit_check import OutcomeQuery, prepare_commit_check, resolve_outcome
from aurora_router.routing.unit import CommitState, Unit
from aurora_router.telemetry.listeners import EventDispatcher
from aurora_router.waiting import Waiting

MIN_LOOKUP_SECONDS = 1.0  # seconds to look up a COMMIT, even after the deadline


class CommitHandler:
    """The commits of one router's units.

    causality: what the router's units must see.
    dispatcher: publishes the events.
    waiting: how units wait.
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
        self._driver = settings.target.driver
        self._failover_timeout = settings.failover_timeout
        self._families = families
        self._engines = engines
        self._error = engines.driver_error
        self._monitor = monitor
        self._causality = causality
        self._dispatcher = dispatcher
        self._events = CheckoutEvents(dispatcher)
        self._sleep = waiting.sleep

    def commit(self, raw: PoolProxiedConnection, send: Callable[[Any], None]) -> None:
        """Send a COMMIT. If its answer is lost and the unit has a commit check, look up the outcome.

        If the transaction has committed, go on as if the answer had come.
        """
        state = state_of(raw)
        unit = state.unit
        # A stream that began on the reader keeps its connection when the unit moves. There is nothing to commit on it.
        if unit is None or not (unit.wrote or unit.may_write) or unit.place.instance is None or state.server != unit.place.server:
            if unit is not None and unit.intent.owned_by_session and self._driver.blocks(raw.dbapi_connection):
                raw.invalidate()  # otherwise the driver would read the stream to its end
            else:
                self._commit_reads(unit, raw, send)
            return
        if unit.ends is not None:
            self._note_unseen_ends(unit)
        self._causality.on_commit_sent(unit)
        ask = self._prepare(unit, raw) if unit.intent.commit_check is not None or unit.intent.retry is not None else None
        unit.commit = CommitState.SENT
        try:
            send(raw)
        except self._error as error:
            self.on_rollback(raw)  # a refused COMMIT is a rollback
            if decide(self._commit_failure(error, raw), Phase.COMMIT) is not Action.RESOLVE:
                raise
            if not self._found_committed(unit, unit.place.instance.id, ask):
                raise
            raw.invalidate(error)
        self._committed(unit)

    def _commit_reads(self, unit: Unit | None, raw: PoolProxiedConnection, send: Callable[[Any], None]) -> None:
        """Send a COMMIT of a transaction that cannot have written. A lost connection loses nothing, so it is no error."""
        try:
            send(raw)
        except self._error as error:
            if unit is None or unit.place.instance is None or not traits(self._commit_failure(error, raw)).suspicious:
                raise
            self._monitor.suspect(unit.place.instance.id)
            raw.invalidate(error)

    def _prepare(self, unit: Unit, raw: PoolProxiedConnection) -> OutcomeQuery | None:
        """Note something by which the outcome of the coming COMMIT can be looked up. Roll back if that fails."""
        server = state_of(raw).family
        if unit.intent.commit_check == "table" or (unit.intent.commit_check == "xid" and not server.HAS_XID_STATUS):
            self._monitor.start_pruning()
        try:
            return prepare_commit_check(raw.dbapi_connection, unit, self._driver, server, self._monitor.topology)
        except Exception:
            with contextlib.suppress(self._error):
                # SQLAlchemy assumes that a failed COMMIT has ended the transaction.
                raw.rollback()
            self.on_rollback(raw)
            raise

    def ends_with_rollback(self, raw: PoolProxiedConnection) -> bool:
        """Return whether a rollback ends the unit of a connection: a session's unit. Others may go on with their connection."""
        unit = unit_of(raw)
        return unit is not None and unit.intent.owned_by_session

    def on_rollback(self, raw: PoolProxiedConnection) -> None:
        """Note that an attempt cannot be undone if a rollback, or a COMMIT that became one, has left writes in place."""
        if self._driver.was_not_undone(raw.dbapi_connection):
            unit = unit_of(raw)
            if unit is not None and unit.intent.retry is not None:
                unit.intent.retry.can_be_undone = False

    def _note_unseen_ends(self, unit: Unit) -> None:
        """Note that an attempt cannot be undone if a transaction has ended on the connection that the user has."""
        if unit.intent.retry is not None and unit.unseen_end() is not None:
            unit.intent.retry.can_be_undone = False

    def commit_in_two_phases(self, connection: Connection, send: Callable[[], None]) -> None:
        """Send PREPARE TRANSACTION or COMMIT PREPARED.

        There is no commit check for them, because somebody else decides about a prepared transaction, maybe much later.
        """
        state_of(connection.connection)  # raises for one that was open at a fork
        unit: Unit | None = getattr(connection, UNIT, None)
        if unit is None or unit.place.instance is None:
            send()
            return
        self._causality.on_commit_sent(unit)
        unit.commit = CommitState.SENT
        try:
            send()
        except self._error as error:
            if decide(self._commit_failure(error, connection.connection), Phase.COMMIT) is Action.RESOLVE:
                noted = f"in two phases; {self._families.at(unit.place.instance.id).PREPARED} lists the prepared transactions"
                unit.commit = OutcomeUnknown(unit.place.instance.id, noted)
            raise
        self._committed(unit)

    def _committed(self, unit: Unit) -> None:
        """Note a commit at once.

        Listeners of after_commit must see it, and so must units that begin while the connection is still open.
        """
        unit.commit = CommitState.COMMITTED
        self._causality.on_committed(unit)
        unit.recorded = unit.intent.owned_by_session and not unit.connection_exposed
        if unit.intent.retry is not None:
            unit.intent.retry.can_be_undone = False

    def _commit_failure(self, error: Any, raw: PoolProxiedConnection) -> Failure:
        driver: Any = raw.dbapi_connection
        return failure_of(error, state_of(raw).family, disconnected=self._driver.is_closed(driver))

    def _found_committed(self, unit: Unit, instance_id: str, ask: OutcomeQuery | None) -> bool:
        """Whether the transaction of an unanswered COMMIT has committed. If not, note in the unit what is known."""
        self._monitor.suspect(instance_id)
        if ask is None:
            unit.commit = OutcomeUnknown(instance_id, "no commit_check was asked for, so the outcome cannot be looked up")
            return False

        def resolve(timeout: float) -> Outcome:
            began = time.monotonic()
            found = resolve_outcome(self._asking_connection, ask, timeout, self._sleep)
            if self._dispatcher.listeners:
                self._dispatcher.publish(
                    events.CommitResolved(instance_id, found.value, time.monotonic() - began, **unit.numbers)
                )
            if found is Outcome.COMMITTED:
                self._causality.on_committed(unit)  # maybe long after the unit has ended
            return found

        if unit.intent.retry is not None:
            left = self._failover_timeout if unit.intent.retry.deadline is None else unit.intent.retry.deadline - time.monotonic()
            found = resolve(max(left, MIN_LOOKUP_SECONDS))
            if found is Outcome.COMMITTED:
                return True
            if found is Outcome.NOT_COMMITTED:
                unit.commit = CommitState.NOT_COMMITTED
                return False
        unit.commit = OutcomeUnknown(instance_id, str(ask), resolve)
        return False

    def _asking_connection(self, timeout: float) -> Connection:
        """Connect to the newest writer, outside of its pool. Threads whose COMMIT is in doubt still hold places in the pool.

        timeout: seconds to wait for a writer.
        """
        topology = self._monitor.wait_for(lambda t: t.writer is not None, timeout)
        if topology.writer is None:
            raise NoWriterAvailable(timeout, topology.said())
        return self._engines.unpooled_connection(topology.writer)

    def on_release(self, state: ConnectionState, instance: str) -> bool:
        """Note that a unit's connection is back in its pool. All commits on it have been acknowledged by now.

        Return whether the connection must be closed, because it has traces of a failed attempt.
        """
        unit: Unit = state.unit
        if unit.writer_read_slot is not None:
            unit.release()
        if unit.ends is not None and not unit.is_commit_in_doubt:
            self._note_unseen_ends(unit)
        self._causality.on_end(unit)
        if state.routed_at is not None:
            self._events.checked_in(state, instance)
        return unit.leaves_traces and unit.spoils_connection
