"""What is decided purely, against real servers of MySQL and MariaDB: only where somebody names some.

AURORA_ROUTER_SERVERS: `mysql=<socket> mariadb=<socket>`, one or both, of servers that root may do anything to without a
password, and that nobody needs. MariaDB's needs its binary log. Nothing here is collected without.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest

SERVERS = dict(pair.split("=", 1) for pair in os.environ.get("AURORA_ROUTER_SERVERS", "").split())
collect_ignore_glob = [] if SERVERS else ["test_*.py"]


def connected(family: str, **options: Any) -> Any:
    """A connection of PyMySQL to the server of that family."""
    import pymysql

    if family not in SERVERS:
        pytest.skip(f"no server of {family} is named")
    return pymysql.connect(unix_socket=SERVERS[family], user="root", autocommit=True, **options)


def asking(family: str) -> Iterator[Callable[..., Any]]:
    with connected(family) as connection, connection.cursor() as cursor:

        def ask(sql: str, *values: Any) -> Any:
            cursor.execute(sql, values)
            row = cursor.fetchone()
            return row[0] if row else None

        yield ask


@pytest.fixture(scope="module")
def mysql() -> Iterator[Callable[..., Any]]:
    """Asks MySQL: the first value of the first row."""
    yield from asking("mysql")


@pytest.fixture(scope="module")
def mariadb() -> Iterator[Callable[..., Any]]:
    """Asks MariaDB: the first value of the first row."""
    yield from asking("mariadb")
