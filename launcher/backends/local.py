"""The back-end of this machine: a coordinator process with a Ray cluster of its own, which both end together.

The coordinator leads a session of its own, in which Ray's servers live too; Ray's workers follow the servers. So ending
that process group ends everything, also after the coordinator has been killed.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil

from launcher.backends.base import BackendStatus, Handle, Phase
from launcher.backends.common import tail, working_directory
from launcher.backends.spare import Spare, find_spare, own_processes
from launcher.environment import default_devices, own_cluster, python_path, short_temp_dir
from launcher.journal import Journal, is_process
from parallelism import places

OWN = "own"
SPARE_SECONDS = 20.0
"""No more often is a coordinator made ready: one that cannot start shall not take the whole machine."""


class LocalBackend:
    """Runs jobs on this machine. ``module`` is what the coordinator's process runs."""

    def __init__(self, module: str = "launcher.coordinator", outlive: bool = False) -> None:
        """``outlive``: the job goes on when this process ends; otherwise it checkpoints and ends, too."""
        self._module = module
        self.outlives = outlive
        self._children: dict[int, subprocess.Popen[bytes]] = {}
        self._spare: Spare | None = None
        self._next_spare = 0.0
        self._lock = threading.Lock()

    def keep_spare(self, wanted: bool) -> None:
        """Have a coordinator ready for the next job, or none. Returns at once; call it again and again."""
        with self._lock:
            if self._spare and not (wanted and self._spare.alive):
                self._spare.end()
                self._spare = None
            if wanted and self._spare is None and time.monotonic() >= self._next_spare:
                self._spare, self._next_spare = Spare(), time.monotonic() + SPARE_SECONDS

    def _give_spare(self, journal: Journal) -> Handle | None:
        """The coordinator that was ready, now at work on this job; None where there is none, or none for it."""
        with self._lock:
            spare = self._spare
            if spare is None or not spare.fits(journal):
                return None
            self._spare = None
        try:
            handle = spare.give(journal)
        except FileNotFoundError:
            spare.end()
            return None
        self._children[spare.process.pid] = spare.process
        return handle

    def submit(self, journal: Journal) -> Handle:
        """Start one coordinator for the job, or give it the one that is ready."""
        return self._give_spare(journal) or self._start(journal)

    def _start(self, journal: Journal) -> Handle:
        execution = journal.spec().execution
        ray_dir = Path(tempfile.mkdtemp(prefix="esp-", dir=short_temp_dir()))
        devices = execution.devices or default_devices(execution.threads_per_rank)
        command = [sys.executable, "-m", self._module, journal.location]
        command += ["--address", OWN, "--devices", str(devices), "--ray-dir", str(ray_dir)]
        if not self.outlives:
            command += ["--keeper", str(os.getpid())]
        with open(places.need(journal.log_path("coordinator")), "ab") as log:
            child = subprocess.Popen(
                command,
                cwd=working_directory(journal),
                env={**os.environ, **own_cluster(), "PYTHONPATH": python_path()},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._children[child.pid] = child
        return {"pid": child.pid, "created": psutil.Process(child.pid).create_time(), "ray_dir": str(ray_dir)}

    def find(self, journal: Journal) -> Handle | None:
        """The coordinator that works on the job already, whoever started it."""
        wanted = journal.location
        for process in own_processes():
            command = process.info["cmdline"]
            if command[1:4] == ["-m", self._module, wanted]:
                ray_dir = command[command.index("--ray-dir") + 1]
                return {"pid": process.pid, "created": process.info["create_time"], "ray_dir": ray_dir}
        return find_spare(journal)

    def status(self, handle: Handle) -> BackendStatus:
        """Where the coordinator stands. Once it has ended, what it may have left behind is ended, too."""
        child = self._children.get(handle["pid"])
        exit_code = child.poll() if child else None
        # A child counts until it can be waited for: its first thread is a zombie before the last one has ended.
        if exit_code is None and (child or is_process(handle["pid"], handle["created"])):
            return BackendStatus(Phase.RUNNING)
        self._clean_up(handle)
        return BackendStatus(Phase.ENDED, _how(exit_code), exit_code)

    def stop(self, handle: Handle, grace_seconds: float) -> None:
        """Ask the coordinator to checkpoint and end; after the grace period nothing of it is left."""
        deadline = time.monotonic() + grace_seconds
        if grace_seconds > 0 and is_process(handle["pid"], handle["created"]):
            with contextlib.suppress(ProcessLookupError):
                os.kill(handle["pid"], signal.SIGTERM)
        while time.monotonic() < deadline and self.status(handle).phase is not Phase.ENDED:
            time.sleep(0.1)
        self._clean_up(handle)
        child = self._children.get(handle["pid"])
        if child:
            child.wait()

    def logs(self, handle: Handle, journal: Journal, lines: int = 50) -> str:
        """The end of the coordinator's output."""
        return tail(journal.log_path("coordinator"), lines)

    def _clean_up(self, handle: Handle) -> None:
        _kill_group(handle)
        _remove(Path(handle["ray_dir"]))


def _remove(folder: Path) -> None:
    """Processes that were just killed may still have been making files in it."""
    for _ in range(20):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return
        time.sleep(0.1)


def _kill_group(handle: Handle) -> None:
    """End every process of the coordinator's group.

    Its number stays taken as long as one of them lives: where another process has it now, none does.
    """
    if psutil.pid_exists(handle["pid"]) and not is_process(handle["pid"], handle["created"], zombie=True):
        return
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(handle["pid"], signal.SIGKILL)


def _how(exit_code: int | None) -> str:
    if exit_code is None:
        return "it is gone"
    return f"killed by {signal.Signals(-exit_code).name}" if exit_code < 0 else f"exit code {exit_code}"
