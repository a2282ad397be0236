"""The error codes and words of PostgreSQL and libpq."""

import types

import pytest
from psycopg import OperationalError

from aurora_router.cluster.connect_errors import probe_error
from aurora_router.cluster.error_classification import failure_of
from aurora_router.core.failures import Failure, Phase
from aurora_router.core.instance import ProbeFailure
from aurora_router.drivers import psycopg as psycopg_driver
from aurora_router.servers import postgresql
from tests.unit.tables import table


@table("postgresql_errors")
def test_driver_errors_stand_for_the_failure_that_they_are(sqlstate, message, disconnected, failure):
    assert failure_of(refused(sqlstate, message), disconnected=disconnected) is Failure[failure]


def refused(sqlstate, message):
    """An error of psycopg with that SQLSTATE, or, if that is None, as libpq makes one while connecting."""

    class Refused(OperationalError):
        pgconn = None if sqlstate else types.SimpleNamespace(used_password=False)

    error = Refused(message)
    error.sqlstate = sqlstate
    return error


@table("postgresql_refused_probes")
def test_a_refused_probe_says_what_to_do_and_if_retry_helps(sqlstate, message, probe_failure, advice):
    """The message of a refused probe says what to do, and its kind says whether trying again can help."""
    found = probe_error(refused(sqlstate, message), psycopg_driver, postgresql)
    assert found.probe_failure is ProbeFailure(probe_failure)
    assert advice in str(found)
    assert not str(found).startswith("connection failed: ")


@pytest.mark.parametrize(
    ("sqlstate", "message", "busy"),
    [
        ("53300", "", True),
        (None, "FATAL:  sorry, too many clients already", True),
        (None, "FATAL:  remaining connection slots are reserved for roles", True),
        ("08P01", "query_wait_timeout", True),
        (None, "FATAL:  no more connections allowed (max_client_conn)", True),
        (None, "Connection refused", False),
        ("57P03", "the database system is starting up", False),
    ],
)
def test_a_server_without_room_is_busy_and_not_down(sqlstate, message, busy):
    assert probe_error(refused(sqlstate, message), psycopg_driver, postgresql).busy is busy


def test_a_psycopg_error_has_a_code_or_a_failed_connection():
    """An error of psycopg has the server's code, or the connection that could not be made."""
    refused = OperationalError()
    assert psycopg_driver.code(refused) is None
    assert not psycopg_driver.is_from_connecting(refused)
    assert psycopg_driver.is_from_connecting(types.SimpleNamespace(pgconn=object()))


AT = 'connection failed: connection to server at "10.0.0.1", port 5432 failed: '


@table("postgresql_connect_errors")
def test_an_error_of_connecting_has_the_sqlstate_of_its_words(said, used_password, sqlstate, failure):
    """libpq drops the SQLSTATE while it connects, so it is read from the words, or from the request if they are foreign."""
    error = OperationalError(AT + said, pgconn=types.SimpleNamespace(used_password=used_password))
    assert psycopg_driver.code(error) == sqlstate
    for phase in (Phase.READER_CONNECTING, Phase.WRITER_CONNECTING):
        assert failure_of(error, disconnected=False, phase=phase) is Failure[failure]


@pytest.mark.parametrize("said", ["certificate verify failed", 'invalid sslmode value: "on"', 'invalid connection option "x"'])
def test_what_was_configured_wrong_is_refused_while_connecting(said):
    """A mistake in the driver's arguments is a refusal, not an instance that is down."""
    assert failure_of(OperationalError(said), disconnected=False, phase=Phase.WRITER_CONNECTING) is Failure.REFUSED
