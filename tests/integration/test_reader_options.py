"""Engine options of readers alone: they hold while an instance is a reader, and no longer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.engine import Connection

from aurora_router import ConfigurationError, Router
from aurora_router.local.cluster import Cluster
from tests.integration.shop import BOTH, Item, engine, eventually, place, sessions, until_readers_serve

MakeRouter = Callable[..., Router]

_CONNECT = {
    "postgresql": lambda name: {"application_name": name},
    "mariadb": lambda name: {"init_command": f"SET @used = '{name}'"},
    "mysql": lambda name: {"init_command": f"SET @used = '{name}'"},
}


def options(cluster: Cluster[Any], name: str, **others: object) -> dict[str, object]:
    """Options of an engine whose connections know that name."""
    return {"connect_args": _CONNECT[engine(cluster)](name), **others}


def named(connection: Connection) -> str:
    """The name that a connection knows."""
    if connection.dialect.name == "postgresql":
        return str(connection.connection.driver_connection.info.get_parameters()["application_name"])  # type: ignore[union-attr]
    with connection.connection.driver_connection.cursor() as cursor:  # type: ignore[union-attr]
        cursor.execute("SELECT @used")
        return str(cursor.fetchone()[0])


@pytest.fixture
def router(cluster: Cluster[Any], make_router: MakeRouter) -> Router:
    made = make_router(
        engine_options=options(cluster, "all", pool_size=7, max_overflow=0, execution_options={"shared": 1, "which": "all"}),
        reader_options=options(cluster, "readers", pool_size=3, execution_options={"which": "readers"}),
    )
    until_readers_serve(made, 2)
    return made


@BOTH
def test_readers_have_options_of_their_own(router: Router) -> None:
    """Options of readers are merged over the common ones, and dicts inside of them item by item."""
    with router.connect(read_only=True) as connection:
        assert named(connection) == "readers"
        assert connection.engine.pool.size() == 3
        assert connection.engine.pool._max_overflow == 0
        assert connection.engine.get_execution_options() == {"shared": 1, "which": "readers"}
    with router.connect() as connection:
        assert named(connection) == "all"
        assert connection.engine.pool.size() == 7
        assert connection.engine.get_execution_options() == {"shared": 1, "which": "all"}


@BOTH
def test_a_unit_that_moves_gets_the_options_of_the_writer(router: Router) -> None:
    with sessions(router)() as s:
        s.get(Item, 1)
        assert place(s) == "reader"
        assert s.get_bind(clause=text("SELECT 1")).pool.size() == 3
        assert s.connection().engine.pool.size() == 7
        assert named(s.connection()) == "all"


@BOTH
def test_a_promoted_reader_has_the_options_of_all(cluster: Cluster[Any], router: Router) -> None:
    """A promoted reader's pooled connections are closed, open units stay there, and the old writer returns as a reader."""
    old, first = cluster.writer, cluster.readers[0]
    with router.connect(read_only=True), router.connect(read_only=True):
        before = next(reader for reader in router.topology.readers if reader.id == first.address)
    assert router.engine(before).pool.checkedin() == 1
    with sessions(router)() as s:
        s.get(Item, 1)
        cluster.kill(old)
        cluster.promote(first)
        eventually(lambda: router.topology.writer is not None and router.topology.writer.id == first.address)
        with router.connect() as connection:
            assert named(connection) == "all"
            assert connection.engine.url.host == first.host
        s.get_one(Item, 2).stock += 1
        s.commit()
    eventually(lambda: router.engine(before).pool.checkedin() == 0)
    cluster.rejoin(old)
    eventually(lambda: len(router.topology.readers) == 2)
    for instance in router.topology.readers:
        with router.engine(instance).connect() as connection:
            assert named(connection) == "readers"


@BOTH
def test_reads_are_balanced_by_the_pools_of_readers(cluster: Cluster[Any], make_router: MakeRouter) -> None:
    """A reader whose own pool is full is passed over, even if the common options would leave room."""
    router = make_router(balance="round_robin", reader_options={"pool_size": 1, "max_overflow": 0})
    until_readers_serve(router, 2)
    with router.connect(read_only=True) as busy:
        for _ in range(4):
            with router.connect(read_only=True) as connection:
                assert connection.engine is not busy.engine


def test_a_pool_size_of_readers_that_is_none_is_refused(cluster: Cluster[Any]) -> None:
    with pytest.raises(ConfigurationError, match=r"reader_options\['pool_size'\]=\.\.\.: give a number"):
        Router(cluster.url, reader_options={"pool_size": "5"})
