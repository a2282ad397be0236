"""Rows that differ from what a reader has shown are found, and values that are hard to compare are no difference."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from datetime import datetime
from decimal import Decimal
from typing import Any

import pytest
from sqlalchemy import select, update
from sqlalchemy.orm import load_only

from aurora_router import Router, RoutingSession, StaleRead
from aurora_router.local.cluster import Cluster
from tests.integration.shop import BOTH, Item, Part, eventually, place, sessions, until_readers_serve
from tests.integration.shop import family as family_of
from tests.integration.stale_writes.helpers import MakeRouter, on_the_writer, replaying, shown
from tests.integration.stale_writes.models import Animal, Cat, Dog, Kit, Numbered, Odd, Opaque, Spelled, Tagged, Versioned

pytestmark = BOTH


POSTGRESQL = pytest.mark.engines("postgresql")


class Thing:
    """A value that is equal to nothing but itself."""


def set_the_value_shown(s: RoutingSession) -> None:
    s.get_one(Item, 1).stock = 10


def set_the_reference_shown(s: RoutingSession) -> None:
    s.get_one(Part, 1).item = s.get_one(Item, 1)


def add_the_member_shown(s: RoutingSession) -> None:
    item = s.get_one(Item, 1)
    item.parts.append(s.get_one(Part, 1))


def set_the_value_shown_beside_a_version(s: RoutingSession) -> None:
    s.get_one(Versioned, 1).stock = 10


@pytest.mark.parametrize(
    ("work", "meanwhile", "asked", "left"),
    [
        (set_the_value_shown, "UPDATE item SET stock = 50 WHERE id = 1", "SELECT stock FROM item WHERE id = 1", 10),
        (set_the_reference_shown, "UPDATE part SET item_id = 2 WHERE id = 1", "SELECT item_id FROM part WHERE id = 1", 1),
        (add_the_member_shown, "UPDATE part SET item_id = 2 WHERE id = 1", "SELECT item_id FROM part WHERE id = 1", 1),
        (
            set_the_value_shown_beside_a_version,
            "UPDATE versioned SET stock = 50, version = 2",
            "SELECT stock FROM versioned",
            10,
        ),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_value_that_a_late_reader_shows_already_is_written(
    cluster: Cluster[Any],
    router: Router,
    work: Callable[[RoutingSession], None],
    meanwhile: str,
    asked: str,
    left: int,
) -> None:
    """An assignment that seems to change nothing is checked, because the writer may have another value."""
    on_the_writer(cluster, meanwhile)
    runs: list[int] = []

    def assign(s: RoutingSession) -> None:
        runs.append(1)
        work(s)

    with sessions(router)() as s:
        work(s)
        with pytest.raises(StaleRead):
            s.commit()
    router.run_transaction(sessions(router), assign)
    assert cluster.execute(asked) == [(left,)]
    assert len(runs) == 2


def change(instance: Any) -> None:
    instance.stock += 1


@pytest.mark.parametrize(
    ("cls", "key", "happens", "does", "columns"),
    [
        (Item, 1, "UPDATE item SET stock = 50 WHERE id = 1", change, ("stock",)),
        (Item, 1, "UPDATE item SET name = 'x' WHERE id = 1", change, ("name",)),
        (Item, 3, "DELETE FROM item WHERE id = 3", change, ()),
        (Item, 3, "UPDATE item SET stock = 50 WHERE id = 3", "delete", ("stock",)),
        (Item, 3, "DELETE FROM item WHERE id = 3", "delete", ()),
        (Kit, (1, "y"), "UPDATE kit SET stock = 50 WHERE b = 'y'", change, ("stock",)),
        (Kit, (1, "y"), "DELETE FROM kit WHERE b = 'y'", change, ()),
        (Dog, 1, "UPDATE dog SET tricks = 5", lambda dog: setattr(dog, "name", "Max"), ("tricks",)),
        (Dog, 1, "UPDATE animal SET name = 'Bob' WHERE id = 1", lambda dog: setattr(dog, "tricks", 2), ("name",)),
        (Animal, 1, "UPDATE animal SET name = 'Bob' WHERE id = 1", lambda dog: setattr(dog, "tricks", 2), ("name",)),
        (Cat, 2, "UPDATE animal SET weight = 9 WHERE id = 2", lambda cat: setattr(cat, "name", "Kit"), ("weight",)),
        (Odd, 1, "UPDATE odd SET exact = 0", change, ("exact",)),
        (Odd, 1, "UPDATE odd SET plain = '{}'", change, ("plain",)),
    ],
)
def test_a_row_that_is_another_on_the_writer_is_not_written(
    cluster: Cluster[Any], router: Router, cls: type[Any], key: Any, happens: str, does: Any, columns: tuple[str, ...]
) -> None:
    with sessions(router)() as s:
        found = s.get_one(cls, key)
        assert place(s) == "reader"
        on_the_writer(cluster, happens)
        if does == "delete":
            s.delete(found)
        else:
            does(found)
        with pytest.raises(StaleRead) as caught:
            s.commit()
    assert caught.value.entity == type(found).__name__
    assert caught.value.key == (key if isinstance(key, tuple) else (key,))
    assert caught.value.columns == columns


def test_a_difference_in_what_was_not_loaded_is_none(cluster: Cluster[Any], router: Router) -> None:
    on_the_writer(cluster, "UPDATE item SET name = 'x'", "UPDATE odd SET essay = 'longer'")
    with sessions(router)() as s:
        s.scalars(select(Item).where(Item.id == 1).options(load_only(Item.stock))).one().stock += 1
        s.get_one(Odd, 1).stock += 1
        item = s.get_one(Item, 2, options=[load_only(Item.stock)])
        item.name = "set, and never seen"
        s.commit()
    assert cluster.execute("SELECT name, stock FROM item WHERE id < 3 ORDER BY id") == [("x", 11), ("set, and never seen", 20)]
    with replaying(cluster):
        pass
    on_the_writer(cluster, "UPDATE odd SET essay = 'longest'")
    with sessions(router)() as s:
        odd = s.get_one(Odd, 1)
        assert odd.essay == "longer"
        odd.stock += 1
        with pytest.raises(StaleRead, match="essay"):
            s.flush()


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("real", 0.1 + 0.2),
        ("exact", Decimal("1.10")),
        ("raw", b"\x00\xff"),
        ("moment", datetime(2024, 2, 29, 12)),
        ("thing", Thing()),
        ("opaque", Opaque("word")),
        ("plain", {"b": [1, {"c": None}], "a": 1.5}),
        ("plain", None),
        ("tracked", {"n": [1, 2]}),
    ],
)
def test_values_that_are_hard_to_compare_are_found_equal(cluster: Cluster[Any], router: Router, column: str, value: Any) -> None:
    """Values that are hard to compare are the same if they have not changed."""
    with replaying(cluster), sessions(router)() as s:
        s.execute(update(Odd).values({column: value}))
        s.commit()
    with sessions(router)() as s:
        odd = shown(s, Odd, 1)
        odd.stock += 1
        s.commit()


@POSTGRESQL
@pytest.mark.parametrize(
    ("column", "value"),
    [("real", float("nan")), ("exact", Decimal("NaN")), ("reals", [1.0, float("nan"), 3.0]), ("reals", [])],
)
def test_values_only_postgresql_has_are_found_equal(cluster: Cluster[Any], router: Router, column: str, value: Any) -> None:
    """Values that only PostgreSQL has are the same if they have not changed."""
    test_values_that_are_hard_to_compare_are_found_equal(cluster, router, column, value)


@pytest.mark.parametrize("column", ["sealed", "filled_elsewhere", "opaques"])
def test_values_that_nothing_can_compare_are_no_stale_read(cluster: Cluster[Any], router: Router, column: str) -> None:
    """A value that differs from itself when read twice proves nothing. The columns beside it are compared, and so is NULL."""
    with replaying(cluster):
        on_the_writer(cluster, f"UPDATE odd SET {column} = 'word'")
    for stale in (None, f"UPDATE odd SET {column} = NULL", f"UPDATE odd SET {column} = 'word', stock = 7"):
        with sessions(router)() as s:
            odd = s.get_one(Odd, 1)
            assert place(s) == "reader"
            odd.plain = {"n": 2}
            if stale is None:
                s.flush()
                continue
            on_the_writer(cluster, stale)
            with pytest.raises(StaleRead, match="stock" if "stock" in stale else column):
                s.flush()


def set_a_member(odd: Odd) -> None:
    assert odd.plain is not None
    odd.plain["n"] = 2


def set_the_changed_value_again(odd: Odd) -> None:
    value = odd.plain
    assert value is not None
    value["n"] = 2
    odd.plain = value


def replace_the_changed_value(odd: Odd) -> None:
    set_a_member(odd)
    odd.plain = {"n": 3}


def append_to_a_pickled_list(odd: Odd) -> None:
    odd.thing.append(2)


def append_to_a_list(odd: Odd) -> None:
    assert odd.reals is not None
    odd.reals.append(2.0)


def append_below_a_tracked_value(odd: Odd) -> None:
    assert odd.tracked is not None
    odd.tracked["n"].append(2)


@pytest.mark.parametrize("refreshed", [False, True], ids=["", "refreshed"])
@pytest.mark.parametrize(
    "change",
    [
        *(set_a_member, set_the_changed_value_again, replace_the_changed_value),
        *(append_to_a_pickled_list, append_to_a_list, append_below_a_tracked_value),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_value_changed_unseen_is_no_change_by_others(
    cluster: Cluster[Any], router: Router, change: Callable[[Odd], None], refreshed: bool
) -> None:
    """The guard takes no change in place, which SQLAlchemy does not see, for one by others. It compares the other columns."""
    with replaying(cluster), sessions(router)() as s:
        s.execute(update(Odd).values(thing=[1], reals=[1.0], tracked={"n": [1]}))
        s.commit()
    for stale in (False, True):
        with sessions(router)() as s:
            odd = shown(s, Odd, 1)
            if refreshed:
                s.refresh(odd)
            change(odd)
            odd.stock += 1
            if stale:
                on_the_writer(cluster, "UPDATE odd SET raw = 'x'")
                with pytest.raises(StaleRead, match="raw"):
                    s.flush()
            else:
                s.flush()


@pytest.mark.parametrize("refreshed", [False, True], ids=["", "refreshed"])
@pytest.mark.parametrize("column", ["plain", "reals", "tracked", "thing"])
def test_a_value_that_others_have_changed_is_found(cluster: Cluster[Any], router: Router, column: str, refreshed: bool) -> None:
    """A value that could be changed in place, and was not, is compared."""
    with replaying(cluster), sessions(router)() as s:
        s.execute(update(Odd).values({column: {"n": 1} if column in ("plain", "tracked") else [1.0]}))
        s.commit()
    with sessions(router)() as s, sessions(router)() as other:
        odd = shown(s, Odd, 1)
        if refreshed:
            s.refresh(odd)
        other.execute(update(Odd).values({column: {"n": 2} if column in ("plain", "tracked") else [2.0]}))
        other.commit()
        odd.stock += 1
        with pytest.raises(StaleRead, match=column):
            s.flush()


def test_a_column_changed_in_place_is_not_compared(cluster: Cluster[Any], router: Router) -> None:
    """A column that was changed in place is not compared, and the columns beside it are."""
    with sessions(router)() as s:
        odd = s.get_one(Odd, 1)
        odd.tracked["n"] = 2
        s.commit()
        assert s.scalar(select(Odd.tracked)) == {"n": 2}
    with sessions(router)() as s:
        odd = s.get_one(Odd, 1)
        odd.tracked["n"] = 3
        on_the_writer(cluster, "UPDATE odd SET stock = 7")
        with pytest.raises(StaleRead):
            s.commit()


@BOTH
@pytest.mark.parametrize("kind", [Tagged, Numbered])
def test_a_key_may_be_given_as_another_type(cluster: Cluster[Any], make_router: MakeRouter, kind: Any) -> None:
    """A UUID or a number set as a str stays the row's key after a reader has shown the row."""
    router = make_router(cluster.url, instances=[cluster.readers[0].address])
    until_readers_serve(router, 1)
    tag: Any = uuid.uuid4()
    if family_of(cluster) == "postgresql":  # elsewhere SQLAlchemy 2.0 takes no str for a UUID
        tag = str(tag)
    key = {"id": tag, "number": "7"} if kind is Tagged else {"id": "7"}
    with sessions(router)() as s:
        instance = kind(**key)
        s.add(instance)
        s.commit()
        cluster.wait_in_sync()
        for name in ("first", "second"):

            def on_a_reader() -> bool:
                s.rollback()
                assert instance.name
                return place(s) == "reader"

            eventually(on_a_reader)
            instance.name = name
            s.commit()
        assert instance.name == "second"


