"""What comes after an attempt of run_transaction: the pure steps, and the driver that does them for threads."""

import time

import pytest
import tenacity
from sqlalchemy.exc import PendingRollbackError

from aurora_router.cluster.error_classification import FACTS
from aurora_router.core.failures import Failure, Phase, facts
from aurora_router.core.retry_loop import Done, Failed, Raise, Sleep, is_retried, next_step
from aurora_router.errors import AmbiguousWriter, ConfigurationError, NoWriterAvailable, RouterError, StaleRead
from aurora_router.routing.backoff import TenacityPolicy
from aurora_router.routing.retries import attempts

DEADLOCK = facts(Failure.DEADLOCK, Phase.WRITER_STATEMENT)
READ_ONLY = facts(Failure.READ_ONLY, Phase.WRITER_STATEMENT)
LOST_COMMIT = facts(Failure.LOST, Phase.COMMIT)
STALE = facts(Failure.SERIALIZATION, Phase.WRITER_STATEMENT)
ERROR = ValueError("anything")
STALE_READ = StaleRead("Order", (7,), ())
TWO_WRITERS = AmbiguousWriter(["db-1", "db-2"])


@pytest.mark.parametrize(
    ("failed", "expected"),
    [
        pytest.param(Failed(ERROR, DEADLOCK, DEADLOCK, True), True, id="a failure of the unit"),
        pytest.param(Failed(ERROR, DEADLOCK, DEADLOCK, False), False, id="something is left of the attempt"),
        pytest.param(Failed(ERROR, LOST_COMMIT, LOST_COMMIT, True), False, id="it may have committed"),
        pytest.param(Failed(ERROR, None, None, True), False, id="the application's own error"),
        pytest.param(Failed(ERROR, None, DEADLOCK, True), False, id="the application's own error, later"),
        pytest.param(Failed(ERROR, DEADLOCK, None, True), False, id="an error of another database"),
        pytest.param(Failed(ERROR, DEADLOCK._replace(), DEADLOCK, True), False, id="an earlier error, raised again"),
        pytest.param(Failed(ERROR, READ_ONLY, READ_ONLY, True, refusals=2), True, id="refused twice"),
        pytest.param(Failed(ERROR, READ_ONLY, READ_ONLY, True, refusals=3), False, id="refused three times"),
        pytest.param(Failed(TWO_WRITERS, None, None, True), True, id="two writers"),
        pytest.param(Failed(TWO_WRITERS, None, None, False), False, id="two writers, and something is left"),
        pytest.param(Failed(NoWriterAvailable(1.0, ()), None, None, True), False, id="no writer, after all the time"),
        pytest.param(Failed(ERROR, DEADLOCK, DEADLOCK, True, may_have_committed_elsewhere=True), False, id="committed elsewhere"),
        pytest.param(
            Failed(STALE_READ, STALE, STALE, True, may_have_committed_elsewhere=True), True, id="found before any COMMIT"
        ),
    ],
)
def test_an_attempt_is_retried_if_nothing_runs_twice(failed, expected):
    assert is_retried(failed) is expected


class Script:
    """A policy that allows some attempts, and writes down what it is asked."""

    def __init__(self, *, stops=False, allows=True):
        self.stops, self.allowed = stops, allows
        self.asked = []

    def wait(self, error):
        self.asked.append("wait")
        return 0.25

    def stop(self):
        self.asked.append("stop")
        return self.stops

    def allows(self, number, error):
        self.asked.append(("allows", number))
        return self.allowed


@pytest.mark.parametrize(
    ("error", "policy", "step", "asked"),
    [
        (None, Script(), Done(), []),
        (ERROR, Script(), Sleep(0.25), ["wait", "stop", ("allows", 2)]),
        (ERROR, Script(stops=True), Raise(ERROR), ["wait", "stop"]),
        (ERROR, Script(allows=False), Raise(ERROR), ["wait", "stop", ("allows", 2)]),
    ],
    ids=["done", "sleep", "the last one", "no budget"],
)
def test_after_an_attempt_comes_one_step(error, policy, step, asked):
    """The budget is asked last, because it counts each retry that it allows."""
    found = next_step(2, error, policy)
    assert (type(found), found) == (type(step), step)
    assert policy.asked == asked


def test_tenacitys_policies_see_what_tenacity_shows_them():
    """They see the number of the attempt, its error, the time since the beginning, and how long the loop has slept."""
    seen = []

    def wait(state):
        assert state.outcome.exception() is ERROR
        seen.append((state.attempt_number, state.idle_for, state.seconds_since_start >= 100.0))
        return float(state.attempt_number)

    policy = TenacityPolicy(tenacity.stop_after_attempt(3), wait, time.monotonic() - 100.0)
    steps = [next_step(number, ERROR, policy) for number in (1, 2, 3)]
    assert steps == [Sleep(1.0), Sleep(2.0), Raise(ERROR)]
    assert seen == [(1, 0.0, True), (2, 1.0, True), (3, 3.0, True)]


