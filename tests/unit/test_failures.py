"""The table of failures: what is repeated, what moves to the writer, what waits, what is found out, and that all else raises."""

import itertools
from pathlib import Path

import pytest

from aurora_router.core.failures import SUSPICIOUS, TABLE, Action, Failure, Phase, as_markdown, decide, facts

PAIRS = list(itertools.product(Failure, Phase))
BEFORE = (Phase.READER_CONNECTING, Phase.READER_UNSENT, Phase.WRITER_CONNECTING, Phase.WRITER_UNSENT)
OF_A_WRITER = (Phase.WRITER_CONNECTING, Phase.WRITER_UNSENT)
GONE = (Failure.CONNECT, Failure.BUSY, Failure.LOST, Failure.TIMED_OUT)


@pytest.mark.parametrize(("failure", "phase"), PAIRS, ids=[f"{f.name}-{p.name}" for f, p in PAIRS])
def test_every_pair_has_an_action_and_only_those_of_the_table_do_not_raise(failure, phase):
    assert decide(failure, phase) is TABLE.get((failure, phase), Action.RAISE)


def test_the_documented_table_is_the_one_that_is_used():
    document = (Path(__file__).parents[2] / "docs" / "failures.md").read_text()
    assert as_markdown() in document, "run: python scripts/render-failures"


@pytest.mark.parametrize("failure", [Failure.LOST, Failure.BROKEN, Failure.CONFLICT])
def test_reads_that_lost_nothing_go_on_elsewhere(failure):
    assert decide(failure, Phase.READ) is Action.REPEAT_ELSEWHERE


@pytest.mark.parametrize("failure", [Failure.READ_ONLY, Failure.NOT_HERE])
def test_what_a_reader_refused_or_cannot_do_moves_to_the_writer(failure):
    assert decide(failure, Phase.READ) is Action.TO_WRITER


@pytest.mark.parametrize("failure", GONE)
@pytest.mark.parametrize("phase", OF_A_WRITER)
def test_a_writer_that_cannot_be_reached_is_waited_for_because_nothing_was_sent(failure, phase):
    assert decide(failure, phase) is Action.WAIT_FOR_WRITER


@pytest.mark.parametrize("failure", GONE)
@pytest.mark.parametrize("phase", [Phase.READER_CONNECTING, Phase.READER_UNSENT])
def test_a_reader_that_cannot_be_reached_is_passed_over(failure, phase):
    assert decide(failure, phase) is Action.REPEAT_ELSEWHERE


@pytest.mark.parametrize("failure", Failure)
@pytest.mark.parametrize("phase", [Phase.WRITER_STATEMENT, Phase.READER_TRANSACTION, Phase.COMMIT])
def test_nothing_of_a_transaction_is_ever_repeated_by_itself(failure, phase):
    assert decide(failure, phase) in (Action.RAISE, Action.RUN_AGAIN, Action.RESOLVE)


@pytest.mark.parametrize("failure", [Failure.SERIALIZATION, Failure.DEADLOCK])
@pytest.mark.parametrize("phase", [Phase.READ, Phase.WRITER_STATEMENT, Phase.READER_TRANSACTION])
def test_a_transaction_that_was_sacrificed_may_be_run_again(failure, phase):
    assert decide(failure, phase) is Action.RUN_AGAIN


ENDED = (Failure.LOST, Failure.OVERTIME, Failure.TIMED_OUT)  # the session is over, and with it the answer


@pytest.mark.parametrize("failure", Failure)
def test_a_commit_whose_answer_was_lost_is_found_out_and_no_other(failure):
    assert (decide(failure, Phase.COMMIT) is Action.RESOLVE) is (failure in ENDED)
    assert facts(failure, Phase.COMMIT).outcome_known is (failure not in ENDED)


@pytest.mark.parametrize("failure", [Failure.OVERTIME, Failure.TIMED_OUT])
@pytest.mark.parametrize("phase", [Phase.READ, Phase.READER_TRANSACTION, Phase.WRITER_STATEMENT])
def test_a_statement_that_took_too_long_is_not_repeated(failure, phase):
    assert decide(failure, phase) is Action.RAISE


@pytest.mark.parametrize("failure", [Failure.OTHER, Failure.REFUSED])
@pytest.mark.parametrize("phase", Phase)
def test_what_would_fail_again_everywhere_raises(failure, phase):
    assert decide(failure, phase) is Action.RAISE


@pytest.mark.parametrize(("failure", "phase"), PAIRS, ids=[f"{f.name}-{p.name}" for f, p in PAIRS])
def test_facts_say_that_a_unit_is_safe_to_repeat_only_where_nothing_can_be_done_twice(failure, phase):
    known = facts(failure, phase)
    assert known.failure is failure
    assert known.sent is (phase not in BEFORE)
    assert known.safe_to_repeat is (decide(failure, phase) not in (Action.RAISE, Action.RESOLVE))
    if known.safe_to_repeat:
        assert known.outcome_known


def test_only_failures_of_the_connection_make_an_instance_suspect():
    assert {Failure.CONNECT, Failure.LOST, Failure.TIMED_OUT} == SUSPICIOUS
