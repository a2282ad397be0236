"""The classifier against the statements that were tried on real servers, and against tricky ones of our own."""

import json
from pathlib import Path

import pytest

from aurora_router.core.sql.analysis import Analysis, Effect, analyze, classify, dialect_for_setting

READ, SERVER, TRANSACTION, SESSION, CONNECTION, WRITE = Effect
ROWS = json.loads((Path(__file__).parents[1] / "data" / "statements.json").read_text())
POSTGRESQL = [row for row in ROWS if row["dialect"] == "postgresql"]


def names(rows):
    return [row["id"] for row in rows]


@pytest.mark.parametrize("row", POSTGRESQL, ids=names(POSTGRESQL))
def test_tried_postgresql_statements_get_the_seen_effect(row):
    """Statements that were tried on PostgreSQL get the effect that was seen there."""
    found = analyze(row["sql"])
    expected = Effect[row["effect"]]
    if row["undecidable"]:
        assert found.effect is expected is WRITE
        assert found.functions
        assert classify(row["sql"], read_only_functions=found.functions) is READ
    elif row["needs_catalog"] and found.functions:
        assert found.effect is WRITE
        assert classify(row["sql"], read_only_functions=found.functions) is expected
    else:
        assert found.effect is expected


def test_functions_of_extensions_are_unknown_from_the_text_alone():
    sql = "SELECT crypt('a', gen_salt('bf',4))"
    assert analyze(sql) == Analysis(WRITE, READ, frozenset({"crypt", "gen_salt"}))
    assert classify(sql, read_only_functions=["crypt"]) is WRITE
    assert classify(sql, read_only_functions=["crypt", "gen_salt"]) is READ
    assert classify("SELECT * FROM ut") is READ


