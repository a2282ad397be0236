"""The Python of the README and docs/ runs unchanged on a real cluster; only the hosts are put in.

docs/adopting.md has a test module of its own. A block after `<!-- not run: why -->` is a fragment, and one after
`<!-- run on postgresql -->` is for PostgreSQL alone.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from celery import signals
from sqlalchemy import text
from sqlalchemy.orm import close_all_sessions

from aurora_router import Router, RoutingSession
from aurora_router.local import FaultProxy
from aurora_router.local.cluster import Cluster
from tests.integration.shop import BOTH, engine, eventually, place
from tests.integration.sites import asking, asking_wsgi, with_cookie

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
BLOCK = re.compile(r"^(?:<!-- (?P<mark>[^\n]*) -->\n)?```python\n(?P<source>.*?)^```$", re.DOTALL | re.MULTILINE)


def blocks_of(document: Path, server: str) -> list[re.Match[str]]:
    """The blocks of a document that are for PostgreSQL, MariaDB or MySQL."""
    return [block for block in BLOCK.finditer(document.read_text()) if block["mark"] in (None, f"run on {server}")]


class Reader:
    """Runs the blocks of documents on a cluster, in order and in one namespace.

    places: the last place of each closed session's unit
    said: the output of the examples on stdout
    """

    def __init__(self, cluster: Cluster[Any], endpoint: FaultProxy, capsys: pytest.CaptureFixture[str]) -> None:
        one, two = self.readers = cluster.readers
        self.cluster, self.endpoint, self.capsys = cluster, endpoint, capsys
        # SQLAlchemy and FastAPI look annotations up in the module of a class or function, so the examples need one.
        self.module = ModuleType("page")
        self.names = vars(self.module)
        self.places: list[str] = []
        instances = f"{cluster.writer.address},{one.address},{two.address}"
        self.real = {
            "postgresql+psycopg://app:secret@db-1:5432/shop": cluster.url,
            "postgresql+psycopg://app:secret@db-rw:5432/shop": cluster.url,
            "postgresql+psycopg://app:secret@db-1,db-2,db-3/shop": cluster.url.replace(cluster.writer.address, instances),
            "db-2:5432": one.address,
            "db-3:5432": two.address,
            "db-ro:5432": endpoint.address,
        }

    def run(self, document: Path, blocks: slice = slice(None), **after: Callable[[], None]) -> None:
        """Run the blocks of a document, and call each check in `after` when a block with its name has run."""
        looked = set()
        for block in blocks_of(document, engine(self.cluster))[blocks]:
            source = block["source"]
            for given, real in self.real.items():
                source = source.replace(given, real)
            above = "\n" * block.string.count("\n", 0, block.start("source"))
            code = compile(above + source, document.name, "exec", dont_inherit=True)
            exec(code, self.names)
            self.cluster.wait_in_sync()
            for part, look in after.items():
                if re.search(rf"\b{part}\b", source):
                    look()
                    looked.add(part)
        assert looked == {*after}

    @property
    def said(self) -> str:
        return self.capsys.readouterr().out

    def close(self) -> None:
        for value in [*self.names.values()]:
            if isinstance(value, Router):
                value.close()


_TAKEN_FOR_GRANTED = {
    "postgresql": (
        "CREATE OR REPLACE FUNCTION unpaid_orders() RETURNS int LANGUAGE sql VOLATILE AS 'SELECT 1'",
        "GRANT ALL ON SCHEMA public TO app",
    ),
    "mariadb": ("CREATE FUNCTION unpaid_orders() RETURNS int DETERMINISTIC RETURN 1",),
    "mysql": ("CREATE FUNCTION unpaid_orders() RETURNS int DETERMINISTIC RETURN 1",),
}


@pytest.fixture
def cluster(aurora_cluster: Cluster[Any]) -> Iterator[Cluster[Any]]:
    """The shared cluster, with the function and the privileges that the documents take for granted."""
    for statement in _TAKEN_FOR_GRANTED[engine(aurora_cluster)]:
        aurora_cluster.execute(statement)
    yield aurora_cluster
    close_all_sessions()
    for what in ("TABLE IF EXISTS orders", "TABLE IF EXISTS aurora_router_commits", "FUNCTION IF EXISTS unpaid_orders"):
        aurora_cluster.execute(f"DROP {what}")


@pytest.fixture
def reader(cluster: Cluster[Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Reader]:
    one, two = cluster.readers
    with ExitStack() as stack:
        proxy = stack.enter_context(FaultProxy([(one.host, one.port), (two.host, two.port)]))
        reader = Reader(cluster, proxy, capsys)
        stack.callback(reader.close)
        closing = RoutingSession.close

        def close(session: RoutingSession) -> None:
            reader.places.append(place(session))
            closing(session)

        monkeypatch.setitem(sys.modules, reader.module.__name__, reader.module)
        monkeypatch.setattr(RoutingSession, "close", close)
        yield reader


@pytest.fixture
def page(reader: Reader) -> Callable[..., None]:
    """page(name, **after) runs a page of docs/, with the `router`, `Session` and `Order` of the README's first block."""
    reader.run(README, slice(1))
    return lambda name, **after: reader.run(ROOT / "docs" / f"{name}.md", **after)


