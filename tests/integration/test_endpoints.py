"""Two names and nothing else: a writer endpoint and a reader endpoint, behind which servers come, go and change places."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import pytest
from sqlalchemy import select, text, update

from aurora_router import Router, RoutingSession
from aurora_router.core import events
from aurora_router.local import FaultProxy, PostgresCluster
from aurora_router.local.postgres import LocalInstance
from aurora_router.router import core_of
from tests.integration.shop import Item, eventually, place, sessions

MakeRouter = Callable[..., Router]


def at(instance: LocalInstance) -> tuple[str, int]:
    return (instance.host, instance.port)


@dataclass
class Names:
    """The two names of a cluster, each a proxy that leads where the test says."""

    cluster: PostgresCluster
    writer: FaultProxy
    reader: FaultProxy

    @property
    def url(self) -> str:
        return self.cluster.url.replace(self.cluster.writer.address, self.writer.address)


@pytest.fixture
def names(cluster: PostgresCluster) -> Iterator[Names]:
    with ExitStack() as stack:
        writer = stack.enter_context(FaultProxy(at(cluster.writer)))
        reader = stack.enter_context(FaultProxy([at(r) for r in cluster.readers]))
        yield Names(cluster, writer, reader)


def raise_stock(session: RoutingSession) -> None:
    session.execute(update(Item).where(Item.id == 1).values(stock=Item.stock + 1))
    session.commit()


def reached(router: Router, *, read_only: bool) -> str:
    with router.connect(read_only=read_only) as connection:
        host: str = connection.scalar(text("SELECT host(inet_server_addr())"))
        return host


def behind(router: Router, endpoint: FaultProxy) -> set[str | None]:
    return {server.address for server in router.topology.by_id[endpoint.address].servers}


def test_reads_go_to_the_reader_endpoint_writes_to_the_writers(names: Names, make_router: MakeRouter) -> None:
    """Reads go to the reader endpoint, and writes to the writer's endpoint."""
    router = make_router(names.url, reader_endpoint=names.reader.address)
    assert [r.id for r in router.topology.readers] == [names.reader.address]
    assert router.topology.writer is not None
    assert router.topology.writer.id == names.writer.address
    assert reached(router, read_only=False) == names.cluster.writer.host
    eventually(lambda: behind(router, names.reader) == {r.host for r in names.cluster.readers})
    assert {reached(router, read_only=True) for _ in range(20)} <= {r.host for r in names.cluster.readers}


def test_own_writes_are_seen_despite_one_late_server(names: Names, make_router: MakeRouter) -> None:
    """A session sees its own writes, although one server behind the name is late."""
    names.cluster.set_lag(names.cluster.readers[0], 0.3)
    router = make_router(names.url, reader_endpoint=names.reader.address)
    with sessions(router)() as s:
        for expected in range(11, 31):
            raise_stock(s)
            for _ in range(3):
                assert s.scalar(select(Item.stock).where(Item.id == 1)) == expected
                s.rollback()
                time.sleep(0.01)


def test_the_endpoint_serves_again_when_all_have_the_write(names: Names, make_router: MakeRouter) -> None:
    """The endpoint serves the session again when all servers behind it have its write."""
    router = make_router(names.url, reader_endpoint=names.reader.address)
    with sessions(router)() as s:
        raise_stock(s)

        def on_reader() -> bool:
            assert s.scalar(select(Item.stock).where(Item.id == 1)) == 11
            found = place(s) == "reader"
            s.rollback()
            return found

        eventually(on_reader)


def test_an_unknown_server_behind_a_name_is_discarded(names: Names, make_router: MakeRouter) -> None:
    """Connections to an unknown server behind the name are discarded until the topology has the server."""
    first, second = names.cluster.readers
    names.reader.retarget(at(first))
    heard: list[events.Event] = []
    # The monitor must not probe by itself in between.
    router = make_router(names.url, reader_endpoint=names.reader.address, listeners=[heard.append], probe_interval=3600)
    assert reached(router, read_only=True) == first.host
    eventually(
        lambda: core_of(router).monitor._watchers[names.reader.address].asked_at is None
    )  # it probes several times at first
    names.reader.retarget(at(second))
    core_of(router).engines.evict(names.reader.address)
    assert reached(router, read_only=True) == names.cluster.writer.host, "a detour, not an answer from a stranger"
    assert any(isinstance(e, events.ConnectionRefused) for e in heard)
    eventually(lambda: second.host in behind(router, names.reader))
    assert reached(router, read_only=True) == second.host


