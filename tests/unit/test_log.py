"""The log reports a cluster's troubles and stays short, with a clock of the test's own."""

import ast
import logging
import threading
import time
from pathlib import Path

import pytest

import aurora_router
from aurora_router import Router
from aurora_router.cluster import topology_changes
from aurora_router.core import events
from aurora_router.core.instance import Observation
from aurora_router.core.pacing import Rate, Steady
from aurora_router.core.topology import Topology
from aurora_router.router import core_of
from aurora_router.telemetry.listeners import EventDispatcher
from aurora_router.telemetry.log import AGAIN, Log
from tests.fakes.cluster import FakeCluster
from tests.fakes.driver import installed
from tests.integration.shop import eventually
from tests.unit.topologies import ABC, MISCONFIGURED, REFUSED, after, reader, said, silent, writer


class Told:
    """A log with a clock that is set by hand, and the lines that it has written."""

    def __init__(self, caplog):
        caplog.set_level(logging.DEBUG, logger="aurora_router")
        self.now = 1000.0
        self.log = Log(lambda: self.now)
        self.log.started(Topology())
        self._caplog = caplog

    def hear(self, *heard):
        for event in heard:
            self.log(event)

    @property
    def lines(self):
        found = [(record.levelname, record.getMessage()) for record in self._caplog.records]
        self._caplog.clear()
        return found


@pytest.fixture
def told(caplog):
    return Told(caplog)


DOWN, UP = events.InstanceDown("db-2:5432", "Connection refused"), events.InstanceUp("db-2:5432", "reader")
IS_DOWN, IS_UP = ("WARNING", "db-2:5432 is not used: Connection refused"), ("INFO", "db-2:5432 is used as a reader")


def test_an_instance_that_is_lost_and_back_is_told_at_once(told):
    """A loss is a WARNING with its reason, and the return is an INFO."""
    told.hear(DOWN)
    assert told.lines == [IS_DOWN]
    told.now += 1.2
    told.hear(UP)
    assert told.lines == [IS_UP]


def test_an_instance_that_flaps_is_told_of_at_a_bounded_rate(told):
    """A thousand changes in five minutes make some sixteen lines, and the last line is true."""
    lines = []
    for _ in range(500):
        told.now += 0.3
        told.hear(DOWN)
        lines += told.lines
        told.now += 0.3
        told.hear(UP)
        told.log.tick()
        lines += told.lines
    told.hear(DOWN)
    assert 5 <= len(lines) <= Steady.AT_ONCE + 300 / Steady.APART + 1
    told.now += Steady.APART
    told.log.tick()
    assert (lines + told.lines)[-1] == IS_DOWN
    told.now += 1000.0
    told.log.tick()
    assert told.lines == [], "it was told"


def test_a_flap_that_ends_where_it_began_is_not_told_later(told):
    """A flap that ends in the state of the last line adds no line."""
    for _ in range(Steady.AT_ONCE):
        told.hear(DOWN, UP)
    assert len(told.lines) == Steady.AT_ONCE
    told.now += 1000.0
    told.log.tick()
    assert told.lines == []


def test_each_instance_has_a_rate_of_its_own(told):
    """An instance that flaps does not hide another that is lost."""
    told.hear(*[DOWN, UP] * 100)
    assert len(told.lines) == Steady.AT_ONCE
    told.hear(events.InstanceDown("db-3:5432", "no answer within 1 s"))
    assert told.lines == [("WARNING", "db-3:5432 is not used: no answer within 1 s")]


def test_the_loss_of_the_writer_is_a_warning_a_new_one_is_none(told):
    """The loss of the writer is a WARNING, and a new writer is an INFO."""
    told.hear(events.WriterChanged("db-1:5432", None, 3), events.WriterChanged(None, "db-2:5432", 4))
    assert told.lines == [
        ("WARNING", "there is no writer (it was db-1:5432): units that need one wait"),
        ("INFO", "the writer is db-2:5432 (was db-1:5432), epoch 4"),
    ]


def test_the_writer_that_was_is_named(told):
    """The line on a new writer names the former writer and never None, even after a time without a writer."""
    told.hear(events.WriterChanged(None, "db-1:5432", 3))
    told.hear(events.WriterChanged("db-1:5432", None, 3), events.WriterChanged(None, "db-1:5432", 3))
    told.hear(events.WriterChanged("db-1:5432", "db-2:5432", 4))
    assert [line for level, line in told.lines if level == "INFO"] == [
        "the writer is db-1:5432, epoch 3",
        "the writer is db-1:5432 again, epoch 3",
        "the writer is db-2:5432 (was db-1:5432), epoch 4",
    ]


