"""The rows, error codes and words of MySQL and MariaDB as the router reads them, and PyMySQL's connection as it is used."""

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
from typing import Any

import pymysql
import pytest
from pymysql.constants import SERVER_STATUS
from sqlalchemy import create_engine, make_url
from sqlalchemy.engine.default import DefaultDialect

from aurora_router.commits import prepare
from aurora_router.core.failures import Failure
from aurora_router.core.gtid import GtidSet, MariadbGtid
from aurora_router.core.instance import Instance, Role, Server, ServerId, Silence
from aurora_router.core.topology import Topology
from aurora_router.drivers import Mode
from aurora_router.drivers import psycopg as psycopg_driver
from aurora_router.drivers import pymysql as pymysql_driver
from aurora_router.error_classification import failure_of
from aurora_router.errors import WrongServer
from aurora_router.mistakes import probe_error
from aurora_router.servers import Unsuitable, mysql, postgresql
from aurora_router.servers.mysql import is_busy, parse_functions, parse_identity, parse_version
from aurora_router.unit import Intent, Place, Unit
from tests.interruptions import interrupted_at_each_line

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
    """A function that answers questions in this order: (part of the question, answer). An answer is a row or a list of dicts."""
    left = list(answers)

    def ask(sql):
        part, answer = left.pop(0)
        assert part in sql, sql
        if isinstance(answer, list):
            return (list(answer[0]) if answer else []), [tuple(row.values()) for row in answer]
        return [f"c{n}" for n in range(len(answer))], [answer]

    return ask


def mariadb(*, read_only=0, logged="0-1-7", replayed="", state="0-1-7", logs=1, version="10.11.6-MariaDB",
            level="REPEATABLE-READ", channels=()):  # fmt: skip
    return asking(
        ("gtid_slave_pos", (version, 1, 0, 3, STARTED, 3306, read_only, 0, logged, replayed, state, logs, level)),
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


# -- identity and address -----------------------------------------------------------------------------------------


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
def test_an_unsuitable_server_error_says_why(row, said):
    """A server that is too old, or does not say who it is, is unsuitable, and the error says why."""
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
def test_an_identity_is_the_domain_or_group_name_and_start(version, said, identity):
    """An identity is the domain or the group with the server's own name and start."""
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


def test_a_new_connection_to_a_reader_is_set_read_only():
    """A new connection to a reader is guarded by a read-only session, and a new one to the writer is not."""
    identity = ServerId("mariadb-0", "3", 3306, f"{STARTED}/3")
    ask = asking(("gtid_domain_id", (*MARIADB, 0, 3, STARTED, 3306, 0, 0)))
    assert mysql.greet(ask, 7, None) == (identity, Role.WRITER, False)
    ask = asking(("gtid_domain_id", (*MARIADB, 0, 3, STARTED, 3306, 1, 0)), ("SET SESSION TRANSACTION READ ONLY", []))
    assert mysql.greet(ask, 7, None) == (identity, Role.READER, False)


# -- MariaDB ------------------------------------------------------------------------------------------------------


def test_a_mariadb_writers_position_comes_from_its_log():
    """The position of a MariaDB writer is the end of its log, in the epoch that its first transaction began."""
    found = mysql.probe(mariadb(logged="0-3-12", state="0-1-10,0-3-12"), asynchronous_commits=False)
    identity = ServerId("mariadb-0", "3", 3306, f"{STARTED}/3")
    assert found == Server(identity, Role.WRITER, 11, MariadbGtid(11, ((0, 3, 12),)), None, "repeatable read")


def test_a_foreign_server_id_takes_no_mariadb_writer_back():
    """A writer's position goes on with a transaction that was written with another server's id."""
    found = mysql.probe(mariadb(logged="0-77-13", replayed="0-1-10", state="0-1-10,0-3-12,0-77-13"), asynchronous_commits=False)
    assert (found.epoch, found.position) == (13, MariadbGtid(13, ((0, 77, 13),)))
    assert (found.position.own, found.position.others) == (3, ((0, 12),))


def test_a_promoted_mariadb_server_has_what_it_has_replayed():
    """A promoted server has what it has replayed, even if it has not logged that."""
    found = mysql.probe(mariadb(logged="0-3-2", replayed="0-1-9,4-1-1", state="0-3-2"), asynchronous_commits=False)
    assert found.position == MariadbGtid(1, ((0, 1, 9), (4, 1, 1)))


def test_a_mariadb_readers_epoch_counts_only_for_its_position():
    """A MariaDB reader's position is what it has replayed, and its epoch counts only for that position."""
    ask = mariadb(read_only=1, logged="0-3-13", replayed="0-2-12", state="0-1-10,0-2-12", channels=[RUNS])
    found = mysql.probe(ask, asynchronous_commits=False)
    assert (found.role, found.epoch, found.position) == (Role.READER, 0, MariadbGtid(11, ((0, 2, 12),)))
    assert (found.lag, found.stopped) == (0.0, "")


@pytest.mark.parametrize(("running", "own"), [("Yes", False), ("No", True)])
def test_a_writable_replica_is_not_taken_for_a_promoted_one(running, own):
    """A server that accepts writes while it replicates is not taken for a promoted one."""
    found = mysql.probe(mariadb(channels=[{**RUNS, "Slave_SQL_Running": running}]), asynchronous_commits=False)
    assert (found.role, found.position.own) == (Role.WRITER, 3 if own else -1)
    found = mysql.probe(oracle(channels=[{**NEWER, "Replica_SQL_Running": running}]), asynchronous_commits=False)
    assert (found.role, found.position.own) == (Role.WRITER, UUID if own else "")


def test_a_readers_own_transaction_deposes_no_writer():
    """A reader's own transaction deposes no writer."""
    ask = mariadb(read_only=1, logged="", replayed="0-1-52", state="0-1-52,0-3-51", channels=[RUNS])
    assert mysql.probe(ask, asynchronous_commits=False).epoch == 0


def test_a_writer_without_a_binary_log_has_no_position():
    assert mysql.probe(mariadb(logs=0, state=None), asynchronous_commits=False).position is None


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({}, ""),
        ({"Replicate_Ignore_Table": "", "Replicate_Do_DB": None}, ""),
        ({"Replicate_Ignore_Table": "app.logs"}, "Replicate_Ignore_Table: app.logs"),
        ({"Replicate_Do_DB": "app", "Replicate_Rewrite_DB": "a->b"}, "Replicate_Do_DB: app; Replicate_Rewrite_DB: a->b"),
        ({"Replicate_Wild_Do_Table": "app.%"}, "Replicate_Wild_Do_Table: app.%"),
        ({"Replicate_Ignore_Domain_Ids": "(5)"}, "Replicate_Ignore_Domain_Ids: (5)"),
        ({"Replicate_Ignore_Table": "mysql.plugin,innodb_memcache.config_options", "Replicate_Ignore_DB": "mysql, sys"}, ""),
        ({"Replicate_Wild_Ignore_Table": "mysql.%, other.%"}, "Replicate_Wild_Ignore_Table: other.%"),
        ({"Replicate_Do_DB": "mysql"}, "Replicate_Do_DB: mysql"),
    ],
)
def test_a_reader_with_replication_filters_says_so(settings, why):
    """A reader with replication filters says so, unless they leave out only the servers' own schemas."""
    ask = mariadb(read_only=1, channels=[{**RUNS, **settings}])
    found = mysql.probe(ask, asynchronous_commits=False)
    assert found.unproven == (f"it replicates a part of the writer's log only ({why})" if why else "")
    assert found.position is not None


