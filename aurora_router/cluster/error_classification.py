"""Tell which failure an exception stands for, and what the failure means for the caller."""

from __future__ import annotations

from sqlalchemy import exc

from aurora_router.core.failures import (
    NOT_SENT,
    POOL_IS_FULL,
    UNKNOWN,
    Facts,
    Failure,
    Phase,
    facts,
    facts_of_own,
    own_error,
    traits,
    while_connecting,
)
from aurora_router.core.instance import ProbeFailure
from aurora_router.core.sql.analysis import analyze
from aurora_router.drivers import Driver, driver_of
from aurora_router.errors import RouterError
from aurora_router.servers import ServerFamily, usual

FACTS = "aurora_router_facts"
"""An attribute of errors that passed through a router: the facts that the router knew. The error itself shows less."""


def classify_error(error: BaseException) -> Facts:
    """Return the facts about a failed call.

    They say if anything was sent, if the outcome is known, and if the unit may run again from its beginning.

    An error that did not pass through a router shows less. The function then assumes that statements run in a transaction. The
    driver's own error does not say whether it came in COMMIT. So if the connection was lost, the call may have been a COMMIT.

    error: from a router's session or connection, or any other error of SQLAlchemy or the driver.
    """
    if isinstance(error, RouterError):
        return facts_of_own(error)
    known: Facts | None = getattr(error, FACTS, None)
    if known is not None:
        return known
    if isinstance(error, exc.PendingRollbackError):
        return NOT_SENT
    if isinstance(error, exc.DBAPIError):
        original = error.orig
        driver = driver_of(original)
        if driver is None:
            return UNKNOWN._replace(outcome_known=not error.connection_invalidated)
        if error.statement is not None:
            ends = analyze(error.statement, usual(driver.PROTOCOL).DIALECT).may_end_transaction
            phase = Phase.COMMIT if ends else Phase.WRITER_STATEMENT
        else:
            unanswered = driver.code(original) is None and not error.connection_invalidated
            connecting = unanswered or (original is not None and _is_from_connecting(original, driver))
            phase = Phase.WRITER_CONNECTING if connecting else Phase.COMMIT
        return facts(failure_of(original, disconnected=error.connection_invalidated, phase=phase), phase)
    if isinstance(error, exc.TimeoutError):  # the pool's
        return POOL_IS_FULL
    driver = driver_of(error)
    if driver is not None:  # the driver's own
        phase = Phase.WRITER_CONNECTING if _is_from_connecting(error, driver) else Phase.WRITER_STATEMENT
        lost = driver.code(error) is None and type(error).__name__ == "OperationalError"
        failure = failure_of(error, disconnected=lost, phase=phase)
        if phase is Phase.WRITER_STATEMENT and traits(failure).may_hide_commit:
            phase = Phase.COMMIT
        return facts(failure, phase)
    return UNKNOWN


def _is_from_connecting(error: BaseException, driver: Driver) -> bool:
    return driver.is_from_connecting(error) or driver.code(error) in usual(driver.PROTOCOL).CONNECTING


def failure_of(
    error: BaseException | None,
    server: ServerFamily | None = None,
    *,
    disconnected: bool,
    phase: Phase = Phase.WRITER_STATEMENT,
) -> Failure:
    """Return the failure that an error of the driver stands for.

    server: the family of the server that the error came from; None for the usual family.
    """
    driver = driver_of(error)
    if error is None or driver is None:
        return UNKNOWN.failure
    server = server or usual(driver.PROTOCOL)
    code, words = driver.code(error), driver.words(error)
    failure = driver.own_failure(code, words) or server.failure(code, words, disconnected=disconnected)
    if phase not in (Phase.READER_CONNECTING, Phase.WRITER_CONNECTING):
        return failure
    is_refusal = driver.explain(error)[1] != "" or server.explain_refusal(code, words)[0] is ProbeFailure.MISCONFIGURED
    return while_connecting(failure, is_refusal=is_refusal, has_code=code is not None)


def is_contention(error: BaseException) -> bool:
    """Return whether another attempt after this error spends nothing of the retry budget.

    It spends nothing if no instance is in trouble, because the waits between the attempts spare the instances enough. It also
    spends nothing if the error is waited out: see `OwnError`.
    """
    is_waited_out = isinstance(error, RouterError) and own_error(error).is_waited_out
    return is_waited_out or traits(classify_error(error).failure).is_contention
