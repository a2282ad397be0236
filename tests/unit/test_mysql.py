"""MySQL's and MariaDB's rows, error codes and words as the router reads them, and PyMySQL's connection as it is used."""

import contextlib
import os
import re
import socket
import ssl
import threading
import types
from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import Path

import pymysql
import pytest
from pymysql.constants import SERVER_STATUS
from sqlalchemy import create_engine, make_url

from aurora_router.core.failures import Failure
from aurora_router.core.gtid import GtidSet, MariadbGtid
from aurora_router.core.topology import Role, Server, ServerId, Silence
from aurora_router.errors import WrongServer
from aurora_router.servers import Mode, Unsuitable, mysql
from aurora_router.servers.mysql import explain_refusal, failure, is_busy, parse_functions, parse_identity, parse_version

MARIADB = ("10.11.6-MariaDB-0+deb12u1", 1)
MYSQL = ("8.4.0", 0)
UUID, OTHER, GROUP = (f"{n:08x}-71ca-11e1-9e33-c80aa9429562" for n in (1, 2, 9))
STARTED = 1772600767
RUNS = {
    "Slave_IO_Running": "Yes", "Slave_SQL_Running": "Yes", "Last_SQL_Errno": 0, "Last_IO_Errno": 0, "Seconds_Behind_Master": 0,
    "Master_Log_File": "b.1", "Read_Master_Log_Pos": 9, "Relay_Master_Log_File": "b.1", "Exec_Master_Log_Pos": 9,
}  # fmt: skip
NEWER = {name.replace("Slave", "Replica").replace("Master", "Source"): value for name, value in RUNS.items()}


def asking(*answers: object) -> Callable[[str], tuple[list[str], list[tuple[object, ...]]]]:
    """Answers the questions in this order: (part of the question, answer), a row or a list of dicts."""
    left = list(answers)

    def ask(sql):
        part, answer = left.pop(0)
        assert part in sql, sql
        if isinstance(answer, list):
            return (list(answer[0]) if answer else []), [tuple(row.values()) for row in answer]
        return [f"c{n}" for n in range(len(answer))], [answer]

    return ask


def mariadb(*, read_only=0, current="0-1-7", replayed="", state="0-1-7", logs=1, version="10.11.6-MariaDB",
            level="REPEATABLE-READ", channels=()):  # fmt: skip
    return asking(
        ("gtid_slave_pos", (version, 1, 0, 3, STARTED, 3306, read_only, 0, current, replayed, state, logs, level)),
        ("SHOW ALL SLAVES STATUS", list(channels)),
    )


def oracle(
    *,
    read_only=0,
    executed=f"{UUID}:1-5",
    mode="ON",
    opened=None,
    version="8.4.0",
    group=None,
    members=None,
    channels=(),
    show="REPLICA",
):
    return asking(
        ("gtid_executed", (version, 0, group, UUID, STARTED, 3306, read_only, 0, executed, mode, opened, "REPEATABLE-READ")),
        *(
            [
                (
                    "replication_group_members",
                    [{"id": i, "state": s, "role": role[0] if role else "SECONDARY"} for i, s, *role in members],
                )
            ]
            if members is not None
            else []
        ),
        (f"SHOW {show} STATUS", list(channels)),
    )


# -- who and where a server is ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "found"),
    [
        (MARIADB, "MariaDB 10.11.6"),
        (("11.8.2", 1), "MariaDB 11.8.2"),
        (("8.0.36", 0), "MySQL 8.0.36"),
        (("9.1.0-commercial", 0), "MySQL 9.1.0"),
        (("8.4", 0), "MySQL 8.4.0"),
    ],
)
def test_a_server_says_which_of_the_two_it_is(row, found):
    assert str(parse_version(row)) == found


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (("10.5.28-MariaDB", 1), "runs MariaDB 10.5.28; version 10.6 or newer is needed"),
        (("5.7.44-log", 0), "runs MySQL 5.7.44; version 8.0 or newer is needed"),
        (("unknown", 0), "runs MySQL 0; version 8.0 or newer is needed"),
        (MYSQL, r"something on the way to MySQL 8.4.0 drops version comments"),
    ],
)
def test_a_server_that_is_too_old_or_does_not_say_who_it_is_is_unsuitable_and_the_error_says_why(row, said):
    with pytest.raises(Unsuitable, match=said):
        parse_identity((*row, 3306, 0, 0))


@pytest.mark.parametrize(
    ("version", "said", "identity"),
    [
        (MARIADB, (0, 3, STARTED), ServerId("mariadb-0", "3", 3306, f"{STARTED}/3")),
        (MYSQL, (None, UUID, STARTED), ServerId("mysql", UUID, 3306, f"{STARTED}/{UUID}")),
        (MYSQL, ("", UUID, STARTED), ServerId("mysql", UUID, 3306, f"{STARTED}/{UUID}")),
        (MYSQL, (GROUP, UUID, STARTED), ServerId(GROUP, UUID, 3306, f"{STARTED}/{UUID}")),
    ],
)
def test_an_identity_is_the_domain_or_the_group_and_the_servers_own_name_and_start(version, said, identity):
    assert parse_identity((*version, *said, 3306, 0, 0)) == (identity, Role.WRITER)


