"""The next step of a unit that fails to connect, or whose read fails. This module is pure."""

from __future__ import annotations

import enum

from aurora_router.core.failures import Action, Failure, Phase, decide

# Retries of one unit's reads before the application gets the error.
MAX_RETRIES = 10


class ReadStep(enum.Enum):
    """What comes after a failure.

    RAISE: the application gets the error.
    WAIT: connect to the writer again, as soon as it can be reached.
    TO_WRITER: the unit moves to the writer, and the statement runs there.
    ELSEWHERE: try again, and avoid this instance from now on.
    AGAIN: try again, on this instance, too.
    """

    RAISE = 1
    WAIT = 2
    TO_WRITER = 3
    ELSEWHERE = 4
    AGAIN = 5


def after_connecting(failure: Failure, phase: Phase, *, on_writer: bool) -> ReadStep:
    """Decide the next step of a unit that could not connect, or that lost its connection before anything was sent.

    phase: how far it was.
    on_writer: whether it was to connect to the writer.
    """
    if decide(failure, phase) is Action.RAISE:
        return ReadStep.RAISE
    return ReadStep.WAIT if on_writer else ReadStep.ELSEWHERE


def after_statement(failure: Failure, phase: Phase, *, read_only: bool | None, on_writer: bool, retries: int) -> ReadStep:
    """Decide the next step of a unit whose statement has failed.

    phase: how far it was.
    read_only: what the unit is declared to be. None: the unit is automatic, so it may move to the writer.
    on_writer: whether it is on the writer.
    retries: how many of its reads it has retried before.
    """
    action = decide(failure, phase)
    if action is Action.TO_WRITER:
        return ReadStep.RAISE if read_only is not None or on_writer else ReadStep.TO_WRITER
    if action not in (Action.REPEAT_ELSEWHERE, Action.REPEAT_UNPREPARED) or retries >= MAX_RETRIES:
        return ReadStep.RAISE
    return ReadStep.ELSEWHERE if action is Action.REPEAT_ELSEWHERE and not on_writer else ReadStep.AGAIN
