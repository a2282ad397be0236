"""Positions compare within one epoch only, and evidence is a sample that was asked for after the commit."""

import pytest

from aurora_router.core.positions import (
    LastRead,
    Requirement,
    Sample,
    WalPosition,
    end_of_record,
    first_sample_after,
    lowest_common,
    merge,
    merge_reads,
    parse_lsn,
)

PAGE = 8192
SEGMENT = 16 * 1024 * 1024


def at(lsn, epoch=1):
    return WalPosition(epoch, lsn)


@pytest.mark.parametrize(
    ("mine", "other", "covered"),
    [
        (at(10), at(9), True),
        (at(10), at(10), True),
        (at(10), at(11), False),
        (at(10, epoch=2), at(9, epoch=1), False),
        (at(10, epoch=1), at(9, epoch=2), False),
        (at(10), "10", False),
    ],
)
def test_a_position_covers_earlier_ones_of_its_epoch(mine, other, covered):
    """A position covers all positions of its epoch that are not beyond it."""
    assert mine.covers(other) is covered


def test_neither_of_two_writers_on_one_timeline_is_newer():
    """Neither of two writers on one timeline is known to have more."""
    assert not at(10).supersedes(at(9))


@pytest.mark.parametrize("text", ["1:0/0", "3:16/B374D848", "255:FFFFFFFF/FFFFFFFF"])
def test_a_position_reads_back_what_it_writes(text):
    assert str(WalPosition.parse(text)) == text


def test_an_lsn_is_two_halves_of_64_bits():
    assert parse_lsn("16/B374D848") == (0x16 << 32) + 0xB374D848


@pytest.mark.parametrize("text", ["", "16", "16-B374D848", "x/1", "1/"])
def test_what_is_no_lsn_raises_value_error(text):
    with pytest.raises(ValueError):
        parse_lsn(text)


@pytest.mark.parametrize("text", ["", "1", "0/1", ":0/1", "a:0/1"])
def test_what_is_no_position_raises_value_error(text):
    with pytest.raises(ValueError):
        WalPosition.parse(text)


@pytest.mark.parametrize(
    ("inserted", "end"),
    [
        (3 * PAGE + 24, 3 * PAGE),
        (3 * PAGE + 23, 3 * PAGE + 23),
        (3 * PAGE + 25, 3 * PAGE + 25),
        (3 * PAGE + 40, 3 * PAGE + 40),
        (3 * PAGE, 3 * PAGE),
        (2 * SEGMENT + 40, 2 * SEGMENT),
        (2 * SEGMENT + 41, 2 * SEGMENT + 41),
        (2 * SEGMENT - PAGE + 24, 2 * SEGMENT - PAGE),
    ],
)
def test_the_end_of_a_record_is_before_a_skipped_header(inserted, end):
    """The end of the last record is before a page header that was stepped over."""
    assert end_of_record(inserted) == end


@pytest.mark.parametrize(("inserted", "end"), [(4096 + 24, 4096), (1024 * 1024 + 40, 1024 * 1024), (8192 + 40, 8192 + 40)])
def test_other_page_and_segment_sizes_have_their_own_boundaries(inserted, end):
    assert end_of_record(inserted, page=4096, segment=1024 * 1024) == end


def test_merging_requirements_keeps_the_later_commit():
    """The requirement that implies both is the one of the later commit."""
    early, late = Requirement(1.0, 1), Requirement(2.0, 1)
    assert merge(early, late) is merge(late, early) is late
    assert merge(None, early) is merge(early, None) is early
    assert merge(None, None) is None


def test_evidence_is_the_first_sample_after_the_commit():
    """Evidence is the oldest sample that was asked for after the commit."""
    samples = (Sample(1.0, at(10)), Sample(2.0, at(20)), Sample(3.0, at(30)))
    assert first_sample_after(samples, 1.5) is samples[1]
    assert first_sample_after(samples, 2.0) is samples[1]
    assert first_sample_after(samples, 0.0) is samples[0]
    assert first_sample_after(samples, 3.1) is None
    assert first_sample_after((), 0.0) is None


@pytest.mark.parametrize(
    ("positions", "least"),
    [
        ((), None),
        ((at(7),), at(7)),
        ((at(9), at(7), at(8)), at(7)),
        ((at(7), None), None),
        ((at(7), at(9, epoch=2)), None),
        ((at(9, epoch=2), at(7), at(9, epoch=2)), None),
    ],
)
def test_the_minimum_is_what_all_cover_or_nothing(positions, least):
    assert lowest_common(positions) == least


B1, B2, B3, C1, C2, D9 = (LastRead(server, float(at), 1) for server, at in ("b1", "b2", "b3", "c1", "c2", "d9"))


@pytest.mark.parametrize(
    ("reads", "last_read", "requirement", "known", "left"),
    [
        # the first read, and the same one again
        ([], B1, None, [], [B1]),
        ([B1], B1, None, [], [B1]),
        ([B1], B2, None, [B1], [B2]),
        # a read of the same server: the later one stays
        ([B1], B2, None, [], [B2]),
        ([B2], B1, None, [], [B2]),
        ([B1, B3], B2, None, [], [B3]),
        ([B1, B2, C1], B3, None, [], [B3, C1]),
        # a read of another server says nothing of the others, unless it had to cover them
        ([B1], C2, None, [], [B1, C2]),
        ([B2], C1, None, [], [B2, C1]),
        ([B1, C1], D9, None, [], [B1, C1, D9]),
        ([B1, C1], D9, None, [B1], [C1, D9]),
        ([B1, C1], D9, None, [B1, C1], [D9]),
        ([B1, C1], D9, None, [B1, C1, B2], [D9]),
        ([B2], C1, None, [B1], [B2, C1]),
        ([C2], C1, None, [C2], [C1]),
        # a unit on the writer covers all that any reader had shown by then
        ([B1, C2], None, Requirement(1.5, 1), [], [C2]),
        ([B1, C2], None, Requirement(2.0, 1), [], []),
        ([B1, C2], None, Requirement(0.5, 1), [], [B1, C2]),
        ([B1, C2], None, Requirement(9.0, 1, is_from_token=True), [], [B1, C2]),
        ([], None, Requirement(9.0, 1), [], []),
        # what a unit on a reader had to see is older than what it has read
        ([B1, C2], D9, Requirement(9.0, 1), [], [B1, C2, D9]),
        ([B1, C2], None, None, [], [B1, C2]),
        ([B1, C2], None, None, [B1], [B1, C2]),
    ],
)
def test_which_reads_later_ones_must_cover(reads, last_read, requirement, known, left):
    """The table has the reads before a unit, what the unit leaves, and the reads that must still be covered."""
    assert merge_reads(frozenset(reads), last_read, requirement, frozenset(known)) == frozenset(left)
