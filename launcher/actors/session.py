"""Connecting a coordinator to Ray: an existing cluster, or one of its own that lives and dies with it. Torch-free."""

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import psutil
import ray

from launcher.environment import default_devices
from launcher.policy import TEMPORARY_EXIT_CODE

OWN = "own"
"""The address that stands for a cluster of the coordinator's own."""

OBJECT_STORE_BYTES = 256 * 2**20
"""Only small messages pass through Ray; tensors travel through files and collectives."""

LONGEST_TEMP_DIR = 30
"""AF_UNIX paths end at 107 bytes, and Ray appends up to 75 of its own."""


START_SECONDS = 180.0
NODES_SECONDS, SILENT_SECONDS = 30.0, 5.0
"""How long a start waits for all nodes of a cluster once one is there, and how long without a word."""

SERVERS = ("gcs_server", "raylet", "log_monitor.py", "monitor.py", "dashboard.py", "DashboardAgent", "RuntimeEnvAgent")


@dataclass(frozen=True)
class Room:
    """What the cluster offers: ranks that can run at once, and what each of them is."""

    devices: int
    threads: int
    gpus: bool
    cores: int


@contextmanager
def ray_session(
    address: str,
    devices: int | None,
    threads: int,
    temp_dir: Path | None,
    nodes: int = 1,
    tell: Callable[[str], None] = lambda _: None,
    stopped: Callable[[], object] = lambda: None,
) -> Iterator[Room]:
    """Connected to Ray inside the block. With :data:`OWN`, the cluster has ``devices`` × ``threads`` CPUs.

    ``devices`` omitted: all that the cluster has, or that this machine carries without sharing cores. A cluster counts
    as having all of its ``nodes``: what one of them would carry is waited for where it is needed. ``tell`` is given the
    reason while not a single one is there, until ``stopped`` says that nobody waits. Raises :class:`RayStartError`.
    """
    with _Start(START_SECONDS):
        if address == OWN:
            _start_own((devices or default_devices(threads)) * threads, temp_dir)
        else:
            ray.init(address=address, log_to_driver=False, configure_logging=False)
    try:
        _await_nodes(nodes, tell, stopped)
        yield measure_room(threads, devices, nodes)
    finally:
        ray.shutdown()


def measure_room(threads: int, most_devices: int | None, nodes: int = 1) -> Room:
    """What the connected cluster offers once it has all of its nodes, no more than ``most_devices`` of it."""
    carrying = carrying_nodes()
    gpus = any(node.get("GPU", 0) for node in carrying)
    found = [int(node.get("GPU", 0)) if gpus else int(node.get("CPU", 0)) // threads for node in carrying]
    promised = sum(found) + max(found, default=0) * max(0, nodes - len(found))
    devices = promised if most_devices is None else min(promised, most_devices)
    return Room(devices=devices, threads=threads, gpus=gpus, cores=physical_cores())


def carrying_nodes() -> list[dict[str, float]]:
    """Resources of the nodes that are up and have any for ranks, which a head may not."""
    resources = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return [one for one in resources if one.get("CPU", 0) or one.get("GPU", 0)]


def _await_nodes(nodes: int, tell: Callable[[str], None], stopped: Callable[[], object]) -> None:
    """Nodes come up at different times, and one may be away for long: one is enough to begin with."""
    started, told = time.monotonic(), False
    while (found := len(carrying_nodes())) < nodes and not stopped():
        waited = time.monotonic() - started
        if found and waited > NODES_SECONDS:
            return
        if waited > SILENT_SECONDS and not told:
            tell(f"Ray's nodes: {found} of {nodes} are up")
            told = True
        time.sleep(0.2)


def physical_cores() -> int:
    """Processors this process may use; on a cluster, those of the coordinator's node times the nodes."""
    alive = [node for node in ray.nodes() if node["Alive"]] if ray.is_initialized() else [None]
    return len(os.sched_getaffinity(0)) * len(alive)


def own_servers() -> list[tuple[str, int]]:
    """Name and pid of the processes that make up a cluster of this process's own, its workers left out."""
    servers = []
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            command = " ".join(child.cmdline())
            name = next((name for name in SERVERS if name in command), None)
            if name:
                servers.append((name, child.pid))
    return servers


class RayStartError(RuntimeError):
    """Ray did not come up; on a machine that is busy it may the next time."""


class _Start:
    """A start of Ray: whatever it raises is a failed start, and one that hangs can only be ended with this process."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._timer = threading.Timer(seconds, self._give_up)
        self._timer.daemon = True

    def __enter__(self) -> None:
        self._timer.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._timer.cancel()
        if isinstance(error, Exception) and not isinstance(error, ValueError):
            raise RayStartError(f"Ray did not start: {error}") from error

    def _give_up(self) -> None:
        print(f"Ray did not start within {self._seconds:g} s", file=sys.stderr, flush=True)
        os._exit(TEMPORARY_EXIT_CODE)


def _start_own(cpus: int, temp_dir: Path | None) -> None:
    if temp_dir is not None and len(os.fsencode(temp_dir)) > LONGEST_TEMP_DIR:
        raise ValueError(f"ray-dir {temp_dir} is too long for Ray's sockets: use at most {LONGEST_TEMP_DIR} bytes")
    ray.init(
        address="local",
        num_cpus=max(cpus, 1),
        include_dashboard=False,
        log_to_driver=False,
        configure_logging=False,
        object_store_memory=OBJECT_STORE_BYTES,
        _temp_dir=str(temp_dir) if temp_dir else None,
    )
