"""The classifier's MySQL and MariaDB dialects: statements tried on real servers, tricky texts, and rules for any text."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aurora_router.core.statements import Effect, Recall, Verdict, classify, in_mode, verdict

READ, SERVER, TRANSACTION, SESSION, CONNECTION, WRITE = Effect
DIALECTS = ["mysql", "mariadb"]
ROWS = json.loads((Path(__file__).parents[1] / "data" / "statements.json").read_text())
TRIED = [row for row in ROWS if row["dialect"] == "mysql"]
# The row's text has a backslash and an "n" in place of a line break, so as it stands it is one comment.
MEANT = {"M141": "-- c\nINSERT INTO t(v) VALUES('dc')"}
both = pytest.mark.parametrize("dialect", DIALECTS)


@both
@pytest.mark.parametrize("row", TRIED, ids=[row["id"] for row in TRIED])
def test_statements_that_were_tried_get_the_effect_that_was_seen(row, dialect):
    found = verdict(MEANT.get(row["id"], row["sql"]), dialect)
    assert found.effect is Effect[row["effect"]]
    if row["undecidable"]:
        assert found.functions
        assert found.known is READ


TRICKY = [
    # version comments
    ("/*! INSERT INTO t VALUES ('x') */", WRITE, "the comment is the statement"),
    ("/*M! DELETE FROM t */", WRITE, "on MariaDB"),
    ("/*m! DELETE FROM t */", WRITE, "no server is known to execute it, and nobody needs it"),
    ("/*!50000 SELECT 1 */", READ, "either way"),
    ("SELECT /*!40001 SQL_NO_CACHE */ * FROM t", READ, "either way"),
    ("SELECT 1 /*!99999 , get_lock('a', 1) */", CONNECTION, "executed it locks"),
    ("SELECT get_lock /*!99999 + lower */ ('a', 1)", CONNECTION, "not executed it locks"),
    ("SELECT lower /*!99999 (a), f */ (1)", WRITE, "executed it calls another"),
    ("SELECT /*!40000 1, */ 2 /*!50000 , 3 */", WRITE, "two versions: too many ways"),
    ("SELECT /*!50000 1, */ 2 /*!50000 , 3 */", READ, "one version: both or none"),
    ("SELECT 1 /*!50000 , 2 /* c */ */", WRITE, "a comment in it"),
    ("SELECT 1 /*!50000 , /*! 2 */ */", WRITE, "another in it"),
    ("SELECT 1 /*!99999 ' */ , 2 -- '", WRITE, "its end is in a literal if it is executed"),
    ("SELECT 1 /*!50000 , 2 -- */", WRITE, "its end is in a comment if it is executed"),
    ("SELECT 1 /*!50000 , 2", WRITE, "unterminated"),
    ("SELECT 1 /*! ,2*/*get_lock('a', 1); SELECT 1 */", WRITE, "ends and a product begins"),
    ("SELECT /*!50000 1 */ */ 2", WRITE, "ends twice"),
    ("SELECT '/*!50000 x */' FROM t", READ, "a literal"),
    ("SELECT 1 /* /*!50000 x */ , 2", READ, "a comment that holds its begin"),
    # comments and hints
    ("SELECT 1 # ; DELETE FROM t", READ, "comment"),
    ("SELECT 1 --; DELETE FROM t", WRITE, "no comment without a space"),
    ("SELECT 1 --\tc", READ, "white space enough"),
    ("SELECT 1 --", READ, "the end is white space enough"),
    ("SELECT 1 #\x00", WRITE, "NUL"),
    ("SELECT /*+ MAX_EXECUTION_TIME(1) QB_NAME(`q`) */ a FROM t", READ, "optimizer's hint"),
    ("SELECT /*+ QB_NAME(`*/ 1, '`) */ , get_lock('a', 1) #'`", WRITE, "the hint's end is in quotes"),
    ("SELECT /* /* */ 1", READ, "comments do not nest"),
    ("SELECT 2*/*c*/3", READ, "a product and a comment"),
    ("SELECT 1 /* c", WRITE, "unterminated"),
    # names and numbers
    ("SELECT 1lower('A')", WRITE, "a name may begin with a digit"),
    ("SELECT app.1e5lower('A')", WRITE, "behind a dot it is a name"),
    ("SELECT t.1, t.2a, 1.5, .5, 1e5, 1.e5, 0x1F, 0b01, x'1F', _utf8'a', N'a' FROM t", READ, "columns and numbers"),
    ("SELECT 1e5for update", WRITE, "a number and a word"),
    ("SELECT 1.for update", WRITE, "a number and a word"),
    ("SELECT `nextval`(s)", WRITE, "quoting changes nothing"),
    ("SELECT `Get_Lock`('a', 1)", CONNECTION, "nor does case"),
    ("SELECT `lower`('A'), LOWER('A')", READ, "the built-in one"),
    ("SELECT app.lower('A')", WRITE, "somebody's"),
    ("SELECT `a``b`, `select`, `for update` FROM `t`", READ, "names"),
    ("SELECT lower\u00a0('a')", WRITE, "a no-break space is part of a word"),
    ("SELECT loc\u212a('a')", WRITE, "no K"),
    # locks, writes and lasting effects in queries
    ("SELECT * FROM t FOR SHARE", WRITE, "lock"),
    ("SELECT * FROM t FOR UPDATE SKIP LOCKED", WRITE, "lock"),
    ("SELECT * FROM t USE INDEX FOR JOIN (i) WHERE a IN (1)", READ, "no lock"),
    ("SELECT (SELECT a FROM t LOCK IN SHARE MODE)", WRITE, "lock"),
    ("SELECT * FROM t PROCEDURE ANALYSE()", WRITE, "who knows"),
    ("SELECT a INTO OUTFILE '/tmp/x' FROM t", WRITE, "a file of the server"),
    ("SELECT a INTO x FROM t", WRITE, "a variable of a stored program"),
    ("SELECT a INTO @x FROM t", CONNECTION, "a variable of the session"),
    ("SELECT @x := @x + 1 FROM t", CONNECTION, "a variable of the session"),
    ("SELECT @`x`, @'y' FROM t", CONNECTION, "a variable of the session"),
    ("SELECT @@gtid_executed, @@global.max_connections, @@`version`", SERVER, "variables of the server"),
    ("SELECT @@global.read_only, @@session.time_zone", CONNECTION, "one of them is the session's"),
    ("SELECT LAST_INSERT_ID(id) FROM t", SESSION, "sets it"),
    ("SELECT `last_insert_id`()", CONNECTION, "asks for it"),
    ("SELECT SQL_CALC_FOUND_ROWS a FROM t LIMIT 1", CONNECTION, "somebody will ask for it"),
    ("SELECT FOUND_ROWS()", CONNECTION, "asks for it"),
    ("SELECT RELEASE_LOCK('a')", WRITE, "a lock that a reader knows nothing of"),
    ("SELECT VERSION(), LOAD_FILE('/x')", SERVER, "of the server"),
    ("SELECT DATABASE(), USER(), UUID()", READ, "alike everywhere"),
    ("SELECT * FROM information_schema.tables", READ, "alike everywhere"),
    ("SELECT * FROM `information_schema`.`processlist`", SERVER, "of the server"),
    ("SELECT * FROM information_schema.innodb_trx", SERVER, "of the server"),
    ("SELECT * FROM performance_schema.session_variables", CONNECTION, "of the session"),
    ("SELECT * FROM PERFORMANCE_SCHEMA . threads", SERVER, "of the server"),
    ("SELECT sys, mysql FROM t", READ, "columns"),
    ("SELECT sys.format_time(1)", WRITE, "a stored function"),
    ("TABLE t INTO OUTFILE '/x'", WRITE, "a file of the server"),
    ("WITH a AS (SELECT 1) DELETE FROM t", WRITE, "a change behind WITH"),
    ("SELECT 1 = ANY (SELECT f(1))", WRITE, "ANY calls nothing, f does"),
    # names that look like grammar
    ("SELECT MATCH b AGAINST (f(1)) FROM t", WRITE, "AGAINST calls nothing, f does"),
    ("SELECT app.against(1)", WRITE, "a stored function"),
    ("SELECT MATCH b, app.against(1)", WRITE, "a stored function"),
    ("SELECT * FROM JSON_TABLE(f(1), '$' COLUMNS (a INT PATH '$')) j", WRITE, "COLUMNS calls nothing, f does"),
    ("SELECT 'a', app.columns(1)", WRITE, "a stored function"),
    ("SELECT app.text(1), app.rollup(1)", WRITE, "stored functions"),
    ("SELECT `text`(1)", WRITE, "a stored function"),
    ("SELECT a FROM t GROUP BY ROLLUP(f(a))", WRITE, "ROLLUP calls nothing, f does"),
    ("SELECT a FROM t GROUP BY `rollup`(a)", WRITE, "a stored function"),
    ("SELECT INSERT(b, 1, 1, f(1)) FROM t", WRITE, "INSERT() is a function, and f another"),
    ("SELECT app.insert(1)", WRITE, "a stored function"),
    ("SELECT `insert`(1), `count`(2), `left`(3)", WRITE, "stored functions"),
    ("WITH a AS (SELECT 1) UPDATE (t JOIN a) SET b = 1", WRITE, "a change behind WITH"),
    ("WITH a AS (SELECT 1) INSERT INTO t SELECT 1", WRITE, "a change behind WITH"),
    ("SELECT SQL_NO_CACHE (f(1))", WRITE, "a call"),
    ("SELECT `sql_no_cache`(1)", WRITE, "a stored function"),
    # other statements
    ("BEGIN WORK", TRANSACTION, ""),
    ("BEGIN NOT ATOMIC DELETE FROM t", WRITE, "a compound statement"),
    ("START SLAVE", WRITE, ""),
    ("ROLLBACK WORK TO SAVEPOINT a", TRANSACTION, ""),
    ("RELEASE SAVEPOINT a", TRANSACTION, ""),
    ("XA COMMIT 'x'", WRITE, ""),
    ("XA END 'x'", CONNECTION, ""),
    ("DESC UPDATE t SET a = 1", WRITE, "the server demands what the change demands"),
    ("DESCRIBE REPLACE t SET a = 1", WRITE, "the server demands what the change demands"),
    ("DESCRIBE app.t 'a%'", READ, "a table"),
    ("DESC `t` `a`", READ, "a table"),
    ("EXPLAIN", WRITE, "garbage"),
    ("EXPLAIN FORMAT", READ, "a table of that name"),
    ("EXPLAIN FORMAT =", WRITE, "garbage"),
    ("EXPLAIN ANALYZE FORMAT=TREE SELECT f(1)", WRITE, "executes"),
    ("EXPLAIN EXTENDED SELECT get_lock('a', 1)", CONNECTION, "old servers execute subqueries"),
    ("EXPLAIN (SELECT 1)", READ, "a query in parentheses"),
    ("EXPLAIN FOR CONNECTION 5", CONNECTION, "a connection of one server"),
    ("EXPLAIN FORMAT=JSON INTO @x SELECT 1", WRITE, "not looked into"),
    ("ANALYZE FORMAT=JSON SELECT f(1)", WRITE, "executes"),
    ("ANALYZE SELECT 1", READ, "executes"),
    ("ANALYZE LOCAL TABLE t", WRITE, ""),
    ("SHOW FULL TABLES LIKE 'a%'", READ, ""),
    ("SHOW CREATE PROCEDURE p", READ, ""),
    ("SHOW TABLES WHERE f(Tables_in_app)", WRITE, "a condition"),
    ("SHOW TABLES FROM app WHERE get_lock('a', 1)", CONNECTION, "a condition"),
    ("SHOW GLOBAL STATUS", SERVER, ""),
    ("SHOW VARIABLES LIKE 'a'", CONNECTION, ""),
    ("SHOW SOMETHING NEW", SERVER, "whatever it is, it shows"),
    ("SHOW", SERVER, "garbage"),
    ("SET", WRITE, "garbage"),
    ("SET @x = f(1)", WRITE, "a call"),
    ("SET @x = 1, @y = get_lock('a', 1)", CONNECTION, "a call"),
    ("SET @x = (SELECT a FROM t FOR UPDATE)", WRITE, "a query"),
    ("SET @x := @y", CONNECTION, "asks for another"),
    ("SET GLOBAL a = 1, @@global.b = 2, PERSIST c = 3", SERVER, "all of the server"),
    ("SET GLOBAL a = 1, b = 2", SESSION, "the second may not be"),
    ("SET SESSION TRANSACTION READ ONLY", SESSION, ""),
    ("SET GLOBAL TRANSACTION READ ONLY", SERVER, ""),
    ("SET CHARACTER SET utf8mb4", SESSION, ""),
    ("SET ROLE r", SESSION, ""),
    ("SET PASSWORD = 'x'", WRITE, ""),
    ("SET DEFAULT ROLE r", WRITE, ""),
    ("SET STATEMENT a = f(1) FOR SELECT 1", WRITE, "a call in the settings"),
    ("SET STATEMENT a = (SELECT b FOR UPDATE), c = 1 FOR SELECT 1", WRITE, "a query in the settings"),
    ("SET STATEMENT a = 1 FOR SET STATEMENT b = 1 FOR SELECT 1", WRITE, "not looked into"),
    ("SET STATEMENT a = 1", WRITE, "garbage"),
    ("SET STATEMENT a = 1 FOR SHOW PROCESSLIST", SERVER, "the inner one"),
    ("CREATE OR REPLACE TEMPORARY TABLE x (a INT, PRIMARY KEY (a))", CONNECTION, ""),
    ("CREATE TEMPORARY TABLE x (a INT) SELECT f(1)", WRITE, "the query counts"),
    ("CREATE TEMPORARY TABLE x AS (SELECT 1)", CONNECTION, ""),
    ("CREATE TEMPORARY TABLE x (SELECT a FROM t FOR UPDATE)", WRITE, "the query counts"),
    ("CREATE OR REPLACE VIEW x AS SELECT 1", WRITE, ""),
    ("DROP PREPARE p", CONNECTION, ""),
    ("DROP TABLE t", WRITE, ""),
    ("FLUSH TABLES t FOR EXPORT", CONNECTION, "held by this connection"),
    ("FLUSH TABLES", WRITE, "a reader accepts it and writes a transaction of its own"),
    ("LOCK TABLES t READ, u WRITE", WRITE, ""),
    ("LOCK INSTANCE FOR BACKUP", CONNECTION, ""),
    ("RESET MASTER", WRITE, ""),
    ("BACKUP LOCK t", WRITE, ""),
    ("CHECKSUM t", WRITE, "garbage"),
    ("HANDLER t READ i = (f(1))", WRITE, "a call"),
    ("PREPARE p FROM 'DELETE FROM t'", CONNECTION, "EXECUTE is what writes"),
    ("EXECUTE p USING @a", WRITE, "who knows"),
    ("CALL p()", WRITE, "who knows"),
    ("KILL QUERY 5", CONNECTION, "a connection of one server"),
    ("USE app", SESSION, ""),
    ("DO SLEEP(0)", READ, ""),
    ("DO f(1)", WRITE, "a call"),
    ("REPAIR TABLE t", WRITE, ""),
    ("IF 1 THEN DELETE FROM t", WRITE, "a compound statement"),
    ("SELECT \\N", WRITE, "no such sign"),
    ("(COMMIT)", WRITE, "no such statement"),
    ("SELECT (1", WRITE, "unbalanced"),
]


@both
@pytest.mark.parametrize(("sql", "effect", "why"), TRICKY)
def test_tricky_statements_get_the_safe_effect(sql, effect, why, dialect):
    assert classify(sql, dialect) is effect, why


@pytest.mark.parametrize(
    ("sql", "mysql", "mariadb"),
    [
        ("SELECT bin_to_uuid(a) FROM t", READ, WRITE),
        ("SELECT * FROM t, LATERAL (SELECT t.a) u", READ, WRITE),
        ("SELECT etag(a) FROM t", READ, WRITE),
        ("SELECT distance(a, b)", WRITE, WRITE),  # no MySQL that one can install has it: a stored function
        ("SELECT json_detailed(a) FROM t", WRITE, READ),
        ("SELECT lateral(1)", READ, WRITE),  # MySQL refuses it
        ("SELECT percentile_cont(0.5) WITHIN GROUP (ORDER BY a) OVER (PARTITION BY b) FROM t", WRITE, READ),
        ("SELECT AsText(g), GeomFromText('POINT(1 1)'), X(g), Within(g, g), SRID(g) FROM t", WRITE, READ),
        ("SELECT decode('a', 'b'), a FROM t WHERE ROWNUM() < 3", WRITE, READ),
        ("SELECT st_geomcollfromtxt('x')", READ, WRITE),
        ("SELECT s.nextval", READ, WRITE),
        ("SELECT s.currval", READ, CONNECTION),
    ],
)
def test_what_only_one_family_has_is_unknown_to_the_other(sql, mysql, mariadb):
    assert (classify(sql, "mysql"), classify(sql, "mariadb")) == (mysql, mariadb)


READS = """
SELECT anon_1.a, count(*) AS n FROM (SELECT a FROM t) AS anon_1 GROUP BY anon_1.a HAVING count(*) > %(n_1)s
SELECT CAST(a AS DECIMAL(10, 2)), CONVERT(a, CHAR(3)), CONVERT(a USING utf8mb4), CAST(a AS DATETIME(6)) FROM t
SELECT a FROM t WHERE (a, b) IN ((1, 2), (3, 4)) AND EXISTS (SELECT 1 FROM u WHERE u.a = t.a) OR NOT (a = ANY (SELECT 1))
SELECT row_number() OVER (PARTITION BY a ORDER BY b DESC) AS n, sum(b) OVER w FROM t WINDOW w AS (ORDER BY a)
SELECT date_add(a, INTERVAL 1 DAY), a + INTERVAL (1 + 1) HOUR, timestampdiff(DAY, a, b), extract(YEAR FROM a) FROM t
SELECT a FROM t WHERE MATCH (a, b) AGAINST ('x' IN BOOLEAN MODE) AND a LIKE ('x%%') AND b BETWEEN (1) AND (2)
SELECT group_concat(DISTINCT a ORDER BY b SEPARATOR ','), if(a, 1, 2), left(a, 1), replace(a, 'x', 'y') FROM t
SELECT a FROM t WHERE 1 MEMBER OF (data->'$.tags') AND b MEMBER OF('[1, 2]')
SELECT data->'$.a', data->>'$.b', json_extract(data, '$.c'), json_unquote(data) FROM t
SELECT * FROM t USE INDEX (i) IGNORE INDEX FOR ORDER BY (j) STRAIGHT_JOIN u FORCE KEY (k) ON (t.id = u.id)
SELECT * FROM t PARTITION (p0, p1) WHERE a <=> (b) ORDER BY (a) LIMIT 1, 2
WITH RECURSIVE r(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM r WHERE n < 5), s AS (SELECT 2) SELECT * FROM r, s
SELECT * FROM JSON_TABLE('[]', '$[*]' COLUMNS (id INT PATH '$.id', NESTED PATH '$.b' COLUMNS (c VARCHAR(3) PATH '$.c'))) AS j
SELECT CASE WHEN (a) THEN (b) ELSE (c) END, a DIV (b), a XOR (b), BINARY (a), a COLLATE utf8mb4_bin FROM t
SELECT SQL_NO_CACHE HIGH_PRIORITY a FROM t GROUP BY a WITH ROLLUP
SELECT a FROM t AS OF TIMESTAMP now(), u FOR SYSTEM_TIME ALL
SELECT TABLE_NAME FROM information_schema.TABLES WHERE TABLE_SCHEMA = 'app'
SELECT CAST('test plain returns' AS CHAR(60)) AS anon_1
(SELECT 1) EXCEPT (SELECT 2) INTERSECT (SELECT 3)
VALUES ROW(1, 2), ROW(3, 4)
SELECT st_astext(st_geomfromtext(%s)), conv(a, 16, 10), inet6_ntoa(a), sha2(a, 256) FROM t WHERE b = ? AND c = :c
SELECT 'größe' AS größe, `Größe` FROM straße
""".strip().splitlines()


READS += r"""
SELECT b FROM t WHERE MATCH b AGAINST ('x')
SELECT b FROM t WHERE MATCH t.b, `c` AGAINST (%(x)s IN BOOLEAN MODE) > 0.5
SELECT * FROM JSON_TABLE('[]', "$[*]" COLUMNS (a INT(11) PATH "$.a" DEFAULT '1' ON EMPTY ERROR ON ERROR)) AS j
SELECT * FROM JSON_TABLE(%(doc)s, %(path)s COLUMNS (a DATETIME(6) PATH '$.a', b TEXT(10) PATH '$.b', c BIT(3) PATH '$.c')) AS j
SELECT * FROM JSON_TABLE(%s, %s COLUMNS (n FOR ORDINALITY, e INT EXISTS PATH '$.e', c NCHAR(10) PATH '$.c')) AS j
SELECT * FROM JSON_TABLE(?, ? COLUMNS (a CHARACTER VARYING(5) PATH '$.a')), JSON_TABLE(:doc, :path COLUMNS (a INT PATH '$')) j
SELECT * FROM t, JSON_TABLE(t.j, '$' COLUMNS (NESTED PATH "$.a" COLUMNS (a ENUM('x') PATH '$', b SET('y') PATH '$'))) AS j
SELECT JSON_VALUE(j, "$.a"), JSON_VALUE(j, %(p)s), JSON_VALUE(j, '$.b' RETURNING DECIMAL(4, 2)) FROM t
SELECT JSON_VALUE(j, '$.b' RETURNING DATETIME(3) NULL ON EMPTY), CONVERT(c, DATETIME(3)), CONVERT(a, NCHAR(3)) FROM t
SELECT b, count(*) FROM t GROUP BY ROLLUP(b)
SELECT INSERT('abc', 1, 2, 'x'), insert (b, 1, 2, insert(b, 1, 1, 'y')) FROM t WHERE INSERT(b, 1, 1, 'x') = 'x'
SELECT first_value(a) RESPECT NULLS OVER (ORDER BY a), nth_value(a, 2) FROM FIRST IGNORE NULLS OVER (ORDER BY b) FROM t
SELECT SQL_NO_CACHE (a), (b) FROM t
SELECT HIGH_PRIORITY SQL_SMALL_RESULT SQL_BUFFER_RESULT (a) FROM t
SELECT a FROM t WHERE b LIKE 'x|_' ESCAPE ('|') OR b LIKE 2 ESCAPE (1 IN (SELECT 1)) OR b LIKE %(x)s ESCAPE ('!')
SELECT TRIM(BOTH ('x') FROM b), TRIM(LEADING FROM b), POSITION('a' IN (b)), GET_FORMAT(DATE, 'EUR') FROM t
SELECT st_mlinefromtext('x'), ST_MultiPolygonFromWKB(g), ST_GeometryCollectionFromText('x') FROM t
SELECT a FROM t FOR SYSTEM_TIME AS OF TRANSACTION (1)
SELECT sum(a) OVER (w), lag(a) OVER (PARTITION BY b) FROM t WINDOW w AS (ORDER BY a), v AS (PARTITION BY b)
SHOW FULL COLUMNS FROM t WHERE INSERT(Field, 1, 1, 'x') = 'x'
""".strip().splitlines()


@both
@pytest.mark.parametrize("sql", READS)
def test_what_orms_and_people_write_to_read_is_a_read(sql, dialect):
    assert verdict(sql, dialect) == Verdict(READ, READ)


# ---------------------------------------------------------------- the connection's memory


@both
@pytest.mark.parametrize(
    ("sql", "recalls"),
    [
        ("SELECT FOUND_ROWS()", Recall.STATEMENT),
        ("SELECT found_rows (), ROW_COUNT() AS n", Recall.STATEMENT),
        ("SELECT LAST_INSERT_ID(), `last_insert_id`()", Recall.STATEMENT),
        ("SELECT @@warning_count, @@session.error_count, @@LOCAL.`warning_count`", Recall.STATEMENT),
        ("SELECT @@identity, @@last_insert_id", Recall.STATEMENT),
        ("SHOW WARNINGS LIMIT 5", Recall.STATEMENT),
        ("SHOW ERRORS", Recall.STATEMENT),
        ("SHOW COUNT(*) WARNINGS", Recall.STATEMENT),
        ("SHOW STATUS LIKE 'Last_query_cost'", Recall.STATEMENT),
        ('SHOW LOCAL STATUS LIKE "last_query_cost"', Recall.STATEMENT),
        ("SHOW SESSION STATUS WHERE Variable_name = 'Last_query_cost'", Recall.STATEMENT),
        ("/*!SELECT FOUND_ROWS()*/", Recall.STATEMENT),
        ("SELECT /*!99999 a, */ FOUND_ROWS()", Recall.STATEMENT),
        ("SELECT 1 /*!50000 , FOUND_ROWS() */", Recall.STATEMENT),
        ("GET DIAGNOSTICS @n = NUMBER", Recall.STATEMENT),
        ("GET CURRENT DIAGNOSTICS CONDITION 1 @m = MESSAGE_TEXT, @c = MYSQL_ERRNO", Recall.STATEMENT),
        ("SELECT FOUND_ROWS() FROM t WHERE a = @n", Recall.STATEMENT),
        ("SELECT @n, @`m`, @'o' FROM t", Recall.VARIABLE),
        ("SELECT @n := 1", None),
        ("SELECT @n, @m := @n + 1 FROM t", None),
        ("SELECT @order.total, @a.b.c FROM t", Recall.VARIABLE),
        ("SELECT @order.total := 5", None),
        ("SELECT a FROM t WHERE id = @`a b` /* c */ := 3", None),
        ("SELECT @'a b':=1, @\"c\" := 2, @d -- e\n := 3", None),
        ("SELECT @%(name)s := 1", None),
        ("SELECT @%s := 2", None),
        ("SELECT @a. := 2", None),
        ("SELECT @n /*!50000 := 1 */", None),
        ("SELECT (SELECT @1st.$x := 1)", None),
        ("SELECT a INTO @n FROM t", None),
        ("SELECT a INTO @order.total FROM t", None),
        ("SELECT FOUND_ROWS(), GET_LOCK('a', 1)", None),
        ("SELECT FOUND_ROWS(), @@hostname", None),
        ("SELECT FOUND_ROWS(), CONNECTION_ID()", None),
        ("SELECT SQL_CALC_FOUND_ROWS a FROM t LIMIT 1", None),
        ("SHOW SESSION STATUS", None),
        ("SHOW STATUS LIKE 'Threads_connected'", None),
        ("/*!SELECT FOUND_ROWS()*/; SELECT CONNECTION_ID()", None),
        ("SET @n = @m", None),
        ("SELECT FOUND_ROWS(); COMMIT", None),
    ],
)
def test_what_asks_for_the_connections_past_is_told(sql, recalls, dialect):
    """A statement that only asks for its connection's past says so, because no other connection can answer it."""
    found = verdict(sql, dialect)
    assert (found.effect, found.recalls) == (CONNECTION, recalls)


