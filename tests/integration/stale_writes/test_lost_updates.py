"""Stale reads lose no updates, because rows of a reader are looked up on the writer before they are written."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import func, select, text, update
from tenacity import stop_after_attempt

from aurora_router import (
    ConfigurationError,
    Failure,
    ReadOnlyViolation,
    Reason,
    Router,
    RoutingSession,
    StaleRead,
    classify_error,
)
from aurora_router.core import events
from aurora_router.local import FaultProxy
from aurora_router.local.cluster import Cluster
from tests.integration.shop import BOTH, Item, place, sessions, stock, until_readers_serve
from tests.integration.shop import family as family_of
from tests.integration.stale_writes.helpers import LOOK, MakeRouter, marked, on_the_writer, replaying, sent, shown
from tests.integration.stale_writes.models import Line, Purchase

pytestmark = BOTH


@pytest.mark.parametrize("guarded", [False, True], ids=["guard off", "guard on"])
def test_the_guard_keeps_increments_that_late_readers_lose(cluster: Cluster[Any], make_router: MakeRouter, guarded: bool) -> None:
    """Increments of values from a late reader are all there with the guard, and some are lost without it."""
    for reader in cluster.readers:
        cluster.set_lag(reader, 0.3)
    router = make_router(stale_write_guard=guarded)
    until_readers_serve(router, 2)
    Session = sessions(router)
    errors: list[BaseException] = []

    def increment(s: RoutingSession, number: int) -> None:
        s.get_one(Item, number).stock += 1

    def work(number: int) -> None:
        try:
            for turn in range(10):
                router.run_transaction(Session, lambda s, n=turn: increment(s, (number + n) % 3 + 1))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    ((total,),) = cluster.execute("SELECT sum(stock) FROM item")
    if guarded:
        assert total == 60 + 80
    else:
        assert total < 60 + 80


def test_a_unit_that_read_stale_rows_is_run_again_on_the_writer(
    cluster: Cluster[Any], router: Router, heard: list[events.Event]
) -> None:
    on_the_writer(cluster, "UPDATE item SET stock = 50 WHERE id = 1")
    seen: list[tuple[int, str]] = []

    def increment(s: RoutingSession) -> None:
        item = s.get_one(Item, 1)
        seen.append((item.stock, place(s)))
        item.stock += 1

    heard.clear()
    router.run_transaction(sessions(router), increment)
    assert seen == [(10, "reader"), (50, "writer")]
    assert stock(cluster) == 51
    assert [e.error for e in heard if isinstance(e, events.RunAgain)] == ["StaleRead"]
    assert [e.reason for e in heard if isinstance(e, events.Routed)][-1] is Reason.STALE_READ
    assert not [e for e in heard if isinstance(e, events.RetriesRefused)]


IMPATIENT = {"postgresql": "SET lock_timeout = '50ms'", "mysql": "SET innodb_lock_wait_timeout = 1"}


def test_stale_rows_are_locked_before_the_unit_runs_again(cluster: Cluster[Any], proxy: FaultProxy, router: Router) -> None:
    """Rows that were read stale are locked before the unit runs again.

    So the second attempt succeeds, and has nothing to check.
    """
    on_the_writer(cluster, "UPDATE item SET stock = 50")
    runs: list[int] = []

    def increment(s: RoutingSession) -> None:
        items = s.scalars(select(Item).where(Item.id < 3).order_by(Item.id)).all()
        runs.append(items[0].stock)
        if len(runs) == 2:
            with cluster.writer.connect(autocommit=True) as other:
                cursor = other.cursor()
                cursor.execute(IMPATIENT[family_of(cluster)])
                with pytest.raises(Exception, match=r"(?i)lock (wait )?timeout"):
                    cursor.execute("UPDATE item SET stock = 99 WHERE id = 2")
        for item in items:
            item.stock += 1

    texts = sent(proxy, lambda: router.run_transaction(sessions(router), increment, commit_check=None))
    assert runs == [10, 50]
    assert texts == [LOOK, "ROLLBACK", LOOK, "SELECT", "UPDATE", "COMMIT"]
    assert cluster.execute("SELECT stock FROM item ORDER BY id") == [(51,), (51,), (50,)]


def test_an_attempt_that_takes_another_way_loses_nothing(cluster: Cluster[Any], router: Router) -> None:
    """An attempt that takes another way the second time loses nothing either."""
    on_the_writer(cluster, "UPDATE item SET stock = 50 WHERE id = 1")
    runs: list[int] = []

    def increment(s: RoutingSession) -> None:
        runs.append(len(runs) + 1)
        item = s.get_one(Item, min(runs[-1], 2))
        before = item.stock
        if runs[-1] == 2:
            on_the_writer(cluster, "UPDATE item SET stock = 60 WHERE id = 2")
        item.stock = before + 1

    router.run_transaction(sessions(router), increment)
    assert runs == [1, 2, 3]
    assert cluster.execute("SELECT stock FROM item WHERE id < 3 ORDER BY id") == [(50,), (61,)]


def test_a_units_own_trigger_changes_do_not_retry_for_ever(cluster: Cluster[Any], router: Router) -> None:
    """Changes by the unit's own statements and triggers are not taken for those of others for ever."""
    runs: list[int] = []

    def order(s: RoutingSession) -> None:
        purchase = s.get_one(Purchase, 1)
        runs.append(purchase.total)
        s.add(Line(id=10 + len(runs), order_id=1, note=""))
        s.flush()  # the trigger changes the total
        purchase.state = "paid"

    router.run_transaction(sessions(router), order)
    assert runs == [0, 0]
    assert cluster.execute("SELECT total, state FROM purchase") == [(1, "paid")]


