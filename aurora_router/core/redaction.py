"""Hide the values of options in the text of an error, because they may be or contain secrets."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Final

_BETWEEN: Final = re.compile(r"[^\w.@%$+-]+")
"""The separators of the parts of a value. A server may repeat one part alone, as in "-c app.token=secret"."""
_QUOTED: Final = re.compile(r"""near '.*' at line|"[^"]*"|'[^']*'|`[^`]*`""", re.DOTALL)
_WORD: Final = re.compile("[a-z]+")
_LONG: Final = 8  # characters; servers may cut off the rest of longer values


def hide(text: str, values: Iterable[object], shown: Collection[object] = ()) -> str:
    """Replace these values, and parts of them, with "...".

    A part that looks like a word of a sentence is hidden only in quotes, in brackets and after a colon.
    shown: names that everybody may see, which are those of options, of the user, the database and the host.
    """
    known = {str(each).lower() for each in shown}
    given = [each for value in values for said in _texts(value) for each in (said, repr(said)[1:-1])]
    found = {part for each in given for part in (each, *_BETWEEN.split(each))}
    parts = sorted((part for part in found if part and part.lower() not in known), key=len, reverse=True)
    odd = [_pattern(part) for part in parts if len(part) > 2 and not _WORD.fullmatch(part)]
    if odd:
        text = re.sub(rf"(?<!\w)(?:{'|'.join(odd)})(?!\w)", "...", text, flags=re.IGNORECASE)
    if parts:
        any_of = "|".join(map(_pattern, parts))
        inside = re.compile(rf"(?<!\w)(?:{any_of})(?!\w)", re.IGNORECASE)
        text = _QUOTED.sub(lambda quoted: inside.sub("...", quoted[0]), text)
        behind = rf"""(?:(?<=['"`(=])|(?<=: )|(?<=:  ))(?:{any_of})(?!\w)"""
        before = rf"""(?<!\w)(?:{any_of})(?=['"`)])"""
        text = re.sub(f"{behind}|{before}", "...", text, flags=re.IGNORECASE)
    return text


def _pattern(part: str) -> str:
    return re.escape(part) if len(part) <= _LONG or _BETWEEN.search(part) else re.escape(part[:_LONG]) + r"""[^\s'"`]*"""


def _texts(value: object) -> Iterator[str]:
    """The texts that an error might repeat of a value."""
    if isinstance(value, bytes | bytearray):
        yield value.decode("latin-1")
    elif isinstance(value, str | os.PathLike):
        yield os.fsdecode(value)
    elif isinstance(value, Mapping):
        yield from _all_texts(value.values())
    elif isinstance(value, list | tuple | set | frozenset):
        yield from _all_texts(value)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield str(value)


def _all_texts(values: Iterable[object]) -> Iterator[str]:
    for value in values:
        yield from _texts(value)
