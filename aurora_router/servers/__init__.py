"""One module per server family: its SQL, and what its rows and error codes mean. `drivers` says how Python talks to a server.

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
"""The families, by a driver's `PROTOCOL`. The last of a list is the usual one: it takes the servers that no other recognizes."""
WHO: Final = {
    "postgresql": f"""{postgresql.AT_READ_COMMITTED}
SELECT pg_catalog.version(), pg_catalog.to_regproc('pg_catalog.aurora_version') IS NOT NULL""",
    "mysql": "SELECT @@version, @@version_comment",
}
"""The SQL that asks a server what it is, by a driver's `PROTOCOL`. All servers of the protocol answer with one row."""


def usual(protocol: str) -> ServerFamily:
    """Return the family of most servers of a protocol."""
    return FAMILIES[protocol][-1]


def recognize(protocol: str, query: Query) -> ServerFamily:
    """Return the family of a server. Ask the server, unless the protocol has only one family.

    Raises the errors of `query`.
    """
    *others, family = FAMILIES[protocol]
    if others:
        _, (row,) = query(WHO[protocol])
        family = next((other for other in others if other.recognizes(row)), family)
    return family
