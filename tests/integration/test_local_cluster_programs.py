"""The servers' programs: a missing one is named, only one that is new enough is taken, and an unreachable one is copied."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from aurora_router.local import LocalClusterError, MariadbCluster, MysqlCluster, PostgresCluster
from aurora_router.local.system import find_mariadb, find_mysql, find_postgres
from tests.integration.local_clusters import data_directory


def test_programs_that_are_missing_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(LocalClusterError, match=r"has no postgres, initdb, pg_basebackup, pg_rewind"):
        PostgresCluster(bin_dir=tmp_path).start()
    monkeypatch.setenv("PGBIN", str(tmp_path))
    with pytest.raises(LocalClusterError, match="has no postgres"):
        find_postgres()
    monkeypatch.delenv("PGBIN")
    monkeypatch.setattr("aurora_router.local.system._in_wheel", list)
    monkeypatch.setattr("aurora_router.local.system._in_system", list)
    with pytest.raises(LocalClusterError, match=r"pip install 'aurora-router\[local\]'"):
        find_postgres()


def test_programs_of_mariadb_that_are_missing_are_named(tmp_path: Path) -> None:
    with pytest.raises(LocalClusterError, match="no mariadbd found"):
        MariadbCluster(bin_dir=tmp_path).start()
    server, install = find_mariadb()
    assert find_mariadb(server.parent) == (server, install)
    (tmp_path / "mariadbd").symlink_to(server)
    with pytest.raises(LocalClusterError, match=f"no mariadb-install-db found in {tmp_path}: install"):
        find_mariadb(tmp_path)


def test_only_a_mysqld_of_mysql_that_is_new_enough_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def says(name: str, version: str) -> Path:
        (tmp_path / name).mkdir()
        program = tmp_path / name / "mysqld"
        program.write_text(f"#!/bin/sh\necho '/usr/sbin/mysqld  Ver {version}'\n")
        program.chmod(0o755)
        return program

    (tmp_path / "mysqld").symlink_to(find_mariadb()[0])
    with pytest.raises(LocalClusterError, match=f"no MySQL 8.0.30 or newer found in {tmp_path}: install"):
        MysqlCluster(bin_dir=tmp_path).start()
    old = says("old", "8.0.29 for Linux on x86_64 (MySQL Community Server - GPL)")
    with pytest.raises(LocalClusterError, match=f"{old} has 8.0.29"):
        find_mysql(old.parent)
    new = says("new", "8.4.6-6 for Linux on x86_64 (Percona Server (GPL), Release 6, Revision 47d1c8c)")
    monkeypatch.setenv("PATH", os.pathsep.join(map(str, (tmp_path, old.parent, new.parent))))
    assert find_mysql() == new


def test_programs_that_the_servers_user_cannot_reach_are_copied(tmp_path: Path) -> None:
    found = find_postgres()
    home = tmp_path / found.parent.parent.name / found.parent.name
    home.parent.mkdir()
    (home.parent / home.name).symlink_to(found.parent)
    libraries = found.parent.parent.parent / f"{found.parent.parent.name}.libs"
    if os.geteuid() != 0 or not libraries.is_dir():
        # Without root the servers run as this user, so they can read all that it can.
        with PostgresCluster(readers=0, bin_dir=home / "bin") as cluster:
            assert cluster.execute("SELECT 1") == [(1,)]
        return
    home.unlink()
    shutil.copytree(found.parent, home)
    shutil.copytree(libraries, tmp_path / libraries.name)
    tmp_path.chmod(0o700)
    with PostgresCluster(readers=1, bin_dir=home / "bin") as cluster:
        executable = os.readlink(f"/proc/{cluster.writer.pid}/exe")
        assert executable.startswith(data_directory(cluster))
    assert not os.path.exists(executable)
