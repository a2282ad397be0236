"""An address that leads every connection to one server is refused with several instances, wherever it is given."""

from typing import Any

import pytest

from aurora_router import Router
from aurora_router.drivers import psycopg as psycopg_driver
from aurora_router.drivers import pymysql as pymysql_driver
from aurora_router.errors import ConfigurationError

PG, MY = "postgresql+psycopg://app@db-1/shop", "mysql+pymysql://app@db-1/shop"
SAME = "leads every connection to the same server"


@pytest.mark.parametrize(
    ("url", "connect_args", "name"),
    [
        (MY + "?unix_socket=/run/mysqld.sock", {}, "unix_socket"),
        ("mariadb+pymysql://app@db-1/shop?unix_socket=/run/mysqld.sock", {}, "unix_socket"),
        (MY, {"unix_socket": "/run/mysqld.sock"}, "unix_socket"),
        (MY, {"host": "db-9"}, "host in connect_args"),
        (MY, {"port": 3307}, "port in connect_args"),
        (PG + "?hostaddr=10.0.0.1", {}, "hostaddr"),
        (PG, {"hostaddr": "10.0.0.1"}, "hostaddr"),
        (PG, {"host": "db-9"}, "host in connect_args"),
        (PG, {"port": 5433}, "port in connect_args"),
    ],
)
def test_several_instances_at_one_address_are_refused(url, connect_args, name):
    """An address that leads every connection to one server is refused with several instances, however they are given."""
    options = {"engine_options": {"connect_args": connect_args}}
    several = ({"instances": ["db-2"]}, {"reader_endpoint": "db-ro"})
    for more in several:
        with pytest.raises(ConfigurationError, match=f"^{name} {SAME}"):
            Router(url, **more, **options)
    with pytest.raises(ConfigurationError, match=f"^{name} {SAME}"):
        Router(url.replace("db-1", "db-1,db-2"), **options)
    with Router(url, instances=["db-1"], **options) as router, pytest.raises(ConfigurationError, match=SAME):
        router.add_instance("db-2")


def test_an_address_of_readers_alone_is_refused_as_well():
    with pytest.raises(ConfigurationError, match=f"^unix_socket {SAME}"):
        Router(MY, instances=["db-2"], reader_options={"connect_args": {"unix_socket": "/run/mysqld.sock"}})


@pytest.mark.parametrize(("group", "refused"), [(None, True), ("client", True), ("other", False)])
def test_a_socket_in_an_option_file_is_found(tmp_path, group, refused):
    """A socket in an option file is found, because it goes before host and port; other options there are allowed."""
    file = tmp_path / "my.cnf"
    file.write_text("[client]\nsocket = /run/mysqld.sock\nssl\n[other]\nuser = app\n")
    arguments = {"read_default_file": str(file)} | ({"read_default_group": group} if group else {})
    assert pymysql_driver.fixed_address({}, arguments) == ("the socket of read_default_file" if refused else "")
    file.write_text("no option file")
    assert pymysql_driver.fixed_address({}, arguments) == ""


@pytest.mark.parametrize("file", [5, "/Zq\0"])
def test_a_file_that_cannot_be_looked_for_is_left_to_the_driver(file: Any) -> None:
    """A file that cannot be looked for is left to the driver, which says so when it connects."""
    assert pymysql_driver.fixed_address({}, {"read_default_file": file}) == ""
    assert psycopg_driver.fixed_address({}, {"service": "shop", "servicefile": file}) == ""


def test_an_address_in_the_environment_is_found(monkeypatch, tmp_path):
    """An address that libpq takes from PGHOSTADDR, or from a service, is found."""
    monkeypatch.delenv("PGSERVICEFILE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PGSYSCONFDIR", str(tmp_path))
    assert psycopg_driver.fixed_address({"service": "shop"}, {}) == ""
    (tmp_path / "pg_service.conf").write_text("[shop]\nhostaddr=10.0.0.1\n[other]\nuser=app\n")
    assert psycopg_driver.fixed_address({"service": "shop"}, {}) == "the hostaddr of the service"
    assert psycopg_driver.fixed_address({"service": "other"}, {}) == ""
    (tmp_path / ".pg_service.conf").write_text("[shop]\nuser=app\n")
    assert psycopg_driver.fixed_address({"service": "shop"}, {}) == ""
    (tmp_path / ".pg_service.conf").write_text("no service file")
    assert psycopg_driver.fixed_address({"service": "other"}, {}) == ""
    monkeypatch.setenv("PGHOSTADDR", "10.0.0.1")
    with pytest.raises(ConfigurationError, match=f"^PGHOSTADDR, or a service, in the environment {SAME}"):
        Router(PG, instances=["db-2"])
    Router(PG).close()
