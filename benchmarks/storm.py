"""The writer dies while many clients use it: how many connects does that cost the servers, and when are all served again?

1. Simulated, with the pure core: 10,000 clients in 100 processes, 1 writer and 15 readers, virtual time. At 0 s the writer dies,
   and all connections to it with it. At 1 s a reader has been promoted. Every client wants one connection to the writer.
   A modelled server has 8 cores, first come first served. A connect takes one of them for 2 ms, and in a second run for 5 ms.
   (A local server took 2 ms, with neither TLS nor a large catalog.) A connect that is not answered within 3 s is given up, but
   has cost its work all the same. There is no limit of connections. A dead instance refuses within 0.5 ms without any work.
   - router: each process decides by observe() and to_writer() on the observations of its own monitor (every 20 ms while there is
     no writer). Its clients wait for a topology with a writer. 4 of them connect at once, spread by connect_jitter().
   - naive: each client tries one instance after the other until one is the writer, and begins anew at once.
2. Real: 200 threads on a local cluster of 3 hold a transaction each on the writer. It is killed, and a reader promoted 1 s later.
   Each thread wants to write one row. A connect is a call of psycopg.connect().
   - router: run_transaction
   - naive: a SQLAlchemy engine for each instance, tried in turn until one takes the row, without a pause

Run: python benchmarks/storm.py [--quick] [--markdown]      (--quick: 1,000 clients in 10 processes, and 50 threads)
"""

from __future__ import annotations

import heapq
import random
import sys
import threading
import time
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import psycopg
from common import Options, Report, options, progress, starting
from sqlalchemy import Engine, create_engine, text
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import sessionmaker

from aurora_router import Router, RoutingSession
from aurora_router.core import topology as core
from aurora_router.core.instance import Instance, Observation, ProbeFailure, Role, ServerId, ServerStatus
from aurora_router.core.pacing import MOST, connect_jitter
from aurora_router.core.selection import Reason, to_writer
from aurora_router.core.topology import Topology
from aurora_router.local.cluster import Cluster

READERS = 15
PROCESSES, CLIENTS = 100, 100  # clients of each process
PROMOTED = 1.0  # seconds after the death
CORES = 8  # of a server
WORK = (0.002, 0.005)  # seconds of a core for a connect
GIVE_UP = 3.0  # seconds
REFUSAL = 0.0005
NETWORK = 0.0005  # seconds there and back
AT_ONCE = 4  # the router's default
HURRY = 0.02
LIMIT = 60.0  # virtual seconds after which the simulation gives up


# -- simulated ---------------------------------------------------------------------------------------------------------


class World:
    """Virtual time, and the servers' work on connects."""

    def __init__(self, seed: int, work: float) -> None:
        self.now = 0.0
        self.work = work
        self.most = 0  # connects that were under way at one server at one moment
        self.rnd = random.Random(seed)
        self.connects: dict[int, list[float]] = {number: [] for number in range(READERS + 1)}
        self.served: list[float] = []
        self._queue: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0
        self._under_way: dict[int, deque[float]] = {number: deque() for number in range(READERS + 1)}  # when each ends
        self._cores = {number: [0.0] * CORES for number in range(READERS + 1)}  # when each is free again

    def at(self, delay: float, action: Callable[[], None]) -> None:
        self._count += 1
        heapq.heappush(self._queue, (self.now + delay, self._count, action))

    def run(self, clients: int) -> None:
        while self._queue and len(self.served) < clients and self.now < LIMIT:
            self.now, _, action = heapq.heappop(self._queue)
            action()

    def is_writer(self, number: int) -> bool:
        return number == 1 and self.now >= PROMOTED

    def connect(self, number: int, done: Callable[[bool], None]) -> None:
        """Connect to a server, then call `done` with whether it answered in time."""
        self.connects[number].append(self.now)
        if number == 0:
            self.at(REFUSAL, lambda: done(False))
            return
        cores = self._cores[number]
        free = max(heapq.heappop(cores), self.now)
        # A client that has given up costs the same, because the server learns that only at the end.
        heapq.heappush(cores, free + self.work)
        under_way = self._under_way[number]
        while under_way and under_way[0] <= self.now:
            under_way.popleft()
        under_way.append(free + self.work)
        self.most = max(self.most, len(under_way))
        took = free + self.work - self.now + NETWORK
        self.at(min(took, GIVE_UP), lambda: done(took <= GIVE_UP))


