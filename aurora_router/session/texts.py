"""The text that SQLAlchemy will send for a statement, before it has a connection to send it on.

A statement that SQLAlchemy has compiled before is in the engine's own cache. SQLAlchemy looks there again when it executes the
statement. So the text costs one more look-up, and nothing is compiled twice.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from sqlalchemy import Executable
from sqlalchemy.engine import Engine
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.sql import compiler
from sqlalchemy.sql.functions import FunctionElement

# SQLAlchemy fills these in when it sends the text: values of IN (...), values that are not parameters, and schema names.
_VALUE = re.compile(r"__\[POSTCOMPILE_[^\]~]+(?:~~(?P<before>.*?)~~REPL~~(?P<after>.*?)~~)?\]", re.DOTALL)
_SCHEMA = re.compile(r"__\[SCHEMA_[^\]]+\]")


def text_of(
    statement: Any, parameters: Any, engine: Engine, translation: Mapping[str | None, str | None] | None, *, thorough: bool
) -> str | None:
    """Return the text that SQLAlchemy sends for this statement on an engine; None if nobody knows the text before that.

    parameters: as Session.execute() takes them.
    translation: the option `schema_translate_map`.
    thorough: whether to compile also a statement that SQLAlchemy does not cache, and so will compile once more.
    """
    if isinstance(statement, FunctionElement):
        statement = statement.select()  # as SQLAlchemy does
    if not isinstance(statement, Executable):
        return None  # not a statement: the caller wants the engine of a table
    try:
        text = _compiled(statement, parameters, engine, translation, thorough)
    except SQLAlchemyError:
        # The application gets this error when the statement is executed, unless a connected engine can compile the statement.
        return None
    if text is not None and "__[" in text:
        text = _SCHEMA.sub("s", _VALUE.sub(_some_value, text))
        if "__[" in text:
            return None  # something else is still to be filled in
    return text


def key_of(statement: Any) -> object:
    """Return a key that is the same for statements that differ only in parameter values; None if SQLAlchemy has no such key."""
    if not isinstance(statement, Executable):
        return None
    # This costs nothing extra, because SQLAlchemy needs the key, too, and keeps it.
    key: Any = statement._generate_cache_key()  # type: ignore[attr-defined]
    return key.key if key is not None else None


def _some_value(found: re.Match[str]) -> str:
    """Return NULL inside the expression that the value's type puts around the value."""
    return f"{found['before'] or ''}NULL{found['after'] or ''}"


def _compiled(statement: Any, parameters: Any, engine: Engine, translation: Any, thorough: bool) -> str | None:
    dialect: Any = engine.dialect
    cache = engine._compiled_cache
    # A dialect that has not connected yet does not know what syntax its server wants.
    connected = dialect.server_version_info is not None
    if not connected or cache is None or statement._generate_cache_key() is None:
        if connected and not thorough:
            return None
        return str(statement.compile(dialect=dialect, schema_translate_map=translation))
    first: Any = parameters or ()
    several = bool(parameters) and not isinstance(parameters, Mapping)
    if several:
        first = parameters[0]
    compiled = statement._compile_w_cache(
        dialect,
        compiled_cache=cache,
        column_keys=sorted(first),
        for_executemany=several and len(parameters) > 1,
        schema_translate_map=translation,
        linting=dialect.compiler_linting | compiler.WARN_LINTING,
    )[0]
    text: str = compiled.string
    return text
