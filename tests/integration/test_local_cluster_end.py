"""No server, process or directory of a local cluster stays behind, however the process that started it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from aurora_router.local import LocalClusterError
from tests.integration.local_clusters import Engine, data_directory, each_engine, processes_in, wait, with_package


@each_engine
def test_a_server_that_cannot_start_says_why_and_leaves_nothing(engine: Engine) -> None:
    cluster = engine.make(readers=0, settings={engine.wrong_setting: "many"})
    with pytest.raises(LocalClusterError, match=engine.wrong_setting):
        cluster.start()
    assert repr(cluster) == f"<{engine} stopped>"
    cluster.stop()


@each_engine
def test_a_stopped_cluster_is_gone_and_can_be_started_anew(engine: Engine) -> None:
    cluster = engine.make(readers=1)
    for _ in range(2):
        with cluster:
            directory = data_directory(cluster)
            cluster.freeze(cluster.readers[0])
            pids = [i.pid for i in cluster.instances]
        assert not os.path.exists(directory)
        assert processes_in(directory) == []
        assert not any(os.path.exists(f"/proc/{pid}") for pid in pids)


CHILD = """
import os, pathlib, sys, time
from aurora_router.local import {engine}
cluster = {engine}(readers=1).start()
cluster.freeze(cluster.readers[0])
cluster.execute("SELECT 1")
print(pathlib.Path(cluster.execute("{engine.data_directory}")[0][0]).parent, flush=True)
{then}
"""


def child(engine: Engine, then: str) -> tuple[subprocess.Popen[str], str]:
    """A process that has started a cluster, and the cluster's directory."""
    code = CHILD.format(engine=engine, then=then)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, "-c", code], env=with_package(), text=True, **pipes)
    assert process.stdout is not None
    directory = process.stdout.readline().strip()
    if not directory:
        process.communicate()
        pytest.fail(f"the process ended with status {process.returncode} before it had its cluster")
    assert os.path.isdir(directory)
    assert processes_in(directory)
    return process, directory


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT], ids=lambda n: n.name)
@each_engine
def test_no_server_outlives_a_killed_process(engine: Engine, number: signal.Signals) -> None:
    process, directory = child(
        engine,
        "time.sleep(600)"
        if number != signal.SIGINT
        else """
try:
    time.sleep(600)
except KeyboardInterrupt:
    pass""",
    )
    with process:
        process.send_signal(number)
    wait(lambda: not os.path.exists(directory))
    assert processes_in(directory) == []


@each_engine
def test_no_server_outlives_a_process_that_forgot_to_stop(engine: Engine) -> None:
    """No server outlives a process that forgot to stop the cluster."""
    process, directory = child(engine, "sys.stdin.read()")
    with process:
        process.communicate(timeout=20)  # The checks are done, so it may end.
    assert process.returncode == 0
    assert not os.path.exists(directory)  # The interpreter waits at exit until it is removed.
    assert processes_in(directory) == []


@each_engine
def test_a_forked_child_neither_stops_nor_keeps_the_cluster(engine: Engine) -> None:
    """A forked child neither stops the cluster nor keeps it alive."""
    process, directory = child(
        engine,
        """
pid = os.fork()
if pid == 0:
    cluster.stop()
    orphan = os.fork()
    if orphan == 0:
        time.sleep(600)  # lives on when its parents are gone
    print(orphan, flush=True)
    sys.exit()
os.waitpid(pid, 0)
cluster.thaw(cluster.readers[0])
cluster.execute("SELECT 1", instance=cluster.readers[0])
print("alive", flush=True)
time.sleep(600)
""",
    )
    with process:
        assert process.stdout is not None
        orphan = int(process.stdout.readline())
        assert process.stdout.readline() == "alive\n"
        process.kill()
        process.wait()
        wait(lambda: not os.path.exists(directory))
        os.kill(orphan, signal.SIGKILL)
