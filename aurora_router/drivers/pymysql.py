"""PyMySQL: how it connects, how its errors read, and its connection's switches."""

from __future__ import annotations

import contextlib
import inspect
import os
import re
from collections.abc import Callable, Collection, Mapping, Set
from contextlib import AbstractContextManager
from itertools import count
from typing import Any, Final

from aurora_router.core.failures import Failure
from aurora_router.core.incidents import Incidents
from aurora_router.core.query import Query
from aurora_router.drivers.base import Mode
from aurora_router.drivers.notes import ConnectionNotes, keep_notes, notes_of

NAME = "pymysql"
PROTOCOL = "mysql"
DIALECTS = ("mysql", "mariadb")
EXAMPLE = "mysql+pymysql://user:password@host:3306/database"
DEFAULT_PORT = 3306
ENCRYPTION = "ssl"
ONCE: Final[Mapping[str, Any]] = {}
CONNECT: Final[Mapping[str, Any]] = {}
ALWAYS: Final[Mapping[str, Any]] = {}
BARE: Final[Mapping[str, Any]] = {}
ROLLS_ALL_BACK = False
SNAPSHOT = "START TRANSACTION READ ONLY"

KEEPALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_USER_TIMEOUT": 25000}
"""Seconds, seconds, milliseconds. Only the kernel notices a peer that vanishes silently."""

_TLS_FAILED = 2026
NO_PACKAGE = 2061  # a plugin for logging in is missing
OUT_OF_SYNC = 2014  # PyMySQL got another answer than it waited for


def code(error: BaseException | None) -> int | None:
    """Return the number of the server's or PyMySQL's error. PyMySQL raises 0 on a connection that it has closed."""
    number = error.args[0] if error is not None and error.args else None
    return number if isinstance(number, int) else None


def options() -> Set[str]:
    """Return the names of the options that a URL's query may have; none if the driver is not installed."""
    try:
        from pymysql.connections import Connection
    except ImportError:
        return frozenset()
    return inspect.signature(Connection).parameters.keys()


