"""The frozen picture of all instances at one moment, and the functions that change it. The main one is observe().

Rules:
- An observation is dropped if it was asked for before the newest one of the same server.
- A known server keeps its place if its cluster gets another name. Any other server of another cluster is a stranger: it serves
  nothing, and the server that stood at its place is forgotten.
- The epoch goes back only if the writer itself says so, because its log was begun anew. Deposed servers stay deposed.
- A silent probe makes an instance suspect. The second in a row, or a refused connection, takes the instance out of use.
- After each change the writer is elected, and each instance gets its role: election.py.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field, replace

from aurora_router.core.election import FLAP_WINDOW, behind_filters, claims, compare, derive, elect
from aurora_router.core.instance import Instance, Location, Observation, ProbeFailure, Role, ServerId, ServerStatus, TrackedServer
from aurora_router.core.positions import Position, Sample
from aurora_router.core.watching import News

# How many positions of the writer are kept: about 13 s with a probe every 50 ms, more than 4 min with one a second.
SAMPLES = 256
# For so many seconds after a crash, a server that will recover may break connections instead of refusing them.
SETTLES = 0.1
# Seconds after which a lost server of the old cluster no longer keeps a new cluster under the same names from being accepted.
GONE_AFTER = 30.0
MISSES = 2  # silent probes in a row that take an instance out of use


@dataclass(frozen=True, slots=True)
class Topology:
    """All instances at one moment. Only the functions of this module change it, and they return a new one.

    instances: in the order in which you named them.
    writer: the instance that takes writes, if one does.
    readers: the healthy readers.
    ambiguous: the instances that accept writes, if nothing shows which one is newer.
    epoch: the newest; 0 before the first answer.
    cluster: the identity of the cluster; None if it is unknown.
    samples: positions of the writer in this epoch, oldest first.
    elected: the server that was the writer last.
    deposed: the locations of servers that accepted writes before the elected one, and were not seen as readers since.
    highest_epoch: the highest epoch ever seen.
    by_id: the instances by their ids.
    isolation: the default isolation level of the writer, or of the last one if there is none. Before the first writer it is any
        server's. None if none has answered.
    """

    instances: tuple[Instance, ...] = ()
    writer: Instance | None = None
    readers: tuple[Instance, ...] = ()
    ambiguous: tuple[str, ...] = ()
    epoch: int = 0
    cluster: str | None = None
    samples: tuple[Sample, ...] = ()
    elected: ServerId | None = None
    deposed: frozenset[Location] = frozenset()
    highest_epoch: int = 0
    by_id: dict[str, Instance] = field(default_factory=dict, compare=False, repr=False)
    isolation: str | None = None

    def __iter__(self) -> Iterator[Instance]:
        return iter(self.instances)

    @property
    def probed(self) -> bool:
        """Whether every instance has been probed at least once."""
        return all(instance.probed for instance in self.instances)

    @property
    def misconfigured(self) -> tuple[Instance, ...]:
        """The instances at which somebody must change something before there is a writer; empty if waiting may help.

        They are all instances that could be the writer. A reader may be promoted, but while it is a reader, the writer is another
        instance. An instance of another cluster could be the writer only if there are no readers.
        """
        idle = tuple(i for i in self.instances if not (i.role is Role.READER or i.reader_only or (i.is_foreign and self.readers)))
        wrong = self.writer is None and all(i.probe_failure is ProbeFailure.MISCONFIGURED for i in idle)
        return idle if wrong else ()

    @property
    def successor(self) -> str | None:
        """The one other cluster that all instances that answer say they belong to; None if there is none.

        A server of this cluster that was lost a moment ago may come back, and may be the only one at its right place.
        """
        answering = [instance for instance in self.instances if instance.tracked or instance.is_foreign]
        found = {instance.foreign_cluster for instance in answering}
        newest = max((instance.last_observed_at for instance in answering), default=0.0)
        may_return = any(i not in answering and newest - i.lost_at < GONE_AFTER for i in self.instances)
        return found.pop() if len(found) == 1 and self.probed and not may_return else None

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

    def why_unused(self, instance: Instance) -> str:
        """Return why an instance is not used, and what to do if it is of another cluster."""
        return instance.error + self._advice(instance)

    def _advice(self, instance: Instance) -> str:
        if instance.foreign_cluster is None:
            return ""
        if self.successor is None:
            renamed = (
                "; if only the name of its cluster was changed (gtid_domain_id, or the name of a group), change it here, too"
            )
            # No server changes PostgreSQL's system identifier.
            return f"; check where its name leads{'' if instance.foreign_cluster.isdigit() else renamed}"
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
            deposed=topology.deposed - {server.id.location} if follows else topology.deposed,
        ),
        _swap(topology, new),
    )


def reset(topology: Topology) -> Topology:
    """Forget all that is known of the instances, because their cluster was made anew."""
    new = Topology()
    for i in topology.instances:
        new = add(new, Instance(i.id, i.host, i.port, i.reader_only))
    return new


def _is_member(topology: Topology, server: ServerId) -> bool:
    """Whether a server is of this cluster. A known server is, too, if only the name of its cluster has changed."""
    if topology.cluster is None or server.cluster == topology.cluster:
        return True
    if server.cluster.isdigit():
        # This is PostgreSQL's system identifier. No server changes it while it runs.
        return False
    known = [seen.server.id.process for instance in topology.instances for seen in instance.tracked]
    return server.process in known or (topology.elected is not None and server.process == topology.elected.process)


def _estranged(old: Instance, observation: Observation, server: ServerId, cluster: str | None) -> Instance:
    """The instance after the answer of a server of another cluster.

    The server that was known at that place is forgotten. Only a reader endpoint may have other servers, and those stay.
    """
    if observation.asked_at <= old.last_observed_at:
        return old
    left = tuple(s for s in old.tracked if old.reader_only and s.server.id.location != server.location)
    return old._replace(
        tracked=left,
        foreign_cluster=server.cluster,
        error=f"belongs to another cluster ({server.cluster}, not {cluster})",
        probe_failure=ProbeFailure.MISCONFIGURED,
        last_observed_at=observation.asked_at,
    )


def _placed(server: ServerStatus, last: Position | None, newest: int) -> ServerStatus:
    """The server in the epoch that its position shows. last: the last position of the writer."""
    if last is None or server.position is None or (server.role is Role.WRITER and server.epoch >= newest):
        return server
    position = server.position.with_epoch_of(last)
    if position is server.position:
        return server
    return server._replace(position=position, epoch=newest if server.role is Role.WRITER else server.epoch)


def _forgot(server: ServerStatus, last: Position | None) -> bool:
    """Whether this is the last writer, which may have forgotten its epoch. Then the epoch that it gives counts."""
    return server.role is Role.WRITER and last is not None and server.position is not None and server.position.may_continue(last)


def _swap(topology: Topology, new: Instance) -> tuple[Instance, ...]:
    return tuple(new if instance.id == new.id else instance for instance in topology.instances)


def _answered(old: Instance, observation: Observation, server: ServerStatus) -> Instance:
    # A server at the same address is the same server or a newer life of it, so it replaces the known one.
    place = (server.id.address, server.id.port)
    known = next((s for s in old.tracked if (s.server.id.address, s.server.id.port) == place), None)
    newest = old.last_observed_at if known is None else max(known.asked_at, known.missed_at)
    if newest >= observation.asked_at:
        return old  # the server was silent since, or a newer answer is known
    latency = max(observation.answered_at - observation.asked_at, 0.0)
    seen = TrackedServer(server, observation.asked_at, latency)
    if known is not None and _goes_on(known.server, server):
        seen = seen._replace(confirmed=known.confirmed, ahead=known.ahead, has_diverged=known.has_diverged)
    return old._replace(
        tracked=(*(s for s in old.tracked if s is not known), seen),
        probe_failure=None,
        foreign_cluster=None,
        last_observed_at=max(old.last_observed_at, observation.asked_at),
        pooled=old.pooled or observation.pooled,
        recovered_at=observation.asked_at if old.lost_at > old.recovered_at else old.recovered_at,
    )


def _goes_on(before: ServerStatus, now: ServerStatus) -> bool:
    """Whether a server is in the same life as before, and still has all that it had."""
    if before.position is None or now.position is None or before.id.incarnation != now.id.incarnation:
        return False
    return now.position.covers_ignoring_epoch(before.position)


def _failed(old: Instance, observation: Observation) -> Instance:
    # If the servers cannot be told apart, the silence of one counts for all.
    about = old.tracked if old.pooled else tuple(s for s in old.tracked if s.server.id == observation.about)
    if old.tracked and not about:
        # One more connection could not be made, but the servers that are known still answer.
        return old
    if observation.asked_at < old.last_observed_at if not about else any(_is_late(s, observation) for s in about):
        return old
    misses = 1 if observation.probe_failure is ProbeFailure.TIMEOUT else MISSES
    left = tuple(
        s._replace(missed_probes=s.missed_probes + misses, missed_at=observation.asked_at) if s in about else s
        for s in old.tracked
        if s not in about or s.missed_probes + misses < MISSES
    )
    if old.tracked and not left:
        calm = observation.asked_at - old.lost_at > FLAP_WINDOW
        old = old._replace(flap_count=1 if calm else old.flap_count + 1, lost_at=observation.asked_at)
    return old._replace(
        tracked=left,
        error="" if left else observation.error,
        probe_failure=None if left else observation.probe_failure,
        foreign_cluster=None,
        last_observed_at=max(old.last_observed_at, observation.asked_at),
    )


def _is_late(seen: TrackedServer, observation: Observation) -> bool:
    # One probe may be reported twice, with the same asked_at: first as overdue, then as refused.
    return seen.asked_at >= observation.asked_at or seen.missed_at > observation.asked_at


def find_server(topology: Topology, instance_id: str, server: ServerId) -> TrackedServer | None:
    """Return the last answer of this server behind this instance; None if the server does not stand there."""
    instance = topology.by_id.get(instance_id)
    seen = instance.tracked if instance is not None else ()
    return next((s for s in seen if s.server.id.incarnation == server.incarnation), None)


def survived(topology: Topology, instance_id: str, server: ServerId, since: float) -> bool | None:
    """Return whether a server is still in the same life after an incident.

    since: when the incident happened: monotonic seconds.
    Returns None while that is unknown: the server was not asked since, or does not accept connections yet.
    """
    instance = topology.by_id.get(instance_id)
    if instance is None:
        return False
    seen = find_server(topology, instance_id, server)
    if seen is not None:
        return True if seen.asked_at > since else None
    return None if may_recover(instance) or instance.last_observed_at <= since + SETTLES else False


def may_recover(instance: Instance) -> bool:
    """Return whether the server of an instance may be recovering from a crash.

    A reader of PostgreSQL may let clients in before it has replayed all that it had before the crash. It may lack the database
    until then, so it looks misconfigured.
    """
    return instance.probe_failure in (ProbeFailure.NOT_NOW, ProbeFailure.MISCONFIGURED)


def forget_server(topology: Topology, instance_id: str, server: ServerId) -> Topology:
    """Forget a server behind an instance, because the instance's name no longer leads there."""
    old = topology.by_id.get(instance_id)
    if old is None or all(seen.server.id != server for seen in old.tracked):
        return topology
    left = tuple(seen for seen in old.tracked if seen.server.id != server)
    return _settle(topology, _swap(topology, old._replace(tracked=left, error="the name leads elsewhere")))


