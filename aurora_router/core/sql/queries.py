"""The effect of a query: SELECT, VALUES, TABLE or WITH, with everything in it, at any depth.

The first word decides, with the words, calls and parentheses behind it. Nothing is ever searched in raw text, so a keyword in a
literal does not count. The particulars of a dialect are in its `Dialect`. Functions of the dialect's module decide on the
statements that are no queries.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Final, TypeAlias

from aurora_router.core.sql.effects import Effect, Recall


class Mark(enum.Enum):
    """Words and signs inside a query that need a look."""

    OPEN = enum.auto()
    CLOSE = enum.auto()
    WRITES = enum.auto()
    FOR = enum.auto()
    INTO = enum.auto()
    WITH = enum.auto()
    MAIN = enum.auto()  # ends the list of a WITH
    VARIABLE = enum.auto()
    USER_VARIABLE = enum.auto()
    COLON = enum.auto()
    SCHEMA = enum.auto()


#: The effect of a statement with this first word: always the same one, or a function of its tokens. The function takes the
#: `Reading`, the index of the first token behind that word, and the index behind the last token.
StatementHandler: TypeAlias = "Effect | Callable[[StatementReader, int, int], Effect]"


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Dialect:
    """All that there is to know about one SQL dialect.

    tokenizations: every way in which a server may cut a text up into tokens; none if the text cannot be tokenized.
    statement_handlers: effects by a statement's first word.
    marks: what to look at in a query, or the effect of a word alone.
    non_calls: the words and signs that may stand before "(" without a call that matters.
    contextual_non_calls: the same for words whose place decides, each with a function that looks at the place.
    functions: effects of the built-in functions.
    prefixes: the beginnings of the names of more functions. These functions ask one server.
    unquoted: functions that are part of the grammar, so that such a name in quotes is a user's function.
    argument_checks: for each function whose arguments matter, a function that returns the effect. It gets the index of the
        closing parenthesis.
    recalled: functions, system variables and relations of `schemas` about the statements before.
    locks: functions that take a lock by name, and are no writes.
    schemas: the server's own schemas, with the effects of their relations. A relation that is not listed asks one server.
    server_columns: if a text names one of these, all relations of `schemas` in it ask one server.
    server_relations: relations of `schemas` that have such columns. If a text selects all columns, they ask one server.
    star_follows: the tokens before a `*` that selects all columns.
    variables: system variables of a server. Its connections have no values of their own for them.
    transient: functions that write, and whose work ends with the transaction or belongs to no connection.
    targets: words behind INTO that begin a target which stays with the connection.
    default_handler: for a first word that `statement_handlers` lacks.
    system_schema: where the built-in functions live.
    folds_quoted: the case of a quoted function name does not matter.
    """

    tokenizations: Callable[[str], Sequence[list[str]]]
    statement_handlers: Mapping[str, StatementHandler]
    marks: Mapping[str, Mark | Effect]
    non_calls: frozenset[str]
    contextual_non_calls: Mapping[str, Callable[[StatementReader, int], bool]]
    functions: Mapping[str, Effect]
    prefixes: tuple[str, ...] = ()
    unquoted: frozenset[str] = frozenset()
    argument_checks: Mapping[str, Callable[[StatementReader, int], Effect]]
    recalled: frozenset[str] = frozenset()
    locks: frozenset[str] = frozenset()
    schemas: Mapping[str, Mapping[str, Effect]] = field(default_factory=dict)
    server_columns: frozenset[str] = frozenset()
    server_relations: frozenset[str] = frozenset()
    star_follows: frozenset[str] = frozenset()
    variables: frozenset[str] = frozenset()
    transient: frozenset[str] = frozenset()
    targets: frozenset[str]
    default_handler: StatementHandler = Effect.WRITE
    system_schema: str = ""
    folds_quoted: bool = False


def after(*words: str) -> Callable[[StatementReader, int], bool]:
    """Return a test whether a word is part of the grammar, because it follows one of these words."""
    return lambda reading, at: reading.low[at - 1] in words


def after_literal(reading: StatementReader, at: int) -> bool:
    """Return whether a word follows a literal or a parameter. Nothing can be called there, so it is part of the grammar."""
    return reading.is_literal(at - 1)


QUERY_HEADS: Final = frozenset({"select", "table", "values", "with"})
CHANGES: Final = frozenset({"delete", "insert", "merge", "update"})
_CHANGES_WORDS: Final = frozenset({"conflict", "insert", "set"})  # stand before "(" in a change, and call nothing
TEMPORARY: Final = frozenset({"temp", "temporary"})
MARKS: Final[Mapping[str, Mark | Effect]] = {
    "(": Mark.OPEN,
    ")": Mark.CLOSE,
    "for": Mark.FOR,
    "into": Mark.INTO,
    "with": Mark.WITH,
    **dict.fromkeys(CHANGES, Mark.WRITES),
    **dict.fromkeys(("select", "values", "table", "union", "intersect", "except"), Mark.MAIN),
    **dict.fromkeys(("order", "limit", "offset", "fetch"), Mark.MAIN),
}

_LOCK_STRENGTHS: Final = frozenset({"key", "no", "share", "update"})


class StatementReader:
    """One text cut into tokens.

    functions: the called functions that are not known to be harmless.
    recalls: what the text asks of its connection's past.
    may_end_transaction, may_unset_read_only, takes_named_lock: as in an `Analysis`.
    leaves_traces: whether it leaves anything but rows on its connection.
    """

    __slots__ = (
        "_selects_all",
        "_words",
        "dialect",
        "functions",
        "leaves_traces",
        "low",
        "may_end_transaction",
        "may_unset_read_only",
        "raw",
        "recalls",
        "takes_named_lock",
    )

    def __init__(self, raw: list[str], low: list[str], dialect: Dialect) -> None:
        self.raw = raw
        # Literals and quoted names are folded to lower case, too, and keep their quotes.
        self.low = low
        self.dialect = dialect
        self.functions: set[str] = set()
        self.may_end_transaction = self.may_unset_read_only = self.takes_named_lock = self.leaves_traces = False
        self.recalls: Recall | None = None
        self._words: frozenset[str] | None = None
        self._selects_all: bool | None = None

    def statements(self) -> Iterator[Effect]:
        """Yield the effect of each statement between semicolons."""
        low, start = self.low, 0
        if ";" in low:
            for at, sign in enumerate(low):
                if sign == ";":
                    yield self.statement(start, at)
                    start = at + 1
        yield self.statement(start, len(low) - 1)  # the last token is the end

    def statement(self, start: int, stop: int) -> Effect:
        if start == stop:
            return Effect.READ  # the server does nothing
        head = self.low[start]
        if head == "(" or head in QUERY_HEADS:
            return self.preparable(start, stop)
        if head in CHANGES or head == "replace":
            self.query(start, stop)  # it collects the functions
            self.functions -= _CHANGES_WORDS
        else:
            self.leaves_traces = True
        handler = self.dialect.statement_handlers.get(head, self.dialect.default_handler)
        return handler if isinstance(handler, Effect) else handler(self, start + 1, stop)

    def preparable(self, start: int, stop: int) -> Effect:
        """Return the effect of a statement inside another one: a query's, or else WRITE."""
        if self.head(start, stop) in QUERY_HEADS:
            return self.query(start, stop)
        self.leaves_traces = True
        return Effect.WRITE

    def head(self, start: int, stop: int) -> str:
        """Return the first word behind any opening parentheses."""
        return next((word for word in self.low[start:stop] if word != "("), "")

    def query(self, start: int, stop: int) -> Effect:
        """Return the effect of SELECT, VALUES, TABLE or WITH, with everything in it, at any depth.

        A write does not end the search, because the functions and traces behind it count as well.
        """
        low, marks, non_calls, checks = self.low, self.dialect.marks, self.dialect.non_calls, self.dialect.argument_checks
        effect = Effect.READ
        # For each open parenthesis: the token before it, and whether the list of a WITH goes on after it.
        opened: list[tuple[str, bool]] = []
        listing, closed = False, ""
        for at, token in enumerate(low[start:stop], start):
            mark = marks.get(token)
            if mark is None:
                continue
            found = Effect.READ
            if mark is Mark.OPEN:
                before = low[at - 1]
                if (before not in non_calls or low[at - 2] == ".") and at > start:
                    found = self.call(at - 1, listing, closed)
                    if found is Effect.WRITE and low[at - 1].strip('`"') not in self.dialect.transient:
                        self.leaves_traces = True
                opened.append((before, listing))
                listing = False
            elif mark is Mark.CLOSE:
                if not opened:
                    return Effect.WRITE
                closed, listing = opened.pop()
                if closed in checks:
                    found = checks[closed](self, at)
            elif isinstance(mark, Effect):
                found = mark
            elif mark is Mark.WITH:
                listing = listing or at == start or low[at - 1] == "("
            elif mark is Mark.MAIN:
                listing = False
            elif mark is Mark.COLON:
                # Only a user's variable is assigned to in a query, and its name may have dots.
                found = Effect.CONNECTION if low[at + 1] == "=" else Effect.READ
            elif low[at - 1] == ".":
                continue  # a column may have any name
            elif mark is Mark.WRITES:
                found = Effect.READ if low[at + 1] == "(" and token in non_calls else Effect.WRITE  # the function INSERT()
            elif mark is Mark.INTO:
                found = Effect.WRITE if self.dialect.targets.isdisjoint(low[at + 1 : at + 3]) else Effect.CONNECTION
            elif mark is Mark.VARIABLE:
                found = self.variable(at + 1)
            elif mark is Mark.USER_VARIABLE:
                found = self.recall(Recall.VARIABLE)
            elif mark is Mark.SCHEMA:
                found = self.relation(at)
            elif low[at + 1] in _LOCK_STRENGTHS:  # FOR UPDATE
                found = Effect.WRITE
            elif low[at - 1] == "value":  # of a sequence
                found = Effect.CONNECTION if low[at - 2] == "previous" else Effect.WRITE
            if found > effect:
                effect = found
            if found is Effect.SESSION or found is Effect.CONNECTION:
                self.leaves_traces = True
        return effect if not opened else Effect.WRITE

    def call(self, at: int, listing: bool, closed: str) -> Effect:
        """Return the effect of `name (`.

        at: the index of the name's last part.
        listing: whether this is in the list of a WITH.
        closed: the token before the pair of parentheses that closed last.
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
            if effect is not None and (name not in self.dialect.unquoted or self.low[at] == name):
                self.takes_named_lock = self.takes_named_lock or name in self.dialect.locks
                return self.recall(Recall.STATEMENT) if name in self.dialect.recalled else effect
            if name.startswith(self.dialect.prefixes):
                return Effect.SERVER
        self.functions.add(".".join([*schema, name]))
        return Effect.READ

    def no_call(self, at: int, before: str, listing: bool, closed: str) -> bool:
        """Return whether the unqualified name at `at`, with a parenthesis behind it, is part of the grammar."""
        low = self.low
        word = low[at]
        construct = self.dialect.contextual_non_calls.get(word)
        if construct is not None and construct(self, at):
            return True
        if before in ("with", "recursive") or (listing and before == ","):
            return True  # WITH name (columns)
        if before == ")":
            # FROM (...) alias (columns), and neither SELECT DISTINCT ON (...) f() nor a OPERATOR(schema.+) f()
            return closed not in ("on", "operator")
        if before == "ordinality":
            return True
        # FROM table alias (columns)
        return low[at - 2] in ("from", "join") and before not in self.dialect.non_calls

    def relation(self, at: int) -> Effect:
        """Return the effect of reading a relation of the system schema at `at`; READ if no relation of it follows."""
        if self.low[at + 1] != ".":
            return Effect.READ
        schema, relation = (self.low[part].strip('`"') for part in (at, at + 2))
        if relation in self.dialect.recalled:
            return self.recall(Recall.STATEMENT)
        asks = self.dialect.schemas[schema].get(relation, Effect.SERVER)
        shows = self.names_server_columns() or (relation in self.dialect.server_relations and self.selects_all_columns())
        return max(asks, Effect.SERVER) if shows else asks

    def selects_all_columns(self) -> bool:
        """Return whether a `*` of the text stands for columns. It may also count rows, or multiply."""
        if self._selects_all is None:
            self._selects_all = any(word == "*" and before in self.dialect.star_follows for before, word in pairwise(self.low))
        return self._selects_all

    def names_server_columns(self) -> bool:
        """Return whether the text names columns that each server fills in for itself."""
        if self._words is None:
            self._words = frozenset(self.low)
        return not self._words.isdisjoint(self.dialect.server_columns)

    def variable(self, at: int) -> Effect:
        """Return the effect of reading the system variable at `at`.

        Such a read asks one server, this connection, or about the statements before.
        """
        name = self.low[at].strip("`")
        scoped = self.low[at + 1 : at + 2] == ["."]
        if scoped and name == "global":
            return Effect.SERVER
        if (self.low[at + 2].strip("`") if scoped else name) in self.dialect.recalled:
            return self.recall(Recall.STATEMENT)
        return Effect.SERVER if not scoped and name in self.dialect.variables else Effect.CONNECTION

    def end(self) -> None:
        """Note that a transaction may end here, and its read-only mode with it."""
        self.may_end_transaction = self.may_unset_read_only = True

    def recall(self, what: Recall) -> Effect:
        """Note a question about the connection's past. By itself it is no more than a read."""
        if self.recalls is not Recall.STATEMENT:
            self.recalls = what
        return Effect.READ

    def name(self, at: int) -> str | None:
        """Return the name at `at` as the server sees it; "" if that is unknown, None if it is no name."""
        raw = self.raw[at]
        first = raw[:1]
        if first in ('"', "`") and len(raw) > 1:
            raw = self.low[at] if self.dialect.folds_quoted else raw
            inner = raw[1:-1].replace(first * 2, first)
            return raw if set('."`') & set(inner) else inner
        if raw[-1:] == '"':
            return ""  # U&"..." hides its letters
        if self.low[at - 1] == "uescape":
            return ""  # U&"..." UESCAPE '!'
        if raw[-1:] == "'" or raw.replace(".", "").isdecimal():
            return None
        return self.low[at] if first == "_" or first.isalnum() or first >= "\x80" else None

    def is_literal(self, at: int) -> bool:
        """Return whether the token at `at` is a literal, or the end of a parameter."""
        here, before = self.low[at], self.low[at - 1]
        if here[-1:] in ("'", '"', "?") or here[:1].isdecimal():
            return True
        return here[:2] == "%(" or before == ":" or (before == "%" and here == "s")

    def closing(self, start: int, stop: int) -> int:
        """Return where the parenthesis that opens at `start` is closed; `stop` if nowhere."""
        depth = 0
        for at in range(start, stop):
            depth += (self.low[at] == "(") - (self.low[at] == ")")
            if not depth:
                return at
        return stop

    def find(self, word: str, start: int, stop: int) -> int:
        """Return where `word` first stands outside parentheses; `stop` if nowhere."""
        depth = 0
        for at in range(start, stop):
            here = self.low[at]
            if here == word and not depth:
                return at
            depth += (here == "(") - (here == ")")
        return stop
