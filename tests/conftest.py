"""The configuration of all tests. They use the same plugin that users can use."""

import signal
from typing import Any

import hypothesis
import pytest
from xdist.scheduler import LoadScopeScheduling

from tests.engines import LEFT_OUT, here

pytest_plugins = ["aurora_router.local.pytest_plugin"]

# There is no deadline, because the time of one example depends on the load of the machine.
hypothesis.settings.register_profile("aurora_router", deadline=None)
hypothesis.settings.load_profile("aurora_router")

# A shell starts background commands with SIGINT ignored, and children inherit that. Ctrl-C would do nothing to them.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test on each engine that its marker `engines` names and this machine has, without a marker on PostgreSQL."""
    if "aurora_engine" in metafunc.fixturenames:
        marker = metafunc.definition.get_closest_marker("engines")
        engines = marker.args if marker is not None else ("postgresql",)
        named = [pytest.param(e, id=pytest.HIDDEN_PARAM if e == "postgresql" else e) for e in here(*engines)]
        metafunc.parametrize("aurora_engine", named, indirect=True, scope="session")


class ByCluster(LoadScopeScheduling):
    """Gives each process the tests of a file that run on the same servers, because they share a cluster."""

    def _split_scope(self, nodeid: str) -> str:
        file, _, test = nodeid.partition("::")
        return f"{file} {next((engine for engine in ('mariadb', 'mysql') if engine in test.partition('[')[2]), '')}"


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling:
    return ByCluster(config, log)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Send the parent process what this one could not run its tests with, for the summary."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["left_out"] = LEFT_OUT


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    LEFT_OUT.update(getattr(node, "workeroutput", {}).get("left_out", {}))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for what, why in LEFT_OUT.items():
        terminalreporter.write_line(f"tests: not run with {what}: {why}")


@pytest.fixture(scope="session")
def aurora_engine(request: pytest.FixtureRequest) -> str:
    """The engine whose servers a test runs on."""
    engine: str = request.param
    return engine
