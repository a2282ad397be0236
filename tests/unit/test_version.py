"""The version as programs ask for it."""

from importlib import metadata

import aurora_router


def test_the_version_is_that_of_the_distribution() -> None:
    """`aurora_router.__version__` is the number that pip shows, written in one place."""
    assert aurora_router.__version__ == metadata.version("aurora-router")
