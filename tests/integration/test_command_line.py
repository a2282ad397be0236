"""The command line as a user meets it: with a cluster, with a wrong one, and with none. It runs in this process if it can."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from sqlalchemy.engine import make_url

from aurora_router.__main__ import main
from aurora_router.local import FaultProxy, PostgresCluster
from tests.integration.shop import BOTH

PROJECT = Path(__file__).parents[2]
SECRET = "hunter2"
DEAD = f"postgresql+psycopg://app:{SECRET}@127.0.0.1:{{port}}/shop"


Done = subprocess.CompletedProcess


def aurora_router(*arguments: str, stdin: str = "") -> Done[str]:
    """Run `aurora-router ...` in this process."""
    with (
        contextlib.redirect_stdout(io.StringIO()) as out,
        contextlib.redirect_stderr(io.StringIO()) as err,
        pytest.MonkeyPatch.context() as patched,
    ):
        patched.setattr(sys, "stdin", io.StringIO(stdin))
        code = main(arguments)
    return Done(arguments, code, out.getvalue(), err.getvalue())


def process(*arguments: str, **environment: str) -> Done[str]:
    """Run `aurora-router ...` in a process of its own, in which every warning is an error."""
    return subprocess.run(
        [sys.executable, "-W", "error", "-m", "aurora_router", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=PROJECT,
        env={**os.environ, **environment},
    )


def mistake(done: Done[str], code: int = 2) -> str:
    """The single line on stderr of a command that must have failed, without a password."""
    lines = done.stderr.splitlines()
    assert (done.returncode, done.stdout, len(lines)) == (code, "", 1), done
    assert SECRET not in done.stderr
    assert lines[0].startswith("aurora-router: ")
    return lines[0]


@pytest.fixture
def nobody() -> str:
    """The URL of a server that is not there."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return DEAD.format(port=probe.getsockname()[1])


@pytest.fixture
def others(aurora_cluster: PostgresCluster) -> list[str]:
    """The addresses of the cluster's readers."""
    return [instance.address for instance in aurora_cluster.readers]


# -- help


def test_without_a_command_it_shows_the_help() -> None:
    done = aurora_router()
    assert done.returncode == 0
    assert done.stdout == aurora_router("--help").stdout
    for command in ("demo", "topology", "init-commit-table", "classify"):
        assert command in done.stdout


@pytest.mark.parametrize("command", ["demo", "topology", "init-commit-table", "classify"])
def test_every_command_has_a_help_with_examples_and_exit_codes(command: str) -> None:
    done = aurora_router(command, "--help")
    assert done.returncode == 0
    assert f"aurora-router {command} " in done.stdout.partition("Options:")[0].partition("\n")[2]
    assert "Exit codes: 0 fine" in done.stdout


def test_it_tells_its_version() -> None:
    done = aurora_router("--version")
    assert done.returncode == 0
    assert done.stdout.startswith("aurora-router ")


def test_an_unknown_command_is_a_mistake() -> None:
    assert "No such command 'topologie'" in mistake(aurora_router("topologie"))


def test_without_its_extra_it_says_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "click.py").write_text("raise ModuleNotFoundError('no click here', name='click')\n")
    path = f"{tmp_path}:{PROJECT}"
    assert mistake(process("classify", "SELECT 1", PYTHONPATH=path)).endswith("needs click: pip install 'aurora-router[cli]'")


@pytest.mark.parametrize(("driver", "extra"), [("postgresql+psycopg", "postgresql"), ("mariadb+pymysql", "mysql")])
def test_a_missing_driver_error_says_what_to_install(driver: str, extra: str, tmp_path: Path) -> None:
    """If the driver that the URL names is missing, the error says what to install."""
    module = driver.partition("+")[2]
    (tmp_path / f"{module}.py").write_text(f"raise ModuleNotFoundError('no driver here', name='{module}')\n")
    done = process("topology", f"{driver}://app:{SECRET}@db-1/shop", PYTHONPATH=f"{tmp_path}:{PROJECT}")
    assert mistake(done).endswith(f"{driver} needs {module}: pip install 'aurora-router[{extra}]'")


# -- classify


def test_a_read_goes_to_a_reader() -> None:
    done = aurora_router("classify", "SELECT * FROM orders WHERE note = 'DELETE'")
    assert done.returncode == 0
    assert "READ" in done.stdout
    assert "in an automatic unit:  a reader\nin a read-only unit:   a reader\n" in done.stdout


def test_classify_says_where_a_write_goes_or_is_refused() -> None:
    """A write goes to the writer and is refused in a read-only unit."""
    done = aurora_router("classify", "SELECT * FROM orders FOR UPDATE")
    assert done.returncode == 0
    assert "WRITE" in done.stdout
    assert "in an automatic unit:  the writer\nin a read-only unit:   refused, and not sent\n" in done.stdout


