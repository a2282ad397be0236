"""Crowds on a real cluster: connects in turn, reads in part of the writer's pool, and retries within a budget."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest
from sqlalchemy import exc, text
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.orm import sessionmaker

from aurora_router import ConfigurationError, NoReaderAvailable, Router, RouterError, RoutingSession
from aurora_router.core import events
from aurora_router.local import FaultProxy, PostgresCluster
from aurora_router.router import core_of
from tests.integration.shop import (
    Item,
    eventually,
    instance_id,
    no_connection_is_left,
    place,
    through,
    until_readers_serve,
)
from tests.interruptions import interrupted_at_each_line

MakeRouter = Callable[..., Router]
SMALL = {"pool_size": 4, "max_overflow": 0}  # Half of it is two.


class Crowd:
    """Threads that each get a connection and keep it until the crowd goes home."""

    def __init__(self, count: int, connect: Callable[[], Connection]) -> None:
        self.served: list[str] = []
        self.errors: list[Exception] = []
        self._connect = connect
        self._home = threading.Event()
        self._threads = [threading.Thread(target=self._work) for _ in range(count)]
        for thread in self._threads:
            thread.start()

    def _work(self) -> None:
        try:
            with self._connect() as connection:
                self.served.append(connection.scalar(text("SELECT host(inet_server_addr())")))
                self._home.wait(60)
        except Exception as error:
            self.errors.append(error)

    def go_home(self) -> None:
        self._home.set()
        for thread in self._threads:
            thread.join(60)
            assert not thread.is_alive()


def engine_behind(proxy: FaultProxy, cluster: PostgresCluster, make_router: MakeRouter, **options: Any) -> tuple[Router, Engine]:
    """A router that does not probe during the test, and its engine of the writer behind the proxy."""
    router = make_router(through(proxy, cluster), probe_timeout=30.0, probe_interval=30.0, **options)
    return router, router.engine(router.topology.by_id[proxy.address])


def queue(router: Router, instance: str) -> int:
    """The number of threads that wait for their turn to connect there."""
    return router.stats().by_id[instance].connects_waiting


@pytest.mark.parametrize("at_once", [1, 4])
def test_only_so_many_of_fifty_threads_connect_at_once(
    cluster: PostgresCluster, proxy: FaultProxy, make_router: MakeRouter, at_once: int
) -> None:
    """Of fifty threads only so many connect at once, and all are served."""
    options = {"pool_size": 50, "connect_args": {"connect_timeout": 60}}
    router = make_router(
        through(proxy, cluster), engine_options=options, connects_at_once=at_once, probe_timeout=30.0, probe_interval=30.0
    )
    with router.connect():
        pass
    proxy.black_hole()
    before = proxy.accepted
    with router.connect():  # This one is in the pool already.
        crowd = Crowd(50, router.connect)
        eventually(lambda: queue(router, proxy.address) == 50 - at_once)
        eventually(lambda: proxy.accepted == before + at_once)
    with router.connect():
        pass  # A connection in the pool needs no waiting.
    assert proxy.accepted == before + at_once
    assert queue(router, proxy.address) == 50 - at_once
    proxy.heal()
    eventually(lambda: len(crowd.served) == 50, 60.0)
    crowd.go_home()
    assert crowd.errors == []


def test_a_thread_waiting_to_connect_leaves_a_lost_instance(cluster: PostgresCluster, make_router: MakeRouter) -> None:
    """A thread that waits to connect to an instance that is lost goes elsewhere at once."""
    first, second = cluster.readers
    with FaultProxy((first.host, first.port)) as proxy:
        router = make_router(
            cluster.url,
            instances=[proxy.address, second.address],
            balance=lambda readers, load, rnd: next((r for r in readers if r.id == proxy.address), readers[0]),
            probe_timeout=0.5,
            engine_options={"pool_size": 20, "connect_args": {"connect_timeout": 60}},
        )
        with router.connect(read_only=True):
            core_of(router).engines.evict(proxy.address)
        proxy.black_hole()
        crowd = Crowd(20, lambda: router.connect(read_only=True))
        eventually(lambda: len(crowd.served) == 20)  # Connecting threads are cut, so they go on as well.
        assert set(crowd.served) == {second.host}
        crowd.go_home()
        assert crowd.errors == []


def test_a_failed_connect_ends_the_waiting_behind_it(
    cluster: PostgresCluster, proxy: FaultProxy, make_router: MakeRouter
) -> None:
    """If one connect fails, all waiting threads fail too."""
    options = {"pool_size": 10, "connect_args": {"connect_timeout": 2}}
    _, engine = engine_behind(proxy, cluster, make_router, engine_options=options, connects_at_once=1)
    proxy.black_hole()
    before = proxy.accepted
    crowd = Crowd(10, engine.connect)
    eventually(lambda: len(crowd.errors) == 10, 60.0)
    assert proxy.accepted == before + 1, "nine that would have waited as long for nothing"
    crowd.go_home()


def test_a_connect_that_took_too_long_keeps_no_socket(
    cluster: PostgresCluster, proxy: FaultProxy, make_router: MakeRouter
) -> None:
    options = {"connect_args": {"connect_timeout": 2}}
    router, engine = engine_behind(proxy, cluster, make_router, engine_options=options)
    proxy.black_hole()
    gc.disable()  # A socket that only the collector would close stays open.
    try:
        with pytest.raises(exc.OperationalError, match="timeout"):
            engine.connect()
        assert core_of(router).engines._pools[proxy.address].is_unused
    finally:
        gc.enable()


def test_waiting_to_connect_is_bounded_by_the_pool_timeout(
    cluster: PostgresCluster, proxy: FaultProxy, make_router: MakeRouter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread does not wait to connect for longer than it would wait for a pool."""
    monkeypatch.setattr("aurora_router.cluster.instance_pool.CONNECT_TIMEOUT", 1)
    options = {"pool_timeout": 0.2, "connect_args": {"connect_timeout": 60}}
    _, engine = engine_behind(proxy, cluster, make_router, engine_options=options, connects_at_once=1)
    proxy.black_hole()
    crowd = Crowd(2, engine.connect)
    eventually(lambda: len(crowd.errors) == 1)
    assert isinstance(crowd.errors[0], exc.OperationalError)
    assert "too many connects" in str(crowd.errors[0])
    proxy.heal()
    eventually(lambda: len(crowd.served) == 1)
    crowd.go_home()


