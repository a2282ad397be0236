"""The collections that a reader has shown, when a flush changes them or deletes their owners."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Set
from typing import Any

from sqlalchemy import inspect, select
from sqlalchemy.engine import Connection
from sqlalchemy.orm import InstanceState, Mapper, RelationshipProperty, aliased, selectinload, with_parent

from aurora_router.routing.session_state import SessionState
from aurora_router.routing.stale_writes.comparison import Differences, is_checkable, stale_read
from aurora_router.routing.stale_writes.marks import COLLECTIONS_FROM_READER, REPLACED_COLLECTIONS, has_collections_from_reader
from aurora_router.routing.stale_writes.relationships import following_of, relationships_of
from aurora_router.routing.stale_writes.rows import Key, as_asked, has_key, portions, row_of
from aurora_router.routing.unit import Unit


def check_members(
    session: Any, connection: Connection, unit: Unit, flushed: Mapping[InstanceState[Any], tuple[bool, bool]]
) -> None:
    """Raise StaleRead if a flush changes a collection that a reader has shown, and the writer has more in it.

    The writer may also have more because a query has left members out, or because the unit has written them. These cases look the
    same as a late reader. One more attempt on the writer is right in each of them. So only units that can run again are checked.

    flushed: the objects of the flush, as UOWTransaction.states has them.
    """
    found: Differences = {}
    for (mapper, relationship), states in _changed(flushed).items():
        if is_checkable(session, mapper, connection) and session.serves(relationship.mapper, connection):
            shown = {row_of(state)[1]: _members(state, relationship) for state in states}
            for key, child in _present_members(session, mapper, relationship, [*shown]):
                if _is_hidden(session, child, shown.get(key, frozenset())):
                    found[mapper, key] = (*found.get((mapper, key), ()), relationship.key)
    if found:
        raise stale_read(unit.intent.retry, {row: (*dict.fromkeys(names),) for row, names in found.items()})


def _changed(
    flushed: Mapping[InstanceState[Any], tuple[bool, bool]],
) -> dict[tuple[Mapper[Any], RelationshipProperty[Any]], list[InstanceState[Any]]]:
    """Return the owners of the collections that a reader has shown and that a flush changes.

    A flush changes a collection if it replaces it, removes something from it, or changes the key that its members refer to. A
    collection that was replaced or emptied was meant as a whole. An addition does not depend on the members that were shown. It
    does if it takes the place of a member with the same key.
    """
    changed: dict[tuple[Mapper[Any], RelationshipProperty[Any]], list[InstanceState[Any]]] = {}
    for state, (deleted, _) in flushed.items():
        if state.key is not None and has_collections_from_reader(state):
            following, replaced = following_of(state), state.info.pop(REPLACED_COLLECTIONS, ())
            for each in relationships_of(state.mapper).having:
                if each.key in state.committed_state and (
                    deleted
                    or not each.uselist
                    or each in following
                    or each.key in replaced
                    or _is_unset(state, each)
                    or isinstance(state.dict.get(each.key), dict)
                    or state.attrs[each.key].history.deleted
                ):
                    changed.setdefault((state.mapper, each), []).append(state)
            for each in relationships_of(state.mapper).dynamic:
                if each.key in state.committed_state and not deleted:
                    history = state.attrs[each.key].history
                    if history.deleted or not history.added:  # else it was only added to, as far as one can see
                        changed.setdefault((state.mapper, each), []).append(state)
    return changed


def _is_unset(state: InstanceState[Any], relationship: RelationshipProperty[Any]) -> bool:
    """Return whether a changed collection was deleted as an attribute (`del order.lines`). It then has no history."""
    return bool(relationship.uselist) and relationship.key not in state.dict


def _members(state: InstanceState[Any], relationship: RelationshipProperty[Any]) -> Set[Any] | None:
    """Return the keys of the members of a collection, and of those that were removed from it since it was loaded.

    None if its history does not name all of them.
    """
    if relationship.lazy == "dynamic" or _is_unset(state, relationship):
        return None
    return {inspect(child).key for child in state.attrs[relationship.key].history.sum() if child is not None}


def _present_members(
    session: Any, mapper: Mapper[Any], relationship: RelationshipProperty[Any], keys: list[Key]
) -> Iterator[tuple[Key, Any]]:
    """Yield the members that the writer has in the collections of these owners.

    Each member is a pair of the owner's primary key and the member's identity key.
    """
    other = relationship.mapper
    child = aliased(other)
    owner = [getattr(mapper.class_, mapper.get_property_by_column(column).key) for column in mapper.primary_key]
    member = [getattr(child, other.get_property_by_column(column).key) for column in other.primary_key]
    wanted = select(*owner, *member).join(getattr(mapper.class_, relationship.key).of_type(child))
    for asked in portions(keys):
        some, known_as = wanted.where(has_key(mapper, asked)), as_asked(asked)
        for row in session.execute(some, bind_arguments={"mapper": mapper}):
            yield known_as(tuple(row[: len(owner)])), other.identity_key_from_primary_key(tuple(row[len(owner) :]))


def _is_hidden(session: Any, key: Any, members: Set[Any] | None) -> bool:
    """Return whether a reader has not shown a member of a collection.

    It is not hidden if this session has inserted the row itself, and never read it.

    members: those known from the collection's history. None: whatever the session has loaded may be a member.
    """
    known = session.identity_map.get(key)
    if members is None:
        return known is None
    return key not in members and (known is None or inspect(known).runid is not None)


def read_collections_again(session: Any) -> None:
    """Read a reader's collections again on the writer, if their owners are to be deleted or to get another key.

    Members that the reader has not shown would stay behind, or stand in the way. A collection that was changed is left as it is
    (see check_members()).
    """
    done: set[InstanceState[Any]] = set()
    dirty: list[InstanceState[Any]] = [*map(inspect, session.dirty)]
    doomed = [*map(inspect, session.deleted), *_orphans(dirty)]
    if doomed:
        # This moves the unit to the writer, because the flush loads rows that decide its writes.
        session.get_bind(doomed[0].mapper)
    while doomed:
        done.update(doomed)
        _read_again(session, ((state, relationships_of(state.mapper).owned) for state in doomed))
        for state in doomed:
            state.info.pop(COLLECTIONS_FROM_READER, None)
        children = {child for state in doomed for child in _children(session, state)}
        doomed = [*(children - done)]
    _read_again(session, ((state, following_of(state)) for state in dirty if state not in done))


def _orphans(dirty: Iterable[InstanceState[Any]]) -> Iterator[InstanceState[Any]]:
    """Yield the objects that the flush will find to be orphans."""
    for state in dirty:
        for relationship in relationships_of(state.mapper).orphaning:
            if relationship.key in state.committed_state:
                for child in state.attrs[relationship.key].history.deleted:
                    if child is not None and (known := inspect(child)).key is not None:
                        yield known


def _read_again(session: Any, wanted: Iterable[tuple[InstanceState[Any], Collection[RelationshipProperty[Any]]]]) -> None:
    """Read these collections of objects on the writer, as far as a reader has shown them."""
    found: dict[Mapper[Any], tuple[list[InstanceState[Any]], set[RelationshipProperty[Any]]]] = {}
    for state, relationships in wanted:
        if has_collections_from_reader(state) and state.session is not None:
            loaded = [each.key for each in relationships if each.key in state.dict and each.key not in state.committed_state]
            if loaded:
                session.expire(state.object, loaded)
                states, missing = found.setdefault(state.mapper, ([], set()))
                states.append(state)
                missing.update(each for each in relationships if each.key not in state.dict)
    for mapper, (states, missing) in found.items():
        options = [selectinload(each.class_attribute) for each in missing]
        for keys in portions([row_of(state)[1] for state in states]):
            some = select(mapper).where(has_key(mapper, keys)).options(*options)
            session.execute(some, bind_arguments={"mapper": mapper}).unique().all()


def _children(session: Any, state: InstanceState[Any]) -> Iterator[InstanceState[Any]]:
    """Yield the objects that are deleted along with an object: loaded ones, and the present members of dynamic relationships."""
    for relationship in relationships_of(state.mapper).owned:
        if relationship.cascade.delete and relationship.key in state.dict:
            for child in state.attrs[relationship.key].history.non_deleted():
                if child is not None and (known := inspect(child)).key is not None:
                    if state.object in session.deleted and child not in session.deleted:
                        session.delete(child)
                    yield known
    routing: SessionState = session.routing_state
    if routing.read_only is None and state.object in session.deleted:
        for relationship in relationships_of(state.mapper).dynamic:
            if relationship.passive_deletes or not relationship.cascade.delete:
                continue
            now = select(relationship.mapper).where(with_parent(state.object, relationship.class_attribute))
            for child in session.scalars(now, bind_arguments={"mapper": relationship.mapper}).unique().all():
                if child not in session.deleted:
                    session.delete(child)
                yield inspect(child)
