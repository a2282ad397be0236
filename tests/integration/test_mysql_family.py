"""Particulars of MySQL and MariaDB: snapshots, the guard of readers, the commit table, and the status of replication."""

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
    connection_ids,
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
    """Make a function, or replace the one of that name."""
    on(cluster, f"DROP FUNCTION IF EXISTS {name}", f"CREATE FUNCTION {name}() {rest}")


def replica(cluster: Family) -> str:
    """The word for a reader in statements."""
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
        ({"connect_timeout": "soon"}, {}, "ValueError.*; check the URL and its query"),
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
    assert not any(record.exc_info for record in caplog.records), "no traceback"


@pytest.mark.engines("mariadb")
def test_a_mariadb_url_that_leads_to_mysql_is_refused_at_once(aurora_cluster_factory: Callable[..., Family]) -> None:
    """A MariaDB URL that leads to MySQL is refused at the first connect."""
    # Only the version tells SQLAlchemy which server it is.
    cluster = aurora_cluster_factory(readers=0, settings={"version": "8.4.0"})
    try:
        with Router(cluster.url) as router, pytest.raises(ConfigurationError, match=r"write mysql\+pymysql://") as caught:
            router.connect()
        assert cluster.writer.address in str(caught.value)
    finally:
        cluster.stop()


def test_a_server_always_says_the_same_of_its_start(cluster: Family) -> None:
    """A server says the same of its start whenever it is asked."""
    with cluster.writer.connect() as connection, connection.cursor() as cursor:
        said = set()
        until = time.monotonic() + 1.5
        while time.monotonic() < until:
            cursor.execute(mysql.IDENTITY)
            said.add(cursor.fetchone())
    assert len(said) == 1


def test_a_privilege_that_the_monitor_lacks_is_named_at_start(aurora_cluster_factory: Callable[..., Family]) -> None:
    """A privilege that the monitor lacks is named at the start."""
    cluster = aurora_cluster_factory(readers=0, monitor_privileges=False)
    privilege = "SLAVE MONITOR" if engine(cluster) == "mariadb" else "REPLICATION CLIENT"
    with Router(cluster.url) as router, pytest.raises(ConfigurationError, match=f"the monitor needs .*{privilege}") as caught:
        router.start()
    assert cluster.app_password not in str(caught.value)
    cluster.stop()


def test_a_reader_with_a_stopped_sql_thread_is_not_used(cluster: Family, make_router: MakeRouter) -> None:
    """A reader whose SQL thread has stopped is not used until it runs again."""
    router = make_router(probe_interval=0.05)
    until_readers_serve(router, 2)
    stopped, other = cluster.readers
    on(cluster, f"STOP {replica(cluster)} SQL_THREAD", instance=stopped)
    eventually(lambda: [r.id for r in router.topology.readers] == [other.address])
    assert "its SQL thread has stopped" in router.topology.by_id[stopped.address].error
    on(cluster, f"START {replica(cluster)} SQL_THREAD", instance=stopped)
    until_readers_serve(router, 2)


def test_a_reader_that_lacks_purged_logs_is_not_used(
    aurora_cluster_factory: Callable[..., Family],
) -> None:
    """A reader that lacks what the writer has purged from its logs is not used."""
    cluster = aurora_cluster_factory(readers=1)
    (reader,) = cluster.readers
    with Router(cluster.url, instances=[reader.address], probe_interval=0.05) as router:
        until_readers_serve(router, 1)
        on(cluster, f"STOP {replica(cluster)}", instance=reader)
        eventually(lambda: router.topology.readers == ())
        # The writer purges no log that it still sends, and notices only when it sends that nobody receives.
        sending = "SELECT id FROM information_schema.processlist WHERE command LIKE 'Binlog Dump%'"
        on(cluster, *(f"KILL {thread}" for (thread,) in cluster.execute(sending)))
        eventually(lambda: not cluster.execute(sending))
        on(cluster, "CREATE TABLE lost (id int)", "FLUSH BINARY LOGS")

        def only_the_newest_log_is_left() -> bool:
            on(cluster, "PURGE BINARY LOGS BEFORE NOW() + INTERVAL 1 DAY")
            return len(cluster.execute("SHOW BINARY LOGS")) == 1

        # InnoDB may still need the last log for its own recovery, which PURGE respects in silence.
        eventually(only_the_newest_log_is_left)
        on(cluster, f"START {replica(cluster)}", instance=reader)
        eventually(lambda: "its IO thread has stopped" in router.topology.by_id[reader.address].error)
        assert router.topology.readers == ()
    cluster.stop()


