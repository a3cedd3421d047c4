"""Training of all candidates: side by side where the cluster has room, each restarted by itself. Torch-free."""

import time
from collections.abc import Callable, Sequence

from launcher.actors.gang import ACTIVE, OVER, CandidateRun, Phase
from launcher.context import POLL_SECONDS, JobContext
from launcher.control import Stopped
from launcher.journal import StaleEpochError
from launcher.policy import fits, side_by_side
from parallelism.stop import StopReason

GRACE_SECONDS = 600.0
"""Time for the last checkpoint when a job is stopped."""


def train_candidates(job: JobContext, runs: Sequence[CandidateRun], trained: Callable[[CandidateRun], None]) -> None:
    """Train until every run is over; ``trained`` is called for each that has spent its budget.

    Raises :class:`Stopped` when all groups have ended on somebody's request.
    """
    stopping: StopReason | None = None
    told: set[str] = set()
    try:
        while not all(run.phase in OVER for run in runs):
            stopping = _obey(job, runs, stopping)
            for run in runs:
                if run.ready and not stopping and _has_room(job, run, runs):
                    run.reserve()
                run.poll()
                if run.phase is Phase.DONE and run.name not in told:
                    told.add(run.name)
                    trained(run)
            job.beat([_heartbeat(run) for run in runs if run.phase in ACTIVE])
            time.sleep(POLL_SECONDS)
    except StaleEpochError:
        for run in runs:
            run.abandon()
        raise
    if stopping:
        raise Stopped(stopping)


def _obey(job: JobContext, runs: Sequence[CandidateRun], stopping: StopReason | None) -> StopReason | None:
    """Pass a request to stop on, once; a second signal means at once."""
    reason = job.stop_reason()
    if reason and (reason != stopping or job.control.impatient):
        for run in runs:
            run.stop(reason, 0.0 if job.control.impatient else GRACE_SECONDS)
    return reason


def _has_room(job: JobContext, run: CandidateRun, runs: Sequence[CandidateRun]) -> bool:
    """Earlier candidates come first; a small one may pass a large one that still waits for room."""
    in_use = sum(other.shape.world_size for other in runs if other.phase in ACTIVE)
    room = job.room
    bound = side_by_side(job.spec.training_budget)
    return fits(run.shape.world_size, in_use, room.devices, room.threads, room.cores, bound)


def _heartbeat(run: CandidateRun) -> dict[str, object]:
    return {"candidate": run.name, "phase": run.phase.name.lower(), **run.clock()}


def failures(runs: Sequence[CandidateRun]) -> dict[str, str]:
    """Candidate → error, of the runs that were given up."""
    return {run.name: run.failure or "" for run in runs if run.phase is Phase.FAILED}
