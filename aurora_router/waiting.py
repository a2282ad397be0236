"""The one seam for waiting: wakeups, sleep, values that are local to a thread or task, and a shield for COMMIT.

Each wait of a unit goes through a `Waiting`. `ThreadWaiting` is its only implementation. The router's own threads stay threads
however units wait, so they use `ThreadWakeup` and `ThreadLocal` themselves.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from typing import Any, Generic, ParamSpec, Protocol, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class Wakeup(Protocol):
    """Wakes the one caller that waits for it. The caller makes it."""

    def wait(self, timeout: float) -> None:
        """Wait for `set()`, for at most `timeout` seconds. Return at once if it was called since the last wait."""

    def set(self) -> None:
        """Wake the caller, or let its next wait end at once.

        Any thread may call it, as often as it likes, also when the caller has ended.
        """


class Local(Protocol[T]):
    """One value for each thread, or for each task. It stays the same while the thread or task waits."""

    value: T | None


class Waiting(Protocol):
    """How a router's units wait. While a thread or task waits, the others go on.

    tests/unit/test_waiting.py holds each implementation to its promises.
    """

    def wakeup(self) -> Wakeup:
        """Make a wakeup for the caller."""

    def sleep(self, seconds: float) -> None:
        """Wait for a time, and for nothing else."""

    def local(self) -> Local[Any]:
        """Make a place for a value that no other thread or task sees. The value is None at first."""

    def shielded(self, send: Callable[P, T]) -> Callable[P, T]:
        """Wrap `send`, which sends a COMMIT. If the caller is cancelled meanwhile, the wrapper still waits for the answer."""


class ThreadWaiting:
    """The waiting of threads. An exception of a signal handler may end any wait at any moment."""

    def wakeup(self) -> ThreadWakeup:
        return ThreadWakeup()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    def local(self) -> ThreadLocal[Any]:
        return ThreadLocal()

    def shielded(self, send: Callable[P, T]) -> Callable[P, T]:
        return send  # threads cannot be cancelled


class ThreadWakeup:
    """A wakeup for one thread.

    It is a lock that is held until `set()`. A threading.Event would not do, because an exception of a signal handler can
    leave it half-done.
    """

    __slots__ = ("_lock",)

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lock.acquire()

    def wait(self, timeout: float) -> None:
        self._lock.acquire(timeout=min(max(timeout, 0.0), threading.TIMEOUT_MAX))

    def set(self) -> None:
        with contextlib.suppress(RuntimeError):  # it was set already
            self._lock.release()


class ThreadLocal(threading.local, Generic[T]):
    """One value for each thread."""

    value: T | None = None
