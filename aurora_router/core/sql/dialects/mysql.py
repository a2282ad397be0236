r"""MySQL and MariaDB: their tokens, their statements that are no queries, and what is particular in their queries.

The text does not show these things, so each possible reading counts:

- `sql_mode`. Under NO_BACKSLASH_ESCAPES a backslash in a literal is a character like others. Under ANSI_QUOTES "..." is a
  name, and names have no escapes. That matters only if a backslash stands before a quote. Such a text is cut up in each of the
  ways, except those that the server can only refuse. It counts as the strongest of its possible effects. A caller that knows the
  mode passes it (`MODES`), and then only one way is left. A call of "f"(...) counts as a call in any mode.
- Comments like `/*!80000 ... */` and `/*M! ... */` are part of the statement on some servers and comments on others. A text with
  such comments is read both ways. If they are for more than one version, or hold other comments, the text is a write.

These things are assumed:

- Nobody shadows a built-in function of a newer version.
- No stored function has the name of a built-in one that the server knows only directly before a parenthesis (`count (1)`).
- No `USE` hides the name of a system schema.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Final

from aurora_router.core.sql import lexer
from aurora_router.core.sql.dialects import mysql_functions as words
from aurora_router.core.sql.effects import Effect, Recall
from aurora_router.core.sql.queries import (
    CHANGES,
    MARKS,
    QUERY_HEADS,
    Dialect,
    Mark,
    StatementHandler,
    StatementReader,
    after,
    after_literal,
)

# ---------------------------------------------------------------- cutting a text up

_NAME: Final = lexer.START + "0-9$"
_EXPONENT: Final = "[eE][-+]?[0-9]++"
_VERSIONED: Final = r"/\*[mM]?!"  # begins a comment that some servers execute
# Garbage that a server can only refuse: a quote that never ends, or an escaped one outside of quotes.
_REFUSED: Final = re.compile(r"""['"`]|\\['"]""")
_VERSION: Final = re.compile(_VERSIONED + "[0-9]{0,6}")


@cache
def _tokens(single: bool, double: bool, executed: bool) -> re.Pattern[str]:
    """A pattern that finds the tokens.

    single, double: whether backslashes escape between these quotes.
    executed: whether `/*! ... */` is no comment.
    """
    return lexer.pattern(
        rf"{lexer.SPACE}|\#[^\n\x00]*+|--(?=[\x01-\x20]|\Z)[^\n\x00]*+",
        lexer.WORD,
        lexer.escaped("'") if single else lexer.quoted("'"),
        lexer.escaped('"') if double else lexer.quoted('"'),
        lexer.quoted("`"),
        r"/\*(?![!+]|[mM]!).*?\*/",
        # The server may read an optimizer's hint by other rules. So a hint that hides its end in quotes is left as garbage.
        r"""/\*\+(?:[^'"`*]|\*(?!/)|'[^'*\\]*+'|"[^"*\\]*+"|`[^`*]*+`)*\*/""",
        rf"{_VERSIONED}[0-9]*+|\*/" if executed else rf"{_VERSIONED}.*?\*/",
        lexer.NAMED_PARAMETER,
        # A name may begin with a digit. Directly behind a dot it may have nothing but digits.
        rf"(?<=[{_NAME}`\"]\.)[{_NAME}]++",
        rf"[0-9]++{_EXPONENT}",
        rf"[0-9]++[{lexer.START}$][{_NAME}]*+",
        rf"[0-9]++(?:\.[0-9]*+(?:{_EXPONENT})?)?",
        rf"(?<![{_NAME}`\"])\.[0-9]++(?:{_EXPONENT})?",
        "@@|" + lexer.SIGN,
    )


