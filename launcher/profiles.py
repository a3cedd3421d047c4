"""What the operator says of the clusters that jobs may run on: ``profiles.yaml`` in the home. Torch-free.

A job only names a profile. Whatever lets a submission run code or reach hosts (images, mounts, further lines,
addresses, tokens) stands here, where no job can write.
"""

from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, PositiveFloat, PositiveInt, ValidationError, field_validator

from launcher.backends.kubernetes_options import ObjectName
from launcher.journal import Journal
from launcher.problems import Problem, SpecError, of_validation
from parallelism.options import Options

FILE = "profiles.yaml"
DEFAULT = "default"


class Gpu(Options):
    """The GPUs of a cluster, for the planner."""

    name: str = Field(description="as nvidia-smi has it: NVIDIA H100 80GB HBM3")
    memory_gib: PositiveFloat
    host_memory_gib: PositiveFloat = Field(default=64.0, description="of the node's memory, for what is offloaded")


class Container(Options):
    """A container for every process of the job, through the pyxis plugin of Slurm."""

    image: str
    mounts: list[str] = Field(default=[], description="SOURCE:TARGET[:ro]; the home has to be among them")


class SlurmRest(Options):
    """slurmrestd instead of Slurm's commands, for machines that have none."""

    url: str = Field(pattern=r"^https?://[^\s/]+(/[^\s]*)?$", description="http://HOST:6820")
    user: str = Field(min_length=1, description="whose jobs they are, and whose token it is")
    token_file: Path = Field(description="holds a token of auth/jwt (scontrol token), which may be renewed there")


class SlurmProfile(Options):
    """What a batch script holds besides what its job asks for, and how it is submitted."""

    rest: SlurmRest | None = Field(default=None, description="default: sbatch, squeue and scancel")

    python: str | None = Field(default=None, description="on the nodes; default: the one that submits")
    container: Container | None = None
    modules: list[str] = Field(default=[], description="loaded before anything runs")
    directives: list[str] = Field(default=[], description="further options of sbatch: --exclusive")
    lines: list[str] = Field(default=[], description="further lines of shell, before anything runs")
    environment: dict[str, str] = Field(default={}, description="no secrets: the script can be read")
    pass_environment: list[str] = Field(default=[], description="variables taken over from whoever submits")
    partitions: list[str] | None = Field(default=None, description="those that jobs may name; None: any")
    gpu: Gpu | None = None
    memory_gib_per_node: PositiveFloat | None = None

    @field_validator("directives", "lines", "modules")
    @classmethod
    def _one_line_each(cls, values: list[str]) -> list[str]:
        for value in values:
            if "\n" in value:
                raise ValueError("one line each: write a list")
        return values


class RayProfile(Options):
    """A Ray cluster that exists, and what it is made of."""

    address: str = Field(pattern=r"^https?://[^\s/]+(/[^\s]*)?$", description="of its Jobs API: http://HEAD:8265")
    token_file: Path | None = Field(default=None, description="holds the token, where the cluster asks for one")
    python: str = "python"
    environment: dict[str, str] = Field(default={}, description="of the job's processes")
    nodes: PositiveInt = 1
    cpus_per_node: PositiveInt = 1
    gpus_per_node: int = Field(default=0, ge=0)
    gpu: Gpu | None = None
    memory_gib_per_node: PositiveFloat | None = None


class Volume(Options):
    """A persistent volume claim in every pod of a job."""

    claim: ObjectName
    mount: str = Field(pattern=r"^/[^\s:]*$", description="the same path that the dispatcher has it at")
    read_only: bool = False


class Scratch(Options):
    """Where a pod keeps copies of a job that is in an object store, and its part of a checkpoint until it is stored."""

    gib: PositiveFloat
    storage_class: ObjectName | None = Field(default=None, description="of a volume; default: the node's own disk")


class SecretKey(Options):
    """Where a secret lies in the cluster; what it holds never passes through here."""

    secret: ObjectName
    key: str = Field(pattern=r"^[-._A-Za-z0-9]{1,253}$")


class SecretMount(Options):
    """A secret as files, read-only."""

    secret: ObjectName
    mount: str = Field(pattern=r"^/[^\s:]*$")


