"""Mapped classes, and small helpers of the integration tests."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest
from pymysql import OperationalError
from pymysql.constants import SERVER_STATUS
from sqlalchemy import ForeignKey, make_url, text, update
from sqlalchemy.engine import Connection
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship, sessionmaker

from aurora_router import OutcomeUnknown, Router, RoutingSession
from aurora_router.core.gtid import GtidSet, MariadbGtid
from aurora_router.core.positions import Position, WalPosition
from aurora_router.local import FaultProxy, LocalInstance, PostgresCluster
from aurora_router.local.cluster import Cluster
from aurora_router.router import core_of


class Base(DeclarativeBase):
    pass


class Item(Base):
    __tablename__ = "item"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(default="")
    stock: Mapped[int] = mapped_column(default=0)
    parts: Mapped[list[Part]] = relationship(back_populates="item", order_by="Part.id")


class Part(Base):
    __tablename__ = "part"
    id: Mapped[int] = mapped_column(primary_key=True)
    item_id: Mapped[int | None] = mapped_column(ForeignKey("item.id"))
    name: Mapped[str] = mapped_column(default="")
    item: Mapped[Item | None] = relationship(back_populates="parts")


RAISE = update(Item).where(Item.id == 1).values(stock=Item.stock + 1)


_OF_FAMILY = [
    "CREATE DATABASE IF NOT EXISTS extra",
    "CREATE TABLE IF NOT EXISTS item "
    "(id bigint PRIMARY KEY, name varchar(200) NOT NULL DEFAULT '', stock int NOT NULL DEFAULT 0)",
    "CREATE TABLE IF NOT EXISTS part (id bigint PRIMARY KEY, item_id bigint, name varchar(200) DEFAULT '', "
    "FOREIGN KEY (item_id) REFERENCES item (id))",
    "DELETE FROM part",
    "DELETE FROM item",
    "GRANT ALL ON extra.* TO app@'%'",
]

_TABLES = {
    "postgresql": [
        "CREATE SCHEMA IF NOT EXISTS extra",
        "CREATE TABLE IF NOT EXISTS item (id bigint PRIMARY KEY, name text NOT NULL DEFAULT '', stock int NOT NULL DEFAULT 0)",
        "CREATE TABLE IF NOT EXISTS part (id bigint PRIMARY KEY, item_id bigint REFERENCES item (id), name text DEFAULT '')",
        "CREATE SEQUENCE IF NOT EXISTS ticket",
        "TRUNCATE item, part",
        "GRANT ALL ON ALL TABLES IN SCHEMA public TO app",
        "GRANT ALL ON ALL SEQUENCES IN SCHEMA public TO app",
        "GRANT ALL ON SCHEMA public, extra TO app",
    ],
    "mariadb": [*_OF_FAMILY, "CREATE SEQUENCE IF NOT EXISTS ticket"],
    "mysql": [
        *_OF_FAMILY,
        "CREATE TABLE IF NOT EXISTS ticket (number bigint PRIMARY KEY)",  # MySQL has no sequences
        "INSERT IGNORE INTO ticket VALUES (0)",
        "CREATE FUNCTION IF NOT EXISTS nextval() RETURNS bigint DETERMINISTIC MODIFIES SQL DATA "
        "BEGIN UPDATE ticket SET number = LAST_INSERT_ID(number + 1); RETURN LAST_INSERT_ID(); END",
    ],
}


_ROWS = (
    "INSERT INTO item VALUES (1, 'one', 10), (2, 'two', 20), (3, 'three', 30)",
    "INSERT INTO part VALUES (1, 1, 'first'), (2, 1, 'second')",
)

BOTH = pytest.mark.engines("postgresql", "mariadb", "mysql")
"""Runs the test on both families of servers."""


def engine(cluster: Cluster[Any]) -> str:
    """The engine of its servers: "postgresql", "mariadb" or "mysql"."""
    return make_url(cluster.url).get_backend_name()


def family(cluster: Cluster[Any]) -> str:
    """The family of its servers: "postgresql" or "mysql". MariaDB belongs to "mysql"."""
    return "postgresql" if engine(cluster) == "postgresql" else "mysql"


def set_up(cluster: Cluster[Any]) -> None:
    """Create the shop's tables, with three items and two parts."""
    with cluster.writer.connect() as connection, connection.cursor() as cursor:
        for statement in (*_TABLES[engine(cluster)], *_ROWS):
            cursor.execute(statement)


_ADDRESS = {
    "postgresql": "SELECT host(inet_server_addr()), inet_server_port()",
    "mysql": "SELECT @@bind_address, @@port",
}


def _family(connection: Connection) -> str:
    return "postgresql" if connection.dialect.name == "postgresql" else "mysql"


