"""The service under fire with real jobs: coordinators on Ray, trainers, MLflow, as users have them.

First two jobs run in peace, one on a single rank and one tensor-parallel on two. Then jobs of the same two specs run
while SIGKILL strikes API, dispatcher, MLflow, coordinators, ranks and the heads of the jobs' Ray clusters: at random
moments, while a checkpoint is written, and when a stage is committed. Coordinators are also stopped and woken up, with
their dispatcher killed meanwhile, and with their epoch taken from them meanwhile.

Every accepted job has to end ``succeeded``, with the weights, optimizer and random states of its peaceful sibling bit
for bit, and its variants too; no job may be lost or doubled, have two coordinators at once, or an event of an older
epoch behind a newer one's beginning; no process, lock or temporary folder may be left. Exit code 1 otherwise.

    python benchmarks/service/real_kills.py [--jobs 6] [--kills 24] [--minutes 10] [--seed 1]
"""

import argparse
import fcntl
import json
import os
import random
import socket
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import psutil

from benchmarks.processes import left_behind, mark_campaign
from launcher.jobs import Home, list_jobs
from launcher.journal import Journal
from launcher.processes import local_processes
from launcher.result import result_document
from launcher.states import RESTING, JobState
from launcher.tracking.feed import JOB_TAG, RUN_TAG
from launcher.tracking.process import default_uri
from parallelism.checkpoint_store import MANIFEST
from services.client import Client, ServiceError
from services.store.database import Database
from services.store.jobs import JobStore
from services.store.leases import DISPATCHER, Leases
from tests.services.running import Running, text_files, tiny_job, until, up

RESULTS = Path(__file__).resolve().parents[1] / "results" / "service_real_kills.json"

CANDIDATE = "small"
MODEL = {"family": "gpt", "layers": 2, "hidden": 64, "heads": 4, "dropout": 0.1}
FLOPS = {1: 1.2e11, 2: 6e10}
"""Tensor-parallel size → budget: some seconds of training each."""
PROGRESS = ("steps", "tokens", "flops", "train_loss", "validation_loss")
SERVICE = ("API", "dispatcher", "MLflow")
ROLES = {"coordinator": ("coordinator", None), "rank": ("rank", None), "Ray head": ("ray", "gcs_server")}
LIMIT_SECONDS, AIM_SECONDS, STOPPED_SECONDS = 900.0, 15.0, 5.0


@dataclass(frozen=True)
class Blow:
    """Whom to strike, and when; ``with_dispatcher``: it dies at the same moment."""

    victim: str
    moment: str = "at random"
    with_dispatcher: bool = False

    def __str__(self) -> str:
        return f"{self.victim}{' and dispatcher' if self.with_dispatcher else ''}, {self.moment}"


WRITING, COMMITTING, STOPPED, FENCED = (
    "while a checkpoint is written",
    "when a stage is committed",
    "stopped and woken up",
    "stopped, replaced and woken up",
)
ROUND = (
    *(Blow(victim) for victim in ("API", "dispatcher", "MLflow", "coordinator", "rank", "Ray head")),
    *(Blow(victim, WRITING) for victim in ("coordinator", "rank", "Ray head")),
    Blow("coordinator", COMMITTING),
    Blow("coordinator", with_dispatcher=True),
    Blow("coordinator", STOPPED),
    Blow("coordinator", FENCED),
)
"""Every kind once; the campaign goes through it again and again, each time in another order."""


