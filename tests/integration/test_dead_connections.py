"""A pooled connection that has died is replaced at its checkout, on every way out of the pool."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, closing
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.engine import Engine

from aurora_router import Router
from aurora_router.local.cluster import Cluster, LocalInstance
from aurora_router.router import core_of
from tests.integration.shop import BOTH, connection_ids, eventually, family, sessions, until_readers_serve

MakeRouter = Callable[..., Router]
pytestmark = BOTH

ONE = {"engine_options": {"pool_size": 1, "max_overflow": 0}}


_ENDED = {
    "postgresql": ("SELECT pg_backend_pid()", "SELECT pg_terminate_backend({}, 30000)"),
    "mysql": ("SELECT connection_id()", "KILL {}"),
}


def kill(cluster: Cluster[Any], instance: LocalInstance, engine: Engine) -> None:
    """Have a server end the idle connections of an engine's pool, and wait until they are gone."""
    asked, end = _ENDED[family(cluster)]
    numbers = []
    with ExitStack() as stack:
        for _ in range(engine.pool.checkedin()):  # type: ignore[attr-defined]
            raw: Any = stack.enter_context(closing(engine.raw_connection()))
            cursor = raw.cursor()
            cursor.execute(asked)
            numbers.append(cursor.fetchone()[0])
    for number in numbers:
        cluster.execute(end.format(number), instance=instance)
    if family(cluster) != "postgresql":
        eventually(lambda: not connection_ids(cluster, instance).intersection(numbers))


def by_connection(engine: Engine) -> int:
    with engine.connect() as connection:
        return int(connection.scalar(text("SELECT 1")) or 0)


def by_begin(engine: Engine) -> int:
    with engine.begin() as connection:
        return int(connection.scalar(text("SELECT 1")) or 0)


def by_raw_connection(engine: Engine) -> int:
    with closing(engine.raw_connection()) as raw:
        cursor: Any = raw.cursor()
        cursor.execute("SELECT 1")
        return int(cursor.fetchone()[0])


WAYS = [by_connection, by_begin, by_raw_connection]


@pytest.mark.parametrize("role", ["writer", "reader"])
@pytest.mark.parametrize("before", ["nothing", "automatic", "read-only", "writing"])
def test_a_dead_connection_of_nobodys_is_replaced(cluster: Cluster[Any], make_router: MakeRouter, role: str, before: str) -> None:
    """An engine of the router replaces a dead connection, whichever unit has used it before."""
    router = make_router(instances=[cluster.readers[0].address] if role == "reader" else [], **ONE)
    until_readers_serve(router, int(role == "reader"))
    instance = cluster.readers[0] if role == "reader" else cluster.writer
    engine = router.engine(router.topology.by_id[instance.address])
    for way in WAYS:
        assert way(engine) == 1
        if before != "nothing":
            with sessions(router)(read_only={"automatic": None, "read-only": True, "writing": False}[before]) as s:
                s.execute(text("SELECT 1")).all()
        kill(cluster, instance, engine)
        assert way(engine) == 1


def test_all_dead_connections_of_a_pool_are_replaced(cluster: Cluster[Any], make_router: MakeRouter) -> None:
    """No dead connection is handed out, and nothing is left checked out."""
    router = make_router(instances=[])
    engine = core_of(router).writer_engine()
    with ExitStack() as stack:
        for _ in range(4):
            stack.enter_context(engine.connect())
    kill(cluster, cluster.writer, engine)
    with ExitStack() as stack:
        for _ in range(4):
            assert stack.enter_context(engine.connect()).scalar(text("SELECT 1")) == 1
    assert engine.pool.checkedout() == 0  # type: ignore[attr-defined]


@pytest.mark.parametrize("way", ["session", "connection"])
def test_the_commit_of_reads_survives_their_reader(cluster: Cluster[Any], make_router: MakeRouter, way: str) -> None:
    """A read-only unit has all its answers, so its COMMIT raises nothing if its reader dies before."""
    reader = cluster.readers[0]
    router = make_router(instances=[reader.address])
    until_readers_serve(router, 1)
    with ExitStack() as stack:
        if way == "session":
            session = stack.enter_context(sessions(router, read_only=True)())
            stack.enter_context(session.begin())
            assert session.scalar(text("SELECT count(*) FROM item")) == 3
        else:
            connection = stack.enter_context(router.connect(read_only=True))
            stack.enter_context(connection.begin())
            assert connection.scalar(text("SELECT count(*) FROM item")) == 3
        cluster.kill(reader)
    with sessions(router)() as s:
        assert s.scalar(text("SELECT count(*) FROM item")) == 3
