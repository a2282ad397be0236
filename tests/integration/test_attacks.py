"""Attacks on a real cluster that could run a unit twice or not at all, or report it wrongly."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psycopg
import pytest
from sqlalchemy import create_engine, event, exc, insert, text
from sqlalchemy.engine import Connection
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.orm import sessionmaker

from aurora_router import Failure, Outcome, OutcomeUnknown, Router, RoutingSession, classify_error
from aurora_router.core import events
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


@pytest.fixture
def router(make: MakeRouter) -> Router:
    return make()


# -- done twice -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", ["PREPARE TRANSACTION", "COMMIT PREPARED"])
@pytest.mark.parametrize("answer", [False, True])
def test_a_commit_in_two_phases_is_never_run_again(
    cluster: PostgresCluster, proxy: FaultProxy, router: Router, step: str, answer: bool
) -> None:
    runs: list[int] = []

    def once(s: RoutingSession) -> None:
        runs.append(1)
        s.execute(RAISE)

    proxy.lose(step, answer=answer)
    try:
        with pytest.raises(OutcomeUnknown) as caught:
            router.run_transaction(sessions(router, twophase=True), once, deadline=5.0)
    finally:
        for (gid,) in cluster.execute("SELECT gid FROM pg_prepared_xacts"):
            cluster.execute(f"ROLLBACK PREPARED '{gid}'")
    assert runs == [1]
    assert proxy._losing == [], "it was lost"
    assert not classify_error(caught.value).safe_to_repeat
    assert stock(cluster) == (11 if (step, answer) == ("COMMIT PREPARED", True) else 10)
    assert no_connection_is_left(router)


def test_a_notification_is_sent_once_if_its_commit_is_unanswered(
    cluster: PostgresCluster, proxy: FaultProxy, router: Router
) -> None:
    """A notification is sent once if the answer to its COMMIT is lost."""
    with psycopg.connect(cluster.url.replace("+psycopg", ""), autocommit=True) as ear:
        ear.execute("LISTEN news")
        proxy.lose("COMMIT", answer=True)
        router.run_transaction(sessions(router), lambda s: s.execute(text("SELECT pg_notify('news', 'it happened')")))
        assert proxy._losing == []
        ear.execute("NOTIFY news, 'the end'")
        heard = []
        for notice in ear.notifies(timeout=30):
            heard.append(notice.payload)
            if notice.payload == "the end":
                break
    assert heard == ["it happened", "the end"]


def test_the_row_of_a_long_transaction_is_as_young_as_its_commit(cluster: PostgresCluster, router: Router) -> None:
    cluster.execute("TRUNCATE aurora_router_commits")

    def long(s: RoutingSession) -> object:
        s.execute(RAISE)
        s.execute(text("SELECT pg_sleep(0.1)"))
        return s.execute(text("SELECT clock_timestamp()")).scalar_one()

    end = router.run_transaction(sessions(router), long, commit_check="table")
    assert cluster.execute("SELECT at >= %s FROM aurora_router_commits", end) == [(True,)], "else it would be removed too soon"


@pytest.mark.parametrize("answer", [False, True])
def test_a_commit_table_of_another_schema_is_not_asked(
    cluster: PostgresCluster, proxy: FaultProxy, router: Router, answer: bool
) -> None:
    cluster.execute("""
        DROP SCHEMA IF EXISTS tenant CASCADE; CREATE SCHEMA tenant;
        CREATE TABLE tenant.aurora_router_commits (LIKE public.aurora_router_commits INCLUDING ALL);
        GRANT ALL ON SCHEMA tenant TO app; GRANT ALL ON ALL TABLES IN SCHEMA tenant TO app""")
    runs: list[int] = []

    def of_a_tenant(s: RoutingSession) -> None:
        runs.append(1)
        s.execute(RAISE)
        s.execute(text("SET LOCAL search_path = tenant, public"))

    proxy.lose("COMMIT", answer=answer)
    try:
        router.run_transaction(sessions(router), of_a_tenant, commit_check="table")
    finally:
        cluster.execute("DROP SCHEMA tenant CASCADE")
    assert proxy._losing == []
    assert stock(cluster) == 11
    assert len(runs) == (1 if answer else 2)


@pytest.mark.parametrize("check", ["xid", "table"])
@pytest.mark.parametrize("answer", [False, True])
def test_a_unit_with_failed_savepoints_is_done_once(
    cluster: PostgresCluster, proxy: FaultProxy, router: Router, check: str, answer: bool
) -> None:
    """A unit with savepoints and a subtransaction that failed is done once."""

    def nested(s: RoutingSession) -> None:
        with s.begin_nested():
            s.execute(RAISE)
        with pytest.raises(IntegrityError), s.begin_nested():
            s.execute(insert(Item).values(id=1))
        with s.begin_nested() as savepoint:
            s.execute(RAISE)
            savepoint.rollback()

    proxy.lose("COMMIT", answer=answer)
    router.run_transaction(sessions(router), nested, commit_check=check)
    assert proxy._losing == []
    assert stock(cluster) == 11
    assert no_connection_is_left(router)


@pytest.mark.parametrize("answer", [False, True])
def test_rows_of_the_drivers_own_copy_are_there_once(
    cluster: PostgresCluster, proxy: FaultProxy, router: Router, answer: bool
) -> None:
    """The rows that the driver's own COPY writes are there once."""
    cluster.execute("CREATE TABLE IF NOT EXISTS heap (n int); TRUNCATE heap; GRANT ALL ON heap TO app")

    def copies(s: RoutingSession) -> None:
        driver: Any = s.connection().connection.driver_connection
        with driver.cursor().copy("COPY heap FROM STDIN") as copy:
            copy.write("1\n2\n")

    proxy.lose("COMMIT", answer=answer)
    router.run_transaction(sessions(router), copies)
    assert proxy._losing == []
    assert cluster.execute("SELECT count(*) FROM heap") == [(2,)]


