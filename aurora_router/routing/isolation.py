"""What the isolation level of a unit asks of its instance."""

from __future__ import annotations

from typing import Final

from aurora_router.cluster.families import Families
from aurora_router.cluster.monitor import Monitor
from aurora_router.config.checks import get_isolation
from aurora_router.config.settings import Settings
from aurora_router.routing.unit import Unit

_LEVELS_ON_READERS: Final = frozenset({"autocommit", "read uncommitted", "read committed"})


class Isolation:
    """The isolation levels of one router's units."""

    def __init__(self, settings: Settings, families: Families, monitor: Monitor) -> None:
        self._default = get_isolation(settings.options)
        self._families = families
        self._monitor = monitor

    def is_autocommit(self, unit: Unit) -> bool:
        """Return whether each statement of a unit on the writer commits by itself."""
        level = unit.isolation or self._default
        return level is not None and as_servers_say(level) == "autocommit"

    def above_read_committed(self, level: str | None) -> bool:
        """Return whether a unit at this isolation level must be on the writer.

        The family's own default does not count, because nobody has asked for it.

        level: None stands for the engine's or the server's default.
        """
        asked = level or self._default
        if asked is None:
            level = self._servers_level()
            return level not in _LEVELS_ON_READERS and level != self._families.leading.DEFAULT_ISOLATION
        return as_servers_say(asked) not in _LEVELS_ON_READERS

    def beyond_readers(self, level: str | None) -> bool:
        """Return whether a reader refuses statements at this isolation level.

        level: None stands for the engine's or the server's default.
        """
        refused = self._families.leading.BEYOND_READERS
        if not refused:
            return False
        asked = level or self._default
        return (self._servers_level() if asked is None else as_servers_say(asked)) in refused

    def _servers_level(self) -> str:
        """The level that the servers use if nobody asks for one."""
        return self._monitor.topology.isolation or self._families.leading.DEFAULT_ISOLATION

    def has_snapshot(self, unit: Unit) -> bool:
        """Return whether the statements of a unit's transaction must see one snapshot.

        An automatic unit has not asked for a snapshot if only the family's own default gives one.
        """
        level = unit.isolation or self._default
        if level is None and unit.intent.read_only is not None:
            level = self._servers_level()
        return self.above_read_committed(level)


def as_servers_say(level: str) -> str:
    """Return the name of a level as servers write it."""
    return level.replace("_", " ").lower()