def after_news(topology: Topology, news: Iterable[News]) -> Topology:
    """Return the topology after the news of one probe."""
    for each in news:
        if isinstance(each, Observation):
            topology = observe(topology, each)
        else:
            topology = forget_server(topology, each.instance, each.server)
    return topology


def _settle(topology: Topology, instances: tuple[Instance, ...]) -> Topology:
    """Elect the writer and derive what each instance may be used for."""
    epoch = topology.epoch
    highest_epoch = max(topology.highest_epoch, epoch)
    samples = topology.samples if topology.samples and topology.samples[-1].position.epoch == epoch else ()
    last = samples[-1].position if samples else None
    found = claims(instances, epoch, highest_epoch, topology.deposed, last)
    writer = elect(found.candidates)
    deposed = topology.deposed | found.outdated
    if writer is not None:
        instances = tuple(compare(i, writer.tracked, last) for i in instances)
        before = frozenset() if topology.elected is None else {topology.elected.location}
        deposed = (deposed | before) - {writer.server.location}
    filtered = behind_filters(instances)
    settled = tuple(derive(i, epoch, writer, found.disqualified, filtered) for i in instances)
    serving = next((i for i in settled if i.role is Role.WRITER), None)
    return Topology(
        instances=settled,
        writer=serving,
        readers=tuple(i for i in settled if i.role is Role.READER),
        ambiguous=tuple(sorted(claim.at for claim in found.candidates)) if writer is None else (),
        epoch=epoch,
        cluster=topology.cluster if writer is None else writer.server.cluster,
        samples=samples if serving is None else _sampled(samples, serving),
        elected=topology.elected if writer is None else writer.server,
        deposed=deposed,
        highest_epoch=highest_epoch,
        by_id={i.id: i for i in settled},
        isolation=writer.tracked.server.isolation if writer is not None else topology.isolation or _any_level(settled),
    )


def _any_level(instances: tuple[Instance, ...]) -> str | None:
    return next((i.tracked[0].server.isolation for i in instances if i.tracked), None)


def _sampled(samples: tuple[Sample, ...], writer: Instance) -> tuple[Sample, ...]:
    """The samples of the writer's positions, with its newest one."""
    if writer.position is None:
        return samples
    asked_at = max(seen.asked_at for seen in writer.tracked if seen.server.id in writer.servers)
    if samples and not writer.position.covers(samples[-1].position):
        # The writes of earlier writers in this epoch were lost with them, so no reader will ever have them.
        samples = ()
    if not samples or asked_at > samples[-1].asked_at:
        samples = (*samples[-SAMPLES + 1 :], Sample(asked_at, writer.position))
    return samples
