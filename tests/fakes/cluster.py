"""A cluster in memory that speaks like PostgreSQL: one writer and its readers, an account of stock, and losses at each step.

It has what the shell of the router decides by: roles, positions, lag, timelines, transactions, and refusals. It knows three
statements on data: READ, WRITE, and NOWHERE, which fails. All others are answered with a row if they are a SELECT.
"""

from __future__ import annotations

import itertools
import re
import threading
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from aurora_router.servers import WHO, postgresql

if TYPE_CHECKING:
    from tests.fakes.driver import Connection

NOWHERE = "SELECT * FROM nowhere"
READ = "SELECT stock FROM item WHERE id = 1"
WRITE = "UPDATE item SET stock = stock + 1 WHERE id = 1"
START, RECORD = 0x5000, 0x100  # where the log begins, and the bytes of one commit
STOCK = 10

Row = tuple[Any, ...]


class Refused(Exception):
    """The server refuses a statement with a code."""


class Lost(Exception):
    """The connection is lost: nobody will answer."""


class FakeServer:
    """One server.

    version: what it answers to the question what it is.
    heard: the texts that it got, oldest first.
    refuses: the code with which it refuses READ; None if it does not.
    isolation: its default level.
    is_full: whether it has no room for one more connection.
    replayed: the end of its log.
    """

    def __init__(self, cluster: FakeCluster, number: int, follows: bool) -> None:
        self.cluster = cluster
        self.host = f"db-{number}"
        self.version: Row = ("PostgreSQL 16.4 on x86_64", False)
        self.heard: list[str] = []
        self.refuses: str | None = None
        self.isolation = "read committed"
        self.follows = follows
        self.is_down = self.is_full = self.is_late = self.was_promoted = False
        self.replayed = START
        self.connections: weakref.WeakSet[Connection] = weakref.WeakSet()
        self._address = f"10.0.0.{number}"

    def answer(self, text: str, values: Any, connection: Connection) -> list[Row]:
        """Answer a statement. Raises Refused and Lost."""
        with self.cluster.lock:
            lost = self.cluster.loses(self, text)
            if lost is False:
                self._drop(connection)
            if self.is_down or connection.is_dead:
                raise Lost
            self.heard.append(text)
            rows = self._answer(text, values, connection)
            if lost or (self.cluster.poison is not None and self.cluster.poison in text):
                self._drop(connection)
                raise Lost
            return rows

    def _answer(self, text: str, values: Any, connection: Connection) -> list[Row]:
        if text == READ:
            if self.refuses is not None:
                raise Refused(self.refuses)
            return [(self.cluster.stock(self.replayed) + connection.pending,)]
        if text == NOWHERE:
            raise Refused("42P01")
        if text == WRITE:
            if self.follows or connection.read_only:
                raise Refused("25006")
            connection.pending += 1
            if connection.alone:
                self.cluster.commit(connection)
            return []
        if text == "COMMIT":
            self.cluster.commit(connection)
        elif text == "ROLLBACK":
            self._roll_back(connection)
        return self._of_itself(text, values, connection)

    def _of_itself(self, text: str, values: Any, connection: Connection) -> list[Row]:
        """What the router asks a server."""
        timeline = None if self.follows else f"{self.cluster.timeline:08X}"
        recovered = f"0/{self.cluster.promoted_at:X}" if self.was_promoted or self.follows else None
        if text == WHO["postgresql"]:
            return [self.version]
        if text == postgresql.PROBE:
            return [self._state(timeline)]
        if text == postgresql.NOTE:
            connection.xid = next(self.cluster.xids)
            return [(connection.xid, f"0/{self.replayed:X}", recovered)]
        if text == postgresql.EVIDENCE:
            return [(*self._identity, timeline, recovered, self.was_promoted)]
        if text == postgresql.STATUS:
            return [("committed" if values["xid"] in self.cluster.committed else "aborted",)]
        if postgresql.IDENTITY in text:
            return [(*self._identity, True, None, None)]
        if text == postgresql.COMMIT_TABLE_FLAW:
            return [(None,)]
        if text == postgresql.FUNCTIONS:
            return []
        return [(42,)] if text.lstrip().startswith("SELECT") else []

    @property
    def _identity(self) -> Row:
        return (160004, "7001", self._address, 5432, "1772600767.000089", self.follows)

    def _state(self, timeline: str | None) -> Row:
        here = f"0/{self.replayed:X}"
        sent = f"0/{self.cluster.end:X}"
        log = (None, None, None, here, sent) if self.follows else (here, here, timeline, None, None)
        age = 5.0 if self.replayed < self.cluster.end else None
        known = self.cluster.timeline
        return (*self._identity, "on", self.isolation, 8192, "16MB", *log, known, known, self.follows, age)

    def _roll_back(self, connection: Connection) -> None:
        connection.pending, connection.xid = 0, None

    def _drop(self, connection: Connection) -> None:
        self._roll_back(connection)
        connection.drop()


