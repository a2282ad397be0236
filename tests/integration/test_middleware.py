"""Behind the middleware of each framework clients see their own writes, whichever host serves the next request."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from aurora_router import Router
from aurora_router.core import events
from aurora_router.local import PostgresCluster
from tests.integration.shop import until_readers_serve
from tests.integration.sites import COOKIE, HEADER, SITES, Ask, with_cookie

MakeRouter = Callable[..., Router]


@pytest.fixture(params=SITES, ids=lambda site: site.__name__)
def site(request: pytest.FixtureRequest, make_router: MakeRouter, heard: list[events.Event]) -> Callable[..., Ask]:
    """Make hosts that serve the site, each with a router of its own."""

    def host(router_options: dict[str, Any] | None = None, **options: Any) -> Ask:
        router = make_router(listeners=[heard.append], **(router_options or {}))
        until_readers_serve(router, 2)
        ask: Ask = request.param(router, **options)
        return ask

    return host


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


def test_strange_tokens_break_no_page_and_make_none_wait(
    paused: PostgresCluster, site: Callable[..., Ask], heard: list[events.Event]
) -> None:
    host = site()
    token = host("POST", "/more").cookie
    assert host("GET", "/stock", {"cookie": f'{COOKIE}="{token}"; {COOKIE}=other'}).text == "11", "quoted, and twice"
    for strange in STRANGE:
        for headers in ({"cookie": f"{COOKIE}={strange}"}, {"cookie": strange}, {HEADER: strange}):
            heard.clear()
            answer = host("GET", "/stock", headers)
            assert (answer.status, answer.text) == (200, "10")
            assert not answer.tells
            assert not any(isinstance(event, events.WaitStarted) for event in heard)


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
