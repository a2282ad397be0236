"""The events of one probe: its start, and its one end."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from aurora_router.core import events
from aurora_router.core.instance import Role


class ProbeEvents:
    """Publishes the start of one probe when it is made, and the end of the probe once, whoever finds it first.

    The probe asks all servers behind its instance. It succeeds if one of them answers.

    publish: called with an event, which it may publish later; None if the probe is not told of.
    """

    def __init__(self, instance_id: str, publish: Callable[[events.Event], object] | None = None) -> None:
        self._instance_id = instance_id
        self._publish = publish
        self._lock = threading.RLock()  # reentrant, because the thread that holds it may garbage-collect the Router
        self._role: Role | None = None
        self._error = ""
        self._began = time.monotonic()
        if publish is not None:
            publish(events.ProbeStarted(instance_id, at=time.time()))

    def answered(self, role: Role) -> None:
        """Note that a server has answered."""
        self._role = role

    def failed(self, error: str) -> None:
        """Note that a server has not answered."""
        self._error = error

    def ended(self, error: str = "") -> None:
        """Publish the end, unless that was done.

        error: why the probe has ended, if not because of an answer or failure that was noted.
        """
        with self._lock:
            publish, self._publish = self._publish, None
            if publish is None:
                return
            took, at = time.monotonic() - self._began, time.time()
            if self._role is not None:
                publish(events.ProbeSucceeded(self._instance_id, self._role.value, took, at=at))
            else:
                publish(events.ProbeFailed(self._instance_id, error or self._error, took, at=at))
