"""Local clusters: real servers are started, lost and brought back, for each test anew."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pymysql
import pytest
from sqlalchemy import NullPool, create_engine
from sqlalchemy.exc import OperationalError

from aurora_router.local import LocalClusterError, PostgresCluster
from tests.integration.local_clusters import (
    HERE,
    POSTGRES,
    Cluster,
    Engine,
    ask,
    data_directory,
    each_engine,
    engine_of,
    notes,
    wait,
    with_package,
)


@pytest.fixture(scope="module", params=HERE, ids=repr)
def shared(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    with request.param.make(readers=2) as cluster:
        cluster.execute("CREATE TABLE note (id int PRIMARY KEY)")
        yield cluster


@pytest.fixture
def cluster(shared: Cluster) -> Cluster:
    shared.heal()
    shared.execute("TRUNCATE TABLE note")
    shared.wait_in_sync()
    return shared


# -- what a cluster is ------------------------------------------------------------------------------------------------


def test_each_instance_has_its_own_address_and_the_same_port(cluster: Cluster) -> None:
    """Each instance has an address of its own, and all have one port."""
    assert [i.name for i in cluster.instances] == ["db-1", "db-2", "db-3"]
    assert len({i.host for i in cluster.instances}) == 3
    assert len({i.port for i in cluster.instances}) == 1
    assert {i.address for i in cluster.instances} == {f"{i.host}:{i.port}" for i in cluster.instances}


def test_one_instance_writes_and_the_others_stand_by(cluster: Cluster) -> None:
    cluster.execute("INSERT INTO note VALUES (1)")
    cluster.wait_in_sync()
    assert set(cluster.instances) == {cluster.writer, *cluster.readers}
    for reader in cluster.readers:
        assert notes(cluster, reader) == [1]
        with pytest.raises((psycopg.errors.ReadOnlySqlTransaction, pymysql.err.OperationalError), match="read-only"):
            cluster.execute("INSERT INTO note VALUES (2)", instance=reader)


def test_the_application_connects_as_a_plain_user_by_password(cluster: Cluster) -> None:
    """The application connects by the URL as a plain user with a password."""
    engine = engine_of(cluster)
    with create_engine(cluster.url, poolclass=NullPool).connect() as connection:
        assert connection.exec_driver_sql(engine.own_database).one() == ("app", "app")
        connection.exec_driver_sql("CREATE TABLE own (id int)")
        connection.exec_driver_sql("INSERT INTO note VALUES (7)")
        connection.exec_driver_sql("DROP TABLE own")
        connection.rollback()
    with pytest.raises(OperationalError, match=engine.refused):
        create_engine(cluster.url.replace(cluster.app_password, "wrong"), poolclass=NullPool).connect()


@pytest.mark.parametrize("shared", [POSTGRES], indirect=True, ids=repr)
def test_the_postgresql_passwords_are_hashed_once(cluster: Cluster) -> None:
    """Long random passwords are hashed once and not thousands of times, because that would only slow each connect down."""
    if int(cluster.execute("SHOW server_version_num")[0][0]) >= 160000:
        hashed = cluster.execute("SELECT rolpassword LIKE 'SCRAM-SHA-256$1:%' FROM pg_authid WHERE rolpassword IS NOT NULL")
        assert hashed == [(True,), (True,)]


@pytest.mark.parametrize("shared", [POSTGRES], indirect=True, ids=repr)
def test_the_postgresql_user_may_monitor_and_is_no_superuser(cluster: Cluster) -> None:
    """The application's user of PostgreSQL may monitor and is no superuser."""
    assert cluster.execute("SELECT rolsuper FROM pg_roles WHERE rolname = 'app'") == [(False,)]
    assert cluster.execute("SELECT pg_has_role('app', 'pg_monitor', 'member')") == [(True,)]


