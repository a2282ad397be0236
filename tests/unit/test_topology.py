"""observe(): one observation after another, and the use of the instances after that."""

from dataclasses import replace
from functools import reduce

import pytest

from aurora_router.core import gtid
from aurora_router.core.gtid import GtidSet, MariadbGtid, began
from aurora_router.core.positions import Requirement, WalPosition
from aurora_router.core.selection import satisfies
from aurora_router.core.topology import (
    SAMPLES,
    Instance,
    Observation,
    Role,
    Server,
    ServerId,
    Silence,
    Topology,
    add,
    behind,
    forget,
    hold,
    observe,
    remove,
    renewed,
    survived,
)

WRITER, READER = Role
REFUSED, NOT_NOW, TIMEOUT, MISCONFIGURED = Silence


def identity(address, started=None, cluster="7001"):
    return ServerId(cluster, address, 5432, started or f"{address}'s first start")


def writer(address, lsn=100, *, epoch=1, **options):
    return Server(identity(address, **options), WRITER, epoch, WalPosition(epoch, lsn))


def reader(address, lsn=100, *, epoch=1, lag=0.0, **options):
    return Server(identity(address, **options), READER, epoch, WalPosition(epoch, lsn), lag)


def said(instance, asked, server, *, pooled=False, took=0.001):
    return Observation(instance, asked, asked + took, server, pooled=pooled)


def silent(instance, asked, about=None, silence=TIMEOUT):
    return Observation(instance, asked, asked + 1.0, about=about, silence=silence, error=f"{silence.value} at {asked:g}")


def topology(*ids, reader_endpoint=None):
    found = reduce(add, (Instance(i, i, 5432) for i in ids), Topology())
    return add(found, Instance(reader_endpoint, reader_endpoint, 5432, reader_only=True)) if reader_endpoint else found


def after(start, *observations):
    return reduce(observe, observations, start)


ABC = topology("a", "b", "c")
WELL = after(ABC, said("a", 1, writer("A")), said("b", 1, reader("B")), said("c", 1, reader("C", 90)))


def test_a_cluster_at_rest_has_a_writer_and_its_readers():
    assert WELL.writer.id == "a"
    assert [i.id for i in WELL.readers] == ["b", "c"]
    assert WELL.epoch == 1
    assert WELL.cluster == "7001"
    assert WELL.ambiguous == ()
    assert WELL.probed
    assert all(instance.healthy for instance in WELL)
    assert WELL.by_id["c"].position == WalPosition(1, 90)
    assert WELL.by_id["c"].servers == {identity("C")}


def test_before_the_first_answer_nobody_has_a_role():
    assert not ABC.probed
    assert ABC.writer is None
    assert ABC.epoch == 0
    assert ABC.said() == ("a: not probed yet", "b: not probed yet", "c: not probed yet")
    assert not after(ABC, said("a", 1, writer("A"))).probed


def test_an_instance_says_its_role_position_and_lag_or_its_error():
    found = after(WELL, said("b", 2, reader("B", 0x1A, lag=0.25)), silent("c", 2, identity("C"), REFUSED))
    assert found.said() == ("a: writer at 1:0/64", "b: reader at 1:0/1A, 250 ms behind", "c: refused at 2")
    unknown = after(ABC, said("a", 1, Server(identity("A"), WRITER, 1)))
    assert unknown.said()[0] == "a: writer at an unknown position"


def test_an_observation_of_an_unknown_instance_changes_nothing():
    """An observation of an instance that is not in the topology changes nothing."""
    assert observe(WELL, said("z", 2, writer("Z", epoch=9))) is WELL


def test_a_late_answer_never_wins():
    assert observe(WELL, said("b", 1, reader("B", 999))) is WELL
    assert observe(WELL, said("b", 0.5, writer("B", epoch=9))) is WELL


def test_a_late_answer_of_a_server_that_is_out_of_use_never_wins():
    down = after(WELL, silent("b", 3, identity("B"), REFUSED))
    assert observe(down, said("b", 2, reader("B"))) is down
    assert observe(down, said("b", 3, reader("B"))) is down
    assert after(down, said("b", 4, reader("B"))).by_id["b"].healthy


