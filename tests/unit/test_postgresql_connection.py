"""psycopg's connection and cursor as the router changes them, before a peer that speaks PostgreSQL's protocol."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import pytest
from psycopg import errors
from sqlalchemy import create_engine, make_url

from aurora_router.drivers import psycopg as psycopg_driver
from aurora_router.servers import postgresql


def message(kind: bytes, body: bytes = b"") -> bytes:
    return kind + (len(body) + 4).to_bytes(4, "big") + body


def refusal(code: str, severity: str = "ERROR") -> bytes:
    fields = {"S": severity, "V": severity, "C": code, "M": "refused"}
    return message(b"E", b"".join(f"{name}{value}\0".encode() for name, value in fields.items()) + b"\0")


class Peer:
    """A server of one client. It keeps prepared statements and the state of the transaction, and answers each text with nothing.

    heard: the texts that were prepared (P) or executed (E, Q) without an error.
    refuses: texts, and the codes of the errors with which they are refused. A code of "lost" closes the connection instead,
        and one of "FATAL ..." says so before. "sync" stands for the end of a pipeline, and is always refused with FATAL.
    """

    def __init__(self) -> None:
        self.heard: list[str] = []
        self.syncs = 0
        self.prepared: dict[bytes, str] = {}
        self.refuses: dict[str, str] = {}
        self.state = b"I"
        self._server = socket.create_server(("127.0.0.1", 0))
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    @property
    def url(self) -> str:
        return f"postgresql+psycopg://u@127.0.0.1:{self._server.getsockname()[1]}/d?sslmode=disable&gssencmode=disable"

    def close(self) -> None:
        self._server.close()
        self._thread.join()

    def _serve(self) -> None:
        self._client, _ = self._server.accept()
        with self._client, self._client.makefile("rb") as stream, contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self._read(stream, int.from_bytes(stream.read(4), "big"))
            settings = {"client_encoding": "UTF8", "standard_conforming_strings": "on", "server_version": "16.1"}
            told = (message(b"S", f"{name}\0{value}\0".encode()) for name, value in settings.items())
            self._client.sendall(message(b"R", bytes(4)) + b"".join(told) + message(b"Z", b"I"))
            failed = False
            while kind := stream.read(1):
                body = self._read(stream, int.from_bytes(stream.read(4), "big"))
                if kind == b"X":
                    return
                if kind == b"S" and "sync" in self.refuses:
                    answer = refusal(self.refuses["sync"], "FATAL")
                elif kind == b"S":
                    failed, answer = False, message(b"Z", self.state)
                    self.syncs += 1
                elif failed:
                    continue
                else:
                    answer = self._answer(kind, body)
                    if answer.startswith(b"E"):
                        failed = kind != b"Q"
                        self.state = b"E" if self.state == b"T" else self.state
                    if kind == b"Q":
                        answer += message(b"Z", self.state)
                        self.syncs += 1
                self._client.sendall(answer)
                if b"FATAL" in answer or not answer:
                    return

    @staticmethod
    def _read(stream: Any, length: int) -> bytes:
        body: bytes = stream.read(length - 4)
        return body

    def _answer(self, kind: bytes, body: bytes) -> bytes:
        names = body.split(b"\0")
        match kind:
            case b"P":
                if names[0] in self.prepared:
                    return refusal("42P05")
                text = names[1].decode()
                if f"prepare {text}" in self.refuses:
                    return refusal(self.refuses[f"prepare {text}"])
                self.heard.append(f"prepare {text}" if names[0] else "")
                self.prepared[names[0]] = text
                return message(b"1")
            case b"B":
                if names[1] not in self.prepared:
                    return refusal("26000")
                self._bound = self.prepared[names[1]]
                self.prepared.pop(b"", None)
                return message(b"2")
            case b"D":
                return message(b"n")
            case b"C":
                return message(b"3")
            case b"E":
                return self._run(self._bound)
            case _:
                return self._run(names[0].decode())

    def _run(self, text: str) -> bytes:
        self.heard = [*filter(None, self.heard), text]
        code = self.refuses.get(text, "")
        if code == "lost":
            return b""
        if code:
            severity, _, code = code.rpartition(" ")
            return refusal(code, severity or "ERROR")
        if text == "SELECT many":
            return message(b"N", b"SNOTICE\0C00000\0M" + b"x" * 1000 + b"\0\0") * 5000 + message(b"C", b"SELECT 0\0")
        if text.startswith("BEGIN"):
            self.state = b"T"
        elif text in ("COMMIT", "ROLLBACK"):
            self.state = b"I"
        elif text == "DEALLOCATE ALL":
            self.prepared.clear()
        return message(b"C", text.encode() + b"\0")


@pytest.fixture
def peer() -> Iterator[Peer]:
    with contextlib.closing(Peer()) as peer:
        yield peer


@pytest.fixture
def connect(peer: Peer) -> Iterator[Callable[..., Any]]:
    """A function that makes the one connection to the peer."""
    with contextlib.ExitStack() as stack:

        def make(*, shared: bool = False, longest: int | None = None, **options: Any) -> Any:
            dialect = create_engine(peer.url).dialect
            psycopg_driver.track_connecting_socket(dialect, lambda number: contextlib.nullcontext(), longest)
            arguments, given = dialect.create_connect_args(make_url(peer.url))
            connection: Any = dialect.connect(*arguments, **given, **options)
            stack.callback(connection.close)
            psycopg_driver.prepare_connection(connection, shared, (), lambda: False, postgresql)
            return connection

        yield make


BEGIN = "prepare BEGIN", "BEGIN"


def test_an_answer_longer_than_the_limit_ends_the_connection(connect: Callable[..., Any]) -> None:
    """The limit is for each answer alone. Without a limit, a long answer is read."""
    connection = connect(longest=1 << 18)
    for _ in range(100):
        connection.execute("SELECT a")
    with pytest.raises(psycopg.OperationalError, match="no end"):
        connection.execute("SELECT many")
    assert connection.closed


def test_begin_takes_no_round_trip_of_its_own(peer: Peer, connect: Callable[..., Any]) -> None:
    """BEGIN goes with the first statement, and is prepared once for each kind of transaction."""
    connection = connect()
    connection.execute("SELECT a")
    assert peer.heard == [*BEGIN, "SELECT a"]
    connection.execute("SELECT b")
    connection.commit()
    connection.execute("SELECT a")
    connection.commit()
    assert peer.heard[3:] == ["SELECT b", "COMMIT", "BEGIN", "SELECT a", "COMMIT"]
    connection.read_only = True
    connection.execute("UPDATE a SET b = %s", (1,))
    assert peer.heard[8:] == ["prepare BEGIN READ ONLY", "BEGIN READ ONLY", "UPDATE a SET b = $1"]
    assert peer.syncs == 6


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("COPY a FROM STDIN", {}),
        ("/* SELECT */ COPY a FROM STDIN", {}),
        ("SELECT a; SELECT b", {}),
        ("--\rCOPY a FROM STDIN\nWITH (FORMAT csv)", {}),
        ("SELECT $1", {}),
        ("UPDATE a", {}),
        ("SELECT a", {"shared": True}),
        ("SELECT a", {"cursor_factory": psycopg.ClientCursor}),
    ],
)
def test_what_cannot_follow_begin_comes_after_it(
    peer: Peer, connect: Callable[..., Any], text: str, options: dict[str, Any]
) -> None:
    """A statement that might do something else in a pipeline, or may not be sent in one, comes after BEGIN."""
    connect(**options).execute(text)
    assert (peer.heard, peer.syncs) == (["BEGIN", text], 2)


def test_a_parameter_that_is_not_named_changes_nothing(peer: Peer, connect: Callable[..., Any]) -> None:
    """A text that names none of its parameters goes the way of a text without parameters."""
    connect().execute("UPDATE a; UPDATE b", {"c": 1})
    assert (peer.heard, peer.syncs) == (["BEGIN", "UPDATE a; UPDATE b"], 2)


@pytest.mark.parametrize("text", ["-- one\n select 1", "/* UPDATE */ select a", "\n\t-- WITH\rVALUES (1)"])
def test_comments_keep_no_statement_from_following_begin(peer: Peer, connect: Callable[..., Any], text: str) -> None:
    connect().execute(text)
    assert (peer.heard, peer.syncs) == ([*BEGIN, text], 1)


def test_in_autocommit_nothing_is_begun(peer: Peer, connect: Callable[..., Any]) -> None:
    connect(autocommit=True).execute("SELECT 1")
    assert peer.heard == ["SELECT 1"]


def test_a_statement_is_prepared_as_psycopg_would(peer: Peer, connect: Callable[..., Any]) -> None:
    """A statement that was executed often enough is prepared in the same round trip, and then executed under its name."""
    connection = connect(prepare_threshold=1)
    for _ in range(4):
        connection.execute("SELECT a")
        connection.commit()
    run = ["BEGIN", "SELECT a", "COMMIT"]
    assert peer.heard == ["prepare BEGIN", *run, "BEGIN", "prepare SELECT a", "SELECT a", "COMMIT", *run, *run]
    assert peer.syncs == 8
    connection.execute("SELECT a")
    connection.rollback()
    assert peer.heard[-2:] == ["ROLLBACK", "DEALLOCATE ALL"]
    connection.execute("SELECT a")
    assert peer.heard[-3:] == [*BEGIN, "SELECT a"], "psycopg has dropped all"


@pytest.mark.parametrize("kept", ["client", "server"])
def test_begin_is_sent_again_if_it_is_prepared_elsewhere_only(peer: Peer, connect: Callable[..., Any], kept: str) -> None:
    """If only the client or only the server has BEGIN prepared, the flight is repeated, and its statement runs once."""
    connection = connect()
    connection.execute("SELECT a")
    connection.commit()
    (peer.prepared if kept == "client" else connection.begins).clear()
    peer.heard.clear()
    connection.execute("SELECT a")
    assert peer.heard == [*(BEGIN if kept == "client" else BEGIN[1:]), "SELECT a"]
    assert connection.info.transaction_status.name == "INTRANS"


def test_begin_is_not_sent_again_and_again(peer: Peer, connect: Callable[..., Any]) -> None:
    """If the second try fails, too, the server's error is raised."""
    connection = connect()
    peer.refuses["BEGIN"] = "26000"
    with pytest.raises(errors.DuplicatePreparedStatement):
        connection.execute("SELECT a")
    assert peer.heard == [*BEGIN]
    assert connection.info.transaction_status.name == "IDLE"


