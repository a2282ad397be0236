"""Rules of the classifier for any text. Hypothesis looks for a counterexample."""

import json
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from aurora_router.core.sql.analysis import Analysis, Effect, analyze, classify

settings.register_profile("statements", deadline=None, max_examples=150)
SETTINGS = settings.get_profile("statements")

ROWS = json.loads((Path(__file__).parents[1] / "data" / "statements.json").read_text())
CORPUS = sorted(row["sql"] for row in ROWS if row["dialect"] == "postgresql")
EVERYTHING = sorted(row["sql"] for row in ROWS)
QUERIES = [sql for sql in CORPUS if sql.lower().startswith(("select", "(", "with", "values")) and " INTO " not in sql]

KEYWORDS = ["DELETE FROM t", "; DROP TABLE t;", "FOR UPDATE", "nextval(1)", "/*", "*/", "--", "INTO", "SELECT f(1)"]
EXPRESSIONS = st.recursive(
    st.sampled_from(["1", "a", "t.b", "'x'", '"q"', "now()", "nextval('s')", "f(1)", "app.g(a)", "currval('s')"]),
    lambda inner: st.one_of(
        st.builds("({})".format, inner),
        st.builds("lower({})".format, inner),
        st.builds("{} + {}".format, inner, inner),
        st.builds("CASE WHEN {} THEN {} END".format, inner, inner),
        st.builds("CAST({} AS numeric(10, 2))".format, inner),
        st.builds("(SELECT {} FROM t)".format, inner),
    ),
    max_leaves=6,
)
TAILS = st.sampled_from(["", "", " WHERE a IN (1, 2)", " ORDER BY 1", " FOR UPDATE", " LIMIT 1"])
SELECTS = st.builds("SELECT {} FROM t{}".format, EXPRESSIONS, TAILS)
STATEMENTS = st.sampled_from(CORPUS) | SELECTS
ANY_QUERY = st.sampled_from(QUERIES) | SELECTS
SPACES = st.sampled_from([" ", "\n", "\t ", " /* c */ ", " /* DELETE FROM t; ' */", " -- for update '\n", "/* /* x */ */"])


def spaced(sql, space):
    """The text with other white space wherever there is a blank outside literals."""
    parts = sql.split(" ")
    return sql if any(quote in sql for quote in "'\"$") else space.join(parts)


@SETTINGS
@given(STATEMENTS, SPACES, SPACES, SPACES, st.sampled_from(["", ";", " ; ", ";;"]))
def test_comments_space_and_semicolons_change_no_analysis(sql, before, within, behind, end):
    """Comments, white space and a trailing semicolon never change an analysis."""
    assert analyze(before + spaced(sql, within) + behind + end) == analyze(sql)


@SETTINGS
@given(STATEMENTS)
def test_case_never_changes_an_analysis(sql):
    if '"' not in sql:  # quoted names keep their case
        assert analyze(sql.lower()) == analyze(sql.upper().replace("E'", "e'")) == analyze(sql)


@SETTINGS
@given(ANY_QUERY, st.integers(1, 4))
def test_parentheses_around_a_query_never_change_an_analysis(sql, depth):
    assert analyze("(" * depth + sql + ")" * depth) == analyze(sql)


@SETTINGS
@given(st.lists(st.sampled_from(KEYWORDS) | st.text(alphabet="abc ;()", max_size=5), max_size=5).map(" ".join))
def test_a_quoted_or_commented_keyword_never_counts(text):
    """A keyword in a literal, a quoted name or a comment never counts."""
    for sql in (
        f"SELECT '{text}', 'it''s {text}', E'\\'{text}' FROM t",
        f'SELECT a AS "{text}", t."x""{text}" FROM t',
        f"SELECT $${text}$$, $tag${text} $$ {text}$tag$ FROM t",
        "SELECT 1 -- " + text,
    ):
        assert analyze(sql) == Analysis(Effect.READ, Effect.READ)