def test_a_readers_own_transaction_deposes_no_writer(cluster: Family, make_router: MakeRouter) -> None:
    """A transaction that a reader has made itself deposes no writer."""
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
    cluster.kill(astray)  # The next healing makes it anew.


def test_a_reader_that_accepts_writes_is_no_writer(cluster: Family, make_router: MakeRouter) -> None:
    """A reader that is not read-only may show more than the writer, because it is asked later. It still only follows."""
    heard: list[events.Event] = []
    router = make_router(probe_interval=0.02, listeners=[heard.append])
    until_readers_serve(router, 2)
    careless = cluster.readers[0]
    off = ("SET GLOBAL read_only = OFF",)
    try:
        cluster._order(careless, *off)
        eventually(lambda: len(router.topology.readers) == 1)
        with cluster._connect_app(cluster.writer) as connection, connection.cursor() as cursor:
            for _ in range(1500):
                cursor.execute("UPDATE item SET stock = stock + 1 WHERE id = 2")
        assert [e for e in heard if isinstance(e, events.WriterChanged) and e.new != cluster.writer.address] == []
    finally:
        on_again = "read_only" if engine(cluster) == "mariadb" else "super_read_only"
        cluster._order(careless, f"SET GLOBAL {on_again} = ON")


# -- units --------------------------------------------------------------------------------------------------------


def test_a_unit_reads_in_autocommit_despite_repeatable_read(router: Router) -> None:
    """An automatic unit reads in autocommit, although repeatable read is the server's default."""
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


# -- run_transaction ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("answer", [False, True], ids=["before the server hears of it", "after it has answered"])
@pytest.mark.parametrize("step", ["UPDATE item", "INSERT INTO `app`.aurora_router_commits", "COMMIT"])
def test_a_loss_at_any_step_leaves_the_unit_done_once(
    cluster: Family, proxy: FaultProxy, make: MakeRouter, step: str, answer: bool
) -> None:
    """A connection lost at any step leaves the unit done exactly once."""
    router = make()
    proxy.lose(step, answer=answer)
    assert router.run_transaction(sessions(router), raise_stock) == 11
    assert proxy._losing == [], "it was lost"
    assert stock(cluster) == 11
    assert no_connection_is_left(router)


def test_commits_lost_several_times_are_each_resolved(
    cluster: Family, proxy: FaultProxy, make: MakeRouter, heard: list[events.Event]
) -> None:
    """Commits that are lost again and again are each resolved."""
    router = make()
    proxy.lose("COMMIT", answer=False, times=3)
    assert router.run_transaction(sessions(router), raise_stock) == 11
    assert stock(cluster) == 11
    resolved = [e.outcome for e in heard if isinstance(e, events.CommitResolved)]
    assert set(resolved) == {"not committed"}
    assert [e.number for e in heard if isinstance(e, events.RunAgain)] == list(range(1, len(resolved) + 1))


def test_a_commit_that_never_arrives_is_waited_for_and_retried(cluster: Family, proxy: FaultProxy, make: MakeRouter) -> None:
    """A transaction whose COMMIT never comes is waited for and run again."""
    # MySQL has no timeout for idle transactions, only one for all idle connections.
    timeout, usual = ("idle_transaction_timeout", 0) if engine(cluster) == "mariadb" else ("wait_timeout", 28800)
    cluster.execute(f"SET GLOBAL {timeout} = 1")
    try:
        router = make()
        proxy.lose("COMMIT", answer=False, half_open=True)
        assert router.run_transaction(sessions(router), raise_stock) == 11
    finally:
        cluster.execute(f"SET GLOBAL {timeout} = {usual}")
    assert stock(cluster) == 11


