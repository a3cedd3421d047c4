"""Whole runs of :func:`parallelism.run.run_task` on several ranks, with planned mishaps."""

import os
import resource
import signal
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp

from parallelism.budget import Budget
from parallelism.checkpoint_store import CheckpointStore
from parallelism.data.config import DataConfig, TokenizerConfig
from parallelism.data.prepare import prepare
from parallelism.layout import Layout
from parallelism.models.gpt.config import GPTConfig
from parallelism.result import TrainResult
from parallelism.training import CheckpointPolicy, TrainingConfig, TrainTask

LENGTH, GLOBAL_BATCH = 32, 8
STEP_TOKENS = LENGTH * GLOBAL_BATCH
Event = tuple[str, dict[str, Any]]


def made_data(directory: Path) -> Path:
    """Thirty documents of a made language, as bytes."""
    texts = directory / "texts"
    texts.mkdir(parents=True)
    for index in range(30):
        words = (f"word{(index * 7 + place * place) % 97} goes {place % 13}" for place in range(300))
        (texts / f"{index:02d}.txt").write_text(" ".join(words), encoding="utf-8")
    config = DataConfig(
        train=[str(texts / "*.txt")],
        validation=0.1,
        tokenizer=TokenizerConfig(kind="bytes"),
        sequence_length=LENGTH,
    )
    prepare(config, directory / "data", seed=1)
    return directory / "data"


def made_task(data: Path, root: Path, *, dropout: float = 0.1, steps: float = 12.5, **fields: Any) -> TrainTask:
    """A 4-layer model for twelve steps, checkpoints every three in the background."""
    defaults: dict[str, Any] = {
        "budget": Budget(tokens=steps * STEP_TOKENS),
        "layout": Layout(),
        "checkpoint": CheckpointPolicy(steps=3),
        "evaluations": 3,
        "evaluation_tokens": 16 * LENGTH,
    }
    layout = (defaults | fields)["layout"]
    # Engine lean frees gradients as they come, so a step is one micro-batch.
    micro_batch = GLOBAL_BATCH // layout.data if layout.engine == "lean" else 2
    return TrainTask(
        name="made",
        seed=3,
        model=GPTConfig(layers=4, hidden=32, heads=4, kv_heads=2, vocab_size=257, context=LENGTH, dropout=dropout),
        training=TrainingConfig(
            global_batch=GLOBAL_BATCH, micro_batch=micro_batch, learning_rate=3e-3, precision="fp32"
        ),
        data_dir=str(data),
        sequence_length=LENGTH,
        checkpoint_dir=str(root),
        **(defaults | fields),
    )


def run_once(
    task: TrainTask, stop_at: int | None = None, full_disk: tuple[int, int] | None = None
) -> tuple[TrainResult, list[Event]]:
    """One attempt on this rank, paused after a step; ``full_disk``: (rank that has one, failures until it has not)."""
    from parallelism.run import run_task
    from parallelism.stop import StopRequest

    stop, events = StopRequest(), list[Event]()
    rank = torch.distributed.get_rank()
    if full_disk and rank == full_disk[0]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))

    def report(kind: str, fields: dict[str, Any]) -> None:
        events.append((kind, fields))
        if kind == "step" and fields["step"] == stop_at:
            stop.request("pause")
        if kind == "checkpoint_failed" and full_disk and fields["attempt"] == full_disk[1]:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    return run_task(task, report, stop), events


def run_until_killed(task: TrainTask, rank: int, step: int) -> None:
    """One attempt in which SIGKILL meets a rank before a step; its peers end when they miss it."""
    if torch.distributed.get_rank() == rank:
        _kill_before_step(step)
    try:
        run_once(task)
    except RuntimeError:
        os.kill(os.getpid(), signal.SIGKILL)


def run_with_a_writer_that_hangs(task: TrainTask, rank: int) -> tuple[TrainResult, list[Event]]:
    """One attempt in which a process that writes one rank's checkpoint hangs, once, as at a lock that nobody frees."""
    from parallelism import checkpoint, checkpoint_writing
    from parallelism.forked_writer import ForkedWriter

    ours, write, hung = os.getpid(), checkpoint_writing.Pending.write, list[object]()

    class Impatient(ForkedWriter):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments, still_seconds=3.0)
            hung.append(self)

    def hanging_write(pending: Any) -> Any:
        if os.getpid() != ours and torch.distributed.get_rank() == rank and not hung:
            time.sleep(3600)
        return write(pending)

    checkpoint.ForkedWriter, checkpoint_writing.Pending.write = Impatient, hanging_write  # type: ignore[misc]
    return run_once(task)


def _kill_before_step(number: int) -> None:
    from parallelism.feed import Feed

    ask = Feed.micro_batches

    def micro_batches(self: Feed, first: int, count: int) -> list[Any]:
        if first == (number - 1) * GLOBAL_BATCH and count == GLOBAL_BATCH:
            os.kill(os.getpid(), signal.SIGKILL)
        return ask(self, first, count)

    Feed.micro_batches = micro_batches  # type: ignore[method-assign]


def run_all(tasks: list[TrainTask]) -> list[tuple[TrainResult, list[Event]]]:
    """Several runs one after the other in the same processes."""
    return [run_once(task) for task in tasks]


def resumed(task: TrainTask) -> TrainTask:
    """The task, going on from its newest complete checkpoint."""
    newest = CheckpointStore(task.checkpoint_dir).newest()
    assert newest is not None
    return task.model_copy(update={"resume_from": str(newest.path), "epoch": newest.epoch + 1})


def stored_tensors(checkpoint: str | Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, weights and optimizer."""
    metadata = dcp.FileSystemReader(checkpoint).read_metadata()
    tensors: dict[str, Any] = {
        key: torch.empty(stored.size, dtype=stored.properties.dtype)
        for key, stored in metadata.state_dict_metadata.items()
        if hasattr(stored, "size")
    }
    dcp.load(tensors, checkpoint_id=checkpoint, no_dist=True)
    return tensors


def assert_same_bits(left: str | Path, right: str | Path) -> None:
    """The same tensors in both checkpoints, moments included."""
    one, other = stored_tensors(left), stored_tensors(right)
    assert one.keys() == other.keys()
    assert any(key.startswith("optimizer.state.exp_avg_sq.") for key in one)
    assert [key for key in one if not torch.equal(one[key], other[key])] == []


def losses(events: list[Event]) -> dict[int, float]:
    """Step → training loss."""
    return {fields["step"]: fields["loss"] for kind, fields in events if kind == "step"}
