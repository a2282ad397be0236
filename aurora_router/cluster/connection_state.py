"""The router's knowledge of one pooled connection: one object in the connection's `info`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Final

from sqlalchemy.engine import Connection
from sqlalchemy.pool import PoolProxiedConnection

from aurora_router.core.instance import ServerId
from aurora_router.drivers import Driver, Mode
from aurora_router.errors import RouterError
from aurora_router.servers import ServerFamily

STATE: Final = "aurora_router"
"""The key of a connection's state in its `info`."""

UNIT: Final = "aurora_router_unit"
"""The attribute of SQLAlchemy's connection that holds its unit."""


class ConnectionState:
    """The state of one pooled connection.

    family: the family of its server.
    driver: the module of its driver.
    default_autocommit: whether the driver's connection was in autocommit when it was made.
    is_shared: whether a pooler gives the server's connection to other clients, too.
    poll: tells what there is to read on its socket, as select.poll.poll() does.
    server: the server that it leads to; None after a rollback on it has failed.
    mode: the mode that it was switched to; None if its mode is unknown.
    default_read_only: whether it refuses writes outside of transactions.
    is_handed_out: whether the application may have changed its settings since the router last set them.
    is_outdated: whether its prepared statements are out of date.
    is_inherited: whether it was open at a fork, and so belongs to the parent process.
    checked_out_at: when it was last checked (seconds, monotonic); -inf for a new connection.
    unit: the unit that has checked it out; None in the pool. Only the hooks know the unit's class.
    number: the number by which events speak of it; None if nobody listens.
    routed_at: when an event told that the unit has it (seconds, monotonic); None in the pool, and if nobody listens.
    """

    __slots__ = (
        "__weakref__",
        "checked_out_at",
        "default_autocommit",
        "default_read_only",
        "driver",
        "family",
        "is_handed_out",
        "is_inherited",
        "is_outdated",
        "is_shared",
        "mode",
        "number",
        "poll",
        "routed_at",
        "server",
        "unit",
    )

    def __init__(
        self,
        server: ServerId,
        family: ServerFamily,
        driver: Driver,
        poll: Callable[[int], list[Any]],
        *,
        mode: Mode | None,
        default_autocommit: bool,
        default_read_only: bool,
        is_handed_out: bool,
        is_shared: bool,
    ) -> None:
        self.server: ServerId | None = server
        self.family = family
        self.driver = driver
        self.poll = poll
        self.mode = mode
        self.default_autocommit = default_autocommit
        self.default_read_only = default_read_only
        self.is_handed_out = is_handed_out
        self.is_shared = is_shared
        self.is_outdated = False
        self.is_inherited = False
        self.checked_out_at = -math.inf
        self.unit: Any = None
        self.number: int | None = None
        self.routed_at: float | None = None

    def __repr__(self) -> str:
        where = "inherited by a fork" if self.is_inherited else f"to {self.server}"
        mode = "unknown" if self.mode is None else self.mode.name
        marks = ("default_read_only", "is_handed_out", "is_outdated", "is_shared")
        return f"<ConnectionState {where}, mode {mode}, {', '.join(m for m in marks if getattr(self, m)) or 'unmarked'}>"

    def distrust(self) -> None:
        """Record that the user has the driver's connection and may set anything, so the next unit trusts no setting."""
        self.mode, self.is_handed_out = None, True


def state_of(raw: PoolProxiedConnection) -> ConnectionState:
    """Return the state of a pooled connection.

    Raises RouterError for a connection inherited by a fork, because only the parent may end its transaction.
    """
    state: ConnectionState | None = raw.info.get(STATE)
    if state is None or state.is_inherited:
        raise RouterError("this connection is of the process that forked this one; roll back or close, and begin anew")
    return state


def unit_of(connection: Connection | PoolProxiedConnection) -> Any:
    """Return the unit that has checked out a pooled connection; None if the unit has ended."""
    state: ConnectionState | None = connection.info.get(STATE)
    return state.unit if state is not None else None
