"""What all server families share, and what the module of one must give: `Family`."""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol, TypeAlias, TypeGuard

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


class Unsuitable(Exception):
    """A server that answers, but not one that can be used; the message says why and what to do."""


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

    def encrypted(self, query: dict[str, Any]) -> dict[str, Any]:
        """The query of a URL, with encryption unless the user says otherwise."""
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
    def FUNCTIONS(self) -> str: ...
    def greet(self, connection: Any, ask: Ask) -> tuple[ServerId, Role]:
        """Which server a fresh connection has reached; a reader's is guarded. Raises Unsuitable, the driver's errors."""
        ...

    def probe(self, ask: Ask, *, asynchronous_commits: bool) -> Server:
        """What a server says of itself. Raises Unsuitable, whatever `ask` raises."""
        ...

    def parse_functions(self, rows: Iterable[Sequence[Any]]) -> frozenset[str]:
        """The answer to FUNCTIONS as names that are reads: "schema.name", and "name" where that is so in every schema."""
        ...

    # -- how errors read

    def code(self, error: BaseException | None) -> str | int | None:
        """The server's, or the driver's, code of an error; None where it has none."""
        ...

    def failure(self, code: Any, message: str, *, disconnected: bool) -> Failure:
        """What kind of failure a driver's error stands for. disconnected: the connection is unusable."""
        ...

    def is_from_connecting(self, error: BaseException) -> bool:
        """Whether the driver's error is one that is only met while connecting."""
        ...

    def explain_refusal(self, code: Any, message: str) -> tuple[Silence, str]:
        """A failed probe in words for the user, and whether trying again can help."""
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

    def guard(self, connection: Any, ask: Ask, on: bool) -> None:
        """Have an idle connection refuse writes outside of transactions, or accept them again."""
        ...

    def watch_connecting(self, dialect: Any, connecting: Callable[[int], AbstractContextManager[None]]) -> None:
        """Have a dialect's new connections wait for the server within `connecting(number of the socket)`, which may end the wait
        by shutting the socket."""
        ...

    def prepare(self, connection: Any) -> None:
        """Whatever else a new pooled connection needs."""
        ...

    # -- what became of a COMMIT

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
