"""Send events to the log and to the user's listeners."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

from aurora_router.core import events
from aurora_router.log import Log

_LOGGED = Log.KINDS


class Listeners:
    """The log and the user's listeners, called as one with an event's class and its values.

    The event is made only if somebody listens. Exceptions of listeners are logged, at most once in 10 s for each listener and
    kind of event. But in the application's own threads KeyboardInterrupt and SystemExit pass, because a signal handler may have
    raised them while a listener ran.

    listeners: the user's.
    log: gets only the events of its own kinds, so the others cost nothing if the user has no listener.
    """

    def __init__(self, listeners: tuple[Callable[[events.Event], object], ...], log: Log) -> None:
        self.listeners = listeners
        self._log = log
        self._and_log: tuple[Callable[[events.Event], object], ...] = (log, *listeners)

    def __call__(self, kind: Callable[..., events.Event], *values: object) -> None:
        if self.listeners or kind in _LOGGED:
            self._tell(kind, values, Exception)

    def from_own_thread(self, kind: Callable[..., events.Event], *values: object) -> None:
        """Do the same in a thread of the router's own. No listener may end that thread, so all that it raises is logged."""
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
