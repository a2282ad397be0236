"""Compare the values that an object was loaded with to the present row on the writer."""

from __future__ import annotations

import contextlib
import pickle
from collections.abc import Callable, Iterable
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from typing import Any, TypeAlias
from uuid import UUID

from sqlalchemy import Table
from sqlalchemy.engine import Connection, Dialect
from sqlalchemy.orm import InstanceState, Mapper
from sqlalchemy.sql.expression import ColumnElement, FromClause, Join

from aurora_router.cluster.error_classification import FACTS, classify_error
from aurora_router.errors import StaleRead
from aurora_router.routing.retry_context import RetryContext, Row
from aurora_router.routing.stale_writes.loaded_values import is_as_loaded
from aurora_router.routing.stale_writes.rows import Key, Values

Read: TypeAlias = Callable[[Connection, Mapper[Any], list[Key], Iterable[ColumnElement[Any]]], Values]
"""read_rows() or lock_rows()."""

_PLAIN = (type(None), bool, int, float, str, bytes, Decimal, date, datetime, time, timedelta, UUID)
"""The types whose values contain no others and, except for NaN, are equal to their copies."""

Differences: TypeAlias = dict[Row, tuple[str, ...]]
"""The rows that differ, each with the names of the columns or collections that differ; no names if the row is gone."""


def differences(connection: Connection, mapper: Mapper[Any], known: dict[Key, dict[str, Any]], read: Read) -> Differences:
    """Return the rows that differ from the known values.

    known: the values that the columns were loaded with, by primary key. The row was found by the key, so the key is not compared.
    read: reads the rows.

    Values may seem to differ because they, or the values in them, have no equality of their own. Such values are read once more.
    If two reads of the locked row differ, too, they cannot be compared, and prove nothing.
    """
    loaded_of_some = set().union(*known.values())
    compared = [p for p in mapper.column_attrs if p.key in loaded_of_some and not set(p.columns).intersection(mapper.primary_key)]
    asked = {p.key: p.columns[0] for p in compared}

    def present(keys: list[Key]) -> dict[Key, dict[str, Any]]:
        return {key: dict(zip(asked, row, strict=True)) for key, row in read(connection, mapper, keys, asked.values()).items()}

    def same(name: str, one: Any, other: Any) -> bool:
        return _same(connection.dialect, asked[name], one, other)

    now = present([*known])
    found: Differences = {}
    doubtful: list[tuple[Key, str]] = []
    for key, values in known.items():
        if key not in now:
            found[mapper, key] = ()
            continue
        for name, shown in values.items():
            if name in asked and not same(name, shown, now[key][name]):
                if shown is None or type(now[key][name]) in _PLAIN:
                    found[mapper, key] = (*found.get((mapper, key), ()), asked[name].name)
                else:
                    doubtful.append((key, name))
    again = present([*dict.fromkeys(key for key, _ in doubtful)])
    for key, name in doubtful:
        if same(name, now[key][name], again[key][name]):
            found[mapper, key] = (*found.get((mapper, key), ()), asked[name].name)
    return found


def is_lockable(table: FromClause) -> bool:
    """Return whether the rows can be locked: those of a table, or of an inner join of tables."""
    if isinstance(table, Join):
        return not (table.isouter or table.full) and is_lockable(table.left) and is_lockable(table.right)
    return isinstance(table, Table)


def is_checkable(session: Any, mapper: Mapper[Any], connection: Connection) -> bool:
    """Return whether the rows of a mapper can be checked on the writer, and are not in another database."""
    return is_lockable(mapper.persist_selectable) and bool(session.serves(mapper, connection))


def shown_values(state: InstanceState[Any]) -> dict[str, Any]:
    """Return the values that an object's columns were loaded with, unless they were replaced unseen, or changed in place."""
    tables, attributes = state.mapper.tables, state.attrs
    shown: dict[str, Any] = {}
    for property_ in state.mapper.column_attrs:
        if getattr(property_.columns[0], "table", None) in tables:
            history = attributes[property_.key].history
            for value in (*history.unchanged, *history.deleted):
                if is_as_loaded(state, property_.key, value):
                    shown[property_.key] = value
    return shown


def stale_read(retry: RetryContext | None, found: Differences) -> StaleRead:
    """Return the error for rows that differ. Have the next attempt lock them."""
    (mapper, key), columns = next(iter(found.items()))
    error = StaleRead(mapper.class_.__name__, key, columns, len(found) - 1)
    if retry is not None:
        retry.stale_rows_found = retry.stale_rows_found.union(found)
        retry.failed = classify_error(error)
        setattr(error, FACTS, retry.failed)
    return error


def _same(dialect: Dialect, column: ColumnElement[Any], shown: Any, now: Any) -> bool:
    """Return whether two values of a column are the same.

    Some values are equal to nothing (NaN), or only to themselves. Such values are compared in the form in which they are sent
    to the server, and finally by their pickles.
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
