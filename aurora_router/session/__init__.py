"""Routing sessions."""

from aurora_router.session.mixin import RoutingMixin, RoutingSession

__all__ = ["RoutingMixin", "RoutingSession"]
