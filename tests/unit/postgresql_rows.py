"""Rows with which a server of PostgreSQL answers a probe."""

from aurora_router.core.instance import ServerId

STARTED = "1772600767.000089"
ID = ServerId("7001", "10.0.0.1", 5432, STARTED)
IDENTITY = (160004, "7001", "10.0.0.1", 5432, STARTED)


def writer_row(*, synchronous="on", written="0/5000", inserted="0/6000", page=8192, segment="16MB", timeline="0000000A"):
    return (*IDENTITY, False, synchronous, "read committed", page, segment, written, inserted, timeline,
            None, None, 10, None, False, None)  # fmt: skip


def reader_row(*, replayed="0/5000", received="0/5000", control=1, tli=1, streaming=True, age=0.25):
    return (*IDENTITY, True, "on", "repeatable read", 8192, "16MB", None, None, None,
            replayed, received, control, tli, streaming, age)  # fmt: skip
