"""How far a unit was when it failed, and whether its statement is to blame: both are functions of what is known of the unit."""

import pytest

from aurora_router.core.failures import MAX_LOSSES, Blame, Phase, Progress, blame, phase_of
from aurora_router.core.sql.lexer import without_notes

AUTOMATIC, READ_ONLY, READ_WRITE = None, True, False


@pytest.mark.parametrize(
    ("read_only", "on_writer", "only_reads", "more", "phase"),
    [
        # A read of an automatic unit on a reader loses nothing, whatever was read before.
        (AUTOMATIC, False, True, {"has_results": True, "has_snapshot": True}, Phase.READ),
        (AUTOMATIC, True, True, {}, Phase.READ),
        (AUTOMATIC, True, True, {"has_results": True, "has_snapshot": True}, Phase.WRITER_STATEMENT),
        (AUTOMATIC, False, False, {}, Phase.READER_TRANSACTION),
        # A read-only unit loses its snapshot.
        (READ_ONLY, False, True, {"has_results": True}, Phase.READ),
        (READ_ONLY, False, True, {"has_snapshot": True}, Phase.READ),
        (READ_ONLY, False, True, {"has_results": True, "has_snapshot": True}, Phase.READER_TRANSACTION),
        # What looks like a read may write in a unit that was declared to write.
        (READ_WRITE, True, True, {}, Phase.READ),
        (READ_WRITE, True, True, {"has_results": True}, Phase.WRITER_STATEMENT),
        (READ_WRITE, True, True, {"is_autocommit": True}, Phase.COMMIT),
        (READ_WRITE, True, False, {}, Phase.WRITER_FIRST),
        (READ_WRITE, True, False, {"is_exposed": True}, Phase.WRITER_STATEMENT),
        (READ_WRITE, True, False, {"has_results": True}, Phase.WRITER_STATEMENT),
        (READ_WRITE, True, False, {"is_commit_in_doubt": True}, Phase.COMMIT),
    ],
)
def test_a_phase_is_what_a_failure_costs_the_unit(read_only, on_writer, only_reads, more, phase):
    """The phase says what is lost with the connection."""
    assert phase_of(Progress(read_only, on_writer, only_reads, **more)) is phase


@pytest.mark.parametrize(
    ("times", "is_killed", "is_first", "found"),
    [
        (1, False, True, Blame.NOBODY),
        (1, True, True, Blame.IF_ALIVE),
        (1, True, False, Blame.IF_ALIVE),
        (1, False, False, Blame.NOBODY),
        (2, False, False, Blame.IF_SURVIVED),
        (2, True, False, Blame.IF_SURVIVED),
        (MAX_LOSSES, False, False, Blame.STATEMENT),
    ],
)
def test_a_statement_is_to_blame_after_some_losses(times, is_killed, is_first, found):
    """A statement that was killed is obeyed at once. Another one is to blame after two losses that its servers survived."""
    assert blame(times, is_killed=is_killed, is_first=is_first) is found


@pytest.mark.parametrize(
    ("sql", "plain"),
    [
        ("SELECT 1 /* a */", "SELECT 1"),
        ("/* a */ SELECT 1 -- b", "SELECT 1"),
        ("-- a\nSELECT /*+ b */ 1", "SELECT  1"),
        ("SELECT '/* a */', \"-- b\", `/* c */`", "SELECT '/* a */', \"-- b\", `/* c */`"),
        ("SELECT 5--3", "SELECT 5--3"),
        ("SELECT /*!80000 1 */, /*M! 2 */", "SELECT /*!80000 1 */, /*M! 2 */"),
        ("SELECT /* never closed", "SELECT /* never closed"),
    ],
)
def test_a_text_without_notes_has_all_that_servers_execute(sql, plain):
    """Only comments are left out. What MySQL and MariaDB execute within a comment is part of the statement."""
    assert without_notes(sql) == plain
