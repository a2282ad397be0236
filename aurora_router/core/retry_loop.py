"""The loops of run_transaction, of a checkout and of a lost COMMIT, in pure steps.

A step decides whether an attempt is retried, and what comes next. A driver makes the attempts, and carries out the steps.
`retries.attempts()` is the driver of run_transaction for threads. `Checkout` is the driver of a checkout, and
`commit_check.resolve_outcome()` that of a lost COMMIT.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from aurora_router.core.failures import Facts, is_run_again, own_error
from aurora_router.errors import RouterError


class Failed(NamedTuple):
    """How an attempt failed, as far as that decides whether another attempt follows.

    error: its error.
    known: the facts that belong to the error itself. None: the error passed through no router.
    last: the facts about the last failure of the attempt's unit. None: there was none.
    is_undone: whether nothing of the attempt is left, as far as known.
    refusals: in how many attempts the server refused to write, although it is the writer.
    may_have_committed_elsewhere: whether the error is of a commit(), and the unit has written to other databases, too.
    """

    error: Exception
    known: Facts | None
    last: Facts | None
    is_undone: bool
    refusals: int = 0
    may_have_committed_elsewhere: bool = False


def is_retried(failed: Failed) -> bool:
    """Return whether the unit of a failed attempt may run again."""
    own = own_error(failed.error) if isinstance(failed.error, RouterError) else None
    if failed.may_have_committed_elsewhere and not (own is not None and own.is_before_commit):
        return False
    if not failed.is_undone:
        return False
    if own is not None and own.is_waited_out:
        return True
    if failed.known is None or failed.known is not failed.last:
        # This is another database's error, or an earlier one that the application raises again on its own account.
        return False
    return is_run_again(failed.known, failed.refusals)


class Done(NamedTuple):
    """The unit has committed, so the loop is over."""


class Sleep(NamedTuple):
    """Wait so many seconds, and then make another attempt."""

    seconds: float


class Raise(NamedTuple):
    """No other attempt may follow, so raise the error of the last one."""

    error: Exception


Step = Done | Sleep | Raise
_DONE = Done()


class Policy(Protocol):
    """How long a loop waits, and when it ends."""

    def wait(self, error: Exception) -> float:
        """Return the seconds to wait after a failed attempt. It is called once after each one, before stop()."""

    def stop(self) -> bool:
        """Return whether the attempt that has just failed was the last one."""

    def allows(self, number: int, error: Exception) -> bool:
        """Return whether the retry budget allows another attempt. It is called last, because it counts the retry.

        number: of the attempt that failed, from 1.
        """


def next_step(number: int, error: Exception | None, policy: Policy) -> Step:
    """Decide what comes after an attempt.

    number: of the attempt, from 1.
    error: the error for which it may be retried. None: its unit has committed.
    """
    if error is None:
        return _DONE
    seconds = policy.wait(error)
    if policy.stop() or not policy.allows(number, error):
        return Raise(error)
    return Sleep(seconds)
