"""The server family of each instance. The router asks each server for it, because a URL names only the driver."""

from __future__ import annotations

from aurora_router.core.instance import Role, ServerStatus
from aurora_router.core.query import Query
from aurora_router.servers import ServerFamily, recognize, usual


class Families:
    """The families of one router's servers.

    leading: the family of the writer that was probed last; before the first one, the usual family.
    dialect: the SQL dialect of the server that was probed last; before the first one, that of the URL.
    asynchronous_commits: whether some session commits without waiting for the log. The statements of units show that.
    """

    def __init__(self, protocol: str, dialect: str) -> None:
        self._protocol = protocol
        self.dialect = dialect
        self.asynchronous_commits = False
        self._found: dict[str, ServerFamily] = {}
        self.leading = usual(protocol)

    def find(self, instance_id: str, query: Query) -> ServerFamily:
        """Find out which family answers at an instance now.

        The monitor calls this once on each of its connections. Once is enough, because no connection survives a change of its
        server.

        Raises whatever `query` raises.
        """
        found = self._found[instance_id] = recognize(self._protocol, query)
        return found

    def note_asynchronous_commit(self) -> None:
        """Note that some session commits without waiting for the log."""
        self.asynchronous_commits = True

    def note_answer(self, family: ServerFamily, server: ServerStatus) -> None:
        """Note the family and the dialect of a server that has answered. No unit comes to a server before that."""
        if server.role is Role.WRITER:
            self.leading = family
        self.dialect = family.dialect(server.id)

    def at(self, instance_id: str) -> ServerFamily:
        """Return the family that answered at an instance last; the leading one before the first answer."""
        return self._found.get(instance_id, self.leading)
