"""observe(): one observation after another, and what the instances are then used for."""

from dataclasses import replace
from functools import reduce

import pytest

from aurora_router.core.gtid import GtidSet
from aurora_router.core.positions import WalPosition
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
)

WRITER, READER = Role
REFUSED, TIMEOUT, MISCONFIGURED = Silence


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


def test_an_observation_of_an_instance_that_is_not_there_changes_nothing():
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


def test_the_silence_of_one_server_is_not_undone_by_the_answers_of_another_behind_the_same_name():
    found = after(topology("a", reader_endpoint="ro"), said("ro", 1, reader("B")), said("ro", 1.1, reader("C")))
    found = after(found, silent("ro", 2, identity("B")), said("ro", 2.1, reader("C")), silent("ro", 3, identity("B")))
    assert found.by_id["ro"].servers == {identity("C")}


@pytest.mark.parametrize("silence", [REFUSED, MISCONFIGURED])
def test_a_refusal_takes_out_of_use_at_once(silence):
    found = after(WELL, silent("b", 2, identity("B"), silence))
    assert not found.by_id["b"].healthy
    assert found.by_id["b"].silence is silence
    assert [i.id for i in found.readers] == ["c"]


def test_a_probe_that_was_overdue_and_is_then_refused_takes_out_of_use():
    found = after(WELL, silent("b", 2, identity("B")), silent("b", 2, identity("B"), REFUSED))
    assert not found.by_id["b"].healthy


def test_one_more_connection_that_failed_says_nothing_of_those_that_are_there():
    assert observe(WELL, silent("b", 2, None, REFUSED)) is WELL
    assert observe(WELL, silent("b", 2, identity("Z"), REFUSED)) is WELL


def test_an_instance_that_never_answered_says_why():
    found = after(ABC, silent("b", 1, None, REFUSED))
    assert found.by_id["b"].probed
    assert found.by_id["b"].error == "refused at 1"
    assert after(found, silent("b", 2, None, TIMEOUT)).by_id["b"].error == "timeout at 2"


def test_a_restarted_server_replaces_its_older_life_even_further_back_in_its_log():
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


def test_two_writers_of_the_same_epoch_are_ambiguous_and_nobody_is_the_writer():
    found = after(WELL, said("b", 2, writer("B")))
    assert found.writer is None
    assert found.ambiguous == ("a", "b")
    assert "so does another" in found.by_id["a"].error
    assert [i.id for i in found.readers] == ["c"]


@pytest.mark.parametrize(
    "end", [silent("b", 3, identity("B"), REFUSED), said("b", 3, reader("B")), said("a", 3, writer("A", epoch=2))]
)
def test_an_ambiguity_resolves_when_one_of_them_is_gone_follows_or_is_newer(end):
    found = after(WELL, said("b", 2, writer("B")), end)
    assert found.writer.id == "a"
    assert found.ambiguous == ()


def mysql(address, text, opened=0.0):
    made = {"A": 1, "B": 2, "C": 3}
    sources = ",".join(f"00000000-0000-0000-0000-{made[name]:012}:1-{text[n + 1]}" for n, name in enumerate(text) if name in made)
    return Server(identity(address), WRITER, 1, GtidSet.said(1, sources, f"00000000-0000-0000-0000-{made[address]:012}", opened))


def test_a_writer_of_the_same_epoch_that_was_deposed_is_none_either_when_the_newer_one_is_gone():
    promoted = after(
        ABC, said("a", 1, mysql("A", "A5")), silent("a", 2, identity("A"), REFUSED), said("b", 3, mysql("B", "A5B2", 9))
    )
    back = after(promoted, said("a", 4, mysql("A", "A5")))
    alone = after(back, silent("b", 5, identity("B"), REFUSED))
    assert (back.writer.id, alone.writer, alone.ambiguous) == ("b", None, ())
    assert "deposed: it still accepts writes, but lacks some" in alone.by_id["a"].error
    assert after(alone, said("b", 6, mysql("B", "A5B2"))).writer.id == "b", "restarted, and nobody told it anything since"


def test_a_writer_of_the_same_epoch_that_was_deposed_with_what_the_newer_one_lacks_is_not_ambiguous():
    promoted = after(
        ABC, said("a", 1, mysql("A", "A7")), silent("a", 2, identity("A"), REFUSED), said("b", 3, mysql("B", "A5B2", 9))
    )
    found = after(promoted, said("a", 4, mysql("A", "A7")))
    assert (promoted.writer.id, found.writer.id, found.ambiguous) == ("b", "b", ())


def test_a_writer_that_was_promoted_since_with_the_loss_of_transactions_is_the_writer():
    start = after(ABC, said("b", 1, mysql("B", "A5B2", 9)), silent("b", 2, identity("B"), REFUSED))
    assert after(start, said("c", 3, mysql("C", "A5", 10))).writer.id == "c"
    assert after(start, said("c", 3, mysql("C", "A5B2"))).writer.id == "c", "by a restart, but it has all"


def test_one_server_under_two_names_is_the_writer_under_the_first():
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


def test_a_reader_endpoint_is_only_as_far_as_the_least_of_its_servers():
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


def test_a_promoted_server_behind_the_reader_endpoint_is_not_read_from_there():
    start = after(topology("a", reader_endpoint="ro"), said("ro", 1, reader("B")), said("ro", 1.1, reader("C")))
    found = after(start, said("ro", 2, writer("B", epoch=2)))
    assert found.by_id["ro"].servers == {identity("C")}