@pytest.mark.parametrize(
    ("server", "show"),
    [(MARIADB, "SHOW MASTER STATUS"), (("8.0.36", 0), "SHOW MASTER STATUS"), (("8.2.0", 0), "SHOW BINARY LOG STATUS")],
)
def test_what_a_writer_leaves_out_of_its_log_is_known(server, show):
    def log(do, ignore):
        return asking(("@@version", server), (show, [{"File": "b.1", "Binlog_Do_DB": do, "Binlog_Ignore_DB": ignore}]))

    assert mysql.omissions(log("", "")) == mysql.omissions(log("", "mysql")) == ""
    assert mysql.omissions(log("", "other,mysql")).endswith("(Binlog_Ignore_DB: other)")
    assert mysql.omissions(log("app", "")).endswith("(Binlog_Do_DB: app)")
    assert mysql.omissions(asking(("@@version", server), (show, []))) == "", "it has no log"


# -- MySQL --------------------------------------------------------------------------------------------------------


def test_a_server_of_mysql_is_as_far_as_what_it_has_executed():
    found = mysql.probe(oracle(), asynchronous_commits=False)
    assert found.position == GtidSet.said(1, f"{UUID}:1-5")
    assert (found.role, found.epoch, found.position.own, found.isolation) == (Role.WRITER, 1, UUID, "repeatable read")


def test_a_mysql_server_says_when_it_became_writable():
    """A MySQL server says when it became writable."""
    for opened, said in ((None, 0.0), (Decimal("1795703689.289830"), 1795703689.28983)):
        assert mysql.probe(oracle(opened=opened), asynchronous_commits=False).position.opened == said


@pytest.mark.parametrize("mode", ["OFF", "OFF_PERMISSIVE", "ON_PERMISSIVE"])
def test_without_gtids_for_all_transactions_no_position(mode):
    """There is no position if not all transactions have a GTID."""
    assert mysql.probe(oracle(mode=mode), asynchronous_commits=False).position is None


@pytest.mark.parametrize(
    ("version", "show", "channel"), [("8.0.21", "SLAVE", RUNS), ("8.0.22", "REPLICA", NEWER), ("8.4.0", "REPLICA", NEWER)]
)
def test_replication_is_asked_in_the_words_of_the_version(version, show, channel):
    """A reader is asked for its replication in the words of its version."""
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
def test_a_group_member_needs_to_be_online_in_a_majority(read_only, members, role, stopped):
    """A member of a group is used while it is online and most of its group can be reached."""
    found = mysql.probe(oracle(read_only=read_only, group=GROUP, members=members), asynchronous_commits=False)
    assert (found.role, found.stopped) == (role, stopped)
    assert found.position.own == GROUP


def test_a_group_with_several_writers_is_unsuitable():
    """A group with several writers is unsuitable, and the error says what to do."""
    members = [(UUID, "ONLINE", "PRIMARY"), (OTHER, "ONLINE", "PRIMARY")]
    with pytest.raises(
        Unsuitable, match="has several writers, and may have one only: group_replication_switch_to_single_primary"
    ):
        mysql.probe(oracle(group=GROUP, members=members), asynchronous_commits=False)
    found = mysql.probe(oracle(group=GROUP, members=[(UUID, "ONLINE", "PRIMARY"), (OTHER, "ONLINE")]), asynchronous_commits=False)
    assert found.role is Role.WRITER


def test_a_group_member_is_newer_than_one_that_left():
    """Between equals, a member of the group is newer than a server that has left it and accepts writes."""
    executed = f"{GROUP}:1-5"
    left = mysql.probe(oracle(group=GROUP, executed=executed, members=[(UUID, "OFFLINE")]), asynchronous_commits=False)
    member = mysql.probe(oracle(group=GROUP, executed=executed, members=[(UUID, "ONLINE")]), asynchronous_commits=False)
    assert left.role is member.role is Role.WRITER
    assert member.position.outdoes(left.position)
    assert not left.position.outdoes(member.position)


def test_a_writer_without_its_groups_majority_is_unsuitable():
    """A writer whose group cannot be reached can commit nothing, so it is unsuitable."""
    with pytest.raises(Unsuitable, match="accepts writes, but most of its group cannot be reached"):
        mysql.probe(oracle(group=GROUP, members=[(UUID, "ONLINE"), (OTHER, "UNREACHABLE")]), asynchronous_commits=False)


def test_a_reader_on_shared_storage_needs_no_replication():
    """A reader that shares the writer's storage replicates from nobody and is used."""
    ask = asking(
        ("gtid_executed", ("8.0.28", 0, None, UUID, STARTED, 3306, 0, 1, "", "OFF_PERMISSIVE", None, "REPEATABLE-READ")),
        ("SHOW REPLICA STATUS", []),
    )
    found = mysql.probe(ask, asynchronous_commits=False)
    assert (found.role, found.position, found.lag, found.stopped) == (Role.READER, None, None, "")


