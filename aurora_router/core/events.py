"""Frozen records of events. Logs, metrics, traces and live views listen to them, and no code branches on them.

No record carries a statement's text, a parameter or a credential.
"""

from __future__ import annotations

from dataclasses import FrozenInstanceError, dataclass, field, fields
from typing import Literal, TypeVar, dataclass_transform

from aurora_router.core.selection import Reason

__all__ = [
    "AttemptEnded",
    "AttemptStarted",
    "CheckoutFailed",
    "CheckoutStarted",
    "CommitResolved",
    "ConnectFailed",
    "ConnectionCheckedIn",
    "ConnectionClosed",
    "ConnectionCreated",
    "ConnectionRefused",
    "ConnectionsDiscarded",
    "Event",
    "InstanceDown",
    "InstanceUp",
    "Learned",
    "Moved",
    "MovedByListener",
    "NoReaderQualifies",
    "ProbeFailed",
    "ProbeStarted",
    "ProbeSucceeded",
    "Repeated",
    "RetriesRefused",
    "Routed",
    "RunAgain",
    "TokenIgnored",
    "Wait",
    "WaitEnded",
    "WaitStarted",
    "WaitedForWriter",
    "WaitingForWriter",
    "WriterChanged",
]


T = TypeVar("T")


# The methods of _Happened are written once. A dataclass would make them anew for each class, which would take 10 ms of an import.
@dataclass_transform(frozen_default=True, eq_default=False, field_specifiers=(field,))
def _event(made: type[T]) -> type[T]:
    """Make a frozen dataclass of a subclass of _Happened."""
    return dataclass(slots=True, repr=False, eq=False)(made)


@_event
class _Happened:
    """An event. Two events are equal if their types and the compared fields are equal. `at` is not compared.

    at: seconds since 1970, as time.time() returns them. 0.0 in an event that no router has published.
    """

    at: float = field(default=0.0, compare=False, kw_only=True)

    def __setattr__(self, name: str, value: object) -> None:
        if hasattr(self, name):
            raise FrozenInstanceError(f"cannot assign to field {name!r}")
        object.__setattr__(self, name, value)

    def __delattr__(self, name: str) -> None:
        raise FrozenInstanceError(f"cannot delete field {name!r}")

    def __eq__(self, other: object) -> bool:
        return self._said() == other._said() if type(other) is type(self) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._said())

    def __repr__(self) -> str:
        said = ", ".join(f"{each.name}={getattr(self, each.name)!r}" for each in fields(self))
        return f"{type(self).__name__}({said})"

    def _said(self) -> tuple[object, ...]:
        return tuple(getattr(self, each.name) for each in fields(self) if each.compare)


@_event
class _OfUnit(_Happened):
    """An event of a unit.

    unit: a number of the unit, which no other unit of this process has. None if no unit is known.
    transaction: as in `AttemptStarted`, if the unit is part of an attempt of run_transaction; None if it is not.
    """

    unit: int | None = field(default=None, compare=False, kw_only=True)
    transaction: int | None = field(default=None, compare=False, kw_only=True)


Wait = Literal["writer", "reader", "slot"]


@_event
class Routed(_OfUnit):
    """A unit went to an instance: its first one, or the writer after a move.

    reason: why that instance was chosen.
    seconds: how long the checkout took.
    connection: as in `ConnectionCreated`.
    """

    instance: str
    reason: Reason
    seconds: float | None = field(default=None, compare=False, kw_only=True)
    connection: int | None = field(default=None, compare=False, kw_only=True)


@_event
class Moved(_OfUnit):
    """A unit left its reader for the writer.

    instance: the reader.
    reason: why the unit must be on the writer.
    """

    instance: str
    reason: Reason


@_event
class Repeated(_OfUnit):
    """A read failed with its instance, and is retried elsewhere.

    instance: the one that failed.
    error: the class of the error.
    """

    instance: str
    error: str


@_event
class Learned(_OfUnit):
    """A reader refused a statement that looked like a read. Its text goes to the writer for ten minutes if the writer serves it.

    code: the SQLSTATE on PostgreSQL, the error's number on MySQL and MariaDB.
    """

    instance: str
    code: str | int | None


@_event
class WaitedForWriter(_OfUnit):
    """A unit waited for a writer, and its wait has ended.

    seconds: how long it waited.
    found: the instance; None if the unit gave up.
    """

    seconds: float
    found: str | None


@_event
class WaitingForWriter(_Happened):
    """Units wait for a writer. Sent at most once in 10 s.

    units: how many wait.
    said: the last state of each instance, in words.
    """

    units: int
    said: tuple[str, ...]


@_event
class NoReaderQualifies(_Happened):
    """Reads go to the writer, because no reader qualifies. Sent at most once in 10 s.

    writer: the instance that gets them.
    reads: the number of units since the last such event.
    said: the last state of each instance, in words.
    """

    writer: str
    reads: int
    said: tuple[str, ...]


@_event
class ConnectFailed(_OfUnit):
    """A unit could not get a new connection to an instance.

    why: the words of the driver or the server.
    """

    instance: str
    why: str


@_event
class AttemptStarted(_Happened):
    """run_transaction begins to run its function. `AttemptEnded` follows.

    number: the number of the attempt, beginning with 1.
    transaction: a number that all attempts of one function share, and no other events of this process have.
    """

    number: int
    transaction: int = field(compare=False)


