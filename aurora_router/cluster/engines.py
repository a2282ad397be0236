"""The connections of a router, by instance.

SQLAlchemy's engine, pool and dialect are the connection layer. The router listens to their events, and wraps some functions.
"""

from __future__ import annotations

import contextlib
import math
import re
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn

from sqlalchemy import create_engine, event, exc, text
from sqlalchemy.engine import URL, Connection, Engine

from aurora_router.cluster.connect_errors import is_refused, probe_error
from aurora_router.cluster.connection_events import ConnectionContext
from aurora_router.cluster.connection_hooks import ConnectionHooks
from aurora_router.cluster.connection_modes import ConnectionModes
from aurora_router.cluster.error_classification import failure_of
from aurora_router.cluster.families import Families
from aurora_router.cluster.instance_pool import CONNECT_TIMEOUT, EngineConfig, InstancePool
from aurora_router.cluster.pooling import RouterPool
from aurora_router.cluster.probe_connection import Probe
from aurora_router.config.checks import get_pool_limits
from aurora_router.config.settings import Settings
from aurora_router.core import events
from aurora_router.core.failures import Failure, Phase, own_error
from aurora_router.core.instance import Instance, Role, ServerId
from aurora_router.core.probing import Reached
from aurora_router.core.redaction import hide
from aurora_router.drivers import Driver
from aurora_router.errors import ConfigurationError, WrongServer
from aurora_router.telemetry.listeners import EventDispatcher
from aurora_router.telemetry.stats import Counters, PoolUsage
from aurora_router.waiting import Local, Waiting


