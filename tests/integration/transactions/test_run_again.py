"""run_transaction runs a unit again if it cannot have taken effect, and raises every other error untouched."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
from sqlalchemy import create_engine, insert, text, update
from sqlalchemy.exc import DBAPIError, IntegrityError, OperationalError
from sqlalchemy.orm import Session as PlainSession
from sqlalchemy.orm.exc import DetachedInstanceError

from aurora_router import Failure, Router, RoutingSession, classify_error
from aurora_router.core import events
from aurora_router.local import FaultProxy, PostgresCluster
from tests.integration.shop import BOTH, RAISE, Item, Part, eventually, no_connection_is_left, raise_stock, sessions, stock

MakeRouter = Callable[..., Router]


@BOTH
def test_a_killed_writer_is_a_pause_and_no_error(cluster: PostgresCluster, make_router: MakeRouter) -> None:
    router = make_router()
    router.init_commit_table()
    errors: list[BaseException] = []
    done: list[int] = []
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            try:
                router.run_transaction(sessions(router), lambda s: s.execute(RAISE))
            except BaseException as error:
                errors.append(error)
                return
            done.append(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    cluster.wait_in_sync()
    eventually(lambda: len(done) > 20)
    old = cluster.writer
    # A frozen writer is like a killed one, but it acknowledges no commit that would be lost.
    cluster.freeze(old)
    eventually(lambda: router.topology.writer is None or router.topology.by_id[old.address].missed_probes)
    cluster.kill(old)
    cluster.promote()
    count = len(done)
    eventually(lambda: len(done) > count + 20)
    stop.set()
    for thread in threads:
        thread.join(30)
    assert errors == []
    assert no_connection_is_left(router)


@pytest.mark.parametrize("sqlstate", ["40001", "40P01"])
def test_a_transaction_that_was_sacrificed_is_run_again(cluster: PostgresCluster, router: Router, sqlstate: str) -> None:
    runs: list[int] = []

    def sacrificed(s: RoutingSession) -> None:
        s.execute(RAISE)
        runs.append(len(runs))
        if len(runs) < 3:
            s.execute(text(f"DO $$ BEGIN RAISE 'no' USING ERRCODE = '{sqlstate}'; END $$"))

    router.run_transaction(sessions(router), sacrificed)
    assert len(runs) == 3
    assert stock(cluster) == 11


@BOTH
def test_two_transactions_that_lock_each_other_out_are_both_done(cluster: PostgresCluster, router: Router) -> None:
    meet = threading.Barrier(2, timeout=20)
    first_runs = threading.local()

    def cross(first: int, second: int) -> Callable[[RoutingSession], None]:
        def both(s: RoutingSession) -> None:
            s.execute(update(Item).where(Item.id == first).values(stock=Item.stock + 1))
            if not getattr(first_runs, "over", False):
                first_runs.over = True
                meet.wait()
            s.execute(update(Item).where(Item.id == second).values(stock=Item.stock + 1))

        return both

    threads = [threading.Thread(target=router.run_transaction, args=(sessions(router), cross(a, b))) for a, b in ((1, 2), (2, 1))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert cluster.execute("SELECT id, stock FROM item WHERE id < 3 ORDER BY id") == [(1, 12), (2, 22)]


@BOTH
def test_errors_of_the_function_pass_through_untouched(cluster: PostgresCluster, router: Router) -> None:
    """Errors of the function pass through untouched, and nothing is committed."""
    mine = ValueError("mine")
    runs: list[int] = []

    def fails(s: RoutingSession) -> None:
        runs.append(1)
        s.execute(RAISE)
        raise mine

    with pytest.raises(ValueError, match="mine") as caught:
        router.run_transaction(sessions(router), fails)
    assert caught.value is mine
    with pytest.raises(IntegrityError):
        router.run_transaction(sessions(router), lambda s: s.execute(insert(Item).values(id=1)))
    assert runs == [1]
    assert stock(cluster) == 10
    assert no_connection_is_left(router)


def test_an_error_of_another_database_is_the_applications(cluster: PostgresCluster, router: Router) -> None:
    engine = create_engine(cluster.url)
    runs: list[int] = []

    def elsewhere(s: RoutingSession) -> None:
        runs.append(1)
        with PlainSession(engine) as other:
            other.execute(text("DO $$ BEGIN RAISE 'no' USING ERRCODE = '40001'; END $$"))

    with pytest.raises(OperationalError):
        router.run_transaction(sessions(router), elsewhere)
    assert runs == [1]
    engine.dispose()


def test_what_has_committed_by_itself_is_not_run_again(cluster: PostgresCluster, proxy: FaultProxy, router: Router) -> None:
    runs: list[int] = []

    def commits_itself(s: RoutingSession) -> None:
        runs.append(1)
        s.execute(RAISE)
        s.commit()
        proxy.lose("UPDATE item", answer=False)
        s.execute(RAISE)

    with pytest.raises(OperationalError):
        router.run_transaction(sessions(router), commits_itself)
    assert runs == [1]
    assert stock(cluster) == 11


@pytest.mark.parametrize("how", ["autocommit", "text"])
def test_a_statement_that_may_commit_is_not_run_again(
    cluster: PostgresCluster, proxy: FaultProxy, router: Router, how: str
) -> None:
    """A statement that may commit by itself is not run again when its answer is lost."""
    runs: list[int] = []

    def by_itself(s: RoutingSession) -> None:
        runs.append(1)
        if how == "autocommit":
            s.connection(execution_options={"isolation_level": "AUTOCOMMIT"})
            proxy.lose("UPDATE item", answer=True)
            s.execute(RAISE)
        else:
            s.execute(RAISE)
            proxy.lose("COMMIT", answer=True)
            s.execute(text("COMMIT"))

    with pytest.raises(DBAPIError) as caught:
        router.run_transaction(sessions(router), by_itself)
    assert not classify_error(caught.value).outcome_known
    assert not classify_error(caught.value).safe_to_repeat
    assert runs == [1]
    assert stock(cluster) == 11


def test_a_failed_commit_over_two_databases_is_not_run_again(cluster: PostgresCluster, proxy: FaultProxy, router: Router) -> None:
    """A commit over two databases is not run again when it fails."""
    engine = create_engine(cluster.url)
    runs: list[int] = []

    def both(s: RoutingSession) -> None:
        runs.append(1)
        s.add(Part(id=100, name="elsewhere"))
        s.flush()
        s.execute(RAISE)

    proxy.lose("COMMIT", answer=False)
    with pytest.raises(OperationalError):
        router.run_transaction(sessions(router, binds={Part: engine}), both)
    assert runs == [1]
    engine.dispose()


@BOTH
def test_a_unit_that_makes_itself_read_only_does_not_loop(router: Router) -> None:
    """A transaction that makes itself read-only is not run for ever."""
    runs: list[int] = []

    def read_only(s: RoutingSession) -> None:
        runs.append(1)
        s.execute(text("SET TRANSACTION READ ONLY"))
        s.execute(RAISE)

    with pytest.raises(DBAPIError) as caught:
        router.run_transaction(sessions(router), read_only)
    assert classify_error(caught.value).failure is Failure.READ_ONLY
    assert len(runs) == 3


def test_a_unit_beyond_the_servers_time_limit_does_not_loop(
    cluster: PostgresCluster, router: Router, heard: list[events.Event]
) -> None:
    """A unit that takes longer than the server's time limit is not run for ever."""
    runs: list[int] = []

    def dawdles(s: RoutingSession) -> None:
        runs.append(1)
        (process,) = s.execute(text("SELECT pg_backend_pid()")).one()
        s.execute(text("SET LOCAL idle_in_transaction_session_timeout = 20"))
        gone = "SELECT count(*) FROM pg_stat_activity WHERE pid = %s"
        eventually(lambda: cluster.execute(gone, process) == [(0,)])
        s.execute(RAISE)

    with pytest.raises(DBAPIError) as caught:
        router.run_transaction(sessions(router), dawdles)
    known = classify_error(caught.value)
    assert (known.failure, known.outcome_known, known.safe_to_repeat) == (Failure.OVERTIME, True, False)
    assert runs == [1]
    assert not any(isinstance(e, events.InstanceDown) for e in heard)
    assert no_connection_is_left(router)


