"""MySQL and MariaDB in containers. All begin empty, and the readers replay the writer's history by GTIDs."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar

import pymysql
from testcontainers.core.container import DockerContainer

from tests.containers.cluster import APP, DATABASE, ContainerCluster, ContainerInstance


class MysqlContainers(ContainerCluster):
    """MySQL: a source and two GTID replicas."""

    image = "mysql:8.4"
    port = 3306
    scheme = "mysql+pymysql"
    # Commits survive a kill of the server, but not of the machine. While a reader connects to a writer whose address is gone, it
    # can be stopped, and so promoted, only after that attempt has ended: after 60 s by default.
    options: ClassVar[Sequence[str]] = (
        "--gtid-mode=ON",
        "--enforce-gtid-consistency=ON",
        "--innodb-flush-log-at-trx-commit=2",
        "--sync-binlog=0",
        "--replica-net-timeout=2",
    )

    def _container(self, instance: ContainerInstance, **options: Any) -> DockerContainer:
        env = {"MYSQL_ROOT_PASSWORD": self.password, "MYSQL_DATABASE": DATABASE, "MYSQL_INITDB_SKIP_TZINFO": "1"}
        number = self.instances.index(instance) + 1
        return DockerContainer(self.image, env=env, **options).with_command([f"--server-id={number}", *self.options])

    def _set_up(self) -> None:
        with ThreadPoolExecutor() as pool:
            list(pool.map(self._start, self.instances))
        for instance in self.instances:
            self._wait_ready(instance)
            self._forget(instance)
        for reader in self.readers:
            self._follow(reader, self.writer)
        self.execute(f"CREATE USER {APP}@'%%' IDENTIFIED BY %s", self.password)
        self.execute(f"GRANT ALL ON {DATABASE}.* TO {APP}@'%'")
        self._let_monitor()

    def _connect(self, instance: ContainerInstance) -> Any:
        return pymysql.connect(
            host=instance.host,
            port=instance.port,
            user="root",
            password=self.password,
            database=DATABASE,
            connect_timeout=5,
            autocommit=True,
        )

    def restart(self, instance: ContainerInstance) -> None:
        super().restart(instance)
        if instance in self.readers:
            self._follow(instance, self.writer)  # makes it read-only again

    def _promote(self, instance: ContainerInstance, followers: Sequence[ContainerInstance]) -> None:
        self._stop_following(instance)
        for reader in followers:
            self._follow(reader, instance)

    def _rejoin(self, instance: ContainerInstance) -> None:
        self._follow(instance, self.writer)

    def _all(self, instance: ContainerInstance, *statements: str) -> None:
        for statement in statements:
            self.execute(statement, instance=instance)

    # -- the statements of each kind of server

    def _let_monitor(self) -> None:
        self.execute(f"GRANT REPLICATION CLIENT ON *.* TO {APP}@'%'")

    def _forget(self, instance: ContainerInstance) -> None:
        """Clear the log: every instance has the image's own objects already, so they must not be replicated."""
        self._all(instance, "RESET BINARY LOGS AND GTIDS")

    def _follow(self, instance: ContainerInstance, writer: ContainerInstance) -> None:
        self._all(
            instance,
            "SET GLOBAL super_read_only = ON",
            "STOP REPLICA",
            f"CHANGE REPLICATION SOURCE TO SOURCE_HOST = '{writer.host}', SOURCE_USER = 'root',"
            f" SOURCE_PASSWORD = '{self.password}', SOURCE_CONNECT_RETRY = 1, SOURCE_RETRY_COUNT = 86400,"
            " SOURCE_AUTO_POSITION = 1, GET_SOURCE_PUBLIC_KEY = 1",
            "START REPLICA",
        )

    def _stop_following(self, instance: ContainerInstance) -> None:
        self._all(instance, "STOP REPLICA", "RESET REPLICA ALL", "SET GLOBAL read_only = OFF")

    def wait_in_sync(self) -> None:
        ((executed,),) = self.execute("SELECT @@global.gtid_executed")
        for reader in self.readers:
            if self.execute("SELECT WAIT_FOR_EXECUTED_GTID_SET(%s, 60)", executed, instance=reader) != [(0,)]:
                raise TimeoutError(f"waited 60 s for {reader.name} to replay")


class Mysql97Containers(MysqlContainers):
    """The newest MySQL."""

    image = "mysql:9.7"


class Mysql80Containers(MysqlContainers):
    """The oldest MySQL, which has an older name for one statement."""

    image = "mysql:8.0"

    def _forget(self, instance: ContainerInstance) -> None:
        self._all(instance, "RESET MASTER")


class MariadbContainers(MysqlContainers):
    """MariaDB, with its own kind of GTIDs."""

    image = "mariadb:11.8"
    scheme = "mariadb+pymysql"
    options = (
        "--log-bin",
        "--log-slave-updates",
        "--innodb-flush-log-at-trx-commit=2",
        "--sync-binlog=0",
        "--slave-net-timeout=2",
    )

    def _let_monitor(self) -> None:
        self.execute(f"GRANT SLAVE MONITOR, BINLOG MONITOR ON *.* TO {APP}@'%'")

    def _forget(self, instance: ContainerInstance) -> None:
        self._all(instance, "RESET MASTER", "SET GLOBAL gtid_slave_pos = ''")

    def _follow(self, instance: ContainerInstance, writer: ContainerInstance) -> None:
        self._all(
            instance,
            "SET GLOBAL read_only = ON",
            "STOP SLAVE",
            "SET GLOBAL gtid_slave_pos = @@gtid_current_pos",  # a former writer counts its own writes as replayed
            f"CHANGE MASTER TO MASTER_HOST = '{writer.host}', MASTER_USER = 'root', MASTER_PASSWORD = '{self.password}',"
            " MASTER_CONNECT_RETRY = 1, MASTER_USE_GTID = slave_pos",
            "START SLAVE",
        )

    def _stop_following(self, instance: ContainerInstance) -> None:
        self._all(instance, "STOP SLAVE", "RESET SLAVE ALL", "SET GLOBAL read_only = OFF")

    def wait_in_sync(self) -> None:
        ((position,),) = self.execute("SELECT @@gtid_current_pos")
        for reader in self.readers:
            if self.execute("SELECT MASTER_GTID_WAIT(%s, 60)", position, instance=reader) != [(0,)]:
                raise TimeoutError(f"waited 60 s for {reader.name} to replay")