def test_writes_find_room_while_reads_crowd_the_writer(cluster: PostgresCluster, make_router: MakeRouter) -> None:
    router = make_router(engine_options=SMALL)
    router.start()
    for reader in cluster.readers:
        cluster.kill(reader)
    eventually(lambda: not router.topology.readers)
    crowd = Crowd(20, lambda: router.connect(read_only=True))
    eventually(lambda: len(crowd.served) == 2)
    eventually(lambda: router.stats().reads_waiting_for_slot == 18)
    with ExitStack() as stack:
        for number in (100, 101):
            session = stack.enter_context(sessionmaker(class_=RoutingSession, router=router)())
            session.add(Item(id=number))
            session.flush()
    assert len(crowd.served) == 2
    crowd._home.set()  # Each thread leaves its place to the next one.
    crowd.go_home()
    assert crowd.errors == []
    assert crowd.served == [cluster.writer.host] * 20
    assert router.stats().writer_read_slots_in_use == 0


@pytest.mark.parametrize(("pool_timeout", "failover_timeout"), [(0.3, 60.0), (60.0, 0.3)])
def test_a_read_without_a_place_in_time_is_told_so(
    cluster: PostgresCluster, make_router: MakeRouter, pool_timeout: float, failover_timeout: float
) -> None:
    """The error says how long the read has waited: until pool_timeout or failover_timeout, whichever was over first."""
    options = {**SMALL, "pool_timeout": pool_timeout}
    router = make_router(engine_options=options, writer_share_for_reads=0.25, failover_timeout=failover_timeout)
    router.start()
    for reader in cluster.readers:
        cluster.kill(reader)
    eventually(lambda: not router.topology.readers)
    Session = sessionmaker(class_=RoutingSession, router=router)
    with Session() as first, Session() as second:
        first.get(Item, 1)
        with pytest.raises(NoReaderAvailable, match="writer_share_for_reads") as caught:
            second.get(Item, 1)
        assert caught.value.waited is not None
        assert 0.3 <= caught.value.waited < 60.0
        first.rollback()
        assert second.get(Item, 1) is not None
        assert place(second) == "writer"


def test_a_read_that_turns_into_a_write_keeps_its_place(cluster: PostgresCluster, make_router: MakeRouter) -> None:
    """A unit that came to read and stayed to write keeps its place until it ends."""
    router = make_router(engine_options={**SMALL, "pool_timeout": 0.3}, writer_share_for_reads=0.25)
    router.start()
    for reader in cluster.readers:
        cluster.kill(reader)
    eventually(lambda: not router.topology.readers)
    Session = sessionmaker(class_=RoutingSession, router=router)
    with Session() as s:
        s.get(Item, 1)
        s.add(Item(id=100))
        s.flush()
        with pytest.raises(NoReaderAvailable):
            router.connect(read_only=True)
        s.commit()
        with router.connect(read_only=True):
            pass
    assert router.stats().writer_read_slots_in_use == 0


