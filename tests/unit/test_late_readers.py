"""Readers that answer, but replay nothing for long, are reported: the reads of who has written go to the writer meanwhile."""

import logging

from sqlalchemy.orm import sessionmaker

from aurora_router import Router, RoutingSession
from aurora_router.core.selection import is_caught_up
from aurora_router.core.topology import SAMPLES
from tests.fakes.cluster import FakeCluster
from tests.fakes.driver import installed
from tests.integration.shop import eventually
from tests.stories import READ, WRITE
from tests.unit.topologies import ABC, REFUSED, after, identity, reader, said, silent, writer

PIN = 5.0
LATE = after(ABC, said("a", 1, writer("A", 100)), said("b", 1, reader("B", 90)), said("c", 1, reader("C", 80)))


def test_a_reader_that_is_late_for_long_is_seen_by_positions():
    """Until the time is over, nothing is known. One reader that catches up is enough."""
    assert is_caught_up(ABC, PIN) is None
    assert is_caught_up(LATE, PIN) is None
    still = after(LATE, said("a", 6, writer("A", 200)), said("b", 6.5, reader("B", 90)), said("c", 6.5, reader("C", 80)))
    assert is_caught_up(still, PIN) is False
    assert is_caught_up(after(still, said("c", 7, reader("C", 100))), PIN) is True, "it has what the writer had"
    assert is_caught_up(after(still, said("c", 7, reader("C", 200))), PIN) is True, "it has all"
    gone = after(still, silent("b", 8, identity("B"), REFUSED), silent("c", 8, identity("C"), REFUSED))
    assert is_caught_up(gone, PIN) is None, "no reader qualifies, which is another trouble"


def test_a_reader_without_a_position_shows_no_delay():
    unproven = reader("B", 90)._replace(unproven="it has filters")
    found = after(ABC, said("a", 1, writer("A")), said("b", 7, unproven))
    assert is_caught_up(found, PIN) is None
    late = after(found, said("c", 7, reader("C", 80)))
    assert is_caught_up(late, PIN) is False, "the other reader is late"


def test_frequent_samples_do_not_hide_a_late_reader():
    """If the samples reach less far back than the time, the oldest one counts."""
    found = LATE
    for number in range(SAMPLES):
        assert is_caught_up(found, PIN) is None
        found = after(found, said("a", 1 + number / 1000, writer("A", 100 + number)))
    assert is_caught_up(after(found, said("b", 1.3, reader("B", 90))), PIN) is False


def test_reads_that_late_readers_cannot_serve_are_reported(caplog):
    """The log says once that reads go to the writer because no reader catches up, and once that it is over."""
    caplog.set_level(logging.INFO, logger="aurora_router")

    def lines():
        found = [(r.levelname, r.getMessage()) for r in caplog.records]
        return [line for line in found if "sessions that have written" in line[1]]

    cluster = FakeCluster(readers=1)
    options = {"consistency": "global", "pin_seconds": 0.2, "probe_interval": 0.05}
    with installed(cluster), Router("postgresql+fakepg://app@db-1/shop", instances=["db-2"], **options) as router:
        router.start()
        sessions = sessionmaker(class_=RoutingSession, router=router)

        def read():
            with sessions() as s:
                s.scalar(READ)

        read()
        cluster.set_late(*cluster.readers)
        with sessions() as s:
            s.execute(WRITE)
            s.commit()
        eventually(lambda: read() or lines())
        assert [level for level, _ in lines()] == ["WARNING"]
        assert "no reader has replayed what the writer had 0.2 s before" in lines()[0][1]
        assert "db-2:5432: reader" in lines()[0][1]
        cluster.set_late(*cluster.readers, late=False)
        eventually(lambda: len(lines()) == 2)
        assert lines()[1] == ("INFO", "a reader has caught up: reads of sessions that have written go there again")


def test_late_readers_without_such_reads_are_no_trouble(caplog):
    """A reader may be late as long as nobody who has written wants to read."""
    caplog.set_level(logging.INFO, logger="aurora_router")
    cluster = FakeCluster(readers=1)
    options = {"pin_seconds": 0.1, "probe_interval": 0.05}
    with installed(cluster), Router("postgresql+fakepg://app@db-1/shop", instances=["db-2"], **options) as router:
        router.start()
        cluster.set_late(*cluster.readers)
        with sessionmaker(class_=RoutingSession, router=router)() as s:
            s.execute(WRITE)
            s.commit()
        eventually(lambda: is_caught_up(router.topology, 0.1) is False)
        cluster.set_late(*cluster.readers, late=False)
        eventually(lambda: is_caught_up(router.topology, 0.1))
    assert not any("sessions that have written" in record.getMessage() for record in caplog.records)
