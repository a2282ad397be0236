"""What a user may give a Router, read and checked: URLs, addresses, options. Every refusal says what to write instead."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Set
from dataclasses import dataclass
from typing import Any

from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError

from aurora_router.core.topology import Instance
from aurora_router.errors import ConfigurationError
from aurora_router.servers import FAMILIES, Family

_HOSTS = re.compile(r"^[^/?#]*//(?:[^@]*@)?(?P<hosts>[^/?#@]*,[^/?#@]*)(?=[/?#]|$)")
_MANAGED = (".rds.amazonaws.com", ".rds.amazonaws.com.cn")


@dataclass(frozen=True, slots=True)
class Target:
    """A URL taken apart: how to connect, the family and the SQL dialect of its servers, the hosts that it names, in order."""

    url: URL
    server: Family
    dialect: str
    hosts: tuple[tuple[str, int], ...]


def read_url(given: str | URL) -> Target:
    """The URL of a cluster. Several hosts may be given as libpq has them ("h1:5432,h2:5432") or as SQLAlchemy has them
    ("?host=h1:5432&host=h2:5432"). Raises ConfigurationError, which never repeats the URL: it may hold a password."""
    example = FAMILIES["postgresql"].EXAMPLE
    listed: list[str] = []
    if isinstance(given, str):
        several = _HOSTS.match(given)
        if several is not None:
            listed = several["hosts"].split(",")
            given = given[: several.start("hosts")] + listed[0] + given[several.end("hosts") :]
    elif not isinstance(given, URL):
        raise ConfigurationError(f"the URL must be a string or a sqlalchemy URL, like {example}")
    try:
        url = make_url(given)
    except (ArgumentError, ValueError):
        raise ConfigurationError(f"the URL cannot be read; it should look like {example}") from None
    dialect, _, driver = url.drivername.partition("+")
    server = FAMILIES.get("postgresql" if dialect == "postgres" else dialect)
    if server is None:
        examples = dict.fromkeys(family.EXAMPLE for family in FAMILIES.values())
        raise ConfigurationError(f"{dialect!r} is not supported; use {' or '.join(examples)}")
    example = server.EXAMPLE
    if not driver:
        raise ConfigurationError(f"the URL names no driver; write {example}")
    if dialect not in FAMILIES or driver != server.DRIVER:
        raise ConfigurationError(f"the driver {url.drivername!r} is not supported; write {example}")
    query = dict(url.query)
    hosts = query.pop("host", ())
    ports = query.pop("port", ())
    from_query = [h for entry in ([hosts] if isinstance(hosts, str) else hosts) for h in entry.split(",")]
    port_list = [p for entry in ([ports] if isinstance(ports, str) else ports) for p in entry.split(",")]
    if port_list and len(port_list) not in (1, len(from_query)):
        raise ConfigurationError("the URL's query gives other numbers of hosts and ports")
    for index, host in enumerate(from_query):
        port = port_list[index if len(port_list) > 1 else 0] if port_list else ""
        listed.append(f"{host}:{port}" if port else host)
    secret = query.pop("password", None)
    if isinstance(secret, str):
        url = url.set(password=secret)  # where SQLAlchemy hides it
    query.pop("target_session_attrs", None)  # the router decides which instance it wants
    query.pop("load_balance_hosts", None)
    if listed:
        pairs = tuple(_address(address, server) for address in listed)
    elif url.host:
        number = server.DEFAULT_PORT if url.port is None else url.port
        strange = re.search(r"[\s@,/?#]", url.host) or "@" in (url.database or "") or not 0 < number < 65536
        if strange:  # not repeated: it may be the end of a password
            raise ConfigurationError(
                f"the URL's host or port cannot be read; it should look like {example}, with @ : / in the password as %40 %3A %2F"
            )
        pairs = ((url.host, number),)
    else:
        raise ConfigurationError(f"the URL names no host; write {example}")
    if any(host.endswith(_MANAGED) for host, _ in pairs):
        query = server.encrypted(query)  # remote and managed: never in the clear unless the user says so
    return Target(url.set(query=query, host=pairs[0][0], port=pairs[0][1]), server, dialect, pairs)


def instances(target: Target, others: Iterable[str], reader_endpoint: str | None) -> tuple[Instance, ...]:
    """All instances of a router, the URL's first. Raises ConfigurationError."""
    if isinstance(others, str) or not isinstance(others, Iterable):
        raise ConfigurationError(f"instances must be a list, like [{others!r}]")
    pairs = list(dict.fromkeys([*target.hosts, *(_address(other, target.server) for other in others)]))
    if reader_endpoint is None:
        return tuple(_instance(pair, reader_only=False) for pair in pairs)
    reader = _address(reader_endpoint, target.server)
    if reader in pairs:
        raise ConfigurationError(f"the reader endpoint {_id(reader)} is among the other instances as well")
    return (*(_instance(pair, reader_only=False) for pair in pairs), _instance(reader, reader_only=True))