def test_positions_are_evidence_only_for_their_own_server(names: Names, make_router: MakeRouter) -> None:
    """Positions are evidence only for the server that gave them.

    Between the evidence and the read, the name moves from a reader that has everything to one that is far behind.
    """
    late, current = names.cluster.readers
    names.reader.retarget(at(current))
    router = make_router(names.url, reader_endpoint=names.reader.address, probe_interval=3600, engine_options={"pool_size": 1})
    with sessions(router)() as s:
        names.cluster.pause_replay(late)
        raise_stock(s)

        def on_reader() -> bool:
            assert s.scalar(select(Item.stock).where(Item.id == 1)) == 11
            found = place(s) == "reader"
            s.rollback()
            return found

        eventually(on_reader)
        names.reader.retarget(at(late))
        names.reader.reset_all()
        for _ in range(50):
            assert s.scalar(select(Item.stock).where(Item.id == 1)) == 11
            s.rollback()


def test_the_writer_behind_the_reader_endpoint_serves_no_reads(names: Names, make_router: MakeRouter) -> None:
    """The writer behind the reader endpoint serves no reads there."""
    names.reader.retarget([at(names.cluster.writer), at(names.cluster.readers[0])])
    router = make_router(names.url, reader_endpoint=names.reader.address)
    eventually(lambda: behind(router, names.reader) == {names.cluster.readers[0].host})
    for _ in range(6):
        with router.connect(read_only=True) as connection:
            connection.scalar(text("SELECT 1"))
    assert behind(router, names.reader) == {names.cluster.readers[0].host}


def test_the_writers_name_moves_to_the_promoted_reader(names: Names, make_router: MakeRouter) -> None:
    router = make_router(names.url, reader_endpoint=names.reader.address)
    with sessions(router)() as s:
        raise_stock(s)
        names.cluster.wait_in_sync()
        names.cluster.kill(names.cluster.writer)
        new = names.cluster.promote()
        names.writer.retarget(at(new))
        names.reader.retarget([at(r) for r in names.cluster.readers])
        raise_stock(s)
        assert s.scalar(select(Item.stock).where(Item.id == 1)) == 12
    assert names.cluster.execute("SELECT stock FROM item WHERE id = 1", instance=new) == [(12,)]
    eventually(lambda: len(router.topology.readers) == 1)


def test_the_writers_name_moves_while_the_old_writer_lives(names: Names, make_router: MakeRouter) -> None:
    """The router follows the writer's name although the old writer lives.

    The probe's own connection still leads to the old writer, so only a new connection shows that the name has moved.
    """
    router = make_router(names.url, reader_endpoint=names.reader.address, probe_interval=0.1)
    assert reached(router, read_only=False) == names.cluster.writer.host
    new = names.cluster.promote()
    names.writer.retarget(at(new))
    eventually(lambda: router.topology.epoch > 1)
    eventually(lambda: router.topology.writer is not None and behind(router, names.writer) == {new.host})
    assert reached(router, read_only=False) == new.host


def test_a_restarted_server_is_another_one(names: Names, make_router: MakeRouter) -> None:
    reader = names.cluster.readers[0]
    names.reader.retarget(at(reader))
    router = make_router(names.url, reader_endpoint=names.reader.address)
    (before,) = router.topology.by_id[names.reader.address].servers
    names.cluster.restart(reader)
    eventually(lambda: router.topology.by_id[names.reader.address].servers not in (frozenset(), frozenset({before})))
    (after,) = router.topology.by_id[names.reader.address].servers
    assert (after.address, after.port) == (before.address, before.port)
    assert reached(router, read_only=True) == reader.host


def test_reads_go_to_the_writer_if_the_reader_endpoint_is_down(names: Names, make_router: MakeRouter) -> None:
    """A reader endpoint that is down sends reads to the writer."""
    router = make_router(names.url, reader_endpoint=names.reader.address)
    router.start()
    names.reader.refuse()
    names.reader.reset_all()
    assert reached(router, read_only=True) == names.cluster.writer.host
    names.reader.heal()
    eventually(lambda: reached(router, read_only=True) != names.cluster.writer.host)
