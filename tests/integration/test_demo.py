"""The piped demo: its story, its figures, and its failure if a figure is wrong."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from aurora_router.local import CLUSTERS
from aurora_router.local.demo import Books
from aurora_router.local.demo_view import LiveView, Picture, PlainView, Row, Summary
from tests.engines import here

PROJECT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-W", "error", "-m", "aurora_router", "demo", "--seconds", "6"]

GOOD = Summary(
    seconds=20.0,
    units=5000,
    reads=9000,
    reads_on_readers=8100,
    checks=500,
    stale=0,
    orders=500,
    lost=0,
    after_promotion=200,
    errors={"OperationalError": 2},
    longest_pause=1.2,
)


def demo(*arguments: str, directory: Path) -> subprocess.CompletedProcess[str]:
    """The demo in a process of its own, with its cluster's files in `directory`."""
    environment = {**os.environ, "TMPDIR": str(directory)}
    return subprocess.run(
        [*COMMAND, *arguments], capture_output=True, text=True, timeout=100, check=False, cwd=PROJECT, env=environment
    )


@pytest.fixture
def directory() -> Iterator[Path]:
    """A directory that the servers' user may enter, too; empty again when the test ends."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o711)
        yield Path(name)
        assert list(Path(name).iterdir()) == []


def figures(output: str) -> dict[str, str]:
    """The summary's lines by name."""
    return {name: value.strip() for name, value in re.findall(r"^([a-z ]+): +(.*)$", output, re.MULTILINE)}


@pytest.mark.parametrize("engine", here(*CLUSTERS))
def test_a_short_demo_tells_the_story_with_correct_figures(engine: str, directory: Path) -> None:
    """A short run tells the story and ends with correct figures."""
    done = demo("--engine", engine, directory=directory)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    assert re.search("making a (PostgreSQL|MariaDB|MySQL) .*cluster", done.stdout)[1].lower() == engine  # type: ignore[index]
    for event in ("the cluster is ready", "has been killed", "has been promoted: writes go on", "is back as a reader"):
        assert event in done.stdout
    found = figures(done.stdout)
    assert found["stale reads"] == "0                        must be 0: ok"
    assert re.match(r"0 of [1-9]\d* +must be 0: ok", found["acknowledged writes lost"])
    assert int(found["units done"].partition(" ")[0].replace(",", "")) > 100
    assert float(found["reads served by readers"].partition(" ")[0]) > 50
    assert 1.0 < float(found["longest time without a write"].partition(" ")[0]) < 6
    assert "errors that reached the shop" in found


def test_it_fails_when_sessions_do_not_see_their_own_writes(directory: Path) -> None:
    done = demo("--consistency", "eventual", directory=directory)
    assert done.returncode == 1, done.stdout
    assert figures(done.stdout)["stale reads"].endswith("must be 0: MISSED")
    assert done.stderr == "aurora-router demo: not as it must be: stale reads\n"


def test_ctrl_c_ends_it_quietly_and_leaves_nothing_behind(directory: Path) -> None:
    process = subprocess.Popen(
        COMMAND,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=PROJECT,
        env={**os.environ, "TMPDIR": str(directory)},
    )
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if "has been killed" in line:  # the worst moment: units wait for a writer
                time.sleep(0.3)
                break
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=20)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 130
    assert said.strip() == ""


def test_an_acknowledged_order_not_found_counts_as_lost() -> None:
    """An acknowledged order that is not found is lost, and one in doubt is not."""
    cluster: Any = SimpleNamespace(instances=())
    books = Books(cluster, PlainView())
    for reference in ("a", "b", "c"):
        books.acknowledged(reference)
    summary = books.summary(found={"a", "c", "never answered"}, before_promotion=1)
    assert (summary.orders, summary.lost, summary.after_promotion) == (3, 1, 2)
    assert "acknowledged writes lost" in summary.missed


def test_good_figures_miss_nothing() -> None:
    assert GOOD.missed == ()
    lines = {name: (value, remark) for name, value, remark in GOOD.lines()}
    assert lines["reads served by readers"] == ("90.0 % of 9,000", "")
    assert lines["acknowledged writes lost"] == ("0 of 500", "must be 0: ok")
    assert lines["errors that reached the shop"] == ("2 (2 OperationalError)", "")


@pytest.mark.parametrize(
    ("bad", "figure"),
    [
        ({"stale": 1}, "stale reads"),
        ({"lost": 1}, "acknowledged writes lost"),
        ({"after_promotion": 0}, "writes after the promotion"),
        ({"checks": 0}, "own orders read back"),
    ],
)
def test_a_bad_figure_is_missed_and_marked(bad: dict[str, Any], figure: str) -> None:
    summary = replace(GOOD, **bad)
    assert summary.missed == (figure,)
    assert {name for name, _, remark in summary.lines() if remark.endswith("MISSED")} == {figure}


@pytest.mark.parametrize("kind", [PlainView, LiveView])
def test_both_views_show_instances_events_and_the_summary(
    kind: type[PlainView | LiveView], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both views show the instances, the events and the summary."""
    monkeypatch.setenv("COLUMNS", "120")
    row = Row("db-1", "127.1.2.3:5432", "writer", "healthy", 0.3, 55.0, 1234, 567)
    view = kind()
    with view:
        view.starting("starting the cluster")
        view.note("the writer is gone")
        view.show(Picture(3.0, "the phase", (row, replace(row, name="db-2", role="-", health="down")), 99, 0, 1))
    view.summary(GOOD)
    shown = capsys.readouterr().out
    for text in ("db-1", "writer", "300 ms", "down", "the writer is gone", "units done", "must be 0: ok"):
        assert text in shown
