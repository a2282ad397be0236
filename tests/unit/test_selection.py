"""choose() and its demands on a reader: evidence first, then a measured lag, then a fixed time."""

from collections import Counter
from functools import reduce
from random import Random

import pytest

from aurora_router.config.settings import Settings
from aurora_router.core.instance import Instance, Observation, Role, ServerId, ServerStatus
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
    make_need,
    round_robin,
    satisfies_requirement,
    shows_no_less,
    with_proof,
)
from aurora_router.core.topology import Topology, add, observe

WRITER, READER = Role
PIN = 5.0


def said(instance, asked, role, lsn=None, *, epoch=1, lag=None, server=None, took=0.001, pooled=False, unproven=""):
    position = None if lsn is None else WalPosition(epoch, lsn)
    answer = ServerStatus(ServerId("7001", server or instance, 5432, "t0"), role, epoch, position, lag, unproven=unproven)
    return Observation(instance, asked, asked + took, answer, pooled=pooled)


def topology(*observations, instances=("a", "b", "c")):
    start = reduce(add, (Instance(i, i, 5432) for i in instances), Topology())
    return reduce(observe, observations, start)


def decide(found, need, *, balance=round_robin, now=100.0, rnd=0.0, turn=0):
    return choose(found, need, balance, Load(lambda _: 0, turn), rnd, now)


WELL = topology(
    said("a", 1, WRITER, 100), said("a", 2, WRITER, 120), said("b", 2, READER, 120, lag=0.0), said("c", 2, READER, 100, lag=1.0)
)
OWN_PROBE = topology(said("a", 1, WRITER, 100), instances=("a",))
NO_WRITER = topology(said("b", 2, READER, 120), said("c", 2, READER, 100))
NOBODY = topology()
FILTERS = topology(said("a", 1, WRITER, 100), said("b", 2, READER, 120, lag=0.0, unproven="filters"), instances=("a", "b"))
FILTERED_LOG = topology(said("a", 1, WRITER, 100, unproven="filters"), said("b", 2, READER, 120, lag=0.0), instances=("a", "b"))


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
        (OWN_PROBE, Need(), "a", Reason.NO_READER),
        (OWN_PROBE, Need(writer_serves_reads=False), None, Reason.NO_INSTANCE),
        (NOBODY, Need(), None, Reason.NO_INSTANCE),
        (WELL, Need(requirement=Requirement(0.5, 1)), "b", Reason.READ),
        (WELL, Need(requirement=Requirement(1.5, 1), declared=True), "b", Reason.DECLARED_READ_ONLY),
        (WELL, Need(requirement=Requirement(2.5, 1)), "a", Reason.OWN_WRITES),
        (WELL, Need(requirement=Requirement(2.5, 1), writer_serves_reads=False), "a", Reason.OWN_WRITES),
        (WELL, Need(requirement=Requirement(1.5, 1), avoid=frozenset("b")), "a", Reason.OWN_WRITES),
        (NO_WRITER, Need(requirement=Requirement(1.5, 1)), None, Reason.NO_WRITER),
        (FILTERS, Need(), "b", Reason.READ),
        (FILTERS, Need(requirement=Requirement(0.5, 1)), "a", Reason.UNPROVEN),
        (FILTERED_LOG, Need(), "b", Reason.READ),
        (FILTERED_LOG, Need(requirement=Requirement(0.5, 1)), "a", Reason.UNPROVEN),
    ],
)
def test_a_unit_goes_where_its_need_is_met_with_the_reason(found, need, instance, reason):
    """A unit goes where its need is met, and the decision says why."""
    decision = decide(found, need, now=2.0)
    assert (decision.instance.id if decision.instance else None, decision.reason) == (instance, reason)


def ok(found, reader, requirement, now=100.0):
    return satisfies_requirement(found.by_id[reader], requirement, found, PIN, now)


def test_a_routers_settings_are_part_of_each_need():
    """max_lag, pin_seconds and no_reader hold for each read, and by default they are those of a bare Need."""
    url = "postgresql+psycopg://db-1/shop"
    assert make_need(Settings(url)) == Need()
    strict = make_need(Settings(url, max_lag=2.0, pin_seconds=3.0, no_reader="error"))
    assert strict == Need(max_lag=2.0, pin_seconds=3.0, writer_serves_reads=False)


