"""A late line between a reader and a writer that are only sockets."""

from __future__ import annotations

import contextlib
import socket
import threading

from aurora_router.local.late import DelayedLink
from tests.integration.shop import eventually

_SEND_THE_LOG = b"\x01\x00\x00\x00\x12"


def _write_for_ever(listener: socket.socket) -> None:
    """Send a log that never ends to everybody who connects, one after the other."""
    with contextlib.suppress(OSError):
        while True:
            reader, _ = listener.accept()
            with reader, contextlib.suppress(OSError):
                while True:
                    reader.sendall(b"x" * 4096)


def test_nothing_is_held_for_a_reader_that_is_gone() -> None:
    """If a reader hangs up while its writer sends, nothing stays held back, because `flush` would wait for ever."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=_write_for_ever, args=[listener], daemon=True).start()
        line = DelayedLink(listener.getsockname()[:2])
        line.seconds = 3600
        with contextlib.closing(line):
            for _ in range(50):
                with socket.create_connection((line.host, line.port)) as reader:
                    reader.sendall(_SEND_THE_LOG)
                    eventually(lambda: line.buffered_bytes > 0)
                eventually(lambda: line.buffered_bytes == 0, 5)
