"""psycopg's connection as the router uses it: its switches, and subclasses that watch it connect and send BEGIN along."""

from __future__ import annotations

import contextlib
import re
import threading
import weakref
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from functools import cache
from secrets import token_hex
from typing import Any

from aurora_router.core.query import Query
from aurora_router.drivers.base import Mode


def fileno(connection: Any) -> int:
    """The number of the connection's socket."""
    number: int = connection.fileno()
    return number


def is_closed(connection: Any) -> bool:
    """Whether the connection has ended."""
    return bool(connection.closed or connection.broken)


def autocommit(connection: Any) -> bool:
    """Whether each statement is on its own."""
    return bool(connection.autocommit)


_IDLE, _UNKNOWN = 0, 4  # psycopg's enum is slow to look up on the request path


def is_settled(connection: Any, alone: bool) -> bool:
    """Whether a connection that was switched before can be used as it is.

    A transaction that a listener has begun may accept writes, whatever psycopg's attributes say.
    """
    if connection.autocommit is not alone or connection.pgconn.transaction_status != _IDLE:
        return False
    if alone:
        return is_guarded(connection, False)
    return connection.read_only is True  # SQLAlchemy's postgresql_readonly leaves another value


def is_guarded(connection: Any, handed_out: bool) -> bool:
    """Whether a guard that was set is known to be on.

    PostgreSQL 14 and newer report each change. On an older server the guard is trusted as long as nobody can have changed it.
    """
    status: bytes | None = connection.pgconn.parameter_status(b"default_transaction_read_only")
    if status is None:
        return not (handed_out or connection.aurora_router_listened())
    return status != b"off"


def has_lost_guard(connection: Any) -> bool:
    """Whether a guarded connection in autocommit has lost its guard and can get it back. PostgreSQL 14 and newer report it."""
    driver = connection.pgconn
    is_off = driver.parameter_status(b"default_transaction_read_only") == b"off"
    return is_off and bool(connection.autocommit) and bool(driver.transaction_status == _IDLE)


def is_idle(connection: Any) -> bool:
    """Whether a rollback on a connection is known to send nothing and to change nothing.

    In a pipeline a rollback would end the pipeline. While a transaction is prepared, psycopg refuses a rollback.
    """
    driver = connection.pgconn
    return bool(driver.transaction_status == _IDLE and not driver.pipeline_status and connection._tpc is None)


def end_transaction(connection: Any) -> None:
    """End what a listener has begun, by COMMIT, so that the listener's settings hold."""
    status = connection.info.transaction_status.name
    if status == "INTRANS":
        connection.commit()
    elif status == "INERROR":
        connection.rollback()


def forget_prepared(connection: Any) -> None:
    """Make psycopg drop its prepared statements on an idle connection, as it does after each rollback."""
    connection.autocommit = True
    connection.execute("BEGIN; ROLLBACK", prepare=False)


def set_mode(connection: Any, mode: Mode, default_autocommit: bool, guarded: bool) -> bool:
    """Switch an idle psycopg connection; only attributes change, nothing is sent."""
    connection.autocommit = default_autocommit if mode is Mode.DEFAULT else mode is Mode.AUTOCOMMIT
    connection.read_only = True if mode is Mode.READ_ONLY else None
    return True


def count_ends(connection: Any) -> Callable[[], int]:
    """Count the transactions that end on a psycopg connection, except those that rollback() ends."""
    wait = vars(connection).get("wait")
    if wait is None:
        wait = connection.wait = _Wait(connection)
    return lambda: wait.ends


