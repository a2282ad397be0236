"""A late reader's rows decide what a unit writes: the writer refuses the write, or collections are read there again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import Column, ForeignKey, String, Table, create_engine, event, insert, select, text, update
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.orm import (
    DeclarativeBase,
    DynamicMapped,
    Mapped,
    attribute_keyed_dict,
    foreign,
    make_transient_to_detached,
    mapped_column,
    object_session,
    relationship,
    selectinload,
)
from sqlalchemy.orm import Session as PlainSession
from sqlalchemy.orm.exc import StaleDataError
from tenacity import stop_after_attempt

from aurora_router import Failure, Router, RoutingSession, StaleRead, classify_error
from aurora_router.core import events
from aurora_router.local import FaultProxy
from aurora_router.local.cluster import Cluster
from tests.integration.shop import BOTH, engine, eventually, place, sessions, until_readers_serve
from tests.integration.test_guard import late, on_the_writer

pytestmark = BOTH

MakeRouter = Callable[..., Router]


class Base(DeclarativeBase):
    pass


links = Table(
    "link",
    Base.metadata,
    Column("root_id", ForeignKey("root.id"), primary_key=True),
    Column("label_name", ForeignKey("label.name"), primary_key=True),
)


class Root(Base):
    __tablename__ = "root"
    id: Mapped[int] = mapped_column(primary_key=True)
    note: Mapped[str] = mapped_column(String(9), default="")
    branches: Mapped[list[Branch]] = relationship(cascade="all, delete-orphan", order_by="Branch.id")
    birds: Mapped[list[Bird]] = relationship()
    labels: Mapped[list[Label]] = relationship(secondary=links)
    flower: Mapped[Flower | None] = relationship(cascade="all, delete-orphan")
    stones: Mapped[list[Stone]] = relationship(cascade="all", passive_deletes=True)
    worms: DynamicMapped[Worm] = relationship(cascade="all, delete-orphan")
    nests: Mapped[dict[str, Nest]] = relationship(cascade="all, delete-orphan", collection_class=attribute_keyed_dict("place"))


class Branch(Base):
    __tablename__ = "branch"
    id: Mapped[int] = mapped_column(primary_key=True)
    root_id: Mapped[int] = mapped_column(ForeignKey("root.id"))
    leaves: Mapped[list[Leaf]] = relationship(cascade="all, delete-orphan")


class Leaf(Base):
    __tablename__ = "leaf"
    id: Mapped[int] = mapped_column(primary_key=True)
    branch_id: Mapped[int] = mapped_column(ForeignKey("branch.id"))


class Bird(Base):
    """A child that outlives its root."""

    __tablename__ = "bird"
    id: Mapped[int] = mapped_column(primary_key=True)
    root_id: Mapped[int | None] = mapped_column(ForeignKey("root.id"))


class Flower(Base):
    """One for each root."""

    __tablename__ = "flower"
    id: Mapped[int] = mapped_column(primary_key=True)
    root_id: Mapped[int] = mapped_column(ForeignKey("root.id"))


class Stone(Base):
    """A child that the database deletes."""

    __tablename__ = "stone"
    id: Mapped[int] = mapped_column(primary_key=True)
    root_id: Mapped[int] = mapped_column(ForeignKey("root.id", ondelete="CASCADE"))


class Worm(Base):
    """One of too many to be kept in memory."""

    __tablename__ = "worm"
    id: Mapped[int] = mapped_column(primary_key=True)
    root_id: Mapped[int] = mapped_column(ForeignKey("root.id"))


class Nest(Base):
    """One for each place."""

    __tablename__ = "nest"
    id: Mapped[int] = mapped_column(primary_key=True)
    root_id: Mapped[int] = mapped_column(ForeignKey("root.id"))
    place: Mapped[str] = mapped_column(String(9))


class Label(Base):
    __tablename__ = "label"
    name: Mapped[str] = mapped_column(String(9), primary_key=True)
    serial: Mapped[int | None] = mapped_column(unique=True)


marks = Table("mark", Base.metadata, Column("tray_name", String(9)), Column("label_name", String(9)))


class Tray(Base):
    """A parent whose name SQLAlchemy carries over to its children, because the database knows no foreign key."""

    __tablename__ = "tray"
    name: Mapped[str] = mapped_column(String(9), primary_key=True)
    jars: Mapped[list[Jar]] = relationship(primaryjoin=lambda: Tray.name == foreign(Jar.tray_name), passive_updates=False)
    labels: Mapped[list[Label]] = relationship(
        secondary=marks,
        primaryjoin=lambda: Tray.name == foreign(marks.c.tray_name),
        secondaryjoin=lambda: Label.name == foreign(marks.c.label_name),
        passive_updates=False,
    )


class Jar(Base):
    __tablename__ = "jar"
    id: Mapped[int] = mapped_column(primary_key=True)
    tray_name: Mapped[str] = mapped_column(String(9))


class Counted(Base):
    __tablename__ = "counted"
    id: Mapped[int] = mapped_column(primary_key=True)
    stock: Mapped[int]
    version: Mapped[int] = mapped_column()
    __mapper_args__ = {"version_id_col": version}


@pytest.fixture
def cluster(cluster: Cluster[Any]) -> Cluster[Any]:
    engine = create_engine(cluster.url)
    Base.metadata.drop_all(engine)
    Base.metadata.create_all(engine)
    with PlainSession(engine) as s, s.begin():
        s.add(Root(id=1, branches=[Branch(id=1, leaves=[Leaf(id=1)])], birds=[Bird(id=1)], labels=[Label(name="old")]))
        s.add(Counted(id=1, stock=1))
        s.add(Tray(name="old", jars=[Jar(id=1)], labels=[Label(name="first")]))
        s.add(Label(name="second"))
    engine.dispose()
    with Router(cluster.url) as router:
        router.init_commit_table()
    cluster.wait_in_sync()
    return cluster


@pytest.fixture
def router(cluster: Cluster[Any], proxy: FaultProxy, make_router: MakeRouter, heard: list[events.Event]) -> Router:
    """A router of the writer and one reader, which replays nothing."""
    return late(cluster, proxy, make_router, heard)


# -- what the writer refuses ----------------------------------------------------------------------------------------


def get_or_create(s: RoutingSession) -> None:
    if s.scalar(select(Label).where(Label.name == "new")) is None:
        s.add(Label(name="new"))


def get_or_create_by_core(s: RoutingSession) -> None:
    if s.execute(select(Label.name).where(Label.name == "new")).first() is None:
        s.execute(insert(Label).values(name="new"))


def get_or_create_by_text(s: RoutingSession) -> None:
    if s.execute(text("SELECT name FROM label WHERE name = 'new'")).first() is None:
        s.execute(text("INSERT INTO label (name) VALUES ('new')"))


def next_serial(s: RoutingSession) -> None:
    last = s.scalar(select(Label.serial).where(Label.serial.is_not(None)).order_by(Label.serial.desc())) or 0
    s.add(Label(name=f"label {last + 1}", serial=last + 1))


def refer_to_what_is_gone(s: RoutingSession) -> None:
    for root in s.scalars(select(Root.id)).all():
        s.add(Bird(id=2, root_id=root))


def refer_to_what_is_not_seen(s: RoutingSession) -> None:
    s.add(Branch(id=9, root_id=s.scalar(select(Root.id).where(Root.id == 2))))  # None on a late reader


def refer_to_nothing_by_core(s: RoutingSession) -> None:
    known = s.execute(text("SELECT id AS root_id FROM root WHERE id = 2")).mappings().first()
    s.execute(insert(Branch).values(id=9, **(known or {})))


def add_where_there_is_room(s: RoutingSession) -> None:
    if s.scalar(select(Root.note)) != "full":
        s.add(Bird(id=2, root_id=1))


def delete_what_is_referred_to(s: RoutingSession) -> None:
    used = s.scalars(select(links.c.label_name)).all()
    for label in s.scalars(select(Label.name).where(Label.name.not_in(used))).all():
        s.execute(text("DELETE FROM label WHERE name = :name"), {"name": label})


def use_the_old_version(s: RoutingSession) -> None:
    s.get_one(Counted, 1).stock += 1


def use_the_old_version_in_bulk(s: RoutingSession) -> None:
    counted = s.get_one(Counted, 1)
    s.bulk_update_mappings(Counted, [{"id": 1, "stock": counted.stock + 1, "version": counted.version}])


def use_the_old_version_by_key(s: RoutingSession) -> None:
    counted = s.get_one(Counted, 1)
    s.execute(update(Counted), [{"id": 1, "stock": counted.stock + 1, "version": counted.version}])


GONE = "DELETE FROM link;DELETE FROM leaf;DELETE FROM branch;DELETE FROM bird;DELETE FROM root"


@pytest.mark.parametrize(
    ("unit", "meanwhile"),
    [
        (get_or_create, "INSERT INTO label (name) VALUES ('new')"),
        (get_or_create_by_core, "INSERT INTO label (name) VALUES ('new')"),
        (get_or_create_by_text, "INSERT INTO label (name) VALUES ('new')"),
        (next_serial, "INSERT INTO label (name, serial) VALUES ('label 1', 1)"),
        (refer_to_what_is_gone, GONE),
        (refer_to_what_is_not_seen, "INSERT INTO root (id, note) VALUES (2, '')"),
        (refer_to_nothing_by_core, "INSERT INTO root (id, note) VALUES (2, '')"),
        (delete_what_is_referred_to, "INSERT INTO label (name) VALUES ('used');INSERT INTO link VALUES (1, 'used')"),
        (use_the_old_version, "UPDATE counted SET stock = 5, version = 2"),
        (use_the_old_version_in_bulk, "UPDATE counted SET stock = 5, version = 2"),
        (use_the_old_version_by_key, "UPDATE counted SET stock = 5, version = 2"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_a_late_reader_led_to_is_run_again(
    cluster: Cluster[Any], router: Router, heard: list[events.Event], unit: Callable[[RoutingSession], None], meanwhile: str
) -> None:
    """An error that a single database would not raise is not the application's, so the function runs again."""
    if unit is delete_what_is_referred_to:
        on_the_writer(cluster, "INSERT INTO label (name) VALUES ('free')")
        cluster.resume_replay(cluster.readers[0])
        cluster.wait_in_sync()
        cluster.pause_replay(cluster.readers[0])
        meanwhile = "INSERT INTO link VALUES (1, 'free')"
    on_the_writer(cluster, *meanwhile.split(";"))
    began: list[str] = []

    def work(s: RoutingSession) -> None:
        s.scalar(select(Root.id))
        began.append(place(s))
        unit(s)

    heard.clear()
    router.run_transaction(sessions(router), work)
    assert began == ["reader", "writer"]
    assert not [e for e in heard if isinstance(e, events.RetriesRefused)]