@pytest.mark.parametrize("members", [[("", "OFFLINE")], []])
def test_a_server_that_left_its_group_is_asked_for_replication(members):
    """A server that has left its group is asked for its replication."""
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
def test_lag_is_zero_when_caught_up_and_else_rounded_up(said, changes, lag):
    """A reader that has replayed all it received has no lag, and other lags are a second more than the server says."""
    if said is NEWER:
        changes = {name.replace("Slave", "Replica").replace("Master", "Source"): value for name, value in changes.items()}
    assert mysql.parse_replicas([{**said, **changes}]) == (lag, "")


@pytest.mark.parametrize(
    ("executed", "behind", "lag"),
    [(f"{UUID}:1-9,\n{OTHER}:1", 7, 0.0), (f"{UUID}:1-8", 0, 1.0), (f"{UUID}:1-8", 7, 8.0), ("", 0, 1.0)],
)
def test_what_a_reader_of_mysql_has_replayed_its_gtids_say(executed, behind, lag):
    """A MySQL reader's GTIDs decide on its lag, because its place in the log and its seconds are updated after its workers."""
    gtids = {"Auto_Position": 1, "Retrieved_Gtid_Set": f"{UUID}:5-9", "Executed_Gtid_Set": executed}
    assert mysql.parse_replicas([{**NEWER, "Exec_Source_Log_Pos": 8, "Seconds_Behind_Source": behind, **gtids}]) == (lag, "")
    assert mysql.parse_replicas([{**NEWER, "Seconds_Behind_Source": behind, **gtids}]) == (lag, "")


def test_a_reader_of_several_sources_is_as_late_as_the_latest():
    late = {**RUNS, "Exec_Master_Log_Pos": 8, "Seconds_Behind_Master": 4}
    unknown = {**RUNS, "Slave_IO_Running": "No", "Seconds_Behind_Master": None}
    assert mysql.parse_replicas([RUNS, late]) == (5.0, "")
    assert mysql.parse_replicas([RUNS, unknown]) == (None, "")


def test_a_stopped_replica_says_why_without_showing_data():
    """A reader that does not replay says why and shows nothing of the data."""
    lag, stopped = mysql.parse_replicas(
        [RUNS, {**RUNS, "Slave_SQL_Running": "No", "Last_SQL_Errno": 1062, "Last_SQL_Error": "s3cr3t"}]
    )
    assert lag is None
    assert stopped == "its SQL thread has stopped (error 1062; SHOW REPLICA STATUS there says more)"
    lag, stopped = mysql.parse_replicas([{**RUNS, "Slave_IO_Running": "No", "Last_IO_Errno": 1236, "Last_IO_Error": "s3cr3t"}])
    assert (lag, stopped) == (None, "its IO thread has stopped (error 1236; SHOW REPLICA STATUS there says more)")
    assert mysql.parse_replicas([]) == (None, "it replicates from nobody")


def test_a_function_is_a_read_if_it_is_one_in_every_schema():
    """A function counts as a read by its bare name if it declares to be one in every schema."""
    rows = [("Shop", "F", "READS SQL DATA"), ("crm", "f", "NO SQL"), ("shop", "g", "NO SQL"), ("crm", "g", "CONTAINS SQL"),
            ("shop", "h", "MODIFIES SQL DATA")]  # fmt: skip
    assert parse_functions(rows) == {"f", "shop.f", "crm.f", "shop.g"}


# -- errors -------------------------------------------------------------------------------------------------------


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
        (1615, "Prepared statement needs to be re-prepared", False, Failure.OUTDATED),
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
        (1062, "Duplicate entry", False, Failure.CONSTRAINT),
        (1451, "Cannot delete or update a parent row", False, Failure.CONSTRAINT),
        (1452, "Cannot add or update a child row", False, Failure.CONSTRAINT),
        (1048, "Column cannot be null", False, Failure.CONSTRAINT),
        (1364, "Field doesn't have a default value", False, Failure.CONSTRAINT),
        (1264, "Out of range value for column", False, Failure.CONSTRAINT),
        (1690, "BIGINT UNSIGNED value is out of range", False, Failure.CONSTRAINT),
        (1369, "CHECK OPTION failed", False, Failure.CONSTRAINT),
        (1644, "a trigger's own words", False, Failure.CONSTRAINT),
        (1064, "You have an error in your SQL syntax", False, Failure.OTHER),
        (None, "something else", False, Failure.OTHER),
    ],
)
def test_driver_errors_stand_for_the_failure_that_they_are(code, message, disconnected, kind):
    assert failure_of(pymysql.OperationalError(code, message), disconnected=disconnected) is kind
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


def test_some_errors_are_only_met_while_connecting():
    assert pymysql_driver.is_from_connecting(pymysql.OperationalError(2003, "Can't connect"))
    assert pymysql_driver.is_from_connecting(pymysql.OperationalError(1045, "Access denied"))
    assert not pymysql_driver.is_from_connecting(pymysql.OperationalError(2013, "Lost connection"))


