"""Servers of MySQL and MariaDB: which ones are taken, what they say of themselves, and which reader is not used."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
from pymysql.cursors import DictCursor
from sqlalchemy import make_url, select

from aurora_router import ConfigurationError, Router
from aurora_router.core import events
from aurora_router.servers import mysql
from tests.integration.mysql_family import Family, on, replica
from tests.integration.shop import RAISE, Item, engine, eventually, place, sessions, until_readers_serve

pytestmark = pytest.mark.engines("mariadb", "mysql")

MakeRouter = Callable[..., Router]
STOCK = select(Item.stock).where(Item.id == 1)


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
    eventually(lambda: all(i.last_observed_at > looked for i in router.topology))
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
