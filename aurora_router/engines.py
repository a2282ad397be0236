"""One SQLAlchemy Engine per instance: the checks of new and of pooled connections, and cutting.

SQLAlchemy's engine, pool and dialect are the connection layer; this module only listens to their events.
"""

from __future__ import annotations

import contextlib
import logging
import math
import re
import socket
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

from sqlalchemy import create_engine, event, exc, text
from sqlalchemy.engine import URL, Connection, Engine
from sqlalchemy.pool import ConnectionPoolEntry, NullPool, Pool, PoolProxiedConnection, QueuePool

from aurora_router.config import get_pool_limits
from aurora_router.core import events
from aurora_router.core.failures import Failure, Phase, own_error, traits
from aurora_router.core.instance import Instance, Role, Server, ServerId, Silence
from aurora_router.core.query import Query
from aurora_router.core.redaction import hide
from aurora_router.dialect_patches import (
    Gatekeeper,
    ask_for_password,
    explain_mistakes,
    limit_connects,
    put_around_commits,
    put_around_options,
    put_around_rollbacks,
)
from aurora_router.drivers import Driver, Mode
from aurora_router.error_classification import failure_of
from aurora_router.errors import ConfigurationError, Signal, WrongServer
from aurora_router.limits import Places
from aurora_router.listeners import EventDispatcher
from aurora_router.mistakes import UNKNOWN_HOST, hide_values, is_refused, mistake, probe_error, refusal
from aurora_router.pooling import (
    AUTOCOMMIT,
    ENTERED,
    FAMILY,
    GUARDED,
    HANDED_OUT,
    MODE,
    OUTDATED,
    POLL,
    SERVER,
    SHARED,
    UNIT,
    Line,
    Opening,
    RouterPool,
    line_of,
    poll_of,
)
from aurora_router.probe import ProbeError
from aurora_router.servers import ServerFamily, Unsuitable
from aurora_router.settings import Settings
from aurora_router.stats import Counters, PoolUsage
from aurora_router.waiting import Local, Waiting

log = logging.getLogger("aurora_router")

_READER = Role.READER  # an enum's members are slow to look up on the request path
CONNECT_TIMEOUT = 3  # seconds; a server that is frozen answers no handshake
LONGEST_ANSWER = 1 << 26  # bytes, of a probe's question; the catalog's functions take about 100 each
FRESH = 0.01  # seconds before a living connection is checked again
_PROBE_OPTIONS = ("connect_args", "creator", "module", "paramstyle", "client_encoding")


class RoutedConnection(Connection):
    """A connection that hides the library's own signals from listeners of handle_error, because they are no errors."""

    def _handle_dbapi_exception(
        self, e: BaseException, statement: Any, parameters: Any, cursor: Any, context: Any, *more: Any, **options: Any
    ) -> NoReturn:
        if isinstance(e, Signal):
            if cursor is not None:
                cursor.close()
            raise e
        super()._handle_dbapi_exception(e, statement, parameters, cursor, context, *more, **options)