class Toleration(Options):
    """A taint of nodes that a job's pods may run on in spite of it."""

    key: str | None = None
    operator: Literal["Exists", "Equal"] = "Equal"
    value: str | None = None
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None


class KubernetesProfile(Options):
    """A namespace of a cluster that has KubeRay, and what its pods are made of."""

    kubeconfig: Path | None = Field(default=None, description="default: the pod's own account, or the user's file")
    context: str | None = Field(default=None, description="of the kubeconfig; default: its current one")
    namespace: ObjectName = "default"
    image: str = Field(min_length=1, pattern=r"^\S+$", description="with the same espalier, Python and Ray as here")
    python: str = "python"
    image_pull_secrets: list[ObjectName] = Field(default=[], description="names of secrets")
    service_account: ObjectName | None = Field(default=None, description="its token is not given to the pods")
    run_as_user: PositiveInt | None = Field(default=None, description="default: the image's, which must not be root")
    fs_group: PositiveInt | None = Field(default=None, description="group that owns the volumes")
    node_selector: dict[str, str] = Field(default={}, description="labels of the nodes to use")
    tolerations: list[Toleration] = Field(default=[], description="as in a pod")
    volumes: list[Volume] = Field(default=[], description="holds the home, unless jobs are in an object store")
    scratch: Scratch | None = Field(
        default=None, description="of each pod of a job in an object store; default: the node's disk, without a limit"
    )
    environment: dict[str, str] = Field(default={}, description="no secrets: the manifest can be read")
    secret_environment: dict[str, SecretKey] = Field(default={}, description="variables whose values are in secrets")
    secret_mounts: list[SecretMount] = Field(default=[], description="secrets as files")
    queue_kind: Literal["kueue", "volcano"] | None = None
    queues: list[str] | None = Field(default=None, description="those that jobs may name; None: any")
    priority_classes: list[str] = Field(default=[], description="those that jobs may name")
    gpu_resource: str = Field(default="nvidia.com/gpu", pattern=r"^[a-z0-9.-]+/[A-Za-z0-9._-]+$")
    gpu: Gpu | None = None
    memory_gib_per_node: PositiveFloat | None = None
    keep_seconds: int = Field(default=300, ge=0, description="how long the pods of a job that has ended stay")

    def holds(self, path: Path) -> bool:
        """Whether pods can write to ``path`` on one of the volumes."""
        return any(path.is_relative_to(volume.mount) for volume in self.volumes if not volume.read_only)


class Profile(Options):
    """One place where jobs may run, as each back-end that goes there needs to know it."""

    slurm: SlurmProfile = SlurmProfile()
    ray: RayProfile | None = None
    kubernetes: KubernetesProfile | None = None


def load_profiles(home: Path) -> dict[str, Profile]:
    """Name → profile; ``default`` is always there. Raises ``SpecError`` for a file that cannot be used."""
    path = home / FILE
    document: Any = yaml.safe_load(path.read_text(encoding="utf-8")) if path.exists() else {}
    if not isinstance(document, dict):
        raise SpecError([Problem("", str(path), "not a mapping", "write it as {NAME: {slurm: ..., ray: ...}}")])
    profiles = {DEFAULT: Profile()}
    for name, part in document.items():
        try:
            profiles[str(name)] = Profile.model_validate(part or {})
        except ValidationError as error:
            problems = [problem.below(str(name)) for problem in of_validation(error, Profile)]
            raise SpecError([Problem(p.field, p.value, f"{p.what} (in {path})", p.remedy) for p in problems]) from error
    return profiles


JOBS = "jobs"
"""The folder of a home that holds one folder for each job."""


def home_of(journal: Journal) -> Path:
    """The home that a job's journal lies in."""
    return journal.directory.parent.parent


def profile_named(home: Path, name: str) -> Profile:
    """The profile of that name. Raises ``ValueError`` with those there are."""
    profiles = load_profiles(home)
    if name not in profiles:
        raise ValueError(f"execution.profile {name!r} is unknown: {home / FILE} has {', '.join(sorted(profiles))}")
    return profiles[name]
