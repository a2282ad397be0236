"""No lost updates from stale reads: before an object is written, the writer is asked whether a reader has shown it as it is.

What was loaded from a reader carries a mark in its InstanceState.info, and so takes it along to other sessions. The first thing
that a flush does is to read and lock the rows of the marked objects that it is to change; where one of them differs from what
was loaded, it raises StaleRead. A run of run_transaction() that follows locks those rows before it reads anything: it needs no
luck, however many want the same rows, and what its own triggers and Core statements change meanwhile is not taken for others'.

Statements of Core and bulk statements of the ORM write rows, not objects, and are not checked.
"""

from __future__ import annotations

import contextlib
import pickle
from collections.abc import Collection, Iterable, Iterator
from typing import Any

from sqlalchemy import Table, event, inspect, select, tuple_
from sqlalchemy.engine import Connection
from sqlalchemy.orm import InstanceState, Mapper, Session
from sqlalchemy.orm.loading import _new_runid  # type: ignore[attr-defined,unused-ignore]
from sqlalchemy.schema import sort_tables_and_constraints
from sqlalchemy.sql.expression import ColumnElement, FromClause, Join

from aurora_router.diagnosis import FACTS, classify_error
from aurora_router.engines import UNIT
from aurora_router.errors import StaleRead
from aurora_router.unit import Row, Run, Unit

MARK = "aurora_router.loaded_from_a_reader"
ROWS_AT_ONCE = 1000  # that one SELECT asks for


# -- what is marked -----------------------------------------------------------------------------------------------


def loaded(session: Any, state: InstanceState[Any]) -> None:
    """Mark an object that was loaded from a reader. An event of the session's: sessions of others pay nothing for it."""
    if session._guarding and _doubtful(session, state, state.runid or 0):
        state.info[MARK] = True


def _refreshed(state: InstanceState[Any], context: Any, attributes: Collection[str] | None) -> None:
    """Mark an object that was loaded anew from a reader; take the mark from one of which nothing but what the writer has shown
    is left."""
    session: Any = getattr(context, "session", None)  # no context: an UPDATE was carried over to the object, and nothing was read
    if not getattr(session, "_guarding", False):
        return
    columns = set(state.mapper.column_attrs.keys())
    if _doubtful(session, state, context.runid):
        if attributes is None or not columns.isdisjoint(attributes):
            state.info[MARK] = True
    elif not session._read_only and (attributes is None or columns.intersection(state.dict).issubset(attributes)):
        state.info.pop(MARK, None)


def _doubtful(session: Any, state: InstanceState[Any], asked: int) -> bool:
    """Whether what an object has just been loaded with must be looked up before the object is written. asked: when its statement
    was executed, as SQLAlchemy counts: rows of a reader may be read on long after the unit has moved."""
    unit: Unit | None = session._unit
    if unit is None:
        return session._read_only is None
    if unit.read_only is not None:
        return False
    if not unit.on_writer or asked < unit.on_writer_since:
        return True
    return unit.run is not None and bool(unit.run.stale) and _row(state) not in unit.run.stale


def on_writer(unit: Unit, connection: Connection) -> None:
    """An automatic unit has come to the writer: what it reads from now on is no reader's, and what an earlier run has read stale
    nobody shall change before this one does."""
    unit.on_writer_since = _new_runid()
    if unit.run is not None and unit.run.stale:
        for mapper, keys in _by_mapper(unit.run.stale):
            _lock(connection, mapper, keys, ())


# -- what is checked ----------------------------------------------------------------------------------------------


def _before_save(mapper: Mapper[Any], connection: Connection, state: InstanceState[Any]) -> None:
    if hasattr(connection, UNIT):
        _before_write(connection, state, deleted=False)


def _before_delete(mapper: Mapper[Any], connection: Connection, state: InstanceState[Any]) -> None:
    if hasattr(connection, UNIT):
        _before_write(connection, state, deleted=True)


def _before_write(connection: Connection, state: InstanceState[Any], *, deleted: bool) -> None:
    """Check all that a flush is to change, at the first object that it comes to: after all listeners of before_flush, and before
    any statement, the triggers of which might change rows. What the flush itself finds to be changed later is checked then."""
    session: Any = state.session
    unit: Unit = getattr(connection, UNIT)
    if not getattr(session, "_guarding", False) or unit.read_only:
        return
    if session._unchecked:
        session._unchecked = False
        if len(session.identity_map):  # else all is new
            _check(session, connection, unit, _to_be_written(session))
    if state.key is not None and MARK in state.info and (deleted or _changed(session, state)):
        _check(session, connection, unit, [state])


def _to_be_written(session: Any) -> Iterator[InstanceState[Any]]:
    for instance in session.dirty:
        state: InstanceState[Any] = inspect(instance)
        if MARK in state.info and _changed(session, state):
            yield state
    for instance in session.deleted:
        state = inspect(instance)
        if MARK in state.info:
            yield state


