"""One job file on three back-ends, and on Slurm under requeues: the same bits everywhere.

A small GPT with dropout is trained tensor-parallel on two ranks times two (data-parallel, or with ``--pipeline`` as two
stages), then pruned and quantised. The same file, but for the name of the back-end, runs on this machine, on a Ray
cluster of two nodes and on a Slurm of two nodes; nodes are network namespaces with addresses of their own, and each
carries one tensor-parallel group. Weights, moments, random states and variants have to be the same bit for bit. Then
the job runs on Slurm once more and is requeued by ``scontrol requeue`` at random steps: the same bits again, and a
ledger that goes on over all attempts.

Exit code 1 when something does not hold. Needs root and Slurm (``make test-slurm`` installs it). Takes about twenty
minutes on two cores.

    python benchmarks/clusters/one_job.py [--pipeline] [--json FILE] [--requeues 5] [--seed 1]
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.clusters.common import (
    CANDIDATE,
    PROGRESS,
    STEPS,
    hashes,
    job_document,
    nodes_of,
    on,
    restarts_of,
    row_of,
)
from benchmarks.processes import left_behind, mark_campaign
from launcher.backends.base import Backend
from launcher.backends.local import LocalBackend
from launcher.backends.ray import RayBackend
from launcher.backends.slurm import SlurmBackend
from launcher.jobs import Home, create_job, run_job
from launcher.journal import Journal
from launcher.states import JobState
from tests.launcher.ray_machines import ray_machines
from tests.slurm.cluster import NODES, RealSlurm, real_slurm
from tests.slurm.jobs import FAULTY, Watched, random_steps

RESULTS = Path(__file__).resolve().parents[1] / "results" / "one_job.json"
PIPELINE = RESULTS.with_name("one_job_pipeline.json")
PACE_SECONDS = 1.0
"""Of a step under requeues, at least: an attempt does some more before it is ended."""
FRESH_SECONDS = 0.3
REQUEUED = "slurm requeued"


@contextmanager
def ray_place(home: Home) -> Iterator[Backend]:
    """Two Ray nodes, and the operator's profile of them in the home."""
    with ray_machines(NODES) as ray:
        (home.root / "profiles.yaml").write_text(ray.cluster.profile(), encoding="utf-8")
        yield RayBackend()


def run(home: Home, document: dict[str, Any], name: str, backend: Backend) -> tuple[Journal, dict[str, Any]]:
    """The job on one back-end."""
    journal, started = create_job(on(document, name), home), time.monotonic()
    state = run_job(home, journal.job_id, backend)
    return journal, measure(journal, state, time.monotonic() - started)


def requeued(
    home: Home, document: dict[str, Any], slurm: RealSlurm, steps: list[int]
) -> tuple[Journal, dict[str, Any]]:
    """The job on Slurm, which is told to requeue it when an attempt reaches one of these steps."""
    started = time.monotonic()
    watched = Watched(home, on(document, "slurm"), SlurmBackend(FAULTY, fresh_seconds=FRESH_SECONDS), PACE_SECONDS)
    for epoch, step in enumerate(steps, start=1):
        watched.until_step(step, epoch)
        handle = SlurmBackend(fresh_seconds=0.0).find(watched.journal)
        assert handle is not None
        slurm.call("scontrol", "requeue", str(handle["slurm_job"]))
    state = watched.end(1200)
    return watched.journal, measure(watched.journal, state, time.monotonic() - started) | {"requeued_at_steps": steps}


def measure(journal: Journal, state: JobState, seconds: float) -> dict[str, Any]:
    """What the journal says of a run."""
    row, view = row_of(journal), journal.view()
    gangs = view.candidate(CANDIDATE).gangs
    return {
        "state": state.value,
        "error": view.error,
        "seconds": round(seconds, 1),
        "nodes_of_ranks": nodes_of(journal),
        "ray_nodes_of_ranks": nodes_of(journal, "node_id"),
        "attempts": view.epoch,
        "process_groups": [
            {
                "attempt": gang.epoch,
                "from_step": gang.resumed_step,
                "to_step": gang.step,
                "ended": gang.ended or "coordinator lost",
                "device_seconds": round(gang.device_seconds, 2),
            }
            for gang in gangs
        ],
        "restarts": restarts_of(view),
        "device_seconds": row["device_seconds"],
        "lost_device_seconds": row["lost_device_seconds"],
        "ledger": ledger(journal),
        "progress": {name: row[name] for name in PROGRESS},
    }


def ledger(journal: Journal) -> list[list[float]]:
    """(attempt, step, device-seconds burnt in all attempts so far) of every heartbeat in training."""
    return [
        [event["epoch"], event["step"], round(event["device_seconds"], 2)]
        for event in journal.events()
        if event["kind"] == "heartbeat" and event["candidate"] == CANDIDATE and "device_seconds" in event
    ]