@pytest.mark.parametrize(
    ("read_only", "of_innodb", "role"),
    [
        (0, 0, Role.WRITER),
        ("OFF", "OFF", Role.WRITER),
        (1, 0, Role.READER),
        ("NO_LOCK", 0, Role.READER),
        (0, 1, Role.READER),
    ],
)
def test_a_server_that_is_read_only_is_a_reader(read_only, of_innodb, role):
    assert parse_identity((*MARIADB, 0, 3, STARTED, 3306, read_only, of_innodb))[1] is role


def test_a_fresh_connection_to_a_reader_is_guarded_and_one_to_the_writer_is_not():
    identity = ServerId("mariadb-0", "3", 3306, f"{STARTED}/3")
    ask = asking(("gtid_domain_id", (*MARIADB, 0, 3, STARTED, 3306, 0, 0)))
    assert mysql.greet(None, ask) == (identity, Role.WRITER)
    ask = asking(("gtid_domain_id", (*MARIADB, 0, 3, STARTED, 3306, 1, 0)), ("SET SESSION TRANSACTION READ ONLY", []))
    assert mysql.greet(None, ask) == (identity, Role.READER)


def test_a_connection_that_is_to_write_is_guarded_no_longer():
    mysql.guard(None, asking(("SET SESSION TRANSACTION READ WRITE", [])), on=False)


# -- MariaDB ------------------------------------------------------------------------------------------------------


def test_a_writer_of_mariadb_is_as_far_as_its_log_in_the_epoch_that_its_first_transaction_began():
    found = mysql.probe(mariadb(current="0-3-12", state="0-1-10,0-3-12"), asynchronous_commits=False)
    identity = ServerId("mariadb-0", "3", 3306, f"{STARTED}/3")
    assert found == Server(identity, Role.WRITER, 11, MariadbGtid(11, ((0, 3, 12),)), None, "repeatable read")


def test_a_reader_of_mariadb_is_as_far_as_it_has_replayed_and_its_word_for_the_epoch_counts_for_its_position_only():
    ask = mariadb(read_only=1, current="0-3-13", replayed="0-2-12", state="0-1-10,0-2-12", channels=[RUNS])
    found = mysql.probe(ask, asynchronous_commits=False)
    assert (found.role, found.epoch, found.position) == (Role.READER, 0, MariadbGtid(11, ((0, 2, 12),)))
    assert (found.lag, found.stopped) == (0.0, "")


@pytest.mark.parametrize(("running", "own"), [("Yes", False), ("No", True)])
def test_a_server_that_accepts_writes_and_replicates_as_well_is_not_taken_for_a_promoted_one(running, own):
    found = mysql.probe(mariadb(channels=[{**RUNS, "Slave_SQL_Running": running}]), asynchronous_commits=False)
    assert (found.role, found.position.own) == (Role.WRITER, 3 if own else -1)
    found = mysql.probe(oracle(channels=[{**NEWER, "Replica_SQL_Running": running}]), asynchronous_commits=False)
    assert (found.role, found.position.own) == (Role.WRITER, UUID if own else "")


def test_a_transaction_that_a_reader_has_made_itself_deposes_no_writer():
    ask = mariadb(read_only=1, current="", replayed="0-1-52", state="0-1-52,0-3-51", channels=[RUNS])
    assert mysql.probe(ask, asynchronous_commits=False).epoch == 0


def test_a_writer_without_a_binary_log_has_no_position():
    assert mysql.probe(mariadb(logs=0, state=None), asynchronous_commits=False).position is None


# -- MySQL --------------------------------------------------------------------------------------------------------


def test_a_server_of_mysql_is_as_far_as_what_it_has_executed():
    found = mysql.probe(oracle(), asynchronous_commits=False)
    assert found.position == GtidSet.said(1, f"{UUID}:1-5")
    assert (found.role, found.epoch, found.position.own, found.isolation) == (Role.WRITER, 1, UUID, "repeatable read")


def test_a_server_of_mysql_says_when_it_was_told_to_accept_writes():
    for opened, said in ((None, 0.0), (Decimal("1795703689.289830"), 1795703689.28983)):
        assert mysql.probe(oracle(opened=opened), asynchronous_commits=False).position.opened == said


@pytest.mark.parametrize("mode", ["OFF", "OFF_PERMISSIVE", "ON_PERMISSIVE"])
def test_where_not_all_transactions_have_a_gtid_there_is_no_position(mode):
    assert mysql.probe(oracle(mode=mode), asynchronous_commits=False).position is None


@pytest.mark.parametrize(
    ("version", "show", "channel"), [("8.0.21", "SLAVE", RUNS), ("8.0.22", "REPLICA", NEWER), ("8.4.0", "REPLICA", NEWER)]
)
def test_a_reader_is_asked_for_its_replication_in_the_words_of_its_version(version, show, channel):
    found = mysql.probe(oracle(read_only=1, version=version, show=show, channels=[channel]), asynchronous_commits=False)
    assert (found.role, found.lag, found.stopped) == (Role.READER, 0.0, "")


