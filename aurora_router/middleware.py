"""ASGI and WSGI middleware: one causal scope for each request, whose token goes with the client.

    app = AsgiMiddleware(app, router)  # Starlette, FastAPI, Django: around the finished application
    flask.wsgi_app = WsgiMiddleware(flask.wsgi_app, router)

A client's token comes in a cookie, or in a header of a client that has no cookies. A response is touched only where its request
has written before the headers left: it gets a new token, the way the old one came, and no shared cache may keep it.
"""

from __future__ import annotations

import asyncio
import math
import re
from collections.abc import Awaitable, Callable, Iterable, Iterator, MutableMapping
from typing import TYPE_CHECKING, Any

from aurora_router import config
from aurora_router.causality import Scope, entered
from aurora_router.errors import ConfigurationError
from aurora_router.router import Router
from aurora_router.unit import Past

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

Headers = Iterable[tuple[str, str]]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
AsgiApp = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]


class _Carrier:
    """How tokens come and go. Its arguments are those of AsgiMiddleware."""

    def __init__(self, router: Router, cookie: str, header: str, secure: bool | None) -> None:
        if not isinstance(router, Router):
            raise ConfigurationError("router= must be a Router")
        config.check_http_name("cookie", cookie)
        config.check_http_name("header", header)
        if secure is not None:
            config.check_flag("secure", secure)
        self.router, self.header, self._cookie, self._secure = router, header, cookie, secure
        self._mine = re.compile(rf'(?:^|;)[ \t]*{re.escape(cookie)}[ \t]*=[ \t]*"?([^;"]*)')
        self._max_age = math.ceil(router.token_ttl)

    def of_cookies(self, cookies: str) -> str | None:
        """The token in a Cookie header, the first where there are several."""
        found = self._mine.search(cookies)
        return found[1].rstrip(" \t") if found is not None else None

    def by_cookie(self, token: str, https: bool) -> tuple[str, str]:
        """The header that gives a token to a browser."""
        secure = "; Secure" if (https if self._secure is None else self._secure) else ""
        return "Set-Cookie", f"{self._cookie}={token}; Max-Age={self._max_age}; Path=/; HttpOnly; SameSite=Lax{secure}"

    def answered(self, headers: Headers, token: str, by_header: bool, https: bool) -> list[tuple[str, str]]:
        """The headers of a response with the token, as no shared cache may keep them."""
        field = (self.header, token) if by_header else self.by_cookie(token, https)
        said: list[str] = []
        others: list[tuple[str, str]] = []
        for name, value in headers:
            known = name.lower()
            if known == "cache-control":
                said.append(value)
            elif known != "surrogate-control" and not known.endswith("cdn-cache-control"):  # which would outrank Cache-Control
                others.append((name, value))
        return [*others, ("Cache-Control", private(", ".join(said))), field]


def private(cache_control: str) -> str:
    """The value of a Cache-Control header, changed only where a shared cache might keep the response."""
    directives = [found.strip() for found in re.findall(r'(?:"(?:\\.|[^"\\])*"|[^,"])+', cache_control)]
    if any(directive.lower() in ("private", "no-store") for directive in directives):
        return cache_control
    shared = ("", "public", "s-maxage", "private", "no-store")  # private="name" is about that header only
    return ", ".join(["private", *(d for d in directives if d.partition("=")[0].strip().lower() not in shared)])


