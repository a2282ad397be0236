"""The frozen picture of all instances at one moment, and the one function that changes it: observe().

Rules:
- An instance is an endpoint. Usually one server stands behind it. Behind the name of a load balancer or in DNS there may be
  several. So each observation is of one *server*, and an instance is only as far as the least advanced of its servers.
- An observation is dropped if it was asked for before the newest one of the same server.
- The writer is the server of the newest epoch that accepts writes. A writer of an older epoch is deposed: it serves nothing.
- Two servers of the newest epoch may both accept writes. The writer is the one whose position shows that it is newer. If
  neither position shows that, there is no writer until that resolves.
- A server is also deposed if its position shows that it was the writer before the last one.
- A reader that no longer replays is not used.
- A known server keeps its place if its cluster gets another name. Any other server of another cluster is a stranger: it serves
  nothing, and the server that stood at its place is forgotten.
- The epoch goes back only if the writer itself says so, because its log was begun anew. Deposed servers stay deposed.
- A reader may have transactions of the writer's that the writer, asked later, does not have. Such a reader is on another line:
  its position proves nothing.
- A reader's position also proves nothing before the writer was once seen to have what the reader has. A writer that was asked
  before the reader cannot tell.
- A silent probe makes an instance suspect. The second in a row, or a refused connection, takes the instance out of use.
- A reader that was lost once is used again at its first answer. A reader that is lost again and again must answer for a while
  first, which doubles with each loss. The writer never waits, because without it nobody can write.
"""

from __future__ import annotations

import enum
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from aurora_router.core.positions import Position, Sample, minimum

# How many positions of the writer are kept: about 13 s with a probe every 50 ms, more than 4 min with one a second.
SAMPLES = 256
# Seconds after a crash for which a server that goes on breaks connections instead of refusing them.
SETTLES = 0.1
MISSES = 2  # silent probes in a row that take an instance out of use
CALM = 300.0  # seconds without a loss after which earlier ones are forgotten
LONGEST_HOLD = 60.0  # seconds


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
    def life(self) -> tuple[str, int | None, str]:
        """The same for one life of a server at all its addresses: no two servers of a cluster have the same `started`."""
        return (self.cluster, self.port, self.started)

    @property
    def run(self) -> tuple[str | None, int | None, str]:
        """The same for one life of one server, whatever its cluster is called."""
        return (self.address, self.port, self.started)

    @property
    def place(self) -> tuple[str | None, int | None]:
        """The same for all lives of one server."""
        return (self.address, self.port)


class Server(NamedTuple):
    """The answer of one server to a probe.

    epoch: the newest that the server is known to be on.
    position: written (writer) or replayed (reader); None if the server gives none.
    lag: seconds behind the writer; None for a writer, or if it is unknown.
    isolation: its default level.
    stopped: why a reader no longer replays; "" if it does, and for a writer.
    unproven: why a position does not prove that readers have what was written; "" if it does. A reader may replicate only a
        part, or the log of a writer may have only a part.
    """

    id: ServerId
    role: Role
    epoch: int
    position: Position | None = None
    lag: float | None = None
    isolation: str = "read committed"
    stopped: str = ""
    unproven: str = ""


class Silence(enum.Enum):
    """How a probe failed."""

    REFUSED = "refused"  # certain: the server said no, or the connection broke
    NOT_NOW = "not now"  # the server is starting, recovering from a crash, or stopping
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
    server: Server | None = None
    about: ServerId | None = None
    silence: Silence | None = None
    error: str = ""
    pooled: bool = False


class Ahead(NamedTuple):
    """A reader's position with transactions of the writer's that the writer is not yet seen to have.

    told_at: when the reader gave the position: monotonic seconds.
    """

    position: Position
    told_at: float


