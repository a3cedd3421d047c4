"""A job whose journal is in an S3 server that is killed and started again, at random steps: nothing is lost.

The server is real and keeps its objects on a disk. Each job trains two candidates, one of them tensor-parallel, with a
checkpoint every five steps; the server is away for between two and ten seconds each time. Every job has to bring what
its undisturbed sibling on a file system brings: weights, moments, random states, variants, their quality, the
frontier; the journal has to tell of every step and have no gaps, and nothing may be left on this machine. The price of
the store is told as well: seconds of an undisturbed job there and on a file system. Exit code 1 when something does
not hold.

    python benchmarks/objects/bench.py [--json FILE] [--jobs 3] [--kills 3] [--seed 1]
"""

import argparse
import json
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from launcher.backends.local import LocalBackend
from launcher.jobs import Home, create_job, run_job
from launcher.journal import Journal
from parallelism import places
from tests.finished import STEPS
from tests.launcher.faults import FaultPlan
from tests.launcher.leftovers import left_behind
from tests.launcher.outages import Outages, brought, spec_of, steps_told
from tests.object_store import object_store

RESULTS = Path(__file__).resolve().parents[1] / "results" / "objects.json"
FAULTY = "tests.launcher.faulty_coordinator"
PACE_SECONDS = 0.3
LAST_SECONDS = 120.0


def in_peace(home: Home, folder: Path) -> tuple[Journal, float]:
    """An undisturbed job, and its seconds."""
    journal, started = create_job(spec_of(folder), home), time.monotonic()
    state = run_job(home, journal.job_id, LocalBackend())
    assert state == "succeeded", journal.view().error
    return journal, time.monotonic() - started


def wrong_of(journal: Journal, home: Home, calm: dict[str, Any]) -> list[str]:
    """What a job failed to bring, or left."""
    found = [f"the job is {journal.state()}: {journal.view().error}"] if journal.state() != "succeeded" else []
    left = [str(path) for path in (home.root / "jobs").rglob("*") if path.is_file()]
    found += [f"left on this machine: {left[:3]}"] if left else []
    found += [f"still running: {name}" for name in left_behind(journal)]
    numbers = [event["number"] for event in journal.events()]
    found += ["the journal has gaps"] if numbers != list(range(1, len(numbers) + 1)) else []
    for candidate in ("small", "large"):
        if steps_told(journal, candidate) != list(range(1, STEPS + 1)):
            found.append(f"{candidate}: steps {steps_told(journal, candidate)}")
    if not found:
        got = brought(journal)
        found += [f"{name} differs" for name in calm if got.get(name) != calm[name]]
        places.leave(journal.directory)
    return found


def main() -> int:
    """Run the campaign. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=RESULTS)
    parser.add_argument("--jobs", type=int, default=3)
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    chance, rows = random.Random(given.seed), []
    with tempfile.TemporaryDirectory(prefix="esp-objects-") as name, object_store() as store:
        folder = Path(name)
        plain, seconds_on_files = in_peace(Home(folder / "plain"), folder)
        calm = brought(plain)
        home = Home(folder / "home", store.url("bench"))
        journal, seconds_in_store = in_peace(home, folder)
        wrong = wrong_of(journal, home, calm)
        print(
            f"undisturbed: {seconds_on_files:.1f} s on files, {seconds_in_store:.1f} s in the store; {wrong or 'equal'}"
        )
        for number in range(given.jobs):
            journal = create_job(spec_of(folder), home)
            journal.directory.mkdir(parents=True)
            FaultPlan(journal.directory, pace_seconds=PACE_SECONDS).write()
            steps = sorted(chance.sample(range(2, STEPS - 2), given.kills))
            outages = Outages(store, journal, steps, away_seconds=chance.uniform(2.0, 10.0))
            outages.start()
            run_job(home, journal.job_id, LocalBackend(FAULTY))
            outages.join(LAST_SECONDS)
            view, found = journal.view(), wrong_of(journal, home, calm)
            kinds = [event["kind"] for event in journal.events()]
            rows.append(
                {
                    "killed_at_steps": outages.at,
                    "attempts": view.epoch,
                    "restarts": sum(len(view.candidate(one).restarts) for one in ("small", "large")),
                    "checkpoints_tried_again": kinds.count("train.checkpoint_failed"),
                    "wrong": found,
                }
            )
            print(f"job {number + 1}: {json.dumps(rows[-1])}", flush=True)
    document = {
        "jobs": rows,
        "kills": sum(len(row["killed_at_steps"]) for row in rows),
        "seconds": {"file_system": seconds_on_files, "object_store": seconds_in_store},
        "wrong": wrong + [fault for row in rows for fault in row["wrong"]],
    }
    given.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return 1 if document["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
