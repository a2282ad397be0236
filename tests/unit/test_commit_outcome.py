"""The outcome of a COMMIT whose answer was lost, from the note before it and the answers of the newest writer."""

import itertools
from types import SimpleNamespace

import pytest
from psycopg.pq import TransactionStatus

from aurora_router.core.commit_outcome import Evidence, Note, RowEvidence, RowNote, outcome, outcome_by_row
from aurora_router.core.instance import Instance, Role, ServerId, ServerStatus, TrackedServer
from aurora_router.core.positions import WalPosition
from aurora_router.core.topology import Topology
from aurora_router.drivers.psycopg import is_aborted
from aurora_router.errors import Outcome
from aurora_router.servers.postgresql import is_future_xid, is_missing_table, parse_evidence, parse_note

OLD = ServerId("1", "10.0.0.1", 5432, "100")
READER = ServerId("1", "10.0.0.2", 5432, "200")
RESTARTED = ServerId("1", "10.0.0.1", 5432, "900")
STRANGER = ServerId("1", "10.0.0.9", 5432, "700")
STATUSES = ["committed", "aborted", "in progress", None]


def note(recovered: int | None = None) -> Note:
    return Note(777, WalPosition(3, 1000), recovered, OLD, frozenset({READER}))


TRUTH = {
    "committed": Outcome.COMMITTED,
    "aborted": Outcome.NOT_COMMITTED,
    "in progress": Outcome.PENDING,
    None: Outcome.UNKNOWN,
}


@pytest.mark.parametrize("status", STATUSES)
def test_the_same_server_in_the_same_life_tells_the_truth(status):
    assert outcome(note(), Evidence(OLD, 3, None, False, status)) is TRUTH[status]
    assert outcome(note(recovered=50), Evidence(OLD, 3, 50, True, status)) is TRUTH[status]


@pytest.mark.parametrize("status", STATUSES)
@pytest.mark.parametrize("replayed", [1000, 1001, 5000])
def test_a_promoted_reader_that_replayed_the_note_knows_the_id(status, replayed):
    """A promoted reader that replayed the note is believed about the transaction's id, because nobody else can have used it."""
    assert outcome(note(), Evidence(READER, 4, replayed, True, status)) is TRUTH[status]


@pytest.mark.parametrize("status", STATUSES)
@pytest.mark.parametrize("replayed", [0, 999])
def test_a_promoted_reader_without_the_note_is_not_believed(status, replayed):
    """A promoted reader that never saw the transaction is not believed about its id, because the transaction is gone."""
    assert outcome(note(), Evidence(READER, 4, replayed, True, status)) is Outcome.NOT_COMMITTED


@pytest.mark.parametrize("life", [OLD, RESTARTED])
@pytest.mark.parametrize("status", STATUSES)
def test_a_crash_of_the_writer_counts_like_a_promotion(status, life):
    recovered_again = Evidence(life, 3, 999, False, status)
    assert outcome(note(recovered=50), recovered_again) is Outcome.NOT_COMMITTED
    assert outcome(note(recovered=50), Evidence(life, 3, 1000, False, status)) is TRUTH[status]


@pytest.mark.parametrize("status", STATUSES)
def test_a_restart_that_erased_the_end_of_recovery_means_unknown(status):
    """The outcome is unknown if a restart erased the position where recovery ended."""
    assert outcome(note(), Evidence(RESTARTED, 3, None, False, status)) is Outcome.UNKNOWN
    assert outcome(note(), Evidence(READER, 4, None, False, status)) is Outcome.UNKNOWN


@pytest.mark.parametrize(("epoch", "status"), [*itertools.product([1, 2, 5, 6], STATUSES)])
def test_any_other_distance_of_epochs_leaves_it_unknown(epoch, status):
    assert outcome(note(), Evidence(READER, epoch, 5000, True, status)) is Outcome.UNKNOWN


@pytest.mark.parametrize("status", STATUSES)
def test_a_new_writer_that_was_no_reader_means_unknown(status):
    """The outcome is unknown if the new writer was not a reader when the note was made."""
    restarted_reader = READER._replace(started="201")
    assert outcome(note(), Evidence(STRANGER, 4, 5000, True, status)) is Outcome.UNKNOWN
    assert outcome(note(), Evidence(restarted_reader, 4, 5000, True, status)) is Outcome.UNKNOWN


@pytest.mark.parametrize("status", STATUSES)
def test_a_crash_after_the_promotion_leaves_only_what_is_certain(status):
    """A crash since the promotion erases where its recovery ended, so only outcomes that do not need it are known."""
    expected = Outcome.NOT_COMMITTED if status == "aborted" else Outcome.UNKNOWN
    assert outcome(note(), Evidence(READER, 4, 1000, False, status)) is expected
    assert outcome(note(), Evidence(READER, 4, 999, False, status)) is Outcome.NOT_COMMITTED, (
        "the promotion's ended earlier still"
    )


def test_a_server_at_another_address_is_the_same_server():
    """A server that is reached at another address is still the same one."""
    elsewhere = OLD._replace(address="192.168.0.1")
    assert outcome(note(), Evidence(elsewhere, 3, None, False, "committed")) is Outcome.COMMITTED


