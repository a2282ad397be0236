"""The headers that the middleware reads and writes."""

from __future__ import annotations

import time

import pytest

from aurora_router import ConfigurationError, Router
from aurora_router.core.http import cookie, cookie_reader, private, with_private_field
from aurora_router.middleware import AsgiMiddleware, WsgiMiddleware

TOKEN = "1.7.1-A.1764000000"


@pytest.mark.parametrize(
    ("given", "made"),
    [
        ("", "private"),
        ("max-age=60", "private, max-age=60"),
        ("public, max-age=60, s-maxage=600", "private, max-age=60"),
        ("PUBLIC ,S-MaxAge = 9", "private"),
        ("no-cache", "private, no-cache"),
        ('private="set-cookie, x"', "private"),
        ('no-cache="a, public", must-revalidate', 'private, no-cache="a, public", must-revalidate'),
        ("private", "private"),
        ("Private, max-age=60", "Private, max-age=60"),
        ("no-store", "no-store"),
        ('x="unbalanced, public', "private, x=, unbalanced"),
    ],
)
def test_a_response_with_a_token_is_nobodys_but_its_clients(given: str, made: str) -> None:
    assert private(given) == made


def test_cache_control_headers_are_merged_without_cdn_ones() -> None:
    """Several Cache-Control headers become one that is private, and headers only for a CDN are left out."""
    headers = [
        ("Cache-Control", "public"),
        ("content-type", "text/plain"),
        ("cache-control", "max-age=5"),
        ("CDN-Cache-Control", "max-age=600"),
        ("Cloudflare-CDN-Cache-Control", "max-age=600"),
        ("Surrogate-Control", "max-age=600"),
        ("Set-Cookie", "theme=dark"),
    ]
    assert with_private_field(headers, ("aurora-router-token", TOKEN)) == [
        ("content-type", "text/plain"),
        ("Set-Cookie", "theme=dark"),
        ("Cache-Control", "private, max-age=5"),
        ("aurora-router-token", TOKEN),
    ]


@pytest.mark.parametrize(
    ("cookies", "token"),
    [
        (f"aurora_router={TOKEN}", TOKEN),
        (f'a=1; aurora_router="{TOKEN}"; b=2', TOKEN),
        (f"a=1;aurora_router = {TOKEN} ;b", TOKEN),
        (f"aurora_router={TOKEN}; aurora_router=other", TOKEN),
        (f"my_aurora_router={TOKEN}", None),
        (f"a=aurora_router={TOKEN}", None),
        (f"aurora_router_2={TOKEN}", None),
        ("aurora_router", None),
        ("aurora_router=", ""),
        ('aurora_router="', ""),
        (";;;=;==;aurora_router;=", None),
        ("", None),
    ],
)
def test_a_cookie_is_found_by_its_whole_name(cookies: str, token: str | None) -> None:
    assert cookie_reader("aurora_router")(cookies) == token


def test_no_cookie_header_takes_long_to_read() -> None:
    for part in ("; ", ";", " ", '"', "aurora_router", "aurora_router=", ";aurora_router ", "=", "\t;"):
        for cookies in (part * (500_000 // len(part)), "aurora_router=" + part * (500_000 // len(part))):
            began = time.perf_counter()
            cookie_reader("aurora_router")(cookies)
            assert time.perf_counter() - began < 5


def test_a_cookie_is_for_no_script_and_no_other_site() -> None:
    assert cookie("c", TOKEN, 60, secure=False) == f"c={TOKEN}; Max-Age=60; Path=/; HttpOnly; SameSite=Lax"
    assert cookie("c", TOKEN, 60, secure=True) == f"c={TOKEN}; Max-Age=60; Path=/; HttpOnly; SameSite=Lax; Secure"


@pytest.mark.parametrize("middleware", [AsgiMiddleware, WsgiMiddleware])
@pytest.mark.parametrize("wrong", [{"cookie": "a b"}, {"cookie": ""}, {"header": "a:b"}, {"header": 7}, {"secure": "yes"}])
def test_what_cannot_be_a_name_is_refused_at_once(middleware: type, wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(wrong))):
        middleware(print, Router("postgresql+psycopg://db/shop"), **wrong)
    with pytest.raises(ConfigurationError, match="router="):
        middleware(print, "postgresql://db/shop")
