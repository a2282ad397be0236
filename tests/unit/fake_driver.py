"""A driver that nobody has written, `fakepg`, with the servers that it talks to; below it, what a driver's module must provide.

Its servers speak like PostgreSQL. Each connection has a real socket, because the router watches it.
"""

from __future__ import annotations

import contextlib
import re
import socket
import types
from typing import Any

from sqlalchemy.engine.default import DefaultDialect

from aurora_router.core.failures import Failure
from aurora_router.servers import WHO, postgresql

ROW = "SELECT amount FROM account"


class Error(Exception):
    """An error of the driver, with the code of the server."""

    def __init__(self, code: str | None) -> None:
        super().__init__(f"refused with {code}")
        self.sqlstate = code


Error.__module__ = "fakepg"


class Server:
    """One server.

    version: what it answers to the question what it is.
    heard: the texts that it got, oldest first.
    refuses: the code with which it refuses to say what is in ROW; None if it does not.
    """

    def __init__(self, number: int, follows: bool) -> None:
        self.version = ("PostgreSQL 16.4 on x86_64", False)
        self.heard: list[str] = []
        self.refuses: str | None = None
        self._identity = (160004, "7001", f"10.0.0.{number}", 5432, "1772600767.000089", follows)
        log = (None, None, None, "0/5000", "0/5000") if follows else ("0/5000", "0/5000", "00000001", None, None)
        self._state = (*self._identity, "on", "read committed", 8192, "16MB", *log, 1, 1, follows, None)

    def answer(self, text: str) -> list[tuple[Any, ...]]:
        self.heard.append(text)
        if text == ROW and self.refuses is not None:
            raise Error(self.refuses)
        if text == WHO["postgresql"]:
            return [self.version]
        if text == postgresql.PROBE:
            return [self._state]
        if postgresql.IDENTITY in text:
            return [(*self._identity, True, None, None)]
        return [(42,)] if text.startswith("SELECT") else []


class Cursor:
    rowcount, arraysize, lastrowid = -1, 1, None

    def __init__(self, server: Server) -> None:
        self._server = server
        self._rows: list[tuple[Any, ...]] = []
        self.description: list[tuple[Any, ...]] | None = None

    def execute(self, text: str, parameters: Any = None) -> None:
        self._rows = self._server.answer(text)
        self.description = [(f"c{n}", *[None] * 6) for n in range(len(self._rows[0]))] if self._rows else None

    def fetchone(self) -> tuple[Any, ...] | None:
        return self._rows.pop(0) if self._rows else None

    def fetchall(self) -> list[tuple[Any, ...]]:
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
    def __init__(self, server: Server, autocommit: bool) -> None:
        self.server = server
        self.alone, self.read_only = autocommit, False
        self.ours, self._theirs = socket.socketpair()

    def cursor(self) -> Cursor:
        return Cursor(self.server)

    def commit(self) -> None:
        self.server.heard.append("COMMIT")

    def rollback(self) -> None:
        self.server.heard.append("ROLLBACK")

    def close(self) -> None:
        self.ours.close()
        self._theirs.close()


class Dialect(DefaultDialect):
    """SQLAlchemy's dialect for the driver. `servers` has its servers, by host."""

    name, driver, supports_statement_cache = "postgresql", "fakepg", True
    servers: dict[str, Server] = {}

    @classmethod
    def import_dbapi(cls) -> Any:
        return types.SimpleNamespace(Error=Error, paramstyle="pyformat", connect=cls.dial)

    @classmethod
    def dial(cls, host: str, autocommit: bool = False, **_: Any) -> Connection:
        return Connection(cls.servers[host], autocommit)


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


def prepare_connection(connection, shared, given, listened):
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


def raise_aborted(connection):
    raise Error("25P02")
