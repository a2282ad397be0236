"""The engines of local clusters, and small helpers of the tests of these clusters."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psycopg
import pymysql
import pytest

import aurora_router
from aurora_router.local import CLUSTERS, LocalInstance, MariadbCluster, MysqlCluster, PostgresCluster
from tests.engines import here

Cluster = PostgresCluster | MariadbCluster | MysqlCluster


@dataclass(frozen=True)
class Engine:
    """What differs between the engines, in what a client sees of a cluster."""

    make: Callable[..., Any]
    error: type[Exception]  # The driver's error for any fault of a connection.
    refused: str  # A part of its message for a wrong password.
    own_database: str
    data_directory: str
    wrong_setting: str
    impatient: Mapping[str, object] = field(default_factory=lambda: {"connect_timeout": 1})

    def __repr__(self) -> str:
        return str(self.make.__name__)


POSTGRES = Engine(
    make=PostgresCluster,
    error=psycopg.OperationalError,
    refused="password authentication failed",
    own_database="SELECT current_user::text, current_database()::text",
    data_directory="SHOW data_directory",
    wrong_setting="shared_buffers",
)
MARIADB = Engine(
    make=MariadbCluster,
    error=pymysql.err.OperationalError,
    refused="Access denied",
    own_database="SELECT substring_index(current_user(), '@', 1), database()",
    data_directory="SELECT @@datadir",
    wrong_setting="innodb_buffer_pool_size",
    impatient={"connect_timeout": 1, "read_timeout": 1},
)
MYSQL = replace(MARIADB, make=MysqlCluster, wrong_setting="gtid_mode")
ENGINES: Mapping[object, Engine] = {PostgresCluster: POSTGRES, MariadbCluster: MARIADB, MysqlCluster: MYSQL}
HERE = [ENGINES[CLUSTERS[name]] for name in here(*CLUSTERS)]

each_engine = pytest.mark.parametrize("engine", HERE, ids=repr)


def engine_of(cluster: Cluster) -> Engine:
    return ENGINES[type(cluster)]


def ask(connection: Any, query: str) -> Any:
    with connection.cursor() as cursor:
        cursor.execute(query)
        return cursor.fetchone()


def notes(cluster: Cluster, instance: LocalInstance | None = None) -> list[int]:
    return [row[0] for row in cluster.execute("SELECT id FROM note ORDER BY id", instance=instance)]


def wait(condition: Callable[[], object], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def processes_in(directory: str) -> list[int]:
    """Processes that work in the directory; a zombie works nowhere."""
    found = []
    for cwd in Path("/proc").glob("[0-9]*/cwd"):
        try:
            where = os.readlink(cwd)
        except OSError:
            continue
        if where.startswith(directory):
            found.append(int(cwd.parent.name))
    return found


def data_directory(cluster: Cluster) -> str:
    return str(Path(cluster.execute(engine_of(cluster).data_directory)[0][0]).parent)


def with_package() -> dict[str, str]:
    """An environment in which a child finds the package, installed or not."""
    root = str(Path(aurora_router.__file__).parents[1])
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))}
