"""The middleware under WSGI: a late body is inside its scope, and the server gets what the application gave."""

from __future__ import annotations

import contextvars
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from wsgiref.util import FileWrapper

import pytest
from flask import Flask
from sqlalchemy.orm import scoped_session

from aurora_router import Router
from aurora_router.local import PostgresCluster
from aurora_router.middleware import WsgiMiddleware
from tests.integration.shop import RAISE, sessions, until_readers_serve
from tests.integration.sites import asking_wsgi, in_session, more, stock

MakeRouter = Callable[..., Router]


def wsgi(router: Router, parts: Callable[[Any], Iterable[bytes]], **environ: str) -> Any:
    """A WSGI application of that body, behind the middleware, as a server calls it: (environ, start_response) -> body."""

    def app(environ: Any, start_response: Any) -> Iterable[bytes]:
        return parts(start_response)

    return WsgiMiddleware(app, router)


OK = ("200 OK", [("Content-Type", "text/plain")])


def test_a_lazily_made_body_is_inside_the_scope(paused: PostgresCluster, make_router: MakeRouter) -> None:
    """A body that is made late is inside the scope, and its headers wait for the first part."""
    router = make_router()
    until_readers_serve(router, 2)

    def parts() -> Iterator[bytes]:
        in_session(router, more)
        yield in_session(router, stock).encode()
        in_session(router, more)
        yield in_session(router, stock).encode()

    def begun(start_response: Any) -> Iterator[bytes]:
        start_response(*OK)
        return parts()

    def beginning(start_response: Any) -> Iterator[bytes]:
        start_response(*OK)
        yield from parts()

    for application, text in ((begun, "1112"), (beginning, "1314")):
        answer = asking_wsgi(wsgi(router, application))("GET", "/")
        assert answer.text == text
        with router.causal_scope(answer.cookie), sessions(router)() as s:
            assert answer.cookie is not None
            assert int(stock(s)) >= int(text[:2])


def test_a_server_may_iterate_and_close_in_other_threads(paused: PostgresCluster, make_router: MakeRouter) -> None:
    """A server may iterate over the body and close it in other threads and contexts."""
    router = make_router()
    until_readers_serve(router, 2)
    closed: list[str] = []

    class Parts:
        def __init__(self, start_response: Any) -> None:
            start_response(*OK)
            in_session(router, more)
            self.left = 3

        def __iter__(self) -> Parts:
            return self

        def __next__(self) -> bytes:
            self.left -= 1
            if self.left < 0:
                raise StopIteration
            return in_session(router, stock).encode()

        def close(self) -> None:
            closed.append(in_session(router, stock))

    started: list[Any] = []
    environ: dict[str, Any] = {"wsgi.url_scheme": "http"}
    with ThreadPoolExecutor(1) as elsewhere:
        body = contextvars.Context().run(wsgi(router, Parts), environ, lambda *given: started.append(given))
        found = [contextvars.Context().run(next, body), next(body), elsewhere.submit(next, body).result()]
        assert list(body) == []
        elsewhere.submit(body.close).result()
    assert found == [b"11"] * 3
    assert closed == ["11"]
    assert len(started) == 1
    assert any(name == "Set-Cookie" for name, _ in started[0][1])
    assert in_session(router, stock) == "10", "no scope is left behind"


def test_what_flask_commits_in_its_teardown_is_told(paused: PostgresCluster, make_router: MakeRouter) -> None:
    router = make_router()
    until_readers_serve(router, 2)
    app = Flask("shop")
    session = scoped_session(sessions(router))

    @app.teardown_request
    def commit(_: BaseException | None) -> None:
        session.commit()
        session.remove()

    @app.post("/")
    def serve() -> str:
        session.execute(RAISE)
        return "more"

    answer = asking_wsgi(WsgiMiddleware(app.wsgi_app, router))("POST", "/")
    assert answer.tells
    with router.causal_scope(answer.cookie), sessions(router)() as s:
        assert stock(s) == "11"


def test_an_application_that_fails_late_may_start_anew(cluster: PostgresCluster, router: Router) -> None:
    """An application that fails after it has called start_response may call it again."""
    started: list[Any] = []

    def parts(start_response: Any) -> Iterable[bytes]:
        start_response(*OK)
        in_session(router, more)
        try:
            raise RuntimeError("this page is broken")
        except RuntimeError:
            start_response("500 Oh", [("Content-Type", "text/plain")], sys.exc_info())
        return iter([b"broken"])

    body = wsgi(router, parts)({"wsgi.url_scheme": "http"}, lambda *given: started.append(given))
    assert started == []
    assert b"".join(body) == b"broken"
    ((status, headers, error),) = started
    assert status == "500 Oh"
    assert error[0] is RuntimeError
    assert headers[-1][0] == "Set-Cookie"


def test_an_application_that_starts_twice_is_the_servers_error(router: Router) -> None:
    """An application that calls start_response twice is left to the server to judge."""

    def start_response(*given: Any) -> Any:
        started.append(given)
        if len(started) > 1:
            raise AssertionError("twice")

    started: list[Any] = []
    with pytest.raises(AssertionError, match="twice"):
        wsgi(router, lambda start: [start(*OK), start(*OK)])({"wsgi.url_scheme": "http"}, start_response)


def test_output_of_the_write_callable_comes_after_the_headers(cluster: PostgresCluster, router: Router) -> None:
    """The output of the old write callable comes after the headers."""

    def parts(start_response: Any) -> Iterable[bytes]:
        write = start_response(*OK)
        in_session(router, more)
        write(b"one ")
        write(b"two ")
        return [b"three"]

    answer = asking_wsgi(wsgi(router, parts))("GET", "/")
    assert answer.text == "one two three"
    assert answer.cookie is not None


def test_a_file_goes_to_the_server_as_one(router: Router, tmp_path: Path) -> None:
    (tmp_path / "page").write_bytes(b"page")
    started: list[Any] = []

    def parts(start_response: Any) -> Iterable[bytes]:
        start_response(*OK)
        return FileWrapper((tmp_path / "page").open("rb"))

    environ = {"wsgi.url_scheme": "http", "wsgi.file_wrapper": FileWrapper}
    body = wsgi(router, parts)(environ, lambda *given: started.append(given))
    assert isinstance(body, FileWrapper)
    assert started == [OK]
    body.close()
    assert not router.started
