"""A killed writer: how soon does a waiting unit write again, and is anything lost that was acknowledged?

A real cluster on loopback with synchronous replication (a COMMIT is acknowledged when one reader has it). Threads append
rows with keys of their own through RoutingSession, a unit that reads before each that writes, and note each key whose COMMIT
was acknowledged. 5 times (--quick: 2): the
writer is killed, 1 s later a reader is promoted, later the old writer comes back as a reader.

When the new writer accepts writes is seen by a witness with nothing of the router in it: connections to each reader, open
since before the kill, that try an INSERT every 2 ms from the kill on. One does so with synchronous_commit=local: its first
success says that the writer is *open*. With synchronous replication no COMMIT can be acknowledged before the remaining reader
streams from the new writer, whoever asks; so the other does what every application has to, and its first success says that
the writer *acknowledges*. A unit that was waiting is one that began before the writer was open. The bound is on the whole:
  the writer is open         -> the first waiting unit's COMMIT is acknowledged

For comparison, at the same time on the same cluster: SQLAlchemy's engine with libpq's list of hosts
(host=a,b,c target_session_attrs=read-write, pool_pre_ping=True), the same loop. Both loops answer an error with a pause of
20 ms and a new key; a unit of the router waits instead of failing.

Run: python benchmarks/failover.py [--quick] [--markdown]
"""

from __future__ import annotations

import itertools
import sys
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field

import psycopg
from common import Options, Report, median, options, progress
from sqlalchemy import URL, create_engine, make_url
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, sessionmaker

from aurora_router import Router, RouterError, RoutingSession
from aurora_router.core.events import Routed
from aurora_router.core.selection import Reason
from aurora_router.local import LocalInstance, PostgresCluster

THREADS = 4  # of each kind
PAUSE = 0.02  # seconds after an error, and between a thread's units (a fifth of it)
POLL = 0.002
BEFORE_PROMOTION = 1.0
STEADY = 2.0  # seconds of ordinary work before each kill


class Base(DeclarativeBase):
    pass


class Entry(Base):
    __tablename__ = "entry"
    key: Mapped[str] = mapped_column(primary_key=True)


@dataclass(frozen=True)
class Acknowledged:
    """A unit whose COMMIT was acknowledged. Times are monotonic seconds."""

    key: str
    began: float
    ended: float


@dataclass
class Application:
    """Threads that append rows through one kind of session."""

    name: str
    make: Callable[[], Session]
    done: list[Acknowledged] = field(default_factory=list)
    errors: list[tuple[float, str]] = field(default_factory=list)
    stop: threading.Event = field(default_factory=threading.Event)
    threads: list[threading.Thread] = field(default_factory=list)

    def start(self) -> None:
        for number in range(THREADS):
            thread = threading.Thread(target=self._work, args=(number,), daemon=True)
            thread.start()
            self.threads.append(thread)

    def _work(self, number: int) -> None:
        for turn in itertools.count():
            if self.stop.is_set():
                return
            key = f"{self.name}-{number}-{turn}"
            began = time.monotonic()
            try:
                with self.make() as session:
                    session.get(Entry, key)
                began = time.monotonic()
                with self.make() as session:
                    session.add(Entry(key=key))
                    session.commit()
            except (SQLAlchemyError, RouterError) as error:
                self.errors.append((time.monotonic(), f"{type(error).__name__}: {str(error).splitlines()[0]}"))
                time.sleep(PAUSE)
            else:
                self.done.append(Acknowledged(key, began, time.monotonic()))
                time.sleep(PAUSE / 5)

    def finish(self) -> None:
        self.stop.set()
        for thread in self.threads:
            thread.join(90)
            if thread.is_alive():
                raise RuntimeError(f"a thread of {self.name} does not come back")

    def first_after(
        self,
        moment: float,
    ) -> float | None:
        """When the first unit was acknowledged after a moment."""
        ends = [unit.ended for unit in list(self.done) if unit.ended > moment]
        return min(ends, default=None)

    def last_before(self, moment: float) -> float:
        return max(unit.ended for unit in list(self.done) if unit.ended <= moment)


