"""No unit is reported as done that is not, not even after crashes of both writers, and errors say what is known."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import psycopg
import pytest
from sqlalchemy import create_engine, exc, insert, text
from sqlalchemy.exc import DBAPIError, IntegrityError

from aurora_router import Failure, Outcome, OutcomeUnknown, Router, RoutingSession, classify_error
from aurora_router.local import FaultProxy, LocalInstance, PostgresCluster
from tests.integration.shop import (
    RAISE,
    Item,
    cut_off,
    eventually,
    lose_a_commit_in_a_failover,
    no_connection_is_left,
    raise_stock,
    routed,
    sessions,
    shop,
    stock,
    through,
    until_readers_serve,
    use_up_to,
)

MakeRouter = Callable[..., Router]


@pytest.mark.parametrize("check", ["xid", "table", None])
def test_a_commit_that_becomes_a_rollback_is_not_called_done(cluster: PostgresCluster, router: Router, check: str | None) -> None:
    """A COMMIT that the server turns into a rollback is not reported as done."""

    def swallows(s: RoutingSession) -> None:
        s.execute(RAISE)
        with pytest.raises(IntegrityError):
            s.execute(insert(Item).values(id=1))

    with pytest.raises(DBAPIError, match="aborted"):
        router.run_transaction(sessions(router), swallows, commit_check=check)
    assert stock(cluster) == 10
    assert no_connection_is_left(router)


def test_a_constraint_that_fails_at_commit_is_the_users_error(cluster: PostgresCluster, router: Router) -> None:
    """A constraint that fails at the COMMIT is the application's error, and leaves nothing behind."""
    cluster.execute("""
        DROP TABLE IF EXISTS late; CREATE TABLE late (n int UNIQUE DEFERRABLE INITIALLY DEFERRED);
        INSERT INTO late VALUES (1); GRANT ALL ON late TO app""")
    runs: list[int] = []

    def fails_late(s: RoutingSession) -> None:
        runs.append(1)
        s.execute(text("INSERT INTO late VALUES (1)"))

    with pytest.raises(IntegrityError) as caught:
        router.run_transaction(sessions(router), fails_late)
    known = classify_error(caught.value)
    assert (known.failure, known.sent, known.outcome_known, known.safe_to_repeat) == (Failure.CONSTRAINT, True, True, False)
    assert runs == [1]
    assert no_connection_is_left(router)


def test_a_promoted_reader_that_crashed_is_not_believed(
    aurora_cluster_factory: Callable[..., PostgresCluster],
) -> None:
    """A promoted reader that crashed since is not believed about a transaction id."""
    with shop(aurora_cluster_factory) as cluster, routed(cluster) as (router, proxy):
        xid, unknown, position = lose_a_commit_in_a_failover(cluster, router, proxy)
        use_up_to(cluster, xid)
        cluster.execute("INSERT INTO other SELECT generate_series(1, 100000)")
        # One process of the server dies. The postmaster lives, and recovers the server.
        with pytest.raises(psycopg.OperationalError):
            cluster.execute("COPY other FROM PROGRAM 'kill -9 $PPID'")

        def recovered() -> bool:
            try:
                return cluster.execute("SELECT pg_last_wal_replay_lsn() > %s::pg_lsn", position) == [(True,)]
            except psycopg.OperationalError:
                return False

        eventually(recovered, timeout=30)
        assert cluster.execute("SELECT txid_status(%s)", xid) == [("committed",)]
        assert unknown.resolve() in (Outcome.NOT_COMMITTED, Outcome.UNKNOWN)
        assert stock(cluster) == 10


def waiting_commits(cluster: PostgresCluster, instance: LocalInstance) -> int:
    """The number of COMMITs on the instance that wait for a reader."""
    try:
        return int(cluster.execute("SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'SyncRep'", instance=instance)[0][0])
    except psycopg.OperationalError:
        return 0


def wait_for_readers_no_more(cluster: PostgresCluster, instance: LocalInstance) -> None:
    for statement in ("ALTER SYSTEM SET synchronous_standby_names = ''", "SELECT pg_reload_conf()"):
        cluster.execute(statement, instance=instance)