@pytest.mark.parametrize("answer", [False, True])
def test_a_unit_without_lasting_writes_survives_a_lost_commit(proxy: FaultProxy, router: Router, answer: bool) -> None:
    """A unit that only locks rows or fills a temporary table succeeds although its COMMIT is lost."""

    def locks(s: RoutingSession) -> int:
        s.execute(text("CREATE TEMPORARY TABLE passing (n int) ON COMMIT DROP"))
        s.execute(text("INSERT INTO passing VALUES (1)"))
        return len(s.execute(text("SELECT id FROM item FOR UPDATE")).all())

    proxy.lose("COMMIT", answer=answer)
    assert router.run_transaction(sessions(router), locks) == 3
    assert proxy._losing == []
    assert no_connection_is_left(router)


@pytest.mark.parametrize("sql", ["UPDATE item SET stock = stock + 1 WHERE id = 1; COMMIT; SELECT 1", r"SELECT 1 AS a; END"])
def test_a_text_that_hides_a_commit_is_not_run_again(
    cluster: PostgresCluster, proxy: FaultProxy, router: Router, sql: str
) -> None:
    runs: list[int] = []

    def hides(s: RoutingSession) -> None:
        runs.append(1)
        s.execute(RAISE)
        s.connection().exec_driver_sql(sql)
        proxy.lose("UPDATE item", answer=False)
        s.execute(RAISE)

    with pytest.raises(DBAPIError):
        router.run_transaction(sessions(router), hides)
    assert runs == [1]
    assert stock(cluster) == 10 + 1 + sql.count("UPDATE")
    assert no_connection_is_left(router)


# -- reported as done, and not done ---------------------------------------------------------------------------------


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


def test_a_loss_in_sqlalchemys_initialize_is_a_lost_connection(
    cluster: PostgresCluster, proxy: FaultProxy, make_router: MakeRouter
) -> None:
    """A connection that is lost while SQLAlchemy initializes its dialect is a lost connection."""
    router = make_router(through(proxy, cluster))
    dialect = router.writer_engine().dialect
    look, looks = dialect.initialize, []

    def initialize(connection: Connection) -> None:
        look(connection)
        looks.append(connection.scalar(text("SELECT 1")))
        if len(looks) == 1:
            proxy.reset_all()

    dialect.initialize = initialize  # type: ignore[method-assign]
    with router.connect() as connection:
        assert connection.scalar(text("SELECT 1")) == 1
    assert looks == [1, 1]


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


# -- what an error says ---------------------------------------------------------------------------------------------


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


# -- stuck, or left behind ------------------------------------------------------------------------------------------


