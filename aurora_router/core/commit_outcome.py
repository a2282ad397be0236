"""The outcome of a COMMIT whose answer was lost, decided by an answer of the newest writer and never guessed.

`outcome()` decides it by the transaction's id, `outcome_by_row()` by its row in the commit table.

PostgreSQL knows whether the transaction with a 64-bit id (xid) committed, also after a promotion. Its answer is wrong in one
case: the promoted reader never saw the transaction, and has used the xid for another one. The note's position shows this case,
because taking the note writes a record of the transaction. The note's position lies after that record and before the record of
the COMMIT. If a server's recovery ended before that position, the server does not have the COMMIT. If a server replayed more, it
knows that the xid is taken.
"""

from __future__ import annotations

from typing import NamedTuple

from aurora_router.core.instance import Location, ServerId
from aurora_router.core.positions import WalPosition
from aurora_router.core.topology import Topology
from aurora_router.errors import Outcome


class Note(NamedTuple):
    """A note of a transaction, made before its COMMIT was sent.

    xid: the transaction's id.
    position: right after a record of the transaction, and before the record of its COMMIT.
    recovered: the LSN at which the writer's last recovery had ended; None if the writer was started without one.
    server: the writer.
    readers: the servers that were readers then. One of them may be the writer by now.
    """

    xid: int
    position: WalPosition
    recovered: int | None
    server: ServerId
    readers: frozenset[ServerId] = frozenset()


class Evidence(NamedTuple):
    """The answer of the newest writer about a note.

    server: that writer.
    epoch: its epoch.
    recovered: the LSN at which its last recovery ended, by a promotion or in the restart after a crash; None if there is none.
    followed: whether that recovery was a reader's, and replayed transactions. Then it ended with a promotion, not after a crash.
    status: the status of the xid, "committed", "aborted" or "in progress". None if the xid has not been assigned yet or was
        forgotten.
    """

    server: ServerId
    epoch: int
    recovered: int | None
    followed: bool
    status: str | None


_STATUS = {"committed": Outcome.COMMITTED, "aborted": Outcome.NOT_COMMITTED, "in progress": Outcome.PENDING}


def outcome(note: Note, evidence: Evidence) -> Outcome:
    """Decide the outcome of the transaction.

    On the timeline of the note, the status is true if the server has not recovered since. If the server has recovered, the end
    of that recovery decides whether the xid still belongs to the same transaction. The same holds after the promotion of a
    server that was a reader at the time of the note. On any other timeline, the outcome cannot be known. It cannot be known
    either if a restart has erased the end of the recovery.
    """
    if evidence.server.cluster != note.server.cluster:
        return Outcome.UNKNOWN  # the cluster was made anew: this xid is of another history
    same_life = evidence.server.incarnation == note.server.incarnation
    if evidence.epoch == note.position.epoch:
        if same_life and evidence.recovered == note.recovered:
            return _STATUS.get(evidence.status or "", Outcome.UNKNOWN)
    elif evidence.epoch != note.position.epoch + 1 or all(evidence.server.incarnation != r.incarnation for r in note.readers):
        return Outcome.UNKNOWN
    if evidence.recovered is None:
        return Outcome.UNKNOWN
    if evidence.recovered < note.position.lsn:
        return Outcome.NOT_COMMITTED
    if evidence.epoch != note.position.epoch and not evidence.followed and evidence.status != "aborted":
        # The server crashed after its promotion, so it has forgotten where the recovery of the promotion ended. The xid may be
        # the noted transaction's or another one's. Only an aborted xid is certain: the noted transaction has not committed.
        return Outcome.UNKNOWN
    return _STATUS.get(evidence.status or "", Outcome.UNKNOWN)


class RowNote(NamedTuple):
    """A note of a transaction that has written a row into the commit table.

    server: the server on which the row was written.
    topology: as it was then.
    """

    server: ServerId
    topology: Topology


class RowEvidence(NamedTuple):
    """The answer of the newest writer about a row in the commit table. A missing row was made there, marked as not committed.

    server: that writer.
    committed: whether the row is the transaction's own.
    flaw: why the table's rows prove nothing; "" if they do.
    """

    server: ServerId
    committed: bool
    flaw: str


def outcome_by_row(note: RowNote, evidence: RowEvidence) -> Outcome:
    """Decide the outcome of the transaction.

    A missing row proves nothing on another server if one of the two leaves a part out of its log, or out of its replication. The
    commit table may be in that part.
    """
    if evidence.flaw:
        return Outcome.UNKNOWN
    if evidence.committed:
        return Outcome.COMMITTED
    then, now = note.server.location, evidence.server.location
    if then == now or not (_may_lack_rows(note.topology, then) or _may_lack_rows(note.topology, now)):
        return Outcome.NOT_COMMITTED
    return Outcome.UNKNOWN


def _may_lack_rows(topology: Topology, location: Location) -> bool:
    """Whether a server may have had a part only of the data. If it is not in the topology, that holds if any server may have."""
    known = [instance for instance in topology if any(seen.server.id.location == location for seen in instance.tracked)]
    return any(instance.unproven for instance in known or topology)
