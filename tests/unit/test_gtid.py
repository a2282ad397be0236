"""GTIDs of MySQL and MariaDB: their texts, which position contains which, and what fits into a token."""

import contextlib
import itertools
import time
import uuid
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aurora_router.core.gtid import LAST, LONGEST, SHORT, GtidSet, MariadbGtid, mariadb_epoch, writer_starts
from aurora_router.core.positions import Requirement, WalPosition, lowest_common, merge
from aurora_router.core.token_codec import LONGEST as LONGEST_TOKEN
from aurora_router.core.token_codec import SIGNATURE, Token, strongest

A, B, C = (str(uuid.UUID(int=n << 100 | n)) for n in (1, 2, 3))
settings.register_profile("gtid", deadline=None, max_examples=60)
ONE, TWO = (f"{n:08x}-71ca-11e1-9e33-c80aa9429562" for n in (1, 2))
SETTINGS = settings.get_profile("gtid")
URL_SAFE = set("0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz-_")

numbers = st.integers(1, 40) | st.integers(1, LAST)
runs = st.tuples(numbers, st.integers(0, 8)).map(lambda run: (run[0], min(run[0] + run[1], LAST)))
sources = st.sampled_from([A, B, C, f"{A}:t", f"{A}:u_1", f"{C}:{'z' * 32}"]) | st.uuids().map(str)
contents = st.dictionaries(sources, st.lists(runs, min_size=1, max_size=6), max_size=4)
epochs = st.integers(1, 3)


def written(content):
    return ",".join(f"{source}:" + ":".join(f"{first}-{last}" for first, last in runs) for source, runs in content.items())


gtid_sets = st.builds(lambda epoch, content: GtidSet.from_server(epoch, written(content)), st.just(1), contents)
mariadb_numbers = st.integers(0, 40) | st.integers(0, 2**64 - 1)
mariadb = st.dictionaries(
    st.integers(0, 3) | st.integers(0, 2**32 - 1), st.tuples(st.integers(0, 2**32 - 1), mariadb_numbers)
).map(lambda last: MariadbGtid(1, tuple((domain, server, number) for domain, (server, number) in sorted(last.items()))))
positions = pytest.mark.parametrize("kind", [gtid_sets, mariadb], ids=["mysql", "mariadb"])


def mysql(text, epoch=1, origin=""):
    return GtidSet.from_server(epoch, text, origin)


def members(gtids):
    return {(source, number) for source, runs in gtids.sources for first, last in runs for number in range(first, last + 1)}


small = st.dictionaries(
    st.sampled_from([A, B, f"{A}:t"]),
    st.lists(st.tuples(st.integers(1, 30), st.integers(0, 6)).map(lambda run: (run[0], sum(run))), min_size=1, max_size=5),
    max_size=3,
).map(lambda content: GtidSet.from_server(1, written(content)))


# ---------------------------------------------------------------- rules of both kinds


@positions
@SETTINGS
@given(st.data())
def test_a_position_survives_writing_and_parsing(kind, data):
    """A position that is written and parsed again is the same one, also in a set."""
    one = data.draw(kind)
    again = type(one).parse(str(one))
    assert again == one
    assert len({one, again}) == 1
    assert str(again) == str(one)


@positions
@SETTINGS
@given(st.data())
def test_covering_is_an_order(kind, data):
    one, two, three = data.draw(kind), data.draw(kind), data.draw(kind)
    assert one.covers(one)
    if one.covers(two) and two.covers(three):
        assert one.covers(three)


@positions
@SETTINGS
@given(st.data())
def test_a_union_is_the_smallest_position_that_covers_both(kind, data):
    one, two, three = data.draw(kind), data.draw(kind), data.draw(kind)
    both = one.merge(two)
    assert both.covers(one)
    assert both.covers(two)
    assert both == two.merge(one)
    assert both.merge(three) == one.merge(two.merge(three))
    assert one.merge(one) == one
    assert three.covers(both) is (three.covers(one) and three.covers(two))
    if one.covers(two):
        assert one.covers(both)