@both
def test_a_change_that_asks_for_the_past_is_a_change(dialect):
    """A statement that asks for the past and also writes, or sets the session, is judged by its change."""
    assert verdict("INSERT INTO t VALUES (LAST_INSERT_ID())", dialect) == Verdict(WRITE, WRITE)
    assert verdict("SELECT LAST_INSERT_ID(5)", dialect) == Verdict(SESSION, SESSION)
    assert verdict("SELECT FOUND_ROWS() FROM t FOR UPDATE", dialect) == Verdict(WRITE, WRITE)
    found = verdict("SELECT FOUND_ROWS(), f(1)", dialect)
    assert found == Verdict(WRITE, CONNECTION, frozenset({"f"}))
    assert found.recalls is Recall.STATEMENT
    hidden = verdict("SELECT FOUND_ROWS() /*!50000 , GET_LOCK('a', 1) */", dialect)
    assert (hidden.effect, hidden.recalls) == (CONNECTION, None)


@both
@pytest.mark.parametrize(
    ("sql", "effect"),
    [
        ("SELECT * FROM information_schema.events", SERVER),
        ("SHOW EVENTS", SERVER),
        ("SHOW CREATE EVENT e", SERVER),
        ("SHOW TABLE STATUS LIKE 't'", SERVER),
        ("SELECT AUTO_INCREMENT FROM information_schema.TABLES WHERE TABLE_NAME = 't'", SERVER),
        ("SELECT `t`.`auto_increment` FROM `information_schema`.`tables` AS t", SERVER),
        ("SELECT TABLE_NAME FROM information_schema.tables WHERE UPDATE_TIME > NOW()", SERVER),
        ("SELECT CREATE_TIME FROM information_schema.partitions", SERVER),
        ("SELECT TABLE_NAME, ENGINE FROM information_schema.tables", READ),
        ("SELECT auto_increment, create_time FROM t", READ),
        ("SHOW CREATE TABLE t", READ),
        ("SHOW TABLES", READ),
    ],
)
def test_what_a_server_says_of_itself_asks_the_server(sql, effect, dialect):
    """Questions about events, counters and times of tables depend on the server: readers, for example, disable events."""
    assert classify(sql, dialect) is effect


