"""Let a job see all that was written before the job was sent.

The message carries a token in its headers, and the worker opens a causal scope with it.

    put_token(router, headers)            # where a message is sent
    with scope_of(router, headers): ...   # where it is worked on

How Celery's signals call them: docs/web.md.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any, Protocol

from aurora_router.router import Router, core_of
from aurora_router.routing.causal_context import CausalContext, Scope

__all__ = ["HEADER", "Headers", "put_token", "scope_of"]

HEADER = "aurora-router-token"


class Headers(Protocol):
    """A mapping, or anything else with a mapping's get(), such as Celery's `task.request`."""

    def get(self, key: str, /) -> Any: ...


def put_token(router: Router, headers: MutableMapping[str, Any]) -> None:
    """Put the token of the causal scopes that are open here into a message's headers.

    It puts nothing if nothing was written in the scopes and they began without a token. It may send a query to the writer, as
    `scope.token` does. Uncommitted changes do not count.

    router: the Router whose scopes are open.
    headers: the headers of the message, a mapping.
    """
    token = router.current_token()
    if token is not None:
        headers[HEADER] = token


def scope_of(router: Router, headers: Headers) -> Scope:
    """Return a causal scope that begins with the token in a message's headers, if there is one.

    Use it as a block: `with scope_of(router, headers): ...`.

    A token that does not count here (expired, malformed, of another cluster, not signed) is ignored, and listeners get
    TokenIgnored.

    router: the Router whose sessions and connections are in the scope.
    headers: the headers of the message, or anything with a mapping's get().
    """
    token = headers.get(HEADER)
    tokens = core_of(router).tokens
    return tokens.new_scope(CausalContext() if token is None else tokens.context_from_untrusted_token(token))
