"""Names that lead to several servers, to one under two names, to another cluster, or elsewhere than before."""

import pytest

from aurora_router.core.consequences import Evict, after_change
from aurora_router.core.instance import Instance
from aurora_router.core.positions import WalPosition
from aurora_router.core.topology import GONE_AFTER, Topology, add, after_news, forget_server, observe, reset
from aurora_router.core.watching import Forgotten
from tests.unit.topologies import (
    MISCONFIGURED,
    READER,
    REFUSED,
    WELL,
    WRITER,
    after,
    identity,
    mariadb,
    reader,
    said,
    silent,
    topology,
    writer,
)


def test_one_server_under_two_names_is_the_writer_under_one():
    """One server under two names is the writer under the first one."""
    found = after(topology("a", "vip"), said("a", 1, writer("A")), said("vip", 1, writer("A")))
    assert found.writer.id == "a"
    assert found.ambiguous == ()
    assert found.by_id["vip"].role is None
    assert found.by_id["vip"].error == "the writer under another name, used as a"


def test_one_server_at_two_addresses_is_still_one():
    found = after(topology("a", "vip"), said("a", 1, writer("A")), said("vip", 1, writer("10.9.9.9", started="A's first start")))
    assert found.writer.id == "a"
    assert found.ambiguous == ()


def test_a_reader_endpoint_never_serves_as_the_writer():
    found = after(topology("a", reader_endpoint="ro"), said("ro", 1, writer("A")))
    assert found.writer is None
    assert found.by_id["ro"].error == "accepts writes, but is a reader endpoint"
    found = after(found, said("a", 1, writer("A")))
    assert found.writer.id == "a"
    assert found.ambiguous == ()


def test_a_reader_endpoint_counts_as_its_furthest_behind_server():
    """A reader endpoint counts as far as the server that is furthest behind."""
    start = after(topology("a", reader_endpoint="ro"), said("a", 1, writer("A")))
    found = after(start, said("ro", 1, reader("B", 100, lag=0.5), took=0.25), said("ro", 2, reader("C", 90, lag=2.0)))
    ro = found.by_id["ro"]
    assert ro.position == WalPosition(1, 90)
    assert ro.lag == 2.0
    assert ro.latency == pytest.approx(0.25)
    assert ro.servers == {identity("B"), identity("C")}
    unknown = after(found, said("ro", 3, reader("B", 100, lag=None)))
    assert unknown.by_id["ro"].lag is None
    elsewhere = after(found, said("ro", 3, reader("B", 100, epoch=2)))
    assert elsewhere.by_id["ro"].position is None


def test_one_of_two_servers_that_dies_leaves_the_other():
    found = after(topology("a", reader_endpoint="ro"), said("ro", 1, reader("B", 90)), said("ro", 1.1, reader("C", 100)))
    found = after(found, silent("ro", 2, identity("B"), REFUSED))
    assert found.by_id["ro"].position == WalPosition(1, 100)
    assert found.by_id["ro"].error == ""


def test_a_promoted_server_leaves_the_reader_endpoint():
    """A promoted server serves no reads behind the reader endpoint."""
    start = after(topology("a", reader_endpoint="ro"), said("ro", 1, reader("B")), said("ro", 1.1, reader("C")))
    found = after(start, said("ro", 2, writer("B", epoch=2)))
    assert found.by_id["ro"].servers == {identity("C")}


def test_an_instance_of_another_cluster_is_refused():
    """An instance of another cluster is refused, and the error names both clusters."""
    found = after(WELL, silent("c", 2, identity("C"), REFUSED), said("c", 3, reader("C", cluster="9")))
    assert not found.by_id["c"].healthy
    assert found.by_id["c"].error == "belongs to another cluster (9, not 7001)"
    assert found.by_id["c"].probe_failure is MISCONFIGURED
    assert found.epoch == 1
    assert after(WELL, said("c", 3, writer("C", cluster="9", epoch=7))).epoch == 1


def of_mariadb(address, cluster, role=READER, started=None):
    server = mariadb(address, role, "0-1-50", {"A": 1, "B": 2}[address], "0-1-50")
    return server._replace(id=identity(address, started, cluster=cluster))


MARIA = after(topology("a", "b"), said("a", 1, of_mariadb("A", "mariadb-0", WRITER)), said("b", 1, of_mariadb("B", "mariadb-0")))


