"""What all server families share, and what the module of one must give: `Family`."""

from __future__ import annotations

import enum
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence, Set
from contextlib import AbstractContextManager
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias, TypeGuard

from aurora_router.core.commits import Evidence, Note
from aurora_router.core.failures import Failure
from aurora_router.core.topology import Instance, Role, Server, ServerId, Silence, Topology

Ask: TypeAlias = Callable[[str], tuple[Sequence[str], Sequence[Sequence[Any]]]]
"""Sends a statement; gives the names of the columns and the rows of the answer, none of both where it has none."""


class Mode(enum.Enum):
    """How a pooled connection is to behave for the unit that has it."""

    DEFAULT = "a transaction as the engine is configured"
    AUTOCOMMIT = "each statement on its own"
    READ_ONLY = "a read-only transaction"


Pooler: TypeAlias = Literal["session", "transaction"]
"""For how long a pooler before the servers keeps a client on one connection to them."""


class Greeting(NamedTuple):
    """What a fresh connection has reached.

    shared: a pooler may give the server's side of it to others between two transactions. Nothing that outlives a transaction may
    be set there.
    """

    server: ServerId
    role: Role
    shared: bool

    @property
    def guarded(self) -> bool:
        """Whether it was guarded."""
        return self.role is Role.READER and not self.shared


class Unsuitable(Exception):
    """A server that answers, but not one that can be used; the message says why and what to do.

    passing: whether it may become usable without anybody changing something.
    """

    def __init__(self, message: str, *, passing: bool = False) -> None:
        super().__init__(message)
        self.passing = passing


