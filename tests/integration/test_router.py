"""A router without a session: connections, decisions, instances added by hand, and the errors of bad input."""

from __future__ import annotations

import gc
import logging
import socket
import socketserver
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import exc, select, text
from sqlalchemy.engine import make_url
from sqlalchemy.orm import sessionmaker

from aurora_router import (
    ConfigurationError,
    Effect,
    NoReaderAvailable,
    NoWriterAvailable,
    ReadOnlyViolation,
    Reason,
    Role,
    Router,
    RouterError,
    RoutingSession,
)
from aurora_router.core import events
from aurora_router.core.instance import Instance
from aurora_router.local import PostgresCluster
from aurora_router.router import core_of
from tests.integration.shop import (
    BOTH,
    Item,
    connections,
    engine,
    eventually,
    held_by,
    in_a_read_only_transaction,
    place,
    server_address,
    sessions,
    set_password,
    until_readers_serve,
)

MakeRouter = Callable[..., Router]
SECRET = "s3cr3t-and-long"


@pytest.mark.parametrize("place", ["the query", "connect_args", "the options of readers", "the environment", "a service"])
@pytest.mark.parametrize("wish", ["read-write", "standby"])
def test_a_wish_for_a_role_keeps_out_no_instance(
    cluster: PostgresCluster, make_router: MakeRouter, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, wish: str, place: str
) -> None:
    """The router decides which instance it wants, wherever target_session_attrs is set."""
    url, arguments = cluster.url, {"connect_args": {"target_session_attrs": wish}}
    options: dict[str, Any] = {"instances": [reader.address for reader in cluster.readers]}
    match place:
        case "the query":
            url += f"?target_session_attrs={wish}"
        case "connect_args":
            options["engine_options"] = arguments
        case "the options of readers":
            options["reader_options"] = arguments
        case "the environment":
            monkeypatch.setenv("PGTARGETSESSIONATTRS", wish)
        case _:
            (tmp_path / "services").write_text(f"[shop]\ntarget_session_attrs={wish}\n")
            monkeypatch.setenv("PGSERVICEFILE", str(tmp_path / "services"))
            options["engine_options"] = {"connect_args": {"service": "shop"}}
    router = make_router(url, **options)
    until_readers_serve(router, 2)
    for read_only in False, True:
        with router.connect(read_only=read_only) as connection:
            assert connection.scalar(text("SELECT pg_is_in_recovery()")) is read_only
    router.init_commit_table()


@BOTH
def test_connect_goes_to_the_writer_and_read_only_to_a_reader(cluster: PostgresCluster, router: Router) -> None:
    with router.connect() as connection:
        assert server_address(connection) == cluster.writer.address
    readers = set()
    for _ in range(4):
        with router.connect(read_only=True) as connection:
            readers.add(server_address(connection))
            assert in_a_read_only_transaction(connection)
    assert readers == {r.address for r in cluster.readers}


@BOTH
def test_begin_commits_at_the_end_of_the_block(cluster: PostgresCluster, router: Router) -> None:
    with router.begin() as connection:
        connection.execute(text("INSERT INTO item (id) VALUES (9)"))
    with pytest.raises(exc.ProgrammingError), router.begin() as connection:
        connection.execute(text("INSERT INTO item (id) VALUES (10); SELECT * FROM nonsense"))
    assert cluster.execute("SELECT id FROM item WHERE id > 3") == [(9,)]


@BOTH
def test_a_write_on_a_read_only_connection_is_refused(router: Router) -> None:
    with router.connect(read_only=True) as connection, pytest.raises(ReadOnlyViolation):
        connection.execute(text("INSERT INTO item (id) VALUES (9)"))
    with router.begin(read_only=True) as connection:
        assert connection.execute(text("SELECT count(*) FROM item")).scalar() == 3


@BOTH
def test_raw_connections_are_the_drivers(cluster: PostgresCluster, router: Router) -> None:
    raw = router.raw_connection(read_only=True)
    with pytest.raises(Exception, match=r"(?i)read.only"):
        raw.cursor().execute("INSERT INTO item (id) VALUES (9)")
    raw.close()
    raw = router.raw_connection()
    raw.cursor().execute("INSERT INTO item (id) VALUES (9)")
    raw.commit()
    raw.close()
    assert cluster.execute("SELECT count(*) FROM item") == [(4,)]


