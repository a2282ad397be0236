"""`Incidents`: how the servers of a family report what they have done on their own to the transaction of a connection."""

from __future__ import annotations

from typing import Any, Protocol

from aurora_router.core.query import Query


class Incidents(Protocol):
    """How a server reports that it has ended a connection, or has rolled back a transaction, on its own.

    The module of a server family has these names. A connection needs those of them that its driver does not report. A code has
    the type that the driver's `code()` returns.
    """

    @property
    def CRASHED(self) -> frozenset[Any]:
        """The codes by which a server reports that it ends the connection because another server process has crashed."""
        ...

    def may_have_rolled_back(self, code: Any) -> bool:
        """Return whether the server may have rolled back the whole transaction with an error.

        The next statement then silently begins another transaction.
        """
        ...

    def has_rolled_back(self, code: Any, query: Query) -> bool:
        """Return whether the server has rolled back the whole transaction with an error that may mean this. Ask it if need be.

        Raises the errors of `query`.
        """
        ...

    def has_left_writes(self, query: Query) -> bool:
        """Return whether the rollback that came just before has left some writes in place.

        Raises the errors of `query`.
        """
        ...