def server_address(connection: Connection) -> str:
    """The address that the server itself reports."""
    host, port = connection.execute(text(_ADDRESS[_family(connection)])).one()
    return f"{host}:{port}"


def in_a_read_only_transaction(connection: Connection) -> bool:
    """Whether a read-only transaction is open on the connection."""
    driver: Any = connection.connection.dbapi_connection
    if connection.dialect.name == "postgresql":
        open_there = driver.info.transaction_status.name == "INTRANS" and driver.read_only is True
        return open_there and connection.scalar(text("SHOW transaction_read_only")) == "on"
    with pytest.raises(driver.Error, match=r"1290|1792"):  # past the interceptor
        driver.cursor().execute("INSERT INTO part (id) VALUES (99)")
    driver.cursor().execute("SELECT count(*) FROM item")  # begins a transaction unless one is open already
    driver.cursor().execute("DO 0")  # the answer says whether a transaction is open
    return bool(driver.server_status & SERVER_STATUS.SERVER_STATUS_IN_TRANS)


_CONNECTIONS = {
    "postgresql": "SELECT count(*) FROM pg_stat_activity WHERE usename = 'app'",
    "mysql": "SELECT count(*) FROM information_schema.processlist WHERE user = 'app'",
}


def connections(cluster: Cluster[Any], instance: LocalInstance) -> int:
    """The number of the application user's connections to the instance."""
    found: int = cluster.execute(_CONNECTIONS[family(cluster)], instance=instance)[0][0]
    return found


_IDS = {
    "postgresql": "SELECT pid FROM pg_stat_activity WHERE usename = 'app' AND query LIKE '%item%'",
    "mysql": "SELECT id FROM information_schema.processlist WHERE user = 'app'",
}


def connection_ids(cluster: Cluster[Any], instance: LocalInstance) -> set[int]:
    """The server's ids of the application user's connections to the instance."""
    return {number for (number,) in cluster.execute(_IDS[family(cluster)], instance=instance)}


def end_connections(cluster: Cluster[Any]) -> None:
    """Make the writer end all connections of the application's user."""
    if family(cluster) == "postgresql":
        cluster.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'app'")
        return
    for number in connection_ids(cluster, cluster.writer):
        with suppress(OperationalError):  # the connection may have ended by itself
            cluster.execute(f"KILL {number}")


def connection_id(connection: Connection) -> int | None:
    """The server's id of the connection."""
    function = {"postgresql": "pg_backend_pid()", "mysql": "connection_id()"}
    return connection.scalar(text(f"SELECT {function[_family(connection)]}"))


def a_position(cluster: Cluster[Any], epoch: int, number: int) -> Position:
    """A position in the log of the cluster's engine."""
    positions: dict[str, Position] = {
        "postgresql": WalPosition(epoch, number),
        "mariadb": MariadbGtid(epoch, ((0, 1, number),)),
        "mysql": GtidSet.from_server(epoch, f"00000000-0000-0000-0000-000000000001:1-{number}"),
    }
    return positions[engine(cluster)]


def probes(statement: str) -> bool:
    """Whether the statement is one that the monitor, or a new connection, sends."""
    logs = ("SHOW MASTER STATUS", "SHOW BINARY LOG STATUS")
    said = (*logs, "pg_is_in_recovery", "@@", "SLAVES STATUS", "REPLICA STATUS", "information_schema.routines")
    return any(words in statement for words in said)


_OPEN = {
    "postgresql": "SELECT count(*) FROM pg_stat_activity WHERE usename = 'app' AND xact_start IS NOT NULL",
    "mysql": "SELECT count(*) FROM information_schema.innodb_trx t JOIN information_schema.processlist p "
    "ON p.id = t.trx_mysql_thread_id WHERE p.user = 'app'",
}


def open_transactions(cluster: Cluster[Any], *instances: LocalInstance) -> int:
    """The number of the application user's open transactions on the instances."""
    if family(cluster) == "mysql":
        time.sleep(0.15)  # InnoDB repeats its last answer if it is asked within 0.1 s
    return sum(cluster.execute(_OPEN[family(cluster)], instance=instance)[0][0] for instance in instances)


_PASSWORD = {"postgresql": "ALTER ROLE app PASSWORD '{}'", "mysql": "ALTER USER app IDENTIFIED BY '{}'"}


def set_password(cluster: Cluster[Any], password: str) -> None:
    """Make this the password of the application's user."""
    cluster.execute(_PASSWORD[family(cluster)].format(password))


def sessions(router: Router, **options: object) -> sessionmaker[RoutingSession]:
    return sessionmaker(class_=RoutingSession, router=router, **options)


def raise_stock(session: RoutingSession) -> int:
    """Add one to the stock, and return the new stock."""
    item = session.get_one(Item, 1)
    session.execute(RAISE)
    session.refresh(item)
    return item.stock