@dataclass
class Campaign:
    """The service, its jobs, and what has happened to them."""

    service: Running
    choose: random.Random
    struck: Counter[str] = field(default_factory=Counter)
    hit: Counter[str] = field(default_factory=Counter)
    """Of the aimed ones, those after which the checkpoint was incomplete, or the manifest had no event."""
    kills: int = 0
    journals: dict[str, Journal] = field(default_factory=dict)

    def running(self) -> list[Journal]:
        """Jobs that a coordinator works on."""
        for journal in list_jobs(Home(self.service.home)):
            self.journals.setdefault(journal.job_id, journal)
        return [one for one in self.journals.values() if one.view().epoch and one.state() not in RESTING]

    def of_service(self, kind: str) -> list[psutil.Process]:
        """The service's own processes of a kind; MLflow's have children."""
        modules = {"API": "services.api", "dispatcher": "services.dispatcher", "MLflow": "services.keeper"}
        found = []
        for child in psutil.Process(self.service.process.pid).children():
            with suppress(psutil.NoSuchProcess):
                if child.cmdline()[2:3] == [modules[kind]]:
                    found += [child, *(child.children(recursive=True) if kind == "MLflow" else [])]
        return found

    def of_job(self, journal: Journal, kind: str) -> list[psutil.Process]:
        """A job's processes of a kind that live."""
        role, name = ROLES[kind]
        view = journal.view()
        events = {event["pid"]: event for event in view.processes.values() if event["node"] == socket.gethostname()}
        return [
            process
            for process in local_processes(view, include_coordinator=True)
            if events[process.pid]["role"] == role and name in (None, events[process.pid].get("name"))
        ]

    def strike(self, blow: Blow) -> bool:
        """Whether there was somebody to strike."""
        done = {STOPPED: self._stop, FENCED: self._stop, WRITING: self._aim, COMMITTING: self._aim}.get(
            blow.moment, self._kill_any
        )(blow)
        self.struck[str(blow)] += done
        return done

    def _kill_any(self, blow: Blow) -> bool:
        if blow.victim in SERVICE:
            victims = self.of_service(blow.victim)
        else:
            victims = [process for journal in self.running() for process in self.of_job(journal, blow.victim)]
        return bool(victims) and self._kill(self.choose.choice(victims), blow)

    def _kill(self, victim: psutil.Process, blow: Blow) -> bool:
        others = self.of_service("dispatcher") if blow.with_dispatcher else []
        with suppress(psutil.NoSuchProcess):
            for process in (victim, *others):
                process.kill()
                self.kills += 1
            psutil.wait_procs([victim], timeout=5)
            return True
        return False

    def _aim(self, blow: Blow) -> bool:
        """Wait for the moment, in any job, and strike at once."""
        mark = _unfinished if blow.moment == WRITING else _manifests
        deadline = time.monotonic() + AIM_SECONDS
        while time.monotonic() < deadline:
            jobs = [(journal, self.of_job(journal, blow.victim)) for journal in self.running()]
            if not any(victims for _, victims in jobs):
                return False
            known = {journal.job_id: mark(journal) for journal, _ in jobs}
            refresh = time.monotonic() + 0.5
            while time.monotonic() < refresh:
                for journal, victims in jobs:
                    new = mark(journal) - known[journal.job_id]
                    if victims and new:
                        killed = self._kill(self.choose.choice(victims), blow)
                        self.hit[str(blow)] += killed and _missed(journal, blow.moment, new.pop())
                        return killed
                time.sleep(0.002)
        return False

    def _stop(self, blow: Blow) -> bool:
        """A coordinator stands still, its dispatcher dies, and the next one has to leave it in peace."""
        jobs = [(journal, one) for journal in self.running() for one in self.of_job(journal, blow.victim)]
        if not jobs:
            return False
        journal, process = self.choose.choice(jobs)
        process.suspend()
        try:
            if journal.state() in RESTING:
                return False
            for dispatcher in self.of_service("dispatcher"):
                dispatcher.kill()
                self.kills += 1
            time.sleep(STOPPED_SECONDS)
            if blow.moment == FENCED:
                Journal(journal.directory).claim_epoch("campaign")
        finally:
            with suppress(psutil.NoSuchProcess):
                process.resume()
        return True


def _unfinished(journal: Journal) -> set[Path]:
    """Checkpoints that are being written."""
    gang = journal.view().candidate(CANDIDATE).gang
    if gang is None:
        return set()
    folders = Path(gang.root).glob("e*-s*")
    return {folder for folder in folders if not (folder / MANIFEST).exists()}