@positions
@SETTINGS
@given(st.data(), epochs, epochs)
def test_nothing_compares_across_epochs_or_kinds(kind, data, mine, other):
    one, two = data.draw(kind), data.draw(kind)
    one, two = type(one).parse(f"{mine}:" + str(one)[2:]), type(two).parse(f"{other}:" + str(two)[2:])
    if mine != other:
        assert not one.covers(two)
        assert one.merge(two) is None
    for stranger in (WalPosition(mine, 0), GtidSet(mine), MariadbGtid(mine)):
        if type(stranger) is not type(one):
            assert not one.covers(stranger)
            assert not stranger.covers(one)
            assert one.merge(stranger) is stranger.merge(one) is None


@positions
@SETTINGS
@given(st.data())
def test_a_compact_position_is_short_and_never_claims_more(kind, data):
    """A compact form is short, fit for URLs, and never claims more than the position."""
    one = data.draw(kind)
    short = one.to_token()
    assert len(short) <= SHORT
    assert set(short) <= URL_SAFE
    if short:
        assert one.covers(type(one).from_token(short))


@positions
@SETTINGS
@given(st.data(), st.sampled_from(["7571234567890123456", "c" * 36]), st.integers(0, 10**11))
def test_a_token_is_short_and_reads_as_far_as_it_goes(kind, data, cluster, made_at):
    """A token is short whatever the position is, and that position covers the one that it gives back."""
    one = data.draw(kind)
    text = str(Token(cluster, one, made_at))
    assert len(text) <= LONGEST_TOKEN - SIGNATURE
    token = Token.parse(text)
    assert (token.cluster, token.made_at) == (cluster, made_at)
    assert token.position is None or one.covers(token.position)
    assert str(token) == text


@positions
@SETTINGS
@given(st.data())
def test_requirements_of_two_tokens_merge_to_what_covers_both(kind, data):
    one, two = data.draw(kind), data.draw(kind)
    together = merge(Requirement(1.0, 1, one, is_from_token=True), Requirement(2.0, 1, two, is_from_token=True))
    assert together == Requirement(2.0, 1, one.merge(two), is_from_token=True)


# ---------------------------------------------------------------- MySQL


@SETTINGS
@given(small, small)
def test_covers_and_union_agree_with_sets_of_names(one, two):
    """Covering, union and equality are those of the sets of transactions that the GTID sets contain."""
    assert one.covers(two) is (members(one) >= members(two))
    assert members(one.merge(two)) == members(one) | members(two)
    assert (one == two) is (members(one) == members(two))


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("", ""),
        (" \n", ""),
        (f"{A}:1", f"{A}:1"),
        (f"{A.upper()}:1-5:7-9", f"{A}:1-5:7-9"),
        (f"{B}:1,\n{A}:3:1-2", f"{A}:1-3,{B}:1"),
        (f"{A}:1-5:4-9:2:11:10", f"{A}:1-11"),
        (f"{A}:1,{A}:3", f"{A}:1:3"),
        (f"{A}:tag:3,{A}:1", f"{A}:1:tag:3"),
        (f"{A}:1-2:Tag_1:3-4:tag_2:5,{B}:t:1", f"{A}:1-2:tag_1:3-4:tag_2:5,{B}:t:1"),
        (f"{A}:a:1:b:2:a:3", f"{A}:a:1:3:b:2"),
        (f"{A}: 1 - 5".replace(" - ", "-"), f"{A}:1-5"),
        (f"{A}:{LAST}", f"{A}:{LAST}"),
    ],
)
def test_a_set_is_read_as_servers_write_it(text, canonical):
    assert str(mysql(text, epoch=7)) == f"7:{canonical}"


