"""Statements are read as the servers of MySQL and MariaDB read them, and what a read has left is asked where it ran."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from sqlalchemy import exc, select, text

from aurora_router import Router, classify_error
from aurora_router.core.failures import Failure
from aurora_router.core.selection import Reason
from tests.integration.mysql_family import Family, on
from tests.integration.shop import RAISE, Item, connection_ids, engine, instance_id, place, sessions, until_readers_serve

pytestmark = pytest.mark.engines("mariadb", "mysql")

MakeRouter = Callable[..., Router]
STOCK = select(Item.stock).where(Item.id == 1)


@pytest.mark.parametrize("read_only", [None, True])
def test_a_backslash_means_what_sql_mode_says(make_router: MakeRouter, read_only: bool | None) -> None:
    """A text whose meaning depends on sql_mode is read with the mode of its connection, however that was set."""
    hidden = text(r"SELECT 'a\', connection_id() -- '")
    plain, without = "STRICT_TRANS_TABLES", "NO_BACKSLASH_ESCAPES"
    for mode, where in (plain, "reader"), (without, "reader" if read_only else "writer"):
        router = make_router(engine_options={"pool_size": 1, "connect_args": {"init_command": f"SET sql_mode = '{mode}'"}})
        until_readers_serve(router, 2)
        with sessions(router)(read_only=read_only) as s:
            s.execute(hidden).all()
            assert place(s) == where
    unlocked = sessions(make_router())
    with unlocked(read_only=True) as s:
        assert s.scalars(text(r"SELECT 'a\'; DELETE FROM item; -- '")).all() == ["a'; DELETE FROM item; -- "]


def test_a_mode_that_a_raw_connection_left_behind_counts(make_router: MakeRouter) -> None:
    """A mode that the driver's own cursor has set on a pooled connection counts for the next unit there."""
    router = make_router(engine_options={"pool_size": 1, "max_overflow": 0})
    until_readers_serve(router, 2)
    raws = [router.raw_connection(read_only=True) for _ in range(2)]
    for raw in raws:
        raw.cursor().execute("SET SESSION sql_mode = 'NO_BACKSLASH_ESCAPES'")
    for raw in raws:
        raw.close()
    with sessions(router)() as s:
        s.execute(text(r"SELECT 'a\', connection_id() -- '")).all()
        assert place(s) == "writer"


def test_statements_are_read_as_the_server_reads_them(cluster: Family, make_router: MakeRouter) -> None:
    """A URL that says mysql may lead to MariaDB: a function that only MariaDB has is a read there."""
    if engine(cluster) == "mysql":
        ours, other = "SELECT bin_to_uuid(uuid_to_bin(uuid()))", "SELECT astext(point(1, 1))"
    else:
        ours, other = "SELECT astext(point(1, 1))", "SELECT bin_to_uuid('x')"
    router = make_router(cluster.url.replace("mariadb+", "mysql+"), instances=[reader.address for reader in cluster.readers])
    until_readers_serve(router, 2)
    assert router.explain(ours).reason is Reason.READ
    assert router.explain(other).reason is Reason.NOT_A_READ
    with sessions(router)() as s:
        s.execute(text(ours)).all()
        assert place(s) == "reader"


_GRAMMAR_OF = {
    "mariadb": [
        "SELECT percentile_cont(0.5) WITHIN GROUP (ORDER BY stock) OVER () FROM item",
        "SELECT AsText(GeomFromText('POINT(1 1)')), X(Point(1, 1)), Within(Point(1, 1), Point(1, 1))",
        "SELECT name FROM item WHERE ROWNUM() < 2",
    ],
    "mysql": [
        "SELECT stock, count(*) FROM item GROUP BY stock WITH ROLLUP",
        "SELECT first_value(stock) RESPECT NULLS OVER (ORDER BY id) FROM item",
        "SELECT JSON_VALUE('[1]', '$[0]' RETURNING DECIMAL(4, 2))",
    ],
}


def test_what_the_servers_grammar_takes_for_no_call_is_read(cluster: Family, make_router: MakeRouter) -> None:
    """Types, clauses and grammar functions before a parenthesis keep no read from a reader, even with bound parameters."""
    on(cluster, "DROP TABLE IF EXISTS story", "CREATE TABLE story (words varchar(20), FULLTEXT (words))")
    cluster.wait_in_sync()
    router = make_router()
    until_readers_serve(router, 2)
    for sql in [
        "SELECT words FROM story WHERE MATCH words AGAINST (:word)",
        "SELECT words FROM story WHERE MATCH story.words AGAINST ('a' IN BOOLEAN MODE)",
        "SELECT * FROM JSON_TABLE(:document, :path COLUMNS (a DATETIME(6) PATH '$.a', b TEXT PATH '$.b')) AS t",
        "SELECT * FROM JSON_TABLE('[]', \"$[*]\" COLUMNS (a INT(11) PATH \"$.a\", NESTED PATH '$.b' COLUMNS (c INT PATH '$'))) t",
        "SELECT JSON_VALUE(:document, :path), JSON_VALUE('[1]', \"$[0]\")",
        "SELECT INSERT(name, 1, 1, 'x'), insert (name, 1, 1, INSERT('a', 1, 1, 'b')) FROM item",
        "SELECT SQL_NO_CACHE (id) FROM item WHERE name LIKE :word ESCAPE ('|')",
        "SELECT CONVERT(now(), DATETIME(3)), TRIM(BOTH ('x') FROM name) FROM item",
        *_GRAMMAR_OF[engine(cluster)],
    ]:
        with sessions(router)() as s:
            s.execute(text(sql), {"word": "a", "document": "[]", "path": "$[*]"} if ":" in sql else {}).all()
            assert place(s) == "reader", sql


