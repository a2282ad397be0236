"""What the router notes of a driver's connection. Notes stand beside it, because connections of some drivers have `__slots__`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary


@dataclass(slots=True, eq=False)
class ConnectionNotes:
    """The notes of one connection.

    listened: whether a listener of the application may have changed the connection's settings since the router set them.
    is_shared: whether a pooler may give the server's side to other clients between two transactions.
    crashes: the codes by which the server has reported that another server process has crashed.
    held_cursors: cursors that outlive their transactions, by their names. Each value returns the cursor, or None if it is gone.
    """

    listened: Callable[[], bool]
    is_shared: bool = False
    crashes: list[str] = field(default_factory=list)
    held_cursors: dict[str, Callable[[], Any]] = field(default_factory=dict)


_notes: WeakKeyDictionary[Any, ConnectionNotes] = WeakKeyDictionary()


def keep_notes(connection: Any, notes: ConnectionNotes) -> None:
    """Keep the notes of a connection as long as the connection lives."""
    _notes[connection] = notes


def notes_of(connection: Any) -> ConnectionNotes:
    """Return the notes of a connection. They are there from `prepare_connection()` on."""
    return _notes[connection]


def has_notes(connection: Any) -> bool:
    """Return whether a connection is prepared."""
    return connection in _notes