class Witness:
    """Sees, through connections of its own to all readers, when one of them takes writes, and when it acknowledges them."""

    def __init__(self, readers: list[LocalInstance]) -> None:
        self.opened: float | None = None
        self.acknowledged: float | None = None
        self._connections = [(reader.connect(), reader.connect()) for reader in readers]
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._watch, args=(connection, local), daemon=True)
            for pair in self._connections
            for connection, local in zip(pair, (True, False), strict=True)
        ]
        for pair in self._connections:
            pair[0].execute("SET synchronous_commit = local")

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def _watch(self, connection: psycopg.Connection[tuple[object, ...]], local: bool) -> None:
        statement = f"INSERT INTO witness VALUES ({int(local)})"
        while not self._stop.is_set():
            try:
                connection.execute(statement)
            except psycopg.errors.ReadOnlySqlTransaction:
                time.sleep(POLL)
            except psycopg.Error:
                return  # this reader is gone, or is being rebuilt
            else:
                if local:
                    self.opened = time.monotonic()
                else:
                    self.acknowledged = time.monotonic()
                return

    def close(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(10)
        for pair in self._connections:
            for connection in pair:
                connection.close()


@dataclass
class Outage:
    """One promotion, in seconds.

    entered: open -> a waiting unit has its connection. acknowledges: open -> the writer acknowledges. waiting, slowest:
    the writer acknowledges -> the first and the last waiting unit's COMMIT. engine: the same for the engine's first unit.
    silence: by application, from its last acknowledged write to the next.
    """

    entered: float
    acknowledges: float
    waiting: float
    slowest: float
    engine: float
    silence: dict[str, float]


def wait_until(satisfied: Callable[[], bool], what: str, timeout: float = 60.0) -> None:
    deadline = time.monotonic() + timeout
    while not satisfied():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {timeout:g} s for {what}")
        time.sleep(0.01)


def promote(
    cluster: PostgresCluster, routed: Application, plain: Application, router: Router, entries: list[tuple[float, str]]
) -> Outage:
    old = cluster.writer
    with ExitStack() as stack:
        witness = Witness(list(cluster.readers))
        stack.callback(witness.close)
        killed = time.monotonic()
        cluster.kill(old)
        dead = time.monotonic()
        witness.start()
        time.sleep(max(killed + BEFORE_PROMOTION - time.monotonic(), 0.0))
        cluster.promote()
        wait_until(lambda: witness.acknowledged is not None and witness.opened is not None, "the new writer to take writes")
        opened, acknowledged = witness.opened, witness.acknowledged
        assert opened is not None
        assert acknowledged is not None
        wait_until(lambda: plain.first_after(dead) is not None, "a write of the engine's application")
        wait_until(lambda: len(_waiting(routed, opened, dead)) == THREADS, "all waiting units", 10.0)
    waiting = _waiting(routed, opened, dead)
    firsts = {application.name: application.first_after(dead) or 0.0 for application in (routed, plain)}
    outage = Outage(
        entered=min(when for when, instance in list(entries) if when > dead and instance == cluster.writer.address) - opened,
        acknowledges=acknowledged - opened,
        waiting=min(waiting) - acknowledged,
        slowest=max(waiting) - acknowledged,
        engine=firsts[plain.name] - acknowledged,
        silence={application.name: firsts[application.name] - application.last_before(dead) for application in (routed, plain)},
    )
    progress(
        f"  {old.name} killed, {cluster.writer.name} open after {opened - killed:.3f} s; from there, in ms: a waiting unit is "
        f"connected {outage.entered * 1000:.1f}, the writer acknowledges {outage.acknowledges * 1000:.1f}; from there: the first "
        f"waiting unit {outage.waiting * 1000:.1f}, the last {outage.slowest * 1000:.1f}, the engine {outage.engine * 1000:.1f}"
    )
    cluster.rejoin(old)
    wait_until(lambda: len(router.topology.readers) == 2, "the router to see two readers")
    return outage


def _waiting(application: Application, opened: float, dead: float) -> list[float]:
    """When the units were acknowledged that had begun before the new writer was open."""
    return [unit.ended for unit in list(application.done) if unit.began < opened and unit.ended > dead]


def multi_host(cluster: PostgresCluster) -> URL:
    """The cluster's instances in one URL, as libpq takes them."""
    hosts = tuple(instance.address for instance in cluster.instances)
    url = make_url(cluster.url)
    return url.set(host=None, port=None).update_query_dict({"host": hosts, "target_session_attrs": "read-write"})


def main(how: Options) -> int:
    promotions = 2 if how.quick else 5
    report = Report(f"failover: {promotions} promotions of a killed writer, {THREADS} writing threads of each kind")
    progress("starting a cluster")
    with PostgresCluster(readers=2, synchronous=True) as cluster:
        engine = create_engine(multi_host(cluster), pool_pre_ping=True)
        Base.metadata.create_all(engine)
        cluster.execute("CREATE TABLE witness (n int)")
        cluster.wait_in_sync()
        entries: list[tuple[float, str]] = []

        def entered(event: object) -> None:
            if isinstance(event, Routed) and event.reason is Reason.NO_WRITER:  # a unit that waited
                entries.append((time.monotonic(), event.instance))

        readers = [reader.address for reader in cluster.readers]
        with Router(cluster.url, instances=readers, listeners=[entered]) as router:
            routed = Application("router", sessionmaker(class_=RoutingSession, router=router))
            plain = Application("engine", sessionmaker(engine))
            routed.start()
            plain.start()
            outages = []
            for number in range(promotions):
                progress(f"promotion {number + 1} of {promotions}")
                time.sleep(STEADY)
                outages.append(promote(cluster, routed, plain, router, entries))
            time.sleep(STEADY)
            routed.finish()
            plain.finish()
        engine.dispose()
        stored = {key for (key,) in cluster.execute("SELECT key FROM entry")}

    lost = {app.name: sum(unit.key not in stored for unit in app.done) for app in (routed, plain)}
    report.add("promotions", len(outages), bound=promotions, at_least=True)
    report.add(
        "new writer open -> first waiting unit's write, median", _ms(o.acknowledges + o.waiting for o in outages), "ms", 50
    )
    report.add("  the longest of all promotions", max(o.acknowledges + o.waiting for o in outages) * 1000, "ms")
    report.add("  until the waiting unit is connected, median", _ms(o.entered for o in outages), "ms")
    report.add("  until all waiting units had written, median", _ms(o.acknowledges + o.slowest for o in outages), "ms")
    report.add("  a plain connection that was open already, median", _ms(o.acknowledges for o in outages), "ms")
    report.add("  engine with a list of hosts, median", _ms(o.acknowledges + o.engine for o in outages), "ms")
    report.add(f"acknowledged writes lost, of {len(routed.done):,}", lost["router"], bound=0)
    report.add(f"  engine, of {len(plain.done):,}", lost["engine"], bound=0)
    report.add("errors that reached the application", len(routed.errors))
    report.add("  engine", len(plain.errors))
    report.add("seconds without a write, per promotion, median", median(o.silence["router"] for o in outages), "s")
    report.add("  engine", median(o.silence["engine"] for o in outages), "s")
    kinds = sorted({said.split(":")[0] for _, said in routed.errors})
    progress(f"errors of the router's application: {', '.join(kinds) or 'none'}")
    return report.finish(how)


def _ms(seconds: Iterable[float]) -> float:
    return median(seconds) * 1000


if __name__ == "__main__":
    sys.exit(main(options(__doc__)))