def test_a_swallowed_error_does_not_end_as_done(cluster: PostgresCluster, router: Router) -> None:
    """A unit that swallows the error of a statement does not end as done."""

    def swallows(s: RoutingSession) -> None:
        s.execute(RAISE)
        with pytest.raises(IntegrityError):
            s.execute(insert(Item).values(id=1))

    with pytest.raises(DBAPIError, match="aborted"):
        router.run_transaction(sessions(router), swallows)
    assert stock(cluster) == 10


def test_objects_of_a_failed_attempt_are_not_in_the_next(cluster: PostgresCluster, proxy: FaultProxy, router: Router) -> None:
    seen: list[tuple[RoutingSession, Item]] = []

    def add(s: RoutingSession) -> Item:
        assert not list(s), "a fresh session"
        item = Item(id=100 + len(seen), name="new")
        s.add(item)
        seen.append((s, item))
        s.flush()
        return item

    proxy.lose("COMMIT", answer=False)
    item = router.run_transaction(sessions(router, expire_on_commit=False), add)
    (first_session, abandoned), (second_session, kept) = seen
    assert first_session is not second_session
    assert item is kept
    assert abandoned not in second_session
    assert cluster.execute("SELECT id FROM item WHERE name = 'new'") == [(101,)]


def test_returned_objects_can_be_read_if_they_do_not_expire(router: Router) -> None:
    """Objects that the function returns can be read if they do not expire at the commit."""
    item = router.run_transaction(sessions(router, expire_on_commit=False), lambda s: s.get_one(Item, 1))
    assert (item.name, item.stock) == ("one", 10)
    item = router.run_transaction(sessions(router), lambda s: s.get_one(Item, 1))
    with pytest.raises(DetachedInstanceError):
        _ = item.name


def test_a_nested_transaction_is_a_unit_done_again(cluster: PostgresCluster, proxy: FaultProxy, router: Router) -> None:
    """A transaction inside of another attempt is a unit of its own, and is done again with it."""

    def outer(s: RoutingSession) -> None:
        s.execute(update(Item).where(Item.id == 2).values(stock=Item.stock + 1))
        router.run_transaction(sessions(router), raise_stock)
        proxy.lose("UPDATE item SET name", answer=False, times=1 - len(runs))
        runs.append(1)
        s.execute(update(Item).where(Item.id == 2).values(name="again"))

    runs: list[int] = []
    router.run_transaction(sessions(router), outer)
    assert cluster.execute("SELECT stock FROM item WHERE id < 3 ORDER BY id") == [(12,), (21,)]


def test_a_failure_the_function_made_its_own_is_not_retried(cluster: PostgresCluster, proxy: FaultProxy, router: Router) -> None:
    """A failure that the function turned into an error of its own is not run again."""

    def wraps(s: RoutingSession) -> None:
        proxy.lose("UPDATE item", answer=False)
        try:
            s.execute(RAISE)
        except DBAPIError as error:
            raise ValueError("mine") from error

    with pytest.raises(ValueError, match="mine"):
        router.run_transaction(sessions(router), wraps)
    assert stock(cluster) == 10
