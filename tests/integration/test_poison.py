"""A statement that ends its own connection is not tried on one server after the other. A killed statement stays dead."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from aurora_router import Failure, Router, RoutingSession, classify_error
from aurora_router.core import events
from aurora_router.local.cluster import Cluster, LocalInstance
from tests.integration.shop import BOTH, family, no_connection_is_left, place, sessions, stock, until_readers_serve

MakeRouter = Callable[..., Router]

SLEEP = {"postgresql": "SELECT count(*) FROM item, pg_sleep(60)", "mysql": "SELECT count(*) FROM item WHERE SLEEP(60) = 0"}
WRITE = {
    "postgresql": "UPDATE item SET stock = 0 FROM pg_sleep(60) WHERE item.id = 1",
    "mysql": "UPDATE item SET stock = SLEEP(60) WHERE id = 1",
}
FIND = {
    "postgresql": "SELECT pid FROM pg_stat_activity WHERE usename = 'app' AND state = 'active' AND query LIKE '%%pg_sleep(60)%%'",
    "mysql": "SELECT id FROM information_schema.processlist WHERE user = 'app' AND info LIKE '%%SLEEP(60)%%'",
}
KILL = {"postgresql": "SELECT pg_terminate_backend({})", "mysql": "KILL {}"}


def end_by_statement(cluster: Cluster[Any], instance: LocalInstance, number: int) -> None:
    cluster.execute(KILL[family(cluster)].format(number), instance=instance)


def crash(cluster: Cluster[Any], instance: LocalInstance, number: int) -> None:
    """End a PostgreSQL process as a kernel without memory does, so its server recovers as from a crash."""
    os.kill(number, signal.SIGKILL)


@contextlib.contextmanager
def killing(
    cluster: Cluster[Any], end: Callable[[Cluster[Any], LocalInstance, int], None] = end_by_statement
) -> Iterator[list[int]]:
    """End each connection on which the statement runs. Yield the ids of the ended connections."""
    killed: list[int] = []
    over = threading.Event()
    deadline = time.monotonic() + 30

    def kill() -> None:
        while not over.is_set() and time.monotonic() < deadline:
            for instance in cluster.instances:
                found: list[tuple[int]] = []
                with contextlib.suppress(Exception):  # Its server may be recovering.
                    found = cluster.execute(FIND[family(cluster)], instance=instance)
                for (number,) in found:
                    if number not in killed:
                        with contextlib.suppress(Exception):  # It may have ended by itself.
                            end(cluster, instance, number)
                            killed.append(number)
            over.wait(0.01)

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        yield killed
    finally:
        over.set()
        thread.join()


@pytest.fixture
def router(make_router: MakeRouter, heard: list[events.Event]) -> Router:
    router = make_router(listeners=[heard.append])
    until_readers_serve(router, 2)
    return router


@BOTH
def test_a_read_that_is_killed_is_not_begun_again(cluster: Cluster[Any], router: Router) -> None:
    """A killed read is not begun again, and its error says that the server is alive."""
    with killing(cluster) as killed, sessions(router)() as s:
        with pytest.raises(DBAPIError, match="the server is alive, and has ended the connection") as caught:
            s.execute(text(SLEEP[family(cluster)]))
        assert place(s) == "reader"
    known = classify_error(caught.value)
    assert (known.failure, known.safe_to_repeat) == (Failure.ENDED, False)
    assert len(killed) <= 2
    assert no_connection_is_left(router)
    assert len(router.topology.readers) == 2


@BOTH
def test_a_unit_that_is_killed_twice_is_given_up(cluster: Cluster[Any], router: Router, heard: list[events.Event]) -> None:
    """run_transaction runs a killed unit only once more, because the connection may have been lost by chance."""
    router.init_commit_table()
    with killing(cluster) as killed, pytest.raises(DBAPIError, match="has ended the connection"):
        router.run_transaction(sessions(router), lambda s: s.execute(text(WRITE[family(cluster)])))
    assert len(killed) == 2
    assert [e.number for e in heard if isinstance(e, events.RunAgain)] == [1]
    assert stock(cluster) == 10


@pytest.mark.engines("mariadb", "mysql")
@pytest.mark.parametrize("sql", ["SELECT count(*) FROM item WHERE name = :name", "UPDATE item SET name = :name"])
def test_a_statement_over_the_packet_limit_is_told_apart(
    cluster: Cluster[Any], make_router: MakeRouter, heard: list[events.Event], sql: str
) -> None:
    """A statement over the packet limit is tried twice at most, and the error names the limit."""
    for instance in cluster.instances:
        cluster.execute("SET GLOBAL max_allowed_packet = 1048576", instance=instance)
    try:
        router = make_router(listeners=[heard.append])
        until_readers_serve(router, 2)
        router.init_commit_table()
        runs: list[int] = []

        def work(s: RoutingSession) -> None:
            runs.append(1)
            s.execute(text(sql), {"name": "x" * 5_000_000})

        with pytest.raises(DBAPIError, match="max_allowed_packet"):
            router.run_transaction(sessions(router), work)
        assert len(runs) + sum(isinstance(e, events.Repeated) for e in heard) <= 2
        assert no_connection_is_left(router)
    finally:
        for instance in cluster.instances:
            cluster.execute("SET GLOBAL max_allowed_packet = DEFAULT", instance=instance)


FULL = {
    "postgresql": "CREATE OR REPLACE FUNCTION report() RETURNS int STABLE LANGUAGE plpgsql AS "
    "$$ BEGIN RAISE 'No space left on device' USING ERRCODE = '53100'; END $$",
    "mysql": "CREATE FUNCTION IF NOT EXISTS report() RETURNS int READS SQL DATA "
    "BEGIN SIGNAL SQLSTATE 'HY000' SET MYSQL_ERRNO = 1021, MESSAGE_TEXT = 'No space left on device'; RETURN 1; END",
}
"""A function that fills the disk of the server that runs it."""


@pytest.fixture
def full(cluster: Cluster[Any]) -> Iterator[None]:
    cluster.execute(FULL[family(cluster)])
    cluster.wait_in_sync()
    yield
    cluster.execute("DROP FUNCTION report")


def begin_units_of_kind(kind: str, router: Router) -> None:
    """Run a statement that fills the disk, in a unit that may retry it or may be run again."""
    if kind == "automatic":
        with sessions(router)() as s:
            s.execute(text("SELECT report()"))
    elif kind == "run again":
        router.run_transaction(sessions(router), lambda s: s.execute(text("SELECT report()")))
    else:
        router.run_transaction(sessions(router, read_only=True), lambda s: (stock_of(s), s.execute(text("SELECT report()"))))


def stock_of(s: RoutingSession) -> Any:
    return s.scalar(text("SELECT stock FROM item WHERE id = 1"))


@BOTH
@pytest.mark.parametrize("kind", ["automatic", "run again", "read-only, run again"])
@pytest.mark.usefixtures("full")
def test_a_read_that_breaks_two_readers_is_told(
    cluster: Cluster[Any], make_router: MakeRouter, heard: list[events.Event], kind: str
) -> None:
    """A read that breaks a reader is retried once, on another reader if nothing was read before, and then raises."""
    router = make_router(listeners=[heard.append], read_only_functions=["report"])
    until_readers_serve(router, 2)
    heard.clear()
    with pytest.raises(DBAPIError, match="No space left on device") as caught:
        begin_units_of_kind(kind, router)
    known = classify_error(caught.value)
    assert (known.failure, known.safe_to_repeat) == (Failure.BROKEN, False)
    went = [e.instance for e in heard if isinstance(e, events.Routed)]
    assert len(went) == 2
    if kind != "read-only, run again":
        assert {*went} == {reader.address for reader in cluster.readers}
    assert no_connection_is_left(router)


@BOTH
@pytest.mark.usefixtures("full")
def test_a_read_that_breaks_the_writer_is_told(
    cluster: Cluster[Any], make_router: MakeRouter, heard: list[events.Event], caplog: pytest.LogCaptureFixture
) -> None:
    """If no other reader is left, the writer is tried once, and the log says that the reader has failed."""
    router = make_router(listeners=[heard.append], read_only_functions=["report"], instances=[cluster.readers[0].address])
    until_readers_serve(router, 1)
    heard.clear()
    with pytest.raises(DBAPIError, match="No space left on device"):
        begin_units_of_kind("run again", router)
    went = [e.instance for e in heard if isinstance(e, events.Routed)]
    assert went == [cluster.readers[0].address, cluster.writer.address]
    assert "but it has just failed this unit" in caplog.text
    heard.clear()
    with sessions(router)() as s:
        s.execute(text("UPDATE item SET stock = 11 WHERE id = 1"))
        s.commit()
        with pytest.raises(DBAPIError, match="No space left on device"):
            s.execute(text("/*@writer*/ SELECT report()"))
    assert [e for e in heard if isinstance(e, events.Repeated)] == []


def test_a_write_that_crashes_its_server_twice_is_told(cluster: Cluster[Any], router: Router) -> None:
    """A server that goes on after the crash of one process has survived, so the write is run only twice."""
    with killing(cluster, crash) as killed, pytest.raises(DBAPIError, match="its process has crashed") as caught:
        router.run_transaction(sessions(router), lambda s: s.execute(text(WRITE["postgresql"])))
    assert len(killed) == 2
    known = classify_error(caught.value)
    assert (known.failure, known.safe_to_repeat) == (Failure.ENDED, False)


@pytest.mark.parametrize("options", [{}, {"read_only": True}])
def test_a_read_that_crashes_two_readers_is_told(
    cluster: Cluster[Any], router: Router, heard: list[events.Event], options: dict[str, Any]
) -> None:
    """A read that crashes two readers is not sent to the writer."""
    heard.clear()
    with (
        killing(cluster, crash) as killed,
        sessions(router, **options)() as s,
        pytest.raises(DBAPIError, match="its process has crashed") as caught,
    ):
        s.execute(text(SLEEP["postgresql"]))
    assert len(killed) == 2
    went = {e.instance for e in heard if isinstance(e, events.Routed)}
    assert went == {reader.address for reader in cluster.readers}
    assert classify_error(caught.value).failure is Failure.ENDED


def test_a_bystander_of_crashes_is_run_again(cluster: Cluster[Any], router: Router) -> None:
    """A crash ends all connections of the server, so a unit on another connection is run again."""
    ends = 3
    runs: list[int] = []

    def work(s: RoutingSession) -> None:
        runs.append(1)
        stock_of(s)  # This waits for the writer.
        with contextlib.closing(cluster.writer.connect()) as another:
            crash = threading.Timer(0.2, os.kill, (another.info.backend_pid, signal.SIGKILL))
            if len(runs) <= ends:
                crash.start()
            seconds = 60 if len(runs) <= ends else 0
            try:
                s.execute(text("UPDATE item SET stock = 11 FROM pg_sleep(:seconds) WHERE item.id = 1"), {"seconds": seconds})
            finally:
                crash.cancel()  # on a busy machine the statement may have been lost before

    router.run_transaction(sessions(router, read_only=False), work)
    assert len(runs) == ends + 1
    assert stock(cluster) == 11


@BOTH
def test_a_statement_loses_three_servers_at_most(cluster: Cluster[Any], make_router: MakeRouter) -> None:
    """A restarted server may have been lost by chance, but a statement that loses three is given up."""
    router = make_router()
    until_readers_serve(router, 2)
    router.init_commit_table()
    runs: list[int] = []

    def restart() -> None:
        cluster.kill(cluster.writer)
        cluster.restart(cluster.writer)

    def work(s: RoutingSession) -> None:
        runs.append(1)
        stock_of(s)
        restarting = threading.Timer(0.2, restart)
        restarting.start()
        try:
            s.execute(text(WRITE[family(cluster)]))
        finally:
            restarting.join()

    with pytest.raises(DBAPIError, match="the same statement has lost its connection 3 times") as caught:
        router.run_transaction(sessions(router), work)
    assert len(runs) == 3
    assert classify_error(caught.value).failure is Failure.ENDED
