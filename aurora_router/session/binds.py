"""Use the engines of other databases beside the cluster's: those of `binds`, or those that a session class chooses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sqlalchemy.engine import Connection, Engine
from sqlalchemy.orm import Mapper, Session, SessionTransaction

from aurora_router.errors import ConfigurationError
from aurora_router.session.connections import connection_to
from aurora_router.session.units import SessionUnits

NO_BINDS = "a routing session gets its engines from the router; leave out bind, or give a Connection when you make the session"


class SessionBinds(SessionUnits):
    """A session that may send some statements to engines that are not the router's."""

    _joined: Connection | None = None  # the connection that everything runs on
    _bind: Engine | Connection | None = None  # the session's own bind, as Session.get_bind() sees it
    # Statements may go to engines that are not the router's, because `binds` or the class mixed in chooses them.
    _elsewhere = False
    _class_chooses = False  # the class mixed in chooses them
    _chosen_options: Mapping[str, Any] = {}  # those that the class mixed in gives the cluster's engine
    _overridden = False  # some class has a get_bind() of its own
    _was_elsewhere = False  # a statement may have gone to such an engine

    @property
    def spans_databases(self) -> bool:
        """Whether statements of this session may have gone to other engines than the router's."""
        return self._was_elsewhere

    def serves(self, mapper: Mapper[Any], connection: Connection) -> bool:
        """Return whether this connection of the unit leads to the rows of a mapper."""
        return not (self._elsewhere or self._overridden) or self.get_bind(mapper) is connection.engine

    @property
    def bind(self) -> Engine | Connection | None:
        """The Connection that the session was made with and on which everything runs; None without one.

        Raises ConfigurationError if it is set to anything else, because that would change nothing.
        """
        return self._bind

    @bind.setter
    def bind(self, bind: Engine | Connection | None) -> None:
        if bind is not self._joined:
            raise ConfigurationError(f"bind: {NO_BINDS}")
        self._bind = bind

    def bind_mapper(self, mapper: Any, bind: Any) -> None:
        """Send this mapper's statements to that engine, as Session.bind_mapper() does. They are not routed."""
        self._elsewhere = self._was_elsewhere = True
        super().bind_mapper(mapper, bind)

    def bind_table(self, table: Any, bind: Any) -> None:
        """Send this table's statements to that engine, as Session.bind_table() does. They are not routed."""
        self._elsewhere = self._was_elsewhere = True
        super().bind_table(table, bind)

    @classmethod
    def _note_choosing_classes(cls, mixin: int) -> bool:
        """Note whether this class or a base has a get_bind() of its own. Return True if this class is the first to note one.

        mixin: the place of RoutingMixin among the base classes.

        Raises ConfigurationError for a class that the mixin cannot work with.
        """
        bases = cls.__mro__
        if mixin > bases.index(Session):
            raise ConfigurationError(f"{cls.__name__}: RoutingMixin comes first, before the session class")
        choosing = [base for base in bases if "get_bind" in vars(base) and base not in (bases[mixin], Session)]
        for base in choosing:
            # A session class that knows nothing of routing need not call super().get_bind(). Then nothing would be routed.
            if bases.index(base) < mixin and issubclass(base, Session) and not issubclass(base, bases[mixin]):
                raise ConfigurationError(f"{cls.__name__}: {bases[mixin].__name__} comes first, before {base.__name__}")
        if any(base.__module__ == "sqlalchemy.ext.horizontal_shard" for base in choosing):
            raise ConfigurationError(f"{cls.__name__}: a ShardedSession has no engine that a router could stand for")
        cls._overridden = bool(choosing)
        cls._elsewhere = cls._class_chooses = any(bases.index(base) > mixin for base in choosing)
        return cls._overridden and not any(getattr(base, "_overridden", False) for base in bases[1:])

    def _on_begin(self, _: SessionTransaction, connection: Connection) -> None:
        """Note the use of another engine than the router's. For the router's engine, apply the options that the class has chosen.

        Only classes that choose among several engines have this listener.
        """
        unit = self.routing_state.unit
        if unit is None or unit.place.instance is None or connection.engine is not self._engine(unit):
            self._was_elsewhere = True
        elif self._chosen_options:
            connection.execution_options(**self._chosen_options)

    def _other_engine(self, mapper: Any, clause: Any, options: dict[str, Any]) -> Engine | Connection | None:
        """Return the engine that `binds` or the class mixed in chooses for this mapper or clause; None for the cluster."""
        found = self._chosen(mapper, clause=clause, **options)
        stand_in = self.router_core.engines.stand_in
        if isinstance(found, Engine) and found.pool is stand_in.pool:
            own = stand_in.get_execution_options()
            self._choose_options({k: v for k, v in found.get_execution_options().items() if k not in own or own[k] != v})
            return None
        if found is self._joined or (self._class_chooses and self._stands_for_the_cluster(found)):
            self._choose_options({})
            return None
        return found

    def _chosen(self, *arguments: Any, **options: Any) -> Engine | Connection:
        """Return the engine that the session would use without the mixin, or the router's stand-in if it would have none."""
        self._bind = self.router_core.engines.stand_in if self._joined is None else self._joined
        try:
            return super().get_bind(*arguments, **options)
        finally:
            self._bind = self._joined

    def _choose_options(self, options: Mapping[str, Any]) -> None:
        """Give the unit's connection these execution options, until the class mixed in chooses others.

        options: those that the class has given the cluster's engine.

        Raises ConfigurationError for an isolation level, because it would come too late.
        """
        before = self._chosen_options
        if options == before:
            return
        if "isolation_level" in options:
            raise ConfigurationError(
                "get_bind() chooses an isolation_level for the router's cluster; give it to the Router, in engine_options, "
                "or to session.connection(execution_options=...)"
            )
        self._chosen_options = options
        unit = self.routing_state.unit
        connection = connection_to(self, self._engine(unit)) if unit is not None and unit.place.instance is not None else None
        if connection is not None:
            connection.execution_options(**{**dict.fromkeys(before), **options})

    def _is_of_router(self, bind: Engine | Connection) -> bool:
        """Return whether this is one of the router's engines, which all stand for the cluster.

        An engine with execution options of its own does not stand for it.
        """
        return type(bind) is Engine and self._joined is None and self.router_core.engines.owns(bind)

    def _stands_for_the_cluster(self, found: Engine | Connection) -> bool:
        """Return whether get_bind() returns this engine without arguments, or the engine leads to the router's database.

        An engine with execution options of its own does not stand for the cluster, because it may mean another schema.
        """
        if type(found) is not Engine:
            return False
        try:
            usual = self._chosen()
        except Exception:
            usual = None  # a class that needs a mapper to answer has no usual engine
        return found is usual or self.router_core.is_database(found.url)
