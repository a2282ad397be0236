"""What several test modules need."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from aurora_router import Router
from aurora_router.core import events
from tests.fakes.cluster import FakeCluster
from tests.fakes.driver import installed
from tests.pairs import Pairs
from tests.unit.mysql_peer import Peer


@pytest.fixture
def peer() -> Iterator[Peer]:
    peer = Peer()
    yield peer
    peer.close()


@pytest.fixture
def cluster() -> Iterator[FakeCluster]:
    """A fake cluster of the writer db-1 and the reader db-2."""
    cluster = FakeCluster(readers=1)
    with installed(cluster):
        yield cluster


@pytest.fixture
def pairs() -> Pairs:
    return Pairs()


@pytest.fixture
def make_router(cluster: FakeCluster, pairs: Pairs) -> Iterator[Callable[..., Router]]:
    """Makes a router that probes often. `pairs` and the given functions listen to it."""
    with ExitStack() as stack:

        def make(*listeners: Callable[[events.Event], object], **options: Any) -> Router:
            options = {"probe_interval": 0.02, **options}
            made = Router("postgresql+fakepg://app@db-1/shop", instances=["db-2"], listeners=[pairs, *listeners], **options)
            router = stack.enter_context(made)
            router.start()
            return router

        yield make