@dataclass(frozen=True, slots=True)
class _Tokenizer:
    """How a server cuts a text up.

    escapes: for each setting that it may have, whether backslashes escape in '...' and in "...".
    """

    escapes: tuple[tuple[bool, bool], ...]

    def __call__(self, sql: str) -> tuple[list[str], ...]:
        escapes, executed = self.escapes[:1], [False]
        if "\\" in sql and ("\\'" in sql or '\\"' in sql):
            escapes = self.escapes
        if "/*!" in sql or "/*M!" in sql or "/*m!" in sql:
            if len(set(_VERSION.findall(sql))) > 1 or "*/*" in sql:
                return ()
            executed = [True, False]
        cuts: list[list[str]] = []
        for single, double in escapes:
            for execute in executed:
                found_by = _tokens(single, double, execute)
                raw = lexer.tokens(sql, found_by)
                if None in raw[-2:]:
                    if ";" not in raw and _REFUSED.match(lexer.garbage(sql, found_by)):
                        continue
                    return ()
                content = _content(raw) if len(executed) > 1 else raw
                if content is None:
                    return ()
                if content not in cuts:
                    cuts.append(content)
        return tuple(cuts)


def _content(raw: list[str]) -> list[str] | None:
    """The tokens without the signs around executed comments; None if comments are in comments, or never end."""
    kept, inside = list[str](), False
    for piece in raw:
        if piece == "*/":
            if not inside:
                return None
            inside = False
        elif piece[:2] == "/*":
            versioned = _VERSION.match(piece) is not None
            if inside or (versioned and "/*" in piece[2:]):
                return None
            inside = versioned and piece[-2:] != "*/"
            if not inside:
                kept.append(piece)
        else:
            kept.append(piece)
    return None if inside else kept


# ---------------------------------------------------------------- statements that are no queries

# `start` is the index of the token after the first word. Each statement that commits implicitly ends a transaction.

_TABLES: Final = frozenset({"table", "tables"})
_EXPLAIN_OPTIONS: Final = frozenset({"analyze", "extended", "partitions"})
_ACCESS_MODES: Final = frozenset({"transaction_read_only", "tx_read_only"})
_ON: Final = (["1"], ["on"], ["true"], ["'on'"])
_GLOBAL: Final = frozenset({"global", "persist", "persist_only"})
_SHOW: Final[Mapping[str, Effect]] = {
    **dict.fromkeys(("character", "charset", "collation", "columns", "create", "databases", "fields"), Effect.READ),
    **dict.fromkeys(("function", "index", "indexes", "keys", "procedure", "schemas"), Effect.READ),
    **dict.fromkeys(("table", "tables", "triggers"), Effect.READ),
    **dict.fromkeys(("local", "profile", "profiles", "session", "status", "variables"), Effect.CONNECTION),
}


def _ending(reading: StatementReader, _start: int, _stop: int) -> Effect:
    reading.end()
    return Effect.WRITE


def _begin(reading: StatementReader, start: int, stop: int) -> Effect:
    reading.end()
    return Effect.TRANSACTION if reading.low[start:stop] in ([], ["work"]) else Effect.WRITE  # BEGIN NOT ATOMIC


def _start(reading: StatementReader, start: int, stop: int) -> Effect:
    reading.may_end_transaction = True
    if reading.low[start] != "transaction":
        return Effect.WRITE  # START SLAVE
    if "only" not in reading.low[start:stop]:  # READ ONLY protects as well as the mode before
        reading.may_unset_read_only = True
    return Effect.TRANSACTION


def _finish(reading: StatementReader, start: int, stop: int) -> Effect:
    if "to" not in reading.low[start:stop]:  # ROLLBACK TO a savepoint
        reading.end()
    return Effect.TRANSACTION


def _xa(reading: StatementReader, start: int, _stop: int) -> Effect:
    reading.end()
    return Effect.CONNECTION if reading.low[start] in ("begin", "end", "start") else Effect.WRITE


def _explain(reading: StatementReader, start: int, stop: int) -> Effect:
    # EXPLAIN may already execute subqueries. EXPLAIN of a change demands the same as the change itself.
    start = _behind_options(reading, start, stop)
    low = reading.low
    if reading.head(start, stop) in QUERY_HEADS:
        return reading.query(start, stop)
    if low[start : start + 2] == ["for", "connection"]:
        return Effect.CONNECTION
    table = start < stop <= start + 4 and low[start] not in CHANGES and low[start] != "replace"
    return Effect.READ if table and all(_names(reading, at) for at in range(start, stop)) else Effect.WRITE


