"""Readers of the protocols of PostgreSQL, MySQL and MariaDB. They find the statements of clients, and when an answer is due."""

from __future__ import annotations

import struct
from dataclasses import dataclass

_SSL_REQUEST, _GSS_REQUEST = 80877103, 80877104
_COM_QUIT, _COM_QUERY = b"\x01", b"\x03"
_TLS_REQUEST = 32  # bytes of the packet that asks MySQL for encryption


@dataclass(frozen=True)
class Message:
    """One message of a client.

    statement: the text of the statement that the message executes; None for other messages.
    sync: whether the client then waits for an answer.
    """

    statement: str | None
    sync: bool


class PostgresReader:
    """A reader of the client's side of PostgreSQL's protocol (version 3). It stops at data that it does not know."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._started = False  # the startup message has been seen
        self._asked_for_tls = False
        self._readable = True
        self._prepared: dict[bytes, str] = {}
        self._portals: dict[bytes, str] = {}

    def server_sent(self, data: bytes) -> None:
        # The answer is one byte. N means no. After any other byte all is encrypted.
        if self._asked_for_tls:
            self._asked_for_tls = False
            self._readable = self._readable and data[:1] == b"N"
        elif not self._started:
            self._readable = False  # a server that speaks first is not PostgreSQL

    def client_sent(self, data: bytes) -> list[Message]:
        found: list[Message] = []
        if not self._readable:
            return found
        self._buffer += data
        while self._readable and not self._asked_for_tls:
            head = 1 if self._started else 0
            if len(self._buffer) < head + 4:
                break
            (length,) = struct.unpack_from("!I", self._buffer, head)
            if not 4 <= length <= (2**30 if self._started else 10_000):
                self._readable = False
                break
            if len(self._buffer) < head + length:
                break
            kind, body = bytes(self._buffer[:head]), bytes(self._buffer[head + 4 : head + length])
            del self._buffer[: head + length]
            if not self._started:
                self._startup(body)
            elif (message := self._message(kind, body)) is not None:
                found.append(message)
        return found

    def _startup(self, body: bytes) -> None:
        (code,) = struct.unpack_from("!I", body.ljust(4, b"\0"))
        if code in (_SSL_REQUEST, _GSS_REQUEST):
            self._asked_for_tls = True
        elif code >> 16 == 3:
            self._started = True
        else:
            self._readable = False  # a cancel request, or another protocol

    def _message(self, kind: bytes, body: bytes) -> Message | None:
        names = [*body.split(b"\0", 2), b"", b""]
        match kind:
            case b"Q":
                return Message(names[0].decode(errors="replace"), sync=True)
            case b"P":
                self._prepared[names[0]] = names[1].decode(errors="replace")
            case b"B":
                self._portals[names[0]] = self._prepared.get(names[1], "")
            case b"E":
                return Message(self._portals.get(names[0], ""), sync=False)
            case b"S" | b"F":
                return Message(None, sync=True)
        return None


class MysqlReader:
    """A reader of the client's side of MySQL's protocol. It reads the header of each packet, and the text of each query."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._readable = True

    def server_sent(self, data: bytes) -> None:
        pass

    def client_sent(self, data: bytes) -> list[Message]:
        found: list[Message] = []
        if self._readable:
            self._buffer += data
        while len(self._buffer) >= 5:
            length, number = int.from_bytes(self._buffer[:3], "little"), self._buffer[3]
            if len(self._buffer) < 4 + length:
                break
            body = bytes(self._buffer[4 : 4 + length])
            del self._buffer[: 4 + length]
            # A packet with another number continues an earlier one, or belongs to the login.
            if number == 0 and body[:1] != _COM_QUIT:
                found.append(Message(body[1:].decode(errors="replace") if body[:1] == _COM_QUERY else None, sync=True))
            elif number == 1 and length == _TLS_REQUEST:
                self._readable = False
                self._buffer.clear()
        return found
