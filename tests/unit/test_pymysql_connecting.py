"""How PyMySQL's connection is made, switched to a mode, and watched."""

import contextlib
import os
import socket
import ssl
import types
from collections.abc import Iterator

import pymysql
import pytest
from sqlalchemy import create_engine, make_url
from sqlalchemy.engine.default import DefaultDialect

from aurora_router.cluster.error_classification import failure_of
from aurora_router.core.failures import Failure
from aurora_router.core.instance import ServerId
from aurora_router.drivers import Mode
from aurora_router.drivers import pymysql as pymysql_driver
from aurora_router.errors import WrongServer
from aurora_router.servers import mysql
from tests.unit.mysql_peer import Peer, connected

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
    assert not pymysql_driver.autocommit(connection)
    connection.autocommit(True)
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
    pymysql_driver.prepare_connection(connection, False, (), lambda: False, mysql)
    peer.heard.clear()
    lasts = pymysql_driver.set_mode(connection, mode, usual, default_read_only=False)
    assert peer.heard == sent
    assert lasts is (mode is not Mode.READ_ONLY)
    if mode is not Mode.READ_ONLY:
        pymysql_driver.set_mode(connection, mode, usual, default_read_only=False)
        assert peer.heard == sent


def test_a_connection_that_a_listener_has_used_is_seen(peer: Peer) -> None:
    """A transaction that a listener has left open shows in the server's last answer, and is committed."""
    connection = connected(peer, autocommit=True)
    pymysql_driver.prepare_connection(connection, False, (), lambda: False, mysql)
    assert pymysql_driver.is_settled(connection, alone=True)
    assert not pymysql_driver.is_settled(connection, alone=False)
    pymysql_driver.end_transaction(connection)
    assert "COMMIT" not in peer.heard
    connection.query("START TRANSACTION")
    assert not pymysql_driver.is_settled(connection, alone=True)
    pymysql_driver.end_transaction(connection)
    assert peer.heard[-1] == "COMMIT"
    assert pymysql_driver.is_default_read_only(connection, False)
    assert not pymysql_driver.is_default_read_only(connection, True), (
        "who has had the driver's connection may have taken the guard off"
    )
    pymysql_driver.prepare_connection(connection, False, (), lambda: True, mysql)
    assert not pymysql_driver.is_default_read_only(connection, False), "and so may a listener"
    assert not pymysql_driver.is_settled(connection, alone=True)


def test_a_guarded_connection_knows_who_has_set_something(peer: Peer) -> None:
    """A SET by SQLAlchemy has passed the interceptor, but a SET by anybody else may have taken the guard off."""
    connection = connected(peer, autocommit=True)
    pymysql_driver.prepare_connection(connection, False, (), lambda: False, mysql)
    for touch in (connection.query, connection.cursor().execute):
        pymysql_driver.note_default_read_only(connection, True)
        DefaultDialect().do_execute(connection.cursor(), "SET @a = 1", ())
        assert pymysql_driver.is_default_read_only(connection, False)
        assert not pymysql_driver.is_default_read_only(connection, True)
        assert not pymysql_driver.has_lost_read_only(connection)
        touch("SET @b = 1")
        DefaultDialect().do_execute(connection.cursor(), "SET @a = 1", ())
        assert not pymysql_driver.is_default_read_only(connection, False)
        assert pymysql_driver.has_lost_read_only(connection)
    connection.query("START TRANSACTION READ ONLY")
    assert not pymysql_driver.has_lost_read_only(connection), "until that has ended"
    connection.rollback()
    assert pymysql_driver.has_lost_read_only(connection)
    pymysql_driver.note_default_read_only(connection, False)
    assert not pymysql_driver.has_lost_read_only(connection)


def test_a_connection_of_pymysqls_own_does_not_know(peer: Peer) -> None:
    """A connection that a tracer has made cannot tell, so its guard is believed while nobody has had it."""
    connection = pymysql.connect(host="127.0.0.1", port=peer.port, user="u", autocommit=True, ssl_disabled=True)
    pymysql_driver.prepare_connection(connection, False, (), lambda: False, mysql)
    pymysql_driver.note_default_read_only(connection, True)
    connection.query("SET @a = 1")
    assert pymysql_driver.is_default_read_only(connection, False)
    assert not pymysql_driver.has_lost_read_only(connection)
    pymysql_driver.prepare_connection(connection, False, (), lambda: True, mysql)
    assert not pymysql_driver.is_default_read_only(connection, False)


def test_a_guarded_connection_begins_read_only_by_itself(peer: Peer) -> None:
    """On a guarded connection without autocommit a read-only transaction begins by itself."""
    connection = connected(peer)
    pymysql_driver.prepare_connection(connection, False, (), lambda: False, mysql)
    peer.heard.clear()
    assert pymysql_driver.set_mode(connection, Mode.READ_ONLY, False, default_read_only=True), "and lasts"
    assert peer.heard == []
    pymysql_driver.set_mode(connection, Mode.AUTOCOMMIT, False, default_read_only=True)
    pymysql_driver.set_mode(connection, Mode.READ_ONLY, False, default_read_only=True)
    assert peer.heard == ["SET AUTOCOMMIT = 1", "START TRANSACTION READ ONLY"]


def test_a_connection_has_a_socket_until_it_is_closed(peer: Peer) -> None:
    connection = connected(peer)
    pymysql_driver.prepare_connection(connection, False, (), lambda: False, mysql)
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
    pymysql_driver.track_connecting_socket(dialect, contextlib.nullcontext)
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
    connection.query("START TRANSACTION")
    connection.query("INSERT")
    assert ends() == 3
    for number, text in enumerate(("/* a */ COMMIT AND CHAIN", "begin", "-- b\nSTART TRANSACTION", "COMMIT  WORK AND CHAIN"), 4):
        connection.query(text)
        assert ends() == number
    connection.begin()
    assert ends() == 8


def test_where_nobody_counts_there_is_always_one_more() -> None:
    """On a connection that counts no ends, each question finds one more end."""
    ends = pymysql_driver.count_ends(types.SimpleNamespace())
    assert ends() != ends()


def test_no_rollback_is_known_to_do_nothing() -> None:
    """No connection of PyMySQL is known to be idle, so a rollback is never left out."""
    assert not pymysql_driver.is_idle(object())
