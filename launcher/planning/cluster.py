"""What a job runs on, as far as planning needs to know. Torch-free."""

import os
import subprocess
import sys
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from launcher.environment import default_devices
from launcher.spec import JobSpec
from parallelism.host_memory import available_memory
from parallelism.options import Options
from parallelism.rules import DeviceKind

MEBI, GIBI = 2**20, 2**30
QUERY_SECONDS = 20.0
"""How long ``nvidia-smi`` and the measurement of a core may take; both need well under a second."""


class Cluster(Options):
    """Equal devices on equal nodes. A device is a GPU, or on CPUs one rank with its threads."""

    device_kind: DeviceKind = "cpu"
    device_name: str = ""
    devices: PositiveInt
    devices_per_node: PositiveInt
    memory_bytes_per_device: PositiveInt
    host_memory_bytes_per_device: NonNegativeInt = Field(default=0, description="GPUs: for what is offloaded")
    peak_flops: PositiveFloat = Field(
        description="FLOP/s of one device in large matrix products (GPUs: bf16, CPUs: fp32)"
    )
    memory_bytes_per_second: PositiveFloat = Field(default=1e10, description="of one device")
    link_bytes_per_second: PositiveFloat = Field(
        description="between devices of a node, where tensor parallelism stays"
    )
    network_bytes_per_second: PositiveFloat = Field(description="between nodes, per device")
    link_latency_seconds: NonNegativeFloat = Field(default=2e-4, description="of one collective inside a node")
    network_latency_seconds: NonNegativeFloat = Field(default=2e-4, description="of one collective between nodes")


@dataclass(frozen=True)
class Gpu:
    """Makers' figures of a GPU: dense bf16 FLOP/s, bytes/s of its memory and, per direction, to its neighbours."""

    flops: float
    memory: float
    link: float


GPUS = {
    "B200": Gpu(2250e12, 8.0e12, 900e9),
    "H200": Gpu(989e12, 4.8e12, 450e9),
    "H100 PCIE": Gpu(756e12, 2.0e12, 64e9),
    "H100 NVL": Gpu(835e12, 3.9e12, 300e9),
    "H100": Gpu(989e12, 3.35e12, 450e9),
    "A100": Gpu(312e12, 2.0e12, 300e9),
    "L40S": Gpu(362e12, 0.86e12, 32e9),
    "L4": Gpu(121e12, 0.3e12, 32e9),
    "A10": Gpu(125e12, 0.6e12, 32e9),
    "V100": Gpu(125e12, 0.9e12, 150e9),
    "RTX 4090": Gpu(165e12, 1.0e12, 32e9),
    "RTX 3090": Gpu(71e12, 0.94e12, 32e9),
    "T4": Gpu(65e12, 0.32e12, 16e9),
}
"""By what ``nvidia-smi`` says; the first name that occurs in it counts, so longer ones stand first."""
UNKNOWN_GPU = Gpu(60e12, 0.5e12, 16e9)

GPU_NETWORK = 50e9
"""400 Gb/s per GPU, as in the usual nodes of eight."""
GPU_LATENCIES = {"link_latency_seconds": 15e-6, "network_latency_seconds": 30e-6}

CPU_LINK, CPU_MEMORY = 2e9, 1e10
"""Bytes/s through gloo between processes of one machine, and of one core to memory: orders of magnitude, which is all
that choosing a layout needs."""


def gpu_cluster(name: str, memory_bytes: int, devices: int, devices_per_node: int = 8, host_bytes: int = 0) -> Cluster:
    """``devices`` GPUs called ``name``, each with ``memory_bytes`` and ``host_bytes`` of its node's memory."""
    wanted = name.upper()
    gpu = next((figures for known, figures in GPUS.items() if known in wanted), UNKNOWN_GPU)
    return Cluster(
        device_kind="gpu",
        device_name=name,
        devices=devices,
        devices_per_node=min(devices, devices_per_node),
        memory_bytes_per_device=memory_bytes,
        host_memory_bytes_per_device=host_bytes,
        peak_flops=gpu.flops,
        memory_bytes_per_second=gpu.memory,
        link_bytes_per_second=gpu.link,
        network_bytes_per_second=GPU_NETWORK,
        **GPU_LATENCIES,
    )


def h100_cluster(devices: int, devices_per_node: int = 8) -> Cluster:
    """H100 SXM 80 GB in nodes of eight with 2 TiB."""
    return gpu_cluster("NVIDIA H100 80GB HBM3", 80 * GIBI, devices, devices_per_node, host_bytes=256 * GIBI)


def local_cluster(spec: JobSpec) -> Cluster:
    """This machine: its GPUs, or as many ranks as it carries without sharing cores; no more than ``execution.devices``.

    On CPUs ``execution.devices`` may also ask for more ranks than there are cores, which then share them.
    """
    threads, wanted = spec.execution.threads_per_rank, spec.execution.devices
    gpus = local_gpus()
    if gpus:
        devices = min(len(gpus), wanted or len(gpus))
        name, memory = min(gpus, key=lambda gpu: gpu[1])
        return gpu_cluster(name, memory, devices, devices, host_bytes=available_memory() // devices)
    devices, cores = wanted or default_devices(threads), len(os.sched_getaffinity(0))
    return Cluster(
        device_name=f"{threads} of {cores} cores",
        devices=devices,
        devices_per_node=devices,
        memory_bytes_per_device=available_memory() // devices,
        peak_flops=core_flops() * min(threads, cores / devices),
        memory_bytes_per_second=CPU_MEMORY,
        link_bytes_per_second=CPU_LINK,
        network_bytes_per_second=CPU_LINK,
    )


def local_gpus() -> list[tuple[str, int]]:
    """Name and memory in bytes of every GPU that training here would use; none where torch is built without CUDA."""
    try:
        if "+cpu" in version("torch"):
            return []
        command = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
        answer = subprocess.run(command, capture_output=True, text=True, timeout=QUERY_SECONDS, check=True).stdout
    except (OSError, subprocess.SubprocessError, PackageNotFoundError):
        return []
    return read_gpus(answer)


def read_gpus(answer: str) -> list[tuple[str, int]]:
    """The answer of ``nvidia-smi``, one line ``NVIDIA H100 80GB HBM3, 81559`` (MiB) for each GPU."""
    rows = [line.rpartition(",") for line in answer.splitlines() if "," in line]
    return [(name.strip(), int(memory) * MEBI) for name, _, memory in rows if memory.strip().isdigit()]


_MEASUREMENT = """
import time, numpy
matrix = numpy.random.default_rng(0).random((512, 512), dtype=numpy.float32)
times = []
for _ in range(12):
    start = time.perf_counter()
    matrix @ matrix
    times.append(time.perf_counter() - start)
print(2 * 512**3 / min(times))
"""


@lru_cache
def core_flops() -> float:
    """FLOP/s of one core in a float32 matrix product, measured once per process.

    In a process of its own, because a BLAS library settles its number of threads when it is loaded.
    """
    one = dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    ended = subprocess.run(
        [sys.executable, "-c", _MEASUREMENT],
        env=os.environ | one,
        capture_output=True,
        text=True,
        timeout=QUERY_SECONDS,
        check=True,
    )
    return float(ended.stdout)
