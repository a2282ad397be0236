"""The settings of a Router. Each is one field: its type, default, check and documentation are here and nowhere else.

The parameters of `Router()`, their documentation and the table in docs/settings.md are made from the fields.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import KW_ONLY, MISSING, dataclass, field, fields, replace
from functools import cached_property, partial
from typing import Any, Concatenate, Literal, ParamSpec, TypeVar, get_args

from sqlalchemy.engine import URL

from aurora_router.config.checks import (
    Check,
    check_addresses,
    check_callables,
    check_choice,
    check_count,
    check_engine_options,
    check_flag,
    check_keys,
    check_names,
    check_parts,
    check_password,
    check_reader_options,
    check_seconds,
    check_share,
    merge_options,
    optional,
)
from aurora_router.config.urls import Target, parse_instances, parse_url
from aurora_router.core import events
from aurora_router.core.instance import Instance
from aurora_router.core.selection import STRATEGIES, Balance, NoReader, Strategy
from aurora_router.servers import Pooler

T = TypeVar("T")
P = ParamSpec("P")

Consistency = Literal["eventual", "session", "global"]


def setting(default: T, check: Check, meaning: str, unit: str = "") -> T:
    """Make a field of Settings.

    check: takes the name and the value, and returns the value to keep. It raises ConfigurationError.
    meaning: Markdown for docs/settings.md, in lines that help() shows as they are.
    """
    return field(default=default, metadata=_about(check, meaning, unit))


def _about(check: Check, meaning: str, unit: str = "") -> dict[str, Any]:
    return {"check": check, "meaning": [line.strip() for line in meaning.splitlines()], "unit": unit}


def _check_later(_: str, value: T) -> T:
    """Accept a value that can be checked only together with other settings."""
    return value


def _check_balance(name: str, value: T) -> T:
    return value if callable(value) else check_choice(name, value, tuple(STRATEGIES))


def _list_strategies() -> str:
    """Return each strategy with the first sentence of its function's docstring, one line each."""
    said = {name: inspect.getdoc(function) or "" for name, function in STRATEGIES.items()}
    return "\n".join(f'`"{name}"`: {words[:1].lower()}{words[1:].partition(".")[0]};' for name, words in said.items())


