"""The project's own tests use the plugin that its users can use."""

import signal

pytest_plugins = ["aurora_router.local.pytest_plugin"]

# A shell starts what it runs in the background with SIGINT ignored, and children inherit that: Ctrl-C would do nothing to them.
signal.signal(signal.SIGINT, signal.default_int_handler)
