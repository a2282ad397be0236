"""The numbers of a router: what each counts, and that looking at them costs and changes nothing."""

from __future__ import annotations

import dataclasses
import json
import socket

import pytest

from aurora_router import InstanceStats, Role, Router, RouterStats
from aurora_router.core.instance import Instance
from aurora_router.telemetry.stats import Counters, PoolUsage

URL = "postgresql+psycopg://app@db-1/shop"


def test_a_router_that_nobody_used_has_done_nothing(monkeypatch):
    """stats() neither starts the router nor connects, and all that only grows is 0."""
    monkeypatch.setattr(socket, "socket", None)
    router = Router(URL, instances=["db-2"])
    stats = router.stats()
    assert [of.instance for of in stats.instances] == ["db-1:5432", "db-2:5432"]
    assert {of.role for of in stats.instances} == {None}
    assert stats.by_id["db-2:5432"] == InstanceStats("db-2:5432", None, None, 0, 0, 15, 0, 0, 0, 0, 0, 0, 0)
    assert stats == RouterStats(stats.instances, 0, 0, 0, 0, 0, 0, 0)
    assert not router.started


@pytest.mark.parametrize(
    ("options", "limit"),
    [
        ({"pool_size": 2, "max_overflow": 1}, 3),
        ({"pool_size": 2, "max_overflow": -1}, None),
    ],
)
def test_the_limit_of_a_pool_is_that_of_the_engine_options(options, limit):
    assert {of.pool_limit for of in Router(URL, engine_options=options).stats().instances} == {limit}


def test_reads_are_counted_by_the_role_that_served_them():
    """A reader that becomes the writer keeps the reads that it served as a reader."""
    counters = Counters()
    counters.reads_as_reader["a"] += 2
    counters.reads_as_writer["a"] += 1
    counters.reads_as_reader["b"] += 4
    of_each = [counters.of(Instance(name, name, 1, role=role), PoolUsage(1, 2, 3, 4)) for name, role in ROLES.items()]
    stats = RouterStats(tuple(of_each), 0, 0, 0, 0, 0, 0, 0)
    assert (stats.reads_by_readers, stats.reads_by_writer) == (6, 1)
    assert [of.role for of in stats.instances] == [Role.WRITER, Role.READER]
    assert (of_each[0].pool_in_use, of_each[0].connects_waiting) == (1, 4)


ROLES = {"a": Role.WRITER, "b": Role.READER}


def test_an_instance_that_is_removed_takes_its_numbers_along():
    counters = Counters()
    for counted in (counters.retries, counters.connects, counters.writes):
        counted["a"] += 1
        counted["b"] += 1
    counters.writer_waits += 1
    counters.keep({"b"})
    assert ({*counters.retries}, {*counters.connects}, {*counters.writes}) == ({"b"}, {"b"}, {"b"})
    assert counters.writer_waits == 1


def test_a_forked_child_begins_to_count_anew():
    counters = Counters()
    counters.writes["a"] += 1
    counters.reader_waits += 1
    counters.forked()
    assert counters.of(Instance("a", "a", 1), PoolUsage(0, 0, None, 0)).writes == 0
    assert counters.reader_waits == 0


def test_stats_are_frozen_and_can_be_sent_as_json():
    stats = Router(URL).stats()
    with pytest.raises(dataclasses.FrozenInstanceError):
        stats.writer_waits = 1
    sent = json.loads(json.dumps(dataclasses.asdict(stats), default=str))
    assert sent["instances"][0]["instance"] == "db-1:5432"
