"""The back-end of a Ray cluster that exists, through its Jobs API. Torch-free, and does not import Ray.

The cluster's address and token stand in the operator's profile. A submission's id follows from the job and its attempt,
and the cluster refuses an id twice, so that a job is not submitted twice either. Ray tries nothing again.
"""

import shlex
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx2

from launcher.attend import ask_to_stop, stop_file
from launcher.backends.base import BackendStatus, BackendUnavailable, Handle, Phase
from launcher.backends.common import entry, read_token, tail, working_directory
from launcher.journal import Journal
from launcher.profiles import RayProfile, home_of, profile_named

STOP_WAIT_SECONDS = 660
"""How long Ray leaves a stopped job to write its checkpoints before it ends it by force."""
ANSWER_SECONDS = 30.0
GONE_SECONDS = 30.0
PHASES = {"PENDING": Phase.WAITING, "RUNNING": Phase.RUNNING}
"""All other states of a Ray job are ends."""


class RayBackend:
    """Submits jobs to the clusters of the operator's profiles. ``module`` is what drives them."""

    outlives = True

    def __init__(self, module: str = "launcher.coordinator", stop_wait_seconds: int = STOP_WAIT_SECONDS) -> None:
        self._module = module
        self._stop_wait_seconds = stop_wait_seconds
        self._stopped: set[str] = set()

    def submit(self, journal: Journal) -> Handle:
        """Have the cluster run the coordinator. Raises ``ValueError`` where it refuses, ``BackendUnavailable``."""
        profile = _profile(journal)
        jobs = JobsApi(profile.address, profile.token_file)
        _check_ray(profile.address, jobs.ray_version())
        submission = _new_id(journal, jobs)
        environment = {**profile.environment, "RAY_JOB_STOP_WAIT_TIME_S": str(self._stop_wait_seconds)}
        document = {
            "submission_id": submission,
            "entrypoint": _entrypoint(journal, profile, submission, self._module),
            "metadata": {"espalier_job": journal.job_id, "espalier_journal": journal.location},
            "runtime_env": {"env_vars": environment},
        }
        try:
            jobs.submit(document)
        except (ValueError, BackendUnavailable):  # an id that is taken is an error of the server, too
            if jobs.get(submission) is None:
                raise  # otherwise somebody was faster, and this is the same submission
        return _handle(profile, submission, stop_file(journal, submission))

    def find(self, journal: Journal) -> Handle | None:
        """The submission of this job that has not ended, by what was written on it. Raises ``BackendUnavailable``."""
        profile = _profile(journal)
        for row in JobsApi(profile.address, profile.token_file).list():
            mine = (row.get("metadata") or {}).get("espalier_journal") == journal.location
            if mine and row["status"] in PHASES:
                submission = str(row["submission_id"])
                return _handle(profile, submission, stop_file(journal, submission))
        return None

    def status(self, handle: Handle) -> BackendStatus:
        """Where the submission stands. A cluster that does not answer is waited for."""
        try:
            row = _jobs(handle).get(handle["submission"])
        except (BackendUnavailable, ValueError) as error:  # a token that is refused may be renewed
            return BackendStatus(Phase.WAITING, str(error))
        if row is None:
            return BackendStatus(Phase.ENDED, "the cluster does not know it any more: its history ends with its head")
        phase = PHASES.get(row["status"], Phase.ENDED)
        code = row.get("driver_exit_code") if phase is Phase.ENDED else None
        since = float(row.get("start_time") or 0) / 1000.0 if phase is Phase.RUNNING else 0.0
        withdrawn = row["status"] == "STOPPED" and handle["submission"] not in self._stopped
        return BackendStatus(phase, _reason(row), code, since, final=withdrawn)

    def stop(self, handle: Handle, grace_seconds: float) -> None:
        """Ask the coordinator to checkpoint and end; after the grace period it is ended by force."""
        jobs = _jobs(handle)
        if self.status(handle).phase is Phase.ENDED:
            return
        self._stopped.add(handle["submission"])
        if grace_seconds > 0:
            jobs.stop(handle["submission"])
            self._await_end(handle, grace_seconds)
        if self.status(handle).phase is not Phase.ENDED:
            ask_to_stop(Path(handle["stop_file"]), now=True)
            jobs.stop(handle["submission"])
            self._await_end(handle, GONE_SECONDS)

    def logs(self, handle: Handle, journal: Journal, lines: int = 50) -> str:
        """The end of the coordinator's output; what Ray says where it did not come that far."""
        found = tail(journal.log_path("coordinator"), lines)
        if found:
            return found
        try:
            return "\n".join(_jobs(handle).logs(handle["submission"]).splitlines()[-lines:])
        except BackendUnavailable as error:
            return str(error)

    def _await_end(self, handle: Handle, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and self.status(handle).phase is not Phase.ENDED:
            time.sleep(0.2)


class JobsApi:
    """A cluster's Jobs API over HTTP. Calls raise ``BackendUnavailable`` where it does not answer."""

    def __init__(self, address: str, token_file: Path | None) -> None:
        self._address = address.rstrip("/")
        self._token_file = token_file

    def submit(self, document: Mapping[str, Any]) -> None:
        """Start a job. Raises ``ValueError`` with the cluster's words where it is refused."""
        self._call("POST", "", document)

    def ray_version(self) -> str:
        """Of the cluster."""
        return str(self._answer("GET", "/api/version").json()["ray_version"])

    def list(self) -> list[dict[str, Any]]:
        """All jobs that were submitted and that the cluster remembers."""
        rows: list[dict[str, Any]] = self._call("GET", "").json()
        return [row for row in rows if row.get("submission_id")]

    def get(self, submission: str) -> dict[str, Any] | None:
        """One job, or None where the cluster does not know it."""
        answer = self._call("GET", submission, missing_is_fine=True)
        return None if answer.status_code == httpx2.codes.NOT_FOUND else answer.json()

    def stop(self, submission: str) -> None:
        """Have SIGTERM sent to a job, and SIGKILL after the time that was agreed when it was submitted."""
        self._call("POST", f"{submission}/stop", missing_is_fine=True)

    def logs(self, submission: str) -> str:
        """What the entrypoint printed; empty where the cluster does not know it."""
        answer = self._call("GET", f"{submission}/logs", missing_is_fine=True)
        return "" if answer.status_code == httpx2.codes.NOT_FOUND else str(answer.json()["logs"])

    def _call(
        self, method: str, path: str, document: Mapping[str, Any] | None = None, *, missing_is_fine: bool = False
    ) -> httpx2.Response:
        return self._answer(method, f"/api/jobs/{path}", document, missing_is_fine=missing_is_fine)

    def _answer(
        self, method: str, path: str, document: Mapping[str, Any] | None = None, *, missing_is_fine: bool = False
    ) -> httpx2.Response:
        try:
            answer = httpx2.request(
                method,
                f"{self._address}{path}",
                json=document,
                headers=self._headers(),
                timeout=ANSWER_SECONDS,
                trust_env=False,
            )
        except httpx2.TransportError as error:
            raise BackendUnavailable(f"the Ray cluster at {self._address} does not answer: {error}") from error
        if answer.is_success or (missing_is_fine and answer.status_code == httpx2.codes.NOT_FOUND):
            return answer
        if answer.status_code in (httpx2.codes.UNAUTHORIZED, httpx2.codes.FORBIDDEN):
            raise ValueError(
                f"the Ray cluster at {self._address} refuses the token ({answer.text.strip()}): the operator names the"
                " right one as ray.token_file in the profile"
            )
        told = answer.text.strip().rpartition("\n")[2]  # the last line of a traceback
        if answer.is_server_error:
            raise BackendUnavailable(f"the Ray cluster at {self._address} is in trouble: {told}")
        raise ValueError(f"the Ray cluster at {self._address} refused: {told}")

    def _headers(self) -> dict[str, str]:
        """The token is read each time: it may be changed while a service runs."""
        if self._token_file is None:
            return {}
        return {"Authorization": f"Bearer {read_token(self._token_file)}"}


def _check_ray(address: str, found: str) -> None:
    here = version("ray")
    if found != here:
        raise ValueError(
            f"the Ray cluster at {address} has Ray {found}, and this side has {here}: install the same on both sides"
        )


def submission_id(job_id: str, epoch: int, attempt: int = 1) -> str:
    """The id of the submission that will claim ``epoch``; ``attempt`` counts those that ended before they did."""
    base = f"espalier-{job_id}-e{epoch:04d}"
    return base if attempt == 1 else f"{base}.{attempt}"


def _new_id(journal: Journal, jobs: JobsApi) -> str:
    """The first id of the next epoch that has not come to its end."""
    epoch, attempt = journal.view().epoch + 1, 1
    while True:
        submission = submission_id(journal.job_id, epoch, attempt)
        row = jobs.get(submission)
        if row is None or row["status"] in PHASES:
            return submission
        attempt += 1


def _entrypoint(journal: Journal, profile: RayProfile, submission: str, module: str) -> str:
    coordinator = [profile.python, "-m", module, journal.location, "--address", "auto"]
    coordinator += ["--nodes", str(profile.nodes)]
    devices = journal.spec().execution.devices
    coordinator += ["--devices", str(devices)] if devices else []
    command = [profile.python, "-m", "launcher.attend", journal.location, submission, *coordinator]
    return f"{entry(journal, Path(working_directory(journal)))} && exec {shlex.join(command)}"


def _reason(row: Mapping[str, Any]) -> str:
    message = str(row.get("message") or "").partition(", last available logs")[0]
    return f"Ray job {row['submission_id']} is {row['status']}" + (f": {message}" if message else "")


def _profile(journal: Journal) -> RayProfile:
    name = journal.spec().execution.profile
    profile = profile_named(home_of(journal), name).ray
    if profile is None:
        raise ValueError(f"execution.profile {name!r} says of no Ray cluster: the operator adds ray: {{address: ...}}")
    return profile


def _handle(profile: RayProfile, submission: str, stop: Path) -> Handle:
    token_file = str(profile.token_file) if profile.token_file else None
    return {
        "submission": submission,
        "address": profile.address,
        "token_file": token_file,
        "stop_file": str(stop),
    }


def _jobs(handle: Handle) -> JobsApi:
    return JobsApi(handle["address"], Path(handle["token_file"]) if handle["token_file"] else None)
