"""What a user may give, and that every refusal says what to write instead and repeats no password."""

import math

import pytest
from sqlalchemy.engine import make_url

from aurora_router import config
from aurora_router.errors import ConfigurationError
from aurora_router.servers import mysql, postgresql

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
    target = config.read_url(url)
    assert list(target.hosts) == hosts
    assert (target.url.host, target.url.port) == hosts[0]
    assert target.server is postgresql


def test_a_sqlalchemy_url_is_as_good_as_text():
    url = make_url(HEAD + "db-1/shop")
    assert config.read_url(url).hosts == (("db-1", 5432),)
    assert config.read_url(url).url.password == "hunter2"


def test_options_that_choose_an_instance_are_the_routers_business_and_the_others_stay():
    url = HEAD + "db-1/shop?target_session_attrs=any&load_balance_hosts=random&application_name=x"
    assert dict(config.read_url(url).url.query) == {"application_name": "x"}


def test_a_managed_host_is_never_spoken_to_in_the_clear_unless_the_user_says_so():
    host = "shop.cluster-x.eu-west-1.rds.amazonaws.com"
    assert config.read_url(HEAD + host + "/shop").url.query["sslmode"] == "require"
    assert config.read_url(HEAD + host + "/shop?sslmode=disable").url.query["sslmode"] == "disable"
    assert "sslmode" not in config.read_url(HEAD + "db-1/shop").url.query


@pytest.mark.parametrize("password", ["p%40ss", "p%2Fss", "p%2Css", "p:ss", "p%23ss", "p%3Fss", "", "ünïcode", "%20"])
def test_a_password_may_hold_any_character_that_is_written_as_in_urls(password):
    target = config.read_url(f"postgresql+psycopg://app:{password}@db-1,db-2/shop")
    assert target.url.password == make_url(f"postgresql+psycopg://app:{password}@db-1/shop").password
    assert [host for host, _ in target.hosts] == ["db-1", "db-2"]


@pytest.mark.parametrize("dialect", ["mysql", "mariadb"])
def test_a_url_of_mysql_or_mariadb_is_read_in_the_same_way(dialect):
    target = config.read_url(f"{dialect}+pymysql://app:p%40ss@db-1,db-2:3307/shop?charset=utf8mb4")
    assert (target.server, target.dialect, target.hosts) == (mysql, dialect, (("db-1", 3306), ("db-2", 3307)))
    assert dict(target.url.query) == {"charset": "utf8mb4"}
    managed = config.read_url(f"{dialect}+pymysql://app@shop.cluster-x.eu-west-1.rds.amazonaws.com/shop")
    assert dict(managed.url.query) == {"ssl_check_hostname": "false"}


@pytest.mark.parametrize(
    ("url", "instead"),
    [
        ("mysql://db-1/shop", "write mysql+pymysql://"),
        ("mariadb+mysqldb://db-1/shop", "write mysql+pymysql://"),
        ("postgres://db-1/shop", "write postgresql+psycopg://"),
        ("oracle://db-1/shop", "use postgresql+psycopg://.* or mysql+pymysql://"),
    ],
)
def test_a_url_of_another_driver_or_database_is_told_what_to_write(url, instead):
    with pytest.raises(ConfigurationError, match=instead.replace("+", r"\+")):
        config.read_url(url)


@pytest.mark.parametrize("password", ["p,ss", "p,s,s", "p/s,s", "p?s,s", "p#s,s"])
def test_a_comma_in_a_password_makes_no_list_of_hosts(password):
    target = config.read_url(f"postgresql+psycopg://app:{password}@db-1/shop")
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
def test_a_url_that_cannot_work_gets_an_error_without_the_password(url):
    with pytest.raises(ConfigurationError) as caught:
        config.read_url(url)
    assert "hunter2" not in str(caught.value)
    assert caught.value.__cause__ is None


UNQUOTED = ["hunt@er2@db-1", "hunt@er2@db-1,db-2", "hunt,@er2@db-1", "hunt@er2,x@db-1", "@hunter2@db-1"]


@pytest.mark.parametrize("rest", UNQUOTED)
def test_an_unquoted_at_sign_in_a_password_is_refused_and_no_part_of_it_becomes_a_host(rest):
    with pytest.raises(ConfigurationError) as caught:
        config.read_url(f"postgresql+psycopg://app:{rest}/shop")
    assert "hunt" not in str(caught.value)
    assert "er2" not in str(caught.value)


@pytest.mark.parametrize("rest", ["db-1:99999/shop", "db 1/shop"])
def test_a_single_host_is_checked_like_the_others(rest):
    with pytest.raises(ConfigurationError):
        config.read_url(HEAD + rest)


def test_all_instances_of_a_router_are_the_urls_first_and_each_once():
    target = config.read_url(HEAD + "db-1,db-2/shop")
    assert ids(config.instances(target, ["db-2:5432", "db-3:6000", "[::1]"], None)) == [
        "db-1:5432",
        "db-2:5432",
        "db-3:6000",
        "[::1]:5432",
    ]


def test_a_reader_endpoint_comes_last_and_never_serves_as_the_writer():
    found = config.instances(config.read_url(HEAD + "db-1/shop"), ["db-2"], "db-ro:5432")
    assert ids(found) == ["db-1:5432", "db-2:5432", "db-ro:5432"]
    assert [instance.reader_only for instance in found] == [False, False, True]