class Engines:
    """The engines of one router.

    allowed_servers: gives the servers that an instance may lead to at this moment, in its role.
    on_wrong_server: called with an instance that led to another server, and the reason.
    hooks: returns the hooks that the connections call. It is called when a pool is made, because the hooks need the engines.
    waiting: how units wait for their connections.
    dispatcher: publishes events of connections that were made or closed.
    counters: counts connections that were made, and units that waited for a pool.
    modes: check and switch the connections of all instances.
    stand_in: an engine that stands for the cluster if a session class chooses among several engines. It never connects.
    """

    def __init__(
        self,
        settings: Settings,
        allowed_servers: Callable[[str], frozenset[ServerId]],
        on_wrong_server: Callable[[str, str], None],
        families: Families,
        hooks: Callable[[], ConnectionHooks],
        waiting: Waiting,
        counters: Counters,
        dispatcher: EventDispatcher,
    ) -> None:
        target, of_readers = settings.target, settings.options_of_readers
        url, driver = target.url, target.driver
        self._settings = settings
        self._driver = driver
        self._families = families
        self._hooks = hooks
        self._counters = counters
        self._allowed_servers = allowed_servers
        self._on_wrong_server = on_wrong_server
        self._dispatcher = dispatcher
        ours = {"connect_timeout": CONNECT_TIMEOUT, **driver.CONNECT, **target.secrets}
        usual = {name: value for name, value in ours.items() if name not in url.query}
        options = _with_connect_args(usual, settings.options, driver)
        reader_options = options if of_readers is None else _with_connect_args(usual, of_readers, driver)
        self.stand_in = self._engine_with("engine_options", url, options)
        event.listen(self.stand_in, "do_connect", _refuse_to_connect)
        dialect: Any = self.stand_in.dialect
        if of_readers is not None:
            self._engine_with("reader_options", url, reader_options)
        self.driver_error: type[Exception] = dialect.loaded_dbapi.Error
        self.modes = ConnectionModes(driver, dialect)
        self._engine_config = EngineConfig(options, reader_options, waiting)
        self._untold: Local[list[events.Event]] = waiting.local()  # events that this thread tells later
        self._lock = threading.Lock()
        self._pools: dict[str, InstancePool] = {}
        self._is_closed = False

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

    @property
    def _shared(self) -> ConnectionContext:
        return ConnectionContext(
            settings=self._settings,
            driver=self._driver,
            modes=self.modes,
            hooks=self._hooks(),
            families=self._families,
            allowed_servers=self._allowed_servers,
            on_wrong_server=self._on_wrong_server,
            counters=self._counters,
            dispatcher=self._dispatcher,
            tell_closed=self._tell_closed,
        )

    def pool(self, instance: Instance) -> InstancePool:
        """Return the connections to an instance."""
        pool = self._pools.get(instance.id)
        if pool is None:
            with self._lock:
                pool = self._pools.setdefault(
                    instance.id, InstancePool(instance, self._engine_config, self._shared, is_closed=self._is_closed)
                )
        return pool

    def engine(self, instance: Instance) -> Engine:
        """Return the engine that connects to this instance in its role, made at first use."""
        return (self._pools.get(instance.id) or self.pool(instance)).engine(instance.role)

    def owns(self, engine: Engine) -> bool:
        """Return whether this is the engine of an instance."""
        return any(pool.owns(engine) for pool in [*self._pools.values()])

    def in_use(self, instance_id: str) -> int:
        """Return how many connections of this instance are checked out of the pool for reads."""
        pool = self._pools.get(instance_id)
        return pool.reads_in_use() if pool is not None else 0

    @contextlib.contextmanager
    def telling_later(self) -> Iterator[list[events.Event]]:
        """Collect the events of connections that this thread closes meanwhile. The thread must not wait for listeners."""
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
        """Count the connections of an instance at this moment, in the pools of both roles."""
        options = self._engine_config.reader_options if instance.role is Role.READER else self._engine_config.options
        limit, _ = get_pool_limits(options)
        return self.pool(instance).usage(None if math.isinf(limit) else int(limit))

    def evict(self, instance_id: str, *, shut_down_before: float | None = None) -> int:
        """Close the idle connections of an instance at once, and those in use when they come back.

        shut_down_before: seconds, monotonic. Connections that were made before it are shut down now.
        Returns how many sockets were shut down.
        """
        pool = self._pools.get(instance_id)
        return pool.evict(shut_down_before=shut_down_before) if pool is not None else 0

    def leave_role(self, was: Instance) -> None:
        """Close the pooled connections for the former role of an instance, if each role has its own connections."""
        pool = self._pools.get(was.id)
        if pool is not None:
            pool.leave_role(was.role)

    def keep(self, instances: Mapping[str, object]) -> None:
        """Forget all instances except these. An instance with an open connection stays, because a unit may be there."""
        with self._lock:
            for gone in self._pools.keys() - instances.keys():
                if self._pools[gone].is_unused:
                    del self._pools[gone]

    def close(self) -> None:
        """Close every pooled connection, and those in use when they come back."""
        with self._lock:
            self._is_closed = True
            pools = [*self._pools.values()]
        for pool in pools:
            pool.close()

    def forked(self) -> None:
        """In a forked child, begin without connections. The parent's connections stay open, and nothing is sent on them."""
        self._lock = threading.Lock()
        dead, other = socket.socketpair()
        other.close()
        with dead:
            for pool in self._pools.values():
                pool.forked(dead)

    def forget_prepared(self, instance_id: str) -> None:
        """Have each pooled connection to an instance drop its prepared statements at its next checkout."""
        pool = self._pools.get(instance_id)
        if pool is not None:
            pool.forget_prepared()

    def unpooled_connection(self, instance: Instance) -> Connection:
        """Make a connection that is in no pool. It is shut down with the others when the instance is lost."""
        return self.pool(instance).unpooled_connection()

    # -- the monitor's connections --------------------------------------------------------------------------------

    def probe(self, instance: Instance) -> Probe:
        """Make a connection for the monitor. Raises ProbeError."""
        return self.pool(instance).probe()

    def shut_down_probes(self, instance_id: str) -> None:
        """End the probes that are connecting to an instance."""
        pool = self._pools.get(instance_id)
        if pool is not None:
            pool.shut_down_probes()

    def reached(self, instance_id: str) -> Reached:
        """Return what the probes of an instance have reached."""
        pool = self._pools.get(instance_id)
        return Reached(False, False) if pool is None else pool.reached

    @property
    def password_error(self) -> BaseException | None:
        """The error of the user's password function in the last probe of an instance; None if there is none."""
        return next((error for pool in [*self._pools.values()] if (error := pool.password_error) is not None), None)

    # -- errors of connecting -------------------------------------------------------------------------------------

    def failure(self, error: BaseException, phase: Phase) -> Failure:
        """Return the kind of failure that an exception from SQLAlchemy or the driver stands for."""
        if isinstance(error, WrongServer):
            return own_error(error).failure
        if isinstance(error, exc.DBAPIError):
            return failure_of(error.orig, self._families.leading, disconnected=error.connection_invalidated, phase=phase)
        return failure_of(error, self._families.leading, disconnected=True, phase=phase)

    def connect_argument_error(self, error: Exception) -> ConfigurationError | None:
        """Return the error to raise in place of the driver's if an option cannot be used; None for other errors.

        The driver's error may repeat the option's value. The value may be a password in the wrong place.
        """
        original: Any = getattr(error, "orig", None) or error
        if re.search(self._driver.UNUSABLE, str(original)) or self._driver.code(original) in self._families.leading.UNUSABLE:
            return ConfigurationError(self.explain(error))
        return None

    def explain(self, error: Exception) -> str:
        """Return an error of connecting as one line for the user."""
        return str(probe_error(error, self._driver, self._families.leading))


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
