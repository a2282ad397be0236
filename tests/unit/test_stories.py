"""What a router promises, told on a fake cluster. tests/integration/test_stories.py tells the same on real servers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from aurora_router import Router
from aurora_router.core import events
from aurora_router.servers import FAMILIES, postgresql
from tests.fakes.cluster import FakeCluster
from tests.fakes.driver import installed
from tests.fakes.family import VERSION, Parrot
from tests.pairs import Pairs
from tests.stories import STORIES, Story


class FakeWorld:
    def __init__(self, cluster: FakeCluster, stack: ExitStack) -> None:
        self.heard: list[events.Event] = []
        self._cluster = cluster
        self._readers = [*cluster.readers]
        self._stack = stack
        self._pairs: list[Pairs] = []

    def router(self, **options: Any) -> Router:
        others = [reader.host for reader in self._readers]
        self._pairs.append(pairs := Pairs())
        made = Router("postgresql+fakepg://app@db-1/shop", instances=others, listeners=[self.heard.append, pairs], **options)
        router = self._stack.enter_context(made)
        router.start()
        return router

    def end(self) -> None:
        """Close the routers, and check that all that they began has ended."""
        self._stack.close()
        for pairs in self._pairs:
            assert pairs.check()["probe"] > 0

    def stock(self) -> int:
        return self._cluster.stock(self._cluster.end)

    def set_late(self, *readers: int) -> None:
        self._cluster.set_late(*(self._readers[number] for number in readers))

    def catch_up(self) -> None:
        self._cluster.set_late(*self._readers, late=False)

    def kill_writer(self) -> None:
        self._cluster.kill(self._cluster.writer)

    def kill_readers(self) -> None:
        for reader in self._readers:
            self._cluster.kill(reader)

    def promote(self) -> None:
        self._cluster.promote(self._readers[0])

    def drop_connections(self) -> None:
        self._cluster.drop_connections(self._cluster.writer)

    def lose(self, words: str, *, answer: bool) -> None:
        self._cluster.lose(words, answer=answer)


@pytest.fixture(params=["postgresql", "parrot"])
def world(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeWorld]:
    """A fake cluster whose servers are of a family that the router knows, and of one that it has just met."""
    cluster = FakeCluster(readers=2)
    if request.param == "parrot":
        monkeypatch.setitem(FAMILIES, "postgresql", [Parrot(), postgresql])
        for server in cluster.servers.values():
            server.version = VERSION
    with installed(cluster), ExitStack() as stack:
        yield FakeWorld(cluster, stack)


@pytest.mark.parametrize("story", STORIES, ids=lambda story: story.__name__)
def test_a_story_on_fakes(world: FakeWorld, story: Story) -> None:
    """The story comes true on a fake cluster, and the events of its routers are pairs."""
    story(world)
    world.end()
