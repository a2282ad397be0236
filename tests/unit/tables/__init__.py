"""Tables of what servers and drivers say and what it means. Each row of a JSON file is one case of a test."""

import json
from pathlib import Path

import pytest


def table(name: str) -> pytest.MarkDecorator:
    """Parametrize a test with the rows of a table, whose keys are the test's arguments."""
    rows = json.loads((Path(__file__).parent / f"{name}.json").read_text())
    names = tuple(rows[0])
    return pytest.mark.parametrize(names, [tuple(row[each] for each in names) for row in rows])
