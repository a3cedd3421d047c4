"""What the benchmarks of clusters share: one job file, and what has to be the same wherever it ran."""

from pathlib import Path
from typing import Any

from launcher.journal import Journal
from launcher.result import result_document
from launcher.spec import JobSpec
from launcher.view import JobView
from parallelism import places
from tests.finished import BATCH, LENGTH, small_job
from tests.launcher.fingerprint import fingerprint, tensors_checksum

CANDIDATE = "large"
STEPS, EVERY = 40, 5
PROGRESS = ("steps", "tokens", "flops", "train_loss", "validation_loss")
CALIBRATION = 16
"""Sequences."""
GRID = {
    "calibration": {"sequences": CALIBRATION},
    "prune": {"methods": ["magnitude", "wanda"], "sparsity": [0.5]},
    "quantize": {"methods": ["rtn", "gptq"], "bits": [4], "group_size": 16},
}
SLURM = {"nodes": 2, "cpus_per_node": 2, "partition": "main"}


def job_document(
    folder: Path, data: int, *, pipeline: int = 1, steps: int = STEPS, grid: bool = True
) -> dict[str, Any]:
    """One GPT with dropout, on two tensor-parallel ranks times ``data`` times ``pipeline``.

    The back-end's name is still to come.
    """
    document = small_job(folder / "text")
    (large,) = [one for one in document["candidates"] if one["name"] == CANDIDATE]
    large["model"] |= {"dropout": 0.1}
    return document | {
        "budget": {"tokens": (steps * BATCH + CALIBRATION * grid) * LENGTH},
        "candidates": [large | {"layout": {"tensor": 2, "data": data, "pipeline": pipeline}}],
        "compression": GRID if grid else {},
        "export": {"variants": "none"},
        "execution": {
            "devices": 2 * data * pipeline,
            "threads_per_rank": 1,
            "checkpoint_every": {"steps": EVERY},
            "slurm": SLURM,
        },
    }


def on(document: dict[str, Any], backend: str) -> JobSpec:
    """The same job elsewhere: one line of the file is another."""
    return JobSpec.model_validate(document | {"execution": document["execution"] | {"backend": backend}})


def row_of(journal: Journal) -> dict[str, Any]:
    """The candidate's row in the result."""
    (row,) = result_document(journal)["candidates"]
    return row


def hashes(journal: Journal) -> dict[str, str]:
    """SHA-256 of every tensor of the final checkpoint, of random states, and of every variant's tensors."""
    found = {_kind(key): value for key, value in fingerprint(_here(journal, row_of(journal)["checkpoint"])).items()}
    variants = result_document(journal)["variants"]
    return found | {
        f"variant {row['name']}": tensors_checksum(_here(journal, row["path"])) for row in variants if row["path"]
    }


def restarts_of(view: JobView) -> list[dict[str, Any]]:
    """Why the candidate's process groups were replaced, and what that cost."""
    told = ("reason", "from_step", "lost_steps", "lost_device_seconds")
    return [{name: restart[name] for name in told} for restart in view.candidate(CANDIDATE).restarts]


def _here(journal: Journal, shown: str) -> Path:
    """What the result names, on this machine."""
    return places.need(journal.local(shown))


def _kind(key: str) -> str:
    if key.startswith("optimizer."):
        return f"moment {key.removeprefix('optimizer.state.')}"
    return f"random state {key.rpartition('/')[2]}" if key.startswith("random_state") else f"weight {key}"


def nodes_of(journal: Journal, name: str = "node") -> dict[int, str]:
    """Rank → host name of its node, or another of its names (``node_id``: Ray's), of the last process group."""
    events = [event for event in journal.events() if event["kind"] == "process_started" and event["role"] == "rank"]
    return {event["rank"]: event[name] for event in events}
