"""The events that a router's listeners get. `aurora_router.core.events` has them by the same names."""

from aurora_router.core.events import *  # noqa: F403
from aurora_router.core.events import __all__ as __all__