def checks(
    runs: dict[str, dict[str, Any]], table: dict[str, dict[str, str]], left: list[str], requeues: int
) -> Iterator[str]:
    """What does not hold."""
    for name, one in runs.items():
        if one["state"] != "succeeded":
            yield f"{name}: {one['state']}: {one['error']}"
        if one["progress"] != runs["local"]["progress"]:
            yield f"{name}: other progress than on this machine"
        for kind in ("nodes_of_ranks", "ray_nodes_of_ranks"):
            if name != "local" and not _spread(one[kind]):
                yield f"{name}: {kind} is {one[kind]}"
        burnt = sum(group["device_seconds"] for group in one["process_groups"])
        if abs(burnt - one["device_seconds"]) > 0.1:
            yield f"{name}: the ledger has {one['device_seconds']} device-seconds, process groups burnt {burnt}"
    yield from (f"{key}: other bits" for key, found in table.items() if set(found) != set(runs) or _differ(found))
    if not any(key.startswith("variant") for key in table) or not any(key.startswith("moment") for key in table):
        yield "nothing was compared"
    if REQUEUED in runs:
        yield from _requeue_checks(runs[REQUEUED], runs["slurm"], requeues)
    yield from left


def _differ(found: dict[str, str]) -> bool:
    return len(set(found.values())) != 1


def _spread(nodes: dict[int, str]) -> bool:
    """Each tensor-parallel group is on a node of its own."""
    return nodes[0] == nodes[1] != nodes[2] == nodes[3]


def _requeue_checks(run: dict[str, Any], calm: dict[str, Any], requeues: int) -> Iterator[str]:
    groups, burnt = run["process_groups"], [entry[2] for entry in run["ledger"]]
    if len({group["attempt"] for group in groups}) != requeues + 1:
        yield f"{REQUEUED}: {len(groups)} process groups for {requeues} requeues"
    if run["attempts"] <= requeues:
        yield f"{REQUEUED}: {run['attempts']} attempts"
    if burnt != sorted(burnt):
        yield f"{REQUEUED}: the ledger goes back"
    if not run["device_seconds"] > calm["device_seconds"]:
        yield f"{REQUEUED}: its bill is not longer than that of the job in peace"
    lost = sum(restart["lost_device_seconds"] for restart in run["restarts"])
    if abs(lost - run["lost_device_seconds"]) > 0.1 or not 0 <= lost < run["device_seconds"]:
        yield f"{REQUEUED}: {run['lost_device_seconds']} device-seconds are lost, restarts lost {lost}"


def campaign(folder: Path, pipeline: bool, requeues: int, seed: int) -> dict[str, Any]:
    """All runs, what they left, and what does not hold."""
    home, document = Home(folder / "home"), job_document(folder, data=2 - pipeline, pipeline=1 + pipeline)
    home.root.mkdir()
    runs: dict[str, dict[str, Any]] = {}
    table: dict[str, dict[str, str]] = {}

    def take(name: str, journal: Journal, facts: dict[str, Any]) -> None:
        runs[name] = facts
        if facts["state"] == "succeeded":
            for key, value in hashes(journal).items():
                table.setdefault(key, {})[name] = value
        print(json.dumps({name: {key: value for key, value in facts.items() if key != "ledger"}}), flush=True)

    take("local", *run(home, document, "local", LocalBackend()))
    with ray_place(home) as backend:
        take("ray", *run(home, document, "ray", backend))
    with real_slurm() as slurm:
        take("slurm", *run(home, document, "slurm", SlurmBackend(fresh_seconds=FRESH_SECONDS)))
        if requeues:
            steps = random_steps(requeues, STEPS, seed)
            take(REQUEUED, *requeued(home, document, slurm, steps))
        left = left_of_jobs(slurm)
    left += left_behind(15.0)
    return {
        "seed": seed,
        "cores": os.cpu_count(),
        "job": document,
        "wrong": list(checks(runs, table, left, requeues)),
        "hashes_compared": len(table),
        "runs": runs,
        "table": table,
    }


def left_of_jobs(slurm: RealSlurm) -> list[str]:
    """What jobs left in Slurm's queue."""
    return [f"Slurm still has {line}" for line in slurm.call("squeue", "--noheader").splitlines()]


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", action="store_true", help="two stages instead of two replicas")
    parser.add_argument("--json", type=Path, metavar="FILE", help=f"default: {RESULTS.name}, or {PIPELINE.name}")
    parser.add_argument("--requeues", type=int, default=5)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    mark_campaign()
    with tempfile.TemporaryDirectory(prefix="one-job-") as name:
        result = campaign(Path(name), given.pipeline, given.requeues, given.seed)
    text = json.dumps(result, indent=1).replace(name, "FOLDER")
    (given.json or (PIPELINE if given.pipeline else RESULTS)).write_text(text + "\n")
    print(
        "\n".join(result["wrong"]) or f"{result['hashes_compared']} hashes are the same in {len(result['runs'])} runs"
    )
    return 1 if result["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
