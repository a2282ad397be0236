"""What is particular to MySQL and MariaDB: snapshots, the guard of readers, the commit table, what servers say of replication."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from pymysql.cursors import DictCursor
from sqlalchemy import exc, func, insert, make_url, select, text, update

from aurora_router import ConfigurationError, OutcomeUnknown, Router, RoutingSession, classify_error
from aurora_router.core import events
from aurora_router.core.failures import Facts, Failure
from aurora_router.core.selection import Reason
from aurora_router.local import FaultProxy
from aurora_router.local.cluster import Cluster
from aurora_router.servers import mysql
from tests.integration.shop import (
    RAISE,
    Item,
    connection_id,
    engine,
    eventually,
    instance_id,
    no_connection_is_left,
    place,
    probes,
    raise_stock,
    sessions,
    stock,
    until_readers_serve,
)

pytestmark = pytest.mark.engines("mariadb", "mysql")

MakeRouter = Callable[..., Router]
Family = Cluster[Any]
STOCK = select(Item.stock).where(Item.id == 1)


def on(cluster: Family, *statements: str, instance: Any = None) -> None:
    for statement in statements:
        cluster.execute(statement, instance=instance)


def make_function(cluster: Family, name: str, rest: str) -> None:
    """Make a function, or another one of that name."""
    on(cluster, f"DROP FUNCTION IF EXISTS {name}", f"CREATE FUNCTION {name}() {rest}")


def replica(cluster: Family) -> str:
    """What a reader is called in statements."""
    return "SLAVE" if engine(cluster) == "mariadb" else "REPLICA"


NUMBERS = "WITH RECURSIVE n AS (SELECT {0} AS id UNION ALL SELECT id + 1 FROM n WHERE id < {1})"


# -- what a server is ---------------------------------------------------------------------------------------------


@pytest.mark.engines("mariadb")
def test_a_url_of_mysql_leads_to_mariadb_as_well(cluster: Family, make_router: MakeRouter) -> None:
    router = make_router(cluster.url.replace("mariadb+", "mysql+"), instances=[r.address for r in cluster.readers])
    until_readers_serve(router, 2)
    with sessions(router)() as s:
        assert s.scalar(STOCK) == 10
        assert place(s) == "reader"
        s.execute(RAISE)
        assert place(s) == "writer"


@pytest.mark.parametrize(
    ("query", "connect_args", "said"),
    [
        ({"ssl": "true"}, {}, "no ssl option of PyMySQL; write ssl_ca=FILE"),
        ({"ssl_mode": "REQUIRED"}, {}, "'ssl_mode'.*; that is no ssl option of PyMySQL"),
        ({"sslmode": "require"}, {}, "'sslmode'.*; that is no ssl option of PyMySQL"),
        ({"ssl_ca": "/nowhere/ca.pem"}, {}, "No such file.*; check the files that ssl_ca"),
        ({"ssl_ca": __file__}, {}, "SSLError.*; check the files that ssl_ca"),
        ({"colour": "red"}, {}, "'colour'.*; PyMySQL has no such option"),
        ({"connect_timeout": "soon"}, {}, "'soon'.*; check the URL and its query"),
        ({}, {"cursorclass": DictCursor}, "rows must be tuples; leave cursorclass out"),
        ({}, {"password": "\N{EURO SIGN}"}, r"\(UnicodeEncodeError\); PyMySQL sends a password in Latin-1"),
    ],
)
def test_what_the_driver_cannot_be_given_is_named_at_once(
    cluster: Family,
    make_router: MakeRouter,
    caplog: pytest.LogCaptureFixture,
    query: dict[str, str],
    connect_args: dict[str, Any],
    said: str,
) -> None:
    url = make_url(cluster.url).update_query_dict(query)
    router = make_router(url, engine_options={"connect_args": connect_args})
    with pytest.raises(ConfigurationError, match=said) as caught:
        router.connect()
    assert cluster.app_password not in str(caught.value)
    assert not caplog.records, "no traceback"


@pytest.mark.engines("mariadb")
def test_a_url_of_mariadb_that_leads_to_mysql_is_a_mistake_at_once(aurora_cluster_factory: Callable[..., Family]) -> None:
    cluster = aurora_cluster_factory(readers=0, settings={"version": "8.4.0"})  # all that tells SQLAlchemy
    try:
        with Router(cluster.url) as router, pytest.raises(ConfigurationError, match=r"write mysql\+pymysql://") as caught:
            router.connect()
        assert cluster.writer.address in str(caught.value)
    finally:
        cluster.stop()


def test_a_server_says_the_same_of_its_start_whenever_it_is_asked(cluster: Family) -> None:
    with cluster.writer.connect() as connection, connection.cursor() as cursor:
        said = set()
        until = time.monotonic() + 1.5
        while time.monotonic() < until:
            cursor.execute(mysql.IDENTITY)
            said.add(cursor.fetchone())
    assert len(said) == 1


def test_a_privilege_that_the_monitor_lacks_is_named_at_the_start(aurora_cluster_factory: Callable[..., Family]) -> None:
    cluster = aurora_cluster_factory(readers=0, monitor_privileges=False)
    privilege = "SLAVE MONITOR" if engine(cluster) == "mariadb" else "REPLICATION CLIENT"
    with Router(cluster.url) as router, pytest.raises(ConfigurationError, match=f"the monitor needs .*{privilege}") as caught:
        router.start()
    assert cluster.app_password not in str(caught.value)
    cluster.stop()


def test_a_reader_whose_sql_thread_has_stopped_is_not_used_until_it_runs_again(cluster: Family, make_router: MakeRouter) -> None:
    router = make_router(probe_interval=0.05)
    until_readers_serve(router, 2)
    stopped, other = cluster.readers
    on(cluster, f"STOP {replica(cluster)} SQL_THREAD", instance=stopped)
    eventually(lambda: [r.id for r in router.topology.readers] == [other.address])
    assert "its SQL thread has stopped" in router.topology.by_id[stopped.address].error
    on(cluster, f"START {replica(cluster)} SQL_THREAD", instance=stopped)
    until_readers_serve(router, 2)


def test_a_reader_that_lacks_what_the_writer_has_thrown_away_is_not_used(
    aurora_cluster_factory: Callable[..., Family],
) -> None:
    cluster = aurora_cluster_factory(readers=1)
    (reader,) = cluster.readers
    with Router(cluster.url, instances=[reader.address], probe_interval=0.05) as router:
        until_readers_serve(router, 1)
        on(cluster, f"STOP {replica(cluster)}", instance=reader)
        eventually(lambda: router.topology.readers == ())
        on(cluster, "CREATE TABLE lost (id int)", "FLUSH BINARY LOGS", "PURGE BINARY LOGS BEFORE NOW() + INTERVAL 1 DAY")
        on(cluster, f"START {replica(cluster)}", instance=reader)
        eventually(lambda: "its IO thread has stopped" in router.topology.by_id[reader.address].error)
        assert router.topology.readers == ()
    cluster.stop()


def test_a_transaction_that_a_reader_has_made_itself_deposes_nobody(cluster: Family, make_router: MakeRouter) -> None:
    router = make_router(probe_interval=0.05)
    until_readers_serve(router, 2)
    astray = cluster.readers[0]
    if engine(cluster) == "mariadb":
        on(cluster, "SET GLOBAL gtid_strict_mode = OFF", "FLUSH TABLES", instance=astray)
    else:
        cluster._order(astray, "SET GLOBAL super_read_only = OFF", "FLUSH TABLES", "SET GLOBAL super_read_only = ON")
    with sessions(router)() as s:
        for _ in range(3):
            s.execute(RAISE)
            s.commit()
    cluster.wait_in_sync()
    looked = time.monotonic()
    eventually(lambda: all(i.heard_at > looked for i in router.topology))
    assert router.topology.writer is not None
    assert router.topology.writer.id == cluster.writer.address
    with sessions(router)() as s:
        s.execute(RAISE)
        s.commit()
        assert s.scalar(STOCK) == 14
    cluster.kill(astray)  # to be made anew


# -- units --------------------------------------------------------------------------------------------------------


def test_an_automatic_unit_reads_in_autocommit_though_repeatable_read_is_the_servers_default(router: Router) -> None:
    with sessions(router)() as s:
        assert s.scalar(STOCK) == 10
        assert place(s) == "reader"
    assert router.topology.readers[0].seen[0].server.isolation == "repeatable read"


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


def test_a_snapshot_that_is_lost_with_its_reader_is_not_patched_up(cluster: Family, router: Router) -> None:
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
    """Counted on the wire: nothing for a checkout, a mode that the connection has already, or an end that ends nothing."""
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


def test_a_function_is_what_it_declares_to_be_until_a_reader_refuses_it(cluster: Family, make_router: MakeRouter) -> None:
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


def test_a_unit_in_autocommit_cannot_write_on_its_reader_when_that_is_promoted(cluster: Family, make_router: MakeRouter) -> None:
    """Through a view that calls a function, which no text shows."""
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


# -- run_transaction ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("answer", [False, True], ids=["before the server hears of it", "after it has answered"])
@pytest.mark.parametrize("step", ["UPDATE item", "INSERT INTO `app`.aurora_router_commits", "COMMIT"])
def test_a_connection_lost_at_any_step_leaves_the_unit_done_exactly_once(
    cluster: Family, proxy: FaultProxy, make: MakeRouter, step: str, answer: bool
) -> None:
    router = make()
    proxy.lose(step, answer=answer)
    assert router.run_transaction(sessions(router), raise_stock) == 11
    assert proxy._losing == [], "it was lost"
    assert stock(cluster) == 11
    assert no_connection_is_left(router)


def test_commits_that_are_lost_again_and_again_are_each_found_out(
    cluster: Family, proxy: FaultProxy, make: MakeRouter, heard: list[events.Event]
) -> None:
    router = make()
    proxy.lose("COMMIT", answer=False, times=3)
    assert router.run_transaction(sessions(router), raise_stock) == 11
    assert stock(cluster) == 11
    resolved = [e.outcome for e in heard if isinstance(e, events.CommitResolved)]
    assert set(resolved) == {"not committed"}
    assert [e.number for e in heard if isinstance(e, events.RunAgain)] == list(range(1, len(resolved) + 1))


def test_a_transaction_that_waits_for_a_commit_that_never_comes_is_waited_for_and_run_again(
    cluster: Family, proxy: FaultProxy, make: MakeRouter
) -> None:
    # MySQL has no such timeout of transactions, only one of all that is idle.
    timeout, usual = ("idle_transaction_timeout", 0) if engine(cluster) == "mariadb" else ("wait_timeout", 28800)
    cluster.execute(f"SET GLOBAL {timeout} = 1")
    try:
        router = make()
        proxy.lose("COMMIT", answer=False, half_open=True)
        assert router.run_transaction(sessions(router), raise_stock) == 11
    finally:
        cluster.execute(f"SET GLOBAL {timeout} = {usual}")
    assert stock(cluster) == 11


def test_a_plain_session_whose_commit_is_lost_may_ask_by_the_table_or_is_told_that_nothing_was_noted(
    cluster: Family, proxy: FaultProxy, make: MakeRouter
) -> None:
    router = make()
    proxy.lose("COMMIT", answer=True)
    with sessions(router, commit_check="xid")() as s:
        s.execute(RAISE)
        with pytest.raises(OutcomeUnknown) as caught:
            s.commit()
    assert caught.value.resolve().value == "committed"
    proxy.lose("COMMIT", answer=True)
    with sessions(router)() as s:
        s.execute(RAISE)
        with pytest.raises(OutcomeUnknown, match="nothing was noted"):
            s.commit()


def test_a_lost_commit_is_found_on_the_reader_that_was_promoted(cluster: Family, proxy: FaultProxy, make: MakeRouter) -> None:
    router = make()
    with sessions(router, commit_check="table")() as s:
        s.execute(RAISE)
        proxy.lose("COMMIT", answer=True)
        with pytest.raises(OutcomeUnknown) as caught:
            s.commit()
    cluster.wait_in_sync()
    cluster.kill(cluster.writer)
    cluster.promote()
    assert caught.value.resolve().value == "committed"


def test_a_transaction_that_the_server_has_rolled_back_does_not_end_as_done_where_the_error_is_swallowed(
    cluster: Family, make: MakeRouter
) -> None:
    router = make()
    runs: list[int] = []

    def swallows(s: RoutingSession) -> None:
        runs.append(1)
        s.execute(update(Item).where(Item.id == 1).values(stock=Item.stock + 1))
        if len(runs) == 1:
            victim = s.connection().connection.driver_connection
            assert victim is not None
            with pytest.raises(exc.OperationalError, match="1213"):
                deadlock(cluster, s)
        s.execute(update(Item).where(Item.id == 3).values(stock=Item.stock + 1))

    for check in (None, "table"):
        runs.clear()
        router.run_transaction(sessions(router), swallows, commit_check=check)  # type: ignore[arg-type]
        assert len(runs) == 2
    assert cluster.execute("SELECT stock FROM item WHERE id IN (1, 3) ORDER BY id") == [(12,), (32,)]


def test_a_writer_that_is_made_read_only_is_looked_at_at_once_and_its_units_are_run_on_the_next_one(
    cluster: Family, make_router: MakeRouter
) -> None:
    router = make_router(probe_interval=30.0)
    until_readers_serve(router, 2)
    assert router.run_transaction(sessions(router), raise_stock, commit_check=None) == 11
    old = cluster.writer
    cluster.promote()
    cluster.rejoin(old)
    assert router.run_transaction(sessions(router), raise_stock, commit_check=None) == 12
    assert router.topology.writer is not None
    assert router.topology.writer.id == cluster.writer.address != old.address


def deadlock(cluster: Family, s: RoutingSession) -> None:
    """Have this unit, which has locked item 1, be the victim of another one, which has written more."""
    with cluster.writer.connect(autocommit=False) as other, other.cursor() as cursor:
        cursor.execute(f"INSERT INTO part (id) {NUMBERS.format(100, 400)} SELECT id FROM n")
        cursor.execute("UPDATE item SET stock = stock WHERE id = 2")
        waits = threading.Thread(target=lambda: cursor.execute("UPDATE item SET stock = stock WHERE id = 1"))
        waits.start()
        blocked = "SELECT count(*) FROM information_schema.innodb_trx WHERE trx_state = 'LOCK WAIT'"
        eventually(lambda: cluster.execute(blocked) == [(1,)])
        try:
            s.execute(update(Item).where(Item.id == 2).values(stock=0))
        finally:
            waits.join(20)
            other.rollback()


def test_old_rows_of_the_commit_table_are_removed_by_nobodys_request(cluster: Family, make: MakeRouter) -> None:
    router = make()
    old = f"{NUMBERS.format(1, 72)} SELECT uuid(), now() - INTERVAL 2 HOUR FROM n, n AS m LIMIT 5100"
    on(cluster, f"INSERT INTO aurora_router_commits (id, at) {old}", "INSERT INTO aurora_router_commits (id) VALUES (uuid())")
    router.run_transaction(sessions(router), raise_stock)
    too_old = "SELECT count(*) FROM aurora_router_commits WHERE at < now() - INTERVAL 1 HOUR"
    eventually(lambda: cluster.execute(too_old) == [(0,)], timeout=30)
    ((found,),) = cluster.execute("SELECT count(*) FROM aurora_router_commits")
    assert found >= 2


def test_increments_of_what_a_late_reader_shows_are_all_there(cluster: Family, make_router: MakeRouter) -> None:
    for reader in cluster.readers:
        cluster.set_lag(reader, 0.2)
    heard: list[events.Event] = []
    router = make_router(listeners=[heard.append])
    router.init_commit_table()
    until_readers_serve(router, 2)
    errors: list[BaseException] = []

    def increment(s: RoutingSession) -> None:
        s.get_one(Item, 1).stock += 1

    def work() -> None:
        try:
            for _ in range(5):
                router.run_transaction(sessions(router), increment)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert stock(cluster) == 10 + 20
    assert Reason.STALE_READ in {e.reason for e in heard if isinstance(e, events.Routed)}


def test_own_writes_are_seen_though_the_promotion_has_lost_those_before(cluster: Family, make_router: MakeRouter) -> None:
    """What is lost no reader will ever have: who had written it is not kept on the writer for ever."""
    router = make_router(probe_interval=0.05)
    for reader in cluster.readers:
        on(cluster, f"STOP {replica(cluster)} IO_THREAD", instance=reader)
    with sessions(router)() as s:
        s.execute(insert(Item).values(id=77))
        s.commit()
        assert s.scalar(select(func.count()).where(Item.id == 77)) == 1
        s.rollback()
        cluster.kill(cluster.writer)
        cluster.promote()
        assert s.scalar(select(func.count()).where(Item.id == 77)) == 0, "lost"
        s.rollback()
        s.execute(RAISE)
        s.commit()
        assert s.scalar(STOCK) == 11

        def on_a_reader() -> bool:
            s.rollback()
            assert s.scalar(STOCK) == 11
            return place(s) == "reader"

        eventually(on_a_reader)


# -- time limits of the driver's ----------------------------------------------------------------------------------------


@pytest.fixture
def impatient(cluster: Family, make_router: MakeRouter, heard: list[events.Event]) -> Router:
    """A router whose driver waits for an answer for a second."""
    router = make_router(
        f"{cluster.url}?read_timeout=1", instances=[r.address for r in cluster.readers], listeners=[heard.append]
    )
    until_readers_serve(router, 2)
    return router


def running(cluster: Family) -> list[str]:
    """Where statements that sleep are running now."""
    sleeping = "SELECT count(*) FROM information_schema.processlist WHERE user = 'app' AND info LIKE '%%SLEEP(2)%%'"
    return [i.address for i in cluster.instances for _ in range(cluster.execute(sleeping, instance=i)[0][0])]


def test_a_read_that_takes_longer_than_the_driver_waits_is_sent_once(
    cluster: Family, impatient: Router, heard: list[events.Event]
) -> None:
    with sessions(impatient)() as s:
        with pytest.raises(exc.OperationalError, match="timed out") as caught:
            s.execute(text("SELECT SLEEP(2)"))
        assert running(cluster) == [instance_id(s)]
        known = Facts(Failure.TIMED_OUT, sent=True, outcome_known=True, safe_to_repeat=False)
        assert classify_error(caught.value) == known
        s.rollback()
        assert s.scalar(STOCK) == 10
    assert not any(isinstance(e, events.Repeated | events.InstanceDown) for e in heard)
    assert no_connection_is_left(impatient)


def test_a_unit_that_takes_longer_than_the_driver_waits_is_run_once(cluster: Family, impatient: Router) -> None:
    impatient.init_commit_table()
    with impatient.connect() as one, impatient.connect() as other:
        pooled = {connection_id(one), connection_id(other)}
    runs: list[int] = []

    def dawdles(s: RoutingSession) -> None:
        runs.append(1)
        s.execute(text("UPDATE item SET stock = stock + 1 + SLEEP(2) WHERE id = 1"))

    with pytest.raises(exc.OperationalError, match="timed out"):
        impatient.run_transaction(sessions(impatient), dawdles)
    assert runs == [1]
    assert running(cluster) == [cluster.writer.address]
    with impatient.connect() as connection:
        assert connection_id(connection) in pooled, "only that one of the pool is lost"
    eventually(lambda: not running(cluster))
    assert stock(cluster) == 10
    assert impatient.run_transaction(sessions(impatient), raise_stock) == 11


def test_a_read_that_waits_for_an_answer_of_a_frozen_reader_is_repeated_when_that_is_found_lost(
    cluster: Family, impatient: Router, heard: list[events.Event]
) -> None:
    with sessions(impatient)() as s:
        s.get(Item, 1)
        first = instance_id(s)
        reader = next(i for i in cluster.instances if i.address == first)
        cluster.freeze(reader)
        assert s.scalar(STOCK) == 10
        assert instance_id(s) != first
        cluster.thaw(reader)
    assert [e.instance for e in heard if isinstance(e, events.Repeated)] == [first]


@pytest.mark.engines("mariadb")  # which can hold up COMMIT and nothing else
def test_a_commit_that_takes_longer_than_the_driver_waits_is_found_out(
    cluster: Family, impatient: Router, heard: list[events.Event]
) -> None:
    impatient.init_commit_table()
    found: list[int] = []
    thread = threading.Thread(target=lambda: found.append(impatient.run_transaction(sessions(impatient), raise_stock)))
    with cluster.writer.connect() as blocker, blocker.cursor() as cursor:
        for stage in ("START", "BLOCK_COMMIT"):
            cursor.execute(f"BACKUP STAGE {stage}")
        thread.start()
        asks = "SELECT count(*) FROM information_schema.processlist WHERE info LIKE 'INSERT IGNORE%%'"
        eventually(lambda: cluster.execute(asks) != [(0,)])
        cursor.execute("BACKUP STAGE END")
    thread.join(20)
    assert found == [11]
    assert stock(cluster) == 11
    assert [e.outcome for e in heard if isinstance(e, events.CommitResolved)] != ["cannot be known"]
