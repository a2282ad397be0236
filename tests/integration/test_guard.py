"""Stale reads lose no updates, because the guard looks a reader's rows up on the writer before they are written."""

from __future__ import annotations

import itertools
import pickle
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from decimal import Decimal
from typing import Any

import pytest
from sqlalchemy import (
    ARRAY,
    JSON,
    Double,
    ForeignKey,
    Numeric,
    PickleType,
    String,
    TypeDecorator,
    bindparam,
    create_engine,
    delete,
    event,
    func,
    select,
    text,
    update,
)
from sqlalchemy.engine import Dialect, Engine
from sqlalchemy.exc import PendingRollbackError, SAWarning
from sqlalchemy.ext.mutable import MutableDict
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    ORMExecuteState,
    column_property,
    load_only,
    make_transient,
    make_transient_to_detached,
    mapped_column,
    relationship,
)
from sqlalchemy.orm import Session as PlainSession

from aurora_router import (
    ConfigurationError,
    Failure,
    ReadOnlyViolation,
    Reason,
    Router,
    RoutingSession,
    StaleRead,
    classify_error,
)
from aurora_router.core import events
from aurora_router.local import FaultProxy
from aurora_router.local.cluster import Cluster
from aurora_router.stale_writes import MARK
from tests.integration.shop import BOTH, Item, Part, eventually, place, sessions, stock, through, until_readers_serve
from tests.integration.shop import engine as engine_of
from tests.integration.shop import family as family_of

pytestmark = BOTH
POSTGRESQL = pytest.mark.engines("postgresql")

MakeRouter = Callable[..., Router]
LOOK = "FOR UPDATE"


class Base(DeclarativeBase):
    pass


class Kit(Base):
    """A primary key of two columns."""

    __tablename__ = "kit"
    a: Mapped[int] = mapped_column(primary_key=True)
    b: Mapped[str] = mapped_column(String(9), primary_key=True)
    stock: Mapped[int]


class Animal(Base):
    __tablename__ = "animal"
    id: Mapped[int] = mapped_column(primary_key=True)
    kind: Mapped[str] = mapped_column(String(9))
    name: Mapped[str] = mapped_column(String(9))
    weight: Mapped[int | None]
    __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "animal"}


class Dog(Animal):
    """A class with a table of its own besides its parent's."""

    __tablename__ = "dog"
    id: Mapped[int] = mapped_column(ForeignKey("animal.id"), primary_key=True)
    tricks: Mapped[int]
    __mapper_args__ = {"polymorphic_identity": "dog"}


class Cat(Animal):
    """A class in its parent's table."""

    __mapper_args__ = {"polymorphic_identity": "cat"}


class Versioned(Base):
    __tablename__ = "versioned"
    id: Mapped[int] = mapped_column(primary_key=True)
    stock: Mapped[int]
    version: Mapped[int] = mapped_column()
    __mapper_args__ = {"version_id_col": version}


class Opaque:
    """A value that is equal to nothing but itself, and cannot be pickled."""

    def __init__(self, word: str) -> None:
        self.word = word
        self.lock = threading.Lock()


class OpaqueType(TypeDecorator[Opaque]):
    impl = String(9)
    cache_ok = True

    def process_bind_param(self, value: Opaque | None, dialect: Dialect) -> str | None:
        return None if value is None else value.word

    def process_result_value(self, value: str | None, dialect: Dialect) -> Opaque | None:
        return None if value is None else Opaque(value)


class SealedType(OpaqueType):
    """A type that sends something else each time, as any encryption with a nonce does."""

    cache_ok = True
    nonces = itertools.count()

    def process_bind_param(self, value: Opaque | None, dialect: Dialect) -> str | None:
        return None if value is None else f"{value.word[0]}{next(self.nonces)}"


class ForeignType(OpaqueType):
    """The type of a column that another service fills."""

    cache_ok = True

    def process_bind_param(self, value: Opaque | None, dialect: Dialect) -> str | None:
        if value is not None:
            raise TypeError("this service does not write it")
        return None


class Odd(Base):
    """Values that are hard to compare."""

    __tablename__ = "odd"
    id: Mapped[int] = mapped_column(primary_key=True)
    stock: Mapped[int]
    real: Mapped[float | None] = mapped_column(Double)
    exact: Mapped[Decimal | None] = mapped_column(Numeric(9, 2))
    raw: Mapped[bytes | None]
    moment: Mapped[datetime | None]
    reals: Mapped[list[float] | None] = mapped_column(ARRAY(Double).with_variant(JSON(), "mysql", "mariadb"))
    thing: Mapped[Any | None] = mapped_column(PickleType, nullable=True)
    opaque: Mapped[Opaque | None] = mapped_column(OpaqueType)
    sealed: Mapped[Opaque | None] = mapped_column(SealedType)
    filled_elsewhere: Mapped[Opaque | None] = mapped_column(ForeignType)
    plain: Mapped[dict[str, Any] | None] = mapped_column(JSON)
    tracked: Mapped[dict[str, Any] | None] = mapped_column(MutableDict.as_mutable(JSON))
    essay: Mapped[str | None] = mapped_column(String(9), deferred=True)


Odd.twice = column_property(Odd.stock * 2)  # type: ignore[attr-defined]


class Line(Base):
    """A many-to-one without the other direction."""

    __tablename__ = "line"
    id: Mapped[int] = mapped_column(primary_key=True)
    order_id: Mapped[int | None] = mapped_column(ForeignKey("purchase.id"))
    note: Mapped[str] = mapped_column(String(9))


class Purchase(Base):
    """An order whose total is kept by a trigger."""

    __tablename__ = "purchase"
    id: Mapped[int] = mapped_column(primary_key=True)
    total: Mapped[int]
    state: Mapped[str] = mapped_column(String(9))
    lines: Mapped[list[Line]] = relationship()


class Shelf(Base):
    """A shelf whose new name the database carries over to its boxes."""

    __tablename__ = "shelf"
    name: Mapped[str] = mapped_column(String(9), primary_key=True)
    boxes: Mapped[list[Box]] = relationship(passive_updates=True, order_by="Box.id")


class Box(Base):
    __tablename__ = "box"
    id: Mapped[int] = mapped_column(primary_key=True)
    shelf_name: Mapped[str | None] = mapped_column(ForeignKey("shelf.name", onupdate="CASCADE"))
    weight: Mapped[int] = mapped_column(default=0)


class Thing:
    """A value that is equal to nothing but itself."""


@contextmanager
def raises_stale(entity: str, key: int) -> Iterator[None]:
    """Expect a StaleRead of this object, and of no other."""
    with pytest.raises(StaleRead, match=f"object of {entity} ") as caught:
        yield
    assert caught.value.key == (key,)


TRIGGER = {
    "postgresql": [
        "CREATE OR REPLACE FUNCTION extra.add_up() RETURNS trigger LANGUAGE plpgsql AS "
        "'BEGIN UPDATE purchase SET total = total + 1 WHERE id = NEW.order_id; RETURN NEW; END'",
        "CREATE TRIGGER add_up AFTER INSERT ON line FOR EACH ROW EXECUTE FUNCTION extra.add_up()",
    ],
    "mysql": [
        "CREATE TRIGGER add_up AFTER INSERT ON line FOR EACH ROW UPDATE purchase SET total = total + 1 WHERE id = NEW.order_id"
    ],
}
IMPATIENT = {"postgresql": "SET lock_timeout = '50ms'", "mysql": "SET innodb_lock_wait_timeout = 1"}
MONITOR = ("pg_is_in_recovery", "pg_proc", "@@version", "SHOW ALL SLAVES", "SHOW REPLICA", "information_schema.routines")


