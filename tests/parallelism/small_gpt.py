"""A small GPT and made tokens for tests of engines."""

from typing import Any

import numpy as np

from parallelism.budget import Budget
from parallelism.layout import Layout
from parallelism.models.gpt.config import GPTConfig
from parallelism.registry import ENGINES, load
from parallelism.training import TrainingConfig, TrainTask

SEQUENCE = 16
LEARNING_RATE = 3e-3


def small_task(
    *,
    layout: dict[str, Any] | None = None,
    training: dict[str, Any] | None = None,
    model: dict[str, Any] | None = None,
) -> TrainTask:
    """Four layers, grouped-query attention, tied embeddings, dropout 0; sizes of parameters that 4 does not divide.

    Every rank accumulates gradients over two micro-batches, or four in a pipeline: tensor-parallel ranks meet so often
    in each of them that it takes most of a test's time.
    """
    place = Layout(**(layout or {}))
    micro_batch = 2 if place.pipeline > 1 else 4 // place.data
    shape = {"layers": 4, "hidden": 36, "heads": 6, "kv_heads": 2, "ffn_hidden": 50, "vocab_size": 250, "context": 16}
    defaults = {"global_batch": 8, "micro_batch": micro_batch, "learning_rate": LEARNING_RATE, "precision": "fp32"}
    return TrainTask(
        name="small",
        seed=7,
        model=GPTConfig(**(shape | (model or {}))),
        layout=place,
        training=TrainingConfig(**(defaults | (training or {}))),
        budget=Budget(tokens=1e6),
        data_dir="unused",
        sequence_length=SEQUENCE,
        checkpoint_dir="unused",
    )


def make_engine(task: TrainTask) -> Any:
    """The engine that the task's layout names."""
    return load(ENGINES[task.layout.engine].implementation)(task)


def global_rows(task: TrainTask, step: int) -> np.ndarray:
    """Token ids [global_batch, sequence + 1] of a step: a noisy walk over the vocabulary, which can be learnt."""
    generator = np.random.default_rng(1000 + step)
    start = generator.integers(0, task.model.vocab_size, size=(int(task.training.global_batch), 1))
    strides = generator.choice([1, 2, 40], p=[0.7, 0.2, 0.1], size=(start.shape[0], SEQUENCE))
    walk = np.concatenate((start, start + np.cumsum(strides, axis=1)), axis=1)
    return np.asarray(walk % task.model.vocab_size, dtype=np.int64)


def micro_batches(task: TrainTask, data_rank: int, step: int) -> list[Any]:
    """This data rank's share of a step."""
    from parallelism.models.gpt.sharded import collate

    rows = global_rows(task, step)[data_rank :: task.layout.data]
    size = int(task.training.micro_batch)
    return [collate(rows[begin : begin + size]) for begin in range(0, len(rows), size)]


def train(engine: Any, task: TrainTask, begin: int, end: int, warmup: int = 4) -> tuple[list[float], list[float]]:
    """Losses and gradient norms of the steps ``begin`` to ``end``."""
    results = [
        engine.train_step(micro_batches(task, engine.data_rank, step), LEARNING_RATE * min(1.0, (step + 1) / warmup))
        for step in range(begin, end)
    ]
    return [result.loss for result in results], [result.gradient_norm for result in results]
