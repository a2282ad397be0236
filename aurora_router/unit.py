"""One unit of work: where it is, what was done in it and before it, and the door by which it gets to an engine."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, Literal, NamedTuple, Protocol, Self, TypeAlias, TypeVar

from sqlalchemy.engine import Engine
from sqlalchemy.orm import Mapper
from sqlalchemy.pool import PoolProxiedConnection

from aurora_router.core.failures import Facts, Failure, Phase, facts
from aurora_router.core.positions import LastRead, Requirement, merge
from aurora_router.core.selection import Reason
from aurora_router.core.statements import Effect
from aurora_router.core.topology import Instance, ServerId
from aurora_router.errors import Outcome, OutcomeUnknown, Signal
from aurora_router.limits import Place

T = TypeVar("T")

CommitCheck = Literal["xid", "table"]

Row: TypeAlias = tuple[Mapper[Any], tuple[Any, ...]]
"""A row as its objects know it: their mapper and the primary key."""


class NotARead(Signal):
    """Raised before a statement is sent to a reader in an automatic unit: the unit must move to the writer."""

    def __init__(self, effect: Effect, reason: Reason) -> None:
        self.effect = effect
        self.reason = reason
        super().__init__(reason.value)


class Trouble(NamedTuple):
    """A statement that has broken an instance or lost its connection, and where.

    at: monotonic seconds. times: how often in a row the same statement has met the same failure.
    """

    text: str | None
    failure: Failure
    instance: str
    server: ServerId
    at: float
    times: int


class Run:
    """One run of a function that may be run again: what the units in it must know, and what they leave behind.

    deadline: monotonic seconds until which they may wait for a writer; None: as long as any unit may. before: the run that has
    failed. stale: rows that earlier runs have read stale. on_writer: whether an earlier run was misled by a reader, so that the
    units are on the writer from the start. refusals: how often the writer has refused, until now, to write in them and in the
    earlier runs, though it is the writer. trouble: what a statement of this run and the earlier ones has met last.
    """

    is_undoable = True  # nothing of it was committed, or has stayed in spite of a rollback, as far as anybody knows
    failed: Facts | None = None  # what the last error of its units means
    found_stale: frozenset[Row] = frozenset()  # rows that it has read stale itself
    has_read_on_reader = False
    misled = False  # by what a reader had shown
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

    def refused(self) -> Facts:
        """What it means that the writer has refused what the run wants to write. What a late reader has shown may be to blame:
        then the next run reads on the writer, and what is refused there is the application's."""
        self.misled = self.has_read_on_reader
        self.failed = facts(Failure.MISLED if self.misled else Failure.CONSTRAINT, Phase.WRITER_STATEMENT)
        return self.failed


class Past:
    """What the units of a session, or of a causal scope, have written and read so far.

    given: the token that it began with. requirement: what a reader must have replayed. last_reads: what it may not undercut, one
    of each server. wrote: since `given`.
    """

    last_reads: frozenset[LastRead] = frozenset()
    wrote = False
    _lock = threading.RLock()  # of all, held for a microsecond; the collector may end a unit meanwhile

    def __init__(self, given: str | None = None, requirement: Requirement | None = None) -> None:
        self.given = given
        self.requirement = requirement

    @staticmethod
    def forked() -> None:
        """In a forked child: nobody holds the lock."""
        Past._lock = threading.RLock()

    def note(
        self,
        requirement: Requirement | None,
        last_read: LastRead | None = None,
        *,
        known: frozenset[LastRead] = frozenset(),
        wrote: bool = False,
    ) -> None:
        """Add what a unit leaves behind. known: reads than which `last_read` showed no less."""
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
                    # Who has replayed that shows all that any reader had shown by then.
                    left = frozenset(read for read in reads if read.at > requirement.after)
                if self.requirement is mine and self.last_reads is reads:  # else the collector has ended a unit meanwhile
                    self.requirement, self.last_reads = both, left
                    return

    def lapse(self) -> None:
        """Ask no longer for what its token speaks of: it was honoured for long enough."""
        with Past._lock:
            if self.requirement is not None and self.requirement.given:
                self.requirement = None


def _at(read: LastRead) -> float:
    return read.at


class Scope(Past):
    """A causal scope: what everything that happens inside it has written and read. `with scope:` may be used again and again.

    Inside is what runs in this thread or task until the block ends, and what starts there with a copy of its context.
    """

    def __init__(self, owner: object, past: Past, ask: Callable[[Past], str | None]) -> None:
        super().__init__(past.given, past.requirement)
        self.owner = owner
        self._ask = ask
        self.units: set[Unit] = set()  # that have a connection

    @property
    def token(self) -> str | None:
        """The token of what was written here; None if nothing was written and no token given.

        It costs at most one query on the writer, and nothing if nothing was written since the last time.
        """
        self.catch_up()
        return self._ask(self)

    def __enter__(self) -> Self:
        _scopes.set((*_scopes.get(), self))
        return self

    def __exit__(self, *_: object) -> None:
        # Not reset(): blocks of generators may end in another order, or in another context, than they began.
        open_here = [*_scopes.get()]
        if self in open_here:
            open_here.remove(self)
            _scopes.set(tuple(open_here))

    def clear(self) -> None:
        """In a forked child: what is under way is the parent's."""
        self.units.clear()

    def catch_up(self, but: Unit | None = None) -> None:
        """Note what the units that are under way here, `but` this one, have committed and were shown until now."""
        if len(self.units) == (but is not None):
            return  # there is nobody else: `but` has a connection
        for unit in [*self.units]:
            if unit is not but and unit.counts:
                unseen = unit.unseen_end() is not None
                self.note(*unit.left_behind(unit.read_at), known=unit.last_reads, wrote=unseen)


