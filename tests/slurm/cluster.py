"""A real Slurm on this machine: munged, slurmctld, and two nodes with addresses of their own. Needs root.

The controller and the nodes are network namespaces (:mod:`tests.machines`); commands are called from outside of them.
"""

import os
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

from launcher.ray_node import listens
from tests.machines import Machine, machines, start
from tests.ports import free_ports

CONTROLLER = "ctl"
NODES = ("n1", "n2")
CPUS = 2
REST = "slurmrestd"
UP_SECONDS = 60.0

CONFIGURATION = """
ClusterName=espalier
SlurmctldHost=ctl({ctl})
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=10
AuthAltTypes=auth/jwt
AuthAltParameters=jwt_key={folder}/jwt.key
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
MpiDefault=none
ReturnToService=1
KillWait=5
SlurmdTimeout=20
SchedulerParameters=batch_sched_delay=1,sched_interval=2,bf_interval=2,sched_min_interval=0
NodeName=n1 NodeAddr={n1} CPUs={cpus}
NodeName=n2 NodeAddr={n2} CPUs={cpus}
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=120 State=UP GraceTime=60
PartitionName=single Nodes=n1,n2 MaxNodes=1 MaxTime=120 State=UP
PartitionName=urgent Nodes=n1,n2 MaxTime=120 State=UP PriorityTier=10 PreemptMode=OFF
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{preemption}
"""


@dataclass
class RealSlurm:
    """One that is up; its commands need :attr:`environment`."""

    folder: Path
    machines: dict[str, Machine]
    daemons: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    rest_url: str = ""

    @property
    def environment(self) -> dict[str, str]:
        """What its commands are told."""
        return {"SLURM_CONF": str(self.folder / "slurm.conf")}

    def call(self, *command: str) -> str:
        """Run one of Slurm's commands to its end; its output."""
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout

    def configure(self, preemption: str = "SlurmctldParameters=preempt_send_user_signal") -> None:
        """Write down how it works; ``preemption``: a line about that. Daemons that are up are told."""
        addresses = {name: machine.address for name, machine in self.machines.items()}
        text = CONFIGURATION.format(folder=self.folder, cpus=CPUS, preemption=preemption, **addresses)
        (self.folder / "slurm.conf").write_text(text, encoding="utf-8")
        if CONTROLLER in self.daemons:
            self.call("scontrol", "reconfigure")

    def state_of(self, node: str) -> str:
        """The node's state, in Slurm's word."""
        return self.call("sinfo", "--noheader", "--Node", f"--nodes={node}", "--format=%T").split()[0]

    def start_daemon(self, name: str, *command: str) -> None:
        """Start one of its daemons in the foreground, on the machine of this name if there is one."""
        log, environment = self.folder / f"{name}.out", os.environ | self.environment
        if name in self.machines:
            self.daemons[name] = start(self.machines[name], command, log, environment)
            return
        with open(log, "ab") as file:
            self.daemons[name] = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=environment
            )

    def start_node(self, name: str) -> None:
        """Start the daemon of a node."""
        self.start_daemon(name, "slurmd", "-D", "-N", name, "-f", str(self.folder / "slurm.conf"))

    def lose_node(self, name: str) -> None:
        """SIGKILL to everything that runs on a node, as when its power fails."""
        self.machines[name].kill()
        self.daemons.pop(name).wait()

    def serve_rest(self) -> str:
        """Start the REST daemon, unless it is up; its address. It answers this machine alone."""
        if REST not in self.daemons:
            (port,) = free_ports(1)
            self.rest_url = f"http://127.0.0.1:{port}"
            # It would not run as root: a service's account is not to be had here.
            command = ["env", "SLURMRESTD_SECURITY=disable_user_check", "SLURM_JWT=daemon", "slurmrestd"]
            command += ["-f", str(self.folder / "slurm.conf"), "-a", "rest_auth/jwt"]
            command += ["-s", "openapi/v0.0.38", f"127.0.0.1:{port}"]  # the others want an accounting database
            self.start_daemon(REST, *command)
            until(lambda: listens(f"127.0.0.1:{port}"), UP_SECONDS)
        return self.rest_url

    def token(self, user: str, seconds: int = 1800) -> str:
        """What Slurm gives a user for the REST daemon."""
        return self.call("scontrol", "token", f"username={user}", f"lifespan={seconds}").strip().partition("=")[2]

    def stop(self) -> None:
        """End the daemons by their own ids, the last one first."""
        for process in reversed(list(self.daemons.values())):
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@contextmanager
def real_slurm() -> Iterator[RealSlurm]:
    """Up inside the block, for this process and its children."""
    folder = Path(tempfile.mkdtemp(prefix="esp-slurm-", dir="/tmp"))
    folder.chmod(0o755)
    try:
        with machines(CONTROLLER, *NODES) as found:
            slurm = RealSlurm(folder, {machine.name: machine for machine in found})
            try:
                _start(slurm)
                with mock.patch.dict(os.environ, slurm.environment):
                    until(lambda: all(slurm.state_of(node) == "idle" for node in NODES), UP_SECONDS)
                    yield slurm
            finally:
                slurm.stop()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _start(slurm: RealSlurm) -> None:
    folder = slurm.folder
    (folder / "state").mkdir()
    key = folder / "munge.key"
    for path in (key, folder / "jwt.key"):
        with open(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600), "wb") as file:
            file.write(secrets.token_bytes(128))
    munge = [f"--key-file={key}", f"--socket={folder}/munge.socket", f"--pid-file={folder}/munged.pid"]
    munge += [f"--log-file={folder}/munged.log", f"--seed-file={folder}/munged.seed"]
    slurm.start_daemon("munged", "munged", "--foreground", "--force", *munge)
    until((folder / "munge.socket").exists, UP_SECONDS)
    slurm.configure()
    slurm.start_daemon(CONTROLLER, "slurmctld", "-D", "-f", str(folder / "slurm.conf"))
    for node in NODES:
        (folder / f"spool-{node}").mkdir()
        slurm.start_node(node)


def until(condition: Callable[[], object], seconds: float) -> None:
    """Wait for something. Raises ``TimeoutError``."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {seconds:g} s")
        time.sleep(0.1)
