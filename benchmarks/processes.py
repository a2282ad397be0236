"""The case of consistency.py that crosses processes: two of them serve HTTP, each with a router of its own.

30 users write once a second and read five times in that second, at random moments. Each request goes to either process at random,
as behind a load balancer. A user sends the token of its last write with each request, as a cookie would. One reader is current,
the other replays 30 ms late. For comparison, the table shows the share of readers if each user stayed on the writer for a fixed
time after each write. It is computed from the same requests. The control sends no tokens: it must show stale reads.
"""

from __future__ import annotations

import json
import multiprocessing
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.connection import Connection
from typing import Any

from common import Report, median, progress
from sqlalchemy import text

from aurora_router import Effect, Router
from aurora_router.local.cluster import Cluster
from aurora_router.local.system import until

PROCESSES = 2
USERS = 30
READS = 5  # of a user in each second, beside one write
LAG = 0.03
PINS = (2.0, 5.0, 15.0)
TOKEN = "X-Consistency-Token"
READ = text("SELECT version, answered_by() FROM profile WHERE id = :key")
WRITE = text("UPDATE profile SET version = :version WHERE id = :key")


# -- the service ------------------------------------------------------------------------------------------------------


def serve(url: str, instances: list[str], ready: Connection) -> None:
    """Serve until the process is killed. GET /KEY reads a row's version, and POST /KEY/VERSION writes it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    router = Router(url, instances=instances)

    class Service(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True
        wbufsize = -1  # headers and body in one packet

        def do_GET(self) -> None:
            self.answer(writes=False)

        def do_POST(self) -> None:
            self.answer(writes=True)

        def answer(self, *, writes: bool) -> None:
            row: list[Any] = []
            key, *version = map(int, self.path[1:].split("/"))
            with router.causal_scope(self.headers.get(TOKEN)) as scope:
                with router.begin(read_only=not writes) as connection:
                    if writes:
                        connection.execute(WRITE, {"key": key, "version": version[0]})
                    else:
                        row = [*connection.execute(READ, {"key": key}).one()]
                token = scope.token if writes else None
            body = json.dumps(row).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            if token is not None:
                self.send_header(TOKEN, token)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    while router.explain("SELECT answered_by()").effect is not Effect.READ:
        time.sleep(0.1)  # until the catalog has been read
    server = ThreadingHTTPServer(("127.0.0.1", 0), Service)
    ready.send(server.server_address[1])
    server.serve_forever()


@contextmanager
def processes(cluster: Cluster[Any]) -> Iterator[list[int]]:
    """Start the processes, and yield the ports at which they listen."""
    fork = multiprocessing.get_context("spawn")
    ours, theirs = fork.Pipe(duplex=False)
    arguments = (cluster.url, [reader.address for reader in cluster.readers], theirs)
    started = [fork.Process(target=serve, args=arguments, daemon=True) for _ in range(PROCESSES)]
    try:
        for process in started:
            process.start()
        ports: list[int] = []
        for _ in started:
            if not ours.poll(60):
                raise TimeoutError("a process does not begin to serve")
            ports.append(ours.recv())
        yield ports
    finally:
        for process in started:
            process.kill()
            process.join(10)


# -- its users --------------------------------------------------------------------------------------------------------


@dataclass
class Read:
    """One read.

    age: seconds since its user's last write was acknowledged
    took: seconds
    """

    age: float
    took: float
    server: str
    stale: bool


@dataclass
class User:
    """A user, who writes one row and reads it.

    with_token: each request has the token of the last write
    """

    key: int
    ports: list[int]
    with_token: bool
    token: str | None = None
    version: int = 0
    acknowledged: float = 0.0
    reads: list[Read] = field(default_factory=list)
    writes: list[float] = field(default_factory=list)  # seconds that each took
    errors: list[BaseException] = field(default_factory=list)

    def live(self, seconds: float) -> None:
        """Write at the same moment of each second, and read at some moments after it."""
        rng = random.Random(self.key)
        connections = [HTTPConnection("127.0.0.1", port, timeout=30) for port in self.ports]
        began = time.monotonic() + rng.random()
        try:
            for second in range(round(seconds)):
                for moment in (0.0, *sorted(rng.random() for _ in range(READS))):
                    time.sleep(max(began + second + moment - time.monotonic(), 0.0))
                    self.request(rng.choice(connections), writes=moment == 0.0)
        except Exception as error:
            self.errors.append(error)
        finally:
            for connection in connections:
                connection.close()

    def request(self, connection: HTTPConnection, *, writes: bool) -> None:
        began = time.monotonic()
        headers = {TOKEN: self.token} if self.token is not None and self.with_token else {}
        wanted = ("POST", f"/{self.key}/{self.version + 1}") if writes else ("GET", f"/{self.key}")
        connection.request(*wanted, headers=headers)
        response = connection.getresponse()
        row = json.loads(response.read())
        now = time.monotonic()
        if writes:
            self.token, self.acknowledged = response.headers[TOKEN], now
            self.version += 1
            self.writes.append(now - began)
        else:
            version, server = row
            self.reads.append(Read(began - self.acknowledged, now - began, server, version < self.version))


def run(
    cluster: Cluster[Any], ports: list[int], seconds: float, *, with_token: bool, look: Callable[[], None] = lambda: None
) -> list[User]:
    """Let users live for some seconds, and return them.

    look: called about once a second meanwhile

    Raises the first error of a user.
    """
    cluster.execute("UPDATE profile SET version = 0")
    cluster.wait_in_sync()
    users = [User(key, ports, with_token) for key in range(USERS)]
    threads = [threading.Thread(target=user.live, args=(seconds,), daemon=True) for user in users]
    for thread in threads:
        thread.start()
    for thread in threads:
        while thread.is_alive():
            look()
            thread.join(1.0)
    for error in (error for user in users for error in user.errors):
        raise error
    return users


def lag(writer: Any, reader: Any) -> float:
    """Measure the seconds from a COMMIT until its row shows on the reader. Both connections are the driver's, in autocommit."""
    beat = time.monotonic_ns()
    with writer.cursor() as there, reader.cursor() as here:
        there.execute("INSERT INTO beat VALUES (%s)", (beat,))
        written = time.monotonic()
        for _ in until(10, "a row to show on the reader", every=0.001):
            here.execute("SELECT count(*) FROM beat WHERE n = %s", (beat,))
            if here.fetchone()[0]:
                break
    return time.monotonic() - written


