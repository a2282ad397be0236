"""Session classes that choose among several engines: rows of another database go where they would without routing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import flask_sqlalchemy
import pytest
from flask import Flask
from flask_sqlalchemy.session import Session as PlainFlaskSession
from sqlalchemy import Engine, Update, create_engine, delete, func, insert, inspect, make_url, select, text, update
from sqlalchemy.exc import OperationalError, UnboundExecutionError
from sqlalchemy.ext.horizontal_shard import ShardedSession
from sqlalchemy.orm import Session as PlainSession

from aurora_router import ConfigurationError, Router, RoutingMixin, RoutingSession
from aurora_router.local import FaultProxy, PostgresCluster
from aurora_router.router import core_of
from tests.integration.shop import BOTH, RAISE, Item, Part, place, sessions, stock

MakeRouter = Callable[..., Router]


class FlaskSession(RoutingMixin, PlainFlaskSession):
    pass


class Shop(NamedTuple):
    """A Flask application with two models, whose tables are both called `item`.

    Entry: in a database of its own
    Ware: in the cluster
    """

    db: flask_sqlalchemy.SQLAlchemy
    Entry: Any
    Ware: Any

    @property
    def audit(self) -> list[str]:
        """The names that the other database has."""
        with self.db.engines["audit"].connect() as connection:
            return [*connection.scalars(text("SELECT name FROM item ORDER BY id"))]


@contextmanager
def flask_shop(router: Router, directory: Path) -> Iterator[Shop]:
    app = Flask("shop")
    app.config["SQLALCHEMY_DATABASE_URI"] = core_of(router).writer_engine().url
    app.config["SQLALCHEMY_BINDS"] = {"audit": f"sqlite:///{directory}/audit.db"}
    db = flask_sqlalchemy.SQLAlchemy(app, session_options={"class_": FlaskSession, "router": router})
    Model: Any = db.Model

    class Entry(Model):
        __bind_key__ = "audit"
        __tablename__ = "item"
        id = db.Column(db.Integer, primary_key=True)
        name = db.Column(db.String(100))

    class Ware(Model):
        __tablename__ = "item"
        id = db.Column(db.Integer, primary_key=True)
        stock = db.Column(db.Integer)

    with app.app_context():
        db.create_all("audit")
        with db.engines["audit"].begin() as connection:
            connection.execute(text("INSERT INTO item VALUES (1, 'in audit')"))
        try:
            yield Shop(db, Entry, Ware)
        finally:
            db.session.remove()
            for engine in db.engines.values():
                engine.dispose()


@pytest.fixture
def flask(router: Router, tmp_path: Path) -> Iterator[Shop]:
    with flask_shop(router, tmp_path) as shop:
        yield shop


@pytest.fixture
def other(tmp_path: Path) -> Iterator[Engine]:
    """Another database, with an empty table of parts."""
    engine = create_engine(f"sqlite:///{tmp_path}/other.db")
    Part.__table__.create(engine)
    yield engine
    engine.dispose()


# -- Flask-SQLAlchemy ---------------------------------------------------------------------------------------------------


@BOTH
def test_a_bind_key_reads_and_writes_its_own_database(cluster: PostgresCluster, flask: Shop) -> None:
    """Every read and write of a model with a `__bind_key__` goes to that database, and the unit moves nowhere."""
    s, Entry = flask.db.session, flask.Entry
    table = Entry.__table__
    assert s.scalars(select(Entry)).one().name == "in audit"
    assert s.query(Entry).count() == 1
    assert s.get(Entry, 1).name == "in audit"
    assert s.execute(select(table.c.name), bind_arguments={"mapper": Entry}).scalar_one() == "in audit"
    s.add(Entry(id=2, name="flushed"))
    s.flush()
    s.execute(insert(table).values(id=3, name="inserted"))
    s.execute(insert(Entry), [{"id": 4, "name": "in bulk"}])
    s.execute(update(Entry).where(Entry.id == 4).values(name="updated"))
    s.execute(delete(table).where(table.c.id == 3))
    s.connection(bind_arguments={"mapper": Entry}).execute(text("INSERT INTO item VALUES (5, 'connection')"))
    assert place(s()) == "nowhere"
    s.commit()
    assert flask.audit == ["in audit", "flushed", "updated", "connection"]
    assert cluster.execute("SELECT name FROM item ORDER BY id") == [("one",), ("two",), ("three",)]


@BOTH
def test_models_without_a_bind_key_are_routed(cluster: PostgresCluster, flask: Shop) -> None:
    """The application's default engine stands for the cluster: its models, tables and texts are routed."""
    s, Ware = flask.db.session, flask.Ware
    ware = s.get(Ware, 1)
    assert s.scalar(text("SELECT count(*) FROM item")) == 3
    assert s.execute(select(Ware.__table__)).all()
    assert place(s()) == "reader"
    ware.stock += 1
    s.add(flask.Entry(id=2, name="sold"))
    s.flush()
    assert place(s()) == "writer"
    s.commit()
    assert (stock(cluster), flask.audit) == (11, ["in audit", "sold"])


