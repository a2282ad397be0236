"""Session classes of the application with routing mixed in, on a fake cluster."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from sqlalchemy import Integer, bindparam, create_engine, event, func, select, text
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, sessionmaker
from sqlalchemy.sql.expression import ClauseElement, Executable

from aurora_router import ConfigurationError, ReadOnlyViolation, Router, RoutingMixin, RoutingSession
from tests.fakes.cluster import STOCK, FakeCluster
from tests.fakes.driver import Dialect, installed
from tests.integration.shop import place
from tests.stories import READ, WRITE


class Uncached(Executable, ClauseElement):
    """A write that SQLAlchemy compiles each time. So only its final text shows what it is."""

    inherit_cache = False


@compiles(Uncached)
def as_text(*_: Any, **__: Any) -> str:
    return WRITE.text


class AppSession(Session):
    """A session class with ways of its own, as SQLModel has exec()."""

    def exec(self, statement: Any, **options: Any) -> Any:
        return super().execute(statement, **options)

    def exec_scalar(self, statement: Any, **options: Any) -> Any:
        return super().scalar(statement, **options)

    def exec_scalars(self, statement: Any, **options: Any) -> Any:
        return super().scalars(statement, **options)

    def raw(self, **options: Any) -> Any:
        return super().connection(**options)


class MixedSession(RoutingMixin, AppSession):
    pass


Read = Callable[..., int]
WAYS: dict[str, Read] = {
    "execute": lambda s, **options: s.exec(READ, **options).scalar(),
    "scalar": lambda s, **options: s.exec_scalar(READ, **options),
    "scalars": lambda s, **options: s.exec_scalars(READ, **options).one(),
}
by_each_way = pytest.mark.parametrize("read", WAYS.values(), ids=WAYS)


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCluster]:
    monkeypatch.setattr(Dialect, "_get_server_version_info", lambda *_: (16, 4), raising=False)
    cluster = FakeCluster(readers=2)
    with installed(cluster):
        yield cluster


@pytest.fixture
def router(cluster: FakeCluster) -> Iterator[Router]:
    with Router("postgresql+fakepg://app@db-1/shop", instances=["db-2", "db-3"]) as router:
        router.start()
        yield router


@pytest.fixture
def make(router: Router) -> sessionmaker[MixedSession]:
    return sessionmaker(class_=MixedSession, router=router)


@by_each_way
def test_a_hint_counts_in_a_way_of_the_class_itself(make: sessionmaker[MixedSession], read: Read) -> None:
    """A class that calls super().execute() honours `route`, as execute() does."""
    with make() as s:
        assert read(s, execution_options={"route": "writer"}) == STOCK
        assert place(s) == "writer"


@by_each_way
def test_a_lost_read_is_retried_in_a_way_of_the_class(make: sessionmaker[MixedSession], cluster: FakeCluster, read: Read) -> None:
    """A class that calls super().execute() does not hear that the reader has died."""
    with make() as s:
        assert read(s) == STOCK
        for reader in cluster.readers:
            cluster.kill(reader)
        assert read(s) == STOCK


@by_each_way
def test_a_unit_moves_in_a_way_of_the_class_itself(
    make: sessionmaker[MixedSession], router: Router, cluster: FakeCluster, read: Read
) -> None:
    """If another session of the scope has written, a class that calls super().execute() gets the writer's answer."""
    cluster.set_late(*cluster.readers)
    with router.causal_scope(), make() as s:
        assert read(s) == STOCK
        with make() as other:
            other.execute(WRITE)
            other.commit()
        assert read(s) == STOCK + 1
        assert place(s) == "writer"


def test_an_uncached_write_moves_in_a_way_of_the_class(make: sessionmaker[MixedSession], cluster: FakeCluster) -> None:
    """A class that calls super().execute() writes, although the unit finds out late that it must move."""
    with make() as s:
        assert s.scalar(text("SELECT 1")) == 42
        s.exec(Uncached())
        s.commit()
    assert cluster.stock(cluster.end) == STOCK + 1


