"""One node of a Ray cluster that lives as long as its job: ``python -m launcher.ray_node JOURNAL_DIR --head NODE …``.

A batch system starts one on each node of an allocation. On the head it starts Ray's servers and then the coordinator,
and ends with it; elsewhere it joins the head, again and again until the head is gone. Torch-free, and does not import
Ray.
"""

import argparse
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from launcher.attend import attend
from launcher.environment import end_with_parent
from launcher.policy import TEMPORARY_EXIT_CODE
from parallelism.private import private_folder

HEAD_SECONDS = 180.0
"""How long nodes wait for the head to come up."""
LOST_HEAD_SECONDS = 60.0
"""How long they wait for one that was there; a head that has done its work says so."""
HEAD_TRIES = 3
PATIENCE_SECONDS = 10.0
KILLED = 128 + signal.SIGKILL
OBJECT_STORE_BYTES = 256 * 2**20
"""Only small messages pass through Ray; tensors travel through files and collectives."""
AT_ONCE = {"RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0"}
"""Servers that are asked to end have nothing left to do; Ray would have them wait for their end until it is forced."""
NODE_NAME = "SLURMD_NODENAME"
"""Where Slurm says which node this is."""


@dataclass(frozen=True)
class Node:
    """How a node takes part; ``name`` and ``head`` are the batch system's names, ``address`` is HOST:PORT."""

    journal: Path
    name: str
    head: str
    address: str
    nodes: int
    cpus: int
    gpus: int
    devices: int | None
    module: str
    ray_dir: Path
    stop_file: Path

    @property
    def done_file(self) -> Path:
        """Appears when the head has done its work."""
        return Path(f"{self.stop_file}.done")

    @property
    def is_head(self) -> bool:
        """Whether Ray's head and the coordinator run here."""
        return self.name == self.head

    def ray_command(self) -> list[str]:
        """What starts Ray's servers; they stay children of the command."""
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats"]
        command += [f"--num-cpus={self.cpus}", f"--num-gpus={self.gpus}"]
        command += [f"--object-store-memory={OBJECT_STORE_BYTES}", "--dashboard-agent-listen-port=0"]
        # Workers listen wherever there is room: another job's node may be on this machine.
        command += ["--min-worker-port=0", "--max-worker-port=0"]
        # Processes write their own logs, and nothing scales.
        command += ["--include-log-monitor=false", "--no-monitor"]
        if not self.is_head:
            return [*command, f"--address={self.address}"]
        host, _, port = self.address.rpartition(":")
        command += ["--head", f"--node-ip-address={host_address(host)}", f"--port={port}"]
        return [*command, f"--temp-dir={self.ray_dir}", "--include-dashboard=false"]

    def coordinator_command(self) -> list[str]:
        """What drives the job."""
        command = [sys.executable, "-m", self.module, str(self.journal)]
        command += ["--address", self.address, "--nodes", str(self.nodes)]
        return command + (["--devices", str(self.devices)] if self.devices else [])


def run(node: Node) -> int:
    """Take part until the job's coordinator has ended; the head returns its exit code, others 0."""
    for folder in [*_earlier_dirs(node.ray_dir), *([node.ray_dir] if node.is_head else [])]:
        shutil.rmtree(folder, ignore_errors=True)
    private_folder(node.ray_dir)  # Ray would let everybody in
    try:
        return _lead(node) if node.is_head else _follow(node)
    finally:
        if node.is_head:
            node.done_file.touch()
        shutil.rmtree(node.ray_dir, ignore_errors=True)


def _earlier_dirs(ray_dir: Path) -> list[Path]:
    """Those of the job's earlier lives, which end in ``.LIFE``: what was killed could not remove its own."""
    stem, _, life = ray_dir.name.rpartition(".")
    return [ray_dir.with_name(f"{stem}.{number}") for number in range(int(life))] if life.isdigit() else []