TRICKY = [
    # locks
    ("SELECT 1 FOR UPDATE", WRITE, "a lock without a table is still one"),
    ("SELECT * FROM t FOR NO KEY UPDATE", WRITE, "lock"),
    ("SELECT * FROM t FOR SHARE NOWAIT", WRITE, "lock"),
    ("TABLE t FOR SHARE", WRITE, "TABLE takes locks too"),
    ("SELECT (SELECT 1 FROM t FOR KEY SHARE)", WRITE, "nested lock"),
    ("WITH a AS (SELECT * FROM t FOR UPDATE) SELECT * FROM a", WRITE, "lock in a CTE"),
    ("SELECT 1 FROM t LIMIT 1for update", WRITE, "old servers split numbers from words"),
    ("SELECT 1.for update", WRITE, "same with a decimal point"),
    ("select substring('a' for 1)", READ, "FOR of SUBSTRING"),
    ("SELECT substring(a FROM 2 FOR 3) FROM t", READ, "FOR of SUBSTRING"),
    ("SELECT overlay('abc' placing 'x' from 2 for 1)", READ, "FOR of OVERLAY"),
    ("SELECT 'for update', $$for update$$, \"for update\" FROM t", READ, "literals and names"),
    ("SELECT t.update, t.into, t.for FROM t", READ, "columns behind a dot have any name"),
    # names of functions
    ("SELECT nextval('s')", WRITE, "plain"),
    ("SELECT NEXTVAL ('s')", WRITE, "case and space"),
    ("SELECT nextval /* c */ ('s')", WRITE, "comment before the parenthesis"),
    ("SELECT nextval -- c\n('s')", WRITE, "line comment before the parenthesis"),
    ("SELECT \"nextval\"('s')", WRITE, "quoted"),
    ("SELECT pg_catalog . \"nextval\" ('s')", WRITE, "quoted, qualified, spaced"),
    ("SELECT \"pg_catalog\".lower('A')", READ, "quoted system schema"),
    ("SELECT U&\"n\\0065xtval\"('s')", WRITE, "escaped letters"),
    ("SELECT U&\"n!0065xtval\" UESCAPE '!' ('s')", WRITE, "letters escaped in another way"),
    ("SELECT pg_catalog.U&\"nextval\" UESCAPE '!' ('s')", WRITE, "an escape that is not used"),
    ("SELECT U&'d!0061t' UESCAPE '!', U&\"a\" UESCAPE '!' FROM t WHERE b IN (1)", READ, "escapes in literals and columns"),
    ('SELECT u&"s".f(1)', WRITE, "escaped schema"),
    ("SELECT app.lower('A')", WRITE, "somebody's lower"),
    ("SELECT db.pg_catalog.lower('A')", WRITE, "three parts are not looked up"),
    ('SELECT "Lower"(1)', WRITE, "another function than lower"),
    ('SELECT "select"(1)', WRITE, "a quoted keyword is a function"),
    ("SELECT app.coalesce(1)", WRITE, "a keyword behind a dot is a function"),
    ("SELECT a[1:nextval('s')] FROM t", WRITE, "a colon before a call is no parameter"),
    ("SELECT 10 %setval('s', 1)", WRITE, "a percent sign before a call is no parameter"),
    ("SELECT ran\u212a() FROM t", WRITE, "the Kelvin sign is not a K to the server"),
    ("SELECT\u00a0lower('a')", WRITE, "a no-break space is part of a word"),
    ("SELECT lo_import('/x')", WRITE, "large objects"),
    ("SELECT lo_open(1, 131072)", WRITE, "large objects"),
    ("SELECT dblink_exec('dbname=x', 'DELETE FROM t')", WRITE, "an extension's function"),
    ("SELECT ts_stat('SELECT nextval(1)')", WRITE, "SQL in a string"),
    ("SELECT pg_try_advisory_lock(1)", WRITE, "accepted by a reader, protects nothing"),
    ("SELECT pg_advisory_unlock_all()", WRITE, "the other half"),
    ("SELECT * FROM f(1)", WRITE, "function in FROM"),
    ("SELECT 1 FROM t JOIN LATERAL f(t.a) ON true", WRITE, "function in FROM"),
    ("SELECT DISTINCT ON (a) f(b) FROM t", WRITE, "a call behind a parenthesis"),
    ("SELECT 1 IS DISTINCT FROM case f(a) when 1 then 2 end", WRITE, "a call behind FROM and a keyword"),
    ("WITH a AS (SELECT 1) (SELECT 1) ORDER BY 1, nextval('s')", WRITE, "the list of CTEs has ended"),
    ("WITH a AS (SELECT 1) SELECT lower('a'), nextval('s')", WRITE, "the list of CTEs has ended"),
    ("VALUES (nextval('s'))", WRITE, "VALUES"),
    ("SELECT count(*) FILTER (WHERE f(a)) FROM t", WRITE, "call in FILTER"),
    ("SELECT txid_current_if_assigned()", TRANSACTION, "about this transaction"),
    ("SELECT setseed(0.5)", SESSION, "state of the session"),
    ("SELECT set_config('a', 'b', $1)", SESSION, "cannot see that it is local"),
    ("SELECT SET_CONFIG('a', lower('B'), TRUE)", TRANSACTION, "local"),
    ("SELECT pg_backend_pid()", CONNECTION, "about this connection"),
    ("SELECT pg_stat_get_numscans(1)", SERVER, "counters of one server"),
    ("SELECT pg_xact_status(5::xid8)", SERVER, "a reader's answer may be late"),
    ("SELECT txid_current_snapshot()", SERVER, "a snapshot has one server's transactions"),
    (
        "SELECT a FROM t WHERE pg_visible_in_snapshot(x, pg_current_snapshot())",
        SERVER,
        "a snapshot has one server's transactions",
    ),
    ("SELECT count(*) FROM pg_buffercache", SERVER, "the buffers of one server"),
    ("SELECT * FROM pg_stat_activity", SERVER, "a view over one server"),
    ("SELECT * FROM pg_catalog.pg_locks", SERVER, "a view over one server"),
    ('SELECT * FROM "pg_catalog"."pg_locks"', SERVER, "quoted"),
    ('SELECT * FROM "pg_temp".x', CONNECTION, "quoted"),
    ("SELECT * FROM pg_temp.x", CONNECTION, "temporary tables have one connection"),
    ("SELECT * FROM pg_cursors", CONNECTION, "a view over one connection"),
    # hidden writes
    ("WITH x AS (DELETE FROM t RETURNING 1) SELECT 1", WRITE, "DML in a CTE"),
    ("WITH x AS NOT MATERIALIZED (INSERT INTO t VALUES (1) RETURNING 1) TABLE x", WRITE, "DML in a CTE"),
    (
        "SELECT * FROM (WITH x AS (MERGE INTO t USING s ON a = b WHEN MATCHED THEN DELETE) SELECT 1) s",
        WRITE,
        "",
    ),
    ("SELECT * INTO newt FROM t", WRITE, "SELECT INTO"),
    ("SELECT * INTO LOCAL TEMPORARY newt FROM t", CONNECTION, "SELECT INTO TEMP"),
    ("SELECT 1; DELETE FROM t", WRITE, "the strongest"),
    ("SELECT 1; SET a = 1; SHOW a", SESSION, "the strongest"),
    ("SELECT 1; -- c", READ, "nothing behind"),
    (";;; ;", READ, "nothing at all"),
    ("", READ, "nothing at all"),
    (" \n\t", READ, "nothing at all"),
    ("-- c\r DELETE FROM t", WRITE, "a carriage return ends the comment"),
    ("/* /* */ DELETE FROM t */ SELECT 1", READ, "nested comments"),
    ("/* /* */ */ DELETE FROM t", WRITE, "nested comments"),
    ("SELECT 1 /* /* */ + /* */ */ , nextval('s') /* /**/ */", WRITE, "nested comments"),
    ("SELECT 1 /* /* */", WRITE, "unterminated"),
    ("SELECT 1+--c\n1", READ, "an operator stops at a comment"),
    ("SELECT 2*/*c*/3", READ, "an operator stops at a comment"),
    # literals
    ("SELECT $$; DELETE FROM t$$", READ, "dollar quote"),
    ("SELECT $a$ $b$ ; DELETE $a$", READ, "tags are compared"),
    ("SELECT $a$ $$; DELETE FROM t", WRITE, "unterminated"),
    ("SELECT a$b$ FROM t; DELETE FROM t WHERE a$b$ = 1", WRITE, "a dollar inside a name"),
    ("SELECT '\\'; DELETE FROM t; --'", WRITE, "backslash, either way"),
    ("SELECT '\\' || '; DELETE FROM t; --'", WRITE, "lexes differently with the old setting"),
    ("SELECT 'a\\''b'", WRITE, "lexes differently with the old setting"),
    ("SELECT a LIKE 'x!%' ESCAPE '\\'", READ, "no quote follows: no doubt"),
    ("SELECT E'\\'; DELETE FROM t; --'", READ, "backslash in E''"),
    ("SELECT e'\\\\'; DELETE FROM t; --'", WRITE, "an escaped backslash ends nothing"),
    ("SELECT E'it\\'s', 'c:\\dir'", READ, "no doubt here"),
    ("SELECT E'a\\'", WRITE, "unterminated"),
    ("SELECT 'it''s; DELETE'", READ, "doubled quote"),
    ("SELECT N'a', B'01', X'1F', U&'\\0041'", READ, "other literals"),
    ("SELECT E'a' (1)", READ, "a parenthesis behind a literal calls nothing"),
    ("SELECT 'a", WRITE, "unterminated"),
    ('SELECT "a', WRITE, "unterminated"),
    ('SELECT U&"a', WRITE, "unterminated"),
    ("SELECT 1\x00", WRITE, "NUL"),
    ("SELECT \\", WRITE, "no such sign"),
    ("SELECT (1", WRITE, "unbalanced"),
    ("SELECT 1)", WRITE, "unbalanced"),
    ("((", WRITE, "unbalanced"),
    ("(COMMIT)", WRITE, "no such statement"),
    # EXPLAIN
    ("EXPLAIN ANALYZE VERBOSE DELETE FROM t", WRITE, "executes"),
    ("EXPLAIN VERBOSE DELETE FROM t", READ, "plans"),
    ("EXPLAIN (ANALYZE 0) DELETE FROM t", READ, "plans"),
    ("EXPLAIN (ANALYZE off, VERBOSE) DELETE FROM t", READ, "plans"),
    ("EXPLAIN (VERBOSE, ANALYZE) DELETE FROM t", WRITE, "executes"),
    ("EXPLAIN (FORMAT json, ANALYZE 'on') DELETE FROM t", WRITE, "executes"),
    ("EXPLAIN (ANALYZE off, ANALYSE 1) DELETE FROM t", WRITE, "executes"),
    ('EXPLAIN ("analyze") DELETE FROM t', WRITE, "an option's name may be quoted"),
    ("EXPLAIN (ANALYZE false) SELECT 1 FOR UPDATE", READ, "plans"),
    ("EXPLAIN (SELECT 1)", READ, "a query in parentheses, not options"),
    ("EXPLAIN (COSTS off) (SELECT 1)", READ, "both"),
    ("EXPLAIN SELECT nextval('s')", READ, "plans"),
    ("EXPLAIN SELECT nextval('s'), f(1)", WRITE, "planning may run a function declared immutable"),
    ("EXPLAIN INSERT INTO app.t (a, b) VALUES (1, 2)", READ, "plans"),
    ("EXPLAIN ANALYZE EXECUTE p", WRITE, "may write"),
    ("EXPLAIN EXECUTE p", WRITE, "not looked into"),
    ("EXPLAIN (ANALYZE", WRITE, "garbage"),
    # COPY
    ("COPY t (a, b) TO STDOUT WITH (FORMAT csv)", READ, "reads"),
    ("COPY (SELECT nextval('s')) TO STDOUT", WRITE, "the query counts"),
    ("COPY (DELETE FROM t RETURNING *) TO STDOUT", WRITE, "the statement counts"),
    ("COPY t TO PROGRAM 'x'", WRITE, "runs a program"),
    ("COPY (SELECT 1) TO '/tmp/x'", WRITE, "writes a file"),
    ("COPY t FROM STDIN", WRITE, "writes"),
    ("COPY t", WRITE, "garbage"),
    # cursors, prepared statements
    ("DECLARE c NO SCROLL CURSOR WITH HOLD FOR SELECT 1", CONNECTION, "cursor"),
    ("DECLARE c CURSOR FOR SELECT * FROM t FOR UPDATE", WRITE, "locks"),
    ("DECLARE c CURSOR", WRITE, "garbage"),
    ("MOVE 1 IN c", CONNECTION, "cursor"),
    ("PREPARE p (int) AS SELECT $1", CONNECTION, "belongs to the connection"),
    ("PREPARE p AS DELETE FROM t", WRITE, "will write"),
    ("EXECUTE p(1)", WRITE, "who knows"),
    ("DEALLOCATE ALL", CONNECTION, "belongs to the connection"),
    # state
    ("SET LOCAL a = 1", TRANSACTION, ""),
    ("SET TRANSACTION READ ONLY", TRANSACTION, ""),
    ("SET CONSTRAINTS ALL DEFERRED", TRANSACTION, ""),
    ("SET SESSION a TO 1", SESSION, ""),
    ("RESET ALL", SESSION, ""),
    ("COMMIT PREPARED 'x'", WRITE, "writes"),
    ("ROLLBACK PREPARED 'x'", WRITE, "writes"),
    ("ROLLBACK TO a", TRANSACTION, ""),
    ("LOCK TABLE t IN ROW SHARE MODE", WRITE, "a reader accepts it and protects nothing"),
    ("LOCK t IN ACCESS SHARE MODE NOWAIT", TRANSACTION, ""),
    ("CHECKPOINT", SERVER, "silently accepted by a reader"),
    ("ALTER TABLE t RENAME TO u", WRITE, ""),
    ("CREATE TEMP TABLE x AS SELECT nextval('s')", WRITE, "the query counts"),
    ("CREATE TEMP TABLE x AS SELECT 1", CONNECTION, ""),
    ("CREATE TEMP TABLE x (a int GENERATED ALWAYS AS IDENTITY)", CONNECTION, ""),
    ("CREATE OR REPLACE TEMPORARY VIEW x AS TABLE t", CONNECTION, ""),
    ("CREATE TEMP TABLE x AS EXECUTE p", WRITE, ""),
    ("CREATE INDEX CONCURRENTLY i ON t (a)", WRITE, ""),
    ("REFRESH MATERIALIZED VIEW v", WRITE, ""),
    ("SECURITY LABEL ON TABLE t IS 'x'", WRITE, ""),
    ("hello world", WRITE, "garbage"),
    ("'SELECT 1'", WRITE, "garbage"),
]


