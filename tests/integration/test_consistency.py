"""A session sees its own writes, however late the readers are, and across promotions."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from typing import Any

import pytest
from sqlalchemy import event, insert, select, text, update
from sqlalchemy.engine import Connection

from aurora_router import Router, RoutingSession
from aurora_router.core import events
from aurora_router.core.selection import Reason
from aurora_router.local import FaultProxy, PostgresCluster
from tests.integration.shop import BOTH, Item, engine, eventually, instance_id, place, probes, sessions, until_readers_serve

MakeRouter = Callable[..., Router]


def raise_stock(session: RoutingSession) -> None:
    session.execute(update(Item).where(Item.id == 1).values(stock=Item.stock + 1))
    session.commit()


@BOTH
@pytest.mark.parametrize("repeat", range(3))
def test_a_session_reads_its_write_while_readers_are_late(cluster: PostgresCluster, make_router: MakeRouter, repeat: int) -> None:
    """A session reads its own write, although all readers are late."""
    for reader in cluster.readers:
        cluster.set_lag(reader, 0.3)
    with sessions(make_router())() as s:
        for expected in range(11, 21):
            raise_stock(s)
            assert s.scalar(select(Item.stock).where(Item.id == 1)) == expected
            s.rollback()


def test_a_session_returns_to_a_reader_that_has_its_write(router: Router) -> None:
    """A session returns to a reader as soon as one has its write."""
    with sessions(router)() as s:
        raise_stock(s)

        def served_by_a_reader() -> bool:
            assert s.scalar(select(Item.stock).where(Item.id == 1)) == 11
            found = place(s)
            s.rollback()
            return found == "reader"

        eventually(served_by_a_reader, timeout=5)


@BOTH
def test_only_the_reader_that_has_the_write_serves_the_session(cluster: PostgresCluster, make_router: MakeRouter) -> None:
    late, current = cluster.readers
    cluster.pause_replay(late)
    with sessions(make_router(balance="round_robin"))() as s:
        raise_stock(s)
        s.commit()
        served: set[str] = set()
        deadline = time.monotonic() + 2
        while time.monotonic() < deadline:
            assert s.scalar(select(Item.stock).where(Item.id == 1)) == 11
            served.add(instance_id(s))
            s.rollback()
            # A session that reads without a pause stays on an instance that certainly shows nothing older.
            time.sleep(0.02)
        assert served == {cluster.writer.address, current.address}


def test_a_late_reader_serves_a_session_that_kept_its_proof(
    cluster: PostgresCluster, make_router: MakeRouter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reader that lags beyond the sample window serves a session that kept the proof of its write.

    Later positions prove the write as well, but the reader has never replayed one that is still sampled.
    """
    monkeypatch.setattr("aurora_router.core.topology.SAMPLES", 2)
    router = make_router(position_interval=0.05, probe_interval=0.05)
    for reader in cluster.readers:
        cluster.set_lag(reader, 1.0)
    over = threading.Event()

    def write_on() -> None:
        while not over.wait(0.01):
            cluster.execute("UPDATE item SET name = name || 'x' WHERE id = 2")

    writes = threading.Thread(target=write_on)
    with sessions(router)() as s:
        raise_stock(s)
        s.commit()
        assert s.consistency_token is not None
        writes.start()
        try:
            has_it = "SELECT stock = 11 FROM item WHERE id = 1"
            eventually(lambda: cluster.execute(has_it, instance=cluster.readers[0]) == [(True,)])
            known = s._causal_context.requirement
            assert known is not None
            assert known.position is not None
            eventually(lambda: any(r.position is not None and r.position.covers(known.position) for r in router.topology.readers))
            assert s.scalar(select(Item.stock).where(Item.id == 1)) == 11
            assert place(s) == "reader"
        finally:
            over.set()
            writes.join()


def test_sessions_without_writes_go_on_reading_from_readers(router: Router) -> None:
    """Sessions that have not written go on reading from readers."""
    with sessions(router)() as writes, sessions(router)() as reads:
        raise_stock(writes)
        reads.get(Item, 1)
        assert place(reads) == "reader"


def test_eventual_consistency_does_not_wait_for_anybody(cluster: PostgresCluster, make_router: MakeRouter) -> None:
    for reader in cluster.readers:
        cluster.pause_replay(reader)
    with sessions(make_router(consistency="eventual"))() as s:
        raise_stock(s)
        assert s.scalar(select(Item.stock).where(Item.id == 1)) == 10, "a stale read, as was asked for"
        assert place(s) == "reader"


