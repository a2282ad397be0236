"""The look of the demo: a table that refreshes in a terminal, plain lines anywhere else. `demo` has the figures."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, Self


@dataclass(frozen=True)
class Row:
    """One instance.

    lag: seconds. None if it has none.
    rate: units per second.
    reads, writes: statements so far.
    """

    name: str
    address: str
    role: str
    health: str
    lag: float | None
    rate: float
    reads: int
    writes: int

    @property
    def shown_lag(self) -> str:
        """The lag for people. A writer has none."""
        return "-" if self.lag is None else f"{self.lag * 1000:.0f} ms"


@dataclass(frozen=True)
class Picture:
    """All instances and counts at one moment."""

    elapsed: float
    phase: str
    rows: tuple[Row, ...]
    units: int
    stale: int
    errors: int


@dataclass(frozen=True)
class Summary:
    """The figures measured from start to end."""

    seconds: float
    units: int
    reads: int
    reads_on_readers: int
    checks: int
    stale: int
    orders: int
    lost: int
    after_promotion: int
    errors: Mapping[str, int]
    longest_pause: float

    @property
    def missed(self) -> tuple[str, ...]:
        """The names of the figures that miss their required values."""
        wrong = {
            "stale reads": self.stale != 0,
            "acknowledged writes lost": self.lost != 0,
            "writes after the promotion": self.after_promotion <= 0,
            "own orders read back": self.checks <= 0,
        }
        return tuple(name for name, is_wrong in wrong.items() if is_wrong)

    def lines(self) -> tuple[tuple[str, str, str], ...]:
        """Return (figure, value, remark). If a figure has a required value, its remark ends in "ok" or "MISSED"."""
        errors = ", ".join(f"{count} {name}" for name, count in sorted(self.errors.items()))
        share = 100 * self.reads_on_readers / max(self.reads, 1)
        figures = (
            ("units done", f"{self.units:,} in {self.seconds:.1f} s", ""),
            ("reads served by readers", f"{share:.1f} % of {self.reads:,}", ""),
            ("own orders read back", f"{self.checks:,}", "must be above 0"),
            ("stale reads", f"{self.stale:,}", "must be 0"),
            ("acknowledged writes lost", f"{self.lost:,} of {self.orders:,}", "must be 0"),
            ("writes after the promotion", f"{self.after_promotion:,}", "must be above 0"),
            ("errors that reached the shop", f"{sum(self.errors.values()):,}" + (f" ({errors})" if errors else ""), ""),
            ("longest time without a write", f"{self.longest_pause:.2f} s", ""),
        )
        return tuple(
            (name, value, f"{must}: {'MISSED' if name in self.missed else 'ok'}" if must else "") for name, value, must in figures
        )


class View(Protocol):
    """A view, as the demo needs it. Several threads call it.

    interval: seconds between pictures.
    """

    interval: float

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...

    def starting(self, step: str) -> None:
        """Show a step on the way to the first picture."""

    def note(self, text: str) -> None:
        """Show that something happened."""

    def show(self, picture: Picture) -> None:
        """Show the newest picture."""

    def summary(self, summary: Summary) -> None:
        """Show the figures, after the view has been left."""


class PlainView:
    """A view of one line a second, and one for each note."""

    interval = 1.0

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def starting(self, step: str) -> None:
        """Print one line."""
        self.note(step)

    def note(self, text: str) -> None:
        """Print one line."""
        with self._lock:
            print(f"{time.monotonic() - self._began:5.1f} s  {text}", flush=True)

    def show(self, picture: Picture) -> None:
        """Print all instances in one line."""
        rows = (
            f"{row.name} {row.role if row.health == 'healthy' else row.health} {row.rate:.0f} units/s"
            + (f", {row.shown_lag} behind" if row.lag else "")
            for row in picture.rows
        )
        self.note(f"  {' | '.join(rows)} | {picture.units:,} units, {picture.stale} stale, {picture.errors} errors")

    def summary(self, summary: Summary) -> None:
        """Print aligned lines."""
        print()
        for name, value, remark in summary.lines():
            print(f"{name + ':':<30} {value:<24} {remark}".rstrip(), flush=True)


class LiveView:
    """A table that refreshes, with the last notes below it."""

    interval = 0.25
    _COLOURS = {"writer": "bold magenta", "reader": "cyan", "healthy": "green", "down": "bold red"}

    def __init__(self) -> None:
        from rich.console import Console
        from rich.live import Live
        from rich.spinner import Spinner

        self._began = time.monotonic()
        self._console = Console()
        self._spinner = Spinner("dots", "starting a cluster")
        self._picture: Picture | None = None
        self._notes: deque[str] = deque(maxlen=10)
        self._live = Live(get_renderable=self._render, console=self._console, refresh_per_second=8)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def starting(self, step: str) -> None:
        """Show the step beside the spinner."""
        self._spinner.update(text=step)

    def note(self, text: str) -> None:
        """Show the note below the table."""
        self._notes.append(f"{time.monotonic() - self._began:5.1f} s  {text}")

    def show(self, picture: Picture) -> None:
        """Show the picture in the table, at the next refresh."""
        self._picture = picture

    def _render(self) -> Any:
        from rich.box import SIMPLE_HEAD
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        picture = self._picture
        if picture is None:
            return self._spinner
        table = Table(title="a shop on aurora_router", title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for column in ("name", "address", "role", "health"):
            table.add_column(column, min_width=6, no_wrap=True)
        for column in ("lag", "units/s", "reads", "writes"):
            table.add_column(column, justify="right", min_width=7, no_wrap=True)
        for row in picture.rows:
            role, health = (Text(word, self._COLOURS.get(word, "dim")) for word in (row.role, row.health))
            counts = (f"{number:,}" for number in (round(row.rate), row.reads, row.writes))
            table.add_row(row.name, row.address.rpartition(":")[0], role, health, row.shown_lag, *counts)
        so_far = f"{picture.elapsed:.0f} s: {picture.units:,} units done, {picture.stale} stale reads, {picture.errors} errors"
        notes = (Text(note, "" if " * " in note else "dim", overflow="ellipsis", no_wrap=True) for note in list(self._notes))
        return Group(table, Text(picture.phase, "bold yellow"), Text(so_far), Text(""), *notes)

    def summary(self, summary: Summary) -> None:
        """Print a table."""
        from rich.table import Table

        table = Table("figure", "measured", "", title="summary", title_justify="left")
        for name, value, remark in summary.lines():
            table.add_row(name, value, remark, style="bold red" if remark.endswith("MISSED") else None)
        self._console.print(table)
