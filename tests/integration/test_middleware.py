"""The middleware on a real cluster with late readers: clients see their own writes, whichever host serves the next request."""

from __future__ import annotations

import asyncio
import contextvars
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any
from wsgiref.util import FileWrapper

import pytest
from fastapi import Depends, FastAPI
from fastapi.responses import PlainTextResponse as FastAnswer
from flask import Flask
from sqlalchemy.orm import scoped_session
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.requests import Request
from starlette.responses import PlainTextResponse, StreamingResponse
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket

from aurora_router import Router, RoutingSession
from aurora_router.core import events
from aurora_router.local import FaultProxy, PostgresCluster
from aurora_router.middleware import AsgiMiddleware, WsgiMiddleware
from aurora_router.unit import Scope, current
from tests.integration.shop import RAISE, sessions, through, until_readers_serve
from tests.integration.sites import (
    COOKIE,
    HEADER,
    SITES,
    Answer,
    Ask,
    asked,
    asking,
    asking_wsgi,
    in_session,
    more,
    starlette_app,
    stock,
    with_cookie,
)

MakeRouter = Callable[..., Router]


@pytest.fixture
def paused(cluster: PostgresCluster) -> PostgresCluster:
    """The cluster, whose readers replay nothing any more."""
    for reader in cluster.readers:
        cluster.pause_replay(reader)
    return cluster


@pytest.fixture(params=SITES, ids=lambda site: site.__name__)
def site(request: pytest.FixtureRequest, make_router: MakeRouter, heard: list[events.Event]) -> Callable[..., Ask]:
    """Make hosts that serve the site, each with a router of its own."""

    def host(router_options: dict[str, Any] | None = None, **options: Any) -> Ask:
        router = make_router(listeners=[heard.append], **(router_options or {}))
        until_readers_serve(router, 2)
        ask: Ask = request.param(router, **options)
        return ask

    return host


# -- the same in each framework ---------------------------------------------------------------------------------------


def test_a_writing_client_sees_its_write_on_another_host(paused: PostgresCluster, site: Callable[..., Ask]) -> None:
    """A client that has written sees its write on another host, and other clients may see it later."""
    here, there = site(), site()
    written = here("POST", "/more")
    assert written.status == 200
    assert there("GET", "/stock").text == "10", "nobody has told it"
    seen = there("GET", "/stock", with_cookie(written.cookie))
    assert seen.text == "11"
    assert not seen.tells, "it wrote nothing"
    again = there("POST", "/more", with_cookie(written.cookie))
    assert again.cookie not in (None, written.cookie)
    assert here("GET", "/stock", with_cookie(again.cookie)).text == "12"


def test_what_wrote_nothing_sets_nothing(cluster: PostgresCluster, site: Callable[..., Ask]) -> None:
    host = site()
    for path in ("/stock", "/broken", "/nowhere"):
        answer = host("GET", path)
        assert not answer.tells
        assert not any("private" in value for value in answer.all("cache-control"))
    assert host("GET", "/broken").status == 500


def test_what_has_committed_and_fails_then_still_sets_it(paused: PostgresCluster, site: Callable[..., Ask]) -> None:
    host = site()
    failed = host("POST", "/more-and-broken")
    assert failed.status == 500
    assert host("GET", "/stock", with_cookie(failed.cookie)).text == "11"
    assert failed.all("cache-control")
    assert "private" in failed.all("cache-control")[0]


def test_the_token_goes_back_the_way_it_came(paused: PostgresCluster, site: Callable[..., Ask]) -> None:
    host = site()
    first = host("POST", "/more", {HEADER: ""})  # The first time there is no token to send.
    (token,) = first.all(HEADER)
    assert first.cookie is None
    assert first.all("cache-control") == ["private"]
    assert host("GET", "/stock", {HEADER: token}).text == "11"
    assert host("GET", "/stock", {HEADER: ""}).text == "10"
    second = host("POST", "/more", {HEADER: token, **with_cookie(token)})
    assert second.all(HEADER) != [token]
    assert second.cookie is None


