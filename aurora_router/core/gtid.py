"""Positions of MySQL and MariaDB: which transactions a server has, by their global ids (GTIDs).

MySQL names a transaction by its source (the server or group that made it) and a number. A position is a set of such names, so
comparisons are exact. MariaDB numbers the transactions of a domain one after the other, whichever server makes them. A position
is the last number of each domain, and can be compared only within one epoch.
"""

from __future__ import annotations

import base64
import re
import uuid
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Final, TypeAlias

from aurora_router.core.positions import Position

LONGEST: Final = 1_000_000  # characters of a text; a whole set has some thousands
SHORT: Final = 40  # characters of a compact form
LAST: Final = 2**63 - 2  # the last number that MySQL gives out

#: Runs of numbers without gaps: the first and the last number of each. They are sorted, with gaps between them.
Runs: TypeAlias = tuple[tuple[int, int], ...]

_UUID = r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"
_SOURCE = re.compile(_UUID, re.ASCII)
_TAG = re.compile(r"[a-z_][a-z0-9_]{0,31}", re.ASCII)
_RUN = re.compile(r"([0-9]{1,19})(?:-([0-9]{1,19}))?", re.ASCII)
_COMPACT_SET = re.compile(r"m([0-9]{1,20})-([0-9A-Za-z_-]{22})([a-z_][a-z0-9_]{0,31})?-([0-9_-]{1,40})", re.ASCII)
_GTID = re.compile(r"([0-9]{1,10})-([0-9]{1,10})-([0-9]{1,20})", re.ASCII)
_COMPACT_GTID = re.compile(r"a([0-9]{1,20})-([0-9_-]{5,40})", re.ASCII)
_EPOCH = re.compile(r"[0-9]{1,20}", re.ASCII)