def test_a_plain_session_resolves_by_the_table_or_knows_nothing(cluster: Family, proxy: FaultProxy, make: MakeRouter) -> None:
    """A plain session that lost a COMMIT asks the commit table, or learns that nothing was noted."""
    router = make()
    proxy.lose("COMMIT", answer=True)
    with sessions(router, commit_check="xid")() as s:
        s.execute(RAISE)
        with pytest.raises(OutcomeUnknown) as caught:
            s.commit()
    assert caught.value.resolve().value == "committed"
    proxy.lose("COMMIT", answer=True)  # A new connection sends no COMMIT of its own.
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


def test_a_swallowed_deadlock_does_not_end_as_done(cluster: Family, make: MakeRouter) -> None:
    """A transaction that the server has rolled back does not end as done if its error is swallowed."""
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


def test_a_writer_made_read_only_is_probed_at_once(cluster: Family, make_router: MakeRouter) -> None:
    """A writer that is made read-only is probed at once, and its units are run on the next one."""
    router = make_router(probe_interval=30.0)
    until_readers_serve(router, 2)
    assert router.run_transaction(sessions(router), raise_stock, commit_check=None) == 11
    old = cluster.writer
    cluster.promote()
    cluster.rejoin(old)
    assert router.run_transaction(sessions(router), raise_stock, commit_check=None) == 12
    assert router.topology.writer is not None
    assert router.topology.writer.id == cluster.writer.address != old.address


def deadlock(cluster: Cluster[Any], s: RoutingSession, *first: str) -> None:
    """Make this unit, which has locked item 1, the victim of another unit that has written more.

    first: statements that the other unit sends before the rest. InnoDB never chooses the only unit that has written to a
        table without transactions.
    """
    with cluster.writer.connect(autocommit=False) as other, other.cursor() as cursor:
        for statement in first:
            cursor.execute(statement)
        cursor.execute(f"INSERT INTO part (id) {NUMBERS.format(100, 400)} SELECT id FROM n")
        cursor.execute("UPDATE item SET stock = stock WHERE id = 2")
        waits = threading.Thread(target=lambda: cursor.execute("UPDATE item SET stock = stock WHERE id = 1"))
        waits.start()
        blocked = "SELECT count(*) FROM information_schema.innodb_trx WHERE trx_state = 'LOCK WAIT'"

        def is_blocked() -> bool:
            # InnoDB gives the same answer again if it is asked within 0.1 s.
            time.sleep(0.15)
            return cluster.execute(blocked) == [(1,)]

        eventually(is_blocked)
        try:
            s.execute(update(Item).where(Item.id == 2).values(stock=0))
        finally:
            waits.join(20)
            other.rollback()


def test_old_commit_rows_are_removed_outside_of_requests(cluster: Family, make: MakeRouter) -> None:
    """Old rows of the commit table are removed outside of any request."""
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


def test_own_writes_are_seen_after_a_promotion_that_lost_some(cluster: Family, make_router: MakeRouter) -> None:
    """A session sees its own writes after a promotion that lost its earlier ones.

    No reader will ever have the lost writes, so their session is not kept on the writer for ever.
    """
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
    """A router whose driver waits one second for an answer."""
    router = make_router(
        f"{cluster.url}?read_timeout=1", instances=[r.address for r in cluster.readers], listeners=[heard.append]
    )
    until_readers_serve(router, 2)
    return router


def running(cluster: Family) -> list[str]:
    """The servers of the sleeping statements, one address for each."""
    sleeping = "SELECT count(*) FROM information_schema.processlist WHERE user = 'app' AND info LIKE '%%SLEEP(2)%%'"
    return [i.address for i in cluster.instances for _ in range(cluster.execute(sleeping, instance=i)[0][0])]