def test_neither_repr_shows_a_password(cluster: Cluster) -> None:
    shown = repr(cluster) + repr(cluster.writer)
    assert "writer" in shown
    assert cluster.writer.address in shown
    assert cluster.app_password not in shown
    assert cluster.superuser_password not in shown


def test_servers_do_not_run_as_root(cluster: Cluster) -> None:
    for instance in cluster.instances:
        assert os.stat(f"/proc/{instance.pid}").st_uid != 0


def test_two_clusters_run_side_by_side(cluster: Cluster) -> None:
    with engine_of(cluster).make(readers=0) as other:
        assert other.readers == ()
        assert data_directory(other) != data_directory(cluster)
        with pytest.raises(ValueError, match="another cluster"):
            cluster.kill(other.writer)


# -- what can happen to it --------------------------------------------------------------------------------------------


def test_a_surviving_reader_follows_the_promoted_one(
    cluster: Cluster,
) -> None:
    """After the writer is killed, the surviving reader follows the promoted one."""
    old = cluster.writer
    cluster.execute("INSERT INTO note VALUES (1)")
    with old.connect() as session:
        cluster.kill(old)
        with pytest.raises(engine_of(cluster).error):
            ask(session, "SELECT 1")
    assert not old.running
    assert old.pid is None
    new = cluster.promote()
    cluster.execute("INSERT INTO note VALUES (2)")
    cluster.wait_in_sync()
    assert cluster.writer == new != old
    (survivor,) = cluster.readers
    assert notes(cluster, survivor) == [1, 2]


def test_a_killed_writer_comes_back_as_a_reader(cluster: Cluster) -> None:
    """A killed writer comes back as a reader and loses what only it had."""
    old = cluster.writer
    for reader in cluster.readers:
        cluster.freeze(reader)
    cluster.execute("INSERT INTO note VALUES (1)")  # No reader receives this.
    cluster.kill(old)
    for reader in [i for i in cluster.instances if i != old]:
        # The write waits in the sockets of the frozen readers. A restarted reader never reads it.
        cluster.kill(reader)
        cluster.restart(reader)
    cluster.promote()
    cluster.execute("INSERT INTO note VALUES (2)")
    cluster.rejoin(old)
    cluster.wait_in_sync()
    assert old in cluster.readers
    assert [notes(cluster, i) for i in cluster.instances] == [[2], [2], [2]]


def test_a_promotion_beside_a_living_writer_is_a_split_brain(
    cluster: Cluster,
) -> None:
    """A promotion beside a living writer is a split brain until the old writer rejoins."""
    old, new = cluster.writer, cluster.readers[0]
    assert cluster.promote(new) == new
    cluster.execute("INSERT INTO note VALUES (1)", instance=old)
    cluster.execute("INSERT INTO note VALUES (2)", instance=new)
    assert (notes(cluster, old), notes(cluster, new)) == ([1], [2])
    cluster.rejoin(old)
    cluster.wait_in_sync()
    assert notes(cluster, old) == [2]


def test_a_frozen_instance_accepts_and_does_not_answer(
    cluster: Cluster,
) -> None:
    """A frozen instance accepts connections and does not answer until it thaws."""
    reader = cluster.readers[0]
    with reader.connect() as session:
        cluster.freeze(reader)
        assert reader.running
        with pytest.raises(engine_of(cluster).error):
            reader.connect(**engine_of(cluster).impatient)
        assert "frozen" in repr(cluster)
        cluster.thaw(reader)
        assert ask(session, "SELECT 1") == (1,)


def test_a_reader_frozen_during_a_promotion_follows_when_thawed(
    cluster: Cluster,
) -> None:
    """A reader that was frozen during a promotion follows the new writer when it is thawed."""
    new, frozen = cluster.readers
    cluster.freeze(frozen)
    cluster.kill(cluster.writer)
    assert cluster.promote() == new  # a frozen reader is no candidate
    cluster.execute("INSERT INTO note VALUES (1)")
    cluster.thaw(frozen)
    cluster.wait_in_sync()
    assert notes(cluster, frozen) == [1]


