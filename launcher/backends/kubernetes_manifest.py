"""The RayJob of a job (``ray.io/v1``), a pure function of what it asks for and what the profile adds. Torch-free.

KubeRay submits the coordinator to the Ray cluster that it makes for it. Nobody but the dispatcher tries again: the
backoff limit is zero, and an entrypoint that finds the traces of a life that was cut off ends at once.
"""

import hashlib
import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from launcher.backends.kubernetes_options import KubernetesOptions
from launcher.policy import TEMPORARY_EXIT_CODE
from launcher.profiles import KubernetesProfile, Scratch

API_VERSION, KIND = "ray.io/v1", "RayJob"
LONGEST_NAME = 47
"""KubeRay appends six characters for the cluster and up to ten for its services; a DNS label has 63."""
LONGEST_SLUG = 22

JOB_LABEL = "espalier/job"
JOB_ANNOTATION, JOURNAL_ANNOTATION = "espalier/job-id", "espalier/journal"
MANAGED_BY = {"app.kubernetes.io/name": "espalier-job", "app.kubernetes.io/managed-by": "espalier"}
QUEUE_LABELS = {"kueue": "kueue.x-k8s.io/queue-name", "volcano": "volcano.sh/queue-name"}
VOLCANO_PRIORITY = "ray.io/priority-class-name"

OBJECT_STORE_BYTES = 256 * 2**20
"""Only small messages pass through Ray; tensors travel through files and collectives."""
LAST_SECONDS = 30
"""Between the last checkpoint and the end of a pod."""


@dataclass(frozen=True)
class KubernetesJob:
    """What a RayJob is made of."""

    job_id: str
    name: str
    journal: str
    """Its location."""
    entry: str
    """Shell that the coordinator starts behind (:func:`launcher.backends.common.entry`)."""
    ray_version: str
    copies: Path | None = None
    """Where a pod keeps copies of a job that is in an object store."""
    threads_per_rank: int = 1
    devices: int | None = None
    module: str = "launcher.coordinator"
    environment: dict[str, str] = field(default_factory=dict)


def job_key(journal: str) -> str:
    """What stands for the job at a location in labels and names, which have no room for whole ids: ten hex digits."""
    return hashlib.sha256(journal.encode()).hexdigest()[:10]


def job_name(job_id: str, journal: str, epoch: int, attempt: int = 1) -> str:
    """The RayJob's name, a DNS label of at most 47 characters.

    It follows from the job and the epoch that will be claimed; ``attempt`` counts those that ended before they did.
    """
    slug = re.sub(r"[^a-z0-9]+", "-", job_id.lower())[:LONGEST_SLUG].strip("-")
    name = f"esp-{slug}-{job_key(journal)}-e{epoch}" + ("" if attempt == 1 else f"-{attempt}")
    assert len(name) <= LONGEST_NAME, name
    return name


def render(job: KubernetesJob, options: KubernetesOptions, profile: KubernetesProfile) -> dict[str, Any]:
    """The manifest: deterministic, free of secrets."""
    labels = {**MANAGED_BY, JOB_LABEL: job_key(job.journal)}
    workers = options.nodes - 1
    cluster: dict[str, Any] = {
        "rayVersion": job.ray_version,
        "authOptions": {"mode": "token"},  # KubeRay makes the token, a secret of this cluster alone
        "headGroupSpec": {
            "serviceType": "ClusterIP",
            "rayStartParams": {
                **_start_parameters(job, options),
                "dashboard-host": "0.0.0.0",
                "object-store-memory": str(OBJECT_STORE_BYTES),
            },
            "template": _pod("ray-head", labels, job, options, profile),
        },
    }
    if workers:
        group = {
            "groupName": "workers",
            "replicas": workers,
            "minReplicas": workers,
            "maxReplicas": workers,
            "rayStartParams": {**_start_parameters(job, options), "object-store-memory": str(OBJECT_STORE_BYTES)},
            "template": _pod("ray-worker", labels, job, options, profile),
        }
        cluster["workerGroupSpecs"] = [group]
    spec: dict[str, Any] = {
        "submissionMode": "HTTPMode",
        "entrypoint": _entrypoint(job, options, profile),
        "backoffLimit": 0,
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": profile.keep_seconds,
        "rayClusterSpec": cluster,
    }
    if options.deadline_seconds:
        spec["activeDeadlineSeconds"] = options.deadline_seconds
    if profile.queue_kind == "kueue":
        spec["suspend"] = True  # Kueue lets it in
    metadata = {
        "name": job.name,
        "namespace": profile.namespace,
        "labels": {**labels, **_queue_labels(options, profile)},
        "annotations": {JOB_ANNOTATION: job.job_id, JOURNAL_ANNOTATION: job.journal},
    }
    return {"apiVersion": API_VERSION, "kind": KIND, "metadata": metadata, "spec": spec}


