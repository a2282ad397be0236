"""Frozen records of what happened. Logs, metrics, traces and live views listen to them; nothing branches on them.

No record carries a statement's text, a parameter or a credential.
"""

from __future__ import annotations

from dataclasses import dataclass

from aurora_router.core.selection import Reason


@dataclass(frozen=True, slots=True)
class Routed:
    """A unit went to an instance (first use in the unit, or a move)."""

    instance: str
    reason: Reason


@dataclass(frozen=True, slots=True)
class Moved:
    """A unit left its reader for the writer."""

    instance: str
    reason: Reason


@dataclass(frozen=True, slots=True)
class Repeated:
    """A read failed with its instance and is being repeated elsewhere."""

    instance: str
    error: str


@dataclass(frozen=True, slots=True)
class Learned:
    """A reader refused a statement that looked like a read; from now on it goes to the writer. code: the SQLSTATE on PostgreSQL,
    the error's number on MySQL and MariaDB."""

    instance: str
    code: str | int | None


@dataclass(frozen=True, slots=True)
class WaitedForWriter:
    """A unit waited for a writer. seconds: how long. found: the instance, or None when it gave up."""

    seconds: float
    found: str | None


@dataclass(frozen=True, slots=True)
class RunAgain:
    """A unit of run_transaction failed and is being run again. number: of the run that failed. error: its class."""

    number: int
    error: str


@dataclass(frozen=True, slots=True)
class RetriesRefused:
    """Repeats were refused, because they were too many for the traffic; told at most once a second.

    instance: where the last of them failed, None for a run of run_transaction. refused: how many since this was last told.
    """

    instance: str | None
    refused: int


@dataclass(frozen=True, slots=True)
class CommitResolved:
    """The answer to a COMMIT was lost, and the newest writer was asked. seconds: how long that took.

    outcome: "committed", "not committed" or "cannot be known".
    """

    instance: str
    outcome: str
    seconds: float


@dataclass(frozen=True, slots=True)
class TokenIgnored:
    """A consistency token that came with a request or a message does not count. reason: why; nothing of its text is in it."""

    reason: str


@dataclass(frozen=True, slots=True)
class InstanceUp:
    """An instance answers (again)."""

    instance: str
    role: str


@dataclass(frozen=True, slots=True)
class InstanceDown:
    """An instance stopped answering or cannot be used. error: what was last heard."""

    instance: str
    error: str


@dataclass(frozen=True, slots=True)
class WriterChanged:
    """The writer is another one, or none. epoch: the newest known."""

    old: str | None
    new: str | None
    epoch: int


@dataclass(frozen=True, slots=True)
class ConnectionsDiscarded:
    """An instance's pooled connections were discarded at once; those in use were cut where `cut` says how many."""

    instance: str
    cut: int
    reason: str


@dataclass(frozen=True, slots=True)
class ConnectionRefused:
    """A new connection was discarded because it reached another server than the topology knows there."""

    instance: str
    why: str


Event = (
    Routed
    | Moved
    | Repeated
    | Learned
    | WaitedForWriter
    | RunAgain
    | RetriesRefused
    | CommitResolved
    | TokenIgnored
    | InstanceUp
    | InstanceDown
    | WriterChanged
    | ConnectionsDiscarded
    | ConnectionRefused
)
