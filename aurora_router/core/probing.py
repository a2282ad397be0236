"""The schedule of probes, and the trust in their answers, as functions of their arguments.

The monitor calls them with the times of its clocks, the simulation with the times of its own. All times are seconds of a
monotonic clock, unless they are called times of the wall clock.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple, Protocol

from aurora_router.core.instance import Instance, Observation, ProbeFailure, Role
from aurora_router.core.topology import MISSES, Topology

# If the writer is silent for this part of probe_timeout, all instances are probed fast.
LATE_FRACTION = 0.25
# If the scheduler has not run for so many seconds (at least), earlier observations do not count.
STALE_AFTER = 5.0
SHORTEST_WAIT = 0.001  # seconds for which the scheduler sleeps at least
CATALOG_INTERVAL = 30.0  # seconds between looks at the functions in the catalog
CATALOG_FAST_INTERVAL = 1.0  # the same after a call of an unknown function
PRUNE_INTERVAL = 60.0  # seconds between looks for old rows of the commit table


class ProbeSettings(Protocol):
    """The settings that probing obeys, as `config.settings.Settings` has and describes them."""

    @property
    def probe_interval(self) -> float: ...
    @property
    def position_interval(self) -> float: ...
    @property
    def probe_timeout(self) -> float: ...
    @property
    def failover_timeout(self) -> float: ...
    @property
    def max_lag(self) -> float | None: ...


class Timing(NamedTuple):
    """How often instances are probed, and how long a probe may take. All fields are seconds.

    interval, position_interval, timeout, failover_timeout: the settings `probe_interval`, `position_interval`, `probe_timeout`
        and `failover_timeout`.
    fast_interval: between two probes while something is suspect.
    queue_timeout: for a probe of a reader that may wait in a pooler's queue, because other clients have all places.
    reconnect_interval: until a name is resolved and connected to afresh.
    endpoint_reconnect_interval: the same for a reader endpoint, because other servers may stand there.
    writerless_reconnect_interval: the same without a writer, because the writer's name may lead to another server by now.
    stale_after: without a run of the scheduler, by the wall clock, after which earlier observations do not count.
    grace: in addition to `timeout`, for the first answer of each instance after that.
    """

    interval: float
    position_interval: float
    timeout: float
    failover_timeout: float
    stale_after: float = STALE_AFTER
    fast_interval: float = 0.02
    queue_timeout: float = 10.0
    reconnect_interval: float = 30.0
    endpoint_reconnect_interval: float = 5.0
    writerless_reconnect_interval: float = 0.5
    grace: float = 1.0

    @property
    def late_after(self) -> float:
        """The seconds of silence after which a writer may be lost."""
        return self.timeout * LATE_FRACTION

    @property
    def lost_after(self) -> float:
        """The seconds after which a silent server is known to be lost."""
        return MISSES * (self.timeout + self.fast_interval) + self.fast_interval


def make_timing(settings: ProbeSettings) -> Timing:
    """Return the timing of these settings.

    An answer does not prove a lag below max_lag for longer than max_lag, so probes must come more often.
    """
    interval = settings.probe_interval
    usual = Timing(interval, settings.position_interval, settings.probe_timeout, settings.failover_timeout)
    if settings.max_lag is not None:
        interval = min(interval, max(settings.max_lag / 4, usual.fast_interval))
    return usual._replace(interval=interval, stale_after=max(3 * interval, STALE_AFTER))


# -- pace and deadlines -------------------------------------------------------------------------------------------


class Demand(NamedTuple):
    """The reasons to probe sooner than is usual, at one moment.

    is_awaited: whether any thread waits for a topology.
    suspects: the instances at which something failed.
    own_since: when a thread last began to wait for an answer at once; None if none waits for that.
    shared_since: when a thread last began to wait for an answer that serves all threads; None if none waits for that.
    positions_since: when positions were last asked for.
    writerless_since: when the writer was lost, or the monitor was started.
    distrusted_at: since when observations are not trusted; None if they are.
    writer_asked_at: when the probe of the writer that is under way began; None if none is.
    """

    writerless_since: float
    is_awaited: bool = False
    suspects: Collection[str] = ()
    own_since: float | None = None
    shared_since: float | None = None
    positions_since: float = float("-inf")
    distrusted_at: float | None = None
    writer_asked_at: float | None = None


def pace(topology: Topology, instance_id: str, last_at: float, demand: Demand, timing: Timing, now: float) -> float:
    """Return the seconds between two probes of an instance.

    last_at: when the last one began.
    """
    instance = topology.by_id.get(instance_id)
    if demand.distrusted_at is not None and last_at < demand.distrusted_at:
        return timing.fast_interval
    is_writer_doubtful = _is_writer_doubtful(topology, demand, timing, now)
    if instance is None:
        return timing.fast_interval if is_writer_doubtful else timing.interval
    answers = bool(instance.tracked)
    if answers and (instance.missed_probes or instance_id in demand.suspects):
        return timing.fast_interval
    # Each probe of a misconfigured instance may be a login with a wrong password. Threads that start the router share
    # one probe, to see whether the instance was mended.
    is_hopeless = instance.probe_failure is ProbeFailure.MISCONFIGURED and not answers
    if is_writer_doubtful and not is_hopeless:
        return timing.fast_interval
    if demand.own_since is not None and instance.healthy:
        return 0.0 if last_at < demand.own_since else timing.fast_interval
    shares = answers or (is_hopeless and topology.writer is None)
    return _shared_pace(demand, last_at, timing, shares=shares, is_healthy=instance.healthy)


def _shared_pace(demand: Demand, last_at: float, timing: Timing, *, shares: bool, is_healthy: bool) -> float:
    """The seconds between two probes that serve all waiting threads."""
    is_due = demand.shared_since is not None and shares and last_at < demand.shared_since
    if is_due or (is_healthy and last_at < demand.positions_since):
        return min(timing.position_interval, timing.interval)
    return timing.interval


def _is_writer_doubtful(topology: Topology, demand: Demand, timing: Timing, now: float) -> bool:
    """Whether another server may be the writer by now. Its promotion may show before it is certain that the old writer hangs."""
    writer = topology.writer
    if writer is None:
        return demand.is_awaited or now - demand.writerless_since < timing.failover_timeout
    asked_at = demand.writer_asked_at
    is_late = asked_at is not None and now - asked_at >= timing.late_after
    return writer.id in demand.suspects or writer.missed_probes > 0 or is_late


class Reached(NamedTuple):
    """What the probes of an instance have reached.

    has_pooler: whether a pooler is known to stand before the instance.
    is_logged_in: whether the login of the newest connection was answered.
    """

    has_pooler: bool
    is_logged_in: bool


def queue_timeout(instance: Instance | None, reached: Reached, timing: Timing) -> float:
    """Return the seconds for which a probe may be silent.

    Behind a pooler the probe may wait in the queue. Then its silence says nothing of the server. The writer gets
    `failover_timeout`, because the promotion of another server also shows its loss. Nothing else shows a reader's loss.

    A pooler answers the login itself, but a server that hangs does not. So at an instance that is not used, silence after the
    login may be a queue, too.
    """
    if instance is None or not reached.has_pooler:
        return timing.timeout
    if not instance.healthy:
        return max(timing.timeout, timing.queue_timeout) if reached.is_logged_in else timing.timeout
    if instance.missed_probes:
        return timing.timeout
    return max(timing.timeout, timing.failover_timeout if instance.role is Role.WRITER else timing.queue_timeout)


def wake_at(asked_at: float | None, last_at: float, every: float, timeout: float, timing: Timing, now: float) -> float:
    """Return when the scheduler must look at an instance again.

    asked_at: when the probe that is under way began; None if none is.
    last_at: when the last probe began.
    every: the result of `pace()`.
    timeout: seconds that the probe under way has.
    """
    if asked_at is None:
        due = last_at + every
    else:
        late_at = asked_at + timing.late_after
        ends_at = late_at if late_at > now else asked_at + timeout
        due = min(ends_at, max(last_at + every, now + timing.fast_interval))
    return max(due, now + SHORTEST_WAIT)


def clears_suspicion(observation: Observation, suspected_at: float) -> bool:
    """Return whether an observation ends the suspicion of its instance. A later probe does, unless it is silent."""
    return observation.probe_failure is not ProbeFailure.TIMEOUT and suspected_at <= observation.asked_at


# -- trust --------------------------------------------------------------------------------------------------------


class Trust(NamedTuple):
    """Whether earlier observations still count. They do not if this process stood still: it was stopped, or its machine slept.

    distrusted_at: earlier observations are not trusted until all instances were observed since; None if they are trusted.
    awake_until: by the wall clock, which goes on while the process or its machine sleeps. If the scheduler runs later than that,
        the process has stood still.
    trusted_until: the end of the time in which observations count, by the wall clock.
    """

    distrusted_at: float | None = None
    awake_until: float = float("inf")
    trusted_until: float = float("inf")


def distrust(now: float) -> Trust:
    """Return the trust of a process that knows nothing for certain, as after a fork."""
    return Trust(now, trusted_until=float("-inf"))


def has_paused(trust: Trust, wall: float) -> bool:
    """Return whether the scheduler has not run for too long.

    Observations may be in doubt already, because a machine may wake for only a moment.
    """
    return wall > trust.awake_until


def is_trusted(trust: Trust, wall: float) -> bool:
    """Return whether earlier observations count now."""
    return wall <= trust.trusted_until


def is_reobserved(topology: Topology, since: float) -> bool:
    """Return whether a newer probe of each instance has ended."""
    return all(instance.last_observed_at >= since for instance in topology)


def renew_trust(trust: Trust, topology: Topology, timing: Timing, now: float, wall: float) -> Trust:
    """Return the trust after one more run of the scheduler.

    If the process stood still, the topology is doubted until each instance was observed again or has had its time.
    """
    since = now if has_paused(trust, wall) else trust.distrusted_at
    awake_until = wall + timing.stale_after
    if since is None or now - since > timing.timeout + timing.grace or is_reobserved(topology, since):
        return Trust(None, awake_until, awake_until)
    return Trust(since, awake_until, trust.trusted_until)


# -- what else is due ---------------------------------------------------------------------------------------------


def is_recheck_due(topology: Topology, instance: Instance, rechecked_at: float, timing: Timing, now: float) -> bool:
    """Return whether to find out anew where an instance's name leads.

    rechecked_at: when that was last done.
    """
    usual = timing.endpoint_reconnect_interval if instance.reader_only else timing.reconnect_interval
    return now - rechecked_at >= (timing.writerless_reconnect_interval if topology.writer is None else usual)


def is_catalog_due(topology: Topology, instance_id: str, read_at: float, *, is_wanted: bool, now: float) -> bool:
    """Return whether to read the catalog at an instance. The writer's is read, or any while there is no writer.

    read_at: when that was last done.
    is_wanted: whether a function was called that the catalog did not list then.
    """
    writer = topology.writer
    if writer is not None and writer.id != instance_id:
        return False
    return now - read_at >= (CATALOG_FAST_INTERVAL if is_wanted else CATALOG_INTERVAL)


def is_prune_due(topology: Topology, instance_id: str, pruned_at: float, now: float) -> bool:
    """Return whether to remove old rows of the commit table at an instance, which must be the writer."""
    return topology.writer is not None and topology.writer.id == instance_id and now - pruned_at >= PRUNE_INTERVAL
