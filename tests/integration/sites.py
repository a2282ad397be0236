"""The same small site in each framework, behind the middleware. The tests of the middleware and of jobs use it."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import Callable, Iterable
from http.cookies import SimpleCookie
from types import ModuleType
from typing import Any, NamedTuple
from wsgiref.validate import validator

import flask_sqlalchemy
import flask_sqlalchemy.session
from django.conf import settings
from django.core.asgi import get_asgi_application
from django.core.wsgi import get_wsgi_application
from django.http import HttpResponse, HttpResponseNotModified
from django.urls import path as django_path
from fastapi import FastAPI
from flask import Flask
from sqlalchemy import select
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from werkzeug.test import Client

from aurora_router import Router, RoutingMixin, RoutingSession
from aurora_router.middleware import AsgiMiddleware, WsgiMiddleware
from aurora_router.router import core_of
from tests.integration.shop import RAISE, Item, sessions

STOCK = select(Item.stock).where(Item.id == 1)
COOKIE, HEADER = "aurora_router", "aurora-router-token"
METHODS = ["GET", "HEAD", "POST"]
Headers = dict[str, str]


class Answer(NamedTuple):
    """A response, with its headers' names in lower case."""

    status: int
    text: str
    headers: list[tuple[str, str]]

    def all(self, name: str) -> list[str]:
        return [value for known, value in self.headers if known == name]

    @property
    def cookie(self) -> str | None:
        """The token in the response's cookie."""
        found = SimpleCookie("".join(self.all("set-cookie")))
        return found[COOKIE].value if COOKIE in found else None

    @property
    def tells(self) -> bool:
        """Whether the response has a token."""
        return bool(self.all("set-cookie") or self.all(HEADER))


Ask = Callable[..., Answer]
"""ask(method, path, headers={}) -> Answer"""