def test_an_answer_older_than_a_silence_does_not_undo_it():
    missed = after(WELL, silent("b", 3, identity("B")))
    assert observe(missed, said("b", 2, reader("B"))) is missed
    assert not after(missed, said("b", 2, reader("B")), silent("b", 4, identity("B"))).by_id["b"].healthy


def test_a_late_silence_never_wins():
    for silence in (REFUSED, TIMEOUT):
        assert observe(WELL, silent("b", 1, identity("B"), silence)) is WELL
    down = after(WELL, silent("b", 3, identity("B"), REFUSED))
    assert observe(down, silent("b", 2, None, MISCONFIGURED)) is down


def test_silence_once_makes_suspect_and_twice_takes_out_of_use():
    once = after(WELL, silent("b", 2, identity("B")))
    assert once.by_id["b"].healthy
    assert once.by_id["b"].misses == 1
    twice = after(once, silent("b", 3, identity("B")))
    assert not twice.by_id["b"].healthy
    assert twice.by_id["b"].misses == 0
    assert twice.by_id["b"].error == "timeout at 3"
    assert twice.by_id["b"].silence is TIMEOUT


def test_an_answer_between_two_silences_starts_the_count_again():
    found = after(WELL, silent("b", 2, identity("B")), said("b", 3, reader("B")), silent("b", 4, identity("B")))
    assert found.by_id["b"].healthy
    assert found.by_id["b"].misses == 1


def test_an_answer_of_one_server_hides_no_silence_of_another():
    """The answers of one server do not undo the silence of another one behind the same name."""
    found = after(topology("a", reader_endpoint="ro"), said("ro", 1, reader("B")), said("ro", 1.1, reader("C")))
    found = after(found, silent("ro", 2, identity("B")), said("ro", 2.1, reader("C")), silent("ro", 3, identity("B")))
    assert found.by_id["ro"].servers == {identity("C")}


@pytest.mark.parametrize("silence", [REFUSED, MISCONFIGURED])
def test_a_refusal_takes_out_of_use_at_once(silence):
    found = after(WELL, silent("b", 2, identity("B"), silence))
    assert not found.by_id["b"].healthy
    assert found.by_id["b"].silence is silence
    assert [i.id for i in found.readers] == ["c"]


def test_a_late_probe_that_is_then_refused_ends_the_use():
    """A server whose probe was overdue and is then refused is not used any more."""
    found = after(WELL, silent("b", 2, identity("B")), silent("b", 2, identity("B"), REFUSED))
    assert not found.by_id["b"].healthy


def test_a_failed_extra_connection_says_nothing_of_others():
    """A new connection that failed says nothing about the existing connections."""
    assert observe(WELL, silent("b", 2, None, REFUSED)) is WELL
    assert observe(WELL, silent("b", 2, identity("Z"), REFUSED)) is WELL


def test_an_instance_that_never_answered_says_why():
    found = after(ABC, silent("b", 1, None, REFUSED))
    assert found.by_id["b"].probed
    assert found.by_id["b"].error == "refused at 1"
    assert after(found, silent("b", 2, None, TIMEOUT)).by_id["b"].error == "timeout at 2"


def test_a_restarted_server_replaces_its_older_life():
    """A restarted server replaces its older life, even if it is further back in its log."""
    found = after(WELL, said("b", 2, reader("B", 80, started="t1")))
    assert found.by_id["b"].position == WalPosition(1, 80)
    assert found.by_id["b"].servers == {identity("B", "t1")}
    assert observe(found, said("b", 1.5, reader("B", 100))) is found


def test_a_refusal_of_the_older_life_does_not_touch_the_newer():
    found = after(WELL, said("b", 2, reader("B", 80, started="t1")))
    assert observe(found, silent("b", 3, identity("B"), REFUSED)) is found


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


