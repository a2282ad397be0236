"""Effects that a rollback does not undo: a failed attempt leaves none to the next one, and writes nothing twice."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from sqlalchemy import select, text, update
from sqlalchemy.exc import IntegrityError, OperationalError

from aurora_router import Router, RoutingSession
from aurora_router.local.cluster import Cluster
from tests.integration.mysql_family import deadlock
from tests.integration.shop import BOTH, Item, engine, sessions, until_readers_serve

MakeRouter = Callable[..., Router]

MYSQL = {
    "a lock": ["SELECT GET_LOCK('mine', 5)"],
    "a temporary table": ["CREATE TEMPORARY TABLE mine (n int)", "INSERT INTO mine VALUES (1)"],
    "a setting": ["SET SESSION sql_mode = ''"],
    "a variable": ["SET @mine = 7"],
    "a lock in a change": ["INSERT INTO part (id) SELECT 77 FROM (SELECT 1) one WHERE GET_LOCK/**/('mine', 5)"],
}
TRACES = {
    "postgresql": {
        "a lock": ["SELECT pg_advisory_lock(7)"],
        "a lock, spelled otherwise": ['SELECT "pg_advisory_lock" /* mine */ (7)'],
        "a lock in a change": ["INSERT INTO part (id) SELECT 77 FROM pg_advisory_lock/**/(7)"],
        "a prepared statement": ["PREPARE mine AS SELECT 1"],
    },
    "mariadb": MYSQL,
    "mysql": MYSQL,
}


@pytest.fixture
def router(make_router: MakeRouter) -> Router:
    router = make_router()
    until_readers_serve(router, 2)
    router.init_commit_table()
    return router


def driver_of(session: RoutingSession) -> int:
    """The server's id of the connection on the writer, found without a call of session.connection()."""
    session.execute(select(1), execution_options={"route": "writer"})
    transaction: Any = session.get_transaction()
    driver = next(iter(transaction._connections.values()))[0].connection.driver_connection
    return int(driver.info.backend_pid if hasattr(driver, "info") else driver.thread_id())


def run_twice(router: Router, statements: list[str]) -> list[int]:
    """Send the statements in two attempts, of which the first fails, and return the ids of their connections."""
    connections: list[int] = []

    def work(s: RoutingSession) -> None:
        s.scalar(select(Item.stock).where(Item.id == 1))
        connections.append(driver_of(s))
        for statement in statements:
            s.execute(text(statement))
        if len(connections) == 1:
            s.add(Item(id=1))
            s.flush()

    router.run_transaction(sessions(router), work)
    assert len(connections) == 2
    return connections


@BOTH
def test_a_failed_attempts_connection_is_not_used_again(cluster: Cluster[Any], router: Router) -> None:
    """The next attempt has another connection, so it meets no locks, temporary tables, settings or the like."""
    for statements in TRACES[engine(cluster)].values():
        first, second = run_twice(router, statements)
        assert first != second


@BOTH
@pytest.mark.parametrize("ends", ["COMMIT", "CREATE TABLE IF NOT EXISTS made (n int)"])
def test_an_attempt_that_fails_after_a_commit_leaves_none(cluster: Cluster[Any], make_router: MakeRouter, ends: str) -> None:
    """A function that commits in between is not run again, and the next unit does not get its connection."""
    router = make_router(engine_options={"pool_size": 1, "max_overflow": 0})
    until_readers_serve(router, 2)
    router.init_commit_table()
    connections: list[int] = []

    def work(s: RoutingSession) -> None:
        connections.append(driver_of(s))
        s.execute(text(TRACES[engine(cluster)]["a lock"][0]))
        s.execute(text(ends))
        raise LookupError

    with pytest.raises(LookupError):
        router.run_transaction(sessions(router), work)
    with sessions(router)() as s:
        assert driver_of(s) not in connections
    assert len(connections) == 1


def commits_by_the_pool(session: RoutingSession, write: str) -> None:
    raw = session.connection().connection
    raw.cursor().execute(write)
    raw.commit()


def commits_by_the_driver(session: RoutingSession, write: str) -> None:
    driver: Any = session.connection().connection.driver_connection
    driver.cursor().execute(write)
    driver.cursor().execute("COMMIT")


def commits_by_a_cursor(session: RoutingSession, write: str) -> None:
    driver: Any = session.connection().execute(select(1)).cursor.connection
    driver.cursor().execute(write)
    driver.commit()


@BOTH
@pytest.mark.parametrize("commits", [commits_by_the_pool, commits_by_the_driver, commits_by_a_cursor])
def test_what_the_driver_has_committed_is_not_done_twice(
    cluster: Cluster[Any], router: Router, commits: Callable[[RoutingSession, str], None]
) -> None:
    """A function that commits on the driver's own connection is not run again, however it got that connection."""
    runs: list[int] = []

    def work(s: RoutingSession) -> None:
        runs.append(1)
        s.scalar(select(Item.stock).where(Item.id == 1))
        commits(s, "UPDATE item SET stock = stock + 1 WHERE id = 2")
        if len(runs) == 1:
            s.add(Item(id=1))

    with pytest.raises(IntegrityError):
        router.run_transaction(sessions(router), work)
    assert cluster.execute("SELECT stock FROM item WHERE id = 2") == [(21,)]
    assert runs == [1]


