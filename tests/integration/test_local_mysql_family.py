"""Particulars of local clusters of MySQL and MariaDB: late readers, kept and lost writes, and the answers of instances."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pymysql
import pytest

from aurora_router.core.gtid import mariadb_epoch
from aurora_router.local import CLUSTERS, LocalClusterError, LocalInstance, MariadbCluster, MysqlCluster
from tests.engines import here
from tests.integration.shop import eventually

Cluster = MariadbCluster | MysqlCluster
HERE = [CLUSTERS[name] for name in here("mariadb", "mysql")]

each_kind = pytest.mark.parametrize("kind", HERE)
mariadb_only = pytest.mark.parametrize("shared", [MariadbCluster], indirect=True)


@pytest.fixture(scope="module", params=HERE)
def shared(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    with request.param(readers=2) as cluster:
        cluster.execute("CREATE TABLE note (id int AUTO_INCREMENT PRIMARY KEY)")
        yield cluster


@pytest.fixture
def cluster(shared: Cluster) -> Cluster:
    shared.heal()
    shared.execute("TRUNCATE TABLE note")
    shared.wait_in_sync()
    return shared


def notes(cluster: Cluster, instance: LocalInstance | None = None) -> list[int]:
    return [row[0] for row in cluster.execute("SELECT id FROM note ORDER BY id", instance=instance)]


class Writes:
    """A thread that writes into `note` as the application, as fast as possible, for the length of a `with`."""

    def __init__(self, cluster: Cluster) -> None:
        self.acknowledged: list[int] = []
        self._connection = pymysql.connect(
            host=cluster.writer.host,
            port=cluster.writer.port,
            user="app",
            password=cluster.app_password,
            database="app",
            autocommit=True,
            ssl_disabled=True,
        )
        self._over = False
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        with self._connection.cursor() as cursor:
            while not self._over:
                try:
                    cursor.execute("INSERT INTO note VALUES ()")
                except pymysql.err.OperationalError:  # The writer was killed.
                    return
                self.acknowledged.append(cursor.lastrowid)

    def __enter__(self) -> Writes:
        self._thread.start()
        eventually(lambda: len(self.acknowledged) > 20)
        return self

    def __exit__(self, *_: object) -> None:
        self._over = True
        self._thread.join()
        self._connection.close()


# -- late readers


def test_a_late_reader_shows_each_commit_that_much_later(cluster: Cluster) -> None:
    late = cluster.readers[0]
    cluster.set_lag(late, 0.3)
    for n in range(1, 6):
        before = time.monotonic()
        cluster.execute("INSERT INTO note VALUES (%s)", n)
        eventually(lambda n=n: n in notes(cluster, late))
        assert time.monotonic() - before >= 0.3


def test_a_late_reader_delays_commits_side_by_side(cluster: Cluster) -> None:
    """The delays of commits on a late reader run side by side, not one after the other."""
    late = cluster.readers[0]
    cluster.set_lag(late, 0.3)
    before = time.monotonic()
    for _ in range(100):
        cluster.execute("INSERT INTO note VALUES ()")
    cluster.wait_in_sync()
    assert len(notes(cluster, late)) == 100
    assert time.monotonic() - before < 20  # One after the other they would take 30 s.


def test_late_and_paused_readers_do_not_look_broken(cluster: Cluster) -> None:
    """Neither a late reader nor a paused one says that it is broken."""
    late, paused = cluster.readers
    cluster.set_lag(late, 60)
    cluster.pause_replay(paused)
    cluster.execute("INSERT INTO note VALUES (1)")
    written = cluster._words.position(cluster._ask(cluster.writer, cluster._words.written))
    eventually(lambda: cluster._received(paused).covers(written))
    for reader in (late, paused):
        assert cluster._runs(reader, "IO", "SQL")
        assert notes(cluster, reader) == []


def test_a_promoted_late_reader_has_all_the_dead_writer_sent(cluster: Cluster) -> None:
    """A late reader that is promoted has all that the dead writer sent."""
    late, current = cluster.readers
    cluster.set_lag(late, 0.01)
    cluster.execute("INSERT INTO note VALUES (1)")
    cluster.wait_in_sync()
    cluster.set_lag(late, 60)
    cluster.execute("INSERT INTO note VALUES (2)")
    eventually(lambda: notes(cluster, current) == [1, 2])
    eventually(lambda: cluster._lines[late.name].buffered_bytes)
    cluster.kill(cluster.writer)
    cluster.kill(current)
    assert cluster.promote() == late
    assert notes(cluster) == [1, 2]


def test_a_reader_stays_late_or_paused_after_a_promotion(cluster: Cluster) -> None:
    """A reader stays late or paused when it follows a new writer."""
    for late in (True, False):
        new, other = cluster.readers
        cluster.set_lag(other, 60) if late else cluster.pause_replay(other)
        cluster.execute("INSERT INTO note VALUES ()")
        before = notes(cluster, other)
        cluster.kill(cluster.writer)
        cluster.promote(new)
        cluster.execute("INSERT INTO note VALUES ()")
        with pytest.raises(TimeoutError, match=other.name):
            cluster.wait_in_sync(0.3)
        assert notes(cluster, other) == before
        cluster.heal()
        assert notes(cluster, other) == notes(cluster)


# -- what is kept, and what is lost


def test_what_was_acknowledged_survives_the_kill_of_the_writer(cluster: Cluster) -> None:
    with Writes(cluster) as writes:
        cluster.kill(cluster.writer)
    cluster.restart(cluster.writer)
    assert set(writes.acknowledged) <= set(notes(cluster))
    cluster.wait_in_sync()
    for reader in cluster.readers:
        assert notes(cluster, reader) == notes(cluster)


def test_half_a_transaction_of_a_dead_writer_is_not_promoted(cluster: Cluster) -> None:
    """A reader that has half of a dead writer's transaction is promoted soon, and without that transaction."""
    cluster.execute("CREATE TABLE IF NOT EXISTS picture (number int, content longblob)")
    reader, other = cluster.readers
    cluster.wait_in_sync()
    cluster.freeze(reader)
    with cluster.writer.connect(autocommit=False) as session, session.cursor() as cursor:
        for number in range(30):  # This is more than the sockets in between hold.
            cursor.execute("INSERT INTO picture VALUES (%s, repeat('x', 1000000))", (number,))
        session.commit()
    cluster.kill(other)
    cluster.kill(cluster.writer)
    cluster.thaw(reader)
    began = time.monotonic()
    cluster.promote(reader)
    assert time.monotonic() - began < 10
    assert cluster.execute("SELECT count(*) FROM picture") == [(0,)]


