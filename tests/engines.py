"""The engines whose servers this machine lacks: what wants them is not collected, and a line at the end of the output says so."""

from aurora_router.local import LocalClusterError
from aurora_router.local.system import find_mysql

MISSING: dict[str, str] = {}
"""Why, by the engine's name. Only MySQL's may be missing: the others are had everywhere (`scripts/test`)."""

try:
    find_mysql()
except LocalClusterError as error:
    MISSING["mysql"] = str(error)
