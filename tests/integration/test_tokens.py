"""Tokens and scopes on a real cluster: a session sees the writes of another one, wherever that is."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import gc
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import pytest
from sqlalchemy import event, select, text
from sqlalchemy.exc import DataError, OperationalError
from sqlalchemy.orm import scoped_session

from aurora_router import ConfigurationError, OutcomeUnknown, Router, RoutingSession
from aurora_router.core import events
from aurora_router.core.positions import WalPosition, evidence
from aurora_router.core.selection import Load
from aurora_router.core.tokens import Token
from aurora_router.core.topology import Instance
from aurora_router.errors import WrongServer
from aurora_router.local import FaultProxy, LocalInstance, PostgresCluster
from aurora_router.unit import current
from tests.integration.shop import BOTH, RAISE, Item, a_position, eventually, instance_id, place, sessions, until_readers_serve

MakeRouter = Callable[..., Router]
STOCK = select(Item.stock).where(Item.id == 1)


def write(router: Router, **options: object) -> str:
    """Raise the stock, and return the token of that write."""
    with sessions(router)(**options) as s:
        s.execute(RAISE)
        s.commit()
        token = s.consistency_token
    assert token is not None
    return token


@pytest.fixture
def paused(cluster: PostgresCluster) -> PostgresCluster:
    """The cluster, whose readers replay nothing any more."""
    for reader in cluster.readers:
        cluster.pause_replay(reader)
    return cluster


# -- tokens ---------------------------------------------------------------------------------------------------------


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
    router = make_router(probe_timeout=5.0, probe_interval=5.0, position_interval=60)
    with sessions(router)() as s:
        s.execute(RAISE)
        s.commit()
        cluster.kill(cluster.writer)
        eventually(lambda: router.topology.writer is None)
        began = time.monotonic()
        token = s.consistency_token
        assert time.monotonic() - began < 2.0, "and not for probe_timeout, message for message"
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


# -- scopes ---------------------------------------------------------------------------------------------------------


def test_a_scope_sees_writes_of_its_sessions_and_connections(paused: PostgresCluster, router: Router) -> None:
    """Sessions and connections inside a scope see what any of them has written."""
    until_readers_serve(router, 2)
    with router.causal_scope() as scope:
        with sessions(router)() as s:
            s.execute(RAISE)
            s.commit()
        with sessions(router)() as s:
            assert s.scalar(STOCK) == 11
        with router.connect(read_only=True) as connection:
            assert connection.scalar(STOCK) == 11
        token = scope.token
    with sessions(router)() as s:
        assert s.scalar(STOCK) == 10, "the scope is over"
    with router.causal_scope(token) as scope:
        with router.connect(read_only=True) as connection:
            assert connection.scalar(STOCK) == 11
        assert scope.token == token


def test_an_open_unit_moves_to_what_its_scope_has_written(paused: PostgresCluster, router: Router) -> None:
    """An open unit moves to the writer to see the writes of others in its scope."""
    until_readers_serve(router, 2)
    with router.causal_scope(), sessions(router)() as s:
        assert s.scalar(STOCK) == 10
        assert place(s) == "reader"
        write(router)
        assert s.scalar(STOCK) == 11
        assert place(s) == "writer"


def test_what_is_written_on_a_connection_is_in_the_scopes_token(paused: PostgresCluster, router: Router) -> None:
    until_readers_serve(router, 2)
    with router.causal_scope() as scope:
        with router.begin() as connection:
            connection.execute(RAISE)
        token = scope.token
    assert token is not None
    with sessions(router)(after=token) as s:
        assert s.scalar(STOCK) == 11


def test_a_commit_is_seen_while_its_connection_is_open(paused: PostgresCluster, router: Router) -> None:
    """A commit of a connection is seen while the connection is still open."""
    until_readers_serve(router, 2)
    with router.causal_scope() as scope, router.connect() as connection, sessions(router)() as s:
        connection.execute(RAISE)
        assert s.scalar(STOCK) == 10
        s.rollback()
        connection.commit()
        assert s.scalar(STOCK) == 11
        token = scope.token
    with sessions(router)(after=token) as s:
        assert s.scalar(STOCK) == 11


def test_what_happens_in_a_scope_happens_in_those_around_it(paused: PostgresCluster, router: Router) -> None:
    until_readers_serve(router, 2)
    with router.causal_scope() as outer:
        with router.causal_scope() as inner:
            token = write(router)
        assert inner.token == token
        with sessions(router)() as s:
            assert s.scalar(STOCK) == 11
        with router.causal_scope(), sessions(router)() as s:
            assert s.scalar(STOCK) == 11
        assert outer.token is not None


def test_a_scope_follows_tasks_and_copied_contexts_only(paused: PostgresCluster, router: Router) -> None:
    """A scope goes along with tasks and copied contexts, and not with other threads."""
    until_readers_serve(router, 2)

    def look() -> object:
        with sessions(router)() as s:
            return s.scalar(STOCK)

    async def in_tasks() -> list[object]:
        with router.causal_scope():
            await asyncio.to_thread(write, router)
            return [await asyncio.create_task(asyncio.to_thread(look)), await asyncio.to_thread(look)]

    assert asyncio.run(in_tasks()) == [11, 11]
    found: list[object] = []
    with router.causal_scope():
        write(router)
        for run in (contextvars.copy_context().run, lambda call: call()):
            thread = threading.Thread(target=lambda run=run: found.append(run(look)))
            thread.start()
            thread.join()
    assert found == [12, 10]


def test_scopes_that_end_out_of_order_leave_none_open(router: Router) -> None:
    """Scopes that end in another order than they began leave none open."""
    one, other = router.causal_scope(), router.causal_scope()
    first, second = one.__enter__(), other.__enter__()
    one.__exit__(None, None, None)
    assert current(first.owner) == (second,)
    other.__exit__(None, None, None)
    assert current(first.owner) == ()


def test_a_scope_may_end_in_another_context(router: Router) -> None:
    """A scope that ends in another context than it began is no error."""
    block = router.causal_scope()
    scope = contextvars.copy_context().run(block.__enter__)
    with router.causal_scope() as here:
        block.__exit__(None, None, None)
        assert current(scope.owner) == (here,)


def test_scopes_of_two_routers_do_not_mix(paused: PostgresCluster, make_router: MakeRouter) -> None:
    one, other = make_router(), make_router()
    until_readers_serve(other, 2)
    with one.causal_scope() as scope, other.causal_scope() as another:
        write(one)
        with sessions(other)() as s:
            assert s.scalar(STOCK) == 10
        assert another.token is None
        assert scope.token is not None


# -- monotonic reads ------------------------------------------------------------------------------------------------


class Readers:
    """Two readers, and a strategy that takes the `wanted` one.

    late: shows the stock of 10
    current: shows the stock of 11
    """

    def __init__(self, late: LocalInstance, current: LocalInstance) -> None:
        self.late, self.current = late, current
        self.wanted = late

    def balance(self, readers: Sequence[Instance], load: Load, rnd: float) -> Instance:
        return next((reader for reader in readers if reader.id == self.wanted.address), readers[0])


@pytest.fixture
def readers(cluster: PostgresCluster) -> Readers:
    late, current = cluster.readers
    cluster.pause_replay(late)
    cluster.execute("UPDATE item SET stock = 11 WHERE id = 1")
    eventually(lambda: cluster.execute("SELECT stock FROM item WHERE id = 1", instance=current) == [(11,)])
    return Readers(late, current)


@pytest.fixture
def split(readers: Readers, make_router: MakeRouter) -> Router:
    """A router that takes the wanted reader."""
    router = make_router(balance=readers.balance)
    until_readers_serve(router, 2)
    return router


def goes_to(router: Router, reader: LocalInstance) -> bool:
    """Whether a read would go to that reader now."""
    instance = router.explain("SELECT 1").instance
    return instance is not None and instance.id == reader.address


@BOTH
def test_later_reads_show_no_less_though_the_reader_changes(readers: Readers, make_router: MakeRouter) -> None:
    router = make_router(balance="round_robin")
    until_readers_serve(router, 2)
    shown = 0
    with sessions(router)() as s:
        for _ in range(30):
            found = s.scalar(STOCK)
            assert found is not None
            assert found >= shown
            shown = found
            s.rollback()
    with router.causal_scope():
        shown = 0
        for _ in range(30):
            with router.connect(read_only=True) as connection:
                found = connection.scalar(STOCK)
            assert found is not None
            assert found >= shown
            shown = found


def test_a_session_entering_a_scope_is_shown_no_less_than_either(readers: Readers, split: Router) -> None:
    """A session that enters a scope is shown no less than it or the scope was shown before."""
    with sessions(split)() as s:
        readers.wanted = readers.current
        assert s.scalar(STOCK) == 11
        s.rollback()
        readers.wanted = readers.late
        with split.causal_scope():
            with sessions(split)() as other:
                assert other.scalar(STOCK) == 10
            assert s.scalar(STOCK) == 11


def test_a_session_stays_with_the_reader_that_it_has_read_from(router: Router) -> None:
    until_readers_serve(router, 2)
    with sessions(router)() as s:
        s.get(Item, 1)
        mine = instance_id(s)
        s.rollback()
        for _ in range(20):
            s.get(Item, 1)
            assert instance_id(s) == mine
            s.rollback()


def test_a_late_reader_takes_back_nothing_the_writer_showed(paused: PostgresCluster, router: Router) -> None:
    """A late reader does not take back what the writer has shown."""
    until_readers_serve(router, 2)
    paused.execute("UPDATE item SET stock = 11 WHERE id = 1")
    with sessions(router)() as s:
        assert s.scalar(STOCK.execution_options(route="writer")) == 11
        s.rollback()
        assert s.scalar(STOCK) == 11


def test_a_unit_whose_reader_dies_is_shown_no_less(cluster: PostgresCluster, readers: Readers, split: Router) -> None:
    """A unit whose reader dies goes on where it is shown no less."""
    readers.wanted = readers.current
    with sessions(split)() as s:
        assert s.scalar(STOCK) == 11
        assert instance_id(s) == readers.current.address
        cluster.kill(readers.current)
        assert s.scalar(STOCK) == 11
        assert place(s) == "writer"


def test_a_read_on_a_reader_left_behind_counts_for_others(cluster: PostgresCluster, readers: Readers, split: Router) -> None:
    """A read that a unit made before it left its reader counts for others of its scope."""
    readers.wanted = readers.current
    with split.causal_scope(), sessions(split)() as s, sessions(split)() as other:
        assert s.scalar(STOCK) == 11
        cluster.kill(readers.current)
        assert s.scalar(STOCK) == 11
        readers.wanted = readers.late
        assert other.scalar(STOCK) == 11


def test_eventual_consistency_promises_none_of_this(paused: PostgresCluster, make_router: MakeRouter) -> None:
    router = make_router(consistency="eventual")
    until_readers_serve(router, 2)
    with router.causal_scope() as scope, sessions(router)() as s:
        s.execute(RAISE)
        s.commit()
        assert s.scalar(STOCK) == 10
        assert s.consistency_token is None
        assert scope.token is None
    with sessions(router)(after=write(make_router())) as s:
        assert s.scalar(STOCK) == 12, "what is given counts"


def test_a_scoped_session_gives_the_token_of_the_session_inside(router: Router) -> None:
    session = scoped_session(sessions(router))
    session.execute(RAISE)
    session.commit()
    assert session().consistency_token is not None
    session.remove()


def test_open_units_of_a_scope_take_nothing_back(readers: Readers, split: Router) -> None:
    """Units of a scope that are open together take nothing back from each other."""
    with split.causal_scope(), sessions(split)() as one, sessions(split)() as other:
        assert one.scalar(STOCK) == 10
        readers.wanted = readers.current
        eventually(lambda: goes_to(split, readers.current))
        assert other.scalar(STOCK) == 11
        assert one.scalar(STOCK) == 11, "the other one was shown it meanwhile, and has not ended"
    with split.causal_scope(), sessions(split)() as one, sessions(split)() as other:
        assert one.scalar(STOCK) == 11
        readers.wanted = readers.late
        assert other.scalar(STOCK) == 11


def test_the_last_of_parallel_reads_does_not_hide_the_other(readers: Readers, split: Router) -> None:
    """The last of parallel reads in a scope does not hide the rows that another one has shown."""
    with split.causal_scope():
        with split.connect(read_only=True) as slow:
            readers.wanted = readers.current
            with split.connect(read_only=True) as quick:
                assert quick.scalar(STOCK) == 11
            assert slow.scalar(STOCK) == 10, "its transaction is where it is"
        readers.wanted = readers.late
        with split.connect(read_only=True) as connection:
            assert connection.scalar(STOCK) == 11


def test_an_open_unit_follows_its_scopes_reads_on_the_writer(readers: Readers, split: Router) -> None:
    """An open unit moves to the writer if another one of its scope has read there."""
    with split.causal_scope(), sessions(split)() as s, sessions(split)() as other:
        assert s.scalar(STOCK) == 10
        assert other.scalar(STOCK.execution_options(route="writer")) == 11
        assert s.scalar(STOCK) == 11


def test_an_idle_connection_keeps_no_unit_from_a_reader(router: Router) -> None:
    """A connection that has sent nothing keeps no unit from a reader."""
    until_readers_serve(router, 2)
    with router.causal_scope(), router.connect(), sessions(router)() as s:
        assert s.scalar(STOCK) == 10
        assert place(s) == "reader"


@pytest.mark.parametrize("consistency", ["session", "global"])
def test_an_open_automatic_unit_sees_what_others_commit(
    paused: PostgresCluster, make_router: MakeRouter, consistency: str
) -> None:
    """An open automatic unit sees what others commit meanwhile."""
    router = make_router(consistency=consistency)
    until_readers_serve(router, 2)
    with router.causal_scope() if consistency == "session" else contextlib.nullcontext(), sessions(router)() as s:
        assert s.scalar(STOCK) == 10
        write(router)
        assert s.scalar(STOCK) == 11


@contextlib.contextmanager
def committed(router: Router, way: str) -> Iterator[None]:
    """Raise the stock on a connection that stays checked out."""
    if way == "raw":
        raw = router.raw_connection()
        raw.cursor().execute("UPDATE item SET stock = stock + 1 WHERE id = 1")
        raw.commit()
        yield
        raw.close()
    elif way == "session in autocommit":
        with sessions(router)() as s:
            s.connection(execution_options={"isolation_level": "AUTOCOMMIT"})
            s.execute(RAISE)
            yield
    else:
        with router.connect() as connection:
            if way == "autocommit":
                connection.execution_options(isolation_level="AUTOCOMMIT")
            connection.execute(RAISE)
            if way == "text":
                connection.execute(text("COMMIT"))
            elif way == "commit":
                connection.commit()
            yield


@pytest.mark.parametrize("way", ["commit", "text", "autocommit", "raw", "session in autocommit"])
def test_a_scope_sees_commits_of_an_open_connection(paused: PostgresCluster, router: Router, way: str) -> None:
    """A scope sees what was committed on a connection that is still open."""
    until_readers_serve(router, 2)
    with router.causal_scope() as scope, committed(router, way):
        assert scope.wrote, "middleware looks at this"
        with sessions(router)() as s:
            assert s.scalar(STOCK) == 11
        token = scope.token
        with router.connect(read_only=True, after=token) as connection:
            assert connection.scalar(STOCK) == 11


def test_a_scope_may_be_entered_again_and_goes_on(paused: PostgresCluster, router: Router) -> None:
    until_readers_serve(router, 2)
    scope = router.causal_scope()
    with scope:
        write(router)
    for _ in range(2):
        with scope, sessions(router)() as s:
            assert s.scalar(STOCK) == 11
    assert current(scope.owner) == ()


def until_proven(router: Router) -> None:
    """Wait until all readers are known to have replayed a position that the writer reports after this moment."""
    now = time.monotonic()

    def proven() -> bool:
        topology = router.topology
        found = evidence(topology.samples, now)
        return found is not None and all(r.position is not None and r.position.covers(found.position) for r in topology.readers)

    eventually(proven)


@pytest.mark.parametrize("consistency", ["session", "global"])
def test_an_unanswered_two_phase_commit_counts_from_its_end(
    cluster: PostgresCluster, proxy: FaultProxy, make: MakeRouter, consistency: str
) -> None:
    """A two-phase commit whose answer is lost counts from its end."""
    router = make(consistency=consistency, probe_interval=0.05)
    with router.causal_scope() as scope:
        with sessions(router, twophase=True)() as s:
            s.execute(RAISE)
            s.prepare()
            until_proven(router)
            for reader in cluster.readers:
                cluster.pause_replay(reader)
            proxy.lose("COMMIT PREPARED", answer=True)
            with pytest.raises(OutcomeUnknown):
                s.commit()
        assert not scope.units
        assert not router.causality._committing, "or all reads go to the writer from now on"
        with sessions(router)() as other:
            assert other.scalar(STOCK) == 11


@pytest.mark.parametrize("way", ["flush", "bulk"])
def test_a_scope_sees_what_a_flush_has_committed_in_autocommit(
    cluster: PostgresCluster, make_router: MakeRouter, way: str
) -> None:
    router = make_router(probe_interval=0.05, engine_options={"isolation_level": "AUTOCOMMIT"})
    until_readers_serve(router, 2)
    with router.causal_scope() as scope, sessions(router)() as s:
        item = s.get_one(Item, 1)
        until_proven(router)
        for reader in cluster.readers:
            cluster.pause_replay(reader)
        if way == "flush":
            item.stock = 11
            s.flush()
        else:
            s.bulk_update_mappings(Item, [{"id": 1, "stock": 11}])
        with sessions(router)() as other:
            assert other.scalar(STOCK) == 11
        token = scope.token
        with sessions(router)(after=token) as other:
            assert other.scalar(STOCK) == 11


@pytest.mark.parametrize("read_only", [None, True, False])
def test_a_forgotten_session_does_not_stay_in_its_scope(router: Router, read_only: bool | None) -> None:
    """A session that is forgotten without close() does not stay in its scope."""
    with router.causal_scope() as scope:
        for use in (lambda s: s.scalar(STOCK), lambda s: s.connection(), lambda s: s.execute(text("SELECT 1 / 0"))):
            s = sessions(router, read_only=read_only)()
            with contextlib.suppress(DataError):
                use(s)
            del s
        gc.collect()
        assert not scope.units


def test_what_a_session_was_shown_counts_though_it_is_forgotten(readers: Readers, split: Router) -> None:
    with split.causal_scope():
        readers.wanted = readers.current
        s = sessions(split)()
        assert s.scalar(STOCK) == 11
        del s
        gc.collect()
        readers.wanted = readers.late
        with sessions(split)() as other:
            assert other.scalar(STOCK) == 11


# -- waiting instead of a detour --------------------------------------------------------------------------------------


def test_a_read_waits_for_a_reader_where_it_may(cluster: PostgresCluster, make_router: MakeRouter) -> None:
    heard: list[events.Event] = []
    router = make_router(wait_for_reader=10.0, listeners=[heard.append])
    until_readers_serve(router, 2)
    for reader in cluster.readers:
        cluster.set_lag(reader, 0.2)
    with sessions(router)() as s:
        for expected in range(11, 14):
            s.execute(RAISE)
            s.commit()
            assert s.scalar(STOCK) == expected
            assert place(s) == "reader"
            s.rollback()


def test_a_read_that_waited_long_enough_goes_to_the_writer(paused: PostgresCluster, make_router: MakeRouter) -> None:
    """A read that has waited for long enough goes to the writer."""
    router = make_router(wait_for_reader=0.1)
    until_readers_serve(router, 2)
    with sessions(router)() as s:
        s.execute(RAISE)
        s.commit()
        began = time.monotonic()
        assert s.scalar(STOCK) == 11
        assert place(s) == "writer"
        assert time.monotonic() - began >= 0.1
        assert s.scalar(text("SELECT 1")) == 1, "and does not wait again in the same unit"


def test_a_reader_that_is_not_heard_is_as_late_as_it_is_silent(cluster: PostgresCluster, make_router: MakeRouter) -> None:
    reader, other = cluster.readers
    router = make_router(max_lag=0.4, probe_timeout=60.0)
    until_readers_serve(router, 2)
    cluster.freeze(reader)
    eventually(lambda: router.explain("SELECT 1").instance is not None)
    # After max_lag without an answer nobody can know how late the reader is.
    time.sleep(0.5)

    def serves() -> str:
        found = router.explain("SELECT 1").instance
        assert found is not None
        assert found.id != reader.address
        return found.id

    for _ in range(20):
        eventually(lambda: serves() == other.address)  # its own answers may be late, too
    cluster.thaw(reader)