class Seen(NamedTuple):
    """A server behind an instance, and the last probe that it answered.

    misses: the number of silent probes in a row since then.
    missed_at: when the last silent probe was sent: monotonic seconds.

    The other fields are about a reader, and hold until it goes back in its log or is started again.
    confirmed: whether the writer was seen to have all that the reader had.
    ahead: the first position of the reader that the writer is not yet seen to have; None if there is none.
    astray: whether the writer was asked after the reader had given `ahead`, and did not have it.
    """

    server: Server
    asked_at: float
    latency: float
    misses: int = 0
    missed_at: float = float("-inf")
    confirmed: bool = False
    ahead: Ahead | None = None
    astray: bool = False


class Instance(NamedTuple):
    """An endpoint, and the servers that were seen behind it. Times are monotonic seconds.

    id: "host:port".
    reader_only: whether it is a reader endpoint, which never serves as the writer.
    role: of its servers; None if it is not used.
    position: how far it is known to be; None if that is unknown.
    lag: seconds; None if it is unknown.
    latency: seconds that the last probe took.
    error: why it is not healthy; "" if it is.
    heard_at: when the newest probe that has ended was sent.
    pooled: whether the servers behind it cannot be told apart. Then their positions prove nothing.
    foreign: the other cluster that it says it belongs to; None if it does not.
    unproven: why its answers do not prove that it has what a session has written; "" if they do. It is used for other reads
        even then. An instance that is not used keeps its last value.
    epoch: the newest that a server behind it is known to be on; 0 if none answers.
    losses: how often it was lost, without a calm time in between.
    lost_at: when the probe that showed the last loss was sent.
    back_at: when the first probe was sent that has been answered since.
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
    foreign: str | None = None
    unproven: str = ""
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
        """Whether the instance answers and may be used in its role."""
        return self.role is not None

    @property
    def stranger(self) -> bool:
        """Whether the instance is of another cluster."""
        return self.foreign is not None

    @property
    def misses(self) -> int:
        """The number of silent probes in a row, of the server that has most."""
        return max((seen.misses for seen in self.seen), default=0)

    @property
    def probed(self) -> bool:
        """Whether at least one probe has ended."""
        return self.heard_at > float("-inf")

    def __str__(self) -> str:
        if self.role is None:
            return f"{self.id}: {self.error}"
        lag = "" if self.lag is None else f", {self.lag * 1000:.0f} ms behind"
        return f"{self.id}: {self.role.value} at {self.position or 'an unknown position'}{lag}"


@dataclass(frozen=True, slots=True)
class Topology:
    """All instances at one moment. Only the functions of this module change it, and they return a new one.

    instances: in the order in which you named them.
    writer: the instance that takes writes, if one does.
    readers: the healthy readers.
    ambiguous: the instances that both accept writes, if nothing tells which is newer.
    epoch: the newest; 0 before the first answer.
    cluster: the identity of the cluster; None if it is unknown.
    samples: positions of the writer in this epoch, oldest first.
    elected: the server that was the writer last.
    deposed: the places of servers that accepted writes before it, and have not been seen as readers since.
    peak: the highest epoch ever seen.
    by_id: the instances by their ids.
    isolation: the level of a transaction that asks for none, as the first instance that answers says; None if none answers.
    """

    instances: tuple[Instance, ...] = ()
    writer: Instance | None = None
    readers: tuple[Instance, ...] = ()
    ambiguous: tuple[str, ...] = ()
    epoch: int = 0
    cluster: str | None = None
    samples: tuple[Sample, ...] = ()
    elected: ServerId | None = None
    deposed: frozenset[tuple[str | None, int | None]] = frozenset()
    peak: int = 0
    by_id: dict[str, Instance] = field(default_factory=dict, compare=False, repr=False)
    isolation: str | None = None

    def __iter__(self) -> Iterator[Instance]:
        return iter(self.instances)

    @property
    def probed(self) -> bool:
        """Whether every instance has been probed at least once."""
        return all(instance.probed for instance in self.instances)

    @property
    def in_vain(self) -> tuple[Instance, ...]:
        """The instances at which somebody must change something before there is a writer; empty if waiting may help.

        They are all that could be the writer. A reader may be promoted, but while it is a reader, the writer is another instance.
        An instance of another cluster could be the writer only if there are no readers.
        """
        idle = tuple(i for i in self.instances if not (i.role is Role.READER or i.reader_only or (i.stranger and self.readers)))
        wrong = self.writer is None and all(i.silence is Silence.MISCONFIGURED for i in idle)
        return idle if wrong else ()

    @property
    def successor(self) -> str | None:
        """The one other cluster that all instances say they belong to; None if there is none."""
        found = {instance.foreign for instance in self.instances}
        return found.pop() if len(found) == 1 else None

    def said(self, instances: Iterable[Instance] | None = None, avoided: Collection[str] = ()) -> tuple[str, ...]:
        """Describe the last state of each instance, one line each.

        instances: which ones; None for all.
        avoided: ids of those that have just failed a unit.
        """
        chosen = self.instances if instances is None else instances
        return tuple(
            f"{instance}{self._advice(instance)}{', but it has just failed this unit' if instance.id in avoided else ''}"
            for instance in chosen
        )

    def trouble(self, instance: Instance) -> str:
        """Why an instance is not used, and what to do if it is of another cluster."""
        return instance.error + self._advice(instance)

    def _advice(self, instance: Instance) -> str:
        if instance.foreign is None:
            return ""
        if self.successor is None:
            return "; check where its name leads"
        return "; if the cluster was made anew under these names, set accept_new_cluster=True or start this process again"


def add(topology: Topology, instance: Instance) -> Topology:
    """Add an instance, unless it is there already."""
    if any(known.id == instance.id for known in topology.instances):
        return topology
    return _settle(topology, (*topology.instances, instance))


def remove(topology: Topology, instance_id: str) -> Topology:
    """Remove an instance."""
    return _settle(topology, tuple(i for i in topology.instances if i.id != instance_id))


def observe(topology: Topology, observation: Observation) -> Topology:
    """Apply one observation. Returns the same object if nothing changes (an old observation, an unknown instance)."""
    old = topology.by_id.get(observation.instance)
    if old is None:
        return topology
    server = observation.server
    if server is None or not _is_member(topology, server.id):
        new = _failed(old, observation) if server is None else _estranged(old, observation, server.id, topology.cluster)
        return topology if new is old else _settle(topology, _swap(topology, new))
    last = topology.samples[-1].position if topology.samples else None
    server = _placed(server, last, topology.epoch)
    new = _answered(old, observation, server)
    if new is old:
        return topology
    follows = server.role is Role.READER
    return _settle(
        replace(
            topology,
            cluster=topology.cluster or server.id.cluster,
            epoch=server.epoch if _forgot(server, last) else max(topology.epoch, server.epoch),
            deposed=topology.deposed - {server.id.place} if follows else topology.deposed,
        ),
        _swap(topology, new),
    )


def renewed(topology: Topology) -> Topology:
    """Forget all that is known of the instances, because their cluster was made anew."""
    new = Topology()
    for i in topology.instances:
        new = add(new, Instance(i.id, i.host, i.port, i.reader_only))
    return new


def _is_member(topology: Topology, server: ServerId) -> bool:
    """Whether a server is of this cluster. A known one is, too, if only the name of its cluster has changed."""
    if topology.cluster is None or server.cluster == topology.cluster:
        return True
    if server.cluster.isdigit():
        # This is PostgreSQL's system identifier. No server changes it while it runs.
        return False
    known = [seen.server.id.run for instance in topology.instances for seen in instance.seen]
    return server.run in known or (topology.elected is not None and server.run == topology.elected.run)


def _estranged(old: Instance, observation: Observation, server: ServerId, cluster: str | None) -> Instance:
    """The instance after the answer of a server of another cluster.

    The server that was known at that place is forgotten. Only a reader endpoint may have other servers, and those stay.
    """
    if observation.asked_at <= old.heard_at:
        return old
    left = tuple(s for s in old.seen if old.reader_only and s.server.id.place != server.place)
    return old._replace(
        seen=left,
        foreign=server.cluster,
        error=f"belongs to another cluster ({server.cluster}, not {cluster})",
        silence=Silence.MISCONFIGURED,
        heard_at=observation.asked_at,
    )


def _placed(server: Server, last: Position | None, newest: int) -> Server:
    """The server in the epoch that its position shows. last: the last position of the writer."""
    if last is None or server.position is None or (server.role is Role.WRITER and server.epoch >= newest):
        return server
    position = server.position.placed(last)
    if position is server.position:
        return server
    return server._replace(position=position, epoch=newest if server.role is Role.WRITER else server.epoch)


def _forgot(server: Server, last: Position | None) -> bool:
    """Whether this is the last writer, which may have forgotten its epoch. Then the epoch that it gives counts."""
    return server.role is Role.WRITER and last is not None and server.position is not None and server.position.resumes(last)


def _swap(topology: Topology, new: Instance) -> tuple[Instance, ...]:
    return tuple(new if instance.id == new.id else instance for instance in topology.instances)


def _answered(old: Instance, observation: Observation, server: Server) -> Instance:
    # A server at the same address is the same server or a newer life of it, so it replaces the known one.
    place = (server.id.address, server.id.port)
    known = next((s for s in old.seen if (s.server.id.address, s.server.id.port) == place), None)
    newest = old.heard_at if known is None else max(known.asked_at, known.missed_at)
    if newest >= observation.asked_at:
        return old  # the server was silent since, or a newer answer is known
    latency = max(observation.answered_at - observation.asked_at, 0.0)
    seen = Seen(server, observation.asked_at, latency)
    if known is not None and _goes_on(known.server, server):
        seen = seen._replace(confirmed=known.confirmed, ahead=known.ahead, astray=known.astray)
    return old._replace(
        seen=(*(s for s in old.seen if s is not known), seen),
        silence=None,
        foreign=None,
        heard_at=max(old.heard_at, observation.asked_at),
        pooled=old.pooled or observation.pooled,
        back_at=observation.asked_at if old.lost_at > old.back_at else old.back_at,
    )


def _goes_on(before: Server, now: Server) -> bool:
    """Whether a server is in the same life as before, and still has all that it had."""
    if before.position is None or now.position is None or before.id.life != now.id.life:
        return False
    return now.position.reaches(before.position)


def _failed(old: Instance, observation: Observation) -> Instance:
    # If the servers cannot be told apart, the silence of one counts for all.
    about = old.seen if old.pooled else tuple(s for s in old.seen if s.server.id == observation.about)
    if old.seen and not about:
        # One more connection could not be made, but the servers that are known still answer.
        return old
    if observation.asked_at < old.heard_at if not about else any(_is_late(s, observation) for s in about):
        return old
    misses = 1 if observation.silence is Silence.TIMEOUT else MISSES
    left = tuple(
        s._replace(misses=s.misses + misses, missed_at=observation.asked_at) if s in about else s
        for s in old.seen
        if s not in about or s.misses + misses < MISSES
    )
    if old.seen and not left:
        calm = observation.asked_at - old.lost_at > CALM
        old = old._replace(losses=1 if calm else old.losses + 1, lost_at=observation.asked_at)
    return old._replace(
        seen=left,
        error="" if left else observation.error,
        silence=None if left else observation.silence,
        foreign=None,
        heard_at=max(old.heard_at, observation.asked_at),
    )


def _is_late(seen: Seen, observation: Observation) -> bool:
    # One probe may be reported twice, with the same asked_at: first as overdue, then as refused.
    return seen.asked_at >= observation.asked_at or seen.missed_at > observation.asked_at


def behind(topology: Topology, instance_id: str, server: ServerId) -> Seen | None:
    """The last answer of this server behind this instance; None if the server does not stand there."""
    instance = topology.by_id.get(instance_id)
    seen = instance.seen if instance is not None else ()
    return next((s for s in seen if s.server.id.life == server.life), None)


def survived(topology: Topology, instance_id: str, server: ServerId, since: float) -> bool | None:
    """Whether a server is still in the same life after an incident.

    since: when the incident happened: monotonic seconds.
    Returns None while that is unknown: the server was not asked since, or does not accept connections yet.
    """
    instance = topology.by_id.get(instance_id)
    if instance is None:
        return False
    seen = behind(topology, instance_id, server)
    if seen is not None:
        return True if seen.asked_at > since else None
    return None if instance.silence is Silence.NOT_NOW or instance.heard_at <= since + SETTLES else False


def forget(topology: Topology, instance_id: str, server: ServerId) -> Topology:
    """Forget a server behind an instance, because the instance's name no longer leads there."""
    old = topology.by_id.get(instance_id)
    if old is None or all(seen.server.id != server for seen in old.seen):
        return topology
    left = tuple(seen for seen in old.seen if seen.server.id != server)
    return _settle(topology, _swap(topology, old._replace(seen=left, error="the name leads elsewhere")))


