"""Turn a token into a requirement for units, and the writes of units into a token."""

from __future__ import annotations

import time
from collections.abc import Callable

from aurora_router.cluster.monitor import Monitor, Urgency
from aurora_router.config.settings import Settings
from aurora_router.core import events
from aurora_router.core.selection import with_proof
from aurora_router.core.token_codec import refresh
from aurora_router.core.topology import Topology
from aurora_router.errors import RouterError
from aurora_router.routing.causal_context import CausalContext, Scope, open_scopes
from aurora_router.routing.causality import Causality
from aurora_router.routing.token_signing import TokenRefused, Tokens, merge_tokens
from aurora_router.telemetry.listeners import EventDispatcher


class TokenService:
    """The tokens and causal scopes of one router.

    start: starts the router, because only then its cluster is known. It raises what Router.start() raises.
    """

    def __init__(
        self, settings: Settings, monitor: Monitor, causality: Causality, dispatcher: EventDispatcher, start: Callable[[], None]
    ) -> None:
        self._tokens = Tokens(settings)
        self._probe_timeout = settings.probe_timeout
        self._monitor = monitor
        self._causality = causality
        self._dispatcher = dispatcher
        self._start = start

    def new_scope(self, context: CausalContext) -> Scope:
        """Make a causal scope that begins with this context."""
        return Scope(self._causality, context, self.token_for)

    def token_of_open_scopes(self) -> str | None:
        """Return the token of the causal scopes that are open here. None if nothing was written in them and no token given."""
        return merge_tokens(*(scope.token for scope in open_scopes(self._causality)))

    def context_from_token(self, token: str, argument: str = "after") -> CausalContext:
        """Return what a session that begins with this token must see; nothing if the token has expired.

        argument: the caller's name for the token.

        Raises ConfigurationError.
        """
        self._start()
        requirement = self._tokens.read(token, self._monitor.topology.cluster, argument)
        if requirement is None:
            self._tell_ignored("expired")
            return CausalContext()
        return CausalContext(token, requirement)

    def context_from_untrusted_token(self, token: object) -> CausalContext:
        """Return the context of a token from a request or a message. If it does not count, publish an event, raise nothing."""
        try:
            return self.context_from_token(token)  # type: ignore[arg-type]  # context_from_token() refuses it if it is no text
        except TokenRefused as refused:
            self._tell_ignored(refused.reason)
        except RouterError as error:  # the next use of the router raises it
            self._tell_ignored(f"the router cannot start: {type(error).__name__}")
        return CausalContext()

    def _tell_ignored(self, reason: str) -> None:
        if self._dispatcher.listeners:
            self._dispatcher.publish(events.TokenIgnored(reason))

    def token_for(self, context: CausalContext) -> str | None:
        """Return the token of what was written in this context; None if nothing was written and no token given.

        If the position that proves it is not known yet, the writer is asked, once for all waiting callers. If there is no answer
        within probe_timeout, the token has no position. Then the sessions that get it stay on the writer for longer.
        """
        written = context.requirement
        if not context.wrote or written is None:
            return context.initial_token

        def proven(topology: Topology) -> bool:
            writer = topology.writer
            return with_proof(written, topology).position is not None or writer is None or writer.position is None

        topology = self._monitor.topology
        if not proven(topology):
            topology = self._monitor.wait_for(proven, self._probe_timeout, urgency=Urgency.OWN_PROBE)
        requirement = with_proof(written, topology)
        context.record(requirement)
        now = time.monotonic()
        fresh = refresh(requirement, topology.samples, now - self._tokens.ttl / 10, now)
        return self._tokens.write(topology.cluster or "", fresh)
