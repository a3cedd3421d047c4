"""The back-end of Kubernetes: a RayJob of KubeRay for each submission. Torch-free.

Its name follows from the job and the epoch, and the API server takes a name once, so that a job is not submitted twice.
KubeRay makes the Ray cluster and runs the coordinator there; nobody but the dispatcher tries again.
"""

import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from launcher.attend import ask_to_stop, stop_file
from launcher.backends.base import BackendStatus, BackendUnavailable, Handle, Phase
from launcher.backends.common import entry, tail, working_directory
from launcher.backends.kubernetes_api import Document, KubernetesApi, Place, Taken
from launcher.backends.kubernetes_manifest import (
    JOB_LABEL,
    JOURNAL_ANNOTATION,
    MANAGED_BY,
    KubernetesJob,
    job_key,
    job_name,
    render,
)
from launcher.backends.kubernetes_options import KubernetesOptions
from launcher.backends.kubernetes_states import has_ended, is_suspended, last_words, status_of, waiting_reason
from launcher.backends.kubernetes_watch import Recently, Watched
from launcher.environment import shared_cluster
from launcher.journal import Journal
from launcher.pod import alive_file
from launcher.profiles import KubernetesProfile, home_of, profile_named
from launcher.spec import JobSpec
from parallelism import places

GONE_SECONDS = 180.0
"""How long a RayJob that was deleted may take until nothing of it is left."""
REASON_SECONDS = 10.0
"""How often pods are looked at for the reason of one job that waits."""
SELECTOR = ",".join(f"{name}={value}" for name, value in MANAGED_BY.items())
BY_KUBERAY = ("RAY_AUTH_MODE",)
"""What KubeRay sets in its pods by itself."""


class KubernetesBackend:
    """Submits jobs to the clusters of the operator's profiles. ``module`` is what drives them."""

    outlives = True

    def __init__(self, module: str = "launcher.coordinator", reason_seconds: float = REASON_SECONDS) -> None:
        self._module = module
        self._apis: dict[Place, tuple[KubernetesApi, Watched]] = {}
        self._reasons = Recently(reason_seconds)
        self._last: dict[str, BackendStatus] = {}
        self._stopped: set[str] = set()
        self._settled: dict[str, Document | None] = {}

    def submit(self, journal: Journal) -> Handle:
        """Create the RayJob. Raises ``ValueError`` with the API server's words, ``BackendUnavailable``."""
        profile = _profile(journal)
        place = Place.of_profile(profile)
        api = self._api(place)
        name = _new_name(journal, api)
        job = kubernetes_job(
            journal.spec(), journal, journal.job_id, name, Path(working_directory(journal)), self._module
        )
        stop = stop_file(journal, name)
        places.remove(alive_file(stop))
        try:
            made = api.create(render_job(journal.spec(), profile, job))
        except Taken:
            found = api.get(name)
            if found is None or _journal_of(found) != journal.location:
                raise
            made = found  # somebody was faster, and this is the same submission
        return _handle(place, made, stop)

    def find(self, journal: Journal) -> Handle | None:
        """The RayJob of this job that has not ended, by its label. Raises ``BackendUnavailable``."""
        place = Place.of_profile(_profile(journal))
        for row in _of_job(self._api(place), journal):
            if not has_ended(row) and "deletionTimestamp" not in row["metadata"]:
                return _handle(place, row, stop_file(journal, row["metadata"]["name"]))
        return None

    def status(self, handle: Handle) -> BackendStatus:
        """Where the RayJob stands; while the API server does not answer, where it stood."""
        uid = handle["uid"]
        try:
            found = self._look(handle)
            status = self._status(handle, found) if found else _gone(handle, by_us=uid in self._stopped)
        except (BackendUnavailable, ValueError) as error:
            known = self._last.get(uid) or BackendStatus(Phase.WAITING)
            return BackendStatus(known.phase, str(error), known.exit_code, known.since)
        self._last[uid] = status
        if status.phase is Phase.ENDED:
            del self._last[uid]
        return status

    def stop(self, handle: Handle, grace_seconds: float) -> None:
        """Ask the coordinator to checkpoint and end; after the grace period the RayJob is deleted with all it has."""
        name, uid, stop = handle["name"], handle["uid"], Path(handle["stop_file"])
        api = self._api(Place.of_handle(handle))
        self._stopped.add(uid)
        if grace_seconds > 0 and _runs(api, handle):
            ask_to_stop(stop)
            deadline = time.monotonic() + grace_seconds
            while time.monotonic() < deadline and _runs(api, handle):
                time.sleep(0.5)
        found = _mine(api.get(name), uid)
        if found is not None and not has_ended(found):
            ask_to_stop(stop, now=True)
            api.delete(name, uid)
            deadline = time.monotonic() + GONE_SECONDS
            while time.monotonic() < deadline and _mine(api.get(name), uid) is not None:
                time.sleep(0.2)
            found = _mine(api.get(name), uid)
        if found is None or has_ended(found):
            self._settled[uid] = found  # the watch may tell it later

    def logs(self, handle: Handle, journal: Journal, lines: int = 50) -> str:
        """The end of the coordinator's output; where it did not come that far, what Ray or the head's pod printed."""
        text = tail(journal.log_path("coordinator"), lines)
        if text:
            return text
        try:
            status = (self._look(handle) or {}).get("status", {})
            cluster, printed = status.get("rayClusterName"), last_words(status).splitlines()
            if printed:
                return "\n".join(printed[-lines:])
            return self._api(Place.of_handle(handle)).head_log(cluster, lines) if cluster else ""
        except (BackendUnavailable, ValueError) as error:
            return str(error)

    def _api(self, place: Place) -> KubernetesApi:
        return self._connection(place)[0]

    def _connection(self, place: Place) -> tuple[KubernetesApi, Watched]:
        if place not in self._apis:
            api = KubernetesApi(place)
            self._apis[place] = (api, Watched(api, SELECTOR))
        return self._apis[place]

    def _look(self, handle: Handle) -> Document | None:
        """The RayJob as the watch has it. One that it does not have is asked for: it may be too young, or gone."""
        name, uid = handle["name"], handle["uid"]
        if uid in self._settled:
            return self._settled[uid]
        api, watched = self._connection(Place.of_handle(handle))
        return _mine(watched.get(name), uid) or _mine(api.get(name), uid)

    def _status(self, handle: Handle, found: Document) -> BackendStatus:
        status = status_of(found)
        if status.phase is Phase.WAITING:
            why = self._why(handle, found)
            return BackendStatus(Phase.WAITING, f"{status.reason}: {why}" if why else status.reason)
        if status.phase is Phase.ENDED and status.final and handle["uid"] in self._stopped:
            return BackendStatus(Phase.ENDED, status.reason, status.exit_code)
        return status

    def _why(self, handle: Handle, found: Document) -> str:
        """Looked for now and then; a cluster that cannot say why does not make the job's state unknown."""
        name, uid = handle["name"], handle["uid"]
        known = self._reasons.get(uid)
        if known is not None:
            return known
        api = self._api(Place.of_handle(handle))
        cluster = (found.get("status") or {}).get("rayClusterName")
        try:
            if is_suspended(found):
                return self._reasons.put(uid, waiting_reason((), workloads=api.workloads(uid)))
            pods = api.pods(cluster) if cluster else []
            return self._reasons.put(uid, waiting_reason(pods, api.clusters(name)))
        except (BackendUnavailable, ValueError) as error:
            return self._reasons.put(uid, str(error))