@pytest.mark.parametrize("outages", range(1, 9))
def test_the_end_of_a_trouble_that_was_told_is_told_at_once(told, outages):
    """The last line on a trouble that is over is never a WARNING, however many troubles there were before."""
    told.hear(events.WriterChanged(None, "db-0:5432", 0))
    for number in range(outages):
        told.now += 1.0
        told.hear(events.WriterChanged(f"db-{number}:5432", None, number))
        told.now += 1.0
        told.hear(events.WriterChanged(None, f"db-{number + 1}:5432", number + 1))
        told.hear(DOWN, UP)
    last = {}
    for level, line in told.lines:
        last["db-2" if line.startswith("db-2") else "writer"] = level
    assert last == {"db-2": "INFO", "writer": "INFO"}


def test_a_trouble_that_lasts_is_told_after_a_flood(told):
    """Too many changes delay a line, and a trouble that lasts until then is reported."""
    told.hear(*[DOWN, UP] * 10, DOWN)
    assert told.lines[-1] == IS_UP
    told.now += Steady.APART / 2
    told.log.tick()
    assert told.lines == []
    told.now += Steady.APART / 2
    told.log.tick()
    assert told.lines == [IS_DOWN]
    told.hear(UP)
    assert told.lines == [IS_UP]


SAID = ("db-1:5432: Connection refused", "db-2:5432: reader at 1/20")


@pytest.mark.parametrize(
    ("event", "text"),
    [
        (events.WaitingForWriter(7, SAID), "units that wait for a writer: 7; db-1:5432: Connection refused; db-2"),
        (
            events.NoReaderQualifies("db-1:5432", 12, SAID),
            "no reader qualifies, so db-1:5432 serves the reads (12 since the last report): db-1",
        ),
        (events.ConnectFailed("db-1:5432", "refused"), "a new connection to db-1:5432 could not be made: refused"),
        (events.ConnectionRefused("db-1:5432", "another"), "a new connection to db-1:5432 was discarded: another"),
        (events.RetriesRefused(None, 4), "the retry budget is spent: 4 retries were refused, the last one at run_transaction"),
        (events.RetriesRefused("db-1:5432", 4), "the retry budget is spent: 4 retries were refused, the last one at db-1:5432"),
    ],
)
def test_what_happens_again_and_again_is_told_now_and_then(told, event, text):
    """A frequent event is reported at once, and then at most once in some seconds, with the number of times."""
    told.hear(event)
    ((level, line),) = told.lines
    assert level == "WARNING"
    assert line.startswith(text)
    told.hear(*[event] * 100)
    assert told.lines == []
    told.now += AGAIN
    told.log.tick()
    assert told.lines == [], "it is not so any more, as far as is known"
    told.hear(event)
    ((_, line),) = told.lines
    assert line.endswith("(100 more like this since the last such line)")


def test_an_instance_that_was_never_usable_is_told_once(caplog):
    """An instance that was never usable is reported once, with the reason, but not before the router has started."""
    caplog.set_level(logging.DEBUG, logger="aurora_router")
    log = Log(lambda: 0.0)
    log(events.InstanceDown("c", "refused"))
    assert caplog.records == []
    log.started(after(ABC, silent("c", 1, None, MISCONFIGURED)))
    log(events.InstanceDown("c", "misconfigured at 1"))
    assert [record.getMessage() for record in caplog.records] == ["c is not used: misconfigured at 1"]


class NoPools:
    """The pools of a router that has no connections."""

    def evict(self, instance, *, shut_down_before=None):
        return 0


def test_another_reason_that_somebody_must_mend_is_told(told):
    """An instance that is down, then refuses the password, then no longer replays, gives a line for each. Silence gives none."""
    found = after(ABC, silent("b", 1, None, REFUSED))
    told.log.started(found)
    assert told.lines == [("WARNING", "b is not used: refused at 1")]

    def then(*seen):
        nonlocal found
        for each in seen:
            old, found = found, after(found, each)
            for tell in topology_changes.apply(NoPools(), told.hear, old, found, 0.0):
                tell()
        return [line for _, line in told.lines]

    assert then(silent("b", 2, None, REFUSED)) == []
    wrong = Observation("b", 3, 3, probe_failure=MISCONFIGURED, error="wrong password")
    assert then(wrong, wrong._replace(asked_at=4)) == ["b is not used: wrong password"]
    assert then(wrong._replace(asked_at=5, error="no such database")) == ["b is not used: no such database"]
    assert then(silent("b", 6, None, REFUSED)) == [], "waiting may help"
    broken = reader("B")._replace(replication_error="error 1")
    stopped = "b is not used: not used, because it no longer replays: error 1"
    assert then(said("b", 7, broken), said("b", 8, broken._replace(replication_error="error 2"))) == [stopped]
    assert then(said("b", 9, reader("B"))) == ["b is used as a reader"]


def test_a_forked_child_says_again_what_it_finds(told):
    """A forked child reports a loss again, because it has written no line yet."""
    told.hear(DOWN)
    told.log.forked()
    told.hear(DOWN)
    assert told.lines == [IS_DOWN, IS_DOWN]


