"""The sockets of connections, which another thread may shut down at any time."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import time
import weakref
from collections.abc import Callable
from typing import Any

from aurora_router.cluster.connection_state import ConnectionState
from aurora_router.cluster.probe import ProbeError
from aurora_router.core.instance import ProbeFailure


class TrackedSocket:
    """The socket of a connection: the driver's file descriptor, and a duplicate that another thread may shut down at any time.

    since: seconds, monotonic. At this time, or just after it, the topology was found to have the connection's server.
    tell_closed: publishes, once, that the connection is closed; None if nobody was told that it was made.
    """

    tell_closed: Callable[[], object] | None = None

    def __init__(self, number: int) -> None:
        self._number = number
        self.since = time.monotonic()
        # A signal handler may raise at any moment. A file descriptor of os.dup() has no owner until its socket is made, so it
        # could leak.
        self.duplicate = socket.socket()
        os.dup2(number, self.duplicate.fileno(), inheritable=False)
        # A strong reference would keep the connection alive, because its state may lead back to the driver's connection.
        self._state: weakref.ref[ConnectionState] | None = None

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError):  # a signal handler may raise before there is a duplicate
            self.duplicate.close()

    @property
    def state(self) -> ConnectionState | None:
        """The state of the pooled connection; None until it is pooled."""
        return self._state() if self._state is not None else None

    def is_of(self, state: ConnectionState) -> None:
        """Note the state of the connection, which is pooled from now on."""
        self._state = weakref.ref(state)

    def leads_to(self, number: int) -> bool:
        """Return whether this file descriptor of the driver's still belongs to the same socket."""
        return self._number == number and os.path.sameopenfile(number, self.duplicate.fileno())

    def shut_down(self) -> bool:
        """Shut the socket down, which wakes a thread that waits for it. Return whether it was open."""
        try:
            self.duplicate.shutdown(socket.SHUT_RDWR)
        except OSError:
            return False
        return True

    def replace_after_fork(self, dead: socket.socket) -> None:
        """In a forked child, put a dead socket in place of the parent's, so nothing sent here reaches the server."""
        with contextlib.suppress(OSError):
            if os.path.sameopenfile(self._number, self.duplicate.fileno()):  # otherwise the driver has closed it
                os.dup2(dead.fileno(), self._number, inheritable=False)
        self.duplicate.close()
        state = self.state
        if state is not None:
            state.is_inherited, state.unit = True, None


# The keys are the driver's connections, because some of them have no room for an attribute. Each socket lives as long as its
# connection.
_sockets: weakref.WeakKeyDictionary[Any, TrackedSocket] = weakref.WeakKeyDictionary()


def track(dbapi_connection: Any, tracked: TrackedSocket) -> None:
    """Note which socket a driver's connection has."""
    _sockets[dbapi_connection] = tracked


def socket_of(dbapi_connection: Any) -> TrackedSocket | None:
    """Return the socket of a driver's connection; None if it has none yet."""
    return _sockets.get(dbapi_connection)


def poll_of(tracked: TrackedSocket) -> Callable[[int], list[Any]]:
    """Make a cheap function that tells what there is to read on a socket.

    The duplicate stays open as long as the pooled connection, so its file descriptor never becomes another socket's.
    """
    duplicate = tracked.duplicate
    if hasattr(select, "poll"):
        poll = select.poll()
        poll.register(duplicate, select.POLLIN)
        return poll.poll
    return lambda _: select.select([duplicate], [], [], 0)[0]


class Opening:
    """A probe's connection from its first socket until it is a Probe. SQLAlchemy's first look at the server is in between."""

    def __init__(self) -> None:
        self._socket: TrackedSocket | None = None
        self._is_shut = False

    def watch(self, number: int) -> None:
        """Have shut_down() end this socket, and no other one. Raises ProbeError if shut_down() was called already."""
        tracked = self._socket
        if tracked is None or not tracked.leads_to(number):
            self.close()
            self._socket = TrackedSocket(number)
        if self._is_shut:
            raise ProbeError("no answer in time", ProbeFailure.TIMEOUT)

    def shut_down(self) -> None:
        """Shut the socket down, and every later one."""
        self._is_shut = True
        tracked = self._socket
        if tracked is not None:
            tracked.shut_down()

    def close(self) -> None:
        """Watch the socket no longer."""
        tracked, self._socket = self._socket, None
        if tracked is not None:
            tracked.duplicate.close()
