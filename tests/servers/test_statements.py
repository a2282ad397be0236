"""Texts that the classifier takes for reads leave nothing behind on real servers, under every sql_mode."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest

from aurora_router.core.sql.analysis import Effect, analyze, dialect_for_setting
from tests.servers.conftest import connected

TEXTS = 30_000
MODES = ["", "ANSI_QUOTES", "NO_BACKSLASH_ESCAPES", "ANSI_QUOTES,NO_BACKSLASH_ESCAPES"]
# The second line has words of the grammar. Stored functions may have these names all the same, some only in quotes.
FUNCTIONS = ["f", "1f", "5lower", "1e5lower"]
FUNCTIONS += ["against", "columns", "escape", "insert", "left", "of", "rollup", "sql_no_cache", "text", "transaction"]

HEADS = [*["select "] * 5, "do ", "(select ", "set @y=", "show tables where ", "explain select ", "desc ", "analyze select "]


def listed(text: str) -> list[str]:
    return text.strip().replace("\n", " | ").split(" | ")


WRITES = listed(r"""
f(1) | `f`(1) | app.f(1) | "f"(1) | 1f(1) | app.5lower(1) | app.1e5lower(1) | get_lock('a',0) | `GET_LOCK`('a',0)
`insert`(1) | `left`(1) | `text`(1) | against(1) | columns(1) | escape(1) | rollup(1) | sql_no_cache(1) | of(1)
`against`(1) | `columns`(1) | app.against(1) | app.rollup (1) | `rollup`(1) | transaction(1) | app.insert(1) | app.text(1)
get_lock("a",0) | @x:=1 | f (1) | f/**/(1) | f/*!(1)*/ | /*!f*/(1) | (select f(1)) | f/*!99999*/(1) | f#c
""")
READS = listed(r"""
1 | 'a' | "b" | `n` | n | lower('A') | 1.5 | 1e5 | .5 | 0x1F | n'x' | _utf8'x' | 'it''s' | '\\' | '\'' | "\"" | 'a\' | "a\" | '"'
"'" | `n` as `a'b` | `n` as `a"b` | `n` as `a\` | lower | count | t.n | -1 | not 1 | ((1)) | if(1,2,3) | '/*' | '*/' | '--'
"#" | '/*!' | 1 as f
insert('a',1,1,'b') | match c against ('a') | n like 'a' escape ('b') | convert(1, char(3)) | trim(both 'a' from n)
""")
GLUE = listed(r"""
/*c*/ | /*! | */ | /*!50000 | /*!99999 | -- | # | /*M! | /*'*/ | /*"*/ | /*`*/ | ' | " | ` | \ | ( | ) | ; | /* /* */
match | match n | match n, | against | group by | by | like 'a' | like | columns | select | select sql_no_cache | of | as | over
/*+ x */ | /*/ | */* | -- ' | # " | \' | \" | . | '\' | "\"" | for update | from t | from t where n=1 | union select | -- ;
""")
GLUE += ["\n", "\n", " "]
ENDS = ["", "", "", " from t", "from t", "/*c*/", "*/", "'", '"', ")", " -- '", " # '", ' -- "', "*/ -- '"]


def text(rnd: random.Random) -> str:
    pieces = [rnd.choice(HEADS)]
    for count in range(rnd.randrange(1, 7)):
        if count:
            pieces.append(", " if rnd.random() < 0.55 else rnd.choice(GLUE))
        pieces.append(rnd.choice(WRITES if rnd.random() < 0.4 else READS))
        if rnd.random() < 0.25:
            pieces.append(rnd.choice(GLUE))
    return "".join([*pieces, rnd.choice(ENDS)])


class Server:
    """A server with functions that write, sessions of every sql_mode, and a connection that looks for writes."""

    def __init__(self, family: str) -> None:
        from pymysql.constants import CLIENT

        self.family = family
        self.options = {"client_flag": CLIENT.MULTI_STATEMENTS, "database": "app"}
        with connected(family) as connection, connection.cursor() as cursor:
            for sql in ("DROP DATABASE IF EXISTS app", "CREATE DATABASE app", "USE app", "CREATE TABLE calls (a INT)"):
                cursor.execute(sql)
            for name in FUNCTIONS:
                cursor.execute(
                    f"CREATE FUNCTION `{name}`(a INT) RETURNS INT DETERMINISTIC MODIFIES SQL DATA "
                    "BEGIN INSERT INTO calls VALUES (1); RETURN a; END"
                )
            cursor.execute("CREATE TABLE t (id INT, n INT, c VARCHAR(9), FULLTEXT (c))")
            cursor.execute("INSERT INTO t VALUES (1, 1, 'a')")
        self.looking = connected(family, **self.options)
        self.sessions: dict[str, Any] = {}

    def state(self) -> Any:
        with self.looking.cursor() as cursor:
            cursor.execute("SELECT (SELECT count(*) FROM t), (SELECT count(*) FROM calls), is_used_lock('a') IS NOT NULL")
            return cursor.fetchone()

    def execute(self, sql: str, mode: str) -> tuple[bool, Any]:
        """Execute a text. Returns whether the server accepts it, and the value of the session's variable afterwards."""
        import pymysql

        if mode not in self.sessions:
            self.sessions[mode] = connected(self.family, init_command=f"SET sql_mode='{mode}'", **self.options)
        accepted = True
        try:
            with self.sessions[mode].cursor() as cursor:
                try:
                    cursor.execute(sql)
                    while cursor.nextset():
                        pass
                except pymysql.Error:
                    accepted = False
                cursor.execute("SELECT @x")
                return accepted, cursor.fetchone()[0]
        except pymysql.Error:
            self.sessions.pop(mode).close()
            return False, None

    def close(self) -> None:
        for connection in (self.looking, *self.sessions.values()):
            connection.close()


@pytest.fixture(params=["mysql", "mariadb"])
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    server = Server(request.param)
    yield server
    server.close()


@pytest.mark.timeout(600)
def test_nothing_that_is_taken_for_a_read_leaves_anything_behind(server: Server) -> None:
    rnd, before, accepted = random.Random(0), server.state(), 0
    for _ in range(TEXTS):
        sql = text(rnd)
        unknown = analyze(sql, server.family).effect
        for mode in MODES:
            if Effect.READ not in (unknown, analyze(sql, dialect_for_setting(server.family, mode)).effect):
                continue
            worked, variable = server.execute(sql, mode)
            accepted += worked
            assert (server.state(), variable) == (before, None), (sql, mode)
    assert accepted > TEXTS / 20
