"""System metrics of the nodes a job runs on, gathered without a monitoring service. Torch-free."""

import contextlib
import os
import socket
from typing import Any

import psutil
import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

SystemMetrics = dict[str, float]


class Meter:
    """Measures the machine it is made on."""

    def __init__(self) -> None:
        psutil.cpu_percent()  # the first call only starts psutil's clock
        self._sent, self._received = _network_bytes()

    def measure(self, directory: str = "/") -> SystemMetrics:
        """CPU load since the last call, memory, the disk that holds ``directory``, traffic since the meter was made.

        Bytes and percent.
        """
        memory, disk = psutil.virtual_memory(), psutil.disk_usage(directory)
        sent, received = _network_bytes()
        return {
            "cpu_percent": psutil.cpu_percent(),
            "load_1min": os.getloadavg()[0],
            "memory_bytes": float(memory.total - memory.available),
            "memory_percent": float(memory.percent),
            "disk_free_bytes": float(disk.free),
            "network_sent_bytes": float(sent - self._sent),
            "network_received_bytes": float(received - self._received),
        }


def _network_bytes() -> tuple[int, int]:
    """Sent and received since the machine was started."""
    network = psutil.net_io_counters()
    return (network.bytes_sent, network.bytes_recv) if network else (0, 0)


class NodeLostError(RuntimeError):
    """Ray has given up the node on which this process runs, so that nothing new can be started from here."""


class NodeProbe(Meter):
    """Measures the node it lives on."""

    def node(self) -> str:
        """The node's host name."""
        return socket.gethostname()


class Nodes:
    """The metrics of all nodes: this one is measured here, the others by a probe each. Never waits."""

    def __init__(self, directory: str) -> None:
        self._directory = directory
        self._here = ray.get_runtime_context().get_node_id()
        self._probes: dict[str, Any] = {}
        self._names: dict[str, Any] = {}
        self._asked: dict[str, Any] = {}
        self._meter = Meter()

    def collect(self) -> dict[str, SystemMetrics]:
        """Node name → metrics: fresh for this node, as of the last call for the others.

        Raises :class:`NodeLostError`.
        """
        alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        if self._here not in alive:
            raise NodeLostError(f"Ray has lost the node {self._here} on {socket.gethostname()}")
        found = {socket.gethostname(): self._meter.measure(self._directory)}
        for node_id in sorted(alive - {self._here}):
            answer = self._answer(node_id)
            if answer:
                found[answer[0]] = answer[1]
        return found

    def _answer(self, node_id: str) -> tuple[str, SystemMetrics] | None:
        if node_id not in self._probes:
            self._probes[node_id] = _probe_on(node_id)
            self._names[node_id] = self._probes[node_id].node.remote()
        pending = self._asked.get(node_id)
        if pending is not None and not ray.wait([pending], timeout=0)[0]:
            return None
        self._asked[node_id] = self._probes[node_id].measure.remote(self._directory)
        if pending is not None:
            with contextlib.suppress(RayError):  # the node may just have gone
                return ray.get(self._names[node_id], timeout=1), ray.get(pending, timeout=1)
        return None


def _probe_on(node_id: str) -> Any:
    strategy = NodeAffinitySchedulingStrategy(node_id, soft=False)
    return ray.remote(NodeProbe).options(num_cpus=0, max_restarts=0, scheduling_strategy=strategy).remote()
