"""The values of the settings. Every refusal says what to write instead and repeats no password."""

import math
from typing import Any

import pytest
from sqlalchemy.engine import URL

from aurora_router import Router
from aurora_router.config import checks
from aurora_router.config.settings import Settings
from aurora_router.errors import ConfigurationError
from aurora_router.router import core_of
from tests.interruptions import SoftTimeLimitExceeded, interrupted_at_each_line
from tests.unit.errors import everything


def test_instances_are_a_list_and_not_a_text():
    for text in ("db-2:5432", b"db-2:5432", {"db-2:5432": 1}):
        with pytest.raises(ConfigurationError, match="instances must be a list, like"):
            checks.check_addresses("instances", text)


@pytest.mark.parametrize("value", [0, -1, 0.0, math.inf, math.nan, "5", None, True])
def test_seconds_are_a_finite_number_above_zero(value):
    with pytest.raises(ConfigurationError, match="probe_interval="):
        checks.check_seconds("probe_interval", value)


@pytest.mark.parametrize("value", [1, 0.05, 60.0])
def test_seconds_may_be_whole_or_not(value):
    checks.check_seconds("probe_interval", value)


def test_a_choice_is_one_of_those_listed():
    checks.check_choice("no_reader", "error", ("writer", "error"))
    with pytest.raises(ConfigurationError, match=r"no_reader=\.\.\.: use one of 'writer', 'error'"):
        checks.check_choice("no_reader", "none", ("writer", "error"))


def test_names_are_a_collection_of_texts():
    assert checks.check_names("read_only_functions", ["f", "g"]) == ("f", "g")
    for bad in ("f", [1]):
        with pytest.raises(ConfigurationError, match="read_only_functions: give a list of names"):
            checks.check_names("read_only_functions", bad)


@pytest.mark.parametrize("value", ["secret", b"secret", None, 5, [5], [""], {"old", "new"}, {"old": "new"}])
def test_keys_are_secrets_in_an_order_and_no_error_repeats_them(value):
    assert checks.check_keys("token_keys", ["old", b"new"]) == ("old", b"new")
    with pytest.raises(ConfigurationError, match="token_keys") as raised:
        checks.check_keys("token_keys", value)
    assert "new" not in str(raised.value).replace("newest", "")


def test_a_password_is_a_text_or_a_function_that_returns_one():
    """Any other password is refused, when it is given or when the function is called, and is not repeated."""
    assert checks.check_password("password", None) is None
    assert checks.check_password("password", "hunter2") == "hunter2"
    with pytest.raises(ConfigurationError, match="password: give a text, or a function") as caught:
        checks.check_password("password", b"hunter2")
    assert "hunter2" not in everything(caught.value)
    ask = checks.check_password("password", lambda: "hunter2")
    assert callable(ask)
    assert ask() == "hunter2"
    ask = checks.check_password("password", lambda: b"hunter2")
    with pytest.raises(ConfigurationError, match="password= returned no text, but bytes") as caught:
        ask()
    assert "hunter2" not in everything(caught.value)
    ask = checks.check_password("password", lambda instance: "hunter2")
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
        checks.check_password("password", "hunter\x002")
    assert "hunter" not in everything(caught.value)
    ask = checks.check_password("password", lambda: "hunter\x002")
    with pytest.raises(ConfigurationError, match="password= returned has a NUL character") as caught:
        ask()
    assert "hunter" not in everything(caught.value)
    for check in (checks.check_engine_options, checks.check_reader_options):
        with pytest.raises(ConfigurationError, match="connect_args has a NUL character") as caught:
            check("options", {"connect_args": {"connect_timeout": 3, "password": "hunter\x002"}})
        assert "hunter" not in everything(caught.value)


def test_listeners_are_a_collection_of_functions():
    assert checks.check_callables("listeners", [print]) == (print,)
    for bad in (print, ["print"]):
        with pytest.raises(ConfigurationError, match="listeners: give a list of functions"):
            checks.check_callables("listeners", bad)


def test_a_conninfo_in_connect_args_is_refused_and_not_repeated():
    """A conninfo in connect_args is refused, because psycopg would repeat it in its errors."""
    with pytest.raises(ConfigurationError, match="comes from the URL") as caught:
        checks.check_engine_options("engine_options", {"connect_args": {"conninfo": "app hunter2"}})
    assert "hunter2" not in everything(caught.value)


@pytest.mark.parametrize("option", ["pool", "poolclass", "creator", "strategy", "pool_reset_on_return"])
def test_engine_options_that_defeat_the_router_are_refused(option):
    """Engine options that would defeat the router are refused, and the error names them."""
    with pytest.raises(ConfigurationError, match=option):
        checks.check_engine_options("engine_options", {"pool_size": 10, option: None})