def test_a_read_waiting_for_a_place_takes_a_returning_reader(cluster: PostgresCluster, make_router: MakeRouter) -> None:
    """A read that waits for a place takes a reader that comes back."""
    router = make_router(engine_options=SMALL, writer_share_for_reads=0.25)
    router.start()
    readers = cluster.readers
    for reader in readers:
        cluster.kill(reader)
    eventually(lambda: not router.topology.readers)
    with router.connect(read_only=True):
        crowd = Crowd(3, lambda: router.connect(read_only=True))
        eventually(lambda: router.stats().reads_waiting_for_slot == 3)
        cluster.restart(readers[0])
        eventually(lambda: len(crowd.served) == 3)
        assert set(crowd.served) == {readers[0].host}
        crowd.go_home()
        assert crowd.errors == []


def test_a_router_that_is_closed_lets_nobody_wait_for_a_place(cluster: PostgresCluster, make_router: MakeRouter) -> None:
    router = make_router(engine_options=SMALL, writer_share_for_reads=0.25)
    router.start()
    for reader in cluster.readers:
        cluster.kill(reader)
    eventually(lambda: not router.topology.readers)
    with router.connect(read_only=True):
        crowd = Crowd(1, lambda: router.connect(read_only=True))
        eventually(lambda: router.stats().reads_waiting_for_slot == 1)
        router.close()
        crowd.go_home()
    assert [type(error) for error in crowd.errors] == [RouterError]


@pytest.mark.parametrize("read_only", [True, None])
def test_a_unit_interrupted_at_any_line_leaves_its_place(
    cluster: PostgresCluster, make_router: MakeRouter, read_only: bool | None
) -> None:
    """Wherever a signal handler's exception ends a read on the writer, the read's place is free again."""
    router = make_router(cluster.url, instances=[f"{cluster.writer.host}:1"], engine_options=SMALL)
    Session = sessionmaker(class_=RoutingSession, router=router)
    router.start()
    assert not router.topology.readers

    def read() -> None:
        with Session(read_only=read_only) as s:
            s.get(Item, 1)
            assert router.stats().writer_read_slots_in_use == 1

    for _ in interrupted_at_each_line(read, "checkout.py", "waits.py", "unit.py"):
        assert router.stats().writer_read_slots_in_use == 0
        assert all(pool._connect_slots.demand == 0 for pool in core_of(router).engines._pools.values())
        assert no_connection_is_left(router)
    read()


def test_a_single_instance_gives_reads_all_of_its_pool(cluster: PostgresCluster, make_router: MakeRouter) -> None:
    router = make_router(cluster.url, engine_options=SMALL)
    crowd = Crowd(4, lambda: router.connect(read_only=True))
    eventually(lambda: len(crowd.served) == 4)
    crowd.go_home()


def test_the_pin_after_an_own_write_needs_no_place(cluster: PostgresCluster, make_router: MakeRouter) -> None:
    router = make_router(engine_options=SMALL, consistency="global", writer_share_for_reads=0.25)
    for reader in cluster.readers:
        cluster.pause_replay(reader)
    with router.begin() as connection:
        connection.execute(text("UPDATE item SET stock = 0"))
    crowd = Crowd(4, lambda: router.connect(read_only=True))
    eventually(lambda: len(crowd.served) == 4)
    assert set(crowd.served) == {cluster.writer.host}
    crowd.go_home()


def test_a_unit_whose_connection_cannot_be_had_leaves_its_place(cluster: PostgresCluster, make_router: MakeRouter) -> None:
    router = make_router(engine_options=SMALL, writer_share_for_reads=0.25, failover_timeout=0.5)
    router.start()
    for instance in cluster.instances:
        cluster.kill(instance)
    for _ in range(3):
        with pytest.raises(RouterError):
            router.connect(read_only=True)
    assert router.stats().writer_read_slots_in_use == 0


def spend(router: Router) -> None:
    """Use up the retry budget, as other units would."""
    while core_of(router).throttle.budget.try_spend(time.monotonic(), first=False):
        pass


def test_a_units_first_repeat_is_free_of_the_budget(cluster: PostgresCluster, make_router: MakeRouter) -> None:
    """A unit's first retry is free, and the next one is refused if the budget is spent."""
    heard: list[events.Event] = []
    router = make_router(listeners=[heard.append])
    with sessionmaker(class_=RoutingSession, router=router)() as s:
        s.get(Item, 1)
        first = instance_id(s)
        spend(router)
        cluster.kill(next(i for i in cluster.instances if i.address == first))
        assert s.get(Item, 2) is not None
        second = instance_id(s)
        assert second != first
        cluster.kill(next(i for i in cluster.instances if i.address == second))
        with pytest.raises(exc.OperationalError):
            s.get(Item, 3)
    refused = [e for e in heard if isinstance(e, events.RetriesRefused)]
    assert [e.instance for e in refused] == [second]
    with sessionmaker(class_=RoutingSession, router=router)() as s:
        assert s.get(Item, 3) is not None, "another unit has a first repeat of its own"