def mysql(address, text, opened=0.0):
    made = {"A": 1, "B": 2, "C": 3}
    sources = ",".join(f"00000000-0000-0000-0000-{made[name]:012}:1-{text[n + 1]}" for n, name in enumerate(text) if name in made)
    return Server(identity(address), WRITER, 1, GtidSet.said(1, sources, f"00000000-0000-0000-0000-{made[address]:012}", opened))


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


def mariadb(address, role, text, own, state):
    epoch = began(state, own if role is READER else None)
    position = MariadbGtid.said(epoch, text, own, gtid.behind(state, own if role is READER else None))
    return Server(identity(address), role, epoch if role is WRITER else 0, position, 0.0 if role is READER else None)


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
    assert not satisfies(ANEW.by_id["b"], own, ANEW, 5.0, 10**6)
    going_on = after(ANEW, said("a", 3, mariadb("A", WRITER, "0-1-70", 1, "0-1-70")))
    still = after(going_on, said("b", 4, mariadb("B", READER, "0-1-50", 2, "0-1-50")))
    assert not satisfies(still.by_id["b"], own, still, 5.0, 10**6)


def test_a_reader_with_filters_serves_who_has_written_nothing():
    filtered = replace(reader("C"), unproven="it has filters")
    found = after(WELL, said("a", 2, writer("A")), said("c", 2, filtered), said("b", 2, reader("B")))
    assert [i.id for i in found.readers] == ["b", "c"]
    assert (found.by_id["c"].unproven, found.by_id["c"].position) == ("it has filters", None)
    own = Requirement(1.5, 1)
    assert [satisfies(found.by_id[i], own, found, 5.0, 10**6) for i in "bc"] == [True, False]
    down = after(found, silent("c", 3, identity("C"), REFUSED))
    assert down.by_id["c"].unproven == "it has filters", "nobody is warned again when it is back"


def test_a_writer_with_filters_keeps_who_has_written():
    found = after(WELL, said("a", 2, replace(writer("A"), unproven="its log has filters")), said("b", 2, reader("B")))
    assert (found.writer.id, found.writer.position, found.samples[-1].asked_at) == ("a", None, 1)
    own = Requirement(1.5, 1)
    assert not any(satisfies(found.by_id[i], own, found, 5.0, 10**6) for i in "bc")


def test_a_reader_that_went_back_or_restarted_is_proven_again():
    """A reader that went back or was restarted is no longer taken to be astray."""
    made_anew = after(ANEW, said("b", 3, mariadb("B", READER, "", 2, "")))
    assert made_anew.by_id["b"].unproven == ""
    restarted = mariadb("B", READER, "0-1-50", 2, "0-1-50")
    restarted = replace(restarted, id=identity("B", "t1"))
    assert after(ANEW, silent("a", 3, identity("A"), REFUSED), said("b", 3, restarted)).by_id["b"].unproven == ""


def own_writes_are_proved(found):
    return satisfies(found.by_id["b"], Requirement(0.9, 1), found, 5.0, 10**6)


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
    restarted = replace(mariadb("B", READER, "0-1-60", 2, "0-1-60"), id=identity("B", "t1"))
    assert after(found, said("b", 3, restarted)).by_id["b"].position is None, "it may be another's copy"
    assert own_writes_are_proved(after(found, said("b", 3, restarted), line(4, 60)))


def test_a_server_without_a_position_is_in_no_epoch_but_its_own():
    found = after(ANEW, said("c", 3, Server(identity("C"), READER, 0)), said("a", 4, Server(identity("A"), WRITER, 0)))
    assert (found.writer.id, found.by_id["c"].role) == ("a", READER)


def test_a_promoted_reader_whose_log_forgot_the_epoch_is_of_it():
    start = after(
        ABC,
        said("a", 1, mariadb("A", WRITER, "0-1-60", 1, "0-9-50,0-1-60")),
        said("b", 1, mariadb("B", READER, "0-1-60", 2, "0-1-60")),
    )
    assert start.by_id["b"].position == MariadbGtid(51, ((0, 1, 60),))
    promoted = after(start, silent("a", 2, identity("A"), REFUSED), said("b", 3, mariadb("B", WRITER, "0-1-59", 2, "0-1-59")))
    assert (promoted.writer.id, promoted.epoch) == ("b", 51)


