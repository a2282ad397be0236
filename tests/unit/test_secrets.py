"""No part of a password is in an error, its chain or a repr, wherever a user may put it by mistake."""

import psycopg
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from sqlalchemy import event

from aurora_router import ConfigurationError, Router, RoutingSession, classify
from aurora_router.__main__ import main
from aurora_router.cluster.connect_errors import connect_argument_error
from aurora_router.cluster.instance_pool import EngineConfig
from aurora_router.config import urls
from aurora_router.drivers import psycopg as psycopg_driver
from aurora_router.drivers import pymysql as pymysql_driver
from aurora_router.router import core_of
from aurora_router.waiting import ThreadWaiting
from tests.unit.errors import everything

PIECE = st.sampled_from(["Zq0", "Zq1x", "Zq22", "Zqé", "ZQ3-z"])
BETWEEN = st.sampled_from(
    [",", "@", ":", "/", "//", "?", "#", "%", "%4", " ", "&", "=", "+", "[", "]", "::", "\\", "'", '"', "\n", ""]
)
HEADS = st.sampled_from(["postgresql+psycopg", "mysql+pymysql", "mariadb+pymysql", "postgresql", "mysql+mysqldb", "oracle"])


@st.composite
def passwords(draw):
    """Pieces that stand in no message of the router, with characters between them that mean something in a URL."""
    pieces = draw(st.lists(PIECE, min_size=1, max_size=4))
    return "".join(draw(BETWEEN) + piece for piece in pieces) + draw(BETWEEN)


def hidden(said):
    return "zq" not in said.lower()


IN_QUERY = ["{head}://app@db-1/shop?password={password}", "{head}://app@db-1/shop?passwd={password}"]
WITHOUT_SLASHES = "{head}:{password}@db-1"
URLS = [
    "{head}://app:{password}@db-1:5432/shop",
    "{head}://app:{password}@db-1,db-2/shop?application_name=x",
    "{head}://app:{password}@[::1]:5432/shop",
    "{head}://app:{password}@/shop?host=db-1&host=db-2",
    "{head}://app:{password}@/shop",
    "{head}://app@db-1:{password}/shop",
    "{head}://db-1:5432@app:{password}/shop",
    "{head}:///app:{password}@db-1/shop",
    "{head}://app@/shop?host=app:{password}@db-1",
    *IN_QUERY,
    "app:{password}@db-1/shop",
    "{password}",
    WITHOUT_SLASHES,
]


@settings(deadline=None)
@given(head=HEADS, url=st.sampled_from(URLS), password=passwords(), as_bytes=st.booleans())
@example(head="postgresql+psycopg", url=URLS[0], password="Zq0,Zq1/Zq2", as_bytes=False)
@example(head="postgresql+psycopg", url=URLS[0], password="Zq0@Zq1?Zq2", as_bytes=False)
@example(head="postgresql+psycopg", url=URLS[0], password="Zq0@Zq1?x=Zq2", as_bytes=False)
@example(head="postgresql+psycopg", url=URLS[5], password="Zq0", as_bytes=False)
@example(head="postgresql+psycopg", url=URLS[5], password="@Zq0/", as_bytes=False)
def test_no_part_of_a_password_in_a_url_is_shown(head, url, password, as_bytes):
    """A URL is accepted with the password hidden and no part of it in a host, or refused without repeating any of it."""
    # Such a password would make a URL with a user's name, or an option of its own. Both are shown.
    assume(not (url == WITHOUT_SLASHES and password.startswith("//")) and not (url in IN_QUERY and "&" in password))
    text = url.format(head=head, password=password)
    refused, target = None, None
    try:
        target = urls.parse_url(text.encode() if as_bytes else text)
    except ConfigurationError as error:
        refused = error
    if target is None:
        assert hidden(everything(refused))
        return
    found = urls.parse_instances(target, (), None)
    assert hidden(repr(target))
    assert hidden(repr(found))
    assert all(hidden(repr(target.at(instance, {}))) for instance in found)


WRONG = ["{head}://app:{p}@db-2/shop", "app:{p}@db-2:5432", "app:{p}@db-2", "db-2:{p}", "//app:{p}@db-2", "app@{p}:db-2"]


@settings(deadline=None)
@given(head=HEADS, wrong=st.sampled_from(WRONG), password=passwords(), place=st.integers(0, 5))
def test_no_part_of_a_password_in_an_address_is_shown(head, wrong, password, place):
    """A URL, or a part of one, in place of an address is refused without repeating any of it."""
    text = wrong.format(head=head, p=password)
    url = "postgresql+psycopg://app@db-1/shop"
    options = [
        {"instances": text},
        {"instances": ["db-3", text]},
        {"instances": [text.encode()]},
        {"instances": text.split(",") if "," in text else [text]},
        {"reader_endpoint": text},
        {"instances": text.encode()},
    ][place]
    with pytest.raises(ConfigurationError) as caught:
        Router(url, **options)
    assert hidden(everything(caught.value))
    with Router(url) as router:
        for change in (router.add_instance, router.remove_instance):
            with pytest.raises(ConfigurationError) as caught:
                change(text)
            assert hidden(everything(caught.value))
        assert hidden(repr(router.__repr__()))


@pytest.mark.parametrize(
    "arguments", [["init-commit-table", "db", "{}"], ["topology", "--interval", "{}"], ["topology", "--x={}"], ["{}"]]
)
def test_a_misplaced_url_on_the_command_line_is_not_shown(arguments, capsys):
    """The command line's own error about an argument does not repeat a URL."""
    url = "postgresql+psycopg://app:Zq0@db-2/shop"
    assert main([argument.format(url) for argument in arguments]) > 0
    said = capsys.readouterr()
    assert "--help" in said.err
    assert hidden(said.err + said.out)


