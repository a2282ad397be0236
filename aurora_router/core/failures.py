"""All policy about failures: the action for each kind of failure in each phase of a unit, and the other traits of a kind.

This module is pure. Other modules sleep, retry and ask servers, but name no kind of failure. So a new kind needs only its rows
here, and the codes in the server modules that stand for it. docs/failures.md shows these tables.
"""

from __future__ import annotations

import enum
from typing import NamedTuple

from aurora_router.errors import (
    AmbiguousWriter,
    NoReaderAvailable,
    NoWriterAvailable,
    OutcomeUnknown,
    RouterError,
    StaleRead,
    WrongServer,
)


class Failure(enum.Enum):
    """The kind of failure that an exception stands for. The server modules map their errors to it."""

    CONNECT = "no connection could be made"
    BUSY = "the instance has no room for one more connection"
    LOST = "the connection was lost"
    ENDED = "the connection was lost because of the statement: it was killed, or is too large for the server"
    BROKEN = "the instance failed inside: its disk, its memory, an internal error"
    CONFLICT = "the reader temporarily lacks data that the statement needs: replay removed it, or has not brought it"
    READ_ONLY = "the instance is read-only"
    NOT_HERE = "the instance cannot do this, as a reader or at all"
    MISSING = "the statement names something that is not there, or that the reader has not got yet"
    OUTDATED = "a prepared statement is out of date"
    SERIALIZATION = "the transaction could not be serialized with others"
    DEADLOCK = "the transaction was the victim of a deadlock"
    CONSTRAINT = "a key or another constraint was violated"
    MISLED = "a constraint was violated by a unit of run_transaction that had read on a reader"
    OVERTIME = "the server ended the session, because the unit took longer than its time limits allow"
    TIMED_OUT = "the driver's time limit was over before the answer came"
    REFUSED = "the credentials or the database were refused"
    OTHER = "the statement's own fault"


class Action(enum.Enum):
    """The router's action after a failure."""

    REPEAT_ELSEWHERE = "retry on another instance"
    REPEAT_UNPREPARED = "retry on a connection that has prepared nothing"
    TO_WRITER = "move the unit to the writer and retry there"
    WAIT_FOR_WRITER = "wait for a writer, then try again"
    RESOLVE = "find out what became of the COMMIT"
    RUN_AGAIN = "raise; run_transaction retries the unit"
    RAISE = "raise"


class Phase(enum.Enum):
    """The phase in which a unit failed."""

    READER_CONNECTING = "connecting to a reader"
    READER_UNSENT = "on a reader, nothing sent yet"
    READ = "a read in flight, nothing of the unit is lost with the connection"
    READER_TRANSACTION = "a statement in flight in a reader's transaction"
    WRITER_CONNECTING = "connecting to the writer"
    WRITER_UNSENT = "on the writer, nothing sent yet"
    WRITER_FIRST = "the first statement in flight of the writer's transaction"
    WRITER_STATEMENT = "a later statement in flight in the writer's transaction"
    COMMIT = "COMMIT in flight"


class Progress(NamedTuple):
    """How far a unit was when its statement or its COMMIT failed.

    read_only: what it is declared to be; None if it is automatic.
    on_writer: whether it is on the writer.
    only_reads: whether all its statements are known to be reads.
    has_results: whether a statement has completed on the instance.
    is_exposed: whether the user has the driver's connection.
    is_commit_in_doubt: whether a COMMIT was sent without a successful answer.
    is_autocommit: whether each statement commits by itself.
    has_snapshot: whether its statements must see one snapshot.
    """

    read_only: bool | None
    on_writer: bool
    only_reads: bool
    has_results: bool = False
    is_exposed: bool = False
    is_commit_in_doubt: bool = False
    is_autocommit: bool = False
    has_snapshot: bool = False


def phase_of(progress: Progress) -> Phase:
    """Return the phase of a unit whose statement or COMMIT has failed."""
    if progress.is_commit_in_doubt:
        return Phase.COMMIT
    if progress.only_reads and progress.on_writer and progress.read_only is False:
        # The unit was declared to write, and a statement that looks like a read may write, too. Then the error has cost the whole
        # transaction, not this read alone.
        if progress.is_autocommit:
            return Phase.COMMIT
        if not progress.has_results:
            return Phase.READ
    elif progress.only_reads and (
        (progress.read_only is None and not progress.on_writer) or not (progress.has_results and progress.has_snapshot)
    ):
        return Phase.READ
    if not progress.on_writer:
        return Phase.READER_TRANSACTION
    return Phase.WRITER_STATEMENT if progress.has_results or progress.is_exposed else Phase.WRITER_FIRST