def test_an_unknown_function_is_named() -> None:
    done = aurora_router("classify", "SELECT app.price(id), lower(name), discount() FROM item")
    assert "in an automatic unit:  the writer" in done.stdout
    assert "because of:            app.price, discount: not known to be harmless" in done.stdout


def test_a_function_that_is_declared_harmless_is_not_named() -> None:
    done = aurora_router("classify", "SELECT app.price(id), discount()", "--read-only-function", "app.price")
    assert "because of:            discount: " in done.stdout
    done = aurora_router(
        "classify", "SELECT app.price(id), discount()", "--read-only-function", "app.price", "--read-only-function", "discount"
    )
    assert "READ" in done.stdout
    assert "because of" not in done.stdout


@pytest.mark.parametrize(
    ("sql", "where"),
    [
        ("/*@writer*/ SELECT 1", "the writer, as the hint asks"),
        ("/*@reader*/ SELECT price()", "a reader, as the hint asks"),
        ("/*@reader*/ DELETE FROM item", "the writer"),
    ],
)
def test_a_hint_is_followed_where_it_may_be(sql: str, where: str) -> None:
    assert f"in an automatic unit:  {where}\n" in aurora_router("classify", sql).stdout


def test_a_statement_can_come_from_stdin_in_another_dialect() -> None:
    done = aurora_router("classify", "-", "--dialect", "mysql", stdin="SELECT `a`\nFROM t\nLOCK IN SHARE MODE\n")
    assert done.returncode == 0
    assert "WRITE" in done.stdout


@pytest.mark.parametrize(("dialect", "effect"), [("postgresql", "WRITE"), ("mariadb", "READ")])
def test_it_says_in_whose_sql_the_statement_was_read(dialect: str, effect: str) -> None:
    done = aurora_router("classify", "SELECT ifnull(item, '') FROM orders", "--dialect", dialect)
    assert done.stdout.startswith(f"dialect:               {dialect}\neffect:                {effect} ")
    assert aurora_router("classify", "SELECT 1").stdout.startswith("dialect:               postgresql\n")


@pytest.mark.parametrize("sql", ["", "  \n"])
def test_no_statement_is_a_mistake(sql: str) -> None:
    assert "there is no statement" in mistake(aurora_router("classify", sql))


def test_an_unknown_dialect_is_a_mistake_with_known_ones_named() -> None:
    """An unknown dialect is a mistake, and the message names the known ones."""
    said = mistake(aurora_router("classify", "SELECT 1", "--dialect", "oracle"))
    assert "oracle" in said
    assert "postgresql" in said
    assert "mariadb" in said


# -- topology


@BOTH
def test_piped_it_prints_aligned_lines(aurora_cluster: PostgresCluster, others: list[str]) -> None:
    done = process("topology", aurora_cluster.url, "--instances", *others)
    assert (done.returncode, done.stderr) == (0, "")
    header, *rows = done.stdout.splitlines()
    assert header.split() == ["instance", "role", "position", "lag", "latency", "state"]
    assert [row.split()[:2] for row in rows] == [[aurora_cluster.writer.address, "writer"], *([o, "reader"] for o in others)]
    assert all(row.index("healthy") == header.index("state") for row in rows)


def test_as_json_it_is_a_record_a_line(aurora_cluster: PostgresCluster, others: list[str]) -> None:
    done = aurora_router("topology", aurora_cluster.url, *others, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    (line,) = done.stdout.splitlines()
    record = json.loads(line)
    assert record["writer"] == aurora_cluster.writer.address
    assert {i["id"]: i["role"] for i in record["instances"] if i["healthy"]} == {
        aurora_cluster.writer.address: "writer",
        **dict.fromkeys(others, "reader"),
    }


def test_a_reader_that_is_down_is_shown_with_its_error(aurora_cluster: PostgresCluster, others: list[str]) -> None:
    aurora_cluster.kill(aurora_cluster.readers[0])
    done = aurora_router("topology", aurora_cluster.url, "--instances", ",".join(others))
    assert done.returncode == 0
    (row,) = (line for line in done.stdout.splitlines() if line.startswith(others[0]))
    assert "Connection refused" in row


def test_a_slow_instance_is_waited_for(aurora_cluster: PostgresCluster) -> None:
    """A person waits rather than reads that a slow instance is down: the login alone takes longer than a router waits."""
    reader = aurora_cluster.readers[0]
    with FaultProxy((reader.host, reader.port)) as slow:
        slow.latency = 0.15
        done = aurora_router("topology", aurora_cluster.url, "--instances", slow.address)
    (row,) = (line for line in done.stdout.splitlines() if line.startswith(slow.address))
    assert row.split()[1] == "reader"


def test_the_url_can_come_from_the_environment(aurora_cluster: PostgresCluster) -> None:
    done = process("topology", AURORA_ROUTER_URL=aurora_cluster.url)
    assert done.returncode == 0
    assert aurora_cluster.writer.address in done.stdout


def test_watching_goes_on_until_ctrl_c_and_ends_quietly(aurora_cluster: PostgresCluster) -> None:
    command = [sys.executable, "-m", "aurora_router", "topology", aurora_cluster.url, "--watch", "--interval", "0.1", "--json"]
    watching = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=PROJECT)
    try:
        assert watching.stdout is not None
        for _ in range(3):
            assert json.loads(watching.stdout.readline())["writer"] == aurora_cluster.writer.address
        watching.send_signal(signal.SIGINT)
        _, said = watching.communicate(timeout=20)
    finally:
        watching.kill()
        watching.communicate()
    assert watching.returncode == 130
    assert said.strip() == ""