def test_a_stale_object_of_the_cluster_is_found_beside_others(cluster: PostgresCluster, flask: Shop) -> None:
    """The stale write guard asks the writer about the cluster's rows, and not about those of the other database."""
    s = flask.db.session
    entry, ware = s.get(flask.Entry, 1), s.get(flask.Ware, 1)
    entry.name = "changed"
    ware.stock += 1
    s.commit()
    assert (stock(cluster), flask.audit) == (11, ["changed"])


@BOTH
def test_a_bulk_save_over_two_databases_is_not_stale(cluster: PostgresCluster, flask: Shop) -> None:
    """The session's own bulk writes are not taken for another's, whichever database comes first."""
    s = flask.db.session
    for first in (0, 1):
        both = [s.get(flask.Entry, 1), s.get(flask.Ware, 1)]
        both[0].name = f"changed {first}"
        both[1].stock += 1
        s.bulk_save_objects([both[first], both[1 - first]])
        s.commit()
    assert (stock(cluster), flask.audit) == (12, ["changed 1"])


def test_a_bind_key_that_is_not_configured_is_an_error(flask: Shop) -> None:
    """A model whose bind key the class refuses does not go to the cluster, as without routing."""

    class Lost(flask.db.Model):  # type: ignore[name-defined,misc]
        __bind_key__ = "nowhere"
        __tablename__ = "item"
        id = flask.db.Column(flask.db.Integer, primary_key=True)

    with pytest.raises(UnboundExecutionError, match="nowhere"):
        flask.db.session.scalars(select(Lost)).all()


@pytest.mark.parametrize("both", [True, False])
def test_a_commit_over_two_databases_is_not_run_again(
    cluster: PostgresCluster, proxy: FaultProxy, make: MakeRouter, tmp_path: Path, both: bool
) -> None:
    """A unit that used the other database is not run again, because it may have committed there; others are."""
    router = make()
    runs = []
    with flask_shop(router, tmp_path) as shop:

        def sell(s: Any) -> None:
            runs.append(1)
            if both:
                s.add(shop.Entry(id=2, name="sold"))
            s.execute(RAISE)

        proxy.lose("COMMIT", answer=False)
        if both:
            with pytest.raises(OperationalError):
                router.run_transaction(shop.db.session, sell)
        else:
            router.run_transaction(shop.db.session, sell)
    assert len(runs) == (1 if both else 2)
    assert stock(cluster) == (10 if both else 11)


# -- classes of one's own -----------------------------------------------------------------------------------------------


class ByMapper(PlainSession):
    """Sends parts to another database, and leaves the rest to Session."""

    elsewhere: Engine

    def get_bind(self, mapper: Any = None, *, clause: Any = None, **options: Any) -> Any:
        if mapper is not None and mapper.class_ is Part:
            return self.elsewhere
        return super().get_bind(mapper, clause=clause, **options)


class Mixed(RoutingMixin, ByMapper):
    pass


def test_a_class_chooses_an_engine_by_the_mapper(cluster: PostgresCluster, router: Router, other: Engine) -> None:
    """Statements that the class leaves to Session are routed."""
    with Mixed(router=router) as s:
        s.elsewhere = other
        assert s.scalars(select(Part)).all() == []
        assert len(s.scalars(select(Item)).all()) == 3
        assert place(s) == "reader"
        s.add(Part(id=9))
        s.flush()
        assert place(s) == "reader", "a write to another database moves nothing"
        s.get_one(Item, 1).stock += 1
        s.commit()
        assert [part.id for part in s.scalars(select(Part))] == [9]
    assert stock(cluster) == 11
    assert cluster.execute("SELECT count(*) FROM part") == [(2,)]