@dataclass(frozen=True, slots=True)
class GtidSet:
    """A set of MySQL's GTIDs.

    sources: the numbers of each source, sorted by source. A source is a UUID in lower case, with ":" and its tag if it has one.
    origin: the source as which the server of this position writes. "" if that is unknown, or if the server both accepts writes
        and replicates. It is also "" if the server accepts writes, but is not in its group now. Only `to_token()` and the
        comparisons of writers use it.
    writable_since: when that server was last made to accept writes, in seconds since 1970; 0 if this did not happen since its
        start. Only `supersedes()` and `is_of_former_writer()` use it.
    """

    epoch: int
    sources: tuple[tuple[str, Runs], ...] = ()
    origin: str = field(default="", compare=False)
    writable_since: float = field(default=0.0, compare=False)

    def covers(self, other: Position) -> bool:
        """Return whether this contains every GTID of `other`; never true across epochs."""
        if not isinstance(other, GtidSet) or self.epoch != other.epoch:
            return False
        mine = dict(self.sources)
        return all(source in mine and _contains(mine[source], runs) for source, runs in other.sources)

    def covers_ignoring_epoch(self, other: Position) -> bool:
        return isinstance(other, GtidSet) and self.covers(replace(other, epoch=self.epoch))

    def supersedes(self, other: Position) -> bool:
        """Return whether this has all that `other` has, and more, or whether the server of `other` only follows this one.

        If both have the same, the server that became writable later is newer. If that does not decide, the server that has
        replayed the other's writes is newer: the other was the writer before. A server that replicates from the other one only
        follows it. It may still have more, because it was asked later.
        """
        if not isinstance(other, GtidSet) or self.epoch != other.epoch:
            return False
        if other._follows(self) or self._follows(other):
            return self.origin != ""
        if not self.covers(other) or not other.covers(self):
            return self.covers(other)
        if self.origin == "" or other.origin == "":
            return False
        if self.writable_since != other.writable_since:
            return self.writable_since > other.writable_since
        return other._has_written() and not self._has_written()

    def is_of_former_writer(self, last: Position) -> bool:
        """Return whether another server became writable later, and has transactions that this one lacks.

        If a promotion lost transactions, the promoted server became writable even later, so this is False for it.
        """
        return (
            isinstance(last, GtidSet)
            and self.origin != last.origin
            and self.writable_since < last.writable_since
            and not self.covers(last)
        )

    def with_epoch_of(self, last: Position) -> GtidSet:  # noqa: ARG002
        return self  # there is one epoch only

    def may_continue(self, last: Position) -> bool:  # noqa: ARG002
        return False  # there is one epoch only

    def has_lost(self, known: Position) -> bool:
        """Return whether `known` is of the same server, and that server has lost transactions since."""
        return isinstance(known, GtidSet) and self.origin == known.origin != "" and not self.covers(known)

    def _follows(self, other: GtidSet) -> bool:
        """Whether this server replicates, and has more than `other` only because the server of `other` wrote it later."""
        theirs = dict(other.sources)
        more = (name for name, runs in self.sources if not _contains(theirs.get(name, ()), runs))
        return self.origin == "" != other.origin and all(name.partition(":")[0] == other.origin for name in more)

    def _has_written(self) -> bool:
        return any(source == self.origin for source, _ in self.sources)

    def merge(self, other: Position) -> GtidSet | None:
        """Return the GTIDs of both; None for a position of another kind or epoch."""
        if not isinstance(other, GtidSet) or self.epoch != other.epoch:
            return None
        together = {source: [*runs] for source, runs in self.sources}
        for source, runs in other.sources:
            together.setdefault(source, []).extend(runs)
        return GtidSet(self.epoch, _normal(together), self.origin, self.writable_since)

    def to_token(self) -> str:
        """Return the text for a token; "" if there is none of at most `SHORT` characters.

        Only one source fits in. If there are several, it is the source as which the server writes. The server's own
        transactions come after those that it has from others, and are replayed after them.
        """
        one = next((each for each in self.sources if len(self.sources) == 1 or each[0] == self.origin), None)
        if one is None:
            return ""
        name, _, tag = one[0].partition(":")
        short = base64.urlsafe_b64encode(uuid.UUID(name).bytes).decode()[:22]
        text = f"m{self.epoch}-{short}{tag}-{_write(one[1], '_')}"
        return text if len(text) <= SHORT else ""

    @classmethod
    def from_token(cls, text: str) -> GtidSet:
        """Parse a text made by `to_token()`, which has only one source. Raises ValueError."""
        found = _COMPACT_SET.fullmatch(text)
        if found is None:
            raise ValueError(f"not a compact GTID set: {text[:SHORT]!r}")
        epoch, short, tag, runs = found.groups()
        source = str(uuid.UUID(bytes=base64.urlsafe_b64decode(short + "==")))
        return cls(int(epoch), _normal({f"{source}:{tag}" if tag else source: _runs(runs.split("_"))}))

    def __str__(self) -> str:
        text: list[str] = []
        before = ""
        for source, runs in self.sources:
            name, _, tag = source.partition(":")
            text += [":", tag] if name == before else [",", source]
            text += [":", _write(runs, ":")]
            before = name
        return f"{self.epoch}:{''.join(text[1:])}"

    @classmethod
    def parse(cls, text: str) -> GtidSet:
        """Parse a text made by str(). Raises ValueError."""
        epoch, said = _epoch(text)
        return cls.from_server(epoch, said)

    @classmethod
    def from_server(cls, epoch: int, text: str, origin: str = "", writable_since: float = 0.0) -> GtidSet:
        """Parse a set as a server writes it: `uuid:1-5:7:tag:3,uuid:1`, with white space between.

        origin, writable_since: as the fields.
        Raises ValueError.
        """
        together: dict[str, list[tuple[int, int]]] = {}
        for part in _parts(text):
            name, *rest = part.strip().lower().split(":")
            if _SOURCE.fullmatch(name) is None or not rest:
                raise ValueError(f"not a GTID set: {text[:100]!r}")
            source, empty = name, True
            for piece in rest:
                if _TAG.fullmatch(piece) and not (empty and source != name):
                    source, empty = f"{name}:{piece}", True
                else:
                    together.setdefault(source, []).extend(_runs([piece]))
                    empty = False
            if empty:
                raise ValueError(f"a tag without a number: {text[:100]!r}")
        return cls(epoch, _normal(together), origin.lower(), writable_since)


