"""Probe the instances, publish frozen topologies, and wake waiting threads. No other code talks to servers on its own account.

One thread keeps the time, and each instance has a thread that only probes it. So a server that hangs, or a name that does not
resolve, holds up no other instance. The time-keeper declares an overdue probe silent and cuts its connection, even while that is
being made. If the answer comes after all, it is dropped.
"""

from __future__ import annotations

import contextlib
import enum
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

from aurora_router.core import topology as pure
from aurora_router.core.pacing import Rate, more
from aurora_router.core.topology import Instance, Observation, Role, Server, ServerId, Silence, Topology
from aurora_router.settings import Settings

log = logging.getLogger("aurora_router")

HURRY = 0.02  # seconds between probes while something is suspect
# The part of probe_timeout after which a silent writer makes all instances be probed in a hurry.
LATE = 0.25
RENEW = 30.0  # seconds until a name is resolved and connected to afresh
SCOUT = 5.0  # RENEW of a reader endpoint: other servers may stand there
# RENEW of all instances while there is no writer, because the writer's name may lead to another server by now.
WRITERLESS = 0.5
# Seconds after which a server behind a reader endpoint is forgotten if no fresh connection has reached it.
FORGET = 60.0
CATALOG = 30.0  # seconds between looks at the functions in the catalog
PRUNE = 60.0  # seconds between looks for old rows of the commit table
CATALOG_HURRY = 1.0  # CATALOG after a call of an unknown function
# Seconds for which a probe of a reader may wait for a place in a pooler while units of this router have places there.
QUEUE = 10.0
# Fresh connections in a row if other servers may stand behind a reader endpoint.
LOOKS = 4
# Seconds (at least) without the time-keeper, after which earlier observations do not count.
TRUST = 5.0
# Threads of one instance that may hang (for example in name resolution). After that no more are started.
STUCK = 4
REPORT = 10.0  # seconds between two reports of the same unexpected exception
# Seconds between two warnings that the same thing could not be done on a probe's connection.
COMPLAIN = 60.0
# Topologies whose news may wait for a listener that does not return. Later news is left out.
UNTOLD = 1000
MAX_SERVERS = 16  # servers that are watched behind one reader endpoint


_NOBODY = ServerId("", None, None, "")


def _report(rate: Rate, message: str, *values: object) -> None:
    """Log the exception that is being handled, in a thread of this module, as often as the rate allows.

    Code of the application may have raised it: a listener, a log handler, a way to connect. Nothing that it raises may end the
    thread, SystemExit included.
    """
    came = rate.passes(time.monotonic())
    if came:
        with contextlib.suppress(BaseException):
            log.exception(message + more(came), *values)


def _warn(message: str, *values: object) -> None:
    """Log a warning, whatever a log handler raises."""
    with contextlib.suppress(BaseException):
        log.warning(message, *values)


class ProbeConnection(Protocol):
    """A connection to one server. Its watcher owns it, and other threads call only cut().

    All methods but cut() and close() may raise ProbeError.
    """

    def ask(self) -> Server:
        """Ask the server for its state."""
        ...

    def functions(self) -> frozenset[str]:
        """Return the names of user functions that do not write."""
        ...

    def prune(self) -> bool:
        """Remove old rows of the commit table, and return whether there may be more."""
        ...

    def cut(self) -> None:
        """Shut the socket, so that a thread stuck in ask() wakes with an error."""
        ...

    def close(self) -> None: ...


class ProbeError(Exception):
    """A probe that failed, in words for the user.

    busy: the server lives, but has no room for one more connection.
    """

    def __init__(self, message: str, silence: Silence = Silence.REFUSED, *, busy: bool = False) -> None:
        super().__init__(message)
        self.silence = silence
        self.busy = busy


class Haste(enum.Enum):
    """How soon waiting threads want an answer.

    ALONE: at once, and then in a hurry.
    SHARED: once for all of them, and not more often than every position_interval.
    """

    ALONE = 1
    SHARED = 2