def test_what_a_trigger_refuses_is_run_again(cluster: Cluster[Any], router: Router) -> None:
    """If a trigger refuses a write, the function runs again, because a reader may be late. A second refusal is raised."""
    room = "(SELECT note FROM root WHERE id = NEW.root_id) = 'full'"
    if engine(cluster) == "postgresql":
        on_the_writer(
            cluster,
            f"CREATE OR REPLACE FUNCTION no_room() RETURNS trigger LANGUAGE plpgsql AS "
            f"$$BEGIN IF {room} THEN RAISE 'no room'; END IF; RETURN NEW; END$$",
            "CREATE TRIGGER room BEFORE INSERT ON bird FOR EACH ROW EXECUTE FUNCTION no_room()",
        )
    else:
        signal = f"IF {room} THEN SIGNAL SQLSTATE '45000' SET MESSAGE_TEXT = 'no room'; END IF"
        on_the_writer(cluster, f"CREATE TRIGGER room BEFORE INSERT ON bird FOR EACH ROW {signal}")
    on_the_writer(cluster, "UPDATE root SET note = 'full'")
    router.run_transaction(sessions(router), add_where_there_is_room)
    runs: list[int] = []

    def blind(s: RoutingSession) -> None:
        runs.append(1)
        s.scalar(select(Root.id))
        s.add(Bird(id=2, root_id=1))

    with pytest.raises(DBAPIError, match="no room"):
        router.run_transaction(sessions(router), blind)
    assert runs == [1, 1]


