"""What happens to a unit and to connections, as a listener hears it: pairs of begin and end."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from sqlalchemy.exc import TimeoutError

from aurora_router import AmbiguousWriter, Router, events
from aurora_router.local import FaultProxy
from aurora_router.local.cluster import Cluster
from tests.integration.shop import BOTH, Item, eventually, sessions, through, until_readers_serve

MakeRouter = Callable[..., Router]

pytestmark = BOTH


def of_units(heard: list[events.Event]) -> list[Any]:
    """The events of units, in order."""
    return [event for event in heard if getattr(event, "unit", None) is not None]


def test_all_events_of_a_unit_have_its_number(cluster: Cluster[Any], make_router: MakeRouter, heard: list[events.Event]) -> None:
    """A unit that reads, moves and writes has two checkouts, each with a begin and an end."""
    router = make_router(listeners=[heard.append])
    until_readers_serve(router, 2)
    with sessions(router)() as s:
        s.get(Item, 1)
        s.add(Item(id=100))
        s.commit()
    told = of_units(heard)
    assert [type(event).__name__ for event in told] == [
        "CheckoutStarted",
        "Routed",
        "ConnectionCheckedIn",
        "Moved",
        "CheckoutStarted",
        "Routed",
        "ConnectionCheckedIn",
    ]
    assert len({event.unit for event in told}) == 1
    assert [event.at for event in told] == sorted(event.at for event in told)
    assert told[2].instance == told[1].instance == told[3].instance
    assert told[6].instance == told[5].instance == cluster.writer.address
    assert all(told[number].seconds >= 0.0 for number in (1, 2, 5, 6))
    with sessions(router)() as s:
        s.get(Item, 1)
    assert of_units(heard)[-1].unit != told[0].unit


def test_a_checkout_that_fails_has_its_end(make_router: MakeRouter, heard: list[events.Event]) -> None:
    router = make_router(listeners=[heard.append], engine_options={"pool_size": 1, "max_overflow": 0, "pool_timeout": 0.1})
    with router.connect():
        with pytest.raises(TimeoutError):
            router.connect()
        started, failed = of_units(heard)[-2:]
        assert started == events.CheckoutStarted(False)
        assert isinstance(failed, events.CheckoutFailed)
        assert (failed.error, failed.unit) == ("TimeoutError", started.unit)
        assert failed.seconds >= 0.1


def test_a_connection_is_told_of_at_both_ends(cluster: Cluster[Any], make_router: MakeRouter, heard: list[events.Event]) -> None:
    """Each connection that was made is closed once, also when its instance is lost."""
    router = make_router(listeners=[heard.append])
    until_readers_serve(router, 2)
    for read_only in (True, True, False):
        with router.connect(read_only=read_only):
            pass

    def told(kind: type[events.Event]) -> list[str]:
        return sorted(event.instance for event in heard if isinstance(event, kind))  # type: ignore[union-attr]

    made = told(events.ConnectionCreated)
    assert len(made) == sum(of.connects for of in router.stats().instances) >= 2
    assert told(events.ConnectionClosed) == []
    lost = next(instance for instance in cluster.readers if instance.address in made)
    cluster.kill(lost)
    eventually(lambda: lost.address in told(events.ConnectionClosed))
    router.close()
    eventually(lambda: told(events.ConnectionClosed) == made)
    numbers = [
        {event.connection for event in heard if isinstance(event, kind)}
        for kind in (events.ConnectionCreated, events.ConnectionClosed)
    ]
    assert numbers[0] == numbers[1]
    assert len(numbers[0]) == len(made)


def test_a_wait_for_a_writer_is_told_of_at_both_ends(
    cluster: Cluster[Any], proxy: FaultProxy, make_router: MakeRouter, heard: list[events.Event]
) -> None:
    router = make_router(through(proxy, cluster), instances=[], failover_timeout=60.0, listeners=[heard.append])
    with router.connect():
        pass
    proxy.refuse()
    proxy.reset_all()
    eventually(lambda: router.topology.writer is None)
    heard.clear()  # on a slow machine, the first unit may have waited as well
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(lambda: router.connect().close())
        eventually(lambda: events.WaitStarted("writer") in heard)
        proxy.heal()
        waiting.result(60)
    started = heard[heard.index(events.WaitStarted("writer"))]
    ended = next(event for event in heard if isinstance(event, events.WaitEnded))
    assert isinstance(started, events.WaitStarted)
    assert (ended.what, ended.unit) == ("writer", started.unit)
    assert ended.at >= started.at


def test_a_probe_is_told_of_at_both_ends(cluster: Cluster[Any], make_router: MakeRouter, heard: list[events.Event]) -> None:
    """Each probe ends with the role of the server, or with the reason why it has not answered."""
    router = make_router(listeners=[heard.append], probe_interval=0.1)
    until_readers_serve(router, 2)
    lost = cluster.readers[0]
    eventually(lambda: _probes(heard, lost.address)[:2] == ["ProbeStarted", "ProbeSucceeded"])
    cluster.kill(lost)
    eventually(lambda: "ProbeFailed" in _probes(heard, lost.address))
    answered = next(event for event in heard if isinstance(event, events.ProbeSucceeded) and event.instance == lost.address)
    assert answered.role == "reader"
    assert answered.seconds > 0.0
    failed = next(event for event in heard if isinstance(event, events.ProbeFailed))
    assert (failed.instance, failed.error != "") == (lost.address, True)


def _probes(heard: list[events.Event], instance: str) -> list[str]:
    kinds = (events.ProbeStarted, events.ProbeSucceeded, events.ProbeFailed)
    return [type(event).__name__ for event in heard if isinstance(event, kinds) and event.instance == instance]


def test_each_attempt_of_a_transaction_is_told_of_at_both_ends(make_router: MakeRouter, heard: list[events.Event]) -> None:
    """All attempts of one function share a number, which those of another function do not have."""
    router = make_router(listeners=[heard.append])
    router.init_commit_table()
    until_readers_serve(router, 2)

    def told() -> list[tuple[Any, ...]]:
        """The attempts since the last call: (number, transaction, error, committed)."""
        ends = [event for event in heard if isinstance(event, events.AttemptStarted | events.AttemptEnded)]
        heard.clear()
        pairs = list(zip(ends[::2], ends[1::2], strict=True))
        assert all(isinstance(begin, events.AttemptStarted) and isinstance(end, events.AttemptEnded) for begin, end in pairs)
        assert all((begin.number, begin.transaction) == (end.number, end.transaction) for begin, end in pairs)
        assert all(end.seconds > 0.0 for _, end in pairs)  # type: ignore[union-attr]
        return [(end.number, end.transaction, end.error, end.committed) for _, end in pairs]  # type: ignore[union-attr]

    troubles = iter([AmbiguousWriter(("db-1:5432", "db-2:5432"))])

    def fails_once(s: Any) -> None:
        s.add(Item(id=100))
        for trouble in troubles:
            raise trouble

    heard.clear()
    router.run_transaction(sessions(router), fails_once)
    (first, second) = told()
    assert (first[0], *first[2:]) == (1, "AmbiguousWriter", False)
    assert (second[0], *second[2:]) == (2, None, True)
    assert first[1] == second[1]

    def fails(s: Any) -> None:
        raise LookupError

    with pytest.raises(LookupError):
        router.run_transaction(sessions(router), fails)
    ((number, transaction, *how),) = told()
    assert (number, how) == (1, ["LookupError", False])
    assert transaction != first[1]

    def leaves() -> None:
        for attempt in router.attempts(sessions(router)):
            with attempt as s:
                s.add(Item(id=101))
            return

    with pytest.warns(RuntimeWarning, match="left by return or break"):
        leaves()
    ((number, _, *how),) = told()
    assert (number, how) == (1, [None, False])


def test_a_unit_has_no_number_if_nobody_listens(router: Router) -> None:
    with sessions(router)() as s:
        s.get(Item, 1)
        assert s.routing_state.unit is not None
        assert s.routing_state.unit._number is None
