"""The table of failures: which are retried, move to the writer, wait, or have their outcome looked up. All others raise."""

import itertools

import pytest

from aurora_router.core.failures import SUSPICIOUS, TABLE, Action, Failure, Phase, decide, facts

PAIRS = list(itertools.product(Failure, Phase))
BEFORE = (Phase.READER_CONNECTING, Phase.READER_UNSENT, Phase.WRITER_CONNECTING, Phase.WRITER_UNSENT)
OF_A_WRITER = (Phase.WRITER_CONNECTING, Phase.WRITER_UNSENT)
GONE = (Failure.CONNECT, Failure.BUSY, Failure.LOST, Failure.TIMED_OUT)


@pytest.mark.parametrize(("failure", "phase"), PAIRS, ids=[f"{f.name}-{p.name}" for f, p in PAIRS])
def test_every_failure_and_phase_has_an_action(failure, phase):
    """Every pair of failure and phase has an action, and only those of the table do not raise."""
    assert decide(failure, phase) is TABLE.get((failure, phase), Action.RAISE)


@pytest.mark.parametrize("failure", [Failure.LOST, Failure.BROKEN, Failure.CONFLICT])
def test_reads_that_lost_nothing_go_on_elsewhere(failure):
    assert decide(failure, Phase.READ) is Action.REPEAT_ELSEWHERE


def test_a_read_whose_plan_is_out_of_date_stays_where_it_is():
    """A read whose plan is out of date is retried at the same instance, and its text does not count as refused."""
    assert decide(Failure.OUTDATED, Phase.READ) is Action.REPEAT_UNPREPARED


@pytest.mark.parametrize("failure", [Failure.READ_ONLY, Failure.NOT_HERE, Failure.MISSING])
def test_what_a_reader_refused_or_cannot_do_moves_to_the_writer(failure):
    assert decide(failure, Phase.READ) is Action.TO_WRITER


@pytest.mark.parametrize("failure", GONE)
@pytest.mark.parametrize("phase", OF_A_WRITER)
def test_an_unreachable_writer_is_waited_for(failure, phase):
    """The unit waits for a writer that cannot be reached, because nothing was sent."""
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
@pytest.mark.parametrize("phase", [Phase.READ, Phase.WRITER_FIRST, Phase.WRITER_STATEMENT, Phase.READER_TRANSACTION])
def test_a_transaction_that_was_sacrificed_may_be_run_again(failure, phase):
    assert decide(failure, phase) is Action.RUN_AGAIN


ENDED = (Failure.LOST, Failure.OVERTIME, Failure.TIMED_OUT)  # the session is over, so no answer comes


@pytest.mark.parametrize("failure", Failure)
def test_only_a_commit_without_an_answer_is_resolved(failure):
    """The outcome is looked up for a COMMIT whose answer was lost, and for no other failure."""
    assert (decide(failure, Phase.COMMIT) is Action.RESOLVE) is (failure in ENDED)
    assert facts(failure, Phase.COMMIT).outcome_known is (failure not in ENDED)


@pytest.mark.parametrize("failure", [Failure.OVERTIME, Failure.TIMED_OUT])
@pytest.mark.parametrize("phase", [Phase.READ, Phase.READER_TRANSACTION, Phase.WRITER_FIRST, Phase.WRITER_STATEMENT])
def test_a_statement_that_took_too_long_is_not_repeated(failure, phase):
    assert decide(failure, phase) is Action.RAISE


def test_a_first_write_is_repeated_if_its_plan_is_out_of_date():
    """A first write is retried only if its plan is out of date. Otherwise it may have run, or waiting is up to the caller."""
    differing = {f for f in Failure if decide(f, Phase.WRITER_FIRST) is not decide(f, Phase.WRITER_STATEMENT)}
    assert differing == {Failure.OUTDATED}
    assert decide(Failure.OUTDATED, Phase.WRITER_FIRST) is Action.REPEAT_UNPREPARED


@pytest.mark.parametrize("failure", [Failure.OTHER, Failure.REFUSED])
@pytest.mark.parametrize("phase", Phase)
def test_what_would_fail_again_everywhere_raises(failure, phase):
    """A failure that would come again everywhere raises, but a reader that refuses a connection is passed over."""
    elsewhere = failure is Failure.REFUSED and phase is Phase.READER_CONNECTING
    assert decide(failure, phase) is (Action.REPEAT_ELSEWHERE if elsewhere else Action.RAISE)


@pytest.mark.parametrize(("failure", "phase"), PAIRS, ids=[f"{f.name}-{p.name}" for f, p in PAIRS])
def test_a_unit_is_safe_to_retry_only_if_nothing_runs_twice(failure, phase):
    """The facts call a unit safe to retry only if nothing can be done twice."""
    known = facts(failure, phase)
    assert known.failure is failure
    assert known.sent is (phase not in BEFORE)
    assert known.safe_to_repeat is (decide(failure, phase) not in (Action.RAISE, Action.RESOLVE))
    if known.safe_to_repeat:
        assert known.outcome_known


def test_only_connection_failures_make_an_instance_suspect():
    """Only failures of the connection make an instance suspect."""
    assert {Failure.CONNECT, Failure.LOST, Failure.TIMED_OUT} == SUSPICIOUS
