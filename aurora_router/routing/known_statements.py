"""What is known of the texts of statements: which may read on a reader, and which a reader has refused."""

from __future__ import annotations

import threading
import time

from sqlalchemy.pool import PoolProxiedConnection

from aurora_router.cluster.connection_modes import ConnectionModes
from aurora_router.cluster.families import Families
from aurora_router.cluster.monitor import Monitor
from aurora_router.config.settings import Settings
from aurora_router.core.selection import Reason, reason_to_write
from aurora_router.core.statements import Effect, Recall, Verdict, in_mode, verdict
from aurora_router.routing.unit import Unit

WRITES = 1000  # texts of text() that are known to write
READS = 1000  # statements that are known to read
LONGEST_WRITE = 10_000  # characters of one text that is known to write
LEARNED = 1000  # statements remembered because a reader refused them
LEARNED_LENGTH = 4 * 2**20  # characters of all of them
# Seconds. It is limited because somebody may replace a function or a view, or install an extension.
LEARNED_FOR = 600.0

_READ = Effect.READ  # an enum's members are slow to look up on the request path


class KnownStatements:
    """The statements of one router's units.

    writes: texts of text() that certainly write.
    reads: keys of statements that only read.
    learned: texts that looked like reads, and when a reader refused them, oldest first.
    """

    def __init__(self, settings: Settings, families: Families, monitor: Monitor, modes: ConnectionModes) -> None:
        self.writes: set[str] = set()
        self.reads: set[object] = set()
        self.learned: dict[str, float] = {}
        self._families = families
        self._monitor = monitor
        self._modes = modes
        self._allowed = frozenset(settings.read_only_functions)
        self._catalog: frozenset[str] = frozenset()
        self._harmless = self._allowed
        self._lock = threading.Lock()

    def forked(self) -> None:
        """Make a new lock in a forked child, in which no thread holds the old one."""
        self._lock = threading.Lock()

    def effect(self, found: Verdict) -> Effect:
        """The effect of a statement. It depends on what the user and the catalog say of the statement's functions."""
        if not found.functions:
            return found.effect
        catalog = self._monitor.functions
        if catalog is not self._catalog:
            self._catalog = catalog
            self._harmless = self._allowed | catalog
        effect = found.effect_given(self._harmless)
        if effect is not found.known:
            self._monitor.request_catalog()
        return effect

    def reason_to_write(self, text: str, unit: Unit, thorough: bool) -> Reason | None:
        """Why an automatic unit must move to the writer for this text; None if a reader may serve it.

        thorough: whether a text in doubt counts as the strongest of its possible effects, because no reader has room to tell.
        """
        found = verdict(text, self._families.dialect)
        effect = self.effect(found) if found.functions else found.effect
        if effect is not _READ and not thorough:
            past = unit.place.instance is not None and unit.last_sql is not None
            if found.in_doubt or recalls_reads(unit, found, effect, past):
                return None  # the reader's connection decides
        return reason_to_write(found, effect, unit.hint, text in self.learned and self.has_learned(text))

    def note_write(self, text: str, sent: str) -> None:
        """Remember the text of a text() that certainly writes. It need not be compiled any more to be judged.

        sent: the text that SQLAlchemy sends for it.
        """
        found = verdict(sent, self._families.dialect)
        if found.known is Effect.WRITE and not found.in_doubt and len(text) <= LONGEST_WRITE:
            if len(self.writes) >= WRITES:
                self.writes.clear()
            self.writes.add(text)

    def note_read(self, key: object, sent: str) -> None:
        """Remember the key of a statement that only reads. A reader can be chosen for it without looking up its text.

        The interceptor still judges the text when it is sent.

        sent: the text that SQLAlchemy sends for it.
        """
        found = verdict(sent, self._families.dialect)
        if found.effect is _READ and found.hint is None:
            if len(self.reads) >= READS:
                self.reads.clear()
            self.reads.add(key)

    def learn(self, text: str | None) -> None:
        """Remember for some minutes that a reader has refused this text, which looked like a read. It goes to the writer."""
        if text is not None:
            with self._lock:
                self.learned.pop(text, None)
                self.learned[text] = time.monotonic()
                while len(self.learned) > LEARNED or sum(map(len, self.learned)) > LEARNED_LENGTH:
                    del self.learned[next(iter(self.learned))]

    def forget(self, text: str) -> None:
        """Forget that a reader has refused this text, because the writer has refused it, too."""
        with self._lock:
            self.learned.pop(text, None)

    def has_learned(self, text: str) -> bool:
        """Whether a reader has refused this text in the last minutes."""
        refused_at = self.learned.get(text)
        return refused_at is not None and time.monotonic() - refused_at < LEARNED_FOR

    def in_mode_of(self, text: str, raw: PoolProxiedConnection, unit: Unit) -> Verdict:
        """The verdict on a text that is in doubt, as the text's connection reads it.

        The router sends nothing between two statements of the unit. The second one may ask what the first one has left
        (FOUND_ROWS(), SHOW WARNINGS). So a text that is still in doubt then counts as the strongest of its possible effects. In a
        read-only unit that would be an error, so the router asks the server all the same.
        """
        found = verdict(text, in_mode(self._families.dialect, self._modes.literal_mode(raw, ask=False)))
        if found.in_doubt and (unit.intent.read_only or not unit.has_results):
            found = verdict(text, in_mode(self._families.dialect, self._modes.literal_mode(raw, ask=True)))
        return found


def recalls_reads(unit: Unit, found: Verdict, effect: Effect, past: bool) -> bool:
    """Whether a statement asks for what the unit's reads have left on its reader, because no other connection knows.

    A user's variable counts if such a statement came before, because only GET DIAGNOSTICS sets one on a reader.

    past: whether there were reads.
    """
    if found.recalls is None or effect is not Effect.CONNECTION or not past:
        return False
    return found.recalls is Recall.STATEMENT or not unit.only_reads
