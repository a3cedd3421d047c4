"""Compression under fire: workers of a real job's compression stage are killed twenty times.

A model with random weights (12 layers, 5M parameters) is compressed by fifteen recipes through the real coordinator:
once in peace, once with SIGKILL to its workers, half of the kills at random moments and half as soon as one of them is
seen to write a file. Every variant has to come out with the same tensors, every kill may cost one task at most, and
every layer is committed once. Exit code 1 when something does not hold. Takes about five minutes on two cores.

    python benchmarks/compression_faults/bench.py [--json FILE] [--kills 20] [--seed 1]
"""

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from launcher.backends.local import LocalBackend
from launcher.jobs import Home, create_job, run_job
from launcher.journal import Journal
from launcher.result import result_document
from launcher.spec import JobSpec
from parallelism.models.gpt.config import GPTConfig
from tests.compression import made
from tests.launcher.fingerprint import tensors_checksum

RESULTS = Path(__file__).resolve().parents[1] / "results" / "compression_faults.json"
CANDIDATE = "given"
CONFIG = GPTConfig(
    style="llama", layers=12, hidden=192, heads=6, kv_heads=2, ffn_hidden=512, vocab_size=257, context=128
)
GRID = {
    "prune": {"methods": ["wanda", "sparsegpt"], "sparsity": [0.5, 0.7]},
    "quantize": {"methods": ["gptq"], "bits": [4], "average_bits": [3.5], "group_size": 64},
    "combine": True,
    "calibration": {"sequences": 96},
}
ALMOST = 0.001
"""Seconds between two looks for a file that is being written."""


@dataclass
class Killer:
    """Kills workers of a job until it is told to stop; half of them while they write."""

    journal: Journal
    kills: int
    generator: random.Random
    stop: threading.Event = field(default_factory=threading.Event)
    at_random: int = 0
    writing: int = 0
    half_written: int = 0
    """Kills that left a file behind that was never finished."""

    def run(self) -> None:
        """One kill after the other, each of a worker that has not been killed yet."""
        while not self.stop.is_set() and self.at_random + self.writing < self.kills:
            if self.at_random <= self.writing:
                self.at_random += self._strike_at_random()
            else:
                self.writing += self._strike_a_writer()

    def _strike_at_random(self) -> bool:
        self.stop.wait(self.generator.uniform(0.1, 3.0))
        workers = self._workers()
        return bool(workers) and _kill(self.generator.choice(workers))

    def _strike_a_writer(self) -> bool:
        """Wait until a worker has a draft open, and kill it."""
        folder = self.journal.candidate_dir(CANDIDATE)
        while not self.stop.is_set():
            for draft in (*folder.glob("layers/*/.*"), *folder.glob("statistics/*/.*"), *folder.glob("variants/.*")):
                writer = next((pid for pid in self._workers() if _has_open(pid, draft)), None)
                if writer is not None and _kill(writer):
                    time.sleep(0.05)
                    self.half_written += draft.exists()
                    return True
            time.sleep(ALMOST)
        return False

    def _workers(self) -> list[int]:
        """Workers that live, while the job compresses."""
        view = self.journal.view()
        if view.active_stage != "compress":
            return []
        return [event["pid"] for event in view.processes.values() if event["role"] == "worker"]


def _has_open(pid: int, path: Path) -> bool:
    try:
        links = [os.readlink(entry.path) for entry in os.scandir(f"/proc/{pid}/fd")]
    except (FileNotFoundError, PermissionError):
        return False
    return str(path) in links


def _kill(pid: int) -> bool:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True


def make_job(folder: Path, name: str) -> tuple[Home, Journal]:
    """A job on a model that exists; nothing is trained or exported."""
    source, text = folder / "checkpoint", folder / "text.txt"
    if not text.exists():
        source = made.write_checkpoint(source, CONFIG, made.weights(CONFIG, std=0.05), tensor=2)
        text.write_text("\n".join(f"line {i} grows and is cut {i * i} times" for i in range(20000)))
        (folder / "source").symlink_to(source)
    document = {
        "name": name,
        "data": {
            "train": [str(text)],
            "documents": "line",
            "tokenizer": {"kind": "bytes"},
            "sequence_length": CONFIG.context,
        },
        "candidates": [{"name": CANDIDATE, "source": str(folder / "source")}],
        "compression": GRID,
        "evaluation": {"tokens": 1024},
        "export": {"variants": "none"},
        "execution": {"devices": 2, "max_restarts": 20},
    }
    home = Home(folder / "home")
    return home, create_job(JobSpec.model_validate(document), home)


def run(folder: Path, name: str, kills: int, seed: int) -> dict[str, Any]:
    """One job, with so many kills."""
    home, journal = make_job(folder, name)
    killer = Killer(Journal(journal.directory), kills, random.Random(seed))
    thread = threading.Thread(target=killer.run)
    thread.start()
    started = time.monotonic()
    try:
        run_job(home, journal.job_id, LocalBackend())
    finally:
        killer.stop.set()
        thread.join()
    return measure(journal) | {
        "seconds": round(time.monotonic() - started, 1),
        "kills": {"at_random": killer.at_random, "writing": killer.writing, "half_written": killer.half_written},
    }


def measure(journal: Journal) -> dict[str, Any]:
    """What the journal says, and what came out."""
    events, result = list(journal.events()), result_document(journal)
    committed = [event["layer"] for event in events if event["kind"] == "layer_compressed"]
    folder = journal.candidate_dir(CANDIDATE)
    return {
        "state": result["state"],
        "error": result["error"],
        "variants": {row["name"]: tensors_checksum(row["path"]) for row in result["variants"]},
        "restarted": [event["task"] for event in events if event["kind"] == "task_restart"],
        "layers_committed": len(committed),
        "layers_committed_twice": len(committed) - len(set(committed)),
        "drafts_left": sum(path.is_file() for path in folder.rglob(".*")),
    }


def checks(calm: dict[str, Any], stormy: dict[str, Any], kills: int) -> dict[str, bool]:
    """What has to hold."""
    struck = stormy["kills"]["at_random"] + stormy["kills"]["writing"]
    return {
        "both_succeeded": calm["state"] == stormy["state"] == "succeeded",
        "every_kill_struck": struck == kills,
        "same_variants": bool(calm["variants"]) and calm["variants"] == stormy["variants"],
        "a_task_per_kill_at_most": len(stormy["restarted"]) <= struck,
        "every_layer_once": stormy["layers_committed"] == CONFIG.layers + 1 and not stormy["layers_committed_twice"],
        "nothing_half_written_remains": stormy["drafts_left"] == 0,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=RESULTS, metavar="FILE")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="compression-faults-") as folder:
        calm, stormy = (
            run(Path(folder), name, kills, options.seed) for name, kills in (("calm", 0), ("stormy", options.kills))
        )
    held = checks(calm, stormy, options.kills)
    summary = {
        name: {key: value for key, value in row.items() if key != "variants"} | {"variants": len(row["variants"])}
        for name, row in (("calm", calm), ("stormy", stormy))
    }
    document = {"seed": options.seed, "cores": os.cpu_count(), "checks": held} | summary
    print(json.dumps(document, indent=1))
    options.json.parent.mkdir(exist_ok=True)
    options.json.write_text(json.dumps(document, indent=2) + "\n")
    return 0 if all(held.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
