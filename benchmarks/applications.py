"""Applications that append rows to one cluster, each in its own way and in a process of its own.

An application that hangs holds up no other and can be ended. Each thread makes a unit that reads, and a unit that inserts a row
with a key of its own. It does so over and over, with a pause of 20 ms, and reports which keys were acknowledged. After an error
it goes on with a new key. Times are those of `time.monotonic()`, which all processes of a machine share.

  router      run_transaction, default settings

On PostgreSQL:
  libpq       psycopg with a list of hosts and target_session_attrs=read-write; a new connection after each error
  SQLAlchemy  an engine with the same list of hosts and pool_pre_ping
  wrapper     aws-advanced-python-wrapper on psycopg, as its documentation shows. FailoverSuccessError and
              TransactionResolutionUnknownError say that the connection leads to the new writer by now. The application goes on
              with that connection at once, without the pause. It runs with the default plugins and settings, and the
              connect_timeout of 10 s of the examples (without one it still hung after 50 s). It also runs tuned: see TUNED.

libpq and SQLAlchemy know only what TCP reports. So they get all that TCP can do for them: short timeouts for connecting,
keepalives, tcp_user_timeout.

On MariaDB and MySQL (PyMySQL knows no lists of hosts):
  SQLAlchemy  an engine with pool_pre_ping and a name that leads to the writer, after a promotion at once to the new one. It
              runs with PyMySQL's default settings. It also runs tuned, with short timeouts for connecting and for each answer
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import logging
import multiprocessing
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

import psycopg
from aurora_functions import CLUSTER_NAME, NameService
from sqlalchemy import URL, Engine, create_engine, event, make_url, text
from sqlalchemy.orm import Session, sessionmaker

from aurora_router import Router, RoutingSession
from aurora_router.core.events import Routed
from aurora_router.core.selection import Reason

THREADS = 2  # of each application
PAUSE = 0.02  # seconds after an error, and between a thread's units

READ = "SELECT id FROM entry WHERE id = "
APPEND = "INSERT INTO entry VALUES "

# libpq's shortest connect_timeout is 2 s
IMPATIENT: dict[str, Any] = {
    "connect_timeout": 2,
    "keepalives_idle": 1,
    "keepalives_interval": 1,
    "keepalives_count": 2,
    "tcp_user_timeout": 2000,
}

# These are the quickest settings that were found. socket_timeout finds a frozen writer first. It also ends each statement that
# takes longer on a healthy writer.
TUNED: dict[str, Any] = {
    "connect_timeout": 2,
    "socket_timeout": 1,
    "failure_detection_time_ms": 0,
    "failure_detection_interval_ms": 500,
    "failure_detection_count": 2,
    "cluster_topology_high_refresh_rate_ms": 50,
    "tcp_keepalive": 1,
    "tcp_keepalive_time": 1,
    "tcp_keepalive_interval": 1,
    "tcp_keepalive_probes": 2,
    "tcp_user_timeout": 2000,
}

# Each statement that takes longer fails, also on a healthy writer.
PYMYSQL_TUNED: dict[str, Any] = {"connect_timeout": 2, "read_timeout": 1, "write_timeout": 1}

ROUTER, LIBPQ, SQLALCHEMY, WRAPPER, WRAPPER_TUNED = "router", "libpq", "SQLAlchemy", "wrapper", "wrapper, tuned"
SQLALCHEMY_TUNED = "SQLAlchemy, tuned"
COMPETITORS = {
    "postgresql": (LIBPQ, SQLALCHEMY, WRAPPER, WRAPPER_TUNED),
    "mariadb": (SQLALCHEMY, SQLALCHEMY_TUNED),
    "mysql": (SQLALCHEMY, SQLALCHEMY_TUNED),
}
WRAPPER_MODULE = "aws_advanced_python_wrapper"

Append = Callable[[str], None]
Again = tuple[type[Exception], ...]  # errors after which a retry needs no pause


@dataclass(frozen=True)
class Place:
    """The addresses of the cluster.

    hosts: the instances' addresses
    names: the names that Aurora would give the instances, with their addresses
    """

    url: str
    hosts: tuple[str, ...]
    names: dict[str, str]

    @property
    def parsed(self) -> URL:
        return make_url(self.url)

    @property
    def login(self) -> dict[str, Any]:
        """psycopg's arguments, without the host."""
        url = self.parsed
        return {"port": url.port, "dbname": url.database, "user": url.username, "password": url.password}


