"""Behind PgBouncer, which gives the servers' connections to one client after the other."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import psycopg
import pytest
from sqlalchemy import make_url, text
from sqlalchemy.engine import Connection

from aurora_router import ConfigurationError, Router, RoutingSession
from aurora_router.core import events, probing
from aurora_router.local import PostgresCluster
from aurora_router.router import core_of
from tests.integration.poolers import pooler
from tests.integration.shop import RAISE, eventually, instance_id, place, raise_stock, sessions, stock, until_readers_serve

MakeRouter = Callable[..., Router]

COUNT = text("SELECT count(*) FROM item")


class Behind:
    """A router of the writer and one reader, each behind a pooler of its own."""

    def __init__(self, cluster: PostgresCluster, make_router: MakeRouter, stack: ExitStack) -> None:
        self.cluster = cluster
        self.reader = cluster.readers[0]
        self.make_router = make_router
        self._stack = stack

    def route(self, *, mode: str = "transaction", size: int = 2, **options: Any) -> Router:
        before = [self._stack.enter_context(pooler(i, mode=mode, size=size)) for i in (self.cluster.writer, self.reader)]
        self.of_writer, self.of_reader = before
        host, port = self.of_writer.split(":")
        router = self.make_router(
            make_url(self.cluster.url).set(host=host, port=int(port)), instances=[self.of_reader], **options
        )
        until_readers_serve(router, 1)
        return router

    def others(self, count: int = 2) -> list[psycopg.Connection[Any]]:
        """Connections of another program through the pooler before the reader."""
        host, port = self.of_reader.split(":")
        url = make_url(self.cluster.url)
        options: dict[str, Any] = {"host": host, "port": port, "user": url.username, "password": url.password}
        made = [psycopg.connect(**options, dbname=url.database, autocommit=True, prepare_threshold=None) for _ in range(count)]
        for connection in made:
            self._stack.enter_context(connection)
        return made


@pytest.fixture
def behind(cluster: PostgresCluster, make_router: MakeRouter) -> Iterator[Behind]:
    with ExitStack() as stack:
        yield Behind(cluster, make_router, stack)


def at_once(*works: Callable[[], object]) -> None:
    """Do all of these at the same time, and raise an error of one of them."""
    failed: list[BaseException] = []

    def do(work: Callable[[], object]) -> None:
        try:
            work()
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=do, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for error in failed:
        raise error


def read(router: Router, read_only: bool | None = None) -> None:
    with sessions(router, read_only=read_only)() as s:
        s.execute(text("SELECT pg_sleep(0.1)"))
        assert s.scalar(COUNT) == 3
        assert place(s) == "reader"


@pytest.mark.parametrize("said", [{}, {"pooler": "transaction"}], ids=["found out", "said"])
def test_nothing_is_left_on_a_poolers_connections(behind: Behind, said: dict[str, str]) -> None:
    """Other programs never meet a setting of the router's. After a promotion their writes and the router's succeed."""
    router = behind.route(**said)
    at_once(*[lambda: read(router)] * 3, *[lambda: read(router, read_only=True)] * 3)
    shows = [other.execute("SHOW default_transaction_read_only").fetchone() for other in behind.others(4)]
    assert shows == [("off",)] * 4
    behind.cluster.kill(behind.cluster.writer)
    behind.cluster.promote(behind.reader)
    (other,) = behind.others(1)
    other.execute("UPDATE item SET stock = stock + 1 WHERE id = 1")
    eventually(lambda: router.topology.writer is not None and router.topology.writer.id == behind.of_reader)
    at_once(*[lambda: router.run_transaction(sessions(router), raise_stock)] * 4)
    assert stock(behind.cluster) == 15


def test_a_pooler_for_sessions_keeps_the_guard(behind: Behind) -> None:
    """With pooler="session" a reader's connections refuse writes, as they do without a pooler."""
    router = behind.route(mode="session", size=8, pooler="session")
    with router.connect(read_only=True) as connection:
        assert connection.scalar(text("SHOW default_transaction_read_only")) == "on"
    read(router)