def under(name, *path):
    """A function that makes a Router's setting with a value, or with the value at this path inside."""

    def make(value):
        for key in reversed(path):
            value = {key: value}
        return {name: value}

    return make


SETTINGS = [
    *(under(name) for name in ("pooler", "consistency", "no_reader", "balance", "failover_timeout", "writer_share_for_reads")),
    *(under(name) for name in ("engine_options", "reader_options", "accept_new_cluster", "connects_at_once")),
    *(
        under(options, *path)
        for options in ("engine_options", "reader_options")
        for path in (
            *(("pool_size",), ("max_overflow",), ("pool_timeout",), ("isolation_level",), ("paramstyle",), ("echo",)),
            *(("execution_options", "isolation_level"), ("execution_options",), ("connect_args",), ("plugins",), ("unknown",)),
            *(("connect_args", "conninfo"), ("poolclass",)),
        )
    ),
]


@settings(deadline=None)
@given(
    setting=st.sampled_from(SETTINGS), value=passwords(), head=HEADS.filter(lambda head: head.endswith(("psycopg", "pymysql")))
)
def test_no_value_of_a_wrong_setting_is_shown(setting, value, head):
    """A Router refuses a wrong setting by name without its value, which may be a secret in the wrong place."""
    given = setting(value)
    if "plugins" in str(given):
        given = {name: {"plugins": [options["plugins"]]} for name, options in given.items()}
    with pytest.raises(ConfigurationError) as caught:
        Router(f"{head}://app@db-1/shop", **given)
    assert hidden(everything(caught.value))
    assert next(iter(given)) in str(caught.value)


class Factory:
    """Its instances can be called and show a secret in their repr."""

    def __call__(self, session):
        return session

    def __repr__(self):
        return "Zq0"


HERE = "postgresql+psycopg://app@db-1/shop"
SECRET = "postgresql+psycopg://app:Zq0@db-1/shop"


@pytest.mark.parametrize(
    "misuse",
    [
        lambda router: RoutingSession(router=router, read_only=SECRET),
        lambda router: RoutingSession(router=router, commit_check=SECRET),
        lambda router: router.transactional(Factory()),
        lambda router: Router(HERE, engine_options={SECRET: 1}),
        lambda router: Router(HERE, reader_options={SECRET: 1}),
        lambda router: Router(HERE, engine_options={"connect_args": {SECRET: 1}}),
        lambda router: classify("SELECT 1", SECRET),
    ],
)
def test_no_misplaced_value_is_shown(misuse):
    """An argument that cannot be used is refused without its value, which may be a secret in the wrong place."""
    with pytest.raises(ValueError, match=r"use|give|known are") as caught:
        misuse(Router(HERE))
    assert hidden(everything(caught.value))


@pytest.mark.parametrize(
    ("url", "name"),
    [
        *((HERE, name) for name in ("sslpassword", "oauth_client_secret", "scram_client_key", "scram_server_key")),
        ("mysql+pymysql://app@db-1/shop", "ssl_key_password"),
    ],
)
def test_a_secret_besides_the_password_is_in_no_repr(url, name):
    """A private key's password in a URL's query, or libpq's other secrets, are in no repr. The driver gets them all the same."""
    router = Router(f"{url}?{name}=Zq0")
    engine = router.engine(core_of(router).monitor.topology.instances[0])
    assert hidden(repr((engine, engine.url, core_of(router).settings.target)))
    given = []

    def do_connect(dialect, record, arguments, options):
        given.append(options)
        raise ConfigurationError("enough is known")

    event.listen(engine, "do_connect", do_connect)
    with pytest.raises(ConfigurationError, match="enough"):
        engine.connect()
    assert given[0][name] == "Zq0"


def test_no_secret_of_create_engines_options_is_in_a_repr():
    """A traceback may show its locals, so the record of create_engine()'s options shows none of them."""
    options = {"connect_args": {"password": "Zq0", "sslpassword": "Zq1"}}
    config = EngineConfig(options, options, ThreadWaiting())
    assert hidden(repr(config))
    assert hidden(f"{config}")


@pytest.mark.parametrize("found", ["service", "socket"])
def test_the_file_that_fixes_an_address_is_not_shown(found, tmp_path, monkeypatch):
    """The error for a fixed address shows neither the file nor the name of the service in it."""
    file = tmp_path / "Zq0"
    file.write_text("[Zq1]\nhostaddr=10.0.0.9\nsocket=/Zq2\n")
    monkeypatch.setenv("PGSERVICEFILE", str(file))
    query = {"service": "service=Zq1", "socket": f"read_default_file={file}&read_default_group=Zq1"}[found]
    head = {"service": "postgresql+psycopg", "socket": "mysql+pymysql"}[found]
    with pytest.raises(ConfigurationError, match=found) as caught:
        Router(f"{head}://app@db-1,db-2/shop?{query}")
    assert hidden(everything(caught.value))


@settings(deadline=None)
@given(password=passwords())
def test_no_value_that_a_driver_cannot_use_is_shown(password):
    """Neither libpq's words nor Python's show an option's value, which may be a password in the wrong place."""
    said = f'connection is bad: invalid sslmode value: "{password}"'
    assert hidden(psycopg_driver.explain(psycopg.OperationalError(said))[0])
    said = f'connection is bad: invalid integer value "{password}" for connection option "port"'
    assert hidden(psycopg_driver.explain(psycopg.OperationalError(said))[0])
    for driver in (psycopg_driver, pymysql_driver):
        for error in (ValueError(f"invalid literal for int(): {password!r}"), KeyError(password)):
            assert hidden(str(connect_argument_error(error, driver)))