def _manifests(journal: Journal) -> set[Path]:
    """Stages that are declared done, or are about to be."""
    return set((journal.directory / "stages").rglob("*.json"))


def _missed(journal: Journal, moment: str, path: Path) -> bool:
    """Whether what was under way is not true: no manifest of the checkpoint, no event of the manifest."""
    if moment == WRITING:
        return not (path / MANIFEST).exists()
    known = {event.get("manifest") for event in journal.events()}
    return str(path.relative_to(journal.directory)) not in known


class Sentinel(threading.Thread):
    """Counts each job's coordinators, several times a second: there is never more than one."""

    def __init__(self, home: Path) -> None:
        super().__init__(daemon=True)
        self.ending = threading.Event()
        self.looks = 0
        self.wrong: set[str] = set()
        self._jobs = f"{Home(home).jobs_dir}/"

    def run(self) -> None:
        """Until told to stop."""
        while not self.ending.wait(0.25):
            found: Counter[str] = Counter()
            for process in psutil.process_iter(["cmdline", "status"]):
                words = process.info["cmdline"] or []
                if words[1:3] == ["-m", "launcher.coordinator"] and words[3].startswith(self._jobs):
                    found[words[3]] += process.info["status"] != psutil.STATUS_ZOMBIE
            self.looks += 1
            self.wrong |= {f"{job} has {count} coordinators at once" for job, count in found.items() if count > 1}


# Jobs


def job_document(text: str, name: str, tensor: int) -> dict[str, Any]:
    """A job of some seconds."""
    candidate = {
        "name": CANDIDATE,
        "model": MODEL,
        "layout": {"tensor": tensor},
        "training": {"global_batch": 8, "micro_batch": 4},
    }
    # A candidate may lose more ranks in a row here than anybody's machine would.
    execution = {"devices": tensor, "max_restarts": 10, "checkpoint_every": {"steps": 25}}
    return tiny_job(text, name=name, seed=7, budget={"flops": FLOPS[tensor]}, candidates=[candidate]) | {
        "execution": execution
    }


def submit(service: Running, document: dict[str, Any]) -> str:
    """Hand a job in; the name is its idempotency key, so that it may be sent again to an API that has just died."""
    accepted: list[str] = []

    def sent(client: Client) -> None:
        accepted.append(client.submit(document, idempotency_key=document["name"]).id)

    _ask(service, sent)
    return accepted[0]


def active(service: Running, jobs: list[str]) -> int:
    """How many of the jobs are not at rest; asked until the API answers."""
    counts: list[int] = []

    def asked(client: Client) -> None:
        counts.append(sum(client.job(job).active for job in jobs))

    _ask(service, asked)
    return counts[0]


def _ask(service: Running, question: Callable[[Client], None]) -> None:
    """Until it is answered: the API may be dead, or on its way up."""

    def answered() -> bool:
        try:
            with Client(service.url) as client:
                question(client)
        except OSError:
            return False
        except ServiceError as error:
            if error.status < 500:
                raise
            return False
        return True

    _until(answered)


def _until(condition: Callable[[], object], seconds: float = LIMIT_SECONDS, pause: float = 0.5) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise SystemExit("the campaign does not come to its end")
        time.sleep(pause)


