"""What units must see, and what they leave behind: for their session, for the scopes around them, for all units of a router.

A read may not miss what was written before it in the same session or scope, nor show less than an earlier read did.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal

from aurora_router.core.positions import LastRead, Requirement, merge
from aurora_router.core.selection import shows_no_less
from aurora_router.core.topology import Topology
from aurora_router.unit import Past, Unit

Consistency = Literal["eventual", "session", "global"]


class Scope(Past):
    """What everything that happens inside a causal scope has written and read.

    token: what a later reader must have replayed to show all that was written here; None where nothing was, and nothing was
    given. To ask costs at most one query on the writer, and only where something was written since it was asked last.
    """

    def __init__(self, owner: object, past: Past, ask: Callable[[Past], str | None]) -> None:
        super().__init__(past.given, past.requirement)
        self.owner = owner
        self._ask = ask

    @property
    def token(self) -> str | None:
        return self._ask(self)


_scopes: ContextVar[tuple[Scope, ...]] = ContextVar("aurora_router_scopes", default=())


@contextmanager
def entered(scope: Scope) -> Iterator[Scope]:
    """Everything in this thread or task, and in what it starts with its context, is inside the scope until the block ends."""
    _scopes.set((*_scopes.get(), scope))
    try:
        yield scope
    finally:  # not reset(): blocks of generators may end in another order, or in another context, than they began
        open_here = [*_scopes.get()]
        if scope in open_here:
            open_here.remove(scope)
            _scopes.set(tuple(open_here))


def current(owner: object) -> tuple[Scope, ...]:
    """The scopes of a router that are open here."""
    scopes = _scopes.get()
    return tuple(scope for scope in scopes if scope.owner is owner) if scopes else ()


class Causality:
    """What the units of one router must see.

    owner: whose scopes count. topology: gives the newest.
    """

    def __init__(self, consistency: Consistency, owner: object, topology: Callable[[], Topology]) -> None:
        self.consistency: Consistency = consistency
        self.owner = owner
        self._topology = topology
        self._shared: Requirement | None = None
        self._committing: set[Unit] = set()
        self.forked()

    def forked(self) -> None:
        """In a forked child, and at first: no commit is under way, and nobody holds the lock."""
        self._lock = threading.RLock()  # the collector may end a unit while it is held
        self._committing.clear()
        for scope in current(self.owner):
            scope.forked()

    def begin(self, unit: Unit, past: Past | None = None) -> None:
        """Say what a new unit must see. past: of its session, or what the user gave for it."""
        pasts: tuple[Past, ...] = current(self.owner)
        if past is not None:
            pasts = (past, *pasts)
        if pasts:
            unit.pasts = pasts
            for each in pasts:  # the last read first: another thread may put a requirement in its place in between
                unit.last_read, earlier = _later_of(unit.last_read, each.last_read)
                unit.requirement = merge(unit.requirement, each.requirement)
                if earlier is not None:  # a unit has room for one: what is asked for after the other stands in for it
                    unit.requirement = merge(unit.requirement, Requirement(earlier.at, earlier.epoch))
        if self.consistency == "global":
            unit.requirement = merge(unit.requirement, self._of_all())

    def overtaken(self, unit: Unit) -> bool:
        """Whether others of its scope have written since this unit began, or were shown what its reader may not show."""
        known = unit.requirement.after if unit.requirement is not None else 0.0
        for past in unit.pasts:
            if past.requirement is not None and past.requirement.after > known:
                return True
            last = past.last_read
            if last is not None and last is not unit.last_read and last.server != unit.server and unit.instance is not None:
                topology = self._topology()
                reader = topology.by_id.get(unit.instance.id)
                if reader is None or not shows_no_less(reader, last, topology, math.inf, time.monotonic()):
                    return True
        return False

    def commit_begins(self, unit: Unit) -> None:
        """Note that a unit's commit may be acknowledged from now on; until it comes back nobody is told of an older state."""
        if self.consistency == "global" and unit.wrote:
            with self._lock:
                self._committing.add(unit)

    def left(self, unit: Unit) -> None:
        """Note what a unit has read where it was until now, for what it reads elsewhere."""
        if self.consistency != "eventual" and unit.shown and unit.server is not None:
            unit.last_read = LastRead(unit.server, time.monotonic(), unit.epoch)

    def ended(self, unit: Unit) -> None:
        """Note what a unit has written and read, for those that come after it: when it has ended, and with each commit. It may
        have written whatever it looks like: a commit without an answer, COMMIT as text and autocommit look like a rollback."""
        if self.consistency == "eventual":
            return
        wrote = unit.wrote
        if not wrote and not unit.pasts:
            return
        now = time.monotonic() if wrote or unit.read_at is None else unit.read_at
        if wrote and self.consistency == "global":
            with self._lock:
                self._shared = merge(self._shared, Requirement(now, unit.epoch))
                self._committing.discard(unit)
        if unit.on_writer:
            requirement = Requirement(now, unit.epoch)
            for past in unit.pasts:
                past.note(requirement, None, wrote)
        elif unit.server is not None:
            last_read = LastRead(unit.server, now, unit.epoch)
            for past in unit.pasts:
                past.note(unit.requirement, last_read, wrote, unit.last_read)

    def _of_all(self) -> Requirement | None:
        if self._committing:  # a commit may have been acknowledged already, and its connection not yet come back
            return Requirement(time.monotonic(), self._topology().epoch)
        return self._shared


def _later_of(one: LastRead | None, other: LastRead | None) -> tuple[LastRead | None, LastRead | None]:
    """The later of two reads, and the earlier where it was on another server."""
    if one is None or other is None:
        return one or other, None
    later, earlier = (one, other) if one.at > other.at else (other, one)
    return later, earlier if earlier.server != later.server else None