@dataclass(frozen=True)
class Acknowledged:
    """A row whose COMMIT was acknowledged.

    thread: the number of the thread that wrote it
    at: the moment of the acknowledgement (seconds, monotonic)
    """

    key: str
    thread: int
    at: float


# -- in the process that started it -----------------------------------------------------------------------------------


@dataclass
class Application:
    """An application and its reports.

    entered: moments (seconds, monotonic) at which a unit that had waited for a writer got its connection, with the instance
    """

    name: str
    done: list[Acknowledged] = field(default_factory=list)
    errors: list[tuple[float, str]] = field(default_factory=list)
    entered: list[tuple[float, str]] = field(default_factory=list)

    def start(self, place: Place) -> None:
        """Start its process. Earlier reports are kept."""
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_run, args=(self.name, place, theirs), name=self.name, daemon=True)
        self._process.start()
        theirs.close()
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    def _listen(self) -> None:
        with contextlib.suppress(EOFError, OSError):
            while True:
                kind, *told = self._connection.recv()
                if kind == "done":
                    self.done.append(Acknowledged(*told))
                else:
                    (self.errors if kind == "error" else self.entered).append((told[0], told[1]))

    def new_writer(self, host: str) -> None:
        """Let the cluster's name lead to that host."""
        self._connection.send(host)

    def stop(self) -> None:
        """End its process at once, in the middle of its work. All reports that it has sent by then are taken in."""
        self._process.kill()
        self._process.join()
        self._listener.join()
        self._connection.close()

    def first_after(self, moment: float) -> float | None:
        """Return the moment of the first acknowledgement after `moment`; None if there is none."""
        return min((row.at for row in list(self.done) if row.at > moment), default=None)

    def all_after(self, moment: float) -> float | None:
        """Return the moment by which each thread had a row acknowledged after `moment`; None if one has none."""
        firsts = {row.thread: row.at for row in reversed(list(self.done)) if row.at > moment}
        return max(firsts.values()) if len(firsts) == THREADS else None

    def last_before(self, moment: float) -> float:
        """Return the moment of the last acknowledgement before `moment`."""
        return max(row.at for row in list(self.done) if row.at <= moment)


# -- in its own -------------------------------------------------------------------------------------------------------


def _run(name: str, place: Place, connection: Connection) -> None:
    lock = threading.Lock()

    def tell(*what: object) -> None:
        with lock:
            connection.send(what)

    url = place.parsed
    names = NameService(place.names, str(url.host))
    by_name = url.get_driver_name() == "pymysql"
    makers: dict[str, Callable[[], tuple[Append, Again]]] = {
        ROUTER: lambda: (_router(place, tell), ()),
        LIBPQ: lambda: (_connections(lambda: _libpq(place), ()), ()),
        SQLALCHEMY: lambda: (_sqlalchemy(_by_name(place, names, {}) if by_name else _by_list(place)), ()),
        SQLALCHEMY_TUNED: lambda: (_sqlalchemy(_by_name(place, names, PYMYSQL_TUNED)), ()),
        WRAPPER: lambda: _wrapper(place, names, {"connect_timeout": 10}),
        WRAPPER_TUNED: lambda: _wrapper(place, names, TUNED),
    }
    append, again = makers[name]()
    run = time.monotonic_ns()

    def work(number: int) -> None:
        for turn in itertools.count():
            key = f"{name}-{run}-{number}-{turn}"
            try:
                append(key)
            except Exception as error:
                tell("error", time.monotonic(), f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}")
                if isinstance(error, again):
                    continue
            else:
                tell("done", key, number, time.monotonic())
            time.sleep(PAUSE)

    for number in range(THREADS):
        threading.Thread(target=work, args=(number,), daemon=True).start()
    with contextlib.suppress(EOFError):
        while True:
            names.writer = connection.recv()


