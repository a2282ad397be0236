"""The classifier's MySQL and MariaDB dialects: statements tried on real servers, tricky texts, and reads that people write."""

import pytest

from aurora_router.core.sql.analysis import Analysis, Effect, analyze, classify
from tests.unit.mysql_statements import MEANT, READS, TRICKY, TRIED, both

READ, SERVER, TRANSACTION, SESSION, CONNECTION, WRITE = Effect


@both
@pytest.mark.parametrize("row", TRIED, ids=[row["id"] for row in TRIED])
def test_statements_that_were_tried_get_the_effect_that_was_seen(row, dialect):
    found = analyze(MEANT.get(row["id"], row["sql"]), dialect)
    assert found.effect is Effect[row["effect"]]
    if row["undecidable"]:
        assert found.functions
        assert found.effect_if_functions_pure is READ


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


@both
@pytest.mark.parametrize("sql", READS)
def test_what_orms_and_people_write_to_read_is_a_read(sql, dialect):
    assert analyze(sql, dialect) == Analysis(READ, READ)
