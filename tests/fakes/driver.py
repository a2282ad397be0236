"""A driver that nobody has written, `fakepg`, for the servers of `cluster`; below it, what a driver's module must provide.

Each connection has a real socket, because the router watches it.
"""

from __future__ import annotations

import contextlib
import re
import socket
import sys
import types
from collections.abc import Iterator
from typing import Any

from sqlalchemy.dialects import registry
from sqlalchemy.engine.default import DefaultDialect

from aurora_router.core.failures import Failure
from aurora_router.drivers import DRIVERS
from tests.fakes.cluster import FakeCluster, FakeServer, Lost, Refused, Row


class Error(Exception):
    """An error of the driver, with the code of the server; None if there is no answer."""

    def __init__(self, code: str | None) -> None:
        super().__init__("no answer" if code is None else f"refused with {code}")
        self.sqlstate = code


Error.__module__ = "fakepg"


class Cursor:
    rowcount, arraysize, lastrowid = -1, 1, None

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._rows: list[Row] = []
        self.description: list[Row] | None = None

    def execute(self, text: str, parameters: Any = None) -> None:
        self._rows = self._connection.send(text, parameters)
        self.description = [(f"c{n}", *[None] * 6) for n in range(len(self._rows[0]))] if self._rows else None

    def fetchone(self) -> Row | None:
        return self._rows.pop(0) if self._rows else None

    def fetchall(self) -> list[Row]:
        rows, self._rows = self._rows, []
        return rows

    def nextset(self) -> None:
        """There is one answer to a text."""

    def close(self) -> None:
        """Nothing is kept."""

    def __enter__(self) -> Cursor:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Connection:
    """A connection to one server.

    pending: how many WRITEs its transaction has made.
    xid: the id of its transaction, once it was asked for.
    isolation: the level that it asks for; None if it leaves that to the server.
    is_dead: whether nobody answers on it any more.
    """

    isolation: str | None = None

    def __init__(self, server: FakeServer, autocommit: bool) -> None:
        self.server = server
        self.alone, self.read_only = autocommit, False
        self.pending = 0
        self.xid: int | None = None
        self.is_dead = False
        self.ours, self._theirs = socket.socketpair()
        server.connections.add(self)

    def send(self, text: str, values: Any = None) -> list[Row]:
        try:
            return self.server.answer(text, values, self)
        except Refused as refused:
            raise Error(str(refused)) from None
        except Lost:
            self.close()
            raise Error(None) from None

    def drop(self) -> None:
        """The server's end of the connection is gone."""
        self.is_dead = True
        self.server.connections.discard(self)
        self._theirs.close()

    def cursor(self) -> Cursor:
        return Cursor(self)

    def commit(self) -> None:
        if not self.alone:
            self.send("COMMIT")

    def rollback(self) -> None:
        if not self.alone and not self.is_dead:
            self.send("ROLLBACK")

    def close(self) -> None:
        self.ours.close()
        self.drop()

    def __del__(self) -> None:
        self.close()


class Dialect(DefaultDialect):
    """SQLAlchemy's dialect for the driver. `cluster` has its servers, by host."""

    name, driver, supports_statement_cache = "postgresql", "fakepg", True
    cluster: FakeCluster

    @classmethod
    def import_dbapi(cls) -> Any:
        return types.SimpleNamespace(Error=Error, paramstyle="pyformat", connect=cls.dial)

    @classmethod
    def dial(cls, host: str, autocommit: bool = False, **_: Any) -> Connection:
        server = cls.cluster.servers[host]
        if server.is_down:
            raise Error(None)
        if server.is_full:
            raise Error("53300")
        return Connection(server, autocommit)

    def is_disconnect(self, e: Any, connection: Any, cursor: Any) -> bool:
        return isinstance(e, Error) and e.sqlstate is None


@contextlib.contextmanager
def installed(cluster: FakeCluster) -> Iterator[Any]:
    """The driver, for as long as the block runs; `postgresql+fakepg://app@db-1/shop` leads to the cluster."""
    driver = sys.modules[__name__]
    Dialect.cluster = cluster
    registry.register("postgresql.fakepg", __name__, "Dialect")
    DRIVERS.append(driver)
    try:
        yield driver
    finally:
        DRIVERS.remove(driver)
        registry.impls.pop("postgresql.fakepg", None)


# -- what the module of a driver must provide ----------------------------------------------------------------------

NAME = "fakepg"
PROTOCOL = "postgresql"
DIALECTS = ("postgresql",)
EXAMPLE = "postgresql+fakepg://user@host/database"
DEFAULT_PORT = 5432
ENCRYPTION = "tls"
CONNECT: dict[str, Any] = {}
ALWAYS: dict[str, Any] = {}
BARE: dict[str, Any] = {}
ONCE: dict[str, Any] = {}
ROLLS_ALL_BACK = True
UNUSABLE = "(?!)"
ARGUMENT_ERRORS = ()


def options():
    return frozenset()


def encrypted(query, arguments):
    return query


def fixed_address(options, arguments):
    return ""


def track_connecting_socket(dialect, connecting, longest=None):
    """Connecting takes no time."""


def look_anywhere(dialect):
    """Its servers answer whatever they are."""


def prepare_connection(connection, shared, given, listened, incidents):
    """Nothing is left to set up."""


def code(error):
    return getattr(error, "sqlstate", None)


def words(error):
    return str(error)


def own_failure(code, message):
    return Failure.LOST if re.search("no answer", message) else None


def is_from_connecting(error):
    return False


def explain(error):
    return str(error), ""


def fileno(connection):
    return connection.ours.fileno()


def is_closed(connection):
    return connection.ours.fileno() < 0


def autocommit(connection):
    return connection.alone


def process_id(connection):
    return 7


def database(connection):
    return None


def declared_read_only(connection):
    return connection.read_only


def isolation(connection):
    return connection.isolation


def literal_mode(connection):
    return "on"


def is_idle(connection):
    return False


def is_aborted(connection):
    return False


def blocks(connection):
    return False


def is_bystander(connection):
    return False


def count_ends(connection):
    return lambda: 0


def is_settled(connection, alone):
    return connection.alone is alone


def is_default_read_only(connection, handed_out):
    return True


def has_lost_read_only(connection):
    return False


def has_leftovers(connection):
    return False


def was_not_undone(connection):
    return False


def alone(connection):
    return contextlib.nullcontext()


def set_mode(connection, mode, default_autocommit, default_read_only):
    connection.alone = default_autocommit or mode.name == "AUTOCOMMIT"
    connection.read_only = mode.name == "READ_ONLY"
    return True


def note_default_read_only(connection, on):
    """The server remembers."""


def end_transaction(connection):
    """No listener has begun one."""


def forget_prepared(connection):
    """Nothing is prepared."""


def remove_leftovers(connection, query):
    """There are none."""


def raise_if_aborted(connection):
    raise Error("25P02")
