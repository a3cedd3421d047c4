"""Jobs under one home directory: make, find, list, run, stop, tidy up. Torch-free."""

import secrets
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

from launcher.actors.versions import note_dispatch
from launcher.backends.base import Backend, BackendStatus, BackendUnavailable, Handle, Phase, make_backend
from launcher.journal import Journal
from launcher.policy import CoordinatorEnd, GiveUp, after_coordinator_end
from launcher.processes import end_processes
from launcher.profiles import JOBS
from launcher.spec import JobSpec
from launcher.states import FINAL, RESTING, JobState, can_continue
from launcher.tracking.process import FeederProcess
from parallelism import places
from parallelism.objects import PATIENCE_SECONDS, ObjectTree

POLL_SECONDS = 0.3
UNAVAILABLE_SECONDS = 5.0
NO_TRACKING = "none"
LOCAL = "local"


class JobError(ValueError):
    """A job that is not there, or cannot do what it is asked."""


@dataclass(frozen=True)
class Home:
    """The directory under which all jobs and the MLflow store live; two homes never touch each other.

    ``journals``: an fsspec URL, such as ``s3://bucket/jobs``, under which the jobs lie instead. Their directories below
    the home are then copies of what is needed on this machine. A store that does not answer is waited for as long as
    ``patience_seconds``.
    """

    path: Path
    journals: str | None = None
    patience_seconds: float = PATIENCE_SECONDS

    def __post_init__(self) -> None:
        if self.journals is not None and not places.is_mirrored(self.jobs_dir):
            places.mirror(self.jobs_dir, ObjectTree(self.journals, self.patience_seconds))

    def check(self) -> None:
        """Raise ``ValueError`` for an object store that cannot hold journals."""
        found = places.store_of(self.jobs_dir)
        if found is not None:
            found[0].check()

    @property
    def root(self) -> Path:
        """The directory, absolute."""
        return self.path.expanduser().absolute()

    @property
    def jobs_dir(self) -> Path:
        """One folder per job."""
        return self.root / JOBS

    def journal(self, job_id: str) -> Journal:
        """The journal of a job, whether it exists or not."""
        return Journal(self.jobs_dir / job_id)


def create_job(spec: JobSpec, home: Home, job_id: str | None = None) -> Journal:
    """Write a new job down under a new id such as ``quickstart-3fa9c1``."""
    name = job_id or f"{spec.name}-{secrets.token_hex(3)}"
    return home.journal(name).create(spec, name)


def list_jobs(home: Home) -> list[Journal]:
    """All jobs, oldest first."""
    found = [Journal(path) for path in places.folders(home.jobs_dir)]
    return sorted((job for job in found if job.exists), key=lambda job: float(job.facts()["created"]))


def find_job(home: Home, name: str) -> Journal:
    """The job whose id is or begins with ``name``, or the newest for ``last``. Raises :class:`JobError`."""
    jobs = list_jobs(home)
    if name == "last" and jobs:
        return jobs[-1]
    exact = [job for job in jobs if job.job_id == name]
    matches = exact or [job for job in jobs if job.job_id.startswith(name)]
    if len(matches) == 1:
        return matches[0]
    known = ", ".join(job.job_id for job in (matches or jobs)[-5:]) or "none"
    problem = "is not unique" if matches else "is unknown"
    raise JobError(f"job {name!r} {problem} under {home.path}: name one of {known}")


def say_on_stderr(reason: str) -> None:
    """One line for whoever waits with the job."""
    print(f"waiting: {reason}", file=sys.stderr, flush=True)


def run_job(
    home: Home,
    job_id: str,
    backend: Backend | None = None,
    *,
    tracking: str | None = NO_TRACKING,
    poll: Callable[[], None] | None = None,
    tell: Callable[[str], None] = say_on_stderr,
) -> JobState:
    """Have the job worked on until it rests, and return the state it rests in; a coordinator that dies is replaced.

    ``tracking`` is an MLflow server or store, None for the home's own, or :data:`NO_TRACKING`. ``poll`` is called a few
    times a second, ``tell`` with the reason while the back-end has the job wait.

    Raises :class:`JobError` for a job that somebody works on already, or that is final.
    """
    journal = find_job(home, job_id)
    _refuse_unless_free(journal)
    journal.set_desired("run")
    feeder = None if tracking == NO_TRACKING else FeederProcess(journal, home.root, tracking)
    try:
        return Supervisor(journal, backend or make_backend(journal.spec().execution.backend), tell).run(poll)
    finally:
        if feeder:
            feeder.close()


def _refuse_unless_free(journal: Journal) -> None:
    holder, state = journal.holder(), journal.state()
    if holder:
        raise JobError(
            f"job {journal.job_id} is being worked on by process {holder['pid']} on {holder['node']}: "
            "wait for it, or ask it to pause"
        )
    if not can_continue(state) and state is not JobState.SUBMITTED:
        raise JobError(f"job {journal.job_id} is {state}: there is nothing to continue; submit it anew")


