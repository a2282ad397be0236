"""Mark the objects that a reader has shown.

The marks are in InstanceState.info. So an object takes them along when it is detached, pickled, and added to another session.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from sqlalchemy import event, inspect
from sqlalchemy.engine import Connection
from sqlalchemy.orm import InstanceState, Mapper, Session
from sqlalchemy.orm.loading import _new_runid  # type: ignore[attr-defined,unused-ignore]

from aurora_router.routing.session_state import SessionState
from aurora_router.routing.stale_writes.loaded_values import LOADED_VALUES, changeable_columns, note_values
from aurora_router.routing.stale_writes.relationships import relationships_of
from aurora_router.routing.stale_writes.rows import by_mapper, lock_rows, row_of, with_locks
from aurora_router.routing.unit import Unit

LOADED_FROM_READER = "aurora_router.loaded_from_a_reader"
# On an object that a further attempt has loaded from the writer without a lock: the number of its unit.
LOADED_UNLOCKED = "aurora_router.loaded_unlocked"
# On an object that has been checked. Its collections have not.
COLLECTIONS_FROM_READER = "aurora_router.collections_from_a_reader"
# On an object: the collections that were replaced. On a class whose objects note that: changeable_columns().
REPLACED_COLLECTIONS = "aurora_router.replaced"


def mark_loaded(session: Any, state: InstanceState[Any]) -> None:
    """Mark an object that was loaded from a reader. This listens to the session's class, so other sessions pay nothing for it."""
    routing: SessionState = session.routing_state
    if routing.check_stale_writes:
        if _is_from_reader(routing, state.runid or 0):
            _mark(state)
        elif routing.intent.retry is not None:
            _mark_unlocked(routing, state)


def mark_refreshed(state: InstanceState[Any], context: Any, attributes: Collection[str] | None) -> None:
    """Mark an object that was loaded again from a reader. Remove the mark if the object has only values of the writer left.

    This listens to all mappers.
    """
    session: Any = state.session if context is None else getattr(context, "session", None)
    routing: SessionState | None = getattr(session, "routing_state", None)  # other sessions have none
    if routing is None or not routing.check_stale_writes:
        return
    columns = set(state.mapper.column_attrs.keys())
    if context is None:
        # SQLAlchemy has applied an UPDATE to the object. Values that it has computed from a reader's values must be read again.
        if LOADED_FROM_READER in state.info and (computed := columns.intersection(attributes or (), state.dict)):
            session.expire(state.object, computed)
    elif _is_from_reader(routing, context.runid):
        if attributes is None or not columns.isdisjoint(attributes):
            _mark(state, attributes)
    elif not routing.read_only and (attributes is None or columns.intersection(state.dict).issubset(attributes)):
        state.info.pop(LOADED_FROM_READER, None)
        state.info.pop(LOADED_VALUES, None)
        _mark_unlocked(routing, state)


def _is_from_reader(routing: SessionState, asked: int) -> bool:
    """Return whether the values just loaded into an object came from a reader, and must be checked before it is written.

    asked: when the statement was executed, as SQLAlchemy counts. A stream may yield rows of a reader long after the unit moved.
    """
    unit = routing.unit
    if unit is None:
        return routing.read_only is None
    return unit.intent.read_only is None and (not unit.place.on_writer or asked < unit.on_writer_since)


def _mark_unlocked(routing: SessionState, state: InstanceState[Any]) -> None:
    """Mark an object of the writer whose row a further attempt has not locked.

    No attempt before has found that row stale, but the function may take another way now. So the row is compared, too, as long as
    the unit has written nothing. After that, the unit's own statements and their triggers may have changed the row, and a
    difference proves nothing.
    """
    unit, retry = routing.unit, routing.intent.retry
    if unit is None or retry is None or not retry.rows_to_lock or unit.wrote:
        return
    if row_of(state) not in retry.rows_to_lock:
        state.info[LOADED_UNLOCKED] = unit.number


