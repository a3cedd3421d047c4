"""The back-end of Slurm: one allocation for each job, a Ray node on each of its nodes. Torch-free.

The script is rendered from the job (:mod:`launcher.backends.slurm_script`). Slurm starts it again after a preemption, a
time limit or the loss of a node: the same submission then goes on with a new attempt.
"""

import contextlib
import os
import secrets
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from launcher.backends.base import BackendStatus, BackendUnavailable, Handle, Phase
from launcher.backends.common import tail, working_directory
from launcher.backends.slurm_options import SlurmOptions
from launcher.backends.slurm_queue import ENDED, JobQueue, Queue, QueuedJob
from launcher.backends.slurm_rest import RestQueue
from launcher.backends.slurm_script import SlurmJob, job_name, render
from launcher.environment import python_path, shared_cluster
from launcher.journal import Journal
from launcher.profiles import SlurmRest, home_of, profile_named
from launcher.spec import JobSpec

SCRIPT, TOKEN, STOP = "slurm.sh", "token", "stop"
GONE_SECONDS = 60.0
"""How long a job that was killed may take until Slurm calls it ended."""


class SlurmBackend:
    """Runs jobs through ``sbatch``. ``module`` is what drives them."""

    outlives = True

    def __init__(self, module: str = "launcher.coordinator", fresh_seconds: float = 5.0) -> None:
        self._module = module
        self._fresh_seconds = fresh_seconds
        self._queues: dict[str, JobQueue] = {}
        self._last: dict[int, BackendStatus] = {}
        self._killed: set[int] = set()

    def submit(self, journal: Journal) -> Handle:
        """Write the script down and submit it. Raises ``ValueError`` where Slurm refuses, ``BackendUnavailable``."""
        spec = journal.spec()
        folder, log = journal.cluster_dir, journal.log_path("coordinator")
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_token(folder / TOKEN)
        job = slurm_job(spec, journal, journal.job_id, Path(working_directory(journal)), self._module)
        assert job.log == log
        script = folder / SCRIPT
        script.write_text(render_job(spec, home_of(journal), job), encoding="utf-8")
        rest = _rest(journal)
        return _handle(self._queue(rest).submit(script), journal, rest)

    def find(self, journal: Journal) -> Handle | None:
        """The submission of this job that has not ended, by its name and its log. Raises ``BackendUnavailable``."""
        name, log = job_name(journal.job_id), str(journal.log_path("coordinator"))
        rest = _rest(journal)
        for job in self._queue(rest).jobs(fresh=True):
            if job.name == name and job.state not in ENDED and job.output in ("", log):
                return _handle(job.number, journal, rest)
        return None

    def status(self, handle: Handle) -> BackendStatus:
        """Where the submission stands; while Slurm does not answer, where it stood."""
        number = handle["slurm_job"]
        try:
            self._last[number] = _status(number, self._queue_of(handle).job(number))
        except BackendUnavailable as error:
            known = self._last.get(number) or BackendStatus(Phase.WAITING)
            return BackendStatus(known.phase, str(error), known.exit_code, time.time())
        status = self._last[number]
        if status.phase is Phase.ENDED:
            del self._last[number]
        return replace(status, final=status.final and number not in self._killed)

    def stop(self, handle: Handle, grace_seconds: float) -> None:
        """Have the script ask for checkpoints; after the grace period Slurm ends what is left."""
        number, queue = handle["slurm_job"], self._queue_of(handle)
        deadline = time.monotonic() + grace_seconds
        job = queue.job(number, fresh=True)
        if grace_seconds > 0 and job is not None and _runs(job):
            queue.ask_to_end(job, Path(handle.get("stop_file") or STOP))
            while time.monotonic() < deadline and _runs(queue.job(number, fresh=True)):
                time.sleep(0.5)
        if _open(queue.job(number, fresh=True)):
            self._killed.add(number)
            queue.kill(number)
        deadline = time.monotonic() + GONE_SECONDS
        while _open(queue.job(number, fresh=True)) and time.monotonic() < deadline:
            time.sleep(0.2)

    def _queue(self, rest: SlurmRest | None) -> JobQueue:
        key = rest.model_dump_json() if rest else ""
        if key not in self._queues:
            self._queues[key] = RestQueue(rest, self._fresh_seconds) if rest else Queue(self._fresh_seconds)
        return self._queues[key]

    def _queue_of(self, handle: Handle) -> JobQueue:
        rest = handle.get("rest")
        return self._queue(SlurmRest.model_validate(rest) if rest else None)

    def logs(self, handle: Handle, journal: Journal, lines: int = 50) -> str:
        """The end of what the script, Ray's nodes and the coordinator wrote."""
        return tail(journal.log_path("coordinator"), lines)


def slurm_job(
    spec: JobSpec, journal: Journal, job_id: str, working_directory: Path, module: str = "launcher.coordinator"
) -> SlurmJob:
    """What the script of a job is rendered from, besides options and profile; writes nothing."""
    return SlurmJob(
        job_id=job_id,
        journal=journal.directory,
        working_directory=working_directory,
        log=journal.logs_dir / "coordinator.log",
        token_file=journal.cluster_dir / TOKEN,
        stop_file=journal.cluster_dir / STOP,
        python=sys.executable,
        python_path=python_path(),
        threads_per_rank=spec.execution.threads_per_rank,
        devices=spec.execution.devices,
        module=module,
        environment=shared_cluster(),
    )


def render_job(spec: JobSpec, home: Path, job: SlurmJob) -> str:
    """The script of a job. Raises ``ValueError`` for a profile that is not there."""
    options, profile = spec.execution.slurm or SlurmOptions(), profile_named(home, spec.execution.profile).slurm
    if profile.python or profile.container:  # what runs there was installed by the operator
        job = replace(job, python=profile.python or "python", python_path="")
    return render(job, options, profile)


def _rest(journal: Journal) -> SlurmRest | None:
    return profile_named(home_of(journal), journal.spec().execution.profile).slurm.rest


def _handle(number: int, journal: Journal, rest: SlurmRest | None) -> Handle:
    return {
        "slurm_job": number,
        "job": journal.job_id,
        "stop_file": str(journal.cluster_dir / STOP),
        "rest": rest.model_dump(mode="json") if rest else None,
    }


def write_token(path: Path) -> None:
    """A secret that only this job's Ray cluster knows, readable by its owner alone; one that is there stays.

    It appears whole: half of one, as a full disk leaves it, would be kept for ever.
    """
    descriptor, draft = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # readable by its owner alone
    try:
        with open(descriptor, "w", encoding="ascii") as file:
            file.write(secrets.token_hex(32))
        with contextlib.suppress(FileExistsError):
            os.link(draft, path)
    finally:
        os.unlink(draft)


def _status(number: int, job: QueuedJob | None) -> BackendStatus:
    if job is None:
        return BackendStatus(Phase.ENDED, f"Slurm does not know job {number} any more")
    return job.status()


def _open(job: QueuedJob | None) -> bool:
    return job is not None and job.state not in ENDED


def _runs(job: QueuedJob | None) -> bool:
    return job is not None and job.status().phase is Phase.RUNNING
