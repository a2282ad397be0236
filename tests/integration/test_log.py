"""The log of a service shows an outage: the lost instance, the reason, the waiting units, and the end."""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import pytest
from sqlalchemy import event, make_url, text
from sqlalchemy.exc import DBAPIError

from aurora_router import ConfigurationError, NoWriterAvailable, Router
from aurora_router.local.cluster import Cluster
from aurora_router.router import core_of
from tests.integration.shop import BOTH, eventually, raise_stock, sessions, until_readers_serve

MakeRouter = Callable[..., Router]


class Written:
    """The lines that the router has written, as an operator's handler gets them."""

    def __init__(self, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.INFO, logger="aurora_router")
        self._caplog = caplog

    def having(self, level: str, *parts: str) -> list[str]:
        """The lines of that level that have all those parts."""
        lines = [(r.levelname, r.getMessage()) for r in self._caplog.records if r.name == "aurora_router"]
        return [line for name, line in lines if name == level and all(part in line for part in parts)]

    @property
    def errors(self) -> list[str]:
        """The errors of any logger."""
        return [record.getMessage() for record in self._caplog.records if record.levelno >= logging.ERROR]

    @property
    def warnings(self) -> list[str]:
        return self.having("WARNING")


@pytest.fixture
def written(caplog: pytest.LogCaptureFixture) -> Written:
    return Written(caplog)


@BOTH
@pytest.mark.parametrize("how", ["kill", "freeze"])
def test_an_outage_can_be_followed_in_the_log(cluster: Cluster[Any], make_router: MakeRouter, written: Written, how: str) -> None:
    """The log has five lines and no flood: writer lost, no writer, units wait, new writer, old writer back."""
    router = make_router(probe_timeout=2.0)
    until_readers_serve(router, 2)
    router.init_commit_table()
    cluster.wait_in_sync()
    assert written.warnings == []
    old = cluster.writer
    with ThreadPoolExecutor(8) as threads:
        (cluster.kill if how == "kill" else cluster.freeze)(old)
        runs = [threads.submit(router.run_transaction, sessions(router), raise_stock) for _ in range(40)]
        eventually(lambda: written.having("WARNING", f"{old.address} is not used: "))
        eventually(lambda: written.having("WARNING", f"there is no writer (it was {old.address})"))
        eventually(lambda: written.having("WARNING", "units that wait for a writer: ", old.address))
        new = cluster.promote()
        assert sorted(run.result(timeout=60) for run in runs)[-1] == 50
    eventually(lambda: written.having("INFO", f"the writer is {new.address}"))
    cluster.rejoin(old)
    eventually(lambda: written.having("INFO", f"{old.address} is used as a reader"), timeout=60)
    assert len(written.warnings) <= 12, written.warnings
    assert written.errors == [], "no traceback, of SQLAlchemy's either"


@BOTH
def test_a_reader_that_is_lost_is_told_and_so_is_its_return(
    cluster: Cluster[Any], make_router: MakeRouter, written: Written
) -> None:
    """The loss of a reader is a WARNING with the reason, and its return is an INFO."""
    router = make_router()
    until_readers_serve(router, 2)
    lost = cluster.readers[0]
    cluster.kill(lost)
    eventually(lambda: written.having("WARNING", f"{lost.address} is not used: "))
    assert not written.having("WARNING", "no reader qualifies")
    count = len(written.having("INFO", f"{lost.address} is used as a reader"))
    cluster.restart(lost)
    eventually(lambda: len(written.having("INFO", f"{lost.address} is used as a reader")) > count, timeout=30)


@BOTH
def test_reads_that_only_the_writer_serves_are_told_once(
    cluster: Cluster[Any], make_router: MakeRouter, written: Written
) -> None:
    """If no reader qualifies, one line says so for any number of reads, and gives each reader's reason."""
    router = make_router()
    until_readers_serve(router, 2)
    for reader in cluster.readers:
        cluster.kill(reader)
    eventually(lambda: not router.topology.readers)
    for _ in range(50):
        with sessions(router)() as s:
            s.execute(text("SELECT 1"))
    (line,) = written.having("WARNING", "no reader qualifies", f"{cluster.writer.address} serves the reads")
    assert all(reader.address in line for reader in cluster.readers)


