"""A pool of connections to one instance: SQLAlchemy's QueuePool with three hooks, which stays fair after failed connects."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

from sqlalchemy.exc import DisconnectionError
from sqlalchemy.pool import ConnectionPoolEntry, PoolProxiedConnection, QueuePool
from sqlalchemy.pool.base import _ConnectionFairy, _ConnectionRecord
from sqlalchemy.util.queue import Empty


class PoolFull(Exception):
    """Raised if a reader's pool is full and the unit has not checked yet whether another reader has room."""


class RouterPool(QueuePool):
    """SQLAlchemy's pool, except that a failed connect releases its place to the next waiting thread.

    SQLAlchemy's own pool wakes no thread then. If the writer is dead, all waiting threads would wait until pool_timeout.
    """

    __module__ = QueuePool.__module__  # SQLAlchemy names a pool's logger after it

    # True once the engine has a new pool. From then on, connections that come back to this pool are closed.
    retired = False
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
        # The record connects at checkout. If the connect fails, the record comes back to the pool like any other.
        return _ConnectionRecord(self, connect=False)

    def _return_conn(self, record: ConnectionPoolEntry) -> None:
        try:
            if self.checked_in is not None:
                self.checked_in(record, self.retired)
        except BaseException:
            # A signal handler has raised this. Without a second call, the unit would count as under way in its scopes.
            if self.checked_in is not None:
                self.checked_in(record, True)
            raise
        finally:
            self._do_return_conn(record)
        if self.retired:
            self._close_late()

    def _close_late(self) -> None:
        """Close a connection that came back just when this pool was disposed. A waiting thread gets its place."""
        with contextlib.suppress(Empty):
            record: Any = self._pool.get(False)
            record.close()
            self._do_return_conn(record)
