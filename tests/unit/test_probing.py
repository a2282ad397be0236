"""The schedule of probes, their deadlines, and the trust in their answers."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aurora_router.config.settings import Settings
from aurora_router.core import probing
from aurora_router.core.instance import Instance, Observation, ProbeFailure, Role, ServerId, ServerStatus
from aurora_router.core.probing import STALE_AFTER, Demand, Reached, Timing, Trust
from aurora_router.core.topology import Topology, add, observe

TIMING = Timing(interval=1.0, position_interval=0.1, timeout=2.0, failover_timeout=30.0)
CALM = Demand(writerless_since=-1000.0)


def server(address, role):
    return ServerStatus(ServerId("7001", address, 5432, "started"), role, 1)


def answered(topology, instance, asked_at, role):
    return observe(topology, Observation(instance, asked_at, asked_at, server(instance, role)))


def silent(topology, instance, asked_at, silence, about=None):
    return observe(topology, Observation(instance, asked_at, asked_at, about=about, probe_failure=silence, error="no"))


NEW = add(add(add(Topology(), Instance("a", "a", 5432)), Instance("b", "b", 5432)), Instance("r", "r", 5432, reader_only=True))
WELL = answered(answered(answered(NEW, "a", 1, Role.WRITER), "b", 1, Role.READER), "r", 1, Role.READER)
NO_WRITER = silent(WELL, "a", 2, ProbeFailure.REFUSED, server("a", Role.WRITER).id)
LATE_WRITER = silent(WELL, "a", 2, ProbeFailure.TIMEOUT, server("a", Role.WRITER).id)
HOPELESS = silent(NEW, "b", 2, ProbeFailure.MISCONFIGURED)


def timing_of(interval, max_lag):
    """The timing of a router with these two settings."""
    given = {"probe_interval": interval, "position_interval": 0.1, "probe_timeout": 2.0, "failover_timeout": 30.0}
    return probing.make_timing(Settings("postgresql+psycopg://db-1/shop", max_lag=max_lag, **given))


def pace(topology=WELL, instance="b", last_at=9.0, now=10.0, **demand):
    return probing.pace(topology, instance, last_at, CALM._replace(**demand), TIMING, now)


@pytest.mark.parametrize(("max_lag", "interval"), [(None, 1.0), (2.0, 0.5), (0.001, 0.02), (100.0, 1.0)])
def test_a_bound_of_the_lag_makes_probes_come_more_often(max_lag, interval):
    assert timing_of(1.0, max_lag) == TIMING._replace(interval=interval)


def test_a_long_interval_makes_trust_last_longer():
    """The scheduler may sleep for an interval, so trust lasts for three of them if that is more than usual."""
    assert (TIMING.stale_after, timing_of(60.0, None).stale_after) == (STALE_AFTER, 180.0)


def test_a_silent_server_is_lost_after_two_probes():
    assert (TIMING.late_after, TIMING.lost_after) == (0.5, pytest.approx(4.06))


# -- pace ---------------------------------------------------------------------------------------------------------


def test_an_instance_is_probed_once_an_interval_if_all_is_well():
    assert pace() == TIMING.interval
    assert pace(instance="gone") == TIMING.interval


@pytest.mark.parametrize(
    ("topology", "instance", "demand"),
    [
        (WELL, "b", {"suspects": {"b"}}),
        (LATE_WRITER, "a", {}),
        (WELL, "b", {"distrusted_at": 9.5}),
        (NO_WRITER, "b", {"is_awaited": True}),
        (NO_WRITER, "b", {"writerless_since": 0.0}),
        (NO_WRITER, "gone", {"is_awaited": True}),
        (WELL, "b", {"suspects": {"a"}}),
        (LATE_WRITER, "b", {}),
        (WELL, "b", {"writer_asked_at": 9.5}),
        (WELL, "b", {"own_since": 8.0}),
    ],
    ids=str,
)
def test_what_is_suspect_is_probed_fast(topology, instance, demand):
    assert pace(topology, instance, **demand) == TIMING.fast_interval


@pytest.mark.parametrize(
    ("topology", "demand"),
    [
        (WELL, {"distrusted_at": 8.5}),
        (WELL, {"writer_asked_at": 9.6}),
        (WELL, {"is_awaited": True}),
        (NO_WRITER, {}),
        (WELL, {"shared_since": 8.0}),
        (WELL, {"positions_since": 8.0}),
        (NEW, {"suspects": {"b"}, "own_since": 9.5, "shared_since": 9.5, "positions_since": 9.5}),
    ],
    ids=str,
)
def test_no_reason_is_a_reason_for_ever(topology, demand):
    """A reason that was seen to, or that is another instance's, makes no probe come sooner."""
    assert pace(topology, **demand) == TIMING.interval