def test_the_reader_endpoint_must_be_another_name():
    with pytest.raises(ConfigurationError, match="db-1:5432 is among the other instances"):
        config.instances(config.read_url(HEAD + "db-1/shop"), [], "db-1")


def test_instances_are_a_list_and_not_a_text():
    with pytest.raises(ConfigurationError, match="must be a list, like"):
        config.instances(config.read_url(HEAD + "db-1/shop"), "db-2:5432", None)


BAD_ADDRESSES = ["", "db-1:", "db-1:x", "db-1:0", "db-1:65536", "db 1", "::1", "[::1", "app:hunter2@db-1", "x//db-1", 5, None]


@pytest.mark.parametrize("address", BAD_ADDRESSES, ids=str)
def test_an_address_that_is_none_is_refused(address):
    with pytest.raises(ConfigurationError) as caught:
        config.instance(address, postgresql)
    assert "hunter2" not in str(caught.value)


def test_an_address_is_a_host_and_a_port_or_the_usual_port():
    assert config.instance(" db-1 ", postgresql).id == "db-1:5432"
    assert config.instance("db-1:6000", postgresql).port == 6000
    assert config.instance("[::1]:6000", postgresql).host == "::1"


@pytest.mark.parametrize("value", [0, -1, 0.0, math.inf, math.nan, "5", None, True])
def test_seconds_are_a_finite_number_above_zero(value):
    with pytest.raises(ConfigurationError, match="probe_interval="):
        config.check_seconds("probe_interval", value)


@pytest.mark.parametrize("value", [1, 0.05, 60.0])
def test_seconds_may_be_whole_or_not(value):
    config.check_seconds("probe_interval", value)


def test_a_choice_is_one_of_those_listed():
    config.check_choice("no_reader", "error", ("writer", "error"))
    with pytest.raises(ConfigurationError, match="no_reader='none': use one of 'writer', 'error'"):
        config.check_choice("no_reader", "none", ("writer", "error"))


def test_names_are_a_collection_of_texts():
    assert config.names("read_only_functions", ["f", "g"]) == ("f", "g")
    for bad in ("f", [1]):
        with pytest.raises(ConfigurationError, match="read_only_functions: give a list of names"):
            config.names("read_only_functions", bad)


@pytest.mark.parametrize("value", ["secret", b"secret", None, 5, [5], [""], {"old", "new"}, {"old": "new"}])
def test_keys_are_secrets_in_an_order_and_no_error_repeats_them(value):
    assert config.keys("token_keys", ["old", b"new"]) == ("old", b"new")
    with pytest.raises(ConfigurationError, match="token_keys") as raised:
        config.keys("token_keys", value)
    assert "new" not in str(raised.value).replace("newest", "")


def test_listeners_are_a_collection_of_functions():
    assert config.callables("listeners", [print]) == (print,)
    for bad in (print, ["print"]):
        with pytest.raises(ConfigurationError, match="listeners: give a list of functions"):
            config.callables("listeners", bad)


@pytest.mark.parametrize("option", ["pool", "poolclass", "creator", "strategy", "pool_reset_on_return"])
def test_engine_options_that_would_defeat_the_router_are_refused_by_name(option):
    with pytest.raises(ConfigurationError, match=option):
        config.check_engine_options({"pool_size": 10, option: None})


def test_engine_options_are_copied():
    given = {"pool_size": 10}
    taken = config.check_engine_options(given)
    assert taken == given
    assert taken is not given
    with pytest.raises(ConfigurationError, match="must be a dict"):
        config.check_engine_options([("pool_size", 10)])


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
    assert config.isolation(options) == level


def test_a_password_in_the_query_is_hidden_like_any_other() -> None:
    target = config.read_url("postgresql+psycopg://app@db:5432/shop?password=hunter2zz")
    assert target.url.password == "hunter2zz"
    assert "hunter2zz" not in repr(target)


def test_a_slash_in_the_password_is_not_taken_for_a_host() -> None:
    with pytest.raises(ConfigurationError, match="%2F") as caught:
        config.read_url("postgresql+psycopg://a:sEc@Re/T@nohost.invalid/x")
    assert "Re:" not in str(caught.value)


@pytest.mark.parametrize("value", [5, None])
def test_what_must_be_a_list_is_refused_by_name(value: object) -> None:
    target = config.read_url("postgresql+psycopg://app@db:5432/shop")
    with pytest.raises(ConfigurationError, match="instances"):
        config.instances(target, value, None)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="read_only_functions"):
        config.names("read_only_functions", value)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="listeners"):
        config.callables("listeners", value)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="connect_args"):
        config.check_engine_options({"connect_args": 5})
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
    assert config.pool_limits(options) == limits


@pytest.mark.parametrize("option", ["pool_size", "max_overflow", "pool_timeout"])
@pytest.mark.parametrize("value", ["5", None, True])
def test_a_limit_of_a_pool_that_is_no_number_is_refused_by_name(option, value):
    with pytest.raises(ConfigurationError, match=option):
        config.pool_limits({option: value})
