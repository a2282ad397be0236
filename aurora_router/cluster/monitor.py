"""Watch the instances, publish frozen topologies, and wake waiting threads. No other code talks to servers on its own account.

One thread is the scheduler, and each instance has a thread that only probes it. So a server that hangs, or a name that does not
resolve, holds up no other instance. The scheduler declares an overdue probe silent and cuts its connection, even if that is still
being made. If the answer comes after all, it is dropped. `core/probing` decides when each task is due.
"""

from __future__ import annotations

import enum
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial

from aurora_router.cluster.probe import ProbeConnection
from aurora_router.cluster.probe_events import ProbeEvents
from aurora_router.cluster.watcher import REPORT_INTERVAL, SideTask, Watcher, report, warn
from aurora_router.config.settings import Settings
from aurora_router.core import events, probing
from aurora_router.core import topology as pure
from aurora_router.core.instance import Instance, Observation, Role, ServerId
from aurora_router.core.pacing import Rate
from aurora_router.core.probing import Demand, Reached, Trust
from aurora_router.core.topology import Topology
from aurora_router.core.watching import News
from aurora_router.waiting import ThreadWakeup, Waiting, Wakeup

# How many pieces of news may wait for a listener that does not return. Later ones are dropped.
MAX_PENDING_NEWS = 1000

_NO_FUNCTIONS = "the functions of %s could not be read: %s"
_REPLACED = "the cluster %s was replaced by %s under the same names: it is used from now on"
_NOT_PRUNED = "old rows of the commit table on %s could not be removed: %s"


class Urgency(enum.Enum):
    """How soon waiting threads want an answer.

    ALONE: the instances are probed at once for each thread, and fast from then on.
    SHARED: one probe serves all waiting threads, and comes not more often than every position_interval.
    """

    OWN_PROBE = 1
    SHARED_PROBE = 2


