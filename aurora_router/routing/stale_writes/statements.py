"""The ORM's UPDATE and DELETE, which SQLAlchemy carries over to the objects of a session."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sqlalchemy import TextClause, inspect
from sqlalchemy.orm import Mapper
from sqlalchemy.sql.visitors import iterate

from aurora_router.routing.session_state import SessionState
from aurora_router.routing.stale_writes.marks import LOADED_FROM_READER


def is_by_values(session: Any, statement: Any, options: Mapping[str, Any] | None) -> bool:
    """Return whether SQLAlchemy would carry an UPDATE or DELETE over to objects by values that a reader has shown.

    By default ("auto"), SQLAlchemy applies the WHERE to the values in the objects.
    """
    routing: SessionState = session.routing_state
    if routing.read_only or not (getattr(statement, "is_update", False) or getattr(statement, "is_delete", False)):
        return False
    mapper = mapper_of(statement)
    how = {**statement.get_execution_options(), **(options or {})}.get("synchronize_session", "auto")
    if mapper is None or how != "auto" or _has_text(statement):
        return False
    return any(LOADED_FROM_READER in state.info and state.mapper.isa(mapper) for state in session.identity_map.all_states())


def _has_text(statement: Any) -> bool:
    """Return whether a part of a statement is text, which may stand for any columns.

    With text in its RETURNING, SQLAlchemy cannot find the primary keys of the rows. With text in its WHERE, SQLAlchemy
    falls back to "fetch" by itself.
    """
    return any(isinstance(each, TextClause) or getattr(each, "is_literal", False) for each in iterate(statement))


def mapper_of(statement: Any) -> Mapper[Any] | None:
    """Return the mapper of the ORM's UPDATE or DELETE; None if the statement is Core's."""
    try:
        entity = statement.entity_description.get("entity")
    except (AttributeError, KeyError):
        # SQLAlchemy raises KeyError if the statement is for a table, and mapped attributes are in its WHERE.
        return None
    return None if entity is None else inspect(entity).mapper