_scopes: ContextVar[tuple[Scope, ...]] = ContextVar("aurora_router_scopes", default=())


def current(owner: object) -> tuple[Scope, ...]:
    """The scopes of a router that are open here."""
    scopes = _scopes.get()
    return tuple(scope for scope in scopes if scope.owner is owner) if scopes else ()


class Unit:
    """One unit of work: where it is, and what was done in it.

    read_only: what the user declared; None lets the router decide. instance: None before the first statement.
    """

    instance: Instance | None = None
    on_writer = False
    server: ServerId | None = None  # that its connection leads to
    on_writer_since = 0  # as SQLAlchemy counts its loading
    epoch = 0
    requirement: Requirement | None = None
    last_reads: frozenset[LastRead] = frozenset()
    pasts: tuple[Past, ...] = ()  # of its session and of the scopes around it
    scopes: tuple[Scope, ...] = ()  # those, where they count what it does
    of_session = False  # which says when it has ended; otherwise it ends with its connection
    read_at: float | None = None  # monotonic seconds: when its session had executed the last statement; None: it cannot tell
    noted = False  # all that it leaves behind, with its commit or with its connection
    handed_out = False  # its connection
    ends: Callable[[], int] | None = None  # transactions that have ended on a connection that the user has
    ends_known = 0
    _ended_at: float | None = None
    waited = False  # for a reader
    shown = False  # where it is now it has executed a statement
    queues = False  # it waits for a connection of its reader's pool, because no other reader has room
    avoid: frozenset[str] = frozenset()
    hint: Literal["writer", "reader"] | None = None  # of the statement that is being executed
    text: str | None = None  # of the last statement that passed the gate
    wrote = False
    may_have_committed = False  # something of that
    committed = False  # by the COMMIT at its end
    only_reads = True  # nothing but READ statements so far
    repeats = 0
    refused: str | None = None  # the text for which it had to leave its reader
    trouble: Trouble | None = None  # that one of its statements has met last
    leaves_traces = False  # on its connection, which a rollback does not take away
    streaming = False  # a server-side cursor may be open
    watched = False  # before each statement there is something to look at: it streams, or only a guard keeps it from writing
    holds = False  # a read-only transaction on its reader, because a listener of the application has set something there
    isolation: str | None = None  # what the session asked SQLAlchemy for
    run: Run | None = None
    check: CommitCheck | None = None  # how the fate of a COMMIT whose answer is lost is to be found out
    committing = False  # what was sent last may have committed
    outcome: Outcome | None = None  # of a COMMIT that was not answered, where the router found it out
    unknown: OutcomeUnknown | None = None  # the same, where it did not
    borrowed: Place | None = None  # one of those that the writer lends to reads, given back when the unit ends

    def __init__(self, read_only: bool | None) -> None:
        self.read_only = read_only

    @property
    def may_write(self) -> bool:
        """Whether its statements may have written, even if all look like reads. A view may call a function that writes."""
        return self.on_writer and not self.read_only and self.text is not None

    @property
    def spoils_connection(self) -> bool:
        """Whether the next unit would meet on its connection what a run that has failed has left there."""
        return self.leaves_traces and self.run is not None and not self.committed

    @property
    def counts(self) -> bool:
        """Whether it may have been shown something, or have committed it, that was not noted yet."""
        told = self.wrote or self.read_at is not None or not self.of_session
        sent = self.handed_out or (self.text is not None and told)
        return not self.noted and (sent or (self.ends is not None and self.unseen_end() is not None))

    def unseen_end(self) -> float | None:
        """When it was found last that a transaction had ended on the connection that the user has (monotonic seconds); None if
        none has. Nobody needs to have seen its COMMIT."""
        if self.ends is not None:
            ends = self.ends()
            if ends != self.ends_known:
                self._ended_at = time.monotonic()  # first: other threads look at it, too
                self.ends_known = ends
        return self._ended_at

    def left_behind(self, at: float | None) -> tuple[Requirement | None, LastRead | None]:
        """What those must see who are to see what it was shown by this moment (monotonic seconds; None: now)."""
        if at is None:
            at = time.monotonic()
        if self.on_writer:
            return Requirement(at, self.epoch), None
        if self.server is None:
            return None, None
        return self.requirement, LastRead(self.server, at, self.epoch)

    def give_back(self) -> None:
        """Leave the place of the writer's that it has borrowed, if it has."""
        if self.borrowed is not None:
            self.borrowed.give_back()


Judge: TypeAlias = Callable[[Engine, bool], Reason | None]
"""Why the statement that a unit enters for must be on the writer, as that engine would send it; None if it may be a read. The
second argument says whether to find out at any price."""


class Door(Protocol[T]):
    """How a unit gets in at an engine."""

    @property
    def judge(self) -> Judge | None: ...

    def connect(self, engine: Engine) -> T: ...

    def pooled(self, connection: T) -> PoolProxiedConnection:
        """The pool's connection inside of what connect() gave."""
        ...

    def drop(self, connection: T) -> None:
        """Get rid of it."""
        ...