def write_by_session(router: Router) -> None:
    with sessions(router)() as s:
        raise_stock(s)


def write_by_connection(router: Router) -> None:
    with router.connect() as connection:
        connection.execute(update(Item).values(stock=11))
        connection.commit()


def write_by_begin(router: Router) -> None:
    with router.begin() as connection:
        connection.execute(update(Item).values(stock=11))


def write_by_raw_connection(router: Router) -> None:
    raw = router.raw_connection()
    raw.cursor().execute("UPDATE item SET stock = 11")
    raw.commit()
    raw.close()


@BOTH
@pytest.mark.parametrize("write", [write_by_session, write_by_connection, write_by_begin, write_by_raw_connection])
def test_global_consistency_shares_one_requirement(
    cluster: PostgresCluster, make_router: MakeRouter, write: Callable[[Router], None]
) -> None:
    router = make_router(consistency="global")
    with sessions(router)() as s:
        s.get(Item, 1)
        assert place(s) == "reader"
    for reader in cluster.readers:
        cluster.pause_replay(reader)
    write(router)
    with sessions(router)() as s:
        assert s.scalar(select(Item.stock).where(Item.id == 1)) == 11
        assert place(s) == "writer"
    with router.connect(read_only=True) as connection:
        assert connection.scalar(select(Item.stock).where(Item.id == 1)) == 11


WRITE = "UPDATE item SET stock = 11 WHERE id = 1"


def commit_by_the_pools_connection(connection: Connection) -> None:
    raw = connection.connection
    raw.cursor().execute(WRITE)
    raw.commit()


def commit_by_the_drivers_connection(connection: Connection) -> None:
    driver: Any = connection.connection.driver_connection
    driver.cursor().execute(WRITE)
    driver.commit()


def commit_as_text(connection: Connection) -> None:
    cursor = connection.connection.cursor()
    cursor.execute(WRITE)
    cursor.execute("COMMIT")


def commit_twice(connection: Connection) -> None:
    raw = connection.connection
    connection.execute(select(1))
    connection.commit()  # the router notices this one
    raw.cursor().execute(WRITE)
    raw.commit()


def commit_by_a_results_cursor(connection: Connection) -> None:
    driver: Any = connection.execute(select(1)).cursor.connection
    driver.cursor().execute(WRITE)
    driver.commit()


def commit_by_a_listeners_cursor(connection: Connection) -> None:
    taken: list[Any] = []
    event.listen(connection, "after_cursor_execute", lambda _, cursor, *__: taken.append(cursor.connection))
    connection.execute(select(1))
    taken[0].cursor().execute(WRITE)
    taken[0].commit()


def hand_out(router: Router, way: str, stack: ExitStack) -> Connection:
    """A connection of the router, of a session's engine or of a session. It stays open until the stack ends."""
    if way == "connection":
        return stack.enter_context(router.connect())
    if way == "engine":
        bind: Any = stack.enter_context(sessions(router)()).get_bind()
        return stack.enter_context(bind.connect())
    return stack.enter_context(sessions(router)()).connection()


@BOTH
@pytest.mark.parametrize("way", ["connection", "session", "engine"])
@pytest.mark.parametrize(
    "commit",
    [
        commit_by_the_pools_connection,
        commit_by_the_drivers_connection,
        commit_as_text,
        commit_twice,
        commit_by_a_results_cursor,
        commit_by_a_listeners_cursor,
    ],
)
@pytest.mark.parametrize("consistency", ["session", "global"])
def test_a_commit_of_the_driver_is_seen_at_once(
    cluster: PostgresCluster, make_router: MakeRouter, consistency: str, commit: Callable[[Connection], None], way: str
) -> None:
    """Its scope, or everybody with global consistency, sees the commit while the connection is still open."""
    router = make_router(consistency=consistency)
    for reader in cluster.readers:
        cluster.pause_replay(reader)
    with ExitStack() as stack:
        scope = stack.enter_context(router.causal_scope()) if consistency == "session" else None
        commit(hand_out(router, way, stack))
        with sessions(router)() as s:
            assert s.scalar(select(Item.stock).where(Item.id == 1)) == 11
        with router.connect(read_only=True) as connection:
            assert connection.scalar(select(Item.stock).where(Item.id == 1)) == 11
        if scope is not None:
            with sessions(router)(after=scope.token) as s:
                assert s.scalar(select(Item.stock).where(Item.id == 1)) == 11