@BOTH
def test_a_connection_is_in_autocommit_only_for_its_unit(cluster: PostgresCluster, make_router: MakeRouter) -> None:
    """A connection is in autocommit only for the unit that needs it."""
    router = make_router(engine_options={"pool_size": 1, "max_overflow": 0}, instances=[cluster.readers[0].address])
    Session = sessionmaker(class_=RoutingSession, router=router)
    for _ in range(3):
        with Session() as s:
            s.get(Item, 1)
            assert place(s) == "reader"
        with router.connect(read_only=True) as connection:
            connection.execute(text("SELECT 1"))
            assert in_a_read_only_transaction(connection)


@pytest.mark.parametrize(
    ("sql", "read_only", "effect", "reason", "role"),
    [
        ("SELECT 1", None, Effect.READ, Reason.READ, Role.READER),
        ("SELECT 1", True, Effect.READ, Reason.DECLARED_READ_ONLY, Role.READER),
        ("SELECT 1", False, Effect.READ, Reason.DECLARED_WRITE, Role.WRITER),
        ("/*@writer*/ SELECT 1", None, Effect.READ, Reason.HINT, Role.WRITER),
        ("DELETE FROM item", None, Effect.WRITE, Reason.NOT_A_READ, Role.WRITER),
        ("SELECT unknown_function()", None, Effect.WRITE, Reason.NOT_A_READ, Role.WRITER),
        ("/*@reader*/ SELECT unknown_function()", None, Effect.WRITE, Reason.READ, Role.READER),
        ("SET work_mem = '1MB'", None, Effect.SESSION, Reason.NOT_A_READ, Role.WRITER),
    ],
)
def test_explain_tells_where_and_why(
    router: Router, sql: str, read_only: bool | None, effect: Effect, reason: Reason, role: Role
) -> None:
    decision = router.explain(sql, read_only=read_only)
    assert (decision.effect, decision.reason) == (effect, reason)
    assert decision.instance is not None
    assert decision.instance.role is role


def test_the_topology_shows_the_cluster(cluster: PostgresCluster, router: Router) -> None:
    topology = router.topology
    assert topology.writer is not None
    assert topology.writer.id == cluster.writer.address
    assert (topology.writer.host, topology.writer.port) == (cluster.writer.host, cluster.writer.port)
    assert {r.id for r in topology.readers} == {r.address for r in cluster.readers}
    assert all(i.healthy and i.position is not None for i in topology)
    assert topology.epoch >= 1
    assert repr(router).startswith(f"<Router writer={cluster.writer.address} readers=[")


def test_hosts_are_found_in_the_url(cluster: PostgresCluster, make_router: MakeRouter) -> None:
    hosts = ",".join(i.address for i in cluster.instances)
    libpq = cluster.url.replace(cluster.writer.address, hosts)
    assert {i.id for i in make_router(libpq, instances=()).topology} == {i.address for i in cluster.instances}
    url = make_url(cluster.url)
    listed = url.set(host=None, port=None).update_query_dict({"host": [i.address for i in cluster.instances]})
    assert len(make_router(listed.render_as_string(hide_password=False), instances=()).topology.readers) == 2


@BOTH
def test_an_added_instance_is_used_and_a_removed_one_drained(cluster: PostgresCluster, make_router: MakeRouter) -> None:
    """An instance that is added by hand is used, and a removed one is drained."""
    first, second = cluster.readers
    router = make_router(instances=[first.address])
    with router.connect(read_only=True) as in_use:
        assert server_address(in_use) == first.address
        router.add_instance(second.address)
        eventually(lambda: len(router.topology.readers) == 2)
        router.remove_instance(first.address)
        assert [r.id for r in router.topology.readers] == [second.address]
        for _ in range(3):
            with router.connect(read_only=True) as connection:
                assert server_address(connection) == second.address
        assert server_address(in_use) == first.address, "what is under way there may end"
    eventually(lambda: connections(cluster, first) == 0)
    with pytest.raises(ConfigurationError, match="not an instance"):
        router.remove_instance("nowhere:1")


