"""What a job has left running on this machine."""

import psutil

from launcher.journal import Journal


def left_behind(journal: Journal) -> list[str]:
    """Processes of the job that still run, also those of earlier attempts."""
    pids = {event["pid"]: event["time"] for event in journal.events() if event["kind"] == "process_started"}
    found = []
    for pid, seen in pids.items():
        try:
            process = psutil.Process(pid)
            if process.create_time() <= seen and process.status() != psutil.STATUS_ZOMBIE:
                found.append(f"{pid} {' '.join(process.cmdline())[:80]}")
        except psutil.NoSuchProcess:
            continue
    return found
