"""The router of the tests of transactions, whose connections to the writer can be lost at any step."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from aurora_router import Router

MakeRouter = Callable[..., Router]


@pytest.fixture
def router(make: MakeRouter) -> Router:
    """A router of the whole cluster, with the writer behind the proxy."""
    return make()
