"""What processes of a job need, seen from outside."""

import os
import secrets
import threading
import time
from contextlib import suppress
from pathlib import Path

import psutil


class Watcher(threading.Thread):
    """Reads the peak resident set of every process below this one, twice a second."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.stop = threading.Event()
        self.peaks: dict[str, int] = {}
        """Name and pid → bytes."""

    def run(self) -> None:
        """Until told to stop."""
        while not self.stop.wait(0.5):
            for process in psutil.Process().children(recursive=True):
                peak = _peak_bytes(process.pid)
                if peak is not None:
                    name = f"{peak[0]} {process.pid}"
                    self.peaks[name] = max(peak[1], self.peaks.get(name, 0))

    def peak_of(self, pid: int) -> int:
        """Bytes of one process; 0 where it was never seen."""
        return max((peak for name, peak in self.peaks.items() if name.endswith(f" {pid}")), default=0)


def _peak_bytes(pid: int) -> tuple[str, int] | None:
    """Name and VmHWM of a process; None where it has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = dict(line.split(":", 1) for line in status.splitlines())
    return (fields["Name"].strip(), int(fields["VmHWM"].split()[0]) * 1024) if "VmHWM" in fields else None


MARK = "ESPALIER_CAMPAIGN"


def mark_campaign() -> None:
    """From here on every process that this one starts, and theirs, can be told from others."""
    os.environ[MARK] = secrets.token_hex(8)


def left_behind(seconds: float) -> list[str]:
    """Marked processes that still live, also those that no journal knows, given so long to end."""
    deadline = time.monotonic() + seconds
    while (found := _marked()) and time.monotonic() < deadline:
        time.sleep(0.2)
    return found


def _marked() -> list[str]:
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            marked = process.pid != os.getpid() and process.environ().get(MARK) == os.environ[MARK]
            if marked and process.status() != psutil.STATUS_ZOMBIE:
                found.append(f"process {process.pid} is left behind: {' '.join(process.cmdline())[:120]}")
    return found
