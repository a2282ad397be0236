"""One module per server family: the SQL that asks, how rows and error codes read, the driver's switches. What is asked is sent by
others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from aurora_router.servers import mysql, postgresql
from aurora_router.servers.family import Ask, Family, Greeting, Mode, Pooler, Unsuitable, XidFamily, knows_xids

__all__ = ["FAMILIES", "Ask", "Family", "Greeting", "Mode", "Pooler", "Unsuitable", "XidFamily", "family_of", "knows_xids"]

FAMILIES: Final[Mapping[str, Family]] = {"postgresql": postgresql, "mysql": mysql, "mariadb": mysql}
"""By what a URL begins with, which is also the name of the SQL dialect."""


def family_of(error: BaseException | None) -> Family | None:
    """The family whose driver has made this error."""
    for made_by in type(error).__mro__:
        driver = made_by.__module__.partition(".")[0]
        for family in FAMILIES.values():
            if driver == family.DRIVER:
                return family
    return None
