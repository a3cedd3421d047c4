"""GPT-2 XL (1.56B parameters) compressed from its sharded checkpoint by four recipes, as a real job.

The checkpoint is one that two tensor-parallel ranks wrote after a step of training (``gpt2_xl.py``). The job names it
as its source, and calibrates, solves, assembles and evaluates through the coordinator; nothing is exported. Memory is
the largest resident set of every process of the job (VmHWM, read while it runs); no process may need 4 GiB. Not part
of ``make bench``: making the checkpoint needs 16 GiB, and the job takes the better part of an hour on two cores; with
``--work`` it can be interrupted and continued. Writes ``results/gpt2_xl_compression.json``.

    python benchmarks/gpt2_xl_compression.py [--devices 2] [--work DIR [--continue JOB]]
"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import gpt2_xl
from benchmarks.processes import Watcher
from launcher.backends.local import LocalBackend
from launcher.jobs import Home, create_job, run_job
from launcher.result import result_document
from launcher.spec import JobSpec
from parallelism.budget import Budget
from parallelism.data.config import DataConfig, TokenizerConfig
from parallelism.data.prepare import prepare

RESULTS = Path(__file__).resolve().parent / "results" / "gpt2_xl_compression.json"
GIB = 2**30
LIMIT_BYTES = 4 * GIB
LENGTH, CALIBRATION, HELD_OUT = 128, 64, 1024
GRID = {
    "prune": {"methods": ["wanda", "sparsegpt"], "sparsity": [0.5]},
    "quantize": {"methods": ["rtn", "gptq"], "bits": [4], "group_size": 64},
    "calibration": {"sequences": CALIBRATION},
}


def main() -> None:
    """Make the checkpoint unless it is there, run the job, and tell what it took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--work", type=Path, default=None, help="keep checkpoint and job here")
    parser.add_argument("--continue", dest="job", metavar="JOB", help="go on with a job of --work")
    options = parser.parse_args()
    if options.work is not None:
        document = measure(options.work, options.devices, options.job)
    else:
        with tempfile.TemporaryDirectory(prefix="gpt2-xl-") as work:
            document = measure(Path(work), options.devices)
    RESULTS.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(document, indent=2))
    if document["state"] != "succeeded" or document["peak_bytes"] >= LIMIT_BYTES:
        sys.exit("the job failed, or a process needed 4 GiB or more")


def measure(work: Path, devices: int, continued: str | None = None) -> dict[str, Any]:
    """Run the job and watch its processes; what was seen before an interruption counts."""
    source = checkpoint(work)
    home = Home(work / "home")
    journal = home.journal(continued) if continued else create_job(JobSpec.model_validate(job(source, devices)), home)
    notes = work / f"{journal.job_id}.json"
    before = json.loads(notes.read_text()) if notes.exists() else {"seconds": 0.0, "peaks": {}, "lives": 0}
    watcher = Watcher()
    watcher.start()
    started = time.monotonic()
    try:
        run_job(home, journal.job_id, LocalBackend())
    finally:
        watcher.stop.set()
        watcher.join()
        seconds = before["seconds"] + time.monotonic() - started
        peaks = before["peaks"] | watcher.peaks
        notes.write_text(json.dumps({"seconds": seconds, "peaks": peaks, "lives": before["lives"] + 1}))
    result = result_document(journal)
    return {
        "state": result["state"],
        "error": result["error"],
        "devices": devices,
        "load_average_after": os.getloadavg()[0],
        "seconds": round(seconds, 1),
        "interruptions": before["lives"],
        "stage_seconds": {name: round(value, 1) for name, value in result["stages"].items()},
        "peak_bytes": max(peaks.values()),
        "peak_gib_by_process": {
            name: round(value / GIB, 3) for name, value in sorted(peaks.items(), key=lambda row: -row[1])[:6]
        },
        "checkpoint_files": sorted(path.name for path in source.iterdir()),
        "variants": {
            row["name"]: {"bytes": row["bytes"], "perplexity": row["metrics"]["perplexity"]}
            for row in result["variants"]
        },
    }


def checkpoint(work: Path) -> Path:
    """The newest checkpoint in ``work``; made by one step of training on two ranks where there is none."""
    found = sorted((work / "checkpoints").glob("e*-s*"))
    if found:
        return found[-1]
    sys.argv = sys.argv[:1]
    options = gpt2_xl.parse_arguments()
    data = DataConfig(train=["builtin:python-stdlib"], tokenizer=TokenizerConfig(kind="bytes"))
    prepare(data.model_copy(update={"sequence_length": options.sequence}), work / "data", gpt2_xl.SEED)
    task = gpt2_xl.make_task(options, work)
    gpt2_xl.run(task.model_copy(update={"budget": Budget(tokens=options.sequence)}))
    return checkpoint(work)


def job(source: Path, devices: int) -> dict[str, Any]:
    """The job on the checkpoint."""
    return {
        "name": "gpt2-xl",
        "data": {"train": ["builtin:python-stdlib"], "tokenizer": {"kind": "bytes"}, "sequence_length": LENGTH},
        "candidates": [{"name": "gpt2-xl", "source": str(source)}],
        "compression": GRID,
        "evaluation": {"tokens": HELD_OUT},
        "export": {"variants": "none"},
        "execution": {"devices": devices},
    }


if __name__ == "__main__":
    main()
