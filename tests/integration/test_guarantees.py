"""The guarantees under attack: each of these once went wrong, or could have."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import event, insert, select, text, update

from aurora_router import ConfigurationError, ReadOnlyViolation, Router, RoutingSession, classify_error
from aurora_router.core import events
from aurora_router.local import PostgresCluster
from aurora_router.local.cluster import Cluster
from aurora_router.router import core_of
from tests.integration.shop import BOTH, Item, engine, eventually, instance_id, place, sessions

MakeRouter = Callable[..., Router]
RAISE = update(Item).where(Item.id == 1).values(stock=Item.stock + 1)
STOCK = select(Item.stock).where(Item.id == 1)


def by_the_drivers_cursor(s: RoutingSession) -> None:
    driver = s.connection().connection.cursor()
    driver.execute("UPDATE item SET stock = stock + 1 WHERE id = 1")
    s.commit()


def by_autocommit_and_close(s: RoutingSession) -> None:
    s.connection(execution_options={"isolation_level": "AUTOCOMMIT"})
    s.execute(RAISE)
    s.close()


def by_the_connections_commit(s: RoutingSession) -> None:
    s.execute(RAISE)
    s.connection().commit()
    s.close()


def by_commit_as_text(s: RoutingSession) -> None:
    s.execute(RAISE)
    s.execute(text("COMMIT"))
    s.rollback()


@pytest.mark.parametrize("write", [by_the_drivers_cursor, by_autocommit_and_close, by_the_connections_commit, by_commit_as_text])
@pytest.mark.parametrize("consistency", ["session", "global"])
def test_own_writes_are_seen_however_they_were_committed(
    cluster: PostgresCluster, make_router: MakeRouter, write: Callable[[RoutingSession], None], consistency: str
) -> None:
    for reader in cluster.readers:
        cluster.pause_replay(reader)
    router = make_router(consistency=consistency)
    with sessions(router)() as s:
        write(s)
        assert s.scalar(STOCK) == 11
    if consistency == "global":
        with sessions(router)() as s:
            assert s.scalar(STOCK) == 11


def test_a_detached_connection_does_not_pin_everybody_for_ever(cluster: PostgresCluster, make_router: MakeRouter) -> None:
    router = make_router(consistency="global")
    with router.connect() as connection:
        connection.execute(RAISE)
        connection.commit()
        connection.detach()

    def on_reader() -> bool:
        with sessions(router)() as s:
            assert s.scalar(STOCK) == 11
            return place(s) == "reader"

    eventually(on_reader)


@pytest.mark.parametrize(
    "statement",
    ["SELECT set_config(:name, 'off', true)", "INSERT INTO part (id, name) SELECT :id, set_config(:name, 'off', true)"],
)
def test_a_bound_parameter_may_name_synchronous_commit(cluster: PostgresCluster, make_router: MakeRouter, statement: str) -> None:
    """Own writes are seen though a bound parameter has switched to commits that do not wait for the log."""
    router = make_router(position_interval=0.01)
    with sessions(router)() as s:
        for expected in range(11, 61):
            s.execute(text(statement), {"name": "synchronous_commit", "id": expected + 1000})
            assert core_of(router).interceptor.families.asynchronous_commits
            s.execute(RAISE)
            s.commit()
            for _ in range(3):
                assert s.scalar(STOCK) == expected
                s.rollback()


def test_an_autocommit_unit_cannot_write_on_a_promoted_reader(cluster: PostgresCluster, make_router: MakeRouter) -> None:
    """A unit in autocommit cannot write on its reader when the reader is promoted.

    The text shows only a view, but the view calls a volatile function. It runs in the unit's transaction, or not at all.
    """
    cluster.execute("""
        CREATE OR REPLACE FUNCTION extra.touch() RETURNS int LANGUAGE sql VOLATILE SECURITY DEFINER
          AS 'UPDATE item SET stock = stock + 1 WHERE id = 1 RETURNING stock';
        CREATE OR REPLACE VIEW extra.touched AS SELECT extra.touch() AS stock;
        GRANT SELECT ON extra.touched TO app""")
    cluster.wait_in_sync()
    target = max(cluster.readers, key=lambda r: r.address)
    router = make_router(balance=lambda readers, load, rnd: max(readers, key=lambda r: r.id))
    with sessions(router)() as s:
        s.get(Item, 1)
        assert instance_id(s) == target.address
        cluster.kill(cluster.writer)
        cluster.promote(target)
        assert s.execute(text("SELECT stock FROM extra.touched")).scalar() == 11
        assert place(s) == "writer"
        s.rollback()
    assert cluster.execute("SELECT stock FROM item WHERE id = 1", instance=target) == [(10,)]
    with sessions(router)() as s:
        s.execute(RAISE)
        s.commit()
    assert cluster.execute("SELECT stock FROM item WHERE id = 1", instance=target) == [(11,)]


def test_a_read_only_unit_on_the_writer_runs_no_unknown_function(cluster: PostgresCluster, make_router: MakeRouter) -> None:
    """A read-only unit that the writer serves runs no unknown function."""
    router = make_router(instances=())
    for sql in ("COMMIT; SELECT unknown()", "SET TRANSACTION READ WRITE; SELECT unknown()", "SELECT unknown()"):
        with sessions(router)(read_only=True) as s, pytest.raises(ReadOnlyViolation):
            s.execute(text(sql))


def test_a_raw_connection_leaves_no_switch_behind(cluster: PostgresCluster, make_router: MakeRouter) -> None:
    router = make_router(instances=(), engine_options={"pool_size": 1, "max_overflow": 0})
    raw = router.raw_connection()
    raw.driver_connection.autocommit = True  # type: ignore[union-attr]
    raw.close()
    with sessions(router)() as s:
        s.execute(RAISE)
        s.rollback()
        assert s.scalar(STOCK) == 10
        s.rollback()
    raw = router.raw_connection()
    raw.driver_connection.read_only = True  # type: ignore[union-attr]
    raw.close()
    with sessions(router)() as s:
        s.execute(RAISE)
        s.commit()
        assert s.scalar(STOCK) == 11


@pytest.mark.parametrize("read_only", [None, True, False])
def test_a_listener_of_after_begin_may_set_up_the_transaction(router: Router, read_only: bool | None) -> None:
    with sessions(router)(read_only=read_only) as s:
        event.listen(s, "after_begin", lambda _s, _t, connection: connection.execute(text("SET LOCAL app.tenant = '7'")))
        assert s.scalar(text("SELECT current_setting('app.tenant')")) == "7"
        assert place(s) == ("reader" if read_only else "writer")


def test_an_applications_own_setting_is_read_on_a_reader(make_router: MakeRouter) -> None:
    """A setting that all connections have is read on a reader. A setting of the unit is read on the unit's server."""
    router = make_router(engine_options={"connect_args": {"options": "-c app.tenant=7"}})
    for question in "SELECT current_setting('app.tenant')", "SHOW app.tenant":
        with sessions(router)() as s:
            assert s.scalar(text(question)) == "7"
            assert place(s) == "reader"
            assert s.scalar(text("SELECT set_config('app.tenant', '8', true)")) == "8"
            assert s.scalar(text(question)) == "8"
            assert place(s) == "writer"


