"""The mark of a late reader's object follows the object, and goes when nothing of the reader is left."""

from __future__ import annotations

import pickle
from decimal import Decimal
from typing import Any

import pytest
from sqlalchemy import delete, select, text, update
from sqlalchemy.exc import SAWarning
from sqlalchemy.orm import Session as PlainSession
from sqlalchemy.orm import make_transient, make_transient_to_detached

from aurora_router import Router, StaleRead
from aurora_router.core import events
from aurora_router.local import FaultProxy
from aurora_router.local.cluster import Cluster
from tests.integration.shop import BOTH, Item, Part, place, sessions, stock
from tests.integration.stale_writes.helpers import LOOK, MakeRouter, late, marked, on_the_writer, raises_stale, sent, shown
from tests.integration.stale_writes.models import Kit, Odd

pytestmark = BOTH


def test_the_mark_follows_an_object_to_another_session(cluster: Cluster[Any], router: Router) -> None:
    """The mark goes along with an object that another session writes."""
    on_the_writer(cluster, "UPDATE item SET stock = 50 WHERE id = 1")
    for read_only in (None, False):
        with sessions(router)() as s:
            item = s.get_one(Item, 1)
        with sessions(router, read_only=read_only)() as s:
            s.add(item)
            item.stock += 1
            with pytest.raises(StaleRead):
                s.flush()
        with sessions(router)() as s:
            item = pickle.loads(pickle.dumps(s.get_one(Item, 1)))
        with sessions(router, read_only=read_only)() as s:
            s.add(item)
            item.stock += 1
            with pytest.raises(StaleRead):
                s.flush()
    assert stock(cluster) == 50


def test_an_object_from_an_earlier_unit_is_checked_when_written(cluster: Cluster[Any], proxy: FaultProxy, router: Router) -> None:
    """An object that outlives its unit is checked in the unit that writes it."""
    with sessions(router, expire_on_commit=False)() as s:
        item = s.get_one(Item, 1)
        s.commit()
        on_the_writer(cluster, "UPDATE item SET stock = 50 WHERE id = 1")
        item.stock += 1
        with pytest.raises(StaleRead):
            s.commit()
        s.rollback()
        s.refresh(item, with_for_update=True)
        assert not marked(item), "all of it was read on the writer"
        item.stock += 1
        assert sent(proxy, s.commit) == ["UPDATE", "COMMIT"]
    assert stock(cluster) == 51


def test_an_object_that_expired_is_as_fresh_as_what_is_read_next(
    cluster: Cluster[Any], proxy: FaultProxy, router: Router, make_router: MakeRouter, heard: list[events.Event]
) -> None:
    with sessions(router)() as s:
        item = s.get_one(Item, 1)
        s.commit()
        s.connection()
        assert item.stock == 10
        assert not marked(item)
        item.stock += 1
        assert sent(proxy, s.commit) == ["UPDATE", "COMMIT"]
    # With any other consistency a session that has read on the writer does not go back to a late reader.
    eventual = late(cluster, proxy, make_router, heard, consistency="eventual")
    with sessions(eventual)() as s:
        item = s.get_one(Item, 2, execution_options={"route": "writer"})
        s.commit()
        assert not marked(item)
        assert item.stock == 20
        assert place(s) == "reader"
        assert marked(item)
        on_the_writer(cluster, "UPDATE item SET stock = 50 WHERE id = 2")
        item.stock += 1
        with pytest.raises(StaleRead):
            s.commit()
    with sessions(router)() as s:
        item = s.get_one(Item, 1)
        s.connection()
        s.refresh(item, ["name"])
        assert marked(item), "there is still what the reader has shown"
        s.refresh(item, ["stock"])
        s.refresh(item, ["id", "stock", "name"])
        assert not marked(item)


def test_rows_read_on_after_the_move_are_still_a_readers(cluster: Cluster[Any], router: Router) -> None:
    """Rows of a reader that are fetched after the unit has moved are still a reader's."""
    on_the_writer(cluster, "UPDATE item SET stock = 50")
    with sessions(router)() as s:
        rows = s.scalars(select(Item).order_by(Item.id))
        first = next(rows)
        s.connection()
        second = next(rows)
        assert (first.stock, second.stock) == (10, 20)
        assert marked(first)
        assert marked(second)
        kit = s.get_one(Kit, (1, "x"))
        assert not marked(kit)
        second.stock += 1
        with raises_stale("Item", 2):
            s.flush()


