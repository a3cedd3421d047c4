"""How long training on a GPU stands still for a checkpoint of more than a GiB."""

import shutil
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.gpu.common import GIB, apart, connect, made_batches, make_engine, make_task, timed

BIG = {"style": "gpt2", "layers": 12, "hidden": 768, "heads": 12, "vocab_size": 50257, "context": 1024}
SMALL = {"layers": 2, "hidden": 64, "heads": 4, "context": 64}


def measure(tiny: bool) -> dict[str, Any]:
    """In a fresh process."""
    result: dict[str, Any] = apart(measure_stall, tiny).result()
    return result


def measure_stall(tiny: bool) -> dict[str, Any]:
    """How long training stands still for a checkpoint that is written beside it, and for one that it waits for."""
    import numpy as np

    from parallelism import checkpoint
    from parallelism.budget import Progress
    from parallelism.models.gpt.config import GPTConfig

    connect()
    task = make_task(
        GPTConfig(**BIG | (SMALL if tiny else {})),
        training={"global_batch": 2, "micro_batch": 2, "precision": "bf16"},
    )
    engine = make_engine(task)
    batches = made_batches(task, np.random.default_rng(0))
    engine.train_step(batches, 1e-4)
    work = Path(tempfile.mkdtemp(prefix="gpu-stall-"))
    saver = checkpoint.AsyncSaver()
    try:
        stalls, steps = [], []
        for index in range(3):
            stalls.append(timed(lambda index=index: saver.start(engine, Progress(), work / f"async{index}"))[0])
            steps.append(timed(lambda: engine.train_step(batches, 1e-4))[0])
            written = saver.wait()
        waited = [
            timed(lambda index=index: checkpoint.save(engine, Progress(), work / f"b{index}"))[0] for index in (0, 1)
        ]
        size = sum(file.stat().st_size for file in (work / "b0").iterdir())
    finally:
        saver.close()
        shutil.rmtree(work)
    return {
        "state_gib": size / GIB,
        "stall_seconds": stalls,
        "step_seconds_meanwhile": steps,
        "written_after_seconds": written.seconds if written else None,
        "blocking_seconds": waited,
    }
