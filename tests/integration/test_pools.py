"""Full pools of readers: a unit takes a free connection of another reader, and waits only if there is none."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import pytest
from sqlalchemy import exc, text
from sqlalchemy.engine import Connection

from aurora_router import Router
from aurora_router.core.instance import Instance
from aurora_router.core.selection import Load
from aurora_router.local.cluster import Cluster
from tests.integration.shop import BOTH, Item, connections, eventually, instance_id, sessions, until_readers_serve

MakeRouter = Callable[..., Router]
ONE = {"pool_size": 1, "max_overflow": 0}

pytestmark = BOTH


def where(connection: Connection) -> str:
    """The instance that a connection leads to."""
    return f"{connection.engine.url.host}:{connection.engine.url.port}"


@pytest.mark.parametrize("balance", ["round_robin", "random", "fastest", "least_busy"])
def test_a_unit_goes_to_the_reader_that_has_room(cluster: Cluster[Any], make_router: MakeRouter, balance: str) -> None:
    """With one reader's pool full and the other one idle, each unit gets the idle reader at once."""
    router = make_router(balance=balance, engine_options=ONE)
    until_readers_serve(router, 2)
    with router.connect(read_only=True) as busy:
        for _ in range(8):
            with router.connect(read_only=True) as connection:
                assert where(connection) != where(busy)
            with sessions(router)() as s:
                s.get(Item, 1)
                assert instance_id(s) != where(busy)
            raw = router.raw_connection(read_only=True)
            raw.close()


def test_a_unit_that_is_overtaken_goes_to_the_other_reader(cluster: Cluster[Any], make_router: MakeRouter) -> None:
    """A unit whose reader's last connection is taken between the choice and the checkout does not wait for it."""
    taken = ExitStack()
    overtakes = threading.Event()

    def slowly(readers: Sequence[Instance], load: Load, rnd: float) -> Instance:
        first = readers[0]
        if overtakes.is_set() and len(readers) == 2:
            overtakes.clear()
            taken.enter_context(router.engine(first).connect())
        return first

    router = make_router(balance=slowly, engine_options=ONE)
    until_readers_serve(router, 2)
    with taken, sessions(router)() as s:
        overtakes.set()
        s.get(Item, 1)
        assert instance_id(s) == router.topology.readers[1].id


def test_a_unit_that_waited_in_vain_takes_a_reader_that_is_idle(cluster: Cluster[Any], make_router: MakeRouter) -> None:
    """A unit that waits at a full reader until pool_timeout takes another one that became idle meanwhile."""
    router = make_router(balance=lambda readers, load, rnd: readers[0], engine_options={**ONE, "pool_timeout": 1.0})
    until_readers_serve(router, 2)
    waiting = threading.Event()
    pool: Any = router.engine(router.topology.readers[0]).pool
    before = pool._pool.get

    def get(block: bool = True, timeout: float | None = None) -> Any:
        if block:
            waiting.set()
        return before(block, timeout)

    pool._pool.get = get
    with router.connect(read_only=True), ThreadPoolExecutor(1) as threads:
        with router.connect(read_only=True):

            def read() -> str:
                with router.connect(read_only=True) as connection:
                    return where(connection)

            asked = threads.submit(read)
            assert waiting.wait(15)
        assert asked.result(timeout=15) == router.topology.readers[1].id


def test_a_unit_waits_where_all_readers_are_full(cluster: Cluster[Any], make_router: MakeRouter) -> None:
    """If all readers are full, a unit waits for a connection of one, and finally raises the pool's TimeoutError."""
    router = make_router(balance=lambda readers, load, rnd: readers[0], engine_options={**ONE, "pool_timeout": 0.5})
    until_readers_serve(router, 2)
    with router.connect(read_only=True), router.connect(read_only=True):
        with pytest.raises(exc.TimeoutError):
            router.connect(read_only=True)
        with router.connect() as connection:
            assert connection.scalar(text("SELECT 1")) == 1
    router = make_router(balance=lambda readers, load, rnd: readers[0], engine_options=ONE)
    until_readers_serve(router, 2)
    with ExitStack() as second, ThreadPoolExecutor(1) as threads:
        with router.connect(read_only=True) as first:
            second.enter_context(router.connect(read_only=True))
            asked = threads.submit(router.connect, True)
            pool: Any = router.engine(router.topology.readers[0]).pool
            eventually(lambda: pool._pool.not_empty._waiters)
        with asked.result(timeout=15) as third:
            assert where(third) == where(first)


def test_a_connection_back_in_a_disposed_pool_is_closed(cluster: Cluster[Any], make_router: MakeRouter) -> None:
    """No connection stays open that comes back in the very moment in which its instance is removed."""
    first, second = cluster.readers
    router = make_router(instances=[first.address, second.address])
    until_readers_serve(router, 2)
    engine = router.engine(router.topology.by_id[first.address])
    connection = engine.connect()
    pool: Any = engine.pool
    put = pool._do_return_conn

    def put_late(record: Any) -> None:
        if router.topology.by_id.get(first.address) is not None:
            router.remove_instance(first.address)
            eventually(lambda: pool.retired)
        put(record)

    pool._do_return_conn = put_late
    connection.close()
    eventually(lambda: connections(cluster, first) == 0)
