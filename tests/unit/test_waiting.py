"""Threads wait for a wakeup, and each has its own value of a local."""

from __future__ import annotations

import threading
import time

from aurora_router.waiting import ThreadWaiting


def test_a_bell_that_rang_before_ends_the_wait_at_once():
    """A `set()` is not lost if it comes before the wait, and several count as one."""
    wakeup = ThreadWaiting().wakeup()
    wakeup.set()
    wakeup.set()
    began = time.monotonic()
    wakeup.wait(60.0)
    assert time.monotonic() - began < 30
    wakeup.wait(0.01)  # the second one does not count
    wakeup.wait(-1.0)


def test_a_bell_wakes_the_thread_that_waits():
    wakeup = ThreadWaiting().wakeup()
    woken = threading.Event()

    def wait() -> None:
        wakeup.wait(float("inf"))
        woken.set()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    wakeup.set()
    assert woken.wait(30)
    thread.join()


def test_a_local_is_another_one_in_each_thread():
    local = ThreadWaiting().local()
    seen = []
    local.value = "mine"
    thread = threading.Thread(target=lambda: seen.append(local.value))
    thread.start()
    thread.join()
    assert (local.value, seen) == ("mine", [None])
