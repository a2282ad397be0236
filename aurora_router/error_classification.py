"""Tell which failure an exception stands for, and what the failure means for the caller."""

from __future__ import annotations

from sqlalchemy import exc

from aurora_router.core.failures import Facts, Failure, Phase, facts
from aurora_router.core.statements import verdict
from aurora_router.core.topology import Silence
from aurora_router.drivers import driver_of
from aurora_router.errors import (
    AmbiguousWriter,
    NoReaderAvailable,
    NoWriterAvailable,
    OutcomeUnknown,
    RouterError,
    StaleRead,
    WrongServer,
)
from aurora_router.servers import ServerFamily, usual

FACTS = "aurora_router_facts"
"""An attribute of errors that passed through a router: what it knew when the error happened. The error itself shows less."""


def classify_error(error: BaseException) -> Facts:
    """Say what is known of a failed call: was anything sent, is the outcome known, may the unit run again from its beginning.

    For an error that did not pass through a router, it assumes that statements run in a transaction. The driver's own error does
    not say whether it came in COMMIT. So if the connection was lost, it may have been a COMMIT.

    error: from a router's session or connection, or any other error of SQLAlchemy or the driver.
    """
    if isinstance(error, RouterError):
        return _of_router(error)
    known: Facts | None = getattr(error, FACTS, None)
    if known is not None:
        return known
    if isinstance(error, exc.PendingRollbackError):
        return Facts(Failure.OTHER, sent=False, outcome_known=True, safe_to_repeat=False)
    if isinstance(error, exc.DBAPIError):
        original = error.orig
        driver = driver_of(original)
        if driver is None:
            return Facts(Failure.OTHER, sent=True, outcome_known=not error.connection_invalidated, safe_to_repeat=False)
        if error.statement is not None:
            ends = verdict(error.statement, usual(driver.PROTOCOL).DIALECT).ends
            phase = Phase.COMMIT if ends else Phase.WRITER_STATEMENT
        else:
            unanswered = driver.code(original) is None and not error.connection_invalidated
            connecting = unanswered or (original is not None and driver.is_from_connecting(original))
            phase = Phase.WRITER_CONNECTING if connecting else Phase.COMMIT
        return facts(driver_failure(original, disconnected=error.connection_invalidated, phase=phase), phase)
    if isinstance(error, exc.TimeoutError):  # the pool's
        return Facts(Failure.BUSY, sent=False, outcome_known=True, safe_to_repeat=True)
    driver = driver_of(error)
    if driver is not None:  # the driver's own
        phase = Phase.WRITER_CONNECTING if driver.is_from_connecting(error) else Phase.WRITER_STATEMENT
        lost = driver.code(error) is None and type(error).__name__ == "OperationalError"
        kind = driver_failure(error, disconnected=lost, phase=phase)
        if kind in (Failure.LOST, Failure.TIMED_OUT) and phase is Phase.WRITER_STATEMENT:
            phase = Phase.COMMIT
        return facts(kind, phase)
    return Facts(Failure.OTHER, sent=True, outcome_known=True, safe_to_repeat=False)


def driver_failure(
    error: BaseException | None,
    server: ServerFamily | None = None,
    *,
    disconnected: bool,
    phase: Phase = Phase.WRITER_STATEMENT,
) -> Failure:
    """Return the failure that an error of the driver stands for.

    While connecting, an error that lasts until somebody changes something is REFUSED. One without a code is CONNECT.

    server: the family that the error came from; None stands for the usual one.
    """
    driver = driver_of(error)
    if error is None or driver is None:
        return Failure.OTHER
    server = server or usual(driver.PROTOCOL)
    code, said = driver.code(error), driver.words(error)
    kind = driver.own_failure(code, said) or server.failure(code, said, disconnected=disconnected)
    if phase in (Phase.READER_CONNECTING, Phase.WRITER_CONNECTING):
        if kind in (Failure.OTHER, Failure.CONNECT) and (
            driver.explain(error)[1] or server.explain_refusal(code, said)[0] is Silence.MISCONFIGURED
        ):
            return Failure.REFUSED
        if kind is Failure.OTHER and code is None:
            return Failure.CONNECT
    return kind


def _of_router(error: RouterError) -> Facts:
    if isinstance(error, OutcomeUnknown):
        return Facts(Failure.LOST, sent=True, outcome_known=False, safe_to_repeat=False)
    if isinstance(error, StaleRead):
        return Facts(Failure.SERIALIZATION, sent=True, outcome_known=True, safe_to_repeat=True)
    passing = isinstance(error, NoWriterAvailable | NoReaderAvailable | AmbiguousWriter | WrongServer)
    return Facts(Failure.CONNECT if passing else Failure.OTHER, error.sent, error.outcome_known, safe_to_repeat=passing)
