"""Each module that users import says in `__all__` what it offers, and the documents import nothing else."""

from __future__ import annotations

import inspect
import re
from importlib import import_module
from pathlib import Path
from typing import get_args

import pytest

import aurora_router
from aurora_router import events
from aurora_router.core import selection

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
IMPORTS = sorted(
    {
        (module, name)
        for document in DOCUMENTS
        for module, names in re.findall(r"^from (aurora_router[\w.]*) import ([\w, ]+)$", document.read_text(), re.MULTILINE)
        for name in names.split(", ")
    }
)
# CHANGELOG.md says which modules are public. The errors and the fixtures of the plugin are known by other names, too.
MODULES = ["aurora_router", "aurora_router.errors", "aurora_router.local.pytest_plugin"]
MODULES += re.findall(r"`(aurora_router(?:\.[a-z]\w*)+)`", (ROOT / "CHANGELOG.md").read_text())
INTERNAL = {"Signal"}  # the base of errors that the router catches itself


@pytest.mark.parametrize("name", MODULES)
def test_a_public_module_offers_what_it_has(name):
    """Each name in `__all__` stands there once, and is no module that was imported."""
    module = import_module(name)
    offered = {each: getattr(module, each) for each in module.__all__}
    assert len(offered) == len(module.__all__)
    assert not any(inspect.ismodule(each) for each in offered.values())


@pytest.mark.parametrize("name", [each for each in MODULES if each != selection.__name__])
def test_a_public_module_offers_all_that_it_defines(name):
    """In core/selection other functions are the router's own, although they have no underscore."""
    module = import_module(name)
    defined = {
        each
        for each, value in vars(module).items()
        if (inspect.isclass(value) or inspect.isfunction(value)) and value.__module__ == name and not each.startswith("_")
    }
    assert defined - INTERNAL <= {*module.__all__}


@pytest.mark.parametrize(("module", "name"), IMPORTS)
def test_the_documents_import_public_names_only(module, name):
    assert module in MODULES
    assert name in import_module(module).__all__ or f"{module}.{name}" in MODULES


def test_each_event_is_a_public_name():
    assert {*events.__all__} == {*(kind.__name__ for kind in get_args(events.Event)), "Event", "Wait"}


def test_each_error_is_public_in_both_modules():
    """The package has every error that its module of errors offers."""
    assert {*aurora_router.errors.__all__} <= {*aurora_router.__all__}


def test_each_strategy_is_a_public_name():
    assert {function.__name__ for function in selection.STRATEGIES.values()} <= {*selection.__all__}