@pytest.fixture
def cluster(cluster: Cluster[Any]) -> Cluster[Any]:
    """The shared cluster, with the tables of this module on all of its readers."""
    engine = create_engine(cluster.url)
    Base.metadata.drop_all(engine)
    Base.metadata.create_all(engine)
    with PlainSession(engine) as s, s.begin():
        s.add_all(
            [
                Kit(a=1, b="x", stock=10),
                Kit(a=1, b="y", stock=20),
                Dog(id=1, name="Rex", tricks=1),
                Cat(id=2, name="Tom", weight=4),
                Versioned(id=1, stock=10),
                Odd(id=1, stock=1, thing=None, plain={"n": 1}, tracked={"n": 1}, essay="long"),
                Purchase(id=1, total=0, state="open"),
                *(Line(id=number, note=note) for number, note in enumerate(("first", "second", "third"), 1)),
                Shelf(name="old", boxes=[Box(id=number) for number in (1, 2, 3)]),
            ]
        )
    engine.dispose()
    on_the_writer(cluster, *TRIGGER[family_of(cluster)])
    with Router(cluster.url) as router:
        router.init_commit_table()
    cluster.wait_in_sync()
    return cluster


@pytest.fixture
def router(cluster: Cluster[Any], proxy: FaultProxy, make_router: MakeRouter, heard: list[events.Event]) -> Router:
    """A router of the writer, through the proxy, and of one reader whose replay is paused."""
    return late(cluster, proxy, make_router, heard)


def late(cluster: Cluster[Any], proxy: FaultProxy, make_router: MakeRouter, heard: list[events.Event], **options: Any) -> Router:
    router = make_router(through(proxy, cluster), instances=[cluster.readers[0].address], listeners=[heard.append], **options)
    until_readers_serve(router, 1)
    with sessions(router)() as s:
        s.connection()  # opens the connection before statements are counted
    cluster.pause_replay(cluster.readers[0])
    return router


def on_the_writer(cluster: Cluster[Any], *statements: str) -> None:
    """Execute statements of another client, which a paused reader does not know."""
    for statement in statements:
        cluster.execute(statement)


def sent(proxy: FaultProxy, work: Callable[[], object]) -> list[str]:
    """The first words of the statements that the work sends to the writer, each once in a row.

    The monitor's questions are left out, and so is BEGIN, which PyMySQL never sends.
    """
    before = len(proxy.statements)
    work()
    asked = [text for text in proxy.statements[before:] if not any(part in text for part in ("BEGIN", *MONITOR))]
    return [word for word, _ in itertools.groupby(LOOK if looks(text) else text.split()[0] for text in asked)]


def looks(text: str) -> bool:
    """Whether the statement looks rows up, and locks them."""
    return "FOR NO KEY UPDATE" in text or LOOK in text


@pytest.fixture
def engine(cluster: Cluster[Any], proxy: FaultProxy) -> Iterator[Engine]:
    """A plain engine to the writer, not one of the router's."""
    engine = create_engine(through(proxy, cluster))
    yield engine
    engine.dispose()


def marked(instance: object) -> bool:
    return MARK in instance._sa_instance_state.info  # type: ignore[attr-defined]


# -- the anomaly ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guarded", [False, True], ids=["guard off", "guard on"])
def test_the_guard_keeps_increments_that_late_readers_lose(cluster: Cluster[Any], make_router: MakeRouter, guarded: bool) -> None:
    """Increments of values from a late reader are all there with the guard, and some are lost without it."""
    for reader in cluster.readers:
        cluster.set_lag(reader, 0.3)
    router = make_router(stale_write_guard=guarded)
    until_readers_serve(router, 2)
    Session = sessions(router)
    errors: list[BaseException] = []

    def increment(s: RoutingSession, number: int) -> None:
        s.get_one(Item, number).stock += 1

    def work(number: int) -> None:
        try:
            for turn in range(10):
                router.run_transaction(Session, lambda s, n=turn: increment(s, (number + n) % 3 + 1))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    ((total,),) = cluster.execute("SELECT sum(stock) FROM item")
    if guarded:
        assert total == 60 + 80
    else:
        assert total < 60 + 80


def test_a_unit_that_read_stale_rows_is_run_again_on_the_writer(
    cluster: Cluster[Any], router: Router, heard: list[events.Event]
) -> None:
    on_the_writer(cluster, "UPDATE item SET stock = 50 WHERE id = 1")
    seen: list[tuple[int, str]] = []

    def increment(s: RoutingSession) -> None:
        item = s.get_one(Item, 1)
        seen.append((item.stock, place(s)))
        item.stock += 1

    heard.clear()
    router.run_transaction(sessions(router), increment)
    assert seen == [(10, "reader"), (50, "writer")]
    assert stock(cluster) == 51
    assert [e.error for e in heard if isinstance(e, events.RunAgain)] == ["StaleRead"]
    assert [e.reason for e in heard if isinstance(e, events.Routed)][-1] is Reason.STALE_READ
    assert not [e for e in heard if isinstance(e, events.RetriesRefused)]


def test_stale_rows_are_locked_before_the_unit_runs_again(cluster: Cluster[Any], proxy: FaultProxy, router: Router) -> None:
    """Rows that were read stale are locked before the unit runs again.

    So the second run succeeds, and has nothing to check.
    """
    on_the_writer(cluster, "UPDATE item SET stock = 50")
    runs: list[int] = []

    def increment(s: RoutingSession) -> None:
        items = s.scalars(select(Item).where(Item.id < 3).order_by(Item.id)).all()
        runs.append(items[0].stock)
        if len(runs) == 2:
            with cluster.writer.connect(autocommit=True) as other:
                cursor = other.cursor()
                cursor.execute(IMPATIENT[family_of(cluster)])
                with pytest.raises(Exception, match=r"(?i)lock (wait )?timeout"):
                    cursor.execute("UPDATE item SET stock = 99 WHERE id = 2")
        for item in items:
            item.stock += 1

    texts = sent(proxy, lambda: router.run_transaction(sessions(router), increment, commit_check=None))
    assert runs == [10, 50]
    assert texts == [LOOK, "ROLLBACK", LOOK, "SELECT", "UPDATE", "COMMIT"]
    assert cluster.execute("SELECT stock FROM item ORDER BY id") == [(51,), (51,), (50,)]


def test_a_run_that_takes_another_way_loses_nothing_either(cluster: Cluster[Any], router: Router) -> None:
    """A run that takes another way the second time loses nothing either."""
    on_the_writer(cluster, "UPDATE item SET stock = 50 WHERE id = 1")
    runs: list[int] = []

    def increment(s: RoutingSession) -> None:
        runs.append(len(runs) + 1)
        item = s.get_one(Item, min(runs[-1], 2))
        before = item.stock
        if runs[-1] == 2:
            on_the_writer(cluster, "UPDATE item SET stock = 60 WHERE id = 2")
        item.stock = before + 1

    router.run_transaction(sessions(router), increment)
    assert runs == [1, 2, 3]
    assert cluster.execute("SELECT stock FROM item WHERE id < 3 ORDER BY id") == [(50,), (61,)]


