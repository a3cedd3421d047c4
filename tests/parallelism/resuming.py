"""Runs that are stopped and resumed, at the same layout and engine or at another: what ranks do in tests of engines."""

import hashlib
from pathlib import Path
from typing import Any

import torch

from parallelism.budget import Progress
from parallelism.training import TrainTask
from tests.parallelism.small_gpt import make_engine, train


def digest(engine: Any) -> str:
    """A fingerprint of everything this rank holds: weights, masters, moments."""
    total = hashlib.sha256()
    for piece in sorted(engine.sharded_state(), key=lambda piece: (piece.key, piece.global_offset)):
        total.update(f"{piece.key}{piece.global_offset}{tuple(piece.data.shape)}".encode())
        total.update(piece.data.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def stop_and_resume(tasks: list[TrainTask], steps: int, directory: Path) -> list[dict[str, Any]]:
    """``steps``, checkpoint, as many again; then the same from the checkpoint in an engine with another seed."""
    from parallelism import checkpoint

    results = []
    for index, task in enumerate(tasks):
        engine = make_engine(task)
        train(engine, task, 0, steps)
        checkpoint.save(engine, Progress(step=steps), directory / str(index))
        expected = train(engine, task, steps, 2 * steps)
        state = digest(engine)
        engine = make_engine(task.model_copy(update={"seed": task.seed + 1}))
        progress = checkpoint.load(engine, directory / str(index))
        found = train(engine, task, progress.step, 2 * steps)
        results.append({"expected": expected, "found": found, "same_state": digest(engine) == state})
    return results


def save_after(task: TrainTask, step: int, end: int, directory: Path) -> list[float]:
    """Losses of all steps until ``end``, with a checkpoint at ``step``."""
    from parallelism import checkpoint

    engine = make_engine(task)
    losses, _ = train(engine, task, 0, step)
    checkpoint.save(engine, Progress(step=step), directory)
    return losses + train(engine, task, step, end)[0]


def continue_from(tasks: list[TrainTask], directory: Path, end: int) -> list[list[float]]:
    """Losses of the steps after the checkpoint, by task."""
    from parallelism import checkpoint

    results = []
    for task in tasks:
        engine = make_engine(task)
        results.append(train(engine, task, checkpoint.load(engine, directory).step, end)[0])
    return results
