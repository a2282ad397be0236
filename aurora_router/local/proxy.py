"""A TCP proxy that misbehaves on request: latency, black holes, resets, refusals, moved targets. It counts round trips.

One thread with one selector makes all changes of the proxy's state. A method returns when that thread has made its change. The
proxy reads along with the protocols of PostgreSQL, MySQL and MariaDB, to show which statements a client really sent. Data that
it cannot read passes all the same.
"""

from __future__ import annotations

import contextlib
import errno
import re
import selectors
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Self

from aurora_router.local.protocols import MysqlReader, PostgresReader

__all__ = ["FaultProxy"]

Address = tuple[str, int]

_CHUNK = 256 * 1024
_HELD_AT_MOST = 16 * 2**20  # bytes in one direction, then its source must wait


class FaultProxy:
    """Forward TCP connections to `target`, with faults. Use it as a context manager, or call `close()`.

        with FaultProxy((cluster.writer.host, cluster.writer.port)) as proxy:
            engine = create_engine(f"postgresql+psycopg://app:...@{proxy.address}/app")
            proxy.latency = 0.010
            proxy.black_hole()

    target: `(host, port)` of the server, or a list of them. Each new connection then goes to the next one in turn that
        accepts it, as behind a load balancer. If no target accepts the connection, it is reset.
    listen_host, listen_port: where to listen. Port 0 picks a free one.

    Raises OSError if it cannot listen there.
    """

    def __init__(self, target: Address | Sequence[Address], listen_host: str = "127.0.0.1", listen_port: int = 0) -> None:
        self.latency = 0.0
        """Seconds that data takes in each direction, accurate to about 1 ms. It applies to logins, but not to TCP's handshake."""
        self.round_trips = 0
        """How often a server answered. Data from the client, and then data from the server, count as one."""
        self.syncs = 0
        """Exact number of round trips, without those of logins. PyMySQL also sends commands while it connects, and these count.

        It counts simple queries and Sync messages of PostgreSQL's clients, and commands of MySQL's and MariaDB's clients.
        """
        self.statements: list[str] = []
        """Texts of the statements that clients executed, in order. On PostgreSQL each execution of a prepared one counts."""
        self.accepted = 0
        """How many connections were accepted."""
        self._targets = _addresses(target)
        self._turn = 0
        self._held = False
        self._losing: list[_Loss] = []
        self._half_open: list[socket.socket] = []
        self._links: set[_Connection] = set()
        self._selector = selectors.DefaultSelector()
        self._listener: socket.socket | None = _listen((listen_host, listen_port))
        self.host, self.port = self._listener.getsockname()[:2]
        self._orders: deque[Callable[[], None]] = deque()
        self._wakeup, self._ear = socket.socketpair()
        self._ear.setblocking(False)
        self._stopped = False
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._selector.register(self._ear, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._run, name=f"fault-proxy-{self.port}", daemon=True)
        self._thread.start()

    def __repr__(self) -> str:
        to = ", ".join(f"{host}:{port}" for host, port in self._targets)
        state = "closed" if self._stopped else "black hole" if self._held else "open" if self._listener else "refusing"
        return f"<FaultProxy {self.address} to {to} {state}, {len(self._links)} connections>"

    @property
    def address(self) -> str:
        """`host:port` where the proxy listens."""
        return f"{self.host}:{self.port}"

    @property
    def connections(self) -> int:
        """How many connections are open through the proxy."""
        return len(self._links)

    @property
    def targets(self) -> list[Address]:
        """Where new connections go, in turn."""
        return list(self._targets)

    @targets.setter
    def targets(self, targets: Address | Sequence[Address]) -> None:
        self._targets = _addresses(targets)

    def retarget(self, target: Address | Sequence[Address]) -> None:
        """Send new connections elsewhere, as DNS or a moved virtual IP does. Open connections stay where they are."""
        self.targets = _addresses(target)

    def black_hole(self) -> None:
        """Let nothing through, in either direction. Connections are accepted and data is taken, silently.

        As after a partition of a real network, that data arrives after `heal()`, on connections that are still open.
        """
        self._do(lambda: setattr(self, "_held", True))

    def refuse(self) -> None:
        """Refuse new connections. Open connections go on."""
        self._do(self._shut_listener)

    def reset_all(self) -> int:
        """Reset (RST) all open connections, on both sides, and return how many."""
        links: list[_Connection] = []

        def reset() -> None:
            links.extend(self._links)
            for link in links:
                self._end(link, reset=True)

        self._do(reset)
        return len(links)

    def lose(self, statement: str, *, answer: bool, half_open: bool = False, times: int = 1) -> None:
        """Reset the connection of the next statement that contains `statement`, in whole words.

        answer: True: after the server has answered, so that only the answer is lost. False: before the server gets the statement.
        half_open: reset the client only. The server goes on waiting on its side, until `heal()`.
        times: how often.
        """
        self._do(lambda: setattr(self, "_losing", [_Loss(statement, answer, half_open)] * times))

    def heal(self) -> None:
        """End a black hole and a refusal, lose no more statements, and set the latency to 0."""

        def heal() -> None:
            self._held, self.latency, self._losing = False, 0.0, []
            self._drop_half_open()
            for link in list(self._links):
                if link.broken:
                    self._end(link, reset=True)
                elif link.server is None:
                    self._connect(link)
            if self._listener is None:
                self._listener = _listen((self.host, self.port))
                self._selector.register(self._listener, selectors.EVENT_READ)

        self._do(heal)

    def reset_counts(self) -> None:
        """Set `round_trips`, `syncs` and `accepted` to 0 and forget the statements."""

        def forget() -> None:
            self.round_trips = self.syncs = self.accepted = 0
            self.statements = []

        self._do(forget)

    def close(self) -> None:
        """Close all connections and stop listening. May be called again."""
        if not self._stopped:
            self._do(lambda: setattr(self, "_stopped", True))
            self._thread.join()
            self._wakeup.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- the thread

    def _do(self, order: Callable[[], None]) -> None:
        """Let the thread run `order`, wait for its end, and raise its error."""
        if self._stopped:
            raise RuntimeError("the proxy is closed")
        done, raised = threading.Event(), []

        def run() -> None:
            try:
                order()
            except Exception as error:  # raised below, in the calling thread
                raised.append(error)
            done.set()

        self._orders.append(run)
        with contextlib.suppress(OSError):  # the thread may have run it already, and ended
            self._wakeup.send(b"!")
        while not done.wait(1):
            if not self._thread.is_alive():
                raise RuntimeError("the proxy is closed")
        if raised:
            raise raised[0]

    def _run(self) -> None:
        while not self._stopped:
            for key, events in self._selector.select(self._next_due()):
                if key.fileobj is self._ear:
                    self._ear.recv(4096)
                elif key.data is None:
                    self._accept()
                elif key.data in self._links:  # an earlier event may have ended it
                    self._serve(key.data, key.fileobj, events)
            while self._orders:
                self._orders.popleft()()
            for link in list(self._links):
                self._deliver(link)
        for link in list(self._links):
            self._end(link, reset=False)
        self._drop_half_open()
        self._shut_listener()
        self._selector.close()
        self._ear.close()

    def _next_due(self) -> float | None:
        """Return the seconds until delayed data is due. None if there is none."""
        if self._held:
            return None
        due = [flow.queue[0][0] for link in self._links for flow in link.flows if flow.queue and not flow.choked]
        return max(0.0, min(due) - time.monotonic()) if due else None

    def _shut_listener(self) -> None:
        if self._listener is not None:
            self._selector.unregister(self._listener)
            self._listener.close()
            self._listener = None

    def _accept(self) -> None:
        assert self._listener is not None
        with contextlib.suppress(BlockingIOError, ConnectionAbortedError):
            client, _ = self._listener.accept()
            client.setblocking(False)
            self.accepted += 1
            start, self._turn = self._turn, self._turn + 1
            link = _Connection(client, [self._targets[(start + n) % len(self._targets)] for n in range(len(self._targets))])
            self._links.add(link)
            if not self._held:
                self._connect(link)

    def _connect(self, link: _Connection) -> None:
        """Connect to the next target that is left. Reset the client if none is."""
        if link.server is not None:
            self._drop(link.server)
            link.server = None
        if not link.targets:
            self._end(link, reset=True)
            return
        host, port = link.targets.pop(0)
        server = link.server = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
        server.setblocking(False)
        for side in (link.client, server):
            side.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            problem = server.connect_ex((host, port))
        except OSError as error:  # a name that does not resolve
            problem = error.errno or errno.EHOSTUNREACH
        if problem not in (0, errno.EINPROGRESS):
            self._connect(link)
            return
        link.flows = (_Flow(link.client, server), _Flow(server, link.client))
        self._watch(link)

    def _serve(self, link: _Connection, side: object, events: int) -> None:
        assert link.server is not None
        if not link.connected:
            if side is link.server:
                if link.server.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                    self._connect(link)
                    return
                link.connected = True
                self._watch(link)
            return
        there, back = link.flows
        flow = there if side is link.client else back
        if events & selectors.EVENT_WRITE:
            (back if side is link.client else there).choked = False
        if events & selectors.EVENT_READ and not flow.ended:
            try:
                data = flow.source.recv(_CHUNK)
            except BlockingIOError:
                return
            # This side has reset the connection, so the other side is reset, too. In a black hole that must wait for `heal()`.
            except OSError:
                if not self._held:
                    self._end(link, reset=True)
                    return
                link.broken = flow.ended = True
                self._watch(link)
                return
            if data:
                if self._count(link, data, from_client=flow is there):
                    return
                flow.put(data, time.monotonic() + self.latency)
            else:
                flow.ended = True
                flow.put(b"", time.monotonic() + self.latency)
            self._watch(link)

    def _deliver(self, link: _Connection) -> None:
        """Send the data that is due."""
        if self._held or not link.connected:
            return
        now = time.monotonic()
        for flow in link.flows:
            while flow.queue and flow.queue[0][0] <= now and not flow.choked:
                due, data = flow.queue.popleft()
                try:
                    if not data:
                        flow.sink.shutdown(socket.SHUT_WR)
                        flow.closed = True
                        continue
                    sent = flow.sink.send(data)
                except BlockingIOError:
                    sent = 0
                except OSError:
                    self._end(link, reset=True)
                    return
                flow.size -= sent
                if sent < len(data):
                    flow.queue.appendleft((due, data[sent:]))
                    flow.choked = True
        if all(flow.closed for flow in link.flows):
            self._end(link, reset=False)
        else:
            self._watch(link)

    def _watch(self, link: _Connection) -> None:
        """Register the events that this connection waits for."""
        assert link.server is not None
        there, back = link.flows
        if not link.connected:
            self._set(link.server, selectors.EVENT_WRITE, link)
            return
        for side, reads, writes in ((link.client, there, back), (link.server, back, there)):
            events = selectors.EVENT_READ if not reads.ended and reads.size < _HELD_AT_MOST else 0
            self._set(side, events | (selectors.EVENT_WRITE if writes.choked else 0), link)

    def _set(self, side: socket.socket, events: int, link: _Connection) -> None:
        known = self._selector.get_map().get(side)
        if known is None:
            if events:
                self._selector.register(side, events, link)
        elif not events:
            self._selector.unregister(side)
        elif known.events != events:
            self._selector.modify(side, events, link)

    def _end(self, link: _Connection, *, reset: bool) -> None:
        self._links.discard(link)
        for side in (link.client, link.server):
            if side is not None:
                if reset:
                    with contextlib.suppress(OSError):
                        side.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self._drop(side)

    def _drop(self, side: socket.socket) -> None:
        with contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(side)
        side.close()

    def _count(self, link: _Connection, data: bytes, *, from_client: bool) -> bool:
        """Record the data. Return True if the data is lost, and the connection with it."""
        if not from_client and not link.begun:
            link.protocol = MysqlReader()  # a server that speaks first is not PostgreSQL
        link.begun = True
        if from_client:
            link.asked = True
            for message in link.protocol.client_sent(data):
                if message.statement is not None:
                    self.statements.append(message.statement)
                    if self._losing and self._losing[0].is_in(message.statement):
                        link.loss = self._losing.pop(0)
                self.syncs += message.sync
        else:
            link.protocol.server_sent(data)
            self.round_trips += link.asked
            link.asked = False
        if link.loss is None or link.loss.answer is from_client:
            return False
        if link.loss.half_open and link.server is not None:
            self._half_open.append(link.server)
            with contextlib.suppress(KeyError, ValueError):
                self._selector.unregister(link.server)
            link.server = None
        self._end(link, reset=True)
        return True

    def _drop_half_open(self) -> None:
        while self._half_open:
            self._half_open.pop().close()


