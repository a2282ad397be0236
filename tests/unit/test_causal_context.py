"""The causal past that the units of a session or scope leave behind, whoever notes it and when."""

from aurora_router.core.positions import LastRead, Requirement
from aurora_router.routing.causal_context import CausalContext


class Server:
    """A server. While it is compared, the garbage collector ends another unit of the same past."""

    collects = None

    def __eq__(self, other):
        collects, self.collects = self.collects, None
        if collects is not None:
            collects()
        return self is other

    def __hash__(self):
        return 1


def test_a_unit_that_gc_ends_during_a_note_is_not_lost():
    """Nothing is lost if the garbage collector ends a unit while another one is noted."""
    past = CausalContext()
    first, late = LastRead(Server(), 1.0, 1), LastRead("late", 60.0, 1)

    def collects():
        past.record(Requirement(50.0, 1), wrote=True)
        past.record(None, late)

    past.record(None, first)
    first.server.collects = collects
    last = LastRead("last", 70.0, 1)
    past.record(Requirement(2.0, 1), last)
    assert past.requirement == Requirement(50.0, 1)
    assert past.wrote
    assert past.last_reads == {late, last}


def test_the_last_read_of_each_server_is_kept_until_covered():
    """The last read of each server is kept until a later read or requirement shows no less."""
    past = CausalContext()
    one, other, later = LastRead("one", 1.0, 1), LastRead("other", 2.0, 1), LastRead("one", 3.0, 1)
    for read in (later, other, one):
        past.record(None, read)
    assert past.last_reads == {later, other}
    past.record(None, LastRead("other", 4.0, 1), known=frozenset({later}))
    assert past.last_reads == {LastRead("other", 4.0, 1)}
    past.record(Requirement(3.9, 1))
    assert past.last_reads
    past.record(Requirement(4.0, 1))
    assert not past.last_reads
