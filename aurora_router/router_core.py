"""RouterCore: the parts of one router and how they are joined. Sessions, middleware and jobs use it; users see the Router."""

from __future__ import annotations

import atexit
import functools
import os
import time
import weakref
from collections.abc import Callable
from typing import TypeVar

import tenacity
from sqlalchemy.engine import URL, Engine
from sqlalchemy.exc import DBAPIError

from aurora_router.cluster import topology_changes
from aurora_router.cluster.engines import Engines
from aurora_router.cluster.error_classification import classify_error, is_contention
from aurora_router.cluster.families import Families
from aurora_router.cluster.limits import FairSemaphore, RetryThrottle
from aurora_router.cluster.monitor import Monitor, Urgency
from aurora_router.config import checks, urls
from aurora_router.config.settings import Settings
from aurora_router.core import events
from aurora_router.core.instance import ServerId
from aurora_router.core.pacing import writer_read_slots
from aurora_router.core.selection import Decision, Reason, is_caught_up
from aurora_router.core.sql.analysis import analyze
from aurora_router.core.statement_rules import reason_to_write
from aurora_router.core.topology import Topology
from aurora_router.errors import ConfigurationError, RouterError
from aurora_router.routing.backoff import CONNECT_BACKOFF
from aurora_router.routing.causality import Causality
from aurora_router.routing.checkout import Checkout
from aurora_router.routing.commit_check import create_table
from aurora_router.routing.connector import Connector
from aurora_router.routing.failed_reads import FailedReads
from aurora_router.routing.interceptor import Interceptor
from aurora_router.routing.token_service import TokenService
from aurora_router.routing.unit import AUTOMATIC, READ_ONLY, READ_WRITE, Intent, Unit
from aurora_router.telemetry.listeners import EventDispatcher
from aurora_router.telemetry.log import Log
from aurora_router.telemetry.stats import Counters, RouterStats
from aurora_router.waiting import Waiting

T = TypeVar("T")


