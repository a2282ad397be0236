"""How far an instance's log has got, and what a session must find replayed before it may read somewhere.

Positions compare only within one epoch: after a promotion the same number can mean other contents.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeVar

_HEADER = 24  # SizeOfXLogShortPHD: page header of a WAL page
_COMPACT = re.compile(r"([0-9]{1,10})-([0-9A-F]{1,16})", re.ASCII)
_SEGMENT_HEADER = 40  # SizeOfXLogLongPHD: header of a segment's first page


class Position(Protocol):
    """A point in the log of one epoch."""

    @property
    def epoch(self) -> int: ...

    def covers(self, other: Position) -> bool:
        """True when everything up to `other` is contained here; never true across epochs."""
        ...

    def reaches(self, other: Position) -> bool:
        """The same by the numbers alone, whatever the epochs: of one server, True unless it has gone back since `other`."""
        ...

    def union(self, other: Position) -> Position | None:
        """The smallest position that covers both; None where there is none, as across epochs."""
        ...

    def outdoes(self, other: Position) -> bool:
        """Of two servers that both accept writes in one epoch: True when this is of the newer one, which has all that the other
        has. False where that cannot be told."""
        ...

    def predates(self, last: Position) -> bool:
        """Of a server that accepts writes, and the last that the writer said: True when this is of one that was the writer before
        that one, and not of one that was promoted since. False where that cannot be told."""
        ...

    def placed(self, last: Position) -> Position:
        """The same position in the epoch of `last`, which the writer said last, if its server is certainly of that epoch but does
        not know; else itself."""
        ...

    def resumes(self, last: Position) -> bool:
        """True if the server that said `last` is the one that says this, and may have forgotten its epoch."""
        ...

    def lacks(self, known: Position) -> bool:
        """Of the writer: True if `known`, which it or a reader said before, has transactions of the writer's own that this lacks.
        Then the writer's log was begun anew, or has lost its end: the numbers are used again for something else."""
        ...

    def compact(self) -> str:
        """Its text in a token: short, and of characters that are safe in URLs and headers; "" where it has none so short."""
        ...


P = TypeVar("P", bound=Position)


@dataclass(frozen=True, slots=True)
class WalPosition:
    """A PostgreSQL LSN on a timeline."""

    epoch: int
    lsn: int

    def covers(self, other: Position) -> bool:
        return isinstance(other, WalPosition) and self.epoch == other.epoch and self.lsn >= other.lsn

    def reaches(self, other: Position) -> bool:
        return isinstance(other, WalPosition) and self.lsn >= other.lsn

    def union(self, other: Position) -> Position | None:
        return self if self.covers(other) else other if other.covers(self) else None

    def outdoes(self, other: Position) -> bool:  # noqa: ARG002
        return False  # two that write on one timeline write different things under the same numbers

    def predates(self, last: Position) -> bool:  # noqa: ARG002
        return False  # the timeline tells

    def placed(self, last: Position) -> WalPosition:  # noqa: ARG002
        return self  # a server knows its timeline

    def resumes(self, last: Position) -> bool:  # noqa: ARG002
        return False  # a server never forgets its timeline

    def lacks(self, known: Position) -> bool:  # noqa: ARG002
        return False  # what a crash may take from the end of the log no reader was sent

    def compact(self) -> str:
        return f"{self.epoch}-{self.lsn:X}"

    @classmethod
    def expand(cls, text: str) -> WalPosition:
        """The inverse of `compact()`. Raises ValueError."""
        found = _COMPACT.fullmatch(text)
        if found is None:
            raise ValueError(f"not a compact position: {text[:40]!r}")
        return cls(int(found[1]), int(found[2], 16))

    def __str__(self) -> str:
        return f"{self.epoch}:{self.lsn >> 32:X}/{self.lsn & 0xFFFFFFFF:X}"

    @classmethod
    def parse(cls, text: str) -> WalPosition:
        """The inverse of str(). Raises ValueError."""
        epoch, _, lsn = text.partition(":")
        return cls(int(epoch), parse_lsn(lsn))


def parse_lsn(text: str) -> int:
    """PostgreSQL's text form of an LSN ("16/B374D848") as a number. Raises ValueError."""
    high, slash, low = text.partition("/")
    if not slash:
        raise ValueError(f"not an LSN: {text!r}")
    return (int(high, 16) << 32) | int(low, 16)


def end_of_record(insert_lsn: int, page: int = 8192, segment: int = 16 * 1024 * 1024) -> int:
    """The end of the last record before an insert position.

    `pg_current_wal_insert_lsn()` right after a page boundary has already stepped over the page's header, which holds no
    record: an idle reader never replays "up to" it. page, segment: bytes.
    """
    if insert_lsn % segment == _SEGMENT_HEADER:
        return insert_lsn - _SEGMENT_HEADER
    if insert_lsn % page == _HEADER:
        return insert_lsn - _HEADER
    return insert_lsn


@dataclass(frozen=True, slots=True)
class Sample:
    """A position of the writer, and the moment (monotonic seconds) before which it was *asked for*."""

    asked_at: float
    position: Position


class Requirement(NamedTuple):
    """What a reader must have replayed: every commit up to `after`, made in `epoch`.

    after: monotonic seconds, taken when the commit had been acknowledged; of a token: no earlier than that.
    position: the writer's position that proves it, once one was asked for after that moment.
    given: position and epoch came with a token: they prove what it speaks of, but not all up to `after`, and may be made up.
    heard_at: monotonic seconds, when the token was heard of. `after` comes from a date that another host's clock has written, so
    that it counts only where time is all there is.
    """

    after: float
    epoch: int | None
    position: Position | None = None
    given: bool = False
    heard_at: float = float("-inf")

    @property
    def since(self) -> float:
        """Monotonic seconds, by no clock but this host's: what the writer says of itself when it is asked later proves all."""
        return max(self.after, self.heard_at)


def merge(mine: Requirement | None, other: Requirement | None) -> Requirement | None:
    """A requirement that implies both. What was asked for after the later moment proves them."""
    if mine is None or other is None:
        return other if mine is None else mine
    if not mine.given and not other.given:
        return mine if mine.after > other.after else other
    later, earlier = (mine, other) if mine.since > other.since else (other, mine)
    if not later.given:
        return later
    position = None
    if later.position is not None and earlier.position is not None and later.epoch == earlier.epoch:
        position = later.position.union(earlier.position)
    after = later.since if position is None else max(later.after, earlier.after)
    heard_at = max(later.heard_at, earlier.heard_at)
    return Requirement(after, max(later.epoch or 0, earlier.epoch or 0), position, given=True, heard_at=heard_at)


class LastRead(NamedTuple):
    """A read on a reader: where later ones may not show less.

    server: the ServerId of the one that showed it. at: monotonic seconds, taken when it had been shown. epoch: of that server's
    instance.
    """

    server: object
    at: float
    epoch: int


def evidence(samples: tuple[Sample, ...], after: float) -> Sample | None:
    """The one with the smallest position known to contain every commit acknowledged by `after`; None when none was asked for
    since."""
    for sample in samples:  # oldest first
        if sample.asked_at >= after:
            return sample
    return None


def minimum(positions: tuple[P | None, ...]) -> P | None:
    """The position that all cover; None when one is unknown or they do not compare."""
    least: P | None = None
    for position in positions:
        if position is None:
            return None
        if least is None or least.covers(position):
            least = position
        elif not position.covers(least):
            return None
    return least
