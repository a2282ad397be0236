"""A statement that exceeds PyMySQL's read timeout is sent once, and a COMMIT that does so is resolved."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
from sqlalchemy import exc, select, text

from aurora_router import Router, RoutingSession, classify_error
from aurora_router.core import events
from aurora_router.core.failures import Facts, Failure
from tests.integration.mysql_family import Family
from tests.integration.shop import (
    Item,
    connection_id,
    eventually,
    instance_id,
    no_connection_is_left,
    raise_stock,
    sessions,
    stock,
    until_readers_serve,
)

pytestmark = pytest.mark.engines("mariadb", "mysql")

MakeRouter = Callable[..., Router]
STOCK = select(Item.stock).where(Item.id == 1)


@pytest.fixture
def impatient(cluster: Family, make_router: MakeRouter, heard: list[events.Event]) -> Router:
    """A router whose driver waits one second for an answer."""
    router = make_router(
        f"{cluster.url}?read_timeout=1", instances=[r.address for r in cluster.readers], listeners=[heard.append]
    )
    until_readers_serve(router, 2)
    return router


def running(cluster: Family) -> list[str]:
    """The servers of the sleeping statements, one address for each."""
    sleeping = "SELECT count(*) FROM information_schema.processlist WHERE user = 'app' AND info LIKE '%%SLEEP(2)%%'"
    return [i.address for i in cluster.instances for _ in range(cluster.execute(sleeping, instance=i)[0][0])]


def test_a_read_that_exceeds_the_read_timeout_is_sent_once(cluster: Family, impatient: Router, heard: list[events.Event]) -> None:
    """A read that takes longer than the driver waits is sent once."""
    with sessions(impatient)() as s:
        with pytest.raises(exc.OperationalError, match="timed out") as caught:
            s.execute(text("SELECT SLEEP(2)"))
        assert running(cluster) == [instance_id(s)]
        known = Facts(Failure.TIMED_OUT, sent=True, outcome_known=True, safe_to_repeat=False)
        assert classify_error(caught.value) == known
        s.rollback()
        assert s.scalar(STOCK) == 10
    assert not any(isinstance(e, events.Repeated | events.InstanceDown) for e in heard)
    assert no_connection_is_left(impatient)


def test_a_unit_that_exceeds_the_read_timeout_is_run_once(cluster: Family, impatient: Router) -> None:
    """A unit that takes longer than the driver waits is run once."""
    impatient.init_commit_table()
    with impatient.connect() as one, impatient.connect() as other:
        pooled = {connection_id(one), connection_id(other)}
    runs: list[int] = []

    def dawdles(s: RoutingSession) -> None:
        runs.append(1)
        s.execute(text("UPDATE item SET stock = stock + 1 + SLEEP(2) WHERE id = 1"))

    with pytest.raises(exc.OperationalError, match="timed out"):
        impatient.run_transaction(sessions(impatient), dawdles)
    assert runs == [1]
    assert running(cluster) == [cluster.writer.address]
    with impatient.connect() as connection:
        assert connection_id(connection) in pooled, "only that one of the pool is lost"
    eventually(lambda: not running(cluster))
    assert stock(cluster) == 10
    assert impatient.run_transaction(sessions(impatient), raise_stock) == 11


def test_a_read_on_a_frozen_reader_is_repeated_when_it_is_lost(
    cluster: Family, impatient: Router, heard: list[events.Event]
) -> None:
    """A read that waits for a frozen reader is retried when the reader is found to be lost."""
    with sessions(impatient)() as s:
        s.get(Item, 1)
        first = instance_id(s)
        reader = next(i for i in cluster.instances if i.address == first)
        cluster.freeze(reader)
        assert s.scalar(STOCK) == 10
        assert instance_id(s) != first
        cluster.thaw(reader)
    assert [e.instance for e in heard if isinstance(e, events.Repeated)] == [first]


@pytest.mark.engines("mariadb")  # Only MariaDB can hold up COMMIT and nothing else.
def test_a_commit_that_exceeds_the_read_timeout_is_resolved(
    cluster: Family, impatient: Router, heard: list[events.Event]
) -> None:
    """The outcome of a COMMIT that takes longer than the driver waits is resolved."""
    impatient.init_commit_table()
    found: list[int] = []
    thread = threading.Thread(target=lambda: found.append(impatient.run_transaction(sessions(impatient), raise_stock)))
    with cluster.writer.connect() as blocker, blocker.cursor() as cursor:
        for stage in ("START", "BLOCK_COMMIT"):
            cursor.execute(f"BACKUP STAGE {stage}")
        thread.start()
        asks = "SELECT count(*) FROM information_schema.processlist WHERE info LIKE 'INSERT IGNORE%%'"
        eventually(lambda: cluster.execute(asks) != [(0,)])
        cursor.execute("BACKUP STAGE END")
    thread.join(20)
    assert found == [11]
    assert stock(cluster) == 11
    assert [e.outcome for e in heard if isinstance(e, events.CommitResolved)] != ["cannot be known"]
