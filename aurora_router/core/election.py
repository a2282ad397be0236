"""The election of the writer, and the use of each instance. topology.py applies both after each change.

Rules:
- The writer is the server of the newest epoch that accepts writes. A writer of an older epoch is deposed: it serves nothing.
- Two servers of the newest epoch may both accept writes. Then the writer is the one whose position shows that it is newer. If
  neither position shows that, there is no writer until this changes.
- A server is also deposed if its position shows that it was the writer before the last one.
- A reader that no longer replays is not used.
- A reader may have transactions of the writer that the writer itself lacks, although it was asked later. Such a reader has
  diverged: its position proves nothing.
- A reader's position proves nothing either before the writer was seen to contain it. If the writer was asked before the reader,
  its answer does not decide this.
- A reader's position proves nothing if it replicates from a reader whose log has a part only, also through others.
- A reader that was lost once is used again at its first answer. A reader that is lost again and again must first answer for some
  time, and this time doubles with each loss. The writer never waits, because without it nobody can write.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

from aurora_router.core.instance import Ahead, Instance, Location, Role, ServerId, ServerStatus, TrackedServer
from aurora_router.core.positions import Position, lowest_common

FLAP_WINDOW = 300.0  # seconds without a loss until earlier losses are forgotten
MAX_HOLD_DOWN = 60.0  # seconds


class Claim(NamedTuple):
    """A server that accepts writes in the newest epoch.

    at: the first instance behind which it was found.
    """

    at: str
    tracked: TrackedServer

    @property
    def server(self) -> ServerId:
        """The server."""
        return self.tracked.server.id


class Claims(NamedTuple):
    """What is known of the servers that accept writes.

    candidates: those that may be the writer, one claim for each.
    outdated: the locations of those of an older epoch.
    disqualified: the lives of those that are of the newest epoch, but were deposed before.
    """

    candidates: tuple[Claim, ...]
    outdated: frozenset[Location]
    disqualified: frozenset[object]


def claims(
    instances: Sequence[Instance], epoch: int, highest_epoch: int, deposed: Collection[Location], last: Position | None
) -> Claims:
    """Find the servers that accept writes.

    epoch: the newest one.
    highest_epoch: the highest epoch ever seen.
    deposed: the locations of servers that were deposed before.
    last: the last position of the writer.
    """
    candidates: dict[object, Claim] = {}
    outdated: set[Location] = set()
    disqualified: set[object] = set()
    for at, seen in ((each.id, seen) for each in instances if not each.reader_only for seen in each.tracked):
        server = seen.server
        if server.role is not Role.WRITER:
            continue
        if server.epoch < epoch:
            outdated.add(server.id.location)
        elif (server.epoch < highest_epoch and server.id.location in deposed) or _predates(server, last):
            disqualified.add(server.id.incarnation)
        else:
            candidates.setdefault(server.id.incarnation, Claim(at, seen))
    return Claims(tuple(candidates.values()), frozenset(outdated), frozenset(disqualified))


def _predates(server: ServerStatus, last: Position | None) -> bool:
    return last is not None and server.position is not None and server.position.is_of_former_writer(last)


def elect(candidates: Sequence[Claim]) -> Claim | None:
    """Find the writer among the servers that may be it; None if it is undecided."""
    for claim in candidates:
        position = claim.tracked.server.position
        others = [other.tracked.server.position for other in candidates if other is not claim]
        if not others or (position is not None and all(other is not None and position.supersedes(other) for other in others)):
            return claim
    return None


def compare(instance: Instance, writer: TrackedServer, last: Position | None) -> Instance:
    """Compare the transactions of an instance's readers to the writer's answer.

    last: the last position of the writer before that answer.
    """
    position = writer.server.position
    if position is None:
        return instance
    began_anew = last is not None and position.has_lost(last)

    def compared(seen: TrackedServer) -> TrackedServer:
        has, ahead, confirmed = seen.server.position, seen.ahead, seen.confirmed
        if has is None or seen.server.role is not Role.READER:
            return seen
        if ahead is not None and not position.has_lost(ahead.position):
            ahead, confirmed = None, True
        if ahead is None and position.has_lost(has):
            ahead = Ahead(has, seen.asked_at + seen.latency)
        confirmed = confirmed or ahead is None
        diverges = (began_anew and not position.covers(has)) or (ahead is not None and ahead.told_at <= writer.asked_at)
        has_diverged = seen.has_diverged or diverges
        if confirmed == seen.confirmed and ahead is seen.ahead and has_diverged == seen.has_diverged:
            return seen
        return seen._replace(confirmed=confirmed, ahead=ahead, has_diverged=has_diverged)

    servers = tuple(compared(seen) for seen in instance.tracked)
    return instance if servers == instance.tracked else instance._replace(tracked=servers)


def behind_filters(instances: Iterable[Instance]) -> Mapping[str | None, str]:
    """Return the readers that replicate from a reader whose log has a part only, also through others.

    Each is an address and what the log leaves out.
    """
    readers = [seen.server for each in instances for seen in each.tracked if seen.server.role is Role.READER]
    omitted: dict[str | None, str] = {reader.id.address: reader.omits for reader in readers if reader.omits}
    behind: dict[str | None, str] = {}
    while omitted:
        reached = {r.id.address: omitted[source] for r in readers for source in r.sources if source in omitted}
        omitted = {address: why for address, why in reached.items() if address not in behind}
        behind |= omitted
    return behind


def derive(
    instance: Instance,
    epoch: int,
    elected: Claim | None,
    disqualified: Collection[object],
    filtered: Mapping[str | None, str],
) -> Instance:
    """Derive role, position and lag of an instance from its servers and the election.

    epoch: the newest one.
    disqualified: the lives of servers that accept writes in the newest epoch, but were deposed before.
    filtered: see `behind_filters`.
    """
    role, use = _use(instance, elected)
    lags = [s.server.lag for s in use if s.server.lag is not None]
    unproven = next((why for s in use if (why := _unproven(s, filtered))), "") if use else instance.unproven
    return instance._replace(
        role=role,
        error="" if role is not None else _unused(instance, epoch, elected, disqualified),
        position=None if instance.pooled or unproven else lowest_common(tuple(_proof(s) for s in use)),
        unproven=unproven,
        lag=max(lags) if lags and len(lags) == len(use) else None,
        latency=max((s.latency for s in use), default=0.0),
        servers=frozenset(s.server.id for s in use),
        epoch=max((s.server.epoch for s in instance.tracked), default=0),
    )


def _use(instance: Instance, elected: Claim | None) -> tuple[Role | None, tuple[TrackedServer, ...]]:
    """The role of an instance, and those of its servers that have it."""
    if elected is not None and instance.id == elected.at:
        return Role.WRITER, tuple(s for s in instance.tracked if s.server.id == elected.server)
    replaying = tuple(s for s in instance.tracked if s.server.role is Role.READER and not s.server.replication_error)
    return (Role.READER, replaying) if replaying and not _held(instance) else (None, ())


def _unproven(seen: TrackedServer, filtered: Mapping[str | None, str]) -> str:
    """Why a server's answers do not prove that it has what a session has written; "" if they do."""
    if seen.has_diverged:
        return (
            "it has transactions of the writer's that the writer has not, as after RESET MASTER there; "
            "make it anew from the writer, and restart it"
        )
    if seen.server.role is Role.READER and seen.server.id.address in filtered:
        return f"it replicates from a reader: {filtered[seen.server.id.address]}"
    return seen.server.unproven