@pytest.mark.parametrize(
    ("read_only", "members", "role", "stopped"),
    [
        (0, [(UUID, "ONLINE"), (OTHER, "ONLINE")], Role.WRITER, ""),
        (0, [(UUID, "ONLINE"), (OTHER, "RECOVERING")], Role.WRITER, ""),
        (1, [(UUID, "ONLINE"), (OTHER, "ONLINE")], Role.READER, ""),
        (1, [(UUID, "RECOVERING"), (OTHER, "ONLINE")], Role.READER, "it is RECOVERING in its group"),
        (1, [(UUID, "ERROR")], Role.READER, "it is ERROR in its group"),
        (1, [(UUID, "ONLINE"), (OTHER, "UNREACHABLE")], Role.READER, "most of its group cannot be reached"),
    ],
)
def test_a_member_of_a_group_is_used_while_it_is_online_and_most_others_can_be_reached(read_only, members, role, stopped):
    found = mysql.probe(oracle(read_only=read_only, group=GROUP, members=members), asynchronous_commits=False)
    assert (found.role, found.stopped) == (role, stopped)
    assert found.position.own == GROUP


def test_a_group_with_several_writers_is_unsuitable_and_the_error_says_what_to_do():
    members = [(UUID, "ONLINE", "PRIMARY"), (OTHER, "ONLINE", "PRIMARY")]
    with pytest.raises(
        Unsuitable, match="has several writers, and may have one only: group_replication_switch_to_single_primary"
    ):
        mysql.probe(oracle(group=GROUP, members=members), asynchronous_commits=False)
    found = mysql.probe(oracle(group=GROUP, members=[(UUID, "ONLINE", "PRIMARY"), (OTHER, "ONLINE")]), asynchronous_commits=False)
    assert found.role is Role.WRITER


def test_between_equals_a_member_of_the_group_is_newer_than_one_that_has_left_it_and_accepts_writes():
    executed = f"{GROUP}:1-5"
    left = mysql.probe(oracle(group=GROUP, executed=executed, members=[(UUID, "OFFLINE")]), asynchronous_commits=False)
    member = mysql.probe(oracle(group=GROUP, executed=executed, members=[(UUID, "ONLINE")]), asynchronous_commits=False)
    assert left.role is member.role is Role.WRITER
    assert member.position.outdoes(left.position)
    assert not left.position.outdoes(member.position)


def test_a_writer_whose_group_cannot_be_reached_can_commit_nothing_and_is_unsuitable():
    with pytest.raises(Unsuitable, match="accepts writes, but most of its group cannot be reached"):
        mysql.probe(oracle(group=GROUP, members=[(UUID, "ONLINE"), (OTHER, "UNREACHABLE")]), asynchronous_commits=False)


def test_a_reader_that_shares_the_writers_storage_replicates_from_nobody_and_is_used():
    ask = asking(
        ("gtid_executed", ("8.0.28", 0, None, UUID, STARTED, 3306, 0, 1, "", "OFF_PERMISSIVE", None, "REPEATABLE-READ")),
        ("SHOW REPLICA STATUS", []),
    )
    found = mysql.probe(ask, asynchronous_commits=False)
    assert (found.role, found.position, found.lag, found.stopped) == (Role.READER, None, None, "")


@pytest.mark.parametrize("members", [[("", "OFFLINE")], []])
def test_a_server_that_has_left_its_group_is_asked_for_its_replication(members):
    ask = oracle(read_only=1, group=GROUP, members=members, channels=[{**NEWER, "Replica_SQL_Running": "No"}])
    assert "SQL thread" in mysql.probe(ask, asynchronous_commits=False).stopped


# -- replication --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("said", [RUNS, NEWER], ids=["Slave", "Replica"])
@pytest.mark.parametrize(
    ("changes", "lag"),
    [
        ({}, 0.0),
        ({"Exec_Master_Log_Pos": 8, "Seconds_Behind_Master": 0}, 1.0),
        ({"Relay_Master_Log_File": "b.0", "Seconds_Behind_Master": 4}, 5.0),
        ({"Slave_IO_Running": "Connecting", "Seconds_Behind_Master": None}, None),
        ({"Slave_IO_Running": "Connecting", "Seconds_Behind_Master": 0}, None),
        ({"Slave_IO_Running": "No", "Last_IO_Errno": 2003, "Seconds_Behind_Master": 0}, None),
        ({"Slave_IO_Running": "No", "Exec_Master_Log_Pos": 8, "Seconds_Behind_Master": None}, None),
        ({"Slave_IO_Running": "Connecting", "Exec_Master_Log_Pos": 8, "Seconds_Behind_Master": 2}, 3.0),
    ],
)
def test_a_reader_that_has_replayed_what_it_received_is_not_behind_and_others_may_be_a_second_more_than_they_say(
    said, changes, lag
):
    if said is NEWER:
        changes = {name.replace("Slave", "Replica").replace("Master", "Source"): value for name, value in changes.items()}
    assert mysql.parse_replicas([{**said, **changes}]) == (lag, "")


@pytest.mark.parametrize(
    ("executed", "behind", "lag"),
    [(f"{UUID}:1-9,\n{OTHER}:1", 7, 0.0), (f"{UUID}:1-8", 0, 1.0), (f"{UUID}:1-8", 7, 8.0), ("", 0, 1.0)],
)
def test_what_a_reader_of_mysql_has_replayed_its_gtids_say(executed, behind, lag):
    """Its place in the log, and the seconds, are those of a moment ago: its workers were seen to later."""
    gtids = {"Auto_Position": 1, "Retrieved_Gtid_Set": f"{UUID}:5-9", "Executed_Gtid_Set": executed}
    assert mysql.parse_replicas([{**NEWER, "Exec_Source_Log_Pos": 8, "Seconds_Behind_Source": behind, **gtids}]) == (lag, "")
    assert mysql.parse_replicas([{**NEWER, "Seconds_Behind_Source": behind, **gtids}]) == (lag, "")


