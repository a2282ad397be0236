"""Commits after which the next transaction is open already are counted on a connection that the user has."""

import types

import psycopg
import pytest

from aurora_router.drivers import psycopg as psycopg_driver
from aurora_router.drivers import psycopg_classes

IDLE, OPEN = 0, 2


@pytest.mark.parametrize(
    ("status", "commands", "ends"),
    [
        (OPEN, [b"INSERT", b"COMMIT"], 1),
        (OPEN, [b"SELECT 1"], 0),
        (IDLE, [b"COMMIT"], 0),
        (OPEN, [b"PREPARE TRANSACTION"], 1),
    ],
)
def test_a_commit_that_begins_the_next_is_counted(monkeypatch, status, commands, ends):
    """A COMMIT that leaves no transaction open is counted elsewhere."""
    monkeypatch.setattr(psycopg.Cursor, "_set_results", lambda *_: None)
    cursor = psycopg_classes.CountingCursor.__new__(psycopg_classes.CountingCursor)
    cursor._pgconn = types.SimpleNamespace(transaction_status=status)
    cursor._conn = types.SimpleNamespace(wait=types.SimpleNamespace(ends=0))
    cursor._set_results([types.SimpleNamespace(command_status=command) for command in commands])
    assert cursor._conn.wait.ends == ends


class Handed:
    """A psycopg connection with the router's own cursors."""

    cursor_factory = psycopg_classes.Cursor
    pgconn = types.SimpleNamespace(transaction_status=IDLE)

    def wait(self, steps):
        return steps


def test_a_connection_that_is_handed_out_counts():
    """From then on the cursors count, too."""
    connection = Handed()
    ends = psycopg_driver.count_ends(connection)
    assert connection.cursor_factory is psycopg_classes.CountingCursor
    connection.wait(None)
    assert ends() == 1
