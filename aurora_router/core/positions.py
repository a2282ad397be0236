"""Positions (how far an instance's log has got), and requirements (what must be replayed before a session may read somewhere).

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
        """Return whether this contains everything up to `other`; never true across epochs."""
        ...

    def covers_ignoring_epoch(self, other: Position) -> bool:
        """Compare like `covers()`, but by the numbers alone, across epochs.

        For one server, False means that its log has gone back.
        """
        ...

    def merge(self, other: Position) -> Position | None:
        """Return the smallest position that covers both; None if there is none, as across epochs."""
        ...

    def supersedes(self, other: Position) -> bool:
        """Return whether this server is provably the newer writer: it has all that the other one has. False if unknown.

        Both servers accept writes in one epoch.
        """
        ...

    def is_of_former_writer(self, last: Position) -> bool:
        """Return whether this server was the writer before the one of `last`, and was not promoted since. False if unknown.

        This server accepts writes.

        last: the last position of the writer.
        """
        ...

    def with_epoch_of(self, last: Position) -> Position:
        """Return this position in the epoch of `last` if this server is certainly of that epoch, but does not know; else itself.

        last: the last position of the writer.
        """
        ...

    def may_continue(self, last: Position) -> bool:
        """Return whether `last` is of the same server, and that server may have forgotten its epoch."""
        ...

    def has_lost(self, known: Position) -> bool:
        """Return whether `known` has transactions that the writer itself made, and that this position of the writer lacks.

        Then the writer's log was begun anew, or has lost its end: the numbers are used again for something else.
        known: an earlier position of the writer or of a reader.
        """
        ...

    def to_token(self) -> str:
        """Return a short text for a token, with characters that are safe in URLs and headers; "" if no short text is possible."""
        ...


P = TypeVar("P", bound=Position)


@dataclass(frozen=True, slots=True)
class WalPosition:
    """A PostgreSQL LSN on a timeline."""

    epoch: int
    lsn: int

    def covers(self, other: Position) -> bool:
        return isinstance(other, WalPosition) and self.epoch == other.epoch and self.lsn >= other.lsn

    def covers_ignoring_epoch(self, other: Position) -> bool:
        return isinstance(other, WalPosition) and self.lsn >= other.lsn

    def merge(self, other: Position) -> Position | None:
        return self if self.covers(other) else other if other.covers(self) else None

    def supersedes(self, other: Position) -> bool:  # noqa: ARG002
        # Two writers on one timeline use the same numbers for different contents.
        return False

    def is_of_former_writer(self, last: Position) -> bool:  # noqa: ARG002
        return False  # the timeline decides this

    def with_epoch_of(self, last: Position) -> WalPosition:  # noqa: ARG002
        return self  # a server knows its timeline

    def may_continue(self, last: Position) -> bool:  # noqa: ARG002
        return False  # a server never forgets its timeline

    def has_lost(self, known: Position) -> bool:  # noqa: ARG002
        # A crash may cut the end of the log, but no reader has received that end.
        return False

    def to_token(self) -> str:
        return f"{self.epoch}-{self.lsn:X}"

    @classmethod
    def from_token(cls, text: str) -> WalPosition:
        """Parse a text made by `to_token()`. Raises ValueError."""
        found = _COMPACT.fullmatch(text)
        if found is None:
            raise ValueError(f"not a compact position: {text[:40]!r}")
        return cls(int(found[1]), int(found[2], 16))

    def __str__(self) -> str:
        return f"{self.epoch}:{self.lsn >> 32:X}/{self.lsn & 0xFFFFFFFF:X}"

    @classmethod
    def parse(cls, text: str) -> WalPosition:
        """Parse a text made by str(). Raises ValueError."""
        epoch, _, lsn = text.partition(":")
        return cls(int(epoch), parse_lsn(lsn))


def parse_lsn(text: str) -> int:
    """Parse PostgreSQL's text form of an LSN ("16/B374D848") into a number. Raises ValueError."""
    high, slash, low = text.partition("/")
    if not slash:
        raise ValueError(f"not an LSN: {text!r}")
    return (int(high, 16) << 32) | int(low, 16)


