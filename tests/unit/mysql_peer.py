"""As much of a server of MySQL as PyMySQL needs."""

import contextlib
import socket
import threading

from pymysql.constants import SERVER_STATUS
from sqlalchemy import create_engine, make_url

from aurora_router.drivers import pymysql as pymysql_driver
from aurora_router.servers import mysql

OK = b"\0\0\0"


def packet(number: int, payload: bytes) -> bytes:
    return len(payload).to_bytes(3, "little") + bytes([number]) + payload


class Peer(threading.Thread):
    """As much of a server as PyMySQL needs: it greets, and answers each command with OK, or with its text in `answers`.

    heard: the commands
    status: the status of the session in each OK
    silent: it does not even greet
    deaf: it reads no further command
    """

    def __init__(self, *, silent: bool = False) -> None:
        super().__init__(daemon=True)
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.heard: list[str] = []
        self.answers: dict[str, bytes] = {}
        self.status = SERVER_STATUS.SERVER_STATUS_AUTOCOMMIT
        self.silent = silent
        self.deaf = False
        self.closed = threading.Event()
        self.start()

    def run(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self.listener.accept()
                with client, contextlib.suppress(OSError, EOFError):
                    self.serve(client)

    def serve(self, client: socket.socket) -> None:
        if not self.silent:
            greeting = b"\x0a8.4.0\0" + b"\1\0\0\0" + b"a" * 8 + b"\0" + b"\xff\xf7" + b"\xff" + b"\2\0" + b"\xff\x81" + b"\x15"
            client.sendall(packet(0, greeting + b"\0" * 10 + b"a" * 12 + b"\0mysql_native_password\0"))
        while True:
            head = self.read(client, 4)
            if self.deaf:
                self.closed.wait()
            body = self.read(client, int.from_bytes(head[:3], "little"))
            if self.silent:
                continue
            text = body[1:].decode("latin1") if body[:1] == b"\3" else ""
            if text:
                self.heard.append(text)
                if text == "SET AUTOCOMMIT = 0":
                    self.status = 0
                elif text == "SET AUTOCOMMIT = 1":
                    self.status = SERVER_STATUS.SERVER_STATUS_AUTOCOMMIT
                elif text.startswith("START"):
                    self.status |= SERVER_STATUS.SERVER_STATUS_IN_TRANS
                elif text in ("COMMIT", "ROLLBACK"):
                    self.status &= ~SERVER_STATUS.SERVER_STATUS_IN_TRANS
            client.sendall(self.answers.get(text) or packet(head[3] + 1, OK + self.status.to_bytes(2, "little") + b"\0\0"))

    def close(self) -> None:
        self.closed.set()
        self.listener.shutdown(socket.SHUT_RDWR)  # wakes the thread
        self.listener.close()

    def read(self, client: socket.socket, size: int) -> bytes:
        data = b""
        while len(data) < size:
            more = client.recv(size - len(data))
            if not more:
                raise EOFError
            data += more
        return data


def connected(peer: Peer, connecting=lambda _: contextlib.nullcontext(), longest=None, **options):
    dialect = create_engine("mysql+pymysql://").dialect
    pymysql_driver.track_connecting_socket(dialect, connecting, longest)
    arguments, given = dialect.create_connect_args(make_url(f"mysql+pymysql://u@127.0.0.1:{peer.port}/d"))
    return dialect.connect(*arguments, **{**given, "ssl_disabled": True, **options})


def prepared(peer: Peer, **options):
    """The same, as units get it."""
    connection = connected(peer, **options)
    pymysql_driver.prepare_connection(connection, False, (), lambda: False, mysql)
    return connection


COLUMN = b"\x03def\0\0\0\x01n\x01n\x0c\x3f\0\x0b\0\0\0\x03\0\0\0\0\0"
END = b"\xfe\0\0\2\0"


def rows(*values: bytes) -> bytes:
    """A result of one column of numbers."""
    payloads = (b"\x01", COLUMN, END, *(bytes([len(value)]) + value for value in values), END)
    return b"".join(packet(number, payload) for number, payload in enumerate(payloads, 1))
