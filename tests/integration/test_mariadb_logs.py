"""MariaDB logs that operators change (RESET MASTER, DELETE_DOMAIN_ID): which server is the writer, and what readers prove."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from pymysql.err import OperationalError
from sqlalchemy import text
from sqlalchemy.orm import sessionmaker

from aurora_router import Router, RoutingSession
from aurora_router.local import FaultProxy
from aurora_router.local.cluster import Cluster
from tests.integration.shop import eventually, place, sessions, through, until_readers_serve

pytestmark = pytest.mark.engines("mariadb")

Factory = Callable[..., Cluster[Any]]


@contextmanager
def routed(factory: Factory) -> Iterator[tuple[Cluster[Any], Router, sessionmaker[RoutingSession]]]:
    """A new cluster with the second server as writer and the first as reader, and a router that knows both."""
    cluster = factory(readers=1)
    cluster.execute("CREATE TABLE t (id int PRIMARY KEY)")
    first = cluster.writer
    cluster.wait_in_sync()
    cluster.promote()
    cluster.rejoin(first)
    cluster.execute("INSERT INTO t VALUES (0)")
    cluster.wait_in_sync()
    with Router(cluster.url, instances=[first.address], probe_interval=0.05, failover_timeout=10) as router:
        until_readers_serve(router, 1)
        yield cluster, router, sessions(router)
    cluster.stop()


def write(Session: sessionmaker[RoutingSession], number: int) -> None:
    with Session() as s:
        s.execute(text("INSERT INTO t VALUES (:n)"), {"n": number})
        s.commit()


def began_anew(cluster: Cluster[Any], router: Router) -> None:
    """Begin the reader's log anew, as operators do when they make a reader. Return when the router has seen it."""
    (reader,) = cluster.readers
    ((replayed,),) = cluster.execute("SELECT @@gtid_slave_pos", instance=reader)
    cluster._order(reader, "STOP SLAVE", "RESET MASTER", f"SET GLOBAL gtid_slave_pos = '{replayed}'", "START SLAVE")  # type: ignore[attr-defined]
    eventually(lambda: router.topology.by_id[reader.address].tracked[0].server.position.writer_starts == ((0, 5),))
    until_readers_serve(router, 1)


def until_heard(router: Router) -> None:
    """Wait until the router has heard all instances again."""
    now = time.monotonic()
    eventually(lambda: all(i.last_observed_at > now for i in router.topology))


def forgets(cluster: Cluster[Any], domain: int) -> bool:
    """Tell whether the writer could delete that domain. No log may contain it, and a log that a reader reads is not purged."""
    for statement in ("FLUSH BINARY LOGS", "PURGE BINARY LOGS BEFORE NOW() + INTERVAL 1 DAY"):
        cluster.execute(statement)
    try:
        cluster.execute(f"FLUSH BINARY LOGS DELETE_DOMAIN_ID = ({domain})")
    except OperationalError:
        return False
    return True


def test_a_reader_with_a_fresh_log_serves_who_has_written(aurora_cluster_factory: Factory) -> None:
    """A reader whose log was begun anew has replayed the writer's transactions all the same."""
    with routed(aurora_cluster_factory) as (cluster, router, Session):
        began_anew(cluster, router)
        with Session() as s:
            s.execute(text("INSERT INTO t VALUES (1)"))
            s.commit()

            def on_the_reader() -> bool:
                assert s.scalar(text("SELECT count(*) FROM t WHERE id = 1")) == 1
                found = place(s)
                s.rollback()
                return found == "reader"

            eventually(on_the_reader)


def test_a_reader_with_a_fresh_log_writes_once_promoted(aurora_cluster_factory: Factory) -> None:
    """A promoted reader with a fresh log is not taken for a deposed writer. The old writer is one when it thaws."""
    with routed(aurora_cluster_factory) as (cluster, router, Session):
        began_anew(cluster, router)
        write(Session, 1)
        cluster.wait_in_sync()
        old = cluster.writer
        cluster.freeze(old)
        new = cluster.promote()
        eventually(lambda: router.topology.writer is not None and router.topology.writer.id == new.address)
        write(Session, 2)
        assert cluster.execute("SELECT max(id) FROM t") == [(2,)]
        cluster.thaw(old)
        looked = router.topology.by_id[old.address].last_observed_at
        eventually(
            lambda: router.topology.by_id[old.address].last_observed_at > looked and router.topology.by_id[old.address].tracked
        )
        assert "deposed" in router.topology.by_id[old.address].error
        assert router.topology.writer is not None
        assert router.topology.writer.id == new.address


