"""A signal handler raises between a statement and the end of its answer: no later statement gets that answer."""

from __future__ import annotations

import sys
from collections.abc import Callable
from itertools import count
from types import FrameType
from typing import Any

import psycopg
import pymysql
import pytest
from sqlalchemy import select, text
from sqlalchemy.exc import DBAPIError, StatementError

from aurora_router import Router
from aurora_router.local.cluster import Cluster
from tests.integration.shop import BOTH, RAISE, Item, eventually, no_connection_is_left, sessions, until_readers_serve
from tests.interruptions import SoftTimeLimitExceeded, interrupted_at_each_line

MakeRouter = Callable[..., Router]
NUMBERS = count(1)
"""Numbers for the questions: each answer fits one question only."""


def in_a_session(router: Router, read_only: bool | None) -> int:
    number = next(NUMBERS)
    with sessions(router, read_only=read_only)() as s:
        return int(s.execute(text("SELECT :number"), {"number": number}).scalar_one()) - number


def in_a_stream(router: Router) -> int:
    number = next(NUMBERS)
    with sessions(router)() as s:
        found = s.execute(text("SELECT :number"), {"number": number}, execution_options={"stream_results": True})
        return int(found.scalar_one()) - number


def on_an_engine(router: Router) -> int:
    number = next(NUMBERS)
    with router.engine(router.topology.readers[0]).connect() as connection:
        return int(connection.execute(text("SELECT :number"), {"number": number}).scalar_one()) - number


def on_the_drivers_own(router: Router) -> int:
    number = next(NUMBERS)
    raw = router.raw_connection(read_only=True)
    try:
        cursor = raw.cursor()
        cursor.execute("SELECT %s", (number,))
        return int(cursor.fetchall()[0][0]) - number
    finally:
        raw.close()


WAYS: dict[str, Callable[[Router], int]] = {
    "automatic": lambda router: in_a_session(router, None),
    "read-only": lambda router: in_a_session(router, True),
    "writer": lambda router: in_a_session(router, False),
    "stream": in_a_stream,
    "engine": on_an_engine,
    "driver": on_the_drivers_own,
}


@pytest.fixture
def only(cluster: Cluster[Any], make_router: MakeRouter) -> Router:
    """A router of one reader with one connection to each instance."""
    router = make_router(instances=[cluster.readers[0].address], engine_options={"pool_size": 1, "max_overflow": 0})
    until_readers_serve(router, 1)
    return router


@pytest.mark.engines("mariadb", "mysql")
@pytest.mark.parametrize("way", WAYS)
# PyMySQL's half-made results raise when they are deleted.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore:Previous unbuffered result:UserWarning")
def test_an_interrupted_read_answers_no_other(only: Router, way: str) -> None:
    """Wherever in the driver a read is interrupted, the next read of the same kind gets its own rows."""
    read = WAYS[way]
    for _ in range(2):
        assert read(only) == 0  # A first read runs code that later ones do not.

    def interrupted() -> None:
        try:
            read(only)
        except StatementError as error:  # SQLAlchemy wraps whatever the driver raises.
            if not isinstance(error.orig, SoftTimeLimitExceeded):
                raise

    for _ in interrupted_at_each_line(interrupted, "pymysql/connections.py", by=SoftTimeLimitExceeded):
        for _ in range(2):
            assert read(only) == 0
    assert no_connection_is_left(only)


@BOTH
# PyMySQL's half-made results raise when they are deleted.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interrupted_commit_harms_no_later_unit(cluster: Cluster[Any], only: Router) -> None:
    """Wherever a writing unit is interrupted, even in COMMIT, its transaction ends, and the next unit has its own."""

    def write() -> None:
        with sessions(only)() as s:
            s.execute(RAISE)
            s.commit()

    def interrupted() -> None:
        try:
            write()
        except StatementError as error:  # SQLAlchemy wraps whatever the driver raises.
            if not isinstance(error.orig, SoftTimeLimitExceeded):
                raise

    def is_free() -> bool:
        try:
            cluster.execute("SELECT * FROM item WHERE id = 1 FOR UPDATE NOWAIT")
        except (psycopg.Error, pymysql.Error):
            return False
        return True

    write()  # A first write runs code that later ones do not.
    files = (
        "psycopg/_connection_base.py",
        "drivers/psycopg_classes.py",
        "pymysql/connections.py",
        "interceptor.py",
        "commit_handler.py",
    )
    for _ in interrupted_at_each_line(interrupted, *files, by=SoftTimeLimitExceeded):
        eventually(is_free)
        write()
    assert no_connection_is_left(only)


def interrupt_after_sending(frame: FrameType, _what: str, _arg: object) -> None:
    """Raise as a signal handler would after the statement is sent and before its answer is read."""
    if frame.f_code.co_name == "_read_query_result":
        sys.settrace(None)
        raise SoftTimeLimitExceeded


@pytest.mark.engines("mariadb", "mysql")
def test_an_interrupted_write_keeps_no_lock(router: Router) -> None:
    """A rollback after an interrupted write ends the transaction at once, even before the connection is back in the pool."""
    with router.connect() as connection:
        connection.execute(text("SELECT 1"))
        before = sys.gettrace()
        sys.settrace(interrupt_after_sending)
        try:
            with pytest.raises(SoftTimeLimitExceeded):
                connection.execute(RAISE)
        finally:
            sys.settrace(before)
        connection.rollback()

        def is_free() -> bool:
            with sessions(router, read_only=False)() as s:
                try:
                    s.execute(select(Item).where(Item.id == 1).with_for_update(nowait=True))
                except DBAPIError:
                    return False
                return True

        eventually(is_free)
