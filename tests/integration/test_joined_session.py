"""A session that joins the caller's transaction, as tests do it: everything runs on that connection, nothing is routed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from sqlalchemy import create_engine, func, select, text, update
from sqlalchemy.engine import Connection
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import sessionmaker

from aurora_router import ConfigurationError, Router, RoutingSession
from aurora_router.core import events
from aurora_router.local import PostgresCluster
from tests.integration.shop import BOTH, RAISE, Base, Item, Part, no_connection_is_left, place, sessions, stock

MakeRouter = Callable[..., Router]
Sessions = sessionmaker[RoutingSession]


@pytest.fixture
def connection(router: Router) -> Iterator[Connection]:
    """A connection in a transaction on the writer that is rolled back at the end."""
    with router.connect() as connection, connection.begin() as outer:
        yield connection
        if outer.is_active:
            outer.rollback()


@pytest.fixture
def Session(Session: Sessions, connection: Connection) -> Sessions:
    Session.configure(bind=connection, join_transaction_mode="create_savepoint")
    return Session


@BOTH
def test_what_a_joined_session_commits_can_be_undone(
    cluster: PostgresCluster, router: Router, connection: Connection, Session: Sessions
) -> None:
    """Commits and rollbacks of sessions are savepoints of the outer transaction, whose writes every session sees."""
    with Session() as s:
        s.add(Item(id=9))
        s.commit()
        s.get_one(Item, 1).stock += 1
        s.rollback()
        assert s.connection() is connection
        assert place(s) == "nowhere"
    with Session(read_only=True) as s:
        assert s.scalars(select(Item.id).order_by(Item.id)).all() == [1, 2, 3, 9]
        assert s.scalar(text("SELECT stock FROM item WHERE id = 1")) == 10
    with Session() as s, s.begin():
        s.execute(update(Item).where(Item.id == 9).values(stock=1))
        with pytest.raises(IntegrityError), s.begin_nested():
            s.add(Item(id=9))
        assert s.get_one(Item, 9).stock == 1
    connection.rollback()
    assert cluster.execute("SELECT count(*) FROM item") == [(3,)]
    connection.close()
    assert no_connection_is_left(router)


@BOTH
def test_a_unit_that_may_be_run_again_joins_as_well(cluster: PostgresCluster, router: Router, Session: Sessions) -> None:
    """run_transaction() runs its function once, inside of the outer transaction, and needs no commit table."""

    def sell(s: RoutingSession) -> int:
        s.execute(RAISE)
        return s.get_one(Item, 1).stock

    assert router.run_transaction(Session, sell) == 11
    with Session() as s:
        assert s.get_one(Item, 1).stock == 11
        assert s.consistency_token is None, "nothing of it was committed"
    assert stock(cluster) == 10


def test_an_object_of_a_joined_session_is_not_looked_up(Session: Sessions, connection: Connection) -> None:
    """Nothing was read from a reader, so nothing can be stale: the caller's own statements may change rows."""
    with Session() as s:
        item = s.get_one(Item, 1)
        connection.execute(text("UPDATE item SET stock = 50 WHERE id = 1"))
        item.stock = 5
        s.commit()
        assert connection.scalar(text("SELECT stock FROM item WHERE id = 1")) == 5


def test_a_joined_session_needs_no_cluster(make_router: MakeRouter, heard: list[events.Event]) -> None:
    """The connection may be of any engine; the router is not even started."""
    router = make_router("postgresql+psycopg://app@nowhere.invalid/app", listeners=[heard.append])
    engine = create_engine("sqlite://")
    with engine.connect() as connection:
        Base.metadata.create_all(connection)
        with RoutingSession(router=router, bind=connection) as s:
            s.add(Item(id=1))
            s.commit()
            assert s.scalar(select(func.count()).select_from(Item)) == 1
            with s.begin_nested():
                s.add(Part(id=1))
    engine.dispose()
    assert not router.started


def test_a_binds_entry_counts_beside_a_joined_connection(router: Router, connection: Connection) -> None:
    """As with Session, classes in `binds` use their own engine, and all others use the connection."""
    other = create_engine("sqlite://")
    Part.__table__.create(other)
    with sessions(router, bind=connection, binds={Part: other})() as s:
        assert s.scalars(select(Part)).all() == []
        assert len(s.scalars(select(Item)).all()) == 3
    other.dispose()


def test_an_engine_is_no_connection_to_join(router: Router) -> None:
    engine: Any = create_engine("sqlite://")
    with pytest.raises(ConfigurationError, match="give a Connection"):
        RoutingSession(router=router, bind=engine)


def test_a_bind_that_is_set_later_is_refused(cluster: PostgresCluster, router: Router, connection: Connection) -> None:
    """Setting `bind` later is refused, because the session would still commit on the cluster."""
    engine: Any = create_engine("sqlite://")
    for bind in (engine, connection):
        with sessions(router)() as s, pytest.raises(ConfigurationError, match="when you make the session"):
            s.bind = bind
    with sessions(router, bind=connection)() as s:
        assert s.bind is connection
        with pytest.raises(ConfigurationError, match="when you make the session"):
            s.bind = engine
