"""Tests of pure code against real servers of MySQL and MariaDB. They run only if an environment variable names such servers.

AURORA_ROUTER_SERVERS is `mysql=<socket> mariadb=<socket>`, one or both. Nobody may need these servers, and root must be allowed
to do anything there without a password. MariaDB's needs its binary log. Without the variable nothing here is collected.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest

SERVERS = dict(pair.split("=", 1) for pair in os.environ.get("AURORA_ROUTER_SERVERS", "").split())
collect_ignore_glob = [] if SERVERS else ["test_*.py"]


def connected(family: str, **options: Any) -> Any:
    """A PyMySQL connection to the server of that family."""
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
    """A function that asks MySQL, and returns the first value of the first row."""
    yield from asking("mysql")


@pytest.fixture(scope="module")
def mariadb() -> Iterator[Callable[..., Any]]:
    """A function that asks MariaDB, and returns the first value of the first row."""
    yield from asking("mariadb")
