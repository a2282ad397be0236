"""One SQLAlchemy Engine per instance: what a new connection must prove, what a pooled one must still be, and cutting.

SQLAlchemy's engine, pool and dialect are the connection layer; this module only listens to their events.
"""

from __future__ import annotations

import contextlib
import logging
import os
import random
import re
import select
import socket
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from sqlalchemy import create_engine, event, exc
from sqlalchemy.engine import URL, Connection, Engine, ExceptionContext
from sqlalchemy.pool import ConnectionPoolEntry, NullPool, Pool, PoolProxiedConnection, QueuePool
from sqlalchemy.pool.base import _ConnectionRecord

from aurora_router.core.failures import Failure, Phase
from aurora_router.core.pacing import pause
from aurora_router.core.topology import Instance, Role, Server, ServerId, Silence
from aurora_router.diagnosis import driver_failure
from aurora_router.errors import ConfigurationError, WrongServer
from aurora_router.limits import Places
from aurora_router.monitor import ProbeError
from aurora_router.servers import Ask, Family, Mode, Unsuitable

log = logging.getLogger("aurora_router")

SERVER = "aurora_router_server"
MODE = "aurora_router_mode"
GUARDED = "aurora_router_guarded"
AUTOCOMMIT = "aurora_router_autocommit"
POLL = "aurora_router_poll"
POOL = "aurora_router_pool"
ENTERED = "aurora_router_entered"
UNIT = "aurora_router_unit"
"""Keys of a pooled connection's `info`."""

CONNECT_TIMEOUT = 3  # seconds; a server that is frozen answers no handshake
FRESH = 0.01  # seconds for which a connection that was found alive is not looked at again
_PROBE_OPTIONS = ("connect_args", "creator", "module", "paramstyle", "client_encoding")


class Gatekeeper(Protocol):
    """What looks at everything that passes between SQLAlchemy and the driver: see gate.Gate."""

    @property
    def asynchronous_commits(self) -> bool: ...

    def statement(self, cursor: Any, text: str, /, *rest: Any) -> None: ...

    def failed(self, context: ExceptionContext, /) -> BaseException | None: ...

    def commit(self, raw: PoolProxiedConnection, send: Callable[[Any], None], /) -> None: ...

    def commit_in_two_phases(self, connection: Connection, send: Callable[[], None], /) -> None: ...

    def returned(self, unit: Any, /) -> None: ...


