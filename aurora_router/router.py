"""Router: what a service makes one of, and its settings."""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import os
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Concatenate, Literal, ParamSpec, TypedDict, TypeVar, Unpack

import tenacity
from sqlalchemy.engine import URL, Connection, Engine
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session
from sqlalchemy.pool import PoolProxiedConnection
from tenacity.stop import stop_base
from tenacity.wait import wait_base

from aurora_router import config
from aurora_router.causality import Causality, Consistency
from aurora_router.changes import announce
from aurora_router.core import events
from aurora_router.core.failures import Action, decide
from aurora_router.core.pacing import places_for_reads
from aurora_router.core.selection import STRATEGIES, Balance, Decision, Need, Reason, resolve
from aurora_router.core.statements import Effect, verdict
from aurora_router.core.tokens import renewed
from aurora_router.core.topology import Instance, ServerId, Silence, Topology
from aurora_router.diagnosis import classify_error
from aurora_router.engines import MODE, Engines
from aurora_router.entering import Entrance
from aurora_router.errors import ConfigurationError, RouterError
from aurora_router.gate import Gate
from aurora_router.limits import Places, Repeats
from aurora_router.listeners import Listeners
from aurora_router.monitor import HURRY, Monitor
from aurora_router.tokens import TokenRefused, Tokens, merge_tokens
from aurora_router.transactions import Attempt, attempts, fault_of_nobody
from aurora_router.unit import CommitCheck, Door, Past, Scope, Unit, current

log = logging.getLogger("aurora_router")

T = TypeVar("T")
R = TypeVar("R")
S = TypeVar("S", bound=Session)
P = ParamSpec("P")


class RunOptions(TypedDict, total=False):
    """Options of run_transaction()."""

    deadline: float | None
    stop: stop_base | None
    wait: wait_base | None
    commit_check: CommitCheck | None


REPEATS = 10  # times that one unit's reads are repeated before the error is the application's


