"""The choice of an instance for a unit: choose(topology, need, ...) -> Decision, and the balancing strategies (functions)."""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

from aurora_router.core.instance import Instance, ServerId
from aurora_router.core.positions import LastRead, Requirement, first_sample_after
from aurora_router.core.sql.analysis import Effect
from aurora_router.core.topology import SAMPLES, Topology

# The names that a strategy of the user's own may need. Other modules of the router import more.
__all__ = ["STRATEGIES", "Balance", "Load", "Strategy", "at_random", "fastest", "least_busy", "round_robin"]

# Seconds added to a measured lag if the lag is the only evidence.
LAG_MARGIN = 0.5


class Reason(enum.Enum):
    """Why an instance was chosen, in words for a log."""

    READ = "a read: a reader that qualifies"
    DECLARED_READ_ONLY = "declared read-only: a reader that qualifies"
    NOT_A_READ = "not known to be a read: the writer"
    DECLARED_WRITE = "declared read_only=False: the writer"
    HINT = "a hint asks for the writer"
    ISOLATION = "isolation above READ COMMITTED, or, if declared read-only, above what a reader can do: the writer"
    OWN_WRITES = "no reader is known to have replayed yet what this session has written or read: the writer"
    UNPROVEN = "nothing proves that a reader has what this session has written: the writer"
    STALE_READ = "an earlier attempt of this unit read stale rows: the writer"
    NO_READER = "no reader qualifies: the writer"
    NO_WRITER = "no instance is the writer now"
    NO_INSTANCE = "no reader qualifies, and the writer is not to be used or there is none"


NoReader = Literal["writer", "error"]

_READ, _DECLARED_READ_ONLY = Reason.READ, Reason.DECLARED_READ_ONLY  # looked up for each unit


class ReadSettings(Protocol):
    """The settings that the choice of an instance obeys, as `config.settings.Settings` has and describes them."""

    @property
    def max_lag(self) -> float | None: ...
    @property
    def pin_seconds(self) -> float: ...
    @property
    def no_reader(self) -> NoReader: ...


class Need(NamedTuple):
    """The conditions that a reading unit sets for the instance that serves it.

    declared: whether the unit is declared read-only.
    requirement: what the instance must have replayed; None for nothing.
    last_reads: earlier reads. The instance must not show less than they did.
    max_lag: the greatest lag that is allowed, in seconds; None for any.
    avoid: ids of instances that have just failed this unit.
    pin_seconds: how long a requirement keeps the unit on the writer if readers give no evidence at all.
    writer_serves_reads: whether the unit goes to the writer if no reader qualifies.
    """

    declared: bool = False
    requirement: Requirement | None = None
    last_reads: Collection[LastRead] = ()
    max_lag: float | None = None
    avoid: frozenset[str] = frozenset()
    pin_seconds: float = 5.0
    writer_serves_reads: bool = True

    def of_unit(self, requirement: Requirement | None, last_reads: Collection[LastRead], avoid: frozenset[str]) -> Need:
        """Return the same need with a unit's own conditions. This takes a third of the time of `_replace()`."""
        return Need(self.declared, requirement, last_reads, self.max_lag, avoid, self.pin_seconds, self.writer_serves_reads)


def make_need(settings: ReadSettings) -> Need:
    """Return what each read needs by these settings."""
    return Need(max_lag=settings.max_lag, pin_seconds=settings.pin_seconds, writer_serves_reads=settings.no_reader == "writer")


class Decision(NamedTuple):
    """The instance for a unit, and the reason.

    instance: None if no instance will do.
    effect: the effect of the statement; None if there was none to look at.
    """

    instance: Instance | None
    reason: Reason
    effect: Effect | None = None


@dataclass(slots=True)
class Load:
    """The load of the instances.

    in_use: returns the number of connections checked out, by instance id.
    turn: a counter for taking instances in turn.
    capacity: the number of connections that the pool of one reader may have.
    """

    in_use: Callable[[str], int]
    turn: int = 0
    capacity: float = math.inf

    def has_room(self, instance_id: str) -> bool:
        """Return whether a unit would get a connection from that reader's pool without waiting."""
        return self.in_use(instance_id) < self.capacity


Balance = Callable[[Sequence[Instance], Load, float], Instance]
"""Takes the readers that qualify (never empty), the load and a random number in [0, 1). Returns one of the readers."""


def least_busy(readers: Sequence[Instance], load: Load, rnd: float) -> Instance:
    """Take the reader with the fewest connections in use. Readers with equally many come in turn."""
    best = readers[load.turn % len(readers)]
    least = load.in_use(best.id)
    if least:
        for reader in readers:
            busy = load.in_use(reader.id)
            if busy < least:
                best, least = reader, busy
    return best


