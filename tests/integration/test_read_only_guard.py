"""A unit that is declared read-only never writes, wherever it runs, whatever it sends, and whatever others have left."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from typing import Any

import pymysql
import pytest
from sqlalchemy import event, func, select, text
from sqlalchemy.engine import Connection
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import Pool

from aurora_router import ReadOnlyViolation, Router, RouterError, RoutingSession
from aurora_router.local import FaultProxy, PostgresCluster
from aurora_router.local.cluster import Cluster
from tests.integration.shop import end_connections, eventually, family, place, sessions, through, until_readers_serve

MakeRouter = Callable[..., Router]

COUNT = text("SELECT count(*) FROM item")
NOTE = text("SELECT a FROM noting")
"""A write that no text shows."""

_MADE = {
    "postgresql": (
        "CREATE TABLE note (n int)",
        "CREATE FUNCTION noted() RETURNS int LANGUAGE plpgsql AS $$BEGIN INSERT INTO note VALUES (1); RETURN 1; END$$",
        "CREATE VIEW noting AS SELECT noted() AS a",
        "GRANT ALL ON note, noting TO app",
    ),
    "mysql": (
        "CREATE TABLE note (n int)",
        "CREATE FUNCTION noted() RETURNS int MODIFIES SQL DATA BEGIN INSERT INTO note VALUES (1); RETURN 1; END",
        "CREATE SQL SECURITY INVOKER VIEW noting AS SELECT noted() AS a",
    ),
}
SET_DEFAULT_READ_WRITE = {
    "postgresql": "SET default_transaction_read_only = off",
    "mysql": "SET SESSION TRANSACTION READ WRITE",
}


@pytest.fixture
def noted(cluster: Cluster[Any]) -> Iterator[Callable[[], int]]:
    """A count of the rows written."""
    if family(cluster) == "mysql":
        for instance in cluster.instances:
            cluster.execute("SET GLOBAL log_bin_trust_function_creators = 1", instance=instance)
    for statement in _MADE[family(cluster)]:
        cluster.execute(statement)
    cluster.wait_in_sync()
    yield lambda: cluster.execute("SELECT count(*) FROM note")[0][0]
    for statement in ("DROP VIEW noting", "DROP FUNCTION noted", "DROP TABLE note"):
        cluster.execute(statement)


@pytest.fixture
def on_writer(cluster: Cluster[Any], make_router: MakeRouter, noted: Callable[[], int]) -> Router:
    """A router whose only instance is the writer, which serves read-only units, too."""
    router = make_router(cluster.url, engine_options={"pool_size": 1, "max_overflow": 0})
    eventually(lambda: router.topology.writer is not None)
    return router


TEXTS = {
    "postgresql": (
        "SET TRANSACTION READ WRITE",
        "SET transaction_read_only = off",
        "SET SESSION CHARACTERISTICS AS TRANSACTION READ WRITE",
        "SELECT set_config('default_transaction_read_only', 'off', false)",
        "RESET transaction_read_only",
        "BEGIN READ WRITE",
        "COMMIT; BEGIN",
        "COMMIT",
        "ROLLBACK; SELECT a FROM noting",
        "COMMIT; SELECT a FROM noting",
    ),
    "mysql": (
        "SET SESSION TRANSACTION READ WRITE",
        "SET TRANSACTION READ WRITE",
        "SET @@session.tx_read_only = 0",
        "SET @x = 1, @@tx_read_only = OFF",
        "COMMIT",
        "ROLLBACK",
        "BEGIN",
        "START TRANSACTION READ WRITE",
        "SET autocommit = 1",
        "UNLOCK TABLES",
    ),
}


@pytest.mark.engines("postgresql", "mariadb")
@pytest.mark.parametrize("where", ["reader", "writer"])
def test_no_text_lets_a_read_only_unit_write(
    cluster: Cluster[Any], make_router: MakeRouter, noted: Callable[[], int], where: str
) -> None:
    """A text that lifts the access mode or ends the transaction is refused unsent, and the unit goes on."""
    router = make_router(**({} if where == "reader" else {"url": cluster.url}))
    if where == "reader":
        until_readers_serve(router, 2)
    for statement in TEXTS[family(cluster)]:
        with sessions(router, read_only=True)() as s:
            with pytest.raises(ReadOnlyViolation, match=r"not sent.*commit\(\) or rollback\(\)") as caught:
                s.execute(text(statement))
            assert not caught.value.sent, statement
            assert s.scalar(COUNT) == 3
            assert place(s) == where
            with pytest.raises(ReadOnlyViolation, match="the server refused it"):
                s.execute(NOTE).all()
        with router.connect(read_only=True) as connection, pytest.raises(ReadOnlyViolation):
            connection.execute(text(statement))
    assert noted() == 0


@pytest.mark.engines("postgresql", "mariadb")
def test_a_read_only_unit_may_be_made_stricter(cluster: Cluster[Any], on_writer: Router) -> None:
    """A second READ ONLY and savepoints are not refused."""
    strict = ("START TRANSACTION READ ONLY",) if family(cluster) == "mysql" else ("SET TRANSACTION READ ONLY",)
    with sessions(on_writer, read_only=True)() as s:
        for statement in (*strict, "SAVEPOINT a", "ROLLBACK TO SAVEPOINT a"):
            s.execute(text(statement))
        assert s.scalar(COUNT) == 3


LOCKS = {
    "postgresql": (
        "SELECT pg_try_advisory_lock(7)",
        "SELECT pg_advisory_xact_lock_shared(7)",
        "SELECT pg_advisory_unlock(7)",
        "SELECT pg_advisory_unlock_all()",
    ),
    "mysql": (
        "SELECT GET_LOCK('mine', 0)",
        "DO `get_lock`('mine', 0)",
        "SELECT id FROM item WHERE GET_LOCK('mine', 0)",
        "SET @held = GET_LOCK('mine', 0)",
        "SELECT IS_FREE_LOCK('mine')",
        "SELECT IS_USED_LOCK('mine')",
        "SELECT RELEASE_LOCK('mine')",
        "SELECT RELEASE_ALL_LOCKS()",
    ),
}
TAKE, GIVE_BACK = (
    {"postgresql": "SELECT pg_try_advisory_lock(7)", "mysql": "SELECT GET_LOCK('mine', 0)"},
    {"postgresql": "SELECT pg_advisory_unlock(7)", "mysql": "SELECT RELEASE_LOCK('mine')"},
)


@pytest.mark.engines("postgresql", "mariadb")
@pytest.mark.parametrize("where", ["reader", "writer"])
def test_a_read_only_unit_takes_no_lock_by_name(cluster: Cluster[Any], make_router: MakeRouter, where: str) -> None:
    """A reader's lock means nothing to others, so no statement that acquires, tests or releases a named lock is sent."""
    router = make_router(**({} if where == "reader" else {"url": cluster.url}))
    if where == "reader":
        until_readers_serve(router, 2)
    for statement in LOCKS[family(cluster)]:
        with sessions(router, read_only=True)() as s:
            with pytest.raises(ReadOnlyViolation, match="not sent") as caught:
                s.execute(text(statement))
            assert not caught.value.sent, statement
            assert s.scalar(COUNT) == 3
            assert place(s) == where
        with router.connect(read_only=True) as connection, pytest.raises(ReadOnlyViolation):
            connection.exec_driver_sql(statement)


