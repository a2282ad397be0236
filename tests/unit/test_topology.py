"""observe(): one observation after another. A late answer never wins, and each instance says what is known of it."""

from functools import reduce

import pytest

from aurora_router.core.instance import Instance, Observation, Role, ServerId, ServerStatus
from aurora_router.core.positions import WalPosition
from aurora_router.core.topology import SAMPLES, Topology, add, find_server, observe, remove, survived
from tests.unit.topologies import (
    ABC,
    MISCONFIGURED,
    NOT_NOW,
    REFUSED,
    TIMEOUT,
    WELL,
    WRITER,
    after,
    identity,
    reader,
    said,
    silent,
    topology,
    writer,
)


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
    unknown = after(ABC, said("a", 1, ServerStatus(identity("A"), WRITER, 1)))
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
    assert once.by_id["b"].missed_probes == 1
    twice = after(once, silent("b", 3, identity("B")))
    assert not twice.by_id["b"].healthy
    assert twice.by_id["b"].missed_probes == 0
    assert twice.by_id["b"].error == "timeout at 3"
    assert twice.by_id["b"].probe_failure is TIMEOUT


def test_an_answer_between_two_silences_starts_the_count_again():
    found = after(WELL, silent("b", 2, identity("B")), said("b", 3, reader("B")), silent("b", 4, identity("B")))
    assert found.by_id["b"].healthy
    assert found.by_id["b"].missed_probes == 1


def test_an_answer_of_one_server_hides_no_silence_of_another():
    """The answers of one server do not undo the silence of another one behind the same name."""
    found = after(topology("a", reader_endpoint="ro"), said("ro", 1, reader("B")), said("ro", 1.1, reader("C")))
    found = after(found, silent("ro", 2, identity("B")), said("ro", 2.1, reader("C")), silent("ro", 3, identity("B")))
    assert found.by_id["ro"].servers == {identity("C")}


@pytest.mark.parametrize("silence", [REFUSED, MISCONFIGURED])
def test_a_refusal_takes_out_of_use_at_once(silence):
    found = after(WELL, silent("b", 2, identity("B"), silence))
    assert not found.by_id["b"].healthy
    assert found.by_id["b"].probe_failure is silence
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
    assert after(ABC, said("a", 1, ServerStatus(identity("A"), WRITER, 1))).samples == ()


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
    server = ServerStatus(ServerId("7001", "10.0.0.1", 5432, "1"), Role.READER, 7)
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
    without_its_database = after(WELL, silent("b", 3, b, MISCONFIGURED))
    assert survived(without_its_database, "b", b, 2) is None
    lost = after(WELL, silent("b", 3, b, REFUSED))
    assert survived(lost, "b", b, 2) is False
    assert survived(lost, "b", b, 2.95) is None


def test_a_reader_that_stopped_replaying_is_not_used():
    """A reader that has stopped replaying is not used and says why."""
    stopped = reader("B", lag=None)._replace(replication_error="its SQL thread has stopped (error 1062)")
    found = after(WELL, said("b", 2, stopped))
    assert [i.id for i in found.readers] == ["c"]
    assert found.by_id["b"].error == "not used, because it no longer replays: its SQL thread has stopped (error 1062)"
    assert [i.id for i in after(found, said("b", 3, reader("B"))).readers] == ["b", "c"]


def test_a_servers_last_report_is_found_at_any_address():
    """The last report of a server is found at any address, and never that of another life."""
    (seen,) = WELL.by_id["b"].tracked
    assert find_server(WELL, "b", identity("B")) is seen
    assert find_server(WELL, "b", identity("B")._replace(address="another of its addresses")) is seen
    assert find_server(WELL, "b", identity("B", started="later")) is None
    assert find_server(WELL, "c", identity("B")) is None
    assert find_server(WELL, "nowhere", identity("B")) is None
    lost = after(WELL, silent("b", 2, identity("B"), REFUSED))
    assert find_server(lost, "b", identity("B")) is None


def test_waiting_is_in_vain_where_all_that_could_write_refuse():
    """A wait for a writer is in vain even with healthy readers, but not if an instance may come back by itself."""
    refused = after(WELL, silent("a", 3, identity("A"), MISCONFIGURED))
    assert [i.id for i in refused.misconfigured] == ["a"]
    assert after(refused, said("a", 4, writer("A"))).misconfigured == ()
    assert after(WELL, silent("a", 3, identity("A"), REFUSED)).misconfigured == ()
    assert after(ABC, silent("a", 1, None, MISCONFIGURED)).misconfigured == (), "the others were not asked yet"
    assert WELL.misconfigured == topology().misconfigured == ()


def test_an_instance_that_cannot_write_ends_no_wait():
    """An instance of another cluster, or a reader endpoint, cannot be the writer, so its mistakes end no wait."""
    stranger = after(WELL, silent("c", 2, identity("C"), REFUSED), said("c", 3, reader("C", cluster="9")))
    assert stranger.by_id["c"].is_foreign
    assert remove(stranger, "a").misconfigured == (), "b may be promoted"
    replaced = after(
        topology("a"), said("a", 1, writer("A")), silent("a", 2, identity("A"), REFUSED), said("a", 3, writer("A", cluster="9"))
    )
    assert [i.id for i in replaced.misconfigured] == ["a"], "all of it is another cluster now"
    endpoint = add(WELL, Instance("ro", "ro", 5432, reader_only=True))
    wrong = after(endpoint, silent("ro", 2, None, MISCONFIGURED), silent("a", 3, identity("A"), REFUSED))
    assert wrong.misconfigured == ()


@pytest.mark.parametrize(
    ("sources", "omits", "unproven"),
    [
        ({"C": ["B"], "D": ["C"]}, "B", "cd"),  # through another one, too
        ({"C": ["B"], "D": ["A"]}, "B", "c"),
        ({"C": ["B"], "D": ["C"], "B": ["D"]}, "B", "bcd"),
        ({"C": ["A"], "D": ["A"]}, "B", ""),
        ({"C": ["B"], "D": ["C"]}, "D", ""),
    ],
)
def test_a_reader_behind_a_filtered_log_proves_nothing(sources, omits, unproven):
    """A reader lacks what the log of its source leaves out, or the log of that one's source, although it has all GTIDs."""

    def answer(address):
        of_source = frozenset(sources.get(address, ["A"]))
        return reader(address)._replace(sources=of_source, omits="its log has a part" if address == omits else "")

    start = after(topology("a", "b", "c", "d"), said("a", 1, writer("A")))
    found = after(start, *(said(address.lower(), 1, answer(address)) for address in "BCD"))
    assert "".join(each.id for each in found if each.unproven) == unproven
    assert all(each.unproven == "it replicates from a reader: its log has a part" for each in found if each.unproven)
    assert len(found.readers) == 3, "they serve other reads"


def test_the_default_isolation_level_is_the_writers():
    """ALTER SYSTEM reaches no reader, so a reader that is named first must not decide. The last writer's level stays."""
    strict = writer("B")._replace(isolation="serializable")
    assert ABC.isolation is None
    found = after(ABC, said("a", 1, reader("A")))
    assert found.isolation == "read committed", "nothing else is known"
    found = after(found, said("b", 2, strict), said("a", 3, reader("A")))
    assert found.isolation == "serializable"
    lost = after(found, silent("b", 4, strict.id, REFUSED), said("a", 5, reader("A")))
    assert (lost.writer, lost.isolation) == (None, "serializable")
    promoted = after(lost, said("a", 6, writer("A", epoch=2)))
    assert (promoted.writer.id, promoted.isolation) == ("a", "read committed")