def kubernetes_job(
    spec: JobSpec,
    journal: Journal,
    job_id: str,
    name: str,
    working_directory: Path,
    module: str = "launcher.coordinator",
) -> KubernetesJob:
    """What the RayJob of a job is rendered from, besides options and profile; writes nothing."""
    environment = {key: value for key, value in shared_cluster().items() if key not in BY_KUBERAY}
    return KubernetesJob(
        job_id=job_id,
        name=name,
        journal=journal.location,
        entry=entry(journal, working_directory),
        ray_version=version("ray"),
        copies=journal.directory.parent if places.is_mirrored(journal.directory) else None,
        threads_per_rank=spec.execution.threads_per_rank,
        devices=spec.execution.devices,
        module=module,
        environment=environment,
    )


def render_job(spec: JobSpec, profile: KubernetesProfile, job: KubernetesJob) -> dict[str, Any]:
    """The RayJob of a job."""
    return render(job, spec.execution.kubernetes or KubernetesOptions(), profile)


def _profile(journal: Journal) -> KubernetesProfile:
    name = journal.spec().execution.profile
    profile = profile_named(home_of(journal), name).kubernetes
    if profile is None:
        raise ValueError(
            f"execution.profile {name!r} says of no Kubernetes cluster: the operator adds kubernetes: {{image: ...}}"
        )
    return profile


def _new_name(journal: Journal, api: KubernetesApi) -> str:
    """The first name of the next epoch that has not come to its end; what is left of earlier ones is removed."""
    ended = {row["metadata"]["name"]: row["metadata"]["uid"] for row in _of_job(api, journal) if has_ended(row)}
    epoch, attempt = journal.view().epoch + 1, 1
    while (name := job_name(journal.job_id, journal.location, epoch, attempt)) in ended:
        attempt += 1
    for old, uid in ended.items():
        if f"-e{epoch}" not in old:
            api.delete(old, uid)
    return name


def _of_job(api: KubernetesApi, journal: Journal) -> list[Document]:
    rows, _ = api.ray_jobs(f"{SELECTOR},{JOB_LABEL}={job_key(journal.location)}")
    return [row for row in rows if _journal_of(row) == journal.location]


def _journal_of(row: Mapping[str, Any]) -> str:
    return str(row["metadata"].get("annotations", {}).get(JOURNAL_ANNOTATION, ""))


def _mine(found: Document | None, uid: str) -> Document | None:
    return found if found is not None and found["metadata"]["uid"] == uid else None


def _runs(api: KubernetesApi, handle: Handle) -> bool:
    found = _mine(api.get(handle["name"]), handle["uid"])
    return found is not None and status_of(found).phase is Phase.RUNNING


def _gone(handle: Handle, by_us: bool) -> BackendStatus:
    """The API server forgets nothing: whoever removed it did not want it to go on."""
    return BackendStatus(Phase.ENDED, f"RayJob {handle['name']} was deleted", final=not by_us)


def _handle(place: Place, made: Mapping[str, Any], stop: Path) -> Handle:
    return {
        "name": made["metadata"]["name"],
        "uid": made["metadata"]["uid"],
        "namespace": place.namespace,
        "kubeconfig": place.kubeconfig,
        "context": place.context,
        "stop_file": str(stop),
    }
