"""Functions that run_transaction() and its decorator take, on a fake cluster."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from sqlalchemy.exc import InvalidRequestError
from sqlalchemy.orm import sessionmaker

from aurora_router import ConfigurationError, Router, RoutingSession
from tests.fakes.cluster import STOCK, FakeCluster
from tests.stories import WRITE

Function = Callable[..., Any]


@pytest.fixture
def router(cluster: FakeCluster) -> Iterator[Router]:
    with Router("postgresql+fakepg://app@db-1/shop", instances=["db-2"]) as router:
        router.start()
        yield router


@pytest.fixture
def make(router: Router) -> sessionmaker[RoutingSession]:
    return sessionmaker(class_=RoutingSession, router=router)


async def write_later(s: RoutingSession) -> None:
    s.execute(WRITE)


async def write_and_yield(s: RoutingSession) -> AsyncIterator[None]:
    s.execute(WRITE)
    yield


@contextlib.contextmanager
def writing(s: RoutingSession) -> Iterator[None]:
    s.execute(WRITE)
    yield


@contextlib.asynccontextmanager
async def writing_later(s: RoutingSession) -> AsyncIterator[None]:
    s.execute(WRITE)
    yield


class Writer:
    async def __call__(self, s: RoutingSession) -> None:
        s.execute(WRITE)


def as_task(s: RoutingSession) -> Any:
    return asyncio.ensure_future(write_later(s))


def logged(fn: Function) -> Function:
    @functools.wraps(fn)
    def run(*args: Any) -> Any:
        return fn(*args)

    return run


LATER: dict[str, Function] = {
    "coroutine": lambda s: write_later(s),
    "async generator": lambda s: write_and_yield(s),
    "generator": lambda s: (s.execute(WRITE) for _ in "x"),
    "task": as_task,
    "future": lambda s: Future[None](),
    "map": lambda s: map(s.execute, [WRITE]),
    "filter": lambda s: filter(s.execute, [WRITE]),
    "context manager": writing,
    "async context manager": writing_later,
    "wrapped coroutine": logged(write_later),
    "wrapped async generator": logged(write_and_yield),
}


@pytest.mark.parametrize("fn", LATER.values(), ids=LATER)
def test_a_result_that_works_after_its_unit_is_refused(
    router: Router, make: sessionmaker[RoutingSession], cluster: FakeCluster, fn: Function
) -> None:
    """A function whose work would come after the COMMIT ends in an error, because its writes would be lost."""

    async def run() -> None:
        router.run_transaction(make, fn)

    async def run_decorated() -> None:
        router.transactional(make)(logged(fn))()

    for way in (run, run_decorated):
        with pytest.raises(ConfigurationError, match="after its unit"):
            asyncio.run(way())
    assert cluster.stock(cluster.end) == STOCK


def test_a_result_of_a_session_is_returned(router: Router, make: sessionmaker[RoutingSession], cluster: FakeCluster) -> None:
    """A function may return the result of a statement, although a result is an iterator."""
    router.run_transaction(make, lambda s: s.execute(WRITE))
    assert cluster.stock(cluster.end) == STOCK + 1


@pytest.mark.parametrize(
    "fn",
    [write_later, write_and_yield, Writer(), functools.partial(Writer()), staticmethod(write_later)],
    ids=["coroutine", "async generator", "object", "partial", "static method"],
)
def test_the_decorator_refuses_what_is_a_coroutine_at_once(
    router: Router, make: sessionmaker[RoutingSession], fn: Function
) -> None:
    """The decorator refuses a coroutine at its definition, also as an object, a partial or a static method."""
    with pytest.raises(ConfigurationError, match="coroutine or a generator"):
        router.transactional(make)(fn)


def test_a_decorator_without_a_factory_says_what_to_give(router: Router) -> None:
    """Empty parentheses, and options alone, are an error in words."""
    transactional: Any = router.transactional
    for options in ({}, {"commit_check": None}):
        with pytest.raises(ConfigurationError, match="Session must be a sessionmaker"):
            transactional(**options)


def test_a_decorator_without_parentheses_is_refused_in_words(router: Router, cluster: FakeCluster) -> None:
    """The function is taken for a factory. That is an error at once if it has a parameter, and else at its call."""
    transactional: Any = router.transactional

    def by_name(*, session=None):  # type: ignore[no-untyped-def]
        raise AssertionError

    with pytest.raises(ConfigurationError, match=r"@router\.transactional\(Session\)"):
        transactional(by_name)

    @transactional
    def without():  # type: ignore[no-untyped-def]
        raise AssertionError

    with pytest.raises(ConfigurationError, match=r"@router\.transactional\(Session\)"):
        without()


def test_the_signature_of_a_decorated_function_has_no_session(router: Router, make: sessionmaker[RoutingSession]) -> None:
    """A framework that reads the signature, as FastAPI does, does not ask its client for a session."""

    def pay(s: RoutingSession, number: int, *, note: str = "") -> str:
        return f"{number}{note}"

    def any_number(*arguments: Any) -> None: ...

    paid = router.transactional(make)(pay)
    assert str(inspect.signature(paid)) == "(number: 'int', *, note: 'str' = '') -> 'str'"
    assert paid(3, note="!") == "3!"
    assert [*inspect.signature(router.transactional(make)(any_number)).parameters] == ["arguments"]
    unknown: Any = dict.pop  # its signature is not known
    assert callable(router.transactional(make)(unknown))


def test_a_decorated_function_is_an_endpoint_of_fastapi(
    router: Router, make: sessionmaker[RoutingSession], cluster: FakeCluster
) -> None:
    """FastAPI calls a decorated function with the values of the request."""
    app = FastAPI()

    @app.post("/items/{number}")
    @router.transactional(make)
    def raise_stock(s: RoutingSession, number: int, by: int = 1) -> int:
        s.execute(WRITE)
        return number + by

    answer = TestClient(app).post("/items/3?by=4")
    assert (answer.status_code, answer.json()) == (200, 7)
    assert cluster.stock(cluster.end) == STOCK + 1


def test_an_attempt_begins_a_session_that_does_not(
    router: Router, make: sessionmaker[RoutingSession], cluster: FakeCluster
) -> None:
    """With autobegin=False a function may begin its unit, but need not."""

    def begin(s: RoutingSession) -> None:
        with s.begin():
            s.execute(WRITE)

    by_itself = sessionmaker(class_=RoutingSession, router=router, autobegin=False)
    for function in (begin, lambda s: s.execute(WRITE)):
        before = cluster.stock(cluster.end)
        router.run_transaction(by_itself, function)
        assert cluster.stock(cluster.end) == before + 1
    with pytest.raises(InvalidRequestError, match="Autobegin is disabled"):
        by_itself().execute(WRITE)
