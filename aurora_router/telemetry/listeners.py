"""Send events to the log and to the user's listeners."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import replace

from aurora_router.core import events
from aurora_router.telemetry.log import Log

_LOGGED = Log.KINDS


class EventDispatcher:
    """The log and the user's listeners, called as one with an event.

    An event that the log does not want need not be made if there are no listeners: look at `listeners` before.

    Exceptions of listeners are logged, at most once in 10 s for each listener and kind of event. But in the application's own
    threads KeyboardInterrupt and SystemExit pass, because a signal handler may have raised them while a listener ran.

    listeners: the user's.
    log: gets only the events of its own kinds.
    """

    def __init__(self, listeners: tuple[Callable[[events.Event], object], ...], log: Log) -> None:
        self.listeners = listeners
        self._log = log
        self._and_log: tuple[Callable[[events.Event], object], ...] = (log, *listeners)

    def publish(self, event: events.Event) -> None:
        """Tell an event, in a thread of the application."""
        self._tell(event, Exception)

    def publish_from_own_thread(self, event: events.Event) -> None:
        """Tell an event in a thread of the router's own. No listener may end that thread, so all that it raises is logged."""
        self._tell(event, BaseException)

    def _tell(self, event: events.Event, harmless: type[BaseException]) -> None:
        if self.listeners and not event.at:
            event = replace(event, at=time.time())
        for listener in self._and_log if type(event) in _LOGGED else self.listeners:
            try:
                listener(event)
            except harmless:
                with contextlib.suppress(harmless):  # a handler of logs may have raised it
                    self._log.listener_failed(id(listener), event)
