"""A connection of the monitor's own to one server."""

from __future__ import annotations

import contextlib

from sqlalchemy import exc
from sqlalchemy.engine import Connection

from aurora_router.cluster.connect_errors import probe_error
from aurora_router.cluster.connection_modes import make_query
from aurora_router.cluster.families import Families
from aurora_router.cluster.probe import ProbeError
from aurora_router.cluster.sockets import TrackedSocket
from aurora_router.core.failures import traits
from aurora_router.core.instance import ProbeFailure, Role, ServerStatus
from aurora_router.drivers import Driver, Mode
from aurora_router.servers import UnsupportedServer


class Probe:
    """A connection of the monitor's own to one server."""

    def __init__(self, instance_id: str, connection: Connection, driver: Driver, families: Families) -> None:
        self._connection = connection
        self._driver = driver
        self._families = families
        dbapi = connection.connection.dbapi_connection
        self.socket = TrackedSocket(driver.fileno(dbapi))
        self._error: type[Exception] = connection.dialect.loaded_dbapi.Error
        self._ask = make_query(dbapi, driver)
        self._omissions: str | None = None
        # Do this only now, because listeners of the application must find the connection as on a plain engine.
        self._isolation = driver.isolation(dbapi)
        driver.end_transaction(dbapi)
        driver.set_mode(dbapi, Mode.AUTOCOMMIT, True, False)
        self._server = families.find(instance_id, self._ask)

    def ask(self) -> ServerStatus:
        """Ask the server for its state. Raises ProbeError."""
        try:
            said = self._server.probe(self._ask, asynchronous_commits=self._families.asynchronous_commits)
            if self._omissions is None:
                self._omissions = self._omitted()
            if said.role is Role.WRITER:
                said = said._replace(unproven=self._omissions)
            elif self._omissions:
                said = said._replace(omits=self._omissions)
            if self._isolation is not None:
                said = said._replace(isolation=self._isolation)
        except UnsupportedServer as error:
            raise ProbeError(str(error), ProbeFailure.REFUSED if error.passing else ProbeFailure.MISCONFIGURED) from None
        except self._error as error:
            raise probe_error(error, self._driver, self._server) from None
        self._families.note_answer(self._server, said)
        return said

    def _omitted(self) -> str:
        """The server's omissions: see `ServerFamily.omissions`. "" if the user has no privilege to ask."""
        try:
            return self._server.omissions(self._ask)
        except self._error as error:
            if traits(self._server.failure(self._driver.code(error), "", disconnected=False)).is_last_word:
                return ""
            raise

    def functions(self) -> frozenset[str]:
        """Return the user functions that do not write, according to the catalog. Raises ProbeError."""
        try:
            _, rows = self._ask(self._server.FUNCTIONS)
            return self._server.parse_functions(rows)
        except self._error as error:
            raise probe_error(error, self._driver, self._server) from None

    def prune(self) -> bool:
        """Remove old rows of the commit table. Return whether there may be more of them. Raises ProbeError."""
        try:
            removed = self._connection.exec_driver_sql(self._server.PRUNE).rowcount
            return bool(removed >= self._server.PRUNE_BATCH)
        except exc.SQLAlchemyError as error:
            raise probe_error(error, self._driver, self._server) from None

    def shut_down(self) -> None:
        """Shut the socket, which wakes a thread that waits for an answer."""
        self.socket.shut_down()

    def close(self) -> None:
        """Close the connection, and never raise."""
        with contextlib.suppress(Exception):
            self._connection.close()
        self.socket.duplicate.close()
