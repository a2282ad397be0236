"""A router whose process forks, stands still, ends, or is interrupted."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import Any

import pytest
from sqlalchemy import text

import aurora_router
from aurora_router import Router
from aurora_router.cluster.sockets import TrackedSocket
from aurora_router.core.probing import STALE_AFTER
from aurora_router.local import FaultProxy, PostgresCluster
from aurora_router.router import core_of
from tests.integration.shop import BOTH, eventually, no_connection_is_left
from tests.interruptions import interrupted_at_each_line

MakeRouter = Callable[..., Router]

PREAMBLE = """
import gc, os, signal, sys, threading, time
from sqlalchemy import text
from sqlalchemy.orm import sessionmaker
from aurora_router import Router, RouterError, RoutingSession
from aurora_router.router import core_of

def router(**options):
    return Router(sys.argv[1], instances=sys.argv[2:], **options)

def in_child(work, patience=30):
    '''Run work in a forked child; how it ended.'''
    pid = os.fork()
    if pid == 0:
        try:
            work()
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            assert status == 0, status
            return
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    raise AssertionError("the child hangs")
"""


@contextmanager
def running(cluster: PostgresCluster, script: str, *instances: str, url: str | None = None) -> Iterator[subprocess.Popen[str]]:
    """A process of its own that runs the script on the cluster, or on these instances."""
    others = instances or [i.address for i in cluster.instances if i is not cluster.writer]
    command = [sys.executable, "-c", PREAMBLE + script, url or cluster.url, *others]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def run(cluster: PostgresCluster, script: str, *instances: str) -> list[str]:
    """Run the script to its end, and return the lines that it printed."""
    with running(cluster, script, *instances) as process:
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
        assert "Traceback" not in err, err
        return out.splitlines()


def test_what_is_under_way_in_a_scope_at_a_fork_is_the_parents(cluster: PostgresCluster) -> None:
    script = """
r = router()
with r.causal_scope() as scope, r.connect() as connection:
    connection.execute(text("SELECT 1"))
    def work():
        assert not scope.units
    in_child(work)
    assert scope.units
assert not scope.units
print("done")
"""
    assert run(cluster, script) == ["done"]


@BOTH
def test_a_forked_child_has_connections_and_threads_of_its_own(cluster: PostgresCluster) -> None:
    run(
        cluster,
        """
r = router()
ask = text("SELECT pg_backend_pid()" if core_of(r).settings.target.dialect == "postgresql" else "SELECT connection_id()")
def pids():
    with r.connect() as c, r.connect(read_only=True) as d:
        return {c.scalar(ask), d.scalar(ask)}
mine = pids()
def child():
    assert not core_of(r).monitor._watchers
    theirs = pids()
    assert not mine & theirs, (mine, theirs)
    assert sum(t.name == "aurora-router-monitor" for t in threading.enumerate()) == 1
    gc.collect()
    r.close()
for _ in range(3):
    in_child(child)
gc.collect()
assert pids() == mine, "the parent's connections are as they were"
""",
        cluster.readers[0].address,
    )


@BOTH
def test_a_child_shares_no_socket_with_its_parent(cluster: PostgresCluster) -> None:
    run(
        cluster,
        """
r = router(probe_interval=0.05)
with r.connect() as c, r.connect(read_only=True) as d:
    c.execute(text("SELECT 1")); d.execute(text("SELECT 1"))
    time.sleep(0.2)
    def inet():
        found = set()
        for name in os.listdir("/proc/self/fd"):
            try:
                target = os.readlink(f"/proc/self/fd/{name}")
            except OSError:
                continue
            if target.startswith("socket:["):
                found.add(target[8:-1])
        return found & {line.split()[9] for line in open("/proc/net/tcp").readlines()[1:]}
    assert inet()
    def child():
        assert not inet(), inet()
    in_child(child)
""",
    )


@BOTH
def test_a_session_open_at_the_fork_is_told_and_can_go_on(cluster: PostgresCluster) -> None:
    """A session that was open at the fork raises an error in the child, and can begin anew."""
    out = run(
        cluster,
        """
r = router()
Session = sessionmaker(class_=RoutingSession, router=r)
for begin in ("SELECT count(*) FROM item", "UPDATE item SET stock = 0 WHERE id = 1"):
    with Session() as s:
        s.execute(text(begin))
        def child():
            for sql in ("SELECT 1", "UPDATE item SET stock = 1 WHERE id = 2"):
                try:
                    s.execute(text(sql))
                    print("sent", flush=True)
                except RouterError as error:
                    print(error, flush=True)
            s.rollback()
            assert s.scalar(text("SELECT count(*) FROM item")) == 3
            s.execute(text("UPDATE item SET stock = stock + 1 WHERE id = 3"))
            s.commit()
            s.close()
        in_child(child)
        s.commit()
