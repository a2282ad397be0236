"""When a unit on a reader must leave it, because of what other units have done meanwhile."""

import pytest

from aurora_router.config.settings import Settings
from aurora_router.core.positions import LastRead, Requirement
from aurora_router.core.topology import Topology
from aurora_router.routing.causal_context import CausalContext, Scope
from aurora_router.routing.causality import Causality
from aurora_router.routing.unit import AUTOMATIC, NOWHERE, CausalMarks, Place, Unit
from tests.unit.topologies import WELL, identity

EARLY, LATE = Requirement(1.0, 1), Requirement(2.0, 1)
ON_B, ON_C = LastRead(identity("B"), 50.0, 1), LastRead(identity("C"), 50.0, 1)
SHOWN = LastRead(identity("C"), 0.5, 1)
AT_B = Place(WELL.by_id["b"], server=identity("B"))


def settings(consistency):
    return Settings("postgresql+psycopg://db-1/shop", consistency=consistency)


def unit_with(requirement=None, reads=(), *, place=AT_B):
    unit = Unit(AUTOMATIC)
    unit.place = place
    unit.marks = CausalMarks(requirement, frozenset(reads))
    return unit


def scope_with(owner, requirement, reads):
    scope = Scope(owner, CausalContext(), lambda _: None)
    scope.record(requirement)
    for read in reads:
        scope.record(None, read)
    return scope


@pytest.mark.parametrize(
    ("unit", "requirement", "reads", "leaves"),
    [
        (unit_with(), None, [], False),
        # another unit has written
        (unit_with(), EARLY, [], True),
        (unit_with(EARLY), EARLY, [], False),
        (unit_with(EARLY), LATE, [], True),
        (unit_with(LATE), EARLY, [], False),
        (unit_with(EARLY), None, [], False),
        (unit_with(place=NOWHERE), EARLY, [], True),
        # another unit has read
        (unit_with(), None, [ON_B], False),
        (unit_with(), None, [SHOWN], False),
        (unit_with(), None, [ON_C], True),
        (unit_with(reads=[ON_C]), None, [ON_C], False),
        (unit_with(reads=[ON_B]), None, [ON_B, ON_C], True),
        (unit_with(place=NOWHERE), None, [ON_C], False),
        (unit_with(LATE), EARLY, [ON_C], True),
    ],
)
def test_a_unit_leaves_its_reader_for_what_its_scope_has_done(unit, requirement, reads, leaves):
    """The table says when a unit leaves its reader. One such scope among others is enough."""
    causality = Causality(settings("session"), lambda: WELL)
    scope, quiet = scope_with(causality, requirement, reads), scope_with(causality, None, [])
    for scopes in ((scope,), (scope, quiet), (quiet, scope)):
        unit.marks = unit.marks._replace(scopes=scopes)
        scope.units.add(unit)
        assert causality.must_leave_reader(unit) is leaves


def test_a_unit_leaves_for_the_read_of_an_open_unit():
    """The unit's own read is none, and the read of another open unit counts before that unit ends."""
    causality = Causality(settings("session"), lambda: WELL)
    scope = scope_with(causality, None, [])
    mine, other = unit_with(), unit_with(place=Place(WELL.by_id["c"], server=identity("C")))
    for unit in (mine, other):
        unit.marks = unit.marks._replace(scopes=(scope,))
        scope.units.add(unit)
    mine.last_sql, mine.read_at = "SELECT 1", 50.0
    assert not causality.must_leave_reader(mine)
    other.last_sql, other.read_at = "SELECT 1", 50.0
    assert causality.must_leave_reader(mine)


def test_a_unit_leaves_for_any_write_if_consistency_is_global():
    """Without any scope, a write of any unit of the router counts, and none counts that the unit must see already."""
    causality = Causality(settings("global"), Topology)
    mine, other = unit_with(), unit_with()
    assert not causality.must_leave_reader(mine)
    other.wrote = True
    causality.on_committed(other)
    assert causality.must_leave_reader(mine)
    causality.on_begin(mine)
    assert not causality.must_leave_reader(mine)
    other.commit_started = False
    causality.on_commit_sent(other)
    assert causality.must_leave_reader(mine), "its answer may be on its way"