@pytest.mark.parametrize(("sql", "effect", "why"), TRICKY)
def test_tricky_statements_get_the_safe_effect(sql, effect, why):
    assert classify(sql) is effect, why


READS = """
SELECT anon_1.a, count(*) AS n FROM (SELECT a FROM t) AS anon_1 GROUP BY anon_1.a HAVING (count(*) > %(n_1)s)
SELECT x.a, x.b FROM unnest(%(a)s::int[], ARRAY['x', 'y']) WITH ORDINALITY AS x(a, b)
SELECT x.a FROM unnest(ARRAY[1]) WITH ORDINALITY x(a, b)
SELECT * FROM (VALUES (1, 'a'), (2, 'b')) v(id, name)
SELECT * FROM t JOIN users u(id, name) ON (t.id = u.id)
SELECT CAST(x AS NUMERIC(10, 2)), x::varchar(3)[], x::character varying(3), x::vector(3) FROM t
SELECT CAST(x AS public.geometry(Point, 4326)) FROM t
SELECT row_number() OVER (PARTITION BY a ORDER BY b DESC) AS n, sum(b) OVER w FROM t WINDOW w AS (ORDER BY a)
SELECT count(DISTINCT a) FILTER (WHERE b > 0), percentile_cont(0.5) WITHIN GROUP (ORDER BY b) FROM t
SELECT a FROM t WHERE (a, b) IN ((1, 2), (3, 4)) AND EXISTS (SELECT 1 FROM u WHERE u.a = t.a) OR NOT (a = ANY (b))
SELECT data ->> 'a', data #> '{a,b}', data @> '{"a": 1}'::jsonb, data ? 'a', jsonb_path_query(data, '$.a') FROM t
SELECT to_tsvector('english', a) @@ plainto_tsquery('english', %(q)s), ts_rank(v, q) FROM t
SELECT a FROM generate_series(1, 3) AS g(a) ORDER BY a LIMIT %(param_1)s OFFSET %(param_2)s
SELECT date_trunc('day', now()), extract(epoch FROM a), a AT TIME ZONE 'utc', interval '1 day' FROM t
SELECT regexp_replace(a, 'x', 'y'), string_agg(a, ',' ORDER BY a), array_agg(a), jsonb_agg(a) FROM t
SELECT a <-> point(1, 2), int4range(1, 5) && r, lower(r) FROM t
SELECT a FROM t ORDER BY (a) FETCH FIRST (5) ROWS ONLY
SELECT * FROM t TABLESAMPLE bernoulli(10) REPEATABLE (1)
SELECT a, sum(b) FROM t GROUP BY GROUPING SETS ((a), ()), ROLLUP (a), CUBE (b)
SELECT a FROM t GROUP BY (a) ORDER BY (a)
WITH a(x, y) AS MATERIALIZED (SELECT 1, 2), b(z) AS NOT MATERIALIZED (SELECT 3) SELECT * FROM a, b
WITH RECURSIVE r(n) AS (VALUES (1) UNION ALL SELECT n + 1 FROM r) SEARCH DEPTH FIRST BY n SET o SELECT * FROM r
SELECT * FROM json_to_recordset('[]') AS x(a int, b varchar(3), c numeric(10, 2))
SELECT * FROM JSON_TABLE('{}', '$.a[*]' COLUMNS (id int PATH '$.id', b varchar(3) PATH '$.b')) AS j
SELECT a OPERATOR(pg_catalog.+) 1, timestamp(3) '2020-01-01', CASE WHEN (a) THEN (b) ELSE (c) END FROM t
SELECT DISTINCT ON (a, b) a, b FROM t
SELECT t.a FROM t WHERE t.a ILIKE (%(a)s) AND t.b BETWEEN (1) AND (2) AND t.c IS NOT (NULL)
SELECT pg_catalog.format_type(a.atttypid, a.atttypmod), pg_catalog.pg_get_expr(d.adbin, d.adrelid) FROM a, d
SELECT pg_get_constraintdef(c.oid, true), pg_table_is_visible(c.oid), col_description(1, 2), to_regclass('t') FROM c
SELECT has_table_privilege('t', 'select'), obj_description(1, 'pg_class'), pg_get_indexdef(1), pg_get_viewdef(1)
SELECT enum_range(NULL::e), enum_first(NULL::e), inet_merge(a, b), starts_with(a, 'b'), hashtext(a) FROM t
SELECT * FROM t WHERE a = $1 AND b = :b AND c = %s AND d = ?
SELECT xmlelement(name a, xmlattributes(b AS c)), xpath('/a', x), table_to_xml('t', true, false, '') FROM t
(SELECT 1) UNION ALL (SELECT 2) ORDER BY 1
SELECT 'größe' AS größe, "Größe" FROM straße
""".strip().splitlines()


