"""Check the values that users pass. Every error says what to write instead, and repeats no secret.

A check takes the name and the value of an argument, and returns the value to keep.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import inspect
import math
import re
import types
from collections.abc import Callable, Iterable, Mapping, Set
from typing import Any, TypeVar, get_type_hints

from sqlalchemy.engine import URL
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from aurora_router.errors import ConfigurationError

T = TypeVar("T")
Check = Callable[[str, Any], Any]


def optional(check: Check) -> Check:
    """Return a check that accepts None, and otherwise does what this check does."""
    return lambda name, value: None if value is None else check(name, value)


def check_password(name: str, password: object) -> str | Callable[[], str] | None:
    """Return the password, or a function that asks for it and checks the answer.

    Raises ConfigurationError, which does not repeat the password.
    """
    if isinstance(password, str):
        _refuse_nul(f"{name}=", password)
    if password is None or isinstance(password, str):
        return password
    if not callable(password):
        raise ConfigurationError(f"{name}: give a text, or a function without arguments that returns one")

    def ask() -> str:
        """Return the password.

        Raises ConfigurationError.
        """
        try:
            secret = password()
        except Exception as error:
            raise ConfigurationError(
                f"no password: the function that was given as {name}= raised {type(error).__name__}"
            ) from error
        if not isinstance(secret, str):
            kind = type(secret).__name__
            raise ConfigurationError(f"no password: the function that was given as {name}= returned no text, but {kind}")
        _refuse_nul(f"no password: what the function that was given as {name}= returned", secret)
        return secret

    return ask


def check_parts(url: URL, secrets: Iterable[object]) -> None:
    """Refuse a URL with a NUL character in any of its parts.

    secrets: values that were taken out of the URL.

    Raises ConfigurationError.
    """
    _refuse_nul("the URL", url.username, url.password, url.database, *url.query, *url.query.values(), *secrets)


def _refuse_nul(what: str, *values: object) -> None:
    """Refuse a text with a NUL character. libpq stops reading there, and the host and the port may come after it.

    Raises ConfigurationError, which does not repeat the text.
    """
    if any("\0" in value for value in values if isinstance(value, str)):
        raise ConfigurationError(f"{what} has a NUL character (%00 in a URL), where the driver would stop reading; leave it out")


def named(name: str, value: object) -> str:
    """Return an argument as an error may show it. Any value but a number may be a secret in the wrong place, or hold one."""
    return f"{name}={value!r}" if value is None or isinstance(value, int | float) else f"{name}=..."


def check_choice(name: str, value: T, choices: tuple[str | None, ...]) -> T:
    """Raise ConfigurationError unless the value is one of the choices."""
    if value not in choices:
        raise ConfigurationError(f"{named(name, value)}: use one of {', '.join(map(repr, choices))}")
    return value


def check_flag(name: str, value: T) -> T:
    """Raise ConfigurationError unless the value is True or False."""
    if value is not True and value is not False:
        raise ConfigurationError(f"{named(name, value)}: use True or False")
    return value


def check_seconds(name: str, value: T, *, or_zero: bool = False) -> T:
    """Raise ConfigurationError unless the value is a positive, finite number, or 0 if that is allowed."""
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not math.isfinite(value)
        or value < 0
        or not (value or or_zero)
    ):
        raise ConfigurationError(f"{named(name, value)}: give a number of seconds{', 0 or' if or_zero else ''} above 0")
    return value


def check_share(name: str, value: T) -> T:
    """Raise ConfigurationError unless the value is above 0 and at most 1."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
        raise ConfigurationError(f"{named(name, value)}: give a share above 0 and at most 1, like 0.5")
    return value


