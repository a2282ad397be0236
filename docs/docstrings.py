"""The library's docstrings in parts: sentences, and the names that they explain ("name: text")."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import Any


def paragraphs(documented: Any, docstring: str) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """Each paragraph: its sentences, and the names that it explains, with their explanations.

    A name is a parameter or a field. Names that share an explanation are one, as in "probe_interval, probe_timeout". Sentences
    after a list of names that begin with "Raises" have the name "".
    """
    names = "|".join(sorted(map(re.escape, _parameters(documented)), key=len, reverse=True)) or "(?!)"
    begins = re.compile(rf"(?:^|(?<=[.)] )|(?<=\n))(?:((?:{names})(?:, (?:{names}))*): |(?=Raises ))", re.MULTILINE)
    for paragraph in re.split(r"\n\n+", docstring.strip("\n")):
        if paragraph.startswith("    "):
            yield paragraph, []
            continue
        sentences, *explained = begins.split(paragraph)
        explanations = [(name or "", one_line(text)) for name, text in zip(explained[::2], explained[1::2], strict=True)]
        yield sentences.strip(), explanations


def as_row(documented: type) -> str:
    """A row of a table in Markdown: the name of a class, its sentences, and the explanations of its attributes."""
    sentences, said_of = [], {name: f"`{name}`" for name in inspect.get_annotations(documented)}
    if "unit" in getattr(documented, "__dataclass_fields__", ()):
        said_of["unit"] = "`unit`, `transaction`"  # inherited, and described once for all events of units
    source, known = inspect.getsource(documented), {*vars(documented), *said_of}
    for said, explained in paragraphs(documented, inspect.getdoc(documented) or ""):
        sentences.append(one_line(said))
        for names, text in explained:
            attributes = [name for name in names.split(", ") if name in known or f"self.{name} = " in source]
            if attributes:  # the other names are for the constructor alone
                first, *others = attributes
                said_of[first] = f"{', '.join(f'`{name}`' for name in attributes)}: {text.rstrip('.')}"
                said_of = {name: text for name, text in said_of.items() if name not in others}
    return f"| `{documented.__name__}` | {' '.join(sentences).strip()} | {'; '.join(said_of.values())} |\n"


def one_line(text: str) -> str:
    return " ".join(text.split())


def _parameters(documented: Any) -> set[str]:
    names = {*inspect.get_annotations(documented)} if isinstance(documented, type) else set()
    try:
        return names | {*inspect.signature(documented).parameters}
    except (TypeError, ValueError):  # builtins have no signature
        return names
