"""The cost of routing, side by side with plain SQLAlchemy in one run.

A real cluster on loopback has one writer and two readers. In each of many rounds the router and its competitor make the same
units against the same instance, one after the other in turning order. A ratio is the median over the rounds of router /
competitor. Pools have SQLAlchemy's default settings on both sides. The client has one core and the servers another, as on two
machines. Otherwise the scheduler's choice of cores would decide the ratios: a competitor run against itself, printed as noise,
came out at up to 1.10. Round trips are about as cheap here as they can be, which puts the router at a disadvantage. An
automatic read needs one, a plain unit three (counted on the wire). Across a network that saving counts for more.

  automatic read    with Session() as s: s.get(Row, id)         RoutingSession against Session on an engine of that reader
  insert, commit    with Session() as s: s.add(Row()); commit   RoutingSession against Session on an engine of the writer
  text(), lock      the same with an INSERT as text(), and with select().with_for_update(): no flush shows that they write
  run_transaction   the same insert in router.run_transaction, against the plain Session's insert and commit; on MariaDB with the
                    row in the commit table that it needs there
  connect           with router.connect(read_only=True) and one statement, against engine.connect()
  request           an ASGI application that makes one ORM read, behind AsgiMiddleware against bare: without a cookie, and with a
                    signed token in one. The difference of each round, not a ratio, because a server adds the same to both
  decision          for a text seen before, three instances: the unit, the analysis of its text, and where it goes
  classify          texts of 366 bytes, each of them new
  import            CPU time of `import aurora_router` in new processes that have imported sqlalchemy.orm and the driver (files
                    are in memory by then; wall-clock time is the same if nothing else uses the core)
  monitor           CPU time of a process with an idle router of three instances, less that of the same without it. It is
                    measured for 30 s, one period of the monitor's rarest tasks (--quick: 8 s)

Run: python benchmarks/overhead.py [--engine mariadb|mysql] [--quick] [--markdown]
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, MutableMapping
from typing import Any

from common import Options, Report, interleave, median, options, progress, ratio, starting, take_core
from sqlalchemy import Executable, String, bindparam, create_engine, make_url, select, text
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, sessionmaker

from aurora_router import Effect, Router, RoutingSession, classify
from aurora_router.core.sql.analysis import analyze
from aurora_router.drivers import drivers_for
from aurora_router.local import FaultProxy
from aurora_router.local.cluster import Cluster
from aurora_router.middleware import AsgiApp, AsgiMiddleware, Message, Receive, Send
from aurora_router.router import core_of
from aurora_router.routing.unit import AUTOMATIC, Unit
from aurora_router.servers import usual

US = 1e6
NEW_TEXT_BYTES = 366
WIRE_UNITS = 50

IMPORTS = """
import sys, time
a = time.process_time()
import sqlalchemy, {orm}{driver}
b = time.process_time()
import aurora_router
c = time.process_time()
print(b - a, c - b)
"""


class Base(DeclarativeBase):
    pass


class Row(Base):
    __tablename__ = "row"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(100))
    amount: Mapped[int]


def main(how: Options) -> int:
    report = Report("overhead: a local cluster, 1 writer and 2 readers; medians of interleaved rounds")
    importing(report, how)
    take_core(0)
    classifying(report, how)
    take_core(-1)
    with starting(how, report) as cluster:
        take_core(0)
        engine = create_engine(cluster.url)
        Base.metadata.create_all(engine)
        with Session(engine) as session:
            session.add_all(Row(id=number, name=f"row {number}", amount=number) for number in range(-100, 0))
            session.commit()
        engine.dispose()
        cluster.wait_in_sync()
        reading(report, how, cluster)
        writing(report, how, cluster)
        connecting(report, how, cluster)
        requesting(report, how, cluster)
        deciding(report, how, cluster)
        on_the_wire(report, cluster)
        monitoring(report, how, cluster)
    return report.finish(how)


def reading(report: Report, how: Options, cluster: Cluster[Any]) -> None:
    """Measure an automatic unit of one ORM read. The router has one reader, so that both sides ask the same instance."""
    progress("one ORM read")
    reader = cluster.readers[0]
    plain_engine = create_engine(reader.url)
    addresses = [i.address for i in cluster.readers]
    with Router(cluster.url, instances=addresses[:1]) as router, Router(cluster.url, instances=addresses) as wide:
        routed_session = sessionmaker(class_=RoutingSession, router=router)
        wide_session = sessionmaker(class_=RoutingSession, router=wide)
        plain_session = sessionmaker(plain_engine)

        def routed() -> None:
            with routed_session() as session:
                session.get_one(Row, -1)

        def balanced() -> None:
            with wide_session() as session:
                session.get_one(Row, -1)

        def plain() -> None:
            with plain_session() as session:
                session.get_one(Row, -1)

        ours, theirs, both, itself = interleave((routed, plain, balanced, plain), rounds=20 if how.quick else 100, units=100)
    plain_engine.dispose()
    report.add("one ORM read, automatic unit / plain Session", ratio(ours, theirs), "x", 0.80)
    report.add("  automatic unit", median(ours) * US, "us")
    report.add("  automatic unit, balanced over two readers", median(both) * US, "us")
    report.add("  plain Session", median(theirs) * US, "us")
    report.add("  noise: plain Session / itself", ratio(itself, theirs), "x")


def writing(report: Report, how: Options, cluster: Cluster[Any]) -> None:
    """Measure an automatic unit of one insert and commit, and other units that must be on the writer."""
    progress("one insert and commit")
    plain_engine = create_engine(cluster.url)
    with Router(cluster.url, instances=[i.address for i in cluster.readers]) as router:
        routed_session = sessionmaker(class_=RoutingSession, router=router)
        plain_session = sessionmaker(plain_engine)

        def routed() -> None:
            with routed_session() as session:
                session.add(Row(name="new", amount=1))
                session.commit()

        def plain() -> None:
            with plain_session() as session:
                session.add(Row(name="new", amount=1))
                session.commit()

        def again() -> None:
            router.run_transaction(routed_session, lambda session: session.add(Row(name="new", amount=1)))

        def by(make: Callable[[], Session], statement: Executable) -> Callable[[], None]:
            def execute() -> None:
                with make() as session:
                    session.execute(statement, {"id": -1})
                    session.commit()

            return execute

        rounds = 20 if how.quick else 100
        ours, run, theirs = interleave((routed, again, plain), rounds=rounds, units=50)
        table = plain_engine.dialect.identifier_preparer.format_table(Row.__table__)  # a reserved word on MySQL
        insert = text(f"INSERT INTO {table} (name, amount) VALUES ('new', :id)")
        lock = select(Row).where(Row.id == bindparam("id")).with_for_update()
        texts = interleave((by(routed_session, insert), by(plain_session, insert)), rounds=rounds, units=50)
        locks = interleave((by(routed_session, lock), by(plain_session, lock)), rounds=rounds, units=50)
    plain_engine.dispose()
    report.add("one insert and commit, automatic unit / plain Session", ratio(ours, theirs), "x", 1.10)
    report.add("  automatic unit", median(ours) * US, "us")
    report.add("  plain Session", median(theirs) * US, "us")
    for name, (mine, other) in (("text() insert and commit", texts), ("select().with_for_update() and commit", locks)):
        report.add(f"{name}, automatic unit / plain Session", ratio(mine, other), "x", 1.15)
        report.add("  automatic unit", median(mine) * US, "us")
        report.add("  plain Session", median(other) * US, "us")
    report.add("one insert in run_transaction / plain Session's insert and commit", ratio(run, theirs), "x", 1.35)
    where = "by their xid" if usual(drivers_for(how.engine)[0].PROTOCOL).HAS_XID_STATUS else "in the commit table"
    report.add(f"  run_transaction, which looks lost COMMITs up {where}", median(run) * US, "us")


def connecting(report: Report, how: Options, cluster: Cluster[Any]) -> None:
    """Measure a Connection, one Core statement on it, and its return to the pool."""
    progress("connect() with one statement")
    reader = cluster.readers[0]
    statement = select(Row.name).where(Row.id == -1)
    engine = create_engine(reader.url)
    with Router(cluster.url, instances=[reader.address]) as router:

        def routed() -> None:
            with router.connect(read_only=True) as connection:
                connection.execute(statement).scalar_one()

        def plain() -> None:
            with engine.connect() as connection:
                connection.execute(statement).scalar_one()

        ours, theirs = interleave((routed, plain), rounds=20 if how.quick else 100, units=100)
    engine.dispose()
    report.add("router.connect(read_only=True) / engine.connect(), one statement", ratio(ours, theirs), "x", 1.10)
    report.add("  router.connect(read_only=True)", median(ours) * US, "us")
    report.add("  engine.connect()", median(theirs) * US, "us")


def requesting(report: Report, how: Options, cluster: Cluster[Any]) -> None:
    """Measure a request that only reads. Nothing in it waits for an event loop, so none is needed to run it."""
    progress("a request through the middleware")
    readers = [cluster.readers[0].address]
    with Router(cluster.url, instances=readers, token_keys=["a secret"], token_ttl=3600.0) as router:
        routed_session = sessionmaker(class_=RoutingSession, router=router)
        with routed_session() as session:
            session.add(Row(name="new", amount=1))
            session.commit()
            token = session.consistency_token
        assert token is not None
        with router.causal_scope(token):
            while router.explain("SELECT 1").instance not in router.topology.readers:
                time.sleep(0.01)

        async def app(scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
            with routed_session() as session:
                session.get_one(Row, -1)
            await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]})
            await send({"type": "http.response.body", "body": b"row"})

        async def receive() -> Message:
            raise AssertionError("nobody asks for the body")

        async def send(message: Message) -> None:
            assert len(message.get("headers", ())) <= 1, "no token is told"

        def asks(asked: AsgiApp, cookies: str) -> Callable[[], None]:
            headers = [(f"x-header-{number}".encode(), b"of a browser") for number in range(10)]
            headers.append((b"cookie", cookies.encode()))
            scope = {"type": "http", "scheme": "https", "method": "GET", "path": "/", "headers": headers}

            def ask() -> None:
                with contextlib.suppress(StopIteration):
                    asked(scope, receive, send).__await__().send(None)

            return ask

        behind = AsgiMiddleware(app, router)
        theirs = f"theme=dark; session={'x' * 100}"
        contestants = (asks(app, theirs), asks(behind, theirs), asks(behind, f"{theirs}; aurora_router={token}"))
        bare, without, signed = interleave(contestants, rounds=20 if how.quick else 100, units=100)
    for name, ours in (("without a cookie", without), ("with a signed token in its cookie", signed)):
        more = median(mine - other for mine, other in zip(ours, bare, strict=True))
        report.add(f"a request with one ORM read, behind AsgiMiddleware - bare, {name}", more * US, "us", 30.0)
    report.add("  bare", median(bare) * US, "us")


def deciding(report: Report, how: Options, cluster: Cluster[Any]) -> None:
    """Measure the decision about a unit's instance, without SQLAlchemy and without the server."""
    progress("a routing decision")
    text = str(select(Row).where(Row.id == 1))
    with Router(cluster.url, instances=[i.address for i in cluster.readers]) as router:
        assert len(router.topology.readers) == 2
        calls = range(1000)
        core = core_of(router)

        def decide() -> None:
            for _ in calls:
                found = analyze(text, how.engine)
                effect = core.interceptor.known.effect(found) if found.functions else found.effect
                if effect is Effect.READ:
                    core.checkout.decide(Unit(AUTOMATIC), None)

        def explain() -> None:
            for _ in calls:
                router.explain(text)

        assert router.explain(text).instance in router.topology.readers
        ours, public = interleave((decide, explain), rounds=20 if how.quick else 100, units=2)
    report.add("a routing decision, text seen before, 3 instances", median(ours) / len(calls) * US, "us", 2.0)
    report.add("  the same through router.explain()", median(public) / len(calls) * US, "us")


