"""The configuration with which Sphinx makes a site of the pages in this directory (scripts/docs)."""

from __future__ import annotations

import sys
import zlib
from pathlib import Path
from typing import Any

import aurora_router

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from docstrings import paragraphs  # noqa: E402

project = "aurora_router"
author = project_copyright = "the aurora_router maintainers"
version = release = aurora_router.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.intersphinx", "sphinx_copybutton"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"aurora_router {version}"
default_role = "code"
myst_heading_anchors = 4  # the anchors of a forge, so that a link is right in both places

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_type_aliases = {"events.Event": "events.Event"}

nitpicky = True
nitpick_ignore_regex = [  # names of internal modules and of libraries that are not linked
    ("py:class", r"aurora_router\.(cluster|config|core|jobs|local|middleware|router|routing|telemetry)\..*"),
    ("py:class", r"tenacity\..*"),
    ("py:class", r"P|Requirement|LastRead|TypeAliasForwardRef|.*\[.*"),
]


MADE_BY_THE_LIBRARY = {
    f"aurora_router.{name}"
    for name in (
        "routing.causal_context.Scope",
        "Decision",
        "Effect",
        "Facts",
        "Failure",
        "Instance",
        "InstanceStats",
        "Need",
        "Outcome",
        "Reason",
        "Role",
        "RouterStats",
        "Topology",
    )
}


def inventory(name: str) -> str:
    """Make an inventory of another site from a list of names, so that a build needs no network."""
    path = HERE / "_build" / f"{name}.inv"
    path.parent.mkdir(exist_ok=True)
    header = (
        f"# Sphinx inventory version 2\n# Project: {name}\n# Version: \n# The remainder of this file is compressed using zlib.\n"
    )
    path.write_bytes(header.encode() + zlib.compress((HERE / "inventories" / f"{name}.txt").read_bytes()))
    return str(path)


intersphinx_mapping = {
    "python": ("https://docs.python.org/3", inventory("python")),
    "sqlalchemy": ("https://docs.sqlalchemy.org/en/21", inventory("sqlalchemy")),
    "psycopg": ("https://www.psycopg.org/psycopg3/docs", inventory("psycopg")),
}


def as_restructured_text(_app: Any, _what: str, _name: str, documented: Any, _options: Any, lines: list[str]) -> None:
    """Turn the names that a docstring explains into a list, and an indented paragraph into code."""
    docstring = "\n".join(lines) if documented.__doc__ else ""  # without __doc__ it is inherited from SQLAlchemy
    lines.clear()
    for sentences, explained in paragraphs(documented, docstring):
        if sentences.startswith("    "):
            lines += ["", ".. code-block:: python", "", *sentences.splitlines(), ""]
            continue
        lines += ["", *sentences.splitlines(), ""]
        for name, text in explained:
            lines += [f"- **{name}**: {text}"] if name else ["", text, ""]


def without_constructor(
    _app: Any, what: str, name: str, _documented: Any, _options: Any, signature: str | None, _returns: Any
) -> tuple[str, str] | None:
    """Hide the signature of a class that only the library makes."""
    return ("", "") if signature and (what == "exception" or name in MADE_BY_THE_LIBRARY) else None


def setup(app: Any) -> None:
    app.connect("autodoc-process-docstring", as_restructured_text)
    app.connect("autodoc-process-signature", without_constructor)
