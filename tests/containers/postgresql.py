"""PostgreSQL in containers. The readers copy the writer and stream from it."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import psycopg
from testcontainers.core.container import DockerContainer

from tests.containers.cluster import APP, DATABASE, ContainerCluster, ContainerInstance, until

# The data is worth nothing, so fsync is off. Without autovacuum, only a test moves positions.
SETTINGS = ("fsync=off", "autovacuum=off", "wal_keep_size=1GB", "wal_retrieve_retry_interval=100ms", "shared_buffers=32MB")

# This runs before the image's own entrypoint, which leaves existing data as it is.
COPY_THE_WRITER = """
[ -s "$PGDATA/PG_VERSION" ] || pg_basebackup -h "$WRITER" -U postgres -D "$PGDATA" -R --checkpoint=fast --no-sync
exec docker-entrypoint.sh "$@"
"""

LET_READERS_IN = b"""echo 'host replication all all scram-sha-256' >> "$PGDATA/pg_hba.conf"\n"""


class PostgresContainers(ContainerCluster):
    """A writer and two streaming readers."""

    image = "postgres:17"
    port = 5432
    scheme = "postgresql+psycopg"

    def _container(self, instance: ContainerInstance, **options: Any) -> DockerContainer:
        env = {"POSTGRES_PASSWORD": self.password, "POSTGRES_DB": DATABASE, "POSTGRES_INITDB_ARGS": "--no-sync"}
        if instance != self.writer:
            options["entrypoint"] = ["bash", "-ceu", COPY_THE_WRITER, "reader"]
            env |= {"WRITER": self.writer.host, "PGPASSWORD": self.password}
        container = DockerContainer(self.image, env=env, **options)
        container.with_command(["postgres", *(part for setting in SETTINGS for part in ("-c", setting))])
        return container.with_copy_into_container(LET_READERS_IN, "/docker-entrypoint-initdb.d/replication.sh")

    def _set_up(self) -> None:
        self._start(self.writer)
        self._wait_ready(self.writer)
        with ThreadPoolExecutor() as pool:
            list(pool.map(self._start, self.readers))
        for statement in (
            f"CREATE ROLE {APP} LOGIN PASSWORD '{self.password}'",
            f"GRANT pg_monitor TO {APP}",
            f"ALTER DATABASE {DATABASE} OWNER TO {APP}",
            f"ALTER DEFAULT PRIVILEGES GRANT ALL ON TABLES TO {APP}",
        ):
            self.execute(statement)
        for reader in self.readers:
            self._wait_ready(reader)

    def _connect(self, instance: ContainerInstance) -> Any:
        return psycopg.connect(
            f"host={instance.host} port={instance.port} user=postgres password={self.password} dbname={DATABASE}",
            connect_timeout=5,
            autocommit=True,
        )

    def _promote(self, instance: ContainerInstance, followers: Sequence[ContainerInstance]) -> None:
        for reader in followers:
            conninfo = f"host={instance.host} user=postgres password={self.password}"
            self.execute(f"ALTER SYSTEM SET primary_conninfo = '{conninfo}'", instance=reader)
            self.execute("SELECT pg_reload_conf()", instance=reader)
        assert self.execute("SELECT pg_promote()", instance=instance) == [(True,)]

    def _rejoin(self, instance: ContainerInstance) -> None:
        # It starts without its data, because that may differ from the writer's by now.
        self._start(instance)
        self._wait_ready(instance)

    def wait_in_sync(self) -> None:
        self.execute("SELECT pg_logical_emit_message(true, 'in sync', '')")
        ((written,),) = self.execute("SELECT pg_current_wal_flush_lsn()")
        for reader in self.readers:
            until(partial(self._has, reader, written), f"{reader.name} to replay")

    def _has(self, reader: ContainerInstance, written: str) -> bool:
        return self.execute("SELECT pg_last_wal_replay_lsn() >= %s::pg_lsn", written, instance=reader) == [(True,)]
