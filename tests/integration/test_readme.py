"""The README's Python, as it stands, on a real cluster: only the hosts and the password are put in."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from sqlalchemy.orm import close_all_sessions

from aurora_router import Router, RoutingSession
from aurora_router.local import FaultProxy
from aurora_router.local.cluster import Cluster
from tests.integration.shop import BOTH, engine, eventually, place
from tests.integration.sites import asking, asking_wsgi, with_cookie

README = Path(__file__).parents[2] / "README.md"
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def run_readme(names: dict[str, Any], replace: dict[str, str], after: dict[str, Callable[[], None]]) -> None:
    """Run all blocks in order with the same names; `after` a block that contains a text, look at what it left."""
    text = README.read_text()
    looked = set()
    for block in BLOCK.finditer(text):
        source = block[1]
        for given, real in replace.items():
            source = source.replace(given, real)
        code = compile("\n" * text[: block.start(1)].count("\n") + source, README.name, "exec", dont_inherit=True)
        exec(code, names)
        for part, look in after.items():
            if part in source:
                look()
                looked.add(part)
    assert looked == {*after}


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
    """The shared cluster, with what the README takes for granted."""
    for statement in _TAKEN_FOR_GRANTED[engine(aurora_cluster)]:
        aurora_cluster.execute(statement)
    yield aurora_cluster
    close_all_sessions()
    for what in ("TABLE IF EXISTS orders", "TABLE IF EXISTS aurora_router_commits", "FUNCTION IF EXISTS unpaid_orders"):
        aurora_cluster.execute(f"DROP {what}")


@BOTH
def test_the_python_of_the_readme_does_what_it_says(cluster: Cluster[Any], capsys: pytest.CaptureFixture[str]) -> None:
    one, two = cluster.readers
    readers = {one.address, two.address}
    module = ModuleType("readme")  # SQLAlchemy and FastAPI look annotations up in the module of a class or function
    names = vars(module)
    places: list[str] = []
    routed = RoutingSession.close

    def closing(session: RoutingSession) -> None:
        places.append(place(session))
        routed(session)

    def usage() -> None:
        assert places == ["reader", "reader", "nowhere"] or places == ["writer", "reader", "nowhere"]
        assert [order.item for order in names["orders"]] == ["tea"]
        assert cluster.execute("SELECT id, item, paid FROM orders") == [(1, "tea", True)]

    def web() -> None:
        for reader in (one, two):
            cluster.pause_replay(reader)
        taken = asking(names["asgi"])("POST", "/orders/7?item=cake")
        shown = asking_wsgi(names["shop"].wsgi_app)("GET", "/orders/7", with_cookie(taken.cookie))
        assert shown.text == '{"item":"cake"}\n'
        shown = asking(names["asgi"])("GET", "/orders/7", with_cookie(taken.cookie))
        assert shown.text == '{"item":"cake"}'
        assert asking(names["asgi"])("GET", "/orders/7").status == 404, "nobody has told it"
        for reader in (one, two):
            cluster.resume_replay(reader)
        cluster.execute("DELETE FROM orders WHERE id = 7")
        cluster.wait_in_sync()

    def hints() -> None:
        assert places[-2:] == ["writer", "writer"]

    def endpoints() -> None:
        router: Router = names["endpoints"]
        assert router.explain("SELECT 1").instance is not None
        eventually(lambda: len(router.topology.by_id[proxy.address].servers) == 2)

    def watched() -> None:
        with names["watched"].connect(read_only=True) as connection:
            assert connection.engine.url.host in {one.host, two.host}

    with ExitStack() as stack:
        monkeypatch = stack.enter_context(pytest.MonkeyPatch.context())
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setattr(RoutingSession, "close", closing)
        proxy = stack.enter_context(FaultProxy([(one.host, one.port), (two.host, two.port)]))
        instances = f"{cluster.writer.address},{one.address},{two.address}"
        run_readme(
            names,
            {
                "postgresql+psycopg://app:secret@db-1:5432/shop": cluster.url,
                "postgresql+psycopg://app:secret@db-rw:5432/shop": cluster.url,
                "postgresql+psycopg://app:secret@db-1,db-2,db-3/shop": cluster.url.replace(cluster.writer.address, instances),
                "db-2:5432": one.address,
                "db-3:5432": two.address,
                "db-ro:5432": proxy.address,
            },
            {
                "get_one(Order, 1).item": usage,
                "scoped_session(": web,
                "/*@reader*/": hints,
                "reader_endpoint=": endpoints,
                "listeners=": watched,
            },
        )
        for name in ("router", "endpoints", "watched"):
            stack.callback(names[name].close)
        with names["AuditedSessions"]() as s:
            assert s.get(names["Order"], 1).paid
    said = capsys.readouterr().out
    assert f"WRITE {cluster.writer.address} not known to be a read: the writer" in said
    assert f"writer: None -> {cluster.writer.address}, epoch" in said
    assert any(f"{reader}: declared read-only" in said for reader in readers)
