"""Units on MySQL and MariaDB: they read in autocommit or in one snapshot, and send nothing but their statements."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from sqlalchemy import exc, select, text

from aurora_router import Router
from aurora_router.core import events
from aurora_router.local import FaultProxy
from tests.integration.mysql_family import Family, make_function, on
from tests.integration.shop import RAISE, Item, eventually, instance_id, place, probes, sessions, stock

pytestmark = pytest.mark.engines("mariadb", "mysql")

MakeRouter = Callable[..., Router]
STOCK = select(Item.stock).where(Item.id == 1)


def test_a_unit_reads_in_autocommit_despite_repeatable_read(router: Router) -> None:
    """An automatic unit reads in autocommit, although repeatable read is the server's default."""
    with sessions(router)() as s:
        assert s.scalar(STOCK) == 10
        assert place(s) == "reader"
    assert router.topology.readers[0].tracked[0].server.isolation == "repeatable read"


def test_who_asks_for_repeatable_read_gets_it_on_the_writer(make_router: MakeRouter) -> None:
    router = make_router(engine_options={"isolation_level": "REPEATABLE READ"})
    with sessions(router)() as s:
        s.scalar(STOCK)
        assert place(s) == "writer"


def test_a_unit_declared_read_only_shows_one_snapshot(cluster: Family, router: Router) -> None:
    with sessions(router)(read_only=True) as s:
        assert s.scalar(STOCK) == 10
        cluster.execute("UPDATE item SET stock = 99")
        cluster.wait_in_sync()
        assert s.scalar(STOCK) == 10
        s.rollback()
        assert s.scalar(STOCK) == 99


def test_a_snapshot_lost_with_its_reader_is_not_patched_up(cluster: Family, router: Router) -> None:
    """A snapshot that is lost with its reader is not continued elsewhere."""
    with sessions(router)(read_only=True) as s:
        s.scalar(STOCK)
        first = instance_id(s)
        cluster.kill(next(i for i in cluster.instances if i.address == first))
        with pytest.raises(exc.OperationalError):
            s.scalar(STOCK)
        s.rollback()
        assert s.scalar(STOCK) == 10


def test_a_read_whose_reader_dies_is_repeated_elsewhere(cluster: Family, make_router: MakeRouter) -> None:
    heard: list[events.Event] = []
    router = make_router(listeners=[heard.append])
    with sessions(router)() as s:
        item = s.get_one(Item, 1)
        first = instance_id(s)
        cluster.kill(next(i for i in cluster.instances if i.address == first))
        assert [part.id for part in item.parts] == [1, 2]
        assert instance_id(s) != first
    assert [e.instance for e in heard if isinstance(e, events.Repeated)] == [first]


def test_round_trips_are_those_of_the_statements(cluster: Family, make_router: MakeRouter) -> None:
    """On the wire nothing is sent for a checkout, a mode already set, or a commit without a transaction."""
    reader = cluster.readers[0]
    with (
        FaultProxy((cluster.writer.host, cluster.writer.port)) as to_writer,
        FaultProxy((reader.host, reader.port)) as to_reader,
    ):
        url = cluster.url.replace(cluster.writer.address, to_writer.address)
        router = make_router(url, instances=[to_reader.address], probe_interval=3600, engine_options={"pool_size": 1})
        router.init_commit_table()

        def sent(proxy: FaultProxy, work: Callable[[], object]) -> list[str]:
            before = len(proxy.statements)
            work()
            return [text.split()[0] for text in proxy.statements[before:] if not probes(text)]

        def read(read_only: bool | None = None) -> None:
            with sessions(router)(read_only=read_only) as s:
                s.scalar(STOCK)
                s.scalar(STOCK)
                s.commit()

        def write() -> None:
            with sessions(router)() as s:
                s.execute(RAISE)
                s.commit()

        def nothing() -> None:
            router.connect(read_only=False).close()

        for warm_up in (read, write):
            warm_up()
        assert sent(to_reader, read) == ["SELECT", "SELECT"]
        assert sent(to_reader, lambda: read(True)) == ["START", "SELECT", "SELECT", "COMMIT"]
        assert sent(to_reader, read) == ["SELECT", "SELECT"]
        assert sent(to_writer, write) == ["UPDATE", "COMMIT"]
        assert sent(to_writer, nothing) == []
        run = lambda: router.run_transaction(sessions(router), lambda s: s.execute(RAISE))  # noqa: E731
        assert sent(to_writer, run) == ["UPDATE", "INSERT", "COMMIT"]


def test_a_function_is_what_it_declares_until_a_refusal(cluster: Family, make_router: MakeRouter) -> None:
    """A function is what it declares to be until a reader refuses it."""
    make_function(cluster, "lookup", "RETURNS BIGINT READS SQL DATA RETURN (SELECT count(*) FROM item)")
    make_function(cluster, "undeclared", "RETURNS BIGINT DETERMINISTIC RETURN 1")
    make_function(cluster, "liar", "RETURNS INT READS SQL DATA BEGIN UPDATE item SET stock = stock + 1; RETURN 1; END")
    cluster.wait_in_sync()
    heard: list[events.Event] = []
    router = make_router(listeners=[heard.append])

    def runs_on(sql: str) -> str:
        with sessions(router)() as s:
            s.execute(text(sql))
            return place(s)

    eventually(lambda: runs_on("SELECT LOOKUP()") == "reader")
    assert runs_on("SELECT app.lookup()") == "reader"
    assert runs_on("SELECT undeclared()") == "writer"
    assert [runs_on("SELECT liar()") for _ in range(3)] == ["writer"] * 3
    assert len([e for e in heard if isinstance(e, events.Learned)]) == 1, "it was sent to a reader once, and never again"


def test_an_autocommit_unit_cannot_write_on_a_promoted_reader(cluster: Family, make_router: MakeRouter) -> None:
    """A unit in autocommit cannot write on its reader when the reader is promoted.

    The text names only a view, but the view calls a function that writes.
    """
    updates = "BEGIN UPDATE item SET stock = stock + 1 WHERE id = 1; RETURN 1; END"
    make_function(cluster, "touch", f"RETURNS INT DETERMINISTIC MODIFIES SQL DATA {updates}")
    on(cluster, "CREATE OR REPLACE VIEW touched AS SELECT touch() AS one")
    cluster.wait_in_sync()
    target = max(cluster.readers, key=lambda r: r.address)
    router = make_router(balance=lambda readers, load, rnd: max(readers, key=lambda r: r.id))
    with sessions(router)() as s:
        s.get(Item, 1)
        assert instance_id(s) == target.address
        cluster.kill(cluster.writer)
        cluster.promote(target)
        assert s.scalar(text("SELECT one FROM touched")) == 1
        assert place(s) == "writer"
        s.rollback()
    assert stock(cluster) == 10
    with sessions(router)() as s:
        s.execute(RAISE)
        s.commit()
    assert stock(cluster) == 11, "the same connection may write now"
