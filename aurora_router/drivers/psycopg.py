"""psycopg: how it connects, how its errors read, and its connection's switches."""

from __future__ import annotations

import contextlib
import os
import re
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Set
from contextlib import AbstractContextManager
from typing import Any, Final

from aurora_router.core.failures import Failure
from aurora_router.core.incidents import Incidents
from aurora_router.core.query import Query
from aurora_router.drivers.base import Mode
from aurora_router.drivers.notes import ConnectionNotes, has_notes, keep_notes, notes_of

NAME = "psycopg"
PROTOCOL = "postgresql"
DIALECTS = ("postgresql",)
EXAMPLE = "postgresql+psycopg://user:password@host:5432/database"
DEFAULT_PORT = 5432
ENCRYPTION = "sslmode"
ONCE: Final[Mapping[str, Any]] = {"prepare": False}
CONNECT: Final[Mapping[str, Any]] = {"keepalives_idle": 10, "keepalives_interval": 5, "tcp_user_timeout": 25000}
"""Seconds, seconds, milliseconds. Only the kernel notices a peer that vanishes silently (a host without power, a forgetful
firewall). A server that is busy with a slow statement still answers the kernel."""
ALWAYS: Final[Mapping[str, Any]] = {"target_session_attrs": "any"}
"""The router chooses the instance itself. An explicit argument overrides the environment and a service."""
BARE: Final[Mapping[str, Any]] = {"use_native_hstore": False}
"""Otherwise SQLAlchemy would let psycopg look up the type hstore by a name that the search_path resolves."""
ROLLS_ALL_BACK = True


def options() -> Set[str]:
    """Return the names of the options that a URL's query may have; none if the driver is not installed."""
    try:
        from psycopg import pq
    except ImportError:
        return frozenset()
    return {option.keyword.decode() for option in pq.Conninfo.get_defaults()}


