"""Local clusters: real servers are started, lost and brought back, and nothing stays behind."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psycopg
import pymysql
import pytest
from sqlalchemy import NullPool, create_engine
from sqlalchemy.exc import OperationalError

import aurora_router
from aurora_router.local import CLUSTERS, LocalClusterError, LocalInstance, MariadbCluster, MysqlCluster, PostgresCluster
from aurora_router.local.system import find_mariadb, find_mysql, find_postgres
from tests.engines import here

Cluster = PostgresCluster | MariadbCluster | MysqlCluster


@dataclass(frozen=True)
class Engine:
    """What differs between the engines, in what a client sees of a cluster."""

    make: Callable[..., Any]
    error: type[Exception]  # The driver's error for any fault of a connection.
    refused: str  # A part of its message for a wrong password.
    own_database: str
    data_directory: str
    wrong_setting: str
    impatient: Mapping[str, object] = field(default_factory=lambda: {"connect_timeout": 1})

    def __repr__(self) -> str:
        return str(self.make.__name__)


POSTGRES = Engine(
    make=PostgresCluster,
    error=psycopg.OperationalError,
    refused="password authentication failed",
    own_database="SELECT current_user::text, current_database()::text",
    data_directory="SHOW data_directory",
    wrong_setting="shared_buffers",
)
MARIADB = Engine(
    make=MariadbCluster,
    error=pymysql.err.OperationalError,
    refused="Access denied",
    own_database="SELECT substring_index(current_user(), '@', 1), database()",
    data_directory="SELECT @@datadir",
    wrong_setting="innodb_buffer_pool_size",
    impatient={"connect_timeout": 1, "read_timeout": 1},
)
MYSQL = replace(MARIADB, make=MysqlCluster, wrong_setting="gtid_mode")
ENGINES: Mapping[object, Engine] = {PostgresCluster: POSTGRES, MariadbCluster: MARIADB, MysqlCluster: MYSQL}
HERE = [ENGINES[CLUSTERS[name]] for name in here(*CLUSTERS)]

each_engine = pytest.mark.parametrize("engine", HERE, ids=repr)


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


def engine_of(cluster: Cluster) -> Engine:
    return ENGINES[type(cluster)]


def ask(connection: Any, query: str) -> Any:
    with connection.cursor() as cursor:
        cursor.execute(query)
        return cursor.fetchone()


def notes(cluster: Cluster, instance: LocalInstance | None = None) -> list[int]:
    return [row[0] for row in cluster.execute("SELECT id FROM note ORDER BY id", instance=instance)]


def wait(condition: Callable[[], object], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def processes_in(directory: str) -> list[int]:
    """Processes that work in the directory; a zombie works nowhere."""
    found = []
    for cwd in Path("/proc").glob("[0-9]*/cwd"):
        try:
            where = os.readlink(cwd)
        except OSError:
            continue
        if where.startswith(directory):
            found.append(int(cwd.parent.name))
    return found


# -- what a cluster is


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


# -- what can happen to it


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


# -- nothing stays behind


@each_engine
def test_a_server_that_cannot_start_says_why_and_leaves_nothing(engine: Engine) -> None:
    cluster = engine.make(readers=0, settings={engine.wrong_setting: "many"})
    with pytest.raises(LocalClusterError, match=engine.wrong_setting):
        cluster.start()
    assert repr(cluster) == f"<{engine} stopped>"
    cluster.stop()


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


def test_programs_that_are_missing_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(LocalClusterError, match=r"has no postgres, initdb, pg_basebackup, pg_rewind"):
        PostgresCluster(bin_dir=tmp_path).start()
    monkeypatch.setenv("PGBIN", str(tmp_path))
    with pytest.raises(LocalClusterError, match="has no postgres"):
        find_postgres()
    monkeypatch.delenv("PGBIN")
    monkeypatch.setattr("aurora_router.local.system._in_wheel", list)
    monkeypatch.setattr("aurora_router.local.system._in_system", list)
    with pytest.raises(LocalClusterError, match=r"pip install 'aurora-router\[local\]'"):
        find_postgres()


def test_programs_of_mariadb_that_are_missing_are_named(tmp_path: Path) -> None:
    with pytest.raises(LocalClusterError, match="no mariadbd found"):
        MariadbCluster(bin_dir=tmp_path).start()
    server, install = find_mariadb()
    assert find_mariadb(server.parent) == (server, install)
    (tmp_path / "mariadbd").symlink_to(server)
    with pytest.raises(LocalClusterError, match=f"no mariadb-install-db found in {tmp_path}: install"):
        find_mariadb(tmp_path)


def test_only_a_mysqld_of_mysql_that_is_new_enough_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def says(name: str, version: str) -> Path:
        (tmp_path / name).mkdir()
        program = tmp_path / name / "mysqld"
        program.write_text(f"#!/bin/sh\necho '/usr/sbin/mysqld  Ver {version}'\n")
        program.chmod(0o755)
        return program

    (tmp_path / "mysqld").symlink_to(find_mariadb()[0])
    with pytest.raises(LocalClusterError, match=f"no MySQL 8.0.30 or newer found in {tmp_path}: install"):
        MysqlCluster(bin_dir=tmp_path).start()
    old = says("old", "8.0.29 for Linux on x86_64 (MySQL Community Server - GPL)")
    with pytest.raises(LocalClusterError, match=f"{old} has 8.0.29"):
        find_mysql(old.parent)
    new = says("new", "8.4.6-6 for Linux on x86_64 (Percona Server (GPL), Release 6, Revision 47d1c8c)")
    monkeypatch.setenv("PATH", os.pathsep.join(map(str, (tmp_path, old.parent, new.parent))))
    assert find_mysql() == new


@each_engine
def test_a_stopped_cluster_is_gone_and_can_be_started_anew(engine: Engine) -> None:
    cluster = engine.make(readers=1)
    for _ in range(2):
        with cluster:
            directory = data_directory(cluster)
            cluster.freeze(cluster.readers[0])
            pids = [i.pid for i in cluster.instances]
        assert not os.path.exists(directory)
        assert processes_in(directory) == []
        assert not any(os.path.exists(f"/proc/{pid}") for pid in pids)


def data_directory(cluster: Cluster) -> str:
    return str(Path(cluster.execute(engine_of(cluster).data_directory)[0][0]).parent)


CHILD = """
import os, pathlib, sys, time
from aurora_router.local import {engine}
cluster = {engine}(readers=1).start()
cluster.freeze(cluster.readers[0])
cluster.execute("SELECT 1")
print(pathlib.Path(cluster.execute("{engine.data_directory}")[0][0]).parent, flush=True)
{then}
"""


def child(engine: Engine, then: str) -> tuple[subprocess.Popen[str], str]:
    """A process that has started a cluster, and the cluster's directory."""
    code = CHILD.format(engine=engine, then=then)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, "-c", code], env=with_package(), text=True, **pipes)
    assert process.stdout is not None
    directory = process.stdout.readline().strip()
    if not directory:
        process.communicate()
        pytest.fail(f"the process ended with status {process.returncode} before it had its cluster")
    assert os.path.isdir(directory)
    assert processes_in(directory)
    return process, directory


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT], ids=lambda n: n.name)
@each_engine
def test_no_server_outlives_a_killed_process(engine: Engine, number: signal.Signals) -> None:
    process, directory = child(
        engine,
        "time.sleep(600)"
        if number != signal.SIGINT
        else """
try:
    time.sleep(600)
except KeyboardInterrupt:
    pass""",
    )
    with process:
        process.send_signal(number)
    wait(lambda: not os.path.exists(directory))
    assert processes_in(directory) == []