@pytest.mark.parametrize("check", ["xid", "table"])
def test_a_commit_only_on_a_crashed_writer_is_not_called_done(
    aurora_cluster_factory: Callable[..., PostgresCluster], check: str
) -> None:
    """A COMMIT that only a crashed writer has is not reported as done if commits wait for a reader."""
    with (
        shop(aurora_cluster_factory, synchronous=True) as cluster,
        routed(cluster) as (router, _),
        ThreadPoolExecutor(1) as threads,
    ):
        old, (reader,) = cluster.writer, cluster.readers
        router.init_commit_table()
        cluster.wait_in_sync()
        cut_off(cluster, reader)
        run = threads.submit(router.run_transaction, sessions(router), raise_stock, commit_check=check)
        try:
            eventually(lambda: waiting_commits(cluster, old))
            cluster.kill(old)
            cluster.restart(old)  # the COMMIT is in its log, and nowhere else
            eventually(lambda: run.done() or waiting_commits(cluster, old), timeout=30)
            assert not run.done()
        finally:
            cluster.kill(old)
            wait_for_readers_no_more(cluster, reader)
            cluster.promote(reader)
        assert run.result(timeout=60) == 11
        assert stock(cluster) == 11


def test_a_commit_found_on_the_new_writer_survives_its_crash(
    aurora_cluster_factory: Callable[..., PostgresCluster],
) -> None:
    """A COMMIT that was found on the new writer is there after its crash as well.

    After the crash nothing shows at which position the promotion ended the old log, and so whose the transaction id is.
    """
    with ThreadPoolExecutor(2) as threads, shop(aurora_cluster_factory, synchronous=True) as cluster:
        old, (reader,) = cluster.writer, cluster.readers
        with (
            FaultProxy((old.host, old.port)) as before_old,
            FaultProxy((reader.host, reader.port)) as before_reader,
            Router(through(before_old, cluster), instances=[before_reader.address]) as router,
        ):
            until_readers_serve(router, 1)
            # Leave a pooled connection for the run, because the proxy refuses new ones afterwards.
            with router.connect() as connection:
                connection.execute(text("SELECT 1"))
            before_old.refuse()
            before_old.lose("COMMIT", answer=True, half_open=True)
            run = threads.submit(router.run_transaction, sessions(router), raise_stock)
            eventually(lambda: cluster.execute("SELECT stock FROM item WHERE id = 1", instance=reader) == [(11,)])
            before_reader.black_hole()
            cluster.kill(old)
            cluster.promote(reader)

            def commit_until_one_waits() -> None:
                """Commit until a COMMIT waits, which need not be the first one after the promotion."""
                with contextlib.suppress(psycopg.OperationalError):
                    while True:
                        cluster.execute("SELECT pg_logical_emit_message(true, 'test', '')", instance=reader)

            one_waits = threads.submit(commit_until_one_waits)
            eventually(lambda: waiting_commits(cluster, reader) == 1)
            before_reader.heal()
            eventually(lambda: run.done() or waiting_commits(cluster, reader) == 2, timeout=30)  # one is the router's question
            assert not run.done(), run.exception()
            cluster.kill(reader)
            one_waits.result(timeout=60)
            cluster.restart(reader)
            eventually(lambda: run.done() or waiting_commits(cluster, reader), timeout=30)
            wait_for_readers_no_more(cluster, reader)
            assert run.result(timeout=60) == 11
            assert stock(cluster) == 11