def test_a_unit_adds_its_conditions_to_a_need():
    """A unit's own conditions take their places in a need, and all other conditions stay."""
    need = Need(declared=True, max_lag=2.0, pin_seconds=3.0, writer_serves_reads=False)
    own = {"requirement": Requirement(1.0, 1), "last_reads": (LastRead("b", 1.0, 1),), "avoid": frozenset("c")}
    assert need.of_unit(*own.values()) == need._replace(**own)


def test_a_reader_must_cover_a_sample_from_after_the_commit():
    """A reader must cover a position of the writer that was asked for after the commit."""
    assert ok(WELL, "c", Requirement(1.0, 1))
    assert not ok(WELL, "c", Requirement(1.001, 1))
    assert ok(WELL, "b", Requirement(1.001, 1))
    assert not ok(WELL, "b", Requirement(2.001, 1))


def test_a_requirement_with_its_proof_needs_no_sample():
    away = topology(said("b", 9, READER, 120))
    assert ok(away, "b", Requirement(8.0, 1, WalPosition(1, 120)))
    assert not ok(away, "b", Requirement(8.0, 1, WalPosition(1, 121)))


def test_resolve_adds_the_oldest_proof_and_keeps_a_present_one():
    """Resolving adds the oldest proof to a requirement and keeps a proof that is there."""
    assert with_proof(Requirement(0.5, 1), WELL).position == WalPosition(1, 100)
    assert with_proof(Requirement(1.5, 1), WELL) == Requirement(1.5, 1, WalPosition(1, 120))
    for settled in (Requirement(0.5, 1, WalPosition(1, 7)), Requirement(2.5, 1)):
        assert with_proof(settled, WELL) is settled


def test_resolve_replaces_a_proof_of_an_older_epoch():
    """Resolving replaces the proof of an older epoch by one of the current epoch."""
    for unproven in (Requirement(5.0, 1), Requirement(5.0, None), Requirement(5.0, 1, WalPosition(1, 10))):
        assert with_proof(unproven, PROMOTED) == Requirement(5.0, unproven.epoch, WalPosition(2, 200))
    too_new = Requirement(11.5, 1, WalPosition(1, 10))
    assert with_proof(too_new, PROMOTED) is too_new


PROMOTED = topology(said("a", 10, WRITER, 200, epoch=2), said("a", 11, WRITER, 300, epoch=2), said("b", 11, READER, 250, epoch=2),
                    said("c", 11, READER, 900, epoch=1))  # fmt: skip


@pytest.mark.parametrize("requirement", [Requirement(5.0, 1), Requirement(5.0, 1, WalPosition(1, 10)), Requirement(5.0, None)])
def test_an_older_epoch_requires_the_new_writers_first_sample(requirement):
    """A requirement of an older epoch is not compared, so a reader must show all up to the new writer's first sample."""
    assert ok(PROMOTED, "b", requirement)
    assert not ok(PROMOTED, "c", requirement)
    behind = observe(PROMOTED, said("b", 12, READER, 199, epoch=2))
    assert not ok(behind, "b", requirement)


def test_an_older_epoch_waits_for_the_new_writers_first_sample():
    """A requirement of an older epoch is not satisfied before the new writer's first sample."""
    promoting = topology(said("b", 11, READER, 250, epoch=2))
    assert not ok(promoting, "b", Requirement(5.0, 1), now=1000.0)


def test_a_reader_of_an_older_epoch_never_satisfies_a_newer_one():
    """A reader that is still on the older epoch never satisfies a requirement of the newer one."""
    assert not ok(PROMOTED, "c", Requirement(10.5, 2))
    assert not ok(PROMOTED, "c", Requirement(10.5, 2, WalPosition(2, 300)), now=1000.0)


LAG_ONLY = topology(said("a", 10, WRITER), said("b", 10, READER, lag=1.0), said("c", 10, READER))


def test_without_a_position_the_lag_and_a_margin_must_pass():
    """If there is no position, a measured lag and a margin must have passed since the commit."""
    due = 10 - 1.0 - LAG_MARGIN
    assert ok(LAG_ONLY, "b", Requirement(due - 0.01, 1), now=10.0)
    assert not ok(LAG_ONLY, "b", Requirement(due, 1), now=1000.0)


def test_without_a_lag_a_fixed_time_must_pass():
    """If there is no lag either, a fixed time must have passed since the commit."""
    assert not ok(LAG_ONLY, "c", Requirement(10.0, 1), now=10.0 + PIN - 0.01)
    assert ok(LAG_ONLY, "c", Requirement(10.0, 1), now=10.0 + PIN)