def test_a_read_that_exceeds_the_read_timeout_is_sent_once(cluster: Family, impatient: Router, heard: list[events.Event]) -> None:
    """A read that takes longer than the driver waits is sent once."""
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


def test_a_unit_that_exceeds_the_read_timeout_is_run_once(cluster: Family, impatient: Router) -> None:
    """A unit that takes longer than the driver waits is run once."""
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


def test_a_read_on_a_frozen_reader_is_repeated_when_it_is_lost(
    cluster: Family, impatient: Router, heard: list[events.Event]
) -> None:
    """A read that waits for a frozen reader is retried when the reader is found to be lost."""
    with sessions(impatient)() as s:
        s.get(Item, 1)
        first = instance_id(s)
        reader = next(i for i in cluster.instances if i.address == first)
        cluster.freeze(reader)
        assert s.scalar(STOCK) == 10
        assert instance_id(s) != first
        cluster.thaw(reader)
    assert [e.instance for e in heard if isinstance(e, events.Repeated)] == [first]


@pytest.mark.engines("mariadb")  # Only MariaDB can hold up COMMIT and nothing else.
def test_a_commit_that_exceeds_the_read_timeout_is_resolved(
    cluster: Family, impatient: Router, heard: list[events.Event]
) -> None:
    """The outcome of a COMMIT that takes longer than the driver waits is resolved."""
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


@pytest.mark.parametrize("read_only", [None, True])
def test_a_backslash_means_what_sql_mode_says(make_router: MakeRouter, read_only: bool | None) -> None:
    """A text whose meaning depends on sql_mode is read with the mode of its connection, however that was set."""
    hidden = text(r"SELECT 'a\', connection_id() -- '")
    plain, without = "STRICT_TRANS_TABLES", "NO_BACKSLASH_ESCAPES"
    for mode, where in (plain, "reader"), (without, "reader" if read_only else "writer"):
        router = make_router(engine_options={"pool_size": 1, "connect_args": {"init_command": f"SET sql_mode = '{mode}'"}})
        until_readers_serve(router, 2)
        with sessions(router)(read_only=read_only) as s:
            s.execute(hidden).all()
            assert place(s) == where
    unlocked = sessions(make_router())
    with unlocked(read_only=True) as s:
        assert s.scalars(text(r"SELECT 'a\'; DELETE FROM item; -- '")).all() == ["a'; DELETE FROM item; -- "]


def test_a_mode_that_a_raw_connection_left_behind_counts(make_router: MakeRouter) -> None:
    """A mode that the driver's own cursor has set on a pooled connection counts for the next unit there."""
    router = make_router(engine_options={"pool_size": 1, "max_overflow": 0})
    until_readers_serve(router, 2)
    raws = [router.raw_connection(read_only=True) for _ in range(2)]
    for raw in raws:
        raw.cursor().execute("SET SESSION sql_mode = 'NO_BACKSLASH_ESCAPES'")
    for raw in raws:
        raw.close()
    with sessions(router)() as s:
        s.execute(text(r"SELECT 'a\', connection_id() -- '")).all()
        assert place(s) == "writer"


def test_statements_are_read_as_the_server_reads_them(cluster: Family, make_router: MakeRouter) -> None:
    """A URL that says mysql may lead to MariaDB: a function that only MariaDB has is a read there."""
    if engine(cluster) == "mysql":
        ours, other = "SELECT bin_to_uuid(uuid_to_bin(uuid()))", "SELECT astext(point(1, 1))"
    else:
        ours, other = "SELECT astext(point(1, 1))", "SELECT bin_to_uuid('x')"
    router = make_router(cluster.url.replace("mariadb+", "mysql+"), instances=[reader.address for reader in cluster.readers])
    until_readers_serve(router, 2)
    assert router.explain(ours).reason is Reason.READ
    assert router.explain(other).reason is Reason.NOT_A_READ
    with sessions(router)() as s:
        s.execute(text(ours)).all()
        assert place(s) == "reader"


