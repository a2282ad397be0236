"""Errors of connecting, in words for the user. The words repeat no value of an option."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from typing import Any

from sqlalchemy.exc import SQLAlchemyError

from aurora_router.cluster.probe import ProbeError
from aurora_router.core.instance import ProbeFailure
from aurora_router.core.redaction import hide
from aurora_router.drivers import Driver
from aurora_router.errors import ConfigurationError
from aurora_router.servers import ServerFamily


def hide_values(error: BaseException, values: Iterable[object], shown: Collection[object]) -> None:
    """Hide these values in an error, and in its causes and contexts.

    shown: names that everybody may see, as in `hide()`.
    """
    found, left = [*values], [error]
    done: list[BaseException] = []
    while left:
        each = left.pop()
        if each not in done:
            done.append(each)
            each.args = tuple(hide(said, found, shown) if isinstance(said, str) else said for said in each.args)
            if isinstance(each, OSError) and each.filename is not None:
                each.filename = "..."
            left += [other for other in (each.__cause__, each.__context__) if other is not None]


def refusal(error: Exception, driver: Driver, values: Iterable[object], shown: Collection[object]) -> ConfigurationError | None:
    """Return the error to raise in place of an error of connecting; None if the original one is to stay.

    Neither error shows the values.
    """
    hide_values(error, values, shown)
    return ConfigurationError(str(connect_argument_error(error, driver))) if is_argument_error(error) else None


def is_argument_error(error: BaseException) -> bool:
    """Return whether an error says that the driver, or SQLAlchemy, cannot use its arguments."""
    original = getattr(error, "orig", None) or error
    if isinstance(original, OSError):
        return not isinstance(original, TimeoutError | ConnectionError)  # signal handlers raise TimeoutError
    return isinstance(original, TypeError | ValueError | LookupError | AttributeError | AssertionError | NotImplementedError)


def is_refused(error: Exception) -> bool:
    """Return whether create_engine() raised this error because it cannot use its arguments.

    Any other error comes from a signal handler.
    """
    return isinstance(error, SQLAlchemyError) or is_argument_error(error)


def probe_error(error: Exception, driver: Driver, server: ServerFamily) -> ProbeError:
    """Return the driver's error as one line for the user."""
    original: Any = getattr(error, "orig", None) or error
    code = driver.code(original)
    words, advice = driver.explain(original)
    if advice:
        return ProbeError(f"{words}; {advice}", ProbeFailure.MISCONFIGURED)
    kind, explained = server.explain_refusal(code, words)
    return ProbeError(explained, kind, busy=server.is_busy(code, words))


UNKNOWN_HOST = re.compile(r"\[Errno (-2|-5|8)\]|could not translate host name")
"""The words of getaddrinfo() and libpq for a name that does not exist or has no address. 8 is the number on macOS."""


_VALUE = re.compile(r"""(['"])(?![a-z]{1,5}\1$).*\1""")
"""A quoted value that could not be parsed. It may be a password in the wrong place, unless it is a short word ("soon")."""


def connect_argument_error(error: Exception, driver: Driver) -> ProbeError:
    """Return an error of arguments that the driver cannot use, as one line for the user.

    error: for example a TypeError. It is not of the driver's own class.
    """
    error = getattr(error, "orig", None) or error
    said = type(error).__name__
    if not isinstance(error, UnicodeError):  # a UnicodeError shows parts of the password
        words = " ".join(str(error).split())
        said += f": {_VALUE.sub('...', words) if isinstance(error, ValueError | LookupError) else words}"
    usual = "check the URL and its query, and connect_args"
    advice = next((advice for pattern, advice in driver.ARGUMENT_ERRORS if re.search(pattern, said)), usual)
    return ProbeError(f"{driver.NAME} could not connect ({said}); {advice}", ProbeFailure.MISCONFIGURED)
