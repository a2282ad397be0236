"""Prevent lost updates from stale reads: compare an object that a reader has shown with the writer, before it is written.

An object that was loaded from a reader carries a mark in its InstanceState.info, and so takes it along to other sessions. A
flush first reads and locks the rows of the marked objects that it is to change. If a row differs from what was loaded, the
flush raises StaleRead. The next run of run_transaction() locks those rows before it reads anything. So it needs no luck, however
many units want the same rows. Changes by its own triggers and Core statements are then not taken for changes by others.

Objects that are given to bulk_save_objects() or named in bulk_update_mappings() are checked in the same way, before the bulk
statement changes their rows. Other statements of Core and the ORM write rows, not objects, and are not checked.

A collection from which something was removed is also compared with the writer. Otherwise the members that a reader has not
shown would stay.
"""

from __future__ import annotations

import contextlib
import pickle
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar
from weakref import WeakKeyDictionary

from sqlalchemy import Table, bindparam, event, inspect, select, tuple_
from sqlalchemy.engine import Connection, Dialect, Engine
from sqlalchemy.exc import NotSupportedError
from sqlalchemy.orm import (
    InstanceState,
    Mapper,
    RelationshipDirection,
    RelationshipProperty,
    Session,
    aliased,
    selectinload,
    with_parent,
)
from sqlalchemy.orm.loading import _new_runid  # type: ignore[attr-defined,unused-ignore]
from sqlalchemy.schema import sort_tables_and_constraints
from sqlalchemy.sql.expression import ColumnElement, FromClause, Join

from aurora_router.error_classification import FACTS, classify_error
from aurora_router.errors import StaleRead
from aurora_router.pooling import UNIT
from aurora_router.unit import Row, Run, Unit

R = TypeVar("R")

MARK = "aurora_router.loaded_from_a_reader"
COLLECTIONS = "aurora_router.collections_from_a_reader"  # on an object that has been checked
# On an object: the collections that were replaced. On a class: whether its objects note that.
REPLACED = "aurora_router.replaced"
ROWS_AT_ONCE = 1000  # the most that one SELECT asks for


# -- what is marked -----------------------------------------------------------------------------------------------


def loaded(session: Any, state: InstanceState[Any]) -> None:
    """Mark an object that was loaded from a reader. This listens to the session's class, so other sessions pay nothing for it."""
    if session._guarding and _doubtful(session, state, state.runid or 0):
        _mark(state)


def _mark(state: InstanceState[Any]) -> None:
    state.info[MARK] = True
    if REPLACED not in state.manager.info:
        state.manager.info[REPLACED] = True
        for each in _relationships_of(state.mapper).having:
            if each.uselist:
                event.listen(getattr(state.mapper.class_, each.key), "dispose_collection", _replaced, raw=True)


def _refreshed(state: InstanceState[Any], context: Any, attributes: Collection[str] | None) -> None:
    """Mark an object that was loaded again from a reader. Remove the mark if the object has only values of the writer left."""
    session: Any = state.session if context is None else getattr(context, "session", None)
    if not getattr(session, "_guarding", False):
        return
    columns = set(state.mapper.column_attrs.keys())
    if context is None:
        # SQLAlchemy has carried an UPDATE over to the object. What it has computed from a reader's values must be read again.
        if MARK in state.info and (computed := columns.intersection(attributes or (), state.dict)):
            session.expire(state.object, computed)
    elif _doubtful(session, state, context.runid):
        if attributes is None or not columns.isdisjoint(attributes):
            _mark(state)
    elif not session._read_only and (attributes is None or columns.intersection(state.dict).issubset(attributes)):
        state.info.pop(MARK, None)


def _doubtful(session: Any, state: InstanceState[Any], asked: int) -> bool:
    """Return whether the values just loaded into an object must be checked before the object is written.

    asked: when the statement was executed, as SQLAlchemy counts. Rows of a reader may be read on long after the unit has moved.
    """
    unit: Unit | None = session._unit
    if unit is None:
        return session._read_only is None
    if unit.read_only is not None:
        return False
    if not unit.on_writer or asked < unit.on_writer_since:
        return True
    return unit.run is not None and bool(unit.run.stale) and _row(state) not in unit.run.stale