def encrypted(query: dict[str, Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the query of a URL, with encryption added unless the user has set it, even in the environment or a service.

    With the system's certificates libpq verifies the server by itself, and rejects an sslmode that asks for less.
    """
    from psycopg import pq

    said = {
        option.keyword.decode(): option.val.decode()
        for option in pq.Conninfo.get_defaults()
        if option.val and (option.val != option.compiled or (option.envvar or b"").decode() in os.environ)
    }
    given = {**query, **arguments}
    if service := given.get("service"):
        said |= _of_service(str(service), given.get("servicefile"))
    said |= given
    return query if said.get("sslmode") or said.get("sslrootcert") == "system" else {**query, "sslmode": "require"}


def fixed_address(options: Mapping[str, Any], arguments: Mapping[str, Any]) -> str:
    """Return the setting that leads every connection to one server; "" if there is none.

    A hostaddr overrides the host, even if libpq takes it from the environment or a service.
    """
    from psycopg import pq

    for name in ("host", "port"):
        if arguments.get(name):
            return f"{name} in connect_args"
    given = {**options, **arguments}
    if given.get("hostaddr"):
        return "hostaddr"
    if (service := given.get("service")) and _of_service(str(service), given.get("servicefile")).get("hostaddr"):
        return "the hostaddr of the service"
    if any(option.keyword == b"hostaddr" and option.val for option in pq.Conninfo.get_defaults()):
        return "PGHOSTADDR, or a service, in the environment"
    return ""


def _of_service(service: str, file: str | None) -> dict[str, str]:
    """The settings of a service, read from the files that libpq reads."""
    import configparser  # few users have such a file

    read = configparser.RawConfigParser(strict=False)
    own = file or os.environ.get("PGSERVICEFILE") or os.path.expanduser("~/.pg_service.conf")
    for path in (own, os.path.join(os.environ.get("PGSYSCONFDIR", ""), "pg_service.conf")):
        with contextlib.suppress(configparser.Error, TypeError, ValueError):  # libpq will report it
            read.read(path)
        if read.has_section(service):
            return dict(read[service])
    return {}


def code(error: BaseException | None) -> str | None:
    """Return the SQLSTATE of a driver's error; None if the driver made the error itself."""
    sqlstate: str | None = getattr(error, "sqlstate", None)
    if sqlstate is None and error is not None and is_from_connecting(error):
        return _code_of_connecting(error)
    return sqlstate


def words(error: BaseException) -> str:
    """Return the error's message, which may be in any language, and the name of the server's function that raised it."""
    function = getattr(getattr(error, "diag", None), "source_function", None)
    return f"{error} ({function})" if function else str(error)


_SOCKET_CLOSED = "connection socket closed"
"""psycopg's own message for a reset that it notices while it waits for the socket, before it reads. The connection does not
report itself as broken then."""
_OWN_NAME = "_pg3_"
"""The prefix of the names that psycopg gives to prepared statements."""


def own_failure(sqlstate: str | None, message: str) -> Failure | None:
    """Return the kind of failure if only psycopg knows it; None if the SQLSTATE, or the connection's end, decides.

    26000 and 42P05 occur behind a pooler, which changes the server's side of a connection.
    """
    if sqlstate in ("26000", "42P05") and _OWN_NAME in message:
        return Failure.OUTDATED
    return Failure.LOST if sqlstate is None and message == _SOCKET_CLOSED else None


_SAID = (
    ("57P03", r"starting up|shutting down|in recovery mode|not (yet )?accepting connections"),
    ("57P01", "terminating connection"),
    ("53300", r"too many (clients|connections)|connection slots are reserved|no more connections allowed"),
    ("28P01", r"authentication failed|no password supplied|has no credentials for"),
    ("28000", r'role "[^"]*" (does not exist|is not permitted to log in)|no such user'),
    ("28000", r"pg_hba\.conf"),
    ("3D000", r'database "[^"]*" does not exist|no such database'),
    ("42501", r"permission denied for (database|function|view)"),
    ("57P03", "server login has been failing"),  # PgBouncer's, also if its server is down
)
"""Messages of servers and poolers that refuse a connect: the SQLSTATE, which libpq drops, and a pattern of the words."""
_SERVER_SAYS = re.compile(r"failed: [^:\n]{1,30}:  \S")
"""Matches the severity, in the server's language, and two spaces. Only a server's own message begins like this."""


def _code_of_connecting(error: BaseException) -> str | None:
    """The SQLSTATE that libpq drops while it connects, derived from the message. None if no server has refused.

    A server may speak another language than English. Once it has checked the password, any error of its own counts as a refusal.
    It reports that it starts, stops or is full before it asks for a password.
    """
    text = str(error)
    said = next((sqlstate for sqlstate, pattern in _SAID if re.search(pattern, text)), None)
    if said is not None:
        return said
    looked: Any = getattr(error, "pgconn", None)
    return "28000" if getattr(looked, "used_password", False) and _SERVER_SAYS.search(text) else None


def is_from_connecting(error: BaseException) -> bool:
    """Return whether this error of the driver only occurs while connecting."""
    return getattr(error, "pgconn", None) is not None


UNUSABLE = (
    r"invalid connection option|invalid \S+ value|invalid port number|unsupported startup|bad value for connect_timeout"
    r"|invalid value for parameter|invalid command-line argument|requires a value|unrecognized configuration parameter"
    r"|permission denied to set"
    r"|definition of service|service file|could not parse network address"
    r"|connection is bad: (?!connection to server|could not |out of memory)"  # libpq has not tried to connect
    r"|channel binding (is )?required|authentication method requirement|GSSAPI encryption, but it was required"
    r"|server did not request an SSL certificate|without a valid SSL certificate"
)
_ADVICE = (
    (
        r"invalid response to SSL negotiation|expected authentication request",
        "no PostgreSQL server answers there",
    ),
    (
        "not allowed in statement pooling mode",
        "the pooler has pool_mode=statement, which cannot be used; set it to transaction or session",
    ),
    (
        r"server does not support SSL|certificate verify failed|root certificate file|does not match host name",
        "check sslmode and the certificates",
    ),
    (UNUSABLE, "check the URL's query and connect_args"),
)
"""Messages of libpq and psycopg that are no server's refusal, and the advice."""
ARGUMENT_ERRORS = (("determine version", "rows must be tuples; leave row_factory out of connect_args"),)
_VALUE = re.compile(r"""((?:value|number|value for connect_timeout):? )(["']).*\2(?= for connection option|$)""")
"""An option's value that libpq cannot use. It may be a password in the wrong place."""


def explain(error: BaseException) -> tuple[str, str]:
    """Return the words of a failed connect, without values of options, and advice if the error is libpq's own."""
    text = _VALUE.sub(r"\1\2...\2", " ".join(str(error).split()).removeprefix("connection failed: "))
    return text, next((advice for pattern, advice in _ADVICE if re.search(pattern, text)), "")


def fileno(connection: Any) -> int:
    """Return the number of the connection's socket."""
    number: int = connection.fileno()
    return number


def is_closed(connection: Any) -> bool:
    """Return whether the connection has ended."""
    return bool(connection.closed or connection.broken)


def autocommit(connection: Any) -> bool:
    """Return whether each statement is a transaction of its own."""
    return bool(connection.autocommit)


_IDLE, _UNKNOWN = 0, 4  # psycopg's enum is slow to look up on the request path


@contextlib.contextmanager
def alone(connection: Any) -> Iterator[None]:
    """Make each statement on an idle connection a transaction of its own, within the block."""
    usual, connection.autocommit = connection.autocommit, True
    yield
    connection.autocommit = usual


def process_id(connection: Any) -> int:
    """Return the number that the server, or a pooler, gave the connection at login."""
    number: int = connection.pgconn.backend_pid
    return number


def database(connection: Any) -> None:
    """Return None, because a connection to PostgreSQL never changes its database."""


def declared_read_only(connection: Any) -> bool:
    """Return whether the connection's transactions begin as read-only."""
    return bool(connection.read_only)


def isolation(connection: Any) -> str | None:
    """Return the connection's attribute, which a listener of the application may have set."""
    level = connection.isolation_level
    return None if level is None else str(level.name).replace("_", " ").lower()


def literal_mode(connection: Any) -> str:
    """Return the connection's `standard_conforming_strings`. The server reports each change of it."""
    return str(connection.info.parameter_status("standard_conforming_strings"))


def is_aborted(connection: Any) -> bool:
    """Return whether the transaction has failed. The server then answers COMMIT with ROLLBACK, without an error."""
    return bool(connection.info.transaction_status.name == "INERROR")


def was_not_undone(connection: Any) -> bool:
    """Return False, because all tables are transactional."""
    return False


def raise_if_aborted(connection: Any) -> None:
    """Raise the driver's error for a transaction that has failed."""
    connection.execute("SELECT 1")


def note_default_read_only(connection: Any, on: bool) -> None:
    """Do nothing: the server reports the default."""


def is_settled(connection: Any, alone: bool) -> bool:
    """Return whether a connection that was switched before can be used as it is.

    A transaction that a listener has begun may accept writes, whatever psycopg's attributes say.
    """
    if connection.autocommit is not alone or connection.pgconn.transaction_status != _IDLE:
        return False
    if alone:
        return is_default_read_only(connection, False)
    return connection.read_only is True  # SQLAlchemy's postgresql_readonly leaves another value


def is_default_read_only(connection: Any, handed_out: bool) -> bool:
    """Return whether a read-only default that was set is known to be still in force.

    PostgreSQL 14 and newer report each change. On an older server the default is trusted as long as nobody can have changed it.
    """
    status: bytes | None = connection.pgconn.parameter_status(b"default_transaction_read_only")
    if status is None:
        return not (handed_out or notes_of(connection).listened())
    return status != b"off"


def has_lost_read_only(connection: Any) -> bool:
    """Return whether a connection in autocommit has lost its read-only default and can get it back.

    PostgreSQL 14 and newer report the loss.
    """
    driver = connection.pgconn
    is_off = driver.parameter_status(b"default_transaction_read_only") == b"off"
    return is_off and bool(connection.autocommit) and bool(driver.transaction_status == _IDLE)


def is_idle(connection: Any) -> bool:
    """Return whether a rollback on a connection is known to send nothing and to change nothing.

    In a pipeline a rollback would end the pipeline. While a transaction is prepared, psycopg refuses a rollback.
    """
    driver = connection.pgconn
    return bool(driver.transaction_status == _IDLE and not driver.pipeline_status and connection._tpc is None)


def end_transaction(connection: Any) -> None:
    """End the transaction that a listener has begun, by COMMIT, so that the listener's settings last."""
    status = connection.info.transaction_status.name
    if status == "INTRANS":
        connection.commit()
    elif status == "INERROR":
        connection.rollback()


def forget_prepared(connection: Any) -> None:
    """Make psycopg drop its prepared statements on an idle connection, as it does after each rollback.

    The server drops the plans of PL/pgSQL functions, too.
    """
    connection.autocommit = True
    connection.execute("BEGIN; ROLLBACK; DISCARD PLANS", prepare=False)


def set_mode(connection: Any, mode: Mode, default_autocommit: bool, default_read_only: bool) -> bool:
    """Switch an idle psycopg connection. Only attributes change, and nothing is sent."""
    connection.autocommit = default_autocommit if mode is Mode.DEFAULT else mode is Mode.AUTOCOMMIT
    connection.read_only = True if mode is Mode.READ_ONLY else None
    return True


def count_ends(connection: Any) -> Callable[[], int]:
    """Count the transactions that end on a psycopg connection, except those that rollback() ends."""
    from aurora_router.drivers import psycopg_classes

    wait = vars(connection).get("wait")
    if wait is None:
        wait = connection.wait = _Wait(connection)
        if connection.cursor_factory is psycopg_classes.Cursor:  # otherwise the application has its own
            connection.cursor_factory = psycopg_classes.CountingCursor
    return lambda: wait.ends


class _Wait:
    """A replacement for psycopg's Connection.wait(), through which everything is sent.

    Only connections that are handed to the user have it.
    """

    def __init__(self, connection: Any) -> None:
        self.ends = 0
        self._connection = weakref.ref(connection)
        self._wait = type(connection).wait

    def __call__(self, steps: Any, *arguments: Any, **options: Any) -> Any:
        connection: Any = self._connection()
        try:
            return self._wait(connection, steps, *arguments, **options)
        finally:
            if not connection.pgconn.transaction_status and getattr(steps, "__name__", "") != "_rollback_gen":  # 0: none is open
                self.ends += 1


def track_connecting_socket(
    dialect: Any, connecting: Callable[[int], AbstractContextManager[None]], longest: int | None = None
) -> None:
    """Make a dialect's new connections wait for the server within `connecting(number of the socket)`.

    `connecting` may end the wait by shutting the socket. If something has replaced psycopg's own connect(), for example to trace
    it, nothing is changed.
    """
    import psycopg

    from aurora_router.drivers.psycopg_classes import Connection

    if dialect.loaded_dbapi.connect == psycopg.Connection.connect:
        own = {"connecting": staticmethod(connecting), "longest": longest}
        watched: Any = type("Connection", (Connection,), own)
        dialect.connect = watched.connect


def look_anywhere(dialect: Any) -> None:
    """Make SQLAlchemy's first look at a server succeed, also on a reader whose default level is SERIALIZABLE.

    Listeners of the application may have used the connection before. So their transaction is ended before that look, and before
    an engine's level is set. SQLAlchemy's default level is then the server's, not the level of that look.
    """
    from psycopg import IsolationLevel

    initialize = dialect.initialize

    def at_read_committed(connection: Any) -> None:
        driver = connection.connection.dbapi_connection
        end_transaction(driver)
        usual = driver.autocommit, driver.isolation_level, driver.prepare_threshold
        of_engine = driver.isolation_level
        # Nothing is prepared. Otherwise psycopg would send DEALLOCATE after the rollback, and at SERIALIZABLE a reader refuses
        # that as well.
        driver.autocommit, driver.isolation_level, driver.prepare_threshold = False, IsolationLevel.READ_COMMITTED, None
        initialize(connection)
        driver.rollback()
        driver.autocommit, driver.isolation_level, driver.prepare_threshold = usual
        # SQLAlchemy goes back to this level after a unit that has asked for another one.
        if of_engine is not None:
            dialect.default_isolation_level = of_engine.name.replace("_", " ")

    def default_level(driver: Any) -> str:
        (level,) = driver.execute("SHOW default_transaction_isolation").fetchone()
        return str(level).upper()

    set_level = dialect.set_isolation_level

    def set_level_anew(driver: Any, level: str) -> None:
        end_transaction(driver)
        set_level(driver, level)

    dialect.initialize = at_read_committed
    dialect.set_isolation_level = set_level_anew
    dialect.get_default_isolation_level = default_level


def prepare_connection(
    connection: Any, shared: bool, given: Collection[str], listened: Callable[[], bool], incidents: Incidents
) -> None:
    """Let server-side cursors of an autocommit connection outlive their statement (WITH HOLD).

    So a streamed read needs no transaction. On a shared connection it needs one, and nothing is prepared there unless the user
    asks for it. The connection also notes if the server ends it because another server process has crashed.
    """
    from psycopg import Cursor, capabilities

    from aurora_router.drivers import psycopg_classes

    notes = ConnectionNotes(listened, shared)
    keep_notes(connection, notes)

    def note_crash(notice: Any) -> None:
        if notice.sqlstate in incidents.CRASHED:
            notes.crashes.append(notice.sqlstate)

    connection.add_notice_handler(note_crash)
    connection.server_cursor_factory = psycopg_classes.HoldCursor
    is_psycopgs = isinstance(connection, psycopg_classes.Connection) and connection.cursor_factory is Cursor
    if is_psycopgs and not shared and capabilities.has_pipeline():  # otherwise the application has its own
        connection.cursor_factory = psycopg_classes.Cursor
    if shared and "prepare_threshold" not in given:
        connection.prepare_threshold = None


def is_bystander(connection: Any) -> bool:
    """Return whether the server has ended the connection because another server process has crashed."""
    return has_notes(connection) and bool(notes_of(connection).crashes)


def blocks(connection: Any) -> bool:
    """Return False, because a stream is a server-side cursor, which does not keep other statements waiting."""
    return False


def has_leftovers(connection: Any) -> bool:
    """Return whether an exception in the midst of a COMMIT has left cursors WITH HOLD, or a transaction, open."""
    return bool(notes_of(connection).held_cursors) or _IDLE < connection.pgconn.transaction_status < _UNKNOWN


def remove_leftovers(connection: Any, query: Query) -> None:
    """Close the cursors of a connection. Until then the server keeps the rows of each in memory or on disk.

    Raises psycopg's error if a transaction is open.
    """
    connection.autocommit = True
    query("CLOSE ALL")
    notes_of(connection).held_cursors.clear()
