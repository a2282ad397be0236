"""Check the objects of a flush, or of a bulk statement, before their rows are changed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Set
from typing import Any

from sqlalchemy import event
from sqlalchemy.engine import Connection
from sqlalchemy.orm import InstanceState, Mapper

from aurora_router.cluster.connection_state import UNIT
from aurora_router.routing.retry_context import Row
from aurora_router.routing.session_state import SessionState
from aurora_router.routing.stale_writes.comparison import Differences, differences, is_checkable, shown_values, stale_read
from aurora_router.routing.stale_writes.marks import LOADED_FROM_READER, is_marked, is_unchecked, mark_checked, remove_marks
from aurora_router.routing.stale_writes.members import check_members, read_collections_again
from aurora_router.routing.stale_writes.relationships import relationships_of
from aurora_router.routing.stale_writes.rows import by_mapper, lock_rows, read_rows, row_of, with_locks
from aurora_router.routing.unit import Unit

# -- listeners ----------------------------------------------------------------------------------------------------


def on_before_flush(session: Any, context: Any, _: Any) -> None:
    """Keep the context of a flush. This listens to the session's class, so it comes before the listeners of one session."""
    routing: SessionState = session.routing_state
    routing.flush_context = context
    routing.flush_compared = frozenset()
    if not routing.listens_last:
        after_before_flush(session)


def after_before_flush(session: Any, *_: Any) -> None:
    """Read collections again if a flush is to change their members along with their owners."""
    routing: SessionState = session.routing_state
    if routing.check_stale_writes and not routing.read_only and len(session.identity_map):  # else all is new
        read_collections_again(session)


def listen_last(session: Any) -> None:
    """Let after_before_flush() come after the application's listeners of before_flush, which may change and delete objects."""
    *_, last = session.dispatch.before_flush
    if last is not on_before_flush and last is not after_before_flush:
        routing: SessionState = session.routing_state
        if routing.listens_last:
            event.remove(session, "before_flush", after_before_flush)
        event.listen(session, "before_flush", after_before_flush)
        routing.listens_last = True


def before_save(mapper: Mapper[Any], connection: Connection, state: InstanceState[Any]) -> None:
    """Check an object before its INSERT or UPDATE. This listens to all mappers."""
    if hasattr(connection, UNIT):
        _before_write(connection, state, deleted=False)


def before_delete(mapper: Mapper[Any], connection: Connection, state: InstanceState[Any]) -> None:
    """Check an object before its DELETE. This listens to all mappers."""
    if hasattr(connection, UNIT):
        _before_write(connection, state, deleted=True)


def _before_write(connection: Connection, state: InstanceState[Any], *, deleted: bool) -> None:
    """Check all objects that a flush is to change, when it comes to the first one.

    That is after all listeners of before_flush. It is before any statement, because a statement's triggers might change rows. If
    the flush finds more objects to change later, they are checked then.
    """
    session: Any = state.session
    unit: Unit = getattr(connection, UNIT)
    routing: SessionState | None = getattr(session, "routing_state", None)  # other sessions have none
    if routing is None or not routing.check_stale_writes or unit.intent.read_only or unit is not routing.unit:
        return
    if routing.flush_unchecked:
        routing.flush_unchecked = False
        if len(session.identity_map):  # else all is new
            if unit.intent.retry is not None and not unit.intent.retry.on_writer:
                check_members(session, connection, unit, routing.flush_context.states)
            _check(session, connection, unit, _to_be_written(session, unit))
    if state.key is None:
        # A copy (make_transient()) of a reader's object is inserted. It has nothing left of that row.
        remove_marks(state)
    elif _is_due(session, unit, state) and (deleted or _assigned(state)):
        _check(session, connection, unit, _to_be_written(session, unit))


# -- the check ----------------------------------------------------------------------------------------------------


def check_bulk(session: Any, connection: Connection, states: list[InstanceState[Any]]) -> None:
    """Check objects before a bulk statement changes their rows. Raises StaleRead."""
    unit: Unit | None = getattr(connection, UNIT, None)
    if unit is not None and not unit.intent.read_only:
        _check(session, connection, unit, [state for state in states if is_marked(unit, state)])


