"""A probe ends in time although its server never ends an answer, in each phase of the connection."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.engine import Connection

from aurora_router import Router
from aurora_router.cluster.instance_pool import LONGEST_ANSWER
from aurora_router.local import PostgresCluster
from aurora_router.local.cluster import Cluster
from tests.integration.shop import BOTH, eventually, server_address, until_readers_serve

MakeRouter = Callable[..., Router]
PIECE = 1 << 16  # bytes that are sent at once
MOST = 1 << 29  # bytes after which a server that does not pause gives up
LONGEST = 20.0  # seconds after which the server gives up
Speak = Callable[[socket.socket], bytes]


class EndlessServer:
    """A server that sends the result of `speak` on each connection, again and again."""

    def __init__(self, speak: Speak, pause: float = 0.01) -> None:
        self._speak = speak
        self._pause = pause  # seconds
        self.sent: list[int] = []  # bytes, on each connection that has ended
        self.lasted: list[float] = []  # seconds, of each connection that has ended
        self.accepted = 0
        self._closed = threading.Event()
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listening.getsockname()[1]}"
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def _accept(self) -> None:
        while not self._closed.is_set():
            with contextlib.suppress(OSError):
                peer, _ = self._listening.accept()
                self.accepted += 1
                self._threads.append(threading.Thread(target=self._serve, args=(peer,)))
                self._threads[-1].start()

    def _serve(self, peer: socket.socket) -> None:
        began = time.monotonic()
        sent = 0
        with peer, contextlib.suppress(OSError):
            peer.settimeout(1.0)
            piece = self._speak(peer)
            piece *= max(PIECE // len(piece), 1)
            while not self._closed.wait(self._pause) and time.monotonic() - began < LONGEST and sent < MOST:
                peer.sendall(piece)
                sent += len(piece)
        self.lasted.append(time.monotonic() - began)
        self.sent.append(sent)

    def close(self) -> None:
        self._closed.set()
        self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        for thread in self._threads:
            thread.join(10)


def message(kind: bytes, content: bytes) -> bytes:
    """A message of PostgreSQL's protocol."""
    return kind + struct.pack("!i", len(content) + 4) + content


def receive(peer: socket.socket, length: int) -> bytes:
    """Receive so many bytes. Raises ConnectionError if the client has gone, as it does when it is cut."""
    found = peer.recv(length, socket.MSG_WAITALL)
    if len(found) < length:
        raise ConnectionError("the client has gone")
    return found


def log_in(peer: socket.socket) -> None:
    """Accept any client without a password, as PostgreSQL does, and refuse encryption."""
    while True:
        (length,) = struct.unpack("!i", receive(peer, 4))
        begins = receive(peer, length - 4)
        if begins[:2] == b"\x00\x03":
            break
        peer.sendall(b"N")
    peer.sendall(message(b"R", struct.pack("!i", 0)))


def no_end_of_the_login(peer: socket.socket) -> bytes:
    log_in(peer)
    return message(b"S", b"name\0" + b"x" * 1000 + b"\0")


def no_end_of_an_error(peer: socket.socket) -> bytes:
    log_in(peer)
    return message(b"N", b"SNOTICE\0C00000\0M" + b"x" * 1000 + b"\0\0")


def no_end_of_the_first_result(peer: socket.socket) -> bytes:
    log_in(peer)
    parameters = [b"server_version\x0018.0", b"client_encoding\0UTF8", b"standard_conforming_strings\0on"]
    peer.sendall(b"".join(message(b"S", each + b"\0") for each in parameters) + message(b"Z", b"I"))
    receive(peer, 1)  # a question
    column = b"version\0" + struct.pack("!ihihih", 0, 0, 25, -1, -1, 0)
    peer.sendall(message(b"1", b"") + message(b"2", b"") + message(b"T", struct.pack("!h", 1) + column))
    return message(b"D", struct.pack("!hi", 1, 1000) + b"x" * 1000)


GREETING = (
    b"\x0a8.0.36\0" + struct.pack("<i", 7) + b"12345678\0" + struct.pack("<HBHH", 0xF7FF, 45, 2, 0x001A)
    + b"\x15" + b"\0" * 10 + b"123456789012\0" + b"mysql_native_password\0"
)  # fmt: skip


def packet(number: int, content: bytes) -> bytes:
    """A packet of MySQL's protocol."""
    return struct.pack("<i", len(content))[:3] + bytes([number]) + content


def no_end_of_the_greeting(peer: socket.socket) -> bytes:
    peer.sendall(b"\xff\xff\xff\x00")
    return b"\x0a" * 1000