def instance(address: str, server: Family) -> Instance:
    """One instance from "host:port" or "host". Raises ConfigurationError."""
    return _instance(_address(address, server), reader_only=False)


def _instance(pair: tuple[str, int], *, reader_only: bool) -> Instance:
    return Instance(_id(pair), *pair, reader_only=reader_only)


def _id(pair: tuple[str, int]) -> str:
    host, port = pair
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _address(address: str, server: Family) -> tuple[str, int]:
    if not isinstance(address, str) or "//" in address or "@" in address:
        raise ConfigurationError('an instance is given as "host:port"; user, password and database come from the URL')
    match = re.fullmatch(r"(?:\[(?P<v6>[^\]]+)\]|(?P<host>[^:\s]+))(?::(?P<port>\d{1,5}))?", address.strip())
    if match is None or not 0 < int(match["port"] or server.DEFAULT_PORT) < 65536:
        raise ConfigurationError(f'{address!r} is no instance; write "host:port"')
    return (match["v6"] or match["host"], int(match["port"] or server.DEFAULT_PORT))


def check_choice(name: str, value: object, choices: tuple[str | None, ...]) -> None:
    """Raises ConfigurationError unless the value is one of the choices."""
    if value not in choices:
        raise ConfigurationError(f"{name}={value!r}: use one of {', '.join(map(repr, choices))}")


def check_flag(name: str, value: object) -> None:
    """Raises ConfigurationError unless the value is True or False."""
    if value is not True and value is not False:
        raise ConfigurationError(f"{name}={value!r}: use True or False")


def check_seconds(name: str, value: object, *, none: bool = False) -> None:
    """Raises ConfigurationError unless the value is a positive, finite number, or 0 where that is allowed."""
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not math.isfinite(value)
        or value < 0
        or not (value or none)
    ):
        raise ConfigurationError(f"{name}={value!r}: give a number of seconds{', 0 or' if none else ''} above 0")


def check_share(name: str, value: object) -> None:
    """Raises ConfigurationError unless the value is above 0 and at most 1."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
        raise ConfigurationError(f"{name}={value!r}: give a share above 0 and at most 1, like 0.5")


def check_count(name: str, value: object) -> None:
    """Raises ConfigurationError unless the value is a whole number of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigurationError(f"{name}={value!r}: give a whole number, 1 or more")


def names(name: str, value: Iterable[str]) -> tuple[str, ...]:
    """Raises ConfigurationError unless the value is a collection of strings."""
    listed = tuple(value) if isinstance(value, Iterable) else ()
    if isinstance(value, str) or not isinstance(value, Iterable) or not all(isinstance(item, str) for item in listed):
        raise ConfigurationError(f"{name}: give a list of names")
    return listed


