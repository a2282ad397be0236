"""A cluster that gets another name while a router runs, and another cluster under the same names."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from sqlalchemy import text

from aurora_router import ConfigurationError, NoWriterAvailable, Router
from aurora_router.local import FaultProxy, LocalInstance
from aurora_router.local.cluster import Cluster
from aurora_router.router import core_of
from tests.integration.shop import eventually, place, sessions, until_readers_serve

Factory = Callable[..., Cluster[Any]]
Moved = tuple[Cluster[Any], Cluster[Any], list[FaultProxy]]


def insert(router: Router, number: int) -> None:
    with sessions(router)() as s:
        s.execute(text("INSERT INTO t VALUES (:n)"), {"n": number})
        s.commit()


def rows(cluster: Cluster[Any]) -> list[int]:
    return [number for (number,) in cluster.execute("SELECT id FROM t ORDER BY id")]


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


@pytest.mark.engines("mariadb")
@pytest.mark.parametrize("at", [0, 1], ids=["writer", "reader"])
def test_a_new_server_id_is_told_once(aurora_cluster_factory: Factory, caplog: pytest.LogCaptureFixture, at: int) -> None:
    """MariaDB's server_id tells one server from another. When it is set, the log says what that means, and what to do."""
    cluster = aurora_cluster_factory(readers=1)
    cluster.execute("CREATE TABLE t (id int PRIMARY KEY)")
    changed, readers = cluster.instances[at], [r.address for r in cluster.readers]
    with Router(cluster.url, instances=readers, pin_seconds=0.2, probe_interval=0.1) as router:
        until_readers_serve(router, 1)
        cluster.execute("SET GLOBAL server_id = 4242", instance=changed)
        eventually(lambda: any("If somebody has set server_id" in line for line in warnings(caplog)))
        for number in range(3):
            insert(router, number)
        (said,) = [line for line in warnings(caplog) if "server_id" in line]
        assert said.startswith(f"{changed.address}: one and the same connection")
    with Router(cluster.url, instances=readers) as router, sessions(router)() as s:
        until_readers_serve(router, 1)
        s.execute(text("INSERT INTO t VALUES (9)"))
        s.commit()
        eventually(lambda: all(instance.position is not None for instance in router.topology))


@pytest.mark.engines("mariadb")
def test_a_new_gtid_domain_is_no_other_cluster(aurora_cluster_factory: Factory, caplog: pytest.LogCaptureFixture) -> None:
    """Known servers keep their roles when their GTID domain changes, and a later failover works."""
    cluster = aurora_cluster_factory(readers=2)
    cluster.execute("CREATE TABLE t (id int PRIMARY KEY)")
    cluster.wait_in_sync()
    with Router(cluster.url, instances=[r.address for r in cluster.readers], probe_interval=0.05) as router:
        until_readers_serve(router, 2)
        open_one = router.connect()
        open_one.execute(text("INSERT INTO t VALUES (0)"))

        def renamed(instance: LocalInstance) -> bool:
            found = router.topology.by_id[instance.address]
            return found.healthy and {server.cluster for server in found.servers} == {"mariadb-42"}

        for instance in (*cluster.readers, cluster.writer):
            cluster._order(instance, "SET GLOBAL gtid_domain_id = 42")  # type: ignore[attr-defined]
            eventually(lambda instance=instance: renamed(instance))
        assert router.topology.cluster == "mariadb-42"
        open_one.commit()
        open_one.close()
        insert(router, 1)
        with sessions(router)() as s:
            s.scalar(text("SELECT count(*) FROM t"))
            assert place(s) == "reader"
        cluster.wait_in_sync()
        cluster.kill(cluster.writer)
        cluster.promote()
        insert(router, 2)
        assert rows(cluster) == [0, 1, 2]
    assert [line for line in warnings(caplog) if "mariadb-0 is called mariadb-42 now" in line]
    assert not any(instance.pooled for instance in core_of(router).monitor.topology)
    cluster.stop()


@pytest.fixture(scope="module")
def clusters(aurora_cluster_factory: Factory) -> Iterator[list[Cluster[Any]]]:
    """Two clusters that have a table of the same name and accept one password."""
    with ExitStack() as stack:
        found = []
        for _ in range(2):
            found.append(cluster := aurora_cluster_factory(readers=1))
            stack.callback(cluster.stop)
            cluster.execute("CREATE TABLE t (id int PRIMARY KEY)")
            cluster.execute("GRANT ALL ON t TO app")
            cluster.execute(f"ALTER ROLE app PASSWORD '{found[0].app_password}'")
        yield found


@pytest.fixture
def moved(clusters: list[Cluster[Any]]) -> Iterator[Moved]:
    """Both clusters, with empty tables, and a proxy as the name of each instance of the first one."""
    old, other = clusters
    for cluster in clusters:
        cluster.execute("TRUNCATE t")
        cluster.wait_in_sync()
    with ExitStack() as stack:
        yield old, other, [stack.enter_context(FaultProxy((i.host, i.port))) for i in old.instances]


def names(moved: Moved, **options: Any) -> Router:
    old, _, (writer, reader) = moved
    url = old.url.replace(old.writer.address, writer.address)
    return Router(url, instances=[reader.address], probe_interval=0.05, **options)


def lead(name: FaultProxy, instance: LocalInstance) -> None:
    """Make a name lead to that instance, and cut the connections to the one before."""
    name.retarget((instance.host, instance.port))
    name.reset_all()


def test_no_name_that_leads_elsewhere_gets_writes(moved: Moved, caplog: pytest.LogCaptureFixture) -> None:
    """A cluster behind only one of the names is never written to, although accept_new_cluster is set."""
    old, other, (writer, _) = moved
    with names(moved, accept_new_cluster=True, failover_timeout=1.0) as router:
        until_readers_serve(router, 1)
        insert(router, 1)
        lead(writer, other.writer)
        eventually(lambda: router.topology.by_id[writer.address].foreign_cluster)
        with pytest.raises(NoWriterAvailable, match=r"belongs to another cluster .*check where its name leads"):
            insert(router, 2)
        assert not router.topology.by_id[writer.address].healthy
        eventually(lambda: any("belongs to another cluster" in line and "check where" in line for line in warnings(caplog)))
        lead(writer, old.writer)
        eventually(lambda: router.topology.writer)
        insert(router, 3)
    assert (rows(old), rows(other)) == ([1, 3], [])


@pytest.mark.parametrize("accepted", [False, True])
def test_a_cluster_made_anew_is_used_where_that_is_accepted(
    moved: Moved, caplog: pytest.LogCaptureFixture, accepted: bool
) -> None:
    """A cluster behind all names replaces the old one if that is accepted. Otherwise the error says what to do."""
    old, other, proxies = moved
    with names(moved, accept_new_cluster=accepted) as router:
        until_readers_serve(router, 1)
        insert(router, 1)
        before = router.topology.cluster
        for name, instance in zip(proxies, other.instances, strict=True):
            lead(name, instance)
        if accepted:
            eventually(lambda: router.topology.cluster not in (before, None))
            until_readers_serve(router, 1)
            insert(router, 2)
            eventually(lambda: any("was replaced by" in line for line in warnings(caplog)))
        else:
            eventually(lambda: router.topology.successor)
            with pytest.raises(ConfigurationError, match="set accept_new_cluster=True or start this process again"):
                insert(router, 2)
    assert (rows(old), rows(other)) == ([1], [2] if accepted else [])
