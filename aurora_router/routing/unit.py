"""Units of work: the intent, the place, the causal marks and the progress of each.

A unit is the work of one transaction, or of one statement in autocommit. SQLAlchemy calls something else a unit of work: a flush.
"""

from __future__ import annotations

import enum
import itertools
import time
from collections.abc import Callable
from typing import Literal, NamedTuple, TypedDict

from aurora_router.cluster.limits import Slot
from aurora_router.core.instance import Instance, ServerId
from aurora_router.core.positions import LastRead, Requirement
from aurora_router.core.selection import Reason
from aurora_router.core.sql.analysis import Effect
from aurora_router.errors import OutcomeUnknown, Signal
from aurora_router.routing.causal_context import CausalContext, Scope
from aurora_router.routing.retry_context import RetryContext, Trouble

_numbers = itertools.count(1)

CommitCheck = Literal["xid", "table"]


class MustMoveToWriter(Signal):
    """Raised before a statement is sent to a reader in an automatic unit: the unit must move to the writer."""

    def __init__(self, effect: Effect, reason: Reason) -> None:
        self.effect = effect
        self.reason = reason
        super().__init__(reason.value)


class Intent(NamedTuple):
    """What a unit is meant to do. It never changes.

    read_only: what the user declared. None: the router decides.
    owned_by_session: whether the unit ends when its session says so, and not with its connection.
    retry: the attempt of run_transaction() that it belongs to; None if it belongs to none.
    commit_check: how to find the outcome of a COMMIT whose answer is lost.
    """

    read_only: bool | None
    owned_by_session: bool = False
    retry: RetryContext | None = None
    commit_check: CommitCheck | None = None


AUTOMATIC, READ_WRITE, READ_ONLY = Intent(None), Intent(False), Intent(True)


class Place(NamedTuple):
    """Where a unit is. It is replaced as a whole.

    instance: None before the first statement, and after the unit has left. Also None if the user has taken the connection from
        an engine directly.
    on_writer: whether it is, or was last, on the writer.
    epoch: of the writer, when the instance was chosen.
    server: the one behind its connection; None until there is a connection.
    """

    instance: Instance | None = None
    on_writer: bool = False
    epoch: int = 0
    server: ServerId | None = None


NOWHERE = Place()


class CausalMarks(NamedTuple):
    """The reads that a unit must see, and the contexts that record its effects. They are replaced as a whole.

    requirement: what a reader must have replayed.
    last_reads: earlier reads. The unit may show no less.
    contexts: those of its session and of the scopes around it, which get what it leaves behind.
    scopes: the same scopes, unless consistency is "eventual".
    """

    requirement: Requirement | None = None
    last_reads: frozenset[LastRead] = frozenset()
    contexts: tuple[CausalContext, ...] = ()
    scopes: tuple[Scope, ...] = ()


UNMARKED = CausalMarks()


class CommitState(enum.Enum):
    """The progress of a unit's last statement that may commit.

    NONE: no such statement was sent since the last answer.
    SENT: its answer has not come, or was an error.
    COMMITTED: the server or the commit check has said so.
    NOT_COMMITTED: its answer was lost, and the commit check has found that it did not commit.

    If its answer was lost and nobody knows, the error that the application gets stands in place of a state.
    """

    NONE = "none"
    SENT = "sent"
    COMMITTED = "committed"
    NOT_COMMITTED = "not committed"


_NONE, _COMMITTED = CommitState.NONE, CommitState.COMMITTED


class TransactionEnds:
    """The transactions that ended on a connection which the user has. The router need not have seen their COMMITs.

    count: counts them.
    last_at: when an end was last noticed on an earlier connection; seconds, monotonic.
    """

    __slots__ = ("_count", "_known", "_last_at")

    def __init__(self, count: Callable[[], int], last_at: float | None = None) -> None:
        self._count = count
        self._known = count()
        self._last_at = last_at

    @property
    def noticed_at(self) -> float | None:
        """When the router last noticed an end; seconds, monotonic. This does not look for a new one."""
        return self._last_at

    def last_at(self) -> float | None:
        """Return when the router last noticed an end; seconds, monotonic. None if no transaction has ended."""
        ends = self._count()
        if ends != self._known:
            # Set the time first, because other threads call this method, too.
            self._last_at = time.monotonic()
            self._known = ends
        return self._last_at


class UnitNumbers(TypedDict):
    """What all events of a unit say of it: see `events._OfUnit`."""

    unit: int
    transaction: int | None


