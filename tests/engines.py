"""Which engines this machine has servers of. What wants another is not collected, and a line at the end of the output says so."""

from aurora_router.local import LocalClusterError
from aurora_router.local.system import find_mysql

LEFT_OUT: dict[str, str] = {}
"""What tests were not run with (an engine, an image, a program), and why."""

_missing: dict[str, str] = {}
try:  # the others are had everywhere (scripts/test)
    find_mysql()
except LocalClusterError as error:
    _missing["mysql"] = str(error)


def here(*engines: str) -> list[str]:
    """Those of these engines that this machine has."""
    LEFT_OUT.update((engine, _missing[engine]) for engine in engines if engine in _missing)
    return [engine for engine in engines if engine not in _missing]
