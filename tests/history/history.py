"""The actions of clients, and whether the rows shown were causally consistent. Pure: check(history) -> violations.

A history has the operations of each scope: a causal scope, or a session on its own. Each write of a key raises its version by
one, so that a version names its write. The versions that a scope must be shown (`due`) follow from its earlier operations:

- its own writes, and the writes of the tokens that it took: read your writes
- the versions that it was shown before: monotonic reads
- the earlier writes of a scope, if it was shown a write of that scope: monotonic writes
- the versions that the other scope was shown before that write: writes follow reads.

The last two hold because the log has the writes in that order.

A token speaks of its giver's writes, and of all that they follow. It does not speak of versions that its giver was only shown.

One rule is for PostgreSQL: its writer shows a commit at the acknowledgement, and a reader may have replayed the commit before
that. So a read on the writer need not show a commit that was not acknowledged when the read began.
"""

from __future__ import annotations

import enum
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple


class Guarantee(enum.IntEnum):
    """A guarantee of causal consistency. If two demand the same, the later one is named."""

    # One order of the acknowledged writes. Without it nothing can be said of the other guarantees.
    ONE_ORDER = enum.auto()
    WRITES_FOLLOW_READS = enum.auto()
    MONOTONIC_WRITES = enum.auto()
    MONOTONIC_READS = enum.auto()
    READ_YOUR_WRITES = enum.auto()

    def __str__(self) -> str:
        return self.name.lower().replace("_", " ")


@dataclass(frozen=True, slots=True)
class Read:
    """The rows that one statement showed.

    began, ended: seconds of the one clock that all records share
    shown: versions by key
    """

    scope: int
    began: float
    ended: float
    shown: Mapping[int, int]
    on_writer: bool = False


@dataclass(frozen=True, slots=True)
class Write:
    """A write whose COMMIT was acknowledged.

    Other writes are left out, because to be shown one of them demands nothing more.
    """

    scope: int
    began: float
    ended: float
    key: int
    version: int


@dataclass(frozen=True, slots=True)
class Gave:
    """A scope gave this token, which speaks of all its writes until then."""

    scope: int
    token: int


@dataclass(frozen=True, slots=True)
class Took:
    """A scope began with these tokens."""

    scope: int
    tokens: tuple[int, ...]


Operation = Read | Write | Gave | Took


class Due(NamedTuple):
    """The least version of a key that must be shown.

    guarantee: the guarantee that demands it
    cause: the operation since which it is demanded
    """

    version: int
    guarantee: Guarantee
    cause: Operation


class Violation(NamedTuple):
    """An operation that showed less than was due."""

    guarantee: Guarantee
    operation: Read | Write
    key: int
    due: Due

    def __str__(self) -> str:
        return f"{self.guarantee}: {self.operation} should know version {self.due.version} of {self.key} from {self.due.cause}"


Past = dict[int, Due]
_Awaited = tuple[str, int, int]  # a write by key and version, or a token


def check(history: Iterable[Operation]) -> list[Violation]:
    """All violations in a history.

    history: each scope's operations stand in the order in which it did them
    Raises ValueError if a token is taken that nobody gave.
    """
    return _Check(history).run()