@pytest.mark.engines("postgresql", "mariadb")
def test_a_lock_by_name_is_the_writers(cluster: Cluster[Any], router: Router) -> None:
    """An automatic unit acquires and releases a named lock on the writer, also after a read on a reader."""
    until_readers_serve(router, 2)
    take, give_back = text(TAKE[family(cluster)]), text(GIVE_BACK[family(cluster)])
    with sessions(router)() as s, router.connect() as other:
        assert s.scalar(COUNT) == 3
        assert place(s) == "reader"
        assert s.scalar(take)
        assert place(s) == "writer"
        assert not other.scalar(take)
        assert s.scalar(give_back)
        assert other.scalar(take)
        assert other.scalar(give_back)


@pytest.mark.engines("mariadb")
def test_a_handler_of_mariadb_stays_where_it_was_opened(router: Router) -> None:
    """OPEN, READ and CLOSE of a HANDLER go to the same connection, in a read-only unit to its reader's."""
    until_readers_serve(router, 2)
    for read_only, where in ((True, "reader"), (None, "writer")):
        with sessions(router, read_only=read_only)() as s:
            s.execute(text("HANDLER item OPEN"))
            assert s.execute(text("HANDLER item READ FIRST")).one().id == 1
            s.execute(text("HANDLER item CLOSE"))
            assert place(s) == where


