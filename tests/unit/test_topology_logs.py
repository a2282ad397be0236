"""A log that begins anew, or has filters: its servers go on serving, and their positions prove nothing to anybody."""

from aurora_router.core.gtid import MariadbGtid
from aurora_router.core.instance import ServerStatus
from aurora_router.core.positions import Requirement
from aurora_router.core.selection import satisfies_requirement
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
    writer,
)

ANEW = after(
    ABC,
    said("a", 1, mariadb("A", WRITER, "0-1-50", 1, "0-1-50")),
    said("b", 1, mariadb("B", READER, "0-1-50", 2, "0-1-50")),
    said("a", 2, mariadb("A", WRITER, "", 1, "")),
)


def test_a_writer_whose_log_was_begun_anew_is_the_writer_still():
    """After RESET MASTER the writer stays the writer, in an older epoch, and readers of the old log serve but prove nothing."""
    assert (WELL.by_id["b"].unproven, ANEW.epoch, ANEW.writer.id) == ("", 0, "a")
    assert [i.id for i in ANEW.readers] == ["b"]
    assert ANEW.by_id["b"].position is None
    assert "RESET MASTER" in ANEW.by_id["b"].unproven
    own = Requirement(1.5, 1)
    assert not satisfies_requirement(ANEW.by_id["b"], own, ANEW, 5.0, 10**6)
    going_on = after(ANEW, said("a", 3, mariadb("A", WRITER, "0-1-70", 1, "0-1-70")))
    still = after(going_on, said("b", 4, mariadb("B", READER, "0-1-50", 2, "0-1-50")))
    assert not satisfies_requirement(still.by_id["b"], own, still, 5.0, 10**6)


def test_a_reader_with_filters_serves_who_has_written_nothing():
    filtered = reader("C")._replace(unproven="it has filters")
    found = after(WELL, said("a", 2, writer("A")), said("c", 2, filtered), said("b", 2, reader("B")))
    assert [i.id for i in found.readers] == ["b", "c"]
    assert (found.by_id["c"].unproven, found.by_id["c"].position) == ("it has filters", None)
    own = Requirement(1.5, 1)
    assert [satisfies_requirement(found.by_id[i], own, found, 5.0, 10**6) for i in "bc"] == [True, False]
    down = after(found, silent("c", 3, identity("C"), REFUSED))
    assert down.by_id["c"].unproven == "it has filters", "nobody is warned again when it is back"


def test_a_writer_with_filters_keeps_who_has_written():
    found = after(WELL, said("a", 2, writer("A")._replace(unproven="its log has filters")), said("b", 2, reader("B")))
    assert (found.writer.id, found.writer.position, found.samples[-1].asked_at) == ("a", None, 1)
    own = Requirement(1.5, 1)
    assert not any(satisfies_requirement(found.by_id[i], own, found, 5.0, 10**6) for i in "bc")


def test_a_reader_that_went_back_or_restarted_is_proven_again():
    """A reader that went back or was restarted is no longer taken to be astray."""
    made_anew = after(ANEW, said("b", 3, mariadb("B", READER, "", 2, "")))
    assert made_anew.by_id["b"].unproven == ""
    restarted = mariadb("B", READER, "0-1-50", 2, "0-1-50")
    restarted = restarted._replace(id=identity("B", "t1"))
    assert after(ANEW, silent("a", 3, identity("A"), REFUSED), said("b", 3, restarted)).by_id["b"].unproven == ""


def own_writes_are_proved(found):
    return satisfies_requirement(found.by_id["b"], Requirement(0.9, 1), found, 5.0, 10**6)


def line(asked, number, *, took=0.001):
    """An answer of the writer, whose log was begun anew before anybody asked."""
    return said("a", asked, mariadb("A", WRITER, number and f"0-1-{number}", 1, number and f"0-1-{number}"), took=took)


def other_line(asked):
    """An answer of its reader, which has transactions of the old log."""
    return said("b", asked, mariadb("B", READER, "0-1-50", 2, "0-1-50"))


def test_a_reader_asked_with_the_writer_proves_nothing_yet():
    """A reader that was asked together with the writer proves nothing yet: it may have the old log, or just be further."""
    together = after(ABC, other_line(1), line(1, 7))
    assert (together.by_id["b"].position, together.by_id["b"].unproven) == (None, "")
    assert not own_writes_are_proved(together)
    same_line = after(together, line(2, 50))
    assert own_writes_are_proved(same_line)
    assert "RESET MASTER" in after(together, line(2, 8)).by_id["b"].unproven


def test_a_reader_that_answers_sooner_is_seen_to_be_astray():
    """A reader of the old log is found even if it answers sooner, so that the writer is always asked before its newest answer."""
    found = after(ABC, *(answer for n in range(1, 4) for answer in (other_line(n), other_line(n + 0.9), line(n, n, took=1.0))))
    assert "RESET MASTER" in found.by_id["b"].unproven


def test_a_reader_that_once_had_the_same_line_proves_ahead_of_it():
    """A reader that once had the writer's line is proof ahead of the writer's answer, because it gets all from the writer."""
    found = after(ABC, line(1, 50), other_line(1), said("b", 2, mariadb("B", READER, "0-1-60", 2, "0-1-60")))
    assert found.by_id["b"].position == MariadbGtid(1, ((0, 1, 60),))
    restarted = mariadb("B", READER, "0-1-60", 2, "0-1-60")._replace(id=identity("B", "t1"))
    assert after(found, said("b", 3, restarted)).by_id["b"].position is None, "it may be another's copy"
    assert own_writes_are_proved(after(found, said("b", 3, restarted), line(4, 60)))


def test_a_server_without_a_position_is_in_no_epoch_but_its_own():
    found = after(
        ANEW, said("c", 3, ServerStatus(identity("C"), READER, 0)), said("a", 4, ServerStatus(identity("A"), WRITER, 0))
    )
    assert (found.writer.id, found.by_id["c"].role) == ("a", READER)


def test_a_mysql_writer_that_lost_transactions_misleads_readers():
    """A MySQL writer that has fewer transactions than it said before leads its readers astray."""
    b = ServerStatus(identity("B"), READER, 1, mysql("B", "A9").position, 0.0)
    found = after(ABC, said("a", 1, mysql("A", "A9")), said("b", 1, b), said("a", 2, mysql("A", "A2")))
    assert "RESET MASTER" in found.by_id["b"].unproven
