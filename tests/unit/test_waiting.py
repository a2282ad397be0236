"""The promises of a `Waiting`, which each implementation must keep, and that a router's units wait through theirs.

A second implementation runs the same tests: give its callers a class like `Threads`, and name that in `CALLERS`.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from typing import Any, Protocol

import pytest
from sqlalchemy.orm import sessionmaker

from aurora_router import Router, RoutingSession
from aurora_router.waiting import ThreadWaiting, Waiting
from tests.fakes.cluster import FakeCluster
from tests.fakes.driver import installed
from tests.integration.shop import eventually
from tests.stories import READ, WRITE


class Callers(Protocol):
    """Code that waits, each piece in a caller of its own: a thread or a task."""

    @property
    def waiting(self) -> Waiting: ...

    def run(self, *functions: Callable[[], Any]) -> list[Any]:
        """Run each function in a caller, all at the same time, and return their results. Fail if one does not end."""

    def cancel(self, number: int) -> None:
        """Cancel one of the callers, by its place in run(). Do nothing if callers of this kind cannot be cancelled."""


class Threads:
    """Callers that are threads."""

    def __init__(self) -> None:
        self.waiting = ThreadWaiting()

    def run(self, *functions: Callable[[], Any]) -> list[Any]:
        results: list[Any] = [None] * len(functions)

        def call(number: int) -> None:
            results[number] = functions[number]()

        threads = [threading.Thread(target=call, args=(number,), daemon=True) for number in range(len(functions))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
            assert not thread.is_alive(), "it waits for ever"
        return results

    def cancel(self, number: int) -> None:
        """Threads cannot be cancelled."""


CALLERS: list[Callable[[], Callers]] = [Threads]


@pytest.fixture(params=CALLERS)
def callers(request: pytest.FixtureRequest) -> Callers:
    made: Callers = request.param()
    return made


def until(condition: Callable[[], object], waiting: Waiting) -> None:
    """Wait in a caller until another one has made the condition true."""
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "no other caller went on"
        waiting.sleep(0.001)


# -- wakeups ------------------------------------------------------------------------------------------------------


def test_a_wakeup_that_was_set_before_ends_the_wait_at_once(callers):
    """A `set()` is not lost if it comes before the wait. Several of them count as one, and the next wait needs a new one."""
    told: list[str] = []
    made = []

    def waits():
        wakeup = callers.waiting.wakeup()
        wakeup.set()
        wakeup.set()
        wakeup.wait(math.inf)
        told.append("woke")
        made.append(wakeup)
        wakeup.wait(math.inf)
        told.append("woke again")

    def sets():
        until(lambda: made, callers.waiting)
        callers.waiting.sleep(0.01)
        told.append("set")
        made[0].set()

    callers.run(waits, sets)
    assert told == ["woke", "set", "woke again"]


@pytest.mark.parametrize("timeout", [0.01, 0.0, -1.0])
def test_a_wait_ends_at_its_timeout(callers, timeout):
    assert callers.run(lambda: callers.waiting.wakeup().wait(timeout)) == [None]


def test_another_caller_wakes_the_one_that_waits(callers):
    """The caller that waits holds up no other caller, and only its own wakeup wakes it."""
    told: list[str] = []
    made = {}

    def waits(name):
        made[name] = callers.waiting.wakeup()
        made[name].wait(math.inf)
        told.append(name)

    def sets():
        until(lambda: len(made) == 2, callers.waiting)
        made["second"].set()
        until(lambda: told, callers.waiting)
        made["first"].set()

    callers.run(lambda: waits("first"), lambda: waits("second"), sets)
    assert told == ["second", "first"]


def test_any_thread_wakes_the_caller_that_waits(callers):
    """The router's own threads set wakeups of units, whatever waits for them."""
    made = []

    def waits():
        made.append(callers.waiting.wakeup())
        made[0].wait(math.inf)
        return "woke"

    thread = threading.Thread(target=lambda: (eventually(lambda: made), made[0].set()), daemon=True)
    thread.start()
    assert callers.run(waits) == ["woke"]
    thread.join()


def test_a_wakeup_may_be_set_after_its_caller_has_ended(callers):
    """The monitor may find a waiting unit just before the unit ends, and set its wakeup just after."""
    (wakeup,) = callers.run(callers.waiting.wakeup)
    wakeup.set()
    wakeup.set()


# -- sleep --------------------------------------------------------------------------------------------------------


def test_a_caller_that_sleeps_holds_up_no_other(callers):
    """A sleep lasts as long as it was told, and other callers go on meanwhile."""
    went_on = []

    def sleeps():
        began = time.monotonic()
        callers.waiting.sleep(0.01)
        took = time.monotonic() - began
        until(lambda: went_on, callers.waiting)
        return took

    took, _ = callers.run(sleeps, lambda: went_on.append(True))
    assert took >= 0.01