def _behind_options(reading: StatementReader, start: int, stop: int) -> int:
    low = reading.low
    while start < stop:
        if low[start : start + 2] == ["format", "="]:
            start = min(start + 3, stop)
        elif low[start] in _EXPLAIN_OPTIONS:
            start += 1
        else:
            break
    return start


def _names(reading: StatementReader, at: int) -> bool:
    """Whether the token at `at` is a name, a dot, or a pattern of names."""
    return bool(reading.name(at)) or reading.low[at] == "." or reading.low[at][:1] == "'"


def _analyze(reading: StatementReader, start: int, stop: int) -> Effect:
    if reading.low[start] in _TABLES:
        return _ending(reading, start, stop)
    return reading.preparable(_behind_options(reading, start, stop), stop)  # it is executed


def _shows_session(shown: list[str]) -> bool:
    """Whether SHOW STATUS may show what the connection has counted for itself. A pattern may be a parameter."""
    if shown[int(shown[:1] in (["local"], ["session"])) :][:1] != ["status"]:
        return False
    patterns = [token[1:-1].replace("\\", "").partition("%")[0] for token in shown if token[:1] in ("'", '"')]
    counted = words.STATUS_OF_SESSION
    return not patterns or any(name.startswith(part) or part.startswith(name) for name in patterns for part in counted)


def _show(reading: StatementReader, start: int, stop: int) -> Effect:
    while reading.low[start] in ("extended", "full"):
        start += 1
    word = reading.low[start]
    of_last = word in ("count", "errors", "warnings") or _shows_session(reading.low[start:stop])
    effect = reading.recall(Recall.STATEMENT) if of_last else _SHOW.get(word, Effect.SERVER)
    if reading.low[start : start + 2] in (["create", "event"], ["create", "table"], ["table", "status"]):
        effect = Effect.SERVER
    condition = reading.find("where", start, stop)
    return max(effect, reading.query(min(condition + 1, stop), stop))


def _set(reading: StatementReader, start: int, stop: int) -> Effect:
    low = reading.low
    scope, word = Effect.SESSION, low[start]
    if word in ("default", "password", "resource") or start == stop:
        return _ending(reading, start, stop)
    if word == "statement":
        inner = reading.find("for", start, stop)
        if inner == stop or low[inner + 1] == "set":
            return Effect.WRITE
        if not _ACCESS_MODES.isdisjoint(word.strip('`"') for word in low[start:inner]):
            reading.may_unset_read_only = True
            return max(scope, reading.statement(inner + 1, stop))
        return max(reading.query(start + 1, inner), reading.statement(inner + 1, stop))
    if low[start + 1 : start + 2] == ["transaction"] and word == "global":
        return Effect.SERVER
    if "transaction" in low[start : start + 2]:
        if "write" in low[start:stop]:
            reading.may_unset_read_only = True
        return Effect.TRANSACTION if word == "transaction" else scope
    effect = Effect.SERVER
    while start < stop:
        end = reading.find(",", start, stop)
        value = reading.find("=", start, end)
        target = {name.strip('`"') for name in low[start:value]}
        if "autocommit" in target:
            reading.end()
        scope = Effect.SERVER if not _GLOBAL.isdisjoint(low[start : start + 2]) and value < end else Effect.SESSION
        if scope is Effect.SESSION and not _ACCESS_MODES.isdisjoint(target) and low[value + 1 : end] not in _ON:
            reading.may_unset_read_only = True
        effect = max(effect, scope, reading.query(min(value + 1, end), end))
        start = end + 1
    return effect


def _create(reading: StatementReader, start: int, stop: int) -> Effect:
    low = reading.low
    while low[start] in ("or", "replace"):
        start += 1
    if low[start] != "temporary":
        return _ending(reading, start, stop)
    query = next((at for at in range(start, stop) if low[at] in ("select", "values", "with")), stop)
    while low[query - 1] == "(":
        query -= 1
    return max(Effect.CONNECTION, reading.query(query, stop))


def _drop(reading: StatementReader, start: int, stop: int) -> Effect:
    if reading.low[start] in ("prepare", "temporary"):
        return Effect.CONNECTION
    return _ending(reading, start, stop)