@pytest.mark.parametrize("text", ["BEGIN", "SELECT a", "prepare SELECT a"])
def test_an_error_in_the_flight_is_the_servers(peer: Peer, connect: Callable[..., Any], text: str) -> None:
    """The error of the flight's first message that failed is raised, and the connection goes on after a rollback."""
    connection = connect(prepare_threshold=0)
    peer.refuses[text] = "42P01"
    with pytest.raises(errors.UndefinedTable):
        connection.execute("SELECT a")
    connection.rollback()
    del peer.refuses[text]
    connection.execute("SELECT a")
    assert peer.heard[-1] == "SELECT a"


def test_a_parameter_that_cannot_be_sent_leaves_a_transaction(peer: Peer, connect: Callable[..., Any]) -> None:
    """As in psycopg, the transaction has begun before the parameter is refused."""
    connection = connect()
    with pytest.raises(psycopg.ProgrammingError, match="cannot adapt"):
        connection.execute("UPDATE a SET b = %s", (object(),))
    assert connection.info.transaction_status.name == "INTRANS"
    assert peer.heard == ["BEGIN"]


@pytest.mark.parametrize("text", ["BEGIN", "SELECT a"])
@pytest.mark.parametrize(("code", "error"), [("lost", psycopg.OperationalError), ("FATAL 57P01", errors.AdminShutdown)])
def test_a_connection_that_is_lost_in_the_flight_is_closed(
    peer: Peer, connect: Callable[..., Any], text: str, code: str, error: type[Exception]
) -> None:
    """The error is what the server has said before it closed the connection."""
    connection = connect()
    peer.refuses[text] = code
    with pytest.raises(psycopg.OperationalError) as lost:
        connection.execute("SELECT a")
    assert type(lost.value) is error
    assert connection.closed


