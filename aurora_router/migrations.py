"""Keep a migration tool away from the router's own table, because the table does not belong to the application."""

from __future__ import annotations

from collections.abc import Mapping

from aurora_router.servers import FAMILIES

__all__ = ["include_name"]

_TABLES = frozenset(family.COMMIT_TABLE for families in FAMILIES.values() for family in families)


def include_name(name: str | None, type_: str, parent_names: Mapping[str, str | None]) -> bool:
    """Leave aurora_router_commits out of what Alembic compares: `context.configure(..., include_name=include_name)`.

    The table is in no MetaData. So `alembic revision --autogenerate` would propose to drop it.

    name: the name of an object in the database.
    type_: its kind, "table" for example.
    parent_names: the names of the objects that it is in.
    """
    return type_ != "table" or name not in _TABLES
