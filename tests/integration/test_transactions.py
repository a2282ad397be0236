"""run_transaction runs a unit again whatever is lost on the way, and the unit takes effect exactly once."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import tenacity
from sqlalchemy import create_engine, insert, select, text, update
from sqlalchemy.exc import DBAPIError, IntegrityError, OperationalError
from sqlalchemy.orm import Session as PlainSession
from sqlalchemy.orm import scoped_session, sessionmaker
from sqlalchemy.orm.exc import DetachedInstanceError

from aurora_router import (
    ConfigurationError,
    Failure,
    NoWriterAvailable,
    Outcome,
    OutcomeUnknown,
    Router,
    RouterError,
    RoutingSession,
    classify_error,
)
from aurora_router.core import events
from aurora_router.local import FaultProxy, PostgresCluster
from tests.integration.shop import (
    BOTH,
    RAISE,
    Item,
    Part,
    eventually,
    lose_a_commit_in_a_failover,
    no_connection_is_left,
    place,
    raise_stock,
    routed,
    sessions,
    shop,
    stock,
    use_up_to,
)

MakeRouter = Callable[..., Router]
NOTE = "pg_logical_emit_message"
STOCK = select(Item.stock).where(Item.id == 1)
SIGN = "INSERT INTO aurora_router_commits"


@pytest.fixture
def router(make: MakeRouter) -> Router:
    """A router of the whole cluster, with the writer behind the proxy."""
    return make()


# -- what is lost on the way ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("answer", [False, True], ids=["before the server hears of it", "after it has answered"])
@pytest.mark.parametrize(
    ("step", "check"),
    [
        ("BEGIN", "xid"),
        ("UPDATE item", "xid"),
        (NOTE, "xid"),
        ("COMMIT", "xid"),
        (SIGN, "table"),
        ("COMMIT", "table"),
    ],
)
def test_a_loss_at_any_step_leaves_the_unit_done_once(
    cluster: PostgresCluster, proxy: FaultProxy, router: Router, step: str, check: str, answer: bool
) -> None:
    """A connection lost at any step leaves the unit done exactly once."""
    proxy.lose(step, answer=answer)
    assert router.run_transaction(sessions(router), raise_stock, commit_check=check) == 11
    assert proxy._losing == [], "it was lost"
    assert stock(cluster) == 11
    assert no_connection_is_left(router)


@pytest.mark.parametrize("check", ["xid", "table"])
def test_commits_lost_several_times_are_each_resolved(
    cluster: PostgresCluster, proxy: FaultProxy, router: Router, heard: list[events.Event], check: str
) -> None:
    """Commits that are lost again and again are each resolved."""
    proxy.lose("COMMIT", answer=False, times=3)
    assert router.run_transaction(sessions(router), raise_stock, commit_check=check) == 11
    assert stock(cluster) == 11
    resolved = [e.outcome for e in heard if isinstance(e, events.CommitResolved)]
    again = [e.number for e in heard if isinstance(e, events.RunAgain)]
    assert set(resolved) == {"not committed"}
    assert again == list(range(1, len(resolved) + 1))
    assert proxy._losing == [], "the commit table's own COMMITs were lost, too, where it was asked"


@pytest.mark.parametrize("check", ["xid", "table"])
def test_a_commit_that_never_arrives_is_ended_and_retried(
    cluster: PostgresCluster, proxy: FaultProxy, router: Router, check: str
) -> None:
    """A transaction whose COMMIT never comes is ended and run again."""
    proxy.lose("COMMIT", answer=False, half_open=True)
    # The lookup in the table waits for the other transaction until the server notices the loss, or somebody ends it.
    if check == "table":
        cluster.execute("ALTER ROLE app SET idle_in_transaction_session_timeout = '1s'")
        router._engines.discard(router.topology.writer.id, cut_before=time.monotonic())  # type: ignore[union-attr]
    try:
        assert router.run_transaction(sessions(router), raise_stock, commit_check=check) == 11
    finally:
        cluster.execute("ALTER ROLE app RESET idle_in_transaction_session_timeout")
    assert stock(cluster) == 11


@pytest.mark.parametrize("answer", [False, True])
def test_without_a_check_the_outcome_is_unknown(
    cluster: PostgresCluster, proxy: FaultProxy, router: Router, answer: bool
) -> None:
    """Without a check the outcome is unknown, and nothing is run again."""
    runs: list[int] = []

    def count(s: RoutingSession) -> None:
        runs.append(raise_stock(s))

    proxy.lose("COMMIT", answer=answer)
    with pytest.raises(OutcomeUnknown) as caught:
        router.run_transaction(sessions(router), count, commit_check=None)
    assert runs == [11]
    assert caught.value.instance == proxy.address
    assert caught.value.resolve() is Outcome.UNKNOWN
    known = classify_error(caught.value)
    assert (known.sent, known.outcome_known, known.safe_to_repeat) == (True, False, False)
    eventually(lambda: stock(cluster) == (11 if answer else 10))
    assert no_connection_is_left(router)


@pytest.mark.parametrize("check", ["xid", "table"])
@pytest.mark.parametrize(("answer", "truth"), [(False, Outcome.NOT_COMMITTED), (True, Outcome.COMMITTED)])
def test_a_session_that_notes_its_commits_can_resolve_them(
    proxy: FaultProxy, router: Router, check: str, answer: bool, truth: Outcome
) -> None:
    """A plain session with a commit check can find out the outcome of its commits."""
    with sessions(router, commit_check=check)() as s:
        s.execute(RAISE)
        proxy.lose("COMMIT", answer=answer)
        with pytest.raises(OutcomeUnknown) as caught:
            s.commit()
        assert caught.value.resolve() is truth
        s.rollback()
        assert s.get_one(Item, 1).stock == (11 if answer else 10), "the session goes on"
    assert no_connection_is_left(router)


def test_a_lost_commit_of_a_plain_session_was_not_noted(proxy: FaultProxy, router: Router) -> None:
    """The error of a lost COMMIT says that a plain session has no commit check."""
    with sessions(router)() as s:
        s.execute(RAISE)
        proxy.lose("COMMIT", answer=True)
        with pytest.raises(OutcomeUnknown, match="commit_check") as caught:
            s.commit()
    assert caught.value.resolve() is Outcome.UNKNOWN
    assert isinstance(caught.value.__cause__, router._engines.driver_error)


def test_a_lost_commit_of_a_connection_is_of_unknown_outcome(proxy: FaultProxy, router: Router) -> None:
    """A lost COMMIT of a connection has an unknown outcome as well."""
    with router.connect() as connection:
        connection.execute(RAISE)
        proxy.lose("COMMIT", answer=True)
        with pytest.raises(OutcomeUnknown):
            connection.commit()
    assert no_connection_is_left(router)


def test_a_lost_commit_of_a_unit_that_only_read_is_nothing(proxy: FaultProxy, router: Router) -> None:
    proxy.lose("COMMIT", answer=True)

    def read(s: RoutingSession) -> int:
        s.execute(text("/*@writer*/ SELECT 1"))
        return s.get_one(Item, 1).stock

    assert router.run_transaction(sessions(router), read) == 10
    assert proxy._losing == []


def test_a_session_sees_its_late_commit_once_it_is_resolved(cluster: PostgresCluster, proxy: FaultProxy, router: Router) -> None:
    """A session sees the writes of its lost COMMIT once that is resolved, however late the COMMIT came."""
    cluster.execute("""
        CREATE OR REPLACE FUNCTION tarry() RETURNS trigger LANGUAGE plpgsql AS
            'BEGIN PERFORM pg_advisory_xact_lock(77); RETURN NULL; END';
        CREATE CONSTRAINT TRIGGER tarry AFTER UPDATE ON item DEFERRABLE INITIALLY DEFERRED
            FOR EACH ROW EXECUTE FUNCTION tarry()""")
    caught: list[OutcomeUnknown] = []

    def commit() -> None:
        with pytest.raises(OutcomeUnknown) as unknown:
            s.commit()
        caught.append(unknown.value)

    def reads_on_a_reader() -> bool:
        assert s.scalar(STOCK) == 10
        found = place(s) == "reader"
        s.rollback()
        return found

    waiting = "SELECT 1 FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"
    try:
        with cluster.writer.connect(autocommit=True) as holder, sessions(router)(commit_check="xid") as s:
            holder.execute("SELECT pg_advisory_lock(77)")
            s.execute(RAISE)
            thread = threading.Thread(target=commit)
            thread.start()
            eventually(lambda: cluster.execute(waiting))
            proxy.reset_all()
            thread.join()
            s.rollback()
            # An idle writer may write its log only to a page's end, in the middle of the update's record.
            # No reader replays that record before the next commit writes the rest.
            holder.execute("SELECT pg_logical_emit_message(true, '', '')")
            eventually(reads_on_a_reader)
            for reader in cluster.readers:
                cluster.pause_replay(reader)
            holder.execute("SELECT pg_advisory_unlock(77)")
            assert caught[0].resolve() is Outcome.COMMITTED
            assert s.scalar(STOCK) == 11
    finally:
        cluster.execute("DROP TRIGGER tarry ON item")


def test_a_reused_transaction_id_is_not_taken_for_this_one(
    aurora_cluster_factory: Callable[..., PostgresCluster],
) -> None:
    """A transaction id that another transaction used after a failover is not taken for the first one's."""
    with shop(aurora_cluster_factory) as cluster, routed(cluster) as (router, proxy):
        xid, unknown, _ = lose_a_commit_in_a_failover(cluster, router, proxy)
        use_up_to(cluster, xid)
        assert unknown.resolve() is Outcome.NOT_COMMITTED
        assert stock(cluster) == 10


