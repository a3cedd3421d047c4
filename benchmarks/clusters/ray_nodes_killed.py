"""Nodes of a Ray cluster are killed in mid-training: every job ends with the same bits, or waits and says why.

The cluster is real: a head without processors and two nodes that carry two ranks each, in network namespaces with
addresses and host names of their own. Jobs train a small GPT with dropout, and at random steps SIGKILL strikes all
processes of one machine at once, Ray's servers included:

- ``fits``: a job on one tensor-parallel group loses the node that carries it, and goes on on the other one
- ``waits``: a job on two such groups loses one of its nodes; it has to wait with the reason until the node is back
- ``head``: the machine of Ray's head and of the job's coordinator is lost, and with it the cluster's memory

Every job has to succeed with weights, moments, random states and progress of its undisturbed sibling, and to leave no
process behind. Exit code 1 when something does not hold. Needs root; takes about a quarter of an hour on two cores.

    python benchmarks/clusters/ray_nodes_killed.py [--json FILE] [--seed 1] [--jobs fits fits waits waits head]
"""

import argparse
import json
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
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
from benchmarks.processes import left_behind as left_of_campaign
from benchmarks.processes import mark_campaign
from launcher.backends.ray import RayBackend
from launcher.jobs import Home, create_job, run_job
from launcher.journal import Journal
from launcher.states import JobState
from launcher.view import GangView
from tests.launcher.leftovers import left_behind
from tests.launcher.ray_machines import RayMachines, ray_machines
from tests.machines import Machine
from tests.slurm.cluster import until
from tests.slurm.jobs import FAULTY, Watched, random_steps

RESULTS = Path(__file__).resolve().parents[1] / "results" / "ray_nodes_killed.json"
NAMES = ("head", "n1", "n2")
KILLS_PER_JOB = 2
PACE_SECONDS = {"fits": 0.3, "waits": 0.3, "head": 1.0}
"""A step takes so long at least: ranks that lost the head go on for some seconds, and shall not come to the end."""
WAIT_SECONDS = 180.0
REST_SECONDS = 5.0
"""How long a job is left to wait, once it has said why."""
DATA = {"fits": 1, "waits": 2, "head": 2}
"""Kind of job → tensor-parallel groups."""
ENVIRONMENT = {"RAY_gcs_rpc_server_reconnect_timeout_s": "5"}
"""Nodes that have lost the head end within seconds, to be started again, instead of a minute."""


@dataclass
class Struck:
    """One job and what happened to it."""

    kind: str
    watched: Watched
    chooser: random.Random
    last: tuple[int, int] = (0, 0)
    """Attempt and number of the process group that was struck last."""
    kills: list[dict[str, Any]] = field(default_factory=list)

    @property
    def gang(self) -> GangView | None:
        """Its process group now."""
        gang: GangView | None = self.watched.view.candidate(CANDIDATE).gang
        return gang

    def trains(self, step: int | None = None) -> bool:
        """Whether there is a process group that nothing has struck, and has done this step and one of its own."""
        gang = self.gang
        if gang is None or (gang.epoch, gang.number) <= self.last:
            return False
        return step is None or gang.step >= max(step, gang.resumed_step + 1)

    def strike(self, ray: RayMachines, step: int) -> None:
        """Kill a machine when this step is done, and see the job through to its next process group."""
        self.watched.until(lambda: self.trains(step))
        gang = self.gang
        assert gang is not None
        victim = self._victim(ray)
        self.last = (gang.epoch, gang.number)
        ranks = nodes_of(self.watched.journal)
        kill: dict[str, Any] = {"machine": victim.name, "planned_step": step, "at_step": gang.step, "ranks": ranks}
        before, started = len(self.watched.told), time.monotonic()
        kill["processes"] = len(ray.kill(victim))
        if self.kind == "head":
            self._see_head_back(ray, kill, before)
        elif self.kind == "waits":
            kill["waiting"] = self._reason(lambda: self.watched.view.waiting or "", "needs 4 CPU")
            time.sleep(REST_SECONDS)
            kill["waited_on"] = not self.trains()
            ray.bring_up(victim)
        self.watched.until(self.trains)
        kill["seconds_to_next_process_group"] = round(time.monotonic() - started, 1)
        if self.kind == "fits":
            ray.bring_up(victim)
        self.kills.append(kill)
        print(json.dumps({self.kind: kill}), flush=True)

    def _victim(self, ray: RayMachines) -> Machine:
        if self.kind == "head":
            return ray.machines[0]
        carrying = sorted(set(nodes_of(self.watched.journal).values()))
        name = self.chooser.choice(carrying)
        return next(machine for machine in ray.machines if machine.name == name)

    def _reason(self, told: Callable[[], str], words: str) -> str:
        self.watched.until(lambda: words in told(), WAIT_SECONDS)
        return told()

    def _see_head_back(self, ray: RayMachines, kill: dict[str, Any], before: int) -> None:
        """The operator starts the head anew; the nodes' servers end without it and are started anew, too."""
        head, *nodes = ray.machines
        kill["waiting"] = self._reason(lambda: "\n".join(self.watched.told[before:]), "does not answer")
        ray.bring_up(head)
        until(lambda: all(map(ray.has_ended, nodes)), WAIT_SECONDS)
        for node in nodes:
            ray.kill(node)
        ray.bring_up(*nodes)