# ---------------------------------------------------------------- sql_mode


@pytest.mark.parametrize(
    ("sql", "unknown", "plain", "ansi", "without"),
    [
        (r"SELECT 'it\'s', a FROM t", READ, READ, READ, WRITE),  # the server refuses it: without escapes it never ends
        (r"SELECT 'a\'; DELETE FROM t; -- '", WRITE, READ, READ, WRITE),
        (r"SELECT 'a \'quoted\' word' FROM t", READ, READ, READ, WRITE),
        (r"SELECT '\', get_lock(1, 2) -- '", CONNECTION, READ, READ, CONNECTION),
        (r"SELECT '\', get_lock(1, 2), 'b'", CONNECTION, WRITE, WRITE, CONNECTION),
        (r"SELECT 'a\', 'b'", READ, WRITE, WRITE, READ),
        (r"SELECT 'c:\\', 'd:\%', '\\\\'", READ, READ, READ, READ),
        (r"SELECT 1; SELECT 'it\'s'", WRITE, READ, READ, WRITE),  # the first statement runs whatever the second is
        (r'SELECT "a\", get_lock(1, 2), "b"', CONNECTION, WRITE, CONNECTION, CONNECTION),
        (r'SELECT "a\"; DELETE FROM t; -- "', WRITE, READ, WRITE, WRITE),
        ('SELECT "f"(1)', WRITE, WRITE, WRITE, WRITE),
        ("SELECT 'a", WRITE, WRITE, WRITE, WRITE),
        (r"SELECT '\'", WRITE, WRITE, WRITE, READ),
    ],
)
def test_a_backslash_before_a_quote_is_read_by_sql_mode(sql, unknown, plain, ansi, without):
    """A backslash before a quote means what sql_mode says, or the strongest meaning if the mode is unknown."""
    for dialect in DIALECTS:
        assert classify(sql, in_mode(dialect, "STRICT_TRANS_TABLES")) is plain
        assert classify(sql, in_mode(dialect, "ansi_quotes,ansi")) is ansi
        assert classify(sql, in_mode(dialect, "ANSI_QUOTES,NO_BACKSLASH_ESCAPES")) is without
        if sql != r"SELECT '\'":
            assert classify(sql, dialect) is unknown
        found = verdict(sql, dialect)
        assert found.in_doubt or found.effect <= min(plain, ansi, without)
        assert not verdict(sql, in_mode(dialect, "")).in_doubt


