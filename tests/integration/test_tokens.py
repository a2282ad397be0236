"""Tokens on a real cluster: a unit with a token sees the writes that the token covers, wherever they were made."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable

import pytest
from sqlalchemy import event, select, text
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import scoped_session

from aurora_router import ConfigurationError, Router, RoutingSession
from aurora_router.core import events
from aurora_router.core.positions import WalPosition
from aurora_router.core.token_codec import Token
from aurora_router.errors import WrongServer
from aurora_router.local import FaultProxy, PostgresCluster
from tests.integration.shop import BOTH, RAISE, Item, a_position, eventually, place, sessions, until_readers_serve, write

MakeRouter = Callable[..., Router]
STOCK = select(Item.stock).where(Item.id == 1)


@BOTH
def test_what_one_process_has_written_another_ones_reads_show(paused: PostgresCluster, make_router: MakeRouter) -> None:
    here, there = make_router(), make_router()
    until_readers_serve(there, 2)
    token = write(here)
    with sessions(there)() as s:
        assert s.scalar(STOCK) == 10, "nobody has told it"
    for read_only in (None, True):
        with sessions(there, read_only=read_only)(after=token) as s:
            assert s.scalar(STOCK) == 11
    with there.connect(read_only=True, after=token) as connection:
        assert connection.scalar(STOCK) == 11
    with there.begin(read_only=True, after=token) as connection:
        assert connection.scalar(STOCK) == 11
    with there.raw_connection(read_only=True, after=token) as raw:
        cursor = raw.cursor()
        cursor.execute("SELECT stock FROM item WHERE id = 1")
        assert cursor.fetchone() == (11,)


@BOTH
def test_a_token_does_not_need_the_writer_once_a_reader_has_it(cluster: PostgresCluster, make_router: MakeRouter) -> None:
    """A token sends no unit to the writer once a reader has replayed the token's position."""
    here, there = make_router(), make_router(probe_interval=0.05)
    token = write(here)
    position = Token.parse(token).position
    assert position is not None
    eventually(lambda: all(r.position is not None and r.position.covers(position) for r in there.topology.readers))
    with sessions(there)(after=token) as s:
        assert s.scalar(STOCK) == 11
        assert place(s) == "reader", "its position is compared: no sample of ours is waited for"


def test_a_connection_with_a_token_does_not_change_its_server(cluster: PostgresCluster, make_router: MakeRouter) -> None:
    """A connection with a token does not go on at another server, which may show less than the token requires."""
    current, late = cluster.readers
    cluster.pause_replay(late)
    with FaultProxy((current.host, current.port)) as proxy:
        router = make_router(reader_endpoint=proxy.address, probe_interval=0.05)
        until_readers_serve(router, 1)
        token = write(router)
        eventually(lambda: explained(router, token) == proxy.address)
        with router.connect(read_only=True, after=token) as connection:
            assert connection.scalar(STOCK) == 11
            connection.rollback()
            proxy.retarget((late.host, late.port))
            proxy.reset_all()
            eventually(lambda: {server.address for r in router.topology.readers for server in r.servers} == {late.host})
            with pytest.raises(OperationalError):
                connection.scalar(STOCK)
            connection.rollback()
            with pytest.raises(WrongServer, match="another server than before"):
                connection.scalar(STOCK)
        with router.connect(read_only=True, after=token) as connection:
            assert connection.scalar(STOCK) == 11


def explained(router: Router, token: str) -> str | None:
    """The instance to which a read after this token would go."""
    with router.causal_scope(token):
        instance = router.explain("SELECT 1", read_only=True).instance
    return instance.id if instance is not None else None


def test_without_a_write_the_only_token_is_the_given_one(router: Router) -> None:
    """If nothing was written, there is no token but the one that was given."""
    with sessions(router)() as s:
        assert s.consistency_token is None
        s.get(Item, 1)
        s.commit()
        assert s.consistency_token is None
        s.execute(RAISE)
        s.rollback()
    token = write(router)
    with sessions(router)(after=token) as s:
        s.get(Item, 1)
        assert s.consistency_token == token


