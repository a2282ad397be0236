"""What a statement does, and what is known about one text: the answers of the classifier."""

from __future__ import annotations

import enum
from collections.abc import Container
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

Hint: TypeAlias = Literal["writer", "reader"]


class Effect(enum.IntEnum):
    """What a statement does. If it has several effects, the strongest counts: the one that is last in this list."""

    READ = 0  #: reads data that every instance has
    SERVER = 1  #: asks, or changes, the one server that it runs on
    TRANSACTION = 2  #: begins, ends or changes a transaction
    SESSION = 3  #: changes settings that outlive the transaction
    #: needs this very connection, now or later (cursors, temporary tables, LISTEN)
    CONNECTION = 4
    WRITE = 5  #: writes, locks, or might


class Recall(enum.Enum):
    """What a statement asks of its connection's past."""

    #: the results of the statements before it: FOUND_ROWS(), SHOW WARNINGS
    STATEMENT = enum.auto()
    VARIABLE = enum.auto()  #: the value of a user's variable


@dataclass(frozen=True, slots=True)
class Analysis:
    """What is known about one text.

    effect: the safe answer, in which unknown functions count as writes.
    effect_if_functions_pure: the answer if every unknown function were harmless; equal to `effect` if nothing is undecidable.
    functions: the unknown functions, in lower case unless they are quoted (on MySQL always), as `schema.name` if the text
        names a schema. Empty if `effect_if_functions_pure` equals `effect`. A quoted name that contains a dot or a quote keeps
        its quotes.
    may_end_transaction: it may end a transaction by itself: COMMIT, ROLLBACK, an implicit commit, or a text that cannot be read.
    may_unset_read_only: it may remove what keeps a read-only transaction, or its connection, from writing: the access mode,
        or the transaction itself. If the effect is WRITE, this means nothing.
    takes_named_lock: it takes a lock by name; its effect is CONNECTION. The lock has a meaning only on the writer, but any
        server grants it.
    recalls: what it asks of the connection's past, if nothing else makes it more than a read; its effect is CONNECTION.
    traceless: it reads, writes or locks rows, and leaves nothing else on its connection: no lock by name, setting or variable.
    in_doubt: its effect might be weaker under a setting of the connection that the text does not show
        (`analysis.dialect_for_setting`).
    hint: what a comment `/*@writer*/` or `/*@reader*/` asks for; it changes nothing else here. If the text
        has both, it is "writer".

    Two analyses are equal if `effect`, `effect_if_functions_pure`, `functions`, `hint` and `may_end_transaction` are equal.
    """

    effect: Effect
    effect_if_functions_pure: Effect
    functions: frozenset[str] = frozenset()
    hint: Hint | None = None
    may_end_transaction: bool = False
    traceless: bool = field(default=False, compare=False)
    in_doubt: bool = field(default=False, compare=False)
    recalls: Recall | None = field(default=None, compare=False)
    may_unset_read_only: bool = field(default=False, compare=False)
    takes_named_lock: bool = field(default=False, compare=False)

    def effect_given(self, read_only_functions: Container[str]) -> Effect:
        """Return the effect if these functions are known to be harmless.

        A name must be spelled as in the text. `f` allows `f()` and not `app.f()`; `app.f` allows `app.f()` and not `f()`. The
        same name in another schema may be another function. To allow both, name both.
        """
        if all(name in read_only_functions for name in self.functions):
            return self.effect_if_functions_pure
        return self.effect
