"""Use a whole cluster of Aurora, PostgreSQL, MySQL or MariaDB as if it were one database."""

from aurora_router.cluster.error_classification import classify_error
from aurora_router.core.failures import Facts, Failure
from aurora_router.core.instance import Instance, Role
from aurora_router.core.selection import Decision, Need, Reason
from aurora_router.core.sql.analysis import Effect, classify
from aurora_router.core.topology import Topology
from aurora_router.errors import (
    AmbiguousWriter,
    ConfigurationError,
    NoReaderAvailable,
    NoWriterAvailable,
    Outcome,
    OutcomeUnknown,
    ReadOnlyViolation,
    RouterError,
    StaleRead,
    WrongServer,
)
from aurora_router.router import Router
from aurora_router.routing.token_signing import merge_tokens
from aurora_router.session import RoutingMixin, RoutingSession
from aurora_router.telemetry.stats import InstanceStats, RouterStats

__version__ = "0.1.0"

__all__ = [
    "AmbiguousWriter",
    "ConfigurationError",
    "Decision",
    "Effect",
    "Facts",
    "Failure",
    "Instance",
    "InstanceStats",
    "Need",
    "NoReaderAvailable",
    "NoWriterAvailable",
    "Outcome",
    "OutcomeUnknown",
    "ReadOnlyViolation",
    "Reason",
    "Role",
    "Router",
    "RouterError",
    "RouterStats",
    "RoutingMixin",
    "RoutingSession",
    "StaleRead",
    "Topology",
    "WrongServer",
    "__version__",
    "classify",
    "classify_error",
    "merge_tokens",
]