def _proof(seen: TrackedServer) -> Position | None:
    """The position by which a server proves that it has what a session has written; None if it proves nothing yet.

    Every later position of a confirmed reader is a proof: the reader may be further than the writer's last answer. An
    unconfirmed reader may follow another log. It proves nothing while it has transactions that
    the writer is not yet seen to have.
    """
    return seen.server.position if seen.confirmed or seen.ahead is None else None


def hold_down_seconds(losses: int) -> float:
    """Return the seconds for which a reader must answer before it is used again, after so many losses."""
    return 0.0 if losses < 2 else min(2.0 ** min(losses - 2, 10), MAX_HOLD_DOWN)


def _held(instance: Instance) -> bool:
    """Whether the instance answers, but has not yet done so for long enough."""
    return bool(instance.tracked) and max(s.asked_at for s in instance.tracked) - instance.recovered_at < hold_down_seconds(
        instance.flap_count
    )


def _unused(instance: Instance, epoch: int, elected: Claim | None, disqualified: Collection[object]) -> str:
    """Why an instance without a role has none."""
    if not instance.tracked:
        return instance.error
    readers = [s.server for s in instance.tracked if s.server.role is Role.READER]
    if readers and all(server.replication_error for server in readers):
        return f"not used, because it no longer replays: {readers[0].replication_error}"
    if readers:
        times = f"{instance.flap_count} times within {FLAP_WINDOW:g} s of each other"
        return f"answers, but was lost {times}; used again when it has answered for {hold_down_seconds(instance.flap_count):g} s"
    if all(s.server.epoch < epoch for s in instance.tracked):
        return f"deposed: it still accepts writes, but the cluster is at epoch {epoch}"
    if instance.reader_only:
        return "accepts writes, but is a reader endpoint"
    if any(s.server.id.incarnation in disqualified for s in instance.tracked):
        return "deposed: it still accepts writes, but lacks some of a writer that came after it"
    if elected is None:
        return "accepts writes, and so does another instance of the same epoch"
    if any(s.server.id.incarnation == elected.server.incarnation for s in instance.tracked):
        return f"the writer under another name, used as {elected.at}"
    return f"deposed: it still accepts writes, but {elected.at} does so, too, and is newer: it has all that this one has"
