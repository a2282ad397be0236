"""What a user sees of a Router."""

from __future__ import annotations

from aurora_router import Router

SHOWN = {
    *("add_instance", "attempts", "begin", "causal_scope", "close", "connect", "current_token", "engine", "explain"),
    *("init_commit_table", "raw_connection", "remove_instance", "run_transaction", "start", "started", "stats"),
    *("topology", "transactional"),
}


def test_a_router_shows_its_public_methods_and_nothing_else() -> None:
    """Completion in an editor or a shell lists what users may call, and no part of the router."""
    with Router("postgresql+psycopg://db-1/shop") as router:
        assert {name for name in dir(router) if not name.startswith("_")} == SHOWN