def test_a_mode_that_is_known_in_part_settles_most_texts():
    """Without NO_BACKSLASH_ESCAPES only a text with backslashes in double quotes is in doubt."""
    for dialect in DIALECTS:
        in_part = in_mode(dialect, None)
        settled = r"SELECT 'a\', connection_id() -- '"
        assert verdict(settled, dialect).in_doubt
        assert (classify(settled, in_part), verdict(settled, in_part).in_doubt) == (READ, False)
        for sql in (r'SELECT "a\"; DELETE FROM t; -- "', r'SELECT "a\", get_lock(1, 2) -- "'):
            found = verdict(sql, in_part)
            assert found.in_doubt
            assert found.effect == max(classify(sql, in_mode(dialect, mode)) for mode in ("", "ANSI_QUOTES"))


def test_without_a_mode_a_text_gets_its_strongest_meaning():
    """If the mode is unknown, no mode makes more of a text than the verdict says."""
    found = verdict(r"SELECT g(2), 'a\', f(1) -- '", "mysql")
    assert found == Verdict(WRITE, READ, frozenset({"f", "g"}))
    assert found.in_doubt
    assert verdict(r"SELECT g(2), 'a\', nextval(s) -- '", "mysql") == Verdict(WRITE, WRITE)
    assert verdict(r"SELECT 'a\', 1; COMMIT -- '", "mysql").ends
    assert verdict(r"SELECT '\', 1 /*@writer*/ -- '", "mysql").hint == "writer"
    assert verdict(r"SELECT '\', 1 /*@reader*/ -- '", "mysql").hint is None
    assert verdict(r"/*@reader*/ SELECT '\', 1 -- '", "mysql").hint == "reader"


