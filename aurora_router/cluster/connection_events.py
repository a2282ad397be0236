"""What happens to each connection of one engine: it is made, comes back to its pool, and is closed."""

from __future__ import annotations

import contextlib
import itertools
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

from sqlalchemy import event
from sqlalchemy.engine import Engine
from sqlalchemy.pool import ConnectionPoolEntry

from aurora_router.cluster.connect_errors import refusal
from aurora_router.cluster.connection_hooks import ConnectionHooks
from aurora_router.cluster.connection_modes import ConnectionModes
from aurora_router.cluster.connection_state import STATE, ConnectionState
from aurora_router.cluster.families import Families
from aurora_router.cluster.pooling import RouterPool
from aurora_router.cluster.sockets import TrackedSocket, poll_of, socket_of, track
from aurora_router.config.settings import Settings
from aurora_router.core import events
from aurora_router.core.instance import Role, ServerId
from aurora_router.drivers import Driver, Mode
from aurora_router.errors import WrongServer
from aurora_router.servers import UnsupportedServer
from aurora_router.telemetry.listeners import EventDispatcher
from aurora_router.telemetry.stats import Counters

_numbers = itertools.count(1)


class ConnectionContext(NamedTuple):
    """What the connections of a router share.

    allowed_servers: gives the servers that an instance may lead to at this moment, in its role.
    on_wrong_server: called with an instance that led to another server, and the reason.
    counters: counts connections that were made.
    dispatcher: publishes an event for each connection that was made.
    tell_closed: called with an event for each connection that was closed. It may publish the event later.
    """

    settings: Settings
    driver: Driver
    modes: ConnectionModes
    hooks: ConnectionHooks
    families: Families
    allowed_servers: Callable[[str], frozenset[ServerId]]
    on_wrong_server: Callable[[str, str], None]
    counters: Counters
    dispatcher: EventDispatcher
    tell_closed: Callable[[events.Event], None]


class OwningPool(Protocol):
    """The pool of an instance, which keeps its connections' sockets."""

    @property
    def id(self) -> str: ...

    @property
    def is_closed(self) -> bool: ...

    def add_socket(self, tracked: TrackedSocket, /) -> None:
        """Have a socket shut down when the instance is lost."""
        ...

    def note_connected(self, engine: Engine, *, is_shared: bool) -> None:
        """Note that an engine has connected, and whether a pooler shares its connections."""
        ...