@dataclass(frozen=True, repr=False, eq=False)  # a repr would show secrets
class Settings:
    """The settings of a Router, checked.

    Raises ConfigurationError.
    """

    url: str | URL = field(
        metadata=_about(
            _check_later,
            """any instance, with driver (`postgresql+psycopg://`, `mysql+pymysql://`, `mariadb+pymysql://`), user, password and
            database; may name several hosts""",
        )
    )
    _: KW_ONLY
    instances: Iterable[str] = setting((), check_addresses, "the other instances", '`"host:port"`')
    reader_endpoint: str | None = setting(
        None, _check_later, "a name behind which the readers stand; serves reads only", '`"host:port"`'
    )
    password: str | Callable[[], str] | None = setting(
        None,
        check_password,
        """used in place of the URL's password: a text, or a function that returns one. The function is called without arguments
        for each new connection, also of the monitor, in the thread that connects. If it fails, `ConfigurationError` is raised""",
    )
    consistency: Consistency = setting(
        "session",
        partial(check_choice, choices=get_args(Consistency)),
        """`"session"`: a session sees its own writes; `"global"`: all units of the router see what any of them has committed;
        `"eventual"`: neither""",
    )
    max_lag: float | None = setting(
        None,
        optional(check_seconds),
        """a reader that is further behind, or whose lag is unknown, is not used. The time since a reader's last answer counts as
        lag, so each reader is probed at least four times within `max_lag`""",
        "seconds",
    )
    balance: Strategy | Balance = setting(
        "least_busy",
        _check_balance,
        f"""{_list_strategies()}
        or a function `(readers, load, rnd) -> reader` (see `aurora_router.core.selection`)""",
    )
    no_reader: NoReader = setting(
        "writer",
        partial(check_choice, choices=get_args(NoReader)),
        """where reads go if no reader qualifies. With `"error"` they raise `NoReaderAvailable`. While a session waits to see its
        own write, it reads from the writer in both cases""",
    )
    writer_share_for_reads: float = setting(
        0.5,
        check_share,
        """how much of the writer's pool reads may take while no reader qualifies. Other reads wait for a slot, at most
        `pool_timeout`, and then raise `NoReaderAvailable`. It has no effect if only one instance is configured""",
        "share",
    )
    connects_at_once: int = setting(
        4,
        check_count,
        """how many connects to one instance may run at once; others wait. A waiting connect fails with an error of the driver
        after `pool_timeout` (at least 3 s), or as soon as a running one fails""",
    )
    failover_timeout: float = setting(60.0, check_seconds, "how long a unit waits for a writer", "seconds")
    probe_interval: float = setting(
        1.0, check_seconds, "time between two probes of an instance; 0.02 s while something is suspect", "seconds"
    )
    probe_timeout: float = setting(
        1.0,
        check_seconds,
        "time for an answer, after which a probe counts as silent. Two silent probes in a row take an instance out of use",
        "seconds",
    )
    position_interval: float = setting(
        0.05, check_seconds, "time between two probes while a session waits to see its own write", "seconds"
    )
    pin_seconds: float = setting(
        5.0,
        check_seconds,
        "how long a session that has written stays on the writer if the readers give no evidence at all",
        "seconds",
    )
    wait_for_reader: float = setting(
        0.0,
        partial(check_seconds, or_zero=True),
        "how long a read waits for a reader that has the data that the read must see. Then it goes to the writer",
        "seconds",
    )
    token_keys: Iterable[str | bytes] = setting(
        (),
        check_keys,
        """secrets that sign tokens. This needs the extra `signing`. The last secret signs, and all are accepted, so you can
        change them on one host after the other. Without any secret, tokens are not signed""",
        "texts or bytes",
    )
    token_ttl: float = setting(60.0, check_seconds, "how long a token is honoured after it was made", "seconds")
    read_only_functions: Iterable[str] = setting(
        (),
        check_names,
        "functions that do not write, although the database does not say so (on PostgreSQL: functions that are VOLATILE)",
        "names, as the statements spell them",
    )
    stale_write_guard: bool = setting(
        True,
        check_flag,
        """before a flush writes objects that an automatic unit loaded from a reader, they are compared with the writer. If one
        is stale, `StaleRead` is raised""",
    )
    accept_new_cluster: bool = setting(
        False,
        check_flag,
        """accept a rebuilt cluster under the same names, once all instances that answer report it, and no old one has answered
        for 30 s. It has another system identifier, group or GTID domain. With `False` that takes a new router, because names that
        lead to the wrong cluster look the same""",
    )
    engine_options: Mapping[str, Any] | None = setting(
        None,
        lambda name, value: check_engine_options(name, value or {}),
        """options of `create_engine()` for each instance: `pool_size`, `connect_args`, `echo` ... Not allowed are `poolclass`,
        `pool`, `creator` and `pool_reset_on_return`""",
    )
    reader_options: Mapping[str, Any] | None = setting(
        None,
        optional(check_reader_options),
        """options for readers only, merged over `engine_options`: a smaller `pool_size`, other `connect_args` ... Not allowed is
        `isolation_level`. They hold while an instance is a reader. When it is promoted, its pooled connections are closed, and
        new ones use `engine_options`. The monitor always uses `engine_options`""",
    )
    pooler: Pooler | None = setting(
        None,
        partial(check_choice, choices=(None, *get_args(Pooler))),
        """the kind of pooler before each server. `"transaction"`: it may give the server's connection to other clients between
        two transactions. `"session"`: a client keeps the connection. With `None` the router finds out on PostgreSQL whether there
        is a pooler, and treats it as `"transaction"`""",
    )
    listeners: Iterable[Callable[[events.Event], object]] = setting(
        (),
        check_callables,
        "functions that are called with each event of `aurora_router.core.events`, in the thread where it happened",
    )

    target: Target = field(init=False)
    """The parsed URL. It contains the setting `password` if that is a text."""
    all_instances: tuple[Instance, ...] = field(init=False)
    """The instances of the URL, the other ones, and the reader endpoint."""

    def __post_init__(self) -> None:
        target = parse_url(self.url)
        check_parts(target.url, target.secrets.values())
        for each in SETTINGS:
            self._keep(each.name, each.metadata["check"](each.name, getattr(self, each.name)))
        if isinstance(self.password, str):
            target = replace(target, url=target.url.set(password=self.password))
        self._keep("target", target)
        self._keep("all_instances", parse_instances(target, self.instances, self.reader_endpoint))

    def _keep(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    @property
    def options(self) -> Mapping[str, Any]:
        """Options for the engines of all instances."""
        return self.engine_options or {}

    @cached_property
    def options_of_readers(self) -> Mapping[str, Any] | None:
        """Options for the engines of readers. None if they have no options of their own."""
        return None if self.reader_options is None else merge_options(self.options, self.reader_options)


SETTINGS = tuple(each for each in fields(Settings) if each.init)


def takes_settings(make: Callable[P, Settings]) -> Callable[[Callable[[T, Settings], None]], Callable[Concatenate[T, P], None]]:
    """Let an `__init__(self, settings)` be called with the settings one by one, and document each of them.

    make: Settings itself. Type checkers take the parameters from it.
    """

    def decorate(init: Callable[[T, Settings], None]) -> Callable[Concatenate[T, P], None]:
        signature: Any = Settings.__init__
        signature.__qualname__ = init.__qualname__  # so that a TypeError names the called function

        @functools.wraps(signature)
        def taking(self: T, /, *args: P.args, **kwargs: P.kwargs) -> None:
            init(self, make(*args, **kwargs))

        taking.__module__ = init.__module__
        taking.__doc__ = f"{init.__doc__ or ''}\n\n{as_help()}"
        return taking

    return decorate


def as_help() -> str:
    """Return the settings and their meanings, in the format of a docstring."""
    lines = []
    for each in SETTINGS:
        unit = each.metadata["unit"].replace("`", "")
        lines += [f"{each.name}{f' ({unit})' if unit else ''}:", *(f"    {line}" for line in each.metadata["meaning"])]
    return "\n".join(lines)


def as_markdown() -> str:
    """Return the settings as the table in docs/settings.md."""
    lines = ["| name | default | meaning | unit |", "|---|---|---|---|"]
    for each in SETTINGS:
        default = f'"{each.default}"' if isinstance(each.default, str) else repr(each.default)
        shown = f"`{default}`" if each.default is not MISSING else ""
        lines.append(f"| `{each.name}` | {shown} | {' '.join(each.metadata['meaning'])} | {each.metadata['unit']} |")
    return "\n".join(lines) + "\n"
