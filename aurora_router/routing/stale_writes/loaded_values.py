"""Note the values that a reader has shown, as far as the application may change them in place.

SQLAlchemy keeps no copy of such a value (a dict of JSON, a list). So its history has the changed value in the place of the loaded
one. Only a note tells that the value is another by now.
"""

from __future__ import annotations

import pickle
import zlib
from collections.abc import Collection
from typing import Any

from sqlalchemy import TypeDecorator
from sqlalchemy.orm import InstanceState, Mapper
from sqlalchemy.types import TypeEngine

LOADED_VALUES = "aurora_router.loaded_values"
"""On an object: the checksums of the values that may be changed in place, by attribute."""


def changeable_columns(mapper: Mapper[Any]) -> tuple[str, ...]:
    """Return the attributes whose columns may have values that can be changed in place."""
    return tuple(each.key for each in mapper.column_attrs if _may_have_changeable_values(each.columns[0].type))


def _may_have_changeable_values(kind: TypeEngine[Any]) -> bool:
    try:
        return isinstance(kind, TypeDecorator) or _is_changeable(kind.python_type)
    except NotImplementedError:  # SQLAlchemy 2.1 has `object` instead
        return True


def _is_changeable(kind: type[Any]) -> bool:
    """Return whether values of a type may be changed in place. A value with a hash of its own should never change."""
    own: Any = kind.__hash__
    return own is None or own is object.__hash__


def note_values(state: InstanceState[Any], names: Collection[str], loaded: Collection[str] | None) -> None:
    """Note the values of an object that were just loaded.

    names: the attributes whose values may be changed in place.
    loaded: the attributes that were loaded. None: all that the object has.
    """
    fresh = [name for name in names if loaded is None or name in loaded]
    notes = {name: note for name, note in state.info.get(LOADED_VALUES, {}).items() if name not in fresh}
    for name in fresh:
        value = state.dict.get(name)
        if _is_changeable(type(value)) and (note := _checksum(value)) is not None:
            notes[name] = note
    state.info[LOADED_VALUES] = notes


def is_as_loaded(state: InstanceState[Any], name: str, value: Any) -> bool:
    """Return whether a value of an object was not changed in place, as far as that was noted."""
    note = state.info.get(LOADED_VALUES, {}).get(name)
    return note is None or note == _checksum(value)


def _checksum(value: Any) -> int | None:
    """Return a checksum of a value; None if it cannot be pickled.

    A MutableDict has the checksum of its dict, because SQLAlchemy may wrap the dict after it was noted.
    """
    for plain in (dict, list):
        if isinstance(value, plain):
            value = plain(value)
    try:
        return zlib.crc32(pickle.dumps(value))
    except Exception:
        return None
