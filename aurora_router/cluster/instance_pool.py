"""All connections to one instance: a pool for each role, the monitor's probes, and connections outside of the pools."""

from __future__ import annotations

import contextlib
import logging
import math
import socket
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from sqlalchemy import create_engine, event, exc
from sqlalchemy.engine import URL, Connection, Engine
from sqlalchemy.pool import NullPool, Pool, QueuePool

from aurora_router.cluster.connect_errors import UNKNOWN_HOST, connect_argument_error, hide_values, is_refused, probe_error
from aurora_router.cluster.connection_events import ConnectionContext, ConnectionEvents
from aurora_router.cluster.dialect_patches import (
    ask_for_password,
    explain_argument_errors,
    limit_connects,
    put_around_commits,
    put_around_options,
    put_around_rollbacks,
)
from aurora_router.cluster.limits import FairSemaphore
from aurora_router.cluster.pooling import RouterPool
from aurora_router.cluster.probe import ProbeError
from aurora_router.cluster.probe_connection import Probe
from aurora_router.cluster.sockets import Opening, TrackedSocket
from aurora_router.config.checks import get_pool_limits
from aurora_router.core.instance import Instance, ProbeFailure, Role
from aurora_router.core.probing import Reached
from aurora_router.drivers import Driver
from aurora_router.errors import ConfigurationError, Signal
from aurora_router.telemetry.stats import PoolUsage
from aurora_router.waiting import ThreadLocal, Waiting

log = logging.getLogger("aurora_router")

CONNECT_TIMEOUT = 3  # seconds; a server that is frozen answers no handshake
_READER = Role.READER  # an enum's members are slow to look up on the request path
# Bytes that the answer to a probe may have. Each function of the catalog takes about 100.
LONGEST_ANSWER = 1 << 26
_PROBE_OPTIONS = ("connect_args", "module", "paramstyle", "client_encoding")


class RoutedConnection(Connection):
    """A connection that hides the library's own signals from listeners of handle_error, because they are no errors."""

    def _handle_dbapi_exception(
        self, e: BaseException, statement: Any, parameters: Any, cursor: Any, context: Any, *more: Any, **options: Any
    ) -> Any:
        if isinstance(e, Signal):
            if cursor is not None:
                cursor.close()
            raise e
        super()._handle_dbapi_exception(e, statement, parameters, cursor, context, *more, **options)


class EngineConfig(NamedTuple):
    """How the engines of a router are made.

    options, reader_options: options of create_engine(), for the writer and for readers.
    waiting: how units wait for their connections.
    """

    options: Mapping[str, Any]
    reader_options: Mapping[str, Any]
    waiting: Waiting

    def __repr__(self) -> str:
        # The options may hold secrets, and a traceback may show its locals.
        return "EngineConfig(...)"


