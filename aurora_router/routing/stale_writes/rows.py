"""Read and lock rows on the writer, by mapper and primary key."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any, TypeAlias, TypeVar
from weakref import WeakKeyDictionary

from sqlalchemy import Select, bindparam, case, select, tuple_
from sqlalchemy.engine import Connection, CursorResult, Engine
from sqlalchemy.exc import NotSupportedError
from sqlalchemy.orm import InstanceState, Mapper
from sqlalchemy.schema import sort_tables_and_constraints
from sqlalchemy.sql.expression import ColumnElement

from aurora_router.cluster.connection_state import state_of
from aurora_router.routing.retry_context import Row

R = TypeVar("R")

Key: TypeAlias = tuple[Any, ...]
"""A primary key."""

Values: TypeAlias = dict[Key, tuple[Any, ...]]
"""The values of some columns, by primary key."""

ROWS_AT_ONCE = 1000  # the most that one SELECT asks for

_locks: WeakKeyDictionary[Engine, WeakKeyDictionary[Mapper[Any], bool]] = WeakKeyDictionary()
"""Whether the server locks the rows of a mapper, as far as that has been tried."""


def row_of(state: InstanceState[Any]) -> Row:
    """Return the row of an object that has a primary key."""
    assert state.key is not None
    return state.mapper, state.key[1]


def by_mapper(rows: Iterable[Row]) -> list[tuple[Mapper[Any], list[Key]]]:
    """Group rows by mapper, in the same order for every unit, as far as possible.

    The order is that of a flush: tables that others refer to come first. Units that lock in different orders may deadlock.
    """
    keys: dict[Mapper[Any], list[Key]] = {}
    for mapper, key in rows:
        keys.setdefault(mapper, []).append(key)
    if len(keys) < 2:
        return [*keys.items()]
    tables: set[Any] = {table for mapper in keys for table in mapper.tables}
    in_order: Iterable[Any] = sort_tables_and_constraints(sorted(tables, key=str))  # type: ignore[no-untyped-call,unused-ignore]
    place = {table: number for number, (table, _) in enumerate(in_order)}
    return sorted(keys.items(), key=lambda item: (min(place[table] for table in item[0].tables), str(item[0])))


def portions(keys: list[Key]) -> Iterator[list[Key]]:
    """Cut keys into lists that are short enough for one SELECT."""
    return (keys[start : start + ROWS_AT_ONCE] for start in range(0, len(keys), ROWS_AT_ONCE))


def has_key(mapper: Mapper[Any], keys: list[Key]) -> ColumnElement[bool]:
    """Return the condition that a row of a mapper has one of these primary keys."""
    primary = mapper.primary_key
    if len(primary) == 1:
        return primary[0].in_(bindparam("keys", [key[0] for key in keys], primary[0].type, expanding=True, unique=True))
    return tuple_(*primary).in_(keys)


def as_asked(keys: Iterable[Key]) -> Callable[[Key], Key]:
    """Return a function that turns a key from the server into the key that was asked for.

    The two may differ in type. An object that was made with a str for its UUID keeps the str in its identity. The
    two may also be spelled in different ways ("007"). Then only a single key is sure to be known again.
    """
    known = {key: key for key in keys}
    if len(known) == 1:
        (only,) = known
        return lambda _: only
    by_text = {(*map(str, key),): key for key in known}
    return lambda key: known.get(key) or by_text.get((*map(str, key),), key)


def read_rows(connection: Connection, mapper: Mapper[Any], keys: list[Key], columns: Iterable[ColumnElement[Any]]) -> Values:
    """Return the present values of these columns in these rows. Rows that are gone are left out."""
    return _values(connection.execute, mapper, keys, _select(mapper, columns))


def lock_rows(connection: Connection, mapper: Mapper[Any], keys: list[Key], columns: Iterable[ColumnElement[Any]] = ()) -> Values:
    """Read rows as read_rows() does, and lock them if the server can.

    The lock is the one that an UPDATE takes. A stronger lock would block units that insert rows referring to these, and deadlock
    with them.
    """
    locks, wanted = _locks_at(connection), _select(mapper, columns)
    if locks.get(mapper, True):
        wanted = wanted.with_for_update(key_share=True)

    def execute(statement: Select[Any]) -> CursorResult[Any]:
        try:
            rows = connection.execute(statement)
        except NotSupportedError:
            locks.setdefault(mapper, False)
            raise
        locks.setdefault(mapper, True)
        return rows

    return _values(execute, mapper, keys, wanted)


def _select(mapper: Mapper[Any], columns: Iterable[ColumnElement[Any]]) -> Select[Any]:
    primary = mapper.primary_key
    return select(*primary, *columns).select_from(mapper.persist_selectable).order_by(*primary)


def _values(
    execute: Callable[[Select[Any]], CursorResult[Any]], mapper: Mapper[Any], keys: list[Key], wanted: Select[Any]
) -> Values:
    """Execute a SELECT of _select() for these keys. Return the values behind the primary key."""
    length = len(mapper.primary_key)
    found: Values = {}
    for some in portions(keys):
        rows = {tuple(row[:length]): tuple(row[length:]) for row in execute(wanted.where(has_key(mapper, some)))}
        known_as = as_asked(some)
        named = {key: known_as(key) for key in rows}
        if not {*some}.issuperset(named.values()):
            named.update(_by_server(execute, mapper, [*{*some}.difference(named.values())]))
        found.update((named[key], values) for key, values in rows.items())
    return found


def _by_server(
    execute: Callable[[Select[Any]], CursorResult[Any]], mapper: Mapper[Any], asked: list[Key]
) -> Iterator[tuple[Key, Key]]:
    """Let the server tell which of its rows has which of the keys that were asked for. Yield the two spellings of each key."""
    which = case(*((has_key(mapper, [key]), number) for number, key in enumerate(asked)))
    wanted = select(which, *mapper.primary_key).select_from(mapper.persist_selectable).where(has_key(mapper, asked))
    for row in execute(wanted):
        yield tuple(row[1:]), asked[row[0]]


def _locks_at(connection: Connection) -> WeakKeyDictionary[Mapper[Any], bool]:
    return _locks.setdefault(connection.engine, WeakKeyDictionary())


def with_locks(connection: Connection, mappers: Collection[Mapper[Any]], read: Callable[[], list[R]]) -> list[R]:
    """Return the result of `read`, which locks rows of these mappers.

    PostgreSQL cannot lock the rows of some views, and an error ends its transaction. So the first try of each mapper can be
    undone. The rows of such a view are read without a lock.
    """
    locks = _locks_at(connection)
    state = state_of(connection.connection)
    if not state.family.ERROR_ENDS_TRANSACTION or all(mapper in locks for mapper in mappers):
        return read()
    raw: Any = connection.connection.dbapi_connection
    is_first = state.driver.is_idle(raw)  # a rollback loses nothing else
    while True:
        tried = len(locks)
        try:
            with contextlib.nullcontext() if is_first else connection.begin_nested():
                return read()
        except NotSupportedError:
            if len(locks) == tried:
                raise
            if is_first:
                raw.rollback()