def test_a_token_is_asked_for_once_per_write(cluster: PostgresCluster, router: Router) -> None:
    """A session asks the writer for its token once, and again after its next write."""
    with sessions(router)() as s:
        s.execute(RAISE)
        s.commit()
        first = s.consistency_token
        assert first is not None
        seen = router.topology.samples
        assert s.consistency_token == first
        assert router.topology.samples is seen, "nobody was asked"
        s.execute(RAISE)
        s.commit()
        second = s.consistency_token
        assert second is not None
    one, two = Token.parse(first).position, Token.parse(second).position
    assert one is not None
    assert two is not None
    assert two.covers(one)
    assert two != one


def test_a_commit_listener_is_given_the_token_of_that_commit(paused: PostgresCluster, make_router: MakeRouter) -> None:
    """A listener of a commit is given the token of that commit."""
    here, there = make_router(), make_router()
    until_readers_serve(there, 2)
    told: list[str | None] = []
    with here.causal_scope() as scope, sessions(here)() as s:
        event.listen(s, "after_commit", lambda session: told.extend((session.consistency_token, scope.token)))
        with s.begin_nested():
            s.execute(RAISE)
        assert told == [None, None], "a savepoint is no commit"
        s.commit()
    for token in told[2:]:
        assert token is not None
        with sessions(there)(after=token) as s:
            assert s.scalar(STOCK) == 11


def test_a_foreign_or_malformed_token_is_an_error_at_once(router: Router) -> None:
    """A token of another cluster, or no token at all, is an error at once."""
    for wrong in ("1.42.1-A.1764000000", "nonsense", "", 7):
        with pytest.raises(ConfigurationError, match="consistency token"):
            sessions(router)(after=wrong)
        with pytest.raises(ConfigurationError, match="consistency token"):
            router.connect(read_only=True, after=wrong)  # type: ignore[arg-type]
        with pytest.raises(ConfigurationError, match="consistency token"), router.causal_scope(wrong):  # type: ignore[arg-type]
            pass


@BOTH
def test_a_token_that_claims_what_no_writer_has_holds_nobody_up(cluster: PostgresCluster, router: Router) -> None:
    until_readers_serve(router, 2)
    real = Token.parse(write(router))
    epoch = router.topology.epoch
    for position in (
        a_position(cluster, epoch, 2**60),
        a_position(cluster, epoch + 500, 10),
        a_position(cluster, epoch + 500, 2**60),
    ):
        claim = str(real._replace(position=position))
        began = time.monotonic()
        with sessions(router)(after=claim) as s:
            assert s.scalar(STOCK) == 11
            assert time.monotonic() - began < 10, "not for good"

            def on_a_reader(s: RoutingSession = s) -> bool:
                s.rollback()
                s.scalar(STOCK)
                return place(s) == "reader"

            eventually(on_a_reader)


@pytest.mark.parametrize("in_scope", [False, True])
def test_a_token_delays_a_read_no_longer_than_its_ttl(cluster: PostgresCluster, make_router: MakeRouter, in_scope: bool) -> None:
    """A token keeps a read waiting for a writer no longer than the token is honoured."""
    router = make_router(token_ttl=2.0, failover_timeout=60.0)
    until_readers_serve(router, 2)
    real = Token.parse(write(router))
    claim = str(real._replace(position=WalPosition(router.topology.epoch, 2**60)))
    cluster.kill(cluster.writer)
    eventually(lambda: router.topology.writer is None)
    began = time.monotonic()
    with router.causal_scope(claim) if in_scope else contextlib.nullcontext():
        for _ in range(2):
            with sessions(router)(after=None if in_scope else claim) as s:
                assert s.scalar(STOCK) in (10, 11)
                assert place(s) == "reader"
    assert time.monotonic() - began < 30


def test_an_expired_token_asks_for_nothing_and_is_not_handed_on(make_router: MakeRouter, heard: list[events.Event]) -> None:
    router = make_router(listeners=[heard.append])
    expired = str(Token.parse(write(router))._replace(made_at=1))
    with sessions(router)(after=expired) as s:
        s.get(Item, 1)
        assert s.consistency_token is None
    assert events.TokenIgnored("expired") in heard


