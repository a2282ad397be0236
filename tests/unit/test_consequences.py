"""What follows from a new topology: which connections are useless, and which news there is, in a table."""

from itertools import product

import pytest

from aurora_router.cluster import topology_changes
from aurora_router.core import events
from aurora_router.core.consequences import MIXED, RENAMED, Evict, LeaveRole, Warn, after_change
from aurora_router.core.instance import Instance
from aurora_router.core.topology import Topology, add, remove
from tests.unit.topologies import (
    ABC,
    MISCONFIGURED,
    READER,
    REFUSED,
    TIMEOUT,
    WELL,
    WRITER,
    after,
    identity,
    mariadb,
    reader,
    said,
    silent,
    topology,
    writer,
)

PUBLISHED = 7.0  # when the new topology was published

# One instance, in each state that tells something. A test server cannot be brought to each of them, nor from each to each other.
UNSEEN = Instance("b", "b", 5432)
DOWN = UNSEEN._replace(error="refused", probe_failure=REFUSED, last_observed_at=1.0)
SILENT = DOWN._replace(error="no answer", probe_failure=TIMEOUT)
WRONG_PASSWORD = DOWN._replace(error="wrong password", probe_failure=MISCONFIGURED)
NO_DATABASE = WRONG_PASSWORD._replace(error="no such database")
STOPPED = after(ABC, said("b", 1, reader("B")._replace(replication_error="error 1"))).by_id["b"]
STOPPED_AGAIN = after(ABC, said("b", 2, reader("B")._replace(replication_error="error 2"))).by_id["b"]
READS = UNSEEN._replace(role=READER, error="", last_observed_at=1.0, servers=frozenset({identity("B")}))
WRITES = READS._replace(role=WRITER)
READS_RENAMED = READS._replace(servers=frozenset({identity("B", cluster="7002")}))
READS_RESTARTED = READS._replace(servers=frozenset({identity("B", "a later start")}))
WRITES_RESTARTED = READS_RESTARTED._replace(role=WRITER)
READS_ELSEWHERE = READS._replace(servers=frozenset({identity("X")}))
WRITES_ELSEWHERE = READS_ELSEWHERE._replace(role=WRITER)
READS_ON_BOTH = READS._replace(servers=frozenset({identity("B"), identity("X")}))
READS_ON_NEITHER = READS._replace(servers=frozenset({identity("Y")}))
READS_UNPROVEN = READS._replace(unproven="it has a filter")
READS_UNPROVEN_ELSE = READS._replace(unproven="it has another filter")
WRITES_UNPROVEN = WRITES._replace(unproven="its log has a part")
READS_POOLED = READS._replace(pooled=True)

AS_READER, AS_WRITER = events.InstanceUp("b", "reader"), events.InstanceUp("b", "writer")
RESTARTED, ELSEWHERE = "it was restarted", "the name leads to another server"
NAMED, REMOVED = "its cluster has another name", "removed"
UNPROVEN = "%s: %s session that has written: %s"


def down(why):
    return events.InstanceDown("b", why)


def of(instance):
    return Topology() if instance is None else Topology((instance,), by_id={instance.id: instance})


def consequences(was, now):
    return list(after_change(of(was), of(now), PUBLISHED))