def test_a_question_to_an_unused_server_ends_when_it_freezes(cluster: PostgresCluster, make: MakeRouter) -> None:
    """A thread that asks a server that no unit has used is woken when the server freezes."""
    router = make(probe_timeout=0.5)
    reader = router.topology.readers[0]
    assert reader.id not in router._engines._engines
    (server,) = [r for r in cluster.readers if r.address == reader.id]
    with router._engines.outside(reader) as connection, ThreadPoolExecutor(1) as threads:
        connection.exec_driver_sql("SELECT 1")
        cluster.freeze(server)
        asked = threads.submit(connection.exec_driver_sql, "SELECT 1")
        try:
            with pytest.raises(DBAPIError):
                asked.result(timeout=30)
        finally:
            cluster.thaw(server)


@pytest.mark.parametrize("check", ["xid", "table"])
def test_a_full_pool_of_units_that_resolve_commits_ends(
    cluster: PostgresCluster, proxy: FaultProxy, make: MakeRouter, heard: list[events.Event], check: str
) -> None:
    """Units that fill the pool and ask for the outcome of their commits all come to an end."""
    router = make(engine_options={"pool_size": 2, "max_overflow": 0}, connects_at_once=1)
    proxy.lose("COMMIT", answer=True, times=8)
    with ThreadPoolExecutor(12) as threads:
        runs = [threads.submit(router.run_transaction, sessions(router), raise_stock, commit_check=check) for _ in range(24)]
        assert sorted(run.result(timeout=60) for run in runs) == list(range(11, 35))
    assert stock(cluster) == 34
    assert any(isinstance(e, events.CommitResolved) for e in heard)
    assert no_connection_is_left(router)


@pytest.mark.parametrize("committed", [True, False])
def test_a_reset_that_psycopg_overlooks_is_a_lost_connection(
    cluster: PostgresCluster, router: Router, monkeypatch: pytest.MonkeyPatch, committed: bool
) -> None:
    """A reset that the driver reports without marking its connection as closed is a lost connection.

    If the kernel reports a reset a moment before it can be read, psycopg goes on calling its connection usable.
    """
    commit = psycopg.Connection.commit
    left = ["one"]

    def reset(connection: psycopg.Connection[Any]) -> None:
        if committed or not left:
            commit(connection)
        if left:
            left.clear()
            raise psycopg.OperationalError("connection socket closed")

    monkeypatch.setattr(psycopg.Connection, "commit", reset)
    assert router.run_transaction(sessions(router), raise_stock) == 11
    assert stock(cluster) == 11
    assert no_connection_is_left(router)