def _settle(topology: Topology, instances: tuple[Instance, ...]) -> Topology:
    """Elect the writer and derive what each instance may be used for."""
    epoch = topology.epoch
    peak = max(topology.peak, epoch)
    samples = topology.samples if topology.samples and topology.samples[-1].position.epoch == epoch else ()
    last = samples[-1].position if samples else None
    deposed = {*topology.deposed}
    # Lives of servers that accept writes in the newest epoch, but were deposed before.
    barred: set[object] = set()
    claims: dict[object, tuple[str, Seen]] = {}  # one entry for each server, under the first of its names
    for instance in instances:
        for seen in instance.seen:
            server = seen.server
            if server.role is not Role.WRITER or instance.reader_only:
                continue
            if server.epoch < epoch:
                deposed.add(server.id.place)
            elif (server.epoch < peak and server.id.place in topology.deposed) or _predates(server, last):
                barred.add(server.id.life)
            else:
                claims.setdefault(server.id.life, (instance.id, seen))
    found = _elect([*claims.values()])
    elected = None if found is None else (found[0], found[1].server.id)
    if found is not None:
        instances = tuple(_compared(i, found[1], last) for i in instances)
        if topology.elected is not None:
            deposed.add(topology.elected.place)
        deposed.discard(found[1].server.id.place)
    settled = tuple(_derive(instance, epoch, elected, barred) for instance in instances)
    writer = next((i for i in settled if i.role is Role.WRITER), None)
    if writer is not None and writer.position is not None:
        asked_at = max(seen.asked_at for seen in writer.seen if seen.server.id in writer.servers)
        if samples and not writer.position.covers(samples[-1].position):
            # The writes of earlier writers in this epoch were lost with them, so no reader will ever have them.
            samples = ()
        if not samples or asked_at > samples[-1].asked_at:
            samples = (*samples[-SAMPLES + 1 :], Sample(asked_at, writer.position))
    return Topology(
        instances=settled,
        writer=writer,
        readers=tuple(i for i in settled if i.role is Role.READER),
        ambiguous=tuple(sorted(at for at, _ in claims.values())) if claims and elected is None else (),
        epoch=epoch,
        cluster=topology.cluster if elected is None else elected[1].cluster,
        samples=samples,
        elected=topology.elected if elected is None else elected[1],
        deposed=frozenset(deposed),
        peak=peak,
        by_id={i.id: i for i in settled},
        isolation=next((i.seen[0].server.isolation for i in settled if i.seen), None),
    )


