"""Local clusters of real servers, and faults for them: for demos and for tests, this library's and its users'."""

from aurora_router.local.cluster import LocalInstance
from aurora_router.local.mariadb import MariadbCluster
from aurora_router.local.postgres import PostgresCluster
from aurora_router.local.proxy import FaultProxy
from aurora_router.local.system import LocalClusterError

__all__ = ["FaultProxy", "LocalClusterError", "LocalInstance", "MariadbCluster", "PostgresCluster"]
