"""Which server is the writer: an older one is deposed, two that look alike are ambiguous, and the epoch never goes back."""

import pytest

from aurora_router.core.gtid import GtidSet, MariadbGtid
from aurora_router.core.instance import ServerStatus
from aurora_router.core.topology import remove
from tests.unit.topologies import (
    ABC,
    READER,
    REFUSED,
    WELL,
    WRITER,
    after,
    identity,
    mariadb,
    mysql,
    reader,
    said,
    silent,
    topology,
    writer,
)


def test_the_epoch_never_goes_back():
    found = after(WELL, said("b", 2, writer("B", epoch=2)), said("a", 3, writer("A", 500)), said("c", 3, reader("C")))
    assert found.epoch == 2
    assert found.writer.id == "b"
    assert remove(found, "b").epoch == 2


def test_a_deposed_writer_gets_no_role():
    found = after(WELL, said("b", 2, writer("B", epoch=2)))
    assert found.by_id["a"].role is None
    assert found.by_id["a"].error == "deposed: it still accepts writes, but the cluster is at epoch 2"
    assert found.writer.id == "b"
    assert found.by_id["a"].servers == frozenset()


def test_a_reader_that_tells_of_a_newer_epoch_deposes_the_writer():
    found = after(WELL, said("c", 2, reader("C", epoch=2)))
    assert found.writer is None
    assert "deposed" in found.by_id["a"].error


def test_two_writers_of_the_same_epoch_are_ambiguous():
    """Two writers of the same epoch are ambiguous, and neither is the writer."""
    found = after(WELL, said("b", 2, writer("B")))
    assert found.writer is None
    assert found.ambiguous == ("a", "b")
    assert "so does another" in found.by_id["a"].error
    assert [i.id for i in found.readers] == ["c"]


@pytest.mark.parametrize(
    "end", [silent("b", 3, identity("B"), REFUSED), said("b", 3, reader("B")), said("a", 3, writer("A", epoch=2))]
)
def test_an_ambiguity_ends_when_one_is_gone_follows_or_is_newer(end):
    """An ambiguity ends when one writer is gone, follows the other, or is newer."""
    found = after(WELL, said("b", 2, writer("B")), end)
    assert found.writer.id == "a"
    assert found.ambiguous == ()


def test_a_deposed_writer_is_none_when_the_newer_one_is_gone():
    """A deposed writer of the same epoch does not become the writer when the newer one is gone."""
    promoted = after(
        ABC, said("a", 1, mysql("A", "A5")), silent("a", 2, identity("A"), REFUSED), said("b", 3, mysql("B", "A5B2", 9))
    )
    back = after(promoted, said("a", 4, mysql("A", "A5")))
    alone = after(back, silent("b", 5, identity("B"), REFUSED))
    assert (back.writer.id, alone.writer, alone.ambiguous) == ("b", None, ())
    assert "deposed: it still accepts writes, but lacks some" in alone.by_id["a"].error
    assert after(alone, said("b", 6, mysql("B", "A5B2"))).writer.id == "b", "restarted, and nobody told it anything since"


def test_a_deposed_writer_with_lost_commits_is_not_ambiguous():
    """A deposed writer is not ambiguous, even if it has transactions that the newer one lacks."""
    promoted = after(
        ABC, said("a", 1, mysql("A", "A7")), silent("a", 2, identity("A"), REFUSED), said("b", 3, mysql("B", "A5B2", 9))
    )
    found = after(promoted, said("a", 4, mysql("A", "A7")))
    assert (promoted.writer.id, found.writer.id, found.ambiguous) == ("b", "b", ())


def test_a_later_promotion_that_lost_transactions_wins():
    """A server that was promoted later is the writer, even if transactions were lost."""
    start = after(ABC, said("b", 1, mysql("B", "A5B2", 9)), silent("b", 2, identity("B"), REFUSED))
    assert after(start, said("c", 3, mysql("C", "A5", 10))).writer.id == "c"
    assert after(start, said("c", 3, mysql("C", "A5B2"))).writer.id == "c", "by a restart, but it has all"


def test_a_promoted_reader_whose_log_forgot_the_epoch_is_of_it():
    start = after(
        ABC,
        said("a", 1, mariadb("A", WRITER, "0-1-60", 1, "0-9-50,0-1-60")),
        said("b", 1, mariadb("B", READER, "0-1-60", 2, "0-1-60")),
    )
    assert start.by_id["b"].position == MariadbGtid(51, ((0, 1, 60),))
    promoted = after(start, silent("a", 2, identity("A"), REFUSED), said("b", 3, mariadb("B", WRITER, "0-1-59", 2, "0-1-59")))
    assert (promoted.writer.id, promoted.epoch) == ("b", 51)


def test_a_writer_that_came_back_before_the_reset_stays_deposed():
    """A writer of an older epoch stays deposed until it is seen as a reader, although the epoch goes back."""
    promoted = after(
        ABC,
        said("a", 1, mariadb("A", WRITER, "0-1-60", 1, "0-1-60")),
        said("b", 2, mariadb("B", WRITER, "0-2-51", 2, "0-1-50,0-2-51")),
        said("b", 3, mariadb("B", WRITER, "0-2-1", 2, "0-2-1")),
    )
    back = after(promoted, said("a", 4, mariadb("A", WRITER, "0-1-90", 1, "0-1-90")))
    assert (back.epoch, back.writer.id, back.ambiguous) == (1, "b", ())
    assert back.by_id["a"].error.startswith("deposed")
    alone = after(back, silent("b", 5, identity("B"), REFUSED))
    assert (alone.writer, alone.ambiguous) == (None, ())
    follows = after(alone, said("a", 6, mariadb("A", READER, "0-2-1", 1, "0-2-1")))
    assert after(follows, said("a", 7, mariadb("A", WRITER, "0-2-1", 1, "0-2-1"))).writer.id == "a"


def gtids(text, origin):
    return GtidSet.from_server(1, text, origin)


A1, B1 = "a" * 8 + "-aaaa-aaaa-aaaa-" + "a" * 12, "b" * 8 + "-bbbb-bbbb-bbbb-" + "b" * 12


def test_of_two_writers_the_one_with_all_transactions_wins():
    """If one of two writers of an epoch has all transactions of the other, it is the writer, and the other is deposed."""
    old = ServerStatus(identity("A"), WRITER, 1, gtids(f"{A1}:1-9", A1))
    new = ServerStatus(identity("B"), WRITER, 1, gtids(f"{A1}:1-9,{B1}:1-2", B1))
    found = after(topology("a", "b"), said("a", 1, old), said("b", 1, new))
    assert found.writer.id == "b"
    assert found.ambiguous == ()
    assert "b does so, too, and is newer" in found.by_id["a"].error


def test_samples_start_anew_if_a_new_writer_lacks_transactions():
    """Samples begin anew if a new writer lacks transactions that an earlier one of its epoch had."""
    old = ServerStatus(identity("A"), WRITER, 1, gtids(f"{A1}:1-9", A1))
    new = ServerStatus(identity("B"), WRITER, 1, gtids(f"{A1}:1-7,{B1}:1", B1))
    found = after(topology("a", "b"), said("a", 1, old), silent("a", 2, identity("A"), REFUSED), said("b", 3, new))
    assert found.writer.id == "b"
    assert [sample.asked_at for sample in found.samples] == [3]
