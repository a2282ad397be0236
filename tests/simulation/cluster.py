"""A fake cluster under a virtual clock: servers with logs, timelines that fork at a promotion, and names that lead to servers.

It knows nothing of the router. Its LSNs count records, and a commit is a record.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field

from aurora_router.core.instance import Role, ServerId, ServerStatus
from aurora_router.core.positions import WalPosition

CLUSTER = "7001"


@dataclass(frozen=True)
class Entry:
    """The content of a record about a transaction: that it has begun, or that it commits."""

    xid: int
    key: str
    commit: bool


@dataclass
class Timeline:
    """A line of the log.

    fork: the LSN at which it left its parent
    times: the moment of each of its own records
    entries: the contents of some records, by LSN
    """

    epoch: int
    parent: Timeline | None = None
    fork: int = 0
    times: list[float] = field(default_factory=list)
    entries: dict[int, Entry] = field(default_factory=dict)
    commits: dict[str | int, int] = field(default_factory=dict)  # the LSN at which a transaction's key, and its id, commit

    @property
    def end(self) -> int:
        return self.fork + len(self.times)

    def append(self, now: float) -> int:
        """Add a record. Returns its LSN."""
        self.times.append(now)
        return self.end

    def end_at(self, moment: float) -> int:
        """The end of the log as it was at that moment."""
        return self.fork + bisect_right(self.times, moment)

    def committed(self, which: str | int) -> bool:
        """Whether a transaction commits in the history that ends with this timeline.

        which: the transaction's key, or its id
        """
        line: Timeline | None = self
        lsn = self.end
        while line is not None:
            if line.commits.get(which, lsn + 1) <= lsn:
                return True
            lsn = min(lsn, line.fork)
            line = line.parent
        return False

    def history(self, lsn: int) -> Iterator[Entry]:
        """The log's entries about transactions, up to that LSN."""
        line: Timeline | None = self
        while line is not None:
            yield from (entry for at, entry in line.entries.items() if at <= lsn)
            lsn = min(lsn, line.fork)
            line = line.parent

    def contains(self, commit: Commit, lsn: int) -> bool:
        """Whether a server on this timeline, at that LSN, has the commit."""
        line: Timeline | None = self
        while line is not None:
            if line is commit.timeline:
                return commit.lsn <= lsn
            lsn = min(lsn, line.fork)
            line = line.parent
        return False


@dataclass(frozen=True)
class Commit:
    """An acknowledged commit, and its place in the log."""

    timeline: Timeline
    lsn: int


class Machine:
    """One server.

    upstream: the server that a reader follows
    delay: seconds by which it replays late
    """

    def __init__(self, address: str, role: Role, timeline: Timeline) -> None:
        self.address = address
        self.role = role
        self.timeline = timeline
        self.lsn = timeline.end
        self.fresh_as_of = 0.0  # a reader has replayed all that its upstream had written by then
        self.upstream: Machine | None = None
        self.delay = 0.0
        self.life = 0
        self.alive = True
        self.frozen = False
        self.partitioned = False  # from the router, monitor and clients alike
        self.id = ServerId(CLUSTER, address, 5432, f"{address}.0")
        self.open: dict[int, str] = {}  # keys of the transactions that are under way, by transaction id
        self.waiting: set[int] = set()  # transactions whose COMMIT waits for a reader
        self.next_xid = 1
        self.recovered: int | None = None  # the LSN at which its last recovery ended
        self.followed = False  # that recovery was a reader's

    @property
    def reachable(self) -> bool:
        return self.alive and not self.frozen and not self.partitioned

    def has(self, commit: Commit) -> bool:
        """Whether this server has replayed the commit."""
        return self.timeline.contains(commit, self.lsn)

    def restart(self, role: Role) -> None:
        """Begin a new life in that role."""
        self.life += 1
        self.alive = True
        self.frozen = False
        self.role = role
        self.id = ServerId(CLUSTER, self.address, 5432, f"{self.address}.{self.life}")
        self.open.clear()
        self.waiting.clear()
        self.recovered = None
        self.followed = False
        if role is Role.WRITER:
            self.recover(self.timeline.end)

    def recover(self, lsn: int) -> None:
        """End a recovery. The ids of transactions whose records this server has not seen will be used again."""
        self.recovered = lsn
        self.next_xid = 1 + max((entry.xid for entry in self.timeline.history(lsn)), default=0)

    def begin(self, key: str, now: float) -> int:
        """Begin a transaction: give it an id and write its first record."""
        xid, self.next_xid = self.next_xid, self.next_xid + 1
        self.open[xid] = key
        self.timeline.entries[self.timeline.append(now)] = Entry(xid, key, commit=False)
        return xid

    def commit(self, xid: int, now: float) -> None:
        key, lsn = self.open.pop(xid), self.timeline.append(now)
        self.timeline.entries[lsn] = Entry(xid, key, commit=True)
        self.timeline.commits[key] = self.timeline.commits[xid] = lsn

    def status(self, xid: int) -> str | None:
        """The server's answer about a transaction's id, whichever transaction uses it by now."""
        if self.timeline.committed(xid):
            return "committed"
        if xid in self.open:
            return "in progress"
        return "aborted" if xid < self.next_xid else None

    def replay(self, now: float) -> None:
        """Replay the upstream's log, as a reader does all the time."""
        up = self.upstream
        if self.role is Role.WRITER:
            self.lsn = self.timeline.end
            return
        if not self.alive or self.frozen or up is None or not up.alive or up.frozen or up.role is not Role.WRITER:
            return
        if up.timeline is not self.timeline:
            if self.timeline is not up.timeline.parent or self.lsn > up.timeline.fork:
                return  # this reader has gone past the fork, so only a rebuild helps
            self.timeline = up.timeline
        moment = now - self.delay
        if moment > self.fresh_as_of:
            self.lsn = max(self.lsn, up.timeline.end_at(moment))
            self.fresh_as_of = moment

    def says(self, now: float, *, positions: bool) -> ServerStatus:
        """The server's answer to a probe."""
        self.replay(now)
        epoch = self.timeline.epoch
        if self.role is Role.WRITER:
            return ServerStatus(self.id, self.role, epoch, WalPosition(epoch, self.lsn) if positions else None)
        lag = max(now - self.fresh_as_of, 0.0)
        return ServerStatus(self.id, self.role, epoch, WalPosition(epoch, self.lsn) if positions else None, lag)