def test_servers_whose_cluster_gets_another_name_go_on():
    """Servers go on if their cluster's name changes, one after the other, by SET GLOBAL gtid_domain_id or a group's name."""
    reader_first = after(MARIA, said("b", 2, of_mariadb("B", "mariadb-42")))
    assert (reader_first.cluster, reader_first.writer.id, [i.id for i in reader_first.readers]) == ("mariadb-0", "a", ["b"])
    both = after(reader_first, said("a", 3, of_mariadb("A", "mariadb-42", WRITER)))
    assert (both.cluster, both.writer.id, [i.id for i in both.readers]) == ("mariadb-42", "a", ["b"])
    dead = after(both, silent("a", 4, identity("A", cluster="mariadb-42"), REFUSED))
    assert (dead.writer, dead.by_id["a"].healthy) == (None, False)
    assert after(dead, said("a", 5, of_mariadb("A", "mariadb-42", WRITER))).writer.id == "a"
    promoted = after(reader_first, silent("a", 4, identity("A", cluster="mariadb-0"), REFUSED))
    promoted = after(promoted, said("b", 5, of_mariadb("B", "mariadb-42", WRITER)))
    assert (promoted.cluster, promoted.writer.id) == ("mariadb-42", "b")


def test_a_writer_that_was_lost_a_moment_is_known_by_its_run():
    lost = after(MARIA, silent("a", 2, identity("A", cluster="mariadb-0"), REFUSED))
    assert after(lost, said("a", 3, of_mariadb("A", "mariadb-42", WRITER))).writer.id == "a"
    assert after(lost, said("a", 3, of_mariadb("A", "mariadb-42", WRITER, "t1"))).writer is None


def test_a_restarted_server_without_the_new_name_may_succeed():
    """A reader that was not given the new domain is a stranger after its restart. The log says so, and its promotion is found."""
    renamed = after(MARIA, said("a", 2, of_mariadb("A", "mariadb-42", WRITER)), said("b", 2, of_mariadb("B", "mariadb-0")))
    assert (renamed.cluster, [i.id for i in renamed.readers]) == ("mariadb-42", ["b"])
    lost = after(renamed, silent("b", 3, identity("B", cluster="mariadb-0"), REFUSED))
    restarted = after(lost, said("b", 4, of_mariadb("B", "mariadb-0", started="t1")))
    assert restarted.successor is None
    why = restarted.why_unused(restarted.by_id["b"])
    assert why.startswith("belongs to another cluster (mariadb-0, not mariadb-42); check where its name leads; if only the name")
    assert "gtid_domain_id" in why
    alone = after(restarted, silent("a", 5, identity("A", cluster="mariadb-42"), REFUSED))
    assert alone.successor is None, "the writer was lost a moment ago"
    promoted = of_mariadb("B", "mariadb-0", WRITER, "t1")
    late = after(alone, said("b", 5 + GONE_AFTER, promoted))
    assert late.successor == "mariadb-0"
    assert "set accept_new_cluster=True" in late.why_unused(late.by_id["b"])
    assert after(reset(late), said("b", 40, promoted)).writer.id == "b"


def test_a_cluster_made_anew_while_one_instance_is_down():
    """An instance that is down hides no new cluster under the other names. One of the old cluster that answers does."""
    down = after(WELL, silent("c", 2, identity("C"), REFUSED), said("a", 3, stranger("A", WRITER)))
    assert down.successor is None, "b answers"
    anew = after(down, said("b", 2 + GONE_AFTER, stranger("B")))
    assert anew.successor == "9009"
    assert after(anew, said("c", 40, reader("C"))).successor is None, "an old one is back"
    assert add(anew, Instance("d", "d", 5432)).successor is None, "it was not asked yet"


def stranger(address, role=READER, **options):
    make = writer if role is WRITER else reader
    return make(address, cluster="9009", started=f"{address} anew", **options)


