"""Slurm's queue and commands, and what they say of a job in this project's words. Torch-free."""

import contextlib
import json
import os
import subprocess
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.backends.base import BackendStatus, BackendUnavailable, Phase

COMMAND_SECONDS = 60.0

WAITING = frozenset(
    {"PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "RESV_DEL_HOLD", "CONFIGURING", "SUSPENDED"}
)
ENDED = frozenset(
    {
        "COMPLETED",
        "CANCELLED",
        "FAILED",
        "TIMEOUT",
        "NODE_FAIL",
        "PREEMPTED",
        "OUT_OF_MEMORY",
        "BOOT_FAIL",
        "DEADLINE",
        "REVOKED",
    }
)
"""All other states count as running."""
FINAL = frozenset({"CANCELLED", "OUT_OF_MEMORY", "DEADLINE", "REVOKED"})
"""Ends that somebody wanted, or that the next try would meet again."""

EXPLANATIONS = {
    "BadConstraints": "no node has what execution.slurm asks for",
    "BeginTime": "queued again, and Slurm lets some time pass first",
    "DependencyNeverSatisfied": "it will never run",
    "InvalidAccount": "execution.slurm.account may not be used here",
    "InvalidQOS": "execution.slurm.qos may not be used here",
    "JobHeldAdmin": "an administrator holds it",
    "JobHeldUser": "held: scontrol release lets it go on",
    "PartitionNodeLimit": "execution.slurm.nodes is more than the partition allows",
    "PartitionTimeLimit": "execution.slurm.time is longer than the partition allows",
    "Priority": "other jobs come first",
    "Resources": "its nodes are not free yet",
}
"""What a reason of Slurm's means for the job's owner."""


class SlurmRefused(ValueError):
    """Slurm does not take the submission; the text is its own."""


@dataclass(frozen=True)
class QueuedJob:
    """One row of ``squeue``. ``started``: seconds since 1970, 0 before it has; ``output``: its log file."""

    number: int
    name: str
    state: str
    reason: str
    exit_status: int | None
    started: float
    restarts: int
    nodes: str
    output: str = ""

    def status(self) -> BackendStatus:
        """In this project's words."""
        if self.state in ENDED:
            code = _exit_code(self.exit_status) if self.state in ("COMPLETED", "FAILED") else None
            return BackendStatus(Phase.ENDED, self._ended(), code, final=self.state in FINAL)
        if self.state in WAITING:
            return BackendStatus(Phase.WAITING, f"Slurm job {self.number} is {self.state}{self._why()}")
        return BackendStatus(Phase.RUNNING, f"Slurm job {self.number} on {self.nodes}", since=self.started)

    def _why(self) -> str:
        if self.reason in ("", "None"):
            return ""
        known = EXPLANATIONS.get(self.reason)
        return f": {self.reason} ({known})" if known else f": {self.reason}"

    def _ended(self) -> str:
        code = _exit_code(self.exit_status)
        told = f" with exit code {code}" if self.state == "FAILED" and code is not None else ""
        return f"Slurm job {self.number} is {self.state}{told}"


def _exit_code(wait_status: int | None) -> int | None:
    """The exit code behind a wait status; minus the signal where one ended it."""
    return None if wait_status is None else os.waitstatus_to_exitcode(wait_status)


def read_queue(answer: str) -> list[QueuedJob]:
    """The jobs in the answer of ``squeue --json``, of any version since 22.05. Raises ``ValueError``."""
    return read_jobs(json.loads(answer)["jobs"])


def read_jobs(rows: Sequence[Mapping[str, Any]]) -> list[QueuedJob]:
    """The same of the rows themselves, which slurmrestd has in the same form."""
    return [_read_job(row) for row in rows]


def _read_job(row: Mapping[str, Any]) -> QueuedJob:
    state = row["job_state"]
    return QueuedJob(
        number=int(row["job_id"]),
        name=str(row["name"]),
        state=state if isinstance(state, str) else str(state[0]),
        reason=str(row.get("state_description") or row.get("state_reason") or ""),
        exit_status=_read_exit(row.get("exit_code")),
        started=float(_number(row.get("start_time"))),
        restarts=int(_number(row.get("restart_cnt"))),
        nodes=str(row.get("nodes") or ""),
        output=str(row.get("standard_output") or ""),
    )


def _number(value: Any) -> int:
    """Numbers were plain up to 23.02, and ``{set, infinite, number}`` since."""
    if isinstance(value, Mapping):
        return int(value.get("number", 0)) if value.get("set", True) else 0
    return int(value or 0)


def _read_exit(value: Any) -> int | None:
    """A raw wait status up to 23.02, a mapping since."""
    if not isinstance(value, Mapping):
        return None if value is None else int(value)
    signal = value.get("signal") or {}
    number = _number(signal.get("id") if "id" in signal else signal.get("signal_id"))
    return number if number else _number(value.get("return_code")) << 8


class JobQueue(ABC):
    """Slurm, through whatever reaches it. One look at the queue serves all jobs for ``fresh_seconds``. Thread-safe."""

    def __init__(self, fresh_seconds: float = 5.0) -> None:
        self._fresh_seconds = fresh_seconds
        self._lock = threading.Lock()
        self._seen: list[QueuedJob] = []
        self._seen_at = float("-inf")

    @abstractmethod
    def submit(self, script: Path) -> int:
        """The number of the new job. Raises :class:`SlurmRefused` and :class:`BackendUnavailable`."""

    @abstractmethod
    def ask_to_end(self, job: QueuedJob, stop_file: Path) -> None:
        """Have the script ask for checkpoints, and end. Raises ``BackendUnavailable``.

        ``stop_file``: the path whose continuation by the life's number does so, too.
        """

    @abstractmethod
    def kill(self, number: int) -> None:
        """End everything of a job at once. Raises ``BackendUnavailable``."""

    @abstractmethod
    def _look(self) -> list[QueuedJob]:
        """All jobs that Slurm still knows. Raises ``BackendUnavailable``."""

    def jobs(self, fresh: bool = False) -> list[QueuedJob]:
        """All jobs that Slurm still knows, those that have ended lately among them. Raises ``BackendUnavailable``."""
        with self._lock:
            if fresh or time.monotonic() > self._seen_at + self._fresh_seconds:
                self._seen = self._look()
                self._seen_at = time.monotonic()
            return self._seen

    def job(self, number: int, fresh: bool = False) -> QueuedJob | None:
        """One job, or None where Slurm does not know it any more. Raises ``BackendUnavailable``."""
        return next((job for job in self.jobs(fresh) if job.number == number), None)

    def forget(self) -> None:
        """Look anew the next time."""
        with self._lock:
            self._seen_at = float("-inf")


class Queue(JobQueue):
    """Slurm, through its commands."""

    def submit(self, script: Path) -> int:
        """The number of the new job. Raises :class:`SlurmRefused` and :class:`BackendUnavailable`."""
        # Variables SBATCH_… of whoever submits would take precedence over the script.
        environment = {name: value for name, value in os.environ.items() if not name.startswith("SBATCH_")}
        answer = _call(["sbatch", "--parsable", str(script)], environment)
        self.forget()
        return int(answer.strip().partition(";")[0])

    def _look(self) -> list[QueuedJob]:
        return read_queue(_call(["squeue", "--json", "--me", "--states=all"]))

    def ask_to_end(self, job: QueuedJob, stop_file: Path) -> None:
        """By a signal to the batch script alone. Raises ``BackendUnavailable``."""
        self._cancel(["--batch", "--signal=TERM", str(job.number)])

    def kill(self, number: int) -> None:
        """End everything of a job at once. Raises ``BackendUnavailable``."""
        self._cancel(["--full", "--signal=KILL", str(number)])
        self._cancel([str(number)])

    def _cancel(self, arguments: Sequence[str]) -> None:
        with contextlib.suppress(SlurmRefused):  # it has ended meanwhile
            _call(["scancel", "--quiet", *arguments])
        self.forget()


def _call(command: Sequence[str], environment: Mapping[str, str] | None = None) -> str:
    try:
        ended = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=COMMAND_SECONDS, check=False
        )
    except FileNotFoundError as error:
        raise SlurmRefused(f"{command[0]} is not on this machine: submit where Slurm's commands are") from error
    except subprocess.TimeoutExpired as error:
        raise BackendUnavailable(f"{command[0]} did not answer within {COMMAND_SECONDS:g} s") from error
    if ended.returncode == 0:
        return ended.stdout
    told = " ".join(ended.stderr.split())
    if any(sign in told for sign in UNAVAILABLE):
        raise BackendUnavailable(f"Slurm does not answer: {told}")
    raise SlurmRefused(f"Slurm refused: {told}")


UNAVAILABLE = (
    "Unable to contact slurm controller",
    "Socket timed out",
    "Connection refused",
    "Zero Bytes",
    "try again",
)
"""What Slurm's commands say when asking again may help."""
