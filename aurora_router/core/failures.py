"""The failure table: an action for each kind of failure in each phase of a unit.

This module is pure. Other modules sleep, retry and ask. docs/failures.md has this table, rendered.
"""

from __future__ import annotations

import enum
from typing import NamedTuple


class Failure(enum.Enum):
    """The kind of failure that an exception stands for. The server modules map their errors to it."""

    CONNECT = "no connection could be made"
    BUSY = "the instance has no room for one more connection"
    LOST = "the connection was lost"
    ENDED = "the connection was lost by the statement's own fault: it was killed, or is too much for a server"
    BROKEN = "the instance failed inside: its disk, its memory, an internal error"
    CONFLICT = "the reader has just not what the statement needs: replay took it away, or has not brought it"
    READ_ONLY = "the instance is read-only"
    NOT_HERE = "the instance cannot do this, as a reader or at all"
    MISSING = "the statement names something that is not there, or that the reader has not got yet"
    OUTDATED = "what the connection had prepared is out of date"
    SERIALIZATION = "the transaction could not be serialized with others"
    DEADLOCK = "the transaction was the victim of a deadlock"
    CONSTRAINT = "a key or another constraint was violated"
    MISLED = "a constraint was violated by a unit of run_transaction that had read on a reader"
    OVERTIME = "the server ended the session, because the unit took longer than its time limits allow"
    TIMED_OUT = "the driver's time limit was over before the answer came"
    REFUSED = "the credentials or the database were refused"
    OTHER = "the statement's own fault"


class Action(enum.Enum):
    """The router's action after a failure."""

    REPEAT_ELSEWHERE = "repeat on another instance"
    REPEAT_UNPREPARED = "repeat on a connection that has prepared nothing"
    TO_WRITER = "move the unit to the writer and repeat there"
    WAIT_FOR_WRITER = "wait for a writer, then try again"
    RESOLVE = "find out what became of the COMMIT"
    RUN_AGAIN = "raise; run_transaction runs the unit again"
    RAISE = "raise"


class Phase(enum.Enum):
    """The phase in which a unit failed."""

    READER_CONNECTING = "connecting to a reader"
    READER_UNSENT = "on a reader, nothing sent yet"
    READ = "a read in flight, nothing of the unit is lost with the connection"
    READER_TRANSACTION = "a statement in flight in a reader's transaction"
    WRITER_CONNECTING = "connecting to the writer"
    WRITER_UNSENT = "on the writer, nothing sent yet"
    WRITER_FIRST = "the first statement in flight of the writer's transaction"
    WRITER_STATEMENT = "a later statement in flight in the writer's transaction"
    COMMIT = "COMMIT in flight"


_BEFORE_READER = (Phase.READER_CONNECTING, Phase.READER_UNSENT)
_BEFORE_WRITER = (Phase.WRITER_CONNECTING, Phase.WRITER_UNSENT)
_ON_WRITER = (Phase.WRITER_FIRST, Phase.WRITER_STATEMENT)
_IN_TRANSACTION = (Phase.READER_TRANSACTION, *_ON_WRITER)
_A = Action

_ROWS: tuple[tuple[tuple[Failure, ...], tuple[Phase, ...], Action], ...] = (
    # Nothing was sent: the next instance, or the next writer, will do.
    ((Failure.CONNECT, Failure.BUSY, Failure.LOST, Failure.TIMED_OUT, Failure.BROKEN), _BEFORE_READER, _A.REPEAT_ELSEWHERE),
    ((Failure.CONNECT, Failure.BUSY, Failure.LOST, Failure.TIMED_OUT), _BEFORE_WRITER, _A.WAIT_FOR_WRITER),
    ((Failure.REFUSED,), (Phase.READER_CONNECTING,), _A.REPEAT_ELSEWHERE),  # another instance may accept them
    # A read, and nothing of the unit is lost with its connection.
    ((Failure.LOST, Failure.BROKEN, Failure.CONFLICT), (Phase.READ,), _A.REPEAT_ELSEWHERE),
    ((Failure.READ_ONLY, Failure.NOT_HERE, Failure.MISSING), (Phase.READ,), _A.TO_WRITER),
    # The first statement of a transaction, and the server has not begun to execute it.
    ((Failure.OUTDATED,), (Phase.READ, Phase.WRITER_FIRST), _A.REPEAT_UNPREPARED),
    # A transaction that is gone, and certainly did not commit.
    ((Failure.LOST,), _IN_TRANSACTION, _A.RUN_AGAIN),
    ((Failure.OUTDATED,), (Phase.READER_TRANSACTION, Phase.WRITER_STATEMENT), _A.RUN_AGAIN),
    ((Failure.SERIALIZATION, Failure.DEADLOCK), (Phase.READ, *_IN_TRANSACTION), _A.RUN_AGAIN),
    ((Failure.CONFLICT, Failure.BROKEN), (Phase.READER_TRANSACTION,), _A.RUN_AGAIN),
    ((Failure.READ_ONLY,), _ON_WRITER, _A.RUN_AGAIN),  # it is no longer the writer
    # The writer would not have shown the rows that led to the violation.
    ((Failure.MISLED,), (*_ON_WRITER, Phase.COMMIT), _A.RUN_AGAIN),
    # A COMMIT that was refused, and a COMMIT whose answer never came.
    ((Failure.SERIALIZATION, Failure.DEADLOCK, Failure.READ_ONLY), (Phase.COMMIT,), _A.RUN_AGAIN),
    ((Failure.LOST, Failure.OVERTIME, Failure.TIMED_OUT), (Phase.COMMIT,), _A.RESOLVE),
)

TABLE: dict[tuple[Failure, Phase], Action] = {
    (failure, phase): action for failures, phases, action in _ROWS for failure in failures for phase in phases
}
"""The action for each pair. A pair that is not here raises."""

SUSPICIOUS = frozenset({Failure.CONNECT, Failure.LOST, Failure.TIMED_OUT})
"""Failures that say something about the instance, so that the monitor should look at it at once."""


def decide(failure: Failure, phase: Phase) -> Action:
    """The action for a failure in a phase."""
    return TABLE.get((failure, phase), Action.RAISE)


class Facts(NamedTuple):
    """The facts about a failed call.

    failure: the kind of failure.
    sent: whether anything of it may have reached a server.
    outcome_known: whether its outcome on the servers is known.
    safe_to_repeat: whether its unit may run again, from its beginning, without doing anything twice.
    """

    failure: Failure
    sent: bool
    outcome_known: bool
    safe_to_repeat: bool


def facts(failure: Failure, phase: Phase) -> Facts:
    """The facts about a failure in a phase."""
    action = decide(failure, phase)
    return Facts(
        failure,
        sent=phase not in (*_BEFORE_READER, *_BEFORE_WRITER),
        outcome_known=action is not Action.RESOLVE,
        safe_to_repeat=action not in (Action.RESOLVE, Action.RAISE),
    )


def as_markdown() -> str:
    """The table, for docs/failures.md: a row for each failure, a column for each phase."""
    lines = [
        f"| | {' | '.join(phase.value for phase in Phase)} |",
        f"|---|{'---|' * len(Phase)}",
        *(f"| **{failure.value}** | {' | '.join(_cell(failure, phase) for phase in Phase)} |" for failure in Failure),
    ]
    return "\n".join(lines) + "\n"


def _cell(failure: Failure, phase: Phase) -> str:
    action = TABLE.get((failure, phase))
    return "" if action is None else action.value
