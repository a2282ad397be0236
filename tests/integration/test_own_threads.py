"""The router's own threads go on even if code of the application raises in them."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from sqlalchemy import event, make_url, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import Pool

from aurora_router import ConfigurationError, Router
from aurora_router.cluster.monitor import Monitor
from aurora_router.cluster.probe import ProbeConnection, ProbeError
from aurora_router.config.settings import Settings
from aurora_router.core import events
from aurora_router.core.instance import Instance, ProbeFailure, Role, ServerId, ServerStatus
from aurora_router.core.positions import WalPosition
from aurora_router.core.probing import Reached
from aurora_router.local import PostgresCluster
from aurora_router.router import core_of
from aurora_router.waiting import ThreadWaiting
from tests.integration.shop import eventually, until_readers_serve

MakeRouter = Callable[..., Router]
ENDS = [SystemExit, KeyboardInterrupt, GeneratorExit]

NOTHING_REACHED = Reached(has_pooler=False, is_logged_in=False)


def in_own_thread() -> bool:
    return threading.current_thread().name.startswith("aurora-router-")


def lose_both_readers_in_turn(cluster: PostgresCluster, router: Router) -> list[str]:
    """Kill both readers, and return their ids in the order in which the router lost them."""
    until_readers_serve(router, 2)
    lost = []
    for reader in cluster.readers:
        with router.engine(router.topology.by_id[reader.address]).connect():
            pass
        pool = router.engine(router.topology.by_id[reader.address]).pool
        cluster.kill(reader)
        eventually(lambda reader=reader, pool=pool: router.engine(router.topology.by_id[reader.address]).pool is not pool)
        lost.append(reader.address)
    return lost


def lost_in_turn(heard: list[events.Event]) -> list[str]:
    """The ids of the instances that were lost, in the order in which each was lost for the last time.

    A slow answer may have lost one for a moment before.
    """
    last = {e.instance: number for number, e in enumerate(heard) if isinstance(e, events.InstanceDown)}
    return sorted(last, key=lambda instance: last[instance])


@pytest.mark.parametrize("end", ENDS)
def test_a_listener_that_ends_its_thread_is_logged(
    cluster: PostgresCluster,
    make_router: MakeRouter,
    heard: list[events.Event],
    caplog: pytest.LogCaptureFixture,
    end: type[BaseException],
) -> None:
    """A listener that raises SystemExit or the like is logged. Other listeners hear the event, and pools are still discarded."""

    def ends(event: events.Event) -> None:
        if in_own_thread():
            raise end

    router = make_router(listeners=[ends, heard.append])
    lost = lose_both_readers_in_turn(cluster, router)
    eventually(lambda: lost_in_turn(heard) == lost)
    eventually(lambda: {e.instance for e in heard if isinstance(e, events.ConnectionsDiscarded)} >= set(lost))
    assert "a listener failed on InstanceDown" in caplog.text


def test_a_listener_that_hangs_holds_up_no_cut(
    cluster: PostgresCluster, make_router: MakeRouter, heard: list[events.Event]
) -> None:
    """A listener that hangs keeps no pool from being discarded and no thread on a frozen writer from waking.

    It hears the events in between later, in order.
    """
    goes_on, hangs = threading.Event(), threading.Event()

    def hang(event: events.Event) -> None:
        if in_own_thread() and isinstance(event, events.InstanceDown):
            hangs.set()
            assert goes_on.wait(60)

    router = make_router(listeners=[hang, heard.append], probe_timeout=0.3, probe_interval=0.1)
    try:
        lost = lose_both_readers_in_turn(cluster, router)
        assert hangs.is_set()
        with router.connect() as connection:
            connection.execute(text("SELECT 1"))
            cluster.freeze(cluster.writer)
            with pytest.raises(DBAPIError):
                connection.execute(text("SELECT 1"))
    finally:
        goes_on.set()
    eventually(lambda: lost_in_turn(heard) == [*lost, cluster.writer.address])


@pytest.mark.parametrize("end", ENDS)
def test_a_listener_on_a_pool_that_ends_its_thread_is_logged(
    cluster: PostgresCluster,
    make_router: MakeRouter,
    heard: list[events.Event],
    caplog: pytest.LogCaptureFixture,
    end: type[BaseException],
) -> None:
    """If a listener on a pool raises while the pool is closed, the sockets in use are still cut."""
    router = make_router(listeners=[heard.append])
    until_readers_serve(router, 2)
    first = router.engine(router.topology.readers[0])

    @event.listens_for(first, "close")
    def ends(dbapi: Any, _: object) -> None:
        if in_own_thread():
            dbapi.close()
            raise end

    lost = lose_both_readers_in_turn(cluster, router)
    eventually(lambda: lost_in_turn(heard) == lost)
    assert "were not discarded completely" in caplog.text


def test_probes_that_always_fail_oddly_are_logged_now_and_then(
    cluster: PostgresCluster, make_router: MakeRouter, caplog: pytest.LogCaptureFixture
) -> None:
    """Failing probes are retried, but each instance logs one traceback at first, and then one in 10 s."""
    calls: list[float] = []

    def password() -> str:
        calls.append(time.monotonic())
        raise SystemExit("a secret")

    url = make_url(cluster.url).set(password=None)
    readers = [reader.address for reader in cluster.readers]
    router = make_router(url, instances=readers, password=password, probe_interval=0.05)
    with pytest.raises(ConfigurationError, match="unexpected error in the probe: SystemExit") as caught:
        router.start()
    assert "secret" not in str(caught.value)  # Only the traceback has the words of the exception.
    eventually(lambda: len(calls) > 60)
    lines = sum(record.getMessage().startswith("unexpected error in the probe of ") for record in caplog.records)
    assert 3 <= lines <= 3 * (1 + (calls[-1] - calls[0]) / 10)
    assert sum(record.exc_info is not None for record in caplog.records) == lines


@pytest.fixture
def connecting_ends() -> Iterator[list[type[BaseException]]]:
    """Exceptions that the next connects of the router's own threads raise in turn, in a listener on all pools."""
    left: list[type[BaseException]] = []

    def ends(dbapi: Any, _: object) -> None:
        if left and in_own_thread():
            dbapi.close()
            raise left.pop()

    event.listen(Pool, "connect", ends)
    yield left
    event.remove(Pool, "connect", ends)