class Monitor:
    """Watch a set of instances.

    connect: opens a probe connection to an instance; raises ProbeError.
    abort_connect: ends a connect that is under way; takes the instance's id. It is called from another thread.
    changed: takes the old topology, the new one, and the time when the new one was published (seconds, monotonic). It is called
        in a thread of its own. All changes during one call become one change. It returns functions, which are called in another
        thread. Listeners may hold up that thread, but not the first one.
    reached: what the probes of an instance have reached; takes its id.
    waiting: how units wait for a topology.
    publish_event: called with the events of probes, in the thread that listeners may hold up; None if there are no listeners.
    """

    def __init__(
        self,
        settings: Settings,
        connect: Callable[[Instance], ProbeConnection],
        abort_connect: Callable[[str], None],
        changed: Callable[[Topology, Topology, float], Iterable[Callable[[], object]]],
        reached: Callable[[str], Reached],
        waiting: Waiting,
        publish_event: Callable[[events.Event], object] | None = None,
    ) -> None:
        topology = Topology()
        for instance in settings.all_instances:
            topology = pure.add(topology, instance)
        self.topology = topology
        self.functions: frozenset[str] = frozenset()
        self._prunes = False  # whether the commit table is used, so that old rows must go
        self.pruned_at = float("-inf")
        self.connect = connect
        self.abort_connect = abort_connect
        self._changed = changed
        self._reached = reached
        self._publish_event = publish_event
        self._wakeup = waiting.wakeup
        self._timing = probing.make_timing(settings)
        self._accept_new_cluster = settings.accept_new_cluster
        self._trust = Trust()
        self.trusted_until = self._trust.trusted_until  # by the wall clock; each unit reads it
        self._announcer: threading.Thread | None = None
        self._listener_thread: threading.Thread | None = None
        self._news: queue.SimpleQueue[Iterable[Callable[[], object]] | None] = queue.SimpleQueue()
        self._make_lock()
        self._watchers: dict[str, Watcher] = {}
        # They are set at each new topology, in the order in which they came. The value says which of them want a probe sooner.
        self._waiting: dict[Wakeup, Urgency | None] = {}
        self._urgent_since = dict.fromkeys(Urgency, 0.0)
        self._suspects: dict[str, float] = {}
        self._wanted_at = 0.0
        self._served_at = 0.0
        self._writerless_since = self._published_at = time.monotonic()
        self._catalog_at = float("-inf")
        self._catalog_wanted = False
        self._thread: threading.Thread | None = None
        self._closed = False

    def _make_lock(self) -> None:
        """Make the lock and the wakeups of the monitor's threads.

        A threading.Condition or Event would not do, because an exception of a signal handler can leave its lock held.
        """
        # It guards the state of the probes. It is reentrant, because the thread that holds it may garbage-collect the Router.
        self._lock = threading.RLock()
        self._scheduler_wakeup = ThreadWakeup()
        self._announcer_wakeup = ThreadWakeup()

    def start(self) -> None:
        """Begin to probe. Do nothing if probing has begun already."""
        with self._lock:
            if self._thread is not None or self._closed:
                return
            self._writerless_since = time.monotonic()
            if self._trust.distrusted_at is not None:
                self._trust = self._trust._replace(distrusted_at=self._writerless_since)
            for instance in self.topology:
                self._watchers[instance.id] = Watcher(self, instance)
            self._thread = threading.Thread(target=self._run_scheduler, name="aurora-router-monitor", daemon=True)
            self._thread.start()
            self._announcer = threading.Thread(
                target=self._publish_changes, args=(self.topology,), name="aurora-router-announcer", daemon=True
            )
            self._announcer.start()
            self._listener_thread = threading.Thread(target=self._call_listeners, name="aurora-router-teller", daemon=True)
            self._listener_thread.start()

    def stop(self) -> list[Watcher]:
        """Stop probing, and make the threads end soon. Return the stopped watchers, and wait for nothing."""
        with self._lock:
            self._closed = True
            watchers = list(self._watchers.values())
            self._wake()
        self._scheduler_wakeup.set()
        for watcher in watchers:
            watcher.stop()
        self._watchers.clear()
        self._announcer_wakeup.set()  # it ends when all watchers have ended their probes
        return watchers

    def close(self) -> None:
        """Stop probing, close the probe connections, and join the threads. Idempotent.

        The wait for all threads together is no longer than probe_timeout, even if threads hang in a connect.
        """
        watchers = self.stop()
        deadline = time.monotonic() + self._timing.timeout
        for thread in (self._thread, self._announcer, self._listener_thread, *(watcher.thread for watcher in watchers)):
            if thread is not None and thread is not threading.current_thread():
                thread.join(max(deadline - time.monotonic(), 0.0))

    def forked(self) -> None:
        """Begin anew without threads, in a forked child. The topology is trusted when each instance was observed again."""
        self._make_lock()
        self._watchers = {}
        self._waiting = {}
        self._suspects = {}
        self._thread = self._announcer = self._listener_thread = None
        self._news = queue.SimpleQueue()
        self._trust = probing.distrust(time.monotonic())
        self.trusted_until = self._trust.trusted_until

    def wait_for(self, satisfied: Callable[[Topology], bool], timeout: float, *, urgency: Urgency | None = None) -> Topology:
        """Wait until the topology is trusted and satisfies the condition, and return the newest topology.

        The wait also ends at the timeout, or if the monitor is closed. The topology must be trusted, because the machine may
        sleep during the wait. Observations from before the sleep must not end it.

        timeout: seconds.
        urgency: how much sooner than usual to probe the instances that answer; None for the usual pace.
        """
        if self.is_current and satisfied(self.topology):
            return self.topology
        deadline = time.monotonic() + timeout
        wakeup = self._wakeup()
        try:
            with self._lock:
                self._waiting[wakeup] = urgency
                if urgency is not None:
                    self._urgent_since[urgency] = time.monotonic()
            self._scheduler_wakeup.set()
            while not (self._closed or (self.is_current and satisfied(self.topology))):
                left = deadline - time.monotonic()
                if left <= 0:
                    break
                wakeup.wait(left)
        finally:
            self._waiting.pop(wakeup, None)
        return self.topology

    def _wake(self) -> None:
        """Wake the announcer and all units that wait. The caller holds the lock."""
        self._announcer_wakeup.set()
        for wakeup in [*self._waiting]:
            wakeup.set()

    @property
    def is_current(self) -> bool:
        """Whether the topology is current. It is not after this process was stopped for a while, or its machine slept."""
        return probing.is_trusted(self._trust, time.time())

    def wait_until_trusted(self) -> None:
        """Wait until each instance was observed again or has timed out."""
        self.wait_for(lambda _: True, self._timing.timeout + self._timing.grace)

    def suspect(self, instance: str) -> None:
        """Probe an instance at once, because something failed there."""
        with self._lock:
            if instance in self.topology.by_id:
                self._suspects[instance] = time.monotonic()
        self._scheduler_wakeup.set()

    def confirm_role(self, instance: str, server: ServerId) -> Role | None:
        """Ask a server now, and return the role that it answers with.

        Return None if the server no longer stands behind the instance, or if it does not answer in time. The time is over when a
        silent server would be known to be lost.
        """
        now = time.monotonic()
        self.suspect(instance)

        def is_told(topology: Topology) -> bool:
            seen = pure.find_server(topology, instance, server)
            return seen is None or seen.asked_at > now

        topology = self.wait_for(is_told, self._timing.lost_after, urgency=Urgency.OWN_PROBE)
        seen = pure.find_server(topology, instance, server)
        return seen.server.role if seen is not None and seen.asked_at > now else None

    def survived(self, instance: str, server: ServerId, since: float, until: float) -> bool:
        """Wait for evidence that a server has lived on since a moment, and return whether it has.

        since: seconds, monotonic.
        until: the end of the wait for a server that is recovering from a crash; seconds, monotonic.
        """
        usual = time.monotonic() + self._timing.lost_after
        self.suspect(instance)

        def is_told(topology: Topology) -> bool:
            if pure.survived(topology, instance, server, since) is not None:
                return True
            return time.monotonic() >= usual and not pure.may_recover(topology.by_id[instance])

        topology = self.wait_for(is_told, max(until, usual) - time.monotonic(), urgency=Urgency.OWN_PROBE)
        return pure.survived(topology, instance, server, since) is True

    def recheck_address(self, instance: str) -> None:
        """Find out which servers stand behind an instance now, because a connection reached an unknown one there."""
        with self._lock:
            watcher = self._watchers.get(instance)
            if watcher is not None:
                watcher.recheck_address()
        self.suspect(instance)

    def request_positions(self) -> None:
        """Ask for positions now, but at most once every position_interval.

        One round of probes serves all sessions that have written and want to read.
        """
        # If a round was requested and has not begun yet, that round will do.
        if self._wanted_at <= self._served_at:
            self._wanted_at = time.monotonic()
            self._scheduler_wakeup.set()

    def start_pruning(self) -> None:
        """Remove old rows of the commit table from now on, because it is used."""
        self._prunes = True

    def request_catalog(self) -> None:
        """Read the catalog soon, because a statement called a function that the catalog did not list at the last look."""
        self._catalog_wanted = True

    def add(self, instance: Instance) -> None:
        """Watch one more instance. Do nothing if it is watched already."""
        if instance.id in self.topology.by_id:
            return
        self._publish(lambda topology: pure.add(topology, instance))
        with self._lock:
            if self._thread is not None and not self._closed and instance.id not in self._watchers:
                self._watchers[instance.id] = Watcher(self, instance)
        self._scheduler_wakeup.set()

    def remove(self, instance: str) -> None:
        """Stop watching an instance."""
        with self._lock:
            watcher = self._watchers.pop(instance, None)
            self._suspects.pop(instance, None)
        if watcher is not None:
            watcher.stop()
        self._publish(lambda topology: pure.remove(topology, instance))

    def _publish(self, change: Callable[[Topology], Topology]) -> None:
        with self._lock:
            old = self.topology
            new = change(old)
            if new is not old:
                self.topology = new
                self._published_at = time.monotonic()
                if new.writer is None and old.writer is not None:
                    self._writerless_since = time.monotonic()
                self._wake()

    def _publish_changes(self, published: Topology) -> None:
        """Call `changed` with each newest topology, in a thread of its own, which waits for no listener."""
        news, rate = self._news, Rate(REPORT_INTERVAL)
        while True:
            with self._lock:
                new, published_at = self.topology, self._published_at
            if new is published:
                if self._closed and not self._watchers:
                    news.put(None)
                    return
                # An exception of a signal handler may have prevented the wakeup.
                self._announcer_wakeup.wait(self._timing.interval)
                continue
            try:
                calls = self._changed(published, new, published_at)
                if news.qsize() < MAX_PENDING_NEWS:
                    news.put(calls)
            except BaseException:
                report(rate, "error while applying a new topology")
            published = new

    def _call_listeners(self) -> None:
        """Call the listeners, in a thread of its own. A listener may take its time, or wait for a writer itself."""
        rate = Rate(REPORT_INTERVAL)
        while (news := self._news.get()) is not None:
            for tell in news:
                try:
                    tell()
                except BaseException:
                    report(rate, "error while calling listeners")
            del news

    def _publish_later(self, event: events.Event) -> None:
        """Publish an event of a probe in the thread that listeners may hold up."""
        if self._publish_event is not None:
            self._news.put((partial(self._publish_event, event),))

    def _clear_suspicion(self, observation: Observation) -> None:
        with self._lock:
            suspected_at = self._suspects.get(observation.instance)
            if suspected_at is not None and probing.clears_suspicion(observation, suspected_at):
                del self._suspects[observation.instance]

    def _accepted(self, topology: Topology) -> Topology:
        """Return the topology. Begin a new one if another cluster has taken its names, and the settings accept that.

        The caller holds the lock.
        """
        if not self._accept_new_cluster or (successor := topology.successor) is None:
            return topology
        # Log it in the thread that listeners may hold up, because a handler of logs must not hold the lock.
        self._news.put((partial(warn, _REPLACED, topology.cluster, successor),))
        return pure.reset(topology)

    # -- what the watchers need ------------------------------------------------------------------------------------------

    def apply_news(self, news: Sequence[News]) -> None:
        """Apply the news of a probe to the topology, all at once.

        Otherwise the instance of a restarted server would be lost for a moment, between the old server and the new one.
        """
        for each in news:
            if isinstance(each, Observation):
                self._clear_suspicion(each)
        self._publish(lambda topology: self._accepted(pure.after_news(topology, news)))

    def is_recheck_due(self, instance: Instance, rechecked_at: float, now: float) -> bool:
        """Return whether it is time to find out anew where the instance's name leads."""
        return probing.is_recheck_due(self.topology, instance, rechecked_at, self._timing, now)

    def side_tasks(self, instance_id: str, now: float) -> Iterator[SideTask]:
        """Yield the other tasks that are due on a connection to the instance now, one after the other."""
        if self._is_catalog_due(instance_id, now):
            yield SideTask(self._read_catalog, _NO_FUNCTIONS)
        if self._prunes and probing.is_prune_due(self.topology, instance_id, self.pruned_at, now):
            yield SideTask(self._prune, _NOT_PRUNED)

    def on_probe_end(self) -> None:
        """Run the scheduler at once if threads that came during the probe need another probe."""
        if any([*self._waiting.values()]):
            self._scheduler_wakeup.set()

    def _is_catalog_due(self, instance_id: str, now: float) -> bool:
        """Return whether the caller must read the catalog now. If so, no other watcher reads it."""
        with self._lock:
            is_due = probing.is_catalog_due(self.topology, instance_id, self._catalog_at, is_wanted=self._catalog_wanted, now=now)
            if is_due:
                self._catalog_at = now
                self._catalog_wanted = False
            return is_due

    def _read_catalog(self, connection: ProbeConnection) -> None:
        self.functions = connection.functions()

    def _prune(self, connection: ProbeConnection) -> None:
        self.pruned_at = time.monotonic()
        if connection.prune():
            self.pruned_at = float("-inf")

    # -- the scheduler ----------------------------------------------------------------------------------------------------

    def _run_scheduler(self) -> None:
        while not self._closed:
            now = time.monotonic()
            wake = now + self._timing.interval
            with self._lock:
                watchers = list(self._watchers.values())
                self._keep_trust(watchers, now)
                demand = self._demand()
            for watcher in watchers:
                try:
                    wake = min(wake, self._service(watcher, demand, now))
                except BaseException:
                    # For example, no thread can be started. Then this instance must wait, but the others must not.
                    watcher.report("could not schedule a probe of %s")
            self._scheduler_wakeup.wait(wake - time.monotonic())

    def _keep_trust(self, watchers: list[Watcher], now: float) -> None:
        """Trust the topology for a while longer, or doubt it if this process stood still."""
        wall, before = time.time(), self._trust
        has_paused = probing.has_paused(before, wall)
        if has_paused:
            for watcher in watchers:
                watcher.restart_deadline(now)  # this process was silent, not the instance
        self._trust = probing.renew_trust(before, self.topology, self._timing, now, wall)
        self.trusted_until = self._trust.trusted_until
        if self._trust.distrusted_at is None and (has_paused or before.distrusted_at is not None):
            self._wake()

    def _demand(self) -> Demand:
        """Return the reasons to probe sooner than is usual. The caller holds the lock."""
        writer = self.topology.writer
        watcher = None if writer is None else self._watchers.get(writer.id)
        urgent = [*self._waiting.values()]
        return Demand(
            writerless_since=self._writerless_since,
            is_awaited=bool(self._waiting),
            suspects=frozenset(self._suspects),
            own_since=self._urgent_since[Urgency.OWN_PROBE] if Urgency.OWN_PROBE in urgent else None,
            shared_since=self._urgent_since[Urgency.SHARED_PROBE] if Urgency.SHARED_PROBE in urgent else None,
            positions_since=self._wanted_at,
            distrusted_at=self._trust.distrusted_at,
            writer_asked_at=None if watcher is None else watcher.asked_at,
        )

    def _begin(self, watcher: Watcher, now: float) -> None:
        """Begin a probe, unless its instance is not watched any more."""
        # Half of the room is for news of topologies. A probe whose start is told has room for its end, however much waits.
        is_told = self._publish_event is not None and self._news.qsize() < MAX_PENDING_NEWS // 2
        with self._lock:
            if not self._closed and self._watchers.get(watcher.id) is watcher:
                watcher.begin(now, ProbeEvents(watcher.id, self._publish_later if is_told else None))

    def _service(self, watcher: Watcher, demand: Demand, now: float) -> float:
        """Begin a probe that is due, end one that is overdue, and return when to look again (seconds, monotonic)."""
        topology, timing = self.topology, self._timing
        every = probing.pace(topology, watcher.id, watcher.last_at, demand, timing, now)
        asked_at, timeout = watcher.asked_at, timing.timeout
        if asked_at is None:
            if watcher.last_at + every <= now:
                self._begin(watcher, now)
                asked_at = now
        elif asked_at + timeout <= now:
            timeout = probing.queue_timeout(topology.by_id.get(watcher.id), self._reached(watcher.id), timing)
            if asked_at + timeout <= now:
                watcher.on_deadline(asked_at, timeout)
        if topology.writer is not None and topology.writer.id == watcher.id:
            self._served_at = watcher.last_at
        return probing.wake_at(asked_at, watcher.last_at, every, timeout, timing, now)
