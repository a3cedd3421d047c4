"""The dispatcher's decisions, asked directly."""

from typing import Any

import pytest

from launcher.backends.base import Phase
from launcher.policy import MOST_KILLED
from launcher.states import FINAL, JobState
from services.dispatcher.policy import (
    SILENT_SECONDS,
    Action,
    HardStop,
    Holding,
    Intent,
    Nothing,
    Queue,
    Released,
    Seen,
    Settle,
    Submit,
    Waiting,
    next_action,
    take_turns,
)

GRACE = 60.0
NOW = 10_000.0


def intent(desired: str = "run", **fields: Any) -> Intent:
    known: dict[str, Any] = {"desired_at": NOW, "resumed_epoch": -1, "submitted": False}
    return Intent(desired, **{**known, **fields})


def decide(wanted: Intent, seen: Seen) -> Action:
    return next_action(wanted, seen, NOW, GRACE)


@pytest.mark.parametrize("state", JobState)
def test_a_job_that_nobody_works_on(state: JobState) -> None:
    seen = Seen(state, epoch=1 if state is not JobState.SUBMITTED else 0)
    cut_off = state not in (*FINAL, JobState.PAUSED, JobState.FAILED)
    assert decide(intent(), seen) == (Queue() if cut_off else Nothing())
    again = Queue() if state not in FINAL else Nothing()
    assert decide(intent(resumed_epoch=seen.epoch), seen) == again
    assert decide(intent("cancel"), seen) == (Nothing() if state in FINAL else Settle(JobState.CANCELLED, None))
    paused = decide(intent("pause"), seen)
    working = state in (JobState.STARTING, JobState.RUNNING, JobState.PAUSING, JobState.CANCELLING)
    assert isinstance(paused, Settle) == working


def test_a_coordinator_at_work_is_left_alone_until_grace_or_silence_is_over() -> None:
    working = Seen(JobState.RUNNING, epoch=1, released=False, last_time=NOW, phase=Phase.RUNNING)
    assert decide(intent(submitted=True), working) == Nothing()
    assert decide(intent("pause", submitted=True, desired_at=NOW - GRACE + 1), working) == Nothing()
    assert isinstance(decide(intent("pause", submitted=True, desired_at=NOW - GRACE - 1), working), HardStop)
    silent = Seen(JobState.RUNNING, 1, False, last_time=NOW - SILENT_SECONDS - 1, phase=Phase.RUNNING)
    assert isinstance(decide(intent(submitted=True), silent), HardStop)
    # One that waits for its turn in a back-end's queue has not begun to speak.
    assert decide(intent(submitted=True, epoch_before=1), silent) == Nothing()


def test_a_coordinator_that_has_ended_by_itself_gives_its_devices_back() -> None:
    for state in (JobState.SUCCEEDED, JobState.FAILED, JobState.PAUSED, JobState.INTERRUPTED):
        assert decide(intent(submitted=True), Seen(state, 1, phase=Phase.ENDED)) == Released()


def test_a_coordinator_that_has_died_is_replaced_until_that_is_hopeless() -> None:
    dead = Seen(JobState.RUNNING, 1, released=False, milestones=3, phase=Phase.ENDED, exit_code=-9)
    assert decide(intent(submitted=True, milestones_before=3, fruitless=0), dead) == Submit(NOW, 1)
    assert decide(intent(submitted=True, milestones_before=3, fruitless=2), dead) == Submit(NOW + 2.0, 3)
    last = decide(intent(submitted=True, milestones_before=3, fruitless=MOST_KILLED), dead)
    assert isinstance(last, Settle)
    assert last.state is JobState.FAILED
    # It got somewhere: the count begins anew.
    assert decide(intent(submitted=True, milestones_before=2, fruitless=MOST_KILLED), dead) == Submit(NOW, 0)
    assert decide(intent("cancel", submitted=True), dead) == Settle(JobState.CANCELLED, None)
    paused = decide(intent("pause", submitted=True), dead)
    assert isinstance(paused, Settle)
    assert paused.state is JobState.INTERRUPTED


def test_one_that_died_before_it_began_is_not_taken_for_the_end_of_the_attempt_before() -> None:
    """The journal still says that the job rests, because nobody has claimed it since."""
    seen = Seen(JobState.PAUSED, epoch=1, released=True, phase=Phase.ENDED, exit_code=1)
    assert decide(intent(submitted=True, epoch_before=1), seen) == Submit(NOW, 1)
    assert decide(intent(submitted=True, epoch_before=0), seen) == Released()


def test_a_decision_that_was_not_carried_out_is_carried_out() -> None:
    assert decide(intent(submitted=True, not_before=NOW + 5, fruitless=2), Seen(JobState.RUNNING, 1)) == Submit(
        NOW + 5, 2
    )
    assert decide(intent("cancel", submitted=True), Seen(JobState.RUNNING, 1)) == Released()


def job(name: str, owner: str = "anna", priority: int = 0, devices: int = 1, **quota: Any) -> Waiting:
    return Waiting(name, f"owner {owner}", owner, priority, int(name[1:]), devices, **quota)


def test_priority_then_fairness_then_age() -> None:
    waiting = [job("j1"), job("j2"), job("j3", "berta"), job("j4", priority=5)]
    assert take_turns(waiting, [], 4).start == ["j4", "j3", "j1", "j2"]
    held = [Holding("owner berta", "berta", 1)]
    assert take_turns(waiting[:3], held, 4).start == ["j1", "j2", "j3"]


def test_nobody_passes_a_job_that_waits_for_devices() -> None:
    turns = take_turns([job("j1", devices=3), job("j2", "berta")], [Holding("owner carl", "carl", 2)], 4)
    assert turns.start == []
    assert turns.reasons == {"j1": "needs 3 of 4 devices, and 2 are free", "j2": "waits behind job j1"}


def test_a_quota_holds_its_own_account_back_only() -> None:
    held = [Holding("owner anna", "anna", 1)]
    turns = take_turns([job("j1", running_jobs=1), job("j2", "berta"), job("j3", "carl", hours_left=0.0)], held, 4)
    assert turns.start == ["j2"]
    assert turns.reasons == {
        "j1": "1 jobs of this account run already, and the quota is 1",
        "j3": "the device-hours of this month are used up",
    }