REFUSED = "(?i)read.only"
"""Matches the refusals of the router and of the servers."""


def is_default_read_only(s: RoutingSession) -> bool:
    """Whether a read in autocommit would refuse to write; asks on the driver's own cursor."""
    transaction = s.get_transaction()
    assert transaction is not None
    (driver,) = {c.connection.driver_connection for c in transaction._connections if isinstance(c, Connection)}
    with driver.cursor() as cursor:
        cursor.execute("SELECT @@tx_read_only" if hasattr(driver, "server_status") else "SHOW default_transaction_read_only")
        (found,) = cursor.fetchone()
        return found in (1, "on")


def listener(driver: Any, *_: Any) -> None:
    with driver.cursor() as cursor:
        cursor.execute(SET_DEFAULT_READ_WRITE["mysql" if hasattr(driver, "server_status") else "postgresql"])


def by_raw_connection(router: Router) -> None:
    raw = router.raw_connection(read_only=True)
    try:
        listener(raw.driver_connection)
        raw.commit()
    finally:
        raw.close()


def by_connection_of_a_session(router: Router) -> None:
    with sessions(router, read_only=True)() as s:
        listener(s.connection().connection.driver_connection)
        s.commit()


def by_connection(router: Router) -> None:
    with router.connect(read_only=True) as connection:
        listener(connection.connection.driver_connection)
        connection.commit()


def by_result(router: Router) -> None:
    with router.connect(read_only=True) as connection:
        listener(connection.execute(COUNT).cursor.connection)


def by_cursor_of_a_session(router: Router) -> None:
    with sessions(router)() as s:
        cursor = s.execute(COUNT).cursor
        cursor.execute(SET_DEFAULT_READ_WRITE["mysql" if hasattr(cursor.connection, "server_status") else "postgresql"])


def read_only_session(router: Router) -> None:
    with sessions(router, read_only=True)() as s:
        s.execute(NOTE).all()
        s.commit()


def read_only_raw(router: Router) -> None:
    raw = router.raw_connection(read_only=True)
    try:
        raw.cursor().execute("INSERT INTO note VALUES (2)")
        raw.commit()
    finally:
        raw.close()


def read_only_connection(router: Router) -> None:
    with router.connect(read_only=True) as connection:
        connection.execute(NOTE).all()
        connection.commit()


def in_autocommit(router: Router) -> None:
    with router.connect(read_only=True) as connection:
        connection.execution_options(isolation_level="AUTOCOMMIT").execute(NOTE).all()


USES = [read_only_session, read_only_raw, read_only_connection, in_autocommit]