@BOTH
def test_a_write_that_only_the_server_sees_is_refused_in_words(cluster: Cluster[Any], make_router: MakeRouter) -> None:
    """In a read-only unit a write hidden in a view or a column's default is a ReadOnlyViolation on every server."""
    of = engine(cluster)
    number = {"postgresql": "nextval('ticket')", "mariadb": "nextval(ticket)", "mysql": "nextval()"}[of]
    with cluster.writer.connect() as connection, connection.cursor() as cursor:
        cursor.execute(f"CREATE OR REPLACE VIEW numbered AS SELECT {number} AS number")
        cursor.execute("GRANT SELECT ON numbered TO app" + ("" if of == "postgresql" else "@'%'"))
        if of == "mariadb":
            cursor.execute("CREATE OR REPLACE TABLE ordered (number bigint DEFAULT nextval(ticket))")
            cursor.execute("INSERT INTO ordered VALUES (1)")
    cluster.wait_in_sync()
    hidden = ["SELECT number FROM numbered"] + ["SELECT DEFAULT(number) FROM ordered"] * (of == "mariadb")
    for options, where in ({}, "reader"), ({"instances": []}, "writer"):
        router = make_router(**options)
        for sql in hidden:
            with sessions(router)(read_only=True) as s:
                s.scalar(STOCK)
                assert place(s) == where
                with pytest.raises(ReadOnlyViolation, match="the server refused it") as caught:
                    s.execute(text(sql))
                assert isinstance(caught.value.__cause__, core_of(router).engines.driver_error)
                assert not classify_error(caught.value).safe_to_repeat
            with router.connect(read_only=True) as connection, pytest.raises(ReadOnlyViolation, match="the server refused it"):
                connection.execute(text(sql))
            with sessions(router)() as s:
                assert s.scalar(text(sql)) > 0
                assert place(s) == "writer"


