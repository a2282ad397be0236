"""Tokens: a requirement for later reads, as a text for cookies, headers and messages.

The text is `1.<cluster>.<position>.<made at>`, in URL-safe characters: a version, the cluster's identity, a position, and
unix milliseconds. A position of PostgreSQL is `<epoch>-<lsn>`. Other kinds of positions begin with a letter. If no position was
known, or none is short enough, there is a `0` in its place. Such a token stands for all commits before it was made. A
signature may follow after one more dot. This module knows only its form.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Final, NamedTuple

from aurora_router.core.gtid import GtidSet, MariadbGtid
from aurora_router.core.positions import Position, Requirement, Sample, WalPosition, first_sample_after

LONGEST = 120  # characters, including the signature
SIGNATURE = 44  # characters of a signature and the dot before it
SKEW = 1.0  # seconds that the clocks of two hosts may differ
_FORM = re.compile(r"1\.([0-9A-Za-z_-]{1,36})\.([0-9A-Za-z_-]{1,60})\.([0-9]{1,15})", re.ASCII)
# 32 bytes in base64. The last character has two unused bits. They must be zero, so that there is only one spelling.
_SIGNATURE = re.compile(r"[0-9A-Za-z_-]{42}[048AEIMQUYcgkosw]", re.ASCII)
_KINDS: Final[Mapping[str, Callable[[str], Position]]] = {"a": MariadbGtid.from_token, "m": GtidSet.from_token}


class Token(NamedTuple):
    """The requirement that a reader has replayed all that a cluster had committed at a moment.

    cluster: as ServerId.cluster.
    position: the writer's position, asked for after that moment; None if there is none.
    made_at: that moment, in unix milliseconds, rounded up.
    """

    cluster: str
    position: Position | None
    made_at: int

    def __str__(self) -> str:
        if self.position is not None and (short := self.position.to_token()):
            text = f"1.{self.cluster}.{short}.{self.made_at}"
            if len(text) <= LONGEST - SIGNATURE:
                return text
        return f"1.{self.cluster}.0.{self.made_at}"

    @classmethod
    def parse(cls, text: str) -> Token:
        """Parse a text made by str(), which may lack the position. Raises ValueError."""
        found = _FORM.fullmatch(text)
        if found is None:
            raise ValueError("not a consistency token")
        cluster, short, made_at = found.groups()
        try:
            position = None if short == "0" else _KINDS.get(short[0], WalPosition.from_token)(short)
        except ValueError:
            raise ValueError("not a consistency token") from None
        return cls(cluster, position, int(made_at))


def strip_signature(text: str) -> str | None:
    """Return the text before the signature; None if there is no signature in its only valid spelling."""
    before, _, signature = text.rpartition(".")
    return before if _SIGNATURE.fullmatch(signature) else None


def strongest(tokens: Sequence[Token]) -> Token:
    """Return the token that implies the others.

    Raises ValueError for tokens of several clusters.

    Of two tokens with positions, the newer epoch decides, and then the further position. If neither position covers the other,
    the writer has changed between them. Then the token that was made later decides, because its position came after the other.
    A token without a position counts, unless one with a position is later by more than the clocks of two hosts may differ.
    """
    if any(token.cluster != tokens[0].cluster for token in tokens):
        raise ValueError("they are of two clusters")
    blank: Token | None = None
    placed: tuple[Token, Position] | None = None
    for token in tokens:
        if token.position is None:
            if blank is None or token.made_at > blank.made_at:
                blank = token
        elif placed is None or _is_later(token.position, placed[1], token.made_at > placed[0].made_at):
            placed = token, token.position
    if placed is not None and (blank is None or placed[0].made_at > blank.made_at + SKEW * 1000):
        return placed[0]
    assert blank is not None  # there is at least one
    return blank


def _is_later(one: Position, other: Position, made_later: bool) -> bool:
    if one.epoch != other.epoch:
        return one.epoch > other.epoch
    if one.covers(other) or other.covers(one):
        return one.covers(other)
    return made_later


def refresh(requirement: Requirement, samples: tuple[Sample, ...], since: float, now: float) -> Requirement:
    """Return the requirement for a token, as of the moment at which its position was asked for.

    That moment is not before `since`, so that the token counts for long enough.

    samples: the writer's, oldest first.
    since, now: monotonic seconds.
    """
    proof = first_sample_after(samples, max(requirement.since, since))
    if proof is not None and (requirement.position is None or proof.position.covers(requirement.position)):
        return Requirement(proof.asked_at, proof.position.epoch, proof.position)
    return (
        requirement if requirement.is_from_token or requirement.acknowledged_at >= since else Requirement(now, requirement.epoch)
    )
