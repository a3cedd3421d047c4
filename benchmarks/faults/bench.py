"""A real training job under fire: what kills cost, and whether anything but the bill changes.

A small GPT, tensor parallel on two ranks, is trained through the real coordinator on the local back-end: once in peace,
once with a rank killed twelve times, once with the coordinator killed three times, and once with a coordinator that is
stopped, replaced and woken up. Kills are SIGKILL at chosen points (``tests/launcher/faults.py``): between steps, within
steps, while a checkpoint's data is written, and between its data and its manifest. Every run has to end with the same
bits, the same progress and no process left behind; exit code 1 when one does not. Takes 8 to 12 minutes on two cores.

    python benchmarks/faults/bench.py [--json FILE] [--seed 1] [--runs ranks coordinator zombie]
"""

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))


from benchmarks.processes import left_behind, mark_campaign
from launcher.backends.base import Phase
from launcher.backends.local import LocalBackend
from launcher.jobs import Home, create_job, run_job
from launcher.journal import Journal
from launcher.result import result_document
from launcher.spec import JobSpec
from tests.launcher.faults import Fault, FaultPlan
from tests.launcher.fingerprint import fingerprint

RESULTS = Path(__file__).resolve().parents[1] / "results" / "faults.json"
COORDINATOR = "tests.launcher.faulty_coordinator"

CANDIDATE = "a"
STEPS, BATCH, LENGTH, EVERY = 72, 8, 64, 4
PACE_SECONDS = 0.25
LEAST_DEVICE_SECONDS = 2 * STEPS * PACE_SECONDS
"""What the undisturbed steps of two ranks take at least; their start comes on top, as slow as the machine is busy."""
MODEL = {"family": "gpt", "layers": 4, "hidden": 128, "heads": 4, "dropout": 0.1}
PROGRESS = ("steps", "tokens", "flops", "train_loss", "validation_loss")
LIMIT_SECONDS = 600.0


def make_job(folder: Path, name: str, faults: tuple[Fault, ...]) -> tuple[Home, Journal]:
    """A job of one candidate, with its text and its plan of faults."""
    text = folder / "text"
    if not text.exists():
        text.mkdir(parents=True)
        chooser = random.Random(0)
        words = ["".join(chooser.choices("abcdefghijklmnopqrstuvwxyz", k=chooser.randint(2, 8))) for _ in range(200)]
        for number in range(40):
            (text / f"{number:02d}.txt").write_text(" ".join(chooser.choices(words, k=400)))
    document = {
        "name": name,
        "seed": 7,
        "data": {"train": [str(text / "*.txt")], "tokenizer": {"kind": "bytes"}, "sequence_length": LENGTH},
        "budget": {"tokens": STEPS * BATCH * LENGTH},
        "candidates": [
            {
                "name": CANDIDATE,
                "model": MODEL,
                "layout": {"tensor": 2},
                "training": {"global_batch": BATCH, "micro_batch": 4, "precision": "fp32"},
            }
        ],
        "evaluation": {"tokens": 2048},
        "export": {"variants": "none"},
        "execution": {"devices": 2, "checkpoint_every": {"steps": EVERY}},
    }
    home = Home(folder / "home")
    journal = create_job(JobSpec.model_validate(document), home)
    FaultPlan(journal.directory, faults, PACE_SECONDS).write()
    return home, journal


# Runs


def rank_faults(seed: int) -> tuple[Fault, ...]:
    """Eight kills at random steps, one in every ninth of the run, and five in and after the writing of checkpoints."""
    chooser = random.Random(seed)
    window = STEPS // 8
    return (
        *(_kill_in(chooser, number * window, window, rank=number % 2, late=number > 3) for number in range(8)),
        Fault("data of step 20, rank 0 and its writer", "data", 20, 0, victim="both"),
        Fault("data of step 32, the writer alone", "data", 32, 1, victim="writer"),
        Fault("data of step 44, rank 1", "data", 44, 1),
        Fault("before the manifest of step 28", "manifest", 28),
        Fault("before the manifest of step 60", "manifest", 60),
    )


