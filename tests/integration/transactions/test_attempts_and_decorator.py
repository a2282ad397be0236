"""The loop and the decorator run a unit as run_transaction does. What they cannot take is refused at once."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from sqlalchemy import update
from sqlalchemy.orm import scoped_session, sessionmaker

from aurora_router import ConfigurationError, Router, RouterError, RoutingSession
from aurora_router.local import FaultProxy, PostgresCluster
from tests.integration.shop import RAISE, Item, no_connection_is_left, raise_stock, sessions, stock

MakeRouter = Callable[..., Router]


def test_the_loop_runs_its_block_again(cluster: PostgresCluster, proxy: FaultProxy, router: Router) -> None:
    proxy.lose("COMMIT", answer=False, times=2)
    numbers = []
    for attempt in router.attempts(sessions(router)):
        with attempt as s:
            numbers.append(attempt.number)
            s.execute(RAISE)
    assert numbers == [1, 2, 3]
    assert stock(cluster) == 11


@pytest.mark.parametrize("how", ["return in the block", "break after the block"])
def test_a_loop_left_early_commits_nothing_and_warns(
    cluster: PostgresCluster, proxy: FaultProxy, router: Router, how: str
) -> None:
    """A loop that is left early commits nothing and warns of it."""

    def leaves() -> int:
        for attempt in router.attempts(sessions(router)):
            with attempt as s:
                done = raise_stock(s)
                if how == "return in the block":
                    return done
            break
        return done

    proxy.lose("COMMIT", answer=False)  # nobody could learn of this loss any more
    with pytest.warns(RuntimeWarning, match="return or break"):
        assert leaves() == 11
    assert proxy._losing, "no COMMIT was sent"
    assert stock(cluster) == 10
    assert no_connection_is_left(router)


def test_an_attempt_is_for_one_block_in_its_loop(cluster: PostgresCluster, router: Router) -> None:
    for attempt in router.attempts(sessions(router)):
        with attempt as s:
            s.execute(RAISE)
        with pytest.raises(RouterError, match="one `with` block"):
            attempt.__enter__()
    left = next(router.attempts(sessions(router)))
    with pytest.raises(RouterError, match="one `with` block"):
        left.__enter__()
    assert stock(cluster) == 11


def test_the_decorator_gives_the_session_and_passes_arguments_on(
    cluster: PostgresCluster, proxy: FaultProxy, router: Router
) -> None:
    @router.transactional(sessions(router), deadline=20.0)
    def add_to(s: RoutingSession, number: int, *, more: int) -> str:
        """Says something."""
        s.execute(update(Item).where(Item.id == number).values(stock=Item.stock + more))
        return f"{number}: {more}"

    proxy.lose("COMMIT", answer=False)
    assert add_to(1, more=5) == "1: 5"
    assert add_to.__name__ == "add_to"
    assert add_to.__doc__ == "Says something."
    assert stock(cluster) == 15


def test_a_decorator_without_parentheses_is_refused(cluster: PostgresCluster, router: Router) -> None:
    """A bare `@router.transactional` is refused: it would take the function for a session factory, and never run it."""

    def add(s: RoutingSession) -> None:
        s.execute(RAISE)

    def add_to(s: RoutingSession, *, number: int) -> None:
        s.execute(RAISE)

    def optional(s: RoutingSession | None = None, number: int = 1) -> None:
        add(sessions(router)())

    def any_number(*arguments: Any, **more: Any) -> None:
        add(sessions(router)())

    def by_name(*, s: RoutingSession | None = None) -> None:
        add(sessions(router)())

    def without() -> None:
        add(sessions(router)())

    class Service:
        def add(self, s: RoutingSession) -> None:
            s.execute(RAISE)

        def __call__(self, *arguments: Any) -> None:
            any_number()

    partial = functools.partial(optional, number=2)
    cached = functools.lru_cache(without)
    for fn in (
        *(add, add_to, optional, any_number, by_name, without, partial, cached, lambda s=None: None),
        *(Service().add, Service.add, Service(), functools.wraps(add)(any_number)),
    ):
        with pytest.raises(ConfigurationError, match=r"@router\.transactional\(Session\)"):
            router.transactional(fn)  # type: ignore[arg-type]
    assert stock(cluster) == 10


def test_a_function_that_takes_no_session_is_refused(router: Router) -> None:
    """The decorator refuses a function without a session at its definition, and not at its first call."""
    decorate: Any = router.transactional(sessions(router))

    def without() -> None: ...

    def by_name(*, s: RoutingSession) -> None: ...

    def options(**more: Any) -> None: ...

    for fn in (without, by_name, options):
        with pytest.raises(ConfigurationError, match=f"{fn.__name__} takes no session"):
            decorate(fn)
    with pytest.raises(ConfigurationError, match="decorates a function"):
        decorate(1)


def test_a_function_may_take_its_session_in_any_way(cluster: PostgresCluster, router: Router) -> None:
    """With parentheses, a function with an optional first argument or any number of arguments gets the session."""

    @router.transactional(sessions(router))
    def optional(s: RoutingSession | None = None, number: int = 1) -> None:
        assert s is not None
        s.execute(RAISE)

    @router.transactional(sessions(router))
    def any_number(*arguments: Any) -> None:
        arguments[0].execute(RAISE)

    optional()
    optional(number=2)
    any_number()
    any_number(1, 2)
    assert stock(cluster) == 14


def test_any_factory_of_sessions_will_do_for_the_decorator(cluster: PostgresCluster, router: Router) -> None:
    """A sessionmaker, a scoped_session and a function without arguments make sessions."""
    Session = sessions(router)

    def make(read_only: bool | None = None) -> RoutingSession:
        return Session(read_only=read_only)

    factories: tuple[Any, ...] = (
        *(Session, scoped_session(Session), functools.partial(Session, read_only=False)),
        *(make, lambda: Session(read_only=False)),
    )
    for factory in factories:
        router.transactional(factory)(lambda s: s.execute(RAISE))()
    assert stock(cluster) == 15


def test_a_scoped_session_lends_its_factory_only(cluster: PostgresCluster, router: Router) -> None:
    """A scoped session lends its factory and keeps its own session."""
    scoped = scoped_session(sessions(router))
    mine = scoped()
    router.run_transaction(scoped, lambda s: s.execute(RAISE))
    assert scoped() is mine
    assert stock(cluster) == 11
    scoped.remove()


def test_only_routing_sessions_of_this_router_are_taken(
    cluster: PostgresCluster, router: Router, make_router: MakeRouter
) -> None:
    for strange in (sessionmaker(), sessions(make_router())):
        with pytest.raises(ConfigurationError, match="routing sessions of this router"):
            router.run_transaction(strange, lambda s: None)
    with pytest.raises(ConfigurationError, match="deadline"):
        router.run_transaction(sessions(router), lambda s: None, deadline=-1)
    with pytest.raises(ConfigurationError, match="commit_check"):
        router.run_transaction(sessions(router), lambda s: None, commit_check="xod")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "wrong",
    [{"deadline": 0.0}, {"stop": 5}, {"wait": 2.0}, {"commit_check": "xod"}, {"Session": None}],
    ids=lambda wrong: next(iter(wrong)),
)
def test_a_wrong_option_is_told_at_once(router: Router, wrong: dict[str, object]) -> None:
    """A mistake in the options is an error at once, and not at the next failover."""
    options: dict[str, Any] = {"Session": sessions(router), **wrong}
    with pytest.raises(ConfigurationError, match=next(iter(wrong))):
        router.run_transaction(fn=lambda s: None, **options)
    with pytest.raises(ConfigurationError, match=next(iter(wrong))):
        router.attempts(**options)
    with pytest.raises(ConfigurationError, match=next(iter(wrong))):
        router.transactional(**options)


def test_an_unknown_option_of_the_decorator_is_named(router: Router) -> None:
    """The router's own error names the unknown option and the options that exist."""
    options: dict[str, Any] = {"retries": 3}
    with pytest.raises(ConfigurationError, match=r"retries=.*deadline, stop, wait or commit_check"):
        router.transactional(sessions(router), **options)


def test_a_function_that_would_run_after_its_unit_is_refused(cluster: PostgresCluster, router: Router) -> None:
    async def coroutine(s: RoutingSession) -> None:
        s.execute(RAISE)

    def generator(s: RoutingSession) -> Iterator[int]:
        yield raise_stock(s)

    for fn in (coroutine, generator, lambda s: coroutine(s)):
        with pytest.raises(ConfigurationError, match="coroutine or a generator"):
            router.run_transaction(sessions(router), fn)
    with pytest.raises(ConfigurationError, match="coroutine or a generator"):
        router.transactional(sessions(router))(coroutine)()
    assert stock(cluster) == 10
