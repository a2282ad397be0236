"""PostgreSQL: its tokens, its statements that are no queries, and what is particular in its queries.

What the text cannot show is assumed: `standard_conforming_strings` is on (a text that would lex differently
if it were off is a write); nobody shadows a built-in function, operator, cast or SQL construct through the
`search_path`; views and operators are what they seem.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Final

from aurora_router.core import lexer
from aurora_router.core.dialects import postgresql_functions as words
from aurora_router.core.effects import Effect
from aurora_router.core.queries import CHANGES, MARKS, QUERY_HEADS, TEMPORARY, Dialect, Head, Reading

_TOKENS: Final = (
    rf"{lexer.SPACE}|--[^\n\r]*+",
    rf"(?![eE]'|[uU]&\"){lexer.WORD}",
    lexer.quoted("'"),
    lexer.quoted('"'),
    lexer.COMMENT,
    lexer.NAMED_PARAMETER,
    lexer.NUMBER,
    lexer.SIGN + "|[#`]",
    "[eE]" + lexer.escaped("'"),
    "[uU]&" + lexer.quoted('"'),
    r"\$[0-9]++",
    rf"\$(?P<tag>(?:[{lexer.START}][{lexer.START}0-9]*+)?)\$.*?\$(?P=tag)\$",
)

# Words that may be functions elsewhere, and are part of the grammar after these.
_GRAMMAR: Final[Mapping[str, frozenset[str]]] = {
    "bernoulli": frozenset({"tablesample"}),
    "by": frozenset({"group", "order", "partition"}),
    "conflict": frozenset({"on"}),
    "filter": frozenset({")"}),
    "first": frozenset({"fetch"}),
    "materialized": frozenset({"as", "not"}),
    "next": frozenset({"fetch"}),
    "over": frozenset({")"}),
    "repeatable": frozenset({")"}),
    "sets": frozenset({"grouping"}),
    "system": frozenset({"tablesample"}),
    "varying": frozenset({"bit", "char", "character", "nchar"}),
    "zone": frozenset({"time"}),
}

_FALSE: Final = frozenset({"0", "false", "off", "'0'", "'false'", "'off'"})
# Options whose names say that they do not execute the statement. An unknown or quoted one might be ANALYZE.
_EXPLAIN_OPTIONS: Final = frozenset(
    {
        "buffers",
        "costs",
        "format",
        "generic_plan",
        "memory",
        "settings",
        "summary",
        "timing",
        "verbose",
        "wal",
    }
)


@dataclass(frozen=True, slots=True)
class _Cut:
    """How the server cuts a text up: in one way, or it is garbage, or may be cut up in two ways."""

    found_by: re.Pattern[str]

    def __call__(self, sql: str) -> tuple[list[str], ...]:
        raw = lexer.tokens(sql, self.found_by)
        if None in raw[-2:] and "/*" in sql:
            raw = lexer.across_nested_comments(sql, self.found_by)
        return () if None in raw[-2:] or _doubtful(sql, raw) else (raw,)


def _doubtful(sql: str, raw: list[str]) -> bool:
    r"""Would this text be cut up differently if backslashes escaped quotes in ordinary literals?

    It would where a literal holds \' and another quote follows; without one it would just never end.
    """
    if "\\'" not in sql:
        return False
    suspects = [at for at, token in enumerate(raw) if token[:1] == "'" and "\\'" in token]
    if not suspects:
        return False
    first = suspects[0]
    return "\\'" in raw[first][:-1] or any("'" in token for token in raw[first + 1 :])


def _set_config(low: list[str], closing: int) -> Effect:
    return Effect.TRANSACTION if low[closing - 2 : closing] == [",", "true"] else Effect.SESSION


# What the other statements do; `start` is the token after the first word.


def _explain(reading: Reading, start: int, stop: int) -> Effect:
    low = reading.low
    executes = False
    if low[start] == "(" and reading.head(start, stop) not in QUERY_HEADS:
        end = reading.closing(start, stop)
        executes = _explain_executes(reading, start + 1, end)
        start = end + 1
    else:
        while low[start] in ("analyze", "analyse", "verbose"):
            executes = executes or low[start] != "verbose"
            start += 1
    if executes:
        return reading.preparable(start, stop)
    head = reading.head(start, stop)
    if head not in QUERY_HEADS and head not in CHANGES:
        return Effect.WRITE
    reading.query(start, stop, to_the_end=True)  # planning may run functions, so those count; nothing else does
    return Effect.READ


def _explain_executes(reading: Reading, start: int, stop: int) -> bool:
    """Does the option list say ANALYZE, or something that might?"""
    low = reading.low
    while start < stop:
        option, value = low[start : start + 2]
        if option in ("analyze", "analyse"):
            if value not in _FALSE:
                return True
        elif option not in _EXPLAIN_OPTIONS:
            return True
        start += 2 if value == "," else 3
    return False


def _copy(reading: Reading, start: int, stop: int) -> Effect:
    low = reading.low
    if low[start] == "(":
        end = reading.closing(start, stop)
        effect, start = reading.preparable(start + 1, end), end + 1
    else:
        effect = Effect.READ
        while start < stop and low[start] not in ("from", "to"):
            start += 1
    return effect if low[start : start + 2] == ["to", "stdout"] else Effect.WRITE


def _declare(reading: Reading, start: int, stop: int) -> Effect:
    return max(Effect.CONNECTION, reading.preparable(reading.find("for", start, stop) + 1, stop))


def _prepare(reading: Reading, start: int, stop: int) -> Effect:
    if reading.low[start] == "transaction":
        reading.ends = True
        return Effect.TRANSACTION
    return max(Effect.CONNECTION, reading.preparable(reading.find("as", start, stop) + 1, stop))


def _set(reading: Reading, start: int, _stop: int) -> Effect:
    local = reading.low[start] in ("constraints", "local", "transaction")
    return Effect.TRANSACTION if local else Effect.SESSION


def _finish(reading: Reading, start: int, stop: int) -> Effect:
    if "to" not in reading.low[start:stop]:  # ROLLBACK TO a savepoint
        reading.ends = True
    return Effect.WRITE if reading.low[start] == "prepared" else Effect.TRANSACTION


def _lock(reading: Reading, start: int, stop: int) -> Effect:
    # A reader accepts the next two modes as well, and they protect nothing there.
    mode = reading.low[start:stop]
    mode = mode[:-1] if mode[-1:] == ["nowait"] else mode
    return Effect.TRANSACTION if mode[-4:] == ["in", "access", "share", "mode"] else Effect.WRITE


def _create(reading: Reading, start: int, stop: int) -> Effect:
    low = reading.low
    while low[start] in ("or", "replace", "local", "global"):
        start += 1
    if low[start] not in TEMPORARY:
        return Effect.WRITE
    query = reading.find("as", start, stop) + 1
    return Effect.CONNECTION if query > stop else max(Effect.CONNECTION, reading.preparable(query, stop))


def _alter(reading: Reading, start: int, _stop: int) -> Effect:
    return Effect.SERVER if reading.low[start] == "system" else Effect.WRITE


_HEADS: Final[Mapping[str, Head]] = {
    "abort": _finish,
    "alter": _alter,
    "begin": Effect.TRANSACTION,
    "checkpoint": Effect.SERVER,  # a reader accepts it too, and makes a restart point
    "close": Effect.CONNECTION,
    "commit": _finish,
    "copy": _copy,
    "create": _create,
    "deallocate": Effect.CONNECTION,
    "declare": _declare,
    "discard": Effect.SESSION,
    "end": _finish,
    "explain": _explain,
    "fetch": Effect.CONNECTION,
    "listen": Effect.CONNECTION,
    "load": Effect.SESSION,
    "lock": _lock,
    "move": Effect.CONNECTION,
    "prepare": _prepare,
    "release": Effect.TRANSACTION,
    "reset": Effect.SESSION,
    "rollback": _finish,
    "savepoint": Effect.TRANSACTION,
    "set": _set,
    "show": Effect.SERVER,
    "start": Effect.TRANSACTION,
    "unlisten": Effect.CONNECTION,
    # Everything else is a write: EXECUTE too, for what was prepared may write.
}
_EFFECTS: Final = {
    Effect.READ: words.READ,
    Effect.SERVER: words.SERVER,
    Effect.TRANSACTION: words.TRANSACTION,
    Effect.SESSION: words.SESSION,
    Effect.CONNECTION: words.CONNECTION,
    Effect.WRITE: words.WRITE,
}


# Made at first use: compiling the pattern is most of what importing this module would cost.
@cache
def dialect() -> Dialect:
    """PostgreSQL, as all its versions read it."""
    return Dialect(
        cut=_Cut(lexer.pattern(*_TOKENS)),
        heads=_HEADS,
        marks={
            **MARKS,
            **{quote + name + quote: Effect.SERVER for name in words.SERVER_RELATIONS for quote in ("", '"')},
            **{quote + name + quote: Effect.CONNECTION for name in words.CONNECTION_RELATIONS for quote in ("", '"')},
        },
        quiet=words.KEYWORDS | lexer.SIGNS | words.READ,
        grammar=_GRAMMAR,
        functions={name: effect for effect, names in _EFFECTS.items() for name in names},
        prefixes=("pg_stat_get_",),  # some 130 counters of one server
        looks=dict.fromkeys(("set_config", '"set_config"'), _set_config),
        targets=TEMPORARY,
        system_schema="pg_catalog",
    )
