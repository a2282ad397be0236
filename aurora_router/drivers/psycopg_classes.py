"""Subclasses of psycopg's connection and cursors. They are imported when a connection is made, because psycopg may be missing.

The connection shows its socket while it connects. The cursor sends BEGIN together with the first statement.
"""

from __future__ import annotations

import contextlib
import re
import threading
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from secrets import token_hex
from typing import Any

import psycopg
from psycopg import DatabaseError, Error, OperationalError, ServerCursor, capabilities
from psycopg._preparing import Prepare
from psycopg.adapt import Transformer
from psycopg.generators import execute, fetch_many
from psycopg.pq import ConnStatus, DiagnosticField, ExecStatus
from psycopg.sql import SQL, Identifier

from aurora_router.drivers.notes import notes_of

_PIECE = 1 << 14
"""About how many bytes libpq reads each time that it has waited for the server."""


def _limited(pgconn: Any, steps: Any, most: int) -> Any:
    """The same steps, except that they close the connection and fail if they wait more often than `most` times."""
    ready = None
    try:
        for _ in range(most):
            try:
                wanted = steps.send(ready)
            except StopIteration as end:
                return end.value
            ready = yield wanted
    finally:
        steps.close()
    pgconn.finish()
    raise OperationalError("the server's answer has no end")


# .made: the connects that this thread has begun. It is local to the thread however units wait, because connect() of this
# synchronous class holds its thread from begin to end.
_attempts = threading.local()  # noqa: TID251


class Connection(psycopg.Connection[Any]):
    """psycopg's connection, except that it waits for the server within `connecting()`, and can send BEGIN without waiting.

    psycopg has no public way to watch it connect. Its connecting generator yields the socket each time it must wait. If a connect
    takes too long, psycopg leaves the generator and its socket to the garbage collector. So this class closes the generator.

    begins: the BEGIN statements that are prepared on the server, each with its name there.
    """

    connecting: Callable[[int], AbstractContextManager[None]]
    longest: int | None = None

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.begins: dict[bytes, bytes] = {}

    @classmethod
    def connect(cls, *arguments: Any, **options: Any) -> Any:
        _attempts.made = []
        try:
            return super().connect(*arguments, **options)
        finally:
            for attempt in _attempts.made:
                attempt.close()
            del _attempts.made

    @classmethod
    def _connect_gen(cls, *arguments: Any, **options: Any) -> Any:
        attempt = cls._attempt(super()._connect_gen(*arguments, **options))
        _attempts.made.append(attempt)
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
        if self.longest is not None:
            gen = _limited(self.pgconn, gen, self.longest // _PIECE)
        try:
            return super().wait(gen, *arguments, **options)
        finally:
            # An exception that interrupts the generator may be kept, and the generator with it.
            gen.close()

    def _check_connection_ok(self) -> None:
        if self.pgconn.pipeline_status and self._pipeline is None:
            self.pgconn.finish()  # the pipeline was interrupted, and then its end
        super()._check_connection_ok()

    def _deallocate(self, name: bytes | None) -> Any:
        if name is None:
            self.begins.clear()
        return super()._deallocate(name)

    def send_begin(self) -> int:
        """Send BEGIN in a pipeline. Return the number of answers that it will get."""
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


_BEGIN = f"aurora_router_{token_hex(4)}_".encode()
"""The prefix of the names of the BEGIN statements prepared here. It is random, so nobody else can reuse such a name."""
_START = r"(?:\s|--[^\r\n]*[\r\n]|/\*(?:(?!/\*|\*/).)*\*/)*"
_MAY_FOLLOW = re.compile(rf"{_START}(?:select|insert|update|delete|merge|with|values|lock|set)\b", re.I | re.S).match
_MAY_FOLLOW_ALONE = re.compile(rf"{_START}(?:select|values|lock|set)\b(?!.*pg_cursors)[^;$]*$", re.I | re.S).match
"""Match statements that may follow BEGIN in the same pipeline: the first if they have parameters, the second if they have none.
COPY may not.

psycopg itself sends a statement without parameters by the simple protocol, which a pipeline cannot use. The simple protocol takes
several statements, has another error for $1, returns the rows of a rule, and does not show the statement's own portal in
pg_cursors. So the second pattern matches less.
"""

_IDLE = 0  # psycopg's enum is slow to look up on the request path
_FAILED, _SYNCED, _ALIVE = ExecStatus.FATAL_ERROR, ExecStatus.PIPELINE_SYNC, ConnStatus.OK
_CAN_CLOSE = capabilities.has_send_close_prepared()


class Cursor(psycopg.Cursor[Any]):
    """psycopg's cursor, except that BEGIN and the first statement of a transaction take one round trip.

    A call other than execute(), for example copy() or executemany(), follows a BEGIN of its own.
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
            and (_MAY_FOLLOW(query) if params else _CAN_CLOSE and _MAY_FOLLOW_ALONE(query))
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
            yield from connection._start_query()  # psycopg sends BEGIN before it converts
            raise
        if not (statement.params or (_CAN_CLOSE and _MAY_FOLLOW_ALONE(query))):  # the text names no parameter
            yield from super()._execute_gen(query, params, prepare=prepare, binary=binary)
            return
        how, name = self._get_prepared(statement, prepare)
        for _ in range(2):
            begun, answers = yield from self._fly(statement, how, name, binary)
            code = next((each.error_field(DiagnosticField.SQLSTATE) for each in begun if each.status == _FAILED), None)
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
                    pgconn.send_close_portal(b"")  # an open portal would keep its snapshot
            except Exception:  # a parameter that cannot be sent
                yield from self._land()
                raise
            answers = yield from self._land()
        finally:
            if pgconn.pipeline_status and pgconn.status == _ALIVE:  # it was interrupted
                pgconn.finish()
        return [result for each in answers[:begun] for result in each], answers[begun:]

    def _land(self) -> Any:
        """End the pipeline. Return a list of results for each of its messages."""
        pgconn = self._pgconn
        answers: list[Any] = []
        pgconn.pipeline_sync()
        try:
            answers.append((yield from execute(pgconn)))
            while pgconn.status == _ALIVE and not any(result.status == _SYNCED for result in answers[-1]):
                answers.append((yield from fetch_many(pgconn)))
        except DatabaseError:
            if not any(result.status == _FAILED for each in answers for result in each):
                raise
        if pgconn.status == _ALIVE:
            pgconn.exit_pipeline_mode()
            return answers[:-1]
        return answers  # the server has said why the connection is lost


class CountingCursor(Cursor):
    """The same for a connection that is handed to the user. It counts the COMMITs after which a transaction is open all the same.

    Those are COMMIT AND CHAIN, and a text that also begins the next transaction.
    """

    __slots__ = ()

    def _set_results(self, results: Any) -> None:
        super()._set_results(results)
        if self._pgconn.transaction_status != _IDLE and any(result.command_status in _COMMITS for result in results):
            connection: Any = self._conn
            connection.wait.ends += 1


_COMMITS = (b"COMMIT", b"PREPARE TRANSACTION")


class HoldCursor(ServerCursor[Any]):
    """A cursor that its connection knows until the cursor is closed.

    If the application leaves a loop over the rows, it can no longer close the cursor. The cursor is then closed when the next one
    is opened. The last cursors are closed when the connection is back in its pool.
    """

    def __init__(self, connection: Any, name: str, **options: Any) -> None:
        notes = notes_of(connection)
        hold = options["withhold"] = options.get("withhold") or (connection.autocommit and not notes.is_shared)
        super().__init__(connection, name, **options)
        held = self._held = notes.held_cursors
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