def _kill_in(chooser: random.Random, first: int, length: int, rank: int, late: bool) -> Fault:
    """A kill after a random step of these; a late one strikes within the step that follows.

    Steps after which a checkpoint is written are left to the other faults, so that no two strike at once.
    """
    step = chooser.choice([step for step in range(first + 1, first + length) if step % EVERY])
    delay = chooser.uniform(0.05, 0.9 * PACE_SECONDS) if late else 0.0
    return Fault(f"step {step} of rank {rank}{', within' if late else ''}", "step", step, rank, delay_seconds=delay)


def coordinator_faults(seed: int) -> tuple[Fault, ...]:
    """Three kills of the coordinator."""
    step = random.Random(seed).randrange(6, 20)
    return (
        Fault(f"coordinator at step {step}", "step", step, victim="coordinator"),
        Fault("coordinator while step 40 is written", "data", 40, victim="coordinator"),
        Fault("coordinator after the candidate is done", "event", kind="candidate_done"),
    )


def run_supervised(folder: Path, name: str, faults: tuple[Fault, ...]) -> Journal:
    """One job with a supervisor that replaces its coordinator."""
    home, journal = make_job(folder, name, faults)
    run_job(home, journal.job_id, LocalBackend(COORDINATOR))
    return journal


def run_with_zombie(folder: Path) -> tuple[Journal, dict[str, Any]]:
    """A coordinator is stopped, its successor takes over, and the first one's ranks go on until it wakes up."""
    _, journal = make_job(folder, "zombie", ())
    plan = FaultPlan.read(journal.directory)
    first, second = LocalBackend(COORDINATOR), LocalBackend(COORDINATOR)
    zombie = first.submit(journal)
    _until(lambda: journal.view().candidate(CANDIDATE).latest.get("step", 0) >= 10)
    os.kill(zombie["pid"], signal.SIGSTOP)
    plan.hold(epoch=1).touch()
    successor = second.submit(journal)
    try:
        _until(lambda: journal.view().candidate(CANDIDATE).gang.epoch == 2)
        gangs = [event for event in journal.events() if event["kind"] == "gang_started"]
        taken_over = next(event for event in gangs if event["epoch"] == 2)

        def late() -> list[dict[str, Any]]:
            return [commit for commit in plan.commits() if commit["epoch"] == 1 and commit["time"] > taken_over["time"]]

        plan.hold(epoch=1).unlink()
        _until(late)
        os.kill(zombie["pid"], signal.SIGCONT)
        _until(lambda: first.status(zombie).phase is Phase.ENDED)
        _until(lambda: second.status(successor).phase is Phase.ENDED)
    finally:
        first.stop(zombie, 0)
        second.stop(successor, 0)
    after = [event["epoch"] for event in journal.events(taken_over["number"])]
    facts = {
        "zombie_exit_code": first.status(zombie).exit_code,
        "late_checkpoints": len(late()),
        "late_events": sum(epoch == 1 for epoch in after),
    }
    return journal, facts


def _until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + LIMIT_SECONDS
    while not condition():
        if time.monotonic() > deadline:
            raise SystemExit("a run does not come to its end")
        time.sleep(0.05)


# Measures


def measure(journal: Journal, seconds: float) -> dict[str, Any]:
    """What the journal and the final checkpoint say of a run."""
    (candidate,) = result_document(journal)["candidates"]
    view = journal.view()
    restarts = view.candidate(CANDIDATE).restarts
    failed_writes = sum(event["kind"] == "train.checkpoint_failed" for event in journal.events())
    return {
        "state": view.state.value,
        "error": view.error,
        "seconds": round(seconds, 1),
        "attempts": view.epoch,
        "attempts_that_trained": len({gang.epoch for gang in view.candidate(CANDIDATE).gangs}),
        "struck": FaultPlan.read(journal.directory).struck(),
        "process_groups": len(view.candidate(CANDIDATE).gangs),
        "restarts": [
            {
                "reason": restart["reason"],
                "from_step": restart["from_step"],
                "lost_steps": restart["lost_steps"],
                "lost_device_seconds": round(restart["lost_device_seconds"], 2),
            }
            for restart in restarts
        ],
        "failed_writes": failed_writes,
        "lost_steps": sum(restart["lost_steps"] for restart in restarts),
        "lost_device_seconds": candidate["lost_device_seconds"],
        "device_seconds": candidate["device_seconds"],
        "progress": {name: candidate[name] for name in PROGRESS},
        "fingerprint": fingerprint(candidate["checkpoint"]) if candidate["checkpoint"] else {},
        "left_behind": left_behind(10.0),
    }