@BOTH
def test_nothing_is_kept_of_an_instance_that_was_removed(cluster: PostgresCluster, make_router: MakeRouter) -> None:
    """The router does not grow as readers come and go; only an open unit keeps what it needs."""
    first, second = cluster.readers
    router = make_router(instances=[first.address])
    until_readers_serve(router, 1)
    log = core_of(router).log
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        dead = f"127.0.0.1:{nobody.getsockname()[1]}"
    router.add_instance(second.address)
    router.add_instance(dead)
    until_readers_serve(router, 2)
    eventually(lambda: {second.address, dead} <= log._states.keys())
    router.remove_instance(first.address)
    with router.connect(read_only=True) as connection:
        router.remove_instance(second.address)
        router.remove_instance(dead)
        eventually(lambda: not {second.address, dead} & log._states.keys())
        assert second.address in core_of(router).engines._pools
        assert connection.scalar(text("SELECT 1")) == 1

    def kept() -> set[str]:
        parts = [*vars(core_of(router).engines).values(), log._states, *([where] for _, where in log._rates)]
        named = [part for part in parts if isinstance(part, dict | set | list)]
        return {address for address in (first.address, second.address, dead) for part in named if address in part}

    eventually(lambda: not kept())


@BOTH
def test_without_readers_reads_use_the_writer_or_fail(cluster: PostgresCluster, make_router: MakeRouter) -> None:
    """If there are no readers, reads go to the writer or fail, as chosen."""
    alone = make_router(instances=())
    with alone.connect(read_only=True) as connection:
        assert server_address(connection) == cluster.writer.address
        assert in_a_read_only_transaction(connection)
        with pytest.raises(ReadOnlyViolation):
            connection.execute(text("DELETE FROM item"))
    strict = make_router(instances=(), no_reader="error")
    with pytest.raises(NoReaderAvailable, match=cluster.writer.address):
        strict.connect(read_only=True)
    with strict.connect() as connection:
        assert connection.scalar(text("SELECT 1")) == 1


@BOTH
def test_a_reader_behind_max_lag_is_not_used(cluster: PostgresCluster, make_router: MakeRouter) -> None:
    late, current = cluster.readers
    cluster.pause_replay(late)
    router = make_router(max_lag=0.2, probe_interval=0.05)
    cluster.execute("UPDATE item SET stock = 0")
    eventually(lambda: (router.topology.by_id[late.address].lag or 0) > 0.2)

    def serves_current() -> bool:
        with router.connect(read_only=True) as connection:
            found = server_address(connection)
        assert found != late.address
        return found == current.address

    # The time since its last answer counts as lag, too, so on a busy machine the writer may serve a read.
    for _ in range(6):
        eventually(serves_current)
    cluster.resume_replay(late)
    eventually(lambda: (router.topology.by_id[late.address].lag or 0) < 0.2)


@pytest.mark.parametrize("wrong", [None, "db-2:5432", Instance("db-9:5432", "db-9", 5432)])
def test_a_strategy_that_returns_no_reader_is_named(cluster: PostgresCluster, make_router: MakeRouter, wrong: Any) -> None:
    """A function given as balance= must return one of the readers that it got."""
    router = make_router(balance=lambda readers, load, rnd: wrong)
    until_readers_serve(router, 2)
    with pytest.raises(ConfigurationError, match="balance="):
        router.connect(read_only=True)


def test_a_function_may_choose_among_the_readers(cluster: PostgresCluster, make_router: MakeRouter) -> None:
    wanted = max(r.address for r in cluster.readers)
    router = make_router(balance=lambda readers, load, rnd: max(readers, key=lambda r: r.id))
    for _ in range(4):
        with router.connect(read_only=True) as connection:
            assert server_address(connection) == wanted


def test_listeners_hear_and_a_failing_one_does_no_harm(
    cluster: PostgresCluster, make_router: MakeRouter, caplog: pytest.LogCaptureFixture
) -> None:
    heard: list[events.Event] = []

    def fails(event: events.Event) -> None:
        raise ValueError("a listener's own fault")

    router = make_router(listeners=[fails, heard.append])
    with caplog.at_level(logging.ERROR), router.connect() as connection:
        connection.execute(text("SELECT 1"))
    assert any(isinstance(e, events.Routed) and e.instance == cluster.writer.address for e in heard)
    eventually(lambda: any(isinstance(e, events.WriterChanged) for e in heard))  # announced by a thread of its own
    assert "a listener failed" in caplog.text


@BOTH
def test_close_is_final_idempotent_and_ends_the_threads(cluster: PostgresCluster, make_router: MakeRouter) -> None:
    before = set(threading.enumerate())
    router = make_router()
    with router.connect() as connection:
        connection.execute(text("SELECT 1"))
    assert set(threading.enumerate()) > before
    router.close()
    router.close()
    assert set(threading.enumerate()) <= before
    with pytest.raises(RouterError, match="closed"):
        router.connect()
    for instance in cluster.instances:
        eventually(lambda instance=instance: connections(cluster, instance) == 0)


