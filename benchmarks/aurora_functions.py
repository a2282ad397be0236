"""Lets a plain PostgreSQL cluster answer the two functions by which Amazon Aurora tells a driver what its instances are.

The AWS Advanced Python Wrapper asks these. Aurora's instances know all of each other through their storage; here each answers
what it knows for certain: whether it is the writer itself, which writer it follows, and, the writer, who streams from it. So the
answer is never behind a promotion: on the new writer it is right from the moment in which that takes writes.

NameService stands in for Aurora's DNS. An instance has a name of its own; the cluster's name leads to the writer, at once after a
promotion, where Aurora's follows some seconds later.
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
    """Create the functions in the application's database; the readers get them as they get all else."""
    instances = ", ".join(f"('{instance.name}', '{instance.host}')" for instance in cluster.instances)
    with cluster.writer.connect() as connection:
        connection.execute(_FUNCTIONS.replace("%(instances)s", instances).encode())


def addresses(cluster: Cluster[Any]) -> dict[str, str]:
    """The address of each instance's name."""
    return {f"{instance.name}.{DOMAIN}": instance.host for instance in cluster.instances}


class NameService:
    """What Aurora's DNS would say, for the drivers and for `socket.gethostbyname()` of this process.

    addresses: of the instances' names. writer: the address to which the cluster's name leads now; may be set at any time.
    """

    def __init__(self, addresses: Mapping[str, str], writer: str) -> None:
        self.writer = writer
        self._addresses = dict(addresses)

    def resolve(self, name: str) -> str:
        """Raises socket.gaierror for a name that is not of this cluster: nothing is asked of the network."""
        address = self.writer if name == CLUSTER_NAME else self._addresses.get(name)
        if address is None:
            raise socket.gaierror(socket.EAI_NONAME, f"{name} is not of this cluster")
        return address

    def take_over(self) -> None:
        """Answer `socket.gethostbyname()`."""
        socket.gethostbyname = self.resolve

    def connect(self, conninfo: str = "", **options: Any) -> psycopg.Connection[Any]:
        """`psycopg.connect()` to one of these names."""
        return psycopg.connect(conninfo, hostaddr=self.resolve(options["host"]), **options)