class Blame(enum.Enum):
    """What decides whether a statement is to blame for the loss of its connection.

    NOBODY: it is not to blame.
    STATEMENT: it is.
    IF_ALIVE: it is if its server is alive.
    IF_SURVIVED: it is if both servers have survived its losses.
    """

    NOBODY = 1
    STATEMENT = 2
    IF_ALIVE = 3
    IF_SURVIVED = 4


def blame(times: int, *, is_killed: bool, is_first: bool) -> Blame:
    """Return what decides whether a statement would lose every connection.

    times: how often it has lost its connection, in this unit or in its attempts.
    is_killed: whether somebody has ended the connection of a statement that runs once.
    is_first: whether no statement has lost its connection before.
    """
    if times >= MAX_LOSSES:
        return Blame.STATEMENT
    if is_first or times == 1:
        return Blame.IF_ALIVE if is_killed else Blame.NOBODY
    return Blame.IF_SURVIVED


_BEFORE_READER = (Phase.READER_CONNECTING, Phase.READER_UNSENT)
_BEFORE_WRITER = (Phase.WRITER_CONNECTING, Phase.WRITER_UNSENT)
_ON_WRITER = (Phase.WRITER_FIRST, Phase.WRITER_STATEMENT)
_IN_TRANSACTION = (Phase.READER_TRANSACTION, *_ON_WRITER)
_A = Action

_ROWS: tuple[tuple[tuple[Failure, ...], tuple[Phase, ...], Action], ...] = (
    # Nothing was sent: the next instance, or the next writer, will do.
    ((Failure.CONNECT, Failure.BUSY, Failure.LOST, Failure.TIMED_OUT, Failure.BROKEN), _BEFORE_READER, _A.REPEAT_ELSEWHERE),
    ((Failure.CONNECT, Failure.BUSY, Failure.LOST, Failure.TIMED_OUT), _BEFORE_WRITER, _A.WAIT_FOR_WRITER),
    ((Failure.REFUSED,), (Phase.READER_CONNECTING,), _A.REPEAT_ELSEWHERE),  # another instance may accept them
    # A read, and nothing of the unit is lost with its connection.
    ((Failure.LOST, Failure.BROKEN, Failure.CONFLICT), (Phase.READ,), _A.REPEAT_ELSEWHERE),
    ((Failure.READ_ONLY, Failure.NOT_HERE, Failure.MISSING), (Phase.READ,), _A.TO_WRITER),
    # The first statement of a transaction. The server has not begun to execute it, or its error has undone what it did.
    ((Failure.OUTDATED,), (Phase.READ, Phase.WRITER_FIRST), _A.REPEAT_UNPREPARED),
    # A transaction that is gone, and certainly did not commit.
    ((Failure.LOST,), _IN_TRANSACTION, _A.RUN_AGAIN),
    ((Failure.OUTDATED,), (Phase.READER_TRANSACTION, Phase.WRITER_STATEMENT), _A.RUN_AGAIN),
    ((Failure.SERIALIZATION, Failure.DEADLOCK), (Phase.READ, *_IN_TRANSACTION), _A.RUN_AGAIN),
    ((Failure.CONFLICT, Failure.BROKEN), (Phase.READER_TRANSACTION,), _A.RUN_AGAIN),
    ((Failure.READ_ONLY,), _ON_WRITER, _A.RUN_AGAIN),  # it is no longer the writer
    # The writer would not have shown the rows that led to the violation.
    ((Failure.MISLED,), (*_ON_WRITER, Phase.COMMIT), _A.RUN_AGAIN),
    # A COMMIT that was refused, and a COMMIT whose answer never came.
    ((Failure.SERIALIZATION, Failure.DEADLOCK, Failure.READ_ONLY), (Phase.COMMIT,), _A.RUN_AGAIN),
    ((Failure.LOST, Failure.OVERTIME, Failure.TIMED_OUT), (Phase.COMMIT,), _A.RESOLVE),
)

TABLE: dict[tuple[Failure, Phase], Action] = {
    (failure, phase): action for failures, phases, action in _ROWS for failure in failures for phase in phases
}
"""The action for each pair. Pairs that are not listed raise the error."""


