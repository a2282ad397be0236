"""choose() and what it asks of a reader: evidence first, then a measured lag, then a fixed time."""

from collections import Counter
from functools import reduce
from random import Random

import pytest

from aurora_router.core.positions import LastRead, Requirement, WalPosition
from aurora_router.core.selection import (
    LAG_MARGIN,
    STRATEGIES,
    Load,
    Need,
    Reason,
    at_random,
    choose,
    fastest,
    least_busy,
    resolve,
    round_robin,
    satisfies,
)
from aurora_router.core.topology import Instance, Observation, Role, Server, ServerId, Topology, add, observe

WRITER, READER = Role
PIN = 5.0


def said(instance, asked, role, lsn=None, *, epoch=1, lag=None, server=None, took=0.001, pooled=False):
    position = None if lsn is None else WalPosition(epoch, lsn)
    answer = Server(ServerId("7001", server or instance, 5432, "t0"), role, epoch, position, lag)
    return Observation(instance, asked, asked + took, answer, pooled=pooled)


def topology(*observations, instances=("a", "b", "c")):
    start = reduce(add, (Instance(i, i, 5432) for i in instances), Topology())
    return reduce(observe, observations, start)


def decide(found, need, *, balance=round_robin, now=100.0, rnd=0.0, turn=0):
    return choose(found, need, balance, Load(lambda _: 0, turn), rnd, now)


WELL = topology(
    said("a", 1, WRITER, 100), said("a", 2, WRITER, 120), said("b", 2, READER, 120, lag=0.0), said("c", 2, READER, 100, lag=1.0)
)
ALONE = topology(said("a", 1, WRITER, 100), instances=("a",))
NO_WRITER = topology(said("b", 2, READER, 120), said("c", 2, READER, 100))
NOBODY = topology()


@pytest.mark.parametrize(
    ("found", "need", "instance", "reason"),
    [
        (WELL, Need(), "b", Reason.READ),
        (WELL, Need(declared=True), "b", Reason.DECLARED_READ_ONLY),
        (NO_WRITER, Need(), "b", Reason.READ),
        (WELL, Need(avoid=frozenset("b")), "c", Reason.READ),
        (WELL, Need(avoid=frozenset("bc")), "a", Reason.NO_READER),
        (WELL, Need(avoid=frozenset("bc"), writer_serves_reads=False), None, Reason.NO_INSTANCE),
        (NO_WRITER, Need(avoid=frozenset("bc")), None, Reason.NO_INSTANCE),
        (WELL, Need(max_lag=0.5), "b", Reason.READ),
        (WELL, Need(max_lag=1.0, avoid=frozenset("b")), "c", Reason.READ),
        (NO_WRITER, Need(max_lag=60.0), None, Reason.NO_INSTANCE),
        (ALONE, Need(), "a", Reason.NO_READER),
        (ALONE, Need(writer_serves_reads=False), None, Reason.NO_INSTANCE),
        (NOBODY, Need(), None, Reason.NO_INSTANCE),
        (WELL, Need(requirement=Requirement(0.5, 1)), "b", Reason.READ),
        (WELL, Need(requirement=Requirement(1.5, 1), declared=True), "b", Reason.DECLARED_READ_ONLY),
        (WELL, Need(requirement=Requirement(2.5, 1)), "a", Reason.OWN_WRITES),
        (WELL, Need(requirement=Requirement(2.5, 1), writer_serves_reads=False), "a", Reason.OWN_WRITES),
        (WELL, Need(requirement=Requirement(1.5, 1), avoid=frozenset("b")), "a", Reason.OWN_WRITES),
        (NO_WRITER, Need(requirement=Requirement(1.5, 1)), None, Reason.NO_WRITER),
    ],
)
def test_a_unit_goes_where_its_need_is_met_and_the_decision_says_why(found, need, instance, reason):
    decision = decide(found, need, now=2.0)
    assert (decision.instance.id if decision.instance else None, decision.reason) == (instance, reason)


def ok(found, reader, requirement, now=100.0):
    return satisfies(found.by_id[reader], requirement, found, PIN, now)