def test_an_instance_of_another_cluster_is_refused_and_the_error_names_both():
    found = after(WELL, silent("c", 2, identity("C"), REFUSED), said("c", 3, reader("C", cluster="9")))
    assert not found.by_id["c"].healthy
    assert found.by_id["c"].error == "belongs to another cluster (9, not 7001)"
    assert found.by_id["c"].silence is MISCONFIGURED
    assert found.epoch == 1
    assert after(WELL, said("c", 3, writer("C", cluster="9", epoch=7))).epoch == 1


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


def test_a_name_that_leads_to_another_server_of_the_same_epoch_follows_it():
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


def test_samples_begin_again_with_a_new_epoch_and_stay_while_the_writer_is_away():
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


def test_a_clock_that_answers_before_it_was_asked_gives_no_negative_latency():
    assert after(ABC, said("a", 1, writer("A"), took=-0.5)).by_id["a"].latency == 0.0


def test_an_instance_is_on_the_newest_epoch_of_its_servers_and_on_none_before_it_answers() -> None:
    silent = Instance("db:5432", "db", 5432)
    assert silent.epoch == 0
    server = Server(ServerId("7001", "10.0.0.1", 5432, "1"), Role.READER, 7)
    answered = observe(add(Topology(), silent), Observation("db:5432", 1.0, 1.1, server=server))
    assert answered.by_id["db:5432"].epoch == 7


def test_each_loss_doubles_the_time_that_a_reader_must_have_answered_up_to_a_minute():
    assert [hold(losses) for losses in range(10)] == [0, 0, 1, 2, 4, 8, 16, 32, 60, 60]
    assert hold(10**6) == 60


def test_a_reader_that_is_held_back_says_how_often_it_was_lost_and_for_how_long_it_must_answer():
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
    """c was lost at 3 and at 6 and answered at 5 and at 7: it is held for a second from 7 on."""
    return after(
        WELL,
        said("a", 2, writer("A", epoch=epoch)),
        silent("c", 3, identity("C"), REFUSED),
        said("c", 5, reader("C")),
        silent("c", 6, identity("C"), REFUSED),
        said("c", 7, reader("C")),
    )


def test_a_quick_restart_does_not_begin_the_wait_of_a_held_reader_anew():
    held = lost_twice()
    assert [i.id for i in held.readers] == ["b"]
    forgotten = forget(held, "c", identity("C"))
    again = observe(forgotten, said("c", 7.9, reader("C", started="later")))
    assert not again.by_id["c"].healthy
    assert [i.id for i in observe(again, said("c", 8, reader("C", started="later"))).readers] == ["b", "c"]


def test_a_held_reader_that_does_not_follow_the_newest_writer_yet_is_not_called_deposed():
    assert "was lost 2 times" in lost_twice(epoch=2).by_id["c"].error


def test_a_reader_that_has_ceased_to_replay_is_not_used_and_says_why():
    stopped = replace(reader("B", lag=None), stopped="its SQL thread has stopped (error 1062)")
    found = after(WELL, said("b", 2, stopped))
    assert [i.id for i in found.readers] == ["c"]
    assert found.by_id["b"].error == "a reader that is not used, for it falls behind: its SQL thread has stopped (error 1062)"
    assert [i.id for i in after(found, said("b", 3, reader("B"))).readers] == ["b", "c"]


def gtids(text, own):
    return GtidSet.said(1, text, own)


A1, B1 = "a" * 8 + "-aaaa-aaaa-aaaa-" + "a" * 12, "b" * 8 + "-bbbb-bbbb-bbbb-" + "b" * 12


def test_of_two_writers_of_one_epoch_the_one_that_has_all_of_the_other_is_the_writer_and_the_other_deposed():
    old = Server(identity("A"), WRITER, 1, gtids(f"{A1}:1-9", A1))
    new = Server(identity("B"), WRITER, 1, gtids(f"{A1}:1-9,{B1}:1-2", B1))
    found = after(topology("a", "b"), said("a", 1, old), said("b", 1, new))
    assert found.writer.id == "b"
    assert found.ambiguous == ()
    assert "b does so, too, and is newer" in found.by_id["a"].error


def test_a_writer_that_lacks_what_an_earlier_one_of_its_epoch_had_begins_the_samples_anew():
    old = Server(identity("A"), WRITER, 1, gtids(f"{A1}:1-9", A1))
    new = Server(identity("B"), WRITER, 1, gtids(f"{A1}:1-7,{B1}:1", B1))
    found = after(topology("a", "b"), said("a", 1, old), silent("a", 2, identity("A"), REFUSED), said("b", 3, new))
    assert found.writer.id == "b"
    assert [sample.asked_at for sample in found.samples] == [3]


def test_what_a_server_has_said_last_is_found_whatever_its_address_and_not_that_of_another_life():
    (seen,) = WELL.by_id["b"].seen
    assert behind(WELL, "b", identity("B")) is seen
    assert behind(WELL, "b", identity("B")._replace(address="another of its addresses")) is seen
    assert behind(WELL, "b", identity("B", started="later")) is None
    assert behind(WELL, "c", identity("B")) is None
    assert behind(WELL, "nowhere", identity("B")) is None
    lost = after(WELL, silent("b", 2, identity("B"), REFUSED))
    assert behind(lost, "b", identity("B")) is None