def test_engine_options_are_copied():
    given = {"pool_size": 10}
    taken = checks.check_engine_options("engine_options", given)
    assert taken == given
    assert taken is not given
    with pytest.raises(ConfigurationError, match="must be a dict"):
        checks.check_engine_options("engine_options", [("pool_size", 10)])


def test_reader_options_are_put_over_those_of_all() -> None:
    """Reader options override those of all instances, dicts inside item by item, and the given dicts stay as they were."""
    of_all = {"pool_size": 10, "echo": False, "connect_args": {"a": 1, "b": 1}}
    given = {"pool_size": 2, "connect_args": {"b": 2}, "execution_options": {"c": 3}}
    assert checks.merge_options(of_all, given) == {
        "pool_size": 2,
        "echo": False,
        "connect_args": {"a": 1, "b": 2},
        "execution_options": {"c": 3},
    }
    assert of_all["connect_args"] == {"a": 1, "b": 1}
    assert checks.merge_options(of_all, {}) == of_all


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
        checks.check_reader_options("reader_options", given)


@pytest.mark.parametrize("level", ["serializable", "READ_COMMITTED", "Repeatable Read", "AUTOCOMMIT", None])
def test_an_isolation_level_is_read_as_sqlalchemy_reads_it(level: Any) -> None:
    checks.check_engine_options("engine_options", {"isolation_level": level, "execution_options": {"isolation_level": level}})


@pytest.mark.parametrize("level", ["hunter2", "", 5])
def test_an_isolation_level_that_is_none_is_not_repeated(level: Any) -> None:
    """The error for an unknown isolation level names the known ones instead."""
    for options in {"isolation_level": level}, {"execution_options": {"isolation_level": level}}:
        with pytest.raises(ConfigurationError, match="engine_options: use one of AUTOCOMMIT, ") as caught:
            checks.check_engine_options("engine_options", options)
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
    assert checks.get_isolation(options) == level


@pytest.mark.parametrize("value", [5, None])
def test_what_must_be_a_list_is_refused_by_name(value: object) -> None:
    with pytest.raises(ConfigurationError, match="instances"):
        checks.check_addresses("instances", value)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="read_only_functions"):
        checks.check_names("read_only_functions", value)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="listeners"):
        checks.check_callables("listeners", value)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="connect_args"):
        checks.check_engine_options("engine_options", {"connect_args": 5})
    with pytest.raises(ConfigurationError, match="read_only"):
        checks.check_flag("read_only", value)


@pytest.mark.parametrize("value", [0, 1.01, -0.5, math.nan, math.inf, True, "0.5", None])
def test_a_share_that_is_none_is_refused_with_what_to_write(value: object) -> None:
    with pytest.raises(ConfigurationError, match=r"writer_share_for_reads=.*above 0 and at most 1"):
        checks.check_share("writer_share_for_reads", value)


@pytest.mark.parametrize("value", [0.001, 0.5, 1, 1.0])
def test_a_share_may_be_all(value: float) -> None:
    checks.check_share("writer_share_for_reads", value)


@pytest.mark.parametrize("value", [0, -1, 2.0, True, "4", None])
def test_a_count_that_is_none_is_refused_with_what_to_write(value: object) -> None:
    with pytest.raises(ConfigurationError, match=r"connects_at_once=.*1 or more"):
        checks.check_count("connects_at_once", value)
    checks.check_count("connects_at_once", 1)


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
    assert checks.get_pool_limits(options) == limits


@pytest.mark.parametrize("option", ["pool_size", "max_overflow", "pool_timeout"])
@pytest.mark.parametrize("value", ["5", None, True])
def test_a_limit_of_a_pool_that_is_no_number_is_refused_by_name(option, value):
    with pytest.raises(ConfigurationError, match=rf"engine_options\['{option}'\]"):
        checks.check_engine_options("engine_options", {option: value})


@pytest.mark.parametrize("what", ["router", "engine"])
def test_a_time_limit_while_an_engine_is_made_is_let_pass(what: str) -> None:
    """An exception of a signal handler is no mistake in the options, so it reaches the application as it is."""
    url = "postgresql+psycopg://app@db-1/shop"

    def make_router() -> None:
        Router(url)

    router = Router(url)
    (instance,) = core_of(router).monitor.topology.instances
    router.engine(instance)  # so that what all engines share exists

    def make_engine() -> None:
        core_of(router).engines._pools.clear()
        router.engine(instance)

    work = make_router if what == "router" else make_engine
    for _ in interrupted_at_each_line(work, "sqlalchemy/engine/create.py", by=SoftTimeLimitExceeded):
        pass
