"""TLS is asked for at managed hosts, and what a user says of it is never made weaker."""

import pytest
from sqlalchemy import event

from aurora_router import Router
from aurora_router.config import urls
from aurora_router.core.instance import Role
from aurora_router.drivers import psycopg as psycopg_driver
from aurora_router.errors import ConfigurationError
from aurora_router.router import core_of

HEAD = "postgresql+psycopg://app:hunter2@"


@pytest.mark.parametrize(
    ("host", "managed"),
    [
        ("shop.cluster-x.eu-west-1.rds.amazonaws.com", True),
        ("Shop.Cluster-X.eu-west-1.RDS.amazonaws.COM", True),
        ("shop.cluster-x.eu-west-1.rds.amazonaws.com.", True),
        ("shop.cluster-x.rds.cn-north-1.amazonaws.com.cn", True),
        ("shop.cluster-x.cn-north-1.rds.amazonaws.com.cn", True),
        ("shop.proxy-x.eu-west-1.rds.amazonaws.com", True),
        ("shop.cluster-x.eu-west-1.\uff52\uff44\uff53.\uff41mazonaws.com", True),  # in full-width letters
        ("shop.cluster-x.eu-west-1.\uff52\uff44\uff53.example.com", False),
        ("\uff52" * 64 + ".example.com", False),  # no such name can be looked up
        ("db-1", False),
        ("shop.cluster-x.eu-central-1.rds.amazonaws.eu", True),
        ("shop.cluster-x.us-gov-west-1.rds-fips.amazonaws.com", True),
        ("rds.amazonaws.com.example.org", False),
        ("shoprds.amazonaws.com", False),
    ],
)
@pytest.mark.parametrize("named_by", ["url", "list in url", "query", "instances", "reader_endpoint", "add_instance"])
@pytest.mark.parametrize(
    ("head", "encrypted"),
    [("postgresql+psycopg", {"sslmode": "require"}), ("mysql+pymysql", {"ssl_check_hostname": "false"})],
)
def test_tls_is_asked_for_wherever_a_managed_host_comes_from(host, managed, named_by, head, encrypted):
    """A connection to a managed host is encrypted, whatever named the host and however it is spelt, and no other is."""
    before = {"url": f"{host}:6000/shop", "list in url": f"db-9,{host}:6000/shop", "query": f"/shop?host=db-9&host={host}:6000"}
    target = urls.parse_url(f"{head}://app:hunter2@{before.get(named_by, 'db-9/shop')}")
    others = [f"{host}:6000"] if named_by == "instances" else []
    found = urls.parse_instances(target, others, f"{host}:6000" if named_by == "reader_endpoint" else None)
    if named_by == "add_instance":
        found = (*found, urls.parse_instance(f"{host}:6000", target.driver))
    made = {instance.host: target.at(instance, {}) for instance in found}
    assert (made[host].host, made[host].port, made[host].password) == (host, 6000, "hunter2")
    assert dict(made[host].query) == (encrypted if managed else {})
    assert all(not url.query for other, url in made.items() if other != host)


def test_tls_is_asked_for_at_a_host_with_other_dots():
    """Only `connect_args` can give such a host. It is looked up all the same."""
    target = urls.parse_url(f"{HEAD}db-1/shop")
    (instance,) = urls.parse_instances(target, [], None)
    url = target.at(instance, {"host": "shop.cluster-x.eu-west-1\u3002rds\uff0eamazonaws\uff61com"})
    assert dict(url.query) == {"sslmode": "require"}


AT_AMAZON = "shop.cluster-x.eu-west-1.rds.amazonaws.com"


def tls_of(url, arguments):
    """The TLS options in the URL of the first instance."""
    target = urls.parse_url(url)
    query = target.at(urls.parse_instances(target, [], None)[0], arguments).query
    return {name: value for name, value in query.items() if name.startswith("ssl")}


@pytest.mark.parametrize(
    ("environment", "query", "arguments", "encrypted"),
    [
        ({"PGSSLMODE": "verify-full"}, "", {}, {}),
        ({"PGSSLMODE": "prefer"}, "", {}, {}),
        ({"PGSERVICE": "strict"}, "", {}, {}),
        ({"PGSSLROOTCERT": "system"}, "", {}, {}),
        ({"PGSSLROOTCERT": "/ca.pem"}, "", {}, {"sslmode": "require"}),
        ({}, "?service=strict", {}, {}),
        ({}, "", {"service": "strict"}, {}),
        ({}, "?service=lax", {}, {"sslmode": "require"}),
        ({}, "?service=nowhere", {}, {"sslmode": "require"}),
        ({}, "?sslrootcert=system", {}, {"sslrootcert": "system"}),
        ({}, "", {"sslrootcert": "system"}, {}),
        ({}, "", {"sslmode": "verify-full"}, {}),
        ({}, "?sslrootcert=/ca.pem", {}, {"sslrootcert": "/ca.pem", "sslmode": "require"}),
        ({}, "?sslnegotiation=direct", {}, {"sslnegotiation": "direct", "sslmode": "require"}),
    ],
)
def test_libpqs_own_ways_to_ask_for_tls_stand(monkeypatch, tmp_path, environment, query, arguments, encrypted):
    """The user's own TLS settings for libpq, wherever libpq reads them, are not made weaker at a managed host."""
    services = tmp_path / "services"
    services.write_text("[strict]\nsslmode=verify-full\n[lax]\nuser=app\n")
    for name, value in {"PGSERVICEFILE": str(services), **environment}.items():
        monkeypatch.setenv(name, value)
    assert tls_of(f"postgresql+psycopg://app@{AT_AMAZON}/shop{query}", arguments) == encrypted