def test_a_frozen_writer_that_wakes_after_a_promotion_can_rejoin(cluster: Cluster) -> None:
    old = cluster.writer
    cluster.freeze(old)
    cluster.promote()
    cluster.execute("INSERT INTO note VALUES (1)")
    cluster.rejoin(old)
    cluster.wait_in_sync()
    assert notes(cluster, old) == [1]


def test_a_survivor_ahead_of_the_promoted_reader_is_rewound(cluster: Cluster) -> None:
    """A survivor that is ahead of the promoted reader is rewound."""
    behind, ahead = cluster.readers
    cluster.freeze(behind)
    cluster.execute("INSERT INTO note VALUES (1)")
    wait(lambda: notes(cluster, ahead) == [1])
    cluster.kill(behind)
    cluster.kill(cluster.writer)
    cluster.restart(behind)
    cluster.promote(behind)
    cluster.execute("INSERT INTO note VALUES (2)")
    cluster.wait_in_sync()
    assert notes(cluster, ahead) == [2]


def test_the_most_advanced_reader_is_promoted_by_default(cluster: Cluster) -> None:
    """If no instance is named, the most advanced reader is promoted."""
    ahead, behind = cluster.readers
    cluster.freeze(behind)
    cluster.execute("INSERT INTO note VALUES (1)")
    wait(lambda: notes(cluster, ahead) == [1])
    cluster.kill(behind)
    cluster.kill(cluster.writer)
    cluster.restart(behind)
    assert cluster.promote() == ahead
    assert notes(cluster) == [1]


def test_restart_brings_an_instance_back_as_what_it_was(cluster: Cluster) -> None:
    writer, reader = cluster.writer, cluster.readers[0]
    before = writer.pid
    cluster.restart(writer)
    cluster.kill(reader)
    cluster.restart(reader)
    assert writer.pid != before
    cluster.execute("INSERT INTO note VALUES (1)")
    cluster.wait_in_sync()
    assert notes(cluster, reader) == [1]


def test_a_lagging_reader_replays_late_until_the_lag_is_zero(cluster: Cluster) -> None:
    """A lagging reader replays late, and a lag of zero ends that at once."""
    late, current = cluster.readers
    cluster.set_lag(late, 60)
    # PostgreSQL reads its configuration again some time after it is asked to.
    if isinstance(cluster, PostgresCluster):
        wait(lambda: cluster.execute("SHOW recovery_min_apply_delay", instance=late) == [("1min",)])
    cluster.execute("INSERT INTO note VALUES (1)")
    wait(lambda: notes(cluster, current) == [1])
    with pytest.raises(TimeoutError, match=late.name):
        cluster.wait_in_sync(timeout=0.2)
    assert notes(cluster, late) == []
    cluster.set_lag(late, 0)
    cluster.wait_in_sync()
    assert notes(cluster, late) == [1]


def test_paused_replay_shows_nothing_new_until_it_is_resumed(cluster: Cluster) -> None:
    reader = cluster.readers[0]
    cluster.pause_replay(reader)
    cluster.execute("INSERT INTO note VALUES (1)")
    with pytest.raises(TimeoutError, match=reader.name):
        cluster.wait_in_sync(timeout=0.2)
    cluster.resume_replay(reader)
    cluster.wait_in_sync()
    assert notes(cluster, reader) == [1]


def test_heal_makes_a_battered_cluster_whole(cluster: Cluster) -> None:
    old, (new, late) = cluster.writer, cluster.readers
    cluster.set_lag(late, 60)
    cluster.freeze(late)
    cluster.promote(new)
    cluster.kill(old)
    cluster.kill(new)
    cluster.heal()
    assert cluster.writer == new
    assert set(cluster.readers) == {old, late}
    cluster.execute("INSERT INTO note VALUES (1)")
    cluster.wait_in_sync(5)


