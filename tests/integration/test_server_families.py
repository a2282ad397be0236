"""Real servers are asked of which family they are."""

from __future__ import annotations

import types
from collections.abc import Callable

import pytest

from aurora_router import Router
from aurora_router.router import core_of
from aurora_router.servers import FAMILIES, usual
from tests.integration.shop import BOTH, until_readers_serve

pytestmark = BOTH


@pytest.mark.parametrize("is_theirs", [True, False])
def test_a_server_says_of_which_family_it_is(
    make_router: Callable[..., Router], monkeypatch: pytest.MonkeyPatch, is_theirs: bool
) -> None:
    """All servers answer the question, and the module that knows the answer is asked for everything else."""
    router = make_router()
    protocol = core_of(router).interceptor.driver.PROTOCOL
    own = usual(protocol)
    first = types.ModuleType("first")
    vars(first).update(vars(own))
    if not is_theirs:
        vars(first)["recognizes"] = lambda row: not own.recognizes(row)
    monkeypatch.setitem(FAMILIES, protocol, [first, own])
    until_readers_serve(router, 2)
    found = {core_of(router).interceptor.families.at(instance.id) for instance in router.topology}
    assert found == {first if is_theirs else own}
    with router.connect() as connection:
        assert connection.exec_driver_sql("SELECT 42").scalar_one() == 42
