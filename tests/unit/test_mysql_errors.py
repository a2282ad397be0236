"""The error codes and words of MySQL and MariaDB, and what is asked about a COMMIT."""

import contextlib
import re
import types
from pathlib import Path

import pymysql
import pytest

from aurora_router.cluster.connect_errors import probe_error
from aurora_router.cluster.error_classification import classify_error, failure_of
from aurora_router.core.failures import Failure
from aurora_router.core.instance import Instance, ProbeFailure
from aurora_router.core.topology import Topology
from aurora_router.drivers import pymysql as pymysql_driver
from aurora_router.routing.commit_check import prepare_commit_check
from aurora_router.routing.unit import Intent, Place, Unit
from aurora_router.servers import mysql, postgresql
from aurora_router.servers.mysql import is_busy
from tests.unit.tables import table

UUID = "00000001-71ca-11e1-9e33-c80aa9429562"


# -- errors -------------------------------------------------------------------------------------------------------


@table("mysql_errors")
def test_driver_errors_stand_for_the_failure_that_they_are(code, message, disconnected, failure):
    assert failure_of(pymysql.OperationalError(code, message), disconnected=disconnected) is Failure[failure]
    assert message in pymysql_driver.words(pymysql.OperationalError(code, message))


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (pymysql.OperationalError(2013, "Lost connection"), 2013),
        (pymysql.InterfaceError(0, ""), 0),
        (pymysql.Error("Already closed"), None),
        (pymysql.Error(), None),
        (None, None),
    ],
)
def test_the_code_of_an_error_is_its_first_argument(error, code):
    assert pymysql_driver.code(error) == code


@pytest.mark.parametrize(
    ("code", "of_driver", "of_server"),
    [
        (2003, True, False),
        (2061, True, False),
        (1040, False, True),
        (1045, False, True),
        (1213, False, False),
        (2013, False, False),
    ],
)
def test_some_errors_are_only_met_while_connecting(code, of_driver, of_server):
    """The driver knows those that it makes itself. The server module knows those that only a server can give."""
    error = pymysql.OperationalError(code, "words")
    assert pymysql_driver.is_from_connecting(error) is of_driver
    assert (code in mysql.CONNECTING) is of_server
    assert classify_error(error).sent is not (of_driver or of_server)


@table("mysql_refused_probes")
def test_a_refused_probe_says_what_to_do_and_if_retry_helps(code, message, probe_failure, advice):
    """The message of a refused probe says what to do, and its kind says whether trying again can help."""
    original = pymysql.OperationalError(*((code,) if code else ()), message)
    found = probe_error(original, pymysql_driver, mysql)
    assert found.probe_failure is ProbeFailure(probe_failure)
    assert advice in str(found)


def of(failure: Failure) -> set[int]:
    return {code for code, stands_for in mysql._TRANSIENT.items() if stands_for is failure}


@pytest.mark.parametrize(
    ("row", "codes"),
    [
        ("no connection could be made", mysql._UNREACHED),
        ("no room for one more", mysql._BUSY),
        ("the connection was lost", mysql._LOST - {0}),
        ("the instance failed inside", mysql._BROKEN),
        ("read-only", mysql._READ_ONLY | {1290}),
        ("not to be serialized", of(Failure.SERIALIZATION)),
        ("a deadlock", of(Failure.DEADLOCK)),
        ("a constraint was violated", mysql._CONSTRAINT),
        ("what was prepared is out of date", of(Failure.OUTDATED)),
        ("not there, or not there yet", of(Failure.MISSING)),
        ("replay changed what was read", of(Failure.CONFLICT)),
        ("refused", mysql._REFUSED | {pymysql_driver.NO_PACKAGE}),
    ],
)
def test_the_documented_codes_are_those_that_are_used(row, codes):
    document = (Path(__file__).parents[2] / "docs" / "failures.md").read_text()
    (written,) = re.findall(rf"^\| {row} \| (.*) \|$", document, re.MULTILINE)
    assert {int(code) for code in re.findall(r"\b\d{4}\b", written)} == codes


@pytest.mark.parametrize(("code", "busy"), [(1040, True), (1203, True), (2003, False), (None, False)])
def test_a_server_without_room_is_busy_and_not_down(code, busy):
    assert is_busy(code, "") is busy


# -- what a server does on its own --------------------------------------------------------------------------------


