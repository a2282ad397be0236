"""Tokens: their text, refusals, which of two implies the other, signatures, and their meaning to the host that reads them."""

import functools
import math
import sys
import time
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aurora_router import ConfigurationError, merge_tokens
from aurora_router.config.settings import Settings
from aurora_router.core.positions import Requirement, Sample, WalPosition, merge
from aurora_router.core.selection import with_proof
from aurora_router.core.token_codec import LONGEST, SKEW, Token, refresh, strongest
from aurora_router.core.topology import Topology
from aurora_router.routing.token_signing import MARGIN, TokenRefused, Tokens

CLUSTER = "7571234567890123456"
positions = st.builds(WalPosition, st.integers(1, 2**32 - 1), st.integers(0, 2**64 - 1))
tokens = st.builds(Token, st.just(CLUSTER), st.none() | positions, st.integers(0, 10**14))


def tokens_of(keys=(), ttl=60.0):
    """What writes and reads the tokens of a router with these settings."""
    return Tokens(Settings("postgresql+psycopg://db-1/shop", token_keys=keys, token_ttl=ttl))


def written(position, *keys, ttl=60.0, after=0.0, is_from_token=False):
    """A token of all that is committed until `after` seconds from now."""
    epoch = position.epoch if position is not None else 1
    return tokens_of(keys, ttl).write("7", Requirement(time.monotonic() + after, epoch, position, is_from_token))


def read(text, ttl=60.0):
    return tokens_of((), ttl).read(text, "7")


@given(tokens)
def test_a_token_survives_writing_and_is_short_and_url_safe(token):
    """A token is parsed as it was written, is short, and fits into URLs and headers."""
    text = str(token)
    assert Token.parse(text) == token
    assert set(text) <= set("0123456789ABCDEFabcdefghijklmnopqrstuvwxyz.-_")
    largest = Requirement(time.monotonic(), 2**32 - 1, WalPosition(2**32 - 1, 2**64 - 1))
    signed = tokens_of(["k" * 40]).write(CLUSTER, largest)
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
        tokens_of().read(text, "7")


def test_a_token_of_another_cluster_is_refused_with_both_names():
    with pytest.raises(ConfigurationError, match=r"^after: .* of another cluster \(8, not 7\)"):
        tokens_of().read("1.8.1-A.1", "7", "after")


def test_a_token_error_names_the_argument():
    """The error names the argument that the token was given for."""
    for wrong in ("", "x" * 200, 5, "1.8.1-A.1"):
        with pytest.raises(ConfigurationError, match=r"^after: "):
            tokens_of().read(wrong, "7", "after")


def test_signatures_stop_forged_tokens_and_old_keys_still_count():
    """A signature keeps a client from forging a token, and tokens signed with old keys are still accepted."""
    old, new = tokens_of([b"old"]), tokens_of(["old", "new"])
    before, after = written(WalPosition(1, 10), b"old"), written(WalPosition(1, 10), "old", "new")
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
        tokens_of().read(after, "7")
    with pytest.raises(ConfigurationError):
        new.read(after + "\u00e9", "7")


SIGNED = tokens_of(["key"]).write("7", Requirement(time.monotonic(), 1, WalPosition(1, 10)))
ALTERED = sorted(
    {
        SIGNED[:at] + new + SIGNED[at + cut :]
        for at in range(len(SIGNED) + 1)
        for new in ("", *map(chr, range(128)))
        for cut in (0, 1)
    }
    - {SIGNED}
)


def test_a_signed_token_with_any_character_altered_is_refused():
    """A signed token is refused after any omission, addition or change."""
    tokens = tokens_of(["key"], 86400.0)
    assert tokens.read(SIGNED, "7") is not None
    for altered in ALTERED:
        with pytest.raises(TokenRefused):
            tokens.read(altered, "7")


def test_merging_hands_on_nothing_that_a_header_cannot_hold():
    """A merge does not verify signatures, but refuses one with characters that no signature has."""
    before, signature = SIGNED.rsplit(".", 1)
    for altered in (
        f"{before}.{signature[:9]}\r\n{signature[9:]}",
        f"{before}.\r\nX: y",
        f"{SIGNED}\n",
        f"{SIGNED}=",
        f"{SIGNED}.x",
    ):
        with pytest.raises(ConfigurationError, match="cannot be merged"):
            merge_tokens(altered)


def test_where_nothing_can_sign_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "itsdangerous", None)
    with pytest.raises(ConfigurationError, match=r"pip install 'aurora-router\[signing\]'"):
        tokens_of(["hush"])
    assert read(written(WalPosition(1, 10))) is not None, "without keys nothing needs it"


def test_a_secret_is_in_no_repr():
    assert "hush" not in repr(vars(tokens_of(["hush"])))


def test_a_new_token_is_a_requirement_from_its_arrival_on():
    """A new token is a requirement from the moment when it is read."""
    before = time.monotonic()
    found = read(written(WalPosition(3, 77)))
    assert found[1:4] == (3, WalPosition(3, 77), True)
    assert before <= found.acknowledged_at <= found.received_at <= time.monotonic()


