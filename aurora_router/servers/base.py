"""`ServerFamily`: the names that the module of a server family must have. None of them depends on the driver."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias, TypeGuard

from aurora_router.core.commit_outcome import Evidence, Note
from aurora_router.core.failures import Failure
from aurora_router.core.incidents import Incidents
from aurora_router.core.instance import Instance, ProbeFailure, Role, ServerId, ServerStatus
from aurora_router.core.query import Query
from aurora_router.core.topology import Topology

Pooler: TypeAlias = Literal["session", "transaction"]
"""How long a pooler in front of the servers keeps a client on one server connection."""


Execute: TypeAlias = Callable[[str, Mapping[str, Any] | None], Sequence[Any] | None]
"""Sends one statement with its parameters. Returns the first row of the answer, if it has any."""


class Identification(NamedTuple):
    """The server that a fresh connection has reached.

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

    passing: whether the server may become usable without a change by anybody.
    """

    def __init__(self, message: str, *, passing: bool = False) -> None:
        super().__init__(message)
        self.passing = passing


class Identity(Protocol):
    """Who a server is, and what holds on all servers of the family."""

    @property
    def DIALECT(self) -> str:
        """The SQL dialect of statements whose server is unknown."""
        ...

    @property
    def DEFAULT_ISOLATION(self) -> str:
        """The servers' own default isolation level. No user has asked for it, so automatic units read on readers at it."""
        ...

    @property
    def BEYOND_READERS(self) -> frozenset[str]:
        """The isolation levels that a reader refuses, by their names on servers."""
        ...

    def recognizes(self, row: Sequence[Any]) -> bool:
        """Return whether a server that answers `WHO` with this row is of the family. Not called for the usual family."""
        ...

    def dialect(self, server: ServerId) -> str:
        """Return the SQL dialect of a server, as `analysis.analyze` takes it."""
        ...

    @property
    def LITERALS(self) -> str:
        """SQL that asks what a backslash means in string literals. It is sent only if the driver does not know that."""
        ...

    def identify(self, query: Query, process: int, pooler: Pooler | None) -> Identification:
        """Find out which server a fresh connection has reached. Make a reader's connection refuse writes, unless it is shared.

        process: the number of the server's process, as the client got it at login.
        pooler: the `pooler` setting: the kind of pooler in front of the servers. None: the user has not said.

        Raises UnsupportedServer, and the driver's errors.
        """
        ...

    @property
    def SET_DEFAULT_READ_ONLY(self) -> str:
        """SQL that makes a connection refuse writes outside of transactions."""
        ...

    @property
    def SET_DEFAULT_READ_WRITE(self) -> str: ...


class Probing(Protocol):
    """The questions of the monitor."""

    def probe(self, query: Query, *, asynchronous_commits: bool) -> ServerStatus:
        """Return a server's own report of its state.

        Raises UnsupportedServer, and the errors of `query`.
        """
        ...

    def omissions(self, query: Query) -> str:
        """Describe the data that a server leaves out of its log, so that no reader behind it ever has it; "" if there is none.

        Raises the errors of `query`.
        """
        ...

    @property
    def FUNCTIONS(self) -> str: ...
    def parse_functions(self, rows: Iterable[Sequence[Any]]) -> frozenset[str]:
        """Return the names of the functions that only read, from the answer to FUNCTIONS.

        A name is "schema.name", and also "name" if the function only reads in every schema.
        """
        ...


class ErrorCodes(Protocol):
    """The meaning of the servers' error codes. A code has the type that the driver's `code()` returns."""

    def failure(self, code: Any, message: str, *, disconnected: bool) -> Failure:
        """Return the kind of failure that a driver's error stands for.

        disconnected: the connection is unusable.
        """
        ...

    @property
    def ERROR_ENDS_TRANSACTION(self) -> bool:
        """Whether any error of a statement makes the rest of its transaction impossible."""
        ...

    @property
    def KILLED(self) -> frozenset[Any]:
        """The codes by which a server reports that somebody has ended a connection."""
        ...

    @property
    def CONNECTING(self) -> frozenset[Any]:
        """The codes that a server only gives while connecting, unless the driver knows such errors by themselves."""
        ...

    @property
    def ENDED(self) -> str:
        """The possible reasons why a living server has ended the connection of a statement, for an error message."""
        ...

    def explain_refusal(self, code: Any, message: str) -> tuple[ProbeFailure, str]:
        """Return the kind of a failed probe, which says whether a retry can help, and words for the user."""
        ...

    @property
    def UNUSABLE(self) -> frozenset[Any]:
        """The codes that mean, in a connect, that the server cannot use an argument of the driver's connect()."""
        ...

    def is_busy(self, code: Any, message: str) -> bool:
        """Return whether the server is alive but has no room for one more connection."""
        ...