def test_what_the_writer_refuses_is_raised(cluster: Cluster[Any], router: Router) -> None:
    """An error is raised if the second run meets it on the writer, too, or if the unit read there."""
    on_the_writer(cluster, "INSERT INTO label (name) VALUES ('new')")
    for read_only, expected in ((None, 2), (False, 1)):
        runs: list[int] = []

        def blind(s: RoutingSession, runs: list[int] = runs) -> None:
            s.scalar(select(Root.id))
            runs.append(1)
            s.add(Label(name="new"))

        with pytest.raises(IntegrityError) as caught:
            router.run_transaction(sessions(router, read_only=read_only), blind)
        assert len(runs) == expected
        known = classify_error(caught.value)
        assert (known.failure, known.safe_to_repeat) == (Failure.CONSTRAINT, False)


def test_a_function_may_catch_the_error_itself(cluster: Cluster[Any], router: Router) -> None:
    """An error that a savepoint undoes needs no second run."""
    on_the_writer(cluster, "INSERT INTO label (name) VALUES ('new')")
    runs: list[int] = []

    def careful(s: RoutingSession) -> Label | None:
        runs.append(1)
        label = s.scalar(select(Label).where(Label.name == "new"))
        if label is None:
            try:
                with s.begin_nested():
                    s.add(Label(name="new"))
            except IntegrityError:
                label = s.scalar(select(Label).where(Label.name == "new"))
        return label

    assert router.run_transaction(sessions(router), careful) is not None
    assert runs == [1]