with Session(read_only=False) as s:
    print(s.execute(text("SELECT stock FROM item ORDER BY id")).scalars().all())
""",
    )
    told = "this connection is of the process that forked this one; roll back or close, and begin anew"
    assert out == [told, told, told, told, "[0, 20, 32]"]


@BOTH
def test_a_unit_open_at_the_fork_is_committed_by_the_parent(cluster: PostgresCluster) -> None:
    """A unit that was open at the fork is committed by the parent alone."""
    out = run(
        cluster,
        """
r = router()
r.init_commit_table()
Session = sessionmaker(class_=RoutingSession, router=r)
raise_stock = text("UPDATE item SET stock = stock + 1 WHERE id = 1")
children = []
def forks(s):
    s.execute(raise_stock)
    if not children:
        children.append(os.fork())
for check in (None, "xid"):
    with Session(commit_check=check) as s:
        s.execute(raise_stock)
        def child():
            try:
                s.commit()
            except RouterError as error:
                print(error, flush=True)
        in_child(child)
        s.commit()
try:
    r.run_transaction(Session, forks)
except RouterError as error:
    print(error, flush=True)
if children == [0]:
    os._exit(0)
assert os.waitpid(children[0], 0)[1] == 0
print(r.run_transaction(Session, lambda s: s.scalar(text("/*@writer*/ SELECT stock FROM item WHERE id = 1"))))
""",
    )
    told = "this connection is of the process that forked this one; roll back or close, and begin anew"
    assert out == [told, told, told, "13"]


def test_locks_held_at_the_fork_do_not_stall_the_child(cluster: PostgresCluster) -> None:
    """Locks that other threads held at the fork do not stall the child."""
    run(
        cluster,
        """
r = router(probe_interval=0.002)
stop = threading.Event()
def work():
    while not stop.is_set():
        with r.connect(read_only=True) as c:
            c.execute(text("SELECT 1"))
        c = r.raw_connection()
        c.invalidate()
        c.close()
threads = [threading.Thread(target=work, daemon=True) for _ in range(3)]
for thread in threads:
    thread.start()
time.sleep(0.3)
def child():
    with r.connect() as c:
        c.execute(text("SELECT 1"))
for _ in range(15):
    in_child(child)
stop.set()
""",
    )


def test_a_child_forked_during_a_first_connect_makes_its_own(cluster: PostgresCluster) -> None:
    """A child that is forked during the first connect makes a connection of its own."""
    run(
        cluster,
        """
r = router()
dialect = r.engine(r.topology.writer).dialect
initialize, begun, go_on = dialect.initialize, threading.Event(), threading.Event()
def slow(connection):
    begun.set()
    go_on.wait()
    initialize(connection)
dialect.initialize = slow
def first():
    with r.connect() as c:
        assert c.scalar(text("SELECT 1")) == 1
        assert c.dialect.server_version_info >= (12,), "SQLAlchemy's first look at the server is not left half-done"
thread = threading.Thread(target=first)
thread.start()
begun.wait()
in_child(first)
go_on.set()
thread.join()
""",
    )


def test_a_child_does_not_trust_what_its_parent_knew(cluster: PostgresCluster) -> None:
    script = """
r = router(probe_interval=30)
r.start()
if os.fork() == 0:
    print("forked", flush=True)
    sys.stdin.readline()
    print("connecting", flush=True)
    with r.connect() as c:
        print(c.scalar(text("SELECT host(inet_server_addr()) || ':' || inet_server_port()")), flush=True)
    os._exit(0)
os.wait()
"""
    with running(cluster, script) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "forked\n"
        new = cluster.promote()  # The old one still believes that it is the writer.
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
        out, err = process.communicate(timeout=30)
        assert out.splitlines() == ["connecting", new.address], err


def test_a_process_that_was_stopped_asks_again_before_it_decides(cluster: PostgresCluster) -> None:
    script = """
from aurora_router.core import events
heard = []
r = router(listeners=[lambda e: heard.append(e) if isinstance(e, events.InstanceDown) else None])
r.connect().close()
print("ready", flush=True)
sys.stdin.readline()
with r.connect() as c:
    print(c.scalar(text("SELECT host(inet_server_addr()) || ':' || inet_server_port()")), flush=True)
