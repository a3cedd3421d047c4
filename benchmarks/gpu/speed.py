"""Training speed of the megatron engine on a GPU against Hugging Face Transformers' Llama of the same shape.

bfloat16 on both sides, step by step in turns in one process. Transformers' weights and AdamW moments are bfloat16
alone (8 bytes per parameter); the engine keeps float32 gradients, masters and moments beside its weights (18 bytes),
and computes with kernels that give the same bits every time, which Transformers does not. What the latter costs is the
difference to ``any_order``: the engine without it.
"""

import json
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from benchmarks.gpu.common import apart, connect, forget, make_engine, make_task, quick_start_weights, timed
from benchmarks.trainers import Step, engine_step, transformers_step

WARM_UP = 3
LEARNING_RATE = 3e-4
LENGTH = 1024
SHAPES: dict[str, dict[str, int]] = {
    "125M": {"layers": 12, "hidden": 768, "heads": 12, "kv_heads": 4, "ffn_hidden": 2048},
    "350M": {"layers": 24, "hidden": 1024, "heads": 16, "kv_heads": 8, "ffn_hidden": 2816},
    "1.3B": {"layers": 24, "hidden": 2048, "heads": 16, "kv_heads": 8, "ffn_hidden": 5632},
}
VOCABULARY = 32000
BATCHES = {"125M": (32, 16), "350M": (32, 16), "1.3B": (16, 8)}
"""Sequences per step and per micro-batch."""
TINY = {"layers": 2, "hidden": 64, "heads": 4, "kv_heads": 2, "ffn_hidden": 128}

ATTENTION_KERNELS = ("flash", "fmha", "cudnn_generated")
"""Parts of the names of kernels that do not materialise the scores."""


def measure(tiny: bool, steps: int = 10) -> dict[str, Any]:
    """Every shape, each in a fresh process."""
    rows = []
    for name in SHAPES:
        rows.append(apart(compare, name, tiny, 2 if tiny else steps).result())
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    return {"models": rows}


def compare(name: str, tiny: bool, steps: int) -> dict[str, Any]:
    """Medians of both, the median of the ratios of neighbouring steps, and the kernels that took the time."""
    import numpy as np
    import torch

    from parallelism.accounting import train_flops_per_sequence
    from parallelism.instruments import measured_peak_flops

    connect()
    shape, batch = (TINY, (4, 2)) if tiny else (SHAPES[name], BATCHES[name])
    length = 64 if tiny else LENGTH
    peak = measured_peak_flops("bf16")
    ours, model = make_espalier(shape, batch, length)
    theirs, their_parameters = transformers_step(shape, VOCABULARY, length, batch[1], LEARNING_RATE, torch.bfloat16)
    arms: dict[str, Step] = {"espalier": ours, "transformers": any_order(theirs), "any_order": any_order(ours)}
    generator = np.random.default_rng(0)
    seconds: dict[str, list[float]] = {arm: [] for arm in arms}
    losses: dict[str, list[float]] = {arm: [] for arm in arms}
    for _ in range(WARM_UP + steps):
        ids = generator.integers(0, VOCABULARY, (batch[0], length + 1))
        for arm, step in arms.items():
            elapsed, loss = timed(lambda step=step, ids=ids: step(ids))
            seconds[arm].append(elapsed)
            losses[arm].append(loss)
    profiles = {arm: profile(lambda step=step: step(ids)) for arm, step in arms.items() if arm != "any_order"}
    medians = {arm: statistics.median(values[WARM_UP:]) for arm, values in seconds.items()}
    pairs = list(zip(seconds["espalier"], seconds["transformers"], strict=True))
    ratios = [other / own for own, other in pairs[WARM_UP:]]
    flops = batch[0] * train_flops_per_sequence(model, length)
    forget()
    return {
        "shape": name,
        "parameters": model.parameter_count(),
        "parameters_transformers": their_parameters,
        "tokens_per_step": batch[0] * length,
        "micro_batch": batch[1],
        "matmul_peak_tflops": peak / 1e12,
        **{f"{arm}_tokens_per_second": batch[0] * length / value for arm, value in medians.items()},
        **{f"{arm}_mfu": flops / value / peak for arm, value in medians.items()},
        "speed_ratio_median": statistics.median(ratios),
        "speed_ratio_range": [min(ratios), max(ratios)],
        "first_steps_seconds": {arm: values[:WARM_UP] for arm, values in seconds.items()},
        "last_losses": {arm: values[-1] for arm, values in losses.items()},
        "profiles": profiles,
    }


def make_espalier(shape: dict[str, int], batch: tuple[int, int], length: int) -> tuple[Step, Any]:
    """The engine's step, and the model's config."""
    from parallelism.models.gpt.config import GPTConfig

    rows, micro_batch = batch
    model = GPTConfig(style="llama", context=length, vocab_size=VOCABULARY, **shape)
    training = {"global_batch": rows, "micro_batch": micro_batch, "precision": "bf16"}
    with quick_start_weights():
        engine = make_engine(make_task(model, training=training))
    return engine_step(engine, micro_batch, LEARNING_RATE), model


def any_order(step: Step) -> Step:
    """The step without torch's reproducible kernels."""

    def run(ids: Any) -> float:
        with _any_order():
            return step(ids)

    return run


@contextmanager
def _any_order() -> Iterator[None]:
    import torch

    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def profile(action: Callable[[], Any]) -> dict[str, Any] | None:
    """Where one step's device time goes; which attention kernels ran."""
    import torch

    if not torch.cuda.is_available():
        action()
        return None
    with torch.profiler.profile(activities=list(torch.profiler.supported_activities())) as recorded:
        wall, _ = timed(action)
    kernels = [
        (event.key, event.self_device_time_total / 1e6, event.count)
        for event in recorded.key_averages()
        if event.device_type == torch.autograd.DeviceType.CUDA
    ]
    kernels.sort(key=lambda kernel: -kernel[1])
    busy = sum(seconds for _, seconds, _ in kernels)
    attention = [name for name, _, _ in kernels if any(word in name.lower() for word in ATTENTION_KERNELS)]
    return {
        "busy_seconds": busy,
        "wall_seconds_profiled": wall,
        "kernels": sum(count for _, _, count in kernels),
        "flash_attention": bool(attention),
        "attention_kernels": [name[:120] for name in attention],
        "most_time": [
            {"kernel": name[:160], "share": seconds / busy, "count": count} for name, seconds, count in kernels[:24]
        ],
    }
