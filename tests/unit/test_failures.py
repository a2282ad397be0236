"""The table of failures: what is repeated, what moves to the writer, what waits, and that all else raises."""

import itertools

import pytest

from aurora_router.core.failures import SUSPICIOUS, TABLE, Action, Failure, Phase, decide

PAIRS = list(itertools.product(Failure, Phase))


@pytest.mark.parametrize(("failure", "phase"), PAIRS, ids=[f"{f.name}-{p.name}" for f, p in PAIRS])
def test_every_pair_has_an_action_and_only_those_of_the_table_do_not_raise(failure, phase):
    assert decide(failure, phase) is TABLE.get((failure, phase), Action.RAISE)


@pytest.mark.parametrize("failure", [Failure.CONNECT, Failure.LOST, Failure.CONFLICT])
def test_reads_that_lost_nothing_go_on_elsewhere(failure):
    assert decide(failure, Phase.FRESH_READ) is Action.REPEAT_ELSEWHERE


def test_a_write_that_a_reader_refused_moves_to_the_writer():
    assert decide(Failure.READ_ONLY, Phase.FRESH_READ) is Action.TO_WRITER


@pytest.mark.parametrize("failure", [Failure.CONNECT, Failure.LOST])
def test_a_writer_that_cannot_be_reached_is_waited_for_because_nothing_was_sent(failure):
    assert decide(failure, Phase.ENTERING_WRITER) is Action.WAIT_FOR_WRITER


@pytest.mark.parametrize("failure", Failure)
def test_nothing_that_ran_on_the_writer_or_in_a_bound_transaction_is_ever_repeated(failure):
    assert decide(failure, Phase.ON_WRITER) is decide(failure, Phase.BOUND_READ) is Action.RAISE


@pytest.mark.parametrize("failure", [Failure.OTHER, Failure.REFUSED])
@pytest.mark.parametrize("phase", Phase)
def test_what_would_fail_again_everywhere_raises(failure, phase):
    assert decide(failure, phase) is Action.RAISE


def test_only_failures_of_the_connection_make_an_instance_suspect():
    assert {Failure.CONNECT, Failure.LOST} == SUSPICIOUS
