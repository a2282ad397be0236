"""What the servers of MySQL and MariaDB report about their replication: members of a group, filters, sources, and lag."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from aurora_router.core.gtid import GtidSet


def parse_members(rows: Iterable[Sequence[Any]], me: str) -> str | None:
    """Return why a member of a group cannot be used: "" if it can be used, None if it is in no group now.

    rows: the answer to MEMBERS.
    me: the member's server_uuid.
    """
    rows = list(rows)
    states = {str(member): str(state) for member, state, _ in rows}
    state = states.get(me, "OFFLINE")
    if state == "OFFLINE":
        return None
    if state != "ONLINE":
        return f"it is {state} in its group"
    reachable = sum(state in ("ONLINE", "RECOVERING") for state in states.values())
    if 2 * reachable <= len(states):
        return "most of its group cannot be reached"
    if sum(role == "PRIMARY" for _, _, role in rows) > 1:
        return "its group has several writers, and may have one only: group_replication_switch_to_single_primary_mode()"
    return ""


_SYSTEM = frozenset({"information_schema", "innodb_memcache", "mysql", "performance_schema", "sys"})
"""Schemas that no application writes to. Readers of managed services leave some of their tables out."""


def parse_filters(channels: Sequence[Mapping[str, Any]]) -> str:
    """Return why a reader may lack some of the writer's data: its replication filters; "" if it has none.

    channels: the reader's report of its replication, one row for each source.
    """
    found: dict[str, None] = {}
    for channel in channels:
        for name, value in channel.items():
            if name.startswith("Replicate_") and (kept := outside_system(name, value)):
                found[f"{name}: {kept}"] = None
    return f"it replicates a part of the writer's log only ({'; '.join(found)})" if found else ""


def parse_sources(channels: Sequence[Mapping[str, Any]]) -> frozenset[str]:
    """Return the servers that a reader replicates from, by the names that they have in their identities.

    channels: the reader's report of its replication, one row for each source.
    """
    names = (c.get("Source_UUID") or c.get("Master_UUID") or c.get("Master_Server_Id") for c in channels)
    return frozenset(str(name) for name in names if name)


def outside_system(name: str, value: object) -> str:
    """Return the value of a filter. Of a filter that lists ignored names, leave out the servers' own schemas."""
    listed = [part.strip() for part in str(value or "").split(",")]
    if "_Ignore_" in name:
        listed = [part for part in listed if part.partition(".")[0].strip("`").lower() not in _SYSTEM]
    return ",".join(filter(None, listed))


def parse_replicas(channels: Sequence[Mapping[str, Any]]) -> tuple[float | None, str]:
    """Return how many seconds a reader is behind, and why it replays nothing.

    The seconds are None if unknown. The reason is "" if the reader replays.

    channels: the reader's report of its replication, one row for each source.
    """
    if not channels:
        return None, "it replicates from nobody"
    lags = []
    for channel in channels:
        said = {name.replace("Slave", "Replica").replace("Master", "Source"): value for name, value in channel.items()}
        for thread in "SQL", "IO":
            error = said[f"Last_{thread}_Errno"]
            if said[f"Replica_{thread}_Running"] == "No" and (thread == "SQL" or (error and error not in _WRITER_IS_GONE)):
                # The text of Last_SQL_Error may hold data.
                return None, f"its {thread} thread has stopped (error {error}; SHOW REPLICA STATUS there says more)"
        if not _has_replayed_all(said):
            behind = said["Seconds_Behind_Source"]
            if behind is not None:
                # The server counts whole seconds only, so the lag may be up to a second longer.
                lags.append(float(behind) + 1.0)
        elif said["Replica_IO_Running"] == "Yes":
            # Without the IO thread, the reader does not know how much it has not received, and may report 0.
            lags.append(0.0)
    return (max(lags) if len(lags) == len(channels) else None), ""


_WRITER_IS_GONE = range(2000, 3000)
"""Errors of the client library, by which a reader reports that it cannot reach its source."""


def _has_replayed_all(said: Mapping[str, Any]) -> bool:
    """Whether a reader has replayed all that it has received from a source.

    MySQL's workers may be ahead of the log position and of the seconds that the server shows, by up to
    `replica_checkpoint_period` (300 ms). The server's GTIDs are exact.
    """
    if said.get("Auto_Position"):
        return GtidSet.from_server(1, said["Executed_Gtid_Set"]).covers(GtidSet.from_server(1, said["Retrieved_Gtid_Set"]))
    received = said["Source_Log_File"], said["Read_Source_Log_Pos"]
    return received == (said["Relay_Source_Log_File"], said["Exec_Source_Log_Pos"])
