"""The state of a unit of work, and how its parts show themselves."""

from __future__ import annotations

import pytest

from aurora_router.core.instance import Instance, Role, ServerId
from aurora_router.core.positions import LastRead, Requirement
from aurora_router.errors import OutcomeUnknown
from aurora_router.routing.causal_context import CausalContext, Scope
from aurora_router.routing.retry_context import RetryContext
from aurora_router.routing.unit import (
    AUTOMATIC,
    NOWHERE,
    READ_ONLY,
    READ_WRITE,
    CommitState,
    Intent,
    Place,
    TransactionEnds,
    Unit,
)

WRITER = Instance("db-1:5432", "db-1", 5432)._replace(role=Role.WRITER)
READER = Instance("db-2:5432", "db-2", 5432)._replace(role=Role.READER)
SERVER = ServerId("a", "10.0.0.2", 5432, "2026-11-29")


def test_a_unit_shows_its_intent_its_place_and_its_progress() -> None:
    unit = Unit(AUTOMATIC)
    assert repr(unit) == "<Unit automatic, nowhere>"
    unit.place = Place(READER, False, 3, SERVER)
    assert repr(unit) == "<Unit automatic, at db-2:5432>"
    unit.place = Place(WRITER, True, 3, SERVER)
    unit.wrote = True
    unit.commit = CommitState.SENT
    assert repr(unit) == "<Unit automatic, at db-1:5432 (writer), has written, COMMIT: sent>"
    assert repr(Unit(READ_ONLY)) == "<Unit read-only, nowhere>"
    assert repr(Unit(READ_WRITE)) == "<Unit read-write, nowhere>"


def test_the_repr_of_a_unit_contains_no_sql() -> None:
    """Statements have secrets in them."""
    unit = Unit(READ_WRITE)
    unit.last_sql = "ALTER ROLE app PASSWORD 'secret'"
    assert "secret" not in repr(unit)


def test_what_a_unit_is_meant_to_do_never_changes() -> None:
    unit = Unit(Intent(None, owned_by_session=True))
    with pytest.raises(AttributeError):
        unit.intent.read_only = True  # type: ignore[misc]


def test_a_place_is_replaced_as_a_whole() -> None:
    unit = Unit(AUTOMATIC)
    assert unit.place is NOWHERE
    with pytest.raises(AttributeError):
        unit.place.instance = READER  # type: ignore[misc]
    with pytest.raises(AttributeError):
        unit.place.on_writer = True  # type: ignore[misc]


def test_a_unit_that_has_left_still_knows_what_it_has_seen() -> None:
    """It leaves its reader before it has a connection to the writer, which may never come."""
    unit = Unit(AUTOMATIC)
    unit.place = Place(READER, False, 3, SERVER)
    unit.leave()
    assert unit.place.instance is None
    assert unit.causal_footprint(17.0) == (None, LastRead(SERVER, 17.0, 3))


@pytest.mark.parametrize("state", CommitState)
def test_a_commit_is_in_doubt_until_it_has_succeeded(state: CommitState) -> None:
    unit = Unit(READ_WRITE)
    unit.commit = state
    assert unit.is_commit_in_doubt == (state not in (CommitState.NONE, CommitState.COMMITTED))


def test_a_lost_commit_has_its_error() -> None:
    unit = Unit(READ_WRITE)
    error = OutcomeUnknown("db-1:5432", "no commit_check was asked for")
    unit.commit = error
    assert unit.is_commit_in_doubt


def test_ends_of_transactions_are_noticed_when_one_looks() -> None:
    """What was noticed on a lost connection still counts on the one that replaces it."""
    ended = [4]
    ends = TransactionEnds(lambda: ended[0])
    assert ends.last_at() is None
    ended[0] += 1
    assert ends.noticed_at is None, "because nobody has looked"
    assert ends.last_at() is not None
    assert TransactionEnds(lambda: 0, ends.noticed_at).last_at() == ends.noticed_at


def test_contexts_show_no_token() -> None:
    """A token says what somebody has written, and it may be signed."""
    context = CausalContext("a token", Requirement(50.0, 1))
    assert repr(context) == "<CausalContext begun with a token, reads on 0 servers>"
    scope = Scope(None, CausalContext(), lambda _: "another")
    scope.record(None, LastRead(SERVER, 17.0, 3), wrote=True)
    assert repr(scope) == "<Scope begun without a token, has written, reads on 1 servers>"


def test_an_attempt_shows_what_the_next_one_would_do_otherwise() -> None:
    first = RetryContext(None)
    assert repr(first) == "<RetryContext on any instance, 0 rows to lock>"
    first.can_be_undone = False
    first.has_read_on_reader = True
    assert first.is_misled()
    assert repr(first) == "<RetryContext on any instance, 0 rows to lock, cannot be undone>"
    assert repr(RetryContext(None, first)) == "<RetryContext on the writer, 0 rows to lock>"
