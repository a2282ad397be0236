"""5,000 seeds hold all invariants. For each invariant, planted bugs show that a violation would be found.

For one seed with its whole trace: `python -m tests.simulation SEED`, or AURORA_ROUTER_SEED=SEED pytest tests/simulation.
"""

import os
from dataclasses import replace

import pytest

from aurora_router.core import commit_outcome, election, failures, probing, read_retry, selection, topology, watching
from aurora_router.core.election import hold_down_seconds
from aurora_router.core.failures import Action, Failure, Phase
from aurora_router.core.instance import Role
from aurora_router.core.positions import Sample
from aurora_router.errors import Outcome
from tests.simulation import flapping, process
from tests.simulation.faults import Faults
from tests.simulation.process import Process
from tests.simulation.sessions import Sessions
from tests.simulation.simulation import Simulation, Violation, run
from tests.simulation.transactions import Transactions

SEEDS = int(os.environ.get("AURORA_ROUTER_SEEDS", "5000"))
CHUNK = 100
WITHIN = 300  # seeds within which a planted bug must be found
ONE = os.environ.get("AURORA_ROUTER_SEED")
CHUNKS = [range(int(ONE), int(ONE) + 1)] if ONE else [range(first, first + CHUNK) for first in range(0, SEEDS, CHUNK)]

pytestmark = [pytest.mark.timeout(60), pytest.mark.no_cover]  # it takes the same branches again and again


def traced(seed):
    """Run a seed. The error of a violation has the end of the trace."""
    try:
        return run(seed)
    except Violation as violation:
        trace = []
        with pytest.raises(Violation):
            run(seed, trace.append)
        pytest.fail("\n".join([*trace[-60:], str(violation)]), pytrace=False)


@pytest.mark.parametrize("seeds", CHUNKS, ids=str)
def test_the_invariants_hold_whatever_happens_to_the_cluster(seeds):
    done = [traced(seed) for seed in seeds]
    # Without these checks, the invariants might hold only because nothing happens there.
    if len(seeds) == CHUNK:
        assert sum(run.transactions.repeated for run in done) > CHUNK
        assert sum(run.transactions.resolved for run in done) > CHUNK
        assert sum(run.sessions.repeated for run in done) > 5 * CHUNK
        assert sum(run.sessions.moved for run in done) > CHUNK / 10
        assert sum(run.flapping.held for run in done) > CHUNK / 5
        assert sum(run.flapping.taken_back for run in done) > CHUNK / 5
        assert sum(run.process.doubts for run in done) > CHUNK / 10
        assert sum(len(client.done) for run in done for client in run.transactions.clients) > 10 * CHUNK
        reads = sum(run.sessions.reads for run in done)
        assert reads > 50 * CHUNK
        assert sum(run.sessions.by_readers for run in done) > reads / 5


def test_invariants_hold_with_samples_of_less_than_a_second(monkeypatch):
    """The invariants hold when the samples reach back less than a second."""
    monkeypatch.setattr(topology, "SAMPLES", 3)
    for seed in range(CHUNK):
        traced(seed)


def test_invariants_hold_when_losses_are_forgotten_quickly(monkeypatch):
    """The invariants hold when losses are forgotten within seconds."""
    monkeypatch.setattr(topology, "FLAP_WINDOW", 1.5)
    monkeypatch.setattr(flapping, "CALM", 1.5)
    for seed in range(CHUNK):
        traced(seed)


def test_a_seed_replays_exactly():
    one, two = [], []
    run(3, one.append)
    run(3, two.append)
    assert one == two
    assert len(one) > 100


def found(invariant, seeds=WITHIN):
    """The first violation of an invariant."""
    for seed in range(seeds):
        try:
            run(seed)
        except Violation as violation:
            if violation.invariant == invariant:
                return str(violation)
    pytest.fail(f"no seed below {seeds} violates ({invariant})", pytrace=False)


def test_a_deposed_writer_that_wins_is_found(monkeypatch):
    settle = topology._settle

    def lenient(before, instances):
        after = settle(before, instances)
        if after.writer is not None:
            return after
        for instance in after.instances:
            used = frozenset(s.server.id for s in instance.tracked if s.server.role is Role.WRITER)
            if used:
                return replace(after, writer=instance._replace(role=Role.WRITER, servers=used))
        return after

    monkeypatch.setattr(topology, "_settle", lenient)
    assert "a write goes to" in found("a")


def test_a_dead_writer_that_is_never_given_up_is_found(monkeypatch):
    monkeypatch.setattr(topology, "_failed", lambda old, observation: old)
    assert "the newest observation is None" in found("a")