def classifying(report: Report, how: Options) -> None:
    """Measure the classifier on texts as the ORM makes them. Each is classified once, so that no cache helps."""
    progress("classifying new texts")
    columns = ", ".join(f"customer_order.{name}" for name in ("id", "customer_id", "placed_at", "state", "total", "note"))
    tail = (
        " \nFROM customer_order JOIN customer ON customer.id = customer_order.customer_id"
        " \nWHERE customer_order.state = %(state_1)s AND customer_order.total > %(total_1)s \n LIMIT %(param_1)s"
    )
    numbers = itertools.count()
    took = []
    for turn in range(23 if how.quick else 103):
        texts = []
        for _ in range(100):
            text = f"SELECT {columns}, customer_order.c{next(numbers):09d}"
            texts.append(text.ljust(NEW_TEXT_BYTES - len(tail), "x") + tail)
        assert {len(text.encode()) for text in texts} == {NEW_TEXT_BYTES}
        gc.collect()
        began = time.perf_counter()
        effects = [classify(text, how.engine) for text in texts]
        if turn >= 3:
            took.append((time.perf_counter() - began) / len(texts))
        assert set(effects) == {Effect.READ}
    report.add(f"classify a new SELECT of {NEW_TEXT_BYTES} bytes", median(took) * US, "us", 60.0)


