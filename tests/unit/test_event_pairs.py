"""What the events of units and connections begin has one end, whatever breaks in between. For probes see test_probe_events."""

from __future__ import annotations

import contextlib
import gc
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import event
from sqlalchemy.exc import DBAPIError

from aurora_router import AmbiguousWriter, NoWriterAvailable, Router, RouterError
from aurora_router.core import events
from aurora_router.router import core_of
from tests.integration.shop import eventually
from tests.stories import READ, STOCK, WRITE, run, sessions, write

URL = "postgresql+fakepg://app@db-1/shop"
READER = "db-2:5432"


class Raising:
    """A listener that raises once, in the thread of the test, when it gets an event of a kind."""

    def __init__(self, kind, error):
        self.kind, self.error = kind, error
        self.has_raised = False
        self._thread = threading.current_thread()

    def __call__(self, event):
        if isinstance(event, self.kind) and not self.has_raised and threading.current_thread() is self._thread:
            self.has_raised = True
            raise self.error


def write_and_fail(session):
    session.execute(WRITE)
    raise LookupError


def tell_all(router, cluster):
    """Let all pairs of a unit happen. What raises is tried again, because a listener may raise anywhere, but once."""
    S = sessions(router)

    def move():
        with S() as s:
            s.scalar(READ)
            write(s)

    def run_again():
        cluster.lose("UPDATE", answer=False)
        run(router)

    def leave():
        for attempt in router.attempts(S):
            with attempt as s:
                s.execute(WRITE)
            break

    def find_no_writer():
        cluster.kill(cluster.writer)
        eventually(lambda: router.topology.writer is None)
        move()

    for each in (move, run_again, lambda: router.run_transaction(S, write_and_fail), leave, find_no_writer):
        for _ in range(2):
            with contextlib.suppress(KeyboardInterrupt, LookupError, DBAPIError, NoWriterAvailable):
                each()


IN_THREADS_OF_UNITS = [
    *(events.CheckoutStarted, events.Routed, events.CheckoutFailed, events.ConnectionCheckedIn, events.Moved),
    *(events.WaitStarted, events.WaitEnded, events.WaitedForWriter, events.ConnectionCreated, events.ConnectionClosed),
    *(events.AttemptStarted, events.AttemptEnded, events.RunAgain),
]


@pytest.mark.filterwarnings("ignore:a loop over attempts")
@pytest.mark.parametrize("is_first", [True, False], ids=["first", "last"])
@pytest.mark.parametrize("kind", IN_THREADS_OF_UNITS, ids=lambda kind: kind.__name__)
def test_all_has_an_end_if_a_signal_comes_in_a_listener(cluster, pairs, kind, is_first):
    """The exception of a signal handler reaches the application. The other listeners get the event as well."""
    raising = Raising(kind, KeyboardInterrupt)
    listeners = [raising, pairs] if is_first else [pairs, raising]
    with Router(URL, instances=["db-2"], listeners=listeners, probe_interval=0.02, failover_timeout=0.05) as router:
        tell_all(router, cluster)
    assert raising.has_raised
    gc.collect()
    assert {*pairs.check()} == {"checkout", "stay", "wait", "attempt", "connection", "probe"}


@pytest.mark.filterwarnings("ignore:a loop over attempts")
def test_all_has_an_end_if_a_listener_always_fails(cluster, make_router, pairs):
    def fail(_):
        raise LookupError

    router = make_router(fail, failover_timeout=0.05)
    tell_all(router, cluster)
    router.close()
    assert {*pairs.check()} == {"checkout", "stay", "wait", "attempt", "connection", "probe"}


def test_units_that_outlive_their_router_have_an_end(make_router, pairs):
    """One is closed after the router, and one is garbage-collected."""
    router = make_router()
    S = sessions(router)
    reads, writes, lost = S(), S(), S()
    reads.scalar(READ)
    writes.execute(WRITE)
    lost.execute(WRITE)
    router.close()
    reads.close()
    writes.close()
    del lost
    gc.collect()
    done = pairs.check()
    assert (done["checkout"], done["stay"], done["connection"]) == (3, 3, 3)


def drop(connection):
    """Leave a connection to the garbage collector."""


@pytest.mark.parametrize("kind", ["connect", "raw_connection"])
@pytest.mark.parametrize("is_detached", [True, False], ids=["detached", "pooled"])
@pytest.mark.parametrize(
    "end", [lambda c: c.close(), drop, lambda c: c.invalidate(), lambda c: (c.invalidate(), c.close())], ids=range(4)
)
def test_a_connection_has_one_end(make_router, pairs, kind, is_detached, end):
    """It is closed, dropped or invalidated, in its pool or detached from it."""
    router = make_router()
    connection = getattr(router, kind)()
    if is_detached:
        connection.detach()
    end(connection)
    del connection
    gc.collect()
    router.close()
    done = pairs.check()
    assert (done["stay"], done["connection"]) == (1, 1)


