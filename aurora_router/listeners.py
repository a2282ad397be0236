"""Telling the log and the user's listeners what happens."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

from aurora_router.core import events
from aurora_router.log import Log

_LOGGED = Log.KINDS


class Listeners:
    """Called with an event's class and its values, makes the event, if anybody listens, and calls each listener with it.

    listeners: the user's. log: hears the events of its own kinds, so that the others cost nothing where the user has no listener.
    What a listener raises is logged, at most once in 10 s for each kind of event, and does no harm. In the application's own
    threads this does not hold for what ends a thread or the program (KeyboardInterrupt, SystemExit): a signal handler may have
    raised it while a listener ran.
    """

    def __init__(self, listeners: tuple[Callable[[events.Event], object], ...], log: Log) -> None:
        self.listeners = listeners
        self._log = log
        self._and_log: tuple[Callable[[events.Event], object], ...] = (log, *listeners)

    def __call__(self, kind: Callable[..., events.Event], *values: object) -> None:
        if self.listeners or kind in _LOGGED:
            self._tell(kind, values, Exception)

    def from_own_thread(self, kind: Callable[..., events.Event], *values: object) -> None:
        """The same in a thread of the router's own, which no listener may end: whatever a listener raises is logged."""
        if self.listeners or kind in _LOGGED:
            self._tell(kind, values, BaseException)

    def _tell(self, kind: Callable[..., events.Event], values: tuple[object, ...], harmless: type[BaseException]) -> None:
        event = kind(*values)
        for listener in self._and_log if kind in _LOGGED else self.listeners:
            try:
                listener(event)
            except harmless:
                with contextlib.suppress(harmless):  # a handler of logs may have raised it
                    self._log.listener_failed(id(listener), event)