def credulous(answered):
    def answer(old, observation, server):
        gullible = old._replace(tracked=tuple(s._replace(asked_at=float("-inf"), missed_at=float("-inf")) for s in old.tracked))
        new = answered(gullible._replace(last_observed_at=float("-inf")), observation, server)
        others = tuple(s for s in old.tracked if s.server.id.address != server.id.address)
        return new._replace(tracked=(*others, new.tracked[-1]), last_observed_at=max(old.last_observed_at, new.last_observed_at))

    return answer


def test_an_observation_that_wins_though_it_is_late_is_found(monkeypatch):
    monkeypatch.setattr(topology, "_answered", credulous(topology._answered))
    assert "now counts as of" in found("c")


def test_an_epoch_that_follows_the_newest_answer_is_found(monkeypatch):
    observe = topology.observe

    def forgetful(before, observation):
        after = observe(before, observation)
        server = observation.server
        if after is before or server is None or server.role is not Role.WRITER:
            return after
        return topology._settle(replace(after, epoch=server.epoch), after.instances)

    monkeypatch.setattr(topology, "observe", forgetful)
    assert "the epoch" in found("c")


def test_positions_that_are_compared_across_epochs_are_found(monkeypatch):
    def careless(reader, requirement, found, pin_seconds, now):
        sample = selection.first_sample_after(found.samples, requirement.acknowledged_at)
        position = requirement.position or (sample and sample.position)
        return position is not None and reader.position is not None and reader.position.lsn >= position.lsn

    monkeypatch.setattr(selection, "satisfies_requirement", careless)
    assert "does not see" in found("b", 1000)


def test_evidence_that_was_asked_for_before_the_commit_is_found(monkeypatch):
    def newest(samples, after) -> Sample | None:
        return samples[-1] if samples else None

    monkeypatch.setattr(selection, "first_sample_after", newest)
    assert "does not see" in found("b")


def test_an_endpoint_as_far_as_its_best_server_is_found(monkeypatch):
    """The invariants find a reader endpoint that counts as far as its best server."""

    def best(positions):
        known = [position for position in positions if position is not None]
        return max(known, key=lambda position: (position.epoch, position.lsn), default=None)

    monkeypatch.setattr(election, "lowest_common", best)
    assert "does not see" in found("b")


def test_a_lag_without_its_margin_of_time_is_found(monkeypatch):
    monkeypatch.setattr(selection, "LAG_MARGIN", -5.0)
    assert "does not see" in found("b")


def test_an_old_lag_that_counts_in_a_new_epoch_is_found(monkeypatch):
    """The invariants find a lag behind the old writer that counts in the new epoch."""
    satisfies = selection.satisfies_requirement

    def hopeful(reader, requirement, found, pin_seconds, now):
        if reader.position is None and reader.lag is not None and requirement.epoch == found.epoch:
            return requirement.acknowledged_at < min(seen.asked_at for seen in reader.tracked) - reader.lag - selection.LAG_MARGIN
        return satisfies(reader, requirement, found, pin_seconds, now)

    monkeypatch.setattr(selection, "satisfies_requirement", hopeful)
    assert "does not see" in found("b")


def test_a_restarted_server_that_stays_a_stranger_is_found(monkeypatch):
    answered = topology._answered

    def loyal(old, observation, server):
        if any(s.server.id.address == server.id.address and s.server.id != server.id for s in old.tracked):
            return old
        return answered(old, observation, server)

    monkeypatch.setattr(topology, "_answered", loyal)
    monkeypatch.setattr(topology, "forget_server", lambda before, instance, server: before)
    assert "at 13.000 s" in found("d")


def test_servers_that_are_never_let_go_are_found(monkeypatch):
    monkeypatch.setattr(topology, "_failed", lambda old, observation: old)
    monkeypatch.setattr(topology, "forget_server", lambda before, instance, server: before)
    assert "at 13.000 s" in found("d")


def test_a_name_that_keeps_the_server_before_is_found(monkeypatch):
    """The invariants find fresh connections that forget no server to which the name led before."""
    rightly = watching.on_connected

    def loyal(watch, connection, server, asked_at, now):
        change = rightly(watch, connection, server, asked_at, now)
        return change._replace(news=change.news[-1:])

    monkeypatch.setattr(watching, "on_connected", loyal)
    assert "readers that serve" in found("d")


def test_a_failed_probe_that_is_not_reported_is_found(monkeypatch):
    """The invariants find a watcher that tells nobody of servers that do not answer."""
    monkeypatch.setattr(watching, "_failures", lambda *_: ())
    assert "readers that serve" in found("d")