def write(router: Router, **options: object) -> str:
    """Raise the stock, and return the token of that write."""
    with sessions(router)(**options) as s:
        s.execute(RAISE)
        s.commit()
        token = s.consistency_token
    assert token is not None
    return token


def stock(cluster: PostgresCluster) -> int:
    found: int = cluster.execute("SELECT stock FROM item WHERE id = 1")[0][0]
    return found


def place(session: RoutingSession) -> str:
    """The place of the session's unit: "nowhere", "reader" or "writer"."""
    unit = session.routing_state.unit
    if unit is None or unit.place.instance is None or session.get_transaction() is None:
        return "nowhere"
    return "writer" if unit.place.on_writer else "reader"


def instance_id(session: RoutingSession) -> str:
    """The instance of the session's unit."""
    assert session.routing_state.unit is not None
    assert session.routing_state.unit.place.instance is not None
    return session.routing_state.unit.place.instance.id


def eventually(condition: Callable[[], object], timeout: float = 30.0) -> None:
    """Wait until the condition holds. Fail if it does not hold within `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.005)


def until_readers_serve(router: Router, count: int) -> None:
    """Wait until that many readers are in use, all of the newest epoch."""
    eventually(lambda: len(router.topology.readers) == count and router.topology.writer is not None)
    eventually(lambda: all(r.position is not None and r.position.epoch == router.topology.epoch for r in router.topology.readers))


def no_connection_is_left(router: Router) -> bool:
    return all(of.pool_in_use == 0 for of in router.stats().instances)


def held_by(router: Router) -> str:
    """What a router holds, as its reprs show it."""
    core = core_of(router)
    return repr([vars(each) for each in (core, core.engines, *core.engines._pools.values())])


def through(proxy: FaultProxy, cluster: PostgresCluster) -> str:
    """The cluster's URL, with the proxy in the writer's place."""
    return cluster.url.replace(cluster.writer.address, proxy.address)


def cut_off(cluster: PostgresCluster, reader: LocalInstance) -> None:
    """Stop the replication of the reader, which goes on serving."""
    for statement in ("ALTER SYSTEM SET primary_conninfo = ''", "SELECT pg_reload_conf()"):
        cluster.execute(statement, instance=reader)
    eventually(lambda: cluster.execute("SELECT count(*) FROM pg_stat_wal_receiver", instance=reader) == [(0,)])


@contextmanager
def shop(factory: Callable[..., PostgresCluster], *, readers: int = 1, **options: object) -> Iterator[PostgresCluster]:
    """A cluster of the test's own with one item, 10 in stock, that all of its readers have."""
    cluster = factory(readers=readers, **options)
    cluster.execute("CREATE TABLE item (id bigint PRIMARY KEY, name text DEFAULT '', stock int DEFAULT 0)")
    cluster.execute("INSERT INTO item VALUES (1, '', 10); GRANT ALL ON item TO app; GRANT CREATE ON SCHEMA public TO app")
    cluster.wait_in_sync()
    yield cluster
    cluster.stop()


@contextmanager
def routed(cluster: PostgresCluster) -> Iterator[tuple[Router, FaultProxy]]:
    """A router of that cluster whose readers serve, and the proxy before the writer."""
    with FaultProxy((cluster.writer.host, cluster.writer.port)) as proxy:
        readers = [reader.address for reader in cluster.readers]
        with Router(through(proxy, cluster), instances=readers) as router:
            until_readers_serve(router, len(readers))
            yield router, proxy


def lose_a_commit_in_a_failover(cluster: PostgresCluster, router: Router, proxy: FaultProxy) -> tuple[int, OutcomeUnknown, str]:
    """Raise the stock in a transaction that only the writer has, and lose the answer and the writer.

    Its reader is promoted. Returns the transaction's id, the error that its session got, and a later position of the old writer.
    """
    old, (reader,) = cluster.writer, cluster.readers
    cut_off(cluster, reader)
    with sessions(router, commit_check="xid")() as s:
        s.execute(RAISE)
        (xid,) = s.execute(text("SELECT txid_current()")).one()
        proxy.lose("COMMIT", answer=True)
        with pytest.raises(OutcomeUnknown, match=str(xid)) as caught:
            s.commit()
    ((position,),) = cluster.execute("SELECT pg_current_wal_insert_lsn()")
    cluster.kill(old)
    cluster.promote(reader)
    return xid, caught.value, position


def use_up_to(cluster: PostgresCluster, xid: int) -> None:
    """Use the transaction ids up to this one for other transactions, which write to the table `other`."""
    cluster.execute("CREATE TABLE other (n int)")
    used = 0
    while used <= xid:
        ((used,),) = cluster.execute("INSERT INTO other VALUES (1) RETURNING txid_current()")
    assert cluster.execute("SELECT txid_status(%s)", xid) == [("committed",)], "the trap: it is another transaction's"