def test_a_lag_does_not_count_for_an_older_epoch():
    """A lag says nothing about a commit of an older epoch, so the fixed time counts."""
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


def test_without_the_writers_position_lag_then_time_count():
    """If only the writer gives no position, the lag counts, and without a lag the fixed time."""
    found = topology(said("a", 10, WRITER), said("b", 10, READER, 100, lag=0.0), said("c", 10, READER, 100))
    assert ok(found, "b", Requirement(9.0, 1), now=10.0)
    assert not ok(found, "c", Requirement(9.0, 1), now=9.0 + PIN - 0.01)
    assert ok(found, "c", Requirement(9.0, 1), now=9.0 + PIN)
    assert ok(found, "c", Requirement(9.0, 0), now=9.0 + PIN)


def test_an_instance_of_two_epochs_gives_no_evidence():
    """Servers of two epochs behind one name are no evidence, however small their lag is."""
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


def test_the_fastest_reader_takes_only_its_share_of_pairs():
    """The fastest reader is preferred, and yet takes no more than its share of the random pairs."""
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


def test_several_qualified_readers_are_balanced():
    """Several readers that qualify are balanced, and a single one is taken as it is."""
    assert [decide(WELL, Need(), turn=turn).instance.id for turn in range(4)] == list("bcbc")
    assert [decide(WELL, Need(max_lag=0.5), turn=turn, now=2.0).instance.id for turn in range(4)] == list("bbbb")


@pytest.mark.parametrize(("now", "found"), [(2.5, "b"), (2.501, "a")])
def test_a_reader_unheard_for_longer_than_max_lag_is_not_used(now, found):
    """A reader that has not answered for longer than the allowed lag is not used."""
    assert decide(WELL, Need(max_lag=0.5), now=now).instance.id == found


# -- earlier reads ----------------------------------------------------------------------------------------------------


def read(server, at, epoch=1):
    return LastRead(ServerId("7001", server, 5432, "t0"), at, epoch)


def test_a_reader_that_showed_a_state_is_good_for_it_again():
    """A server that has shown a state may show it again, whatever else is known of it."""
    assert decide(WELL, Need(last_reads=[read("c", 50.0)])).instance.id == "c"
    assert decide(WELL, Need(last_reads=[read("b", 50.0)], requirement=Requirement(1.5, 1))).instance.id == "b"
    restarted = topology(said("a", 1, WRITER, 100), said("c", 2, READER, 100, server="c"), instances=("a", "c"))
    assert decide(restarted, Need(last_reads=[read("c again", 50.0)])).reason is Reason.OWN_WRITES


def test_another_reader_must_have_what_the_first_one_had():
    """Another reader serves if it covers the position of the first reader, or of the writer, after the read."""
    found = topology(said("a", 1, WRITER, 300), said("b", 5, READER, 120), said("c", 6, READER, 100))
    assert {decide(found, Need(last_reads=[read("c", 5.5)]), turn=turn).instance.id for turn in range(4)} == {"b", "c"}
    assert {decide(found, Need(last_reads=[read("b", 4.5)]), turn=turn).instance.id for turn in range(4)} == {"b"}
    gone = topology(said("a", 1, WRITER, 100), said("a", 2, WRITER, 110), said("b", 2, READER, 110), instances=("a", "b"))
    assert decide(gone, Need(last_reads=[read("c", 1.5)])).instance.id == "b"
    assert decide(gone, Need(last_reads=[read("c", 2.5)])).reason is Reason.OWN_WRITES


def test_without_positions_a_reader_serves_when_its_lag_is_over():
    """A reader without positions serves when its lag is known to be over."""
    found = topology(said("a", 10, WRITER), said("b", 10, READER, lag=0.0))
    assert decide(found, Need(last_reads=[read("c", 9.0)])).instance.id == "b"
    assert decide(found, Need(last_reads=[read("c", 9.9)], pin_seconds=100.0)).reason is Reason.OWN_WRITES


FAR = topology(said("a", 1, WRITER, 300), said("b", 5, READER, 120), said("c", 6, READER, 100))
LAGS = topology(said("a", 10, WRITER), said("b", 10, READER, lag=0.0), said("c", 10, READER))


