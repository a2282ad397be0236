"""What is known about one endpoint and the servers behind it, as frozen records.

An instance is an endpoint. Usually one server stands behind it. If the name is a load balancer's, or has several addresses in
DNS, several servers may stand there. So each observation is of one *server*, and an instance is only as far as the least
advanced of its servers.
"""

from __future__ import annotations

import enum
from typing import NamedTuple, TypeAlias

from aurora_router.core.positions import Position

Location: TypeAlias = tuple[str | None, int | None]
"""The address and port of a server: the same for all its lives."""


class Role(enum.Enum):
    """The role of a server: it accepts writes, or replays them."""

    WRITER = "writer"
    READER = "reader"


class ServerId(NamedTuple):
    """The identity of one life of one server, from one start to the next.

    cluster: the name that all servers of a cluster share, for example PostgreSQL's system identifier.
    address, port: where the connection arrived, as the server itself says. If the server does not know, the address is a name
        that no other server of the cluster has.
    started: when the server was started. A restarted reader may have gone back in its log.
    """

    cluster: str
    address: str | None
    port: int | None
    started: str

    @property
    def incarnation(self) -> tuple[str, int | None, str]:
        """A key of one life of a server, the same at all its addresses. No two servers of a cluster have the same `started`."""
        return (self.cluster, self.port, self.started)

    @property
    def process(self) -> tuple[str | None, int | None, str]:
        """A key of one life of a server, the same if its cluster gets another name."""
        return (self.address, self.port, self.started)

    @property
    def location(self) -> Location:
        """A key of a server, the same in all its lives."""
        return (self.address, self.port)


class ServerStatus(NamedTuple):
    """The answer of one server to a probe.

    epoch: the newest that the server is known to be on.
    position: written (writer) or replayed (reader); None if the server gives none.
    lag: seconds behind the writer; None for a writer, or if it is unknown.
    isolation: its default level.
    replication_error: why a reader no longer replays; "" if it does, and for a writer.
    unproven: why a position does not prove that readers have all writes; "" if it does. A reader may replicate only a part of
        them, or the log of a writer may have only a part.
    omits: what a reader leaves out of its own log, so that the readers behind it never have it; "" if there is none.
    sources: the addresses of the servers that a reader replicates from, as far as it tells them.
    """

    id: ServerId
    role: Role
    epoch: int
    position: Position | None = None
    lag: float | None = None
    isolation: str = "read committed"
    replication_error: str = ""
    unproven: str = ""
    omits: str = ""
    sources: frozenset[str] = frozenset()


class ProbeFailure(enum.Enum):
    """How a probe failed."""

    REFUSED = "refused"  # certain: the server said no, or the connection broke
    NOT_NOW = "not now"  # the server starts, recovers from a crash, or stops
    TIMEOUT = "timeout"  # a suspicion: no answer came in time
    MISCONFIGURED = "misconfigured"  # the server will say no until somebody changes something


class Observation(NamedTuple):
    """The result of one probe of one instance. Times are monotonic seconds.

    server: the answer; None if there is none.
    about: the server that a broken or silent probe connection had reached before; None if it had reached none.
    pooled: whether one connection reached different servers, as behind a pooler that chooses one.
    """

    instance: str
    asked_at: float
    answered_at: float
    server: ServerStatus | None = None
    about: ServerId | None = None
    probe_failure: ProbeFailure | None = None
    error: str = ""
    pooled: bool = False


class Ahead(NamedTuple):
    """A reader's position with transactions that the writer made, but is not yet seen to have.

    told_at: when the reader gave the position: monotonic seconds.
    """

    position: Position
    told_at: float


class TrackedServer(NamedTuple):
    """A server behind an instance, and the last probe that it answered.

    missed_probes: the number of silent probes in a row since then.
    missed_at: when the last silent probe was sent: monotonic seconds.

    The other fields are about a reader, and hold until it goes back in its log or is started again.
    confirmed: whether the writer was seen to have all that the reader had.
    ahead: the first position of the reader that the writer is not yet seen to have; None if there is none.
    has_diverged: whether the reader certainly has transactions that the writer lacks. Then its position proves nothing.
    """

    server: ServerStatus
    asked_at: float
    latency: float
    missed_probes: int = 0
    missed_at: float = float("-inf")
    confirmed: bool = False
    ahead: Ahead | None = None
    has_diverged: bool = False


class Instance(NamedTuple):
    """An endpoint, and the servers that were seen behind it. Times are monotonic seconds.

    id: "host:port".
    reader_only: whether it is a reader endpoint, which never serves as the writer.
    role: of its servers; None if it is not used.
    position: how far it is known to be; None if that is unknown.
    lag: seconds; None if it is unknown.
    latency: seconds that the last probe took.
    error: why it is not healthy; "" if it is.
    last_observed_at: when the newest probe that has ended was sent.
    pooled: whether the servers behind it cannot be told apart. Then their positions prove nothing.
    foreign_cluster: the other cluster to which it says that it belongs; None if it does not say so.
    unproven: why its answers do not prove that it has a session's writes; "" if they do. The instance serves other reads even
        then. If it is not used, it keeps the last value.
    epoch: the newest that a server behind it is known to be on; 0 if none answers.
    flap_count: how often it was lost, without a calm time in between.
    lost_at: when the probe that showed the last loss was sent.
    recovered_at: when the first probe was sent that has been answered since.
    """

    id: str
    host: str
    port: int
    reader_only: bool = False
    tracked: tuple[TrackedServer, ...] = ()
    error: str = "not probed yet"
    probe_failure: ProbeFailure | None = None
    last_observed_at: float = float("-inf")
    pooled: bool = False
    foreign_cluster: str | None = None
    unproven: str = ""
    role: Role | None = None
    position: Position | None = None
    lag: float | None = None
    latency: float = 0.0
    servers: frozenset[ServerId] = frozenset()
    epoch: int = 0
    flap_count: int = 0
    lost_at: float = float("-inf")
    recovered_at: float = float("-inf")

    @property
    def healthy(self) -> bool:
        """Whether the instance answers and may be used in its role."""
        return self.role is not None

    @property
    def is_foreign(self) -> bool:
        """Whether the instance is of another cluster."""
        return self.foreign_cluster is not None

    @property
    def missed_probes(self) -> int:
        """The number of silent probes in a row, of the server that has most."""
        return max((seen.missed_probes for seen in self.tracked), default=0)

    @property
    def probed(self) -> bool:
        """Whether at least one probe has ended."""
        return self.last_observed_at > float("-inf")

    def __str__(self) -> str:
        if self.role is None:
            return f"{self.id}: {self.error}"
        lag = "" if self.lag is None else f", {self.lag * 1000:.0f} ms behind"
        return f"{self.id}: {self.role.value} at {self.position or 'an unknown position'}{lag}"
