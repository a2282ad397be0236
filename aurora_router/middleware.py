"""ASGI and WSGI middleware: one causal scope for each request. The client carries its token to the next request.

    app.add_middleware(AsgiMiddleware, router=router)  # Starlette, FastAPI
    application = AsgiMiddleware(get_asgi_application(), router)  # Django
    flask.wsgi_app = WsgiMiddleware(flask.wsgi_app, router)

A client's token comes in a cookie, or in a header if the client has no cookies. A response is changed only if its request has
written before the headers are sent. Such a response gets a new token: in the header if the request had it, else in the cookie.
No shared cache may keep the response.
"""

from __future__ import annotations

import asyncio
import math
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Iterable, Iterator, MutableMapping
from typing import TYPE_CHECKING, Any, Generic, TypeVar
from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

from aurora_router.config import checks
from aurora_router.core.http import Headers, cookie, cookie_reader, with_private_field
from aurora_router.errors import ConfigurationError
from aurora_router.router import Router, core_of
from aurora_router.routing.causal_context import CausalContext, Scope

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIEnvironment

__all__ = ["AsgiApp", "AsgiMiddleware", "WsgiMiddleware"]

App = TypeVar("App")
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
AsgiApp = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]


class _Middleware(ABC, Generic[App]):
    """An application with a router around it, and how tokens come and go there."""

    def __init__(
        self,
        app: App,
        router: Router,
        *,
        cookie: str = "aurora_router",
        header: str = "aurora-router-token",
        secure: bool | None = None,
    ) -> None:
        if not isinstance(router, Router):
            raise ConfigurationError("router= must be a Router")
        checks.check_http_name("cookie", cookie)
        checks.check_http_name("header", header)
        if secure is not None:
            checks.check_flag("secure", secure)
        self.app, self.router = app, router
        self._core = core_of(router)
        self._cookie, self._header, self._secure = cookie, header, secure
        self._of_cookies = cookie_reader(cookie)
        self._names = self._as_named_here()
        self._max_age = math.ceil(self._core.settings.token_ttl)

    @abstractmethod
    def _as_named_here(self) -> tuple[Any, Any]:
        """The names of the cookie and of the header as they come in a request of this kind."""

    def _answered(self, headers: Headers, token: str, by_header: bool, https: bool) -> list[tuple[str, str]]:
        """The headers of a response with the token."""
        if by_header:
            return with_private_field(headers, (self._header, token))
        secure = https if self._secure is None else self._secure
        return with_private_field(headers, ("Set-Cookie", cookie(self._cookie, token, self._max_age, secure=secure)))


class AsgiMiddleware(_Middleware[AsgiApp]):
    """An ASGI application (asyncio) that opens a causal scope of a router for each request and each websocket of `app`.

    app: the application.
    router: the Router.
    cookie, header: the names of the cookie and of the header that carry the token. A request with the header, even an empty
        one, gets its token in the same header of the response. Any other request gets it in the cookie.
    secure: whether the cookie is for https only. None: only if the request came by https.

    A token that does not count here (malformed, expired, of another cluster, not signed) is ignored, and listeners get
    TokenIgnored. If the request has written, the new token comes from a call in asyncio's default executor. The call takes at
    most `probe_timeout` seconds.

    Raises ConfigurationError for a bad argument.
    """

    def _as_named_here(self) -> tuple[bytes, bytes]:
        return self._cookie.encode(), self._header.lower().encode()

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        kind = scope["type"]
        if kind != "http" and kind != "websocket":
            return await self.app(scope, receive, send)
        token: str | None = None
        by_header = False
        cookie, header = self._names
        for name, value in scope["headers"]:
            if name == header:
                token, by_header = value.decode("latin-1"), True
                break
            if name == b"cookie" and token is None and cookie in value:
                token = self._of_cookies(value.decode("latin-1"))
        begun = CausalContext()
        if token:
            read = self._core.tokens.context_from_untrusted_token
            begun = read(token) if self._core.is_started else await asyncio.to_thread(read, token)
        causal = self._core.tokens.new_scope(begun)
        if kind == "http":
            send = self._telling(send, causal, by_header, scope.get("scheme") == "https")
        with causal:
            return await self.app(scope, receive, send)

    def _telling(self, send: Send, causal: Scope, by_header: bool, https: bool) -> Send:
        async def telling(message: Message) -> None:
            if message["type"] == "http.response.start":
                causal.collect_from_open_units()
                token = await asyncio.to_thread(lambda: causal.token) if causal.wrote else None
                if token is not None:
                    headers = [(n.decode("latin-1"), v.decode("latin-1")) for n, v in message.get("headers", ())]
                    answered = self._answered(headers, token, by_header, https)
                    message = {**message, "headers": [(n.lower().encode("latin-1"), v.encode("latin-1")) for n, v in answered]}
            await send(message)

        return telling


