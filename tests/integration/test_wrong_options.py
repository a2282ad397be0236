"""Options that a driver or a server cannot use are an error at once, which names them.

The value may be a secret, so no error shows it.
"""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import make_url
from sqlalchemy.engine import URL

from aurora_router import ConfigurationError, Router
from aurora_router.local.cluster import Cluster
from tests.integration.shop import BOTH, family
from tests.integration.test_refusals import PATIENCE, USES

MakeRouter = Callable[..., Router]
pytestmark = BOTH

OF_URL = {
    "postgresql": (
        *(("options", "-c work_mem={}"), ("options", "{}"), ("options", "-c {}=1"), ("client_encoding", "{}"), ("plugin", "{}")),
        *(("replication", "{}"), ("service", "{}"), ("hostaddr", "{}"), ("sslmode", "{}"), ("user", "{}"), ("dbname", "{}")),
        *(("connect_timeout", "{}"), ("tcp_user_timeout", "{}"), ("require_auth", "{}"), ("channel_binding", "{}")),
    ),
    "mysql": (
        *(
            ("init_command", "SET {}"),
            ("init_command", "SET @@sql_mode = '{}'"),
            ("init_command", "SET {} = 1"),
            ("sql_mode", "{}"),
        ),
        *(("collation", "{}"), ("charset", "{}"), ("ssl_ca", "/{}"), ("compress", "{}"), ("plugin", "{}"), ("user", "{}")),
        *(("connect_timeout", "{}"), ("ssl_check_hostname", "{}"), ("client_flag", "{}"), ("read_timeout", "{}")),
    ),
}
OF_DRIVER = {
    "postgresql": ("client_encoding", "options", "row_factory", "context", "unknown"),
    "mysql": (
        "init_command",
        "sql_mode",
        "collation",
        "charset",
        "ssl",
        "ssl_ca",
        "read_timeout",
        "conv",
        "unknown",
    ),
}
# Secrets have no dot, because text with a dot may be a parameter's name.
SECRETS = st.from_regex(r"[ZX]q[a-z0-9]{2,8}([ _-]?[A-Za-z0-9]{1,9}){0,3}", fullmatch=True)
READS = ("automatic", "read-only", "orm", "core reading", "raw")


def everything(error: BaseException | None) -> str:
    """The text of an error and of all errors that it holds on to."""
    left, done = [error], []
    while left:
        each = left.pop()
        if each is not None and each not in done:
            done.append(each)
            left += [each.__cause__, each.__context__]
    return "\n".join(f"{each} {each!r}" for each in done)


def parts(secret: str) -> set[str]:
    return {part.lower() for part in secret.split() if len(part) > 2}


def refuses(make: Callable[[], Router], uses: tuple[str, ...], secret: str, log: pytest.LogCaptureFixture) -> None:
    """Check that each use ends at once in an error that shows nothing of the secret."""
    log.clear()
    router = make()
    try:
        for use in uses:
            began = time.monotonic()
            with pytest.raises(ConfigurationError, match=r"check|leave it out") as caught:
                (router.raw_connection(read_only=True) if use == "raw" else USES[use](router))
            assert time.monotonic() - began < PATIENCE, use
            shown = everything(caught.value).lower() + log.text.lower()
            assert not {part for part in parts(secret) if part in shown}, shown
    finally:
        router.close()


def url_with(cluster: Cluster[Any], query: dict[str, str]) -> URL:
    return make_url(cluster.url).update_query_dict(query)


def kind(cluster: Cluster[Any]) -> str:
    return "postgresql" if family(cluster) == "postgresql" else "mysql"


@settings(max_examples=25, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), secret=SECRETS)
def test_no_value_of_the_urls_query_is_shown(
    cluster: Cluster[Any], caplog: pytest.LogCaptureFixture, data: st.DataObject, secret: str
) -> None:
    caplog.set_level(logging.INFO)
    name, value = data.draw(st.sampled_from(OF_URL[kind(cluster)]))
    url = url_with(cluster, {name: value.format(secret)})
    refuses(lambda: Router(url, failover_timeout=2 * PATIENCE), ("automatic", "writing"), secret, caplog)


