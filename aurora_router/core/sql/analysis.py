"""The effect of a statement, read from its text alone, and cached.

The text is cut up into tokens (`lexer`), and those are read (`queries`, and the dialect's module). A statement is a write unless
it is known to be a read: a wrong guess that way costs a detour, never a wrong answer. How a server cuts a text up may depend on
a setting or on its version. Such a text counts as the strongest of its possible effects.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from sys import getsizeof
from typing import Final

from aurora_router.core.sql import lexer
from aurora_router.core.sql.dialects import mysql, postgresql
from aurora_router.core.sql.effects import Analysis, Effect, Hint, Recall
from aurora_router.core.sql.queries import Dialect, StatementReader

__all__ = ["Analysis", "Effect", "Hint", "Recall", "analyze", "classify", "dialect_for_setting"]

_UNREADABLE: Final = Analysis(Effect.WRITE, Effect.WRITE, may_end_transaction=True)
_DIALECTS: Final[Mapping[str, Callable[[], Dialect]]] = {
    **{"mariadb" + known: partial(mysql.mariadb, known) for known in mysql.MODES},
    **{"mysql" + known: partial(mysql.mysql, known) for known in mysql.MODES},
    **{"postgresql" + known: partial(postgresql.dialect, known) for known in postgresql.MODES},
}
_MODE: Final = {"mariadb": mysql.mode, "mysql": mysql.mode, "postgresql": postgresql.mode}
_NOT_KNOWN: Final = frozenset({*_MODE, *(in_doubt + mysql.mode(None) for in_doubt in ("mariadb", "mysql"))})


def analyze(sql: str, dialect: str = "postgresql") -> Analysis:
    """Analyze a text; the analyses of the texts used last are cached.

    Raises ValueError for an unknown dialect, and nothing else, whatever the text is.
    """
    return _cache.recent.get((sql, dialect)) or _cache.recall(sql, dialect)


def classify(sql: str, dialect: str = "postgresql", *, read_only_functions: Iterable[str] = ()) -> Effect:
    """Return the effect of a statement, or the strongest effect of several statements in one text.

    sql: the text.
    dialect: "postgresql", "mysql" or "mariadb", or one of them with what is known of a connection's setting (see
        `dialect_for_setting`).
    read_only_functions: functions that only read, spelled as the statement calls them; see `Analysis.effect_given`.

    Raises ValueError for an unknown dialect, and nothing else, whatever the text is.
    """
    return analyze(sql, dialect).effect_given(frozenset(read_only_functions))


def dialect_for_setting(dialect: str, setting: str | None) -> str:
    """Return the dialect of a connection with this setting, which tells what a backslash before a quote means.

    Without the setting, a text with such a backslash counts as the strongest of its possible effects. Its analysis is then
    `in_doubt`.

    dialect: "postgresql", "mysql" or "mariadb".
    setting: the server's `standard_conforming_strings` (PostgreSQL) or `@@sql_mode`. None: `@@sql_mode` is only known to lack
        NO_BACKSLASH_ESCAPES, so a text with backslashes in "..." may still be in doubt. PostgreSQL's setting is unknown.
    """
    return dialect + _MODE[dialect](setting)


def _analyze(sql: str, dialect_name: str) -> Analysis:
    make = _DIALECTS.get(dialect_name)
    if make is None:
        raise ValueError(f"unknown SQL dialect: known are {', '.join(name for name in _DIALECTS if ':' not in name)}")
    dialect = make()
    cuts = dialect.tokenizations(sql)
    if len(cuts) == 1:
        return _read(sql, cuts[0], dialect)
    found = _strongest([_read(sql, raw, dialect) for raw in cuts]) if cuts else _UNREADABLE
    in_doubt = found.effect is not Effect.READ and dialect_name in _NOT_KNOWN and ("\\'" in sql or '\\"' in sql)
    return replace(found, in_doubt=True) if in_doubt else found


class Cache:
    """Analyses of the texts used last. The bytes of all texts together are bounded, not their number or length.

    There are two generations. A text that is used enters the younger one, `recent`. When `recent` is full, it becomes the
    elder one. The former elder one is dropped, with all texts that were not used since. So a hit is one lookup in a dictionary,
    without a lock. Threads that meet while a generation ends may lose some analyses, which are made again.

    analyze: analyzes a text in a dialect.
    size: bytes of both generations together. A text that would fill more than half a generation is not kept.
    """

    def __init__(self, analyze: Callable[[str, str], Analysis], size: int) -> None:
        self.recent: dict[tuple[str, str], Analysis] = {}
        self._elder = self.recent
        self._analyze = analyze
        self._generation = size // 2
        self._room = self._generation

    def recall(self, sql: str, dialect: str) -> Analysis:
        """Return the analysis of a text that is not in `recent`."""
        key = (sql, dialect)
        found = self._elder.get(key) or self._analyze(sql, dialect)
        size = getsizeof(sql) + _ENTRY
        if size <= self._generation // 2:
            if size > self._room:
                self._elder, self.recent, self._room = self.recent, {}, self._generation
            self._room -= size
            self.recent[key] = found
        return found


_ENTRY: Final = 400  # about the bytes of an analysis, its key and its entry
_cache: Final = Cache(_analyze, 32 * 2**20)


def _read(sql: str, raw: list[str], dialect: Dialect) -> Analysis:
    """What is known about a text that is cut up in this way."""
    hint: Hint | None = None
    if "/*" in sql:
        raw, hint = lexer.without_comments(raw)
    reading = StatementReader(raw, lexer.folded(sql, raw), dialect)
    known, recalls = max(reading.statements()), reading.recalls
    if recalls is not None:
        recalls = recalls if known is Effect.READ else None
        known = max(known, Effect.CONNECTION)
    if known is Effect.WRITE or not reading.functions:
        traceless = not reading.leaves_traces and not reading.functions
        effect, functions = known, frozenset[str]()
    else:
        traceless, effect, functions = False, Effect.WRITE, frozenset(reading.functions)
    flags = {
        "may_end_transaction": reading.may_end_transaction,
        "may_unset_read_only": reading.may_unset_read_only,
        "takes_named_lock": reading.takes_named_lock,
    }
    return Analysis(effect, known, functions, hint, recalls=recalls, traceless=traceless, **flags)


def _strongest(analyses: list[Analysis]) -> Analysis:
    """The analysis that holds whichever of these is right."""
    effect = max(each.effect for each in analyses)
    known = max(each.effect_if_functions_pure for each in analyses)
    functions = frozenset[str]() if known is effect else frozenset[str]().union(*(each.functions for each in analyses))
    hints = {each.hint for each in analyses}
    hint: Hint | None = "writer" if "writer" in hints else hints.pop() if len(hints) == 1 else None
    recalled = {each.recalls for each in analyses if each.effect is not Effect.READ}  # a read may stay with the connection, too
    recalls = recalled.pop() if len(recalled) == 1 else None
    flags = {
        what: any(getattr(each, what) for each in analyses)
        for what in ("may_end_transaction", "may_unset_read_only", "takes_named_lock")
    }
    traceless = all(each.traceless for each in analyses)
    return Analysis(effect, known, functions, hint, recalls=recalls, traceless=traceless, **flags)
