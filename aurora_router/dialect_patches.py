"""What stands around the functions of a SQLAlchemy dialect, because no event comes where the router must do something."""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Protocol

from sqlalchemy.engine import Connection, Engine, ExceptionContext
from sqlalchemy.pool import PoolProxiedConnection

from aurora_router.core.pacing import pause
from aurora_router.limits import Place, Places
from aurora_router.mistakes import refusal
from aurora_router.pooling import SERVER, line_of
from aurora_router.servers import Family


class Gatekeeper(Protocol):
    """What looks at everything that passes between SQLAlchemy and the driver: see gate.Gate."""

    dialect: str

    @property
    def asynchronous_commits(self) -> bool: ...

    def before_waiting(self) -> None: ...

    def checked_out(self, raw: PoolProxiedConnection, /) -> None: ...

    def statement(self, cursor: Any, text: str, /, *rest: Any) -> None: ...

    def ends(self, raw: PoolProxiedConnection, /) -> bool:
        """Whether a rollback ends the unit of a connection, so that nothing more is sent in it."""
        ...

    def failed(self, context: ExceptionContext, /) -> BaseException | None: ...

    def commit(self, raw: PoolProxiedConnection, send: Callable[[Any], None]) -> None: ...

    def commit_in_two_phases(self, connection: Connection, send: Callable[[], None], /) -> None: ...

    def set_options(self, connection: Connection, options: Mapping[str, Any], send: Callable[[], None], /) -> None: ...

    def rolled_back(self, raw: PoolProxiedConnection, /) -> None: ...

    def returned(self, unit: Any, /) -> bool: ...


def put_around_rollbacks(engine: Engine, server: Family, gate: Gatekeeper) -> None:
    """Close a connection instead of a rollback that fails, or that would take long; leave out one that would send nothing.

    - One that fails: the server rolls back when the connection ends, and a unit that only read has nothing to be told. A
      connection that is gone fails so, and one whose last statement was interrupted by an exception out of a signal handler. It
      is replaced when it is next checked out.
    - One at the end of a unit whose stream was not read to its end: PyMySQL would read all that is left first.
    """
    dialect: Any = engine.dialect
    plain = dialect.do_rollback

    def careful(connection: Any) -> None:
        if server.blocks(connection.dbapi_connection) and gate.ends(connection):
            connection.invalidate()
            return
        try:
            plain(connection)
        finally:  # the server may have rolled back before, and the connection be lost since
            gate.rolled_back(connection)

    rollback = plain if server.ROLLS_ALL_BACK else careful

    is_idle = server.is_idle

    def tolerant(connection: Any) -> None:
        if is_idle(connection.dbapi_connection):
            return
        try:
            rollback(connection)
        except dialect.loaded_dbapi.Error as error:
            try:
                connection.info[SERVER] = None
            except NotImplementedError:  # SQLAlchemy's first look at a server, on a connection of no pool: it has failed
                raise error from None
            driver: Any = connection.dbapi_connection
            with contextlib.suppress(dialect.loaded_dbapi.Error):  # closed already
                driver.close()
            line = line_of(driver)
            if line is not None:
                line.cut()  # its twin would keep the socket open, and so a transaction with its locks

    dialect.do_rollback = tolerant


def put_around_commits(engine: Engine, gate: Gatekeeper) -> None:
    """Have each COMMIT go through the gate, and both steps of one in two phases. The engine's own event comes before COMMIT only,
    and costs every statement."""
    dialect: Any = engine.dialect

    def through_the_gate(step: Callable[..., None]) -> Callable[..., None]:
        def do(connection: Connection, *arguments: Any, **options: Any) -> None:
            gate.commit_in_two_phases(connection, lambda: step(connection, *arguments, **options))

        return do

    dialect.do_commit = partial(gate.commit, send=dialect.do_commit)
    dialect.do_prepare_twophase = through_the_gate(dialect.do_prepare_twophase)
    dialect.do_commit_twophase = through_the_gate(dialect.do_commit_twophase)


def put_around_options(engine: Engine, gate: Gatekeeper) -> None:
    """Have each execution option of a connection that means something to its driver go through the gate. The engine's own event
    costs every statement."""
    dialect: Any = engine.dialect
    set_options = dialect.set_connection_execution_options

    def do(connection: Connection, options: Mapping[str, Any]) -> None:
        gate.set_options(connection, options, lambda: set_options(connection, options))

    dialect.set_connection_execution_options = do


def explain_mistakes(engine: Engine, server: Family, options: Mapping[str, Any]) -> None:
    """Have errors of connecting repeat no value of an option, and be ConfigurationErrors if the driver can do nothing with one.

    SQLAlchemy's first look at a server is part of it. options: those that the engine was made with.
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
                refused = refusal(error, server, [*of_engine, *given.values()], shown | given.keys())
                if refused is None:
                    raise
            raise refused  # without the driver's error, which may hold on to more than it says

        return do

    dialect.connect = in_words(dialect.connect)
    dialect.initialize = in_words(dialect.initialize)


def ask_for_password(engine: Engine, password: Callable[[], str] | None) -> None:
    """Have each new connection log in with what `password` returns then."""
    if password is None:
        return
    dialect: Any = engine.dialect
    connect = dialect.connect

    def with_password(*arguments: Any, **options: Any) -> Any:
        return connect(*arguments, **{**options, "password": password()})

    dialect.connect = with_password


def limit_connects(engine: Engine, places: Places, timeout: float) -> None:
    """Let few connects be under way at once, and spread those that come in a crowd; who waits is turned away when one fails, for
    it would fare no better. It gets what a connect that fails gives. This stands around the driver's own connect: a connection
    that comes from the pool never waits."""
    dialect: Any = engine.dialect
    connect = dialect.connect

    def in_turn(*arguments: Any, **options: Any) -> Any:
        ahead = places.crowd
        place = Place(places)
        try:
            if place.take(timeout):
                if ahead:
                    time.sleep(pause(ahead, random.random()))
                return connect(*arguments, **options)
        except dialect.loaded_dbapi.Error:
            places.turn_away()
            raise
        finally:
            place.give_back()
        raise dialect.loaded_dbapi.OperationalError("waited in vain for a turn to connect")

    dialect.connect = in_turn