@pytest.mark.parametrize(
    ("was", "now", "expected"),
    [
        # it comes
        (None, UNSEEN, []),
        (None, READS, [AS_READER]),
        (None, DOWN, [down("refused")]),
        (UNSEEN, READS, [AS_READER]),
        (UNSEEN, WRITES, [AS_WRITER]),
        (UNSEEN, DOWN, [down("refused")]),
        (UNSEEN, WRONG_PASSWORD, [down("wrong password")]),
        (DOWN, READS, [AS_READER]),
        (STOPPED, WRITES, [AS_WRITER]),
        # it goes
        (UNSEEN, None, [Evict("b", REMOVED)]),
        (READS, None, [Evict("b", REMOVED)]),
        (READS, DOWN, [Evict("b", "refused", PUBLISHED), down("refused")]),
        (WRITES, SILENT, [Evict("b", "no answer", PUBLISHED), down("no answer")]),
        (READS, STOPPED, [Evict("b", STOPPED.error, PUBLISHED), down(STOPPED.error)]),
        (READS, UNSEEN, [Evict("b", "not probed yet", PUBLISHED), down("not probed yet")]),
        # it stays unusable: told again only if somebody must mend something else
        (DOWN, SILENT, []),
        (DOWN, WRONG_PASSWORD, [down("wrong password")]),
        (WRONG_PASSWORD, NO_DATABASE, [down("no such database")]),
        (WRONG_PASSWORD, DOWN, []),
        (WRONG_PASSWORD, STOPPED, [down(STOPPED.error)]),
        (STOPPED, STOPPED_AGAIN, []),
        (STOPPED, WRONG_PASSWORD, [down("wrong password")]),
        (DOWN, UNSEEN, []),
        # another role on the same server
        (READS, WRITES, [LeaveRole(READS), AS_WRITER]),
        (WRITES, READS, [LeaveRole(WRITES), AS_READER]),
        # other servers: connections in use stay if they may still be good
        (READS, READS_RESTARTED, [Evict("b", RESTARTED, PUBLISHED)]),
        (WRITES, WRITES_RESTARTED, [Evict("b", RESTARTED, PUBLISHED)]),
        (WRITES, READS_RESTARTED, [Evict("b", RESTARTED, PUBLISHED), AS_READER]),
        (READS, READS_ELSEWHERE, [Evict("b", ELSEWHERE)]),
        (READS, WRITES_ELSEWHERE, [Evict("b", ELSEWHERE, PUBLISHED), AS_WRITER]),
        (READS, READS_RENAMED, [Evict("b", NAMED)]),
        (WRITES, READS_RENAMED, [Evict("b", RESTARTED, PUBLISHED), AS_READER]),
        (READS, READS_ON_BOTH, []),
        (READS_ON_BOTH, READS_ELSEWHERE, []),
        (READS_ON_BOTH, READS_ON_NEITHER, [Evict("b", ELSEWHERE)]),
        (READS_ON_BOTH, READS_RESTARTED, [Evict("b", ELSEWHERE)]),
        # what somebody may have to change
        (READS, READS_UNPROVEN, [Warn(UNPROVEN, ("b", "it serves no", "it has a filter"))]),
        (READS_UNPROVEN, READS_UNPROVEN, []),
        (READS_UNPROVEN, READS_UNPROVEN_ELSE, [Warn(UNPROVEN, ("b", "it serves no", "it has another filter"))]),
        (READS_UNPROVEN, READS, []),
        (WRITES, WRITES_UNPROVEN, [Warn(UNPROVEN, ("b", "no reader serves a", "its log has a part"))]),
        (None, READS_UNPROVEN, [AS_READER, Warn(UNPROVEN, ("b", "it serves no", "it has a filter"))]),
        (READS, READS_POOLED, [Warn(MIXED, ("b",))]),
        (None, READS_POOLED, [AS_READER, Warn(MIXED, ("b",))]),
        (READS_POOLED, READS_POOLED, []),
        (READS_POOLED, READS, []),
    ],
)
def test_what_follows_from_a_change_of_one_instance(was, now, expected):
    """The table says what is evicted, left and told, in order."""
    assert consequences(was, now) == expected


STATES = [
    None,
    *(UNSEEN, DOWN, SILENT, WRONG_PASSWORD, NO_DATABASE, STOPPED, STOPPED_AGAIN),
    *(READS, READS_RENAMED, READS_RESTARTED, READS_ELSEWHERE, READS_ON_BOTH, READS_ON_NEITHER),
    *(READS_UNPROVEN, READS_UNPROVEN_ELSE, READS_POOLED),
    *(WRITES, WRITES_RESTARTED, WRITES_ELSEWHERE, WRITES_UNPROVEN),
]


@pytest.mark.parametrize(("was", "now"), [*product(STATES, STATES)])
def test_what_holds_for_any_change_of_one_instance(was, now):
    """Useless connections are discarded once and before the news. The role that is told is the role that the instance has."""
    found = consequences(was, now)
    discards = [each for each in found if isinstance(each, (Evict, LeaveRole))]
    told = [each for each in found if isinstance(each, (events.InstanceUp, events.InstanceDown))]
    assert found[: len(discards)] == discards
    assert len(discards) <= 1
    assert len(told) <= 1
    had_role, has_role = was is not None and was.role is not None, now is not None and now.role is not None
    if had_role and (not has_role or was.role is not now.role or was.servers.isdisjoint(now.servers)):
        assert discards
    if was is now:
        assert not found
    if has_role != had_role and now is not None:
        assert told == [events.InstanceUp("b", now.role.value) if has_role else events.InstanceDown("b", now.error)]


