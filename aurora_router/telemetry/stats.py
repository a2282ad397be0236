"""The counters of a router, and the frozen records that `Router.stats()` makes of them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass
from typing import NamedTuple

from aurora_router.core.instance import Instance, Role


@dataclass(frozen=True, slots=True)
class InstanceStats:
    """The numbers of one instance. Those that only grow begin with 0 when the router is made, and in a forked child.

    instance: "host:port".
    role: as in the topology; None if the instance is not used.
    lag: seconds; None if it is unknown.
    pool_in_use, pool_idle: connections of its pool that units use, and idle ones.
    pool_limit: the most connections that the pool may have; None if there is no limit.
    pool_waits: how often a unit found no free connection there, and waited for one. It only grows.
    connects: connections that were made for units. It only grows.
    connects_waiting: connects that wait for their turn, because connects_at_once others are under way.
    retries: how often a unit failed there and was retried, there or elsewhere. It only grows.
    reads_as_reader: units that came to read there while it was a reader. It only grows.
    reads_as_writer: units that came to read there because it was the writer and no reader could serve them. It only grows.
    writes: units that had to be on the writer, because they may write or ask for the writer. An automatic unit that reads on a
        reader first counts at both instances. It only grows.
    """

    instance: str
    role: Role | None
    lag: float | None
    pool_in_use: int
    pool_idle: int
    pool_limit: int | None
    pool_waits: int
    connects: int
    connects_waiting: int
    retries: int
    reads_as_reader: int
    reads_as_writer: int
    writes: int


@dataclass(frozen=True, slots=True)
class RouterStats:
    """The numbers of a router. Those that only grow begin with 0 when the router is made, and in a forked child.

    instances: the numbers of each instance, in the topology's order. Removing an instance drops its numbers.
    units_waiting_for_writer: units that wait for a writer now.
    writer_waits: units that have waited for a writer. It only grows.
    reader_waits: units that have waited for a reader that shows what they must see (wait_for_reader). It only grows.
    writer_read_slots_in_use: units that came to read and have a connection of the writer's pool, because no reader qualifies.
    reads_waiting_for_slot: units that wait for such a connection, because reads use all that writer_share_for_reads allows.
    transaction_retries: how often run_transaction() has run a function again. It only grows.
    retries_refused: retries that were refused, because there were too many for the traffic. It only grows.
    """

    instances: tuple[InstanceStats, ...]
    units_waiting_for_writer: int
    writer_waits: int
    reader_waits: int
    writer_read_slots_in_use: int
    reads_waiting_for_slot: int
    transaction_retries: int
    retries_refused: int

    @property
    def by_id(self) -> dict[str, InstanceStats]:
        """The numbers of each instance, by "host:port"."""
        return {of.instance: of for of in self.instances}

    @property
    def reads_by_readers(self) -> int:
        """Units that came to read and went to a reader."""
        return sum(of.reads_as_reader for of in self.instances)

    @property
    def reads_by_writer(self) -> int:
        """Units that came to read and went to the writer, because no reader could serve them."""
        return sum(of.reads_as_writer for of in self.instances)


class PoolUsage(NamedTuple):
    """The pool of an instance at one moment: see the fields of InstanceStats."""

    in_use: int
    idle: int
    limit: int | None
    connects_waiting: int


class Counters:
    """Counters of one router, by instance and in all. Threads add to them without a lock."""

    def __init__(self) -> None:
        self.forked()

    def forked(self) -> None:
        """Begin with 0: at first and in a forked child."""
        self.pool_waits: defaultdict[str, int] = defaultdict(int)
        self.connects: defaultdict[str, int] = defaultdict(int)
        self.retries: defaultdict[str, int] = defaultdict(int)
        self.reads_as_reader: defaultdict[str, int] = defaultdict(int)
        self.reads_as_writer: defaultdict[str, int] = defaultdict(int)
        self.writes: defaultdict[str, int] = defaultdict(int)
        self.writer_waits = 0
        self.reader_waits = 0
        self.transaction_retries = 0
        self.retries_refused = 0

    def keep(self, instances: Collection[str]) -> None:
        """Forget all instances except these."""
        for counted in vars(self).values():
            if isinstance(counted, defaultdict):
                for gone in [instance for instance in [*counted] if instance not in instances]:
                    counted.pop(gone, None)

    def of(self, instance: Instance, pool: PoolUsage) -> InstanceStats:
        """Return the numbers of one instance."""
        where = instance.id
        return InstanceStats(
            where,
            instance.role,
            instance.lag,
            pool.in_use,
            pool.idle,
            pool.limit,
            self.pool_waits.get(where, 0),
            self.connects.get(where, 0),
            pool.connects_waiting,
            self.retries.get(where, 0),
            self.reads_as_reader.get(where, 0),
            self.reads_as_writer.get(where, 0),
            self.writes.get(where, 0),
        )