@pytest.mark.parametrize("sql", READS)
def test_what_orms_and_people_write_to_read_is_a_read(sql):
    assert analyze(sql) == Analysis(READ, READ)


@pytest.mark.parametrize(
    ("sql", "functions"),
    [
        (
            'SELECT F(1), app . G(2), "Mixed"(3), "a.b"(4), "S"."c"(5)',
            ["f", "app.g", "Mixed", '"a.b"', "S.c"],
        ),
        ("SELECT query_to_xml('', true, false, '')", ["query_to_xml"]),
        ("SELECT f(1), nextval('s')", []),
        ("SELECT app.nextval('s')", ["app.nextval"]),
    ],
)
def test_unknown_functions_are_named_as_the_text_calls_them(sql, functions):
    assert analyze(sql).functions == frozenset(functions)


def test_a_name_vouches_for_the_same_spelling_only():
    assert classify("SELECT app.f(1)", read_only_functions=["f"]) is WRITE
    assert classify("SELECT f(1)", read_only_functions=["app.f"]) is WRITE
    assert classify("SELECT app.f(1), pg_backend_pid()", read_only_functions=["app.f"]) is CONNECTION
    assert classify("SELECT nextval('s')", read_only_functions=["nextval"]) is WRITE


@pytest.mark.parametrize(
    ("sql", "hint"),
    [
        ("/*@writer*/ SELECT 1", "writer"),
        ("SELECT 1 /* @reader\n*/", "reader"),
        ("SELECT 1 /*@reader*/ /*@writer*/", "writer"),
        ("SELECT /* /* */ */ 1 /*@reader*/", "reader"),
        ("SELECT '/*@writer*/'", None),
        ("SELECT 1 -- /*@writer*/", None),
        ("SELECT 1 /*@writers*/", None),
        ("SELECT ' /*@writer*/", None),
    ],
)
def test_hints_are_read_from_comments_and_change_no_effect(sql, hint):
    found = analyze(sql)
    assert found.hint == hint
    assert found.effect is (WRITE if sql.endswith("' /*@writer*/") else READ)


