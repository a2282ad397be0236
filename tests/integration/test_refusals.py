"""A server's refusal is raised at once, in its words, and no unit waits for a fault that cannot heal.

A function may supply a password that changes.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psycopg
import pymysql
import pytest
from sqlalchemy import insert, make_url, text
from sqlalchemy.exc import OperationalError

from aurora_router import ConfigurationError, Failure, NoWriterAvailable, Router, classify_error
from aurora_router.core import events
from aurora_router.local.cluster import Cluster, LocalInstance
from tests.integration.shop import (
    BOTH,
    Item,
    connection_ids,
    eventually,
    family,
    held_by,
    raise_stock,
    sessions,
    set_password,
    until_readers_serve,
)
from tests.integration.test_router import says

MakeRouter = Callable[..., Router]
pytestmark = BOTH

ROTATED = "rotated-and-long"
WORDS = r"password authentication failed|Access denied"
REFUSED = (OperationalError, psycopg.OperationalError, pymysql.OperationalError)  # a raw connection raises the driver's own
PATIENCE = 30.0  # seconds; a unit that waits for a writer waits twice as long


@pytest.fixture
def rotate(cluster: Cluster[Any]) -> Iterator[Callable[[str], None]]:
    """A function that gives the application's user another password on all servers, until the test ends."""

    def rotate(password: str) -> None:
        set_password(cluster, password)
        cluster.wait_in_sync()

    yield rotate
    rotate(cluster.app_password)


@pytest.fixture
def shut_out(cluster: Cluster[Any]) -> Iterator[Callable[[LocalInstance], None]]:
    """A function that makes a reader refuse the application's user, until the test ends."""
    undo: list[Callable[[], object]] = []

    def shut_out(reader: LocalInstance) -> None:
        if family(cluster) == "postgresql":
            rules = cluster._server(reader).data / "pg_hba.conf"
            usual = rules.read_text()
            rules.write_text("host all app all reject\n" + usual)
            undo.append(lambda: (rules.write_text(usual), cluster.execute("SELECT pg_reload_conf()", instance=reader)))
            cluster.execute("SELECT pg_reload_conf()", instance=reader)
            return
        at_reader: Any = cluster
        change = "SET sql_log_bin = 0", "ALTER USER app IDENTIFIED BY '{}'"
        undo.append(lambda: at_reader._order(reader, *(each.format(cluster.app_password) for each in change)))
        at_reader._order(reader, *(each.format(ROTATED) for each in change))

    yield shut_out
    for each in undo:
        each()


def end_all_connections(cluster: Cluster[Any]) -> None:
    """End the connections of the application's user on every server."""
    for instance in cluster.instances:
        if family(cluster) == "postgresql":
            end = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'app'"
            cluster.execute(end, instance=instance)
            continue
        for number in connection_ids(cluster, instance):
            cluster.execute(f"KILL {number}", instance=instance)


def forget_pools(router: Router) -> None:
    for instance in router.topology:
        router.engine(instance).dispose()


def without_password(cluster: Cluster[Any]) -> str:
    return make_url(cluster.url).set(password=None).render_as_string()


USES: dict[str, Callable[[Router], object]] = {
    "automatic": lambda router: sessions(router)().execute(text("SELECT 1")),
    "read-only": lambda router: sessions(router)(read_only=True).execute(text("SELECT 1")),
    "writing": lambda router: sessions(router)(read_only=False).execute(text("SELECT 1")),
    "orm": lambda router: sessions(router)().get(Item, 1),
    "insert": lambda router: sessions(router)().execute(insert(Item).values(id=99)),
    "run_transaction": lambda router: router.run_transaction(sessions(router), raise_stock),
    "core": lambda router: router.connect(),
    "core reading": lambda router: router.connect(read_only=True),
    "raw": lambda router: router.raw_connection(),
}


