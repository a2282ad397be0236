"""What the connections of a router call: the layer of the units gives it, and the layer of the pools knows nothing more of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from sqlalchemy.engine import Connection, ExceptionContext
from sqlalchemy.pool import PoolProxiedConnection


class ConnectionHooks(Protocol):
    """The interceptor of everything that passes between SQLAlchemy and the driver: see gate.Gate."""

    def before_waiting(self) -> None: ...

    def checked_out(self, raw: PoolProxiedConnection, /) -> None: ...

    def statement(self, cursor: Any, text: str, /, *rest: Any) -> None: ...

    def ends(self, raw: PoolProxiedConnection, /) -> bool:
        """Whether a rollback ends the unit of a connection, so nothing more is sent in the unit."""
        ...

    def failed(self, context: ExceptionContext, /) -> BaseException | None: ...

    def commit(self, raw: PoolProxiedConnection, send: Callable[[Any], None]) -> None: ...

    def commit_in_two_phases(self, connection: Connection, send: Callable[[], None], /) -> None: ...

    def set_options(self, connection: Connection, options: Mapping[str, Any], send: Callable[[], None], /) -> None: ...

    def rolled_back(self, raw: PoolProxiedConnection, /) -> None: ...

    def returned(self, unit: Any, instance: str, /) -> bool: ...
