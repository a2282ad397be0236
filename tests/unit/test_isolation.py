"""What the isolation level of a unit asks of its instance, in a table of levels and defaults."""

import pytest

from aurora_router.core.isolation import as_servers_say, has_snapshot, is_beyond_readers, must_be_on_writer
from aurora_router.servers import mysql, postgresql

FAMILIES = {"postgresql": postgresql, "mysql": mysql}
SERIALIZABLE, REPEATABLE, COMMITTED, UNCOMMITTED = "serializable", "repeatable read", "read committed", "read uncommitted"


@pytest.mark.parametrize(
    ("level", "said"),
    [
        ("READ COMMITTED", "read committed"),
        ("REPEATABLE_READ", "repeatable read"),
        ("serializable", "serializable"),
        ("AUTOCOMMIT", "autocommit"),
    ],
)
def test_a_level_gets_the_name_that_servers_write(level, said):
    assert as_servers_say(level) == said


@pytest.mark.parametrize(
    ("family", "asked", "of_servers", "on_writer", "beyond_readers", "snapshots"),
    [
        # Nobody has asked. The family's own default does not move a unit, but any other of the servers' does.
        # snapshots: of an automatic unit, and of one that is declared to read or write
        ("postgresql", None, COMMITTED, False, False, (False, False)),
        ("postgresql", None, UNCOMMITTED, False, False, (False, False)),
        ("postgresql", None, REPEATABLE, True, False, (True, True)),
        ("postgresql", None, SERIALIZABLE, True, True, (True, True)),
        ("mysql", None, COMMITTED, False, False, (False, False)),
        ("mysql", None, UNCOMMITTED, False, False, (False, False)),
        ("mysql", None, REPEATABLE, False, False, (False, True)),
        ("mysql", None, SERIALIZABLE, True, False, (True, True)),
        # Somebody has asked, so the servers' default does not count.
        ("postgresql", "autocommit", SERIALIZABLE, False, False, (False, False)),
        ("postgresql", COMMITTED, SERIALIZABLE, False, False, (False, False)),
        ("postgresql", REPEATABLE, COMMITTED, True, False, (True, True)),
        ("postgresql", SERIALIZABLE, COMMITTED, True, True, (True, True)),
        ("mysql", "autocommit", REPEATABLE, False, False, (False, False)),
        ("mysql", UNCOMMITTED, SERIALIZABLE, False, False, (False, False)),
        ("mysql", REPEATABLE, COMMITTED, True, False, (True, True)),
        ("mysql", REPEATABLE, REPEATABLE, True, False, (True, True)),
        ("mysql", SERIALIZABLE, REPEATABLE, True, False, (True, True)),
        # A level that nobody here knows may give a snapshot.
        ("postgresql", "snapshot", COMMITTED, True, False, (True, True)),
        ("mysql", None, "snapshot", True, False, (True, True)),
    ],
)
def test_what_a_level_asks_of_an_instance(family, asked, of_servers, on_writer, beyond_readers, snapshots):
    """The table has the level that is asked for, the servers' default, and what both mean in each family."""
    usual, refused = FAMILIES[family].DEFAULT_ISOLATION, FAMILIES[family].BEYOND_READERS
    assert must_be_on_writer(asked, of_servers, usual) is on_writer
    assert is_beyond_readers(asked, of_servers, refused) is beyond_readers
    assert tuple(has_snapshot(asked, of_servers, usual, declared=declared) for declared in (False, True)) == snapshots