class _Wait:
    """A replacement of psycopg's Connection.wait(), through which everything is sent.

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


def watch_connecting(dialect: Any, connecting: Callable[[int], AbstractContextManager[None]]) -> None:
    """Make a dialect's new connections wait for the server within `connecting(number of the socket)`.

    `connecting` may end the wait by shutting the socket. If something has replaced psycopg's own connect(), for example to trace
    it, nothing is changed.
    """
    import psycopg

    if dialect.loaded_dbapi.connect == psycopg.Connection.connect:
        watched: Any = type("Connection", (_connection(),), {"connecting": staticmethod(connecting)})
        dialect.connect = watched.connect


def look_anywhere(dialect: Any) -> None:
    """Make SQLAlchemy's first look at a server succeed, also on a reader whose default level is SERIALIZABLE.

    Listeners of the application may have used the connection before. So their transaction is ended before that look, and before
    an engine's level is set. SQLAlchemy takes the server's level for the default one, not the level of that look.
    """
    from psycopg import IsolationLevel

    initialize = dialect.initialize

    def at_read_committed(connection: Any) -> None:
        driver = connection.connection.dbapi_connection
        end_transaction(driver)
        usual = driver.autocommit, driver.isolation_level, driver.prepare_threshold
        of_engine = driver.isolation_level
        # Nothing is prepared, because psycopg would drop it after the rollback, which a reader refuses at SERIALIZABLE as well.
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


def prepare(connection: Any, shared: bool, given: Collection[str], listened: Callable[[], bool]) -> None:
    """Let server-side cursors of an autocommit connection outlive their statement (WITH HOLD).

    So a streamed read needs no transaction. On a shared connection it does, and nothing is prepared there unless the user asks
    for it. The connection also notices if the server ends it because another server process has crashed.
    """
    from psycopg import Cursor, capabilities

    crashes: list[str] = []

    def note_crash(notice: Any) -> None:
        if notice.sqlstate == "57P02":
            crashes.append(notice.sqlstate)

    connection.add_notice_handler(note_crash)
    connection.aurora_router_crashes = crashes
    connection.server_cursor_factory = _hold_cursor()
    is_psycopgs = isinstance(connection, _connection()) and connection.cursor_factory is Cursor
    if is_psycopgs and not shared and capabilities.has_pipeline():  # otherwise the application has its own
        connection.cursor_factory = _cursor()
    connection.aurora_router_held = {}
    connection.aurora_router_shared = shared
    connection.aurora_router_listened = listened
    if shared and "prepare_threshold" not in given:
        connection.prepare_threshold = None


def is_bystander(connection: Any) -> bool:
    """Whether the server has ended the connection because another server process has crashed."""
    return bool(getattr(connection, "aurora_router_crashes", ()))


def blocks(connection: Any) -> bool:
    """Never, because a stream is a server-side cursor, which does not keep the connection from other statements."""
    return False


def has_leftovers(connection: Any) -> bool:
    """Whether an exception in the midst of a COMMIT has left cursors WITH HOLD, or a transaction, open."""
    return bool(connection.aurora_router_held) or _IDLE < connection.pgconn.transaction_status < _UNKNOWN


def remove_leftovers(connection: Any, ask: Query) -> None:
    """Close the cursors of a connection. Until then the server keeps the rows of each in memory or on disk.

    Raises psycopg's error if a transaction is open.
    """
    connection.autocommit = True
    ask("CLOSE ALL")
    connection.aurora_router_held.clear()


@cache
def _connection() -> Any:
    from psycopg import Connection as Base

    attempts = threading.local()

    class Connection(Base[Any]):
        """psycopg's connection, except that it waits for the server within `connecting()`, and can send BEGIN without waiting.

        psycopg has no public way to watch it connect. Its generator that connects yields the socket each time it must wait. A
        generator that took too long, and its socket, are left to the garbage collector by psycopg. So it is closed here.

        begins: each BEGIN that is prepared on the server, and its name there.
        """

        connecting: Callable[[int], AbstractContextManager[None]]

        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            self.begins: dict[bytes, bytes] = {}

        @classmethod
        def connect(cls, *arguments: Any, **options: Any) -> Any:
            attempts.made = []
            try:
                return super().connect(*arguments, **options)
            finally:
                for attempt in attempts.made:
                    attempt.close()
                del attempts.made

        @classmethod
        def _connect_gen(cls, *arguments: Any, **options: Any) -> Any:
            attempt = cls._attempt(super()._connect_gen(*arguments, **options))
            attempts.made.append(attempt)
            return attempt

        @classmethod
        def _attempt(cls, steps: Any) -> Any:
            ready = None
            while True:
                try:
                    number, wanted = steps.send(ready)
                except StopIteration as end:
                    return end.value
                with cls.connecting(number):
                    ready = yield number, wanted

        def wait(self, gen: Any, *arguments: Any, **options: Any) -> Any:
            try:
                return super().wait(gen, *arguments, **options)
            finally:
                gen.close()  # An exception that interrupts it may be kept, and its steps with it.

        def _check_connection_ok(self) -> None:
            if self.pgconn.pipeline_status and self._pipeline is None:
                self.pgconn.finish()  # Its pipeline was interrupted, and so was the end of it.
            super()._check_connection_ok()

        def _deallocate(self, name: bytes | None) -> Any:
            if name is None:
                self.begins.clear()
            return super()._deallocate(name)

        def send_begin(self) -> int:
            """Send BEGIN in a pipeline. Return how many answers will come to it."""
            begin = self._get_tx_start_command()
            if self.prepare_threshold is None:
                self.pgconn.send_query_params(begin, None)
                return 1
            name = self.begins.get(begin)
            if name is None:
                name = self.begins[begin] = _BEGIN + begin.replace(b" ", b"_")
                self.pgconn.send_prepare(name, begin)
                self.pgconn.send_query_prepared(name, None)
                return 2
            self.pgconn.send_query_prepared(name, None)
            return 1

    return Connection


_BEGIN = f"aurora_router_{token_hex(4)}_".encode()
"""Begins the names of what is prepared here. Nobody else can know such a name, and give it another meaning."""
_START = r"(?:\s|--[^\r\n]*[\r\n]|/\*(?:(?!/\*|\*/).)*\*/)*"
_MAY_FOLLOW = re.compile(rf"{_START}(?:select|insert|update|delete|merge|with|values|lock|set)\b", re.I | re.S).match
_MAY_FOLLOW_ALONE = re.compile(rf"{_START}(?:select|values|lock|set)\b[^;$]*$", re.I | re.S).match
"""Match statements that may follow BEGIN in the same pipeline, if they have parameters, and if they have none. COPY may not.