def test_a_get_bind_around_the_routing_goes_on_to_work(cluster: PostgresCluster, router: Router, other: Engine) -> None:
    """A subclass of RoutingSession may override get_bind() and call super(); objects of both databases are flushed together."""

    class Around(RoutingSession):
        def get_bind(self, mapper: Any = None, **options: Any) -> Any:
            return other if mapper is not None and inspect(mapper).class_ is Part else super().get_bind(mapper, **options)

    with Around(router=router) as s:
        s.add(Part(id=9))
        s.flush()
        s.connection(bind_arguments={"mapper": Part}).execute(text("UPDATE part SET name = 'x'"))
        assert place(s) == "nowhere"
        s.commit()
        part, item = s.get_one(Part, 9), s.get_one(Item, 1)
        assert place(s) == "reader"
        part.name = item.name = "changed"
        s.commit()
        assert s.get_one(Part, 9).name == s.get_one(Item, 1).name == "changed"


def test_a_class_that_chooses_readers_itself_is_routed(cluster: PostgresCluster, router: Router) -> None:
    """Engines of the router's own database stand for the cluster: a session is never in two transactions of one database."""
    writer, reader = (create_engine(instance.url) for instance in (cluster.writer, cluster.readers[0]))

    class LeaderAndFollower(PlainSession):
        def get_bind(self, mapper: Any = None, clause: Any = None, **options: Any) -> Any:
            return writer if self._flushing or isinstance(clause, Update) else reader

    class Routed(RoutingMixin, LeaderAndFollower):
        pass

    with Routed(router=router) as s:
        s.get_one(Item, 1).name = "flushed"
        assert place(s) == "reader"
        s.flush()
        s.execute(RAISE)
        assert place(s) == "writer"
        s.commit()
        assert s.get_one(Item, 1).stock == 11, "it sees its own writes"
    assert writer.pool.checkedin() == reader.pool.checkedin() == 0, "nobody has used them"


def test_an_engine_with_options_of_its_own_is_used(cluster: PostgresCluster, router: Router) -> None:
    """An engine with execution options may mean another schema of the same database, so it stands only for itself."""
    engine = create_engine(cluster.url)
    tenant = engine.execution_options(schema_translate_map={None: "extra"})

    class OfTenant(PlainSession):
        def get_bind(self, mapper: Any = None, **options: Any) -> Any:
            return tenant

    class Routed(RoutingMixin, OfTenant):
        pass

    cluster.execute("CREATE TABLE IF NOT EXISTS extra.item AS SELECT 7 AS id, 'of the tenant' AS name, 0 AS stock")
    cluster.execute("GRANT ALL ON extra.item TO app")
    with Routed(router=router) as s:
        assert [item.name for item in s.scalars(select(Item))] == ["of the tenant"]
        assert place(s) == "nowhere"
    cluster.execute("DROP TABLE extra.item")
    engine.dispose()


class OfTenant(PlainSession):
    """Sends all tables but `part` to the tenant's schema."""

    def get_bind(self, mapper: Any = None, **options: Any) -> Any:
        engine = super().get_bind(mapper, **options)
        if mapper is not None and inspect(mapper).class_ is Part:
            return engine
        return engine.execution_options(schema_translate_map={None: self.info.get("tenant", "extra")})


class RoutedTenant(RoutingMixin, OfTenant):
    pass


@BOTH
def test_options_that_a_class_gives_the_clusters_engine_count(cluster: PostgresCluster, router: Router) -> None:
    """A class that returns Session's engine with a `schema_translate_map` is routed, and its statements go to that schema."""
    cluster.execute("DROP TABLE IF EXISTS extra.item")
    cluster.execute("CREATE TABLE extra.item AS SELECT id, name, stock FROM item WHERE id < 3")
    cluster.execute("UPDATE extra.item SET name = 'of the tenant'")
    cluster.execute("GRANT ALL ON extra.item TO app")
    cluster.wait_in_sync()
    count = select(func.count()).select_from(Item)
    try:
        with RoutedTenant(router=router) as s:
            item = s.get_one(Item, 1)
            assert (item.name, place(s), s.scalar(count)) == ("of the tenant", "reader", 2)
            assert len(s.scalars(select(Part)).all()) == 2
            assert s.scalar(count) == 2
            item.stock = 99
            s.add_all([Part(id=9), Item(id=9, name="new")])
            s.commit()
            assert s.connection().scalar(count) == 3
            s.rollback()
            s.info["tenant"] = None
            assert s.scalar(count) == 3
            s.info["tenant"] = "extra"
            assert s.scalar(select(Item.stock).where(Item.id == 1)) == 99
        router.run_transaction(lambda: RoutedTenant(router=router), lambda s: s.add(Item(id=10)), commit_check=None)
        with router.begin() as connection, RoutedTenant(router=router, bind=connection) as s:
            assert s.scalar(count) == 4
        assert (stock(cluster), cluster.execute("SELECT count(*) FROM item")) == (10, [(3,)])
        assert cluster.execute("SELECT id FROM extra.item ORDER BY id") == [(1,), (2,), (9,), (10,)]
        assert cluster.execute("SELECT count(*) FROM part") == [(3,)]
    finally:
        cluster.execute("DROP TABLE extra.item")