# ---------------------------------------------------------------- ends of transactions


ENDING = """
COMMIT | ROLLBACK | BEGIN | START TRANSACTION | CREATE TABLE t (a INT) | DROP TABLE t | ALTER TABLE t ADD a INT | TRUNCATE t
LOCK TABLES t READ | UNLOCK TABLES | ANALYZE TABLE t | FLUSH STATUS | CALL p() | EXECUTE p | SET autocommit = 1
GRANT ALL ON t TO u
SET @x = 1, SESSION `autocommit` = 0 | SET @@session.autocommit = 1 | SET PASSWORD = 'x' | RENAME TABLE t TO u | hello world
XA START 'x' | RESET QUERY CACHE | BACKUP STAGE START | SELECT 1; COMMIT | SELECT '
""".replace("\n", " | ").strip(" |")
KEEPING = """
SELECT 1 | INSERT INTO t VALUES (1) | UPDATE t SET a = 1 | DELETE FROM t | REPLACE t VALUES (1) | SAVEPOINT a | ROLLBACK TO a
RELEASE SAVEPOINT a | CREATE TEMPORARY TABLE t (a INT) | DROP TEMPORARY TABLE t | SET @x = 1 | SHOW TABLES | USE app | DO 1
SET NAMES utf8 | PREPARE p FROM '' | DEALLOCATE PREPARE p | HANDLER t OPEN | EXPLAIN SELECT 1 | KILL 5 | HELP 'x'
CHECKSUM TABLE t
""".replace("\n", " | ").strip(" |")


