"""Read and check the URLs and addresses of a cluster. Every error says what to write instead, and repeats no password."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError

from aurora_router.core.instance import Instance
from aurora_router.drivers import DRIVERS, Driver, UrlReading, drivers_for
from aurora_router.errors import ConfigurationError

_URL = re.compile(r"(?P<login>\w[\w+]*://(?:[^:/]*(?::[^@]*)?@)?)(?P<hosts>[^/?]*)(?P<rest>.*)", re.DOTALL)
"""It splits a URL as SQLAlchemy does: the password ends at the first @."""
_HOST = re.compile(r"[\w.-]+")
_IPV6 = re.compile(r"[0-9A-Fa-f:.]+(%[\w.-]+)?")
_MANAGED = re.compile(
    r".+\.rds(-fips)?(\.[a-z0-9-]+)?"
    r"\.(amazonaws\.(com(\.cn)?|eu|au|uk)|c2s\.ic\.gov|sc2s\.sgov\.gov|cloud\.adc-e\.uk|csp\.hci\.ic\.gov)"
)
"""Hosts of Amazon RDS. In China and some other partitions the region stands after "rds"."""
_ON, _OFF = ("1", "true", "yes", "on", "y", "t"), ("", "0", "false", "no", "off", "n", "f")
_PASSWORDS = ("password", "passwd")
"""The drivers' names for the password."""
_OTHER_SECRETS = ("sslpassword", "ssl_key_password", "oauth_client_secret", "scram_client_key", "scram_server_key")
"""The drivers' names for the password of a private key, and for other secrets."""


@dataclass(frozen=True, slots=True)
class Target:
    """A parsed URL of a cluster.

    url: how to connect.
    driver: the driver that the URL names.
    dialect: the SQL dialect of the cluster's servers.
    hosts: the hosts and ports that the URL names, in order.
    secrets: arguments of the driver's connect(), taken out of the URL's query. No repr shows them.
    """

    url: URL
    driver: Driver
    dialect: str
    hosts: tuple[tuple[str, int], ...]
    secrets: Mapping[str, Any] = field(repr=False)

    def at(self, instance: Instance, arguments: Mapping[str, Any]) -> URL:
        """Return the URL of one instance. A connection to a managed host is encrypted unless the user says otherwise.

        A managed host is remote, whether its name comes from the instance or from `connect_args`.

        arguments: `connect_args`. For the driver they override the URL.
        """
        url = self.url.set(host=instance.host, port=instance.port)
        host = arguments.get("host") or instance.host
        if any(_MANAGED.fullmatch(_resolved(name).lower().removesuffix(".")) for name in str(host).split(",")):
            url = url.set(query=self.driver.encrypted(dict(url.query), arguments))
        return url


def _resolved(host: str) -> str:
    """Return a host's name as it is looked up: full-width letters and dots are plain ones there."""
    try:
        return host if host.isascii() else host.encode("idna").decode()
    except UnicodeError:  # no such name can be looked up
        return host


def parse_url(given: str | URL) -> Target:
    """Parse the URL of a cluster.

    It may name several hosts, as libpq does ("h1:5432,h2:5432") or as SQLAlchemy does ("?host=h1:5432&host=h2:5432").

    Raises ConfigurationError, which repeats nothing of the URL: any part of it may be a password in the wrong place.
    """
    url, listed = _split(given)
    driver, dialect = _driver(url)
    query = dict(url.query)
    listed += _take_hosts(query)
    url = _with_password(url, query)
    secrets = {name: query.pop(name) for name in _OTHER_SECRETS if name in query}
    _read_ssl_disabled(query)
    query.pop("target_session_attrs", None)  # the router decides which instance it wants
    query.pop("load_balance_hosts", None)
    if not listed and url.host:
        listed = [_written(url.host, url.port)]
    if not listed:
        raise ConfigurationError(f"the URL names no host; write {driver.EXAMPLE}")
    pairs = tuple(address for address in (_address(host, driver) for host in listed) if address is not None)
    if len(pairs) < len(listed) or "@" in (url.database or ""):
        raise ConfigurationError(f"a host or port of the URL cannot be read; {_like(driver.EXAMPLE)}")
    return Target(url.set(query=query, host=pairs[0][0], port=pairs[0][1]), driver, dialect, pairs, secrets)