def test_a_stranger_takes_what_stood_at_its_place_out_of_use():
    """A server of a cluster that was made anew gets no units, and the old server at its place counts as healthy no longer."""
    found = after(WELL, said("a", 2, stranger("A", WRITER, epoch=7)))
    assert (found.writer, found.by_id["a"].foreign_cluster, found.epoch, found.cluster) == (None, "9009", 1, "7001")
    assert [i.id for i in found.readers] == ["b", "c"]
    assert found.successor is None
    assert "; check where its name leads" in found.said()[0]
    assert found.why_unused(found.by_id["a"]) == "belongs to another cluster (9009, not 7001); check where its name leads"
    assert observe(found, said("a", 1.5, stranger("A", WRITER))) is found
    down = after(found, silent("a", 3, identity("A", "A anew", cluster="9009"), REFUSED))
    assert (down.by_id["a"].foreign_cluster, down.by_id["a"].error) == (None, "refused at 3")
    back = after(found, said("a", 3, writer("A")))
    assert (back.writer.id, back.by_id["a"].foreign_cluster) == ("a", None)


def test_a_stranger_behind_a_reader_endpoint_leaves_the_others():
    start = after(topology("a", reader_endpoint="ro"), said("ro", 1, reader("B")), said("ro", 1.1, reader("C")))
    assert after(start, said("ro", 2, stranger("C"))).by_id["ro"].servers == {identity("B")}


def test_a_cluster_that_all_instances_name_may_succeed():
    """A cluster that all instances name may take the place of the old one."""
    two = after(WELL, said("a", 2, stranger("A", WRITER)), said("b", 2, stranger("B")))
    assert (two.successor, two.writer) == (None, None), "one of the old ones may be the writer tomorrow"
    all_three = after(two, said("c", 2, stranger("C")))
    assert all_three.successor == "9009"
    assert all("set accept_new_cluster=True or start this process again" in line for line in all_three.said())
    anew = reset(all_three)
    assert (anew.cluster, anew.epoch, anew.samples, anew.probed) == (None, 0, (), False)
    assert [i.id for i in anew] == ["a", "b", "c"]
    assert after(anew, said("a", 3, stranger("A", WRITER))).writer.id == "a"
    assert Topology().successor is None


def test_behind_a_pooler_positions_are_no_evidence_from_then_on():
    found = after(
        topology("a", "b"), said("b", 1, reader("B")), said("b", 2, reader("C"), pooled=True), said("b", 3, reader("B"))
    )
    assert found.by_id["b"].pooled
    assert found.by_id["b"].position is None
    assert found.by_id["b"].servers == {identity("B"), identity("C")}


def test_behind_a_pooler_a_failure_speaks_for_all_servers():
    start = after(topology("a", "b"), said("b", 1, reader("B")), said("b", 2, reader("C"), pooled=True))
    assert not after(start, silent("b", 3, identity("C"), REFUSED)).by_id["b"].healthy
    once = after(start, silent("b", 3, identity("C")))
    assert once.by_id["b"].healthy
    assert not after(once, silent("b", 4, identity("C"))).by_id["b"].healthy


def test_a_server_to_which_the_name_leads_no_longer_is_forgotten():
    found = after(WELL, said("a", 2, writer("D", 120, epoch=2)))
    assert found.by_id["a"].servers == {identity("D")}
    gone = forget_server(found, "a", identity("A"))
    assert [seen.server.id for seen in gone.by_id["a"].tracked] == [identity("D")]
    nobody = forget_server(gone, "a", identity("D"))
    assert nobody.by_id["a"].error == "the name leads elsewhere"
    assert nobody.writer is None


def test_a_restarted_writer_takes_the_place_of_its_former_life():
    """A fresh connection tells of the new server and of the end of the old one, and the topology has both at once."""
    restarted = said("a", 2, writer("A", 120, started="again"))
    found = after_news(WELL, (Forgotten("a", identity("A")), restarted))
    assert found.writer is not None
    assert found.writer.servers == {identity("A", "again")}
    told = [step for step in after_change(WELL, found, 2.0) if not isinstance(step, Evict)]
    assert told == []


@pytest.mark.parametrize(("instance", "address"), [("z", "A"), ("a", "Z")])
def test_what_is_not_known_cannot_be_forgotten(instance, address):
    assert forget_server(WELL, instance, identity(address)) is WELL


def test_a_name_follows_to_another_server_of_the_same_epoch():
    """An instance whose name leads to another server of the same epoch follows it."""
    moved = observe(forget_server(WELL, "b", identity("B")), said("b", 2, reader("D", 95)))
    assert moved.by_id["b"].servers == {identity("D")}