def test_a_transaction_without_a_record_is_not_found_committed(
    aurora_cluster_factory: Callable[..., PostgresCluster],
) -> None:
    """A COMMIT that no server has received has not committed, even if its transaction logged nothing before the note."""
    without_records = (
        ("NOTIFY paid, '4711'",),
        ("SAVEPOINT a", "NOTIFY paid, '4711'"),
        ("INSERT INTO unlogged VALUES (1)",),
        ("SELECT set_config('app.tenant', '7', false)",),
    )
    lost: list[OutcomeUnknown] = []
    with shop(aurora_cluster_factory) as cluster, routed(cluster) as (router, proxy):
        (reader,) = cluster.readers
        cluster.execute("CREATE UNLOGGED TABLE unlogged (n int); GRANT ALL ON unlogged TO app")
        with cluster.writer.connect(autocommit=False) as lower:
            lower.execute("SELECT txid_current()")
            for statements in without_records:
                with sessions(router, commit_check="xid")() as s:
                    for statement in statements:
                        s.execute(text(statement))
                    proxy.lose("COMMIT", answer=False, half_open=True)  # the server keeps waiting, and aborts nothing
                    with pytest.raises(OutcomeUnknown) as caught:
                        s.commit()
                    lost.append(caught.value)
            lower.execute("UPDATE item SET stock = 11")  # its id is lower, and its record follows all notes
            lower.commit()
        ((written,),) = cluster.execute("SELECT pg_current_wal_lsn()::text")  # wait_in_sync() would use an id
        replayed = "SELECT pg_last_wal_replay_lsn() >= %s::pg_lsn"
        eventually(lambda: cluster.execute(replayed, written, instance=reader) == [(True,)])
        cluster.kill(cluster.writer)
        cluster.promote(reader)
        for _ in range(2 * len(lost)):  # some of these would get the ids of the lost ones
            cluster.execute("UPDATE item SET stock = stock + 1")
        assert [each.resolve() for each in lost] == [Outcome.NOT_COMMITTED] * len(without_records)