def _split(given: str | URL) -> tuple[URL, list[str]]:
    """Return the URL with its first host only, and all hosts if it lists several before its query."""
    example = DRIVERS[0].EXAMPLE
    listed: list[str] = []
    if isinstance(given, str):
        given = _with_quoted_query(given)
        parts = _URL.fullmatch(given)
        if parts is not None:
            if given.count("@") > 1:  # text before the last one may belong to the password
                raise ConfigurationError(f"the URL has more than one @; {_like(example)}. In the query write it as %40, too")
            if "," in parts["hosts"]:
                listed = parts["hosts"].split(",")
                given = parts["login"] + listed[0] + parts["rest"]
    elif not isinstance(given, URL):
        raise ConfigurationError(f"the URL must be a string or a sqlalchemy URL, like {example}")
    url = _parsed(given)
    if url is None:
        raise ConfigurationError(f"the URL cannot be read; {_like(example)}")
    return url, listed


def _driver(url: URL) -> tuple[Driver, str]:
    """Return the driver that the URL names, and the dialect of its servers."""
    dialect, _, name = url.drivername.partition("+")
    drivers = drivers_for("postgresql" if dialect == "postgres" else dialect)
    if not drivers:
        examples = dict.fromkeys(driver.EXAMPLE for driver in DRIVERS)
        raise ConfigurationError(f"the database that the URL names is not supported; use {' or '.join(examples)}")
    example = drivers[0].EXAMPLE
    if not name:
        raise ConfigurationError(f"the URL names no driver; write {example}")
    driver = next((driver for driver in drivers if name == driver.NAME and dialect in driver.DIALECTS), None)
    if driver is None:
        raise ConfigurationError(f"the URL's driver is not supported; write {example}")
    return driver, dialect


def _take_hosts(query: dict[str, Any]) -> list[str]:
    """Remove the hosts and ports from a URL's query, and return them."""
    hosts, ports = _take_list(query, "host"), _take_list(query, "port")
    if ports and len(ports) not in (1, len(hosts)):
        raise ConfigurationError("the URL's query gives other numbers of hosts and ports")
    if len(ports) <= 1:
        ports = (ports or [""]) * len(hosts)
    return [f"{host}:{port}" if port else host for host, port in zip(hosts, ports, strict=True)]


def _take_list(query: dict[str, Any], name: str) -> list[str]:
    """Remove an option from a URL's query, and return its values. Each may have several, with commas between them."""
    values = query.pop(name, ())
    return [part for value in ([values] if isinstance(values, str) else values) for part in value.split(",")]


def _with_password(url: URL, query: dict[str, Any]) -> URL:
    """Move the password from a URL's query to the place where SQLAlchemy hides it."""
    for name in _PASSWORDS:
        secret = query.pop(name, None)
        if isinstance(secret, tuple):
            raise ConfigurationError(f"the URL's query has more than one {name}; leave all out but one, or give it as password=")
        if secret is not None:
            url = url.set(password=secret)
    return url


def _read_ssl_disabled(query: dict[str, Any]) -> None:
    """Remove `ssl_disabled` from a URL's query if it says no, because PyMySQL would take any text for yes."""
    disabled = str(query.get("ssl_disabled", "1")).lower()
    if disabled in _OFF:
        del query["ssl_disabled"]
    elif disabled not in _ON:
        raise ConfigurationError("ssl_disabled cannot be read in the URL's query; write ssl_disabled=true, or leave it out")


def _with_quoted_query(given: str) -> str:
    """Return the URL with each @ of its query as %40, because SQLAlchemy may take one for the end of the login.

    If not all names after the ? are options of the driver, the URL is unchanged, because the ? may be part of a password.
    """
    head, mark, query = given.partition("?")
    dialect, _, rest = head.partition("://")
    drivers = drivers_for(dialect.partition("+")[0])
    if "@" not in query or not drivers or not ("@" in rest or "/" in rest):
        return given
    named = {name if value else "" for name, value, _ in (item.partition("=") for item in query.split("&"))}
    return head + mark + query.replace("@", "%40") if named <= drivers[0].options() else given


