"""What a server of PostgreSQL says of itself when it is probed."""

import pytest

from aurora_router.core.instance import Role, ServerId
from aurora_router.core.positions import WalPosition
from aurora_router.servers.postgresql import (
    UnsupportedServer,
    parse_functions,
    parse_identity,
    parse_probe,
)
from tests.unit.postgresql_rows import ID, IDENTITY, reader_row, writer_row
from tests.unit.tables import table


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


@table("postgresql_probes")
def test_a_row_says_role_position_and_lag(what, server, row, asynchronous_commits, position, lag):
    """Each row of the table says what a server of PostgreSQL has, and how late it is."""
    of, isolation, role = {
        "writer": (writer_row, "read committed", Role.WRITER),
        "reader": (reader_row, "repeatable read", Role.READER),
    }[server]
    found = parse_probe(of(**row), asynchronous_commits=asynchronous_commits)
    known = WalPosition.parse(position) if position is not None else None
    assert (found.id, found.role, found.position, found.lag, found.isolation) == (ID, role, known, lag, isolation), what
    assert known is None or found.epoch == known.epoch


def test_a_function_is_a_read_if_it_is_one_in_every_schema():
    """A function counts as a read by its bare name if it is one in every schema."""
    rows = [("public", "f", True), ("shop", "f", True), ("public", "g", True), ("shop", "g", False), ("shop", "h", False)]
    assert parse_functions(rows) == {"f", "public.f", "shop.f", "public.g"}
    assert parse_functions([]) == frozenset()
