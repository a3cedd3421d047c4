"""A real Slurm on this machine: munged, slurmctld and two slurmd, which are two nodes to it. Needs root."""

import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

from tests.ports import free_ports

NODES = ("n1", "n2")
CPUS = 2
UP_SECONDS = 60.0

CONFIGURATION = """
ClusterName=espalier
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=20
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
ReturnToService=2
KillWait=5
SchedulerParameters=batch_sched_delay=1,sched_interval=2,bf_interval=2,sched_min_interval=0
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={first} CPUs={cpus}
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={second} CPUs={cpus}
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=120 State=UP
PartitionName=single Nodes=n1,n2 MaxNodes=1 MaxTime=120 State=UP
"""


@dataclass
class RealSlurm:
    """One that is up; its commands need :attr:`environment`."""

    folder: Path
    daemons: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def environment(self) -> dict[str, str]:
        """What its commands are told."""
        return {"SLURM_CONF": str(self.folder / "slurm.conf")}

    def call(self, *command: str) -> str:
        """Run one of Slurm's commands to its end; its output."""
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout

    def state_of(self, node: str) -> str:
        """The node's state, in Slurm's word."""
        return self.call("sinfo", "--noheader", "--Node", f"--nodes={node}", "--format=%T").split()[0]

    def start(self, name: str, *command: str) -> None:
        """Start one of its daemons in the foreground."""
        with open(self.folder / f"{name}.out", "ab") as log:
            self.daemons[name] = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=os.environ | self.environment
            )

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
    slurm = RealSlurm(folder)
    try:
        _start(slurm)
        with mock.patch.dict(os.environ, slurm.environment):
            until(lambda: all(slurm.state_of(node) == "idle" for node in NODES), UP_SECONDS)
            yield slurm
    finally:
        slurm.stop()
        shutil.rmtree(folder, ignore_errors=True)


def _start(slurm: RealSlurm) -> None:
    folder = slurm.folder
    (folder / "state").mkdir()
    key = folder / "munge.key"
    with open(os.open(key, os.O_WRONLY | os.O_CREAT, 0o600), "wb") as file:
        file.write(secrets.token_bytes(128))
    munge = [f"--key-file={key}", f"--socket={folder}/munge.socket", f"--pid-file={folder}/munged.pid"]
    munge += [f"--log-file={folder}/munged.log", f"--seed-file={folder}/munged.seed"]
    slurm.start("munged", "munged", "--foreground", "--force", *munge)
    until((folder / "munge.socket").exists, UP_SECONDS)
    controller, first, second = free_ports(3)
    values = {"host": socket.gethostname().partition(".")[0], "folder": folder, "cpus": CPUS}
    values |= {"controller": controller, "first": first, "second": second}
    configuration = folder / "slurm.conf"
    configuration.write_text(CONFIGURATION.format(**values), encoding="utf-8")
    slurm.start("slurmctld", "slurmctld", "-D", "-f", str(configuration))
    for node in NODES:
        (folder / f"spool-{node}").mkdir()
        slurm.start(node, "slurmd", "-D", "-N", node, "-f", str(configuration))


def until(condition: Callable[[], object], seconds: float) -> None:
    """Wait for something. Raises ``TimeoutError``."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {seconds:g} s")
        time.sleep(0.1)
