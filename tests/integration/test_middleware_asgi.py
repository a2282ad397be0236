"""The middleware under asyncio: a scope is around its request alone, and nothing blocks the event loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Annotated, Any

from fastapi import Depends, FastAPI
from fastapi.responses import PlainTextResponse as FastAnswer
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.requests import Request
from starlette.responses import PlainTextResponse, StreamingResponse
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket

from aurora_router import Router, RoutingSession
from aurora_router.local import FaultProxy, PostgresCluster
from aurora_router.middleware import AsgiMiddleware
from aurora_router.routing.causal_context import Scope, open_scopes
from tests.integration.shop import RAISE, sessions, through, until_readers_serve
from tests.integration.sites import COOKIE, Answer, asked, asking, in_session, more, starlette_app, stock, with_cookie

MakeRouter = Callable[..., Router]


def committed(request: Request) -> Iterator[RoutingSession]:
    """A FastAPI dependency that commits at its end."""
    with sessions(request.app.state.router).begin() as s:
        yield s


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
        return scope in open_scopes(scope.owner)

    @app.get("/coroutine")
    def in_coroutine(scope: Any = of_coroutine) -> bool:
        return scope in open_scopes(scope.owner)

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

    async def ask() -> tuple[Answer, int]:
        app = AsgiMiddleware(Starlette(routes=[Route("/", serve)]), router)
        asking = asyncio.create_task(asked(app, "GET", "/"))
        turns = 0
        while not asking.done():
            await asyncio.sleep(0.005)
            turns += bool(frozen)
        return await asking, turns

    try:
        answer, turns = asyncio.run(ask())
    finally:
        cluster.thaw(cluster.writer)
    assert answer.cookie is not None
    assert answer.cookie.split(".")[2] == "0", "it speaks of all that was committed"
    assert turns > 2, "a loop that waits for the writer turns once before that, and once after it"


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
