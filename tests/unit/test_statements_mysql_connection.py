"""What a text of MySQL or MariaDB asks of its connection or leaves there: its past, sql_mode, transactions, guards, locks."""

import pytest

from aurora_router.core.sql.analysis import Analysis, Effect, Recall, analyze, classify, dialect_for_setting
from tests.unit.mysql_statements import DIALECTS, both

READ, SERVER, TRANSACTION, SESSION, CONNECTION, WRITE = Effect

# -- the connection's memory ------------------------------------------------------------------------------------------


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
        ("SHOW SESSION STATUS", Recall.STATEMENT),
        ("SHOW STATUS LIKE 'last%'", Recall.STATEMENT),
        ("SHOW STATUS LIKE 'Last\\_query\\_%'", Recall.STATEMENT),
        ("SHOW LOCAL STATUS LIKE '%rows'", Recall.STATEMENT),
        ("SHOW SESSION STATUS LIKE 'Handler_read_rnd_next'", Recall.STATEMENT),
        ("SHOW STATUS LIKE %(name)s", Recall.STATEMENT),
        ("SHOW STATUS WHERE Variable_name = %(name)s", Recall.STATEMENT),
        ("SELECT * FROM performance_schema.session_status", Recall.STATEMENT),
        ("SELECT * FROM information_schema.SESSION_STATUS WHERE variable_name = 'x'", Recall.STATEMENT),
        ("SHOW SESSION VARIABLES LIKE 'last%'", None),
        ("SHOW SESSION STATUS LIKE 'Uptime'", None),
        ("SHOW STATUS LIKE 'Threads_connected'", None),
        ("/*!SELECT FOUND_ROWS()*/; SELECT CONNECTION_ID()", None),
        ("SET @n = @m", None),
        ("SELECT FOUND_ROWS(); COMMIT", None),
    ],
)
def test_what_asks_for_the_connections_past_is_told(sql, recalls, dialect):
    """A statement that only asks for its connection's past says so, because no other connection can answer it."""
    found = analyze(sql, dialect)
    assert (found.effect, found.recalls) == (CONNECTION, recalls)


@both
def test_a_change_that_asks_for_the_past_is_a_change(dialect):
    """A statement that asks for the past and also writes, or sets the session, is judged by its change."""
    assert analyze("INSERT INTO t VALUES (LAST_INSERT_ID())", dialect) == Analysis(WRITE, WRITE)
    assert analyze("SELECT LAST_INSERT_ID(5)", dialect) == Analysis(SESSION, SESSION)
    assert analyze("SELECT FOUND_ROWS() FROM t FOR UPDATE", dialect) == Analysis(WRITE, WRITE)
    found = analyze("SELECT FOUND_ROWS(), f(1)", dialect)
    assert found == Analysis(WRITE, CONNECTION, frozenset({"f"}))
    assert found.recalls is Recall.STATEMENT
    hidden = analyze("SELECT FOUND_ROWS() /*!50000 , GET_LOCK('a', 1) */", dialect)
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
        ("SELECT * FROM information_schema.tables WHERE table_name = 't'", SERVER),
        ("SELECT SQL_NO_CACHE * FROM information_schema.TABLES", SERVER),
        ("SELECT x.* FROM `information_schema`.`partitions` AS x", SERVER),
        ("SELECT a, * FROM (SELECT 1 AS a, tables.* FROM information_schema.tables) AS x", SERVER),
        ("SELECT COUNT(*), TABLE_ROWS * 2 FROM information_schema.tables", READ),
        ("SELECT * FROM information_schema.columns", READ),
        ("SHOW CREATE TABLE t", SERVER),
        ("SHOW TABLES", READ),
    ],
)
def test_what_a_server_says_of_itself_asks_the_server(sql, effect, dialect):
    """Questions about events, counters and times of tables depend on the server: readers, for example, disable events."""
    assert classify(sql, dialect) is effect


# -- sql_mode ---------------------------------------------------------------------------------------------------------


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
        assert classify(sql, dialect_for_setting(dialect, "STRICT_TRANS_TABLES")) is plain
        assert classify(sql, dialect_for_setting(dialect, "ansi_quotes,ansi")) is ansi
        assert classify(sql, dialect_for_setting(dialect, "ANSI_QUOTES,NO_BACKSLASH_ESCAPES")) is without
        if sql != r"SELECT '\'":
            assert classify(sql, dialect) is unknown
        found = analyze(sql, dialect)
        assert found.in_doubt or found.effect <= min(plain, ansi, without)
        assert not analyze(sql, dialect_for_setting(dialect, "")).in_doubt


def test_a_mode_that_is_known_in_part_settles_most_texts():
    """Without NO_BACKSLASH_ESCAPES only a text with backslashes in double quotes is in doubt."""
    for dialect in DIALECTS:
        in_part = dialect_for_setting(dialect, None)
        settled = r"SELECT 'a\', connection_id() -- '"
        assert analyze(settled, dialect).in_doubt
        assert (classify(settled, in_part), analyze(settled, in_part).in_doubt) == (READ, False)
        for sql in (r'SELECT "a\"; DELETE FROM t; -- "', r'SELECT "a\", get_lock(1, 2) -- "'):
            found = analyze(sql, in_part)
            assert found.in_doubt
            assert found.effect == max(classify(sql, dialect_for_setting(dialect, mode)) for mode in ("", "ANSI_QUOTES"))


def test_without_a_mode_a_text_gets_its_strongest_meaning():
    """If the mode is unknown, no mode makes more of a text than the analysis says."""
    found = analyze(r"SELECT g(2), 'a\', f(1) -- '", "mysql")
    assert found == Analysis(WRITE, READ, frozenset({"f", "g"}))
    assert found.in_doubt
    assert analyze(r"SELECT g(2), 'a\', nextval(s) -- '", "mysql") == Analysis(WRITE, WRITE)
    assert analyze(r"SELECT 'a\', 1; COMMIT -- '", "mysql").may_end_transaction
    assert analyze(r"SELECT '\', 1 /*@writer*/ -- '", "mysql").hint == "writer"
    assert analyze(r"SELECT '\', 1 /*@reader*/ -- '", "mysql").hint is None
    assert analyze(r"/*@reader*/ SELECT '\', 1 -- '", "mysql").hint == "reader"


# -- ends of transactions ---------------------------------------------------------------------------------------------


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
        assert analyze(sql, dialect).may_end_transaction, sql
    for sql in KEEPING.split(" | "):
        assert not analyze(sql, dialect).may_end_transaction, sql


# -- guards, locks and traces -----------------------------------------------------------------------------------------


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
        found = analyze(sql, dialect)
        assert found.may_unset_read_only, sql
        assert found.effect is not READ, sql
    for sql in GUARDING.split(" | "):
        assert not analyze(sql, dialect).may_unset_read_only, sql


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
        found = analyze(sql, dialect)
        assert found.takes_named_lock, sql
        assert found.effect_if_functions_pure is CONNECTION, sql
    for sql in NOT_LOCKING.split(" | "):
        assert not analyze(sql, dialect).takes_named_lock, sql


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
    assert analyze(sql, dialect).traceless is traceless
