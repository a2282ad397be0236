"""What became of a COMMIT whose answer was lost: outcome(note, evidence), from what the newest writer says. Never a guess.

PostgreSQL tells for 64-bit transaction ids (xids) whether they committed, also after a promotion. It lies in one case: the
promoted reader never saw the transaction and has used its xid again. The note's position tells them apart: the note writes a
record of the transaction, and its position lies behind that record and before the record of the COMMIT. So a server whose log
was replayed to an end before the note's position has not got the COMMIT, and one that replayed more knows that the xid is taken.
"""

from __future__ import annotations

from typing import NamedTuple

from aurora_router.core.positions import WalPosition
from aurora_router.core.topology import ServerId
from aurora_router.errors import Outcome


class Note(NamedTuple):
    """What was noted of a transaction before its COMMIT was sent.

    xid: the transaction's. position: right behind a record of the transaction, and before the record of its COMMIT.
    recovered: where the writer's last recovery had ended, None where it was started without one. server: the writer.
    readers: the servers that were readers then; one of them may be the writer by now.
    """

    xid: int
    position: WalPosition
    recovered: int | None
    server: ServerId
    readers: frozenset[ServerId] = frozenset()


class Evidence(NamedTuple):
    """What the newest writer says of a note.

    epoch: its own. recovered: where its last recovery ended: a promotion, or the restart after a crash. followed: whether that
    recovery was a reader's, and replayed transactions: then it was no crash. status: of the xid:
    "committed", "aborted", "in progress", or None where it has not been given out yet or was forgotten.
    """

    server: ServerId
    epoch: int
    recovered: int | None
    followed: bool
    status: str | None


_STATUS = {"committed": Outcome.COMMITTED, "aborted": Outcome.NOT_COMMITTED, "in progress": Outcome.PENDING}


def outcome(note: Note, evidence: Evidence) -> Outcome:
    """What became of the transaction.

    On the timeline of the note: a server that has not recovered since tells the truth. Where it has, and after the promotion of
    a reader that was one when the note was taken, the end of that recovery decides whether the xid is still the same
    transaction's. On any other timeline, and where a restart has wiped out where the recovery ended, it cannot be known.
    """
    if evidence.server.cluster != note.server.cluster:
        return Outcome.UNKNOWN  # the cluster was made anew: the xid is another transaction's
    same_life = evidence.server.life == note.server.life
    if evidence.epoch == note.position.epoch:
        if same_life and evidence.recovered == note.recovered:
            return _STATUS.get(evidence.status or "", Outcome.UNKNOWN)
    elif evidence.epoch != note.position.epoch + 1 or all(evidence.server.life != r.life for r in note.readers):
        return Outcome.UNKNOWN
    if evidence.recovered is None:
        return Outcome.UNKNOWN
    if evidence.recovered < note.position.lsn:
        return Outcome.NOT_COMMITTED
    if evidence.epoch != note.position.epoch and not evidence.followed and evidence.status != "aborted":
        # It crashed after its promotion, and where that one's recovery ended is forgotten. Whoever's the id is, if that
        # transaction has aborted, the noted one has not committed.
        return Outcome.UNKNOWN
    return _STATUS.get(evidence.status or "", Outcome.UNKNOWN)
