"""The relationships of a mapper, by what a flush does to the objects at their other side."""

from __future__ import annotations

from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from sqlalchemy.orm import InstanceState, Mapper, RelationshipDirection, RelationshipProperty


class Relationships(NamedTuple):
    """The relationships of a mapper.

    having: those to objects that refer to this one, loaded as a whole.
    owned: as `having`, if a flush that deletes this object also deletes the others or clears their foreign keys.
    orphaning: those with the cascade "delete-orphan".
    dynamic: those of lazy="dynamic".
    following: as `having`, if a flush that changes the key also changes it in the objects that refer to it.
    collections: the keys of all relationships to several objects.
    """

    having: tuple[RelationshipProperty[Any], ...]
    owned: tuple[RelationshipProperty[Any], ...]
    orphaning: tuple[RelationshipProperty[Any], ...]
    dynamic: tuple[RelationshipProperty[Any], ...]
    following: tuple[RelationshipProperty[Any], ...]
    collections: frozenset[str]


_relationships: WeakKeyDictionary[Mapper[Any], Relationships] = WeakKeyDictionary()


def relationships_of(mapper: Mapper[Any]) -> Relationships:
    """Return the relationships of a mapper. They are found once."""
    found = _relationships.get(mapper)
    if found is None:
        far = [r for r in mapper.relationships if r.direction is not RelationshipDirection.MANYTOONE and not r.viewonly]
        having = tuple(r for r in far if r.lazy not in ("dynamic", "write_only", "noload"))
        found = _relationships[mapper] = Relationships(
            having,
            tuple(r for r in having if not r.passive_deletes),
            tuple(r for r in mapper.relationships if r.cascade.delete_orphan),
            tuple(r for r in far if r.lazy == "dynamic"),
            tuple(r for r in having if not r.passive_updates),
            frozenset(r.key for r in mapper.relationships if r.uselist),
        )
    return found


def following_of(state: InstanceState[Any]) -> list[RelationshipProperty[Any]]:
    """Return the relationships whose objects refer to a column that was set. The flush gives these objects the new value."""
    following = relationships_of(state.mapper).following
    if not following:
        return []
    set_ = {column for p in state.mapper.column_attrs if p.key in state.committed_state for column in p.columns}
    return [each for each in following if not each.local_columns.isdisjoint(set_)]
