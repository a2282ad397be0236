"""Check the writes of a session: its flushes, its bulk statements, and the rows that decide them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, TypeVar

from sqlalchemy import inspect
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.orm import InstanceState
from sqlalchemy.orm.exc import StaleDataError

from aurora_router.cluster.error_classification import FACTS
from aurora_router.routing import stale_writes
from aurora_router.session.binds import SessionBinds
from aurora_router.session.connections import SessionConnector

R = TypeVar("R")


class SessionWrites(SessionBinds):
    """A session that checks a reader's objects before it writes them, and loads on the writer the rows that decide its writes."""

    _loads_for_write = False  # it loads rows that decide the coming writes
    _in_bulk: list[InstanceState[Any]] | None = None  # objects to check before a bulk statement writes them

    # Type checkers see the Session's own methods, with all their overloads.
    if not TYPE_CHECKING:

        def merge(self, instance: Any, *, load: bool = True, **options: Any) -> Any:
            """Merge an object as Session.merge() does. The rows that this loads come from the writer."""
            return self._loading_for_write(super().merge, instance, load=load, **options)

        def merge_all(self, instances: Iterable[Any], *, load: bool = True, **options: Any) -> Any:
            """Merge as Session.merge_all() does, which SQLAlchemy 2.0 lacks. The rows that this loads come from the writer."""
            return self._loading_for_write(super().merge_all, instances, load=load, **options)

        def delete(self, instance: object) -> None:
            """Delete an object as Session.delete() does. The collections that this loads come from the writer."""
            self._loading_for_write(super().delete, instance)

        def delete_all(self, instances: Iterable[object]) -> None:
            """Delete objects as Session.delete_all() does, which SQLAlchemy 2.0 lacks. Their collections come from the writer."""
            self._loading_for_write(super().delete_all, instances)

    def _loading_for_write(self, method: Callable[..., R], /, *arguments: Any, **options: Any) -> R:
        outer, self._loads_for_write = self._loads_for_write, True
        try:
            return method(*arguments, **options)
        finally:
            self._loads_for_write = outer

    def flush(self, *args: Any, **options: Any) -> None:
        """Flush as Session.flush() does. Objects that a reader has shown are looked up on the writer before any is written."""
        state = self.routing_state
        state.flush_unchecked = state.check_stale_writes
        if state.check_stale_writes:
            stale_writes.listen_last(self)
        try:
            super().flush(*args, **options)
        except StaleDataError as error:
            self._note_refused(error)
            raise
        finally:
            state.flush_context = None

    def bulk_save_objects(self, objects: Iterable[object], *args: Any, **options: Any) -> None:
        """Save as Session.bulk_save_objects() does. Objects that a reader has shown are first looked up on the writer."""
        given = [*objects]
        self._bulk(
            lambda: stale_writes.marked(given),
            lambda: super(SessionWrites, self).bulk_save_objects(given, *args, **options),
        )

    def bulk_update_mappings(self, mapper: Any, mappings: Iterable[dict[str, Any]]) -> None:
        """Update as Session.bulk_update_mappings() does. A reader's objects of these rows are first looked up on the writer."""
        given = [*mappings]
        self._bulk(
            lambda: stale_writes.marked_by_key(self, inspect(mapper), given),
            lambda: super(SessionWrites, self).bulk_update_mappings(mapper, given),
        )

    def _bulk(self, touched: Callable[[], list[InstanceState[Any]]], write: Callable[[], None]) -> None:
        self._in_bulk = (touched() or None) if self.routing_state.check_stale_writes else None
        try:
            write()
        except StaleDataError as error:
            self._note_refused(error)
            raise
        finally:
            self._in_bulk = None

    def _named_in(self, statement: Any, parameters: list[Any]) -> list[InstanceState[Any]] | None:
        """Return the objects to check if an UPDATE of the ORM names their rows by primary key; None without any."""
        mapper = stale_writes.mapper_of(statement) if self.routing_state.check_stale_writes else None
        return stale_writes.marked_by_key(self, mapper, parameters) or None if mapper is not None else None

    def _checked_bind(self, mapper: Any, clause: Any) -> Engine | Connection:
        """Return the engine of a bulk statement, after checking the objects that it writes.

        This happens within the transaction that SQLAlchemy rolls back if this raises StaleRead. A statement to another database,
        or a listener's read, leaves the check to the first statement that writes to the cluster.
        """
        states, self._in_bulk = self._in_bulk or [], None
        engine = self.get_bind(mapper, clause=clause)
        unit = self.routing_state.unit
        if unit is not None and unit.place.instance is not None and unit.place.on_writer and engine is self._engine(unit):
            stale_writes.check_bulk(self, SessionConnector(self, None, None).connect(engine), states)
        else:
            self._in_bulk = states
        return engine

    def _note_refused(self, error: StaleDataError) -> None:
        """Note the meaning in the error: others have deleted a row, or given it another version."""
        retry = self.routing_state.intent.retry
        if retry is not None:
            setattr(error, FACTS, retry.refused())
