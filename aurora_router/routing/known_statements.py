"""What is known of the texts of statements: which may read on a reader, and which a reader has refused."""

from __future__ import annotations

import threading
import time

from sqlalchemy.pool import PoolProxiedConnection

from aurora_router.cluster.connection_modes import ConnectionModes
from aurora_router.cluster.families import Families
from aurora_router.cluster.monitor import Monitor
from aurora_router.config.settings import Settings
from aurora_router.core.selection import Reason
from aurora_router.core.sql.analysis import Analysis, Effect, analyze, dialect_for_setting
from aurora_router.core.statement_rules import reason_to_write, recalls_reads
from aurora_router.routing.unit import Unit

WRITES = 1000  # texts of text() that are known to write
READS = 1000  # statements that are known to read
# Characters of the texts of all of them. A key keeps about 14 bytes for each.
READS_LENGTH = 2**20
LONGEST_WRITE = 10_000  # characters of one text that is known to write
MAX_REJECTED = 1000  # statements remembered because a reader refused them
MAX_REJECTED_LENGTH = 4 * 2**20  # characters of all of them
# Seconds. It is limited because somebody may replace a function or a view, or install an extension.
REJECTED_SECONDS = 600.0

_READ = Effect.READ  # an enum's members are slow to look up on the request path


class KnownStatements:
    """The statements of one router's units.

    writes: texts of text() that certainly write.
    reads: keys of statements that only read.
    rejected: texts that looked like reads, and when a reader refused them, oldest first.
    """

    def __init__(self, settings: Settings, families: Families, monitor: Monitor, modes: ConnectionModes) -> None:
        self.writes: set[str] = set()
        self.reads: set[object] = set()
        self._reads_length = 0  # characters of their texts, about
        self.rejected: dict[str, float] = {}
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

    def effect(self, found: Analysis) -> Effect:
        """Return the effect of a statement. It depends on what the user and the catalog say of the statement's functions."""
        if not found.functions:
            return found.effect
        catalog = self._monitor.functions
        if catalog is not self._catalog:
            self._catalog = catalog
            self._harmless = self._allowed | catalog
        effect = found.effect_given(self._harmless)
        if effect is not found.effect_if_functions_pure:
            self._monitor.request_catalog()
        return effect

    def reason_to_write(self, text: str, unit: Unit, thorough: bool) -> Reason | None:
        """Return why an automatic unit must move to the writer for this text; None if a reader may serve it.

        thorough: whether a text in doubt counts as the strongest of its possible effects. If not, its connection decides.
        """
        found = analyze(text, self._families.dialect)
        effect = self.effect(found) if found.functions else found.effect
        if effect is not _READ and not thorough:
            has_read = unit.place.instance is not None and unit.last_sql is not None
            if found.in_doubt or recalls_reads(found, effect, has_read=has_read, only_reads=unit.only_reads):
                return None  # the reader's connection decides
        return reason_to_write(found, effect, unit.hint, text in self.rejected and self.was_rejected(text))

    def note_write(self, text: str, sent: str) -> None:
        """Remember the text of a text() that certainly writes. From now on it is judged without being compiled.

        sent: the text that SQLAlchemy sends for it.
        """
        found = analyze(sent, self._families.dialect)
        if found.effect_if_functions_pure is Effect.WRITE and not found.in_doubt and len(text) <= LONGEST_WRITE:
            if len(self.writes) >= WRITES:
                self.writes.clear()
            self.writes.add(text)

    def note_read(self, key: object, sent: str) -> None:
        """Remember the key of a statement that only reads. A reader can be chosen for it without looking up its text.

        The interceptor still judges the text when it is sent.

        sent: the text that SQLAlchemy sends for it.
        """
        found = analyze(sent, self._families.dialect)
        if found.effect is _READ and found.hint is None and len(sent) <= READS_LENGTH:
            self._reads_length += len(sent)
            if len(self.reads) >= READS or self._reads_length > READS_LENGTH:
                self.reads.clear()
                self._reads_length = len(sent)
            self.reads.add(key)

    def remember_rejected(self, text: str | None) -> None:
        """Remember for some minutes that a reader has refused this text, which looked like a read. It goes to the writer."""
        if text is not None:
            with self._lock:
                self.rejected.pop(text, None)
                self.rejected[text] = time.monotonic()
                while len(self.rejected) > MAX_REJECTED or sum(map(len, self.rejected)) > MAX_REJECTED_LENGTH:
                    del self.rejected[next(iter(self.rejected))]

    def forget(self, text: str) -> None:
        """Forget that a reader has refused this text, because the writer has refused it, too."""
        with self._lock:
            self.rejected.pop(text, None)

    def was_rejected(self, text: str) -> bool:
        """Return whether a reader has refused this text in the last minutes."""
        refused_at = self.rejected.get(text)
        return refused_at is not None and time.monotonic() - refused_at < REJECTED_SECONDS

    def in_mode_of(self, text: str, raw: PoolProxiedConnection, unit: Unit) -> Analysis:
        """Analyze a text in doubt, with the settings of its connection.

        The router sends nothing between two statements of a unit. The second one may ask what the first one has left (for example
        FOUND_ROWS()). So a later text that is still in doubt counts as the strongest of its possible effects. In a read-only unit
        that would be an error, so the router asks the server all the same.
        """
        found = analyze(text, dialect_for_setting(self._families.dialect, self._modes.literal_mode(raw, ask=False)))
        if found.in_doubt and (unit.intent.read_only or not unit.has_results):
            found = analyze(text, dialect_for_setting(self._families.dialect, self._modes.literal_mode(raw, ask=True)))
        return found
