"""The events of checkouts: the start, the one end, and the return of the connection. Call them only if there are listeners."""

from __future__ import annotations

import time

from aurora_router.cluster.connection_state import ConnectionState
from aurora_router.core import events
from aurora_router.core.selection import Reason
from aurora_router.routing.unit import Unit
from aurora_router.telemetry.listeners import EventDispatcher


class CheckoutEvents:
    """Publishes what happens in the checkouts of units.

    A listener may raise the exception of a signal handler. So each start and each end is noted before it is published.
    """

    def __init__(self, dispatcher: EventDispatcher) -> None:
        self._publish = dispatcher.publish

    def started(self, unit: Unit) -> None:
        """Publish that a unit needs a connection."""
        unit.checkout_began = time.monotonic()
        self._publish(events.CheckoutStarted(unit.intent.read_only, **unit.numbers))

    def failed(self, unit: Unit, error: BaseException) -> None:
        """Publish that a unit got no connection, unless the end of its checkout was published."""
        began, unit.checkout_began = unit.checkout_began, None
        if began is not None:
            self._publish(events.CheckoutFailed(type(error).__name__, time.monotonic() - began, **unit.numbers))

    def routed(self, unit: Unit, instance: str, reason: Reason, state: ConnectionState) -> None:
        """Publish that a unit has its connection."""
        self.checked_in(state, instance)  # if the unit streams from a reader that is the writer now, it keeps its connection
        now = time.monotonic()
        began, unit.checkout_began = unit.checkout_began, None
        took = now - began if began is not None else None
        state.routed_at = now
        self._publish(events.Routed(instance, reason, seconds=took, connection=state.number, **unit.numbers))

    def checked_in(self, state: ConnectionState, instance: str) -> None:
        """Publish that the unit of a connection has it no longer, if its beginning was published."""
        since, state.routed_at = state.routed_at, None
        if since is not None:
            took, unit = time.monotonic() - since, state.unit
            self._publish(events.ConnectionCheckedIn(instance, took, connection=state.number, **unit.numbers))