async def asked(app: Any, method: str, path: str, headers: Headers | None = None, url: str = "http://shop") -> Answer:
    """The answer of an ASGI application, as soon as the application has ended."""
    scheme, _, host = url.partition("://")
    path, _, query = path.partition("?")
    fields = [(b"host", host.encode()), *((n.lower().encode("latin-1"), v.encode("latin-1")) for n, v in (headers or {}).items())]
    scope = {"type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method, "scheme": scheme, "path": path}
    scope |= {"raw_path": path.encode(), "query_string": query.encode(), "root_path": "", "headers": fields, "server": (host, 80)}
    said: list[Any] = []
    ended = asyncio.Event()

    async def receive() -> dict[str, Any]:
        if ended.is_set():
            await asyncio.Event().wait()
        ended.set()
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        said.append(message)

    # Starlette answers with 500, and raises the error again for the server's log.
    with contextlib.suppress(RuntimeError):
        await app(scope, receive, send)
    begun, *parts = said
    text = b"".join(part.get("body", b"") for part in parts).decode()
    return Answer(begun["status"], text, [(n.decode("latin-1"), v.decode("latin-1")) for n, v in begun.get("headers", ())])


def asking(app: Any) -> Ask:
    """A function that sends requests to an ASGI application."""
    return lambda *what, **more: asyncio.run(asked(app, *what, **more))


def asking_wsgi(app: Any) -> Ask:
    """A function that sends requests to a WSGI application. The standard library's validator checks each answer."""
    client = Client(validator(app), use_cookies=False)

    def ask(method: str, path: str, headers: Headers | None = None, url: str = "http://shop") -> Answer:
        found = client.open(path, method=method, headers=headers or {}, base_url=url)
        answer = Answer(found.status_code, found.get_data(as_text=True), [(n.lower(), v) for n, v in found.headers])
        found.close()
        return answer

    return ask


def with_cookie(token: str | None) -> Headers:
    """The headers of a browser that has this token."""
    return {} if token is None else {"cookie": f"theme=dark; {COOKIE}={token}; last=1"}


# -- what the pages do ------------------------------------------------------------------------------------------------


def stock(s: RoutingSession) -> str:
    return str(s.scalar(STOCK))


def more(s: RoutingSession) -> str:
    s.execute(RAISE)
    s.commit()
    return "more"


def more_and_broken(s: RoutingSession) -> str:
    more(s)
    raise RuntimeError("this page is broken")


def more_not_modified(s: RoutingSession) -> int:
    more(s)
    return 304


def broken(s: RoutingSession) -> str:
    stock(s)
    s.rollback()
    raise RuntimeError("this page is broken")


Page = Callable[[Any], Any]
"""Returns the text of the answer, or the status of an answer without text."""

PAGES: dict[str, Page] = {
    "/stock": stock,
    "/more": more,
    "/more-and-broken": more_and_broken,
    "/more-not-modified": more_not_modified,
    "/broken": broken,
}


# -- the frameworks ---------------------------------------------------------------------------------------------------


def in_session(router: Router, show: Page) -> Any:
    with sessions(router)() as s:
        return show(s)


def starlette_app(router: Router) -> Starlette:
    def page(show: Page) -> Any:
        async def serve(request: Request) -> Response:
            found = in_session(router, show)
            return Response(found) if isinstance(found, str) else Response(status_code=found)

        return serve

    return Starlette(routes=[Route(path, page(show), methods=METHODS) for path, show in PAGES.items()])


def starlette_site(router: Router, **options: Any) -> Ask:
    return asking(AsgiMiddleware(starlette_app(router), router, **options))


def fastapi_site(router: Router, **options: Any) -> Ask:
    def page(show: Page) -> Any:
        def serve() -> Any:  # not async, so FastAPI calls it in a thread
            found = in_session(router, show)
            return Response(found) if isinstance(found, str) else Response(status_code=found)

        return serve

    app = FastAPI()
    for path, show in PAGES.items():
        app.add_api_route(path, page(show), methods=METHODS)
    return asking(AsgiMiddleware(app, router, **options))


def flask_answer(found: str | int) -> Any:
    return found if isinstance(found, str) else ("", found)


def flask_site(router: Router, **options: Any) -> Ask:
    app = Flask("shop")

    for path, show in PAGES.items():
        app.add_url_rule(path, path, lambda show=show: flask_answer(in_session(router, show)), methods=METHODS)
    app.wsgi_app = WsgiMiddleware(app.wsgi_app, router, **options)  # type: ignore[method-assign]
    return asking_wsgi(app)


class FlaskSession(RoutingMixin, flask_sqlalchemy.session.Session):
    pass


def flask_sqlalchemy_site(router: Router, **options: Any) -> Ask:
    app = Flask("shop")
    app.config["SQLALCHEMY_DATABASE_URI"] = core_of(router).writer_engine().url  # required, but the sessions never use it
    db = flask_sqlalchemy.SQLAlchemy(app, session_options={"class_": FlaskSession, "router": router})
    for path, show in PAGES.items():
        app.add_url_rule(path, path, lambda show=show: flask_answer(show(db.session)), methods=METHODS)
    app.wsgi_app = WsgiMiddleware(app.wsgi_app, router, **options)  # type: ignore[method-assign]
    return asking_wsgi(app)


def _django_pages() -> None:
    """Configure Django, which has one set of settings and URLs. So each request carries its router."""
    if settings.configured:
        return
    urls = ModuleType("tests_integration_django_urls")
    sys.modules[urls.__name__] = urls
    settings.configure(ALLOWED_HOSTS=["*"], ROOT_URLCONF=urls.__name__, SECRET_KEY="none", USE_TZ=True, LOGGING_CONFIG=None)

    def page(show: Page) -> Any:
        def serve(request: Any) -> HttpResponse | HttpResponseNotModified:
            router = request.scope["router"] if hasattr(request, "scope") else request.META["router"]
            found = in_session(router, show)
            return HttpResponse(found) if isinstance(found, str) else HttpResponseNotModified()

        return serve

    urls.urlpatterns = [django_path(path[1:], page(show)) for path, show in PAGES.items()]  # type: ignore[attr-defined]


def django_site(router: Router, **options: Any) -> Ask:
    _django_pages()
    django = get_wsgi_application()

    def app(environ: Any, start_response: Any) -> Iterable[bytes]:
        return django({**environ, "router": router}, start_response)

    return asking_wsgi(WsgiMiddleware(app, router, **options))


def django_asgi_site(router: Router, **options: Any) -> Ask:
    _django_pages()
    django = get_asgi_application()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await django({**scope, "router": router}, receive, send)

    return asking(AsgiMiddleware(app, router, **options))


SITES = [starlette_site, fastapi_site, flask_site, flask_sqlalchemy_site, django_site, django_asgi_site]