# -- local values -------------------------------------------------------------------------------------------------


def test_a_local_value_is_another_one_in_each_caller(callers):
    """It is None at first, and each caller finds its own value, also after others have run while it waited."""
    local, other = callers.waiting.local(), callers.waiting.local()
    entered: list[int] = []

    def keeps(number):
        before = local.value
        local.value = number
        entered.append(number)
        until(lambda: len(entered) == 3, callers.waiting)
        return before, local.value, other.value

    assert callers.run(*(lambda number=number: keeps(number) for number in range(3))) == [
        (None, number, None) for number in range(3)
    ]


# -- the shield of a COMMIT ---------------------------------------------------------------------------------------


def test_a_shield_hands_on_arguments_result_and_error(callers):
    refused = ValueError("refused")

    def send(connection, *, wait):
        if connection is None:
            raise refused
        return connection, wait

    def fails():
        with pytest.raises(ValueError, match="refused") as caught:
            callers.waiting.shielded(send)(None, wait=True)
        return caught.value is refused

    assert callers.run(lambda: callers.waiting.shielded(send)("db-1", wait=True), fails) == [("db-1", True), True]


def test_a_cancelled_caller_still_waits_for_the_answer(callers):
    """If a caller is cancelled during its COMMIT, it goes on only when the answer is there."""
    told: list[str] = []
    made = []

    def send():
        made.append(callers.waiting.wakeup())
        made[0].wait(math.inf)
        told.append("answered")

    def commits():
        try:
            callers.waiting.shielded(send)()
        finally:
            told.append("went on")

    def cancels():
        until(lambda: made, callers.waiting)
        callers.cancel(0)
        callers.waiting.sleep(0.01)
        made[0].set()

    callers.run(commits, cancels)
    assert told == ["answered", "went on"]


# -- the units of a router ----------------------------------------------------------------------------------------


class Watched(ThreadWaiting):
    """Notes what is done through it, and makes all sleeps short."""

    def __init__(self) -> None:
        self.done: list[str] = []
        self.real_sleep = time.sleep

    def wakeup(self) -> Any:
        self.done.append("wait")
        return super().wakeup()

    def sleep(self, seconds: float) -> None:
        self.done.append("sleep")
        self.real_sleep(min(seconds, 0.01))

    def shielded(self, send: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*arguments: Any, **options: Any) -> Any:
            self.done.append("commit")
            return send(*arguments, **options)

        return noted


def waits_for_a_writer(router: Router, cluster: FakeCluster) -> None:
    cluster.kill(cluster.writer)

    def promote() -> None:
        eventually(lambda: router.stats().units_waiting_for_writer)
        cluster.promote(cluster.readers[0])

    promotes = threading.Thread(target=promote, daemon=True)
    promotes.start()
    with sessionmaker(class_=RoutingSession, router=router)() as s:
        s.execute(WRITE)
    promotes.join()


def retries_a_transaction(router: Router, cluster: FakeCluster) -> None:
    runs: list[RoutingSession] = []

    def run(s: RoutingSession) -> None:
        runs.append(s)
        cluster.writer.refuses = "40P01" if len(runs) == 1 else None
        s.execute(WRITE)
        s.execute(READ)

    router.run_transaction(sessionmaker(class_=RoutingSession, router=router), run)


def commits(router: Router, cluster: FakeCluster) -> None:
    with sessionmaker(class_=RoutingSession, router=router)() as s:
        s.execute(WRITE)
        s.commit()


def makes_the_commit_table(router: Router, cluster: FakeCluster) -> None:
    cluster.lose("CREATE TABLE", answer=False)
    router.init_commit_table()


@pytest.mark.parametrize(
    ("unit", "done"),
    [(waits_for_a_writer, "wait"), (retries_a_transaction, "sleep"), (commits, "commit"), (makes_the_commit_table, "sleep")],
)
def test_a_routers_units_wait_through_its_waiting(monkeypatch, unit, done):
    """A thread with a unit never sleeps by itself."""
    watched = Watched()
    monkeypatch.setattr("aurora_router.router.ThreadWaiting", lambda: watched)

    def refuse(seconds: float) -> None:
        assert threading.current_thread() is not threading.main_thread(), "not through the router's Waiting"
        watched.real_sleep(seconds)

    cluster = FakeCluster()
    with installed(cluster), Router("postgresql+fakepg://app@db-1/shop", instances=["db-2"]) as router:
        router.start()
        del watched.done[:]
        monkeypatch.setattr(time, "sleep", refuse)
        unit(router, cluster)
        monkeypatch.undo()
    assert done in watched.done