def to_yaml(manifest: dict[str, Any]) -> str:
    """The manifest as ``kubectl`` reads it."""
    return yaml.dump(manifest, Dumper=_Dumper, sort_keys=False, width=120, allow_unicode=True)


def _queue_labels(options: KubernetesOptions, profile: KubernetesProfile) -> dict[str, str]:
    labels = {}
    if options.queue and profile.queue_kind:
        labels[QUEUE_LABELS[profile.queue_kind]] = options.queue
    if options.priority_class and profile.queue_kind == "volcano":
        labels[VOLCANO_PRIORITY] = options.priority_class
    return labels


def _start_parameters(job: KubernetesJob, options: KubernetesOptions) -> dict[str, str]:
    """What Ray may use of a pod: said aloud, so that it does not look at the machine below."""
    return {"num-cpus": str(options.cpus(job.threads_per_rank)), "num-gpus": str(options.gpus_per_node)}


def _entrypoint(job: KubernetesJob, options: KubernetesOptions, profile: KubernetesProfile) -> str:
    """The coordinator under :mod:`launcher.pod`, for ``sh``."""
    coordinator = [profile.python, "-m", job.module, job.journal, "--address", "auto"]
    coordinator += ["--nodes", str(options.nodes)]
    coordinator += ["--devices", str(job.devices)] if job.devices else []
    command = [profile.python, "-m", "launcher.pod", "run", job.journal, job.name]
    return f"""{job.entry} || exit {TEMPORARY_EXIT_CODE}
exec {shlex.join(command)} \\
  {shlex.join(coordinator)}
"""


def _before_the_end(job: KubernetesJob, options: KubernetesOptions, profile: KubernetesProfile) -> list[str]:
    """Whatever takes a pod away (a drained node, a preemption): checkpoints are written first."""
    command = [profile.python, "-m", "launcher.pod", "end", job.journal, job.name, str(options.checkpoint_seconds)]
    return ["/bin/sh", "-c", f"{shlex.join(command)}\nray stop\n"]


def _pod(
    container: str, labels: dict[str, str], job: KubernetesJob, options: KubernetesOptions, profile: KubernetesProfile
) -> dict[str, Any]:
    spec: dict[str, Any] = {
        "automountServiceAccountToken": False,
        "securityContext": _without_none(
            {
                "runAsNonRoot": True,
                "runAsUser": profile.run_as_user,
                "fsGroup": profile.fs_group,
                "fsGroupChangePolicy": "OnRootMismatch" if profile.fs_group else None,
                "seccompProfile": {"type": "RuntimeDefault"},
            }
        ),
        "terminationGracePeriodSeconds": options.checkpoint_seconds + LAST_SECONDS,
        "containers": [_container(container, job, options, profile)],
        "volumes": list(_volumes(job, options, profile)),
    }
    more = {
        "serviceAccountName": profile.service_account,
        "priorityClassName": options.priority_class,
        "imagePullSecrets": [{"name": name} for name in profile.image_pull_secrets],
        "nodeSelector": dict(profile.node_selector),
        "tolerations": [one.model_dump(exclude_none=True) for one in profile.tolerations],
    }
    return {"metadata": {"labels": dict(labels)}, "spec": spec | {name: value for name, value in more.items() if value}}


