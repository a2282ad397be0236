"""The values that a user may give. Every refusal says what to write instead and repeats no password."""

import math
import sys
from dataclasses import replace
from typing import Any

import pytest
from sqlalchemy import event
from sqlalchemy.engine import URL, make_url

from aurora_router import Router, config, urls
from aurora_router.core.topology import Role
from aurora_router.errors import ConfigurationError
from aurora_router.servers import mysql, postgresql
from aurora_router.settings import Settings
from tests.interruptions import SoftTimeLimitExceeded, interrupted_at_each_line

HEAD = "postgresql+psycopg://app:hunter2@"


def ids(instances):
    return [instance.id for instance in instances]


@pytest.mark.parametrize(
    ("url", "hosts"),
    [
        (HEAD + "db-1/shop", [("db-1", 5432)]),
        (HEAD + "db-1:6000/shop", [("db-1", 6000)]),
        (HEAD + "db-1,db-2:6000,db-3/shop", [("db-1", 5432), ("db-2", 6000), ("db-3", 5432)]),
        (HEAD + "db-1,db-2", [("db-1", 5432), ("db-2", 5432)]),
        (HEAD + "db-1,db-2?application_name=x", [("db-1", 5432), ("db-2", 5432)]),
        ("postgresql+psycopg://db-1:6000,db-2:6001", [("db-1", 6000), ("db-2", 6001)]),
        (HEAD + "/shop?host=db-1:6000&host=db-2", [("db-1", 6000), ("db-2", 5432)]),
        (HEAD + "/shop?host=db-1,db-2&port=6000,6001", [("db-1", 6000), ("db-2", 6001)]),
        (HEAD + "/shop?host=db-1&host=db-2&port=6000&port=6001", [("db-1", 6000), ("db-2", 6001)]),
        (HEAD + "/shop?host=db-1,db-2&port=6000", [("db-1", 6000), ("db-2", 6000)]),
        (HEAD + "[2001:db8::1]/shop", [("2001:db8::1", 5432)]),
        (HEAD + "[2001:db8::1]:6000,[2001:db8::2]/shop", [("2001:db8::1", 6000), ("2001:db8::2", 5432)]),
    ],
)
def test_hosts_are_read_as_libpq_and_as_sqlalchemy_spell_them(url, hosts):
    target = urls.parse_url(url)
    assert list(target.hosts) == hosts
    assert (target.url.host, target.url.port) == hosts[0]
    assert target.server is postgresql


@pytest.mark.parametrize(
    ("url", "login", "option"),
    [
        ("postgresql+psycopg://app@db-1/shop?application_name=jobs@host-1", ("app", None), ("application_name", "jobs@host-1")),
        ("postgresql+psycopg://app@db-1:6000/shop?application_name=a@b", ("app", None), ("application_name", "a@b")),
        (HEAD + "db-1/shop?sslmode=disable&application_name=a@b", ("app", "hunter2"), ("application_name", "a@b")),
        (HEAD + "db-1,db-2/shop?application_name=@", ("app", "hunter2"), ("application_name", "@")),
        ("postgresql+psycopg://app@db-1?application_name=a@b@c", ("app", None), ("application_name", "a@b@c")),
        ("postgresql+psycopg://db-1:6000/shop?application_name=a@b", (None, None), ("application_name", "a@b")),
        ("mysql+pymysql://app:p%40ss@db-1/shop?program_name=a@b", ("app", "p@ss"), ("program_name", "a@b")),
        ("postgresql+psycopg://app@db-1/shop?application_name=a%40b", ("app", None), ("application_name", "a@b")),
        ("postgresql+psycopg://app:p?x=y@db-1/shop", ("app", "p?x=y"), None),
        ("postgresql+psycopg://app:p?host=y@db-1/shop", ("app", "p?host=y"), None),
    ],
)
def test_an_at_sign_in_the_query_is_part_of_its_option(url, login, option):
    """An at sign in the query belongs to its option, although SQLAlchemy takes some for the end of a password."""
    target = urls.parse_url(url)
    assert (target.url.username, target.url.password) == login
    assert target.hosts[0][0] == "db-1"
    assert option is None or option in target.url.query.items()