_GRAMMAR_OF = {
    "mariadb": [
        "SELECT percentile_cont(0.5) WITHIN GROUP (ORDER BY stock) OVER () FROM item",
        "SELECT AsText(GeomFromText('POINT(1 1)')), X(Point(1, 1)), Within(Point(1, 1), Point(1, 1))",
        "SELECT name FROM item WHERE ROWNUM() < 2",
    ],
    "mysql": [
        "SELECT stock, count(*) FROM item GROUP BY stock WITH ROLLUP",
        "SELECT first_value(stock) RESPECT NULLS OVER (ORDER BY id) FROM item",
        "SELECT JSON_VALUE('[1]', '$[0]' RETURNING DECIMAL(4, 2))",
    ],
}


def test_what_the_servers_grammar_takes_for_no_call_is_read(cluster: Family, make_router: MakeRouter) -> None:
    """Types, clauses and grammar functions before a parenthesis keep no read from a reader, even with bound parameters."""
    on(cluster, "DROP TABLE IF EXISTS story", "CREATE TABLE story (words varchar(20), FULLTEXT (words))")
    cluster.wait_in_sync()
    router = make_router()
    until_readers_serve(router, 2)
    for sql in [
        "SELECT words FROM story WHERE MATCH words AGAINST (:word)",
        "SELECT words FROM story WHERE MATCH story.words AGAINST ('a' IN BOOLEAN MODE)",
        "SELECT * FROM JSON_TABLE(:document, :path COLUMNS (a DATETIME(6) PATH '$.a', b TEXT PATH '$.b')) AS t",
        "SELECT * FROM JSON_TABLE('[]', \"$[*]\" COLUMNS (a INT(11) PATH \"$.a\", NESTED PATH '$.b' COLUMNS (c INT PATH '$'))) t",
        "SELECT JSON_VALUE(:document, :path), JSON_VALUE('[1]', \"$[0]\")",
        "SELECT INSERT(name, 1, 1, 'x'), insert (name, 1, 1, INSERT('a', 1, 1, 'b')) FROM item",
        "SELECT SQL_NO_CACHE (id) FROM item WHERE name LIKE :word ESCAPE ('|')",
        "SELECT CONVERT(now(), DATETIME(3)), TRIM(BOTH ('x') FROM name) FROM item",
        *_GRAMMAR_OF[engine(cluster)],
    ]:
        with sessions(router)() as s:
            s.execute(text(sql), {"word": "a", "document": "[]", "path": "$[*]"} if ":" in sql else {}).all()
            assert place(s) == "reader", sql


def test_what_a_read_has_left_is_asked_where_it_ran(make_router: MakeRouter) -> None:
    """The reader that ran a statement answers questions about it, although the writer's connection has a past as well."""
    router = make_router(engine_options={"pool_size": 1, "max_overflow": 0})
    until_readers_serve(router, 2)
    with sessions(router)(read_only=False) as s:
        s.execute(text("SELECT 1 UNION SELECT 2")).all()
    with sessions(router)() as s:
        assert len(s.scalars(select(Item)).all()) == 3
        assert s.scalar(text("SELECT FOUND_ROWS()")) == 3
        s.scalars(select(Item)).all()
        assert s.scalar(text("/*!SELECT FOUND_ROWS()*/")) == 3
        s.scalars(select(Item)).all()
        ((_, cost),) = s.execute(text("SHOW STATUS LIKE 'Last_query_cost'")).all()
        assert float(cost) > 0
        assert s.scalar(text("SELECT CAST('x' AS SIGNED)")) == 0
        assert s.scalar(text("SELECT @@warning_count")) == 1
        s.scalar(text("SELECT CAST('x' AS SIGNED)"))
        assert [code for _, code, _ in s.execute(text("SHOW WARNINGS"))] == [1292]
        assert s.scalar(text("SHOW COUNT(*) WARNINGS")) == 1
        s.execute(text("GET DIAGNOSTICS @number = NUMBER"))
        assert s.scalar(text("SELECT @number")) == 1
        with pytest.raises(exc.OperationalError):
            s.scalars(text("SELECT missing FROM item"))
        assert [code for _, code, _ in s.execute(text("SHOW ERRORS"))] == [1054]
        assert s.scalar(text("SELECT LAST_INSERT_ID()")) == 0
        assert place(s) == "reader"
        s.execute(RAISE)
        assert s.scalar(text("SELECT ROW_COUNT()")) == 1
        assert place(s) == "writer"


