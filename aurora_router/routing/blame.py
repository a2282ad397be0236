"""Statements that fail on every server. A retry would crash every server in turn."""

from __future__ import annotations

import time
from typing import Any

from aurora_router.cluster.monitor import Monitor
from aurora_router.core.failures import MAX_BROKEN, Blame, Failure, blame
from aurora_router.core.sql.lexer import without_notes
from aurora_router.routing.retry_context import Trouble
from aurora_router.routing.unit import Unit
from aurora_router.servers import ServerFamily

_ALIVE = "the server is alive, and has ended the connection"


def breaks_everywhere(unit: Unit, failure: Failure) -> bool:
    """Return whether a statement that broke its instance would break the next instance, too.

    True for the second broken instance. True at once on the writer, because no other server could run the statement.
    """
    trouble = _meets(unit, failure)
    return unit.place.on_writer or (trouble is not None and trouble.times > MAX_BROKEN)


def loses_everywhere(
    unit: Unit, failure: Failure, code: Any, server: ServerFamily, monitor: Monitor, seconds_to_recover: float
) -> str | None:
    """Say why a statement that lost its connection would lose the next one, too. None if there is no such reason.

    - It was killed outside of an attempt of run_transaction(), and its server is alive.
    - This is the second time, and the servers survived both times.
    - This is the third time, whatever has become of the servers.

    code: the code of the error.
    seconds_to_recover: seconds to wait for a server that is recovering, unless the attempt has a deadline.
    """
    before, now = _last(unit), _meets(unit, failure)
    if now is None:
        return None  # nobody retries it
    is_killed = unit.intent.retry is None and code in server.KILLED
    match blame(now.times, is_killed=is_killed, is_first=before is None):
        case Blame.NOBODY:
            return None
        case Blame.STATEMENT:
            return f"the same statement has lost its connection {now.times} times"
        case Blame.IF_ALIVE:
            return _ALIVE if monitor.confirm_role(now.instance, now.server) is not None else None
        case Blame.IF_SURVIVED:
            until = unit.intent.retry.deadline if unit.intent.retry is not None else None
            if until is None:
                until = now.at + seconds_to_recover
            losses = [now] if before is None else [before, now]
            return _ALIVE if all(monitor.survived(each.instance, each.server, each.at, until) for each in losses) else None


def _meets(unit: Unit, failure: Failure) -> Trouble | None:
    """Record that the unit's statement met a failure, and return the record. None if nobody retries the statement."""
    if (
        unit.place.instance is None
        or unit.place.server is None
        or not (unit.intent.owned_by_session or unit.intent.retry is not None)
    ):
        return None
    before = _last(unit)
    sql = without_notes(unit.last_sql or "")
    again = before is not None and (before.sql, before.failure) == (sql, failure)
    times = before.times + 1 if before is not None and again else 1
    unit.trouble = Trouble(sql, failure, unit.place.instance.id, unit.place.server, time.monotonic(), times)
    if unit.intent.retry is not None:
        unit.intent.retry.trouble = unit.trouble
    return unit.trouble


def _last(unit: Unit) -> Trouble | None:
    """The last trouble of the unit, or else of its attempt and the attempts before."""
    return unit.trouble or (unit.intent.retry.trouble if unit.intent.retry is not None else None)