def on_moved_to_writer(unit: Unit, connection: Connection) -> None:
    """Note that an automatic unit has come to the writer, and lock the rows that earlier attempts have read stale.

    From here on the unit reads on the writer. The locks keep others from changing those rows before this attempt does.
    """
    unit.on_writer_since = _new_runid()
    if unit.intent.retry is not None and unit.intent.retry.rows_to_lock:
        stale, wrote = by_mapper(unit.intent.retry.rows_to_lock), unit.wrote
        with_locks(connection, [mapper for mapper, _ in stale], lambda: [lock_rows(connection, *each) for each in stale])
        unit.wrote = wrote  # a lock changes nothing


def is_marked(unit: Unit, state: InstanceState[Any]) -> bool:
    """Return whether the row of an object may be another by now than the object shows. It was not checked since it was loaded."""
    return LOADED_FROM_READER in state.info or (state.info.get(LOADED_UNLOCKED) == unit.number and not unit.wrote)


def is_unchecked(unit: Unit, state: InstanceState[Any]) -> bool:
    """Return whether an object of a unit must be checked before it is written. What the unit has deleted itself need not."""
    return state.key is not None and is_marked(unit, state) and not state.was_deleted


def has_collections_from_reader(state: InstanceState[Any]) -> bool:
    """Return whether a reader may have shown the collections of an object."""
    return LOADED_FROM_READER in state.info or COLLECTIONS_FROM_READER in state.info


def mark_checked(state: InstanceState[Any]) -> None:
    """Note that an object is as the writer has it, except for its collections."""
    state.info.pop(LOADED_UNLOCKED, None)
    state.info.pop(LOADED_VALUES, None)
    if state.info.pop(LOADED_FROM_READER, False):
        state.info[COLLECTIONS_FROM_READER] = True


def remove_marks(state: InstanceState[Any]) -> None:
    """Remove the marks of an object that has nothing left from a reader."""
    for each in (LOADED_FROM_READER, LOADED_UNLOCKED, LOADED_VALUES, COLLECTIONS_FROM_READER, REPLACED_COLLECTIONS):
        state.info.pop(each, None)


def marked(instances: Iterable[object]) -> list[InstanceState[Any]]:
    """Return the objects that carry a mark."""
    states: Iterable[InstanceState[Any]] = map(inspect, instances)
    return [
        each for each in states if each.key is not None and not each.info.keys().isdisjoint((LOADED_FROM_READER, LOADED_UNLOCKED))
    ]


def marked_by_key(session: Session, mapper: Mapper[Any], mappings: Iterable[Mapping[str, Any]]) -> list[InstanceState[Any]]:
    """Return the marked objects of a session that have their primary keys in these mappings."""
    keys = [mapper.get_property_by_column(column).key for column in mapper.primary_key]
    rows = (tuple(mapping.get(key) for key in keys) for mapping in mappings)
    instances = (session.identity_map.get(mapper.identity_key_from_primary_key(row)) for row in rows)
    return marked(instance for instance in instances if instance is not None)


def _mark(state: InstanceState[Any], loaded: Collection[str] | None = None) -> None:
    """Mark an object of a reader.

    loaded: the attributes that were loaded. None: all that the object has.
    """
    state.info[LOADED_FROM_READER] = True
    changeable = state.manager.info.get(REPLACED_COLLECTIONS)
    if changeable is None:
        changeable = state.manager.info[REPLACED_COLLECTIONS] = changeable_columns(state.mapper)
        for each in relationships_of(state.mapper).having:
            if each.uselist:
                event.listen(getattr(state.mapper.class_, each.key), "dispose_collection", _mark_replaced, raw=True)
    if changeable:
        note_values(state, changeable, loaded)


def _mark_replaced(state: InstanceState[Any], _: Any, adapter: Any) -> None:
    """Note that a collection was replaced. The new one may have just the members that the reader has shown."""
    state.info[REPLACED_COLLECTIONS] = {*state.info.get(REPLACED_COLLECTIONS, ()), adapter.attr.key}