class RouterCore:
    """The parts of one router.

    They refer to each other, but never to the Router. So the Router can be garbage collected, and its finalizer stops them.

    waiting: how units wait.
    is_started: whether start() has nothing to wait for.
    route: the hint that engine_options give for all statements; None without one.
    """

    is_started = False

    def __init__(self, settings: Settings, waiting: Waiting) -> None:
        self.settings = settings
        self.route = settings.options.get("execution_options", {}).get("route")
        self.log = log = Log()
        self.dispatcher = dispatcher = EventDispatcher(tuple(settings.listeners), log)
        self.waiting = waiting
        self.counters = counters = Counters()
        pool, _ = checks.get_pool_limits(settings.options)
        self.for_reads = for_reads = FairSemaphore(writer_read_slots(pool, settings.writer_share_for_reads), waiting)
        self.throttle = throttle = RetryThrottle(dispatcher.publish, counters)
        self.causality = causality = Causality(settings, lambda: self.monitor.topology)
        families = Families(settings.target.driver.PROTOCOL, settings.target.dialect)
        self.engines = engines = Engines(
            settings,
            self._allowed_servers,
            self._on_wrong_server,
            families,
            lambda: self.interceptor,
            waiting,
            counters,
            dispatcher,
        )
        self.fixed_address = urls.find_fixed_address(settings.target, settings.options, settings.options_of_readers)
        urls.check_distinct(settings.all_instances, self.fixed_address)
        self.monitor = monitor = Monitor(
            settings,
            engines.probe,
            engines.shut_down_probes,
            self._on_change,
            engines.reached,
            waiting,
            dispatcher.publish_from_own_thread if settings.listeners else None,
        )
        self.interceptor = interceptor = Interceptor(settings, families, engines, monitor, causality, dispatcher, waiting)
        self.failed_reads = FailedReads(interceptor, counters, throttle, dispatcher)
        self.checkout = Checkout(settings, interceptor, engines, monitor, dispatcher, throttle, for_reads, counters)
        self.tokens = TokenService(settings, monitor, causality, dispatcher, self.start)
        self._reads_before = 0  # of the writer, when a reader had last caught up
        self._refused_at = float("-inf")  # monotonic seconds: when start() last failed
        _cores.add(self)

    def start(self) -> None:
        """Begin to watch the instances, and wait until each has answered once or has timed out. See Router.start()."""
        if self.is_started:
            return
        if self.checkout.waits.is_closed:
            raise RouterError("this router is closed; make a new one")
        self.monitor.start()
        # A fault that made the last start fail may have been repaired since, so wait for newer answers.
        since = self._refused_at
        timeout = self.settings.probe_timeout + 1.0
        topology = self.monitor.wait_for(
            lambda t: all(i.last_observed_at > since for i in t), timeout, urgency=Urgency.SHARED_PROBE
        )
        self.log.started(topology)
        strangers = [i for i in topology if i.is_foreign]
        if strangers or topology.misconfigured:
            self._refused_at = time.monotonic()
            raise ConfigurationError("; ".join(topology.said(strangers or None))) from self.engines.password_error
        self.is_started = True

    def close(self) -> None:
        """Stop watching and close the pooled connections. Idempotent."""
        self.is_started = False
        self.checkout.close()
        self.monitor.close()
        self.engines.close()

    def abandon(self) -> None:
        """Stop the parts of a router that was garbage collected. Wait for nothing, because any thread may run this."""
        self.monitor.stop()
        self.engines.close()

    def shut_down(self) -> None:
        """End the router's own threads before the interpreter ends. Threads of the application may still use the router."""
        self.monitor.close()
        self.engines.close()

    def forked(self) -> None:
        """Begin anew in a forked child. Connections, threads and held locks are the parent's, and its topology may be old."""
        self.is_started = False
        self.log.forked()
        self.interceptor.forked()
        self.for_reads.forked()
        self.throttle.forked()
        self.counters.forked()
        self._reads_before = 0
        self.checkout.forked()
        self.engines.forked()
        self.monitor.forked()

    # -- units ----------------------------------------------------------------------------------------------------

    def unit(self, read_only: bool, after: str | None) -> Unit:
        """Return a new unit that sees what a token speaks of, and what the scopes around it have written and read."""
        unit = Unit(READ_ONLY if read_only else READ_WRITE)
        self.causality.on_begin(unit, None if after is None else self.tokens.context_from_token(after))
        return unit

    def acquire(self, unit: Unit, connector: Connector[T], write: Reason | None = None) -> T:
        """Connect a unit to the instance that it needs.

        If a reader cannot be reached, the unit tries another instance. For a writer it waits up to failover_timeout.

        write: why the unit must be on the writer; None if it need not be.
        """
        if not self.is_started:
            self.start()
        return self.checkout.acquire(unit, connector, write)

    def above_read_committed(self, level: str | None) -> bool:
        """Return whether a unit at this isolation level must be on the writer.

        level: None stands for the engine's or the server's default.
        """
        if not self.is_started:
            self.start()
        return self.interceptor.isolation.above_read_committed(level)

    def may_run_again(self, number: int, error: Exception) -> bool:
        """Return whether the retry budget lets run_transaction() run a function again, after this many attempts.

        error: what the last attempt has met.
        """
        if not is_contention(error) and not self.throttle.allow(None, first=number == 1):
            return False
        self.counters.transaction_retries += 1
        if self.dispatcher.listeners:
            self.dispatcher.publish(events.RunAgain(number, type(error).__name__))
        return True

    # -- engines --------------------------------------------------------------------------------------------------

    def writer_engine(self) -> Engine:
        """Return the engine of the writer. Wait for a writer as a unit would."""
        self.start()
        return self.engines.engine(self.checkout.writer())

    def connected_writer_engine(self) -> Engine | None:
        """Return the engine of the writer if it has connected before. Do not wait."""
        writer = self.monitor.topology.writer
        engine = self.engines.engine(writer) if writer is not None else None
        return engine if engine is not None and engine.dialect.server_version_info is not None else None

    def is_database(self, url: URL) -> bool:
        """Return whether a URL leads to the router's database, as its user, on one of its instances."""
        own = self.settings.target.url
        if (url.database, url.username) != (own.database, own.username) or url.host is None:
            return False
        return urls.instance_id(url, self.interceptor.driver) in self.monitor.topology.by_id

    def init_commit_table(self) -> None:
        """Create the commit table. See Router.init_commit_table()."""
        self.start()
        # The table may be there already, so this can be repeated even if its COMMIT was not answered.
        tenacity.Retrying(
            retry=tenacity.retry_if_exception(_is_repeatable),
            stop=tenacity.stop_after_delay(self.settings.failover_timeout),
            wait=CONNECT_BACKOFF,
            sleep=self.waiting.sleep,
            reraise=True,
        )(self._create_commit_table)

    def _create_commit_table(self) -> None:
        writer = self.checkout.writer()
        # Use no pooled connection: USE or search_path of its last unit would decide in which database the table is made.
        with self.engines.unpooled_connection(writer) as connection:
            create_table(connection, self.interceptor.families.at(writer.id), self.interceptor.driver)

    # -- what the router tells ---------------------------------------------------------------------------------------

    def explain(self, sql: str, read_only: bool | None) -> Decision:
        """Say where a unit that begins with this statement would go now, and why. See Router.explain()."""
        self.start()
        known = self.interceptor.known
        found = analyze(sql, self.interceptor.families.dialect)
        effect = known.effect(found)
        write: Reason | None = None
        if read_only is False:
            write = Reason.DECLARED_WRITE
        elif read_only is None:
            write = reason_to_write(found, effect, None, known.was_rejected(sql))
        unit = Unit(AUTOMATIC if read_only is None else Intent(read_only))
        self.causality.on_begin(unit)
        return self.checkout.decide(unit, write)._replace(effect=effect)

    def stats(self) -> RouterStats:
        """Return the numbers of this router. See Router.stats()."""
        counters, for_reads = self.counters, self.for_reads
        return RouterStats(
            tuple(counters.of(instance, self.engines.pool_usage(instance)) for instance in self.monitor.topology),
            units_waiting_for_writer=self.checkout.waits.for_a_writer,
            writer_waits=counters.writer_waits,
            reader_waits=counters.reader_waits,
            writer_read_slots_in_use=for_reads.in_use,
            reads_waiting_for_slot=for_reads.waiting,
            transaction_retries=counters.transaction_retries,
            retries_refused=counters.retries_refused,
        )

    # -- callbacks of the engines and the monitor -----------------------------------------------------------------

    def _allowed_servers(self, instance_id: str) -> frozenset[ServerId]:
        instance = self.monitor.topology.by_id.get(instance_id)
        return instance.servers if instance is not None else frozenset()

    def _on_wrong_server(self, instance_id: str, why: str) -> None:
        self.dispatcher.publish(events.ConnectionRefused(instance_id, why))
        self.monitor.recheck_address(instance_id)

    def _on_change(self, old: Topology, new: Topology, published_at: float) -> list[Callable[[], object]]:
        if new.readers:
            self.for_reads.cancel_waiters()  # so that waiting reads try the readers
        publish = self.dispatcher.publish_from_own_thread
        with self.engines.telling_later() as closed:
            news = topology_changes.apply(self.engines, publish, old, new, published_at)
            self.engines.keep(new.by_id)
        news = [*(functools.partial(publish, event) for event in closed), *news]
        self.counters.keep(new.by_id)
        return [*news, functools.partial(self.log.keep, new.by_id), *self._news_of_readers(new), self.log.tick]

    def _news_of_readers(self, topology: Topology) -> list[Callable[[], object]]:
        """The news that the writer serves reads because readers are late for long, or that a reader has caught up."""
        seconds = self.settings.pin_seconds
        is_in_time = is_caught_up(topology, seconds)
        reads = sum([*self.counters.reads_as_writer.values()])
        if is_in_time:
            self._reads_before = reads
            return [self.log.readers_caught_up]
        is_served = is_in_time is False and reads > self._reads_before
        return [functools.partial(self.log.readers_late, topology, seconds)] if is_served else []


def _is_repeatable(error: BaseException) -> bool:
    """Return whether the cluster is to blame for a failed creation of the commit table, or its outcome is not known."""
    if not isinstance(error, (RouterError, DBAPIError)):
        return False
    known = classify_error(error)
    return known.safe_to_repeat or not known.outcome_known


_cores: weakref.WeakSet[RouterCore] = weakref.WeakSet()


@atexit.register
def _shut_down_all() -> None:
    for core in [*_cores]:
        core.shut_down()


def _forked() -> None:
    for core in [*_cores]:
        core.forked()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)