class Process:
    """One process with a router: its monitor's topology, its clients, and the places for its connects."""

    def __init__(self, world: World, clients: int) -> None:
        self.world = world
        self.free = AT_ONCE
        self.waiting: deque[int] = deque()
        self.clients = clients
        self.topology = Topology()
        for number in range(READERS + 1):
            self.topology = core.add(self.topology, Instance(f"db-{number}", f"db-{number}", 5432))
            self.hear(number, -1.0, Role.READER if number else Role.WRITER, 1)

    def start(self) -> None:
        # A statement on each lost connection makes the writer suspect. The probe of the writer is refused at once.
        self.world.at(self.world.rnd.random() * HURRY, self.probe)

    def hear(self, number: int, asked_at: float, role: Role, epoch: int) -> None:
        server = ServerStatus(ServerId("1", f"db-{number}", 5432, "0"), role, epoch)
        self.topology = core.observe(self.topology, Observation(f"db-{number}", asked_at, asked_at, server=server))

    def probe(self) -> None:
        """Observe all instances as the monitor does. The clients wait for a writer."""
        now = self.world.now
        about = ServerId("1", "db-0", 5432, "0")
        self.topology = core.observe(
            self.topology, Observation("db-0", now, now, about=about, probe_failure=ProbeFailure.REFUSED, error="refused")
        )
        for number in range(1, READERS + 1):
            promoted = self.world.is_writer(number)
            self.hear(number, now, Role.WRITER if promoted else Role.READER, 2 if promoted else 1)
        writer = to_writer(self.topology, Reason.DECLARED_WRITE).instance
        if writer is None:
            self.world.at(HURRY, self.probe)
            return
        for client in range(self.clients):
            self.enter(int(writer.id.removeprefix("db-")), client)

    def enter(self, number: int, ahead: int) -> None:
        if self.free == 0:
            self.waiting.append(ahead)
            return
        self.free -= 1
        self.world.at(
            connect_jitter(ahead, self.world.rnd.random()), lambda: self.world.connect(number, lambda ok: self.left(number, ok))
        )

    def left(self, number: int, ok: bool) -> None:
        self.free += 1
        if ok:
            self.world.served.append(self.world.now)
        else:
            self.waiting.append(len(self.waiting))
        if self.waiting:
            self.enter(number, self.waiting.popleft())


def naive(world: World) -> None:
    """Run one client, which tries the next instance at once, whatever the last one answered."""

    def attempt(number: int) -> None:
        def done(ok: bool) -> None:
            if ok and world.is_writer(number):
                world.served.append(world.now)
            else:
                attempt((number + 1) % (READERS + 1))

        world.connect(number, done)

    attempt(0)


def peak(times: Iterable[float]) -> int:
    """Return the largest number of moments within one second."""
    ordered = sorted(times)
    return max((bisect_left(ordered, moment + 1.0) - index for index, moment in enumerate(ordered)), default=0)


def simulated(report: Report, how: Options) -> None:
    processes = 10 if how.quick else PROCESSES
    for work in WORK:
        simulated_at(report, processes, work)


def simulated_at(report: Report, processes: int, work: float) -> None:
    """Simulate the storm.

    work: seconds of a core that a connect costs a server
    """
    clients = processes * CLIENTS
    progress(f"{clients:,} simulated clients, {work * 1000:g} ms for a connect")
    worlds = {}
    for name in ("router", "naive"):
        world = worlds[name] = World(1, work)
        if name == "router":
            for _ in range(processes):
                Process(world, CLIENTS).start()
        else:
            for _ in range(clients):
                world.at(world.rnd.random() * 0.001, lambda world=world: naive(world))  # type: ignore[misc]
        world.run(clients)
    ours, theirs = worlds["router"], worlds["naive"]
    what = f"simulated, {work * 1000:g} ms for a connect: clients served, of {clients:,}"
    report.add(what, len(ours.served), bound=clients, at_least=True)
    report.add("  naive", len(theirs.served))
    most, their_most = (max(peak(times) for times in world.connects.values()) for world in (ours, theirs))
    # The bound: the connects that a server can serve in a second, and those that may be under way at one moment. With more, the
    # queue would grow.
    report.add("  peak connects a second to one instance", most, bound=CORES / work + AT_ONCE * processes)
    report.add("    naive", their_most)
    report.add("  connects under way at one instance at one moment, at most", ours.most, bound=AT_ONCE * processes)
    report.add("    naive", theirs.most)
    report.add("  connects in all", sum(map(len, ours.connects.values())), bound=1.1 * clients)
    report.add("    naive", sum(map(len, theirs.connects.values())))
    # The least possible time is the larger of two: the new writer's for all clients, and a process's for its own clients, with
    # pauses of MOST / 2 on average. The bound allows half as much again.
    least = max(clients * work / CORES, CLIENTS * MOST / 2 / AT_ONCE)
    report.add("  promotion -> all are served", max(ours.served) - PROMOTED, "s", 1.5 * least + 0.1)
    done = len(theirs.served) == clients
    report.add("    naive" if done else "    naive, not yet after", (max(theirs.served) if done else LIMIT) - PROMOTED, "s")


# -- real --------------------------------------------------------------------------------------------------------------


