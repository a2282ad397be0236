"""Tokens: what a later reader must have replayed, in a text that goes through cookies, headers and messages.

The text is `1.<cluster>.<position>.<made at>`, in URL-safe characters: a version, the cluster's identity, a position, and
unix seconds. A position of PostgreSQL is `<epoch>-<lsn>`; those of other kinds begin with a letter. Without one (`0` in its
place), for none was known or none is short enough, it speaks of all that was committed when it was made. A signature may
follow; it is not of this module.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Final, NamedTuple

from aurora_router.core.gtid import GtidSet, MariadbGtid
from aurora_router.core.positions import Position, WalPosition

LONGEST = 120  # characters, signature and all
SIGNATURE = 44  # characters that are left for one, the dot before it and all
DOTS = 3  # in a text without a signature
_FORM = re.compile(r"1\.([0-9A-Za-z_-]{1,36})\.([0-9A-Za-z_-]{1,60})\.([0-9]{1,12})", re.ASCII)
_KINDS: Final[Mapping[str, Callable[[str], Position]]] = {"a": MariadbGtid.expand, "m": GtidSet.expand}


class Token(NamedTuple):
    """A commit of a cluster that a reader must have replayed.

    cluster: as ServerId.cluster. position: the writer's, asked for after the commit. made_at: unix seconds, rounded up.
    """

    cluster: str
    position: Position | None
    made_at: int

    def __str__(self) -> str:
        if self.position is not None and (short := self.position.compact()):
            text = f"1.{self.cluster}.{short}.{self.made_at}"
            if len(text) <= LONGEST - SIGNATURE:
                return text
        return f"1.{self.cluster}.0.{self.made_at}"

    @classmethod
    def parse(cls, text: str) -> Token:
        """The inverse of str(), as far as what it says goes. Raises ValueError."""
        found = _FORM.fullmatch(text)
        if found is None:
            raise ValueError("not a consistency token")
        cluster, short, made_at = found.groups()
        try:
            position = None if short == "0" else _KINDS.get(short[0], WalPosition.expand)(short)
        except ValueError:
            raise ValueError("not a consistency token") from None
        return cls(cluster, position, int(made_at))


def later(one: Token, other: Token) -> Token:
    """The one that implies the other. Raises ValueError for tokens of two clusters.

    One without a position implies those that were made before it. Otherwise the newer epoch, then the position decides. Where
    neither position covers the other, the writer has changed between them: that of the newer one was made behind the older.
    """
    if one.cluster != other.cluster:
        raise ValueError("they are of two clusters")
    if one.position is None or other.position is None:
        return one if (one.made_at, one.position is None) > (other.made_at, other.position is None) else other
    if one.position.epoch != other.position.epoch:
        return one if one.position.epoch > other.position.epoch else other
    if one.position.covers(other.position) or other.position.covers(one.position):
        return one if one.position.covers(other.position) else other
    return one if one.made_at > other.made_at else other
