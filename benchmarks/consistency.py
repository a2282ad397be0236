"""Read your own writes: are there stale reads, and how many of the reads do readers serve all the same?

A real cluster on loopback has one writer, one reader that replays 300 ms late, and one that is current. 8 threads serve 320
users. Each user has a RoutingSession of its own (consistency="session", the default), which lives as long as the user does. A
user repeats these steps:

    write (UPDATE of its own row, COMMIT), and read that row at once in a new unit: this is a pair. Then look at it four times
    more, with think time in between, and after the last (exponentially distributed, 0.4 s on average)

Each read asks for the row's version and, in the same statement, for the server's address. A function of the database returns
the address. The router learns from the catalog that this function only reads. A read is stale if the version is older than the
one whose COMMIT was acknowledged before the read began. Only its own user writes a row, so the expected version is exact. Users
wait in a queue per thread and overlap, as requests do in a service.

For comparison, the table shows a router that keeps a session on the writer for a fixed 2 s after each write. Its figures come
from this run's own times. A read that began 2 s or more after its session's last write counts as served by a reader.

The control is the same with consistency="eventual". It must show stale reads, because otherwise this benchmark could not see any.

The last part crosses processes: one process shows the writes of the other. processes.py describes that part.

Run: python benchmarks/consistency.py [--engine mariadb|mysql] [--quick] [--markdown]  20,000 pairs (--quick: 1,000), some minutes
"""

from __future__ import annotations

import heapq
import random
import sys
import threading
import time
from dataclasses import dataclass, field
from typing import Any

import processes
from common import Options, Report, options, progress, starting
from sqlalchemy import create_engine, func, select, update
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, sessionmaker

from aurora_router import Effect, Router, RoutingSession
from aurora_router.config.settings import Consistency
from aurora_router.local.cluster import Cluster

THREADS = 8
USERS_PER_THREAD = 40
LOOKS = 4  # further reads of a user, after a write and its first read
THINK = 0.4  # seconds, on average
LAG = 0.3
PIN = 2.0
ANSWERED_BY = {
    "postgresql": "CREATE FUNCTION answered_by() RETURNS text LANGUAGE sql STABLE AS 'SELECT host(inet_server_addr())'",
    "mariadb": "CREATE FUNCTION answered_by() RETURNS text READS SQL DATA RETURN @@bind_address",
    "mysql": "CREATE FUNCTION answered_by() RETURNS text READS SQL DATA RETURN @@bind_address",
}


class Base(DeclarativeBase):
    pass


class Profile(Base):
    __tablename__ = "profile"
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    version: Mapped[int]


@dataclass
class Read:
    """One read.

    age: seconds since the acknowledged write that it must see
    paired: it followed that write at once
    """

    age: float
    paired: bool
    server: str
    stale: bool


@dataclass
class User:
    """One session and what it has written."""

    key: int
    session: Session
    version: int = 0
    acknowledged: float = 0.0
    looks: int = 0  # left before the next write

    def write(self) -> None:
        self.session.execute(update(Profile).where(Profile.id == self.key).values(version=self.version + 1))
        self.session.commit()
        self.acknowledged = time.monotonic()
        self.version += 1
        self.looks = LOOKS

    def read(self, *, paired: bool) -> Read:
        began = time.monotonic()
        query = select(Profile.version, func.answered_by()).where(Profile.id == self.key)
        version, server = self.session.execute(query).one()
        self.session.rollback()
        return Read(began - self.acknowledged, paired, server, version < self.version)