def test_a_units_own_trigger_changes_do_not_retry_for_ever(cluster: Cluster[Any], router: Router) -> None:
    """Changes by the unit's own statements and triggers are not taken for those of others for ever."""
    runs: list[int] = []

    def order(s: RoutingSession) -> None:
        purchase = s.get_one(Purchase, 1)
        runs.append(purchase.total)
        s.add(Line(id=10 + len(runs), order_id=1, note=""))
        s.flush()  # the trigger changes the total
        purchase.state = "paid"

    router.run_transaction(sessions(router), order)
    assert runs == [0, 0]
    assert cluster.execute("SELECT total, state FROM purchase") == [(1, "paid")]


def test_a_trigger_in_a_flush_may_change_checked_rows(cluster: Cluster[Any], router: Router) -> None:
    """A trigger of the same flush may change rows that have been checked already."""
    with sessions(router)() as s:
        purchase = s.get_one(Purchase, 1)
        s.add(Line(id=10, order_id=1, note=""))
        purchase.state = "paid"
        s.commit()
    assert cluster.execute("SELECT total, state FROM purchase") == [(1, "paid")]


# -- what it costs ----------------------------------------------------------------------------------------------------


def test_the_guard_adds_one_round_trip_to_a_flush_that_it_checks(
    cluster: Cluster[Any], proxy: FaultProxy, make_router: MakeRouter, heard: list[events.Event]
) -> None:
    trips: dict[bool, int] = {}
    for guarded in (False, True):
        router = late(cluster, proxy, make_router, heard, stale_write_guard=guarded, probe_interval=3600)
        with sessions(router)() as s:
            item = s.scalars(select(Item)).all()[0]
            assert place(s) == "reader"
            item.stock += 1
            before = proxy.round_trips
            texts = sent(proxy, s.commit)
            trips[guarded] = proxy.round_trips - before
            cluster.resume_replay(cluster.readers[0])
            cluster.wait_in_sync()
            assert texts == [*([LOOK] if guarded else []), "UPDATE", "COMMIT"]
        router.close()
    assert trips[True] == trips[False] + 1


def test_a_flush_looks_once_for_each_mapper(proxy: FaultProxy, router: Router) -> None:
    with sessions(router)() as s:
        for instance in (*s.scalars(select(Item)).all(), *s.scalars(select(Kit)).all()):
            instance.stock += 1
        looked = len([text for text in proxy.statements if looks(text)])
        assert sent(proxy, s.flush) == [LOOK, "UPDATE"]
        assert len([text for text in proxy.statements if looks(text)]) - looked == 2
        s.get_one(Item, 1).stock += 1
        assert sent(proxy, s.flush) == ["UPDATE"], "what was looked at is locked"
        s.get_one(Kit, (1, "x")).stock += 1
        assert sent(proxy, s.commit) == ["UPDATE", "COMMIT"]


def test_what_was_read_on_the_writer_costs_nothing(proxy: FaultProxy, router: Router) -> None:
    with sessions(router, read_only=False)() as s:
        s.get_one(Item, 1).stock += 1
        assert sent(proxy, s.commit) == ["UPDATE", "COMMIT"]
    with sessions(router)() as s:
        s.get_one(Item, 2)
        s.execute(text("SELECT 1 FOR UPDATE"))
        s.get_one(Item, 1).stock += 1
        assert sent(proxy, s.commit) == ["UPDATE", "COMMIT"], "whatever the unit has read on a reader before"
    with sessions(router)() as s:
        s.get_one(Item, 1, with_for_update=True).stock += 1
        assert sent(proxy, s.commit) == ["UPDATE", "COMMIT"]


def test_what_is_not_changed_costs_nothing(proxy: FaultProxy, router: Router) -> None:
    with sessions(router)() as s:
        item = s.get_one(Item, 1)
        item.parts.append(Part(id=9))
        s.add(Item(id=9))
        assert sent(proxy, s.commit) == ["INSERT", "COMMIT"]


def set_the_value_shown(s: RoutingSession) -> None:
    s.get_one(Item, 1).stock = 10


def set_the_reference_shown(s: RoutingSession) -> None:
    s.get_one(Part, 1).item = s.get_one(Item, 1)


def add_the_member_shown(s: RoutingSession) -> None:
    item = s.get_one(Item, 1)
    item.parts.append(s.get_one(Part, 1))


def set_the_value_shown_beside_a_version(s: RoutingSession) -> None:
    s.get_one(Versioned, 1).stock = 10


