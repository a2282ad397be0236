"""A shop's tables on a real cluster, routers that close themselves, and engines without pools to look from outside."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from sqlalchemy.orm import sessionmaker

from aurora_router import Router, RoutingSession
from aurora_router.core import events
from aurora_router.local import FaultProxy, PostgresCluster
from tests.integration.shop import Base, through, until_readers_serve


@pytest.fixture
def cluster(aurora_cluster: PostgresCluster) -> PostgresCluster:
    """The shared cluster, whole, with empty tables that every reader has."""
    names = ", ".join(table.name for table in Base.metadata.sorted_tables)
    aurora_cluster.execute(f"""
        CREATE SCHEMA IF NOT EXISTS extra;
        CREATE TABLE IF NOT EXISTS item (id bigint PRIMARY KEY, name text NOT NULL DEFAULT '', stock int NOT NULL DEFAULT 0);
        CREATE TABLE IF NOT EXISTS part (id bigint PRIMARY KEY, item_id bigint REFERENCES item (id), name text DEFAULT '');
        CREATE SEQUENCE IF NOT EXISTS ticket;
        TRUNCATE {names};
        INSERT INTO item VALUES (1, 'one', 10), (2, 'two', 20), (3, 'three', 30);
        INSERT INTO part VALUES (1, 1, 'first'), (2, 1, 'second');
        GRANT ALL ON ALL TABLES IN SCHEMA public TO app;
        GRANT ALL ON ALL SEQUENCES IN SCHEMA public TO app;
        GRANT ALL ON SCHEMA public, extra TO app""")
    aurora_cluster.wait_in_sync()
    return aurora_cluster


@pytest.fixture
def proxy(cluster: PostgresCluster) -> Iterator[FaultProxy]:
    """Stands before the writer."""
    with FaultProxy((cluster.writer.host, cluster.writer.port)) as proxy:
        yield proxy


@pytest.fixture
def heard() -> list[events.Event]:
    """For what a listener hears."""
    return []


@pytest.fixture
def make_router(cluster: PostgresCluster) -> Iterator[Callable[..., Router]]:
    """Makes routers of the cluster's instances; all are closed when the test ends."""
    with ExitStack() as stack:

        def make(url: str | None = None, **options: Any) -> Router:
            if url is None and "reader_endpoint" not in options:
                options.setdefault("instances", [i.address for i in cluster.instances if i is not cluster.writer])
            return stack.enter_context(Router(url or cluster.url, **options))

        yield make


@pytest.fixture
def make(
    cluster: PostgresCluster, proxy: FaultProxy, make_router: Callable[..., Router], heard: list[events.Event]
) -> Callable[..., Router]:
    """Makes routers of the whole cluster, the writer through the proxy."""

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
