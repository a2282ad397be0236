"""What all drivers share."""

from __future__ import annotations

import enum


class Mode(enum.Enum):
    """How a pooled connection behaves for the unit that has it."""

    DEFAULT = "a transaction as the engine is configured"
    AUTOCOMMIT = "each statement on its own"
    READ_ONLY = "a read-only transaction"
