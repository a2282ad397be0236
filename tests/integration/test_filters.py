"""Own writes are seen although a reader replicates only a part, or the writer's log has only a part."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import text

from aurora_router import Outcome, OutcomeUnknown, Router
from aurora_router.core.selection import Reason
from aurora_router.local import FaultProxy
from aurora_router.local.cluster import Cluster
from tests.integration.shop import engine, eventually, instance_id, place, sessions, through

pytestmark = pytest.mark.engines("mariadb", "mysql")

Factory = Callable[..., Cluster[Any]]


def filter_replication(cluster: Cluster[Any], reader: Any, table: str = "logs") -> None:
    """Have a reader leave out a table."""
    if engine(cluster) == "mariadb":
        cluster._order(reader, "STOP SLAVE", f"SET GLOBAL replicate_ignore_table = 'app.{table}'", "START SLAVE")  # type: ignore[attr-defined]
        return
    change = f"CHANGE REPLICATION FILTER REPLICATE_IGNORE_TABLE = (app.{table})"
    cluster._order(reader, "STOP REPLICA SQL_THREAD", change, "START REPLICA SQL_THREAD")  # type: ignore[attr-defined]


def warnings(caplog: pytest.LogCaptureFixture, what: str) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING and what in r.getMessage()]


def reads_its_own_writes(router: Router, table: str) -> set[str]:
    """Write, and read until each instance has been probed twice since. Return the instances of the reads."""
    places = set()
    with sessions(router)() as s:
        for number in range(1, 4):
            s.execute(text(f"INSERT INTO {table} VALUES (:n)"), {"n": number})
            s.commit()
            for _ in range(2):
                asked = [i.last_observed_at for i in router.topology]
                heard = asked
                while any(now <= before for now, before in zip(heard, asked, strict=True)):
                    assert s.scalar(text(f"SELECT count(*) FROM {table} WHERE id = :n"), {"n": number}) == 1
                    places.add(instance_id(s))
                    s.rollback()
                    heard = [i.last_observed_at for i in router.topology]
    return places


def test_a_filtered_reader_is_not_used_for_own_writes(aurora_cluster_factory: Factory, caplog: pytest.LogCaptureFixture) -> None:
    """A reader with replication filters serves only sessions that have written nothing; a warning says so, once."""
    cluster = aurora_cluster_factory(readers=2)
    filtered = cluster.readers[0]
    cluster.execute("CREATE TABLE logs (id int PRIMARY KEY)")
    cluster.wait_in_sync()
    filter_replication(cluster, filtered)
    with Router(cluster.url, instances=[r.address for r in cluster.readers], probe_interval=0.05) as router:
        eventually(lambda: len(router.topology.readers) == 2)
        assert filtered.address not in reads_its_own_writes(router, "logs")
        seen = []
        for _ in range(4):
            with sessions(router)() as fresh:
                fresh.scalar(text("SELECT count(*) FROM logs"))
                seen.append(instance_id(fresh))
        assert filtered.address in seen, "who has written nothing is served"
        (said,) = warnings(caplog, "session that has written")
        assert said.startswith(f"{filtered.address}: it serves no session that has written: it replicates a part")
        assert "app.logs" in said
    cluster.stop()


def test_a_filtered_log_keeps_who_has_written_on_the_writer(
    aurora_cluster_factory: Factory, caplog: pytest.LogCaptureFixture
) -> None:
    """If the writer leaves a database out of its log, sessions that have written stay on the writer."""
    cluster = aurora_cluster_factory(readers=1)
    cluster.execute("CREATE DATABASE other")
    cluster.execute("CREATE TABLE other.x (id int PRIMARY KEY)")
    cluster.execute("GRANT ALL ON other.* TO app@'%'")
    cluster.wait_in_sync()
    cluster._settings = {"binlog_ignore_db": "other"}
    cluster.restart(cluster.writer)
    with Router(cluster.url, instances=[cluster.readers[0].address], probe_interval=0.05) as router:
        eventually(lambda: len(router.topology.readers) == 1)
        assert reads_its_own_writes(router, "other.x") == {cluster.writer.address}
        with sessions(router)() as s:
            s.scalar(text("SELECT count(*) FROM other.x"))
            assert place(s) == "reader"
        (said,) = warnings(caplog, "session that has written")
        assert said.startswith(f"{cluster.writer.address}: no reader serves a session that has written: its log")
        cluster.kill(cluster.writer)
        cluster.promote()
        eventually(lambda: router.topology.writer is not None and router.topology.writer.id == cluster.writer.address)
        with sessions(router)() as s:
            s.execute(text("INSERT INTO other.x VALUES (7)"))
            s.commit()
    cluster.stop()


def test_no_time_is_long_enough_for_a_filtered_reader(aurora_cluster_factory: Factory) -> None:
    """If no reader will ever qualify, the writer serves without a wait, and explain() says why."""
    cluster = aurora_cluster_factory(readers=1)
    cluster.execute("CREATE TABLE logs (id int PRIMARY KEY)")
    cluster.wait_in_sync()
    filter_replication(cluster, cluster.readers[0])
    options = {"probe_interval": 0.05, "pin_seconds": 0.01, "wait_for_reader": 30.0, "consistency": "global"}
    with Router(cluster.url, instances=[cluster.readers[0].address], **options) as router:
        eventually(lambda: len(router.topology.readers) == 1)
        assert reads_its_own_writes(router, "logs") == {cluster.writer.address}
        assert router.explain("SELECT 1").reason is Reason.UNPROVEN
        with router.causal_scope() as scope, router.begin() as connection:
            connection.execute(text("INSERT INTO logs VALUES (9)"))
        token = scope.token
    with Router(cluster.url, instances=[cluster.readers[0].address], probe_interval=0.05) as other:
        eventually(lambda: len(other.topology.readers) == 1)
        with sessions(other)(after=token) as s:
            assert s.scalar(text("SELECT count(*) FROM logs WHERE id = 9")) == 1
            assert place(s) == "writer"
        with other.connect(read_only=True, after=token) as connection:
            assert connection.scalar(text("SELECT count(*) FROM logs WHERE id = 9")) == 1
    cluster.stop()


def test_a_reader_without_the_commit_table_proves_nothing(aurora_cluster_factory: Factory) -> None:
    """The outcome of a lost COMMIT is unknown if a reader is promoted that left the rows of the commit table out."""
    cluster = aurora_cluster_factory(readers=1)
    (reader,) = cluster.readers
    cluster.execute("CREATE TABLE logs (id int PRIMARY KEY)")
    with (
        FaultProxy((cluster.writer.host, cluster.writer.port)) as proxy,
        Router(through(proxy, cluster), instances=[reader.address], probe_interval=0.05) as router,
    ):
        router.init_commit_table()
        cluster.wait_in_sync()
        filter_replication(cluster, reader, "aurora_router_commits")
        eventually(lambda: bool(router.topology.by_id[reader.address].unproven))
        with sessions(router, commit_check="table")() as s:
            s.execute(text("INSERT INTO logs VALUES (1)"))
            proxy.lose("COMMIT", answer=True)
            with pytest.raises(OutcomeUnknown) as caught:
                s.commit()
        cluster.wait_in_sync()
        cluster.kill(cluster.writer)
        cluster.promote(reader)
        assert caught.value.resolve(20.0) is Outcome.UNKNOWN
        assert cluster.execute("SELECT count(*) FROM logs") == [(1,)]
    cluster.stop()


@pytest.mark.engines("mariadb")
def test_a_reader_behind_a_filtered_reader_is_not_used(aurora_cluster_factory: Factory) -> None:
    """A reader whose source is a reader with a filtered log serves no session that has written."""
    cluster: Any = aurora_cluster_factory(readers=2)
    cluster.execute("CREATE DATABASE other")
    cluster.execute("CREATE TABLE other.x (id int PRIMARY KEY)")
    cluster.execute("GRANT ALL ON other.* TO app@'%'")
    cluster.wait_in_sync()
    between, last = cluster.readers
    cluster._settings = {"binlog_ignore_db": "other"}
    cluster.restart(between)
    cluster._follow(last, between)
    cluster._streams(last, 10)
    cluster.wait_in_sync()
    with Router(cluster.url, instances=[r.address for r in cluster.readers], probe_interval=0.05) as router:
        eventually(lambda: bool(router.topology.by_id[last.address].unproven))
        assert not router.topology.by_id[between.address].unproven
        assert last.address not in reads_its_own_writes(router, "other.x")
    cluster.stop()