def test_a_mysql_writer_that_lost_transactions_misleads_readers():
    """A MySQL writer that has fewer transactions than it said before leads its readers astray."""
    b = Server(identity("B"), READER, 1, mysql("B", "A9").position, 0.0)
    found = after(ABC, said("a", 1, mysql("A", "A9")), said("b", 1, b), said("a", 2, mysql("A", "A2")))
    assert "RESET MASTER" in found.by_id["b"].unproven


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


def test_one_server_under_two_names_is_the_writer_under_one():
    """One server under two names is the writer under the first one."""
    found = after(topology("a", "vip"), said("a", 1, writer("A")), said("vip", 1, writer("A")))
    assert found.writer.id == "a"
    assert found.ambiguous == ()
    assert found.by_id["vip"].role is None
    assert found.by_id["vip"].error == "the writer under another name, used as a"


def test_one_server_at_two_addresses_is_still_one():
    found = after(topology("a", "vip"), said("a", 1, writer("A")), said("vip", 1, writer("10.9.9.9", started="A's first start")))
    assert found.writer.id == "a"
    assert found.ambiguous == ()


def test_a_reader_endpoint_never_serves_as_the_writer():
    found = after(topology("a", reader_endpoint="ro"), said("ro", 1, writer("A")))
    assert found.writer is None
    assert found.by_id["ro"].error == "accepts writes, but is a reader endpoint"
    found = after(found, said("a", 1, writer("A")))
    assert found.writer.id == "a"
    assert found.ambiguous == ()


def test_a_reader_endpoint_counts_as_its_furthest_behind_server():
    """A reader endpoint counts as far as the server that is furthest behind."""
    start = after(topology("a", reader_endpoint="ro"), said("a", 1, writer("A")))
    found = after(start, said("ro", 1, reader("B", 100, lag=0.5), took=0.25), said("ro", 2, reader("C", 90, lag=2.0)))
    ro = found.by_id["ro"]
    assert ro.position == WalPosition(1, 90)
    assert ro.lag == 2.0
    assert ro.latency == pytest.approx(0.25)
    assert ro.servers == {identity("B"), identity("C")}
    unknown = after(found, said("ro", 3, reader("B", 100, lag=None)))
    assert unknown.by_id["ro"].lag is None
    elsewhere = after(found, said("ro", 3, reader("B", 100, epoch=2)))
    assert elsewhere.by_id["ro"].position is None


def test_one_of_two_servers_that_dies_leaves_the_other():
    found = after(topology("a", reader_endpoint="ro"), said("ro", 1, reader("B", 90)), said("ro", 1.1, reader("C", 100)))
    found = after(found, silent("ro", 2, identity("B"), REFUSED))
    assert found.by_id["ro"].position == WalPosition(1, 100)
    assert found.by_id["ro"].error == ""


def test_a_promoted_server_leaves_the_reader_endpoint():
    """A promoted server serves no reads behind the reader endpoint."""
    start = after(topology("a", reader_endpoint="ro"), said("ro", 1, reader("B")), said("ro", 1.1, reader("C")))
    found = after(start, said("ro", 2, writer("B", epoch=2)))
    assert found.by_id["ro"].servers == {identity("C")}


def test_an_instance_of_another_cluster_is_refused():
    """An instance of another cluster is refused, and the error names both clusters."""
    found = after(WELL, silent("c", 2, identity("C"), REFUSED), said("c", 3, reader("C", cluster="9")))
    assert not found.by_id["c"].healthy
    assert found.by_id["c"].error == "belongs to another cluster (9, not 7001)"
    assert found.by_id["c"].silence is MISCONFIGURED
    assert found.epoch == 1
    assert after(WELL, said("c", 3, writer("C", cluster="9", epoch=7))).epoch == 1


def of_mariadb(address, cluster, role=READER, started=None):
    server = mariadb(address, role, "0-1-50", {"A": 1, "B": 2}[address], "0-1-50")
    return replace(server, id=identity(address, started, cluster=cluster))