def test_a_rotated_password_is_told_at_once(
    cluster: Cluster[Any], make_router: MakeRouter, rotate: Callable[[str], None]
) -> None:
    """When servers refuse the password, a new connection fails with their words; no unit waits for a writer."""
    router = make_router(failover_timeout=2 * PATIENCE)
    router.init_commit_table()
    rotate(ROTATED)
    for how, use in USES.items():
        forget_pools(router)
        began = time.monotonic()
        with pytest.raises(REFUSED, match=WORDS) as caught:
            use(router)
        assert time.monotonic() - began < PATIENCE, how
        assert classify_error(caught.value) == (Failure.REFUSED, False, True, False), how
        assert cluster.app_password not in says(caught.value)


def read_in_each_way(router: Router) -> Iterator[Callable[[], None]]:
    """Reads that close their session or connection."""

    def of_session(read_only: bool | None) -> None:
        with sessions(router)(read_only=read_only) as s:
            s.execute(text("SELECT 1")).all()

    def of_objects() -> None:
        with sessions(router)() as s:
            s.get(Item, 1)

    def of_core() -> None:
        with router.connect(read_only=True) as connection:
            connection.execute(text("SELECT 1"))

    yield from (lambda: of_session(None), lambda: of_session(True), of_objects, of_core)


def test_a_reader_that_lets_nobody_in_is_passed_over(
    cluster: Cluster[Any],
    make_router: MakeRouter,
    shut_out: Callable[[LocalInstance], None],
    heard: list[events.Event],
) -> None:
    """A read goes to another reader, and to the writer if all refuse. If none is left, the error has the servers' words."""
    first, second = cluster.readers
    router = make_router(balance="round_robin", failover_timeout=2 * PATIENCE, listeners=[heard.append])
    strict = make_router(no_reader="error", failover_timeout=2 * PATIENCE)
    for each in (router, strict):
        until_readers_serve(each, 2)
    for reader, then in (first, second), (second, cluster.writer):
        shut_out(reader)
        forget_pools(router)
        heard.clear()
        for read in [*read_in_each_way(router)] * 2:
            read()
        routed = {event.instance for event in heard if isinstance(event, events.Routed)}
        assert routed == {then.address}
        assert reader.address in {event.instance for event in heard if isinstance(event, events.ConnectFailed)}
    forget_pools(strict)
    for read in read_in_each_way(strict):
        began = time.monotonic()
        with pytest.raises(REFUSED, match=rf"{WORDS}|pg_hba\.conf"):
            read()
        assert time.monotonic() - began < PATIENCE


def test_a_password_refused_to_probes_too_is_told_at_once(
    cluster: Cluster[Any], make_router: MakeRouter, rotate: Callable[[str], None]
) -> None:
    """If servers refuse probes as well, no unit waits; the error has their words, and ends with its cause."""
    router = make_router(failover_timeout=2 * PATIENCE)
    router.start()
    rotate(ROTATED)
    end_all_connections(cluster)
    eventually(lambda: len(router.topology.misconfigured) == 3)
    for how, use in USES.items():
        began = time.monotonic()
        with pytest.raises(ConfigurationError, match=WORDS) as caught:
            use(router)
        assert time.monotonic() - began < PATIENCE, how
        assert not classify_error(caught.value).safe_to_repeat
    rotate(cluster.app_password)
    eventually(lambda: router.topology.writer is not None)
    with router.connect() as connection:
        assert connection.scalar(text("SELECT 1")) == 1


def test_a_function_is_asked_for_the_password(
    cluster: Cluster[Any], make_router: MakeRouter, rotate: Callable[[str], None]
) -> None:
    """password= may be a function; each new connection, also a probe's, logs in with its current result."""
    current = [cluster.app_password]
    asked: list[str] = []

    def password() -> str:
        asked.append(current[0])
        return current[0]

    router = make_router(without_password(cluster), password=password, instances=[r.address for r in cluster.readers])
    for use in USES.values():
        if use is not USES["run_transaction"]:
            use(router)
    rotate(ROTATED)
    current[0] = ROTATED
    end_all_connections(cluster)
    eventually(lambda: router.topology.writer is not None and len(router.topology.readers) == 2)
    router.init_commit_table()
    assert router.run_transaction(sessions(router), raise_stock) == 11
    assert {*asked} == {cluster.app_password, ROTATED}
    assert cluster.app_password not in repr(router) + held_by(router)


