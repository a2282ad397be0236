"""Rules for any text in the dialects of MySQL and MariaDB: nothing around a statement ever weakens its effect."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aurora_router.core.sql.analysis import Analysis, Effect, analyze, classify, dialect_for_setting
from tests.unit.mysql_statements import DIALECTS, MEANT, READS, TRICKY, TRIED

READ, SERVER, TRANSACTION, SESSION, CONNECTION, WRITE = Effect

settings.register_profile("mysql_statements", deadline=None, max_examples=150)
SETTINGS = settings.get_profile("mysql_statements")

CORPUS = sorted(row["sql"] for row in TRIED if row["id"] not in MEANT)
QUERIES = [sql for sql in CORPUS if sql.lower().startswith(("select", "(", "with", "values")) and ";" not in sql]
EXPRESSIONS = st.recursive(
    st.sampled_from(["1", "a", "t.b", "'x'", "`q`", "now()", "nextval(s)", "f(1)", "app.g(a)", "@x", "@@global.y", "1f(2)"]),
    lambda inner: st.one_of(
        st.builds("({})".format, inner),
        st.builds("lower({})".format, inner),
        st.builds("{} + {}".format, inner, inner),
        st.builds("CASE WHEN {} THEN {} END".format, inner, inner),
        st.builds("CAST({} AS decimal(10, 2))".format, inner),
        st.builds("(SELECT {} FROM t)".format, inner),
        st.builds("last_insert_id({})".format, inner),
    ),
    max_leaves=6,
)
TAILS = st.sampled_from(["", "", " WHERE a IN (1, 2)", " ORDER BY 1", " FOR UPDATE", " LOCK IN SHARE MODE", " LIMIT 1"])
SELECTS = st.builds("SELECT {} FROM t{}".format, EXPRESSIONS, TAILS)
STATEMENTS = st.sampled_from(CORPUS) | SELECTS
ANY_QUERY = st.sampled_from(QUERIES) | SELECTS
SPACES = st.sampled_from([" ", "\n", "\t ", " /* c */ ", " /* DELETE FROM t; ' */", " -- for update '\n", " # nextval(s) '\n"])
NAMES = st.sampled_from(DIALECTS)


def spaced(sql, space):
    """The text with other white space wherever there is a blank outside literals."""
    return sql if any(sign in sql for sign in "'\"`/") else space.join(sql.split(" "))


@SETTINGS
@given(STATEMENTS, SPACES, SPACES, SPACES, st.sampled_from(["", ";", " ; ", ";;"]), NAMES)
def test_comments_space_and_semicolons_change_no_analysis(sql, before, within, behind, end, dialect):
    """Comments, white space and a trailing semicolon never change an analysis."""
    assert analyze(before + spaced(sql, within) + behind + end, dialect) == analyze(sql, dialect)


@SETTINGS
@given(STATEMENTS, NAMES)
def test_case_never_changes_an_analysis(sql, dialect):
    assert analyze(sql.lower(), dialect) == analyze(sql.upper(), dialect) == analyze(sql, dialect)


@SETTINGS
@given(ANY_QUERY, st.integers(1, 4), NAMES)
def test_parentheses_around_a_query_never_change_an_analysis(sql, depth, dialect):
    assert analyze("(" * depth + sql + ")" * depth, dialect) == analyze(sql, dialect)


@SETTINGS
@given(STATEMENTS, st.sampled_from(["/*! {} */", "/*!50000 {} */", "/*M! {} */", "/*!99999{}*/"]), NAMES)
def test_a_version_comment_around_a_statement_never_weakens_it(sql, comment, dialect):
    assert classify(comment.format(sql), dialect) >= classify(sql, dialect)


@SETTINGS
@given(ANY_QUERY, st.data(), NAMES)
def test_a_version_comment_around_any_part_never_weakens_a_query(sql, data, dialect):
    words = sql.split(" ")
    start = data.draw(st.integers(0, len(words)))
    stop = data.draw(st.integers(start, len(words)))
    text = " ".join([*words[:start], "/*!50000", *words[start:stop], "*/", *words[stop:]])
    without = " ".join([*words[:start], *words[stop:]])
    assert classify(text, dialect) >= classify(sql, dialect)
    assert classify(text, dialect) >= classify(without, dialect)


HIDDEN = ["DELETE FROM t", "; DROP TABLE t;", "FOR UPDATE", "nextval(1)", "/*", "--", "#", "INTO", "SELECT f(1)", "@x", "/*!"]


@SETTINGS
@given(st.lists(st.sampled_from(HIDDEN) | st.text(alphabet="abc ;()", max_size=5), max_size=5).map(" ".join), NAMES)
def test_a_quoted_or_commented_keyword_never_counts(text, dialect):
    """A keyword in a literal, a quoted name or a comment never counts."""
    versions = "/*!" in text
    for sql in (
        f"SELECT '{text}', 'it''s {text}' FROM t",
        f'SELECT "{text}", "x""{text}" FROM t',
        f"SELECT a AS `{text}`, t.`x``{text}` FROM t",
        "SELECT 1 -- " + text,
        "SELECT 1 # " + text,
    ):
        assert analyze(sql, dialect) == Analysis(READ, READ) or versions


NESTINGS = [
    "WITH x AS ({}) SELECT * FROM x",
    "WITH x(a) AS ({}), y AS (SELECT 1) SELECT * FROM x, y",
    "SELECT * FROM ({}) AS x",
    "SELECT 1 WHERE EXISTS ({})",
    "SELECT ({})",
    "(SELECT 1) UNION ALL ({})",
    "({}) EXCEPT SELECT 1",
    "SELECT 1 = ANY ({})",
    "(({}))",
    "EXPLAIN {}",
    "ANALYZE FORMAT=JSON {}",
    "DO ({})",
    "SET STATEMENT max_statement_time=1 FOR {}",
    "CREATE TEMPORARY TABLE x {}",
    "CREATE TEMPORARY TABLE x (a INT) AS ({})",
    "SET @x = ({})",
    "SHOW TABLES WHERE ({})",
]


@SETTINGS
@given(ANY_QUERY, st.lists(st.sampled_from(NESTINGS[:9]), max_size=4), st.sampled_from(NESTINGS), NAMES)
def test_nesting_never_weakens_a_query(sql, inner, outer, dialect):
    alone = analyze(sql, dialect)
    nested = sql
    for nesting in inner:
        nested = nesting.format(nested)
    found = analyze(outer.format(nested), dialect)
    assert found.effect >= alone.effect
    assert found.effect_if_functions_pure >= alone.effect_if_functions_pure
    assert found.effect_if_functions_pure is WRITE or found.functions >= alone.functions


CHANGES = ["DELETE FROM t", "INSERT INTO t VALUES (1)", "UPDATE t SET a = 1", "replace t values (1)", "CALL p()"]


@SETTINGS
@given(
    st.sampled_from(CHANGES),
    st.sampled_from([*NESTINGS[9:11], NESTINGS[12], "DESC {}", "BEGIN NOT ATOMIC {}"]),
    NAMES,
)
def test_nothing_in_front_weakens_a_change(sql, nesting, dialect):
    assert classify(nesting.format(sql), dialect) is WRITE


@SETTINGS
@given(st.lists(STATEMENTS, min_size=1, max_size=4), NAMES)
def test_several_statements_give_the_strongest(statements, dialect):
    found = analyze("; ".join(statements), dialect)
    each = [analyze(sql, dialect) for sql in statements]
    assert found.effect is max(one.effect for one in each)
    assert found.effect_if_functions_pure is max(one.effect_if_functions_pure for one in each)
    assert found.may_end_transaction is any(one.may_end_transaction for one in each)


@SETTINGS
@given(ANY_QUERY, NAMES)
def test_vouching_for_all_unknown_functions_gives_what_is_known(sql, dialect):
    found = analyze(sql, dialect)
    assert found.effect_given(found.functions) is found.effect_if_functions_pure
    assert bool(found.functions) is (found.effect_if_functions_pure is not found.effect)
    assert found.effect_given(()) is found.effect


PIECES = st.sampled_from(
    [*CORPUS, *READS, *(sql for sql, _, _ in TRICKY), "'", '"', "`", "\\", "/*!", "*/", "\\'", '\\"', ";", "#", "-- "]
)
MODES = st.sampled_from(["", "ANSI_QUOTES", "NO_BACKSLASH_ESCAPES"])


@settings(SETTINGS, max_examples=500)
@given(st.lists(st.tuples(PIECES, st.integers(0, 80), st.integers(1, 80)), max_size=5), NAMES, MODES)
def test_no_text_raises_and_no_mode_makes_more_of_it(pieces, dialect, mode):
    """No text raises, and no known mode makes more of a text that can be executed in it."""
    text = "".join(sql[start : start + length] for sql, start, length in pieces)
    unknown, known = analyze(text, dialect), analyze(text, dialect_for_setting(dialect, mode))
    assert unknown.effect >= unknown.effect_if_functions_pure
    refused = known == Analysis(WRITE, WRITE, may_end_transaction=True)
    assert refused or (known.effect <= unknown.effect and known.effect_if_functions_pure <= unknown.effect_if_functions_pure)


@SETTINGS
@given(ANY_QUERY, st.sampled_from(["'", '"', "`", "/*", "/*!", "*/ 1 /*!", "\\", "\x00", "\x7f", "(", ")"]), NAMES)
def test_garbage_is_a_write(sql, garbage, dialect):
    assert classify(f"{sql} {garbage}", dialect) is WRITE


@pytest.mark.parametrize(
    ("text", "effect"),
    [
        ("SELECT " + "(" * 100_000 + "1" + ")" * 100_000, READ),
        ("SELECT '" + "\\'" * 300_000 + "'", READ),
        ("SELECT '" + "\\'" * 300_000, WRITE),
        ("SELECT " + "'\\'" * 200_000, READ),
        ("SELECT `" + "``" * 300_000, WRITE),
        ("SELECT " + "1a" * 300_000, READ),
        ("SELECT " + "1e5" * 300_000, READ),
        ("SELECT " + ".5" * 300_000, READ),
        ("SELECT a" + ".5" * 300_000, READ),
        ("/*+" * 300_000, WRITE),
        ("/*+'" * 200_000, WRITE),
        ("/*+ 'a'" + " 'a'" * 200_000 + " */ SELECT 1", READ),
        ("/*!" * 300_000, WRITE),
        ("/*!50000 1 */" * 50_000, WRITE),
        ("SELECT 1" + "/*!50000 + 1 */" * 50_000, READ),
        ("SET STATEMENT a = 1 FOR " * 50_000, WRITE),
        ("SET " + "@x = 1, " * 100_000, SESSION),
        ("EXPLAIN FORMAT = JSON " * 50_000, WRITE),
        ("EXPLAIN " * 100_000, WRITE),
        ("SHOW " + "FULL " * 100_000, SERVER),
        ("CREATE TEMPORARY TABLE x " + "(" * 100_000 + "SELECT 1", WRITE),
        ("SELECT @@" * 100_000, CONNECTION),
        ("SELECT " + "information_schema.tables, " * 100_000 + "1", READ),
        ("SELECT " + "#\n" * 300_000 + "1", READ),
        ("SELECT " + "a, " * 200_000 + "against(1)", WRITE),
        ("SELECT MATCH " + "a, " * 200_000 + "b AGAINST (1)", READ),
        ("SELECT " + "against(1), " * 100_000 + "1", WRITE),
        ("--" * 300_000, WRITE),
    ],
    ids=range(28),
)
def test_huge_and_deep_texts_are_read_in_linear_time(text, effect):
    assert classify(text, "mariadb") is effect
