"""Failover stories as data: phases of observations, and the topology and the decisions that must result.

A story is a JSON file: `story`, `instances`, perhaps a `reader_endpoint`, and `phases`. A phase has a text about `what` happens,
the `observations` in the order of their arrival, and the `outcome`.

An observation names its `instance`, the moment when it was `asked` (seconds), and one of three things:

- the answer of a `server` (by default the instance's name in capitals) in one of its lives (`started`) in a `cluster`: its
  `role`, `epoch`, position and `lag`, perhaps `pooled`, perhaps `stopped`
- `silence` about a `server`
- that a server is to be `forgotten`.

A position is an `lsn`, a `gtid` of MariaDB, or a `gtids` of MySQL, whose sources have names of one letter. `own` is the source
as which the server writes there. `state` is MariaDB's `gtid_binlog_state`.

An outcome has `writer`, `readers`, `epoch` and `ambiguous`. If they matter, it also has a role or a part of the error per
instance in `instances`, and `decisions` at a time `now`. An unknown key is an error.
"""

import json
import re
from functools import reduce
from pathlib import Path

import pytest

from aurora_router.core.gtid import GtidSet, MariadbGtid, mariadb_epoch, writer_starts
from aurora_router.core.instance import Instance, Observation, ProbeFailure, Role, ServerId, ServerStatus
from aurora_router.core.positions import Requirement, WalPosition
from aurora_router.core.selection import Load, Need, Reason, choose, round_robin, to_writer, with_proof
from aurora_router.core.topology import Topology, add, forget_server, observe

SOURCE = "-71ca-11e1-9e33-c80aa9429562"
STORIES = sorted(Path(__file__).parent.glob("*.json"))


def check_keys(given, *known, needed=()):
    assert set(given) <= {*known, *needed}, f"unknown keys: {set(given) - {*known, *needed}}"
    assert set(needed) <= set(given), f"missing keys: {set(needed) - set(given)}"


def position(given):
    epoch = given["epoch"]
    if "gtid" in given:
        state = given.get("state", "")
        return MariadbGtid.from_server(
            mariadb_epoch(state) if state else epoch, given["gtid"], given.get("own", -1), writer_starts(state)
        )
    if "gtids" in given:
        whole = re.sub(r"\b[a-f](?=:)", lambda name: name[0] * 8 + SOURCE, given["gtids"])
        return GtidSet.from_server(epoch, whole, given["own"] * 8 + SOURCE if "own" in given else "")
    return WalPosition(epoch, given["lsn"]) if "lsn" in given else None


def identity(given):
    server = given.get("server", given["instance"].upper())
    return ServerId(given.get("cluster", "7001"), server, 5432, given.get("started", f"{server}'s first start"))


def heard(topology, given):
    """The topology after one line of a story."""
    who = ("server", "started", "cluster")
    if "forgotten" in given:
        check_keys(given, *who, needed=("instance", "forgotten"))
        return forget_server(topology, given["instance"], identity(given))
    asked = given["asked"]
    if "silence" in given:
        check_keys(given, "error", *who, needed=("instance", "asked", "silence"))
        known = topology.by_id[given["instance"]].tracked
        about = identity(given) if "server" in given or known else None
        error = given.get("error", f"connection {given['silence']}")
        silence = ProbeFailure(given["silence"])
        return observe(
            topology, Observation(given["instance"], asked, asked + 1, about=about, probe_failure=silence, error=error)
        )
    check_keys(
        given,
        "lsn",
        "gtid",
        "gtids",
        "lag",
        "pooled",
        "stopped",
        "own",
        "state",
        *who,
        needed=("instance", "asked", "role", "epoch"),
    )
    server = ServerStatus(
        identity(given),
        Role(given["role"]),
        given["epoch"],
        position(given),
        given.get("lag"),
        replication_error=given.get("stopped", ""),
    )
    return observe(topology, Observation(given["instance"], asked, asked, server, pooled=given.get("pooled", False)))


