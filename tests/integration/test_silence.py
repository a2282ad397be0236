"""Servers that hang, vanish or swallow data: the threads that wait for them wake, and no others are disturbed."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack

import pytest
from sqlalchemy import event, exc, insert, select, text
from sqlalchemy.engine import Connection

from aurora_router import Router
from aurora_router.core import events
from aurora_router.local import FaultProxy, PostgresCluster
from aurora_router.router import core_of
from tests.integration.shop import BOTH, Item, eventually, server_address, sessions, until_readers_serve

MakeRouter = Callable[..., Router]


class Background:
    """A call in a thread of its own, and how it ended."""

    def __init__(self, call: Callable[[], object]) -> None:
        self.result: object = None
        self.error: BaseException | None = None
        self._call = call
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            self.result = self._call()
        except BaseException as error:
            self.error = error

    def end(self) -> Background:
        self._thread.join(20)
        assert not self._thread.is_alive(), "it hangs"
        return self


def until_cut(connection: Connection) -> Background:
    """A statement on a connection to a frozen server; it ends when the connection is cut."""

    def call() -> None:
        with pytest.raises(exc.OperationalError):
            connection.execute(text("SELECT 2"))
        connection.close()

    return Background(call)


@BOTH
@pytest.mark.parametrize("promoted", [False, True])
def test_a_statement_stuck_on_a_frozen_writer_is_cut(cluster: PostgresCluster, make_router: MakeRouter, promoted: bool) -> None:
    router = make_router(probe_interval=0.2, probe_timeout=0.3 if not promoted else 60)
    with router.connect() as connection:
        connection.execute(text("SELECT 1"))
        cluster.wait_in_sync()
        cluster.freeze(cluster.writer)
        stuck = Background(lambda: connection.execute(text("SELECT 2")))
        # The newer epoch is enough, so no probe of the old writer has to time out.
        if promoted:
            cluster.promote(cluster.readers[0])
        assert isinstance(stuck.end().error, exc.OperationalError)
        connection.invalidate()


@BOTH
def test_a_commit_stuck_on_a_frozen_writer_is_cut(cluster: PostgresCluster, make_router: MakeRouter) -> None:
    router = make_router(probe_interval=0.2, probe_timeout=0.3)
    with sessions(router)() as s:
        s.execute(insert(Item).values(id=100))
        cluster.freeze(cluster.writer)
        stuck = Background(s.commit)
        assert stuck.end().error is not None
        s.rollback()


def test_a_statement_stuck_behind_a_black_hole_is_cut(cluster: PostgresCluster, make_router: MakeRouter) -> None:
    with FaultProxy((cluster.writer.host, cluster.writer.port)) as proxy:
        url = cluster.url.replace(cluster.writer.address, proxy.address)
        router = make_router(url, probe_interval=0.2, probe_timeout=0.3, instances=[r.address for r in cluster.readers])
        with router.connect() as connection:
            connection.execute(text("SELECT 1"))
            proxy.black_hole()
            assert isinstance(Background(lambda: connection.execute(text("SELECT 2"))).end().error, exc.OperationalError)
            connection.invalidate()
        proxy.heal()


def test_a_slow_statement_on_a_healthy_instance_is_never_cut(cluster: PostgresCluster, make_router: MakeRouter) -> None:
    heard: list[events.Event] = []
    router = make_router(probe_interval=0.1, probe_timeout=0.3, listeners=[heard.append])
    until_readers_serve(router, 2)
    with router.connect() as writing, router.connect(read_only=True) as reading:
        slow = [Background(lambda c=c: c.scalar(text("SELECT 42 FROM pg_sleep(2)"))) for c in (writing, reading)]
        assert [each.end().error or each.result for each in slow] == [42, 42]
    assert not any(isinstance(e, events.ConnectionsDiscarded) for e in heard)


def test_a_pool_waiter_of_a_frozen_writer_gets_the_next_one(cluster: PostgresCluster, make_router: MakeRouter) -> None:
    """A thread that waits for a connection of a frozen writer gets one of the next writer."""
    router = make_router(
        probe_interval=0.2, probe_timeout=0.3, engine_options={"pool_size": 1, "max_overflow": 0, "pool_timeout": 60}
    )
    with router.connect() as connection:
        connection.execute(text("SELECT 1"))
        cluster.wait_in_sync()
        cluster.freeze(cluster.writer)

        stuck = until_cut(connection)

        def add(number: int) -> None:
            with sessions(router)() as s, s.begin():
                s.add(Item(id=number))

        waiting = [Background(lambda n=n: add(n)) for n in range(100, 104)]
        cluster.promote(cluster.readers[0])
        for each in (stuck, *waiting):
            assert each.end().error is None
    assert cluster.execute("SELECT count(*) FROM item WHERE id >= 100") == [(4,)]


@BOTH
def test_who_is_connecting_to_a_frozen_writer_is_woken(cluster: PostgresCluster, make_router: MakeRouter) -> None:
    """A thread that connects to a frozen writer is woken long before the connect timeout."""
    # With this probe_timeout the thread begins to connect before the writer counts as lost, also on a busy machine.
    router = make_router(probe_interval=0.1, probe_timeout=1.5, engine_options={"connect_args": {"connect_timeout": 100}})
    router.start()
    cluster.wait_in_sync()
    old = cluster.writer
    cluster.freeze(old)

    def add() -> str:
        with sessions(router)() as s, s.begin():
            s.add(Item(id=100))
            s.flush()
            return server_address(s.connection())

    connecting = Background(add)
    eventually(lambda: not core_of(router).engines._pools[old.address].is_unused)
    new = cluster.promote(cluster.readers[0])
    assert (connecting.end().error or connecting.result) == new.address


def test_a_connect_to_an_address_without_answers_is_woken(cluster: PostgresCluster, make_router: MakeRouter) -> None:
    """A thread that connects to an address that answers nothing is woken.

    The address does not even answer TCP's handshake.
    """
    reader = cluster.readers[0]
    with ExitStack() as stack:
        proxy = stack.enter_context(FaultProxy((reader.host, reader.port)))
        router = make_router(
            probe_interval=0.1,
            probe_timeout=0.3,
            instances=[proxy.address],
            engine_options={"connect_args": {"connect_timeout": 100}},
        )
        until_readers_serve(router, 1)
        proxy.black_hole()
        proxy.refuse()
        deaf = stack.enter_context(socket.socket())
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        deaf.bind((proxy.host, proxy.port))
        deaf.listen(0)
        for _ in range(3):  # with its queue full, the kernel answers no more
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex((proxy.host, proxy.port))

        def read() -> object:
            with sessions(router)() as s:
                return s.scalar(select(Item.stock).where(Item.id == 1))

        assert Background(read).end().result == 10
        eventually(lambda: not router.topology.readers)


def test_a_name_that_resolves_late_delays_no_other_instance(
    cluster: PostgresCluster, make_router: MakeRouter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name that does not resolve in time delays no other instance."""
    resolve, hangs = socket.getaddrinfo, threading.Event()

    def getaddrinfo(host: object, *args: object, **options: object) -> object:
        if host == "hangs.example":
            hangs.wait()
            raise socket.gaierror("not found")
        return resolve(host, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    router = make_router(
        instances=["hangs.example:5432", *(r.address for r in cluster.readers)], probe_interval=0.1, probe_timeout=0.3
    )
    try:
        router.start()
        assert "no answer within 0.3 s" in router.topology.by_id["hangs.example:5432"].error
        until_readers_serve(router, 2)
        old = cluster.writer
        cluster.wait_in_sync()
        cluster.kill(old)
        new = cluster.promote()
        eventually(lambda: router.topology.writer is not None and router.topology.writer.id == new.address)
        for _ in range(3):
            heard_at = router.topology.by_id[new.address].last_observed_at
            eventually(lambda heard_at=heard_at: router.topology.by_id[new.address].last_observed_at > heard_at)
        router.close()
    finally:
        hangs.set()
    eventually(lambda: not any("hangs.example" in t.name for t in threading.enumerate()))


def test_a_promotion_is_noticed_while_the_writer_is_suspect(cluster: PostgresCluster, make_router: MakeRouter) -> None:
    """A promotion is noticed at once while the old writer is only suspect."""
    router = make_router(probe_interval=60, probe_timeout=60)
    router.start()
    cluster.wait_in_sync()
    old = cluster.writer
    cluster.freeze(old)
    core_of(router).monitor.suspect(old.address)  # as a statement that failed there would
    new = cluster.promote(cluster.readers[0])
    eventually(lambda: router.topology.writer is not None and router.topology.writer.id == new.address)


def test_a_statement_on_a_server_that_lost_its_power_is_cut(cluster: PostgresCluster, make_router: MakeRouter) -> None:
    """A statement on a server that lost its power and came back is cut.

    Its peer is gone without a sign. The instance is never lost, because a new server answers there at once.
    """
    writer = cluster.writer
    with ExitStack() as stack:
        before = stack.enter_context(FaultProxy((writer.host, writer.port)))
        url = cluster.url.replace(writer.address, before.address)
        heard: list[events.Event] = []
        router = make_router(url, instances=(), probe_interval=0.1, probe_timeout=3, listeners=[heard.append])
        with router.connect() as connection:
            connection.execute(text("SELECT 1"))
            before.black_hole()
            before.refuse()
            cluster.restart(writer)
            stack.enter_context(FaultProxy((writer.host, writer.port), before.host, before.port))
            assert isinstance(Background(lambda: connection.execute(text("SELECT 2"))).end().error, exc.OperationalError)
            connection.invalidate()
        eventually(lambda: any(isinstance(e, events.ConnectionsDiscarded) for e in heard))
        assert [e.reason for e in heard if isinstance(e, events.ConnectionsDiscarded)] == ["it was restarted"]


def test_the_kernel_checks_connections_with_vanished_peers(cluster: PostgresCluster, make_router: MakeRouter) -> None:
    """The kernel probes connections whose peer may have vanished, and the user's own settings for this have priority."""

    def keepalive(router: Router) -> int:
        with router.connect() as connection:
            number = connection.connection.driver_connection.fileno()  # type: ignore[union-attr]
            with socket.socket(fileno=os.dup(number)) as twin:
                assert twin.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 25000
                return twin.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE)

    assert keepalive(make_router()) == 10
    assert keepalive(make_router(cluster.url + "?keepalives_idle=77")) == 77
    assert keepalive(make_router(engine_options={"connect_args": {"keepalives_idle": 78}})) == 78


