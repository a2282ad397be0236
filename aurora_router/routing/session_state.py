"""What a routing session tells the other modules about itself."""

from __future__ import annotations

from typing import Any

from sqlalchemy.orm import InstanceState

from aurora_router.routing.unit import Intent, Unit


class SessionState:
    """The state of a routing session, as far as other modules need it.

    intent: of its units.
    check_stale_writes: whether objects that a reader has shown are checked before they are written.
    unit: the session's unit; None before its first statement and after its end.
    flush_context: SQLAlchemy's context of the flush under way; None outside of a flush.
    flush_unchecked: whether the flush under way has not checked its objects yet.
    flush_compared: objects that the last flush has compared with the writer, and for which it had nothing to send.
    listens_last: whether the session has a listener of before_flush after those of the application.
    """

    __slots__ = ("check_stale_writes", "flush_compared", "flush_context", "flush_unchecked", "intent", "listens_last", "unit")

    def __init__(self, intent: Intent, check_stale_writes: bool) -> None:
        self.intent = intent
        self.check_stale_writes = check_stale_writes
        self.unit: Unit | None = None
        self.flush_context: Any = None
        self.flush_unchecked = False
        self.flush_compared: frozenset[InstanceState[Any]] = frozenset()
        self.listens_last = False

    @property
    def read_only(self) -> bool | None:
        """As RoutingMixin takes it."""
        return self.intent.read_only