def checks(run: dict[str, Any], calm: dict[str, Any]) -> dict[str, bool]:
    """What has to hold of a run beside the undisturbed one."""
    return {
        "succeeded": run["state"] == "succeeded",
        "bits_equal": bool(run["fingerprint"]) and run["fingerprint"] == calm["fingerprint"],
        "progress_equal": run["progress"] == calm["progress"],
        "burnt_covers_lost": run["device_seconds"] >= LEAST_DEVICE_SECONDS + run["lost_device_seconds"],
        "nothing_left_behind": not run["left_behind"],
    }


def campaign(folder: Path, wanted: list[str], seed: int) -> dict[str, dict[str, Any]]:
    """All runs by name, each with its measures and checks."""
    mark_campaign()
    runs: dict[str, dict[str, Any]] = {}

    def take(name: str, work: Callable[[], tuple[Journal, dict[str, Any]]]) -> None:
        started = time.monotonic()
        journal, facts = work()
        run = measure(journal, time.monotonic() - started) | facts
        run["checks"] = checks(run, runs.get("undisturbed", run)) | _more_checks(name, run)
        runs[name] = run
        print(json.dumps({name: _summary(run)}), flush=True)

    take("undisturbed", lambda: (run_supervised(folder, "calm", ()), {}))
    if "ranks" in wanted:
        faults = rank_faults(seed)
        take("ranks", lambda: (run_supervised(folder, "ranks", faults), {"planned": len(faults)}))
    if "coordinator" in wanted:
        take("coordinator", lambda: (run_supervised(folder, "coordinator", coordinator_faults(seed)), {"planned": 3}))
    if "zombie" in wanted:
        take("zombie", lambda: run_with_zombie(folder))
    return runs


def _more_checks(name: str, run: dict[str, Any]) -> dict[str, bool]:
    """What has to hold of one kind of run."""
    restarts = [restart["reason"] for restart in run["restarts"]]
    if name == "undisturbed":
        return {"no_restart": not restarts and run["attempts"] == 1}
    if name == "ranks":
        return {
            "every_fault_struck": len(run["struck"]) == run["planned"],
            "every_kill_is_a_restart": restarts == ["rank died"] * 12,
            "failed_write_is_told": run["failed_writes"] == 1,
        }
    if name == "coordinator":
        return {
            "every_fault_struck": len(run["struck"]) == run["planned"],
            "every_loss_is_an_attempt": run["attempts_that_trained"] == 4 and restarts == ["coordinator lost"] * 2,
        }
    return {
        "zombie_was_refused": run["zombie_exit_code"] == 4 and run["late_events"] == 0,
        "zombie_wrote_checkpoints": run["late_checkpoints"] > 0,
    }


def _summary(run: dict[str, Any]) -> dict[str, Any]:
    """A run without the hashes."""
    return {name: value for name, value in run.items() if name != "fingerprint"} | {"keys": len(run["fingerprint"])}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=RESULTS, metavar="FILE")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--runs", nargs="+", choices=["ranks", "coordinator", "zombie"])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        runs = campaign(Path(folder), options.runs or ["ranks", "coordinator", "zombie"], options.seed)
    failed = [f"{name}: {check}" for name, run in runs.items() for check, holds in run["checks"].items() if not holds]
    document = {"seed": options.seed, "cores": os.cpu_count(), "failed_checks": failed}
    document["runs"] = {name: _summary(run) for name, run in runs.items()}
    options.json.parent.mkdir(exist_ok=True)
    options.json.write_text(json.dumps(document, indent=2) + "\n")
    print("\n".join(failed) or "every check holds")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
