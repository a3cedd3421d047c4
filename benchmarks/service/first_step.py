"""From the submission of a job to its first training step: cold, and with a coordinator and workers kept ready.

The job is handed in over HTTP to ``espalier up``, one at a time; the end is the time that its first step stands in
the journal with. Adds to ``../results/service.json``.

    python benchmarks/service/first_step.py [--times 3]
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import psutil

from launcher.backends.spare import MODULE, READY, read_claim
from launcher.journal import Journal
from tests.services.running import Running, text_files, tiny_job, until, up

RESULTS = Path(__file__).resolve().parents[1] / "results" / "service.json"
LIMITS = {"cold": 20.0, "prestarted": 8.0}


def main() -> None:
    """Measure both and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=3)
    times = parser.parse_args().times
    measured = {"cold": measure(times, ()), "prestarted": measure(times, ("--prestart",))}
    document = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    document["submit_to_first_step"] = measured
    RESULTS.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    for name, row in measured.items():
        print(f"{name}: {row['median']:.1f} s (limit {LIMITS[name]:g}); {row['seconds']}")


def measure(times: int, options: tuple[str, ...]) -> dict[str, Any]:
    """Seconds of so many jobs, one after the other."""
    with tempfile.TemporaryDirectory() as name, up(Path(name) / "home", *options) as service:
        spec = tiny_job(text_files(Path(name) / "text"))
        seconds = [first_step(service, spec, bool(options)) for _ in range(times)]
    return {"seconds": seconds, "median": statistics.median(seconds), "load_average": os.getloadavg()[0]}


def first_step(service: Running, spec: dict[str, Any], prestarted: bool) -> float:
    """Of one job."""
    if prestarted:
        until(lambda: spare_ready(service))
    client = service.client()
    begun = time.time()
    job = client.submit(spec).id
    until(lambda: client.job(job).state in ("succeeded", "failed"))
    journal = Journal(service.home / "jobs" / job)
    return round(next(event["time"] for event in journal.events() if event["kind"] == "train.step") - begun, 2)


def spare_ready(service: Running) -> bool:
    """Whether a coordinator of this service waits for a job."""
    ours = {child.pid for child in psutil.Process(service.process.pid).children(recursive=True)}
    commands = [row.info["cmdline"] or [] for row in psutil.process_iter(["cmdline"]) if row.pid in ours]
    folders = [Path(command[3]) for command in commands if command[1:3] == ["-m", MODULE]]
    return any((folder / READY).exists() and read_claim(folder) is None for folder in folders)


if __name__ == "__main__":
    main()
