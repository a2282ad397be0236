"""What units must see and leave behind: for their session, for the scopes around them, and for all units of a router.

A read may not miss earlier writes of its session or scope, nor show less than an earlier read did.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from aurora_router.config.settings import Consistency, Settings
from aurora_router.core.positions import LastRead, Requirement, merge
from aurora_router.core.selection import shows_no_less
from aurora_router.core.topology import Topology
from aurora_router.routing.causal_context import CausalContext, open_scopes
from aurora_router.routing.unit import CausalMarks, CommitState, Unit


class Causality:
    """What the units of one router must see. The router's causal scopes belong to this object.

    topology: returns the newest topology.
    """

    def __init__(self, settings: Settings, topology: Callable[[], Topology]) -> None:
        self.consistency: Consistency = settings.consistency
        self.is_global = settings.consistency == "global"
        self._topology = topology
        self._shared: Requirement | None = None
        self._committing: set[Unit] = set()
        self._in_hands: set[Unit] = set()  # units whose connection the user has
        self.forked()

    def forked(self) -> None:
        """Begin anew, at first and in a forked child: no commit is under way, and no thread holds the lock."""
        self._lock = threading.RLock()  # the garbage collector may end a unit while it is held
        self._committing.clear()
        self._in_hands.clear()
        CausalContext.forked()
        for scope in open_scopes(self):
            scope.clear()

    def on_begin(self, unit: Unit, context: CausalContext | None = None) -> None:
        """Set what a new unit must see.

        context: that of its session, or of the token that the user gave for the unit.
        """
        open_here = open_scopes(self)
        contexts: tuple[CausalContext, ...] = open_here if context is None else (context, *open_here)
        if not contexts and not self.is_global:
            return
        scopes = open_here if self.consistency != "eventual" else ()
        for scope in scopes:
            scope.collect_from_open_units()
        requirement: Requirement | None = None
        last_reads: frozenset[LastRead] = frozenset()
        for each in contexts:
            # The last reads come first, because another thread may replace them by a requirement in between.
            if each.last_reads:
                last_reads |= each.last_reads
            if each.requirement is not None:
                requirement = merge(requirement, each.requirement)
        if self.is_global:
            requirement = merge(requirement, self._of_all())
        unit.marks = CausalMarks(requirement, last_reads, contexts, scopes)

    def must_leave_reader(self, unit: Unit) -> bool:
        """Return whether others have written since this unit began, or have read something that its reader may lack."""
        marks, place = unit.marks, unit.place
        known = marks.requirement.acknowledged_at if marks.requirement is not None else 0.0
        if self.is_global:
            newest = self._of_all()
            if newest is not None and newest.acknowledged_at > known:
                return True
        for scope in marks.scopes:
            scope.collect_from_open_units(unit)
            if scope.requirement is not None and scope.requirement.acknowledged_at > known:
                return True
            others = scope.last_reads - marks.last_reads if scope.last_reads else ()
            if others and place.instance is not None:
                topology = self._topology()
                reader = topology.by_id.get(place.instance.id)
                if not shows_no_less(reader, place.server, others, topology, time.monotonic()):
                    return True
        return False

    def on_commit_sent(self, unit: Unit) -> None:
        """Note that a unit's commit may be acknowledged from now on.

        If consistency is "global", units that begin before the connection is back must see all commits up to then.
        """
        if self.consistency == "eventual" or not unit.wrote:
            return
        unit.commit_started, unit.recorded = True, False
        for scope in unit.marks.scopes:
            scope.wrote = True
        if self.is_global:
            with self._lock:
                self._committing.add(unit)

    def on_handed_out(self, unit: Unit) -> None:
        """Note that the user has a unit's connection, and may commit on it unseen by the router.

        So each question about what a unit must see looks at `unit.ends`.
        """
        if self.is_global:
            with self._lock:
                self._in_hands.add(unit)

    def on_connection_exposed(self, unit: Unit) -> None:
        """Note that the user has the driver's connection of a unit. Until it comes back, anything may be written on it."""
        unit.connection_exposed = True
        self.on_commit_sent(unit)

    def on_reader_left(self, unit: Unit) -> None:
        """Note what a unit has read on the instance that it leaves, so that no later read elsewhere shows less."""
        if self.consistency != "eventual" and unit.has_results and unit.place.server is not None:
            read = LastRead(unit.place.server, time.monotonic(), unit.place.epoch)
            unit.marks = unit.marks._replace(last_reads=unit.marks.last_reads | {read})
            for context in unit.marks.contexts:
                context.record(None, read)

    def on_committed(self, unit: Unit) -> None:
        """Note what a unit has written and read, for the units after it.

        The unit may have written even if it seems to have rolled back. A commit without an answer, a COMMIT as text and
        autocommit look like a rollback.
        """
        if self.consistency == "eventual":
            return
        wrote = unit.wrote
        if wrote and self.is_global:
            with self._lock:
                self._shared = merge(self._shared, Requirement(time.monotonic(), unit.place.epoch))
                if not unit.connection_exposed:
                    self._committing.discard(unit)
        if unit.marks.contexts:
            at = None if wrote or (unit.commit is CommitState.COMMITTED and unit.may_write) else unit.read_at
            requirement, last_read = unit.causal_footprint(at)
            for context in unit.marks.contexts:
                context.record(requirement, last_read, known=unit.marks.last_reads, wrote=wrote)

    def on_end(self, unit: Unit) -> None:
        """Note what a unit leaves behind, unless that is `recorded`.

        The unit has released its connection. It ends, or gets another connection.
        """
        if not unit.recorded:
            if (unit.marks.contexts or self.is_global) and (unit.wrote or unit.has_unrecorded_effects):
                self.on_committed(unit)
            unit.recorded = True
        if self.is_global and (unit.connection_exposed or unit.ends is not None):
            with self._lock:
                self._committing.discard(unit)
                self._in_hands.discard(unit)
        if unit.marks.scopes:
            for scope in unit.marks.scopes:
                scope.units.discard(unit)

    def _of_all(self) -> Requirement | None:
        if self._committing:  # a commit may be acknowledged before its connection is back
            return Requirement(time.monotonic(), self._topology().epoch)
        if self._in_hands:
            with self._lock:
                for unit in [*self._in_hands]:  # a copy, because the garbage collector may end one
                    ended_at = unit.unseen_end()
                    if ended_at is not None:
                        self._shared = merge(self._shared, Requirement(ended_at, unit.place.epoch))
        return self._shared