@dataclass(frozen=True, slots=True)
class MariadbGtid:
    """The last transaction of each of MariaDB's domains: (domain, server that made it, sequence number), sorted.

    Positions compare by domain and number, as servers do. Only `supersedes()`, `with_epoch_of()` and `has_lost()` look at the
    server as well.

    origin: the id of the server of this position. -1 if it is unknown, or if the server both accepts writes and replicates.
    writer_starts: the result of `writer_starts()`. Only `with_epoch_of()` uses it.
    """

    epoch: int
    last: tuple[tuple[int, int, int], ...] = ()
    origin: int = field(default=-1, compare=False)
    writer_starts: tuple[tuple[int, int], ...] = field(default=(), compare=False)

    def covers(self, other: Position) -> bool:
        """Return whether this is as far as `other`, or further, in each domain of `other`; never true across epochs."""
        if not isinstance(other, MariadbGtid) or self.epoch != other.epoch:
            return False
        # Two loops build no dictionaries: each read with a token calls this, mostly for one domain.
        for domain, _, number in other.last:
            for mine, _, reached in self.last:
                if mine == domain:
                    if reached < number:
                        return False
                    break
            else:
                return False
        return True

    def covers_ignoring_epoch(self, other: Position) -> bool:
        return isinstance(other, MariadbGtid) and self.covers(replace(other, epoch=self.epoch))

    def supersedes(self, other: Position) -> bool:
        """Return whether this has all that `other` has, and more, or whether the server of `other` only follows this one.

        If both have the same, the server that has replayed the other's last write is newer: the other was the writer before. As
        soon as the newer one writes, an epoch begins. A server that replicates from the other one only follows it. It may still
        have more, because it was asked later.
        """
        if not isinstance(other, MariadbGtid) or self.epoch != other.epoch:
            return False
        if other._follows(self) or self._follows(other):
            return self.origin != -1
        if not self.covers(other):
            return False
        return not other.covers(self) or (other._wrote_last() and not self._wrote_last())

    def is_of_former_writer(self, last: Position) -> bool:  # noqa: ARG002
        return False  # the epoch decides this

    def with_epoch_of(self, last: Position) -> MariadbGtid:
        """Return this position in the epoch of `last` if it shows that its server is of that epoch; else return it unchanged.

        It shows that if it has, in each domain of `last`, transactions that the writer made after it became the writer. The
        server may not know that epoch, because a log that was begun anew (RESET MASTER) forgets it.
        """
        if not isinstance(last, MariadbGtid) or not last.last or self.epoch == last.epoch:
            return self
        mine, others, began = {domain: gtid for domain, *gtid in self.last}, dict(self.writer_starts), dict(last.writer_starts)
        for domain, writer, _ in last.last:
            server, number = mine.get(domain, (-1, 0))
            start = began.get(domain, 0)
            if server != writer or number <= start or others.get(domain, 0) not in (0, start):
                return self
        return replace(self, epoch=last.epoch, writer_starts=last.writer_starts)

    def may_continue(self, last: Position) -> bool:
        return isinstance(last, MariadbGtid) and self.origin == last.origin != -1

    def has_lost(self, known: Position) -> bool:
        """Return whether this server has lost transactions of its own that `known` has, or now numbers them anew."""
        if not isinstance(known, MariadbGtid):
            return False
        mine = {domain: number for domain, _, number in self.last}
        made = {domain: number for domain, server, number in known.last if server == self.origin}
        if not mine.keys() & made.keys():
            return bool(made)
        return any(number > mine.get(domain, number) for domain, number in made.items())

    def _follows(self, other: MariadbGtid) -> bool:
        """Whether this server replicates, and has more than `other` only because the server of `other` wrote it later."""
        theirs = {domain: number for domain, _, number in other.last}
        more = (server for domain, server, number in self.last if number > theirs.get(domain, -1))
        return self.origin == -1 != other.origin and all(server == other.origin for server in more)

    def _wrote_last(self) -> bool:
        return any(server == self.origin for _, server, _ in self.last)

    def merge(self, other: Position) -> MariadbGtid | None:
        """Return the further of the two in each domain; None for a position of another kind or epoch."""
        if not isinstance(other, MariadbGtid) or self.epoch != other.epoch:
            return None
        if self.last == other.last:
            return self
        last: dict[int, tuple[int, int]] = {}
        for domain, server, number in (*self.last, *other.last):
            last[domain] = max(last.get(domain, (-1, 0)), (number, server))
        together = tuple((domain, server, number) for domain, (number, server) in sorted(last.items()))
        return MariadbGtid(self.epoch, together, self.origin, self.writer_starts)

    def to_token(self) -> str:
        """Return the text for a token; "" if it would be longer than `SHORT`, or if there are no transactions."""
        text = f"a{self.epoch}-{self._write('_')}"
        return text if self.last and len(text) <= SHORT else ""

    @classmethod
    def from_token(cls, text: str) -> MariadbGtid:
        """Parse a text made by `to_token()`. Raises ValueError."""
        found = _COMPACT_GTID.fullmatch(text)
        if found is None:
            raise ValueError(f"not a compact GTID: {text[:SHORT]!r}")
        return cls.from_server(int(found[1]), found[2].replace("_", ","))

    def __str__(self) -> str:
        return f"{self.epoch}:{self._write(',')}"

    def _write(self, separator: str) -> str:
        return separator.join(f"{domain}-{server}-{number}" for domain, server, number in self.last)

    @classmethod
    def parse(cls, text: str) -> MariadbGtid:
        """Parse a text made by str(). Raises ValueError."""
        epoch, said = _epoch(text)
        return cls.from_server(epoch, said)

    @classmethod
    def from_server(cls, epoch: int, text: str, origin: int = -1, starts: tuple[tuple[int, int], ...] = ()) -> MariadbGtid:
        """Parse a position as a server writes it: `0-1-100,1-2-55`.

        origin, starts: as the fields.
        Raises ValueError.
        """
        last = tuple(sorted(_gtids(text)))
        if len({domain for domain, _, _ in last}) < len(last):
            raise ValueError(f"a domain occurs twice: {text[:100]!r}")
        return cls(epoch, last, origin, starts)