@pytest.mark.parametrize(
    "url",
    [
        HEAD + "db-1/shop?no_option=a@b",
        HEAD + "db-1/shop?application_name",
        HEAD.replace("hunter2", "hun@ter2") + "db-1/shop?application_name=a@b",
        HEAD.replace("hunter2", "h/u?n=t@er2") + "db-1/shop?application_name=ab",
    ],
)
def test_an_at_sign_that_may_be_of_a_password_is_refused(url):
    """An at sign that may be part of a password is refused, and the error says how to write it, in the query too."""
    with pytest.raises(ConfigurationError, match=r"more than one @; .*%40.* In the query write it as %40, too") as caught:
        urls.parse_url(url + ("@x" if url.endswith("_name") else ""))
    assert "hun" not in everything(caught.value)


@pytest.mark.parametrize("driver", ["psycopg", "pymysql"])
def test_without_its_driver_a_url_has_no_known_option(driver, monkeypatch):
    family = {"psycopg": postgresql, "pymysql": mysql}[driver]
    assert {"user", "password", "host"} <= family.options()
    monkeypatch.setitem(sys.modules, driver, None)
    monkeypatch.delitem(sys.modules, "pymysql.connections", raising=False)
    assert not family.options()


def test_a_sqlalchemy_url_is_as_good_as_text():
    url = make_url(HEAD + "db-1/shop")
    assert urls.parse_url(url).hosts == (("db-1", 5432),)
    assert urls.parse_url(url).url.password == "hunter2"


def test_url_options_that_choose_an_instance_are_removed():
    """The router takes options that choose an instance out of the URL, and leaves the others in it."""
    url = HEAD + "db-1/shop?target_session_attrs=any&load_balance_hosts=random&application_name=x"
    assert dict(urls.parse_url(url).url.query) == {"application_name": "x"}