class Cluster:
    """Machines, the newest timeline, and names that lead to machines. A name of several machines leads to any of them."""

    def __init__(self, count: int, *, synchronous: bool) -> None:
        self.timeline = Timeline(1)
        self.synchronous = synchronous
        self.machines = [Machine(f"10.0.0.{n + 1}", Role.READER if n else Role.WRITER, self.timeline) for n in range(count)]
        self.writer = self.machines[0]
        for machine in self.machines[1:]:
            machine.upstream = self.writer
        self.names: dict[str, list[Machine]] = {}

    def readers(self) -> list[Machine]:
        return [m for m in self.machines if m is not self.writer and m.role is Role.READER]

    def exists(self, commit: Commit) -> bool:
        """Whether the commit is part of the newest timeline's history."""
        return self.timeline.contains(commit, self.timeline.end)

    def promote(self, machine: Machine, now: float) -> None:
        """Make a reader of the newest timeline the writer. With asynchronous replication, records that it lacks are lost."""
        machine.replay(now)
        fork = self.timeline.end if self.synchronous else machine.lsn
        machine.open.clear()
        self.timeline = Timeline(self.timeline.epoch + 1, self.timeline, fork)
        machine.timeline = self.timeline
        machine.lsn = fork
        machine.role = Role.WRITER
        machine.upstream = None
        machine.recover(fork)
        machine.followed = True
        self.writer = machine
        self.timeline.append(now)

    def follow(self, machine: Machine, now: float) -> None:
        """Let a reader follow the newest writer. It is rebuilt if its own log does not fit."""
        if machine.timeline is not self.timeline and (
            machine.timeline is not self.timeline.parent or machine.lsn > self.timeline.fork or machine.role is Role.WRITER
        ):
            machine.restart(Role.READER)
            machine.timeline = self.timeline
            machine.lsn = self.timeline.fork
            machine.fresh_as_of = self.timeline.times[0] - 1e-6
        elif not machine.alive or machine.role is Role.WRITER:
            machine.restart(Role.READER)
        machine.upstream = self.writer
        machine.fresh_as_of = min(machine.fresh_as_of, now - machine.delay)

    def restart_reader(self, machine: Machine, back: int) -> None:
        """Let a reader crash and come back, a little further back in its log than it was."""
        machine.restart(Role.READER)
        line = machine.timeline
        machine.lsn = max(line.fork, machine.lsn - back)
        if machine.lsn < line.end:
            machine.fresh_as_of = min(machine.fresh_as_of, line.times[machine.lsn - line.fork] - 1e-6)