def test_after_two_promotions_nothing_is_guessed(
    aurora_cluster_factory: Callable[..., PostgresCluster],
) -> None:
    """Two promotions later the outcome cannot be known from the id, and it is not guessed."""
    with shop(aurora_cluster_factory, readers=2) as cluster, routed(cluster) as (router, proxy):
        old = cluster.writer
        for check, answer in (("xid", Outcome.UNKNOWN), ("table", Outcome.COMMITTED)):
            router.init_commit_table()
            with sessions(router, commit_check=check)() as s:
                s.execute(RAISE)
                proxy.lose("COMMIT", answer=True)
                with pytest.raises(OutcomeUnknown) as caught:
                    s.commit()
            cluster.wait_in_sync()
            for _ in range(2):
                was = cluster.writer
                cluster.kill(was)
                cluster.promote()
                cluster.rejoin(was)
                cluster.wait_in_sync()
            assert caught.value.resolve() is answer
            while cluster.writer is not old:
                was = cluster.writer
                cluster.kill(was)
                cluster.promote(old)
                cluster.rejoin(was)
                cluster.wait_in_sync()
            eventually(lambda: router.topology.writer is not None and router.topology.writer.id == proxy.address)


# -- what is run again, and what is not -----------------------------------------------------------------------------


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
    eventually(lambda: router.topology.writer is None or router.topology.by_id[old.address].misses)
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