def test_a_thread_that_waits_for_its_own_answer_gets_one_at_once():
    assert pace(own_since=9.5) == 0.0


@pytest.mark.parametrize("demand", [{"shared_since": 9.5}, {"positions_since": 9.5}], ids=str)
def test_threads_that_share_an_answer_get_one_an_interval(demand):
    """Threads for which one answer is enough get one every position_interval."""
    assert pace(**demand) == TIMING.position_interval
    assert probing.pace(WELL, "b", 9.0, CALM._replace(**demand), TIMING._replace(position_interval=5.0), 10.0) == 1.0


def test_what_waiting_cannot_heal_is_probed_in_no_hurry():
    """A refused password is tried again every interval, and once for those who start the router meanwhile."""
    assert pace(HOPELESS, is_awaited=True, writerless_since=9.9, suspects={"b"}) == TIMING.interval
    assert pace(HOPELESS, shared_since=9.5) == TIMING.position_interval
    assert pace(HOPELESS, shared_since=8.5) == TIMING.interval
    with_writer = answered(HOPELESS, "a", 3, Role.WRITER)
    assert pace(with_writer, shared_since=9.5) == TIMING.interval


@pytest.mark.parametrize(
    ("asked_at", "silence", "clears"),
    [
        (9.9, ProbeFailure.REFUSED, False),
        (10.0, None, True),
        (11.0, ProbeFailure.REFUSED, True),
        (11.0, ProbeFailure.TIMEOUT, False),
    ],
)
def test_a_suspicion_lasts_until_a_later_probe_has_ended(asked_at, silence, clears):
    """A suspicion ends with a later probe, unless that one is silent."""
    assert probing.clears_suspicion(Observation("b", asked_at, asked_at + 1, probe_failure=silence), 10.0) is clears


# -- deadlines ----------------------------------------------------------------------------------------------------


def test_a_probe_in_a_poolers_queue_has_more_time():
    """A healthy instance behind a pooler has more time. The writer's loss shows otherwise, so it has most."""
    for is_logged_in in (True, False):
        behind = Reached(True, is_logged_in)
        assert probing.queue_timeout(WELL.by_id["a"], behind, TIMING) == TIMING.failover_timeout
        assert probing.queue_timeout(WELL.by_id["b"], behind, TIMING) == TIMING.queue_timeout
        assert probing.queue_timeout(WELL.by_id["b"], behind, TIMING._replace(timeout=20.0)) == 20.0
        assert probing.queue_timeout(WELL.by_id["b"], Reached(False, is_logged_in), TIMING) == TIMING.timeout


@pytest.mark.parametrize("instance", [NEW.by_id["a"], NO_WRITER.by_id["a"]], ids=["unheard", "lost"])
def test_silence_after_the_login_may_be_a_poolers_queue(instance):
    """An instance that is not used gets more time once its pooler has answered the login."""
    assert probing.queue_timeout(instance, Reached(True, True), TIMING) == TIMING.queue_timeout
    assert probing.queue_timeout(instance, Reached(True, True), TIMING._replace(timeout=20.0)) == 20.0
    assert probing.queue_timeout(instance, Reached(True, False), TIMING) == TIMING.timeout
    assert probing.queue_timeout(instance, Reached(False, True), TIMING) == TIMING.timeout, "its answer may have no end"


@pytest.mark.parametrize("instance", [None, LATE_WRITER.by_id["a"]], ids=["gone", "suspect"])
def test_a_doubtful_instance_has_no_time_in_a_queue(instance):
    assert probing.queue_timeout(instance, Reached(True, True), TIMING) == TIMING.timeout


@pytest.mark.parametrize(
    ("asked_at", "last_at", "every", "wakes_at"),
    [
        (None, 9.5, 1.0, 10.5),  # the next probe
        (None, 8.0, 1.0, 10.001),  # it is due, but could not begin
        (10.0, 10.0, 1.0, 10.5),  # it may show that the writer is late
        (9.5, 9.5, 1.0, 10.5),  # the next probe, and
        (9.0, 9.0, 5.0, 11.0),  # its end, if that is sooner
        (9.9, 9.9, 0.02, 10.02),  # it may end soon
    ],
)
def test_the_scheduler_wakes_for_what_comes_first(asked_at, last_at, every, wakes_at):
    assert probing.wake_at(asked_at, last_at, every, 2.0, TIMING, 10.0) == pytest.approx(wakes_at)


