"""Small topologies, and the observations that make them. The tests of topologies and of the log use them."""

from functools import reduce

from aurora_router.core import gtid
from aurora_router.core.gtid import GtidSet, MariadbGtid, mariadb_epoch
from aurora_router.core.instance import Instance, Observation, ProbeFailure, Role, ServerId, ServerStatus
from aurora_router.core.positions import WalPosition
from aurora_router.core.topology import Topology, add, observe

WRITER, READER = Role
REFUSED, NOT_NOW, TIMEOUT, MISCONFIGURED = ProbeFailure


def identity(address, started=None, cluster="7001"):
    return ServerId(cluster, address, 5432, started or f"{address}'s first start")


def writer(address, lsn=100, *, epoch=1, **options):
    return ServerStatus(identity(address, **options), WRITER, epoch, WalPosition(epoch, lsn))


def reader(address, lsn=100, *, epoch=1, lag=0.0, **options):
    return ServerStatus(identity(address, **options), READER, epoch, WalPosition(epoch, lsn), lag)


def said(instance, asked, server, *, pooled=False, took=0.001):
    return Observation(instance, asked, asked + took, server, pooled=pooled)


def silent(instance, asked, about=None, probe_failure=TIMEOUT):
    return Observation(
        instance, asked, asked + 1.0, about=about, probe_failure=probe_failure, error=f"{probe_failure.value} at {asked:g}"
    )


def topology(*ids, reader_endpoint=None):
    found = reduce(add, (Instance(i, i, 5432) for i in ids), Topology())
    return add(found, Instance(reader_endpoint, reader_endpoint, 5432, reader_only=True)) if reader_endpoint else found


def after(start, *observations):
    return reduce(observe, observations, start)


ABC = topology("a", "b", "c")
WELL = after(ABC, said("a", 1, writer("A")), said("b", 1, reader("B")), said("c", 1, reader("C", 90)))


def mysql(address, text, opened=0.0):
    made = {"A": 1, "B": 2, "C": 3}
    sources = ",".join(f"00000000-0000-0000-0000-{made[name]:012}:1-{text[n + 1]}" for n, name in enumerate(text) if name in made)
    return ServerStatus(
        identity(address), WRITER, 1, GtidSet.from_server(1, sources, f"00000000-0000-0000-0000-{made[address]:012}", opened)
    )


def mariadb(address, role, text, own, state):
    epoch = mariadb_epoch(state, own if role is READER else None)
    position = MariadbGtid.from_server(epoch, text, own, gtid.writer_starts(state, own if role is READER else None))
    return ServerStatus(identity(address), role, epoch if role is WRITER else 0, position, 0.0 if role is READER else None)