@pytest.mark.parametrize(
    ("host", "managed"),
    [
        ("shop.cluster-x.eu-west-1.rds.amazonaws.com", True),
        ("Shop.Cluster-X.eu-west-1.RDS.amazonaws.COM", True),
        ("shop.cluster-x.eu-west-1.rds.amazonaws.com.", True),
        ("shop.cluster-x.rds.cn-north-1.amazonaws.com.cn", True),
        ("shop.cluster-x.cn-north-1.rds.amazonaws.com.cn", True),
        ("shop.proxy-x.eu-west-1.rds.amazonaws.com", True),
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
        found = (*found, urls.parse_instance(f"{host}:6000", target.server))
    made = {instance.host: target.at(instance, {}) for instance in found}
    assert (made[host].host, made[host].port, made[host].password) == (host, 6000, "hunter2")
    assert dict(made[host].query) == (encrypted if managed else {})
    assert all(not url.query for other, url in made.items() if other != host)


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
    instance = replace(router._monitor.topology.instances[0], role=Role.READER)
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
    managed = urls.parse_instance("shop.cluster-x.eu-west-1.rds.amazonaws.com", postgresql)
    assert urls.parse_url(HEAD + "db-1/shop?sslmode=disable").at(managed, {}).query["sslmode"] == "disable"
    own = urls.parse_url("mysql+pymysql://app@db-1/shop?ssl_ca=/etc/ca.pem")
    assert dict(own.at(managed, {}).query) == {"ssl_ca": "/etc/ca.pem"}


@pytest.mark.parametrize("password", ["p%40ss", "p%2Fss", "p%2Css", "p:ss", "p%23ss", "p%3Fss", "", "ünïcode", "%20"])
def test_a_password_may_hold_any_percent_encoded_character(password):
    """A password may hold any character that is written as in URLs."""
    target = urls.parse_url(f"postgresql+psycopg://app:{password}@db-1,db-2/shop")
    assert target.url.password == make_url(f"postgresql+psycopg://app:{password}@db-1/shop").password
    assert [host for host, _ in target.hosts] == ["db-1", "db-2"]


@pytest.mark.parametrize("dialect", ["mysql", "mariadb"])
def test_a_url_of_mysql_or_mariadb_is_read_in_the_same_way(dialect):
    target = urls.parse_url(f"{dialect}+pymysql://app:p%40ss@db-1,db-2:3307/shop?charset=utf8mb4")
    assert (target.server, target.dialect, target.hosts) == (mysql, dialect, (("db-1", 3306), ("db-2", 3307)))
    assert dict(target.url.query) == {"charset": "utf8mb4"}


@pytest.mark.parametrize(
    ("url", "instead"),
    [
        ("mysql://db-1/shop", "write mysql+pymysql://"),
        ("mariadb+mysqldb://db-1/shop", "write mysql+pymysql://"),
        ("postgres://db-1/shop", "write postgresql+psycopg://"),
        ("oracle://db-1/shop", "use postgresql+psycopg://.* or mysql+pymysql://"),
    ],
)
def test_a_url_of_another_driver_is_told_what_to_write(url, instead):
    """The error for a URL of another driver or database says what to write instead."""
    with pytest.raises(ConfigurationError, match=instead.replace("+", r"\+")):
        urls.parse_url(url)


@pytest.mark.parametrize("password", ["p,ss", "p,s,s", "p/s,s", "p?s,s", "p#s,s"])
def test_a_comma_in_a_password_makes_no_list_of_hosts(password):
    target = urls.parse_url(f"postgresql+psycopg://app:{password}@db-1/shop")
    assert target.url.password == password
    assert target.hosts == (("db-1", 5432),)


def everything(error):
    """All texts of an error and of its chain."""
    chain = []
    while error is not None:
        chain += [str(error), repr(error), repr(error.args)]
        error = error.__cause__ or error.__context__
    return "\n".join(chain)


BAD_URLS = [
    None,
    5432,
    b"postgresql+psycopg://app:hunter2@db-1/shop",
    "",
    "db-1:5432",
    "app:hunter2@db-1:5432",
    "postgresql://app:hunter2@db-1/shop",
    "postgres://app:hunter2@db-1/shop",
    "postgres+psycopg://app:hunter2@db-1/shop",
    "postgresql+psycopg2://app:hunter2@db-1/shop",
    "postgresql+asyncpg://app:hunter2@db-1/shop",
    "mysql+mysqldb://app:hunter2@db-1/shop",
    "mysql://app:hunter2@db-1/shop",
    "mariadb+mariadbconnector://app:hunter2@db-1/shop",
    "sqlite:///app:hunter2@shop",
    "oracle://app:hunter2@db-1/shop",
    HEAD + "/shop",
    HEAD + "/shop?port=6000",
    HEAD + "/shop?host=db-1,db-2&port=1,2,3",
    HEAD + "/shop?host=db-1:x",
    HEAD + "/shop?host=app:hunter2@db-1",
    HEAD + "db-1:port/shop",
    HEAD + "db-1:1,/shop",
    HEAD + "db-1:1,db-2:0/shop",
    HEAD + "db-1:1,db-2:70000/shop",
    HEAD + "db 1,db-2/shop",
    HEAD + "::1,::2/shop",
]


@pytest.mark.parametrize("url", BAD_URLS, ids=str)
def test_the_error_for_a_bad_url_hides_the_password(url):
    """A URL that cannot work gets an error that does not contain the password."""
    with pytest.raises(ConfigurationError) as caught:
        urls.parse_url(url)
    assert "hunter2" not in everything(caught.value)


UNQUOTED = ["hunt@er2@db-1", "hunt@er2@db-1,db-2", "hunt,@er2@db-1", "hunt@er2,x@db-1", "@hunter2@db-1"]


@pytest.mark.parametrize("rest", UNQUOTED)
def test_an_unquoted_at_sign_in_a_password_is_refused(rest):
    """An unquoted at sign in a password is refused, and no part of the password becomes a host."""
    with pytest.raises(ConfigurationError) as caught:
        urls.parse_url(f"postgresql+psycopg://app:{rest}/shop")
    assert "hunt" not in str(caught.value)
    assert "er2" not in str(caught.value)


@pytest.mark.parametrize("rest", ["db-1:99999/shop", "db 1/shop"])
def test_a_single_host_is_checked_like_the_others(rest):
    with pytest.raises(ConfigurationError):
        urls.parse_url(HEAD + rest)


def test_the_urls_instances_come_first_and_each_once():
    """The instances of a router are those of the URL, then the others, each once."""
    target = urls.parse_url(HEAD + "db-1,db-2/shop")
    assert ids(urls.parse_instances(target, ["db-2:5432", "db-3:6000", "[::1]"], None)) == [
        "db-1:5432",
        "db-2:5432",
        "db-3:6000",
        "[::1]:5432",
    ]


def test_a_reader_endpoint_is_last_and_never_the_writer():
    """A reader endpoint comes last and never serves as the writer."""
    found = urls.parse_instances(urls.parse_url(HEAD + "db-1/shop"), ["db-2"], "db-ro:5432")
    assert ids(found) == ["db-1:5432", "db-2:5432", "db-ro:5432"]
    assert [instance.reader_only for instance in found] == [False, False, True]


def test_the_reader_endpoint_must_be_another_name():
    with pytest.raises(ConfigurationError, match="db-1:5432 is among the other instances"):
        urls.parse_instances(urls.parse_url(HEAD + "db-1/shop"), [], "db-1")


def test_instances_are_a_list_and_not_a_text():
    for text in ("db-2:5432", b"db-2:5432", {"db-2:5432": 1}):
        with pytest.raises(ConfigurationError, match="instances must be a list, like"):
            config.check_addresses("instances", text)


def test_the_address_that_cannot_be_read_is_named_by_its_place():
    target = urls.parse_url(HEAD + "db-1/shop")
    with pytest.raises(ConfigurationError, match=r'instances\[1\] cannot be read; write "host:port"'):
        urls.parse_instances(target, ["db-2", "db-3:hunter2"], None)
    with pytest.raises(ConfigurationError, match="reader_endpoint cannot be read"):
        urls.parse_instances(target, [], "app:hunter2@db-ro")


BAD_ADDRESSES = [
    *["", "db-1:", "db-1:x", "db-1:0", "db-1:65536", "db 1", "::1", "[::1", "[::1]x", "[db-1]", "app:hunter2@db-1", "x//db-1"],
    *["db-1/hunter2", "hunter2#db-1", "db%1", 5, None, b"db-1:5432"],
]


@pytest.mark.parametrize("address", BAD_ADDRESSES, ids=str)
def test_an_address_that_is_none_is_refused(address):
    with pytest.raises(ConfigurationError) as caught:
        urls.parse_instance(address, postgresql)
    assert "hunter2" not in str(caught.value)


def test_an_address_is_a_host_and_a_port_or_the_usual_port():
    assert urls.parse_instance(" db-1 ", postgresql).id == "db-1:5432"
    assert urls.parse_instance("db-1:6000", postgresql).port == 6000
    assert urls.parse_instance("[::1]:6000", postgresql).host == "::1"


@pytest.mark.parametrize("value", [0, -1, 0.0, math.inf, math.nan, "5", None, True])
def test_seconds_are_a_finite_number_above_zero(value):
    with pytest.raises(ConfigurationError, match="probe_interval="):
        config.check_seconds("probe_interval", value)


@pytest.mark.parametrize("value", [1, 0.05, 60.0])
def test_seconds_may_be_whole_or_not(value):
    config.check_seconds("probe_interval", value)


def test_a_choice_is_one_of_those_listed():
    config.check_choice("no_reader", "error", ("writer", "error"))
    with pytest.raises(ConfigurationError, match=r"no_reader=\.\.\.: use one of 'writer', 'error'"):
        config.check_choice("no_reader", "none", ("writer", "error"))


def test_names_are_a_collection_of_texts():
    assert config.check_names("read_only_functions", ["f", "g"]) == ("f", "g")
    for bad in ("f", [1]):
        with pytest.raises(ConfigurationError, match="read_only_functions: give a list of names"):
            config.check_names("read_only_functions", bad)


@pytest.mark.parametrize("value", ["secret", b"secret", None, 5, [5], [""], {"old", "new"}, {"old": "new"}])
def test_keys_are_secrets_in_an_order_and_no_error_repeats_them(value):
    assert config.check_keys("token_keys", ["old", b"new"]) == ("old", b"new")
    with pytest.raises(ConfigurationError, match="token_keys") as raised:
        config.check_keys("token_keys", value)
    assert "new" not in str(raised.value).replace("newest", "")


def test_a_password_is_a_text_or_a_function_that_returns_one():
    """Any other password is refused, when it is given or when the function is called, and is not repeated."""
    assert config.check_password("password", None) is None
    assert config.check_password("password", "hunter2") == "hunter2"
    with pytest.raises(ConfigurationError, match="password: give a text, or a function") as caught:
        config.check_password("password", b"hunter2")
    assert "hunter2" not in everything(caught.value)
    ask = config.check_password("password", lambda: "hunter2")
    assert callable(ask)
    assert ask() == "hunter2"
    ask = config.check_password("password", lambda: b"hunter2")
    with pytest.raises(ConfigurationError, match="password= returned no text, but bytes") as caught:
        ask()
    assert "hunter2" not in everything(caught.value)
    ask = config.check_password("password", lambda instance: "hunter2")
    with pytest.raises(ConfigurationError, match="password= raised TypeError"):
        ask()


def test_a_nul_character_is_refused_wherever_it_is_given():
    """A NUL character is refused, because the driver would stop reading there and connect to its default host."""
    head = "postgresql+psycopg://"
    # SQLAlchemy 2.0 does not decode a %00 in the name of the database.
    in_database = URL.create("postgresql+psycopg", "app", host="db-1", database="sh\x00op")
    given_as_text = ("app:hunter%002@db-1/shop", "a%00pp@db-1/shop", "app@db-1/shop?password=hunter%002")
    for given in (*(head + text for text in given_as_text), in_database):
        with pytest.raises(ConfigurationError, match="the URL has a NUL character") as caught:
            Settings(given)
        assert "hunter" not in everything(caught.value)
    with pytest.raises(ConfigurationError, match="password= has a NUL character") as caught:
        config.check_password("password", "hunter\x002")
    assert "hunter" not in everything(caught.value)
    ask = config.check_password("password", lambda: "hunter\x002")
    with pytest.raises(ConfigurationError, match="password= returned has a NUL character") as caught:
        ask()
    assert "hunter" not in everything(caught.value)
    for check in (config.check_engine_options, config.check_reader_options):
        with pytest.raises(ConfigurationError, match="connect_args has a NUL character") as caught:
            check("options", {"connect_args": {"connect_timeout": 3, "password": "hunter\x002"}})
        assert "hunter" not in everything(caught.value)


def test_listeners_are_a_collection_of_functions():
    assert config.check_callables("listeners", [print]) == (print,)
    for bad in (print, ["print"]):
        with pytest.raises(ConfigurationError, match="listeners: give a list of functions"):
            config.check_callables("listeners", bad)


def test_a_conninfo_in_connect_args_is_refused_and_not_repeated():
    """A conninfo in connect_args is refused, because psycopg would repeat it in its errors."""
    with pytest.raises(ConfigurationError, match="comes from the URL") as caught:
        config.check_engine_options("engine_options", {"connect_args": {"conninfo": "app hunter2"}})
    assert "hunter2" not in everything(caught.value)


@pytest.mark.parametrize("option", ["pool", "poolclass", "creator", "strategy", "pool_reset_on_return"])
def test_engine_options_that_defeat_the_router_are_refused(option):
    """Engine options that would defeat the router are refused, and the error names them."""
    with pytest.raises(ConfigurationError, match=option):
        config.check_engine_options("engine_options", {"pool_size": 10, option: None})


def test_engine_options_are_copied():
    given = {"pool_size": 10}
    taken = config.check_engine_options("engine_options", given)
    assert taken == given
    assert taken is not given
    with pytest.raises(ConfigurationError, match="must be a dict"):
        config.check_engine_options("engine_options", [("pool_size", 10)])


def test_reader_options_are_put_over_those_of_all() -> None:
    """Reader options override those of all instances, dicts inside item by item, and the given dicts stay as they were."""
    of_all = {"pool_size": 10, "echo": False, "connect_args": {"a": 1, "b": 1}}
    given = {"pool_size": 2, "connect_args": {"b": 2}, "execution_options": {"c": 3}}
    assert config.merge_options(of_all, given) == {
        "pool_size": 2,
        "echo": False,
        "connect_args": {"a": 1, "b": 2},
        "execution_options": {"c": 3},
    }
    assert of_all["connect_args"] == {"a": 1, "b": 1}
    assert config.merge_options(of_all, {}) == of_all


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([("pool_size", 1)], "reader_options must be a dict"),
        ({"poolclass": None}, r"reader_options\['poolclass'\] cannot be used"),
        ({"connect_args": 5}, r"reader_options\['connect_args'\] must be a dict"),
        ({"isolation_level": "SERIALIZABLE"}, "isolation level"),
        ({"execution_options": {"isolation_level": "SERIALIZABLE"}}, "isolation level"),
    ],
)
def test_reader_options_that_cannot_be_used_are_refused(given: Any, words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        config.check_reader_options("reader_options", given)


@pytest.mark.parametrize("level", ["serializable", "READ_COMMITTED", "Repeatable Read", "AUTOCOMMIT", None])
def test_an_isolation_level_is_read_as_sqlalchemy_reads_it(level: Any) -> None:
    config.check_engine_options("engine_options", {"isolation_level": level, "execution_options": {"isolation_level": level}})


@pytest.mark.parametrize("level", ["hunter2", "", 5])
def test_an_isolation_level_that_is_none_is_not_repeated(level: Any) -> None:
    """The error for an unknown isolation level names the known ones instead."""
    for options in {"isolation_level": level}, {"execution_options": {"isolation_level": level}}:
        with pytest.raises(ConfigurationError, match="engine_options: use one of AUTOCOMMIT, ") as caught:
            config.check_engine_options("engine_options", options)
        assert "hunter2" not in everything(caught.value)


@pytest.mark.parametrize(
    ("options", "level"),
    [
        ({}, None),
        ({"isolation_level": "SERIALIZABLE"}, "SERIALIZABLE"),
        ({"execution_options": {"isolation_level": "AUTOCOMMIT"}}, "AUTOCOMMIT"),
        ({"execution_options": {}}, None),
    ],
)
def test_the_isolation_level_of_the_engine_options_is_known(options, level):
    assert config.get_isolation(options) == level


def test_a_password_in_the_query_is_hidden_like_any_other() -> None:
    target = urls.parse_url("postgresql+psycopg://app@db:5432/shop?password=hunter2zz")
    assert target.url.password == "hunter2zz"
    assert "hunter2zz" not in repr(target)


@pytest.mark.parametrize("name", ["password", "passwd"])
def test_several_passwords_in_the_query_are_refused(name: str) -> None:
    """Which one counts is not guessed."""
    with pytest.raises(ConfigurationError, match=f"more than one {name}") as caught:
        Router(f"postgresql+psycopg://app@db-1/shop?{name}=hunter2&{name}=hunter3")
    assert "hunter" not in everything(caught.value)


def test_a_slash_in_the_password_is_not_taken_for_a_host() -> None:
    with pytest.raises(ConfigurationError, match="%2F") as caught:
        urls.parse_url("postgresql+psycopg://a:sEc@Re/T@nohost.invalid/x")
    assert "Re:" not in str(caught.value)


@pytest.mark.parametrize("value", [5, None])
def test_what_must_be_a_list_is_refused_by_name(value: object) -> None:
    with pytest.raises(ConfigurationError, match="instances"):
        config.check_addresses("instances", value)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="read_only_functions"):
        config.check_names("read_only_functions", value)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="listeners"):
        config.check_callables("listeners", value)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="connect_args"):
        config.check_engine_options("engine_options", {"connect_args": 5})
    with pytest.raises(ConfigurationError, match="read_only"):
        config.check_flag("read_only", value)


