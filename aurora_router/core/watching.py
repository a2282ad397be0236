"""The probe connections of one instance, and what their answers and failures say, as functions of frozen values.

A connection is anything here: the monitor's are sockets, the simulation's are not. All times are monotonic seconds.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Generic, NamedTuple, TypeAlias, TypeVar

from aurora_router.core.instance import Observation, ProbeFailure, ServerId, ServerStatus

C = TypeVar("C")

# If no fresh connection has led to a server behind a reader endpoint for so many seconds, the server is forgotten.
FORGET_AFTER = 60.0
MAX_SERVERS = 16  # servers that are watched behind one reader endpoint
# Fresh connections in a row, if other servers may stand behind a reader endpoint.
CONNECTS_PER_RECHECK = 4


class Link(NamedTuple, Generic[C]):
    """A probe connection, the server that it leads to, and when a fresh connection last led there."""

    connection: C
    server: ServerId
    reached_at: float


class Watch(NamedTuple, Generic[C]):
    """The probe connections of one instance.

    several: whether different servers may stand there, as behind a reader endpoint.
    lost: servers whose connection was lost and not regained.
    """

    instance: str
    several: bool = False
    links: tuple[Link[C], ...] = ()
    lost: tuple[ServerId, ...] = ()

    def connects(self, *, is_asked: bool, is_due: bool) -> int:
        """Return the number of fresh connections that this probe may make.

        is_asked: whether somebody met an unknown server there.
        is_due: whether it is time to find out where the name leads.
        """
        if self.links and not is_asked and not is_due:
            return 0
        return CONNECTS_PER_RECHECK if self.several and (is_asked or not self.links) else 1


class Forgotten(NamedTuple):
    """A server to which an instance's name no longer leads."""

    instance: str
    server: ServerId


News: TypeAlias = Observation | Forgotten


class Change(NamedTuple, Generic[C]):
    """The effects of an answer or a failure.

    watch: the connections from now on.
    news: for the topology, in this order.
    closed: the connections that must be closed.
    must_connect: whether only a fresh connection can show if the server is down.
    """

    watch: Watch[C]
    news: tuple[News, ...] = ()
    closed: tuple[C, ...] = ()
    must_connect: bool = False


def on_answer(watch: Watch[C], link: Link[C], server: ServerStatus, asked_at: float, now: float) -> Change[C]:
    """Apply the answer on a connection."""
    before = link.server
    pooled = server.id.process != before.process
    news: tuple[News, ...] = (Observation(watch.instance, asked_at, now, server=server, pooled=pooled),)
    # Only one server stands there. So the old one has another name now, or another server has replaced it.
    if pooled and not watch.several:
        news = (*news, Forgotten(watch.instance, before))
    if watch.several and len(watch.links) > 1 and asked_at - link.reached_at > FORGET_AFTER:
        left = tuple(each for each in watch.links if each is not link)
        return Change(watch._replace(links=left), (*news, Forgotten(watch.instance, server.id)), (link.connection,))
    if server.id != before:
        now_there = link._replace(server=server.id)
        watch = watch._replace(links=tuple(now_there if each is link else each for each in watch.links))
    return Change(watch, news)


def on_broken(watch: Watch[C], link: Link[C], failure: ProbeFailure, error: str, asked_at: float, now: float) -> Change[C]:
    """Apply a broken connection.

    If it was the only one, the server may still be well. The server is down only if a fresh connection fails as well.
    """
    links = tuple(each for each in watch.links if each is not link)
    if links:
        news = _failures(watch.instance, (link.server,), failure, error, asked_at, now)
        return Change(watch._replace(links=links), news, (link.connection,))
    return Change(watch._replace(links=(), lost=(*watch.lost, link.server)), (), (link.connection,), must_connect=True)


def on_connected(watch: Watch[C], connection: C, server: ServerStatus, asked_at: float, now: float) -> Change[C]:
    """Apply the first answer on a fresh connection. Unless several servers may stand there, this one replaces the others."""
    replaced = [each for each in watch.links if each.server == server.id or not watch.several]
    links = (*(each for each in watch.links if each not in replaced), Link(connection, server.id, asked_at))
    others = dict.fromkeys((*(each.server for each in replaced), *watch.lost))
    news: list[News] = [Forgotten(watch.instance, other) for other in others if other.process != server.id.process]
    news.append(Observation(watch.instance, asked_at, now, server=server))
    if len(links) > MAX_SERVERS:
        replaced.append(links[0])
        links = links[1:]
    return Change(watch._replace(links=links, lost=()), tuple(news), tuple(each.connection for each in replaced))


def connect_failure(
    watch: Watch[C], failure: ProbeFailure, error: str, asked_at: float, now: float, *, is_busy: bool = False
) -> tuple[News, ...]:
    """Return the news of a fresh connection that failed. It says nothing of the servers to which there are connections.

    is_busy: whether the server lives, but has no room for one more connection.
    """
    if watch.links or (is_busy and watch.lost):
        return ()
    return probe_failures(watch, failure, error, asked_at, now)


def probe_failures(watch: Watch[C], failure: ProbeFailure, error: str, asked_at: float, now: float) -> tuple[News, ...]:
    """Return the news that the servers without a connection do not answer."""
    return _failures(watch.instance, watch.lost or (None,), failure, error, asked_at, now)


def no_answer(timeout: float) -> str:
    """Say that nobody answered within these seconds."""
    return f"no answer within {timeout:g} s"


def on_timeout(watch: Watch[C], link: Link[C] | None, timeout: float, asked_at: float, now: float) -> tuple[News, ...]:
    """Return the news of a probe whose time is over.

    link: the connection that was asked; None if a fresh one was.
    timeout: seconds that it had.
    """
    error = no_answer(timeout)
    if link is not None:
        return _failures(watch.instance, (link.server,), ProbeFailure.TIMEOUT, error, asked_at, now)
    return connect_failure(watch, ProbeFailure.TIMEOUT, error, asked_at, now)


def _failures(
    instance: str, about: Iterable[ServerId | None], failure: ProbeFailure, error: str, asked_at: float, now: float
) -> tuple[News, ...]:
    return tuple(Observation(instance, asked_at, now, about=server, probe_failure=failure, error=error) for server in about)
