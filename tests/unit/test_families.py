"""Errors of the drivers, each in its family, and their meaning for the caller."""

import psycopg
import pymysql
import pytest
from sqlalchemy import exc

from aurora_router import Failure, classify_error
from aurora_router.cluster.connect_errors import connect_argument_error
from aurora_router.cluster.error_classification import failure_of, is_contention
from aurora_router.core.failures import Phase
from aurora_router.core.instance import ProbeFailure
from aurora_router.drivers import DRIVERS, driver_of
from aurora_router.drivers import psycopg as psycopg_driver
from aurora_router.drivers import pymysql as pymysql_driver
from aurora_router.errors import AmbiguousWriter, NoWriterAvailable
from aurora_router.servers import mysql, postgresql, supports_xid_status, usual


class Own(pymysql.OperationalError):
    """An error that an application has derived from the driver's."""


@pytest.mark.parametrize(
    ("error", "driver"),
    [
        (psycopg.OperationalError(), psycopg_driver),
        (psycopg.errors.UniqueViolation(), psycopg_driver),
        (pymysql.OperationalError(2013, "Lost connection"), pymysql_driver),
        (Own(1213, "Deadlock"), pymysql_driver),
        (ValueError(), None),
        (None, None),
    ],
)
def test_an_error_is_of_the_driver_that_made_it(error, driver):
    assert driver_of(error) is driver


def test_each_driver_has_a_usual_family():
    assert {driver.NAME: usual(driver.PROTOCOL) for driver in DRIVERS} == {"psycopg": postgresql, "pymysql": mysql}


def test_postgresql_alone_knows_what_became_of_a_transaction_id():
    assert [supports_xid_status(family) for family in (postgresql, mysql)] == [True, False]


def met(original, statement=None, *, disconnected=False):
    """An error of the driver as SQLAlchemy passes it on."""
    return exc.DBAPIError(statement, None, original, connection_invalidated=disconnected)


LOST = pymysql.OperationalError(2013, "Lost connection to MySQL server during query")
SLOW = pymysql.OperationalError(2013, "Lost connection to MySQL server during query (timed out)")


@pytest.mark.parametrize(
    ("error", "failure", "sent", "outcome_known", "safe_to_repeat"),
    [
        (met(pymysql.OperationalError(1213, "Deadlock"), "UPDATE t SET a = 1"), Failure.DEADLOCK, True, True, True),
        (met(pymysql.OperationalError(1290, "--read-only"), "UPDATE t SET a = 1"), Failure.READ_ONLY, True, True, True),
        (met(LOST, "UPDATE t SET a = 1", disconnected=True), Failure.LOST, True, True, True),
        (met(LOST, "COMMIT", disconnected=True), Failure.LOST, True, False, False),
        (met(LOST, disconnected=True), Failure.LOST, True, False, False),
        (met(SLOW, "UPDATE t SET a = 1", disconnected=True), Failure.TIMED_OUT, True, True, False),
        (met(SLOW, disconnected=True), Failure.TIMED_OUT, True, False, False),
        (SLOW, Failure.TIMED_OUT, True, False, False),
        (met(pymysql.OperationalError(2003, "Can't connect")), Failure.CONNECT, False, True, True),
        (met(pymysql.OperationalError(1040, "Too many connections")), Failure.BUSY, False, True, True),
        (met(pymysql.OperationalError(1045, "Access denied")), Failure.REFUSED, False, True, False),
        (met(pymysql.OperationalError("could not connect in time")), Failure.CONNECT, False, True, True),
        (met(pymysql.InterfaceError(0, ""), "SELECT 1", disconnected=True), Failure.LOST, True, True, True),
        (met(psycopg.errors.DeadlockDetected(), "UPDATE t SET a = 1"), Failure.DEADLOCK, True, True, True),
        (met(ValueError("another driver's"), "UPDATE t SET a = 1"), Failure.OTHER, True, True, False),
        (LOST, Failure.LOST, True, False, False),
        (pymysql.OperationalError(2003, "Can't connect"), Failure.CONNECT, False, True, True),
        (pymysql.OperationalError(1213, "Deadlock"), Failure.DEADLOCK, True, True, True),
        (pymysql.IntegrityError(1062, "Duplicate entry"), Failure.CONSTRAINT, True, True, False),
    ],
)
def test_errors_of_either_driver_are_classified(error, failure, sent, outcome_known, safe_to_repeat):
    assert classify_error(error) == (failure, sent, outcome_known, safe_to_repeat)


@pytest.mark.parametrize(
    ("error", "driver", "said"),
    [
        (AssertionError("Could not determine version from string 'version'"), psycopg_driver, "leave row_factory out"),
        (AttributeError("no adapters"), psycopg_driver, "(AttributeError: no adapters); check the URL and its query"),
        (KeyError(0), pymysql_driver, "leave cursorclass out"),
        (ValueError("invalid literal for int(): 'soon'"), pymysql_driver, "int(): 'soon'); check the URL and its query"),
        (ValueError("invalid literal for int(): 'hunter2'"), pymysql_driver, "int(): ...); check the URL and its query"),
        (PermissionError(13, "Permission denied"), pymysql_driver, "check the files that ssl_ca"),
        (NotImplementedError("compress"), pymysql_driver, "(NotImplementedError: compress); check the URL and its query"),
    ],
)
def test_a_foreign_error_from_connecting_is_a_misconfiguration(error, driver, said):
    """An error from connecting that is not the driver's own is a mistake in the arguments, and the message says what to do."""
    found = connect_argument_error(error, driver)
    assert found.probe_failure is ProbeFailure.MISCONFIGURED
    assert str(found).startswith(f"{driver.NAME} could not connect (")
    assert said in str(found)


def test_text_that_cannot_be_encoded_is_not_shown():
    """The message does not show text that cannot be encoded, because it may be a password."""
    error = UnicodeEncodeError("latin-1", "geheim\N{EURO SIGN}", 6, 7, "ordinal not in range(256)")
    assert str(connect_argument_error(error, pymysql_driver)).startswith(
        "pymysql could not connect (UnicodeEncodeError); PyMySQL sends a password"
    )


def test_an_error_of_no_known_driver_says_nothing():
    assert failure_of(ValueError(), disconnected=True, phase=Phase.COMMIT) is Failure.OTHER


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (AmbiguousWriter(["db-1", "db-2"]), True),
        (NoWriterAvailable(1.0, ()), False),
        (met(pymysql.OperationalError(1213, "Deadlock"), "UPDATE t SET a = 1"), True),
        (met(LOST, "UPDATE t SET a = 1", disconnected=True), False),
    ],
)
def test_contention_is_no_trouble_of_an_instance(error, expected):
    """A conflict between units, or two writers for which nothing was sent, is no trouble of an instance."""
    assert is_contention(error) is expected