def _flush(reading: StatementReader, start: int, stop: int) -> Effect:
    reading.end()
    tail = reading.low[start:stop][-3:]
    return Effect.CONNECTION if tail == ["with", "read", "lock"] or tail[-2:] == ["for", "export"] else Effect.WRITE


def _lock(reading: StatementReader, start: int, stop: int) -> Effect:
    reading.end()
    return Effect.WRITE if "write" in reading.low[start:stop] else Effect.CONNECTION


def _unlock(reading: StatementReader, _start: int, _stop: int) -> Effect:
    reading.end()
    return Effect.CONNECTION


def _reset(reading: StatementReader, start: int, _stop: int) -> Effect:
    reading.end()
    return Effect.SERVER if reading.low[start] == "query" else Effect.WRITE


def _backup(reading: StatementReader, start: int, _stop: int) -> Effect:
    reading.end()
    return Effect.SERVER if reading.low[start] == "stage" else Effect.WRITE


def _checksum(reading: StatementReader, start: int, stop: int) -> Effect:
    return Effect.READ if reading.low[start] in _TABLES else Effect.WRITE


def _get(reading: StatementReader, _start: int, _stop: int) -> Effect:
    return reading.recall(Recall.STATEMENT)


def _do(reading: StatementReader, start: int, stop: int) -> Effect:
    return reading.query(start, stop)


def _with_connection(reading: StatementReader, start: int, stop: int) -> Effect:
    return max(Effect.CONNECTION, reading.query(start, stop))


_HEADS: Final[Mapping[str, StatementHandler]] = {
    "analyze": _analyze,
    "backup": _backup,
    "begin": _begin,
    "checksum": _checksum,
    "commit": _finish,
    "create": _create,
    "deallocate": Effect.CONNECTION,
    "delete": Effect.WRITE,
    "desc": _explain,
    "describe": _explain,
    "do": _do,
    "drop": _drop,
    "explain": _explain,
    "flush": _flush,
    "get": _get,
    "handler": _with_connection,
    "help": Effect.READ,
    "insert": Effect.WRITE,
    "kill": _with_connection,
    "lock": _lock,
    "prepare": _with_connection,
    "release": Effect.TRANSACTION,
    "replace": Effect.WRITE,
    "reset": _reset,
    "rollback": _finish,
    "savepoint": Effect.TRANSACTION,
    "set": _set,
    "show": _show,
    "start": _start,
    "unlock": _unlock,
    "update": Effect.WRITE,
    "use": Effect.SESSION,
    "xa": _xa,
    # Everything else is a write that may commit. CALL and EXECUTE are, too, because the text does not show what they run.
}


# ---------------------------------------------------------------- queries

_SELECT_OPTIONS: Final = ("high_priority", "sql_big_result", "sql_buffer_result", "sql_cache", "sql_no_cache", "sql_small_result")
_after_select = after("select", "straight_join", *_SELECT_OPTIONS)


def _after_match(reading: StatementReader, at: int) -> bool:
    """Whether AGAINST is behind MATCH and its columns, which may stand without parentheses."""
    at -= 1
    if reading.low[at] == ")":
        return True
    while reading.low[at] in (".", ",") or (reading.name(at) and reading.low[at] != "match"):
        at -= 1
    return reading.low[at] == "match"