@pytest.mark.parametrize(
    ("work", "meanwhile", "asked", "left"),
    [
        (set_the_value_shown, "UPDATE item SET stock = 50 WHERE id = 1", "SELECT stock FROM item WHERE id = 1", 10),
        (set_the_reference_shown, "UPDATE part SET item_id = 2 WHERE id = 1", "SELECT item_id FROM part WHERE id = 1", 1),
        (add_the_member_shown, "UPDATE part SET item_id = 2 WHERE id = 1", "SELECT item_id FROM part WHERE id = 1", 1),
        (
            set_the_value_shown_beside_a_version,
            "UPDATE versioned SET stock = 50, version = 2",
            "SELECT stock FROM versioned",
            10,
        ),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_value_that_a_late_reader_shows_already_is_written(
    cluster: Cluster[Any],
    router: Router,
    work: Callable[[RoutingSession], None],
    meanwhile: str,
    asked: str,
    left: int,
) -> None:
    """An assignment that seems to change nothing is checked, because the writer may have another value."""
    on_the_writer(cluster, meanwhile)
    runs: list[int] = []

    def assign(s: RoutingSession) -> None:
        runs.append(1)
        work(s)

    with sessions(router)() as s:
        work(s)
        with pytest.raises(StaleRead):
            s.commit()
    router.run_transaction(sessions(router), assign)
    assert cluster.execute(asked) == [(left,)]
    assert len(runs) == 2


def test_mappers_with_version_counters_cost_nothing(cluster: Cluster[Any], proxy: FaultProxy, router: Router) -> None:
    """Mappers that count versions cost nothing and look after themselves."""
    with sessions(router)() as s:
        s.get_one(Versioned, 1).stock += 1
        assert sent(proxy, s.commit) == ["UPDATE", "COMMIT"]


def test_sessions_of_others_are_left_alone(cluster: Cluster[Any], proxy: FaultProxy, router: Router, engine: Engine) -> None:
    on_the_writer(cluster, "UPDATE item SET stock = 50 WHERE id = 1")
    with PlainSession(engine) as s:
        item = s.get_one(Item, 1)
        item.stock += 1
        assert sent(proxy, s.flush) == ["UPDATE"]
        assert not marked(item)
    with PlainSession(engine) as s, sessions(router)() as ours:
        item = ours.get_one(Item, 1)
        ours.expunge(item)
        s.add(item)
        item.stock += 1
        assert sent(proxy, s.commit)[:2] == ["UPDATE", "COMMIT"]
    with router.connect() as connection, PlainSession(connection) as s:
        s.get_one(Item, 1).stock += 1
        assert sent(proxy, s.flush) == ["UPDATE"], "on a connection of the router's, too"


# -- what it finds ----------------------------------------------------------------------------------------------------


def change(instance: Any) -> None:
    instance.stock += 1


@pytest.mark.parametrize(
    ("cls", "key", "happens", "does", "columns"),
    [
        (Item, 1, "UPDATE item SET stock = 50 WHERE id = 1", change, ("stock",)),
        (Item, 1, "UPDATE item SET name = 'x' WHERE id = 1", change, ("name",)),
        (Item, 3, "DELETE FROM item WHERE id = 3", change, ()),
        (Item, 3, "UPDATE item SET stock = 50 WHERE id = 3", "delete", ("stock",)),
        (Item, 3, "DELETE FROM item WHERE id = 3", "delete", ()),
        (Kit, (1, "y"), "UPDATE kit SET stock = 50 WHERE b = 'y'", change, ("stock",)),
        (Kit, (1, "y"), "DELETE FROM kit WHERE b = 'y'", change, ()),
        (Dog, 1, "UPDATE dog SET tricks = 5", lambda dog: setattr(dog, "name", "Max"), ("tricks",)),
        (Dog, 1, "UPDATE animal SET name = 'Bob' WHERE id = 1", lambda dog: setattr(dog, "tricks", 2), ("name",)),
        (Animal, 1, "UPDATE animal SET name = 'Bob' WHERE id = 1", lambda dog: setattr(dog, "tricks", 2), ("name",)),
        (Cat, 2, "UPDATE animal SET weight = 9 WHERE id = 2", lambda cat: setattr(cat, "name", "Kit"), ("weight",)),
        (Odd, 1, "UPDATE odd SET exact = 0", change, ("exact",)),
        (Odd, 1, "UPDATE odd SET plain = '{}'", change, ("plain",)),
    ],
)
def test_a_row_that_is_another_on_the_writer_is_not_written(
    cluster: Cluster[Any], router: Router, cls: type[Any], key: Any, happens: str, does: Any, columns: tuple[str, ...]
) -> None:
    with sessions(router)() as s:
        found = s.get_one(cls, key)
        assert place(s) == "reader"
        on_the_writer(cluster, happens)
        if does == "delete":
            s.delete(found)
        else:
            does(found)
        with pytest.raises(StaleRead) as caught:
            s.commit()
    assert caught.value.entity == type(found).__name__
    assert caught.value.key == (key if isinstance(key, tuple) else (key,))
    assert caught.value.columns == columns


def test_the_error_names_what_was_stale_and_no_value(cluster: Cluster[Any], router: Router) -> None:
    on_the_writer(cluster, "UPDATE item SET stock = 4711, name = 'secret'")
    with sessions(router)() as s:
        for item in s.scalars(select(Item).order_by(Item.id)):
            item.stock = 815
        with pytest.raises(StaleRead, match=r"object of Item \(and 2 more\) .*name, stock .*run_transaction") as caught:
            s.flush()
        assert not any(value in str(caught.value) for value in ("4711", "815", "secret"))
        known = classify_error(caught.value)
        assert known == (Failure.SERIALIZATION, True, True, True)
        with pytest.raises(Exception, match="rolled back"):
            s.scalar(select(Item.stock))
        s.rollback()
        assert s.get_one(Item, 1).stock == 4711, "the session goes on, and reads nothing any more that is as old as that"


def test_a_unit_that_swallows_it_is_run_again_all_the_same(cluster: Cluster[Any], router: Router) -> None:
    on_the_writer(cluster, "UPDATE item SET stock = 50 WHERE id = 1")

    def swallows(s: RoutingSession) -> None:
        s.get_one(Item, 1).stock += 1
        try:
            s.flush()
        except StaleRead:
            return

    router.run_transaction(sessions(router), swallows)
    assert stock(cluster) == 51


def test_a_difference_in_what_was_not_loaded_is_none(cluster: Cluster[Any], router: Router) -> None:
    on_the_writer(cluster, "UPDATE item SET name = 'x'", "UPDATE odd SET essay = 'longer'")
    with sessions(router)() as s:
        s.scalars(select(Item).where(Item.id == 1).options(load_only(Item.stock))).one().stock += 1
        s.get_one(Odd, 1).stock += 1
        item = s.get_one(Item, 2, options=[load_only(Item.stock)])
        item.name = "set, and never seen"
        s.commit()
    assert cluster.execute("SELECT name, stock FROM item WHERE id < 3 ORDER BY id") == [("x", 11), ("set, and never seen", 20)]
    cluster.resume_replay(cluster.readers[0])
    cluster.wait_in_sync()
    cluster.pause_replay(cluster.readers[0])
    on_the_writer(cluster, "UPDATE odd SET essay = 'longest'")
    with sessions(router)() as s:
        odd = s.get_one(Odd, 1)
        assert odd.essay == "longer"
        odd.stock += 1
        with pytest.raises(StaleRead, match="essay"):
            s.flush()


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("real", 0.1 + 0.2),
        ("exact", Decimal("1.10")),
        ("raw", b"\x00\xff"),
        ("moment", datetime(2024, 2, 29, 12)),
        ("thing", Thing()),
        ("opaque", Opaque("word")),
        ("plain", {"b": [1, {"c": None}], "a": 1.5}),
        ("plain", None),
        ("tracked", {"n": [1, 2]}),
    ],
)
def test_values_that_are_hard_to_compare_are_found_equal(cluster: Cluster[Any], router: Router, column: str, value: Any) -> None:
    """Values that are hard to compare are the same if they have not changed."""
    cluster.resume_replay(cluster.readers[0])
    with sessions(router)() as s:
        s.execute(update(Odd).values({column: value}))
        s.commit()
    cluster.wait_in_sync()
    cluster.pause_replay(cluster.readers[0])
    with sessions(router)() as s:
        odd = s.get_one(Odd, 1)
        assert place(s) == "reader"
        assert marked(odd)
        odd.stock += 1
        s.commit()


@POSTGRESQL
@pytest.mark.parametrize(
    ("column", "value"),
    [("real", float("nan")), ("exact", Decimal("NaN")), ("reals", [1.0, float("nan"), 3.0]), ("reals", [])],
)
def test_values_only_postgresql_has_are_found_equal(cluster: Cluster[Any], router: Router, column: str, value: Any) -> None:
    """Values that only PostgreSQL has are the same if they have not changed."""
    test_values_that_are_hard_to_compare_are_found_equal(cluster, router, column, value)


@pytest.mark.parametrize("column", ["sealed", "filled_elsewhere"])
def test_values_that_nothing_can_compare_are_no_stale_read(cluster: Cluster[Any], router: Router, column: str) -> None:
    """A value that differs from itself when read twice proves nothing. The columns beside it are compared, and so is NULL."""
    cluster.resume_replay(cluster.readers[0])
    on_the_writer(cluster, f"UPDATE odd SET {column} = 'word'")
    cluster.wait_in_sync()
    cluster.pause_replay(cluster.readers[0])
    for stale in (None, f"UPDATE odd SET {column} = NULL", f"UPDATE odd SET {column} = 'word', stock = 7"):
        with sessions(router)() as s:
            odd = s.get_one(Odd, 1)
            assert place(s) == "reader"
            odd.plain = {"n": 2}
            if stale is None:
                s.flush()
                continue
            on_the_writer(cluster, stale)
            with pytest.raises(StaleRead, match="stock" if "stock" in stale else column):
                s.flush()


def test_a_column_changed_in_place_is_not_compared(cluster: Cluster[Any], router: Router) -> None:
    """A column that was changed in place is not compared, and the columns beside it are."""
    with sessions(router)() as s:
        odd = s.get_one(Odd, 1)
        odd.tracked["n"] = 2
        s.commit()
        assert s.scalar(select(Odd.tracked)) == {"n": 2}
    with sessions(router)() as s:
        odd = s.get_one(Odd, 1)
        odd.tracked["n"] = 3
        on_the_writer(cluster, "UPDATE odd SET stock = 7")
        with pytest.raises(StaleRead):
            s.commit()


