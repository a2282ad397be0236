"""The Router, of which a service makes one."""

from __future__ import annotations

import atexit
import contextlib
import functools
import inspect
import logging
import os
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any, Concatenate, ParamSpec, TypedDict, TypeVar, Unpack

import tenacity
from sqlalchemy.engine import URL, Connection, Engine
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session
from sqlalchemy.pool import PoolProxiedConnection
from tenacity.stop import stop_base
from tenacity.wait import wait_base

from aurora_router import config, urls
from aurora_router.causality import Causality
from aurora_router.changes import take_in
from aurora_router.connection_state import state_of
from aurora_router.core import events
from aurora_router.core.failures import Action, decide, traits
from aurora_router.core.instance import Instance, ServerId
from aurora_router.core.pacing import places_for_reads
from aurora_router.core.selection import Decision, Reason, reason_to_write, resolve
from aurora_router.core.statements import verdict
from aurora_router.core.tokens import renewed
from aurora_router.core.topology import Topology
from aurora_router.engines import Engines
from aurora_router.entering import Entrance
from aurora_router.error_classification import classify_error, is_contention
from aurora_router.errors import ConfigurationError, RouterError
from aurora_router.families import Families
from aurora_router.gate import Gate, watch
from aurora_router.limits import Places, Repeats
from aurora_router.listeners import EventDispatcher
from aurora_router.log import Log
from aurora_router.monitor import Haste, Monitor
from aurora_router.retries import DEFAULT_BACKOFF, Attempt, TenacityPolicy, attempts
from aurora_router.settings import Settings, takes_settings
from aurora_router.stats import Counters, RouterStats
from aurora_router.tokens import TokenRefused, Tokens, merge_tokens
from aurora_router.unit import CommitCheck, Door, Judge, Past, Scope, Unit, current
from aurora_router.waiting import Threads

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


# Retries of one unit's reads before the application gets the error.
REPEATS = 10


