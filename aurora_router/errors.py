"""The errors of the library. Every message says what happened, on which instance, and what to do."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Any

from sqlalchemy.exc import OperationalError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = [
    "AmbiguousWriter",
    "ConfigurationError",
    "NoReaderAvailable",
    "NoWriterAvailable",
    "Outcome",
    "OutcomeUnknown",
    "ReadOnlyViolation",
    "RouterError",
    "StaleRead",
    "WrongServer",
]


class Outcome(enum.Enum):
    """The outcome of a transaction whose COMMIT was not answered."""

    COMMITTED = "committed"
    NOT_COMMITTED = "not committed"
    PENDING = "still under way on the writer"
    UNKNOWN = "cannot be known"


class RouterError(Exception):
    """The base of every error that this library raises on its own account.

    sent: whether anything of the failed call may have reached a server.
    outcome_known: whether the outcome of the call on the servers is known.
    safe_to_retry: whether the unit may run again, from its beginning, without doing anything twice.
    """

    sent: bool = False
    outcome_known: bool = True
    safe_to_retry: bool = False

    def __reduce__(self) -> tuple[Any, ...]:
        """Keep the message and the attributes in a copy, in this process or in another. Functions become None."""
        kept = {name: None if callable(value) else value for name, value in vars(self).items()}
        return _made_anew, (type(self), self.args), kept


def _made_anew(kind: type[RouterError], args: tuple[object, ...]) -> RouterError:
    """Return an error with these args. By default a copy would give them to `__init__`, which takes other arguments."""
    return kind.__new__(kind, *args)


class _Unavailable(OperationalError):
    """Lets handlers of SQLAlchemy's OperationalError catch an error of the router, as they catch a refused connection.

    sqlstate: an attribute that psycopg's errors have, so handlers may read it from `error.orig`. It is None, because no server
        has given one.
    """

    sqlstate: str | None = None

    def __init__(self, message: str) -> None:
        # SQLAlchemy's own `__init__` wants a statement, parameters and a driver's error.
        Exception.__init__(self, message)
        self.detail = []

    def __str__(self) -> str:
        # SQLAlchemy would add a link to a page about the driver's errors.
        return Exception.__str__(self)

    @property
    def orig(self) -> Exception:  # type: ignore[override]
        """This error, because no error of the driver stands behind it."""
        return self


class Signal(RouterError):
    """A signal within the library. It is no error, and listeners of errors do not get it."""


class ConfigurationError(RouterError, ValueError):
    """The router was given something that cannot work: an option, a URL, an instance of another cluster."""


class NoWriterAvailable(RouterError, _Unavailable):
    """No instance accepted writes within `failover_timeout`. Nothing was sent.

    waited: seconds.
    tried: what each instance last said, one line per instance.
    """

    safe_to_retry = True

    def __init__(self, waited: float, tried: Sequence[str]) -> None:
        self.waited = waited
        self.tried = tuple(tried)
        said = "; ".join(self.tried) or "no instance is configured"
        super().__init__(
            f"no writer after {waited:.1f} s: {said}. "
            "Bring an instance up or promote a reader; raise failover_timeout to wait longer."
        )


class NoReaderAvailable(RouterError, _Unavailable):
    """No reader qualifies, and the writer may not be used. Nothing was sent.

    Either `no_reader="error"` forbids the writer, or other reads use all connections that the writer has for reads.

    said: what each instance last said.
    waited: seconds that the unit waited for a connection to the writer; None if the writer is forbidden.
    beyond: whether readers refuse the unit's isolation level.
    connected: whether the unit has its reader already.
    """

    safe_to_retry = True

    def __init__(
        self, said: Sequence[str], waited: float | None = None, *, beyond: bool = False, connected: bool = False
    ) -> None:
        self.said = tuple(said)
        self.waited = waited
        what = "no reader qualifies"
        advice = 'use no_reader="writer"'
        if waited is not None:
            what += f", and the writer has had no room for another read for {waited:.1f} s"
            advice = "raise writer_share_for_reads or pool_size"
        add = "Add a reader, raise max_lag, or"
        if beyond:
            what = "a reader cannot run a transaction at isolation level SERIALIZABLE"
            add = "Ask for REPEATABLE READ, or"
            advice = "use router.connect(), which leads to the writer" if connected else advice
        super().__init__(f"{what}: {'; '.join(self.said) or 'none is configured'}. {add} {advice}.")


class AmbiguousWriter(RouterError, _Unavailable):
    """Several instances accept writes, and nothing tells which is the newest. Writes are refused until that is known.

    instances: the names of these instances.
    """

    safe_to_retry = True

    def __init__(self, instances: Sequence[str]) -> None:
        self.instances = tuple(instances)
        super().__init__(
            f"{' and '.join(self.instances)} both accept writes in the same epoch; writes are refused. "
            "Stop the one that should not be the writer."
        )


class ReadOnlyViolation(RouterError):
    """A statement in a unit that is declared `read_only=True` writes, or would let the unit write.

    instance: where the unit was.
    sent: whether the server refused the statement. Otherwise its text showed its effect, and it was not sent.
    unguards: whether the statement would end the unit's transaction, or let this or a later transaction of the connection write.
    """

    def __init__(self, effect: str, instance: str, *, sent: bool = False, unguards: bool = False) -> None:
        self.instance = instance
        self.sent = sent
        what = "the server refused it" if sent else "it was not sent"
        advice = "Use read_only=False, or leave read_only out to let the router decide."
        if unguards:
            what += ", because after it nothing would keep the unit from writing"
            advice = f"End the unit by commit() or rollback(). To write: {advice[0].lower()}{advice[1:]}"
        super().__init__(f"a statement with effect {effect} in a read-only unit on {instance}; {what}. {advice}")


class StaleRead(RouterError):
    """An object was loaded from a reader and changed, and the writer has another state of its row by now.

    Writing it would undo what others have written. Nothing of the unit is kept.

    entity: the mapped class.
    key: the primary key. No message has it, because it may be somebody's name.
    columns: the names of the columns that differ; none if the row is gone.
    others: how many more rows of the same flush were stale.
    """

    sent = True
    safe_to_retry = True

    def __init__(self, entity: str, key: tuple[object, ...], columns: Sequence[str], others: int = 0) -> None:
        self.entity = entity
        self.key = key
        self.columns = tuple(columns)
        self.others = others
        what = f"{', '.join(self.columns)} is not what the reader had shown" if columns else "it is not there"
        more = f" (and {others} more)" if others else ""
        super().__init__(
            f"an object of {entity}{more} was read from a reader and changed, and on the writer {what}; nothing "
            "was written. Run the unit in run_transaction(), which runs it again on the writer, or read there what is to be "
            "changed: read_only=False, or with_for_update."
        )


class OutcomeUnknown(RouterError):
    """The connection was lost during COMMIT: the transaction may have committed or not. Do not retry it blindly.

    instance: where the COMMIT was sent.
    noted: what is known of the transaction, in words.
    resolve: asks for the outcome, and takes the timeout in seconds; None if nothing can tell.
    """

    sent = True
    outcome_known = False

    def __init__(self, instance: str, noted: str, resolve: Callable[[float], Outcome] | None = None) -> None:
        self.instance = instance
        self.noted = noted
        self._resolve = resolve
        advice = "Look for" if resolve is None else "Ask .resolve(), or look for"
        super().__init__(
            f"the connection to {instance} was lost during COMMIT ({noted}); it is not known whether the transaction has "
            f"committed. {advice} what it wrote before you run it again."
        )

    def resolve(self, timeout: float = 60.0) -> Outcome:
        """Ask the newest writer for the outcome of the transaction.

        COMMITTED and NOT_COMMITTED are certain. UNKNOWN means that nothing can tell, for example because the session has no
        `commit_check`. It also means that no writer could be asked in time. A copy of this error always says UNKNOWN, in another
        process too. If a COMMIT waits until a reader has the transaction, the answer COMMITTED waits for that, too.

        timeout: seconds, at most.
        """
        return Outcome.UNKNOWN if self._resolve is None else self._resolve(timeout)


class WrongServer(RouterError, _Unavailable):
    """A new connection reached a server that the topology does not know there, or in another role. It was closed.

    instance: the instance that was connected to.
    why: the reason, in words.
    """

    safe_to_retry = True
    # SQLAlchemy's class has a method of this name, and calls it on the class.
    instance: str  # type: ignore[assignment]

    def __init__(self, instance: str, why: str) -> None:
        self.instance = instance
        self.why = why
        super().__init__(f"a new connection to {instance} was discarded: {why}")
