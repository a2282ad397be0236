"""A connection is lost on the way, at COMMIT above all: the outcome is found out, and the unit takes effect exactly once."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest
from sqlalchemy import select, text

from aurora_router import Outcome, OutcomeUnknown, Router, RoutingSession, classify_error
from aurora_router.core import events
from aurora_router.local import FaultProxy, PostgresCluster
from aurora_router.router import core_of
from tests.integration.shop import (
    RAISE,
    Item,
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

NOTE = "pg_logical_emit_message"
STOCK = select(Item.stock).where(Item.id == 1)
SIGN = "INSERT INTO aurora_router_commits"


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
        core_of(router).engines.evict(router.topology.writer.id, shut_down_before=time.monotonic())  # type: ignore[union-attr]
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
    assert isinstance(caught.value.__cause__, core_of(router).engines.driver_error)


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
        ("CREATE TEMPORARY TABLE scratch (n int)", "COMMIT", "INSERT INTO scratch VALUES (1)"),
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
                        if statement == "COMMIT":
                            s.commit()  # the pool gives the same connection to the next transaction
                        else:
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