def storm(campaign: Campaign, text: str, least_jobs: int, kills: int, minutes: float) -> dict[str, int]:
    """Strike until there were enough kills, while there are always jobs; returns job → tensor-parallel size."""
    jobs: dict[str, int] = {}
    blows: list[Blow] = []
    deadline = time.monotonic() + 60 * minutes
    while time.monotonic() < deadline and (len(jobs) < least_jobs or campaign.kills < kills):
        if len(jobs) < least_jobs or active(campaign.service, list(jobs)) < 2:
            tensor = 2 if len(jobs) % 3 == 2 else 1
            jobs[submit(campaign.service, job_document(text, f"storm-{len(jobs)}", tensor))] = tensor
        elif campaign.kills < kills:
            time.sleep(campaign.choose.uniform(0.3, 3.0))
            if not blows:
                blows = campaign.choose.sample(ROUND, len(ROUND))
            # The next kind that finds somebody; the others keep their turn.
            struck = next((blow for blow in blows if campaign.strike(blow)), None)
            if struck:
                blows.remove(struck)
                print(f"{campaign.kills:3d}  {struck}", file=sys.stderr, flush=True)
    return jobs


# Checks


def fingerprints(journal: Journal) -> dict[str, str]:
    """Hashes of the final checkpoint, optimizer and random states included, and of the variants' tensors."""
    from tests.launcher.fingerprint import fingerprint, tensors_checksum

    result = result_document(journal)
    (candidate,) = result["candidates"]
    variants = {row["name"]: tensors_checksum(row["path"]) for row in result["variants"]}
    return (fingerprint(candidate["checkpoint"]) if candidate["checkpoint"] else {}) | variants


def wrong_with(journal: Journal, calm: Journal, prints: dict[str, str]) -> Iterator[str]:
    """What is not as it should be with one job; ``prints`` are those of its peaceful sibling."""
    job, events = journal.job_id, list(journal.events())
    if journal.state() is not JobState.SUCCEEDED:
        yield f"{job} is {journal.state()}: {journal.view().error}"
        return
    epochs = [event["epoch"] for event in events]
    if epochs != sorted(epochs):
        yield f"{job}: two epochs at once"
    stages = Counter(event["stage"] for event in events if event["kind"] == "stage_done")
    yield from (f"{job}: stage {stage} was done {count} times" for stage, count in stages.items() if count > 1)
    if sum(event["kind"] == "state" and event["state"] == "succeeded" for event in events) != 1:
        yield f"{job} succeeded more than once"
    (row,), (calm_row,) = result_document(journal)["candidates"], result_document(calm)["candidates"]
    if any(row[name] != calm_row[name] for name in PROGRESS):
        yield f"{job}: other progress than in peace"
    if fingerprints(journal) != prints:
        yield f"{job}: other bits than in peace"


def wrong_in_mlflow(home: Path, jobs: list[str]) -> Iterator[str]:
    """Runs that MLflow lacks, or that lack steps."""
    from mlflow import MlflowClient

    client = MlflowClient(default_uri(home))
    (experiment,) = client.search_experiments(filter_string="name != 'Default'")
    for job in jobs:
        runs = client.search_runs([experiment.experiment_id], f"tags.`{JOB_TAG}` = '{job}'")
        if not runs or {run.info.status for run in runs} != {"FINISHED"}:
            yield f"{job}: MLflow has {[run.info.status for run in runs]}"
        for run in runs:
            if run.data.tags.get(RUN_TAG) == CANDIDATE:
                steps = sorted({point.step for point in client.get_metric_history(run.info.run_id, "tokens")})
                (row,) = result_document(Home(home).journal(job))["candidates"]
                if steps != list(range(1, row["steps"] + 1)):
                    yield f"{job}: MLflow has {len(steps)} of {row['steps']} steps"