def test_no_event_is_made_if_nobody_listens():
    """An event that the log does not want is made only after a look at `listeners`."""
    unguarded = []
    for path in sorted(Path(aurora_router.__file__).parent.rglob("*.py")):
        tree = ast.parse(path.read_text())
        guarded = {
            id(node)
            for test in ast.walk(tree)
            if isinstance(test, ast.If) and ast.unparse(test.test).endswith((".listeners", ".routed_at is not None"))
            for node in ast.walk(test)
        }
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call) or id(node) in guarded:
                continue
            called = ast.unparse(node.func)
            assert not called.startswith("self._events."), "these make events that the log does not want"
            if called.endswith("dispatcher.publish"):
                unguarded.append(ast.unparse(node.args[0].func).removeprefix("events."))
    assert {getattr(events, name) for name in unguarded} <= Log.KINDS
    assert unguarded, "they were looked for in the right place"


def test_the_log_hears_as_well_as_the_users_listeners(told):
    """The log's kinds of events reach the log and the listeners, others only the listeners, even if a listener raises."""
    heard = []

    def fails(event):
        raise ValueError

    dispatcher = EventDispatcher((fails, heard.append), told.log)
    dispatcher.publish(events.InstanceDown("db-2:5432", "Connection refused"))
    dispatcher.publish(events.Learned("db-2:5432", "0A000"))
    assert heard == [DOWN, events.Learned("db-2:5432", "0A000")]
    assert told.lines == [IS_DOWN, ("ERROR", "a listener failed on InstanceDown"), ("ERROR", "a listener failed on Learned")]


def test_a_listener_that_always_fails_is_told_now_and_then(told, caplog):
    """Each failing listener is reported with its traceback, then once in some seconds, for each kind of event."""

    def fails(event):
        raise SystemExit

    def fails_too(event):
        raise ValueError

    dispatcher = EventDispatcher((fails, fails_too), told.log)
    dispatcher.publish_from_own_thread(events.Learned("db-2:5432", "0A000"))
    assert [record.exc_info[0] for record in caplog.records] == [SystemExit, ValueError]
    assert told.lines == [("ERROR", "a listener failed on Learned")] * 2
    for _ in range(100):
        dispatcher.publish_from_own_thread(events.Learned("db-2:5432", "0A000"))
    assert told.lines == []
    dispatcher.publish_from_own_thread(events.Repeated("db-2:5432", "OperationalError"))
    assert told.lines == [("ERROR", "a listener failed on Repeated")] * 2
    told.now += AGAIN
    dispatcher.publish_from_own_thread(events.Learned("db-2:5432", "0A000"))
    assert told.lines == [("ERROR", "a listener failed on Learned (100 more like this since the last such line)")] * 2


def test_a_log_that_cannot_be_written_harms_nobody(told):
    """A log that cannot be written fails neither an event, nor the start of the router, nor a unit that finds a pooler."""

    class Broken(logging.Handler):
        def emit(self, record):
            raise OSError

    def fails(event):
        raise ValueError

    broken = Broken()
    logging.getLogger("aurora_router").addHandler(broken)
    try:
        EventDispatcher((fails,), told.log).publish(events.Learned("db-2:5432", "0A000"))
        told.log.started(after(ABC, silent("c", 1, None, MISCONFIGURED)))
        router = Router("postgresql+psycopg://app@db-1/shop")
        pool = core_of(router).engines.pool(core_of(router).monitor.topology.instances[0])
        pool.note_connected(core_of(router).engines.stand_in, is_shared=True)
    finally:
        logging.getLogger("aurora_router").removeHandler(broken)


def test_a_handler_of_logs_that_waits_holds_up_no_unit():
    """A handler that takes its time over the line about a new cluster does not keep the monitor's lock meanwhile."""
    held_up = []

    class Slow(logging.Handler):
        def emit(self, record):
            if "was replaced by" in record.getMessage():
                unit = threading.Thread(target=monitor.suspect, args=("db-1:5432",), daemon=True)
                unit.start()
                unit.join(5)
                held_up.append(unit.is_alive())

    slow = Slow()
    logging.getLogger("aurora_router").addHandler(slow)
    given = {"accept_new_cluster": True, "probe_interval": 3600.0}
    try:
        with installed(FakeCluster(readers=0)), Router("postgresql+fakepg://app@db-1/shop", **given) as router:
            router.start()
            monitor, now = core_of(router).monitor, time.monotonic()
            monitor.apply_news((Observation("db-1:5432", now, now, writer("A", cluster="9009")),))
            eventually(lambda: held_up)
    finally:
        logging.getLogger("aurora_router").removeHandler(slow)
    assert held_up == [False]


def test_a_rate_lets_through_once_in_a_while_and_counts():
    """A rate lets the first call pass, and counts the calls that come too soon for the next one that passes."""
    rate = Rate(10.0)
    assert [rate.passes(now) for now in (0.0, 1.0, 9.9, 10.0, 10.1, 100.0)] == [1, 0, 0, 3, 0, 2]