def fastest(readers: Sequence[Instance], load: Load, rnd: float) -> Instance:
    """Pick two readers at random, and take the one whose last probe was faster. That spreads the load."""
    first = int(rnd * len(readers))
    second = (first + 1 + load.turn % max(len(readers) - 1, 1)) % len(readers)
    return min(readers[first], readers[second], key=lambda reader: reader.latency)


def round_robin(readers: Sequence[Instance], load: Load, rnd: float) -> Instance:
    """Take the readers one after the other."""
    return readers[load.turn % len(readers)]


def at_random(readers: Sequence[Instance], load: Load, rnd: float) -> Instance:
    """Take any reader, at random."""
    return readers[int(rnd * len(readers))]


Strategy = Literal["least_busy", "fastest", "round_robin", "random"]
STRATEGIES: Mapping[Strategy, Balance] = {
    "least_busy": least_busy,
    "fastest": fastest,
    "round_robin": round_robin,
    "random": at_random,
}


def to_writer(topology: Topology, reason: Reason, without: Reason = Reason.NO_WRITER) -> Decision:
    """Decide for the writer, with this reason. If there is no writer, decide for no instance, with the reason `without`."""
    return Decision(topology.writer, reason if topology.writer is not None else without)


def choose(topology: Topology, need: Need, balance: Balance, load: Load, rnd: float, now: float) -> Decision:
    """Choose the instance for a unit with this need.

    rnd: a random number in [0, 1).
    now: monotonic seconds.

    If a pool is full, its reader is not chosen while another one has room. A read that no reader satisfies goes to the writer.
    Reads without evidence for their session's own writes go to the writer even if `writer_serves_reads` is false. That setting
    protects the writer from the load of all readers, not from reads in the tens of milliseconds after a commit.
    """
    able: Sequence[Instance] = topology.readers
    if need.avoid or need.max_lag is not None:
        able = [r for r in able if r.id not in need.avoid and not _too_late(r, need.max_lag, now)]
    if not able:
        if not need.writer_serves_reads:
            return Decision(None, Reason.NO_INSTANCE)
        return to_writer(topology, Reason.NO_READER, Reason.NO_INSTANCE)
    if need.requirement is not None:
        able = [r for r in able if satisfies_requirement(r, need.requirement, topology, need.pin_seconds, now)]
    for last in need.last_reads:
        able = [r for r in able if satisfies_monotonic_read(r, last, topology, need.pin_seconds, now)]
    if not able:
        return to_writer(topology, Reason.UNPROVEN if _is_hopeless(topology) else Reason.OWN_WRITES)
    chosen = able[0]
    if len(able) > 1:
        chosen = balance(able, load, rnd)
        if not load.has_room(chosen.id):
            chosen = _with_room(able, chosen, balance, load, rnd)
    return Decision(chosen, _DECLARED_READ_ONLY if need.declared else _READ)


def _is_hopeless(topology: Topology) -> bool:
    """Whether no reader will ever prove what it has."""
    return (topology.writer is not None and bool(topology.writer.unproven)) or all(r.unproven for r in topology.readers)


def _with_room(able: Sequence[Instance], chosen: Instance, balance: Balance, load: Load, rnd: float) -> Instance:
    """The strategy's choice among the readers with room. If none has room, the unit waits for the reader chosen first."""
    roomy = [r for r in able if load.has_room(r.id)]
    return balance(roomy, load, rnd) if roomy else chosen


def satisfies_requirement(reader: Instance, requirement: Requirement, topology: Topology, pin_seconds: float, now: float) -> bool:
    """Return whether the reader is known to have replayed every commit of the requirement.

    A position of an older epoch is never compared. Instead, the proof is a position of the new writer that was asked for after
    the commit. So the session stays on the writer until the reader has followed.
    """
    if requirement.epoch is not None and requirement.epoch > topology.epoch:
        return False  # a token of a newer writer than any that is known here
    if reader.position is not None:
        position = requirement.position
        if position is None or position.epoch != topology.epoch:
            found = first_sample_after(topology.samples, requirement.since)
            position = found.position if found is not None else None
        if position is not None:
            return reader.position.covers(position)
        if topology.writer is None or topology.writer.position is not None:
            return False  # the writer will give a position that proves it
    if reader.unproven or (topology.writer is not None and topology.writer.unproven):
        return False
    return _is_late_enough(reader, requirement, topology, pin_seconds, now)


