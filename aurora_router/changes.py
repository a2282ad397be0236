"""What happens when one topology takes the place of another: what it makes useless is discarded, and the listeners hear of it."""

from __future__ import annotations

import logging

from aurora_router.core import events
from aurora_router.core.topology import Topology
from aurora_router.engines import Engines
from aurora_router.listeners import Listeners

log = logging.getLogger("aurora_router")


def announce(engines: Engines, emit: Listeners, old: Topology, new: Topology, published_at: float) -> None:
    """Discard the connections that the new topology makes useless, and say what happened. published_at: monotonic seconds.

    What was connected since then was proven against the new one, or a newer: who hears of it late must leave that alone.
    """

    def discard(instance_id: str, reason: str, cut_before: float | None = None) -> None:
        sockets = engines.discard(instance_id, cut_before=cut_before)
        emit(events.ConnectionsDiscarded, instance_id, sockets, reason)

    for was in old.instances:
        now = new.by_id.get(was.id)
        if now is None:
            discard(was.id, "removed")
        elif was.healthy and not now.healthy:
            discard(was.id, now.error, published_at)
            emit(events.InstanceDown, was.id, now.error)
        elif was.servers and now.servers.isdisjoint(was.servers):
            places = {(server.address, server.port) for server in now.servers}
            over = all((server.address, server.port) in places for server in was.servers)  # a newer life of the same
            reason = "it was restarted" if over else "the name leads to another server"
            cut = over or was.role is not now.role
            discard(was.id, reason, published_at if cut else None)
    for now in new.instances:
        before = old.by_id.get(now.id)
        if now.role is not None and (before is None or before.role is not now.role):
            emit(events.InstanceUp, now.id, now.role.value)
    was_writer = old.writer.id if old.writer is not None else None
    is_writer = new.writer.id if new.writer is not None else None
    if was_writer != is_writer:
        log.info("the writer is %s (was %s), epoch %d", is_writer, was_writer, new.epoch)
        emit(events.WriterChanged, was_writer, is_writer, new.epoch)
