"""A pytest plugin beside SQLAlchemy's own. It puts RoutingSession in place of Session, and keeps the outcomes.

The environment variable OUTCOMES names the file for the outcomes. READERS lists the readers' addresses. Without READERS the tests
run as they are.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

OUTCOMES = "AURORA_ROUTER_OUTCOMES"
READERS = "AURORA_ROUTER_READERS"
_DATABASE = re.compile(r"_postgresql\+\w+?_\d+_\d+(?=::|$)")  # SQLAlchemy adds it to the name of a test's class

_outcomes: dict[str, str] = {}
_at_the_end = contextlib.ExitStack()


@pytest.hookimpl(tryfirst=True)
def pytest_sessionstart() -> None:
    """Require no extensions of PostgreSQL. The ORM's tests do not need them, and they may be missing."""
    from sqlalchemy.dialects.postgresql import provision

    provision._extensions.clear()


@pytest.hookimpl(tryfirst=True)
def pytest_collection() -> None:
    """Route the sessions now: SQLAlchemy's plugin has set up its database, and no test module has been imported yet."""
    if READERS in os.environ:
        _route(os.environ[READERS].split())


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    name = _DATABASE.sub("", report.nodeid)
    if report.failed:
        _outcomes[name] = "failed"
    elif report.skipped or report.when == "call":
        _outcomes.setdefault(name, report.outcome)


def pytest_sessionfinish() -> None:
    _at_the_end.close()
    Path(os.environ[OUTCOMES]).write_text(json.dumps(_outcomes))


def _route(readers: list[str]) -> None:
    from sqlalchemy import event
    from sqlalchemy.engine import Connection
    from sqlalchemy.testing import assertsql, config, fixtures
    from sqlalchemy.testing.fixtures import orm

    ours: list[tuple[Any, ...]] = []
    listen = event.listen

    def remembered(target: Any, name: str, listener: Any, **how: Any) -> None:
        ours.append((target, name, listener, how))
        listen(target, name, listener, **how)

    event.listen = remembered
    try:
        from aurora_router import Router, RoutingSession
    finally:
        event.listen = listen

    # The probe timeout is long, because a busy machine is no failure. A test during which the writer or the reader counts as lost
    # says nothing about sessions.
    router = Router(config.db.url, instances=readers, probe_timeout=15.0)
    _at_the_end.callback(router.close)
    plain = orm.fixture_session

    def fixture_session(**options: Any) -> Any:
        bind = options.pop("bind", config.db)
        if bind is not config.db and not isinstance(bind, Connection):
            return plain(bind=bind, **options)
        for target, name, listener, how in ours:  # some tests remove all listeners
            if not event.contains(target, name, listener):
                event.listen(target, name, listener, **how)
        made = RoutingSession(router=router, bind=None if bind is config.db else bind, **options)
        orm._fixture_sessions.add(made)
        return made

    one_engine = assertsql.assert_engine

    @contextlib.contextmanager
    def assert_engine(engine: Any) -> Iterator[Any]:
        """Count the statements of all instances if a test counts those of the database."""
        with one_engine(engine) as asserter, contextlib.ExitStack() as stack:
            if engine is config.db:
                others = [stack.enter_context(one_engine(router.engine(instance))) for instance in router.topology]
                for other in others:
                    other.accumulated = asserter.accumulated
            yield asserter

    orm.fixture_session = fixtures.fixture_session = fixture_session
    assertsql.assert_engine = assert_engine