def test_a_reader_of_several_sources_is_as_late_as_the_latest():
    late = {**RUNS, "Exec_Master_Log_Pos": 8, "Seconds_Behind_Master": 4}
    unknown = {**RUNS, "Slave_IO_Running": "No", "Seconds_Behind_Master": None}
    assert mysql.parse_replicas([RUNS, late]) == (5.0, "")
    assert mysql.parse_replicas([RUNS, unknown]) == (None, "")


def test_a_reader_that_does_not_replay_says_why_and_shows_nothing_of_the_data():
    lag, stopped = mysql.parse_replicas(
        [RUNS, {**RUNS, "Slave_SQL_Running": "No", "Last_SQL_Errno": 1062, "Last_SQL_Error": "s3cr3t"}]
    )
    assert lag is None
    assert stopped == "its SQL thread has stopped (error 1062; SHOW REPLICA STATUS there says more)"
    lag, stopped = mysql.parse_replicas([{**RUNS, "Slave_IO_Running": "No", "Last_IO_Errno": 1236, "Last_IO_Error": "s3cr3t"}])
    assert (lag, stopped) == (None, "its IO thread has stopped (error 1236; SHOW REPLICA STATUS there says more)")
    assert mysql.parse_replicas([]) == (None, "it replicates from nobody")


def test_a_function_is_a_read_by_its_name_where_it_declares_to_be_one_in_every_schema():
    rows = [("Shop", "F", "READS SQL DATA"), ("crm", "f", "NO SQL"), ("shop", "g", "NO SQL"), ("crm", "g", "CONTAINS SQL"),
            ("shop", "h", "MODIFIES SQL DATA")]  # fmt: skip
    assert parse_functions(rows) == {"f", "shop.f", "crm.f", "shop.g"}


# -- how errors read ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "message", "disconnected", "kind"),
    [
        (1045, "Access denied for user", False, Failure.REFUSED),
        (1049, "Unknown database", False, Failure.REFUSED),
        (1044, "Access denied for user to database", False, Failure.REFUSED),
        (1142, "SELECT command denied to user", False, Failure.REFUSED),
        (1227, "Access denied; you need the SLAVE MONITOR privilege", False, Failure.REFUSED),
        (1290, "The MariaDB server is running with the --read-only option", False, Failure.READ_ONLY),
        (1290, "The MySQL server is running with the --super-read-only option", False, Failure.READ_ONLY),
        (1290, "The MySQL server is running with the --secure-file-priv option", False, Failure.OTHER),
        (1836, "Running in read-only mode", False, Failure.READ_ONLY),
        (1792, "Cannot execute statement in a READ ONLY transaction", False, Failure.READ_ONLY),
        (1205, "Lock wait timeout exceeded; try restarting transaction", False, Failure.SERIALIZATION),
        (1020, "Record has changed since last read in table", False, Failure.SERIALIZATION),
        (3100, "Error on observer while running replication hook 'before_commit'.", False, Failure.SERIALIZATION),
        (3101, "Plugin instructed the server to rollback the current transaction", False, Failure.SERIALIZATION),
        (1213, "Deadlock found when trying to get lock", False, Failure.DEADLOCK),
        (1412, "Table definition has changed, please retry transaction", False, Failure.CONFLICT),
        (1040, "Too many connections", False, Failure.BUSY),
        (1203, "User app already has more than 'max_user_connections' active connections", False, Failure.BUSY),
        (2003, "Can't connect to MySQL server", False, Failure.CONNECT),
        (3032, "The server is currently in offline mode", False, Failure.CONNECT),
        (1129, "Host '10.0.0.9' is blocked because of many connection errors", False, Failure.CONNECT),
        (2006, "MySQL server has gone away", False, Failure.LOST),
        (2013, "Lost connection to MySQL server during query", True, Failure.LOST),
        (2055, "Lost connection to MySQL server", False, Failure.LOST),
        (2013, "Lost connection to MySQL server during query (timed out)", True, Failure.TIMED_OUT),
        (2013, "Lost connection to MySQL server during query (The read operation timed out)", True, Failure.TIMED_OUT),
        (2013, "Lost connection to MySQL server during query ([Errno 110] Connection timed out)", True, Failure.LOST),
        (2006, "MySQL server has gone away (TimeoutError('timed out'))", True, Failure.TIMED_OUT),
        (2006, "MySQL server has gone away (TimeoutError('The write operation timed out'))", True, Failure.TIMED_OUT),
        (2006, "MySQL server has gone away (TimeoutError(110, 'Connection timed out'))", True, Failure.LOST),
        (2003, "Can't connect to MySQL server on 'h' (timed out)", False, Failure.CONNECT),
        (1927, "Connection was killed", False, Failure.LOST),
        (1053, "Server shutdown in progress", False, Failure.LOST),
        (0, "", False, Failure.LOST),
        (None, "Already closed", False, Failure.LOST),
        (None, "Packet sequence number wrong", True, Failure.LOST),
        (1021, "Disk full", False, Failure.BROKEN),
        (1317, "Query execution was interrupted", False, Failure.OTHER),
        (3024, "Query execution was interrupted, maximum statement execution time exceeded", False, Failure.OTHER),
        (1062, "Duplicate entry", False, Failure.OTHER),
        (None, "something else", False, Failure.OTHER),
    ],
)
def test_driver_errors_stand_for_the_failure_that_they_are(code, message, disconnected, kind):
    assert failure(code, message, disconnected=disconnected) is kind


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
    assert mysql.code(error) == code


