"""The check sends few statements: one SELECT for each mapper of a flush, and none for what needs no check."""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy import event, select, text
from sqlalchemy.engine import Engine
from sqlalchemy.orm import Session as PlainSession

from aurora_router import Router, RoutingSession
from aurora_router.core import events
from aurora_router.local import FaultProxy
from aurora_router.local.cluster import Cluster
from tests.integration.shop import BOTH, Item, Part, place, sessions, stock
from tests.integration.stale_writes.helpers import (
    LOOK,
    MakeRouter,
    late,
    looks,
    marked,
    on_the_writer,
    raises_stale,
    replaying,
    sent,
)
from tests.integration.stale_writes.models import Kit, Line, Purchase, Versioned

pytestmark = BOTH


def test_the_guard_adds_one_round_trip_to_a_flush_that_it_checks(
    cluster: Cluster[Any], proxy: FaultProxy, make_router: MakeRouter, heard: list[events.Event]
) -> None:
    trips: dict[bool, int] = {}
    for guarded in (False, True):
        router = late(cluster, proxy, make_router, heard, stale_write_guard=guarded, probe_interval=3600)
        with sessions(router)() as s:
            item = s.scalars(select(Item)).all()[0]
            assert place(s) == "reader"
            item.stock += 1
            before = proxy.round_trips
            texts = sent(proxy, s.commit)
            trips[guarded] = proxy.round_trips - before
            cluster.resume_replay(cluster.readers[0])
            cluster.wait_in_sync()
            assert texts == [*([LOOK] if guarded else []), "UPDATE", "COMMIT"]
        router.close()
    assert trips[True] == trips[False] + 1


def test_a_flush_looks_once_for_each_mapper(proxy: FaultProxy, router: Router) -> None:
    with sessions(router)() as s:
        for instance in (*s.scalars(select(Item)).all(), *s.scalars(select(Kit)).all()):
            instance.stock += 1
        looked = len([text for text in proxy.statements if looks(text)])
        assert sent(proxy, s.flush) == [LOOK, "UPDATE"]
        assert len([text for text in proxy.statements if looks(text)]) - looked == 2
        s.get_one(Item, 1).stock += 1
        assert sent(proxy, s.flush) == ["UPDATE"], "what was looked at is locked"
        s.get_one(Kit, (1, "x")).stock += 1
        assert sent(proxy, s.commit) == ["UPDATE", "COMMIT"]


def test_what_was_read_on_the_writer_costs_nothing(proxy: FaultProxy, router: Router) -> None:
    with sessions(router, read_only=False)() as s:
        s.get_one(Item, 1).stock += 1
        assert sent(proxy, s.commit) == ["UPDATE", "COMMIT"]
    with sessions(router)() as s:
        s.get_one(Item, 2)
        s.execute(text("SELECT 1 FOR UPDATE"))
        s.get_one(Item, 1).stock += 1
        assert sent(proxy, s.commit) == ["UPDATE", "COMMIT"], "whatever the unit has read on a reader before"
    with sessions(router)() as s:
        s.get_one(Item, 1, with_for_update=True).stock += 1
        assert sent(proxy, s.commit) == ["UPDATE", "COMMIT"]


def test_what_is_not_changed_costs_nothing(proxy: FaultProxy, router: Router) -> None:
    with sessions(router)() as s:
        item = s.get_one(Item, 1)
        item.parts.append(Part(id=9))
        s.add(Item(id=9))
        assert sent(proxy, s.commit) == ["INSERT", "COMMIT"]


def test_mappers_with_version_counters_cost_nothing(cluster: Cluster[Any], proxy: FaultProxy, router: Router) -> None:
    """Mappers that count versions cost nothing and look after themselves."""
    with sessions(router)() as s:
        s.get_one(Versioned, 1).stock += 1
        assert sent(proxy, s.commit) == ["UPDATE", "COMMIT"]


def test_sessions_of_others_are_left_alone(cluster: Cluster[Any], proxy: FaultProxy, router: Router, engine: Engine) -> None:
    on_the_writer(cluster, "UPDATE item SET stock = 50 WHERE id = 1")
    with PlainSession(engine) as s:
        item = s.get_one(Item, 1)
        item.stock += 1
        assert sent(proxy, s.flush) == ["UPDATE"]
        assert not marked(item)
    with PlainSession(engine) as s, sessions(router)() as ours:
        item = ours.get_one(Item, 1)
        ours.expunge(item)
        s.add(item)
        item.stock += 1
        assert sent(proxy, s.commit)[:2] == ["UPDATE", "COMMIT"]
    with router.connect() as connection, PlainSession(connection) as s:
        s.get_one(Item, 1).stock += 1
        assert sent(proxy, s.flush) == ["UPDATE"], "on a connection of the router's, too"