def _predates(server: Server, last: Position | None) -> bool:
    return last is not None and server.position is not None and server.position.predates(last)


def _elect(claims: list[tuple[str, Seen]]) -> tuple[str, Seen] | None:
    """The writer, and its instance, among the servers that accept writes in the newest epoch; None if it is undecided."""
    for at, seen in claims:
        position = seen.server.position
        others = [other.server.position for _, other in claims if other is not seen]
        if not others or (position is not None and all(other is not None and position.outdoes(other) for other in others)):
            return at, seen
    return None


def _compared(instance: Instance, writer: Seen, last: Position | None) -> Instance:
    """The instance, with the transactions of its readers compared to the writer's answer.

    last: the last position of the writer before that answer.
    """
    position = writer.server.position
    if position is None:
        return instance
    began_anew = last is not None and position.lacks(last)

    def compared(seen: Seen) -> Seen:
        has, ahead, confirmed = seen.server.position, seen.ahead, seen.confirmed
        if has is None or seen.server.role is not Role.READER:
            return seen
        if ahead is not None and not position.lacks(ahead.position):
            ahead, confirmed = None, True
        if ahead is None and position.lacks(has):
            ahead = Ahead(has, seen.asked_at + seen.latency)
        confirmed = confirmed or ahead is None
        strays = (began_anew and not position.covers(has)) or (ahead is not None and ahead.told_at <= writer.asked_at)
        astray = seen.astray or strays
        if confirmed == seen.confirmed and ahead is seen.ahead and astray == seen.astray:
            return seen
        return seen._replace(confirmed=confirmed, ahead=ahead, astray=astray)

    servers = tuple(compared(seen) for seen in instance.seen)
    return instance if servers == instance.seen else instance._replace(seen=servers)