@BOTH
@pytest.mark.parametrize("keys", [("007",), ("007", "0008"), ("007", "0008", "9")], ids=len)
def test_a_key_may_be_spelled_in_another_way(cluster: Cluster[Any], make_router: MakeRouter, keys: tuple[Any, ...]) -> None:
    """Objects are compared with their own rows if the server spells their keys otherwise. Only a row that is gone is stale."""
    router = make_router(cluster.url, instances=[cluster.readers[0].address])
    until_readers_serve(router, 1)
    with sessions(router)() as s:
        instances = [Numbered(id=key) for key in keys]
        s.add_all(instances)
        s.commit()
        cluster.wait_in_sync()

        def on_a_reader() -> bool:
            s.rollback()
            assert all(instance.name for instance in instances)
            return place(s) == "reader"

        for name in ("first", "second"):
            eventually(on_a_reader)
            for instance in instances:
                instance.name = name
            s.commit()
        assert {instance.name for instance in instances} == {"second"}
        eventually(on_a_reader)
        on_the_writer(cluster, f"DELETE FROM keyed WHERE id = {int(keys[-1])}")
        for instance in instances:
            instance.name = "third"
        with pytest.raises(StaleRead) as caught:
            s.commit()
        assert (*map(int, caught.value.key), caught.value.columns) == (int(keys[-1]), ())
        assert "more" not in str(caught.value)


@POSTGRESQL
@pytest.mark.parametrize("spell", [lambda key: key.hex, lambda key: str(key).upper()], ids=["hex", "upper case"])
def test_uuids_may_be_spelled_in_another_way(
    cluster: Cluster[Any], make_router: MakeRouter, spell: Callable[[uuid.UUID], str]
) -> None:
    """Several objects whose UUIDs the server spells otherwise are compared with their own rows."""
    router = make_router(cluster.url, instances=[cluster.readers[0].address])
    until_readers_serve(router, 1)
    with sessions(router)() as s:
        instances = [Spelled(id=spell(uuid.uuid4()), note=note) for note in ("a", "b", "c")]
        s.add_all(instances)
        s.commit()
        cluster.wait_in_sync()

        def on_a_reader() -> bool:
            s.rollback()
            assert [instance.note.strip() for instance in instances] == ["a", "b", "c"]
            return place(s) == "reader"

        eventually(on_a_reader)
        for instance in instances:
            instance.note += "!"
        s.commit()
