"""What the answers and failures of an instance's probe connections say of the servers behind it."""

import pytest

from aurora_router.core import watching
from aurora_router.core.instance import Observation, ProbeFailure, Role, ServerId, ServerStatus
from aurora_router.core.watching import CONNECTS_PER_RECHECK, FORGET_AFTER, MAX_SERVERS, Change, Forgotten, Link, Watch

REFUSED, _, TIMEOUT, _ = ProbeFailure


def server(address, started="first"):
    return ServerStatus(ServerId("7001", address, 5432, started), Role.READER, 1)


def link(name, address, reached_at=0.0):
    return Link(name, server(address).id, reached_at)


def heard(address, *, started="first", pooled=False):
    return Observation("db", 10.0, 10.5, server(address, started), pooled=pooled)


def no(address, probe_failure=REFUSED, error="no"):
    about = None if address is None else server(address).id
    return Observation("db", 10.0, 10.5, about=about, probe_failure=probe_failure, error=error)


def gone(address):
    return Forgotten("db", server(address).id)


A, B = link("to a", "A"), link("to b", "B")
ONE = Watch("db", links=(A,))
TWO = Watch("db", several=True, links=(A, B))
LOST = Watch("db", lost=(server("A").id,))


def answered(watch, link, server):
    return watching.on_answer(watch, link, server, 10.0, 10.5)


def broke(watch, link):
    return watching.on_broken(watch, link, REFUSED, "no", 10.0, 10.5)


def reached(watch, name, server):
    return watching.on_connected(watch, name, server, 10.0, 10.5)


@pytest.mark.parametrize(
    ("watch", "is_asked", "is_due", "connects"),
    [
        (ONE, False, False, 0),
        (ONE, True, False, 1),
        (ONE, False, True, 1),
        (LOST, False, False, 1),
        (TWO, False, False, 0),
        (TWO, True, False, CONNECTS_PER_RECHECK),
        (TWO, False, True, 1),
        (Watch("db", several=True), False, False, CONNECTS_PER_RECHECK),
    ],
)
def test_fresh_connections_show_who_stands_there(watch, is_asked, is_due, connects):
    """A fresh connection is made if it is due or none is left, and several where several servers may stand."""
    assert watch.connects(is_asked=is_asked, is_due=is_due) == connects


def test_an_answer_is_reported():
    assert answered(ONE, A, server("A")) == Change(ONE, (heard("A"),))


def test_another_server_on_one_connection_replaces_the_first():
    """A pooler may have chosen another server. The one before stands there no longer."""
    found = answered(ONE, A, server("B"))
    assert found == Change(Watch("db", links=(link("to a", "B"),)), (heard("B", pooled=True), gone("A")))


def test_another_server_behind_a_reader_endpoint_forgets_none():
    found = answered(TWO, A, server("C"))
    assert found == Change(Watch("db", several=True, links=(link("to a", "C"), B)), (heard("C", pooled=True),))


def test_a_server_that_no_fresh_connection_reaches_is_forgotten():
    """A server behind a reader endpoint is forgotten after a while without a fresh connection to it, but not the last one."""
    found = watching.on_answer(TWO, A, server("A"), FORGET_AFTER + 1, FORGET_AFTER + 2)
    observation = Observation("db", FORGET_AFTER + 1, FORGET_AFTER + 2, server("A"))
    assert found == Change(Watch("db", several=True, links=(B,)), (observation, gone("A")), ("to a",))
    alone = Watch("db", several=True, links=(A,))
    assert watching.on_answer(alone, A, server("A"), FORGET_AFTER + 1, FORGET_AFTER + 2).closed == ()


def test_a_broken_connection_is_a_loss_if_others_are_left():
    assert broke(TWO, A) == Change(Watch("db", several=True, links=(B,)), (no("A"),), ("to a",))


def test_the_last_broken_connection_says_nothing_yet():
    """Only the connection may be broken, so a fresh one must show whether the server is down."""
    assert broke(ONE, A) == Change(LOST, (), ("to a",), must_connect=True)


def test_a_fresh_connection_that_fails_shows_the_loss():
    assert watching.connect_failure(LOST, REFUSED, "no", 10.0, 10.5) == (no("A"),)
    assert watching.connect_failure(Watch("db"), REFUSED, "no", 10.0, 10.5) == (no(None),)


def test_a_failed_fresh_connection_says_nothing_of_others():
    """A fresh connection that fails says nothing of servers to which there are connections, or that are only busy."""
    assert watching.connect_failure(ONE, REFUSED, "no", 10.0, 10.5) == ()
    assert watching.connect_failure(LOST, REFUSED, "no", 10.0, 10.5, is_busy=True) == ()
    assert watching.connect_failure(Watch("db"), REFUSED, "no", 10.0, 10.5, is_busy=True) == (no(None),)


def test_a_fresh_connection_replaces_the_one_before():
    found = reached(ONE, "new", server("A"))
    assert found == Change(Watch("db", links=(link("new", "A", 10.0),)), (heard("A"),), ("to a",))


def test_a_name_that_leads_elsewhere_forgets_the_server_before():
    found = reached(ONE, "new", server("B"))
    assert found == Change(Watch("db", links=(link("new", "B", 10.0),)), (gone("A"), heard("B")), ("to a",))
    found = reached(LOST, "new", server("A", "second"))
    assert (found.news, found.watch.lost) == ((gone("A"), heard("A", started="second")), ())


def test_a_fresh_connection_to_one_of_several_replaces_its_own():
    found = reached(TWO, "new", server("B"))
    assert found == Change(Watch("db", several=True, links=(A, link("new", "B", 10.0))), (heard("B"),), ("to b",))
    assert reached(TWO, "new", server("C")).watch.links == (A, B, link("new", "C", 10.0))


def test_the_watched_servers_of_an_endpoint_are_bounded():
    links = tuple(link(n, f"10.0.0.{n}") for n in range(MAX_SERVERS))
    found = reached(Watch("db", several=True, links=links), "new", server("Z"))
    assert found.watch.links == (*links[1:], link("new", "Z", 10.0))
    assert (found.closed, found.news) == ((0,), (heard("Z"),))


def test_a_silent_probe_is_reported_of_the_server_that_was_asked():
    """A silent fresh connection says nothing of the servers to which there are connections."""
    error = "no answer within 2 s"
    assert watching.on_timeout(TWO, B, 2.0, 10.0, 10.5) == (no("B", TIMEOUT, error),)
    assert watching.on_timeout(TWO, None, 2.0, 10.0, 10.5) == ()
    assert watching.on_timeout(LOST, None, 2.0, 10.0, 10.5) == (no("A", TIMEOUT, error),)


def test_an_unexpected_end_is_a_failure_of_what_was_lost():
    assert watching.probe_failures(ONE, REFUSED, "no", 10.0, 10.5) == (no(None),)
    assert watching.probe_failures(LOST, REFUSED, "no", 10.0, 10.5) == (no("A"),)
