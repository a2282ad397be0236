"""A writer dies, or hangs: how soon does each application write again, and is any acknowledged row lost?

A real cluster on loopback replicates synchronously: a COMMIT is acknowledged when one reader has it. Some applications run at
once, each in a process of its own: this router, libpq, SQLAlchemy and the AWS Advanced Python Wrapper. On MariaDB and MySQL the
router competes only with SQLAlchemy on PyMySQL, because libpq, and the wrapper with psycopg, reach only PostgreSQL. See
applications.py for the work and the settings of each. In each round the applications start anew, so that no earlier failure
counts (the wrapper's topology monitor rests for a while after each). They work for a while, and then:
  killed    the writer's processes are gone and its sockets closed; 1 s later a reader is promoted
  frozen    the writer's processes are stopped, its sockets stay open and silent; 1 s later a reader is promoted, and the old
            writer stays frozen until each application has written again, or for 45 s (--quick: 6 s)
Later the old writer comes back as a reader.

A witness that uses no code of the router sees the moment when the new writer accepts writes. It has two connections to each
reader, opened before the failure, that try an INSERT every 2 ms. One of them sends no COMMIT: its first success says that the
writer is *open*. The other commits, as every application has to: its first success says that the writer *acknowledges*. With
synchronous replication no COMMIT is acknowledged before the remaining reader streams from the new writer. The bounds:
  killed    the writer is open     -> the first COMMIT of the router's application is acknowledged, median
  frozen    the writer was frozen  -> the same, the longest of all rounds

The pictures show one line for each application, a character for 0.1 s: # it had a COMMIT acknowledged, . it had none.

Run: python benchmarks/failover.py [--engine mariadb|mysql] [--quick] [--markdown] [--without-wrapper]
     (4 minutes; --quick: half a minute)
"""

from __future__ import annotations

import importlib.util
import math
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any

from applications import COMPETITORS, ROUTER, THREADS, WRAPPER, WRAPPER_MODULE, WRAPPER_TUNED, Application, Place
from aurora_functions import addresses, install
from common import Options, Report, median, options, progress, starting

from aurora_router.local import LocalInstance
from aurora_router.local.cluster import Cluster

POLL = 0.002
BEFORE_PROMOTION = 1.0
STEADY = 3.0  # seconds of ordinary work before each failure
WITHOUT = "without-wrapper"
PICTURE = (-1.0, 7.0)  # seconds before and after the failure