class Engines:
    """The engines of one router.

    known: the servers that an instance may lead to at this moment, in the role it has. surprised: told of an instance that
    led to another. gate: what looks at statements, COMMITs and errors. connects_at_once: how many new connections to one
    instance may be under way. patience: seconds that one waits for its turn, at most.
    """

    def __init__(
        self,
        url: URL,
        server: Family,
        options: Mapping[str, Any],
        *,
        known: Callable[[str], frozenset[ServerId]],
        surprised: Callable[[str, str], None],
        gate: Gatekeeper,
        connects_at_once: int,
        patience: float,
    ) -> None:
        self._url = url
        self._server = server
        self._options = dict(options)
        ours = {"connect_timeout": CONNECT_TIMEOUT, **server.CONNECT}
        usual = {name: value for name, value in ours.items() if name not in url.query}
        self._options["connect_args"] = {**usual, **self._options.get("connect_args", {})}
        self._connects_at_once = connects_at_once
        self._patience = max(patience, CONNECT_TIMEOUT)
        self._dialect: Any = url.get_dialect()()
        try:
            self.driver_error: type[Exception] = self._dialect.import_dbapi().Error
        except ImportError:  # or it lacks a library of its own
            install = f"pip install 'aurora-router[{server.DIALECT}]'"  # the extra has the family's name
            raise ConfigurationError(f"{url.drivername} needs {server.DRIVER}: {install}") from None
        self._known = known
        self._surprised = surprised
        self._gate = gate
        self._lock = threading.Lock()
        self._engines: dict[str, Engine] = {}
        self._in_use: dict[str, Callable[[], int]] = {}
        self._probes: dict[str, Engine] = {}
        self._outside: dict[str, Engine] = {}
        self._closed = False
        self._connects: dict[str, Places] = {}
        self._lines: dict[str, weakref.WeakSet[_Line]] = {}  # held by their connections: none outlives its own
        self._proven: set[str] = set()  # instances to which a connection was made
        self._probing: weakref.WeakSet[Probe] = weakref.WeakSet()
        self._inherited: list[Pool] = []

    def engine(self, instance: Instance) -> Engine:
        """The engine that connects to this instance, made at first use."""
        engine = self._engines.get(instance.id)
        if engine is None:
            with self._lock:
                engine = self._engines.get(instance.id)
                if engine is None:
                    engine = self._engines[instance.id] = self._make(instance, self._options)
                    self._count(instance.id, engine)
        return engine

    def in_use(self, instance_id: str) -> int:
        """Connections of this instance that are checked out of its pool."""
        count = self._in_use.get(instance_id)
        return count() if count is not None else 0

    def _count(self, instance_id: str, engine: Engine) -> None:
        """Look the pool's counter up once, for a balancing strategy asks for it at each unit."""
        if isinstance(engine.pool, QueuePool):
            self._in_use[instance_id] = engine.pool.checkedout

    def discard(self, instance_id: str, *, cut_before: float | None = None) -> int:
        """Close the pooled connections of an instance at once; those in use end when they come back, or now where they were
        made before that time (monotonic seconds). Returns how many sockets were cut.
        """
        engine = self._engines.get(instance_id)
        if engine is not None:
            self._dispose(engine)
            self._count(instance_id, engine)
        sockets = 0
        if cut_before is not None:  # those outside of the pool, too, which may be all that there are
            # Last: who wakes comes back to a pool that takes no place from those who wait there.
            with self._lock:
                for line in self._lines.get(instance_id, ()):
                    if line.since < cut_before:
                        sockets += line.cut()
        if cut_before is not None and instance_id in self._connects:
            self._connects[instance_id].turn_away()
        return sockets

    def _dispose(self, engine: Engine) -> None:
        """Give an engine a new pool, and close what is idle in the old one at once, what is in use when it comes back.

        Who waits there for a connection gets the place of one that came back, and connects afresh.
        """
        old = engine.pool
        if isinstance(old, _Pool):
            old.over = True  # not a listener: to add one while another thread calls them is an error there
        engine.dispose(close=False)
        if isinstance(old, QueuePool) and old.checkedin():
            old.dispose()

    def close(self) -> None:
        """Close every pooled connection, and those in use when they come back."""
        self._closed = True
        with self._lock:
            engines = [*self._engines.values()]
            probes = [*self._probes.values()]
            self._probes.clear()
        for engine in engines:
            self._dispose(engine)
        for probe in probes:
            probe.dispose()

    def forked(self) -> None:
        """In a forked child: begin without connections. The parent's stay open and hear nothing from here.

        Their pools are kept, not emptied: psycopg never says goodbye on a connection of another process, and no more may we.
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
        self._probes.clear()
        self._outside.clear()
        for places in self._connects.values():
            places.forked()
        for place, engine in [*self._engines.items()]:
            self._inherited.append(engine.pool)
            if place in self._proven:
                engine.dispose(close=False)
                self._count(place, engine)
            else:  # another thread may have left SQLAlchemy's first look at the server half-done
                del self._engines[place]

    def sound(self, connection: PoolProxiedConnection, instance: Instance, now: float) -> bool:
        """Whether a connection that was just checked out leads to a server that stood behind the instance when it was chosen,
        and is alive as far as can be told for free."""
        info = connection.info
        if info[SERVER] not in instance.servers:
            return False
        if now - info[ENTERED] < FRESH:
            return True
        info[ENTERED] = now
        # Something to read on an idle connection is a closed socket, or a notice: only then is a ping worth it.
        return not info[POLL](0) or _alive(self._engines[instance.id], connection.driver_connection)

    def set_mode(self, connection: PoolProxiedConnection, mode: Mode, isolation: str | None = None) -> None:
        """Switch a connection that was just checked out; `isolation` is what SQLAlchemy has set on it for this unit already.

        Sends something only to a connection that was made to a reader and is to write, or the other way round: after a
        promotion in place.
        """
        info = connection.info
        driver: Any = connection.driver_connection
        if info.get(MODE) is mode and (mode is Mode.DEFAULT or self._server.autocommit(driver) is (mode is Mode.AUTOCOMMIT)):
            return
        info[MODE] = None  # unknown, should the switch fail half-way
        guard = mode is Mode.AUTOCOMMIT
        if mode is not Mode.READ_ONLY and info[GUARDED] is not guard:
            self._server.guard(driver, _asking(driver), guard)
            info[GUARDED] = guard
        lasts = self._server.set_mode(driver, mode, info[AUTOCOMMIT], info[GUARDED])
        if isolation is not None and mode is Mode.DEFAULT:
            self._dialect.set_isolation_level(driver, isolation)
        if lasts:
            info[MODE] = mode

    def failure(self, error: BaseException, phase: Phase) -> Failure:
        """What kind of failure an exception from SQLAlchemy or the driver stands for."""
        if isinstance(error, WrongServer):
            return Failure.CONNECT
        if isinstance(error, exc.DBAPIError):
            return driver_failure(error.orig, disconnected=error.connection_invalidated, phase=phase)
        if isinstance(error, self.driver_error):
            return driver_failure(error, disconnected=True, phase=phase)
        return Failure.OTHER

    def outside(self, instance: Instance) -> Connection:
        """A connection that is in no pool, made for this call; it is cut with the others when the instance is lost."""
        with self._lock:
            engine = self._outside.get(instance.id)
            if engine is None:
                options = {key: self._options[key] for key in _PROBE_OPTIONS if key in self._options}
                engine = self._outside[instance.id] = self._make(instance, {**options, "poolclass": NullPool})
        return engine.connect()

    # -- the monitor's connections --------------------------------------------------------------------------------

    def probe(self, instance: Instance) -> Probe:
        """A connection for the monitor, outside of the pool: a full pool must not blind it. Raises ProbeError."""
        try:
            engine = self._probing_engine(instance)
            connection = engine.connect()
        except exc.SQLAlchemyError as error:
            raise probe_error(error, self._server) from None
        except Exception as error:
            raise mistake(error, self._server) from None
        try:
            probe = Probe(connection, self._server, self._gate)
            self._probing.add(probe)
            return probe
        except (OSError, engine.dialect.loaded_dbapi.Error):
            connection.invalidate()
            connection.close()
            raise ProbeError("the connection was closed at once") from None

    def _probing_engine(self, instance: Instance) -> Engine:
        with self._lock:
            engine = self._probes.get(instance.id)
            if engine is None:
                options = {key: self._options[key] for key in _PROBE_OPTIONS if key in self._options}
                # libpq's shortest; the monitor's own deadline is what counts, this frees the thread
                options["connect_args"] = {**options.get("connect_args", {}), "connect_timeout": 2}
                engine = create_engine(self._at(instance), poolclass=NullPool, isolation_level="AUTOCOMMIT", **options)
                self._server.watch_connecting(engine.dialect, lambda _: contextlib.nullcontext())
                self._probes[instance.id] = engine
            return engine

    # -- one instance's engine ------------------------------------------------------------------------------------

    def _at(self, instance: Instance) -> URL:
        return self._url.set(host=instance.host, port=instance.port)

    def _make(self, instance: Instance, options: Mapping[str, Any]) -> Engine:
        engine = create_engine(self._at(instance), **{"poolclass": _Pool, **options})
        _tolerate_lost_rollbacks(engine)
        lines = self._lines.setdefault(instance.id, weakref.WeakSet())
        place = instance.id

        def watch(number: int) -> _Line:
            """Have discard() cut this socket. Raises WrongServer when it has been called already, and so will not."""
            line = _Line(number)
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

        self._server.watch_connecting(engine.dialect, connecting)
        _limit_connects(engine, self._connects.setdefault(instance.id, Places(self._connects_at_once)), self._patience)

        @event.listens_for(engine, "connect")
        def connected(dbapi: Any, record: Any) -> None:
            """Which server is this? It must be one that the topology knows here."""
            try:
                line = dbapi.aurora_router_line = watch(self._server.fileno(dbapi))
                usual = self._server.autocommit(dbapi)
                identity, role = self._server.greet(dbapi, _asking(dbapi))
                line.since = time.monotonic()
                if identity not in self._known(place):
                    raise WrongServer(place, "it reached a server that is not known there in this role")
                self._server.prepare(dbapi)
                record.info.update(
                    {
                        SERVER: identity,
                        AUTOCOMMIT: usual,
                        MODE: None if role is Role.READER else Mode.DEFAULT,
                        GUARDED: role is Role.READER,
                        POLL: _poll(line.twin),
                        ENTERED: float("-inf"),
                    }
                )
                line.info = record.info
                self._proven.add(place)
            except BaseException as error:
                closing(dbapi, None)
                with contextlib.suppress(self.driver_error):  # closed already
                    dbapi.close()
                if isinstance(error, Unsuitable):
                    error = WrongServer(place, str(error))
                if isinstance(error, WrongServer):
                    self._surprised(place, error.why)
                raise error from None

        @event.listens_for(engine, "close")
        def closing(dbapi: Any, _: Any) -> None:
            line: _Line | None = getattr(dbapi, "aurora_router_line", None)
            if line is not None:
                line.twin.close()

        @event.listens_for(engine, "close_detached")
        def closing_detached(dbapi: Any) -> None:
            closing(dbapi, None)

        # The dialect's events and not the connection's: one of those makes SQLAlchemy ask for all of them, 20 us a statement.
        for name in ("do_execute", "do_executemany", "do_execute_no_params"):
            event.listen(engine, name, self._gate.statement)
        event.listen(engine, "handle_error", self._gate.failed)
        _put_around_commits(engine, self._gate)

        @event.listens_for(engine, "detach")
        def given_back(_: Any, record: Any) -> None:
            unit = record.info.pop(UNIT, None)
            if unit is not None:
                self._gate.returned(unit)
            pool = getattr(record, POOL, None)
            if self._closed or (pool is not None and pool.over):
                record.invalidate()  # nobody will ask its pool for it

        @event.listens_for(engine, "checkin")
        def checked_in(dbapi: Any, record: Any) -> None:
            unit = record.info.get(UNIT)
            try:
                given_back(dbapi, record)
            except BaseException:  # of a signal handler, say: the pool will take it for returned already, and it would not be
                try:
                    if unit is not None:
                        self._gate.returned(unit)  # once more, for it would stay under way in its scopes
                finally:
                    if (pool := getattr(record, POOL, None)) is not None:
                        pool.take_back(record)
                raise

        return engine


class _Pool(QueuePool):
    """SQLAlchemy's pool, but that a place whose connection could not be made goes to the next who waits for one. SQLAlchemy's
    own wakes nobody then: with the writer dead, those who wait would wait until pool_timeout."""

    __module__ = QueuePool.__module__  # SQLAlchemy names a pool's logger after it

    over = False  # its engine has another one: what comes back is closed

    def _create_connection(self) -> ConnectionPoolEntry:
        record = _ConnectionRecord(self, connect=False)  # it connects when it is checked out; failing, it comes back as any other
        setattr(record, POOL, self)
        return record

    def take_back(self, record: ConnectionPoolEntry) -> None:
        """What follows a checkin, unless a listener of that raises."""
        self._return_conn(record)


class _Line:
    """The socket of a connection: the driver's number for it, and a twin, which another thread may shut at any time.

    info: of the pooled connection, once it is one. since: monotonic seconds; when the server behind it was last found to be one
    of the topology's, or just before.
    """

    def __init__(self, number: int) -> None:
        self.number = number
        self.since = time.monotonic()
        self.twin = socket.socket(fileno=os.dup(number))
        self.info: dict[Any, Any] | None = None

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError):  # a signal handler's exception may come before there is one
            self.twin.close()

    def cut(self) -> bool:
        """Shut the socket, which wakes the thread that waits for it; whether it was open."""
        try:
            self.twin.shutdown(socket.SHUT_RDWR)
        except OSError:
            return False
        return True

    def forsake(self, dead: socket.socket) -> None:
        """In a forked child: put a dead socket in place of the parent's, so that whatever is done with the connection here
        reaches nobody."""
        with contextlib.suppress(OSError):
            if os.path.sameopenfile(self.number, self.twin.fileno()):  # else the driver has closed it
                os.dup2(dead.fileno(), self.number, inheritable=False)
        self.twin.close()
        if self.info is not None:
            self.info.clear()


class Probe:
    """A connection of the monitor's own to one server."""

    def __init__(self, connection: Connection, server: Family, gate: Gatekeeper) -> None:
        self._connection = connection
        self._server = server
        self._gate = gate
        driver: Any = connection.connection.driver_connection
        self.line = _Line(server.fileno(driver))

    def ask(self) -> Server:
        """What the server says of itself. Raises ProbeError."""
        try:
            return self._server.probe(self._asked, asynchronous_commits=self._gate.asynchronous_commits)
        except Unsuitable as error:
            raise ProbeError(str(error), Silence.MISCONFIGURED) from None
        except exc.SQLAlchemyError as error:
            raise probe_error(error, self._server) from None

    def _asked(self, sql: str) -> tuple[Sequence[str], Sequence[Sequence[Any]]]:
        result = self._connection.exec_driver_sql(sql)
        return (list(result.keys()), result.all()) if result.returns_rows else ((), ())

    def functions(self) -> frozenset[str]:
        """The user functions that the catalog says do not write. Raises ProbeError."""
        try:
            rows = self._connection.exec_driver_sql(self._server.FUNCTIONS).all()
            return self._server.parse_functions(rows)
        except exc.SQLAlchemyError as error:
            raise probe_error(error, self._server) from None

    def prune(self) -> bool:
        """Remove old rows of the commit table; whether there may be more of them. Raises ProbeError."""
        try:
            removed = self._connection.exec_driver_sql(self._server.PRUNE).rowcount
            return bool(removed >= self._server.PRUNED)
        except exc.SQLAlchemyError as error:
            raise probe_error(error, self._server) from None

    def cut(self) -> None:
        """Shut the socket; wakes a thread that waits for an answer."""
        self.line.cut()

    def close(self) -> None:
        """Close; never raises."""
        with contextlib.suppress(Exception):
            self._connection.close()
        self.line.twin.close()


