"""Streamed results that are not read to their end leave nothing behind, however they were abandoned."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.engine import Result

from aurora_router import Router, RoutingSession
from aurora_router.local import PostgresCluster
from aurora_router.local.cluster import Cluster
from tests.integration.shop import BOTH, RAISE, engine, eventually, place, sessions, until_readers_serve

MakeRouter = Callable[..., Router]

ROWS = {
    "postgresql": "SELECT g AS n, repeat('x', 1000) AS t FROM generate_series(1, 20000) g",
    "mariadb": "SELECT seq AS n, repeat('x', 1000) AS t FROM extra.seq_1_to_20000",
}
STREAM = {"yield_per": 10}


@pytest.fixture
def query(cluster: Cluster[Any]) -> Any:
    """A query of 20,000 rows of 1 kB."""
    return text(ROWS[engine(cluster)])


@pytest.fixture
def only(cluster: Cluster[Any], make_router: MakeRouter) -> Router:
    """A router of one reader with one connection to each instance."""
    router = make_router(instances=[cluster.readers[0].address], engine_options={"pool_size": 1, "max_overflow": 0})
    until_readers_serve(router, 1)
    return router


def left_open(router: Router) -> int:
    """The number of named cursors on the pooled connection to the reader."""
    with router.connect(read_only=True) as connection:
        found: int = connection.scalar(text("SELECT count(*) FROM pg_cursors WHERE name <> ''"))
        return found


def temporary_bytes(cluster: PostgresCluster) -> int:
    found: int = cluster.execute("SELECT coalesce(sum(size), 0) FROM pg_ls_tmpdir()", instance=cluster.readers[0])[0][0]
    return found


def stop_by_break(s: RoutingSession, query: Any) -> None:
    for _ in s.execute(query, execution_options=STREAM):
        break


def stop_by_error(s: RoutingSession, query: Any) -> None:
    def fail() -> None:
        for row in s.execute(query, execution_options=STREAM):
            raise LookupError(row)

    with pytest.raises(LookupError):
        fail()


def stop_by_commit(s: RoutingSession, query: Any) -> None:
    assert s.execute(query, execution_options={"stream_results": True}).fetchone() is not None
    s.commit()


def stop_by_rollback(s: RoutingSession, query: Any) -> None:
    kept = s.execute(query, execution_options=STREAM)
    assert kept.fetchone() is not None
    s.rollback()


def stop_in_partitions(s: RoutingSession, query: Any) -> None:
    for _ in s.execute(query, execution_options=STREAM).partitions(5):
        break


def stop_by_closing(s: RoutingSession, query: Any) -> None:
    result = s.execute(query, execution_options=STREAM)
    result.fetchone()
    result.close()


def stop_by_moving(s: RoutingSession, query: Any) -> None:
    result = s.execute(query, execution_options=STREAM)
    result.fetchone()
    s.execute(RAISE)
    assert place(s) == "writer"
    s.commit()


def stop_in_the_session(s: RoutingSession, query: Any) -> None:
    s.execute(query, execution_options=STREAM).fetchone()
    s.close()


STOPS = [stop_by_break, stop_by_error, stop_by_commit, stop_by_rollback, stop_in_partitions, stop_in_the_session]
WAYS = [(read_only, stop) for stop in STOPS for read_only in (None, True)] + [(None, stop_by_moving)]


@pytest.mark.parametrize(("read_only", "stop"), [*WAYS, (None, stop_by_closing), (True, stop_by_closing)])
def test_a_stream_leaves_no_cursor(
    cluster: PostgresCluster, only: Router, query: Any, stop: Callable[[RoutingSession, Any], None], read_only: bool | None
) -> None:
    """No cursor, and no temporary file of one, is left on the reader, however the loop over a stream ends."""
    before = temporary_bytes(cluster)
    for _ in range(2):
        with sessions(only, read_only=read_only)() as s:
            stop(s, query)
    assert left_open(only) == 0
    assert temporary_bytes(cluster) == before


def test_streams_of_one_unit_do_not_pile_up(cluster: PostgresCluster, only: Router, query: Any) -> None:
    """A unit that abandons one stream after the other keeps open only the last one, and those it still reads."""
    before = temporary_bytes(cluster)
    with sessions(only)() as s:
        kept = s.execute(text("SELECT g FROM generate_series(1, 1000) g"), execution_options=STREAM)
        assert kept.fetchone() == (1,)
        for _ in range(5):
            stop_by_break(s, query)
            gc.collect()
        assert temporary_bytes(cluster) - before < 2 * 20_000_000, "one of them takes 20 MB"
        assert place(s) == "reader"
        assert sum(1 for _ in kept) == 999
    assert left_open(only) == 0


def test_a_stream_outside_of_a_transaction_leaves_no_cursor(only: Router, query: Any) -> None:
    """A stream of a connection in autocommit, without a session, leaves no cursor."""
    with only.connect(read_only=True) as connection:
        free = connection.execution_options(isolation_level="AUTOCOMMIT")
        free.execute(query, execution_options=STREAM).fetchone()
    assert left_open(only) == 0


def test_a_stream_closed_after_its_unit_disturbs_nobody(only: Router, query: Any, caplog: pytest.LogCaptureFixture) -> None:
    """A stream closed after its unit, whose cursor is gone by then, does not disturb the connection's next unit."""
    with sessions(only)() as s:
        streamed = s.execute(query, execution_options=STREAM)
        streamed.fetchone()
        assert place(s) == "reader"
    with sessions(only)(read_only=True) as s:
        assert s.scalar(text("SELECT 1")) == 1
        streamed.close()
        assert s.scalar(text("SELECT 2")) == 2
    assert caplog.records == []


