"""Let a plain PostgreSQL cluster answer the two functions by which Amazon Aurora tells a driver about its instances.

The AWS Advanced Python Wrapper calls them. Aurora's instances know all of each other through their storage. Here an instance
knows for certain whether it is the writer, and which writer it follows. It answers nothing else. The writer also knows the
readers that stream from it. So no answer is late after a promotion: the new writer answers correctly as soon as it takes writes.

NameService stands in for Aurora's DNS. An instance has a name of its own. The cluster's name leads to the new writer at once
after a promotion, but in Aurora only some seconds later.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping
from typing import Any

import psycopg

from aurora_router.local.cluster import Cluster

DOMAIN = "local.us-east-1.rds.amazonaws.com"
CLUSTER_NAME = f"app.cluster-{DOMAIN}"

_FUNCTIONS = """
SET allow_system_table_mods = on;

CREATE FUNCTION pg_catalog.aurora_db_instance_identifier() RETURNS text LANGUAGE sql STABLE AS
$$ SELECT current_setting('cluster_name') $$;

CREATE FUNCTION pg_catalog.aurora_replica_status() RETURNS TABLE (
    server_id text, session_id text, durable_lsn bigint, highest_lsn_rcvd bigint, current_read_lsn bigint, cpu real,
    replica_lag_in_msec real, last_update_timestamp timestamptz
) LANGUAGE sql STABLE SECURITY DEFINER AS $$
    WITH instance (server_id, host) AS (VALUES %(instances)s),
    self AS (SELECT aurora_db_instance_identifier() AS server_id, pg_is_in_recovery() AS reads),
    writer AS (
        SELECT instance.server_id FROM instance, self
        WHERE CASE WHEN reads THEN host = substring(current_setting('primary_conninfo') FROM 'host=([^ ]+)')
                   ELSE instance.server_id = self.server_id END
    )
    SELECT
        instance.server_id,
        CASE WHEN instance.server_id = writer.server_id THEN 'MASTER_SESSION_ID' ELSE md5(instance.server_id) END,
        CASE WHEN NOT reads AND instance.server_id = self.server_id THEN pg_current_wal_flush_lsn() - '0/0' END::bigint,
        CASE WHEN reads AND instance.server_id = self.server_id THEN pg_last_wal_receive_lsn() - '0/0'
             ELSE streaming.flush_lsn - '0/0' END::bigint,
        CASE WHEN reads AND instance.server_id = self.server_id THEN pg_last_wal_replay_lsn() - '0/0'
             ELSE streaming.replay_lsn - '0/0' END::bigint,
        NULL::real,
        (extract(epoch FROM streaming.replay_lag) * 1000)::real,
        CASE WHEN instance.server_id = self.server_id THEN NULL
             WHEN reads THEN coalesce((SELECT last_msg_receipt_time FROM pg_stat_wal_receiver), 'epoch')
             ELSE coalesce(streaming.reply_time, 'epoch') END
    FROM instance CROSS JOIN self CROSS JOIN writer
    LEFT JOIN pg_stat_replication AS streaming ON streaming.application_name = instance.server_id
$$;
"""


def install(cluster: Cluster[Any]) -> None:
    """Create the functions in the application's database. The readers get them by replication."""
    instances = ", ".join(f"('{instance.name}', '{instance.host}')" for instance in cluster.instances)
    with cluster.writer.connect() as connection:
        connection.execute(_FUNCTIONS.replace("%(instances)s", instances).encode())


def addresses(cluster: Cluster[Any]) -> dict[str, str]:
    """Return the address of each instance's name."""
    return {f"{instance.name}.{DOMAIN}": instance.host for instance in cluster.instances}


class NameService:
    """The answers of Aurora's DNS, for the drivers and for `socket.gethostbyname()` of this process.

    addresses: the addresses of the instances' names
    writer: the address to which the cluster's name leads now; may be set at any time
    """

    def __init__(self, addresses: Mapping[str, str], writer: str) -> None:
        self.writer = writer
        self._addresses = dict(addresses)

    def resolve(self, name: str) -> str:
        """Return the address of a name, found without the network.

        Raises socket.gaierror for a name that is not of this cluster.
        """
        address = self.writer if name == CLUSTER_NAME else self._addresses.get(name)
        if address is None:
            raise socket.gaierror(socket.EAI_NONAME, f"{name} is not of this cluster")
        return address

    def take_over(self) -> None:
        """Answer `socket.gethostbyname()`."""
        socket.gethostbyname = self.resolve

    def connect(self, conninfo: str = "", **options: Any) -> psycopg.Connection[Any]:
        """Call `psycopg.connect()` with one of these names as the host."""
        return psycopg.connect(conninfo, hostaddr=self.resolve(options["host"]), **options)