class Traits(NamedTuple):
    """What a kind of failure means, besides its action.

    suspicious: the instance itself may be in trouble, so the monitor probes it at once.
    is_contention: no instance is in trouble. The backoff protects the instances, so the retry spends nothing of the budget.
    disconnects: the connection is gone, even if SQLAlchemy has not noticed.
    spares_pool: the other connections of the pool are still good, even if this one is gone.
    is_outdated: what the instance's pooled connections have prepared is out of date, too.
    refuses_writes: the statement writes, so a read-only unit gets ReadOnlyViolation.
    is_remembered: if a reader refuses a text in this way, the text goes to the writer for some minutes.
    is_last_word: it says what somebody must change. If no other instance is left to try, this error is raised.
    may_hide_commit: if the statement is unknown, the error may be the error of a COMMIT.
    """

    suspicious: bool = False
    is_contention: bool = False
    disconnects: bool = False
    spares_pool: bool = False
    is_outdated: bool = False
    refuses_writes: bool = False
    is_remembered: bool = False
    is_last_word: bool = False
    may_hide_commit: bool = False


_NOTHING_ELSE = Traits()
_TRAITS = {
    Failure.CONNECT: Traits(suspicious=True),
    Failure.LOST: Traits(suspicious=True, disconnects=True, may_hide_commit=True),
    Failure.TIMED_OUT: Traits(suspicious=True, spares_pool=True, may_hide_commit=True),
    Failure.READ_ONLY: Traits(refuses_writes=True, is_remembered=True),
    Failure.NOT_HERE: Traits(is_remembered=True),
    Failure.OUTDATED: Traits(is_contention=True, is_outdated=True),
    Failure.SERIALIZATION: Traits(is_contention=True),
    Failure.DEADLOCK: Traits(is_contention=True),
    Failure.MISLED: Traits(is_contention=True),
    Failure.REFUSED: Traits(is_last_word=True),
}


def traits(failure: Failure) -> Traits:
    """Return what a failure means, besides its action."""
    return _TRAITS.get(failure, _NOTHING_ELSE)


class Question(enum.Enum):
    """What the router finds out about a failure before it decides."""

    IS_SILENT = "does the server no longer answer?"
    IS_WRITER = "does the server say that it is the writer all the same?"
    LOSES_EVERYWHERE = "does this statement lose every connection?"
    BREAKS_EVERYWHERE = "does this statement break every instance?"
    WAS_MISLED = "has a unit of run_transaction read on a reader?"
    MUST_STAY = "is the unit on the writer already, or declared read-only?"


class Inquiry(NamedTuple):
    """A question about a failure, and what "yes" means.

    question: what the router finds out.
    phases: the phases in which the router asks.
    becomes: the kind of the failure after a "yes". None: the same.
    is_final: whether the unit is not retried after a "yes".
    limit: the number of "yes" after which the unit is not retried. None: no limit.
    """

    question: Question
    phases: frozenset[Phase]
    becomes: Failure | None = None
    is_final: bool = False
    limit: int | None = None


MAX_LOSSES = 3
"""After so many lost connections a statement is not retried, whatever has become of the servers."""
MAX_BROKEN = 1
"""A statement that has broken more instances than this is not retried.

On the writer it is never retried, because no other server could run it.
"""

_ANY = frozenset(Phase)
_STATEMENTS = frozenset({Phase.READ, *_IN_TRANSACTION})
_INQUIRIES = {
    # A slow statement would be slow elsewhere, too. A lost server is another matter.
    Failure.TIMED_OUT: Inquiry(Question.IS_SILENT, _ANY - {Phase.COMMIT}, becomes=Failure.LOST),
    # The server may be deposed, and the monitor has not seen it yet. Otherwise the transaction itself is at fault.
    Failure.READ_ONLY: Inquiry(Question.IS_WRITER, _ANY, limit=3),
    # A retry would crash every server in turn.
    Failure.LOST: Inquiry(Question.LOSES_EVERYWHERE, _STATEMENTS, becomes=Failure.ENDED),
    Failure.BROKEN: Inquiry(Question.BREAKS_EVERYWHERE, _STATEMENTS, is_final=True),
    Failure.CONSTRAINT: Inquiry(Question.WAS_MISLED, _ANY, becomes=Failure.MISLED),
    # The next attempt would meet the same error.
    Failure.NOT_HERE: Inquiry(Question.MUST_STAY, frozenset({Phase.READ}), is_final=True),
    Failure.MISSING: Inquiry(Question.MUST_STAY, frozenset({Phase.READ}), is_final=True),
}


