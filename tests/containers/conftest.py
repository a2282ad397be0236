"""The contract tests run on every kind of cluster that this machine can have: local ones, and containers if Docker runs.

Tests of other kinds are not collected. A line at the end of the output names each missing kind and the reason.
"""

from __future__ import annotations

import gc
import os
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import pytest

# Ryuk removes the containers that a killed test run has left, but it needs one more image. A test run that ends, even by Ctrl-C,
# removes its own containers.
os.environ.setdefault("TESTCONTAINERS_RYUK_DISABLED", "true")

import docker
from docker.errors import APIError, DockerException, ImageNotFound

from aurora_router import Router
from aurora_router.local import CLUSTERS as LOCAL
from tests.containers.cluster import LOSSES, ContainerCluster
from tests.containers.mysql import MariadbContainers, Mysql80Containers, Mysql97Containers, MysqlContainers
from tests.containers.postgresql import PostgresContainers
from tests.engines import LEFT_OUT, here

CLUSTERS: dict[str, type[Any]] = {f"local-{engine}": LOCAL[engine] for engine in here(*LOCAL)}


def unavailable(client: docker.DockerClient, cluster: type[ContainerCluster]) -> str:
    """The reason why there can be no such cluster, or an empty text."""
    try:
        client.images.get(cluster.image)
    except ImageNotFound:
        try:
            client.images.pull(cluster.image)
        except (DockerException, OSError) as error:
            why = error.explanation if isinstance(error, APIError) else error
            return f"the image is not here and cannot be pulled: {why}"
    return ""


def look_for_containers() -> None:
    if not sys.platform.startswith("linux"):
        LEFT_OUT["containers"] = "their addresses can be reached on Linux only"
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        client = None
        try:
            client = docker.from_env(timeout=60)
        except DockerException as error:
            LEFT_OUT["containers"] = f"no Docker engine answers: {error}"
        if client is None:
            gc.collect()  # the client leaves its unconnected socket open
            return
    with client.api:
        for cluster in (PostgresContainers, MariadbContainers, Mysql80Containers, MysqlContainers, Mysql97Containers):
            if why := unavailable(client, cluster):
                LEFT_OUT[cluster.image] = why
            else:
                CLUSTERS[cluster.image] = cluster


look_for_containers()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test that loses the writer for each loss that the kind of cluster knows."""
    if "loss" in metafunc.fixturenames:
        pairs = [(kind, loss) for kind, cluster in CLUSTERS.items() for loss in LOSSES if hasattr(cluster, loss)]
        metafunc.parametrize(("kind", "loss"), pairs, scope="session")
    elif "kind" in metafunc.fixturenames:
        metafunc.parametrize("kind", list(CLUSTERS), scope="session")


@pytest.fixture(scope="session")
def cluster_of_kind(kind: str) -> Iterator[Any]:
    with CLUSTERS[kind]() as cluster:
        cluster.execute("CREATE TABLE item (id bigint PRIMARY KEY, name varchar(9) NOT NULL DEFAULT '', stock int NOT NULL)")
        yield cluster


@pytest.fixture
def cluster(cluster_of_kind: Any) -> Any:
    """A whole cluster of a writer and two readers, all of which have one item, 10 in stock."""
    cluster_of_kind.heal()
    cluster_of_kind.execute("TRUNCATE TABLE item")
    cluster_of_kind.execute("INSERT INTO item VALUES (1, 'one', 10)")
    cluster_of_kind.wait_in_sync()
    return cluster_of_kind


@pytest.fixture
def router(cluster: Any) -> Iterator[Router]:
    """A router of the whole cluster that notices faults quickly."""
    readers = [reader.address for reader in cluster.readers]
    with Router(cluster.url, instances=readers, probe_interval=0.2, probe_timeout=0.5) as router:
        yield router