@both
def test_what_commits_implicitly_ends_a_transaction(dialect):
    for sql in ENDING.split(" | "):
        assert verdict(sql, dialect).ends, sql
    for sql in KEEPING.split(" | "):
        assert not verdict(sql, dialect).ends, sql


UNGUARDING = """
SET SESSION TRANSACTION READ WRITE | SET TRANSACTION READ WRITE | SET LOCAL TRANSACTION ISOLATION LEVEL READ COMMITTED, READ WRITE
SET @@session.tx_read_only = 0 | SET @@tx_read_only := OFF | SET SESSION `transaction_read_only` = 1 - 1
SET tx_read_only = DEFAULT
SET @x = 1, @@local.transaction_read_only = FALSE | SET STATEMENT tx_read_only = 0 FOR SELECT 1
SET STATEMENT `tx_read_only` = 0 FOR SELECT 1 | COMMIT | ROLLBACK AND CHAIN
BEGIN | START TRANSACTION | START TRANSACTION READ WRITE | START TRANSACTION READ ONLY; COMMIT | SET autocommit = 1
SELECT 1; COMMIT
LOCK TABLES t READ | UNLOCK TABLES | XA START 'x' | /*! COMMIT */
""".replace("\n", " | ").strip(" |")
GUARDING = """
SET SESSION TRANSACTION READ ONLY | SET TRANSACTION READ ONLY | SET SESSION TRANSACTION ISOLATION LEVEL REPEATABLE READ
SET @@session.tx_read_only = 1 | SET transaction_read_only = ON | SET GLOBAL tx_read_only = 0 | SET GLOBAL TRANSACTION READ WRITE
START TRANSACTION READ ONLY | START TRANSACTION WITH CONSISTENT SNAPSHOT, READ ONLY | SET @x = 'tx_read_only' | SET NAMES utf8
SAVEPOINT a | ROLLBACK TO a | SELECT 'COMMIT' | USE app | SET STATEMENT max_statement_time = 1 FOR SELECT 1
""".replace("\n", " | ").strip(" |")


