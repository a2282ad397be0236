"""A line between a reader and its writer that delivers the writer's log late.

The servers' own delay (SOURCE_DELAY, MASTER_DELAY) knows whole seconds only. MariaDB's counts from timestamps that are cut off
to seconds. If the SQL thread is stopped and started in turn, the reader says in between that it is broken. So this line holds
the log back. Once a reader has asked for the log, all data from the writer arrives `seconds` late, in order. All other data
passes at once.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable

_CHUNK = 256 * 1024
_MAX_BUFFERED = 64 * 2**20  # bytes, then the writer must wait
_RESET = struct.pack("ii", 1, 0)  # linger for 0 seconds: a close is a reset
# A reader asks for the log in a packet that begins with one of these, after the length.
_BINLOG_DUMP = (b"\0\x12", b"\0\x1e")


class DelayedLink:
    """A forwarder of connections to `target`, on which the log comes `seconds` late.

    Raises OSError if it cannot listen.
    """

    def __init__(self, target: tuple[str, int]) -> None:
        self.target = target  # of the next connection
        self._changed = threading.Condition()
        self._seconds = 0.0
        self._flushed_at = 0.0  # seconds, monotonic: earlier data is not held back
        self._buffered = 0  # bytes
        self._sockets: set[socket.socket] = set()
        self._closed = False
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.host, self.port = self._listener.getsockname()[:2]
        self._start(self._accept)

    @property
    def seconds(self) -> float:
        """How late the log is. A change also counts for the data on its way."""
        return self._seconds

    @seconds.setter
    def seconds(self, seconds: float) -> None:
        with self._changed:
            self._seconds = seconds
            self._changed.notify_all()

    @property
    def buffered_bytes(self) -> int:
        """How many bytes are on their way."""
        return self._buffered

    def flush(self, timeout: float = 10.0) -> None:
        """Deliver the held data at once.

        Raises TimeoutError if the reader does not take it in `timeout` seconds.
        """
        with self._changed:
            self._flushed_at = time.monotonic()
            self._changed.notify_all()
            if not self._changed.wait_for(lambda: not self._buffered, timeout):
                raise TimeoutError(f"waited {timeout:.1f} s for a reader to take in its log")

    def close(self) -> None:
        """End all connections and listen no more."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            sockets = [self._listener, *self._sockets]
        for each in sockets:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)  # wakes the thread that waits on it
        self._listener.close()

    # -- threads

    def _start(self, run: Callable[..., None], *args: object) -> None:
        threading.Thread(target=run, args=args, name=f"late-line-{self.port}", daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                reader, _ = self._listener.accept()
            except OSError:
                return
            self._start(self._serve, reader)

    def _serve(self, reader: socket.socket) -> None:
        """Forward data from the reader to the writer. Other threads serve the way back."""
        with reader, contextlib.suppress(OSError), socket.create_connection(self.target, 10) as writer:
            writer.settimeout(None)
            # Without a reset, the writer may wait for a minute to send on.
            writer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            for side in (reader, writer):
                side.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self._changed:
                if self._closed:
                    return
                self._sockets |= {reader, writer}
            connection = _Connection(reader, writer)
            threads = [threading.Thread(target=run, args=[connection], daemon=True) for run in (self._take, self._pass_on)]
            try:
                for thread in threads:
                    thread.start()
                while data := reader.recv(_CHUNK):
                    connection.dumping |= data[3:5] in _BINLOG_DUMP
                    writer.sendall(data)
            finally:
                with self._changed:
                    connection.ended = True
                    self._changed.notify_all()
                with contextlib.suppress(OSError):
                    writer.shutdown(socket.SHUT_RDWR)
                for thread in threads:
                    thread.join()
                with self._changed:
                    self._sockets -= {reader, writer}

    def _take(self, connection: _Connection) -> None:
        """Take in the data from the writer. An empty piece marks its end."""
        data = b"?"
        while data:
            try:
                data = connection.writer.recv(_CHUNK)
            except OSError:
                data = b""
            with self._changed:
                if connection.ended:  # nobody takes it out of the queue any more
                    return
                connection.queue.append((time.monotonic() if connection.dumping else 0.0, data))
                self._buffered += len(data)
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._buffered < _MAX_BUFFERED or connection.ended or self._closed)

    def _pass_on(self, connection: _Connection) -> None:
        """Send the data on when it is due."""
        data = b"?"
        while data:
            with self._changed:
                while not connection.queue or (left := self._left(connection.queue[0][0])) > 0:
                    if connection.ended or self._closed:
                        self._buffered -= sum(len(piece) for _, piece in connection.queue)
                        self._changed.notify_all()
                        return
                    self._changed.wait(left if connection.queue else None)
                data = connection.queue.popleft()[1]
            with contextlib.suppress(OSError):
                connection.reader.sendall(data) if data else connection.reader.shutdown(socket.SHUT_RDWR)
            with self._changed:
                self._buffered -= len(data)
                self._changed.notify_all()

    def _left(self, came: float) -> float:
        """Return the seconds until data is due.

        came: when the data came from the writer (seconds, monotonic). 0: it is due at once.
        """
        return came + self._seconds - time.monotonic() if came > self._flushed_at else 0.0


class _Connection:
    """One connection, with the data that is not yet due."""

    def __init__(self, reader: socket.socket, writer: socket.socket) -> None:
        self.reader, self.writer = reader, writer
        self.queue: deque[tuple[float, bytes]] = deque()
        self.dumping = False
        self.ended = False
