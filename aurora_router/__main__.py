"""The command line: `aurora-router demo`, `topology`, `init-commit-table` and `classify`; also `python -m aurora_router`.

A user's mistake is one line on stderr that says what to do: never a traceback, and never a password.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from importlib import metadata
from typing import Any

try:
    import click
    from rich.console import Console
    from rich.live import Live
    from rich.table import Table
except ModuleNotFoundError as missing:
    print(f"aurora-router: the command line needs {missing.name}: pip install 'aurora-router[cli]'", file=sys.stderr)
    raise SystemExit(2) from None

from sqlalchemy.exc import SQLAlchemyError

from aurora_router.core.sql.analysis import Analysis, Effect, analyze
from aurora_router.core.topology import Topology
from aurora_router.drivers import DRIVERS
from aurora_router.errors import ConfigurationError, RouterError
from aurora_router.router import Router

FINE, MISSED, MISTAKE, INTERRUPTED = 0, 1, 2, 130
# A command that asks only once waits so many seconds for a server's answer. Waiting is better than reporting
# a slow server as down.
PROBE_TIMEOUT = 5.0

_EXIT_CODES = """
\b
Exit codes: 0 fine; 1 a figure misses its required value, or nothing answers; 2 a mistake in the command or a setting;
130 ended by Ctrl-C.
"""


def _version() -> str:
    try:
        return metadata.version("aurora-router")
    except metadata.PackageNotFoundError:
        return "(run from a checkout, not installed)"


@click.group(epilog=_EXIT_CODES, invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(_version(), prog_name="aurora-router", message="%(prog)s %(version)s")
@click.pass_context
def cli(context: click.Context) -> None:
    """Use a whole Aurora, PostgreSQL, MySQL or MariaDB cluster as if it were one database.

    \b
    aurora-router demo                                           a shop that lives through the death of its writer
    aurora-router topology postgresql+psycopg://app@db-1/shop    who is the writer, how far behind are the readers
    aurora-router topology mysql+pymysql://app@db-1/shop         the same of MySQL; of MariaDB with mariadb+pymysql
    aurora-router classify "SELECT now()"                        where a statement would go, and why
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


# -- demo ------------------------------------------------------------------------------------------------------------

# The module that the cluster of each engine needs, and the extra that installs it.
_CLUSTERS = {"postgresql": ("psycopg", "local"), "mariadb": ("pymysql", "mysql"), "mysql": ("pymysql", "mysql")}


@cli.command(epilog=_EXIT_CODES)
@click.option(
    "--engine", type=click.Choice([*_CLUSTERS]), default="postgresql", show_default=True, help="Whose servers to start."
)
@click.option("--seconds", type=click.FloatRange(5, 3600), default=20, show_default=True, help="How long the shop is open.")
@click.option(
    "--threads", type=click.IntRange(1, 100), default=8, show_default=True, help="How many visitors are served at once."
)
@click.option("--plain", is_flag=True, help="Print lines, not a table that refreshes. Always so if the output is piped.")
@click.option(
    "--consistency",
    type=click.Choice(["session", "global", "eventual"]),
    default="session",
    show_default=True,
    help='The promise of the router. With "eventual" you see stale reads, and get exit code 1.',
)
def demo(engine: str, seconds: float, threads: int, plain: bool, consistency: Any) -> int:
    """Kill a writer, and see how little a service notices.

    The demo starts a real cluster on loopback, with one writer and two readers, and runs a small shop on it. It shows which
    instance serves what. It kills the writer, promotes a reader, and brings the old writer back as a reader. At the end it
    prints its figures. It fails if a session did not see its own writes, or if an acknowledged write was lost. It leaves
    nothing behind.

    \b
    aurora-router demo
    aurora-router demo --seconds 60 --threads 32
    aurora-router demo --engine mariadb       (or mysql)
    aurora-router demo | tee demo.log
    """
    _need(*_CLUSTERS[engine])
    from aurora_router.local.demo import run
    from aurora_router.local.demo_view import LiveView, PlainView
    from aurora_router.local.system import LocalClusterError

    view = PlainView() if plain or not sys.stdout.isatty() else LiveView()
    try:
        summary = run(view, seconds, threads, consistency, engine)
    except LocalClusterError as error:
        raise click.ClickException(str(error)) from None
    view.summary(summary)
    if summary.missed:
        click.echo(f"aurora-router demo: not as it must be: {', '.join(summary.missed)}", err=True)
        return MISSED
    return FINE


# -- topology --------------------------------------------------------------------------------------------------------

_COLUMNS = ("instance", "role", "position", "lag", "latency", "state")
_COLOURS = {"writer": "bold magenta", "reader": "cyan"}


