"""The states of a job and the one table of legal transitions between them. Torch-free.

The job store, the API, the command line and the coordinator all use this table. The state of a job is what its journal
says; a coordinator that was killed leaves the state as it was, and the next attempt starts from there.
"""

from enum import StrEnum


class JobState(StrEnum):
    """What a job is doing, in one word."""

    SUBMITTED = "submitted"
    """Written down; no attempt has started."""
    STARTING = "starting"
    """An attempt has claimed the job and is waiting for its cluster."""
    RUNNING = "running"
    """Stages are being worked on."""
    PAUSING = "pausing"
    """Somebody asked for a pause; gangs write their checkpoints."""
    PAUSED = "paused"
    """Stopped on request, with checkpoints; can be continued."""
    CANCELLING = "cancelling"
    """Somebody asked for the end; gangs write their checkpoints."""
    CANCELLED = "cancelled"
    """Ended on request for good."""
    INTERRUPTED = "interrupted"
    """A signal ended the coordinator after it had written checkpoints; can be continued."""
    SUCCEEDED = "succeeded"
    """Every stage is done."""
    FAILED = "failed"
    """Ended by an error that is written in the journal; can be continued once its cause is gone."""


TRANSITIONS: dict[JobState, frozenset[JobState]] = {
    JobState.SUBMITTED: frozenset({JobState.STARTING, JobState.CANCELLED, JobState.FAILED}),
    JobState.STARTING: frozenset(
        {
            JobState.STARTING,  # the attempt died and another one starts
            JobState.RUNNING,
            JobState.PAUSING,
            JobState.CANCELLING,
            JobState.INTERRUPTED,
            JobState.FAILED,
        }
    ),
    JobState.RUNNING: frozenset(
        {
            JobState.STARTING,
            JobState.PAUSING,
            JobState.CANCELLING,
            JobState.INTERRUPTED,
            JobState.SUCCEEDED,
            JobState.FAILED,
        }
    ),
    # The last stage may be done just when somebody asks for a stop.
    JobState.PAUSING: frozenset(
        {
            JobState.STARTING,
            JobState.PAUSED,
            JobState.CANCELLING,
            JobState.INTERRUPTED,
            JobState.SUCCEEDED,
            JobState.FAILED,
        }
    ),
    JobState.CANCELLING: frozenset(
        {JobState.STARTING, JobState.CANCELLED, JobState.INTERRUPTED, JobState.SUCCEEDED, JobState.FAILED}
    ),
    JobState.PAUSED: frozenset({JobState.STARTING, JobState.CANCELLED}),
    JobState.INTERRUPTED: frozenset({JobState.STARTING, JobState.CANCELLED}),
    JobState.FAILED: frozenset({JobState.STARTING, JobState.CANCELLED}),
    JobState.CANCELLED: frozenset(),
    JobState.SUCCEEDED: frozenset(),
}

FINAL: frozenset[JobState] = frozenset(state for state, following in TRANSITIONS.items() if not following)
"""States that nothing leaves."""

RESTING: frozenset[JobState] = FINAL | {JobState.PAUSED, JobState.INTERRUPTED, JobState.FAILED}
"""States in which no coordinator works on the job; those outside :data:`FINAL` can be continued."""


class IllegalTransition(ValueError):
    """A change of state that the table does not allow."""


def check_transition(before: JobState, after: JobState) -> None:
    """Raise :class:`IllegalTransition` unless the table allows ``before`` → ``after``."""
    if after not in TRANSITIONS[before]:
        allowed = ", ".join(sorted(TRANSITIONS[before])) or "none: this state is final"
        raise IllegalTransition(f"a job that is {before} cannot become {after}; possible: {allowed}")


def can_continue(state: JobState) -> bool:
    """Whether a new attempt may be started on a job that rests in ``state``, or that lost its coordinator in it."""
    return JobState.STARTING in TRANSITIONS[state]
