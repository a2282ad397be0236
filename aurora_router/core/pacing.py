"""How far apart new connections are begun, and how much of the writer's pool reads may take: arithmetic against stampedes."""

from __future__ import annotations

import math

STEP = 0.001  # seconds of spread for each connection that is ahead
MOST = 0.05  # seconds of spread at most


def pause(ahead: int, rnd: float) -> float:
    """Seconds by which a new connection is put off once it is its turn.

    ahead: how many connections to the same instance were under way or waited when it came. rnd: a random number in [0, 1).
    Nothing for one that comes alone. A crowd, as after a promotion, is spread, so that the processes of a fleet, which
    all see it at the same moment, do not stay in step.
    """
    return rnd * min(ahead * STEP, MOST)


def places_for_reads(pool: float, share: float) -> float:
    """How many connections of the writer's pool serve reads while no reader qualifies.

    pool: how many connections it may have, infinity where that is not limited. share: above 0, at most 1. At least one, or
    nothing could be read at all.
    """
    return pool if math.isinf(pool) else max(1, int(pool * share))
