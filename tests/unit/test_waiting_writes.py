"""Writes that SQLAlchemy or the server must look at to know them, in sessions that wait for readers, on a fake cluster."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import Executable, text
from sqlalchemy.orm import sessionmaker

from aurora_router import Router, RoutingSession
from tests.fakes.cluster import FakeCluster
from tests.fakes.driver import Dialect, installed
from tests.integration.shop import place
from tests.stories import READ, WRITE
from tests.unit.test_session_classes import Uncached


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCluster]:
    """A cluster whose reader replays nothing any more."""
    monkeypatch.setattr(Dialect, "_get_server_version_info", lambda *_: (16, 4), raising=False)
    cluster = FakeCluster(readers=1)
    cluster.set_late(*cluster.readers)
    with installed(cluster):
        yield cluster


@pytest.mark.parametrize(
    ("statement", "waits"),
    [
        (READ, 1),
        (WRITE, 0),
        (Uncached(), 0),
        (text("INSERT INTO item VALUES (length('a\\'' -- ')\n'))"), 0),
    ],
    ids=["read", "text", "compiled each time", "in doubt"],
)
def test_only_a_read_waits_for_a_reader(late: FakeCluster, statement: Executable, waits: int) -> None:
    """A session that has written waits for a reader before a read. A write goes to the writer at once."""
    with Router("postgresql+fakepg://app@db-1/shop", instances=["db-2"], wait_for_reader=0.05) as router:
        router.start()
        make: Any = sessionmaker(class_=RoutingSession, router=router)
        with make() as s:
            s.execute(WRITE)
            s.commit()
            s.execute(statement)
            assert place(s) == "writer"
        assert router.stats().reader_waits == waits
