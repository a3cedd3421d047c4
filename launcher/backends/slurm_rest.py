"""Slurm through slurmrestd, where the operator names it: no command of Slurm is needed where jobs are submitted.

What a job asks for stands in its script alone; the daemon does not read the script's directives, so that they are put
into its words here. Version 0.0.38 of its API, which Slurm 22.05 to 23.11 speak. It refuses signals to the script
alone, so that nobody warns the script before a time limit or a preemption: the job goes on from its last checkpoint
then. Torch-free.
"""

import contextlib
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import httpx2

from launcher.attend import ask_to_stop
from launcher.backends.base import BackendUnavailable
from launcher.backends.common import read_token
from launcher.backends.slurm_queue import JobQueue, QueuedJob, SlurmRefused, read_jobs
from launcher.profiles import SlurmRest

API = "slurm/v0.0.38"
ANSWER_SECONDS = 30.0
DIRECTIVE = re.compile(r"#SBATCH --(?P<name>[a-z-]+)(?:=(?P<value>.*))?")
MEGABYTES = {"M": 1, "G": 1024}


class RestQueue(JobQueue):
    """Slurm, through its REST daemon. One look at the queue serves all jobs for ``fresh_seconds``. Thread-safe."""

    def __init__(self, rest: SlurmRest, fresh_seconds: float = 5.0) -> None:
        super().__init__(fresh_seconds)
        self._rest = rest

    def submit(self, script: Path) -> int:
        """The number of the new job. Raises :class:`SlurmRefused` and :class:`BackendUnavailable`."""
        text = script.read_text(encoding="utf-8")
        answer = self._call("POST", "job/submit", {"script": text, "job": properties_of(text, os.environ)})
        self.forget()
        return int(answer["job_id"])

    def ask_to_end(self, job: QueuedJob, stop_file: Path) -> None:
        """The daemon cannot send a signal to the script alone: the file that its trap makes is made here."""
        ask_to_stop(stop_file.with_name(f"{stop_file.name}.{job.number}.{job.restarts}"))
        self.forget()

    def kill(self, number: int) -> None:
        """End everything of a job at once. Raises ``BackendUnavailable``."""
        for query in ("?signal=KILL", ""):
            with contextlib.suppress(SlurmRefused):  # it has ended meanwhile
                self._call("DELETE", f"job/{number}{query}")
        self.forget()

    def _look(self) -> list[QueuedJob]:
        try:
            rows = self._call("GET", "jobs")["jobs"]
        except SlurmRefused as error:  # of a token that has ended it says no more than that something failed
            hint = f"if the token in {self._rest.token_file} has ended, renew it there (scontrol token)"
            raise BackendUnavailable(f"{error}; {hint}") from error
        return read_jobs([row for row in rows if row.get("user_name") in (None, "", self._rest.user)])

    def _call(self, method: str, path: str, document: Mapping[str, Any] | None = None) -> Any:
        url = self._rest.url.rstrip("/")
        headers = {
            "X-SLURM-USER-NAME": self._rest.user,
            # Read each time: tokens of Slurm end, and are renewed in their file.
            "X-SLURM-USER-TOKEN": read_token(self._rest.token_file),
        }
        try:
            answer = httpx2.request(
                method, f"{url}/{API}/{path}", json=document, headers=headers, timeout=ANSWER_SECONDS, trust_env=False
            )
        except httpx2.TransportError as error:
            raise BackendUnavailable(f"slurmrestd at {url} does not answer: {error}") from error
        if answer.status_code in (httpx2.codes.UNAUTHORIZED, httpx2.codes.FORBIDDEN):
            raise SlurmRefused(
                f"slurmrestd at {url} refuses the token of {self._rest.user}: the operator renews it in"
                f" {self._rest.token_file} (scontrol token)"
            )
        return _content(answer, url)


def _content(answer: httpx2.Response, url: str) -> Any:
    try:
        found = answer.json()
    except ValueError:
        text = f"slurmrestd at {url} is in trouble: {answer.status_code} {answer.text[:200]}"
        raise BackendUnavailable(text) from None
    told = "; ".join(_error(error) for error in found.get("errors") or [])
    if not told and answer.is_success:
        return found
    if told and not any(sign in told for sign in UNAVAILABLE):
        raise SlurmRefused(f"Slurm refused: {told}")
    raise BackendUnavailable(f"Slurm does not answer: {told or answer.status_code}")


UNAVAILABLE = ("Unable to contact slurm controller", "Connection refused", "Socket timed out", "Zero Bytes")


def _error(row: Mapping[str, Any]) -> str:
    parts = (row.get("error"), row.get("description"))
    return ": ".join(str(part) for part in parts if part) or f"error {row.get('error_number', row.get('error_code'))}"


def properties_of(script: str, environment: Mapping[str, str]) -> dict[str, Any]:
    """What the directives of a script ask for, in the daemon's words.

    Raises :class:`SlurmRefused` for one that has none there, as an operator's profile may have it.
    """
    found: dict[str, Any] = {}
    for line in script.splitlines():
        match = DIRECTIVE.fullmatch(line)
        if match is None:
            if line.startswith("#SBATCH"):
                raise SlurmRefused(
                    f"slurmrestd takes no {line}: write it as --NAME=VALUE, or take it out of the profile"
                )
            continue
        name, value = match["name"], (match["value"] or "").strip('"')
        if name == "export":
            found["environment"] = {key: environment[key] for key in value.split(",") if key in environment}
        elif name in NOT_SAID:
            continue
        elif name in WORDS:
            word, read = WORDS[name]
            found[word] = read(value)
        else:
            raise SlurmRefused(f"slurmrestd takes no --{name}: use sbatch (no rest in the profile), or take it out")
    return found


def _minutes(value: str) -> int:
    """``90``, ``MM:SS``, ``HH:MM:SS`` or ``DAYS-HH[:MM[:SS]]``, seconds rounded up."""
    days, dash, rest = value.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if dash:
        hours, minutes, seconds = (*parts, 0, 0)[:3]
    elif len(parts) == 1:
        hours, minutes, seconds = 0, parts[0], 0
    else:
        hours, minutes, seconds = (0, *parts)[-3:]
    return (int(days or 0) * 24 + hours) * 60 + minutes + (seconds > 0)


def _megabytes(value: str) -> int:
    return int(value[:-1]) * MEGABYTES[value[-1]]


NOT_SAID = frozenset({"signal"})
"""What this version of the daemon refuses, and what the job can do without."""

WORDS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "job-name": ("name", str),
    "nodes": ("nodes", lambda value: [int(value), int(value)]),
    "ntasks-per-node": ("tasks_per_node", int),
    "cpus-per-task": ("cpus_per_task", int),
    "gpus-per-node": ("gpus_per_node", str),
    "mem": ("memory_per_node", _megabytes),
    "partition": ("partition", str),
    "account": ("account", str),
    "qos": ("qos", str),
    "time": ("time_limit", _minutes),
    "constraint": ("constraints", str),
    "chdir": ("current_working_directory", str),
    "output": ("standard_output", str),
    "open-mode": ("open_mode", str),
    "requeue": ("requeue", lambda _: True),
    "exclusive": ("exclusive", lambda value: value or "true"),
    "reservation": ("reservation", str),
    "licenses": ("licenses", str),
    "gres": ("gres", str),
    "comment": ("comment", str),
}
"""Option of sbatch → property of a job, and how its value is read."""
