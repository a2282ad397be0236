"""Other users' objects in the search path run nothing with the router's rights, and change none of its answers."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from sqlalchemy import text

from aurora_router import Outcome, OutcomeUnknown, Router
from aurora_router.local import FaultProxy
from aurora_router.local.cluster import Cluster
from aurora_router.router import core_of
from tests.integration.shop import (
    BOTH,
    RAISE,
    engine,
    eventually,
    family,
    raise_stock,
    sessions,
    shop,
    stock,
    through,
    until_readers_serve,
)
from tests.unit.test_own_statements import OF_MYSQL, OF_POSTGRESQL

MakeRouter = Callable[..., Router]

TAKEN_OVER = """
CREATE FUNCTION {signature} RETURNS {returns} LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION 'taken over by %', '{name}'; END $$"""

FUNCTIONS = """
SELECT p.proname, format_type(p.prorettype, NULL), p.proretset,
       array(SELECT format_type(unnest(p.proargtypes), NULL))
  FROM pg_proc p
 WHERE pronamespace = 'pg_catalog'::regnamespace AND prokind = 'f' AND provariadic = 0
   AND prorettype NOT IN ('record'::regtype, 'anyelement'::regtype)
   AND proname = ANY(%s)"""


def functions_of_our_statements() -> set[str]:
    found = {name for sql in OF_POSTGRESQL.values() for name in re.findall(r"pg_catalog\.(\w+)\(", sql)}
    assert {"pg_is_in_recovery", "txid_current", "txid_status", "set_config", "clock_timestamp"} <= found
    return found


@pytest.fixture(scope="module")
def hostile(aurora_cluster_factory: Callable[..., Cluster[Any]]) -> Iterator[Cluster[Any]]:
    """A cluster whose schema `public` comes first, and has objects of the names in our statements.

    Each object raises an error. All functions have the signatures of pg_catalog, and some that fit better as well. There are
    also operators that fit better.
    """
    with shop(aurora_cluster_factory, readers=1) as cluster:
        one_by_one = cluster.execute(FUNCTIONS, sorted(functions_of_our_statements()))
        signatures = {f"public.{name}({', '.join(arguments)})": (name, returns) for name, returns, _, arguments in one_by_one}
        signatures["public.txid_status(smallint)"] = ("txid_status", "text")
        signatures["public.txid_status(integer)"] = ("txid_status", "text")
        for signature, (name, returns) in signatures.items():
            cluster.execute(TAKEN_OVER.format(signature=signature, returns=returns, name=name))
        for number, (left, right) in enumerate([("oid", "regclass"), ('"char"', "text"), ("oid", "regproc"), ("name", "text")]):
            for sign in ("=", "<>"):
                function = f"public.compare_{number}({left}, {right})"
                cluster.execute(f"DROP FUNCTION IF EXISTS {function} CASCADE")
                cluster.execute(TAKEN_OVER.format(signature=function, returns="boolean", name=sign))
                cluster.execute(
                    f"CREATE OPERATOR public.{sign} (LEFTARG = {left}, RIGHTARG = {right}, FUNCTION = public.compare_{number})"
                )
        cluster.execute("ALTER ROLE app SET search_path = public, pg_catalog")
        cluster.wait_in_sync()
        yield cluster


def test_no_object_of_the_search_path_is_called(hostile: Cluster[Any]) -> None:
    """Probes, greetings, the catalog, the notes of both commit checks and the pruning do without the objects of `public`."""
    heard: list[Any] = []
    with (
        FaultProxy((hostile.writer.host, hostile.writer.port)) as proxy,
        Router(
            through(proxy, hostile), instances=[r.address for r in hostile.readers], listeners=[heard.append], probe_interval=0.1
        ) as router,
    ):
        until_readers_serve(router, 1)
        router.init_commit_table()
        for check in ("xid", "table"):
            before = stock(hostile)
            proxy.lose("COMMIT", answer=True)
            router.run_transaction(sessions(router), lambda s: s.execute(RAISE), commit_check=check)
            assert proxy._losing == []
            assert stock(hostile) == before + 1
        with router.connect(read_only=True) as connection:
            assert connection.scalar(text("SELECT stock FROM item")) == before + 1
        eventually(lambda: core_of(router).monitor.pruned_at > float("-inf"))
        eventually(lambda: core_of(router).monitor._catalog_at > float("-inf"))


def test_a_lost_commit_is_not_taken_for_done(hostile: Cluster[Any]) -> None:
    """A function txid_status(smallint) that would say "committed" of everything is not asked."""
    hostile.execute("DROP FUNCTION public.txid_status(smallint)")
    hostile.execute(
        "CREATE FUNCTION public.txid_status(smallint) RETURNS pg_catalog.text LANGUAGE sql AS $$ SELECT 'committed' $$"
    )
    with (
        FaultProxy((hostile.writer.host, hostile.writer.port)) as proxy,
        Router(through(proxy, hostile), instances=[r.address for r in hostile.readers]) as router,
    ):
        until_readers_serve(router, 1)
        with sessions(router, commit_check="xid")() as s:
            s.execute(RAISE)
            proxy.lose("COMMIT", answer=False)
            with pytest.raises(OutcomeUnknown) as caught:
                s.commit()
        assert caught.value.resolve() is Outcome.NOT_COMMITTED
        before = stock(hostile)
        proxy.lose("COMMIT", answer=False)
        assert router.run_transaction(sessions(router), raise_stock) == before + 1
        assert stock(hostile) == before + 1


@BOTH
def test_the_commit_table_is_made_where_new_connections_are(cluster: Cluster[Any], make_router: MakeRouter) -> None:
    """A pooled connection that an earlier unit has led elsewhere does not decide where the table is."""
    router = make_router(instances=(), engine_options={"pool_size": 1, "max_overflow": 0})
    elsewhere = {"postgresql": "SET search_path = extra", "mysql": "USE extra"}[family(cluster)]
    cluster.execute("DROP TABLE IF EXISTS aurora_router_commits")
    with router.begin() as connection:
        connection.execute(text(elsewhere))
    router.init_commit_table()
    where = "SELECT table_schema FROM information_schema.tables WHERE table_name = 'aurora_router_commits'"
    assert cluster.execute(where) == [({"postgresql": "public", "mysql": "app"}[family(cluster)],)]


@pytest.mark.engines("mariadb", "mysql")
def test_no_stored_function_takes_the_place_of_a_built_in_one(cluster: Cluster[Any], make_router: MakeRouter) -> None:
    """Stored functions named like the built-in ones in our statements are never called, in any sql_mode."""
    names = {name.lower() for sql in OF_MYSQL.values() for name in re.findall(r"(\w+)\(", sql)} - {"cast", "in"}
    assert {"unix_timestamp", "now", "database"} <= names
    taken = "CREATE OR REPLACE FUNCTION app.`{}`() RETURNS bigint DETERMINISTIC BEGIN SIGNAL SQLSTATE '45000'; RETURN 1; END"
    (mode,) = cluster.execute("SELECT @@global.sql_mode")[0]
    for name in names:
        cluster.execute(taken.format(name) if engine(cluster) == "mariadb" else taken.format(name).replace("OR REPLACE ", ""))
    try:
        for sql_mode in (mode, f"{mode},IGNORE_SPACE"):
            cluster.execute(f"SET GLOBAL sql_mode = '{sql_mode}'")
            cluster.wait_in_sync()
            router = make_router()
            until_readers_serve(router, 2)
            router.init_commit_table()
            assert router.run_transaction(sessions(router), raise_stock) in (11, 12)
            eventually(lambda router=router: core_of(router).monitor.pruned_at > float("-inf"))
    finally:
        cluster.execute(f"SET GLOBAL sql_mode = '{mode}'")
        for name in names:
            cluster.execute(f"DROP FUNCTION IF EXISTS app.`{name}`")
