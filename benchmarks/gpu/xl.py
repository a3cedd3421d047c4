"""GPT-2 XL (1.56B parameters, 25 heads) trained on real text on one GPU by the standard engine in bfloat16."""

import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.gpu.checkpoints import prepare_data
from benchmarks.gpu.common import GIB, SEED, apart, connect, make_engine, make_task, timed

STEPS = 20
GLOBAL_BATCH, MICRO_BATCH = 8, 4


def measure(tiny: bool) -> dict[str, Any]:
    """Twenty steps in a fresh process."""
    work = Path(tempfile.mkdtemp(prefix="gpu-xl-"))
    try:
        prepare_data(work, 64 if tiny else 1024)
        return apart(train, str(work), tiny).result()
    finally:
        shutil.rmtree(work)


def train(work: str, tiny: bool) -> dict[str, Any]:
    """Losses, seconds per step, and peak memory beside the estimate."""
    import torch

    from parallelism import device
    from parallelism.accounting import memory_per_rank, train_flops_per_sequence
    from parallelism.data.batches import TokenBatches
    from parallelism.feed import Feed
    from parallelism.instruments import measured_peak_flops
    from parallelism.models.gpt.sharded import collate
    from parallelism.presets import resolve_model

    connect()
    small = {"layers": 2, "hidden": 64, "heads": 4, "context": 64} if tiny else {}
    model = resolve_model({"preset": "gpt2-xl"} | small)
    training = {"global_batch": GLOBAL_BATCH, "micro_batch": MICRO_BATCH, "precision": "bf16"}
    task = make_task(model, work=work, training=training)
    flops = GLOBAL_BATCH * train_flops_per_sequence(model, task.sequence_length)
    peak_flops = measured_peak_flops("bf16")
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    baseline = device.baseline_memory_bytes()
    started = time.perf_counter()
    engine = make_engine(task)
    built = time.perf_counter() - started
    feed = Feed(TokenBatches(task.data_dir, "train", task.sequence_length, SEED), collate, MICRO_BATCH, 1, 0)
    seconds, losses = [], []
    for step in range(STEPS):
        batches = feed.micro_batches(step * GLOBAL_BATCH, GLOBAL_BATCH)
        rate = 1e-4 * min(1.0, (step + 1) / 4)
        elapsed, result = timed(lambda batches=batches, rate=rate: engine.train_step(batches, rate))
        seconds.append(elapsed)
        losses.append(result.loss)
    median = statistics.median(seconds[2:])
    peak = device.peak_memory_bytes() - baseline
    estimate = memory_per_rank(model, task.layout, task.training, task.sequence_length, "gpu").total
    fell = statistics.mean(losses[-5:]) < statistics.mean(losses[:5]) - 1.0
    return {
        "parameters": model.parameter_count(),
        "heads": model.heads,
        "tokens_per_step": GLOBAL_BATCH * task.sequence_length,
        "micro_batch": MICRO_BATCH,
        "losses": losses,
        "loss_fell": fell,
        "build_seconds": built,
        "seconds_by_step": seconds,
        "seconds_per_step_median": median,
        "tokens_per_second": GLOBAL_BATCH * task.sequence_length / median,
        "mfu": flops / median / peak_flops,
        "peak_gib": peak / GIB,
        "estimate_gib": estimate / GIB,
        "estimate_error": estimate / peak - 1.0,
        "passed": tiny or fell,
    }