def test_a_token_counts_from_its_sample_minus_clock_skew():
    """A token counts from the moment when its position was asked for, less the possible difference of clocks."""
    for position in (WalPosition(3, 77), None):
        now = time.monotonic()
        assert read(written(position, after=-10)).acknowledged_at == pytest.approx(now - 10 + MARGIN, abs=0.2)
        assert read(written(position)).acknowledged_at >= now


def test_a_token_that_is_handed_on_does_not_get_younger():
    given = read(written(WalPosition(3, 77), after=-10))
    again = read(tokens_of().write("7", given))
    assert again.acknowledged_at == pytest.approx(given.acknowledged_at, abs=0.05)


def test_a_token_that_is_older_than_its_time_asks_for_nothing():
    made = int(time.time())
    assert read(f"1.7.1-A.{made - 61}000") is None
    assert read(f"1.7.1-A.{made - 50}000") is not None
    assert read(f"1.7.1-A.{made + 50}000") is not None, "from a clock that is ahead"
    for ahead in (70, 10**6):
        with pytest.raises(TokenRefused, match="in the future"):
            read(f"1.7.1-A.{made + ahead}000")
    assert Token.parse(written(None, after=-(2.0**40))).made_at == 0


def test_a_token_is_never_older_than_what_it_speaks_of():
    for _ in range(20):
        before = time.time() * 1000
        assert Token.parse(written(None)).made_at >= before - 0.1
        time.sleep(0.0003)


def test_a_token_with_little_time_counts_when_it_is_made():
    for _ in range(20):
        assert read(written(WalPosition(1, 10), ttl=0.05), ttl=0.05) is not None
        time.sleep(0.003)


OLD = Requirement(10.0, 1, WalPosition(1, 50))


@pytest.mark.parametrize(
    ("requirement", "samples", "expected"),
    [
        (OLD._replace(acknowledged_at=95.0), (), OLD._replace(acknowledged_at=95.0)),
        (OLD, (Sample(98.0, WalPosition(1, 60)),), Requirement(98.0, 1, WalPosition(1, 60))),
        (OLD._replace(position=None), (Sample(98.0, WalPosition(1, 60)),), Requirement(98.0, 1, WalPosition(1, 60))),
        (OLD, (Sample(40.0, WalPosition(1, 60)),), Requirement(100.0, 1)),
        (OLD, (Sample(98.0, WalPosition(2, 60)),), Requirement(100.0, 1)),
        (OLD, (), Requirement(100.0, 1)),
        (OLD._replace(acknowledged_at=95.0), (Sample(98.0, WalPosition(1, 50)),), OLD._replace(acknowledged_at=98.0)),
        (OLD._replace(is_from_token=True), (Sample(98.0, WalPosition(1, 40)),), OLD._replace(is_from_token=True)),
    ],
)
def test_what_was_proven_long_ago_is_proven_anew_for_a_token(requirement, samples, expected):
    assert refresh(requirement, samples, since=90.0, now=100.0) == expected


@given(tokens, tokens)
def test_the_later_of_two_is_the_same_whichever_comes_first(one, other):
    first, second = strongest([one, other]), strongest([other, one])
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
    assert merge_tokens("1.7.0.5", late, "1.7.0.3") == "1.7.0.5", "made after it, of all that there was"
    signed = written(WalPosition(1, 99), "k")
    assert merge_tokens(early, signed) == signed
    for wrong in ("1.8.1-A.5", "nonsense", 5, early.encode(), [early]):
        with pytest.raises(ConfigurationError, match="cannot be merged"):
            merge_tokens(early, wrong)


def test_a_token_without_a_position_yields_only_to_a_later_one():
    """A token without a position counts unless another one is later by all clocks."""
    skew = int(SKEW * 1000)
    blank = Token("7", None, 50_000)
    for made_at, expected in ((50_000 - skew, True), (50_000, True), (50_000 + skew, True), (50_001 + skew, False)):
        placed = Token("7", WalPosition(1, 10), made_at)
        assert (strongest([placed, blank]) is strongest([blank, placed]) is blank) is expected, made_at
    older = Token("7", WalPosition(1, 5), 90_000)
    assert strongest([older, blank, Token("7", WalPosition(1, 10), 10_000)]) is blank, (
        "what was asked for early tells nothing of it"
    )


@given(st.floats(-30, 0), st.floats(-30, 0), *[st.floats(-SKEW / 2, SKEW / 2)] * 3)
def test_a_third_host_sees_two_hosts_commits_by_their_tokens(placed, blank, one, two, three):
    """A third host sees the commits of two hosts by their tokens, whatever the clocks say.

    placed, blank: when the position of one token was asked for, and when the commit of the other one was made, by true time
    one, two, three: seconds by which the clock of each host is ahead
    """
    now, wall = time.monotonic(), time.time()
    tokens = [
        Token("7", WalPosition(1, 10), math.ceil((wall + placed + one) * 1000)),
        Token("7", None, math.ceil((wall + blank + two) * 1000)),
    ]
    chosen = strongest(tokens)
    shifted = chosen._replace(made_at=chosen.made_at - math.floor(three * 1000))  # by the third host's clock
    requirement = tokens_of((), 600.0).read(str(shifted), "7")
    if chosen is tokens[0]:
        assert blank <= placed, "its position was asked for behind the other one's commit"
    else:
        assert requirement.acknowledged_at >= now + max(placed, blank) - 0.002