class Monitor:
    """Watch a set of instances.

    connect: opens a probe connection to an instance; raises ProbeError.
    cut: ends a connect to an instance that is under way, by its id; called by another thread.
    changed: called with the old topology, the new one and when that was published (seconds, monotonic), in a thread of its own.
        All changes during one call become one change. The functions that it returns are called in another thread, which
        listeners may hold up.
    may_queue: whether a probe of an instance may wait in a pooler's queue for a place that units have.
    """

    def __init__(
        self,
        settings: Settings,
        connect: Callable[[Instance], ProbeConnection],
        cut: Callable[[str], None],
        changed: Callable[[Topology, Topology, float], Iterable[Callable[[], object]]],
        may_queue: Callable[[str], bool],
    ) -> None:
        topology = Topology()
        for instance in settings.all_instances:
            topology = pure.add(topology, instance)
        self.topology = topology
        self.functions: frozenset[str] = frozenset()
        self.prunes = False  # whether the commit table is used, so that old rows must go
        self.pruned_at = float("-inf")
        self._connect = connect
        self._cut = cut
        self._changed = changed
        self._may_queue = may_queue
        self._interval = settings.probe_interval
        if settings.max_lag is not None:
            # An answer does not prove a lag below max_lag for longer than max_lag, so probes must come more often.
            self._interval = min(self._interval, max(settings.max_lag / 4, HURRY))
        self._timeout = settings.probe_timeout
        self._position_interval = settings.position_interval
        # Without a writer, probes are in a hurry for this long, even if no thread waits for a writer.
        self._failover_timeout = settings.failover_timeout
        self._accept_new_cluster = settings.accept_new_cluster
        # By the wall clock, because it goes on while the process or its machine sleeps.
        self.trusted_until = float("inf")
        self._announcer: threading.Thread | None = None
        self._teller: threading.Thread | None = None
        self._news: queue.SimpleQueue[Iterable[Callable[[], object]] | None] = queue.SimpleQueue()
        self._moved = threading.Condition()  # guards the attributes below; notified of each new topology
        self._poke = threading.Event()
        self._watchers: dict[str, _Watcher] = {}
        self._waiting: set[object] = set()
        self._hasty: dict[Haste, set[object]] = {haste: set() for haste in Haste}  # those of them that want a probe sooner
        self._hasty_since = dict.fromkeys(Haste, 0.0)
        self._suspects: dict[str, float] = {}
        self._wanted_at = 0.0
        self._served_at = 0.0
        self._writerless_since = self._published_at = time.monotonic()
        # Observations from before this moment are not trusted until all instances were observed since.
        self._doubted_at: float | None = None
        # By the wall clock. If the time-keeper runs later than that, the process has stood still.
        self._awake_until = float("inf")
        self._catalog_at = float("-inf")
        self._catalog_wanted = False
        self._thread: threading.Thread | None = None
        self._closed = False

    def start(self) -> None:
        """Begin to probe. Do nothing if that has begun."""
        with self._moved:
            if self._thread is not None or self._closed:
                return
            self._writerless_since = time.monotonic()
            if self._doubted_at is not None:
                self._doubted_at = self._writerless_since
            for instance in self.topology:
                self._watchers[instance.id] = _Watcher(self, instance)
            self._thread = threading.Thread(target=self._keep_time, name="aurora-router-monitor", daemon=True)
            self._thread.start()
            self._announcer = threading.Thread(
                target=self._announce, args=(self.topology,), name="aurora-router-announcer", daemon=True
            )
            self._announcer.start()
            self._teller = threading.Thread(target=self._tell, name="aurora-router-teller", daemon=True)
            self._teller.start()

    def close(self) -> None:
        """Stop probing, close the probe connections, and join the threads. Idempotent.

        If threads hang in a connect, the whole wait for them is no longer than probe_timeout.
        """
        with self._moved:
            self._closed = True
            watchers = list(self._watchers.values())
            self._watchers.clear()
            self._moved.notify_all()
        self._poke.set()
        for watcher in watchers:
            watcher.stop()
        deadline = time.monotonic() + self._timeout
        for thread in (self._thread, self._announcer, self._teller, *(watcher.thread for watcher in watchers)):
            if thread is not None and thread is not threading.current_thread():
                thread.join(max(deadline - time.monotonic(), 0.0))

    def forked(self) -> None:
        """Begin anew without threads, in a forked child. The topology is trusted when each instance was observed again."""
        self._moved = threading.Condition()
        self._poke = threading.Event()
        self._watchers = {}
        self._waiting = set()
        self._hasty = {haste: set() for haste in Haste}
        self._suspects = {}
        self._thread = self._announcer = self._teller = None
        self._news = queue.SimpleQueue()
        self._doubted_at = time.monotonic()
        self._awake_until = float("inf")
        self.trusted_until = float("-inf")

    def wait_for(self, satisfied: Callable[[Topology], bool], timeout: float, *, haste: Haste | None = None) -> Topology:
        """Wait until the topology is trusted and satisfies the condition, and return the newest one.

        The wait also ends at the timeout, or if the monitor is closed. If the machine sleeps during the wait, older observations
        must not end it, so the topology must be trusted.

        timeout: seconds.
        haste: probe all instances that answer sooner than they are due.
        """
        deadline = time.monotonic() + timeout
        with self._moved:
            if self.trusted and satisfied(self.topology):
                return self.topology
            me = object()
            try:
                self._waiting.add(me)
                if haste is not None:
                    self._hasty[haste].add(me)
                    self._hasty_since[haste] = time.monotonic()
                self._poke.set()
                while not self._closed and (left := deadline - time.monotonic()) > 0:
                    self._moved.wait(left)
                    if self.trusted and satisfied(self.topology):
                        break
            finally:
                self._waiting.discard(me)
                if haste is not None:
                    self._hasty[haste].discard(me)
            return self.topology

    @property
    def trusted(self) -> bool:
        """Whether the topology is current. It is not after this process stood still: stopped, or its machine asleep."""
        return time.time() <= self.trusted_until

    def wait_until_trusted(self) -> None:
        """Wait until each instance was observed again or has timed out."""
        self.wait_for(lambda _: True, self._timeout + 1.0)

    def suspect(self, instance: str) -> None:
        """Probe an instance at once, because something failed there."""
        with self._moved:
            if instance in self.topology.by_id:
                self._suspects[instance] = time.monotonic()
        self._poke.set()

    def ask_anew(self, instance: str, server: ServerId) -> Role | None:
        """Ask a server now, and return the role that it answers with.

        Return None if it no longer stands behind the instance, or if it has not answered in time. That is the time after which a
        silent server is known to be lost.
        """
        now = time.monotonic()
        self.suspect(instance)

        def told(topology: Topology) -> bool:
            seen = pure.behind(topology, instance, server)
            return seen is None or seen.asked_at > now

        topology = self.wait_for(told, pure.MISSES * (self._timeout + HURRY) + HURRY, haste=Haste.ALONE)
        seen = pure.behind(topology, instance, server)
        return seen.server.role if seen is not None and seen.asked_at > now else None

    def survived(self, instance: str, server: ServerId, since: float, until: float) -> bool:
        """Wait for evidence that a server has lived on since a moment, and return whether it has.

        since: seconds, monotonic.
        until: the end of the wait for a server that is recovering from a crash; seconds, monotonic.
        """
        usual = time.monotonic() + pure.MISSES * (self._timeout + HURRY) + HURRY
        self.suspect(instance)

        def told(topology: Topology) -> bool:
            if pure.survived(topology, instance, server, since) is not None:
                return True
            known = topology.by_id[instance]
            return time.monotonic() >= usual and known.silence is not pure.Silence.NOT_NOW

        topology = self.wait_for(told, max(until, usual) - time.monotonic(), haste=Haste.ALONE)
        return pure.survived(topology, instance, server, since) is True

    def look(self, instance: str) -> None:
        """Find out which servers stand behind an instance now, because a connection reached an unknown one there."""
        with self._moved:
            watcher = self._watchers.get(instance)
            if watcher is not None:
                watcher.look = True
        self.suspect(instance)

    def want_positions(self) -> None:
        """Ask for positions now, once for all sessions that have written and want to read, at most every position_interval."""
        # Otherwise a round is wanted already that has not begun yet. It will do.
        if self._wanted_at <= self._served_at:
            self._wanted_at = time.monotonic()
            self._poke.set()

    def want_functions(self) -> None:
        """Read the catalog soon, because a function was called that it did not list when it was last read."""
        self._catalog_wanted = True

    def add(self, instance: Instance) -> None:
        """Watch one more instance. Do nothing if it is watched already."""
        if instance.id in self.topology.by_id:
            return
        self._publish(lambda topology: pure.add(topology, instance))
        with self._moved:
            if self._thread is not None and not self._closed and instance.id not in self._watchers:
                self._watchers[instance.id] = _Watcher(self, instance)
        self._poke.set()

    def remove(self, instance: str) -> None:
        """Stop watching an instance."""
        with self._moved:
            watcher = self._watchers.pop(instance, None)
            self._suspects.pop(instance, None)
        if watcher is not None:
            watcher.stop()
        self._publish(lambda topology: pure.remove(topology, instance))

    def _publish(self, change: Callable[[Topology], Topology]) -> None:
        with self._moved:
            old = self.topology
            new = change(old)
            if new is not old:
                self.topology = new
                self._published_at = time.monotonic()
                if new.writer is None and old.writer is not None:
                    self._writerless_since = time.monotonic()
                self._moved.notify_all()

    def _announce(self, told: Topology) -> None:
        """Call `changed` with each newest topology, in a thread of its own, which waits for no listener."""
        news, rate = self._news, Rate(REPORT)
        while True:
            with self._moved:
                while self.topology is told and not self._closed:
                    self._moved.wait()
                new, published_at = self.topology, self._published_at
            if new is told:
                news.put(None)
                return
            try:
                told_next = self._changed(told, new, published_at)
                if news.qsize() < UNTOLD:
                    news.put(told_next)
            except BaseException:
                _report(rate, "a topology was not taken in completely")
            told = new

    def _tell(self) -> None:
        """Tell the news, in a thread of its own. A listener may take its time, or wait for a writer itself."""
        rate = Rate(REPORT)
        while (news := self._news.get()) is not None:
            for tell in news:
                try:
                    tell()
                except BaseException:
                    _report(rate, "news of a topology was not told completely")
            del news

    def _observed(self, observation: Observation) -> None:
        if observation.silence is not Silence.TIMEOUT:
            with self._moved:
                if self._suspects.get(observation.instance, float("inf")) <= observation.asked_at:
                    del self._suspects[observation.instance]
        self._publish(lambda topology: self._accepted(pure.observe(topology, observation)))

    def _accepted(self, topology: Topology) -> Topology:
        """Return the topology, or one that begins anew if all names lead to another cluster and that is accepted."""
        if not self._accept_new_cluster or (successor := topology.successor) is None:
            return topology
        _warn("the cluster %s was replaced by %s under the same names: it is used from now on", topology.cluster, successor)
        return pure.renewed(topology)

    def _forgotten(self, instance: str, server: ServerId) -> None:
        self._publish(lambda topology: pure.forget(topology, instance, server))

    def _keep_time(self) -> None:
        while not self._closed:
            self._poke.clear()
            now = time.monotonic()
            wake = now + self._interval
            with self._moved:
                watchers = list(self._watchers.values())
                self._trust(watchers, now)
            for watcher in watchers:
                try:
                    wake = min(wake, self._attend(watcher, now))
                except BaseException:
                    # For example no thread can be started. This instance must wait then, but the others must not.
                    watcher.report("%s could not be attended to")
            self._poke.wait(max(wake - time.monotonic(), 0.0))

    def _trust(self, watchers: list[_Watcher], now: float) -> None:
        """Trust the topology for a while longer, unless this thread has not run for long.

        In that case doubt the topology until each instance was observed again or has timed out.
        """
        wall = time.time()
        # A doubt may be under way already, because a machine may wake for only a moment.
        if wall > self._awake_until:
            self._doubted_at = now
            for watcher in watchers:
                if watcher.asked_at is not None:
                    watcher.asked_at = now  # the silence was not the instance's
        self._awake_until = wall + max(3 * self._interval, TRUST)
        doubted = self._doubted_at
        if doubted is None or now - doubted > self._timeout + 1.0 or all(i.heard_at >= doubted for i in self.topology):
            self._doubted_at = None
            self.trusted_until = self._awake_until
            if doubted is not None:
                self._moved.notify_all()

    def _attend(self, watcher: _Watcher, now: float) -> float:
        """Begin a probe that is due, end one that is overdue, and return when to look again (seconds, monotonic)."""
        pace = self._pace(watcher, now)
        asked_at = watcher.asked_at
        if asked_at is not None:
            timeout = self._timeout
            if asked_at + timeout <= now:
                timeout = self._time_in_queue(watcher)
            if asked_at + timeout <= now:
                watcher.overdue(asked_at, timeout)
            late_at = asked_at + self._timeout * LATE
            ends_at = late_at if late_at > now else asked_at + timeout
            due = min(ends_at, max(watcher.last_at + pace, now + HURRY))
        elif watcher.last_at + pace <= now:
            watcher.ask(now)
            due = now + min(pace, self._timeout * LATE)
        else:
            due = watcher.last_at + pace
        writer = self.topology.writer
        if writer is not None and writer.id == watcher.id:
            self._served_at = watcher.last_at
        return max(due, now + 0.001)

    def _time_in_queue(self, watcher: _Watcher) -> float:
        """Return the seconds for which a probe may be silent in all, if it has been silent for probe_timeout.

        It may wait in a pooler's queue for a place that units of this router have. Then its silence says nothing of the server.
        For the writer there is time, because the promotion of another server shows its loss. Nothing else shows a reader's loss.
        """
        instance = self.topology.by_id.get(watcher.id)
        if instance is None or not instance.healthy or instance.misses or not self._may_queue(watcher.id):
            return self._timeout
        return max(self._timeout, self._failover_timeout if instance.role is Role.WRITER else QUEUE)

    def _pace(self, watcher: _Watcher, now: float) -> float:
        """Return the seconds between two probes of an instance, as things are."""
        topology = self.topology
        instance = topology.by_id.get(watcher.id)
        if instance is not None and instance.seen and (instance.misses or watcher.id in self._suspects):
            return HURRY
        if self._doubted_at is not None and watcher.last_at < self._doubted_at:
            return HURRY
        writer = topology.writer
        shared = instance is not None and bool(instance.seen)
        if instance is not None and instance.silence is Silence.MISCONFIGURED and not shared:
            # Each probe may be a login with a wrong password. Those who start the router share one, to see whether it was mended.
            shared = writer is None
        elif writer is None and (self._waiting or now - self._writerless_since < self._failover_timeout):
            return HURRY
        elif writer is not None and (writer.id in self._suspects or self._is_late(writer, now)):
            # Another may have been promoted. The promotion can be seen before it is certain that this writer hangs.
            return HURRY
        if self._hasty[Haste.ALONE] and instance is not None and instance.healthy:
            return 0.0 if watcher.last_at < self._hasty_since[Haste.ALONE] else HURRY
        if self._hasty[Haste.SHARED] and shared and watcher.last_at < self._hasty_since[Haste.SHARED]:
            return min(self._position_interval, self._interval)
        if watcher.last_at < self._wanted_at and instance is not None and instance.healthy:
            return min(self._position_interval, self._interval)
        return self._interval

    def _is_late(self, instance: Instance, now: float) -> bool:
        """Whether an instance missed its last probe, or has had a good part of the time for this one."""
        watcher = self._watchers.get(instance.id)
        asked_at = watcher.asked_at if watcher is not None else None
        return instance.misses > 0 or (asked_at is not None and now - asked_at >= self._timeout * LATE)

    def _fresh_look_due(self, watcher: _Watcher, now: float) -> bool:
        usual = SCOUT if watcher.instance.reader_only else RENEW
        every = WRITERLESS if self.topology.writer is None else usual
        return now - watcher.looked_at >= every

    def _catalog_due(self, watcher: _Watcher, now: float) -> bool:
        """Whether this watcher must read the catalog now. The writer's does that, or any while there is no writer."""
        writer = self.topology.writer
        if writer is not None and writer.id != watcher.id:
            return False
        with self._moved:
            if now - self._catalog_at < (CATALOG_HURRY if self._catalog_wanted else CATALOG):
                return False
            self._catalog_at = now
            self._catalog_wanted = False
            return True

    def _prune_due(self, watcher: _Watcher, now: float) -> bool:
        writer = self.topology.writer
        return self.prunes and writer is not None and writer.id == watcher.id and now - self.pruned_at >= PRUNE