@pytest.mark.parametrize(
    ("sql", "effect"),
    [
        ("SELECT `a``b`, \"x\\\"y\", 'it\\'s' FROM t # c", READ),
        ("SELECT 1 -- c", READ),
        ("SELECT 1 --1", READ),
        ("SELECT `f`(1)", WRITE),
        ("SELECT `a.b`(1)", WRITE),
        ("SELECT /*! f(1) */ 1", WRITE),
        ("SELECT /*!40001 SQL_NO_CACHE */ 1", READ),
        ("/*M! DELETE FROM t */", WRITE),
        ("SELECT /*!99999 ' */ 1 -- '", WRITE),
        ("SELECT /* /* */ 1", READ),
        ("/*" * 300_000, WRITE),
        ("SELECT a FROM t LOCK IN SHARE MODE", WRITE),
        ("SELECT @@version", SERVER),
        ("SELECT @@sql_mode", CONNECTION),
        ("DELETE FROM t", WRITE),
    ],
)
def test_the_lexer_reads_mysql_too(sql, effect):
    assert classify(sql, "mysql") is effect
    assert classify(sql, "mariadb") is effect


@pytest.mark.parametrize(
    ("sql", "effect"),
    [
        ("SELECT current_setting('app.tenant')", READ),
        ("SELECT CURRENT_SETTING ( 'App.Tenant' , TRUE )", READ),
        ("SELECT pg_catalog.current_setting('request.jwt.claim.sub', %(missing_ok)s)", READ),
        ("SELECT \"current_setting\"(E'app.tenant')", READ),
        ("SELECT current_setting('app.tenant'::text, true::boolean)", READ),
        ("SELECT current_setting(CAST('app.tenant' AS text), CAST(1 AS boolean))", READ),
        ("SELECT nullif(current_setting('app.tenant', true), '')::int FROM t", READ),
        ("SELECT * FROM t WHERE tenant = current_setting('app.tenant')::uuid AND lower(a) = 'b'", READ),
        ("SELECT * FROM current_setting('app.tenant') AS s(v)", READ),
        ("SHOW app.tenant", READ),
        ("SHOW App . Tenant ;", READ),
        ("SELECT current_setting('work_mem')", SERVER),
        ("SELECT current_setting('cluster_name', true)", SERVER),
        ("SELECT current_setting('pg_stat_statements.max')", SERVER),
        ("SELECT current_setting('TimescaleDB.license')", SERVER),
        ("SELECT current_setting(%(name)s)", SERVER),
        ("SELECT current_setting($1::text, true)", SERVER),
        ("SELECT current_setting(name) FROM t", SERVER),
        ("SELECT current_setting('work' || '_mem')", SERVER),
        ("SELECT current_setting('app.' || name) FROM t", SERVER),
        ("SELECT current_setting('app.tenant'::text || name) FROM t", SERVER),
        ("SELECT current_setting(CAST('app.tenant' AS text) || name) FROM t", SERVER),
        ("SELECT current_setting(CAST('app.tenant' AS varchar(20)))", SERVER),
        ("SELECT current_setting(lower('app.tenant'))", SERVER),
        ("SELECT current_setting(E'app.\\x61')", SERVER),
        ("SELECT current_setting('')", SERVER),
        ("SELECT current_setting()", SERVER),
        ("SELECT current_setting('app.a', current_setting('b')::boolean)", SERVER),
        ("SELECT current_setting('app.a', " + "not " * 20 + "true)", SERVER),
        ("SELECT current_setting('app.a', f(1))", WRITE),
        ("SELECT current_setting('app.a', nextval('s') > 1)", WRITE),
        ("SELECT app.current_setting('app.a')", WRITE),
        ("SELECT set_config('app.a', 'b', true), current_setting('app.a')", TRANSACTION),
        ("SELECT set_config('app.a', 'b', false), current_setting('app.a')", SESSION),
        ("SHOW work_mem", SERVER),
        ("SHOW pg_stat_statements.max", SERVER),
        ("SHOW TIME ZONE", SERVER),
        ("SHOW ALL", SERVER),
        ("SHOW", SERVER),
    ],
)
def test_reading_an_applications_own_setting_is_a_read(sql, effect):
    """A literal name of a setting with a dot in it is the application's own, so reading it is a read."""
    assert classify(sql) is effect


