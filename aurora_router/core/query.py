"""The type of a function that asks a server."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

Query: TypeAlias = Callable[[str], tuple[Sequence[str], Sequence[Sequence[Any]]]]
"""Sends a text. Returns the column names and the rows of the answer to its last statement; both are empty if it has none."""