@given(st.floats(-50, 50), st.floats(0, 5), st.floats(0.001, 5), st.sampled_from([WalPosition(1, 50), WalPosition(2, 50)]))
def test_what_a_position_proves_does_not_depend_on_clocks(ahead, commit, heard, position):
    """No sample from before a token's arrival replaces its position, whatever the clock of the token's reader says."""
    now = time.monotonic()
    token = Token("7", position, math.ceil((time.time() - commit - ahead) * 1000))
    requirement = tokens_of().read(str(token), "7")
    assert requirement.received_at >= now
    old = Sample(now - heard, WalPosition(2, 40))
    found = Topology(epoch=2, samples=(old,))
    assert with_proof(requirement, found) == requirement
    later = Sample(requirement.since, WalPosition(2, 45))
    asked = with_proof(requirement, replace(found, samples=(old, later)))
    assert asked.position == later.position, "the writer was asked since, and does not have it"


@given(st.floats(0, 10), st.floats(0, 10), st.floats(0, 10))
def test_a_merged_requirement_is_proven_only_since_both_moments(date, heard, own):
    """A merged requirement is proven only after the own commit and the token's arrival, however wrong the token's date is."""
    token = Requirement(min(date, heard), 1, WalPosition(1, 50), is_from_token=True, received_at=heard)
    for both in (merge(token, Requirement(own, 1)), merge(Requirement(own, 1), token)):
        assert both.since >= max(own, heard)
        assert both.acknowledged_at >= own
        assert both.position is None, "nothing proves both yet"


commits = st.tuples(st.floats(-8, 0), st.floats(0, 5) | st.none(), st.floats(-SKEW / 2, SKEW / 2))


@given(st.lists(commits, min_size=2, max_size=5), st.floats(-SKEW / 2, SKEW / 2), st.booleans())
def test_no_commit_is_lost_when_tokens_are_merged(commits, reader, at_once):
    """No commit is lost when tokens of several hosts are merged, at once or in turn.

    commits: for each, its moment, the seconds until the writer was asked (None: it could not be), and the seconds by which that
    host's clock is ahead
    A position is the moment, by true clocks, until which it covers all commits.
    """
    tokens = []
    for commit, waited, ahead in commits:
        requirement, position = Requirement(1000 + commit, 1), None
        if waited is not None:
            sample = Sample(1000 + commit + waited, WalPosition(1, int((1000 + commit + waited) * 10**6)))
            requirement = refresh(requirement, (sample,), since=990, now=1000)
            position = requirement.position
        tokens.append(Token("7", position, math.ceil((requirement.acknowledged_at + ahead) * 1000)))
    chosen = strongest(tokens) if at_once else functools.reduce(lambda one, other: strongest([one, other]), tokens)
    # Without a position, evidence is a sample that is asked for after the token's moment by the reading host's clock.
    shown = chosen.position.lsn / 10**6 if chosen.position is not None else chosen.made_at / 1000 - reader + MARGIN
    assert shown >= 1000 + max(commit for commit, _, _ in commits) - 0.001


GIVEN = Requirement(5.0, 1, WalPosition(1, 50), is_from_token=True)


def test_a_given_position_proves_no_earlier_local_write():
    """A token's position proves no write of this host from before the token was read."""
    unproven = Requirement(4.0, 1)
    assert merge(GIVEN, unproven) == merge(unproven, GIVEN) == Requirement(5.0, 1, None, is_from_token=True)
    proven = Requirement(4.0, 1, WalPosition(1, 80))
    assert merge(GIVEN, proven) == Requirement(5.0, 1, WalPosition(1, 80), is_from_token=True)
    assert merge(GIVEN, Requirement(4.0, 1, WalPosition(1, 20))) == GIVEN
    assert merge(GIVEN, Requirement(4.0, 2, WalPosition(2, 20))) == Requirement(5.0, 2, None, is_from_token=True)


def test_what_is_written_after_a_token_was_heard_of_implies_it():
    own = Requirement(6.0, 1)
    assert merge(GIVEN, own) is merge(own, GIVEN) is own


def test_a_requirement_is_written_once(monkeypatch):
    """The same requirement gives the same text, although two clocks never go exactly alike."""
    tokens = tokens_of()
    requirement = Requirement(time.monotonic(), 1, WalPosition(1, 10))
    first = tokens.write("7", requirement)
    later = time.time() + 0.5
    monkeypatch.setattr(time, "time", lambda: later)
    assert tokens.write("7", requirement) == first
    assert tokens.write("7", requirement._replace(epoch=2)) != first