def test_a_unit_without_budget_to_reconnect_waits(cluster: PostgresCluster, make_router: MakeRouter) -> None:
    """A unit that may not connect again waits instead of failing."""
    heard: list[events.Event] = []
    router = make_router(listeners=[heard.append])
    router.start()
    spend(router)
    cluster.execute("ALTER ROLE app CONNECTION LIMIT 0")
    try:
        crowd = Crowd(3, router.connect)
        eventually(lambda: any(isinstance(e, events.RetriesRefused) for e in heard))
    finally:
        cluster.execute("ALTER ROLE app CONNECTION LIMIT -1")
    assert crowd.errors == []
    for _ in range(1000):
        core_of(router).throttle.record_unit(time.monotonic())  # Units that connect earn the retries of the others.
    eventually(lambda: len(crowd.served) == 3)
    crowd.go_home()
    assert crowd.errors == []


def test_a_router_that_is_closed_lets_nobody_wait_to_knock_again(cluster: PostgresCluster, make_router: MakeRouter) -> None:
    heard: list[events.Event] = []
    router = make_router(listeners=[heard.append])
    router.start()
    spend(router)
    cluster.execute("ALTER ROLE app CONNECTION LIMIT 0")
    try:
        crowd = Crowd(1, router.connect)
        eventually(lambda: any(isinstance(e, events.RetriesRefused) for e in heard))
        router.close()
        crowd.go_home()
    finally:
        cluster.execute("ALTER ROLE app CONNECTION LIMIT -1")
    assert [type(error) for error in crowd.errors] == [RouterError]


def test_a_unit_is_not_retried_for_ever_without_budget(cluster: PostgresCluster, router: Router) -> None:
    """A function is not run again without end if the budget is spent."""
    runs = 0
    Session = sessionmaker(class_=RoutingSession, router=router)

    def fail(s: RoutingSession) -> None:
        nonlocal runs
        runs += 1
        s.execute(text("UPDATE item SET stock = 0 WHERE id = 1"))
        s.execute(text("SELECT pg_terminate_backend(pg_backend_pid())"))

    cluster.execute("GRANT pg_signal_backend TO app")
    spend(router)
    with pytest.raises(exc.OperationalError):
        router.run_transaction(Session, fail)
    assert runs == 2


def test_an_attempt_between_two_writers_waits_despite_budget(
    aurora_cluster_factory: Callable[..., PostgresCluster],
) -> None:
    """An attempt that meets two writers waits until one is gone, whatever the budget."""
    cluster = aurora_cluster_factory(readers=2)
    cluster.execute("CREATE TABLE item (id int); GRANT ALL ON item TO app")
    cluster.wait_in_sync()
    first, second = cluster.readers
    met: list[int] = []

    def watch(event: events.Event) -> None:
        if isinstance(event, events.RunAgain) and event.error == "AmbiguousWriter":
            met.append(event.number)
            if event.number == 3:
                cluster.kill(second)

    with Router(cluster.url, instances=[first.address, second.address], probe_interval=0.1, listeners=[watch]) as router:
        router.start()
        cluster.kill(cluster.writer)
        for reader in (first, second):
            cluster.execute("SELECT pg_promote()", instance=reader)
        eventually(lambda: len(router.topology.ambiguous) == 2)
        spend(router)
        Session = sessionmaker(class_=RoutingSession, router=router)
        router.run_transaction(Session, lambda s: s.execute(text("INSERT INTO item VALUES (1)")))
    assert met[:3] == [1, 2, 3]
    assert cluster.execute("SELECT count(*) FROM item", instance=first) == [(1,)]
    cluster.stop()


def test_impossible_settings_are_refused_by_the_constructor(cluster: PostgresCluster) -> None:
    """Settings that cannot work are refused when the router is made."""
    with pytest.raises(ConfigurationError, match="writer_share_for_reads"):
        Router(cluster.url, writer_share_for_reads=0)
    with pytest.raises(ConfigurationError, match="connects_at_once"):
        Router(cluster.url, connects_at_once=0)
    with pytest.raises(ConfigurationError, match="pool_size"):
        Router(cluster.url, engine_options={"pool_size": "5"})


def test_readers_serve_again_when_they_are_back(cluster: PostgresCluster, make_router: MakeRouter) -> None:
    router = make_router(engine_options=SMALL)
    router.start()
    readers = cluster.readers
    for reader in readers:
        cluster.kill(reader)
    eventually(lambda: not router.topology.readers)
    with router.connect(read_only=True) as connection:
        assert connection.scalar(text("SELECT host(inet_server_addr())")) == cluster.writer.host
    for reader in readers:
        cluster.restart(reader)
    until_readers_serve(router, 2)
    crowd = Crowd(8, lambda: router.connect(read_only=True))
    eventually(lambda: len(crowd.served) == 8)
    assert cluster.writer.host not in crowd.served
    crowd.go_home()