def see_own_requests_only(reader: Reader, tell: str, show: Callable[..., Any]) -> None:
    """Check that a client sees the order that it has sent, however late the readers are.

    tell: the name of the ASGI application
    """
    for late in reader.readers:
        reader.cluster.pause_replay(late)
    ask = asking(reader.names[tell])
    cookie = ask("POST", "/orders/70?item=cake").cookie
    assert "cake" in show("GET", "/orders/70", with_cookie(cookie)).text
    assert "cake" in ask("GET", "/orders/70", with_cookie(cookie)).text
    for late in reader.readers:
        reader.cluster.resume_replay(late)
    reader.cluster.wait_in_sync()


@BOTH
def test_the_python_of_the_readme_does_what_it_says(reader: Reader) -> None:
    """Reads, writes, a failover's unit and a web service of the README work as its comments say."""

    def sessions() -> None:
        automatic, *declared = reader.places
        assert automatic in ("reader", "writer"), "as soon as a reader has the order"
        assert declared == ["reader", "nowhere"]
        assert [order.item for order in reader.names["orders"]] in (["tea"], []), "the reader may be late"
        assert reader.cluster.execute("SELECT id, item, paid FROM orders") == [(1, "tea", True)]

    def web() -> None:
        assert reader.names["orders_now"] == 2
        see_own_requests_only(reader, "app", asking(reader.names["app"]))

    reader.run(README, with_for_update=sessions, AsgiMiddleware=web)


@BOTH
def test_getting_started_does_what_it_says(reader: Reader) -> None:
    """The page needs nothing but a cluster, and its change is on the writer in the end."""
    reader.run(ROOT / "docs" / "getting-started.md")
    assert reader.cluster.execute("SELECT id, item, paid FROM orders") == [(1, "green tea", True)]


@BOTH
def test_the_pages_of_sessions_do_what_they_say(reader: Reader, page: Callable[..., None]) -> None:
    """Hints send reads where they say, Core connections work, and the page's own session class is routed."""

    def hints() -> None:
        assert reader.places[-2:] == ["writer", "writer"]

    def mixed_in() -> None:
        with reader.names["AuditedSessions"]() as s:
            assert s.get(reader.names["Order"], 1).paid

    page("sessions", bind_arguments=hints, AuditedSessions=mixed_in)


@BOTH
@pytest.mark.parametrize("name", ["consistency", "late-reads", "failover", "errors"])
def test_a_page_does_what_it_says(page: Callable[..., None], name: str) -> None:
    """The assertions that stand in the examples of these pages hold."""
    page(name)


@BOTH
def test_the_page_of_connecting_does_what_it_says(reader: Reader, page: Callable[..., None]) -> None:
    """Behind the reader endpoint both readers are found, and a reader's options are used for readers."""

    def endpoints() -> None:
        router: Router = reader.names["endpoints"]
        assert router.explain("SELECT 1").instance is not None
        eventually(lambda: len(router.topology.by_id[reader.endpoint.address].servers) == 2)

    def small() -> None:
        for read_only, size in ((True, 20), (False, 10)):
            with reader.names["small"].connect(read_only=read_only) as connection:
                assert connection.engine.pool.size() == size

    page("connecting", reader_endpoint=endpoints, reader_options=small)


@BOTH
def test_the_page_of_events_does_what_it_says(reader: Reader, page: Callable[..., None]) -> None:
    """The decision and the events are printed as the page says."""

    def watched() -> None:
        with reader.names["watched"].connect(read_only=True) as connection:
            assert connection.engine.url.host in {instance.host for instance in reader.readers}

    page("events", listeners=watched)
    writer, said = reader.cluster.writer.address, reader.said
    assert f"WRITE {writer} not known to be a read: the writer" in said
    assert f"writer: None -> {writer}, epoch" in said
    assert any(f"{instance.address}: declared read-only" in said for instance in reader.readers)


@BOTH
def test_the_page_of_web_services_does_what_it_says(reader: Reader, page: Callable[..., None]) -> None:
    """A request to FastAPI or Flask sees the writes of the one before, and Flask-SQLAlchemy's session is a routing one."""

    def web() -> None:
        see_own_requests_only(reader, "app", asking_wsgi(reader.names["shop"].wsgi_app))
        assert asking(reader.names["app"])("GET", "/orders/71").status == 404

    def flask_sqlalchemy() -> None:
        with reader.names["shop"].app_context():
            assert isinstance(reader.names["db"].session(), reader.names["RoutingFlaskSession"])
            reader.names["db"].session.remove()

    page("web", RoutingFlaskSession=flask_sqlalchemy, before_task_publish=web)
    signals.before_task_publish.disconnect(reader.names["tell"])
    signals.task_prerun.disconnect(reader.names["enter"])
    signals.task_postrun.disconnect(reader.names["leave"])


def test_the_page_of_testing_does_what_it_says(reader: Reader) -> None:
    """A cluster of one's own starts, and a proxy makes and heals its faults, and counts round trips."""
    page = ROOT / "docs" / "testing-your-service.md"
    reader.run(page, slice(2, 3))
    reader.names.update(cluster=reader.cluster, instance=reader.cluster.writer, other=reader.readers[0], text=text)
    reader.run(page, slice(3, None))


def test_the_example_for_pytest_passes(tmp_path: Path) -> None:
    """The tests that docs/testing-your-service.md shows start a cluster, kill its writer, and pass."""
    conftest, tests, *_ = blocks_of(ROOT / "docs" / "testing-your-service.md", "postgresql")
    (tmp_path / "conftest.py").write_text(conftest["source"])
    (tmp_path / "test_orders.py").write_text(tests["source"])
    run = subprocess.run([sys.executable, "-m", "pytest", "-q", tmp_path], cwd=tmp_path, capture_output=True, text=True)
    assert "1 passed" in run.stdout, run.stdout
