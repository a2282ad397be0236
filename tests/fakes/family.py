"""A server family that nobody has written: the module of a family that repeats what PostgreSQL says, with words of its own."""

from __future__ import annotations

from typing import Any

from aurora_router import Failure
from aurora_router.servers import postgresql

VERSION = ("Parrot 3", False)


class Parrot:
    """Stands for a module of `servers`."""

    SET_DEFAULT_READ_ONLY = "SELECT 'guard the parrot'"

    def __getattr__(self, name: str) -> Any:
        return getattr(postgresql, name)

    def recognizes(self, row: Any) -> bool:
        return row == VERSION

    def failure(self, code: Any, message: str, *, disconnected: bool) -> Failure:
        return Failure.DEADLOCK if code == "PECKS" else postgresql.failure(code, message, disconnected=disconnected)
