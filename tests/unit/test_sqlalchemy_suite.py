"""The comparison of the outcomes of SQLAlchemy's own tests."""

from tests.sqlalchemy_suite.__main__ import compare


def test_a_difference_without_a_reason_is_named() -> None:
    """A test that fails, or is missing, with only one kind of session needs a reason, and any other needs none."""
    plain = {"a": "passed", "b": "passed", "c": "failed", "d": "passed", "e": "passed"}
    routed = {"a": "passed", "b": "failed", "c": "failed", "d": "failed"}
    lines, unexplained = compare(plain, routed, {"d": "it counts connections"})
    assert unexplained == {"b", "e"}
    assert "d: passed with Session, failed with RoutingSession" in lines
    assert "    it counts connections" in lines
    assert "3 differences, 2 of them not explained" in lines


def test_a_reason_that_explains_nothing_is_said() -> None:
    lines, unexplained = compare({"a": "passed"}, {"a": "passed"}, {"a": "it was different once", "of another file": "?"})
    assert not unexplained
    assert "a: no longer different, take it out of differences.json" in lines
    assert not any("of another file" in line for line in lines)
