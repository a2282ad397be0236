"""Shared parts of the benchmarks: command line, cluster, interleaved timing, figures with bounds, tables, exit status."""

from __future__ import annotations

import argparse
import gc
import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import sqlalchemy
from sqlalchemy import make_url

from aurora_router import Router
from aurora_router.drivers import drivers_for
from aurora_router.local import CLUSTERS
from aurora_router.local.cluster import Cluster
from aurora_router.servers import usual

HEADINGS = ("figure", "measured", "bound", "verdict")


@dataclass(frozen=True)
class Options:
    """The options of the command line.

    engine: one of CLUSTERS
    switches: those of the benchmark's own switches that were set
    """

    quick: bool
    markdown: bool
    engine: str = "postgresql"
    switches: frozenset[str] = frozenset()


def options(about: str | None, switches: Mapping[str, str] | None = None, engines: Iterable[str] = CLUSTERS) -> Options:
    """Read the command line.

    about: the benchmark's docstring, shown by --help
    switches: the benchmark's own switches, with what they do
    engines: the engines that it runs on
    """
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rounds: a look, not a measurement")
    parser.add_argument("--markdown", action="store_true", help="print the table in Markdown")
    parser.add_argument("--engine", choices=[*engines], default="postgresql", help="whose servers; postgresql unless you say so")
    for name, meaning in (switches or {}).items():
        parser.add_argument(f"--{name}", dest="switches", action="append_const", const=name, help=meaning)
    found = parser.parse_args()
    return Options(found.quick, found.markdown, found.engine, frozenset(getattr(found, "switches", None) or ()))


def progress(text: str) -> None:
    """Print a line on stderr, so that long work can be followed and the table can still be piped."""
    print(text, file=sys.stderr, flush=True)


@contextmanager
def starting(how: Options, report: Report, **settings: Any) -> Iterator[Cluster[Any]]:
    """Start a cluster of the chosen engine, one writer and two readers, and name its servers in the report.

    It has the commit table if the engine has no other way to look up the outcome of a COMMIT.
    """
    progress("starting a cluster")
    with CLUSTERS[how.engine](readers=2, **settings) as cluster:
        ((said,),) = cluster.execute("SELECT version()")
        version = re.search(r"\d+(\.\d+)*", said)
        driver = make_url(cluster.url).get_driver_name()
        report.servers = f"{_NAMES[how.engine]} {version[0] if version else said}, {driver} {metadata.version(driver)}"
        if not usual(drivers_for(how.engine)[0].PROTOCOL).HAS_XID_STATUS:
            with Router(cluster.url) as router:
                router.init_commit_table()
        yield cluster


_NAMES = {"postgresql": "PostgreSQL", "mariadb": "MariaDB", "mysql": "MySQL"}


# -- timing -----------------------------------------------------------------------------------------------------------


def interleave(contestants: Sequence[Callable[[], object]], *, rounds: int, units: int) -> list[list[float]]:
    """Measure the seconds of one call. Return a list for each contestant, with one number per round.

    In each round every contestant is called `units` times in a row, in turning order. So other load on the machine meets all of
    them. All are warmed up first. The garbage collector ignores the objects that live by then. It runs between the measurements,
    and is not disabled during them.
    """
    for contestant in contestants:
        for _ in range(2 * units):
            contestant()
    gc.collect()
    gc.freeze()
    took: list[list[float]] = [[] for _ in contestants]
    numbered = list(zip(contestants, took, strict=True))
    for turn in range(rounds):
        for contestant, times in numbered if turn % 2 == 0 else reversed(numbered):
            gc.collect()
            began = time.perf_counter()
            for _ in range(units):
                contestant()
            times.append((time.perf_counter() - began) / units)
    gc.unfreeze()
    return took


def ratio(ours: Iterable[float], theirs: Iterable[float]) -> float:
    """Return the median of the rounds' ratios. Both halves of a ratio were measured within the same moment."""
    return statistics.median(mine / other for mine, other in zip(ours, theirs, strict=True))