def encrypted(query: dict[str, Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the query of a URL, with encryption added unless the user has set it, even in an option file."""
    given = {**query, **arguments}
    file = _read_option_file(given)
    said = any(given.get(name) for name in _SSL) or any(file.get(name) for name in _SSL_OF_FILE)
    return query if said else {**query, "ssl_check_hostname": "false"}


_SSL = frozenset(
    {"ssl", "ssl_ca", "ssl_capath", "ssl_cert", "ssl_key", "ssl_cipher", "ssl_check_hostname", "ssl_verify_cert"}
    | {"ssl_verify_identity", "ssl_disabled"}
)
_SSL_OF_FILE = frozenset({"ssl-ca", "ssl-capath", "ssl-cert", "ssl-key", "ssl-password", "ssl-cipher"})
"""The options by which PyMySQL, or SQLAlchemy for it, decides on encryption."""


def fixed_address(options: Mapping[str, Any], arguments: Mapping[str, Any]) -> str:
    """Return the setting that leads every connection to one server; "" if there is none.

    A socket overrides host and port, even if only an option file names it.
    """
    given = {**options, **arguments}
    for name in ("host", "port"):
        if arguments.get(name):
            return f"{name} in connect_args"
    if given.get("unix_socket"):
        return "unix_socket"
    return "the socket of read_default_file" if _read_option_file(given).get("socket") else ""


def _read_option_file(given: Mapping[str, Any]) -> dict[str, str | None]:
    """The settings in PyMySQL's group of the option file that it is to read."""
    group, file = given.get("read_default_group"), given.get("read_default_file")
    if not (group or file):
        return {}
    import configparser  # few users have such a file

    read = configparser.RawConfigParser(allow_no_value=True, strict=False)
    with contextlib.suppress(configparser.Error, TypeError, ValueError):  # the driver will report it
        read.read(os.path.expanduser(file or "/etc/my.cnf"))
    found = read[group or "client"] if read.has_section(group or "client") else {}
    return {name.replace("_", "-"): value for name, value in found.items()}


def words(error: BaseException) -> str:
    """Return the error's message."""
    return str(error)


_GAVE_UP = re.compile(r"""\((TimeoutError\(["'])?(The (read|write) operation )?timed out""")
"""The part of PyMySQL's errors 2006 and 2013 that reports the end of its own timeout. A timeout of the kernel has [Errno 110]."""


def own_failure(code: int | None, message: str) -> Failure | None:
    """Return the kind of failure if only PyMySQL knows it; None if the number, or the connection's end, decides."""
    if code in (2006, 2013) and _GAVE_UP.search(message):
        return Failure.TIMED_OUT
    return Failure.LOST if code == 0 or (code is None and "Already closed" in message) else None


_CONNECTING = frozenset({2002, 2003, 2005, _TLS_FAILED, NO_PACKAGE})  # numbers of PyMySQL's own


def is_from_connecting(error: BaseException) -> bool:
    """Return whether this error of PyMySQL's own only occurs while connecting."""
    return code(error) in _CONNECTING


_UNTRUSTED = "CERTIFICATE_VERIFY_FAILED"
"""OpenSSL's word for a bad certificate. PyMySQL puts it into its general message about a server that it cannot reach."""
_ADVICE = (
    ("Packet sequence number wrong|unpack|index out of range", "no MySQL or MariaDB server answers there"),
    ("is not a MariaDB variant", "write mysql+pymysql:// in the URL"),
)
"""Messages without a number, of PyMySQL and of SQLAlchemy, that are no server's refusal, and the advice."""
UNUSABLE = "(?!)"  # PyMySQL raises Python's own errors
_TLS = "write ssl_ca=FILE to encrypt and to verify the server, or ssl_check_hostname=false alone to encrypt only"
ARGUMENT_ERRORS = (
    ("unexpected keyword argument '(ssl|tls)|no attribute 'get'", f"that is no ssl option of PyMySQL; {_TLS}"),
    ("unexpected keyword argument", "PyMySQL has no such option; check the URL's query and connect_args"),
    ("^KeyError", "rows must be tuples; leave cursorclass out of connect_args"),
    ("^(FileNotFound|Permission|IsADirectory|NotADirectory|SSL)", "check the files that ssl_ca, ssl_cert and ssl_key name"),
    ("^UnicodeEncode", "PyMySQL sends a password in Latin-1; give another one as bytes, in connect_args"),
)


def explain(error: BaseException) -> tuple[str, str]:
    """Return the words of a failed connect, and advice if the error is the driver's own."""
    text, number = " ".join(str(error).split()), code(error)
    if number == _TLS_FAILED or _UNTRUSTED in text:
        return text, "check the ssl options and the certificates"
    if number == NO_PACKAGE:
        return text, "pip install 'PyMySQL[rsa,ed25519]'"
    advice = next((advice for pattern, advice in _ADVICE if re.search(pattern, text)), "") if number is None else ""
    return (text.rstrip(".") if advice else text), advice


def fileno(connection: Any) -> int:
    """Return the number of the connection's socket. PyMySQL has no public way to get it."""
    number: int = connection._sock.fileno()
    return number


def is_closed(connection: Any) -> bool:
    """Return whether the connection has ended."""
    return not connection.open


# PyMySQL's SERVER_STATUS_AUTOCOMMIT. Its get_autocommit() takes twice as long.
AUTOCOMMIT = 2


def autocommit(connection: Any) -> bool:
    """Return whether each statement is a transaction of its own, as the server last reported."""
    return bool(connection.server_status & AUTOCOMMIT)


_NO_BACKSLASH_ESCAPES = 512  # PyMySQL's SERVER_STATUS_NO_BACKSLASH_ESCAPES


def isolation(connection: Any) -> str | None:
    """Return None, because PyMySQL has no such attribute."""
    return None


def literal_mode(connection: Any) -> str | None:
    """Return NO_BACKSLASH_ESCAPES if `sql_mode` has it, else None. Only the server knows the rest of the mode.

    Most texts depend on this part only. The application may change the mode at any time, so nothing is remembered. Each answer to
    a SET shows this part. A question to the server would change the answers of FOUND_ROWS(), ROW_COUNT() and SHOW WARNINGS.
    """
    return "NO_BACKSLASH_ESCAPES" if connection.server_status & _NO_BACKSLASH_ESCAPES else None


def alone(connection: Any) -> AbstractContextManager[None]:
    """Do nothing: PyMySQL needs no switch for a query."""
    return contextlib.nullcontext()


def process_id(connection: Any) -> int:
    """Return the number of the connection's thread on the server."""
    number: int = connection.thread_id()
    return number


def database(connection: Any) -> str | None:
    """Return the database that PyMySQL has chosen itself, which is the URL's. It does not see a USE of the application."""
    return connection.db.decode() if isinstance(connection.db, bytes) else connection.db


def declared_read_only(connection: Any) -> bool:
    """Return False, because PyMySQL has no such attribute."""
    return False


def is_aborted(connection: Any) -> bool:
    """Return whether the server has rolled back the transaction on its own. A COMMIT would then end another transaction."""
    return getattr(connection, "aborted_by", None) is not None


def was_not_undone(connection: Any) -> bool:
    """Return whether the last rollback has left writes to a table without transactions (MyISAM, Aria, MEMORY).

    The answer is given only once.
    """
    if not getattr(connection, "not_undone", False):
        return False
    connection.not_undone = False
    return True


def raise_if_aborted(connection: Any) -> None:
    """Raise the error with which the server has rolled back the transaction."""
    raise connection.aborted_by


_IN_TRANSACTION = 1  # PyMySQL's SERVER_STATUS_IN_TRANS


def is_settled(connection: Any, alone: bool) -> bool:
    """Return whether a connection that was switched before can be used as it is."""
    status = connection.server_status
    if bool(status & AUTOCOMMIT) is not alone or (alone and status & _IN_TRANSACTION):
        return False
    return is_default_read_only(connection, False)


def is_default_read_only(connection: Any, handed_out: bool) -> bool:
    """Return whether a read-only default that was set is known to be still in force.

    No server reports a change, so the default is trusted as long as nobody can have changed it.
    """
    return not (handed_out or getattr(connection, "touched", False) or notes_of(connection).listened())


def has_lost_read_only(connection: Any) -> bool:
    """Return whether a connection in autocommit may have lost its read-only default unseen, and can get it back."""
    is_touched = bool(getattr(connection, "touched", False))
    return is_touched and autocommit(connection) and not connection.server_status & _IN_TRANSACTION


def is_idle(connection: Any) -> bool:
    """Return False, because PyMySQL sends each rollback."""
    return False


def end_transaction(connection: Any) -> None:
    """End the transaction that a listener has begun, by COMMIT, as on PostgreSQL."""
    connection.commit()


def forget_prepared(connection: Any) -> None:
    """Do nothing: PyMySQL prepares no statements, and the server has forgotten its own."""


def set_mode(connection: Any, mode: Mode, default_autocommit: bool, default_read_only: bool) -> bool:
    """Switch an idle connection.

    A read-only transaction takes one round trip. Autocommit takes none if it has the right value already. With autocommit off, a
    transaction begins by itself. It is read-only if the default is, so the mode lasts. A shared connection has no such default.
    So its later transactions are begun in the same way.
    """
    _begin_read_only(connection, False)
    if mode is Mode.READ_ONLY:
        if default_read_only and not autocommit(connection):
            return True
        connection.query(SNAPSHOT)
        _begin_read_only(connection, notes_of(connection).is_shared)
        return False
    wanted = default_autocommit or mode is Mode.AUTOCOMMIT
    if autocommit(connection) is not wanted:
        connection.autocommit(wanted)
    return True


def _begin_read_only(connection: Any, on: bool) -> None:
    """Have a connection begin each transaction as read-only, or no longer. One of PyMySQL's own class cannot."""
    if hasattr(connection, "begins_read_only"):
        connection.begins_read_only = on


def prepare_connection(
    connection: Any, shared: bool, given: Collection[str], listened: Callable[[], bool], incidents: Incidents
) -> None:
    """Remember `listened` and `incidents` for later. Streamed reads need no transaction, so nothing else is set up."""
    keep_notes(connection, ConnectionNotes(listened, shared))
    if hasattr(connection, "incidents"):
        connection.incidents = incidents


def look_anywhere(dialect: Any) -> None:
    """Do nothing: a reader can do what any server can."""


def is_bystander(connection: Any) -> bool:
    """Return False, because all connections share one process of the server."""
    return False


def has_leftovers(connection: Any) -> bool:
    """Return whether an exception has left an answer unread, or a transaction open. A stream does not outlive its unit."""
    return has_open_end(connection)


def remove_leftovers(connection: Any, query: Query) -> None:
    """Raise PyMySQL's error for an unusable connection, because the beginning of the next answer is unknown."""
    from pymysql import InterfaceError

    raise InterfaceError(0, "")


def track_connecting_socket(
    dialect: Any, connecting: Callable[[int], AbstractContextManager[None]], longest: int | None = None
) -> None:
    """Make a dialect's new connections wait for the server within `connecting(number of the socket)`.

    `connecting` may end the wait by shutting the socket. If something has replaced PyMySQL's own connect(), for example to trace
    it, nothing is changed.
    """
    import pymysql

    from aurora_router.drivers.pymysql_classes import Connection, limited

    if dialect.loaded_dbapi.connect is pymysql.connections.Connection:
        own: dict[str, Any] = {"connecting": staticmethod(connecting)}
        if longest is not None:
            own.update(limited(longest))
        dialect.connect = type("Connection", (Connection,), own)


def note_default_read_only(connection: Any, on: bool) -> None:
    """Start or stop to note possible changes of the read-only default of a connection."""
    if hasattr(connection, "touched"):
        connection.touched = False if on else None


def count_ends(connection: Any) -> Callable[[], int]:
    """Count the transactions that end on a connection, except those that rollback() ends.

    A connection of PyMySQL's own class does not show these ends, so the number for it rises with each call.
    """
    if not hasattr(connection, "ends"):
        return count(1).__next__
    connection.ends = connection.ends or 0
    return lambda: connection.ends


def blocks(connection: Any) -> bool:
    """Return whether a streamed result has unread rows. PyMySQL reads them all before it sends anything else."""
    result = connection._result
    return result is not None and bool(result.unbuffered_active)


def has_open_end(connection: Any) -> bool:
    """Return whether an answer was not read to its end, or a transaction may be open.

    A connection of PyMySQL's own class does not show it.
    """
    return hasattr(connection, "unanswered") and (connection.unanswered or connection._in_transaction())