def _derive(instance: Instance, epoch: int, elected: tuple[str, ServerId] | None, barred: Collection[object]) -> Instance:
    """The instance, with role, position and lag derived from its servers and the election."""
    role: Role | None
    if elected is not None and instance.id == elected[0]:
        role = Role.WRITER
        use = tuple(s for s in instance.seen if s.server.id == elected[1])
    else:
        replaying = (s for s in instance.seen if s.server.role is Role.READER and not s.server.stopped)
        use = () if _held(instance) else tuple(replaying)
        role = Role.READER if use else None
    lags = [s.server.lag for s in use if s.server.lag is not None]
    unproven = next((why for s in use if (why := _unproven(s))), "") if use else instance.unproven
    return instance._replace(
        role=role,
        error="" if role is not None else _unused(instance, epoch, elected, barred),
        position=None if instance.pooled or unproven else minimum(tuple(_proof(s) for s in use)),
        unproven=unproven,
        lag=max(lags) if lags and len(lags) == len(use) else None,
        latency=max((s.latency for s in use), default=0.0),
        servers=frozenset(s.server.id for s in use),
        epoch=max((s.server.epoch for s in instance.seen), default=0),
    )


def _unproven(seen: Seen) -> str:
    """Why a server's answers do not prove that it has what a session has written; "" if they do."""
    if seen.astray:
        return (
            "it has transactions of the writer's that the writer has not, as after RESET MASTER there; "
            "make it anew from the writer, and restart it"
        )
    return seen.server.unproven


