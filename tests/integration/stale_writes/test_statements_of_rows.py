"""UPDATE, DELETE and bulk statements of the ORM, and the objects whose rows they change."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import bindparam, delete, event, literal_column, text, update
from sqlalchemy.exc import PendingRollbackError
from sqlalchemy.orm import ORMExecuteState

from aurora_router import Router, RoutingSession
from aurora_router.local import FaultProxy
from aurora_router.local.cluster import Cluster
from aurora_router.router import core_of
from tests.integration.shop import BOTH, Item, Part, sessions, stock
from tests.integration.stale_writes.helpers import on_the_writer, raises_stale, sent, shown
from tests.integration.stale_writes.models import Base, Box, Line

pytestmark = BOTH


@pytest.mark.parametrize("how", ["evaluate", "fetch"])
def test_an_update_of_rows_shows_the_values_of_the_writer(cluster: Cluster[Any], router: Router, how: str) -> None:
    """What an UPDATE has set is read again, not computed from a reader's values. It does not count as reading the rest."""
    on_the_writer(cluster, "UPDATE item SET stock = 50 WHERE id = 2")
    with sessions(router)() as s:
        first, second = s.get_one(Item, 1), s.get_one(Item, 2)
        on_the_writer(cluster, "UPDATE item SET name = 'new' WHERE id = 1")
        s.execute(update(Item).values(stock=Item.stock + 1), execution_options={"synchronize_session": how})
        assert (first.stock, second.stock) == (11, 51)
        second.stock += 1
        s.flush()
        first.stock += 1
        with raises_stale("Item", 1):
            s.flush()


def delete_by_query(s: RoutingSession) -> None:
    s.query(Item).filter(Item.stock == 10).delete()


def delete_by_statement(s: RoutingSession) -> None:
    s.execute(delete(Item).where(Item.stock == 10))


@pytest.mark.parametrize("work", [delete_by_query, delete_by_statement])
def test_a_delete_of_rows_takes_the_objects_of_those_rows(
    cluster: Cluster[Any], proxy: FaultProxy, router: Router, work: Callable[[RoutingSession], None]
) -> None:
    """A DELETE with a WHERE removes the objects whose rows the writer has deleted, not those that a late reader shows so."""
    on_the_writer(cluster, "UPDATE item SET stock = stock - 10", "DELETE FROM part")
    with sessions(router)() as s:
        first, second = s.get_one(Item, 1), s.get_one(Item, 2)
        work(s)
        assert first in s
        assert second not in s
    with sessions(router)() as s:
        assert sent(proxy, lambda: work(s)) == ["DELETE"], "without objects there is nothing to ask"


def test_an_update_of_rows_reaches_the_objects_of_those_rows(cluster: Cluster[Any], router: Router) -> None:
    """An UPDATE with a WHERE is carried over to the objects whose rows the writer has changed."""
    on_the_writer(cluster, "UPDATE item SET stock = stock - 10")
    with sessions(router)() as s:
        first, second = s.get_one(Item, 1), s.get_one(Item, 2)
        s.execute(update(Item).where(Item.stock == 10).values(name="sold"))
        assert (first.name, second.name) == ("one", "sold")


@pytest.mark.engines("postgresql", "mariadb")
@pytest.mark.parametrize("every", [literal_column("*"), text("*")], ids=["literal", "text"])
def test_a_delete_of_rows_may_return_any_columns(router: Router, every: Any) -> None:
    """A DELETE returns what it returns to a plain session, also if only the server knows the columns."""
    with sessions(router)() as s:
        item = s.get_one(Item, 3)
        s.execute(delete(Part))
        returned = s.execute(delete(Item).where(Item.id == 3).returning(every)).all()
        assert returned == [(3, "three", 30)]
        assert item not in s