def test_objects_of_an_abandoned_run_are_not_in_the_next(cluster: PostgresCluster, proxy: FaultProxy, router: Router) -> None:
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


def test_a_nested_run_is_a_unit_of_its_own_done_again(cluster: PostgresCluster, proxy: FaultProxy, router: Router) -> None:
    """A run inside another one is a unit of its own, and is done again with it."""

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


# -- the other spellings, and what bounds them ----------------------------------------------------------------------


def test_the_loop_runs_its_block_again(cluster: PostgresCluster, proxy: FaultProxy, router: Router) -> None:
    proxy.lose("COMMIT", answer=False, times=2)
    numbers = []
    for attempt in router.attempts(sessions(router)):
        with attempt as s:
            numbers.append(attempt.number)
            s.execute(RAISE)
    assert numbers == [1, 2, 3]
    assert stock(cluster) == 11


@pytest.mark.parametrize("how", ["return in the block", "break after the block"])
def test_a_loop_left_early_commits_nothing_and_warns(
    cluster: PostgresCluster, proxy: FaultProxy, router: Router, how: str
) -> None:
    """A loop that is left early commits nothing and warns of it."""

    def leaves() -> int:
        for attempt in router.attempts(sessions(router)):
            with attempt as s:
                done = raise_stock(s)
                if how == "return in the block":
                    return done
            break
        return done

    proxy.lose("COMMIT", answer=False)  # nobody could learn of this loss any more
    with pytest.warns(RuntimeWarning, match="return or break"):
        assert leaves() == 11
    assert proxy._losing, "no COMMIT was sent"
    assert stock(cluster) == 10
    assert no_connection_is_left(router)


def test_an_attempt_is_for_one_block_in_its_loop(cluster: PostgresCluster, router: Router) -> None:
    for attempt in router.attempts(sessions(router)):
        with attempt as s:
            s.execute(RAISE)
        with pytest.raises(RouterError, match="one `with` block"):
            attempt.__enter__()
    left = next(router.attempts(sessions(router)))
    with pytest.raises(RouterError, match="one `with` block"):
        left.__enter__()
    assert stock(cluster) == 11


def test_the_decorator_gives_the_session_and_passes_arguments_on(
    cluster: PostgresCluster, proxy: FaultProxy, router: Router
) -> None:
    @router.transactional(sessions(router), deadline=20.0)
    def add_to(s: RoutingSession, number: int, *, more: int) -> str:
        """Says something."""
        s.execute(update(Item).where(Item.id == number).values(stock=Item.stock + more))
        return f"{number}: {more}"

    proxy.lose("COMMIT", answer=False)
    assert add_to(1, more=5) == "1: 5"
    assert add_to.__name__ == "add_to"
    assert add_to.__doc__ == "Says something."
    assert stock(cluster) == 15


