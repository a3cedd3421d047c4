"""The table of job states."""

import pytest

from launcher.states import (
    FINAL,
    RESTING,
    TRANSITIONS,
    IllegalTransition,
    JobState,
    can_continue,
    check_transition,
)


def _reachable(start: JobState) -> set[JobState]:
    found, open_states = {start}, [start]
    while open_states:
        following = TRANSITIONS[open_states.pop()] - found
        found |= following
        open_states += following
    return found


def test_every_state_stands_in_the_table_and_is_reachable() -> None:
    assert set(TRANSITIONS) == set(JobState)
    assert _reachable(JobState.SUBMITTED) == set(JobState)


def test_every_state_can_still_end() -> None:
    for state in JobState:
        assert _reachable(state) & FINAL


def test_final_states() -> None:
    assert {JobState.SUCCEEDED, JobState.CANCELLED} == FINAL
    assert FINAL < RESTING
    assert {state for state in RESTING if can_continue(state)} == {
        JobState.PAUSED,
        JobState.INTERRUPTED,
        JobState.FAILED,
    }


def test_a_job_whose_coordinator_was_lost_can_be_taken_up_in_any_working_state() -> None:
    working = set(JobState) - RESTING
    assert {state for state in working if can_continue(state)} == working


def test_illegal_changes_name_the_legal_ones() -> None:
    check_transition(JobState.RUNNING, JobState.PAUSING)
    with pytest.raises(IllegalTransition, match="paused cannot become running; possible: cancelled, starting"):
        check_transition(JobState.PAUSED, JobState.RUNNING)
    with pytest.raises(IllegalTransition, match="this state is final"):
        check_transition(JobState.SUCCEEDED, JobState.STARTING)