@pytest.mark.parametrize("value", [0, 1.01, -0.5, math.nan, math.inf, True, "0.5", None])
def test_a_share_that_is_none_is_refused_with_what_to_write(value: object) -> None:
    with pytest.raises(ConfigurationError, match=r"writer_share_for_reads=.*above 0 and at most 1"):
        config.check_share("writer_share_for_reads", value)


@pytest.mark.parametrize("value", [0.001, 0.5, 1, 1.0])
def test_a_share_may_be_all(value: float) -> None:
    config.check_share("writer_share_for_reads", value)


@pytest.mark.parametrize("value", [0, -1, 2.0, True, "4", None])
def test_a_count_that_is_none_is_refused_with_what_to_write(value: object) -> None:
    with pytest.raises(ConfigurationError, match=r"connects_at_once=.*1 or more"):
        config.check_count("connects_at_once", value)
    config.check_count("connects_at_once", 1)


@pytest.mark.parametrize(
    ("options", "limits"),
    [
        ({}, (15, 30.0)),
        ({"pool_size": 3, "max_overflow": 0, "pool_timeout": 2}, (3, 2)),
        ({"pool_size": 0}, (math.inf, 30.0)),
        ({"max_overflow": -1, "pool_timeout": -5}, (math.inf, 0)),
    ],
)
def test_the_limits_of_a_pool_are_read_as_sqlalchemy_reads_them(options, limits):
    assert config.get_pool_limits(options) == limits


