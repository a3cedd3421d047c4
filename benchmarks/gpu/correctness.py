"""The same training steps on the GPU and on the CPU of the same machine."""

import importlib.util
import sys
import traceback
from typing import Any

from benchmarks.gpu.common import apart, connect, forget, made_batches, make_engine, make_task

STEPS = 20
LEARNING_RATE = 3e-3
SHAPE = {"layers": 4, "hidden": 128, "heads": 8, "kv_heads": 2, "vocab_size": 1000, "context": 64}
STYLES = ("gpt2", "llama")
FIRST_LIMIT = {"fp32": 1e-5, "bf16": 2e-2}
"""How far losses may differ at the first step."""
LIMIT = 1e-3
"""How far float32 losses may differ at any step: rounding differs, and 20 steps let it grow."""
NOISE_FACTOR = 2.0
"""bfloat16 losses may differ by this times what bfloat16 changes on the CPU alone, where there is no GPU to blame."""
CASES: list[tuple[str, dict[str, Any], str]] = [
    ("megatron", {}, "fp32"),
    ("megatron", {}, "bf16"),
    ("lean", {"engine": "lean"}, "fp32"),
    *((f"deepspeed ZeRO-{stage}", {"engine": "deepspeed", "zero_stage": stage}, "fp32") for stage in (1, 2, 3)),
    ("deepspeed ZeRO-3", {"engine": "deepspeed", "zero_stage": 3}, "bf16"),
]


def measure(tiny: bool) -> dict[str, Any]:
    """Every case on both devices; without a GPU (``tiny``) both are the CPU."""
    cases = [case for case in CASES if "deepspeed" not in case[0] or importlib.util.find_spec("deepspeed")]
    devices = [apart(train_all, cases, tiny, gpu=gpu) for gpu in (True, False)]
    on_gpu, on_cpu = (device.result() for device in devices)
    rows = [compare(name, steps, on_cpu[name], on_cpu[in_fp32(name)]) for name, steps in on_gpu.items()]
    missing = [] if len(cases) == len(CASES) else ["deepspeed is not installed"]
    return {"steps": STEPS, "cases": rows, "missing": missing, "passed": all(row["passed"] for row in rows)}


def train_all(cases: list[tuple[str, dict[str, Any], str]], tiny: bool) -> dict[str, Any]:
    """Losses and gradient norms by case, or the error that a case ended with."""
    connect()
    results: dict[str, Any] = {}
    for style in STYLES:
        for name, layout, precision in cases:
            case = f"{name} {style} {precision}"
            try:
                results[case] = train(style, layout, precision, 3 if tiny else STEPS)
            except (AssertionError, AttributeError, ImportError, RuntimeError, TypeError, ValueError) as error:
                traceback.print_exc()
                results[case] = f"{type(error).__name__}: {error}"
            print(case, results[case], file=sys.stderr, flush=True)
            forget()
    return results


def train(style: str, layout: dict[str, Any], precision: str, steps: int) -> list[tuple[float, float]]:
    """Steps over the same four batches again and again, so that the loss falls far."""
    import numpy as np

    from parallelism.models.gpt.config import GPTConfig

    training = {
        "global_batch": 8,
        "micro_batch": 8 if layout.get("engine") == "lean" else 4,
        "precision": precision,
        "gradient_clip": 0.5,
    }
    task = make_task(GPTConfig(style=style, **SHAPE), training=training, layout=layout)
    engine = make_engine(task)
    generator = np.random.default_rng(0)
    steps_of_data = [made_batches(task, generator) for _ in range(4)]
    results = [engine.train_step(steps_of_data[index % 4], LEARNING_RATE) for index in range(steps)]
    return [(result.loss, result.gradient_norm) for result in results]


def in_fp32(name: str) -> str:
    """The same case in float32."""
    return f"{name.rpartition(' ')[0]} fp32"


def compare(name: str, here: Any, there: Any, exact: Any) -> dict[str, Any]:
    """GPU against CPU; ``exact`` are the CPU's steps in float32."""
    if any(isinstance(steps, str) for steps in (here, there, exact)):
        return {"case": name, "error_on_gpu": str(here), "error_on_cpu": str(there), "passed": False}
    losses = loss_differences(here, there)
    noise = max(loss_differences(there, exact))
    norms = [abs(one[1] / other[1] - 1.0) for one, other in zip(here, there, strict=True)]
    precision = name.rpartition(" ")[2]
    most = LIMIT if precision == "fp32" else NOISE_FACTOR * noise
    return {
        "case": name,
        "first_loss": here[0][0],
        "last_loss": here[-1][0],
        "loss_difference_first": losses[0],
        "loss_difference_most": max(losses),
        "norm_difference_first": norms[0],
        "norm_difference_most": max(norms),
        "clipped_steps": sum(norm > 0.5 for _, norm in here),
        "loss_difference_of_bf16_on_cpu": noise if precision == "bf16" else None,
        "passed": losses[0] <= FIRST_LIMIT[precision] and max(losses) <= most,
    }


def loss_differences(these: Any, those: Any) -> list[float]:
    """By step."""
    return [abs(one[0] - other[0]) for one, other in zip(these, those, strict=True)]
