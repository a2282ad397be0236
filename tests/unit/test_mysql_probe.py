"""What a server of MySQL or MariaDB says of itself when it is probed."""

from collections.abc import Callable
from decimal import Decimal

import pytest

from aurora_router.core.gtid import GtidSet, MariadbGtid
from aurora_router.core.instance import Role, ServerId, ServerStatus
from aurora_router.servers import UnsupportedServer, mysql
from aurora_router.servers.mysql import parse_functions, parse_identity, parse_version
from aurora_router.servers.mysql_replication import parse_replicas
from tests.unit.tables import table

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


LEVELS = "REPEATABLE-READ", "REPEATABLE-READ"


def mariadb(*, read_only=0, logged="0-1-7", replayed="", state="0-1-7", logs=1, version="10.11.6-MariaDB",
            level="REPEATABLE-READ", of_session="REPEATABLE-READ", channels=()):  # fmt: skip
    return asking(
        ("gtid_slave_pos", (version, 1, 0, 3, STARTED, 3306, read_only, 0, logged, replayed, state, logs, level, of_session)),
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
        ("gtid_executed", (version, 0, group, UUID, STARTED, 3306, read_only, 0, executed, mode, opened, *LEVELS)),
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


@table("mysql_versions")
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
    with pytest.raises(UnsupportedServer, match=said):
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
    assert mysql.identify(ask, 7, None) == (identity, Role.WRITER, False)
    ask = asking(("gtid_domain_id", (*MARIADB, 0, 3, STARTED, 3306, 1, 0)), ("SET SESSION TRANSACTION READ ONLY", []))
    assert mysql.identify(ask, 7, None) == (identity, Role.READER, False)


# -- MariaDB ------------------------------------------------------------------------------------------------------


def test_a_mariadb_writers_position_comes_from_its_log():
    """The position of a MariaDB writer is the end of its log, in the epoch that its first transaction began."""
    found = mysql.probe(mariadb(logged="0-3-12", state="0-1-10,0-3-12"), asynchronous_commits=False)
    identity = ServerId("mariadb-0", "3", 3306, f"{STARTED}/3")
    assert found == ServerStatus(identity, Role.WRITER, 11, MariadbGtid(11, ((0, 3, 12),)), None, "repeatable read")


def test_a_foreign_server_id_takes_no_mariadb_writer_back():
    """A writer's position goes on with a transaction that was written with another server's id."""
    found = mysql.probe(mariadb(logged="0-77-13", replayed="0-1-10", state="0-1-10,0-3-12,0-77-13"), asynchronous_commits=False)
    assert (found.epoch, found.position) == (13, MariadbGtid(13, ((0, 77, 13),)))
    assert (found.position.origin, found.position.writer_starts) == (3, ((0, 12),))


def test_a_promoted_mariadb_server_has_what_it_has_replayed():
    """A promoted server has what it has replayed, even if it has not logged that."""
    found = mysql.probe(mariadb(logged="0-3-2", replayed="0-1-9,4-1-1", state="0-3-2"), asynchronous_commits=False)
    assert found.position == MariadbGtid(1, ((0, 1, 9), (4, 1, 1)))


def test_a_mariadb_readers_epoch_counts_only_for_its_position():
    """A MariaDB reader's position is what it has replayed, and its epoch counts only for that position."""
    ask = mariadb(read_only=1, logged="0-3-13", replayed="0-2-12", state="0-1-10,0-2-12", channels=[RUNS])
    found = mysql.probe(ask, asynchronous_commits=False)
    assert (found.role, found.epoch, found.position) == (Role.READER, 0, MariadbGtid(11, ((0, 2, 12),)))
    assert (found.lag, found.replication_error) == (0.0, "")


@pytest.mark.parametrize(("running", "own"), [("Yes", False), ("No", True)])
def test_a_writable_replica_is_not_taken_for_a_promoted_one(running, own):
    """A server that accepts writes while it replicates is not taken for a promoted one."""
    found = mysql.probe(mariadb(channels=[{**RUNS, "Slave_SQL_Running": running}]), asynchronous_commits=False)
    assert (found.role, found.position.origin) == (Role.WRITER, 3 if own else -1)
    found = mysql.probe(oracle(channels=[{**NEWER, "Replica_SQL_Running": running}]), asynchronous_commits=False)
    assert (found.role, found.position.origin) == (Role.WRITER, UUID if own else "")


def test_a_readers_own_transaction_deposes_no_writer():
    """A reader's own transaction deposes no writer."""
    ask = mariadb(read_only=1, logged="", replayed="0-1-52", state="0-1-52,0-3-51", channels=[RUNS])
    assert mysql.probe(ask, asynchronous_commits=False).epoch == 0


def test_a_writer_without_a_binary_log_has_no_position():
    assert mysql.probe(mariadb(logs=0, state=None), asynchronous_commits=False).position is None


@table("mysql_filters")
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
    assert found.position == GtidSet.from_server(1, f"{UUID}:1-5")
    assert (found.role, found.epoch, found.position.origin, found.isolation) == (Role.WRITER, 1, UUID, "repeatable read")


def test_a_mysql_server_says_when_it_became_writable():
    """A MySQL server says when it became writable."""
    for opened, said in ((None, 0.0), (Decimal("1795703689.289830"), 1795703689.28983)):
        assert mysql.probe(oracle(opened=opened), asynchronous_commits=False).position.writable_since == said


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
    assert (found.role, found.lag, found.replication_error) == (Role.READER, 0.0, "")


@table("mysql_group_members")
def test_a_group_member_needs_to_be_online_in_a_majority(read_only, members, role, error):
    """A member of a group is used while it is online and most of its group can be reached."""
    named = [({"self": UUID, "other": OTHER}[who], state) for who, state in members]
    found = mysql.probe(oracle(read_only=read_only, group=GROUP, members=named), asynchronous_commits=False)
    assert (found.role, found.replication_error) == (Role(role), error)
    assert found.position.origin == GROUP


def test_a_group_with_several_writers_is_unsuitable():
    """A group with several writers is unsuitable, and the error says what to do."""
    members = [(UUID, "ONLINE", "PRIMARY"), (OTHER, "ONLINE", "PRIMARY")]
    with pytest.raises(
        UnsupportedServer, match="has several writers, and may have one only: group_replication_switch_to_single_primary"
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
    assert member.position.supersedes(left.position)
    assert not left.position.supersedes(member.position)


def test_a_writer_without_its_groups_majority_is_unsuitable():
    """Without its group a writer can commit nothing, so it is unsuitable."""
    with pytest.raises(UnsupportedServer, match="accepts writes, but most of its group cannot be reached"):
        mysql.probe(oracle(group=GROUP, members=[(UUID, "ONLINE"), (OTHER, "UNREACHABLE")]), asynchronous_commits=False)


def test_a_reader_on_shared_storage_needs_no_replication():
    """A reader that shares the writer's storage replicates from nobody and is used."""
    ask = asking(
        ("gtid_executed", ("8.0.28", 0, None, UUID, STARTED, 3306, 0, 1, "", "OFF_PERMISSIVE", None, *LEVELS)),
        ("SHOW REPLICA STATUS", []),
    )
    found = mysql.probe(ask, asynchronous_commits=False)
    assert (found.role, found.position, found.lag, found.replication_error) == (Role.READER, None, None, "")


@pytest.mark.parametrize("members", [[("", "OFFLINE")], []])
def test_a_server_that_left_its_group_is_asked_for_replication(members):
    """A server that has left its group is asked for its replication."""
    ask = oracle(read_only=1, group=GROUP, members=members, channels=[{**NEWER, "Replica_SQL_Running": "No"}])
    assert "SQL thread" in mysql.probe(ask, asynchronous_commits=False).replication_error


# -- replication --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("said", [RUNS, NEWER], ids=["Slave", "Replica"])
@table("mysql_lags")
def test_lag_is_zero_when_caught_up_and_else_rounded_up(said, changes, lag):
    """A reader that has replayed all it received has no lag, and other lags are a second more than the server says."""
    if said is NEWER:
        changes = {name.replace("Slave", "Replica").replace("Master", "Source"): value for name, value in changes.items()}
    assert parse_replicas([{**said, **changes}]) == (lag, "")


@pytest.mark.parametrize(
    ("executed", "behind", "lag"),
    [(f"{UUID}:1-9,\n{OTHER}:1", 7, 0.0), (f"{UUID}:1-8", 0, 1.0), (f"{UUID}:1-8", 7, 8.0), ("", 0, 1.0)],
)
def test_what_a_reader_of_mysql_has_replayed_its_gtids_say(executed, behind, lag):
    """A MySQL reader's GTIDs decide on its lag, because its place in the log and its seconds are updated after its workers."""
    gtids = {"Auto_Position": 1, "Retrieved_Gtid_Set": f"{UUID}:5-9", "Executed_Gtid_Set": executed}
    assert parse_replicas([{**NEWER, "Exec_Source_Log_Pos": 8, "Seconds_Behind_Source": behind, **gtids}]) == (lag, "")
    assert parse_replicas([{**NEWER, "Seconds_Behind_Source": behind, **gtids}]) == (lag, "")


def test_a_reader_of_several_sources_is_as_late_as_the_latest():
    late = {**RUNS, "Exec_Master_Log_Pos": 8, "Seconds_Behind_Master": 4}
    unknown = {**RUNS, "Slave_IO_Running": "No", "Seconds_Behind_Master": None}
    assert parse_replicas([RUNS, late]) == (5.0, "")
    assert parse_replicas([RUNS, unknown]) == (None, "")


def test_a_stopped_replica_says_why_without_showing_data():
    """A reader that does not replay says why and shows nothing of the data."""
    lag, stopped = parse_replicas([RUNS, {**RUNS, "Slave_SQL_Running": "No", "Last_SQL_Errno": 1062, "Last_SQL_Error": "s3cr3t"}])
    assert lag is None
    assert stopped == "its SQL thread has stopped (error 1062; SHOW REPLICA STATUS there says more)"
    lag, stopped = parse_replicas([{**RUNS, "Slave_IO_Running": "No", "Last_IO_Errno": 1236, "Last_IO_Error": "s3cr3t"}])
    assert (lag, stopped) == (None, "its IO thread has stopped (error 1236; SHOW REPLICA STATUS there says more)")
    assert parse_replicas([]) == (None, "it replicates from nobody")


def test_a_function_is_a_read_if_it_is_one_in_every_schema():
    """A function counts as a read by its bare name if it declares to be one in every schema."""
    rows = [("Shop", "F", "READS SQL DATA"), ("crm", "f", "NO SQL"), ("shop", "g", "NO SQL"), ("crm", "g", "CONTAINS SQL"),
            ("shop", "h", "MODIFIES SQL DATA")]  # fmt: skip
    assert parse_functions(rows) == {"f", "shop.f", "crm.f", "shop.g"}


@pytest.mark.parametrize(
    ("of_server", "of_session", "level"),
    [
        ("REPEATABLE-READ", "SERIALIZABLE", "serializable"),  # by init_command
        ("SERIALIZABLE", "READ-COMMITTED", "read committed"),
        ("SERIALIZABLE", "REPEATABLE-READ", "serializable"),  # changed since the probe has connected
        ("READ-COMMITTED", "READ-COMMITTED", "read committed"),
    ],
)
def test_the_level_is_that_of_a_session_of_the_application(of_server, of_session, level):
    """A level that init_command sets is seen, and so is a change of the server's own default."""
    assert mysql.probe(mariadb(level=of_server, of_session=of_session), asynchronous_commits=False).isolation == level


@pytest.mark.parametrize(
    ("ask", "source"),
    [
        (mariadb(read_only=1, channels=[{**RUNS, "Master_Server_Id": 7}]), "7"),
        (oracle(read_only=1, channels=[{**NEWER, "Source_UUID": OTHER, "Source_Server_Id": 7}]), OTHER),
        (mariadb(read_only=1, channels=[{**RUNS, "Master_Server_Id": 0}]), None),  # not connected yet
    ],
)
def test_a_reader_tells_from_whom_it_replicates(ask, source):
    """The source is named as in its own identity."""
    assert mysql.probe(ask, asynchronous_commits=False).sources == (frozenset() if source is None else frozenset({source}))
