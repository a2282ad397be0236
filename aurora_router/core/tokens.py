"""Tokens: what a later reader must have replayed, in a text that goes through cookies, headers and messages.

The text is `1.<cluster>.<epoch>-<lsn>.<made at>`, in URL-safe characters: a version, the cluster's identity, a position, and
unix seconds. Without a position (`0` in its place) it speaks of all that was committed when it was made. A signature may
follow; it is not of this module.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from aurora_router.core.positions import Position, WalPosition

LONGEST = 120  # characters, signature and all
DOTS = 3  # in a text without a signature
_FORM = re.compile(r"1\.([0-9A-Za-z_-]{1,36})\.(?:0|([0-9]{1,10})-([0-9A-F]{1,16}))\.([0-9]{1,12})", re.ASCII)


class Token(NamedTuple):
    """A commit of a cluster that a reader must have replayed.

    cluster: as ServerId.cluster. position: the writer's, asked for after the commit. made_at: unix seconds, rounded up.
    """

    cluster: str
    position: Position | None
    made_at: int

    def __str__(self) -> str:
        position = self.position.compact() if self.position is not None else "0"
        return f"1.{self.cluster}.{position}.{self.made_at}"

    @classmethod
    def parse(cls, text: str) -> Token:
        """The inverse of str(). Raises ValueError."""
        found = _FORM.fullmatch(text)
        if found is None:
            raise ValueError("not a consistency token")
        cluster, epoch, lsn, made_at = found.groups()
        return cls(cluster, None if epoch is None else WalPosition(int(epoch), int(lsn, 16)), int(made_at))


def later(one: Token, other: Token) -> Token:
    """The one that implies the other. Raises ValueError for tokens of two clusters.

    One without a position implies those that were made before it. Otherwise the newer epoch, then the longer log decides.
    """
    if one.cluster != other.cluster:
        raise ValueError("they are of two clusters")
    if one.position is None or other.position is None:
        return one if (one.made_at, one.position is None) > (other.made_at, other.position is None) else other
    if one.position.epoch != other.position.epoch:
        return one if one.position.epoch > other.position.epoch else other
    return one if one.position.covers(other.position) else other