def _is_late_enough(reader: Instance, requirement: Requirement, topology: Topology, pin_seconds: float, now: float) -> bool:
    """Whether the reader has had the time to replay every commit of the requirement. No position proves that it has."""
    if not reader.pooled:
        used = [seen for seen in reader.tracked if seen.server.id in reader.servers]
        if any(seen.server.epoch != topology.epoch for seen in used):
            # A server that does not follow the newest writer yet gives its lag behind another one.
            return False
        if reader.lag is not None and requirement.epoch == topology.epoch:
            return requirement.acknowledged_at < min(seen.asked_at for seen in used) - reader.lag - LAG_MARGIN
    return now - requirement.acknowledged_at >= pin_seconds


def satisfies_monotonic_read(reader: Instance, last: LastRead, topology: Topology, pin_seconds: float, now: float) -> bool:
    """Return whether the reader certainly shows all that the session has read before.

    It does if it is the server of the earlier read. It also does if it has replayed a position of that server, or of the writer,
    that was asked for since.
    """
    if reader.servers == {last.server}:
        return True
    if reader.position is not None:
        for seen in (seen for instance in topology.instances for seen in instance.tracked):
            shown = seen.server.position if seen.server.id == last.server and seen.asked_at >= last.at else None
            if shown is not None and reader.position.covers(shown):
                return True
    return satisfies_requirement(reader, Requirement(last.at, last.epoch), topology, pin_seconds, now)


def shows_no_less(
    reader: Instance | None, server: ServerId | None, reads: Collection[LastRead], topology: Topology, now: float
) -> bool:
    """Return whether a unit that is on a reader certainly sees all that these reads of other units have shown.

    Positions and measured lags are evidence of that. The time since the reads is none.

    reader: its instance; None if that was removed meanwhile.
    server: the one that its connection leads to. It shows what it has shown before.
    """
    for read in reads:
        if read.server != server and (reader is None or not satisfies_monotonic_read(reader, read, topology, math.inf, now)):
            return False
    return True


def is_caught_up(topology: Topology, seconds: float) -> bool | None:
    """Return whether a reader has replayed what the writer had so many seconds before. None if nothing shows that yet.

    If no reader has, reads that must show a session's own writes have gone to the writer for so long.
    """
    found = [_has_replayed(reader, topology, seconds) for reader in topology.readers]
    return True if True in found else False if False in found else None


def _has_replayed(reader: Instance, topology: Topology, seconds: float) -> bool | None:
    samples = topology.samples
    if reader.position is None or not samples:
        return None
    if reader.position.covers(samples[-1].position):
        return True
    before = min(seen.asked_at for seen in reader.tracked) - seconds
    # If samples come so fast that none of them is old enough, the oldest one counts.
    oldest = samples[0] if len(samples) == SAMPLES else None
    sample = next((s for s in reversed(samples) if s.asked_at <= before), oldest)
    return None if sample is None else reader.position.covers(sample.position)


def with_proof(requirement: Requirement, topology: Topology) -> Requirement:
    """Return the requirement with the position that proves it in this epoch, if the topology has one by now.

    Store the result: samples expire, and a reader lagging beyond the samples would never cover the later ones.

    A token's position may claim more than the writer has, because it was made up, or because the cluster was restored. Then the
    writer's own position replaces it. The writer must have been asked after the token arrived, because the date of the token
    may be wrong.
    """
    epoch, position, given = requirement.epoch, requirement.position, requirement.is_from_token
    if position is not None and position.epoch == topology.epoch:
        newest = topology.samples[-1] if given and topology.samples else None
        if newest is None or newest.asked_at < requirement.since or newest.position.covers(position):
            return requirement
    elif given and epoch is not None and epoch > topology.epoch and not was_looked_for(requirement, topology):
        return requirement  # some instance may be the writer of that epoch
    found = first_sample_after(topology.samples, requirement.since)
    if found is None:
        return requirement
    return Requirement(requirement.since, min(epoch, topology.epoch) if epoch is not None else None, found.position)


def was_looked_for(requirement: Requirement, topology: Topology) -> bool:
    """Return whether every instance was asked for the writer of a token's epoch.

    All instances that answer must have been asked since the token arrived, and each other one must have had its first probe.
    """
    return all(i.last_observed_at >= requirement.since for i in topology.instances if i.tracked or not i.probed)


def _too_late(reader: Instance, max_lag: float | None, now: float) -> bool:
    """Whether the reader may lag by more than `max_lag`. The time since its last answer counts as lag, too."""
    if max_lag is None:
        return False
    if reader.lag is None:
        return True
    return reader.lag + max(now - min(seen.asked_at for seen in reader.tracked), 0.0) > max_lag
