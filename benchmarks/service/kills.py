"""The service under fire: SIGKILL of API, dispatcher and coordinators at random moments while jobs run.

The jobs' coordinators are those of the tests (they need no cluster): what is looked at is who works on a job, from
where, and how often. Every accepted job has to end ``succeeded``, no event of an older epoch may stand behind a newer
one's beginning, each job's steps have to go on from a checkpoint, and nothing may be left. Exit code 1 otherwise.

    python benchmarks/service/kills.py [--jobs 20] [--kills 60] [--seed 1]
"""

import argparse
import json
import os
import random
import re
import signal
import sys
import tempfile
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import psutil

from launcher.jobs import Home, list_jobs
from launcher.states import JobState
from services.client import Client
from tests.services.running import Running, text_files, tiny_job, up

RESULTS = Path(__file__).resolve().parents[1] / "results" / "service_kills.json"
COORDINATOR = "tests.services.quick_coordinator"
STEPS = 120


def children_of(service: Running) -> dict[str, list[psutil.Process]]:
    """The service's processes by what they are."""
    found: dict[str, list[psutil.Process]] = {"API": [], "dispatcher": [], "coordinator": []}
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        kinds = {"services.api": "API", "services.dispatcher": "dispatcher", COORDINATOR: "coordinator"}
        if len(words) > 3 and words[2] in kinds and words[3].startswith(str(service.home)):
            found[kinds[words[2]]].append(process)
    return found


def fire(service: Running, kills: int, choose: random.Random) -> Counter[str]:
    """Kill whoever is there, one after another, while jobs are left."""
    struck: Counter[str] = Counter()
    with Client(service.url) as client:
        while struck.total() < kills:
            time.sleep(choose.uniform(0.2, 2.5))
            kind = choose.choice(["API", "dispatcher", "coordinator", "coordinator"])
            victims = children_of(service)[kind]
            if victims:
                choose.choice(victims).kill()
                struck[kind] += 1
            try:
                if not any(job.active for job in client.jobs(limit=200)):
                    break
            except OSError:
                continue  # it was the API
    return struck


def check(home: Path, jobs: list[str]) -> list[str]:
    """What is not as it should be."""
    wrong = []
    journals = {journal.job_id: journal for journal in list_jobs(Home(home))}
    for job in jobs:
        if job not in journals:
            wrong.append(f"{job} is lost")
            continue
        journal = journals[job]
        if journal.state() is not JobState.SUCCEEDED:
            wrong.append(f"{job} is {journal.state()}")
        epochs = [event["epoch"] for event in journal.events()]
        if epochs != sorted(epochs):
            wrong.append(f"{job}: two epochs at once")
        log = (journal.logs_dir / "coordinator.log").read_text()
        steps = [(int(epoch), int(step)) for step, epoch in re.findall(r"step (\d+) of epoch (\d+)", log)]
        for (epoch, step), (later, following) in pairwise(steps):
            if following != step + 1 and (later == epoch or following > step + 1):
                wrong.append(f"{job}: step {following} of epoch {later} behind step {step} of epoch {epoch}")
        if steps[-1][1] != STEPS:
            wrong.append(f"{job} ends with step {steps[-1][1]}")
    return wrong


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=20)
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="espalier-kills-") as name:
        home, started = Path(name) / "home", time.monotonic()
        home.mkdir()
        settings = {"coordinator": COORDINATOR, "devices": 4, "lease_seconds": 2.0, "poll_seconds": 0.2}
        (home / "service.yaml").write_text(json.dumps(settings))
        spec = tiny_job(text_files(Path(name) / "text"), seed=STEPS)
        with up(home, "--mlflow", "none") as service:
            with Client(service.url) as client:
                jobs = [client.submit(spec).id for _ in range(given.jobs)]
            struck = fire(service, given.kills, random.Random(given.seed))
            wait(service, jobs)
        wrong = check(home, jobs)
        left = [process.pid for processes in children_of(service).values() for process in processes]
        wrong += [f"process {pid} is left behind" for pid in left]
        attempts = sum(journal.view().epoch for journal in list_jobs(Home(home)))
    result: dict[str, Any] = {
        "jobs": given.jobs,
        "kills": dict(struck),
        "attempts": attempts,
        "seconds": round(time.monotonic() - started),
        "load_average": os.getloadavg()[0],
        "wrong": wrong,
    }
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    return 1 if wrong else 0


def wait(service: Running, jobs: list[str]) -> None:
    """Until every job rests; the API may be starting again."""
    deadline = time.monotonic() + 900
    while time.monotonic() < deadline:
        try:
            with Client(service.url) as client:
                if not any(client.job(job).active for job in jobs):
                    return
        except OSError:
            pass
        time.sleep(1.0)
    service.process.send_signal(signal.SIGINT)


if __name__ == "__main__":
    sys.exit(main())
