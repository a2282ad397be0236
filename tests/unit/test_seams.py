"""A second driver under the same server module, and a second server module on the same driver.

A router uses both as it is. What they talk to is a fake.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from sqlalchemy.exc import DBAPIError

from aurora_router import ConfigurationError, Failure, Router, classify_error
from aurora_router.cluster.families import Families
from aurora_router.drivers import driver_of, drivers_for
from aurora_router.drivers import psycopg as psycopg_driver
from aurora_router.router import core_of
from aurora_router.servers import FAMILIES, WHO, mysql, postgresql, recognize, usual
from tests.fakes import driver as fake_driver
from tests.fakes.cluster import READ, FakeCluster, FakeServer
from tests.fakes.family import VERSION, Parrot

URL = "postgresql+fakepg://app@db-1/shop"


@pytest.fixture
def servers() -> Iterator[dict[str, FakeServer]]:
    """The servers of the fake driver, by host: db-1 is the writer."""
    cluster = FakeCluster()
    with fake_driver.installed(cluster):
        yield cluster.servers


@pytest.fixture
def parrot(monkeypatch: pytest.MonkeyPatch) -> Parrot:
    family = Parrot()
    monkeypatch.setitem(FAMILIES, "postgresql", [family, postgresql])
    return family


def test_a_url_chooses_among_the_drivers_of_its_dialect(servers):
    assert drivers_for("postgresql") == [psycopg_driver, fake_driver]
    assert core_of(Router(URL)).interceptor.driver is fake_driver
    assert core_of(Router("postgresql+psycopg://app@db-1/shop")).interceptor.driver is psycopg_driver
    with pytest.raises(ConfigurationError, match="driver is not supported"):
        Router("postgresql+other://app@db-1/shop")


def test_a_second_driver_reads_and_writes_on_the_same_servers(servers):
    """A router with another driver sends the same questions, and finds writer and reader by the same rows."""
    with Router(URL, instances=["db-2"]) as router:
        with router.connect() as connection:
            assert connection.exec_driver_sql(READ).scalar_one() == 10
        with router.connect(read_only=True) as connection:
            assert connection.exec_driver_sql(READ).scalar_one() == 10
        assert {core_of(router).interceptor.families.at(place) for place in ("db-1:5432", "db-2:5432")} == {postgresql}
        assert (router.topology.writer.id, [r.id for r in router.topology.readers]) == ("db-1:5432", ["db-2:5432"])
    for server in servers.values():
        assert server.heard.count(READ) == 1
        assert postgresql.PROBE in server.heard
        assert WHO["postgresql"] not in server.heard  # there is one family only


@pytest.mark.parametrize(
    ("code", "failure"), [("40P01", Failure.DEADLOCK), ("23505", Failure.CONSTRAINT), ("PECKS", Failure.CONSTRAINT)]
)
def test_the_codes_of_the_server_mean_the_same_on_any_driver(servers, code, failure):
    servers["db-1"].refuses = code
    with Router(URL) as router, router.connect() as connection, pytest.raises(DBAPIError) as caught:
        connection.exec_driver_sql(READ)
    assert driver_of(caught.value.orig) is fake_driver
    assert classify_error(caught.value).failure is failure
    assert classify_error(fake_driver.Error(code)).failure is failure


def test_the_server_says_which_family_it_is_of(servers, parrot):
    """Each instance is asked, and the answer decides what is sent there and what its errors mean."""
    servers["db-2"].version = VERSION
    servers["db-2"].refuses = servers["db-1"].refuses = "PECKS"
    found = {}
    with Router(URL, instances=["db-2"]) as router:
        for read_only in (False, True):
            with router.connect(read_only=read_only) as connection, pytest.raises(DBAPIError) as caught:
                connection.exec_driver_sql(READ)
            found[read_only] = classify_error(caught.value).failure
        assert core_of(router).interceptor.families.at("db-1:5432") is core_of(router).interceptor.families.leading is postgresql
        assert core_of(router).interceptor.families.at("db-2:5432") is parrot
    assert found == {False: Failure.CONSTRAINT, True: Failure.DEADLOCK}
    assert WHO["postgresql"] in servers["db-1"].heard


def test_a_readers_connection_is_guarded_in_its_familys_words(servers, parrot, monkeypatch):
    monkeypatch.setattr(fake_driver, "is_default_read_only", lambda *_: False)
    servers["db-2"].version = VERSION
    with Router(URL, instances=["db-2"]) as router:
        connection = router.raw_connection(read_only=True)
        core_of(router).engines.modes.ensure_default_read_only(connection)
        connection.close()
    assert parrot.SET_DEFAULT_READ_ONLY in servers["db-2"].heard


def test_each_connection_of_the_monitor_asks_the_server_anew(servers, parrot):
    """No change of a server leaves the monitor's connection open, so the next one finds the new family."""
    servers["db-1"].version = VERSION
    with Router(URL) as router:
        router.start()
        assert core_of(router).interceptor.families.at("db-1:5432") is core_of(router).interceptor.families.leading is parrot
        servers["db-1"].version = ("PostgreSQL 17.1 on aarch64", False)
        probe = core_of(router).engines.probe(router.topology.writer)
        assert core_of(router).interceptor.families.at("db-1:5432") is postgresql
        probe.ask()
        probe.close()
        assert core_of(router).interceptor.families.leading is postgresql


def test_before_the_first_answer_the_leading_family_is_taken(parrot):
    families = Families("postgresql", "postgresql")
    assert families.at("db-1:5432") is families.leading is postgresql
    families.leading = parrot
    assert families.at("db-1:5432") is parrot


@pytest.mark.parametrize(
    ("protocol", "row", "family"),
    [
        ("postgresql", ("PostgreSQL 16.4 on x86_64", False), postgresql),
        ("mysql", ("8.4.0", "MySQL Community Server - GPL"), mysql),
        ("mysql", ("10.11.6-MariaDB-0+deb12u1", "Debian 12"), mysql),
    ],
)
def test_servers_are_known_by_their_version(monkeypatch, protocol, row, family):
    """The server decides, whatever comes first in the list, and a server that nobody knows is of the usual family."""
    other = Parrot()
    monkeypatch.setitem(FAMILIES, protocol, [family, other])
    asked = []

    def query(text):
        asked.append(text)
        return ["version", "more"], [row]

    assert recognize(protocol, query) is family
    assert asked == [WHO[protocol]]
    assert recognize(protocol, lambda _: ((), [("CockroachDB 24", None)])) is usual(protocol) is other
