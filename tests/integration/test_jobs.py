"""A job sees the rows written before it was sent: by hand, and with Celery's signals and a worker."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from celery import Celery, chain, signals
from celery.contrib.testing.worker import start_worker

from aurora_router import Router
from aurora_router.core import events
from aurora_router.jobs import HEADER, put_token, scope_of
from aurora_router.local import PostgresCluster
from tests.integration.shop import sessions, until_readers_serve
from tests.integration.sites import in_session, more, stock

GUIDE = Path(__file__).parents[2] / "docs" / "web.md"
MakeRouter = Callable[..., Router]


def test_a_message_that_is_sent_after_a_write_takes_it_along(paused: PostgresCluster, make_router: MakeRouter) -> None:
    here, there = make_router(), make_router()
    until_readers_serve(there, 2)
    message: dict[str, Any] = {"other": 1}
    with here.causal_scope():
        put_token(here, message)
        assert message == {"other": 1}, "nothing was written"
        in_session(here, more)
        put_token(here, message)
    assert {*message} == {"other", HEADER}
    with scope_of(there, message) as scope:
        assert in_session(there, stock) == "11"
        onward: dict[str, Any] = {}
        put_token(there, onward)
        assert onward == {HEADER: scope.token}, "a job that it sends must see as much"
    with scope_of(there, {}):
        assert in_session(there, stock) == "10"


def test_outside_of_all_scopes_nothing_is_put_into_a_message(router: Router) -> None:
    message: dict[str, Any] = {}
    in_session(router, more)
    put_token(router, message)
    assert message == {}


def test_nested_scopes_put_the_token_that_implies_the_others(paused: PostgresCluster, make_router: MakeRouter) -> None:
    """Scopes inside each other put the token that implies the others."""
    router = make_router(token_keys=["a secret"])
    until_readers_serve(router, 2)
    with router.causal_scope() as given:
        in_session(router, more)
        token = given.token
    message: dict[str, Any] = {}
    with router.causal_scope(), router.causal_scope(token):
        put_token(router, message)
    assert message == {HEADER: token}
    with router.causal_scope(token), router.causal_scope():
        in_session(router, more)
        put_token(router, message)
    with scope_of(router, message):
        assert in_session(router, stock) == "12"


@pytest.mark.parametrize("wrong", ["nonsense", "1.77.1-A.1764000000", "", 7, b"1.77.1-A.1", None])
def test_a_token_that_does_not_count_does_not_stop_a_job(
    cluster: PostgresCluster, make_router: MakeRouter, heard: list[events.Event], wrong: object
) -> None:
    router = make_router(listeners=[heard.append])
    with scope_of(router, {HEADER: wrong}):
        assert in_session(router, stock) == "10"
    assert any(isinstance(event, events.TokenIgnored) for event in heard) == (wrong is not None)


# -- Celery -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def celery(paused: PostgresCluster, make_router: MakeRouter) -> Iterator[Celery]:
    """An application whose worker has a router of its own, and whose signals are wired as in the guide."""
    web, worker = make_router(), make_router()
    until_readers_serve(web, 2)
    until_readers_serve(worker, 2)
    app = Celery("shop", broker="memory://", backend="cache+memory://")
    app.conf.update(broker_transport_options={"polling_interval": 0.01})
    app.web, app.worker = web, worker

    def tell(headers: dict[str, Any], **_: Any) -> None:
        put_token(web, headers)

    def leave_logging_alone(**_: Any) -> None:
        """Keep the worker from setting the level of the root logger for all later tests."""

    names: dict[str, Any] = {"router": worker, "put_token": put_token, "scope_of": scope_of}
    (wired,) = re.findall(r"^```python\n(from celery.signals .*?)^```$", GUIDE.read_text(), re.DOTALL | re.MULTILINE)
    exec(wired, names)

    @app.task(shared=False, name="look")
    def look(*_: object) -> str:
        return str(in_session(worker, stock))

    @app.task(shared=False, name="write")
    def write() -> str:
        return str(in_session(worker, more))

    @app.task(shared=False, name="write_and_look_again", bind=True, max_retries=1, default_retry_delay=0)
    def again(self: Any) -> str:
        if not self.request.retries:
            in_session(worker, more)
            raise self.retry()
        return str(in_session(worker, stock))

    signals.setup_logging.connect(leave_logging_alone)
    signals.before_task_publish.connect(tell)
    try:
        yield app
    finally:
        signals.setup_logging.disconnect(leave_logging_alone)
        signals.before_task_publish.disconnect(tell)
        signals.before_task_publish.disconnect(names["tell"])
        signals.task_prerun.disconnect(names["enter"])
        signals.task_postrun.disconnect(names["leave"])


def test_a_celery_task_sees_what_its_sender_had_written(celery: Celery) -> None:
    look, web = celery.tasks["look"], celery.web
    with start_worker(celery, pool="solo", perform_ping_check=False, shutdown_timeout=30):
        assert look.delay().get(timeout=20) == "10"
        with web.causal_scope():
            assert look.delay().get(timeout=20) == "10"
            in_session(web, more)
            assert look.delay().get(timeout=20) == "11"
        assert look.delay().get(timeout=20) == "10"
        assert chain(celery.tasks["write"].s(), look.s())().get(timeout=20) == "12", "the next of a chain"
        assert celery.tasks["write_and_look_again"].delay().get(timeout=20) == "13", "the same, run again"
        assert look.delay().get(timeout=20) == "10", "no scope is left open in the worker"


def test_an_eager_celery_task_is_in_the_scope_of_its_sender(celery: Celery) -> None:
    """A Celery task that is run at once is in the scope of its sender."""
    celery.conf.task_always_eager = True
    with celery.worker.causal_scope():
        in_session(celery.worker, more)
        assert celery.tasks["look"].delay().get() == "11"
    with sessions(celery.worker)() as s:
        assert stock(s) == "10"