def check_count(name: str, value: T) -> T:
    """Raise ConfigurationError unless the value is a whole number of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigurationError(f"{named(name, value)}: give a whole number, 1 or more")
    return value


def check_addresses(name: str, value: Iterable[str]) -> tuple[str, ...]:
    """Raise ConfigurationError unless the value is a collection. The error does not repeat the value.

    The addresses are parsed later.
    """
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable):
        raise ConfigurationError(f'{name} must be a list, like ["db-2:5432", "db-3:5432"]')
    return tuple(value)


def check_names(name: str, value: Iterable[str]) -> tuple[str, ...]:
    """Raise ConfigurationError unless the value is a collection of strings."""
    listed = tuple(value) if isinstance(value, Iterable) else ()
    if isinstance(value, str) or not isinstance(value, Iterable) or not all(isinstance(item, str) for item in listed):
        raise ConfigurationError(f"{name}: give a list of names")
    return listed


def check_keys(name: str, value: Iterable[str | bytes]) -> tuple[str | bytes, ...]:
    """Raise ConfigurationError unless the value is an ordered collection of secrets. The error does not repeat them."""
    ordered = isinstance(value, Iterable) and not isinstance(value, str | bytes | Set | Mapping)
    listed = tuple(value) if ordered else ("",)
    if not all(isinstance(item, str | bytes) and item for item in listed):
        raise ConfigurationError(f"{name}: give a list of secrets, texts or bytes, the newest last")
    return listed


def check_http_name(name: str, value: object) -> None:
    """Raise ConfigurationError unless the value can be the name of a cookie and of a header."""
    if not isinstance(value, str) or re.fullmatch(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+", value) is None:
        raise ConfigurationError(f"{named(name, value)}: give a name of letters, digits, - and _")


def check_callables(name: str, value: Iterable[Callable[..., Any]]) -> tuple[Callable[..., Any], ...]:
    """Raise ConfigurationError unless the value is a collection of callables."""
    listed = tuple(value) if isinstance(value, Iterable) else ()
    if not isinstance(value, Iterable) or not all(callable(item) for item in listed):
        raise ConfigurationError(f"{name}: give a list of functions")
    return listed


def check_run_transaction(
    Session: object,
    *,
    deadline: object = None,
    stop: object = None,
    wait: object = None,
    commit_check: object = "xid",
    **unknown: object,
) -> None:
    """Raise ConfigurationError for arguments that Router.run_transaction() cannot use.

    Without this check, the mistake would show only at the next failover.
    """
    if unknown:
        names = ", ".join(f"{name}=" for name in unknown)
        raise ConfigurationError(f"transactional() does not know {names}: use deadline, stop, wait or commit_check")
    if not callable(Session):
        raise ConfigurationError("Session must be a sessionmaker, like sessionmaker(class_=RoutingSession, router=router)")
    if deadline is not None:
        check_seconds("deadline", deadline)
    for name, policy in (("stop", stop), ("wait", wait)):
        if policy is not None and not callable(policy):
            raise ConfigurationError(f"{named(name, policy)}: give one of tenacity's policies, like tenacity.{_POLICIES[name]}")
    check_choice("commit_check", commit_check, ("xid", "table", None))


def check_route(route: object) -> None:
    """Raise ConfigurationError unless the execution option `route` may have this value."""
    if route not in (None, "writer", "reader"):
        raise ConfigurationError('execution option route=...: use "writer" or "reader"')


def check_factory(factory: object) -> None:
    """Raise ConfigurationError unless Router.transactional() can be sure that the factory makes sessions.

    If `@router.transactional` lacks its parentheses, the factory is the decorated function, which would never run. So a factory
    that could take a session must be annotated to return one.
    """
    made: Any = factory
    while isinstance(made, functools.partial):
        made = made.func
    name = getattr(made, "__name__", type(made).__name__)  # a repr may show a secret
    instead = "give a sessionmaker, as in @router.transactional(Session)"
    returned = _returned_by(made)
    is_certain = isinstance(made, sessionmaker | scoped_session) or _is_session(made) or _is_session(returned)
    if not is_certain and (returned is type(None) or _takes_one(made) or (made is factory and _has_parameters(made))):
        raise ConfigurationError(f"Session={name}: it does not say that it makes sessions (-> RoutingSession); {instead}")
    try:
        inspect.signature(factory).bind()  # type: ignore[arg-type]  # it is callable
    except TypeError as error:
        raise ConfigurationError(f"Session={name}: it needs arguments ({error}); {instead}") from None


def _takes_one(function: Any) -> bool:
    """Whether a function can be called with one argument, as far as its signature tells."""
    try:
        inspect.signature(function).bind_partial(None)
    except TypeError:
        return False
    except ValueError:  # written in C: its signature is not known
        return True
    return True


def _has_parameters(function: Any) -> bool:
    """Whether a function whose signature is known has a parameter of any kind."""
    return bool(inspect.signature(function).parameters)


def _is_session(kind: object) -> bool:
    return isinstance(kind, type) and issubclass(kind, Session)


def _returned_by(function: Any) -> object:
    """Return the annotated return type of a function, or of an object that can be called. None if it is unknown."""
    annotated = function if inspect.isroutine(function) or hasattr(function, "__wrapped__") else type(function).__call__
    try:
        return get_type_hints(annotated).get("return")
    except Exception:  # some names exist for type checkers alone
        return None


def check_function(fn: object) -> None:
    """Raise ConfigurationError unless Router.transactional() can decorate the function."""
    if not callable(fn):
        raise ConfigurationError("transactional() decorates a function; write @router.transactional(Session) above one")
    name = getattr(fn, "__name__", type(fn).__name__)
    called = _called_by(fn)
    if inspect.iscoroutinefunction(called) or inspect.isgeneratorfunction(called) or inspect.isasyncgenfunction(called):
        raise ConfigurationError(f"{name} is a coroutine or a generator: it would run after its unit")
    if not _takes_one(fn):
        raise ConfigurationError(f"{name} takes no session; write it like def {name}(session, ...)")


def _called_by(fn: Any) -> object:
    """Return the function that runs if this object is called. A function that wraps another is not looked into."""
    while isinstance(fn, functools.partial | staticmethod):
        fn = fn.func if isinstance(fn, functools.partial) else fn.__func__
    return fn if inspect.isroutine(fn) or isinstance(fn, type) else type(fn).__call__


def check_result(result: Any) -> None:
    """Raise ConfigurationError for the result of a function that would do its work after its unit. The work is ended."""
    if not (isinstance(result, _LATER) or hasattr(type(result), "__await__")):
        return
    end = getattr(result, "close", None) or getattr(result, "cancel", None)
    if end is not None:
        end()
    kind = type(result).__name__
    raise ConfigurationError(f"the function's result ({kind}) is like a coroutine or a generator: it would run after its unit")


_LATER = (
    *(types.GeneratorType, types.AsyncGeneratorType, map, filter, concurrent.futures.Future),
    *(contextlib.ContextDecorator, contextlib.AsyncContextDecorator),  # what functions with @contextmanager return
)


_POLICIES = {"stop": "stop_after_attempt(3)", "wait": "wait_fixed(0.1)"}

_OURS = {
    "poolclass": "the router relies on SQLAlchemy's QueuePool",
    "pool": "each instance has a pool of its own",
    "creator": "the router connects to several instances; give connect_args instead",
    "strategy": "it is no longer a SQLAlchemy option",
    "pool_reset_on_return": "the router relies on a rollback when a connection comes back",
}


_LEVELS = ("AUTOCOMMIT", "READ UNCOMMITTED", "READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE")

_NESTED = ("connect_args", "execution_options")
"""Options that are dicts. The options of readers are merged into those of all instances item by item."""


def check_engine_options(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of the options.

    Raises ConfigurationError for options of create_engine() that would defeat the router.
    """
    if not isinstance(options, Mapping):
        raise ConfigurationError(f"{name} must be a dict of create_engine() options")
    if not all(isinstance(option, str) and option.isidentifier() for option in options):
        raise ConfigurationError(f"{name} has a key that is no name of an option; give names like pool_size")
    for option, why in _OURS.items():
        if option in options:
            raise ConfigurationError(f"{name}[{option!r}] cannot be used: {why}")
    for option in _NESTED:
        if not isinstance(options.get(option, {}), Mapping):
            raise ConfigurationError(f"{name}[{option!r}] must be a dict")
    _check_connect_args(name, options.get("connect_args", {}))
    for level in (options.get("isolation_level"), options.get("execution_options", {}).get("isolation_level")):
        if level is not None and not (isinstance(level, str) and level.replace("_", " ").upper() in _LEVELS):
            raise ConfigurationError(f"{name}: use one of {', '.join(_LEVELS)} as isolation level")
    for option, usual in _POOL.items():
        value = options.get(option, usual)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ConfigurationError(f"{name}[{option!r}]=...: give a number, like {usual}")
    return dict(options)