@pytest.mark.parametrize(
    ("sql", "known"),
    [
        (r"SELECT a LIKE 'x\_%' ESCAPE '\' AND b = 'c' FROM t", READ),
        (r"SELECT 'a\', 'b'", READ),
        (r"SELECT '\', nextval('s')", WRITE),
        (r"SELECT 'it\'s'", WRITE),
        (r"DELETE FROM t WHERE a = '\' OR b = 'c'", WRITE),
    ],
)
def test_a_known_setting_takes_the_doubt_from_a_backslash(sql, known):
    """A backslash before a quote is in doubt, unless the connection's standard_conforming_strings is known to be on."""
    assert (analyze(sql).effect, analyze(sql).in_doubt) == (WRITE, True)
    assert analyze(sql, dialect_for_setting("postgresql", "off")).in_doubt
    on = analyze(sql, dialect_for_setting("postgresql", "on"))
    assert (on.effect, on.in_doubt) == (known, False)


UNGUARDING = """
SET TRANSACTION READ WRITE | set local transaction isolation level serializable, read  write | SET transaction_read_only = off
SET SESSION CHARACTERISTICS AS TRANSACTION READ WRITE | SET LOCAL transaction_read_only TO DEFAULT
SET SESSION SESSION CHARACTERISTICS AS TRANSACTION READ WRITE | SET LOCAL SESSION CHARACTERISTICS AS TRANSACTION READ WRITE
SET "Transaction_Read_Only" = off
SET default_transaction_read_only = 'off' | SET U&"default_transaction_read!005fonly" UESCAPE '!' = off
RESET transaction_read_only
RESET default_transaction_read_only | SELECT set_config('transaction_read_only', 'off', true) | DISCARD ALL
SELECT pg_catalog."set_config"('default_' || 'transaction_read_only', 'off', false) | BEGIN READ WRITE | COMMIT | END | ABORT
START TRANSACTION ISOLATION LEVEL SERIALIZABLE, READ WRITE | COMMIT; BEGIN | ROLLBACK AND CHAIN | PREPARE TRANSACTION 'x'
COMMIT; SELECT 1 | SET TRANSACTION READ ONLY; COMMIT
""".replace("\n", " | ").strip(" |")
GUARDING = """
SET TRANSACTION READ ONLY | SET TRANSACTION ISOLATION LEVEL REPEATABLE READ | SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY
SET transaction_read_only = on | SET default_transaction_read_only TO 'on' | BEGIN | BEGIN READ ONLY | START TRANSACTION READ ONLY
SELECT set_config('transaction_read_only', 'on', true) | SELECT set_config('app.tenant', 'x', true) | SET LOCAL app.tenant = 'x'
RESET app.tenant | DISCARD PLANS | SAVEPOINT a | ROLLBACK TO a | RELEASE a | SELECT 'COMMIT' | SELECT 1
""".replace("\n", " | ").strip(" |")


