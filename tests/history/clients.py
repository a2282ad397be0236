"""Clients on two hosts that read, write and hand tokens to each other while readers fall behind and writers are replaced.

A host is a Router of its own. A client does one scope after the other, each on any host. It begins with tokens that other clients
have given, reads and writes, and gives a token. The database raises the versions, so that all writes of a key have one order.
"""

from __future__ import annotations

import contextlib
import itertools
import random
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import sessionmaker

from aurora_router import Effect, Router, RouterError, RoutingSession, merge_tokens
from aurora_router.local.cluster import Cluster
from tests.history.history import Gave, Operation, Read, Took, Write
from tests.integration.shop import eventually, family

HOSTS = 2
THREADS = 8  # of each host
KEYS = 16
READS_AT_ONCE = 3  # keys that one statement reads
WRITES = 0.15  # share of the operations
LONGEST = 12  # operations of a scope
RECENT = 32  # tokens that are still handed out

TABLE = (
    "DROP TABLE IF EXISTS register",
    "CREATE TABLE register (id int PRIMARY KEY, version int NOT NULL)",
    f"INSERT INTO register VALUES {', '.join(f'({key}, 0)' for key in range(1, KEYS + 1))}",
)
ON_WRITER = {
    "postgresql": (
        "GRANT ALL ON register TO app",
        "CREATE OR REPLACE FUNCTION on_writer() RETURNS bool LANGUAGE sql STABLE AS 'SELECT NOT pg_is_in_recovery()'",
    ),
    "mysql": (
        "DROP FUNCTION IF EXISTS on_writer",
        "CREATE FUNCTION on_writer() RETURNS bool READS SQL DATA RETURN NOT @@global.read_only",
    ),
}
# Under REPEATABLE READ, the default of MySQL and MariaDB, a unit that reads on the writer keeps its snapshot, whoever commits.
ROUTER: dict[str, dict[str, Any]] = {
    "postgresql": {},
    "mysql": {"engine_options": {"isolation_level": "READ COMMITTED"}},
}
READ = text(f"SELECT id, version, on_writer() FROM register WHERE id IN ({', '.join(f':k{n}' for n in range(READS_AT_ONCE))})")
RAISE = text("UPDATE register SET version = version + 1 WHERE id = :key")
RAISED = text("SELECT version FROM register WHERE id = :key")


def raise_version(session: RoutingSession, key: int) -> int:
    """Raise the version of a row in the session's transaction. It locks the row, so that nobody else uses this version."""
    session.execute(RAISE, {"key": key})
    version: int = session.execute(RAISED, {"key": key}).scalar_one()
    return version


@dataclass
class Done:
    """The work of all clients.

    counts: operations by kind, errors, faults
    """

    wanted: int
    history: list[Operation] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    tokens: deque[tuple[int, str]] = field(default_factory=lambda: deque(maxlen=RECENT))
    numbers: itertools.count[int] = field(default_factory=itertools.count)  # of scopes and tokens
    broken: list[BaseException] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def operations(self) -> int:
        return self.counts["reads on readers"] + self.counts["reads on the writer"] + self.counts["writes"]

    @property
    def over(self) -> bool:
        return self.operations >= self.wanted or bool(self.broken)

    def count(self, what: str) -> None:
        with self.lock:
            self.counts[what] += 1


