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

Step = Callable[[Any], float]


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

    from parallelism.accounting import train_flops_per_sequence
    from parallelism.instruments import measured_peak_flops

    connect()
    shape, batch = (TINY, (4, 2)) if tiny else (SHAPES[name], BATCHES[name])
    length = 64 if tiny else LENGTH
    peak = measured_peak_flops("bf16")
    engine_step, model = make_espalier(shape, batch, length)
    transformers_step, their_parameters = make_transformers(shape, batch, length)
    arms: dict[str, Step] = {
        "espalier": engine_step,
        "transformers": any_order(transformers_step),
        "any_order": any_order(engine_step),
    }
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
    ratios = [theirs / ours for ours, theirs in pairs[WARM_UP:]]
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
    """One optimizer step as a function of token ids [sequences, tokens + 1], and the model's config."""
    from parallelism.models.gpt.config import GPTConfig
    from parallelism.models.gpt.sharded import collate

    rows, micro_batch = batch
    model = GPTConfig(style="llama", context=length, vocab_size=VOCABULARY, **shape)
    training = {"global_batch": rows, "micro_batch": micro_batch, "precision": "bf16"}
    with quick_start_weights():
        engine = make_engine(make_task(model, training=training))

    def step(ids: Any) -> float:
        parts = [collate(ids[begin : begin + micro_batch]) for begin in range(0, rows, micro_batch)]
        return float(engine.train_step(parts, LEARNING_RATE).loss)

    return step, model


def make_transformers(shape: dict[str, int], batch: tuple[int, int], length: int) -> tuple[Step, int]:
    """The same with Transformers' Llama on torch's scaled dot product attention and fused AdamW."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from parallelism.device import device

    rows, micro_batch = batch
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=shape["hidden"],
        intermediate_size=shape["ffn_hidden"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["kv_heads"],
        max_position_embeddings=length,
        tie_word_embeddings=True,
        use_cache=False,
        attn_implementation="sdpa",
    )
    with device():
        model = LlamaForCausalLM(config).to(torch.bfloat16).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def step(ids: Any) -> float:
        tokens = torch.from_numpy(ids[:, :-1]).to(device())
        total = torch.zeros((), device=device())
        for part in tokens.split(micro_batch):
            # The model shifts the labels itself; one position in `length` fewer is of no account.
            loss = model(input_ids=part, labels=part).loss * (micro_batch / rows)
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(total)

    return step, sum(parameter.numel() for parameter in model.parameters())


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