def test_without_a_server_the_error_says_which_and_what_to_do(nobody: str) -> None:
    """If no server answers, the error says which one was tried and what to do."""
    said = mistake(process("topology", nobody), code=1)
    assert f"127.0.0.1:{make_url(nobody).port}: " in said
    assert "check host and port" in said


def test_a_wrong_password_is_said_in_one_line(aurora_cluster: PostgresCluster) -> None:
    url = make_url(aurora_cluster.url).set(password=SECRET).render_as_string(hide_password=False)
    assert "check the user and the password" in mistake(aurora_router("topology", url))


def test_an_instance_of_another_cluster_is_refused(
    aurora_cluster: PostgresCluster, aurora_cluster_factory: Callable[..., PostgresCluster]
) -> None:
    stranger = aurora_cluster_factory(readers=0)
    url = make_url(aurora_cluster.url)
    stranger.execute(f"ALTER ROLE app PASSWORD '{url.password}'")
    said = mistake(aurora_router("topology", aurora_cluster.url, "--instances", stranger.writer.address))
    assert "belongs to another cluster" in said
    assert str(url.password) not in said


@pytest.mark.parametrize(
    ("url", "advice"),
    [
        (f"app:{SECRET}@db-1/shop", "should look like postgresql+psycopg://"),
        (f"postgresql://app:{SECRET}@db-1/shop", "names no driver"),
        (f"oracle+cx://app:{SECRET}@db-1/shop", "is not supported"),
        (f"postgresql+psycopg://app:{SECRET}@db-1:port/shop", "use|look like|write"),
    ],
)
def test_a_url_that_cannot_work_is_a_mistake_without_password(url: str, advice: str) -> None:
    """A URL that cannot work is a mistake whose message shows no password."""
    said = mistake(aurora_router("topology", url))
    assert any(words in said for words in advice.split("|"))


def test_without_a_url_the_help_is_named() -> None:
    assert mistake(process("topology", AURORA_ROUTER_URL="")).endswith("see aurora-router topology --help")


def test_an_instance_named_as_the_reader_endpoint_is_a_mistake(nobody: str) -> None:
    """An instance and a reader endpoint of the same name are a mistake."""
    assert "reader endpoint" in mistake(
        aurora_router("topology", nobody, "--instances", "db-2:5432", "--reader-endpoint", "db-2:5432")
    )


def test_nothing_takes_long_when_no_server_answers(nobody: str) -> None:
    began = time.monotonic()
    mistake(aurora_router("topology", nobody), code=1)
    assert time.monotonic() - began < 15


# -- demo


@pytest.mark.parametrize("arguments", [("--seconds", "1"), ("--threads", "0"), ("--consistency", "maybe"), ("--fast",)])
def test_the_demo_refuses_what_makes_no_sense_before_it_starts(arguments: tuple[str, ...]) -> None:
    assert "see aurora-router demo --help" in mistake(aurora_router("demo", *arguments))


def test_the_demo_says_when_there_are_no_servers_to_run(tmp_path: Path) -> None:
    assert "must be the bin directory of PostgreSQL servers" in mistake(process("demo", PGBIN=str(tmp_path)), code=1)


@BOTH
def test_the_commit_table_is_made_once_and_may_be_asked_again(cluster: PostgresCluster) -> None:
    """The commit table is made once, and the command may be given again."""
    hosts = ",".join(i.address for i in cluster.instances)
    url = cluster.url.replace(cluster.writer.address, hosts)
    for _ in range(2):
        done = aurora_router("init-commit-table", url)
        assert (done.returncode, done.stdout, done.stderr) == (0, "aurora_router_commits is there\n", "")
    assert cluster.execute("SELECT count(*) FROM aurora_router_commits") is not None


def test_a_commit_table_that_cannot_be_made_is_one_line(cluster: PostgresCluster) -> None:
    reader = cluster.readers[0]
    said = mistake(aurora_router("init-commit-table", reader.url), 1)
    assert "no writer" in said


@pytest.mark.engines("mariadb", "mysql")
def test_a_commit_table_without_a_database_is_a_mistake(cluster: PostgresCluster) -> None:
    """A commit table in no database is a mistake, and the message says what to write."""
    said = mistake(aurora_router("init-commit-table", cluster.url.removesuffix("/app")))
    assert "the URL names no database" in said
    assert "@host:3306/database" in said
