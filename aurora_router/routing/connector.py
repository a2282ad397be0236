"""How a unit gets a connection from an engine: the way of a session, of a Connection, or of the driver's own connection."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeAlias, TypeVar

from sqlalchemy.engine import Engine
from sqlalchemy.pool import PoolProxiedConnection

from aurora_router.core.selection import Reason

T = TypeVar("T")

Judge: TypeAlias = Callable[[Engine, bool], Reason | None]
"""Why the statement for which a unit enters must be on the writer, as that engine would send it; None if it may be a read.

The second argument says whether to find out at any price.
"""


class Connector(Protocol[T]):
    """How a unit gets a connection from an engine."""

    @property
    def judge(self) -> Judge | None: ...

    def connect(self, engine: Engine) -> T: ...

    def pool_connection(self, connection: T) -> PoolProxiedConnection:
        """The pool's connection inside the result of connect()."""
        ...

    def discard(self, connection: T) -> None:
        """Discard the connection."""
        ...