def test_a_pool_may_be_discarded_during_a_checkin(router: Router) -> None:
    """A pool may be discarded while a connection comes back to it.

    Another thread may discard it while the pool's listeners run; here a listener does it.
    """
    writer = router.topology.writer
    assert writer is not None
    engine, discarded = router.engine(writer), []
    pool = engine.pool

    def discard(*_: object) -> None:
        discarded.append(core_of(router).engines.evict(writer.id))

    with router.connect() as connection:
        connection.execute(text("SELECT 1"))
        event.listen(engine, "checkin", discard)
    event.remove(engine, "checkin", discard)
    pool.dispose()  # the connection came back just after the discard
    assert discarded
    assert engine.pool is not pool
    assert router.stats().by_id[writer.id].pool_in_use == 0


def test_a_discard_closes_used_connections_at_their_return(cluster: PostgresCluster, router: Router) -> None:
    """After a discard, connections in use are closed when they come back, and new ones are kept."""
    pid = text("SELECT pg_backend_pid()")
    writer = cluster.writer.address
    with router.connect() as connection:
        before = connection.scalar(pid)
        assert core_of(router).engines.evict(writer) == 0
        assert connection.scalar(pid) == before, "what is in use may end"
    eventually(lambda: cluster.execute("SELECT count(*) FROM pg_stat_activity WHERE pid = %s", before) == [(0,)])
    with router.connect() as connection:
        after = connection.scalar(pid)
    with router.connect() as connection:
        assert connection.scalar(pid) == after


def test_a_failed_connects_place_goes_to_the_next_waiter(cluster: PostgresCluster, make_router: MakeRouter) -> None:
    """The slot of a failed connect goes to the next waiting thread."""
    options = {"pool_size": 1, "max_overflow": 0, "pool_timeout": 100, "connect_args": {"connect_timeout": 100}}
    with FaultProxy((cluster.writer.host, cluster.writer.port)) as proxy:
        url = cluster.url.replace(cluster.writer.address, proxy.address)
        router = make_router(url, instances=(), probe_timeout=60, engine_options=options)
        writer = router.topology.writer
        assert writer is not None
        engine = router.engine(writer)
        proxy.black_hole()
        first = Background(engine.connect)
        eventually(lambda: not core_of(router).engines._pools[writer.id].is_unused)
        second = Background(lambda: engine.connect().close())
        # The second thread should wait by now, but nothing shows it. If it is late, the test passes all the same.
        time.sleep(0.2)
        proxy.reset_all()
        proxy.heal()
        assert isinstance(first.end().error, exc.OperationalError)
        assert second.end().error is None