def test_a_copy_of_a_writer_that_is_writing_is_exact(cluster: Cluster) -> None:
    old, new = cluster.writer, cluster.readers[0]
    cluster.promote(new)
    cluster.execute("INSERT INTO note VALUES (1000000)", instance=old)  # a split brain
    with Writes(cluster) as writes:
        cluster.rejoin(old)
        written = len(writes.acknowledged)
        eventually(lambda: len(writes.acknowledged) > written)
    cluster.wait_in_sync()
    assert [*writes.acknowledged] == notes(cluster) == notes(cluster, old)


@each_kind
def test_without_a_reader_a_synchronous_commit_waits(kind: type[Cluster]) -> None:
    with kind(readers=1, synchronous=True) as cluster:
        cluster.execute("CREATE TABLE note (id int PRIMARY KEY)")
        (reader,) = cluster.readers
        cluster.kill(reader)
        with pytest.raises(pymysql.err.OperationalError, match="timed out"), cluster.writer.connect(read_timeout=1) as session:
            session.cursor().execute("INSERT INTO note VALUES (1)")
        assert notes(cluster) == []
        cluster.restart(reader)
        eventually(lambda: notes(cluster) == [1])


@each_kind
def test_a_deposed_synchronous_writer_acknowledges_nothing(kind: type[Cluster]) -> None:
    """In a synchronous cluster a deposed writer acknowledges nothing any more."""
    with kind(readers=2, synchronous=True) as cluster:
        cluster.execute("CREATE TABLE note (id int AUTO_INCREMENT PRIMARY KEY)")
        old = cluster.writer
        with Writes(cluster) as writes:
            cluster.promote()
            cluster.execute("INSERT INTO note VALUES (1000000)")
            cluster.rejoin(old)
        cluster.wait_in_sync()
        assert {*writes.acknowledged, 1000000} <= set(notes(cluster))
        assert notes(cluster, old) == notes(cluster)