def _check_connect_args(name: str, arguments: Mapping[str, Any]) -> None:
    if not all(isinstance(argument, str) and argument.isidentifier() for argument in arguments):
        raise ConfigurationError(f"{name}: connect_args has a key that is no name of an option; give names like connect_timeout")
    if "conninfo" in arguments:  # psycopg repeats it in errors, its password included
        raise ConfigurationError(f"{name}: connect_args['conninfo'] cannot be used: what it says comes from the URL")
    _refuse_nul(f"{name}: a value of connect_args", *arguments.values())
    if isinstance(arguments.get("ssl_disabled"), str):
        raise ConfigurationError(f"{name}: connect_args['ssl_disabled'] must be True or False; PyMySQL takes any text for True")


def check_reader_options(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Check options for readers alone, as check_engine_options() does."""
    checked = check_engine_options(name, options)
    if get_isolation(checked) is not None:
        raise ConfigurationError(f"{name} cannot have an isolation level: the level of engine_options decides where units go")
    return checked


def merge_options(options: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Merge engine options over others. Options that are dicts are merged item by item."""
    nested = {option: {**options.get(option, {}), **over[option]} for option in _NESTED if option in over}
    return {**options, **over, **nested}


def get_pool_limits(options: Mapping[str, Any]) -> tuple[float, float]:
    """Return how many connections an instance's pool may have, and the seconds to wait for one.

    The options are read as create_engine() reads them.
    """
    size, overflow, timeout = (options.get(name, usual) for name, usual in _POOL.items())
    return (math.inf if size <= 0 or overflow < 0 else size + overflow), max(timeout, 0.0)


_POOL = {"pool_size": 5, "max_overflow": 10, "pool_timeout": 30.0}
"""The defaults of SQLAlchemy's pool."""


def get_isolation(options: Mapping[str, Any]) -> str | None:
    """Return the isolation level that the engine options ask for; None for the server's default."""
    level = options.get("isolation_level") or options.get("execution_options", {}).get("isolation_level")
    return None if level is None else str(level)