@dataclass
class Pairs:
    """Pairs that are still to be made, shared by the threads."""

    left: int
    total: int = field(init=False)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.total = self.left

    def take(self) -> bool:
        with self.lock:
            if self.left <= 0:
                return False
            self.left -= 1
            done = self.total - self.left
            if done % max(self.total // 10, 1) == 0:
                progress(f"  {done:,} of {self.total:,} pairs")
            return True


def serve(users: list[User], pairs: Pairs, reads: list[Read], errors: list[BaseException], seed: int) -> None:
    """Run one thread: make each user's steps when they are due, until the looks of the last pair are done."""
    rng = random.Random(seed)
    now = time.monotonic()
    agenda = [(now + rng.expovariate(1 / THINK) * LOOKS, user.key, user) for user in users]
    heapq.heapify(agenda)
    try:
        while agenda and not errors:
            when, key, user = heapq.heappop(agenda)
            time.sleep(max(when - time.monotonic(), 0.0))
            if user.looks:
                user.looks -= 1
                reads.append(user.read(paired=False))
            elif pairs.take():
                user.write()
                reads.append(user.read(paired=True))
            else:
                continue
            heapq.heappush(agenda, (time.monotonic() + rng.expovariate(1 / THINK), key, user))
    except Exception as error:
        errors.append(error)


def run(cluster: Cluster[Any], consistency: Consistency, count: int) -> list[Read]:
    """Return all reads of one run.

    Raises the first error of a thread.
    """
    readers = [instance.address for instance in cluster.readers]
    with Router(cluster.url, instances=readers, consistency=consistency) as router:
        sessions = sessionmaker(class_=RoutingSession, router=router)
        with router.begin() as connection:
            connection.execute(update(Profile).values(version=0))
        cluster.wait_in_sync()
        while router.explain("SELECT answered_by()").effect is not Effect.READ:
            time.sleep(0.1)  # until the catalog has been read
        pairs, errors = Pairs(count), list[BaseException]()
        results: list[list[Read]] = [[] for _ in range(THREADS)]
        threads = []
        for number, reads in enumerate(results):
            users = [User(number * USERS_PER_THREAD + n, sessions()) for n in range(USERS_PER_THREAD)]
            threads.append(threading.Thread(target=serve, args=(users, pairs, reads, errors, number), daemon=True))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]
    return [read for reads in results for read in reads]


def share(part: int, whole: int) -> float:
    return 100 * part / whole if whole else 0.0


def measure(cluster: Cluster[Any], report: Report, count: int) -> None:
    """Add the figures of `count` pairs."""
    late = cluster.readers[0]
    cluster.set_lag(late, LAG)
    progress(f"{count:,} pairs, consistency=session")
    reads = run(cluster, "session", count)
    control = count // 10
    progress(f"the control: {control:,} pairs, consistency=eventual")
    eventual = run(cluster, "eventual", control)
    writer = cluster.writer.host

    paired = [read for read in reads if read.paired]
    after = [read for read in reads if not read.paired]
    report.add("pairs made", len(paired), bound=count, at_least=True)
    report.add("stale reads in pairs", sum(read.stale for read in paired), bound=0)
    report.add("stale reads among the looks that followed", sum(read.stale for read in after), bound=0)
    for name, some in (("all reads", reads), ("reads in pairs", paired), ("looks", after)):
        on_readers = sum(read.server != writer for read in some)
        pinned = sum(read.age >= PIN for read in some)
        report.add(f"{name}: {len(some):,}, served by readers", share(on_readers, len(some)), "%")
        report.add(f"  with a fixed pin of {PIN:g} s, in the same run", share(pinned, len(some)), "%")
    report.add("reads that the late reader served", share(sum(r.server == late.host for r in reads), len(reads)), "%")
    waits = sorted(read.age for read in reads if read.server != writer)
    if waits:
        report.add("soonest read on a reader after a write", waits[0] * 1000, "ms")
    stale = sum(read.stale for read in eventual)
    report.add(f"control, eventual: stale among {control:,} pairs and their looks", stale, bound=1, at_least=True)


def main(how: Options) -> int:
    report = Report(
        f"consistency: {THREADS} threads, {THREADS * USERS_PER_THREAD} sessions, one reader {LAG * 1000:.0f} ms late; "
        f"then {processes.PROCESSES} processes, {processes.USERS} users, one reader {processes.LAG * 1000:.0f} ms late"
    )
    with starting(how, report) as cluster:
        engine = create_engine(cluster.url)
        Base.metadata.create_all(engine)
        with Session(engine) as session:
            session.add_all(Profile(id=key, version=0) for key in range(THREADS * USERS_PER_THREAD))
            session.commit()
        engine.dispose()
        cluster.execute(ANSWERED_BY[how.engine])
        cluster.wait_in_sync()
        measure(cluster, report, 1_000 if how.quick else 20_000)
        processes.measure(cluster, report, quick=how.quick)
    return report.finish(how)


if __name__ == "__main__":
    sys.exit(main(options(__doc__)))