def test_a_token_of_an_older_epoch_is_proven_by_the_new_writer(cluster: PostgresCluster, make_router: MakeRouter) -> None:
    router = make_router(probe_interval=0.1)
    token = write(router)
    cluster.wait_in_sync()
    cluster.kill(cluster.writer)
    cluster.promote()
    eventually(lambda: router.topology.epoch > 1 and router.topology.writer is not None)
    eventually(lambda: bool(router.topology.readers))

    def on_a_reader() -> bool:
        with sessions(router)(after=token) as s:
            assert s.scalar(STOCK) == 11
            s.rollback()
            time.sleep(0.1)
            assert s.scalar(STOCK) == 11
            return place(s) == "reader"

    eventually(on_a_reader)


def test_a_token_of_a_newer_writer_makes_all_be_asked(cluster: PostgresCluster, make_router: MakeRouter) -> None:
    """A token of a newer writer than the router knows makes it probe all instances."""
    there = make_router(probe_interval=3600)
    there.start()
    cluster.promote()
    token = write(make_router())
    with sessions(there)(after=token) as s:
        assert s.scalar(STOCK) == 11


def test_a_writing_unit_looks_for_its_tokens_newer_writer(cluster: PostgresCluster, make_router: MakeRouter) -> None:
    """A unit that writes looks for the newer writer of its token."""
    there = make_router(probe_interval=3600)
    there.start()
    old = cluster.writer
    cluster.promote()
    assert old.running, "and takes writes still, which nobody will see"
    token = write(make_router())
    with sessions(there)(after=token) as s:
        s.execute(RAISE)
        s.commit()
    assert cluster.execute("SELECT stock FROM item WHERE id = 1") == [(12,)]


def test_a_signed_router_takes_only_what_it_has_signed(make_router: MakeRouter) -> None:
    signed, plain = make_router(token_keys=["a secret"]), make_router()
    token = write(signed)
    assert len(token) < 120
    with sessions(signed)(after=token) as s:
        assert s.scalar(STOCK) == 11
    with pytest.raises(ConfigurationError, match="signed"):
        sessions(signed)(after=write(plain))
    assert "a secret" not in repr(vars(signed))


def test_without_the_writer_a_token_speaks_of_all_commits(cluster: PostgresCluster, make_router: MakeRouter) -> None:
    """If the writer cannot be asked, the token covers all commits so far."""
    router = make_router(probe_timeout=0.3)
    with sessions(router)() as s:
        s.execute(RAISE)
        s.commit()
        cluster.freeze(cluster.writer)
        token = s.consistency_token
    cluster.thaw(cluster.writer)
    assert token is not None
    assert Token.parse(token).position is None
    eventually(lambda: router.topology.writer is not None)
    with sessions(router)(after=token) as s:
        assert s.scalar(STOCK) == 11


def test_while_there_is_no_writer_nobody_waits_for_a_token(cluster: PostgresCluster, make_router: MakeRouter) -> None:
    router = make_router(probe_timeout=30.0, probe_interval=5.0, position_interval=60)
    with sessions(router)() as s:
        s.execute(RAISE)
        s.commit()
        cluster.kill(cluster.writer)
        eventually(lambda: router.topology.writer is None)
        began = time.monotonic()
        token = s.consistency_token
        assert time.monotonic() - began < 20.0, "and not for probe_timeout, message for message"
    assert token is not None
    assert Token.parse(token).position is None


@pytest.mark.parametrize("way", ["text", "autocommit"])
def test_a_sessions_token_counts_commits_of_an_open_unit(paused: PostgresCluster, make_router: MakeRouter, way: str) -> None:
    """A session's token covers the commits of the session, although its unit goes on."""
    router = make_router(engine_options={"isolation_level": "AUTOCOMMIT"} if way == "autocommit" else {})
    until_readers_serve(router, 2)
    with sessions(router)() as s:
        s.execute(RAISE)
        if way == "text":
            assert s.consistency_token is None, "its commit is still to come"
            s.execute(text("COMMIT"))
        with sessions(router)(after=s.consistency_token) as other:
            assert other.scalar(STOCK) == 11


def test_a_scoped_session_gives_the_token_of_the_session_inside(router: Router) -> None:
    session = scoped_session(sessions(router))
    session.execute(RAISE)
    session.commit()
    assert session().consistency_token is not None
    session.remove()
