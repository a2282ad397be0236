"""The public API as a user's type checker sees it. Checked by `mypy --strict`; never run."""

from collections.abc import Mapping, Sequence
from typing import Any, assert_type, overload
from wsgiref.types import WSGIApplication

from sqlalchemy import Select, insert, select, text
from sqlalchemy.engine import URL, Connection, Engine, ScalarResult
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, sessionmaker
from sqlalchemy.pool import PoolProxiedConnection
from tenacity import stop_after_attempt, wait_none

from aurora_router import (
    Decision,
    Effect,
    Facts,
    Failure,
    Instance,
    InstanceStats,
    NoReaderAvailable,
    NoWriterAvailable,
    Outcome,
    OutcomeUnknown,
    Reason,
    Role,
    Router,
    RouterError,
    RouterStats,
    RoutingMixin,
    RoutingSession,
    Topology,
    classify,
    classify_error,
    events,
)
from aurora_router.core.selection import Load
from aurora_router.jobs import put_token, scope_of
from aurora_router.middleware import AsgiApp, AsgiMiddleware, WsgiMiddleware


class Base(DeclarativeBase):
    pass


class Item(Base):
    __tablename__ = "item"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]


def listens(event: events.Event) -> None:
    match event:
        case events.Routed(instance=instance, reason=reason):
            assert_type(instance, str)
            assert_type(reason, Reason)
        case events.RetriesRefused(instance=where, refused=refused):
            assert_type(where, str | None)
            assert_type(refused, int)
        case events.WriterChanged(old=old, epoch=epoch):
            assert_type(old, str | None)
            assert_type(epoch, int)
        case _:
            pass


def first(readers: Sequence[Instance], load: Load, rnd: float) -> Instance:
    return min(readers, key=lambda reader: load.in_use(reader.id))


def a_router_with_many_options(url: URL) -> Router:
    return Router(
        url,
        instances=["db-2:5432", "db-3"],
        password=lambda: "secret",
        consistency="global",
        max_lag=1.5,
        balance="fastest",
        no_reader="error",
        writer_share_for_reads=0.25,
        connects_at_once=8,
        failover_timeout=30,
        probe_interval=0.5,
        probe_timeout=0.5,
        position_interval=0.1,
        pin_seconds=2,
        read_only_functions=("app.price",),
        engine_options={"pool_size": 10, "connect_args": {"sslmode": "verify-full"}},
        reader_options={"pool_size": 5},
        pooler="transaction",
        accept_new_cluster=True,
        listeners=[listens, print],
    )


def other_options() -> None:
    Router("postgresql+psycopg://db-1/shop", reader_endpoint="db-ro:5432", consistency="eventual", balance=first)
    Router("postgresql+psycopg://db-1/shop", balance=lambda readers, load, rnd: readers[0], max_lag=None)
    with Router("postgresql+psycopg://db-1,db-2/shop", listeners=(lambda event: None,)) as router:
        assert_type(router, Router)
        router.start()
        router.add_instance("db-4:5432")
        router.remove_instance("db-4:5432")
        router.close()


def connections(router: Router) -> None:
    with router.connect() as connection:
        assert_type(connection, Connection)
        assert_type(connection.execute(select(Item.id)).scalars().all(), Sequence[int])
    assert_type(router.connect(read_only=True), Connection)
    with router.begin(read_only=False) as connection:
        assert_type(connection, Connection)
    raw = router.raw_connection(read_only=True)
    assert_type(raw, PoolProxiedConnection)
    raw.close()


def pictures(router: Router) -> None:
    topology = router.topology
    assert_type(topology, Topology)
    assert_type(topology.writer, Instance | None)
    assert_type(topology.readers, tuple[Instance, ...])
    assert_type(topology.instances, tuple[Instance, ...])
    assert_type(topology.epoch, int)
    assert_type(topology.said(), tuple[str, ...])
    for instance in topology:
        assert_type(instance.id, str)
        assert_type(instance.host, str)
        assert_type(instance.port, int)
        assert_type(instance.role, Role | None)
        assert_type(instance.lag, float | None)
        assert_type(instance.healthy, bool)
        assert_type(str(instance.position), str)


def numbers(router: Router) -> None:
    stats = router.stats()
    assert_type(stats, RouterStats)
    assert_type(stats.instances, tuple[InstanceStats, ...])
    assert_type(stats.by_id["db-1:5432"].role, Role | None)
    assert_type(stats.by_id["db-1:5432"].pool_limit, int | None)
    assert_type(stats.reads_by_readers + stats.reads_by_writer + stats.writer_waits, int)


def decisions(router: Router) -> None:
    decision = router.explain("SELECT 1")
    assert_type(decision, Decision)
    assert_type(decision.effect, Effect | None)
    assert_type(decision.instance, Instance | None)
    assert_type(decision.reason, Reason)
    assert_type(router.explain("SELECT 1", read_only=True).reason.value, str)
    assert_type(classify("SELECT 1"), Effect)
    assert_type(classify("SELECT 1", "mysql", read_only_functions=["f"]) is Effect.READ, bool)


