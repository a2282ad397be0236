"""Kills, promotions, returns and freezes on a real cluster."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from select import select as select_
from typing import Any

import pytest
from sqlalchemy import exc, func, insert, select, text

from aurora_router import (
    AmbiguousWriter,
    NoReaderAvailable,
    NoWriterAvailable,
    OutcomeUnknown,
    Role,
    Router,
    RoutingSession,
    classify_error,
)
from aurora_router.cluster.connection_modes import FRESH
from aurora_router.core import events
from aurora_router.core.failures import Facts, Failure
from aurora_router.local import FaultProxy, PostgresCluster
from aurora_router.local.mysql_family import MysqlFamilyCluster
from aurora_router.router import core_of
from tests.integration.shop import (
    BOTH,
    RAISE,
    Item,
    Part,
    connection_id,
    connection_ids,
    end_connections,
    eventually,
    instance_id,
    place,
    server_address,
    sessions,
    set_up,
    until_readers_serve,
)

MakeRouter = Callable[..., Router]
DEMOTABLE = pytest.mark.engines("mariadb", "mysql")
"""Runs the test on the engines whose writers may live on and take no writes."""


def add_item(router: Router, number: int) -> None:
    with sessions(router)() as s, s.begin():
        s.add(Item(id=number))


@BOTH
def test_units_that_need_a_writer_wait_for_the_promotion(cluster: PostgresCluster, make_router: MakeRouter) -> None:
    """Units that need a writer wait for the promotion and succeed."""
    heard: list[events.Event] = []
    router = make_router(listeners=[heard.append])
    add_item(router, 100)
    old = cluster.writer
    cluster.wait_in_sync()
    cluster.kill(old)
    eventually(lambda: router.topology.writer is None)
    heard.clear()  # on a slow machine, the first unit may have waited as well
    done: list[float] = []

    def work(number: int) -> None:
        add_item(router, number)
        done.append(time.monotonic())

    threads = [threading.Thread(target=work, args=(200 + n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    eventually(lambda: router.stats().units_waiting_for_writer == 8)
    assert done == []
    new = cluster.promote()
    for thread in threads:
        thread.join(20)
    assert len(done) == 8
    assert cluster.execute("SELECT count(*) FROM item WHERE id >= 100", instance=new) == [(9,)]
    assert router.topology.writer is not None
    assert router.topology.writer.id == new.address
    assert [e.found for e in heard if isinstance(e, events.WaitedForWriter)] == [new.address] * 8


@pytest.fixture
def demote(cluster: MysqlFamilyCluster) -> Iterator[Callable[[], None]]:
    """A function that makes the writer live on and take no writes. A planned switchover begins in this way."""
    old = cluster.writer
    yield lambda: cluster._order(old, f"SET GLOBAL {cluster._words.read_only} = ON")
    if cluster.writer == old:
        cluster._order(old, "SET GLOBAL read_only = OFF")


@DEMOTABLE
def test_a_planned_switchover_is_a_pause_for_run_transaction(
    cluster: MysqlFamilyCluster, make_router: MakeRouter, demote: Callable[[], None]
) -> None:
    """A planned switchover is a pause for run_transaction and no error."""
    router = make_router()
    router.init_commit_table()
    acknowledged: list[int] = []
    errors: list[Exception] = []
    stop = threading.Event()

    def work(worker: int) -> None:
        number = worker * 1_000_000
        while not stop.is_set():
            number += 1
            try:
                router.run_transaction(sessions(router), lambda s, number=number: s.execute(insert(Item).values(id=number)))
            except Exception as error:
                errors.append(error)
            else:
                acknowledged.append(number)

    threads = [threading.Thread(target=work, args=(n + 1,)) for n in range(4)]
    for thread in threads:
        thread.start()
    eventually(lambda: len(acknowledged) > 50)
    demote()
    eventually(lambda: router.stats().units_waiting_for_writer == 4 or errors)
    cluster.wait_in_sync()
    new = cluster.promote()
    count = len(acknowledged)
    eventually(lambda: len(acknowledged) > count + 50)
    stop.set()
    for thread in threads:
        thread.join(30)
    assert errors == []
    found = [number for (number,) in cluster.execute("SELECT id FROM item WHERE id > 1000000", instance=new)]
    assert sorted(found) == sorted(acknowledged)


@DEMOTABLE
@pytest.mark.parametrize("commit_check", [None, "table"])
@pytest.mark.parametrize("before", ["another statement", "the COMMIT"])
def test_a_unit_of_a_demoted_writer_is_run_again_on_the_next(
    cluster: MysqlFamilyCluster, make_router: MakeRouter, demote: Callable[[], None], before: str, commit_check: Any
) -> None:
    """A unit that has written when its writer is demoted is run again on the new one."""
    router = make_router(probe_interval=60.0)
    router.init_commit_table()
    cluster.wait_in_sync()
    old = cluster.writer
    runs: list[int] = []

    def write(s: RoutingSession) -> None:
        runs.append(1)
        s.execute(insert(Item).values(id=100))
        if len(runs) == 1:
            demote()
        if before == "another statement":
            s.execute(insert(Item).values(id=101))

    thread = threading.Thread(target=lambda: router.run_transaction(sessions(router), write, commit_check=commit_check))
    thread.start()
    eventually(lambda: router.stats().units_waiting_for_writer and router.topology.writer is None)
    assert cluster.execute("SELECT count(*) FROM item WHERE id >= 100", instance=old) == [(0,)], "all of it was rolled back"
    new = cluster.promote()
    thread.join(20)
    assert runs == [1, 1]
    assert cluster.execute("SELECT min(id) FROM item WHERE id >= 100", instance=new) == [(100,)]


@DEMOTABLE
@pytest.mark.parametrize("before", ["another statement", "the COMMIT"])
def test_a_plain_session_is_told_of_the_demotion_once(
    cluster: MysqlFamilyCluster, make_router: MakeRouter, demote: Callable[[], None], before: str
) -> None:
    """A plain session gets one error from the demotion, and its next unit waits for the new writer."""
    router = make_router(probe_interval=60.0)
    with sessions(router)() as s:
        s.execute(insert(Item).values(id=100))
        demote()
        with pytest.raises(exc.OperationalError, match="1290") as caught:
            s.commit() if before == "the COMMIT" else s.execute(RAISE)
        assert classify_error(caught.value) == Facts(Failure.READ_ONLY, sent=True, outcome_known=True, safe_to_repeat=True)
        assert router.topology.writer is None, "it is seen before anybody can ask for it once more"
        s.rollback()
        thread = threading.Thread(target=lambda: (s.execute(insert(Item).values(id=100)), s.commit()))
        thread.start()
        eventually(lambda: router.stats().units_waiting_for_writer)
        new = cluster.promote()
        thread.join(20)
    assert cluster.execute("SELECT count(*) FROM item WHERE id >= 100", instance=new) == [(1,)]


def test_waiting_for_a_writer_costs_hardly_any_processor_time(cluster: PostgresCluster, make_router: MakeRouter) -> None:
    router = make_router(failover_timeout=2.0)
    router.start()
    cluster.kill(cluster.writer)
    eventually(lambda: router.topology.writer is None)
    began = time.process_time()
    with pytest.raises(NoWriterAvailable) as caught:
        router.connect()
    assert caught.value.waited >= 1.9
    assert time.process_time() - began < 1.0, "no busy loop"
    assert all(i.address in str(caught.value) for i in cluster.instances), "each instance and what it last said"
    assert "refused" in str(caught.value)
    assert "reader at" in str(caught.value)


@BOTH
def test_the_old_writer_is_taken_back_as_a_reader(cluster: PostgresCluster, make_router: MakeRouter) -> None:
    router = make_router()
    add_item(router, 100)
    old = cluster.writer
    cluster.kill(old)
    cluster.promote()
    add_item(router, 101)
    cluster.rejoin(old)
    until_readers_serve(router, 2)
    assert old.address in {r.id for r in router.topology.readers}
    served: set[str] = set()
    for _ in range(6):
        with sessions(router)() as s:
            s.get(Item, 1)
            served.add(instance_id(s))
    assert old.address in served


@BOTH
def test_a_deposed_writer_that_believes_in_itself_gets_no_unit(
    cluster: PostgresCluster, make_router: MakeRouter, heard: list[events.Event]
) -> None:
    """A deposed writer that still accepts writes gets no unit."""
    router = make_router(listeners=[heard.append], probe_interval=0.1)
    add_item(router, 100)
    old = cluster.writer

    def discarded() -> list[events.ConnectionsDiscarded]:
        return [e for e in heard if isinstance(e, events.ConnectionsDiscarded) and e.instance == old.address]

    with router.connect() as stuck:
        stuck.execute(text("SELECT 1"))
        new = cluster.promote()
        eventually(lambda: router.topology.writer is not None and router.topology.writer.id == new.address)
        assert "deposed" in router.topology.by_id[old.address].error
        eventually(discarded)
        with pytest.raises(exc.OperationalError):
            stuck.execute(text("SELECT 1"))
    add_item(router, 101)
    assert cluster.execute("SELECT count(*) FROM item WHERE id = 101", instance=new) == [(1,)]
    assert cluster.execute("SELECT count(*) FROM item WHERE id = 101", instance=old) == [(0,)]
    assert discarded()[0].cut >= 1
    for _ in range(4):
        with router.connect(read_only=True) as connection:
            assert server_address(connection) != old.address, "nor does it serve reads"


@BOTH
def test_a_restarted_deposed_writer_gets_no_unit_either(cluster: PostgresCluster, make_router: MakeRouter) -> None:
    router = make_router(probe_interval=0.1)
    router.start()
    old = cluster.writer
    cluster.kill(old)
    new = cluster.promote()
    add_item(router, 100)
    cluster.restart(old)
    eventually(lambda: "deposed" in router.topology.by_id[old.address].error)
    cluster.kill(new)
    eventually(lambda: router.topology.writer is None)
    time.sleep(0.5)
    assert router.topology.writer is None, "rather no writer than an old one"


@pytest.mark.parametrize("read_only", [None, True])
def test_a_read_whose_reader_dies_is_repeated_elsewhere(
    cluster: PostgresCluster, make_router: MakeRouter, read_only: bool | None
) -> None:
    heard: list[events.Event] = []
    router = make_router(listeners=[heard.append])
    with sessions(router)(read_only=read_only) as s:
        item = s.get(Item, 1)
        assert item is not None
        first = instance_id(s)
        cluster.kill(next(i for i in cluster.instances if i.address == first))
        assert [part.id for part in item.parts] == [1, 2], "a lazy load, too"
        assert s.scalar(select(func.count()).select_from(Item)) == 3
        assert instance_id(s) != first
        assert s.get(Item, 1) is item, "the same objects in the same session"
    assert [e.instance for e in heard if isinstance(e, events.Repeated)] == [first]


def test_a_read_under_way_when_its_reader_dies_is_repeated(cluster: PostgresCluster, router: Router) -> None:
    """A read that is under way when its reader dies is repeated."""
    with sessions(router)() as s:
        s.get(Item, 1)
        first = instance_id(s)
        found: list[object] = []
        thread = threading.Thread(target=lambda: found.append(s.scalar(text("SELECT 42 FROM pg_sleep(1)"))))
        thread.start()
        busy = "SELECT count(*) FROM pg_stat_activity WHERE query LIKE '%pg_sleep(1)%' AND pid <> pg_backend_pid()"
        reader = next(i for i in cluster.instances if i.address == first)
        eventually(lambda: cluster.execute(busy, instance=reader) != [(0,)])
        cluster.kill(reader)
        thread.join(20)
        assert found == [42]
        assert instance_id(s) != first


@BOTH
def test_reads_go_to_the_writer_when_every_reader_is_gone(cluster: PostgresCluster, make_router: MakeRouter) -> None:
    router = make_router()
    strict = make_router(no_reader="error")
    strict.start()
    with sessions(router)() as s:
        for reader in cluster.readers:
            cluster.kill(reader)
        assert s.scalar(select(func.count()).select_from(Item)) == 3
        assert place(s) == "writer"
    eventually(lambda: not strict.topology.readers)
    with sessions(strict)() as s, pytest.raises(NoReaderAvailable):
        s.get(Item, 1)


def test_a_repeatable_read_on_a_dead_reader_is_not_patched_up(cluster: PostgresCluster, make_router: MakeRouter) -> None:
    """A repeatable read transaction on a dead reader is not continued elsewhere.

    The snapshot is gone with the reader, and another reader would show another moment.
    """
    router = make_router(engine_options={"isolation_level": "REPEATABLE READ"})
    with sessions(router)(read_only=True) as s:
        s.get(Item, 1)
        first = instance_id(s)
        cluster.kill(next(i for i in cluster.instances if i.address == first))
        with pytest.raises(exc.OperationalError):
            s.scalar(select(func.count()).select_from(Item))
        s.rollback()
        assert s.scalar(select(func.count()).select_from(Item)) == 3


def test_a_read_only_transaction_with_settings_is_not_patched_up(cluster: PostgresCluster, router: Router) -> None:
    with sessions(router)(read_only=True) as s:
        s.execute(text("SET LOCAL work_mem = '8MB'"))
        first = instance_id(s)
        cluster.kill(next(i for i in cluster.instances if i.address == first))
        with pytest.raises(exc.OperationalError):
            s.scalar(select(func.count()).select_from(Item))


def test_a_read_cancelled_by_replay_is_repeated_elsewhere(cluster: PostgresCluster, make_router: MakeRouter) -> None:
    first = min(r.address for r in cluster.readers)
    reader = next(r for r in cluster.readers if r.address == first)
    cluster.execute("ALTER SYSTEM SET max_standby_streaming_delay = '50ms'", instance=reader)
    cluster.execute("SELECT pg_reload_conf()", instance=reader)
    try:
        router = make_router(balance=lambda readers, load, rnd: min(readers, key=lambda r: r.id))
        heard: list[object] = []

        def read() -> None:
            with sessions(router)() as s:
                heard.append(s.scalar(text("SELECT count(*) + 0 * (SELECT count(*) FROM part) FROM item, pg_sleep(1)")))
                heard.append(instance_id(s))

        thread = threading.Thread(target=read)
        thread.start()
        busy = "SELECT count(*) FROM pg_stat_activity WHERE query LIKE '%pg_sleep(1)%' AND pid <> pg_backend_pid()"
        eventually(lambda: cluster.execute(busy, instance=reader) != [(0,)])
        cluster.execute("TRUNCATE part, item; INSERT INTO item (id) VALUES (1)")
        thread.join(20)
        assert len(heard) == 2
        assert heard[1] != first
    finally:
        cluster.execute("ALTER SYSTEM RESET max_standby_streaming_delay", instance=reader)
        cluster.execute("SELECT pg_reload_conf()", instance=reader)


@BOTH
def test_idle_connections_of_a_dead_instance_are_discarded(cluster: PostgresCluster, make_router: MakeRouter) -> None:
    """Idle connections of a dead instance are discarded at once."""
    heard: list[events.Event] = []
    router = make_router(listeners=[heard.append], probe_interval=0.1)
    connections = [router.connect() for _ in range(5)]
    for connection in connections:
        connection.execute(text("SELECT 1"))
    for connection in connections:
        connection.close()
    writer = cluster.writer
    engine = core_of(router).engines._pools[writer.address]._engines[False]
    assert engine.pool.checkedin() == 5  # type: ignore[attr-defined]
    cluster.kill(writer)
    eventually(lambda: any(isinstance(e, events.ConnectionsDiscarded) for e in heard))
    assert engine.pool.checkedin() == 0  # type: ignore[attr-defined]


@BOTH
def test_a_connection_closed_while_idle_is_noticed_silently(cluster: PostgresCluster, router: Router) -> None:
    """A connection that the server closed while it was idle is noticed without an error."""
    add_item(router, 100)
    used_at = time.monotonic()
    sockets = [tracked.duplicate for tracked in core_of(router).engines._pools[cluster.writer.address]._sockets]
    assert sockets
    end_connections(cluster)
    # The server takes the connections off its list before it closes them.
    eventually(lambda: len(select_(sockets, [], [], 0)[0]) == len(sockets))
    eventually(lambda: time.monotonic() - used_at > FRESH)  # else it was not idle
    add_item(router, 101)
    assert cluster.execute("SELECT count(*) FROM item WHERE id >= 100") == [(2,)]


@BOTH
def test_a_promoted_readers_open_connections_serve_writes(cluster: PostgresCluster, make_router: MakeRouter) -> None:
    """If a reader is promoted in place, its open connections are used for writes."""
    # The router must not probe before the promotion is done.
    # The promotion stops the replication of a MariaDB reader, and the router does not use such a reader.
    router = make_router(probe_interval=60.0, probe_timeout=10.0)
    until_readers_serve(router, 2)
    for _ in range(4):
        with sessions(router)() as s:
            s.get(Item, 1)
    assert all(router.stats().by_id[reader.id].pool_idle for reader in router.topology.readers)
    cluster.wait_in_sync()
    cluster.kill(cluster.writer)
    new = cluster.promote()
    open_before = connection_ids(cluster, new)
    with router.connect() as connection:
        assert connection_id(connection) in open_before
    add_item(router, 100)
    assert cluster.execute("SELECT count(*) FROM item WHERE id = 100", instance=new) == [(1,)]


@BOTH
def test_a_promotion_is_seen_before_a_frozen_writer_times_out(cluster: PostgresCluster, make_router: MakeRouter) -> None:
    """A promotion is seen while a frozen writer still has time to answer."""
    router = make_router(probe_interval=60.0, probe_timeout=8.0)
    router.start()
    eventually(lambda: router.topology.writer is not None and len(router.topology.readers) == 2)
    old = cluster.writer
    cluster.freeze(old)
    core_of(router).monitor.suspect(old.address)  # probe it now; the next probe waits for the end of this one
    new = cluster.promote()
    eventually(lambda: router.topology.writer is not None and router.topology.writer.id == new.address)
    assert "deposed" in router.topology.by_id[old.address].error, "it has not been silent for long enough to be given up"


@BOTH
def test_a_frozen_reader_is_left_and_used_again_when_it_thaws(cluster: PostgresCluster, make_router: MakeRouter) -> None:
    router = make_router(probe_timeout=0.3, probe_interval=0.2)
    frozen, other = cluster.readers
    until_readers_serve(router, 2)
    cluster.freeze(frozen)
    eventually(lambda: not router.topology.by_id[frozen.address].healthy)
    assert "no answer within 0.3 s" in router.topology.by_id[frozen.address].error
    for _ in range(4):
        with router.connect(read_only=True) as connection:
            assert server_address(connection) == other.address
    cluster.thaw(frozen)
    eventually(lambda: router.topology.by_id[frozen.address].healthy)


@BOTH
def test_a_read_stuck_on_a_frozen_reader_is_freed_and_repeated(cluster: PostgresCluster, make_router: MakeRouter) -> None:
    router = make_router(probe_timeout=0.3, probe_interval=0.2)
    with sessions(router)() as s:
        s.get(Item, 1)
        first = instance_id(s)
        reader = next(i for i in cluster.instances if i.address == first)
        cluster.freeze(reader)
        assert s.scalar(select(func.count()).select_from(Part)) == 2
        assert instance_id(s) != first
        cluster.thaw(reader)


def test_one_lost_answer_takes_nobody_out_of_use(cluster: PostgresCluster, make_router: MakeRouter) -> None:
    reader = cluster.readers[0]
    heard: list[events.Event] = []
    with FaultProxy((reader.host, reader.port)) as proxy:
        router = make_router(instances=[proxy.address], probe_interval=0.1, listeners=[heard.append])
        until_readers_serve(router, 1)
        proxy.reset_all()
        time.sleep(0.5)
        assert not any(isinstance(e, events.InstanceDown) for e in heard)


def test_a_silent_instance_does_not_hold_up_the_monitor(cluster: PostgresCluster, make_router: MakeRouter) -> None:
    """The monitor is not held up by an instance that swallows everything."""
    swallowed, other = cluster.readers
    with FaultProxy((swallowed.host, swallowed.port)) as proxy:
        router = make_router(instances=[proxy.address, other.address], probe_interval=0.1, probe_timeout=0.3)
        until_readers_serve(router, 2)
        proxy.black_hole()
        eventually(lambda: not router.topology.by_id[proxy.address].healthy)
        cluster.kill(cluster.writer)
        new = cluster.promote(other)
        began = time.monotonic()
        add_item(router, 100)
        assert time.monotonic() - began < 30, "and not until failover_timeout is over"
        assert router.topology.writer is not None
        assert router.topology.writer.id == new.address


@BOTH
def test_nothing_is_lost_or_stale_through_three_promotions(
    aurora_cluster_factory: Callable[..., PostgresCluster],
) -> None:
    """No acknowledged write is lost and no read is stale through three promotions."""
    cluster = aurora_cluster_factory(readers=2, synchronous=True)
    set_up(cluster)
    acknowledged: list[int] = []
    stale: list[int] = []
    stop = threading.Event()
    others = [i.address for i in cluster.instances if i is not cluster.writer]
    with Router(cluster.url, instances=others) as router:

        def work(worker: int) -> None:
            number = worker * 1_000_000
            with sessions(router)() as s:
                while not stop.is_set():
                    number += 1
                    try:
                        s.execute(insert(Item).values(id=number, name="", stock=0))
                        s.commit()
                    except (exc.DBAPIError, OutcomeUnknown):
                        s.rollback()
                        continue
                    acknowledged.append(number)
                    if s.scalar(select(Item.id).where(Item.id == number)) != number:
                        stale.append(number)
                    s.rollback()

        threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for _ in range(3):
            count = len(acknowledged)
            eventually(lambda count=count: len(acknowledged) > count + 50, timeout=30)
            old = cluster.writer
            cluster.kill(old)
            cluster.promote()
            cluster.rejoin(old)
        count = len(acknowledged)
        eventually(lambda: len(acknowledged) > count + 50, timeout=30)
        stop.set()
        for thread in threads:
            thread.join(30)
        with router.connect() as connection:
            there = set(connection.scalars(select(Item.id)))
    assert stale == []
    assert set(acknowledged) <= there
    assert all(i.role in (Role.WRITER, Role.READER, None) for i in core_of(router).monitor.topology)
    cluster.stop()


def test_two_writers_of_one_epoch_take_no_writes(
    aurora_cluster_factory: Callable[..., PostgresCluster],
) -> None:
    """Two writers of one epoch take no writes until one is gone."""
    cluster = aurora_cluster_factory(readers=2)
    first, second = cluster.readers
    with Router(cluster.url, instances=[first.address, second.address], probe_interval=0.1) as router:
        router.start()
        cluster.kill(cluster.writer)
        for reader in (first, second):
            cluster.execute("SELECT pg_promote()", instance=reader)
        eventually(lambda: len(router.topology.ambiguous) == 2)
        with pytest.raises(AmbiguousWriter) as caught:
            router.connect()
        assert set(caught.value.instances) == {first.address, second.address}
        cluster.kill(second)
        eventually(lambda: router.topology.writer is not None and router.topology.writer.id == first.address)
        with router.connect() as connection:
            assert connection.scalar(text("SELECT pg_is_in_recovery()")) is False
    cluster.stop()


def test_a_late_listener_of_a_restart_cuts_no_new_connection(
    cluster: PostgresCluster, make_router: MakeRouter, heard: list[events.Event]
) -> None:
    """If a slow listener delays the news of a restart, no connection made since is cut."""
    hears, may_go_on = threading.Event(), threading.Event()

    def slow(event: events.Event) -> None:
        heard.append(event)
        if isinstance(event, events.InstanceDown):
            hears.set()
            may_go_on.wait(30)

    reader, other = cluster.readers
    router = make_router(listeners=[slow])
    until_readers_serve(router, 2)
    (before,) = router.topology.by_id[other.address].servers
    cluster.kill(reader)
    assert hears.wait(15)
    cluster.restart(other)
    eventually(lambda: router.topology.by_id[other.address].servers not in (frozenset(), frozenset({before})))
    with router.connect(read_only=True) as connection:
        assert server_address(connection) == other.address
        may_go_on.set()
        # A probe may come while the server is down. Then the instance is lost, and not only restarted.
        eventually(lambda: any(isinstance(e, events.ConnectionsDiscarded) and e.instance == other.address for e in heard))
        assert connection.scalar(text("SELECT 1")) == 1