def peaceful(home: Home, document: dict[str, Any]) -> Journal:
    """The same job, undisturbed, on the same cluster."""
    journal = create_job(on(document, "ray"), home)
    state = run_job(home, journal.job_id, RayBackend())
    assert state is JobState.SUCCEEDED, journal.view().error
    return journal


def under_fire(home: Home, document: dict[str, Any], ray: RayMachines, kind: str, chooser: random.Random) -> Struck:
    """One job, and its kills."""
    watched = Watched(home, on(document, "ray"), RayBackend(FAULTY), PACE_SECONDS[kind])
    struck = Struck(kind, watched, chooser)
    for step in random_steps(KILLS_PER_JOB, STEPS, chooser.randrange(2**32)):
        struck.strike(ray, step)
    watched.end()
    return struck


def measure(struck: Struck, calm: Journal) -> dict[str, Any]:
    """What the journal says of a job that was struck."""
    journal = struck.watched.journal
    row, view = row_of(journal), Journal(journal.directory).view()
    found, expected = (hashes(one) if row_of(one)["checkpoint"] else {} for one in (journal, calm))
    return {
        "kind": struck.kind,
        "state": view.state.value,
        "error": view.error,
        "kills": struck.kills,
        "attempts": view.epoch,
        "process_groups": len(view.candidate(CANDIDATE).gangs),
        "restarts": restarts_of(view),
        "device_seconds": row["device_seconds"],
        "lost_device_seconds": row["lost_device_seconds"],
        "hashes": len(found),
        "bits_equal": bool(found) and found == expected,
        "progress_equal": all(row[name] == row_of(calm)[name] for name in PROGRESS),
        "left_behind": left_later(journal),
    }


def left_later(journal: Journal, seconds: float = 30.0) -> list[str]:
    """Processes of the job that do not end."""
    deadline = time.monotonic() + seconds
    while (found := left_behind(journal)) and time.monotonic() < deadline:
        time.sleep(0.2)
    return found


def wrong_with(name: str, run: dict[str, Any]) -> Iterator[str]:
    """What does not hold of one job."""
    if run["state"] != "succeeded":
        yield f"{name}: {run['state']}: {run['error']}"
    if not (run["bits_equal"] and run["progress_equal"]):
        yield f"{name}: other weights, moments, random states or progress than in peace"
    if len(run["kills"]) != KILLS_PER_JOB or run["process_groups"] <= KILLS_PER_JOB:
        yield f"{name}: {len(run['kills'])} kills, {run['process_groups']} process groups"
    expected = "coordinator lost" if run["kind"] == "head" else "node lost"
    if [restart["reason"] for restart in run["restarts"]] != [expected] * KILLS_PER_JOB:
        yield f"{name}: restarts are {[restart['reason'] for restart in run['restarts']]}"
    if run["kind"] == "waits" and not all(kill["waited_on"] for kill in run["kills"]):
        yield f"{name}: it did not wait for its node"
    yield from (f"{name}: {process}" for process in run["left_behind"])


def campaign(folder: Path, kinds: Sequence[str], seed: int) -> dict[str, Any]:
    """All jobs on one cluster."""
    chooser, home = random.Random(seed), Home(folder / "home")
    home.root.mkdir()
    documents = {data: job_document(folder, data, grid=False) for data in sorted({DATA[kind] for kind in kinds})}
    started, runs = time.monotonic(), {}
    with ray_machines(NAMES, head_cpus=0, environment=ENVIRONMENT) as ray:
        (home.root / "profiles.yaml").write_text(ray.cluster.profile(), encoding="utf-8")
        calm = {data: peaceful(home, document) for data, document in documents.items()}
        for number, kind in enumerate(kinds):
            struck = under_fire(home, documents[DATA[kind]], ray, kind, chooser)
            runs[f"{kind}-{number}"] = measure(struck, calm[DATA[kind]])
    wrong = [problem for name, run in runs.items() for problem in wrong_with(name, run)]
    return {
        "seed": seed,
        "cores": os.cpu_count(),
        "seconds": round(time.monotonic() - started),
        "jobs": len(runs),
        "kills": sum(len(run["kills"]) for run in runs.values()),
        "killed_machines": Counter(kill["machine"] for run in runs.values() for kill in run["kills"]),
        "states": Counter(run["state"] for run in runs.values()),
        "wrong": wrong + left_of_campaign(15.0),
        "runs": runs,
    }


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=RESULTS, metavar="FILE")
    parser.add_argument("--seed", type=int, default=1)
    kinds = ["fits", "fits", "waits", "waits", "head"]
    parser.add_argument("--jobs", nargs="+", choices=list(DATA), default=kinds, help="each is struck twice")
    given = parser.parse_args()
    mark_campaign()
    with tempfile.TemporaryDirectory(prefix="ray-nodes-") as name:
        result = campaign(Path(name), given.jobs, given.seed)
    given.json.write_text(json.dumps(result, indent=1).replace(name, "FOLDER") + "\n")
    print("\n".join(result["wrong"]) or f"{result['kills']} kills, {result['jobs']} jobs, nothing wrong")
    return 1 if result["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
