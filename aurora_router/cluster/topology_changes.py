"""Apply a new topology: discard the connections that it makes useless, and collect the news of what has changed."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import NamedTuple

from aurora_router.cluster.engines import Engines
from aurora_router.core import events
from aurora_router.core.instance import Instance, ProbeFailure, Role
from aurora_router.core.topology import Topology

log = logging.getLogger("aurora_router")

MIXED = (
    "%s: one and the same connection has led to different servers. So positions prove nothing there, and sessions that have "
    "written stay on the writer for pin_seconds. If somebody has set server_id there, make a new router. Otherwise a pooler "
    "there chooses between servers: go around it"
)


def apply(
    engines: Engines, publish: Callable[[events.Event], None], old: Topology, new: Topology, published_at: float
) -> list[Callable[[], object]]:
    """Discard the connections that the new topology makes useless, and return the news: functions to be called in order.

    Connections made since `published_at` stay, because they were checked against this topology or a newer one.

    publish: called with an event; must not raise.
    published_at: seconds, monotonic.
    """
    news: list[Callable[[], object]] = []

    def tell(event: events.Event) -> None:
        news.append(partial(publish, replace(event, at=time.time())))  # it may be told later

    for was in old.instances:
        now = new.by_id.get(was.id)
        useless = _useless(was, now, published_at)
        if useless is not None:
            sockets = 0
            with _discarding(was.id):
                sockets = engines.evict(was.id, shut_down_before=useless.shut_down_before)
            tell(events.ConnectionsDiscarded(was.id, sockets, useless.reason))
        elif now is not None and was.role is not None and was.role is not now.role:
            with _discarding(was.id):
                engines.leave_role(was)
        if now is not None and was.healthy and not now.healthy:
            tell(events.InstanceDown(was.id, new.why_unused(now)))
    for now in new.instances:
        before = old.by_id.get(now.id)
        event = _came(before, now, new)
        if event is not None:
            tell(event)
        news += _warnings(before, now)
    if old.cluster is not None and new.cluster is not None and old.cluster != new.cluster:
        renamed = "the cluster %s is called %s now; tokens with the old name are refused"
        news.append(partial(log.warning, renamed, old.cluster, new.cluster))
    was_writer, is_writer = (topology.writer.id if topology.writer is not None else None for topology in (old, new))
    if was_writer != is_writer:
        tell(events.WriterChanged(was_writer, is_writer, new.epoch))
    return news


class _Useless(NamedTuple):
    """Why the pool of an instance is evicted.

    shut_down_before: the connections in use that were made before this time (seconds, monotonic) lead nowhere, so they are shut
        down. None if all connections in use are still good.
    """

    reason: str
    shut_down_before: float | None = None


def _useless(was: Instance, now: Instance | None, published_at: float) -> _Useless | None:
    if now is None:
        return _Useless("removed")
    if was.healthy and not now.healthy:
        return _Useless(now.error, published_at)
    if was.role is now.role and was.servers != now.servers and _runs(was) == _runs(now):
        return _Useless("its cluster has another name")
    if was.servers and now.servers.isdisjoint(was.servers):
        places = {(server.address, server.port) for server in now.servers}
        over = all((server.address, server.port) in places for server in was.servers)  # same places, but restarted
        reason = "it was restarted" if over else "the name leads to another server"
        return _Useless(reason, published_at if over or was.role is not now.role else None)
    return None


def _came(before: Instance | None, now: Instance, topology: Topology) -> events.Event | None:
    if now.role is not None and (before is None or before.role is not now.role):
        return events.InstanceUp(now.id, now.role.value)
    if now.role is None and now.probed and (before is None or _is_new_trouble(before, now)):
        return events.InstanceDown(now.id, topology.why_unused(now))
    return None


@contextlib.contextmanager
def _discarding(instance_id: str) -> Iterator[None]:
    try:
        yield
    except BaseException:
        # An application's listener on the pool has raised this. The pools of other instances must still be discarded.
        log.exception("the connections to %s were not discarded completely", instance_id)


def _warnings(before: Instance | None, now: Instance) -> Iterator[Callable[[], object]]:
    if now.unproven and (before is None or before.unproven != now.unproven):
        served = "no reader serves a" if now.role is Role.WRITER else "it serves no"
        yield partial(log.warning, "%s: %s session that has written: %s", now.id, served, now.unproven)
    if now.pooled and not (before is not None and before.pooled):
        yield partial(log.warning, MIXED, now.id)


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
