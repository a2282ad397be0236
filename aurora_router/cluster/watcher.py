"""The thread of one instance, which only probes it. So a server that hangs holds up no other instance.

`core/watching` decides which servers stand behind the instance, and what an answer or a failure says of them.
"""

from __future__ import annotations

import contextlib
import logging
import math
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, Protocol

from aurora_router.cluster.probe import ProbeConnection, ProbeError
from aurora_router.cluster.probe_events import ProbeEvents
from aurora_router.core import watching
from aurora_router.core.instance import Instance, ProbeFailure, ServerId
from aurora_router.core.pacing import Rate, more
from aurora_router.core.watching import Change, Link, News, Watch
from aurora_router.waiting import ThreadWakeup

log = logging.getLogger("aurora_router")

# How many threads of one instance may hang, for example in name resolution. If as many hang, no more are started.
MAX_STUCK_THREADS = 4
# Seconds between two reports of the same unexpected exception.
REPORT_INTERVAL = 10.0
# Seconds between two warnings that the same side task failed.
WARNING_INTERVAL = 60.0

_NOBODY = ServerId("", None, None, "")


def report(rate: Rate, message: str, *values: object) -> None:
    """Log the exception that is being handled, in a thread of the monitor's, as often as the rate allows.

    Code of the application may have raised it: a listener, a log handler, a password function. Such an exception, even
    SystemExit, must not end the thread.
    """
    came = rate.passes(time.monotonic())
    if came:
        with contextlib.suppress(BaseException):
            log.exception(message + more(came), *values)


def warn(message: str, *values: object) -> None:
    """Log a warning, whatever a log handler raises."""
    with contextlib.suppress(BaseException):
        log.warning(message, *values)


class SideTask(NamedTuple):
    """Something else to do on a probe's connection.

    failure: the warning if it fails, with places for the instance and the error.
    """

    run: Callable[[ProbeConnection], None]
    failure: str


class WatcherOwner(Protocol):
    """The part of the monitor that the threads of a watcher call."""

    def connect(self, instance: Instance) -> ProbeConnection:
        """Open a probe connection. Raises ProbeError."""
        ...

    def abort_connect(self, instance_id: str) -> None:
        """End a connect that is under way."""
        ...

    def apply_news(self, news: Sequence[News]) -> None:
        """Apply the news of a probe to the topology, all at once."""
        ...

    def is_recheck_due(self, instance: Instance, rechecked_at: float, now: float) -> bool:
        """Return whether it is time to find out anew where the instance's name leads."""
        ...

    def side_tasks(self, instance_id: str, now: float) -> Iterable[SideTask]:
        """Return the other tasks that are due on a connection now, one after the other."""
        ...

    def on_probe_end(self) -> None:
        """Note that a probe has ended."""
        ...