def test_what_takes_a_read_only_guard_away_is_seen():
    """A text that loosens the access mode or ends the transaction says so, and a text that only tightens the mode does not."""
    for sql in UNGUARDING.split(" | "):
        found = analyze(sql)
        assert found.may_unset_read_only, sql
        assert found.effect is not READ, sql
    for sql in GUARDING.split(" | "):
        assert not analyze(sql).may_unset_read_only, sql


def test_an_unknown_dialect_is_the_only_thing_that_raises():
    with pytest.raises(ValueError, match=r"unknown SQL dialect: known are mariadb, mysql, postgresql$"):
        analyze("SELECT 1", "oracle")


@pytest.mark.parametrize(
    ("text", "effect"),
    [
        ("SELECT " + "(" * 100_000 + "1" + ")" * 100_000, READ),
        ("(" * 100_000 + "SELECT 1" + ")" * 100_000, READ),
        ("SELECT " + "lower(" * 100_000 + "1" + ")" * 100_000, READ),
        ("SELECT " + "f(" * 100_000 + "1" + ")" * 100_000, WRITE),
        ("SELECT " + "a." * 200_000 + "f(1)", WRITE),
        ("SELECT '" + "''" * 500_000 + "'", READ),
        ("SELECT '" + "''" * 500_000, WRITE),
        ("SELECT E'" + "\\'" * 500_000 + "'", READ),
        ("SELECT E'" + "\\'" * 500_000, WRITE),
        ("SELECT '" + "\\''" * 300_000, WRITE),
        ("SELECT " + "'\\'" * 300_000, WRITE),
        ("SELECT 1" + " " * 1_000_000, READ),
        ("SELECT 1" + " " * 1_000_000 + "\x01", WRITE),
        (";" * 1_000_000, READ),
        ("SELECT 1;" * 100_000, READ),
        ("/*" * 500_000, WRITE),
        ("/*" * 250_000 + "*/" * 250_000 + "SELECT 1", READ),
        ("/*/**/*/" * 120_000 + "SELECT 1", READ),
        ("/* * / " * 150_000, WRITE),
        ("SELECT $a$" + "$b$" * 300_000, WRITE),
        ("SELECT $a$" + "$b$" * 300_000 + "$a$", READ),
        ("SELECT " + "$$ $$," * 150_000 + "1", READ),
        ("SELECT " + "a" * 1_000_000, READ),
        ("SELECT " + "1" * 1_000_000, READ),
        ("SELECT " + "1," * 500_000 + "1", READ),
        ("SELECT " + "-" * 1_000_000, READ),
        ("EXPLAIN " * 100_000, WRITE),
        ("COPY (" * 100_000, WRITE),
        ("PREPARE a AS " * 70_000, WRITE),
        ("%(" * 500_000, WRITE),
        (" ".join(f"$a{n}$" for n in range(150_000)), WRITE),
        ("/* /**/" + " ".join(f"$a{n}$" for n in range(100_000)), WRITE),
        ("SELECT " + "\ud800" * 1000, READ),
    ],
    ids=range(33),
)
def test_huge_and_deep_texts_are_read_in_linear_time(text, effect):
    assert classify(text) is effect


