"""Frozen records of events. Logs, metrics, traces and live views listen to them, and no code branches on them.

No record carries a statement's text, a parameter or a credential.
"""

from __future__ import annotations

from dataclasses import dataclass

from aurora_router.core.selection import Reason


@dataclass(frozen=True, slots=True)
class Routed:
    """A unit went to an instance: its first one, or the writer after a move.

    reason: why that instance was chosen.
    """

    instance: str
    reason: Reason


@dataclass(frozen=True, slots=True)
class Moved:
    """A unit left its reader for the writer.

    instance: the reader.
    reason: why the unit must be on the writer.
    """

    instance: str
    reason: Reason


@dataclass(frozen=True, slots=True)
class Repeated:
    """A read failed with its instance, and is retried elsewhere.

    instance: the one that failed.
    error: the class of the error.
    """

    instance: str
    error: str


@dataclass(frozen=True, slots=True)
class Learned:
    """A reader refused a statement that looked like a read. Its text goes to the writer for ten minutes if the writer serves it.

    code: the SQLSTATE on PostgreSQL, the error's number on MySQL and MariaDB.
    """

    instance: str
    code: str | int | None


@dataclass(frozen=True, slots=True)
class WaitedForWriter:
    """A unit waited for a writer, and its wait has ended.

    seconds: how long it waited.
    found: the instance; None if the unit gave up.
    """

    seconds: float
    found: str | None


@dataclass(frozen=True, slots=True)
class WaitingForWriter:
    """Units wait for a writer. Sent at most once in 10 s.

    units: how many wait.
    said: the last state of each instance, in words.
    """

    units: int
    said: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class NoReaderQualifies:
    """Reads go to the writer, because no reader qualifies. Sent at most once in 10 s.

    writer: the instance that gets them.
    reads: the number of units since the last such event.
    said: the last state of each instance, in words.
    """

    writer: str
    reads: int
    said: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ConnectFailed:
    """A unit could not get a new connection to an instance.

    why: the words of the driver or the server.
    """

    instance: str
    why: str


@dataclass(frozen=True, slots=True)
class RunAgain:
    """A unit of run_transaction failed, and runs again.

    number: the number of the run that failed, beginning with 1.
    error: the class of the error.
    """

    number: int
    error: str


@dataclass(frozen=True, slots=True)
class RetriesRefused:
    """Retries were refused, because they were too many for the traffic. Sent at most once a second.

    instance: where the last of them failed; None for a run of run_transaction.
    refused: the number of refusals since the last such event.
    """

    instance: str | None
    refused: int


@dataclass(frozen=True, slots=True)
class CommitResolved:
    """The answer to a COMMIT was lost, and the newest writer was asked.

    instance: where the COMMIT was sent.
    outcome: "committed", "not committed" or "cannot be known".
    seconds: how long the answer took.
    """

    instance: str
    outcome: str
    seconds: float


@dataclass(frozen=True, slots=True)
class TokenIgnored:
    """A consistency token of a request or a message does not count.

    reason: why. Nothing of the token's text is in it.
    """

    reason: str


@dataclass(frozen=True, slots=True)
class MovedByListener:
    """A unit goes to the writer, because of a listener of the application.

    When the unit came to a reader, that listener sent more than reads and settings.

    instance: the reader.
    """

    instance: str


@dataclass(frozen=True, slots=True)
class InstanceUp:
    """An instance answers, for the first time or again.

    role: "writer" or "reader".
    """

    instance: str
    role: str


@dataclass(frozen=True, slots=True)
class InstanceDown:
    """An instance does not answer any more, or cannot be used from the start.

    error: why it is not used.
    """

    instance: str
    error: str


@dataclass(frozen=True, slots=True)
class WriterChanged:
    """Another instance is the writer, or none is.

    old, new: the instances; None if there was or is no writer.
    epoch: the newest one that is known.
    """

    old: str | None
    new: str | None
    epoch: int


@dataclass(frozen=True, slots=True)
class ConnectionsDiscarded:
    """An instance's pooled connections were discarded at once.

    cut: how many connections in use were cut as well.
    """

    instance: str
    cut: int
    reason: str


@dataclass(frozen=True, slots=True)
class ConnectionRefused:
    """A new connection reached another server than the topology knows there, and was discarded.

    why: a description of that server.
    """

    instance: str
    why: str


Event = (
    Routed
    | Moved
    | MovedByListener
    | Repeated
    | Learned
    | WaitedForWriter
    | WaitingForWriter
    | NoReaderQualifies
    | ConnectFailed
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