def test_some_errors_are_only_met_while_connecting():
    assert mysql.is_from_connecting(pymysql.OperationalError(2003, "Can't connect"))
    assert mysql.is_from_connecting(pymysql.OperationalError(1045, "Access denied"))
    assert not mysql.is_from_connecting(pymysql.OperationalError(2013, "Lost connection"))


@pytest.mark.parametrize(
    ("code", "message", "silence", "advice"),
    [
        (1045, "Access denied for user 'app'", "misconfigured", "check the user and the password"),
        (1698, "Access denied for user 'root'", "misconfigured", "check the user and the password"),
        (1049, "Unknown database 'shop'", "misconfigured", "check the database name"),
        (1044, "Access denied for user to database 'shop'", "misconfigured", "check the database name"),
        (1130, "Host '10.0.0.9' is not allowed to connect", "misconfigured", "allow this host"),
        (1227, "Access denied; you need (at least one of) the SLAVE MONITOR", "misconfigured", "REPLICATION CLIENT on MySQL"),
        (1142, "SELECT command denied", "misconfigured", "performance_schema.replication_group_members"),
        (2026, "SSL connection error", "misconfigured", "check the ssl options"),
        (2003, "Can't connect ([SSL: CERTIFICATE_VERIFY_FAILED] certificate)", "misconfigured", "check the ssl options"),
        (2061, "'cryptography' package is required", "misconfigured", "pip install 'PyMySQL[rsa,ed25519]'"),
        (2003, "Can't connect (EOF occurred in violation of protocol)", "refused", "Can't connect"),
        (None, "Packet sequence number wrong - got 80 expected 0", "misconfigured", "no MySQL or MariaDB server answers there"),
        (1820, "You must reset your password", "misconfigured", "reset your password"),
        (None, "MySQL version 9.7 is not a MariaDB variant.", "misconfigured", "variant; write mysql+pymysql:// in the URL"),
        (2003, "Can't connect to MySQL server on '10.0.0.9'", "refused", "Can't connect"),
        (None, "waited in vain for a turn to connect", "refused", "in vain"),
    ],
)
def test_a_refused_probe_says_in_words_what_to_do_and_whether_trying_again_can_help(code, message, silence, advice):
    kind, words = explain_refusal(code, message)
    assert kind is Silence(silence)
    assert advice in words


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
        ("replay changed what was read", of(Failure.CONFLICT)),
        ("refused", mysql._REFUSED),
    ],
)
def test_the_documented_codes_are_those_that_are_used(row, codes):
    document = (Path(__file__).parents[2] / "docs" / "failures.md").read_text()
    (written,) = re.findall(rf"^\| {row} \| (.*) \|$", document, re.MULTILINE)
    assert {int(code) for code in re.findall(r"\b\d{4}\b", written)} == codes


@pytest.mark.parametrize(("code", "busy"), [(1040, True), (1203, True), (2003, False), (None, False)])
def test_a_server_without_room_is_busy_and_not_down(code, busy):
    assert is_busy(code, "") is busy


# -- what became of a COMMIT --------------------------------------------------------------------------------------


class Database:
    """Where statements go, in place of a connection."""

    def __init__(self, db=None):
        self.db = db
        self.sent = []

    def cursor(self):
        return contextlib.nullcontext(types.SimpleNamespace(execute=self.sent.append))


@pytest.mark.parametrize(
    ("db", "table"),
    [
        ("app", "`app`.aurora_router_commits"),
        (b"app", "`app`.aurora_router_commits"),
        ("a`b", "`a``b`.aurora_router_commits"),
        (None, "aurora_router_commits"),
    ],
)
def test_a_transaction_is_signed_in_the_database_of_the_url_whatever_it_has_used_since(db, table):
    database = Database(db)
    assert mysql.sign(database, UUID) == ""
    assert database.sent == [f"INSERT INTO {table} (id) VALUES ('{UUID}')"]


def test_a_transaction_that_the_server_has_rolled_back_is_not_signed():
    database = Database("app")
    database.aborted_by = pymysql.OperationalError(1213, "Deadlock found")
    with pytest.raises(pymysql.OperationalError, match="Deadlock"):
        mysql.sign(database, UUID)
    assert database.sent == []


def test_a_table_may_be_missing_and_so_may_the_database():
    assert mysql.is_missing_table(pymysql.ProgrammingError(1146, "Table doesn't exist"))
    assert mysql.is_missing_table(pymysql.OperationalError(1046, "No database selected"))
    assert not mysql.is_missing_table(pymysql.OperationalError(1142, "denied"))
    assert not mysql.is_missing_table(None)