class Supervisor:
    """Keeps one job going on a back-end."""

    def __init__(self, journal: Journal, backend: Backend, tell: Callable[[str], None] = lambda _: None) -> None:
        """``tell`` is given the back-end's reason while it waits, whenever that changes."""
        self._journal = journal
        self._backend = backend
        self._tell = tell
        self._fruitless = 0

    def run(self, poll: Callable[[], None] | None = None) -> JobState:
        """Until the job rests."""
        while True:
            before = self._journal.view()
            epoch, milestones = before.epoch, before.milestones
            handle = self._submit()
            status = self._wait(handle, poll)
            view = self._journal.view()
            end_processes(view)
            end = CoordinatorEnd(status.exit_code, view.epoch > epoch and view.released, view.milestones > milestones)
            if status.final and view.state not in FINAL and self._journal.desired() == "run":
                return rest_job(self._journal, JobState.FAILED, f"{status.reason}: continue it when that is put right")
            if end.released:
                return view.state
            if self._journal.desired() != "run":
                return self._settle(status.reason)
            decision = after_coordinator_end(end, self._fruitless)
            assert decision is not None
            if isinstance(decision, GiveUp):
                last_words = self._backend.logs(handle, self._journal, lines=5)
                return rest_job(self._journal, JobState.FAILED, f"{decision.reason}\n{last_words}".strip())
            self._fruitless = decision.consecutive
            time.sleep(decision.after_seconds)

    def _submit(self) -> Handle:
        """A back-end that does not answer is asked again, as long as the job is wanted."""
        while True:
            try:
                earlier = self._backend.find(self._journal) if self._backend.outlives else None
                if earlier is None:
                    note_dispatch(self._journal)
                return earlier or self._backend.submit(self._journal)
            except BackendUnavailable as error:
                if self._journal.desired() != "run":
                    raise
                self._tell(str(error))
                time.sleep(UNAVAILABLE_SECONDS)

    def _wait(self, handle: Handle, poll: Callable[[], None] | None) -> BackendStatus:
        told = ""
        while (status := self._backend.status(handle)).phase is not Phase.ENDED:
            if status.phase is Phase.WAITING and status.reason != told:
                told = status.reason
                self._tell(told)
            if status.phase is Phase.WAITING and self._journal.desired() != "run":
                self._backend.stop(handle, 0.0)  # nothing of it runs that could write checkpoints
            if poll:
                poll()
            time.sleep(POLL_SECONDS)
        return status

    def _settle(self, reason: str) -> JobState:
        """The coordinator was ended by force after somebody had asked it to stop."""
        if self._journal.desired() == "cancel":
            return rest_job(self._journal, JobState.CANCELLED, None)
        return rest_job(self._journal, JobState.INTERRUPTED, f"stopped before the last checkpoint: {reason}")


def rest_job(journal: Journal, state: JobState, error: str | None) -> JobState:
    """Fence out whatever may be left of the last attempt, and say how the job rests."""
    journal.claim_epoch("supervisor")
    if state is JobState.CANCELLED and journal.state() in (RESTING | {JobState.SUBMITTED}):
        journal.set_state(state)  # nothing was under way
        return state
    journal.set_state(JobState.STARTING)
    if state is JobState.CANCELLED:
        journal.set_state(JobState.CANCELLING)
    journal.append("job_finished", {"state": state.value, "error": error})
    journal.set_state(state, **({"error": error} if error else {}))
    return state


def stop_job(home: Home, job_id: str, *, cancel: bool = False) -> None:
    """End the job's processes at once, without a checkpoint; the last checkpoints stay."""
    journal = find_job(home, job_id)
    journal.set_desired("cancel" if cancel else "pause")
    name = journal.spec().execution.backend
    if name != LOCAL:  # processes of this machine are known by the journal
        backend = make_backend(name)
        handle = backend.find(journal)
        if handle:
            backend.stop(handle, 0.0)
    end_processes(journal.view(), include_coordinator=True)


@dataclass(frozen=True)
class Garbage:
    """What :func:`collect_garbage` removed, or would remove."""

    job_id: str
    what: str
    path: Path
    bytes: int


def collect_garbage(home: Home, *, older_than_days: float = 30.0, dry_run: bool = False) -> list[Garbage]:
    """Free the space of jobs that nobody works on.

    From final jobs: compressed layers (the variants' files hold the same) and checkpoint roots that were superseded;
    whole jobs that were cancelled or have failed longer than ``older_than_days`` ago.
    """
    found: list[Garbage] = []
    for journal in list_jobs(home):
        if journal.holder() is None:
            found += _garbage_of(journal, older_than_days)
    if not dry_run:
        for item in found:
            places.discard(item.path)
    return found


def _garbage_of(journal: Journal, older_than_days: float) -> list[Garbage]:
    view, job = journal.view(), journal.job_id
    age_days = (time.time() - view.last_time) / 86400.0
    if view.state in (JobState.CANCELLED, JobState.FAILED) and age_days > older_than_days:
        return [Garbage(job, "job", journal.directory, _size(journal.directory))]
    folders: list[tuple[str, Path]] = []
    for candidate in journal.spec().candidates:
        gang = view.candidate(candidate.name).gang
        roots = journal.checkpoints_dir(candidate.name)
        if gang:
            folders += [
                ("superseded checkpoints", root) for root in places.folders(roots) if root.name != Path(gang.root).name
            ]
        if view.state in FINAL and places.exists(journal.layers_dir(candidate.name)):
            folders.append(("compressed layers", journal.layers_dir(candidate.name)))
    return [Garbage(job, what, path, _size(path)) for what, path in folders]


def _size(folder: Path) -> int:
    return sum(places.sizes(folder).values())


def free_disk_bytes(home: Home) -> int:
    """Free space where the jobs lie."""
    folder = home.jobs_dir
    while not folder.exists():
        folder = folder.parent
    return int(psutil.disk_usage(str(folder)).free)
