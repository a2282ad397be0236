"""Subclasses of PyMySQL's connection, streams and their rows. They are imported when a connection is made.

The connection keeps track of the events on its server that PyMySQL does not report.
"""

from __future__ import annotations

import contextlib
import re
import socket
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from types import FrameType
from typing import Any

from pymysql import connections
from pymysql.connections import MySQLResult
from pymysql.constants.COMMAND import COM_QUERY
from pymysql.constants.SERVER_STATUS import SERVER_STATUS_IN_TRANS
from pymysql.cursors import DictCursorMixin, SSCursor, SSDictCursor
from pymysql.err import InterfaceError, MySQLError, OperationalError

from aurora_router.core.incidents import Incidents
from aurora_router.drivers.pymysql import (
    KEEPALIVE,
    NO_PACKAGE,
    OUT_OF_SYNC,
    SNAPSHOT,
    autocommit,
    blocks,
    code,
)

_JUDGED = ("sqlalchemy.", "aurora_router.")


def _is_by_others() -> bool:
    """Whether PyMySQL's last statement came neither from SQLAlchemy, whose statements are intercepted, nor from this library."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and (name := frame.f_globals.get("__name__", "")).startswith(("pymysql.", "aurora_router.drivers.")):
        frame = frame.f_back
    return not name.startswith(_JUDGED)


_contexts: list[Any] = []


class Stream(SSCursor):  # type: ignore[misc,unused-ignore]
    """PyMySQL's cursor for streams, except that closing it leaves the rows unread.

    The connection reads them when it must send something else. If it is closed first, it never reads them. Reading a row then
    raises an error, so that the stream does not seem to be complete.
    """

    connection: Any

    def close(self) -> None:
        if self.connection is not None and blocks(self.connection) and self.connection._result is self._result:
            self._result.abandoned = True
            self.connection = None
        else:
            super().close()

    __del__ = close


class DictStream(DictCursorMixin, Stream):  # type: ignore[misc,unused-ignore]
    """The same, with dictionaries as rows."""


_STREAMS = {SSCursor: Stream, SSDictCursor: DictStream}


class Rows(MySQLResult):  # type: ignore[misc,unused-ignore]
    """PyMySQL's result of a stream, except that its connection knows while one of its rows is being read.

    abandoned: the stream was closed, so nobody wants the unread rows.
    is_incomplete: the connection was closed before the stream's end, so the stream must not seem to be complete.
    """

    connection: Any
    abandoned = False
    is_incomplete = False

    def _read_rowdata_packet_unbuffered(self) -> Any:
        connection = self.connection
        if connection is None:
            return super()._read_rowdata_packet_unbuffered()
        if connection.unanswered:
            connection._force_close()
        if self.is_incomplete:
            raise InterfaceError(0, "")
        connection.unanswered = True
        try:
            row = super()._read_rowdata_packet_unbuffered()
        except MySQLError:  # it ends the answer, or the connection is closed
            connection.unanswered = False
            raise
        connection.unanswered = False
        return row


class Connection(connections.Connection):  # type: ignore[misc,unused-ignore]
    """PyMySQL's connection, changed for the router.

    It sends COMMIT and ROLLBACK only if they do something, and may be closed twice. While connecting, it waits for no answer
    longer than connect_timeout. It knows if the server has rolled back on its own. It does not read the rest of a stream when
    it is closed.

    quiet: nothing was sent since the last transaction ended.
    failed: a statement has failed since then.
    incidents: tells how the server reports what it does on its own. None: the connection is not prepared yet.
    aborted_by: the error with which the server has rolled back.
    not_undone: a rollback has left writes to a table without transactions.
    ends: how many transactions have ended, other than by rollback(). A statement outside of a transaction counts, too, if it
        may have written. None: they are not counted.
    touched: somebody has sent a SET, or its like, past the interceptor since the read-only default was set. None if it
        is not set.
    begins_read_only: each transaction is to be read-only, and the server has no such default.
    unanswered: a command was sent, or is about to be, and its answer was not read to its end. If an exception keeps the
        answer from being read, the connection is closed instead of being used again.
    """

    connecting: Callable[[int], AbstractContextManager[None]]
    _read_timeout: float | None
    _write_timeout: float | None
    cursorclass: Any
    quiet = True
    failed = False
    incidents: Incidents | None = None
    aborted_by: Exception | None = None
    not_undone = False
    ends: int | None = None
    _begins_next = False  # the last command ends a transaction and begins the next one
    touched: bool | None = None
    begins_read_only = False
    unanswered = False
    _warnings = 0

    def connect(self, sock: Any = None) -> None:
        timeouts = self._read_timeout, self._write_timeout
        self._read_timeout = self._write_timeout = self.connect_timeout
        self.unanswered = False
        self.cursorclass = _STREAMS.get(self.cursorclass, self.cursorclass)
        try:
            if sock is not None or self.unix_socket:
                super().connect(sock)
                return
            sock = self._reach()
            try:
                with self.connecting(sock.fileno()):
                    super().connect(sock)
            except BaseException:
                sock.close()
                raise
        except RuntimeError as error:  # the login needs a package that is missing
            raise OperationalError(NO_PACKAGE, str(error)) from None
        finally:
            self._read_timeout, self._write_timeout = timeouts

    def _reach(self) -> socket.socket:
        failed: OSError | None = None
        try:
            for family, kind, protocol, _, address in socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM):
                sock = socket.socket(family, kind, protocol)
                try:
                    sock.settimeout(self.connect_timeout)
                    if self.bind_address is not None:
                        sock.bind((self.bind_address, 0))
                    with self.connecting(sock.fileno()):
                        sock.connect(address)
                    _keep_alive(sock)
                    self.host_info = f"socket {self.host}:{self.port}"
                    return sock
                except OSError as error:
                    sock.close()
                    failed = error
                except BaseException:
                    sock.close()
                    raise
        except OSError as error:  # the name does not resolve
            failed = error
        raise OperationalError(2003, f"Can't connect to MySQL server on {self.host!r} ({failed})") from failed

    def _create_ssl_ctx(self, options: Any) -> Any:
        # Without certificates of its own a context verifies nothing, so one is enough for all connections. PyMySQL makes one
        # for each, and loads the system's certificates for it. That takes 20 ms, more than the rest of connecting.
        if not isinstance(options, dict) or options.keys() - {"check_hostname"}:
            return super()._create_ssl_ctx(options)
        if not _contexts:
            _contexts.append(super()._create_ssl_ctx(options))
        return _contexts[0]

    def close(self) -> None:
        with contextlib.suppress(MySQLError):  # closed already
            super().close()

    def _force_close(self) -> None:
        result = getattr(self, "_result", None)
        if result is not None and result.unbuffered_active:
            result.unbuffered_active, result.is_incomplete = False, True
        super()._force_close()

    __del__ = _force_close

    def cursor(self, cursor: Any = None) -> Any:
        return super().cursor(_STREAMS.get(cursor, cursor))

    def _execute_command(self, command: Any, sql: Any) -> None:
        if self.unanswered:
            self._force_close()  # the next step reports that it is closed
        result = self._result
        if result is not None and (result.unbuffered_active or result.has_next):
            self._read_what_is_left(result)
        if self.begins_read_only and command == COM_QUERY and not self.server_status & SERVER_STATUS_IN_TRANS:
            self.begins_read_only = False
            self.query(SNAPSHOT)
            self.begins_read_only = True
        if self.ends is not None:
            is_open = command == COM_QUERY and self.server_status & SERVER_STATUS_IN_TRANS
            self._begins_next = bool(is_open and _BEGINS_NEXT(sql.encode() if isinstance(sql, str) else sql))
        self.unanswered = True
        super()._execute_command(command, sql)

    def _read_what_is_left(self, result: Any) -> None:
        """Read the rest of earlier answers. PyMySQL would read it, too, but would not set `unanswered` meanwhile."""
        if result.unbuffered_active:
            if not result.abandoned:
                warnings.warn("Previous unbuffered result was left incomplete", stacklevel=2)
            self.unanswered = True
            result._finish_unbuffered_query()
            self.unanswered = False
        while self._result.has_next:
            self.next_result()

    def next_result(self, unbuffered: bool = False) -> Any:
        if self.unanswered:
            self._force_close()
            raise InterfaceError(0, "")
        self.unanswered = True
        return super().next_result(unbuffered)

    def set_character_set(self, *arguments: Any, **options: Any) -> None:
        super().set_character_set(*arguments, **options)
        self.unanswered = False

    def show_warnings(self) -> Any:
        found = super().show_warnings()
        self.unanswered = False
        return found

    def _note_error(self, error: MySQLError) -> None:
        """Note an error. An error of the server is a whole answer, after which nothing is left to read."""
        if code(error) != OUT_OF_SYNC:
            self.unanswered = False

    def _read_query_result(self, unbuffered: bool = False) -> Any:
        # This is called for each statement in a text. SQLAlchemy logs the error of a later one, and goes on.
        quiet, self.quiet = self.quiet, False
        was_open = self.server_status & SERVER_STATUS_IN_TRANS
        try:
            affected = super()._read_query_result(unbuffered)
            if self.ends is not None:
                self._count_end(bool(was_open or autocommit(self) or self._result.description is None))
            if self._result.server_status is not None and not affected:
                # It is a SET, or its like. An answer without rows shows whether a transaction is open.
                self.quiet = quiet
                if self.touched is False:
                    self.touched = _is_by_others()
            if unbuffered and self._result.unbuffered_active:
                self._result.__class__ = Rows
            self.unanswered = False
            return affected
        except MySQLError as error:
            self._note_error(error)
            self.failed = True
            self._note_rollback(error)
            raise

    def _count_end(self, is_end: bool) -> None:
        """Count the end of a transaction that an answer shows, or that the command stands for.

        is_end: whether a transaction has ended if none is open now.
        """
        ended = self._begins_next if self.server_status & SERVER_STATUS_IN_TRANS else is_end
        self.ends, self._begins_next = (self.ends or 0) + ended, False

    def _note_rollback(self, error: MySQLError) -> None:
        """Note if the server has rolled back with an error."""
        incidents, number = self.incidents, code(error)
        if incidents is not None and incidents.may_have_rolled_back(number):
            self._note_what_stays()  # the next statement would replace the warnings
            with contextlib.suppress(MySQLError):  # the next statement will fail as well
                if incidents.has_rolled_back(number, self._ask):
                    self.aborted_by = error

    def commit(self) -> None:
        if self._in_transaction():
            try:
                super().commit()
            except MySQLError:
                self._note_what_stays()  # a refused COMMIT is a rollback
                raise
            if self.ends is not None:
                self.ends += 1
        self.quiet, self.failed, self.aborted_by, self.not_undone = True, False, None, False

    def rollback(self) -> None:
        if self._in_transaction():
            super().rollback()
            if self._warnings:
                self._note_what_stays()
        self.quiet, self.failed, self.aborted_by = True, False, None

    def _read_ok_packet(self) -> Any:
        try:
            answer = super()._read_ok_packet()
        except MySQLError as error:
            self._note_error(error)
            raise
        self._warnings = answer.warning_count
        self.unanswered = False
        if self._begins_next:
            self._count_end(False)
        return answer

    def _note_what_stays(self) -> None:
        with contextlib.suppress(MySQLError):  # the connection is lost: the next statement fails as well
            if self.incidents is not None and self.incidents.has_left_writes(self._ask):
                self.not_undone = True

    def _ask(self, sql: str) -> tuple[Sequence[str], Sequence[Sequence[Any]]]:
        """Send a text, as a `Query` does. The cursors of the connection may be the application's."""
        super().query(sql)
        return [column[0] for column in self._result.description or ()], self._result.rows or ()

    def _in_transaction(self) -> bool:
        """Whether COMMIT and ROLLBACK may do something.

        The answer to a SELECT does not show an open transaction to PyMySQL. Without autocommit any SELECT may have begun one.
        An error does not show it either, and a procedure may have begun one before its error.
        """
        result = self._result
        unread = result is not None and (result.has_next or result.unbuffered_active)
        unsaid = self.failed or self.unanswered or not (self.quiet or autocommit(self))
        return unread or unsaid or bool(self.server_status & SERVER_STATUS_IN_TRANS)


_BEGINS_NEXT = re.compile(
    rb"(?:\s|/\*[^*]*+(?:\*(?!/)[^*]*+)*\*/|(?:--\s|#)[^\n]*\n)*(?:commit\s+(?:work\s+)?and\s+chain|begin|start\s)", re.IGNORECASE
).match
"""Matches the commands that begin a transaction at once if they end one."""


def limited(longest: int) -> dict[str, Any]:
    """Return methods for a connection that fails if an answer has more than `longest` bytes."""

    def execute_command(self: Any, command: Any, sql: Any) -> None:
        self.answered = 0
        Connection._execute_command(self, command, sql)

    def read_bytes(self: Any, number: int) -> bytes:
        self.answered += number
        if self.answered > longest:
            self._force_close()
            raise OperationalError(2013, "Lost connection to MySQL server during query: the server's answer has no end")
        read: bytes = Connection._read_bytes(self, number)
        return read

    return {"answered": 0, "_execute_command": execute_command, "_read_bytes": read_bytes}


def _keep_alive(sock: socket.socket) -> None:
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in KEEPALIVE.items():
        if hasattr(socket, name):  # not on every system
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
