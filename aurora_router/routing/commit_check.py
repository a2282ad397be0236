"""The commit check: note something before a COMMIT. If the answer is lost, ask the newest writer for the outcome."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol
from uuid import UUID, uuid4

import tenacity
from sqlalchemy.engine import Connection
from sqlalchemy.exc import DBAPIError

from aurora_router.cluster.connection_state import state_of
from aurora_router.core.commit_outcome import Note, RowEvidence, RowNote, outcome, outcome_by_row
from aurora_router.core.failures import is_of_connect
from aurora_router.core.instance import Instance
from aurora_router.core.retry_loop import Sleep, next_step
from aurora_router.core.topology import Topology
from aurora_router.drivers import Driver, driver_of
from aurora_router.errors import ConfigurationError, NoWriterAvailable, Outcome, WrongServer
from aurora_router.routing.backoff import RESOLVE_BACKOFF, TenacityPolicy
from aurora_router.routing.unit import Unit
from aurora_router.servers import Execute, ServerFamily, XidFamily, supports_xid_status


class OutcomeQuery(Protocol):
    """A question about one transaction, for the newest writer."""

    @property
    def server(self) -> ServerFamily: ...

    def __call__(self, connection: Connection, /) -> Outcome: ...


def prepare_commit_check(
    connection: Any, unit: Unit, driver: Driver, server: ServerFamily, topology: Topology
) -> OutcomeQuery | None:
    """Note something by which the outcome of the transaction can be looked up. None if the unit has no commit check.

    The note is part of the transaction that is about to commit, and takes one round trip.

    connection: the driver's.

    Raises the driver's errors. Nothing has been committed then.
    """
    check = unit.intent.commit_check
    if check is None or unit.place.instance is None:
        if unit.intent.retry is not None and driver.is_aborted(connection):
            driver.raise_if_aborted(connection)  # COMMIT would roll back, but the attempt would look committed
        return None
    if check == "xid" and supports_xid_status(server):
        with connection.cursor() as cursor:
            cursor.execute(server.NOTE)
            return XidOutcomeQuery(cursor.fetchone(), unit.place.instance, topology, server)
    signature, signed_at = uuid4(), time.monotonic()
    try:
        if driver.is_aborted(connection):
            driver.raise_if_aborted(connection)  # the row would be in another transaction
        with connection.cursor() as cursor:
            read_only = driver.declared_read_only(connection)
            schema = server.insert_commit_row(_executing(cursor), str(signature), driver.database(connection), read_only)
    except Exception as error:
        code = driver.code(error)
        if server.is_read_only(code):
            return Nothing(server)
        if server.is_locked_out(code):
            raise ConfigurationError(
                f'LOCK TABLES has left out the table {server.COMMIT_TABLE}, in which commit_check="{check}" writes a row at '
                "COMMIT; send UNLOCK TABLES before the unit ends (it commits), or do without: commit_check=None"
            ) from None
        if server.is_missing_table(code):
            raise ConfigurationError(
                f'commit_check="{check}" needs the table {server.COMMIT_TABLE}'
                f"{'' if server.HAS_XID_STATUS else ' on this database'}, and "
                f"{unit.place.instance.id} has none that this user sees; create it with `aurora-router init-commit-table URL` or "
                "router.init_commit_table(), or do without: commit_check=None"
            ) from None
        raise
    if schema is None:
        return Nothing(server)
    assert unit.place.server is not None
    return CommitRowOutcomeQuery(signature, schema, signed_at, RowNote(unit.place.server, topology), server)


def _executing(cursor: Any) -> Execute:
    def execute(text: str, values: Mapping[str, Any] | None) -> Sequence[Any] | None:
        cursor.execute(text, values)
        row: Sequence[Any] | None = cursor.fetchone() if cursor.description else None
        return row

    return execute


class XidOutcomeQuery:
    """A question for the outcome of a transaction by its id.

    row: the answer to the family's NOTE. It is parsed only when needed, because nearly all COMMITs are answered.
    writer: the instance that gave the answer.
    topology: the topology at that moment.
    last_confirmed_by: the epoch, address and port of the server that was found to have the COMMIT. A crash makes this server
        forget the proof, but not the COMMIT. A promoted reader has on its disk what it has replayed.
    """

    __slots__ = ("last_confirmed_by", "row", "server", "topology", "writer")

    def __init__(self, row: Sequence[Any], writer: Instance, topology: Topology, server: XidFamily) -> None:
        self.row = row
        self.writer = writer
        self.topology = topology
        self.server = server
        self.last_confirmed_by: tuple[int, str | None, int | None] | None = None

    @property
    def note(self) -> Note:
        """The note of the transaction."""
        return self.server.parse_note(self.row, self.writer, self.topology)

    def __call__(self, connection: Connection) -> Outcome:
        note = self.note
        xid = {"xid": note.xid}
        row = connection.exec_driver_sql(self.server.EVIDENCE).one()
        try:
            status = connection.exec_driver_sql(self.server.STATUS, xid).scalar_one()
        except DBAPIError as error:
            driver = driver_of(error.orig)
            if driver is None or not self.server.is_future_xid(driver.code(error.orig)):
                raise
            status = None
        evidence = self.server.parse_evidence(row, status)
        if evidence is None:
            return Outcome.PENDING  # the server is not the writer yet, or not any more
        found = outcome(note, evidence)
        here = evidence.epoch, evidence.server.address, evidence.server.port
        if found is Outcome.COMMITTED:
            self.last_confirmed_by = here
        elif found is Outcome.UNKNOWN and self.last_confirmed_by == here:
            return Outcome.COMMITTED
        if found is Outcome.PENDING:
            connection.exec_driver_sql(self.server.END_IDLE, xid)
        return found

    def __str__(self) -> str:
        note = self.note
        return f"transaction {note.xid}, noted at {note.position}"


class CommitRowOutcomeQuery(NamedTuple):
    """A question for the outcome by the row that the transaction wrote. It keeps a missing row from being written later.

    schema: the schema of the row's table, quoted if it must be.
    written_at: seconds, monotonic. Old rows are removed, so later a missing row proves nothing.
    note: where the row was written.
    """

    id: UUID
    schema: str
    written_at: float
    note: RowNote
    server: ServerFamily

    def __call__(self, connection: Connection) -> Outcome:
        asked = state_of(connection.connection).server
        if asked is None or time.monotonic() - self.written_at > self.server.RETENTION_SECONDS / 2:
            return Outcome.UNKNOWN
        with connection.begin():
            connection.exec_driver_sql(self.server.LOOKUP_SETTINGS, {"schema": self.schema})
            connection.exec_driver_sql(self.server.FENCE, {"id": str(self.id)})
        with connection.begin():
            connection.exec_driver_sql(self.server.LOOKUP_SETTINGS, {"schema": self.schema})
            committed, flaw = connection.exec_driver_sql(self.server.COMMIT_ROW_EVIDENCE, {"id": str(self.id)}).one()
        return outcome_by_row(self.note, RowEvidence(asked, bool(committed), flaw))

    def __str__(self) -> str:
        return f"a transaction with the row {self.id} in {self.server.COMMIT_TABLE}"


class Nothing(NamedTuple):
    """No question, because the transaction is read-only: it has written nothing, and may run again."""

    server: ServerFamily

    def __call__(self, _: Connection) -> Outcome:
        return Outcome.NOT_COMMITTED

    def __str__(self) -> str:
        return "a read-only transaction"


def resolve_outcome(
    connect: Callable[[float], Connection], ask: OutcomeQuery, timeout: float, sleep: Callable[[float], None]
) -> Outcome:
    """Ask the newest writer until the answer is certain. UNKNOWN after `timeout` seconds.

    If COMMITs on this writer wait for a reader and there is none, this waits, too.

    connect: connects to the newest writer. Takes the seconds to wait for a writer.
    sleep: waits for some seconds between two questions.
    """
    began = time.monotonic()
    policy = TenacityPolicy(tenacity.stop_after_delay(timeout), RESOLVE_BACKOFF, began)
    for number in itertools.count(1):
        failed: Exception = _Pending()
        try:
            found = _ask(connect, ask, began + timeout)
            if found is not Outcome.PENDING:
                return found
        except NoWriterAvailable:  # connect() has waited until the timeout
            break
        except (DBAPIError, WrongServer) as error:
            if not is_of_connect(error):
                raise
            failed = error  # another connection may find the outcome
        step = next_step(number, failed, policy)
        if not isinstance(step, Sleep):
            break
        sleep(step.seconds)
    return Outcome.UNKNOWN


class _Pending(Exception):
    """The writer does not know the outcome yet."""


def _ask(connect: Callable[[float], Connection], ask: OutcomeQuery, until: float) -> Outcome:
    """Ask the newest writer once.

    until: seconds, monotonic.
    """
    with connect(max(until - time.monotonic(), 0.0)) as connection:
        found = ask(connection)
        if found is Outcome.COMMITTED:
            # The writer has the COMMIT. Synchronous readers have it, too, when this later COMMIT is answered.
            connection.exec_driver_sql(ask.server.SYNC_BARRIER)
            connection.commit()
        return found


def create_table(connection: Connection, server: ServerFamily, driver: Driver) -> None:
    """Create the commit table on the writer, unless it exists.

    connection: one in whose session nobody has changed the default database or schema.

    Raises ConfigurationError if the connection is to no database, or if there is an unfit table of that name.
    """
    try:
        with connection.begin():
            flaw = connection.exec_driver_sql(server.COMMIT_TABLE_FLAW).scalar()
            if flaw:
                raise ConfigurationError(f"a table {server.COMMIT_TABLE} is there, but the commit check cannot use it: {flaw}")
            if flaw is not None:
                return
            for statement in server.CREATE_COMMIT_TABLE:
                connection.exec_driver_sql(statement)
    except DBAPIError as error:
        if not server.is_missing_table(driver.code(error.orig)):
            raise
        message = f"the URL names no database to make {server.COMMIT_TABLE} in; write it like {driver.EXAMPLE}"
        raise ConfigurationError(message) from None