def on_writer(unit: Unit, connection: Connection) -> None:
    """Note that an automatic unit has come to the writer, and lock the rows that earlier runs have read stale.

    From here on the unit reads on the writer. The locks keep others from changing those rows before this run does.
    """
    unit.on_writer_since = _new_runid()
    if unit.run is not None and unit.run.stale:
        stale = _by_mapper(unit.run.stale)
        _looking(connection, [mapper for mapper, _ in stale], lambda: [_lock(connection, *each, ()) for each in stale])


# -- what is checked ----------------------------------------------------------------------------------------------


def _before_save(mapper: Mapper[Any], connection: Connection, state: InstanceState[Any]) -> None:
    if hasattr(connection, UNIT):
        _before_write(connection, state, deleted=False)


def _before_delete(mapper: Mapper[Any], connection: Connection, state: InstanceState[Any]) -> None:
    if hasattr(connection, UNIT):
        _before_write(connection, state, deleted=True)


def _before_write(connection: Connection, state: InstanceState[Any], *, deleted: bool) -> None:
    """Check all objects that a flush is to change, when it comes to the first one.

    That is after all listeners of before_flush, and before any statement, because its triggers might change rows. If the flush
    finds more objects to change later, they are checked then.
    """
    session: Any = state.session
    unit: Unit = getattr(connection, UNIT)
    if not getattr(session, "_guarding", False) or unit.read_only or unit is not session._unit:
        return
    if session._unchecked:
        session._unchecked = False
        if len(session.identity_map):  # else all is new
            if unit.run is not None and not unit.run.on_writer:
                _check_members(session, unit)
            _check(session, connection, unit, _to_be_written(session))
    if state.key is None:
        # A copy (make_transient()) of what a reader has shown is inserted. It has nothing left of that row.
        for each in (MARK, COLLECTIONS, REPLACED):
            state.info.pop(each, None)
    elif _in_doubt(state) and (deleted or _assigned(state)):
        _check(session, connection, unit, _to_be_written(session))


def flush_begins(session: Any, context: Any, _: Any) -> None:
    """Keep the context of a flush. This listens to the session's class, so it comes before the listeners of one session."""
    session._flush_context = context
    if not session._listens_last:
        listeners_end(session)


def listeners_end(session: Any, *_: Any) -> None:
    """Read again the collections whose members a flush is to change along with their owners."""
    if session._guarding and not session._read_only and len(session.identity_map):  # else all is new
        _read_collections_anew(session)


def listen_last(session: Any) -> None:
    """Let listeners_end() come after the application's listeners of before_flush, which may change and delete objects."""
    *_, last = session.dispatch.before_flush
    if last is not flush_begins and last is not listeners_end:
        if session._listens_last:
            event.remove(session, "before_flush", listeners_end)
        event.listen(session, "before_flush", listeners_end)
        session._listens_last = True


def _to_be_written(session: Any) -> Iterator[InstanceState[Any]]:
    """Yield the marked objects that the flush is to write, as far as it knows by now.

    An object in which nothing was set is among them if another object's relationship changes its row. It is the child of a new
    parent, or of a parent whose primary key has changed. So is an object in which something was set to what it was. SQLAlchemy
    sends nothing for it, but the writer may have another value.
    """
    for state, (deleted, _) in session._flush_context.states.items():
        if _in_doubt(state) and (deleted or not state.modified or _assigned(state)):
            yield state


def _in_doubt(state: InstanceState[Any]) -> bool:
    """Return whether a reader has shown an object and it was not checked since, unless the unit has deleted its row itself."""
    return state.key is not None and MARK in state.info and not state.was_deleted


def is_by_values(session: Any, statement: Any, options: Mapping[str, Any] | None) -> bool:
    """Return whether SQLAlchemy would carry an UPDATE or DELETE over to objects by values that a reader has shown.

    By itself SQLAlchemy ("auto") applies the WHERE to the values in the objects.
    """
    if session._read_only or not (getattr(statement, "is_update", False) or getattr(statement, "is_delete", False)):
        return False
    mapper = mapper_of(statement)
    how = {**statement.get_execution_options(), **(options or {})}.get("synchronize_session", "auto")
    if mapper is None or how != "auto":
        return False
    return any(MARK in state.info and state.mapper.isa(mapper) for state in session.identity_map.all_states())


def mapper_of(statement: Any) -> Mapper[Any] | None:
    """Return the mapper whose rows an UPDATE or DELETE of the ORM changes; None for a statement of Core."""
    try:
        entity = statement.entity_description.get("entity")
    except (AttributeError, KeyError):  # KeyError: SQLAlchemy takes a table with a WHERE of the ORM's for an entity
        return None
    return None if entity is None else inspect(entity).mapper