class Client:
    """The work of one thread: scope after scope, until enough is done."""

    def __init__(self, done: Done, hosts: Sequence[Router], seed: int) -> None:
        self.done = done
        self.hosts = hosts
        self.rnd = random.Random(seed)

    def run(self) -> None:
        try:
            while not self.done.over:
                self.rnd.choice((self.in_scope, self.in_session))()
        except BaseException as error:
            self.done.broken.append(error)

    # -- scopes

    def in_scope(self) -> None:
        """Do one causal scope with random sessions and connections, one unit after the other."""
        router = self.rnd.choice(self.hosts)
        Session = sessionmaker(class_=RoutingSession, router=router)
        number, given = self.begin()
        with router.causal_scope(given) as scope, Session() as kept:

            def connection() -> None:
                with router.connect(read_only=True) as connection:
                    self.read(number, connection.execute)

            def session() -> None:
                with Session(read_only=self.rnd.choice((None, True))) as s:
                    for _ in range(self.rnd.randint(1, 3)):
                        self.read(number, s.execute)

            def same_session() -> None:
                self.read(number, kept.execute)
                kept.rollback()

            def write() -> None:
                if self.rnd.random() < 0.3:
                    self.read(number, kept.execute)  # opens a unit that must not miss the write
                self.write(number, lambda update: router.run_transaction(Session, update))
                self.read(number, kept.execute)
                kept.rollback()

            for _ in range(self.rnd.randint(1, LONGEST)):
                self.one(write if self.rnd.random() < WRITES else self.rnd.choice((connection, session, same_session)), kept)
            self.give(number, scope.token)

    def in_session(self) -> None:
        """Do one session without a scope."""
        number, given = self.begin()
        with RoutingSession(router=self.rnd.choice(self.hosts), after=given) as session:

            def read() -> None:
                self.read(number, session.execute)
                if self.rnd.random() < 0.6:  # otherwise the unit goes on
                    session.rollback()

            def commit(update: Callable[[RoutingSession], int]) -> int:
                version = update(session)
                session.commit()
                return version

            def write() -> None:
                self.write(number, commit)

            for _ in range(self.rnd.randint(1, LONGEST)):
                self.one(write if self.rnd.random() < WRITES else read, session)
            session.rollback()
            self.give(number, session.consistency_token)

    def begin(self) -> tuple[int, str | None]:
        """The number of a new scope, and its token: None, or one or two tokens of other clients, merged."""
        number = next(self.done.numbers)
        given = list(self.done.tokens)
        taken = self.rnd.sample(given, min(self.rnd.choice((0, 1, 1, 2)), len(given)))
        if self.rnd.random() < 0.5:
            taken = given[-1:]  # so new that perhaps no reader has its writes
        if not taken:
            return number, None
        self.done.history.append(Took(number, tuple(token for token, _ in taken)))
        return number, merge_tokens(*(words for _, words in taken))

    def give(self, number: int, token: str | None) -> None:
        if token is not None:
            given = next(self.done.numbers)
            self.done.history.append(Gave(number, given))
            self.done.tokens.append((given, token))

    # -- operations

    def read(self, scope: int, execute: Callable[[Any, Any], Any]) -> None:
        keys = self.rnd.sample(range(1, KEYS + 1), READS_AT_ONCE)
        began = time.monotonic()
        found = execute(READ, {f"k{n}": key for n, key in enumerate(keys)}).all()
        shown = {key: version for key, version, _ in found}
        self.done.history.append(Read(scope, began, time.monotonic(), shown, on_writer=bool(found[0][2])))
        self.done.count("reads on the writer" if found[0][2] else "reads on readers")

    def write(self, scope: int, commit: Callable[[Callable[[RoutingSession], int]], int]) -> None:
        key = self.rnd.randint(1, KEYS)
        began = time.monotonic()
        version = commit(lambda s: raise_version(s, key))
        self.done.history.append(Write(scope, began, time.monotonic(), key, version))
        self.done.count("writes")

    def one(self, operation: Callable[[], None], session: RoutingSession) -> None:
        """Do one operation. If it fails it is not in the history, because nothing was shown or acknowledged."""
        try:
            operation()
        except (DBAPIError, RouterError) as error:
            self.done.count(f"failed: {type(error).__name__}")
            session.rollback()


# -- what happens to the cluster --------------------------------------------------------------------------------------


def fall_behind(cluster: Cluster[Any], rnd: random.Random) -> None:
    """Let readers replay late, or not at all, for a while. Then one catches up."""
    for _ in range(rnd.randint(3, 6)):
        reader = rnd.choice(cluster.readers)
        match rnd.choice(("late", "late", "paused", "current")):
            case "late":
                cluster.set_lag(reader, rnd.uniform(0.01, 0.2))
            case "current":
                cluster.set_lag(reader, 0)
            case "paused":
                cluster.pause_replay(reader)
                time.sleep(rnd.uniform(0.05, 0.4))
                cluster.resume_replay(reader)
        time.sleep(rnd.uniform(0.1, 0.5))
    cluster.set_lag(rnd.choice(cluster.readers), 0)


def replace_writer(cluster: Cluster[Any], rnd: random.Random) -> str:
    """Promote another writer, after the old one died or while it lives on."""
    old = cluster.writer
    how = rnd.choice(("killed", "replaced"))
    if how == "killed":
        cluster.kill(old)
        time.sleep(rnd.uniform(0.0, 0.5))
    cluster.promote()
    time.sleep(rnd.uniform(0.0, 0.5))
    cluster.rejoin(old)
    return how


def run(cluster: Cluster[Any], operations: int, *, seed: int = 0, promotions: int = 8, **options: Any) -> Done:
    """Let clients do operations on a cluster that replicates synchronously, and make faults meanwhile.

    promotions: at most so many, evenly among the operations, because a router takes a reader that died often back late
    options: settings of the routers
    Raises a client's error that comes neither from the database nor from the router.
    """
    for statement in (*TABLE, *ON_WRITER[family(cluster)]):
        cluster.execute(statement)
    cluster.wait_in_sync()
    done = Done(operations)
    rnd = random.Random(seed)
    addresses = [instance.address for instance in cluster.instances if instance != cluster.writer]
    options = {**ROUTER[family(cluster)], **options}
    with contextlib.ExitStack() as stack:
        with Router(cluster.url) as router:
            router.init_commit_table()
        hosts = [stack.enter_context(Router(cluster.url, instances=addresses, **options)) for _ in range(HOSTS)]
        eventually(lambda: all(host.explain("SELECT on_writer()").effect is Effect.READ for host in hosts))  # once it is known
        clients = [Client(done, hosts, seed * 1000 + number) for number in range(HOSTS * THREADS)]
        threads = [threading.Thread(target=client.run, daemon=True) for client in clients]
        for thread in threads:
            thread.start()
        made = 0
        try:
            while not done.over:
                fall_behind(cluster, rnd)
                if made < promotions and not done.over and made * operations <= done.operations * promotions:
                    done.counts[replace_writer(cluster, rnd)] += 1
                    made += 1
        finally:
            done.wanted = 0
            for thread in threads:
                thread.join(60)
        if any(thread.is_alive() for thread in threads):
            raise TimeoutError("a client hangs")
    if done.broken:
        raise done.broken[0]
    return done