class Router:
    """Routes units of work over the instances of one cluster.

    url: the writer's, or any instance's, with a driver ("postgresql+psycopg://...", "mysql+pymysql://...",
    "mariadb+pymysql://..."); a list of hosts is understood.
    instances: "host:port" of the others. reader_endpoint: a name behind which the readers stand, instead.
    consistency: "session": a session sees its own writes; "global": all units of this router share what they have
    written; "eventual": neither. max_lag: seconds; a reader further behind, or whose lag is unknown, is not used.
    balance: how readers are chosen, or a function (see core.selection). no_reader: where reads go when no reader
    qualifies. writer_share_for_reads: how much of the writer's pool they may have then. connects_at_once: how many new
    connections to one instance may be under way. failover_timeout: seconds to wait for a writer.
    probe_interval, probe_timeout, position_interval: seconds.
    pin_seconds: how long a session that has written stays on the writer where readers give no evidence at all.
    wait_for_reader: seconds that a read waits for a reader that has what it must see, before it goes to the writer.
    token_keys: secrets by which consistency tokens are signed, the newest last; without any they are not. token_ttl: seconds for
    which a token is honoured.
    read_only_functions: names of functions that are known not to write. stale_write_guard: whether objects that automatic units
    loaded from a reader are looked up on the writer before a flush writes them (see StaleRead). engine_options: for
    create_engine(). listeners: called with each event of core.events, in the thread where it happened.

    Connects at first use, not when it is made. Raises ConfigurationError for what can be seen to be wrong at once; what
    only the servers can tell (credentials, another cluster's instance) is raised at first use.
    """

    def __init__(
        self,
        url: str | URL,
        *,
        instances: Iterable[str] = (),
        reader_endpoint: str | None = None,
        consistency: Consistency = "session",
        max_lag: float | None = None,
        balance: Literal["least_busy", "fastest", "round_robin", "random"] | Balance = "least_busy",
        no_reader: Literal["writer", "error"] = "writer",
        writer_share_for_reads: float = 0.5,
        connects_at_once: int = 4,
        failover_timeout: float = 60.0,
        probe_interval: float = 1.0,
        probe_timeout: float = 1.0,
        position_interval: float = 0.05,
        pin_seconds: float = 5.0,
        wait_for_reader: float = 0.0,
        token_keys: Iterable[str | bytes] = (),
        token_ttl: float = 60.0,
        read_only_functions: Iterable[str] = (),
        stale_write_guard: bool = True,
        engine_options: Mapping[str, Any] | None = None,
        listeners: Iterable[Callable[[events.Event], object]] = (),
    ) -> None:
        target = config.read_url(url)
        config.check_choice("consistency", consistency, ("eventual", "session", "global"))
        config.check_choice("no_reader", no_reader, ("writer", "error"))
        if not callable(balance):
            config.check_choice("balance", balance, tuple(STRATEGIES))
        for name, seconds in (
            ("failover_timeout", failover_timeout),
            ("probe_interval", probe_interval),
            ("probe_timeout", probe_timeout),
            ("position_interval", position_interval),
            ("pin_seconds", pin_seconds),
            ("token_ttl", token_ttl),
        ):
            config.check_seconds(name, seconds)
        if max_lag is not None:
            config.check_seconds("max_lag", max_lag)
        config.check_seconds("wait_for_reader", wait_for_reader, none=True)
        config.check_share("writer_share_for_reads", writer_share_for_reads)
        config.check_count("connects_at_once", connects_at_once)
        config.check_flag("stale_write_guard", stale_write_guard)
        self._url = target.url
        self._server = target.server
        self._dialect = target.dialect
        self.failover_timeout = failover_timeout
        self.stale_write_guard = stale_write_guard
        self.emit = Listeners(tuple(config.callables("listeners", listeners)))
        options = config.check_engine_options(engine_options or {})
        pool, pool_timeout = config.pool_limits(options)
        self._for_reads = Places(places_for_reads(pool, writer_share_for_reads))
        self._ready = False
        self._probe_timeout = probe_timeout
        # What the engines and the monitor call must not keep the router alive: it closes when it is forgotten.
        me = weakref.ref(self)
        self._repeats = Repeats(self.emit)
        self.causality = Causality(consistency, me, _weakly(me, Router._newest, Topology()))
        self.token_ttl = token_ttl
        self._tokens = Tokens(config.keys("token_keys", token_keys), token_ttl)
        self.gate = Gate(
            target.server,
            target.dialect,
            self.causality,
            config.isolation(options),
            frozenset(config.names("read_only_functions", read_only_functions)),
            failover_timeout,
            self.emit,
        )
        self._engines = self.gate.engines = Engines(
            self._url,
            self._server,
            options,
            known=_weakly(me, Router._known, frozenset()),
            surprised=_weakly(me, Router._surprised, None),
            gate=self.gate,
            connects_at_once=connects_at_once,
            patience=pool_timeout,
        )
        self._monitor = self.gate.monitor = Monitor(
            config.instances(target, instances, reader_endpoint),
            self._engines.probe,
            _weakly(me, Router._changed, None),
            # An answer says how late a reader is only for as long as max_lag lasts.
            interval=probe_interval if max_lag is None else min(probe_interval, max(max_lag / 4, HURRY)),
            timeout=probe_timeout,
            position_interval=position_interval,
            patience=failover_timeout,
        )
        self._entrance = Entrance(
            self.gate,
            self._engines,
            self._monitor,
            self.emit,
            self._repeats,
            self._for_reads,
            Need(max_lag=max_lag, pin_seconds=pin_seconds, writer_serves_reads=no_reader == "writer"),
            balance if callable(balance) else STRATEGIES[balance],
            patience=failover_timeout,
            pool_timeout=pool_timeout,
            wait_for_reader=wait_for_reader,
            token_ttl=token_ttl,
            look_timeout=probe_timeout,
        )
        _routers.add(self)
        self._finalizer = weakref.finalize(self, _shut_down, self._monitor, self._engines)

    # -- public ---------------------------------------------------------------------------------------------------

    @property
    def topology(self) -> Topology:
        """The newest picture of the instances."""
        self.start()
        return self._monitor.topology

    @property
    def started(self) -> bool:
        """Whether start() has nothing to wait for."""
        return self._ready

    def start(self) -> None:
        """Begin to watch the instances, and wait until each has answered once or has had its time. Done by first use.

        Raises ConfigurationError when the instances do not fit together or nobody can ever be let in.
        """
        if self._ready:
            return
        if self._entrance.closed:
            raise RouterError("this router is closed; make a new one")
        self._monitor.start()
        topology = self._monitor.wait_for(lambda t: t.probed, self._probe_timeout + 1.0)
        strangers = [i for i in topology if "belongs to another cluster" in i.error]
        refused = [i for i in topology if i.silence is Silence.MISCONFIGURED]
        if strangers or (refused and topology.writer is None):
            raise ConfigurationError("; ".join(str(i) for i in strangers or refused))
        for instance in refused:
            log.warning("%s is not used: %s", instance.id, instance.error)
        self._ready = True

    def connect(self, read_only: bool = False, *, after: str | None = None) -> Connection:
        """A SQLAlchemy Connection, as engine.connect() gives, to the writer or, read_only, to a reader.

        A read-only one runs a read-only transaction. after: a consistency token: what it speaks of is seen.
        Raises NoWriterAvailable, NoReaderAvailable, AmbiguousWriter, ConfigurationError.
        """
        config.check_flag("read_only", read_only)
        unit = self._unit(read_only, after)
        connection = self.enter(unit, _CONNECTION)
        unit.wrote = not read_only  # whatever the driver's own cursors do with it
        return connection

    @contextlib.contextmanager
    def begin(self, read_only: bool = False, *, after: str | None = None) -> Iterator[Connection]:
        """A Connection in a transaction that commits at the end of the block, as engine.begin() gives."""
        with self.connect(read_only, after=after) as connection, connection.begin():
            yield connection

    def raw_connection(self, read_only: bool = False, *, after: str | None = None) -> PoolProxiedConnection:
        """A pooled DBAPI connection, as engine.raw_connection() gives. Statements on it are not classified: on a read-only
        one the server refuses what writes; with consistency "global", one to the writer counts as having written."""
        config.check_flag("read_only", read_only)
        unit = self._unit(read_only, after)
        connection = self.enter(unit, _RAW_CONNECTION)
        connection.info[MODE] = None  # the driver's switches are the user's now
        if not read_only:
            unit.wrote = True
            self.causality.commit_begins(unit)
        unit.handed_out = True
        return connection

    def _unit(self, read_only: bool, after: str | None) -> Unit:
        unit = Unit(read_only)
        self.causality.begin(unit, None if after is None else self.past(after))
        return unit

    # -- consistency ----------------------------------------------------------------------------------------------

    def causal_scope(self, token: str | None = None) -> Scope:
        """`with router.causal_scope(token) as scope:` makes all units of this router that begin inside the block, of whatever
        session or connection, see what they have written, never less than they have read, and what the token speaks of.

        Inside is what runs in this thread or task, and in those that are started with a copy of its context, as asyncio's tasks
        and asyncio.to_thread() are. `scope.token` is for whoever must see what was written here. Scopes may be nested; what
        happens in one happens in those around it, too. Raises ConfigurationError for a token that is not of this cluster.
        """
        return self.scope(self.past(token, "token") if token is not None else Past())

    def scope(self, past: Past) -> Scope:
        """A causal scope that begins with this past, for who enters it step by step."""
        return Scope(self.causality.owner, past, self.token)

    def current_token(self) -> str | None:
        """What a later reader must have replayed to show what was written in the causal scopes that are open here, and what
        they began with; None where that is nothing. Costs what `scope.token` costs."""
        return merge_tokens(*(scope.token for scope in current(self.causality.owner)))

    def past(self, token: str, argument: str = "after") -> Past:
        """What a session that begins with this token must see; nothing where it has expired. argument: how its caller calls it.
        Raises ConfigurationError."""
        self.start()
        requirement = self._tokens.read(token, self._monitor.topology.cluster, argument)
        if requirement is None:
            self.emit(events.TokenIgnored, "expired")
            return Past()
        return Past(token, requirement)

    def told(self, token: object) -> Past:
        """past() of what came with a request or a message: where that does not count there is an event, and never an error."""
        try:
            return self.past(token)  # type: ignore[arg-type]  # which it refuses
        except TokenRefused as refused:
            self.emit(events.TokenIgnored, refused.reason)
        except RouterError as error:  # for whoever asks the router for something
            self.emit(events.TokenIgnored, f"the router cannot start: {type(error).__name__}")
        return Past()

    def token(self, past: Past) -> str | None:
        """What a later reader must have replayed to show what was written in this past; None where nothing was written, and no
        token given.

        Where the proof is not known yet the writer is asked, once for all who wait for it. If it cannot be had within
        probe_timeout, the token has no position, which keeps who has it on the writer for longer.
        """
        written = past.requirement
        if not past.wrote or written is None:
            return past.given

        def proven(topology: Topology) -> bool:
            writer = topology.writer
            return resolve(written, topology).position is not None or writer is None or writer.position is None

        topology = self._monitor.topology
        if not proven(topology):
            topology = self._monitor.wait_for(proven, self._probe_timeout, eager=True)
        requirement = resolve(written, topology)
        past.note(requirement)
        now = time.monotonic()
        return self._tokens.write(topology.cluster or "", renewed(requirement, topology.samples, now - self.token_ttl / 10, now))

    def attempts(
        self,
        Session: Callable[[], S],
        *,
        deadline: float | None = None,
        stop: stop_base | None = None,
        wait: wait_base | None = None,
        commit_check: CommitCheck | None = "xid",
    ) -> Iterator[Attempt[S]]:
        """run_transaction() as a loop: `for attempt in router.attempts(Session): with attempt as session: ...`.

        The block is one unit, which commits when the loop goes on after it. A loop that is left by return or break has committed
        nothing, and warns of it; what stands in the loop after the block is run before the COMMIT, and each time.
        Arguments and errors are those of run_transaction().
        """
        config.check_run(Session, deadline=deadline, stop=stop, wait=wait, commit_check=commit_check)

        def repeats(number: int, error: BaseException) -> bool:
            if not fault_of_nobody(error) and not self._repeats.allowed(None, first=number == 1):
                return False
            self.emit(events.RunAgain, number, type(error).__name__)
            return True

        until = None if deadline is None else time.monotonic() + deadline
        stop = stop or tenacity.stop_after_delay(deadline or self.failover_timeout)
        return attempts(self, Session, commit_check, until, stop, wait, repeats)

    def run_transaction(
        self,
        Session: Callable[[], S],
        fn: Callable[[S], R],
        *,
        deadline: float | None = None,
        stop: stop_base | None = None,
        wait: wait_base | None = None,
        commit_check: CommitCheck | None = "xid",
    ) -> R:
        """Run `fn(session)` as one unit, commit, and return what `fn` returns.

        It is run again, with a new session, when its writer failed or was demoted, when it could not be serialized with others
        (40001; 1020, 1205) or was the victim of a deadlock (40P01; 1213), and when it was to change rows that a reader had shown
        it as they were no longer (StaleRead: then it runs on the writer and locks those rows first); `fn` must therefore have no
        effects outside of its session that may not happen twice, let the database's errors through, and leave commit() to this.
        Errors of fn's own are raised as they are. Mapped objects that it returns are detached; with expire_on_commit=False what
        was loaded can be read.

        Session: a sessionmaker of RoutingSession. deadline: seconds from now after which nothing is run again, nor a writer
        waited for; None: until failover_timeout has passed since the first failure. stop, wait: tenacity's policies instead of
        that and of an exponential wait with full jitter from 20 ms to 2 s; to wait for a writer is bounded by the others still.
        commit_check: how it is found out whether a COMMIT whose answer was lost has committed: "xid": by the transaction's id,
        which costs one round trip; "table": by a row in aurora_router_commits (see init_commit_table()); None: not at all. MySQL
        and MariaDB tell nothing of an id: there both are by the table, which must have been created.

        Raises OutcomeUnknown when it cannot be found out, the last error when there is no time left, NoWriterAvailable.
        """
        for attempt in self.attempts(Session, deadline=deadline, stop=stop, wait=wait, commit_check=commit_check):
            with attempt as session:
                result = fn(session)
                if inspect.iscoroutine(result) or inspect.isgenerator(result):
                    result.close()
                    raise ConfigurationError("the function is a coroutine or a generator: it would run after its unit")
        return result

    def transactional(
        self, Session: Callable[[], S], **options: Unpack[RunOptions]
    ) -> Callable[[Callable[Concatenate[S, P], R]], Callable[P, R]]:
        """run_transaction() as a decorator: the function gets the session as its first argument. Options are those.

        For functions; a method calls run_transaction(Session, lambda session: ...), for its first argument is its object.
        """
        config.check_run(Session, **options)

        def decorate(fn: Callable[Concatenate[S, P], R]) -> Callable[P, R]:
            @functools.wraps(fn)
            def run(*args: P.args, **kwargs: P.kwargs) -> R:
                return self.run_transaction(Session, lambda session: fn(session, *args, **kwargs), **options)

            return run

        return decorate

    def init_commit_table(self) -> None:
        """Create the table aurora_router_commits, unless it is there: commit_check="table" needs it, and on MySQL and MariaDB
        any commit_check, that of run_transaction() included. Raises ConfigurationError where the URL names no database for it."""
        try:
            with self.begin() as connection:
                if connection.exec_driver_sql(self._server.HAS_COMMITS).scalar_one():
                    return
                for statement in self._server.CREATE_COMMITS:
                    connection.exec_driver_sql(statement)
        except DBAPIError as error:
            if not self._server.is_missing_table(error.orig):
                raise
            raise ConfigurationError(
                f"the URL names no database to make {self._server.COMMITS} in; write it like {self._server.EXAMPLE}"
            ) from None

    def explain(self, sql: str, read_only: bool | None = None) -> Decision:
        """Where a unit that begins with this statement would go now, and why. Sends nothing."""
        self.start()
        found = verdict(sql, self._dialect)
        effect = self.gate.effect(found)
        write: Reason | None = None
        if read_only is False:
            write = Reason.DECLARED_WRITE
        elif read_only is None and (
            sql in self.gate.learned
            or (effect is not Effect.READ and not (found.hint == "reader" and found.known is Effect.READ))
        ):
            write = Reason.NOT_A_READ
        elif read_only is None and found.hint == "writer":
            write = Reason.HINT
        unit = Unit(read_only)
        self.causality.begin(unit)
        return self._entrance.decide(unit, write)._replace(effect=effect)

    def add_instance(self, address: str) -> None:
        """Use one more instance, "host:port", from the moment it answers."""
        self._monitor.add(config.instance(address, self._server))

    def remove_instance(self, address: str) -> None:
        """Use that instance no longer: idle connections are closed, those in use when they come back."""
        instance = config.instance(address, self._server)
        if instance.id not in self._monitor.topology.by_id:
            raise ConfigurationError(f"{instance.id} is not an instance of this router")
        self._monitor.remove(instance.id)

    def close(self) -> None:
        """Stop watching and close the pooled connections. Idempotent."""
        self._ready = False
        self._entrance.close()
        self._finalizer()

    def __enter__(self) -> Router:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        topology = self._monitor.topology
        writer = topology.writer.id if topology.writer is not None else None
        return f"<Router writer={writer} readers={[i.id for i in topology.readers]} epoch={topology.epoch}>"

    # -- units ----------------------------------------------------------------------------------------------------

    def enter(self, unit: Unit, door: Door[T], write: Reason | None = None) -> T:
        """Connect a unit to the instance that it needs; `write` says why it must be the writer, where it must.

        A reader that cannot be reached is passed over; for a writer the unit waits up to failover_timeout.
        """
        if not self._ready:
            self.start()
        return self._entrance.enter(unit, door, write)

    def above_read_committed(self, level: str | None) -> bool:
        """Whether a unit at this isolation level (None: the engine's or the server's default) must be on the writer."""
        if not self._ready:
            self.start()
        return self.gate.above_read_committed(level)

    def failed_read(self, unit: Unit, error: DBAPIError) -> Action:
        """What to do about an error that a statement of this unit met; takes note of what it teaches."""
        instance = unit.instance
        if instance is None:
            return Action.RAISE
        phase = self.gate.phase(unit)
        action = decide(classify_error(error).failure, phase)
        if action is Action.TO_WRITER:
            if unit.read_only is not None or unit.on_writer:
                return Action.RAISE
            self.gate.learn(error.statement)
            self.emit(events.Learned, instance.id, self._server.code(error.orig))
        elif action is Action.REPEAT_ELSEWHERE:
            unit.repeats += 1
            if unit.repeats > REPEATS or not self._repeats.allowed(instance.id, first=unit.repeats == 1):
                return Action.RAISE
            if not unit.on_writer:
                unit.avoid |= {instance.id}
            self.emit(events.Repeated, instance.id, type(error).__name__)
        return action

    def engine(self, instance: Instance) -> Engine:
        """The engine of an instance."""
        return self._engines.engine(instance)

    def writer_engine(self) -> Engine:
        """The engine of the writer, waiting for one as a unit would."""
        self.start()
        return self.engine(self._entrance.writer())

    # -- what the engines and the monitor call --------------------------------------------------------------------

    def _known(self, instance_id: str) -> frozenset[ServerId]:
        instance = self._monitor.topology.by_id.get(instance_id)
        return instance.servers if instance is not None else frozenset()

    def _newest(self) -> Topology:
        return self._monitor.topology

    def _surprised(self, instance_id: str, why: str) -> None:
        self.emit(events.ConnectionRefused, instance_id, why)
        self._monitor.look(instance_id)

    def _forked(self) -> None:
        """In a forked child: connections, threads and held locks are the parent's; what it knew is to be heard again."""
        self._ready = False
        self.gate.forked()
        self._for_reads.forked()
        self._repeats.forked()
        self._engines.forked()
        self._monitor.forked()

    def _changed(self, old: Topology, new: Topology, published_at: float) -> None:
        if new.readers:
            self._for_reads.turn_away()  # to look whether one of them will do
        announce(self._engines, self.emit, old, new, published_at)


def _drop(connection: Connection | PoolProxiedConnection) -> None:
    connection.invalidate()
    connection.close()


_CONNECTION: Door[Connection] = Door(lambda engine: engine.connect(), lambda connection: connection.connection, _drop)
_RAW_CONNECTION: Door[PoolProxiedConnection] = Door(lambda engine: engine.raw_connection(), lambda raw: raw, _drop)


def _weakly(me: weakref.ref[Router], method: Callable[..., T], otherwise: T) -> Callable[..., T]:
    def call(*args: Any) -> T:
        router = me()
        if router is None:
            return otherwise
        result: T = method(router, *args)
        return result

    return call


def _shut_down(monitor: Monitor, engines: Engines) -> None:
    monitor.close()
    engines.close()


_routers: weakref.WeakSet[Router] = weakref.WeakSet()


def _forked() -> None:
    for router in [*_routers]:
        router._forked()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)
