"""What follows from a new topology: which connections are useless, and which news there is. This module is pure."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, TypeAlias

from aurora_router.core import events
from aurora_router.core.instance import Instance, ProbeFailure, Role
from aurora_router.core.topology import Topology

MIXED = (
    "%s: one and the same connection has led to different servers. So positions prove nothing there, and sessions that have "
    "written stay on the writer for pin_seconds. If somebody has set server_id there, make a new router. Otherwise a pooler "
    "there chooses between servers: go around it"
)
RENAMED = "the cluster %s is called %s now; tokens with the old name are refused"


class Evict(NamedTuple):
    """The pool of an instance must be evicted.

    shut_down_before: the connections in use that were made before this time (seconds, monotonic) lead nowhere, so they are shut
        down. None if all connections in use are still good.
    """

    instance: str
    reason: str
    shut_down_before: float | None = None


class LeaveRole(NamedTuple):
    """The connections for a former role must be discarded.

    was: the instance in that role.
    """

    was: Instance


class Warn(NamedTuple):
    """Somebody may have to change something at the servers.

    message: a text with a place for each of the values.
    """

    message: str
    values: tuple[str, ...]


Consequence: TypeAlias = Evict | LeaveRole | Warn | events.InstanceUp | events.InstanceDown | events.WriterChanged


def after_change(old: Topology, new: Topology, published_at: float) -> Iterator[Consequence]:
    """Yield what must be done and told after a change of the topology, in this order.

    published_at: when the new one was published; seconds, monotonic. Connections made since then are good, because they were
        checked against this topology or a newer one.
    """
    for was in old.instances:
        now = new.by_id.get(was.id)
        useless = _eviction(was, now, published_at)
        if useless is not None:
            yield useless
        elif now is not None and was.role is not None and was.role is not now.role:
            yield LeaveRole(was)
        if now is not None and was.healthy and not now.healthy:
            yield events.InstanceDown(was.id, new.why_unused(now))
    for now in new.instances:
        before = old.by_id.get(now.id)
        yield from _came(before, now, new)
        yield from _warnings(before, now)
    if old.cluster is not None and new.cluster is not None and old.cluster != new.cluster:
        yield Warn(RENAMED, (old.cluster, new.cluster))
    was_writer, is_writer = (topology.writer.id if topology.writer is not None else None for topology in (old, new))
    if was_writer != is_writer:
        yield events.WriterChanged(was_writer, is_writer, new.epoch)


def _eviction(was: Instance, now: Instance | None, published_at: float) -> Evict | None:
    if now is None:
        return Evict(was.id, "removed")
    if was.healthy and not now.healthy:
        return Evict(was.id, now.error, published_at)
    if was.role is now.role and was.servers != now.servers and _runs(was) == _runs(now):
        return Evict(was.id, "its cluster has another name")
    if was.servers and now.servers.isdisjoint(was.servers):
        places = {server.location for server in now.servers}
        over = all(server.location in places for server in was.servers)  # same places, but restarted
        reason = "it was restarted" if over else "the name leads to another server"
        return Evict(was.id, reason, published_at if over or was.role is not now.role else None)
    return None


def _came(before: Instance | None, now: Instance, topology: Topology) -> Iterator[Consequence]:
    if now.role is not None and (before is None or before.role is not now.role):
        yield events.InstanceUp(now.id, now.role.value)
    if now.role is None and now.probed and (before is None or _is_new_trouble(before, now)):
        yield events.InstanceDown(now.id, topology.why_unused(now))


def _warnings(before: Instance | None, now: Instance) -> Iterator[Consequence]:
    if now.unproven and (before is None or before.unproven != now.unproven):
        served = "no reader serves a" if now.role is Role.WRITER else "it serves no"
        yield Warn("%s: %s session that has written: %s", (now.id, served, now.unproven))
    if now.pooled and not (before is not None and before.pooled):
        yield Warn(MIXED, (now.id,))


def _runs(instance: Instance) -> set[object]:
    return {server.process for server in instance.servers}


def _is_new_trouble(before: Instance, now: Instance) -> bool:
    """Whether an instance without a role was probed for the first time, or now needs something else from somebody."""
    mend = _must_mend(now)
    return not before.probed or (not before.healthy and mend is not None and mend != _must_mend(before))


def _must_mend(instance: Instance) -> str | None:
    """What somebody must mend at an unused instance; None if waiting may help."""
    if instance.probe_failure is ProbeFailure.MISCONFIGURED:
        return instance.error
    # The words of the server may change with each attempt.
    return "replication" if any(seen.server.replication_error for seen in instance.tracked) else None
