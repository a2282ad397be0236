"""What a user sees of a Router."""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy.exc import DBAPIError

from aurora_router import Router
from tests.fakes.cluster import FakeCluster
from tests.fakes.driver import Dialect, installed
from tests.stories import READ

SHOWN = {
    *("add_instance", "attempts", "begin", "causal_scope", "close", "connect", "current_token", "engine", "explain"),
    *("init_commit_table", "raw_connection", "remove_instance", "run_transaction", "start", "started", "stats"),
    *("topology", "transactional"),
}


def test_a_router_shows_its_public_methods_and_nothing_else() -> None:
    """Completion in an editor or a shell lists what users may call, and no part of the router."""
    with Router("postgresql+psycopg://db-1/shop") as router:
        assert {name for name in dir(router) if not name.startswith("_")} == SHOWN


def test_a_connection_of_the_routers_engine_reconnects() -> None:
    """A connection that was taken from `router.engine()` behaves as on any engine: after a rollback it connects anew."""
    cluster = FakeCluster(readers=1)
    with installed(cluster), Router("postgresql+fakepg://app@db-1/shop", instances=["db-2"]) as router:
        writer = router.topology.writer
        assert writer is not None
        with router.engine(writer).connect() as connection:
            before = connection.scalar(READ)
            cluster.drop_connections(cluster.writer)
            with pytest.raises(DBAPIError):
                connection.scalar(READ)
            connection.rollback()
            assert connection.scalar(READ) == before


@pytest.mark.parametrize(("probe_timeout", "connect_timeout"), [(0.3, 2), (1.0, 2), (4.2, 5)])
def test_a_probe_may_take_its_time_to_connect(
    monkeypatch: pytest.MonkeyPatch, probe_timeout: float, connect_timeout: int
) -> None:
    """The timeout of a probe is also that of its connect, because a login may take most of the time."""
    timeouts = []
    dial = Dialect.dial

    def dial_and_note(**options: Any) -> Any:
        timeouts.append(options["connect_timeout"])
        return dial(**options)

    with installed(FakeCluster(readers=1)):
        monkeypatch.setattr(Dialect, "dial", dial_and_note)
        with Router("postgresql+fakepg://app@db-1/shop", probe_timeout=probe_timeout) as router:
            router.start()
    assert timeouts == [connect_timeout]