class Engines:
    """The engines of one router.

    known: gives the servers that an instance may lead to at this moment, in its role.
    surprised: called with an instance that led to another server, and the reason.
    gate: the interceptor of statements, COMMITs and errors.
    waiting: how units wait for their connections.
    dispatcher: tells of connections that were made and closed.
    counters: counts connections that were made, and units that waited for a pool.
    stand_in: an engine that stands for the cluster if a session class chooses among several engines. It never connects.
    """

    def __init__(
        self,
        settings: Settings,
        known: Callable[[str], frozenset[ServerId]],
        surprised: Callable[[str, str], None],
        gate: Gatekeeper,
        waiting: Waiting,
        counters: Counters,
        dispatcher: EventDispatcher,
    ) -> None:
        target, of_readers = settings.target, settings.options_of_readers
        url, driver = target.url, target.driver
        self._at = target.at
        self._pooler = settings.pooler
        self._behind: set[str] = set()  # instances that were found to be behind a pooler
        self._driver = driver
        ours = {"connect_timeout": CONNECT_TIMEOUT, **driver.CONNECT, **target.secrets}
        usual = {name: value for name, value in ours.items() if name not in url.query}
        self._options = _with_connect_args(usual, settings.options, driver)
        self._reader_options = self._options if of_readers is None else _with_connect_args(usual, of_readers, driver)
        self._password = settings.password if callable(settings.password) else None
        # The error of the user's password function in the last probe; None if a probe has connected since.
        self.unasked: BaseException | None = None
        self._connects_at_once = settings.connects_at_once
        _, pool_timeout = get_pool_limits(settings.options)
        self._connect_turn_timeout = max(pool_timeout, CONNECT_TIMEOUT)
        self.stand_in = self._engine_with("engine_options", url, self._options)
        event.listen(self.stand_in, "do_connect", _refuse_to_connect)
        self._dialect: Any = self.stand_in.dialect
        if of_readers is not None:
            self._engine_with("reader_options", url, self._reader_options)
        self.driver_error: type[Exception] = self._dialect.loaded_dbapi.Error
        self._known = known
        self._surprised = surprised
        self._gate = gate
        self._waiting = waiting
        self._counters = counters
        self._dispatcher = dispatcher
        self._untold: Local[list[events.Event]] = waiting.local()  # events that this thread tells later
        self._lock = threading.Lock()
        self._engines: dict[str, Engine] = {}
        self._of_readers: dict[str, Engine] = self._engines if of_readers is None else {}
        self._by_role = (self._engines,) if of_readers is None else (self._engines, self._of_readers)
        self._in_use: dict[str, Callable[[], int]] = {}
        self._probes: dict[str, Engine] = {}
        self._outside: dict[str, Engine] = {}
        self._closed = False
        self._connects: dict[str, Places] = {}
        self._lines: dict[str, weakref.WeakSet[Line]] = {}  # each is held by its connection, and ends with it
        self._reached: set[str] = set()  # instances to which a probe has connected
        self._proven: weakref.WeakSet[Engine] = weakref.WeakSet()  # engines that have connected
        self._opening = threading.local()  # .now: the connection that this thread's probe is opening
        self._openings: dict[str, set[Opening]] = {}
        self._probing: weakref.WeakSet[Probe] = weakref.WeakSet()
        self._inherited: list[Pool] = []

    def _engine_with(self, name: str, url: URL, options: Mapping[str, Any]) -> Engine:
        """Make an engine with these options. Raises ConfigurationError for options that create_engine() does not take."""
        given = {key: value for key, value in options.items() if key != "connect_args"}
        try:
            engine = create_engine(url.set(query={}), **{"poolclass": RouterPool, **given})
            text("").compile(dialect=engine.dialect)  # fails for an unknown paramstyle
            return engine
        except ImportError:  # the driver is missing, or a library that it needs
            install = f"pip install 'aurora-router[{self._driver.PROTOCOL}]'"  # the extra has the protocol's name
            wrong = f"{url.drivername} needs {self._driver.NAME}: {install}"
        except Exception as error:
            if not is_refused(error):
                raise
            said = hide(" ".join(str(error).split()), given.values(), given)
            wrong = f"{name} cannot be used ({type(error).__name__}: {said})"
        raise ConfigurationError(wrong)

    def engine(self, instance: Instance) -> Engine:
        """The engine that connects to this instance in its role, made at first use."""
        engines = self._of_readers if instance.role is _READER else self._engines
        engine = engines.get(instance.id)
        if engine is None:
            with self._lock:
                engine = engines.get(instance.id)
                if engine is None:
                    options = self._reader_options if engines is self._of_readers else self._options
                    engine = engines[instance.id] = self._make(instance, options)
                    self._count(instance.id, engine)
        return engine

    def in_use(self, instance_id: str) -> int:
        """Connections of this instance that are checked out of the pool for reads."""
        count = self._in_use.get(instance_id)
        return count() if count is not None else 0

    @contextlib.contextmanager
    def telling_later(self) -> Iterator[list[events.Event]]:
        """Collect the events of connections that this thread closes meanwhile, because it must not wait for listeners."""
        told = self._untold.value = []
        try:
            yield told
        finally:
            self._untold.value = None

    def _tell_closed(self, event: events.Event) -> None:
        if self._untold.value is not None:
            self._untold.value.append(event)
        elif self._dispatcher.listeners:
            self._dispatcher.publish(event)

    def pool_usage(self, instance: Instance) -> PoolUsage:
        """The connections of an instance at this moment, in the pools of both roles."""
        made = [engine.pool for engines in self._by_role if (engine := engines.get(instance.id)) is not None]
        pools = [pool for pool in made if isinstance(pool, QueuePool)]
        limit, _ = get_pool_limits(self._reader_options if instance.role is _READER else self._options)
        connects = self._connects.get(instance.id)
        return PoolUsage(
            sum(pool.checkedout() for pool in pools),
            sum(pool.checkedin() for pool in pools),
            None if math.isinf(limit) else int(limit),
            connects.waiting if connects is not None else 0,
        )

    def _count(self, instance_id: str, engine: Engine) -> None:
        """Look the pool's counter up once, because a balancing strategy reads it for each unit."""
        if isinstance(engine.pool, QueuePool) and self._of_readers.get(instance_id) is engine:
            self._in_use[instance_id] = engine.pool.checkedout

    def discard(self, instance_id: str, *, cut_before: float | None = None) -> int:
        """Close the idle connections of an instance at once, and those in use when they come back.

        cut_before: seconds, monotonic. Connections that were made before it are cut now.
        Returns how many sockets were cut.
        """
        try:
            with contextlib.ExitStack() as stack:  # renews all, even if one of them raises
                for engines in self._by_role:
                    stack.callback(self._renew, instance_id, engines)
        finally:
            sockets = 0 if cut_before is None else self._cut(instance_id, cut_before)
        return sockets

    def _renew(self, instance_id: str, engines: Mapping[str, Engine]) -> None:
        engine = engines.get(instance_id)
        if engine is None:
            return
        try:
            self._dispose(engine)
        finally:  # the application's listeners on the pool may raise
            self._count(instance_id, engine)

    def _cut(self, instance_id: str, before: float) -> int:
        """Shut all sockets that were made before that time. Some are outside of the pool, and there may be no others.

        Call this after the pool is replaced. The threads that wake return their connections to the old pool. Nothing empties
        that pool any more, so the threads that wait there get the places.
        """
        with self._lock:
            sockets = sum(line.cut() for line in self._lines.get(instance_id, ()) if line.since < before)
        if instance_id in self._connects:
            self._connects[instance_id].turn_away()
        return sockets

    def leave_role(self, was: Instance) -> None:
        """Close the pooled connections for the former role of an instance, if each role has its own connections."""
        if len(self._by_role) > 1:
            self._renew(was.id, self._of_readers if was.role is _READER else self._engines)

    def keep(self, instances: Mapping[str, object]) -> None:
        """Forget all instances except these. An instance with an open connection stays, because a unit may be there."""
        each: dict[str, Any]
        with self._lock:
            for gone in {*self._probes, *self._lines} - instances.keys():
                if not self._lines.get(gone):
                    for each in (*self._by_role, self._in_use, self._probes, self._outside, self._connects, self._lines):
                        each.pop(gone, None)
                    self._reached.discard(gone)
                    self._behind.discard(gone)

    def _dispose(self, engine: Engine) -> None:
        """Give an engine a new pool. Close the old pool's idle connections at once, and those in use when they come back.

        A thread that waits in the old pool gets the place of a connection that came back, and connects afresh.
        """
        old = engine.pool
        if isinstance(old, RouterPool):
            # A listener would not do: SQLAlchemy fails if one is added while another thread calls the listeners.
            old.over = True
        engine.dispose(close=False)
        if isinstance(old, QueuePool) and old.checkedin():
            old.dispose()

    def close(self) -> None:
        """Close every pooled connection, and those in use when they come back."""
        self._closed = True
        with self._lock:
            engines = [engine for engines in self._by_role for engine in engines.values()]
            probes = [*self._probes.values()]
            self._probes.clear()
        for engine in engines:
            self._dispose(engine)
        for probe in probes:
            probe.dispose()

    def forked(self) -> None:
        """In a forked child, begin without connections. The parent's connections stay open, and nothing is sent on them.

        The parent's pools are kept and not emptied. psycopg does not end another process's session, nor may the router.
        """
        self._lock = threading.Lock()
        dead, other = socket.socketpair()
        other.close()
        with dead:
            for lines in self._lines.values():
                for line in lines:
                    line.forsake(dead)
                lines.clear()
            for probe in [*self._probing]:
                probe.line.forsake(dead)
        self._probing.clear()
        self._openings.clear()
        self._probes.clear()
        self._outside.clear()
        for places in self._connects.values():
            places.forked()
        for engines in self._by_role:
            for place, engine in [*engines.items()]:
                self._inherited.append(engine.pool)
                if engine in self._proven:
                    engine.dispose(close=False)
                    self._count(place, engine)
                else:
                    # A thread of the parent may have left SQLAlchemy's first look at the server half-done.
                    del engines[place]

    def may_queue(self, instance_id: str) -> bool:
        """Whether a probe of an instance may wait in a pooler's queue because units of this router have the places."""
        if self._pooler is None and instance_id not in self._behind:
            return False
        made = [engine for engines in self._by_role if (engine := engines.get(instance_id)) is not None]
        return any(engine.pool.checkedout() for engine in made if isinstance(engine.pool, QueuePool))

    def _found_pooler(self, instance_id: str) -> None:
        if self._pooler is None and instance_id not in self._behind:
            self._behind.add(instance_id)
            what = "a pooler stands before %s: no setting is left on its connections, and no statement is prepared there"
            with contextlib.suppress(Exception):  # the application's handlers and filters may raise
                log.info(f'{what}. Say pooler="session" if it keeps a client on one connection.', instance_id)

    def sound(self, connection: PoolProxiedConnection, instance: Instance, now: float) -> bool:
        """Whether a connection that was just checked out leads to the right server and seems alive.

        Sends a ping only if the socket has something to read.

        instance: the instance when it was chosen, with the servers behind it.
        now: seconds, monotonic.
        """
        info = connection.info
        if info[SERVER] not in instance.servers:
            return False
        if now - info[ENTERED] < FRESH:
            return True
        info[ENTERED] = now
        # An idle connection that has something to read was closed, or got a notice. Only then is a ping worth it.
        return not info[POLL](0) or _alive(self._dialect, connection.dbapi_connection)

    def is_alive(self, connection: PoolProxiedConnection) -> bool:
        """Whether a connection that was just checked out is new or seems alive."""
        info = connection.info
        entered_at, info[ENTERED] = info[ENTERED], time.monotonic()
        return entered_at == -math.inf or not info[POLL](0) or _alive(self._dialect, connection.dbapi_connection)

    def set_mode(self, connection: PoolProxiedConnection, mode: Mode, isolation: str | None = None) -> None:
        """Switch a connection that was just checked out to a mode. This sends something in two cases only.

        - A connection was made to a reader and is to write, or the other way round, after a promotion in place.
        - The guard may have been removed, and the server does not report that. Then the guard is set again.

        isolation: the level that SQLAlchemy has already set on the connection for this unit.
        """
        info = connection.info
        driver: Any = connection.dbapi_connection
        if info.get(MODE) is mode and (mode is Mode.DEFAULT or self._driver.is_settled(driver, mode is Mode.AUTOCOMMIT)):
            return
        if mode is Mode.AUTOCOMMIT and info[SHARED]:
            # A shared connection has no guard. If the reader is promoted, only a read-only transaction prevents writes.
            self.set_mode(connection, Mode.READ_ONLY)
            return
        info[MODE] = None  # unknown if the switch fails half-way
        self._driver.end_transaction(driver)
        guarded, outdated = info[GUARDED], info.get(OUTDATED)
        guard = guarded if mode is Mode.READ_ONLY else mode is Mode.AUTOCOMMIT
        if guarded is not guard or (guard and (outdated or not self._driver.is_guarded(driver, info[HANDED_OUT]))):
            self._guard(connection, guard)
            info[GUARDED] = guard
        if outdated:
            self._driver.forget_prepared(driver)
            info[OUTDATED] = False
        info[HANDED_OUT] = False
        lasts = self._driver.set_mode(driver, mode, info[AUTOCOMMIT], info[GUARDED])
        if isolation is not None and mode is Mode.DEFAULT:
            self._dialect.set_isolation_level(driver, isolation)
        if lasts:
            info[MODE] = mode

    def keep_guarded(self, connection: PoolProxiedConnection) -> None:
        """Guard the connection of a read-only unit whose transactions are not read-only by themselves."""
        info = connection.info
        driver: Any = connection.dbapi_connection
        info[MODE] = None
        if not (info[GUARDED] and self._driver.is_guarded(driver, info[HANDED_OUT])):
            self._guard(connection, True)
            info[GUARDED] = True

    def keep_read_only(self, connection: PoolProxiedConnection) -> None:
        """Have each transaction of a connection be read-only if its mode holds only for the first one."""
        if connection.info[MODE] is None and not connection.info[SHARED]:
            self.keep_guarded(connection)

    def guard_again(self, connection: PoolProxiedConnection) -> None:
        """Guard a connection in autocommit again if its unit has removed the guard. Nothing else keeps the unit from writing."""
        driver: Any = connection.dbapi_connection
        if self._driver.has_lost_guard(driver):
            self._guard(connection, True)

    def forget_prepared(self, instance_id: str) -> None:
        """Have each pooled connection to an instance drop its prepared statements at its next checkout.

        A statement that is out of date on one connection is out of date on all. A reader's guard is set again, too.
        Connections that are not marked pay nothing for this.
        """
        with self._lock:
            for line in self._lines.get(instance_id, ()):
                if line.info is not None:
                    line.info.update({MODE: None, OUTDATED: True})

    def literal_mode(self, connection: PoolProxiedConnection, *, ask: bool) -> str | None:
        """The setting for backslashes in texts of this connection, as it is now: see `Driver.literal_mode`.

        ask: whether the server may be asked.
        """
        driver: Any = connection.dbapi_connection
        found = self._driver.literal_mode(driver)
        if found is None and ask:
            family: ServerFamily = connection.info[FAMILY]
            _, ((setting,),) = self._asking(driver)(family.LITERALS)
            return str(setting)
        return found

    def _make_as_new(self, dbapi: Any, record: ConnectionPoolEntry) -> None:
        """Set the mode of a new connection, because listeners of the application expect it at the next checkout."""
        info = record.info
        info[MODE] = None
        try:
            self._driver.set_mode(dbapi, Mode.DEFAULT, info[AUTOCOMMIT], info[GUARDED])
        except self.driver_error:
            record.invalidate()

    def _remove_leftovers(self, dbapi: Any, record: ConnectionPoolEntry) -> None:
        """Remove the last unit's leftovers from a connection that has come back. Close the connection if that fails."""
        record.info[MODE] = None
        try:
            self._driver.remove_leftovers(dbapi, self._asking(dbapi))
        except BaseException as error:
            record.invalidate(error)
            if not isinstance(error, self.driver_error):
                raise

    def _guard(self, connection: PoolProxiedConnection, on: bool) -> None:
        """Make an idle connection refuse writes outside of transactions, or accept them again."""
        dbapi, family = connection.dbapi_connection, connection.info[FAMILY]
        with self._driver.alone(dbapi):
            self._asking(dbapi)(family.GUARD if on else family.UNGUARD)
        self._driver.note_guard(dbapi, on)

    def _asking(self, dbapi: Any) -> Query:
        return asking(dbapi, self._driver)

    def failure(self, error: BaseException, phase: Phase) -> Failure:
        """The kind of failure that an exception from SQLAlchemy or the driver stands for."""
        if isinstance(error, WrongServer):
            return own_error(error).failure
        if isinstance(error, exc.DBAPIError):
            return failure_of(error.orig, self._gate.families.leading, disconnected=error.connection_invalidated, phase=phase)
        return failure_of(error, self._gate.families.leading, disconnected=True, phase=phase)

    def mistake(self, error: Exception) -> ConfigurationError | None:
        """The error to raise in place of the driver's for an option that it cannot use; None for other errors.

        The driver's error may repeat the option's value, which may be a password in the wrong place.
        """
        original: Any = getattr(error, "orig", None) or error
        if re.search(self._driver.UNUSABLE, str(original)) or self._driver.code(original) in self._gate.families.leading.UNUSABLE:
            return ConfigurationError(self.explain(error))
        return None

    def explain(self, error: Exception) -> str:
        """An error of connecting as one line for the user."""
        return str(probe_error(error, self._driver, self._gate.families.leading))

    def outside(self, instance: Instance) -> Connection:
        """Make a connection that is in no pool. It is cut with the others when the instance is lost."""
        with self._lock:
            engine = self._outside.get(instance.id)
            if engine is None:
                options = {key: self._options[key] for key in _PROBE_OPTIONS if key in self._options}
                engine = self._outside[instance.id] = self._make(
                    instance, {**self._driver.BARE, **options, "poolclass": NullPool}
                )
        return engine.connect()

    # -- the monitor's connections --------------------------------------------------------------------------------

    def probe(self, instance: Instance) -> Probe:
        """Make a connection for the monitor, outside of the pool, because a full pool must not blind the monitor.

        Raises ProbeError.
        """
        opening = self._opening.now = Opening()
        try:
            with self._lock:
                self._openings.setdefault(instance.id, set()).add(opening)
            return self._probe(instance)
        finally:
            self._opening.now = None
            with self._lock:
                openings = self._openings[instance.id]
                openings.discard(opening)
                if not openings:
                    del self._openings[instance.id]
            opening.close()

    def cut_probe(self, instance_id: str) -> None:
        """Shut the sockets of the probes that are connecting to that instance, and let them open no others.

        This ends their threads. Otherwise a server that never stops sending would keep the threads, and fill the memory.
        """
        with self._lock:
            openings = [*self._openings.get(instance_id, ())]
        for opening in openings:
            opening.cut()

    def _probe(self, instance: Instance) -> Probe:
        try:
            engine = self._probing_engine(instance)
            connection = engine.connect()
        except ProbeError:
            raise
        except exc.SQLAlchemyError as error:
            refused = probe_error(error, self._driver, self._gate.families.at(instance.id))
            if UNKNOWN_HOST.search(str(refused)):
                refused = self._unasked(instance, f"{refused}; check the host")
            raise refused from None
        except ConfigurationError as error:  # the password function gave no password
            self.unasked = error.__cause__
            raise self._unasked(instance, str(error)) from None
        except Exception as error:
            raise mistake(error, self._driver) from None
        self._reached.add(instance.id)
        self.unasked = None
        try:
            probe = Probe(instance.id, connection, self._driver, self._gate)
            self._probing.add(probe)
            return probe
        except (OSError, engine.dialect.loaded_dbapi.Error):
            connection.invalidate()
            connection.close()
            raise ProbeError("the connection was closed at once") from None

    @contextlib.contextmanager
    def _probe_connects(self, number: int) -> Iterator[None]:
        self._opening.now.watch(number)
        yield

    def _unasked(self, instance: Instance, said: str) -> ProbeError:
        """The error of a probe that found no such host, or got no password.

        It counts as a mistake unless a probe has connected before. Then the trouble may pass, so a unit that waits for a writer
        should go on waiting.
        """
        return ProbeError(said, Silence.REFUSED if instance.id in self._reached else Silence.MISCONFIGURED)

    def _probing_engine(self, instance: Instance) -> Engine:
        with self._lock:
            engine = self._probes.get(instance.id)
            if engine is None:
                options = {key: self._options[key] for key in _PROBE_OPTIONS if key in self._options}
                # 2 is libpq's shortest timeout. It only frees the thread, because the monitor has a deadline of its own.
                options["connect_args"] = {**options.get("connect_args", {}), "connect_timeout": 2}
                # A probe's connection is not used again, so it needs no reset. If it is lost, SQLAlchemy would log an error.
                pool = {"poolclass": NullPool, "pool_reset_on_return": None}
                engine = self._create(instance, {**pool, **self._driver.BARE, **options})
                self._check_connect_timeout(engine.url)
                self._driver.look_anywhere(engine.dialect)
                self._driver.watch_connecting(engine.dialect, self._probe_connects, LONGEST_ANSWER)
                explain_mistakes(engine, self._driver, options)
                ask_for_password(engine, self._password, options)
                self._probes[instance.id] = engine
            return engine

    def _check_connect_timeout(self, url: URL) -> None:
        """Raise ConfigurationError for a timeout that the driver cannot use, which may be a password in the wrong place.

        A probe has a timeout of its own, so only units would meet the driver's error.
        """
        for given in (url.query, self._options["connect_args"], self._reader_options["connect_args"]):
            seconds: Any = given.get("connect_timeout")
            try:
                usable = seconds is None or math.isfinite(float(seconds))
            except (TypeError, ValueError):
                usable = False
            if not usable:
                raise ConfigurationError("connect_timeout is no number of seconds; check the URL's query and connect_args")

    # -- one instance's engine ------------------------------------------------------------------------------------

    def _create(self, instance: Instance, options: Mapping[str, Any]) -> Engine:
        """Make an engine. Raises ConfigurationError if SQLAlchemy cannot use the URL or the options."""
        url = self._at(instance, options["connect_args"])
        try:
            return create_engine(url, **options)
        except Exception as error:
            if not is_refused(error):
                raise
            hide_values(error, [*url.query.values(), *options.values()], {*url.query, *options})
            refused = ConfigurationError(str(mistake(error, self._driver)))
        raise refused

    def _before_waiting(self, instance: Instance) -> Callable[[], None]:
        """Make the function that is called when a thread is about to wait for a connection of a full pool."""

        def before_waiting() -> None:
            self._gate.before_waiting()
            self._counters.pool_waits[instance.id] += 1

        return before_waiting

    def _make(self, instance: Instance, options: Mapping[str, Any]) -> Engine:
        engine = self._create(instance, {"poolclass": RouterPool, **options})
        if isinstance(engine.pool, RouterPool):
            engine.pool.before_waiting, engine.pool.checked_out = self._before_waiting(instance), self._gate.checked_out
        engine._connection_cls = RoutedConnection
        put_around_rollbacks(engine, self._driver, self._gate)
        self._driver.look_anywhere(engine.dialect)
        lines = self._lines.setdefault(instance.id, weakref.WeakSet())
        place = instance.id
        given = {*engine.url.query, *options.get("connect_args", {})}

        def watch(number: int) -> Line:
            """Have discard() cut this socket. Raises WrongServer if discard() was called already, and would miss the socket."""
            line = Line(number)
            with self._lock:
                lines.add(line)
            if not self._known(place):
                raise WrongServer(place, "a server that may be used is not known there")
            return line

        @contextlib.contextmanager
        def connecting(number: int) -> Iterator[None]:
            line = watch(number)
            try:
                yield
            finally:
                line.twin.close()

        self._driver.watch_connecting(engine.dialect, connecting)
        explain_mistakes(engine, self._driver, options)
        ask_for_password(engine, self._password, options)
        places = self._connects.setdefault(instance.id, Places(self._connects_at_once, self._waiting))
        limit_connects(engine, places, self._connect_turn_timeout, self._waiting)

        def listened() -> bool:
            """Whether listeners of the application may use a connection between two units."""
            on = engine.pool.dispatch
            return bool(on.checkout or on.reset or len(on.checkin) > checkins or engine.dispatch.engine_connect)

        @event.listens_for(engine, "connect", insert=True)
        def made(dbapi: Any, _: Any) -> None:
            """Have discard() wake a thread that hangs in SQLAlchemy's first look at a server, which comes before connected()."""
            with contextlib.suppress(OSError, self.driver_error):  # closed already, as connected() will find
                line = dbapi.aurora_router_line = Line(self._driver.fileno(dbapi))
                with self._lock:
                    lines.add(line)

        @event.listens_for(engine, "connect")
        def connected(dbapi: Any, record: Any) -> None:
            """Find out which server this is. It must be one that the topology knows here."""
            try:
                line = dbapi.aurora_router_line = watch(self._driver.fileno(dbapi))
                self._driver.end_transaction(dbapi)
                usual = self._driver.autocommit(dbapi)
                family = self._gate.families.at(place)
                with self._driver.alone(dbapi):
                    greeting = family.greet(self._asking(dbapi), self._driver.process_id(dbapi), self._pooler)
                self._driver.note_guard(dbapi, greeting.guarded)
                line.since = time.monotonic()
                if greeting.server not in self._known(place):
                    raise WrongServer(place, "it reached a server that is not known there in this role")
                self._driver.prepare(dbapi, greeting.shared, given, listened)
                if greeting.shared:
                    self._found_pooler(place)
                record.info.update(
                    {
                        SERVER: greeting.server,
                        FAMILY: family,
                        AUTOCOMMIT: usual,
                        MODE: None if greeting.role is Role.READER else Mode.DEFAULT,
                        GUARDED: greeting.guarded,
                        HANDED_OUT: len(engine.pool.dispatch.connect) > ours,  # the application's listeners come after this one
                        SHARED: greeting.shared,
                        POLL: poll_of(line.twin),
                        ENTERED: -math.inf,
                    }
                )
                line.info = record.info
                self._proven.add(engine)
                self._counters.connects[place] += 1
                line.made = True
                if self._dispatcher.listeners:
                    self._dispatcher.publish(events.ConnectionCreated(place, time.time() - record.starttime))
            except BaseException as error:
                closing(dbapi, None)
                with contextlib.suppress(self.driver_error):  # closed already
                    dbapi.close()
                if isinstance(error, Unsuitable):
                    error = WrongServer(place, str(error))
                elif isinstance(error, Exception):
                    error = refusal(error, self._driver, options.values(), options) or error
                if isinstance(error, WrongServer):
                    self._surprised(place, error.why)
                raise error from None

        @event.listens_for(engine, "close")
        def closing(dbapi: Any, _: Any) -> None:
            line = line_of(dbapi)
            if line is not None:
                line.twin.close()
                if line.made and self._dispatcher.listeners:
                    line.made = False
                    self._tell_closed(events.ConnectionClosed(place, time.monotonic() - line.since, at=time.time()))

        @event.listens_for(engine, "close_detached")
        def closing_detached(dbapi: Any) -> None:
            closing(dbapi, None)

        ours = len(engine.pool.dispatch.connect)

        # These are events of the dialect. One listener for the connection's events makes SQLAlchemy check for all of them,
        # which takes 20 us a statement.
        for name in ("do_execute", "do_executemany", "do_execute_no_params"):
            event.listen(engine, name, self._gate.statement)
        event.listen(engine, "handle_error", self._gate.failed)
        put_around_commits(engine, self._gate, self._waiting)
        put_around_options(engine, self._gate)

        def came_back(record: ConnectionPoolEntry, over: bool) -> None:
            """Make a connection that has left its unit ready for the next unit, or close it. May be called twice."""
            info = record.info
            unit = info.get(UNIT)
            dbapi = record.dbapi_connection
            if dbapi is not None and self._driver.has_leftovers(dbapi):
                self._remove_leftovers(dbapi, record)
            spoilt = unit is not None and self._gate.returned(unit, place)
            info[UNIT] = None
            if spoilt or over or self._closed:
                record.invalidate()  # no unit may, or will, check it out again
            elif dbapi is not None and info.get(MODE) is not Mode.DEFAULT and listened():
                self._make_as_new(dbapi, record)

        @event.listens_for(engine, "detach")
        def detached(_: Any, record: Any) -> None:
            came_back(record, False)

        if isinstance(engine.pool, RouterPool):
            engine.pool.checked_in = came_back
        else:

            @event.listens_for(engine, "checkin")
            def checked_in(_: Any, record: Any) -> None:
                came_back(record, False)

        checkins = len(engine.pool.dispatch.checkin)  # the router's own
        return engine


