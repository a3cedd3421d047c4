"""A job in an object store on two machines that share no files: the bits of one machine, also when one of them is lost.

A real Ray cluster of two nodes, network namespaces with addresses of their own, in which the home is an empty file
system of the node's own: whatever one node knows of the other's work has passed through the store, a real S3 server. A
small GPT with dropout is trained tensor-parallel on each node and data-parallel over both, then pruned and quantised on
either. Then once more, and one node is killed in mid-training with all its files; the job waits for it to come back.
Weights, moments, random states and variants have to equal those of an undisturbed job on files. Exit code 1 otherwise.
Needs root.

    python benchmarks/objects/two_machines.py [--json FILE]
"""

import argparse
import json
import os
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.clusters.common import CANDIDATE, hashes, job_document, nodes_of, on
from launcher.backends.local import LocalBackend
from launcher.backends.ray import RayBackend
from launcher.jobs import Home, create_job, run_job
from launcher.journal import Journal
from parallelism import places
from tests.launcher.ray_machines import RayMachines, ray_machines
from tests.machines import machines
from tests.object_store import object_store
from tests.slurm.cluster import until

RESULTS = Path(__file__).resolve().parents[1] / "results" / "objects_two_machines.json"
NAMES = ("n1", "n2")
STEPS, KILL_AT = 300, 60
WAIT_SECONDS = 300.0
AWAY_SECONDS = 5.0


class Loss(threading.Thread):
    """Kills the second machine once the job has come to a step, and brings it up again, with nothing on it."""

    def __init__(self, ray: RayMachines, journal: Journal) -> None:
        super().__init__(daemon=True)
        self._ray, self._journal = ray, Journal(journal.directory)
        self.at_step = 0

    def run(self) -> None:
        until(lambda: self._step() >= KILL_AT, WAIT_SECONDS)
        self.at_step = self._step()
        lost = self._ray.machines[1]
        self._ray.kill(lost)
        time.sleep(AWAY_SECONDS)
        self._ray.bring_up(lost)

    def _step(self) -> int:
        return int(self._journal.view().candidate(CANDIDATE).latest.get("step", 0))


def measure(journal: Journal, calm: dict[str, str]) -> dict[str, Any]:
    """What a job in the store did, and what of it is wrong."""
    view, wrong = journal.view(), []
    if view.state.value != "succeeded":
        wrong.append(f"the job is {view.state}: {view.error}")
    else:
        found = hashes(journal)
        wrong += [f"{key}: other bits" for key in sorted(calm.keys() | found.keys()) if calm.get(key) != found.get(key)]
        places.leave(journal.directory)
    nodes = nodes_of(journal)
    if len(set(nodes.values())) != len(NAMES):
        wrong.append(f"ranks are on {nodes}")
    restarts = [restart["reason"] for restart in view.candidate(CANDIDATE).restarts]
    return {"nodes_of_ranks": nodes, "attempts": view.epoch, "restarts": restarts, "wrong": wrong}


def main() -> int:
    """Run all three jobs. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=RESULTS)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="esp-two-") as name:
        folder = Path(name)
        document = job_document(folder, data=2, steps=STEPS)
        plain = Home(folder / "plain")
        journal = create_job(on(document, "local"), plain)
        assert run_job(plain, journal.job_id, LocalBackend()) == "succeeded", journal.view().error
        calm, runs = hashes(journal), {}
        jobs = folder / "home" / "jobs"
        jobs.mkdir(parents=True)
        with machines(*NAMES, private=jobs) as found, object_store(found[0].outside) as store:
            home = Home(folder / "home", store.url("two"))
            with (
                mock.patch.dict(os.environ, store.environment),
                ray_machines(NAMES, environment=store.environment, found=found) as ray,
            ):
                (home.root / "profiles.yaml").write_text(ray.cluster.profile(), encoding="utf-8")
                for kind in ("in peace", "a machine lost"):
                    journal, started = create_job(on(document, "ray"), home), time.monotonic()
                    loss = Loss(ray, journal) if kind != "in peace" else None
                    if loss:
                        loss.start()
                    run_job(home, journal.job_id, RayBackend())
                    runs[kind] = {"seconds": round(time.monotonic() - started, 1), **measure(journal, calm)}
                    if loss:
                        loss.join(WAIT_SECONDS)
                        runs[kind]["lost_at_step"] = loss.at_step
                    print(f"{kind}: {json.dumps(runs[kind])}", flush=True)
    document = {"hashes": len(calm), "runs": runs, "wrong": [fault for run in runs.values() for fault in run["wrong"]]}
    given.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return 1 if document["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