def test_a_reader_must_cover_a_position_of_the_writer_that_was_asked_for_after_the_commit():
    assert ok(WELL, "c", Requirement(1.0, 1))
    assert not ok(WELL, "c", Requirement(1.001, 1))
    assert ok(WELL, "b", Requirement(1.001, 1))
    assert not ok(WELL, "b", Requirement(2.001, 1))


def test_a_requirement_with_its_proof_needs_no_sample():
    away = topology(said("b", 9, READER, 120))
    assert ok(away, "b", Requirement(8.0, 1, WalPosition(1, 120)))
    assert not ok(away, "b", Requirement(8.0, 1, WalPosition(1, 121)))


def test_resolve_adds_the_oldest_proof_and_keeps_one_that_is_there():
    assert resolve(Requirement(0.5, 1), WELL).position == WalPosition(1, 100)
    assert resolve(Requirement(1.5, 1), WELL) == Requirement(1.5, 1, WalPosition(1, 120))
    for settled in (Requirement(0.5, 1, WalPosition(1, 7)), Requirement(2.5, 1)):
        assert resolve(settled, WELL) is settled


def test_resolve_replaces_the_proof_of_an_older_epoch_by_one_of_this():
    for unproven in (Requirement(5.0, 1), Requirement(5.0, None), Requirement(5.0, 1, WalPosition(1, 10))):
        assert resolve(unproven, PROMOTED) == Requirement(5.0, unproven.epoch, WalPosition(2, 200))
    too_new = Requirement(11.5, 1, WalPosition(1, 10))
    assert resolve(too_new, PROMOTED) is too_new


PROMOTED = topology(said("a", 10, WRITER, 200, epoch=2), said("a", 11, WRITER, 300, epoch=2), said("b", 11, READER, 250, epoch=2),
                    said("c", 11, READER, 900, epoch=1))  # fmt: skip


@pytest.mark.parametrize("requirement", [Requirement(5.0, 1), Requirement(5.0, 1, WalPosition(1, 10)), Requirement(5.0, None)])
def test_a_requirement_of_an_older_epoch_is_never_compared_but_becomes_all_up_to_the_new_writers_first_sample(requirement):
    assert ok(PROMOTED, "b", requirement)
    assert not ok(PROMOTED, "c", requirement)
    behind = observe(PROMOTED, said("b", 12, READER, 199, epoch=2))
    assert not ok(behind, "b", requirement)


def test_a_requirement_of_an_older_epoch_waits_for_the_new_writers_first_sample():
    promoting = topology(said("b", 11, READER, 250, epoch=2))
    assert not ok(promoting, "b", Requirement(5.0, 1), now=1000.0)


def test_a_reader_still_on_the_older_epoch_never_satisfies_a_requirement_of_the_newer():
    assert not ok(PROMOTED, "c", Requirement(10.5, 2))
    assert not ok(PROMOTED, "c", Requirement(10.5, 2, WalPosition(2, 300)), now=1000.0)


LAG_ONLY = topology(said("a", 10, WRITER), said("b", 10, READER, lag=1.0), said("c", 10, READER))


def test_where_there_is_no_position_a_measured_lag_and_a_margin_must_have_passed():
    due = 10 - 1.0 - LAG_MARGIN
    assert ok(LAG_ONLY, "b", Requirement(due - 0.01, 1), now=10.0)
    assert not ok(LAG_ONLY, "b", Requirement(due, 1), now=1000.0)


def test_where_there_is_no_lag_either_a_fixed_time_must_have_passed():
    assert not ok(LAG_ONLY, "c", Requirement(10.0, 1), now=10.0 + PIN - 0.01)
    assert ok(LAG_ONLY, "c", Requirement(10.0, 1), now=10.0 + PIN)


def test_a_lag_says_nothing_of_a_commit_of_an_older_epoch_so_that_the_fixed_time_counts():
    found = topology(said("a", 10, WRITER, epoch=2), said("b", 10, READER, epoch=2, lag=0.0))
    assert not ok(found, "b", Requirement(9.0, 1), now=9.0 + PIN - 0.01)
    assert ok(found, "b", Requirement(9.0, 1), now=9.0 + PIN)