def mariadb_epoch(binlog_state: str, reader: int | None = None) -> int:
    """Return the number of the first transaction of the newest writer; 0 if there is none.

    binlog_state: a server's `@@gtid_binlog_state`, which holds the last number of each server in each domain.
    reader: the `@@server_id` of that server if it is a reader. If it made the last transaction itself, that one does not count.
    Raises ValueError.

    The newest writer numbers its transactions after those of all others. The number is the same on every server that has logged
    it, and higher after each promotion. With several domains it is the sum.
    """
    return sum(number + 1 for _, number in writer_starts(binlog_state, reader))


def writer_starts(binlog_state: str, reader: int | None = None) -> tuple[tuple[int, int], ...]:
    """Return the last number before the newest writer began, for each domain; 0 if no other server is known to have written.

    binlog_state, reader: as `mariadb_epoch()` takes them.
    Raises ValueError.
    """
    domains: dict[int, list[tuple[int, int]]] = {}
    for domain, server, number in _gtids(binlog_state):
        domains.setdefault(domain, []).append((number, server))
    found = []
    for domain, last in sorted(domains.items()):
        last.sort()
        if last[-1][1] == reader:
            last.pop()
        if last:
            found.append((domain, last[-2][0] if len(last) > 1 else 0))
    return tuple(found)


def _parts(text: str) -> Iterable[str]:
    if len(text) > LONGEST or not text.isascii():
        raise ValueError(f"not a position: {len(text)} characters, or characters outside ASCII")
    return text.split(",") if text.strip() else ()


def _epoch(text: str) -> tuple[int, str]:
    epoch, colon, rest = text.partition(":")
    if not colon or _EPOCH.fullmatch(epoch) is None:
        raise ValueError(f"not a position: {text[:100]!r}")
    return int(epoch), rest


def _gtids(text: str) -> Iterator[tuple[int, int, int]]:
    for part in _parts(text):
        found = _GTID.fullmatch(part.strip())
        domain, server, number = map(int, found.groups()) if found is not None else (-1, -1, -1)
        if not (0 <= domain < 2**32 and server < 2**32 and number < 2**64):
            raise ValueError(f"not a GTID of MariaDB: {part[:100]!r}")
        yield domain, server, number


def _runs(pieces: Iterable[str]) -> list[tuple[int, int]]:
    runs = []
    for piece in pieces:
        found = _RUN.fullmatch(piece.strip())
        first, last = (int(found[1]), int(found[2] or found[1])) if found is not None else (0, 0)
        if not 1 <= first <= last <= LAST:
            raise ValueError(f"not numbers of GTIDs: {piece[:100]!r}")
        runs.append((first, last))
    return runs


def _normal(together: Mapping[str, list[tuple[int, int]]]) -> tuple[tuple[str, Runs], ...]:
    return tuple((source, _joined(runs)) for source, runs in sorted(together.items()))


def _joined(runs: list[tuple[int, int]]) -> Runs:
    joined: list[tuple[int, int]] = []
    for first, last in sorted(runs):
        if joined and first <= joined[-1][1] + 1:
            joined[-1] = (joined[-1][0], max(joined[-1][1], last))
        else:
            joined.append((first, last))
    return tuple(joined)


def _contains(mine: Runs, theirs: Runs) -> bool:
    at = 0
    for first, last in theirs:
        while at < len(mine) and mine[at][1] < first:
            at += 1
        if at == len(mine) or mine[at][0] > first or mine[at][1] < last:
            return False
    return True


def _write(runs: Runs, separator: str) -> str:
    return separator.join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
