"""A shop's tables on a real cluster, routers that close themselves, and engines without pools to look from outside."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from sqlalchemy.orm import sessionmaker

from aurora_router import Router, RoutingSession
from aurora_router.core import events
from aurora_router.local import FaultProxy
from aurora_router.local.cluster import Cluster
from tests.engines import LEFT_OUT
from tests.integration.poolers import PROGRAM
from tests.integration.shop import set_up, through, until_readers_serve

collect_ignore = [] if PROGRAM else ["test_pooler.py"]
if not PROGRAM:
    LEFT_OUT["pgbouncer"] = "no pgbouncer found: install it (Debian, Ubuntu: apt-get install pgbouncer)"


@pytest.fixture
def cluster(aurora_cluster: Cluster[Any], aurora_engine: str) -> Cluster[Any]:
    """The shared cluster, whole, with empty tables that every reader has."""
    assert aurora_cluster.url.startswith(aurora_engine)
    set_up(aurora_cluster)
    aurora_cluster.wait_in_sync()
    return aurora_cluster


@pytest.fixture
def paused(cluster: Cluster[Any]) -> Cluster[Any]:
    """The cluster, whose readers replay nothing any more."""
    for reader in cluster.readers:
        cluster.pause_replay(reader)
    return cluster


@pytest.fixture
def proxy(cluster: Cluster[Any]) -> Iterator[FaultProxy]:
    """A fault proxy before the writer."""
    with FaultProxy((cluster.writer.host, cluster.writer.port)) as proxy:
        yield proxy


@pytest.fixture
def heard() -> list[events.Event]:
    """A list for the events that a listener receives."""
    return []


@pytest.fixture
def make_router(cluster: Cluster[Any]) -> Iterator[Callable[..., Router]]:
    """A function that makes routers of the cluster's instances. All are closed when the test ends."""
    with ExitStack() as stack:

        def make(url: str | None = None, **options: Any) -> Router:
            # On a busy machine a healthy server may be silent for a second.
            options.setdefault("probe_timeout", 3.0)
            if url is None and "reader_endpoint" not in options:
                options.setdefault("instances", [i.address for i in cluster.instances if i is not cluster.writer])
            return stack.enter_context(Router(url or cluster.url, **options))

        yield make


@pytest.fixture
def make(
    cluster: Cluster[Any], proxy: FaultProxy, make_router: Callable[..., Router], heard: list[events.Event]
) -> Callable[..., Router]:
    """A function that makes routers of the whole cluster, with the writer behind the proxy."""

    def make(**options: Any) -> Router:
        readers = [r.address for r in cluster.readers]
        made = make_router(
            through(proxy, cluster), instances=readers, listeners=[heard.append], **{"failover_timeout": 20.0, **options}
        )
        until_readers_serve(made, 2)
        made.init_commit_table()
        return made

    return make


@pytest.fixture
def router(make_router: Callable[..., Router]) -> Router:
    """A router of the whole cluster with default settings."""
    return make_router()


@pytest.fixture
def Session(router: Router) -> sessionmaker[RoutingSession]:
    """sessionmaker of RoutingSession on `router`."""
    return sessionmaker(class_=RoutingSession, router=router)
