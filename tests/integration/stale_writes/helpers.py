"""Routers of a late reader, and a look at what they send to the writer."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import pytest

from aurora_router import Router, RoutingSession, StaleRead
from aurora_router.core import events
from aurora_router.local import FaultProxy
from aurora_router.local.cluster import Cluster
from aurora_router.routing.stale_writes import LOADED_FROM_READER
from tests.integration.shop import place, sessions, through, until_readers_serve

R = TypeVar("R")
MakeRouter = Callable[..., Router]
LOOK = "FOR UPDATE"
MONITOR = ("pg_is_in_recovery", "pg_proc", "@@version", "SHOW ALL SLAVES", "SHOW REPLICA", "information_schema.routines")


def late(cluster: Cluster[Any], proxy: FaultProxy, make_router: MakeRouter, heard: list[events.Event], **options: Any) -> Router:
    router = make_router(through(proxy, cluster), instances=[cluster.readers[0].address], listeners=[heard.append], **options)
    until_readers_serve(router, 1)
    with sessions(router)() as s:
        s.connection()  # opens the connection before statements are counted
    cluster.pause_replay(cluster.readers[0])
    return router


def on_the_writer(cluster: Cluster[Any], *statements: str) -> None:
    """Execute statements of another client, which a paused reader does not know."""
    for statement in statements:
        cluster.execute(statement)


@contextmanager
def replaying(cluster: Cluster[Any]) -> Iterator[None]:
    """Let the late reader replay what is committed in the block and before, and then pause it again."""
    cluster.resume_replay(cluster.readers[0])
    yield
    cluster.wait_in_sync()
    cluster.pause_replay(cluster.readers[0])


def sent(proxy: FaultProxy, work: Callable[[], object]) -> list[str]:
    """The first words of the statements that the work sends to the writer, each once in a row.

    The monitor's questions are left out, and so is BEGIN, which PyMySQL never sends.
    """
    before = len(proxy.statements)
    work()
    asked = [text for text in proxy.statements[before:] if not any(part in text for part in ("BEGIN", *MONITOR))]
    return [word for word, _ in itertools.groupby(LOOK if looks(text) else text.split()[0] for text in asked)]


def looks(text: str) -> bool:
    """Whether the statement looks rows up, and locks them."""
    return "FOR NO KEY UPDATE" in text or LOOK in text


def marked(instance: object) -> bool:
    return LOADED_FROM_READER in instance._sa_instance_state.info  # type: ignore[attr-defined]


def shown(s: RoutingSession, cls: type[R], key: Any) -> R:
    """Return an object that a reader has shown."""
    instance = s.get_one(cls, key)
    assert place(s) == "reader"
    assert marked(instance)
    return instance


@contextmanager
def raises_stale(entity: str, key: int) -> Iterator[None]:
    """Expect a StaleRead of this object, and of no other."""
    with pytest.raises(StaleRead, match=f"object of {entity} ") as caught:
        yield
    assert caught.value.key == (key,)