@cli.command(epilog=_EXIT_CODES)
@click.argument("url", envvar="AURORA_ROUTER_URL")
@click.argument("others", nargs=-1, metavar="[HOST:PORT]...")
@click.option("--instances", multiple=True, metavar="HOST:PORT ...", help="The other instances; may be given several times.")
@click.option("--reader-endpoint", metavar="HOST:PORT", help="A name behind which the readers stand, instead of a list.")
@click.option("--watch", is_flag=True, help="Go on until Ctrl-C.")
@click.option("--interval", type=click.FloatRange(0.05, 3600), default=1, show_default=True, help="Seconds between probes.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object per line.")
def topology(
    url: str,
    others: tuple[str, ...],
    instances: tuple[str, ...],
    reader_endpoint: str | None,
    watch: bool,
    interval: float,
    as_json: bool,
) -> int:
    """Show the instances of a cluster: role, position, lag, latency, and what is wrong with those that are not healthy.

    URL is the URL of a Router. It may name several hosts. Put it into AURORA_ROUTER_URL to hide the password. The command fails
    if no instance answers.

    \b
    aurora-router topology postgresql+psycopg://app:secret@db-1:5432/shop --instances db-2:5432 db-3:5432
    aurora-router topology postgresql+psycopg://app:secret@db-1,db-2,db-3/shop --watch
    aurora-router topology postgresql+psycopg://app:secret@db-rw/shop --reader-endpoint db-ro:5432 --json
    aurora-router topology mysql+pymysql://app:secret@db-1:3306/shop --instances db-2:3306 db-3:3306
    """
    addresses = [address for given in (*instances, *others) for address in given.split(",") if address]
    options: dict[str, Any] = {} if watch else {"probe_timeout": PROBE_TIMEOUT}
    with Router(url, instances=addresses, reader_endpoint=reader_endpoint, probe_interval=interval, **options) as router:
        in_terminal = sys.stdout.isatty() and not as_json
        with Live(console=Console(), auto_refresh=False) if in_terminal else nullcontext() as live:
            while True:
                picture = router.topology
                answered = any(instance.healthy for instance in picture)
                if as_json:
                    click.echo(json.dumps(_record(picture)))
                elif not answered and not watch:
                    break
                elif live is not None:
                    live.update(_table(picture), refresh=True)
                else:
                    _print_aligned(picture, again=watch)
                if not watch:
                    break
                time.sleep(interval)
    if not answered:
        raise click.ClickException(f"no instance answers; start one, or check host and port: {'; '.join(picture.said())}")
    return FINE


def _rows(picture: Topology) -> Iterator[tuple[str, ...]]:
    for instance in picture:
        yield (
            instance.id,
            instance.role.value if instance.role is not None else "-",
            str(instance.position) if instance.position is not None else "-",
            f"{instance.lag * 1000:.0f} ms" if instance.lag is not None else "-",
            f"{instance.latency * 1000:.1f} ms" if instance.healthy else "-",
            "healthy" if instance.healthy else instance.error,
        )


def _table(picture: Topology) -> Table:
    table = Table(title=_title(picture), title_justify="left")
    for column in _COLUMNS:
        table.add_column(column, justify="right" if column in ("lag", "latency") else "left", overflow="fold")
    for name, role, position, lag, latency, state in _rows(picture):
        health = "green" if state == "healthy" else "red"
        table.add_row(name, f"[{_COLOURS.get(role, 'dim')}]{role}", position, lag, latency, f"[{health}]{_literal(state)}")
    return table


def _literal(text: str) -> str:
    return text.replace("[", r"\[")


def _title(picture: Topology) -> str:
    if picture.ambiguous:
        return f"no writer: {' and '.join(picture.ambiguous)} both accept writes"
    return f"epoch {picture.epoch}" if picture.writer is not None else f"epoch {picture.epoch}, no writer"


def _print_aligned(picture: Topology, *, again: bool) -> None:
    rows = [_COLUMNS, *_rows(picture)]
    widths = [max(len(row[n]) for row in rows) for n in range(len(_COLUMNS))]
    if again:
        click.echo(f"{time.strftime('%H:%M:%S')} {_title(picture)}")
    for row in rows:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    if again:
        click.echo()


def _record(picture: Topology) -> dict[str, Any]:
    return {
        "epoch": picture.epoch,
        "writer": picture.writer.id if picture.writer is not None else None,
        "ambiguous": list(picture.ambiguous),
        "instances": [
            {
                "id": instance.id,
                "host": instance.host,
                "port": instance.port,
                "role": instance.role.value if instance.role is not None else None,
                "position": str(instance.position) if instance.position is not None else None,
                "lag": instance.lag,
                "latency": instance.latency if instance.healthy else None,
                "healthy": instance.healthy,
                "error": instance.error or None,
            }
            for instance in picture
        ],
    }


# -- init-commit-table -----------------------------------------------------------------------------------------------


