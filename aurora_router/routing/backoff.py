"""How long a loop waits between two attempts, and when it ends: tenacity's policies as a policy of `core/retry_loop`."""

from __future__ import annotations

from collections.abc import Callable

import tenacity
from tenacity.stop import stop_base
from tenacity.wait import wait_base

DEFAULT_BACKOFF = tenacity.wait_random_exponential(multiplier=0.02, max=2.0)
CONNECT_BACKOFF = tenacity.wait_random_exponential(multiplier=0.02, max=1.0)
RESOLVE_BACKOFF = tenacity.wait_random_exponential(multiplier=0.02, max=0.5)


class TenacityPolicy:
    """A policy that asks tenacity's policies. They judge by a state of tenacity's own.

    stop: whether to stop after a failure.
    wait: how long to wait between two attempts, in seconds.
    began: since when `stop` counts the time, in seconds, monotonic. None: since the first failure.
    allows: whether the retry budget allows another attempt. Takes the number of the failed attempt and its error.
    """

    def __init__(
        self,
        stop: stop_base,
        wait: wait_base,
        began: float | None,
        allows: Callable[[int, Exception], bool] = lambda *_: True,
    ) -> None:
        self._stop = stop
        self._wait = wait
        self._began = began
        self._state: tenacity.RetryCallState | None = None  # most units succeed at once, and need none
        self.allows = allows

    def wait(self, error: Exception) -> float:
        state = self._state
        if state is None:
            state = self._state = tenacity.RetryCallState(tenacity.Retrying(), None, (), {})
            if self._began is not None:
                state.start_time = self._began
        else:
            state.idle_for += state.upcoming_sleep
            state.prepare_for_next_attempt()
        state.set_exception((type(error), error, error.__traceback__))
        state.upcoming_sleep = self._wait(state)
        return state.upcoming_sleep

    def stop(self) -> bool:
        assert self._state is not None  # wait() comes first
        return self._stop(self._state)
