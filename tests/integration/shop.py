"""Mapped classes, and small questions that the integration tests ask."""

from __future__ import annotations

import time
from collections.abc import Callable

from sqlalchemy import ForeignKey
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship

from aurora_router import Router, RoutingSession


class Base(DeclarativeBase):
    pass


class Item(Base):
    __tablename__ = "item"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(default="")
    stock: Mapped[int] = mapped_column(default=0)
    parts: Mapped[list[Part]] = relationship(back_populates="item", order_by="Part.id")


class Part(Base):
    __tablename__ = "part"
    id: Mapped[int] = mapped_column(primary_key=True)
    item_id: Mapped[int | None] = mapped_column(ForeignKey("item.id"))
    name: Mapped[str] = mapped_column(default="")
    item: Mapped[Item | None] = relationship(back_populates="parts")


def place(session: RoutingSession) -> str:
    """Where the session's unit is: "nowhere", "reader" or "writer"."""
    unit = session._unit
    if unit is None or unit.instance is None or session.get_transaction() is None:
        return "nowhere"
    return "writer" if unit.on_writer else "reader"


def instance_id(session: RoutingSession) -> str:
    """The instance of the session's unit."""
    assert session._unit is not None
    assert session._unit.instance is not None
    return session._unit.instance.id


def eventually(condition: Callable[[], object], timeout: float = 15.0) -> None:
    """Wait until the condition holds; fail when it does not in time (seconds)."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.005)


def until_readers_serve(router: Router, count: int) -> None:
    """Wait until that many readers are in use, all of the newest epoch."""
    eventually(lambda: len(router.topology.readers) == count and router.topology.writer is not None)
    eventually(lambda: all(r.position is not None and r.position.epoch == router.topology.epoch for r in router.topology.readers))