def test_outside_of_a_run_the_error_is_the_servers(cluster: Cluster[Any], router: Router) -> None:
    """A plain session cannot be run again, so it raises the error. Its next reads are newer."""
    on_the_writer(cluster, "INSERT INTO label (name) VALUES ('new')")
    with sessions(router)() as s:
        get_or_create(s)
        with pytest.raises(IntegrityError):
            s.commit()
        s.rollback()
        get_or_create(s)
        s.commit()
    with sessions(router)() as s:
        use_the_old_version(s)
        on_the_writer(cluster, "UPDATE counted SET version = 2")
        with pytest.raises(StaleDataError):
            s.commit()


# -- collections ----------------------------------------------------------------------------------------------------


MEANWHILE = (
    "INSERT INTO branch VALUES (2, 1)",
    "INSERT INTO leaf VALUES (2, 1)",
    "INSERT INTO leaf VALUES (3, 2)",
    "INSERT INTO bird VALUES (2, 1)",
    "INSERT INTO flower VALUES (1, 1)",
    "INSERT INTO stone VALUES (1, 1)",
    "INSERT INTO worm VALUES (1, 1)",
    "INSERT INTO nest VALUES (1, 1, 'high')",
    "INSERT INTO label (name) VALUES ('new')",
    "INSERT INTO link VALUES (1, 'new')",
)
ALL = (
    selectinload(Root.branches).selectinload(Branch.leaves),
    selectinload(Root.birds),
    selectinload(Root.labels),
    selectinload(Root.flower),
    selectinload(Root.stones),
    selectinload(Root.nests),
)


@pytest.mark.parametrize("loaded", [True, False], ids=["loaded", "not loaded"])
@pytest.mark.parametrize("changed", [True, False], ids=["changed before", "as it was"])
def test_a_cascade_deletes_what_a_late_reader_did_not_show(
    cluster: Cluster[Any], router: Router, loaded: bool, changed: bool
) -> None:
    """Collections that are deleted, or let go, with an object are read again on the writer."""
    on_the_writer(cluster, *MEANWHILE)
    with sessions(router)() as s:
        root = s.get_one(Root, 1, options=ALL if loaded else ())
        assert place(s) == "reader"
        if changed:
            root.note = "changed"
            s.flush()
        s.delete(root)
        s.commit()
    left = "SELECT (SELECT count(*) FROM {}), (SELECT count(*) FROM {}), (SELECT count(*) FROM {})"
    assert cluster.execute(left.format("root", "branch", "leaf")) == [(0, 0, 0)]
    assert cluster.execute(left.format("link", "flower", "stone")) == [(0, 0, 0)]
    assert cluster.execute("SELECT * FROM worm") == []
    assert cluster.execute("SELECT id, root_id FROM bird ORDER BY id") == [(1, None), (2, None)]


@pytest.mark.parametrize("delete", [name for name in ("delete", "delete_all") if hasattr(PlainSession, name)])
def test_a_delete_loads_its_cascades_on_the_writer(cluster: Cluster[Any], router: Router, delete: str) -> None:
    """A delete needs no reader: the collections that go along with the object are loaded on the writer."""
    with sessions(router)() as s:
        root = Root(id=1)
        make_transient_to_detached(root)
        s.add(root)
        getattr(s, delete)([root] if delete == "delete_all" else root)
        assert place(s) == "writer"