# -- where objects come from ------------------------------------------------------------------------------------------


def test_the_mark_follows_an_object_to_another_session(cluster: Cluster[Any], router: Router) -> None:
    """The mark goes along with an object that another session writes."""
    on_the_writer(cluster, "UPDATE item SET stock = 50 WHERE id = 1")
    for read_only in (None, False):
        with sessions(router)() as s:
            item = s.get_one(Item, 1)
        with sessions(router, read_only=read_only)() as s:
            s.add(item)
            item.stock += 1
            with pytest.raises(StaleRead):
                s.flush()
        with sessions(router)() as s:
            item = pickle.loads(pickle.dumps(s.get_one(Item, 1)))
        with sessions(router, read_only=read_only)() as s:
            s.add(item)
            item.stock += 1
            with pytest.raises(StaleRead):
                s.flush()
    assert stock(cluster) == 50


def test_an_object_from_an_earlier_unit_is_checked_when_written(cluster: Cluster[Any], proxy: FaultProxy, router: Router) -> None:
    """An object that outlives its unit is checked in the unit that writes it."""
    with sessions(router, expire_on_commit=False)() as s:
        item = s.get_one(Item, 1)
        s.commit()
        on_the_writer(cluster, "UPDATE item SET stock = 50 WHERE id = 1")
        item.stock += 1
        with pytest.raises(StaleRead):
            s.commit()
        s.rollback()
        s.refresh(item, with_for_update=True)
        assert not marked(item), "all of it was read on the writer"
        item.stock += 1
        assert sent(proxy, s.commit) == ["UPDATE", "COMMIT"]
    assert stock(cluster) == 51


def test_an_object_that_expired_is_as_fresh_as_what_is_read_next(
    cluster: Cluster[Any], proxy: FaultProxy, router: Router, make_router: MakeRouter, heard: list[events.Event]
) -> None:
    with sessions(router)() as s:
        item = s.get_one(Item, 1)
        s.commit()
        s.connection()
        assert item.stock == 10
        assert not marked(item)
        item.stock += 1
        assert sent(proxy, s.commit) == ["UPDATE", "COMMIT"]
    # With any other consistency a session that has read on the writer does not go back to a late reader.
    eventual = late(cluster, proxy, make_router, heard, consistency="eventual")
    with sessions(eventual)() as s:
        item = s.get_one(Item, 2, execution_options={"route": "writer"})
        s.commit()
        assert not marked(item)
        assert item.stock == 20
        assert place(s) == "reader"
        assert marked(item)
        on_the_writer(cluster, "UPDATE item SET stock = 50 WHERE id = 2")
        item.stock += 1
        with pytest.raises(StaleRead):
            s.commit()
    with sessions(router)() as s:
        item = s.get_one(Item, 1)
        s.connection()
        s.refresh(item, ["name"])
        assert marked(item), "there is still what the reader has shown"
        s.refresh(item, ["stock"])
        s.refresh(item, ["id", "stock", "name"])
        assert not marked(item)


def test_rows_read_on_after_the_move_are_still_a_readers(cluster: Cluster[Any], router: Router) -> None:
    """Rows of a reader that are fetched after the unit has moved are still a reader's."""
    on_the_writer(cluster, "UPDATE item SET stock = 50")
    with sessions(router)() as s:
        rows = s.scalars(select(Item).order_by(Item.id))
        first = next(rows)
        s.connection()
        second = next(rows)
        assert (first.stock, second.stock) == (10, 20)
        assert marked(first)
        assert marked(second)
        kit = s.get_one(Kit, (1, "x"))
        assert not marked(kit)
        second.stock += 1
        with raises_stale("Item", 2):
            s.flush()


def test_a_merged_object_is_checked_by_what_it_was_merged_into(cluster: Cluster[Any], proxy: FaultProxy, router: Router) -> None:
    with sessions(router)() as s:
        kept = s.get_one(Item, 1)
        assert s.merge(Item(id=1, stock=11)) is kept
        assert sent(proxy, s.commit) == [LOOK, "UPDATE", "COMMIT"]
        on_the_writer(cluster, "UPDATE item SET stock = 50 WHERE id = 2")
    with sessions(router)() as s:
        kept = s.get_one(Item, 2)
        assert s.merge(Item(id=2, stock=21)) is kept
        with pytest.raises(StaleRead):
            s.commit()


def test_a_merge_that_changes_nothing_locks_nothing(router: Router) -> None:
    """Two open sessions may merge the same unchanged object: nothing is sent for it, so neither waits for the other."""
    with sessions(router)() as one, sessions(router)() as two:
        for s in (one, two):
            kept = s.get_one(Item, 1)
            assert s.merge(Item(id=1, stock=10)) is kept
            s.execute(
                text("SET lock_timeout = 5000" if s.get_bind().dialect.name == "postgresql" else "SET lock_wait_timeout = 5")
            )
            s.flush()


@pytest.mark.parametrize("merge", [name for name in ("merge", "merge_all") if hasattr(PlainSession, name)])
def test_a_merge_loads_on_the_writer(cluster: Cluster[Any], proxy: FaultProxy, router: Router, merge: str) -> None:
    """A merge loads on the writer, so it takes no row for new that a late reader has not got."""
    on_the_writer(cluster, "UPDATE item SET stock = 50 WHERE id = 1")
    with sessions(router)() as s:
        new = Item(id=9, stock=1)
        s.add(new)
        s.commit()
    for given in (new, Item(id=1, stock=10)):
        with sessions(router)() as s:
            s.scalar(select(Item.id))
            assert place(s) == "reader"
            getattr(s, merge)([given] if merge == "merge_all" else given)
            assert place(s) == "writer"
            assert LOOK not in sent(proxy, s.commit)
    assert cluster.execute("SELECT id, stock FROM item WHERE id IN (1, 9) ORDER BY id") == [(1, 10), (9, 1)]
    with sessions(router, read_only=True)() as s:
        assert s.merge(Item(id=1)).stock == 10


@pytest.mark.parametrize("how", ["evaluate", "fetch"])
def test_an_update_of_rows_shows_the_values_of_the_writer(cluster: Cluster[Any], router: Router, how: str) -> None:
    """What an UPDATE has set is read again, not computed from a reader's values. It does not count as reading the rest."""
    on_the_writer(cluster, "UPDATE item SET stock = 50 WHERE id = 2")
    with sessions(router)() as s:
        first, second = s.get_one(Item, 1), s.get_one(Item, 2)
        on_the_writer(cluster, "UPDATE item SET name = 'new' WHERE id = 1")
        s.execute(update(Item).values(stock=Item.stock + 1), execution_options={"synchronize_session": how})
        assert (first.stock, second.stock) == (11, 51)
        second.stock += 1
        s.flush()
        first.stock += 1
        with raises_stale("Item", 1):
            s.flush()


def delete_by_query(s: RoutingSession) -> None:
    s.query(Item).filter(Item.stock == 10).delete()


def delete_by_statement(s: RoutingSession) -> None:
    s.execute(delete(Item).where(Item.stock == 10))


