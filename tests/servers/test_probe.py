"""The monitor's questions, put to real servers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from aurora_router.core.gtid import GtidSet, MariadbGtid
from aurora_router.core.instance import Role
from aurora_router.servers import mysql
from tests.servers.conftest import connected


@pytest.mark.parametrize(("family", "kind"), [("mysql", GtidSet), ("mariadb", MariadbGtid)])
def test_a_server_says_who_and_how_far_it_is(family: str, kind: type, monkeypatch: pytest.MonkeyPatch) -> None:
    with connected(family) as connection, connection.cursor() as cursor:

        def ask(sql: str) -> tuple[Sequence[str], Sequence[Sequence[Any]]]:
            cursor.execute(sql, ())
            return ([column[0] for column in cursor.description], cursor.fetchall()) if cursor.description else ((), ())

        _, ((version,),) = ask("SELECT @@version")
        # An npm package brings MySQL 5.6, which has its status in another schema and knows no groups.
        if version.startswith("5.6."):
            monkeypatch.setattr(mysql, "MIN_MYSQL_VERSION", (5, 6))
            for question in ("IDENTITY", "PROBE"):
                old = getattr(mysql, question).replace(f"({mysql._GROUP})", "NULL")
                old = old.replace(f"({mysql._OPENED})", "NULL").replace("80000", "50600")
                old = old.replace("performance_schema.", "information_schema.").replace("transaction_isolation", "tx_isolation")
                monkeypatch.setattr(mysql, question, old)
        identity, role, _ = mysql.identify(ask, 0, None)
        server = mysql.probe(ask, asynchronous_commits=False)
        assert (server.id, server.role, role) == (identity, Role.WRITER, Role.WRITER)
        assert server.isolation == "repeatable read"
        assert server.position is None or isinstance(server.position, kind)
        assert isinstance(mysql.parse_functions(ask(mysql.FUNCTIONS)[1]), frozenset)
