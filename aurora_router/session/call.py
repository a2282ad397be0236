"""The statement that a session is executing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sqlalchemy.schema import ExecutableDDLElement, Sequence


class Call:
    """A statement that a session is executing.

    parameters: as Session.execute() takes them.
    options: the execution options of the call.
    route: the hint of all its execution options.
    of_write: whether SQLAlchemy would use it to read the rows that an UPDATE or DELETE will change.
    times_left: the session's `_times_left` when this statement got its engine; None before that.
    listeners_made: the statement that the listeners of do_orm_execute have left; None without listeners.
    """

    __slots__ = ("listeners_made", "of_write", "options", "parameters", "route", "statement", "times_left")

    times_left: int | None

    def __init__(self, statement: Any, parameters: Any, options: Mapping[str, Any] | None, route: Any, of_write: bool) -> None:
        self.statement = statement
        self.parameters = parameters
        self.options = options
        self.route = route
        self.of_write = of_write
        self.listeners_made: Any = None


def is_no_read(clause: Any) -> bool:
    """Return whether a statement is certainly not a read, whatever its text."""
    return (
        getattr(clause, "is_dml", False)
        or getattr(clause, "_for_update_arg", None) is not None
        or isinstance(clause, (ExecutableDDLElement, Sequence))
    )
