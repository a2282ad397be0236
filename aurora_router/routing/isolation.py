"""What the isolation levels of one router's units ask of their instances. `core/isolation` decides it."""

from __future__ import annotations

from aurora_router.cluster.families import Families
from aurora_router.cluster.monitor import Monitor
from aurora_router.config.checks import get_isolation
from aurora_router.config.settings import Settings
from aurora_router.core.isolation import AUTOCOMMIT, as_servers_say, has_snapshot, is_beyond_readers, must_be_on_writer
from aurora_router.routing.unit import Unit


class Isolation:
    """The isolation levels of one router's units.

    In each method a level of None stands for the engine's or the servers' default.
    """

    def __init__(self, settings: Settings, families: Families, monitor: Monitor) -> None:
        default = get_isolation(settings.options)
        self._default = None if default is None else as_servers_say(default)
        self._families = families
        self._monitor = monitor

    def is_autocommit(self, unit: Unit) -> bool:
        """Return whether each statement of a unit on the writer commits by itself."""
        asked = as_servers_say(unit.isolation) if unit.isolation else self._default
        return asked == AUTOCOMMIT

    def above_read_committed(self, level: str | None) -> bool:
        """Return whether an automatic unit at this isolation level must be on the writer."""
        asked = as_servers_say(level) if level else self._default
        of_family = self._families.leading.DEFAULT_ISOLATION
        return must_be_on_writer(asked, self._monitor.topology.isolation or of_family, of_family)

    def beyond_readers(self, level: str | None) -> bool:
        """Return whether a reader refuses statements at this isolation level."""
        family = self._families.leading
        if not family.BEYOND_READERS:
            return False
        asked = as_servers_say(level) if level else self._default
        return is_beyond_readers(asked, self._monitor.topology.isolation or family.DEFAULT_ISOLATION, family.BEYOND_READERS)

    def has_snapshot(self, unit: Unit) -> bool:
        """Return whether the statements of a unit's transaction must see one snapshot."""
        asked = as_servers_say(unit.isolation) if unit.isolation else self._default
        of_family = self._families.leading.DEFAULT_ISOLATION
        of_servers = self._monitor.topology.isolation or of_family
        return has_snapshot(asked, of_servers, of_family, declared=unit.intent.read_only is not None)