@pytest.mark.parametrize("shared", [POSTGRES], indirect=True, ids=repr)
def test_heal_waits_for_servers_that_recover_from_a_crash(cluster: Cluster) -> None:
    """A server that has lost one of its processes refuses connections for a while, though it runs. heal() waits for that."""
    for instance in cluster.instances:
        ((lost,),) = cluster.execute("SELECT pid FROM pg_stat_activity WHERE backend_type = 'checkpointer'", instance=instance)
        os.kill(lost, signal.SIGKILL)
    cluster.heal()
    assert [cluster.execute("SELECT 1", instance=instance) for instance in cluster.instances] == 3 * [[(1,)]]


def test_what_makes_no_sense_is_refused(cluster: Cluster) -> None:
    with pytest.raises(LocalClusterError, match="no reader"):
        cluster.promote(cluster.writer)
    with pytest.raises(ValueError, match="is the writer"):
        cluster.rejoin(cluster.writer)
    cluster.kill(cluster.readers[0])
    with pytest.raises(LocalClusterError, match="cannot be frozen"):
        cluster.freeze(next(i for i in cluster.instances if not i.running))
    with pytest.raises(LocalClusterError, match="started already"):
        cluster.start()
    with pytest.raises(LocalClusterError, match="not started"):
        _ = engine_of(cluster).make().writer


@each_engine
def test_synchronous_replication_loses_nothing_acknowledged(engine: Engine) -> None:
    """With synchronous replication no acknowledged write is lost."""
    with engine.make(readers=2, synchronous=True) as cluster:
        cluster.execute("CREATE TABLE note (id int PRIMARY KEY)")
        for n in range(3):
            acknowledged = n * 20
            for i in range(20):
                cluster.execute("INSERT INTO note VALUES (%s)", n * 20 + i)
                acknowledged += 1
            old = cluster.writer
            cluster.kill(old)
            cluster.promote()
            assert len(notes(cluster)) == acknowledged
            cluster.rejoin(old)


# -- what one can do with it ------------------------------------------------------------------------------------------


def test_readers_start_with_less_than_initdb_has() -> None:
    """Settings that a reader must not undercut may be small, and hold on all instances."""
    small = {"max_connections": "30", "max_worker_processes": "4", "max_locks_per_transaction": "32"}
    with PostgresCluster(readers=1, settings=small) as cluster:
        for instance in cluster.instances:
            assert {name: cluster.execute(f"SHOW {name}", instance=instance)[0][0] for name in small} == small
        cluster.kill(cluster.writer)
        cluster.promote()
        cluster.heal()
        assert len(cluster.readers) == 1


def test_importing_the_local_clusters_imports_no_driver() -> None:
    code = "import sys, aurora_router.local, aurora_router.local.pytest_plugin; print({'psycopg', 'pymysql'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], env=with_package(), capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


@pytest.mark.parametrize("chosen", ["", "mariadb"], ids=["the default", "mariadb"])
def test_the_pytest_plugin_gives_each_test_a_whole_cluster(tmp_path: Path, chosen: str) -> None:
    conftest = 'pytest_plugins = ["aurora_router.local.pytest_plugin"]'
    if chosen:
        conftest += f"""
import pytest
@pytest.fixture(scope="session")
def aurora_engine():
    return "{chosen}"
"""
    (tmp_path / "conftest.py").write_text(conftest)
    (tmp_path / "test_service.py").write_text(
        """
def test_kill(aurora_cluster):
    aurora_cluster.kill(aurora_cluster.writer)
    aurora_cluster.promote()

def test_whole(aurora_cluster):
    assert all(instance.running for instance in aurora_cluster.instances)
    assert len(aurora_cluster.readers) == 2

def test_factory(aurora_cluster_factory, aurora_engine):
    other = aurora_cluster_factory(readers=0)
    assert other.execute("SELECT 1") == [(1,)]
    assert other.url.startswith(aurora_engine)
"""
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, env=with_package(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert "3 passed" in done.stdout