print([e.instance for e in heard])
"""
    old = cluster.writer
    with running(cluster, script) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGSTOP)
        stopped = time.monotonic()
        new = cluster.promote()  # The old one still believes that it is the writer.
        eventually(lambda: time.monotonic() - stopped > STALE_AFTER + 1)
        process.stdin.write("go\n")
        process.stdin.flush()
        process.send_signal(signal.SIGCONT)
        out, err = process.communicate(timeout=30)
        assert out.splitlines() == [new.address, str([old.address])], err


def test_a_machine_that_slept_asks_again_before_it_decides(
    cluster: PostgresCluster, make_router: MakeRouter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine that slept asks again before it decides, although its monotonic clock stood still."""
    router = make_router(probe_interval=60)
    router.connect().close()
    new = cluster.promote()
    clock = time.time
    monkeypatch.setattr(time, "time", lambda: clock() + 3600)
    with router.connect() as connection:
        address = "SELECT host(inet_server_addr()) || ':' || inet_server_port()"
        assert connection.scalar(text(address)) == new.address
    assert core_of(router).monitor.is_current


def test_a_second_sleep_before_all_were_heard_asks_all_again(
    cluster: PostgresCluster, make_router: MakeRouter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine that sleeps again before all instances were heard asks all of them again."""
    router = make_router(probe_interval=60, probe_timeout=3)
    router.connect().close()
    old = cluster.writer
    frozen, promoted = cluster.readers
    cluster.freeze(frozen)
    clock = time.time
    monkeypatch.setattr(time, "time", lambda: clock() + 3600)
    woke = time.monotonic()
    core_of(router).monitor.suspect(old.address)
    eventually(lambda: router.topology.by_id[old.address].last_observed_at >= woke)
    assert not core_of(router).monitor.is_current  # The frozen one still has time to answer.
    cluster.promote(promoted)
    monkeypatch.setattr(time, "time", lambda: clock() + 7200)
    with router.connect() as connection:
        address = "SELECT host(inet_server_addr()) || ':' || inet_server_port()"
        assert connection.scalar(text(address)) == promoted.address


def test_waiting_for_a_writer_after_a_sleep_finds_the_new_one(
    cluster: PostgresCluster, make_router: MakeRouter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread that waits for a writer when the machine wakes does not get the old one.

    Neither does a thread that looks up the outcome of a COMMIT.
    """
    router = make_router(probe_interval=60)
    router.connect().close()
    new = cluster.promote()
    clock = time.time
    monkeypatch.setattr(time, "time", lambda: clock() + 3600)
    found = core_of(router).monitor.wait_for(lambda topology: topology.writer is not None, 5)
    assert found.writer is not None
    assert found.writer.id == new.address


def test_a_silent_instance_delays_a_woken_process_for_a_while(
    cluster: PostgresCluster, make_router: MakeRouter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A silent instance delays a woken process only for a while."""
    router = make_router(probe_interval=60, probe_timeout=0.3)
    router.connect().close()
    frozen = cluster.readers[0]
    cluster.freeze(frozen)
    clock = time.time
    monkeypatch.setattr(time, "time", lambda: clock() + 3600)
    with router.connect() as connection:
        assert connection.scalar(text("SELECT 1")) == 1
    assert core_of(router).monitor.is_current
    assert router.topology.by_id[frozen.address].missed_probes or not router.topology.by_id[frozen.address].healthy


@pytest.mark.parametrize("fault", ["frozen", "black hole"])
def test_a_process_ends_although_instances_do_not_answer(cluster: PostgresCluster, fault: str) -> None:
    script = """
r = router(probe_interval=0.1)
with r.connect(read_only=True) as c:
    c.execute(text("SELECT 1"))
print("ready", flush=True)
sys.stdin.readline()
deadline = time.monotonic() + 20
while r.topology.readers:
    assert time.monotonic() < deadline
    time.sleep(0.01)
print(any(t.name.startswith("aurora-router-probe") for t in threading.enumerate()), flush=True)
"""
    frozen = cluster.readers[0]
    with ExitStack() as stack:
        proxies = [stack.enter_context(FaultProxy((frozen.host, frozen.port))) for _ in range(8)]
        process = stack.enter_context(running(cluster, script, *(proxy.address for proxy in proxies)))
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        if fault == "frozen":
            cluster.freeze(frozen)
        else:
            for proxy in proxies:
                proxy.black_hole()
        out, err = process.communicate("go\n", timeout=60)
        assert out == "True\n", err
        assert process.returncode == 0, err
        assert "Traceback" not in err, err


@pytest.mark.parametrize("function", ["_came_back", "on_release", "on_end", "record"])
def test_an_interrupted_checkin_still_returns_the_connection(router: Router, function: str) -> None:
    """A connection whose return is interrupted goes back to its pool all the same."""

    def trace(frame: FrameType, what: str, _: object) -> Any:
        if frame.f_code.co_name == function and frame.f_code.co_filename.startswith(os.path.dirname(aurora_router.__file__)):
            if what == "line":
                raise KeyboardInterrupt
            return trace
        return None

    with router.causal_scope() as scope:
        connection = router.connect()
        connection.execute(text("SELECT 1"))
        before = sys.gettrace()  # coverage's own, if it is measured
        sys.settrace(trace)
        try:
            with pytest.raises(KeyboardInterrupt):
                connection.close()
        finally:
            sys.settrace(before)
    assert no_connection_is_left(router)
    assert not scope.units
    assert scope.requirement is not None


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # a socket that its interruption leaves unclosed
def test_an_interrupted_start_of_a_line_leaks_no_socket() -> None:
    """An exception between any two steps leaves no second file descriptor of a connection's socket open."""
    one, other = socket.socketpair()
    with one, other:
        before = set(os.listdir("/dev/fd"))
        for _ in interrupted_at_each_line(
            lambda: TrackedSocket(one.fileno()), "aurora_router/cluster/sockets.py", "/socket.py", each="opcode"
        ):
            assert set(os.listdir("/dev/fd")) == before


@pytest.mark.parametrize("kind", ["KeyboardInterrupt", "Exception"])
def test_an_exception_of_a_signal_handler_leaks_no_connection(cluster: PostgresCluster, kind: str) -> None:
    """An exception that a signal handler raises leaks no connection.

    It may be Ctrl-C or the time limit of a worker. It comes anywhere in this library, or in the driver, where a unit mostly
    waits for a server.

    It does not come in SQLAlchemy, because between two lines of SQLAlchemy's pool one in a thousand leaks even so.
    Nor does it come where psycopg takes any exception for a wrong time limit.
    """
    script = f"""
import random, psycopg, aurora_router
from sqlalchemy.exc import SQLAlchemyError

places = tuple(os.path.dirname(module.__file__) for module in (aurora_router, psycopg))

class Limit({kind}):
    pass

def handler(_, frame):
    code = frame.f_code
    swallowed = code.co_name == "timeout_from_conninfo"
    if code.co_filename.startswith(places) and not swallowed:
        where[:] = code.co_filename, frame.f_lineno
        raise Limit
    signal.setitimer(signal.ITIMER_REAL, 0.0001)

where = []
signal.signal(signal.SIGALRM, handler)
chance = random.Random(4)
r = router()
Session = sessionmaker(class_=RoutingSession, router=r)
engines = [r.engine(i) for i in r.topology]
interrupted = 0
for n in range(100):
    if n % 3 == 0:
        for engine in engines:
            engine.dispose()
    s, c = Session(read_only=chance.choice([None, None, True, False])), None
    signal.setitimer(signal.ITIMER_REAL, chance.uniform(0.0001, 0.04))
    try:
        try:
            s.execute(text("SELECT count(*) FROM item")).all()
            if s.routing_state.read_only is not True:
                s.execute(text("UPDATE item SET stock = stock + 1 WHERE id = 1"))
            s.commit()
            s.close()
            with r.connect() as c:
                c.execute(text("SELECT 1"))
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    except (Limit, SQLAlchemyError):  # SQLAlchemy makes an error of its own of some
        interrupted += 1
    s.close()
    if c is not None:
        c.close()  # once more: the first may have been what was interrupted
    gc.collect()
    out = [engine.pool.checkedout() for engine in engines]
    assert not any(out), (n, out, where)
    assert not core_of(r).monitor._waiting
assert interrupted > 30, interrupted
print(sum(engine.pool.checkedin() for engine in engines), flush=True)
sys.stdin.readline()
"""
    with ExitStack() as stack:
        proxies = [stack.enter_context(FaultProxy((i.host, i.port))) for i in cluster.instances]
        for proxy in proxies:
            proxy.latency = 0.001
        writer = next(p for p, i in zip(proxies, cluster.instances, strict=True) if i is cluster.writer)
        others = [proxy.address for proxy in proxies if proxy is not writer]
        url = cluster.url.replace(cluster.writer.address, writer.address)
        process = stack.enter_context(running(cluster, script, *others, url=url))
        assert process.stdout is not None
        pooled = process.stdout.readline()
        assert pooled, process.communicate()[1]
        probing = len(cluster.instances)
        backends = "SELECT count(*) FROM pg_stat_activity WHERE usename = 'app'"
        eventually(lambda: sum(cluster.execute(backends, instance=i)[0][0] for i in cluster.instances) <= int(pooled) + probing)
        _, err = process.communicate("end\n", timeout=60)
        assert process.returncode == 0, err