def named(session: Session, mapper: Mapper[Any], mappings: Iterable[Mapping[str, Any]]) -> list[InstanceState[Any]]:
    """The marked objects of a session whose primary keys are in these mappings."""
    keys = [mapper.get_property_by_column(column).key for column in mapper.primary_key]
    rows = (tuple(mapping.get(key) for key in keys) for mapping in mappings)
    instances = (session.identity_map.get(mapper.identity_key_from_primary_key(row)) for row in rows)
    return marked(instance for instance in instances if instance is not None)


def marked(instances: Iterable[object]) -> list[InstanceState[Any]]:
    """Return the objects that a reader has shown and that were not checked since."""
    states: Iterable[InstanceState[Any]] = map(inspect, instances)
    return [state for state in states if state.key is not None and MARK in state.info]


def check_bulk(session: Any, connection: Connection, states: list[InstanceState[Any]]) -> None:
    """Check objects before a bulk statement changes their rows. Raises StaleRead."""
    unit: Unit | None = getattr(connection, UNIT, None)
    if unit is not None and not unit.read_only:
        _check(session, connection, unit, states)


def _assigned(state: InstanceState[Any]) -> bool:
    """Return whether anything but a collection was set, be it to the value that it had."""
    return not _relationships_of(state.mapper).collections.issuperset(state.committed_state)


def _check(session: Any, connection: Connection, unit: Unit, states: Iterable[InstanceState[Any]]) -> None:
    """Raise StaleRead if a row differs from what its object was loaded with. Otherwise lock the rows, and remove the marks.

    Rows for which nothing is sent are compared, but not locked. Their objects keep the marks.
    """
    found: dict[Row, tuple[str, ...]] = {}
    to_check, has_written = list(states), unit.wrote
    unsent = {_row(state) for state in to_check if _is_unsent(session, state)}
    exposed = [state for state in to_check if not _has_version(session, state)]
    checkable = {mapper for mapper in {state.mapper for state in exposed} if _checkable(session, mapper, connection)}
    known = {_row(state): shown for state in exposed if state.mapper in checkable and (shown := _shown(state))}
    asked = [
        (mapper, {key: known[mapper, key] for key in keys}, rows is not unsent)
        for rows in (known.keys() - unsent, unsent)
        for mapper, keys in _by_mapper({row: known[row] for row in known if row in rows})
    ]
    for differing in _looking(connection, checkable, lambda: [_differing(connection, *each) for each in asked]):
        found.update(differing)
    if found:
        if unit.run is not None and has_written:
            # The unit's own statements may have changed these rows, and may change more rows of the same kind.
            mappers = {mapper for mapper, _ in found}
            others = (state for state in session.identity_map.all_states() if state.mapper in mappers and MARK in state.info)
            unit.run.found_stale = unit.run.found_stale.union(map(_row, others))
        raise _stale(unit.run, found)
    for state in to_check:
        if _row(state) not in unsent:
            state.info.pop(MARK, None)
            state.info[COLLECTIONS] = True


def _differing(
    connection: Connection, mapper: Mapper[Any], known: dict[tuple[Any, ...], dict[str, Any]], lock: bool
) -> dict[Row, tuple[str, ...]]:
    """Return each row that differs, with the columns that differ, or with none if the row is gone.

    known: the values that the columns were loaded with, by primary key.
    lock: whether the rows are locked.

    If values without an equality of their own seem to differ, they are read once more. If two reads of the locked row differ,
    too, such values cannot be compared, and prove nothing.
    """
    loaded_of_some = set().union(*known.values())
    asked = {p.key: p.columns[0] for p in mapper.column_attrs if p.key in loaded_of_some}

    def look(keys: list[tuple[Any, ...]]) -> dict[tuple[Any, ...], dict[str, Any]]:
        rows = _lock(connection, mapper, keys, asked.values(), lock)
        return {key: dict(zip(asked, row, strict=True)) for key, row in rows.items()}

    def same(name: str, one: Any, other: Any) -> bool:
        return _same(connection.dialect, asked[name], one, other)

    now = look([*known])
    found: dict[Row, tuple[str, ...]] = {}
    doubtful: list[tuple[tuple[Any, ...], str]] = []
    for key, values in known.items():
        if key not in now:
            found[mapper, key] = ()
            continue
        for name, shown in values.items():
            if not same(name, shown, now[key][name]):
                if shown is None or _has_equality(now[key][name]):
                    found[mapper, key] = (*found.get((mapper, key), ()), asked[name].name)
                else:
                    doubtful.append((key, name))
    again = look([*dict.fromkeys(key for key, _ in doubtful)])
    for key, name in doubtful:
        if same(name, now[key][name], again[key][name]):
            found[mapper, key] = (*found.get((mapper, key), ()), asked[name].name)
    return found