def _lead(node: Node) -> int:
    """Servers that do not come up, as on a busy machine, or end under the coordinator, are started again."""
    for _ in range(HEAD_TRIES):
        with _servers(node) as servers:
            if _comes_up(node, servers):
                code = attend(node.coordinator_command(), node.stop_file, lambda: servers.poll() is None)
                if servers.poll() is None or code != KILLED:
                    return code
        print(f"Ray's head at {node.address} has ended, or did not come up", file=sys.stderr, flush=True)
    return TEMPORARY_EXIT_CODE


def _comes_up(node: Node, servers: subprocess.Popen[bytes]) -> bool:
    deadline = time.monotonic() + HEAD_SECONDS
    while not listens(node.address):
        if servers.poll() is not None or time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True


def _follow(node: Node) -> int:
    """Ray's servers may also end by themselves, or not come up: the job gets its node back then."""
    deadline = time.monotonic() + HEAD_SECONDS
    while time.monotonic() < deadline and not node.done_file.exists():
        if not listens(node.address):
            time.sleep(0.5)
            continue
        with _servers(node) as servers:
            while servers.poll() is None and listens(node.address) and not node.done_file.exists():
                time.sleep(1.0)
        deadline = time.monotonic() + LOST_HEAD_SECONDS
    return 0


@contextmanager
def _servers(node: Node) -> Iterator[subprocess.Popen[bytes]]:
    """Ray's servers of this node, in a process group of their own, which is gone after the block.

    It also ends with this process: a batch system kills what it knows of, and a head that was left would be taken for
    that of the job's next life, which listens at the same address.
    """
    servers = subprocess.Popen(
        node.ray_command(),
        env=os.environ | AT_ONCE,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=end_with_parent(),
    )
    try:
        yield servers
    finally:
        _end_group(servers)


def _end_group(servers: subprocess.Popen[bytes]) -> None:
    for number, seconds in ((signal.SIGTERM, PATIENCE_SECONDS), (signal.SIGKILL, PATIENCE_SECONDS)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(servers.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            servers.wait(seconds)


def listens(address: str) -> bool:
    """Whether somebody takes connections at HOST:PORT; one who is slow to does, too."""
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host, int(port)), timeout=20.0):
            return True
    except TimeoutError:
        return True
    except OSError:
        return False


def host_address(host: str) -> str:
    """The address behind a name; Ray's nodes know each other by addresses."""
    return socket.gethostbyname(host)


def parse(arguments: Sequence[str] | None = None) -> Node:
    """A node from the command line."""
    parser = argparse.ArgumentParser(prog="python -m launcher.ray_node", description="One node of a job's Ray cluster.")
    parser.add_argument("journal", type=Path, metavar="JOURNAL_DIR", help="the job's directory")
    parser.add_argument(
        "--name", default=os.environ.get(NODE_NAME, ""), help=f"this node's name; default: ${NODE_NAME}"
    )
    parser.add_argument("--head", required=True, help="name of the node on which Ray's head runs")
    parser.add_argument("--address", required=True, metavar="HOST:PORT", help="where the head listens")
    parser.add_argument("--nodes", type=int, default=1, help="how many nodes there are")
    parser.add_argument("--cpus", type=int, required=True, help="processors that Ray may use on this node")
    parser.add_argument("--gpus", type=int, default=0, help="GPUs that Ray may use on this node")
    parser.add_argument("--devices", type=int, help="ranks the job may hold at once; default: what the cluster has")
    parser.add_argument("--module", default="launcher.coordinator", help="what drives the job")
    parser.add_argument(
        "--ray-dir", type=Path, required=True, help="a short directory of Ray's own; removed at the end"
    )
    parser.add_argument("--stop-file", type=Path, required=True, help="asks the coordinator to end when it appears")
    return Node(**vars(parser.parse_args(arguments)))


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of the process."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    return run(parse(arguments))


if __name__ == "__main__":
    sys.exit(main())