def inquiry(failure: Failure, phase: Phase) -> Inquiry | None:
    """Return the question to ask about a failure in a phase before deciding; None if there is none."""
    found = _INQUIRIES.get(failure)
    return found if found is not None and phase in found.phases else None


def decide(failure: Failure, phase: Phase) -> Action:
    """Return the action for a failure in a phase."""
    return TABLE.get((failure, phase), Action.RAISE)


class Facts(NamedTuple):
    """The facts about a failed call.

    failure: the kind of failure.
    sent: whether anything of it may have reached a server.
    outcome_known: whether its outcome on the servers is known.
    safe_to_repeat: whether its unit may run again, from its beginning, without doing anything twice.
    """

    failure: Failure
    sent: bool
    outcome_known: bool
    safe_to_repeat: bool

    @property
    def safe_to_retry(self) -> bool:
        """Whether the unit may run again, from its beginning, without doing anything twice: the same as safe_to_repeat."""
        return self.safe_to_repeat


def facts(failure: Failure, phase: Phase, *, is_final: bool = False, not_committed: bool = False) -> Facts:
    """Return the facts about a failure in a phase.

    is_final: whether a retry would fail, too.
    not_committed: whether the writer has said that the unit's COMMIT has not happened.
    """
    action = decide(failure, phase)
    if not_committed:
        return Facts(failure, sent=True, outcome_known=True, safe_to_repeat=True)
    return Facts(
        failure,
        sent=phase not in (*_BEFORE_READER, *_BEFORE_WRITER),
        outcome_known=action is not Action.RESOLVE,
        safe_to_repeat=action not in (Action.RESOLVE, Action.RAISE) and not is_final,
    )


def confirmed_facts(failure: Failure, phase: Phase) -> Facts:
    """Return the facts about a failure in a phase if the answer to its question is "yes"."""
    asked = inquiry(failure, phase)
    if asked is None:
        return facts(failure, phase)
    return facts(asked.becomes or failure, phase, is_final=asked.is_final)


NOT_SENT = facts(Failure.OTHER, Phase.WRITER_UNSENT)
"""The facts about a call that was refused before anything was sent."""
UNKNOWN = facts(Failure.OTHER, Phase.WRITER_STATEMENT)
"""The facts about an error known only by its class."""
POOL_IS_FULL = facts(Failure.BUSY, Phase.WRITER_CONNECTING)
"""The facts about a pool that had no free connection."""
WRITER_IS_GONE = facts(Failure.LOST, Phase.WRITER_UNSENT)
"""The facts about a unit that has lost its connection, and whose instance is no longer the writer."""
REFUSED_WRITE = Failure.CONSTRAINT
"""A write that the writer refuses because of its data: a constraint, or a row that others have changed."""


def while_connecting(failure: Failure, *, is_refusal: bool, has_code: bool) -> Failure:
    """Return the failure that an error of connecting stands for.

    failure: the failure that the error would stand for if it came later.
    is_refusal: whether the error lasts until somebody changes something.
    has_code: whether the server gave the error a code.
    """
    if is_refusal and failure in (Failure.OTHER, Failure.CONNECT):
        return Failure.REFUSED
    return Failure.CONNECT if failure is Failure.OTHER and not has_code else failure


def is_run_again(known: Facts, confirmed: int) -> bool:
    """Return whether run_transaction runs a unit again after a failure.

    confirmed: how often the answer to the question about such a failure was "yes" in the unit's attempts.
    """
    asked = _INQUIRIES.get(known.failure)
    return known.safe_to_repeat and (asked is None or asked.limit is None or confirmed < asked.limit)


class OwnError(NamedTuple):
    """The policy for an error that the router raises on its own account.

    failure: what it stands for.
    is_waited_out: whether run_transaction retries the unit until the cause has passed. That spends nothing of the retry budget,
        because nothing was sent.
    is_before_commit: whether it comes before any COMMIT of the unit, also of other databases.
    is_of_connect: whether it is the failure of the connect that has raised it. Others come from a listener of the application.
    """

    failure: Failure
    is_waited_out: bool = False
    is_before_commit: bool = False
    is_of_connect: bool = False


