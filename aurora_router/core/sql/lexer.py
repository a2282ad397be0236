r"""Cutting a text up into tokens: one pattern per dialect, made of the pieces here.

Text that matches no token is garbage, and a statement with garbage counts as a write. As in the servers, only ASCII letters
fold, and only ASCII characters are white space. So U+00A0 is part of a name, and U+212A is no K.
"""

from __future__ import annotations

import re
from typing import Any, Final

from aurora_router.core.sql.effects import Hint

START: Final = r"A-Za-z_\x80-\U0010ffff"
WORD: Final = rf"[{START}][{START}0-9$]*+"
SPACE: Final = r"[ \t\n\r\f\v]++"
# Letters that follow a number are a word of their own: old servers read `LIMIT 1for update` that way.
NUMBER: Final = r"(?:[0-9]++(?:\.[0-9]*+)?|\.[0-9]++)(?:[eE][-+]?[0-9]++)?"
# No group here is possessive, because before Python 3.11.5 possessive groups match what they should not. Each group can match in
# one way only, so a plain one is as fast.
COMMENT: Final = r"/\*[^*/]*+(?:(?:\*(?!/)|/(?!\*))[^*/]*+)*\*/"  # one that holds no other
NAMED_PARAMETER: Final = rf"%\({WORD}\)s(?![{START}0-9$])"
SIGN: Final = r"::|[-+*<>=~!@%^&|?:.,;()\[\]{}]|/(?!\*)"
SIGNS: Final = frozenset("-+*/<>=~!@%^&|?:.,;()[]{}#`") | {"::", ""}

_ASCII_LOWER: Final = {upper: upper + 32 for upper in range(ord("A"), ord("Z") + 1)}
_HINT: Final = re.compile(r"/\*\s*@\s*(writer|reader)\s*\*/")
_COMMENT_EDGE: Final = re.compile(r"/\*|\*/")
# MySQL and MariaDB execute what stands in /*! */ and /*M! */.
_QUOTED_OR_COMMENT: Final = re.compile(rf"""('[^']*+'|"[^"]*+"|`[^`]*+`)|(?!/\*M?!){COMMENT}|--(?=\s)[^\n]*+""")


def quoted(quote: str) -> str:
    """Return a pattern for text between two of these quotes. A quote inside of the text is doubled."""
    return f"{quote}[^{quote}]*+(?:{quote}{quote}[^{quote}]*+)*{quote}(?!{quote})"


def escaped(quote: str) -> str:
    """Return a pattern like that of `quoted()`, in which a backslash also escapes the next character."""
    return rf"{quote}[^{quote}\\]*+(?:(?:\\.|{quote}{quote})[^{quote}\\]*+)*{quote}(?!{quote})"


def pattern(skipped: str, *alternatives: str) -> re.Pattern[str]:
    """Return a pattern that finds the tokens: skipped text, then one token as group 1.

    The end of the text is a token, "", so that trailing space is not tried again from each position. If nothing matches, the rest
    of the text is the group "garbage", and group 1 is None.
    """
    return re.compile(rf"(?:{skipped})*(?:({'|'.join(alternatives)}|\Z)|(?P<garbage>.+))", re.DOTALL)


def tokens(sql: str, found_by: re.Pattern[str]) -> list[str | Any]:
    """Return the tokens of the text, with comments. If there is garbage, the last token or the one before it is None."""
    return [token[1] for token in found_by.finditer(sql)]


def garbage(sql: str, found_by: re.Pattern[str]) -> str:
    """Return the part of the text that matches no token."""
    return next(token["garbage"] for token in found_by.finditer(sql) if token["garbage"])


def folded(sql: str, raw: list[str]) -> list[str]:
    """Return the tokens of the text in lower case, with the end once only."""
    low = list(map(str.lower if sql.isascii() else _ascii_lower, raw))
    while len(low) > 1 and low[-2] == "":  # the end may have been matched twice
        low.pop()
    return low


def _ascii_lower(token: str) -> str:
    return token.translate(_ASCII_LOWER)


def without_comments(raw: list[str]) -> tuple[list[str], Hint | None]:
    """Return the tokens that are no comments, and the hint that the comments give."""
    asked = {match[1] for token in raw if token[:2] == "/*" and (match := _HINT.fullmatch(token))}
    kept = [token for token in raw if token[:2] != "/*"]
    return kept, "writer" if "writer" in asked else "reader" if asked else None


def without_notes(sql: str) -> str:
    """Return a text of any dialect without its comments, to compare it with others. Tools add another comment to each call."""
    return _QUOTED_OR_COMMENT.sub(r"\1", sql).strip()


def across_nested_comments(sql: str, found_by: re.Pattern[str]) -> list[str | Any]:
    """Return the tokens of a text, without the comments that hold other comments.

    No pattern can match such comments, so it finds garbage there. The lexer starts again behind each of them.
    """
    raw: list[str | Any] = []
    at = 0
    while at >= 0:
        for token in found_by.finditer(sql, at):
            begin = token.start("garbage")
            if begin >= 0 and sql.startswith("/*", begin):
                at = _comment_end(sql, begin + 2)
                break
            raw.append(token[1])
        else:
            return raw
    return [*raw, None]  # never closed: garbage


def _comment_end(sql: str, at: int) -> int:
    """The position behind the comment whose "/*" ends at `at`; -1 if it is never closed."""
    depth = 1
    for edge in _COMMENT_EDGE.finditer(sql, at):
        depth += 1 if edge[0] == "/*" else -1
        if not depth:
            return edge.end()
    return -1