@BOTH
def test_a_class_may_look_at_the_engine_that_session_gives(cluster: PostgresCluster, router: Router) -> None:
    """The engine that Session gives has the cluster's URL, dialect and options, but refuses to connect."""
    engines: list[Engine] = []

    class Looks(PlainSession):
        def get_bind(self, mapper: Any = None, **options: Any) -> Any:
            assert isinstance(self.bind, Engine)
            assert self.bind.dialect.name == core_of(router).writer_engine().dialect.name
            engine = super().get_bind(mapper, **options)
            assert isinstance(engine, Engine)
            engines.append(engine)
            return engine

    class Routed(RoutingMixin, Looks):
        pass

    with Routed(router=router) as s:
        assert s.get_one(Item, 1).stock == 10
        assert place(s) == "reader"
        assert s.bind is None
    assert (engines[0].url.database, engines[0].get_execution_options()) == ("app", {})
    with pytest.raises(ConfigurationError, match="never connects"):
        engines[0].connect()


def test_an_isolation_level_from_get_bind_is_refused(router: Router) -> None:
    """An isolation level of get_bind() is refused, because it comes when the transaction has begun.

    A level that the router has from its own options does not count as the class's.
    """

    class Strict(PlainSession):
        def get_bind(self, mapper: Any = None, **options: Any) -> Any:
            return super().get_bind(mapper, **options).execution_options(isolation_level="SERIALIZABLE")

    class Routed(RoutingMixin, Strict):
        pass

    with Routed(router=router) as s, pytest.raises(ConfigurationError, match="chooses an isolation_level"):
        s.scalars(select(Item)).all()


# -- what cannot be had -------------------------------------------------------------------------------------------------


def test_a_mixin_that_comes_after_the_session_is_refused() -> None:
    """RoutingMixin must come first, because otherwise Session's methods hide its own and nothing is routed."""
    with pytest.raises(ConfigurationError, match="Late: RoutingMixin comes first"):

        class Late(PlainFlaskSession, RoutingMixin):
            pass


def test_a_sharded_session_is_refused_when_it_is_defined() -> None:
    """A ShardedSession is refused: it asks for an engine for each row, and a cluster can stand for none."""
    with pytest.raises(ConfigurationError, match="Sharded: a ShardedSession"):

        class Sharded(RoutingMixin, ShardedSession):
            pass


def test_a_plain_routing_session_is_asked_nothing_more(router: Router) -> None:
    """A plain RoutingSession does not pay for the checks that session classes of one's own need."""
    with sessions(router)() as s:
        assert not s._elsewhere
        assert not s.spans_databases


def test_two_phases_span_both_databases(cluster: PostgresCluster, router: Router) -> None:
    """A session with twophase=True prepares in both databases before it commits in either."""
    cluster.execute("CREATE DATABASE beside OWNER app")
    beside = create_engine(make_url(cluster.url).set(database="beside"))
    with beside.begin() as connection:
        connection.execute(text("CREATE TABLE part (id bigint PRIMARY KEY, item_id bigint, name text)"))
    try:
        with Mixed(router=router, twophase=True) as s:
            s.elsewhere = beside
            s.add_all([Part(id=9), Item(id=9)])
            s.prepare()
            assert cluster.execute("SELECT count(*) FROM pg_prepared_xacts") == [(2,)]
            s.commit()
            assert s.get_one(Part, 9).name == ""
            assert s.get_one(Item, 9).stock == 0
        assert cluster.execute("SELECT count(*) FROM part WHERE id = 9") == [(0,)]
    finally:
        beside.dispose()
        cluster.execute("DROP DATABASE beside")
