"""How long training stands still for a checkpoint: written in the background beside written while it waits.

Two tensor-parallel ranks of a 50M-parameter model with its optimizer. Both kinds are written in turns, and a training
step is timed while the background write is under way. Writes ``../results/checkpoint_stall.json``.

    python benchmarks/checkpoint_stall/bench.py [--repeats 5]
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from parallelism.budget import Budget, Progress
from parallelism.layout import Layout
from parallelism.models.gpt.config import GPTConfig
from parallelism.training import TrainingConfig, TrainTask
from tests.ranks import run_ranks

RESULTS = Path(__file__).resolve().parents[1] / "results" / "checkpoint_stall.json"
LENGTH, BATCH = 128, 4


def make_task() -> TrainTask:
    """One micro-batch per step, so that a step is short."""
    return TrainTask(
        name="stall",
        seed=1,
        model=GPTConfig(layers=12, hidden=512, heads=8, vocab_size=8192, context=LENGTH),
        layout=Layout(tensor=2),
        training=TrainingConfig(global_batch=BATCH, micro_batch=BATCH, learning_rate=1e-4, precision="fp32"),
        budget=Budget(tokens=1e12),
        data_dir="unused",
        sequence_length=LENGTH,
        checkpoint_dir="unused",
    )


def measure_rank(task: TrainTask, root: str, repeats: int) -> list[dict[str, float]]:
    """On every rank: seconds of a plain step, of a blocking save, of the stall, of a step meanwhile, of the write."""
    import numpy as np

    from parallelism import checkpoint
    from parallelism.engines.megatron import MegatronEngine
    from parallelism.models.gpt.sharded import collate

    engine, generator = MegatronEngine(task), np.random.default_rng(0)
    saver = checkpoint.AsyncSaver()

    def step() -> float:
        rows = generator.integers(0, task.model.vocab_size, (BATCH, LENGTH + 1))
        started = time.perf_counter()
        engine.train_step([collate(rows)], 1e-4)
        return time.perf_counter() - started

    step()
    found = []
    for repeat in range(repeats):
        plain = step()
        blocking = checkpoint.save(engine, Progress(step=repeat), f"{root}/blocking-{repeat}").seconds
        stall = saver.start(engine, Progress(step=repeat), f"{root}/background-{repeat}")
        meanwhile = step()
        written = saver.wait()
        assert written is not None
        row = {"step": plain, "blocking": blocking, "stall": stall, "step_meanwhile": meanwhile}
        found.append(row | {"background": written.seconds})
    return found


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    options, task = parser.parse_args(), make_task()
    with tempfile.TemporaryDirectory(prefix="stall-") as root:
        rows = run_ranks(measure_rank, 2, task, root, options.repeats, timeout=600)[0]
        stored = sum(file.stat().st_size for file in (Path(root) / "blocking-0").iterdir())
    medians = {name: round(statistics.median(row[name] for row in rows), 4) for name in rows[0]}
    document: dict[str, Any] = {
        "parameters": task.model.parameter_count(),
        "checkpoint_bytes": stored,
        "median_seconds": medians,
        "stall_of_blocking": round(medians["stall"] / medians["blocking"], 3),
        "rows": rows,
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    print(json.dumps({name: value for name, value in document.items() if name != "rows"}, indent=2))


if __name__ == "__main__":
    main()