def test_a_decorator_without_parentheses_is_refused(cluster: PostgresCluster, router: Router) -> None:
    """A bare `@router.transactional` is refused: it would take the function for a session factory, and never run it."""

    def add(s: RoutingSession) -> None:
        s.execute(RAISE)

    def add_to(s: RoutingSession, *, number: int) -> None:
        s.execute(RAISE)

    def optional(s: RoutingSession | None = None, number: int = 1) -> None:
        add(sessions(router)())

    def any_number(*arguments: Any, **more: Any) -> None:
        add(sessions(router)())

    def by_name(*, s: RoutingSession | None = None) -> None:
        add(sessions(router)())

    def without() -> None:
        add(sessions(router)())

    class Service:
        def add(self, s: RoutingSession) -> None:
            s.execute(RAISE)

        def __call__(self, *arguments: Any) -> None:
            any_number()

    partial = functools.partial(optional, number=2)
    cached = functools.lru_cache(without)
    for fn in (
        *(add, add_to, optional, any_number, by_name, without, partial, cached, lambda s=None: None),
        *(Service().add, Service.add, Service(), functools.wraps(add)(any_number)),
    ):
        with pytest.raises(ConfigurationError, match=r"@router\.transactional\(Session\)"):
            router.transactional(fn)  # type: ignore[arg-type]
    assert stock(cluster) == 10


def test_a_function_that_takes_no_session_is_refused(router: Router) -> None:
    """The decorator refuses a function without a session at its definition, and not at its first call."""
    decorate: Any = router.transactional(sessions(router))

    def without() -> None: ...

    def by_name(*, s: RoutingSession) -> None: ...

    def options(**more: Any) -> None: ...

    for fn in (without, by_name, options):
        with pytest.raises(ConfigurationError, match=f"{fn.__name__} takes no session"):
            decorate(fn)
    with pytest.raises(ConfigurationError, match="decorates a function"):
        decorate(1)


def test_a_function_may_take_its_session_in_any_way(cluster: PostgresCluster, router: Router) -> None:
    """With parentheses, a function with an optional first argument or any number of arguments gets the session."""

    @router.transactional(sessions(router))
    def optional(s: RoutingSession | None = None, number: int = 1) -> None:
        assert s is not None
        s.execute(RAISE)

    @router.transactional(sessions(router))
    def any_number(*arguments: Any) -> None:
        arguments[0].execute(RAISE)

    optional()
    optional(number=2)
    any_number()
    any_number(1, 2)
    assert stock(cluster) == 14


def test_any_factory_of_sessions_will_do_for_the_decorator(cluster: PostgresCluster, router: Router) -> None:
    """A sessionmaker, a scoped_session and a function without arguments make sessions."""
    Session = sessions(router)

    def make(read_only: bool | None = None) -> RoutingSession:
        return Session(read_only=read_only)

    factories: tuple[Any, ...] = (
        *(Session, scoped_session(Session), functools.partial(Session, read_only=False)),
        *(make, lambda: Session(read_only=False)),
    )
    for factory in factories:
        router.transactional(factory)(lambda s: s.execute(RAISE))()
    assert stock(cluster) == 15


def test_a_scoped_session_lends_its_factory_only(cluster: PostgresCluster, router: Router) -> None:
    """A scoped session lends its factory and keeps its own session."""
    scoped = scoped_session(sessions(router))
    mine = scoped()
    router.run_transaction(scoped, lambda s: s.execute(RAISE))
    assert scoped() is mine
    assert stock(cluster) == 11
    scoped.remove()


def test_only_routing_sessions_of_this_router_are_taken(
    cluster: PostgresCluster, router: Router, make_router: MakeRouter
) -> None:
    for strange in (sessionmaker(), sessions(make_router())):
        with pytest.raises(ConfigurationError, match="routing sessions of this router"):
            router.run_transaction(strange, lambda s: None)
    with pytest.raises(ConfigurationError, match="deadline"):
        router.run_transaction(sessions(router), lambda s: None, deadline=-1)
    with pytest.raises(ConfigurationError, match="commit_check"):
        router.run_transaction(sessions(router), lambda s: None, commit_check="xod")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "wrong",
    [{"deadline": 0.0}, {"stop": 5}, {"wait": 2.0}, {"commit_check": "xod"}, {"Session": None}],
    ids=lambda wrong: next(iter(wrong)),
)
def test_a_wrong_option_is_told_at_once(router: Router, wrong: dict[str, object]) -> None:
    """A mistake in the options is an error at once, and not at the next failover."""
    options: dict[str, Any] = {"Session": sessions(router), **wrong}
    with pytest.raises(ConfigurationError, match=next(iter(wrong))):
        router.run_transaction(fn=lambda s: None, **options)
    with pytest.raises(ConfigurationError, match=next(iter(wrong))):
        router.attempts(**options)
    with pytest.raises(ConfigurationError, match=next(iter(wrong))):
        router.transactional(**options)


