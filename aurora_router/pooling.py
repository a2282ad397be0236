"""The parts of one pooled connection: the keys of its `info`, its socket, and the pool that has it."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import time
from collections.abc import Callable
from typing import Any

from sqlalchemy.exc import DisconnectionError
from sqlalchemy.pool import ConnectionPoolEntry, PoolProxiedConnection, QueuePool
from sqlalchemy.pool.base import _ConnectionFairy, _ConnectionRecord
from sqlalchemy.util.queue import Empty

from aurora_router.core.instance import Silence
from aurora_router.probe import ProbeError

SERVER = "aurora_router_server"
FAMILY = "aurora_router_family"
MODE = "aurora_router_mode"
GUARDED = "aurora_router_guarded"
HANDED_OUT = "aurora_router_handed_out"
AUTOCOMMIT = "aurora_router_autocommit"
POLL = "aurora_router_poll"
ENTERED = "aurora_router_entered"
OUTDATED = "aurora_router_outdated"
SHARED = "aurora_router_shared"
UNIT = "aurora_router_unit"
"""Keys of a pooled connection's `info`."""


def distrust(raw: PoolProxiedConnection) -> None:
    """Record that the user has the driver's connection and may set anything, so the next unit trusts no setting."""
    raw.info.update({MODE: None, HANDED_OUT: True})


class PoolFull(Exception):
    """Raised if a reader's pool is full and the unit has not checked yet whether another reader has room."""


class RouterPool(QueuePool):
    """SQLAlchemy's pool, except that a failed connect releases its place to the next waiting thread.

    SQLAlchemy's own pool wakes no thread then. If the writer is dead, all waiting threads would wait until pool_timeout.
    """

    __module__ = QueuePool.__module__  # SQLAlchemy names a pool's logger after it

    # Set when the engine has a new pool. Connections that come back to this one are closed then.
    over = False
    before_waiting: Callable[[], None] | None = None  # may raise PoolFull
    checked_out: Callable[[PoolProxiedConnection], None] | None = None
    """Cheaper than SQLAlchemy's event "checkout". As there, raise DisconnectionError to have the connection replaced. Do not
    raise it for a new connection."""
    checked_in: Callable[[ConnectionPoolEntry, bool], None] | None = None
    """Cheaper than SQLAlchemy's event "checkin", and called after it. The second argument says whether the pool is over."""

    def _do_get(self) -> ConnectionPoolEntry:
        if self._overflow >= self._max_overflow > -1 and self.before_waiting is not None:
            try:
                return self._pool.get(False)
            except Empty:
                self.before_waiting()
        return QueuePool._do_get(self)

    def connect(self) -> PoolProxiedConnection:
        connection = _ConnectionFairy._checkout(self)
        if self.checked_out is not None:
            try:
                self.checked_out(connection)
            except DisconnectionError as dead:
                connection.invalidate(dead)
                return self.connect()
        return connection

    def recreate(self) -> QueuePool:
        pool = super().recreate()
        assert isinstance(pool, RouterPool)
        pool.before_waiting, pool.checked_out, pool.checked_in = self.before_waiting, self.checked_out, self.checked_in
        return pool

    def _create_connection(self) -> ConnectionPoolEntry:
        # The record connects at checkout. If that fails, it comes back to the pool like any other.
        return _ConnectionRecord(self, connect=False)

    def _return_conn(self, record: ConnectionPoolEntry) -> None:
        try:
            if self.checked_in is not None:
                self.checked_in(record, self.over)
        except BaseException:
            # A signal handler has raised it. Without a second call the unit would stay under way in its scopes.
            if self.checked_in is not None:
                self.checked_in(record, True)
            raise
        finally:
            self._do_return_conn(record)
        if self.over:
            self._close_late()

    def _close_late(self) -> None:
        """Close a connection that came back just when this pool was disposed. Its place stays for a thread that waits."""
        with contextlib.suppress(Empty):
            record: Any = self._pool.get(False)
            record.close()
            self._do_return_conn(record)


class Line:
    """The socket of a connection: the driver's file descriptor, and a twin, which another thread may shut at any time.

    info: the `info` of the pooled connection; None until it is pooled.
    since: seconds, monotonic. Its server was last found in the topology then, or just after.
    made: whether the router has told that the connection can be used.
    """

    made = False

    def __init__(self, number: int) -> None:
        self.number = number
        self.since = time.monotonic()
        # A file descriptor of os.dup() would have no owner until its socket is made, and a signal handler may raise before.
        self.twin = socket.socket()
        os.dup2(number, self.twin.fileno(), inheritable=False)
        self.info: dict[Any, Any] | None = None

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError):  # a signal handler may raise before there is a twin
            self.twin.close()

    def leads_to(self, number: int) -> bool:
        """Whether this file descriptor of the driver's still belongs to the same socket."""
        return self.number == number and os.path.sameopenfile(number, self.twin.fileno())

    def cut(self) -> bool:
        """Shut the socket, which wakes a thread that waits for it. Return whether it was open."""
        try:
            self.twin.shutdown(socket.SHUT_RDWR)
        except OSError:
            return False
        return True

    def forsake(self, dead: socket.socket) -> None:
        """In a forked child, put a dead socket in place of the parent's, so nothing sent here reaches the server."""
        with contextlib.suppress(OSError):
            if os.path.sameopenfile(self.number, self.twin.fileno()):  # otherwise the driver has closed it
                os.dup2(dead.fileno(), self.number, inheritable=False)
        self.twin.close()
        if self.info is not None:
            self.info.clear()


def line_of(driver: Any) -> Line | None:
    """The line of a driver's connection; None if it has none yet."""
    line: Line | None = getattr(driver, "aurora_router_line", None)
    return line


def poll_of(twin: socket.socket) -> Callable[[int], list[Any]]:
    """A cheap function that tells what there is to read on a socket.

    The twin stays open as long as the pooled connection, so its file descriptor never becomes another socket's.
    """
    if hasattr(select, "poll"):
        poll = select.poll()
        poll.register(twin, select.POLLIN)
        return poll.poll
    return lambda _: select.select([twin], [], [], 0)[0]


class Opening:
    """A probe's connection from its first socket until it is a Probe. SQLAlchemy's first look at the server is in between."""

    def __init__(self) -> None:
        self._line: Line | None = None
        self._is_cut = False

    def watch(self, number: int) -> None:
        """Have cut() shut this socket, and no other one. Raises ProbeError if cut() was called already."""
        line = self._line
        if line is None or not line.leads_to(number):
            self.close()
            self._line = Line(number)
        if self._is_cut:
            raise ProbeError("no answer in time", Silence.TIMEOUT)

    def cut(self) -> None:
        """Shut the socket, and every later one."""
        self._is_cut = True
        line = self._line
        if line is not None:
            line.cut()

    def close(self) -> None:
        """Watch the socket no longer."""
        line, self._line = self._line, None
        if line is not None:
            line.twin.close()