@pytest.mark.parametrize(
    "sql",
    [
        "INSERT INTO t (a, b) VALUES (1, lower('x')), (2, now())",
        "INSERT INTO t (id) VALUES (nextval('s')) ON CONFLICT (id) DO UPDATE SET (a, b) = (1, 2) RETURNING id",
        "UPDATE t SET a = a + 1 WHERE id IN (SELECT id FROM u FOR UPDATE SKIP LOCKED)",
        "WITH x (a) AS (DELETE FROM t RETURNING a) INSERT INTO u (a) SELECT a FROM x",
        "MERGE INTO t USING u ON (t.a = u.a) WHEN NOT MATCHED THEN INSERT (a) VALUES (u.a)",
        "SELECT * FROM t FOR UPDATE",
        "SELECT pg_advisory_xact_lock(7)",
        "SELECT 'pg_advisory_lock(7)', 1 FROM t FOR UPDATE -- lock(",
        "DELETE FROM unlock_log WHERE (a, b) = (1, 2)",
    ],
)
def test_a_change_of_rows_leaves_no_traces(sql: str) -> None:
    """A text that only reads, writes or locks rows leaves no traces, because a rollback takes them all off the connection."""
    found = analyze(sql)
    assert found.effect is Effect.WRITE
    assert found.traceless


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT pg_advisory_lock(7)",
        "SELECT pg_advisory_lock/**/(7)",
        'SELECT "pg_advisory_lock"(7)',
        "SELECT pg_catalog . pg_try_advisory_lock_shared /* a */ (7)",
        "SELECT U&\"pg!005ftry_advisory_lock\" UESCAPE '!' (8)",
        "INSERT INTO t SELECT 1 FROM pg_advisory_lock/**/(7)",
        "INSERT INTO t SELECT takes(7)",
        "UPDATE t SET a = takes(7)",
        "WITH x AS (DELETE FROM t RETURNING a) SELECT pg_advisory_lock(a) FROM x",
        "INSERT INTO t VALUES (set_config('a.b', 'c', false))",
        "INSERT INTO t VALUES (1); SELECT pg_advisory_lock(7)",
        "INSERT INTO t VALUES (1); SET work_mem = 1",
        "SET work_mem = 1",
        "PREPARE p AS SELECT 1",
        "CREATE TEMPORARY TABLE t (a int)",
        "DO $$ BEGIN PERFORM pg_advisory_lock(7); END $$",
        "INSERT INTO t VALUES ('",
    ],
)
def test_what_may_stay_on_a_connection_leaves_traces(sql: str) -> None:
    """A lock by name, a setting or the call of an unknown function may leave traces, however the call is written."""
    assert not analyze(sql).traceless
