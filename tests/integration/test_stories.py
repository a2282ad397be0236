"""What a router promises, told on real servers. tests/unit/test_stories.py tells the same on a fake cluster."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from aurora_router import Router
from aurora_router.core import events
from aurora_router.local import FaultProxy
from aurora_router.local.cluster import Cluster
from tests.integration.shop import BOTH
from tests.stories import STORIES, Story


class RealWorld:
    """A local cluster, with a fault proxy before its writer."""

    def __init__(self, cluster: Cluster[Any], proxy: FaultProxy, make: Callable[..., Router], heard: list[events.Event]) -> None:
        self.heard = heard
        self._cluster = cluster
        self._proxy = proxy
        self._make = make
        self._readers = [*cluster.readers]

    def router(self, **options: Any) -> Router:
        return self._make(**options)

    def stock(self) -> int:
        found: int = self._cluster.execute("SELECT stock FROM item WHERE id = 1")[0][0]
        return found

    def set_late(self, *readers: int) -> None:
        for number in readers:
            self._cluster.pause_replay(self._readers[number])

    def catch_up(self) -> None:
        for reader in self._readers:
            self._cluster.resume_replay(reader)
        self._cluster.wait_in_sync()

    def kill_writer(self) -> None:
        self._cluster.kill(self._cluster.writer)

    def kill_readers(self) -> None:
        for reader in self._readers:
            self._cluster.kill(reader)

    def promote(self) -> None:
        self._cluster.promote(self._readers[0])

    def drop_connections(self) -> None:
        self._proxy.reset_all()

    def lose(self, words: str, *, answer: bool) -> None:
        self._proxy.lose(words, answer=answer)


@pytest.fixture
def world(cluster: Cluster[Any], proxy: FaultProxy, make: Callable[..., Router], heard: list[events.Event]) -> RealWorld:
    return RealWorld(cluster, proxy, make, heard)


@BOTH
@pytest.mark.parametrize("story", STORIES, ids=lambda story: story.__name__)
def test_a_story_on_real_servers(world: RealWorld, story: Story) -> None:
    """The story comes true on real servers."""
    story(world)