def _has_equality(value: Any) -> bool:
    """Return whether a value may be equal to a value other than itself."""
    equality: Any = type(value).__eq__
    return value is None or equality is not object.__eq__


def _checkable(session: Any, mapper: Mapper[Any], connection: Connection) -> bool:
    """Return whether the rows of a mapper can be checked on the writer."""
    return _lockable(mapper.persist_selectable) and bool(session.serves(mapper, connection))


def _has_version(session: Any, state: InstanceState[Any]) -> bool:
    """Return whether the statement that writes an object compares a version."""
    return state.mapper.version_id_col is not None and not _is_unsent(session, state)


def _is_unsent(session: Any, state: InstanceState[Any]) -> bool:
    """Return whether SQLAlchemy sends no statement for an object, because things were only set to what they were."""
    if session._flush_context is None or not state.modified or state.object in session.deleted:
        return False
    return not session.is_modified(state.object, include_collections=False)


def _lockable(table: FromClause) -> bool:
    if isinstance(table, Join):
        return not (table.isouter or table.full) and _lockable(table.left) and _lockable(table.right)
    return isinstance(table, Table)


def _shown(state: InstanceState[Any]) -> dict[str, Any]:
    """Return the values that an object's columns were loaded with, unless they were replaced unseen, or changed in place."""
    tables, attributes = state.mapper.tables, state.attrs
    shown: dict[str, Any] = {}
    for property_ in state.mapper.column_attrs:
        if getattr(property_.columns[0], "table", None) in tables:
            history = attributes[property_.key].history
            for value in (*history.unchanged, *history.deleted):
                shown[property_.key] = value
    return shown


def _stale(run: Run | None, found: dict[Row, tuple[str, ...]]) -> StaleRead:
    (mapper, key), columns = next(iter(found.items()))
    error = StaleRead(mapper.class_.__name__, key, columns, len(found) - 1)
    if run is not None:
        run.found_stale = run.found_stale.union(found)
        run.failed = classify_error(error)
        setattr(error, FACTS, run.failed)
    return error


def _same(dialect: Dialect, column: ColumnElement[Any], shown: Any, now: Any) -> bool:
    """Return whether two values of a column are the same.

    Some values are equal to nothing (NaN), or only to themselves. Those are compared by what is sent to the server for them, and
    last by their pickles.
    """
    with contextlib.suppress(Exception):  # arrays of numpy compare element by element
        if column.type.compare_values(shown, now):
            return True
    with contextlib.suppress(Exception):
        send = column.type.dialect_impl(dialect).bind_processor(dialect)
        if send is not None and send(shown) == send(now):
            return True
    try:
        return pickle.dumps(shown) == pickle.dumps(now)
    except Exception:
        return False


# -- collections --------------------------------------------------------------------------------------------------


class _Relationships(NamedTuple):
    """The relationships of a mapper, by what a flush does to the objects at their other side.

    having: those to objects that refer to this one, loaded as a whole.
    owned: as `having`, if a flush that deletes this object also deletes the others or clears their foreign keys.
    orphaning: those with the cascade "delete-orphan".
    dynamic: those of lazy="dynamic" with the cascade "delete".
    following: as `having`, if a flush that changes what the others refer to also changes it in them.
    collections: the keys of all to several objects.
    """

    having: tuple[RelationshipProperty[Any], ...]
    owned: tuple[RelationshipProperty[Any], ...]
    orphaning: tuple[RelationshipProperty[Any], ...]
    dynamic: tuple[RelationshipProperty[Any], ...]
    following: tuple[RelationshipProperty[Any], ...]
    collections: frozenset[str]


_relationships: WeakKeyDictionary[Mapper[Any], _Relationships] = WeakKeyDictionary()