def test_a_listener_deletes_what_a_late_reader_did_not_show(cluster: Cluster[Any], router: Router) -> None:
    """What a listener of before_flush deletes takes along all that the writer has, whenever the listener was added."""
    on_the_writer(cluster, *MEANWHILE)
    with sessions(router)() as s:
        root = s.get_one(Root, 1, options=ALL)

        @event.listens_for(s, "before_flush")
        def early(*_: Any) -> None:
            pass

        root.note = "changed"
        s.flush()

        @event.listens_for(s, "before_flush")
        def purge(*_: Any) -> None:
            s.delete(root)

        root.note = "gone"
        s.commit()
    left = "SELECT (SELECT count(*) FROM root), (SELECT count(*) FROM branch), (SELECT count(*) FROM leaf)"
    assert cluster.execute(left) == [(0, 0, 0)]


def test_an_orphan_takes_along_what_a_late_reader_did_not_show(cluster: Cluster[Any], router: Router) -> None:
    """The collections of an object that is deleted as an orphan are read again as well."""
    on_the_writer(cluster, "INSERT INTO leaf VALUES (2, 1)")
    with sessions(router)() as s:
        root = s.get_one(Root, 1, options=ALL)
        root.branches.clear()
        s.commit()
    assert cluster.execute("SELECT (SELECT count(*) FROM branch), (SELECT count(*) FROM leaf)") == [(0, 0)]


def test_what_was_moved_to_another_parent_is_not_deleted(cluster: Cluster[Any], router: Router) -> None:
    """A collection that was changed is left as it is."""
    with sessions(router)() as s:
        root = s.get_one(Root, 1, options=ALL)
        other = Root(id=2)
        s.add(other)
        branch = root.branches.pop()
        other.branches.append(branch)
        s.delete(root)
        s.commit()
    assert cluster.execute("SELECT id, root_id FROM branch") == [(1, 2)]


def replace_branches(root: Root) -> None:
    root.branches = []


def replace_branches_by_another(root: Root) -> None:
    root.branches = [*root.branches[:0], Branch(id=9)]


def clear_branches(root: Root) -> None:
    root.branches.clear()


def cut_branches_off(root: Root) -> None:
    root.branches[:] = []


def remove_each_branch(root: Root) -> None:
    for branch in [*root.branches]:
        root.branches.remove(branch)


def replace_branches_by_the_same(root: Root) -> None:
    root.branches = [branch for branch in root.branches if branch.id == 1]


def replace_branches_by_more(root: Root) -> None:
    root.branches = [*(branch for branch in root.branches if branch.id == 1), Branch(id=9)]


def replace_none_by_none(root: Root) -> None:
    root.nests = {}


def merge_branches(root: Root) -> None:
    session = object_session(root)
    assert session is not None
    session.merge(Root(id=1, branches=[Branch(id=1)]))


def build_a_nest(root: Root) -> None:
    root.nests["high"] = Nest(id=9, place="high")


def replace_birds(root: Root) -> None:
    root.birds = []


def replace_labels(root: Root) -> None:
    root.labels = [Label(name="other")]


def replace_flower(root: Root) -> None:
    root.flower = Flower(id=9)


def save_one_branch_and_delete(root: Root) -> None:
    session = object_session(root)
    assert session is not None
    session.add(Root(id=9, branches=[root.branches.pop()]))
    session.delete(root)