MARIA = after(topology("a", "b"), said("a", 1, of_mariadb("A", "mariadb-0", WRITER)), said("b", 1, of_mariadb("B", "mariadb-0")))


def test_servers_whose_cluster_gets_another_name_go_on():
    """Servers go on if their cluster's name changes, one after the other, by SET GLOBAL gtid_domain_id or a group's name."""
    reader_first = after(MARIA, said("b", 2, of_mariadb("B", "mariadb-42")))
    assert (reader_first.cluster, reader_first.writer.id, [i.id for i in reader_first.readers]) == ("mariadb-0", "a", ["b"])
    both = after(reader_first, said("a", 3, of_mariadb("A", "mariadb-42", WRITER)))
    assert (both.cluster, both.writer.id, [i.id for i in both.readers]) == ("mariadb-42", "a", ["b"])
    dead = after(both, silent("a", 4, identity("A", cluster="mariadb-42"), REFUSED))
    assert (dead.writer, dead.by_id["a"].healthy) == (None, False)
    assert after(dead, said("a", 5, of_mariadb("A", "mariadb-42", WRITER))).writer.id == "a"
    promoted = after(reader_first, silent("a", 4, identity("A", cluster="mariadb-0"), REFUSED))
    promoted = after(promoted, said("b", 5, of_mariadb("B", "mariadb-42", WRITER)))
    assert (promoted.cluster, promoted.writer.id) == ("mariadb-42", "b")


def test_a_writer_that_was_lost_a_moment_is_known_by_its_run():
    lost = after(MARIA, silent("a", 2, identity("A", cluster="mariadb-0"), REFUSED))
    assert after(lost, said("a", 3, of_mariadb("A", "mariadb-42", WRITER))).writer.id == "a"
    assert after(lost, said("a", 3, of_mariadb("A", "mariadb-42", WRITER, "t1"))).writer is None


def stranger(address, role=READER, **options):
    make = writer if role is WRITER else reader
    return make(address, cluster="9009", started=f"{address} anew", **options)


def test_a_stranger_takes_what_stood_at_its_place_out_of_use():
    """A server of a cluster that was made anew gets no units, and the old server at its place counts as healthy no longer."""
    found = after(WELL, said("a", 2, stranger("A", WRITER, epoch=7)))
    assert (found.writer, found.by_id["a"].foreign, found.epoch, found.cluster) == (None, "9009", 1, "7001")
    assert [i.id for i in found.readers] == ["b", "c"]
    assert found.successor is None
    assert "; check where its name leads" in found.said()[0]
    assert found.trouble(found.by_id["a"]) == "belongs to another cluster (9009, not 7001); check where its name leads"
    assert observe(found, said("a", 1.5, stranger("A", WRITER))) is found
    down = after(found, silent("a", 3, identity("A", "A anew", cluster="9009"), REFUSED))
    assert (down.by_id["a"].foreign, down.by_id["a"].error) == (None, "refused at 3")
    back = after(found, said("a", 3, writer("A")))
    assert (back.writer.id, back.by_id["a"].foreign) == ("a", None)


def test_a_stranger_behind_a_reader_endpoint_leaves_the_others():
    start = after(topology("a", reader_endpoint="ro"), said("ro", 1, reader("B")), said("ro", 1.1, reader("C")))
    assert after(start, said("ro", 2, stranger("C"))).by_id["ro"].servers == {identity("B")}


def test_a_cluster_that_all_instances_name_may_succeed():
    """A cluster that all instances name may take the place of the old one."""
    two = after(WELL, said("a", 2, stranger("A", WRITER)), said("b", 2, stranger("B")))
    assert (two.successor, two.writer) == (None, None), "one of the old ones may be the writer tomorrow"
    all_three = after(two, said("c", 2, stranger("C")))
    assert all_three.successor == "9009"
    assert all("set accept_new_cluster=True or start this process again" in line for line in all_three.said())
    anew = renewed(all_three)
    assert (anew.cluster, anew.epoch, anew.samples, anew.probed) == (None, 0, (), False)
    assert [i.id for i in anew] == ["a", "b", "c"]
    assert after(anew, said("a", 3, stranger("A", WRITER))).writer.id == "a"
    assert Topology().successor is None


