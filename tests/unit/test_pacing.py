"""The moments at which new connections begin, and the number of the writer's connections that serve reads."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aurora_router.core.pacing import MOST, STEP, connect_jitter, writer_read_slots


@given(st.floats(0, 1, exclude_max=True))
def test_a_connection_that_comes_alone_is_not_put_off(rnd):
    assert connect_jitter(0, rnd) == 0.0


@given(st.integers(1, 10_000), st.floats(0, 1, exclude_max=True))
def test_connect_jitter_grows_with_the_crowd_and_is_bounded(ahead, rnd):
    """Callers are spread over a time that grows with their number and is bounded."""
    assert 0 <= connect_jitter(ahead, rnd) <= min(ahead * STEP, MOST)
    assert connect_jitter(ahead, rnd) <= connect_jitter(ahead + 1, rnd)


def test_two_of_a_crowd_are_not_put_off_alike():
    assert connect_jitter(10, 0.2) != connect_jitter(10, 0.7)


@pytest.mark.parametrize(
    ("pool", "share", "places"),
    [(15, 0.5, 7), (15, 1.0, 15), (15, 0.01, 1), (1, 0.5, 1), (2, 0.5, 1), (100, 0.25, 25), (math.inf, 0.5, math.inf)],
)
def test_reads_get_their_share_of_the_pool_and_at_least_one(pool, share, places):
    """Reads have their share of the writer's pool, and at least one place."""
    assert writer_read_slots(pool, share) == places


@given(st.integers(2, 1000), st.floats(0.001, 0.999))
def test_a_share_below_all_leaves_a_place_for_writes(pool, share):
    """Writes find a place whatever the share of reads is, if it is below all."""
    assert writer_read_slots(pool, share) < pool