def test_the_cookie_is_hidden_from_scripts_and_ends_in_time(cluster: PostgresCluster, site: Callable[..., Ask]) -> None:
    """The cookie is of no use to scripts and other sites, and ends with the token."""
    host = site({"token_ttl": 29.5})
    (cookie,) = host("POST", "/more").all("set-cookie")
    assert cookie.startswith(f"{COOKIE}=1.")
    assert cookie.partition("; ")[2] == "Max-Age=30; Path=/; HttpOnly; SameSite=Lax"
    (cookie,) = host("POST", "/more", url="https://shop").all("set-cookie")
    assert cookie.endswith("; Secure")


def test_the_cookies_name_and_secure_flag_can_be_set(cluster: PostgresCluster, site: Callable[..., Ask]) -> None:
    """The cookie's name, and whether it is for https alone, can be set."""
    host = site(secure=True, cookie="__Host-shop", header="x-shop")
    (cookie,) = host("POST", "/more").all("set-cookie")
    assert cookie.startswith("__Host-shop=1.")
    assert cookie.endswith("; Secure")
    assert host("POST", "/more", {"x-shop": ""}).all("x-shop")
    assert "Secure" not in site(secure=False)("POST", "/more", url="https://shop").all("set-cookie")[0]


def test_a_token_that_does_not_count_is_an_event_and_no_error(
    paused: PostgresCluster, site: Callable[..., Ask], heard: list[events.Event]
) -> None:
    host, signing = site({"token_ttl": 60.0}), site({"token_keys": ["a secret"]})
    token = host("POST", "/more").cookie
    assert token is not None
    version, cluster, position, made_at = token.split(".")
    wrong = {
        "malformed": "nonsense",
        "of another cluster": f"{version}.77.{position}.{made_at}",
        "expired": f"{version}.{cluster}.{position}.{int(made_at) - 100_000}",
    }
    for reason, text in wrong.items():
        for headers in ({HEADER: text}, with_cookie(text)):
            heard.clear()
            answer = host("GET", "/stock", headers)
            assert (answer.status, answer.text) == (200, "10")
            assert events.TokenIgnored(reason) in heard
    heard.clear()
    assert signing("GET", "/stock", with_cookie(token)).text == "10"
    assert events.TokenIgnored("not signed with a key of this router") in heard
    signed = signing("POST", "/more").cookie
    assert signing("GET", "/stock", with_cookie(signed)).text == "12"


STRANGE = [
    "",
    '"',
    "=;=;==",
    "1." * 5000,
    "x" * 100_000,
    "é\xff\x80",
    '"1.7.1-A.1764000000',
    "1.7.1-A.1764000000\\073",
    "%00%0d%0aSet-Cookie: a=b",
    "1.7.99999999999999999999-A.1",
    "\x7f\x01",
]


def test_strange_tokens_neither_break_a_page_nor_slow_it_down(paused: PostgresCluster, site: Callable[..., Ask]) -> None:
    host = site()
    token = host("POST", "/more").cookie
    assert host("GET", "/stock", {"cookie": f'{COOKIE}="{token}"; {COOKIE}=other'}).text == "11", "quoted, and twice"
    for strange in STRANGE:
        for headers in ({"cookie": f"{COOKIE}={strange}"}, {"cookie": strange}, {HEADER: strange}):
            began = time.monotonic()
            answer = host("GET", "/stock", headers)
            assert (answer.status, answer.text) == (200, "10")
            assert not answer.tells
            assert time.monotonic() - began < 5, "nobody is asked or waited for"


def test_an_answer_without_a_body_is_told_as_well(paused: PostgresCluster, site: Callable[..., Ask]) -> None:
    host = site()
    not_modified = host("GET", "/more-not-modified")
    assert not_modified.status == 304
    assert not_modified.all("cache-control") == ["private"]
    assert host("GET", "/stock", with_cookie(not_modified.cookie)).text == "11"
    head = host("HEAD", "/more")
    assert head.status == 200
    assert host("GET", "/stock", with_cookie(head.cookie)).text == "12"
    assert not host("HEAD", "/stock").tells


def committed(request: Request) -> Iterator[RoutingSession]:
    """A FastAPI dependency that commits at its end."""
    with sessions(request.app.state.router).begin() as s:
        yield s


# -- asyncio ----------------------------------------------------------------------------------------------------------