@both
def test_what_takes_a_read_only_guard_away_is_seen(dialect):
    """A text that loosens the access mode or ends the transaction says so, unless the next one is read-only for certain."""
    for sql in UNGUARDING.split(" | "):
        found = verdict(sql, dialect)
        assert found.unguards, sql
        assert found.effect is not READ, sql
    for sql in GUARDING.split(" | "):
        assert not verdict(sql, dialect).unguards, sql


LOCKING = """
SELECT GET_LOCK('a', 1) | DO get_lock('a', 1) | SELECT `Get_Lock` /* a */ ('a', 1) | SET @x = get_lock('a', 1)
SELECT 1; SELECT a FROM t WHERE get_lock(a, 1) | SELECT 1 /*!99999 , get_lock('a', 1) */ | SELECT f(get_lock('a', 1))
EXPLAIN SELECT get_lock('a', 1)
""".replace("\n", " | ").strip(" |")
NOT_LOCKING = """
SELECT 'get_lock(1)' | SELECT app.get_lock('a', 1) | SELECT get_lock FROM t | SELECT connection_id() | SELECT f('get_lock')
""".replace("\n", " | ").strip(" |")


@both
def test_a_lock_by_name_is_told_from_other_connections_state(dialect):
    """A text that takes a lock by name says so, because no read-only unit may do that, and its effect is CONNECTION."""
    for sql in LOCKING.split(" | "):
        found = verdict(sql, dialect)
        assert found.locks, sql
        assert found.known is CONNECTION, sql
    for sql in NOT_LOCKING.split(" | "):
        assert not verdict(sql, dialect).locks, sql