def test_streams_stay_in_a_transaction(behind: Behind) -> None:
    """An automatic unit's stream is whole although other clients use the pooler's connections, and it leaves no cursor."""
    router = behind.route()
    query = text("SELECT g AS n, repeat('x', 1000) AS t FROM generate_series(1, 2000) g")

    def stream(limit: int) -> None:
        with sessions(router)() as s:
            found = 0
            for row in s.execute(query, execution_options={"yield_per": 50}):
                found += 1
                assert row.n == found
                if found == limit:
                    break
            assert found == limit
            assert s.scalar(COUNT) == 3
            assert place(s) == "reader"

    at_once(*[lambda: stream(2000)] * 2, *[lambda: stream(70)] * 4)
    assert {other.execute("SELECT count(*) FROM pg_cursors").fetchone() for other in behind.others(4)} == {(0,)}
    with sessions(router)() as s:
        opened = s.execute(query, execution_options={"yield_per": 50})
        assert opened.fetchone() is not None
        s.execute(RAISE)
        assert place(s) == "writer"
        s.commit()
    assert stock(behind.cluster) == 11


def test_no_statement_is_prepared_where_another_client_is_next(behind: Behind) -> None:
    """A frequent statement is not prepared, because the next server connection would not know it."""
    router = behind.route()

    def often() -> None:
        for _ in range(12):
            with sessions(router)() as s:
                assert s.scalar(COUNT) == 3
                assert place(s) == "reader"

    at_once(*[often] * 4)
    assert not core_of(router).interceptor.known.rejected


def test_a_full_pooler_is_not_a_silent_server(behind: Behind, heard: list[events.Event]) -> None:
    """Units that have all of a pooler's connections keep the probes waiting; nothing is cut, and all of them commit."""
    router = behind.route(probe_timeout=0.2, probe_interval=0.2, listeners=[heard.append])
    Session = sessions(router, read_only=False)
    begun, go = threading.Semaphore(0), threading.Event()

    def write(number: int) -> None:
        with Session() as s:
            begun.release()
            s.execute(text("UPDATE item SET stock = stock + 1 WHERE id = :id"), {"id": number})
            begun.release()
            assert go.wait(30)
            s.commit()

    threads = [threading.Thread(target=write, args=(number,)) for number in (1, 2, 3)]
    with Session() as s:  # The router has a connection before the pool is full.
        s.execute(COUNT)
    for thread in threads:
        thread.start()
    for _ in range(5):  # Two are in their transaction, and the third one waits.
        assert begun.acquire(timeout=20)
    heard.clear()
    watcher = core_of(router).monitor._watchers[behind.of_writer]
    # This is five times the time that a probe may take.
    eventually(lambda: watcher.asked_at is not None and time.monotonic() - watcher.asked_at > 1.0)
    go.set()
    for thread in threads:
        thread.join(30)
    assert behind.cluster.execute("SELECT stock FROM item ORDER BY id") == [(11,), (21,), (31,)]
    lost = (events.InstanceDown, events.ConnectionsDiscarded, events.WriterChanged)
    assert not [event for event in heard if isinstance(event, lost)]
    at = time.monotonic()
    eventually(lambda: router.topology.writer is not None and router.topology.writer.last_observed_at > at)


@pytest.mark.parametrize("said", [{}, {"pooler": "transaction"}], ids=["found out", "said"])
def test_a_pooler_that_others_fill_is_not_a_silent_server(behind: Behind, said: dict[str, str]) -> None:
    """Other programs keep the router's probes and units waiting for longer than a probe may take. Then the units are served."""
    router = behind.route(probe_timeout=0.3, probe_interval=0.1, **said)
    read(router)  # so the router knows that there is a pooler
    others = behind.others(4)
    slow = [threading.Thread(target=lambda c=c: [c.execute("SELECT pg_sleep(0.7)") for _ in range(3)]) for c in others]
    for thread in slow:
        thread.start()
    watcher = core_of(router).monitor._watchers[behind.of_reader]
    eventually(lambda: watcher.asked_at is not None and time.monotonic() - watcher.asked_at > 0.5)
    assert [instance.id for instance in router.topology.readers] == [behind.of_reader]
    read(router)
    for thread in slow:
        thread.join(30)
    assert [instance.id for instance in router.topology.readers] == [behind.of_reader]


def test_a_full_pooler_is_waited_for_from_the_beginning(behind: Behind) -> None:
    """A router that is made while other programs fill the pooler waits in its queue."""
    router = behind.route(probe_timeout=0.3, pooler="transaction")
    others = behind.others(4)
    over = threading.Event()

    def fill(other: psycopg.Connection[Any]) -> None:
        while not over.is_set():
            other.execute("SELECT pg_sleep(0.5)")

    threads = [threading.Thread(target=fill, args=(other,)) for other in others]
    for thread in threads:
        thread.start()
    try:
        host, port = behind.of_reader.split(":")
        url = make_url(behind.cluster.url).set(host=host, port=int(port))
        second = behind.make_router(url, probe_timeout=0.3, pooler="transaction")
        second.start()
        eventually(lambda: second.topology.readers != ())
    finally:
        over.set()
        for thread in threads:
            thread.join(30)
    assert router.topology.writer is not None