def test_an_unknown_option_of_the_decorator_is_named(router: Router) -> None:
    """The router's own error names the unknown option and the options that exist."""
    options: dict[str, Any] = {"retries": 3}
    with pytest.raises(ConfigurationError, match=r"retries=.*deadline, stop, wait or commit_check"):
        router.transactional(sessions(router), **options)


def test_a_function_that_would_run_after_its_unit_is_refused(cluster: PostgresCluster, router: Router) -> None:
    async def coroutine(s: RoutingSession) -> None:
        s.execute(RAISE)

    def generator(s: RoutingSession) -> Iterator[int]:
        yield raise_stock(s)

    for fn in (coroutine, generator, lambda s: coroutine(s)):
        with pytest.raises(ConfigurationError, match="coroutine or a generator"):
            router.run_transaction(sessions(router), fn)
    with pytest.raises(ConfigurationError, match="coroutine or a generator"):
        router.transactional(sessions(router))(coroutine)()
    assert stock(cluster) == 10


def test_tenacitys_policies_say_how_often_and_how_long(cluster: PostgresCluster, proxy: FaultProxy, router: Router) -> None:
    proxy.lose("COMMIT", answer=False, times=99)
    waits: list[int] = []

    def wait(state: tenacity.RetryCallState) -> float:
        waits.append(state.attempt_number)
        return 0.0

    with pytest.raises(OperationalError):
        router.run_transaction(
            sessions(router), raise_stock, stop=tenacity.stop_after_attempt(3), wait=tenacity.wait_fixed(0) + wait
        )
    assert waits == [1, 2, 3]
    assert stock(cluster) == 10


def test_a_deadline_ends_the_wait_for_a_writer(cluster: PostgresCluster, make_router: MakeRouter) -> None:
    router = make_router()
    router.start()
    cluster.kill(cluster.writer)
    eventually(lambda: router.topology.writer is None)
    with pytest.raises(NoWriterAvailable) as caught:
        router.run_transaction(sessions(router), raise_stock, deadline=0.3)
    assert caught.value.waited < 10, "not the 60 s of failover_timeout; part of the deadline may have passed before"


def test_a_deadline_beyond_the_failover_timeout_is_kept(cluster: PostgresCluster, make_router: MakeRouter) -> None:
    """A unit waits until its deadline, even if that is later than the failover timeout."""
    router = make_router(failover_timeout=0.3)
    router.start()
    cluster.kill(cluster.writer)
    eventually(lambda: router.topology.writer is None)
    with pytest.raises(NoWriterAvailable) as caught:
        router.run_transaction(sessions(router), raise_stock)
    assert 0.2 < caught.value.waited < 10
    with pytest.raises(NoWriterAvailable) as caught:
        router.run_transaction(sessions(router), raise_stock, deadline=1.5)
    assert caught.value.waited > 1.2


# -- the commit table -----------------------------------------------------------------------------------------------


@BOTH
def test_a_missing_commit_table_is_named_with_what_to_do(cluster: PostgresCluster, router: Router) -> None:
    cluster.execute("DROP TABLE aurora_router_commits")
    with pytest.raises(ConfigurationError, match="init-commit-table"):
        router.run_transaction(sessions(router), raise_stock, commit_check="table")
    assert stock(cluster) == 10
    router.init_commit_table()
    router.init_commit_table()
    assert router.run_transaction(sessions(router), raise_stock, commit_check="table") == 11


READ_ONLY: Any = {"postgresql_readonly": True}


@BOTH
@pytest.mark.parametrize("check", ["xid", "table"])
def test_a_read_only_transaction_is_not_noted(cluster: PostgresCluster, router: Router, check: Any) -> None:
    """A transaction that is read-only ends as it would without a commit check, because nothing of it can be lost."""

    def report(s: RoutingSession) -> int | None:
        if cluster.url.startswith("postgresql"):
            s.connection(execution_options=READ_ONLY)
        else:
            s.execute(text("START TRANSACTION READ ONLY"))
        return s.scalar(STOCK)

    assert router.run_transaction(sessions(router), report, commit_check=check) == 10
    with sessions(router, commit_check=check)() as s:
        assert report(s) == 10
        s.commit()
        assert raise_stock(s) == 11
        s.commit()
    assert stock(cluster) == 11


