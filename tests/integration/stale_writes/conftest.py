"""The shared cluster with the tables of these tests, and a router with a late reader."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import create_engine
from sqlalchemy.engine import Engine
from sqlalchemy.orm import Session as PlainSession

from aurora_router import Router
from aurora_router.core import events
from aurora_router.local import FaultProxy
from aurora_router.local.cluster import Cluster
from tests.integration.shop import family as family_of
from tests.integration.shop import through
from tests.integration.stale_writes.helpers import MakeRouter, late, on_the_writer
from tests.integration.stale_writes.models import Base, Box, Cat, Dog, Kit, Line, Odd, Purchase, Shelf, Versioned

TRIGGER = {
    "postgresql": [
        "CREATE OR REPLACE FUNCTION extra.add_up() RETURNS trigger LANGUAGE plpgsql AS "
        "'BEGIN UPDATE purchase SET total = total + 1 WHERE id = NEW.order_id; RETURN NEW; END'",
        "CREATE TRIGGER add_up AFTER INSERT ON line FOR EACH ROW EXECUTE FUNCTION extra.add_up()",
    ],
    "mysql": [
        "CREATE TRIGGER add_up AFTER INSERT ON line FOR EACH ROW UPDATE purchase SET total = total + 1 WHERE id = NEW.order_id"
    ],
}


@pytest.fixture
def cluster(cluster: Cluster[Any]) -> Cluster[Any]:
    """The shared cluster, with the tables of this module on all of its readers."""
    engine = create_engine(cluster.url)
    Base.metadata.drop_all(engine)
    Base.metadata.create_all(engine)
    with PlainSession(engine) as s, s.begin():
        s.add_all(
            [
                Kit(a=1, b="x", stock=10),
                Kit(a=1, b="y", stock=20),
                Dog(id=1, name="Rex", tricks=1),
                Cat(id=2, name="Tom", weight=4),
                Versioned(id=1, stock=10),
                Odd(id=1, stock=1, thing=None, plain={"n": 1}, tracked={"n": 1}, essay="long"),
                Purchase(id=1, total=0, state="open"),
                *(Line(id=number, note=note) for number, note in enumerate(("first", "second", "third"), 1)),
                Shelf(name="old", boxes=[Box(id=number) for number in (1, 2, 3)]),
            ]
        )
    engine.dispose()
    on_the_writer(cluster, *TRIGGER[family_of(cluster)])
    with Router(cluster.url) as router:
        router.init_commit_table()
    cluster.wait_in_sync()
    return cluster


@pytest.fixture
def router(cluster: Cluster[Any], proxy: FaultProxy, make_router: MakeRouter, heard: list[events.Event]) -> Router:
    """A router of the writer, through the proxy, and of one reader whose replay is paused."""
    return late(cluster, proxy, make_router, heard)


@pytest.fixture
def engine(cluster: Cluster[Any], proxy: FaultProxy) -> Iterator[Engine]:
    """A plain engine to the writer, not one of the router's."""
    engine = create_engine(through(proxy, cluster))
    yield engine
    engine.dispose()