def _changed(session: Session, state: InstanceState[Any]) -> bool:
    return session.is_modified(state.object, include_collections=False)


def _check(session: Any, connection: Connection, unit: Unit, states: Iterable[InstanceState[Any]]) -> None:
    """Raise StaleRead where a row is not what its object was loaded with; else the rows are locked, and the marks are gone."""
    found: dict[Row, tuple[str, ...]] = {}
    marked = list(states)
    checkable = {mapper for mapper in {state.mapper for state in marked} if _checkable(session, mapper)}
    known = {_row(state): shown for state in marked if state.mapper in checkable and (shown := _shown(state))}
    for mapper, keys in _by_mapper(known):
        loaded_of_some = set().union(*(known[mapper, key] for key in keys))
        asked = [p for p in mapper.column_attrs if p.key in loaded_of_some]
        rows = _lock(connection, mapper, keys, [p.columns[0] for p in asked])
        for key in keys:
            row, values = rows.get(key), known[mapper, key]
            if row is None:
                found[mapper, key] = ()
                continue
            differing = tuple(
                p.columns[0].name
                for p, now in zip(asked, row, strict=True)
                if p.key in values and not _same(p.columns[0], values[p.key], now)
            )
            if differing:
                found[mapper, key] = differing
    if found:
        raise _stale(unit.run, found)
    for state in marked:
        state.info.pop(MARK, None)


def _checkable(session: Any, mapper: Mapper[Any]) -> bool:
    """Whether the rows of a mapper can be looked up on the writer, and nobody else sees to it."""
    if mapper.version_id_col is not None or not _lockable(mapper.persist_selectable):
        return False
    return not (session.spans_databases and session._other_engine(mapper, None, {}) is not None)


def _lockable(table: FromClause) -> bool:
    if isinstance(table, Join):
        return not (table.isouter or table.full) and _lockable(table.left) and _lockable(table.right)
    return isinstance(table, Table)


def _shown(state: InstanceState[Any]) -> dict[str, Any]:
    """What the columns of an object were loaded with. That is not known of what was set unseen, or changed in place."""
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


def _same(column: ColumnElement[Any], shown: Any, now: Any) -> bool:
    """Whether two values of a column are the same, though they may be equal to nothing (NaN), or to themselves only."""
    with contextlib.suppress(Exception):  # arrays of numpy compare element by element
        if column.type.compare_values(shown, now):
            return True
    try:
        return pickle.dumps(shown) == pickle.dumps(now)
    except Exception:
        return False


# -- rows ---------------------------------------------------------------------------------------------------------


def _row(state: InstanceState[Any]) -> Row:
    assert state.key is not None
    return state.mapper, state.key[1]


def _by_mapper(rows: Iterable[Row]) -> list[tuple[Mapper[Any], list[tuple[Any, ...]]]]:
    """In the same order for everybody, as far as that can be had: as a flush writes, first what others refer to. Who locks in
    another order may wait for ever."""
    keys: dict[Mapper[Any], list[tuple[Any, ...]]] = {}
    for mapper, key in rows:
        keys.setdefault(mapper, []).append(key)
    if len(keys) < 2:
        return [*keys.items()]
    tables: set[Any] = {table for mapper in keys for table in mapper.tables}
    in_order: Iterable[Any] = sort_tables_and_constraints(sorted(tables, key=str))  # type: ignore[no-untyped-call,unused-ignore]
    place = {table: number for number, (table, _) in enumerate(in_order)}
    return sorted(keys.items(), key=lambda item: (min(place[table] for table in item[0].tables), str(item[0])))


def _lock(
    connection: Connection, mapper: Mapper[Any], keys: list[tuple[Any, ...]], columns: Iterable[ColumnElement[Any]]
) -> dict[tuple[Any, ...], tuple[Any, ...]]:
    """Lock these rows and give what the columns are now, by primary key. The lock is the one that an UPDATE takes: a stronger one
    would stand in the way of those who insert what refers to these rows, and meet them in deadlocks."""
    primary = mapper.primary_key
    wanted = select(*primary, *columns).select_from(mapper.persist_selectable).order_by(*primary).with_for_update(key_share=True)
    found: dict[tuple[Any, ...], tuple[Any, ...]] = {}
    for start in range(0, len(keys), ROWS_AT_ONCE):
        some = keys[start : start + ROWS_AT_ONCE]
        these = primary[0].in_([key[0] for key in some]) if len(primary) == 1 else tuple_(*primary).in_(some)
        for row in connection.execute(wanted.where(these)):
            found[tuple(row[: len(primary)])] = tuple(row[len(primary) :])
    return found


event.listen(Mapper, "refresh", _refreshed, raw=True)
event.listen(Mapper, "before_insert", _before_save, raw=True)
event.listen(Mapper, "before_update", _before_save, raw=True)
event.listen(Mapper, "before_delete", _before_delete, raw=True)
