"""Apply a new topology: discard the connections that it makes useless, and collect the news of what has changed.

`core/consequences` decides what that is.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

from aurora_router.cluster.engines import Engines
from aurora_router.core import events
from aurora_router.core.consequences import Evict, LeaveRole, Warn, after_change
from aurora_router.core.topology import Topology

log = logging.getLogger("aurora_router")


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

    for step in after_change(old, new, published_at):
        match step:
            case Evict(instance_id, reason, shut_down_before):
                sockets = 0
                with _discarding(instance_id):
                    sockets = engines.evict(instance_id, shut_down_before=shut_down_before)
                tell(events.ConnectionsDiscarded(instance_id, sockets, reason))
            case LeaveRole(was):
                with _discarding(was.id):
                    engines.leave_role(was)
            case Warn(message, values):
                news.append(partial(log.warning, message, *values))
            case event:
                tell(event)
    return news


@contextlib.contextmanager
def _discarding(instance_id: str) -> Iterator[None]:
    try:
        yield
    except BaseException:
        # An application's listener on the pool has raised this. The pools of other instances must still be discarded.
        log.exception("the connections to %s were not discarded completely", instance_id)