def measure(cluster: Cluster[Any], report: Report, *, quick: bool) -> None:
    """Add the figures of this case. The cluster has the table and the function of consistency.py."""
    seconds, of_control = (6.0, 3.0) if quick else (60.0, 10.0)
    late = cluster.readers[0]
    cluster.set_lag(late, LAG)
    cluster.set_lag(cluster.readers[1], 0)
    cluster.execute("CREATE TABLE beat (n bigint)")
    progress(f"{PROCESSES} processes that serve HTTP, {USERS} users, {seconds:g} s")
    lags: list[float] = []
    with cluster.writer.connect() as writer, late.connect() as reader, processes(cluster) as ports:
        users = run(cluster, ports, seconds, with_token=True, look=lambda: lags.append(lag(writer, reader)))
        progress(f"the control: no tokens, {of_control:g} s")
        control = run(cluster, ports, of_control, with_token=False)
    reads = [read for user in users for read in user.reads]
    writer = cluster.writer.host

    def share(count: int) -> float:
        return 100 * count / len(reads)

    report.add(f"{PROCESSES} processes, tokens through HTTP: {len(reads):,} reads, stale", sum(r.stale for r in reads), bound=0)
    report.add("  served by readers", share(sum(r.server != writer for r in reads)), "%", bound=80, at_least=True)
    for pin in PINS:
        bound = 20 if pin == PINS[0] else None
        report.add(f"  with a fixed pin of {pin:g} s, in the same run", share(sum(r.age >= pin for r in reads)), "%", bound=bound)
    report.add("  lag of the later reader, median", median(lags) * 1000, "ms", bound=50)
    report.add("  a read through HTTP, median", median(r.took for r in reads) * 1000, "ms")
    report.add("  a write through HTTP, and its token, median", median(t for user in users for t in user.writes) * 1000, "ms")
    stale = sum(read.stale for user in control for read in user.reads)
    report.add("  control, no tokens: stale reads", stale, bound=1, at_least=True)