median = statistics.median


def take_core(which: int) -> None:
    """Keep this thread, and the threads and processes that it starts from now on, on one core: the first (0) or the last (-1).

    Start the servers on the last core, then take the first for the client: so they are apart, as on two machines. Otherwise
    chance would decide the result: a server's process on the client's core and one that must be woken on another core differ by
    tens of microseconds. With one core, or if the system cannot bind threads, client and servers share their cores.
    """
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {_CORES[which]})


_CORES = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [0]


# -- figures ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Figure:
    """A measured value.

    bound: the largest value allowed, or with `at_least` the smallest; None: only for information
    endless: the wait had no end, and was given up after the time `measured`
    """

    name: str
    measured: float
    unit: str = ""
    bound: float | None = None
    at_least: bool = False
    endless: bool = False

    @property
    def met(self) -> bool:
        if self.bound is None:
            return True
        if self.endless:
            return False
        return self.measured >= self.bound if self.at_least else self.measured <= self.bound

    def cells(self) -> tuple[str, str, str, str]:
        bound = verdict = ""
        if self.bound is not None:
            bound = f"{'>=' if self.at_least else '<='} {_number(self.bound)} {self.unit}".rstrip()
            verdict = "ok" if self.met else "MISSED"
        measured = f"{_number(self.measured)} {self.unit}".rstrip()
        return self.name, f"> {measured}, still hanging" if self.endless else measured, bound, verdict


class Report:
    """The figures of one benchmark."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.servers = ""  # database and driver, with their versions
        self.figures: list[Figure] = []

    def add(
        self,
        name: str,
        measured: float,
        unit: str = "",
        bound: float | None = None,
        *,
        at_least: bool = False,
        endless: bool = False,
    ) -> None:
        """Add a figure, and print it on stderr at once."""
        figure = Figure(name, measured, unit, bound, at_least, endless)
        self.figures.append(figure)
        said = figure.cells()
        progress("  " + ": ".join(said[:2]) + (f" ({', '.join(said[2:])})" if said[2] else ""))

    def finish(self, how: Options) -> int:
        """Print the table. Return the exit status: 1 if a bound was missed."""
        rows = [figure.cells() for figure in self.figures]
        python = f"Python {platform.python_version()}, SQLAlchemy {sqlalchemy.__version__}"
        where = ", ".join(filter(None, (self.servers, python, "--quick" if how.quick else "")))
        if how.markdown:
            print(f"| {' | '.join(HEADINGS)} |\n|---|---:|---:|---|")
            for row in rows:
                print(f"| {' | '.join(row)} |")
            print(f"\n{self.title}; {where}")
        elif not (sys.stdout.isatty() and _rich(f"{self.title}; {where}", rows)):
            print(f"\n{self.title}; {where}\n")
            _plain(rows)
        missed = [figure.name for figure in self.figures if not figure.met]
        if missed:
            progress(f"missed: {'; '.join(missed)}")
        return 1 if missed else 0


def _number(value: float) -> str:
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}" if abs(value) < 0.1 else f"{value:.2f}"


def _plain(rows: Sequence[Sequence[str]]) -> None:
    table = [HEADINGS, *rows]
    widths = [max(len(row[column]) for row in table) for column in range(len(HEADINGS))]
    for row in table:
        name, measured, bound, verdict = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print(f"{name}  {measured.strip().rjust(widths[1])}  {bound.strip().rjust(widths[2])}  {verdict}".rstrip())


def _rich(title: str, rows: Sequence[Sequence[str]]) -> bool:
    """Draw the table with rich. Returns False if rich is not installed."""
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        return False
    table = Table(title=title, title_justify="left")
    for heading in HEADINGS:
        table.add_column(heading, justify="right" if heading in ("measured", "bound") else "left")
    for row in rows:
        style = "red" if row[3] == "MISSED" else None if row[3] else "dim"
        table.add_row(*row, style=style)
    Console().print(table)
    return True
