"""Tables with a row of each kind, and a router with one reader, which replays nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import create_engine
from sqlalchemy.orm import Session as PlainSession

from aurora_router import Router
from aurora_router.core import events
from aurora_router.local import FaultProxy
from aurora_router.local.cluster import Cluster
from tests.integration.late_reads.tables import Base, Bird, Branch, Counted, Jar, Label, Leaf, Mole, Root, Tray
from tests.integration.stale_writes.helpers import late

MakeRouter = Callable[..., Router]


@pytest.fixture
def cluster(cluster: Cluster[Any]) -> Cluster[Any]:
    engine = create_engine(cluster.url)
    Base.metadata.drop_all(engine)
    Base.metadata.create_all(engine)
    with PlainSession(engine) as s, s.begin():
        s.add(
            Root(
                id=1,
                branches=[Branch(id=1, leaves=[Leaf(id=1)])],
                birds=[Bird(id=1)],
                labels=[Label(name="old")],
                moles=[Mole(id=1)],
            )
        )
        s.add(Counted(id=1, stock=1))
        s.add(Tray(name="old", jars=[Jar(id=1)], labels=[Label(name="first")]))
        s.add(Label(name="second"))
    engine.dispose()
    with Router(cluster.url) as router:
        router.init_commit_table()
    cluster.wait_in_sync()
    return cluster


@pytest.fixture
def router(cluster: Cluster[Any], proxy: FaultProxy, make_router: MakeRouter, heard: list[events.Event]) -> Router:
    """A router of the writer and one reader, which replays nothing."""
    return late(cluster, proxy, make_router, heard)
