"""Peak memory of training on a GPU against the planner's estimate."""

import json
import sys
from typing import Any

from benchmarks.gpu.common import (
    GIB,
    apart,
    connect,
    forget,
    made_batches,
    make_engine,
    make_task,
    quick_start_weights,
)

STEPS = 2
TARGET = 0.15
LENGTH = 1024
CASES: list[tuple[str, str, int, bool, str]] = [
    ("gpt2-small", "bf16", 8, False, "megatron"),
    ("gpt2-small", "bf16", 8, True, "megatron"),
    ("gpt2-small", "fp32", 4, False, "megatron"),
    ("gpt2-small", "fp32", 4, False, "lean"),
    ("smollm2-360m", "bf16", 2, False, "megatron"),
    ("smollm2-360m", "bf16", 8, False, "megatron"),
    ("smollm2-360m", "bf16", 8, True, "megatron"),
    ("smollm2-360m", "fp32", 4, False, "megatron"),
    ("tinyllama-1.1b", "bf16", 1, False, "megatron"),
    ("tinyllama-1.1b", "bf16", 4, False, "megatron"),
    ("tinyllama-1.1b", "bf16", 8, True, "megatron"),
    ("gpt2-xl", "bf16", 1, False, "megatron"),
    ("gpt2-xl", "bf16", 4, True, "megatron"),
]
"""(preset, precision, micro-batch, recompute, engine)."""


def measure(tiny: bool) -> dict[str, Any]:
    """All cases, one after another in one process."""
    result: dict[str, Any] = apart(measure_all, tiny).result()
    errors = [abs(row["error"]) for row in result["cases"] if row["error"] is not None]
    return {**result, "largest_error": max(errors, default=None), "passed": max(errors, default=0.0) <= TARGET}


def measure_all(tiny: bool) -> dict[str, Any]:
    """The life of the process."""
    import torch

    connect()
    torch.ones(256, 256, device="cuda") @ torch.ones(256, 256, device="cuda")  # makes cuBLAS's workspace
    rows = []
    with quick_start_weights():
        for case in CASES[:2] if tiny else CASES:
            rows.append(measure_case(*case, tiny=tiny))
            forget(compiled=True)
    return {"target": TARGET, "sequence_length": LENGTH, "cases": rows}


def measure_case(name: str, precision: str, micro_batch: int, recompute: bool, engine_name: str, tiny: bool) -> Any:
    """Two steps (the second with gradients, masters and moments all there) of two micro-batches."""
    import numpy as np
    import torch

    from parallelism.accounting import memory_per_rank
    from parallelism.presets import resolve_model

    length = 64 if tiny else LENGTH
    small = {"layers": 2, "hidden": 64, "heads": 4} if tiny else {}
    model = resolve_model({"preset": name, "context": length} | small)
    count = 1 if engine_name == "lean" else 2
    training = {"global_batch": count * micro_batch, "micro_batch": micro_batch, "precision": precision}
    task = make_task(model, training=training | {"recompute": recompute}, layout={"engine": engine_name})
    estimate = memory_per_rank(model, task.layout, task.training, length, "gpu")
    before = allocated()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    engine = make_engine(task)
    built = allocated() - before
    generator = np.random.default_rng(0)
    for _ in range(STEPS):
        engine.train_step(made_batches(task, generator), 1e-4)
    after = allocated() - before
    lies_outside = outside()
    peak = (torch.cuda.max_memory_allocated() - before) if torch.cuda.is_available() else None
    row = {
        "model": name,
        "parameters": model.parameter_count(),
        "precision": precision,
        "micro_batch": micro_batch,
        "recompute": recompute,
        "engine": engine_name,
        "peak_gib": peak and peak / GIB,
        "reserved_gib": torch.cuda.max_memory_reserved() / GIB if peak else None,
        "built_gib": built / GIB,
        "between_steps_gib": after / GIB,
        "estimate_gib": estimate.total / GIB,
        "estimate_parts_gib": {part: value / GIB for part, value in estimate.parts().items()},
        "error": peak and estimate.total / peak - 1.0,
        "outside_allocator_gib": lies_outside,
    }
    print(json.dumps(row), file=sys.stderr, flush=True)
    return row


def allocated() -> int:
    """Bytes in use on the device."""
    import torch

    return torch.cuda.memory_allocated() if torch.cuda.is_available() else 0


def outside() -> float | None:
    """GiB on the device that torch's allocator does not hold: CUDA's context, libraries, NCCL; of all processes.

    megatron-core forgets NCCL's communicators of earlier engines without closing them: the first case is the one to
    look at.
    """
    import torch

    if not torch.cuda.is_available():
        return None
    free, total = torch.cuda.mem_get_info()
    return (total - free - torch.cuda.memory_reserved()) / GIB
