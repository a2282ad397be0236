"""One unit of work: its place, its history, and the door by which it gets a connection from an engine."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, Literal, NamedTuple, Protocol, Self, TypeAlias, TypeVar

from sqlalchemy.engine import Engine
from sqlalchemy.orm import Mapper
from sqlalchemy.pool import PoolProxiedConnection

from aurora_router.core.failures import REFUSED_WRITE, Facts, Failure, Phase, confirmed_facts, facts
from aurora_router.core.instance import Instance, ServerId
from aurora_router.core.positions import LastRead, Requirement, merge
from aurora_router.core.selection import Reason
from aurora_router.core.statements import Effect
from aurora_router.errors import Outcome, OutcomeUnknown, Signal
from aurora_router.limits import Slot

T = TypeVar("T")

_numbers = itertools.count(1)

CommitCheck = Literal["xid", "table"]

Row: TypeAlias = tuple[Mapper[Any], tuple[Any, ...]]
"""A row as the session identifies it: the mapper and the primary key."""


class NotARead(Signal):
    """Raised before a statement is sent to a reader in an automatic unit: the unit must move to the writer."""

    def __init__(self, effect: Effect, reason: Reason) -> None:
        self.effect = effect
        self.reason = reason
        super().__init__(reason.value)


class Trouble(NamedTuple):
    """A statement that has broken an instance or lost its connection, and where.

    at: seconds, monotonic.
    times: how often in a row the same statement has met the same failure.
    """

    text: str | None
    failure: Failure
    instance: str
    server: ServerId
    at: float
    times: int


class Run:
    """One run of a function that may be run again: what its units must know, and what they leave behind.

    deadline: seconds, monotonic, until which the units may wait for a writer. None: as long as any unit may.
    before: the run before this one, which has failed.
    stale: rows that earlier runs have read stale.
    on_writer: whether a reader has misled an earlier run. Then the units are on the writer from the start.
    refusals: how often the writer has refused to write, although it is the writer. Earlier runs count, too.
    trouble: the last failure that a statement of this run or an earlier one has met.
    """

    is_undoable = True  # nothing is known to be committed, or to outlive a rollback
    failed: Facts | None = None  # what the last error of its units means
    found_stale: frozenset[Row] = frozenset()  # rows that this run itself has read stale
    has_read_on_reader = False
    misled = False  # by a late reader
    stale: frozenset[Row] = frozenset()
    on_writer = False
    refusals = 0
    trouble: Trouble | None = None

    def __init__(self, deadline: float | None, before: Run | None = None) -> None:
        self.deadline = deadline
        if before is not None:
            self.stale = before.stale | before.found_stale
            self.on_writer = before.on_writer or before.misled or bool(self.stale)
            self.refusals = before.refusals
            self.trouble = before.trouble

    def is_misled(self) -> bool:
        """Note that the writer has refused a write of this run, and return whether late rows may be the cause.

        That is so if the run has read on a reader. Then the next run reads on the writer, and a refusal there is the
        application's own error.
        """
        self.misled = self.has_read_on_reader
        return self.misled

    def refused(self) -> Facts:
        """Note that SQLAlchemy has not found a row as the run had read it, and return what that means."""
        means = confirmed_facts if self.is_misled() else facts
        self.failed = means(REFUSED_WRITE, Phase.WRITER_STATEMENT)
        return self.failed


class Past:
    """What the units of a session, or of a causal scope, have written and read so far.

    given: the token that the session or scope began with.
    requirement: what a reader must have replayed.
    last_reads: the last read on each server. Later reads may not show less.
    wrote: whether anything was written after `given`.
    """

    last_reads: frozenset[LastRead] = frozenset()
    wrote = False
    # One lock for all, held for a microsecond. It is reentrant because the garbage collector may end a unit meanwhile.
    _lock = threading.RLock()

    def __init__(self, given: str | None = None, requirement: Requirement | None = None) -> None:
        self.given = given
        self.requirement = requirement

    @staticmethod
    def forked() -> None:
        """Make a new lock in a forked child, in which no thread holds the old one."""
        Past._lock = threading.RLock()

    def note(
        self,
        requirement: Requirement | None,
        last_read: LastRead | None = None,
        *,
        known: frozenset[LastRead] = frozenset(),
        wrote: bool = False,
    ) -> None:
        """Add what a unit leaves behind.

        known: earlier reads that `last_read` already covers.
        """
        with Past._lock:
            if wrote:
                self.wrote = True
            while True:
                mine, reads = self.requirement, self.last_reads
                both, left = merge(mine, requirement), reads
                if last_read is None and not reads:
                    pass
                elif last_read is not None and not reads:
                    left = frozenset((last_read,))
                elif last_read is not None:
                    others = reads - known
                    same = [other for other in others if other.server == last_read.server]
                    left = others.difference(same) | {max(last_read, *same, key=_at) if same else last_read}
                elif reads and requirement is not None and not requirement.given:
                    # A reader that has replayed the requirement shows all that any reader had shown by that time.
                    left = frozenset(read for read in reads if read.at > requirement.after)
                # Otherwise the garbage collector has ended a unit meanwhile, which called this method: begin again.
                if self.requirement is mine and self.last_reads is reads:
                    self.requirement, self.last_reads = both, left
                    return

    def lapse(self) -> None:
        """Drop the requirement of the token, which was honoured for long enough."""
        with Past._lock:
            if self.requirement is not None and self.requirement.given:
                self.requirement = None


def _at(read: LastRead) -> float:
    return read.at


class Scope(Past):
    """A causal scope: what all units inside it have written and read.

    Inside are the units of this thread or task until the block ends. So are those of tasks and threads that start there with a
    copy of its context.

    `with scope:` may be used again and again.
    """

    def __init__(self, owner: object, past: Past, ask: Callable[[Past], str | None]) -> None:
        super().__init__(past.given, past.requirement)
        self.owner = owner
        self._ask = ask
        self.units: set[Unit] = set()  # those that have a connection

    @property
    def token(self) -> str | None:
        """The token of the writes in this scope; None if there were none and the scope began without a token.

        It costs at most one query on the writer, and nothing if nothing was written since the last time.
        """
        self.catch_up()
        return self._ask(self)

    def __enter__(self) -> Self:
        _scopes.set((*_scopes.get(), self))
        return self

    def __exit__(self, *_: object) -> None:
        # No reset(): blocks in generators may end in another order than they began, or in another context.
        open_here = [*_scopes.get()]
        if self in open_here:
            open_here.remove(self)
            _scopes.set(tuple(open_here))

    def clear(self) -> None:
        """Forget the open units in a forked child, because they are the parent's."""
        self.units.clear()

    def catch_up(self, but: Unit | None = None) -> None:
        """Note what the open units of this scope have committed and read until now.

        but: a unit to leave out.
        """
        if len(self.units) == (but is not None):
            return  # `but` has a connection, so it is in the set, alone
        for unit in [*self.units]:
            if unit is not but and unit.counts:
                unseen = unit.unseen_end() is not None
                self.note(*unit.left_behind(unit.read_at), known=unit.last_reads, wrote=unseen)


