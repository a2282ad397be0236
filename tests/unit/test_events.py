"""Events are frozen records that say what happened, when, and to which unit."""

from __future__ import annotations

import dataclasses
import time
from typing import get_args

import pytest

import aurora_router.events as of_users
from aurora_router import Reason
from aurora_router.core import events
from aurora_router.routing.unit import AUTOMATIC, Unit
from aurora_router.telemetry.listeners import EventDispatcher
from aurora_router.telemetry.log import Log

KINDS = get_args(events.Event)


@pytest.mark.parametrize("kind", KINDS)
def test_an_event_is_a_frozen_record_with_a_time(kind):
    """Fields that came later have names and defaults, so that events are made and matched as before."""
    of_time = next(field for field in dataclasses.fields(kind) if field.name == "at")
    assert (of_time.default, of_time.kw_only, of_time.compare) == (0.0, True, False)
    values = [None for field in dataclasses.fields(kind) if not field.kw_only]
    event = kind(*values)
    assert len(kind.__match_args__) == len(values)
    with pytest.raises(dataclasses.FrozenInstanceError):
        event.at = 1.0


def test_the_users_module_has_each_event():
    assert {kind.__name__ for kind in KINDS} <= {*vars(of_users)}
    assert of_users.Event is events.Event


def test_events_are_equal_if_they_say_the_same():
    """Neither the time, nor the unit, nor how long it took counts."""
    event = events.Routed("db-1:5432", Reason.READ)
    assert event == events.Routed("db-1:5432", Reason.READ, at=1.0, unit=7, seconds=0.1)
    assert event != events.Routed("db-2:5432", Reason.READ)


def test_a_published_event_says_when_it_happened():
    """An event that is told later keeps the time of its making."""
    heard = []
    dispatcher = EventDispatcher((heard.append,), Log())
    began = time.time()
    dispatcher.publish(events.Moved("db-2:5432", Reason.HINT))
    dispatcher.publish(events.Moved("db-2:5432", Reason.HINT, at=17.0))
    assert began <= heard[0].at <= time.time()
    assert heard[1].at == 17.0


def test_each_unit_has_a_number_of_its_own():
    """The number is made when it is asked for, and stays."""
    first, second = Unit(AUTOMATIC), Unit(AUTOMATIC)
    assert first._number is None
    assert first.number == first.number != second.number


def test_an_event_is_compared_and_shown_by_its_fields():
    """Events of two kinds are never equal. Equal events have one hash."""
    event = events.Moved("db-1:5432", Reason.HINT, at=1.0, unit=1)
    same = events.Moved("db-1:5432", Reason.HINT, at=2.0, unit=2)
    assert event == same
    assert hash(event) == hash(same)
    assert event != events.Moved("db-2:5432", Reason.HINT)
    assert event != events.Routed("db-1:5432", Reason.HINT)
    assert repr(event) == f"Moved(at=1.0, unit=1, instance='db-1:5432', reason={Reason.HINT!r})"