def test_a_text_as_password_takes_the_place_of_the_urls(cluster: Cluster[Any], make_router: MakeRouter) -> None:
    """password= may be a text, which needs no escaping and replaces the URL's."""
    url = make_url(cluster.url).set(password="another").render_as_string(hide_password=False)
    with make_router(url, password=cluster.app_password).connect() as connection:
        assert connection.scalar(text("SELECT 1")) == 1


@pytest.mark.parametrize("kind", ["text", "function"])
def test_connect_args_override_a_password_of_either_kind(cluster: Cluster[Any], make_router: MakeRouter, kind: str) -> None:
    """A password in connect_args counts before password=, whether that is a text or a function, as it does before the URL's."""
    given: dict[str, Any] = {"password": "another" if kind == "text" else lambda: "another"}
    right: dict[str, Any] = {"connect_args": {"password": cluster.app_password}}
    readers = [reader.address for reader in cluster.readers]
    router = make_router(instances=readers, engine_options=right, **given)
    until_readers_serve(router, 2)
    with router.connect() as connection:
        assert connection.scalar(text("SELECT 1")) == 1
    wrong: dict[str, Any] = {"connect_args": {"password": "yet another"}}
    router = make_router(instances=readers, engine_options=right, reader_options=wrong, no_reader="error", **given)
    until_readers_serve(router, 2)
    with pytest.raises(REFUSED, match=WORDS):
        router.connect(read_only=True)


def test_a_password_function_that_fails_is_named(
    cluster: Cluster[Any], make_router: MakeRouter, caplog: pytest.LogCaptureFixture
) -> None:
    """An error of the password function is raised and logged at once, by its type; open connections keep working."""
    works = [False]

    def password() -> str:
        if not works[0]:
            raise TimeoutError("s3cr3t")
        return cluster.app_password

    router = make_router(without_password(cluster), password=password, instances=[r.address for r in cluster.readers])
    with pytest.raises(ConfigurationError, match="password= raised TimeoutError") as caught:
        router.connect()
    assert "s3cr3t" not in str(caught.value)
    assert isinstance(caught.value.__cause__, TimeoutError)
    works[0] = True
    eventually(lambda: router.topology.writer is not None)
    with router.connect() as connection:
        assert connection.scalar(text("SELECT 1")) == 1
    works[0] = False
    with router.connect() as connection:
        assert connection.scalar(text("SELECT 1")) == 1, "from the pool"
    forget_pools(router)
    with pytest.raises(ConfigurationError, match="password= raised TimeoutError") as caught:
        router.connect()
    assert isinstance(caught.value.__cause__, TimeoutError)
    assert re.search(r"WARNING .* could not be made: no password: .* raised TimeoutError", caplog.text)
    assert "s3cr3t" not in caplog.text
    works[0] = True
    with router.connect() as connection:
        assert connection.scalar(text("SELECT 1")) == 1


LIMIT = {"postgresql": "ALTER ROLE app CONNECTION LIMIT {}", "mysql": "ALTER USER app WITH MAX_USER_CONNECTIONS {}"}
UNLIMITED = {"postgresql": -1, "mysql": 0}


def test_why_the_writer_takes_nobody_in_is_told(cluster: Cluster[Any], make_router: MakeRouter) -> None:
    """NoWriterAvailable has the error with which a live writer refused the last attempt."""
    cluster.execute(LIMIT[family(cluster)].format(1))
    try:
        router = make_router(instances=[], failover_timeout=1)
        with pytest.raises(NoWriterAvailable, match=r"ended with OperationalError: .*(too many connections for role|1226)"):
            router.connect()
    finally:
        cluster.execute(LIMIT[family(cluster)].format(UNLIMITED[family(cluster)]))


def test_a_host_that_nobody_knows_is_told_at_the_start(cluster: Cluster[Any], make_router: MakeRouter) -> None:
    """A start fails at once, naming the hosts, if none exists or only the writer's does not."""
    url = make_url(cluster.url).set(host="nohost.invalid").render_as_string(hide_password=False)
    for instances in ([], ["nowhere.invalid"], [r.address for r in cluster.readers]):
        router = make_router(url, instances=instances, failover_timeout=2 * PATIENCE, probe_timeout=10.0)
        began = time.monotonic()
        with pytest.raises(ConfigurationError, match=r"nohost\.invalid:\d+: .*check the host"):
            router.connect()
        assert time.monotonic() - began < PATIENCE