def test_a_forgotten_router_closes_itself(cluster: PostgresCluster) -> None:
    before = set(threading.enumerate())
    router = Router(cluster.url)
    router.start()
    assert set(threading.enumerate()) > before
    del router
    gc.collect()
    eventually(lambda: set(threading.enumerate()) <= before)


def test_a_router_connects_only_when_it_is_used(cluster: PostgresCluster, make_router: MakeRouter) -> None:
    before = set(threading.enumerate())
    make_router()
    assert set(threading.enumerate()) == before


# -- bad input ----------------------------------------------------------------------------------------------------


class Chatter(socketserver.BaseRequestHandler):
    """Answers whatever comes as a web server would."""

    def handle(self) -> None:
        self.request.recv(1024)
        self.request.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        self.request.shutdown(socket.SHUT_WR)
        # A socket that is closed with unread data is reset, possibly before the client has read the answer.
        while self.request.recv(1024):
            pass


@pytest.fixture
def no_database() -> Iterator[str]:
    """An address where something answers that is no PostgreSQL."""
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Chatter) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def with_password(url: str, password: str) -> str:
    return make_url(url).set(password=password).render_as_string(hide_password=False)


def says(error: BaseException) -> str:
    return "".join(traceback.format_exception(error)) + repr(error)


@BOTH
def test_refused_credentials_are_told_at_once_and_not_repeated(cluster: PostgresCluster, make_router: MakeRouter) -> None:
    router = make_router(with_password(cluster.url, SECRET))
    with pytest.raises(ConfigurationError, match="check the user and the password") as caught:
        router.connect()
    assert SECRET not in says(caught.value)
    with pytest.raises(ConfigurationError):
        sessionmaker(class_=RoutingSession, router=router)().get(Item, 1)


@BOTH
def test_an_unknown_database_is_told_at_once(cluster: PostgresCluster, make_router: MakeRouter) -> None:
    url = make_url(cluster.url).set(database="nowhere").render_as_string(hide_password=False)
    with pytest.raises(ConfigurationError, match="check the database name"):
        make_router(url).connect()


@pytest.mark.parametrize(
    ("connect_args", "said"),
    [
        ({"ssl_ca": "ca.pem"}, 'invalid connection option "ssl_ca"; check the URL\'s query and connect_args'),
        ({"sslmode": "on"}, "invalid sslmode value.*; check the URL's query and connect_args"),
    ],
)
def test_what_the_driver_cannot_be_given_is_named_at_once(
    cluster: PostgresCluster,
    make_router: MakeRouter,
    caplog: pytest.LogCaptureFixture,
    connect_args: dict[str, Any],
    said: str,
) -> None:
    router = make_router(cluster.url, engine_options={"connect_args": connect_args})
    with pytest.raises(ConfigurationError, match=said):
        router.connect()
    assert not any(record.exc_info for record in caplog.records), "no traceback"


@pytest.mark.engines("postgresql", "mariadb")  # MySQL's clusters cannot be told apart
def test_two_clusters_in_one_router_are_refused(
    cluster: PostgresCluster, make_router: MakeRouter, aurora_cluster_factory: Callable[..., PostgresCluster]
) -> None:
    settings = {"postgresql": {}, "mariadb": {"gtid_domain_id": "7"}}  # nothing else tells MariaDB's apart
    other = aurora_cluster_factory(readers=0, settings=settings[engine(cluster)])
    try:
        password = cluster.app_password
        set_password(other, password)
        router = make_router(instances=[other.writer.address])
        with pytest.raises(ConfigurationError, match="belongs to another cluster") as caught:
            router.connect()
        assert password not in says(caught.value)
    finally:
        other.stop()


def test_an_instance_that_is_no_postgresql_is_named(
    cluster: PostgresCluster, make_router: MakeRouter, no_database: str, caplog: pytest.LogCaptureFixture
) -> None:
    router = make_router(cluster.url.replace(cluster.writer.address, no_database), instances=())
    with pytest.raises(ConfigurationError, match=no_database):
        router.connect()
    mixed = make_router(instances=[no_database], probe_timeout=10.0)
    with mixed.connect() as connection:
        assert connection.scalar(text("SELECT 1")) == 1, "one bad reader does not take the service down"
    assert no_database in caplog.text