def test_behind_a_pooler_positions_are_no_evidence_from_then_on():
    found = after(
        topology("a", "b"), said("b", 1, reader("B")), said("b", 2, reader("C"), pooled=True), said("b", 3, reader("B"))
    )
    assert found.by_id["b"].pooled
    assert found.by_id["b"].position is None
    assert found.by_id["b"].servers == {identity("B"), identity("C")}


def test_behind_a_pooler_a_failure_speaks_for_all_servers():
    start = after(topology("a", "b"), said("b", 1, reader("B")), said("b", 2, reader("C"), pooled=True))
    assert not after(start, silent("b", 3, identity("C"), REFUSED)).by_id["b"].healthy
    once = after(start, silent("b", 3, identity("C")))
    assert once.by_id["b"].healthy
    assert not after(once, silent("b", 4, identity("C"))).by_id["b"].healthy


def test_a_server_to_which_the_name_leads_no_longer_is_forgotten():
    found = after(WELL, said("a", 2, writer("D", 120, epoch=2)))
    assert found.by_id["a"].servers == {identity("D")}
    gone = forget(found, "a", identity("A"))
    assert [seen.server.id for seen in gone.by_id["a"].seen] == [identity("D")]
    nobody = forget(gone, "a", identity("D"))
    assert nobody.by_id["a"].error == "the name leads elsewhere"
    assert nobody.writer is None


@pytest.mark.parametrize(("instance", "address"), [("z", "A"), ("a", "Z")])
def test_what_is_not_known_cannot_be_forgotten(instance, address):
    assert forget(WELL, instance, identity(address)) is WELL


def test_a_name_follows_to_another_server_of_the_same_epoch():
    """An instance whose name leads to another server of the same epoch follows it."""
    moved = observe(forget(WELL, "b", identity("B")), said("b", 2, reader("D", 95)))
    assert moved.by_id["b"].servers == {identity("D")}


def test_an_instance_is_added_once_and_removed():
    assert add(WELL, Instance("a", "a", 5432)) is WELL
    assert [i.id for i in add(WELL, Instance("d", "d", 5432))] == ["a", "b", "c", "d"]
    without = remove(WELL, "a")
    assert without.writer is None
    assert [i.id for i in without] == ["b", "c"]
    assert remove(without, "a").instances == without.instances


def test_samples_are_positions_of_the_writer_in_the_order_asked():
    found = after(WELL, said("a", 2, writer("A", 120)), said("b", 3, reader("B", 130)), said("a", 4, writer("A", 140)))
    assert [(s.asked_at, s.position.lsn) for s in found.samples] == [(1, 100), (2, 120), (4, 140)]


def test_samples_start_anew_with_a_new_epoch():
    """Samples begin again with a new epoch, and stay while the writer is away."""
    away = after(WELL, silent("a", 2, identity("A"), REFUSED))
    assert away.samples == WELL.samples
    assert after(away, said("c", 3, reader("C", epoch=2))).samples == ()
    found = after(away, said("b", 3, writer("B", 100, epoch=2)))
    assert [(s.asked_at, s.position) for s in found.samples] == [(3, WalPosition(2, 100))]


def test_a_writer_without_a_position_leaves_no_samples():
    assert after(ABC, said("a", 1, Server(identity("A"), WRITER, 1))).samples == ()


def test_samples_are_bounded_and_the_oldest_go_first():
    found = reduce(observe, (said("a", n, writer("A", 100 + n)) for n in range(2, 2 * SAMPLES)), WELL)
    assert len(found.samples) == SAMPLES
    assert found.samples[-1].asked_at == 2 * SAMPLES - 1
    assert found.samples[0].asked_at == SAMPLES


def test_a_clock_that_goes_back_gives_no_negative_latency():
    """A clock that shows the answer before the question gives no negative latency."""
    assert after(ABC, said("a", 1, writer("A"), took=-0.5)).by_id["a"].latency == 0.0


