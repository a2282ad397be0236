"""Run a unit again if it fails because of the cluster and not because of what it does."""

from __future__ import annotations

import itertools
import time
import warnings
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, Generic, Protocol, TypeVar, cast

import tenacity
from sqlalchemy.exc import PendingRollbackError
from sqlalchemy.orm import Session
from tenacity.stop import stop_base
from tenacity.wait import wait_base

from aurora_router.core.failures import Facts, is_run_again, own_error
from aurora_router.error_classification import FACTS
from aurora_router.errors import ConfigurationError, RouterError, StaleRead
from aurora_router.unit import CommitCheck, Run

S = TypeVar("S", bound=Session)

WAIT = tenacity.wait_random_exponential(multiplier=0.02, max=2.0)


class Runnable(Protocol):
    """A session whose units can belong to a run."""

    router: Any

    @property
    def spans_databases(self) -> bool:
        """Whether its units may write to other databases as well."""
        ...

    def run_under(self, run: Run, commit_check: CommitCheck | None) -> None: ...


class Attempt(Generic[S]):
    """One run of a unit: `with attempt as session:`.

    The unit commits when the loop goes on after the block, and not before. A block that was left by return or break cannot run
    again, and its caller could not learn that the COMMIT failed.
    """

    def __init__(self, number: int, run: Run, make: Callable[[Run], S]) -> None:
        self.number = number
        self.error: Exception | None = None  # the error because of which the unit runs again
        self.left = False  # the loop has ended, so nobody will commit
        self.run = run
        self._make = make
        self._session: S | None = None

    def __enter__(self) -> S:
        if self.left or self._session is not None:
            raise RouterError("an attempt is for one `with` block, in the loop that made it")
        self._session = self._make(self.run)
        return self._session

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> bool:
        if error is None:
            return False
        self.leave()
        if isinstance(error, Exception) and self._may_run_again(error):
            self.error = error
        return self.error is not None

    def commit(self) -> None:
        """Commit what the block did, if the block came to its end.

        Raises the error of the flush or the COMMIT, unless the unit may run again.
        """
        session = self._session
        if session is None:
            return
        try:
            session.commit()
        except Exception as failed:
            # With several databases, another one may have committed already. A flush raises StaleRead before any COMMIT.
            late = cast(Runnable, session).spans_databases and not isinstance(failed, StaleRead)
            self.leave()  # the rollback shows whether everything was undone
            if late or not self._may_run_again(failed):
                raise
            self.error = failed
        finally:
            self.leave()

    def leave(self) -> bool:
        """Close the session. Return whether there was one that was neither committed nor closed."""
        session, self._session = self._session, None
        if session is not None:
            session.close()
        return session is not None

    def _may_run_again(self, error: Exception) -> bool:
        if not self.run.is_undoable:
            return False
        if isinstance(error, RouterError) and own_error(error).is_waited_out:
            return True
        last = self.run.failed
        known: Facts | None = last if isinstance(error, PendingRollbackError) else getattr(error, FACTS, None)
        if known is None or known is not last:
            # This is another database's error, or an earlier one that the application raises again on its own account.
            return False
        return is_run_again(known, self.run.refusals)


def attempts(
    router: object,
    Session: Callable[[], S],
    commit_check: CommitCheck | None,
    deadline: float | None,
    stop: stop_base,
    wait: wait_base | None,
    repeats: Callable[[int, BaseException], bool],
) -> Iterator[Attempt[S]]:
    """Yield attempts until one succeeds, or until `stop` or `repeats` allows no more.

    router: the router of the sessions that Session makes.
    Session: makes a routing session, as a sessionmaker does.
    commit_check: that of the sessions.
    deadline: seconds, monotonic. None: `stop` counts the time from the first failure.
    stop: whether to stop after a failure.
    wait: how long to wait between two runs, in seconds. None: WAIT.
    repeats: whether another run may follow, by the number of the run that failed and its error.

    Raises the last error if no more attempts are allowed, and ConfigurationError for a Session of another router.
    """

    def make(run: Run) -> S:
        factory: Any = getattr(Session, "session_factory", Session)  # a scoped_session's own session may be in use
        session: S = factory()
        if getattr(session, "router", None) is not router:
            raise ConfigurationError(
                "Session must make routing sessions of this router: sessionmaker(class_=RoutingSession, ...)"
            )
        cast(Runnable, session).run_under(run, commit_check)
        return session

    began = time.monotonic()
    state: tenacity.RetryCallState | None = None  # most runs succeed at once, and need none
    run: Run | None = None
    for number in itertools.count(1):
        run = Run(deadline, run)
        attempt = Attempt(number, run, make)
        try:
            yield attempt
        except GeneratorExit:  # an error raised here would reach nobody, so it only warns
            attempt.left = True
            if attempt.leave():
                warnings.warn(
                    "a loop over attempts() was left by return or break; nothing of its block was committed",
                    RuntimeWarning,
                    stacklevel=2,
                )
            raise
        attempt.commit()
        error = attempt.error
        if error is None:
            return
        if state is None:
            state = tenacity.RetryCallState(tenacity.Retrying(), None, (), {})
            if deadline is not None:
                state.start_time = began
        state.set_exception((type(error), error, error.__traceback__))
        state.upcoming_sleep = (wait or WAIT)(state)
        if stop(state) or not repeats(attempt.number, error):
            raise error
        tenacity.nap.sleep(state.upcoming_sleep)
        state.idle_for += state.upcoming_sleep
        state.prepare_for_next_attempt()