def test_no_question_of_ours_comes_between_two_statements(make_router: MakeRouter) -> None:
    """A text whose meaning depends on sql_mode keeps the state that the previous statement left."""
    router = make_router(engine_options={"pool_size": 1, "max_overflow": 0})
    until_readers_serve(router, 2)
    found = text(r"SELECT FOUND_ROWS(), 'a\', connection_id() -- '")
    for read_only in (None, True, False):
        with sessions(router)(read_only=read_only) as s:
            assert len(s.scalars(select(Item)).all()) == 3
            assert s.execute(found).one()[0] == 3
            s.scalar(text("SELECT CAST('x' AS SIGNED)"))
            assert s.scalar(text(r"SELECT @@warning_count, 'it\'s' -- 'connection_id()")) == 1
            assert place(s) == ("writer" if read_only is False else "reader")
    with router.connect(read_only=True) as connection:
        assert len(connection.scalars(select(Item.id)).all()) == 3
        assert connection.execute(found).one()[0] == 3


def test_a_text_in_double_quotes_is_asked_about_at_first(make_router: MakeRouter) -> None:
    """Only the server knows ANSI_QUOTES. An automatic unit asks before its first statement; later it moves instead."""
    router = make_router()
    until_readers_serve(router, 2)
    hidden = text(r'SELECT "a\", connection_id() -- "')
    with sessions(router)() as s:
        assert s.scalar(hidden) == 'a", connection_id() -- '
        assert place(s) == "reader"
    with sessions(router)() as s:
        assert len(s.scalars(select(Item)).all()) == 3
        assert s.scalar(hidden) == 'a", connection_id() -- '
        assert place(s) == "writer"
        assert s.scalar(text("SELECT FOUND_ROWS()")) == 1, "of the statement that moved"
    with sessions(router)(read_only=True) as s:
        s.scalars(select(Item)).all()
        written = text(r'SELECT "a\"; DELETE FROM item; -- "')
        assert s.scalar(written) == 'a"; DELETE FROM item; -- '


def test_what_no_read_has_left_is_asked_on_the_writer(make_router: MakeRouter) -> None:
    """Without a read on a reader the unit asks the writer. A variable stays with the connection that set it."""
    router = make_router()
    until_readers_serve(router, 2)
    for question in "SELECT FOUND_ROWS()", "SHOW WARNINGS", "SELECT @number":
        with sessions(router)() as s:
            s.execute(text(question)).all()
            assert place(s) == "writer"
    with sessions(router)() as s:
        s.scalar(STOCK)
        s.scalar(text("SELECT @number := 5"))
        assert s.scalar(text("SELECT @number")) == 5
        assert place(s) == "writer"


def test_a_lost_past_is_not_asked_of_another_reader(cluster: Family, make_router: MakeRouter) -> None:
    """If the reader's connection is lost, so is the state of the read: the question fails and is not retried."""
    router = make_router()
    until_readers_serve(router, 2)
    with sessions(router)() as s:
        s.scalars(select(Item)).all()
        reader = next(r for r in cluster.readers if r.address == instance_id(s))
        on(cluster, *(f"KILL {number}" for number in connection_ids(cluster, reader)), instance=reader)
        with pytest.raises(exc.DBAPIError) as caught:
            s.scalar(text("SELECT FOUND_ROWS()"))
        assert classify_error(caught.value).failure is Failure.LOST
