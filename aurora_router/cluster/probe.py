"""The connection that a probe needs, and the error of a probe that failed."""

from __future__ import annotations

from typing import Protocol

from aurora_router.core.instance import ProbeFailure, ServerStatus


class ProbeConnection(Protocol):
    """A connection to one server. Its watcher owns it, and other threads call only shut_down().

    All methods but shut_down() and close() may raise ProbeError.
    """

    def ask(self) -> ServerStatus:
        """Ask the server for its state."""
        ...

    def functions(self) -> frozenset[str]:
        """Return the names of user functions that do not write."""
        ...

    def prune(self) -> bool:
        """Remove old rows of the commit table, and return whether there may be more."""
        ...

    def shut_down(self) -> None:
        """Shut the socket, so that a thread stuck in ask() wakes with an error."""
        ...

    def close(self) -> None: ...


class ProbeError(Exception):
    """A probe that failed, in words for the user.

    busy: the server lives, but has no room for one more connection.
    """

    def __init__(self, message: str, failure: ProbeFailure = ProbeFailure.REFUSED, *, busy: bool = False) -> None:
        super().__init__(message)
        self.probe_failure = failure
        self.busy = busy