def by_trigger(s: RoutingSession, number: int) -> None:
    s.add(Line(id=10 * number + len(s.scalars(select(Line)).all()), order_id=number, note=""))
    s.flush()


def by_text(s: RoutingSession, number: int) -> None:
    s.execute(text("UPDATE purchase SET total = total + 1 WHERE id = :id"), {"id": number})


def by_update(s: RoutingSession, number: int) -> None:
    raised = update(Purchase).where(Purchase.id == number).values(total=Purchase.total + 1)
    s.execute(raised, execution_options={"synchronize_session": False})


@pytest.mark.parametrize("all_at_once", [False, True], ids=["each when needed", "all at once"])
@pytest.mark.parametrize("change", [by_trigger, by_text, by_update], ids=lambda value: value.__name__)
def test_own_changes_take_two_runs_however_many_rows(
    cluster: Cluster[Any], router: Router, change: Callable[[RoutingSession, int], None], all_at_once: bool
) -> None:
    """A loop that changes rows of several classes without their objects, and then the objects, takes two attempts at most."""
    with replaying(cluster):
        on_the_writer(cluster, *(f"INSERT INTO purchase VALUES ({number}, 0, 'open')" for number in (2, 3, 4)))
    runs: list[int] = []

    def order(s: RoutingSession) -> None:
        runs.append(1)
        items = s.scalars(select(Item).where(Item.id < 3).order_by(Item.id)).all() if all_at_once else []
        kept = s.scalars(select(Purchase)).all() if all_at_once else []
        for number in (1, 2, 3, 4):
            purchase = s.get_one(Purchase, number)
            change(s, number)
            purchase.state = "paid"
            s.flush()
        for number, item in enumerate(items, 1):
            s.execute(text("UPDATE item SET stock = stock + 1 WHERE id = :id"), {"id": number})
            item.name = "sold"
            s.flush()
        assert len(kept) in (0, 4)

    router.run_transaction(sessions(router), order)
    assert len(runs) == 2
    assert cluster.execute("SELECT total, state FROM purchase") == [(1, "paid")] * 4
    if all_at_once:
        assert cluster.execute("SELECT stock, name FROM item WHERE id < 3 ORDER BY id") == [(11, "sold"), (21, "sold")]


def test_an_object_kept_from_the_first_attempt_is_checked(cluster: Cluster[Any], router: Router) -> None:
    """A further attempt checks what a reader has shown to an earlier one, even after it has written."""
    with sessions(router)() as s:
        kept = shown(s, Item, 2)
    on_the_writer(cluster, "UPDATE item SET stock = 50 WHERE id < 3")
    runs: list[int] = []

    def increment(s: RoutingSession) -> None:
        runs.append(1)
        s.get_one(Item, 1).stock += 1
        s.flush()
        if kept not in s:
            s.add(kept)
        kept.stock += 1

    with pytest.raises(StaleRead, match="Item"):
        router.run_transaction(sessions(router), increment, stop=stop_after_attempt(2))
    assert len(runs) == 2
    assert cluster.execute("SELECT stock FROM item WHERE id < 3 ORDER BY id") == [(50,), (50,)]


def test_a_trigger_in_a_flush_may_change_checked_rows(cluster: Cluster[Any], router: Router) -> None:
    """A trigger of the same flush may change rows that have been checked already."""
    with sessions(router)() as s:
        purchase = s.get_one(Purchase, 1)
        s.add(Line(id=10, order_id=1, note=""))
        purchase.state = "paid"
        s.commit()
    assert cluster.execute("SELECT total, state FROM purchase") == [(1, "paid")]