def probe_error(error: exc.SQLAlchemyError, server: Family) -> ProbeError:
    """The driver's error as one line for the user."""
    original: Any = getattr(error, "orig", None) or error
    code = server.code(original)
    text = " ".join(str(original).split())
    kind, words = server.explain_refusal(code, text)
    return ProbeError(words, kind, busy=server.is_busy(code, text))


def mistake(error: Exception, server: Family) -> ProbeError:
    """An error of connecting that is not the driver's own, as one line for the user: the driver was given what it cannot use."""
    said = type(error).__name__
    if not isinstance(error, UnicodeError):  # which shows parts of the password
        said += f": {' '.join(str(error).split())}"
    usual = "check the URL and its query, and connect_args"
    advice = next((advice for pattern, advice in server.MISTAKES if re.search(pattern, said)), usual)
    return ProbeError(f"{server.DRIVER} could not connect ({said}); {advice}", Silence.MISCONFIGURED)


def _asking(dbapi: Any) -> Ask:
    """Asks on a connection of the driver's."""

    def ask(sql: str) -> tuple[Sequence[str], Sequence[Sequence[Any]]]:
        with contextlib.closing(dbapi.cursor()) as cursor:
            cursor.execute(sql)
            return ([column[0] for column in cursor.description], cursor.fetchall()) if cursor.description else ((), ())

    return ask


