"""Why an automatic unit goes to the writer with its first statement: all causes together, on a fake cluster."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain, combinations
from typing import Any

import pytest
from sqlalchemy import select
from sqlalchemy.orm import sessionmaker

from aurora_router import Router, RoutingSession
from aurora_router.core import events
from aurora_router.core.selection import Reason
from aurora_router.routing.retry_context import RetryContext
from tests.fakes.cluster import FakeCluster
from tests.fakes.driver import Dialect, installed
from tests.unit.test_session_classes import Part

# The first cause that is there gives the reason.
OF_STATEMENT = {
    "declared": Reason.DECLARED_WRITE,
    "argument": Reason.DECLARED_WRITE,
    "hint": Reason.HINT,
    "lock": Reason.NOT_A_READ,
    "run": Reason.STALE_READ,
    "level": Reason.ISOLATION,
}
OF_MERGE = {"declared": Reason.DECLARED_WRITE, "run": Reason.STALE_READ, "merge": Reason.NOT_A_READ, "level": Reason.ISOLATION}

Causes = frozenset[str]


@contextmanager
def router_at(level: str, heard: list[events.Event]) -> Iterator[Router]:
    """Yield a router whose servers have this default isolation level."""
    cluster = FakeCluster()
    for server in cluster.servers.values():
        server.isolation = level
    with installed(cluster), Router("postgresql+fakepg://app@db-1/shop", instances=["db-2"], listeners=[heard.append]) as router:
        router.start()
        yield router


def execute(s: Any, causes: Causes) -> None:
    if "run" in causes:
        run = RetryContext(None)
        run.on_writer = True
        s.join_retry(run, None)
    if "merge" in causes:
        s.merge(Part(id=42))
        return
    statement = select(Part.id).with_for_update() if "lock" in causes else select(Part.id)
    options: dict[str, Any] = {"execution_options": {"route": "writer"}} if "hint" in causes else {}
    if "argument" in causes:
        options["bind_arguments"] = {"read_only": False}
    s.execute(statement, **options)


@pytest.mark.parametrize("level", ["read committed", "repeatable read"])
@pytest.mark.parametrize("table", [OF_STATEMENT, OF_MERGE], ids=["statement", "merge"])
def test_the_first_of_all_causes_is_the_reason(monkeypatch: pytest.MonkeyPatch, table: dict[str, Reason], level: str) -> None:
    """Each set of causes has the reason of its first one, and a reader serves a statement without any."""
    monkeypatch.setattr(Dialect, "_get_server_version_info", lambda *_: (16, 4), raising=False)
    always = {"merge"} & {*table} | ({"level"} if level != "read committed" else set())
    others = [cause for cause in table if cause not in ("merge", "level")]
    heard: list[events.Event] = []
    found: dict[Causes, list[Reason]] = {}
    expected: dict[Causes, list[Reason]] = {}
    with router_at(level, heard) as router:
        for chosen in chain.from_iterable(combinations(others, count) for count in range(len(others) + 1)):
            causes = frozenset({*chosen, *always})
            make: Any = sessionmaker(class_=RoutingSession, router=router, read_only=False if "declared" in causes else None)
            heard.clear()
            with make() as s:
                execute(s, causes)
            found[causes] = [each.reason for each in heard if isinstance(each, events.Routed)]
            expected[causes] = [next((reason for cause, reason in table.items() if cause in causes), Reason.READ)]
    assert found == expected
