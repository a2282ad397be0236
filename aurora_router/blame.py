"""Statements that would fail wherever they run: to repeat such a one takes one server after the other down."""

from __future__ import annotations

import time
from typing import Any

from aurora_router.core.failures import Failure
from aurora_router.monitor import Monitor
from aurora_router.servers import Family
from aurora_router.unit import Trouble, Unit

LOSSES = 3  # connections that one statement may lose
_ALIVE = "the server is alive, and has ended the connection"


def breaks_everywhere(unit: Unit) -> bool:
    """Whether a statement for which its instance has failed inside would break the next one, too: it was the second one, or the
    writer, after which there is nobody to ask."""
    trouble = _meets(unit, Failure.BROKEN)
    return unit.on_writer or (trouble is not None and trouble.times > 1)


def loses_everywhere(unit: Unit, driver: Any, code: Any, server: Family, monitor: Monitor, patience: float) -> str | None:
    """Why a statement that has lost its connection would lose the next one, too; None if it may not.

    It was killed, or this is the second time, and both times the server has survived it, or the third time, whatever has become
    of the servers. It is not to blame for what another one has done to the server.

    driver: the connection. code: of the error. patience: seconds for which a server that recovers is waited for, unless the run
    has a deadline.
    """
    if server.is_bystander(driver):
        return None
    before, now = _last(unit), _meets(unit, Failure.LOST)
    if now is None:
        return None  # nobody repeats it
    if now.times >= LOSSES:
        return f"the same statement has lost its connection {now.times} times"
    if before is None or now.times == 1:
        is_killed = unit.run is None and code in server.KILLED
        return _ALIVE if is_killed and monitor.ask_anew(now.instance, now.server) is not None else None
    until = unit.run.deadline if unit.run is not None else None
    if until is None:
        until = now.at + patience
    both = (monitor.survived(each.instance, each.server, each.at, until) for each in (before, now))
    return _ALIVE if all(both) else None


def _meets(unit: Unit, failure: Failure) -> Trouble | None:
    """Note that the statement of a unit has met a failure for which it would be repeated; None if nobody repeats it."""
    if unit.instance is None or unit.server is None or not (unit.of_session or unit.run is not None):
        return None
    before = _last(unit)
    again = before is not None and (before.text, before.failure) == (unit.text, failure)
    times = before.times + 1 if before is not None and again else 1
    unit.trouble = Trouble(unit.text, failure, unit.instance.id, unit.server, time.monotonic(), times)
    if unit.run is not None:
        unit.run.trouble = unit.trouble
    return unit.trouble


def _last(unit: Unit) -> Trouble | None:
    """What a statement of the unit, or of its run and the earlier ones, has met last."""
    return unit.trouble or (unit.run.trouble if unit.run is not None else None)
