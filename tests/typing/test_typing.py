"""mypy, as a user runs it, on right and wrong uses of the public API."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest

from aurora_router.config.settings import SETTINGS

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
IGNORED = re.compile(r"# type: ignore\[(?P<codes>[^]]+)\]$")
ROUTER = 'from aurora_router import Router\n\nURL = "postgresql+psycopg://db-1/shop"\n'
ERROR = re.compile(r"^[^:]+:(?P<line>\d+): error: .*\[(?P<code>[a-z-]+)\]$", re.MULTILINE)

pytestmark = pytest.mark.timeout(300)  # the first run reads all of SQLAlchemy


def mypy(*files: Path) -> subprocess.CompletedProcess[str]:
    """Run mypy with the settings of pyproject.toml, and a cache for each version of SQLAlchemy."""
    cache = ROOT / ".mypy_cache" / f"sqlalchemy-{importlib.metadata.version('sqlalchemy')}"
    command = [sys.executable, "-m", "mypy", "--strict", "--cache-dir", str(cache), "--no-error-summary", *map(str, files)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_the_public_api_has_the_types_that_users_rely_on() -> None:
    done = mypy(HERE / "public_api.py", HERE / "wrong_use.py")
    assert done.returncode == 0, done.stdout + done.stderr


def test_each_mistake_is_an_error_on_its_line(tmp_path: Path) -> None:
    """Each mistake is an error on its line, and no other line has one."""
    given = (HERE / "wrong_use.py").read_text().splitlines()
    expected = [
        (number, code)
        for number, line in enumerate(given, 1)
        if (ignored := IGNORED.search(line))
        for code in ignored["codes"].split(", ")
    ]
    assert len(expected) > 20
    bare = tmp_path / "wrong_use_bare.py"
    bare.write_text("\n".join(IGNORED.sub("", line).rstrip() for line in given) + "\n")
    done = mypy(bare)
    assert done.returncode == 1, done.stdout + done.stderr
    found = [(int(error["line"]), error["code"]) for error in ERROR.finditer(done.stdout)]
    assert sorted(found) == sorted(expected), done.stdout


def test_a_type_checker_knows_each_setting_and_its_type(tmp_path: Path) -> None:
    """Each setting accepts its default, and none accepts just any object."""
    names = [each.name for each in SETTINGS]
    right = [f"Router(URL, {each.name}={each.default!r})" for each in SETTINGS if each.name != "url"]
    wrong = [f"Router(url=URL, {name}=object())" if name != "url" else "Router(object())" for name in names]
    checked = tmp_path / "each_setting.py"
    checked.write_text(ROUTER + "\n".join([*right, *wrong]) + "\n")
    done = mypy(checked)
    first = ROUTER.count("\n") + len(right) + 1
    found = [(int(error["line"]), error["code"]) for error in ERROR.finditer(done.stdout)]
    assert found == [(first + index, "arg-type") for index in range(len(wrong))], done.stdout
