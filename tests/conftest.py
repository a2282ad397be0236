"""The project's own tests use the plugin that its users can use."""

pytest_plugins = ["aurora_router.local.pytest_plugin"]
