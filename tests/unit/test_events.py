"""Events are frozen records that say what happened, when, and to which unit."""

from __future__ import annotations

import copy
import dataclasses
import time
from typing import get_args

import pytest

import aurora_router.events as of_users
from aurora_router import Reason, Router
from aurora_router.cluster.connection_state import state_of
from aurora_router.core import events
from aurora_router.routing.unit import AUTOMATIC, Unit
from aurora_router.telemetry.listeners import EventDispatcher
from aurora_router.telemetry.log import Log
from tests.fakes.cluster import FakeCluster
from tests.fakes.driver import installed
from tests.stories import WRITE, sessions, write

URL = "postgresql+fakepg://app@db-1/shop"
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
    with pytest.raises(dataclasses.FrozenInstanceError):
        del event.at
    assert copy.copy(event) == event


def test_the_users_module_has_each_event():
    assert {kind.__name__ for kind in KINDS} <= {*vars(of_users)}
    assert of_users.Event is events.Event


def test_events_are_equal_if_they_say_the_same():
    """Neither the time, nor any number, nor how long it took counts."""
    event = events.Routed("db-1:5432", Reason.READ)
    assert event == events.Routed("db-1:5432", Reason.READ, at=1.0, unit=7, transaction=3, seconds=0.1, connection=9)
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


def test_all_listeners_get_an_event_that_one_interrupts():
    """The exception of a signal handler passes, but only after the others have heard of what has ended."""
    heard = []

    def interrupt(_):
        raise KeyboardInterrupt

    dispatcher = EventDispatcher((interrupt, heard.append, interrupt, heard.append), Log())
    with pytest.raises(KeyboardInterrupt):
        dispatcher.publish(events.Moved("db-2:5432", Reason.HINT))
    assert heard == [events.Moved("db-2:5432", Reason.HINT)] * 2


def test_each_unit_has_a_number_of_its_own():
    """The number is made when it is asked for, and stays."""
    first, second = Unit(AUTOMATIC), Unit(AUTOMATIC)
    assert first._number is None
    assert first.number == first.number != second.number


def write_within(session):
    session.execute(WRITE)


def test_events_of_a_unit_name_its_transaction():
    """All attempts of one function have its number. Units of no run, and units that nobody listens to, have none."""
    heard = []
    cluster = FakeCluster(readers=1)
    with installed(cluster), Router(URL, instances=["db-2"], listeners=[heard.append]) as router:
        cluster.lose("UPDATE", answer=False)
        router.run_transaction(sessions(router), write_within)
        begun = [event for event in heard if isinstance(event, events.AttemptStarted)]
        assert [event.number for event in begun] == [1, 2]
        (transaction,) = {event.transaction for event in begun}
        of_units = [event for event in heard if getattr(event, "unit", None) is not None]
        assert {type(event) for event in of_units} >= {events.CheckoutStarted, events.Routed, events.ConnectionCheckedIn}
        assert {event.transaction for event in of_units} == {transaction}
        heard.clear()
        with sessions(router)() as s:
            write(s)
        assert {event.transaction for event in heard if isinstance(event, events.Routed)} == {None}


def test_a_transaction_has_no_number_if_nobody_listens():
    with installed(FakeCluster(readers=1)), Router(URL, instances=["db-2"]) as router:
        for attempt in router.attempts(sessions(router)):
            with attempt as s:
                s.execute(WRITE)
                assert attempt.retry.transaction is None
                assert s.routing_state.unit._number is None


def test_each_connection_has_a_number_of_its_own():
    """It is in all events of the connection. So two connections to one instance can be told apart."""
    heard = []
    with installed(FakeCluster(readers=1)), Router(URL, instances=["db-2"], listeners=[heard.append]) as router:
        with router.connect(), router.connect():
            pass
        with router.connect():
            pass

    def numbers(kind):
        return [event.connection for event in heard if isinstance(event, kind)]

    made = numbers(events.ConnectionCreated)
    assert len({*made}) == len(made) == 2
    assert {*made} == {*numbers(events.ConnectionClosed)}
    first, second, again = numbers(events.Routed)
    assert {first, second} == {*made}
    assert numbers(events.ConnectionCheckedIn) == [second, first, again]


def test_a_connection_has_no_number_if_nobody_listens():
    with installed(FakeCluster(readers=1)), Router(URL, instances=["db-2"]) as router, router.connect() as connection:
        state = state_of(connection.connection)
        assert (state.number, state.routed_at) == (None, None)


def test_an_event_is_compared_and_shown_by_its_fields():
    """Events of two kinds are never equal. Equal events have one hash."""
    event = events.Moved("db-1:5432", Reason.HINT, at=1.0, unit=1)
    same = events.Moved("db-1:5432", Reason.HINT, at=2.0, unit=2)
    assert event == same
    assert hash(event) == hash(same)
    assert event != events.Moved("db-2:5432", Reason.HINT)
    assert event != events.Routed("db-1:5432", Reason.HINT)
    assert repr(event) == f"Moved(at=1.0, unit=1, transaction=None, instance='db-1:5432', reason={Reason.HINT!r})"
