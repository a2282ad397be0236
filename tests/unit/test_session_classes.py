"""Session classes of the application with routing mixed in, on a fake cluster."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.orm import Session, sessionmaker
from sqlalchemy.sql.expression import ClauseElement, Executable

from aurora_router import Router, RoutingMixin
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