@dataclass(slots=True)
class _Link:
    """A probe connection, the server that it leads to, and when a fresh connection last led there."""

    connection: ProbeConnection
    server: ServerId
    reached_at: float


class _Watcher:
    """The thread of one instance. On request it asks the servers behind it, and reports each answer as an observation.

    If a thread hangs and cannot be cut (in name resolution), another replaces it and takes over its connections. A connection
    that the old thread makes after all is closed by that thread.
    """

    def __init__(self, monitor: Monitor, instance: Instance) -> None:
        self.monitor = monitor
        self.instance = instance
        self.id = instance.id
        self.asked_at: float | None = None  # when the probe that is under way began
        self.last_at = float("-inf")  # when the last one began
        self.looked_at = float("-inf")
        self.look = False
        self._links: list[_Link] = []
        self._asking: _Link | None = None
        self._complaints: dict[str, Rate] = {}  # of log lines, by their messages
        self._lost: set[ServerId] = set()  # servers whose connection was lost and not regained
        self._go = threading.Event()
        self._stopped = False
        self._stuck = 0
        self.thread = self._start()

    def _start(self) -> threading.Thread:
        thread = threading.Thread(target=self._run, name=f"aurora-router-probe-{self.id}", daemon=True)
        self.thread = thread
        thread.start()
        return thread

    def stop(self) -> None:
        """Have the thread close its connections and end."""
        self._stopped = True
        self._go.set()
        asking = self._asking
        if asking is not None:
            asking.connection.cut()
        self.monitor._cut(self.id)

    def report(self, message: str) -> None:
        """Log the exception that is being handled, unless that was done a moment ago.

        message: with a place for the instance.
        """
        _report(self._complaints.setdefault(message, Rate(REPORT)), message, self.id)

    def ask(self, now: float) -> None:
        """Begin a probe."""
        self.asked_at = self.last_at = now
        self._go.set()

    def overdue(self, asked_at: float, timeout: float) -> None:
        """Report an overdue probe as silent, and free its thread or replace it.

        asked_at: when the probe began; seconds, monotonic.
        timeout: seconds that it had.
        """
        asking = self._asking
        about: set[ServerId | None]
        if asking is not None and asking.server is not _NOBODY:
            about = {asking.server}
        else:
            # A fresh connection hangs. That says nothing of the servers to which there are connections.
            about = set() if self._links else {*self._lost} or {None}
        self.asked_at = time.monotonic()
        if asking is not None:
            self.last_at = self.asked_at
            asking.connection.cut()
        else:
            self.monitor._cut(self.id)  # it ends the connect, unless the thread hangs elsewhere
        error = f"no answer within {timeout:g} s"
        for server in about:
            self.monitor._observed(
                Observation(self.id, asked_at, time.monotonic(), about=server, silence=Silence.TIMEOUT, error=error)
            )
        if asking is None and self._stuck < STUCK:
            self._replace()

    def _replace(self) -> None:
        """Replace a thread that hangs by a new one. If none can be started, the old one may still come back."""
        old = self.thread, self._go
        self._go = threading.Event()
        try:
            self._start()
        except BaseException:
            self.thread, self._go = old
            raise
        self._stuck += 1
        old[1].set()  # if the old thread has come back, it must wake and end
        self.asked_at = None
        self.looked_at = time.monotonic()

    @property
    def _current(self) -> bool:
        return not self._stopped and self.thread is threading.current_thread()

    def _run(self) -> None:
        go = self._go
        try:
            while True:
                go.wait()
                go.clear()
                if not self._current:
                    return
                try:
                    self._probe(self._links)
                except BaseException as error:
                    self.report("the probe of %s came to an unexpected end")
                    strange = ProbeError(f"the probe came to an unexpected end: {type(error).__name__}", Silence.MISCONFIGURED)
                    self._failed(time.monotonic(), strange, self._lost or {None})
                if not self._current:
                    return
                self.asked_at = None
                if any(self.monitor._hasty.values()):
                    self.monitor._poke.set()  # threads that came meanwhile need another probe
        finally:
            if self.thread is threading.current_thread():
                for link in self._links:
                    link.connection.close()
            else:
                self._stuck -= 1

    def _probe(self, links: list[_Link]) -> None:
        now = time.monotonic()
        for link in list(links):
            self._ask(links, link)
        if not links or self.look or self.monitor._fresh_look_due(self, now):
            several = self.instance.reader_only and (self.look or not links)
            self.look = False
            self.looked_at = now
            for _ in range(LOOKS if several else 1):
                if not self._reach(links):
                    break
        if self._current and links and self.monitor._catalog_due(self, now):
            self._aside(links[0], self._read_catalog, "the functions of %s could not be read: %s")
        if self._current and links and self.monitor._prune_due(self, now):
            self._aside(links[0], self._prune, "old rows of the commit table on %s could not be removed: %s")

    def _read_catalog(self, connection: ProbeConnection) -> None:
        self.monitor.functions = connection.functions()

    def _prune(self, connection: ProbeConnection) -> None:
        self.monitor.pruned_at = time.monotonic()
        if connection.prune():
            self.monitor.pruned_at = float("-inf")

    def _aside(self, link: _Link, errand: Callable[[ProbeConnection], None], failed: str) -> None:
        """Do something else on a probe's connection. It is cut like a probe if it takes too long."""
        self._asking = link
        self.asked_at = time.monotonic()
        try:
            errand(link.connection)
        except ProbeError as error:
            # After stop(), the error may only say that stop() has cut the connection.
            if not self._stopped and self._complaints.setdefault(failed, Rate(COMPLAIN)).passes(time.monotonic()):
                _warn(failed, self.id, error)
        finally:
            self._asking = None

    def _ask(self, links: list[_Link], link: _Link) -> None:
        asked_at = time.monotonic()
        self._asking = link
        self.asked_at = asked_at
        try:
            server = link.connection.ask()
        except ProbeError as error:
            self._asking = None
            links.remove(link)
            link.connection.close()
            if links:
                self._failed(asked_at, error, {link.server})
            else:
                # Only this connection may be broken. The server is down if a fresh one fails, too.
                self._lost.add(link.server)
                self._reach(links)
            return
        finally:
            self._asking = None
        before, link.server = link.server, server.id
        pooled = server.id.run != before.run
        self._report(Observation(self.id, asked_at, time.monotonic(), server=server, pooled=pooled))
        # Only one server stands there. So it has another name now, or it is another server.
        if pooled and not self.instance.reader_only:
            self.monitor._forgotten(self.id, before)
        if self.instance.reader_only and len(links) > 1 and asked_at - link.reached_at > FORGET:
            links.remove(link)
            link.connection.close()
            self.monitor._forgotten(self.id, link.server)

    def _reach(self, links: list[_Link]) -> bool:
        """Open a fresh connection, ask the server that it leads to, and return whether that succeeded."""
        asked_at = time.monotonic()
        self.asked_at = asked_at
        connection: ProbeConnection | None = None
        try:
            connection = self.monitor._connect(self.instance)
            if not self._current:
                connection.close()
                return False
            link = _Link(connection, _NOBODY, asked_at)
            self._asking = link
            server = connection.ask()
        except ProbeError as error:
            if connection is not None:
                connection.close()
            # An overdue probe was reported as silent already, and this error comes from its cut.
            is_overdue = self.asked_at != asked_at
            if not links and not is_overdue and not (error.busy and self._lost):
                self._failed(asked_at, error, self._lost or {None})
            return False
        finally:
            self._asking = None
        link.server = server.id
        replaced = [old for old in links if old.server == server.id or not self.instance.reader_only]
        for old in replaced:
            links.remove(old)
            old.connection.close()
        links.append(link)
        for other in {old.server for old in replaced} | self._lost:
            if other.run != server.id.run:
                self.monitor._forgotten(self.id, other)
        self._lost.clear()
        if len(links) > MAX_SERVERS:
            links.pop(0).connection.close()
        self._report(Observation(self.id, asked_at, time.monotonic(), server=server))
        return True

    def _report(self, observation: Observation) -> None:
        if self._current:
            self.monitor._observed(observation)

    def _failed(self, asked_at: float, error: ProbeError, about: Iterable[ServerId | None]) -> None:
        for server in list(about):
            self._report(Observation(self.id, asked_at, time.monotonic(), about=server, silence=error.silence, error=str(error)))