def keys(name: str, value: Iterable[str | bytes]) -> tuple[str | bytes, ...]:
    """Raises ConfigurationError unless the value is a collection of secrets, which it does not repeat."""
    ordered = isinstance(value, Iterable) and not isinstance(value, str | bytes | Set | Mapping)
    listed = tuple(value) if ordered else ("",)
    if not all(isinstance(item, str | bytes) and item for item in listed):
        raise ConfigurationError(f"{name}: give a list of secrets, texts or bytes, the newest last")
    return listed


def check_http_name(name: str, value: object) -> None:
    """Raises ConfigurationError unless the value can be the name of a cookie and of a header."""
    if not isinstance(value, str) or re.fullmatch(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+", value) is None:
        raise ConfigurationError(f"{name}={value!r}: give a name of letters, digits, - and _")


def callables(name: str, value: Iterable[Callable[..., Any]]) -> tuple[Callable[..., Any], ...]:
    """Raises ConfigurationError unless the value is a collection of callables."""
    listed = tuple(value) if isinstance(value, Iterable) else ()
    if not isinstance(value, Iterable) or not all(callable(item) for item in listed):
        raise ConfigurationError(f"{name}: give a list of functions")
    return listed


def check_run(
    Session: object, *, deadline: object = None, stop: object = None, wait: object = None, commit_check: object = "xid"
) -> None:
    """Raises ConfigurationError for what Router.run_transaction() cannot work with: better now than at the next failover."""
    if not callable(Session):
        raise ConfigurationError("Session must be a sessionmaker, like sessionmaker(class_=RoutingSession, router=router)")
    if deadline is not None:
        check_seconds("deadline", deadline)
    for name, policy in (("stop", stop), ("wait", wait)):
        if policy is not None and not callable(policy):
            raise ConfigurationError(f"{name}={policy!r}: give one of tenacity's policies, like tenacity.{_POLICIES[name]}")
    check_choice("commit_check", commit_check, ("xid", "table", None))


_POLICIES = {"stop": "stop_after_attempt(3)", "wait": "wait_fixed(0.1)"}

_OURS = {
    "poolclass": "the router relies on SQLAlchemy's QueuePool",
    "pool": "each instance has a pool of its own",
    "creator": "the router connects to several instances; give connect_args instead",
    "strategy": "it is no longer a SQLAlchemy option",
    "pool_reset_on_return": "the router relies on a rollback when a connection comes back",
}


def check_engine_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Raises ConfigurationError for options of create_engine() that would defeat the router."""
    if not isinstance(options, Mapping):
        raise ConfigurationError("engine_options must be a dict of create_engine() options")
    for option, why in _OURS.items():
        if option in options:
            raise ConfigurationError(f"engine_options[{option!r}] cannot be used: {why}")
    for option in ("connect_args", "execution_options"):
        if not isinstance(options.get(option, {}), Mapping):
            raise ConfigurationError(f"engine_options[{option!r}] must be a dict")
    return dict(options)


def pool_limits(options: Mapping[str, Any]) -> tuple[float, float]:
    """How many connections the pool of an instance may have, and the seconds to wait for one, as create_engine() reads them.
    Raises ConfigurationError."""
    size, overflow, timeout = (options.get(name, usual) for name, usual in _POOL.items())
    for name, value in zip(_POOL, (size, overflow, timeout), strict=True):
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ConfigurationError(f"engine_options[{name!r}]={value!r}: give a number, like {_POOL[name]}")
    return (math.inf if size <= 0 or overflow < 0 else size + overflow), max(timeout, 0.0)


_POOL = {"pool_size": 5, "max_overflow": 10, "pool_timeout": 30.0}
"""What SQLAlchemy's pool has where nothing else is asked for."""


def isolation(options: Mapping[str, Any]) -> str | None:
    """The isolation level that the engine options ask for, None for the server's default."""
    level = options.get("isolation_level") or options.get("execution_options", {}).get("isolation_level")
    return None if level is None else str(level)
