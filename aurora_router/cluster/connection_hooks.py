"""The functions that a router's connections call. `routing` implements them, and `cluster` knows nothing else of `routing`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from sqlalchemy.engine import Connection, ExceptionContext
from sqlalchemy.pool import PoolProxiedConnection

from aurora_router.cluster.connection_state import ConnectionState


class ConnectionHooks(Protocol):
    """The interceptor of everything that passes between SQLAlchemy and the driver: see interceptor.Interceptor."""

    def before_waiting(self) -> None: ...

    def on_checkout(self, raw: PoolProxiedConnection, /) -> None: ...

    def before_execute(self, cursor: Any, text: str, /, *rest: Any) -> None: ...

    def ends_with_rollback(self, raw: PoolProxiedConnection, /) -> bool:
        """Return whether a rollback ends the unit of a connection. If so, nothing more is sent in the unit."""
        ...

    def on_error(self, context: ExceptionContext, /) -> BaseException | None: ...

    def commit(self, raw: PoolProxiedConnection, send: Callable[[Any], None]) -> None: ...

    def commit_in_two_phases(self, connection: Connection, send: Callable[[], None], /) -> None: ...

    def set_options(self, connection: Connection, options: Mapping[str, Any], send: Callable[[], None], /) -> None: ...

    def on_rollback(self, raw: PoolProxiedConnection, /) -> None: ...

    def on_release(self, state: ConnectionState, instance: str, /) -> bool:
        """Note that the unit of a connection has released it. Return whether the connection must be closed."""
        ...
