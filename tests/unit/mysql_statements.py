"""Statements of MySQL and MariaDB with their effects, for the tests of single statements and of rules for any text."""

import json
from pathlib import Path

import pytest

from aurora_router.core.sql.analysis import Effect

READ, SERVER, TRANSACTION, SESSION, CONNECTION, WRITE = Effect
DIALECTS = ["mysql", "mariadb"]
ROWS = json.loads((Path(__file__).parents[1] / "data" / "statements.json").read_text())
TRIED = [row for row in ROWS if row["dialect"] == "mysql"]
# The row's text has a backslash and an "n" in place of a line break, so as it stands it is one comment.
MEANT = {"M141": "-- c\nINSERT INTO t(v) VALUES('dc')"}
both = pytest.mark.parametrize("dialect", DIALECTS)

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
    ("SELECT * FROM information_schema.columns", READ, "alike everywhere"),
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
