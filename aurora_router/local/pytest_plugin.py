"""Fixtures for the tests of a service that must survive a failover: a real cluster, healed before each test.

Opt in from the `conftest.py` at the root of your tests, with `pytest_plugins = ["aurora_router.local.pytest_plugin"]`.
Until a test asks for a fixture, nothing but pytest is imported and no server is started.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from aurora_router.local.cluster import Cluster

__all__ = ["aurora_cluster", "aurora_cluster_factory", "aurora_cluster_of_session", "aurora_engine"]


@pytest.fixture(scope="session")
def aurora_engine() -> str:
    """Return the engine, "postgresql". For "mariadb" or "mysql", override this fixture, with session scope, and return that."""
    return "postgresql"


@pytest.fixture(scope="session")
def aurora_cluster_factory(aurora_engine: str) -> Iterator[Callable[..., Cluster[Any]]]:
    """Start clusters with parameters of your own (those of `PostgresCluster`). They are stopped when the session ends."""
    from aurora_router.local import CLUSTERS

    with ExitStack() as stack:
        yield lambda *args, **options: stack.enter_context(CLUSTERS[aurora_engine](*args, **options))


@pytest.fixture(scope="session")
def aurora_cluster_of_session(aurora_cluster_factory: Callable[..., Cluster[Any]]) -> Cluster[Any]:
    """Return the cluster behind `aurora_cluster`, as the last test left it, for session-scoped fixtures that load data."""
    return aurora_cluster_factory(readers=2)


@pytest.fixture
def aurora_cluster(aurora_cluster_of_session: Cluster[Any]) -> Cluster[Any]:
    """Return a writer and two readers, shared by the session and healed before each test: all run, stream, and are in sync.

    The writer and the rows in the tables are as earlier tests left them.
    """
    aurora_cluster_of_session.heal()
    return aurora_cluster_of_session