def test_a_writer_whose_log_begins_anew_writes_on(aurora_cluster_factory: Factory, caplog: pytest.LogCaptureFixture) -> None:
    """RESET MASTER deposes nobody. Numbers begin anew, so a reader that is not made anew serves no session that has written."""
    with routed(aurora_cluster_factory) as (cluster, router, Session):
        (reader,) = cluster.readers
        with caplog.at_level(logging.WARNING, "aurora_router"), Session() as s:
            cluster.execute("RESET MASTER")
            eventually(lambda: router.topology.by_id[reader.address].unproven)
            for number in range(1, 30):  # The last ones are past those that the reader has.
                s.execute(text("INSERT INTO t VALUES (:n)"), {"n": number})
                s.commit()
                for _ in range(3):
                    assert s.scalar(text("SELECT count(*) FROM t WHERE id = :n"), {"n": number}) == 1
                    s.rollback()
        said = [r.getMessage() for r in caplog.records if "that has written" in r.getMessage()]
        assert len(said) == 1
        assert said[0].startswith(f"{reader.address}: it serves no session that has written")
        cluster._rebuild(reader)  # type: ignore[attr-defined]
        until_readers_serve(router, 1)
        with Session() as s:
            s.execute(text("INSERT INTO t VALUES (100)"))
            s.commit()

            def on_the_reader() -> bool:
                assert s.scalar(text("SELECT count(*) FROM t WHERE id = 100")) == 1
                found = place(s)
                s.rollback()
                return found == "reader"

            eventually(on_the_reader)
        cluster.kill(cluster.writer)
        cluster.promote()
        write(Session, 101)


@pytest.mark.parametrize("latency", [0.0, 0.03])
def test_a_router_that_starts_after_a_reset_is_not_fooled(aurora_cluster_factory: Factory, latency: float) -> None:
    """A reader with more of the writer's transactions than the writer follows an older log, in any order of answers."""
    cluster = aurora_cluster_factory(readers=1)
    cluster.execute("CREATE TABLE t (id int PRIMARY KEY)")
    for number in range(-9, 0):
        cluster.execute(f"INSERT INTO t VALUES ({number})")
    cluster.wait_in_sync()
    cluster.execute("RESET MASTER")
    readers = [r.address for r in cluster.readers]
    with FaultProxy((cluster.writer.host, cluster.writer.port)) as proxy:
        proxy.latency = latency
        with Router(through(proxy, cluster), instances=readers, probe_interval=0.05) as router:
            eventually(lambda: router.topology.readers and router.topology.writer)
            for number in range(1, 5):
                with sessions(router)() as s:
                    s.execute(text("INSERT INTO t VALUES (:n)"), {"n": number})
                    s.commit()
                    assert s.scalar(text("SELECT count(*) FROM t WHERE id = :n"), {"n": number}) == 1
                    s.rollback()
                    until_heard(router)
                    assert s.scalar(text("SELECT count(*) FROM t WHERE id = :n"), {"n": number}) == 1
    cluster.stop()


def test_a_foreign_server_id_leads_no_reader_astray(aurora_cluster_factory: Factory) -> None:
    """A transaction that comes to the writer with another server's id costs no reader its proof."""
    with routed(aurora_cluster_factory) as (cluster, router, Session):
        (reader,) = cluster.readers
        for number in range(1, 4):
            before = router.topology.epoch
            cluster._order(cluster.writer, "SET SESSION server_id = 77", f"INSERT INTO app.t VALUES ({number})")  # type: ignore[attr-defined]
            eventually(lambda before=before: router.topology.epoch > before)
            for _ in range(3):
                until_heard(router)
            write(Session, 10 + number)
            eventually(lambda: router.topology.by_id[reader.address].position is not None)
            assert router.topology.by_id[reader.address].unproven == ""
        with Session() as s:
            s.execute(text("INSERT INTO t VALUES (100)"))
            s.commit()

            def on_the_reader() -> bool:
                assert s.scalar(text("SELECT count(*) FROM t WHERE id = 100")) == 1
                found = place(s)
                s.rollback()
                return found == "reader"

            eventually(on_the_reader)


def test_a_writer_that_forgets_a_domain_writes_on(aurora_cluster_factory: Factory) -> None:
    """After DELETE_DOMAIN_ID the epoch has fewer domains, the writer stays the writer, and its reader serves as before."""
    with routed(aurora_cluster_factory) as (cluster, router, Session):
        before = router.topology.epoch
        with cluster._connect_app(cluster.writer) as connection, connection.cursor() as cursor:
            cursor.execute("SET SESSION gtid_domain_id = 7")
            cursor.execute("INSERT INTO t VALUES (1)")
        cluster.wait_in_sync()
        eventually(lambda: router.topology.epoch > before)
        eventually(lambda: forgets(cluster, 7))
        eventually(lambda: router.topology.epoch == before)
        with Session() as s:
            s.execute(text("INSERT INTO t VALUES (2)"))
            s.commit()

            def on_the_reader() -> bool:
                assert s.scalar(text("SELECT count(*) FROM t WHERE id = 2")) == 1
                found = place(s)
                s.rollback()
                return found == "reader"

            eventually(on_the_reader)