# ---------------------------------------------------------------- rules for any text

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
def test_comments_space_and_semicolons_change_no_verdict(sql, before, within, behind, end, dialect):
    """Comments, white space and a trailing semicolon never change a verdict."""
    assert verdict(before + spaced(sql, within) + behind + end, dialect) == verdict(sql, dialect)


@SETTINGS
@given(STATEMENTS, NAMES)
def test_case_never_changes_a_verdict(sql, dialect):
    assert verdict(sql.lower(), dialect) == verdict(sql.upper(), dialect) == verdict(sql, dialect)


@SETTINGS
@given(ANY_QUERY, st.integers(1, 4), NAMES)
def test_parentheses_around_a_query_never_change_a_verdict(sql, depth, dialect):
    assert verdict("(" * depth + sql + ")" * depth, dialect) == verdict(sql, dialect)


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
        assert verdict(sql, dialect) == Verdict(READ, READ) or versions


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
    alone = verdict(sql, dialect)
    nested = sql
    for nesting in inner:
        nested = nesting.format(nested)
    found = verdict(outer.format(nested), dialect)
    assert found.effect >= alone.effect
    assert found.known >= alone.known
    assert found.known is WRITE or found.functions >= alone.functions


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
    found = verdict("; ".join(statements), dialect)
    each = [verdict(sql, dialect) for sql in statements]
    assert found.effect is max(one.effect for one in each)
    assert found.known is max(one.known for one in each)
    assert found.ends is any(one.ends for one in each)


@SETTINGS
@given(ANY_QUERY, NAMES)
def test_vouching_for_all_unknown_functions_gives_what_is_known(sql, dialect):
    found = verdict(sql, dialect)
    assert found.effect_given(found.functions) is found.known
    assert bool(found.functions) is (found.known is not found.effect)
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
    unknown, known = verdict(text, dialect), verdict(text, in_mode(dialect, mode))
    assert unknown.effect >= unknown.known
    refused = known == Verdict(WRITE, WRITE, ends=True)
    assert refused or (known.effect <= unknown.effect and known.known <= unknown.known)


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


@pytest.mark.parametrize(
    ("sql", "traceless"),
    [
        ("INSERT INTO t (a) VALUES (1) ON DUPLICATE KEY UPDATE a = VALUES(a)", True),
        ("REPLACE INTO t (a) VALUES (LAST_INSERT_ID())", True),
        ("UPDATE t SET a = INSERT('abc', 1, 2, 'd')", True),
        ("SELECT a FROM t LOCK IN SHARE MODE", True),
        ("INSERT INTO t SELECT 1 WHERE 1 = GET_LOCK('a', 1)", False),
        ("INSERT INTO t SELECT `get_lock` /* a */ ('a', 1)", False),
        ("UPDATE t SET a = (@n := @n + 1)", False),
        ("REPLACE INTO t SELECT takes(7)", False),
        ("SELECT RELEASE_LOCK('a')", False),
        ("LOCK TABLES t WRITE", False),
    ],
)
@pytest.mark.parametrize("dialect", ["mysql", "mariadb"])
def test_only_a_change_of_rows_leaves_no_traces(dialect: str, sql: str, traceless: bool) -> None:
    """Only a change of rows leaves no traces, because locks by name and variables stay, however they are spelled."""
    assert verdict(sql, dialect).traceless is traceless
