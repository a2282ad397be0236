"""The engines whose servers this machine has. Tests of others are not collected, and a line at the end of the output says so."""

from aurora_router.local import LocalClusterError
from aurora_router.local.system import find_mysql

LEFT_OUT: dict[str, str] = {}
"""Each engine, image or program that tests were not run with, and the reason."""

_missing: dict[str, str] = {}
try:  # every machine has the other engines (scripts/test)
    find_mysql()
except LocalClusterError as error:
    _missing["mysql"] = str(error)


def here(*engines: str) -> list[str]:
    """The named engines that this machine has."""
    LEFT_OUT.update((engine, _missing[engine]) for engine in engines if engine in _missing)
    return [engine for engine in engines if engine not in _missing]