class AsgiMiddleware:
    """An ASGI application (asyncio) that opens a causal scope of `router` for each request and websocket of `app`.

    cookie, header: their names. A request with that header, be it empty, gets its token in the same header of the response;
    any other in the cookie. secure: whether the cookie is for https only; None: as the request came.

    A token that does not count here (malformed, expired, of another cluster, not signed) is an event, TokenIgnored, and else as
    good as none. The token of a request that has written is asked for in asyncio's default executor, at most `probe_timeout`
    seconds. Raises ConfigurationError.
    """

    def __init__(
        self,
        app: AsgiApp,
        router: Router,
        *,
        cookie: str = "aurora_router",
        header: str = "aurora-router-token",
        secure: bool | None = None,
    ) -> None:
        self.app, self.router = app, router
        self._carrier = _Carrier(router, cookie, header, secure)
        self._header = header.lower().encode()
        self._cookie = cookie.encode()

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        kind = scope["type"]
        if kind != "http" and kind != "websocket":
            return await self.app(scope, receive, send)
        token: str | None = None
        by_header = False
        for name, value in scope["headers"]:
            if name == self._header:
                token, by_header = value.decode("latin-1"), True
                break
            if name == b"cookie" and token is None and self._cookie in value:
                token = self._carrier.of_cookies(value.decode("latin-1"))
        past = Past()
        if token:
            past = self.router.told(token) if self.router.started else await asyncio.to_thread(self.router.told, token)
        causal = self.router.scope(past)
        if kind == "http":
            send = self._telling(send, causal, by_header, scope.get("scheme") == "https")
        with entered(causal):
            return await self.app(scope, receive, send)

    def _telling(self, send: Send, causal: Scope, by_header: bool, https: bool) -> Send:
        async def telling(message: Message) -> None:
            if causal.wrote and message["type"] == "http.response.start":
                token = await asyncio.to_thread(self.router.token, causal)
                if token is not None:
                    headers = [(n.decode("latin-1"), v.decode("latin-1")) for n, v in message.get("headers", ())]
                    answered = self._carrier.answered(headers, token, by_header, https)
                    message = {**message, "headers": [(n.lower().encode("latin-1"), v.encode("latin-1")) for n, v in answered]}
            await send(message)

        return telling


class WsgiMiddleware:
    """A WSGI application that opens a causal scope of `router` for each request of `app`, until its response is closed.

    Arguments, what becomes of tokens, and errors are those of AsgiMiddleware. The thread that serves the request waits for the
    token of what it has written.
    """

    def __init__(
        self,
        app: WSGIApplication,
        router: Router,
        *,
        cookie: str = "aurora_router",
        header: str = "aurora-router-token",
        secure: bool | None = None,
    ) -> None:
        self.app, self.router = app, router
        self._carrier = _Carrier(router, cookie, header, secure)
        self._header = "HTTP_" + header.upper().replace("-", "_")

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        token = environ.get(self._header)
        by_header = token is not None
        if token is None and (cookies := environ.get("HTTP_COOKIE")):
            token = self._carrier.of_cookies(cookies)
        scope = self.router.scope(self.router.told(token) if token else Past())

        def answered(headers: Headers) -> Headers:
            given = self.router.token(scope) if scope.wrote else None
            if given is None:
                return headers
            return self._carrier.answered(headers, given, by_header, environ["wsgi.url_scheme"] == "https")

        response = _Response(scope, start_response, answered)
        with entered(scope):
            body = self.app(environ, response.start)
        wrapper = environ.get("wsgi.file_wrapper")
        if isinstance(body, list | tuple) or (isinstance(wrapper, type) and isinstance(body, wrapper)):
            response.leave()  # there is nothing to run in it, and servers know these
            return body
        return response.of(body)


class _Response:
    """A WSGI response whose headers leave with the first part of its body, and whose body is made inside the scope.

    A server may iterate and close in any thread and context: the scope is entered for each step alone.
    """

    _body: Iterable[bytes]
    _parts: Iterator[bytes]

    def __init__(self, scope: Scope, start_response: StartResponse, answered: Callable[[Headers], Headers]) -> None:
        self._scope = scope
        self._start_response = start_response
        self._answered = answered
        self._begun: tuple[Any, ...] | None = None  # status, headers and perhaps an error, which have not left
        self._write: Callable[[bytes], object] | None = None  # the server's

    def start(self, status: str, headers: list[tuple[str, str]], exc_info: Any = None, /) -> Callable[[bytes], object]:
        """start_response() as the application has it."""
        if self._write is not None or (self._begun is not None and exc_info is None):
            self.leave()
            return self._start_response(status, headers, exc_info)  # the server knows what that means
        self._begun = (status, headers) if exc_info is None else (status, headers, exc_info)
        return self._write_at_once

    def _write_at_once(self, data: bytes) -> object:
        self.leave()
        assert self._write is not None
        return self._write(data)

    def leave(self) -> None:
        """Give the headers to the server, with the token of what was written until now."""
        if self._begun is not None:
            (status, headers, *error), self._begun = self._begun, None
            self._write = self._start_response(status, list(self._answered(headers)), *error)

    def of(self, body: Iterable[bytes]) -> _Response:
        """The response with its body."""
        self._body = body
        with entered(self._scope):
            self._parts = iter(body)
        return self

    def __iter__(self) -> _Response:
        return self

    def __next__(self) -> bytes:
        with entered(self._scope):
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
            with entered(self._scope):
                close()
