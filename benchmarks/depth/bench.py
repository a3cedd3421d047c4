"""What depth costs: memory of every process of a compression job, and bytes read for one layer, at twice the layers.

Two models with random weights, alike but for their depth, lie as checkpoints of two ranks. Each is compressed by four
recipes through the real coordinator, and one of its layers is read by a process of its own. Memory is the peak resident
set (VmHWM); what a worker holds before it has read anything is measured, too, and told apart. Both may grow by less
than 10 %. Writes ``../results/depth.json``.

    python benchmarks/depth/bench.py [--layers 12]
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.processes import Watcher
from launcher.backends.local import LocalBackend
from launcher.jobs import Home, create_job, run_job
from launcher.result import result_document
from launcher.spec import JobSpec
from parallelism.models.gpt.config import GPTConfig
from tests.compression import made

RESULTS = Path(__file__).resolve().parents[1] / "results" / "depth.json"
LIMIT = 1.10
GRID = {
    "prune": {"methods": ["wanda", "sparsegpt"], "sparsity": [0.5]},
    "quantize": {"methods": ["rtn", "gptq"], "bits": [4], "group_size": 64},
    "calibration": {"sequences": 32},
}
ONE_LAYER = """
import sys
from pathlib import Path
from parallelism.layer_reader import CheckpointWeights
def read(): return int(dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())["rchar"])
weights = CheckpointWeights(sys.argv[1])
weights.layer(0)  # what torch imports on its first read
before = read()
weights.layer(3)
print(read() - before)
"""
IDLE = """
import compression.tasks
from pathlib import Path
print(next(line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")))
"""


def main() -> int:
    """Measure both depths and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12, help="of the shallower model")
    options = parser.parse_args()
    idle = int(output(IDLE)) * 1024
    rows = []
    for layers in (options.layers, 2 * options.layers):
        with tempfile.TemporaryDirectory(prefix="depth-") as folder:
            rows.append(measure(Path(folder), layers, idle))
        print(json.dumps(rows[-1]), flush=True)
    shallow, deep = rows
    names = ("worker_peak_bytes", "worker_peak_above_idle_bytes", "coordinator_peak_bytes", "layer_read_bytes")
    growth = {name: deep[name] / shallow[name] for name in names}
    print(json.dumps({"growth": growth}, indent=1))
    document = {"idle_worker_bytes": idle, "growth": growth, "rows": rows}
    RESULTS.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    return 0 if all(value < LIMIT for value in growth.values()) else 1


def measure(folder: Path, layers: int, idle: int) -> dict[str, Any]:
    """One depth."""
    config = GPTConfig(style="llama", layers=layers, hidden=768, heads=12, ffn_hidden=2048, vocab_size=257, context=128)
    source = made.write_checkpoint(folder / "checkpoint", config, made.weights(config, std=0.03), tensor=2)
    text = folder / "text.txt"
    text.write_text("\n".join(f"line {i} grows and is cut {i * i} times" for i in range(20000)))
    document = {
        "name": f"depth-{layers}",
        "data": {
            "train": [str(text)],
            "documents": "line",
            "tokenizer": {"kind": "bytes"},
            "sequence_length": config.context,
        },
        "candidates": [{"name": "given", "source": str(source)}],
        "compression": GRID,
        "evaluation": {"tokens": 1024},
        "export": {"variants": "none"},
        "execution": {"devices": 2},
    }
    home = Home(folder / "home")
    journal = create_job(JobSpec.model_validate(document), home)
    watcher = Watcher()
    watcher.start()
    try:
        run_job(home, journal.job_id, LocalBackend())
    finally:
        watcher.stop.set()
        watcher.join()
    started = [event for event in journal.events() if event["kind"] == "process_started"]
    peaks = {
        role: max(watcher.peak_of(event["pid"]) for event in started if event["role"] == role)
        for role in ("worker", "coordinator")
    }
    return {
        "layers": layers,
        "state": result_document(journal)["state"],
        "worker_peak_bytes": peaks["worker"],
        "worker_peak_above_idle_bytes": peaks["worker"] - idle,
        "coordinator_peak_bytes": peaks["coordinator"],
        "layer_read_bytes": int(output(ONE_LAYER, str(source))),
    }


def output(code: str, *arguments: str) -> str:
    """What Python code prints in a process of its own."""
    done = subprocess.run([sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout


if __name__ == "__main__":
    sys.exit(main())
