"""Whether a statement may run where its unit is, in tables of analyses."""

from dataclasses import replace
from itertools import product

import pytest

from aurora_router.core.selection import Reason
from aurora_router.core.sql.analysis import Analysis, Effect, Hint, analyze
from aurora_router.core.sql.effects import Recall
from aurora_router.core.statement_rules import ReaderStep, Violation, on_reader, reason_to_write, recalls_reads, violation

READ = Analysis(Effect.READ, Effect.READ)
WRITE = Analysis(Effect.WRITE, Effect.WRITE)
UNKNOWN = Analysis(Effect.WRITE, Effect.READ, frozenset({"f"}))


@pytest.mark.parametrize(
    ("found", "hint", "refused", "reason"),
    [
        (READ, None, False, None),
        (READ, "reader", False, None),
        (READ, "writer", False, Reason.HINT),
        (replace(READ, hint="writer"), None, False, Reason.HINT),
        (replace(READ, hint="writer"), "reader", False, Reason.HINT),
        (READ, None, True, Reason.NOT_A_READ),
        (WRITE, None, False, Reason.NOT_A_READ),
        (WRITE, "reader", False, Reason.NOT_A_READ),
        (replace(WRITE, hint="reader"), None, False, Reason.NOT_A_READ),
        (UNKNOWN, None, False, Reason.NOT_A_READ),
        (UNKNOWN, "reader", False, None),
        (UNKNOWN, "reader", True, Reason.NOT_A_READ),
        (replace(UNKNOWN, hint="reader"), None, False, None),
        (replace(UNKNOWN, hint="reader"), "writer", False, Reason.NOT_A_READ),
    ],
)
def test_what_must_be_on_the_writer(found: Analysis, hint: Hint | None, refused: bool, reason: Reason | None) -> None:
    """A hint sends a read to the writer, or a statement with unknown functions to a reader, but never a write."""
    assert reason_to_write(found, found.effect, hint, refused) is reason


# -- on a reader ------------------------------------------------------------------------------------------------------

MOVE, STAY, HOLD = ReaderStep
LAST = Analysis(Effect.CONNECTION, Effect.CONNECTION, recalls=Recall.STATEMENT)
VARIABLE = replace(LAST, recalls=Recall.VARIABLE)


@pytest.mark.parametrize(
    ("found", "has_read", "only_reads", "recalls"),
    [
        (LAST, True, True, True),
        (LAST, True, False, True),
        (LAST, False, True, False),
        (VARIABLE, True, True, False),
        (VARIABLE, True, False, True),
        (VARIABLE, False, False, False),
        (replace(LAST, recalls=None), True, False, False),
        (READ, True, True, False),
        (replace(LAST, effect=Effect.WRITE), True, False, False),
    ],
)
def test_what_only_the_reader_of_a_unit_can_answer(found, has_read, only_reads, recalls):
    """A statement on earlier results needs a read before it. One on a variable needs a statement that may have set it."""
    assert recalls_reads(found, found.effect, has_read=has_read, only_reads=only_reads) is recalls


