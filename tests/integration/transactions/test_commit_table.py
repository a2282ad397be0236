"""The commit table notes every transaction that may have written, no other one, and keeps no old rows."""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy import select, text

from aurora_router import ConfigurationError, Outcome, OutcomeUnknown, Router, RoutingSession
from aurora_router.local import FaultProxy, PostgresCluster
from tests.integration.shop import BOTH, Item, eventually, raise_stock, sessions, stock

STOCK = select(Item.stock).where(Item.id == 1)


@BOTH
def test_a_missing_commit_table_is_named_with_what_to_do(cluster: PostgresCluster, router: Router) -> None:
    cluster.execute("DROP TABLE aurora_router_commits")
    with pytest.raises(ConfigurationError, match="init-commit-table"):
        router.run_transaction(sessions(router), raise_stock, commit_check="table")
    assert stock(cluster) == 10
    router.init_commit_table()
    router.init_commit_table()
    assert router.run_transaction(sessions(router), raise_stock, commit_check="table") == 11


@BOTH
@pytest.mark.parametrize("answered", [True, False])
def test_the_commit_table_is_made_despite_a_lost_link(
    cluster: PostgresCluster, proxy: FaultProxy, router: Router, answered: bool
) -> None:
    """The router creates the commit table anew if it loses the connection before or after the statement has run."""
    cluster.execute("DROP TABLE aurora_router_commits")
    proxy.lose("CREATE TABLE", answer=answered)
    router.init_commit_table()
    assert router.run_transaction(sessions(router), raise_stock, commit_check="table") == 11


READ_ONLY: Any = {"postgresql_readonly": True}


@BOTH
@pytest.mark.parametrize("check", ["xid", "table"])
def test_a_read_only_transaction_is_not_noted(cluster: PostgresCluster, router: Router, check: Any) -> None:
    """A transaction that is read-only ends as it would without a commit check, because nothing of it can be lost."""

    def report(s: RoutingSession) -> int | None:
        if cluster.url.startswith("postgresql"):
            s.connection(execution_options=READ_ONLY)
        else:
            s.execute(text("START TRANSACTION READ ONLY"))
        return s.scalar(STOCK)

    assert router.run_transaction(sessions(router), report, commit_check=check) == 10
    with sessions(router, commit_check=check)() as s:
        assert report(s) == 10
        s.commit()
        assert raise_stock(s) == 11
        s.commit()
    assert stock(cluster) == 11


def test_a_transaction_set_read_only_by_itself_can_be_noted(router: Router) -> None:
    """A transaction that makes itself read-only can be noted before its COMMIT."""

    def reads(s: RoutingSession) -> int:
        s.execute(text("SET TRANSACTION READ ONLY"))
        return s.get_one(Item, 1).stock

    assert router.run_transaction(sessions(router), reads) == 10


@pytest.mark.parametrize("answer", [False, True])
def test_a_lost_commit_of_a_read_only_transaction_is_made_again(proxy: FaultProxy, router: Router, answer: bool) -> None:
    runs: list[int | None] = []

    def report(s: RoutingSession) -> None:
        s.connection(execution_options=READ_ONLY)
        runs.append(s.scalar(STOCK))

    proxy.lose("COMMIT", answer=answer)
    router.run_transaction(sessions(router), report, commit_check="table")
    assert runs == [10, 10]


def test_a_transaction_that_became_writable_is_noted(cluster: PostgresCluster, proxy: FaultProxy, router: Router) -> None:
    """A transaction that was declared read-only may have been made writable since, and then it is noted."""
    runs: list[int] = []

    def work(s: RoutingSession) -> None:
        s.connection(execution_options=READ_ONLY)
        s.execute(text("SET TRANSACTION READ WRITE"))
        runs.append(raise_stock(s))

    proxy.lose("COMMIT", answer=True)
    router.run_transaction(sessions(router), work, commit_check="table")
    assert runs == [11]
    assert stock(cluster) == 11


@pytest.mark.engines("mariadb", "mysql")
def test_locked_tables_that_keep_out_the_note_are_refused(cluster: PostgresCluster, router: Router) -> None:
    """LOCK TABLES keeps out the commit table, and the error says what to do."""

    def work(s: RoutingSession, *more: str) -> None:
        s.execute(text("LOCK TABLES item WRITE"))
        s.execute(text("UPDATE item SET stock = stock + 1 WHERE id = 1"))
        for statement in more:
            s.execute(text(statement))

    with pytest.raises(ConfigurationError, match=r"LOCK TABLES .* aurora_router_commits.* UNLOCK TABLES .* commit_check=None"):
        router.run_transaction(sessions(router), work)
    assert stock(cluster) == 10
    router.run_transaction(sessions(router), lambda s: work(s, "UNLOCK TABLES"))
    assert stock(cluster) == 11


