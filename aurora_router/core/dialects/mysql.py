"""MySQL and MariaDB: their tokens, their statements that are no queries, and what is particular in their queries."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Final

from aurora_router.core import lexer
from aurora_router.core.dialects import mysql_functions as words
from aurora_router.core.dialects import postgresql_functions
from aurora_router.core.effects import Effect
from aurora_router.core.queries import MARKS, TEMPORARY, Dialect, Head, Mark, Reading

_TOKENS: Final = (
    # A plain /*! comment counts as its content; one that holds quotes or comments is left to be garbage.
    rf"{lexer.SPACE}|\#[^\n]*+|--(?=[\x00-\x20]|\Z)[^\n]*+|/\*M?!(?=[^'\"`#*/\-]*+\*/)[0-9]*+|\*/(?!\*)",
    lexer.WORD,
    lexer.escaped("'"),
    lexer.escaped('"'),
    lexer.quoted("`"),
    r"/\*(?!M?!).*?\*/",
    lexer.NAMED_PARAMETER,
    lexer.NUMBER,
    "@@|" + lexer.SIGN,
)


@dataclass(frozen=True, slots=True)
class _Cut:
    """How the server cuts a text up; garbage in no way."""

    found_by: re.Pattern[str]

    def __call__(self, sql: str) -> tuple[list[str], ...]:
        raw = lexer.tokens(sql, self.found_by)
        return () if None in raw[-2:] else (raw,)


def _finish(reading: Reading, start: int, stop: int) -> Effect:
    if "to" not in reading.low[start:stop]:  # ROLLBACK TO a savepoint
        reading.ends = True
    return Effect.TRANSACTION


_HEADS: Final[Mapping[str, Head]] = {
    "begin": Effect.TRANSACTION,
    "commit": _finish,
    "desc": Effect.READ,
    "describe": Effect.READ,
    "rollback": _finish,
    "savepoint": Effect.TRANSACTION,
    "start": Effect.TRANSACTION,
}
_EFFECTS: Final = {
    Effect.READ: words.READ,
    Effect.SERVER: words.SERVER,
    Effect.CONNECTION: words.CONNECTION,
    Effect.WRITE: words.WRITE,
}


@cache
def dialect() -> Dialect:
    """MySQL and MariaDB."""
    return Dialect(
        cut=_Cut(lexer.pattern(*_TOKENS)),
        heads=_HEADS,
        marks={**MARKS, **dict.fromkeys(("lock", "procedure"), Mark.WRITES), "@": Effect.CONNECTION, "@@": Effect.CONNECTION},
        quiet=postgresql_functions.KEYWORDS | lexer.SIGNS | words.READ,
        grammar={},
        functions={name: effect for effect, names in _EFFECTS.items() for name in names},
        looks={},
        targets=TEMPORARY,
    )