@pytest.mark.parametrize(
    "text",
    [
        A,
        f"{A}:",
        f"{A}:0",
        f"{A}:-1",
        f"{A}:5-3",
        f"{A}:1-",
        f"{A}:1-2-3",
        f"{A}:1;2",
        f"{A}:{LAST + 1}",
        f"{A}:" + "9" * 5000,
        f"{A}:tag",
        f"{A}:1:tag",
        f"{A}:a:b:1",
        f"{A}:{'t' * 33}:1",
        f"{A}:9t:1",
        f"{A}:t-g:1",
        f"{A}:1,",
        f",{A}:1",
        f"{A[:-1]}:1",
        A.replace("-", "") + ":1",
        f"{{{A}}}:1",
        f"{A}:\u0661",
        f"{A}:\u212a:1",
        f"{A}:1\x00",
        "0-1-100",
        "' OR 1=1",
        f"{A}:1:" + "2:" * (LONGEST // 2),
    ],
)
def test_what_is_no_set_raises_value_error(text):
    with pytest.raises(ValueError):
        mysql(text)
    with pytest.raises(ValueError):
        GtidSet.parse("1:" + text)


@pytest.mark.parametrize("kind", [GtidSet, MariadbGtid])
@pytest.mark.parametrize("text", ["", "1", "x:", ":", "-1:", "9" * 5000 + ":", "\u0661:", "1 :"])
def test_a_position_without_an_epoch_raises_value_error(kind, text):
    with pytest.raises(ValueError):
        kind.parse(text)


@SETTINGS
@given(st.text() | st.text(alphabet="0123456789abcdef-:,_ \n" + A, max_size=120))
def test_no_text_raises_anything_else(text):
    for read in (
        GtidSet.parse,
        MariadbGtid.parse,
        GtidSet.from_token,
        MariadbGtid.from_token,
        mysql,
        mariadb_epoch,
        WalPosition.from_token,
    ):
        with contextlib.suppress(ValueError):
            read(text)


def test_a_gtid_set_with_many_gaps_is_handled_quickly():
    """A set with very many gaps is parsed, compared and united within a small amount of processor time."""
    odd = mysql(f"{A}:" + ":".join(str(number) for number in range(1, 280_000, 2)))
    even = mysql(f"{A}:" + ":".join(str(number) for number in range(2, 280_000, 2)))
    started = time.process_time()
    assert odd.merge(even) == mysql(f"{A}:1-279999")
    assert not odd.covers(even)
    assert odd.covers(odd)
    assert odd.to_token() == ""
    assert time.process_time() - started < 5


def test_a_compact_set_holds_one_source_or_the_writers_own():
    """A compact set holds the transactions of the only source, or else of the writer's own."""
    assert GtidSet.from_token(mysql(f"{A}:1-99999999").to_token()) == mysql(f"{A}:1-99999999")
    assert GtidSet.from_token(mysql(f"{A}:1-5:7").to_token()) == mysql(f"{A}:1-5:7")
    assert GtidSet.from_token(mysql(f"{A}:tag:1-5").to_token()) == mysql(f"{A}:tag:1-5")
    assert mysql(f"{A}:1-5,{B}:1-7").to_token() == ""
    assert GtidSet.from_token(mysql(f"{A}:1-5,{B}:1-7", origin=B.upper()).to_token()) == mysql(f"{B}:1-7")
    assert mysql(f"{A}:1-5,{B}:1-7", origin=C).to_token() == ""
    assert mysql("").to_token() == ""
    assert mysql(f"{A}:1-5", origin=A) == mysql(f"{A}:1-5")
    assert mysql(f"{A}:1-5", origin=B).merge(mysql(f"{A}:6", origin=A)).origin == B


@pytest.mark.parametrize(
    "text",
    [
        "",
        "m",
        "m1-",
        "m1-short-1",
        "m-AAAAAAAAAAAAAAAAAAAAAA-1",
        "m1-AAAAAAAAAAAAAAAAAAAAAA-",
        "m1-AAAAAAAAAAAAAAAAAAAAAA-0",
        "m1-AAAAAAAAAAAAAAAAAAAAAAT-1",
        "a1-",
        "a1-0-1",
        "a1-0-1-2_",
        "a1-0-1-2_0-1-3",
        "a-0-1-2",
        "a1-0-1-99999999999999999999",
        "1-",
        "-A",
        "1-G",
    ],
)
def test_what_is_not_compact_is_refused_and_is_no_token(text):
    text = text.strip()
    for kind in (GtidSet, MariadbGtid, WalPosition):
        with pytest.raises(ValueError):
            kind.from_token(text)
    with pytest.raises(ValueError, match="not a consistency token"):
        Token.parse(f"1.7.{text}.1")


def test_a_token_carries_its_kind_of_position():
    for position in (WalPosition(3, 0xA0), mysql(f"{A}:1-5", epoch=1), MariadbGtid(12, ((0, 1, 100), (1, 2, 55)))):
        assert Token.parse(str(Token("7", position, 5))) == Token("7", position, 5)
    assert str(Token("7", MariadbGtid(12, ((0, 1, 100), (1, 2, 55))), 5)) == "1.7.a12-0-1-100_1-2-55.5"
    assert str(Token("7", mysql(f"{A}:1-5,{B}:1"), 5)) == "1.7.0.5"
    assert str(Token("c" * 36, mysql(f"{A}:1-500000"), 1700000000)) == f"1.{'c' * 36}.0.1700000000"  # no room left


def test_the_latest_token_covers_the_other_or_is_newer():
    """The token that covers the other counts, and if neither does, the one that was made later."""
    one, more, other = (Token("7", mysql(text), at) for text, at in ((f"{A}:1-5", 9), (f"{A}:1-6", 8), (f"{B}:1", 10)))
    assert strongest([one, more]) is strongest([more, one]) is more
    assert strongest([one, other]) is strongest([other, one]) is other


# ---------------------------------------------------------------- MariaDB


@pytest.mark.parametrize(
    ("mine", "other", "covered"),
    [
        ("0-1-100", "0-1-100", True),
        ("0-1-100", "0-1-101", False),
        ("0-2-101", "0-1-100", True),
        ("0-1-100,1-2-55", "1-2-55", True),
        ("0-1-100", "0-1-100,1-2-55", False),
        ("0-1-100", "", True),
        ("", "0-1-0", False),
    ],
)
def test_mariadbs_positions_compare_by_number_in_each_domain(mine, other, covered):
    assert MariadbGtid.from_server(1, mine).covers(MariadbGtid.from_server(1, other)) is covered


def test_mariadbs_position_is_read_as_servers_write_it():
    assert str(MariadbGtid.from_server(3, "1-2-55,0-1-100")) == "3:0-1-100,1-2-55"
    assert str(MariadbGtid.from_server(3, "")) == "3:"
    largest = f"{2**32 - 1}-{2**32 - 1}-{2**64 - 1}"
    assert str(MariadbGtid.from_server(3, largest)) == f"3:{largest}"


@pytest.mark.parametrize(
    "text",
    [
        *("0", "0-1", "0-1-", "0-1-2-3", "0-1-2,", "0-1-2,0-3-4", "a-1-2", "0--1-2", "\u0661-1-1", "0-1-2;", f"{A}:1"),
        *(f"{2**32}-1-1", f"0-{2**32}-1", f"0-1-{2**64}", "0-1-" + "9" * 5000),
        ",".join(f"{domain}-1-1" for domain in range(200_000)),
    ],
)
def test_what_is_no_position_of_mariadb_raises_value_error(text):
    with pytest.raises(ValueError):
        MariadbGtid.from_server(1, text)


def test_too_many_domains_for_a_token_are_none():
    assert MariadbGtid.from_token(MariadbGtid.from_server(12, "0-1-100,1-2-55").to_token()) == MariadbGtid.from_server(
        12, "0-1-100,1-2-55"
    )
    assert MariadbGtid.from_server(1, ",".join(f"{domain}-1-1000" for domain in range(9))).to_token() == ""
    assert MariadbGtid.from_server(1, "").to_token() == ""


@pytest.mark.parametrize("kind", [GtidSet, MariadbGtid])
@pytest.mark.parametrize(
    ("mine", "other", "more"), [("1:", "1:", False), ("1:{a}", "1:", True), ("1:", "1:{a}", False), ("2:{a}", "1:", False)]
)
def test_a_writer_outdoes_another_of_its_epoch_that_has_less(kind, mine, other, more):
    some = f"{ONE}:1-5" if kind is GtidSet else "0-1-5"
    assert kind.parse(mine.format(a=some)).supersedes(kind.parse(other.format(a=some))) is more


@pytest.mark.parametrize(
    ("mine", "other", "newer"),
    [
        (MariadbGtid.from_server(1, "0-1-5", origin=2), MariadbGtid.from_server(1, "0-1-5", origin=1), True),
        (MariadbGtid.from_server(1, "0-1-5", origin=1), MariadbGtid.from_server(1, "0-1-5", origin=2), False),
        (MariadbGtid.from_server(1, "0-1-5", origin=3), MariadbGtid.from_server(1, "0-1-5", origin=2), False),
        (MariadbGtid.from_server(1, "0-1-5", origin=2), MariadbGtid.from_server(1, "0-1-6", origin=1), False),
        (MariadbGtid.from_server(1, "0-1-5"), MariadbGtid.from_server(1, "0-1-5", origin=1), False),
        (MariadbGtid.from_server(1, "0-1-5", origin=1), MariadbGtid.from_server(1, "0-1-5"), True),
        (MariadbGtid.from_server(1, "0-1-5"), MariadbGtid.from_server(1, "0-1-5"), False),
        (MariadbGtid.from_server(1, "0-1-6"), MariadbGtid.from_server(1, "0-1-5", origin=1), False),
        (MariadbGtid.from_server(1, "0-1-6,9-8-7"), MariadbGtid.from_server(1, "0-1-5", origin=1), True),
        (MariadbGtid.from_server(1, "0-1-6", origin=2), MariadbGtid.from_server(1, "0-1-5", origin=1), True),
        (GtidSet.from_server(1, f"{ONE}:1-6:tag:1"), GtidSet.from_server(1, f"{ONE}:1-5", origin=ONE), False),
        (GtidSet.from_server(1, f"{ONE}:1-6,{TWO}:1"), GtidSet.from_server(1, f"{ONE}:1-5", origin=ONE), True),
        (GtidSet.from_server(1, f"{ONE}:1-5"), GtidSet.from_server(1, f"{ONE}:1-5", origin=ONE), False),
        (GtidSet.from_server(1, f"{ONE}:1-5", origin=ONE), GtidSet.from_server(1, f"{ONE}:1-5"), True),
        (GtidSet.from_server(1, f"{ONE}:1-5"), GtidSet.from_server(1, f"{ONE}:1-5"), False),
        (GtidSet.from_server(1, f"{ONE}:1-5", origin=TWO), GtidSet.from_server(1, f"{ONE}:1-5", origin=ONE), True),
        (GtidSet.from_server(1, f"{ONE}:1-5", origin=ONE), GtidSet.from_server(1, f"{ONE}:1-5", origin=TWO), False),
        (
            GtidSet.from_server(1, f"{ONE}:1-5,{TWO}:1", origin=TWO),
            GtidSet.from_server(1, f"{ONE}:1-5,{TWO}:1", origin=ONE),
            False,
        ),
        (GtidSet.from_server(1, f"{ONE}:1-5,{TWO}:1", ONE, 9.5), GtidSet.from_server(1, f"{ONE}:1-5,{TWO}:1", TWO, 8.5), True),
        (GtidSet.from_server(1, f"{ONE}:1-5,{TWO}:1", TWO, 8.5), GtidSet.from_server(1, f"{ONE}:1-5,{TWO}:1", ONE, 9.5), False),
        (GtidSet.from_server(1, f"{ONE}:1-5", ONE, 9.5), GtidSet.from_server(1, f"{ONE}:1-5", TWO), True),
        (GtidSet.from_server(1, f"{ONE}:1-5", ONE), GtidSet.from_server(1, f"{ONE}:1-5", TWO, 9.5), False),
        (GtidSet.from_server(1, f"{ONE}:1-5", "", 9.5), GtidSet.from_server(1, f"{ONE}:1-5", ONE, 8.5), False),
        (GtidSet.from_server(1, f"{ONE}:1-5", ONE, 8.5), GtidSet.from_server(1, f"{ONE}:1-5", "", 9.5), True),
        (GtidSet.from_server(1, f"{ONE}:1-5", ONE, 9.5), GtidSet.from_server(1, f"{ONE}:1-6", TWO, 8.5), False),
        (GtidSet.from_server(1, f"{ONE}:1-5", origin=TWO), MariadbGtid.from_server(1, "0-1-5", origin=1), False),
        (MariadbGtid.from_server(1, "0-1-5", origin=2), GtidSet.from_server(1, f"{ONE}:1-5", origin=ONE), False),
    ],
)
def test_of_two_equal_writers_the_later_one_is_newer(mine, other, newer):
    """If two writers have the same transactions, the one that became a writer later is newer."""
    assert mine.supersedes(other) is newer


@pytest.mark.parametrize(
    ("claims", "last", "before"),
    [
        (GtidSet.from_server(1, f"{ONE}:1-5", ONE), GtidSet.from_server(1, f"{ONE}:1-5,{TWO}:1", TWO, 9.5), True),
        (GtidSet.from_server(1, f"{ONE}:1-7", ONE, 8.5), GtidSet.from_server(1, f"{ONE}:1-5,{TWO}:1", TWO, 9.5), True),
        (GtidSet.from_server(1, f"{ONE}:1-5", ONE, 10.5), GtidSet.from_server(1, f"{ONE}:1-5,{TWO}:1", TWO, 9.5), False),
        (GtidSet.from_server(1, f"{ONE}:1-5,{TWO}:1", ONE), GtidSet.from_server(1, f"{ONE}:1-5,{TWO}:1", TWO, 9.5), False),
        (GtidSet.from_server(1, f"{ONE}:1-5", TWO), GtidSet.from_server(1, f"{ONE}:1-5,{TWO}:1", TWO, 9.5), False),
        (GtidSet.from_server(1, f"{ONE}:1-5", ONE), GtidSet.from_server(1, f"{ONE}:1-5,{TWO}:1", TWO), False),
        (MariadbGtid.from_server(1, "0-1-5", origin=1), MariadbGtid.from_server(1, "0-2-6", origin=2), False),
    ],
)
def test_a_writer_predates_one_that_was_opened_later_and_wrote(claims, last, before):
    """A writer precedes another one that became a writer later and has written since."""
    assert claims.is_of_former_writer(last) is before


def test_mariadbs_epoch_is_where_the_newest_writer_began():
    assert mariadb_epoch("") == 0
    assert mariadb_epoch("0-1-99") == 1
    assert mariadb_epoch("0-1-99,0-2-150") == 100
    assert mariadb_epoch("0-2-150,0-1-400") == 151  # the first writer is back
    assert mariadb_epoch("0-1-99,0-2-150,7-3-5") == 101
    assert mariadb_epoch("0-1-0") == 1


def test_what_a_reader_made_itself_begins_no_epoch():
    assert mariadb_epoch("0-1-99,0-3-100", reader=3) == mariadb_epoch("0-1-99") == 1
    assert mariadb_epoch("0-1-99,9-3-1", reader=3) == 1
    assert mariadb_epoch("0-3-99,0-1-150", reader=3) == 100  # it was the writer before


@SETTINGS
@given(st.lists(st.tuples(st.integers(1, 3), st.integers(1, 9)), min_size=1, max_size=12))
def test_mariadbs_epoch_grows_with_each_promotion_only(history):
    """MariaDB's epoch grows with each promotion and stays the same until the next one."""
    state, number, epochs = {}, 0, []
    for server, transactions in history:
        for _ in range(transactions):
            number += 1
            state[server] = number
            text = ",".join(f"0-{each}-{last}" for each, last in sorted(state.items()))
            epochs.append((mariadb_epoch(text), server))
            assert all(mariadb_epoch(text, reader=each) == mariadb_epoch(text) for each in range(1, 5) if each != server)
    for (before, wrote), (after, writes) in itertools.pairwise(epochs):
        assert after == before if wrote == writes else after > before


# ---------------------------------------------------------------- several positions


def test_the_minimum_of_sets_is_one_that_all_cover_or_nothing():
    least, more, other = mysql(f"{A}:1-5"), mysql(f"{A}:1-5,{B}:1"), mysql(f"{A}:1-4,{B}:1-2")
    assert lowest_common((more, least)) == least
    assert lowest_common((least, other)) is None


# ---------------------------------------------------------------- logs that were begun anew


def mariadb_said(text, origin=-1, state=""):
    return MariadbGtid.from_server(mariadb_epoch(state), text, origin, writer_starts(state))


WRITER = mariadb_said("0-2-150,1-1-60", 2, "0-1-100,0-2-150,1-7-50,1-1-60")


def test_the_start_of_the_newest_writer_is_known_per_domain():
    """The last number before the newest writer is known for each domain."""
    assert writer_starts("") == ()
    assert writer_starts("0-1-99,0-2-150,7-3-5") == ((0, 99), (7, 0))
    assert writer_starts("0-1-99,0-3-100,9-3-1", reader=3) == ((0, 0),)


@pytest.mark.parametrize(
    ("text", "state", "placed"),
    [
        ("0-2-150,1-1-60", "", True),
        ("0-2-101,1-1-51", "0-2-101", True),
        ("0-2-150,1-1-60,9-8-7", "0-1-100,0-2-150,1-7-50,1-1-60,9-8-7", True),
        ("0-2-100,1-1-60", "", False),
        ("0-1-100,1-1-60", "", False),
        ("0-2-150", "", False),
        ("", "", False),
        ("0-2-150,1-1-60", "0-3-120,0-2-150,1-1-60", False),
    ],
    ids=["no log", "as it began", "more domains", "before it", "another's", "a domain is missing", "nothing", "another reign"],
)
def test_a_server_with_the_writers_transactions_is_of_its_epoch(text, state, placed):
    """A server that has replayed all of the writer's own transactions is of the writer's epoch, whatever its own log says."""
    found = mariadb_said(text, 3, state).with_epoch_of(WRITER)
    assert (found.epoch == WRITER.epoch) is placed
    assert found.covers(replace(WRITER, last=found.last)) is placed


def test_nothing_is_placed_behind_what_says_nothing():
    position = mariadb_said("0-2-150", 3)
    for last in (WalPosition(3, 5), mariadb_said("", 2), mariadb_said("0-9-1", 2)):
        assert position.with_epoch_of(last) is position
    assert mysql(f"{A}:1").with_epoch_of(mysql(f"{B}:1")) == mysql(f"{A}:1")


@pytest.mark.parametrize(
    ("mine", "known", "lost"),
    [
        ("0-2-150", "0-2-150", False),
        ("0-2-150", "0-2-151", True),
        ("0-2-150", "0-1-151", False),
        ("", "0-2-1", True),
        ("", "0-1-1", False),
        ("0-2-150", "0-2-150,1-2-9", False),
        ("1-2-1", "0-2-150", True),
    ],
)
def test_a_writer_that_lost_its_own_transactions_lacks_them(mine, known, lost):
    assert mariadb_said(mine, 2).has_lost(mariadb_said(known, 3)) is lost


def test_a_writer_of_mysql_lacks_what_it_said_itself():
    """Only the writer's own earlier answer counts, because a reader may have a transaction before the writer shows it."""
    assert mysql(f"{A}:1-5", origin=A).has_lost(mysql(f"{A}:1-6", origin=A))
    assert not mysql(f"{A}:1-5", origin=A).has_lost(mysql(f"{A}:1-6", origin=B))
    assert not mysql(f"{A}:1-6", origin=A).has_lost(mysql(f"{A}:1-5", origin=A))
    assert not mysql(f"{A}:1-5").has_lost(mysql(f"{A}:1-6"))


def test_only_the_writer_itself_resumes():
    assert mariadb_said("", 2).may_continue(mariadb_said("0-2-150", 2))
    assert not mariadb_said("", 3).may_continue(mariadb_said("0-2-150", 2))
    assert not mariadb_said("").may_continue(mariadb_said("0-2-150"))
    assert not mysql(f"{A}:1", origin=A).may_continue(mysql(f"{A}:1", origin=A))


@pytest.mark.parametrize("kind", [GtidSet, MariadbGtid, WalPosition])
def test_what_a_position_reaches_has_nothing_to_do_with_epochs(kind):
    less, more = {GtidSet: (f"{A}:1-5", f"{A}:1-6"), MariadbGtid: ("0-1-5", "0-1-6"), WalPosition: ("0/5", "0/6")}[kind]
    assert kind.parse(f"1:{more}").covers_ignoring_epoch(kind.parse(f"2:{less}"))
    assert not kind.parse(f"1:{less}").covers_ignoring_epoch(kind.parse(f"1:{more}"))
    for stranger in (WalPosition(1, 0), GtidSet(1), MariadbGtid(1)):
        if type(stranger) is not kind:
            assert not kind.parse(f"1:{more}").covers_ignoring_epoch(stranger)
            assert not kind.parse(f"1:{more}").has_lost(stranger)
            assert not kind.parse(f"1:{more}").may_continue(stranger)
            assert kind.parse(f"1:{more}").with_epoch_of(stranger) == kind.parse(f"1:{more}")
