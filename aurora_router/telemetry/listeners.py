"""Send events to the log and to the user's listeners."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import replace
from typing import TypeAlias

from aurora_router.core import events
from aurora_router.telemetry.log import Log

Listener: TypeAlias = Callable[[events.Event], object]

_LOGGED = Log.KINDS


class EventDispatcher:
    """The log and the user's listeners. One call gives an event to all of them.

    If there are no listeners, do not make an event that the log does not want. So look at `listeners` first.

    Exceptions of listeners are logged, at most once in 10 s for each listener and kind of event. But KeyboardInterrupt and
    SystemExit pass in the application's own threads, because a signal handler may have raised them. The other listeners get the
    event first, because it may be the end of something that they know has begun.

    listeners: the user's functions.
    log: gets only the events of its own kinds.
    """

    def __init__(self, listeners: tuple[Listener, ...], log: Log) -> None:
        self.listeners = listeners
        self._log = log
        self._and_log: tuple[Listener, ...] = (log, *listeners)

    def publish(self, event: events.Event) -> None:
        """Publish an event in a thread of the application."""
        self._tell(event, Exception)

    def publish_from_own_thread(self, event: events.Event) -> None:
        """Publish an event in a thread of the router's own. No listener may end that thread, so every exception is logged."""
        self._tell(event, BaseException)

    def _tell(self, event: events.Event, harmless: type[BaseException]) -> None:
        if self.listeners and not event.at:
            event = replace(event, at=time.time())
        self._call(self._and_log if type(event) in _LOGGED else self.listeners, event, harmless)

    def _call(self, listeners: tuple[Listener, ...], event: events.Event, harmless: type[BaseException]) -> None:
        for number, listener in enumerate(listeners, 1):
            try:
                listener(event)
            except harmless:
                with contextlib.suppress(harmless):  # a handler of logs may have raised it
                    self._log.listener_failed(id(listener), event)
            except BaseException:
                self._call(listeners[number:], event, harmless)
                raise
