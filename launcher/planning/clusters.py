"""The cluster behind a job's back-end, for the planner, and whether the job can go there. Torch-free."""

import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from launcher.backends.kubernetes_options import KubernetesOptions
from launcher.backends.slurm_options import SlurmOptions
from launcher.planning.cluster import CPU_LINK, CPU_MEMORY, GIBI, Cluster, core_flops, gpu_cluster, local_cluster
from launcher.problems import Problem
from launcher.profiles import FILE, JOBS, Gpu, KubernetesProfile, Profile, load_profiles
from launcher.spec import JobSpec
from parallelism import places
from parallelism.host_memory import available_memory
from parallelism.suggest import remedy


def cluster_of(spec: JobSpec, home: Path) -> Cluster:
    """What the job's back-end offers it: this machine, an allocation, or a cluster that exists.

    Where the profile says nothing of the nodes' memory, they are taken to be like this machine. Raises ``SpecError``
    for profiles that cannot be read.
    """
    execution = spec.execution
    profile = load_profiles(home).get(execution.profile, Profile())
    threads = execution.threads_per_rank
    if execution.backend == "slurm":
        options = execution.slurm or SlurmOptions()
        memory = options.memory_gib_per_node or profile.slurm.memory_gib_per_node
        devices = options.devices_per_node(threads)
        return _cluster(options.nodes, devices, bool(options.gpus_per_node), profile.slurm.gpu, memory, threads)
    if execution.backend == "kubernetes" and profile.kubernetes:
        asked, offer = execution.kubernetes or KubernetesOptions(), profile.kubernetes
        memory = asked.memory_gib_per_node or offer.memory_gib_per_node
        return _cluster(
            asked.nodes, asked.devices_per_node(threads), bool(asked.gpus_per_node), offer.gpu, memory, threads
        )
    if execution.backend == "ray" and profile.ray:
        ray = profile.ray
        devices = ray.gpus_per_node or ray.cpus_per_node // threads
        return _cluster(ray.nodes, devices, bool(ray.gpus_per_node), ray.gpu, ray.memory_gib_per_node, threads)
    return local_cluster(spec)


def _cluster(
    nodes: int, devices_per_node: int, gpus: bool, gpu: Gpu | None, memory_gib: float | None, threads: int
) -> Cluster:
    per_node = max(1, devices_per_node)  # fewer than one is told by :func:`placement_problems`
    if gpus and gpu:
        host_bytes = int(gpu.host_memory_gib * GIBI) // per_node
        return gpu_cluster(gpu.name, int(gpu.memory_gib * GIBI), nodes * per_node, per_node, host_bytes)
    memory = int(memory_gib * GIBI) if memory_gib else available_memory()
    return Cluster(
        device_name=f"{threads} cores of a node",
        devices=nodes * per_node,
        devices_per_node=per_node,
        memory_bytes_per_device=memory // per_node,
        peak_flops=core_flops() * threads,
        memory_bytes_per_second=CPU_MEMORY,
        link_bytes_per_second=CPU_LINK,
        network_bytes_per_second=CPU_LINK,
    )


def placement_problems(spec: JobSpec, home: Path) -> Iterator[Problem]:
    """What keeps the job off its back-end, as far as can be said without asking it."""
    name = spec.execution.profile
    profiles = load_profiles(home)
    if name not in profiles:
        yield Problem("execution.profile", name, "unknown profile", remedy(name, profiles))
    elif spec.execution.backend == "slurm":
        yield from _slurm_problems(spec, profiles[name])
    elif spec.execution.backend == "ray":
        yield from _ray_problems(spec, profiles[name])
    elif spec.execution.backend == "kubernetes":
        yield from _kubernetes_problems(spec, profiles[name], home)


def _dispatches() -> bool:
    """Whether jobs may be dispatched from here: an API without Ray has a dispatcher elsewhere, with what that needs."""
    return find_spec("ray") is not None


def _slurm_problems(spec: JobSpec, profile: Profile) -> Iterator[Problem]:
    options, threads = spec.execution.slurm or SlurmOptions(), spec.execution.threads_per_rank
    if _dispatches() and profile.slurm.rest is None and shutil.which("sbatch") is None:
        how = "submit where Slurm's commands are, or the operator names slurmrestd as slurm.rest in the profile"
        yield Problem("execution.backend", "slurm", "sbatch is not on this machine", how)
    if options.devices_per_node(threads) == 0:
        what = f"one rank needs {threads} (execution.threads_per_rank)"
        yield Problem("execution.slurm.cpus_per_node", options.cpus_per_node, what, f"use {threads} or more")
    allowed = profile.slurm.partitions
    if allowed is not None and options.partition not in allowed:
        what = "the profile does not offer this partition" if options.partition else "the profile wants one named"
        yield Problem("execution.slurm.partition", options.partition, what, f"use one of {', '.join(allowed)}")
    if options.gpus_per_node and profile.slurm.gpu is None:
        yield _unknown_gpus(spec, "slurm")


