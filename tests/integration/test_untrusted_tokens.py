"""Tokens whose dates are wrong, and tokens that a client has made up."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from sqlalchemy import select

from aurora_router import ConfigurationError, Router
from aurora_router.cluster.probe_connection import Probe
from aurora_router.core import events
from aurora_router.core.token_codec import Token
from aurora_router.local.cluster import Cluster
from aurora_router.router import core_of
from tests.integration.shop import BOTH, RAISE, Item, a_position, eventually, place, sessions, until_readers_serve

MakeRouter = Callable[..., Router]
STOCK = select(Item.stock).where(Item.id == 1)


def write(router: Router) -> Token:
    """Raise the stock, and return the token of that write."""
    with sessions(router)() as s:
        s.execute(RAISE)
        s.commit()
        token = s.consistency_token
    assert token is not None
    return Token.parse(token)


def as_read_by(token: Token, ahead: float) -> str:
    """The token, as read by a host whose clock is that many seconds ahead."""
    return str(token._replace(made_at=token.made_at - int(ahead * 1000)))


@BOTH
@pytest.mark.parametrize("ahead", [-30.0, -5.0, 3.0, 5.0, 30.0])
def test_a_position_counts_whatever_the_clocks_say(cluster: Cluster[Any], make_router: MakeRouter, ahead: float) -> None:
    """A token with a position counts on a host whose clock is ahead or behind, however late the readers are."""
    here, there = make_router(), make_router(probe_interval=0.3)
    until_readers_serve(there, 2)
    for reader in cluster.readers:
        cluster.pause_replay(reader)
    for attempt in range(1, 6):
        token = as_read_by(write(here), ahead)
        with sessions(there)(after=token) as s:
            assert s.scalar(STOCK) == 10 + attempt
        with there.causal_scope(token), sessions(there, read_only=True)() as s:
            assert s.scalar(STOCK) == 10 + attempt


def test_a_date_in_the_far_future_is_refused(cluster: Cluster[Any], make_router: MakeRouter, heard: list[events.Event]) -> None:
    """A token from the far future, which would not expire for long, is an error; a client's is an event."""
    router = make_router(listeners=[heard.append])
    for ahead in (-61.0, -3600.0, -(10.0**9)):
        token = as_read_by(write(router), ahead)
        with pytest.raises(ConfigurationError, match="in the future"):
            sessions(router)(after=token)
        assert core_of(router).tokens.context_from_untrusted_token(token).requirement is None
        assert heard[-1] == events.TokenIgnored("dated in the future")


@BOTH
def test_a_forged_token_waits_for_no_instance_that_is_lost(cluster: Cluster[Any], make_router: MakeRouter) -> None:
    """With an instance lost, a read with a made-up token takes no longer than one probe of the others."""
    router = make_router(probe_interval=30.0, probe_timeout=30.0, position_interval=0.05)
    until_readers_serve(router, 2)
    real = write(router)
    lost = cluster.readers[0]
    cluster.kill(lost)
    eventually(lambda: core_of(router).monitor.suspect(lost.address) or len(router.topology.readers) == 1)
    began = time.monotonic()
    for number in range(1, 11):
        claim = real._replace(position=a_position(cluster, router.topology.epoch + number, 2**40))
        with sessions(router)(after=str(claim)) as s:
            assert s.scalar(STOCK) == 11
    assert time.monotonic() - began < 20, "far from ten times the 30 s until the lost one is asked again"


@BOTH
@pytest.mark.parametrize(("wait_for_reader", "placed"), [(0.0, True), (0.02, True), (0.02, False)])
def test_forged_tokens_make_few_probes(
    cluster: Cluster[Any], make_router: MakeRouter, monkeypatch: pytest.MonkeyPatch, wait_for_reader: float, placed: bool
) -> None:
    """However many made-up tokens come, no instance is probed more often than once every position_interval."""
    router = make_router(position_interval=0.2, wait_for_reader=wait_for_reader)
    until_readers_serve(router, 2)
    real = write(router)
    asked: dict[Probe, list[float]] = {}
    ask = Probe.ask

    def counted(probe: Probe) -> Any:
        asked.setdefault(probe, []).append(time.monotonic())
        return ask(probe)

    monkeypatch.setattr(Probe, "ask", counted)
    enough = threading.Event()

    def attack(number: int) -> None:
        while not enough.is_set():
            number += 8
            position = a_position(cluster, router.topology.epoch + number, 2**40) if placed else None
            claim = real._replace(position=position, made_at=int(time.time() * 1000))
            with sessions(router)(after=str(claim)) as s:
                assert s.scalar(STOCK) == 11

    with ThreadPoolExecutor(8) as threads:
        attacks = [threads.submit(attack, number) for number in range(1, 9)]
        eventually(lambda: asked and min(map(len, asked.values())) >= 5)
        enough.set()
        for each in attacks:
            each.result(timeout=30)
    for times in asked.values():
        gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
        assert sorted(gaps)[len(gaps) // 2] > 0.15, "as a rule the whole interval passes, and it may be late"


@BOTH
def test_an_honest_token_amid_forged_ones_finds_a_promotion(cluster: Cluster[Any], make_router: MakeRouter) -> None:
    """While made-up tokens keep the router looking, a token of a newly promoted writer is honoured at its first use."""
    there = make_router(probe_interval=3600)
    until_readers_serve(there, 2)
    real = write(there)
    claim = str(real._replace(position=a_position(cluster, there.topology.epoch + 7, 2**40)))
    with sessions(there)(after=claim) as s:
        assert s.scalar(STOCK) == 11
    cluster.wait_in_sync()
    cluster.promote()
    token = write(make_router())
    with sessions(there)(after=str(token)) as s:
        assert s.scalar(STOCK) == 12
        assert place(s) in ("reader", "writer")
