"""The Router. A service makes one of them."""

from __future__ import annotations

import contextlib
import functools
import inspect
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any, Concatenate, ParamSpec, TypedDict, TypeVar, Unpack

import tenacity
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.orm import Session
from sqlalchemy.pool import PoolProxiedConnection
from tenacity.stop import stop_base
from tenacity.wait import wait_base

from aurora_router.cluster.connection_state import state_of
from aurora_router.config import checks, urls
from aurora_router.config.settings import Settings, takes_settings
from aurora_router.core.instance import Instance
from aurora_router.core.selection import Decision
from aurora_router.core.topology import Topology
from aurora_router.errors import ConfigurationError
from aurora_router.router_core import RouterCore
from aurora_router.routing.backoff import DEFAULT_BACKOFF, TenacityPolicy
from aurora_router.routing.causal_context import CausalContext, Scope
from aurora_router.routing.connector import Judge
from aurora_router.routing.interceptor import watch
from aurora_router.routing.retries import Attempt, attempts
from aurora_router.routing.unit import CommitCheck
from aurora_router.telemetry.stats import RouterStats
from aurora_router.waiting import ThreadWaiting

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


class Router:
    """Route units of work over the instances of one cluster. Its arguments are its settings: see `__init__()`.

    It connects at its first use, not when it is made. It raises ConfigurationError at once for a mistake in the
    settings themselves. Mistakes that only the servers can see (credentials, an instance of another cluster) raise it at the
    first use.
    """

    @takes_settings(Settings)
    def __init__(self, settings: Settings) -> None:
        """Make a router. Nothing is connected to yet."""
        self._core = core = RouterCore(settings, ThreadWaiting())
        weakref.finalize(self, core.abandon).atexit = False

    @property
    def topology(self) -> Topology:
        """The newest picture of the instances."""
        self._core.start()
        return self._core.monitor.topology

    @property
    def started(self) -> bool:
        """Whether start() has nothing to wait for."""
        return self._core.is_started

    def start(self) -> None:
        """Begin to watch the instances, and wait until each has answered once or has timed out. The first use does this.

        Raises ConfigurationError if the instances do not fit together, or if the servers refuse to let the user in.
        """
        self._core.start()

    def connect(self, read_only: bool = False, *, after: str | None = None) -> Connection:
        """Connect to the writer, or to a reader, as engine.connect() does.

        read_only: connect to a reader. Each transaction is read-only.
        after: a consistency token. The connection sees the writes that the token speaks of.

        Raises NoWriterAvailable, NoReaderAvailable, AmbiguousWriter, ConfigurationError.
        """
        checks.check_flag("read_only", read_only)
        core = self._core
        unit = core.unit(read_only, after)
        connection = core.acquire(unit, _CONNECTION)
        unit.wrote = not read_only  # because the driver's own cursors may write
        watch(connection, core.interceptor.driver)
        if not read_only and (unit.marks.scopes or core.causality.is_global):
            core.interceptor.hand_out(unit, connection.connection)
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

        Its statements are not classified. On a read-only connection the server refuses writes. With consistency "global", a
        connection to the writer counts as having written. Arguments and errors are those of connect().
        """
        checks.check_flag("read_only", read_only)
        core = self._core
        unit = core.unit(read_only, after)
        connection = core.acquire(unit, _RAW_CONNECTION)
        state_of(connection).distrust()
        unit.wrote = not read_only
        core.causality.on_connection_exposed(unit)
        return connection

    # -- consistency ----------------------------------------------------------------------------------------------

    def causal_scope(self, token: str | None = None) -> Scope:
        """Open a block in which all units of this router share what they have written and read.

            with router.causal_scope() as scope:
                ...

        Each unit that begins inside sees what the others have written, and never less than they have read. Code that runs in
        this thread or task is inside. So is code that starts with a copy of its context, as asyncio's tasks and
        asyncio.to_thread() do. Scopes may be nested; an inner one counts for the outer ones, too. `scope.token` is the token for
        others that must see what was written here.

        token: a consistency token. The units see the writes that the token speaks of.

        Raises ConfigurationError for a token that is not of this cluster.
        """
        tokens = self._core.tokens
        return tokens.new_scope(tokens.context_from_token(token, "token") if token is not None else CausalContext())

    def current_token(self) -> str | None:
        """Return the token of the causal scopes that are open here; None if nothing was written in them and no token given.

        It speaks of what was written in them, and of the tokens with which they began. It costs what `scope.token` costs.
        """
        return self._core.tokens.token_of_open_scopes()

    def attempts(
        self,
        Session: Callable[[], S],
        *,
        deadline: float | None = None,
        stop: stop_base | None = None,
        wait: wait_base | None = None,
        commit_check: CommitCheck | None = "xid",
    ) -> Iterator[Attempt[S]]:
        """Loop over the attempts of a unit, as run_transaction() does.

            for attempt in router.attempts(Session):
                with attempt as session:
                    ...

        The block is one unit, which commits when the loop goes on after it. If the loop is left by return or break, nothing is
        committed, and a warning says so. Code in the loop after the block runs before the COMMIT, in each attempt. Arguments and
        errors are those of run_transaction().
        """
        checks.check_run_transaction(Session, deadline=deadline, stop=stop, wait=wait, commit_check=commit_check)
        core = self._core
        stop = stop or tenacity.stop_after_delay(deadline or core.settings.failover_timeout)
        now = time.monotonic()
        began, until = (None, None) if deadline is None else (now, now + deadline)
        policy = TenacityPolicy(stop, wait or DEFAULT_BACKOFF, began, core.may_run_again)
        publish = core.dispatcher.publish if core.dispatcher.listeners else None
        return attempts(self, Session, commit_check, until, policy, core.waiting.sleep, publish)

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
        serialized with others (40001; 1020, 1205). It was the victim of a deadlock (40P01; 1213). A late reader misled it.

        A function counts as misled if it was about to change rows that the writer has in another state (StaleRead). It also
        counts as misled if it had read on a reader and a constraint refused its write. If it removes something from a collection,
        a filter of its own that left out a part of the collection has the same effect. A misled function runs again on the writer
        from the start, and the stale rows are locked first.

        So `fn` must have no effects outside of its session that may not happen twice. It must let the database's errors
        through, and leave commit() to run_transaction(). Its own errors are raised as they are. Mapped objects that it returns
        are detached; with expire_on_commit=False you can read what was loaded.

        Session: a sessionmaker of RoutingSession.
        fn: a function of a session.
        deadline: seconds from now. After that nothing is run again, and no writer is waited for. None: failover_timeout, from
            the first failure on.
        stop, wait: policies of tenacity. `stop` decides about another attempt instead of the deadline. `wait` replaces the
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
                checks.check_result(result)
        return result

    def transactional(
        self, Session: Callable[[], S], **options: Unpack[RunOptions]
    ) -> Callable[[Callable[Concatenate[S, P], R]], Callable[P, R]]:
        """Decorate a function so that run_transaction() runs it. It gets the session as its first argument.

        For a method, call run_transaction(Session, lambda session: ...) instead, because its first argument is its object.

        Session: a sessionmaker, a scoped_session, a class of sessions, or a function without parameters that makes one. A
            function with parameters must be annotated as returning a session, because it might be the function to be decorated.
        options: those of run_transaction().

        Raises ConfigurationError for a function that cannot take a session, and if the parentheses were forgotten.
        """
        checks.check_run_transaction(Session, **options)
        checks.check_factory(Session)

        def decorate(fn: Callable[Concatenate[S, P], R]) -> Callable[P, R]:
            checks.check_function(fn)

            @functools.wraps(fn)
            def run(*args: P.args, **kwargs: P.kwargs) -> R:
                return self.run_transaction(Session, lambda session: fn(session, *args, **kwargs), **options)

            _hide_first_parameter(run)
            return run

        # Without parentheses, the decorated function is the factory. A call of it must raise an error with advice.
        decorate.__defaults__ = (None,)
        return decorate

    def init_commit_table(self) -> None:
        """Create the table aurora_router_commits, unless it exists.

        `commit_check="table"` needs it. On MySQL and MariaDB any commit_check needs it, and so does run_transaction(). If the
        connection is lost, the router tries again, for failover_timeout at most.

        Raises ConfigurationError if the URL names no database for it, or if the rows of a table of that name prove nothing.
        """
        self._core.init_commit_table()

    def explain(self, sql: str, read_only: bool | None = None) -> Decision:
        """Say where a unit that begins with this statement would go now, and why. Nothing is sent."""
        return self._core.explain(sql, read_only)

    def stats(self) -> RouterStats:
        """Return the numbers of this router: what it has done so far, and what it holds now.

        It sends nothing, waits for nothing, and does not start the router. Call it as often as you like.
        """
        return self._core.stats()

    def add_instance(self, address: str) -> None:
        """Use one more instance, from the moment it answers.

        address: "host:port".

        Raises ConfigurationError.
        """
        core = self._core
        instance = urls.parse_instance(address, core.interceptor.driver)
        urls.check_distinct((*core.monitor.topology, instance), core.fixed_address)
        core.monitor.add(instance)

    def remove_instance(self, address: str) -> None:
        """Stop using an instance. Its idle connections are closed at once, and those in use when they come back.

        address: "host:port".

        Raises ConfigurationError if it is not an instance of this router.
        """
        core = self._core
        instance = urls.parse_instance(address, core.interceptor.driver)
        if instance.id not in core.monitor.topology.by_id:
            raise ConfigurationError(f"{instance.id} is not an instance of this router")
        core.monitor.remove(instance.id)

    def close(self) -> None:
        """Stop watching and close the pooled connections. Idempotent."""
        self._core.close()

    def engine(self, instance: Instance) -> Engine:
        """Return the engine of an instance."""
        return self._core.engines.engine(instance)

    def __enter__(self) -> Router:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        topology = self._core.monitor.topology
        writer = topology.writer.id if topology.writer is not None else None
        return f"<Router writer={writer} readers={[i.id for i in topology.readers]} epoch={topology.epoch}>"


def _hide_first_parameter(decorated: Any) -> None:
    """Leave the session out of the signature that frameworks read, because callers do not give it."""
    try:
        signature = inspect.signature(decorated)
    except ValueError:  # a function written in C
        return
    first, *others = signature.parameters.values()
    if first.kind is not inspect.Parameter.VAR_POSITIONAL:
        decorated.__signature__ = signature.replace(parameters=others)


# Type checkers require `Session`. At runtime its absence must raise an error with advice, not a bare TypeError.
_transactional: Any = Router.transactional
_transactional.__defaults__ = (None,)


def core_of(router: Router) -> RouterCore:
    """Return the parts of a router, for the other modules of this library."""
    return router._core


class _ByConnection:
    """The connector of a unit that is a Connection of SQLAlchemy."""

    judge: Judge | None = None

    def connect(self, engine: Engine) -> Connection:
        return engine.connect()

    def pool_connection(self, connection: Connection) -> PoolProxiedConnection:
        return connection.connection

    def discard(self, connection: Connection) -> None:
        connection.invalidate()
        connection.close()


class _ByRawConnection:
    """The connector of a unit that is a connection of an engine's pool."""

    judge: Judge | None = None

    def connect(self, engine: Engine) -> PoolProxiedConnection:
        return engine.raw_connection()

    def pool_connection(self, connection: PoolProxiedConnection) -> PoolProxiedConnection:
        return connection

    def discard(self, connection: PoolProxiedConnection) -> None:
        connection.invalidate()
        connection.close()


_CONNECTION = _ByConnection()
_RAW_CONNECTION = _ByRawConnection()