class Probe:
    """A connection of the monitor's own to one server."""

    def __init__(self, instance_id: str, connection: Connection, driver: Driver, gate: Gatekeeper) -> None:
        self._connection = connection
        self._driver = driver
        self._gate = gate
        dbapi = connection.connection.dbapi_connection
        self.line = Line(driver.fileno(dbapi))
        self._error: type[Exception] = connection.dialect.loaded_dbapi.Error
        self._ask = asking(dbapi, driver)
        self._omissions: str | None = None
        # Only now, because listeners of the application find the connection as on a plain engine.
        driver.end_transaction(dbapi)
        driver.set_mode(dbapi, Mode.AUTOCOMMIT, True, False)
        self._server = gate.families.find(instance_id, self._ask)

    def ask(self) -> Server:
        """Ask the server for its state. Raises ProbeError."""
        try:
            said = self._server.probe(self._ask, asynchronous_commits=self._gate.asynchronous_commits)
            if said.role is Role.WRITER:
                self._gate.families.leading = self._server
                if self._omissions is None:
                    self._omissions = self._omitted()
                said = said._replace(unproven=self._omissions)
        except Unsuitable as error:
            raise ProbeError(str(error), Silence.REFUSED if error.passing else Silence.MISCONFIGURED) from None
        except self._error as error:
            raise probe_error(error, self._driver, self._server) from None
        self._gate.dialect = self._server.dialect(said.id)  # no unit comes to a server that was not probed
        return said

    def _omitted(self) -> str:
        """What the writer leaves out of its log; "" if it may not be asked."""
        try:
            return self._server.omissions(self._ask)
        except self._error as error:
            if traits(self._server.failure(self._driver.code(error), "", disconnected=False)).is_last_word:
                return ""
            raise

    def functions(self) -> frozenset[str]:
        """The user functions that do not write, according to the catalog. Raises ProbeError."""
        try:
            _, rows = self._ask(self._server.FUNCTIONS)
            return self._server.parse_functions(rows)
        except self._error as error:
            raise probe_error(error, self._driver, self._server) from None

    def prune(self) -> bool:
        """Remove old rows of the commit table. Return whether there may be more of them. Raises ProbeError."""
        try:
            removed = self._connection.exec_driver_sql(self._server.PRUNE).rowcount
            return bool(removed >= self._server.PRUNED)
        except exc.SQLAlchemyError as error:
            raise probe_error(error, self._driver, self._server) from None

    def cut(self) -> None:
        """Shut the socket, which wakes a thread that waits for an answer."""
        self.line.cut()

    def close(self) -> None:
        """Close; never raises."""
        with contextlib.suppress(Exception):
            self._connection.close()
        self.line.twin.close()