def no_end_of_a_mysql_result(peer: socket.socket) -> bytes:
    peer.sendall(packet(0, GREETING))
    header = receive(peer, 4)
    receive(peer, header[0] | header[1] << 8)
    done = packet(2, b"\x00\x00\x00\x02\x00\x00\x00")
    peer.sendall(done)
    while b"\x03SE" not in (question := peer.recv(4096)) or b"\x03SET" in question:
        peer.sendall(packet(1, done[4:]))
    column = b"\x03def\0\0\0\x01v\0\x0c" + struct.pack("<HIBHB", 45, 4000, 253, 0, 0) + b"\0\0"
    peer.sendall(packet(1, b"\x01") + packet(2, column) + packet(3, b"\xfe\0\0\x02\0"))
    row = b"\xfc" + struct.pack("<H", 1000) + b"x" * 1000
    return b"".join(packet((4 + number) % 256, row) for number in range(256))  # the numbers go on in the next piece


@pytest.fixture
def endless(request: pytest.FixtureRequest) -> Iterator[EndlessServer]:
    server = EndlessServer(request.param)
    yield server
    server.close()


def probes_end_in_time(cluster: Cluster[Any], make_router: MakeRouter, endless: EndlessServer) -> None:
    router = make_router(instances=[endless.address], probe_timeout=0.5, probe_interval=0.2)
    router.start()
    eventually(lambda: endless.accepted >= 6, timeout=30)
    name = f"aurora-router-probe-{endless.address}"
    # A thread ends after it is cut. So at most three are alive: one connects, one is about to end, and one was just cut.
    eventually(lambda: [t.name for t in threading.enumerate()].count(name) <= 3)
    eventually(lambda: len(endless.lasted) >= 6)
    assert max(endless.lasted) < LONGEST / 2
    with router.connect() as connection:
        assert connection.scalar(text("SELECT 1")) == 1
    assert not router.topology.by_id[endless.address].healthy
    router.close()
    eventually(lambda: len(endless.lasted) == endless.accepted)


@pytest.mark.parametrize("endless", [no_end_of_the_login, no_end_of_an_error, no_end_of_the_first_result], indirect=True)
def test_a_probe_ends_though_postgresql_goes_on(
    cluster: PostgresCluster, make_router: MakeRouter, endless: EndlessServer
) -> None:
    """A probe is cut by its deadline if the login, an error or its first answer never ends."""
    probes_end_in_time(cluster, make_router, endless)


@pytest.mark.engines("mariadb", "mysql")
@pytest.mark.parametrize("endless", [no_end_of_the_greeting, no_end_of_a_mysql_result], indirect=True)
def test_a_probe_ends_though_mysql_goes_on(cluster: Cluster[Any], make_router: MakeRouter, endless: EndlessServer) -> None:
    """A probe with PyMySQL is cut by its deadline, although PyMySQL's timeouts start anew with each piece."""
    probes_end_in_time(cluster, make_router, endless)


def probes_end_before_the_memory_is_full(cluster: Cluster[Any], make_router: MakeRouter, speak: Speak) -> None:
    endless = EndlessServer(speak, pause=0.0)
    try:
        router = make_router(instances=[endless.address], probe_timeout=60.0)
        with router.connect() as connection:
            assert connection.scalar(text("SELECT 1")) == 1
        eventually(lambda: bool(endless.sent), timeout=60)
        assert LONGEST_ANSWER / 4 < endless.sent[0] < MOST / 2, "it was given up for another reason, or not at all"
        router.close()
    finally:
        endless.close()


def test_an_endless_answer_of_postgresql_fills_no_memory(cluster: PostgresCluster, make_router: MakeRouter) -> None:
    """A probe gives an answer up that is longer than any that it expects, however long its deadline is."""
    probes_end_before_the_memory_is_full(cluster, make_router, no_end_of_the_first_result)


@pytest.mark.engines("mariadb", "mysql")
def test_an_endless_answer_of_mysql_fills_no_memory(cluster: Cluster[Any], make_router: MakeRouter) -> None:
    """A probe with PyMySQL gives an answer up that is longer than any that it expects."""
    probes_end_before_the_memory_is_full(cluster, make_router, no_end_of_a_mysql_result)


@BOTH
def test_a_unit_wakes_whose_new_connection_gets_no_answer(cluster: Cluster[Any], make_router: MakeRouter) -> None:
    """A thread that hangs while SQLAlchemy initializes its dialect wakes when the instance is lost, and goes elsewhere."""
    first, second = cluster.readers
    router = make_router(
        balance=lambda readers, load, rnd: next((r for r in readers if r.id == first.address), readers[0]), probe_timeout=0.5
    )
    until_readers_serve(router, 2)
    dialect = router.engine(router.topology.by_id[first.address]).dialect
    look = dialect.initialize

    def initialize(connection: Connection) -> None:
        cluster.freeze(first)
        look(connection)

    dialect.initialize = initialize  # type: ignore[method-assign]
    with ThreadPoolExecutor(1) as threads:
        asked = threads.submit(router.connect, True)
        try:
            with asked.result(timeout=20) as connection:
                assert server_address(connection) == second.address
        finally:
            cluster.thaw(first)
