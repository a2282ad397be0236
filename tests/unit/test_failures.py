"""The table of failures: which are retried, move to the writer, wait, or have their outcome looked up. All others raise."""

import ast
import itertools
from pathlib import Path

import pytest

import aurora_router
from aurora_router.core.failures import (
    OWN_ERRORS,
    TABLE,
    Action,
    Failure,
    Phase,
    Question,
    as_markdown,
    confirmed_facts,
    decide,
    facts,
    facts_of_own,
    inquiry,
    is_run_again,
    own_error,
    own_errors_as_markdown,
    policy_as_markdown,
    traits,
    while_connecting,
)
from aurora_router.errors import AmbiguousWriter, OutcomeUnknown, ReadOnlyViolation, RouterError, StaleRead

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
    assert {failure for failure in Failure if traits(failure).suspicious} == {Failure.CONNECT, Failure.LOST, Failure.TIMED_OUT}


def test_only_what_names_codes_names_a_kind_of_failure():
    """Only the table and the modules that know codes name a kind of failure, so a new kind touches two files."""
    package = Path(aurora_router.__file__).parent
    naming = {
        path.relative_to(package).as_posix()
        for path in package.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
        if node.value.id == "Failure" and node.attr in Failure.__members__
    }
    assert {path for path in naming if not path.startswith(("servers/", "drivers/"))} == {"core/failures.py"}


def test_contention_costs_nothing_of_the_budget():
    """An attempt that failed without any trouble of an instance costs nothing of the retry budget."""
    contention = {Failure.SERIALIZATION, Failure.DEADLOCK, Failure.OUTDATED, Failure.MISLED}
    assert {failure for failure in Failure if traits(failure).is_contention} == contention
    assert not any(traits(failure).suspicious for failure in contention)


def test_only_what_a_reader_never_runs_is_remembered():
    """A reader that does not know a name yet will know it soon, so its text is not remembered."""
    moved = {failure for failure in Failure if decide(failure, Phase.READ) is Action.TO_WRITER}
    assert {failure for failure in Failure if traits(failure).is_remembered} == moved - {Failure.MISSING}


QUESTIONS = {
    (Failure.TIMED_OUT, Phase.READ): (Question.IS_SILENT, Failure.LOST),
    (Failure.READ_ONLY, Phase.COMMIT): (Question.IS_WRITER, Failure.READ_ONLY),
    (Failure.LOST, Phase.WRITER_FIRST): (Question.LOSES_EVERYWHERE, Failure.ENDED),
    (Failure.BROKEN, Phase.READER_TRANSACTION): (Question.BREAKS_EVERYWHERE, Failure.BROKEN),
    (Failure.CONSTRAINT, Phase.COMMIT): (Question.WAS_MISLED, Failure.MISLED),
    (Failure.NOT_HERE, Phase.READ): (Question.MUST_STAY, Failure.NOT_HERE),
    (Failure.MISSING, Phase.READ): (Question.MUST_STAY, Failure.MISSING),
}


@pytest.mark.parametrize(("failure", "phase"), QUESTIONS)
def test_a_question_comes_before_the_decision(failure, phase):
    question, becomes = QUESTIONS[failure, phase]
    asked = inquiry(failure, phase)
    assert asked is not None
    assert asked.question is question
    assert confirmed_facts(failure, phase).failure is becomes


@pytest.mark.parametrize("phase", [Phase.COMMIT, *BEFORE])
@pytest.mark.parametrize("failure", [Failure.LOST, Failure.BROKEN])
def test_a_commit_is_not_to_blame_for_its_server(failure, phase):
    """Nothing is found out about a COMMIT, or about a connection on which nothing was sent."""
    assert inquiry(failure, phase) is None
    assert confirmed_facts(failure, phase) == facts(failure, phase)


def test_a_time_limit_in_a_commit_asks_nothing():
    """A COMMIT whose time limit is over is looked up, whether its server answers or not."""
    assert inquiry(Failure.TIMED_OUT, Phase.COMMIT) is None


@pytest.mark.parametrize("failure", [Failure.NOT_HERE, Failure.MISSING])
def test_what_the_writer_has_not_got_is_not_retried(failure):
    """A reader's refusal sends the unit to the writer. A unit that cannot move would meet the same again."""
    assert facts(failure, Phase.READ).safe_to_retry
    assert not confirmed_facts(failure, Phase.READ).safe_to_retry