@pytest.mark.parametrize("answer", [False, True])
def test_a_lost_commit_of_a_read_only_transaction_is_made_again(proxy: FaultProxy, router: Router, answer: bool) -> None:
    runs: list[int | None] = []

    def report(s: RoutingSession) -> None:
        s.connection(execution_options=READ_ONLY)
        runs.append(s.scalar(STOCK))

    proxy.lose("COMMIT", answer=answer)
    router.run_transaction(sessions(router), report, commit_check="table")
    assert runs == [10, 10]


def test_a_transaction_that_became_writable_is_noted(cluster: PostgresCluster, proxy: FaultProxy, router: Router) -> None:
    """A transaction that was declared read-only may have been made writable since, and then it is noted."""
    runs: list[int] = []

    def work(s: RoutingSession) -> None:
        s.connection(execution_options=READ_ONLY)
        s.execute(text("SET TRANSACTION READ WRITE"))
        runs.append(raise_stock(s))

    proxy.lose("COMMIT", answer=True)
    router.run_transaction(sessions(router), work, commit_check="table")
    assert runs == [11]
    assert stock(cluster) == 11


@pytest.mark.engines("mariadb", "mysql")
def test_locked_tables_that_keep_out_the_note_are_refused(cluster: PostgresCluster, router: Router) -> None:
    """LOCK TABLES keeps out the commit table, and the error says what to do."""

    def work(s: RoutingSession, *more: str) -> None:
        s.execute(text("LOCK TABLES item WRITE"))
        s.execute(text("UPDATE item SET stock = stock + 1 WHERE id = 1"))
        for statement in more:
            s.execute(text(statement))

    with pytest.raises(ConfigurationError, match=r"LOCK TABLES .* aurora_router_commits.* UNLOCK TABLES .* commit_check=None"):
        router.run_transaction(sessions(router), work)
    assert stock(cluster) == 10
    router.run_transaction(sessions(router), lambda s: work(s, "UNLOCK TABLES"))
    assert stock(cluster) == 11


def test_anothers_commit_table_serves_a_user_with_dml_rights(cluster: PostgresCluster, proxy: FaultProxy, router: Router) -> None:
    """A commit table that somebody else has made serves a user who may only use it."""
    cluster.execute("ALTER TABLE aurora_router_commits OWNER TO CURRENT_USER; REVOKE ALL ON aurora_router_commits FROM app")
    cluster.execute("GRANT SELECT, INSERT, UPDATE, DELETE ON aurora_router_commits TO app")
    cluster.execute("INSERT INTO aurora_router_commits (id, at) VALUES (gen_random_uuid(), now() - interval '2 hours')")
    try:
        router.init_commit_table()
        proxy.lose("COMMIT", answer=False)
        assert router.run_transaction(sessions(router), raise_stock, commit_check="table") == 11
        old = "SELECT count(*) FROM aurora_router_commits WHERE at < now() - interval '1 hour'"
        eventually(lambda: cluster.execute(old) == [(0,)], timeout=30)
    finally:
        cluster.execute("DROP TABLE aurora_router_commits")
    assert stock(cluster) == 11


def test_old_commit_rows_are_removed_outside_of_requests(cluster: PostgresCluster, router: Router) -> None:
    """Old rows of the commit table are removed outside of any request."""
    cluster.execute("""
        INSERT INTO aurora_router_commits (id, at)
        SELECT gen_random_uuid(), now() - interval '2 hours' FROM generate_series(1, 5100)""")
    cluster.execute("INSERT INTO aurora_router_commits (id) VALUES (gen_random_uuid())")
    router.run_transaction(sessions(router), raise_stock, commit_check="table")
    too_old = "SELECT count(*) FROM aurora_router_commits WHERE at < now() - interval '1 hour'"
    eventually(lambda: cluster.execute(too_old) == [(0,)], timeout=30)
    ((found,),) = cluster.execute("SELECT count(*) FROM aurora_router_commits")
    assert found >= 2
