"""Writers die, hang, are replaced and come back for minutes: is every acknowledged row there, once, without any error?

A real cluster on loopback replicates synchronously: a COMMIT is acknowledged when one reader has it. Several processes, each with
a router of its own, append rows with keys of their own through run_transaction. They note each key after run_transaction returns.
The table has no unique key, so a row that was written twice would stand there twice. Meanwhile, in turn:
  killed       the writer's processes are gone at once; a reader is promoted 1 s later
  frozen       they are stopped, sockets stay open; a reader is promoted 1 s later, and the frozen one killed
  thawed       the same, but the deposed writer wakes up after the promotion and still takes itself for the writer
  replaced     a reader is promoted while the writer is alive and well
  crashed      the writer is killed and started again: nobody is promoted, it recovers
After each fault the old writer comes back as a reader. In between, readers are killed and frozen too.

Run: python benchmarks/soak.py [--engine mariadb|mysql] [--quick] [--markdown]        (10 minutes; --quick: 3 failovers)
"""

from __future__ import annotations

import itertools
import multiprocessing
import random
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Event
from typing import Any

from common import Options, Report, median, options, progress, starting
from sqlalchemy import text
from sqlalchemy.orm import sessionmaker

from aurora_router import Router, RoutingSession
from aurora_router.core import events
from aurora_router.drivers import drivers_for
from aurora_router.local.cluster import Cluster
from aurora_router.servers import usual

PROCESSES = 3
THREADS = 4  # of each process
SECONDS = 600.0
STEADY = 3.0  # seconds of ordinary work between two faults
BEFORE_PROMOTION = 1.0
APPEND = text("INSERT INTO entry VALUES (:key)")


@dataclass
class Work:
    """The work of one process.

    done: the keys of its acknowledged rows
    errors: the errors that reached the application
    times: the moment of each acknowledgement (seconds, monotonic)
    events: how often each event of its router came
    """

    done: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    events: Counter[str] = field(default_factory=Counter)


