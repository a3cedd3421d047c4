"""What a RayJob's status means, and why one that waits does: pure functions of what the API server says. Torch-free."""

import re
from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime
from typing import Any

from launcher.backends.base import BackendStatus, Phase

Resource = Mapping[str, Any]

ENDS = ("Complete", "Failed", "ValidationFailed")
SUSPENDED = ("Suspending", "Suspended")
FINAL_REASONS = ("DeadlineExceeded", "PreRunningDeadlineExceeded", "ValidationFailed")
"""Ends that another try would come to, too."""
EXIT_CODE = re.compile(r"exit code (-?\d+)")
STARTS = ("PodInitializing", "ContainerCreating")
LOGS = ", last available logs"
"""Behind it, KubeRay tells the end of what the entrypoint printed."""
LONGEST_REASON = 500


def has_ended(ray_job: Resource) -> bool:
    """Whether nothing more will come of it."""
    return _status(ray_job).get("jobDeploymentStatus", "") in ENDS


def is_suspended(ray_job: Resource) -> bool:
    """Whether it has no pods because it is not its turn."""
    status = _status(ray_job).get("jobDeploymentStatus", "")
    return status in SUSPENDED or (not status and bool(ray_job["spec"].get("suspend")))


def status_of(ray_job: Resource) -> BackendStatus:
    """Phase, reason, exit code, start of a RayJob; ``final`` where it was withdrawn, refused, or ran out of time."""
    name, status = ray_job["metadata"]["name"], _status(ray_job)
    deployment, of_job = status.get("jobDeploymentStatus", ""), status.get("jobStatus", "")
    if ray_job["metadata"].get("deletionTimestamp"):
        return BackendStatus(Phase.RUNNING, f"RayJob {name} is being deleted", since=_since(status))
    if deployment in ENDS:
        return _ended(name, status)
    if deployment == "Running" and of_job == "RUNNING":
        return BackendStatus(Phase.RUNNING, f"RayJob {name} runs on cluster {_cluster(status)}", since=_since(status))
    return BackendStatus(Phase.WAITING, f"RayJob {name} {_waits(ray_job)}")


def waiting_reason(
    pods: Iterable[Resource], clusters: Iterable[Resource] = (), workloads: Iterable[Resource] = ()
) -> str:
    """In the words of the scheduler, the kubelet, KubeRay and Kueue, why there are no running pods; empty: no idea."""
    told = [*_of_workloads(workloads), *_of_clusters(clusters), *_of_pods(pods)]
    return "; ".join(dict.fromkeys(told))[:LONGEST_REASON]


def _status(ray_job: Resource) -> Resource:
    found: Resource = ray_job.get("status") or {}
    return found


def _cluster(status: Resource) -> str:
    return str(status.get("rayClusterName", "?"))


def _waits(ray_job: Resource) -> str:
    status = _status(ray_job)
    deployment = status.get("jobDeploymentStatus", "")
    if is_suspended(ray_job):
        return "is suspended"
    if deployment == "Running":
        return f"has its cluster {_cluster(status)}, Ray starts the coordinator"
    if not deployment:
        return "has not been looked at by KubeRay"
    return f"is {deployment}"


def _ended(name: str, status: Resource) -> BackendStatus:
    deployment, of_job = status["jobDeploymentStatus"], status.get("jobStatus", "")
    cause, message = status.get("reason", ""), status.get("message", "").partition(LOGS)[0]
    code = 0 if of_job == "SUCCEEDED" else _exit_code(message)
    words = [f"RayJob {name} is {deployment}", *([f"({of_job})"] if of_job else []), *([cause] if cause else [])]
    reason = " ".join(words) + (f": {message.strip()}" if message.strip() else "")
    final = cause in FINAL_REASONS or of_job == "STOPPED" or deployment == "ValidationFailed"
    return BackendStatus(Phase.ENDED, reason[:LONGEST_REASON], code, final=final)


def last_words(status: Resource) -> str:
    """The end of what the entrypoint printed, as KubeRay tells it."""
    return str(status.get("message", "").partition(LOGS)[2].partition("\n")[2])


def _exit_code(message: str) -> int | None:
    found = EXIT_CODE.search(message)
    return int(found[1]) if found else None


def _since(status: Resource) -> float:
    """Seconds since 1970; of the Ray job, or of the RayJob where Ray does not say."""
    text = (status.get("rayJobInfo") or {}).get("startTime") or status.get("startTime")
    return datetime.fromisoformat(text).timestamp() if text else 0.0


def _of_workloads(workloads: Iterable[Resource]) -> Iterator[str]:
    for workload in workloads:
        for condition in _conditions(workload):
            if condition["type"] in ("QuotaReserved", "Admitted") and condition["status"] == "False":
                yield f"Kueue: {condition.get('message') or condition.get('reason', 'not admitted')}"


def _of_clusters(clusters: Iterable[Resource]) -> Iterator[str]:
    """Pods that could not even be made: a quota, a refusal of an admission controller."""
    for cluster in clusters:
        for condition in _conditions(cluster):
            if condition["type"] == "ReplicaFailure" and condition["status"] == "True":
                yield f"{condition.get('reason', 'ReplicaFailure')}: {condition.get('message', '')}"


def _of_pods(pods: Iterable[Resource]) -> Iterator[str]:
    for pod in pods:
        name, status = pod["metadata"]["name"], pod.get("status") or {}
        for condition in _conditions(pod):
            if condition["type"] == "PodScheduled" and condition["status"] == "False":
                yield f"pod {name} is not scheduled: {condition.get('message') or condition.get('reason', '')}"
        for container in status.get("containerStatuses") or ():
            waiting = (container.get("state") or {}).get("waiting") or {}
            if waiting.get("reason") and waiting["reason"] not in STARTS:
                yield f"pod {name}: {waiting['reason']}: {waiting.get('message', '')}".rstrip(": ")
            ended = (container.get("lastState") or {}).get("terminated") or {}
            if ended.get("reason") == "OOMKilled":
                yield f"pod {name} needed more memory than its limit (OOMKilled)"


def _conditions(resource: Resource) -> list[Resource]:
    found: list[Resource] = (resource.get("status") or {}).get("conditions") or []
    return found
