"""A Ray cluster whose nodes are machines of their own (:mod:`tests.machines`), started as an operator would."""

import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

from launcher.environment import python_path
from tests.launcher.ray_cluster import CPUS, OBJECT_STORE_BYTES, TRIES, UP_SECONDS, NotUp, RayCluster, await_agent
from tests.machines import Machine, machines, start

PORT, DASHBOARD = 6379, 8265


@dataclass
class RayMachines:
    """One that is up; the first machine has Ray's head, which carries no ranks where it offers no processors."""

    folder: Path
    machines: list[Machine]
    head_cpus: int = CPUS
    environment: dict[str, str] = field(default_factory=dict)
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def cluster(self) -> RayCluster:
        """What jobs need to know of it."""
        address = f"http://{self.machines[0].address}:{DASHBOARD}"
        return RayCluster(address, self.folder / "token", len(self.machines) - (self.head_cpus == 0))

    def start(self, machine: Machine) -> None:
        """Ray's servers on one of them."""
        head = self.machines[0]
        cpus = self.head_cpus if machine is head else CPUS
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", f"--num-cpus={cpus}"]
        command += [f"--node-ip-address={machine.address}", f"--object-store-memory={OBJECT_STORE_BYTES}"]
        command += ["--min-worker-port=0", "--max-worker-port=0"]
        command += ["--dashboard-agent-listen-port=0", "--include-log-monitor=false", "--no-monitor"]
        if machine is head:
            command += ["--head", f"--port={PORT}", f"--temp-dir={self.folder}"]
            command += [f"--dashboard-host={machine.address}", f"--dashboard-port={DASHBOARD}"]
        else:
            command += [f"--address={head.address}:{PORT}"]
        own = ("RAY_AUTH_TOKEN", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "RAY_ADDRESS", "GLOO_SOCKET_IFNAME")
        environment = {key: value for key, value in os.environ.items() if key not in own}
        environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(self.folder / "token")}
        environment |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_health_check_period_ms": "1000"}
        environment |= {"PYTHONPATH": python_path(), **self.environment}
        self._log(machine).unlink(missing_ok=True)
        self.processes[machine.name] = start(machine, command, self._log(machine), environment)

    def _log(self, machine: Machine) -> Path:
        return self.folder / f"{machine.name}.log"

    def is_up(self, machine: Machine) -> bool:
        """Whether Ray's servers have started on one of them."""
        return not self.has_ended(machine) and "Ray runtime started" in self._log(machine).read_text(encoding="utf-8")

    def has_ended(self, machine: Machine) -> bool:
        """Whether Ray's servers have ended by themselves."""
        return self.processes[machine.name].poll() is not None

    def kill(self, machine: Machine) -> list[int]:
        """SIGKILL to everything that runs on one of them, jobs' processes included; the ids."""
        killed = machine.kill()
        self.processes.pop(machine.name).wait()
        return killed

    def bring_up(self, *found: Machine) -> None:
        """Start Ray on some of them and wait until it is up; as an operator's service would, again and again.

        One after another: on one disk, two that start at once choose the same names for their sockets. And Ray gives
        its servers thirty seconds, which may be too few on a busy machine. Raises :class:`NotUp`.
        """
        for machine in found:
            self.start(machine)
            tries, deadline = 1, time.monotonic() + UP_SECONDS
            while not self.is_up(machine):
                if time.monotonic() > deadline or (self.has_ended(machine) and tries == TRIES):
                    raise NotUp(self._log(machine).read_text(encoding="utf-8"))
                if self.has_ended(machine):
                    self.kill(machine)
                    self.start(machine)
                    tries += 1
                time.sleep(0.2)

    def await_jobs(self) -> None:
        """Wait until a job could be submitted. Raises :class:`NotUp`."""
        await_agent(self.cluster, list(self.processes.values()))


@contextmanager
def ray_machines(
    names: Sequence[str],
    head_cpus: int = CPUS,
    environment: dict[str, str] | None = None,
    found: list[Machine] | None = None,
) -> Iterator[RayMachines]:
    """Up inside the block; it asks for a token. ``environment``: what its servers are told besides.

    ``found``: machines that are there already, with these names.
    """
    folder = Path(tempfile.mkdtemp(prefix="esp-", dir="/tmp"))
    try:
        (folder / "token").write_text(secrets.token_hex(32), encoding="ascii")
        with machines(*names) if found is None else nullcontext(found) as ready:
            cluster = RayMachines(folder, ready, head_cpus, environment or {})
            try:
                cluster.bring_up(*ready)
                cluster.await_jobs()
                yield cluster
            finally:
                for machine in [one for one in ready if one.name in cluster.processes]:
                    cluster.kill(machine)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