def test_requests_at_the_same_time_do_not_share_a_scope(paused: PostgresCluster, make_router: MakeRouter) -> None:
    router = make_router()
    until_readers_serve(router, 2)

    async def ask_both() -> list[Answer]:
        written = asyncio.Event()

        async def writing(request: Request) -> PlainTextResponse:
            await asyncio.to_thread(in_session, router, more)
            written.set()
            return PlainTextResponse(await asyncio.to_thread(in_session, router, stock))

        async def reading(request: Request) -> PlainTextResponse:
            await written.wait()
            return PlainTextResponse(in_session(router, stock))

        app = AsgiMiddleware(Starlette(routes=[Route("/w", writing), Route("/r", reading)]), router)
        return [*await asyncio.gather(asked(app, "GET", "/r"), asked(app, "GET", "/w"), asked(app, "GET", "/r"))]

    one, writer, other = asyncio.run(ask_both())
    assert (one.text, writer.text, other.text) == ("10", "11", "10")
    assert (one.tells, writer.tells, other.tells) == (False, True, False)


def test_a_background_task_sees_what_its_request_has_written(paused: PostgresCluster, make_router: MakeRouter) -> None:
    router = make_router()
    until_readers_serve(router, 2)
    seen: list[str] = []

    def later() -> None:
        seen.append(in_session(router, stock))

    async def serve(request: Request) -> PlainTextResponse:
        in_session(router, more)
        return PlainTextResponse("more", background=BackgroundTask(later))

    assert asking(AsgiMiddleware(Starlette(routes=[Route("/", serve)]), router))("GET", "/").tells
    assert seen == ["11"]


def test_a_write_after_the_headers_is_seen_but_not_told(paused: PostgresCluster, make_router: MakeRouter) -> None:
    """A write after the headers have left is seen in the scope and cannot be told to the client."""
    router = make_router()
    until_readers_serve(router, 2)

    async def parts() -> AsyncIterator[str]:
        yield in_session(router, stock)
        yield in_session(router, more)
        yield in_session(router, stock)
        yield str(router.current_token() is not None)

    async def serve(request: Request) -> StreamingResponse:
        return StreamingResponse(parts())

    answer = asking(AsgiMiddleware(Starlette(routes=[Route("/", serve)]), router))("GET", "/")
    assert answer.text == "10more11True"
    assert not answer.tells


def test_the_middleware_of_starlette_may_hold_it_too(paused: PostgresCluster, make_router: MakeRouter) -> None:
    router = make_router()
    until_readers_serve(router, 2)
    app = FastAPI(default_response_class=FastAnswer)
    app.add_middleware(AsgiMiddleware, router=router)

    @app.middleware("http")  # This runs the inner application in another task.
    async def around(request: Request, call_next: Any) -> Any:
        return await call_next(request)

    @app.post("/")
    def serve() -> str:
        in_session(router, more)
        return in_session(router, stock)

    answer = asking(app)("POST", "/")
    assert answer.text == "11"
    assert answer.tells


def test_a_dependency_that_ends_with_the_function_is_told(paused: PostgresCluster, make_router: MakeRouter) -> None:
    """The client gets the token of a dependency's commit if the dependency ends with the function."""
    router = make_router()
    until_readers_serve(router, 2)
    app = FastAPI()
    app.state.router = router

    @app.post("/function")
    def function(s: Annotated[Any, Depends(committed, scope="function")]) -> None:
        s.execute(RAISE)

    @app.post("/request")
    def request(s: Annotated[Any, Depends(committed)]) -> None:
        s.execute(RAISE)

    ask = asking(AsgiMiddleware(app, router))
    assert ask("POST", "/function").tells
    assert not ask("POST", "/request").tells, "FastAPI commits after the response: the documentation warns of it"


def test_a_scope_of_an_async_dependency_is_around_the_endpoint(cluster: PostgresCluster, make_router: MakeRouter) -> None:
    """A scope of an async dependency is around the endpoint, and one of a plain dependency is not."""
    router = make_router()

    def plain() -> Iterator[Scope]:
        with router.causal_scope() as scope:
            yield scope

    async def coroutine() -> AsyncIterator[Scope]:
        with router.causal_scope() as scope:
            yield scope

    app, of_plain, of_coroutine = FastAPI(), Depends(plain), Depends(coroutine)

    @app.get("/plain")
    def in_plain(scope: Any = of_plain) -> bool:
        return scope in current(scope.owner)

    @app.get("/coroutine")
    def in_coroutine(scope: Any = of_coroutine) -> bool:
        return scope in current(scope.owner)

    ask = asking(app)
    assert [ask("GET", path).text for path in ("/plain", "/coroutine")] == ["false", "true"]


