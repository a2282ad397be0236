"""What the units of a session, or of a causal scope, have written and read: later units must see no less."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextvars import ContextVar
from typing import Protocol, Self

from aurora_router.core.positions import LastRead, Requirement, merge, merge_reads


class CausalContext:
    """What the units of a session, or of a causal scope, have written and read so far.

    initial_token: the token that the session or scope began with.
    requirement: what a reader must have replayed.
    last_reads: the last read on each server. Later reads may not show less.
    wrote: whether anything was written after the beginning.
    """

    last_reads: frozenset[LastRead] = frozenset()
    wrote = False
    # One lock for all, held for a microsecond. It is reentrant because the garbage collector may end a unit meanwhile.
    _lock = threading.RLock()

    def __init__(self, initial_token: str | None = None, requirement: Requirement | None = None) -> None:
        self.initial_token = initial_token
        self.requirement = requirement

    def __repr__(self) -> str:
        token = "with a token" if self.initial_token is not None else "without a token"
        written = ", has written" if self.wrote else ""
        return f"<{type(self).__name__} begun {token}{written}, reads on {len(self.last_reads)} servers>"

    @staticmethod
    def forked() -> None:
        """Make a new lock in a forked child, in which no thread holds the old one."""
        CausalContext._lock = threading.RLock()

    def record(
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
        with CausalContext._lock:
            if wrote:
                self.wrote = True
            while True:
                mine, reads = self.requirement, self.last_reads
                both, left = merge(mine, requirement), reads
                if reads:
                    left = merge_reads(reads, last_read, requirement, known)
                elif last_read is not None:
                    left = frozenset((last_read,))
                # If they differ, the garbage collector has ended a unit meanwhile, and that has called this method. Begin again.
                if self.requirement is mine and self.last_reads is reads:
                    self.requirement, self.last_reads = both, left
                    return

    def drop_token(self) -> None:
        """Drop the requirement of the token, which was honoured for long enough."""
        with CausalContext._lock:
            if self.requirement is not None and self.requirement.is_from_token:
                self.requirement = None


class OpenUnit(Protocol):
    """A unit that has a connection, as the scopes around it see it."""

    read_at: float | None

    @property
    def last_reads(self) -> frozenset[LastRead]: ...

    @property
    def has_unrecorded_effects(self) -> bool: ...

    def unseen_end(self) -> float | None: ...

    def causal_footprint(self, at: float | None, /) -> tuple[Requirement | None, LastRead | None]: ...


class Scope(CausalContext):
    """A causal scope: what all units inside it have written and read.

    The units of this thread or task are inside until the block ends. Tasks and threads that start in the block with a copy of
    its context have their units inside, too.

    `with scope:` may be used again and again.
    """

    def __init__(self, owner: object, begun: CausalContext, ask: Callable[[CausalContext], str | None]) -> None:
        super().__init__(begun.initial_token, begun.requirement)
        self.owner = owner
        self._ask = ask
        self.units: set[OpenUnit] = set()  # those that have a connection

    @property
    def token(self) -> str | None:
        """The token of the writes in this scope; None if there were none and the scope began without a token.

        It costs at most one query on the writer, and nothing if nothing was written since the last time.
        """
        self.collect_from_open_units()
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

    def collect_from_open_units(self, but: OpenUnit | None = None) -> None:
        """Record what the open units of this scope have committed and read until now.

        but: a unit to leave out.
        """
        for unit in [*self.units]:
            if unit is not but and unit.has_unrecorded_effects:
                unseen = unit.unseen_end() is not None
                self.record(*unit.causal_footprint(unit.read_at), known=unit.last_reads, wrote=unseen)


_scopes: ContextVar[tuple[Scope, ...]] = ContextVar("aurora_router_scopes", default=())


def open_scopes(owner: object) -> tuple[Scope, ...]:
    """Return the scopes of a router that are open in this context."""
    scopes = _scopes.get()
    return tuple(scope for scope in scopes if scope.owner is owner) if scopes else ()