class _Check:
    """The state of one check.

    It follows each scope until the scope needs a write or a token whose implications are not known yet, then another scope.
    """

    def __init__(self, history: Iterable[Operation]) -> None:
        self.scopes: defaultdict[int, list[Operation]] = defaultdict(list)
        self.acknowledged: dict[tuple[int, int], Write] = {}
        self.violations: list[Violation] = []
        for operation in history:
            self.scopes[operation.scope].append(operation)
            if isinstance(operation, Write):
                first = self.acknowledged.setdefault((operation.key, operation.version), operation)
                if first is not operation:
                    self.violations.append(_out_of_order(operation, first))
        versions: defaultdict[int, list[int]] = defaultdict(list)
        for key, version in sorted(self.acknowledged):
            versions[key].append(version)
        self.versions = dict(versions)
        # The versions that a write implies for the scopes that are shown it, and a token for those that take it.
        self.known: dict[_Awaited, Past] = {}
        self.news: list[_Awaited] = []

    def run(self) -> list[Violation]:
        waiting: defaultdict[_Awaited, list[Iterator[_Awaited]]] = defaultdict(list)
        able = [self.follow(operations) for operations in self.scopes.values()]
        while able or waiting:
            if not able:
                self.break_circle(waiting)
            else:
                scope = able.pop()
                awaited = next(scope, None)
                if awaited is not None:
                    waiting[awaited].append(scope)
            while self.news:
                able += waiting.pop(self.news.pop(), ())
        return self.violations

    def break_circle(self, waiting: Iterable[_Awaited]) -> None:
        """Report a circle and let its scopes go on.

        In a circle a scope was shown, or wrote upon, a later write. The scope of that write already knew of the first scope.
        """
        write = next((self.acknowledged[key, version] for kind, key, version in waiting if kind == "write"), None)
        if write is None:
            raise ValueError(f"nobody gave the token {next(iter(waiting))[1]}")
        self.violations.append(_out_of_order(write, write))
        self.publish(("write", write.key, write.version), {})

    def publish(self, what: _Awaited, implied: Past) -> None:
        if what not in self.known:
            self.known[what] = implied
            self.news.append(what)

    def follow(self, operations: Iterable[Operation]) -> Iterator[_Awaited]:
        """Judge the operations of one scope. Yields each write or token that must be known before it can go on."""
        due: Past = {}
        spoken: Past = {}  # the versions that its token would speak of
        for operation in operations:
            match operation:
                case Took(tokens=tokens):
                    for token in tokens:
                        implied = yield from self.of(("token", token, 0))
                        add(due, implied)
                        add(spoken, implied)
                case Gave(token=token):
                    self.publish(("token", token, 0), dict(spoken))
                case Read(shown=shown):
                    for key, version in shown.items():
                        add(due, (yield from self.before(key, version)))
                    for key, version in shown.items():
                        self.judge(operation, key, version, due)
                    add(due, {key: Due(version, Guarantee.MONOTONIC_READS, operation) for key, version in shown.items()})
                case Write(key=key, version=version):
                    add(due, (yield from self.before(key, version - 1)))
                    self.judge(operation, key, version - 1, due)
                    add(due, {key: Due(version, Guarantee.READ_YOUR_WRITES, operation)})
                    spoken = {
                        k: d if d.guarantee is Guarantee.READ_YOUR_WRITES else d._replace(guarantee=Guarantee.WRITES_FOLLOW_READS)
                        for k, d in due.items()
                    }
                    self.publish(("write", key, version), {k: _followed(d) for k, d in spoken.items() if k != key})

    def before(self, key: int, version: int) -> Generator[_Awaited, None, Past]:
        """The versions that the newest acknowledged write up to `version` implies. It includes those of all writes before it."""
        known = self.versions.get(key, ())
        index = bisect_right(known, version)
        if not index:
            return {}
        return (yield from self.of(("write", key, known[index - 1])))

    def of(self, awaited: _Awaited) -> Generator[_Awaited, None, Past]:
        while awaited not in self.known:
            yield awaited
        return self.known[awaited]

    def judge(self, operation: Read | Write, key: int, version: int, due: Past) -> None:
        """Note a violation if an operation was shown, or was made upon, an older version than was due."""
        least = due.get(key)
        if least is None or version >= least.version:
            return
        if isinstance(operation, Read) and operation.on_writer:
            later = self.versions[key][bisect_right(self.versions[key], version) :]
            if not any(self.acknowledged[key, v].ended <= operation.began for v in later):
                return
        guarantee = least.guarantee
        # A write that comes too early in the order of writes should follow its scope's own writes, or those that it was shown.
        if isinstance(operation, Write):
            guarantee = _followed(least).guarantee
        self.violations.append(Violation(guarantee, operation, key, least))


def add(due: Past, more: Past) -> None:
    """Add the demands of `more` to `due`."""
    for key, demanded in more.items():
        if key not in due or due[key][:2] < demanded[:2]:
            due[key] = demanded


def _followed(due: Due) -> Due:
    """The same demand, for scopes that are shown a write that followed it."""
    own = due.guarantee is Guarantee.READ_YOUR_WRITES
    return due._replace(guarantee=Guarantee.MONOTONIC_WRITES if own else Guarantee.WRITES_FOLLOW_READS)


def _out_of_order(write: Write, other: Write) -> Violation:
    return Violation(Guarantee.ONE_ORDER, write, write.key, Due(write.version, Guarantee.ONE_ORDER, other))