def test_a_note_has_the_writers_epoch_and_the_current_readers():
    """A note is read with the epoch of its writer and the readers of that moment."""
    seen = {i: TrackedServer(ServerStatus(i, role, 3), 1.0, 0.0) for i, role in ((OLD, Role.WRITER), (READER, Role.READER))}
    writer = Instance("a:1", "a", 1, tracked=(seen[OLD],), role=Role.WRITER, servers=frozenset({OLD}), epoch=3)
    reader = Instance("b:1", "b", 1, tracked=(seen[READER],), role=Role.READER, servers=frozenset({READER}), epoch=3)
    topology = Topology(instances=(writer, reader), writer=writer, readers=(reader,), epoch=3)
    assert parse_note((777, "0/3E8", None), writer, topology) == note()
    assert parse_note((777, "0/3E8", "0/32"), writer, topology) == note(recovered=50)


def test_a_note_includes_a_reader_that_is_held_back():
    """A reader that is held back is noted as well, because it may be promoted all the same."""
    seen = {i: TrackedServer(ServerStatus(i, role, 3), 1.0, 0.0) for i, role in ((OLD, Role.WRITER), (READER, Role.READER))}
    writer = Instance("a:1", "a", 1, tracked=(seen[OLD],), role=Role.WRITER, servers=frozenset({OLD}), epoch=3)
    held = Instance("b:1", "b", 1, tracked=(seen[READER],), flap_count=5)
    topology = Topology(instances=(writer, held), writer=writer, epoch=3)
    assert parse_note((777, "0/3E8", None), writer, topology) == note()


def test_evidence_is_read_from_a_writer_and_from_no_reader():
    identity = (180000, "1", "10.0.0.1", 5432, "100")
    assert parse_evidence((*identity, False, "0000000A", "0/3E8", True), "committed") == Evidence(
        OLD, 10, 1000, True, "committed"
    )
    assert parse_evidence((*identity, False, "00000003", None, False), None) == Evidence(OLD, 3, None, False, None)
    assert parse_evidence((*identity, True, None, "0/3E8", True), None) is None


def test_an_aborted_transaction_shows_on_psycopgs_connection():
    """A transaction that has failed is recognized from the state of the driver's connection."""
    for status in TransactionStatus:
        connection = SimpleNamespace(info=SimpleNamespace(transaction_status=status))
        assert is_aborted(connection) is (status is TransactionStatus.INERROR)


def test_only_an_undefined_table_is_a_missing_table():
    assert is_missing_table("42P01")
    assert not is_missing_table(None)
    assert not is_future_xid("42P01")


@pytest.mark.parametrize("status", STATUSES)
def test_a_cluster_made_anew_knows_nothing_of_the_note(status):
    """The outcome is unknown in another cluster, because the id is another transaction's there."""
    for server, epoch in ((OLD, 3), (READER, 4)):
        anew = Evidence(server._replace(cluster="2"), epoch, None if epoch == 3 else 5000, True, status)
        assert outcome(note(), anew) is Outcome.UNKNOWN


def row_note(*, of_writer: str = "", of_reader: str = "") -> RowNote:
    """A note of a row in a cluster whose servers have these reasons to lack something."""
    why = {OLD: of_writer, READER: of_reader}
    seen = {i: TrackedServer(ServerStatus(i, Role.READER, 3, unproven=why[i]), 1.0, 0.0) for i in why}
    return RowNote(OLD, Topology(tuple(Instance(str(i), "a", 1, tracked=(seen[i],), unproven=why[i]) for i in why)))


@pytest.mark.parametrize("writer", [OLD, RESTARTED, READER, STRANGER])
def test_a_row_proves_a_commit_and_its_lack_the_opposite(writer):
    """A row proves a COMMIT wherever it is found. A missing row proves the opposite if all servers have everything."""
    assert outcome_by_row(row_note(), RowEvidence(writer, True, "")) is Outcome.COMMITTED
    assert outcome_by_row(row_note(), RowEvidence(writer, False, "")) is Outcome.NOT_COMMITTED


@pytest.mark.parametrize("filters", [{"of_writer": "a log in part"}, {"of_reader": "replicates a part"}])
def test_a_missing_row_proves_nothing_where_it_may_be_left_out(filters):
    """A promoted reader may lack the row of a COMMIT that was done, if its filters or those of the writer's log leave it out."""
    noted = row_note(**filters)
    for promoted in (READER, STRANGER):
        assert outcome_by_row(noted, RowEvidence(promoted, True, "")) is Outcome.COMMITTED
        assert outcome_by_row(noted, RowEvidence(promoted, False, "")) is Outcome.UNKNOWN
    for same in (OLD, RESTARTED):
        assert outcome_by_row(noted, RowEvidence(same, False, "")) is Outcome.NOT_COMMITTED


def test_filters_of_another_reader_do_not_matter():
    """Only the servers that had the row, or that are asked, can have left it out."""
    noted = row_note()
    other = Instance("c:1", "c", 1, tracked=(TrackedServer(ServerStatus(STRANGER, Role.READER, 3), 1.0, 0.0),), unproven="a part")
    noted = noted._replace(topology=Topology((*noted.topology.instances, other)))
    assert outcome_by_row(noted, RowEvidence(READER, False, "")) is Outcome.NOT_COMMITTED


@pytest.mark.parametrize("committed", [False, True])
def test_the_rows_of_an_unfit_table_prove_nothing(committed):
    """The rows of an unlogged table are lost in a promotion, and a trigger may say that a COMMIT was done."""
    assert outcome_by_row(row_note(), RowEvidence(OLD, committed, "it has triggers")) is Outcome.UNKNOWN
