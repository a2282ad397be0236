"""URLs and addresses of instances: they are read as libpq and SQLAlchemy read them, and no refusal repeats a password."""

import sys

import pytest
from sqlalchemy.engine import make_url

from aurora_router import Router
from aurora_router.config import urls
from aurora_router.drivers import psycopg as psycopg_driver
from aurora_router.drivers import pymysql as pymysql_driver
from aurora_router.errors import ConfigurationError
from tests.unit.errors import everything

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
    assert target.driver is psycopg_driver


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
    module = {"psycopg": psycopg_driver, "pymysql": pymysql_driver}[driver]
    assert {"user", "password", "host"} <= module.options()
    monkeypatch.setitem(sys.modules, driver, None)
    monkeypatch.delitem(sys.modules, "pymysql.connections", raising=False)
    assert not module.options()


def test_a_sqlalchemy_url_is_as_good_as_text():
    url = make_url(HEAD + "db-1/shop")
    assert urls.parse_url(url).hosts == (("db-1", 5432),)
    assert urls.parse_url(url).url.password == "hunter2"


def test_url_options_that_choose_an_instance_are_removed():
    """The router takes options that choose an instance out of the URL, and leaves the others in it."""
    url = HEAD + "db-1/shop?target_session_attrs=any&load_balance_hosts=random&application_name=x"
    assert dict(urls.parse_url(url).url.query) == {"application_name": "x"}


@pytest.mark.parametrize("password", ["p%40ss", "p%2Fss", "p%2Css", "p:ss", "p%23ss", "p%3Fss", "", "ünïcode", "%20"])
def test_a_password_may_hold_any_percent_encoded_character(password):
    """A password may hold any character that is written as in URLs."""
    target = urls.parse_url(f"postgresql+psycopg://app:{password}@db-1,db-2/shop")
    assert target.url.password == make_url(f"postgresql+psycopg://app:{password}@db-1/shop").password
    assert [host for host, _ in target.hosts] == ["db-1", "db-2"]


@pytest.mark.parametrize("dialect", ["mysql", "mariadb"])
def test_a_url_of_mysql_or_mariadb_is_read_in_the_same_way(dialect):
    target = urls.parse_url(f"{dialect}+pymysql://app:p%40ss@db-1,db-2:3307/shop?charset=utf8mb4")
    assert (target.driver, target.dialect, target.hosts) == (pymysql_driver, dialect, (("db-1", 3306), ("db-2", 3307)))
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
        urls.parse_instance(address, psycopg_driver)
    assert "hunter2" not in str(caught.value)


def test_an_address_is_a_host_and_a_port_or_the_usual_port():
    assert urls.parse_instance(" db-1 ", psycopg_driver).id == "db-1:5432"
    assert urls.parse_instance("db-1:6000", psycopg_driver).port == 6000
    assert urls.parse_instance("[::1]:6000", psycopg_driver).host == "::1"


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
