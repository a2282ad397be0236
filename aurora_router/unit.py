"""One unit of work: where it is, what was done in it and before it, and the door by which it gets to an engine."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeAlias, TypeVar

from sqlalchemy.engine import Engine
from sqlalchemy.orm import Mapper
from sqlalchemy.pool import PoolProxiedConnection

from aurora_router.core.failures import Facts
from aurora_router.core.positions import LastRead, Requirement, merge
from aurora_router.core.selection import Reason
from aurora_router.core.statements import Effect
from aurora_router.core.topology import Instance, ServerId
from aurora_router.errors import Outcome, OutcomeUnknown, RouterError
from aurora_router.limits import Places

T = TypeVar("T")

CommitCheck = Literal["xid", "table"]

Row: TypeAlias = tuple[Mapper[Any], tuple[Any, ...]]
"""A row as its objects know it: their mapper and the primary key."""


class NotARead(RouterError):
    """Raised before a statement is sent to a reader in an automatic unit: the unit must move to the writer."""

    def __init__(self, effect: Effect, reason: Reason) -> None:
        self.effect = effect
        self.reason = reason
        super().__init__(reason.value)


class Run:
    """One run of a function that may be run again: what the units in it must know, and what they leave behind.

    deadline: monotonic seconds until which they may wait for a writer; None: as long as any unit may. stale: rows that earlier
    runs have read stale; where there are any, the units are on the writer from the start.
    """

    committed = False  # something of it may have been committed: it must not be run again
    failed: Facts | None = None  # what the last error of its units means
    found_stale: frozenset[Row] = frozenset()  # rows that it has read stale itself

    def __init__(self, deadline: float | None, stale: frozenset[Row] = frozenset()) -> None:
        self.deadline = deadline
        self.stale = stale


class Past:
    """What the units of a session, or of a causal scope, have written and read so far.

    given: the token that it began with. requirement: what a reader must have replayed. last_read: what it may not undercut.
    wrote: since `given`.
    """

    def __init__(self, given: str | None = None, requirement: Requirement | None = None) -> None:
        self.given = given
        self.requirement = requirement
        self.last_read: LastRead | None = None
        self.wrote = False
        self._lock = threading.RLock()  # the threads of a scope share it; the collector may end a unit while it is held

    def forked(self) -> None:
        """In a forked child: nobody holds the lock."""
        self._lock = threading.RLock()

    def note(
        self, requirement: Requirement | None, last_read: LastRead | None, wrote: bool, known: LastRead | None = None
    ) -> None:
        """Add what a unit has left behind. known: the last read that it knew of, which its own implies."""
        with self._lock:
            self.requirement = merge(self.requirement, requirement)
            before = self.last_read
            if before is None:
                self.last_read = last_read
            elif last_read is None:
                if requirement is not None and requirement.after >= before.at:
                    self.last_read = None  # who has replayed that shows all that any reader had shown by then
            elif before.server == last_read.server:
                self.last_read = last_read if last_read.at >= before.at else before
            elif known is not None and known.at >= before.at:
                self.last_read = last_read
            else:  # neither knew of the other: what the writer has since then implies both
                both = Requirement(max(before.at, last_read.at), max(before.epoch, last_read.epoch))
                self.requirement, self.last_read = merge(self.requirement, both), None
            self.wrote = self.wrote or wrote


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
    last_read: LastRead | None = None
    pasts: tuple[Past, ...] = ()  # of its session and of the scopes around it
    of_session = False  # which says when it has ended; otherwise it ends with its connection
    read_at: float | None = None  # monotonic seconds: when its session had executed the last statement; None: it cannot tell
    noted = False  # all that it leaves behind, with its commit
    handed_out = False  # its connection
    waited = False  # for a reader
    shown = False  # where it is now it has executed a statement
    avoid: frozenset[str] = frozenset()
    hint: Literal["writer", "reader"] | None = None  # of the statement that is being executed
    text: str | None = None  # of the last statement that passed the gate
    wrote = False
    only_reads = True  # nothing but READ statements so far
    repeats = 0
    streaming = False  # a server-side cursor may be open
    isolation: str | None = None  # what the session asked SQLAlchemy for
    run: Run | None = None
    check: CommitCheck | None = None  # how the fate of a COMMIT whose answer is lost is to be found out
    committing = False  # what was sent last may have committed
    outcome: Outcome | None = None  # of a COMMIT that was not answered, where the router found it out
    unknown: OutcomeUnknown | None = None  # the same, where it did not
    borrowed: Places | None = None  # one of the places that the writer lends to reads, given back when the unit ends

    def __init__(self, read_only: bool | None) -> None:
        self.read_only = read_only

    def give_back(self) -> None:
        """Leave the place of the writer's that it has borrowed, if it has."""
        borrowed, self.borrowed = self.borrowed, None
        if borrowed is not None:
            borrowed.give_back()


@dataclass(frozen=True, slots=True)
class Door(Generic[T]):
    """How a unit gets in at an engine: connect, what the pool's connection inside is, and how to get rid of it."""

    connect: Callable[[Engine], T]
    pooled: Callable[[T], PoolProxiedConnection]
    drop: Callable[[T], None]
