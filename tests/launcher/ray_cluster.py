"""A Ray cluster of two nodes on this machine, started as an operator would: not by this project's code."""

import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx2

from launcher.backends.base import BackendUnavailable
from launcher.backends.ray import JobsApi
from launcher.environment import loopback_interface
from tests.ports import free_ports

UP_SECONDS = 120.0
TRIES = 3
CPUS = 2
OBJECT_STORE_BYTES = 100 * 2**20


@dataclass(frozen=True)
class RayCluster:
    """One that is up; ``address`` is that of its Jobs API."""

    address: str
    token_file: Path
    nodes: int = 2

    def profile(self) -> str:
        """What ``profiles.yaml`` says of it."""
        fields = f"address: '{self.address}', token_file: {self.token_file}, python: {sys.executable}"
        return f"default: {{ray: {{{fields}, nodes: {self.nodes}, cpus_per_node: {CPUS}}}}}\n"


@contextmanager
def ray_cluster() -> Iterator[RayCluster]:
    """Up inside the block; it asks for a token."""
    with ExitStack() as stack:
        for attempt in range(TRIES):
            try:
                cluster = stack.enter_context(_cluster())
                break
            except NotUp:  # Ray gives its servers thirty seconds, which may be too few on a busy machine
                if attempt + 1 == TRIES:
                    raise
        yield cluster


class NotUp(RuntimeError):
    """Ray's servers have ended, or do not answer."""


@contextmanager
def _cluster() -> Iterator[RayCluster]:
    folder = Path(tempfile.mkdtemp(prefix="esp-", dir="/tmp"))
    token_file = folder / "token"
    token_file.write_text(secrets.token_hex(32), encoding="ascii")
    port, dashboard = free_ports(2)
    head = [f"--port={port}", f"--dashboard-port={dashboard}", f"--temp-dir={folder}", "--head"]
    nodes = [_start(folder, "head", head)]
    try:
        cluster = RayCluster(f"http://127.0.0.1:{dashboard}", token_file)
        _await(f"127.0.0.1:{port}", cluster, nodes)
        nodes.append(_start(folder, "second", [f"--address=127.0.0.1:{port}"]))
        await_agent(cluster, nodes)
        yield cluster
    finally:
        for node in reversed(nodes):
            node.send_signal(signal.SIGTERM)
        for node in nodes:
            try:
                node.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(node.pid, signal.SIGKILL)
                node.wait()
        shutil.rmtree(folder, ignore_errors=True)


def _start(folder: Path, name: str, arguments: list[str]) -> "subprocess.Popen[bytes]":
    # What the tests set for clusters of a single process does not hold here.
    own = ("RAY_AUTH_TOKEN", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "RAY_ADDRESS")
    environment = {key: value for key, value in os.environ.items() if key not in own}
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(folder / "token")}
    environment |= {"GLOO_SOCKET_IFNAME": loopback_interface(), "RAY_USAGE_STATS_ENABLED": "0"}
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", f"--num-cpus={CPUS}", *arguments]
    command += ["--min-worker-port=0", "--max-worker-port=0", f"--object-store-memory={OBJECT_STORE_BYTES}"]
    command += ["--dashboard-agent-listen-port=0", "--include-log-monitor=false", "--no-monitor"]
    with open(folder / f"{name}.log", "ab") as log:
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, start_new_session=True
        )


def _await(address: str, cluster: RayCluster, nodes: "list[subprocess.Popen[bytes]]") -> None:
    headers = {"Authorization": f"Bearer {cluster.token_file.read_text()}"}
    deadline = time.monotonic() + UP_SECONDS
    while time.monotonic() < deadline:
        if nodes[0].poll() is not None:
            raise NotUp(f"Ray's head at {address} has ended")
        try:
            answer = httpx2.get(f"{cluster.address}/api/jobs/", headers=headers, timeout=5, trust_env=False)
        except httpx2.TransportError:
            time.sleep(0.2)
            continue
        if answer.is_success:
            return
        time.sleep(0.2)
    raise NotUp(f"no Jobs API at {cluster.address}")


def await_agent(cluster: RayCluster, nodes: "list[subprocess.Popen[bytes]]") -> None:
    """The Jobs API answers before there is anybody to run a job."""
    jobs = JobsApi(cluster.address, cluster.token_file)
    deadline = time.monotonic() + UP_SECONDS
    while True:
        try:
            jobs.submit({"submission_id": f"first-{secrets.token_hex(4)}", "entrypoint": "true"})
            return
        except BackendUnavailable as error:
            if time.monotonic() > deadline or any(node.poll() is not None for node in nodes):
                raise NotUp(str(error)) from error
            time.sleep(0.5)