ONLY_ENCRYPTED = {"ssl_check_hostname": "false"}


@pytest.mark.parametrize(
    ("query", "arguments", "encrypted"),
    [
        ("?read_default_file={}", {}, {}),
        ("?read_default_file={}&read_default_group=underscored", {}, {}),
        ("?read_default_file={}&read_default_group=lax", {}, ONLY_ENCRYPTED),
        ("?read_default_file={}&read_default_group=nowhere", {}, ONLY_ENCRYPTED),
        ("", {"ssl": {"ca": "/ca.pem"}}, {}),
        ("", {"ssl_disabled": True}, {}),
        ("", {"ssl_disabled": False}, ONLY_ENCRYPTED),
        ("", {"ssl_verify_identity": True}, {}),
        ("?ssl_disabled=true", {}, {"ssl_disabled": "true"}),
        ("?ssl_disabled=false", {}, ONLY_ENCRYPTED),
        ("?ssl_disabled=0", {}, ONLY_ENCRYPTED),
        ("?ssl_key_password=x", {}, ONLY_ENCRYPTED),
    ],
)
def test_pymysqls_own_ways_to_ask_for_tls_stand(tmp_path, query, arguments, encrypted):
    """The user's own TLS settings for PyMySQL, also in an option file, are not made weaker at a managed host."""
    file = tmp_path / "my.cnf"
    file.write_text("[client]\nssl-ca=/ca.pem\n[underscored]\nssl_ca=/ca.pem\n[lax]\nssl-mode=REQUIRED\nssl-ca=\n")
    assert tls_of(f"mysql+pymysql://app@{AT_AMAZON}/shop{query.format(file)}", arguments) == encrypted


@pytest.mark.parametrize(
    ("url", "encrypted"),
    [("postgresql+psycopg://app@{}/shop", {"sslmode": "require"}), ("mysql+pymysql://app@{}/shop", ONLY_ENCRYPTED)],
)
def test_the_host_that_the_driver_is_given_decides_on_tls(url, encrypted):
    """A host in connect_args decides on TLS before the URL's."""
    assert tls_of(url.format("localhost"), {"host": AT_AMAZON}) == encrypted
    assert tls_of(url.format(AT_AMAZON), {"host": "localhost"}) == {}


@pytest.mark.parametrize(
    ("url", "empty", "encrypted"),
    [
        (f"postgresql+psycopg://app@{AT_AMAZON}/shop", {"sslmode": None}, {"sslmode": "require"}),
        (f"postgresql+psycopg://app@{AT_AMAZON}/shop", {"sslmode": ""}, {"sslmode": "require"}),
        (f"mysql+pymysql://app@{AT_AMAZON}/shop", {"ssl": {}}, {"ssl": {"check_hostname": False}}),
        (f"mysql+pymysql://app@{AT_AMAZON}/shop", {"ssl": None}, {"ssl": {"check_hostname": False}}),
        ("mysql+pymysql://app@db-1/shop?ssl_ca=/ca.pem", {"ssl": {}}, {"ssl": {"ca": "/ca.pem"}}),
    ],
)
@pytest.mark.parametrize("options", ["engine_options", "reader_options"])
def test_an_empty_argument_takes_no_encryption_away(url, empty, encrypted, options):
    """An argument that says nothing about encryption does not override the URL's options."""
    router = Router(url, **{options: {"connect_args": empty}})
    instance = core_of(router).monitor.topology.instances[0]._replace(role=Role.READER)
    given = []

    def do_connect(dialect, record, arguments, options):
        given.append(options)
        raise ConfigurationError("enough is known")

    engine = router.engine(instance)
    event.listen(engine, "do_connect", do_connect)
    with pytest.raises(ConfigurationError, match="enough"):
        engine.connect()
    assert given[0].items() >= encrypted.items()


def test_a_text_that_pymysql_would_take_for_true_is_refused():
    """A text for ssl_disabled that PyMySQL would take for true is refused: "false" would turn encryption off."""
    assert not urls.parse_url("mysql+pymysql://app@db-1/shop?ssl_disabled=no").url.query
    with pytest.raises(ConfigurationError, match="write ssl_disabled=true, or leave it out"):
        Router("mysql+pymysql://app@db-1/shop?ssl_disabled=maybe")
    with pytest.raises(ConfigurationError, match="must be True or False"):
        Router("mysql+pymysql://app@db-1/shop", engine_options={"connect_args": {"ssl_disabled": "false"}})


def test_what_the_user_says_of_tls_counts_at_managed_hosts():
    """An sslmode, or an ssl option, that the URL names is kept."""
    managed = urls.parse_instance("shop.cluster-x.eu-west-1.rds.amazonaws.com", psycopg_driver)
    assert urls.parse_url(HEAD + "db-1/shop?sslmode=disable").at(managed, {}).query["sslmode"] == "disable"
    own = urls.parse_url("mysql+pymysql://app@db-1/shop?ssl_ca=/etc/ca.pem")
    assert dict(own.at(managed, {}).query) == {"ssl_ca": "/etc/ca.pem"}