@pytest.mark.parametrize("work", [delete_by_query, delete_by_statement])
def test_a_delete_of_rows_takes_the_objects_of_those_rows(
    cluster: Cluster[Any], proxy: FaultProxy, router: Router, work: Callable[[RoutingSession], None]
) -> None:
    """A DELETE with a WHERE removes the objects whose rows the writer has deleted, not those that a late reader shows so."""
    on_the_writer(cluster, "UPDATE item SET stock = stock - 10", "DELETE FROM part")
    with sessions(router)() as s:
        first, second = s.get_one(Item, 1), s.get_one(Item, 2)
        work(s)
        assert first in s
        assert second not in s
    with sessions(router)() as s:
        assert sent(proxy, lambda: work(s)) == ["DELETE"], "without objects there is nothing to ask"


def test_an_update_of_rows_reaches_the_objects_of_those_rows(cluster: Cluster[Any], router: Router) -> None:
    """An UPDATE with a WHERE is carried over to the objects whose rows the writer has changed."""
    on_the_writer(cluster, "UPDATE item SET stock = stock - 10")
    with sessions(router)() as s:
        first, second = s.get_one(Item, 1), s.get_one(Item, 2)
        s.execute(update(Item).where(Item.stock == 10).values(name="sold"))
        assert (first.name, second.name) == ("one", "sold")


def test_a_statement_of_a_table_may_name_attributes(cluster: Cluster[Any], router: Router) -> None:
    """Core's UPDATE and DELETE of a table may have a WHERE of the ORM's, with one set of parameters or several."""
    table = Base.metadata.tables["line"]
    with sessions(router)() as s:
        assert marked(s.get_one(Line, 1))
        s.execute(update(table).where(Line.id == 1).values(note="one"))
        s.execute(update(table).where(Line.id == bindparam("number")).values(note=bindparam("to")), [{"number": 2, "to": "two"}])
        s.execute(delete(table).where(Line.id == 3))
        s.commit()
    assert cluster.execute("SELECT id, note FROM line ORDER BY id") == [(1, "one"), (2, "two")]


def test_a_value_that_the_database_has_rounded_is_not_stale(cluster: Cluster[Any], router: Router) -> None:
    """A unit's own UPDATE may compute a value that the column rounds."""
    on_the_writer(cluster, "UPDATE odd SET exact = 1")
    cluster.resume_replay(cluster.readers[0])
    cluster.wait_in_sync()
    with sessions(router)() as s:
        odd = s.get_one(Odd, 1)
        assert place(s) == "reader"
        s.execute(update(Odd).values(exact=Odd.exact * Decimal("1.005")))
        odd.stock += 1
        s.commit()
    assert cluster.execute("SELECT stock FROM odd") == [(2,)]


def test_what_the_unit_has_deleted_itself_is_not_stale(cluster: Cluster[Any], router: Router) -> None:
    """An object that is deleted once more, after a DELETE of the unit has taken its row, is not looked up."""
    with sessions(router)() as s:
        part = s.get_one(Part, 1)
        assert marked(part)
        s.execute(delete(Part).where(Part.id == 1))
        s.delete(part)
        with pytest.warns(SAWarning, match="0 were matched"):
            s.commit()
    assert cluster.execute("SELECT id FROM part") == [(2,)]


def test_a_copy_of_what_a_reader_has_shown_is_not_stale(cluster: Cluster[Any], router: Router) -> None:
    """An object that is inserted anew has nothing left of the row that it was loaded from."""
    with sessions(router)() as s:
        odd = s.get_one(Odd, 1)
        assert marked(odd)
        make_transient(odd)
        odd.id, odd.exact = 9, Decimal("1.005")
        s.add(odd)
        s.flush()
        assert not marked(odd)
        odd.stock += 1
        s.commit()
    assert cluster.execute("SELECT stock FROM odd WHERE id = 9") == [(2,)]


def test_an_object_with_nothing_left_from_a_read_is_not_checked(cluster: Cluster[Any], proxy: FaultProxy, router: Router) -> None:
    """An object is not checked if nothing is left of the values that were read."""
    with sessions(router)() as s:
        item = s.get_one(Item, 1)
        on_the_writer(cluster, "UPDATE item SET stock = 50 WHERE id = 1")
        s.commit()
        item.stock = 5
        assert LOOK not in sent(proxy, s.commit)
    assert stock(cluster) == 5


def test_an_object_that_was_never_read_is_not_checked(cluster: Cluster[Any], proxy: FaultProxy, router: Router) -> None:
    on_the_writer(cluster, "UPDATE item SET stock = 50 WHERE id = 1")
    with sessions(router)() as s:
        item = Item(id=1)
        make_transient_to_detached(item)
        s.add(item)
        item.stock = 5
        assert sent(proxy, s.commit) == ["UPDATE", "COMMIT"]
    assert stock(cluster) == 5


def test_a_child_that_only_the_flush_finds_changed_is_checked(cluster: Cluster[Any], router: Router) -> None:
    """A child that only the flush finds to be changed is checked as well."""
    on_the_writer(cluster, "UPDATE line SET note = 'another'")
    with sessions(router)() as s:
        purchase = s.get_one(Purchase, 1)
        purchase.lines.append(s.get_one(Line, 1))
        with raises_stale("Line", 1):
            s.commit()


def test_children_found_by_a_flush_are_looked_up_at_once(cluster: Cluster[Any], proxy: FaultProxy, router: Router) -> None:
    """The guard sends one SELECT for the class, however many children a new parent takes over."""
    with sessions(router)() as s:
        s.add(Purchase(id=2, total=0, state="open", lines=[*s.scalars(select(Line))]))
        before = len(proxy.statements)
        s.flush()
        assert sum(map(looks, proxy.statements[before:])) == 1
        s.commit()
    assert cluster.execute("SELECT count(*) FROM line WHERE order_id = 2") == [(3,)]


@pytest.mark.parametrize("flushes", [1, 3])
def test_a_changed_primary_key_takes_two_runs_at_most(cluster: Cluster[Any], router: Router, flushes: int) -> None:
    """Rows that the unit's own UPDATE changes by ON UPDATE CASCADE are not found stale one after the other."""
    runs: list[int] = []

    def rename(s: RoutingSession) -> None:
        runs.append(len(runs))
        boxes = s.scalars(select(Box).order_by(Box.id)).all()
        s.get_one(Shelf, "old").name = "new"
        s.flush()
        for box in boxes:
            box.weight += 1
            if flushes == 3:
                s.flush()

    router.run_transaction(sessions(router), rename)
    assert len(runs) <= 2
    assert cluster.execute("SELECT shelf_name, weight FROM box") == [("new", 1)] * 3


def test_children_of_a_changed_primary_key_are_not_stale(cluster: Cluster[Any], router: Router) -> None:
    """Children that the relationship knows are looked up before the database carries the key over to them."""
    with sessions(router)() as s:
        shelf = s.get_one(Shelf, "old")
        boxes = [*shelf.boxes]
        shelf.name = "new"
        s.flush()
        for box in boxes:
            box.weight += 1
        s.commit()
    assert cluster.execute("SELECT shelf_name, weight FROM box") == [("new", 1)] * 3


def save_in_bulk(s: RoutingSession, item: Item) -> None:
    item.stock += 1
    s.bulk_save_objects(iter([item]))


def update_in_bulk(s: RoutingSession, item: Item) -> None:
    s.bulk_update_mappings(Item, ({"id": item.id, "stock": item.stock + 1} for _ in range(1)))
    item.name = "sold"


def update_by_key(s: RoutingSession, item: Item) -> None:
    s.execute(update(Item), [{"id": item.id, "stock": item.stock + 1}])
    s.flush()
    item.name = "sold"