@pytest.mark.engines("postgresql", "mariadb")
@pytest.mark.parametrize(
    "how",
    [
        by_raw_connection,
        by_connection_of_a_session,
        by_connection,
        by_result,
        by_cursor_of_a_session,
        "checkout",
        "reset",
        "checkin",
    ],
)
def test_a_guard_taken_off_unseen_is_set_again(
    cluster: Cluster[Any], make_router: MakeRouter, noted: Callable[[], int], how: Any
) -> None:
    """Settings that users or listeners leave on a reader's connection do not outlive their checkout.

    After the reader's promotion no read-only unit writes there, and no automatic unit writes by a read.
    """
    if isinstance(how, str):
        event.listen(Pool, how, listener)
    try:
        only = cluster.readers[0]
        router = make_router(instances=[only.address], engine_options={"pool_size": 1, "max_overflow": 0}, failover_timeout=15)
        until_readers_serve(router, 1)
        with sessions(router, read_only=True)() as s:
            assert s.scalar(COUNT) == 3
        if not isinstance(how, str):
            how(router)
        with sessions(router)() as s:
            assert s.scalar(COUNT) == 3
            assert place(s) == "reader"
            assert is_default_read_only(s)
        if not isinstance(how, str):
            how(router)
        cluster.kill(cluster.writer)
        cluster.promote(only)
        eventually(lambda: router.topology.writer is not None and router.topology.writer.id == only.address)
        for use in USES:
            with pytest.raises(Exception, match=REFUSED):
                use(router)
        assert cluster.execute("SELECT count(*) FROM note", instance=only)[0][0] == 0
        with sessions(router)() as s:
            s.execute(text("INSERT INTO note VALUES (4)"))
            s.commit()
    finally:
        if isinstance(how, str):
            event.remove(Pool, how, listener)


def test_no_transaction_of_a_listener_lets_a_unit_write(on_writer: Router, noted: Callable[[], int]) -> None:
    """A read-only unit does not go on in a transaction that a listener of checkout has begun to write."""

    def begin(driver: Any, *_: Any) -> None:
        driver.execute("SET TRANSACTION READ WRITE")

    event.listen(Pool, "checkout", begin)
    try:
        for use in (read_only_session, *USES):
            with pytest.raises(Exception, match=REFUSED):
                use(on_writer)
    finally:
        event.remove(Pool, "checkout", begin)
    assert noted() == 0


@pytest.mark.engines("postgresql", "mariadb")
def test_no_option_lets_a_read_only_unit_write(cluster: Cluster[Any], on_writer: Router, noted: Callable[[], int]) -> None:
    """A read-only unit in AUTOCOMMIT is guarded as one in a transaction, and later units may write again."""
    for _ in range(2):
        with on_writer.connect(read_only=True) as connection:
            connection.execution_options(isolation_level="AUTOCOMMIT")
            assert connection.scalar(COUNT) == 3
            with pytest.raises(ReadOnlyViolation):
                connection.execute(NOTE).all()
        with sessions(on_writer, read_only=True)() as s:
            s.connection(execution_options={"isolation_level": "AUTOCOMMIT"})
            with pytest.raises(ReadOnlyViolation):
                s.execute(NOTE).all()
        assert noted() == 0
        with on_writer.begin() as connection:
            connection.execute(text("INSERT INTO note VALUES (4)"))
        cluster.execute("DELETE FROM note")


@pytest.mark.engines("postgresql", "mariadb")
def test_each_transaction_of_a_connection_is_read_only(on_writer: Router, noted: Callable[[], int]) -> None:
    """Each transaction of a read-only connection refuses writes, also those after a COMMIT or ROLLBACK.

    SQLAlchemy sends a COMMIT of its own with an isolation level.
    """
    with on_writer.connect(read_only=True) as connection:
        connection.execution_options(isolation_level="READ COMMITTED")
        with pytest.raises(ReadOnlyViolation):
            connection.execute(NOTE).all()
    for end in ("commit", "rollback"):
        with on_writer.connect(read_only=True) as connection:
            assert connection.scalar(COUNT) == 3
            getattr(connection, end)()
            with pytest.raises(ReadOnlyViolation):
                connection.execute(NOTE).all()
        raw = on_writer.raw_connection(read_only=True)
        try:
            getattr(raw, end)()
            with pytest.raises(Exception, match=REFUSED):
                raw.cursor().execute("INSERT INTO note VALUES (2)")
        finally:
            raw.close()
        assert noted() == 0
        with on_writer.begin() as connection:
            connection.execute(text("DELETE FROM note"))


