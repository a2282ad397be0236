"""The fault proxy between a client and a real server, and between plain sockets."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import closing

import psycopg
import pytest

from aurora_router.local import FaultProxy, PostgresCluster
from tests.integration.shop import eventually


class Echo:
    """A server that answers each piece of data with its name and the data."""

    def __init__(self, name: str) -> None:
        self.name = name.encode()
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.address: tuple[str, int] = self.listener.getsockname()
        self.thread = threading.Thread(target=self.accept)
        self.thread.start()

    def accept(self) -> None:
        workers = []
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                break
            workers.append(threading.Thread(target=self.answer, args=(connection,)))
            workers[-1].start()
        for worker in workers:
            worker.join()

    def answer(self, connection: socket.socket) -> None:
        with connection:
            try:
                while data := connection.recv(65536):
                    connection.sendall(self.name + data)
            except ConnectionError:
                pass

    def close(self) -> None:
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        self.thread.join()


@pytest.fixture
def echo() -> Iterator[Echo]:
    server = Echo("a")
    yield server
    server.close()


@pytest.fixture
def proxy(echo: Echo) -> Iterator[FaultProxy]:
    with FaultProxy(echo.address) as proxy:
        yield proxy


def client(proxy: FaultProxy) -> socket.socket:
    return socket.create_connection((proxy.host, proxy.port), timeout=5)


def ask(connection: socket.socket, data: bytes = b"x") -> bytes:
    connection.sendall(data)
    return connection.recv(65536)


def test_data_passes_both_ways_and_so_does_the_end(proxy: FaultProxy) -> None:
    with client(proxy) as one, client(proxy) as other:
        assert ask(one, b"1") == b"a1"
        assert ask(other, b"2") == b"a2"
        assert proxy.connections == proxy.accepted == 2
        one.shutdown(socket.SHUT_WR)
        assert one.recv(1) == b""


def test_much_data_passes_unchanged(proxy: FaultProxy) -> None:
    data = bytes(range(ord("a"))) * 100_000  # without the server's name, which is put before each piece
    with client(proxy) as connection:
        sender = threading.Thread(target=connection.sendall, args=(data,))
        sender.start()
        received = bytearray()
        while len(received) < len(data):
            received += connection.recv(2**20).replace(b"a", b"")
        sender.join()
        assert received == data


def test_latency_is_added_in_each_direction(proxy: FaultProxy) -> None:
    with client(proxy) as connection:
        ask(connection)
        proxy.latency = 0.05
        started = time.monotonic()
        ask(connection)
        assert time.monotonic() - started >= 0.1


def test_a_black_hole_neither_answers_nor_refuses_until_healed(proxy: FaultProxy) -> None:
    """In a black hole nothing answers and nothing is refused until it heals."""
    with client(proxy) as known:
        ask(known)
        proxy.black_hole()
        assert "black hole" in repr(proxy)
        with client(proxy) as new:
            for connection in (known, new):
                connection.settimeout(0.1)
                with pytest.raises(TimeoutError):
                    ask(connection)
            proxy.heal()
            for connection in (known, new):
                connection.settimeout(5)
                assert connection.recv(10) == b"ax"


def test_reset_cuts_the_open_connections_at_once(proxy: FaultProxy) -> None:
    with client(proxy) as connection:
        ask(connection)
        assert proxy.reset_all() == 1
        with pytest.raises(ConnectionResetError):
            connection.recv(1)
    assert proxy.connections == 0
    with client(proxy) as connection:
        assert ask(connection) == b"ax"


def test_new_connections_are_refused_while_open_ones_go_on(proxy: FaultProxy) -> None:
    with client(proxy) as connection:
        ask(connection)
        proxy.refuse()
        with pytest.raises(ConnectionRefusedError):
            client(proxy)
        assert ask(connection) == b"ax"
        proxy.heal()
        with client(proxy) as other:
            assert ask(other) == b"ax"


def test_new_connections_go_to_the_new_target_and_open_ones_stay(proxy: FaultProxy) -> None:
    other = Echo("b")
    try:
        with client(proxy) as before:
            ask(before)
            proxy.retarget(other.address)
            with client(proxy) as after:
                assert ask(after) == b"bx"
            assert ask(before) == b"ax"
    finally:
        other.close()


def test_several_targets_take_turns_and_a_dead_one_is_skipped(proxy: FaultProxy, echo: Echo) -> None:
    """Several targets take turns, and one that is down is passed over."""
    other = Echo("b")
    proxy.targets = [echo.address, other.address]

    def answers() -> list[bytes]:
        found = []
        for _ in range(4):
            with client(proxy) as connection:
                found.append(ask(connection)[:1])
        return found

    try:
        assert sorted(answers()) == [b"a", b"a", b"b", b"b"]
    finally:
        other.close()
    assert answers() == [b"a"] * 4


def test_a_connection_that_no_target_accepts_is_reset(proxy: FaultProxy) -> None:
    with socket.create_server(("127.0.0.1", 0)) as gone:
        address = gone.getsockname()
    proxy.retarget(address)
    with pytest.raises(ConnectionResetError), client(proxy) as connection:  # at connect, or a moment later
        ask(connection)


def test_a_closed_proxy_leaves_no_thread_and_no_listener(echo: Echo) -> None:
    proxy = FaultProxy(echo.address)
    with client(proxy) as connection:
        ask(connection)
        proxy.close()
        proxy.close()
        assert connection.recv(1) == b""
    with pytest.raises(ConnectionRefusedError):
        client(proxy)
    with pytest.raises(RuntimeError, match="closed"):
        proxy.black_hole()
    assert not [t for t in threading.enumerate() if t.name == f"fault-proxy-{proxy.port}"]


# -- reading along with PostgreSQL


@pytest.fixture(scope="module")
def cluster() -> Iterator[PostgresCluster]:
    with PostgresCluster(readers=0) as cluster:
        yield cluster


@pytest.fixture
def wire(cluster: PostgresCluster) -> Iterator[FaultProxy]:
    with FaultProxy((cluster.writer.host, cluster.writer.port)) as proxy:
        yield proxy


def connect(cluster: PostgresCluster, proxy: FaultProxy, **options: object) -> psycopg.Connection[tuple[object, ...]]:
    there = {"host": proxy.host, "port": proxy.port, "sslmode": "prefer", **options}
    return cluster.writer.connect(**there)


def test_statements_and_round_trips_are_counted_on_the_wire(cluster: PostgresCluster, wire: FaultProxy) -> None:
    """Statements and round trips are counted as they go on the wire."""
    with connect(cluster, wire, autocommit=False) as connection:
        wire.reset_counts()
        connection.execute("SELECT 1")
        assert wire.statements == ["BEGIN", "SELECT 1"]
        connection.execute("SELECT %s::int", (2,))
        connection.commit()
        assert wire.statements == ["BEGIN", "SELECT 1", "SELECT $1::int", "COMMIT"]
        assert wire.round_trips == wire.syncs == 4


def test_a_statement_in_autocommit_is_one_round_trip(cluster: PostgresCluster, wire: FaultProxy) -> None:
    with connect(cluster, wire) as connection:
        wire.reset_counts()
        connection.execute("SELECT 1").fetchall()
        assert (wire.round_trips, wire.statements) == (1, ["SELECT 1"])


def test_a_prepared_statement_counts_at_each_execution(cluster: PostgresCluster, wire: FaultProxy) -> None:
    with connect(cluster, wire) as connection:
        connection.execute("SELECT %s::int", (0,), prepare=True)
        wire.reset_counts()
        for n in range(3):
            connection.execute("SELECT %s::int", (n,), prepare=True)
        assert wire.statements == ["SELECT $1::int"] * 3
        assert wire.round_trips == wire.syncs == 3


def test_a_black_hole_hangs_a_query_and_a_reset_wakes_it(cluster: PostgresCluster, wire: FaultProxy) -> None:
    # If a reset comes while psycopg sends, psycopg takes the connection for open, so the test must close it.
    with closing(connect(cluster, wire)) as connection:
        wire.black_hole()
        timer = threading.Timer(0.2, wire.reset_all)
        started = time.monotonic()
        timer.start()
        with pytest.raises(psycopg.OperationalError):
            connection.execute("SELECT 1")
        assert time.monotonic() - started >= 0.2
        timer.join()


@pytest.mark.parametrize(("answer", "there"), [(False, 0), (True, 1)])
def test_a_statement_ran_only_if_just_its_answer_was_lost(
    cluster: PostgresCluster, wire: FaultProxy, answer: bool, there: int
) -> None:
    """A lost statement is not executed. A statement whose answer is lost is executed."""
    cluster.execute("CREATE TABLE IF NOT EXISTS lost (n int); TRUNCATE lost")
    with connect(cluster, wire, autocommit=False) as connection:
        connection.execute("INSERT INTO lost VALUES (1)")
        wire.lose("COMMIT", answer=answer)
        with pytest.raises(psycopg.OperationalError):
            connection.commit()
    eventually(lambda: cluster.execute("SELECT count(*) FROM pg_locks WHERE relation = 'lost'::regclass") == [(0,)])
    assert cluster.execute("SELECT count(*) FROM lost") == [(there,)]
    with connect(cluster, wire) as connection:  # the proxy loses only one COMMIT
        connection.execute("COMMIT")


def test_a_part_of_a_word_is_not_lost(cluster: PostgresCluster, wire: FaultProxy) -> None:
    """READ COMMITTED does not count as a COMMIT."""
    with connect(cluster, wire, autocommit=False) as connection:
        wire.lose("COMMIT", answer=False)
        connection.execute("SET TRANSACTION ISOLATION LEVEL READ COMMITTED")
        with pytest.raises(psycopg.OperationalError):
            connection.commit()


def test_a_half_open_connection_stays_on_the_server_until_heal(cluster: PostgresCluster, wire: FaultProxy) -> None:
    """A half-open connection stays open on the server's side until it is healed."""
    with connect(cluster, wire) as connection:
        pid = connection.info.backend_pid
        wire.lose("SELECT 1", answer=True, half_open=True)
        with pytest.raises(psycopg.OperationalError):
            connection.execute("SELECT 1")
    assert cluster.execute("SELECT count(*) FROM pg_stat_activity WHERE pid = %s", pid) == [(1,)]
    wire.heal()
    eventually(lambda: cluster.execute("SELECT count(*) FROM pg_stat_activity WHERE pid = %s", pid) == [(0,)])
