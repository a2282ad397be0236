"""Check a pooled connection at its checkout, and switch it to the mode that its unit needs."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Sequence
from typing import Any

from sqlalchemy.pool import ConnectionPoolEntry, PoolProxiedConnection

from aurora_router.cluster.connection_state import STATE, ConnectionState
from aurora_router.core.instance import Instance
from aurora_router.core.query import Query
from aurora_router.drivers import Driver, Mode

FRESH = 0.01  # seconds before a living connection is checked again


class ConnectionModes:
    """The modes of connections of one driver.

    dialect: SQLAlchemy's, for pings and isolation levels.
    """

    def __init__(self, driver: Driver, dialect: Any) -> None:
        self._driver = driver
        self._dialect = dialect
        self._error: type[Exception] = dialect.loaded_dbapi.Error

    def ask_on(self, dbapi: Any) -> Query:
        """Make a function that asks the server on a driver's connection: see `make_query()`."""
        return make_query(dbapi, self._driver)

    def is_usable(self, connection: PoolProxiedConnection, instance: Instance, now: float) -> bool:
        """Return whether a connection that was just checked out leads to the right server and seems alive.

        Sends a ping only if the socket has something to read.

        instance: as it was when it was chosen, with the servers that stood behind it then.
        now: seconds, monotonic.
        """
        state: ConnectionState = connection.info[STATE]
        if state.server not in instance.servers:
            return False
        if now - state.checked_out_at < FRESH:
            return True
        state.checked_out_at = now
        # If an idle connection has something to read, it was closed, or it got a notice. A ping tells the two apart.
        return not state.poll(0) or _alive(self._dialect, connection.dbapi_connection)

    def is_alive(self, connection: PoolProxiedConnection) -> bool:
        """Return whether a connection that was just checked out is new or seems alive."""
        state: ConnectionState = connection.info[STATE]
        before, state.checked_out_at = state.checked_out_at, time.monotonic()
        return before == -math.inf or not state.poll(0) or _alive(self._dialect, connection.dbapi_connection)

    def set_mode(self, connection: PoolProxiedConnection, mode: Mode, isolation: str | None = None) -> None:
        """Switch a connection that was just checked out to a mode. This sends something in two cases only.

        - After a promotion in place, a connection that was made to a reader is to write, or the other way round.
        - The read-only default may have been changed, and the server does not report such changes. Then the default is set again.

        isolation: the level that SQLAlchemy has already set on the connection for this unit.
        """
        state: ConnectionState = connection.info[STATE]
        driver: Any = connection.dbapi_connection
        if state.mode is mode and (mode is Mode.DEFAULT or self._driver.is_settled(driver, mode is Mode.AUTOCOMMIT)):
            return
        if mode is Mode.AUTOCOMMIT and state.is_shared:
            # The default of a shared connection is not set. Only a read-only transaction prevents writes after a promotion.
            self.set_mode(connection, Mode.READ_ONLY)
            return
        state.mode = None  # unknown if the switch fails half-way
        self._driver.end_transaction(driver)
        is_on, outdated = state.default_read_only, state.is_outdated
        wanted = is_on if mode is Mode.READ_ONLY else mode is Mode.AUTOCOMMIT
        if is_on is not wanted or (wanted and (outdated or not self._driver.is_default_read_only(driver, state.is_handed_out))):
            self._set_default_read_only(connection, wanted)
            state.default_read_only = wanted
        if outdated:
            self._driver.forget_prepared(driver)
            state.is_outdated = False
        state.is_handed_out = False
        lasts = self._driver.set_mode(driver, mode, state.default_autocommit, state.default_read_only)
        if isolation is not None and mode is Mode.DEFAULT:
            self._dialect.set_isolation_level(driver, isolation)
        if lasts:
            state.mode = mode

    def ensure_default_read_only(self, connection: PoolProxiedConnection) -> None:
        """Make the connection of a read-only unit refuse writes.

        Call this if the unit's transactions are not read-only by themselves.
        """
        state: ConnectionState = connection.info[STATE]
        driver: Any = connection.dbapi_connection
        state.mode = None
        if not (state.default_read_only and self._driver.is_default_read_only(driver, state.is_handed_out)):
            self._set_default_read_only(connection, True)
            state.default_read_only = True

    def keep_read_only(self, connection: PoolProxiedConnection) -> None:
        """Make each transaction of a connection read-only if the connection's mode holds only for the first transaction.

        A connection that a pooler shares stays as it is: the driver begins each of its transactions as read-only.
        """
        state: ConnectionState = connection.info[STATE]
        if state.mode is None and not state.is_shared:
            self.ensure_default_read_only(connection)

    def restore_read_only(self, connection: PoolProxiedConnection) -> None:
        """Set the read-only default again if a unit in autocommit has changed it. Nothing else keeps the unit from writing."""
        driver: Any = connection.dbapi_connection
        if self._driver.has_lost_read_only(driver):
            self._set_default_read_only(connection, True)

    def literal_mode(self, connection: PoolProxiedConnection, *, ask: bool) -> str | None:
        """Return the current setting for backslashes in texts of this connection: see `Driver.literal_mode`.

        ask: whether the server may be asked. If not, the result is None if only the server knows the setting.
        """
        driver: Any = connection.dbapi_connection
        found = self._driver.literal_mode(driver)
        if found is None and ask:
            state: ConnectionState = connection.info[STATE]
            _, ((setting,),) = self.ask_on(driver)(state.family.LITERALS)
            return str(setting)
        return found

    def make_as_new(self, dbapi: Any, record: ConnectionPoolEntry) -> None:
        """Give a connection the mode of a new one again. Listeners of the application expect it at the next checkout."""
        state: ConnectionState = record.info[STATE]
        state.mode = None
        try:
            self._driver.set_mode(dbapi, Mode.DEFAULT, state.default_autocommit, state.default_read_only)
        except self._error:
            record.invalidate()

    def remove_leftovers(self, dbapi: Any, record: ConnectionPoolEntry) -> None:
        """Remove the last unit's leftovers from a connection that has come back. Close the connection if that fails."""
        state: ConnectionState = record.info[STATE]
        state.mode = None
        try:
            self._driver.remove_leftovers(dbapi, self.ask_on(dbapi))
        except BaseException as error:
            record.invalidate(error)
            if not isinstance(error, self._error):
                raise

    def _set_default_read_only(self, connection: PoolProxiedConnection, on: bool) -> None:
        """Make an idle connection refuse writes outside of transactions, or accept them again."""
        dbapi = connection.dbapi_connection
        state: ConnectionState = connection.info[STATE]
        with self._driver.alone(dbapi):
            self.ask_on(dbapi)(state.family.SET_DEFAULT_READ_ONLY if on else state.family.SET_DEFAULT_READ_WRITE)
        self._driver.note_default_read_only(dbapi, on)


def make_query(dbapi: Any, driver: Driver) -> Query:
    """Make a function that sends a text on a driver's connection, and returns the answer to its last statement."""

    def ask(sql: str) -> tuple[Sequence[str], Sequence[Sequence[Any]]]:
        with contextlib.closing(dbapi.cursor()) as cursor:
            cursor.execute(sql, **driver.ONCE)
            while cursor.nextset():
                pass
            return ([column[0] for column in cursor.description], cursor.fetchall()) if cursor.description else ((), ())

    return ask


def _alive(dialect: Any, dbapi: Any) -> bool:
    try:
        return bool(dialect.do_ping(dbapi))
    except dialect.loaded_dbapi.Error:
        return False