def _tolerate_lost_rollbacks(engine: Engine) -> None:
    """Let a rollback that fails succeed, by closing its connection: then the server rolls back, and a unit that only read has
    nothing to be told. A connection that is gone fails so, and one whose last statement was interrupted by an exception out of
    a signal handler. It is replaced when it is next checked out."""
    dialect: Any = engine.dialect
    rollback = dialect.do_rollback

    def tolerant(connection: Any) -> None:
        try:
            rollback(connection)
        except dialect.loaded_dbapi.Error as error:
            try:
                connection.info[SERVER] = None
            except NotImplementedError:  # SQLAlchemy's first look at a server, on a connection of no pool: it has failed
                raise error from None
            with contextlib.suppress(dialect.loaded_dbapi.Error):  # closed already
                connection.driver_connection.close()

    dialect.do_rollback = tolerant


def _put_around_commits(engine: Engine, gate: Gatekeeper) -> None:
    """Have each COMMIT go through the gate, and both steps of one in two phases. The engine's own event comes before COMMIT only,
    and costs every statement."""
    dialect: Any = engine.dialect
    commit = dialect.do_commit

    def do_commit(connection: PoolProxiedConnection) -> None:
        gate.commit(connection, commit)

    def through_the_gate(step: Callable[..., None]) -> Callable[..., None]:
        def do(connection: Connection, *arguments: Any, **options: Any) -> None:
            gate.commit_in_two_phases(connection, lambda: step(connection, *arguments, **options))

        return do

    dialect.do_commit = do_commit
    dialect.do_prepare_twophase = through_the_gate(dialect.do_prepare_twophase)
    dialect.do_commit_twophase = through_the_gate(dialect.do_commit_twophase)