@pytest.mark.parametrize(
    ("code", "message", "silence", "advice"),
    [
        (1045, "Access denied for user 'app'", "misconfigured", "check the user and the password"),
        (1698, "Access denied for user 'root'", "misconfigured", "check the user and the password"),
        (1049, "Unknown database 'shop'", "misconfigured", "check the database name"),
        (1044, "Access denied for user to database 'shop'", "misconfigured", "check the database name"),
        (1130, "Host '10.0.0.9' is not allowed to connect", "misconfigured", "allow this host"),
        (1184, "Aborted connection 11 (init_connect command failed)", "misconfigured", "correct init_connect on the server"),
        (1298, "Unknown or incorrect time zone: '...'", "misconfigured", "check init_command"),
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
def test_a_refused_probe_says_what_to_do_and_if_retry_helps(code, message, silence, advice):
    """The message of a refused probe says what to do, and its kind says whether trying again can help."""
    original = pymysql.OperationalError(*((code,) if code else ()), message)
    found = probe_error(original, pymysql_driver, mysql)
    assert found.silence is Silence(silence)
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
    assert mysql.sign(lambda *given: sent.append(given), UUID, pymysql_driver.database(Database(db)), False) == ""
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
        assert str(prepare(database, unit, pymysql_driver, mysql, Topology((unit.instance,)))) == "a read-only transaction"
    else:
        with pytest.raises(pymysql.OperationalError, match="refused"):
            prepare(database, unit, pymysql_driver, mysql, Topology((unit.instance,)))


def test_other_locked_tables_keep_the_row_out():
    assert mysql.is_locked_out(1100)
    assert not mysql.is_locked_out(1142)
    assert not postgresql.is_locked_out("25006")


def test_a_table_may_be_missing_and_so_may_the_database():
    assert mysql.is_missing_table(1146)
    assert mysql.is_missing_table(1046)
    assert not mysql.is_missing_table(1142)
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
    assert pymysql_driver.encrypted(query, {}) == encrypted
    options = create_engine("mysql+pymysql://h").dialect.create_connect_args(make_url("mysql+pymysql://h").set(query=encrypted))[
        1
    ]
    assert options.get("ssl") or options.get("ssl_disabled")


OK = b"\0\0\0"


def packet(number: int, payload: bytes) -> bytes:
    return len(payload).to_bytes(3, "little") + bytes([number]) + payload


class Peer(threading.Thread):
    """As much of a server as PyMySQL needs: it greets, and answers each command with OK, or with its text in `answers`.

    heard: the commands
    status: the status of the session in each OK
    silent: it does not even greet
    deaf: it reads no further command
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
        self.listener.shutdown(socket.SHUT_RDWR)  # wakes the thread
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


def connected(peer: Peer, connecting=lambda _: contextlib.nullcontext(), longest=None, **options):
    dialect = create_engine("mysql+pymysql://").dialect
    pymysql_driver.watch_connecting(dialect, connecting, longest)
    arguments, given = dialect.create_connect_args(make_url(f"mysql+pymysql://u@127.0.0.1:{peer.port}/d"))
    return dialect.connect(*arguments, **{**given, "ssl_disabled": True, **options})


def test_no_commit_or_rollback_is_sent_if_nothing_happened(peer: Peer) -> None:
    """Neither COMMIT nor ROLLBACK is sent if nothing has happened since the last one."""
    peer.answers["SELECT 1"] = rows(b"1")
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


def test_an_answer_longer_than_the_limit_ends_the_connection(peer: Peer) -> None:
    """The limit is for each answer alone."""
    peer.answers["SELECT 1"] = rows(b"1")
    peer.answers["SELECT many"] = rows(*[b"1"] * 240)
    connection = connected(peer, longest=1024)
    for _ in range(100):
        connection.query("SELECT 1")
    with pytest.raises(pymysql.OperationalError, match="no end"):
        connection.query("SELECT many")
    assert not connection.open


def test_a_setting_begins_no_transaction(peer: Peer) -> None:
    """After a SET nothing is sent to end a transaction, because the answer says whether one is open."""
    peer.answers["INSERT"] = packet(1, b"\0\1\0" + SERVER_STATUS.SERVER_STATUS_IN_TRANS.to_bytes(2, "little") + b"\0\0")
    connection = connected(peer)
    peer.heard.clear()
    for end in (connection.rollback, connection.commit):
        connection.query("SET NAMES utf8mb4")
        end()
        assert peer.heard == ["SET NAMES utf8mb4"]
        connection.query("INSERT")
        connection.query("SET NAMES utf8mb4")
        end()
        assert peer.heard[-1] == end.__name__.upper()
        peer.heard.clear()


def test_autocommit_ends_only_a_transaction_that_was_begun(peer: Peer) -> None:
    """In autocommit only a transaction that somebody has begun is ended."""
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


COLUMN = b"\x03def\0\0\0\x01n\x01n\x0c\x3f\0\x0b\0\0\0\x03\0\0\0\0\0"
END = b"\xfe\0\0\2\0"


def rows(*values: bytes) -> bytes:
    """A result of one column of numbers."""
    payloads = (b"\x01", COLUMN, END, *(bytes([len(value)]) + value for value in values), END)
    return b"".join(packet(number, payload) for number, payload in enumerate(payloads, 1))


def test_a_stream_that_is_closed_is_read_when_it_is_in_the_way(peer: Peer) -> None:
    """The rows of a closed stream are read, without a warning, only before the connection sends something else."""
    peer.answers["SELECT n"] = rows(b"1", b"2", b"3")
    connection = connected(peer, autocommit=True)
    stream = connection.cursor(pymysql.cursors.SSCursor)
    stream.execute("SELECT n")
    assert stream.fetchone() == (1,)
    assert pymysql_driver.blocks(connection)
    stream.close()
    stream.close()
    assert pymysql_driver.blocks(connection)
    connection.query("DO 0")
    assert not pymysql_driver.blocks(connection)
    assert peer.heard[-1] == "DO 0"


def test_a_stream_ends_in_an_error_when_its_connection_does(peer: Peer) -> None:
    """A stream of a closed connection ends in an error, and its close does not wait for the unread rows."""
    peer.answers["SELECT n"] = rows(b"1", b"2", b"3")
    connection = connected(peer)
    stream = connection.cursor(pymysql.cursors.SSCursor)
    stream.execute("SELECT n")
    assert stream.fetchone() == (1,)
    connection.close()
    with pytest.raises(pymysql.InterfaceError):
        stream.fetchone()
    stream.close()


def test_a_stream_that_was_read_to_its_end_is_in_nobodys_way(peer: Peer) -> None:
    """A stream that was read to its end leaves nothing behind, and neither does an ordinary result."""
    peer.answers["SELECT n"] = rows(b"1", b"2")
    connection = connected(peer, autocommit=True)
    stream = connection.cursor(pymysql.cursors.SSCursor)
    stream.execute("SELECT n")
    assert list(stream) == [(1,), (2,)]
    assert not pymysql_driver.blocks(connection)
    stream.close()
    plain = connection.cursor()
    plain.execute("SELECT n")
    assert plain.fetchall() == ((1,), (2,))
    assert not pymysql_driver.has_leftovers(connection)


def read_in_pieces(connection: Any) -> None:
    with connection.cursor(pymysql.cursors.SSCursor) as stream:
        stream.execute("SELECT secret")
        assert list(stream) == [(1,), (2,)]


def read_what_was_left(connection: Any) -> None:
    stream = connection.cursor(pymysql.cursors.SSCursor)
    stream.execute("SELECT secret")
    stream.close()
    connection.query("DO 0")


def read_several(connection: Any) -> None:
    with connection.cursor() as cursor:
        cursor.execute("CALL p()")
        while cursor.nextset():
            pass


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # from PyMySQL's half-made results
@pytest.mark.filterwarnings("ignore:Previous unbuffered result:UserWarning")
@pytest.mark.parametrize(
    "work",
    [
        lambda connection: connection.query("SELECT secret"),
        read_in_pieces,
        read_what_was_left,
        read_several,
        lambda connection: connection.ping(reconnect=False),
        lambda connection: connection.select_db("d"),
        lambda connection: connection.autocommit(not connection.autocommit),
        lambda connection: connection.show_warnings(),
        lambda connection: connection.set_character_set("utf8mb4"),
    ],
    ids=["rows", "stream", "stream that was left", "several", "ping", "database", "autocommit", "warnings", "names"],
)
def test_an_interrupted_answer_is_never_taken_for_another(peer: Peer, work: Callable[[Any], None]) -> None:
    """An exception between any two steps of a command leaves a connection that gives right answers, or none."""
    more = SERVER_STATUS.SERVER_MORE_RESULTS_EXISTS | SERVER_STATUS.SERVER_STATUS_AUTOCOMMIT
    peer.answers["SELECT secret"] = peer.answers["SHOW WARNINGS"] = rows(b"1", b"2")
    peer.answers["SELECT mine"] = rows(b"3")
    peer.answers["CALL p()"] = packet(1, OK + more.to_bytes(2, "little") + b"\0\0") + packet(2, OK + b"\2\0" + b"\0\0")
    connection = connected(peer, autocommit=True)
    outcomes = set()

    def interrupted() -> None:
        work(connection)

    interrupted()  # once without an interruption
    for _ in interrupted_at_each_line(interrupted, "pymysql/connections.py", "drivers/pymysql_classes.py", each="opcode"):
        spoilt = connection.unanswered
        try:
            connection.rollback()
            connection.query("SELECT mine")
        except pymysql.MySQLError:
            assert not connection.open
            connection = connected(peer, autocommit=True)
        else:
            assert not spoilt
            assert connection._result.rows == ((3,),)
        outcomes.add(spoilt)
    connection.close()
    assert outcomes == {False, True}


def test_a_transaction_that_was_not_ended_is_a_leftover(peer: Peer) -> None:
    """A transaction that was not ended is a leftover until a rollback, even if only a read has begun it."""
    peer.answers["SELECT n"] = rows(b"1")
    connection = connected(peer)
    connection.query("SELECT n")
    assert pymysql_driver.has_leftovers(connection)
    connection.rollback()
    assert not pymysql_driver.has_leftovers(connection)


def test_an_unanswered_connection_can_only_be_closed(peer: Peer) -> None:
    """Every use of a connection with an unread answer ends in the error of a closed connection."""
    peer.answers["SELECT n"] = rows(b"1", b"2")
    more = SERVER_STATUS.SERVER_MORE_RESULTS_EXISTS | SERVER_STATUS.SERVER_STATUS_AUTOCOMMIT
    peer.answers["CALL p()"] = packet(1, OK + more.to_bytes(2, "little") + b"\0\0") + packet(2, OK + b"\2\0" + b"\0\0")

    def interrupted(text: str, cursor: Any = None) -> tuple[Any, Any]:
        connection = connected(peer, autocommit=True)
        asked = connection.cursor(cursor)
        asked.execute(text)
        connection.unanswered = True
        return connection, asked

    connection, cursor = interrupted("CALL p()")
    with pytest.raises(pymysql.InterfaceError):
        cursor.nextset()
    assert not connection.open
    connection, stream = interrupted("SELECT n", pymysql.cursors.SSDictCursor)
    with pytest.raises(pymysql.InterfaceError):
        stream.fetchone()
    assert not connection.open
    for end in ("commit", "rollback"):
        connection, _ = interrupted("SELECT n")
        assert pymysql_driver.has_leftovers(connection)
        with pytest.raises(pymysql.InterfaceError):
            pymysql_driver.remove_leftovers(connection, asking())
        with pytest.raises(pymysql.InterfaceError):
            getattr(connection, end)()
        assert not connection.open
    connection.connect()
    connection.query("SELECT n")
    assert connection._result.rows == ((1,), (2,))
    connection.close()


def test_rows_that_cannot_be_read_spoil_their_connection(peer: Peer) -> None:
    """If a converter fails, the next statement does not get the rows that are left unread."""
    peer.answers["SELECT n"] = rows(b"x", b"2")
    connection = connected(peer, autocommit=True)
    with pytest.raises(ValueError, match="invalid literal"):
        connection.query("SELECT n")
    with pytest.raises(pymysql.InterfaceError):
        connection.query("DO 0")


@pytest.mark.parametrize("number", [1, 5])
def test_an_error_of_the_server_is_a_whole_answer(peer: Peer, number: int) -> None:
    """A connection goes on after an error, even after one amid the rows of a stream."""
    error = b"\xff" + (1317).to_bytes(2, "little") + b"#70100interrupted"
    peer.answers["SELECT n"] = b"".join(
        packet(n, payload) for n, payload in enumerate([b"\x01", COLUMN, END, b"\x011"][: number - 1], 1)
    ) + packet(number, error)
    connection = connected(peer, autocommit=True)
    stream = connection.cursor(pymysql.cursors.SSCursor)
    with pytest.raises(pymysql.OperationalError, match="interrupted"):  # noqa: PT012 - either may raise it
        stream.execute("SELECT n")
        stream.fetchall()
    connection.query("DO 0")
    peer.answers["COMMIT"] = packet(1, error)
    connection.query("START TRANSACTION")
    with pytest.raises(pymysql.OperationalError, match="interrupted"):
        connection.commit()
    connection.query("DO 0")


def test_a_stream_in_the_way_of_a_statement_is_warned_of(peer: Peer) -> None:
    """PyMySQL still warns of a stream that is in the way and not closed."""
    peer.answers["SELECT n"] = rows(b"1", b"2")
    connection = connected(peer, cursorclass=pymysql.cursors.SSCursor)
    stream = connection.cursor()
    stream.execute("SELECT n")
    with pytest.warns(UserWarning, match="left incomplete"):
        connection.query("DO 0")
    assert stream.fetchone() is None
    answer = packet(1, b"\xfe\0\0\2\0")  # neither OK nor an error
    peer.answers["COMMIT"] = answer
    with pytest.raises(pymysql.OperationalError):
        connection.commit()
    assert pymysql_driver.has_leftovers(connection)


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


def test_a_rollback_by_the_server_is_known_until_the_end(peer: Peer) -> None:
    """A transaction that the server has rolled back on its own is known as such until it is ended."""
    peer.answers["UPDATE"] = packet(1, b"\xff" + (1213).to_bytes(2, "little") + b"#40001Deadlock found")
    peer.answers["INSERT"] = packet(1, b"\xff" + (1062).to_bytes(2, "little") + b"#23000Duplicate entry")
    connection = connected(peer)
    with pytest.raises(pymysql.IntegrityError):
        connection.query("INSERT")
    assert not pymysql_driver.is_aborted(connection)
    for end in (connection.rollback, connection.commit):
        with pytest.raises(pymysql.OperationalError):
            connection.query("UPDATE")
        assert pymysql_driver.is_aborted(connection)
        with pytest.raises(pymysql.OperationalError, match="Deadlock"):
            pymysql_driver.refuse_aborted(connection)
        end()
        assert not pymysql_driver.is_aborted(connection)


@pytest.mark.parametrize(("answer", "aborted"), [("1", True), ("0", False), ("", False)])
def test_a_lock_wait_timeout_may_end_the_transaction(peer: Peer, answer: str, aborted: bool) -> None:
    """A lock wait timeout ends the transaction if the server's setting says so."""
    peer.answers["UPDATE"] = packet(1, b"\xff" + (1205).to_bytes(2, "little") + b"#HY000Lock wait timeout exceeded")
    column = b"\3def\0\0\0\1c\0\x0c\x3f\0" + b"\1\0\0\0" + b"\x08\0\0\0\0\0"
    rows = packet(1, b"\1"), packet(2, column), packet(3, b"\xfe\0\0\2\0"), packet(4, b"\1" + answer.encode())
    lost = packet(1, b"\xff" + (1053).to_bytes(2, "little") + b"#08S01Server shutdown in progress")
    peer.answers[pymysql_driver.ROLLS_BACK_ON_TIMEOUT] = b"".join((*rows, packet(5, b"\xfe\0\0\2\0"))) if answer else lost
    connection = connected(peer)
    with pytest.raises(pymysql.OperationalError, match="Lock wait timeout"):
        connection.query("UPDATE")
    assert pymysql_driver.is_aborted(connection) is aborted
    connection.rollback()
    assert not pymysql_driver.is_aborted(connection)


def warnings(*codes: int) -> bytes:
    """The answer to SHOW WARNINGS."""
    column = b"\3def\0\0\0\1c\0\x0c\x3f\0" + b"\1\0\0\0" + b"\xfd\0\0\0\0\0"
    payloads = [b"\3", *[column] * 3, b"\xfe\0\0\2\0", *(b"\1w" + b"\4%d" % code + b"\1m" for code in codes), b"\xfe\0\0\2\0"]
    return b"".join(packet(number, payload) for number, payload in enumerate(payloads, 1))


WARNED = packet(1, OK + b"\0\0" + b"\1\0")


@pytest.mark.parametrize(("codes", "stays"), [((1196,), True), ((1751, 1196), True), ((1751,), False), ((), False)])
def test_a_rollback_says_what_it_has_not_undone(peer: Peer, codes: tuple[int, ...], stays: bool) -> None:
    """A rollback's warnings are asked for only if it has any, and are reported once."""
    if codes:
        peer.answers["ROLLBACK"] = WARNED
        peer.answers["SHOW WARNINGS"] = warnings(*codes)
    connection = connected(peer)
    connection.query("INSERT")
    connection.query("START TRANSACTION")
    connection.rollback()
    assert ("SHOW WARNINGS" in peer.heard) is bool(codes)
    assert [pymysql_driver.was_not_undone(connection), pymysql_driver.was_not_undone(connection)] == [stays, False]
    assert not psycopg_driver.was_not_undone(connection)


def counted(number: int) -> bytes:
    """The answer to the question how many warnings there were."""
    column = b"\3def\0\0\0\1c\0\x0c\x3f\0" + b"\1\0\0\0" + b"\x08\0\0\0\0\0"
    payloads = [b"\1", column, b"\xfe\0\0\2\0", b"\1%d" % number, b"\xfe\0\0\2\0"]
    return b"".join(packet(number, payload) for number, payload in enumerate(payloads, 1))


@pytest.mark.parametrize(("codes", "count", "stays"), [((), 1, True), ((1751,), 2, True), ((1751,), 1, False)])
def test_a_rollback_whose_warnings_are_not_kept_undoes_nothing(
    peer: Peer, codes: tuple[int, ...], count: int, stays: bool
) -> None:
    """If the server has kept fewer warnings than it has counted (max_error_count), the rollback may have left something."""
    peer.answers["ROLLBACK"] = WARNED
    peer.answers["SHOW WARNINGS"] = warnings(*codes)
    peer.answers["SHOW COUNT(*) WARNINGS"] = counted(count)
    connection = connected(peer)
    connection.query("START TRANSACTION")
    connection.rollback()
    assert peer.heard[-2:] == ["SHOW WARNINGS", "SHOW COUNT(*) WARNINGS"]
    assert pymysql_driver.was_not_undone(connection) is stays


def test_a_deadlock_that_leaves_no_warning_undoes_nothing(peer: Peer) -> None:
    """An error that rolls back is a warning itself, so without any the server keeps none."""
    peer.answers["UPDATE"] = packet(1, b"\xff" + (1213).to_bytes(2, "little") + b"#40001Deadlock found")
    peer.answers["SHOW WARNINGS"] = warnings()
    peer.answers["SHOW COUNT(*) WARNINGS"] = counted(2)
    connection = connected(peer)
    with pytest.raises(pymysql.OperationalError):
        connection.query("UPDATE")
    connection.rollback()
    assert pymysql_driver.was_not_undone(connection)


def test_a_rollback_of_the_servers_says_what_it_has_left(peer: Peer) -> None:
    """A rollback by the server has the warnings of its victim, which are asked for before another statement is sent."""
    peer.answers["UPDATE"] = packet(1, b"\xff" + (1213).to_bytes(2, "little") + b"#40001Deadlock found")
    peer.answers["SHOW WARNINGS"] = warnings(1213, 1196)
    connection = connected(peer)
    with pytest.raises(pymysql.OperationalError):
        connection.query("UPDATE")
    connection.query("INSERT")
    connection.rollback()
    assert peer.heard[-4:] == ["UPDATE", "SHOW WARNINGS", "INSERT", "ROLLBACK"]
    assert pymysql_driver.was_not_undone(connection)


def test_a_refused_commit_says_what_it_has_left(peer: Peer) -> None:
    """A refused COMMIT is a rollback that says what it has left, and a later transaction that commits is not affected."""
    refused = packet(1, b"\xff" + (1290).to_bytes(2, "little") + b"#HY000The server is running with the --read-only option")
    peer.answers["SHOW WARNINGS"] = warnings(1290, 1196)
    connection = connected(peer)
    for asked in (True, False):
        peer.answers["COMMIT"] = refused
        connection.query("START TRANSACTION")
        with pytest.raises(pymysql.OperationalError):
            connection.commit()
        if asked:
            assert peer.heard[-2:] == ["COMMIT", "SHOW WARNINGS"]
            assert pymysql_driver.was_not_undone(connection)
        del peer.answers["COMMIT"]
        connection.commit()
        assert not pymysql_driver.was_not_undone(connection)


def test_a_rollback_in_a_later_statement_of_a_text_is_known(peer: Peer) -> None:
    """A rollback in a later statement of a text is known, although SQLAlchemy only logs its error."""
    more = SERVER_STATUS.SERVER_MORE_RESULTS_EXISTS.to_bytes(2, "little")
    deadlock = packet(2, b"\xff" + (1213).to_bytes(2, "little") + b"#40001Deadlock found")
    peer.answers["UPDATE a; UPDATE b"] = packet(1, OK + more + b"\0\0") + deadlock
    connection = connected(peer)
    cursor = connection.cursor()
    cursor.execute("UPDATE a; UPDATE b")
    assert not pymysql_driver.is_aborted(connection)
    with pytest.raises(pymysql.OperationalError, match="Deadlock"):
        cursor.close()
    assert pymysql_driver.is_aborted(connection)


def test_a_missing_package_for_the_login_is_a_driver_error(peer: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing package for the authentication method is an ordinary error of the driver."""

    def lacks_a_package(connection: object) -> None:
        raise RuntimeError("'cryptography' package is required for sha256_password or caching_sha2_password auth methods")

    monkeypatch.setattr(pymysql.connections.Connection, "_request_authentication", lacks_a_package)
    with pytest.raises(pymysql.OperationalError, match="package is required") as caught:
        connected(peer)
    assert pymysql_driver.is_from_connecting(caught.value)
    assert caught.value.__cause__ is None


def test_autocommit_can_be_set_and_asked_for(peer: Peer) -> None:
    connection = connected(peer)
    assert not connection.autocommit
    assert not pymysql_driver.autocommit(connection)
    connection.autocommit(True)
    assert connection.autocommit
    assert pymysql_driver.autocommit(connection)


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
    lasts = pymysql_driver.set_mode(connection, mode, usual, guarded=False)
    assert peer.heard == sent
    assert lasts is (mode is not Mode.READ_ONLY)
    if mode is not Mode.READ_ONLY:
        pymysql_driver.set_mode(connection, mode, usual, guarded=False)
        assert peer.heard == sent


def test_a_connection_that_a_listener_has_used_is_seen(peer: Peer) -> None:
    """A transaction that a listener has left open shows in the server's last answer, and is committed."""
    connection = connected(peer, autocommit=True)
    pymysql_driver.prepare(connection, False, (), lambda: False)
    assert pymysql_driver.is_settled(connection, alone=True)
    assert not pymysql_driver.is_settled(connection, alone=False)
    pymysql_driver.end_transaction(connection)
    assert "COMMIT" not in peer.heard
    connection.query("START TRANSACTION")
    assert not pymysql_driver.is_settled(connection, alone=True)
    pymysql_driver.end_transaction(connection)
    assert peer.heard[-1] == "COMMIT"
    assert pymysql_driver.is_guarded(connection, False)
    assert not pymysql_driver.is_guarded(connection, True), "who has had the driver's connection may have taken the guard off"
    pymysql_driver.prepare(connection, False, (), lambda: True)
    assert not pymysql_driver.is_guarded(connection, False), "and so may a listener"
    assert not pymysql_driver.is_settled(connection, alone=True)


def test_a_guarded_connection_knows_who_has_set_something(peer: Peer) -> None:
    """A SET by SQLAlchemy has passed the gate, but a SET by anybody else may have taken the guard off."""
    connection = connected(peer, autocommit=True)
    pymysql_driver.prepare(connection, False, (), lambda: False)
    for touch in (connection.query, connection.cursor().execute):
        pymysql_driver.note_guard(connection, True)
        DefaultDialect().do_execute(connection.cursor(), "SET @a = 1", ())
        assert pymysql_driver.is_guarded(connection, False)
        assert not pymysql_driver.is_guarded(connection, True)
        assert not pymysql_driver.has_lost_guard(connection)
        touch("SET @b = 1")
        DefaultDialect().do_execute(connection.cursor(), "SET @a = 1", ())
        assert not pymysql_driver.is_guarded(connection, False)
        assert pymysql_driver.has_lost_guard(connection)
    connection.query("START TRANSACTION READ ONLY")
    assert not pymysql_driver.has_lost_guard(connection), "until that has ended"
    connection.rollback()
    assert pymysql_driver.has_lost_guard(connection)
    pymysql_driver.note_guard(connection, False)
    assert not pymysql_driver.has_lost_guard(connection)


def test_a_connection_of_pymysqls_own_does_not_know(peer: Peer) -> None:
    """A connection that a tracer has made cannot tell, so its guard is believed while nobody has had it."""
    connection = pymysql.connect(host="127.0.0.1", port=peer.port, user="u", autocommit=True, ssl_disabled=True)
    pymysql_driver.prepare(connection, False, (), lambda: False)
    pymysql_driver.note_guard(connection, True)
    connection.query("SET @a = 1")
    assert pymysql_driver.is_guarded(connection, False)
    assert not pymysql_driver.has_lost_guard(connection)
    pymysql_driver.prepare(connection, False, (), lambda: True)
    assert not pymysql_driver.is_guarded(connection, False)


def test_a_guarded_connection_begins_read_only_by_itself(peer: Peer) -> None:
    """On a guarded connection without autocommit a read-only transaction begins by itself."""
    connection = connected(peer)
    peer.heard.clear()
    assert pymysql_driver.set_mode(connection, Mode.READ_ONLY, False, guarded=True), "and lasts"
    assert peer.heard == []
    pymysql_driver.set_mode(connection, Mode.AUTOCOMMIT, False, guarded=True)
    pymysql_driver.set_mode(connection, Mode.READ_ONLY, False, guarded=True)
    assert peer.heard == ["SET AUTOCOMMIT = 1", "START TRANSACTION READ ONLY"]


def test_a_connection_has_a_socket_until_it_is_closed(peer: Peer) -> None:
    connection = connected(peer)
    pymysql_driver.prepare(connection, False, (), lambda: False)
    assert os.fstat(pymysql_driver.fileno(connection))
    assert not pymysql_driver.is_closed(connection)
    connection.close()
    assert pymysql_driver.is_closed(connection)


def test_a_question_needs_no_switch_and_no_statement(peer: Peer) -> None:
    """Around a question nothing is switched, and the number of the server's thread is known without one."""
    connection = connected(peer)
    peer.heard.clear()
    with pymysql_driver.alone(connection):
        assert not pymysql_driver.autocommit(connection)
        assert pymysql_driver.process_id(connection) == connection.server_thread_id[0]
    assert peer.heard == []


def test_connections_that_verify_nothing_share_a_tls_context(peer: Peer) -> None:
    """Connections that verify no certificate share their TLS context."""
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
    assert set(numbers) == {pymysql_driver.fileno(connection)}
    assert connection.host_info == f"socket 127.0.0.1:{peer.port}"


def test_connecting_ends_at_shutdown_of_the_socket_or_timeout() -> None:
    """The wait for a connection ends when its socket is shut down and when it takes too long."""
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


def test_once_connected_only_the_users_timeout_counts(peer: Peer) -> None:
    """Once connected, a connection waits for as long as its user says."""
    assert connected(peer, connect_timeout=1)._read_timeout is None
    assert connected(peer, connect_timeout=1, read_timeout=7)._read_timeout == 7


@pytest.mark.parametrize(
    ("statement", "options"),
    [("SELECT 1", {"read_timeout": 0.1}), ("SELECT 1" + " " * 2**24, {"write_timeout": 0.1, "max_allowed_packet": 2**25})],
    ids=["read", "write"],
)
def test_a_timeout_of_pymysql_is_no_lost_connection(statement, options) -> None:
    """A timeout of PyMySQL is distinguished from a lost connection."""
    peer = Peer()
    connection = connected(peer, **options)
    peer.deaf = True
    with pytest.raises(pymysql.OperationalError) as caught:
        connection.query(statement)
    assert failure_of(caught.value, disconnected=True) is Failure.TIMED_OUT
    peer.close()


@pytest.mark.parametrize("options", [{"host": "nowhere.invalid"}, {}, {"bind_address": "127.0.0.1"}], ids=str)
def test_unreachable_hosts_get_the_error_of_pymysql(options: dict[str, str]) -> None:
    """A name that does not resolve and a port where nobody listens give the error that PyMySQL gives."""
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        place = types.SimpleNamespace(port=nobody.getsockname()[1])
        with pytest.raises(pymysql.OperationalError, match="2003, \"Can't connect to MySQL server on"):
            connected(place, **options)


@pytest.mark.parametrize("when", [1, 2], ids=["before it is connected", "when it is connected"])
@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_a_rejected_connection_leaves_no_socket_behind(peer: Peer, when: int) -> None:
    """A connection that is rejected while it connects leaves no open socket behind."""
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
    assert pymysql_driver.fileno(connection) == sock.fileno()
    connection.close()


def test_an_unknown_socket_option_is_not_set(peer: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A socket option that the system does not have is not set."""
    monkeypatch.setitem(pymysql_driver.KEEPALIVE, "TCP_OF_ANOTHER_SYSTEM", 1)
    connected(peer).close()


def test_a_replaced_connect_function_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A connect function that replaces the driver's is left alone."""
    dialect = create_engine("mysql+pymysql://").dialect
    monkeypatch.setattr(dialect, "dbapi", types.SimpleNamespace(connect=lambda: "traced"))
    pymysql_driver.watch_connecting(dialect, contextlib.nullcontext)
    assert dialect.connect() == "traced"


def test_what_a_backslash_means_is_asked_of_the_connection():
    """Only the server knows the session's sql_mode, unless the status that it last reported settles the question."""
    plain, without = (types.SimpleNamespace(server_status=status) for status in (2, 2 | 512))
    assert pymysql_driver.literal_mode(plain) is None
    assert pymysql_driver.literal_mode(without) == "NO_BACKSLASH_ESCAPES"


def test_the_dialect_is_that_of_the_server_that_answers():
    """The dialect is that of the server that answers, because a URL that says mysql may lead to MariaDB."""
    assert mysql.dialect(ServerId("mariadb-0", "1", 3306, "")) == "mariadb"
    assert mysql.dialect(ServerId("mysql", "uuid", 3306, "")) == "mysql"


def test_the_transactions_that_end_are_counted(peer: Peer) -> None:
    """Each end of a transaction except by rollback() is counted, also that of a statement that commits by itself."""
    connection = connected(peer)
    connection.autocommit(False)
    connection.query("START TRANSACTION")
    connection.query("COMMIT")
    ends = pymysql_driver.count_ends(connection)
    assert ends() == 0, "nobody wanted to know of those before"
    connection.query("START TRANSACTION")
    connection.query("INSERT")
    assert ends() == 0
    connection.query("COMMIT")
    assert ends() == 1
    connection.query("START TRANSACTION")
    connection.commit()
    assert ends() == 2
    connection.query("START TRANSACTION")
    connection.rollback()
    assert (ends(), pymysql_driver.count_ends(connection)()) == (2, 2)
    connection.query("CREATE TABLE")
    assert ends() == 3


def test_where_nobody_counts_there_is_always_one_more() -> None:
    """On a connection that counts no ends, each question finds one more end."""
    ends = pymysql_driver.count_ends(types.SimpleNamespace())
    assert ends() != ends()


def test_no_rollback_is_known_to_do_nothing() -> None:
    """No connection of PyMySQL is known to be idle, so a rollback is never left out."""
    assert not pymysql_driver.is_idle(object())
