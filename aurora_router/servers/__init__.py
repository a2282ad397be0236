"""One module per server family: its SQL, how its rows and error codes read, and the driver's switches.

Other modules send the questions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from aurora_router.servers import mysql, postgresql
from aurora_router.servers.base import Family, Greeting, Pooler, Unsuitable, XidFamily, knows_xids

__all__ = ["FAMILIES", "Family", "Greeting", "Pooler", "Unsuitable", "XidFamily", "family_of", "knows_xids"]

FAMILIES: Final[Mapping[str, Family]] = {"postgresql": postgresql, "mysql": mysql, "mariadb": mysql}
"""By the beginning of a URL, which is also the name of the SQL dialect."""


def family_of(error: BaseException | None) -> Family | None:
    """The family whose driver has made this error."""
    for made_by in type(error).__mro__:
        driver = made_by.__module__.partition(".")[0]
        for family in FAMILIES.values():
            if driver == family.DRIVER:
                return family
    return None