@each_kind
def test_a_frozen_synchronous_writer_is_replaced_soon(kind: type[Cluster]) -> None:
    """A frozen writer of a synchronous cluster is replaced soon."""
    with kind(readers=2, synchronous=True) as cluster:
        cluster.execute("CREATE TABLE note (id int PRIMARY KEY)")
        old = cluster.writer
        cluster.freeze(old)
        before = time.monotonic()
        cluster.promote()
        cluster.execute("INSERT INTO note VALUES (1)")
        assert time.monotonic() - before < 5, "that is how long its readers would say farewell by default"
        cluster.rejoin(old)
        cluster.wait_in_sync()
        assert notes(cluster, old) == [1]


def test_a_reader_with_a_transaction_of_its_own_is_healed(cluster: Cluster) -> None:
    """A reader that has made a transaction of its own is healed."""
    reader = cluster.readers[0]
    if isinstance(cluster, MariadbCluster):
        # FLUSH TABLES takes a GTID even on a read-only server, and the writer takes the same one.
        cluster.execute("FLUSH TABLES", instance=reader)
    else:
        cluster._order(reader, "SET GLOBAL read_only = OFF", "INSERT INTO app.note VALUES (1)", "SET GLOBAL super_read_only = ON")
    cluster.execute("INSERT INTO note VALUES (1)")
    eventually(lambda: not cluster._runs(reader, "SQL"))
    with pytest.raises(LocalClusterError, match="cannot replay"):
        cluster.promote(reader)
    cluster.heal()
    assert notes(cluster, reader) == [1]


# -- what the instances say


@mariadb_only
def test_all_instances_tell_when_the_newest_writer_began(cluster: Cluster) -> None:
    epochs = []
    for _ in range(2):
        cluster.promote()
        cluster.execute("INSERT INTO note VALUES ()")
        cluster.heal()
        said = {mariadb_epoch(cluster.execute("SELECT @@gtid_binlog_state", instance=i)[0][0]) for i in cluster.instances}
        assert len(said) == 1
        epochs.extend(said)
    assert epochs[0] < epochs[1]


def test_the_application_may_use_its_database_and_monitor(cluster: Cluster) -> None:
    """The application's user may use its database and look at replication."""
    monitor = "BINLOG MONITOR, SLAVE MONITOR" if isinstance(cluster, MariadbCluster) else "REPLICATION CLIENT"
    grants = sorted(row[0].partition(" IDENTIFIED")[0] for row in cluster.execute("SHOW GRANTS FOR app"))
    assert grants == ["GRANT ALL PRIVILEGES ON `app`.* TO `app`@`%`", f"GRANT {monitor} ON *.* TO `app`@`%`"]
    with type(cluster)(readers=0, monitor_privileges=False) as other:
        grants = sorted(row[0].partition(" IDENTIFIED")[0] for row in other.execute("SHOW GRANTS FOR app"))
        assert grants == ["GRANT ALL PRIVILEGES ON `app`.* TO `app`@`%`", "GRANT USAGE ON *.* TO `app`@`%`"]


def test_the_roles_are_there_after_a_promotion(cluster: Cluster) -> None:
    old = cluster.writer
    cluster.promote()
    read_only = {i: cluster.execute("SELECT @@read_only", instance=i)[0][0] for i in cluster.instances}
    assert [i for i, on in read_only.items() if not on] == [i for i in cluster.instances if i in (old, cluster.writer)]
    cluster.heal()
    assert cluster.execute("SELECT @@read_only", instance=old) == [(1,)]