class Witness:
    """An observer with connections of its own to all readers. It notes when one of them takes writes, and acknowledges them."""

    def __init__(self, readers: Sequence[LocalInstance]) -> None:
        self.opened: float | None = None
        self.acknowledged: float | None = None
        self._stop = threading.Event()
        self._connections: list[Any] = []
        self._threads = []
        for reader in readers:
            for commits in (False, True):
                connection = reader.connect(autocommit=False)
                self._connections.append(connection)
                self._threads.append(threading.Thread(target=self._watch, args=(connection, commits), daemon=True))

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def _watch(self, connection: Any, commits: bool) -> None:
        with connection.cursor() as cursor:
            while not self._stop.is_set():
                with suppress(connection.Error):  # a reader refuses
                    cursor.execute("INSERT INTO witness VALUES (1)")
                    if commits:
                        connection.commit()
                        self.acknowledged = time.monotonic()
                    else:
                        self.opened = time.monotonic()
                        connection.rollback()
                    return
                try:
                    connection.rollback()
                except connection.Error:
                    return  # the reader is gone, or is being rebuilt
                time.sleep(POLL)

    def close(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(10)
        for connection in self._connections:
            with suppress(connection.Error):  # closed already
                connection.close()


@dataclass
class Outage:
    """One failure and the promotion after it. All moments are in seconds, monotonic.

    failed: the writer was dead, or stopped
    opened: the witness had its first INSERT accepted
    acknowledged: the witness had its first COMMIT acknowledged
    entered: a waiting unit of the router had its connection; None if no unit waited
    everyone: all threads of the router's application had written
    last: each application last wrote before the failure
    next: each application first wrote after it (infinite: not before the wait was given up)
    """

    failed: float
    opened: float
    acknowledged: float
    entered: float | None
    everyone: float
    last: dict[str, float]
    next: dict[str, float]


def wait_until(satisfied: Callable[[], bool], what: str, timeout: float = 30.0) -> None:
    deadline = time.monotonic() + timeout
    while not satisfied():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {timeout:g} s for {what}")
        time.sleep(0.01)


def lose_writer(cluster: Cluster[Any], applications: Sequence[Application], frozen: bool, limit: float) -> Outage:
    """Kill or freeze the writer, promote a reader, and wait until all write again, at most `limit` seconds. Then tidy up."""
    place = Place(cluster.url, tuple(instance.host for instance in cluster.instances), addresses(cluster))
    with ExitStack() as stack:
        for application in applications:
            application.start(place)
            stack.callback(application.stop)
        began = time.monotonic()
        try:
            wait_until(lambda: all(a.all_after(began) for a in applications), "all applications to write")
        except TimeoutError as error:
            idle = [f"{a.name}: {a.errors[-1][1] if a.errors else 'no error'}" for a in applications if not a.all_after(began)]
            raise RuntimeError(f"{error}; not yet: {'; '.join(idle)}") from None
        time.sleep(STEADY)
        return _lose_writer(cluster, applications, frozen, limit)


def _lose_writer(cluster: Cluster[Any], applications: Sequence[Application], frozen: bool, limit: float) -> Outage:
    old, router = cluster.writer, applications[0]
    witness = Witness(cluster.readers)
    try:
        if frozen:
            cluster.freeze(old)
        else:
            cluster.kill(old)
        failed = time.monotonic()
        witness.start()
        time.sleep(BEFORE_PROMOTION)
        new = cluster.promote()
        for application in applications:
            application.new_writer(new.host)
        wait_until(lambda: witness.acknowledged is not None and witness.opened is not None, "the new writer to take writes")
        # Writes that were on their way when the writer failed may still arrive. Before the promotion, no other write can.
        later = failed + BEFORE_PROMOTION / 2
        while not all(a.first_after(later) for a in applications) and time.monotonic() < failed + limit:
            time.sleep(0.05)
        wait_until(lambda: router.all_after(later) is not None, "all threads of the router's application")
        time.sleep(max(failed + 2.5 - time.monotonic(), 0.0))  # the picture shows how they go on
    finally:
        witness.close()
    opened, acknowledged = witness.opened, witness.acknowledged
    assert opened is not None
    assert acknowledged is not None
    outage = Outage(
        failed=failed,
        opened=opened,
        acknowledged=acknowledged,
        entered=min((when for when, instance in list(router.entered) if when > later and instance == new.address), default=None),
        everyone=router.all_after(later) or math.inf,
        last={a.name: a.last_before(later) for a in applications},
        next={a.name: a.first_after(later) or math.inf for a in applications},
    )
    _draw(outage, applications, f"{old.name} {'frozen' if frozen else 'killed'}, {new.name} promoted")
    if frozen:
        cluster.kill(old)
    cluster.rejoin(old)
    return outage


def _draw(outage: Outage, applications: Sequence[Application], title: str) -> None:
    """A line for each application, from a second before the failure."""
    progress(f"  {title}, open {outage.opened - outage.failed:.2f} s later; 0.1 s a character, # with a write:")
    begin, until = (round(edge * 10) for edge in PICTURE)
    until = min(until, int((time.monotonic() - outage.failed) * 10))
    progress(f"  {'':15} {' ' * (-begin)}|{'frozen' if 'frozen' in title else 'killed'}")
    for application in applications:
        written = {math.floor((row.at - outage.failed) * 10) for row in list(application.done)}
        line = "".join("#" if tenth in written else "." for tenth in range(begin, until))
        gap = outage.next[application.name] - outage.failed
        progress(f"  {application.name:15} {line} {'still hanging' if math.isinf(gap) else f'{gap:.2f} s'}")


def main(how: Options) -> int:
    competitors = [
        name for name in COMPETITORS[how.engine] if WITHOUT not in how.switches or name not in (WRAPPER, WRAPPER_TUNED)
    ]
    wrapped = WRAPPER in competitors
    if wrapped and importlib.util.find_spec(WRAPPER_MODULE) is None:
        progress(
            "aws-advanced-python-wrapper is not installed, so there is nothing to compare with: pip install -e '.[bench]', "
            f"or leave it out with --{WITHOUT}"
        )
        return 2
    kills, freezes, limit = (2, 1, 6.0) if how.quick else (5, 3, 45.0)
    names = [ROUTER, *competitors]
    applications = [Application(name) for name in names]
    without = "" if WRAPPER in COMPETITORS[how.engine] else "; libpq, and the wrapper with psycopg, are PostgreSQL's"
    report = Report(f"failover: {THREADS} writing threads of each application, all applications at once{without}")
    killed: list[Outage] = []
    frozen: list[Outage] = []
    with starting(how, report, synchronous=True) as cluster:
        cluster.execute("CREATE TABLE entry (id varchar(100) PRIMARY KEY)")
        cluster.execute("CREATE TABLE witness (n int)")
        if wrapped:
            install(cluster)
        cluster.wait_in_sync()
        for number in range(kills):
            progress(f"killed writer {number + 1} of {kills}")
            killed.append(lose_writer(cluster, applications, False, limit))
        for number in range(freezes):
            progress(f"frozen writer {number + 1} of {freezes}, observed for at most {limit:g} s")
            frozen.append(lose_writer(cluster, applications, True, limit))
        stored = {key for (key,) in cluster.execute("SELECT id FROM entry")}

    report.add("killed writers", len(killed), bound=kills, at_least=True)
    # A --quick run, perhaps on a busy machine, judges no times. It judges lost rows, and errors that reached the application.
    at_once, soon = (None, None) if how.quick else (50, 2.5)
    gap = _ms(o.next[ROUTER] - o.opened for o in killed)
    report.add("killed: new writer open -> router's next write, median", gap, "ms", at_once)
    report.add("  the longest", max(o.next[ROUTER] - o.opened for o in killed) * 1000, "ms")
    if entered := [o.entered - o.opened for o in killed if o.entered is not None]:
        report.add("  until a waiting unit is connected, median", _ms(entered), "ms")
    report.add("  until all threads had written, median", _ms(o.everyone - o.opened for o in killed), "ms")
    report.add("  a plain connection that was open already, median", _ms(o.acknowledged - o.opened for o in killed), "ms")
    for name in names[1:]:
        _add(report, f"  {name}, median", [(o.next[name] - o.opened) * 1000 for o in killed], limit * 1000, "ms")
    for name in names:
        figure = "killed: time without a write, router, median" if name == ROUTER else f"  {name}, median"
        _add(report, figure, [o.next[name] - o.last[name] for o in killed], limit, "s")

    report.add("frozen writers", len(frozen), bound=freezes, at_least=True)
    slowest = max(o.next[ROUTER] - o.failed for o in frozen)
    report.add("frozen: writer frozen -> router's next write, the longest", slowest, "s", soon)
    for name in names:
        _add(report, f"  {name}, median", [o.next[name] - o.failed for o in frozen], limit, "s")
    for name in names:
        figure = "frozen: new writer open -> router's next write, median" if name == ROUTER else f"  {name}, median"
        _add(report, figure, [o.next[name] - o.opened for o in frozen], limit - BEFORE_PROMOTION, "s")

    for a in applications:
        figure = "acknowledged writes lost, router" if a.name == ROUTER else f"  {a.name}"
        lost = sum(row.key not in stored for row in a.done)
        report.add(f"{figure}, of {len(a.done):,}", lost, bound=0 if a.name == ROUTER else None)
    for a in applications:
        figure = "errors that reached the application, router" if a.name == ROUTER else f"  {a.name}"
        report.add(figure, len(a.errors), bound=0 if a.name == ROUTER else None)
        if kinds := sorted({said.split(":")[0] for _, said in a.errors}):
            progress(f"    {', '.join(kinds)}")
    return report.finish(how)


def _ms(seconds: Iterable[float]) -> float:
    return median(seconds) * 1000


def _add(report: Report, name: str, measured: Sequence[float], limit: float, unit: str) -> None:
    """Add the median. If it is infinite, add the limit as endless."""
    middle = median(measured)
    report.add(name, min(middle, limit), unit, endless=math.isinf(middle))


if __name__ == "__main__":
    sys.exit(main(options(__doc__, {WITHOUT: "leave aws-advanced-python-wrapper out"})))
