"""A reader that was lost again and again is held back until it has answered for a while."""

from aurora_router.core.election import hold_down_seconds
from aurora_router.core.instance import Instance, Observation, ProbeFailure, Role, ServerId, ServerStatus
from aurora_router.core.topology import Topology, add, forget_server, observe
from tests.unit.topologies import REFUSED, WELL, after, identity, reader, said, silent, writer


def test_each_loss_doubles_the_hold_time_up_to_a_minute():
    """Each loss doubles the time for which a reader must have answered, up to a minute."""
    assert [hold_down_seconds(losses) for losses in range(10)] == [0, 0, 1, 2, 4, 8, 16, 32, 60, 60]
    assert hold_down_seconds(10**6) == 60


def test_a_held_reader_tells_its_losses_and_its_hold_time():
    """A reader that is held back says how often it was lost and for how long it must answer."""
    topology = observe(Topology(), Observation("r", 1.0, 1.0))
    topology = add(topology, Instance("r", "r", 5432))
    server = ServerStatus(ServerId("1", "r", 5432, "0"), Role.READER, 1)
    for loss in (2.0, 4.0):
        topology = observe(topology, Observation("r", loss - 1, loss - 1, server=server))
        topology = observe(
            topology, Observation("r", loss, loss, about=server.id, probe_failure=ProbeFailure.REFUSED, error="refused")
        )
    topology = observe(topology, Observation("r", 5.0, 5.0, server=server))
    (held,) = topology.instances
    assert not held.healthy
    assert held.error == "answers, but was lost 2 times within 300 s of each other; used again when it has answered for 1 s"
    topology = observe(topology, Observation("r", 6.0, 6.0, server=server))
    assert topology.readers == topology.instances


def lost_twice(epoch=1):
    """A topology whose reader c was lost at 3 and 6, answered at 5 and 7, and is held for a second from 7 on."""
    return after(
        WELL,
        said("a", 2, writer("A", epoch=epoch)),
        silent("c", 3, identity("C"), REFUSED),
        said("c", 5, reader("C")),
        silent("c", 6, identity("C"), REFUSED),
        said("c", 7, reader("C")),
    )


def test_a_quick_restart_does_not_extend_the_hold():
    """A quick restart does not begin the wait of a held reader anew."""
    held = lost_twice()
    assert [i.id for i in held.readers] == ["b"]
    forgotten = forget_server(held, "c", identity("C"))
    again = observe(forgotten, said("c", 7.9, reader("C", started="later")))
    assert not again.by_id["c"].healthy
    assert [i.id for i in observe(again, said("c", 8, reader("C", started="later"))).readers] == ["b", "c"]


def test_a_held_reader_behind_a_new_writer_is_not_deposed():
    """A held reader that does not follow the newest writer yet is not called deposed."""
    assert "was lost 2 times" in lost_twice(epoch=2).by_id["c"].error
