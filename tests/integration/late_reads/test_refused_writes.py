"""The writer refuses what a late reader's rows led to, and the unit runs again. A late reader's missing table is no error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import insert, select, text, update
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.orm.exc import StaleDataError

from aurora_router import Failure, Router, RoutingSession, classify_error
from aurora_router.core import events
from aurora_router.local.cluster import Cluster
from tests.integration.late_reads.tables import Bird, Branch, Counted, Label, Root, links
from tests.integration.shop import BOTH, engine, eventually, place, sessions, until_readers_serve
from tests.integration.stale_writes.helpers import on_the_writer

pytestmark = BOTH

MakeRouter = Callable[..., Router]


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


GONE = "DELETE FROM mole;DELETE FROM link;DELETE FROM leaf;DELETE FROM branch;DELETE FROM bird;DELETE FROM root"


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
    """An error is raised if the second attempt meets it on the writer, too, or if the unit read there."""
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
    """An error that a savepoint undoes needs no second attempt."""
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
        s.execute(text("DELETE FROM mole"))
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