class WsgiMiddleware(_Middleware[WSGIApplication]):
    """A WSGI application that opens a causal scope of a router for each request of `app`, until its response is closed.

    Arguments, ignored tokens and errors are those of AsgiMiddleware. If the request has written, the thread that serves it
    waits for the new token.
    """

    def _as_named_here(self) -> tuple[str, str]:
        return "HTTP_COOKIE", "HTTP_" + self._header.upper().replace("-", "_")

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        cookie, header = self._names
        token = environ.get(header)
        by_header = token is not None
        if token is None and (cookies := environ.get(cookie)):
            token = self._of_cookies(cookies)
        scope = self._core.tokens.new_scope(self._core.tokens.context_from_untrusted_token(token) if token else CausalContext())

        def answered(headers: Headers) -> Headers:
            scope.collect_from_open_units()
            given = scope.token if scope.wrote else None
            if given is None:
                return headers
            return self._answered(headers, given, by_header, environ["wsgi.url_scheme"] == "https")

        response = _Response(scope, start_response, answered)
        with scope:
            body = self.app(environ, response.start)
        wrapper = environ.get("wsgi.file_wrapper")
        if isinstance(body, list | tuple) or (isinstance(wrapper, type) and isinstance(body, wrapper)):
            # Iterating such a body runs no code of the application, and servers treat these types specially.
            response.leave()
            return body
        return response.of(body)


class _Response:
    """A WSGI response whose headers leave with the first part of its body, and whose body is made inside the scope.

    A server may iterate and close in any thread and context, so each step enters the scope by itself.
    """

    _body: Iterable[bytes]
    _parts: Iterator[bytes]

    def __init__(self, scope: Scope, start_response: StartResponse, answered: Callable[[Headers], Headers]) -> None:
        self._scope = scope
        self._start_response = start_response
        self._answered = answered
        self._begun: tuple[Any, ...] | None = None  # status, headers and perhaps an error, not sent yet
        self._write: Callable[[bytes], object] | None = None  # the server's

    def start(self, status: str, headers: list[tuple[str, str]], exc_info: Any = None, /) -> Callable[[bytes], object]:
        """Take the status and headers from the application. This is the start_response() that it calls."""
        if self._write is not None or (self._begun is not None and exc_info is None):
            self.leave()
            return self._start_response(status, headers, exc_info)  # the server decides what a second call means
        self._begun = (status, headers) if exc_info is None else (status, headers, exc_info)
        return self._write_at_once

    def _write_at_once(self, data: bytes) -> object:
        self.leave()
        assert self._write is not None
        return self._write(data)

    def leave(self) -> None:
        """Give the headers to the server, with the token of the writes until now."""
        if self._begun is not None:
            (status, headers, *error), self._begun = self._begun, None
            self._write = self._start_response(status, list(self._answered(headers)), *error)

    def of(self, body: Iterable[bytes]) -> _Response:
        """Set the body, and return the response."""
        self._body = body
        with self._scope:
            self._parts = iter(body)
        return self

    def __iter__(self) -> _Response:
        return self

    def __next__(self) -> bytes:
        with self._scope:
            try:
                part = next(self._parts)
            except StopIteration:
                self.leave()
                raise
        if self._begun is not None:
            self.leave()
        return part

    def close(self) -> None:
        close = getattr(self._body, "close", None)
        if close is not None:
            with self._scope:
                close()
