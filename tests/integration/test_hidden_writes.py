"""Writes that no text shows: a view calls a function that writes. A reader refuses it, and the router remembers the text."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from aurora_router import OutcomeUnknown, Router, RoutingSession
from aurora_router.core import events
from aurora_router.local import FaultProxy
from aurora_router.local.cluster import Cluster
from tests.integration.shop import BOTH, family, place, sessions, through, until_readers_serve

NOTE = text("SELECT a FROM noting")

_MADE = {
    "postgresql": (
        "CREATE TABLE note (n int)",
        "CREATE FUNCTION noted() RETURNS int LANGUAGE plpgsql AS $$BEGIN INSERT INTO note VALUES (1); RETURN 1; END$$",
        "CREATE VIEW noting AS SELECT noted() AS a",
        "GRANT ALL ON note, noting TO app",
    ),
    "mysql": (
        "CREATE TABLE note (n int)",
        "CREATE FUNCTION noted() RETURNS int MODIFIES SQL DATA BEGIN INSERT INTO note VALUES (1); RETURN 1; END",
        "CREATE SQL SECURITY INVOKER VIEW noting AS SELECT noted() AS a",
    ),
}
_GONE = ("DROP VIEW noting", "DROP FUNCTION noted", "DROP TABLE note")


@pytest.fixture
def notes(cluster: Cluster[Any]) -> Iterator[Callable[[], int]]:
    """Give the number of rows written."""
    if family(cluster) == "mysql":
        for instance in cluster.instances:
            cluster.execute("SET GLOBAL log_bin_trust_function_creators = 1", instance=instance)
    for statement in _MADE[family(cluster)]:
        cluster.execute(statement)
    cluster.wait_in_sync()
    yield lambda: cluster.execute("SELECT count(*) FROM note")[0][0]
    for statement in _GONE:
        cluster.execute(statement)


@pytest.fixture
def router(cluster: Cluster[Any], proxy: FaultProxy, make_router: Callable[..., Router], notes: Callable[[], int]) -> Router:
    """A router that knows the text, because a reader has refused it."""
    router = make_router(through(proxy, cluster), instances=[reader.address for reader in cluster.readers], failover_timeout=10)
    until_readers_serve(router, 2)
    router.init_commit_table()
    with sessions(router)() as s:
        s.execute(NOTE).all()
        assert place(s) == "writer"
    return router


@BOTH
@pytest.mark.parametrize("read_only", [None, False])
def test_a_hidden_write_is_not_lost_with_its_connection(
    router: Router, proxy: FaultProxy, notes: Callable[[], int], read_only: bool | None
) -> None:
    """The unit may have written, so its later read is not retried on a new connection, which lacks the write."""
    with sessions(router, read_only=read_only)() as s:
        s.execute(NOTE).all()
        proxy.reset_all()
        with pytest.raises(DBAPIError):
            s.execute(NOTE).all()
        s.rollback()
    assert notes() == 0


@BOTH
def test_a_hidden_write_is_not_done_twice(router: Router, proxy: FaultProxy, notes: Callable[[], int]) -> None:
    """If the answer to its COMMIT is lost, the outcome is looked up, or the unit raises OutcomeUnknown."""
    runs: list[int] = []

    def work(s: RoutingSession) -> None:
        runs.append(1)
        s.execute(NOTE).all()

    proxy.lose("COMMIT", answer=True)
    router.run_transaction(sessions(router), work)
    assert (len(runs), notes()) == (1, 1)
    proxy.lose("COMMIT", answer=True)
    with sessions(router)() as s:
        work(s)
        with pytest.raises(OutcomeUnknown):
            s.commit()
    assert notes() == 2


@pytest.fixture
def fresh(cluster: Cluster[Any], proxy: FaultProxy, make_router: Callable[..., Router], notes: Callable[[], int]) -> Router:
    """A router without readers, so no reader has refused the text."""
    router = make_router(through(proxy, cluster), instances=[], failover_timeout=10)
    until_readers_serve(router, 0)
    router.init_commit_table()
    return router


@BOTH
def test_what_no_reader_has_refused_is_not_lost_either(fresh: Router, proxy: FaultProxy, notes: Callable[[], int]) -> None:
    """A unit declared to write retries a read only as its first statement, because earlier statements may have written."""
    with sessions(fresh, read_only=False)() as s:
        proxy.reset_all()
        s.execute(NOTE).all()
        proxy.reset_all()
        with pytest.raises(DBAPIError):
            s.execute(NOTE).all()
        s.rollback()
    assert notes() == 0


@BOTH
@pytest.mark.parametrize("read_only", [None, False])
def test_what_no_reader_has_refused_is_not_done_twice(
    fresh: Router, proxy: FaultProxy, notes: Callable[[], int], read_only: bool | None
) -> None:
    """If the answer to its COMMIT is lost, the outcome is looked up, or the unit raises OutcomeUnknown."""
    Session = sessions(fresh, read_only=read_only)
    proxy.lose("COMMIT", answer=True)
    fresh.run_transaction(Session, lambda s: s.execute(NOTE).all())
    assert notes() == 1
    proxy.lose("COMMIT", answer=True)
    with Session() as s:
        s.execute(NOTE).all()
        with pytest.raises(OutcomeUnknown):
            s.commit()
    assert notes() == 2


@BOTH
def test_what_commits_by_itself_is_not_done_twice(
    cluster: Cluster[Any],
    make_router: Callable[..., Router],
    proxy: FaultProxy,
    notes: Callable[[], int],
) -> None:
    """In autocommit the lost answer to any text counts as the lost answer to a COMMIT."""
    router = make_router(through(proxy, cluster), instances=[], engine_options={"isolation_level": "AUTOCOMMIT"})
    until_readers_serve(router, 0)
    proxy.lose("noting", answer=True)
    with sessions(router, read_only=False)() as s, pytest.raises(DBAPIError):
        s.execute(NOTE).all()
    assert notes() == 1


@BOTH
def test_a_hidden_write_is_an_own_write(cluster: Cluster[Any], router: Router, notes: Callable[[], int]) -> None:
    """The session of a hidden write goes on where it sees the row, and has a token for other sessions."""
    for reader in cluster.readers:
        cluster.set_lag(reader, 3600)
    try:
        with sessions(router)() as s:
            s.execute(NOTE).all()
            s.commit()
            assert s.scalar(text("SELECT count(*) FROM note")) == 1
            assert s.consistency_token is not None
    finally:
        for reader in cluster.readers:
            cluster.set_lag(reader, 0)


@BOTH
def test_a_read_that_has_become_a_write_needs_no_reader(
    cluster: Cluster[Any], make_router: Callable[..., Router], notes: Callable[[], int], heard: list[events.Event]
) -> None:
    """A text that was a read goes to the writer at once after a reader has refused it."""
    security = "" if family(cluster) == "postgresql" else "SQL SECURITY INVOKER"
    router = make_router(listeners=[heard.append])
    until_readers_serve(router, 2)
    places = []
    for body in ("1", "1", "noted()", "noted()"):
        cluster.execute(f"CREATE OR REPLACE {security} VIEW noting AS SELECT {body} AS a")
        cluster.wait_in_sync()
        heard.clear()
        with sessions(router)() as s:
            s.execute(NOTE).all()
            places.append(place(s))
    assert places == ["reader", "reader", "writer", "writer"]
    assert not [event for event in heard if isinstance(event, events.Moved)]
