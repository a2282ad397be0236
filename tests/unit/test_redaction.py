"""The value of an option is in no error, and the rest of the error can be read."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aurora_router.cluster.connect_errors import hide_values, is_argument_error
from aurora_router.core.redaction import hide


@pytest.mark.parametrize(
    ("text", "value", "shown"),
    [
        (
            'FATAL:  invalid value for parameter "work_mem": "hunter"',
            "-c work_mem=hunter",
            'FATAL:  invalid value for parameter "...": "..."',
        ),
        (
            "FATAL:  invalid command-line argument for server process: hunter",
            "hunter",
            "FATAL:  invalid command-line argument for server process: ...",
        ),
        ("Can't load plugin: sqlalchemy.plugins:Hunter2", ["Hunter2"], "Can't load plugin: sqlalchemy.plugins:..."),
        ("Unknown collation: 'hunter'", b"hunter", "Unknown collation: '...'"),
        ("syntax to use near 'the hunter's x' at line 1", "SET the hunter's x", "syntax to use near '... ...'... ...' at line 1"),
        ('could not open file "/etc/hunter.pem"', Path("/etc/hunter.pem"), 'could not open file "..."'),
        ("Invalid value 'MY HUNTER' for isolation_level", "my hunter", "Invalid value '...' for isolation_level"),
        ("near 'a-very-long-secr' at line 1", {"ssl": {"key": "a-very-long-secret"}}, "near '...' at line 1"),
        (repr(KeyError("a\nHunter2")), "a\nHunter2", "KeyError('...')"),
        ('invalid integer value "7"', 7, 'invalid integer value "..."'),
        ("password authentication failed at port 17", "authentication failed 17 7", "password authentication failed at port 17"),
        ('server does not support SSL, user "app"', ["app", True, None, print], 'server does not support SSL, user "app"'),
        ("nothing to hide", "", "nothing to hide"),
    ],
)
def test_a_value_is_hidden_and_the_sentence_stays(text, value, shown):
    assert hide(text, [value], {"app", None}) == shown


SAID = [
    'invalid value: "{}"',
    "unknown encoding: {}",
    "Unknown collation: '{}'",
    "KeyError({!r})",
    "(1231, \"to '{}'\")",
    "process: {} HINT",
]
HEADS = ["-c app.token={}", "{}", "SET x = '{}'", "a {} b", "/etc/{}/ca.pem", "a,{}"]


@given(
    st.sampled_from(SAID),
    st.sampled_from(HEADS),
    # One part has three characters or more, because shorter ones are hidden only in quotes.
    st.from_regex("[a-zX9.@$%/-]{0,9}[a-z]{2}[X9][a-zX9.@$%/-]{0,30}", fullmatch=True),
    st.booleans(),
)
def test_no_value_and_no_part_of_one_is_shown(said, head, secret, whole):
    value = head.format(secret)
    found = hide(said.format(value if whole else secret), [value])
    assert secret not in found.replace("...", "")


def test_an_error_and_those_that_it_holds_on_to_forget_a_value():
    """An error and its chain forget a value, but keep numbers and anything else that is not text."""
    error, missing, looked_up = (
        ValueError(1064, "it is 'Zq0'", b"b"),
        FileNotFoundError(2, "No such file", "/Zq0"),
        KeyError("Zq0"),
    )
    error.__cause__, error.__context__, looked_up.__context__ = missing, looked_up, error
    hide_values(error, ["/Zq0"], ())
    assert error.args == (1064, "it is '...'", b"b")
    assert str(missing) == "[Errno 2] No such file: '...'"
    assert repr(looked_up) == "KeyError('...')"


@pytest.mark.parametrize(
    ("error", "found"),
    [
        *(
            (kind(), True)
            for kind in (TypeError, KeyError, UnicodeError, NotImplementedError, FileNotFoundError, PermissionError)
        ),
        *((kind(), False) for kind in (TimeoutError, ConnectionResetError, RuntimeError, KeyboardInterrupt)),
    ],
)
def test_what_a_signal_handler_may_raise_is_no_mistake(error, found):
    assert is_argument_error(error) is found