@BOTH
def test_an_instance_that_was_never_usable_is_told(cluster: Cluster[Any], make_router: MakeRouter, written: Written) -> None:
    """One line names the instance and the reason, and later units add none."""
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        dead = f"127.0.0.1:{nobody.getsockname()[1]}"
    router = make_router(instances=[*(r.address for r in cluster.readers), dead])
    for _ in range(20):
        with sessions(router)() as s:
            s.execute(text("SELECT 1"))
    eventually(lambda: written.having("WARNING", f"{dead} is not used: "))
    router.add_instance("nohost.invalid")
    eventually(lambda: written.having("WARNING", "nohost.invalid", "is not used: ", "check the host"))
    assert len(written.warnings) == 2, written.warnings


@BOTH
def test_a_start_in_vain_is_told_once(cluster: Cluster[Any], make_router: MakeRouter, written: Written) -> None:
    """If no server lets the router in, one line says so for any number of units that come, and another when one does."""
    works = [False]

    def password() -> str:
        return cluster.app_password if works[0] else "another"

    url = make_url(cluster.url).set(password=None).render_as_string()
    router = make_router(url, instances=(), password=password, probe_interval=0.05)
    for _ in range(3):
        with pytest.raises(ConfigurationError, match=r"password|denied"):
            router.connect()
    (line,) = written.warnings
    assert f"{cluster.writer.address} is not used: " in line
    works[0] = True
    eventually(lambda: written.having("INFO", f"the writer is {cluster.writer.address}"))
    assert written.warnings == [line]


@BOTH
def test_a_start_without_anybody_there_is_not_silent(cluster: Cluster[Any], make_router: MakeRouter, written: Written) -> None:
    """While units wait at the start, the log says what they wait for, with each instance's error."""
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        port = nobody.getsockname()[1]
    url = make_url(cluster.url).set(host="127.0.0.1", port=port).render_as_string(hide_password=False)
    router = make_router(url, instances=(), failover_timeout=1.0)
    ended = threading.Event()

    def use() -> None:
        with pytest.raises(NoWriterAvailable):
            router.connect()
        ended.set()

    with ThreadPoolExecutor(8) as threads:
        uses = [threads.submit(use) for _ in range(8)]
        eventually(lambda: written.having("WARNING", f"127.0.0.1:{port} is not used: ", "refused"))
        eventually(lambda: written.having("WARNING", "units that wait for a writer: ", "refused"))
        for one in uses:
            one.result(timeout=30)
    assert len(written.warnings) == 2, written.warnings


@BOTH
def test_a_reader_that_lets_nobody_in_is_told(cluster: Cluster[Any], make_router: MakeRouter, written: Written) -> None:
    """If a reader answers the monitor but refuses the units' connections, the log says so now and then."""
    router = make_router()
    until_readers_serve(router, 2)
    bad = cluster.readers[0].address

    def refuse(dialect: Any, *_: Any) -> None:
        raise dialect.loaded_dbapi.OperationalError("sorry, s.th. is wrong")

    for reader in cluster.readers:
        event.listen(router.engine(router.topology.by_id[reader.address]), "do_connect", refuse)
    for _ in range(20):
        with router.connect(read_only=True) as connection:
            assert connection.scalar(text("SELECT 1")) == 1
    assert written.having("WARNING", f"a new connection to {bad} could not be made", "s.th. is wrong")
    assert written.having("WARNING", "no reader qualifies")


@pytest.mark.engines("postgresql")
def test_a_catalog_that_cannot_be_read_is_told_now_and_then(
    cluster: Cluster[Any], make_router: MakeRouter, written: Written
) -> None:
    """Unknown functions make the router read the catalog each second, but one line a minute logs the failure."""
    cluster.execute("REVOKE SELECT ON pg_catalog.pg_extension FROM PUBLIC")
    try:
        router = make_router(probe_interval=0.1)
        seen = set()

        def read_three_times() -> bool:
            with router.connect() as connection, suppress(DBAPIError):
                connection.execute(text("SELECT nobody_knows_it()"))
            seen.add(core_of(router).monitor._catalog_at)
            return len(seen) > 3

        eventually(read_three_times)
        assert len(written.having("WARNING", f"the functions of {cluster.writer.address} could not be read")) == 1
    finally:
        cluster.execute("GRANT SELECT ON pg_catalog.pg_extension TO PUBLIC")