class Unit:
    """One unit of work. Its intent never changes. Its place and its marks are replaced as a whole. The rest is its progress."""

    place = NOWHERE
    marks = UNMARKED
    commit: CommitState | OutcomeUnknown = CommitState.NONE

    # -- what its statements have done ------------------------------------------------------------------------------------
    last_sql: str | None = None  # the text of the last statement that passed the interceptor
    has_results = False  # a statement has completed on its instance
    wrote = False
    only_reads = True  # nothing but READ statements so far
    leaves_traces = False  # on its connection; a rollback does not remove them
    streaming = False  # a server-side cursor may be open
    # Seconds, monotonic: when the session had executed the last statement. None: the session cannot tell.
    read_at: float | None = None
    recorded = False  # all that it leaves behind was recorded
    commit_started = False  # some of its writes may have been committed
    connection_exposed = False  # the user has its connection
    ends: TransactionEnds | None = None  # on the connection that the user has
    on_writer_since = 0  # a number from SQLAlchemy's counter of loads

    # -- how it gets its connection ---------------------------------------------------------------------------------------
    hint: Literal["writer", "reader"] | None = None  # of the statement that is being executed
    isolation: str | None = None  # the level that the session asked SQLAlchemy for
    avoid: frozenset[str] = frozenset()  # instances on which it has failed
    waited = False  # for a reader
    queues = False  # for its reader's pool, because no other reader has room
    writer_read_slot: Slot | None = None  # in the writer's pool, until the unit ends
    # The interceptor must look before each statement: the unit streams, or only a read-only default keeps it from writing.
    watched = False
    # It holds a read-only transaction on its reader, because a listener of the application has set something there.
    holds = False

    # -- its failures -----------------------------------------------------------------------------------------------------
    retries = 0  # of its reads
    refused: str | None = None  # the text for which it had to leave its reader
    trouble: Trouble | None = None  # the last that one of its statements has met

    # -- what its events say ----------------------------------------------------------------------------------------------
    checkout_began: float | None = None  # the one under way; seconds, monotonic. None without one, and if nobody listens
    _number: int | None = None

    def __init__(self, intent: Intent) -> None:
        self.intent = intent

    def __repr__(self) -> str:
        kind = {None: "automatic", True: "read-only", False: "read-write"}[self.intent.read_only]
        where = f"at {self.place.instance.id}" if self.place.instance is not None else "nowhere"
        role = " (writer)" if self.place.on_writer else ""
        state = [said for said, holds in (("has written", self.wrote), ("streams", self.streaming)) if holds]
        if self.commit is not _NONE:
            state.append(f"COMMIT: {self.commit.value if isinstance(self.commit, CommitState) else 'unknown'}")
        return f"<Unit {', '.join([kind, where + role, *state])}>"

    @property
    def last_reads(self) -> frozenset[LastRead]:
        """Earlier reads. The unit may show no less."""
        return self.marks.last_reads

    @property
    def number(self) -> int:
        """A number for the unit's events, which no other unit of this process has. It is made if somebody asks for it."""
        if self._number is None:
            self._number = next(_numbers)
        return self._number

    @property
    def numbers(self) -> UnitNumbers:
        """Its number, and that of its transaction if it is part of an attempt of run_transaction()."""
        retry = self.intent.retry
        return {"unit": self.number, "transaction": retry.transaction if retry is not None else None}

    @property
    def may_write(self) -> bool:
        """Whether its statements may have written, even if all look like reads. A view may call a function that writes."""
        return self.place.on_writer and not self.intent.read_only and self.last_sql is not None

    @property
    def is_commit_in_doubt(self) -> bool:
        """Whether a COMMIT was sent without a successful answer."""
        return self.commit is not _NONE and self.commit is not _COMMITTED

    @property
    def spoils_connection(self) -> bool:
        """Whether its connection has state of a failed attempt that the next unit must not meet."""
        return self.leaves_traces and self.intent.retry is not None and self.commit is not _COMMITTED

    @property
    def has_unrecorded_effects(self) -> bool:
        """Whether it may have read or committed something that was not recorded yet."""
        told = self.wrote or self.read_at is not None or not self.intent.owned_by_session
        sent = self.connection_exposed or (self.last_sql is not None and told)
        return not self.recorded and (sent or (self.ends is not None and self.unseen_end() is not None))

    def unseen_end(self) -> float | None:
        """Return when the router last noticed the end of a transaction on the user's connection; None if none has ended.

        The time is in seconds, monotonic. The router need not have seen the COMMIT.
        """
        return self.ends.last_at() if self.ends is not None else None

    def causal_footprint(self, at: float | None) -> tuple[Requirement | None, LastRead | None]:
        """Return what later units must see if they are to see all that this unit had seen by a moment.

        at: the moment, seconds, monotonic. None: now.
        """
        if at is None:
            at = time.monotonic()
        place = self.place
        if place.on_writer:
            return Requirement(at, place.epoch), None
        if place.server is None:
            return None, None
        return self.marks.requirement, LastRead(place.server, at, place.epoch)

    def leave(self) -> None:
        """Note that it has left its instance, to go to another one."""
        place = self.place
        self.place = Place(None, place.on_writer, place.epoch, place.server)

    def release(self) -> None:
        """Release its slot in the writer's pool, if it has one."""
        if self.writer_read_slot is not None:
            self.writer_read_slot.release()