def _container(name: str, job: KubernetesJob, options: KubernetesOptions, profile: KubernetesProfile) -> dict[str, Any]:
    environment: list[dict[str, Any]] = [
        {"name": variable, "value": value} for variable, value in {**job.environment, **profile.environment}.items()
    ]
    environment += [
        {"name": variable, "valueFrom": {"secretKeyRef": {"name": one.secret, "key": one.key}}}
        for variable, one in profile.secret_environment.items()
    ]
    resources = _resources(job, options, profile)
    return {
        "name": name,
        "image": profile.image,
        "env": environment,
        "resources": {"requests": resources, "limits": dict(resources)},
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
        "lifecycle": {"preStop": {"exec": {"command": _before_the_end(job, options, profile)}}},
        "volumeMounts": list(_mounts(job, profile)),
    }


def _resources(job: KubernetesJob, options: KubernetesOptions, profile: KubernetesProfile) -> dict[str, str]:
    """Limits are what is requested: a rank that shares its cores makes all others wait."""
    memory = options.memory_gib_per_node or profile.memory_gib_per_node
    found = {"cpu": str(options.cpus(job.threads_per_rank))}
    if memory:
        found["memory"] = f"{round(1024 * memory)}Mi"
    if options.gpus_per_node:
        found[profile.gpu_resource] = str(options.gpus_per_node)
    return found


def _volumes(job: KubernetesJob, options: KubernetesOptions, profile: KubernetesProfile) -> list[dict[str, Any]]:
    size = f"{round(1024 * options.shared_memory_gib)}Mi"
    found: list[dict[str, Any]] = [{"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": size}}]
    for index, volume in enumerate(profile.volumes):
        claim = {"claimName": volume.claim, **({"readOnly": True} if volume.read_only else {})}
        found.append({"name": f"volume-{index}", "persistentVolumeClaim": claim})
    if _keeps_copies(job, profile):
        found.append({"name": "copies", **_scratch(profile.scratch)})
    for index, mount in enumerate(profile.secret_mounts):
        found.append({"name": f"secret-{index}", "secret": {"secretName": mount.secret, "defaultMode": 0o440}})
    return found


def _keeps_copies(job: KubernetesJob, profile: KubernetesProfile) -> bool:
    """Whether pods need a volume of their own for copies: the profile may have one for them."""
    return job.copies is not None and not profile.holds(job.copies)


def _scratch(scratch: Scratch | None) -> dict[str, Any]:
    """A volume that comes and goes with its pod."""
    if scratch is None:
        return {"emptyDir": {}}
    size = f"{round(1024 * scratch.gib)}Mi"
    if scratch.storage_class is None:
        return {"emptyDir": {"sizeLimit": size}}
    claim = {
        "accessModes": ["ReadWriteOnce"],
        "storageClassName": scratch.storage_class,
        "resources": {"requests": {"storage": size}},
    }
    return {"ephemeral": {"volumeClaimTemplate": {"spec": claim}}}


def _mounts(job: KubernetesJob, profile: KubernetesProfile) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = [{"name": "shared-memory", "mountPath": "/dev/shm"}]
    for index, volume in enumerate(profile.volumes):
        read_only = {"readOnly": True} if volume.read_only else {}
        found.append({"name": f"volume-{index}", "mountPath": volume.mount, **read_only})
    if _keeps_copies(job, profile):
        found.append({"name": "copies", "mountPath": str(job.copies)})
    for index, secret in enumerate(profile.secret_mounts):
        found.append({"name": f"secret-{index}", "mountPath": secret.mount, "readOnly": True})
    return found


def _without_none(document: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in document.items() if value is not None}


class _Dumper(yaml.SafeDumper):
    """Scripts as blocks, to be read."""

    def ignore_aliases(self, data: object) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)