@pytest.mark.parametrize(
    ("reason", "found", "is_connecting", "has_read", "step"),
    [
        # a listener's settings while the unit connects
        (Reason.NOT_A_READ, Analysis(Effect.SESSION, Effect.SESSION), True, False, HOLD),
        (Reason.NOT_A_READ, Analysis(Effect.SERVER, Effect.SERVER), True, False, HOLD),
        (Reason.NOT_A_READ, Analysis(Effect.SESSION, Effect.SESSION, may_unset_read_only=True), True, False, MOVE),
        (Reason.NOT_A_READ, Analysis(Effect.TRANSACTION, Effect.TRANSACTION), True, False, MOVE),
        (Reason.NOT_A_READ, Analysis(Effect.CONNECTION, Effect.CONNECTION), True, False, MOVE),
        (Reason.NOT_A_READ, WRITE, True, False, MOVE),
        (Reason.NOT_A_READ, UNKNOWN, True, False, MOVE),
        (Reason.NOT_A_READ, READ, True, False, MOVE),
        # the same by the application itself
        (Reason.NOT_A_READ, Analysis(Effect.SESSION, Effect.SESSION), False, True, MOVE),
        (Reason.NOT_A_READ, Analysis(Effect.SERVER, Effect.SERVER), False, True, MOVE),
        (Reason.NOT_A_READ, WRITE, False, True, MOVE),
        # what only this connection knows
        (Reason.NOT_A_READ, LAST, False, True, STAY),
        (Reason.NOT_A_READ, LAST, True, True, STAY),
        (Reason.NOT_A_READ, LAST, False, False, MOVE),
        (Reason.NOT_A_READ, VARIABLE, False, True, MOVE),
        # any other reason is about more than the statement
        (Reason.HINT, LAST, False, True, MOVE),
        (Reason.OWN_WRITES, LAST, False, True, MOVE),
        (Reason.OWN_WRITES, READ, False, True, MOVE),
        (Reason.HINT, Analysis(Effect.SESSION, Effect.SESSION), True, False, MOVE),
        (Reason.OWN_WRITES, Analysis(Effect.SERVER, Effect.SERVER), True, False, MOVE),
    ],
)
def test_what_a_unit_on_a_reader_does_with_a_statement(reason, found, is_connecting, has_read, step):
    """The table says when a unit moves, stays with its reader, or holds a transaction there."""
    given = {"is_connecting": is_connecting, "has_read": has_read, "only_reads": True}
    assert on_reader(reason, found, found.effect, **given) is step


def test_a_variable_keeps_a_unit_that_may_have_set_it():
    given = {"is_connecting": False, "has_read": True, "only_reads": False}
    assert on_reader(Reason.NOT_A_READ, VARIABLE, VARIABLE.effect, **given) is STAY


# -- in a read-only unit ----------------------------------------------------------------------------------------------

WRITES, UNGUARDS = Violation


@pytest.mark.parametrize(
    ("text", "on_reader", "on_writer"),
    [
        ("SELECT 1", None, None),
        ("DELETE FROM item", WRITES, WRITES),
        ("SELECT f()", None, WRITES),
        ("SELECT pg_advisory_lock(1)", WRITES, WRITES),
        ("SET work_mem = '1MB'", None, None),
        ("SAVEPOINT s", None, None),
        ("ROLLBACK", UNGUARDS, UNGUARDS),
        ("SET TRANSACTION READ WRITE", UNGUARDS, UNGUARDS),
        ("SET TRANSACTION READ WRITE; DELETE FROM item", WRITES, WRITES),
        ("SET TRANSACTION READ WRITE; SELECT f()", UNGUARDS, WRITES),
        ("SET TRANSACTION READ WRITE; SELECT pg_advisory_lock(1)", WRITES, WRITES),
    ],
)
def test_what_a_read_only_unit_must_not_do(text, on_reader, on_writer):
    """The table says what is wrong with a text on a reader, and on the writer."""
    found = analyze(text, "postgresql")
    assert violation(found, found.effect, on_writer=False) is on_reader
    assert violation(found, found.effect, on_writer=True) is on_writer


def test_a_function_that_is_known_to_be_harmless_is_allowed():
    """An unknown function breaks a read-only unit on the writer only if nobody has said that it is harmless."""
    assert violation(UNKNOWN, Effect.WRITE, on_writer=True) is WRITES
    assert violation(UNKNOWN, Effect.READ, on_writer=True) is None


def test_no_read_only_unit_sends_a_write():
    """Whatever else is known of it, a certain write is refused everywhere, and any write on the writer."""
    flags = ("may_unset_read_only", "takes_named_lock", "may_end_transaction", "in_doubt")
    for values in product((False, True), repeat=len(flags)):
        given = dict(zip(flags, values, strict=True))
        assert violation(replace(WRITE, **given), Effect.WRITE, on_writer=False) is WRITES
        assert violation(replace(WRITE, **given), Effect.WRITE, on_writer=True) is WRITES
        assert violation(replace(UNKNOWN, **given), Effect.WRITE, on_writer=True) is WRITES