@cli.command("init-commit-table", epilog=_EXIT_CODES)
@click.argument("url", envvar="AURORA_ROUTER_URL")
def init_commit_table(url: str) -> int:
    """Create the table aurora_router_commits, unless it exists.

    run_transaction() needs the table on MySQL and MariaDB, and on PostgreSQL with commit_check="table".

    URL is the URL of a Router. It must name a database, and the writer among its hosts. Its user is the one whose sessions write
    there. Any other user must grant that one SELECT, INSERT and DELETE on the table, and on PostgreSQL UPDATE as well.

    \b
    aurora-router init-commit-table mysql+pymysql://app:secret@db-1,db-2,db-3/shop
    aurora-router init-commit-table postgresql+psycopg://app:secret@db-1,db-2,db-3/shop
    """
    with Router(url, failover_timeout=3, probe_timeout=PROBE_TIMEOUT) as router:
        router.init_commit_table()
    click.echo("aurora_router_commits is there")
    return FINE


# -- classify --------------------------------------------------------------------------------------------------------

_EFFECTS = {
    Effect.READ: "reads data that every instance has",
    Effect.SERVER: "asks, or changes, the one server that it runs on",
    Effect.TRANSACTION: "begins, ends or changes a transaction",
    Effect.SESSION: "changes settings that outlive the transaction",
    Effect.CONNECTION: "needs this very connection, now or later",
    Effect.WRITE: "writes, locks, or might",
}


@cli.command(epilog=_EXIT_CODES)
@click.argument("sql")
@click.option(
    "--dialect",
    type=click.Choice([dialect for driver in DRIVERS for dialect in driver.DIALECTS]),
    default="postgresql",
    show_default=True,
    help="The SQL dialect of the statement. A router knows it from its URL.",
)
@click.option("--read-only-function", "harmless", multiple=True, metavar="NAME", help="A function known to write nothing.")
def classify(sql: str, dialect: str, harmless: tuple[str, ...]) -> int:
    """Say what a statement does, where it would go, and why. SQL is the statement, or "-" to read it from stdin.

    No server is asked. A router asks its server, and so knows more harmless functions: those declared STABLE or IMMUTABLE, on
    MySQL and MariaDB NO SQL or READS SQL DATA.

    \b
    aurora-router classify "SELECT * FROM orders FOR UPDATE"
    aurora-router classify "SELECT GET_LOCK('jobs', 1)" --dialect mysql
    aurora-router classify "SELECT app.price(1)" --read-only-function app.price
    aurora-router classify - --dialect mysql < report.sql
    """
    if sql == "-":
        sql = sys.stdin.read()
    if not sql.strip():
        raise click.UsageError('there is no statement; give one in quotes, or "-" and one on stdin')
    found = analyze(sql, dialect)
    effect = found.effect_given(harmless)
    click.echo(f"dialect:               {dialect}")
    click.echo(f"effect:                {effect.name} ({_EFFECTS[effect]})")
    click.echo(f"in an automatic unit:  {_automatic(found, effect)}")
    click.echo(f"in a read-only unit:   {_read_only(found)}")
    unknown = sorted(found.functions - frozenset(harmless))
    if unknown and effect is not found.effect_if_functions_pure:
        click.echo(f"because of:            {', '.join(unknown)}: not known to be harmless, and so it counts as a write;")
        click.echo("                       list it in read_only_functions if it is")
    return FINE


def _automatic(found: Analysis, effect: Effect) -> str:
    if effect is Effect.READ:
        return "the writer, as the hint asks" if found.hint == "writer" else "a reader"
    if found.hint == "reader" and found.effect_if_functions_pure is Effect.READ:
        return "a reader, as the hint asks"
    return "the writer"


def _read_only(found: Analysis) -> str:
    return "refused, and not sent" if found.effect_if_functions_pure is Effect.WRITE else "a reader"


# -- all of them -----------------------------------------------------------------------------------------------------


def _need(module: str, extra: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise click.UsageError(f"this needs {module}: pip install 'aurora-router[{extra}]'")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line, and return the exit code."""
    logging.getLogger("aurora_router").addHandler(logging.NullHandler())  # an error is one line on stderr anyway
    try:
        code = cli.main(arguments, prog_name="aurora-router", standalone_mode=False)
    except ConfigurationError as error:
        return _mistake(str(error), MISTAKE)
    except (RouterError, SQLAlchemyError) as error:
        return _mistake(str(error).splitlines()[0], MISSED)
    except click.UsageError as error:
        command = error.ctx.command_path if error.ctx is not None else "aurora-router"
        said = error.format_message().rstrip(".")
        for argument in sys.argv[1:] if arguments is None else arguments:
            value = argument.partition("=")[2] if argument.startswith("--") else argument
            if "@" in value or "//" in value:  # a URL in the wrong place, with its password
                said = said.replace(value, "...")
        return _mistake(f"{said}; see {command} --help", error.exit_code)
    except click.ClickException as error:
        return _mistake(error.format_message(), error.exit_code)
    except click.Abort:
        return INTERRUPTED
    return code if isinstance(code, int) else FINE


def _mistake(message: str, code: int) -> int:
    click.echo(f"aurora-router: {' '.join(message.split())}", err=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