def test_a_websockets_scope_begins_with_the_clients_token(paused: PostgresCluster, make_router: MakeRouter) -> None:
    """A websocket has a scope that begins with the client's token."""
    router = make_router()
    until_readers_serve(router, 2)
    site = AsgiMiddleware(Starlette(routes=[WebSocketRoute("/", socket_of(router))]), router)
    token = asking(AsgiMiddleware(starlette_app(router), router))("POST", "/more").cookie
    assert token is not None
    for headers, expected in (([], "10"), ([(b"cookie", f"{COOKIE}={token}".encode())], "11")):
        said: list[Any] = []
        heard = iter([{"type": "websocket.connect"}, {"type": "websocket.disconnect", "code": 1000}])

        async def receive(heard: Any = heard) -> Any:
            return next(heard)

        async def send(message: Any, said: list[Any] = said) -> None:
            said.append(message)

        scope = {"type": "websocket", "path": "/", "headers": headers, "query_string": b"", "subprotocols": []}
        asyncio.run(site(scope, receive, send))
        assert [message["type"] for message in said] == ["websocket.accept", "websocket.send"]
        assert said[0].get("headers", []) == []
        assert said[1]["text"] == expected


def test_the_applications_start_and_end_pass_through(router: Router) -> None:
    passed: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        passed.append((scope, receive, send))
        assert router.current_token() is None

    given = ({"type": "lifespan"}, asyncio.sleep, asyncio.sleep)
    asyncio.run(AsgiMiddleware(app, router)(*given))
    assert passed == [given]
    assert not router.started


def test_asking_for_a_token_does_not_block_the_event_loop(cluster: PostgresCluster, make_router: MakeRouter) -> None:
    """The event loop goes on while the writer is asked for a token."""
    router = make_router(probe_timeout=1.0, probe_interval=60, position_interval=60)
    until_readers_serve(router, 2)
    frozen: list[bool] = []

    async def serve(request: Request) -> PlainTextResponse:
        in_session(router, more)
        cluster.freeze(cluster.writer)
        frozen.append(True)
        return PlainTextResponse("more")

    async def ask() -> tuple[Answer, float]:
        app = AsgiMiddleware(Starlette(routes=[Route("/", serve)]), router)
        asking = asyncio.create_task(asked(app, "GET", "/"))
        longest = 0.0
        while not asking.done():
            began = time.monotonic()
            await asyncio.sleep(0.005)
            if frozen:
                longest = max(longest, time.monotonic() - began)
        return await asking, longest

    try:
        answer, longest = asyncio.run(ask())
    finally:
        cluster.thaw(cluster.writer)
    assert answer.cookie is not None
    assert answer.cookie.split(".")[2] == "0", "it speaks of all that was committed"
    assert longest < 0.5


def test_starting_a_router_does_not_block_the_event_loop(paused: PostgresCluster, make_router: MakeRouter) -> None:
    """A router that must start first does not hold up the event loop."""
    here = make_router()
    token = asking(AsgiMiddleware(starlette_app(here), here))("POST", "/more").cookie
    with FaultProxy((paused.writer.host, paused.writer.port)) as proxy:
        there = make_router(through(proxy, paused))
        proxy.black_hole()

        async def ask() -> tuple[Answer, float]:
            asking = asyncio.create_task(asked(AsgiMiddleware(nothing, there), "GET", "/", with_cookie(token)))
            longest = 0.0
            while not asking.done():
                began = time.monotonic()
                await asyncio.sleep(0.005)
                longest = max(longest, time.monotonic() - began)
            return await asking, longest

        answer, longest = asyncio.run(ask())
        assert answer.status == 204
        assert there.started
        assert longest < 0.5


async def nothing(scope: Any, receive: Any, send: Any) -> None:
    """An ASGI application that answers without a word."""
    await send({"type": "http.response.start", "status": 204})
    await send({"type": "http.response.body"})


def socket_of(router: Router) -> Callable[[WebSocket], Any]:
    """Accept the websocket, and send the stock."""

    async def serve(socket: WebSocket) -> None:
        await socket.accept()
        await socket.send_text(in_session(router, stock))

    return serve


# -- WSGI -------------------------------------------------------------------------------------------------------------


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