def test_a_reader_without_commits_since_start_knows_of_none(
    aurora_cluster_factory: Callable[..., PostgresCluster],
) -> None:
    """A reader that has seen no commit since it started knows that there was none."""
    with shop(aurora_cluster_factory) as cluster:
        old, (reader,) = cluster.writer, cluster.readers

        def it_has_all() -> None:
            """Wait until the reader has all. Not by wait_in_sync(), because that commits."""
            ((written,),) = cluster.execute("SELECT pg_switch_wal()")
            replayed = "SELECT pg_last_wal_replay_lsn() >= %s::pg_lsn"
            eventually(lambda: cluster.execute(replayed, written, instance=reader) == [(True,)])

        cluster.execute("CHECKPOINT")
        it_has_all()
        cluster.execute("CHECKPOINT", instance=reader)
        cluster.restart(reader)
        with routed(cluster) as (router, proxy):
            with sessions(router, commit_check="xid")() as s:
                s.execute(RAISE)
                proxy.lose("COMMIT", answer=False, half_open=True)
                with pytest.raises(OutcomeUnknown) as caught:
                    s.commit()
            it_has_all()
            assert cluster.execute("SELECT pg_last_xact_replay_timestamp()", instance=reader) == [(None,)]
            cluster.kill(old)
            cluster.promote(reader)
            assert caught.value.resolve() is Outcome.NOT_COMMITTED


def test_an_error_after_an_unknown_commit_is_told_as_what_it_is(proxy: FaultProxy, router: Router) -> None:
    with router.connect() as connection:
        connection.execute(RAISE)
        proxy.lose("COMMIT", answer=True)
        with pytest.raises(OutcomeUnknown):
            connection.commit()
        connection.rollback()
        connection.execute(RAISE)
        with pytest.raises(IntegrityError):
            connection.execute(insert(Item).values(id=1))
        connection.rollback()
    assert no_connection_is_left(router)


def test_a_lost_commit_on_the_driver_is_not_safe_to_repeat(proxy: FaultProxy, router: Router) -> None:
    """A lost COMMIT of the driver's own connection is not called safe to repeat."""
    raw = router.raw_connection()
    raw.cursor().execute("UPDATE item SET stock = stock + 1 WHERE id = 1")
    proxy.lose("COMMIT", answer=True)
    with pytest.raises(psycopg.OperationalError) as caught:
        raw.commit()
    raw.invalidate()
    raw.close()
    known = classify_error(caught.value)
    assert (known.sent, known.outcome_known, known.safe_to_repeat) == (True, False, False)


def test_errors_of_a_plain_engine_are_known_by_their_phase(cluster: PostgresCluster, proxy: FaultProxy) -> None:
    """Errors of a plain engine are classified by the call in which they were raised."""
    cluster.execute("""
        DROP TABLE IF EXISTS late; CREATE TABLE late (n int UNIQUE DEFERRABLE INITIALLY DEFERRED);
        INSERT INTO late VALUES (1); GRANT ALL ON late TO app""")
    url = cluster.url.replace(cluster.writer.address, proxy.address)
    engine = create_engine(url, pool_size=1, max_overflow=0, pool_timeout=0.01)
    with engine.connect() as connection:
        connection.execute(text("INSERT INTO late VALUES (1)"))
        with pytest.raises(IntegrityError) as late:
            connection.commit()
        with pytest.raises(exc.TimeoutError) as full:
            engine.connect()
        connection.rollback()
        connection.execute(text("SELECT 1"))
        proxy.lose("COMMIT", answer=True)
        with pytest.raises(DBAPIError) as hidden:
            connection.exec_driver_sql("COMMIT")
    engine.dispose()
    known = classify_error(late.value)
    assert (known.sent, known.outcome_known, known.safe_to_repeat) == (True, True, False)
    known = classify_error(full.value)
    assert (known.failure, known.sent, known.outcome_known, known.safe_to_repeat) == (Failure.BUSY, False, True, True)
    known = classify_error(hidden.value)
    assert (known.sent, known.outcome_known, known.safe_to_repeat) == (True, False, False)


def test_an_outcome_can_be_asked_after_the_router_is_closed(proxy: FaultProxy, make: MakeRouter) -> None:
    """The outcome of a COMMIT can be asked for after the router is closed."""
    router = make()
    with sessions(router, commit_check="xid")() as s:
        s.execute(RAISE)
        proxy.lose("COMMIT", answer=True)
        with pytest.raises(OutcomeUnknown) as caught:
            s.commit()
    router.close()
    assert caught.value.resolve(5.0) in (Outcome.COMMITTED, Outcome.UNKNOWN)