def _ray_problems(spec: JobSpec, profile: Profile) -> Iterator[Problem]:
    name = spec.execution.profile
    if profile.ray is None:
        how = f"the operator adds ray: {{address: http://HEAD:8265}} to it in {FILE}, or name another profile"
        yield Problem("execution.profile", name, "it says of no Ray cluster", how)
        return
    if profile.ray.gpus_per_node and profile.ray.gpu is None:
        yield _unknown_gpus(spec, "ray")
    if not profile.ray.gpus_per_node and profile.ray.cpus_per_node < spec.execution.threads_per_rank:
        what = f"a node of the cluster offers {profile.ray.cpus_per_node} processors"
        yield Problem("execution.threads_per_rank", spec.execution.threads_per_rank, what, "use no more than that")
    yield from _relative_paths(spec)


def _kubernetes_problems(spec: JobSpec, profile: Profile, home: Path) -> Iterator[Problem]:
    offer, name, threads = profile.kubernetes, spec.execution.profile, spec.execution.threads_per_rank
    options = spec.execution.kubernetes or KubernetesOptions()
    if offer is None:
        how = f"the operator adds kubernetes: {{image: ..., volumes: ...}} to it in {FILE}, or name another profile"
        yield Problem("execution.profile", name, "it says of no Kubernetes cluster", how)
        return
    if _dispatches() and find_spec("kubernetes") is None:
        how = "pip install 'espalier-service[kubernetes]' where jobs are submitted"
        yield Problem("execution.backend", "kubernetes", "its client is not installed", how)
    if options.devices_per_node(threads) == 0:
        what = f"one rank needs {threads} (execution.threads_per_rank)"
        yield Problem("execution.kubernetes.cpus_per_node", options.cpus_per_node, what, f"use {threads} or more")
    memory = options.memory_gib_per_node or offer.memory_gib_per_node
    if memory and options.shared_memory_gib >= memory:
        what = f"/dev/shm is part of a pod's memory, {memory:g} GiB"
        yield Problem(
            "execution.kubernetes.shared_memory_gib", options.shared_memory_gib, what, "use less, or more memory"
        )
    yield from _queue_problems(options, offer)
    if options.priority_class and options.priority_class not in offer.priority_classes:
        what = "the profile does not offer this priority class"
        yield Problem(
            "execution.kubernetes.priority_class", options.priority_class, what, _one_of(offer.priority_classes)
        )
    if options.gpus_per_node and offer.gpu is None:
        yield _unknown_gpus(spec, "kubernetes")
    if not offer.holds(home) and not places.is_mirrored(home.absolute() / JOBS):
        how = f"the operator mounts it at the same path, under kubernetes.volumes in {FILE}"
        yield Problem("execution.profile", name, f"no volume of its pods holds the home {home}", how)
    yield from _relative_paths(spec)


def _queue_problems(options: KubernetesOptions, offer: KubernetesProfile) -> Iterator[Problem]:
    field, queue = "execution.kubernetes.queue", options.queue
    if queue and offer.queue_kind is None:
        yield Problem(field, queue, "the profile knows no queues", "leave it out")
    elif offer.queue_kind and offer.queues is not None and queue not in offer.queues:
        what = "the profile does not offer this queue" if queue else "the profile wants one named"
        yield Problem(field, queue, what, _one_of(offer.queues))
    elif offer.queue_kind == "kueue" and not queue:  # nobody would ever let it in
        yield Problem(field, queue, "Kueue lets in what has a queue", "name one: kubectl get localqueues")


def _one_of(names: list[str]) -> str:
    return f"use one of {', '.join(names)}" if names else "leave it out"


def _relative_paths(spec: JobSpec) -> Iterator[Problem]:
    for field, path in _paths(spec):
        if "://" not in path and not path.startswith(("/", "builtin:")):
            yield Problem(field, path, "the cluster's nodes do not stand in this folder", "write the whole path")


def _unknown_gpus(spec: JobSpec, part: str) -> Problem:
    how = f"the operator adds {part}: {{gpu: {{name: ..., memory_gib: ...}}}} to it in {FILE}"
    return Problem("execution.profile", spec.execution.profile, "it does not say what the GPUs are", how)


def _paths(spec: JobSpec) -> Iterator[tuple[str, str]]:
    """Fields that hold paths."""
    for index, path in enumerate(spec.data.train):
        yield f"data.train.{index}", path
    if isinstance(spec.data.validation, list):
        for index, path in enumerate(spec.data.validation):
            yield f"data.validation.{index}", path
    for index, candidate in enumerate(spec.candidates):
        if candidate.source is not None:
            yield f"candidates.{index}.source", candidate.source
