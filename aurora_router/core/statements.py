"""The effect of a statement, read from its text alone, and remembered.

The text is cut up into tokens (`lexer`), and those are read (`queries`, and the dialect's module). Whatever is not known to be a
read is a write: a wrong guess that way costs a detour, never a wrong answer. A text that a server may cut up in more than one
way, for it depends on a setting or on its version, does the strongest of what it may do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache, partial
from typing import Final

from aurora_router.core import lexer
from aurora_router.core.dialects import mysql, postgresql
from aurora_router.core.effects import Effect, Hint, Verdict
from aurora_router.core.queries import Dialect, Reading

__all__ = ["Effect", "Hint", "Verdict", "classify", "in_mode", "verdict"]

_CACHE_SIZE: Final = 4096
_CACHED_LENGTH: Final = 16_384  # characters: longer texts are generated once, and would make the cache a leak
_UNREADABLE: Final = Verdict(Effect.WRITE, Effect.WRITE, ends=True)
_DIALECTS: Final[Mapping[str, Callable[[], Dialect]]] = {
    **{"mariadb" + known: partial(mysql.mariadb, known) for known in mysql.MODES},
    **{"mysql" + known: partial(mysql.mysql, known) for known in mysql.MODES},
    "postgresql": postgresql.dialect,
}


def verdict(sql: str, dialect: str = "postgresql") -> Verdict:
    """What is known about this text; verdicts of ordinary texts are cached.

    Raises ValueError for an unknown dialect, and nothing else whatever the text.
    """
    if len(sql) > _CACHED_LENGTH:
        return _judge(sql, dialect)
    return _cached(sql, dialect)


def classify(sql: str, dialect: str = "postgresql", *, read_only_functions: Iterable[str] = ()) -> Effect:
    """The effect of a statement; of several in one text, the strongest.

    dialect: "postgresql", "mysql" or "mariadb"; the latter two with what is known of `sql_mode`, as `in_mode` says it.
    read_only_functions: functions that only read, spelled as the statement calls them; see
        `Verdict.effect_given`.
    Raises ValueError for an unknown dialect, and nothing else whatever the text.
    """
    return verdict(sql, dialect).effect_given(frozenset(read_only_functions))


def in_mode(dialect: str, sql_mode: str) -> str:
    """The dialect of connections of which `@@sql_mode` is known: texts with backslashes before quotes have one meaning there.

    Without that, such a text does the strongest of what it may do in any mode. dialect: "mysql" or "mariadb".
    """
    return dialect + mysql.mode(sql_mode)


def _judge(sql: str, dialect_name: str) -> Verdict:
    make = _DIALECTS.get(dialect_name)
    if make is None:
        raise ValueError(
            f"unknown SQL dialect {dialect_name!r}: known are {', '.join(name for name in _DIALECTS if ':' not in name)}"
        )
    dialect = make()
    cuts = dialect.cut(sql)
    if len(cuts) == 1:
        return _read(sql, cuts[0], dialect)
    return _strongest([_read(sql, raw, dialect) for raw in cuts]) if cuts else _UNREADABLE


_cached = lru_cache(maxsize=_CACHE_SIZE)(_judge)


def _read(sql: str, raw: list[str], dialect: Dialect) -> Verdict:
    """What is known about a text that is cut up in this way."""
    hint: Hint | None = None
    if "/*" in sql:
        raw, hint = lexer.without_comments(raw)
    reading = Reading(raw, lexer.folded(sql, raw), dialect)
    known = max(reading.statements())
    if known is Effect.WRITE or not reading.functions:
        return Verdict(known, known, hint=hint, ends=reading.ends)
    return Verdict(Effect.WRITE, known, frozenset(reading.functions), hint, reading.ends)


def _strongest(verdicts: list[Verdict]) -> Verdict:
    """What holds whichever of these is the case."""
    effect = max(each.effect for each in verdicts)
    known = max(each.known for each in verdicts)
    functions = frozenset[str]() if known is effect else frozenset[str]().union(*(each.functions for each in verdicts))
    hints = {each.hint for each in verdicts}
    hint: Hint | None = "writer" if "writer" in hints else hints.pop() if len(hints) == 1 else None
    return Verdict(effect, known, functions, hint, any(each.ends for each in verdicts))