def decided(topology, given):
    """The decision for one need: (instance, reason's name)."""
    check_keys(given, "write", "read_after", "epoch", "max_lag", "avoid", "now", "no_reader", needed=("to", "reason"))
    if given.get("write"):
        decision = to_writer(topology, Reason.NOT_A_READ)
        return (decision.instance.id if decision.instance is not None else None, decision.reason.name)
    after = given.get("read_after")
    requirement = None if after is None else with_proof(Requirement(after, given["epoch"]), topology)
    need = Need(
        requirement=requirement,
        max_lag=given.get("max_lag"),
        avoid=frozenset(given.get("avoid", ())),
        writer_serves_reads=given.get("no_reader", "writer") == "writer",
    )
    decision = choose(topology, need, round_robin, Load(lambda _: 0), 0.0, given.get("now", 0.0))
    return (decision.instance.id if decision.instance is not None else None, decision.reason.name)


def check(topology, outcome):
    check_keys(outcome, "instances", "decisions", needed=("writer", "readers", "epoch", "ambiguous"))
    assert (topology.writer.id if topology.writer is not None else None) == outcome["writer"]
    assert [reader.id for reader in topology.readers] == outcome["readers"]
    assert topology.epoch == outcome["epoch"]
    assert list(topology.ambiguous) == outcome["ambiguous"]
    for instance, expected in outcome.get("instances", {}).items():
        found = topology.by_id[instance]
        assert expected == found.role.value if found.role is not None else expected in found.error, str(found)
    for given in outcome.get("decisions", ()):
        assert decided(topology, given) == (given["to"], given["reason"]), given


def tell(story):
    check_keys(story, "reader_endpoint", needed=("story", "instances", "phases"))
    instances = [Instance(name, name, 5432) for name in story["instances"]]
    if "reader_endpoint" in story:
        instances.append(Instance(story["reader_endpoint"], story["reader_endpoint"], 5432, reader_only=True))
    topology = reduce(add, instances, Topology())
    for phase in story["phases"]:
        check_keys(phase, needed=("what", "observations", "outcome"))
        topology = reduce(heard, phase["observations"], topology)
        check(topology, phase["outcome"])


@pytest.mark.parametrize("path", STORIES, ids=[path.stem for path in STORIES])
def test_the_story_ends_as_it_must(path):
    tell(json.loads(path.read_text()))


def wrong(story):
    """Copies of the story, each with one thing wrong."""
    yield {**story, "instance": ["a"]}
    phase = story["phases"][-1]
    (line, *_), outcome = phase["observations"], phase["outcome"]
    yield from ({**story, "phases": [{**phase, **change}]} for change in (
        {"observation": []},
        {"observations": [{**line, "lns": 5}]},
        {"outcome": {**outcome, "reader": []}},
        {"outcome": {**outcome, "writer": "z"}},
        {"outcome": {**outcome, "readers": ["z"]}},
        {"outcome": {**outcome, "epoch": 9}},
        {"outcome": {**outcome, "ambiguous": ["a", "b"]}},
        {"outcome": {**outcome, "instances": {"a": "reader"}}},
        {"outcome": {**outcome, "instances": {"c": "all is well"}}},
        {"outcome": {**outcome, "decisions": [{"write": True, "to": "b", "reason": "NOT_A_READ"}]}},
        {"outcome": {**outcome, "decisions": [{"write": True, "to": "a", "reason": "READ"}]}},
        {"outcome": {**outcome, "decisions": [{"wirte": True, "to": "a", "reason": "NOT_A_READ"}]}},
    ))  # fmt: skip


def test_a_story_with_anything_wrong_fails():
    story = json.loads((Path(__file__).parent / "foreign_cluster.json").read_text())
    tell(story)
    for mistaken in wrong(story):
        with pytest.raises(AssertionError):
            tell(mistaken)
