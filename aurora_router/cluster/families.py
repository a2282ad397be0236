"""Which server family answers at each instance. It is found out by asking, because a URL names the driver alone."""

from __future__ import annotations

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

        The monitor does so on each of its connections, because no change of a server leaves them open.

        Raises whatever `query` raises.
        """
        found = self._found[instance_id] = recognize(self._protocol, query)
        return found

    def at(self, instance_id: str) -> ServerFamily:
        """The family that answered at an instance last; the leading one before the first answer."""
        return self._found.get(instance_id, self.leading)
