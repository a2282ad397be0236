"""Join connections to a session's transaction, and take them out of it.

Only this module touches private attributes of SQLAlchemy's transactions. They are the same in 2.0 and 2.1. Tests on both
versions make sure of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from sqlalchemy.engine import Connection, Engine
from sqlalchemy.orm import Session

from aurora_router.routing.connector import Judge

if TYPE_CHECKING:
    from sqlalchemy.pool import PoolProxiedConnection


class SessionConnector:
    """The connector of a session's unit: connections join the session's transaction.

    engine: the engine that it tries, or has tried last.
    """

    __slots__ = ("engine", "judge", "options", "session")

    engine: Engine

    def __init__(self, session: Session, options: Mapping[str, Any] | None, judge: Judge | None) -> None:
        self.session = session
        self.options = options
        self.judge = judge

    def connect(self, engine: Engine) -> Connection:
        self.engine = engine
        return Session._connection_for_bind(self.session, engine, execution_options=self.options)

    def pool_connection(self, connection: Connection) -> PoolProxiedConnection:
        return connection.connection

    def discard(self, connection: Connection) -> None:
        leave(self.session, connection.engine, invalidate=True)


def connection_to(session: Session, engine: Engine) -> Connection | None:
    """Return the connection to this engine that the session's transaction has; None if it has none.

    SQLAlchemy has no public way: SessionTransaction._connections maps both the engine and the connection to
    (connection, transaction, should_commit, autoclose).
    """
    transaction = session.get_transaction()
    entry = transaction._connections.get(engine) if transaction is not None else None
    return entry[0] if entry is not None else None


def leave(session: Session, engine: Engine, *, invalidate: bool = False) -> None:
    """Take the connection to this engine out of the session's transaction and back to its pool."""
    transaction, connection = session.get_transaction(), connection_to(session, engine)
    if transaction is None or connection is None:
        return
    if invalidate:
        connection.invalidate()
    connection.close()
    # This comes last: if close() is interrupted, the session still has the connection and closes it itself.
    for key in (engine, connection):
        transaction._connections.pop(key, None)
