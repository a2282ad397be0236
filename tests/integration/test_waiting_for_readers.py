"""A read may wait for a reader that is late, for no longer than it is told to, and a silent reader counts as late."""

from __future__ import annotations

import time
from collections.abc import Callable

from sqlalchemy import select, text

from aurora_router import Router
from aurora_router.core import events
from aurora_router.local import PostgresCluster
from tests.integration.shop import RAISE, Item, eventually, place, sessions, until_readers_serve

MakeRouter = Callable[..., Router]
STOCK = select(Item.stock).where(Item.id == 1)


def test_a_read_waits_for_a_reader_where_it_may(cluster: PostgresCluster, make_router: MakeRouter) -> None:
    heard: list[events.Event] = []
    router = make_router(wait_for_reader=10.0, listeners=[heard.append])
    until_readers_serve(router, 2)
    for reader in cluster.readers:
        cluster.set_lag(reader, 0.2)
    with sessions(router)() as s:
        for expected in range(11, 14):
            s.execute(RAISE)
            s.commit()
            assert s.scalar(STOCK) == expected
            assert place(s) == "reader"
            s.rollback()


def test_a_read_that_waited_long_enough_goes_to_the_writer(paused: PostgresCluster, make_router: MakeRouter) -> None:
    """A read that has waited for long enough goes to the writer."""
    router = make_router(wait_for_reader=0.1)
    until_readers_serve(router, 2)
    with sessions(router)() as s:
        s.execute(RAISE)
        s.commit()
        began = time.monotonic()
        assert s.scalar(STOCK) == 11
        assert place(s) == "writer"
        assert time.monotonic() - began >= 0.1
        assert s.scalar(text("SELECT 1")) == 1, "and does not wait again in the same unit"


def test_a_reader_that_is_not_heard_is_as_late_as_it_is_silent(cluster: PostgresCluster, make_router: MakeRouter) -> None:
    reader, other = cluster.readers
    router = make_router(max_lag=0.4, probe_timeout=60.0)
    until_readers_serve(router, 2)
    cluster.freeze(reader)
    eventually(lambda: router.explain("SELECT 1").instance is not None)
    # After max_lag without an answer nobody can know how late the reader is.
    time.sleep(0.5)

    def serves() -> str:
        found = router.explain("SELECT 1").instance
        assert found is not None
        assert found.id != reader.address
        return found.id

    for _ in range(20):
        eventually(lambda: serves() == other.address)  # its own answers may be late, too
    cluster.thaw(reader)