def end_of_record(insert_lsn: int, page: int = 8192, segment: int = 16 * 1024 * 1024) -> int:
    """Return the end of the last record before an insert position.

    page, segment: their sizes in bytes.

    Right after a page boundary, `pg_current_wal_insert_lsn()` has already stepped over the header of the page. The header holds
    no record, so an idle reader never replays "up to" that position.
    """
    if insert_lsn % segment == _SEGMENT_HEADER:
        return insert_lsn - _SEGMENT_HEADER
    if insert_lsn % page == _HEADER:
        return insert_lsn - _HEADER
    return insert_lsn


class Sample(NamedTuple):
    """A position of the writer.

    asked_at: a moment right before the writer was *asked* for it: monotonic seconds.
    """

    asked_at: float
    position: Position


class Requirement(NamedTuple):
    """The commits that a reader must have replayed: all up to `acknowledged_at`, made in `epoch`.

    acknowledged_at: when the last commit was acknowledged: monotonic seconds. With a token, it may be a later moment.
    epoch: None if it is unknown.
    position: the writer's position that proves them; None until one was asked for after `acknowledged_at`.
    is_from_token: whether position and epoch came with a token. Then they prove the token's commits, but not all commits
        up to `acknowledged_at`, and may be made up.
    received_at: when the token arrived: monotonic seconds. `acknowledged_at` comes from a date by another host's clock,
        so it counts only if there is no other evidence.
    """

    acknowledged_at: float
    epoch: int | None
    position: Position | None = None
    is_from_token: bool = False
    received_at: float = float("-inf")

    @property
    def since(self) -> float:
        """The moment after which a position must be asked for to prove all: monotonic seconds, by this host's clock."""
        return max(self.acknowledged_at, self.received_at)


def merge(mine: Requirement | None, other: Requirement | None) -> Requirement | None:
    """Return a requirement that implies both. A position that is asked for after the later moment proves both."""
    if other is None or mine is other:
        return mine
    if mine is None:
        return other
    if not mine.is_from_token and not other.is_from_token:
        return mine if mine.acknowledged_at > other.acknowledged_at else other
    later, earlier = (mine, other) if mine.since > other.since else (other, mine)
    if not later.is_from_token:
        return later
    position = None
    if later.position is not None and earlier.position is not None and later.epoch == earlier.epoch:
        position = later.position.merge(earlier.position)
    after = later.since if position is None else max(later.acknowledged_at, earlier.acknowledged_at)
    heard_at = max(later.received_at, earlier.received_at)
    return Requirement(after, max(later.epoch or 0, earlier.epoch or 0), position, is_from_token=True, received_at=heard_at)


class LastRead(NamedTuple):
    """A read on a reader. Later reads must not show less.

    server: the ServerId of that reader.
    at: when the read had ended: monotonic seconds.
    epoch: the epoch of that server's instance.
    """

    server: object
    at: float
    epoch: int


def merge_reads(
    reads: frozenset[LastRead], last_read: LastRead | None, requirement: Requirement | None, known: frozenset[LastRead]
) -> frozenset[LastRead]:
    """Return the reads that later ones must cover, after one more unit.

    reads: those that later ones had to cover before the unit.
    last_read: the unit's own; None if it was not on a reader.
    requirement: what it leaves behind. It counts if the unit was on the writer.
    known: those that `last_read` already covers.
    """
    if last_read is not None:
        others = left = reads - known
        for other in others:
            if other.server == last_read.server:
                left -= {other}
                if other.at > last_read.at:
                    last_read = other
        return left | {last_read}
    if requirement is not None and not requirement.is_from_token:
        # A reader that has replayed the requirement shows all that any reader had shown by that time.
        return frozenset(read for read in reads if read.at > requirement.acknowledged_at)
    return reads


def first_sample_after(samples: tuple[Sample, ...], after: float) -> Sample | None:
    """Return the first sample that was asked for at `after` or later; None if there is none.

    Its position is the smallest that is known to contain every commit acknowledged by `after`.
    """
    for sample in samples:  # oldest first
        if sample.asked_at >= after:
            return sample
    return None


def lowest_common(positions: tuple[P | None, ...]) -> P | None:
    """Return the position that all the others cover; None if one is unknown or they do not compare."""
    least: P | None = None
    for position in positions:
        if position is None:
            return None
        if least is None or least.covers(position):
            least = position
        elif not position.covers(least):
            return None
    return least