@pytest.mark.engines("postgresql", "mariadb")
def test_each_transaction_is_read_only_after_a_loss(cluster: Cluster[Any], on_writer: Router, noted: Callable[[], int]) -> None:
    """The connection that SQLAlchemy makes in place of a lost one is read-only, and stays so."""
    with on_writer.connect(read_only=True) as connection:
        assert connection.scalar(COUNT) == 3
        end_connections(cluster)
        with pytest.raises(DBAPIError):
            connection.scalar(COUNT)
        connection.rollback()
        for _ in range(2):
            with pytest.raises(ReadOnlyViolation):
                connection.execute(NOTE).all()
            connection.rollback()
    assert noted() == 0


TAKING_OFF = {
    "RESET ALL": text("RESET ALL"),
    "DISCARD ALL": text("DISCARD ALL"),
    "a bound name": select(func.set_config("default_transaction_read_only", "off", False)),
    "a name in pieces": text("SELECT set_config('default_transaction_' || 'read_only', 'off', false)"),
    "a bound value": text("SELECT set_config('default_transaction_read_only', :v, false)").bindparams(v="off"),
    "for the session's session": text("SET SESSION SESSION CHARACTERISTICS AS TRANSACTION READ WRITE"),
    "a function that looks like a read": text("SELECT unguards()"),
    "a view": text("SELECT a FROM unguarding"),
    "a block": text("DO $$BEGIN RESET default_transaction_read_only; END$$"),
    "a stack": text("SELECT 1; RESET ALL"),
}


@pytest.fixture
def may_unset_read_only(cluster: PostgresCluster) -> Iterator[None]:
    """A function, and a view of it, that take the guard off but look like reads."""
    cluster.execute(
        "CREATE FUNCTION unguards() RETURNS text LANGUAGE plpgsql STABLE AS "
        "$$BEGIN RETURN set_config('default_transaction_read_only', 'off', false); END$$"
    )
    cluster.execute("CREATE VIEW unguarding AS SELECT unguards() AS a")
    cluster.execute("GRANT SELECT ON unguarding TO app")
    yield
    cluster.execute("DROP VIEW unguarding")
    cluster.execute("DROP FUNCTION unguards")


def test_no_statement_takes_a_guard_off_in_autocommit(
    make_router: MakeRouter, cluster: PostgresCluster, noted: Callable[[], int], may_unset_read_only: None
) -> None:
    """Each statement of a read-only connection in autocommit refuses to write, whatever those before it have set."""
    router = make_router(cluster.url, read_only_functions=["unguards"])
    eventually(lambda: router.topology.writer is not None)

    def fares(connection: Connection, statement: Any) -> None:
        with suppress(ReadOnlyViolation):
            connection.execute(statement)
        with pytest.raises(ReadOnlyViolation, match="the server refused it"):
            connection.execute(NOTE).all()

    for statement in TAKING_OFF.values():
        with router.connect(read_only=True) as connection:
            connection.execution_options(isolation_level="AUTOCOMMIT")
            fares(connection, statement)
            assert connection.scalar(COUNT) == 3
            connection.commit()
            fares(connection, statement)
        with sessions(router, read_only=True)() as s:
            fares(s.connection(execution_options={"isolation_level": "AUTOCOMMIT"}), statement)
    assert noted() == 0


@pytest.mark.engines("postgresql", "mariadb")
def test_no_cursor_takes_a_guard_off_in_autocommit(on_writer: Router, noted: Callable[[], int]) -> None:
    """Statements that the router does not see, of a listener or the driver's own connection, take no guard off."""
    with on_writer.connect(read_only=True) as connection:
        connection.execution_options(isolation_level="AUTOCOMMIT")
        listener(connection.execute(COUNT).cursor.connection)
        with pytest.raises(ReadOnlyViolation):
            connection.execute(NOTE).all()
        event.listen(connection, "before_cursor_execute", lambda c, cursor, *_: listener(cursor.connection))
        with pytest.raises(ReadOnlyViolation):
            connection.execute(NOTE).all()
        assert connection.scalar(COUNT) == 3
    assert noted() == 0