OWN_ERRORS: dict[type[RouterError], OwnError] = {
    RouterError: OwnError(Failure.OTHER),
    NoWriterAvailable: OwnError(Failure.CONNECT),
    NoReaderAvailable: OwnError(Failure.CONNECT),
    AmbiguousWriter: OwnError(Failure.CONNECT, is_waited_out=True),
    WrongServer: OwnError(Failure.CONNECT, is_of_connect=True),
    StaleRead: OwnError(Failure.SERIALIZATION, is_before_commit=True),  # a flush raises it
    OutcomeUnknown: OwnError(Failure.LOST),
}
"""The policy for each of the router's own errors. An error that is not here has the policy of its base class."""


def own_error(error: RouterError) -> OwnError:
    """Return the policy for an error of the router's own."""
    return next(OWN_ERRORS[kind] for kind in type(error).__mro__ if kind in OWN_ERRORS)


def is_of_connect(error: Exception) -> bool:
    """Return whether an error of a connect is the failure of that connect.

    A listener of the application may have begun another unit. Then the error is of that unit.
    """
    return not isinstance(error, RouterError) or own_error(error).is_of_connect


def facts_of_own(error: RouterError) -> Facts:
    """Return the facts about an error of the router's own."""
    return Facts(own_error(error).failure, error.sent, error.outcome_known, error.safe_to_retry)


def as_markdown() -> str:
    """Return the table for docs/failures.md: a row for each failure, a column for each phase."""
    lines = [
        f"| | {' | '.join(phase.value for phase in Phase)} |",
        f"|---|{'---|' * len(Phase)}",
        *(f"| **{failure.value}** | {' | '.join(_cell(failure, phase) for phase in Phase)} |" for failure in Failure),
    ]
    return "\n".join(lines) + "\n"


def policy_as_markdown() -> str:
    """Return the table of what else the router does, for docs/failures.md. A failure after which it does no more has no row."""
    rows = [(failure.value, [*_inquiry_in_words(failure), *_traits_in_words(failure)]) for failure in Failure]
    lines = [
        "| failure | what else the router does |",
        "|---|---|",
        *(f"| **{failure}** | {'; '.join(words)} |" for failure, words in rows if words),
    ]
    return "\n".join(lines) + "\n"


def own_errors_as_markdown() -> str:
    """Return the table of the policy for the router's own errors, for docs/failures.md."""
    lines = [
        "| error | stands for | safe to retry | what run_transaction does |",
        "|---|---|---|---|",
        *(
            f"| `{kind.__name__}` | {own.failure.value} | {'yes' if kind.safe_to_retry else 'no'} | {_run_in_words(kind, own)} |"
            for kind, own in OWN_ERRORS.items()
        ),
    ]
    return "\n".join(lines) + "\n"


_IN_WORDS = {
    "suspicious": "it probes the instance at once",
    "is_contention": "another attempt spends nothing of the retry budget",
    "disconnects": "it closes the connection",
    "spares_pool": "it keeps the other connections of the pool",
    "is_outdated": "each pooled connection to the instance drops what it has prepared",
    "refuses_writes": "a read-only unit gets `ReadOnlyViolation`",
    "is_remembered": "if a reader says so, it remembers the text",
    "is_last_word": "if no other instance is left, it raises this error",
    "may_hide_commit": "without its statement, the error counts as one of a COMMIT",
}


def _traits_in_words(failure: Failure) -> list[str]:
    return [_IN_WORDS[name] for name, has in traits(failure)._asdict().items() if has]


def _run_in_words(kind: type[RouterError], own: OwnError) -> str:
    if own.is_waited_out:
        return "runs the unit again until the cause has passed, and spends nothing of the retry budget"
    if kind.safe_to_retry and decide(own.failure, Phase.WRITER_STATEMENT) is Action.RUN_AGAIN:
        return "runs the unit again"
    return "raises it"


def _inquiry_in_words(failure: Failure) -> list[str]:
    asked = _INQUIRIES.get(failure)
    if asked is None:
        return []
    if asked.becomes is not None:
        so = f"it counts as: {asked.becomes.value}"
    elif asked.is_final:
        so = "it is not retried"
    else:
        so = f"run_transaction gives up after {asked.limit} such attempts"
    return [f"it asks first: {asked.question.value} If so, {so}"]


def _cell(failure: Failure, phase: Phase) -> str:
    action = TABLE.get((failure, phase))
    return "" if action is None else action.value