def test_children_found_by_a_flush_are_looked_up_at_once(cluster: Cluster[Any], proxy: FaultProxy, router: Router) -> None:
    """The guard sends one SELECT for the class, however many children a new parent takes over."""
    with sessions(router)() as s:
        s.add(Purchase(id=2, total=0, state="open", lines=[*s.scalars(select(Line))]))
        before = len(proxy.statements)
        s.flush()
        assert sum(map(looks, proxy.statements[before:])) == 1
        s.commit()
    assert cluster.execute("SELECT count(*) FROM line WHERE order_id = 2") == [(3,)]


@pytest.mark.parametrize("changed", [0, 1])
def test_values_set_again_are_compared_at_once(proxy: FaultProxy, router: Router, changed: int) -> None:
    """Objects that are set to the values they have cost one SELECT for the class, besides the one for those really changed."""
    with sessions(router)() as s:
        for number, item in enumerate(s.scalars(select(Item).order_by(Item.id)).all()):
            item.stock += number < changed
            item.name = str(item.name)
        before = len(proxy.statements)
        s.flush()
        asked = [each for each in proxy.statements[before:] if each.startswith("SELECT") and "FROM item" in each]
        assert len(asked) == 1 + changed
        assert sum(map(looks, asked)) == changed


def test_what_is_sent_after_all_is_locked(cluster: Cluster[Any], proxy: FaultProxy, router: Router) -> None:
    """An object that was compared because it was set to its value is locked if a listener changes it during the flush."""
    with sessions(router)() as s:
        items = s.scalars(select(Item).order_by(Item.id)).all()
        for item in items:
            item.stock = int(item.stock)

        def also(*_: Any) -> None:
            items[1].stock = 21
            items[2].stock = 31

        event.listen(Item, "before_update", also)
        try:
            before = len(proxy.statements)
            s.flush()
        finally:
            event.remove(Item, "before_update", also)
        assert sum(map(looks, proxy.statements[before:])) == 1
        s.commit()
    assert cluster.execute("SELECT stock FROM item ORDER BY id") == [(10,), (21,), (31,)]


def test_a_mapper_with_an_engine_of_its_own_is_left_alone(
    cluster: Cluster[Any], proxy: FaultProxy, router: Router, engine: Engine
) -> None:
    with sessions(router, binds={Kit: engine})() as s:
        item, kit = s.get_one(Item, 1), s.get_one(Kit, (1, "x"))
        on_the_writer(cluster, "UPDATE kit SET stock = 50 WHERE b = 'x'")
        kit.stock += 1
        s.flush()
        assert place(s) == "reader"
        kit.stock += 1
        item.stock += 1
        assert sent(proxy, s.commit).count(LOOK) == 1
    on_the_writer(cluster, "UPDATE item SET stock = 50 WHERE id = 1")

    def both(s: RoutingSession) -> None:
        s.get_one(Kit, (1, "y")).stock += 1
        s.get_one(Item, 1).stock += 1

    router.run_transaction(sessions(router, binds={Kit: engine}), both)
    assert stock(cluster) == 51
    assert cluster.execute("SELECT stock FROM kit WHERE b = 'y'") == [(21,)], "the other database was rolled back, too"


def test_thousands_of_objects_are_looked_up_in_portions(cluster: Cluster[Any], proxy: FaultProxy, router: Router) -> None:
    rows = ", ".join(f"({n}, '', 0)" for n in range(1000, 3500))
    with replaying(cluster):
        on_the_writer(cluster, f"INSERT INTO item VALUES {rows}")
    on_the_writer(cluster, "UPDATE item SET stock = 50 WHERE id = 3499")
    with sessions(router)() as s:
        for item in s.scalars(select(Item).where(Item.id >= 1000)):
            item.stock += 1
        with raises_stale("Item", 3499):
            s.flush()
        assert sum(looks(text) for text in proxy.statements) == 3
