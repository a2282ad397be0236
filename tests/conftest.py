"""The project's own tests use the plugin that its users can use."""

import signal

import pytest

from tests.engines import LEFT_OUT, here

pytest_plugins = ["aurora_router.local.pytest_plugin"]

# A shell starts what it runs in the background with SIGINT ignored, and children inherit that: Ctrl-C would do nothing to them.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test on each of the engines that its marker `engines` names and this machine has; without one on PostgreSQL."""
    if "aurora_engine" in metafunc.fixturenames:
        marker = metafunc.definition.get_closest_marker("engines")
        engines = marker.args if marker is not None else ("postgresql",)
        named = [pytest.param(e, id=pytest.HIDDEN_PARAM if e == "postgresql" else e) for e in here(*engines)]
        metafunc.parametrize("aurora_engine", named, indirect=True, scope="session")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for engine, why in LEFT_OUT.items():
        terminalreporter.write_line(f"tests: not run with {engine}: {why}")


@pytest.fixture(scope="session")
def aurora_engine(request: pytest.FixtureRequest) -> str:
    """Which servers."""
    engine: str = request.param
    return engine
