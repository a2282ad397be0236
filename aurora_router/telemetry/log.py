"""Turn the events of a router into log lines for an operator. The lines are few, however much happens."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Final

from aurora_router.core import events
from aurora_router.core.pacing import Rate, Steady, more
from aurora_router.core.topology import Topology

log = logging.getLogger("aurora_router")

_WRITER, _READERS = "", "readers"  # subjects that are no instances
AGAIN: Final = 10.0
"""Seconds between two lines of one kind about one instance."""


@dataclass(frozen=True, slots=True)
class _Line:
    """A log line.

    says: the state of its subject, in short. Two lines of the same level and state are equal, so one of them is enough.
    """

    level: int
    says: str | None
    text: str = field(compare=False)


class Log:
    """A listener that writes events to the logger `aurora_router`: WARNING for trouble, INFO for its end.

    A change of an instance or of the writer is logged when it happens. If many changes come in a short time, only the last state
    is logged. If a trouble was logged, its end is logged at once. Other events are logged at most once in AGAIN seconds.

    clock: returns seconds, monotonic.
    """

    KINDS: Final = frozenset(
        {
            events.InstanceUp,
            events.InstanceDown,
            events.WriterChanged,
            events.WaitingForWriter,
            events.NoReaderQualifies,
            events.MovedByListener,
            events.ConnectFailed,
            events.ConnectionRefused,
            events.RetriesRefused,
        }
    )
    """The kinds of events that this listener needs."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._started = False
        self.forked()

    def forked(self) -> None:
        """Begin anew, at first and in a forked child: nothing was logged yet, and nobody holds the lock."""
        self._lock = threading.Lock()
        self._last_writer: str | None = None
        self._states: dict[str, Steady[_Line]] = {}
        self._rates: dict[tuple[type[events.Event], str | None], Rate] = {}
        self._failures: dict[tuple[type[events.Event], int], Rate] = {}

    def started(self, topology: Topology) -> None:
        """Log the instances that are down at the end of start(), also if start() failed."""
        self._started = True
        for instance in topology:
            if instance.probed and not instance.healthy:
                self(events.InstanceDown(instance.id, topology.why_unused(instance)))

    def __call__(self, event: events.Event) -> None:
        """Log the event, now or later."""
        match event:
            case events.InstanceUp(instance=where, role=role):
                self._is(where, _Line(logging.INFO, role, f"{where} is used as a {role}"))
            case events.InstanceDown(instance=where, error=error):
                if self._started:
                    self._is(where, _Line(logging.WARNING, error, f"{where} is not used: {error}"))
            case events.WriterChanged(old=old, new=None):
                self._last_writer = old
                self._is(_WRITER, _Line(logging.WARNING, None, f"there is no writer (it was {old}): units that need one wait"))
            case events.WriterChanged(old=old, new=new, epoch=epoch):
                old, self._last_writer = old or self._last_writer, new
                since = "" if old is None else " again" if old == new else f" (was {old})"
                self._is(_WRITER, _Line(logging.INFO, new, f"the writer is {new}{since}, epoch {epoch}"))
            case events.WaitingForWriter(units=units, said=said):
                self._again(event, None, f"units that wait for a writer: {units}; {'; '.join(said)}")
            case events.NoReaderQualifies(writer=writer, reads=reads, said=said):
                cause = f"no reader qualifies, so {writer} serves the reads ({reads} since the last report)"
                self._again(event, None, f"{cause}: {'; '.join(said)}")
            case events.MovedByListener(instance=where):
                cause = f"a listener of connections or of after_begin sends what no reader may run to {where}"
                self._again(event, None, f"units go to the writer: {cause}. Let it read and SET only (no SET LOCAL)")
            case events.ConnectFailed(instance=where, why=why):
                self._again(event, where, f"a new connection to {where} could not be made: {why}")
            case events.ConnectionRefused(instance=where, why=why):
                self._again(event, where, f"a new connection to {where} was discarded: {why}")
            case events.RetriesRefused(instance=failed_at, refused=refused):
                where = "run_transaction" if failed_at is None else failed_at
                self._again(event, None, f"the retry budget is spent: {refused} retries were refused, the last one at {where}")

    def readers_late(self, topology: Topology, seconds: float) -> None:
        """Log that reads go to the writer, because no reader has what the writer had so many seconds before."""
        cause = f"no reader has replayed what the writer had {seconds:g} s before"
        said = f"reads of sessions that have written go to the writer: {cause}: {'; '.join(topology.said())}"
        self._is(_READERS, _Line(logging.WARNING, None, said))

    def readers_caught_up(self) -> None:
        """Log that a reader has caught up, if `readers_late()` was called before."""
        if _READERS in self._states:
            self._is(
                _READERS, _Line(logging.INFO, "", "a reader has caught up: reads of sessions that have written go there again")
            )

    def listener_failed(self, number: int, event: events.Event) -> None:
        """Log the exception of a listener. Call this in the `except` clause.

        The rate is limited, because the listener may fail in each unit.

        number: identifies the listener.
        """
        with self._lock:
            came = self._failures.setdefault((type(event), number), Rate(AGAIN)).passes(self._clock())
        if came:
            log.exception("a listener failed on %s%s", type(event).__name__, more(came))

    def tick(self) -> None:
        """Log the lines that were put off and are due by now. Call this from time to time."""
        now = self._clock()
        with self._lock:
            lines = [state.due(now) for state in self._states.values() if state.owes]
        for line in lines:
            _write(line)

    def keep(self, instances: Collection[str]) -> None:
        """Forget the log's states and rates of all instances except these."""
        with self._lock:
            for subject in self._states.keys() - {_WRITER, _READERS, *instances}:
                del self._states[subject]
            for key in [key for key in self._rates if key[1] is not None and key[1] not in instances]:
                del self._rates[key]

    def _is(self, subject: str, line: _Line) -> None:
        """Take note of the state of an instance, of the writer, or of all readers, and log it if it is due."""
        with self._lock:
            state = self._states.setdefault(subject, Steady())
            now_said = state.change(line, self._clock(), trouble=line.level == logging.WARNING)
        _write(now_said)

    def _again(self, event: events.Event, where: str | None, text: str) -> None:
        """Log an event that may come again and again at that instance, at most once in AGAIN seconds."""
        with self._lock:
            came = self._rates.setdefault((type(event), where), Rate(AGAIN)).passes(self._clock())
        if came:
            _write(_Line(logging.WARNING, None, text + more(came)))


def _write(line: _Line | None) -> None:
    if line is not None:
        with contextlib.suppress(Exception):  # a handler or filter of the application may raise
            log.log(line.level, "%s", line.text)