def importing(report: Report, how: Options) -> None:
    """Measure the import of this package's requirements, and then of this package. Each measurement has a new process."""
    progress("importing")
    driver = drivers_for(how.engine)[0].NAME
    took: dict[str, list[tuple[float, float]]] = {"sqlalchemy.orm, ": [], "": []}
    # A package that pip installs has bytecode, as SQLAlchemy has here. So this package must have it, too, even if the shell's
    # environment forbids it.
    surroundings = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    for turn in range(8 if how.quick else 31):
        for orm, times in took.items():
            script = IMPORTS.format(orm=orm, driver=driver)
            command = [sys.executable, "-c", script]
            said = subprocess.run(command, capture_output=True, text=True, check=True, env=surroundings).stdout
            base, ours = (float(number) for number in said.split())
            if turn:  # the first one writes bytecode
                times.append((base, ours))
    with_orm, without = took.values()
    report.add(f"import aurora_router, beyond sqlalchemy.orm and {driver}", median(t[1] for t in with_orm) * 1e3, "ms", 60.0)
    report.add(f"  import sqlalchemy, sqlalchemy.orm, {driver}", median(t[0] for t in with_orm) * 1e3, "ms")
    report.add("  import aurora_router where nothing has imported sqlalchemy.orm", median(t[1] for t in without) * 1e3, "ms")