@BOTH
@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize("consistency", ["session", "global"])
def test_a_commit_on_a_sessions_engine_is_seen(
    cluster: PostgresCluster, make_router: MakeRouter, consistency: str, raw: bool
) -> None:
    """Its scope, or everybody with global consistency, sees the commit after the connection is released.

    If the connection is raw, they see the commit while it is still open.
    """
    router = make_router(consistency=consistency)
    for reader in cluster.readers:
        cluster.pause_replay(reader)
    with router.causal_scope() if consistency == "session" else nullcontext() as scope:
        bind: Any = sessions(router)().get_bind()
        if raw:
            pooled = bind.raw_connection()
            pooled.cursor().execute(WRITE)
            pooled.commit()
        else:
            with bind.begin() as connection:
                connection.execute(text(WRITE))
        with sessions(router)() as s:
            assert s.scalar(select(Item.stock).where(Item.id == 1)) == 11
        assert scope is None or scope.token is not None


@BOTH
@pytest.mark.parametrize("way", ["connection", "session", "engine"])
def test_an_open_connection_that_reads_pins_nobody(make_router: MakeRouter, way: str) -> None:
    """With global consistency other sessions stay on readers while only SQLAlchemy has used the connection."""
    router = make_router(consistency="global")
    with ExitStack() as stack:
        connection = hand_out(router, way, stack)
        for _ in range(3):
            assert connection.scalar(select(Item.stock).where(Item.id == 1)) == 10
            with sessions(router)() as s:
                s.get(Item, 1)
                assert place(s) == "reader"


def test_a_commit_that_did_not_wait_for_the_log_is_seen_as_well(cluster: PostgresCluster, router: Router) -> None:
    """A session sees a commit with synchronous_commit=off, although it lies beyond the written part of the log."""
    with sessions(router)() as s:
        for expected in range(11, 61):
            s.execute(text("SET LOCAL synchronous_commit = off"))
            s.execute(update(Item).where(Item.id == 1).values(stock=expected))
            s.commit()
            assert s.scalar(select(Item.stock).where(Item.id == 1)) == expected
            s.rollback()
        eventually(lambda: (s.get(Item, 1), place(s), s.rollback())[1] == "reader")


def test_asynchronous_commits_by_default_are_understood(cluster: PostgresCluster, make_router: MakeRouter) -> None:
    """A session sees its writes on a server that commits asynchronously by default."""
    cluster.execute("ALTER ROLE app SET synchronous_commit = off")
    try:
        with sessions(make_router())() as s:
            for expected in range(11, 61):
                raise_stock(s)
                assert s.scalar(select(Item.stock).where(Item.id == 1)) == expected
                s.rollback()
    finally:
        cluster.execute("ALTER ROLE app RESET synchronous_commit")


@BOTH
def test_consistency_costs_the_application_no_round_trip(cluster: PostgresCluster, make_router: MakeRouter) -> None:
    """On the wire, a unit of one read is one round trip, before and after a commit. A unit of one write is three."""
    reader = cluster.readers[0]
    with (
        FaultProxy((cluster.writer.host, cluster.writer.port)) as to_writer,
        FaultProxy((reader.host, reader.port)) as to_reader,
    ):
        url = cluster.url.replace(cluster.writer.address, to_writer.address)
        router = make_router(url, instances=[to_reader.address], probe_interval=3600, engine_options={"pool_size": 1})
        with sessions(router)() as s:
            raise_stock(s)
            eventually(lambda: _on_reader(s))
            for _ in range(8):  # let psycopg prepare its statements
                s.scalar(select(Item.stock).where(Item.id == 1))
                s.rollback()

            def count(proxy: FaultProxy, work: Callable[[], object]) -> int:
                before = sum(not probes(text) for text in proxy.statements)
                work()
                return sum(not probes(text) for text in proxy.statements) - before

            def read() -> None:
                s.scalar(select(Item.stock).where(Item.id == 1))
                s.rollback()

            trips = to_reader.round_trips
            assert count(to_reader, read) == 1
            assert to_reader.round_trips - trips == 1, "no BEGIN, no ROLLBACK, no ping"
            begin = engine(cluster) == "postgresql"  # elsewhere the first statement does that
            assert count(to_writer, lambda: raise_stock(s)) == 2 + begin, "BEGIN, UPDATE, COMMIT and nothing else"
            eventually(lambda: _on_reader(s))
            assert count(to_reader, read) == 1


def _on_reader(session: RoutingSession) -> bool:
    session.get(Item, 2)
    found = place(session) == "reader"
    session.rollback()
    return found


