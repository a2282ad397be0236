"""The frozen picture of all instances at one moment, and the one function that changes it: observe().

Rules:
- An instance is an endpoint. Usually one server stands behind it; behind a load balancer's or DNS's name there may be
  several, so each observation is of one *server*, and an instance is only as far as the least of its servers.
- An observation that was asked for before the newest one of the same server is dropped.
- The writer is the server of the newest epoch that accepts writes. A writer of an older epoch is deposed: it serves nothing.
  Of two servers of the newest epoch that both accept writes, the one whose position shows that it is newer. Where neither does,
  there is no writer until that resolves. One whose position shows that it was the writer before the last one is deposed, too.
- A reader that has ceased to replay is not used.
- The epoch never goes back.
- A silent probe makes an instance suspect; the second in a row, or a refused connection, takes it out of use.
- A reader that was lost once is taken back at its first answer. One that is lost again and again must have answered for a while
  that doubles with each loss. The writer never waits: without it nobody can write.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from aurora_router.core.positions import Position, Sample, minimum

SAMPLES = 256  # how many positions of the writer are kept: at 50 ms about 13 s, at 1 s more than 4 min
MISSES = 2  # silent probes in a row that take an instance out of use
CALM = 300.0  # seconds without a loss after which earlier ones are forgotten
LONGEST_HOLD = 60.0  # seconds


class Role(enum.Enum):
    """What a server does: accept writes, or replay them."""

    WRITER = "writer"
    READER = "reader"


class ServerId(NamedTuple):
    """What tells one server from another, and one life of it from the next.

    cluster: what all servers of a cluster share: PostgreSQL's system identifier, say.
    address, port: where the server itself says the connection arrived; where it does not know, a name that no other server of
    the cluster has stands for the address.
    started: when it was started; a restarted reader may have gone back in its log.
    """

    cluster: str
    address: str | None
    port: int | None
    started: str

    @property
    def life(self) -> tuple[str, int | None, str]:
        """The same for one server reached at several addresses: no two of a cluster say the same of their start."""
        return (self.cluster, self.port, self.started)


@dataclass(frozen=True, slots=True)
class Server:
    """What one server said of itself.

    epoch: the newest it is known to be on. position: written (writer) or replayed (reader); None where it gives none.
    lag: seconds behind the writer; None for a writer or where it cannot be told. isolation: its default level. stopped: why it
    replays no more, where it is a reader that has ceased to.
    """

    id: ServerId
    role: Role
    epoch: int
    position: Position | None = None
    lag: float | None = None
    isolation: str = "read committed"
    stopped: str = ""


class Silence(enum.Enum):
    """How a probe failed."""

    REFUSED = "refused"  # it said no, or the connection broke: certain
    TIMEOUT = "timeout"  # it said nothing in time: a suspicion
    MISCONFIGURED = "misconfigured"  # it will say no until someone changes something


@dataclass(frozen=True, slots=True)
class Observation:
    """What one probe of one instance said. Times are monotonic seconds.

    server: the answer, or None. about: the server that a broken or silent probe connection had reached before, if any.
    pooled: one and the same connection reached different servers, as behind a statement pooler.
    """

    instance: str
    asked_at: float
    answered_at: float
    server: Server | None = None
    about: ServerId | None = None
    silence: Silence | None = None
    error: str = ""
    pooled: bool = False


@dataclass(frozen=True, slots=True)
class Seen:
    """A server behind an instance, and the probe that showed it last.

    misses: its silent probes in a row since then. missed_at: when the last one of them was asked for.
    """

    server: Server
    asked_at: float
    latency: float
    misses: int = 0
    missed_at: float = float("-inf")


@dataclass(frozen=True, slots=True)
class Instance:
    """An endpoint and the servers that were seen behind it.

    id: "host:port". reader_only: a reader endpoint, which never serves as the writer.
    error: what was last heard where it is not healthy. heard_at: when the newest probe that came to an end was asked for.
    pooled: the servers behind it cannot be told apart, so that their positions are no evidence.
    epoch: the newest that a server behind it is known to be on; 0 where none answers. losses: how often it was lost, without
    a calm time in between. lost_at: when the probe that showed the last loss was asked for. back_at: the same of the first answer
    since.
    """

    id: str
    host: str
    port: int
    reader_only: bool = False
    seen: tuple[Seen, ...] = ()
    error: str = "not probed yet"
    silence: Silence | None = None
    heard_at: float = float("-inf")
    pooled: bool = False
    role: Role | None = None
    position: Position | None = None
    lag: float | None = None
    latency: float = 0.0
    servers: frozenset[ServerId] = frozenset()
    epoch: int = 0
    losses: int = 0
    lost_at: float = float("-inf")
    back_at: float = float("-inf")

    @property
    def healthy(self) -> bool:
        """It answers and may be used in its role."""
        return self.role is not None

    @property
    def misses(self) -> int:
        """Silent probes in a row, of the server that has most."""
        return max((seen.misses for seen in self.seen), default=0)

    @property
    def probed(self) -> bool:
        """At least one probe has come to an end."""
        return self.heard_at > float("-inf")

    def __str__(self) -> str:
        if self.role is None:
            return f"{self.id}: {self.error}"
        lag = "" if self.lag is None else f", {self.lag * 1000:.0f} ms behind"
        return f"{self.id}: {self.role.value} at {self.position or 'an unknown position'}{lag}"


@dataclass(frozen=True, slots=True)
class Topology:
    """All instances at one moment. Changed only by the functions of this module, which return a new one.

    writer: the instance that takes writes, if one does. readers: those that are healthy.
    ambiguous: the instances that both accept writes, where nothing tells which is newer.
    epoch: the newest that was ever seen; 0 before the first answer. cluster: as ServerId.cluster.
    samples: positions of the writer in this epoch, oldest first.
    """

    instances: tuple[Instance, ...] = ()
    writer: Instance | None = None
    readers: tuple[Instance, ...] = ()
    ambiguous: tuple[str, ...] = ()
    epoch: int = 0
    cluster: str | None = None
    samples: tuple[Sample, ...] = ()
    by_id: dict[str, Instance] = field(default_factory=dict, compare=False, repr=False)

    def __iter__(self) -> Iterator[Instance]:
        return iter(self.instances)

    @property
    def probed(self) -> bool:
        """Every instance has been probed at least once."""
        return all(instance.probed for instance in self.instances)

    def said(self) -> tuple[str, ...]:
        """One line per instance: what it last said."""
        return tuple(str(instance) for instance in self.instances)


def add(topology: Topology, instance: Instance) -> Topology:
    """With one more instance, unless it is there already."""
    if any(known.id == instance.id for known in topology.instances):
        return topology
    return _settle(topology, (*topology.instances, instance))


def remove(topology: Topology, instance_id: str) -> Topology:
    """Without that instance."""
    return _settle(topology, tuple(i for i in topology.instances if i.id != instance_id))


def observe(topology: Topology, observation: Observation) -> Topology:
    """The topology after one observation; the very same object when the observation changes nothing (late, unknown)."""
    old = topology.by_id.get(observation.instance)
    if old is None:
        return topology
    server = observation.server
    if server is not None and topology.cluster is not None and server.id.cluster != topology.cluster:
        observation = replace(
            observation,
            server=None,
            silence=Silence.MISCONFIGURED,
            error=f"belongs to another cluster ({server.id.cluster}, not {topology.cluster})",
        )
        server = None
    new = _failed(old, observation) if server is None else _answered(old, observation, server)
    if new is old:
        return topology
    if server is None:
        return _settle(topology, _swap(topology, new))
    return _settle(
        replace(topology, cluster=server.id.cluster, epoch=max(topology.epoch, server.epoch)),
        _swap(topology, new),
    )


def _swap(topology: Topology, new: Instance) -> tuple[Instance, ...]:
    return tuple(new if instance.id == new.id else instance for instance in topology.instances)


def _answered(old: Instance, observation: Observation, server: Server) -> Instance:
    # A server at the same address is the same one, or a newer life of it: it takes that one's place.
    place = (server.id.address, server.id.port)
    known = next((s for s in old.seen if (s.server.id.address, s.server.id.port) == place), None)
    newest = old.heard_at if known is None else max(known.asked_at, known.missed_at)
    if newest >= observation.asked_at:
        return old  # it was silent since then, or something newer is known already
    seen = Seen(server, observation.asked_at, max(observation.answered_at - observation.asked_at, 0.0))
    return replace(
        old,
        seen=(*(s for s in old.seen if s is not known), seen),
        silence=None,
        heard_at=max(old.heard_at, observation.asked_at),
        pooled=old.pooled or observation.pooled,
        back_at=observation.asked_at if old.lost_at > old.back_at else old.back_at,
    )


def _failed(old: Instance, observation: Observation) -> Instance:
    # Where servers cannot be told apart, the one that was silent speaks for all.
    about = old.seen if old.pooled else tuple(s for s in old.seen if s.server.id == observation.about)
    if old.seen and not about:
        return old  # one more connection could not be made; those that are there still answer
    if observation.asked_at < old.heard_at if not about else any(_is_late(s, observation) for s in about):
        return old
    misses = 1 if observation.silence is Silence.TIMEOUT else MISSES
    left = tuple(
        replace(s, misses=s.misses + misses, missed_at=observation.asked_at) if s in about else s
        for s in old.seen
        if s not in about or s.misses + misses < MISSES
    )
    if old.seen and not left:
        calm = observation.asked_at - old.lost_at > CALM
        old = replace(old, losses=1 if calm else old.losses + 1, lost_at=observation.asked_at)
    return replace(
        old,
        seen=left,
        error="" if left else observation.error,
        silence=None if left else observation.silence,
        heard_at=max(old.heard_at, observation.asked_at),
    )


def _is_late(seen: Seen, observation: Observation) -> bool:
    # A probe that was overdue and is then refused is asked for once and heard of twice.
    return seen.asked_at >= observation.asked_at or seen.missed_at > observation.asked_at


def behind(topology: Topology, instance_id: str, server: ServerId) -> Seen | None:
    """What that server behind that instance has said last; None where it does not stand there."""
    instance = topology.by_id.get(instance_id)
    seen = instance.seen if instance is not None else ()
    return next((s for s in seen if s.server.id.life == server.life), None)


def forget(topology: Topology, instance_id: str, server: ServerId) -> Topology:
    """Without that server behind that instance: the name no longer leads there."""
    old = topology.by_id.get(instance_id)
    if old is None or all(seen.server.id != server for seen in old.seen):
        return topology
    left = tuple(seen for seen in old.seen if seen.server.id != server)
    return _settle(topology, _swap(topology, replace(old, seen=left, error="the name leads elsewhere")))


def _settle(topology: Topology, instances: tuple[Instance, ...]) -> Topology:
    """Elect the writer and derive what each instance may be used for."""
    epoch = topology.epoch
    samples = topology.samples if topology.samples and topology.samples[-1].position.epoch == epoch else ()
    last = samples[-1].position if samples else None
    claims: dict[object, tuple[str, Server]] = {}  # one entry a server, under the first of the names given for it
    for instance in instances:
        for seen in instance.seen:
            accepts = seen.server.role is Role.WRITER and seen.server.epoch == epoch and not instance.reader_only
            if accepts and not _predates(seen.server, last):
                claims.setdefault(seen.server.id.life, (instance.id, seen.server))
    elected = _elect([*claims.values()])
    settled = tuple(_derive(instance, epoch, elected, last) for instance in instances)
    writer = next((i for i in settled if i.role is Role.WRITER), None)
    if writer is not None and writer.position is not None:
        asked_at = max(seen.asked_at for seen in writer.seen if seen.server.id in writer.servers)
        if samples and not writer.position.covers(samples[-1].position):
            samples = ()  # what others had written in this epoch was lost with them: no reader will ever have it
        if not samples or asked_at > samples[-1].asked_at:
            samples = (*samples[-SAMPLES + 1 :], Sample(asked_at, writer.position))
    return Topology(
        instances=settled,
        writer=writer,
        readers=tuple(i for i in settled if i.role is Role.READER),
        ambiguous=tuple(sorted(at for at, _ in claims.values())) if claims and elected is None else (),
        epoch=epoch,
        cluster=topology.cluster,
        samples=samples,
        by_id={i.id: i for i in settled},
    )


def _predates(server: Server, last: Position | None) -> bool:
    return last is not None and server.position is not None and server.position.predates(last)


def _elect(claims: list[tuple[str, Server]]) -> tuple[str, ServerId] | None:
    """The one server that is the writer, and its instance, of those that accept writes in the newest epoch."""
    for at, server in claims:
        position = server.position
        others = [other.position for _, other in claims if other is not server]
        if not others or (position is not None and all(other is not None and position.outdoes(other) for other in others)):
            return at, server.id
    return None


def _derive(instance: Instance, epoch: int, elected: tuple[str, ServerId] | None, last: Position | None) -> Instance:
    """The instance with role, position and lag as its servers and the election say."""
    role: Role | None
    if elected is not None and instance.id == elected[0]:
        role = Role.WRITER
        use = tuple(s for s in instance.seen if s.server.id == elected[1])
    else:
        replaying = (s for s in instance.seen if s.server.role is Role.READER and not s.server.stopped)
        use = () if _held(instance) else tuple(replaying)
        role = Role.READER if use else None
    lags = [s.server.lag for s in use if s.server.lag is not None]
    return replace(
        instance,
        role=role,
        error="" if role is not None else _unused(instance, epoch, elected, last),
        position=None if instance.pooled else minimum(tuple(s.server.position for s in use)),
        lag=max(lags) if lags and len(lags) == len(use) else None,
        latency=max((s.latency for s in use), default=0.0),
        servers=frozenset(s.server.id for s in use),
        epoch=max((s.server.epoch for s in instance.seen), default=0),
    )


def hold(losses: int) -> float:
    """Seconds for which a reader must have answered before it is used again, after so many losses."""
    return 0.0 if losses < 2 else min(2.0 ** min(losses - 2, 10), LONGEST_HOLD)


def _held(instance: Instance) -> bool:
    """Whether it answers, but has not yet done so for long enough."""
    return bool(instance.seen) and max(s.asked_at for s in instance.seen) - instance.back_at < hold(instance.losses)


def _unused(instance: Instance, epoch: int, elected: tuple[str, ServerId] | None, last: Position | None) -> str:
    """Why an instance without a role has none."""
    if not instance.seen:
        return instance.error
    readers = [s.server for s in instance.seen if s.server.role is Role.READER]
    if readers and all(server.stopped for server in readers):
        return f"a reader that is not used, for it falls behind: {readers[0].stopped}"
    if readers:
        times = f"{instance.losses} times within {CALM:g} s of each other"
        return f"answers, but was lost {times}; used again when it has answered for {hold(instance.losses):g} s"
    if all(s.server.epoch < epoch for s in instance.seen):
        return f"deposed: it still accepts writes, but the cluster is at epoch {epoch}"
    if instance.reader_only:
        return "accepts writes, but is a reader endpoint"
    if any(_predates(s.server, last) for s in instance.seen):
        return "deposed: it still accepts writes, but lacks some of a writer that came after it"
    if elected is None:
        return "accepts writes, and so does another instance of the same epoch"
    if any(s.server.id.life == elected[1].life for s in instance.seen):
        return f"the writer under another name, used as {elected[0]}"
    return f"deposed: it still accepts writes, but {elected[0]} does so, too, and is newer: it has all that this one has"