@pytest.mark.parametrize("read_only", [None, True])
def test_a_backslash_means_what_the_connection_says(make_router: MakeRouter, read_only: bool | None) -> None:
    """A read with a backslash before a quote stays on a reader if its connection has standard_conforming_strings on."""
    with sessions(make_router())(read_only=read_only) as s:
        assert s.scalar(text(r"SELECT 'a_b' LIKE 'a\_b' ESCAPE '\' AND 'c' = 'c'"))
        assert place(s) == "reader"
    options = {"connect_args": {"options": "-c standard_conforming_strings=off -c escape_string_warning=off"}}
    with sessions(make_router(engine_options=options))() as s:
        assert s.scalar(text(r"SELECT 'it\'s'")) == "it's"
        assert place(s) == "writer"


def test_a_read_only_sessions_connection_is_a_read_only_readers(cluster: PostgresCluster, router: Router) -> None:
    """The connection of a read-only session is a reader's and read-only."""
    with sessions(router)(read_only=True) as s:
        with pytest.raises(ReadOnlyViolation):
            s.connection().execute(insert(Item).values(id=9))
        s.rollback()
        assert s.connection().scalar(text("SHOW transaction_read_only")) == "on"
        assert place(s) == "reader"
        s.scalar(STOCK)
        busy = "SELECT count(*) FROM pg_stat_activity WHERE usename = 'app' AND xact_start IS NOT NULL"
        assert sum(cluster.execute(busy, instance=i)[0][0] for i in cluster.instances) == 1
    with sessions(router)(read_only=True) as s:
        s.connection(execution_options={"isolation_level": "REPEATABLE READ"})
        assert s.scalar(text("SHOW transaction_isolation")) == "repeatable read"
        assert place(s) == "reader"
    with sessions(router)(read_only=True) as s:
        with s.begin_nested():
            assert s.scalar(STOCK) == 10
        assert place(s) == "reader"
    with sessions(router)() as s:
        s.scalar(STOCK)
        assert place(s) == "reader"


def test_a_hint_outlives_a_statement_that_runs_inside(router: Router) -> None:
    with sessions(router)() as s:
        inside: list[object] = []

        @event.listens_for(s, "do_orm_execute")
        def looks_something_up(state: object) -> None:
            if not inside:
                inside.append(state)
                s.execute(text("SELECT 1"))

        s.execute(select(Item), execution_options={"route": "writer"}).all()
        assert place(s) == "writer"


@BOTH
def test_a_raw_connection_waits_for_a_writer_like_any_other(cluster: PostgresCluster, make_router: MakeRouter) -> None:
    router = make_router()
    router.raw_connection().close()
    cluster.wait_in_sync()
    cluster.kill(cluster.writer)
    promotion = threading.Timer(0.5, cluster.promote)
    promotion.start()
    raw = router.raw_connection()
    raw.close()
    promotion.join()


@BOTH
def test_connecting_to_a_frozen_reader_ends(cluster: PostgresCluster, make_router: MakeRouter) -> None:
    router = make_router()
    router.start()
    for reader in cluster.readers:
        cluster.freeze(reader)
    with sessions(router)() as s:
        began = time.monotonic()
        assert s.scalar(STOCK) == 10
        assert time.monotonic() - began < 30
        assert place(s) == "writer"


def test_a_listener_that_waits_for_a_writer_holds_up_nobody(cluster: PostgresCluster, make_router: MakeRouter) -> None:
    done = threading.Event()

    def waits(happened: events.Event) -> None:
        if isinstance(happened, events.InstanceDown) and not done.is_set():
            with router.begin() as connection:
                connection.execute(text("SELECT 1"))
            done.set()

    router = make_router(listeners=[waits], failover_timeout=20, probe_interval=0.2)
    router.start()
    cluster.wait_in_sync()
    cluster.kill(cluster.writer)
    cluster.promote()
    with sessions(router)() as s:
        s.execute(RAISE)
        s.commit()
    assert done.wait(20)


def test_an_aggregate_is_what_its_functions_are(cluster: PostgresCluster, make_router: MakeRouter) -> None:
    cluster.execute("""
        CREATE OR REPLACE FUNCTION extra.locks(bigint, bigint) RETURNS bigint LANGUAGE sql VOLATILE
          AS 'SELECT pg_advisory_lock($2); SELECT $2';
        CREATE OR REPLACE FUNCTION extra.adds(bigint, bigint) RETURNS bigint LANGUAGE sql IMMUTABLE AS 'SELECT $1 + $2';
        CREATE OR REPLACE AGGREGATE extra.lock_all(bigint) (sfunc = extra.locks, stype = bigint, initcond = 0);
        CREATE OR REPLACE AGGREGATE extra.add_all(bigint) (sfunc = extra.adds, stype = bigint, initcond = 0)""")
    cluster.wait_in_sync()
    router = make_router()
    eventually(lambda: router.explain("SELECT extra.add_all(id) FROM item").effect.name == "READ")
    assert router.explain("SELECT extra.lock_all(id) FROM item").effect.name == "WRITE"


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT true OPERATOR(pg_catalog.=) pg_try_advisory_lock(1)",
        "SELECT OPERATOR(pg_catalog.-) nextval('ticket')",
        "SELECT pg_sequence_last_value('ticket'::regclass)",
        "SELECT last_value FROM pg_sequences",
    ],
)
def test_what_only_looks_like_a_read_runs_on_the_writer(router: Router, sql: str) -> None:
    decision = router.explain(sql)
    assert decision.effect is not None
    assert decision.effect.name != "READ"


