"""No unit is stuck, and none that fails or is interrupted leaves a connection, a lock or a place behind."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import event, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import sessionmaker

from aurora_router import Router, RoutingSession
from aurora_router.core import events
from aurora_router.local import FaultProxy, PostgresCluster
from aurora_router.router import core_of
from tests.integration.shop import Item, eventually, no_connection_is_left, raise_stock, sessions, stock

MakeRouter = Callable[..., Router]


def test_a_question_to_an_unused_server_ends_when_it_freezes(cluster: PostgresCluster, make: MakeRouter) -> None:
    """A thread that asks a server that no unit has used is woken when the server freezes."""
    router = make(probe_timeout=0.5)
    reader = router.topology.readers[0]
    assert not core_of(router).engines._pools[reader.id]._engines
    (server,) = [r for r in cluster.readers if r.address == reader.id]
    with core_of(router).engines.unpooled_connection(reader) as connection, ThreadPoolExecutor(1) as threads:
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


def test_a_unit_that_is_interrupted_while_it_asks_leaves_nothing(
    cluster: PostgresCluster, proxy: FaultProxy, router: Router, heard: list[events.Event]
) -> None:
    interrupted = threading.Event()

    class Interrupts(list[events.Event]):
        def append(self, event: events.Event) -> None:
            if isinstance(event, events.CommitResolved):
                interrupted.set()
                raise KeyboardInterrupt

    core_of(router).dispatcher.listeners = (Interrupts().append,)
    proxy.lose("COMMIT", answer=True)
    with pytest.raises(KeyboardInterrupt):
        router.run_transaction(sessions(router), raise_stock)
    assert interrupted.is_set()
    core_of(router).dispatcher.listeners = ()
    assert no_connection_is_left(router)
    assert router.run_transaction(sessions(router), raise_stock) == 12
