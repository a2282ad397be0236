"""What the isolation level of a unit asks of its instance. This module is pure.

Levels have the names that servers write, as `as_servers_say()` returns them. In each function:

asked: the level that the unit's session or engine asks for; None if nobody has asked for one.
of_servers: the servers' own default, which holds if nobody asks.
of_family: the default of the server family as it comes. Nobody has asked for it, so automatic units read on readers at it.
"""

from __future__ import annotations

from typing import Final

AUTOCOMMIT: Final = "autocommit"
_ON_READERS: Final = frozenset({AUTOCOMMIT, "read uncommitted", "read committed"})


def as_servers_say(level: str) -> str:
    """Return the name of a level, in any spelling that SQLAlchemy takes, as servers write it."""
    return level.replace("_", " ").lower()


def must_be_on_writer(asked: str | None, of_servers: str, of_family: str) -> bool:
    """Return whether an automatic unit must be on the writer."""
    if asked is None:
        return of_servers not in _ON_READERS and of_servers != of_family
    return asked not in _ON_READERS


def is_beyond_readers(asked: str | None, of_servers: str, refused: frozenset[str]) -> bool:
    """Return whether a reader refuses the statements of a unit.

    refused: the levels that readers of the family refuse.
    """
    return (of_servers if asked is None else asked) in refused


def has_snapshot(asked: str | None, of_servers: str, of_family: str, *, declared: bool) -> bool:
    """Return whether the statements of a unit's transaction must see one snapshot.

    declared: whether the unit is declared to read or to write. Such a unit has asked for its transaction, so the level of that
        counts, whoever chose it.
    """
    return must_be_on_writer(of_servers if asked is None and declared else asked, of_servers, of_family)