def test_an_instances_epoch_is_the_newest_of_its_servers() -> None:
    """An instance is on the newest epoch of its servers, and on none before it answers."""
    silent = Instance("db:5432", "db", 5432)
    assert silent.epoch == 0
    server = Server(ServerId("7001", "10.0.0.1", 5432, "1"), Role.READER, 7)
    answered = observe(add(Topology(), silent), Observation("db:5432", 1.0, 1.1, server=server))
    assert answered.by_id["db:5432"].epoch == 7


def test_a_server_has_survived_if_it_answers_in_the_same_life():
    """A server has survived a crash if it answers in the same life, and that is unknown while it is asked or recovers."""
    b = identity("B")
    assert survived(WELL, "nobody", b, 2) is False
    assert survived(WELL, "b", b, 0.5) is True
    assert survived(WELL, "b", b, 2) is None
    recovering = after(WELL, silent("b", 3, b, NOT_NOW))
    assert survived(recovering, "b", b, 2) is None
    assert survived(after(recovering, said("b", 4, reader("B"))), "b", b, 2) is True
    assert survived(after(recovering, said("b", 4, reader("B", started="later"))), "b", b, 2) is False
    lost = after(WELL, silent("b", 3, b, REFUSED))
    assert survived(lost, "b", b, 2) is False
    assert survived(lost, "b", b, 2.95) is None


def test_each_loss_doubles_the_hold_time_up_to_a_minute():
    """Each loss doubles the time for which a reader must have answered, up to a minute."""
    assert [hold(losses) for losses in range(10)] == [0, 0, 1, 2, 4, 8, 16, 32, 60, 60]
    assert hold(10**6) == 60


def test_a_held_reader_tells_its_losses_and_its_hold_time():
    """A reader that is held back says how often it was lost and for how long it must answer."""
    topology = observe(Topology(), Observation("r", 1.0, 1.0))
    topology = add(topology, Instance("r", "r", 5432))
    server = Server(ServerId("1", "r", 5432, "0"), Role.READER, 1)
    for loss in (2.0, 4.0):
        topology = observe(topology, Observation("r", loss - 1, loss - 1, server=server))
        topology = observe(topology, Observation("r", loss, loss, about=server.id, silence=Silence.REFUSED, error="refused"))
    topology = observe(topology, Observation("r", 5.0, 5.0, server=server))
    (held,) = topology.instances
    assert not held.healthy
    assert held.error == "answers, but was lost 2 times within 300 s of each other; used again when it has answered for 1 s"
    topology = observe(topology, Observation("r", 6.0, 6.0, server=server))
    assert topology.readers == topology.instances


def lost_twice(epoch=1):
    """A topology whose reader c was lost at 3 and 6, answered at 5 and 7, and is held for a second from 7 on."""
    return after(
        WELL,
        said("a", 2, writer("A", epoch=epoch)),
        silent("c", 3, identity("C"), REFUSED),
        said("c", 5, reader("C")),
        silent("c", 6, identity("C"), REFUSED),
        said("c", 7, reader("C")),
    )


def test_a_quick_restart_does_not_extend_the_hold():
    """A quick restart does not begin the wait of a held reader anew."""
    held = lost_twice()
    assert [i.id for i in held.readers] == ["b"]
    forgotten = forget(held, "c", identity("C"))
    again = observe(forgotten, said("c", 7.9, reader("C", started="later")))
    assert not again.by_id["c"].healthy
    assert [i.id for i in observe(again, said("c", 8, reader("C", started="later"))).readers] == ["b", "c"]


def test_a_held_reader_behind_a_new_writer_is_not_deposed():
    """A held reader that does not follow the newest writer yet is not called deposed."""
    assert "was lost 2 times" in lost_twice(epoch=2).by_id["c"].error


