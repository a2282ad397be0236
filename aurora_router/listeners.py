"""Telling the user's listeners what happens."""

from __future__ import annotations

import logging
from collections.abc import Callable

from aurora_router.core import events

log = logging.getLogger("aurora_router")


class Listeners:
    """Called with an event's class and its values, makes the event, if anybody listens, and calls each listener with it.

    What a listener raises is logged and does no harm.
    """

    def __init__(self, listeners: tuple[Callable[[events.Event], object], ...] = ()) -> None:
        self.listeners = listeners

    def __call__(self, kind: Callable[..., events.Event], *values: object) -> None:
        if not self.listeners:
            return
        event = kind(*values)
        for listener in self.listeners:
            try:
                listener(event)
            except Exception:
                log.exception("a listener failed on %s", type(event).__name__)
