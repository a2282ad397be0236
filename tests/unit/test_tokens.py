"""Tokens: their text, what is refused, which of two implies the other, signatures, and what they mean where they arrive."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aurora_router import ConfigurationError, merge_tokens
from aurora_router.core.positions import Requirement, WalPosition, merge
from aurora_router.core.tokens import LONGEST, Token, later
from aurora_router.tokens import Tokens

CLUSTER = "7571234567890123456"
positions = st.builds(WalPosition, st.integers(1, 2**32 - 1), st.integers(0, 2**64 - 1))
tokens = st.builds(Token, st.just(CLUSTER), st.none() | positions, st.integers(0, 10**11))


@given(tokens)
def test_a_token_reads_as_it_was_written_and_is_short_and_fit_for_urls_and_headers(token):
    text = str(token)
    assert Token.parse(text) == token
    assert set(text) <= set("0123456789ABCDEFabcdefghijklmnopqrstuvwxyz.-_")
    signed = Tokens(["k" * 40], 60.0).write(CLUSTER, WalPosition(2**32 - 1, 2**64 - 1))
    assert len(text) + len(signed) - len(str(Token.parse(signed.rsplit(".", 1)[0]))) < LONGEST


@pytest.mark.parametrize(
    "text",
    [
        "",
        "1",
        "2.7.1-A.1",
        "1.7.1-A",
        "1.7.1-A.1.",
        "1.7.1-g.1",
        "1.7.-A.1",
        "1.7.1-A.-1",
        "1.7.1-11111111111111111.1",
        "1.7.99999999999-A.1",
        "1.7 .1-A.1",
        "1..1-A.1",
        "1.7.1-A.1\n",
        "\uff11.7.1-A.1",
        "1.7.\u0661-A.1",
        "1.7.1-A.1" + "0" * 200,
        "'; DROP TABLE item; --",
    ],
)
def test_what_is_not_a_token_is_refused(text):
    with pytest.raises(ValueError, match="not a consistency token"):
        Token.parse(text)
    with pytest.raises(ConfigurationError):
        Tokens((), 60.0).read(text, "7")


def test_a_token_of_another_cluster_is_refused_with_both_names():
    with pytest.raises(ConfigurationError, match="of another cluster \\(8, not 7\\)"):
        Tokens((), 60.0).read("1.8.1-A.1", "7")


def test_a_signature_keeps_a_client_from_making_one_up_and_old_keys_go_on_being_accepted():
    old, new = Tokens([b"old"], 60.0), Tokens(["old", "new"], 60.0)
    before, after = old.write("7", WalPosition(1, 10)), new.write("7", WalPosition(1, 10))
    assert new.read(before, "7") is not None
    assert new.read(after, "7") is not None
    for forged in (
        after.replace("1-A", "1-B"),
        after.rsplit(".", 1)[0] + "." + after.rsplit(".", 1)[1].swapcase(),
        after.rsplit(".", 1)[0],
        "1.7.1-A.9999999999",
    ):
        with pytest.raises(ConfigurationError, match="not signed with a key of this router"):
            new.read(forged, "7")
    with pytest.raises(ConfigurationError):
        old.read(after, "7")
    with pytest.raises(ConfigurationError):
        Tokens((), 60.0).read(after, "7")
    with pytest.raises(ConfigurationError):
        new.read(after + "\u00e9", "7")


def test_a_secret_is_in_no_repr():
    assert "hush" not in repr(vars(Tokens(["hush"], 60.0)))


def test_a_token_is_a_requirement_from_the_moment_it_is_heard_of():
    before = time.monotonic()
    found = Tokens((), 60.0).read(Tokens((), 60.0).write("7", WalPosition(3, 77)), "7")
    assert found[1:] == (3, WalPosition(3, 77), True)
    assert before <= found.after <= time.monotonic()


def test_a_token_that_is_older_than_its_time_asks_for_nothing():
    made = int(time.time())
    assert Tokens((), 60.0).read(f"1.7.1-A.{made - 61}", "7") is None
    assert Tokens((), 60.0).read(f"1.7.1-A.{made - 50}", "7") is not None
    assert Tokens((), 60.0).read(f"1.7.1-A.{made + 10**6}", "7") is not None, "from a clock that is ahead"


def test_a_token_is_never_older_than_what_it_speaks_of():
    for _ in range(20):
        before = time.time()
        assert Token.parse(Tokens((), 60.0).write("7", None)).made_at >= before
        time.sleep(0.03)


def test_a_token_with_little_time_counts_when_it_is_made():
    brief = Tokens((), 0.05)
    for _ in range(20):
        assert brief.read(brief.write("7", WalPosition(1, 10)), "7") is not None
        time.sleep(0.03)


def test_a_token_without_a_position_speaks_of_all_that_was_committed_when_it_was_made():
    made, now = int(time.time()), time.monotonic()
    found = Tokens((), 60.0).read(f"1.7.0.{made - 10}", "7")
    assert found[1:] == (None, None, False)
    assert now - 10.5 < found.after < now - 8.0, "less a second that clocks may differ"
    assert Tokens((), 60.0).read(f"1.7.0.{made}", "7").after >= now


@given(tokens, tokens)
def test_the_later_of_two_is_the_same_whichever_comes_first(one, other):
    first, second = later(one, other), later(other, one)
    assert first == second or {first.position, second.position} <= {one.position, other.position}
    if one.position is not None and other.position is not None:
        assert (first.position.epoch, first.position.lsn) == max(
            (one.position.epoch, one.position.lsn), (other.position.epoch, other.position.lsn)
        )


def test_merging_gives_the_token_that_implies_the_others():
    early, late, newer = "1.7.1-A.5", "1.7.1-B.4", "1.7.2-1.3"
    assert merge_tokens() is None
    assert merge_tokens(None, early, None) == early
    assert merge_tokens(early, late) == merge_tokens(late, early) == late
    assert merge_tokens(early, newer, late) == newer
    assert merge_tokens("1.7.0.5", late) == "1.7.0.5", "made after it, of all that there was"
    assert merge_tokens("1.7.0.3", late) == late
    signed = Tokens(["k"], 60.0).write("7", WalPosition(1, 99))
    assert merge_tokens(early, signed) == signed
    for wrong in ("1.8.1-A.5", "nonsense", 5, early.encode(), [early]):
        with pytest.raises(ConfigurationError, match="cannot be merged"):
            merge_tokens(early, wrong)


GIVEN = Requirement(5.0, 1, WalPosition(1, 50), given=True)


def test_a_given_position_proves_nothing_of_what_was_written_here_before_it_was_heard_of():
    unproven = Requirement(4.0, 1)
    assert merge(GIVEN, unproven) == merge(unproven, GIVEN) == Requirement(5.0, 1, None, given=True)
    proven = Requirement(4.0, 1, WalPosition(1, 80))
    assert merge(GIVEN, proven) == Requirement(5.0, 1, WalPosition(1, 80), given=True)
    assert merge(GIVEN, Requirement(4.0, 1, WalPosition(1, 20))) == GIVEN
    assert merge(GIVEN, Requirement(4.0, 2, WalPosition(2, 20))) == Requirement(5.0, 2, None, given=True)


def test_what_is_written_after_a_token_was_heard_of_implies_it():
    own = Requirement(6.0, 1)
    assert merge(GIVEN, own) is merge(own, GIVEN) is own