@given(st.floats(-10, 10), st.floats(0, 70), st.floats(0.05, 30), st.booleans())
def test_the_scheduler_never_spins_and_never_oversleeps(last_at, every, timeout, is_asking):
    """It sleeps a little, and no longer than until the next probe or the end of this one."""
    found = probing.wake_at(last_at if is_asking else None, last_at, every, timeout, TIMING._replace(timeout=timeout), 10.0)
    assert found >= 10.0 + probing.SHORTEST_WAIT
    if is_asking:
        assert found <= max(last_at + timeout, 10.0 + TIMING.fast_interval)


# -- trust --------------------------------------------------------------------------------------------------------


def test_a_process_that_runs_trusts_what_it_knows():
    first = probing.renew_trust(Trust(), NEW, TIMING, 10.0, 1000.0)
    assert first == Trust(None, 1005.0, 1005.0)
    assert not probing.has_paused(first, 1005.0)
    assert [probing.is_trusted(first, wall) for wall in (1005.0, 1005.1)] == [True, False]
    assert probing.renew_trust(first, NEW, TIMING, 14.0, 1004.0) == Trust(None, 1009.0, 1009.0)


def test_a_process_that_stood_still_doubts_until_all_are_heard():
    """What was heard before does not count until each instance was heard again."""
    slept = Trust(None, 1005.0, 1005.0)
    assert probing.has_paused(slept, 1006.0)
    doubting = probing.renew_trust(slept, WELL, TIMING, 10.0, 1006.0)
    assert doubting == Trust(10.0, 1011.0, 1005.0)
    some = answered(answered(WELL, "a", 11, Role.WRITER), "b", 11, Role.READER)
    assert probing.renew_trust(doubting, some, TIMING, 11.0, 1007.0) == Trust(10.0, 1012.0, 1005.0)
    every = silent(some, "r", 10, ProbeFailure.REFUSED, server("r", Role.READER).id)
    assert probing.renew_trust(doubting, every, TIMING, 11.0, 1007.0) == Trust(None, 1012.0, 1012.0)


def test_a_silent_instance_delays_trust_for_a_while_only():
    doubting = Trust(10.0, 1011.0, 1005.0)
    assert probing.renew_trust(doubting, WELL, TIMING, 13.0, 1009.0).distrusted_at == 10.0
    assert probing.renew_trust(doubting, WELL, TIMING, 13.1, 1009.1).distrusted_at is None


def test_a_second_sleep_makes_the_doubt_begin_anew():
    assert probing.renew_trust(Trust(10.0, 1011.0, 1005.0), WELL, TIMING, 10.5, 2000.0) == Trust(10.5, 2005.0, 1005.0)


def test_a_forked_process_trusts_nothing_yet():
    forked = probing.distrust(10.0)
    assert not probing.has_paused(forked, 1e12)
    assert probing.renew_trust(forked, WELL, TIMING, 10.5, 1000.0) == Trust(10.0, 1005.0, float("-inf"))


# -- what else is due ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("topology", "instance", "every"), [(WELL, "a", 30.0), (WELL, "r", 5.0), (NO_WRITER, "r", 0.5)])
def test_a_name_is_looked_up_again_after_a_while(topology, instance, every):
    at = topology.by_id[instance]
    assert probing.is_recheck_due(topology, at, 10.0, TIMING, 10.0 + every)
    assert not probing.is_recheck_due(topology, at, 10.0, TIMING, 9.9 + every)


def test_the_catalog_is_read_on_the_writer_or_on_any_without_one():
    """The writer's catalog is read, or any while there is no writer, and sooner after an unknown function."""
    assert [probing.is_catalog_due(WELL, i, 10.0, is_wanted=False, now=40.0) for i in "ab"] == [True, False]
    assert [probing.is_catalog_due(NO_WRITER, i, 10.0, is_wanted=False, now=40.0) for i in "ab"] == [True, True]
    assert [probing.is_catalog_due(WELL, "a", 10.0, is_wanted=wanted, now=11.0) for wanted in (True, False)] == [True, False]


def test_old_rows_are_removed_on_the_writer():
    assert [probing.is_prune_due(WELL, i, 10.0, 70.0) for i in "ab"] == [True, False]
    assert not probing.is_prune_due(WELL, "a", 10.0, 69.0)
    assert not probing.is_prune_due(NO_WRITER, "a", 10.0, 70.0)
