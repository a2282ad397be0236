"""Whether a statement may run where its unit is. This module is pure.

In each function:

found: the analysis of the statement's text.
effect: its effect, with regard to the functions that are known to be harmless.
"""

from __future__ import annotations

import enum

from aurora_router.core.selection import Reason
from aurora_router.core.sql.analysis import Analysis, Effect, Hint, Recall

_IS_READ = Effect.READ  # an enum's members are slow to look up on the request path


def reason_to_write(found: Analysis, effect: Effect, hint: Hint | None, refused: bool) -> Reason | None:
    """Return why an automatic unit must be on the writer for a statement; None if a reader may serve it.

    hint: what the application asks for. No hint sends a write to a reader.
    refused: whether a reader has refused this text before.
    """
    if effect is _IS_READ:
        if hint == "writer" or found.hint == "writer":
            return Reason.HINT
        return Reason.NOT_A_READ if refused else None
    asked = hint == "reader" or (found.hint == "reader" and hint is None)
    return None if asked and found.effect_if_functions_pure is _IS_READ and not refused else Reason.NOT_A_READ


def recalls_reads(found: Analysis, effect: Effect, *, has_read: bool, only_reads: bool) -> bool:
    """Return whether a statement asks for something that only its unit's connection to a reader knows.

    A user's variable counts only if such a statement came before, because nothing but GET DIAGNOSTICS sets one on a reader.

    has_read: whether the unit has read on that connection.
    only_reads: whether all its statements were reads.
    """
    if found.recalls is None or effect is not Effect.CONNECTION or not has_read:
        return False
    return found.recalls is Recall.STATEMENT or not only_reads


class ReaderStep(enum.Enum):
    """What an automatic unit on a reader does with a statement that is not simply a read.

    MOVE: it moves to the writer, and the statement runs there.
    STAY: the statement runs on the reader, because no other connection has the same history.
    HOLD: the statement runs on the reader, in a read-only transaction that the unit holds from now on.
    """

    MOVE = 1
    STAY = 2
    HOLD = 3


def on_reader(
    reason: Reason, found: Analysis, effect: Effect, *, is_connecting: bool, has_read: bool, only_reads: bool
) -> ReaderStep:
    """Decide what an automatic unit on a reader does with a statement that should be on the writer.

    While the unit connects, a listener of the application may set something on the connection. The setting holds for the unit,
    in a transaction, as on any engine. SET LOCAL does not count. It is part of the unit's transaction, which runs on the writer.

    reason: why the statement should be on the writer.
    is_connecting: whether the unit is being connected to that reader.
    has_read, only_reads: as in `recalls_reads()`.
    """
    if reason is Reason.NOT_A_READ:
        if is_connecting and effect in (Effect.SERVER, Effect.SESSION) and not found.may_unset_read_only:
            return ReaderStep.HOLD
        if recalls_reads(found, effect, has_read=has_read, only_reads=only_reads):
            return ReaderStep.STAY
    return ReaderStep.MOVE


class Violation(enum.Enum):
    """What a statement would do that a read-only unit must not.

    WRITES: it writes, or takes a lock that means something only on the writer.
    UNGUARDS: it may remove what keeps the unit from writing.
    """

    WRITES = 1
    UNGUARDS = 2


def violation(found: Analysis, effect: Effect, *, on_writer: bool) -> Violation | None:
    """Return what a statement would do that a read-only unit must not; None if it may be sent.

    On the writer nothing else stands between an unknown function and the data.

    on_writer: whether the unit is on the writer.
    """
    if found.takes_named_lock:
        return Violation.WRITES
    if found.effect is Effect.WRITE and (
        found.effect_if_functions_pure is Effect.WRITE or (on_writer and effect is Effect.WRITE)
    ):
        return Violation.WRITES
    return Violation.UNGUARDS if found.may_unset_read_only else None
