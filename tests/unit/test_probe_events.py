"""Each probe that is told of has one start and one end, whatever becomes of its servers, its thread and its instance."""

from __future__ import annotations

import threading

import pytest

from aurora_router import Router
from aurora_router.cluster import monitor as monitors
from aurora_router.cluster.probe import ProbeError
from aurora_router.cluster.probe_events import ProbeEvents
from aurora_router.cluster.watcher import Watcher
from aurora_router.core import events
from aurora_router.core.instance import Instance
from aurora_router.router import core_of
from tests.integration.shop import eventually
from tests.unit.topologies import reader

READER = "db-2:5432"


class Hanging:
    """The connects of a monitor's probes. They begin to hang.

    begun: set when one of them hangs.
    cuts: how often one was to end.
    """

    def __init__(self, monitor, *, can_be_cut):
        self.begun = threading.Event()
        self.over = threading.Event()
        self.cuts = 0
        self._can_be_cut = can_be_cut
        monitor.connect, monitor.abort_connect = self._connect, self._cut

    def _cut(self, _):
        self.cuts += 1
        if self._can_be_cut:
            self.over.set()

    def _connect(self, _):
        self.begun.set()
        assert self.over.wait(60)
        raise ProbeError("it was cut")


def ends_of_probes(pairs, kind=events.ProbeFailed):
    return [event for event in pairs.heard if isinstance(event, kind) and event.instance == READER]


@pytest.mark.parametrize("end", [Router.close, lambda router: router.remove_instance(READER)], ids=["closed", "removed"])
def test_a_probe_that_nobody_waits_for_has_an_end(cluster, make_router, pairs, end):
    """The router is closed, or stops to use the instance, while a probe connects to it."""
    router = make_router(probe_timeout=60.0)
    hanging = Hanging(core_of(router).monitor, can_be_cut=True)
    cluster.drop_connections(cluster.servers["db-2"])
    assert hanging.begun.wait(60)
    end(router)
    router.close()
    assert [event.error for event in ends_of_probes(pairs)] == ["the instance is not watched any more"]
    pairs.check()


def test_a_probe_whose_thread_hangs_has_one_end(cluster, make_router, pairs):
    """The thread cannot be cut. If too many of them hang, no other one probes, and no probe is told of."""
    router = make_router(probe_timeout=0.02)
    hanging = Hanging(core_of(router).monitor, can_be_cut=False)
    cluster.drop_connections(cluster.servers["db-2"])
    eventually(lambda: hanging.cuts > 12)
    told = len(ends_of_probes(pairs))
    hanging.over.set()
    router.close()
    assert told < 10
    assert {event.error for event in ends_of_probes(pairs)} >= {"no answer within 0.02 s"}
    pairs.check()


def test_a_probe_that_raises_has_an_end(cluster, make_router, pairs):
    router = make_router()

    def connect(_):
        raise LookupError

    core_of(router).monitor.connect = connect
    cluster.drop_connections(cluster.servers["db-2"])
    eventually(lambda: len(ends_of_probes(pairs)) > 2)
    router.close()
    assert {event.error for event in ends_of_probes(pairs)} == {"unexpected error in the probe: LookupError"}
    pairs.check()


def test_a_probe_without_a_place_has_an_end(cluster, make_router, pairs):
    """The server lives, but has no room for one more connection. That is no news of the server."""
    router = make_router()
    server = cluster.servers["db-2"]
    server.is_full = True
    cluster.drop_connections(server)
    eventually(lambda: ends_of_probes(pairs))
    router.close()
    assert "53300" in ends_of_probes(pairs)[0].error
    pairs.check()


def test_a_probe_is_told_at_both_ends_or_at_none(cluster, make_router, pairs, monkeypatch):
    """A listener is so slow that there is no room for all probes."""
    monkeypatch.setattr(monitors, "MAX_PENDING_NEWS", 4)
    begun, over = threading.Event(), threading.Event()

    def slow(event):
        if isinstance(event, events.ProbeSucceeded):
            begun.set()
            assert over.wait(60)

    router = make_router(slow)
    assert begun.wait(60)
    before = len(cluster.writer.heard)
    eventually(lambda: len(cluster.writer.heard) > before + 10)
    assert len([event for event in pairs.heard if isinstance(event, events.ProbeStarted)]) < 10
    over.set()
    router.close()
    pairs.check()


class Owner:
    """The owner of a watcher whose name leads to several servers."""

    def __init__(self, *answers):
        self.answers = [*answers]
        self.news = []
        self.ended = threading.Event()

    def connect(self, _):
        answer = self.answers.pop(0)
        if isinstance(answer, ProbeError):
            raise answer
        return Link(answer)

    def abort_connect(self, _):
        """Nothing hangs."""

    def apply_news(self, news):
        self.news.extend(news)

    def is_recheck_due(self, *_):
        return True

    def side_tasks(self, *_):
        return ()

    def on_probe_end(self):
        self.ended.set()


class Link:
    """A connection to one server, which answers once and is lost then."""

    def __init__(self, answer):
        self.answers = [answer]

    def ask(self):
        if not self.answers:
            raise ProbeError("it is lost")
        return self.answers.pop()

    def shut_down(self):
        """Nothing hangs."""

    close = shut_down


def test_a_probe_of_several_servers_has_one_end(pairs):
    """It succeeds if one of the servers answers, and fails if none does."""
    gone = ProbeError("nobody is there")
    owner = Owner(reader("B"), reader("C"), gone, reader("D"), gone, gone, gone, gone)
    watcher = Watcher(owner, Instance("readers", "readers", 5432, reader_only=True))
    for probe in range(3):
        watcher.begin(float(probe), ProbeEvents("readers", pairs))
        assert owner.ended.wait(60)
        owner.ended.clear()
    watcher.stop()
    watcher.thread.join()
    assert [type(event).__name__ for event in pairs.heard if event.instance == "readers"] == [
        *("ProbeStarted", "ProbeSucceeded") * 2,
        *("ProbeStarted", "ProbeFailed"),
    ]
    assert pairs.check()["probe"] == 3
    assert len(owner.news) > 3, "each server was told of to the topology"
