"""What all server families share, and what the module of one must provide: `Family`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence, Set
from contextlib import AbstractContextManager
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias, TypeGuard

from aurora_router.core.commits import Evidence, Note
from aurora_router.core.failures import Failure
from aurora_router.core.query import Query
from aurora_router.core.topology import Instance, Role, Server, ServerId, Silence, Topology
from aurora_router.drivers.base import Mode

Pooler: TypeAlias = Literal["session", "transaction"]
"""How long a pooler before the servers keeps a client on one connection to them."""


class Greeting(NamedTuple):
    """What a fresh connection has reached.

    shared: whether a pooler may give the server's side to other clients between two transactions. Nothing that outlives a
        transaction may be set on a shared connection.
    """

    server: ServerId
    role: Role
    shared: bool

    @property
    def guarded(self) -> bool:
        """Whether `greet` has guarded the connection."""
        return self.role is Role.READER and not self.shared


class Unsuitable(Exception):
    """A server that answers but cannot be used; the message says why and what to do.

    passing: whether it may become usable although nobody changes anything.
    """

    def __init__(self, message: str, *, passing: bool = False) -> None:
        super().__init__(message)
        self.passing = passing


class Family(Protocol):
    """The module of a family: its SQL, how its rows, error codes and messages read, and the driver's switches.

    The module sends no statements of its own; all its questions go through a `Query`.
    """

    # -- how a URL reads

    @property
    def DRIVER(self) -> str: ...
    @property
    def EXAMPLE(self) -> str:
        """A URL to show in errors."""
        ...

    @property
    def DEFAULT_PORT(self) -> int: ...
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

    def options(self) -> Set[str]:
        """The names of the options that a URL's query may have; none if the driver is not installed."""
        ...

    def encrypted(self, query: dict[str, Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
        """The query of a URL, with encryption unless the user has set it in any place that the driver reads.

        arguments: `connect_args`.
        """
        ...

    @property
    def ENCRYPTION(self) -> str:
        """The argument of the driver's connect() that overrides what the URL says about encryption."""
        ...

    def fixed_address(self, options: Mapping[str, Any], arguments: Mapping[str, Any]) -> str:
        """The setting that leads every connection to one server, whichever instance it is for; "" if there is none.

        options: of the URL's query.
        arguments: `connect_args`; they override the instance's host and port.
        """
        ...

    # -- who and where a server is

    @property
    def DIALECT(self) -> str:
        """The dialect of the statements in those errors of the driver that no router has seen."""
        ...

    @property
    def DEFAULT_ISOLATION(self) -> str:
        """The servers' own default isolation level. Nobody has asked for it, so automatic units read on readers all the same."""
        ...

    @property
    def BEYOND_READERS(self) -> frozenset[str]:
        """The isolation levels that a reader refuses, by their names on servers."""
        ...

    @property
    def ONCE(self) -> Mapping[str, Any]:
        """Arguments of a cursor's execute() for a text of several statements."""
        ...

    @property
    def FUNCTIONS(self) -> str: ...
    def dialect(self, server: ServerId) -> str:
        """The SQL dialect of a server, as `statements.verdict` takes it."""
        ...

    def literal_mode(self, connection: Any, ask: Query | None) -> str | None:
        """The setting that decides what a backslash means in texts of this connection, as `statements.in_mode` takes it.

        ask: None if nothing may be sent. Then the driver's own knowledge must do.
        """
        ...

    def greet(self, connection: Any, ask: Query, pooler: Pooler | None) -> Greeting:
        """Find out which server a fresh connection has reached. Guard a reader's connection, unless it is shared.

        pooler: the user's word on a pooler before the servers.
        Raises Unsuitable, and the driver's errors.
        """
        ...

    def probe(self, ask: Query, *, asynchronous_commits: bool) -> Server:
        """A server's own report of its state.

        Raises Unsuitable, and whatever `ask` raises.
        """
        ...

    def omissions(self, ask: Query) -> str:
        """What a writer leaves out of its log, so that no reader ever has it; "" if nothing.

        Raises whatever `ask` raises.
        """
        ...

    def parse_functions(self, rows: Iterable[Sequence[Any]]) -> frozenset[str]:
        """The answer to FUNCTIONS as names that are reads: "schema.name", and "name" if it is a read in every schema."""
        ...

    # -- how errors read

    def code(self, error: BaseException | None) -> str | int | None:
        """The server's, or the driver's, code of an error; None if it has none."""
        ...

    def words(self, error: BaseException) -> str:
        """An error's message, and the server's language-independent details if they tell more."""
        ...

    def failure(self, code: Any, message: str, *, disconnected: bool) -> Failure:
        """The kind of failure that a driver's error stands for.

        disconnected: the connection is unusable.
        """
        ...

    @property
    def KILLED(self) -> frozenset[Any]:
        """The codes by which a server reports that somebody has ended a connection."""
        ...

    @property
    def ENDED(self) -> str:
        """What to do about a statement whose connection was ended by a server that is alive."""
        ...

    def is_from_connecting(self, error: BaseException) -> bool:
        """Whether this error of the driver only occurs while connecting."""
        ...

    def explain_refusal(self, code: Any, message: str) -> tuple[Silence, str]:
        """A failed probe in words for the user, and whether another try can help."""
        ...

    @property
    def UNUSABLE(self) -> str:
        """A pattern that matches the driver's own words for an option that it cannot use."""
        ...

    @property
    def MISTAKES(self) -> Sequence[tuple[str, str]]:
        """Advice for TypeError and the like, which connect() raises if it cannot use its arguments.

        Each is a pattern of the error's type and message, and the advice.
        """
        ...

    def is_busy(self, code: Any, message: str) -> bool:
        """Whether the server is alive but has no room for one more connection."""
        ...

    # -- the driver's connection

    def fileno(self, connection: Any) -> int:
        """The number of the connection's socket."""
        ...

    def is_closed(self, connection: Any) -> bool: ...
    def autocommit(self, connection: Any) -> bool: ...
    def set_mode(self, connection: Any, mode: Mode, default_autocommit: bool, guarded: bool) -> bool:
        """Switch an idle connection; returns whether the mode stays for its next units. Sends nothing unless the driver must.

        guarded: whether `guard` has set the connection to refuse writes.
        """
        ...

    def is_settled(self, connection: Any, alone: bool) -> bool:
        """Whether a connection that was switched before can be used as it is. Sends nothing.

        Listeners of the application may have begun a transaction on it, or removed its guard.

        alone: each statement is to be on its own, so no transaction may be open.
        """
        ...

    def count_ends(self, connection: Any) -> Callable[[], int]:
        """Count the transactions that end on a connection, whoever ends them, except those that rollback() ends.

        Returns a function that gives the number so far. A statement in autocommit counts as one transaction. A text that ends one
        transaction and begins the next goes unseen.
        """
        ...

    def is_guarded(self, connection: Any, handed_out: bool) -> bool:
        """Whether a guard that was set is known to be still on. Sends nothing.

        handed_out: users have had the driver's connection since then.
        """
        ...

    def has_lost_guard(self, connection: Any) -> bool:
        """Whether the guard of a connection in autocommit was removed, or may have been, and can be set again now. Sends nothing.

        The gate did not see the removal. The guard can be set again because no transaction is open.
        """
        ...

    def is_idle(self, connection: Any) -> bool:
        """Whether a rollback on a connection is known to send nothing and to change nothing."""
        ...

    def end_transaction(self, connection: Any) -> None:
        """End what a listener of the application has begun on a connection before its unit has it.

        It ends by COMMIT, so that the listener's settings hold. Sends nothing if nothing was begun.
        """
        ...

    def guard(self, connection: Any, ask: Query, on: bool) -> None:
        """Make an idle connection refuse writes outside of transactions, or accept them again."""
        ...

    def watch_connecting(self, dialect: Any, connecting: Callable[[int], AbstractContextManager[None]]) -> None:
        """Make a dialect's new connections wait for the server within `connecting(number of the socket)`.

        `connecting` may end the wait by shutting the socket.
        """
        ...

    def forget_prepared(self, connection: Any) -> None:
        """Make an idle connection prepare its statements anew."""
        ...

    def look_anywhere(self, dialect: Any) -> None:
        """Make SQLAlchemy's first look at a server succeed, whatever the server's role and settings."""
        ...

    def prepare(self, connection: Any, shared: bool, given: Collection[str], listened: Callable[[], bool]) -> None:
        """Set up whatever else a new pooled connection needs.

        given: names of the arguments that the user gives to the driver's connect().
        listened: whether listeners of the application may have used the connection when a unit gets it.
        """
        ...

    def blocks(self, connection: Any) -> bool:
        """Whether a streamed result has unread rows, which must be read before anything else can be sent."""
        ...

    def is_bystander(self, connection: Any) -> bool:
        """Whether the server has ended the connection because of what another connection's statement did to the server."""
        ...

    def has_leftovers(self, connection: Any) -> bool:
        """Whether the last unit has left something that must not stay on a pooled connection.

        That is an open stream, an open transaction, or an unread answer.
        """
        ...

    def remove_leftovers(self, connection: Any, ask: Query) -> None:
        """Remove the leftovers from an idle connection.

        Raises the driver's error if the connection can only be closed.
        """
        ...

    # -- what became of a COMMIT

    @property
    def ROLLS_ALL_BACK(self) -> bool:
        """Whether a rollback undoes all writes and no stream can block it, so that nothing else is asked with it."""
        ...

    @property
    def XIDS(self) -> bool:
        """Whether servers can report the outcome of a transaction by its id; if not, the table must be asked."""
        ...

    @property
    def PREPARED(self) -> str:
        """The view or command that lists the transactions that were prepared, and neither committed nor rolled back."""
        ...

    @property
    def COMMITS(self) -> str: ...
    @property
    def CREATE_COMMITS(self) -> Sequence[str]: ...
    @property
    def HAS_COMMITS(self) -> str: ...
    @property
    def THERE(self) -> str: ...
    @property
    def FENCE(self) -> str: ...
    @property
    def SIGNED(self) -> str: ...
    @property
    def SEAL(self) -> str: ...
    @property
    def PRUNE(self) -> str: ...
    @property
    def PRUNED(self) -> int: ...
    @property
    def KEPT(self) -> int: ...
    def sign(self, connection: Any, signature: str) -> str | None:
        """Write the row by which the transaction is found again; returns the schema of its table.

        None if the transaction is read-only, so that it cannot have a row, and nothing of it can be lost.

        Raises the driver's error.
        """
        ...

    def is_missing_table(self, error: BaseException | None) -> bool: ...
    def is_locked_out(self, error: BaseException | None) -> bool: ...
    def is_aborted(self, connection: Any) -> bool:
        """Whether the transaction has failed, so that COMMIT raises no error although it commits nothing."""
        ...

    def was_not_undone(self, connection: Any) -> bool:
        """Whether a rollback has left some writes in place; asked once after each."""
        ...

    def refuse_aborted(self, connection: Any) -> None:
        """Raise the driver's error for a transaction that has failed."""
        ...


class XidFamily(Family, Protocol):
    """The module of a family whose servers can report the outcome of a transaction by its id (`XIDS`)."""

    @property
    def NOTE(self) -> str: ...
    def parse_note(self, row: Sequence[Any], writer: Instance, topology: Topology) -> Note:
        """The answer to NOTE by the writer of this topology."""
        ...

    @property
    def EVIDENCE(self) -> str: ...
    @property
    def STATUS(self) -> str: ...
    def is_future_xid(self, error: BaseException | None) -> bool:
        """Whether the driver's error to STATUS says that the xid has not been given out yet."""
        ...

    def parse_evidence(self, row: Sequence[Any], status: str | None) -> Evidence | None:
        """The answers to EVIDENCE and STATUS; None if the server is not the writer.

        Raises Unsuitable.
        """
        ...

    @property
    def END_IDLE(self) -> str:
        """Ends a transaction that waits for its COMMIT."""
        ...


def knows_xids(family: Family) -> TypeGuard[XidFamily]:
    """Whether the family's servers can report the outcome of a transaction by its id."""
    return family.XIDS