def test_a_pace_that_knows_no_hurry_is_found(monkeypatch):
    """The invariants find a schedule that probes no sooner because something is suspect."""
    monkeypatch.setattr(probing, "pace", lambda topology, instance, last_at, demand, timing, now: 4.0)
    assert "at 13.000 s" in found("d")


def test_a_list_of_servers_that_grows_with_each_answer_is_found(monkeypatch):
    answered = topology._answered

    def hoarding(old, observation, server):
        new = answered(old, observation, server)
        return new if new is old else new._replace(tracked=(*old.tracked, new.tracked[-1]))

    monkeypatch.setattr(topology, "_answered", hoarding)
    assert "servers" in found("e")


def test_samples_that_pile_up_are_found(monkeypatch):
    settle = topology._settle

    def hoarding(before, instances):
        after = settle(before, instances)
        return replace(after, samples=(*before.samples, *after.samples[-1:]))

    monkeypatch.setattr(topology, "_settle", hoarding)
    assert "samples" in found("e")


def test_a_commit_of_unknown_outcome_that_is_repeated_is_found(monkeypatch):
    rightly = failures.decide

    def blindly(failure, phase):
        action = rightly(failure, phase)
        return Action.RUN_AGAIN if action is Action.RESOLVE else action

    monkeypatch.setattr(failures, "decide", blindly)
    assert "for the second time" in found("f")


def test_an_outcome_that_is_guessed_is_found(monkeypatch):
    def hopeless(note, evidence):
        return Outcome.NOT_COMMITTED if evidence.epoch != note.position.epoch else rightly(note, evidence)

    rightly = commit_outcome.outcome
    monkeypatch.setattr(commit_outcome, "outcome", hopeless)
    assert "for the second time" in found("f")


def test_a_transaction_id_trusted_for_ever_is_found(monkeypatch):
    """The invariants find trust in a transaction id after it may have been used again."""

    def trusting(note, evidence):
        return commit_outcome._STATUS.get(evidence.status or "", Outcome.UNKNOWN)

    monkeypatch.setattr(commit_outcome, "outcome", trusting)
    assert "is said to be committed, and is not" in found("g", seeds=3000)


def test_a_unit_that_forgets_where_its_read_failed_is_found(monkeypatch):
    """The invariants find a unit that forgets where its read has failed."""
    monkeypatch.setattr(Sessions, "avoid", lambda self, read, instance: None)
    assert "again, where it has failed" in found("i")


def test_a_choice_that_ignores_where_a_read_failed_is_found(monkeypatch):
    """The invariants find a choice that overlooks where the unit has failed."""
    rightly = selection.choose
    monkeypatch.setattr(selection, "choose", lambda found, need, *rest: rightly(found, need._replace(avoid=frozenset()), *rest))
    assert "again, where it has failed" in found("i")


def test_a_retried_read_that_forgets_own_writes_is_found(monkeypatch):
    """The invariants find a retried read that forgets its session's writes."""
    rightly = Sessions.need

    def forgetful(self, read):
        need = rightly(self, read)
        return need._replace(requirement=None) if read.failed_on else need

    monkeypatch.setattr(Sessions, "need", forgetful)
    assert "repeated, session" in found("i")


def test_a_lost_read_raised_to_the_application_is_found(monkeypatch):
    """The invariants find a lost read that is raised to the application."""
    rightly = failures.decide

    def timidly(failure, phase):
        return Action.RAISE if (failure, phase) == (Failure.LOST, Phase.READ) else rightly(failure, phase)

    monkeypatch.setattr(read_retry, "decide", timidly)
    assert "ends with an error: the connection was lost" in found("i")


def test_a_read_that_hangs_on_a_lost_server_is_found(monkeypatch):
    """The invariants find a read that hangs on a connection whose server is gone."""
    monkeypatch.setattr(Simulation, "stuck", lambda self, instance, link: link.broken or not link.machine.reachable)
    assert "has not ended yet" in found("i")


def test_a_flapping_reader_used_again_at_once_is_found(monkeypatch):
    """The invariants find a reader that is used again at once, however often it was lost."""
    monkeypatch.setattr(election, "hold_down_seconds", lambda losses: 0.0)
    assert "chosen too soon" in found("h")


def test_a_wait_that_does_not_grow_is_found(monkeypatch):
    monkeypatch.setattr(election, "hold_down_seconds", lambda losses: 1.0 if losses > 1 else 0.0)
    assert "chosen too soon" in found("h")


