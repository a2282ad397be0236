"""`Driver`: the names that the module of a driver must have. They are about talking to servers, not about their answers."""

from __future__ import annotations

import enum
from collections.abc import Callable, Collection, Mapping, Sequence, Set
from contextlib import AbstractContextManager
from typing import Any, Protocol

from aurora_router.core.failures import Failure
from aurora_router.core.incidents import Incidents
from aurora_router.core.query import Query


class Mode(enum.Enum):
    """How a pooled connection behaves for the unit that has it."""

    DEFAULT = "a transaction as the engine is configured"
    AUTOCOMMIT = "each statement on its own"
    READ_ONLY = "a read-only transaction"


class UrlReading(Protocol):
    """The meaning of a URL that names the driver."""

    @property
    def NAME(self) -> str:
        """The name of its package, which is also that of the driver in a URL."""
        ...

    @property
    def PROTOCOL(self) -> str:
        """The protocol between driver and server, named after the first server that spoke it: "postgresql" or "mysql"."""
        ...

    @property
    def DIALECTS(self) -> Collection[str]:
        """SQLAlchemy's names of the dialects that it serves. A URL begins with one of them."""
        ...

    @property
    def EXAMPLE(self) -> str:
        """A URL to show in errors."""
        ...

    @property
    def DEFAULT_PORT(self) -> int: ...
    def options(self) -> Set[str]:
        """Return the names of the options that a URL's query may have; none if the driver is not installed."""
        ...

    def encrypted(self, query: dict[str, Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Return the query of a URL, with encryption added unless the user has set it in a place that the driver reads.

        arguments: `connect_args`.
        """
        ...

    @property
    def ENCRYPTION(self) -> str:
        """The argument of the driver's connect() that overrides what the URL says about encryption."""
        ...

    def fixed_address(self, options: Mapping[str, Any], arguments: Mapping[str, Any]) -> str:
        """Return the setting that leads every connection to one server, whichever instance it is for; "" if there is none.

        options: those of the URL's query.
        arguments: `connect_args`; they override the instance's host and port.
        """
        ...


class ConnectHooks(Protocol):
    """How the driver connects. A `dialect` is SQLAlchemy's, for one engine."""

    @property
    def CONNECT(self) -> Mapping[str, Any]:
        """Arguments of the driver's connect(), unless the user sets them."""
        ...

    @property
    def ALWAYS(self) -> Mapping[str, Any]:
        """Arguments of the driver's connect(), whatever the user sets."""
        ...

    @property
    def BARE(self) -> Mapping[str, Any]:
        """Arguments of create_engine() for the router's own connections, so that SQLAlchemy asks less on them."""
        ...

    def track_connecting_socket(
        self, dialect: Any, connecting: Callable[[int], AbstractContextManager[None]], longest: int | None = None
    ) -> None:
        """Make a dialect's new connections wait for the server within `connecting(number of the socket)`.

        `connecting` may end the wait by shutting the socket.

        longest: about how many bytes an answer may have. None: there is no limit. A longer answer is an error, after which the
            connection must be closed.
        """
        ...

    def look_anywhere(self, dialect: Any) -> None:
        """Make SQLAlchemy's first look at a server succeed, whatever the server's role and settings."""
        ...

    def prepare_connection(
        self, connection: Any, shared: bool, given: Collection[str], listened: Callable[[], bool], incidents: Incidents
    ) -> None:
        """Set up everything else that a new pooled connection needs.

        given: names of the arguments that the user gives to the driver's connect().
        listened: tells whether listeners of the application may have used the connection when a unit gets it.
        incidents: tells how the server reports what it does on its own.
        """
        ...


class ErrorReading(Protocol):
    """The meaning of the driver's errors."""

    @property
    def NAME(self) -> str: ...
    def code(self, error: BaseException | None) -> str | int | None:
        """Return the code that the server or the driver has given an error; None if there is none."""
        ...

    def words(self, error: BaseException) -> str:
        """Return an error's message, and the server's language-independent details if they tell more."""
        ...

    def own_failure(self, code: Any, message: str) -> Failure | None:
        """Return the kind of failure if only the driver knows it; None if the server's code, or the connection's end, decides.

        message: the error's `words`.
        """
        ...

    def is_from_connecting(self, error: BaseException) -> bool:
        """Return whether this error only occurs while connecting, as far as the driver knows. A server's code may tell more."""
        ...

    def explain(self, error: BaseException) -> tuple[str, str]:
        """Return the words of a failed connect in one line, without values of options, and advice.

        The advice is "" if the error is the server's and not the driver's own, or if it may pass.
        """
        ...

    @property
    def UNUSABLE(self) -> str:
        """A pattern that matches the driver's own words for an option that it cannot use."""
        ...

    @property
    def ARGUMENT_ERRORS(self) -> Sequence[tuple[str, str]]:
        """Advice for TypeError and the like, which connect() raises if it cannot use its arguments.

        Each is a pattern of the error's type and message, and the advice.
        """
        ...


class ConnectionReading(Protocol):
    """Questions that a connection of the driver can answer itself. Nothing is sent."""

    def fileno(self, connection: Any) -> int:
        """Return the number of the connection's socket."""
        ...

    def is_closed(self, connection: Any) -> bool: ...
    def autocommit(self, connection: Any) -> bool: ...
    def process_id(self, connection: Any) -> int:
        """Return the number of the server process, as the client got it at login. A pooler gives each client another one."""
        ...

    def database(self, connection: Any) -> str | None:
        """Return the current database of the connection, as far as the driver knows; None if that does not matter."""
        ...

    def declared_read_only(self, connection: Any) -> bool:
        """Return whether the connection's transactions begin as read-only. Only the server knows whether that still holds."""
        ...

    def isolation(self, connection: Any) -> str | None:
        """Return the level, as servers write it, that the driver asks for at each BEGIN. None if it leaves that to the server."""
        ...

    def literal_mode(self, connection: Any) -> str | None:
        """Return the setting that decides what a backslash means in string literals; None if only the server knows.

        The setting is an argument of `analysis.dialect_for_setting`.
        """
        ...

    def is_idle(self, connection: Any) -> bool:
        """Return whether a rollback on a connection is known to send nothing and to change nothing."""
        ...

    def is_aborted(self, connection: Any) -> bool:
        """Return whether the transaction has failed, so that COMMIT raises no error although it commits nothing."""
        ...

    def blocks(self, connection: Any) -> bool:
        """Return whether a streamed result has unread rows, which must be read before anything else can be sent."""
        ...

    def is_bystander(self, connection: Any) -> bool:
        """Return whether the server has ended the connection because another connection's process has crashed."""
        ...

    def count_ends(self, connection: Any) -> Callable[[], int]:
        """Count the transactions that end on a connection in any way except by rollback().

        Return a function that gives the number so far. A statement in autocommit counts as one transaction. A text that ends one
        transaction and begins the next may be missed on a connection whose cursors are not the router's.
        """
        ...

    def is_settled(self, connection: Any, alone: bool) -> bool:
        """Return whether a connection that was switched before can be used as it is.

        Listeners of the application may have begun a transaction on it, or changed its read-only default.

        alone: each statement must be a transaction of its own, so none may be open.
        """
        ...

    def is_default_read_only(self, connection: Any, handed_out: bool) -> bool:
        """Return whether a read-only default that was set is known to be still in force.

        handed_out: users have had the driver's connection since then.
        """
        ...

    def has_lost_read_only(self, connection: Any) -> bool:
        """Return whether a connection in autocommit may have lost its read-only default, and can get it back now.

        The interceptor did not see the loss. The default can be set again if no transaction is open.
        """
        ...

    def has_leftovers(self, connection: Any) -> bool:
        """Return whether the last unit has left something that must not stay on a pooled connection.

        That is an open stream, an open transaction, or an unread answer.
        """
        ...

    @property
    def ROLLS_ALL_BACK(self) -> bool:
        """Whether a rollback undoes all writes, and no stream can block it. If so, neither is checked at a rollback."""
        ...

    def was_not_undone(self, connection: Any) -> bool:
        """Return whether the last rollback has left some writes in place. The answer is given only once."""
        ...


class ConnectionSwitches(Protocol):
    """Changes of a connection of the driver."""

    @property
    def ONCE(self) -> Mapping[str, Any]:
        """Arguments of a cursor's execute() for a text of several statements."""
        ...

    def alone(self, connection: Any) -> AbstractContextManager[None]:
        """Make each statement on an idle connection a transaction of its own, within the block."""
        ...

    def set_mode(self, connection: Any, mode: Mode, default_autocommit: bool, default_read_only: bool) -> bool:
        """Switch an idle connection, and return whether the mode stays for its next units. Send nothing unless the driver must.

        If a pooler shares the connection, a read-only mode holds for all transactions until the next switch.

        default_read_only: whether the connection was set to refuse writes.
        """
        ...

    def note_default_read_only(self, connection: Any, on: bool) -> None:
        """Note that a connection's read-only default was set or removed."""
        ...

    def end_transaction(self, connection: Any) -> None:
        """End the transaction that a listener of the application has begun before a unit gets the connection.

        A COMMIT ends it, so that the listener's settings last. Nothing is sent if no transaction is open.
        """
        ...

    def forget_prepared(self, connection: Any) -> None:
        """Make an idle connection prepare its statements anew."""
        ...

    def remove_leftovers(self, connection: Any, query: Query) -> None:
        """Remove the leftovers from an idle connection.

        Raises the driver's error if the connection can only be closed.
        """
        ...

    def raise_if_aborted(self, connection: Any) -> None:
        """Raise the driver's error for a transaction that has failed."""
        ...


class Driver(UrlReading, ConnectHooks, ErrorReading, ConnectionReading, ConnectionSwitches, Protocol):
    """The module of a driver. It knows nothing about the answers of servers. A `connection` is always the driver's."""