def _to_be_written(session: Any, unit: Unit) -> Iterator[InstanceState[Any]]:
    """Yield the marked objects that the flush is to write, as far as it knows by now.

    An object in which nothing was set is among them if another object's relationship changes its row. Such an object is the child
    of a new parent, or of a parent that gets another primary key. An object is also among them if an attribute was only set to
    the value that it had. SQLAlchemy sends nothing for that attribute, but the writer may have another value.
    """
    routing: SessionState = session.routing_state
    for state, (deleted, _) in routing.flush_context.states.items():
        if _is_due(session, unit, state) and (deleted or not state.modified or _assigned(state)):
            yield state


def _is_due(session: Any, unit: Unit, state: InstanceState[Any]) -> bool:
    """Return whether the flush still has to check an object.

    An object for which nothing is sent keeps its mark. The flush compares it once, or once more if something is sent after all.
    """
    routing: SessionState = session.routing_state
    return is_unchecked(unit, state) and not (state in routing.flush_compared and _is_unsent(session, state))


def _assigned(state: InstanceState[Any]) -> bool:
    """Return whether anything but a collection was set, even if only to the value that it had."""
    return not relationships_of(state.mapper).collections.issuperset(state.committed_state)


def _check(session: Any, connection: Connection, unit: Unit, states: Iterable[InstanceState[Any]]) -> None:
    """Raise StaleRead if a row differs from what its object was loaded with. Otherwise lock the rows, and remove the marks.

    Rows are compared, but not locked, if nothing is sent for them. Their objects keep the marks.
    """
    routing: SessionState = session.routing_state
    to_check, has_written = list(states), unit.wrote
    unsent = {state for state in to_check if _is_unsent(session, state)}
    found = _find_differences(session, connection, to_check, {*map(row_of, unsent)})
    if found:
        if unit.intent.retry is not None and has_written:
            # The unit's own statements may have changed these rows, and may change more rows of the same kind.
            unit.intent.retry.stale_rows_found = unit.intent.retry.stale_rows_found.union(_rows_of_the_same_kind(session, found))
        raise stale_read(unit.intent.retry, found)
    for state in to_check:
        if state not in unsent:
            mark_checked(state)
    routing.flush_compared = routing.flush_compared.union(unsent)


def _find_differences(session: Any, connection: Connection, states: list[InstanceState[Any]], unsent: Set[Row]) -> Differences:
    """Compare the rows of objects with what the objects were loaded with. Lock those for which something is sent.

    unsent: the rows for which nothing is sent.
    """
    exposed = [state for state in states if not _has_version(session, state)]
    checkable = {mapper for mapper in {state.mapper for state in exposed} if is_checkable(session, mapper, connection)}
    known = {row_of(state): shown for state in exposed if state.mapper in checkable and (shown := shown_values(state))}
    asked = [
        (mapper, {key: known[mapper, key] for key in keys}, read)
        for rows, read in ((known.keys() - unsent, lock_rows), (unsent, read_rows))
        for mapper, keys in by_mapper({row: known[row] for row in known if row in rows})
    ]
    found: Differences = {}
    for differing in with_locks(connection, checkable, lambda: [differences(connection, *each) for each in asked]):
        found.update(differing)
    return found


def _rows_of_the_same_kind(session: Any, found: Differences) -> Iterator[Row]:
    """Yield the rows of all objects that a reader has shown and that have the mapper of a row that differs."""
    mappers = {mapper for mapper, _ in found}
    for state in session.identity_map.all_states():
        if state.mapper in mappers and LOADED_FROM_READER in state.info:
            yield row_of(state)


def _has_version(session: Any, state: InstanceState[Any]) -> bool:
    """Return whether the statement that writes an object compares a version."""
    return state.mapper.version_id_col is not None and not _is_unsent(session, state)


def _is_unsent(session: Any, state: InstanceState[Any]) -> bool:
    """Return whether SQLAlchemy sends no statement for an object, because its attributes were only set to their old values."""
    routing: SessionState = session.routing_state
    if routing.flush_context is None or not state.modified or state.object in session.deleted:
        return False
    return not session.is_modified(state.object, include_collections=False)