@pytest.mark.parametrize("option", ["pool_size", "max_overflow", "pool_timeout"])
@pytest.mark.parametrize("value", ["5", None, True])
def test_a_limit_of_a_pool_that_is_no_number_is_refused_by_name(option, value):
    with pytest.raises(ConfigurationError, match=rf"engine_options\['{option}'\]"):
        config.check_engine_options("engine_options", {option: value})


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
    assert mysql.fixed_address({}, arguments) == ("the socket of read_default_file" if refused else "")
    file.write_text("no option file")
    assert mysql.fixed_address({}, arguments) == ""


@pytest.mark.parametrize("file", [5, "/Zq\0"])
def test_a_file_that_cannot_be_looked_for_is_left_to_the_driver(file: Any) -> None:
    """A file that cannot be looked for is left to the driver, which says so when it connects."""
    assert mysql.fixed_address({}, {"read_default_file": file}) == ""
    assert postgresql.fixed_address({}, {"service": "shop", "servicefile": file}) == ""


def test_an_address_in_the_environment_is_found(monkeypatch, tmp_path):
    """An address that libpq takes from PGHOSTADDR, or from a service, is found."""
    monkeypatch.delenv("PGSERVICEFILE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PGSYSCONFDIR", str(tmp_path))
    assert postgresql.fixed_address({"service": "shop"}, {}) == ""
    (tmp_path / "pg_service.conf").write_text("[shop]\nhostaddr=10.0.0.1\n[other]\nuser=app\n")
    assert postgresql.fixed_address({"service": "shop"}, {}) == "the hostaddr of the service"
    assert postgresql.fixed_address({"service": "other"}, {}) == ""
    (tmp_path / ".pg_service.conf").write_text("[shop]\nuser=app\n")
    assert postgresql.fixed_address({"service": "shop"}, {}) == ""
    (tmp_path / ".pg_service.conf").write_text("no service file")
    assert postgresql.fixed_address({"service": "other"}, {}) == ""
    monkeypatch.setenv("PGHOSTADDR", "10.0.0.1")
    with pytest.raises(ConfigurationError, match=f"^PGHOSTADDR, or a service, in the environment {SAME}"):
        Router(PG, instances=["db-2"])
    Router(PG).close()


@pytest.mark.parametrize("what", ["router", "engine"])
def test_a_time_limit_while_an_engine_is_made_is_let_pass(what: str) -> None:
    """An exception of a signal handler is no mistake in the options, so it reaches the application as it is."""
    url = "postgresql+psycopg://app@db-1/shop"

    def make_router() -> None:
        Router(url)

    router = Router(url)
    (instance,) = router._monitor.topology.instances

    def make_engine() -> None:
        router._engines._engines.clear()
        router.engine(instance)

    work = make_router if what == "router" else make_engine
    for _ in interrupted_at_each_line(work, "sqlalchemy/engine/create.py", by=SoftTimeLimitExceeded):
        pass
