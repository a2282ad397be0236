"""Objects that only the flush or a listener finds to be changed are checked, and rows are locked in the flush's order."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from sqlalchemy import ForeignKey, event, select
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from aurora_router import Router, RoutingSession, StaleRead
from aurora_router.local import FaultProxy
from aurora_router.local.cluster import Cluster
from tests.integration.shop import BOTH, Item, eventually, sessions
from tests.integration.shop import engine as engine_of
from tests.integration.stale_writes.helpers import on_the_writer, raises_stale, replaying, sent, shown
from tests.integration.stale_writes.models import Box, Kit, Line, Loose, Purchase, Shelf, Shelved

pytestmark = BOTH


POSTGRESQL = pytest.mark.engines("postgresql")


def test_a_child_that_only_the_flush_finds_changed_is_checked(cluster: Cluster[Any], router: Router) -> None:
    """A child that only the flush finds to be changed is checked as well."""
    on_the_writer(cluster, "UPDATE line SET note = 'another'")
    with sessions(router)() as s:
        purchase = s.get_one(Purchase, 1)
        purchase.lines.append(s.get_one(Line, 1))
        with raises_stale("Line", 1):
            s.commit()


@pytest.mark.parametrize("flushes", [1, 3])
def test_a_changed_primary_key_takes_two_runs_at_most(cluster: Cluster[Any], router: Router, flushes: int) -> None:
    """Rows that the unit's own UPDATE changes by ON UPDATE CASCADE are not found stale one after the other."""
    runs: list[int] = []

    def rename(s: RoutingSession) -> None:
        runs.append(len(runs))
        boxes = s.scalars(select(Box).order_by(Box.id)).all()
        s.get_one(Shelf, "old").name = "new"
        s.flush()
        for box in boxes:
            box.weight += 1
            if flushes == 3:
                s.flush()

    router.run_transaction(sessions(router), rename)
    assert len(runs) <= 2
    assert cluster.execute("SELECT shelf_name, weight FROM box") == [("new", 1)] * 3


def test_children_of_a_changed_primary_key_are_not_stale(cluster: Cluster[Any], router: Router) -> None:
    """Children that the relationship knows are looked up before the database carries the key over to them."""
    with sessions(router)() as s:
        shelf = s.get_one(Shelf, "old")
        boxes = [*shelf.boxes]
        shelf.name = "new"
        s.flush()
        for box in boxes:
            box.weight += 1
        s.commit()
    assert cluster.execute("SELECT shelf_name, weight FROM box") == [("new", 1)] * 3


def test_changes_of_a_before_flush_listener_are_checked(cluster: Cluster[Any], router: Router) -> None:
    """An object that a listener changes before the flush is checked as well."""
    on_the_writer(cluster, "UPDATE item SET stock = 50 WHERE id = 2")
    with sessions(router)() as s:
        first, second = s.get_one(Item, 1), s.get_one(Item, 2)

        @event.listens_for(s, "before_flush")
        def also(*_: Any) -> None:
            second.name = "changed"

        first.name = "changed"
        with raises_stale("Item", 2):
            s.flush()


@POSTGRESQL
def test_the_lock_stands_in_nobodys_way_who_refers_to_the_row(cluster: Cluster[Any], router: Router) -> None:
    with sessions(router)() as s, cluster.writer.connect(autocommit=True) as other:
        other.execute("SET lock_timeout = '1s'")
        s.get_one(Item, 1).stock += 1
        s.flush()
        other.execute("INSERT INTO part VALUES (9, 1, 'while it is locked')")
        with pytest.raises(Exception, match=r"(?i)lock (wait )?timeout"):
            other.execute("UPDATE item SET stock = 0 WHERE id = 1")
        s.commit()


def test_a_mapper_of_rows_that_cannot_be_locked_is_left_alone(proxy: FaultProxy, router: Router) -> None:
    """A mapper whose rows cannot be locked is left alone."""

    with sessions(router)() as s:
        s.scalars(select(Loose).where(Kit.b == "x")).one().stock += 1
        assert sent(proxy, s.commit) == ["UPDATE", "COMMIT"]


SHELVED = (
    "DROP TABLE shelved",
    "CREATE VIEW shelved AS SELECT shelf_name AS name, sum(weight)::int AS weight FROM box GROUP BY shelf_name",
    "CREATE OR REPLACE FUNCTION extra.shelve() RETURNS trigger LANGUAGE plpgsql AS "
    "'BEGIN UPDATE box SET weight = weight + NEW.weight - OLD.weight WHERE id = 1; RETURN NEW; END'",
    "CREATE TRIGGER shelve INSTEAD OF UPDATE ON shelved FOR EACH ROW EXECUTE FUNCTION extra.shelve()",
)


@POSTGRESQL
@pytest.mark.parametrize("wrote", [False, True], ids=["first", "after a write"])
def test_a_view_that_cannot_be_locked_is_compared(cluster: Cluster[Any], router: Router, wrote: bool) -> None:
    """The rows of a view with GROUP BY are read without a lock, and the unit's earlier writes are kept."""
    with replaying(cluster):
        on_the_writer(cluster, *SHELVED)
    try:
        with sessions(router)() as s:
            shelved = shown(s, Shelved, "old")
            if wrote:
                s.add(Line(id=10, note="new"))
                s.flush()
            shelved.weight += 1
            s.get_one(Item, 1).stock += 1
            s.commit()
        assert cluster.execute("SELECT weight FROM shelved") == [(1,)]
        assert cluster.execute("SELECT count(*) FROM line WHERE id = 10") == [(int(wrote),)]

        def add(s: RoutingSession) -> None:
            s.get_one(Shelved, "old").weight += 1

        router.run_transaction(sessions(router), add)  # its first attempt reads a stale row
        assert cluster.execute("SELECT weight FROM shelved") == [(2,)]
    finally:
        on_the_writer(cluster, "DROP VIEW shelved", "CREATE TABLE shelved (name text)")


def test_rows_are_locked_in_the_order_of_the_flush(cluster: Cluster[Any], router: Router) -> None:
    """Rows are locked in the order in which a flush writes them."""

    class Named(DeclarativeBase):
        """A base of classes whose names come in another order than their tables."""

    class Whole(Named):
        __tablename__ = "item"
        id: Mapped[int] = mapped_column(primary_key=True)
        name: Mapped[str]
        stock: Mapped[int]

    class Bit(Named):
        __tablename__ = "part"
        id: Mapped[int] = mapped_column(primary_key=True)
        item_id: Mapped[int] = mapped_column(ForeignKey(Whole.id))
        name: Mapped[str]

    status = "SELECT 1 FROM {}.global_status WHERE variable_name = 'Innodb_row_lock_current_waits' AND variable_value > 0"
    waiting = {
        "postgresql": "SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock'",
        "mariadb": status.format("information_schema"),
        "mysql": status.format("performance_schema"),
    }
    with sessions(router)() as s, sessions(router)(read_only=False) as other:
        mine = s.get_one(Whole, 1), s.get_one(Bit, 1)
        mine[0].name = mine[1].name = "mine"
        theirs = other.get_one(Whole, 1), other.get_one(Bit, 1)
        theirs[0].name = "theirs"
        other.flush()
        raised: list[BaseException | None] = []

        def commit() -> None:
            with pytest.raises(StaleRead) as caught:
                s.commit()
            raised.append(caught.value)

        thread = threading.Thread(target=commit)
        thread.start()
        eventually(lambda: cluster.execute(waiting[engine_of(cluster)]))
        theirs[1].name = "theirs"
        other.commit()
        thread.join()
    assert raised, "and neither was the victim of a deadlock"