def test_behind_a_pooler_the_fixed_time_is_all_there_is():
    found = topology(
        said("a", 10, WRITER, 100),
        said("b", 10, READER, 100, lag=0.0),
        said("b", 11, READER, 100, lag=0.0, server="c", pooled=True),
    )
    assert not ok(found, "b", Requirement(9.0, 1), now=9.0 + PIN - 0.01)
    assert ok(found, "b", Requirement(9.0, 1), now=9.0 + PIN)


def test_where_only_the_writer_gives_no_position_the_lag_counts_and_then_the_fixed_time():
    found = topology(said("a", 10, WRITER), said("b", 10, READER, 100, lag=0.0), said("c", 10, READER, 100))
    assert ok(found, "b", Requirement(9.0, 1), now=10.0)
    assert not ok(found, "c", Requirement(9.0, 1), now=9.0 + PIN - 0.01)
    assert ok(found, "c", Requirement(9.0, 1), now=9.0 + PIN)
    assert ok(found, "c", Requirement(9.0, 0), now=9.0 + PIN)


def test_servers_of_two_epochs_behind_one_name_give_no_evidence_however_small_their_lag_is():
    found = topology(
        said("a", 10, WRITER, 100, epoch=2),
        said("b", 10, READER, 100, epoch=2, lag=0.0),
        said("b", 10.1, READER, 90, server="c", lag=0.0),
    )
    assert found.by_id["b"].position is None
    assert found.by_id["b"].lag == 0.0
    assert not ok(found, "b", Requirement(5.0, 2), now=1000.0)


READERS = [
    Instance(name, name, 5432, latency=latency) for name, latency in (("b", 0.001), ("c", 0.002), ("d", 0.004), ("e", 0.008))
]


def draw(strategy, readers, count=4000, in_use=lambda _: 0):
    rnd = Random(7)
    return Counter(strategy(readers, Load(in_use, turn), rnd.random()).id for turn in range(count))


@pytest.mark.parametrize("name", ["least_busy", "round_robin", "random"])
def test_every_strategy_spreads_evenly_over_idle_readers(name):
    counts = draw(STRATEGIES[name], READERS)
    assert set(counts) == set("bcde")
    assert min(counts.values()) > 850


def test_the_fastest_is_preferred_and_yet_takes_no_more_than_its_share_of_pairs():
    counts = draw(fastest, READERS)
    assert counts["b"] > counts["c"] > counts["d"] > 0
    assert counts["b"] < 2400
    assert set(draw(fastest, READERS[:2])) == {"b"}


def test_the_strategies_do_with_a_single_reader():
    for strategy in STRATEGIES.values():
        assert set(draw(strategy, READERS[:1], 10)) == {"b"}


def test_the_least_busy_has_the_fewest_connections_in_use():
    busy = {"b": 3, "c": 1, "d": 2, "e": 1}
    assert set(draw(least_busy, READERS, in_use=busy.__getitem__)) == {"c", "e"}


def test_the_least_busy_in_use_is_filled_up_evenly():
    in_use = Counter()
    for turn in range(400):
        in_use[least_busy(READERS, Load(in_use.__getitem__, turn), 0.0).id] += 1
    assert set(in_use.values()) == {100}


def test_random_takes_each_reader_for_its_part_of_the_range():
    assert [at_random(READERS, Load(lambda _: 0), rnd).id for rnd in (0.0, 0.25, 0.5, 0.999999)] == list("bcde")


def test_several_readers_that_qualify_are_balanced_and_one_is_taken_as_it_is():
    assert [decide(WELL, Need(), turn=turn).instance.id for turn in range(4)] == list("bcbc")
    assert [decide(WELL, Need(max_lag=0.5), turn=turn, now=2.0).instance.id for turn in range(4)] == list("bbbb")