BULK = pytest.mark.parametrize("write", [save_in_bulk, update_in_bulk, update_by_key])


@BULK
def test_a_bulk_statement_makes_no_object_stale(
    cluster: Cluster[Any], router: Router, write: Callable[[RoutingSession, Item], None]
) -> None:
    """The writes of the unit's own bulk statement are not taken for those of another unit."""
    with sessions(router)() as s:
        write(s, s.get_one(Item, 1))
        s.commit()
    assert stock(cluster) == 11
    runs: list[int] = []

    def work(s: RoutingSession) -> None:
        runs.append(len(runs))
        write(s, s.get_one(Item, 2))

    router.run_transaction(sessions(router), work)
    assert runs == [0]


@BULK
def test_a_bulk_statement_checks_what_a_reader_has_shown(
    cluster: Cluster[Any], router: Router, write: Callable[[RoutingSession, Item], None]
) -> None:
    """The objects of a bulk statement, or of the rows it names, are looked up before they are written."""
    on_the_writer(cluster, "UPDATE item SET stock = 50 WHERE id = 1")
    with sessions(router)() as s:
        item = s.get_one(Item, 1)
        with raises_stale("Item", 1):
            write(s, item)
        # The error of update_by_key is that of a statement, after which the transaction may go on.
        if write is not update_by_key:
            with pytest.raises(PendingRollbackError):
                s.commit()
    router.run_transaction(sessions(router), lambda s: write(s, s.get_one(Item, 1)))
    assert stock(cluster) == 51


def test_a_listener_may_read_before_a_bulk_statement(cluster: Cluster[Any], router: Router) -> None:
    """A listener's read on a reader does not use up the check of the objects."""
    on_the_writer(cluster, "UPDATE item SET stock = 50 WHERE id = 1")

    def read(state: ORMExecuteState) -> None:
        if state.is_update:
            state.session.get(Item, 2)

    with sessions(router)() as s:
        item = s.get_one(Item, 1)
        event.listen(s, "do_orm_execute", read)
        with raises_stale("Item", 1):
            update_by_key(s, item)


@pytest.mark.parametrize("in_bulk", [True, False])
def test_an_object_is_checked_beside_those_of_another_cluster(cluster: Cluster[Any], router: Router, in_bulk: bool) -> None:
    """Objects of another router's cluster that are written first do not use up the check of the others."""
    on_the_writer(cluster, "UPDATE box SET weight = 50 WHERE id = 1")
    with Router(cluster.url) as another, sessions(router, binds={Item: another.writer_engine()})() as s:
        box, item = s.get_one(Box, 1), s.get_one(Item, 1)
        box.weight += 1
        item.stock += 1
        with raises_stale("Box", 1):
            if in_bulk:
                s.bulk_save_objects([item, box])
            s.flush()
    assert cluster.execute("SELECT weight FROM box WHERE id = 1") == [(50,)]


def test_changes_of_a_before_flush_listener_are_checked(cluster: Cluster[Any], router: Router) -> None:
    """An object that a listener changes before the flush is checked as well."""
    on_the_writer(cluster, "UPDATE item SET stock = 50 WHERE id = 2")
    with sessions(router)() as s:
        first, second = s.get_one(Item, 1), s.get_one(Item, 2)

        @event.listens_for(s, "before_flush")
        def also(*_: Any) -> None:
            second.name = "changed"

        first.name = "changed"
        with raises_stale("Item", 2):
            s.flush()


def test_a_mapper_with_an_engine_of_its_own_is_left_alone(
    cluster: Cluster[Any], proxy: FaultProxy, router: Router, engine: Engine
) -> None:
    with sessions(router, binds={Kit: engine})() as s:
        item, kit = s.get_one(Item, 1), s.get_one(Kit, (1, "x"))
        on_the_writer(cluster, "UPDATE kit SET stock = 50 WHERE b = 'x'")
        kit.stock += 1
        s.flush()
        assert place(s) == "reader"
        kit.stock += 1
        item.stock += 1
        assert sent(proxy, s.commit).count(LOOK) == 1
    on_the_writer(cluster, "UPDATE item SET stock = 50 WHERE id = 1")

    def both(s: RoutingSession) -> None:
        s.get_one(Kit, (1, "y")).stock += 1
        s.get_one(Item, 1).stock += 1

    router.run_transaction(sessions(router, binds={Kit: engine}), both)
    assert stock(cluster) == 51
    assert cluster.execute("SELECT stock FROM kit WHERE b = 'y'") == [(21,)], "the other database was rolled back, too"


# -- savepoints, and units that are declared ----------------------------------------------------------------------------


def test_a_stale_read_in_a_savepoint_undoes_the_savepoint(cluster: Cluster[Any], router: Router) -> None:
    with sessions(router)() as s, s.begin():
        item = s.get_one(Item, 1)
        on_the_writer(cluster, "UPDATE item SET stock = 50 WHERE id = 1")
        s.add(Item(id=9))
        with pytest.raises(StaleRead), s.begin_nested():
            item.stock += 1
        assert item.stock == 50, "expired, and read on the writer"
        assert not marked(item)
        item.stock += 1
    assert cluster.execute("SELECT id, stock FROM item WHERE id IN (1, 9) ORDER BY id") == [(1, 51), (9, 0)]


def test_what_changes_before_a_savepoint_is_checked_as_it_begins(cluster: Cluster[Any], router: Router) -> None:
    with sessions(router)() as s:
        item = s.get_one(Item, 1)
        on_the_writer(cluster, "UPDATE item SET stock = 50 WHERE id = 1")
        item.stock += 1
        with pytest.raises(StaleRead):
            s.begin_nested()


def test_a_unit_that_began_with_a_savepoint_is_run_again(cluster: Cluster[Any], router: Router) -> None:
    """A unit that began with a savepoint is run again with its rows locked."""
    on_the_writer(cluster, "UPDATE item SET stock = 50 WHERE id = 1")
    runs: list[int] = []

    def nested(s: RoutingSession) -> None:
        item = None if runs else s.get_one(Item, 1)
        runs.append(1)
        with s.begin_nested():
            (item or s.get_one(Item, 1)).stock += 1

    router.run_transaction(sessions(router), nested)
    assert len(runs) == 2
    assert stock(cluster) == 51


def test_an_autoflush_is_checked(cluster: Cluster[Any], router: Router) -> None:
    with sessions(router)() as s:
        s.get_one(Item, 1).stock += 1
        on_the_writer(cluster, "UPDATE item SET stock = 50 WHERE id = 1")
        with pytest.raises(StaleRead):
            s.scalar(select(func.count()).select_from(Item))


def test_a_declared_read_only_unit_marks_and_writes_nothing(cluster: Cluster[Any], router: Router) -> None:
    """A unit that is declared read-only may not write, and marks nothing."""
    with sessions(router, read_only=True)() as s:
        item = s.get_one(Item, 1)
        assert place(s) == "reader"
        assert not marked(item)
        item.stock += 1
        with pytest.raises(ReadOnlyViolation):
            s.flush()
    with sessions(router)() as s:
        item = s.get_one(Item, 1)
    with sessions(router, read_only=True)() as s:
        s.add(item)
        s.refresh(item)
        assert marked(item), "still a reader's"
        item.stock += 1
        with pytest.raises(ReadOnlyViolation):
            s.flush()


