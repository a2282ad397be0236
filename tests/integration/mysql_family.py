"""What tests that are particular to MySQL and MariaDB share: statements for either, functions, and deadlocks."""

from __future__ import annotations

import threading
import time
from typing import Any

from sqlalchemy import update

from aurora_router import RoutingSession
from aurora_router.local.cluster import Cluster
from tests.integration.shop import Item, engine, eventually

Family = Cluster[Any]


def on(cluster: Family, *statements: str, instance: Any = None) -> None:
    for statement in statements:
        cluster.execute(statement, instance=instance)


def make_function(cluster: Family, name: str, rest: str) -> None:
    """Make a function, or replace the one of that name."""
    on(cluster, f"DROP FUNCTION IF EXISTS {name}", f"CREATE FUNCTION {name}() {rest}")


def replica(cluster: Family) -> str:
    """The word for a reader in statements."""
    return "SLAVE" if engine(cluster) == "mariadb" else "REPLICA"


NUMBERS = "WITH RECURSIVE n AS (SELECT {0} AS id UNION ALL SELECT id + 1 FROM n WHERE id < {1})"


def deadlock(cluster: Cluster[Any], s: RoutingSession, *first: str) -> None:
    """Make this unit, which has locked item 1, the victim of another unit that has written more.

    first: statements that the other unit sends before the rest. InnoDB never chooses the only unit that has written to a
        table without transactions.
    """
    with cluster.writer.connect(autocommit=False) as other, other.cursor() as cursor:
        for statement in first:
            cursor.execute(statement)
        cursor.execute(f"INSERT INTO part (id) {NUMBERS.format(100, 400)} SELECT id FROM n")
        cursor.execute("UPDATE item SET stock = stock WHERE id = 2")
        waits = threading.Thread(target=lambda: cursor.execute("UPDATE item SET stock = stock WHERE id = 1"))
        waits.start()
        blocked = "SELECT count(*) FROM information_schema.innodb_trx WHERE trx_state = 'LOCK WAIT'"

        def is_blocked() -> bool:
            # InnoDB gives the same answer again if it is asked within 0.1 s.
            time.sleep(0.15)
            return cluster.execute(blocked) == [(1,)]

        eventually(is_blocked)
        try:
            s.execute(update(Item).where(Item.id == 2).values(stock=0))
        finally:
            waits.join(20)
            other.rollback()
