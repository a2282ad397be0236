"""The router's own statements keep their meaning, even if somebody creates objects of the same names."""

import re

import pytest

from aurora_router.servers import mysql, postgresql

SQL = re.compile(r"\s*(SELECT|INSERT|DELETE|UPDATE|REPLACE|CREATE|SET|RESET|SHOW|START|WITH|XA)\b")
LITERAL = re.compile(r"'[^']*'|%\(\w+\)s")


def statements(module):
    """All statements of a server module, by the names of its constants."""
    found = {}
    for name, value in vars(module).items():
        texts = value if isinstance(value, tuple) and all(isinstance(part, str) for part in value) else (value,)
        for number, text in enumerate(texts):
            if name.isupper() and isinstance(text, str) and SQL.match(text):
                found[f"{name}[{number}]" if len(texts) > 1 else name] = LITERAL.sub(" 0 ", text)
    return found


OF_POSTGRESQL, OF_MYSQL = statements(postgresql), statements(mysql)
OF_POSTGRESQL["IDENTIFY"] = LITERAL.sub(" 0 ", postgresql.identify_sql(7, None))
OF_POSTGRESQL["identify_sql"] = LITERAL.sub(" 0 ", postgresql.identify_sql(4711, None))
GRAMMAR = {
    "ALL",
    "AND",
    "ANY",
    "ARRAY",
    "AS",
    "EXISTS",
    "KEY",
    "OPERATOR",
    "OR",
    "RETURNING",
    "SELECT",
    "THEN",
    "VALUES",
    "WHEN",
    "WHERE",
}
"""Words before a parenthesis that PostgreSQL looks up nowhere."""
GRAMMAR |= {"coalesce", "extract", "greatest"}  # expressions: a function of such a name needs its schema in a call


def test_the_statements_are_found():
    """The statements are found, because a check of none would pass."""
    known = {
        "IDENTITY",
        "identify_sql",
        "PROBE",
        "NOTE",
        "EVIDENCE",
        "STATUS",
        "SYNC_BARRIER",
        "END_IDLE",
        "COMMIT_TABLE_FLAW",
        "COMMIT_ROW",
        "LOOKUP_SETTINGS",
    }
    assert known | {"FENCE", "COMMIT_ROW_EVIDENCE", "PRUNE", "FUNCTIONS", "CREATE_COMMIT_TABLE[0]", "CREATE_COMMIT_TABLE[1]"} <= {
        *OF_POSTGRESQL
    }
    assert {
        "IDENTITY",
        "PROBE",
        "MEMBERS",
        "COMMIT_TABLE_FLAW",
        "FENCE",
        "COMMIT_ROW_EVIDENCE",
        "SYNC_BARRIER",
        "PRUNE",
        "FUNCTIONS",
    } <= {*OF_MYSQL}


@pytest.mark.parametrize("name", OF_POSTGRESQL)
def test_functions_operators_and_types_are_of_pg_catalog(name):
    """The search path resolves no name, so nothing of another schema runs with the router's rights."""
    text = OF_POSTGRESQL[name]
    table = postgresql.COMMIT_TABLE
    for schema, function in re.findall(r"(\w+\.)?(\w+)\s*\(", text):
        assert schema == "pg_catalog." or function in GRAMMAR or function.startswith(table), function
    assert not re.search(r"::(?!pg_catalog\.\w)", text)
    assert not re.search(r"(?i)\b(IN|LIKE|ILIKE|SIMILAR|BETWEEN|USING|NULLIF|CAST|DISTINCT|OVERLAPS)\b", text)
    assert not re.search(r"(?i)\bCASE\s+(?!WHEN)", text), "the short form compares"
    left = re.sub(r"OPERATOR\(pg_catalog\.[^)]+\)|::", " ", text)
    assert not re.findall(r"[-+*/<>=~!@#%^&|`?]+", left)
    for relation in re.findall(r"(?i)\b(?:FROM|JOIN|INTO|TABLE IF NOT EXISTS)\s+([\w.]+)(?!\w*\s*\.)", text):
        assert relation.startswith("pg_catalog.") or relation == table, relation


@pytest.mark.parametrize("name", OF_MYSQL)
def test_functions_are_built_in_and_tables_have_their_schema(name):
    """No function has a space before its parenthesis, so none can be a stored function in place of a built-in one."""
    text = OF_MYSQL[name]
    keywords = {"IN", "AND", "EXISTS", "VALUES", "KEY", mysql.COMMIT_TABLE, f"{mysql.COMMIT_TABLE}_at"}
    for function, space in re.findall(r"(\w+)(\s*)\(", text):
        assert not space or function in keywords, function
    for relation in re.findall(r"(?i)\b(?:FROM|JOIN|INTO|TABLE IF NOT EXISTS)\s+([\w.]+)", text):
        assert relation == mysql.COMMIT_TABLE or relation.startswith(("information_schema.", "performance_schema.")), relation