def test_a_connection_needs_read_only_to_be_true_or_false(router: Router) -> None:
    """A connection whose read_only is neither True nor False is refused."""
    for read_only in (None, "x"):
        with pytest.raises(ConfigurationError, match="read_only"):
            router.connect(read_only=read_only)  # type: ignore[arg-type]
        with pytest.raises(ConfigurationError, match="read_only"):
            router.raw_connection(read_only=read_only)  # type: ignore[arg-type]


def test_a_refused_statement_stays_refused_whatever_the_hint(cluster: PostgresCluster, make_router: MakeRouter) -> None:
    cluster.execute("CREATE OR REPLACE FUNCTION extra.ticket() RETURNS bigint LANGUAGE sql AS 'SELECT nextval(''ticket'')'")
    cluster.execute("GRANT ALL ON SEQUENCE ticket TO app")
    cluster.wait_in_sync()
    heard: list[events.Event] = []
    router = make_router(listeners=[heard.append])
    for _ in range(3):
        with sessions(router)() as s:
            s.execute(text("SELECT /*@reader*/ extra.ticket()"))
            assert place(s) == "writer"
    assert sum(isinstance(e, events.Learned) for e in heard) == 1


def test_an_invalidated_connection_avoids_a_deposed_writer(cluster: PostgresCluster, make_router: MakeRouter) -> None:
    """A connection that was invalidated does not come back on a deposed writer."""
    router = make_router(probe_interval=0.1)
    old = cluster.writer
    connection = router.connect()
    connection.execute(text("SELECT 1"))
    connection.rollback()
    new = cluster.promote()
    eventually(lambda: router.topology.writer is not None and router.topology.writer.id == new.address)
    connection.invalidate()
    with pytest.raises(Exception, match=r"not known there|no longer the writer"):
        connection.execute(insert(Item).values(id=9))
    connection.close()
    assert cluster.execute("SELECT count(*) FROM item", instance=old) == [(3,)]


@pytest.mark.parametrize("read_only", [None, True, False])
def test_a_unit_leaves_nothing_to_the_garbage_collector(router: Router, read_only: bool | None) -> None:
    def unit() -> weakref.ref[RoutingSession]:
        with sessions(router)(read_only=read_only) as s:
            s.execute(STOCK).all()
            if not read_only:
                s.execute(RAISE)
            s.commit()
        return weakref.ref(s)

    unit()  # the first unit creates the objects that outlive it
    gc.collect()
    gc.disable()
    try:
        assert unit()() is None
    finally:
        gc.enable()


def test_a_server_is_the_same_in_every_time_zone(cluster: PostgresCluster, make_router: MakeRouter) -> None:
    refused: list[events.ConnectionRefused] = []
    router = make_router(listeners=[lambda e: refused.append(e) if isinstance(e, events.ConnectionRefused) else None])
    router.start()
    cluster.execute("ALTER ROLE app SET TimeZone = 'Asia/Kathmandu'")
    try:
        cluster.wait_in_sync()
        with router.connect(read_only=True) as connection:
            assert connection.scalar(text("SHOW TimeZone")) == "Asia/Kathmandu"
    finally:
        cluster.execute("ALTER ROLE app RESET TimeZone")
    assert not refused


def test_an_instance_that_cannot_be_probed_holds_up_no_other(
    cluster: PostgresCluster, make_router: MakeRouter, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """An instance that the monitor cannot attend to holds up no other instance."""
    router = make_router(probe_interval=0.02, probe_timeout=0.05)
    stuck, current = cluster.readers
    eventually(lambda: len(router.topology.readers) == 2)
    start = threading.Thread.start  # the process has no room for one more thread

    def refuse(thread: threading.Thread) -> None:
        if thread.name.startswith("aurora-router-probe-"):
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse)
    cluster.freeze(stuck)
    eventually(lambda: [r.id for r in router.topology.readers] == [current.address])
    time_of = router.topology.by_id[current.address].last_observed_at
    eventually(lambda: router.topology.by_id[current.address].last_observed_at > time_of + 0.5)
    assert f"could not schedule a probe of {stuck.address}" in caplog.text
    monkeypatch.undo()
    cluster.thaw(stuck)
    eventually(lambda: len(router.topology.readers) == 2)
