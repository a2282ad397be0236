"""Mapped classes with collections of all kinds, which a late reader shows incompletely."""

from __future__ import annotations

from sqlalchemy import Column, ForeignKey, String, Table
from sqlalchemy.orm import DeclarativeBase, DynamicMapped, Mapped, attribute_keyed_dict, foreign, mapped_column, relationship


class Base(DeclarativeBase):
    pass


links = Table(
    "link",
    Base.metadata,
    Column("root_id", ForeignKey("root.id"), primary_key=True),
    Column("label_name", ForeignKey("label.name"), primary_key=True),
)


class Root(Base):
    __tablename__ = "root"
    id: Mapped[int] = mapped_column(primary_key=True)
    note: Mapped[str] = mapped_column(String(9), default="")
    branches: Mapped[list[Branch]] = relationship(cascade="all, delete-orphan", order_by="Branch.id")
    birds: Mapped[list[Bird]] = relationship(back_populates="root")
    labels: Mapped[list[Label]] = relationship(secondary=links)
    flower: Mapped[Flower | None] = relationship(cascade="all, delete-orphan")
    stones: Mapped[list[Stone]] = relationship(cascade="all", passive_deletes=True)
    worms: DynamicMapped[Worm] = relationship(cascade="all, delete-orphan")
    moles: DynamicMapped[Mole] = relationship(cascade="all, delete-orphan")
    nests: Mapped[dict[str, Nest]] = relationship(cascade="all, delete-orphan", collection_class=attribute_keyed_dict("place"))


class Branch(Base):
    __tablename__ = "branch"
    id: Mapped[int] = mapped_column(primary_key=True)
    root_id: Mapped[int] = mapped_column(ForeignKey("root.id"))
    leaves: Mapped[list[Leaf]] = relationship(cascade="all, delete-orphan")


class Leaf(Base):
    __tablename__ = "leaf"
    id: Mapped[int] = mapped_column(primary_key=True)
    branch_id: Mapped[int] = mapped_column(ForeignKey("branch.id"))


class Bird(Base):
    """A child that outlives its root."""

    __tablename__ = "bird"
    id: Mapped[int] = mapped_column(primary_key=True)
    root_id: Mapped[int | None] = mapped_column(ForeignKey("root.id"))
    root: Mapped[Root | None] = relationship(back_populates="birds")


class Flower(Base):
    """One for each root."""

    __tablename__ = "flower"
    id: Mapped[int] = mapped_column(primary_key=True)
    root_id: Mapped[int] = mapped_column(ForeignKey("root.id"))


class Stone(Base):
    """A child that the database deletes."""

    __tablename__ = "stone"
    id: Mapped[int] = mapped_column(primary_key=True)
    root_id: Mapped[int] = mapped_column(ForeignKey("root.id", ondelete="CASCADE"))


class Worm(Base):
    """One of too many to be kept in memory."""

    __tablename__ = "worm"
    id: Mapped[int] = mapped_column(primary_key=True)
    root_id: Mapped[int] = mapped_column(ForeignKey("root.id"))


class Mole(Base):
    """One of too many to be kept in memory."""

    __tablename__ = "mole"
    id: Mapped[int] = mapped_column(primary_key=True)
    root_id: Mapped[int] = mapped_column(ForeignKey("root.id"))


class Nest(Base):
    """One for each place."""

    __tablename__ = "nest"
    id: Mapped[int] = mapped_column(primary_key=True)
    root_id: Mapped[int] = mapped_column(ForeignKey("root.id"))
    place: Mapped[str] = mapped_column(String(9))


class Label(Base):
    __tablename__ = "label"
    name: Mapped[str] = mapped_column(String(9), primary_key=True)
    serial: Mapped[int | None] = mapped_column(unique=True)


marks = Table("mark", Base.metadata, Column("tray_name", String(9)), Column("label_name", String(9)))


class Tray(Base):
    """A parent without a foreign key in the database. So SQLAlchemy carries its name over to its children."""

    __tablename__ = "tray"
    name: Mapped[str] = mapped_column(String(9), primary_key=True)
    jars: Mapped[list[Jar]] = relationship(primaryjoin=lambda: Tray.name == foreign(Jar.tray_name), passive_updates=False)
    labels: Mapped[list[Label]] = relationship(
        secondary=marks,
        primaryjoin=lambda: Tray.name == foreign(marks.c.tray_name),
        secondaryjoin=lambda: Label.name == foreign(marks.c.label_name),
        passive_updates=False,
    )


class Jar(Base):
    __tablename__ = "jar"
    id: Mapped[int] = mapped_column(primary_key=True)
    tray_name: Mapped[str] = mapped_column(String(9))


class Counted(Base):
    __tablename__ = "counted"
    id: Mapped[int] = mapped_column(primary_key=True)
    stock: Mapped[int]
    version: Mapped[int] = mapped_column()
    __mapper_args__ = {"version_id_col": version}
