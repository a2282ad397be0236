"""The promises for every cluster, whatever its servers are and wherever they run: one body of tests for all."""

from __future__ import annotations

import threading
from typing import Any

from sqlalchemy import insert, select

from aurora_router import Router
from tests.containers.cluster import LOSSES
from tests.integration.shop import RAISE, Item, eventually, instance_id, place, sessions, until_readers_serve

STOCK = select(Item.stock).where(Item.id == 1)


def add_item(router: Router, number: int) -> None:
    with sessions(router)() as s, s.begin():
        s.execute(insert(Item).values(id=number, name="new", stock=0))


def has_item(cluster: Any, number: int, instance: Any) -> bool:
    """Whether the instance has the item, read without the router."""
    return bool(cluster.execute(f"SELECT 1 FROM item WHERE id = {number}", instance=instance))


def test_a_read_runs_on_a_reader_and_a_write_on_the_writer(cluster: Any, router: Router) -> None:
    until_readers_serve(router, 2)
    served = set()
    for _ in range(4):
        with sessions(router)() as s:
            assert s.scalar(STOCK) == 10
            served.add(instance_id(s))
    assert served == {reader.address for reader in cluster.readers}
    with sessions(router)() as s:
        assert s.scalar(STOCK) == 10
        s.execute(RAISE)
        assert instance_id(s) == cluster.writer.address
        s.commit()
    assert cluster.execute("SELECT stock FROM item WHERE id = 1") == [(11,)]


def test_a_session_sees_its_own_writes(router: Router) -> None:
    until_readers_serve(router, 2)
    with sessions(router)() as s:
        for expected in range(11, 61):
            s.execute(RAISE)
            s.commit()
            for _ in range(3):
                assert s.scalar(STOCK) == expected
                s.rollback()

        def on_a_reader() -> bool:
            s.rollback()
            assert s.scalar(STOCK) == 60
            return place(s) == "reader"

        eventually(on_a_reader)


def test_a_lost_writer_is_replaced_and_stays_deposed(cluster: Any, router: Router, loss: str) -> None:
    """A promoted reader replaces a lost writer, which gets no unit when it returns."""
    add_item(router, 100)
    cluster.wait_in_sync()
    old = cluster.writer
    getattr(cluster, loss)(old)
    eventually(lambda: router.topology.writer is None)
    with sessions(router)() as s:
        assert s.get(Item, 100) is not None, "reads go on"
    waiting = threading.Thread(target=add_item, args=(router, 101))
    waiting.start()
    eventually(lambda: router.stats().units_waiting_for_writer)
    new = cluster.promote()
    waiting.join(20)
    assert has_item(cluster, 101, new)
    assert router.topology.writer is not None
    assert router.topology.writer.id == new.address

    getattr(cluster, LOSSES[loss])(old)
    eventually(lambda: "deposed" in router.topology.by_id[old.address].error)
    add_item(router, 102)
    assert has_item(cluster, 102, new)
    assert not has_item(cluster, 102, old)
    for _ in range(4):
        with sessions(router)() as s:
            s.scalar(STOCK)
            assert instance_id(s) != old.address, "nor does it serve reads"