def test_a_connection_without_a_stream_is_told_nothing(only: Router, cluster: PostgresCluster) -> None:
    """A stream that was read to its end costs no round trip when its connection is released."""
    with sessions(only)() as s:
        assert sum(1 for _ in s.execute(text("SELECT g FROM generate_series(1, 100) g"), execution_options=STREAM)) == 100
    seen = cluster.execute("SELECT query FROM pg_stat_activity WHERE usename = 'app'", instance=cluster.readers[0])
    assert not any("CLOSE ALL" in query for (query,) in seen)


@BOTH
def test_run_transaction_commits_beside_a_stream(cluster: Cluster[Any], only: Router, query: Any) -> None:
    """A unit whose stream is open on the reader moves to the writer and commits there, with a commit check."""
    only.init_commit_table()
    opened: list[Result[Any]] = []

    def work(s: RoutingSession) -> None:
        opened.append(s.execute(query, execution_options=STREAM))
        opened[-1].fetchone()
        s.execute(RAISE)

    only.run_transaction(sessions(only), work)
    assert len(opened) == 1
    assert cluster.execute("SELECT stock FROM item WHERE id = 1")[0][0] == 11


ENDLESS = "SELECT a.seq AS n FROM extra.seq_1_to_100000 a JOIN extra.seq_1_to_100000 b"
"""A query that practically never ends."""


@pytest.fixture
def ends(cluster: Cluster[Any]) -> Callable[[], bool]:
    """A check whether the reader has ended all statements of the application's user."""
    look = "SELECT count(*) FROM information_schema.processlist WHERE user = 'app' AND info LIKE '%seq_1_to%'"
    return lambda: bool(cluster.execute(look, instance=cluster.readers[0]) == [(0,)])


@pytest.mark.engines("mariadb")
@pytest.mark.parametrize(("read_only", "stop"), WAYS)
def test_what_is_left_of_a_stream_is_not_read(
    only: Router, ends: Callable[[], bool], stop: Callable[[RoutingSession, Any], None], read_only: bool | None
) -> None:
    """PyMySQL would read a stream to its end before a rollback, so the connection is closed and the statement ends."""
    with sessions(only, read_only=read_only)() as s:
        stop(s, text(ENDLESS))
    with sessions(only)() as s:
        assert s.scalar(text("SELECT count(*) FROM item")) == 3
    eventually(ends)


@pytest.mark.engines("mariadb")
def test_a_connection_goes_on_after_its_stream(only: Router) -> None:
    """Without a session, a rollback reads the stream to its end, as on any engine, and the connection goes on."""
    with only.connect(read_only=True) as connection:
        result = connection.execute(text(ROWS["mariadb"]), execution_options=STREAM)
        result.fetchone()
        result.close()
        connection.rollback()
        assert connection.scalar(text("SELECT count(*) FROM item")) == 3
