"""Training speed of the megatron engine against Hugging Face Transformers' Llama of the same shape.

Same weights' shapes, batch, threads, AdamW (fused), clipping and precision; each trainer in a process of its own, one
step at a time in turns, so that whatever else the machine does strikes both. Writes ``../results/training_speed.json``.

    python benchmarks/training_speed/bench.py [--steps 12] [--threads 1 2]
"""

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.trainers import Step, engine_step, transformers_step

RESULTS = Path(__file__).resolve().parents[1] / "results" / "training_speed.json"
LEARNING_RATE = 3e-4
SHAPES: dict[str, dict[str, int]] = {
    "5M": {"layers": 6, "hidden": 256, "heads": 8, "kv_heads": 4, "ffn_hidden": 704, "vocab_size": 4096},
    "25M": {"layers": 8, "hidden": 512, "heads": 8, "kv_heads": 4, "ffn_hidden": 1408, "vocab_size": 4096},
}
BATCHES = {"5M": (8, 256, 4), "25M": (4, 256, 2)}
"""Sequences per step, tokens per sequence, sequences per micro-batch."""


def make_espalier(shape: dict[str, int], batch: tuple[int, int, int], threads: int) -> tuple[Step, int]:
    """The engine's step, and the number of parameters."""
    from parallelism import device
    from parallelism.budget import Budget
    from parallelism.engines.megatron import MegatronEngine
    from parallelism.layout import Layout
    from parallelism.models.gpt.config import GPTConfig
    from parallelism.training import TrainingConfig, TrainTask

    rows, length, micro_batch = batch
    store = device.host_store()
    device.connect(0, 1, "127.0.0.1", store.port, threads=threads, store=store)
    config = GPTConfig(style="llama", context=length, **shape)
    training = TrainingConfig(
        global_batch=rows, micro_batch=micro_batch, learning_rate=LEARNING_RATE, precision="fp32", weight_decay=0.1
    )
    engine = MegatronEngine(
        TrainTask(
            name="speed",
            seed=1,
            model=config,
            layout=Layout(),
            training=training,
            budget=Budget(tokens=1e12),
            data_dir="",
            sequence_length=length,
            checkpoint_dir="",
            threads_per_rank=threads,
        )
    )
    return engine_step(engine, micro_batch, LEARNING_RATE), config.parameter_count()


def make_transformers(shape: dict[str, int], batch: tuple[int, int, int], threads: int) -> tuple[Step, int]:
    """The same of Transformers."""
    import torch

    torch.set_num_threads(threads)
    torch.manual_seed(1)
    _, length, micro_batch = batch
    return transformers_step(shape, shape["vocab_size"], length, micro_batch, LEARNING_RATE, torch.float32)


MAKERS = {"espalier": make_espalier, "transformers": make_transformers}


def serve(name: str, pipe: Connection, shape: dict[str, int], batch: tuple[int, int, int], threads: int) -> None:
    """Carry out one step per message until the pipe closes."""
    import numpy as np

    step, parameters = MAKERS[name](shape, batch, threads)
    pipe.send(parameters)
    generator = np.random.default_rng(0)
    while pipe.recv():
        ids = generator.integers(0, shape["vocab_size"], (batch[0], batch[1] + 1))
        started = time.perf_counter()
        loss = step(ids)
        pipe.send((time.perf_counter() - started, loss))


def compare(shape_name: str, threads: int, steps: int) -> dict[str, Any]:
    """Median seconds per step of both and the median of the ratios of neighbouring steps."""
    shape, batch = SHAPES[shape_name], BATCHES[shape_name]
    context = multiprocessing.get_context("spawn")
    os.environ["OMP_NUM_THREADS"] = str(threads)
    pipes, parameters = {}, {}
    for name in MAKERS:
        pipes[name], theirs = context.Pipe()
        context.Process(target=serve, args=(name, theirs, shape, batch, threads), daemon=True).start()
    for name, pipe in pipes.items():
        parameters[name] = pipe.recv()
    seconds: dict[str, list[float]] = {name: [] for name in MAKERS}
    for index in range(steps + 2):
        for name, pipe in pipes.items():
            pipe.send(True)
            elapsed, _ = pipe.recv()
            if index >= 2:  # the first steps make buffers and optimizer states
                seconds[name].append(elapsed)
    for pipe in pipes.values():
        pipe.send(False)
    tokens = batch[0] * batch[1]
    ratios = [theirs / ours for ours, theirs in zip(seconds["espalier"], seconds["transformers"], strict=True)]
    return {
        "shape": shape_name,
        "threads": threads,
        "parameters": parameters["espalier"],
        "parameters_transformers": parameters["transformers"],
        "tokens_per_step": tokens,
        "espalier_tokens_per_second": round(tokens / statistics.median(seconds["espalier"]), 1),
        "transformers_tokens_per_second": round(tokens / statistics.median(seconds["transformers"]), 1),
        "speed_ratio_median": round(statistics.median(ratios), 3),
        "speed_ratio_range": [round(min(ratios), 3), round(max(ratios), 3)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    options = parser.parse_args()
    results = []
    for shape in options.shapes:
        for threads in options.threads:
            results.append(compare(shape, threads, options.steps))
            print(json.dumps(results[-1]), flush=True)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({"measured": results, "cores": os.cpu_count()}, indent=2) + "\n")


if __name__ == "__main__":
    main()