class Family(Protocol):
    """The module of a family: the SQL that asks, how rows, error codes and messages read, the driver's switches.

    It sends nothing on its own account: what it wants to know it asks through an `Ask`.
    """

    # -- how a URL reads

    @property
    def DRIVER(self) -> str: ...
    @property
    def EXAMPLE(self) -> str:
        """A URL, for errors."""
        ...

    @property
    def DEFAULT_PORT(self) -> int: ...
    @property
    def CONNECT(self) -> Mapping[str, Any]:
        """What the driver's connect() is given where the user says nothing."""
        ...

    @property
    def BARE(self) -> Mapping[str, Any]:
        """What create_engine() is given for connections of the router's own, so that SQLAlchemy asks less on them."""
        ...

    def options(self) -> Set[str]:
        """The names of the options that a URL's query may have; none if the driver is not there."""
        ...

    def encrypted(self, query: dict[str, Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
        """The query of a URL, with encryption unless the user has said something of it, wherever the driver looks.

        arguments: `connect_args`.
        """
        ...

    @property
    def ENCRYPTION(self) -> str:
        """The argument of the driver's connect() that goes before what the URL says of encryption."""
        ...

    def fixed_address(self, options: Mapping[str, Any], arguments: Mapping[str, Any]) -> str:
        """What leads every connection to one server, whichever instance it is for; "" if nothing does.

        options: of the URL's query. arguments: `connect_args`, which the driver is given over the instance's host and port.
        """
        ...

    # -- who and where a server is

    @property
    def DIALECT(self) -> str:
        """Of the statements in errors of the driver that no router has seen."""
        ...

    @property
    def DEFAULT_ISOLATION(self) -> str:
        """The isolation level that nobody has asked for where servers have it: automatic units read on readers all the same."""
        ...

    @property
    def BEYOND_READERS(self) -> frozenset[str]:
        """The isolation levels that a reader refuses, as servers call them."""
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

    def literal_mode(self, connection: Any, ask: Ask | None) -> str | None:
        """The setting that decides what a backslash means in the texts of this connection, as `statements.in_mode` takes it.
        ask: None if nothing may be sent, and what the driver knows must do."""
        ...

    def greet(self, connection: Any, ask: Ask, pooler: Pooler | None) -> Greeting:
        """Which server a fresh connection has reached; a reader's is guarded, unless it is shared. pooler: what the user says of
        one before the servers. Raises Unsuitable, the driver's errors."""
        ...

    def probe(self, ask: Ask, *, asynchronous_commits: bool) -> Server:
        """What a server says of itself. Raises Unsuitable, whatever `ask` raises."""
        ...

    def omissions(self, ask: Ask) -> str:
        """What a writer leaves out of its log, so that no reader ever has it; "" if nothing. Raises whatever `ask` raises."""
        ...

    def parse_functions(self, rows: Iterable[Sequence[Any]]) -> frozenset[str]:
        """The answer to FUNCTIONS as names that are reads: "schema.name", and "name" where that is so in every schema."""
        ...

    # -- how errors read

    def code(self, error: BaseException | None) -> str | int | None:
        """The server's, or the driver's, code of an error; None where it has none."""
        ...

    def words(self, error: BaseException) -> str:
        """What an error says, and what the server says of it in no human language, where that tells more."""
        ...

    def failure(self, code: Any, message: str, *, disconnected: bool) -> Failure:
        """What kind of failure a driver's error stands for. disconnected: the connection is unusable."""
        ...

    @property
    def KILLED(self) -> frozenset[Any]:
        """The codes with which a server says that somebody has ended a connection."""
        ...

    @property
    def ENDED(self) -> str:
        """What to do about a statement whose connection was ended by a server that is alive."""
        ...

    def is_from_connecting(self, error: BaseException) -> bool:
        """Whether the driver's error is one that is only met while connecting."""
        ...

    def explain_refusal(self, code: Any, message: str) -> tuple[Silence, str]:
        """A failed probe in words for the user, and whether trying again can help."""
        ...

    @property
    def UNUSABLE(self) -> str:
        """A pattern of the driver's own words for an option that it cannot use."""
        ...

    @property
    def MISTAKES(self) -> Sequence[tuple[str, str]]:
        """What to do where the driver's connect() ends in an error that is not the driver's own, for it can do nothing with what
        it was given: a pattern of the error's type and words, and the advice."""
        ...

    def is_busy(self, code: Any, message: str) -> bool:
        """Whether the server lives, but has no room for one more connection."""
        ...

    # -- the driver's connection

    def fileno(self, connection: Any) -> int:
        """The number of its socket."""
        ...

    def is_closed(self, connection: Any) -> bool: ...
    def autocommit(self, connection: Any) -> bool: ...
    def set_mode(self, connection: Any, mode: Mode, default_autocommit: bool, guarded: bool) -> bool:
        """Switch an idle connection; whether that lasts for its next units. Sends nothing where the driver does not make it.
        guarded: what `guard` has made of it."""
        ...

    def is_settled(self, connection: Any, alone: bool) -> bool:
        """Whether a connection that was switched before can be used as it is. Listeners of the application may have begun a
        transaction on one whose statements are to be alone, or taken its guard off. Asks nobody."""
        ...

    def count_ends(self, connection: Any) -> Callable[[], int]:
        """Count the transactions that end on a connection, whoever ends them, but for those that rollback() ends: gives how many
        there were until now. A statement in autocommit is one. If one text ends one and begins the next, nobody sees it."""
        ...

    def is_guarded(self, connection: Any, handed_out: bool) -> bool:
        """Whether a guard that was set is known to be on still. handed_out: users have had the driver's connection since. Asks
        nobody."""
        ...

    def has_lost_guard(self, connection: Any) -> bool:
        """Whether the guard of a connection in autocommit was taken off, or may have been, unseen by the gate, and can be set
        again because no transaction is open. Asks nobody."""
        ...

    def is_idle(self, connection: Any) -> bool:
        """Whether a rollback on a connection is known to send nothing and to change nothing."""
        ...

    def end_transaction(self, connection: Any) -> None:
        """End what a listener of the application has begun on a connection before its unit has it: with COMMIT, so that what it
        has set holds. Sends nothing if nothing was begun."""
        ...

    def guard(self, connection: Any, ask: Ask, on: bool) -> None:
        """Have an idle connection refuse writes outside of transactions, or accept them again."""
        ...

    def watch_connecting(self, dialect: Any, connecting: Callable[[int], AbstractContextManager[None]]) -> None:
        """Have a dialect's new connections wait for the server within `connecting(number of the socket)`, which may end the wait
        by shutting the socket."""
        ...

    def forget_prepared(self, connection: Any) -> None:
        """Have an idle connection prepare its statements anew."""
        ...

    def look_anywhere(self, dialect: Any) -> None:
        """Have SQLAlchemy's first look at a server succeed whatever its role and its settings."""
        ...

    def prepare(self, connection: Any, shared: bool, given: Collection[str], listened: Callable[[], bool]) -> None:
        """Whatever else a new pooled connection needs. given: names of what the user gives to the driver's connect(). listened:
        whether listeners of the application may have used it when a unit gets it."""
        ...

    def blocks(self, connection: Any) -> bool:
        """Whether rows of a streamed result are unread, so that the rest must be read before anything else can be sent."""
        ...

    def is_bystander(self, connection: Any) -> bool:
        """Whether the server has ended the connection because of what another connection's statement did to it."""
        ...

    def has_leftovers(self, connection: Any) -> bool:
        """Whether the last unit has left something that must not stay on a pooled connection: an open stream, an open
        transaction, or an answer that nobody has read."""
        ...

    def remove_leftovers(self, connection: Any, ask: Ask) -> None:
        """Remove that from an idle connection. Raises the driver's error if the connection can only be closed."""
        ...

    # -- what became of a COMMIT

    @property
    def ROLLS_ALL_BACK(self) -> bool:
        """Whether a rollback undoes whatever was written, and no stream stands in its way: then nothing is asked beside it."""
        ...

    @property
    def XIDS(self) -> bool:
        """Whether servers tell for transaction ids what became of them; where not, the table must be asked."""
        ...

    @property
    def PREPARED(self) -> str:
        """Where one finds transactions that were prepared, and neither committed nor rolled back."""
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
    def sign(self, connection: Any, signature: str) -> str:
        """Write the row by which the transaction is to be found again; gives the schema of its table. Raises the driver's."""
        ...

    def is_missing_table(self, error: BaseException | None) -> bool: ...
    def is_aborted(self, connection: Any) -> bool:
        """Whether the transaction has failed, so that a COMMIT would pass for done, and is none."""
        ...

    def was_not_undone(self, connection: Any) -> bool:
        """Whether a rollback has left something that was written; asked once after each."""
        ...

    def refuse_aborted(self, connection: Any) -> None:
        """Raise the driver's error for such a transaction."""
        ...


class XidFamily(Family, Protocol):
    """The module of a family whose servers tell for transaction ids what became of them (`XIDS`)."""

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
        """The answers to EVIDENCE and STATUS; None when the server is not the writer. Raises Unsuitable."""
        ...

    @property
    def END_IDLE(self) -> str:
        """Ends a transaction that waits for its COMMIT."""
        ...


def knows_xids(family: Family) -> TypeGuard[XidFamily]:
    """Whether the family's servers tell what became of a transaction id."""
    return family.XIDS
