"""Errors know what happened, say what to do, and repeat no secret."""

import copy
import pickle

import pytest
from sqlalchemy.exc import OperationalError

from aurora_router import Facts, Failure, classify_error
from aurora_router.errors import (
    AmbiguousWriter,
    ConfigurationError,
    NoReaderAvailable,
    NoWriterAvailable,
    Outcome,
    OutcomeUnknown,
    ReadOnlyViolation,
    RouterError,
    Signal,
    StaleRead,
    WrongServer,
)
from aurora_router.routing.token_signing import TokenRefused

ERRORS = [
    RouterError("closed"),
    ConfigurationError("no"),
    NoWriterAvailable(2.25, ["db-1:5432: no answer within 1 s", "db-2:5432: reader at 1:0/10"]),
    NoWriterAvailable(0.0, []),
    NoReaderAvailable(["db-2:5432: connection refused"]),
    NoReaderAvailable([]),
    NoReaderAvailable([], 30.0),
    AmbiguousWriter(["db-1:5432", "db-2:5432"]),
    ReadOnlyViolation("WRITE", "db-2:5432"),
    ReadOnlyViolation("TRANSACTION", "db-2:5432", unguards=True),
    NoReaderAvailable([], beyond=True, connected=True),
    WrongServer("db-2:5432", "it reached a server that is not known there"),
    TokenRefused("malformed", "token: this is no consistency token"),
]
UNSAFE = [
    ReadOnlyViolation("WRITE", "db-2:5432", sent=True),
    StaleRead("Order", (7, "x"), ["state", "total"], others=2),
    OutcomeUnknown("db-1:5432", "transaction 7", lambda timeout: Outcome.COMMITTED),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_errors_default_to_nothing_sent_and_outcome_known(error):
    """Every error is a RouterError that says by default that nothing was sent and that the outcome is known."""
    assert isinstance(error, RouterError)
    assert error.sent is False
    assert error.outcome_known is True
    assert str(error)
    assert str(error) in repr(error) or repr(str(error)) in repr(error)


@pytest.mark.parametrize("error", ERRORS + UNSAFE, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("copied", [copy.copy, lambda error: pickle.loads(pickle.dumps(error))], ids=["copy", "pickle"])
def test_an_error_is_the_same_in_another_process(error, copied):
    """A copy has the type, the message and the attributes. Only a lost COMMIT's writer cannot be asked there."""
    again = copied(error)
    assert type(again) is type(error)
    assert (str(again), again.args, again.sent) == (str(error), error.args, error.sent)
    assert vars(again) == {name: None if callable(value) else value for name, value in vars(error).items()}
    assert not isinstance(again, OutcomeUnknown) or again.resolve() is Outcome.UNKNOWN


@pytest.mark.parametrize("error", ERRORS + UNSAFE, ids=lambda error: type(error).__name__)
def test_an_error_answers_whether_a_retry_is_safe(error):
    """Each error says whether its unit may run again, and classify_error() says the same."""
    passing = (NoWriterAvailable, NoReaderAvailable, AmbiguousWriter, WrongServer, StaleRead)
    assert error.safe_to_retry is isinstance(error, passing)
    assert classify_error(error).safe_to_retry is error.safe_to_retry
    assert classify_error(error).safe_to_repeat is error.safe_to_retry


UNAVAILABLE = (NoWriterAvailable, NoReaderAvailable, AmbiguousWriter, WrongServer)


@pytest.mark.parametrize("error", ERRORS + UNSAFE, ids=lambda error: type(error).__name__)
def test_handlers_of_operational_errors_catch_what_passes(error):
    """An error is SQLAlchemy's OperationalError if the database cannot serve now, and nothing was sent."""
    assert isinstance(error, OperationalError) is isinstance(error, UNAVAILABLE)
    assert isinstance(error, OperationalError) is (error.safe_to_retry and not error.sent)


@pytest.mark.parametrize("error", [error for error in ERRORS if isinstance(error, UNAVAILABLE)], ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("copied", [lambda error: error, copy.copy, lambda error: pickle.loads(pickle.dumps(error))])
def test_an_operational_error_of_the_router_has_its_parts(error, copied):
    """Handlers may ask for what SQLAlchemy's errors have. The message has no link to a page about the driver's errors."""
    found = copied(error)
    assert str(found) == found.args[0]
    assert found.orig is found
    assert found.orig.sqlstate is None
    assert (found.statement, found.params, found.connection_invalidated) == (None, None, False)
    found.add_detail("while the demo ran")
    assert found.detail[-1] == "while the demo ran"


def test_every_error_is_tried_in_another_process():
    def kinds(base):
        return {base}.union(*(kinds(kind) for kind in base.__subclasses__() if not issubclass(kind, Signal)))

    assert {type(error) for error in ERRORS + UNSAFE} >= {
        e for e in kinds(RouterError) if e.__module__.startswith("aurora_router")
    }


def test_a_configuration_error_is_a_value_error():
    assert issubclass(ConfigurationError, ValueError)


def test_no_writer_available_tells_the_wait_and_each_instance():
    """NoWriterAvailable says how long it waited and what each instance answered last."""
    error = NoWriterAvailable(2.25, ["db-1:5432: no answer within 1 s", "db-2:5432: reader at 1:0/10"])
    assert error.waited == 2.25
    assert error.tried == ("db-1:5432: no answer within 1 s", "db-2:5432: reader at 1:0/10")
    assert all(line in str(error) for line in error.tried)
    assert "2.2 s" in str(error)
    assert "failover_timeout" in str(error)


def test_no_writer_of_no_instances_says_so():
    assert "no instance is configured" in str(NoWriterAvailable(0.0, []))


def test_no_reader_names_the_readers_and_the_ways_out():
    error = NoReaderAvailable(["db-2:5432: connection refused"])
    assert error.said == ("db-2:5432: connection refused",)
    assert "db-2:5432: connection refused" in str(error)
    assert 'no_reader="writer"' in str(error)
    assert "none is configured" in str(NoReaderAvailable([]))


def test_no_reader_says_when_the_writer_had_no_room_either():
    error = NoReaderAvailable(["db-2:5432: connection refused"], 30.0)
    assert error.waited == 30.0
    assert "30.0 s" in str(error)
    assert "writer_share_for_reads" in str(error)
    assert "no_reader=" not in str(error)


def test_an_ambiguous_writer_names_both():
    error = AmbiguousWriter(["db-1:5432", "db-2:5432"])
    assert error.instances == ("db-1:5432", "db-2:5432")
    assert "db-1:5432 and db-2:5432" in str(error)


def test_a_read_only_violation_says_not_sent_and_where():
    """ReadOnlyViolation says that nothing was sent and on which instance the unit was."""
    error = ReadOnlyViolation("WRITE", "db-2:5432")
    assert error.instance == "db-2:5432"
    assert "WRITE" in str(error)
    assert "not sent" in str(error)
    assert not error.sent


def test_a_read_only_violation_tells_when_the_server_refused():
    """ReadOnlyViolation says that the statement was sent if only the server has seen that it is a write."""
    error = ReadOnlyViolation("WRITE", "db-2:5432", sent=True)
    assert error.sent
    assert "db-2:5432; the server refused it. " in str(error)


def test_outcome_unknown_says_to_resolve_only_if_it_can():
    """OutcomeUnknown tells the user to call resolve() only if an instance can tell the outcome."""
    told = OutcomeUnknown("db-1:5432", "transaction 7", lambda timeout: Outcome.COMMITTED)
    assert "db-1:5432" in str(told)
    assert "transaction 7" in str(told)
    assert "Ask .resolve()" in str(told)
    assert told.resolve() is Outcome.COMMITTED
    silent = OutcomeUnknown("db-1:5432", "nothing was noted")
    assert "resolve" not in str(silent)
    assert "Look for what it wrote" in str(silent)
    assert silent.resolve() is Outcome.UNKNOWN


def test_a_stale_read_names_the_row_the_columns_and_the_way_out():
    """StaleRead names the entity, the columns and the way out, and no value is in its message."""
    error = StaleRead("Order", (7, "x"), ["state", "total"], others=2)
    assert (error.entity, error.key, error.columns, error.others) == ("Order", (7, "x"), ("state", "total"), 2)
    assert "an object of Order (and 2 more)" in str(error)
    assert "7" not in str(error), "no value is in a message"
    assert "state, total" in str(error)
    assert "run_transaction" in str(error)
    assert classify_error(error) == Facts(Failure.SERIALIZATION, sent=True, outcome_known=True, safe_to_repeat=True)
    assert "it is not there" in str(StaleRead("Order", (7,), ()))


def test_a_wrong_server_names_the_instance_and_the_reason():
    error = WrongServer("db-2:5432", "it is another one")
    assert error.instance == "db-2:5432"
    assert str(error) == "a new connection to db-2:5432 was discarded: it is another one"
