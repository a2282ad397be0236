"""What clients did and were shown, and whether it was causally consistent. Pure: check(history) -> violations.

A history is what each scope did: a causal scope, or a session on its own. Whoever writes a key raises its version by one, so that
a version names its write. What a scope must be shown (`due`) follows from what it did before:

- what it has written, and what the tokens speak of that it took: read your writes
- what it was shown before: monotonic reads
- and where it was shown a write, what that write's scope had written before it (monotonic writes) and was shown before it
  (writes follow reads): the log has them in that order.

A token speaks of what its giver had written, and what that follows; not of what it was only shown.

One thing is PostgreSQL's own way: its writer shows a commit when it acknowledges it, and a reader may have replayed it before
that. So of the writer nothing is demanded that it had not acknowledged yet when the read began.
"""

from __future__ import annotations

import enum
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple


class Guarantee(enum.IntEnum):
    """Where two demand the same, the later one is named."""

    ONE_ORDER = enum.auto()  # of the writes that were acknowledged: without it there is nothing to say of the others
    WRITES_FOLLOW_READS = enum.auto()
    MONOTONIC_WRITES = enum.auto()
    MONOTONIC_READS = enum.auto()
    READ_YOUR_WRITES = enum.auto()

    def __str__(self) -> str:
        return self.name.lower().replace("_", " ")


@dataclass(frozen=True, slots=True)
class Read:
    """What one statement showed: versions by key. began, ended: seconds of the one clock that all records share."""

    scope: int
    began: float
    ended: float
    shown: Mapping[int, int]
    on_writer: bool = False


@dataclass(frozen=True, slots=True)
class Write:
    """A write whose COMMIT was acknowledged. One that was not is left out: whoever is shown it must see nothing more for that."""

    scope: int
    began: float
    ended: float
    key: int
    version: int


@dataclass(frozen=True, slots=True)
class Gave:
    """The scope gave out this token: of all that it had written by then."""

    scope: int
    token: int


@dataclass(frozen=True, slots=True)
class Took:
    """The scope began with these tokens."""

    scope: int
    tokens: tuple[int, ...]


Operation = Read | Write | Gave | Took


class Due(NamedTuple):
    """The least version that must be shown of a key, what demands that, and since when it does."""

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
    """All violations in a history, in which each scope's operations stand in the order in which it did them.

    Raises ValueError where a token is taken that nobody had given.
    """
    return _Check(history).run()


class _Check:
    """Follows each scope for as long as what it was shown and has taken is known; then another one."""

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
        self.known: dict[_Awaited, Past] = {}  # what a write implies for those who are shown it, a token for those who take it
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
        """Nobody can go on: somebody was shown, or wrote upon, what was written later by one who knew of that."""
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
        """Judge what one scope did; yields what must be known before it can go on."""
        due: Past = {}
        spoken: Past = {}  # what its token would speak of
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
        """What the newest acknowledged write up to that version implies, and with it all those before it."""
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
        """Note it when an operation was shown, or was made upon, an older version than was due."""
        least = due.get(key)
        if least is None or version >= least.version:
            return
        if isinstance(operation, Read) and operation.on_writer:
            later = self.versions[key][bisect_right(self.versions[key], version) :]
            if not any(self.acknowledged[key, v].ended <= operation.began for v in later):
                return
        guarantee = least.guarantee
        if isinstance(operation, Write):  # that comes too early in the order of writes: after its own, or what it was shown
            guarantee = _followed(least).guarantee
        self.violations.append(Violation(guarantee, operation, key, least))


def add(due: Past, more: Past) -> None:
    """Have both demanded."""
    for key, demanded in more.items():
        if key not in due or due[key][:2] < demanded[:2]:
            due[key] = demanded


def _followed(due: Due) -> Due:
    """The same for those who are shown a write that came after it."""
    own = due.guarantee is Guarantee.READ_YOUR_WRITES
    return due._replace(guarantee=Guarantee.MONOTONIC_WRITES if own else Guarantee.WRITES_FOLLOW_READS)


def _out_of_order(write: Write, other: Write) -> Violation:
    return Violation(Guarantee.ONE_ORDER, write, write.key, Due(write.version, Guarantee.ONE_ORDER, other))