CONNECTIONS: dict[str, Callable[[MixedSession], Any]] = {
    "super": lambda s: s.raw().execute(WRITE),
    "super, bind": lambda s: s.raw(bind_arguments={"bind": s.get_bind()}).execute(WRITE),
    "connection, bind": lambda s: s.connection(bind_arguments={"bind": s.get_bind()}).execute(WRITE),
    "execute, bind": lambda s: s.execute(WRITE, bind_arguments={"bind": s.get_bind()}),
}
on_each_connection = pytest.mark.parametrize("write", CONNECTIONS.values(), ids=CONNECTIONS)


@on_each_connection
def test_a_write_on_an_engine_of_the_router_is_the_units(
    make: sessionmaker[MixedSession], cluster: FakeCluster, write: Callable[[MixedSession], Any]
) -> None:
    """A session sees what it has written on the engine of get_bind(), or on the connection of super().connection()."""
    cluster.set_late(*cluster.readers)
    with make() as s:
        assert s.scalar(READ) == STOCK
        write(s)
        assert s.scalar(READ) == STOCK + 1
        s.commit()
        assert s.consistency_token is not None
        assert s.scalar(READ) == STOCK + 1


@on_each_connection
def test_a_read_only_session_writes_on_no_engine_of_the_router(
    make: sessionmaker[MixedSession], cluster: FakeCluster, write: Callable[[MixedSession], Any]
) -> None:
    """A read-only session refuses a write also on the engine of get_bind(), and on super().connection()."""
    with make(read_only=True) as s, pytest.raises(ReadOnlyViolation):
        write(s)
    assert cluster.stock(cluster.end) == STOCK


def test_a_read_on_an_engine_of_the_router_is_routed(make: sessionmaker[MixedSession]) -> None:
    """The router's engines stand for the cluster, so a read with one of them as `bind` goes to a reader."""
    with make() as s:
        assert s.scalar(READ, bind_arguments={"bind": s.get_bind()}) == STOCK
        assert place(s) == "reader"


def test_an_engine_with_options_is_used_as_it_is(make: sessionmaker[MixedSession]) -> None:
    """An engine with execution options may mean another schema, so it does not stand for the cluster."""
    with make() as s:
        bind = s.get_bind().execution_options(logging_token="mine")
        assert s.scalar(READ, bind_arguments={"bind": bind}) == STOCK
        assert place(s) == "nowhere"


def test_a_connection_in_a_listener_leaves_the_statement_alone(make: sessionmaker[MixedSession]) -> None:
    """A listener of do_orm_execute may ask for the session's connection, which is on the writer."""
    made: list[Any] = []
    with make() as s:

        @event.listens_for(s, "do_orm_execute")
        def connect(_: Any) -> None:
            made.append(s.connection())

        assert s.scalar(READ) == STOCK
        assert place(s) == "writer"
        assert made == [s.connection()]


class Base(DeclarativeBase):
    pass


class Part(Base):
    """Its table is in another database."""

    __tablename__ = "part"
    id: Mapped[int] = mapped_column(primary_key=True)


def test_a_connection_elsewhere_exposes_no_unit(make: sessionmaker[MixedSession], cluster: FakeCluster) -> None:
    """A connection to another database does not keep the cluster's reads from being retried."""
    other = create_engine("sqlite://")
    with make(binds={Part: other}) as s:
        assert s.scalar(READ) == STOCK
        assert s.connection(bind_arguments={"mapper": Part}).engine is other
        for reader in cluster.readers:
            cluster.kill(reader)
        assert s.scalar(READ) == STOCK
    other.dispose()


class TenantSession(Session):
    def __init__(self, tenant: str, **options: Any) -> None:
        super().__init__(**options)
        self.tenant = tenant


class MixedTenantSession(RoutingMixin, TenantSession):
    pass


