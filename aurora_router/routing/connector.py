"""How a unit gets a connection from an engine: for a session, as a Connection, or as the driver's own connection."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeAlias, TypeVar

from sqlalchemy.engine import Engine
from sqlalchemy.pool import PoolProxiedConnection

from aurora_router.core.selection import Reason

T = TypeVar("T")

Judge: TypeAlias = Callable[[Engine, bool], Reason | None]
"""Tells why the statement of a connecting unit must be on the writer; None if the statement may be a read.

The first argument is the engine that would send the statement. The second one says whether to compile the statement if no
compiled form of it is known.
"""


class Connector(Protocol[T]):
    """How a unit gets a connection from an engine."""

    @property
    def judge(self) -> Judge | None: ...

    def connect(self, engine: Engine) -> T: ...

    def pool_connection(self, connection: T) -> PoolProxiedConnection:
        """Return the pool's connection inside the result of connect()."""
        ...

    def discard(self, connection: T) -> None:
        """Discard the connection."""
        ...