def test_the_error_names_what_was_stale_and_no_value(cluster: Cluster[Any], router: Router) -> None:
    on_the_writer(cluster, "UPDATE item SET stock = 4711, name = 'secret'")
    with sessions(router)() as s:
        for item in s.scalars(select(Item).order_by(Item.id)):
            item.stock = 815
        with pytest.raises(StaleRead, match=r"object of Item \(and 2 more\) .*name, stock .*run_transaction") as caught:
            s.flush()
        assert not any(value in str(caught.value) for value in ("4711", "815", "secret"))
        known = classify_error(caught.value)
        assert known == (Failure.SERIALIZATION, True, True, True)
        with pytest.raises(Exception, match="rolled back"):
            s.scalar(select(Item.stock))
        s.rollback()
        assert s.get_one(Item, 1).stock == 4711, "the session goes on, and reads nothing any more that is as old as that"


def test_a_unit_that_swallows_it_is_run_again_all_the_same(cluster: Cluster[Any], router: Router) -> None:
    on_the_writer(cluster, "UPDATE item SET stock = 50 WHERE id = 1")

    def swallows(s: RoutingSession) -> None:
        s.get_one(Item, 1).stock += 1
        try:
            s.flush()
        except StaleRead:
            return

    router.run_transaction(sessions(router), swallows)
    assert stock(cluster) == 51


def test_a_stale_read_in_a_savepoint_undoes_the_savepoint(cluster: Cluster[Any], router: Router) -> None:
    with sessions(router)() as s, s.begin():
        item = s.get_one(Item, 1)
        on_the_writer(cluster, "UPDATE item SET stock = 50 WHERE id = 1")
        s.add(Item(id=9))
        with pytest.raises(StaleRead), s.begin_nested():
            item.stock += 1
        assert item.stock == 50, "expired, and read on the writer"
        assert not marked(item)
        item.stock += 1
    assert cluster.execute("SELECT id, stock FROM item WHERE id IN (1, 9) ORDER BY id") == [(1, 51), (9, 0)]


def test_what_changes_before_a_savepoint_is_checked_as_it_begins(cluster: Cluster[Any], router: Router) -> None:
    with sessions(router)() as s:
        item = s.get_one(Item, 1)
        on_the_writer(cluster, "UPDATE item SET stock = 50 WHERE id = 1")
        item.stock += 1
        with pytest.raises(StaleRead):
            s.begin_nested()


def test_a_unit_that_began_with_a_savepoint_is_run_again(cluster: Cluster[Any], router: Router) -> None:
    """A unit that began with a savepoint is run again with its rows locked."""
    on_the_writer(cluster, "UPDATE item SET stock = 50 WHERE id = 1")
    runs: list[int] = []

    def nested(s: RoutingSession) -> None:
        item = None if runs else s.get_one(Item, 1)
        runs.append(1)
        with s.begin_nested():
            (item or s.get_one(Item, 1)).stock += 1

    router.run_transaction(sessions(router), nested)
    assert len(runs) == 2
    assert stock(cluster) == 51


def test_an_autoflush_is_checked(cluster: Cluster[Any], router: Router) -> None:
    with sessions(router)() as s:
        s.get_one(Item, 1).stock += 1
        on_the_writer(cluster, "UPDATE item SET stock = 50 WHERE id = 1")
        with pytest.raises(StaleRead):
            s.scalar(select(func.count()).select_from(Item))


def test_a_declared_read_only_unit_marks_and_writes_nothing(cluster: Cluster[Any], router: Router) -> None:
    """A unit that is declared read-only may not write, and marks nothing."""
    with sessions(router, read_only=True)() as s:
        item = s.get_one(Item, 1)
        assert place(s) == "reader"
        assert not marked(item)
        item.stock += 1
        with pytest.raises(ReadOnlyViolation):
            s.flush()
    with sessions(router)() as s:
        item = s.get_one(Item, 1)
    with sessions(router, read_only=True)() as s:
        s.add(item)
        s.refresh(item)
        assert marked(item), "still a reader's"
        item.stock += 1
        with pytest.raises(ReadOnlyViolation):
            s.flush()


def test_the_guard_is_on_or_off(make_router: MakeRouter) -> None:
    with pytest.raises(ConfigurationError, match="stale_write_guard"):
        make_router(stale_write_guard=1)