def test_what_breaks_everywhere_is_not_retried():
    assert facts(Failure.BROKEN, Phase.READER_TRANSACTION).safe_to_retry
    assert not confirmed_facts(Failure.BROKEN, Phase.READER_TRANSACTION).safe_to_retry


def test_a_writer_that_refuses_writes_three_times_is_right():
    """If the writer refuses to write at the third time, the transaction itself is at fault."""
    refused = facts(Failure.READ_ONLY, Phase.WRITER_STATEMENT)
    assert [is_run_again(refused, times) for times in (0, 1, 2, 3)] == [True, True, True, False]


@pytest.mark.parametrize("failure", [Failure.LOST, Failure.DEADLOCK])
def test_other_failures_are_run_again_without_limit(failure):
    assert is_run_again(facts(failure, Phase.WRITER_STATEMENT), 100)


def test_what_is_unsafe_is_never_run_again():
    assert not is_run_again(facts(Failure.LOST, Phase.COMMIT), 0)
    assert not is_run_again(facts(Failure.OTHER, Phase.WRITER_STATEMENT), 0)


@pytest.mark.parametrize("failure", Failure)
def test_a_commit_that_has_not_happened_is_safe_to_retry(failure):
    """If the writer says that the COMMIT has not happened, the unit may run again."""
    assert facts(failure, Phase.COMMIT, not_committed=True) == (failure, True, True, True)


@pytest.mark.parametrize(
    ("failure", "is_refusal", "has_code", "found"),
    [
        (Failure.OTHER, True, False, Failure.REFUSED),
        (Failure.CONNECT, True, True, Failure.REFUSED),
        (Failure.BUSY, True, True, Failure.BUSY),
        (Failure.OTHER, False, False, Failure.CONNECT),
        (Failure.OTHER, False, True, Failure.OTHER),
        (Failure.LOST, False, False, Failure.LOST),
    ],
)
def test_an_error_of_connecting_is_a_refusal_or_passes(failure, is_refusal, has_code, found):
    """While connecting, an error that lasts until somebody changes something is a refusal. One without a code passes."""
    assert while_connecting(failure, is_refusal=is_refusal, has_code=has_code) is found


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RouterError("closed"), (Failure.OTHER, False, True, False)),
        (ReadOnlyViolation("WRITE", "db-1", sent=True), (Failure.OTHER, True, True, False)),
        (AmbiguousWriter(["db-1", "db-2"]), (Failure.CONNECT, False, True, True)),
        (StaleRead("Order", (7,), ()), (Failure.SERIALIZATION, True, True, True)),
        (OutcomeUnknown("db-1", "nothing"), (Failure.LOST, True, False, False)),
    ],
    ids=lambda given: type(given).__name__,
)
def test_the_routers_own_errors_have_rows_too(error, expected):
    """An error of the router's own stands for a failure, and says itself whether it is safe to retry."""
    assert facts_of_own(error) == expected


def test_only_two_writers_are_waited_out():
    """run_transaction runs a unit again until one of two writers is gone. It raises other errors that nothing was sent for."""
    assert [kind for kind, own in OWN_ERRORS.items() if own.is_waited_out] == [AmbiguousWriter]


def test_a_kind_of_error_without_a_row_has_its_bases():
    class Mine(AmbiguousWriter):
        """An error that somebody has derived."""

    assert own_error(Mine(["db-1"])) is OWN_ERRORS[AmbiguousWriter]


def test_the_page_says_what_each_action_means():
    page = (Path(__file__).parents[2] / "docs" / "failures.md").read_text()
    meanings = page.partition("## What the actions mean")[2].partition("\n## ")[0]
    assert all(f"| {action.value} |" in meanings for action in Action if action is not Action.RAISE)


def test_the_pages_tables_show_each_kind_and_its_policy():
    """The first table has a row for each failure. The others say what else the router does, and name its own errors."""
    assert all(f"| **{failure.value}** |" in as_markdown() for failure in Failure)
    policy = policy_as_markdown()
    assert f"| **{Failure.SERIALIZATION.value}** | another attempt spends nothing of the retry budget |" in policy
    assert f"it asks first: does the server no longer answer? If so, it counts as: {Failure.LOST.value}" in policy
    assert f"| **{Failure.OTHER.value}** |" not in policy
    own = own_errors_as_markdown()
    assert "| `StaleRead` | the transaction could not be serialized with others | yes | runs the unit again |" in own
    assert "| `OutcomeUnknown` | the connection was lost | no | raises it |" in own
