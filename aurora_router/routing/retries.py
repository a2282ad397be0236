"""Run a unit again if it fails because of the cluster and not because of what it does."""

from __future__ import annotations

import itertools
import time
import warnings
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, Generic, Protocol, TypeVar, cast

from sqlalchemy.exc import PendingRollbackError
from sqlalchemy.orm import Session

from aurora_router.cluster.error_classification import FACTS
from aurora_router.core import events
from aurora_router.core.retry_loop import Done, Failed, Policy, Raise, Sleep, is_retried, next_step
from aurora_router.errors import ConfigurationError, RouterError
from aurora_router.routing.retry_context import RetryContext
from aurora_router.routing.unit import CommitCheck

S = TypeVar("S", bound=Session)

_transactions = itertools.count(1)


class RetryableSession(Protocol):
    """A session whose units can belong to an attempt."""

    router: Any

    @property
    def spans_databases(self) -> bool:
        """Whether its units may write to other databases as well."""
        ...

    def join_retry(self, retry: RetryContext, commit_check: CommitCheck | None) -> None: ...


class AttemptEvents:
    """Publishes the start and the end of one attempt.

    publish: called with an event.
    transaction: a number that all attempts of one function share.
    number: of the attempt, from 1.
    """

    def __init__(self, publish: Callable[[events.Event], object], transaction: int, number: int) -> None:
        self._publish = publish
        self._transaction = transaction
        self._number = number
        self._began: float | None = None

    def started(self) -> None:
        """Publish the start."""
        self._began = time.monotonic()
        self._publish(events.AttemptStarted(self._number, self._transaction))

    def ended(self, error: BaseException | None, *, committed: bool = False) -> None:
        """Publish the end, once."""
        began, self._began = self._began, None
        if began is not None:
            name = type(error).__name__ if error is not None else None
            took = time.monotonic() - began
            self._publish(events.AttemptEnded(self._number, self._transaction, name, committed, took))


class Attempt(Generic[S]):
    """One attempt of a unit: `with attempt as session:`.

    The unit commits when the loop goes on after the block, and not before. A block that is left by return or break commits
    nothing. It could not be retried, and its caller would not learn that the COMMIT failed.
    """

    def __init__(
        self, number: int, retry: RetryContext, make: Callable[[RetryContext], S], told: AttemptEvents | None = None
    ) -> None:
        self.number = number
        self.error: Exception | None = None  # the error because of which the unit runs again
        self.loop_ended = False  # the loop has ended, so nobody will commit
        self.retry = retry
        self._make = make
        self._told = told
        self._session: S | None = None

    def __enter__(self) -> S:
        if self.loop_ended or self._session is not None:
            raise RouterError("an attempt is for one `with` block, in the loop that made it")
        self._session = self._make(self.retry)
        if self._told is not None:
            self._told.started()
        return self._session

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> bool:
        if error is None:
            return False
        self.close(error)
        if isinstance(error, Exception) and self._is_retried(error):
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
        except BaseException as failed:
            elsewhere = cast(RetryableSession, session).spans_databases
            self.close(failed)  # the rollback shows whether everything was undone
            if not isinstance(failed, Exception) or not self._is_retried(failed, may_have_committed_elsewhere=elsewhere):
                raise
            self.error = failed
        else:
            if self._told is not None:
                self._told.ended(None, committed=True)
        finally:
            self.close()

    def close(self, error: BaseException | None = None) -> bool:
        """Close the session. Return whether there was one that was neither committed nor closed.

        error: the error of its unit, if the unit has failed.
        """
        session, self._session = self._session, None
        if session is None:
            return False
        try:
            session.close()
        finally:
            if self._told is not None:
                self._told.ended(error)
        return True

    def _is_retried(self, error: Exception, *, may_have_committed_elsewhere: bool = False) -> bool:
        retry = self.retry
        known = retry.failed if isinstance(error, PendingRollbackError) else getattr(error, FACTS, None)
        failed = Failed(error, known, retry.failed, retry.can_be_undone, retry.read_only_refusals, may_have_committed_elsewhere)
        return is_retried(failed)


def attempts(
    router: object,
    session_factory: Callable[[], S],
    commit_check: CommitCheck | None,
    deadline: float | None,
    policy: Policy,
    sleep: Callable[[float], None],
    publish: Callable[[events.Event], object] | None = None,
) -> Iterator[Attempt[S]]:
    """Yield attempts until one succeeds, or until the policy allows no more.

    router: the router of the sessions that session_factory makes.
    session_factory: makes a routing session, as a sessionmaker does.
    commit_check: that of the sessions.
    deadline: seconds, monotonic, until which units may wait for a writer. None: as long as any unit may.
    policy: how long to wait between two attempts, and when to stop.
    sleep: waits for some seconds.
    publish: called with the start and the end of each attempt; None if nobody listens.

    Raises the last error if no more attempts are allowed, and ConfigurationError for sessions of another router.
    """

    def make(retry: RetryContext) -> S:
        factory: Any = getattr(session_factory, "session_factory", session_factory)  # a scoped_session may have one in use
        session: S = factory()
        if getattr(session, "router", None) is not router:
            raise ConfigurationError(
                "Session must make routing sessions of this router: sessionmaker(class_=RoutingSession, ...)"
            )
        cast(RetryableSession, session).join_retry(retry, commit_check)
        return session

    retry: RetryContext | None = None
    transaction = next(_transactions) if publish is not None else None
    for number in itertools.count(1):
        retry = RetryContext(deadline, retry, transaction)
        told = AttemptEvents(publish, transaction, number) if publish and transaction else None
        attempt = Attempt(number, retry, make, told)
        try:
            yield attempt
        except GeneratorExit:  # an error raised here would reach nobody, so it only warns
            attempt.loop_ended = True
            if attempt.close():
                warnings.warn(
                    "a loop over attempts() was left by return or break; nothing of its block was committed",
                    RuntimeWarning,
                    stacklevel=2,
                )
            raise
        attempt.commit()
        match next_step(number, attempt.error, policy):
            case Done():
                return
            case Sleep(seconds):
                sleep(seconds)
            case Raise(error):
                raise error