def test_a_connection_that_is_lost_behind_its_statement_says_so(peer: Peer, connect: Callable[..., Any]) -> None:
    """A statement has not succeeded if the server closes the connection before it has answered the whole flight."""
    connection = connect()
    peer.refuses["sync"] = "57P01"
    with pytest.raises(errors.AdminShutdown):
        connection.execute("SELECT a")
    assert connection.closed


def test_a_statement_that_cannot_be_sent_leaves_a_transaction(peer: Peer, connect: Callable[..., Any]) -> None:
    """A statement with more parameters than the protocol allows leaves a connection that can be used."""
    connection = connect()
    with pytest.raises(psycopg.OperationalError, match="number of parameters"):
        connection.execute("SELECT " + ",".join(["%s"] * 65536), range(65536))
    assert connection.info.transaction_status.name == "INTRANS"
    connection.execute("SELECT a")
    assert peer.heard[-1] == "SELECT a"


def test_nothing_is_prepared_if_nothing_may_be(peer: Peer, connect: Callable[..., Any]) -> None:
    """BEGIN is not prepared if psycopg is told to prepare nothing."""
    connect(prepare_threshold=None).execute("SELECT a")
    assert (peer.heard, peer.syncs) == (["BEGIN", "SELECT a"], 1)


def test_a_flight_that_is_given_up_closes_its_connection(peer: Peer, connect: Callable[..., Any]) -> None:
    """If nobody waits for the answers of a flight any more, nobody can get them by mistake."""
    connection = connect()
    steps = connection.cursor()._execute_gen("SELECT a")
    next(steps)
    steps.close()
    assert connection.closed