psycopg sends a statement without parameters by another protocol. That one takes several statements, has another error for $1, and
returns the rows of a rule.
"""


@cache
def _cursor() -> Any:
    from psycopg import Cursor as Base
    from psycopg import DatabaseError, capabilities
    from psycopg._preparing import Prepare
    from psycopg.adapt import Transformer
    from psycopg.generators import execute, fetch_many
    from psycopg.pq import ConnStatus, DiagnosticField, ExecStatus

    failed, synced, alive = ExecStatus.FATAL_ERROR, ExecStatus.PIPELINE_SYNC, ConnStatus.OK
    can_close = capabilities.has_send_close_prepared()

    class Cursor(Base[Any]):
        """psycopg's cursor, except that BEGIN and the first statement of a transaction take one round trip.

        What goes to the server in another way than by execute(), such as COPY and executemany(), follows a BEGIN of its own.
        """

        __slots__ = ()

        def _execute_gen(self, query: Any, params: Any = None, **options: Any) -> Any:
            connection: Any = self._conn
            connection._check_connection_ok()
            if (
                self._pgconn.transaction_status == _IDLE
                and not connection.autocommit
                and connection._pipeline is None
                and type(query) is str
                and (_MAY_FOLLOW(query) if params else can_close and _MAY_FOLLOW_ALONE(query))
                and not self.closed
            ):
                return self._begin_and_execute(query, params, **options)
            return super()._execute_gen(query, params, **options)

        def _begin_and_execute(self, query: str, params: Any, prepare: bool | None = None, binary: bool | None = None) -> Any:
            connection: Any = self._conn
            try:
                # As psycopg's _start_query(), except that it would send BEGIN.
                self._reset()
                if self._last_query is not query:
                    self._last_query, self._tx = None, Transformer(self)
                statement = self._convert_query(query, params)
            except Exception:
                yield from connection._start_query()  # psycopg looks at the parameters only afterwards
                raise
            if not (statement.params or (can_close and _MAY_FOLLOW_ALONE(query))):  # the text names no parameter
                yield from super()._execute_gen(query, params, prepare=prepare, binary=binary)
                return
            how, name = self._get_prepared(statement, prepare)
            for _ in range(2):
                begun, answers = yield from self._fly(statement, how, name, binary)
                code = next((each.error_field(DiagnosticField.SQLSTATE) for each in begun if each.status == failed), None)
                if code == b"26000":  # somebody has dropped BEGIN, for example by DISCARD ALL
                    connection.begins.clear()
                elif code != b"42P05":  # BEGIN is prepared already
                    break
            for results in (begun, *answers):
                self._check_results(results)
            results = answers[how is Prepare.SHOULD]
            known = connection._prepared
            key = known.maybe_add_to_cache(statement, how, name)
            if key is not None:
                known.validate(key, how, name, results)
            self._set_results(results)
            self._last_query = query
            yield from known.maintain_gen(connection)

        def _fly(self, statement: Any, how: Prepare, name: bytes, binary: bool | None) -> Any:
            """Send BEGIN and the statement. Return the results of BEGIN, and a list of results for each message after it."""
            connection: Any = self._conn
            pgconn = self._pgconn
            try:
                pgconn.enter_pipeline_mode()
                begun = connection.send_begin()
                try:
                    if how is Prepare.SHOULD:
                        self._send_prepare(name, statement)
                    if how is Prepare.NO:
                        self._execute_send(statement, binary=binary, force_extended=True)
                    else:
                        self._send_query_prepared(name, statement, binary=binary)
                    if not statement.params:
                        pgconn.send_close_portal(b"")  # it would keep its snapshot until the next statement
                except Exception:  # a parameter that cannot be sent
                    yield from self._land()
                    raise
                answers = yield from self._land()
            finally:
                if pgconn.pipeline_status and pgconn.status == alive:  # it was interrupted
                    pgconn.finish()
            return [result for each in answers[:begun] for result in each], answers[begun:]

        def _land(self) -> Any:
            """End the pipeline. Return a list of results for each of its messages."""
            pgconn = self._pgconn
            answers: list[Any] = []
            pgconn.pipeline_sync()
            try:
                answers.append((yield from execute(pgconn)))
                while pgconn.status == alive and not any(result.status == synced for result in answers[-1]):
                    answers.append((yield from fetch_many(pgconn)))
            except DatabaseError:
                if not any(result.status == failed for each in answers for result in each):
                    raise
            if pgconn.status == alive:
                pgconn.exit_pipeline_mode()
                return answers[:-1]
            return answers  # the server has said why the connection is lost

    return Cursor


_hold: Any = None


def _hold_cursor() -> Any:
    global _hold
    if _hold is None:
        from psycopg import Error, ServerCursor
        from psycopg.sql import SQL, Identifier

        class HoldCursor(ServerCursor[Any]):
            """A cursor that its connection knows until the cursor is closed.

            If a loop over its rows was left, nobody can close the cursor any more. It is then closed when the next cursor is
            opened. The last ones are closed when the connection is back in its pool.
            """

            def __init__(self, connection: Any, name: str, **options: Any) -> None:
                shared = connection.aurora_router_shared
                hold = options["withhold"] = options.get("withhold") or (connection.autocommit and not shared)
                super().__init__(connection, name, **options)
                held = self._held = connection.aurora_router_held
                if held and connection.autocommit:
                    for gone in [name for name, cursor in held.items() if cursor() is None]:
                        with contextlib.suppress(Error):  # the new cursor will report a broken connection
                            connection.execute(SQL("CLOSE {}").format(Identifier(gone)), prepare=False)
                        del held[gone]
                if hold:
                    held[name] = weakref.ref(self)

            def close(self) -> None:
                if self.withhold and self.name not in self._held:
                    # The server has closed the cursor, because its connection went back to the pool.
                    super(ServerCursor, self).close()
                else:
                    super().close()
                    self._held.pop(self.name, None)

            def __del__(self, *_: Any) -> None:
                """Give no warning, unlike psycopg's, because the cursor will be closed."""

        _hold = HoldCursor
    return _hold