def test_the_access_mode_of_a_driver_is_kept(on_writer: Router, noted: Callable[[], int]) -> None:
    """Neither SQLAlchemy's own option for the access mode nor its trace on the connection lets a read-only unit write."""
    with on_writer.connect(read_only=True) as connection:
        with pytest.raises(ReadOnlyViolation, match="postgresql_readonly"):
            connection.execution_options(postgresql_readonly=False)
        connection.execution_options(postgresql_readonly=True)
        assert connection.scalar(COUNT) == 3
    with sessions(on_writer, read_only=True)() as s, pytest.raises(ReadOnlyViolation, match="postgresql_readonly"):
        s.connection(execution_options={"postgresql_readonly": False})
    for use in USES:
        with pytest.raises(Exception, match=REFUSED):
            use(on_writer)
    assert noted() == 0


@pytest.mark.engines("postgresql", "mariadb")
def test_a_read_only_unit_may_begin_on_the_writer(make_router: MakeRouter, noted: Callable[[], int]) -> None:
    """A first statement that asks for the writer is served there, in a read-only transaction; a later one is refused."""
    router = make_router()
    until_readers_serve(router, 2)
    for statement, options in (
        (COUNT, {"execution_options": {"route": "writer"}}),
        (COUNT.execution_options(route="writer"), {}),
        (text("/*@writer*/ SELECT count(*) FROM item"), {}),
        (COUNT, {"bind_arguments": {"read_only": False}}),
    ):
        with sessions(router, read_only=True)() as s:
            assert s.scalar(statement, **options) == 3
            assert place(s) == "writer"
            with pytest.raises(ReadOnlyViolation, match="the server refused it"):
                s.execute(NOTE).all()
        with sessions(router, read_only=True)() as s:
            assert s.scalar(COUNT) == 3
            assert place(s) == "reader"
            with pytest.raises(RouterError, match="asks for the writer"):
                s.scalar(statement, **options)
            assert place(s) == "reader"
    with router.connect(read_only=True) as connection, pytest.raises(RouterError, match="asks for the writer"):
        connection.execution_options(route="writer").scalar(COUNT)
    assert noted() == 0


def test_a_listener_may_use_another_session_first(
    cluster: Cluster[Any], make_router: MakeRouter, noted: Callable[[], int]
) -> None:
    """After a listener has used another session, its statements on its own connection are read-only if its unit is."""
    router = make_router(cluster.url)
    eventually(lambda: router.topology.writer is not None)

    class LookingUp(RoutingSession):
        pass

    def begun(_session: Any, _transaction: Any, connection: Connection) -> None:
        with RoutingSession(router=router, read_only=False) as other:
            other.execute(COUNT).all()
        connection.execute(text("INSERT INTO note VALUES (1)"))

    event.listen(LookingUp, "after_begin", begun)
    with LookingUp(router=router, read_only=True) as s, pytest.raises(ReadOnlyViolation):
        s.execute(COUNT).all()
    assert noted() == 0


@pytest.mark.engines("mariadb", "mysql")
@pytest.mark.parametrize("raw", [False, True])
def test_a_connection_lost_while_it_is_guarded_is_replaced(
    cluster: Cluster[Any], make_router: MakeRouter, proxy: FaultProxy, raw: bool
) -> None:
    """A connection that is lost while it is made read-only is replaced."""
    router = make_router(through(proxy, cluster), instances=[])
    connect = router.raw_connection if raw else router.connect
    proxy.lose("SET SESSION TRANSACTION READ ONLY", answer=True)
    with closing(connect(read_only=True)) as connection:
        driver: Any = (connection if raw else connection.connection).dbapi_connection
        with driver.cursor() as cursor, pytest.raises(pymysql.Error, match="1792"):
            cursor.execute("INSERT INTO item (id) VALUES (9)")