@POSTGRESQL
def test_the_lock_stands_in_nobodys_way_who_refers_to_the_row(cluster: Cluster[Any], router: Router) -> None:
    with sessions(router)() as s, cluster.writer.connect(autocommit=True) as other:
        other.execute("SET lock_timeout = '1s'")
        s.get_one(Item, 1).stock += 1
        s.flush()
        other.execute("INSERT INTO part VALUES (9, 1, 'while it is locked')")
        with pytest.raises(Exception, match=r"(?i)lock (wait )?timeout"):
            other.execute("UPDATE item SET stock = 0 WHERE id = 1")
        s.commit()


class Loose(Base):
    __table__ = Kit.__table__.outerjoin(Line.__table__, Kit.a == Line.id)
    a = Kit.__table__.c.a
    line_id = Line.__table__.c.id
    __mapper_args__ = {"primary_key": [Kit.__table__.c.a, Kit.__table__.c.b]}


def test_a_mapper_of_rows_that_cannot_be_locked_is_left_alone(proxy: FaultProxy, router: Router) -> None:
    """A mapper whose rows cannot be locked is left alone."""

    with sessions(router)() as s:
        s.scalars(select(Loose).where(Kit.b == "x")).one().stock += 1
        assert sent(proxy, s.commit) == ["UPDATE", "COMMIT"]


class Shelved(Base):
    """A view of the weight on each shelf, which a trigger writes."""

    __tablename__ = "shelved"
    name: Mapped[str] = mapped_column(String(9), primary_key=True)
    weight: Mapped[int]


SHELVED = (
    "DROP TABLE shelved",
    "CREATE VIEW shelved AS SELECT shelf_name AS name, sum(weight)::int AS weight FROM box GROUP BY shelf_name",
    "CREATE OR REPLACE FUNCTION extra.shelve() RETURNS trigger LANGUAGE plpgsql AS "
    "'BEGIN UPDATE box SET weight = weight + NEW.weight - OLD.weight WHERE id = 1; RETURN NEW; END'",
    "CREATE TRIGGER shelve INSTEAD OF UPDATE ON shelved FOR EACH ROW EXECUTE FUNCTION extra.shelve()",
)


@POSTGRESQL
@pytest.mark.parametrize("wrote", [False, True], ids=["first", "after a write"])
def test_a_view_that_cannot_be_locked_is_compared(cluster: Cluster[Any], router: Router, wrote: bool) -> None:
    """The rows of a view with GROUP BY are read without a lock, and the unit's earlier writes are kept."""
    cluster.resume_replay(cluster.readers[0])
    on_the_writer(cluster, *SHELVED)
    cluster.wait_in_sync()
    cluster.pause_replay(cluster.readers[0])
    try:
        with sessions(router)() as s:
            shelved = s.get_one(Shelved, "old")
            assert marked(shelved)
            if wrote:
                s.add(Line(id=10, note="new"))
                s.flush()
            shelved.weight += 1
            s.get_one(Item, 1).stock += 1
            s.commit()
        assert cluster.execute("SELECT weight FROM shelved") == [(1,)]
        assert cluster.execute("SELECT count(*) FROM line WHERE id = 10") == [(int(wrote),)]

        def add(s: RoutingSession) -> None:
            s.get_one(Shelved, "old").weight += 1

        router.run_transaction(sessions(router), add)  # its first run reads a stale row
        assert cluster.execute("SELECT weight FROM shelved") == [(2,)]
    finally:
        on_the_writer(cluster, "DROP VIEW shelved", "CREATE TABLE shelved (name text)")


def test_thousands_of_objects_are_looked_up_in_portions(cluster: Cluster[Any], proxy: FaultProxy, router: Router) -> None:
    cluster.resume_replay(cluster.readers[0])
    rows = ", ".join(f"({n}, '', 0)" for n in range(1000, 3500))
    cluster.execute(f"INSERT INTO item VALUES {rows}")
    cluster.wait_in_sync()
    cluster.pause_replay(cluster.readers[0])
    on_the_writer(cluster, "UPDATE item SET stock = 50 WHERE id = 3499")
    with sessions(router)() as s:
        for item in s.scalars(select(Item).where(Item.id >= 1000)):
            item.stock += 1
        with raises_stale("Item", 3499):
            s.flush()
        assert sum(looks(text) for text in proxy.statements) == 3


def test_the_guard_is_on_or_off(make_router: MakeRouter) -> None:
    with pytest.raises(ConfigurationError, match="stale_write_guard"):
        make_router(stale_write_guard=1)


def test_rows_are_locked_in_the_order_of_the_flush(cluster: Cluster[Any], router: Router) -> None:
    """Rows are locked in the order in which a flush writes them."""

    class Named(DeclarativeBase):
        """A base of classes whose names come in another order than their tables."""

    class Whole(Named):
        __tablename__ = "item"
        id: Mapped[int] = mapped_column(primary_key=True)
        name: Mapped[str]
        stock: Mapped[int]

    class Bit(Named):
        __tablename__ = "part"
        id: Mapped[int] = mapped_column(primary_key=True)
        item_id: Mapped[int] = mapped_column(ForeignKey(Whole.id))
        name: Mapped[str]

    status = "SELECT 1 FROM {}.global_status WHERE variable_name = 'Innodb_row_lock_current_waits' AND variable_value > 0"
    waiting = {
        "postgresql": "SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock'",
        "mariadb": status.format("information_schema"),
        "mysql": status.format("performance_schema"),
    }
    with sessions(router)() as s, sessions(router)(read_only=False) as other:
        mine = s.get_one(Whole, 1), s.get_one(Bit, 1)
        mine[0].name = mine[1].name = "mine"
        theirs = other.get_one(Whole, 1), other.get_one(Bit, 1)
        theirs[0].name = "theirs"
        other.flush()
        raised: list[BaseException | None] = []

        def commit() -> None:
            with pytest.raises(StaleRead) as caught:
                s.commit()
            raised.append(caught.value)

        thread = threading.Thread(target=commit)
        thread.start()
        eventually(lambda: cluster.execute(waiting[engine_of(cluster)]))
        theirs[1].name = "theirs"
        other.commit()
        thread.join()
    assert raised, "and neither was the victim of a deadlock"


class Tagged(Base):
    """A row whose key has several forms in Python."""

    __tablename__ = "tagged_row"
    id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(20), default="new")


class Numbered(Base):
    __tablename__ = "keyed"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(20), default="new")


@BOTH
@pytest.mark.parametrize("kind", [Tagged, Numbered])
def test_a_key_may_be_given_as_another_type(cluster: Cluster[Any], make_router: MakeRouter, kind: Any) -> None:
    """A UUID or a number set as a str stays the row's key after a reader has shown the row."""
    router = make_router(cluster.url, instances=[cluster.readers[0].address])
    until_readers_serve(router, 1)
    tag: Any = uuid.uuid4()
    if family_of(cluster) == "postgresql":  # elsewhere SQLAlchemy 2.0 takes no str for a UUID
        tag = str(tag)
    key = {"id": tag, "number": "7"} if kind is Tagged else {"id": "7"}
    with sessions(router)() as s:
        instance = kind(**key)
        s.add(instance)
        s.commit()
        cluster.wait_in_sync()
        for name in ("first", "second"):

            def on_a_reader() -> bool:
                s.rollback()
                assert instance.name
                return place(s) == "reader"

            eventually(on_a_reader)
            instance.name = name
            s.commit()
        assert instance.name == "second"