def test_a_hold_time_that_counts_silence_is_found(monkeypatch):
    """The invariants find a hold time that counts the time without an answer."""
    answered = topology._answered

    def lenient(old, observation, server):
        new = answered(old, observation, server)
        return new._replace(recovered_at=new.lost_at) if new is not old and new.recovered_at > old.recovered_at else new

    monkeypatch.setattr(topology, "_answered", lenient)
    assert "chosen too soon" in found("h")


def test_an_answer_that_makes_all_losses_forgotten_is_found(monkeypatch):
    answered = topology._answered

    def forgiving(old, observation, server):
        new = answered(old, observation, server)
        return new if new is old else new._replace(flap_count=0)

    monkeypatch.setattr(topology, "_answered", forgiving)
    assert "chosen too soon" in found("h")


def test_a_wait_that_begins_anew_with_each_restart_is_found(monkeypatch):
    answered = topology._answered

    def strict(old, observation, server):
        new = answered(old, observation, server)
        return new if new is old or old.tracked else new._replace(recovered_at=observation.asked_at)

    monkeypatch.setattr(topology, "_answered", strict)
    assert "not taken back" in found("h")


def test_a_reader_that_waits_longer_than_it_should_is_found(monkeypatch):
    monkeypatch.setattr(election, "hold_down_seconds", lambda losses: 2.0 * hold_down_seconds(losses))
    assert "not taken back" in found("h")


def test_losses_that_are_never_forgotten_are_found(monkeypatch):
    monkeypatch.setattr(flapping, "CALM", 1.5)  # the topology still counts losses for minutes
    assert "not taken back" in found("h")


def test_trust_in_old_knowledge_after_a_standstill_is_found(monkeypatch):
    """The invariants find a process that trusts its old observations after it stood still."""
    monkeypatch.setattr(probing, "is_trusted", lambda trust, wall: True)
    assert "decided on what was heard long ago" in found("j")


def test_a_sleep_measured_on_the_sleeping_clock_is_found(monkeypatch):
    """The invariants find a process that looks for a sleep on the clock that slept as well."""
    monkeypatch.setattr(Process, "wall", Process.clock)
    assert "decided on what was heard long ago" in found("j")


@pytest.fixture
def drowsy(monkeypatch):
    """Faults that mostly let the process stand still."""
    for kind in ("lag", "move", "rejoin", "refollow", "partition"):
        monkeypatch.setattr(Faults, kind, Faults.stand_still)


@pytest.mark.usefixtures("drowsy")
def test_invariants_hold_for_a_process_that_mostly_sleeps():
    """The invariants hold for a process that stands still most of the time."""
    for seed in range(CHUNK):
        traced(seed)


@pytest.mark.usefixtures("drowsy")
def test_a_sleep_unnoticed_during_another_ones_check_is_found(monkeypatch):
    """The invariants find a sleep that goes unnoticed while the process still doubts because of another one."""
    rightly = probing.has_paused
    monkeypatch.setattr(probing, "has_paused", lambda trust, wall: trust.distrusted_at is None and rightly(trust, wall))
    assert "decided on what was heard long ago" in found("j", 1000)


@pytest.mark.usefixtures("drowsy")
def test_a_commit_question_to_the_writer_before_sleep_is_found(monkeypatch):
    """The invariants find a question about a COMMIT that goes to the writer of before the sleep."""
    monkeypatch.setattr(Transactions, "resolve", Transactions.ask)
    assert "decided on what was heard long ago" in found("j", 1000)


def test_one_instance_that_speaks_for_all_is_found(monkeypatch):
    """The invariants find a process that trusts all instances again after an answer of one."""
    monkeypatch.setattr(
        probing, "is_reobserved", lambda found, since: any(instance.last_observed_at >= since for instance in found)
    )
    assert "decided on what was heard long ago" in found("j")


@pytest.mark.usefixtures("drowsy")
def test_an_answer_that_counts_from_when_it_was_read_is_found(monkeypatch):
    answered = topology._answered

    def eager(old, observation, server):
        new = answered(old, observation, server)
        return new if new is old else new._replace(last_observed_at=max(new.last_observed_at, observation.answered_at))

    monkeypatch.setattr(topology, "_answered", eager)
    assert "decided on what was heard long ago" in found("j", 1000)


def test_a_doubt_that_does_not_end_is_found(monkeypatch):
    monkeypatch.setattr(probing, "is_reobserved", lambda found, since: False)
    monkeypatch.setattr(process, "TIMING", process.TIMING._replace(grace=60.0))
    assert "has not ended yet" in found("i")
