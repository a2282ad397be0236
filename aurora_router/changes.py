"""Apply a new topology: discard the connections that it makes useless, and collect the news of what has changed."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

from aurora_router.core import events
from aurora_router.core.topology import Instance, Role, Topology
from aurora_router.engines import Engines

log = logging.getLogger("aurora_router")

MIXED = (
    "%s: one and the same connection has led to different servers: positions prove nothing there, and sessions that have written "
    "stay on the writer for pin_seconds. If somebody has set server_id there, make a new router; otherwise a pooler stands there "
    "that chooses between servers: go around it"
)


def take_in(
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

    @contextlib.contextmanager
    def discarding(instance_id: str) -> Iterator[None]:
        try:
            yield
        except BaseException:
            # An application's listener on the pool has raised this. The pools of other instances must still be discarded.
            log.exception("the connections to %s were not discarded completely", instance_id)

    def discard(instance_id: str, reason: str, cut_before: float | None = None) -> None:
        sockets = 0
        with discarding(instance_id):
            sockets = engines.discard(instance_id, cut_before=cut_before)
        tell(events.ConnectionsDiscarded(instance_id, sockets, reason))

    for was in old.instances:
        now = new.by_id.get(was.id)
        if now is None:
            discard(was.id, "removed")
        elif was.healthy and not now.healthy:
            discard(was.id, now.error, published_at)
            tell(events.InstanceDown(was.id, new.trouble(now)))
        elif was.role is now.role and was.servers != now.servers and _runs(was) == _runs(now):
            discard(was.id, "its cluster has another name")  # the connections in use are still good
        elif was.servers and now.servers.isdisjoint(was.servers):
            places = {(server.address, server.port) for server in now.servers}
            over = all((server.address, server.port) in places for server in was.servers)  # same places, but restarted
            reason = "it was restarted" if over else "the name leads to another server"
            cut = over or was.role is not now.role
            discard(was.id, reason, published_at if cut else None)
        elif was.role is not None and was.role is not now.role:
            with discarding(was.id):
                engines.leave_role(was)
    for now in new.instances:
        before = old.by_id.get(now.id)
        if now.role is not None and (before is None or before.role is not now.role):
            tell(events.InstanceUp(now.id, now.role.value))
        elif now.role is None and now.probed and (before is None or _is_new_trouble(before, now)):
            tell(events.InstanceDown(now.id, new.trouble(now)))
        if now.unproven and (before is None or before.unproven != now.unproven):
            served = "no reader serves a" if now.role is Role.WRITER else "it serves no"
            news.append(partial(log.warning, "%s: %s session that has written: %s", now.id, served, now.unproven))
        if now.pooled and not (before is not None and before.pooled):
            news.append(partial(log.warning, MIXED, now.id))
    if old.cluster is not None and new.cluster is not None and old.cluster != new.cluster:
        renamed = "the cluster %s is called %s now; tokens with the old name are refused"
        news.append(partial(log.warning, renamed, old.cluster, new.cluster))
    was_writer = old.writer.id if old.writer is not None else None
    is_writer = new.writer.id if new.writer is not None else None
    if was_writer != is_writer:
        tell(events.WriterChanged(was_writer, is_writer, new.epoch))
    return news


def _runs(instance: Instance) -> set[object]:
    return {server.run for server in instance.servers}


def _is_new_trouble(before: Instance, now: Instance) -> bool:
    """Whether an instance without a role was probed for the first time, or belongs to another cluster by now."""
    return not before.probed or (not before.healthy and now.foreign is not None and now.foreign != before.foreign)
