"""What a router remembers of statements stays small, however long they are."""

from aurora_router import Router
from aurora_router.router import core_of
from aurora_router.routing.known_statements import READS, READS_LENGTH


def test_the_keys_of_long_reads_are_few():
    """The keys of statements that read are bounded by number, and by the texts that they stand for."""
    known = core_of(Router("postgresql+psycopg://app:x@127.0.0.1:1/shop")).interceptor.known
    for number in range(2 * READS):
        known.note_read(number, f"SELECT {number}")
        assert number in known.reads
        assert len(known.reads) <= READS
    texts = [f"SELECT {number}, '{'x' * (READS_LENGTH // 10)}'" for number in range(50)]
    for sent in texts:
        known.note_read(sent, sent)
        assert sent in known.reads
        assert sum(len(each) for each in known.reads if isinstance(each, str)) <= READS_LENGTH
    known.note_read("huge", f"SELECT '{'x' * READS_LENGTH}'")
    assert "huge" not in known.reads
    assert texts[-1] in known.reads