@each_engine
def test_no_server_outlives_a_process_that_forgot_to_stop(engine: Engine) -> None:
    """No server outlives a process that forgot to stop the cluster."""
    process, directory = child(engine, "sys.stdin.read()")
    with process:
        process.communicate(timeout=20)  # The checks are done, so it may end.
    assert process.returncode == 0
    assert not os.path.exists(directory)  # The interpreter waits at exit until it is removed.
    assert processes_in(directory) == []


@each_engine
def test_a_forked_child_neither_stops_nor_keeps_the_cluster(engine: Engine) -> None:
    """A forked child neither stops the cluster nor keeps it alive."""
    process, directory = child(
        engine,
        """
pid = os.fork()
if pid == 0:
    cluster.stop()
    orphan = os.fork()
    if orphan == 0:
        time.sleep(600)  # lives on when its parents are gone
    print(orphan, flush=True)
    sys.exit()
os.waitpid(pid, 0)
cluster.thaw(cluster.readers[0])
cluster.execute("SELECT 1", instance=cluster.readers[0])
print("alive", flush=True)
time.sleep(600)
""",
    )
    with process:
        assert process.stdout is not None
        orphan = int(process.stdout.readline())
        assert process.stdout.readline() == "alive\n"
        process.kill()
        process.wait()
        wait(lambda: not os.path.exists(directory))
        os.kill(orphan, signal.SIGKILL)


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


def test_programs_that_the_servers_user_cannot_reach_are_copied(tmp_path: Path) -> None:
    found = find_postgres()
    home = tmp_path / found.parent.parent.name / found.parent.name
    home.parent.mkdir()
    (home.parent / home.name).symlink_to(found.parent)
    libraries = found.parent.parent.parent / f"{found.parent.parent.name}.libs"
    if os.geteuid() != 0 or not libraries.is_dir():
        # Without root the servers run as this user, so they can read all that it can.
        with PostgresCluster(readers=0, bin_dir=home / "bin") as cluster:
            assert cluster.execute("SELECT 1") == [(1,)]
        return
    home.unlink()
    shutil.copytree(found.parent, home)
    shutil.copytree(libraries, tmp_path / libraries.name)
    tmp_path.chmod(0o700)
    with PostgresCluster(readers=1, bin_dir=home / "bin") as cluster:
        executable = os.readlink(f"/proc/{cluster.writer.pid}/exe")
        assert executable.startswith(data_directory(cluster))
    assert not os.path.exists(executable)


def with_package() -> dict[str, str]:
    """An environment in which a child finds the package, installed or not."""
    root = str(Path(aurora_router.__file__).parents[1])
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))}