class _Flow:
    """One direction of a connection: data that is read but not yet sent, with the time when it is due."""

    def __init__(self, source: socket.socket, sink: socket.socket) -> None:
        self.source, self.sink = source, sink
        self.queue: deque[tuple[float, bytes]] = deque()  # empty bytes: the end
        self.size = 0
        self.choked = False  # the sink takes no more for now
        self.ended = False  # the source sends no more
        self.closed = False  # the sink has got the end

    def put(self, data: bytes, due: float) -> None:
        if self.queue:  # order is kept when the latency shrinks
            due = max(due, self.queue[-1][0])
        self.queue.append((due, data))
        self.size += len(data)


@dataclass(frozen=True)
class _Loss:
    """A statement that is to be lost, or its answer."""

    statement: str
    answer: bool
    half_open: bool

    def is_in(self, text: str) -> bool:
        return re.search(rf"(?<!\w){re.escape(self.statement)}(?!\w)", text) is not None


@dataclass(eq=False)
class _Connection:
    """One connection through the proxy."""

    client: socket.socket
    targets: list[Address]  # those not yet tried
    server: socket.socket | None = None
    flows: tuple[_Flow, ...] = ()
    connected: bool = False
    broken: bool = False  # one side has reset it in a black hole
    loss: _Loss | None = None  # the statement or answer to lose on it
    asked: bool = False  # the client was the last to send
    begun: bool = False  # one side has sent something
    protocol: PostgresReader | MysqlReader = field(default_factory=PostgresReader)


def _addresses(target: Address | Sequence[Address]) -> list[Address]:
    one = isinstance(target[0], str)
    found: list[Address] = [target] if one else list(target)  # type: ignore[list-item, arg-type]
    return [(str(host), int(port)) for host, port in found]


def _listen(address: Address) -> socket.socket:
    listener = socket.create_server(address, family=socket.AF_INET6 if ":" in address[0] else socket.AF_INET, backlog=512)
    listener.setblocking(False)
    return listener