def test_a_connection_that_replaces_a_lost_one_has_an_end(cluster, make_router, pairs):
    """SQLAlchemy connects anew for a Connection. The unit has had its connection until that was lost."""
    router = make_router()
    with router.connect() as connection:
        connection.scalar(READ)
        cluster.drop_connections(cluster.writer)
        with pytest.raises(DBAPIError):
            connection.scalar(READ)
        connection.rollback()
        assert connection.scalar(READ) == STOCK
    router.close()
    done = pairs.check()
    assert (done["stay"], done["connection"]) == (1, 2)


def test_a_connection_that_a_listener_refuses_has_an_end(make_router, pairs):
    """A listener of the application to new connections raises."""
    router = make_router()

    def refuse(*_):
        raise LookupError

    event.listen(router.engine(router.topology.writer), "connect", refuse)
    with sessions(router)() as s, pytest.raises(LookupError):
        s.execute(WRITE)
    gc.collect()
    router.close()
    done = pairs.check()
    assert (done["checkout"], done["connection"]) == (1, 1)


@pytest.mark.parametrize("options", [{}, {"reader_options": {"pool_size": 3}}], ids=["one engine", "an engine for readers"])
def test_a_stream_that_its_unit_leaves_behind_has_an_end(cluster, make_router, pairs, options):
    """The reader is promoted in place, so the unit goes on at the same instance, with the same connection or another one."""
    router = make_router(failover_timeout=30.0, **options)
    with sessions(router)() as s:
        s.execute(READ, execution_options={"stream_results": True})
        cluster.promote(cluster.readers[0])
        eventually(lambda: router.topology.writer is not None and router.topology.writer.id == READER)
        write(s)
    router.close()
    assert pairs.check()["stay"] == 2


def test_units_of_several_threads_have_their_attempts(make_router, pairs):
    """The threads run the attempts of their transactions at the same time, each twice."""
    threads = {}

    def note_thread(event):
        if isinstance(event, events.AttemptStarted):
            threads.setdefault(event.transaction, set()).add(threading.get_ident())
        elif getattr(event, "unit", None) is not None:
            assert threads[event.transaction] == {threading.get_ident()}
            noted.append(event)

    noted = []
    router = make_router(note_thread)
    both = threading.Barrier(2)

    def transact():
        for attempt in router.attempts(sessions(router)):
            with attempt as s:
                both.wait(60)
                s.execute(WRITE)
                if attempt.number == 1:
                    raise AmbiguousWriter(("db-1:5432", READER))

    with ThreadPoolExecutor(2) as pool:
        for ran in [pool.submit(transact) for _ in range(2)]:
            ran.result(60)
    router.close()
    assert pairs.check()["attempt"] == 4
    assert len(threads) == 2
    assert len(noted) == len([each for each in pairs.heard if getattr(each, "unit", None) is not None])


def test_an_attempt_that_cannot_be_closed_has_an_end(make_router, pairs):
    """A signal comes when the session of a failed attempt returns its connection."""
    router = make_router(Raising(events.ConnectionCheckedIn, KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        router.run_transaction(sessions(router), write_and_fail)
    router.close()
    assert [each.error for each in pairs.heard if isinstance(each, events.AttemptEnded)] == ["LookupError"]
    pairs.check()


def test_an_attempt_says_what_has_ended_its_commit(make_router, pairs):
    """Also if that is the exception of a signal handler."""
    router = make_router()
    S = sessions(router)

    def interrupt(_):
        raise KeyboardInterrupt

    event.listen(S, "before_commit", interrupt)
    with pytest.raises(KeyboardInterrupt):
        router.run_transaction(S, lambda s: s.execute(WRITE) and None)
    assert [each.error for each in pairs.heard if isinstance(each, events.AttemptEnded)] == ["KeyboardInterrupt"]
    router.close()
    pairs.check()


# -- waits ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["writer", "slot"])
def test_a_wait_that_the_close_of_its_router_ends_has_an_end(cluster, make_router, pairs, what):
    router = make_router(failover_timeout=60.0, engine_options={"pool_size": 2, "max_overflow": 0})
    cluster.kill(cluster.writer if what == "writer" else cluster.readers[0])
    eventually(
        lambda: len(router.topology.readers) == (what == "writer") and (router.topology.writer is None) == (what == "writer")
    )
    S = sessions(router)

    def need_it():
        with S() as s, pytest.raises(RouterError, match="closed"):
            s.execute(WRITE if what == "writer" else READ)

    with ThreadPoolExecutor(1) as threads, S() as other:
        other.scalar(READ)
        waiting = threads.submit(need_it)
        eventually(lambda: events.WaitStarted(what) in pairs.heard)
        router.close()
        waiting.result(60)
    assert pairs.check()["wait"] == 1


def test_a_wait_that_a_signal_ends_has_an_end(cluster, make_router, pairs):
    router = make_router()
    cluster.kill(cluster.writer)
    eventually(lambda: router.topology.writer is None)

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    core_of(router).monitor.wait_for = interrupt
    with sessions(router)() as s, pytest.raises(KeyboardInterrupt):
        s.execute(WRITE)
    router.close()
    done = pairs.check()
    assert (done["wait"], done["checkout"]) == (1, 1)