def test_what_a_read_has_left_is_asked_where_it_ran(make_router: MakeRouter) -> None:
    """The reader that ran a statement answers questions about it, although the writer's connection has a past as well."""
    router = make_router(engine_options={"pool_size": 1, "max_overflow": 0})
    until_readers_serve(router, 2)
    with sessions(router)(read_only=False) as s:
        s.execute(text("SELECT 1 UNION SELECT 2")).all()
    with sessions(router)() as s:
        assert len(s.scalars(select(Item)).all()) == 3
        assert s.scalar(text("SELECT FOUND_ROWS()")) == 3
        s.scalars(select(Item)).all()
        assert s.scalar(text("/*!SELECT FOUND_ROWS()*/")) == 3
        s.scalars(select(Item)).all()
        ((_, cost),) = s.execute(text("SHOW STATUS LIKE 'Last_query_cost'")).all()
        assert float(cost) > 0
        assert s.scalar(text("SELECT CAST('x' AS SIGNED)")) == 0
        assert s.scalar(text("SELECT @@warning_count")) == 1
        s.scalar(text("SELECT CAST('x' AS SIGNED)"))
        assert [code for _, code, _ in s.execute(text("SHOW WARNINGS"))] == [1292]
        assert s.scalar(text("SHOW COUNT(*) WARNINGS")) == 1
        s.execute(text("GET DIAGNOSTICS @number = NUMBER"))
        assert s.scalar(text("SELECT @number")) == 1
        with pytest.raises(exc.OperationalError):
            s.scalars(text("SELECT missing FROM item"))
        assert [code for _, code, _ in s.execute(text("SHOW ERRORS"))] == [1054]
        assert s.scalar(text("SELECT LAST_INSERT_ID()")) == 0
        assert place(s) == "reader"
        s.execute(RAISE)
        assert s.scalar(text("SELECT ROW_COUNT()")) == 1
        assert place(s) == "writer"


def test_no_question_of_ours_comes_between_two_statements(make_router: MakeRouter) -> None:
    """A text whose meaning depends on sql_mode keeps the state that the previous statement left."""
    router = make_router(engine_options={"pool_size": 1, "max_overflow": 0})
    until_readers_serve(router, 2)
    found = text(r"SELECT FOUND_ROWS(), 'a\', connection_id() -- '")
    for read_only in (None, True, False):
        with sessions(router)(read_only=read_only) as s:
            assert len(s.scalars(select(Item)).all()) == 3
            assert s.execute(found).one()[0] == 3
            s.scalar(text("SELECT CAST('x' AS SIGNED)"))
            assert s.scalar(text(r"SELECT @@warning_count, 'it\'s' -- 'connection_id()")) == 1
            assert place(s) == ("writer" if read_only is False else "reader")
    with router.connect(read_only=True) as connection:
        assert len(connection.scalars(select(Item.id)).all()) == 3
        assert connection.execute(found).one()[0] == 3


def test_a_text_in_double_quotes_is_asked_about_at_first(make_router: MakeRouter) -> None:
    """Only the server knows ANSI_QUOTES. An automatic unit asks before its first statement; later it moves instead."""
    router = make_router()
    until_readers_serve(router, 2)
    hidden = text(r'SELECT "a\", connection_id() -- "')
    with sessions(router)() as s:
        assert s.scalar(hidden) == 'a", connection_id() -- '
        assert place(s) == "reader"
    with sessions(router)() as s:
        assert len(s.scalars(select(Item)).all()) == 3
        assert s.scalar(hidden) == 'a", connection_id() -- '
        assert place(s) == "writer"
        assert s.scalar(text("SELECT FOUND_ROWS()")) == 1, "of the statement that moved"
    with sessions(router)(read_only=True) as s:
        s.scalars(select(Item)).all()
        written = text(r'SELECT "a\"; DELETE FROM item; -- "')
        assert s.scalar(written) == 'a"; DELETE FROM item; -- '


def test_what_no_read_has_left_is_asked_on_the_writer(make_router: MakeRouter) -> None:
    """Without a read on a reader the unit asks the writer. A variable stays with the connection that set it."""
    router = make_router()
    until_readers_serve(router, 2)
    for question in "SELECT FOUND_ROWS()", "SHOW WARNINGS", "SELECT @number":
        with sessions(router)() as s:
            s.execute(text(question)).all()
            assert place(s) == "writer"
    with sessions(router)() as s:
        s.scalar(STOCK)
        s.scalar(text("SELECT @number := 5"))
        assert s.scalar(text("SELECT @number")) == 5
        assert place(s) == "writer"


def test_a_lost_past_is_not_asked_of_another_reader(cluster: Family, make_router: MakeRouter) -> None:
    """If the reader's connection is lost, so is the state of the read: the question fails and is not retried."""
    router = make_router()
    until_readers_serve(router, 2)
    with sessions(router)() as s:
        s.scalars(select(Item)).all()
        reader = next(r for r in cluster.readers if r.address == instance_id(s))
        on(cluster, *(f"KILL {number}" for number in connection_ids(cluster, reader)), instance=reader)
        with pytest.raises(exc.DBAPIError) as caught:
            s.scalar(text("SELECT FOUND_ROWS()"))
        assert classify_error(caught.value).failure is Failure.LOST