class InstancePool:
    """The connections to one instance. Each role has engines of its own if readers have options of their own.

    is_closed: whether connections that come back are closed.
    password_error: the error of the user's password function in the last probe; None if a probe has connected since.
    reads_in_use: counts the connections that are checked out of the pool for reads.
    """

    def __init__(self, instance: Instance, config: EngineConfig, shared: ConnectionContext, *, is_closed: bool = False) -> None:
        self.id = instance.id
        self.is_closed = is_closed
        self.password_error: BaseException | None = None
        self.reads_in_use: Callable[[], int] = _none
        self._instance = instance
        self._config = config
        self._shared = shared
        self._settings = settings = shared.settings
        self._driver: Driver = shared.driver
        self._has_one_engine = config.options is config.reader_options
        self._lock = threading.Lock()
        # The key says whether the engine is for reads only. If readers have no options of their own, the only key is False.
        self._engines: dict[bool, Engine] = {}
        self._unpooled: Engine | None = None
        self._probing: Engine | None = None
        self._connect_slots = FairSemaphore(settings.connects_at_once, config.waiting)
        self._sockets: weakref.WeakSet[TrackedSocket] = weakref.WeakSet()  # each is held by its connection
        self._proven: weakref.WeakSet[Engine] = weakref.WeakSet()  # engines that have connected
        self._is_reached = False
        self._is_probe_logged_in = False
        self._has_pooler = False
        # The probe's connection that this thread is opening. It is local to the thread however units wait, because only the
        # monitor's own threads probe.
        self._opening: ThreadLocal[Opening] = ThreadLocal()
        self._openings: set[Opening] = set()
        self._probes: weakref.WeakSet[Probe] = weakref.WeakSet()
        self._inherited: list[Pool] = []

    # -- pools ----------------------------------------------------------------------------------------------------

    def engine(self, role: Role | None) -> Engine:
        """Return the engine that connects in this role, made at first use."""
        is_for_reads = role is _READER and not self._has_one_engine
        engine = self._engines.get(is_for_reads)
        return engine if engine is not None else self._make_pooled(is_for_reads)

    def _make_pooled(self, is_for_reads: bool) -> Engine:
        with self._lock:
            engine = self._engines.get(is_for_reads)
            if engine is None:
                options = self._config.reader_options if is_for_reads else self._config.options
                engine = self._engines[is_for_reads] = self._make(options)
                self._count(is_for_reads, engine)
        return engine

    def _count(self, is_for_reads: bool, engine: Engine) -> None:
        """Look the pool's counter up once, because a balancing strategy reads it for each unit."""
        if isinstance(engine.pool, QueuePool) and (is_for_reads or self._has_one_engine):
            self.reads_in_use = engine.pool.checkedout

    def _pools(self) -> list[QueuePool]:
        return [engine.pool for engine in [*self._engines.values()] if isinstance(engine.pool, QueuePool)]

    def owns(self, engine: Engine) -> bool:
        """Return whether this is the engine of a role."""
        return any(engine is own for own in [*self._engines.values()])

    def usage(self, limit: int | None) -> PoolUsage:
        """Count the connections at this moment, in the pools of both roles.

        limit: how many connections the pool of the instance's role may have; None if there is no limit.
        """
        pools = self._pools()
        in_use, idle = sum(pool.checkedout() for pool in pools), sum(pool.checkedin() for pool in pools)
        return PoolUsage(in_use, idle, limit, self._connect_slots.waiting)

    def evict(self, *, shut_down_before: float | None = None) -> int:
        """Close the idle connections at once, and those in use when they come back.

        shut_down_before: seconds, monotonic. Connections that were made before it are shut down now.
        Returns how many sockets were shut down.
        """
        try:
            with contextlib.ExitStack() as stack:  # renews all, even if one of them raises
                for is_for_reads in [*self._engines]:
                    stack.callback(self._renew, is_for_reads)
        finally:
            sockets = 0 if shut_down_before is None else self._shut_down(shut_down_before)
        return sockets

    def _renew(self, is_for_reads: bool) -> None:
        engine = self._engines.get(is_for_reads)
        if engine is None:
            return
        try:
            _dispose(engine)
        finally:  # the application's listeners on the pool may raise
            self._count(is_for_reads, engine)

    def _shut_down(self, before: float) -> int:
        """Shut down all sockets that were made before that time, also those outside of the pools.

        Call this after the pools are replaced. The threads that wake return their connections to the old pool. Nothing empties
        the old pool any more, so the threads that wait there get the places of these connections.
        """
        with self._lock:
            sockets = sum(tracked.shut_down() for tracked in self._sockets if tracked.since < before)
        self._connect_slots.cancel_waiters()
        return sockets

    def leave_role(self, role: Role | None) -> None:
        """Close the pooled connections for a former role, if each role has its own connections."""
        if not self._has_one_engine:
            self._renew(role is _READER)

    @property
    def is_unused(self) -> bool:
        """Whether no connection is open, so no unit is here."""
        return not self._sockets

    def close(self) -> None:
        """Close every pooled connection, and those in use when they come back."""
        self.is_closed = True
        with self._lock:
            engines, probing = [*self._engines.values()], self._probing
            self._probing = None
        for engine in engines:
            _dispose(engine)
        if probing is not None:
            probing.dispose()

    def forked(self, dead: socket.socket) -> None:
        """In a forked child, begin without connections. The parent's connections stay open, and nothing is sent on them.

        The parent's pools are kept and not emptied, because the router must not end another process's sessions. psycopg ends
        none either.

        dead: a socket that leads nowhere.
        """
        self._lock = threading.Lock()
        for tracked in self._sockets:
            tracked.replace_after_fork(dead)
        self._sockets.clear()
        for probe in [*self._probes]:
            probe.socket.replace_after_fork(dead)
        self._probes.clear()
        self._openings.clear()
        self._probing = self._unpooled = None
        self._connect_slots.forked()
        for is_for_reads, engine in [*self._engines.items()]:
            self._inherited.append(engine.pool)
            if engine in self._proven:
                engine.dispose(close=False)
                self._count(is_for_reads, engine)
            else:
                # A thread of the parent may have left SQLAlchemy's first look at the server half-done.
                del self._engines[is_for_reads]

    def forget_prepared(self) -> None:
        """Have each pooled connection drop its prepared statements at its next checkout.

        A statement that is out of date on one connection is out of date on all. A reader's read-only default is set again, too.
        This costs nothing on connections that are not marked.
        """
        with self._lock:
            for tracked in self._sockets:
                state = tracked.state
                if state is not None:
                    state.mode, state.is_outdated = None, True

    def unpooled_connection(self) -> Connection:
        """Make a connection that is in no pool. It is shut down with the others when the instance is lost."""
        with self._lock:
            if self._unpooled is None:
                self._unpooled = self._make({**self._driver.BARE, **self._bare_options(), "poolclass": NullPool})
            engine = self._unpooled
        return engine.connect()

    # -- what the connections tell: see connection_events.OwningPool ----------------------------------------------

    def add_socket(self, tracked: TrackedSocket) -> None:
        """Have a socket shut down when the instance is lost."""
        with self._lock:
            self._sockets.add(tracked)

    def note_connected(self, engine: Engine, *, is_shared: bool) -> None:
        """Note that an engine has connected, and whether a pooler shares its connections."""
        self._proven.add(engine)
        if is_shared and self._settings.pooler is None and not self._has_pooler:
            self._has_pooler = True
            what = "a pooler stands before %s: no setting is left on its connections, and no statement is prepared there"
            with contextlib.suppress(Exception):  # the application's handlers and filters may raise
                log.info(f'{what}. Say pooler="session" if it keeps a client on one connection.', self.id)

    # -- the monitor's connections --------------------------------------------------------------------------------

    @property
    def reached(self) -> Reached:
        """What the monitor's probes have reached."""
        return Reached(self._has_pooler or self._settings.pooler is not None, self._is_probe_logged_in)

    def probe(self) -> Probe:
        """Make a connection for the monitor, outside of the pool, because probes must work while the pool is full.

        Raises ProbeError.
        """
        self._is_probe_logged_in = False
        opening = self._opening.value = Opening()
        try:
            with self._lock:
                self._openings.add(opening)
            return self._probe()
        finally:
            self._opening.value = None
            with self._lock:
                self._openings.discard(opening)
            opening.close()

    def shut_down_probes(self) -> None:
        """Shut down the sockets of the probes that are connecting, and let these probes open no others.

        This ends their threads. Otherwise a server that never stops sending would keep the threads, and fill the memory.
        """
        with self._lock:
            openings = [*self._openings]
        for opening in openings:
            opening.shut_down()

    def _probe(self) -> Probe:
        try:
            engine = self._probing_engine()
            connection = engine.connect()
        except ProbeError:
            raise
        except exc.SQLAlchemyError as error:
            refused = probe_error(error, self._driver, self._shared.families.at(self.id))
            if UNKNOWN_HOST.search(str(refused)):
                refused = self._unasked(f"{refused}; check the host")
            raise refused from None
        except ConfigurationError as error:  # the password function gave no password
            self.password_error = error.__cause__
            raise self._unasked(str(error)) from None
        except Exception as error:
            raise connect_argument_error(error, self._driver) from None
        self._is_reached = True
        self.password_error = None
        try:
            probe = Probe(self.id, connection, self._driver, self._shared.families)
            self._probes.add(probe)
            return probe
        except (OSError, engine.dialect.loaded_dbapi.Error):
            connection.invalidate()
            connection.close()
            raise ProbeError("the connection was closed at once") from None

    def _unasked(self, said: str) -> ProbeError:
        """The error of a probe that found no such host, or got no password.

        It counts as a mistake in the configuration if no probe has connected before. Otherwise the trouble may pass, so units
        that wait for a writer should go on waiting.
        """
        return ProbeError(said, ProbeFailure.REFUSED if self._is_reached else ProbeFailure.MISCONFIGURED)

    def _probing_engine(self) -> Engine:
        with self._lock:
            if self._probing is None:
                options = self._bare_options()
                # This only frees the thread, because the monitor has a deadline of its own. 2 is libpq's shortest timeout.
                timeout = max(math.ceil(self._settings.probe_timeout), 2)
                options["connect_args"] = {**options.get("connect_args", {}), "connect_timeout": timeout}
                # A probe's connection is not used again, so it needs no reset. SQLAlchemy would log an error at the reset of a
                # lost one.
                pool = {"poolclass": NullPool, "pool_reset_on_return": None}
                engine = self._create({**pool, **self._driver.BARE, **options})
                self._check_connect_timeout(engine.url)
                self._driver.look_anywhere(engine.dialect)
                self._driver.track_connecting_socket(engine.dialect, self._watch_opening, LONGEST_ANSWER)
                explain_argument_errors(engine, self._driver, options)
                ask_for_password(engine, self._settings.password, options)
                event.listen(engine, "connect", self._note_login, insert=True)  # before SQLAlchemy's first look at the server
                self._probing = engine
            return self._probing

    def _note_login(self, *_: object) -> None:
        self._is_probe_logged_in = True

    @contextlib.contextmanager
    def _watch_opening(self, number: int) -> Iterator[None]:
        opening = self._opening.value
        assert opening is not None  # only probe() connects with the probes' engine
        opening.watch(number)
        yield

    def _check_connect_timeout(self, url: URL) -> None:
        """Raise ConfigurationError for a connect_timeout that the driver cannot use.

        The value may be a password in the wrong place, so the error does not repeat it. A probe has a timeout of its own, so only
        units would meet the driver's error.
        """
        of_units = (self._config.options["connect_args"], self._config.reader_options["connect_args"])
        for given in (url.query, *of_units):
            seconds: Any = given.get("connect_timeout")
            try:
                usable = seconds is None or math.isfinite(float(seconds))
            except (TypeError, ValueError):
                usable = False
            if not usable:
                raise ConfigurationError("connect_timeout is no number of seconds; check the URL's query and connect_args")

    # -- engines --------------------------------------------------------------------------------------------------

    def _bare_options(self) -> dict[str, Any]:
        """The options of the writer's engine that are about connecting."""
        return {key: value for key, value in self._config.options.items() if key in _PROBE_OPTIONS}

    def _create(self, options: Mapping[str, Any]) -> Engine:
        """Make an engine. Raises ConfigurationError if SQLAlchemy cannot use the URL or the options."""
        url = self._settings.target.at(self._instance, options["connect_args"])
        try:
            return create_engine(url, **options)
        except Exception as error:
            if not is_refused(error):
                raise
            hide_values(error, [*url.query.values(), *options.values()], {*url.query, *options})
            refused = ConfigurationError(str(connect_argument_error(error, self._driver)))
        raise refused

    def _make(self, options: Mapping[str, Any]) -> Engine:
        """Make an engine whose connections go through the hooks."""
        waiting, hooks = self._config.waiting, self._shared.hooks
        engine = self._create({"poolclass": RouterPool, **options})
        if isinstance(engine.pool, RouterPool):
            engine.pool.before_waiting, engine.pool.checked_out = self._before_waiting, hooks.on_checkout
        engine._connection_cls = RoutedConnection
        put_around_rollbacks(engine, self._driver, hooks)
        self._driver.look_anywhere(engine.dialect)
        ConnectionEvents(engine, options, self, self._shared).listen()
        explain_argument_errors(engine, self._driver, options)
        ask_for_password(engine, self._settings.password, options)
        _, pool_timeout = get_pool_limits(self._settings.options)
        limit_connects(engine, self._connect_slots, max(pool_timeout, CONNECT_TIMEOUT), waiting)
        # These are events of the dialect. A listener to the connection's own events would make SQLAlchemy check for all of them.
        # That takes 20 us a statement.
        for name in ("do_execute", "do_executemany", "do_execute_no_params"):
            event.listen(engine, name, hooks.before_execute)
        event.listen(engine, "handle_error", hooks.on_error)
        put_around_commits(engine, hooks, waiting)
        put_around_options(engine, hooks)
        return engine

    def _before_waiting(self) -> None:
        """Note that a thread is about to wait for a connection from a full pool."""
        self._shared.hooks.before_waiting()
        self._shared.counters.pool_waits[self.id] += 1


def _none() -> int:
    return 0


def _dispose(engine: Engine) -> None:
    """Give an engine a new pool. Close the old pool's idle connections at once, and those in use when they come back.

    A thread that waits in the old pool gets the place of a connection that came back, and connects afresh.
    """
    old = engine.pool
    if isinstance(old, RouterPool):
        # A listener would not do: SQLAlchemy fails if one is added while another thread calls the listeners.
        old.retired = True
    engine.dispose(close=False)
    if isinstance(old, QueuePool) and old.checkedin():
        old.dispose()