def _refuse_to_connect(*_: object) -> NoReturn:
    """Refuse to connect with the engine that stands for the whole cluster."""
    raise ConfigurationError(
        "this engine stands for the router's cluster and never connects: get_bind() may look at it, and return it. "
        "To connect, use router.connect() or session.connection()."
    )


def _with_connect_args(usual: Mapping[str, Any], options: Mapping[str, Any], driver: Driver) -> dict[str, Any]:
    arguments = {**usual, **options.get("connect_args", {}), **driver.ALWAYS}
    if not arguments.get(driver.ENCRYPTION, True):
        # An empty value asks for nothing, but would undo the encryption that the URL asks for.
        del arguments[driver.ENCRYPTION]
    return {**options, "connect_args": arguments}


def asking(dbapi: Any, driver: Driver) -> Query:
    """Make a function that asks on a driver's connection. It returns the answer to the last statement of a text."""

    def ask(sql: str) -> tuple[Sequence[str], Sequence[Sequence[Any]]]:
        with contextlib.closing(dbapi.cursor()) as cursor:
            cursor.execute(sql, **driver.ONCE)
            while cursor.nextset():
                pass
            return ([column[0] for column in cursor.description], cursor.fetchall()) if cursor.description else ((), ())

    return ask


def _alive(dialect: Any, dbapi: Any) -> bool:
    try:
        return bool(dialect.do_ping(dbapi))
    except dialect.loaded_dbapi.Error:
        return False