# These are for MariaDB. In MySQL all these words are keywords, and none of them can be called without quotes.
_GRAMMAR: Final = {
    "against": _after_match,
    "any": after("=", "<", ">"),
    "columns": after_literal,
    "escape": after_literal,
    "of": after("member"),
    "rollup": lambda reading, at: reading.low[at - 2 : at] == ["group", "by"],
    "some": after("=", "<", ">"),
    "sql_buffer_result": _after_select,
    "sql_no_cache": _after_select,
    "transaction": after("of"),
}
_SCHEMAS: Final[Mapping[str, Mapping[str, Effect]]] = {
    "information_schema": {
        **dict.fromkeys(words.SHARED_RELATIONS, Effect.READ),
        **dict.fromkeys(words.CONNECTION_RELATIONS, Effect.CONNECTION),
    },
    "mysql": {},
    "performance_schema": dict.fromkeys(words.CONNECTION_RELATIONS, Effect.CONNECTION),
    "sys": {},
}
_SERVER_COLUMNS: Final = frozenset(quote + name + quote for name in words.SERVER_COLUMNS for quote in ("", "`", '"'))
_MARKS: Final[Mapping[str, Mark | Effect]] = {
    **MARKS,
    **dict.fromkeys(("lock", "procedure"), Mark.WRITES),
    **{quote + schema + quote: Mark.SCHEMA for schema in _SCHEMAS for quote in ("", "`", '"')},
    "@": Mark.USER_VARIABLE,
    ":": Mark.COLON,
    "@@": Mark.VARIABLE,
    "sql_calc_found_rows": Effect.CONNECTION,  # for FOUND_ROWS()
}
_FUNCTIONS: Final[Mapping[str, Effect]] = {
    **dict.fromkeys(words.READ, Effect.READ),
    **dict.fromkeys(words.SERVER, Effect.SERVER),
    **dict.fromkeys(words.CONNECTION, Effect.CONNECTION),
    **dict.fromkeys(words.WRITE, Effect.WRITE),
}


def _last_insert_id(reading: StatementReader, closing: int) -> Effect:
    # With an argument it sets the value that it returns from then on.
    return reading.recall(Recall.STATEMENT) if reading.low[closing - 1] == "(" else Effect.SESSION


#: What may be known of `sql_mode`, and for each possible mode, whether backslashes escape in '...' and in "...".
MODES: Final[Mapping[str, tuple[tuple[bool, bool], ...]]] = {
    "": ((True, True), (True, False), (False, False)),
    ":escapes": ((True, True), (True, False)),
    ":plain": ((True, True),),
    ":ansi_quotes": ((True, False),),
    ":no_backslash_escapes": ((False, False),),
}


def mode(sql_mode: str | None) -> str:
    """Return the mode of `MODES` for the server's `@@sql_mode`. None: it is only known to lack NO_BACKSLASH_ESCAPES."""
    if sql_mode is None:
        return ":escapes"
    modes = sql_mode.upper().split(",")
    if "NO_BACKSLASH_ESCAPES" in modes:
        return ":no_backslash_escapes"
    return ":ansi_quotes" if "ANSI_QUOTES" in modes else ":plain"


@cache
def mysql(known: str) -> Dialect:
    """Return the dialect of MySQL, with what is known of `sql_mode` (one of `MODES`)."""
    return _dialect(known, words.MYSQL_READ, words.MYSQL_KEYWORDS, {})


@cache
def mariadb(known: str) -> Dialect:
    """Return the dialect of MariaDB, with what is known of `sql_mode` (one of `MODES`)."""
    # Under sql_mode=ORACLE a sequence's next value is spelled s.nextval.
    return _dialect(known, words.MARIADB_READ, frozenset(), {"nextval": Effect.WRITE, "currval": Effect.CONNECTION})


def _dialect(known: str, read: frozenset[str], keywords: frozenset[str], marks: Mapping[str, Effect]) -> Dialect:
    return Dialect(
        tokenizations=_Tokenizer(MODES[known]),
        statement_handlers=_HEADS,
        default_handler=_ending,
        marks={**_MARKS, **marks},
        non_calls=lexer.SIGNS | words.KEYWORDS | keywords | words.READ | read,
        contextual_non_calls=_GRAMMAR,
        functions={**_FUNCTIONS, **dict.fromkeys(read, Effect.READ)},
        unquoted=words.UNQUOTED,
        argument_checks={quote + "last_insert_id" + quote: _last_insert_id for quote in ("", "`", '"')},
        schemas=_SCHEMAS,
        server_columns=_SERVER_COLUMNS,
        server_relations=words.SERVER_RELATIONS,
        star_follows=words.STAR_FOLLOWS,
        recalled=words.RECALLED,
        locks=words.LOCKS,
        variables=words.SERVER_VARIABLES,
        transient=words.TRANSIENT,
        targets=frozenset("@"),
        folds_quoted=True,
    )
