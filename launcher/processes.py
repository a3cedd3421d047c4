"""The processes of a job on this machine, found from its journal. Torch-free."""

import contextlib
import os
import signal
import socket
import time

import psutil

from launcher.journal import CLOCK_SECONDS
from launcher.view import JobView

PATIENCE_SECONDS = 5.0
"""Workers end by themselves once their cluster is gone; for this long they are left to it."""


def local_processes(view: JobView, include_coordinator: bool = False) -> list[psutil.Process]:
    """The job's processes that run on this machine now, by its journal; the coordinator only if asked for."""
    found = []
    for event in view.processes.values():
        if event["node"] != socket.gethostname() or (event["role"] == "coordinator" and not include_coordinator):
            continue
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(event["pid"])
            # A younger process than the event merely got the same number.
            if process.create_time() <= event["time"] + CLOCK_SECONDS and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def end_processes(view: JobView, include_coordinator: bool = False) -> None:
    """End what still runs on this machine: a coordinator at once, workers when they do not follow it by themselves."""
    if include_coordinator:
        for process in local_processes(view, include_coordinator=True):
            if view.processes[socket.gethostname(), process.pid]["role"] == "coordinator":
                _kill_session(process.pid)
    deadline = time.monotonic() + PATIENCE_SECONDS
    while (left := local_processes(view)) and time.monotonic() < deadline:
        time.sleep(0.05)
    for process in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(left, timeout=PATIENCE_SECONDS)


def _kill_session(pid: int) -> None:
    """A coordinator that leads its own session takes its Ray servers with it; one that does not goes alone."""
    with contextlib.suppress(ProcessLookupError):
        leads = os.getpgid(pid) == pid
        os.killpg(pid, signal.SIGKILL) if leads else os.kill(pid, signal.SIGKILL)