NESTINGS = [
    "WITH x AS ({}) SELECT * FROM x",
    "WITH x(a) AS MATERIALIZED ({}), y AS (SELECT 1) SELECT * FROM x, y",
    "SELECT * FROM ({}) AS x",
    "SELECT 1 WHERE EXISTS ({})",
    "SELECT ({})",
    "SELECT ARRAY({})",
    "(SELECT 1) UNION ALL ({})",
    "({}) EXCEPT SELECT 1",
    "EXPLAIN ANALYZE {}",
    "EXPLAIN (ANALYZE, COSTS off) {}",
    "COPY ({}) TO STDOUT",
    "(({}))",
]


@SETTINGS
@given(ANY_QUERY, st.lists(st.sampled_from(NESTINGS[:8] + NESTINGS[-1:]), max_size=4), st.sampled_from(NESTINGS))
def test_nesting_never_weakens_a_query(sql, inner, outer):
    alone = analyze(sql)
    nested = sql
    for nesting in inner:
        nested = nesting.format(nested)
    found = analyze(outer.format(nested))
    assert found.effect >= alone.effect
    assert found.effect_if_functions_pure >= alone.effect_if_functions_pure
    assert found.effect_if_functions_pure is Effect.WRITE or found.functions >= alone.functions


CHANGES = ["DELETE FROM t", "INSERT INTO t VALUES (1) RETURNING *", "UPDATE t SET a = 1", "merge INTO t USING u ON a = b"]


@SETTINGS
@given(st.sampled_from(CHANGES), st.sampled_from(NESTINGS))
def test_nesting_never_weakens_a_change(sql, nesting):
    assert classify(nesting.format(sql)) is Effect.WRITE


@SETTINGS
@given(st.sampled_from(CORPUS), st.sampled_from(["EXPLAIN ANALYZE {}", "EXPLAIN (ANALYZE) {}", "COPY ({}) TO STDOUT"]))
def test_explain_analyze_and_copy_never_weaken_any_statement(sql, nesting):
    assert classify(nesting.format(sql)) >= classify(sql)


@SETTINGS
@given(st.lists(STATEMENTS, min_size=1, max_size=4))
def test_several_statements_give_the_strongest(statements):
    found = analyze("; ".join(statements))
    each = [analyze(sql) for sql in statements]
    assert found.effect is max(one.effect for one in each)
    assert found.effect_if_functions_pure is max(one.effect_if_functions_pure for one in each)


@SETTINGS
@given(ANY_QUERY)
def test_vouching_for_all_unknown_functions_gives_what_is_known(sql):
    found = analyze(sql)
    assert found.effect_given(found.functions) is found.effect_if_functions_pure
    assert bool(found.functions) is (found.effect_if_functions_pure is not found.effect)
    assert found.effect_given(()) is found.effect


JUNK = st.one_of(
    st.text(),
    st.text(alphabet="'\"$/*-;()eEuU&\\ab. \n\x00%:,", max_size=60),
    st.binary(max_size=60).map(lambda data: data.decode("latin-1")),
    st.binary(max_size=60).map(lambda data: data.decode("utf-8", "surrogateescape")),
)


@settings(SETTINGS, max_examples=400)
@given(JUNK, st.sampled_from(["postgresql", "mysql"]))
def test_nothing_ever_raises(text, dialect):
    assert analyze(text, dialect).effect >= analyze(text, dialect).effect_if_functions_pure


@settings(SETTINGS, max_examples=400)
@given(st.lists(st.tuples(st.sampled_from(EVERYTHING), st.integers(0, 80), st.integers(0, 80)), max_size=4), JUNK)
def test_nothing_raises_on_pieces_of_statements_put_together(pieces, junk):
    text = junk.join(sql[start : start + length] for sql, start, length in pieces)
    for dialect in ("postgresql", "mysql"):
        assert isinstance(analyze(text, dialect), Analysis)


@SETTINGS
@given(ANY_QUERY, st.sampled_from(["'", '"', "$$", "$a$", "/*", "e'", 'u&"', "\\", "\x00", "\x7f", "(", ")"]))
def test_garbage_is_a_write(sql, garbage):
    assert classify(f"{sql} {garbage}") is Effect.WRITE


@SETTINGS
@given(st.text(alphabet="bcdghjkmnpqxyz", min_size=1, max_size=8), st.text(alphabet="abc =*1", max_size=20))
def test_a_statement_that_nobody_knows_is_a_write(head, rest):
    assert classify(f"x{head} {rest}") is Effect.WRITE