LOST = after(WELL, silent("a", 2, identity("A"), REFUSED))
PROMOTED = after(LOST, said("b", 3, writer("B", 100, epoch=2)))
MARIADB = after(topology("a"), said("a", 1, mariadb("A", WRITER, "0-1-5", 1, "0-1-5")))


def moved(start, cluster):
    """Return a topology in which the first instance's server is the same, but its cluster has another name."""
    server = start.instances[0].tracked[0].server
    return after(start, said("a", 9, server._replace(id=server.id._replace(cluster=cluster))))


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        (WELL, WELL, []),
        (WELL, after(WELL, silent("a", 2, identity("A"))), []),
        (
            ABC,
            WELL,
            [
                events.InstanceUp("a", "writer"),
                events.InstanceUp("b", "reader"),
                events.InstanceUp("c", "reader"),
                events.WriterChanged(None, "a", 1),
            ],
        ),
        (
            WELL,
            LOST,
            [
                Evict("a", "refused at 2", PUBLISHED),
                events.InstanceDown("a", "refused at 2"),
                events.WriterChanged("a", None, 1),
            ],
        ),
        (
            LOST,
            PROMOTED,
            [
                LeaveRole(LOST.by_id["b"]),
                events.InstanceUp("b", "writer"),
                events.WriterChanged(None, "b", 2),
            ],
        ),
        (
            WELL,
            PROMOTED,
            [
                Evict("a", "refused at 2", PUBLISHED),
                events.InstanceDown("a", "refused at 2"),
                LeaveRole(WELL.by_id["b"]),
                events.InstanceUp("b", "writer"),
                events.WriterChanged("a", "b", 2),
            ],
        ),
        (WELL, remove(WELL, "a"), [Evict("a", "removed"), events.WriterChanged("a", None, 1)]),
        (WELL, add(WELL, Instance("d", "d", 5432)), []),
        (WELL, Topology(), [*(Evict(i, "removed") for i in "abc"), events.WriterChanged("a", None, 0)]),
        (
            MARIADB,
            moved(MARIADB, "mariadb-42"),
            [Evict("a", NAMED), Warn(RENAMED, ("7001", "mariadb-42"))],
        ),
        (Topology(cluster="7001"), Topology(cluster="7001"), []),
        (Topology(cluster="7001"), Topology(), []),
        (Topology(), Topology(cluster="7001"), []),
        (Topology(cluster="7001"), Topology(cluster="7002"), [Warn(RENAMED, ("7001", "7002"))]),
    ],
)
def test_what_follows_from_a_change_of_the_topology(old, new, expected):
    """The instances come in their order, and what concerns the whole cluster comes last."""
    assert list(after_change(old, new, PUBLISHED)) == expected


class StubbornPools:
    """Pools whose connections cannot be discarded completely."""

    def __init__(self):
        self.asked = []

    def evict(self, instance, *, shut_down_before=None):
        self.asked.append((instance, shut_down_before))
        raise SystemExit

    def leave_role(self, was):
        self.asked.append((was.id, was.role))
        raise SystemExit


def test_a_pool_that_fails_does_not_hold_up_the_others(caplog):
    """If a listener on a pool raises, the other pools are discarded all the same, and the news is complete and dated."""
    pools, heard = StubbornPools(), []
    news = topology_changes.apply(pools, heard.append, WELL, PROMOTED, PUBLISHED)
    assert pools.asked == [("a", PUBLISHED), ("b", READER)]
    assert [record.args for record in caplog.records] == [("a",), ("b",)]
    assert heard == []
    for tell in news:
        tell()
    assert heard == [
        events.ConnectionsDiscarded("a", 0, "refused at 2"),
        events.InstanceDown("a", "refused at 2"),
        events.InstanceUp("b", "writer"),
        events.WriterChanged("a", "b", 2),
    ]
    assert all(event.at > 0 for event in heard)