@pytest.mark.parametrize(("now", "found"), [(2.5, "b"), (2.501, "a")])
def test_a_reader_that_was_not_heard_for_longer_than_the_lag_that_is_allowed_is_not_used(now, found):
    assert decide(WELL, Need(max_lag=0.5), now=now).instance.id == found


# -- what was read before ---------------------------------------------------------------------------------------------


def read(server, at, epoch=1):
    return LastRead(ServerId("7001", server, 5432, "t0"), at, epoch)


def test_the_reader_that_has_shown_it_shows_it_again_whatever_is_known_of_it():
    assert decide(WELL, Need(last_reads=[read("c", 50.0)])).instance.id == "c"
    assert decide(WELL, Need(last_reads=[read("b", 50.0)], requirement=Requirement(1.5, 1))).instance.id == "b"
    restarted = topology(said("a", 1, WRITER, 100), said("c", 2, READER, 100, server="c"), instances=("a", "c"))
    assert decide(restarted, Need(last_reads=[read("c again", 50.0)])).reason is Reason.OWN_WRITES


def test_another_reader_does_when_it_has_what_the_first_or_the_writer_had_afterwards():
    found = topology(said("a", 1, WRITER, 300), said("b", 5, READER, 120), said("c", 6, READER, 100))
    assert {decide(found, Need(last_reads=[read("c", 5.5)]), turn=turn).instance.id for turn in range(4)} == {"b", "c"}
    assert {decide(found, Need(last_reads=[read("b", 4.5)]), turn=turn).instance.id for turn in range(4)} == {"b"}
    gone = topology(said("a", 1, WRITER, 100), said("a", 2, WRITER, 110), said("b", 2, READER, 110), instances=("a", "b"))
    assert decide(gone, Need(last_reads=[read("c", 1.5)])).instance.id == "b"
    assert decide(gone, Need(last_reads=[read("c", 2.5)])).reason is Reason.OWN_WRITES


def test_a_reader_without_positions_does_when_its_lag_is_known_to_be_over():
    found = topology(said("a", 10, WRITER), said("b", 10, READER, lag=0.0))
    assert decide(found, Need(last_reads=[read("c", 9.0)])).instance.id == "b"
    assert decide(found, Need(last_reads=[read("c", 9.9)], pin_seconds=100.0)).reason is Reason.OWN_WRITES


# -- what a token claims ----------------------------------------------------------------------------------------------


def given(after, epoch, lsn):
    return Requirement(after, epoch, WalPosition(epoch, lsn), given=True)


def test_a_position_that_was_given_counts_before_any_sample_of_ours_does():
    assert ok(WELL, "b", given(50.0, 1, 120))
    assert not ok(WELL, "c", given(50.0, 1, 120))
    assert resolve(given(50.0, 1, 10**6), WELL) == given(50.0, 1, 10**6), "the writer may have got there since it was asked"


def test_a_position_that_the_writer_has_not_got_to_was_made_up():
    assert resolve(given(1.5, 1, 120), WELL) == given(1.5, 1, 120)
    assert resolve(given(1.5, 1, 10**6), WELL) == Requirement(1.5, 1, WalPosition(1, 120))


def test_an_epoch_that_nobody_has_heard_of_is_believed_until_all_were_asked():
    claim = given(2.5, 7, 10)
    assert not ok(WELL, "b", claim)
    assert resolve(claim, WELL) is claim
    claim = given(1.5, 7, 10)
    assert resolve(claim, WELL) == Requirement(1.5, 1, WalPosition(1, 120))
    assert not ok(WELL, "b", given(2.0, 7, 10)), "all were asked, but the writer's position is still to come"


def test_a_given_position_of_an_older_epoch_is_not_compared():
    assert not ok(PROMOTED, "b", given(10.5, 1, 1))
    assert resolve(given(9.0, 1, 1), PROMOTED) == Requirement(9.0, 1, WalPosition(2, 200))


def test_a_strategy_may_be_any_function():
    assert decide(WELL, Need(), balance=lambda readers, load, rnd: readers[-1]).instance.id == "c"