class Watcher:
    """The thread of one instance. On request it asks the servers behind it, and reports each answer as an observation.

    A thread may hang and not be cut, for example in name resolution. Another one then replaces it and takes over its connections.
    If the old thread makes a connection after all, it closes that connection itself.
    """

    def __init__(self, owner: WatcherOwner, instance: Instance) -> None:
        self.instance = instance
        self.id = instance.id
        self.asked_at: float | None = None  # when the probe that is under way began
        self.last_at = float("-inf")  # when the last one began
        self._owner = owner
        self._told = ProbeEvents(instance.id)  # of the probe that is under way, or of the last one
        self._watch: Watch[ProbeConnection] = Watch(instance.id, instance.reader_only)
        self._rechecked_at = float("-inf")
        self._must_recheck = False
        self._asking: Link[ProbeConnection] | None = None
        self._rates: dict[str, Rate] = {}  # of log lines, by their messages
        self._go = ThreadWakeup()
        self._stopped = False
        self._stuck = 0
        self.thread = self._start()

    def _start(self) -> threading.Thread:
        thread = threading.Thread(target=self._run, name=f"aurora-router-probe-{self.id}", daemon=True)
        self.thread = thread
        thread.start()
        return thread

    def begin(self, now: float, told: ProbeEvents) -> None:
        """Begin a probe.

        now: seconds, monotonic.
        told: the events of the probe.
        """
        self._told = told
        self.asked_at = self.last_at = now
        self._go.set()

    def restart_deadline(self, now: float) -> None:
        """Count the time of a probe that is under way from now on. now: seconds, monotonic."""
        if self.asked_at is not None:
            self.asked_at = now

    def recheck_address(self) -> None:
        """Find out with the next probe which servers stand there."""
        self._must_recheck = True

    def stop(self) -> None:
        """Have the thread close its connections and end."""
        self._stopped = True
        self._told.ended("the instance is not watched any more")
        self._go.set()
        asking = self._asking
        if asking is not None:
            asking.connection.shut_down()
        self._owner.abort_connect(self.id)

    def report(self, message: str) -> None:
        """Log the exception that is being handled, unless that was done a moment ago.

        message: with a place for the instance.
        """
        report(self._rates.setdefault(message, Rate(REPORT_INTERVAL)), message, self.id)

    def on_deadline(self, asked_at: float, timeout: float) -> None:
        """Report an overdue probe as silent, and free its thread or replace it.

        asked_at: when the probe began; seconds, monotonic.
        timeout: seconds that the probe had.
        """
        asking, watch = self._asking, self._watch
        self.asked_at = time.monotonic()
        if asking is not None:
            self.last_at = self.asked_at
            asking.connection.shut_down()
        else:
            self._owner.abort_connect(self.id)  # it ends the connect, unless the thread hangs elsewhere
        asked = asking if asking is not None and asking.server is not _NOBODY else None
        self._told.ended(watching.no_answer(timeout))
        self._owner.apply_news(watching.on_timeout(watch, asked, timeout, asked_at, time.monotonic()))
        if asking is None and self._stuck < MAX_STUCK_THREADS:
            self._replace()

    def _replace(self) -> None:
        """Replace a thread that hangs by a new one. If none can be started, the old one may still come back."""
        old = self.thread, self._go
        self._go = ThreadWakeup()
        try:
            self._start()
        except BaseException:
            self.thread, self._go = old
            raise
        self._stuck += 1
        old[1].set()  # if the old thread has come back, it must wake and end
        self.asked_at = None
        self._rechecked_at = time.monotonic()

    # -- the thread ---------------------------------------------------------------------------------------------------

    @property
    def _is_current(self) -> bool:
        return not self._stopped and self.thread is threading.current_thread()

    def _run(self) -> None:
        go = self._go
        try:
            while True:
                go.wait(math.inf)
                told = self._told
                if not self._is_current:
                    return
                try:
                    self._probe(told)
                except BaseException as error:
                    self.report("unexpected error in the probe of %s")
                    text = f"unexpected error in the probe: {type(error).__name__}"
                    told.ended(text)
                    now = time.monotonic()
                    self._tell(watching.probe_failures(self._watch, ProbeFailure.MISCONFIGURED, text, now, now))
                if not self._is_current:
                    return
                self.asked_at = None
                self._owner.on_probe_end()
        finally:
            if self.thread is threading.current_thread():
                for link in self._watch.links:
                    link.connection.close()
            else:
                self._stuck -= 1

    def _probe(self, told: ProbeEvents) -> None:
        now = time.monotonic()
        for link in self._watch.links:
            self._ask(link)
        is_due = self._owner.is_recheck_due(self.instance, self._rechecked_at, now)
        connects = self._watch.connects(is_asked=self._must_recheck, is_due=is_due)
        if connects:
            self._must_recheck = False
            self._rechecked_at = now
        while connects and self._reach():
            connects -= 1
        told.ended()
        if self._is_current and self._watch.links:
            for task in self._owner.side_tasks(self.id, now):
                if self._is_current:
                    self._run_side_task(self._watch.links[0], task)

    def _ask(self, link: Link[ProbeConnection]) -> None:
        asked_at = time.monotonic()
        self._asking = link
        self.asked_at = asked_at
        try:
            server = link.connection.ask()
        except ProbeError as error:
            self._asking = None
            self._told.failed(str(error))
            change = watching.on_broken(self._watch, link, error.probe_failure, str(error), asked_at, time.monotonic())
            self._apply(change)
            if change.must_connect:
                self._reach()
            return
        finally:
            self._asking = None
        self._told.answered(server.role)
        self._apply(watching.on_answer(self._watch, link, server, asked_at, time.monotonic()))

    def _reach(self) -> bool:
        """Open a fresh connection, ask the server that it leads to, and return whether that succeeded."""
        asked_at = time.monotonic()
        self.asked_at = asked_at
        connection: ProbeConnection | None = None
        try:
            connection = self._owner.connect(self.instance)
            if not self._is_current:
                connection.close()
                return False
            self._asking = Link(connection, _NOBODY, asked_at)
            server = connection.ask()
        except ProbeError as error:
            if connection is not None:
                connection.close()
            # An overdue probe was reported as silent already, and this error comes from its cut.
            if self.asked_at == asked_at:
                self._told.failed(str(error))
                now = time.monotonic()
                self._tell(
                    watching.connect_failure(self._watch, error.probe_failure, str(error), asked_at, now, is_busy=error.busy)
                )
            return False
        finally:
            self._asking = None
        self._told.answered(server.role)
        self._apply(watching.on_connected(self._watch, connection, server, asked_at, time.monotonic()))
        return True

    def _run_side_task(self, link: Link[ProbeConnection], task: SideTask) -> None:
        """Do something else on a probe's connection. It is cut like a probe if it takes too long."""
        self._asking = link
        self.asked_at = time.monotonic()
        try:
            task.run(link.connection)
        except ProbeError as error:
            # After stop(), the error may only say that stop() has cut the connection.
            rate = self._rates.setdefault(task.failure, Rate(WARNING_INTERVAL))
            if not self._stopped and rate.passes(time.monotonic()):
                warn(task.failure, self.id, error)
        finally:
            self._asking = None

    def _apply(self, change: Change[ProbeConnection]) -> None:
        self._watch = change.watch
        for connection in change.closed:
            connection.close()
        self._tell(change.news)

    def _tell(self, news: Sequence[News]) -> None:
        if self._is_current:
            self._owner.apply_news(news)
