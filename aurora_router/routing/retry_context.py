"""What the units of one attempt of run_transaction must know, and what they leave behind for the next attempt."""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

from sqlalchemy.orm import Mapper

from aurora_router.core.failures import REFUSED_WRITE, Facts, Failure, Phase, confirmed_facts, facts
from aurora_router.core.instance import ServerId

Row: TypeAlias = tuple[Mapper[Any], tuple[Any, ...]]
"""A row as the session identifies it: the mapper and the primary key."""


class Trouble(NamedTuple):
    """A statement that has broken an instance or lost its connection, and where.

    sql: its text without comments.
    at: seconds, monotonic.
    times: how often in a row the same statement has met the same failure.
    """

    sql: str
    failure: Failure
    instance: str
    server: ServerId
    at: float
    times: int


class RetryContext:
    """One attempt of a function that may be retried.

    deadline: seconds, monotonic, until which the units may wait for a writer. None: as long as any unit may.
    before: the attempt before this one, which has failed.
    transaction: the number that the events of all attempts of the function share; None if nobody listens.
    rows_to_lock: rows that earlier attempts have read stale.
    on_writer: whether a reader has misled an earlier attempt. Then the units are on the writer from the start.
    read_only_refusals: how often the writer has refused to write, although it is the writer. Earlier attempts count, too.
    trouble: the last failure that a statement of this attempt or an earlier one has met.
    """

    can_be_undone = True  # nothing is known to be committed, or to outlive a rollback
    failed: Facts | None = None  # what the last error of its units means
    stale_rows_found: frozenset[Row] = frozenset()  # by this attempt itself
    has_read_on_reader = False
    misled = False  # by a late reader
    rows_to_lock: frozenset[Row] = frozenset()
    on_writer = False
    read_only_refusals = 0
    trouble: Trouble | None = None

    def __init__(self, deadline: float | None, before: RetryContext | None = None, transaction: int | None = None) -> None:
        self.deadline = deadline
        self.transaction = transaction
        if before is not None:
            self.rows_to_lock = before.rows_to_lock | before.stale_rows_found
            self.on_writer = before.on_writer or before.misled or bool(self.rows_to_lock)
            self.read_only_refusals = before.read_only_refusals
            self.trouble = before.trouble

    def __repr__(self) -> str:
        where = "the writer" if self.on_writer else "any instance"
        undone = "" if self.can_be_undone else ", cannot be undone"
        return f"<RetryContext on {where}, {len(self.rows_to_lock)} rows to lock{undone}>"

    def is_misled(self) -> bool:
        """Note that the writer has refused a write of this attempt, and return whether late rows may be the cause.

        They may be the cause if the attempt has read on a reader. The next attempt then reads on the writer. If the write is
        refused again, that is the application's own error.
        """
        self.misled = self.has_read_on_reader
        return self.misled

    def refused(self) -> Facts:
        """Note that SQLAlchemy has not found a row as the attempt had read it, and return what that means."""
        means = confirmed_facts if self.is_misled() else facts
        self.failed = means(REFUSED_WRITE, Phase.WRITER_STATEMENT)
        return self.failed