class Router:
    """Route units of work over the instances of one cluster. Its arguments are its settings: see `__init__()`.

    It connects at its first use, not when it is made. It raises ConfigurationError at once for a mistake that can be seen at
    once. Mistakes that only the servers can see (credentials, an instance of another cluster) are raised at the first use.
    """

    @takes_settings(Settings)
    def __init__(self, settings: Settings) -> None:
        """Make a router. Nothing is connected to yet."""
        self._settings = settings
        self.failover_timeout = settings.failover_timeout
        self.stale_write_guard = settings.stale_write_guard
        self.token_ttl = settings.token_ttl
        self._log = Log()
        self.dispatcher = EventDispatcher(tuple(settings.listeners), self._log)
        self._waiting = waiting = Threads()
        pool, _ = config.get_pool_limits(settings.options)
        self._for_reads = Places(places_for_reads(pool, settings.writer_share_for_reads), waiting)
        self._ready = False
        self._refused_at = float("-inf")  # monotonic seconds: when start() last failed
        # The callbacks of the engines and the monitor must not keep the router alive: it closes when it is garbage collected.
        me = weakref.ref(self)
        self._counters = Counters()
        self._repeats = Repeats(self.dispatcher.publish, self._counters)
        self.causality = Causality(settings.consistency, me, _weakly(me, Router._newest, Topology()))
        self._tokens = Tokens(settings.token_keys, settings.token_ttl)
        families = Families(settings.target.driver.PROTOCOL, settings.target.dialect)
        self._engines = engines = Engines(
            settings,
            _weakly(me, Router._known, frozenset()),
            _weakly(me, Router._surprised, None),
            families,
            lambda: gate,
            waiting,
            self._counters,
            self.dispatcher,
        )
        self._fixed_address = urls.find_fixed_address(settings.target, settings.options, settings.options_of_readers)
        urls.check_distinct(settings.all_instances, self._fixed_address)
        self._monitor = monitor = Monitor(
            settings,
            engines.probe,
            engines.shut_down_probes,
            _weakly(me, Router._changed, []),
            engines.may_queue,
            waiting,
            self.dispatcher.publish_from_own_thread if settings.listeners else None,
        )
        self.gate = gate = Gate(settings, families, engines, monitor, self.causality, self.dispatcher, waiting)
        self._entrance = Entrance(
            settings, self.gate, self._engines, self._monitor, self.dispatcher, self._repeats, self._for_reads, self._counters
        )
        _routers.add(self)
        weakref.finalize(self, _stop, self._monitor, self._engines).atexit = False

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
        """Begin to watch the instances, and wait until each has answered once or has timed out. The first use does this.

        Raises ConfigurationError if the instances do not fit together, or if the servers refuse to let the user in.
        """
        if self._ready:
            return
        if self._entrance.waits.is_closed:
            raise RouterError("this router is closed; make a new one")
        self._monitor.start()
        # A fault that made the last start fail may have been repaired since, so wait for newer answers.
        since = self._refused_at
        timeout = self._settings.probe_timeout + 1.0
        topology = self._monitor.wait_for(lambda t: all(i.heard_at > since for i in t), timeout, haste=Haste.SHARED)
        self._log.started(topology)
        strangers = [i for i in topology if i.stranger]
        if strangers or topology.in_vain:
            self._refused_at = time.monotonic()
            raise ConfigurationError("; ".join(topology.said(strangers or None))) from self._engines.password_error
        self._ready = True

    def connect(self, read_only: bool = False, *, after: str | None = None) -> Connection:
        """Connect to the writer, or to a reader, as engine.connect() does.

        read_only: connect to a reader. Each transaction is read-only.
        after: a consistency token. The connection sees what it speaks of.

        Raises NoWriterAvailable, NoReaderAvailable, AmbiguousWriter, ConfigurationError.
        """
        config.check_flag("read_only", read_only)
        unit = self._unit(read_only, after)
        connection = self.enter(unit, _CONNECTION)
        unit.wrote = not read_only  # because the driver's own cursors may write
        watch(connection, self.gate.driver)
        if not read_only and (unit.scopes or self.causality.is_global):
            self.gate.hand_out(unit, connection.connection)
        return connection

    @contextlib.contextmanager
    def begin(self, read_only: bool = False, *, after: str | None = None) -> Iterator[Connection]:
        """Connect, and begin a transaction that commits at the end of the block, as engine.begin() does.

        Arguments and errors are those of connect().
        """
        with self.connect(read_only, after=after) as connection, connection.begin():
            yield connection

    def raw_connection(self, read_only: bool = False, *, after: str | None = None) -> PoolProxiedConnection:
        """Check out a pooled connection of the driver, as engine.raw_connection() does.

        Its statements are not classified. On a read-only one the server refuses writes. With consistency "global", a connection
        to the writer counts as having written. Arguments and errors are those of connect().
        """
        config.check_flag("read_only", read_only)
        unit = self._unit(read_only, after)
        connection = self.enter(unit, _RAW_CONNECTION)
        state_of(connection).distrust()
        unit.wrote = not read_only
        self.causality.handed_out(unit)
        return connection

    def _unit(self, read_only: bool, after: str | None) -> Unit:
        unit = Unit(read_only)
        self.causality.begin(unit, None if after is None else self.past(after))
        return unit

    # -- consistency ----------------------------------------------------------------------------------------------

    def causal_scope(self, token: str | None = None) -> Scope:
        """Open a block in which all units of this router share what they have written and read.

            with router.causal_scope() as scope:
                ...

        Each unit that begins inside sees what the others have written, and never less than they have read. Code that runs in
        this thread or task is inside. So is code that starts with a copy of its context, as asyncio's tasks and
        asyncio.to_thread() do. Scopes may be nested; an inner one counts for the outer ones, too. `scope.token` is the token for
        others that must see what was written here.

        token: a consistency token. The units see what it speaks of.

        Raises ConfigurationError for a token that is not of this cluster.
        """
        return self.scope(self.past(token, "token") if token is not None else Past())

    def scope(self, past: Past) -> Scope:
        """Make a causal scope that begins with this past, for callers that enter and leave it by themselves."""
        return Scope(self.causality.owner, past, self.token)

    def current_token(self) -> str | None:
        """Return the token of the causal scopes that are open here; None if nothing was written in them and no token given.

        It speaks of what was written in them, and of the tokens with which they began. It costs what `scope.token` costs.
        """
        return merge_tokens(*(scope.token for scope in current(self.causality.owner)))

    def past(self, token: str, argument: str = "after") -> Past:
        """Return what a session that begins with this token must see; nothing if the token has expired.

        argument: the caller's name for the token.

        Raises ConfigurationError.
        """
        self.start()
        requirement = self._tokens.read(token, self._monitor.topology.cluster, argument)
        if requirement is None:
            if self.dispatcher.listeners:
                self.dispatcher.publish(events.TokenIgnored("expired"))
            return Past()
        return Past(token, requirement)

    def told(self, token: object) -> Past:
        """Return the past() of a token from a request or a message. If the token does not count, send an event, not an error."""
        try:
            return self.past(token)  # type: ignore[arg-type]  # past() refuses it if it is no text
        except TokenRefused as refused:
            if self.dispatcher.listeners:
                self.dispatcher.publish(events.TokenIgnored(refused.reason))
        except RouterError as error:  # the next use of the router raises it
            if self.dispatcher.listeners:
                self.dispatcher.publish(events.TokenIgnored(f"the router cannot start: {type(error).__name__}"))
        return Past()

    def token(self, past: Past) -> str | None:
        """Return the token of what was written in this past; None if nothing was written and no token given.

        If the position that proves it is not known yet, the writer is asked, once for all waiting callers. If there is no answer
        within probe_timeout, the token has no position. Then the sessions that get it stay on the writer for longer.
        """
        written = past.requirement
        if not past.wrote or written is None:
            return past.given

        def proven(topology: Topology) -> bool:
            writer = topology.writer
            return resolve(written, topology).position is not None or writer is None or writer.position is None

        topology = self._monitor.topology
        if not proven(topology):
            topology = self._monitor.wait_for(proven, self._settings.probe_timeout, haste=Haste.ALONE)
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
        """Loop over the runs of a unit, as run_transaction() does.

            for attempt in router.attempts(Session):
                with attempt as session:
                    ...

        The block is one unit, which commits when the loop goes on after it. A loop that is left by return or break has
        committed nothing, and warns of it. Code in the loop after the block runs before the COMMIT, and each time. Arguments
        and errors are those of run_transaction().
        """
        config.check_run(Session, deadline=deadline, stop=stop, wait=wait, commit_check=commit_check)

        def allows(number: int, error: Exception) -> bool:
            if not is_contention(error) and not self._repeats.allowed(None, first=number == 1):
                return False
            self._counters.transaction_retries += 1
            if self.dispatcher.listeners:
                self.dispatcher.publish(events.RunAgain(number, type(error).__name__))
            return True

        stop = stop or tenacity.stop_after_delay(deadline or self.failover_timeout)
        now = time.monotonic()
        began, until = (None, None) if deadline is None else (now, now + deadline)
        policy = TenacityPolicy(stop, wait or DEFAULT_BACKOFF, allows, began)
        return attempts(self, Session, commit_check, until, policy, self._waiting.sleep)

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

        The function runs again, with a new session, in these cases. Its writer failed or was demoted. It could not be
        serialized with others (40001; 1020, 1205). It was the victim of a deadlock (40P01; 1213). A late reader misled it: it
        was about to change rows of which the writer has another state (StaleRead; those rows are locked first), or a constraint
        refused what it wrote. A misled function runs on the writer from the start. A function that removes something from a
        collection counts as misled also if a filter of its own left out a part of the collection.

        So `fn` must have no effects outside of its session that may not happen twice. It must let the database's errors
        through, and leave commit() to run_transaction(). Its own errors are raised as they are. Mapped objects that it returns
        are detached; with expire_on_commit=False you can read what was loaded.

        Session: a sessionmaker of RoutingSession.
        fn: a function of a session.
        deadline: seconds from now. After that nothing is run again, and no writer is waited for. None: failover_timeout, from
            the first failure on.
        stop, wait: policies of tenacity. `stop` decides about another run instead of the deadline. `wait` replaces the
            exponential backoff with full jitter from 20 ms to 2 s. Waiting for a writer still ends at the deadline.
        commit_check: how to find out the outcome of a COMMIT if its answer was lost. "xid": by the transaction's id, which costs
            one round trip. "table": by a row in aurora_router_commits (see init_commit_table()). None: not at all. On MySQL and
            MariaDB both use the table, which must exist.

        Raises OutcomeUnknown if the outcome of a COMMIT cannot be found out, the last error if there is no time left, and
        NoWriterAvailable.
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
        """Decorate a function so that run_transaction() runs it. It gets the session as its first argument.

        For a method call run_transaction(Session, lambda session: ...), because its first argument is its object.

        Session: a sessionmaker, a scoped_session, a class of sessions, or a function without parameters that makes one. A
            function with parameters must be annotated as returning a session, because it might be the function to be decorated.
        options: those of run_transaction().

        Raises ConfigurationError for a function that cannot take a session, and if the parentheses were forgotten.
        """
        config.check_run(Session, **options)
        config.check_factory(Session)

        def decorate(fn: Callable[Concatenate[S, P], R]) -> Callable[P, R]:
            config.check_function(fn)

            @functools.wraps(fn)
            def run(*args: P.args, **kwargs: P.kwargs) -> R:
                return self.run_transaction(Session, lambda session: fn(session, *args, **kwargs), **options)

            return run

        return decorate

    def init_commit_table(self) -> None:
        """Create the table aurora_router_commits, unless it exists.

        `commit_check="table"` needs it. On MySQL and MariaDB any commit_check needs it, and so does run_transaction().

        Raises ConfigurationError if the URL names no database for it.
        """
        self.start()
        writer = self._entrance.writer()
        server = self.gate.families.at(writer.id)
        try:
            # Use no pooled connection: USE or search_path of its last unit would decide in which database the table is made.
            with self._engines.unpooled(writer) as connection, connection.begin():
                if connection.exec_driver_sql(server.HAS_COMMITS).scalar_one():
                    return
                for statement in server.CREATE_COMMITS:
                    connection.exec_driver_sql(statement)
        except DBAPIError as error:
            if not server.is_missing_table(self.gate.driver.code(error.orig)):
                raise
            raise ConfigurationError(
                f"the URL names no database to make {server.COMMITS} in; write it like {self.gate.driver.EXAMPLE}"
            ) from None

    def explain(self, sql: str, read_only: bool | None = None) -> Decision:
        """Say where a unit that begins with this statement would go now, and why. Nothing is sent."""
        self.start()
        found = verdict(sql, self.gate.families.dialect)
        effect = self.gate.known.effect(found)
        write: Reason | None = None
        if read_only is False:
            write = Reason.DECLARED_WRITE
        elif read_only is None:
            write = reason_to_write(found, effect, None, self.gate.known.has_learned(sql))
        unit = Unit(read_only)
        self.causality.begin(unit)
        return self._entrance.decide(unit, write)._replace(effect=effect)

    def stats(self) -> RouterStats:
        """Return the numbers of this router: what it has done so far, and what it holds now.

        It sends nothing, waits for nothing, and does not start the router. Call it as often as you like.
        """
        counters, for_reads = self._counters, self._for_reads
        return RouterStats(
            tuple(counters.of(instance, self._engines.pool_usage(instance)) for instance in self._monitor.topology),
            units_waiting_for_writer=self._entrance.waits.for_a_writer,
            writer_waits=counters.writer_waits,
            reader_waits=counters.reader_waits,
            writer_read_slots_in_use=for_reads.in_use,
            reads_waiting_for_slot=for_reads.waiting,
            transaction_retries=counters.transaction_retries,
            retries_refused=counters.retries_refused,
        )

    def add_instance(self, address: str) -> None:
        """Use one more instance, from the moment it answers.

        address: "host:port".

        Raises ConfigurationError.
        """
        instance = urls.parse_instance(address, self.gate.driver)
        urls.check_distinct((*self._monitor.topology, instance), self._fixed_address)
        self._monitor.add(instance)

    def remove_instance(self, address: str) -> None:
        """Use an instance no longer. Its idle connections are closed at once, those in use at their end.

        address: "host:port".

        Raises ConfigurationError if it is not an instance of this router.
        """
        instance = urls.parse_instance(address, self.gate.driver)
        if instance.id not in self._monitor.topology.by_id:
            raise ConfigurationError(f"{instance.id} is not an instance of this router")
        self._monitor.remove(instance.id)

    def close(self) -> None:
        """Stop watching and close the pooled connections. Idempotent."""
        self._ready = False
        self._entrance.close()
        self._monitor.close()
        self._engines.close()

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
        """Connect a unit to the instance that it needs.

        A reader that cannot be reached is passed over. For a writer the unit waits up to failover_timeout.

        write: why the unit must be on the writer; None if it need not be.
        """
        if not self._ready:
            self.start()
        return self._entrance.enter(unit, door, write)

    def above_read_committed(self, level: str | None) -> bool:
        """Whether a unit at this isolation level (None: the engine's or the server's default) must be on the writer."""
        if not self._ready:
            self.start()
        return self.gate.isolation.above_read_committed(level)

    def failed_read(self, unit: Unit, error: DBAPIError) -> Action:
        """Decide what to do about an error of a statement of this unit, and remember what the error shows."""
        instance = unit.instance
        if instance is None:
            return Action.RAISE
        phase = self.gate.phase(unit)
        known = classify_error(error)
        action = decide(known.failure, phase) if known.safe_to_repeat else Action.RAISE
        if action is Action.TO_WRITER:
            if unit.read_only is not None or unit.on_writer:
                return Action.RAISE
            self._counters.retries[instance.id] += 1
            if not traits(known.failure).is_remembered:  # the reader will have it soon
                if self.dispatcher.listeners:
                    self.dispatcher.publish(events.Repeated(instance.id, type(error).__name__, unit=unit.number))
                return action
            unit.refused = error.statement
            self.gate.known.learn(error.statement)
            if self.dispatcher.listeners:
                self.dispatcher.publish(events.Learned(instance.id, self.gate.driver.code(error.orig), unit=unit.number))
        elif action in (Action.REPEAT_ELSEWHERE, Action.REPEAT_UNPREPARED):
            unit.repeats += 1
            if unit.repeats > REPEATS or not self._repeats.allowed(instance.id, first=unit.repeats == 1):
                return Action.RAISE
            self._counters.retries[instance.id] += 1
            if action is Action.REPEAT_ELSEWHERE and not unit.on_writer:
                unit.avoid |= {instance.id}
            if self.dispatcher.listeners:
                self.dispatcher.publish(events.Repeated(instance.id, type(error).__name__, unit=unit.number))
        elif unit.on_writer and unit.refused is not None and unit.refused == error.statement:
            self.gate.known.forget(unit.refused)  # the reader was not at fault: the writer refuses it, too
        return action

    def engine(self, instance: Instance) -> Engine:
        """The engine of an instance."""
        return self._engines.engine(instance)

    @property
    def stand_in(self) -> Engine:
        """An engine that stands for the cluster if a session class chooses among several engines. It never connects."""
        return self._engines.stand_in

    def writer_engine(self) -> Engine:
        """Return the engine of the writer. Wait for a writer as a unit would."""
        self.start()
        return self.engine(self._entrance.writer())

    def connected_writer_engine(self) -> Engine | None:
        """Return the engine of the writer if it has connected before. Do not wait."""
        writer = self._monitor.topology.writer
        engine = self.engine(writer) if writer is not None else None
        return engine if engine is not None and engine.dialect.server_version_info is not None else None

    def is_database(self, url: URL) -> bool:
        """Whether a URL leads to the router's database, as its user, on one of its instances."""
        own = self._settings.target.url
        if (url.database, url.username) != (own.database, own.username) or url.host is None:
            return False
        return urls.instance_id(url, self.gate.driver) in self._monitor.topology.by_id

    # -- callbacks of the engines and the monitor -----------------------------------------------------------------

    def _known(self, instance_id: str) -> frozenset[ServerId]:
        instance = self._monitor.topology.by_id.get(instance_id)
        return instance.servers if instance is not None else frozenset()

    def _newest(self) -> Topology:
        return self._monitor.topology

    def _surprised(self, instance_id: str, why: str) -> None:
        self.dispatcher.publish(events.ConnectionRefused(instance_id, why))
        self._monitor.recheck_address(instance_id)

    def _forked(self) -> None:
        """Begin anew in a forked child. Connections, threads and held locks are the parent's, and its topology may be old."""
        self._ready = False
        self._log.forked()
        self.gate.forked()
        self._for_reads.forked()
        self._repeats.forked()
        self._counters.forked()
        self._entrance.forked()
        self._engines.forked()
        self._monitor.forked()

    def _changed(self, old: Topology, new: Topology, published_at: float) -> list[Callable[[], object]]:
        if new.readers:
            self._for_reads.turn_away()  # so that waiting reads try the readers
        publish = self.dispatcher.publish_from_own_thread
        with self._engines.telling_later() as closed:
            news = take_in(self._engines, publish, old, new, published_at)
            self._engines.keep(new.by_id)
        news = [*(functools.partial(publish, event) for event in closed), *news]
        self._counters.keep(new.by_id)
        return [*news, functools.partial(self._log.keep, new.by_id), self._log.tick]