def test_the_monitor_is_asked_once_for_all_who_wait(cluster: PostgresCluster, make_router: MakeRouter) -> None:
    for reader in cluster.readers:
        cluster.pause_replay(reader)
    with FaultProxy((cluster.writer.host, cluster.writer.port)) as proxy:
        url = cluster.url.replace(cluster.writer.address, proxy.address)
        router = make_router(url, instances=[r.address for r in cluster.readers], position_interval=0.1)
        router.start()
        stop = threading.Event()

        def work() -> None:
            with sessions(router)() as s:
                raise_stock(s)
                while not stop.is_set():
                    s.get(Item, 1)
                    s.rollback()

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()

        def asked() -> int:
            return sum("pg_control_checkpoint" in text for text in proxy.statements)

        first, since = asked(), time.monotonic()
        eventually(lambda: asked() >= first + 8)
        intervals = (time.monotonic() - since) / 0.1
        count = asked() - first
        stop.set()
        for thread in threads:
            thread.join()
        assert count <= intervals + 3, "one in 100 ms at most, however many ask"


@BOTH
def test_own_writes_are_seen_across_a_promotion(cluster: PostgresCluster, make_router: MakeRouter) -> None:
    heard: list[events.Event] = []
    router = make_router(listeners=[heard.append])
    with sessions(router)() as s:
        raise_stock(s)
        eventually(lambda: _on_reader(s))
        cluster.wait_in_sync()
        cluster.kill(cluster.writer)
        cluster.promote()
        assert s.scalar(select(Item.stock).where(Item.id == 1)) == 11
        s.rollback()
        raise_stock(s)
        for reader in cluster.readers:
            cluster.set_lag(reader, 0.3)
        for expected in range(13, 23):
            raise_stock(s)
            assert s.scalar(select(Item.stock).where(Item.id == 1)) == expected
            s.rollback()
        eventually(lambda: _on_reader(s))
        assert s.scalar(select(Item.stock).where(Item.id == 1)) == 22


@pytest.mark.engines("postgresql", "mariadb")  # MySQL's positions compare across promotions
def test_a_requirement_of_an_older_epoch_is_not_compared(cluster: PostgresCluster, make_router: MakeRouter) -> None:
    """A requirement of an older epoch is not compared by number alone.

    The new writer's log starts below the end of the old one, so a reader would seem to be far enough.
    """
    router = make_router()
    with sessions(router)() as s:
        raise_stock(s)
        eventually(lambda: _on_reader(s))
        before = router.topology.epoch
        cluster.kill(cluster.writer)
        cluster.promote()
        s.rollback()
        s.execute(update(Item).where(Item.id == 2).values(stock=0))
        s.commit()
        eventually(lambda: router.topology.epoch > before)
        until_readers_serve(router, 1)
        for reader in cluster.readers:
            cluster.pause_replay(reader)
        other = sessions(router)()
        with other:
            raise_stock(other)
            for _ in range(20):
                assert other.scalar(select(Item.stock).where(Item.id == 1)) == 12
                other.rollback()


@BOTH
def test_no_read_is_stale_under_many_threads_and_lag(cluster: PostgresCluster, make_router: MakeRouter) -> None:
    """No read is stale while many threads write and readers lag."""
    cluster.set_lag(cluster.readers[0], 0.1)
    router = make_router(balance="random")
    stale: list[tuple[int, Any]] = []
    served: dict[str, int] = {"reader": 0, "writer": 0}

    def work(number: int) -> None:
        with sessions(router)() as s:

            def read(expected: int) -> str:
                found = s.scalar(select(Item.stock).where(Item.id == 100 + number))
                where = place(s)
                served[where] += 1
                s.rollback()
                if found != expected:
                    stale.append((expected, found))
                return where

            s.execute(insert(Item).values(id=100 + number, stock=0))
            s.commit()
            for expected in range(1, 101):
                s.execute(update(Item).where(Item.id == 100 + number).values(stock=expected))
                s.commit()
                for _ in range(3):
                    read(expected)
                    time.sleep(0.005)
            eventually(lambda: read(100) == "reader")

    threads = [threading.Thread(target=work, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert stale == []
    assert served["reader"] > 0
    assert served["writer"] > 0


def test_a_unit_says_why_it_went_to_the_writer(cluster: PostgresCluster, make_router: MakeRouter) -> None:
    heard: list[events.Event] = []
    router = make_router(listeners=[heard.append])
    for reader in cluster.readers:
        cluster.pause_replay(reader)
    with sessions(router)() as s:
        raise_stock(s)
        s.get(Item, 1)
    reasons = [e.reason for e in heard if isinstance(e, events.Routed)]
    assert reasons == [Reason.NOT_A_READ, Reason.OWN_WRITES]
