"""A late reader's collections that decide what is written are read again on the writer, or compared with what it has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import create_engine, event, select
from sqlalchemy.orm import Session as PlainSession
from sqlalchemy.orm import make_transient_to_detached, object_session, selectinload
from tenacity import stop_after_attempt

from aurora_router import Router, RoutingSession, StaleRead
from aurora_router.local import FaultProxy
from aurora_router.local.cluster import Cluster
from tests.integration.late_reads.tables import Branch, Flower, Jar, Label, Leaf, Mole, Nest, Root, Tray
from tests.integration.shop import BOTH, place, sessions
from tests.integration.stale_writes.helpers import on_the_writer

pytestmark = BOTH
MEANWHILE = (
    "INSERT INTO branch VALUES (2, 1)",
    "INSERT INTO leaf VALUES (2, 1)",
    "INSERT INTO leaf VALUES (3, 2)",
    "INSERT INTO bird VALUES (2, 1)",
    "INSERT INTO flower VALUES (1, 1)",
    "INSERT INTO stone VALUES (1, 1)",
    "INSERT INTO worm VALUES (1, 1)",
    "INSERT INTO mole VALUES (2, 1)",
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


def replace_moles(root: Root) -> None:
    root.moles = [Mole(id=9)]  # type: ignore[assignment]


def replace_moles_by_some_of_them(root: Root) -> None:
    root.moles = [root.moles.filter_by(id=1).one()]  # type: ignore[assignment]


def replace_worms_by_none(root: Root) -> None:
    root.worms = []  # type: ignore[assignment]


def unset_birds(root: Root) -> None:
    del root.birds


def unset_flower(root: Root) -> None:
    del root.flower


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
        (unset_birds, "SELECT id FROM bird WHERE root_id = 1"),
        (unset_flower, "SELECT id FROM flower"),
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


@pytest.mark.parametrize(
    ("change", "left"),
    [
        (replace_moles, "SELECT id FROM mole WHERE id <> 9"),
        (replace_moles_by_some_of_them, "SELECT id FROM mole WHERE id <> 1"),
        (replace_worms_by_none, "SELECT id FROM worm"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_a_dynamic_collection_hid_is_taken_out(
    cluster: Cluster[Any], router: Router, change: Callable[[Root], None], left: str
) -> None:
    """SQLAlchemy loads a dynamic collection that is replaced as a whole. A late reader may hide rows of it, too."""
    on_the_writer(cluster, *MEANWHILE)
    began: list[str] = []

    def work(s: RoutingSession) -> None:
        root = s.get_one(Root, 1)
        began.append(place(s))
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
    """Rows that a filter left out are not new: a plain session does not compare, and an attempt succeeds."""
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


def test_a_collection_of_another_database_is_not_compared(cluster: Cluster[Any], router: Router) -> None:
    """Rows of another database are neither compared nor locked in the cluster, even if it has a table of that name."""
    on_the_writer(cluster, "INSERT INTO branch (id, root_id) VALUES (7, 1)")
    elsewhere = create_engine(cluster.url)
    Session = sessions(router, binds=dict.fromkeys((Root, Branch, Leaf), elsewhere))
    runs: list[str] = []

    def work(s: RoutingSession) -> None:
        label = s.get_one(Label, "old")
        runs.append(place(s))
        root = s.scalars(select(Root).options(selectinload(Root.branches.and_(Branch.id < 7)))).unique().one()
        root.branches.clear()
        label.serial = 5

    router.run_transaction(Session, work)
    elsewhere.dispose()
    assert runs == ["reader"]
    assert cluster.execute("SELECT id FROM branch") == [(7,)]


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
        root.moles.append(Mole(id=9))
        before = len(proxy.statements)
        s.commit()
    assert not [each for each in proxy.statements[before:] if "FROM root JOIN" in each]
    assert cluster.execute("SELECT count(*) FROM branch") == [(3,)]


def add_to_it(root: Root) -> None:
    root.moles.append(Mole(id=9))


def remove_what_was_loaded(root: Root) -> None:
    moles = root.moles.all()
    root.moles.remove(moles[0])


def unset_what_was_loaded(root: Root) -> None:
    kept = [*root.birds]
    del root.birds
    assert len(kept) == 1


@pytest.mark.parametrize(
    "change", [add_to_it, remove_what_was_loaded, unset_what_was_loaded], ids=lambda value: getattr(value, "__name__", "")
)
def test_a_collection_whose_members_are_known_takes_one_run(
    cluster: Cluster[Any], router: Router, change: Callable[[Root], None]
) -> None:
    """A collection without a history is compared with what the session has loaded, and an addition with nothing."""
    runs: list[int] = []

    def work(s: RoutingSession) -> None:
        runs.append(1)
        change(s.get_one(Root, 1))

    router.run_transaction(sessions(router), work)
    assert len(runs) == 1


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
