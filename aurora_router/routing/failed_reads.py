"""Decide what becomes of a statement that has failed, and remember what its error shows."""

from __future__ import annotations

from sqlalchemy.exc import DBAPIError

from aurora_router.cluster.error_classification import classify_error
from aurora_router.cluster.limits import RetryThrottle
from aurora_router.core import events
from aurora_router.core.failures import Failure, traits
from aurora_router.core.instance import Instance
from aurora_router.core.read_retry import ReadStep, after_statement
from aurora_router.routing.interceptor import Interceptor
from aurora_router.routing.unit import Unit
from aurora_router.telemetry.listeners import EventDispatcher
from aurora_router.telemetry.stats import Counters


class FailedReads:
    """The failed reads of one router's sessions.

    interceptor: knows the phase of a unit, and which texts were rejected.
    counters: counts retries.
    throttle: says whether one more retry is allowed.
    dispatcher: publishes the events about retries and rejected texts.
    """

    def __init__(
        self, interceptor: Interceptor, counters: Counters, throttle: RetryThrottle, dispatcher: EventDispatcher
    ) -> None:
        self._interceptor = interceptor
        self._counters = counters
        self._throttle = throttle
        self._dispatcher = dispatcher

    def handle(self, unit: Unit, error: DBAPIError) -> ReadStep:
        """Return what to do about an error of a statement of this unit: one of RAISE, TO_WRITER, ELSEWHERE and AGAIN."""
        instance, known = unit.place.instance, classify_error(error)
        if instance is None:
            return ReadStep.RAISE
        step = ReadStep.RAISE
        if known.safe_to_repeat:
            phase = self._interceptor.phase(unit)
            step = after_statement(
                known.failure, phase, read_only=unit.intent.read_only, on_writer=unit.place.on_writer, retries=unit.retries
            )
        if step is ReadStep.TO_WRITER:
            self._move_to_writer(unit, instance, error, known.failure)
        elif step in (ReadStep.ELSEWHERE, ReadStep.AGAIN):
            unit.retries += 1
            if not self._throttle.allow(instance.id, first=unit.retries == 1):
                return ReadStep.RAISE
            if step is ReadStep.ELSEWHERE:
                unit.avoid |= {instance.id}
            self._count(unit, instance, error)
        elif unit.place.on_writer and unit.refused is not None and unit.refused == error.statement:
            self._interceptor.known.forget(unit.refused)  # the reader was not at fault: the writer refuses it, too
        return step

    def _move_to_writer(self, unit: Unit, instance: Instance, error: DBAPIError, failure: Failure) -> None:
        """Note why the unit leaves its reader. Remember the text, unless the reader will soon have what it lacks now."""
        if not traits(failure).is_remembered:
            self._count(unit, instance, error)
            return
        self._counters.retries[instance.id] += 1
        unit.refused = error.statement
        self._interceptor.known.remember_rejected(error.statement)
        if self._dispatcher.listeners:
            self._dispatcher.publish(events.Learned(instance.id, self._interceptor.driver.code(error.orig), **unit.numbers))

    def _count(self, unit: Unit, instance: Instance, error: DBAPIError) -> None:
        self._counters.retries[instance.id] += 1
        if self._dispatcher.listeners:
            self._dispatcher.publish(events.Repeated(instance.id, type(error).__name__, **unit.numbers))