def answering(answers):
    """A function that asks, like a `Query`. answers: rows, by the text."""
    return lambda sql: ((), answers.pop(sql))


@pytest.mark.parametrize("code", [1020, 1206, 1213, 1614])
def test_some_errors_roll_the_transaction_back(code):
    assert mysql.may_have_rolled_back(code)
    assert mysql.has_rolled_back(code, answering({}))


@pytest.mark.parametrize(("setting", "is_back"), [(1, True), ("ON", True), (0, False), ("OFF", False), (None, False)])
def test_a_setting_decides_what_a_lock_timeout_rolls_back(setting, is_back):
    assert mysql.may_have_rolled_back(1205)
    asked = answering({"SELECT @@global.innodb_rollback_on_timeout": [(setting,)]})
    assert mysql.has_rolled_back(1205, asked) is is_back


@pytest.mark.parametrize("code", [1062, 2013, None])
def test_other_errors_leave_the_transaction_as_it_is(code):
    assert not mysql.may_have_rolled_back(code)
    assert not mysql.has_rolled_back(code, answering({}))


@pytest.mark.parametrize(
    ("codes", "counted", "has_left"),
    [((1751, 1196), (), True), ((1751,), [(1,)], False), ((1751,), [("2",)], True), ((), (), False)],
)
def test_the_warnings_of_a_rollback_say_what_it_left(codes, counted, has_left):
    """Writes are left if a warning says so, or if the server has not kept all warnings."""
    kept = [("Warning", code, "words") for code in codes]
    assert mysql.has_left_writes(answering({"SHOW WARNINGS": kept, "SHOW COUNT(*) WARNINGS": counted})) is has_left


def test_postgresql_rolls_nothing_back_on_its_own():
    """A failed transaction of PostgreSQL stays failed until its end, and its rollback leaves nothing."""
    ask = answering({})
    assert not postgresql.may_have_rolled_back("40P01")
    assert not postgresql.has_rolled_back("40P01", ask)
    assert not postgresql.has_left_writes(ask)


# -- the outcome of a COMMIT --------------------------------------------------------------------------------------


class Database:
    """A stand-in for a connection that knows its database."""

    def __init__(self, db=None):
        self.db = db


@pytest.mark.parametrize(
    ("db", "table"),
    [
        ("app", "`app`.aurora_router_commits"),
        (b"app", "`app`.aurora_router_commits"),
        ("a`b", "`a``b`.aurora_router_commits"),
        (None, "aurora_router_commits"),
    ],
)
def test_a_transaction_is_signed_in_the_database_of_the_url(db, table):
    """A transaction is signed in the database of the URL, whatever database it has used since."""
    sent = []
    assert mysql.insert_commit_row(lambda *given: sent.append(given), UUID, pymysql_driver.database(Database(db)), False) == ""
    assert sent == [(f"INSERT INTO {table} (id) VALUES (%(id)s)", {"id": UUID})]


@pytest.mark.parametrize("number", [1792, 1142])
def test_a_read_only_transaction_is_not_signed(number):
    """A read-only transaction cannot be signed, which is no error, unlike all else that keeps the row out."""
    database = Database("app")

    def refuse(*_):
        raise pymysql.OperationalError(number, "refused")

    database.cursor = lambda: contextlib.nullcontext(types.SimpleNamespace(execute=refuse))
    unit = Unit(Intent(None, commit_check="table"))
    unit.place = Place(Instance("db-1:3306", "db-1", 3306))
    assert not pymysql_driver.declared_read_only(database)
    if number == 1792:
        assert (
            str(prepare_commit_check(database, unit, pymysql_driver, mysql, Topology((unit.place.instance,))))
            == "a read-only transaction"
        )
    else:
        with pytest.raises(pymysql.OperationalError, match="refused"):
            prepare_commit_check(database, unit, pymysql_driver, mysql, Topology((unit.place.instance,)))


def test_other_locked_tables_keep_the_row_out():
    assert mysql.is_locked_out(1100)
    assert not mysql.is_locked_out(1142)
    assert not postgresql.is_locked_out("25006")


def test_a_table_may_be_missing_and_so_may_the_database():
    assert mysql.is_missing_table(1146)
    assert mysql.is_missing_table(1046)
    assert not mysql.is_missing_table(1142)
    assert not mysql.is_missing_table(None)
