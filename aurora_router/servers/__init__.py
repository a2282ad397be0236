"""One module per server family: its SQL, and how its rows and error codes read. How Python talks to it is in `drivers`.

Other modules send the questions.
"""

from __future__ import annotations

from typing import Final

from aurora_router.core.query import Query
from aurora_router.servers import mysql, postgresql
from aurora_router.servers.base import (
    Execute,
    Identification,
    Pooler,
    ServerFamily,
    UnsupportedServer,
    XidFamily,
    supports_xid_status,
)

__all__ = [
    "FAMILIES",
    "WHO",
    "Execute",
    "Identification",
    "Pooler",
    "ServerFamily",
    "UnsupportedServer",
    "XidFamily",
    "recognize",
    "supports_xid_status",
    "usual",
]

FAMILIES: Final[dict[str, list[ServerFamily]]] = {"postgresql": [postgresql], "mysql": [mysql]}
"""By a driver's `PROTOCOL`. The last family of a list is the usual one: it takes the servers that no other one knows."""
WHO: Final = {
    "postgresql": f"""{postgresql.AT_READ_COMMITTED}
SELECT pg_catalog.version(), pg_catalog.to_regproc('pg_catalog.aurora_version') IS NOT NULL""",
    "mysql": "SELECT @@version, @@version_comment",
}
"""By a driver's `PROTOCOL`: asks a server what it is. All servers of the protocol answer with one row."""


def usual(protocol: str) -> ServerFamily:
    """The family that most servers of a protocol are of."""
    return FAMILIES[protocol][-1]


def recognize(protocol: str, query: Query) -> ServerFamily:
    """Find out by asking of which family a server is. Nothing is asked if the protocol has one family only.

    Raises whatever `query` raises.
    """
    *others, family = FAMILIES[protocol]
    if others:
        _, (row,) = query(WHO[protocol])
        family = next((other for other in others if other.is_said_by(row)), family)
    return family