def _relationships_of(mapper: Mapper[Any]) -> _Relationships:
    found = _relationships.get(mapper)
    if found is None:
        far = [r for r in mapper.relationships if r.direction is not RelationshipDirection.MANYTOONE and not r.viewonly]
        having = tuple(r for r in far if r.lazy not in ("dynamic", "write_only", "noload"))
        found = _relationships[mapper] = _Relationships(
            having,
            tuple(r for r in having if not r.passive_deletes),
            tuple(r for r in mapper.relationships if r.cascade.delete_orphan),
            tuple(r for r in far if r.lazy == "dynamic" and r.cascade.delete and not r.passive_deletes),
            tuple(r for r in having if not r.passive_updates),
            frozenset(r.key for r in mapper.relationships if r.uselist),
        )
    return found


def _replaced(state: InstanceState[Any], _: Any, adapter: Any) -> None:
    """Note that a collection was replaced. The new one may have just the members that the reader has shown."""
    state.info[REPLACED] = {*state.info.get(REPLACED, ()), adapter.attr.key}


def _check_members(session: Any, unit: Unit) -> None:
    """Raise StaleRead if a flush changes a collection that a reader has shown, and the writer has more in it.

    To change means to replace the collection, to remove something from it, or to change the key that its members refer to. A
    collection that was replaced or emptied was meant as a whole. An addition does not depend on what was shown, unless it takes
    the place of a member with the same key.

    A query may have left something out, or the unit may have written it. That looks the same as a late reader, but one more run
    on the writer is right in any case. So only units that can run again are compared.
    """
    changed: dict[tuple[Mapper[Any], RelationshipProperty[Any]], list[InstanceState[Any]]] = {}
    for state, (deleted, _) in session._flush_context.states.items():
        if state.key is not None and (MARK in state.info or COLLECTIONS in state.info):
            following, replaced = _following(state), state.info.pop(REPLACED, ())
            for each in _relationships_of(state.mapper).having:
                if each.key in state.committed_state and (
                    deleted
                    or not each.uselist
                    or each in following
                    or each.key in replaced
                    or isinstance(state.dict.get(each.key), dict)
                    or state.attrs[each.key].history.deleted
                ):
                    changed.setdefault((state.mapper, each), []).append(state)
    found: dict[Row, tuple[str, ...]] = {}
    for (mapper, relationship), states in changed.items():
        if _lockable(mapper.persist_selectable):
            shown = {_row(state)[1]: {child.key for child in _members(state, relationship)} for state in states}
            for key, child in _members_now(session, mapper, relationship, [*shown]):
                if child not in shown.get(key, ()) and not _is_own(session, child):
                    found[mapper, key] = (*found.get((mapper, key), ()), relationship.key)
    if found:
        raise _stale(unit.run, {row: (*dict.fromkeys(names),) for row, names in found.items()})


def _members(state: InstanceState[Any], relationship: RelationshipProperty[Any]) -> Iterator[InstanceState[Any]]:
    """Yield the members of a collection, and those that were removed from it since it was loaded."""
    return (inspect(child) for child in state.attrs[relationship.key].history.sum() if child is not None)