@pytest.mark.parametrize("odd", ["no host", "shut out"])
def test_a_start_in_a_failover_waits_for_the_promotion(
    cluster: Cluster[Any], make_router: MakeRouter, shut_out: Callable[[LocalInstance], None], odd: str
) -> None:
    """One instance that waiting cannot heal ends no start while another may still become the writer."""
    promoted, other = cluster.readers
    if odd == "shut out":
        shut_out(other)
    listed = [promoted.address, other.address if odd == "shut out" else "gone.invalid"]
    router = make_router(cluster.url, instances=listed, failover_timeout=2 * PATIENCE)
    cluster.kill(cluster.writer)

    def write() -> object:
        with sessions(router)(read_only=False) as session:
            return session.scalar(text("SELECT 1"))

    with ThreadPoolExecutor() as pool:
        writing = pool.submit(write)
        eventually(lambda: writing.done() or router.stats().units_waiting_for_writer)
        assert not writing.done(), writing.exception()
        cluster.promote(promoted)
        assert writing.result(PATIENCE) == 1


def test_a_start_in_vain_names_all_instances(
    cluster: Cluster[Any], make_router: MakeRouter, shut_out: Callable[[LocalInstance], None]
) -> None:
    """If no possible writer lets the router in, the error at the start names the fault of each instance."""
    shut_out(cluster.readers[0])
    url = make_url(cluster.url).set(host="nohost.invalid").render_as_string(hide_password=False)
    listed = [reader.address for reader in cluster.readers]
    with pytest.raises(ConfigurationError, match="check the host") as caught:
        make_router(url, instances=listed, failover_timeout=2 * PATIENCE).start()
    assert re.search(WORDS + r"|pg_hba\.conf", str(caught.value))
    assert all(address in str(caught.value) for address in ("nohost.invalid", *listed))


@pytest.mark.parametrize("where", ["query", "connect_args", "of readers"])
def test_a_time_limit_that_is_no_number_is_told_at_once(
    cluster: Cluster[Any], make_router: MakeRouter, caplog: pytest.LogCaptureFixture, where: str
) -> None:
    """A wrong connect_timeout is an error in each unit at once, although probes have a timeout of their own.

    The value may be a secret, so no error shows it.
    """
    wrong = {"connect_timeout": "Zq0-secret"}
    url = make_url(cluster.url)
    readers = [reader.address for reader in cluster.readers]
    if where == "query":
        router = make_router(url.update_query_dict(wrong), instances=readers, failover_timeout=2 * PATIENCE)
    else:
        option = "engine_options" if where == "connect_args" else "reader_options"
        router = make_router(url, instances=readers, failover_timeout=2 * PATIENCE, **{option: {"connect_args": wrong}})
    for how, use in USES.items():
        began = time.monotonic()
        with pytest.raises(ConfigurationError, match="check the URL") as caught:
            use(router)
        assert time.monotonic() - began < PATIENCE, how
        assert "Zq0" not in says(caught.value), how
    assert "Zq0" not in caplog.text


@pytest.mark.engines("postgresql")
def test_an_option_that_only_readers_cannot_use_is_told_at_once(
    cluster: Cluster[Any], make_router: MakeRouter, caplog: pytest.LogCaptureFixture
) -> None:
    """No probe uses options for readers alone; the unit that does gets a ConfigurationError, which hides the value."""
    wrong = {"connect_args": {"tcp_user_timeout": "Zq0-secret"}}
    router = make_router(reader_options=wrong, failover_timeout=2 * PATIENCE)
    for how in ("automatic", "read-only", "orm", "core reading"):
        began = time.monotonic()
        with pytest.raises(ConfigurationError, match="check the URL") as caught:
            USES[how](router)
        assert time.monotonic() - began < PATIENCE, how
        assert "Zq0" not in says(caught.value), how
    assert "Zq0" not in caplog.text