def sessions(router: Router) -> None:
    make = sessionmaker(class_=RoutingSession, router=router, expire_on_commit=False)
    assert_type(make, sessionmaker[RoutingSession])
    with make() as s:
        assert_type(s, RoutingSession)
    with make(read_only=True) as s, s.begin():
        assert_type(s, RoutingSession)
    with make.begin() as s:
        assert_type(s, RoutingSession)
    assert_type(RoutingSession(router=router, read_only=False, autoflush=False), RoutingSession)


def statements(s: RoutingSession) -> None:
    assert_type(s.scalars(select(Item)), ScalarResult[Item])
    assert_type(s.scalars(select(Item)).all(), Sequence[Item])
    name: str | None = s.scalar(select(Item.name))
    assert_type(len(name or ""), int)
    assert_type(s.scalars(select(Item), bind_arguments={"read_only": True}).one(), Item)
    assert_type(s.scalars(select(Item), execution_options={"route": "writer"}).one(), Item)
    assert_type(s.scalars(select(Item).execution_options(route="reader")).one(), Item)
    assert_type(s.get(Item, 1), Item | None)
    assert_type(s.get_one(Item, 1), Item)
    assert_type(s.execute(select(Item)).scalars().all(), Sequence[Item])
    assert_type(s.execute(select(Item)).scalar_one(), Item)
    s.execute(insert(Item), [{"id": 1}]).close()
    s.execute(text("SELECT :one"), {"one": 1}).all()
    assert_type(s.connection(), Connection)
    assert_type(s.connection(execution_options={"isolation_level": "SERIALIZABLE"}), Connection)
    assert_type(s.get_bind(), Engine | Connection)
    assert_type(s.get_bind(Item, read_only=False), Engine | Connection)
    s.connection(bind_arguments={"mapper": Item})


class Counting(Session):
    """Another library's Session, with a method that has more exact types there."""

    @overload
    def first(self, statement: Select[tuple[int]]) -> int: ...
    @overload
    def first(self, statement: Select[tuple[str]]) -> str: ...
    def first(self, statement: Any) -> Any:
        return self.scalar(statement)


class MySession(RoutingMixin, Counting):
    pass


def mixed(router: Router) -> None:
    make = sessionmaker(class_=MySession, router=router)
    assert_type(make, sessionmaker[MySession])
    with make(read_only=None) as s:
        assert_type(s, MySession)
        assert_type(s.scalars(select(Item)).all(), Sequence[Item])
    assert_type(MySession(router=router), MySession)


def errors(error: RouterError) -> Mapping[str, object]:
    assert_type(error.sent, bool)
    assert_type(error.outcome_known, bool)
    if isinstance(error, NoWriterAvailable):
        assert_type(error.waited, float)
        assert_type(error.tried, tuple[str, ...])
    if isinstance(error, NoReaderAvailable):
        assert_type(error.said, tuple[str, ...])
        assert_type(error.waited, float | None)
    return {"error": error}


def runs(router: Router, Session: sessionmaker[RoutingSession]) -> None:
    def named(s: RoutingSession) -> str:
        return s.get_one(Item, 1).name

    assert_type(router.run_transaction(Session, named), str)
    router.run_transaction(Session, named, deadline=5.0, stop=stop_after_attempt(3), wait=wait_none(), commit_check="table")
    for attempt in router.attempts(Session, commit_check=None):
        with attempt as s:
            assert_type(s, RoutingSession)

    @router.transactional(Session, deadline=5.0)
    def rename(s: RoutingSession, number: int, *, name: str) -> int:
        s.get_one(Item, number).name = name
        return number

    assert_type(rename(1, name="new"), int)
    try:
        rename(2, name="newer")
    except OutcomeUnknown as error:
        assert_type(error.resolve(timeout=5.0), Outcome)
        known = classify_error(error)
        assert_type(known, Facts)
        assert_type(known.failure, Failure)
        assert_type(known.safe_to_repeat, bool)
        assert_type(known.safe_to_retry, bool)
    sessionmaker(class_=RoutingSession, router=router, commit_check="xid")
    router.init_commit_table()


def web(router: Router, asgi: AsgiApp, wsgi: WSGIApplication) -> tuple[AsgiApp, WSGIApplication]:
    inner = AsgiMiddleware(asgi, router, cookie="of_shop", header="x-shop", secure=True)
    return AsgiMiddleware(inner, router), WsgiMiddleware(wsgi, router)


def jobs(router: Router) -> None:
    headers: dict[str, str] = {}
    put_token(router, headers)
    with scope_of(router, headers) as scope:
        assert_type(scope.token, str | None)
    assert_type(router.current_token(), str | None)