def _members_now(
    session: Any, mapper: Mapper[Any], relationship: RelationshipProperty[Any], keys: list[tuple[Any, ...]]
) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Yield the members that the writer has in the collections of these owners.

    Each member is a pair of the owner's primary key and the member's identity key.
    """
    other = relationship.mapper
    child = aliased(other)
    owner = [getattr(mapper.class_, mapper.get_property_by_column(column).key) for column in mapper.primary_key]
    member = [getattr(child, other.get_property_by_column(column).key) for column in other.primary_key]
    wanted = select(*owner, *member).join(getattr(mapper.class_, relationship.key).of_type(child))
    for start in range(0, len(keys), ROWS_AT_ONCE):
        asked = keys[start : start + ROWS_AT_ONCE]
        some, as_asked = wanted.where(_one_of(mapper, asked)), _as_asked(asked)
        for row in session.execute(some, bind_arguments={"mapper": mapper}):
            yield as_asked(tuple(row[: len(owner)])), other.identity_key_from_primary_key(tuple(row[len(owner) :]))


def _is_own(session: Any, key: Any) -> bool:
    """Return whether this session has inserted the row itself, and never read it. No reader has hidden such a row."""
    known = session.identity_map.get(key)
    return known is not None and inspect(known).runid is None


def _read_collections_anew(session: Any) -> None:
    """Read a reader's collections again on the writer, if their owners are to be deleted or to get another key.

    Members that the reader has not shown would stay behind, or stand in the way. A collection that was changed is left as it is
    (see _check_members()).
    """
    done: set[InstanceState[Any]] = set()
    dirty: list[InstanceState[Any]] = [*map(inspect, session.dirty)]
    doomed = [*map(inspect, session.deleted), *_orphans(dirty)]
    if doomed:
        # This moves the unit to the writer, because the rows that the flush loads by itself decide what it writes.
        session.get_bind(doomed[0].mapper)
    while doomed:
        done.update(doomed)
        _read_anew(session, ((state, _relationships_of(state.mapper).owned) for state in doomed))
        for state in doomed:
            state.info.pop(COLLECTIONS, None)
        children = {child for state in doomed for child in _children(session, state)}
        doomed = [*(children - done)]
    _read_anew(session, ((state, _following(state)) for state in dirty if state not in done))


def _orphans(dirty: Iterable[InstanceState[Any]]) -> Iterator[InstanceState[Any]]:
    """Yield the objects that the flush will find to be orphans."""
    for state in dirty:
        for relationship in _relationships_of(state.mapper).orphaning:
            if relationship.key in state.committed_state:
                for child in state.attrs[relationship.key].history.deleted:
                    if child is not None and (known := inspect(child)).key is not None:
                        yield known


def _following(state: InstanceState[Any]) -> list[RelationshipProperty[Any]]:
    """Return the relationships whose other side refers to a column that was set, and gets the new value by the flush."""
    following = _relationships_of(state.mapper).following
    if not following:
        return []
    set_ = {column for p in state.mapper.column_attrs if p.key in state.committed_state for column in p.columns}
    return [each for each in following if not each.local_columns.isdisjoint(set_)]


def _read_anew(session: Any, wanted: Iterable[tuple[InstanceState[Any], Collection[RelationshipProperty[Any]]]]) -> None:
    """Read these collections of objects on the writer, as far as a reader has shown them."""
    found: dict[Mapper[Any], tuple[list[InstanceState[Any]], set[RelationshipProperty[Any]]]] = {}
    for state, relationships in wanted:
        if (MARK in state.info or COLLECTIONS in state.info) and state.session is not None:
            loaded = [each.key for each in relationships if each.key in state.dict and each.key not in state.committed_state]
            if loaded:
                session.expire(state.object, loaded)
                states, missing = found.setdefault(state.mapper, ([], set()))
                states.append(state)
                missing.update(each for each in relationships if each.key not in state.dict)
    for mapper, (states, missing) in found.items():
        keys = [_row(state)[1] for state in states]
        options = [selectinload(each.class_attribute) for each in missing]
        for start in range(0, len(keys), ROWS_AT_ONCE):
            some = select(mapper).where(_one_of(mapper, keys[start : start + ROWS_AT_ONCE])).options(*options)
            session.execute(some, bind_arguments={"mapper": mapper}).unique().all()


def _children(session: Any, state: InstanceState[Any]) -> Iterator[InstanceState[Any]]:
    """Yield the objects that are deleted along with an object: loaded ones, and the present members of dynamic relationships."""
    for relationship in _relationships_of(state.mapper).owned:
        if relationship.cascade.delete and relationship.key in state.dict:
            for child in state.attrs[relationship.key].history.non_deleted():
                if child is not None and (known := inspect(child)).key is not None:
                    if state.object in session.deleted and child not in session.deleted:
                        session.delete(child)
                    yield known
    if session._read_only is None and state.object in session.deleted:
        for relationship in _relationships_of(state.mapper).dynamic:
            now = select(relationship.mapper).where(with_parent(state.object, relationship.class_attribute))
            for child in session.scalars(now, bind_arguments={"mapper": relationship.mapper}).unique().all():
                if child not in session.deleted:
                    session.delete(child)
                yield inspect(child)


# -- rows ---------------------------------------------------------------------------------------------------------


def _row(state: InstanceState[Any]) -> Row:
    assert state.key is not None
    return state.mapper, state.key[1]


def _by_mapper(rows: Iterable[Row]) -> list[tuple[Mapper[Any], list[tuple[Any, ...]]]]:
    """Group rows by mapper, in the same order for every unit, as far as possible.

    The order is that of a flush: tables that others refer to come first. Units that lock in different orders may deadlock.
    """
    keys: dict[Mapper[Any], list[tuple[Any, ...]]] = {}
    for mapper, key in rows:
        keys.setdefault(mapper, []).append(key)
    if len(keys) < 2:
        return [*keys.items()]
    tables: set[Any] = {table for mapper in keys for table in mapper.tables}
    in_order: Iterable[Any] = sort_tables_and_constraints(sorted(tables, key=str))  # type: ignore[no-untyped-call,unused-ignore]
    place = {table: number for number, (table, _) in enumerate(in_order)}
    return sorted(keys.items(), key=lambda item: (min(place[table] for table in item[0].tables), str(item[0])))


def _one_of(mapper: Mapper[Any], keys: list[tuple[Any, ...]]) -> ColumnElement[bool]:
    primary = mapper.primary_key
    if len(primary) == 1:
        return primary[0].in_(bindparam("keys", [key[0] for key in keys], primary[0].type, expanding=True, unique=True))
    return tuple_(*primary).in_(keys)


def _as_asked(keys: Iterable[tuple[Any, ...]]) -> Callable[[tuple[Any, ...]], tuple[Any, ...]]:
    """Return a function that turns a key from the server into the key that was asked for.

    The two may differ in type. An object that was made with a str for its UUID keeps the str in its identity.
    """
    known = {key: key for key in keys}
    by_text = {(*map(str, key),): key for key in known}
    return lambda key: known.get(key) or by_text.get((*map(str, key),), key)


def _lock(
    connection: Connection,
    mapper: Mapper[Any],
    keys: list[tuple[Any, ...]],
    columns: Iterable[ColumnElement[Any]],
    lock: bool = True,
) -> dict[tuple[Any, ...], tuple[Any, ...]]:
    """Lock these rows, if they are to be locked. Return the present values of the columns, by primary key.

    The lock is the one that an UPDATE takes. A stronger lock would block units that insert rows referring to these, and deadlock
    with them.
    """
    primary = mapper.primary_key
    wanted = select(*primary, *columns).select_from(mapper.persist_selectable).order_by(*primary)
    locks = _locks_at(connection)
    if lock and locks.get(mapper, True):
        wanted = wanted.with_for_update(key_share=True)
    found: dict[tuple[Any, ...], tuple[Any, ...]] = {}
    for start in range(0, len(keys), ROWS_AT_ONCE):
        some = keys[start : start + ROWS_AT_ONCE]
        as_asked = _as_asked(some)
        try:
            rows = connection.execute(wanted.where(_one_of(mapper, some)))
        except NotSupportedError:
            locks.setdefault(mapper, False)
            raise
        if lock:
            locks.setdefault(mapper, True)
        for row in rows:
            found[as_asked(tuple(row[: len(primary)]))] = tuple(row[len(primary) :])
    return found


_locks: WeakKeyDictionary[Engine, WeakKeyDictionary[Mapper[Any], bool]] = WeakKeyDictionary()
"""Whether the server locks the rows of a mapper, as far as that has been tried."""


def _locks_at(connection: Connection) -> WeakKeyDictionary[Mapper[Any], bool]:
    return _locks.setdefault(connection.engine, WeakKeyDictionary())


def _looking(connection: Connection, mappers: Collection[Mapper[Any]], look: Callable[[], list[R]]) -> list[R]:
    """Return what `look` finds in rows of these mappers.

    PostgreSQL cannot lock the rows of some views, and an error ends its transaction. So the first try of each mapper can be
    undone. The rows of such a view are read without a lock.
    """
    locks = _locks_at(connection)
    if connection.dialect.name != "postgresql" or all(mapper in locks for mapper in mappers):
        return look()
    driver: Any = connection.connection.dbapi_connection
    is_first = driver.info.transaction_status.name == "IDLE"  # nothing else is lost by a rollback
    while True:
        tried = len(locks)
        try:
            with contextlib.nullcontext() if is_first else connection.begin_nested():
                return look()
        except NotSupportedError:
            if len(locks) == tried:
                raise
            if is_first:
                driver.rollback()


event.listen(Mapper, "refresh", _refreshed, raw=True)
event.listen(Mapper, "before_insert", _before_save, raw=True)
event.listen(Mapper, "before_update", _before_save, raw=True)
event.listen(Mapper, "before_delete", _before_delete, raw=True)
