"""One module per server family: its SQL, and how its rows and error codes read. How Python talks to it is in `drivers`.

Other modules send the questions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from aurora_router.servers import mysql, postgresql
from aurora_router.servers.base import Execute, Greeting, Pooler, ServerFamily, Unsuitable, XidFamily, knows_xids

__all__ = ["FAMILIES", "Execute", "Greeting", "Pooler", "ServerFamily", "Unsuitable", "XidFamily", "knows_xids"]

FAMILIES: Final[Mapping[str, ServerFamily]] = {"postgresql": postgresql, "mysql": mysql, "mariadb": mysql}
"""By the name of the SQL dialect. A driver's `PROTOCOL` is the first of those that its servers speak."""
