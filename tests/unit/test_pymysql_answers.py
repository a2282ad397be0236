"""What PyMySQL's connection knows from the answers of its server: transactions, streams, rollbacks."""

from collections.abc import Callable
from typing import Any

import pymysql
import pytest
from pymysql.constants import SERVER_STATUS

from aurora_router.drivers import psycopg as psycopg_driver
from aurora_router.drivers import pymysql as pymysql_driver
from aurora_router.drivers.base import Mode
from aurora_router.servers import mysql
from tests.interruptions import interrupted_at_each_line
from tests.unit.mysql_peer import COLUMN, END, OK, Peer, connected, packet, prepared, rows


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
        lambda connection: connection.autocommit(not connection.get_autocommit()),
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
            pymysql_driver.remove_leftovers(connection, pytest.fail)
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
    connection = prepared(peer)
    with pytest.raises(pymysql.IntegrityError):
        connection.query("INSERT")
    assert not pymysql_driver.is_aborted(connection)
    for end in (connection.rollback, connection.commit):
        with pytest.raises(pymysql.OperationalError):
            connection.query("UPDATE")
        assert pymysql_driver.is_aborted(connection)
        with pytest.raises(pymysql.OperationalError, match="Deadlock"):
            pymysql_driver.raise_if_aborted(connection)
        end()
        assert not pymysql_driver.is_aborted(connection)


@pytest.mark.parametrize(("answer", "aborted"), [("1", True), ("0", False), ("", False)])
def test_a_lock_wait_timeout_may_end_the_transaction(peer: Peer, answer: str, aborted: bool) -> None:
    """A lock wait timeout ends the transaction if the server's setting says so."""
    peer.answers["UPDATE"] = packet(1, b"\xff" + (1205).to_bytes(2, "little") + b"#HY000Lock wait timeout exceeded")
    column = b"\3def\0\0\0\1c\0\x0c\x3f\0" + b"\1\0\0\0" + b"\x08\0\0\0\0\0"
    rows = packet(1, b"\1"), packet(2, column), packet(3, b"\xfe\0\0\2\0"), packet(4, b"\1" + answer.encode())
    lost = packet(1, b"\xff" + (1053).to_bytes(2, "little") + b"#08S01Server shutdown in progress")
    peer.answers["SELECT @@global.innodb_rollback_on_timeout"] = b"".join((*rows, packet(5, b"\xfe\0\0\2\0"))) if answer else lost
    connection = prepared(peer)
    with pytest.raises(pymysql.OperationalError, match="Lock wait timeout"):
        connection.query("UPDATE")
    assert pymysql_driver.is_aborted(connection) is aborted
    connection.rollback()
    assert not pymysql_driver.is_aborted(connection)


def test_a_connection_without_a_server_family_notes_nothing(peer: Peer) -> None:
    """Until the server of a new connection is known, nobody can say what its errors and warnings mean."""
    peer.answers["UPDATE"] = packet(1, b"\xff" + (1213).to_bytes(2, "little") + b"#40001Deadlock found")
    peer.answers["ROLLBACK"] = WARNED
    connection = connected(peer)
    with pytest.raises(pymysql.OperationalError):
        connection.query("UPDATE")
    connection.rollback()
    assert not pymysql_driver.is_aborted(connection)
    assert not pymysql_driver.was_not_undone(connection)
    assert peer.heard[-2:] == ["UPDATE", "ROLLBACK"]


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
    connection = prepared(peer)
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
    connection = prepared(peer)
    connection.query("START TRANSACTION")
    connection.rollback()
    assert peer.heard[-2:] == ["SHOW WARNINGS", "SHOW COUNT(*) WARNINGS"]
    assert pymysql_driver.was_not_undone(connection) is stays


def test_a_deadlock_that_leaves_no_warning_undoes_nothing(peer: Peer) -> None:
    """An error that rolls back is a warning itself, so without any the server keeps none."""
    peer.answers["UPDATE"] = packet(1, b"\xff" + (1213).to_bytes(2, "little") + b"#40001Deadlock found")
    peer.answers["SHOW WARNINGS"] = warnings()
    peer.answers["SHOW COUNT(*) WARNINGS"] = counted(2)
    connection = prepared(peer)
    with pytest.raises(pymysql.OperationalError):
        connection.query("UPDATE")
    connection.rollback()
    assert pymysql_driver.was_not_undone(connection)


def test_a_rollback_of_the_servers_says_what_it_has_left(peer: Peer) -> None:
    """A rollback by the server has the warnings of its victim, which are asked for before another statement is sent."""
    peer.answers["UPDATE"] = packet(1, b"\xff" + (1213).to_bytes(2, "little") + b"#40001Deadlock found")
    peer.answers["SHOW WARNINGS"] = warnings(1213, 1196)
    connection = prepared(peer)
    with pytest.raises(pymysql.OperationalError):
        connection.query("UPDATE")
    connection.query("INSERT")
    connection.rollback()
    assert peer.heard[-4:] == ["UPDATE", "SHOW WARNINGS", "INSERT", "ROLLBACK"]
    assert pymysql_driver.was_not_undone(connection)


def test_a_refused_commit_says_what_it_has_left(peer: Peer) -> None:
    """A refused COMMIT is a rollback. It says what it has left, and does not affect a later transaction."""
    refused = packet(1, b"\xff" + (1290).to_bytes(2, "little") + b"#HY000The server is running with the --read-only option")
    peer.answers["SHOW WARNINGS"] = warnings(1290, 1196)
    connection = prepared(peer)
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
    connection = prepared(peer)
    cursor = connection.cursor()
    cursor.execute("UPDATE a; UPDATE b")
    assert not pymysql_driver.is_aborted(connection)
    with pytest.raises(pymysql.OperationalError, match="Deadlock"):
        cursor.close()
    assert pymysql_driver.is_aborted(connection)


def test_a_shared_connection_begins_each_read_only_transaction(peer: Peer) -> None:
    """Behind a pooler each transaction of a read-only connection is begun as read-only, until the connection is switched."""
    peer.answers["SELECT 1"] = rows(b"1")
    connection = connected(peer)
    pymysql_driver.prepare_connection(connection, True, (), lambda: False, mysql)
    connection.autocommit(False)
    peer.heard.clear()
    assert not pymysql_driver.set_mode(connection, Mode.READ_ONLY, False, False)
    for end in ("rollback", "commit"):
        connection.query("SELECT 1")
        connection.query("SELECT 1")
        getattr(connection, end)()
        connection.ping()
        assert peer.heard == ["START TRANSACTION READ ONLY", "SELECT 1", "SELECT 1", end.upper()]
        peer.heard.clear()
    pymysql_driver.set_mode(connection, Mode.DEFAULT, False, False)
    connection.query("SELECT 1")
    assert peer.heard == ["SELECT 1"]


def test_a_connection_of_pymysqls_class_is_switched_once(peer: Peer) -> None:
    """A connection that something else has made has only its first transaction begun as read-only."""
    with pymysql.connect(host="127.0.0.1", port=peer.port, user="u", ssl_disabled=True) as connection:
        pymysql_driver.prepare_connection(connection, True, (), lambda: False, mysql)
        peer.heard.clear()
        assert not pymysql_driver.set_mode(connection, Mode.READ_ONLY, False, False)
        connection.rollback()
        assert peer.heard == ["START TRANSACTION READ ONLY", "ROLLBACK"]
