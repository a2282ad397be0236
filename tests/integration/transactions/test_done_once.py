"""What a unit has done is there once: notifications, COPY, savepoints, temporary tables, commits in two phases or in a text."""

from __future__ import annotations

from typing import Any

import psycopg
import pytest
from sqlalchemy import insert, text
from sqlalchemy.exc import DBAPIError, IntegrityError

from aurora_router import OutcomeUnknown, Router, RoutingSession, classify_error
from aurora_router.local import FaultProxy, PostgresCluster
from tests.integration.shop import RAISE, Item, no_connection_is_left, sessions, stock


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
