"""What a statement does to the server, the session and the data, read from its text alone.

One token pattern per dialect cuts the text up; the first word, and the words, calls and parentheses behind,
decide. Nothing is ever searched in raw text, so a keyword in a literal does not count. Whatever is not known
to be a read is a write: a wrong guess that way costs a detour, never a wrong answer.

What the text cannot show is assumed: `standard_conforming_strings` is on (a text that would lex differently
if it were off is a write); nobody shadows a built-in function, operator, cast or SQL construct through the
`search_path`; views and operators are what they seem. The tables of built-in functions live in `functions`.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any, Final, Literal, TypeAlias

from aurora_router.core import functions as known_functions

Hint: TypeAlias = Literal["writer", "reader"]


class Effect(enum.IntEnum):
    """What a statement does; of several, the strongest counts (the order here)."""

    READ = 0  #: reads data that every instance has
    SERVER = 1  #: asks, or changes, the one server that it runs on
    TRANSACTION = 2  #: begins, ends or changes a transaction
    SESSION = 3  #: changes settings that outlive the transaction
    CONNECTION = 4  #: needs this very connection, now or later (cursors, temporary tables, LISTEN)
    WRITE = 5  #: writes, locks, or might


@dataclass(frozen=True, slots=True)
class Verdict:
    """What is known about one text.

    effect: the safe answer, in which unknown functions count as writes.
    known: the answer if every unknown function were harmless; equal to `effect` where nothing is undecidable.
    functions: the unknown functions, lower case unless quoted, `schema.name` where the text says so; empty
        where `known` equals `effect`. A quoted name that contains a dot or a quote keeps its quotes.
    ends: it may end a transaction by itself: COMMIT, ROLLBACK, and what cannot be read.
    hint: what a comment `/*@writer*/` or `/*@reader*/` asks for; it changes nothing else here. If the text
        has both, the writer.
    """

    effect: Effect
    known: Effect
    functions: frozenset[str] = frozenset()
    hint: Hint | None = None
    ends: bool = False

    def effect_given(self, read_only_functions: Container[str]) -> Effect:
        """The effect when the functions named are known to be harmless.

        Names match as the text calls them: `f` allows `f()` and not `app.f()`, `app.f` allows `app.f()` and
        not `f()`, since the same name in another schema may be another function. To allow both, name both.
        """
        if all(name in read_only_functions for name in self.functions):
            return self.known
        return self.effect


def verdict(sql: str, dialect: str = "postgresql") -> Verdict:
    """What is known about this text; verdicts of ordinary texts are cached.

    Raises ValueError for an unknown dialect, and nothing else whatever the text.
    """
    if len(sql) > _CACHED_LENGTH:
        return _judge(sql, dialect)
    return _cached(sql, dialect)


def classify(sql: str, dialect: str = "postgresql", *, read_only_functions: Iterable[str] = ()) -> Effect:
    """The effect of a statement; of several in one text, the strongest.

    dialect: "postgresql", "mysql" or "mariadb".
    read_only_functions: functions that only read, spelled as the statement calls them; see
        `Verdict.effect_given`.
    Raises ValueError for an unknown dialect, and nothing else whatever the text.
    """
    return verdict(sql, dialect).effect_given(frozenset(read_only_functions))


# ---------------------------------------------------------------- dialects


class _Mark(enum.Enum):
    """Words and signs inside a query that need a look."""

    OPEN = enum.auto()
    CLOSE = enum.auto()
    WRITES = enum.auto()
    FOR = enum.auto()
    INTO = enum.auto()
    WITH = enum.auto()
    MAIN = enum.auto()  # ends the list of a WITH


_Head: TypeAlias = "Effect | Callable[[_Reading, int, int], Effect]"


@dataclass(frozen=True, slots=True)
class _Dialect:
    """All that the lexer and the reader need to know about one SQL dialect."""

    pattern: re.Pattern[str]  # white space and line comments, then one token as group 1
    nested_comments: bool
    backslash_doubt: bool  # would '..\'..' lex differently under another setting of the server?
    heads: Mapping[str, _Head]
    marks: Mapping[str, _Mark | Effect]
    quiet: frozenset[str]  # what may stand before "(" without being a call that matters
    functions: Mapping[str, Effect]
    system_schema: str


# Only ASCII folds and only ASCII is white space, as in the servers: U+00A0 is part of a name, U+212A no K.
_START = r"A-Za-z_\x80-\U0010ffff"
_WORD = rf"[{_START}][{_START}0-9$]*+"
_SPACE = r"[ \t\n\r\f\v]++"
# Letters that follow a number are a word of their own: old servers read `LIMIT 1for update` that way.
_NUMBER = r"(?:[0-9]++(?:\.[0-9]*+)?|\.[0-9]++)(?:[eE][-+]?[0-9]++)?"
# No group here is possessive: before Python 3.11.5 those match what they should not. Each can match in one way only, which
# makes a plain one as fast.
_COMMENT = r"/\*[^*/]*+(?:(?:\*(?!/)|/(?!\*))[^*/]*+)*\*/"  # one that holds no other
_NAMED_PARAMETER = rf"%\({_WORD}\)s(?![{_START}0-9$])"
_SIGN = r"::|[-+*<>=~!@%^&|?:.,;()\[\]{}]|/(?!\*)"


def _quoted(quote: str) -> str:
    return f"{quote}[^{quote}]*+(?:{quote}{quote}[^{quote}]*+)*{quote}(?!{quote})"


def _escaped(quote: str) -> str:
    return rf"{quote}[^{quote}\\]*+(?:(?:\\.|{quote}{quote})[^{quote}\\]*+)*{quote}(?!{quote})"


def _pattern(skipped: str, *alternatives: str) -> re.Pattern[str]:
    # The end of the text is a token, "", so that trailing space is not tried again from each position.
    # Where nothing matches, the rest of the text is garbage and group 1 is None.
    return re.compile(rf"(?:{skipped})*(?:({'|'.join(alternatives)}|\Z)|(?P<garbage>.+))", re.DOTALL)


_POSTGRESQL_TOKENS: Final = (
    rf"{_SPACE}|--[^\n\r]*+",
    rf"(?![eE]'|[uU]&\"){_WORD}",
    _quoted("'"),
    _quoted('"'),
    _COMMENT,
    _NAMED_PARAMETER,
    _NUMBER,
    _SIGN + "|[#`]",
    "[eE]" + _escaped("'"),
    "[uU]&" + _quoted('"'),
    r"\$[0-9]++",
    rf"\$(?P<tag>(?:[{_START}][{_START}0-9]*+)?)\$.*?\$(?P=tag)\$",
)
_MYSQL_TOKENS: Final = (
    # A plain /*! comment counts as its content; one that holds quotes or comments is left to be garbage.
    rf"{_SPACE}|\#[^\n]*+|--(?=[\x00-\x20]|\Z)[^\n]*+|/\*M?!(?=[^'\"`#*/\-]*+\*/)[0-9]*+|\*/(?!\*)",
    _WORD,
    _escaped("'"),
    _escaped('"'),
    _quoted("`"),
    r"/\*(?!M?!).*?\*/",
    _NAMED_PARAMETER,
    _NUMBER,
    "@@|" + _SIGN,
)

_SIGNS: Final = frozenset("-+*/<>=~!@%^&|?:.,;()[]{}#`") | {"::", ""}

# Words that may be functions elsewhere, and are part of the grammar after these.
_GRAMMAR_AFTER: Final[Mapping[str, frozenset[str]]] = {
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

_ENDS: Final = frozenset({"abort", "commit", "end", "rollback"})
_QUERY_HEADS: Final = frozenset({"select", "table", "values", "with"})
_CHANGES: Final = frozenset({"delete", "insert", "merge", "update"})
_LOCK_STRENGTHS: Final = frozenset({"key", "no", "share", "update"})
_TEMPORARY: Final = frozenset({"temp", "temporary"})
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


# ---------------------------------------------------------------- reading


class _Reading:
    """One text cut into tokens; `functions` collects the calls that nobody vouches for."""

    __slots__ = ("dialect", "ends", "functions", "low", "raw")

    def __init__(self, raw: list[str], low: list[str], dialect: _Dialect) -> None:
        self.raw = raw
        self.low = low  # folded to lower case, literals and quoted names too: those keep their quotes
        self.dialect = dialect
        self.functions: set[str] = set()
        self.ends = False

    def statements(self) -> Iterator[Effect]:
        """The effect of each statement between semicolons."""
        low, start = self.low, 0
        if ";" in low:
            for at, sign in enumerate(low):
                if sign == ";":
                    yield self.statement(start, at)
                    start = at + 1
        yield self.statement(start, len(low) - 1)  # the last token is the end

    def statement(self, start: int, stop: int) -> Effect:
        if start == stop:
            return Effect.READ  # truly nothing: the server does nothing
        head = self.low[start]
        if head in _ENDS and "to" not in self.low[start:stop]:  # ROLLBACK TO a savepoint
            self.ends = True
        if head == "(" or head in _QUERY_HEADS:
            return self.preparable(start, stop)
        handler = self.dialect.heads.get(head, Effect.WRITE)
        return handler if isinstance(handler, Effect) else handler(self, start + 1, stop)

    def preparable(self, start: int, stop: int) -> Effect:
        """A statement inside another one: a query, or else a write."""
        return self.query(start, stop) if self.head(start, stop) in _QUERY_HEADS else Effect.WRITE

    def head(self, start: int, stop: int) -> str:
        """The first word behind any parentheses."""
        return next((word for word in self.low[start:stop] if word != "("), "")

    def query(self, start: int, stop: int, *, to_the_end: bool = False) -> Effect:
        """SELECT, VALUES, TABLE, WITH: everything that stands in it, at any depth.

        to_the_end: go on behind a write, for the sake of the functions.
        """
        low, marks, quiet = self.low, self.dialect.marks, self.dialect.quiet
        effect = Effect.READ
        # What stood before each open parenthesis, and whether the list of a WITH goes on after it.
        opened: list[tuple[str, bool]] = []
        listing, closed = False, ""
        for at, token in enumerate(low[start:stop], start):
            mark = marks.get(token)
            if mark is None:
                continue
            found = Effect.READ
            if mark is _Mark.OPEN:
                before = low[at - 1]
                if (before not in quiet or low[at - 2] == ".") and at > start:
                    found = self.call(at - 1, listing, closed)
                opened.append((before, listing))
                listing = False
            elif mark is _Mark.CLOSE:
                if not opened:
                    return Effect.WRITE
                closed, listing = opened.pop()
                if closed.strip('"') == "set_config" and low[at - 2 : at] != [",", "true"]:
                    found = Effect.SESSION  # not surely local to the transaction
            elif isinstance(mark, Effect):
                found = mark
            elif mark is _Mark.WITH:
                listing = listing or at == start or low[at - 1] == "("
            elif mark is _Mark.MAIN:
                listing = False
            elif low[at - 1] == ".":
                continue  # a column may have any name
            elif mark is _Mark.WRITES:
                found = Effect.WRITE
            elif mark is _Mark.INTO:
                found = Effect.CONNECTION if _TEMPORARY & set(low[at + 1 : at + 3]) else Effect.WRITE
            elif low[at + 1] in _LOCK_STRENGTHS or low[at - 1] == "value":  # FOR UPDATE, NEXT VALUE FOR
                found = Effect.WRITE
            if found > effect:
                effect = found
                if effect is Effect.WRITE and not to_the_end:
                    return effect
        return effect if not opened else Effect.WRITE

    def call(self, at: int, listing: bool, closed: str) -> Effect:
        """What `name (` does, the name's last part being at `at`.

        listing: is this in the list of a WITH?  closed: what stood before the parenthesis that closed last.
        """
        low = self.low
        name = self.name(at)
        if name is None:
            return Effect.READ  # a parenthesis after a literal or a parameter calls nothing
        if name == "":
            return Effect.WRITE
        first = at
        while low[first - 1] == "." and first > 1:
            first -= 2
        before = low[first - 1]
        if before in ("as", "::", "into"):
            return Effect.READ  # an alias, a type or a table, with its list
        if first == at and self.no_call(at, before, listing, closed):
            return Effect.READ
        schema = [self.name(part) or self.raw[part] for part in range(first, at, 2)]
        if not schema or schema == [self.dialect.system_schema]:
            effect = self.dialect.functions.get(name)
            if effect is not None:
                return effect
            if name.startswith("pg_stat_get_"):  # some 130 counters of one server
                return Effect.SERVER
        self.functions.add(".".join([*schema, name]))
        return Effect.READ

    def no_call(self, at: int, before: str, listing: bool, closed: str) -> bool:
        """Is the unqualified name at `at`, with a parenthesis behind it, part of the grammar?"""
        low = self.low
        word = low[at]
        if before in _GRAMMAR_AFTER.get(word, ()) or (word == "columns" and before.endswith("'")):
            return True
        if before in ("with", "recursive") or (listing and before == ","):
            return True  # WITH name (columns)
        if before == ")":
            # FROM (...) alias (columns), and neither SELECT DISTINCT ON (...) f() nor a OPERATOR(schema.+) f()
            return closed not in ("on", "operator")
        if before == "ordinality":
            return True
        # FROM table alias (columns)
        return low[at - 2] in ("from", "join") and before not in self.dialect.quiet

    def name(self, at: int) -> str | None:
        """The name at `at` as the server sees it; "" where that is beyond us, None where it is no name."""
        raw = self.raw[at]
        first = raw[:1]
        if first in ('"', "`") and len(raw) > 1:
            inner = raw[1:-1].replace(first * 2, first)
            return raw if set('."`') & set(inner) else inner
        if raw[-1:] == '"':
            return ""  # U&"..." hides its letters
        if raw[-1:] == "'" or not (first == "_" or first.isalpha() or first >= "\x80"):
            return None
        return self.low[at]

    # What the other statements do; `start` is the token after the first word.

    def explain(self, start: int, stop: int) -> Effect:
        low = self.low
        executes = False
        if low[start] == "(" and self.head(start, stop) not in _QUERY_HEADS:
            end = self.closing(start, stop)
            executes = self.explain_executes(start + 1, end)
            start = end + 1
        else:
            while low[start] in ("analyze", "analyse", "verbose"):
                executes = executes or low[start] != "verbose"
                start += 1
        if executes:
            return self.preparable(start, stop)
        head = self.head(start, stop)
        if head not in _QUERY_HEADS and head not in _CHANGES:
            return Effect.WRITE
        self.query(start, stop, to_the_end=True)  # planning may run functions, so those count; nothing else does
        return Effect.READ

    def explain_executes(self, start: int, stop: int) -> bool:
        """Does the option list say ANALYZE, or something that might?"""
        low = self.low
        while start < stop:
            option, value = low[start : start + 2]
            if option in ("analyze", "analyse"):
                if value not in _FALSE:
                    return True
            elif option not in _EXPLAIN_OPTIONS:
                return True
            start += 2 if value == "," else 3
        return False

    def copy(self, start: int, stop: int) -> Effect:
        low = self.low
        if low[start] == "(":
            end = self.closing(start, stop)
            effect, start = self.preparable(start + 1, end), end + 1
        else:
            effect = Effect.READ
            while start < stop and low[start] not in ("from", "to"):
                start += 1
        return effect if low[start : start + 2] == ["to", "stdout"] else Effect.WRITE

    def closing(self, start: int, stop: int) -> int:
        """Where the parenthesis that opens at `start` is closed; `stop` if nowhere."""
        depth = 0
        for at in range(start, stop):
            depth += (self.low[at] == "(") - (self.low[at] == ")")
            if not depth:
                return at
        return stop

    def declare(self, start: int, stop: int) -> Effect:
        return max(Effect.CONNECTION, self.preparable(self.find("for", start, stop) + 1, stop))

    def prepare(self, start: int, stop: int) -> Effect:
        if self.low[start] == "transaction":
            self.ends = True
            return Effect.TRANSACTION
        return max(Effect.CONNECTION, self.preparable(self.find("as", start, stop) + 1, stop))

    def find(self, word: str, start: int, stop: int) -> int:
        """Where `word` first stands outside parentheses; `stop` if nowhere."""
        depth = 0
        for at in range(start, stop):
            here = self.low[at]
            if here == word and not depth:
                return at
            depth += (here == "(") - (here == ")")
        return stop

    def set(self, start: int, _stop: int) -> Effect:
        local = self.low[start] in ("constraints", "local", "transaction")
        return Effect.TRANSACTION if local else Effect.SESSION

    def finish(self, start: int, _stop: int) -> Effect:
        return Effect.WRITE if self.low[start] == "prepared" else Effect.TRANSACTION

    def lock(self, start: int, stop: int) -> Effect:
        # A reader accepts the next two modes as well, and they protect nothing there.
        mode = self.low[start:stop]
        mode = mode[:-1] if mode[-1:] == ["nowait"] else mode
        return Effect.TRANSACTION if mode[-4:] == ["in", "access", "share", "mode"] else Effect.WRITE

    def create(self, start: int, stop: int) -> Effect:
        low = self.low
        while low[start] in ("or", "replace", "local", "global"):
            start += 1
        if low[start] not in _TEMPORARY:
            return Effect.WRITE
        query = self.find("as", start, stop) + 1
        return Effect.CONNECTION if query > stop else max(Effect.CONNECTION, self.preparable(query, stop))

    def alter(self, start: int, _stop: int) -> Effect:
        return Effect.SERVER if self.low[start] == "system" else Effect.WRITE


_POSTGRESQL_HEADS: Final[Mapping[str, _Head]] = {
    "abort": Effect.TRANSACTION,
    "alter": _Reading.alter,
    "begin": Effect.TRANSACTION,
    "checkpoint": Effect.SERVER,  # a reader accepts it too, and makes a restart point
    "close": Effect.CONNECTION,
    "commit": _Reading.finish,
    "copy": _Reading.copy,
    "create": _Reading.create,
    "deallocate": Effect.CONNECTION,
    "declare": _Reading.declare,
    "discard": Effect.SESSION,
    "end": Effect.TRANSACTION,
    "explain": _Reading.explain,
    "fetch": Effect.CONNECTION,
    "listen": Effect.CONNECTION,
    "load": Effect.SESSION,
    "lock": _Reading.lock,
    "move": Effect.CONNECTION,
    "prepare": _Reading.prepare,
    "release": Effect.TRANSACTION,
    "reset": Effect.SESSION,
    "rollback": _Reading.finish,
    "savepoint": Effect.TRANSACTION,
    "set": _Reading.set,
    "show": Effect.SERVER,
    "start": Effect.TRANSACTION,
    "unlisten": Effect.CONNECTION,
    # Everything else is a write: EXECUTE too, for what was prepared may write.
}
_MYSQL_HEADS: Final[Mapping[str, _Head]] = {
    "begin": Effect.TRANSACTION,
    "commit": Effect.TRANSACTION,
    "desc": Effect.READ,
    "describe": Effect.READ,
    "rollback": Effect.TRANSACTION,
    "savepoint": Effect.TRANSACTION,
    "start": Effect.TRANSACTION,
}

_MARKS: Final[Mapping[str, _Mark | Effect]] = {
    "(": _Mark.OPEN,
    ")": _Mark.CLOSE,
    "for": _Mark.FOR,
    "into": _Mark.INTO,
    "with": _Mark.WITH,
    **dict.fromkeys(_CHANGES, _Mark.WRITES),
    **dict.fromkeys(("select", "values", "table", "union", "intersect", "except"), _Mark.MAIN),
    **dict.fromkeys(("order", "limit", "offset", "fetch"), _Mark.MAIN),
}


def _dialect(
    pattern: re.Pattern[str],
    heads: Mapping[str, _Head],
    marks: Mapping[str, _Mark | Effect],
    functions: Mapping[Effect, frozenset[str]],
    *,
    nested_comments: bool = False,
    backslash_doubt: bool = False,
    system_schema: str = "",
) -> _Dialect:
    return _Dialect(
        pattern=pattern,
        nested_comments=nested_comments,
        backslash_doubt=backslash_doubt,
        heads=heads,
        marks={**_MARKS, **marks},
        quiet=known_functions.POSTGRESQL_KEYWORDS | _SIGNS | functions[Effect.READ],
        functions={name: effect for effect, names in functions.items() for name in names},
        system_schema=system_schema,
    )


# Made at first use: compiling the patterns is most of what importing this module would cost.
@cache
def _postgresql() -> _Dialect:
    return _dialect(
        _pattern(*_POSTGRESQL_TOKENS),
        _POSTGRESQL_HEADS,
        {
            **dict.fromkeys(known_functions.POSTGRESQL_SERVER_RELATIONS, Effect.SERVER),
            **dict.fromkeys(known_functions.POSTGRESQL_CONNECTION_RELATIONS, Effect.CONNECTION),
        },
        {
            Effect.READ: known_functions.POSTGRESQL_READ,
            Effect.SERVER: known_functions.POSTGRESQL_SERVER,
            Effect.TRANSACTION: known_functions.POSTGRESQL_TRANSACTION,
            Effect.SESSION: known_functions.POSTGRESQL_SESSION,
            Effect.CONNECTION: known_functions.POSTGRESQL_CONNECTION,
            Effect.WRITE: known_functions.POSTGRESQL_WRITE,
        },
        nested_comments=True,
        backslash_doubt=True,
        system_schema="pg_catalog",
    )


@cache
def _mysql() -> _Dialect:
    return _dialect(
        _pattern(*_MYSQL_TOKENS),
        _MYSQL_HEADS,
        {"lock": _Mark.WRITES, "procedure": _Mark.WRITES, "@": Effect.CONNECTION, "@@": Effect.CONNECTION},
        {
            Effect.READ: known_functions.MYSQL_READ,
            Effect.SERVER: known_functions.MYSQL_SERVER,
            Effect.CONNECTION: known_functions.MYSQL_CONNECTION,
            Effect.WRITE: known_functions.MYSQL_WRITE,
        },
    )


_DIALECTS: Final[Mapping[str, Callable[[], _Dialect]]] = {"mariadb": _mysql, "mysql": _mysql, "postgresql": _postgresql}


# ---------------------------------------------------------------- one text

_CACHE_SIZE: Final = 4096
_CACHED_LENGTH: Final = 16_384  # characters: longer texts are generated once, and would make the cache a leak
_ASCII_LOWER: Final = {upper: upper + 32 for upper in range(ord("A"), ord("Z") + 1)}
_HINT: Final = re.compile(r"/\*\s*@\s*(writer|reader)\s*\*/")
_COMMENT_EDGE: Final = re.compile(r"/\*|\*/")


def _judge(sql: str, dialect_name: str) -> Verdict:
    make = _DIALECTS.get(dialect_name)
    if make is None:
        raise ValueError(f"unknown SQL dialect {dialect_name!r}: known are {', '.join(_DIALECTS)}")
    dialect = make()
    raw: list[str | Any] = [token[1] for token in dialect.pattern.finditer(sql)]
    if None in raw[-2:] and dialect.nested_comments and "/*" in sql:
        raw = _across_nested_comments(sql, dialect.pattern)
    if None in raw[-2:] or (dialect.backslash_doubt and _doubtful(sql, raw)):
        return Verdict(Effect.WRITE, Effect.WRITE, ends=True)
    hint: Hint | None = None
    if "/*" in sql:
        raw, hint = _without_comments(raw)
    low = list(map(str.lower if sql.isascii() else _ascii_lower, raw))
    while len(low) > 1 and low[-2] == "":  # the end may have been matched twice
        low.pop()
    reading = _Reading(raw, low, dialect)
    known = max(reading.statements())
    if known is Effect.WRITE or not reading.functions:
        return Verdict(known, known, hint=hint, ends=reading.ends)
    return Verdict(Effect.WRITE, known, frozenset(reading.functions), hint, reading.ends)


_cached = lru_cache(maxsize=_CACHE_SIZE)(_judge)


def _ascii_lower(token: str) -> str:
    return token.translate(_ASCII_LOWER)


def _without_comments(raw: list[str]) -> tuple[list[str], Hint | None]:
    """The tokens that are no comments, and what the comments ask for."""
    asked = {match[1] for token in raw if token[:2] == "/*" and (match := _HINT.fullmatch(token))}
    kept = [token for token in raw if token[:2] != "/*"]
    return kept, "writer" if "writer" in asked else "reader" if asked else None


def _across_nested_comments(sql: str, pattern: re.Pattern[str]) -> list[str | Any]:
    """The tokens of a text with comments in comments.

    No pattern can match those, it finds garbage: the lexer starts again behind each.
    """
    raw: list[str | Any] = []
    at = 0
    while at >= 0:
        for token in pattern.finditer(sql, at):
            begin = token.start("garbage")
            if begin >= 0 and sql.startswith("/*", begin):
                at = _comment_end(sql, begin + 2)
                break
            raw.append(token[1])
        else:
            return raw
    return [*raw, None]  # never closed: garbage


def _comment_end(sql: str, at: int) -> int:
    """The position behind the comment whose "/*" ends at `at`; -1 if it is never closed."""
    depth = 1
    for edge in _COMMENT_EDGE.finditer(sql, at):
        depth += 1 if edge[0] == "/*" else -1
        if not depth:
            return edge.end()
    return -1


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
