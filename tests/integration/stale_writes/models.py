"""Tables of the tests of stale writes."""

from __future__ import annotations

import itertools
import threading
import uuid
from datetime import datetime
from decimal import Decimal
from typing import Any

from sqlalchemy import ARRAY, JSON, Double, ForeignKey, Numeric, PickleType, String, TypeDecorator, Uuid
from sqlalchemy.engine import Dialect
from sqlalchemy.ext.mutable import MutableDict
from sqlalchemy.orm import DeclarativeBase, Mapped, column_property, mapped_column, relationship


class Base(DeclarativeBase):
    pass


class Kit(Base):
    """A primary key of two columns."""

    __tablename__ = "kit"
    a: Mapped[int] = mapped_column(primary_key=True)
    b: Mapped[str] = mapped_column(String(9), primary_key=True)
    stock: Mapped[int]


class Animal(Base):
    __tablename__ = "animal"
    id: Mapped[int] = mapped_column(primary_key=True)
    kind: Mapped[str] = mapped_column(String(9))
    name: Mapped[str] = mapped_column(String(9))
    weight: Mapped[int | None]
    __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "animal"}


class Dog(Animal):
    """A class with a table of its own besides its parent's."""

    __tablename__ = "dog"
    id: Mapped[int] = mapped_column(ForeignKey("animal.id"), primary_key=True)
    tricks: Mapped[int]
    __mapper_args__ = {"polymorphic_identity": "dog"}


class Cat(Animal):
    """A class in its parent's table."""

    __mapper_args__ = {"polymorphic_identity": "cat"}


class Versioned(Base):
    __tablename__ = "versioned"
    id: Mapped[int] = mapped_column(primary_key=True)
    stock: Mapped[int]
    version: Mapped[int] = mapped_column()
    __mapper_args__ = {"version_id_col": version}


class Opaque:
    """A value that is equal to nothing but itself, and cannot be pickled."""

    def __init__(self, word: str) -> None:
        self.word = word
        self.lock = threading.Lock()


class OpaqueType(TypeDecorator[Opaque]):
    impl = String(9)
    cache_ok = True

    def process_bind_param(self, value: Opaque | None, dialect: Dialect) -> str | None:
        return None if value is None else value.word

    def process_result_value(self, value: str | None, dialect: Dialect) -> Opaque | None:
        return None if value is None else Opaque(value)


class SealedType(OpaqueType):
    """A type that sends something else each time, as any encryption with a nonce does."""

    cache_ok = True
    nonces = itertools.count()

    def process_bind_param(self, value: Opaque | None, dialect: Dialect) -> str | None:
        return None if value is None else f"{value.word[0]}{next(self.nonces)}"


class ForeignType(OpaqueType):
    """The type of a column that another service fills."""

    cache_ok = True

    def process_bind_param(self, value: Opaque | None, dialect: Dialect) -> str | None:
        if value is not None:
            raise TypeError("this service does not write it")
        return None


class OpaquesType(TypeDecorator[list[Opaque]]):
    """A list, which has an equality, of values that have none."""

    impl = String(9)
    cache_ok = True

    def process_result_value(self, value: str | None, dialect: Dialect) -> list[Opaque] | None:
        return None if value is None else [Opaque(word) for word in value.split()]


class Odd(Base):
    """Values that are hard to compare."""

    __tablename__ = "odd"
    id: Mapped[int] = mapped_column(primary_key=True)
    stock: Mapped[int]
    real: Mapped[float | None] = mapped_column(Double)
    exact: Mapped[Decimal | None] = mapped_column(Numeric(9, 2))
    raw: Mapped[bytes | None]
    moment: Mapped[datetime | None]
    reals: Mapped[list[float] | None] = mapped_column(ARRAY(Double).with_variant(JSON(), "mysql", "mariadb"))
    thing: Mapped[Any | None] = mapped_column(PickleType, nullable=True)
    opaque: Mapped[Opaque | None] = mapped_column(OpaqueType)
    sealed: Mapped[Opaque | None] = mapped_column(SealedType)
    filled_elsewhere: Mapped[Opaque | None] = mapped_column(ForeignType)
    opaques: Mapped[list[Opaque] | None] = mapped_column(OpaquesType)
    plain: Mapped[dict[str, Any] | None] = mapped_column(JSON)
    tracked: Mapped[dict[str, Any] | None] = mapped_column(MutableDict.as_mutable(JSON))
    essay: Mapped[str | None] = mapped_column(String(9), deferred=True)


Odd.twice = column_property(Odd.stock * 2)  # type: ignore[attr-defined]


class Line(Base):
    """A many-to-one without the other direction."""

    __tablename__ = "line"
    id: Mapped[int] = mapped_column(primary_key=True)
    order_id: Mapped[int | None] = mapped_column(ForeignKey("purchase.id"))
    note: Mapped[str] = mapped_column(String(9))


class Purchase(Base):
    """An order whose total is kept by a trigger."""

    __tablename__ = "purchase"
    id: Mapped[int] = mapped_column(primary_key=True)
    total: Mapped[int]
    state: Mapped[str] = mapped_column(String(9))
    lines: Mapped[list[Line]] = relationship()


class Shelf(Base):
    """A shelf whose new name the database carries over to its boxes."""

    __tablename__ = "shelf"
    name: Mapped[str] = mapped_column(String(9), primary_key=True)
    boxes: Mapped[list[Box]] = relationship(passive_updates=True, order_by="Box.id")


class Box(Base):
    __tablename__ = "box"
    id: Mapped[int] = mapped_column(primary_key=True)
    shelf_name: Mapped[str | None] = mapped_column(ForeignKey("shelf.name", onupdate="CASCADE"))
    weight: Mapped[int] = mapped_column(default=0)


class Loose(Base):
    __table__ = Kit.__table__.outerjoin(Line.__table__, Kit.a == Line.id)
    a = Kit.__table__.c.a
    line_id = Line.__table__.c.id
    __mapper_args__ = {"primary_key": [Kit.__table__.c.a, Kit.__table__.c.b]}


class Shelved(Base):
    """A view of the weight on each shelf, which a trigger writes."""

    __tablename__ = "shelved"
    name: Mapped[str] = mapped_column(String(9), primary_key=True)
    weight: Mapped[int]


class Tagged(Base):
    """A row whose key has several forms in Python."""

    __tablename__ = "tagged_row"
    id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(20), default="new")


class Numbered(Base):
    __tablename__ = "keyed"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(20), default="new")


class Spelled(Base):
    """A row with a UUID that Python has as text."""

    __tablename__ = "spelled"
    id: Mapped[str] = mapped_column(Uuid(as_uuid=False), primary_key=True)
    note: Mapped[str] = mapped_column(String(9))