def test_without_a_deadline_time_counts_from_the_first_failure():
    policy = TenacityPolicy(tenacity.stop_after_delay(60.0), tenacity.wait_none(), None)
    assert next_step(1, ERROR, policy) == Sleep(0.0)
    assert policy._state.seconds_since_start < 60.0


def marked(known, error=None):
    error = error or ValueError("from the database")
    setattr(error, FACTS, known)
    return error


class FakeSession:
    """A session that does what its script says at COMMIT: an error to raise, or None."""

    spans_databases = False

    def __init__(self, router, script, calls):
        self.router, self.script, self.calls = router, script, calls

    def join_retry(self, retry, commit_check):
        self.retry = retry
        self.calls.append(f"run {commit_check}")

    def commit(self):
        error = self.script.pop(0)
        if error is not None:
            self.retry.failed = getattr(error, FACTS, None) or self.retry.failed
            raise error
        self.calls.append("commit")

    def close(self):
        self.calls.append("close")


def loop(*script, policy=None, router="router", make=FakeSession):
    """The attempts of a unit, and what was called meanwhile."""
    calls, script = [], [*script]
    sleep = lambda seconds: calls.append(f"sleep {seconds}")  # noqa: E731
    return attempts(router, lambda: make("router", script, calls), "xid", None, policy or Script(), sleep), calls


def run(attempts_, block=lambda session: None):
    """Run a block in each attempt."""
    for attempt in attempts_:
        with attempt as session:
            block(session)


def interrupt(_):
    raise KeyboardInterrupt


def test_the_driver_makes_attempts_until_one_commits():
    attempts_, calls = loop(marked(DEADLOCK), None)
    for attempt in attempts_:
        with attempt as session:
            assert session.retry is attempt.retry
    assert calls == ["run xid", "close", "sleep 0.25", "run xid", "commit", "close"]


def test_an_error_in_the_block_is_retried_too():
    attempts_, calls = loop(None)
    for attempt in attempts_:
        with attempt as session:
            if attempt.number == 1:
                session.retry.failed = DEADLOCK
                raise marked(DEADLOCK)
    assert calls == ["run xid", "close", "sleep 0.25", "run xid", "commit", "close"]


def test_an_error_that_hides_the_failure_is_retried_as_well():
    """After the failure of a flush SQLAlchemy raises PendingRollbackError. The unit's last failure counts."""
    attempts_, calls = loop(None)
    for attempt in attempts_:
        with attempt as session:
            if attempt.number == 1:
                session.retry.failed = DEADLOCK
                raise PendingRollbackError("roll back first")
    assert calls[-1] == "close"
    assert "commit" in calls


def test_the_driver_raises_what_is_not_retried():
    for error in (ValueError("mine"), marked(LOST_COMMIT)):
        attempts_, calls = loop(error)
        with pytest.raises(ValueError) as caught:
            run(attempts_)
        assert caught.value is error
        assert calls == ["run xid", "close"]


def test_the_driver_raises_the_last_error_if_the_policy_stops():
    error = marked(DEADLOCK)
    attempts_, calls = loop(error, policy=Script(stops=True))
    with pytest.raises(ValueError) as caught:
        run(attempts_)
    assert caught.value is error
    assert calls == ["run xid", "close"]


def test_an_interrupt_in_the_block_is_never_retried():
    attempts_, calls = loop()
    with pytest.raises(KeyboardInterrupt):
        run(attempts_, interrupt)
    assert calls == ["run xid", "close"]


def test_a_loop_that_is_left_commits_nothing_and_warns():
    attempts_, calls = loop()
    attempt = next(attempts_)
    with attempt:
        pass
    with pytest.warns(RuntimeWarning, match="nothing of its block was committed"):
        attempts_.close()
    assert calls == ["run xid", "close"]
    with pytest.raises(RouterError, match="one `with` block"):
        attempt.__enter__()


def test_a_loop_that_is_left_before_its_block_is_silent():
    attempts_, calls = loop()
    next(attempts_)
    attempts_.close()
    assert calls == []


def test_an_attempt_without_a_block_ends_the_loop():
    attempts_, calls = loop()
    assert len([*attempts_]) == 1
    assert calls == []


def test_a_session_of_another_router_is_refused():
    attempts_, _ = loop(router="another")
    attempt = next(attempts_)
    with pytest.raises(ConfigurationError, match="routing sessions of this router"):
        attempt.__enter__()
