"""Statements that need no reader, while the readers are late or lost, on a fake cluster."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import Executable, column, select, text
from sqlalchemy.orm import sessionmaker

from aurora_router import NoReaderAvailable, Router, RoutingSession
from tests.fakes.cluster import FakeCluster
from tests.fakes.driver import Dialect, installed
from tests.integration.shop import place
from tests.stories import READ, WRITE
from tests.unit.test_session_classes import Part, Uncached


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCluster]:
    """A cluster whose reader replays nothing any more."""
    monkeypatch.setattr(Dialect, "_get_server_version_info", lambda *_: (16, 4), raising=False)
    cluster = FakeCluster(readers=1)
    cluster.set_late(*cluster.readers)
    with installed(cluster):
        yield cluster


HINTED: dict[str, Any] = {
    "text": text("SELECT /*@writer*/ 1"),
    "columns": text("SELECT /*@writer*/ 1").columns(column("id")),
    "from_statement": select(Part).from_statement(text("SELECT /*@writer*/ 1").columns(Part.id)),
    "prefix": select(Part.id).prefix_with("/*@writer*/"),
    "suffix": select(Part.id).suffix_with("/*@writer*/"),
    "statement hint": select(Part.id).with_statement_hint("/*@writer*/"),
    "option": select(Part.id).execution_options(route="writer"),
}


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


@pytest.mark.parametrize("read_only", [None, True])
@pytest.mark.parametrize("statement", HINTED.values(), ids=HINTED)
def test_a_hint_in_any_part_of_a_text_needs_no_reader(late: FakeCluster, statement: Executable, read_only: bool | None) -> None:
    """A statement that asks for the writer is executed there, although no reader is left. A read is refused."""
    with Router("postgresql+fakepg://app@db-1/shop", instances=["db-2"], no_reader="error") as router:
        router.start()
        late.kill(late.readers[0])
        make: Any = sessionmaker(class_=RoutingSession, router=router, read_only=read_only)
        with make() as s, pytest.raises(NoReaderAvailable):
            s.execute(READ)
        with make() as s:
            s.execute(statement).all()
            assert place(s) == "writer"


@pytest.mark.parametrize("read_only", [None, True])
def test_a_hint_of_the_engine_needs_no_reader(late: FakeCluster, read_only: bool | None) -> None:
    """A `route` in the engine's options counts before a reader is chosen. A statement may have another one."""
    routed: dict[str, Any] = {"execution_options": {"route": "writer"}}
    options: dict[str, Any] = {"instances": ["db-2"], "no_reader": "error", "engine_options": routed}
    with Router("postgresql+fakepg://app@db-1/shop", **options) as router:
        router.start()
        make: Any = sessionmaker(class_=RoutingSession, router=router, read_only=read_only)
        late.kill(late.readers[0])
        with make() as s:
            s.execute(READ)
            assert place(s) == "writer"
        with make() as s, pytest.raises(NoReaderAvailable):
            s.execute(READ, execution_options={"route": "reader"})
