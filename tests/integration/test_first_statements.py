"""The first statement of a transaction goes to PostgreSQL together with BEGIN, and does what it does in psycopg."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.exc import DBAPIError, OperationalError, SQLAlchemyError

from aurora_router import Router
from aurora_router.local import FaultProxy, PostgresCluster
from tests.integration.shop import RAISE, end_connections, eventually, no_connection_is_left, sessions, stock, through
from tests.interruptions import Interrupted, SoftTimeLimitExceeded, interrupted_at_each_line

MakeRouter = Callable[..., Router]


@pytest.fixture
def plain(cluster: PostgresCluster) -> Iterator[Engine]:
    """An engine of the writer, without a router."""
    engine = create_engine(cluster.url)
    yield engine
    engine.dispose()


@pytest.fixture
def only(cluster: PostgresCluster, proxy: FaultProxy, make_router: MakeRouter) -> Router:
    """A router with one connection to the writer, which leads through the proxy, and few probes."""
    options = {"pool_size": 1, "max_overflow": 0}
    router = make_router(through(proxy, cluster), engine_options=options, probe_interval=60, failover_timeout=20.0)
    router.connect().close()
    return router


def raise_stock(router: Router) -> None:
    with sessions(router)() as s:
        s.execute(RAISE)
        s.commit()


def test_a_write_and_its_commit_take_two_round_trips(proxy: FaultProxy, only: Router) -> None:
    """A write and its COMMIT take two round trips, before and after psycopg prepares the statement."""
    raise_stock(only)
    taken = []
    for _ in range(10):
        proxy.reset_counts()
        raise_stock(only)
        taken.append((proxy.syncs, len(proxy.statements)))
    assert taken == [(2, 3)] * 10
    assert proxy.statements[0] == "BEGIN"


def test_a_read_only_unit_takes_two_round_trips(proxy: FaultProxy, only: Router) -> None:
    """A unit that is declared read-only takes one round trip for its statement, and one for its ROLLBACK."""
    with only.connect() as connection:  # on the writer, which is behind the proxy
        connection.execution_options(postgresql_readonly=True)
        proxy.reset_counts()
        assert connection.scalar(text("SELECT count(*) FROM item WHERE id < :id"), {"id": 3}) == 2
        connection.rollback()
    assert proxy.syncs == 2
    assert [statement.partition(" WHERE")[0] for statement in proxy.statements] == [
        "BEGIN READ ONLY",
        "SELECT count(*) FROM item",
        "ROLLBACK",
    ]


RULE = """CREATE OR REPLACE VIEW ruled AS SELECT id FROM item; GRANT ALL ON ruled TO app;
CREATE OR REPLACE RULE instead AS ON INSERT TO ruled DO INSTEAD SELECT 42 AS found, NEW.id"""
STATEMENTS: dict[str, tuple[str, Any]] = {
    "no table": ("SELECT * FROM nowhere", None),
    "no keyword": ("SELEC 1", None),
    "no grammar": ("SELECT FROM WHERE", None),
    "a violation": ("INSERT INTO item (id) VALUES (%s)", (1,)),
    "a violation at the COMMIT": ("INSERT INTO late VALUES (1, 77)", None),
    "two statements": ("SELECT 1; SELECT 2", None),
    "two statements and a parameter": ("SELECT %s; SELECT 2", (1,)),
    "two statements and a parameter that neither names": ("SELECT 1; SELECT 2", {"unused": 1}),
    "a semicolon at the end": ("SELECT 1;", None),
    "a parameter of the server's that is missing": ("SELECT $1", None),
    "a parameter that is missing": ("SELECT %s, %s", (1,)),
    "a named parameter that is missing": ("SELECT %(a)s", {"b": 1}),
    "a parameter of no type that can be sent": ("SELECT %s", (object(),)),
    "a parameter with a zero byte": ("SELECT %s", ("a\0b",)),
    "a large parameter": ("SELECT length(%s)", (b"x" * 5_000_000,)),
    "a large answer": ("SELECT repeat('x', 3000000)", None),
    "many rows": ("SELECT g FROM generate_series(1, 100000) g", None),
    "a percent sign": ("SELECT '%'", None),
    "two percent signs and a parameter": ("SELECT '%%' || %s", ("a",)),
    "COPY": ("COPY item FROM STDIN", None),
    "COPY behind a comment": ("/* SELECT */ COPY (SELECT 1) TO STDOUT", None),
    "COPY behind a comment in a comment": ("/* /* */ SELECT */ COPY (SELECT 1) TO STDOUT", None),
    "VACUUM": ("VACUUM item", None),
    "nothing": ("", None),
    "a comment": ("-- SELECT", None),
    "a lock": ("LOCK TABLE item IN EXCLUSIVE MODE", None),
    "a level": ("SET TRANSACTION ISOLATION LEVEL SERIALIZABLE", None),
    "a setting": ("SET LOCAL search_path = extra", None),
    "a time limit": ("SELECT set_config('statement_timeout', '100', true)", None),
    "an error of execution": ("SELECT 1 / 0", None),
    "a changing CTE": ("WITH n AS (INSERT INTO item VALUES (9, 'nine', 0) RETURNING id) SELECT id FROM n", None),
    "SELECT INTO": ("SELECT 1 AS n INTO made", None),
    "no column": ("SELECT", None),
    "a block": ("DO $$ BEGIN PERFORM 1; END $$", None),
    "a savepoint": ("SAVEPOINT a", None),
    "ROLLBACK": ("ROLLBACK", None),
    "BEGIN": ("BEGIN", None),
    "the end of its connection": ("SELECT pg_terminate_backend(pg_backend_pid())", None),
    "a rule": ("INSERT INTO ruled VALUES (1)", None),
    "a rule and a parameter": ("INSERT INTO ruled VALUES (%s)", (1,)),
    "too many parameters": ("SELECT " + ", ".join(["%s"] * 65536), tuple(range(65536))),
    "COPY behind a line": ("--\rCOPY item FROM STDIN\nWITH (FORMAT csv)", None),
    "NOTIFY": ("NOTIFY somebody", None),
    "its own portal": ("SELECT count(*) FROM pg_cursors", None),
    "its own portal and a parameter": ("SELECT count(*) FROM pg_cursors WHERE name <> %s", ("mine",)),
}


def seen(connection: Connection, sql: str, parameters: Any) -> list[Any]:
    """What an application sees of a unit that begins with this statement."""
    driver: Any = connection.connection.dbapi_connection

    def outcome(work: Callable[[], object]) -> object:
        try:
            return work()
        except SQLAlchemyError as error:
            said = getattr(error, "orig", None)
            lost = getattr(error, "connection_invalidated", None)
            return type(error), type(said), getattr(said, "sqlstate", None), str(error), lost

    def first() -> object:
        result = connection.exec_driver_sql(sql, parameters)
        rows = result.fetchall() if result.returns_rows else []
        return result.rowcount, list(result.keys()) if result.returns_rows else None, rows[-3:]

    return [
        outcome(first),
        driver.info.transaction_status.name,
        outcome(lambda: connection.exec_driver_sql("SELECT 7").scalar()),
        outcome(connection.commit),
        outcome(lambda: connection.exec_driver_sql("SELECT * FROM item ORDER BY id").fetchall()),
    ]


@pytest.mark.parametrize("kind", STATEMENTS)
def test_a_first_statement_shows_what_it_shows_in_psycopg(
    cluster: PostgresCluster, plain: Engine, router: Router, kind: str
) -> None:
    """Rows, errors, the state of the connection and what follows are those of an engine without a router."""
    cluster.execute("CREATE TABLE IF NOT EXISTS late (id int, item bigint REFERENCES item DEFERRABLE INITIALLY DEFERRED)")
    cluster.execute("GRANT ALL ON late TO app")
    cluster.execute(RULE)
    found = []
    for connect in (plain.connect, router.connect):
        cluster.execute("DELETE FROM item WHERE id = 9")
        cluster.execute("DROP TABLE IF EXISTS made")
        connection = connect()
        found.append(seen(connection, *STATEMENTS[kind]))
        connection.invalidate()
        connection.close()
    cluster.execute("DROP TABLE late; DROP VIEW ruled")
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("drop", "runs", "begins"),
    [
        # psycopg's own DEALLOCATE ALL is seen on its way, so that no BEGIN fails. psycopg sends one if it has prepared something.
        ("ROLLBACK", 8, 1),
        ("DISCARD ALL", 8, 1),
        ("DISCARD ALL", 1, 2),
        ("DEALLOCATE ALL", 1, 2),
    ],
)
def test_a_connection_on_which_all_was_dropped_begins_anew(
    proxy: FaultProxy, only: Router, drop: str, runs: int, begins: int
) -> None:
    """Whoever drops what is prepared on a connection, its next transactions begin as before."""
    for _ in range(2):
        for _ in range(runs):
            raise_stock(only)
        raw = only.raw_connection()
        driver: Any = raw.dbapi_connection
        if drop == "ROLLBACK":
            raw.cursor().execute("SELECT 1")
            raw.rollback()
        else:
            driver.autocommit = True
            raw.cursor().execute(drop)
        raw.close()
        proxy.reset_counts()
        raise_stock(only)
        assert proxy.statements.count("BEGIN") == begins
    assert no_connection_is_left(only)


def test_a_name_that_is_taken_is_used(cluster: PostgresCluster, proxy: FaultProxy, only: Router) -> None:
    """A BEGIN that was prepared by an earlier client of the same server process is used."""
    raise_stock(only)
    raw = only.raw_connection()
    driver: Any = raw.dbapi_connection
    assert driver.begins
    driver.begins.clear()
    raw.close()
    before = stock(cluster)
    raise_stock(only)
    assert stock(cluster) == before + 1
    proxy.reset_counts()
    raise_stock(only)
    assert proxy.syncs == 2


@pytest.mark.parametrize("answer", [False, True])
def test_a_first_statement_that_is_lost_is_run_again(
    cluster: PostgresCluster, proxy: FaultProxy, only: Router, answer: bool
) -> None:
    """A unit whose connection is lost in its first round trip is told so, or runs again, and writes once."""
    before = stock(cluster)
    proxy.lose("UPDATE", answer=answer)
    with sessions(only)() as s, pytest.raises(OperationalError) as lost:
        s.execute(RAISE)
    assert lost.value.connection_invalidated
    proxy.lose("UPDATE", answer=answer)
    only.run_transaction(sessions(only), lambda s: s.execute(RAISE))
    assert stock(cluster) == before + 1
    assert no_connection_is_left(only)


def test_the_server_says_why_an_idle_connection_has_ended(cluster: PostgresCluster, plain: Engine, router: Router) -> None:
    """A connection that the server has ended between two transactions gives the error that psycopg gives."""
    found = []
    for connect in (plain.connect, router.connect):
        with connect() as connection:
            connection.execute(text("SELECT 1"))
            connection.commit()
            end_connections(cluster)
            with pytest.raises(DBAPIError) as ended:
                connection.execute(text("SELECT 1"))
            found.append((type(ended.value), type(ended.value.orig), ended.value.connection_invalidated))
    assert found[0] == found[1]


def test_ctrl_c_ends_the_first_statement_on_the_server(cluster: PostgresCluster, router: Router) -> None:
    """Ctrl-C ends a first statement on its server, and the connection harms no later unit."""
    sleeping = "SELECT count(*) FROM pg_stat_activity WHERE query LIKE '%pg_sleep(60)%' AND pid <> pg_backend_pid()"
    sleeps: Callable[[], Any] = lambda: cluster.execute(sleeping)[0][0]  # noqa: E731

    def interrupt() -> None:
        eventually(sleeps)
        os.kill(os.getpid(), signal.SIGINT)

    with router.connect() as connection:
        thread = threading.Thread(target=interrupt)
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            connection.execute(text("SELECT pg_sleep(60)"))
        thread.join()
        eventually(lambda: not sleeps())
    with router.connect() as connection:
        assert connection.scalar(text("SELECT 1")) == 1


@pytest.mark.parametrize("by", [Interrupted, SoftTimeLimitExceeded])
def test_an_interrupted_first_statement_leaves_no_half_of_it(
    cluster: PostgresCluster, only: Router, by: type[BaseException]
) -> None:
    """Wherever it is interrupted, what follows on its connection has the right answers in a transaction, or fails."""
    raise_stock(only)
    numbers = iter(range(1, 1_000_000))
    raw = only.raw_connection()

    def first() -> None:
        raw.cursor().execute("UPDATE item SET stock = %s WHERE id = 2", (next(numbers),))

    for _ in interrupted_at_each_line(first, "drivers/psycopg_classes.py", each="opcode", by=by):
        number = next(numbers)
        try:
            cursor = raw.cursor()
            cursor.execute("SELECT %s", (number,))
            assert cursor.fetchall() == [(number,)]
            raw.rollback()
        except psycopg.Error:
            raw.invalidate()
            raw.close()
            raw = only.raw_connection()
        assert cluster.execute("SELECT stock FROM item WHERE id = 2")[0][0] == 20
    raw.close()
    assert no_connection_is_left(only)


class Own(psycopg.Cursor[Any]):
    """A cursor class of the application's."""


