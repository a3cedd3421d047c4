"""What a job runs on, as far as planning needs to know. Torch-free."""

import os
import time

import numpy as np
import psutil
from pydantic import PositiveFloat, PositiveInt

from launcher.environment import default_devices
from launcher.spec import JobSpec
from parallelism.options import Options
from parallelism.rules import DeviceKind

GIBI = 2**30
LOCAL_LINK_BYTES_PER_SECOND = 2e9
"""gloo between processes of one machine: the order of magnitude, which is all that choosing a layout needs."""


class Cluster(Options):
    """Equal devices, some of them on one node."""

    device_kind: DeviceKind = "cpu"
    devices: PositiveInt
    devices_per_node: PositiveInt
    memory_bytes_per_device: PositiveInt
    peak_flops: PositiveFloat
    """FLOP/s of one device in large matrix products."""
    link_bytes_per_second: PositiveFloat
    """Between devices of one node; tensor-parallel groups stay on it."""
    network_bytes_per_second: PositiveFloat
    """Between nodes, per device."""


def h100_cluster(devices: int, devices_per_node: int = 8) -> Cluster:
    """H100 SXM 80 GB in nodes of eight: 989 TFLOP/s bf16 dense, NVLink 450 GB/s per direction, 400 Gb/s network."""
    return Cluster(
        device_kind="gpu",
        devices=devices,
        devices_per_node=devices_per_node,
        memory_bytes_per_device=80 * GIBI,
        peak_flops=989e12,
        link_bytes_per_second=450e9,
        network_bytes_per_second=50e9,
    )


def local_cluster(spec: JobSpec) -> Cluster:
    """This machine: as many ranks as it carries without sharing cores, or as ``execution.devices`` asks for."""
    threads = spec.execution.threads_per_rank
    devices = spec.execution.devices or default_devices(threads)
    return Cluster(
        devices=devices,
        devices_per_node=devices,
        memory_bytes_per_device=psutil.virtual_memory().available // devices,
        peak_flops=_measured_flops() / len(os.sched_getaffinity(0)) * threads,
        link_bytes_per_second=LOCAL_LINK_BYTES_PER_SECOND,
        network_bytes_per_second=LOCAL_LINK_BYTES_PER_SECOND,
    )


def _measured_flops(size: int = 768, seconds: float = 0.1) -> float:
    """FLOP/s of all cores together in a float32 matrix product."""
    matrix = np.random.default_rng(0).random((size, size), dtype=np.float32)
    best, end = 0.0, time.perf_counter() + seconds
    while time.perf_counter() < end or best == 0.0:
        start = time.perf_counter()
        matrix @ matrix
        best = max(best, 2 * size**3 / (time.perf_counter() - start))
    return best
