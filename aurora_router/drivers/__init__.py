"""One module per driver: it says how Python talks to a server. `servers` says what a server's answers mean."""

from __future__ import annotations

from typing import Final

from aurora_router.drivers import psycopg, pymysql
from aurora_router.drivers.base import Driver, ErrorReading, Mode, UrlReading

__all__ = ["DRIVERS", "Driver", "ErrorReading", "Mode", "UrlReading", "driver_of", "drivers_for"]

DRIVERS: Final[list[Driver]] = [psycopg, pymysql]


def drivers_for(dialect: str) -> list[Driver]:
    """Return the drivers for a dialect of SQLAlchemy, with which a URL begins."""
    return [driver for driver in DRIVERS if dialect in driver.DIALECTS]


def driver_of(error: BaseException | None) -> Driver | None:
    """Return the driver whose package defines this error; None if there is none."""
    for made_by in type(error).__mro__:
        package = made_by.__module__.partition(".")[0]
        for driver in DRIVERS:
            if package == driver.NAME:
                return driver
    return None