def test_a_reader_that_stopped_replaying_is_not_used():
    """A reader that has stopped replaying is not used and says why."""
    stopped = replace(reader("B", lag=None), stopped="its SQL thread has stopped (error 1062)")
    found = after(WELL, said("b", 2, stopped))
    assert [i.id for i in found.readers] == ["c"]
    assert found.by_id["b"].error == "a reader that is not used, for it falls behind: its SQL thread has stopped (error 1062)"
    assert [i.id for i in after(found, said("b", 3, reader("B"))).readers] == ["b", "c"]


def gtids(text, own):
    return GtidSet.said(1, text, own)


A1, B1 = "a" * 8 + "-aaaa-aaaa-aaaa-" + "a" * 12, "b" * 8 + "-bbbb-bbbb-bbbb-" + "b" * 12


def test_of_two_writers_the_one_with_all_transactions_wins():
    """If one of two writers of an epoch has all transactions of the other, it is the writer, and the other is deposed."""
    old = Server(identity("A"), WRITER, 1, gtids(f"{A1}:1-9", A1))
    new = Server(identity("B"), WRITER, 1, gtids(f"{A1}:1-9,{B1}:1-2", B1))
    found = after(topology("a", "b"), said("a", 1, old), said("b", 1, new))
    assert found.writer.id == "b"
    assert found.ambiguous == ()
    assert "b does so, too, and is newer" in found.by_id["a"].error


def test_samples_start_anew_if_a_new_writer_lacks_transactions():
    """Samples begin anew if a new writer lacks transactions that an earlier one of its epoch had."""
    old = Server(identity("A"), WRITER, 1, gtids(f"{A1}:1-9", A1))
    new = Server(identity("B"), WRITER, 1, gtids(f"{A1}:1-7,{B1}:1", B1))
    found = after(topology("a", "b"), said("a", 1, old), silent("a", 2, identity("A"), REFUSED), said("b", 3, new))
    assert found.writer.id == "b"
    assert [sample.asked_at for sample in found.samples] == [3]


def test_a_servers_last_report_is_found_at_any_address():
    """The last report of a server is found at any address, and never that of another life."""
    (seen,) = WELL.by_id["b"].seen
    assert behind(WELL, "b", identity("B")) is seen
    assert behind(WELL, "b", identity("B")._replace(address="another of its addresses")) is seen
    assert behind(WELL, "b", identity("B", started="later")) is None
    assert behind(WELL, "c", identity("B")) is None
    assert behind(WELL, "nowhere", identity("B")) is None
    lost = after(WELL, silent("b", 2, identity("B"), REFUSED))
    assert behind(lost, "b", identity("B")) is None


def test_waiting_is_in_vain_where_all_that_could_write_refuse():
    """A wait for a writer is in vain even with healthy readers, but not if an instance may come back by itself."""
    refused = after(WELL, silent("a", 3, identity("A"), MISCONFIGURED))
    assert [i.id for i in refused.in_vain] == ["a"]
    assert after(refused, said("a", 4, writer("A"))).in_vain == ()
    assert after(WELL, silent("a", 3, identity("A"), REFUSED)).in_vain == ()
    assert after(ABC, silent("a", 1, None, MISCONFIGURED)).in_vain == (), "the others were not asked yet"
    assert WELL.in_vain == topology().in_vain == ()


def test_an_instance_that_cannot_write_ends_no_wait():
    """An instance of another cluster, or a reader endpoint, cannot be the writer, so its mistakes end no wait."""
    stranger = after(WELL, silent("c", 2, identity("C"), REFUSED), said("c", 3, reader("C", cluster="9")))
    assert stranger.by_id["c"].stranger
    assert remove(stranger, "a").in_vain == (), "b may be promoted"
    replaced = after(
        topology("a"), said("a", 1, writer("A")), silent("a", 2, identity("A"), REFUSED), said("a", 3, writer("A", cluster="9"))
    )
    assert [i.id for i in replaced.in_vain] == ["a"], "all of it is another cluster now"
    endpoint = add(WELL, Instance("ro", "ro", 5432, reader_only=True))
    wrong = after(endpoint, silent("ro", 2, None, MISCONFIGURED), silent("a", 3, identity("A"), REFUSED))
    assert wrong.in_vain == ()
