"""PostgreSQL: its tokens, its statements that are no queries, and what is particular in its queries.

The text cannot show everything, so some things are assumed:

- `standard_conforming_strings` is on. Unless that is known, a text with other tokens under the setting "off" is a write.
- Nobody shadows a built-in function, operator, cast or SQL construct through the `search_path`.
- Views and operators call no functions that write.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Final

from aurora_router.core.sql import lexer
from aurora_router.core.sql.dialects import postgresql_functions as words
from aurora_router.core.sql.effects import Effect
from aurora_router.core.sql.queries import (
    CHANGES,
    MARKS,
    QUERY_HEADS,
    TEMPORARY,
    Dialect,
    StatementHandler,
    StatementReader,
    after,
    after_literal,
)

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

# Words that are part of the grammar after these other words, and may be functions elsewhere.
_GRAMMAR: Final = {
    "bernoulli": after("tablesample"),
    "by": after("group", "order", "partition"),
    "columns": after_literal,
    "conflict": after("on"),
    "filter": after(")"),
    "first": after("fetch"),
    "materialized": after("as", "not"),
    "next": after("fetch"),
    "over": after(")"),
    "repeatable": after(")"),
    "sets": after("grouping"),
    "system": after("tablesample"),
    "varying": after("bit", "char", "character", "nchar"),
    "zone": after("time"),
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
class _Tokenizer:
    """How the server cuts a text up. The result is empty if the text has garbage, or may be cut up in two ways.

    standard: whether `standard_conforming_strings` is known to be on.
    """

    found_by: re.Pattern[str]
    standard: bool

    def __call__(self, sql: str) -> tuple[list[str], ...]:
        raw = lexer.tokens(sql, self.found_by)
        if None in raw[-2:] and "/*" in sql:
            raw = lexer.across_nested_comments(sql, self.found_by)
        return () if None in raw[-2:] or (not self.standard and _doubtful(sql, raw)) else (raw,)


def _doubtful(sql: str, raw: list[str]) -> bool:
    r"""Whether this text would be cut up differently if backslashes escaped quotes in ordinary literals.

    It would if a literal holds \' and another quote follows. Without another quote the literal would just never end.
    """
    if "\\'" not in sql:
        return False
    suspects = [at for at, token in enumerate(raw) if token[:1] == "'" and "\\'" in token]
    if not suspects:
        return False
    first = suspects[0]
    return "\\'" in raw[first][:-1] or any("'" in token for token in raw[first + 1 :])


_READ_BACK: Final = 16  # tokens: a call that names its setting is rarely longer
_ACCESS_MODES: Final = frozenset({"default_transaction_read_only", "transaction_read_only"})
_ON: Final = frozenset({"1", "on", "true", "'1'", "'on'", "'true'"})


def _set_config(reading: StatementReader, closing: int) -> Effect:
    if any("transaction_read_only" in token for token in reading.low[max(closing - _READ_BACK, 0) : closing]):
        reading.may_unset_read_only = reading.may_unset_read_only or reading.low[closing - 3] not in _ON
    return Effect.TRANSACTION if reading.low[closing - 2 : closing] == [",", "true"] else Effect.SESSION


@cache
def _setting(form: str) -> re.Pattern[str]:
    """A pattern for the name of a setting with a prefix: an application's, or an extension's.

    It is made at its first use, because that takes 10 ms.
    """
    return re.compile(form.format(rf"({lexer.WORD})(?:\.{lexer.WORD})+"))


def _current_setting(reading: StatementReader, closing: int) -> Effect:
    call = reading.low[max(closing - _READ_BACK, 0) : closing]
    opening = next((at for at in range(len(call) - 1, 0, -1) if call[at - 1].strip('"') == "current_setting"), len(call))
    arguments = call[opening + 1 :]
    if arguments[:2] == ["cast", "("]:
        name, end = arguments[2:3], 6 if arguments[3:4] == ["as"] and arguments[5:6] == [")"] else 0
    else:
        name, end = arguments[:1], 3 if arguments[1:2] == ["::"] else 1
    if not name or arguments[end : end + 1] not in ([], [","]):
        return Effect.SERVER
    return _asks_setting(_setting("e?'{}'").fullmatch(name[0]))


def _asks_setting(named: re.Match[str] | None) -> Effect:
    """The effect of reading a setting.

    An application's own setting is the same on each server, unless its session has set it. Then the unit is on the writer.
    """
    return Effect.SERVER if named is None or named[1] in words.SERVER_SETTINGS else Effect.READ


def _show(reading: StatementReader, start: int, stop: int) -> Effect:
    return _asks_setting(_setting("{}").fullmatch("".join(reading.low[start:stop])))


# The effects of the other statements; `start` is the index of the token after the first word.


def _explain(reading: StatementReader, start: int, stop: int) -> Effect:
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
    # Planning may run functions, so those count. Nothing else does.
    reading.query(start, stop)
    return Effect.READ


def _explain_executes(reading: StatementReader, start: int, stop: int) -> bool:
    """Whether the option list has ANALYZE, or something that might be it."""
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


def _copy(reading: StatementReader, start: int, stop: int) -> Effect:
    low = reading.low
    if low[start] == "(":
        end = reading.closing(start, stop)
        effect, start = reading.preparable(start + 1, end), end + 1
    else:
        effect = Effect.READ
        while start < stop and low[start] not in ("from", "to"):
            start += 1
    return effect if low[start : start + 2] == ["to", "stdout"] else Effect.WRITE


def _declare(reading: StatementReader, start: int, stop: int) -> Effect:
    return max(Effect.CONNECTION, reading.preparable(reading.find("for", start, stop) + 1, stop))


def _prepare(reading: StatementReader, start: int, stop: int) -> Effect:
    if reading.low[start] == "transaction":
        reading.end()
        return Effect.TRANSACTION
    return max(Effect.CONNECTION, reading.preparable(reading.find("as", start, stop) + 1, stop))


def _begin(reading: StatementReader, start: int, stop: int) -> Effect:
    if "write" in reading.low[start:stop]:  # within a transaction it changes that transaction
        reading.may_unset_read_only = True
    return Effect.TRANSACTION


def _set(reading: StatementReader, start: int, stop: int) -> Effect:
    low = reading.low
    local = low[start] in ("constraints", "local", "transaction")
    name = start + (low[start] in ("local", "session"))
    if low[name] == "transaction" or "characteristics" in low[name : name + 2]:
        changes = "write" in low[start:stop]
    else:
        changes = _is_access_mode(low[name]) and low[stop - 1] not in _ON
    reading.may_unset_read_only = reading.may_unset_read_only or changes
    return Effect.TRANSACTION if local else Effect.SESSION


def _is_access_mode(name: str) -> bool:
    """Whether this may be the name of a setting that lets transactions write. U&"..." hides its letters."""
    return name.strip('"') in _ACCESS_MODES or name[:2] == "u&"


def _reset(reading: StatementReader, start: int, _stop: int) -> Effect:
    reading.may_unset_read_only = reading.may_unset_read_only or _is_access_mode(reading.low[start])
    return Effect.SESSION


def _discard(reading: StatementReader, start: int, _stop: int) -> Effect:
    reading.may_unset_read_only = reading.may_unset_read_only or reading.low[start] == "all"
    return Effect.SESSION


def _finish(reading: StatementReader, start: int, stop: int) -> Effect:
    if "to" not in reading.low[start:stop]:  # ROLLBACK TO a savepoint
        reading.end()
    return Effect.WRITE if reading.low[start] == "prepared" else Effect.TRANSACTION


def _lock(reading: StatementReader, start: int, stop: int) -> Effect:
    # A reader also accepts the next two modes, ROW SHARE and ROW EXCLUSIVE, but they protect nothing there.
    mode = reading.low[start:stop]
    mode = mode[:-1] if mode[-1:] == ["nowait"] else mode
    return Effect.TRANSACTION if mode[-4:] == ["in", "access", "share", "mode"] else Effect.WRITE


def _create(reading: StatementReader, start: int, stop: int) -> Effect:
    low = reading.low
    while low[start] in ("or", "replace", "local", "global"):
        start += 1
    if low[start] not in TEMPORARY:
        return Effect.WRITE
    query = reading.find("as", start, stop) + 1
    return Effect.CONNECTION if query > stop else max(Effect.CONNECTION, reading.preparable(query, stop))


def _alter(reading: StatementReader, start: int, _stop: int) -> Effect:
    return Effect.SERVER if reading.low[start] == "system" else Effect.WRITE


_HEADS: Final[Mapping[str, StatementHandler]] = {
    "abort": _finish,
    "alter": _alter,
    "begin": _begin,
    "checkpoint": Effect.SERVER,  # a reader accepts it too, and makes a restart point
    "close": Effect.CONNECTION,
    "commit": _finish,
    "copy": _copy,
    "create": _create,
    "deallocate": Effect.CONNECTION,
    "declare": _declare,
    "discard": _discard,
    "end": _finish,
    "explain": _explain,
    "fetch": Effect.CONNECTION,
    "listen": Effect.CONNECTION,
    "load": Effect.SESSION,
    "lock": _lock,
    "move": Effect.CONNECTION,
    "prepare": _prepare,
    "release": Effect.TRANSACTION,
    "reset": _reset,
    "rollback": _finish,
    "savepoint": Effect.TRANSACTION,
    "set": _set,
    "show": _show,
    "start": _begin,
    "unlisten": Effect.CONNECTION,
    # Everything else is a write. EXECUTE is one, too, because the prepared statement may write.
}
_EFFECTS: Final = {
    Effect.READ: words.READ,
    Effect.SERVER: words.SERVER,
    Effect.TRANSACTION: words.TRANSACTION,
    Effect.SESSION: words.SESSION,
    Effect.CONNECTION: words.CONNECTION,
    Effect.WRITE: words.WRITE,
}


#: What may be known of `standard_conforming_strings`: nothing, or that it is on.
MODES: Final = ("", ":standard")


def mode(standard_conforming_strings: str | None) -> str:
    """Return the mode of `MODES` for the server's setting. None: it is not known."""
    return ":standard" if standard_conforming_strings == "on" else ""


# The dialect is made at its first use, because compiling the pattern would take most of the time to import this module.
@cache
def dialect(known: str) -> Dialect:
    """Return the dialect of PostgreSQL, as all its versions read it, with what is known of its setting (one of `MODES`)."""
    return Dialect(
        tokenizations=_Tokenizer(lexer.pattern(*_TOKENS), known == ":standard"),
        statement_handlers=_HEADS,
        marks={
            **MARKS,
            **{quote + name + quote: Effect.SERVER for name in words.SERVER_RELATIONS for quote in ("", '"')},
            **{quote + name + quote: Effect.CONNECTION for name in words.CONNECTION_RELATIONS for quote in ("", '"')},
        },
        non_calls=words.KEYWORDS | lexer.SIGNS | words.READ,
        contextual_non_calls=_GRAMMAR,
        functions={name: effect for effect, names in _EFFECTS.items() for name in names},
        prefixes=("pg_stat_get_",),  # some 130 counters of one server
        argument_checks={
            quote + name + quote: look
            for name, look in (("current_setting", _current_setting), ("set_config", _set_config))
            for quote in ("", '"')
        },
        transient=words.TRANSIENT,
        targets=TEMPORARY,
        system_schema="pg_catalog",
    )