def held_locks(home: Path) -> Iterator[str]:
    """Locks that somebody still has."""
    for path in [home / "service" / "lock", *(one.tracking_dir / "lock" for one in list_jobs(Home(home)))]:
        with open(path, "a", encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield f"{path.relative_to(home)} is locked"
    database = Database(f"sqlite:///{home}/service/jobs.db")
    leader = Leases(database).leader(DISPATCHER)
    if leader:
        yield f"the lease is held by {leader[0]}"
    with database.write():
        pass
    database.close()


def run(folder: Path, temporary: Path, given: argparse.Namespace) -> dict[str, Any]:
    """The whole campaign."""
    home = folder / "home"
    home.mkdir()
    settings = {"devices": 2, "lease_seconds": 2.0, "poll_seconds": 0.2}
    (home / "service.yaml").write_text(json.dumps(settings))
    text = text_files(folder / "text")
    store = JobStore(Database(f"sqlite:///{home}/service/jobs.db"))
    started = time.monotonic()
    with up(home) as service:
        calm = {tensor: submit(service, job_document(text, f"calm-{tensor}", tensor)) for tensor in FLOPS}
        _until(lambda: not active(service, list(calm.values())))
        with service.client() as client:
            for job in calm.values():
                assert client.job(job).state is JobState.SUCCEEDED, client.job(job).error
        peace_seconds = time.monotonic() - started
        campaign, sentinel = Campaign(service, random.Random(given.seed)), Sentinel(home)
        sentinel.start()
        jobs = storm(campaign, text, given.jobs, given.kills, given.minutes)
        _until(lambda: not active(service, list(jobs)))
        storm_seconds = time.monotonic() - started - peace_seconds
        with suppress(TimeoutError):  # what MLflow lacks is told below
            until(lambda: not store.unfed() and not store.at_work(), 240)
        sentinel.ending.set()
        with service.client() as client:
            names = Counter(job.name for job in client.jobs(limit=200))
    store.database.close()
    wrong = [*sentinel.wrong, *left_behind(15.0), *held_locks(home)]
    wrong += [f"{path.name} is left in the temporary folder" for path in temporary.glob("esp-*")]
    expected = {f"calm-{tensor}": 1 for tensor in calm} | {f"storm-{number}": 1 for number in range(len(jobs))}
    if names != expected:
        wrong.append(f"the jobs are {dict(names)}")
    journals = {journal.job_id: journal for journal in list_jobs(Home(home))}
    prints = {tensor: fingerprints(journals[job]) for tensor, job in calm.items()}
    for job, tensor in jobs.items():
        wrong += (
            wrong_with(journals[job], journals[calm[tensor]], prints[tensor]) if job in journals else [f"{job}: lost"]
        )
    wrong += wrong_in_mlflow(home, [*calm.values(), *jobs])
    restarts = Counter(one["reason"] for job in jobs for one in journals[job].view().candidate(CANDIDATE).restarts)
    return {
        "seed": given.seed,
        "cores": os.cpu_count(),
        "load_average": round(os.getloadavg()[0], 1),
        "jobs": len(jobs),
        "jobs_at_tensor_2": sum(tensor == 2 for tensor in jobs.values()),
        "steps": {tensor: result_document(journals[job])["candidates"][0]["steps"] for tensor, job in calm.items()},
        "kills": campaign.kills,
        "struck": dict(sorted(campaign.struck.items())),
        "struck_in_the_very_act": dict(campaign.hit),
        "attempts": sum(journals[job].view().epoch for job in jobs),
        "restarts_of_trainers": dict(restarts),
        "hashes_compared": sum(len(prints[tensor]) for tensor in jobs.values()),
        "looks_for_two_coordinators": sentinel.looks,
        "seconds_in_peace": round(peace_seconds),
        "seconds_in_the_storm": round(storm_seconds),
        "wrong": wrong,
    }


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=6, help="at least so many")
    parser.add_argument("--kills", type=int, default=24)
    parser.add_argument("--minutes", type=float, default=10.0, help="no kills and no new jobs afterwards")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, default=RESULTS, metavar="FILE")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="leave the service's home in this new folder")
    given = parser.parse_args()
    mark_campaign()
    with (
        tempfile.TemporaryDirectory(prefix="espalier-kills-") as name,
        tempfile.TemporaryDirectory(prefix="k-") as temporary,
    ):
        # The jobs' Ray clusters keep their sockets here: nothing of them may be left.
        os.environ["TMPDIR"] = temporary
        folder = given.keep or Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        result = run(folder.absolute(), Path(temporary), given)
    given.json.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    return 1 if result["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
