"""The version, as programs ask for it."""

from importlib import metadata

import aurora_router


def test_the_version_is_that_of_the_distribution() -> None:
    """`aurora_router.__version__` and what pip shows are one number, written in one place."""
    assert aurora_router.__version__ == metadata.version("aurora-router")
