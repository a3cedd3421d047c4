"""What the dispatcher does with submissions that wait elsewhere, or were withdrawn there."""

from dataclasses import replace

import pytest

from launcher.backends.base import Phase
from launcher.states import JobState
from services.dispatcher.policy import SILENT_SECONDS, HardStop, Intent, Nothing, Released, Seen, Settle, next_action

NOW = 1_000_000.0
WANTED = Intent(desired="run", desired_at=NOW, resumed_epoch=0, submitted=True)
WAITS = Seen(JobState.RUNNING, epoch=1, released=False, last_time=NOW - 10 * SILENT_SECONDS, phase=Phase.WAITING)


def test_a_job_may_wait_in_a_queue_for_longer_than_a_coordinator_may_be_silent() -> None:
    assert next_action(WANTED, WAITS, NOW, 60.0) == Nothing()
    runs = replace(WAITS, phase=Phase.RUNNING)
    assert isinstance(next_action(WANTED, runs, NOW, 60.0), HardStop)
    assert next_action(WANTED, replace(runs, last_time=NOW - 1.0), NOW, 60.0) == Nothing()  # it has just begun again


@pytest.mark.parametrize("wish", ["pause", "cancel"])
def test_what_waits_and_is_not_wanted_is_taken_out_at_once(wish: str) -> None:
    action = next_action(replace(WANTED, desired=wish), WAITS, NOW, 600.0)
    assert action == HardStop(f"it waits, and is asked to {wish}")


def test_what_was_withdrawn_is_not_submitted_again() -> None:
    withdrawn = Seen(JobState.INTERRUPTED, epoch=1, released=True, phase=Phase.ENDED, reason="scancel", final=True)
    action = next_action(WANTED, withdrawn, NOW, 60.0)
    assert action == Settle(JobState.FAILED, "scancel: continue it when that is put right")
    done = replace(withdrawn, state=JobState.SUCCEEDED)
    assert next_action(WANTED, done, NOW, 60.0) == Released()