def _proof(seen: Seen) -> Position | None:
    """The position by which a server proves that it has what a session has written; None if it proves nothing yet.

    Every later position of a confirmed reader is a proof: the reader may be further than the writer's last answer. An
    unconfirmed reader may follow another log. It proves nothing while it has what the writer is not yet seen to have.
    """
    return seen.server.position if seen.confirmed or seen.ahead is None else None


def hold(losses: int) -> float:
    """Seconds for which a reader must answer before it is used again, after so many losses."""
    return 0.0 if losses < 2 else min(2.0 ** min(losses - 2, 10), LONGEST_HOLD)


def _held(instance: Instance) -> bool:
    """Whether the instance answers, but has not yet done so for long enough."""
    return bool(instance.seen) and max(s.asked_at for s in instance.seen) - instance.back_at < hold(instance.losses)


def _unused(instance: Instance, epoch: int, elected: tuple[str, ServerId] | None, barred: Collection[object]) -> str:
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
    if any(s.server.id.life in barred for s in instance.seen):
        return "deposed: it still accepts writes, but lacks some of a writer that came after it"
    if elected is None:
        return "accepts writes, and so does another instance of the same epoch"
    if any(s.server.id.life == elected[1].life for s in instance.seen):
        return f"the writer under another name, used as {elected[0]}"
    return f"deposed: it still accepts writes, but {elected[0]} does so, too, and is newer: it has all that this one has"
