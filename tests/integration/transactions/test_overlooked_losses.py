"""A connection whose loss the driver or SQLAlchemy overlooks counts as lost, and nobody uses it again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import psycopg
import pytest
from sqlalchemy import text
from sqlalchemy.engine import Connection
from sqlalchemy.exc import DBAPIError

from aurora_router import Router, classify_error
from aurora_router.local import FaultProxy, PostgresCluster
from aurora_router.router import core_of
from tests.integration.shop import RAISE, no_connection_is_left, raise_stock, sessions, stock, through

MakeRouter = Callable[..., Router]


def test_a_loss_in_sqlalchemys_initialize_is_a_lost_connection(
    cluster: PostgresCluster, proxy: FaultProxy, make_router: MakeRouter
) -> None:
    """A connection that is lost while SQLAlchemy initializes its dialect is a lost connection."""
    router = make_router(through(proxy, cluster))
    dialect = core_of(router).writer_engine().dialect
    look, looks = dialect.initialize, []

    def initialize(connection: Connection) -> None:
        look(connection)
        looks.append(connection.scalar(text("SELECT 1")))
        if len(looks) == 1:
            proxy.reset_all()

    dialect.initialize = initialize  # type: ignore[method-assign]
    with router.connect() as connection:
        assert connection.scalar(text("SELECT 1")) == 1
    assert looks == [1, 1]


@pytest.mark.parametrize("committed", [True, False])
def test_a_reset_that_psycopg_overlooks_is_a_lost_connection(
    cluster: PostgresCluster, router: Router, monkeypatch: pytest.MonkeyPatch, committed: bool
) -> None:
    """A reset that the driver reports without marking its connection as closed is a lost connection.

    If the kernel reports a reset a moment before it can be read, psycopg goes on calling its connection usable.
    """
    commit = psycopg.Connection.commit
    left = ["one"]

    def reset(connection: psycopg.Connection[Any]) -> None:
        if committed or not left:
            commit(connection)
        if left:
            left.clear()
            raise psycopg.OperationalError("connection socket closed")

    monkeypatch.setattr(psycopg.Connection, "commit", reset)
    assert router.run_transaction(sessions(router), raise_stock) == 11
    assert stock(cluster) == 11
    assert no_connection_is_left(router)


def test_a_connection_with_a_closed_socket_is_not_reused(router: Router, monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection whose socket the driver found closed is not used again."""
    wait = psycopg.Connection.wait

    def reset(connection: psycopg.Connection[Any], *args: Any, **kwargs: Any) -> Any:
        monkeypatch.setattr(psycopg.Connection, "wait", wait)
        raise psycopg.OperationalError("connection socket closed")

    with router.connect() as connection:
        lost = connection.connection.driver_connection
        monkeypatch.setattr(psycopg.Connection, "wait", reset)
        with pytest.raises(DBAPIError) as caught:
            connection.execute(RAISE)
        assert caught.value.connection_invalidated
        assert classify_error(caught.value).safe_to_repeat
        assert lost is not None
        assert lost.closed
    assert no_connection_is_left(router)