@pytest.mark.filterwarnings("ignore:.*deleted while still open:ResourceWarning")  # psycopg and SQLAlchemy drop it unclosed
@pytest.mark.parametrize("whose", ["engine_options", "reader_options"])
def test_no_value_of_connect_args_is_shown(cluster: Cluster[Any], caplog: pytest.LogCaptureFixture, whose: str) -> None:
    """No error shows a value of connect_args, and no unit waits for a fault that cannot heal.

    Only units that connect to a reader use the readers' own options.
    """
    secret, readers = "Zq0secret", [reader.address for reader in cluster.readers]
    for name in OF_DRIVER[kind(cluster)]:
        options: dict[str, Any] = {whose: {"connect_args": {name: secret}}}
        uses = READS if whose == "reader_options" else ("automatic", "writing", "raw")
        refuses(
            lambda options=options: Router(cluster.url, instances=readers, failover_timeout=2 * PATIENCE, **options),
            uses,
            secret,
            caplog,
        )
    gc.collect()


def test_a_wrong_option_of_the_driver_is_named(cluster: Cluster[Any], make_router: MakeRouter) -> None:
    """The error names a wrong option of the driver in every kind of unit, also one that is run again."""
    for whose in "engine_options", "reader_options":
        router = make_router(failover_timeout=2 * PATIENCE, **{whose: {"connect_args": {"unknown": 1}}})
        for use in USES if whose == "engine_options" else READS[:-1]:
            with pytest.raises(ConfigurationError, match=r"unknown.*check the URL's query and connect_args"):
                USES[use](router)


@pytest.mark.parametrize("whose", ["engine_options", "reader_options"])
def test_a_wrong_option_of_the_engine_is_told_when_made(cluster: Cluster[Any], whose: str) -> None:
    """A wrong option of the engine is an error when the router is made, not when a unit needs it."""
    for wrong in {"pool_sizze": 5}, {"paramstyle": "Zq0"}, {"echo": "Zq0"}, {"plugins": ["Zq0"]}:
        with pytest.raises(ConfigurationError, match=f"{whose} cannot be used") as caught:
            Router(cluster.url, **{whose: wrong})
        assert "zq0" not in everything(caught.value).lower()


HOPELESS: dict[str, tuple[dict[str, str], ...]] = {
    "postgresql": (
        *({"sslrootcert": "system", "sslmode": "require"}, {"sslnegotiation": "direct"}, {"gssencmode": "require"}),
        *({"channel_binding": "require"}, {"require_auth": "md5"}, {"require_auth": "none,!md5"}, {"service": "nowhere"}),
        {"ssl_min_protocol_version": "TLSv1.3", "ssl_max_protocol_version": "TLSv1.2"},
    ),
    "mysql": (
        *({"init_command": "SET nowhere = 1"}, {"init_command": "SELEC"}, {"init_command": "SET time_zone = 'No/Where'"}),
        *({"init_command": "SELECT * FROM nowhere"}, {"init_command": "CALL nowhere()"}, {"init_command": "SELECT nowhere"}),
        *({"init_command": "SET max_connections = 9"}, {"init_command": "SET version = 1"}, {"sql_mode": "nowhere"}),
    ),
}


@pytest.mark.parametrize("whose", ["url", "readers"])
def test_what_waiting_cannot_heal_is_told_at_once(cluster: Cluster[Any], make_router: MakeRouter, whose: str) -> None:
    """A fault that waiting cannot heal is raised at once, in the driver's or server's words, with what to check.

    This holds even if only the readers' connections have the fault.
    """
    readers = [reader.address for reader in cluster.readers]
    for wrong in HOPELESS[kind(cluster)]:
        url = url_with(cluster, wrong) if whose == "url" else make_url(cluster.url)
        of_readers: dict[str, Any] = {} if whose == "url" else {"reader_options": {"connect_args": wrong}}
        router = make_router(url, instances=readers, failover_timeout=2 * PATIENCE, **of_readers)
        began = time.monotonic()
        with pytest.raises(ConfigurationError, match=r"check .*connect_args"):
            router.connect(read_only=whose == "readers")
        assert time.monotonic() - began < PATIENCE, wrong


@pytest.mark.engines("mariadb", "mysql")
def test_a_server_whose_init_connect_fails_is_told_at_once(cluster: Cluster[Any], make_router: MakeRouter) -> None:
    """If init_connect fails, the error has the server's words, and the next unit works once it is mended.

    The server ends each connection only after it has let it in.
    """
    try:
        for instance in cluster.instances:
            cluster.execute("SET GLOBAL init_connect = 'SELECT nowhere'", instance=instance)
        router = make_router(failover_timeout=2 * PATIENCE)
        began = time.monotonic()
        with pytest.raises(ConfigurationError, match=r"init_connect command failed.*correct init_connect on the server"):
            router.connect()
        assert time.monotonic() - began < PATIENCE
    finally:
        for instance in cluster.instances:
            cluster.execute("SET GLOBAL init_connect = ''", instance=instance)
    router.connect().close()