def test_a_merged_object_is_checked_by_what_it_was_merged_into(cluster: Cluster[Any], proxy: FaultProxy, router: Router) -> None:
    with sessions(router)() as s:
        kept = s.get_one(Item, 1)
        assert s.merge(Item(id=1, stock=11)) is kept
        assert sent(proxy, s.commit) == [LOOK, "UPDATE", "COMMIT"]
        on_the_writer(cluster, "UPDATE item SET stock = 50 WHERE id = 2")
    with sessions(router)() as s:
        kept = s.get_one(Item, 2)
        assert s.merge(Item(id=2, stock=21)) is kept
        with pytest.raises(StaleRead):
            s.commit()


def test_a_merge_that_changes_nothing_locks_nothing(router: Router) -> None:
    """Two open sessions may merge the same unchanged object: nothing is sent for it, so neither waits for the other."""
    with sessions(router)() as one, sessions(router)() as two:
        for s in (one, two):
            kept = s.get_one(Item, 1)
            assert s.merge(Item(id=1, stock=10)) is kept
            s.execute(
                text("SET lock_timeout = 5000" if s.get_bind().dialect.name == "postgresql" else "SET lock_wait_timeout = 5")
            )
            s.flush()


@pytest.mark.parametrize("merge", [name for name in ("merge", "merge_all") if hasattr(PlainSession, name)])
def test_a_merge_loads_on_the_writer(cluster: Cluster[Any], proxy: FaultProxy, router: Router, merge: str) -> None:
    """A merge loads on the writer, so it takes no row for new that a late reader has not got."""
    on_the_writer(cluster, "UPDATE item SET stock = 50 WHERE id = 1")
    with sessions(router)() as s:
        new = Item(id=9, stock=1)
        s.add(new)
        s.commit()
    for given in (new, Item(id=1, stock=10)):
        with sessions(router)() as s:
            s.scalar(select(Item.id))
            assert place(s) == "reader"
            getattr(s, merge)([given] if merge == "merge_all" else given)
            assert place(s) == "writer"
            assert LOOK not in sent(proxy, s.commit)
    assert cluster.execute("SELECT id, stock FROM item WHERE id IN (1, 9) ORDER BY id") == [(1, 10), (9, 1)]
    with sessions(router, read_only=True)() as s:
        assert s.merge(Item(id=1)).stock == 10


def test_a_value_that_the_database_has_rounded_is_not_stale(cluster: Cluster[Any], router: Router) -> None:
    """A unit's own UPDATE may compute a value that the column rounds."""
    on_the_writer(cluster, "UPDATE odd SET exact = 1")
    cluster.resume_replay(cluster.readers[0])
    cluster.wait_in_sync()
    with sessions(router)() as s:
        odd = s.get_one(Odd, 1)
        assert place(s) == "reader"
        s.execute(update(Odd).values(exact=Odd.exact * Decimal("1.005")))
        odd.stock += 1
        s.commit()
    assert cluster.execute("SELECT stock FROM odd") == [(2,)]


def test_what_the_unit_has_deleted_itself_is_not_stale(cluster: Cluster[Any], router: Router) -> None:
    """An object that is deleted once more, after a DELETE of the unit has taken its row, is not looked up."""
    with sessions(router)() as s:
        part = shown(s, Part, 1)
        s.execute(delete(Part).where(Part.id == 1))
        s.delete(part)
        with pytest.warns(SAWarning, match="0 were matched"):
            s.commit()
    assert cluster.execute("SELECT id FROM part") == [(2,)]


def test_a_copy_of_what_a_reader_has_shown_is_not_stale(cluster: Cluster[Any], router: Router) -> None:
    """An object that is inserted anew has nothing left of the row that it was loaded from."""
    with sessions(router)() as s:
        odd = shown(s, Odd, 1)
        make_transient(odd)
        odd.id, odd.exact = 9, Decimal("1.005")
        s.add(odd)
        s.flush()
        assert not marked(odd)
        odd.stock += 1
        s.commit()
    assert cluster.execute("SELECT stock FROM odd WHERE id = 9") == [(2,)]


def test_an_object_with_nothing_left_from_a_read_is_not_checked(cluster: Cluster[Any], proxy: FaultProxy, router: Router) -> None:
    """An object is not checked if nothing is left of the values that were read."""
    with sessions(router)() as s:
        item = s.get_one(Item, 1)
        on_the_writer(cluster, "UPDATE item SET stock = 50 WHERE id = 1")
        s.commit()
        item.stock = 5
        assert LOOK not in sent(proxy, s.commit)
    assert stock(cluster) == 5


def test_an_object_that_was_never_read_is_not_checked(cluster: Cluster[Any], proxy: FaultProxy, router: Router) -> None:
    on_the_writer(cluster, "UPDATE item SET stock = 50 WHERE id = 1")
    with sessions(router)() as s:
        item = Item(id=1)
        make_transient_to_detached(item)
        s.add(item)
        item.stock = 5
        assert sent(proxy, s.commit) == ["UPDATE", "COMMIT"]
    assert stock(cluster) == 5