def test_an_interruption_that_is_kept_keeps_no_answers(router: Router) -> None:
    """While the exception of an interruption is handled, no other statement of its connection gets its rows, or waits."""
    raw = router.raw_connection()
    driver: Any = raw.dbapi_connection
    driver.execute("SELECT 1")
    driver.rollback()
    before = signal.signal(signal.SIGALRM, raises_a_time_limit)
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    try:
        driver.execute("SELECT 'theirs', pg_sleep(60)")
    except SoftTimeLimitExceeded:
        with pytest.raises(psycopg.OperationalError):
            psycopg.RawCursor(driver).execute("SELECT $1::text", ["mine"])
        with pytest.raises(psycopg.OperationalError):
            driver.cursor().executemany("SELECT %s", [("mine",)])
    finally:
        signal.signal(signal.SIGALRM, before)
    raw.invalidate()
    raw.close()


def raises_a_time_limit(*_: object) -> None:
    raise SoftTimeLimitExceeded


def test_a_first_statement_keeps_no_snapshot(cluster: PostgresCluster, plain: Engine, router: Router) -> None:
    """A read that has ended holds back no vacuum, and no replay on a reader, while its transaction goes on."""
    held = "SELECT backend_xmin::text FROM pg_stat_activity WHERE usename = 'app' AND state = 'idle in transaction'"
    for connect in (plain.connect, router.connect):
        with connect() as connection:
            connection.execute(text("SELECT * FROM item LIMIT 1")).all()
            assert cluster.execute(held) == [(None,)]


def test_an_applications_own_cursors_stay(cluster: PostgresCluster, make_router: MakeRouter) -> None:
    """If the application has chosen a class of cursors, the router changes nothing about it."""
    router = make_router(engine_options={"connect_args": {"cursor_factory": Own}})
    with router.connect() as connection:
        driver: Any = connection.connection.dbapi_connection
        assert type(driver.cursor()) is Own
        assert connection.scalar(text("SELECT 1")) == 1


def test_an_applications_own_pipeline_stays(cluster: PostgresCluster, router: Router) -> None:
    """In a pipeline of psycopg's own, the statements go as psycopg sends them."""
    raw = router.raw_connection()
    driver: Any = raw.dbapi_connection
    with driver.pipeline():
        first, second = (driver.execute("SELECT %s::int", (number,)) for number in (1, 2))
        assert (first.fetchone(), second.fetchone()) == ((1,), (2,))
    raw.rollback()
    raw.close()
