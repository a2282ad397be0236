"""Local clusters of real servers, and faults for them. They serve demos and tests, this library's and its users'."""

from collections.abc import Mapping
from typing import Any, Final

from aurora_router.local.cluster import Cluster, LocalInstance
from aurora_router.local.mariadb import MariadbCluster
from aurora_router.local.mysql import MysqlCluster
from aurora_router.local.postgres import PostgresCluster
from aurora_router.local.proxy import FaultProxy
from aurora_router.local.system import LocalClusterError

__all__ = ["CLUSTERS", "FaultProxy", "LocalClusterError", "LocalInstance", "MariadbCluster", "MysqlCluster", "PostgresCluster"]

CLUSTERS: Final[Mapping[str, type[Cluster[Any]]]] = {
    "postgresql": PostgresCluster,
    "mariadb": MariadbCluster,
    "mysql": MysqlCluster,
}
"""The cluster of each engine, by the first word of its URL."""