@dataclass
class Connects:
    """The calls of psycopg.connect(), each with its moment (seconds, monotonic) and its host."""

    calls: list[tuple[float, str]] = field(default_factory=list)

    @contextmanager
    def counted(self) -> Iterator[None]:
        connect: Any = psycopg.connect

        def counting(*args: Any, **options: Any) -> Any:
            self.calls.append((time.monotonic(), str(options.get("host"))))
            return connect(*args, **options)

        psycopg.connect = counting
        try:
            yield
        finally:
            psycopg.connect = connect

    def peak(self) -> int:
        return max(peak(moment for moment, host in self.calls if host == one) for one in {host for _, host in self.calls})


def crowd(cluster: Cluster[Any], threads: int, hold: Callable[[threading.Barrier, int], None]) -> tuple[Connects, float]:
    """Let threads hold a transaction, kill the writer, and promote a reader.

    Returns the connects after the kill, and the seconds from the promotion until the last thread was served.
    """
    ready = threading.Barrier(threads + 1)
    errors: list[BaseException] = []

    def work(number: int) -> None:
        try:
            hold(ready, number)
        except BaseException as error:
            errors.append(error)
            ready.abort()

    workers = [threading.Thread(target=work, args=(number,), daemon=True) for number in range(threads)]
    connects = Connects()
    with connects.counted():
        for worker in workers:
            worker.start()
        ready.wait(60)
        connects.calls.clear()
        cluster.kill(cluster.writer)
        ready.wait(60)  # now each of them goes on
        time.sleep(PROMOTED)
        cluster.promote()
        promoted = cluster.last_promotion or time.monotonic()
        for worker in workers:
            worker.join(60)
            if worker.is_alive():
                raise TimeoutError("a thread is not served")
        took = time.monotonic() - promoted
    if errors:
        raise errors[0]
    return connects, took


def through_router(cluster: Cluster[Any], threads: int) -> tuple[Connects, float]:
    others = [reader.address for reader in cluster.readers]
    with Router(cluster.url, instances=others, engine_options={"pool_size": threads}) as router:
        Session = sessionmaker(class_=RoutingSession, router=router)

        def hold(ready: threading.Barrier, number: int) -> None:
            first = True

            def append(session: RoutingSession) -> None:
                nonlocal first
                session.execute(text("INSERT INTO entry VALUES (:n)"), {"n": number})
                if first:
                    first = False
                    ready.wait(60)
                    ready.wait(60)

            router.run_transaction(Session, append)

        return crowd(cluster, threads, hold)


def naively(cluster: Cluster[Any], threads: int) -> tuple[Connects, float]:
    engines = [create_engine(instance.url, pool_size=threads) for instance in cluster.instances]
    writer = engines[[*cluster.instances].index(cluster.writer)]
    insert = text("INSERT INTO entry VALUES (:n)")

    def again(number: int, engine: Engine) -> bool:
        try:
            with engine.begin() as connection:
                connection.execute(insert, {"n": number})
        except SQLAlchemyError:
            engine.dispose()  # the connections in its pool may be dead
            return False
        return True

    def hold(ready: threading.Barrier, number: int) -> None:
        try:
            with writer.begin() as connection:
                connection.execute(insert, {"n": number})
                ready.wait(60)
                ready.wait(60)
        except SQLAlchemyError:
            while not any(again(number, engine) for engine in engines):
                pass

    try:
        return crowd(cluster, threads, hold)
    finally:
        for engine in engines:
            engine.dispose()


def real(report: Report, how: Options) -> None:
    threads = 50 if how.quick else 200
    progress(f"{threads} real threads")
    # Naive threads close connections faster than a server notices. promote() needs room beside those that are left over.
    settings = {"max_connections": str(10 * threads + 500)}
    measured = {}
    with starting(how, report, settings=settings) as cluster:
        cluster.execute("CREATE TABLE entry (n int)")
        for name, contestant in (("router", through_router), ("naive", naively)):
            progress(f"  {name}")
            cluster.wait_in_sync()
            old = cluster.writer
            measured[name] = contestant(cluster, threads)
            cluster.rejoin(old)
    (ours, took), (theirs, their_took) = measured["router"], measured["naive"]
    report.add(f"{threads} real threads: peak connects a second to one instance", ours.peak(), bound=2.0 * threads)
    report.add("  naive", theirs.peak())
    report.add("  connects in all", len(ours.calls), bound=3.0 * threads)
    report.add("    naive", len(theirs.calls))
    report.add("  promotion -> all are served", took, "s", 10.0)
    report.add("    naive", their_took, "s")


def main(how: Options) -> int:
    report = Report("storm: the writer dies under a crowd")
    simulated(report, how)
    real(report, how)
    return report.finish(how)


if __name__ == "__main__":
    sys.exit(main(options(__doc__, engines=["postgresql"])))