def test_a_connection_with_a_closed_socket_is_not_reused(router: Router, monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection whose socket the driver found closed is not used again."""
    wait = psycopg.Connection.wait

    def reset(connection: psycopg.Connection[Any], *args: Any, **kwargs: Any) -> Any:
        monkeypatch.setattr(psycopg.Connection, "wait", wait)
        raise psycopg.OperationalError("connection socket closed")

    with router.connect() as connection:
        lost = connection.connection.driver_connection
        monkeypatch.setattr(psycopg.Connection, "wait", reset)
        with pytest.raises(DBAPIError) as caught:
            connection.execute(RAISE)
        assert caught.value.connection_invalidated
        assert classify_error(caught.value).safe_to_repeat
        assert lost is not None
        assert lost.closed
    assert no_connection_is_left(router)


def interrupted(Session: sessionmaker[RoutingSession]) -> None:
    """A unit that Ctrl-C ends."""
    with Session() as s:
        s.execute(text("SELECT 1"))
        raise KeyboardInterrupt


def test_reads_that_fail_give_the_writers_places_back(cluster: PostgresCluster, proxy: FaultProxy, make: MakeRouter) -> None:
    router = make(engine_options={"pool_size": 4, "max_overflow": 0}, writer_share_for_reads=0.5)
    for reader in cluster.readers:
        cluster.kill(reader)
    eventually(lambda: not router.topology.readers)
    for read_only in (True, None):
        with sessions(router, read_only=read_only)() as s:
            assert s.get_one(Item, 1).stock == 10
            assert router.stats().writer_read_slots_in_use == 1
        with pytest.raises(DBAPIError), sessions(router, read_only=read_only)() as s:
            s.execute(text("SELECT 1 / 0"))
        with pytest.raises(KeyboardInterrupt):
            interrupted(sessions(router, read_only=read_only))
        with sessions(router, read_only=read_only)() as s:
            proxy.lose("SELECT 17", answer=False)
            try:
                s.execute(text("SELECT 17"))
            except DBAPIError:
                s.rollback()
            s.connection().detach()
        with sessions(router, read_only=read_only)() as s:
            s.execute(text("SELECT 1"))
            s.connection().invalidate()
        assert router.stats().writer_read_slots_in_use == 0
    with router.connect(read_only=True) as connection:
        proxy.reset_all()
        with pytest.raises(DBAPIError):
            connection.exec_driver_sql("SELECT nothing_of_that_name")
    raw = router.raw_connection(read_only=True)
    raw.close()
    assert router.stats().writer_read_slots_in_use == 0
    assert no_connection_is_left(router)


def test_a_listener_can_read_after_an_unanswered_commit(proxy: FaultProxy, router: Router) -> None:
    """A listener that reads after a COMMIT whose answer was lost gets its rows."""
    seen: list[int] = []
    Session = sessions(router)

    @event.listens_for(Session, "after_commit")
    def look(s: RoutingSession) -> None:
        with Session() as another:
            seen.append(another.get_one(Item, 1, populate_existing=True).stock)

    proxy.lose("COMMIT", answer=True)
    router.run_transaction(Session, raise_stock)
    assert proxy._losing == []
    assert seen
    assert no_connection_is_left(router)


def test_an_interrupted_commit_leaves_no_connection_or_lock(cluster: PostgresCluster, router: Router) -> None:
    """A COMMIT that is interrupted while it waits leaves no connection and no lock."""
    cluster.execute("""
        CREATE OR REPLACE FUNCTION dawdle() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN PERFORM pg_sleep(60); RETURN NULL; END';
        DROP TABLE IF EXISTS slow; CREATE TABLE slow (n int); GRANT ALL ON slow TO app;
        CREATE CONSTRAINT TRIGGER slowly AFTER INSERT ON slow DEFERRABLE INITIALLY DEFERRED
        FOR EACH ROW EXECUTE FUNCTION dawdle()""")
    waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'PgSleep'"

    def interrupt() -> None:
        eventually(lambda: cluster.execute(waiting) == [(1,)])
        signal.raise_signal(signal.SIGINT)

    with ThreadPoolExecutor(1) as threads:
        asked = threads.submit(interrupt)
        with pytest.raises(KeyboardInterrupt):
            router.run_transaction(sessions(router), lambda s: s.execute(text("INSERT INTO slow VALUES (1)")))
        asked.result()
    eventually(lambda: cluster.execute(waiting) == [(0,)])
    assert no_connection_is_left(router)
    assert cluster.execute("SELECT count(*) FROM slow") == [(0,)]


def test_a_transaction_set_read_only_by_itself_can_be_noted(router: Router) -> None:
    """A transaction that makes itself read-only can be noted before its COMMIT."""

    def reads(s: RoutingSession) -> int:
        s.execute(text("SET TRANSACTION READ ONLY"))
        return s.get_one(Item, 1).stock

    assert router.run_transaction(sessions(router), reads) == 10


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


def test_a_copy_lost_half_way_is_the_drivers_error(cluster: PostgresCluster, proxy: FaultProxy, router: Router) -> None:
    """A COPY that is lost half way raises the driver's error, and is done at most once."""
    cluster.execute("CREATE TABLE IF NOT EXISTS heap (n int); TRUNCATE heap; GRANT ALL ON heap TO app")
    runs: list[int] = []

    def copies(s: RoutingSession) -> None:
        runs.append(1)
        driver: Any = s.connection().connection.driver_connection
        with driver.cursor().copy("COPY heap FROM STDIN") as copy:
            copy.write("1\n2\n")
            proxy.reset_all()

    with pytest.raises(psycopg.OperationalError) as caught:
        router.run_transaction(sessions(router), copies)
    assert runs == [1]
    assert not classify_error(caught.value).safe_to_repeat
    assert cluster.execute("SELECT count(*) FROM heap") == [(0,)]
    assert no_connection_is_left(router)


def test_a_unit_that_is_interrupted_while_it_asks_leaves_nothing(
    cluster: PostgresCluster, proxy: FaultProxy, router: Router, heard: list[events.Event]
) -> None:
    interrupted = threading.Event()

    class Interrupts(list[events.Event]):
        def append(self, event: events.Event) -> None:
            if isinstance(event, events.CommitResolved):
                interrupted.set()
                raise KeyboardInterrupt

    router.dispatcher.listeners = (Interrupts().append,)
    proxy.lose("COMMIT", answer=True)
    with pytest.raises(KeyboardInterrupt):
        router.run_transaction(sessions(router), raise_stock)
    assert interrupted.is_set()
    router.dispatcher.listeners = ()
    assert no_connection_is_left(router)
    assert router.run_transaction(sessions(router), raise_stock) == 12