_scopes: ContextVar[tuple[Scope, ...]] = ContextVar("aurora_router_scopes", default=())


def current(owner: object) -> tuple[Scope, ...]:
    """The scopes of a router that are open in this context."""
    scopes = _scopes.get()
    return tuple(scope for scope in scopes if scope.owner is owner) if scopes else ()


class Unit:
    """One unit of work: its place, and what was done in it.

    read_only: what the user declared. None: the router decides.
    instance: None before the first statement.
    """

    instance: Instance | None = None
    on_writer = False
    server: ServerId | None = None  # the server behind its connection
    on_writer_since = 0  # a number from SQLAlchemy's counter of loads
    epoch = 0
    requirement: Requirement | None = None
    last_reads: frozenset[LastRead] = frozenset()
    pasts: tuple[Past, ...] = ()  # those of its session and of the scopes around it
    scopes: tuple[Scope, ...] = ()  # the same scopes, unless consistency is "eventual"
    of_session = False  # it ends when its session says so, not with its connection
    # Seconds, monotonic: when the session had executed the last statement. None: the session cannot tell.
    read_at: float | None = None
    noted = False  # all that it leaves behind, with its commit or its connection
    handed_out = False  # the user has its connection
    ends: Callable[[], int] | None = None  # counts transactions that ended on the user's connection
    ends_known = 0
    _ended_at: float | None = None
    waited = False  # for a reader
    shown = False  # it has executed a statement on its present instance
    queues = False  # for its reader's pool, because no other reader has room
    avoid: frozenset[str] = frozenset()
    hint: Literal["writer", "reader"] | None = None  # of the statement that is being executed
    text: str | None = None  # of the last statement that passed the gate
    wrote = False
    may_have_committed = False  # some of its writes
    committed = False  # by the COMMIT at its end
    only_reads = True  # nothing but READ statements so far
    repeats = 0
    refused: str | None = None  # the text for which it had to leave its reader
    trouble: Trouble | None = None  # the last that one of its statements has met
    leaves_traces = False  # on its connection; a rollback does not remove them
    streaming = False  # a server-side cursor may be open
    # The gate must look before each statement: the unit streams, or only a guard keeps it from writing.
    watched = False
    # It holds a read-only transaction on its reader, because a listener of the application has set something there.
    holds = False
    isolation: str | None = None  # the level that the session asked SQLAlchemy for
    run: Run | None = None
    check: CommitCheck | None = None  # how to find the outcome of a COMMIT whose answer is lost
    committing = False  # the last statement sent may have committed
    outcome: Outcome | None = None  # of an unanswered COMMIT, if the router has found it
    unknown: OutcomeUnknown | None = None  # the error of an unanswered COMMIT, if it has not
    writer_read_slot: Slot | None = None  # in the writer's pool, until the unit ends
    checkout_began: float | None = None  # seconds, monotonic; None if nobody listens
    # The instances whose connections it has, and since when (seconds, monotonic). None if nobody listens.
    checked_out: dict[str, float] | None = None
    _number: int | None = None

    def __init__(self, read_only: bool | None) -> None:
        self.read_only = read_only

    @property
    def number(self) -> int:
        """A number for the unit's events, which no other unit of this process has. It is made if somebody asks for it."""
        if self._number is None:
            self._number = next(_numbers)
        return self._number

    @property
    def may_write(self) -> bool:
        """Whether its statements may have written, even if all look like reads. A view may call a function that writes."""
        return self.on_writer and not self.read_only and self.text is not None

    @property
    def spoils_connection(self) -> bool:
        """Whether its connection has traces of a failed run, which the next unit must not meet."""
        return self.leaves_traces and self.run is not None and not self.committed

    @property
    def counts(self) -> bool:
        """Whether it may have read or committed something that was not noted yet."""
        told = self.wrote or self.read_at is not None or not self.of_session
        sent = self.handed_out or (self.text is not None and told)
        return not self.noted and (sent or (self.ends is not None and self.unseen_end() is not None))

    def unseen_end(self) -> float | None:
        """When the router last noticed the end of a transaction on the user's connection; None if none has ended.

        In seconds, monotonic. The router need not have seen its COMMIT.
        """
        if self.ends is not None:
            ends = self.ends()
            if ends != self.ends_known:
                # First, because other threads call this method, too.
                self._ended_at = time.monotonic()
                self.ends_known = ends
        return self._ended_at

    def left_behind(self, at: float | None) -> tuple[Requirement | None, LastRead | None]:
        """What later units must see if they are to see all that this unit had seen by a moment.

        at: the moment, seconds, monotonic. None: now.
        """
        if at is None:
            at = time.monotonic()
        if self.on_writer:
            return Requirement(at, self.epoch), None
        if self.server is None:
            return None, None
        return self.requirement, LastRead(self.server, at, self.epoch)

    def release(self) -> None:
        """Release its slot in the writer's pool, if it has one."""
        if self.writer_read_slot is not None:
            self.writer_read_slot.release()


Judge: TypeAlias = Callable[[Engine, bool], Reason | None]
"""Why the statement for which a unit enters must be on the writer, as that engine would send it; None if it may be a read.

The second argument says whether to find out at any price.
"""


class Door(Protocol[T]):
    """How a unit gets a connection from an engine."""

    @property
    def judge(self) -> Judge | None: ...

    def connect(self, engine: Engine) -> T: ...

    def pooled(self, connection: T) -> PoolProxiedConnection:
        """The pool's connection inside the result of connect()."""
        ...

    def drop(self, connection: T) -> None:
        """Discard the connection."""
        ...
