"""The checker on histories that are written by hand: each guarantee broken once, and every allowed case."""

from typing import Any

import pytest

from tests.history.history import Gave, Guarantee, Operation, Read, Took, Write, check

X, Y, Z = 1, 2, 3


def history(*operations: tuple[Any, ...]) -> list[Operation]:
    """A history of one operation a second: (Read, scope, {key: version}), (Write, scope, key, version), ..."""
    made: list[Operation] = []
    for second, (kind, scope, *rest) in enumerate(operations):
        timed = kind in (Read, Write)
        made.append(kind(scope, *((second, second + 0.5) if timed else ()), *rest))
    return made


def broken(*operations: tuple[Any, ...]) -> list[Guarantee]:
    return [violation.guarantee for violation in check(history(*operations))]


# -- broken, and found ----------------------------------------------------------------------------------------------


def test_a_scope_that_is_not_shown_what_it_wrote_is_found() -> None:
    assert broken((Write, 1, X, 1), (Read, 1, {X: 0})) == [Guarantee.READ_YOUR_WRITES]


def test_a_scope_that_misses_its_tokens_writes_is_found() -> None:
    """The check finds a scope that is not shown the writes of its token."""
    assert broken((Write, 1, X, 1), (Gave, 1, 7), (Took, 2, (7,)), (Read, 2, {X: 0})) == [Guarantee.READ_YOUR_WRITES]


def test_a_token_passed_on_still_tells_of_the_writes() -> None:
    """A token that goes through other hands still speaks of the writes."""
    passed_on = ((Gave, 1, 7), (Took, 2, (7,)), (Gave, 2, 8), (Took, 3, (8,)))
    assert broken((Write, 1, X, 1), *passed_on, (Read, 3, {X: 0})) == [Guarantee.READ_YOUR_WRITES]


def test_two_tokens_speak_of_what_both_givers_wrote() -> None:
    both = ((Write, 1, X, 1), (Gave, 1, 7), (Write, 2, Y, 1), (Gave, 2, 8), (Took, 3, (7, 8)))
    assert broken(*both, (Read, 3, {X: 0, Y: 0})) == [Guarantee.READ_YOUR_WRITES] * 2


def test_a_later_read_that_shows_less_is_found() -> None:
    assert broken((Write, 1, X, 1), (Read, 2, {X: 1}), (Read, 2, {X: 0})) == [Guarantee.MONOTONIC_READS]


def test_a_read_of_the_second_write_without_the_first_is_found() -> None:
    """The check finds a read that shows the second of two writes but not the first."""
    assert broken((Write, 1, X, 1), (Write, 1, Y, 1), (Read, 2, {Y: 1, X: 0})) == [Guarantee.MONOTONIC_WRITES]
    assert broken((Write, 1, X, 1), (Write, 1, Y, 1), (Read, 2, {Y: 1}), (Read, 2, {X: 0})) == [Guarantee.MONOTONIC_WRITES]


def test_a_write_upon_less_than_an_earlier_write_is_found() -> None:
    """The check finds a write that is made upon an older version than an earlier write of its scope."""
    found = broken((Write, 2, X, 1), (Write, 2, X, 3), (Write, 2, X, 2))
    assert Guarantee.MONOTONIC_WRITES in found
    assert broken((Write, 1, X, 1), (Write, 1, X, 1)) == [Guarantee.ONE_ORDER, Guarantee.MONOTONIC_WRITES]


def test_a_read_without_what_its_writer_had_read_is_found() -> None:
    """The check finds a read that shows a write, but not the versions that the write's scope was shown before."""
    seen = ((Write, 1, X, 1), (Read, 2, {X: 1}), (Write, 2, Y, 1))
    assert broken(*seen, (Read, 3, {Y: 1, X: 0})) == [Guarantee.WRITES_FOLLOW_READS]
    assert broken(*seen, (Gave, 2, 7), (Took, 3, (7,)), (Read, 3, {X: 0})) == [Guarantee.WRITES_FOLLOW_READS]


def test_a_write_upon_less_than_its_scope_was_shown_is_found() -> None:
    """The check finds a write that is made upon an older version than its scope was shown."""
    assert Guarantee.WRITES_FOLLOW_READS in broken((Write, 1, X, 5), (Read, 2, {X: 5}), (Write, 2, X, 3))


def test_what_a_write_implies_goes_along_a_chain_of_scopes() -> None:
    chain = ((Write, 1, X, 1), (Read, 2, {X: 1}), (Write, 2, Y, 1), (Read, 3, {Y: 1}), (Write, 3, Z, 1))
    assert broken(*chain, (Read, 4, {Z: 1}), (Read, 4, {X: 0})) == [Guarantee.WRITES_FOLLOW_READS]