@_event
class AttemptEnded(_Happened):
    """An attempt of run_transaction has committed, or has failed.

    number, transaction: as in `AttemptStarted`.
    error: the class of the error; None if it has committed, or if the loop was left by return or break.
    committed: whether it has committed, as far as known.
    seconds: how long it took.
    """

    number: int
    transaction: int = field(compare=False)
    error: str | None
    committed: bool
    seconds: float = field(compare=False)


@_event
class RunAgain(_Happened):
    """A unit of run_transaction failed, and runs again.

    number: the number of the attempt that failed, beginning with 1.
    error: the class of the error.
    """

    number: int
    error: str


@_event
class RetriesRefused(_Happened):
    """Retries were refused, because they were too many for the traffic. Sent at most once a second.

    instance: where the last of them failed; None for an attempt of run_transaction.
    refused: the number of refusals since the last such event.
    """

    instance: str | None
    refused: int


@_event
class CommitResolved(_OfUnit):
    """The answer to a COMMIT was lost, and the newest writer was asked.

    instance: where the COMMIT was sent.
    outcome: "committed", "not committed" or "cannot be known".
    seconds: how long the answer took.
    """

    instance: str
    outcome: str
    seconds: float


@_event
class TokenIgnored(_Happened):
    """A consistency token of a request or a message does not count.

    reason: why. Nothing of the token's text is in it.
    """

    reason: str


@_event
class MovedByListener(_OfUnit):
    """A unit goes to the writer, because of a listener of the application.

    When the unit came to a reader, that listener sent more than reads and settings.

    instance: the reader.
    """

    instance: str


@_event
class InstanceUp(_Happened):
    """An instance answers, for the first time or again.

    role: "writer" or "reader".
    """

    instance: str
    role: str


@_event
class InstanceDown(_Happened):
    """An instance does not answer any more, or cannot be used from the start. Sent again if somebody must mend something else.

    error: why it is not used.
    """

    instance: str
    error: str


@_event
class WriterChanged(_Happened):
    """Another instance is the writer, or none is.

    old, new: the instances; None if there was or is no writer.
    epoch: the newest one that is known.
    """

    old: str | None
    new: str | None
    epoch: int


@_event
class ConnectionsDiscarded(_Happened):
    """An instance's pooled connections were discarded at once.

    cut: how many connections in use were cut as well.
    """

    instance: str
    cut: int
    reason: str


@_event
class ConnectionRefused(_Happened):
    """A new connection reached another server than the topology knows there, and was discarded.

    why: a description of that server.
    """

    instance: str
    why: str


@_event
class CheckoutStarted(_OfUnit):
    """A unit needs a connection. `Routed` or `CheckoutFailed` follows.

    read_only: what the unit declares; None if the router decides.
    """

    read_only: bool | None


@_event
class CheckoutFailed(_OfUnit):
    """A unit got no connection.

    error: the class of the error.
    seconds: how long the checkout took.
    """

    error: str
    seconds: float


@_event
class ConnectionCheckedIn(_OfUnit):
    """A unit has its connection no longer: the unit ended or moved, or the connection was lost or detached from its pool.

    It ends what `Routed` began.

    seconds: how long the unit had it.
    connection: as in `ConnectionCreated`.
    """

    instance: str
    seconds: float
    connection: int | None = field(default=None, compare=False, kw_only=True)


@_event
class WaitStarted(_OfUnit):
    """A unit waits. `WaitEnded` follows.

    what: "writer", "reader" (one that shows all that the unit must see) or "slot" (for a read in the writer's pool).
    """

    what: Wait


@_event
class WaitEnded(_OfUnit):
    """A unit's wait has ended, with success or without.

    what: as in `WaitStarted`.
    seconds: how long it waited.
    """

    what: Wait
    seconds: float


@_event
class ProbeStarted(_Happened):
    """The monitor asks all servers behind an instance for their state. `ProbeSucceeded` or `ProbeFailed` follows."""

    instance: str


@_event
class ProbeSucceeded(_Happened):
    """A server behind an instance has answered the monitor.

    role: "writer" or "reader"; that of the last server to answer, if there are several.
    seconds: how long the probe took.
    """

    instance: str
    role: str
    seconds: float


@_event
class ProbeFailed(_Happened):
    """No server behind an instance has answered the monitor in time, or the instance is not watched any more.

    error: why.
    seconds: how long the probe took.
    """

    instance: str
    error: str
    seconds: float


@_event
class ConnectionCreated(_Happened):
    """A new connection to an instance can be used.

    seconds: how long it took to connect.
    connection: a number of the connection, which no other connection of this process has.
    """

    instance: str
    seconds: float
    connection: int | None = field(default=None, compare=False, kw_only=True)


@_event
class ConnectionClosed(_Happened):
    """A connection that `ConnectionCreated` reported is closed, or nobody has it any more.

    seconds: how long it was open.
    connection: as in `ConnectionCreated`.
    """

    instance: str
    seconds: float
    connection: int | None = field(default=None, compare=False, kw_only=True)


Event = (
    CheckoutStarted
    | Routed
    | CheckoutFailed
    | ConnectionCheckedIn
    | Moved
    | MovedByListener
    | Repeated
    | Learned
    | WaitStarted
    | WaitEnded
    | WaitedForWriter
    | WaitingForWriter
    | NoReaderQualifies
    | ConnectionCreated
    | ConnectionClosed
    | ConnectFailed
    | AttemptStarted
    | AttemptEnded
    | RunAgain
    | RetriesRefused
    | CommitResolved
    | TokenIgnored
    | ProbeStarted
    | ProbeSucceeded
    | ProbeFailed
    | InstanceUp
    | InstanceDown
    | WriterChanged
    | ConnectionsDiscarded
    | ConnectionRefused
)
