"""Let a job see what was written before it was sent: a token in the message's headers, and a causal scope in the worker.

    put_token(router, headers)            # where a message is sent
    with scope_of(router, headers): ...   # where it is worked on

How Celery's signals call them: docs/web.md.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any, Protocol

from aurora_router.router import Router
from aurora_router.unit import Past, Scope

HEADER = "aurora-router-token"


class Headers(Protocol):
    """A mapping, or anything else that has a mapping's get(), as Celery's `task.request`."""

    def get(self, key: str, /) -> Any: ...


def put_token(router: Router, headers: MutableMapping[str, Any]) -> None:
    """Put the token of the causal scopes that are open here into a message's headers.

    It puts nothing if nothing was written in them and no token given. It may ask the writer, as `scope.token` does. Uncommitted
    changes do not count.

    router: the Router whose scopes are open.
    headers: the headers of the message, a mapping.
    """
    token = router.current_token()
    if token is not None:
        headers[HEADER] = token


def scope_of(router: Router, headers: Headers) -> Scope:
    """Return a causal scope that begins with the token in a message's headers, if there is one: `with scope_of(router, headers):
    ...`.

    A token that does not count here (expired, malformed, of another cluster, not signed) is ignored, and a listener hears
    TokenIgnored.

    router: the Router whose sessions and connections are in the scope.
    headers: the headers of the message, or anything with a mapping's get().
    """
    token = headers.get(HEADER)
    return router.scope(Past() if token is None else router.told(token))