@BOTH
def test_an_instance_that_says_nothing_is_named(cluster: PostgresCluster, make_router: MakeRouter) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        router = make_router(
            cluster.url.replace(cluster.writer.address, address), instances=(), probe_timeout=0.2, failover_timeout=0.6
        )
        with pytest.raises(NoWriterAvailable, match=f"{address}: no answer within 0.2 s"):
            router.connect()


def test_nobody_there_is_told_after_the_time_that_was_allowed(cluster: PostgresCluster, make_router: MakeRouter) -> None:
    nowhere = f"{make_url(cluster.url).drivername}://app:{SECRET}@127.0.0.1:1/app"
    router = make_router(nowhere, instances=(), failover_timeout=0.3)
    with pytest.raises(NoWriterAvailable, match=r"127\.0\.0\.1:1: .*refused") as caught:
        router.connect()
    assert caught.value.waited >= 0.3
    assert SECRET not in says(caught.value)


def test_a_handler_of_a_refused_connection_catches_no_writer(cluster: PostgresCluster, make_router: MakeRouter) -> None:
    """A handler that catches what any engine raises for a refused connection catches the router's error, too."""
    nowhere = f"{make_url(cluster.url).drivername}://app:{SECRET}@127.0.0.1:1/app"
    router = make_router(nowhere, instances=(), failover_timeout=0.3)
    with sessions(router)() as s, pytest.raises(exc.OperationalError) as caught:
        s.execute(text("SELECT 1"))
    assert isinstance(caught.value, NoWriterAvailable)
    assert not caught.value.connection_invalidated


@BOTH
def test_a_password_is_in_no_repr_event_log_or_statement_error(
    cluster: PostgresCluster, make_router: MakeRouter, caplog: pytest.LogCaptureFixture
) -> None:
    heard: list[events.Event] = []
    caplog.set_level(logging.DEBUG)
    router = make_router(listeners=[heard.append])
    with router.connect() as connection, pytest.raises(exc.ProgrammingError) as caught:
        connection.execute(text("SELECT * FROM nowhere"))
    everything = caplog.text + repr(heard) + repr(router) + repr(router.topology) + says(caught.value)
    everything += held_by(router)
    assert cluster.app_password not in everything


@BOTH
@pytest.mark.parametrize("consistency", ["session", "global"])
def test_a_detached_connection_works_as_on_any_engine(
    cluster: PostgresCluster, make_router: MakeRouter, consistency: Any
) -> None:
    """A connection that was taken out of its pool commits, rolls back and is closed, in a session as well."""
    router = make_router(consistency=consistency)
    until_readers_serve(router, 2)
    router.init_commit_table()
    raised = text("UPDATE item SET stock = stock + 1 WHERE id = 1")
    with router.connect() as connection:
        connection.detach()
        connection.execute(raised)
        connection.rollback()
        connection.execute(raised)
        connection.commit()
        transaction = connection.begin()
        connection.execute(raised)
        transaction.rollback()
        with pytest.raises(exc.ProgrammingError):
            connection.execute(text("SELECT * FROM missing"))
    with router.connect() as connection:
        connection.execution_options(isolation_level="AUTOCOMMIT").detach()
        connection.execute(raised)
    with router.connect(read_only=True) as connection:
        connection.detach()
        for _ in range(2):
            connection.execute(text("SELECT 1"))
            assert in_a_read_only_transaction(connection)
            connection.rollback()
    with router.connect(read_only=True) as connection:
        connection.execution_options(isolation_level="AUTOCOMMIT").detach()
        connection.execute(text("SELECT stock FROM item")).all()
    with router.connect() as connection:
        connection.detach()
        connection.execute(raised)  # it is closed with a transaction open

    def work(session: RoutingSession) -> None:
        session.scalar(select(Item.stock))
        session.connection().detach()
        session.execute(raised)

    for check in (None, "xid", "table"):
        router.run_transaction(sessionmaker(class_=RoutingSession, router=router), work, commit_check=check)
    with RoutingSession(router=router) as session:
        work(session)
        session.rollback()
    with router.raw_connection() as raw:
        raw.detach()
        raw.cursor().execute(str(raised))
        raw.rollback()
    assert cluster.execute("SELECT stock FROM item WHERE id = 1") == [(15,)]
