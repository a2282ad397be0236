"""What the module of a server family must provide: `ServerFamily`. It says what servers say, whatever driver asks them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias, TypeGuard

from aurora_router.core.commits import Evidence, Note
from aurora_router.core.failures import Failure
from aurora_router.core.instance import Instance, ProbeFailure, Role, ServerId, ServerStatus
from aurora_router.core.query import Query
from aurora_router.core.topology import Topology

Pooler: TypeAlias = Literal["session", "transaction"]
"""How long a pooler before the servers keeps a client on one connection to them."""


Execute: TypeAlias = Callable[[str, Mapping[str, Any] | None], Sequence[Any] | None]
"""Sends one statement with its parameters. Returns the first row of the answer, if it has any."""


class Identification(NamedTuple):
    """What a fresh connection has reached.

    shared: whether a pooler may give the server's side to other clients between two transactions. Nothing that outlives a
        transaction may be set on a shared connection.
    """

    server: ServerId
    role: Role
    shared: bool

    @property
    def default_read_only(self) -> bool:
        """Whether `identify` has made the connection refuse writes outside of transactions."""
        return self.role is Role.READER and not self.shared


class UnsupportedServer(Exception):
    """A server that answers but cannot be used; the message says why and what to do.

    passing: whether it may become usable although nobody changes anything.
    """

    def __init__(self, message: str, *, passing: bool = False) -> None:
        super().__init__(message)
        self.passing = passing


class Identity(Protocol):
    """Who a server is, and what holds on all servers of the family."""

    @property
    def DIALECT(self) -> str:
        """The SQL dialect of statements whose server nobody knows."""
        ...

    @property
    def DEFAULT_ISOLATION(self) -> str:
        """The servers' own default isolation level. Nobody has asked for it, so automatic units read on readers all the same."""
        ...

    @property
    def BEYOND_READERS(self) -> frozenset[str]:
        """The isolation levels that a reader refuses, by their names on servers."""
        ...

    def is_said_by(self, row: Sequence[Any]) -> bool:
        """Whether a server that answers `WHO` with this row is of the family. The usual family is not asked."""
        ...

    def dialect(self, server: ServerId) -> str:
        """The SQL dialect of a server, as `statements.analyze` takes it."""
        ...

    @property
    def LITERALS(self) -> str:
        """Asks for the setting that decides what a backslash means in texts, if the driver does not know it."""
        ...

    def identify(self, query: Query, process: int, pooler: Pooler | None) -> Identification:
        """Find out which server a fresh connection has reached. Make a reader's connection refuse writes, unless it is shared.

        process: the number of the server's process, as the client got it at login.
        pooler: the user's word on a pooler before the servers.

        Raises UnsupportedServer, and the driver's errors.
        """
        ...

    @property
    def SET_DEFAULT_READ_ONLY(self) -> str:
        """Makes a connection refuse writes outside of transactions."""
        ...

    @property
    def SET_DEFAULT_READ_WRITE(self) -> str: ...


class Probing(Protocol):
    """What the monitor asks."""

    def probe(self, query: Query, *, asynchronous_commits: bool) -> ServerStatus:
        """A server's own report of its state.

        Raises UnsupportedServer, and whatever `query` raises.
        """
        ...

    def omissions(self, query: Query) -> str:
        """What a writer leaves out of its log, so that no reader ever has it; "" if nothing.

        Raises whatever `query` raises.
        """
        ...

    @property
    def FUNCTIONS(self) -> str: ...
    def parse_functions(self, rows: Iterable[Sequence[Any]]) -> frozenset[str]:
        """The answer to FUNCTIONS as names that are reads: "schema.name", and "name" if it is a read in every schema."""
        ...


class ErrorCodes(Protocol):
    """What the servers' error codes mean. The type of a code is that of the driver's `code()`."""

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

    def explain_refusal(self, code: Any, message: str) -> tuple[ProbeFailure, str]:
        """A failed probe in words for the user, and whether another try can help."""
        ...

    @property
    def UNUSABLE(self) -> frozenset[Any]:
        """The codes of errors that only occur while connecting if the server cannot use an argument of the driver's connect()."""
        ...

    def is_busy(self, code: Any, message: str) -> bool:
        """Whether the server is alive but has no room for one more connection."""
        ...


class CommitTable(Protocol):
    """The table in which the outcome of a COMMIT is looked up, and what else is known of commits."""

    @property
    def HAS_XID_STATUS(self) -> bool:
        """Whether servers can report the outcome of a transaction by its id; if not, the table must be asked."""
        ...

    @property
    def PREPARED(self) -> str:
        """The view or command that lists the transactions that were prepared, and neither committed nor rolled back."""
        ...

    @property
    def COMMIT_TABLE(self) -> str: ...
    @property
    def CREATE_COMMIT_TABLE(self) -> Sequence[str]: ...
    @property
    def HAS_COMMIT_TABLE(self) -> str: ...
    @property
    def LOOKUP_SETTINGS(self) -> str: ...
    @property
    def FENCE(self) -> str: ...
    @property
    def HAS_COMMIT_ROW(self) -> str: ...
    @property
    def SYNC_BARRIER(self) -> str: ...
    @property
    def PRUNE(self) -> str: ...
    @property
    def PRUNE_BATCH(self) -> int: ...
    @property
    def RETENTION_SECONDS(self) -> int: ...
    def insert_commit_row(self, execute: Execute, signature: str, database: str | None, declared_read_only: bool) -> str | None:
        """Write the row by which the transaction is found again; returns the schema of its table.

        None if the transaction is read-only, so that it cannot have a row, and nothing of it can be lost.

        database: as the driver's `database()`.
        declared_read_only: as the driver's `declared_read_only()`.

        Raises whatever `execute` raises.
        """
        ...

    def is_read_only(self, code: Any) -> bool:
        """Whether the code of an error to `insert_commit_row` says that the transaction is read-only, and still as it was."""
        ...

    def is_locked_out(self, code: Any) -> bool:
        """Whether the code of an error says that the user has locked other tables, and left out that of the commits."""
        ...

    def is_missing_table(self, code: Any) -> bool:
        """Whether the code of an error says that a table does not exist, or that there is no database to look in."""
        ...


class ServerFamily(Identity, Probing, ErrorCodes, CommitTable, Protocol):
    """The module of a family: its SQL, and how its rows, error codes and messages read.

    The module sends no statements of its own; all its questions go through a `Query` or an `Execute`.
    """


class XidFamily(ServerFamily, Protocol):
    """The module of a family with `HAS_XID_STATUS`: its servers report the outcome of a transaction by its id."""

    @property
    def NOTE(self) -> str: ...
    def parse_note(self, row: Sequence[Any], writer: Instance, topology: Topology) -> Note:
        """The answer to NOTE by the writer of this topology."""
        ...

    @property
    def EVIDENCE(self) -> str: ...
    @property
    def STATUS(self) -> str: ...
    def is_future_xid(self, code: Any) -> bool:
        """Whether the code of the error to STATUS says that the xid has not been given out yet."""
        ...

    def parse_evidence(self, row: Sequence[Any], status: str | None) -> Evidence | None:
        """The answers to EVIDENCE and STATUS; None if the server is not the writer.

        Raises UnsupportedServer.
        """
        ...

    @property
    def END_IDLE(self) -> str:
        """Ends a transaction that waits for its COMMIT."""
        ...


def supports_xid_status(family: ServerFamily) -> TypeGuard[XidFamily]:
    """Whether the family's servers can report the outcome of a transaction by its id."""
    return family.HAS_XID_STATUS
