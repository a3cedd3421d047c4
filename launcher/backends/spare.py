"""A coordinator kept ready for the next job of this machine: Ray is up, and workers have imported what ranks need.

Whoever keeps it gives it a job by a file in its folder, and from then on it is that job's coordinator; without one it
ends with its keeper. Torch-free, and does not import Ray.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from launcher.backends.base import Handle
from launcher.environment import default_devices, own_cluster, python_path, short_temp_dir
from launcher.journal import Journal

MODULE = "launcher.spare"
CLAIM, READY, WARM, LOG = "claim.json", "ready", "warm.", "spare.log"
LOADED = "launcher.backends.warm"
EARLY = ("parallelism.run", "parallelism.engines.megatron", "compression.tasks", "torch._dynamo", LOADED)
KEPT = {"RAY_idle_worker_killing_time_threshold_ms": "600000"}
"""Ray ends idle workers after a second, once others hold devices; training shall find those that preparing left."""
FOLDER = "ESPALIER_SPARE"
"""Tells a worker that is started early where to say that it is ready."""
THREADS = 1
"""Threads per rank, as jobs have it that do not say."""


class Spare:
    """One such process, for a job that leaves devices and threads to the machine."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="esp-", dir=short_temp_dir()))
        self.devices = default_devices(THREADS)
        self._working_directory = os.getcwd()
        command = [sys.executable, "-m", MODULE, str(self.folder), "--keeper", str(os.getpid())]
        command += ["--devices", str(self.devices), "--threads", str(THREADS)]
        # Ray starts as many workers as there are devices; they import this before anything is asked of them.
        # Ray tells a worker its threads with the first work, which is too late for a torch that is there already.
        early = {"RAY_preload_python_modules": ",".join(EARLY), "OMP_NUM_THREADS": str(THREADS)}
        early |= {FOLDER: str(self.folder), **KEPT}
        environment = {**os.environ, **own_cluster(), **early}
        with open(self.folder / LOG, "ab") as log:
            self.process = subprocess.Popen(
                command,
                env={**environment, "PYTHONPATH": python_path()},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._created = psutil.Process(self.process.pid).create_time()

    @property
    def alive(self) -> bool:
        """Whether the process is there."""
        return self.process.poll() is None

    def fits(self, journal: Journal) -> bool:
        """Whether it is ready, and as the job wants its coordinator."""
        execution = journal.spec().execution
        return (
            self.alive
            and (self.folder / READY).exists()
            and execution.threads_per_rank == THREADS
            and (execution.devices or self.devices) <= self.devices
            and journal.facts()["working_directory"] == self._working_directory
        )

    def give(self, journal: Journal) -> Handle:
        """Make it the job's coordinator. Raises ``FileNotFoundError`` where it has ended meanwhile."""
        draft = self.folder / f"{CLAIM}.draft"
        claim = {"journal": journal.location, "devices": journal.spec().execution.devices or self.devices}
        draft.write_text(json.dumps(claim), encoding="utf-8")
        draft.rename(self.folder / CLAIM)
        return {"pid": self.process.pid, "created": self._created, "ray_dir": str(self.folder)}

    def end(self) -> None:
        """Nothing of it is left."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


@dataclass(frozen=True)
class Claim:
    """The job that a spare coordinator has been given."""

    journal: str
    devices: int


def read_claim(folder: Path) -> Claim | None:
    """What the process of this folder has been given, if anything; None for a folder of somebody else's, too."""
    try:
        claim = json.loads((folder / CLAIM).read_text(encoding="utf-8"))
    except (FileNotFoundError, PermissionError):
        return None
    return Claim(claim["journal"], claim["devices"])


def own_processes() -> Iterator[psutil.Process]:
    """Those of this user that run, with ``cmdline`` and ``create_time``: others could claim to be anything."""
    for process in psutil.process_iter(["cmdline", "create_time", "uids", "status"]):
        mine = process.info["uids"] is not None and process.info["uids"].real == os.getuid()
        if mine and process.info["cmdline"] and process.info["status"] != psutil.STATUS_ZOMBIE:
            yield process


def find_spare(journal: Journal) -> Handle | None:
    """The process, once a spare one, that works on the job already, whoever started it."""
    for process in own_processes():
        command = process.info["cmdline"]
        if command[1:3] == ["-m", MODULE]:
            claim = read_claim(Path(command[3]))
            if claim and claim.journal == journal.location:
                return {"pid": process.pid, "created": process.info["create_time"], "ray_dir": command[3]}
    return None