def test_anothers_commit_table_serves_a_user_with_dml_rights(cluster: PostgresCluster, proxy: FaultProxy, router: Router) -> None:
    """A commit table that somebody else has made serves a user who may only use it."""
    cluster.execute("ALTER TABLE aurora_router_commits OWNER TO CURRENT_USER; REVOKE ALL ON aurora_router_commits FROM app")
    cluster.execute("GRANT SELECT, INSERT, UPDATE, DELETE ON aurora_router_commits TO app")
    cluster.execute("INSERT INTO aurora_router_commits (id, at) VALUES (gen_random_uuid(), now() - interval '2 hours')")
    try:
        router.init_commit_table()
        proxy.lose("COMMIT", answer=False)
        assert router.run_transaction(sessions(router), raise_stock, commit_check="table") == 11
        old = "SELECT count(*) FROM aurora_router_commits WHERE at < now() - interval '1 hour'"
        eventually(lambda: cluster.execute(old) == [(0,)], timeout=30)
    finally:
        cluster.execute("DROP TABLE aurora_router_commits")
    assert stock(cluster) == 11


def test_old_commit_rows_are_removed_outside_of_requests(cluster: PostgresCluster, router: Router) -> None:
    """Old rows of the commit table are removed outside of any request."""
    cluster.execute("""
        INSERT INTO aurora_router_commits (id, at)
        SELECT gen_random_uuid(), now() - interval '2 hours' FROM generate_series(1, 5100)""")
    cluster.execute("INSERT INTO aurora_router_commits (id) VALUES (gen_random_uuid())")
    router.run_transaction(sessions(router), raise_stock, commit_check="table")
    too_old = "SELECT count(*) FROM aurora_router_commits WHERE at < now() - interval '1 hour'"
    eventually(lambda: cluster.execute(too_old) == [(0,)], timeout=30)
    ((found,),) = cluster.execute("SELECT count(*) FROM aurora_router_commits")
    assert found >= 2


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("ALTER TABLE aurora_router_commits SET UNLOGGED", "unlogged"),
        ("CREATE RULE nothing AS ON UPDATE TO aurora_router_commits DO INSTEAD NOTHING", "triggers or rules"),
        ("CREATE ROLE mallory; ALTER TABLE aurora_router_commits OWNER TO mallory", "role mallory"),
        ("DROP TABLE aurora_router_commits; CREATE VIEW aurora_router_commits AS SELECT 1 AS id", "no ordinary table"),
    ],
)
def test_a_table_whose_rows_prove_nothing_is_refused(cluster: PostgresCluster, router: Router, change: str, words: str) -> None:
    """A table of the name that loses its rows, runs code of its own or belongs to a stranger is refused in words."""
    cluster.execute(change)
    try:
        with pytest.raises(ConfigurationError, match=f"aurora_router_commits .*{words}"):
            router.init_commit_table()
    finally:
        kind = "VIEW" if "VIEW" in change else "TABLE"
        cluster.execute(f"DROP {kind} aurora_router_commits; DROP ROLE IF EXISTS mallory")
    router.init_commit_table()


def test_a_trigger_cannot_pass_a_lost_commit_for_done(cluster: PostgresCluster, proxy: FaultProxy, router: Router) -> None:
    """A trigger that marks each row as committed makes the outcome of a lost COMMIT unknown."""
    body = "BEGIN NEW.committed := true; RETURN NEW; END"
    cluster.execute(f"CREATE FUNCTION lie() RETURNS trigger LANGUAGE plpgsql AS $${body}$$")
    cluster.execute("CREATE TRIGGER lie BEFORE INSERT ON aurora_router_commits FOR EACH ROW EXECUTE FUNCTION lie()")
    try:
        with sessions(router, commit_check="table")() as s:
            raise_stock(s)
            proxy.lose("COMMIT", answer=False)
            with pytest.raises(OutcomeUnknown) as caught:
                s.commit()
            assert caught.value.resolve() is Outcome.UNKNOWN
    finally:
        cluster.execute("DROP FUNCTION lie CASCADE")
    assert stock(cluster) == 10


@pytest.mark.engines("mariadb", "mysql")
def test_a_table_that_is_not_rolled_back_is_refused(cluster: PostgresCluster, router: Router) -> None:
    """A commit table of MyISAM keeps the row of a transaction that was rolled back, and is refused in words."""
    cluster.execute("ALTER TABLE aurora_router_commits ENGINE = MyISAM")
    try:
        with pytest.raises(ConfigurationError, match="InnoDB"):
            router.init_commit_table()
    finally:
        cluster.execute("ALTER TABLE aurora_router_commits ENGINE = InnoDB")
    router.init_commit_table()
    cluster.execute("CREATE TRIGGER lie BEFORE INSERT ON aurora_router_commits FOR EACH ROW SET NEW.committed = TRUE")
    try:
        with pytest.raises(ConfigurationError, match="triggers"):
            router.init_commit_table()
    finally:
        cluster.execute("DROP TRIGGER lie")