def test_a_frozen_reader_behind_a_pooler_is_found(behind: Behind, monkeypatch: pytest.MonkeyPatch) -> None:
    """A unit that waits for a frozen reader is woken, a while later than without a pooler."""
    usual = probing.queue_timeout
    monkeypatch.setattr(probing, "queue_timeout", lambda i, r, timing: usual(i, r, timing._replace(queue_timeout=1.0)))
    router = behind.route(probe_timeout=0.3)
    with sessions(router)() as s:
        assert s.scalar(COUNT) == 3
        assert instance_id(s) == behind.of_reader
        behind.cluster.freeze(behind.reader)
        assert s.scalar(COUNT) == 3
        assert instance_id(s) == behind.of_writer


def test_a_frozen_writer_behind_a_pooler_is_replaced(behind: Behind) -> None:
    """Units on a frozen writer go on after a promotion, which is seen although the old writer is only silent."""
    router = behind.route(probe_timeout=0.3)
    frozen, entered = threading.Event(), threading.Event()

    def work(s: RoutingSession) -> int:
        s.execute(COUNT)
        if not frozen.is_set():
            entered.set()
            assert frozen.wait(20)
        return raise_stock(s)

    done: list[int] = []
    thread = threading.Thread(target=lambda: done.append(router.run_transaction(sessions(router, read_only=False), work)))
    thread.start()
    assert entered.wait(20)
    behind.cluster.freeze(behind.cluster.writer)
    frozen.set()
    behind.cluster.promote(behind.reader)
    thread.join(30)
    assert done == [11]


@pytest.mark.parametrize("said", [{}, {"pooler": "transaction"}], ids=["found out", "said"])
def test_a_promoted_reader_behind_a_pooler_writes_nothing(behind: Behind, said: dict[str, str]) -> None:
    """A read that hides a write is refused without a guard, too, because the read runs in a read-only transaction."""
    for statement in (
        "CREATE TABLE IF NOT EXISTS hidden (n int)",
        "CREATE OR REPLACE FUNCTION hiding() RETURNS int LANGUAGE plpgsql AS "
        "$$BEGIN INSERT INTO hidden VALUES (1); RETURN 1; END$$",
        "CREATE OR REPLACE VIEW hidden_write AS SELECT hiding() AS a",
        "GRANT ALL ON hidden, hidden_write TO app",
    ):
        behind.cluster.execute(statement)
    behind.cluster.wait_in_sync()
    router = behind.route(probe_interval=30.0, **said)
    with sessions(router)() as s:
        assert s.scalar(COUNT) == 3
        assert place(s) == "reader"
        behind.cluster.promote(behind.reader)
        connection = s.get_transaction()
        assert connection is not None
        (driver,) = {c.connection.driver_connection for c in connection._connections if isinstance(c, Connection)}
        with pytest.raises(psycopg.errors.ReadOnlySqlTransaction):
            driver.execute("SELECT a FROM hidden_write")
    assert behind.cluster.execute("SELECT count(*) FROM hidden", instance=behind.reader) == [(0,)]


def test_what_a_unit_asks_for_needs_a_transaction(behind: Behind) -> None:
    """A read-only connection behind a pooler refuses AUTOCOMMIT, because nothing could guard it. The error says what to do."""
    router = behind.route()
    with router.connect(read_only=True) as connection:
        with pytest.raises(ConfigurationError, match="Leave isolation_level out"):
            connection.execution_options(isolation_level="AUTOCOMMIT")
        assert connection.scalar(COUNT) == 3


@pytest.mark.parametrize("said", [None, "session", "transaction"])
def test_a_statement_pooler_is_refused_at_once(behind: Behind, said: str | None) -> None:
    """The error names the pooler's setting, and no unit waits for a writer, whatever `pooler` says."""
    began = time.monotonic()
    with pytest.raises(ConfigurationError, match=r"statement pooling mode; .*pool_mode=statement"):
        behind.route(mode="statement", failover_timeout=60.0, pooler=said)
    assert time.monotonic() - began < 30.0