@pytest.mark.parametrize(
    ("found", "instance", "server", "reads", "shows"),
    [
        (FAR, "b", "b", [], True),
        (FAR, "gone", "b", [], True),
        # its own server shows what it has shown, whatever the topology knows of it
        (FAR, "b", "b", [read("b", 50.0)], True),
        (FAR, "gone", "b", [read("b", 50.0)], True),
        (NOBODY, "b", "b", [read("b", 50.0)], True),
        # another server's read needs a position that was asked for since
        (FAR, "b", "b", [read("c", 5.5)], True),
        (FAR, "b", "b", [read("c", 6.5)], False),
        (FAR, "c", "c", [read("b", 4.5)], False),
        (FAR, "gone", "b", [read("c", 5.5)], False),
        (NOBODY, "b", "b", [read("c", 0.5)], False),
        (FAR, "b", "b", [read("c", 5.5, epoch=2)], True),
        (FAR, "b", "b", [read("c", 6.5, epoch=2)], False),
        # the instance's server is another one than that of the connection
        (FAR, "b", "b before", [read("b before", 50.0)], True),
        (FAR, "b", "b before", [read("b", 50.0)], True),
        (FAR, "b", None, [read("b", 50.0)], True),
        (FAR, "b", None, [read("c", 6.5)], False),
        # all of the reads count
        (FAR, "b", "b", [read("b", 50.0), read("c", 5.5)], True),
        (FAR, "b", "b", [read("c", 5.5), read("d", 50.0)], False),
        (FAR, "b", "b", [read("d", 50.0), read("b", 50.0)], False),
        # without positions a measured lag is evidence, but no time is long enough
        (LAGS, "b", "b", [read("c", 9.0)], True),
        (LAGS, "b", "b", [read("c", 9.9)], False),
        (LAGS, "c", "c", [read("b", 0.0)], False),
    ],
)
def test_when_a_reader_shows_what_others_have_read(found, instance, server, reads, shows):
    """The table says when a unit on a reader sees no less than others have read on other readers."""
    identity = server and ServerId("7001", server, 5432, "t0")
    assert shows_no_less(found.by_id.get(instance), identity, reads, found, 1e9) is shows


# -- positions of tokens ----------------------------------------------------------------------------------------------


def given(after, epoch, lsn):
    return Requirement(after, epoch, WalPosition(epoch, lsn), is_from_token=True)


def test_a_given_position_counts_before_any_own_sample():
    """A token's position counts before any sample of the router's own."""
    assert ok(WELL, "b", given(50.0, 1, 120))
    assert not ok(WELL, "c", given(50.0, 1, 120))
    assert with_proof(given(50.0, 1, 10**6), WELL) == given(50.0, 1, 10**6), "the writer may have got there since it was asked"


def test_a_position_that_the_writer_has_not_got_to_was_made_up():
    assert with_proof(given(1.5, 1, 120), WELL) == given(1.5, 1, 120)
    assert with_proof(given(1.5, 1, 10**6), WELL) == Requirement(1.5, 1, WalPosition(1, 120))


def test_an_unknown_epoch_is_believed_until_all_were_asked():
    """An epoch that no instance has reported is believed until all instances were asked."""
    claim = given(2.5, 7, 10)
    assert not ok(WELL, "b", claim)
    assert with_proof(claim, WELL) is claim
    claim = given(1.5, 7, 10)
    assert with_proof(claim, WELL) == Requirement(1.5, 1, WalPosition(1, 120))
    assert not ok(WELL, "b", given(2.0, 7, 10)), "all were asked, but the writer's position is still to come"


def test_a_given_position_of_an_older_epoch_is_not_compared():
    assert not ok(PROMOTED, "b", given(10.5, 1, 1))
    assert with_proof(given(9.0, 1, 1), PROMOTED) == Requirement(9.0, 1, WalPosition(2, 200))


def test_a_strategy_may_be_any_function():
    assert decide(WELL, Need(), balance=lambda readers, load, rnd: readers[-1]).instance.id == "c"


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_full_reader_is_not_chosen_while_another_has_room(strategy):
    """With any strategy, a unit goes to a reader whose pool has room, or to any reader if none has."""
    rnd = Random(7)
    for full in ({"b"}, {"b", "c", "d"}, {"c", "e"}, {"b", "c", "d", "e"}):
        load = Load(lambda reader, full=full: 3 if reader in full else 2, capacity=3)
        found = Topology(readers=tuple(READERS))
        chosen = {choose(found, Need(), STRATEGIES[strategy], load, rnd.random(), 100.0).instance.id for _ in range(100)}
        assert chosen <= (set("bcde") - full or full)
        load.turn += 1