class _ByConnection:
    """The door of a unit that is a Connection of SQLAlchemy."""

    judge: Judge | None = None

    def connect(self, engine: Engine) -> Connection:
        return engine.connect()

    def pooled(self, connection: Connection) -> PoolProxiedConnection:
        return connection.connection

    def drop(self, connection: Connection) -> None:
        connection.invalidate()
        connection.close()


class _ByRawConnection:
    """The door of a unit that is a connection of an engine's pool."""

    judge: Judge | None = None

    def connect(self, engine: Engine) -> PoolProxiedConnection:
        return engine.raw_connection()

    def pooled(self, connection: PoolProxiedConnection) -> PoolProxiedConnection:
        return connection

    def drop(self, connection: PoolProxiedConnection) -> None:
        connection.invalidate()
        connection.close()


_CONNECTION = _ByConnection()
_RAW_CONNECTION = _ByRawConnection()


def _weakly(me: weakref.ref[Router], method: Callable[..., T], otherwise: T) -> Callable[..., T]:
    def call(*args: Any) -> T:
        router = me()
        if router is None:
            return otherwise
        result: T = method(router, *args)
        return result

    return call


def _stop(monitor: Monitor, engines: Engines) -> None:
    """Stop what a router has left running that was garbage collected. This waits for nothing, because it may run anywhere."""
    monitor.stop()
    engines.close()


_routers: weakref.WeakSet[Router] = weakref.WeakSet()


@atexit.register
def _shut_down_all() -> None:
    """End the routers' own threads before the interpreter ends. Threads of the application may still use the routers."""
    for router in [*_routers]:
        router._monitor.close()
        router._engines.close()


def _forked() -> None:
    for router in [*_routers]:
        router._forked()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)