# -- PyMySQL's connection -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("query", "encrypted"),
    [
        ({}, {"ssl_check_hostname": "false"}),
        ({"charset": "utf8mb4"}, {"charset": "utf8mb4", "ssl_check_hostname": "false"}),
        ({"ssl_ca": "/ca.pem"}, {"ssl_ca": "/ca.pem"}),
        ({"ssl_disabled": "true"}, {"ssl_disabled": "true"}),
    ],
)
def test_a_connection_is_encrypted_unless_the_user_says_how(query, encrypted):
    assert mysql.encrypted(query) == encrypted
    options = create_engine("mysql+pymysql://h").dialect.create_connect_args(make_url("mysql+pymysql://h").set(query=encrypted))[
        1
    ]
    assert options.get("ssl") or options.get("ssl_disabled")


OK = b"\0\0\0"


def packet(number: int, payload: bytes) -> bytes:
    return len(payload).to_bytes(3, "little") + bytes([number]) + payload


class Peer(threading.Thread):
    """As much of a server as PyMySQL needs: greets, and answers each command with OK, or what is in `answers`.

    heard: the commands. status: what OK says of the session. silent: it does not even greet. deaf: nor does it read on.
    """

    def __init__(self, *, silent: bool = False) -> None:
        super().__init__(daemon=True)
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.heard: list[str] = []
        self.answers: dict[str, bytes] = {}
        self.status = SERVER_STATUS.SERVER_STATUS_AUTOCOMMIT
        self.silent = silent
        self.deaf = False
        self.closed = threading.Event()
        self.start()

    def run(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self.listener.accept()
                with client, contextlib.suppress(OSError, EOFError):
                    self.serve(client)

    def serve(self, client: socket.socket) -> None:
        if not self.silent:
            greeting = b"\x0a8.4.0\0" + b"\1\0\0\0" + b"a" * 8 + b"\0" + b"\xff\xf7" + b"\xff" + b"\2\0" + b"\xff\x81" + b"\x15"
            client.sendall(packet(0, greeting + b"\0" * 10 + b"a" * 12 + b"\0mysql_native_password\0"))
        while True:
            head = self.read(client, 4)
            if self.deaf:
                self.closed.wait()
            body = self.read(client, int.from_bytes(head[:3], "little"))
            if self.silent:
                continue
            text = body[1:].decode("latin1") if body[:1] == b"\3" else ""
            if text:
                self.heard.append(text)
                if text == "SET AUTOCOMMIT = 0":
                    self.status = 0
                elif text == "SET AUTOCOMMIT = 1":
                    self.status = SERVER_STATUS.SERVER_STATUS_AUTOCOMMIT
                elif text.startswith("START"):
                    self.status |= SERVER_STATUS.SERVER_STATUS_IN_TRANS
                elif text in ("COMMIT", "ROLLBACK"):
                    self.status &= ~SERVER_STATUS.SERVER_STATUS_IN_TRANS
            client.sendall(self.answers.get(text) or packet(head[3] + 1, OK + self.status.to_bytes(2, "little") + b"\0\0"))

    def close(self) -> None:
        self.closed.set()
        self.listener.shutdown(socket.SHUT_RDWR)  # which wakes the thread
        self.listener.close()

    def read(self, client: socket.socket, size: int) -> bytes:
        data = b""
        while len(data) < size:
            more = client.recv(size - len(data))
            if not more:
                raise EOFError
            data += more
        return data


@pytest.fixture
def peer() -> Iterator[Peer]:
    peer = Peer()
    yield peer
    peer.close()


def connected(peer: Peer, connecting=lambda _: contextlib.nullcontext(), **options):
    dialect = create_engine("mysql+pymysql://").dialect
    mysql.watch_connecting(dialect, connecting)
    arguments, given = dialect.create_connect_args(make_url(f"mysql+pymysql://u@127.0.0.1:{peer.port}/d"))
    return dialect.connect(*arguments, **{**given, "ssl_disabled": True, **options})


def test_neither_commit_nor_rollback_is_sent_where_nothing_has_happened(peer: Peer) -> None:
    connection = connected(peer)
    peer.heard.clear()
    for end in (connection.rollback, connection.commit):
        end()
        assert peer.heard == []
        connection.query("SELECT 1")
        end()
        end()
        assert peer.heard == ["SELECT 1", end.__name__.upper()]
        peer.heard.clear()


def test_in_autocommit_only_a_transaction_that_somebody_has_begun_is_ended(peer: Peer) -> None:
    connection = connected(peer, autocommit=True)
    peer.heard.clear()
    connection.query("SELECT 1")
    connection.rollback()
    connection.query("START TRANSACTION")
    connection.rollback()
    connection.rollback()
    assert peer.heard == ["SELECT 1", "START TRANSACTION", "ROLLBACK"]


def test_results_that_were_not_read_may_have_begun_a_transaction(peer: Peer) -> None:
    more = SERVER_STATUS.SERVER_MORE_RESULTS_EXISTS | SERVER_STATUS.SERVER_STATUS_AUTOCOMMIT
    first = packet(1, OK + more.to_bytes(2, "little") + b"\0\0")
    peer.answers["CALL p()"] = first + packet(2, OK + b"\3\0" + b"\0\0")
    connection = connected(peer, autocommit=True)
    connection.query("CALL p()")
    connection.commit()
    assert peer.heard[-1] == "COMMIT"


def test_an_error_does_not_say_whether_a_transaction_is_open(peer: Peer) -> None:
    peer.answers["CALL p()"] = packet(1, b"\xff" + (1644).to_bytes(2, "little") + b"#45000no")
    connection = connected(peer, autocommit=True)
    peer.heard.clear()
    for end in (connection.rollback, connection.commit):
        with pytest.raises(pymysql.OperationalError):
            connection.query("CALL p()")
        end()
        end()
    assert peer.heard == ["CALL p()", "ROLLBACK", "CALL p()", "COMMIT"]


def test_a_transaction_that_the_server_has_rolled_back_on_its_own_is_known_until_it_is_ended(peer: Peer) -> None:
    peer.answers["UPDATE"] = packet(1, b"\xff" + (1213).to_bytes(2, "little") + b"#40001Deadlock found")
    peer.answers["INSERT"] = packet(1, b"\xff" + (1062).to_bytes(2, "little") + b"#23000Duplicate entry")
    connection = connected(peer)
    with pytest.raises(pymysql.IntegrityError):
        connection.query("INSERT")
    assert not mysql.is_aborted(connection)
    for end in (connection.rollback, connection.commit):
        with pytest.raises(pymysql.OperationalError):
            connection.query("UPDATE")
        assert mysql.is_aborted(connection)
        with pytest.raises(pymysql.OperationalError, match="Deadlock"):
            mysql.refuse_aborted(connection)
        end()
        assert not mysql.is_aborted(connection)


@pytest.mark.parametrize(("answer", "aborted"), [("1", True), ("0", False), ("", False)])
def test_a_wait_for_a_lock_that_took_too_long_ends_the_transaction_where_the_server_is_set_so(
    peer: Peer, answer: str, aborted: bool
) -> None:
    peer.answers["UPDATE"] = packet(1, b"\xff" + (1205).to_bytes(2, "little") + b"#HY000Lock wait timeout exceeded")
    column = b"\3def\0\0\0\1c\0\x0c\x3f\0" + b"\1\0\0\0" + b"\x08\0\0\0\0\0"
    rows = packet(1, b"\1"), packet(2, column), packet(3, b"\xfe\0\0\2\0"), packet(4, b"\1" + answer.encode())
    lost = packet(1, b"\xff" + (1053).to_bytes(2, "little") + b"#08S01Server shutdown in progress")
    peer.answers[mysql.ROLLS_BACK_ON_TIMEOUT] = b"".join((*rows, packet(5, b"\xfe\0\0\2\0"))) if answer else lost
    connection = connected(peer)
    with pytest.raises(pymysql.OperationalError, match="Lock wait timeout"):
        connection.query("UPDATE")
    assert mysql.is_aborted(connection) is aborted
    connection.rollback()
    assert not mysql.is_aborted(connection)


def test_what_rolls_back_in_a_later_statement_of_a_text_is_known_though_sqlalchemy_only_logs_its_error(peer: Peer) -> None:
    more = SERVER_STATUS.SERVER_MORE_RESULTS_EXISTS.to_bytes(2, "little")
    deadlock = packet(2, b"\xff" + (1213).to_bytes(2, "little") + b"#40001Deadlock found")
    peer.answers["UPDATE a; UPDATE b"] = packet(1, OK + more + b"\0\0") + deadlock
    connection = connected(peer)
    cursor = connection.cursor()
    cursor.execute("UPDATE a; UPDATE b")
    assert not mysql.is_aborted(connection)
    with pytest.raises(pymysql.OperationalError, match="Deadlock"):
        cursor.close()
    assert mysql.is_aborted(connection)


def test_a_package_that_is_missing_for_the_way_to_log_in_is_an_error_of_the_driver_like_others(
    peer: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lacks_a_package(connection: object) -> None:
        raise RuntimeError("'cryptography' package is required for sha256_password or caching_sha2_password auth methods")

    monkeypatch.setattr(pymysql.connections.Connection, "_request_authentication", lacks_a_package)
    with pytest.raises(pymysql.OperationalError, match="package is required") as caught:
        connected(peer)
    assert mysql.is_from_connecting(caught.value)
    assert caught.value.__cause__ is None


def test_autocommit_can_be_set_and_asked_for(peer: Peer) -> None:
    connection = connected(peer)
    assert not connection.autocommit
    assert not mysql.autocommit(connection)
    connection.autocommit(True)
    assert connection.autocommit
    assert mysql.autocommit(connection)


@pytest.mark.parametrize(
    ("mode", "usual", "sent"),
    [
        (Mode.DEFAULT, False, []),
        (Mode.DEFAULT, True, ["SET AUTOCOMMIT = 1"]),
        (Mode.AUTOCOMMIT, False, ["SET AUTOCOMMIT = 1"]),
        (Mode.READ_ONLY, False, ["START TRANSACTION READ ONLY"]),
    ],
)
def test_a_mode_costs_a_round_trip_where_something_changes(peer: Peer, mode: Mode, usual: bool, sent: list[str]) -> None:
    connection = connected(peer)
    peer.heard.clear()
    lasts = mysql.set_mode(connection, mode, usual, guarded=False)
    assert peer.heard == sent
    assert lasts is (mode is not Mode.READ_ONLY)
    if mode is not Mode.READ_ONLY:
        mysql.set_mode(connection, mode, usual, guarded=False)
        assert peer.heard == sent


def test_on_a_guarded_connection_without_autocommit_a_read_only_transaction_begins_by_itself(peer: Peer) -> None:
    connection = connected(peer)
    peer.heard.clear()
    assert mysql.set_mode(connection, Mode.READ_ONLY, False, guarded=True), "and lasts"
    assert peer.heard == []
    mysql.set_mode(connection, Mode.AUTOCOMMIT, False, guarded=True)
    mysql.set_mode(connection, Mode.READ_ONLY, False, guarded=True)
    assert peer.heard == ["SET AUTOCOMMIT = 1", "START TRANSACTION READ ONLY"]


def test_a_connection_has_a_socket_until_it_is_closed(peer: Peer) -> None:
    connection = connected(peer)
    mysql.prepare(connection)
    assert os.fstat(mysql.fileno(connection))
    assert not mysql.is_closed(connection)
    connection.close()
    assert mysql.is_closed(connection)


def test_connections_that_verify_nothing_share_what_they_encrypt_with(peer: Peer) -> None:
    first, second, verifying = (
        connected(peer, ssl_disabled=False, ssl=options, defer_connect=True).ctx
        for options in (None, {"check_hostname": False}, {"verify_mode": True})
    )
    assert first is second
    assert first.verify_mode is ssl.CERT_NONE
    assert verifying.verify_mode is ssl.CERT_REQUIRED


def test_while_it_connects_a_connections_socket_is_shown(peer: Peer) -> None:
    numbers: list[int] = []

    @contextlib.contextmanager
    def connecting(number: int) -> Iterator[None]:
        numbers.append(number)
        yield

    connection = connected(peer, connecting)
    assert set(numbers) == {mysql.fileno(connection)}
    assert connection.host_info == f"socket 127.0.0.1:{peer.port}"


def test_a_wait_for_a_connection_ends_when_its_socket_is_shut_and_when_it_takes_too_long() -> None:
    peer = Peer(silent=True)
    twins: list[socket.socket] = []

    @contextlib.contextmanager
    def connecting(number: int) -> Iterator[None]:
        with socket.socket(fileno=os.dup(number)) as twin:
            with contextlib.suppress(OSError):  # not connected yet
                twin.getpeername()
                twin.shutdown(socket.SHUT_RDWR)
                twins.append(twin)
            yield

    with pytest.raises(pymysql.OperationalError, match="2013"):
        connected(peer, connecting)
    assert twins
    with pytest.raises(pymysql.OperationalError, match="timed out"):
        connected(peer, connect_timeout=0.2)
    peer.close()


def test_once_connected_a_connection_waits_for_as_long_as_its_user_says(peer: Peer) -> None:
    assert connected(peer, connect_timeout=1)._read_timeout is None
    assert connected(peer, connect_timeout=1, read_timeout=7)._read_timeout == 7


@pytest.mark.parametrize(
    ("statement", "options"),
    [("SELECT 1", {"read_timeout": 0.1}), ("SELECT 1" + " " * 2**24, {"write_timeout": 0.1, "max_allowed_packet": 2**25})],
    ids=["read", "write"],
)
def test_a_time_limit_of_pymysqls_is_told_from_a_connection_that_was_lost(statement, options) -> None:
    peer = Peer()
    connection = connected(peer, **options)
    peer.deaf = True
    with pytest.raises(pymysql.OperationalError) as caught:
        connection.query(statement)
    assert failure(mysql.code(caught.value), str(caught.value), disconnected=True) is Failure.TIMED_OUT
    peer.close()


@pytest.mark.parametrize("options", [{"host": "nowhere.invalid"}, {}, {"bind_address": "127.0.0.1"}], ids=str)
def test_a_name_that_leads_nowhere_and_a_port_where_nobody_is_are_told_as_pymysql_tells_them(options: dict[str, str]) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        place = types.SimpleNamespace(port=nobody.getsockname()[1])
        with pytest.raises(pymysql.OperationalError, match="2003, \"Can't connect to MySQL server on"):
            connected(place, **options)


@pytest.mark.parametrize("when", [1, 2], ids=["before it is connected", "when it is connected"])
@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_a_connection_that_is_not_wanted_any_more_leaves_no_socket_behind(peer: Peer, when: int) -> None:
    shown: list[int] = []

    def connecting(number: int):
        shown.append(number)
        if len(shown) == when:
            raise WrongServer("h:1", "not known there")
        return contextlib.nullcontext()

    with pytest.raises(WrongServer):
        connected(peer, connecting)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(shown[0])


def test_a_socket_that_somebody_else_has_connected_is_used(peer: Peer) -> None:
    connection = connected(peer, defer_connect=True)
    sock = socket.create_connection(("127.0.0.1", peer.port))
    connection.connect(sock)
    assert mysql.fileno(connection) == sock.fileno()
    connection.close()


def test_a_socket_option_that_the_system_does_not_have_is_not_set(peer: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(mysql.KEEPALIVE, "TCP_OF_ANOTHER_SYSTEM", 1)
    connected(peer).close()


def test_a_connect_function_that_somebody_has_put_in_place_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    dialect = create_engine("mysql+pymysql://").dialect
    monkeypatch.setattr(dialect, "dbapi", types.SimpleNamespace(connect=lambda: "traced"))
    mysql.watch_connecting(dialect, contextlib.nullcontext)
    assert dialect.connect() == "traced"