@pytest.mark.parametrize("flushed", [False, True], ids=["", "flushed before"])
@pytest.mark.parametrize(
    ("change", "left"),
    [
        (replace_branches, "SELECT id FROM branch"),
        (replace_branches_by_another, "SELECT id FROM branch WHERE id <> 9"),
        (clear_branches, "SELECT id FROM branch"),
        (cut_branches_off, "SELECT id FROM branch"),
        (remove_each_branch, "SELECT id FROM branch"),
        (replace_branches_by_the_same, "SELECT id FROM branch WHERE id <> 1"),
        (replace_branches_by_more, "SELECT id FROM branch WHERE id NOT IN (1, 9)"),
        (replace_none_by_none, "SELECT id FROM nest"),
        (merge_branches, "SELECT id FROM branch WHERE id <> 1"),
        (build_a_nest, "SELECT id FROM nest WHERE id <> 9"),
        (replace_birds, "SELECT id FROM bird WHERE root_id = 1"),
        (replace_labels, "SELECT label_name FROM link WHERE label_name <> 'other'"),
        (replace_flower, "SELECT id FROM flower WHERE id <> 9"),
        (save_one_branch_and_delete, "SELECT id FROM branch WHERE id = 1"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_a_collection_hid_is_taken_out_with_the_rest(
    cluster: Cluster[Any], router: Router, change: Callable[[Root], None], left: str, flushed: bool
) -> None:
    """A function that replaces or empties a collection runs again on the writer if a late reader hid rows."""
    on_the_writer(cluster, *MEANWHILE)
    began: list[str] = []

    def work(s: RoutingSession) -> None:
        root = s.get_one(Root, 1, options=ALL)
        began.append(place(s))
        if flushed:
            root.note = "changed"
            s.flush()
        change(root)

    router.run_transaction(sessions(router), work)
    assert began == ["reader", "writer"]
    assert cluster.execute(left) == []


def test_a_collection_that_hid_something_is_told(cluster: Cluster[Any], router: Router) -> None:
    """The error names the collections that were late."""
    on_the_writer(cluster, *MEANWHILE)

    def work(s: RoutingSession) -> None:
        root = s.get_one(Root, 1, options=ALL)
        root.branches, root.birds = [], []

    with pytest.raises(StaleRead, match=r"Root .*branches.* is not what the reader had shown") as caught:
        router.run_transaction(sessions(router), work, stop=stop_after_attempt(1))
    assert {*caught.value.columns} == {"branches", "birds"}
    assert cluster.execute("SELECT count(*) FROM branch") == [(2,)]


def test_a_filtered_collection_can_be_changed(cluster: Cluster[Any], router: Router) -> None:
    """Rows that a filter left out are not new: a plain session does not compare, and a run succeeds."""
    on_the_writer(cluster, "INSERT INTO branch (id, root_id) VALUES (7, 1)", "INSERT INTO branch (id, root_id) VALUES (8, 1)")
    cluster.resume_replay(cluster.readers[0])
    cluster.wait_in_sync()
    cluster.pause_replay(cluster.readers[0])

    def work(s: RoutingSession) -> None:
        root = s.scalars(select(Root).options(selectinload(Root.branches.and_(Branch.id > 6)))).unique().one()
        root.branches.pop()
        s.flush()

    with sessions(router)() as s:
        work(s)
        s.rollback()
    router.run_transaction(sessions(router), work)
    assert cluster.execute("SELECT count(*) FROM branch WHERE id > 6") == [(1,)]


HIDDEN = (
    "INSERT INTO jar (id, tray_name) VALUES (2, 'old')",
    "INSERT INTO mark VALUES ('old', 'second')",
)
FOLLOWERS = "SELECT tray_name FROM jar UNION ALL SELECT tray_name FROM mark"


def rename(s: RoutingSession, *added: Jar) -> None:
    tray = s.get_one(Tray, "old", options=[selectinload(Tray.jars), selectinload(Tray.labels)])
    assert len(tray.jars) > 0
    tray.jars.extend(added)
    tray.name = "new"


def test_a_changed_key_reaches_what_a_late_reader_did_not_show(cluster: Cluster[Any], router: Router) -> None:
    """All rows that refer to an object by a key that SQLAlchemy carries over get the new key."""
    on_the_writer(cluster, *HIDDEN)
    with sessions(router)() as s:
        rename(s)
        s.commit()
    assert cluster.execute(FOLLOWERS) == [("new",)] * 4


def test_a_changed_key_and_collection_are_compared(cluster: Cluster[Any], router: Router) -> None:
    """A collection that was added to cannot be read again, so its function is run again on the writer."""
    on_the_writer(cluster, *HIDDEN)
    began: list[str] = []

    def work(s: RoutingSession) -> None:
        rename(s, Jar(id=9))
        began.append(place(s))

    router.run_transaction(sessions(router), work)
    assert began == ["reader", "writer"]
    assert cluster.execute(FOLLOWERS) == [("new",)] * 5


def test_what_is_only_added_to_a_collection_asks_nothing(cluster: Cluster[Any], proxy: FaultProxy, router: Router) -> None:
    """An addition to a collection is right whatever else is in it by now, so nothing is compared."""
    on_the_writer(cluster, *MEANWHILE)
    with sessions(router)() as s:
        root = s.get_one(Root, 1, options=ALL)
        root.branches.append(Branch(id=9))
        root.labels.append(Label(name="other"))
        before = len(proxy.statements)
        s.commit()
    assert not [each for each in proxy.statements[before:] if "FROM root JOIN" in each]
    assert cluster.execute("SELECT count(*) FROM branch") == [(3,)]


def test_what_a_unit_has_inserted_itself_is_not_hidden(cluster: Cluster[Any], router: Router) -> None:
    """A row that the session has inserted beside the collection is not taken for a change by others."""
    with sessions(router)() as s:
        root = s.get_one(Root, 1, options=ALL)
        own = Branch(id=9, root_id=1)
        s.add(own)
        s.flush()
        root.branches.clear()
        s.commit()
    assert cluster.execute("SELECT id FROM branch") == [(9,)]


def test_a_collection_is_read_anew_once_for_a_class(cluster: Cluster[Any], proxy: FaultProxy, router: Router) -> None:
    """Deleting many objects reads their collections once a class, or not at all if the writer has shown the objects."""
    for options, expected in (({}, 1), ({"read_only": False}, 0)):
        on_the_writer(cluster, *(f"INSERT INTO root (id, note) VALUES ({number}, '')" for number in (3, 4, 5)))
        cluster.resume_replay(cluster.readers[0])
        cluster.wait_in_sync()
        cluster.pause_replay(cluster.readers[0])
        with sessions(router, **options)() as s:
            for root in s.scalars(select(Root).where(Root.id > 2).options(*ALL)).all():
                s.delete(root)
            before = len(proxy.statements)
            s.commit()
        reads = [each for each in proxy.statements[before:] if "FROM branch" in each and each.startswith("SELECT")]
        assert len(reads) == expected


def test_a_refused_delete_is_run_again(cluster: Cluster[Any], router: Router) -> None:
    """A delete by Core knows no cascade, so the writer refuses it, and the function runs again."""
    on_the_writer(cluster, "INSERT INTO bird VALUES (2, 1)")
    runs: list[int] = []

    def work(s: RoutingSession) -> None:
        runs.append(1)
        birds = s.scalars(select(Bird.id)).all()
        s.execute(text("DELETE FROM link"))
        s.execute(text("DELETE FROM leaf"))
        s.execute(text("DELETE FROM branch"))
        for bird in birds:
            s.execute(text("DELETE FROM bird WHERE id = :id"), {"id": bird})
        s.execute(text("DELETE FROM root"))

    router.run_transaction(sessions(router), work)
    assert len(runs) == 2
    with pytest.raises(DBAPIError), sessions(router)() as s:
        s.execute(text("INSERT INTO bird VALUES (9, 99)"))


@pytest.mark.parametrize("what", ["table", "column"])
def test_a_read_of_what_a_late_reader_has_not_got_goes_on(cluster: Cluster[Any], make_router: MakeRouter, what: str) -> None:
    """A read that names what a migration has just made goes to the writer, and the next one to the reader that has it."""
    reader = cluster.readers[0]
    cluster.execute("DROP TABLE IF EXISTS made")
    cluster.execute("CREATE TABLE made (id int)")
    cluster.wait_in_sync()
    router = make_router(instances=[reader.address])
    until_readers_serve(router, 1)
    Session = sessions(router)
    cluster.pause_replay(reader)
    if what == "table":
        cluster.execute("ALTER TABLE made RENAME TO made_anew")
        read = text("SELECT count(*) FROM made_anew")
    else:
        cluster.execute("ALTER TABLE made ADD more int")
        read = text("SELECT count(more) FROM made")
    if engine(cluster) == "postgresql":
        cluster.execute("GRANT SELECT ON ALL TABLES IN SCHEMA public TO app")
    with Session() as s:
        assert s.scalar(read) == 0
        assert place(s) == "writer"
        s.rollback()
        with pytest.raises(DBAPIError, match="nowhere"):
            s.execute(text("SELECT nowhere FROM made_nowhere"))
    with Session(read_only=True) as s, pytest.raises(DBAPIError):
        s.scalar(read)
    cluster.resume_replay(reader)
    cluster.wait_in_sync()

    def on_the_reader() -> bool:
        with Session() as s:
            assert s.scalar(read) == 0
            return place(s) == "reader"

    eventually(on_the_reader)
    cluster.execute("DROP TABLE IF EXISTS made")
    cluster.execute("DROP TABLE IF EXISTS made_anew")
