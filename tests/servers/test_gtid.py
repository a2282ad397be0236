"""GTID positions against the answers of real servers about the same texts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from aurora_router.core.gtid import GtidSet, MariadbGtid, mariadb_epoch

Ask = Callable[..., Any]
SETTINGS = settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
SOURCES = [f"{n:08x}-71ca-11e1-9e33-c80aa942956{n}" for n in range(3)]


runs = st.tuples(st.integers(1, 12), st.integers(0, 4)).map(lambda run: f"{run[0]}-{sum(run)}" if run[1] else str(run[0]))
tags = st.sampled_from(["", "", ":blue", ":_1"])
part = st.builds(
    lambda source, tag, numbers: f"{source}{tag}:{':'.join(numbers)}", st.sampled_from(SOURCES), tags, st.lists(runs, min_size=1)
)
texts = st.lists(part, max_size=4).map(",\n".join)


@SETTINGS
@given(one=texts, two=texts)
def test_mysql_contains_and_unites_sets_as_we_do(mysql: Ask, one: str, two: str) -> None:
    if "blue" in one + two or "_1" in one + two:
        assume(tuple(map(int, mysql("SELECT @@version").split("-")[0].split("."))) >= (8, 3))
    mine, other = GtidSet.from_server(1, one), GtidSet.from_server(1, two)
    assert mine.covers(other) is bool(mysql("SELECT GTID_SUBSET(%s, %s)", two, one))
    assert GtidSet.from_server(1, mysql("SELECT GTID_SUBTRACT(%s, '')", one)) == mine
    assert str(mine) == "1:" + mysql("SELECT GTID_SUBTRACT(%s, '')", one).replace("\n", "")
    both = mine.merge(other)
    assert both is not None
    assert GtidSet.from_server(1, mysql("SELECT GTID_SUBTRACT(%s, '')", f"{one},{two}".strip(","))) == both


@SETTINGS
@given(text=st.lists(st.sampled_from([*SOURCES, ":", "-", ",", "0", "1", "5", "9", "\n", " ", "x"]), max_size=8).map("".join))
def test_what_mysql_refuses_is_refused(mysql: Ask, text: str) -> None:
    try:
        GtidSet.from_server(1, text)
    except ValueError:
        return  # the server takes more than it ever writes
    mysql("SELECT GTID_SUBSET(%s, '')", text)


positions = st.dictionaries(st.integers(0, 3), st.tuples(st.integers(1, 3), st.integers(1, 9)), max_size=3).map(
    lambda last: ",".join(f"{domain}-{server}-{number}" for domain, (server, number) in sorted(last.items()))
)


@settings(SETTINGS, max_examples=100)
@given(one=positions, two=positions)
def test_mariadb_waits_for_a_position_that_is_not_covered(mariadb: Ask, one: str, two: str) -> None:
    mariadb("RESET MASTER")
    mariadb("SET GLOBAL gtid_slave_pos = %s", one)
    assert MariadbGtid.from_server(1, mariadb("SELECT @@gtid_slave_pos")) == MariadbGtid.from_server(1, one)
    reached = mariadb("SELECT MASTER_GTID_WAIT(%s, 0)", two) == 0
    assert MariadbGtid.from_server(1, one).covers(MariadbGtid.from_server(1, two)) is reached


def test_mariadbs_binlog_state_tells_the_newest_writers_start(mariadb: Ask) -> None:
    """MariaDB's binlog state says at which number the newest writer began."""
    mariadb("RESET MASTER")
    mariadb("SET GLOBAL gtid_slave_pos = ''")
    before = 0
    for server in (1, 2, 3, 1, 2):
        mariadb("SET SESSION server_id = %s", server)
        for turn in range(3):
            mariadb("CREATE OR REPLACE TABLE mysql.aurora_router_gtid (a INT)")
            now = mariadb_epoch(mariadb("SELECT @@gtid_binlog_state"))
            assert now > before if turn == 0 else now == before
            before = now
    assert before == 13
    mariadb("DROP TABLE mysql.aurora_router_gtid")