class CommitTable(Protocol):
    """The table in which the outcome of a COMMIT is looked up, and other facts about commits."""

    @property
    def HAS_XID_STATUS(self) -> bool:
        """Whether servers can report the outcome of a transaction by its id; if not, the table must be asked."""
        ...

    @property
    def PREPARED(self) -> str:
        """The view or command that lists the transactions that were prepared and have not ended."""
        ...

    @property
    def COMMIT_TABLE(self) -> str: ...
    @property
    def CREATE_COMMIT_TABLE(self) -> Sequence[str]: ...
    @property
    def COMMIT_TABLE_FLAW(self) -> str:
        """SQL that asks why the commit table is not fit: "" if it is, NULL or no row if there is none."""
        ...

    @property
    def LOOKUP_SETTINGS(self) -> str: ...
    @property
    def FENCE(self) -> str: ...
    @property
    def COMMIT_ROW_EVIDENCE(self) -> str:
        """SQL that asks whether a row is a transaction's own, and why the table's rows prove nothing ("" if they do)."""
        ...

    @property
    def SYNC_BARRIER(self) -> str: ...
    @property
    def PRUNE(self) -> str: ...
    @property
    def PRUNE_BATCH(self) -> int: ...
    @property
    def RETENTION_SECONDS(self) -> int: ...
    def insert_commit_row(self, execute: Execute, signature: str, database: str | None, declared_read_only: bool) -> str | None:
        """Write the row by which the transaction is found again, and return the schema of its table.

        Return None if the transaction is read-only. It cannot have a row, and it has nothing to lose.

        database: the result of the driver's `database()`.
        declared_read_only: the result of the driver's `declared_read_only()`.

        Raises the errors of `execute`.
        """
        ...

    def is_read_only(self, code: Any) -> bool:
        """Return whether an error of `insert_commit_row` means that the transaction is read-only, and still usable."""
        ...

    def is_locked_out(self, code: Any) -> bool:
        """Return whether the code of an error says that the user has locked some tables, but not the commit table."""
        ...

    def is_missing_table(self, code: Any) -> bool:
        """Return whether the code of an error says that a table does not exist, or that no database is selected."""
        ...


class ServerFamily(Identity, Probing, ErrorCodes, Incidents, CommitTable, Protocol):
    """The module of a family: its SQL, and what its rows, error codes and messages mean.

    The module sends no statements of its own; all its questions go through a `Query` or an `Execute`.
    """


class XidFamily(ServerFamily, Protocol):
    """The module of a family with `HAS_XID_STATUS`: its servers report the outcome of a transaction by its id."""

    @property
    def NOTE(self) -> str: ...
    def parse_note(self, row: Sequence[Any], writer: Instance, topology: Topology) -> Note:
        """Parse the answer of the topology's writer to NOTE."""
        ...

    @property
    def EVIDENCE(self) -> str: ...
    @property
    def STATUS(self) -> str: ...
    def is_future_xid(self, code: Any) -> bool:
        """Return whether the code of an error of STATUS says that the xid has not been assigned yet."""
        ...

    def parse_evidence(self, row: Sequence[Any], status: str | None) -> Evidence | None:
        """Parse the answers to EVIDENCE and STATUS. Return None if the server is not the writer.

        Raises UnsupportedServer.
        """
        ...

    @property
    def END_IDLE(self) -> str:
        """SQL that ends a transaction that waits for its COMMIT."""
        ...


def supports_xid_status(family: ServerFamily) -> TypeGuard[XidFamily]:
    """Return whether the family's servers can report the outcome of a transaction by its id."""
    return family.HAS_XID_STATUS