def _limit_connects(engine: Engine, places: Places, patience: float) -> None:
    """Let few connects be under way at once, and spread those that come in a crowd; who waits is turned away when one fails, for
    it would fare no better. It gets what a connect that fails gives. This stands around the driver's own connect: a connection
    that comes from the pool never waits."""
    dialect: Any = engine.dialect
    connect = dialect.connect

    def in_turn(*arguments: Any, **options: Any) -> Any:
        ahead = places.crowd
        if not places.take(patience):
            raise dialect.loaded_dbapi.OperationalError("waited in vain for a turn to connect")
        try:
            if ahead:
                time.sleep(pause(ahead, random.random()))
            return connect(*arguments, **options)
        except dialect.loaded_dbapi.Error:
            places.turn_away()
            raise
        finally:
            places.give_back()

    dialect.connect = in_turn


def _poll(twin: socket.socket) -> Callable[[int], list[Any]]:
    """A question that can be asked cheaply and often: what is there to read? The twin stays open as long as the record lives,
    so that its number is never another socket's."""
    if hasattr(select, "poll"):
        poll = select.poll()
        poll.register(twin, select.POLLIN)
        return poll.poll
    return lambda _: select.select([twin], [], [], 0)[0]


def _alive(engine: Engine, dbapi: Any) -> bool:
    try:
        return bool(engine.dialect.do_ping(dbapi))
    except engine.dialect.loaded_dbapi.Error:
        return False