def test_a_version_implies_what_earlier_versions_imply() -> None:
    """A version implies all that the writes of earlier versions imply."""
    assert broken(
        (Write, 1, X, 1), (Write, 1, Y, 1), (Write, 2, Y, 2), (Read, 3, {Y: 2}), (Read, 3, {X: 0})
    ) == [Guarantee.WRITES_FOLLOW_READS]  # fmt: skip


def test_one_version_that_was_acknowledged_twice_is_found() -> None:
    assert broken((Write, 1, X, 1), (Write, 2, X, 1)) == [Guarantee.ONE_ORDER]


def test_what_is_shown_before_it_is_written_is_found() -> None:
    assert Guarantee.ONE_ORDER in broken((Read, 1, {X: 1}), (Write, 1, Y, 1), (Read, 2, {Y: 1}), (Write, 2, X, 1))


def test_a_violation_says_what_was_shown_and_what_demanded_more() -> None:
    (violation,) = check(history((Write, 1, X, 5), (Read, 1, {X: 4})))
    assert str(violation) == (
        "read your writes: Read(scope=1, began=1, ended=1.5, shown={1: 4}, on_writer=False) should know version 5 of 1 "
        "from Write(scope=1, began=0, ended=0.5, key=1, version=5)"
    )


def test_a_token_that_nobody_gave_is_an_error() -> None:
    with pytest.raises(ValueError, match="nobody gave the token 7"):
        check(history((Took, 1, (7,)), (Read, 1, {X: 0})))


# -- allowed --------------------------------------------------------------------------------------------------------


def test_who_knows_of_nothing_may_be_shown_anything() -> None:
    assert broken((Write, 1, X, 1), (Read, 2, {X: 0}), (Read, 3, {X: 1}), (Read, 4, {X: 0})) == []


def test_a_token_says_nothing_of_what_its_giver_was_only_shown() -> None:
    assert broken((Write, 1, X, 1), (Read, 2, {X: 1}), (Gave, 2, 7), (Took, 3, (7,)), (Read, 3, {X: 0})) == []
    later = ((Write, 2, Y, 1), (Read, 2, {X: 1}), (Gave, 2, 7))
    assert broken((Write, 1, X, 1), *later, (Took, 3, (7,)), (Read, 3, {X: 0, Y: 1})) == []


def test_a_token_says_nothing_of_what_its_giver_wrote_after_it() -> None:
    assert broken((Write, 1, X, 1), (Gave, 1, 7), (Write, 1, X, 2), (Took, 2, (7,)), (Read, 2, {X: 1})) == []


def test_an_unacknowledged_write_that_is_shown_implies_nothing() -> None:
    """A write that was never acknowledged may be shown, and implies nothing for other scopes."""
    assert broken((Write, 1, X, 1), (Read, 2, {X: 2}), (Read, 3, {X: 1})) == []
    assert broken((Write, 1, X, 1), (Read, 2, {X: 2}), (Read, 2, {X: 1})) == [Guarantee.MONOTONIC_READS]


def test_a_read_may_show_what_is_acknowledged_only_afterwards() -> None:
    assert broken((Read, 2, {X: 1}), (Write, 1, X, 1), (Read, 2, {X: 1})) == []


def test_the_writer_may_show_an_unacknowledged_write_later() -> None:
    """The writer may still hide a write that it has not acknowledged, even if a reader shows it already."""
    early = Read(2, 0.0, 0.1, {X: 1})
    for on_writer, began, found in (
        (True, 0.4, []),
        (True, 0.6, [Guarantee.MONOTONIC_READS]),
        (False, 0.4, [Guarantee.MONOTONIC_READS]),
    ):
        late = Read(2, began, 0.7, {X: 0}, on_writer)
        assert [v.guarantee for v in check([early, Write(1, -0.5, 0.5, X, 1), late])] == found


def test_only_who_is_shown_too_little_is_blamed() -> None:
    assert broken(
        (Write, 1, X, 1),
        (Read, 1, {X: 1, Y: 0}),
        (Gave, 1, 7),
        (Took, 2, (7,)),
        (Read, 2, {X: 1}),
        (Write, 2, Y, 1),
        (Write, 2, X, 2),
        (Gave, 2, 8),
        (Read, 3, {X: 1, Y: 1}),
        (Read, 3, {X: 0}),
        (Took, 4, (7, 8)),
        (Read, 4, {X: 2, Y: 1, Z: 0}),
        (Write, 4, Z, 1),
        (Read, 1, {Z: 1, X: 2, Y: 1}),
    ) == [Guarantee.MONOTONIC_READS]
