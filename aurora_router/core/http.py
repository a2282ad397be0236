"""Tokens in HTTP: the cookie that carries a token, and headers that keep a response with a token out of shared caches."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

Headers = Iterable[tuple[str, str]]


def cookie_reader(name: str) -> Callable[[str], str | None]:
    """Return a function that finds the value of this cookie in a Cookie header.

    If the header has several, the function returns the first one; if it has none, None.
    """
    mine = re.compile(rf'(?:^|;)[ \t]*{re.escape(name)}[ \t]*=[ \t]*"?([^;"]*)')

    def read(cookies: str) -> str | None:
        found = mine.search(cookies)
        return found[1].rstrip(" \t") if found is not None else None

    return read


def cookie(name: str, value: str, max_age: int, *, secure: bool) -> str:
    """Return the Set-Cookie header for a cookie that no script and no other site needs. max_age: seconds."""
    return f"{name}={value}; Max-Age={max_age}; Path=/; HttpOnly; SameSite=Lax{'; Secure' if secure else ''}"


def with_private_field(headers: Headers, field: tuple[str, str]) -> list[tuple[str, str]]:
    """Return the headers of a response, with one more that is only for its client. So no shared cache may keep the response."""
    said: list[str] = []
    others: list[tuple[str, str]] = []
    for name, value in headers:
        known = name.lower()
        if known == "cache-control":
            said.append(value)
        # The headers left out would take precedence over Cache-Control.
        elif known != "surrogate-control" and not known.endswith("cdn-cache-control"):
            others.append((name, value))
    return [*others, ("Cache-Control", private(", ".join(said))), field]


def private(cache_control: str) -> str:
    """Return the value of a Cache-Control header, changed only if a shared cache might keep the response."""
    directives = [found.strip() for found in re.findall(r'(?:"(?:\\.|[^"\\])*"|[^,"])+', cache_control)]
    if any(directive.lower() in ("private", "no-store") for directive in directives):
        return cache_control
    shared = ("", "public", "s-maxage", "private", "no-store")  # private="name" is about that header only
    return ", ".join(["private", *(d for d in directives if d.partition("=")[0].strip().lower() not in shared)])