def test_a_class_gets_its_own_positional_arguments(router: Router) -> None:
    """A class with routing mixed in keeps its positional arguments. Session's own, an engine, is refused."""
    mixed: Any = MixedTenantSession
    assert mixed("acme", router=router).tenant == "acme"
    plain: Any = RoutingSession
    with pytest.raises(ConfigurationError, match="leave out bind"):
        plain(create_engine("sqlite://"), router=router)


class ChoosingSession(Session):
    """A session class that has an engine for everything, as Flask-SQLAlchemy's."""

    engine = create_engine("sqlite://")

    def get_bind(self, *_: Any, **__: Any) -> Any:
        return self.engine


class Choosing:
    """A mixin that is no session class relies on super()."""

    def get_bind(self, *args: Any, **options: Any) -> Any:
        return super().get_bind(*args, **options)  # type: ignore[misc]


@pytest.mark.parametrize("bases", [(ChoosingSession, RoutingSession), (ChoosingSession, RoutingMixin, Session)])
def test_a_class_that_would_hide_the_routing_is_refused(bases: tuple[type, ...]) -> None:
    """A session class with a get_bind() of its own cannot come before the mixin, because nothing would be routed."""
    with pytest.raises(ConfigurationError, match="Wrong: RoutingMixin comes first, before ChoosingSession"):
        type("Wrong", bases, {})


@pytest.mark.parametrize("bases", [(Choosing, RoutingSession), (AppSession, RoutingSession), (RoutingMixin, ChoosingSession)])
def test_a_class_that_lets_the_mixin_route_is_taken(router: Router, bases: tuple[type, ...]) -> None:
    """These come before the mixin: a mixin that chooses by super(), and a session class that does not choose."""
    routed: Any = type("Routed", bases, {})
    with routed(router=router) as s:
        assert s.scalar(READ) == STOCK
        assert place(s) == "reader"


LOOKS: dict[str, Callable[[MixedSession], Any]] = {
    "str(query)": lambda s: str(s.query(Part)),
    "str(query with a lock)": lambda s: str(s.query(Part).with_for_update()),
    "get_bind(clause)": lambda s: s.get_bind(clause=READ),
    "get_bind(mapper)": lambda s: s.get_bind(Part),
    "get_bind()": lambda s: s.get_bind(),
}


@pytest.mark.parametrize("autobegin", [True, False])
@pytest.mark.parametrize("look", LOOKS.values(), ids=LOOKS)
def test_to_look_at_a_query_or_an_engine_begins_nothing(
    make: sessionmaker[MixedSession], look: Callable[[MixedSession], Any], autobegin: bool
) -> None:
    """str(query) and get_bind() connect nowhere, and begin no transaction."""
    with make(autobegin=autobegin) as s:
        look(s)
        assert place(s) == "nowhere"
        assert not s.in_transaction()


@pytest.mark.parametrize("look", [look for what, look in LOOKS.items() if "mapper" not in what])
def test_to_look_at_a_query_moves_nothing(make: sessionmaker[MixedSession], look: Callable[[MixedSession], Any]) -> None:
    """str(query) and get_bind() leave a unit on its reader."""
    with make() as s:
        assert s.scalar(READ) == STOCK
        look(s)
        assert place(s) == "reader"


@pytest.mark.parametrize("route", [None, "writer"])
def test_a_load_inside_a_statement_leaves_its_hint_alone(make: sessionmaker[MixedSession], route: str | None) -> None:
    """A statement keeps its hint if one of its parameters loads something, unless that load moves the unit."""
    with make() as s:

        def load() -> int:
            return s.scalar(READ, execution_options={"route": route}) or 0

        unknown = func.unknown(bindparam("n", callable_=load, type_=Integer))
        assert s.scalar(select(unknown), bind_arguments={"read_only": True}) == 42
        assert place(s) == ("reader" if route is None else "writer")