def on_the_wire(report: Report, cluster: Cluster[Any]) -> None:
    """Count the round trips of a unit with a proxy in front of the instance. The monitor is too slow to interfere."""
    progress("round trips on the wire")
    reader, writer = cluster.readers[0], cluster.writer
    with FaultProxy((reader.host, reader.port)) as to_reader, FaultProxy((writer.host, writer.port)) as to_writer:
        url = make_url(cluster.url).set(host=to_writer.host, port=to_writer.port)
        reader_engine, writer_engine = create_engine(url.set(port=to_reader.port)), create_engine(url)
        with Router(url, instances=[to_reader.address], probe_interval=600.0, consistency="eventual") as router:
            routed_session = sessionmaker(class_=RoutingSession, router=router)

            def count(proxy: FaultProxy, unit: Callable[[], object]) -> float:
                for _ in range(10):
                    unit()
                proxy.reset_counts()
                for _ in range(WIRE_UNITS):
                    unit()
                return proxy.syncs / WIRE_UNITS

            def read(session: Session) -> None:
                with session:
                    session.get_one(Row, -1)

            def write(session: Session) -> None:
                with session:
                    session.add(Row(name="new", amount=1))
                    session.commit()

            automatic = count(to_reader, lambda: read(routed_session()))
            report.add("round trips of one ORM read, automatic unit", automatic, bound=1.0)
            report.add("  plain Session", count(to_reader, lambda: read(Session(reader_engine))))
            written = count(to_writer, lambda: write(routed_session()))
            report.add("round trips of one insert and commit, automatic unit", written, bound=2.0)
            append = count(to_writer, lambda: router.run_transaction(routed_session, lambda s: s.add(Row(name="new", amount=1))))
            report.add("  in run_transaction", append)
            report.add("  plain Session", count(to_writer, lambda: write(Session(writer_engine))))
    reader_engine.dispose()
    writer_engine.dispose()


def monitoring(report: Report, how: Options, cluster: Cluster[Any]) -> None:
    """Measure an idle router's share of a core and, for information, that of its threads while a session writes and reads."""
    seconds = 8 if how.quick else 30
    progress(f"the monitor ({2 * seconds + 10} s)")

    def idle() -> float:
        gc.collect()
        cpu, wall = time.process_time(), time.monotonic()
        time.sleep(seconds)
        return (time.process_time() - cpu) / (time.monotonic() - wall)

    without = idle()
    with Router(cluster.url, instances=[i.address for i in cluster.readers]) as router:
        assert len(router.topology.instances) == 3
        time.sleep(2)
        report.add("monitor of 3 idle instances, share of a core", (idle() - without) * 100, "%", 1.0)

        threads = [t for t in threading.enumerate() if t.name.startswith("aurora-router-")]
        session = sessionmaker(class_=RoutingSession, router=router)()

        def cpu_of_threads() -> float:
            clocks = [time.pthread_getcpuclockid(t.ident) for t in threads if t.ident is not None]
            return sum(time.clock_gettime(clock) for clock in clocks)

        cpu, wall = cpu_of_threads(), time.monotonic()
        while time.monotonic() - wall < 5:
            session.add(Row(name="new", amount=1))
            session.commit()
            session.get_one(Row, -1)
            session.rollback()
            time.sleep(0.01)
        busy = (cpu_of_threads() - cpu) / (time.monotonic() - wall)
        session.close()
        report.add("  while a session writes 100 times a second and reads", busy * 100, "%")


if __name__ == "__main__":
    sys.exit(main(options(__doc__)))
