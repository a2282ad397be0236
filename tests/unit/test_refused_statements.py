"""What a unit does when a server refuses its statement or loses its connection, on fakes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import event, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import sessionmaker

from aurora_router import Failure, ReadOnlyViolation, Router, RoutingSession, classify_error
from aurora_router.core import events
from tests.fakes.cluster import READ, STOCK, FakeCluster
from tests.fakes.driver import installed

DEADLOCK, NOT_ON_A_STANDBY, NO_SUCH_TABLE, UNIQUE = "40P01", "25006", "42P01", "23505"


@pytest.fixture
def cluster() -> Iterator[FakeCluster]:
    cluster = FakeCluster(readers=2)
    with installed(cluster):
        yield cluster


@pytest.fixture
def heard() -> list[events.Event]:
    return []


@pytest.fixture
def router(cluster: FakeCluster, heard: list[events.Event]) -> Iterator[Router]:
    url = "postgresql+fakepg://app@db-1/shop"
    with Router(url, instances=["db-2", "db-3"], listeners=[heard.append]) as router:
        router.start()
        yield router


def read(router: Router, **options: Any) -> int | None:
    with sessionmaker(class_=RoutingSession, router=router, **options)() as s:
        return s.scalar(text(READ))


def names(heard: list[events.Event]) -> list[str]:
    """The events that tell what a unit did after a failure."""
    kinds = (events.Moved, events.Repeated, events.Learned, events.RunAgain)
    return [type(event).__name__ for event in heard if isinstance(event, kinds)]


@pytest.mark.parametrize(
    ("code", "done"),
    [
        (NOT_ON_A_STANDBY, ["Learned", "Moved"]),
        (NO_SUCH_TABLE, ["Moved", "Repeated"]),  # the reader may not have the migration yet
    ],
)
def test_what_readers_refuse_is_read_on_the_writer(cluster, router, heard, code, done):
    """An automatic unit reads on the writer what its reader refuses. Only what no reader can do is remembered."""
    for reader in cluster.readers:
        reader.refuses = code
    assert read(router) == STOCK
    assert sorted(names(heard)) == done
    asked = sum(reader.heard.count(READ) for reader in cluster.readers)
    assert read(router) == STOCK
    asked_again = sum(reader.heard.count(READ) for reader in cluster.readers) > asked
    assert asked_again is ("Learned" not in done)


@pytest.mark.parametrize(
    ("code", "error"),
    [(NOT_ON_A_STANDBY, ReadOnlyViolation), (NO_SUCH_TABLE, DBAPIError), (UNIQUE, DBAPIError), (DEADLOCK, DBAPIError)],
)
def test_a_read_only_unit_gets_the_errors_of_its_reader(cluster, router, code, error):
    """A declared unit never moves, so it gets the reader's error."""
    for reader in cluster.readers:
        reader.refuses = code
    with pytest.raises(error):
        read(router, read_only=True)
    assert READ not in cluster.writer.heard


@pytest.mark.parametrize(("code", "runs"), [(DEADLOCK, 3), ("40001", 3), (UNIQUE, 1), (NO_SUCH_TABLE, 1)])
def test_a_unit_is_retried_for_what_may_not_come_again(cluster, router, heard, code, runs):
    """run_transaction runs a unit again after a deadlock or a conflict. It does not after an error that would come again."""
    count = 0

    def unit(session: RoutingSession) -> None:
        nonlocal count
        count += 1
        cluster.writer.refuses = code if count < 3 else None
        session.execute(text(READ), execution_options={"route": "writer"})

    sessions = sessionmaker(class_=RoutingSession, router=router)
    if runs == 1:
        with pytest.raises(DBAPIError):
            router.run_transaction(sessions, unit)
    else:
        router.run_transaction(sessions, unit)
    assert count == runs
    assert names(heard).count("RunAgain") == runs - 1


def test_a_read_whose_connection_is_lost_goes_to_another_reader(cluster, router, heard):
    """A reader that breaks off is avoided by the unit, and the other reader answers."""
    assert read(router) == STOCK
    lost = next(reader for reader in cluster.readers if READ in reader.heard)
    cluster.kill(lost)
    assert read(router) == STOCK
    assert READ not in cluster.writer.heard
    assert router.topology.writer is not None


def test_a_reader_without_room_is_passed_over(cluster, router):
    """A unit whose reader has no room goes to the other reader, and to the writer if that one has none either."""
    first, second = cluster.readers
    first.is_full = True
    for _ in range(4):
        assert read(router) == STOCK
    assert (READ in first.heard, READ in second.heard, READ in cluster.writer.heard) == (False, True, False)
    second.is_full = True
    cluster.drop_connections(second)
    assert read(router) == STOCK
    assert READ in cluster.writer.heard


def read_poison(router: Router, sessions: sessionmaker[RoutingSession]) -> None:
    with sessions() as s:
        s.execute(text("SELECT 1 AS POISON"))


def write_poison(router: Router, sessions: sessionmaker[RoutingSession]) -> None:
    router.run_transaction(sessions, lambda s: s.execute(text("UPDATE POISON SET a = 1")))


@pytest.mark.parametrize("note", [" /*traceparent='00-{:032x}-01'*/", " -- {}", ""])
@pytest.mark.parametrize("work", [read_poison, write_poison])
def test_a_poisonous_statement_is_known_by_its_words(cluster, router, note, work):
    """A tool that adds another comment to each call does not hide that the same statement has lost its connection twice."""
    numbers = itertools.count()
    cluster.poison = "POISON"

    def add_a_note(connection, cursor, statement, parameters, context, executemany):
        return statement + note.format(next(numbers)), parameters

    for instance in router.topology.instances:
        event.listen(router.engine(instance), "before_cursor_execute", add_a_note, retval=True)
    with pytest.raises(DBAPIError) as caught:
        work(router, sessionmaker(class_=RoutingSession, router=router))
    assert classify_error(caught.value).failure is Failure.ENDED
    assert sum("POISON" in heard for server in cluster.servers.values() for heard in server.heard) <= 3