def append_rows(process: int, url: str, instances: list[str], check: str, stop: Event, result: Connection) -> None:
    """Append rows until `stop` is set, then send the work. This is the body of one process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends it in an orderly way
    work = Work()

    def heard(event: events.Event) -> None:
        match event:
            case events.CommitResolved(outcome=outcome):
                work.events[f"a lost COMMIT was found to be {outcome}"] += 1
            case events.RunAgain():
                work.events["a unit was run again"] += 1
            case _:
                pass

    with Router(url, instances=instances, listeners=[heard]) as router:
        Session = sessionmaker(class_=RoutingSession, router=router)

        def append(thread: int) -> None:
            for turn in itertools.count():
                if stop.is_set():
                    return
                key = f"{process}-{thread}-{turn}"
                try:
                    router.run_transaction(Session, lambda s, key=key: s.execute(APPEND, {"key": key}), commit_check=check)  # type: ignore[misc,arg-type]
                except Exception as error:
                    work.errors.append(f"{key}: {type(error).__name__}: {str(error).splitlines()[0]}")
                else:
                    work.done.append(key)
                    work.times.append(time.monotonic())
                time.sleep(0.005)

        threads = [threading.Thread(target=append, args=(number,), daemon=True) for number in range(THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    result.send(work)


# -- what happens to the cluster --------------------------------------------------------------------------------------


def killed(cluster: Cluster[Any]) -> None:
    old = cluster.writer
    cluster.kill(old)
    time.sleep(BEFORE_PROMOTION)
    cluster.promote()
    cluster.rejoin(old)


def frozen(cluster: Cluster[Any]) -> None:
    old = cluster.writer
    cluster.freeze(old)
    time.sleep(BEFORE_PROMOTION)
    cluster.promote()
    time.sleep(STEADY / 2)
    cluster.kill(old)
    cluster.rejoin(old)


def thawed(cluster: Cluster[Any]) -> None:
    old = cluster.writer
    cluster.freeze(old)
    time.sleep(BEFORE_PROMOTION)
    cluster.promote()
    time.sleep(STEADY / 2)
    cluster.thaw(old)
    time.sleep(STEADY / 2)
    cluster.rejoin(old)


def replaced(cluster: Cluster[Any]) -> None:
    old = cluster.writer
    cluster.promote()
    time.sleep(STEADY / 2)
    cluster.rejoin(old)


def crashed(cluster: Cluster[Any]) -> None:
    cluster.kill(cluster.writer)
    cluster.restart(cluster.writer)


def a_reader_dies(cluster: Cluster[Any], rnd: random.Random) -> None:
    reader = rnd.choice(cluster.readers)
    if rnd.random() < 0.5:
        cluster.kill(reader)
        time.sleep(0.5)
        cluster.rejoin(reader)
    else:
        cluster.freeze(reader)
        time.sleep(STEADY)
        cluster.thaw(reader)


FAULTS: tuple[Callable[[Cluster[Any]], None], ...] = (killed, frozen, thawed, replaced, crashed)
SHORT = (killed, frozen, replaced)


def main(how: Options) -> int:
    report = Report(f"soak: {PROCESSES} processes of {THREADS} threads, synchronous replication")
    seed = 0 if how.quick else int(time.time())
    rnd = random.Random(seed)
    progress(f"seed {seed}")
    fork = multiprocessing.get_context("spawn")
    faults: Counter[str] = Counter()
    with starting(how, report, synchronous=True) as cluster:
        cluster.execute("CREATE TABLE entry (id varchar(100) NOT NULL)")
        cluster.wait_in_sync()
        url, others = cluster.url, [reader.address for reader in cluster.readers]
        with Router(url, instances=others) as router:
            router.init_commit_table()
        stop = fork.Event()
        workers = []
        for number in range(PROCESSES):
            ours, theirs = fork.Pipe(duplex=False)
            # Use both ways to look up a COMMIT, if the engine has two.
            check = "table" if number == PROCESSES - 1 or not usual(drivers_for(how.engine)[0].PROTOCOL).HAS_XID_STATUS else "xid"
            process = fork.Process(target=append_rows, args=(number, url, others, check, stop, theirs), daemon=True)
            process.start()
            workers.append((process, ours))
        began = time.monotonic()
        try:
            for fault in SHORT if how.quick else itertools.cycle(FAULTS):
                time.sleep(STEADY)
                if not how.quick and time.monotonic() - began > SECONDS:
                    break
                fault(cluster)
                faults[fault.__name__] += 1
                progress(f"  {time.monotonic() - began:4.0f} s  {fault.__name__}, the writer is {cluster.writer.name}")
                cluster.wait_in_sync()
                if not how.quick and rnd.random() < 0.3:
                    a_reader_dies(cluster, rnd)
            time.sleep(STEADY)
        finally:
            stop.set()
        seconds = time.monotonic() - began
        results: list[Work] = []
        for process, ours in workers:
            if not ours.poll(120):
                raise TimeoutError("a process does not come to its end")
            results.append(ours.recv())
            process.join(30)
        stored = Counter(key for (key,) in cluster.execute("SELECT id FROM entry"))

    done = Counter(key for work in results for key in work.done)
    errors = [error for work in results for error in work.errors]
    for error in errors[:10]:
        progress(f"an error reached the application: {error}")
    failovers = faults.total() - faults["crashed"]
    pauses = [b - a for work in results for a, b in itertools.pairwise(sorted(work.times)) if b - a > 0.3]
    report.add("seconds", seconds, "s", None if how.quick else SECONDS, at_least=True)
    report.add("failovers", failovers, bound=3 if how.quick else 20, at_least=True)
    for name, count in sorted(faults.items()):
        report.add(f"  {name}", count)
    report.add("rows acknowledged", done.total(), bound=100, at_least=True)
    report.add("  of them missing", sum(key not in stored for key in done), bound=0)
    report.add("  of them there more than once", sum(stored[key] > 1 for key in done), bound=0)
    report.add("rows that nobody was told of", sum(key not in done for key in stored), bound=0)
    report.add("errors that reached the application", len(errors), bound=0)
    for name, count in sorted(sum((work.events for work in results), Counter()).items()):
        report.add(name, count)
    if pauses:
        report.add("pauses of a process, median", median(pauses), "s")
        report.add("  the longest", max(pauses), "s")
    return report.finish(how)


if __name__ == "__main__":
    sys.exit(main(options(__doc__)))
