"""The monitor applies all news of one probe before anybody sees any of it."""

from __future__ import annotations

import time

from aurora_router.config.settings import Settings
from aurora_router.core.instance import Observation
from aurora_router.core.watching import Forgotten
from aurora_router.router_core import RouterCore
from aurora_router.waiting import ThreadWaiting, ThreadWakeup
from tests.fakes.cluster import FakeCluster
from tests.fakes.driver import installed


class Restart(ThreadWaiting):
    """While a unit waits, its writer's server is found restarted. Notes the writers that the unit could see meanwhile."""

    def __init__(self) -> None:
        self.core: RouterCore | None = None
        self.seen: list[str | None] = []

    def wakeup(self) -> ThreadWakeup:
        return ThreadWakeup() if self.core is None else RestartingWakeup(self)


class RestartingWakeup(ThreadWakeup):
    """A wakeup that lets the restart happen, and then notes what there is to see at each `set()`."""

    def __init__(self, restart: Restart) -> None:
        super().__init__()
        self._restart = restart

    def wait(self, timeout: float) -> None:
        core = self._restart.core
        assert core is not None
        (seen,) = core.monitor.topology.by_id["db-1:5432"].tracked
        again = seen.server._replace(id=seen.server.id._replace(started="again"))
        now = time.monotonic()
        core.monitor.apply_news((Forgotten("db-1:5432", seen.server.id), Observation("db-1:5432", now, now, again)))

    def set(self) -> None:
        core = self._restart.core
        assert core is not None
        writer = core.monitor.topology.writer
        self._restart.seen.append(writer.id if writer is not None else None)
        super().set()


def test_a_restarted_writer_is_never_missing() -> None:
    """A probe that finds the writer restarted replaces the old server by the new one, and no unit sees a time between."""
    restart = Restart()
    with installed(FakeCluster(readers=0)):
        core = RouterCore(Settings("postgresql+fakepg://app@db-1/shop", probe_interval=3600.0), restart)
        try:
            core.start()
            restart.core = core
            core.monitor.wait_for(lambda _: bool(restart.seen), 5.0)
        finally:
            restart.core = None
            core.close()
    assert restart.seen == ["db-1:5432"]
