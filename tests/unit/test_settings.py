"""The settings of a router: each is written once, and its signature, its check and its documentation come from that."""

import dataclasses
import inspect
import pydoc

import pytest

from aurora_router import ConfigurationError, Router
from aurora_router.config.settings import SETTINGS, Settings

URL = "postgresql+psycopg://db-1/shop"
NAMES = [each.name for each in SETTINGS]


def test_a_router_takes_each_setting_by_its_name():
    """The signature of Router has every setting with its type and its default, the URL first and all others by name."""
    first, *others = inspect.signature(Router).parameters.values()
    assert (first.name, first.kind, first.default) == ("url", first.POSITIONAL_OR_KEYWORD, first.empty)
    assert {each.kind for each in others} == {inspect.Parameter.KEYWORD_ONLY}
    assert [first.name, *(each.name for each in others)] == NAMES
    for parameter, each in zip(others, SETTINGS[1:], strict=True):
        assert (parameter.annotation, parameter.default) == (each.type, each.default)


@pytest.mark.parametrize("each", SETTINGS, ids=NAMES)
def test_help_says_what_each_setting_means(each):
    text = pydoc.render_doc(Router, renderer=pydoc.plaintext)
    assert f" {each.name}:" in text or f" {each.name} (" in text
    assert all(line in text for line in each.metadata["meaning"])


@pytest.mark.parametrize("each", SETTINGS, ids=NAMES)
def test_what_a_setting_means_is_one_row_of_a_table(each):
    meaning = " ".join(each.metadata["meaning"])
    assert meaning
    assert "|" not in meaning


def test_a_default_is_as_good_as_the_same_value_given():
    """Every default passes its own check."""
    given = {each.name: each.default for each in SETTINGS if each.default is not dataclasses.MISSING}
    assert vars(Settings(URL, **given)).keys() == vars(Settings(URL)).keys()
    Router(URL, **given).close()


@pytest.mark.parametrize("name", NAMES)
def test_what_no_setting_can_be_is_refused_in_words(name):
    """An impossible value of any setting is a ConfigurationError at once."""
    with pytest.raises(ConfigurationError):
        Router(**{"url": URL, name: object()})


def test_the_error_of_a_wrong_call_names_the_router():
    """A wrong call is Python's own TypeError of Router's constructor."""
    for arguments, options in (((URL,), {"instance": []}), ((URL, []), {}), ((), {})):
        with pytest.raises(TypeError, match=r"^Router\.__init__\(\)"):
            Router(*arguments, **options)


def test_collections_are_read_once_and_kept():
    """A setting that is a list accepts a generator, and later changes to the caller's list have no effect."""
    names = ["db-2"]
    settings = Settings(URL, instances=names, token_keys=iter(["old", "new"]), listeners=iter([print]))
    names.append("db-3")
    assert settings.instances == ("db-2",)
    assert settings.token_keys == ("old", "new")
    assert settings.listeners == (print,)


def test_settings_do_not_change_and_show_no_secret():
    settings = Settings(
        URL.replace("db-1", "app:hunter2@db-1"),
        password="hunter2",
        token_keys=["hunter2"],
        engine_options={"connect_args": {"password": "hunter2"}},
    )
    assert "hunter2" not in repr(settings)
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.max_lag = 1.0


def test_a_text_as_the_password_is_that_of_the_url():
    """A password that is a text replaces the URL's, and a function does not."""
    url = URL.replace("db-1", "app:old@db-1")
    assert Settings(url, password="hunter2").target.url.password == "hunter2"
    assert Settings(url, password=lambda: "hunter2").target.url.password == "old"


def test_readers_have_the_options_of_all_unless_told_otherwise():
    both = Settings(URL, engine_options={"pool_size": 10, "echo": True}, reader_options={"pool_size": 2})
    assert both.options_of_readers == {"pool_size": 2, "echo": True}
    assert Settings(URL, engine_options={"pool_size": 10}).options_of_readers is None
