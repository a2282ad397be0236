"""What a unit does when it fails to connect, or when a read of it fails."""

from __future__ import annotations

import pytest

from aurora_router.core.failures import Failure, Phase
from aurora_router.core.read_retry import MAX_RETRIES, ReadStep, after_connecting, after_statement


@pytest.mark.parametrize(("on_writer", "step"), [(True, ReadStep.WAIT), (False, ReadStep.ELSEWHERE)])
def test_a_writer_is_waited_for_and_a_reader_is_passed_over(on_writer: bool, step: ReadStep) -> None:
    phase = Phase.WRITER_CONNECTING if on_writer else Phase.READER_CONNECTING
    assert after_connecting(Failure.CONNECT, phase, on_writer=on_writer) is step


def test_what_waiting_cannot_heal_is_raised_at_once() -> None:
    assert after_connecting(Failure.OTHER, Phase.WRITER_CONNECTING, on_writer=True) is ReadStep.RAISE


@pytest.mark.parametrize(
    ("read_only", "on_writer", "step"),
    [(None, False, ReadStep.TO_WRITER), (None, True, ReadStep.RAISE), (True, False, ReadStep.RAISE)],
)
def test_only_an_automatic_unit_moves_to_the_writer(read_only: bool | None, on_writer: bool, step: ReadStep) -> None:
    """What a reader cannot do, the writer may, unless the unit is there or was declared read-only."""
    assert after_statement(Failure.NOT_HERE, Phase.READ, read_only=read_only, on_writer=on_writer, retries=0) is step


@pytest.mark.parametrize(("on_writer", "step"), [(False, ReadStep.ELSEWHERE), (True, ReadStep.AGAIN)])
def test_a_lost_read_does_not_come_back_to_its_reader(on_writer: bool, step: ReadStep) -> None:
    """There is only one writer, so a read that was lost there may run there again."""
    assert after_statement(Failure.LOST, Phase.READ, read_only=None, on_writer=on_writer, retries=0) is step


def test_an_outdated_read_may_run_on_the_same_instance() -> None:
    """The instance is not at fault: another connection there has prepared nothing."""
    assert after_statement(Failure.OUTDATED, Phase.READ, read_only=True, on_writer=False, retries=0) is ReadStep.AGAIN


def test_a_read_is_retried_ten_times() -> None:
    last = MAX_RETRIES - 1
    assert after_statement(Failure.LOST, Phase.READ, read_only=None, on_writer=False, retries=last) is ReadStep.ELSEWHERE
    assert after_statement(Failure.LOST, Phase.READ, read_only=None, on_writer=False, retries=last + 1) is ReadStep.RAISE


def test_an_error_of_the_statement_itself_is_raised() -> None:
    assert after_statement(Failure.OTHER, Phase.READ, read_only=None, on_writer=False, retries=0) is ReadStep.RAISE