@BOTH
def test_an_attempt_that_only_used_the_driver_is_retried(cluster: Cluster[Any], router: Router) -> None:
    """Without a commit the statements on the driver's own connection are part of the unit."""
    runs: list[int] = []

    def work(s: RoutingSession) -> None:
        runs.append(1)
        s.scalar(select(Item.stock).where(Item.id == 1))
        s.connection().connection.cursor().execute("UPDATE item SET stock = stock + 1 WHERE id = 2")
        if len(runs) == 1:
            s.add(Item(id=1))

    router.run_transaction(sessions(router), work)
    assert cluster.execute("SELECT stock FROM item WHERE id = 2") == [(21,)]
    assert runs == [1, 1]


@BOTH
def test_a_failed_attempt_that_only_wrote_keeps_its_connection(cluster: Cluster[Any], router: Router) -> None:
    """If a rollback undoes all, the connection stays: a new one would cost more than the conflict itself."""
    first, second = run_twice(router, ["UPDATE item SET stock = stock + 1 WHERE id = 2", "SELECT * FROM item FOR UPDATE"])
    assert first == second


@pytest.fixture(params=["MyISAM", "Aria", "MEMORY"])
def journal(cluster: Cluster[Any], request: pytest.FixtureRequest) -> Iterator[str]:
    """A table without transactions."""
    kind = "MyISAM" if engine(cluster) == "mysql" and request.param == "Aria" else request.param  # Aria is MariaDB's alone
    cluster.execute("DROP TABLE IF EXISTS journal")
    cluster.execute(f"CREATE TABLE journal (line varchar(20)) ENGINE={kind}")
    cluster.wait_in_sync()
    yield "journal"
    cluster.execute("DROP TABLE journal")


def fails_once(router: Router, match: str, work: Callable[[RoutingSession], None], **options: Any) -> None:
    """Expect a unit to fail by this error of the server, and not to run again, although a second attempt would succeed."""
    runs: list[int] = []

    def fail_first(s: RoutingSession) -> None:
        runs.append(1)
        if len(runs) == 1:
            work(s)

    with pytest.raises((IntegrityError, OperationalError), match=match):
        router.run_transaction(sessions(router), fail_first, **options)
    assert runs == [1]


def write_here(s: RoutingSession, journal: str) -> None:
    """Write what a rollback leaves in place, and what it undoes."""
    s.execute(text(f"INSERT INTO {journal} VALUES ('here')"))
    s.execute(update(Item).where(Item.id == 1).values(stock=Item.stock + 1))


@pytest.mark.engines("mariadb", "mysql")
def test_what_is_not_undone_is_not_done_twice(cluster: Cluster[Any], router: Router, journal: str) -> None:
    """A unit that wrote to a table without transactions is not run again."""

    def work(s: RoutingSession) -> None:
        s.scalar(select(Item.stock).where(Item.id == 1))
        s.execute(text(f"INSERT INTO {journal} VALUES ('here')"))
        s.add(Item(id=1))

    fails_once(router, "1062", work)
    assert cluster.execute("SELECT count(*) FROM journal") == [(1,)]
    router.run_transaction(sessions(router), lambda s: s.add(Item(id=9)))


@pytest.mark.engines("mariadb", "mysql")
@pytest.mark.parametrize("kept", [0, 64])
@pytest.mark.parametrize("error", [1062, 1213], ids=["its own error", "a deadlock"])
def test_a_row_that_stays_without_a_warning_is_written_once(
    cluster: Cluster[Any], router: Router, journal: str, kept: int, error: int
) -> None:
    """What a rollback leaves in place is known even if the connection keeps no warnings (max_error_count)."""

    def work(s: RoutingSession) -> None:
        s.scalar(select(Item.stock).where(Item.id == 1))
        s.execute(text(f"SET SESSION max_error_count = {kept}"))
        write_here(s, journal)
        if error == 1213:
            deadlock(cluster, s, f"INSERT INTO {journal} VALUES ('there')")
        else:
            s.add(Item(id=2))

    fails_once(router, str(error), work)
    assert cluster.execute("SELECT count(*) FROM journal WHERE line = 'here'") == [(1,)]


@pytest.mark.engines("mariadb", "mysql")
@pytest.mark.parametrize("check", [None, "table"])
@pytest.mark.parametrize("goes_on", [True, False], ids=["goes on", "ends"])
def test_a_swallowed_deadlock_writes_no_row_twice(
    cluster: Cluster[Any], router: Router, journal: str, check: Any, goes_on: bool
) -> None:
    """A unit that wrote to a table without transactions is not run again if its COMMIT reveals a rollback."""

    def work(s: RoutingSession) -> None:
        write_here(s, journal)
        with pytest.raises(OperationalError, match="1213"):
            deadlock(cluster, s, f"INSERT INTO {journal} VALUES ('there')")
        if goes_on:
            s.execute(update(Item).where(Item.id == 3).values(stock=Item.stock + 1))

    fails_once(router, "1213", work, commit_check=check)
    assert cluster.execute("SELECT count(*) FROM journal WHERE line = 'here'") == [(1,)]


@pytest.mark.engines("mariadb", "mysql")
@pytest.mark.parametrize("check", [None, "table"])
def test_a_refused_commit_writes_no_row_twice(cluster: Cluster[Any], router: Router, journal: str, check: Any) -> None:
    """A unit that wrote without transactions is not run again if the writer is made read-only before its COMMIT."""

    def work(s: RoutingSession) -> None:
        write_here(s, journal)
        cluster._order(cluster.writer, "SET GLOBAL read_only = ON")

    try:
        fails_once(router, "read-only", work, commit_check=check, deadline=3.0)
    finally:
        cluster._order(cluster.writer, "SET GLOBAL read_only = OFF")
    assert cluster.execute("SELECT count(*) FROM journal") == [(1,)]