def test_a_statement_of_a_table_may_name_attributes(cluster: Cluster[Any], router: Router) -> None:
    """Core's UPDATE and DELETE of a table may have a WHERE of the ORM's, with one set of parameters or several."""
    table = Base.metadata.tables["line"]
    with sessions(router)() as s:
        shown(s, Line, 1)
        s.execute(update(table).where(Line.id == 1).values(note="one"))
        s.execute(update(table).where(Line.id == bindparam("number")).values(note=bindparam("to")), [{"number": 2, "to": "two"}])
        s.execute(delete(table).where(Line.id == 3))
        s.commit()
    assert cluster.execute("SELECT id, note FROM line ORDER BY id") == [(1, "one"), (2, "two")]


def save_in_bulk(s: RoutingSession, item: Item) -> None:
    item.stock += 1
    s.bulk_save_objects(iter([item]))


def update_in_bulk(s: RoutingSession, item: Item) -> None:
    s.bulk_update_mappings(Item, ({"id": item.id, "stock": item.stock + 1} for _ in range(1)))
    item.name = "sold"


def update_by_key(s: RoutingSession, item: Item) -> None:
    s.execute(update(Item), [{"id": item.id, "stock": item.stock + 1}])
    s.flush()
    item.name = "sold"


BULK = pytest.mark.parametrize("write", [save_in_bulk, update_in_bulk, update_by_key])


@BULK
def test_a_bulk_statement_makes_no_object_stale(
    cluster: Cluster[Any], router: Router, write: Callable[[RoutingSession, Item], None]
) -> None:
    """The writes of the unit's own bulk statement are not taken for those of another unit."""
    with sessions(router)() as s:
        write(s, s.get_one(Item, 1))
        s.commit()
    assert stock(cluster) == 11
    runs: list[int] = []

    def work(s: RoutingSession) -> None:
        runs.append(len(runs))
        write(s, s.get_one(Item, 2))

    router.run_transaction(sessions(router), work)
    assert runs == [0]


@BULK
def test_a_bulk_statement_checks_what_a_reader_has_shown(
    cluster: Cluster[Any], router: Router, write: Callable[[RoutingSession, Item], None]
) -> None:
    """The objects of a bulk statement, or of the rows it names, are looked up before they are written."""
    on_the_writer(cluster, "UPDATE item SET stock = 50 WHERE id = 1")
    with sessions(router)() as s:
        item = s.get_one(Item, 1)
        with raises_stale("Item", 1):
            write(s, item)
        # The error of update_by_key is that of a statement, after which the transaction may go on.
        if write is not update_by_key:
            with pytest.raises(PendingRollbackError):
                s.commit()
    router.run_transaction(sessions(router), lambda s: write(s, s.get_one(Item, 1)))
    assert stock(cluster) == 51


def test_a_listener_may_read_before_a_bulk_statement(cluster: Cluster[Any], router: Router) -> None:
    """A listener's read on a reader does not use up the check of the objects."""
    on_the_writer(cluster, "UPDATE item SET stock = 50 WHERE id = 1")

    def read(state: ORMExecuteState) -> None:
        if state.is_update:
            state.session.get(Item, 2)

    with sessions(router)() as s:
        item = s.get_one(Item, 1)
        event.listen(s, "do_orm_execute", read)
        with raises_stale("Item", 1):
            update_by_key(s, item)


@pytest.mark.parametrize("in_bulk", [True, False])
def test_an_object_is_checked_beside_those_of_another_cluster(cluster: Cluster[Any], router: Router, in_bulk: bool) -> None:
    """Objects of another router's cluster that are written first do not use up the check of the others."""
    on_the_writer(cluster, "UPDATE box SET weight = 50 WHERE id = 1")
    with Router(cluster.url) as another, sessions(router, binds={Item: core_of(another).writer_engine()})() as s:
        box, item = s.get_one(Box, 1), s.get_one(Item, 1)
        box.weight += 1
        item.stock += 1
        with raises_stale("Box", 1):
            if in_bulk:
                s.bulk_save_objects([item, box])
            s.flush()
    assert cluster.execute("SELECT weight FROM box WHERE id = 1") == [(50,)]
