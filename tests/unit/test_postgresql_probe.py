"""What a server of PostgreSQL says of itself when it is probed."""

import pytest

from aurora_router.core.instance import Role, ServerId, ServerStatus
from aurora_router.core.positions import WalPosition
from aurora_router.servers.postgresql import (
    UnsupportedServer,
    parse_functions,
    parse_identity,
    parse_probe,
)
from tests.unit.postgresql_rows import ID, IDENTITY, reader_row, writer_row


def test_an_identity_is_the_cluster_the_address_and_the_start():
    assert parse_identity((*IDENTITY, False)) == (ID, Role.WRITER)
    assert parse_identity((*IDENTITY, True)) == (ID, Role.READER)


def test_a_unix_socket_has_no_address_and_a_start_may_be_text():
    """A server on a Unix socket has no address, and its start may come as text."""
    row = (120000, "7001", None, None, "2026-03-04 05:06:07", True)
    assert parse_identity(row) == (ServerId("7001", None, None, "2026-03-04 05:06:07"), Role.READER)


def test_a_server_older_than_12_is_unsuitable():
    """A server older than version 12 is unsuitable, and the error says what is needed."""
    with pytest.raises(UnsupportedServer, match="runs PostgreSQL 11; version 12 or newer is needed"):
        parse_identity((110022, *IDENTITY[1:], False))
    with pytest.raises(UnsupportedServer):
        parse_probe((110022, *writer_row()[1:]), asynchronous_commits=False)


def test_a_writers_position_is_hexadecimal_on_its_timeline():
    """A writer's position is its write position on its timeline, both read as hexadecimal."""
    found = parse_probe(writer_row(), asynchronous_commits=False)
    assert found == ServerStatus(ID, Role.WRITER, 10, WalPosition(10, 0x5000), None, "read committed")


@pytest.mark.parametrize(("synchronous", "elsewhere"), [("off", False), ("on", True), ("off", True)])
def test_asynchronous_commits_count_the_insert_position(synchronous, elsewhere):
    """A writer's position is its insert position if commits are asynchronous anywhere."""
    found = parse_probe(writer_row(synchronous=synchronous), asynchronous_commits=elsewhere)
    assert found.position == WalPosition(10, 0x6000)


@pytest.mark.parametrize(
    ("inserted", "page", "segment", "lsn"),
    [
        ("0/4018", 8192, "16MB", 0x4000),
        ("0/2000028", 8192, "16MB", 0x2000000),
        ("1/40000028", 8192, "1GB", 0x140000000),
        ("0/2000028", 8192, "33554432", 0x2000000),
        ("0/1018", 4096, "1024kB", 0x1000),
    ],
)
def test_an_insert_position_after_a_header_is_moved_back(inserted, page, segment, lsn):
    """An insert position right after a header counts as the end of the last record."""
    row = writer_row(inserted=inserted, page=page, segment=segment)
    assert parse_probe(row, asynchronous_commits=True).position == WalPosition(10, lsn)


def test_a_caught_up_reader_has_no_lag_after_idle_time():
    """A reader that has replayed all it received has no lag, however old the last commit is."""
    found = parse_probe(reader_row(age=3600.0), asynchronous_commits=False)
    assert found == ServerStatus(ID, Role.READER, 1, WalPosition(1, 0x5000), 0.0, "repeatable read")


@pytest.mark.parametrize(
    ("row", "lag"),
    [
        (reader_row(replayed="0/4000", age=1.5), 1.5),
        (reader_row(streaming=False, age=1.5), 1.5),
        (reader_row(replayed="0/4000", age=-0.1), 0.0),
        (reader_row(replayed="0/4000", age=None), None),
        (reader_row(replayed=None, received=None, age=None), None),
    ],
)
def test_a_late_readers_lag_is_the_age_of_its_last_commit(row, lag):
    """The lag of a reader that is behind is the age of the last commit that it replayed."""
    assert parse_probe(row, asynchronous_commits=False).lag == lag


@pytest.mark.parametrize(("control", "tli", "epoch"), [(1, 2, 2), (2, 1, 2), (3, None, 3), (1, 1, 1)])
def test_a_reader_is_on_the_newest_timeline_that_it_knows_of(control, tli, epoch):
    found = parse_probe(reader_row(control=control, tli=tli), asynchronous_commits=False)
    assert found.epoch == epoch
    assert found.position == WalPosition(epoch, 0x5000)


def test_a_reader_that_has_replayed_nothing_has_no_position():
    assert parse_probe(reader_row(replayed=None), asynchronous_commits=False).position is None


def test_a_function_is_a_read_if_it_is_one_in_every_schema():
    """A function counts as a read by its bare name if it is one in every schema."""
    rows = [("public", "f", True), ("shop", "f", True), ("public", "g", True), ("shop", "g", False), ("shop", "h", False)]
    assert parse_functions(rows) == {"f", "public.f", "shop.f", "public.g"}
    assert parse_functions([]) == frozenset()
