"""A small job that is run once from the command line, to the end; many tests look at what it left."""

import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from launcher.jobs import Home, list_jobs
from launcher.journal import Journal
from tests.services.running import ROOT, command

RUN_SECONDS = 600
STEPS, BATCH, LENGTH = 30, 8, 64


def small_job(folder: Path) -> dict[str, Any]:
    """Two candidates for :data:`STEPS` steps, one of them tensor-parallel, on text made here; three recipes each."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(40):
        words = " ".join(f"{'even' if i % 2 == 0 else 'odd'} number {i * number} follows {i}," for i in range(60))
        (folder / f"{number:02d}.txt").write_text(words, encoding="utf-8")
    training = {"global_batch": BATCH, "micro_batch": 4}
    return {
        "name": "tiny",
        "data": {
            "train": [str(folder / "*.txt")],
            "validation": 0.1,
            "tokenizer": {"kind": "bytes"},
            "sequence_length": LENGTH,
        },
        "budget": {"tokens": STEPS * BATCH * LENGTH + 100},
        "candidates": [
            {
                "name": "small",
                "model": {"family": "gpt", "layers": 1, "hidden": 32, "heads": 2},
                "layout": {},
                "training": training,
            },
            {
                "name": "large",
                "model": {"family": "gpt", "layers": 2, "hidden": 64, "heads": 4},
                "layout": {"tensor": 2},
                "training": training,
            },
        ],
        "compression": {
            "prune": {"methods": ["magnitude"], "sparsity": [0.5]},
            "quantize": {"methods": ["rtn"], "bits": [4], "group_size": 16},
        },
        "evaluation": {"tokens": 2048},
        "execution": {"devices": 2},
    }


def espalier(*arguments: str | Path, timeout: float = 120, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run one command to its end."""
    environment = {name: value for name, value in os.environ.items() if name != "ESPALIER_HOME"} | {"COLUMNS": "160"}
    return subprocess.run(
        command(*arguments), capture_output=True, text=True, timeout=timeout, cwd=cwd, env=environment, check=False
    )


@dataclass(frozen=True)
class FinishedJob:
    """What ``espalier run --json`` left and said."""

    home: Path
    job_file: Path
    spec: dict[str, Any]
    ended: subprocess.CompletedProcess[str]
    fingerprints: dict[str, dict[str, str]]
    """Candidate → hashes of its last checkpoint (:mod:`tests.launcher.fingerprint`), before a test could delete it."""

    @property
    def result(self) -> dict[str, Any]:
        """The document on stdout."""
        return json.loads(self.ended.stdout)

    @property
    def journal(self) -> Journal:
        """The job's."""
        (journal,) = list_jobs(Home(self.home))
        return journal


def finish_job(folder: Path) -> FinishedJob:
    """The small job, run to its end in ``folder``."""
    from tests.launcher.fingerprint import fingerprint

    spec = small_job(folder / "text")
    job_file = folder / "tiny.yaml"
    job_file.write_text(yaml.safe_dump(spec), encoding="utf-8")
    home = folder / "home"
    ended = espalier("run", job_file, "--home", home, "--json", timeout=RUN_SECONDS)
    assert ended.returncode == 0, ended.stderr[-3000:]
    rows = json.loads(ended.stdout)["candidates"]
    return FinishedJob(home, job_file, spec, ended, {row["name"]: fingerprint(row["checkpoint"]) for row in rows})
