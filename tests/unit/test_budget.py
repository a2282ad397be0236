"""Retries are a share of recent traffic, apart from the first of each unit. Refusals are reported now and then."""

from __future__ import annotations

import itertools
import math
import threading

from hypothesis import given
from hypothesis import strategies as st

from aurora_router.core.budget import FLOOR, SECONDS, SHARE, RetryBudget

NOW = 1000.5


def granted(budget: RetryBudget, now: float, asked: int = 1000) -> int:
    return sum(budget.try_spend(now, first=False) for _ in range(asked))


def test_without_traffic_the_floor_is_there():
    assert granted(RetryBudget(), NOW) == FLOOR * SECONDS


def test_traffic_pays_for_a_share_of_itself():
    budget = RetryBudget()
    for _ in range(1000):
        budget.record(NOW)
    assert granted(budget, NOW) == FLOOR * SECONDS + SHARE * 1000


def test_a_first_repeat_is_always_allowed_and_counts():
    budget = RetryBudget()
    assert all(budget.try_spend(NOW, first=True) for _ in range(5000))
    assert not budget.try_spend(NOW, first=False)
    assert budget.try_spend(NOW, first=True)


def test_what_is_refused_does_not_count():
    budget = RetryBudget()
    granted(budget, NOW)
    assert granted(budget, NOW + SECONDS) == FLOOR * SECONDS


def test_units_and_repeats_are_forgotten_after_their_seconds():
    budget = RetryBudget()
    for _ in range(1000):
        budget.record(NOW)
    budget.try_spend(NOW, first=True)
    assert granted(budget, NOW + SECONDS - 1) == FLOOR * SECONDS + SHARE * 1000 - 1
    assert granted(budget, NOW + SECONDS) == 0
    assert granted(budget, NOW + 2 * SECONDS) == FLOOR * SECONDS


def test_a_long_pause_forgets_everything():
    budget = RetryBudget()
    for _ in range(1000):
        budget.record(NOW)
    assert granted(budget, NOW + 1e6) == FLOOR * SECONDS


def test_a_late_caller_does_not_change_newer_counts():
    """A thread that read the clock before another thread does not overwrite newer counts."""
    budget = RetryBudget()
    budget.record(NOW)
    budget.record(NOW - 1)
    assert granted(budget, NOW - 1) == int(FLOOR * SECONDS + SHARE * 2) + 1
    assert not budget.try_spend(NOW, first=False)


def test_refusals_are_told_at_most_once_a_second_and_all_of_them():
    budget = RetryBudget()
    assert budget.take_refused(NOW) == 0
    asked = int(FLOOR * SECONDS) + 3
    granted(budget, NOW, asked)
    assert budget.take_refused(NOW) == 3
    granted(budget, NOW, 2)
    assert budget.take_refused(NOW + 0.9) == 0
    assert budget.take_refused(NOW + 1.1) == 2
    assert budget.take_refused(NOW + 9.0) == 0


def test_threads_together_get_no_more_than_there_is():
    budget = RetryBudget(threading.Lock())
    allowed = itertools.count()

    def work() -> None:
        for _ in range(200):
            if budget.try_spend(NOW, first=False):
                next(allowed)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert next(allowed) == FLOOR * SECONDS


@given(st.lists(st.tuples(st.sampled_from((0.0, 0.0, 0.0, 0.3, 2.0)), st.integers(0, 300), st.integers(0, 200)), max_size=12))
def test_retries_allowed_are_those_that_recent_units_paid_for(steps):
    """Exactly the retries that the units of the last seconds pay for are allowed."""
    budget, now = RetryBudget(), 0.0
    units: list[float] = []
    repeats: list[float] = []

    def recent(times: list[float]) -> int:
        return sum(int(now) - int(when) < SECONDS for when in times)

    for passed, served, asked in steps:
        now += passed
        for _ in range(served):
            budget.record(now)
        units += [now] * served
        left = SHARE * recent(units) + FLOOR * SECONDS - recent(repeats)
        allowed = granted(budget, now, asked)
        repeats += [now] * allowed
        assert allowed == min(asked, max(math.ceil(left), 0))