def _parsed(given: str | URL) -> URL | None:
    """Return the URL as SQLAlchemy reads it, or None if it cannot.

    SQLAlchemy's error holds parts of the URL, so it must not become the context of one of ours.
    """
    try:
        return make_url(given)
    except (ArgumentError, ValueError):
        return None


def _like(example: str) -> str:
    return f"it should look like {example}, with @ : / , ? in a password as %40 %3A %2F %2C %3F; or give it as password="


def parse_instances(target: Target, others: Iterable[str], reader_endpoint: str | None) -> tuple[Instance, ...]:
    """Return all instances of a router, the URL's first.

    Raises ConfigurationError, which repeats nothing that may hold a password.
    """
    named = [_checked(f"instances[{n}]", other, target.driver) for n, other in enumerate(others)]
    pairs = list(dict.fromkeys([*target.hosts, *named]))
    if reader_endpoint is None:
        return tuple(_instance(pair, reader_only=False) for pair in pairs)
    reader = _checked("reader_endpoint", reader_endpoint, target.driver)
    if reader in pairs:
        raise ConfigurationError(f"the reader endpoint {_id(reader)} is among the other instances as well")
    return (*(_instance(pair, reader_only=False) for pair in pairs), _instance(reader, reader_only=True))


def find_fixed_address(target: Target, *engine_options: Mapping[str, Any] | None) -> str:
    """Name the option, in the URL's query or in `connect_args`, that leads every instance to one server. "" if there is none."""
    arguments = [(options or {}).get("connect_args", {}) for options in engine_options]
    found = (target.driver.fixed_address(dict(target.url.query), given) for given in arguments)
    return next(filter(None, found), "")


def check_distinct(instances: Iterable[Instance], fixed: str) -> None:
    """Refuse several instances that would all be the same server.

    fixed: the result of `find_fixed_address()`.

    Raises ConfigurationError.
    """
    if fixed and len({instance.id for instance in instances}) > 1:
        raise ConfigurationError(
            f"{fixed} leads every connection to the same server, so several instances would be one; leave it out, or name one "
            "instance only"
        )


def parse_instance(address: str, driver: UrlReading) -> Instance:
    """Parse one instance from "host:port" or "host".

    Raises ConfigurationError, which does not repeat the address.
    """
    return _instance(_checked("the instance", address, driver), reader_only=False)


def instance_id(url: URL, driver: UrlReading) -> str:
    """Return the id of the instance that a URL names."""
    return _id((url.host or "", url.port or driver.DEFAULT_PORT))


def _instance(pair: tuple[str, int], *, reader_only: bool) -> Instance:
    return Instance(_id(pair), *pair, reader_only=reader_only)


def _id(pair: tuple[str, int]) -> str:
    return _written(*pair)


def _written(host: str, port: int | None) -> str:
    host = f"[{host}]" if ":" in host else host
    return host if port is None else f"{host}:{port}"


def _checked(name: str, address: object, driver: UrlReading) -> tuple[str, int]:
    found = _address(address, driver)
    if found is None:
        raise ConfigurationError(f'{name} cannot be read; write "host:port": user, password and database come from the URL')
    return found


def _address(address: object, driver: UrlReading) -> tuple[str, int] | None:
    """Return host and port, or None if this is no address."""
    if not isinstance(address, str):
        return None
    match = re.fullmatch(r"(?:\[(?P<v6>[^\]]+)\]|(?P<host>[^:]+))(?::(?P<port>[0-9]{1,5}))?", address.strip())
    if match is None:
        return None
    host, pattern = (match["v6"], _IPV6) if match["v6"] else (match["host"], _HOST)
    port = int(match["port"] or driver.DEFAULT_PORT)
    return (host, port) if pattern.fullmatch(host) and 0 < port < 65536 else None
