"""Prevent lost updates from stale reads: compare an object that a reader has shown with the writer, before it is written.

An object that was loaded from a reader carries a mark in its InstanceState.info, and so takes it along to other sessions. A
flush first reads and locks the rows of the marked objects that it is to change. If a row differs from what was loaded, the
flush raises StaleRead. The next attempt of run_transaction() locks those rows before it reads anything. So that attempt cannot
find them stale again, however many units want the same rows. It also does not take changes by its own triggers and Core
statements for changes by others.

The objects of bulk_save_objects() and bulk_update_mappings() are checked in the same way, before the bulk statement changes
their rows. Other statements of Core and the ORM write rows, not objects, and are not checked.

A collection from which something was removed is also compared with the writer. Otherwise the members that a reader has not
shown would stay.
"""

from sqlalchemy import event
from sqlalchemy.orm import Mapper

from aurora_router.routing.stale_writes.flush import before_delete, before_save, check_bulk, listen_last, on_before_flush
from aurora_router.routing.stale_writes.marks import (
    LOADED_FROM_READER,
    mark_loaded,
    mark_refreshed,
    marked,
    marked_by_key,
    on_moved_to_writer,
)
from aurora_router.routing.stale_writes.statements import is_by_values, mapper_of

__all__ = [
    "LOADED_FROM_READER",
    "check_bulk",
    "is_by_values",
    "listen_last",
    "mapper_of",
    "mark_loaded",
    "marked",
    "marked_by_key",
    "on_before_flush",
    "on_moved_to_writer",
]

event.listen(Mapper, "refresh", mark_refreshed, raw=True)
event.listen(Mapper, "before_insert", before_save, raw=True)
event.listen(Mapper, "before_update", before_save, raw=True)
event.listen(Mapper, "before_delete", before_delete, raw=True)