def test_a_cursor_may_execute_a_statement_again(peer: Peer, connect: Callable[..., Any]) -> None:
    connection = connect()
    cursor, statement = connection.cursor(), "SELECT a"
    for _ in range(2):
        cursor.execute(statement)
        connection.commit()
    assert peer.heard[4:] == ["BEGIN", "SELECT a", "COMMIT"]


def test_a_flight_that_was_never_left_ends_its_connection(peer: Peer, connect: Callable[..., Any]) -> None:
    """A connection that an interruption has left in the middle of a flight is closed when it is used next."""
    connection = connect()
    cursor = connection.cursor()
    connection.pgconn.enter_pipeline_mode()
    with pytest.raises(psycopg.OperationalError):
        cursor.execute("SELECT a")
    assert connection.closed


def test_a_cursor_that_is_closed_begins_nothing(peer: Peer, connect: Callable[..., Any]) -> None:
    cursor = connect().cursor()
    cursor.close()
    with pytest.raises(psycopg.InterfaceError, match="closed"):
        cursor.execute("SELECT a")
    assert peer.heard == []


def test_one_statement_that_is_dropped_leaves_begin_prepared(peer: Peer, connect: Callable[..., Any]) -> None:
    """If psycopg drops its oldest statement, BEGIN stays prepared."""
    connection = connect(prepare_threshold=0)
    connection.prepared_max = 1
    for text in ("SELECT a", "SELECT b", "SELECT c"):
        connection.execute(text)
        connection.commit()
    assert peer.heard.count("prepare BEGIN") == 1
    assert len(connection.begins) == 1
