"""Wrappers around functions of a SQLAlchemy dialect, for steps of the router that no event of SQLAlchemy covers."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from sqlalchemy.engine import Connection, Engine

from aurora_router.cluster.connect_errors import refusal
from aurora_router.cluster.connection_hooks import ConnectionHooks
from aurora_router.cluster.connection_state import STATE, ConnectionState
from aurora_router.cluster.limits import FairSemaphore, Slot
from aurora_router.cluster.sockets import socket_of
from aurora_router.core.pacing import connect_jitter
from aurora_router.drivers import Driver
from aurora_router.waiting import Waiting


def put_around_rollbacks(engine: Engine, driver: Driver, interceptor: ConnectionHooks) -> None:
    """Close a connection if its rollback fails or would take long, and skip a rollback that would send nothing.

    - A rollback fails if the connection is gone, or if a signal handler's exception interrupted its last statement. The
      server rolls back when the connection ends. A unit that only read need not learn of the failure. The connection is
      replaced at its next checkout.
    - A rollback takes long at the end of a unit that has not read its stream to the end. PyMySQL would read the rest first.
    """
    dialect: Any = engine.dialect
    plain = dialect.do_rollback

    def careful(connection: Any) -> None:
        if driver.blocks(connection.dbapi_connection) and interceptor.ends_with_rollback(connection):
            connection.invalidate()
            return
        try:
            plain(connection)
        finally:
            # Call this after an error, too, because the server may have rolled back before the connection was lost.
            interceptor.on_rollback(connection)

    rollback = plain if driver.ROLLS_ALL_BACK else careful

    is_idle = driver.is_idle

    def tolerant(connection: Any) -> None:
        if is_idle(connection.dbapi_connection):
            return
        try:
            rollback(connection)
        except dialect.loaded_dbapi.Error as error:
            try:
                state: ConnectionState | None = connection.info.get(STATE)
            except NotImplementedError:  # it has no pool: SQLAlchemy's first look at a server failed
                raise error from None
            if state is not None:
                state.server = None
            driver: Any = connection.dbapi_connection
            with contextlib.suppress(dialect.loaded_dbapi.Error):  # closed already
                driver.close()
            tracked = socket_of(driver)
            if tracked is not None:
                # The duplicate would keep the socket open, and with it a transaction and its locks.
                tracked.shut_down()

    dialect.do_rollback = tolerant


def put_around_commits(engine: Engine, interceptor: ConnectionHooks, waiting: Waiting) -> None:
    """Send each COMMIT, and both steps of a COMMIT in two phases, through the interceptor.

    All of them are shielded: see `Waiting.shielded`. SQLAlchemy's event "commit" is no substitute. It comes only before a
    COMMIT, and a listener to it slows down every statement.
    """
    dialect: Any = engine.dialect

    def through_the_gate(unshielded: Callable[..., None]) -> Callable[..., None]:
        step = waiting.shielded(unshielded)

        def do(connection: Connection, *arguments: Any, **options: Any) -> None:
            interceptor.commit_in_two_phases(connection, lambda: step(connection, *arguments, **options))

        return do

    dialect.do_commit = partial(interceptor.commit, send=waiting.shielded(dialect.do_commit))
    dialect.do_prepare_twophase = through_the_gate(dialect.do_prepare_twophase)
    dialect.do_commit_twophase = through_the_gate(dialect.do_commit_twophase)


def put_around_options(engine: Engine, interceptor: ConnectionHooks) -> None:
    """Send execution options that change the driver's connection through the interceptor.

    A listener to SQLAlchemy's own event would slow down every statement.
    """
    dialect: Any = engine.dialect
    set_options = dialect.set_connection_execution_options

    def do(connection: Connection, options: Mapping[str, Any]) -> None:
        interceptor.set_options(connection, options, lambda: set_options(connection, options))

    dialect.set_connection_execution_options = do


def explain_argument_errors(engine: Engine, driver: Driver, options: Mapping[str, Any]) -> None:
    """Hide the values of options in errors of connecting, and raise ConfigurationError if the driver cannot use a value.

    This includes SQLAlchemy's first look at a server.

    options: the options that the engine was made with.
    """
    dialect: Any = engine.dialect
    url = engine.url
    of_engine = [*url.query.values(), *options.values()]
    shown = {url.username, url.database, url.host, url.port, *url.query, *options}

    def in_words(step: Callable[..., Any]) -> Callable[..., Any]:
        def do(*arguments: Any, **given: Any) -> Any:
            try:
                return step(*arguments, **given)
            except Exception as error:
                refused = refusal(error, driver, [*of_engine, *given.values()], shown | given.keys())
                if refused is None:
                    raise
            # Raise it outside of `except`. Otherwise it chains the driver's error, which may hold more than its message.
            raise refused

        return do

    dialect.connect = in_words(dialect.connect)
    dialect.initialize = in_words(dialect.initialize)


def ask_for_password(engine: Engine, password: str | Callable[[], str] | None, options: Mapping[str, Any]) -> None:
    """Have each new connection log in with the current result of `password`, unless `connect_args` have a password.

    password: the setting. If it is a text, the URL has it.
    options: the options that the engine was made with.
    """
    if not callable(password) or "password" in options.get("connect_args", {}):
        return
    dialect: Any = engine.dialect
    connect = dialect.connect

    def with_password(*arguments: Any, **options: Any) -> Any:
        return connect(*arguments, **{**options, "password": password()})

    dialect.connect = with_password


def limit_connects(engine: Engine, slots: FairSemaphore, timeout: float, waiting: Waiting) -> None:
    """Let few connects run at once, and spread many that come at the same time.

    If one connect fails, every waiting thread fails with an error of the driver: its connect would fail, too.
    Only the driver's own connect is wrapped, so a connection from the pool never waits.

    timeout: seconds to wait for a turn.
    """
    dialect: Any = engine.dialect
    connect = dialect.connect

    def in_turn(*arguments: Any, **options: Any) -> Any:
        ahead = slots.demand
        slot = Slot(slots)
        try:
            if slot.acquire(timeout):
                if ahead:
                    waiting.sleep(connect_jitter(ahead, random.random()))
                return connect(*arguments, **options)
        except dialect.loaded_dbapi.Error:
            slots.cancel_waiters()
            raise
        finally:
            slot.release()
        raise dialect.loaded_dbapi.OperationalError(
            "could not connect in time: too many connects to this instance at once; raise connects_at_once or pool_timeout"
        )

    dialect.connect = in_turn
