"""The home of a local cluster's servers: a directory, a user who is not root, and a keeper that ends all servers.

The keeper is a small shell at the end of a pipe that only this process holds. The pipe closes when the cluster is stopped, or
when this process dies, of whatever cause. Then the keeper ends the servers (frozen ones too) and removes their files. A
cluster ends in no other way, so every test exercises the keeper.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

from aurora_router.local.system import (
    LocalClusterError,
    descendants,
    environment,
    has_ended,
    reachable_by_others,
    stands_still,
    tail,
    unprivileged_user,
    until,
)

# $1 is the cluster's directory, $2 the signal that ends a server. The programs come by the pipe, a line each. Servers work in
# their data directories, so the keeper finds them there. It also checks that they run our programs, because somebody may have
# opened a shell there, which must not be killed. A process that is ending runs no program any more, and counts as ours. QUIT
# lets PostgreSQL release its shared memory. The seventh line of a lock file names the shared memory that a killed server left.
_KEEPER = r"""
trap '' HUP INT TERM
cd /
directory=$1 ending=$2 tries=0
set --
while read -r program; do set -- "$@" "$program"; done
each() {
    none=1 number=$1
    shift
    for process in /proc/[0-9]*; do
        for home in "$directory" "$directory"/*/; do
            [ "$process/cwd" -ef "$home" ] || continue
            for program; do
                [ "$process/exe" -ef "$program" ] || [ ! -e "$process/exe" ] || continue
                kill -"$number" "${process#/proc/}" && none=0
            done
        done
    done
    return $none
}
each "$ending" "$@" && each CONT "$@"
while [ $tries -lt 40 ] && each 0 "$@"; do tries=$((tries + 1)); sleep 0.025; done
while each KILL "$@"; do sleep 0.01; done
for lock in "$directory"/*/postmaster.pid; do
    [ -f "$lock" ] && set -- $(sed -n 7p "$lock") && [ -n "$2" ] && ipcrm -m "$2"
done
tries=0
while [ $tries -lt 50 ]; do
    rm -rf "$directory" && break
    tries=$((tries + 1)); sleep 0.1
done
"""


class Host:
    """A temporary directory, and the user who runs programs there. `close()` ends all that runs, and removes the directory.

    parent: where the directory is made. None: the system's usual place.
    ending: the signal that ends servers at the close. Servers that still run a second later are killed.

    Raises LocalClusterError if the servers' user cannot reach the directory.
    """

    def __init__(self, parent: Path | str | None, ending: str) -> None:
        self._as_user = unprivileged_user() if os.geteuid() == 0 else {}
        self.directory = self._make_directory(parent)
        try:
            self._keeper = subprocess.Popen(
                ["/bin/sh", "-c", _KEEPER, "keeper", str(self.directory), ending],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C in a terminal reaches this process only
                **self._as_user,
            )
        except BaseException:
            shutil.rmtree(self.directory, ignore_errors=True)
            raise

    def keep(self, *programs: Path) -> None:
        """Tell the keeper which programs will run here, before they start."""
        assert self._keeper.stdin is not None
        for program in programs:
            self._keeper.stdin.write(f"{program}\n".encode())
        self._keeper.stdin.flush()

    def can_run(self, program: Path) -> bool:
        """Return whether the servers' user can read and execute a program."""
        return not self._as_user or reachable_by_others(program)

    def give(self, top: Path) -> None:
        """Give a directory, and all in it, to the servers' user."""
        if self._as_user:
            for path in (top, *top.rglob("*")):
                os.chown(path, self._as_user["user"], self._as_user["group"], follow_symlinks=False)

    def close(self) -> None:
        """End everything. Return when nothing runs and nothing is left on disk."""
        assert self._keeper.stdin is not None
        self._keeper.stdin.close()
        self._keeper.wait(60)
        shutil.rmtree(self.directory, ignore_errors=True)  # the keeper may not be allowed to remove it

    def disown(self) -> None:
        """Let go of the host in a forked child. It belongs to the parent, and the child must not keep the pipe open."""
        assert self._keeper.stdin is not None
        self._keeper.stdin.close()
        self._keeper.returncode = 0  # only the parent can wait for it

    def run(self, program: Path | str, *args: str, password: str = "") -> None:
        """Run a program to its end.

        Raises LocalClusterError, with the program's output, if it fails.
        """
        done = subprocess.run(
            [program, *args],
            env={**environment(), "PGPASSWORD": password},
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            **self._process(),
        )
        if done.returncode:
            raise LocalClusterError(f"{Path(program).name} failed:\n{(done.stderr or done.stdout).strip()}")

    def spawn(self, log: Path, program: Path, *args: str | Path) -> subprocess.Popen[bytes]:
        """Start a server."""
        with log.open("ab") as out:
            return subprocess.Popen(
                [program, *args],
                env=environment(),
                stdout=out,
                stderr=out,
                **self._process(),
            )

    def write(self, path: Path, text: str) -> None:
        """Write a file that only the servers' user can read."""
        with open(path, "w", opener=lambda p, flags: os.open(p, flags, 0o600)) as file:
            file.write(text)
        if self._as_user:
            os.chown(path, self._as_user["user"], self._as_user["group"])

    def _process(self) -> dict[str, Any]:
        return {
            "stdin": subprocess.DEVNULL,
            "cwd": self.directory,
            "start_new_session": True,
            **self._as_user,
        }

    def _make_directory(self, parent: Path | str | None) -> Path:
        uid = self._as_user.get("user")
        usual = (tempfile.gettempdir(), "/tmp", "/var/tmp")  # noqa: S108
        candidates = [Path(p).resolve() for p in (usual if parent is None else [parent])]
        for candidate in candidates:
            if uid is None or reachable_by_others(candidate):
                directory = Path(tempfile.mkdtemp(prefix="aurora-router-", dir=candidate))
                if uid is not None:
                    os.chown(directory, uid, self._as_user["group"])
                return directory
        raise LocalClusterError(
            f"started by root, the servers run as user {uid}, who cannot reach {candidates[0]}: "
            "give a directory that everyone may enter, and all above it too (o+x)"
        )


class Server(ABC):
    """One server process with its data, on its host."""

    ending: signal.Signals  # asks it to end its sessions and itself

    def __init__(self, host: Host, name: str) -> None:
        self.name = name
        self.data = host.directory / name
        self.log = host.directory / f"{name}.log"
        self.process: subprocess.Popen[bytes] | None = None
        self.frozen = False
        self.follows: str | None = None  # the name of the server that it replicates from
        self._host = host

    @property
    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    @property
    @abstractmethod
    def stands_by(self) -> bool:
        """Whether it is a reader, or will be when it is started."""

    @property
    @abstractmethod
    def ready(self) -> bool:
        """Whether it accepts connections."""

    def wait_ready(self, timeout: float = 60) -> bool:
        """Wait until the server accepts connections. Return False after `timeout` seconds.

        Raises LocalClusterError if the server ends instead.
        """
        with contextlib.suppress(TimeoutError):
            for _ in until(timeout, f"{self.name} to start"):
                if not self.running:
                    raise LocalClusterError(f"{self.name} did not start\n{tail(self.log)}")
                if self.ready:
                    return True
        return False

    def shut_down(self) -> None:
        """Shut the server down fast: sessions end, readers get the rest of the log. Kill it if that takes more than 10 s."""
        if self.process is not None and self.running:
            self.thaw()
            self.process.send_signal(self.ending)
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:  # it waits for a reader that does not answer
                self.kill()

    def kill(self) -> None:
        if self.process is not None and self.running:
            # Stop all first. Otherwise a process may notice the end of another one and end in an orderly way.
            self._halt()
            pids = (*descendants(self.process.pid), self.process.pid)
            for pid in pids:
                _send(pid, signal.SIGKILL)
            self.process.wait(10)
            # Each process of PostgreSQL holds the shared memory until it is gone. Until then no new server starts.
            for _ in until(10, f"the processes of {self.name} to end", every=0.001):
                if all(has_ended(pid) for pid in pids):
                    break
        self.frozen = False

    def freeze(self) -> None:
        """Stop the server's processes. Return when no thread runs any more. A thread that is writing finishes that first."""
        if self.process is not None and self.running:
            pids = self._halt()
            self.frozen = True
            for _ in until(10, f"{self.name} to stand still", every=0.001):
                if all(stands_still(pid) for pid in pids):
                    break

    def _halt(self) -> list[int]:
        assert self.process is not None
        _send(self.process.pid, signal.SIGSTOP)  # first, so that it starts no more children
        children = descendants(self.process.pid)
        for pid in children:
            _send(pid, signal.SIGSTOP)
        return [self.process.pid, *children]

    def thaw(self) -> None:
        if self.process is not None and self.frozen:
            for pid in (*descendants(self.process.pid), self.process.pid):
                _send(pid, signal.SIGCONT)
        self.frozen = False


def _send(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