def test_a_probe_that_ends_its_thread_is_repeated(
    cluster: PostgresCluster, make_router: MakeRouter, connecting_ends: list[type[BaseException]]
) -> None:
    """An instance is probed again after code of the application has raised SystemExit in its probe's thread."""
    router = make_router(probe_interval=0.1)
    until_readers_serve(router, 2)
    reader = cluster.readers[0]
    cluster.kill(reader)
    eventually(lambda: len(router.topology.readers) == 1)
    connecting_ends.extend(ENDS * 2)  # These are more than the threads in reserve.
    cluster.restart(reader)
    until_readers_serve(router, 2)
    assert connecting_ends == []


def test_a_probe_that_ends_while_it_is_replaced_leaves_no_thread() -> None:
    """A probe's thread that returns while it is being replaced ends, and does not count as stuck."""
    is_cut = threading.Event()

    def connect(_: Instance) -> ProbeConnection:
        is_cut.wait(30)
        raise ProbeError("it is gone")

    def abort_connect(_: str) -> None:
        if not is_cut.is_set():
            is_cut.set()
            eventually(lambda: watcher.asked_at is None)

    settings = Settings("postgresql+psycopg://app@db-1/shop", probe_interval=0.05, probe_timeout=0.05)
    monitor = Monitor(settings, connect, abort_connect, lambda *_: (), lambda _: NOTHING_REACHED, ThreadWaiting())
    monitor.start()
    (watcher,) = monitor._watchers.values()
    first = watcher.thread
    eventually(lambda: watcher.thread is not first)
    eventually(lambda: not first.is_alive())
    assert watcher._stuck == 0
    monitor.close()


def test_a_stopped_monitor_waits_for_no_thread_of_its_own() -> None:
    """The garbage collector may stop a monitor in any thread, so a probe that hangs must not hold up the collector."""
    is_connecting, is_over = threading.Event(), threading.Event()

    def connect(_: Instance) -> ProbeConnection:
        is_connecting.set()
        is_over.wait(60)
        raise ProbeError("it is gone")

    settings = Settings("postgresql+psycopg://app@db-1/shop", probe_timeout=3600.0)
    monitor = Monitor(settings, connect, lambda _: None, lambda *_: (), lambda _: NOTHING_REACHED, ThreadWaiting())
    monitor.start()
    assert is_connecting.wait(30)
    (watcher,) = monitor.stop()
    assert watcher.thread.is_alive()
    is_over.set()
    monitor.close()
    eventually(lambda: not watcher.thread.is_alive())


def test_a_warning_that_cannot_be_logged_costs_no_instance(monkeypatch: pytest.MonkeyPatch) -> None:
    """A log handler that raises on the warning about the catalog takes no instance out of use."""
    said: list[str] = []
    known: list[ProbeFailure | None] = []

    class Broken(logging.Handler):
        def handle(self, record: logging.LogRecord) -> bool:
            said.append(record.getMessage())
            raise OSError

    class WithoutCatalog:
        def ask(self) -> ServerStatus:
            return ServerStatus(ServerId("cluster", None, None, "run"), Role.WRITER, 1, WalPosition(1, 1), None, "read committed")

        def functions(self) -> frozenset[str]:
            raise ProbeError("permission denied")

        def prune(self) -> bool:
            return False

        def shut_down(self) -> None: ...

        def close(self) -> None: ...

    broken = Broken()
    logging.getLogger("aurora_router").addHandler(broken)
    try:
        settings = Settings("postgresql+psycopg://app@db-1/shop", probe_interval=0.05)
        monitor = Monitor(
            settings, lambda _: WithoutCatalog(), lambda _: None, lambda *_: (), lambda _: NOTHING_REACHED, ThreadWaiting()
        )
        monkeypatch.setattr(monitor, "apply_news", lambda news: known.extend(each.probe_failure for each in news))
        monitor.start()
        eventually(lambda: any("could not be read" in line for line in said))
        asked = len(known)
        eventually(lambda: len(known) > asked + 1)
        monitor.close()
    finally:
        logging.getLogger("aurora_router").removeHandler(broken)
    assert set(known) == {None}


def test_a_handler_of_logs_that_ends_its_thread_ends_none(cluster: PostgresCluster, make_router: MakeRouter) -> None:
    """Pools are discarded although the application's handler of logs raises SystemExit at each line."""

    class Ends(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if in_own_thread():
                raise SystemExit

    logger, handler = logging.getLogger("aurora_router"), Ends()
    level = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    try:
        lose_both_readers_in_turn(cluster, make_router())
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


@pytest.mark.parametrize("end", [KeyboardInterrupt, SystemExit])
def test_ctrl_c_in_a_listener_is_not_swallowed(make_router: MakeRouter, end: type[BaseException]) -> None:
    """In the application's own thread, an exception that a signal handler raises in a listener reaches the caller."""

    def interrupted(event: Any) -> None:
        if isinstance(event, events.Routed):
            raise end

    router = make_router(listeners=[interrupted])
    with pytest.raises(end):
        router.connect()
    core_of(router).dispatcher.listeners = ()
    with router.connect():
        pass