class ConnectionEvents:
    """The listeners to the connections of one engine.

    options: the options that the engine was made with.
    owner: the pool of the instance.
    """

    def __init__(self, engine: Engine, options: Mapping[str, Any], owner: OwningPool, shared: ConnectionContext) -> None:
        self._engine = engine
        self._options = options
        self._owner = owner
        self._shared = shared
        self._driver = shared.driver
        self._error: type[Exception] = engine.dialect.loaded_dbapi.Error
        self._names = {*engine.url.query, *options.get("connect_args", {})}
        self._own_connects = self._own_checkins = 0  # how many of the pool's listeners are the router's

    def listen(self) -> None:
        """Listen from now on. The application's listeners must come later."""
        engine, pool = self._engine, self._engine.pool
        self._driver.track_connecting_socket(engine.dialect, self._connecting)
        event.listen(engine, "connect", self._made, insert=True)
        event.listen(engine, "connect", self._connected)
        event.listen(engine, "close", self._closing)
        event.listen(engine, "close_detached", self._closing)
        event.listen(engine, "detach", self._detached)
        if isinstance(pool, RouterPool):
            pool.checked_in = self._came_back
        else:
            event.listen(engine, "checkin", lambda _, record: self._came_back(record, False))
        self._own_connects, self._own_checkins = len(pool.dispatch.connect), len(pool.dispatch.checkin)

    @contextlib.contextmanager
    def _connecting(self, number: int) -> Iterator[None]:
        """Have the socket shut down with the others while the driver connects."""
        tracked = self._watch(number)
        try:
            yield
        finally:
            tracked.duplicate.close()

    def _watch(self, number: int) -> TrackedSocket:
        """Have a socket shut down when the instance is lost.

        Raises WrongServer if the instance is lost already, because the shutdown of its sockets may have missed this one.
        """
        tracked = TrackedSocket(number)
        self._owner.add_socket(tracked)
        if not self._shared.allowed_servers(self._owner.id):
            raise WrongServer(self._owner.id, "a server that may be used is not known there")
        return tracked

    def _made(self, dbapi: Any, _: Any) -> None:
        """Track the socket during SQLAlchemy's first look at a server, which comes before _connected().

        If the instance is lost meanwhile, a thread that hangs there wakes.
        """
        with contextlib.suppress(OSError, self._error):  # closed already, as _connected() will find
            tracked = TrackedSocket(self._driver.fileno(dbapi))
            track(dbapi, tracked)
            self._owner.add_socket(tracked)

    def _connected(self, dbapi: Any, record: Any) -> None:
        """Find out which server a new connection has reached, and close it unless the topology knows that server here."""
        place = self._owner.id
        try:
            tracked = self._watch(self._driver.fileno(dbapi))
            track(dbapi, tracked)
            state = record.info[STATE] = self._identify(dbapi, tracked)
            tracked.is_of(state)
            self._shared.counters.connects[place] += 1
            if self._shared.dispatcher.listeners:
                state.number = number = next(_numbers)
                tracked.tell_closed = weakref.finalize(dbapi, _tell_closed, weakref.ref(self), number, tracked.since)
                tracked.tell_closed.atexit = False
                took = time.time() - record.starttime
                self._shared.dispatcher.publish(events.ConnectionCreated(place, took, connection=number))
        except BaseException as error:
            self._closing(dbapi)
            with contextlib.suppress(self._error):  # closed already
                dbapi.close()
            if isinstance(error, UnsupportedServer):
                error = WrongServer(place, str(error))
            elif isinstance(error, Exception):
                error = refusal(error, self._driver, self._options.values(), self._options) or error
            if isinstance(error, WrongServer):
                self._shared.on_wrong_server(place, error.why)
            raise error from None

    def _identify(self, dbapi: Any, tracked: TrackedSocket) -> ConnectionState:
        """Ask a server who it is, and prepare the connection to it. Raises WrongServer."""
        driver, place = self._driver, self._owner.id
        driver.end_transaction(dbapi)
        default_autocommit = driver.autocommit(dbapi)
        family = self._shared.families.at(place)
        with driver.alone(dbapi):
            identified = family.identify(self._shared.modes.ask_on(dbapi), driver.process_id(dbapi), self._shared.settings.pooler)
        driver.note_default_read_only(dbapi, identified.default_read_only)
        tracked.since = time.monotonic()
        if identified.server not in self._shared.allowed_servers(place):
            raise WrongServer(place, "it reached a server that is not known there in this role")
        driver.prepare_connection(dbapi, identified.shared, self._names, self._is_listened_to, family)
        self._owner.note_connected(self._engine, is_shared=identified.shared)
        return ConnectionState(
            identified.server,
            family,
            driver,
            poll_of(tracked),
            mode=None if identified.role is Role.READER else Mode.DEFAULT,
            default_autocommit=default_autocommit,
            default_read_only=identified.default_read_only,
            # The application's listeners come after this one.
            is_handed_out=len(self._engine.pool.dispatch.connect) > self._own_connects,
            is_shared=identified.shared,
        )

    def _is_listened_to(self) -> bool:
        """Whether listeners of the application may use a connection between two units."""
        on = self._engine.pool.dispatch
        return bool(on.checkout or on.reset or len(on.checkin) > self._own_checkins or self._engine.dispatch.engine_connect)

    def _came_back(self, record: ConnectionPoolEntry, retired: bool) -> None:
        """Make a released connection ready for the next unit, or close it. May be called twice.

        retired: whether its pool was replaced.
        """
        state: ConnectionState | None = record.info.get(STATE)
        if state is None or state.is_inherited:
            return
        dbapi = record.dbapi_connection
        if dbapi is not None and self._driver.has_leftovers(dbapi):
            self._shared.modes.remove_leftovers(dbapi, record)
        spoilt = state.unit is not None and self._shared.hooks.on_release(state, self._owner.id)
        state.unit = None
        if spoilt or retired or self._owner.is_closed:
            record.invalidate()  # no unit may check it out again
        elif dbapi is not None and state.mode is not Mode.DEFAULT and self._is_listened_to():
            self._shared.modes.make_as_new(dbapi, record)

    def _detached(self, _: Any, record: ConnectionPoolEntry) -> None:
        """Note that a unit has ended. Its connection goes on without a pool, and keeps its ConnectionState."""
        state: ConnectionState | None = record.info.pop(STATE, None)
        if state is not None and state.unit is not None:
            self._shared.hooks.on_release(state, self._owner.id)

    def _closing(self, dbapi: Any, _: Any = None) -> None:
        tracked = socket_of(dbapi)
        if tracked is None:
            return
        tracked.duplicate.close()
        if tracked.tell_closed is not None:
            tracked.tell_closed()

    def tell_closed(self, number: int, since: float) -> None:
        """Publish that a connection is closed.

        number: of the connection.
        since: when it was made; seconds, monotonic.
        """
        took, at = time.monotonic() - since, time.time()
        self._shared.tell_closed(events.ConnectionClosed(self._owner.id, took, connection=number, at=at))


def _tell_closed(engine_events: weakref.ref[ConnectionEvents], number: int, since: float) -> None:
    """Publish that a connection is closed, or that nobody has it any more.

    SQLAlchemy has no event for some ends: if a listener of the application to its beginning has raised an error, and if it was
    detached from its pool and then dropped or invalidated.

    engine_events: of its engine. A strong reference would keep the connection, because the engine has its pool.
    """
    known = engine_events()
    if known is not None:
        known.tell_closed(number, since)
