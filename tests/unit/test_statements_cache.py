"""The cache of analyses: it has those of the texts used last, within a number of bytes."""

import threading
import tracemalloc
from collections import Counter

import pytest
from sqlalchemy import Column, Integer, MetaData, Table, select
from sqlalchemy.dialects import mysql, postgresql

from aurora_router import Router
from aurora_router.core.sql.analysis import Analysis, Cache, Effect, analyze
from aurora_router.router import core_of

READ = Analysis(Effect.READ, Effect.READ)
SIZE = 200_000


class Judge:
    """A judge to whom each text is a read, and that counts the questions about each."""

    def __init__(self):
        self.asked = Counter()

    def __call__(self, sql, dialect):
        self.asked[sql] += 1
        return READ


def look_up(cache, sql):
    return cache.recent.get((sql, "postgresql")) or cache.recall(sql, "postgresql")


@pytest.mark.parametrize(
    ("name", "module"), [("postgresql", postgresql.psycopg), ("mysql", mysql.pymysql)], ids=["postgresql", "mysql"]
)
def test_an_in_of_thousands_of_values_is_judged_once(name, module):
    """An IN of thousands of values is judged once, although SQLAlchemy writes its text (22 characters a value) anew each time."""
    table = Table("t", MetaData(), Column("some_column", Integer))

    def text():
        clause = table.c.some_column.in_(range(5000))
        return str(select(table).where(clause).compile(dialect=module.dialect(), compile_kwargs={"render_postcompile": True}))

    assert len(text()) > 16_384
    assert analyze(text(), name) is analyze(text(), name)


def test_the_bytes_of_all_texts_are_bounded():
    """The cache does not grow beyond its size, however many texts there are and however long they are."""
    cache = Cache(lambda sql, dialect: Analysis(Effect.READ, Effect.READ), SIZE)
    tracemalloc.start()
    try:
        for turn in range(200):
            for length in (1, 300, 5_000, 49_000, 60_000, 1_000_000):
                look_up(cache, f"{turn}" + "x" * length)
        kept, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert kept < SIZE * 1.1


def test_a_text_in_use_is_not_forgotten():
    """Texts that are used once do not push out those that are used all the time."""
    judge = Judge()
    cache = Cache(judge, SIZE)
    for turn in range(1000):
        assert look_up(cache, "used again") is READ
        look_up(cache, f"used once, {turn}" + "x" * 2_000)
    assert judge.asked["used again"] == 1
    look_up(cache, f"used once, {0}" + "x" * 2_000)
    assert judge.asked[f"used once, {0}" + "x" * 2_000] == 2


def test_a_text_of_more_than_its_share_is_not_kept():
    """One huge text does not push out all others."""
    judge = Judge()
    cache = Cache(judge, SIZE)
    look_up(cache, "small")
    for _ in range(3):
        look_up(cache, "x" * (SIZE // 2))
    look_up(cache, "small")
    assert judge.asked == {"small": 1, "x" * (SIZE // 2): 3}


def test_threads_get_the_analysis_of_their_own_text():
    """Threads that meet in the cache get no analysis of another text or dialect, and the cache stays bounded."""
    cache = Cache(lambda sql, dialect: Analysis(Effect.READ, Effect.READ, frozenset({sql, dialect})), SIZE)
    wrong = []

    def work(first):
        for turn in range(3_000):
            sql = f"{(first + turn) % 97}" + "x" * 3_000
            dialect = ("mysql", "mariadb")[turn % 2]
            found = cache.recent.get((sql, dialect)) or cache.recall(sql, dialect)
            if found.functions != {sql, dialect}:
                wrong.append((sql, dialect, found))

    threads = [threading.Thread(target=work, args=(first,)) for first in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert sum(len(sql) for sql, _ in cache.recent) < SIZE


def test_refused_texts_are_bounded_by_their_length_in_all():
    """The texts that readers refused last are remembered within a few megabytes, however long they are."""
    known = core_of(Router("postgresql+psycopg://app@db-1/shop")).interceptor.known
    long = "SELECT 1 FROM writes /*" + 2**20 * "x" + "*/ LIMIT "
    for number in range(20):
        known.remember_rejected(f"{long}{number}")
    assert known.was_rejected(f"{long}19")
    assert sum(map(len, known.rejected)) <= 4 * 2**20
    for number in range(3000):
        known.remember_rejected(f"SELECT {number} FROM writes")
    assert [*known.rejected] == [f"SELECT {number} FROM writes" for number in range(2000, 3000)]
