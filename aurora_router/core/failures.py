"""What to do when a statement fails: a table from what failed to an action. Pure; who sleeps and who sends is elsewhere."""

from __future__ import annotations

import enum


class Failure(enum.Enum):
    """What kind of failure an exception stands for. The server modules say which of theirs is which."""

    CONNECT = "no connection could be made"
    LOST = "the connection was lost"
    CONFLICT = "the reader cancelled the statement because replay needed its rows gone"
    READ_ONLY = "the instance is read-only, or cannot do this while it replays"
    REFUSED = "the credentials or the database were refused"
    OTHER = "the statement's own fault"


class Action(enum.Enum):
    """What the router does about it."""

    REPEAT_ELSEWHERE = "repeat on another instance"
    TO_WRITER = "move the unit to the writer and repeat there"
    WAIT_FOR_WRITER = "wait for a writer, then try again"
    RAISE = "raise"


class Phase(enum.Enum):
    """How far the unit was.

    FRESH_READ: on a reader, and nothing of the unit would be lost with the connection: autocommit, or READ COMMITTED reads only.
    BOUND_READ: on a reader, in a transaction whose snapshot or settings cannot be had elsewhere.
    ENTERING_WRITER: connecting to the writer; nothing was sent.
    ON_WRITER: in a transaction on the writer.
    """

    FRESH_READ = "reads that could go on elsewhere"
    BOUND_READ = "a transaction on a reader"
    ENTERING_WRITER = "connecting to the writer"
    ON_WRITER = "a transaction on the writer"


TABLE: dict[tuple[Failure, Phase], Action] = {
    (Failure.CONNECT, Phase.FRESH_READ): Action.REPEAT_ELSEWHERE,
    (Failure.LOST, Phase.FRESH_READ): Action.REPEAT_ELSEWHERE,
    (Failure.CONFLICT, Phase.FRESH_READ): Action.REPEAT_ELSEWHERE,
    (Failure.READ_ONLY, Phase.FRESH_READ): Action.TO_WRITER,
    (Failure.CONNECT, Phase.ENTERING_WRITER): Action.WAIT_FOR_WRITER,
    (Failure.LOST, Phase.ENTERING_WRITER): Action.WAIT_FOR_WRITER,
}
"""Every pair that is not here raises."""

SUSPICIOUS = frozenset({Failure.CONNECT, Failure.LOST})
"""Failures that say something about the instance, so that the monitor should look at it at once."""


def decide(failure: Failure, phase: Phase) -> Action:
    """The action for a failure in a phase."""
    return TABLE.get((failure, phase), Action.RAISE)