class FakeCluster:
    """The servers, by host: db-1 is the writer.

    poison: a word that makes a statement lose its connection on every server; None if there is none.
    """

    def __init__(self, readers: int = 1) -> None:
        self.lock = threading.RLock()
        self.servers = {f"db-{n}": FakeServer(self, n, follows=n > 1) for n in range(1, readers + 2)}
        self.commits: list[int] = []  # where the record of each ends
        self.committed: set[int] = set()  # the ids of transactions
        self.xids = itertools.count(700)
        self.timeline = 1
        self.promoted_at = START
        self.poison: str | None = None
        self._losing: list[tuple[str, bool]] = []

    @property
    def writer(self) -> FakeServer:
        """The server that accepts writes, whether it is down or not."""
        return next(server for server in self.servers.values() if not server.follows)

    @property
    def readers(self) -> Sequence[FakeServer]:
        """The servers that follow the writer."""
        return [server for server in self.servers.values() if server.follows]

    @property
    def end(self) -> int:
        """The end of the writer's log."""
        return self.writer.replayed

    def stock(self, at: int) -> int:
        """What a server shows whose log ends there."""
        return STOCK + sum(end <= at for end in self.commits)

    def commit(self, connection: Connection) -> None:
        """Commit what a connection has written."""
        writer = self.writer
        for _ in range(connection.pending):
            writer.replayed += RECORD
            self.commits.append(writer.replayed)
        if connection.xid is not None:
            self.committed.add(connection.xid)
        connection.pending, connection.xid = 0, None
        self.replicate()

    def replicate(self) -> None:
        """Bring each reader to the end of the log, unless it is late."""
        for reader in self.readers:
            if not (reader.is_late or reader.is_down):
                reader.replayed = self.end

    def set_late(self, *readers: FakeServer, late: bool = True) -> None:
        """Make these readers replay nothing any more, or all that there is."""
        with self.lock:
            for reader in readers:
                reader.is_late = late
            self.replicate()

    def kill(self, server: FakeServer) -> None:
        """End a server and its connections."""
        with self.lock:
            server.is_down = True
            self.drop_connections(server)

    def drop_connections(self, server: FakeServer) -> None:
        """Lose all connections to a server."""
        with self.lock:
            for connection in [*server.connections]:
                connection.drop()

    def promote(self, reader: FakeServer) -> None:
        """Make a reader the writer. What it has not replayed is lost."""
        with self.lock:
            self.writer.follows = True
            reader.follows, reader.is_late, reader.was_promoted = False, False, True
            self.commits = [end for end in self.commits if end <= reader.replayed]
            self.timeline += 1
            self.promoted_at = reader.replayed
            self.replicate()

    def lose(self, words: str, *, answer: bool) -> None:
        """Lose the connection on which the writer gets the next statement with these words.

        answer: True: after the server has done it, so that only the answer is lost. False: before.
        """
        self._losing.append((words, answer))

    def loses(self, server: FakeServer, text: str) -> bool | None:
        """Whether the connection of a statement is lost before it (False) or after it (True); None if it is not."""
        for words, answer in self._losing:
            if server is self.writer and re.search(rf"\b{words}\b", text):
                self._losing.remove((words, answer))
                return answer
        return None