def _router(place: Place, tell: Callable[..., None]) -> Append:
    def heard(event: object) -> None:
        if isinstance(event, Routed) and event.reason is Reason.NO_WRITER:  # a unit that waited
            tell("entered", time.monotonic(), event.instance)

    url = place.parsed
    instances = [f"{host}:{url.port}" for host in place.hosts]
    router = Router(url, instances=instances, listeners=[heard])
    sessions = sessionmaker(class_=RoutingSession, router=router)
    read, insert = text(f"{READ}:key"), text(f"{APPEND}(:key)")

    def append(key: str) -> None:
        router.run_transaction(sessions, lambda session: session.execute(read, {"key": key}).all())
        router.run_transaction(sessions, lambda session: session.execute(insert, {"key": key}))

    return append


def _by_list(place: Place) -> Engine:
    url = place.parsed.set(host=None, port=None)
    hosts = tuple(f"{host}:{place.parsed.port}" for host in place.hosts)
    url = url.update_query_dict({"host": hosts, "target_session_attrs": "read-write"})
    return create_engine(url, pool_pre_ping=True, connect_args=IMPATIENT)


def _by_name(place: Place, names: NameService, settings: dict[str, Any]) -> Engine:
    engine = create_engine(place.url, pool_pre_ping=True, connect_args=settings)

    @event.listens_for(engine, "do_connect")
    def resolve(_: object, __: object, ___: object, options: dict[str, Any]) -> None:
        options["host"] = names.resolve(CLUSTER_NAME)

    return engine


def _sqlalchemy(engine: Engine) -> Append:
    read, insert = text(f"{READ}:key"), text(f"{APPEND}(:key)")

    def append(key: str) -> None:
        with Session(engine) as session:
            session.execute(read, {"key": key}).all()
        with Session(engine) as session:
            session.execute(insert, {"key": key})
            session.commit()

    return append


def _libpq(place: Place) -> psycopg.Connection[Any]:
    return psycopg.connect(host=",".join(place.hosts), target_session_attrs="read-write", **place.login, **IMPATIENT)


def _wrapper(place: Place, names: NameService, settings: dict[str, Any]) -> tuple[Append, Again]:
    wrapper: Any = importlib.import_module(WRAPPER_MODULE)
    errors: Any = importlib.import_module(f"{WRAPPER_MODULE}.errors")
    logging.getLogger(WRAPPER_MODULE).setLevel(logging.CRITICAL)  # it also logs each error that it raises
    names.take_over()

    def connect() -> Any:
        return wrapper.AwsWrapperConnection.connect(
            names.connect,
            host=CLUSTER_NAME,
            wrapper_dialect="aurora-pg",
            wrapper_driver_dialect="psycopg",
            **place.login,
            **settings,
        )

    again = (errors.FailoverSuccessError, errors.TransactionResolutionUnknownError)
    return _connections(connect, again), again


def _connections(connect: Callable[[], Any], again: Again) -> Append:
    """Append over one driver connection per thread. An error replaces the connection, unless the error is one of `again`."""
    own = threading.local()

    def append(key: str) -> None:
        if getattr(own, "connection", None) is None:
            own.connection = connect()
        try:
            cursor = own.connection.cursor()
            cursor.execute(f"{READ}%s", (key,))
            cursor.fetchall()
            own.connection.commit()
            cursor.execute(f"{APPEND}(%s)", (key,))
            own.connection.commit()
        except again:
            raise
        except Exception:
            connection, own.connection = own.connection, None
            with contextlib.suppress(Exception):
                connection.close()
            raise

    return append
